"""Torch only, any device: the keys of each token's pages are gathered, all keys of a sequence are read where they lie.

One product at a time. On the CPU a product over several sequences may give one of them another last bit than its own
product does (so does SDPA: which thread computes a problem decides how its buffers are aligned), and an output must not
depend on what else is in the call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ragged import RaggedKV

if TYPE_CHECKING:
    from . import PageSelection


def forward(
    query: Tensor,
    kv: RaggedKV,
    selection: PageSelection | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """See `paged_decode`. Scores and softmax in fp32 (fp64 for fp64 input), values in the input dtype."""
    out = query.new_zeros(*query.shape[:3], kv.values.shape[-1])
    if selection is not None:
        _paged(query, kv, selection, scale, softcap, out)
    else:
        _dense(query, kv, scale, softcap, window, out)
    return out


def _paged(
    query: Tensor, kv: RaggedKV, selection: PageSelection, scale: float, softcap: float | None, out: Tensor
) -> None:
    steps, size, lists = query.shape[2], selection.page_size, selection.pages.shape[1]
    # One list for the group: its query heads are the rows of one product. Lists of their own: one row each.
    rows, outs = (states.unflatten(1, (lists, -1)).transpose(2, 3) for states in (query, out))  # (S, Gs, T, rows, D)
    counts, starts, lengths = selection.keys_read(kv).tolist(), kv.starts.tolist(), kv.lengths.tolist()
    for t in range(steps):
        most = max((row[t] for sequence in counts for row in sequence), default=0)
        key_at = torch.arange(most, device=query.device)
        pages = selection.pages[:, :, t].long()
        # Only the last listed page may be partial, so the keys that are read are the first ones of what is listed.
        index = kv.starts[:, None, None] + pages[..., key_at // size] * size + key_at % size
        for s, sequence in enumerate(counts):
            start, length = starts[s], lengths[s]
            visible = length - steps + 1 + t
            if length and all(row[t] == visible for row in sequence):
                # All keys for all heads: the very product that dense attention makes.
                key, value = (held[start : start + visible] for held in (kv.keys, kv.values))
                out[s, :, t] = _attend(query[s, :, t], key, value, scale, softcap)
                continue
            for g, row in enumerate(sequence):
                if row[t]:
                    key, value = (held.index_select(0, index[s, g, : row[t]]) for held in (kv.keys, kv.values))
                    outs[s, g, t] = _attend(rows[s, g, t], key, value, scale, softcap)


def _dense(query: Tensor, kv: RaggedKV, scale: float, softcap: float | None, window: int | None, out: Tensor) -> None:
    group, steps = query.shape[1:3]
    for s, (start, length) in enumerate(zip(kv.starts.tolist(), kv.lengths.tolist(), strict=True)):
        if not length:
            continue
        visible = length - steps + 1
        first = 0 if window is None else max(0, visible - window)
        key, value = (held[start + first : start + length] for held in (kv.keys, kv.values))
        hidden = None
        if steps > 1:  # all tokens at once, and a mask
            place = torch.arange(first, length, device=query.device)
            ends = visible + torch.arange(steps, device=query.device)[:, None]
            hidden = place >= ends
            if window is not None:
                hidden |= place < ends - window
            hidden = hidden.repeat(group, 1)
        # The queries of a group are the rows of one product: keys and values are read once, nothing is repeated.
        found = _attend(query[s].flatten(0, 1), key, value, scale, softcap, hidden)
        out[s] = found.unflatten(0, (group, steps))


def _attend(
    rows: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, hidden: Tensor | None = None
) -> Tensor:
    """Attention of `(r, D)` to `(n, D)`, but for the pairs that are `hidden`, `(r, n)`."""
    if softcap is None and hidden is None and key.shape[-1] == value.shape[-1]:
        states = (state[None, None] for state in (rows, key, value))
        return F.scaled_dot_product_attention(*states, scale=scale)[0, 0]
    work = torch.float64 if rows.dtype == torch.float64 else torch.float32
    # In half precision the product itself would round the scores before the softmax.
    scores = rows.to(work) @ key.to(work).T * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1).to(value.dtype) @ value
