"""Torch only, any device: gather the keys of the selected pages of every token and batch the products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ragged import RaggedKV

if TYPE_CHECKING:
    from . import PageSelection

#: Elements of gathered keys held at once.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}


def forward(query: Tensor, kv: RaggedKV, selection: PageSelection, scale: float, softcap: float | None) -> Tensor:
    """See `paged_decode`. Products run in the input dtype, the softmax in fp32 (fp64 for fp64 input)."""
    sequences, group, steps, dim = query.shape
    size, (_, lists, _, width) = selection.page_size, selection.pages.shape
    device = query.device
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    starts, lengths = (torch.tensor(values, device=device)[:, None, None, None] for values in (kv.starts, kv.lengths))
    within = torch.arange(size, device=device)
    out = query.new_empty(sequences, group, steps, kv.values.shape[-1])
    limit = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])
    chunk = max(1, limit // max(1, sequences * lists * width * size * dim))
    for first in range(0, steps, chunk):
        part = slice(first, min(first + chunk, steps))
        tokens = part.stop - part.start
        pages, counts = selection.pages[:, :, part].long(), selection.counts[:, :, part]
        listed = torch.arange(width, device=device) < counts[..., None]
        position = (pages[..., None] * size + within).flatten(-2)
        visible = lengths - steps + 1 + torch.arange(part.start, part.stop, device=device)[:, None]
        seen = (position < visible) & listed.repeat_interleave(size, -1)
        index = starts + torch.where(seen, position, 0)
        key, value = kv.keys[index], kv.values[index]  # (S, Gs, T, n, D)
        # One list for the group: its query heads are the rows of one product. Lists of their own: one row each.
        rows = query[:, :, part].transpose(1, 2)[:, None] if lists == 1 else query[:, :, part].unsqueeze(3)
        scores = (rows @ key.transpose(-1, -2)).to(work) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen.unsqueeze(3), float("-inf")).softmax(-1).to(value.dtype)
        found = weights @ value
        out[:, :, part] = found[:, 0].transpose(1, 2) if lists == 1 else found.reshape(sequences, group, tokens, -1)
    return out
