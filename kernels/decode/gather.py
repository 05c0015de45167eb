"""Torch only, any device: the keys of each token's pages are gathered, all keys of a sequence are read where they lie.

One row at a time. On the CPU a product over several rows may give one of them another last bit than its own product
does (so does SDPA: which thread computes a problem decides how its buffers are aligned), and the output of a row must
not depend on what else is in the call.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Extra, RaggedKV, Reads
from .naive import width_of


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
    """See `paged_decode`. Scores and softmax in fp32 (fp64 for fp64 input), values in the input dtype.

    Asking for `lse` takes a product of its own, so that the output keeps its bits.
    """
    if kv.shared:
        return _copied(query, kv, selection, scale, softcap, window, lse, sink)
    if selection is not None and (selection.bias is not None or selection.extra is not None):
        out = query.new_zeros(*query.shape[:3], kv.values.shape[-1])
        _weighed(query, kv, selection, scale, softcap, None, out, lse, sink)
        return out
    if lse is not None:
        _weighed(query, kv, selection, scale, softcap, window, None, lse)
    own = None if sink is None else sink.view(kv.heads, -1)
    if selection is None and query.shape[2] == 1 and len(query):
        rows = [_dense_row(query[row, :, 0], kv, row, even, 0, window, scale, softcap, own) for row, even in kv.rows()]
        return torch.cat(rows)[:, :, None]
    out = query.new_zeros(*query.shape[:3], kv.values.shape[-1])
    if selection is not None:
        _paged(query, kv, selection, scale, softcap, out, own)
    else:
        _dense(query, kv, scale, softcap, window, out, own)
    return out


def _copied(
    query: Tensor,
    kv: RaggedKV,
    selection: Reads | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    lse: Tensor | None,
    sink: Tensor | None,
) -> Tensor:
    """Sequences that share their beginnings: those of a row after each other, each first copied into one piece."""
    found = []
    for first in range(0, len(query), kv.heads):
        own = slice(first, first + kv.heads)
        mine = None if selection is None else selection.part(own)
        logs = None if lse is None else lse[own]
        found.append(forward(query[own], kv.part(own).copied(), mine, scale, softcap, window, logs, sink))
    return torch.cat(found) if found else query.new_zeros(*query.shape[:3], kv.values.shape[-1])


def _paged(
    query: Tensor,
    kv: RaggedKV,
    selection: Reads,
    scale: float,
    softcap: float | None,
    out: Tensor,
    sink: Tensor | None,
) -> None:
    group, steps = query.shape[1:3]
    size, lists = selection.unit, selection.ids.shape[1]
    counts = selection.keys_read(kv).tolist()
    rows = kv.rows()
    for t in range(steps):
        most = max((sequence[g][t] for sequence in counts for g in range(lists)), default=0)
        key_at = torch.arange(most, device=query.device)
        pages = selection.ids[:, :, t].long()
        # Only the last listed page may be partial, so the keys that are read are the first ones of what is listed.
        index = kv.starts[:, None, None] + pages[..., key_at // size] * size + key_at % size
        visible = (kv.lengths - steps + 1 + t).tolist()
        for own, even in rows:
            read = [[sequence[g][t] for g in range(lists)] for sequence in counts[own]]
            if all(part == [end] * lists for part, end in zip(read, visible[own], strict=True)):
                # All keys for all heads: the very product that dense attention makes.
                earlier = steps - 1 - t
                out[own, :, t] = _dense_row(query[own, :, t], kv, own, even, earlier, None, scale, softcap, sink)
                continue
            # Lists of one length are one product with a problem for each list; a list of the group's has all its
            # query heads for rows.
            heads = query[own, :, t].unflatten(1, (lists, -1))  # (h, Gs, rows, D)
            sinks = None if sink is None else sink.unflatten(1, (lists, -1))
            numbers = {number for part in read for number in part}
            if numbers == {0}:
                continue
            if len(numbers) == 1:
                at = index[own, :, : read[0][0]].reshape(-1)
                shape = (-1, read[0][0])
                key, value = (held.index_select(0, at).view(*shape, held.shape[-1]) for held in (kv.keys, kv.values))
                both = None if sinks is None else sinks.flatten(0, 1)
                found = _attend(heads.flatten(0, 1), key, value, scale, softcap, sink=both)
                out[own, :, t] = found.view(-1, group, found.shape[-1])
                continue
            for s, part in enumerate(read):
                for g, number in enumerate(part):
                    if number > 0:
                        at = index[own][s, g, :number]
                        key, value = (held.index_select(0, at)[None] for held in (kv.keys, kv.values))
                        mine = None if sinks is None else sinks[s, g][None]
                        found = _attend(heads[s, g][None], key, value, scale, softcap, sink=mine)[0]
                        out[own, :, t].unflatten(1, (lists, -1))[s, g] = found


def _weighed(
    query: Tensor,
    kv: RaggedKV,
    selection: Reads | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    out: Tensor | None,
    lse: Tensor | None,
    sink: Tensor | None = None,
) -> None:
    """Outputs with biases and virtual keys, and logarithms of sums, one list at a time."""
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    group, steps = query.shape[1:3]
    lists = 1 if selection is None else selection.ids.shape[1]
    extra = None if selection is None else selection.extra
    if lse is not None:
        lse.fill_(float("-inf"))
    read = None if selection is None else selection.keys_read(kv).tolist()
    table = zip(kv.starts.tolist(), kv.lengths.tolist(), strict=True)
    for s, (start, length) in enumerate(table):
        for g, t in itertools.product(range(lists if length else 0), range(steps)):
            rows = slice(g, g + 1) if lists > 1 else slice(0, group)
            # Copies, here and below: where a tensor lies in memory may decide the last bits of a product.
            heads = query[s, rows, t].to(work, copy=True)
            if selection is None:
                end = length - steps + 1 + t
                at = torch.arange(0 if window is None else max(0, end - window), end, device=query.device)
            elif read[s][g][t] < 1:
                continue
            else:
                # Only the last listed page may be partial.
                place = torch.arange(read[s][g][t], device=query.device)
                page = place // selection.unit
                at = selection.ids[s, g, t].long()[page] * selection.unit + place % selection.unit
            key = kv.keys.index_select(0, start + at).to(work)
            scores = _capped(heads @ key.T * scale, softcap)
            if selection is not None and selection.bias is not None:
                scores = scores + selection.bias[s, g, t].to(work)[page]
            if extra is not None:
                scores = torch.cat([scores, _virtual_scores(heads, extra, s, rows, t, scale, softcap)], -1)
            total = scores.logsumexp(-1)
            if lse is not None:
                lse[s, rows, t] = total.to(lse.dtype)
            if out is None:
                continue
            value = kv.values.index_select(0, start + at)
            if extra is not None:
                value = torch.cat([value, extra.values[s]])
            if sink is not None:  # one more key, of value 0
                mine = sink.view(kv.heads, -1)[s % kv.heads, rows, None].to(work)
                scores, value = torch.cat([scores, mine], -1), torch.cat([value, torch.zeros_like(value[:1])])
            # Where biases hide all that is listed the output is 0.
            weights = torch.where(total[:, None] > float("-inf"), scores.softmax(-1), 0.0)
            out[s, rows, t] = weights.to(value.dtype) @ value


def _virtual_scores(
    heads: Tensor, extra: Extra, s: int, rows: slice, t: int, scale: float, softcap: float | None
) -> Tensor:
    """`(r, E)` scores of the virtual keys of a sequence for some of its query heads."""
    scores = heads.new_zeros(len(heads), extra.values.shape[1])
    if extra.keys is not None:
        scores = _capped(heads @ extra.keys[s].to(heads.dtype, copy=True).T * scale, softcap)
    if extra.bias is not None:
        scores = scores + extra.bias[s, rows if extra.bias.shape[1] > 1 else slice(0, 1), t].to(heads.dtype)
    return scores


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def mass(
    query: Tensor, kv: RaggedKV, selection: Reads | None, lse: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """See `decode.mass`. Shapes follow from those of the arguments: a device is not waited for.

    Products are added up dimension by dimension: the bits of a matrix product could follow from how long the lists of
    other sequences are.
    """
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    sequences, group, steps, _ = query.shape
    out = lse.new_zeros(sequences, group, steps, width_of(kv, selection))
    if not len(kv.keys):
        return out
    place = torch.arange(out.shape[-1], device=query.device)
    visible = kv.visible(steps)
    lists = 1 if selection is None else selection.ids.shape[1]
    for s, g, t in itertools.product(range(sequences), range(lists), range(steps)):
        at, held = place, kv.lengths[s] > 0
        if selection is not None:
            page = place // selection.unit
            at = selection.ids[s, g, t].long()[page] * selection.unit + place % selection.unit
            held = held & (page < selection.counts[s, g, t])
        held = held & (at >= 0) & (at < visible[s, t])
        key = kv.keys[torch.where(held, kv.starts[s] + at, 0)].to(work)
        for head in (g,) if lists > 1 else range(group):
            scores = _capped((key * query[s, head, t].to(work)).sum(-1) * scale, softcap)
            if selection is not None and selection.bias is not None:
                scores = scores + selection.bias[s, g, t].to(work)[page]
            total = lse[s, head, t]
            seen = held & (total > float("-inf"))
            out[s, head, t] = torch.where(seen, torch.exp(scores - total), 0.0)
    return out


def _dense(
    query: Tensor,
    kv: RaggedKV,
    scale: float,
    softcap: float | None,
    window: int | None,
    out: Tensor,
    sink: Tensor | None,
) -> None:
    group, steps = query.shape[1:3]
    for s, (start, length) in enumerate(zip(kv.starts.tolist(), kv.lengths.tolist(), strict=True)):
        if not length:
            continue
        visible = length - steps + 1
        first = 0 if window is None else max(0, visible - window)
        key, value = (held[None, start + first : start + length] for held in (kv.keys, kv.values))
        # All tokens at once, and a mask.
        place = torch.arange(first, length, device=query.device)
        ends = visible + torch.arange(steps, device=query.device)[:, None]
        hidden = place >= ends
        if window is not None:
            hidden |= place < ends - window
        # The queries of a group are the rows of one product: keys and values are read once, nothing is repeated.
        mine = None if sink is None else sink[s % kv.heads].repeat_interleave(steps)[None]
        found = _attend(query[s].flatten(0, 1)[None], key, value, scale, softcap, hidden.repeat(group, 1), mine)
        out[s] = found[0].unflatten(0, (group, steps))


def _dense_row(
    query: Tensor,
    kv: RaggedKV,
    row: slice,
    even: tuple[int, int, int] | None,
    behind: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    sink: Tensor | None = None,
) -> Tensor:
    """One token of one row, `(h, G, D)`, to all keys but the last `behind` ones: at once where its heads are alike.

    `sink`: `(h, G)` or None.
    """
    if even is None:
        sinks = [None] * len(query) if sink is None else sink[:, None]
        parts = zip(query, kv.starts[row].tolist(), kv.lengths[row].tolist(), sinks, strict=True)
        return torch.cat([
            _dense_row(q[None], kv, row, (start, 0, n), behind, window, scale, softcap, own)
            for q, start, n, own in parts
        ])  # fmt: skip
    start, apart, length = even
    if length <= behind:
        return query.new_zeros(*query.shape[:2], kv.values.shape[-1])
    first = 0 if window is None else max(0, length - behind - window)
    shape = len(query), length - behind - first
    key, value = (_strided(held, shape, start + first, apart) for held in (kv.keys, kv.values))
    return _attend(query, key, value, scale, softcap, sink=sink)


def _strided(held: Tensor, shape: tuple[int, int], start: int, apart: int) -> Tensor:
    """`(h, n, D)`: `shape` keys from `start` on, those of heads `apart` from each other."""
    dim = held.shape[1]
    return held.as_strided((*shape, dim), (apart * dim, dim, 1), held.storage_offset() + start * dim)


def _attend(
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    hidden: Tensor | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Attention of `(p, r, D)` to `(p, n, D)`, for p problems, but for the pairs that are `hidden`, `(r, n)`.

    `sink`: `(p, r)`, or None.
    """
    if softcap is None and hidden is None and sink is None and key.shape[-1] == value.shape[-1]:
        return F.scaled_dot_product_attention(rows[None], key[None], value[None], scale=scale)[0]
    work = torch.float64 if rows.dtype == torch.float64 else torch.float32
    # In half precision the product itself would round the scores before the softmax.
    scores = _capped(rows.to(work) @ key.to(work).transpose(-1, -2) * scale, softcap)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if sink is not None:  # one more key, of value 0
        scores = torch.cat([sink[..., None].to(work), scores], -1)
    return scores.softmax(-1)[..., -key.shape[-2] :].to(value.dtype) @ value
