"""The oracle: the definition of block-sparse attention, written with an L x L mask, in the widest precision.

It computes every pair and masks; it is for tests and debugging, not for speed or memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Blocks


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Blocks,
    scale: float,
    softcap: float | None,
    lse: Tensor | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """See `block_sparse_prefill`. Scores are computed in fp64 for fp64 input, else in fp32."""
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[0] // key.shape[0]
    length = layout.length
    position = torch.arange(length, device=query.device)
    causal = position[:, None] >= position[None, :]
    blocks = layout.mask()
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    for head in range(query.shape[0]):
        k, v = key[head // group].to(work), value[head // group].to(work)
        scores = query[head].to(work) @ k.T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = blocks[head][position // layout.block_q][:, position // layout.block_k]
        if layout.columns is not None:
            for block, count in enumerate(layout.column_counts[head].tolist()):
                rows = slice(block * layout.block_q, (block + 1) * layout.block_q)
                shared = layout.columns.shape[1] == 1
                visible[rows, layout.columns[head, 0 if shared else block, :count].long()] = True
        visible &= causal
        scores = scores.masked_fill(~visible, float("-inf"))
        if lse is not None:
            lse[head] = scores.logsumexp(-1)
        if sink is not None:  # one more key, of value 0
            scores = torch.cat([sink[head].to(work).expand(length, 1), scores], -1)
        out[head] = (scores.softmax(-1)[:, -length:] @ v).to(query.dtype)
    return out
