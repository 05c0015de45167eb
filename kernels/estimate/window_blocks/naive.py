"""Attention of the last block of queries in block space, in torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pooling import sum_blocks
from ..window import window_sums


def window_blocks(
    query: Tensor, key: Tensor, pooled_keys: Tensor, block: int, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Vertical and slash masses `(H, n)`, and the divergence `(H,)`; arguments as of `window_blocks.window_blocks`."""
    sums = window_sums(query, key, block, scale=scale, softcap=softcap, columns=True, diagonals=True, backend="naive")
    vertical, slash = sum_blocks(sums.columns, block) / block, sum_blocks(sums.diagonals, block) / block
    pooled_keys = pooled_keys.repeat_interleave(query.shape[0] // key.shape[0], 0)
    predicted = torch.einsum("hd,hnd->hn", query[:, -block:].float().mean(1), pooled_keys) * scale
    if softcap is not None:
        predicted = softcap * torch.tanh(predicted / softcap)
    return vertical, slash, root_jensen_shannon(predicted.softmax(-1), vertical)


def root_jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence (natural logarithm) along the last dimension."""
    m = (p + q) / 2
    divergence = (torch.xlogy(p, p) - torch.xlogy(p, m) + torch.xlogy(q, q) - torch.xlogy(q, m)).sum(-1) / 2
    return divergence.clamp(min=0).sqrt()
