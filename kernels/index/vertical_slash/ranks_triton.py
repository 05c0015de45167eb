"""Ranks of columns and diagonals in Triton, from their order by mass, and of the tiles that diagonals touch."""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(4096)


@triton.jit
def _is_forced(order, row, heads, length, sinks, near):
    """The column or diagonal that stands at each place of a sorted row, and whether it is taken before all others."""
    item = tl.where(row < heads, length - 1 - order, order)
    return item, item < tl.where(row < heads, sinks, near)


@triton.jit(do_not_specialize=["sinks", "near"])
def count_forced(order, before, heads, length, sinks, near):
    """Forced items in each chunk of each sorted row."""
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    found = tl.load(order + row.to(tl.int64) * length + place, mask=place < length, other=0).to(tl.int32)
    _, forced = _is_forced(found, row, heads, length, sinks, near)
    tl.store(before + row * tl.num_programs(0) + chunk, tl.sum((forced & (place < length)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["sinks", "near"])
def rank_lines(order, before, ranks, heads, length, sinks, near, CHUNKS: tl.constexpr):
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
def touch_tiles(rank, bands, length, blocks, last, TILE: tl.constexpr, EACH: tl.constexpr):
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
