"""Attention of the last block of queries in block space, and how well pooled keys predict it (FlexPrefill)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...backends import choose
from . import naive


@dataclass(frozen=True)
class WindowBlocks:
    """Attention of the last `block` queries, averaged over them and summed into blocks.

    Attributes:
        vertical: `(H, n)` fp32, mass of each key block.
        slash: `(H, n)` fp32, mass of each band of `block` token diagonals: band d holds the offsets query - key in
            [d * block, (d + 1) * block).
        divergence: `(H,)` fp32, square root of the Jensen-Shannon divergence between `vertical` and what the mean of
            the queries predicts from pooled keys.
    """

    vertical: Tensor
    slash: Tensor
    divergence: Tensor


def window_blocks(
    query: Tensor,
    key: Tensor,
    pooled_keys: Tensor,
    block: int,
    *,
    scale: float,
    softcap: float | None = None,
    backend: str = "auto",
) -> WindowBlocks:
    """Causal softmax attention of the last min(block, L) queries, in blocks (Lai et al., ICLR 2025, Algorithms 2, 3).

    Args:
        query: `(H, L, D)`.
        key: `(H_kv, L, D)`.
        pooled_keys: `(H_kv, n, D)` fp32, means of the key blocks.
        scale, softcap: as the attention itself uses them.
        backend: `auto`, `naive` or `triton`. The latter reads the keys once and needs H * L * 8 bytes besides.

    Raises:
        ValueError: a backend that cannot run here.
    """
    if choose(backend, query.device) == "triton":
        from . import triton

        return WindowBlocks(*triton.window_blocks(query, key, pooled_keys, block, scale, softcap))
    return WindowBlocks(*naive.window_blocks(query, key, pooled_keys, block, scale, softcap))
