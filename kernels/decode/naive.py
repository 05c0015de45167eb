"""The oracle: decode attention written with a mask over all keys of a sequence, in the widest precision."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..types import Extra, RaggedKV, Reads


def forward(
    query: Tensor,
    kv: RaggedKV,
    selection: Reads | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    lse: Tensor | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """See `paged_decode`. Scores are computed in fp64 for fp64 input, else in fp32."""
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    sequences, group, steps, _ = query.shape
    out = query.new_zeros(*query.shape[:3], kv.values.shape[-1])
    if lse is not None:
        lse.fill_(float("-inf"))
    extra = None if selection is None else selection.extra
    kv = kv.copied() if kv.shared else kv
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
                if selection is not None and selection.bias is not None:
                    added = scores.new_zeros(-(-lengths[s] // selection.unit))
                    added[listed.long()] = selection.bias[s, own, t, : len(listed)].to(work)
                    scores = scores + added[place // selection.unit]
                scores, read = scores.masked_fill(~seen, float("-inf")), value
                if extra is not None:
                    scores = torch.cat([scores, _virtual_scores(query, extra, s, g, t, scale, softcap, work)])
                    read = torch.cat([value, extra.values[s].to(work)])
                total = scores.logsumexp(-1)
                if lse is not None:
                    lse[s, g, t] = total
                if sink is not None:  # one more key, of value 0
                    scores = torch.cat([scores, sink[s % kv.heads * group + g, None].to(work)])
                    read = torch.cat([read, read.new_zeros(1, read.shape[-1])])
                if total > float("-inf"):  # else the biases hide all that is listed
                    out[s, g, t] = (scores.softmax(-1) @ read).to(query.dtype)
    return out


def _virtual_scores(
    query: Tensor, extra: Extra, s: int, g: int, t: int, scale: float, softcap: float | None, work: torch.dtype
) -> Tensor:
    """`(E,)` scores of the virtual keys of a sequence."""
    scores = torch.zeros(extra.values.shape[1], dtype=work, device=query.device)
    if extra.keys is not None:
        scores = extra.keys[s].to(work) @ query[s, g, t].to(work) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
    if extra.bias is not None:
        scores = scores + extra.bias[s, g if extra.bias.shape[1] > 1 else 0, t].to(work)
    return scores


def mass(
    query: Tensor, kv: RaggedKV, selection: Reads | None, lse: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """See `decode.mass`."""
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    sequences, group, steps, _ = query.shape
    out = lse.new_zeros(sequences, group, steps, width_of(kv, selection))
    starts, lengths = kv.starts.tolist(), kv.lengths.tolist()
    for s, g, t in itertools.product(range(sequences), range(group), range(steps)):
        if not lengths[s]:
            continue
        visible = lengths[s] - steps + 1 + t
        place = torch.arange(visible, device=query.device)
        if selection is not None:
            own = g if selection.ids.shape[1] == group else 0
            listed = selection.ids[s, own, t, : selection.counts[s, own, t]].long()
            place = (listed[:, None] * selection.unit + torch.arange(selection.unit, device=query.device)).flatten()
            place = place[place < visible]  # of the last page
        scores = kv.keys[starts[s] + place].to(work) @ query[s, g, t].to(work) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if selection is not None and selection.bias is not None:
            bias = selection.bias[s, own, t, : len(listed)].to(work)
            scores = scores + bias.repeat_interleave(selection.unit)[: len(place)]
        if lse[s, g, t] > float("-inf"):
            out[s, g, t, : len(place)] = torch.exp(scores - lse[s, g, t])
    return out


def width_of(kv: RaggedKV, selection: Reads | None) -> int:
    """Places for keys of a token in `mass`."""
    return kv.longest if selection is None else selection.ids.shape[-1] * selection.unit
