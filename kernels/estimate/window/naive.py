"""Attention of the last queries in torch, on any device: their weights on all keys, for a few heads at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: fp32 scores held at once, or those of one head.
WINDOW_ELEMENTS = 1 << 26


def sums(
    query: Tensor, key: Tensor, window: int, scale: float, softcap: float | None, wanted: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """Columns, diagonals and peaks, `(H, L)` fp32, where `wanted`; arguments as of `window_sums`."""
    heads, length, _ = query.shape
    group = heads // key.shape[0]
    window = min(window, length)
    future = torch.ones(window, window, dtype=torch.bool, device=query.device).triu(1)
    columns, diagonals, peaks = wanted
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
    return [torch.cat(found) if found else None for found in parts.values()]


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
