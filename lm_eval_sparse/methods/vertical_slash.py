"""Vertical-Slash (MInference, Jiang et al. 2024) as harmonised by The Sparse Frontier (section 3): uniform counts.

The last queries of the prompt vote: the keys that they attend to most become verticals, columns read by every
query; the diagonals on which their attention lies become slashes. Slashes are executed as tiles, verticals as
single columns where no tile covers them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..kernels.estimators import WindowSums, sum_blocks, window_flops, window_sums
from ..kernels.layout import BLOCK_SIZES, BlockLayout, causal_pairs
from .base import FORCED_SHARE, MAX_STEP, Geometry, PrefillMethod, Selection, number, one_of

#: Counts stay equal as long as the density is met to this; else verticals, which are finer, make up the difference.
TOLERANCE = 0.009
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

    def knobs_for(self, sparsity: float, length: int, geometry: Geometry | None = None) -> VerticalSlashMethod:
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
        return Pattern(sums.columns, sums.diagonals, int(self.sinks), near, tile)

    def _sums(self, query: Tensor, key: Tensor, scale: float, softcap: float | None) -> WindowSums:
        return window_sums(query, key, int(self.window), scale=scale, softcap=softcap, columns=True, diagonals=True)

    def _selection(
        self, query: Tensor, key: Tensor, pattern: Pattern, n_vertical: Tensor, n_slash: Tensor
    ) -> Selection:
        heads, length, dim = query.shape
        return Selection(
            layout=pattern.layout(n_vertical, n_slash),
            count_selected=lambda: pattern.selected_pairs(n_vertical, n_slash),
            estimator_flops=window_flops(heads, int(self.window), length, dim),
            estimator_bytes=query.element_size() * dim * (key.shape[0] * length + heads * min(self.window, length)),
            knobs={"tile": pattern.tile, "near": pattern.near, "sinks": pattern.sinks, "window": self.window},
        )


@dataclass(frozen=True)
class VerticalSlash(VerticalSlashMethod):
    """The same number of verticals and of slashes in every head (paper: section 3 and Table 3).

    Knobs:
        verticals, slashes: columns and diagonals that each query head reads, the forced ones included.
        window: last queries that vote; the paper takes 512 for NIAH and Story Retrieval, else 256.
        sinks, near: first columns and nearest diagonals that are always read; `near` is 64 by default.
        tile: 16, 32, 64 or 128; 64 by default. Where a requested sparsity leaves no room for the defaults of `near` and
            `tile` they shrink; what is typed is kept.
    """

    name: ClassVar[str] = "vertical_slash"
    allocation: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "Jiang et al., NeurIPS 2024 (MInference)"
    budget_knobs: ClassVar[tuple[str, ...]] = ("verticals", "slashes")

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
    def select(
        self, query: Tensor, key: Tensor, *, scale: float, softcap: float | None, sparsity: float | None
    ) -> Selection:
        heads, length, _ = query.shape
        method = self if sparsity is None else self.knobs_for(sparsity, length)
        pattern = method._pattern(self._sums(query, key, scale, softcap))

        def same(count: int) -> Tensor:
            return torch.full((heads,), count, device=query.device)

        n_vertical, n_slash = same(int(self.verticals)), same(int(self.slashes))
        if sparsity is not None:
            goal = (1 - sparsity) * heads * causal_pairs(length)
            count = closest(lambda n: int(pattern.executed_pairs(same(n), same(n)).sum()), goal, 1, length)
            n_vertical, n_slash = fit(pattern, same(count), same(count), goal)
        selection = method._selection(query, key, pattern, n_vertical, n_slash)
        counts = {"verticals": int(n_vertical[0]), "slashes": int(n_slash[0])}
        return replace(selection, knobs={**counts, **selection.knobs})


class Pattern:
    """Verticals and slashes of every head, in the order in which a growing budget takes them.

    Args:
        columns, diagonals: `(H, L)` mass of each column, and of each diagonal (query - key).
    """

    def __init__(self, columns: Tensor, diagonals: Tensor, sinks: int, near: int, tile: int):
        self.heads, self.length = columns.shape
        self.sinks, self.near, self.tile = sinks, min(near, self.length), tile
        self.blocks = -(-self.length // tile)
        self.last = self.length - (self.blocks - 1) * tile  # queries of the last row of tiles
        columns, diagonals = columns.clone(), diagonals.clone()
        columns[:, :sinks] = math.inf
        diagonals[:, : self.near] = math.inf
        # Ties go to recent keys: to the larger column, and to the nearer diagonal.
        order = self.length - 1 - columns.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        self.column_rank = _inverse(order)
        self.diagonal_rank = _inverse(diagonals.sort(dim=-1, descending=True, stable=True).indices)
        self.band_rank, self.last_rank = self._first_touch()

    def _first_touch(self) -> tuple[Tensor, Tensor]:
        """`(H, n)` smallest rank of the diagonals that touch tile (i, i - d), in full rows of tiles and in the last.

        Diagonal d * tile + r crosses tile (i, i - d) in the queries from r on, and tile (i, i - d - 1) in those
        before r.
        """
        never = self.length
        rank = torch.full((self.heads, self.blocks * self.tile), never, device=self.diagonal_rank.device)
        rank[:, : self.length] = self.diagonal_rank
        rank = rank.reshape(self.heads, self.blocks, self.tile)
        beyond = torch.full_like(rank[:, :, 0], never)
        beyond[:, 1:] = rank[:, :-1, 1:].amin(-1)
        return torch.minimum(rank.amin(-1), beyond), torch.minimum(rank[:, :, : self.last].amin(-1), beyond)

    def _taken(self, n_vertical: Tensor, n_slash: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Columns and diagonals `(H, L)`, tiles of full rows and of the last row `(H, n)` by distance, as booleans."""
        n_vertical = n_vertical.clamp(min=self.sinks)[:, None]
        n_slash = n_slash.clamp(min=self.near)[:, None]
        return (
            self.column_rank < n_vertical,
            self.diagonal_rank < n_slash,
            self.band_rank < n_slash,
            self.last_rank < n_slash,
        )

    def executed_pairs(self, n_vertical: Tensor, n_slash: Tensor) -> Tensor:
        """`(H,)` int64: pairs in tiles and columns, without building the layout."""
        columns, _, bands, last = self._taken(n_vertical, n_slash)
        return pattern_pairs(sum_blocks(columns.long(), self.tile), bands, last, self.length, self.tile)

    def selected_pairs(self, n_vertical: Tensor, n_slash: Tensor) -> Tensor:
        """`(H,)` int64: pairs on a kept column or diagonal."""
        columns, diagonals, _, _ = self._taken(n_vertical, n_slash)
        seen = torch.arange(self.length, 0, -1, device=columns.device)  # queries that see a column or lie on a diagonal
        both = (columns * diagonals.cumsum(-1).flip(-1)).sum(-1)
        return (columns * seen).sum(-1) + (diagonals * seen).sum(-1) - both

    def layout(self, n_vertical: Tensor, n_slash: Tensor) -> BlockLayout:
        columns, _, bands, last = self._taken(n_vertical, n_slash)
        ids = torch.arange(self.blocks, device=columns.device)
        distance = ids[:, None] - ids[None, :]
        mask = bands[:, distance.clamp(min=0)] & (distance >= 0)
        mask[:, -1] = last.flip(-1)
        return BlockLayout.from_mask(mask, self.length, self.tile, self.tile).with_columns(columns)


