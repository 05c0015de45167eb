"""What a new token reads, by a score for each page or token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.index.pages import PageBudget, select_pages
from ...kernels.types import Reads
from ..base import Call, Count, DecodeMethod, Density
from .allocation import Allocation, PerLayer, Uniform, checked

#: Scores of pages held at once.
SCORE_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class ScoredDecode(DecodeMethod):
    """Pages, or with `page_size = 1` tokens, by a score for each (new token, page).

    The page that a token is in is always read. The first of `budget_knobs` is how many keys are read besides.
    """

    kv: ClassVar[str] = "full cache"
    allocation: ClassVar[Allocation] = Uniform()
    allocations: ClassVar[tuple[type, ...]] = (Uniform, PerLayer)
    budget_knobs: ClassVar[tuple[str, ...]] = ("budget",)

    def score(self, call: Call, pages: int) -> Tensor:
        """`(S, Gs, T, P)` fp32 of the first P = `pages` pages of each sequence, of which complete ones count.

        Gs is 1 where the query heads of a KV head share their pages, else their number.
        """
        raise NotImplementedError

    def lists(self, call: Call) -> int:
        """Lists of each sequence: 1, or as many as query heads."""
        return call.query.shape[1]

    @torch.no_grad()
    def select(self, call: Call) -> Reads:
        sequences, _, steps, _ = call.query.shape
        kv = call.cache.kv
        # Nothing that the host does not know: the longest sequence may hold that many pages before its current one.
        # A multiple of 16 lets kernels load scores in whole vectors.
        most = -(-((kv.longest - 1) // self.page_size) // 16) * 16
        some = max(1, SCORE_ELEMENTS // max(1, sequences * self.lists(call) * most))
        if steps <= some or call.cache.new is not None:  # new ones are few
            return self._choose(call, most)
        parts = []
        for first in range(0, steps, some):
            part = call.query[:, :, first : first + some]
            behind = steps - first - part.shape[2]
            cache = replace(
                call.cache,
                kv=replace(kv, lengths=(kv.lengths - behind).clamp(min=0)),
                tokens=call.cache.tokens - behind,
            )
            parts.append(self._choose(replace(call, query=part, cache=cache), most))
        ids, counts = (torch.cat(found, 2) for found in zip(*((p.ids, p.counts) for p in parts), strict=True))
        return Reads(ids, counts, self.page_size)

    def _choose(self, call: Call, most: int) -> Reads:
        """Choose among at most `most` complete pages of each sequence."""
        pages = keep = None
        match self.allocation.at(call.budget, call.layer):
            case Count(number):
                pages = int(number) // self.page_size
            case Density(share):
                keep = share
            case other:
                raise TypeError(f"{other} is no number of keys")
        budget = PageBudget(self.page_size, pages, keep, call.cache.kv_heads)
        width = 1 + (most if pages is None else min(most, pages))
        return self.choose(call, budget, width, most)

    def choose(self, call: Call, budget: PageBudget, width: int, most: int) -> Reads:
        """Lists of `width` places among the first `most` pages; a method with one kernel for all overrides it."""
        sequences, group, steps, _ = call.query.shape
        score = checked(self.score(call, most), (sequences, (1, group), steps, most), undefined=True)
        return select_pages(score, call.cache.kv, call.cache.tokens, budget, width=width)
