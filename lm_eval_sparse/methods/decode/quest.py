"""Quest (Tang et al., ICML 2024) as harmonised by The Sparse Frontier (section 3): pages chosen by each query.

The cache keeps everything. For each page the smallest and the largest value of every key dimension bound the
score that any of its keys can have; each new token reads the pages with the largest bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import UserError
from ...kernels.decode import PageSelection
from ...kernels.index.pages import PageBudget, choose_pages
from ..base import DecodeContext, DecodeMethod, number, one_of

PAGE_SIZES = (8, 16, 32, 64)
#: Bound scores held at once.
SCORE_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Quest(DecodeMethod):
    """The pages with the largest upper bound of their scores, and the page being written (paper: section 3, Table 3).

    Knobs:
        budget: keys that a new token reads besides those of the current page, a multiple of `page_size`.
        page_size: keys per page: 8, 16, 32 or 64.
        share_pages: whether the query heads of a KV head read the same pages, those with the largest summed bounds;
            else each reads its own, and keys are loaded once for every query head that asks for them.

    All layers are sparse (the original leaves the first two dense) and no sink is forced, as in the paper.
    """

    name: ClassVar[str] = "quest"
    unit: ClassVar[str] = "pages"
    importance: ClassVar[str] = "bounds per query"
    allocation: ClassVar[str] = "uniform"
    kv: ClassVar[str] = "full cache"
    paper: ClassVar[str] = "Tang et al., ICML 2024"
    budget_knobs: ClassVar[tuple[str, ...]] = ("budget",)
    appends: ClassVar[bool] = True

    budget: int = 1024
    page_size: int = 16
    share_pages: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("page_size", self.page_size, PAGE_SIZES)
        number("budget", self.budget, 1, math.inf, whole=True, example=1024)
        if not isinstance(self.share_pages, bool):
            raise UserError(f"share_pages={self.share_pages!r} is not accepted: give True or False")
        if self.budget % self.page_size:
            below, above = (self.budget // self.page_size + step for step in (0, 1))
            nearest = " or ".join(f"budget={pages * self.page_size}" for pages in (below, above) if pages)
            raise UserError(f"budget={self.budget} is not a multiple of page_size={self.page_size}: give {nearest}")

    @torch.no_grad()
    def select(self, query: Tensor, context: DecodeContext, *, sparsity: float | None) -> PageSelection:
        sequences, group, steps, _ = query.shape
        # Nothing that the host does not know: the longest sequence may hold that many pages before its current one.
        # A multiple of 16 lets kernels load scores in whole vectors.
        most = -(-((context.kv.longest - 1) // self.page_size) // 16) * 16
        lists = 1 if self.share_pages else group
        some = max(1, SCORE_ELEMENTS // max(1, sequences * lists * most))
        if steps <= some or context.new is not None:  # new ones are few
            return self._choose(query, context, most, sparsity)
        parts = []
        for first in range(0, steps, some):
            part = query[:, :, first : first + some]
            behind = steps - first - part.shape[2]
            kv = replace(context.kv, lengths=(context.kv.lengths - behind).clamp(min=0))
            earlier = replace(context, kv=kv, tokens=context.tokens - behind)
            parts.append(self._choose(part, earlier, most, sparsity))
        pages, counts = (torch.cat(found, 2) for found in zip(*((p.pages, p.counts) for p in parts), strict=True))
        return PageSelection(pages, counts, self.page_size)

    def _choose(self, query: Tensor, context: DecodeContext, most: int, sparsity: float | None) -> PageSelection:
        """Choose among at most `most` complete pages of each sequence; as `select`."""
        pages = None if sparsity is not None else self.budget // self.page_size
        keep = None if sparsity is None else 1 - sparsity
        budget = PageBudget(self.page_size, pages, keep, context.kv_heads)
        width = most if pages is None else min(most, pages)
        return choose_pages(
            query,
            context.bounds,
            context.kv,
            context.tokens,
            budget,
            width=width + 1,
            pages=most,
            shared=self.share_pages,
            new=context.new,
            overlap=context.overlap,
        )

    def cost(self, visible: Tensor, read: Tensor, group: int, dim: int, element: int) -> tuple[Tensor, Tensor]:
        # Two products with the bounds of each complete page, for each query head; nothing where all are read.
        scored = torch.where(read < visible, (visible - 1) // self.page_size, 0)
        return scored * (4 * dim * group), scored * (2 * dim * element)
