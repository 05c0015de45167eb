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

from ...kernels.index.top_p_blocks import APART, coverage_keys
from ...kernels.types import Blocks
from ..base import Call, Density, Mass, number
from ..presets import SEVEN, Parameters
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
    reference: ClassVar[str] = "Lai et al., ICLR 2025; Nawrot et al., 2025"
    budget_knobs: ClassVar[tuple[str, ...]] = ("alpha", "min_budget")
    native: ClassVar[type] = Mass
    tiny: ClassVar = {"alpha": 0.2, "min_budget": 4, "window": 32, "tile": 16, "near": 4}
    paper: ClassVar = Parameters(
        SEVEN,
        ("alpha", "min_budget"),
        {
            16384: ((0, 164), (0, 240), (0, 315), (0, 400), (0.55, 512), (0.71, 512), (0.88, 512)),
            32768: ((0, 290), (0, 384), (0.45, 512), (0.6, 512), (0.7, 512), (0.8, 512), (0.92, 512)),
            65536: ((0, 400), (0.45, 512), (0.55, 512), (0.7, 512), (0.77, 512), (0.85, 512), (0.94, 512)),
        },
        window=256,
    )

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
    def select(self, call: Call) -> Blocks:
        heads, length, _ = call.query.shape
        pattern = self._pattern(self._sums(call))
        # Equal heads reach the next column at shares that lie a hair apart, so that the solve takes them one by one.
        apart = 1 + APART * torch.arange(heads, device=call.query.device, dtype=torch.float64)[:, None]
        columns, diagonals = (coverage_keys(masses) * apart for masses in pattern.descending())
        floor = 0
        match call.budget:
            case Mass(share):
                rest, floor = 1 - share, min(length, int(self.min_budget))
                n_vertical, n_slash = pattern.covering((columns, diagonals), rest, floor)
            case Density(share):
                rest, n_vertical, n_slash = pattern.solve_covering((columns, diagonals), share)
        selection = self._selection(call, pattern, n_vertical, n_slash)
        solved = {
            "alpha": 1 - rest,
            "one_minus_alpha": rest,
            "min_budget": floor,
            "verticals": told(n_vertical.float().mean()),
            "slashes": told(n_slash.float().mean()),
        }
        return replace(selection, knobs={**solved, **selection.knobs})
