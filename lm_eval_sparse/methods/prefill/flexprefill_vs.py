"""FlexPrefill as harmonised by The Sparse Frontier (section 3): verticals and slashes by coverage, per head.

The query-aware branch of FlexPrefill (Lai et al., ICLR 2025) is off (tau = 0), so that it differs from
`vertical_slash` in one thing only: each head takes as many verticals and slashes as cover the share alpha of the
window's attention, and at least a floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.index.top_p_blocks import APART, coverage_keys
from ..base import Selection, number
from .vertical_slash import VerticalSlashMethod, told


@dataclass(frozen=True)
class FlexPrefillVS(VerticalSlashMethod):
    """Per head, the verticals (and the slashes) that cover the share `alpha`, and at least `min_budget` of each.

    Knobs:
        alpha: in [0, 1]; a head takes 1 + the number of masses, largest first, whose running sum is at most alpha.
        min_budget: verticals, and slashes, that each head takes at least; 0 when a sparsity is requested.
        window, sinks, near, tile: as in `vertical_slash`.
    """

    name: ClassVar[str] = "flexprefill_vs"
    allocation: ClassVar[str] = "threshold"
    paper: ClassVar[str] = "Lai et al., ICLR 2025; Nawrot et al., 2025"
    budget_knobs: ClassVar[tuple[str, ...]] = ("alpha", "min_budget")

    alpha: float = 0.9
    min_budget: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        number("alpha", self.alpha, 0, 1, example=0.9)
        number("min_budget", self.min_budget, 0, math.inf, whole=True, example=512)

    def too_short(self, sparsity: float | None, length: int) -> str | None:
        if sparsity is None and self.min_budget >= length:
            return f"prompt of {length} tokens has no more than min_budget={self.min_budget}"
        return super().too_short(sparsity, length)

    @torch.no_grad()
    def select(
        self, query: Tensor, key: Tensor, *, scale: float, softcap: float | None, sparsity: float | None
    ) -> Selection:
        heads, length, _ = query.shape
        method = self if sparsity is None else self.knobs_for(sparsity, length)
        pattern = method._pattern(self._sums(query, key, scale, softcap))
        # Equal heads reach the next column at shares that lie a hair apart, so that the solve takes them one by one.
        apart = 1 + APART * torch.arange(heads, device=query.device, dtype=torch.float64)[:, None]
        columns, diagonals = (coverage_keys(masses) * apart for masses in pattern.descending())
        floor = min(length, int(self.min_budget)) if sparsity is None else 0
        if sparsity is None:
            rest = 1 - self.alpha
            n_vertical, n_slash = pattern.covering((columns, diagonals), rest, floor)
        else:
            rest, n_vertical, n_slash = pattern.solve_covering((columns, diagonals), 1 - sparsity)
        selection = method._selection(query, key, pattern, n_vertical, n_slash)
        solved = {
            "alpha": 1 - rest,
            "one_minus_alpha": rest,
            "min_budget": floor,
            "verticals": told(n_vertical.float().mean()),
            "slashes": told(n_slash.float().mean()),
        }
        return replace(selection, knobs={**solved, **selection.knobs})
