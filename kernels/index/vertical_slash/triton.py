"""`Pattern` on a GPU: one sort for all ranks, and searches that look at many counts at once and never ask the host.

All counting is in integers, so results do not depend on the order in which programs run.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...types import Blocks, causal_pairs
from ..top_p_blocks import naive as coverage
from . import naive

#: Lists of tiles have room for all blocks of a row up to this size; beyond it the host reads how long the longest is.
LIST_BYTES = 1 << 30
#: Counts that one round of a search looks at; the next one goes on between two of them.
MANY, FEW = 64, 32
#: Levels of the bisection on the share that one round looks at; the first looks at both ends besides.
LEVELS = 6
CHUNK = tl.constexpr(4096)

#: How the counts that a round looks at are made: see `_counts_of`.
SAME, FEWER, MORE, SHARE = (tl.constexpr(mode) for mode in range(4))
_CLOSE_ENOUGH = tl.constexpr(coverage.CLOSE_ENOUGH)
_LOWEST, _HIGHEST = tl.constexpr(coverage.LOWEST), tl.constexpr(coverage.HIGHEST)


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
        _forced_kernel[(chunks, 2 * heads)](order, before, *sizes, num_warps=8)
        _rank_kernel[(chunks, 2 * heads)](
            order, before, ranks, *sizes, CHUNKS=triton.next_power_of_2(chunks), num_warps=8
        )
        return ranks[0], ranks[1]

    def descending(self) -> tuple[Tensor, Tensor]:
        return self._sorted[: self.heads], self._sorted[self.heads :]

    def _first_touch(self) -> tuple[Tensor, Tensor]:
        self._bands = torch.empty(2, self.heads, self.blocks, dtype=torch.int32, device=self.diagonal_rank.device)
        _touch_kernel[(triton.cdiv(self.blocks, 32), self.heads)](
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
        _tally_kernel[(chunks + 1, heads)](*arguments, *sizes, num_warps=8)
        width = blocks
        if 4 * heads * blocks * width > LIST_BYTES:
            width = int(counts.max())
        indices = empty(heads, blocks, width)
        columns, column_counts = empty(heads, 1, length), empty(heads, blocks)
        _emit_kernel[(chunks + triton.cdiv(blocks, 8), heads)](
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
        rounds = 1 + -(-(coverage.HALVINGS - (LEVELS - 1)) // LEVELS)
        state = torch.empty(rounds + 1, 5, dtype=torch.float64, device=device)
        totals = torch.zeros(rounds, MANY, dtype=torch.int64, device=device)
        pairs = heads * causal_pairs(self.length)
        bits = struct.unpack("<q", struct.pack("<d", density))[0]  # Triton would pass a float in fp32
        for turn in range(rounds):
            self._round(SHARE.value, keys[0], keys[1], state, totals, state, turn, 0, bits, pairs, MANY)
        counts = torch.empty(2, heads, dtype=torch.int32, device=device)
        rest = torch.empty((), dtype=torch.float64, device=device)
        _finish_share_kernel[(heads,)](
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
            HALVINGS=coverage.HALVINGS,
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
        _pairs_kernel[(triton.cdiv(self.blocks, each), self.heads)](
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
            HALVINGS=coverage.HALVINGS,
            num_warps=4,
        )

    def _finish(
        self, mode: int, counts: Tensor, fewer: Tensor, state: Tensor, totals: Tensor, extra: Tensor, out: Tensor,
        goal: float, many: int,
    ) -> None:  # fmt: skip
        slack = naive.TOLERANCE * self.heads * causal_pairs(self.length)
        _finish_kernel[(1,)](
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


# --------------------------------------------------------------------------------------------------------------- ranks


@triton.jit
def _is_forced(order, row, heads, length, sinks, near):
    """The column or diagonal that stands at each place of a sorted row, and whether it is taken before all others."""
    item = tl.where(row < heads, length - 1 - order, order)
    return item, item < tl.where(row < heads, sinks, near)


@triton.jit(do_not_specialize=["sinks", "near"])
def _forced_kernel(order, before, heads, length, sinks, near):
    """Forced items in each chunk of each sorted row."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    found = tl.load(order + row.to(tl.int64) * length + place, mask=place < length, other=0).to(tl.int32)
    _, forced = _is_forced(found, row, heads, length, sinks, near)
    tl.store(before + row * tl.num_programs(0) + chunk, tl.sum((forced & (place < length)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["sinks", "near"])
def _rank_kernel(order, before, ranks, heads, length, sinks, near, CHUNKS: tl.constexpr):
    """Ranks of items from their order by mass: forced ones move ahead of the others, in order of recency."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    chunks = tl.arange(0, CHUNKS)
    tallies = tl.load(before + row * tl.num_programs(0) + chunks, mask=chunks < chunk, other=0)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = place < length
    found = tl.load(order + row.to(tl.int64) * length + place, mask=inside, other=0).to(tl.int32)
    item, forced = _is_forced(found, row, heads, length, sinks, near)
    ahead = tl.sum(tallies, 0) + tl.cumsum((forced & inside).to(tl.int32), 0)
    columns = row < heads
    every = tl.minimum(length, tl.where(columns, sinks, near))
    first = tl.where(columns, every - 1 - item, item)
    rank = tl.where(forced, first, place + every - ahead)
    tl.store(ranks + row.to(tl.int64) * length + item, rank, mask=inside)


@triton.jit(do_not_specialize=["last"])
def _touch_kernel(rank, bands, length, blocks, last, TILE: tl.constexpr, EACH: tl.constexpr):
    """Smallest rank of the diagonals that touch the tiles at a distance: in full rows of tiles, and in the last."""
    head = tl.program_id(1)
    band = tl.program_id(0) * EACH + tl.arange(0, EACH)
    within = tl.arange(0, TILE)
    own = band[:, None] * TILE + within[None, :]
    ranks = rank + head.to(tl.int64) * length
    near = tl.load(ranks + own, mask=own < length, other=length)
    there = own - TILE
    far = tl.load(ranks + there, mask=(there >= 0) & (there < length) & (within > 0)[None, :], other=length)
    beyond = tl.min(far, 1)
    out = bands + head * blocks + band
    tl.store(out, tl.minimum(tl.min(near, 1), beyond), mask=band < blocks)
    near = tl.where((within < last)[None, :], near, length)
    out += tl.num_programs(1) * blocks
    tl.store(out, tl.minimum(tl.min(near, 1), beyond), mask=band < blocks)


# -------------------------------------------------------------------------------------------------------------- search


@triton.jit
def _counts_at(low, high, MANY: tl.constexpr):
    """`MANY` counts from low to high, both included; all between them once no more are left."""
    return low + tl.arange(0, MANY).to(tl.int64) * (high - low) // (MANY - 1)


@triton.jit
def _narrowed(state, totals, turn, low, high, goal, MODE: tl.constexpr, MANY: tl.constexpr):
    """Two counts between which the one sought lies, after `turn` rounds.

    The pairs of `SAME` and `MORE` do not fall with the count, those of `FEWER` do not rise.
    """
    low = tl.cast(low, tl.int64)
    high = tl.cast(high, tl.int64)
    if turn > 0:
        low = tl.load(state + 2 * (turn - 1))
        high = tl.load(state + 2 * (turn - 1) + 1)
        counts = _counts_at(low, high, MANY)
        found = tl.load(totals + (turn - 1) * MANY + tl.arange(0, MANY))
        if MODE == FEWER:
            short = found > goal
        else:
            short = found <= goal
        low = tl.maximum(low, tl.max(tl.where(short, counts, low), 0))
        high = tl.minimum(high, tl.min(tl.where(short, high, counts), 0))
    return low, high


@triton.jit
def _shares_at(low, high, MANY: tl.constexpr, LEVELS: tl.constexpr):
    """What a bisection of [low, high] may ask for, by place: MANY / 2 in the middle, low at 0."""
    place = tl.arange(0, MANY)
    below = tl.zeros([MANY], tl.float64) + low
    above = tl.zeros([MANY], tl.float64) + high
    share = below
    step: tl.constexpr = MANY // 2
    mark = tl.zeros([MANY], tl.int32)
    for level in tl.static_range(LEVELS):
        middle = (below + above) / 2
        at = mark + (step >> level)
        share = tl.where(place == at, middle, share)
        right = place >= at
        below = tl.where(right, middle, below)
        above = tl.where(right, above, middle)
        mark = tl.where(right, at, mark)
    return share


@triton.jit
def _at(values, place, index):
    return tl.sum(tl.where(place == index, values, 0.0), 0)


@triton.jit
def _bisected(
    state, totals, turn, bits, pairs, LEVELS: tl.constexpr, HALVINGS: tl.constexpr, MANY: tl.constexpr
):  # fmt: skip
    """The bisection of `coverage.solve` after `turn` rounds: low, high, densities below and above, whether it is over.

    Round 0 asked for low at place 0, for high at place 1, and for one level less.
    """
    low = tl.full([], _LOWEST, tl.float64)
    high = tl.full([], _HIGHEST, tl.float64)
    below = tl.full([], 0.0, tl.float64)
    above = below
    over = below
    if turn > 0:
        if turn > 1:
            at = state + 5 * (turn - 1)
            low = tl.load(at)
            high = tl.load(at + 1)
            below = tl.load(at + 2)
            above = tl.load(at + 3)
            over = tl.load(at + 4)
        target = tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)
        place = tl.arange(0, MANY)
        found = tl.load(totals + (turn - 1) * MANY + place).to(tl.float64) / tl.cast(pairs, tl.int64).to(tl.float64)
        yes = tl.full([], 1.0, tl.float64)
        infinite = tl.full([], float("inf"), tl.float64)
        close = tl.full([], _CLOSE_ENOUGH, tl.float64)  # a bare number would be rounded to fp32
        nearly = target - tl.full([], 1e-9, tl.float64)
        if turn == 1:
            below = _at(found, place, 0)
            above = _at(found, place, 1)
            if below <= target:  # low it is
                below = target
                above = -infinite
                over = yes
            elif above >= nearly:  # high it is
                below = infinite
                above = target
                over = yes
        mark = tl.cast(0, tl.int32)
        step = tl.cast(MANY, tl.int32)
        first = tl.where(turn == 1, 0, LEVELS * (turn - 1) - 1)
        levels = tl.minimum(tl.where(turn == 1, LEVELS - 1, LEVELS), HALVINGS - first)
        for level in tl.static_range(LEVELS):
            if (over == 0) & (level < levels):
                step = step // 2
                value = _at(found, place, mark + step)
                middle = (low + high) / 2
                if value > target:
                    low = middle
                    below = value
                    mark += step
                else:
                    high = middle
                    above = value
                if tl.minimum(below - target, target - above) < close:
                    over = yes
    return low, high, below, above, over


@triton.jit
def _covered(keys, rest, length):
    """How many of the keys, which do not rise, are at least `rest`; at least 1."""
    low = tl.zeros_like(rest).to(tl.int32)
    high = low + length
    span = length
    while span > 0:
        middle = (low + high) // 2
        enough = tl.load(keys + middle, mask=low < high, other=0.0) >= rest
        low = tl.where((low < high) & enough, middle + 1, low)
        high = tl.where(enough, high, tl.maximum(low, middle))
        span = span // 2
    return tl.maximum(low, 1)


@triton.jit
def _counts_of(
    first, second, offset, head, heads, counts, length, MODE: tl.constexpr
):  # fmt: skip
    """Verticals and slashes of a head for a number of counts: the same; fewer slashes; or more verticals besides."""
    if MODE == SAME:
        return counts, counts
    else:
        n_vertical = tl.load(first + head).to(tl.int64) + tl.zeros_like(counts)
        n_slash = tl.load(first + heads + head).to(tl.int64) + tl.zeros_like(counts)
        if MODE == FEWER:
            return n_vertical, tl.maximum(n_slash - counts, 1)
        else:
            return tl.minimum(n_vertical + counts, length), tl.maximum(n_slash - tl.load(offset), 1)


@triton.jit(do_not_specialize=["turn", "low", "high", "goal", "last", "sinks", "near"])
def _pairs_kernel(
    column_rank,
    bands,
    first,
    second,
    state,
    totals,
    offset,
    turn,
    low,
    high,
    goal,
    length,
    blocks,
    last,
    sinks,
    near,
    MODE: tl.constexpr,
    TILE: tl.constexpr,
    EACH: tl.constexpr,
    MANY: tl.constexpr,
    LEVELS: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """One program: `EACH` key blocks of a head, and what they add to the pairs of `MANY` counts of this round.

    Key block b stands for its columns, and for the tiles at distance n - 1 - b. The diagonal is left out: it is
    the same for all counts, and program (0, 0) adds it.

    Args (besides those of `_narrowed` and `_bisected`):
        first, second: `(2, H)` counts to start from; or keys of columns and diagonals, where a share is sought. Then
            `high` holds the target's bits and `goal` all pairs.
    """
    part = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    one = (part == 0) & (head == 0)
    go = True
    if MODE == SHARE:
        left, right, below, above, over = _bisected(state, totals, turn, high, goal, LEVELS, HALVINGS, MANY)
        if one:
            at = state + 5 * turn
            tl.store(at, left)
            tl.store(at + 1, right)
            tl.store(at + 2, below)
            tl.store(at + 3, above)
            tl.store(at + 4, over)
        go = over == 0
    if go:
        if MODE == SHARE:
            shares = _shares_at(left, right, MANY, LEVELS)
            if turn == 0:
                shares = tl.where(tl.arange(0, MANY) == 1, right, shares)
            shares = tl.exp(shares)
            row = head.to(tl.int64) * length
            n_vertical = _covered(first + row, shares, length)
            n_slash = _covered(second + row, shares, length)
        else:
            left, right = _narrowed(state, totals, turn, low, high, goal, MODE, MANY)
            if one:
                tl.store(state + 2 * turn, left)
                tl.store(state + 2 * turn + 1, right)
            counts = _counts_at(left, right, MANY)
            n_vertical, n_slash = _counts_of(first, second, offset, head, heads, counts, length, MODE)
        n_vertical = tl.maximum(n_vertical.to(tl.int32), sinks)[None, :]
        n_slash = tl.maximum(n_slash.to(tl.int32), near)[None, :]

        # Blocks from the last to the first, so that distances rise.
        block = part * EACH + EACH - 1 - tl.arange(0, EACH)
        apart = blocks - 1 - block
        held = tl.zeros([EACH, MANY], tl.int32)
        ranks = column_rank + head.to(tl.int64) * length
        for within in tl.range(0, TILE, loop_unroll_factor=4):
            place = block * TILE + within
            rank = tl.load(ranks + place, mask=place < length, other=length)
            held += (rank[:, None] < n_vertical).to(tl.int32)

        # Full rows in which a tile is not executed: at distances from 1 up to that of the block's first full row.
        full = bands + head * blocks
        rows = tl.zeros([EACH, MANY], tl.int32)
        start = blocks - 1 - (part * EACH + EACH - 1)
        for begin in range(1, start, EACH):
            there = begin + tl.arange(0, EACH)
            rank = tl.load(full + there, mask=there < start, other=-1)
            rows += (rank[:, None] >= n_slash).to(tl.int32)
        ahead = tl.sum(rows, 0)
        rank = tl.load(full + apart - 1, mask=(apart > 1) & (apart - 1 >= start) & (apart < blocks), other=-1)
        opened = ahead[None, :] + tl.cumsum((rank[:, None] >= n_slash).to(tl.int32), 0)
        inside = (apart > 0) & (apart < blocks)
        rank = tl.load(full + heads * blocks + apart, mask=inside, other=-1)
        open_last = (rank[:, None] >= n_slash) & inside[:, None]
        pairs = held * (opened * TILE + tl.where(open_last, last, 0))
        tiles = tl.where(inside[:, None] & ~open_last, last * TILE, 0)
        rank = tl.load(full + apart, mask=inside, other=length)
        tiles += tl.where((rank[:, None] < n_slash) & inside[:, None], block[:, None] * (TILE * TILE), 0)
        total = tl.sum(pairs.to(tl.int64) + tiles.to(tl.int64), 0)
        if one:
            diagonal = (blocks - 1) * (TILE * (TILE + 1) // 2) + last * (last + 1) // 2
            total += heads.to(tl.int64) * diagonal
        tl.atomic_add(totals + turn * MANY + tl.arange(0, MANY), total, sem="relaxed")


@triton.jit(do_not_specialize=["rounds", "goal", "goal_twice", "lowest", "highest"])
def _finish_kernel(
    counts,
    fewer,
    state,
    totals,
    extra,
    out,
    rounds,
    heads,
    length,
    goal,
    goal_twice,
    lowest,
    highest,
    MODE: tl.constexpr,
    MANY: tl.constexpr,
    HEADS: tl.constexpr,
):
    """What a search found. `SAME`: counts of all heads. `FEWER`: how many slashes to take back, into `extra`.

    `MORE`: counts that fit the goal; as given if their pairs, the first that `FEWER` looked at (`extra`), were between
    `lowest` and `highest`.
    """
    low, high = _narrowed(state, totals, rounds, 0, 0, goal, MODE, MANY)
    seen = _counts_at(tl.load(state + 2 * (rounds - 1)), tl.load(state + 2 * (rounds - 1) + 1), MANY)
    found = tl.load(totals + (rounds - 1) * MANY + tl.arange(0, MANY))
    none = tl.zeros_like(found)
    less = tl.max(tl.where(seen == low, found, none), 0)
    more = tl.max(tl.where(seen == high, found, none), 0)
    head = tl.arange(0, HEADS)
    inside = head < heads
    if MODE == FEWER:
        tl.store(extra, high)
    else:
        best = tl.where(more + less <= goal_twice, high, low)
        if MODE == SAME:
            n_vertical = tl.zeros([HEADS], tl.int64) + best
            n_slash = n_vertical
        else:
            n_vertical = tl.load(counts + head, mask=inside, other=1).to(tl.int64)
            n_slash = tl.load(counts + heads + head, mask=inside, other=1).to(tl.int64)
            before = tl.load(extra)
            if (before < lowest) | (before > highest):
                n_vertical = tl.minimum(n_vertical + best, length)
                n_slash = tl.maximum(n_slash - tl.load(fewer), 1)
        tl.store(out + head, n_vertical.to(tl.int32), mask=inside)
        tl.store(out + heads + head, n_slash.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["bits", "pairs", "rounds"])
def _finish_share_kernel(
    first,
    second,
    state,
    totals,
    rest,
    counts,
    heads,
    length,
    bits,
    pairs,
    rounds,
    LEVELS: tl.constexpr,
    HALVINGS: tl.constexpr,
    MANY: tl.constexpr,
):
    """The share that the bisection ends at, and a head's counts for it."""
    head = tl.program_id(0)
    low, high, below, above, over = _bisected(state, totals, rounds, bits, pairs, LEVELS, HALVINGS, MANY)
    target = tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)
    share = tl.exp(tl.where(below - target < target - above, low, high))
    if head == 0:
        tl.store(rest, share)
    shares = tl.zeros([MANY], tl.float64) + share
    row = head.to(tl.int64) * length
    tl.store(counts + head, tl.max(_covered(first + row, shares, length), 0))
    tl.store(counts + heads + head, tl.max(_covered(second + row, shares, length), 0))


# -------------------------------------------------------------------------------------------------------------- layout


@triton.jit(do_not_specialize=["sinks", "near"])
def _tally_kernel(
    n_vertical,
    n_slash,
    column_rank,
    bands,
    before,
    distances,
    counts,
    length,
    blocks,
    sinks,
    near,
):
    """One program: taken columns in a chunk; or, the last one of a head, its taken distances and the tiles of rows.

    `distances` holds those of full rows, from near to far, and then the tiles of the last row, which is its own.
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    if chunk < tl.num_programs(0) - 1:
        most = tl.maximum(tl.minimum(tl.load(n_vertical + head), length).to(tl.int32), sinks)
        place = chunk * CHUNK + tl.arange(0, CHUNK)
        rank = tl.load(column_rank + head.to(tl.int64) * length + place, mask=place < length, other=length)
        number = tl.sum(((rank < most) & (place < length)).to(tl.int32), 0)
        tl.store(before + head * (tl.num_programs(0) - 1) + chunk, number)
    else:
        most = tl.maximum(tl.minimum(tl.load(n_slash + head), length).to(tl.int32), near)
        far = tl.cast(0, tl.int32)
        listed = far
        for begin in range(0, blocks, 1024):
            place = begin + tl.arange(0, 1024)
            inside = place < blocks
            row = head * blocks
            taken = inside & (tl.load(bands + row + place, mask=inside, other=0) < most)
            passed = far + tl.cumsum(taken.to(tl.int32), 0)
            tl.store(counts + row + place, passed, mask=place < blocks - 1)
            tl.store(distances + row + passed - 1, place, mask=taken)
            far += tl.sum(taken.to(tl.int32), 0)
            row += heads * blocks
            taken = inside & (tl.load(bands + row + blocks - 1 - place, mask=inside, other=0) < most)
            passed = listed + tl.cumsum(taken.to(tl.int32), 0)
            tl.store(distances + row + passed - 1, place, mask=taken)
            listed += tl.sum(taken.to(tl.int32), 0)
        tl.store(counts + head * blocks + blocks - 1, listed)


@triton.jit(do_not_specialize=["sinks", "near", "chunks"])
def _emit_kernel(
    n_vertical,
    n_slash,
    column_rank,
    bands,
    before,
    distances,
    counts,
    indices,
    columns,
    column_counts,
    length,
    blocks,
    sinks,
    near,
    width,
    chunks,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: the columns in a chunk of keys, or the tiles of some rows."""
    part = tl.program_id(0)
    head = tl.program_id(1)
    if part < chunks:
        most = tl.maximum(tl.minimum(tl.load(n_vertical + head), length).to(tl.int32), sinks)
        earlier = tl.arange(0, CHUNKS)
        tallies = tl.load(before + head * chunks + earlier, mask=earlier < part, other=0)
        place = part * CHUNK + tl.arange(0, CHUNK)
        row = head.to(tl.int64) * length
        rank = tl.load(column_rank + row + place, mask=place < length, other=length)
        taken = (rank < most) & (place < length)
        passed = tl.sum(tallies, 0) + tl.cumsum(taken.to(tl.int32), 0)
        tl.store(columns + row + passed - 1, place, mask=taken)
        ends = ((place % TILE == TILE - 1) & (place < length)) | (place == length - 1)
        tl.store(column_counts + head * blocks + place // TILE, passed, mask=ends)
    else:
        block = (part - chunks) * ROWS + tl.arange(0, ROWS)
        number = tl.load(counts + head * blocks + block, mask=block < blocks, other=0)[:, None]
        final = (block == blocks - 1)[:, None]
        out = indices + (head.to(tl.int64) * blocks + block)[:, None] * width
        near_list = distances + head * blocks
        last_list = near_list + tl.num_programs(1) * blocks
        for begin in range(0, tl.max(number), 128):
            entry = begin + tl.arange(0, 128)[None, :]
            inside = entry < number
            # Rows list the distances up to their own, from far to near.
            tile = block[:, None] - tl.load(near_list + number - 1 - entry, mask=inside & ~final, other=0)
            there = tl.load(last_list + entry, mask=inside & final, other=0)
            tl.store(out + entry, tl.where(final, there, tile), mask=inside)
