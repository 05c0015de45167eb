"""A walk over the lists of a `Blocks` in Triton, without waiting for the device: it counts and it checks.

One program per (head, query block) walks its own list; no table of tiles or of columns is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .blocks import Blocks

#: Entries of a list that a program looks at together.
ENTRIES = 128


#: Bits of `blocks.FAULTS`.
COUNT, RANGE, FUTURE, ORDER, NO_KEY, COLUMN_COUNT, COLUMN_RANGE, COLUMN_ORDER, COLUMN_TWICE, COLUMN_MISSED = (
    tl.constexpr(1 << bit) for bit in range(10)
)


def walk(layout: Blocks, mend: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`(H,)` int64 executed pairs and keys read, and `(H,)` int32 faults, as `Blocks.faults` gives them.

    Of a head with a fault the numbers are worth nothing.

    Args:
        mend: change lists that have a fault, which must be contiguous, so that kernels can read them.
    """
    heads, blocks, width = layout.indices.shape
    shape = 0, False
    columns = counts = layout.counts
    if layout.columns is not None:
        columns, counts = layout.columns, layout.column_counts
        shape = columns.shape[2], columns.shape[1] == 1
    partial = torch.empty(2, heads, blocks, dtype=torch.int64, device=layout.indices.device)
    faults = torch.zeros(heads, dtype=torch.int32, device=layout.indices.device)
    _walk_kernel[(blocks, heads)](
        layout.indices.contiguous(),
        layout.counts.contiguous(),
        columns if columns.stride(-1) == 1 else columns.contiguous(),
        counts.contiguous(),
        partial,
        faults,
        layout.length,
        blocks,
        width,
        shape[0],
        # A shared list with the same stride for all query blocks: none.
        columns.stride(0),
        0 if shape[1] else columns.stride(1),
        int(mend),
        BLOCK_Q=layout.block_q,
        BLOCK_K=layout.block_k,
        COLUMNS=layout.columns is not None,
        SHARED=shape[1],
        COLUMN_STEPS=max(1, shape[0]).bit_length(),
        TILE_STEPS=max(1, width).bit_length(),
        ENTRIES=ENTRIES,
        num_warps=4 if width > ENTRIES or shape[0] > ENTRIES else 1,
    )
    pairs, keys = partial.sum(-1)
    return pairs, keys, faults


@triton.jit
def _below(values, number, edges, STEPS: tl.constexpr):
    """How many of the first `number` ascending `values` are below each of `edges`."""
    low = tl.zeros_like(edges)
    high = low + number
    for _ in range(STEPS):
        middle = (low + high) // 2
        inside = low < high
        smaller = inside & (tl.load(values + middle, mask=inside, other=0) < edges)
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(inside & ~smaller, middle, high)
    return low


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _raised(condition, bit: tl.constexpr):
    return tl.where(condition, bit, 0)


