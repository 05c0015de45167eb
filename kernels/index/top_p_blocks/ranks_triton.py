"""Verticals and slashes in Triton: block masses are few, so their ranks, and what each block adds to the pairs, are
counted by comparing all with all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import naive

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

APART, VANISHING = tl.constexpr(naive.APART), tl.constexpr(naive.VANISHING)


@triton.jit(do_not_specialize=COUNTS)
def rank_blocks(vertical, slash, keys, sorted_keys, ranks, heads, blocks, ITEMS: tl.constexpr, CHUNK: tl.constexpr):
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
    apart = 1 + APART * (head.to(tl.float64) + tl.where(bands, 0.5, 0.0))
    key = (missing / whole + VANISHING * ((blocks - rank).to(tl.float64) / blocks)) * apart
    place = row.to(tl.int64) * blocks
    tl.store(keys + place + own, key, mask=own < blocks)
    tl.store(ranks + place + own, rank, mask=own < blocks)
    tl.store(sorted_keys + place + rank, key, mask=own < blocks)


@triton.jit(do_not_specialize=COUNTS)
def gains(keys, ranks, aware, gains, heads, blocks, block, last, ITEMS: tl.constexpr, CHUNK: tl.constexpr):
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
