"""Vertical-Slash (MInference, Jiang et al. 2024) as harmonised by The Sparse Frontier (section 3): uniform counts.

The last queries of the prompt vote: the keys that they attend to most become verticals, columns read by every
query; the diagonals on which their attention lies become slashes. Slashes are executed as tiles, verticals as
single columns where no tile covers them.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...kernels.estimate import WindowSums, window_flops, window_sums
from ...kernels.index import vertical_slash as patterns
from ...kernels.index.vertical_slash import Pattern
from ...kernels.index.vertical_slash.naive import pattern_pairs
from ...kernels.types import BLOCK_SIZES, Blocks, Cost, causal_pairs
from ..base import FORCED_SHARE, MAX_STEP, Call, Count, Density, Layer, PrefillMethod, number, one_of
from ..presets import TEN, Parameters, rows

#: The paper's tile and near diagonals; larger ones are used only when asked for.
TILE = NEAR = 64


@dataclass(frozen=True)
class VerticalSlashMethod(PrefillMethod):
    """What `vertical_slash` and `flexprefill_vs` share: the window, the forced parts, and the pattern's execution."""

    unit: ClassVar[str] = "verticals + slashes"
    importance: ClassVar[str] = "window of last queries"
    kv: ClassVar[str] = "full cache"

    window: int = 256
    sinks: int = 4
    near: int | Literal["auto"] = "auto"
    tile: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("window", self.window, 1, math.inf, whole=True, example=256)
        number("sinks", self.sinks, 0, math.inf, whole=True, example=4)
        if self.near != "auto":
            number("near", self.near, 1, math.inf, whole=True, example=64)
        one_of("tile", self.tile, BLOCK_SIZES, auto=True)

    def knobs_for(self, sparsity: float, length: int, layer: Layer | None = None) -> VerticalSlashMethod:
        """The largest tile up to 64, and the most near diagonals, that leave three quarters of the budget free.

        A tile is also no larger than lets single slashes meet the sparsity: 16 at 4K, 32 at 8K, 64 from 16K on.
        """
        # One more slash may touch two tiles in every row.
        fine = [size for size in (64, 32, 16) if 4 * size / length <= MAX_STEP]
        tiles = (fine or [16]) if self.tile == "auto" else [int(self.tile)]
        nears = [NEAR >> halvings for halvings in range(7)] if self.near == "auto" else [int(self.near)]
        for near, tile in itertools.product(nears, tiles):
            if forced_density(length, tile, near, int(self.sinks)) <= FORCED_SHARE * (1 - sparsity):
                return replace(self, tile=tile, near=near)
        return replace(self, tile=tiles[-1], near=nears[-1])

    def largest_sparsity(self, length: int) -> float:
        tile = BLOCK_SIZES[0] if self.tile == "auto" else int(self.tile)
        return 1 - forced_density(length, tile, 1 if self.near == "auto" else int(self.near), int(self.sinks))

    def too_short(self, sparsity: float | None, length: int) -> str | None:
        if sparsity is not None and self.largest_sparsity(length) < sparsity:
            return (
                f"prompt of {length} tokens is too short for sparsity {sparsity:g} (near diagonals and "
                f"{self.sinks} sinks are always kept: at most {max(0.0, self.largest_sparsity(length)):.3f} there)"
            )
        return None

    def _pattern(self, sums: WindowSums) -> Pattern:
        tile = TILE if self.tile == "auto" else int(self.tile)
        near = NEAR if self.near == "auto" else int(self.near)
        return patterns.rank(sums.columns, sums.diagonals, int(self.sinks), near, tile)

    def _sums(self, call: Call) -> WindowSums:
        window, scale, softcap = int(self.window), call.scale, call.softcap
        return window_sums(call.query, call.key, window, scale=scale, softcap=softcap, columns=True, diagonals=True)

    def _selection(self, call: Call, pattern: Pattern, n_vertical: Tensor, n_slash: Tensor) -> Blocks:
        query, key = call.query, call.key
        heads, length, dim = query.shape
        return replace(
            pattern.layout(n_vertical, n_slash),
            count_selected=lambda: pattern.selected_pairs(n_vertical, n_slash),
            cost=Cost(
                window_flops(heads, int(self.window), length, dim),
                query.element_size() * dim * (key.shape[0] * length + heads * min(self.window, length)),
            ),
            knobs={
                "tile": pattern.tile,
                "near": pattern.near,
                "sinks": pattern.sinks,
                "window": min(self.window, length),
            },
        )


