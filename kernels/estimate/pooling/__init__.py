"""Sums and means over blocks of tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...backends import choose
from ...types import block_lengths


def sum_blocks(mass: Tensor, block: int) -> Tensor:
    """Sum `(H, L)` over blocks of tokens: `(H, n)`."""
    heads, length = mass.shape
    blocks = -(-length // block)
    return F.pad(mass, (0, blocks * block - length)).reshape(heads, blocks, block).sum(-1)


def pool(states: Tensor, block: int, *, backend: str = "auto") -> Tensor:
    """Mean of each block of tokens: `(H, L, D)` to `(H, n, D)` in fp32; a partial last block counts its tokens.

    Args:
        backend: `auto`, `naive` or `triton`; the latter takes blocks of a power of two tokens.
    """
    if choose(backend, states.device) == "triton" and block & (block - 1) == 0:
        from . import triton as pooling_triton

        return pooling_triton.pool(states, block)
    return _pool(states, block)


def pool_both(query: Tensor, key: Tensor, block: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`pool` of queries `(H, L, D)` and of keys `(H_kv, L, D)`, which Triton does in one launch."""
    if choose(backend, query.device) == "triton" and block & (block - 1) == 0:
        from . import triton as pooling_triton

        return pooling_triton.pool_both(query, key, block)
    return _pool(query, block), _pool(key, block)


def _pool(states: Tensor, block: int) -> Tensor:
    heads, length, dim = states.shape
    blocks = -(-length // block)
    padded = F.pad(states.float(), (0, 0, 0, blocks * block - length)).reshape(heads, blocks, block, dim)
    return padded.sum(2) / block_lengths(length, block, states.device)[:, None]