@triton.jit(do_not_specialize=["length", "blocks", "width", "columns_width", "mend"])
def _walk_kernel(
    indices,
    counts,
    columns,
    column_counts,
    partial,
    faults,
    length,
    blocks,
    width,
    columns_width,
    columns_head,
    columns_block,
    mend,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED: tl.constexpr,
    COLUMN_STEPS: tl.constexpr,
    TILE_STEPS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Pairs and keys of one query block of one head: at most 128 queries, so that the sums fit into int32.

    Numbers of entries are taken for what can be at most, so that whatever lists hold nothing is read outside of them.
    """
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = head * blocks + block
    first = block * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, length)  # one past the block's queries
    queries = last - first
    entries = tl.arange(0, ENTRIES)
    counted = tl.load(counts + row)
    tiles = tl.minimum(tl.maximum(counted, 0), width)
    listed = indices + row * width
    lowest = tl.load(listed, mask=tiles > 0, other=-1)
    has_key = (lowest >= 0) & (lowest <= first // BLOCK_K)
    bad = _raised((counted < 1) | (counted > width), COUNT)
    bad_columns = 0
    pairs = tl.zeros((ENTRIES,), tl.int32)
    keys = tl.zeros((ENTRIES,), tl.int32)
    wrong = tl.zeros((ENTRIES,), tl.int32)
    number = 0
    seen_by_all = 0
    if COLUMNS:
        own = columns + head * columns_head + block.to(tl.int64) * columns_block
        counted = tl.load(column_counts + row)
        number = tl.minimum(tl.maximum(counted, 0), columns_width)
        bad_columns |= _raised(counted != number, COLUMN_COUNT)
        lowest = tl.load(own, mask=number > 0, other=-1)
        has_key |= (lowest >= 0) & (lowest <= first)
        start = 0
        if SHARED:
            # What a block counts more than the one before it must lie within its own queries.
            start = tl.load(column_counts + row - 1, mask=block > 0, other=0)
            start = tl.minimum(tl.maximum(start, 0), columns_width)
            bad_columns |= _raised(number < start, COLUMN_MISSED)
        seen = tl.zeros((ENTRIES,), tl.int32)
        while start < number:
            place = start + entries
            valid = place < number
            column = tl.load(own + place, mask=valid, other=0)
            before = tl.load(own + place - 1, mask=valid & (place > 0), other=-1)
            outside = (column < 0) | (column >= last)
            here = _raised(outside, COLUMN_RANGE)
            here |= _raised((place > 0) & (before >= column), COLUMN_ORDER)
            if SHARED:
                here |= _raised((column >= 0) & (column < first), COLUMN_MISSED)
                tl.store(own + place, tl.minimum(tl.maximum(column, 0), last - 1), mask=valid & outside & (mend != 0))
            else:
                seen += tl.where(valid & ~outside, last - tl.maximum(column, first), 0)
                tile = column // BLOCK_K
                at = _below(listed, tiles, tile, TILE_STEPS)
                taken = tl.load(listed + at, mask=valid & (at < tiles), other=-1) == tile
                here |= _raised(taken & ~outside, COLUMN_TWICE)
            wrong |= tl.where(valid, here, 0)
            start += ENTRIES
        bad_columns |= tl.reduce(wrong, 0, _either)
        wrong = tl.zeros((ENTRIES,), tl.int32)
        if SHARED:
            # Columns before the block's first query are seen by all its queries; of the others there are few.
            at_first = tl.full((1,), 0, tl.int32) + first
            seen_by_all = tl.max(_below(own, number, at_first, COLUMN_STEPS), 0)
            near = seen_by_all + tl.arange(0, BLOCK_Q)
            exists = near < number
            column = tl.minimum(tl.maximum(tl.load(own + near, mask=exists, other=0), 0), length - 1)
            among = _below(listed, tiles, column // BLOCK_K, TILE_STEPS)
            found = tl.load(listed + among, mask=exists & (among < tiles), other=-1) == column // BLOCK_K
            near_pairs = tl.sum(tl.where(exists & ~found, last - column, 0), 0)
        else:
            near_pairs = tl.sum(seen, 0)
    else:
        near_pairs = 0
    start = 0
    while start < tiles:
        place = start + entries
        valid = place < tiles
        tile = tl.load(listed + place, mask=valid, other=0)
        before = tl.load(listed + place - 1, mask=valid & (place > 0), other=-1)
        outside = (tile < 0) | (tile >= tl.cdiv(length, BLOCK_K))
        here = _raised(outside, RANGE)
        here |= _raised(~outside & (tile > (last - 1) // BLOCK_K), FUTURE)
        here |= _raised((place > 0) & (before >= tile), ORDER)
        wrong |= tl.where(valid, here, 0)
        key = tl.where(outside, 0, tile) * BLOCK_K
        end = tl.minimum(key + BLOCK_K, length)
        # Query q sees min(q + 1, end) - min(q + 1, key) keys of the tile; `some` queries see part of it or nothing.
        some = tl.minimum(tl.maximum(end - first - 1, 0), queries)
        none = tl.minimum(tl.maximum(key - first - 1, 0), queries)
        inside = some * (first + 1 - key) + some * (some - 1) // 2 + (queries - some) * (end - key)
        before_first = none * (first + 1 - key) + none * (none - 1) // 2
        pairs += tl.where(valid, inside - before_first, 0)
        keys += tl.where(valid, end - key, 0)
        if COLUMNS and SHARED:
            # Shared lists hold columns that lie in listed tiles as well: they add nothing there.
            low = _below(own, number, tl.minimum(key, last), COLUMN_STEPS)
            high = _below(own, number, tl.minimum(end, last), COLUMN_STEPS)
            far = tl.minimum(high, seen_by_all) - tl.minimum(low, seen_by_all)
            keys -= tl.where(valid, high - low, 0)
            pairs -= tl.where(valid, far * queries, 0)
        start += ENTRIES
    bad |= tl.reduce(wrong, 0, _either)
    all_pairs = tl.sum(pairs, 0).to(tl.int64) + near_pairs
    all_keys = tl.sum(keys, 0).to(tl.int64) + number
    if SHARED:
        all_pairs += seen_by_all * queries
    tl.store(partial + row, all_pairs)
    tl.store(partial + tl.num_programs(1).to(tl.int64) * blocks + row, all_keys)
    if mend != 0:
        if bad != 0:
            tl.store(counts + row, 1)
            tl.store(listed, first // BLOCK_K)
        if bad_columns != 0:
            tl.store(column_counts + row, number if SHARED else 0)
    bad |= bad_columns | _raised(~has_key, NO_KEY)
    if bad != 0:
        tl.atomic_or(faults + head, bad, sem="relaxed")
