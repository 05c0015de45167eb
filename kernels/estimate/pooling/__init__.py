"""Sums and means over blocks of tokens."""

from __future__ import annotations

from torch import Tensor

from ...backends import choose
from . import naive
from .naive import sum_blocks

__all__ = ["pool", "pool_both", "sum_blocks"]


def pool(states: Tensor, block: int, *, backend: str = "auto") -> Tensor:
    """Mean of each block of tokens: `(H, L, D)` to `(H, n, D)` in fp32; a partial last block counts its tokens.

    Args:
        backend: `auto`, `naive` or `triton`; the latter takes blocks of a power of two tokens.
    """
    if choose(backend, states.device) == "triton" and block & (block - 1) == 0:
        from . import triton

        return triton.pool(states, block)
    return naive.pool(states, block)


def pool_both(query: Tensor, key: Tensor, block: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`pool` of queries `(H, L, D)` and of keys `(H_kv, L, D)`, which Triton does in one launch."""
    if choose(backend, query.device) == "triton" and block & (block - 1) == 0:
        from . import triton

        return triton.pool_both(query, key, block)
    return naive.pool(query, block), naive.pool(key, block)
