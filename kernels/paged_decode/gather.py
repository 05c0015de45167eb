"""Torch only, any device: gather the keys of the selected pages of every token and batch the products."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ragged import RaggedKV

if TYPE_CHECKING:
    from . import PageSelection

#: Elements of gathered keys held at once.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}


def forward(query: Tensor, kv: RaggedKV, selection: PageSelection, scale: float, softcap: float | None) -> Tensor:
    """See `paged_decode`. Scores and softmax in fp32 (fp64 for fp64 input), values in the input dtype."""
    sequences, group, steps, dim = query.shape
    size, (_, lists, _, width) = selection.page_size, selection.pages.shape
    device = query.device
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    starts, lengths = (torch.tensor(values, device=device)[:, None, None, None] for values in (kv.starts, kv.lengths))
    within = torch.arange(size, device=device)
    out = query.new_empty(sequences, group, steps, kv.values.shape[-1])
    limit = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])
    per_step = max(1, lists * width * size * dim)
    some = max(1, min(sequences, limit // per_step))
    chunk = max(1, limit // (some * per_step))
    for low, first in itertools.product(range(0, sequences, some), range(0, steps, chunk)):
        own, part = slice(low, low + some), slice(first, min(first + chunk, steps))
        q, pages, counts = query[own, :, part], selection.pages[own, :, part].long(), selection.counts[own, :, part]
        listed = torch.arange(width, device=device) < counts[..., None]
        position = (pages[..., None] * size + within).flatten(-2)
        visible = lengths[own] - steps + 1 + torch.arange(part.start, part.stop, device=device)[:, None]
        seen = (position < visible) & listed.repeat_interleave(size, -1)
        index = starts[own] + torch.where(seen, position, 0)
        key, value = kv.keys[index], kv.values[index]  # (S, Gs, T, n, D)
        # One list for the group: its query heads are the rows of one product. Lists of their own: one row each.
        rows = q.transpose(1, 2)[:, None] if lists == 1 else q.unsqueeze(3)
        scores = rows.to(work) @ key.to(work).transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen.unsqueeze(3), float("-inf")).softmax(-1).to(value.dtype)
        found = weights @ value
        out[own, :, part] = found[:, 0].transpose(1, 2) if lists == 1 else found.squeeze(3)
    return out
