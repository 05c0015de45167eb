"""The best blocks in Triton: scores of a chunk of rows by one kernel, their choice by another, one program a row.

Nothing is sorted. A row's smallest taken score is found by bisection on the number of scores above a value. Scores
are exact fp32 values, or as good (three products of TF32 halves), and chunks bound their memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Block scores held at once: 256 MiB.
SCORE_ELEMENTS = 1 << 26
#: Chunks of rows do not reach across a power of two from here on, so that short rows are not padded to long ones.
SPLIT = 512
#: How products of fp32 numbers are made. Plain "tf32" would round the scores.
PRECISION = "tf32x3"
#: Scores of a row that one warp holds.
PER_WARP = 1024
#: Registers of a thread of the choosing kernel: few enough that several rows are at work in a multiprocessor.
REGISTERS = 80
#: Rows and columns of scores that one program computes.
TILE_Q, TILE_K = 64, 128
#: Steps of a row's bisection that halve the range of values; later ones halve the range of bit patterns.
VALUE_STEPS = 16


def forward(pooled_queries: Tensor, pooled_keys: Tensor, budget: int, extra: int, near: int) -> tuple[Tensor, Tensor]:
    heads, blocks, dim = pooled_queries.shape
    pooled_queries, pooled_keys = pooled_queries.contiguous(), pooled_keys.contiguous()
    budget = min(budget, blocks)
    width = min(blocks, budget + (extra > 0))
    indices = torch.empty(heads, blocks, width, dtype=torch.int32, device=pooled_queries.device)
    counts = torch.empty(heads, blocks, dtype=torch.int32, device=pooled_queries.device)
    chunks = row_chunks(blocks, heads)
    room = max((end - first) * _stride(end) for first, end in chunks)
    scores = torch.empty(heads * room, dtype=torch.float32, device=pooled_queries.device)
    for first, end in chunks:
        rows, stride = end - first, _stride(end)
        _scores_kernel[(triton.cdiv(end, TILE_K), triton.cdiv(rows, TILE_Q), heads)](
            pooled_queries,
            pooled_keys,
            scores,
            first,
            rows,
            blocks,
            stride,
            GROUP=heads // len(pooled_keys),
            DIM=dim,
            TILE_Q=TILE_Q,
            TILE_K=TILE_K,
            TILE_D=32,
            PRECISION=PRECISION,
            num_warps=4,
            num_stages=2,
        )
        padded = max(64, triton.next_power_of_2(end))
        _choose_kernel[(rows, heads)](
            scores,
            indices,
            counts,
            first,
            rows,
            blocks,
            stride,
            width,
            budget,
            extra,
            NEAR=near,
            TILE_K=TILE_K,
            PADDED=padded,
            VALUE_STEPS=VALUE_STEPS,
            num_warps=max(1, padded // PER_WARP),
            maxnreg=REGISTERS if padded <= 8 * PER_WARP else None,
        )
    return indices, counts


def row_chunks(blocks: int, heads: int) -> list[tuple[int, int]]:
    """Rows [first, end) to do at once, within `SCORE_ELEMENTS`."""
    chunks, first = [], 0
    while first < blocks:
        edge = SPLIT
        while edge <= first:
            edge *= 2
        edge = min(edge, blocks)
        # Whole tiles of rows but for the last chunk.
        step = max(1, SCORE_ELEMENTS // (heads * _stride(edge)) // TILE_Q) * TILE_Q
        chunks.append((first, min(first + step, edge)))
        first = chunks[-1][1]
    return chunks


def _stride(columns: int) -> int:
    """Scores between two rows of a chunk: whole tiles."""
    return -(-columns // TILE_K) * TILE_K


# Numbers that change with the length are not specialised on: each kind of them would compile anew.
@triton.jit(do_not_specialize=["first", "rows", "blocks"])
def _scores_kernel(
    queries,
    keys,
    scores,
    first,
    rows,
    blocks,
    stride,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the products of pooled queries and keys of one head. Tiles above the diagonal are left out."""
    column = tl.program_id(0) * TILE_K
    row = tl.program_id(1) * TILE_Q
    head = tl.program_id(2).to(tl.int64)
    if column < first + row + TILE_Q:
        place = row + tl.arange(0, TILE_Q)
        q_ids = first + place
        k_ids = column + tl.arange(0, TILE_K)
        q_rows = queries + head * blocks * DIM + q_ids[:, None] * DIM
        k_rows = keys + head // GROUP * blocks * DIM + k_ids[:, None] * DIM
        total = tl.zeros((TILE_Q, TILE_K), tl.float32)
        for start in range(0, DIM, TILE_D):
            dims = start + tl.arange(0, TILE_D)
            q = tl.load(q_rows + dims[None, :], mask=(q_ids < blocks)[:, None] & (dims < DIM)[None, :], other=0.0)
            k = tl.load(k_rows + dims[None, :], mask=(k_ids < blocks)[:, None] & (dims < DIM)[None, :], other=0.0)
            total = tl.dot(q, tl.trans(k), total, input_precision=PRECISION)
        target = scores + (head * rows + place)[:, None] * stride + k_ids[None, :]
        tl.store(target, total, mask=(place < rows)[:, None])


