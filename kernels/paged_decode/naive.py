"""The oracle: paged decode written with a mask over all keys of a sequence, in the widest precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ragged import RaggedKV

if TYPE_CHECKING:
    from . import PageSelection


def forward(query: Tensor, kv: RaggedKV, selection: PageSelection, scale: float, softcap: float | None) -> Tensor:
    """See `paged_decode`. Scores are computed in fp64 for fp64 input, else in fp32."""
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    sequences, group, steps, _ = query.shape
    own = selection.pages.shape[1] == group
    out = query.new_empty(*query.shape[:3], kv.values.shape[-1])
    for s in range(sequences):
        part = slice(kv.starts[s], kv.starts[s] + kv.lengths[s])
        key, value = kv.keys[part].to(work), kv.values[part].to(work)
        page_of = torch.arange(kv.lengths[s], device=query.device) // selection.page_size
        for g in range(group):
            for t in range(steps):
                listed = selection.pages[s, g if own else 0, t, : selection.counts[s, g if own else 0, t]]
                seen = torch.isin(page_of, listed.long())
                seen[kv.lengths[s] - steps + 1 + t :] = False
                scores = key @ query[s, g, t].to(work) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
                out[s, g, t] = (weights @ value).to(query.dtype)
    return out
