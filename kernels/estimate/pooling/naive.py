"""Sums and means over blocks in torch, on any device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...types import block_lengths


def sum_blocks(mass: Tensor, block: int) -> Tensor:
    """Sum `(H, L)` over blocks of tokens: `(H, n)`."""
    heads, length = mass.shape
    blocks = -(-length // block)
    return F.pad(mass, (0, blocks * block - length)).reshape(heads, blocks, block).sum(-1)


def pool(states: Tensor, block: int) -> Tensor:
    """See `pooling.pool`."""
    heads, length, dim = states.shape
    blocks = -(-length // block)
    padded = F.pad(states.float(), (0, 0, 0, blocks * block - length)).reshape(heads, blocks, block, dim)
    return padded.sum(2) / block_lengths(length, block, states.device)[:, None]
