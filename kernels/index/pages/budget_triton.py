"""How many pages a token reads, worked out in a Triton program: `naive.budget_pages`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _shared_budget(keep, tokens, visible, before, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, SIZE: tl.constexpr):
    """Pages that each KV head of a row reads: `naive.budget_pages`, and `naive._fill` over all pairs of heads."""
    heads = tl.arange(0, HEADS_PADDED)
    asked = (keep * tokens.to(tl.float64) - (visible - before * SIZE).to(tl.float64)) / SIZE
    asked = tl.maximum(asked, 0.0)
    wanted = asked.to(tl.int64)
    rest = asked - wanted.to(tl.float64)
    wanted += ((rest > 0.5) | ((rest == 0.5) & (wanted % 2 == 1))).to(tl.int64)  # half to even
    wanted = tl.where((heads < HEADS) & (visible > 0), wanted, 0)
    enough = tl.sum((wanted > before).to(tl.int32), 0) == 0
    total = tl.minimum(tl.sum(wanted, 0), tl.sum(before, 0).to(tl.int64)).to(tl.int32)
    mine, other = before[:, None], before[None, :]
    first = heads[None, :] < heads[:, None]
    real = (heads < HEADS)[None, :]
    smaller = real & ((other < mine) | ((other == mine) & first))
    sharing = tl.maximum(HEADS - tl.sum(smaller.to(tl.int32), 1), 1)
    shares = (total - tl.sum(tl.where(smaller, other, 0), 1)) // sharing
    level = tl.max(tl.where(heads < HEADS, shares, 0), 0)
    given = tl.minimum(before, level)
    rank = tl.sum((real & ((other > mine) | ((other == mine) & first))).to(tl.int32), 1)
    given += ((rank < total - tl.sum(given, 0)) & (given < before)).to(tl.int32)
    return tl.where(enough, wanted.to(tl.int32), given)


@triton.jit
def number_of_pages(
    lengths,
    logical,
    sequence,
    behind,
    most,
    low_bits,
    high_bits,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
):
    """Complete pages that a token of a sequence reads, one that `behind` others follow."""
    if SHARE:
        keep = ((high_bits.to(tl.int64) << 32) | (low_bits.to(tl.int64) & 0xFFFFFFFF)).to(tl.float64, bitcast=True)
        heads = tl.arange(0, HEADS_PADDED)
        tokens = tl.load(logical + sequence // HEADS) - behind
        seen = tl.load(lengths + sequence // HEADS * HEADS + heads, mask=heads < HEADS, other=0) - behind
        seen = tl.where(heads < HEADS, seen, 0)
        held = tl.maximum(seen - 1, 0) // SIZE
        shared = _shared_budget(keep, tokens, seen, held, HEADS, HEADS_PADDED, SIZE)
        read = tl.sum(tl.where(heads == sequence % HEADS, shared, 0), 0)
    else:
        length = tl.load(lengths + sequence)
        read = tl.minimum(most, tl.maximum(length - behind - 1, 0) // SIZE)
    return read
