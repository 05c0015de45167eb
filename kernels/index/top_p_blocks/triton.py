"""Triton kernels of `coverage`: the choice, its solve and the layout stay on the device.

Block masses are few, so ranks and what each block adds to the pairs are counted by comparing all with all. Maps of
query-aware heads are never stored: their probabilities are computed again in each pass, by the same code on the same
tiles, so that they are the same bits. Passes count how many probabilities have which upper 15 bits, and which lower 15
bits where the upper ones are those at the cut; what is left are equal values, which are told apart by place.
All counting is in integers: results do not depend on the order in which programs run. Kernels of query-aware heads are
launched for all heads and end at once for the others.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...estimate.window_blocks.triton import LOG2E, capped
from ...types import Blocks, causal_pairs
from . import naive

#: Lists of tiles have room for all blocks of a row up to this size; beyond it their longest is read from the device.
LIST_BYTES = 1 << 30
#: Tiles of pooled scores are SIDE x SIDE, and their products take DEPTH dimensions at a time.
SIDE, DEPTH = tl.constexpr(64), tl.constexpr(64)
#: Probabilities have 30 bits (the sign is 0, and none is above 1): upper and lower half.
HALF, BINS = tl.constexpr(15), tl.constexpr(1 << 15)
#: A counter holds a number of tiles from this bit on, and below it their pairs over the block size.
COUNT = tl.constexpr(36)
#: Programs that share the tiles of one row of tiles.
SPLITS = 8

#: Numbers that differ from prompt to prompt: kernels are not compiled anew for some of their values.
COUNTS = [
    "length",
    "blocks",
    "last",
    "tiles",
    "units",
    "forced",
    "pairs",
    "given",
    "floor",
    "ceiling",
    "steps",
    "width",
]

_CLOSE_ENOUGH, _REPRESENTABLE = tl.constexpr(naive.CLOSE_ENOUGH), tl.constexpr(naive.REPRESENTABLE)
_LOWEST, _HIGHEST = tl.constexpr(naive.LOWEST), tl.constexpr(naive.HIGHEST)
_APART, _VANISHING = tl.constexpr(naive.APART), tl.constexpr(naive.VANISHING)
_HALVINGS = tl.constexpr(naive.HALVINGS)


# ------------------------------------------------------------------------------------------------ verticals and slashes


@triton.jit(do_not_specialize=COUNTS)
def _rank(vertical, slash, keys, sorted_keys, ranks, heads, blocks, ITEMS: tl.constexpr, CHUNK: tl.constexpr):
    """Program (list, tile of blocks): place of each block by descending mass, and its coverage key.

    Lists are the verticals of all heads, then their slashes. Ties go to larger key blocks and to nearer bands.
    """
    row = tl.program_id(0)
    own = tl.program_id(1) * ITEMS + tl.arange(0, ITEMS)
    bands = row >= heads
    head = tl.where(bands, row - heads, row)
    masses = tl.where(bands, slash, vertical) + head.to(tl.int64) * blocks
    mass = tl.load(masses + own, mask=own < blocks, other=0.0)
    before = tl.zeros((ITEMS, CHUNK), tl.int32)
    tail = tl.zeros((ITEMS, CHUNK), tl.float64)
    total = tl.zeros((CHUNK,), tl.float64)
    for first in range(0, blocks, CHUNK):
        other = first + tl.arange(0, CHUNK)
        there = tl.load(masses + other, mask=other < blocks, other=0.0)
        nearer = tl.where(bands, other[None, :] < own[:, None], other[None, :] > own[:, None])
        ahead = (there[None, :] > mass[:, None]) | ((there[None, :] == mass[:, None]) & nearer)
        before += (ahead & (other < blocks)[None, :]).to(tl.int32)
        # A sum of the same tree for all blocks, so that it does not rise from one rank to the next.
        tail += tl.where(ahead, 0.0, there[None, :].to(tl.float64))
        total += there.to(tl.float64)
    rank = tl.sum(before, 1)
    missing = tl.sum(tail, 1)
    whole = tl.maximum(tl.sum(total, 0), 1e-300)
    apart = 1 + _APART * (head.to(tl.float64) + tl.where(bands, 0.5, 0.0))
    key = (missing / whole + _VANISHING * ((blocks - rank).to(tl.float64) / blocks)) * apart
    place = row.to(tl.int64) * blocks
    tl.store(keys + place + own, key, mask=own < blocks)
    tl.store(ranks + place + own, rank, mask=own < blocks)
    tl.store(sorted_keys + place + rank, key, mask=own < blocks)


@triton.jit(do_not_specialize=COUNTS)
def _gains(keys, ranks, aware, gains, heads, blocks, block, last, ITEMS: tl.constexpr, CHUNK: tl.constexpr):
    """Program (list, tile of blocks): pairs that each block adds to those taken before it, stored by rank.

    Tile (x + y, y) lies in column y and in band x, so what holds of columns holds of bands too. The first column and
    the first band are taken before all others.
    """
    row = tl.program_id(0)
    own = tl.program_id(1) * ITEMS + tl.arange(0, ITEMS)
    bands = row >= heads
    place = row.to(tl.int64) * blocks
    opposite = tl.where(bands, row - heads, row + heads).to(tl.int64) * blocks
    key = tl.load(keys + place + own, mask=own < blocks, other=0.0)
    rank = tl.load(ranks + place + own, mask=own < blocks, other=0)
    edge = (blocks - 1 - own)[:, None]
    added = tl.zeros((ITEMS, CHUNK), tl.int32)
    followed = tl.load(aware + tl.where(bands, row - heads, row)) != 0
    end = tl.where(followed, 0, blocks - tl.program_id(1) * ITEMS)
    for first in range(0, end, CHUNK):
        other = first + tl.arange(0, CHUNK)
        there = tl.load(keys + opposite + other, mask=other < blocks, other=0.0)[None, :]
        taken = (there > key[:, None]) | ((there == key[:, None]) & bands)
        free = (other > 0)[None, :] & (other[None, :] <= edge) & ~taken
        added += tl.where(free, tl.where(other[None, :] == edge, last, block), 0)
    gain = tl.where(own > 0, tl.sum(added, 1).to(tl.int64) * block, 0)
    tl.store(gains + place + rank, gain, mask=own < blocks)


# -------------------------------------------------------------------------------------------- maps of query-aware heads


@triton.jit(do_not_specialize=COUNTS)
def _pool_queries(
    query, aware, pooled, head_stride, token_stride, length, blocks, DIM: tl.constexpr, BD: tl.constexpr,
    B: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Program (head, blocks): means of the blocks of a query-aware head."""
    head = tl.program_id(0).to(tl.int64)
    if tl.load(aware + head) != 0:
        d = tl.arange(0, BD)
        for step in range(EACH):
            block = tl.program_id(1) * EACH + step
            total = tl.zeros((BD,), tl.float32)
            for first in range(0, B, 16):
                token = block * B + first + tl.arange(0, 16)
                pointers = query + head * head_stride + token[:, None].to(tl.int64) * token_stride + d[None, :]
                some = tl.load(pointers, mask=(token < length)[:, None] & (d < DIM)[None, :], other=0.0)
                total += tl.sum(some.to(tl.float32), 0)
            count = tl.minimum(length - block * B, B)
            tl.store(pooled + (head * blocks + block) * DIM + d, total / count, mask=(d < DIM) & (block < blocks))