def fit(pattern: Pattern, n_vertical: Tensor, n_slash: Tensor, goal: float) -> tuple[Tensor, Tensor]:
    """Counts whose executed pairs meet `goal`, where single slashes are too coarse for it (large tiles, few heads).

    Slashes are taken back from all heads until the goal is not exceeded; verticals, which are finer, make up the rest.
    """
    heads, length = len(n_vertical), pattern.length

    def pairs(more: int, fewer: int) -> int:
        counts = (n_vertical + more).clamp(max=length), (n_slash - fewer).clamp(min=1)
        return int(pattern.executed_pairs(*counts).sum())

    if abs(pairs(0, 0) - goal) <= TOLERANCE * heads * causal_pairs(length):
        return n_vertical, n_slash
    fewer = 0
    if pairs(0, 0) > goal:
        low, fewer = 0, length
        while fewer - low > 1:
            middle = (low + fewer) // 2
            low, fewer = (low, middle) if pairs(0, middle) <= goal else (middle, fewer)
    more = closest(lambda n: pairs(n, fewer), goal, 0, length)
    return (n_vertical + more).clamp(max=length), (n_slash - fewer).clamp(min=1)


def pattern_pairs(columns: Tensor, bands: Tensor, last: Tensor, length: int, tile: int) -> Tensor:
    """`(H,)` int64: pairs that tiles and columns execute.

    Args:
        columns: `(H, n)` int64, kept columns in each key block.
        bands, last: `(H, n)` bool, whether tile (i, i - d) is executed, for full rows and for the last row; d = 0 is.
    """
    blocks = bands.shape[1]
    rest = length - (blocks - 1) * tile
    ids = torch.arange(blocks, device=bands.device)
    rows = (blocks - 1 - ids).clamp(min=0)  # full rows that have a tile at distance d
    tiles = (bands[:, 1:] * rows[1:]).sum(-1) * tile * tile + last[:, 1:].sum(-1) * rest * tile
    diagonal = (blocks - 1) * (tile * (tile + 1) // 2) + rest * (rest + 1) // 2
    # A column is read by the rows below its own in which its tile is not executed.
    open_rows = (~bands[:, 1:]).long().cumsum(-1)  # at distances 1..d
    full = torch.zeros_like(columns)
    if blocks > 2:
        full[:, : blocks - 2] = open_rows[:, : blocks - 2].flip(-1)
    open_last = (~last).flip(-1).long()
    open_last[:, -1] = 0
    return tiles + diagonal + (columns * (full * tile + open_last * rest)).sum(-1)


def forced_density(length: int, tile: int, near: int, sinks: int) -> float:
    """Share of the causal triangle that the tiles of the nearest `near` diagonals and the sink columns take."""
    rank = torch.arange(length)
    pattern = Pattern(-rank[None].float(), -rank[None].float(), min(sinks, length), near, tile)
    n = torch.zeros(1, dtype=torch.long)
    return float(pattern.executed_pairs(n, n)) / causal_pairs(length)


def closest(pairs: Callable[[int], int], goal: float, low: int, high: int) -> int:
    """The count in [low, high] whose `pairs`, which do not fall, come closest to `goal`; the larger of equals."""
    while high - low > 1:
        middle = (low + high) // 2
        if pairs(middle) <= goal:
            low = middle
        else:
            high = middle
    return high if pairs(high) - goal <= goal - pairs(low) else low


def _inverse(order: Tensor) -> Tensor:
    """Rank of each entry from the order of entries, along the last dimension."""
    place = torch.arange(order.shape[-1], device=order.device)
    return torch.empty_like(order).scatter_(-1, order, place.expand_as(order))
