"""Compaction in torch: one copy per head. It waits for counts that are on a GPU. And what it takes, checked."""

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


def check_kept(indices: Tensor, counts: Tensor, total: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `check_kept` of the package. The mended lists of a faulty selection are as those of the Triton version."""
    heads, width = indices.shape
    uncountable = (counts < 1) | (counts > min(width, length))
    miscounted = ~uncountable.any() & (counts.sum() != total)
    place = torch.arange(width, device=indices.device)
    valid = place < counts[:, None]
    outside = (indices < 0) | (indices >= length)
    unordered = (indices[:, 1:] <= indices[:, :-1]) & valid[:, 1:]
    bits = uncountable.int() | (miscounted.int() << 1) | ((outside & valid).any(1).int() << 2)
    bits |= unordered.any(1).int() << 3
    even = total // heads + (torch.arange(heads, device=counts.device) < total % heads)
    mended = torch.where(uncountable.any() | miscounted, even.to(counts.dtype), counts)
    return torch.where(bits.any(), indices.clamp(0, length - 1), indices), mended, bits.int()
