"""Lists of a layout in Triton: the tiles that taken diagonals touch, and taken columns."""

from __future__ import annotations

import triton
import triton.language as tl

from .ranks_triton import CHUNK


@triton.jit(do_not_specialize=["sinks", "near"])
def tally(
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
def emit(
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
