"""The oracle: decode attention written with a mask over all keys of a sequence, in the widest precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..types import RaggedKV

if TYPE_CHECKING:
    from . import Reads


def forward(
    query: Tensor,
    kv: RaggedKV,
    selection: Reads | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """See `paged_decode`. Scores are computed in fp64 for fp64 input, else in fp32."""
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    sequences, group, steps, _ = query.shape
    out = query.new_zeros(*query.shape[:3], kv.values.shape[-1])
    starts, lengths = kv.starts.tolist(), kv.lengths.tolist()
    for s in range(sequences):
        if not lengths[s]:
            continue
        part = slice(starts[s], starts[s] + lengths[s])
        key, value = kv.keys[part].to(work), kv.values[part].to(work)
        place = torch.arange(lengths[s], device=query.device)
        for g in range(group):
            for t in range(steps):
                visible = lengths[s] - steps + 1 + t
                seen = place < visible
                if window is not None:
                    seen &= place >= visible - window
                if selection is not None:
                    own = g if selection.ids.shape[1] == group else 0
                    listed = selection.ids[s, own, t, : selection.counts[s, own, t]]
                    seen &= torch.isin(place // selection.unit, listed.long())
                scores = key @ query[s, g, t].to(work) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
                out[s, g, t] = (weights @ value).to(query.dtype)
    return out
