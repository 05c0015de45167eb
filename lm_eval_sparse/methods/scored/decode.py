"""What a new token reads, by a score for each page or token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.budget import solve_each
from ...kernels.index.pages import PageBudget, select_pages
from ...kernels.types import Reads
from ..base import Budget, Call, Count, DecodeMethod, Density, Mass
from .allocation import Allocation, PerLayer, TopP, Uniform, checked
from .prefill import missing_mass

#: Scores of pages held at once.
SCORE_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class ScoredDecode(DecodeMethod):
    """Pages, or with `page_size = 1` tokens, by a score for each (new token, page).

    The page that a token is in is always read. The first of `budget_knobs` is how many keys are read besides; under
    `TopP` the share of its mass that a token reads at least.
    """

    kv: ClassVar[str] = "full cache"
    allocation: ClassVar[Allocation] = Uniform()
    allocations: ClassVar[tuple[type, ...]] = (Uniform, PerLayer, TopP)
    budget_knobs: ClassVar[tuple[str, ...]] = ("budget",)

    def score(self, call: Call, pages: int) -> Tensor:
        """`(S, Gs, T, P)` fp32 of the first P = `pages` pages of each sequence, of which complete ones count.

        Gs is 1 where the query heads of a KV head share their pages, else their number. Under `TopP` it is a share of
        the token's mass, not negative, and of all pages that the token may see, the one that it is in included.
        """
        raise NotImplementedError

    def lists(self, call: Call) -> int:
        """Lists of each sequence: 1, or as many as query heads."""
        return call.query.shape[1]

    @torch.no_grad()
    def select(self, call: Call) -> Reads:
        sequences, _, steps, _ = call.query.shape
        kv = call.cache.kv
        covers = isinstance(self.allocation, TopP)
        # Nothing that the host does not know: the longest sequence may hold that many pages before its current one.
        # A multiple of 16 lets kernels load scores in whole vectors.
        most = -(-((kv.longest - (not covers)) // self.page_size + covers) // 16) * 16
        # What covers a share is sorted in fp64, with the order beside it.
        elements = SCORE_ELEMENTS // 8 if covers else SCORE_ELEMENTS
        some = max(1, elements // max(1, sequences * self.lists(call) * most))
        if steps <= some or call.cache.new is not None:  # new ones are few
            return self._choose(call, most)
        return joined(self._choose(part, most) for part in pieces(call, some))

    def _choose(self, call: Call, most: int) -> Reads:
        """Choose among at most `most` complete pages of each sequence."""
        if isinstance(self.allocation, TopP):
            lists = len(call.query), (1, call.query.shape[1]), call.query.shape[2], most
            return cover(call, checked(self.score(call, most), lists, undefined=True), call.budget, self.page_size)
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


def pieces(call: Call, some: int) -> Iterator[Call]:
    """The call for at most `some` of its new tokens at a time, each as if it were the last to have come."""
    kv, steps = call.cache.kv, call.query.shape[2]
    for first in range(0, steps, some):
        part = call.query[:, :, first : first + some]
        behind = steps - first - part.shape[2]
        lengths = (kv.lengths - behind).clamp(min=0)
        cache = replace(call.cache, kv=replace(kv, lengths=lengths), tokens=call.cache.tokens - behind)
        yield replace(call, query=part, cache=cache)


def joined(parts: Iterable[Reads]) -> Reads:
    """What was read by the tokens of all parts, in lists without weights that are equally wide."""
    found = list(parts)
    ids, counts = (torch.cat(lists, 2) for lists in zip(*((part.ids, part.counts) for part in found), strict=True))
    return Reads(ids, counts, found[0].unit)


def cover(call: Call, score: Tensor, budget: Budget, page_size: int, among: Tensor | None = None) -> Reads:
    """The fewest pages of each list that leave out at most a share of its mass, and the page that its token is in.

    Under a `Density` that share is the same for all lists of a row's token, and such that these together read what
    comes nearest to it.

    Args:
        score: `(S, Gs, T, P)`, not negative where there is a page; P pages hold the longest sequence.
        among: bool like `score`, pages that are to be chosen from; the token's own must be one of them. None for all.
    """
    sequences, lists, steps, pages = score.shape
    kv, heads = call.cache.kv, call.cache.kv_heads
    visible = kv.visible(steps)[:, None, :, None]
    place = torch.arange(pages, device=score.device)
    own = ((visible - 1) // page_size).clamp(min=0)
    there = ((place <= own) & (visible > 0)).expand_as(score)
    forced = (place == own).expand_as(score) & there
    there = there if among is None else (there & among) | forced
    missing = missing_mass(torch.where(there, score, 0.0).clamp(min=0), forced)
    missing = missing.masked_fill(forced, torch.inf).masked_fill(~there, -torch.inf)
    match budget:
        case Mass(share):
            return Reads.from_mask(missing > 1 - share, page_size)
        case Density(share):
            pass
        case _:
            raise TypeError(f"{budget} is no share")
    # All lists of one token of a row side by side.
    shape = len(score) // heads, heads, lists, steps, pages
    keys = torch.where(there, (visible - place * page_size).clamp(0, page_size), 0)
    flat = [part.reshape(shape).movedim(3, 1).reshape(shape[0] * steps, -1) for part in (missing, keys)]
    logical = call.cache.logical(steps).reshape(shape[0], heads, steps)[:, 0]
    taken, _ = solve_each(*flat, (share * heads * lists * logical).double().flatten())
    mask = taken.reshape(shape[0], steps, heads, lists, pages).movedim(1, 3).reshape(score.shape)
    return Reads.from_mask(mask & there, page_size)
