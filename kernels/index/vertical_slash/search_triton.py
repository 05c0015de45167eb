"""Searches for counts and for a share in Triton, which look at many answers at once and never ask the host.

All counting is in integers, so results do not depend on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...budget.triton import CLOSE_ENOUGH, HIGHEST, LOWEST, pick

#: How the counts that a round looks at are made: see `_counts_of`.
SAME, FEWER, MORE, SHARE = (tl.constexpr(mode) for mode in range(4))


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
def _bisected(
    state, totals, turn, bits, pairs, LEVELS: tl.constexpr, HALVINGS: tl.constexpr, MANY: tl.constexpr
):  # fmt: skip
    """`budget.bisect_share` after `turn` rounds: low, high, the densities below and above, whether it is over.

    Round 0 asked for low at place 0, for high at place 1, and for one level less.
    """
    low = tl.full([], LOWEST, tl.float64)
    high = tl.full([], HIGHEST, tl.float64)
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
        close = tl.full([], CLOSE_ENOUGH, tl.float64)  # a bare number would be rounded to fp32
        nearly = target - tl.full([], 1e-9, tl.float64)
        if turn == 1:
            below = pick(found, place, 0)
            above = pick(found, place, 1)
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
                value = pick(found, place, mark + step)
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
def count_pairs(
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
def finish(
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
def finish_share(
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