@triton.jit
def _scores(
    pooled, pooled_keys, key_stride, rows, columns, blocks, factor, cap, DIM: tl.constexpr, BD: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Tile of scores in units of log2, -inf where a block is not causal. Products are precise to fp32."""
    products = tl.zeros((SIDE, SIDE), tl.float32)
    for first in range(0, BD, DEPTH):
        d = first + tl.arange(0, DEPTH)
        q = tl.load(
            pooled + rows[:, None].to(tl.int64) * DIM + d[None, :],
            mask=(rows < blocks)[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        k = tl.load(
            pooled_keys + columns[:, None].to(tl.int64) * key_stride + d[None, :],
            mask=(columns < blocks)[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        products = tl.dot(q, tl.trans(k), products, input_precision="tf32x3")
    scores = capped(products, factor, cap, CAPPED)
    return tl.where((columns[None, :] <= rows[:, None]) & (rows < blocks)[:, None], scores, float("-inf"))


@triton.jit
def _probabilities(
    pooled, pooled_keys, key_stride, rows, columns, highest, inverse, blocks, factor, cap, DIM: tl.constexpr,
    BD: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Bits of a tile of probabilities: as integers they are in the order of the values. Not causal: 0."""
    scores = _scores(pooled, pooled_keys, key_stride, rows, columns, blocks, factor, cap, DIM, BD, CAPPED)
    return (tl.exp2(scores - highest[:, None]) * inverse[:, None]).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=COUNTS)