@dataclass(frozen=True)
class VerticalSlash(VerticalSlashMethod):
    """The same number of verticals and of slashes in every head (paper: section 3 and Table 3).

    Knobs:
        verticals, slashes: columns and diagonals that each query head reads, the forced ones included.
        window: last queries that vote, fewer where the prompt is shorter, unless it is typed. `preset=paper` leaves it
            to the task: 512 for NIAH and Story Retrieval, else 256.
        sinks, near: first columns and nearest diagonals that are always read; `near` is 64 by default.
        tile: 16, 32, 64 or 128; 64 by default. Where a requested sparsity leaves no room for the defaults of `near` and
            `tile` they shrink; what is typed is kept.
    """

    name: ClassVar[str] = "vertical_slash"
    allocation: ClassVar[str] = "uniform"
    reference: ClassVar[str] = "Jiang et al., NeurIPS 2024 (MInference)"
    budget_knobs: ClassVar[tuple[str, ...]] = ("verticals", "slashes")
    tiny: ClassVar = {"verticals": 12, "slashes": 8, "window": 32, "tile": 16, "near": 4}
    paper: ClassVar = Parameters(
        TEN,
        ("verticals", "slashes"),
        rows(
            {
                16384: (164, 240, 315, 400, 448, 576, 768, 1024, 1536, 2304),
                32768: (290, 384, 448, 576, 704, 1024, 1536, 2304, 3584, 4608),
                65536: (400, 448, 544, 640, 960, 1280, 2304, 4096, 6144, 8192),
                128000: (480, 768, 1024, 1536, 2048, 3584, 5632, 10240, 13312, 18432),
            },
            2,
        ),
        window=256,
    )

    verticals: int = 512
    slashes: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        number("verticals", self.verticals, 1, math.inf, whole=True, example=512)
        number("slashes", self.slashes, 1, math.inf, whole=True, example=512)

    def too_short(self, sparsity: float | None, length: int) -> str | None:
        if sparsity is None and max(self.verticals, self.slashes) >= length:
            return f"prompt of {length} tokens has no more than verticals={self.verticals} or slashes={self.slashes}"
        return super().too_short(sparsity, length)

    @torch.no_grad()
    def select(self, call: Call) -> Blocks:
        query = call.query
        pattern = self._pattern(self._sums(call))
        match call.budget:
            case Count(verticals):
                n_vertical, n_slash = (
                    torch.full((len(query),), int(count), device=query.device) for count in (verticals, self.slashes)
                )
            case Density(share):
                n_vertical, n_slash = pattern.equal_counts(share)
        selection = self._selection(call, pattern, n_vertical, n_slash)
        counts = {"verticals": told(n_vertical[0]), "slashes": told(n_slash[0])}
        return replace(selection, knobs={**counts, **selection.knobs})


@functools.lru_cache(maxsize=4096)
def forced_density(length: int, tile: int, near: int, sinks: int) -> float:
    """Share of the causal triangle that the tiles of the nearest `near` diagonals and the sink columns take."""
    blocks = -(-length // tile)
    ids = torch.arange(blocks)
    columns = (sinks - ids * tile).clamp(0, tile)
    # The nearest diagonal to touch distance d is (d - 1) * tile + 1: its first queries lie in that row of tiles.
    bands = (ids == 0) | ((ids - 1) * tile + 1 < min(near, length))
    columns[-1].clamp_(max=length - (blocks - 1) * tile)
    return float(pattern_pairs(columns[None], bands[None], bands[None], length, tile)) / causal_pairs(length)


def told(value: Tensor) -> int | float | Tensor:
    """What the results are told of a tensor of one number; on a GPU the tensor, so that selecting need not wait."""
    return value.item() if value.device.type == "cpu" else value
