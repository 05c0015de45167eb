"""Bounds of pages, and scores from them, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...types import PageBounds, RaggedKV


def update(kv: RaggedKV, bounds: PageBounds, before: Tensor) -> None:
    """See `page_bounds.update_bounds`. It waits for lengths that are on a GPU."""
    size = bounds.page_size
    touched = -(-kv.lengths // size) - before // size
    most = max(touched.tolist(), default=0)
    if most <= 0:
        return
    if most <= 2 or kv.shared:  # decoding: all sequences at once
        some = touched > 0
        begin, end = (part.clamp(min=0).long() for part in (before, kv.lengths))
        # A sequence that touches fewer pages than others does its last one again.
        page = torch.minimum(begin[:, None] // size + torch.arange(most, device=end.device), (end[:, None] - 1) // size)
        token = page[..., None] * size + torch.arange(size, device=end.device)
        # Behind the end the last key is read again, which changes no bound.
        found = kv.keys[kv.at(torch.minimum(token, end[:, None, None] - 1))[some]]
        row = bounds.rows(kv, page)[some]
        bounds.low[row], bounds.high[row] = found.amin(2), found.amax(2)
        return
    tables = (part.tolist() for part in (kv.starts, bounds.first, before, kv.lengths))
    for start, first, begin, end in zip(*tables, strict=True):
        page = begin // size
        keys = kv.keys[start + page * size : start + end]
        whole, row = len(keys) // size, first + page
        if whole:
            paged = keys[: whole * size].unflatten(0, (whole, size))
            torch.amin(paged, 1, out=bounds.low[row : row + whole])
            torch.amax(paged, 1, out=bounds.high[row : row + whole])
        if len(keys) % size:
            bounds.low[row + whole] = keys[whole * size :].amin(0)
            bounds.high[row + whole] = keys[whole * size :].amax(0)


def scores(query: Tensor, bounds: PageBounds, kv: RaggedKV, shared: bool, pages: int) -> Tensor:
    """See `page_bounds.page_scores`. It waits for lengths that are on a GPU."""
    # Where q_d is positive the largest product is with the upper bound, elsewhere with the lower one. So the sum over
    # a group is two products with two sums of queries.
    positive, negative = query.float().clamp(min=0), query.float().clamp(max=0)
    if shared:
        positive, negative = positive.sum(1, keepdim=True), negative.sum(1, keepdim=True)
    out = positive.new_full((*positive.shape[:3], pages), float("-inf"))
    if bounds.tails is not None:
        _scores_of_shared(positive, negative, bounds, kv, out)
        return out
    firsts, lengths = bounds.first.tolist(), kv.lengths.tolist()
    # One product for all heads of a row where they are alike: none may depend on other rows.
    for begin in range(0, len(lengths), kv.heads):
        row = slice(begin, begin + kv.heads)
        apart = firsts[begin + 1] - firsts[begin] if kv.heads > 1 else 0
        steps = {b - a for a, b in zip(firsts[row], firsts[row][1:], strict=False)}
        together = len(set(lengths[row])) == 1 and steps <= {apart} and apart >= 0
        for some in [row] if together else [slice(s, s + 1) for s in range(row.start, row.stop)]:
            complete = max(lengths[some.start] - 1, 0) // bounds.page_size
            dim = bounds.low.shape[-1]
            shape, strides = (some.stop - some.start, complete, dim), (apart * dim, dim, 1)
            low, high = (
                bound.as_strided(shape, strides, bound.storage_offset() + firsts[some.start] * dim).float()
                for bound in (bounds.low, bounds.high)
            )
            plus, minus = (part[some].flatten(1, 2) for part in (positive, negative))
            found = plus @ high.transpose(1, 2) + minus @ low.transpose(1, 2)
            out[some, ..., :complete] = found.unflatten(1, positive.shape[1:3])
    return out


def _scores_of_shared(positive: Tensor, negative: Tensor, bounds: PageBounds, kv: RaggedKV, out: Tensor) -> None:
    """Scores of sequences that share their beginnings, whose bounds are first copied into one piece."""
    for s, length in enumerate(kv.lengths.tolist()):
        complete = max(length - 1, 0) // bounds.page_size
        page = torch.arange(complete, device=out.device)[None]
        row = bounds.part(slice(s, s + 1)).rows(kv.part(slice(s, s + 1)), page)[0]
        plus, minus = positive[s].flatten(0, 1), negative[s].flatten(0, 1)
        found = plus @ bounds.high[row].float().T + minus @ bounds.low[row].float().T
        out[s, ..., :complete] = found.unflatten(0, positive.shape[1:3])
