"""Counting the pairs and keys of a `BlockLayout` in Triton, without waiting for the device.

One program per (head, query block) counts its own list; no table of tiles or of columns is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .layout import BlockLayout

#: Entries of a list that a program looks at together.
ENTRIES = 128


def pairs_and_keys(layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """`(H,)` int64 each: executed pairs, and keys read."""
    heads, blocks, width = layout.indices.shape
    shape = 0, False
    columns = counts = layout.counts
    if layout.columns is not None:
        columns, counts = layout.columns, layout.column_counts
        shape = columns.shape[2], columns.shape[1] == 1
    partial = torch.empty(2, heads, blocks, dtype=torch.int64, device=layout.indices.device)
    _count_kernel[(blocks, heads)](
        layout.indices.contiguous(),
        layout.counts.contiguous(),
        columns,
        counts.contiguous(),
        partial,
        layout.length,
        blocks,
        width,
        # A shared list with the same stride for all query blocks: none.
        columns.stride(0),
        0 if shape[1] else columns.stride(1),
        BLOCK_Q=layout.block_q,
        BLOCK_K=layout.block_k,
        COLUMNS=layout.columns is not None and shape[0] > 0,
        SHARED=shape[1],
        COLUMN_STEPS=max(1, shape[0]).bit_length(),
        TILE_STEPS=max(1, width).bit_length(),
        ENTRIES=ENTRIES,
        num_warps=4 if width > ENTRIES or shape[0] > ENTRIES else 1,
    )
    pairs, keys = partial.sum(-1)
    return pairs, keys


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


@triton.jit(do_not_specialize=["length", "blocks", "width"])
def _count_kernel(
    indices,
    counts,
    columns,
    column_counts,
    partial,
    length,
    blocks,
    width,
    columns_head,
    columns_block,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED: tl.constexpr,
    COLUMN_STEPS: tl.constexpr,
    TILE_STEPS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Pairs and keys of one query block of one head: at most 128 queries, so that the sums fit into int32."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = head * blocks + block
    first = block * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, length)  # one past the block's queries
    queries = last - first
    entries = tl.arange(0, ENTRIES)
    tiles = tl.load(counts + row)
    listed = indices + row * width
    pairs = tl.zeros((ENTRIES,), tl.int32)
    keys = tl.zeros((ENTRIES,), tl.int32)
    number = 0
    seen_by_all = 0
    if COLUMNS:
        own = columns + head * columns_head + block.to(tl.int64) * columns_block
        number = tl.load(column_counts + row)
        if SHARED:
            # Columns before the block's first query are seen by all its queries; of the others there are few.
            at_first = tl.full((1,), 0, tl.int32) + first
            seen_by_all = tl.max(_below(own, number, at_first, COLUMN_STEPS), 0)
            near = seen_by_all + tl.arange(0, BLOCK_Q)
            exists = near < number
            column = tl.load(own + near, mask=exists, other=0)
            place = _below(listed, tiles, column // BLOCK_K, TILE_STEPS)
            found = tl.load(listed + place, mask=exists & (place < tiles), other=-1) == column // BLOCK_K
            near_pairs = tl.sum(tl.where(exists & ~found, last - column, 0), 0)
        else:
            near_pairs = 0
            start = 0
            seen = tl.zeros((ENTRIES,), tl.int32)
            while start < number:
                column = tl.load(own + start + entries, mask=start + entries < number, other=0)
                seen += tl.where(start + entries < number, last - tl.maximum(column, first), 0)
                start += ENTRIES
            near_pairs = tl.sum(seen, 0)
    else:
        near_pairs = 0
    start = 0
    while start < tiles:
        valid = start + entries < tiles
        key = tl.load(listed + start + entries, mask=valid, other=0) * BLOCK_K
        end = tl.minimum(key + BLOCK_K, length)
        # Query q sees min(q + 1, end) - min(q + 1, key) keys of the tile; `some` queries see part of it or nothing.
        some = tl.minimum(tl.maximum(end - first - 1, 0), queries)
        none = tl.minimum(tl.maximum(key - first - 1, 0), queries)
        inside = some * (first + 1 - key) + some * (some - 1) // 2 + (queries - some) * (end - key)
        before = none * (first + 1 - key) + none * (none - 1) // 2
        pairs += tl.where(valid, inside - before, 0)
        keys += tl.where(valid, end - key, 0)
        if COLUMNS and SHARED:
            # Shared lists hold columns that lie in listed tiles as well: they add nothing there.
            low = _below(own, number, tl.minimum(key, last), COLUMN_STEPS)
            high = _below(own, number, tl.minimum(end, last), COLUMN_STEPS)
            far = tl.minimum(high, seen_by_all) - tl.minimum(low, seen_by_all)
            keys -= tl.where(valid, high - low, 0)
            pairs -= tl.where(valid, far * queries, 0)
        start += ENTRIES
    all_pairs = tl.sum(pairs, 0).to(tl.int64) + near_pairs
    all_keys = tl.sum(keys, 0).to(tl.int64) + number
    if SHARED:
        all_pairs += seen_by_all * queries
    tl.store(partial + row, all_pairs)
    tl.store(partial + tl.num_programs(1).to(tl.int64) * blocks + row, all_keys)