def _softmax(
    pooled, pooled_keys, aware, highest, inverse, key_head_stride, key_stride, group, blocks, factor, cap,
    DIM: tl.constexpr, BD: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Program (head, row of tiles): largest score and inverse sum of each row of the map."""
    head = tl.program_id(0).to(tl.int64)
    if tl.load(aware + head) != 0:
        tile = tl.num_programs(1) - 1 - tl.program_id(1)  # long rows first
        rows = tile * SIDE + tl.arange(0, SIDE)
        pooled += head * blocks * DIM
        pooled_keys += head // group * key_head_stride
        m = tl.full((SIDE,), float("-inf"), tl.float32)
        s = tl.zeros((SIDE,), tl.float32)
        for first in range(0, tile * SIDE + SIDE, SIDE):
            columns = first + tl.arange(0, SIDE)
            scores = _scores(pooled, pooled_keys, key_stride, rows, columns, blocks, factor, cap, DIM, BD, CAPPED)
            larger = tl.maximum(m, tl.max(scores, 1))
            base = tl.where(larger == float("-inf"), 0.0, larger)  # rows behind the last
            s = s * tl.exp2(m - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
            m = larger
        tl.store(highest + head * blocks + rows, m, mask=rows < blocks)
        tl.store(inverse + head * blocks + rows, tl.div_rn(tl.full((SIDE,), 1.0, tl.float32), s), mask=rows < blocks)


@triton.jit
def _mantissa(bits):
    """Mantissa of fp32 numbers given by their bits, as integers of 24 bits."""
    return (bits & 0x7FFFFF) + tl.where(bits > 0x7FFFFF, 0x800000, 0)


@triton.jit
def _scale(upper):
    """What a 1 in the mantissa of numbers with these upper bits is worth: a power of two, fp64."""
    exponent = tl.maximum(upper >> (23 - HALF), 1) - 150
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=COUNTS)
def _count(
    pooled, pooled_keys, aware, highest, inverse, masses, counters, sinks, lower, ties, cuts, key_head_stride,
    key_stride, group, blocks, block, last, factor, cap, DIM: tl.constexpr, BD: tl.constexpr, CAPPED: tl.constexpr,
    PASS: tl.constexpr,
):  # fmt: skip
    """Program (head, row of tiles, split): count the probabilities of the map.

    Pass 0 counts tiles, their pairs, those of the first column and the mantissas by the upper bits, but no values of 0;
    pass 1 counts lower bits where the upper ones are those at the cut; pass 2 counts the values at the cut by column.
    """
    head = tl.program_id(0).to(tl.int64)
    if tl.load(aware + head) != 0:
        tile = tl.num_programs(1) - 1 - tl.program_id(1)
        rows = tile * SIDE + tl.arange(0, SIDE)
        pooled += head * blocks * DIM
        pooled_keys += head // group * key_head_stride
        m = tl.load(highest + head * blocks + rows, mask=rows < blocks, other=0.0)
        inv = tl.load(inverse + head * blocks + rows, mask=rows < blocks, other=0.0)
        cut = tl.load(cuts + head * 4 + PASS) if PASS > 0 else 0
        # Rows have their weight: forced tiles add no pairs, those of the last row fewer.
        weight = tl.where(rows == blocks - 1, last, block)[:, None]
        for first in range(tl.program_id(2) * SIDE, tile * SIDE + SIDE, tl.num_programs(2) * SIDE):
            columns = first + tl.arange(0, SIDE)
            bits = _probabilities(
                pooled, pooled_keys, key_stride, rows, columns, m, inv, blocks, factor, cap, DIM, BD, CAPPED
            )
            causal = (columns[None, :] <= rows[:, None]) & (rows < blocks)[:, None]
            if PASS == 0:
                some = causal & (bits > 0)
                upper = bits >> HALF
                tl.atomic_add(masses + head * BINS + upper, _mantissa(bits).to(tl.int64), mask=some, sem="relaxed")
                forced = (columns == 0)[None, :] | (columns[None, :] == rows[:, None])
                one = tl.full((SIDE, SIDE), 1, tl.int64) << COUNT
                units = tl.where(forced, 0, weight).to(tl.int64)
                tl.atomic_add(counters + head * BINS + upper, one + units, mask=some, sem="relaxed")
                if first == 0:
                    single = tl.full((SIDE, SIDE), 1, tl.int32)
                    sink = some & (columns == 0)[None, :]
                    tl.atomic_add(sinks + head * BINS + upper, single, mask=sink, sem="relaxed")
            elif PASS == 1:
                some = causal & (bits > 0) & ((bits >> HALF) == cut)
                one = tl.full((SIDE, SIDE), 1, tl.int32)
                tl.atomic_add(lower + head * BINS + (bits & (BINS - 1)), one, mask=some, sem="relaxed")
            else:
                number = tl.sum((causal & (bits == cut)).to(tl.int32), 0)
                tl.atomic_add(ties + head * blocks + columns, number, mask=number > 0, sem="relaxed")


@triton.jit
def _tabulate(aware, masses, tails, counters, sinks, CHUNK: tl.constexpr):
    """Program (head): mass of each bin and the smaller ones, and counters of each bin and the larger ones, in place."""
    head = tl.program_id(0).to(tl.int64)
    if tl.load(aware + head) != 0:
        mass = tl.zeros((), tl.float64)
        counted = tl.zeros((), tl.int64)
        sunk = tl.zeros((), tl.int32)
        for first in range(0, BINS, CHUNK):
            up = first + tl.arange(0, CHUNK)
            # Values of a bin have one exponent: the sum of their mantissas is exact.
            sums = tl.load(masses + head * BINS + up).to(tl.float64) * _scale(up)
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
    return (tail / total + _VANISHING * ((tiles - ahead).to(tl.float64) / tiles)) * apart


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
        apart = 1 + _APART * head.to(tl.float64)
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
        step = (mass / size / whole + _VANISHING / tiles) * apart
        reach = tl.minimum(tl.maximum(tl.ceil((key - shares) / step), 1.0), size)
        first = tl.load(sinks + head * BINS + bins, mask=some & (bins > 0), other=0)
        first = tl.where(bins > 0, first, blocks)
        first -= tl.load(sinks + head * BINS + bins + 1, mask=some & (bins + 1 < BINS), other=0)
        part = tl.minimum(reach / tl.maximum(size - first.to(tl.float64), 1.0), 1.0)
        mask = (tl.full((), 1, tl.int64) << COUNT) - 1
        reached = (above & mask).to(tl.float64) + tl.floor((here & mask).to(tl.float64) * part)
        total += tl.sum(tl.where(some, reached, 0.0), 0).to(tl.int64) * block
    return total.to(tl.float64) / pairs


@triton.jit
def _pick(values, place, index):
    return tl.sum(tl.where(place == index, values, 0.0), 0)


@triton.jit(do_not_specialize=COUNTS)
def _solve(
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
        low = tl.full((), _LOWEST, tl.float64)
        high = tl.full((), _HIGHEST, tl.float64)
        found = _density(
            keys, added, aware, tails, counters, sinks, tl.exp(tl.where(index == 0, low, high)), any_aware, heads,
            blocks, steps, block, tiles, units, forced, pairs, LISTS, HEADS, POINTS,
        )  # fmt: skip
        below = _pick(found, index, 0)
        above = _pick(found, index, 1)
        least = below <= target
        most = above >= target - 1e-9
        done = least | most
        depth = tl.zeros((POINTS,), tl.int32)  # the middles are a binary tree: node i has the children 2i and 2i + 1
        for level in tl.static_range(1, DEEP):
            depth += (index >= (1 << level)).to(tl.int32)
        count = 0
        while (count < _HALVINGS) & (done == 0):
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
                value = _pick(found, index, node)
                middle = _pick(middles, index, node)
                right = (done == 0) & (value > target)
                left = (done == 0) & (value <= target)
                low = tl.where(right, middle, low)
                below = tl.where(right, value, below)
                high = tl.where(left, middle, high)
                above = tl.where(left, value, above)
                node = 2 * node + right.to(tl.int32)
                done = done | (tl.minimum(below - target, target - above) < _CLOSE_ENOUGH)
            count += DEEP
        lower = least | ((most == 0) & (below - target < target - above))
        rest = tl.exp(tl.where(lower, low, high))
    gamma = tl.maximum(1 - rest, 0.0)
    rest = tl.where((rest > _REPRESENTABLE) & (rest < 1), 1 - gamma, rest)
    tl.store(solution, gamma)
    tl.store(solution + 1, rest)

    lists = tl.arange(0, LISTS).to(tl.int64)
    inside = lists < 2 * heads
    number = _taken(keys, lists, inside, rest + tl.zeros((LISTS,), tl.float64), blocks, steps)
    own = tl.where(lists >= heads, lists - heads, lists)
    number = tl.where(tl.load(aware + own, mask=inside, other=0) != 0, 0, number)
    tl.store(numbers + lists, tl.minimum(tl.maximum(number, floor), ceiling), mask=inside)
    if any_aware:
        apart = 1 + _APART * head.to(tl.float64)
        shares = rest + tl.zeros((HEADS,), tl.float64)
        bins, _, _, _ = _cut(tails, counters, head, followed, apart, shares, tiles)
        tl.store(cuts + head * 4 + 1, bins, mask=followed)


@triton.jit(do_not_specialize=COUNTS)
def _refine(aware, tails, counters, lower, solution, cuts, tiles, CHUNK: tl.constexpr):
    """Program (head): the value at the cut, and how many of the tiles that have it are taken."""
    head = tl.program_id(0).to(tl.int64)
    if tl.load(aware + head) != 0:
        upper = tl.load(cuts + head * 4 + 1)
        rest = tl.load(solution + 1)
        value = tl.full((), 0x7FFFFFFF, tl.int32)  # above all: no tile is taken
        wanted = tl.zeros((), tl.int32)
        if upper < BINS:
            apart = 1 + _APART * head.to(tl.float64)
            total = tl.load(tails + head * BINS + BINS - 1)
            before = tl.load(counters + head * BINS + upper + 1, mask=upper + 1 < BINS, other=0) >> COUNT
            size = (tl.load(counters + head * BINS + upper) >> COUNT) - before
            tail = tl.load(tails + head * BINS + upper - 1, mask=upper > 0, other=0.0)
            # Values that are 0 come last, and were not counted.
            scale = _scale(upper)
            nothing = tl.where(upper == 0, tiles - (tl.load(counters + head * BINS) >> COUNT), 0)
            size += nothing
            counted = tl.zeros((), tl.int64)
            first = tl.zeros((), tl.int32)
            while first < BINS:
                bits = first + tl.arange(0, CHUNK)
                number = tl.load(lower + head * BINS + bits).to(tl.int64) + tl.where(bits == 0, nothing, 0)
                values = _mantissa((upper << HALF) + bits).to(tl.float64) * scale
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
                    step = (each / total + _VANISHING / tiles) * apart
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
def _break_ties(
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
                bits = _probabilities(
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


# ---------------------------------------------------------------------------------------------------------- the layout


@triton.jit(do_not_specialize=COUNTS)
def _emit(
    pooled, pooled_keys, aware, highest, inverse, cuts, places, ranks, numbers, indices, counts, key_head_stride,
    key_stride, group, heads, blocks, width, factor, cap, DIM: tl.constexpr, BD: tl.constexpr, CAPPED: tl.constexpr,
    LIST: tl.constexpr, MAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (head, rows): ascending lists of the rows' tiles, or only how long they are.

    Query-aware heads (MAPS) and the others are launched apart: the products of the former need many registers.
    """
    head = tl.program_id(0).to(tl.int64)
    if (tl.load(aware + head) != 0) == MAPS:
        tile = tl.num_programs(1) - 1 - tl.program_id(1)
        rows = tile * ROWS + tl.arange(0, ROWS)
        n_vertical = tl.load(numbers + head)
        n_slash = tl.load(numbers + heads + head)
        if MAPS:
            pooled += head * blocks * DIM
            pooled_keys += head // group * key_head_stride
            value = tl.load(cuts + head * 4 + 2)
            column = tl.load(places + head * 2)
            row = tl.load(places + head * 2 + 1)
            m = tl.load(highest + head * blocks + rows, mask=rows < blocks, other=0.0)
            inv = tl.load(inverse + head * blocks + rows, mask=rows < blocks, other=0.0)
        length = tl.zeros((ROWS,), tl.int32)
        lists = indices + (head * blocks + rows.to(tl.int64)) * width
        for first in range(0, tile * ROWS + ROWS, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            offset = rows[:, None] - columns[None, :]
            causal = (offset >= 0) & (rows < blocks)[:, None]
            vertical = tl.load(ranks + head * blocks + columns, mask=columns < blocks, other=0) < n_vertical
            slash = tl.load(ranks + (heads + head) * blocks + offset, mask=causal, other=0) < n_slash
            taken = (vertical | (columns == 0))[None, :] | slash | (offset == 0)
            if MAPS:
                bits = _probabilities(
                    pooled, pooled_keys, key_stride, rows, columns, m, inv, blocks, factor, cap, DIM, BD, CAPPED
                )
                behind = (columns > column)[None, :] | ((columns == column)[None, :] & (rows <= row)[:, None])
                taken = taken | (bits > value) | ((bits == value) & behind)
            flags = (taken & causal).to(tl.int32)
            if LIST:
                place = length[:, None] + tl.cumsum(flags, 1) - 1
                ids = columns[None, :] + tl.zeros((ROWS, COLUMNS), tl.int32)
                tl.store(lists[:, None] + place, ids, mask=flags > 0)
            length += tl.sum(flags, 1)
        tl.store(counts + head * blocks + rows, length, mask=rows < blocks)


# -------------------------------------------------------------------------------------------------------------- launch


def select(
    query: Tensor,
    pooled_keys: Tensor,
    vertical: Tensor,
    slash: Tensor,
    query_aware: Tensor,
    block: int,
    scale: float,
    softcap: float | None,
    floor: int,
    ceiling: int,
    rest: float | None,
    density: float | None,
) -> tuple[Blocks, Tensor, Tensor]:
    """See `coverage.select`: the layout, gamma and rest, the latter two on the device."""
    heads, length, dim = query.shape
    blocks, device = vertical.shape[1], query.device
    group, last = heads // pooled_keys.shape[0], length - (blocks - 1) * block
    tiles = blocks * (blocks + 1) // 2
    # Pairs of the tiles that are not forced, over the block size.
    units = (blocks - 2) * (blocks - 1) // 2 * block - max(0, blocks - 2) * block + max(0, blocks - 2) * last
    forced = (blocks - 1) * (block * (block + 1) // 2) + last * (last + 1) // 2 + block * max(0, length - block)
    vertical, slash, aware = vertical.contiguous(), slash.contiguous(), query_aware.contiguous().view(torch.int8)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    keys = empty(2, 2 * heads, blocks, dtype=torch.float64)
    ranks = empty(2 * heads, blocks, dtype=torch.int32)
    grid = (2 * heads, triton.cdiv(blocks, 32))
    _rank[grid](vertical, slash, keys[0], keys[1], ranks, heads, blocks, ITEMS=32, CHUNK=64, num_warps=4)
    if density is None:
        added = ranks
    else:
        gains = empty(2 * heads, blocks, dtype=torch.int64)
        _gains[grid](keys[0], ranks, aware, gains, heads, blocks, block, last, ITEMS=32, CHUNK=64, num_warps=4)
        added = gains.cumsum(-1)

    pooled = empty(heads, blocks, dim, dtype=torch.float32)
    softmax = empty(2, heads, blocks, dtype=torch.float32)
    padded = max(DEPTH.value, triton.next_power_of_2(dim))
    _pool_queries[(heads, triton.cdiv(blocks, 8))](
        query, aware, pooled, query.stride(0), query.stride(1), length, blocks,
        DIM=dim, BD=padded, B=block, EACH=8, num_warps=4,
    )  # fmt: skip
    factor, cap = (scale * LOG2E, 0.0) if softcap is None else (scale / softcap, softcap * LOG2E)
    shape = {"DIM": dim, "BD": padded, "CAPPED": softcap is not None, "num_warps": 4, "num_stages": 1}
    strides = (pooled_keys.stride(0), pooled_keys.stride(1))
    states = (pooled, pooled_keys, aware, softmax[0], softmax[1])
    side = triton.cdiv(blocks, SIDE.value)
    _softmax[(heads, side)](*states, *strides, group, blocks, factor, cap, **shape)
    # Counters start from 0; each histogram, and the ties of each column, are a part of one buffer.
    bins = BINS.value
    zeros = torch.zeros(heads * (6 * bins + blocks), dtype=torch.int32, device=device)
    masses, counters = zeros[: 4 * heads * bins].view(torch.int64).view(2, heads, bins)
    sinks = zeros[4 * heads * bins : 5 * heads * bins]
    lower, ties = zeros[5 * heads * bins : 6 * heads * bins], zeros[6 * heads * bins :]
    cuts, places = empty(heads, 4, dtype=torch.int32), empty(heads, 2, dtype=torch.int32)
    counting = (*states, masses, counters, sinks, lower, ties, cuts, *strides, group, blocks, block, last, factor, cap)
    splits = (heads, side, min(side, SPLITS))
    _count[splits](*counting, **shape, PASS=0)
    tails = empty(heads, bins, dtype=torch.float64)
    _tabulate[(heads,)](aware, masses, tails, counters, sinks, CHUNK=4096, num_warps=8)
    solution, numbers = empty(2, dtype=torch.float64), empty(2 * heads, dtype=torch.int32)
    (given,) = struct.unpack("<q", struct.pack("<d", rest if density is None else density))
    _solve[(1,)](
        keys[1], added, aware, tails, counters, sinks, solution, numbers, cuts, given, heads, blocks,
        blocks.bit_length(), block, tiles, units, heads * forced, heads * causal_pairs(length), floor,
        max(ceiling, floor),
        SOLVE=density is not None, LISTS=triton.next_power_of_2(2 * heads), HEADS=triton.next_power_of_2(heads),
        DEEP=5 if heads <= 32 else 3, num_warps=8,
    )  # fmt: skip
    _count[splits](*counting, **shape, PASS=1)
    _refine[(heads,)](aware, tails, counters, lower, solution, cuts, tiles, CHUNK=2048, num_warps=8)
    _count[splits](*counting, **shape, PASS=2)
    _break_ties[(heads,)](
        *states, ties, cuts, places, *strides, group, blocks, factor, cap, **shape, CHUNK=1024
    )  # fmt: skip

    counts = empty(heads, blocks, dtype=torch.int32)

    def emit(indices: Tensor, listed: bool) -> None:
        for maps, rows, columns in ((False, 16, 128), (True, SIDE.value, SIDE.value)):
            _emit[(heads, triton.cdiv(blocks, rows))](
                *states, cuts, places, ranks, numbers, indices, counts, *strides, group, heads, blocks,
                indices.shape[-1], factor, cap, **shape, LIST=listed, MAPS=maps, ROWS=rows, COLUMNS=columns,
            )  # fmt: skip

    width = blocks
    if 4 * heads * blocks * blocks > LIST_BYTES:
        emit(ranks, False)
        width = int(counts.max())
    indices = empty(heads, blocks, width, dtype=torch.int32)
    emit(indices, True)
    return Blocks(indices, counts, length, block, block), solution[0], solution[1]
