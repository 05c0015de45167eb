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

from ...errors import UserError
from ...kernels.estimate import update_bounds
from ...kernels.index.pages import PageBudget, choose_pages
from ...kernels.types import PageBounds, Reads, Slot
from ..base import Call, number, one_of, yes_or_no
from ..presets import TEN, Parameters, rows
from ..scored import ScoredDecode

PAGE_SIZES = (8, 16, 32, 64)


@dataclass(frozen=True)
class Quest(ScoredDecode):
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
    reference: ClassVar[str] = "Tang et al., ICML 2024"
    appends: ClassVar[bool] = True
    shares: ClassVar[bool] = True
    tiny: ClassVar = {"budget": 48, "page_size": 8}
    paper: ClassVar = Parameters(
        TEN,
        ("budget",),
        rows(
            {
                16384: (816, 1088, 1632, 2176, 3280, 4912, 6560, 8192, 9824, 11472),
                32768: (1632, 2192, 3280, 4368, 6560, 9824, 13104, 16384, 19664, 22944),
                65536: (3280, 4368, 6560, 8736, 13104, 19664, 26208, 32768, 39328, 45872),
                128000: (6400, 8544, 12800, 17056, 25600, 38400, 51200, 64000, 76800, 89600),
            }
        ),
    )

    budget: int = 1024
    page_size: int = 16
    share_pages: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("page_size", self.page_size, PAGE_SIZES)
        number("budget", self.budget, 1, math.inf, whole=True, example=1024)
        yes_or_no("share_pages", self.share_pages)
        if self.budget % self.page_size:
            below, above = (self.budget // self.page_size + step for step in (0, 1))
            nearest = " or ".join(f"budget={pages * self.page_size}" for pages in (below, above) if pages)
            raise UserError(f"budget={self.budget} is not a multiple of page_size={self.page_size}: give {nearest}")

    def slots(self) -> tuple[Slot, ...]:
        return Slot("low", "page", (-1,), derived=True), Slot("high", "page", (-1,), derived=True)

    def prefilled(self, call: Call) -> None:
        update_bounds(call.cache.kv, bounds_of(call), torch.zeros_like(call.cache.kv.lengths))

    def appended(self, call: Call, before: Tensor) -> None:
        update_bounds(call.cache.kv, bounds_of(call), before)

    def lists(self, call: Call) -> int:
        return 1 if self.share_pages else call.query.shape[1]

    def choose(self, call: Call, budget: PageBudget, width: int, most: int) -> Reads:
        """Scores, choice and the new tokens in one launch where there is one for it."""
        cache = call.cache
        return choose_pages(
            call.query,
            bounds_of(call),
            cache.kv,
            cache.tokens,
            budget,
            width=width,
            pages=most,
            shared=self.share_pages,
            new=cache.new,
            overlap=cache.overlap,
        )

    def cost(self, visible: Tensor, read: Tensor, group: int, dim: int, element: int) -> tuple[Tensor, Tensor]:
        # Two products with the bounds of each complete page, for each query head; nothing where all are read.
        scored = torch.where(read < visible, (visible - 1) // self.page_size, 0)
        return scored * (4 * dim * group), scored * (2 * dim * element)


def bounds_of(call: Call) -> PageBounds:
    """The state, as bounds of pages."""
    state = call.state
    return PageBounds(state.page_size, state["low"], state["high"], state.first, state.tails)
