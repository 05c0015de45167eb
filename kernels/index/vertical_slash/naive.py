"""`Pattern` in torch on any device: ranks by sorting, searches on the host that ask for one count at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...budget import bisect_share, closest_count
from ...estimate import sum_blocks
from ...types import Blocks, causal_pairs

#: Counts stay as found as long as the density is met to this; else verticals, which are finer, make up for it.
TOLERANCE = 0.009


class Pattern:
    """Verticals and slashes of every head, in the order in which a growing budget takes them.

    Counts of verticals and slashes are `(H,)` integers, the forced ones included.

    Args:
        columns, diagonals: `(H, L)` mass of each column, and of each diagonal (query - key).
        sinks, near: first columns and nearest diagonals, which are taken before all others.
        tile: diagonals are executed as tiles of this size.
    """

    def __init__(self, columns: Tensor, diagonals: Tensor, sinks: int, near: int, tile: int):
        self.heads, self.length = columns.shape
        self.sinks, self.near, self.tile = sinks, min(near, self.length), tile
        self.blocks = -(-self.length // tile)
        self.last = self.length - (self.blocks - 1) * tile  # queries of the last row of tiles
        self.column_rank, self.diagonal_rank = self._ranks(columns, diagonals)
        self.band_rank, self.last_rank = self._first_touch()

    def _ranks(self, columns: Tensor, diagonals: Tensor) -> tuple[Tensor, Tensor]:
        """`(H, L)` place of each column and of each diagonal by mass; `descending` is set."""
        self._masses = columns, diagonals
        columns, diagonals = columns.clone(), diagonals.clone()
        columns[:, : self.sinks] = math.inf
        diagonals[:, : self.near] = math.inf
        # Ties go to recent keys: to the larger column, and to the nearer diagonal.
        order = self.length - 1 - columns.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        return _inverse(order), _inverse(diagonals.sort(dim=-1, descending=True, stable=True).indices)

    def descending(self) -> tuple[Tensor, Tensor]:
        """`(H, L)` masses of columns and of diagonals, each from large to small, forced ones like the others."""
        columns, diagonals = (mass.sort(-1, descending=True).values for mass in self._masses)
        return columns, diagonals

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

    def layout(self, n_vertical: Tensor, n_slash: Tensor) -> Blocks:
        """Tiles that slashes touch, and verticals as single columns shared by all query blocks of a head."""
        columns, _, bands, last = self._taken(n_vertical, n_slash)
        ids = torch.arange(self.blocks, device=columns.device)
        distance = ids[:, None] - ids[None, :]
        mask = bands[:, distance.clamp(min=0)] & (distance >= 0)
        mask[:, -1] = last.flip(-1)
        return Blocks.from_mask(mask, self.length, self.tile, self.tile).with_columns(columns)

    # --- how many fit a density ------------------------------------------------------------------------------

    def equal_counts(self, density: float) -> tuple[Tensor, Tensor]:
        """Verticals and slashes, as many of each in every head, whose executed density is closest to `density`.

        Where single slashes are too coarse for it, fewer slashes and more verticals (see `_fit`).
        """
        goal = self._goal(density)

        def same(count: int) -> Tensor:
            return torch.full((self.heads,), count, device=self.column_rank.device)

        count = closest_count(lambda n: int(self.executed_pairs(same(n), same(n)).sum()), goal, 1, self.length)
        return self._fit(same(count), same(count), goal)

    def covering(self, keys: tuple[Tensor, Tensor], rest: float | Tensor, floor: int = 0) -> tuple[Tensor, Tensor]:
        """Verticals and slashes whose key is at least `rest`; at least one, and `floor`, of each.

        Args:
            keys: `(H, L)` fp64 each, of columns and of diagonals by descending mass: the share still missing before
                each is added (`coverage_keys`).
            rest: the share of the mass that may be left out.
        """
        n_vertical, n_slash = ((key >= rest).sum(-1).clamp(min=max(1, floor)) for key in keys)
        return n_vertical, n_slash

    def solve_covering(self, keys: tuple[Tensor, Tensor], density: float) -> tuple[float | Tensor, Tensor, Tensor]:
        """The share to leave out in all heads alike whose executed density is close to `density`; and the counts.

        Returns the share, a number or an fp64 tensor of one on the device, verticals and slashes.
        """
        pairs = self.heads * causal_pairs(self.length)
        rest = bisect_share(lambda rest: float(self.executed_pairs(*self.covering(keys, rest)).sum()) / pairs, density)
        return rest, *self._fit(*self.covering(keys, rest), self._goal(density))

    def _goal(self, density: float) -> float:
        return density * self.heads * causal_pairs(self.length)

    def _fit(self, n_vertical: Tensor, n_slash: Tensor, goal: float) -> tuple[Tensor, Tensor]:
        """Counts whose executed pairs meet `goal`, where single slashes are too coarse for it (large tiles, few heads).

        Slashes are taken back from all heads until the goal is not exceeded; verticals, which are finer, make up the
        rest.
        """

        def pairs(more: int, fewer: int) -> int:
            counts = (n_vertical + more).clamp(max=self.length), (n_slash - fewer).clamp(min=1)
            return int(self.executed_pairs(*counts).sum())

        if abs(pairs(0, 0) - goal) <= TOLERANCE * self.heads * causal_pairs(self.length):
            return n_vertical, n_slash
        fewer = 0
        if pairs(0, 0) > goal:
            low, fewer = 0, self.length
            while fewer - low > 1:
                middle = (low + fewer) // 2
                low, fewer = (low, middle) if pairs(0, middle) <= goal else (middle, fewer)
        more = closest_count(lambda n: pairs(n, fewer), goal, 0, self.length)
        return (n_vertical + more).clamp(max=self.length), (n_slash - fewer).clamp(min=1)


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


def _inverse(order: Tensor) -> Tensor:
    """Rank of each entry from the order of entries, along the last dimension."""
    place = torch.arange(order.shape[-1], device=order.device)
    return torch.empty_like(order).scatter_(-1, order, place.expand_as(order))
