"""Maps of query-aware heads in Triton: pooled probabilities, counted by their bits and never stored.

They are computed again in each pass, by the same code on the same tiles, so that they are the same bits. All counting
is in integers: results do not depend on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...estimate.window_blocks.triton import capped
from .ranks_triton import COUNTS

#: Tiles of pooled scores are SIDE x SIDE, and their products take DEPTH dimensions at a time.
SIDE, DEPTH = tl.constexpr(64), tl.constexpr(64)
#: Probabilities have 30 bits (the sign is 0, and none is above 1): upper and lower half.
HALF, BINS = tl.constexpr(15), tl.constexpr(1 << 15)
#: A counter holds a number of tiles from this bit on, and below it their pairs over the block size.
COUNT = tl.constexpr(36)


@triton.jit(do_not_specialize=COUNTS)
def pool_queries(
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
def probabilities(
    pooled, pooled_keys, key_stride, rows, columns, highest, inverse, blocks, factor, cap, DIM: tl.constexpr,
    BD: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Bits of a tile of probabilities: as integers they are in the order of the values. Not causal: 0."""
    scores = _scores(pooled, pooled_keys, key_stride, rows, columns, blocks, factor, cap, DIM, BD, CAPPED)
    return (tl.exp2(scores - highest[:, None]) * inverse[:, None]).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=COUNTS)
def softmax_rows(
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
def mantissa(bits):
    """Mantissa of fp32 numbers given by their bits, as integers of 24 bits."""
    return (bits & 0x7FFFFF) + tl.where(bits > 0x7FFFFF, 0x800000, 0)


@triton.jit
def scale_of(upper):
    """What a 1 in the mantissa of numbers with these upper bits is worth: a power of two, fp64."""
    exponent = tl.maximum(upper >> (23 - HALF), 1) - 150
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=COUNTS)
def count_tiles(
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
            bits = probabilities(
                pooled, pooled_keys, key_stride, rows, columns, m, inv, blocks, factor, cap, DIM, BD, CAPPED
            )
            causal = (columns[None, :] <= rows[:, None]) & (rows < blocks)[:, None]
            if PASS == 0:
                some = causal & (bits > 0)
                upper = bits >> HALF
                tl.atomic_add(masses + head * BINS + upper, mantissa(bits).to(tl.int64), mask=some, sem="relaxed")
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
