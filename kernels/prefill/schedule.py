"""In which order programs take up query blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def order_programs(work: Tensor, group: int) -> Tensor:
    """Query blocks by KV head, so that the keys and values being read fit the L2 cache; then by falling work.

    Args:
        work: `(H, n)` integers, keys that each query block of each query head reads.
        group: query heads per KV head.

    Returns:
        `(H * n,)` int32, flat places in `(H, n)`.
    """
    heads, blocks = work.shape
    by_work = work.reshape(heads // group, group * blocks).sort(dim=-1, descending=True, stable=True).indices
    first = torch.arange(0, heads * blocks, group * blocks, device=work.device)
    return (by_work + first[:, None]).to(torch.int32).flatten()
