"""Attention of the last queries of a row, reduced over those queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import choose

#: fp32 scores held at once, or those of one head.
WINDOW_ELEMENTS = 1 << 26


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
        from . import triton as window_triton

        return WindowSums(*window_triton.sums(query, key, window, scale, softcap, (columns, diagonals, peaks)))
    return _naive(query, key, window, scale, softcap, columns, diagonals, peaks)


def _naive(
    query: Tensor,
    key: Tensor,
    window: int,
    scale: float,
    softcap: float | None,
    columns: bool,
    diagonals: bool,
    peaks: bool,
) -> WindowSums:
    heads, length, _ = query.shape
    group = heads // key.shape[0]
    window = min(window, length)
    future = torch.ones(window, window, dtype=torch.bool, device=query.device).triu(1)
    parts: dict[str, list[Tensor]] = {"columns": [], "diagonals": [], "peaks": []}
    step = max(1, min(group, WINDOW_ELEMENTS // (window * length)))
    for kv_head, key_states in enumerate(key):
        # The query heads of a group are rows of one product with their keys, which are not repeated.
        keys = key_states.float().T
        for first in range(kv_head * group, (kv_head + 1) * group, step):
            scores = query[first : min(first + step, (kv_head + 1) * group), -window:].float() @ keys
            scores *= scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores[..., -window:].masked_fill_(future, float("-inf"))
            weights = scores.softmax(-1)
            if columns:
                parts["columns"].append(weights.sum(1))
            if diagonals:
                parts["diagonals"].append(diagonal_sums(weights))
            if peaks:
                parts["peaks"].append(weights.amax(1))
    return WindowSums(**{name: torch.cat(found) if found else None for name, found in parts.items()})


def window_flops(heads: int, window: int, length: int, dim: int) -> int:
    """Multiplications and additions of `window_sums`' scores; what softmax and sums cost besides is not counted."""
    return 2 * heads * min(window, length) * length * dim


def diagonal_sums(weights: Tensor) -> Tensor:
    """Sum of `(H, w, L)` weights over each token diagonal: `(H, L)`, entry o for query - key = o.

    The w queries are the last of L. Rows are skewed by reading a padded copy with a stride that is one longer
    than its rows, so that a diagonal becomes a column.
    """
    heads, window, length = weights.shape
    width = length + window
    flat = F.pad(F.pad(weights, (0, window)).reshape(heads, window * width), (window - 1, 0))
    skewed = flat.as_strided((heads, window, length), (flat.stride(0), width + 1, 1))
    return skewed.sum(1).flip(-1)
