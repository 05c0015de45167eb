"""Where the cut lies, in Triton: the share to leave out, the value at the cut, and which of equal values are taken."""

from __future__ import annotations

import triton
import triton.language as tl

from ...budget.triton import CLOSE_ENOUGH, HALVINGS, HIGHEST, LOWEST, pick
from . import naive
from .maps_triton import BINS, COUNT, HALF, SIDE, mantissa, probabilities, scale_of
from .ranks_triton import APART, COUNTS, VANISHING

REPRESENTABLE = tl.constexpr(naive.REPRESENTABLE)


@triton.jit
def tabulate(aware, masses, tails, counters, sinks, CHUNK: tl.constexpr):
    """Program (head): mass of each bin and the smaller ones, and counters of each bin and the larger ones, in place."""
    head = tl.program_id(0).to(tl.int64)
    if tl.load(aware + head) != 0:
        mass = tl.zeros((), tl.float64)
        counted = tl.zeros((), tl.int64)
        sunk = tl.zeros((), tl.int32)
        for first in range(0, BINS, CHUNK):
            up = first + tl.arange(0, CHUNK)
            # Values of a bin have one exponent: the sum of their mantissas is exact.
            sums = tl.load(masses + head * BINS + up).to(tl.float64) * scale_of(up)
            tl.store(tails + head * BINS + up, mass + tl.cumsum(sums, 0))
            mass += tl.sum(sums, 0)
            down = BINS - 1 - up
            numbers = tl.load(counters + head * BINS + down)
            tl.store(counters + head * BINS + down, counted + tl.cumsum(numbers, 0))
            counted += tl.sum(numbers, 0)
            firsts = tl.load(sinks + head * BINS + down)
            tl.store(sinks + head * BINS + down, sunk + tl.cumsum(firsts, 0))
            sunk += tl.sum(firsts, 0)


@triton.jit
def _start(tail, total, ahead, tiles, apart):
    """Coverage key of a tile before which `ahead` tiles come, with `tail` of the mass left."""
    return (tail / total + VANISHING * ((tiles - ahead).to(tl.float64) / tiles)) * apart


@triton.jit
def _above(counters, head, bins, inside):
    """Counters of the bins above the given ones."""
    return tl.load(counters + head * BINS + bins + 1, mask=inside & (bins + 1 < BINS), other=0)


@triton.jit
def _cut(tails, counters, head, inside, apart, rest, tiles):
    """The smallest bin whose first tile may not be left out, BINS where all may; and the key of that tile."""
    total = tl.load(tails + head * BINS + BINS - 1, mask=inside, other=1.0)
    low = tl.zeros_like(rest).to(tl.int32)
    high = low + BINS
    for _ in range(HALF + 1):
        middle = (low + high) >> 1
        look = inside & (low < high)
        ahead = _above(counters, head, middle, look) >> COUNT
        tail = tl.load(tails + head * BINS + middle, mask=look, other=0.0)
        found = _start(tail, total, ahead, tiles, apart) > rest
        high = tl.where(look & found, middle, high)
        low = tl.where(look & ~found, middle + 1, low)
    look = inside & (low < BINS)
    ahead = _above(counters, head, low, look) >> COUNT
    tail = tl.load(tails + head * BINS + low, mask=look, other=0.0)
    return low, look, _start(tail, total, ahead, tiles, apart), total


@triton.jit
def _taken(keys, lists, inside, rest, blocks, steps):
    """How many of the descending keys of each list exceed `rest`."""
    low = tl.zeros_like(rest).to(tl.int32) + tl.zeros_like(lists)
    high = low + blocks
    for _ in range(steps):
        middle = (low + high) >> 1
        look = inside & (low < high)
        found = tl.load(keys + lists * blocks + middle, mask=look, other=0.0) > rest
        low = tl.where(look & found, middle + 1, low)
        high = tl.where(look & ~found, middle, high)
    return low


