"""`Pattern` on a GPU: one sort for all ranks, and searches that look at many counts at once and never ask the host.

The searches are `budget.closest_count` and `budget.bisect_share`, and not `budget.solve`: what a union of columns and
diagonals weighs is not the sum of what its parts do.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
from torch import Tensor

from ...budget.naive import HALVINGS
from ...types import Blocks, causal_pairs
from . import naive
from .lists_triton import emit, tally
from .ranks_triton import CHUNK, count_forced, rank_lines, touch_tiles
from .search_triton import FEWER, MORE, SAME, SHARE, count_pairs, finish, finish_share

#: Lists of tiles have room for all blocks of a row up to this size; beyond it the host reads how long the longest is.
LIST_BYTES = 1 << 30
#: Counts that one round of a search looks at; the next one goes on between two of them.
MANY, FEW = 64, 32
#: Levels of the bisection on the share that one round looks at; the first looks at both ends besides.
LEVELS = 6


class Pattern(naive.Pattern):
    """See `naive.Pattern`. Ranks and counts are int32."""

    def _ranks(self, columns: Tensor, diagonals: Tensor) -> tuple[Tensor, Tensor]:
        heads, length = self.heads, self.length
        # A stable sort puts the first of equals first: the larger column, and the nearer diagonal.
        self._sorted, order = torch.cat((columns.flip(-1), diagonals)).sort(dim=-1, descending=True, stable=True)
        ranks = torch.empty(2, heads, length, dtype=torch.int32, device=columns.device)
        chunks = triton.cdiv(length, CHUNK.value)
        before = torch.empty(2 * heads, chunks, dtype=torch.int32, device=columns.device)
        sizes = (heads, length, self.sinks, self.near)
        count_forced[(chunks, 2 * heads)](order, before, *sizes, num_warps=8)
        rank_lines[(chunks, 2 * heads)](
            order, before, ranks, *sizes, CHUNKS=triton.next_power_of_2(chunks), num_warps=8
        )
        return ranks[0], ranks[1]

    def descending(self) -> tuple[Tensor, Tensor]:
        return self._sorted[: self.heads], self._sorted[self.heads :]

    def _first_touch(self) -> tuple[Tensor, Tensor]:
        self._bands = torch.empty(2, self.heads, self.blocks, dtype=torch.int32, device=self.diagonal_rank.device)
        touch_tiles[(triton.cdiv(self.blocks, 32), self.heads)](
            self.diagonal_rank, self._bands, self.length, self.blocks, self.last, TILE=self.tile, EACH=32, num_warps=4
        )
        return self._bands[0], self._bands[1]

    def layout(self, n_vertical: Tensor, n_slash: Tensor) -> Blocks:
        """See `naive.Pattern.layout`. The host reads one number where lists for all blocks would exceed 1 GiB."""
        heads, length, blocks, device = self.heads, self.length, self.blocks, self.column_rank.device

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.int32, device=device)

        chunks = triton.cdiv(length, CHUNK.value)
        before, distances, counts = empty(heads, chunks), empty(2, heads, blocks), empty(heads, blocks)
        arguments = (n_vertical, n_slash, self.column_rank, self._bands, before, distances, counts)
        sizes = (length, blocks, self.sinks, self.near)
        tally[(chunks + 1, heads)](*arguments, *sizes, num_warps=8)
        width = blocks
        if 4 * heads * blocks * width > LIST_BYTES:
            width = int(counts.max())
        indices = empty(heads, blocks, width)
        columns, column_counts = empty(heads, 1, length), empty(heads, blocks)
        emit[(chunks + triton.cdiv(blocks, 8), heads)](
            *arguments,
            indices,
            columns,
            column_counts,
            *sizes,
            width,
            chunks,
            TILE=self.tile,
            CHUNKS=triton.next_power_of_2(chunks),
            ROWS=8,
            num_warps=8,
        )
        return Blocks(indices, counts, length, self.tile, self.tile, columns, column_counts)

    # --- how many fit a density ------------------------------------------------------------------------------

    def equal_counts(self, density: float) -> tuple[Tensor, Tensor]:
        goal = self._goal(density)
        # n columns alone execute at least n(n + 1) / 2 pairs of a head, so more than this exceed the goal.
        most = min(self.length, math.isqrt(int(2 * goal / self.heads)) + 1)
        state, totals, many = self._search(SAME.value, 1, most, goal)
        nothing = totals
        counts = torch.empty(2, self.heads, dtype=torch.int32, device=totals.device)
        self._finish(SAME.value, nothing, nothing, state, totals, state, counts, goal, many)
        # One more count adds a column and a slash, two tiles in every row, to all heads.
        if (1 + 2 * self.tile) / (self.length + 1) > naive.TOLERANCE:
            counts = self._fit_counts(counts, goal)
        return counts[0], counts[1]

    def solve_covering(self, keys: tuple[Tensor, Tensor], density: float) -> tuple[float | Tensor, Tensor, Tensor]:
        heads, device = self.heads, self.column_rank.device
        rounds = 1 + -(-(HALVINGS - (LEVELS - 1)) // LEVELS)
        state = torch.empty(rounds + 1, 5, dtype=torch.float64, device=device)
        totals = torch.zeros(rounds, MANY, dtype=torch.int64, device=device)
        pairs = heads * causal_pairs(self.length)
        bits = struct.unpack("<q", struct.pack("<d", density))[0]  # Triton would pass a float in fp32
        for turn in range(rounds):
            self._round(SHARE.value, keys[0], keys[1], state, totals, state, turn, 0, bits, pairs, MANY)
        counts = torch.empty(2, heads, dtype=torch.int32, device=device)
        rest = torch.empty((), dtype=torch.float64, device=device)
        finish_share[(heads,)](
            keys[0],
            keys[1],
            state,
            totals,
            rest,
            counts,
            heads,
            self.length,
            bits,
            pairs,
            rounds,
            LEVELS=LEVELS,
            HALVINGS=HALVINGS,
            MANY=MANY,
            num_warps=2,
        )
        # Shares differ from head to head, so a step adds one column and one slash of one head.
        if 2 * (1 + 2 * self.tile) / ((self.length + 1) * heads) > naive.TOLERANCE:
            counts = self._fit_counts(counts, self._goal(density))
        return rest, counts[0], counts[1]

    def _fit_counts(self, counts: Tensor, goal: float) -> Tensor:
        """`naive.Pattern._fit` of counts `(2, H)`, without asking whether they fit already: that is told at the end."""
        state, totals, many = self._search(FEWER.value, 0, self.length, goal, counts)
        fewer = torch.empty(1, dtype=torch.int64, device=counts.device)
        fitted = torch.empty_like(counts)
        self._finish(FEWER.value, counts, fewer, state, totals, fewer, fitted, goal, many)
        first = totals
        state, totals, many = self._search(MORE.value, 0, self.length, goal, counts, fewer)
        self._finish(MORE.value, counts, fewer, state, totals, first, fitted, goal, many)
        return fitted

    def _search(
        self, mode: int, low: int, high: int, goal: float, counts: Tensor | None = None, fewer: Tensor | None = None
    ) -> tuple[Tensor, Tensor, int]:
        """Rounds that close in on a count in [low, high], the last of which looks at all that are left.

        Returns what `_narrowed` needs, and how many counts a round looks at.
        """

        def rounds_of(many: int) -> int:
            rounds, span = 1, high - low
            while span > many - 1:
                rounds, span = rounds + 1, -(-span // (many - 1))
            return rounds

        many = FEW if rounds_of(FEW) == rounds_of(MANY) else MANY
        rounds, device = rounds_of(many), self.column_rank.device
        state = torch.empty(rounds, 2, dtype=torch.int64, device=device)
        totals = torch.zeros(rounds, many, dtype=torch.int64, device=device)
        base = totals if counts is None else counts
        offset = totals if fewer is None else fewer
        for turn in range(rounds):
            self._round(mode, base, base, state, totals, offset, turn, low, high, math.floor(goal), many)
        return state, totals, many

    def _round(
        self, mode: int, first: Tensor, second: Tensor, state: Tensor, totals: Tensor, offset: Tensor, turn: int,
        low: int, high: int, goal: int, many: int,
    ) -> None:  # fmt: skip
        # Blocks of a program: some 2048 tokens, so that small prompts make enough programs; more than 64 would spill.
        each = min(64, max(16, 2048 // self.tile))
        count_pairs[(triton.cdiv(self.blocks, each), self.heads)](
            self.column_rank,
            self._bands,
            first,
            second,
            state,
            totals,
            offset,
            turn,
            low,
            high,
            goal,
            self.length,
            self.blocks,
            self.last,
            self.sinks,
            self.near,
            MODE=mode,
            TILE=self.tile,
            EACH=each,
            MANY=many,
            LEVELS=LEVELS,
            HALVINGS=HALVINGS,
            num_warps=4,
        )

    def _finish(
        self, mode: int, counts: Tensor, fewer: Tensor, state: Tensor, totals: Tensor, extra: Tensor, out: Tensor,
        goal: float, many: int,
    ) -> None:  # fmt: skip
        slack = naive.TOLERANCE * self.heads * causal_pairs(self.length)
        finish[(1,)](
            counts,
            fewer,
            state,
            totals,
            extra,
            out,
            len(totals),
            self.heads,
            self.length,
            math.floor(goal),
            math.floor(2 * goal),
            math.ceil(goal - slack),
            math.floor(goal + slack),
            MODE=mode,
            MANY=many,
            HEADS=triton.next_power_of_2(self.heads),
            num_warps=1,
        )
