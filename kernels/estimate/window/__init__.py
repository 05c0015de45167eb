"""Attention of the last queries of a row, reduced over those queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...backends import choose
from . import naive
from .naive import diagonal_sums

__all__ = ["WindowSums", "diagonal_sums", "window_flops", "window_sums"]


@dataclass(frozen=True)
class WindowSums:
    """Attention weights of the last queries of a row, reduced over those queries.

    Attributes:
        columns: `(H, L)` fp32, sum of the weights on each key.
        diagonals: `(H, L)` fp32, sum over each token diagonal: entry o for query - key = o.
        peaks: `(H, L)` fp32, largest weight on each key. Any of the three is None unless it was asked for.
    """

    columns: Tensor | None
    diagonals: Tensor | None
    peaks: Tensor | None


def window_sums(
    query: Tensor,
    key: Tensor,
    window: int,
    *,
    scale: float,
    softcap: float | None = None,
    columns: bool = False,
    diagonals: bool = False,
    peaks: bool = False,
    backend: str = "auto",
) -> WindowSums:
    """Causal softmax attention of the last `window` queries, reduced to what is asked for.

    Args:
        query: `(H, L, D)`; the last min(window, L) queries are used.
        key: `(H_kv, L, D)`.
        scale, softcap: as the attention itself uses them.
        backend: `auto`, `naive` or `triton` (half precision and fp32).
    """
    backend = choose(backend, query.device)
    if backend == "triton" and query.dtype in (torch.bfloat16, torch.float16, torch.float32):
        from . import triton

        return WindowSums(*triton.sums(query, key, window, scale, softcap, (columns, diagonals, peaks)))
    return WindowSums(*naive.sums(query, key, window, scale, softcap, (columns, diagonals, peaks)))


def window_flops(heads: int, window: int, length: int, dim: int) -> int:
    """Multiplications and additions of `window_sums`' scores; what softmax and sums cost besides is not counted."""
    return 2 * heads * min(window, length) * length * dim