@triton.jit
def _ordered(bits):
    """Integers in the order of the fp32 numbers with these bits; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["first", "rows", "blocks", "width", "budget", "extra"])
def _choose_kernel(
    scores,
    indices,
    counts,
    first,
    rows,
    blocks,
    stride,
    width,
    budget,
    extra,
    NEAR: tl.constexpr,
    TILE_K: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_STEPS: tl.constexpr,
):
    """The blocks of one row of one head."""
    place = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = first + place
    taken_blocks = tl.minimum(budget + (row >= blocks - extra).to(tl.int32), row + 1)
    free = taken_blocks - 1 - NEAR  # besides the first block and the nearest
    columns = tl.arange(0, PADDED)
    open_ = (columns > 0) & (columns <= row - NEAR)
    # What lies behind the row is loaded up to a whole tile, so that loads are wide, and not looked at.
    held = tl.cdiv(row, TILE_K) * TILE_K
    score = tl.load(scores + (head * rows + place) * stride + columns, mask=columns < held, other=0.0)
    score = tl.where(score == 0.0, 0.0, score)  # -0 is 0
    order = _ordered(score.to(tl.int32, bitcast=True))
    # The largest value that at least `free` scores reach lies in [low, high]; `reached` scores reach low.
    low = tl.min(tl.where(open_, order, 0x7FFFFFFF), 0)
    order = tl.where(open_, order, -0x80000000)
    high = tl.max(order, 0)
    reached = row - NEAR
    step = 0
    while (free > 0) & (low < high) & (reached > free):
        # Halving values takes some log2(n) steps where scores spread evenly, halving bit patterns at most 32 anyhow.
        value = 0.5 * _ordered(low).to(tl.float32, bitcast=True) + 0.5 * _ordered(high).to(tl.float32, bitcast=True)
        by_value = _ordered(value.to(tl.int32, bitcast=True)).to(tl.int64)
        by_bits = low.to(tl.int64) + (high.to(tl.int64) - low.to(tl.int64) + 1) // 2
        middle = tl.where(step < VALUE_STEPS, by_value, by_bits)
        middle = tl.minimum(tl.maximum(middle, low.to(tl.int64) + 1), high.to(tl.int64)).to(tl.int32)
        count = tl.sum((order >= middle).to(tl.int32), 0)
        if count >= free:
            low = middle
            reached = count
        else:
            high = middle - 1
        step += 1
    chosen = open_ & (order >= low) & (free > 0)
    if (free > 0) & (reached > free):
        # Ties at `low`: as many as there is room for, from the right.
        equal = (open_ & (order == low)).to(tl.int32)
        ties = tl.sum(equal, 0)
        before = tl.cumsum(equal, 0) - equal
        chosen = chosen & ((order > low) | (ties - before <= free - (reached - ties)))
    chosen = chosen | (columns == 0) | ((columns > row - NEAR) & (columns <= row))
    target = indices + (head * blocks + row) * width
    tl.store(target + tl.cumsum(chosen.to(tl.int32), 0) - 1, columns, mask=chosen)
    if taken_blocks < width:
        start = taken_blocks
        while start < width:
            tl.store(target + start + columns, tl.zeros_like(columns), mask=start + columns < width)
            start += PADDED
    tl.store(counts + head * blocks + row, taken_blocks)