@triton.jit
def _density(
    keys, added, aware, tails, counters, sinks, rest, any_aware, heads, blocks, steps, block, tiles, units, forced,
    pairs, LISTS: tl.constexpr, HEADS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """`(POINTS,)` fp64 mean executed density of the heads where the shares `rest` may be left out.

    Of the bin at a cut, the tiles that are taken are counted as if its values were equal: then the first column, which
    adds no pairs, comes last, and the others are about alike.
    """
    lists = tl.arange(0, LISTS)[:, None].to(tl.int64)
    inside = lists < 2 * heads
    number = _taken(keys, lists, inside, rest[None, :], blocks, steps)
    sums = tl.load(added + lists * blocks + number - 1, mask=inside & (number > 0), other=0)
    total = tl.sum(sums, 0) + forced
    if any_aware:
        head = tl.arange(0, HEADS)[:, None].to(tl.int64)
        followed = tl.load(aware + head, mask=head < heads, other=0) != 0
        apart = 1 + APART * head.to(tl.float64)
        shares = rest[None, :] + tl.zeros((HEADS, POINTS), tl.float64)
        every = followed & tl.full((HEADS, POINTS), 1, tl.int1)
        bins, some, key, whole = _cut(tails, counters, head, every, apart, shares, tiles)
        above = _above(counters, head, bins, some)
        upto = tl.load(counters + head * BINS + bins, mask=some & (bins > 0), other=0)
        upto = tl.where(bins > 0, upto, (tiles.to(tl.int64) << COUNT) + units)  # values that are 0 were not counted
        here = upto - above
        size = tl.maximum(here >> COUNT, 1).to(tl.float64)
        mass = tl.load(tails + head * BINS + bins, mask=some, other=0.0)
        mass -= tl.load(tails + head * BINS + bins - 1, mask=some & (bins > 0), other=0.0)
        step = (mass / size / whole + VANISHING / tiles) * apart
        reach = tl.minimum(tl.maximum(tl.ceil((key - shares) / step), 1.0), size)
        first = tl.load(sinks + head * BINS + bins, mask=some & (bins > 0), other=0)
        first = tl.where(bins > 0, first, blocks)
        first -= tl.load(sinks + head * BINS + bins + 1, mask=some & (bins + 1 < BINS), other=0)
        part = tl.minimum(reach / tl.maximum(size - first.to(tl.float64), 1.0), 1.0)
        mask = (tl.full((), 1, tl.int64) << COUNT) - 1
        reached = (above & mask).to(tl.float64) + tl.floor((here & mask).to(tl.float64) * part)
        total += tl.sum(tl.where(some, reached, 0.0), 0).to(tl.int64) * block
    return total.to(tl.float64) / pairs


@triton.jit(do_not_specialize=COUNTS)
def solve_share(
    keys, added, aware, tails, counters, sinks, solution, numbers, cuts, given: tl.int64, heads, blocks, steps, block,
    tiles: tl.int64, units: tl.int64, forced: tl.int64, pairs: tl.int64, floor, ceiling,
    SOLVE: tl.constexpr, LISTS: tl.constexpr, HEADS: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """One program: the share that may be left out, gamma, verticals and slashes of each head, and the bins at the cut.

    `given` has the bits of the fp64 share, or of the density to meet. The bisection is that of `naive.solve`, step by
    step; each round looks at the 2 ** DEEP - 1 middles that its next DEEP steps may need.
    """
    POINTS: tl.constexpr = 1 << DEEP
    target = given.to(tl.int64).to(tl.float64, bitcast=True)
    rest = target
    head = tl.arange(0, HEADS).to(tl.int64)
    followed = tl.load(aware + head, mask=head < heads, other=0) != 0
    any_aware = tl.max(followed.to(tl.int32), 0) > 0
    if SOLVE:
        index = tl.arange(0, POINTS)
        low = tl.full((), LOWEST, tl.float64)
        high = tl.full((), HIGHEST, tl.float64)
        found = _density(
            keys, added, aware, tails, counters, sinks, tl.exp(tl.where(index == 0, low, high)), any_aware, heads,
            blocks, steps, block, tiles, units, forced, pairs, LISTS, HEADS, POINTS,
        )  # fmt: skip
        below = pick(found, index, 0)
        above = pick(found, index, 1)
        least = below <= target
        most = above >= target - 1e-9
        done = least | most
        depth = tl.zeros((POINTS,), tl.int32)  # the middles are a binary tree: node i has the children 2i and 2i + 1
        for level in tl.static_range(1, DEEP):
            depth += (index >= (1 << level)).to(tl.int32)
        count = 0
        while (count < HALVINGS) & (done == 0):
            lows = low + tl.zeros((POINTS,), tl.float64)
            highs = high + tl.zeros((POINTS,), tl.float64)
            for level in tl.static_range(DEEP - 1):
                right = ((index >> tl.maximum(depth - 1 - level, 0)) & 1) == 1
                middles = (lows + highs) / 2
                lows = tl.where((depth > level) & right, middles, lows)
                highs = tl.where((depth > level) & ~right, middles, highs)
            middles = (lows + highs) / 2
            found = _density(
                keys, added, aware, tails, counters, sinks, tl.exp(middles), any_aware, heads, blocks, steps, block,
                tiles, units, forced, pairs, LISTS, HEADS, POINTS,
            )  # fmt: skip
            node = tl.full((), 1, tl.int32)
            for _ in tl.static_range(DEEP):
                value = pick(found, index, node)
                middle = pick(middles, index, node)
                right = (done == 0) & (value > target)
                left = (done == 0) & (value <= target)
                low = tl.where(right, middle, low)
                below = tl.where(right, value, below)
                high = tl.where(left, middle, high)
                above = tl.where(left, value, above)
                node = 2 * node + right.to(tl.int32)
                done = done | (tl.minimum(below - target, target - above) < CLOSE_ENOUGH)
            count += DEEP
        lower = least | ((most == 0) & (below - target < target - above))
        rest = tl.exp(tl.where(lower, low, high))
    gamma = tl.maximum(1 - rest, 0.0)
    rest = tl.where((rest > REPRESENTABLE) & (rest < 1), 1 - gamma, rest)
    tl.store(solution, gamma)
    tl.store(solution + 1, rest)

    lists = tl.arange(0, LISTS).to(tl.int64)
    inside = lists < 2 * heads
    number = _taken(keys, lists, inside, rest + tl.zeros((LISTS,), tl.float64), blocks, steps)
    own = tl.where(lists >= heads, lists - heads, lists)
    number = tl.where(tl.load(aware + own, mask=inside, other=0) != 0, 0, number)
    tl.store(numbers + lists, tl.minimum(tl.maximum(number, floor), ceiling), mask=inside)
    if any_aware:
        apart = 1 + APART * head.to(tl.float64)
        shares = rest + tl.zeros((HEADS,), tl.float64)
        bins, _, _, _ = _cut(tails, counters, head, followed, apart, shares, tiles)
        tl.store(cuts + head * 4 + 1, bins, mask=followed)


@triton.jit(do_not_specialize=COUNTS)
def refine(aware, tails, counters, lower, solution, cuts, tiles, CHUNK: tl.constexpr):
    """Program (head): the value at the cut, and how many of the tiles that have it are taken."""
    head = tl.program_id(0).to(tl.int64)
    if tl.load(aware + head) != 0:
        upper = tl.load(cuts + head * 4 + 1)
        rest = tl.load(solution + 1)
        value = tl.full((), 0x7FFFFFFF, tl.int32)  # above all: no tile is taken
        wanted = tl.zeros((), tl.int32)
        if upper < BINS:
            apart = 1 + APART * head.to(tl.float64)
            total = tl.load(tails + head * BINS + BINS - 1)
            before = tl.load(counters + head * BINS + upper + 1, mask=upper + 1 < BINS, other=0) >> COUNT
            size = (tl.load(counters + head * BINS + upper) >> COUNT) - before
            tail = tl.load(tails + head * BINS + upper - 1, mask=upper > 0, other=0.0)
            # Values that are 0 come last, and were not counted.
            scale = scale_of(upper)
            nothing = tl.where(upper == 0, tiles - (tl.load(counters + head * BINS) >> COUNT), 0)
            size += nothing
            counted = tl.zeros((), tl.int64)
            first = tl.zeros((), tl.int32)
            while first < BINS:
                bits = first + tl.arange(0, CHUNK)
                number = tl.load(lower + head * BINS + bits).to(tl.int64) + tl.where(bits == 0, nothing, 0)
                values = mantissa((upper << HALF) + bits).to(tl.float64) * scale
                tails_here = tail + tl.cumsum(number.to(tl.float64) * values, 0)
                ahead = before + size - counted - tl.cumsum(number, 0)
                over = _start(tails_here, total, ahead, tiles, apart) > rest
                least = tl.min(tl.where(over, bits, BINS), 0)
                if least < BINS:
                    found = bits == least
                    here = tl.sum(tl.where(found, number, 0), 0)
                    ahead_here = tl.sum(tl.where(found, ahead, 0), 0)
                    tail_here = tl.sum(tl.where(found, tails_here, 0.0), 0)
                    each = tl.sum(tl.where(found, values, 0.0), 0)
                    key = _start(tail_here, total, ahead_here, tiles, apart)
                    step = (each / total + VANISHING / tiles) * apart
                    many = tl.ceil((key - rest) / step)
                    many = tl.minimum(tl.maximum(many, 1.0), here.to(tl.float64))
                    # The quotient is rounded: the keys of the last one in and of the first one out decide.
                    last_in = many.to(tl.int64) - 1
                    key_in = _start(
                        tail_here - last_in.to(tl.float64) * each, total, ahead_here + last_in, tiles, apart
                    )
                    key_out = _start(tail_here - many * each, total, ahead_here + last_in + 1, tiles, apart)
                    fewer = (key_in <= rest) & (last_in > 0)
                    more = (key_out > rest) & (last_in + 1 < here)
                    wanted = (last_in + 1 - fewer.to(tl.int64) + more.to(tl.int64)).to(tl.int32)
                    value = (upper << HALF) + least
                    first = tl.full((), BINS, tl.int32)
                else:
                    tail += tl.sum(number.to(tl.float64) * values, 0)
                    counted += tl.sum(number, 0)
                    first += CHUNK
        tl.store(cuts + head * 4 + 2, value)
        tl.store(cuts + head * 4 + 3, wanted)


@triton.jit(do_not_specialize=COUNTS)
def break_ties(
    pooled, pooled_keys, aware, highest, inverse, ties, cuts, places, key_head_stride, key_stride, group, blocks,
    factor, cap, DIM: tl.constexpr, BD: tl.constexpr, CAPPED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (head): the last of the tiles with the value at the cut that is taken, larger columns first."""
    head = tl.program_id(0).to(tl.int64)
    if tl.load(aware + head) != 0:
        value = tl.load(cuts + head * 4 + 2)
        wanted = tl.load(cuts + head * 4 + 3)
        column = tl.full((), -1, tl.int32)
        here = tl.zeros((), tl.int32)
        last = blocks - 1
        while (last >= 0) & (column < 0):
            ids = last - tl.arange(0, CHUNK)
            number = tl.load(ties + head * blocks + ids, mask=ids >= 0, other=0)
            upto = tl.cumsum(number, 0)
            found = tl.max(tl.where((upto >= wanted) & (number > 0), ids, -1), 0)
            if (found >= 0) & (wanted > 0):
                here = tl.sum(tl.where(ids == found, number, 0), 0)
                wanted -= tl.sum(tl.where(ids > found, number, 0), 0)
                column = found
            else:
                wanted -= tl.sum(number, 0)
                last -= CHUNK
        row = blocks - 1
        if wanted < here:
            pooled += head * blocks * DIM
            pooled_keys += head // group * key_head_stride
            columns = column // SIDE * SIDE + tl.arange(0, SIDE)
            first = column // SIDE * SIDE
            while first < blocks:
                rows = first + tl.arange(0, SIDE)
                m = tl.load(highest + head * blocks + rows, mask=rows < blocks, other=0.0)
                inv = tl.load(inverse + head * blocks + rows, mask=rows < blocks, other=0.0)
                bits = probabilities(
                    pooled, pooled_keys, key_stride, rows, columns, m, inv, blocks, factor, cap, DIM, BD, CAPPED
                )
                at = (columns == column)[None, :] & (column <= rows)[:, None] & (rows < blocks)[:, None]
                equal = tl.max((at & (bits == value)).to(tl.int32), 1)
                upto = tl.cumsum(equal, 0)
                found = tl.min(tl.where((upto == wanted) & (equal > 0), rows, blocks), 0)
                if found < blocks:
                    row = found
                    first = blocks
                else:
                    wanted -= tl.sum(equal, 0)
                    first += SIDE
        tl.store(places + head * 2, column)
        tl.store(places + head * 2 + 1, row)
