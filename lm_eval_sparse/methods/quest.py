"""Quest (Tang et al., ICML 2024) as harmonised by The Sparse Frontier (section 3): pages chosen by each query.

The cache keeps everything. For each page the smallest and the largest value of every key dimension bound the
score that any of its keys can have; each new token reads the pages with the largest bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.estimators import bound_scores
from ..kernels.paged_decode import PageSelection
from .base import DecodeContext, DecodeMethod, DecodeSelection, number, one_of

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

    def _complete_pages(
        self, sparsity: float | None, visible: Tensor, logical: Tensor, kv_heads: int
    ) -> tuple[Tensor, Tensor]:
        """Complete pages that there are before the current one, and how many of them are read."""
        before = (visible - 1) // self.page_size
        if sparsity is None:
            return before, torch.full_like(before, self.budget // self.page_size).minimum(before)
        current = visible - before * self.page_size
        wanted = torch.round(((1 - sparsity) * logical.double() - current) / self.page_size).long().clamp(min=0)
        if bool((wanted <= before).all()):
            return before, wanted
        # After eviction some heads hold fewer pages than they may read: the others of their row read more.
        rows = (-1, kv_heads, *before.shape[1:])
        return before, fill(wanted.reshape(rows).sum(1), before.reshape(rows)).reshape(before.shape)

    def covers(self, sparsity: float | None, visible: Tensor, logical: Tensor, kv_heads: int = 1) -> Tensor:
        before, read = self._complete_pages(sparsity, visible, logical, kv_heads)
        return read == before

    @torch.no_grad()
    def select(self, query: Tensor, context: DecodeContext, *, sparsity: float | None) -> DecodeSelection:
        sequences, group, steps, dim = query.shape
        lists = 1 if self.share_pages else group
        device = query.device
        before, read = self._complete_pages(sparsity, context.visible, context.logical, context.kv_heads)
        most, width = int(before.max()), int(read.max())
        current = before.to(device=device, dtype=torch.int32)
        pages = torch.empty(sequences, lists, steps, width + 1, dtype=torch.int32, device=device)
        pages[..., 0] = current[:, None]
        if width:
            ids = torch.arange(most, device=device)
            step = max(1, SCORE_ELEMENTS // (sequences * group * most))
            for first in range(0, steps, step):
                part = slice(first, first + step)
                scores = bound_scores(query[:, :, part], context.bounds, most)
                if self.share_pages:
                    scores = scores.sum(1, keepdim=True)
                scores.masked_fill_(ids >= current[:, None, part, None], -math.inf)
                # Ties go to recent pages.
                order = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
                pages[:, :, part, 1:] = most - 1 - order[..., :width]
        per_list = (sequences, lists, steps)
        keys_read = read * self.page_size + context.visible - before * self.page_size
        element = context.kv.keys.element_size()
        return DecodeSelection(
            pages=PageSelection(
                pages, (read + 1).to(device=device, dtype=torch.int32)[:, None].expand(per_list), self.page_size
            ),
            keys_read=keys_read[:, None].expand(per_list),
            # Two products with the bounds of each complete page, for each query head; nothing where all are read.
            estimator_flops=torch.where(read < before, before, 0) * (4 * dim * group),
            estimator_bytes=torch.where(read < before, before, 0) * (2 * dim * element),
            knobs={"page_size": self.page_size},
        )


def fill(total: Tensor, held: Tensor) -> Tensor:
    """Share `total (R, T)` among the heads `(R, H, T)` evenly, none getting more than it holds.

    What does not divide goes to the heads that hold the most.
    """
    total = torch.minimum(total, held.sum(1))
    given = torch.zeros_like(held)
    while True:
        hungry = given < held
        count = hungry.sum(1).clamp(min=1)
        share = (total - given.sum(1)) // count
        if not bool(share.any()):
            break
        given += torch.where(hungry, torch.minimum(held - given, share[:, None]), 0)
    # Fewer are left than heads that could take one: the largest first, of equals the first.
    rank = (held - given).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return given + ((rank < (total - given.sum(1))[:, None]) & (given < held))
