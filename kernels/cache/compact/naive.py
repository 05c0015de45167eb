"""Compaction in torch: one copy per head. It waits for counts that are on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    starts: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
) -> None:
    for head, (count, start) in enumerate(zip(counts.tolist(), starts.tolist(), strict=True)):
        for states, out in ((keys, out_keys), (values, out_values)):
            torch.index_select(states[head], 0, indices[head, :count], out=out[start : start + count])
