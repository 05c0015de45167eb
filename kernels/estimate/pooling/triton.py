"""Means of blocks of tokens in Triton: one pass over the states, each read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Tokens that a program reads at least: enough loads in flight to fill the memory's bandwidth.
TOKENS = 128


def pool(states: Tensor, block: int) -> Tensor:
    """`(H, L, D)` to `(H, n, D)` fp32, as `pooling.pool`."""
    return _launch(states, states, 0, block)


def pool_both(query: Tensor, key: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """`(H, L, D)` and `(H_kv, L, D)` of one dtype, as `pooling.pool_both`."""
    pooled = _launch(query, key, len(key), block)
    return pooled[: len(query)], pooled[len(query) :]


def _launch(states: Tensor, others: Tensor, count: int, block: int) -> Tensor:
    """Means of `states` and of the first `count` heads of `others`, `(H + count, n, D)`."""
    heads, length, dim = states.shape
    if dim > 1:
        states, others = (part if part.stride(2) == 1 else part.contiguous() for part in (states, others))
    blocks = -(-length // block)
    out = torch.empty(heads + count, blocks, dim, dtype=torch.float32, device=states.device)
    tokens = max(TOKENS, block)
    _pool_kernel[(triton.cdiv(length, tokens), heads + count)](
        states,
        others,
        out,
        heads,
        length,
        blocks,
        states.stride(0),
        states.stride(1),
        others.stride(0),
        others.stride(1),
        BLOCK=block,
        TOKENS=tokens,
        DIM=dim,
        PADDED=triton.next_power_of_2(dim),
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["heads", "length", "blocks"])
def _pool_kernel(
    states,
    others,
    out,
    heads,
    length,
    blocks,
    states_head,
    states_token,
    others_head,
    others_token,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One program: the blocks in `TOKENS` tokens of one head."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    dims = tl.arange(0, PADDED)
    # Selected, not branched on: after a branch the compiler would not know that rows are aligned.
    own = head < heads
    base = tl.where(own, states, others)
    head_stride = tl.where(own, states_head, others_head)
    token_stride = tl.where(own, states_token, others_token)
    rows = base + tl.where(own, head, head - heads).to(tl.int64) * head_stride + tokens.to(tl.int64) * token_stride
    mask = (tokens < length)[:, None] & (dims < DIM)[None, :]
    values = tl.load(rows[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    sums = tl.sum(tl.reshape(values, (TOKENS // BLOCK, BLOCK, PADDED)), 1)
    ids = tile * (TOKENS // BLOCK) + tl.arange(0, TOKENS // BLOCK)
    counts = tl.minimum(length - ids * BLOCK, BLOCK).to(tl.float32)
    # Division as IEEE rounds it, so that means of few values are those of the plain version.
    means = tl.div_rn(sums, tl.broadcast_to(counts[:, None], (TOKENS // BLOCK, PADDED)))
    place = (head.to(tl.int64) * blocks + ids)[:, None] * DIM + dims[None, :]
    tl.store(out + place, means, mask=(ids < blocks)[:, None] & (dims < DIM)[None, :])
