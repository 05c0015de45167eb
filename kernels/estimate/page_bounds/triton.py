"""Bounds of pages, and scores from them, in Triton. Both are one pass over memory, each byte read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...types import PageBounds, RaggedKV

#: Bytes of a token of all pages that a program of `update` reads at once, and its warps: 16 bytes a thread.
UPDATE_BYTES, UPDATE_WARPS = 1 << 11, 4
#: Bytes of each bound that a program of `scores` reads, and its warps.
SCORE_BYTES, SCORE_WARPS = 1 << 14, 4


def update(kv: RaggedKV, bounds: PageBounds, before: Tensor) -> None:
    """See `page_bounds.update_bounds`."""
    dim, size = kv.keys.shape[1], bounds.page_size
    padded = triton.next_power_of_2(dim)
    tile = max(1, UPDATE_BYTES // (padded * kv.keys.element_size()))
    if not kv.longest or not len(kv.lengths):
        return
    _update_kernel[(triton.cdiv(kv.longest, tile * size), len(kv.lengths))](
        kv.keys,
        bounds.low,
        bounds.high,
        kv.starts,
        kv.lengths,
        bounds.first,
        before,
        kv.tails,
        kv.splits,
        bounds.tails,
        SIZE=size,
        TILE=tile,
        DIM=dim,
        PADDED=padded,
        WORK=tl.float64 if kv.keys.dtype == torch.float64 else tl.float32,
        num_warps=UPDATE_WARPS,
    )


def scores(query: Tensor, bounds: PageBounds, kv: RaggedKV, shared: bool, pages: int) -> Tensor:
    """`bounds.page_scores`."""
    sequences, group, steps, dim = query.shape
    if dim > 1 and query.stride(3) != 1:
        query = query.contiguous()
    out = torch.empty(sequences, 1 if shared else group, steps, pages, dtype=torch.float32, device=query.device)
    if not out.numel():
        return out
    padded = triton.next_power_of_2(dim)
    tile = max(16, SCORE_BYTES // (padded * query.element_size()))
    _scores_kernel[(triton.cdiv(pages, tile), sequences)](
        query,
        bounds.low,
        bounds.high,
        out,
        kv.lengths,
        bounds.first,
        bounds.tails,
        kv.splits,
        pages,
        steps,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        SHARED=shared,
        GROUP=group,
        SIZE=bounds.page_size,
        TILE=tile,
        DIM=dim,
        PADDED=padded,
        num_warps=SCORE_WARPS,
        # As where pages are chosen together with their scores: whichever way a batch goes, a row gets the same.
        enable_fp_fusion=False,
    )
    return out


@triton.jit
def _update_kernel(
    keys,
    low,
    high,
    starts,
    lengths,
    first_rows,
    before,
    tails,
    splits,
    tail_rows,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    WORK: tl.constexpr,
):
    """One program: `TILE` pages of one sequence. A thread sees all tokens of a page, in some of the dimensions."""
    TOGETHER: tl.constexpr = 16 if SIZE > 16 else SIZE
    sequence = tl.program_id(1)
    length = tl.load(lengths + sequence)
    first = tl.load(before + sequence) // SIZE + tl.program_id(0) * TILE
    if first * SIZE < length:
        page, dims = first + tl.arange(0, TILE), tl.arange(0, PADDED)
        start = tl.load(starts + sequence)
        row = tl.load(first_rows + sequence) + page
        if tails is not None:
            tail, split = tl.load(tails + sequence), tl.load(splits + sequence)
            row = tl.where(page * SIZE < split, row, tl.load(tail_rows + sequence) + page)
        source = keys + dims[None, :]
        inside = (dims < DIM)[None, :]
        smallest = tl.full((TILE, PADDED), float("inf"), WORK)
        largest = tl.full((TILE, PADDED), float("-inf"), WORK)
        for some in range(0, SIZE, TOGETHER):
            for place in tl.static_range(TOGETHER):
                # Behind the end the last key is read again, which changes no bound.
                token = tl.minimum(page * SIZE + some + place, length - 1).to(tl.int64)
                held = start + token
                if tails is not None:
                    held = tl.where(token < split, held, tail + token)
                found = tl.load(source + (held * DIM)[:, None], mask=inside, other=0.0).to(WORK)
                smallest, largest = tl.minimum(smallest, found), tl.maximum(largest, found)
        target = (row * DIM)[:, None] + dims[None, :]
        mask = (page * SIZE < length)[:, None] & inside
        tl.store(low + target, smallest, mask=mask)
        tl.store(high + target, largest, mask=mask)


@triton.jit
def load_bounds(low, high, first, tail, split, ids, complete, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Both bounds `(len(ids), PADDED)` of pages `ids` of a sequence: page p is row `first + p`, or `tail + p` from page
    `split` on."""
    dims = tl.arange(0, PADDED)
    # Behind the last complete page it is read again.
    page = tl.minimum(ids, complete - 1)
    place = tl.where(page < split, first + page, tail + page) * DIM
    place = place[:, None] + dims[None, :]
    smallest = tl.load(low + place, mask=(dims < DIM)[None, :], other=0.0)
    largest = tl.load(high + place, mask=(dims < DIM)[None, :], other=0.0)
    return smallest, largest


@triton.jit
def signed_sums(query, query_head, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Sums over the query heads of the positive and of the negative entries, from which all heads' bounds follow."""
    dims = tl.arange(0, PADDED)
    positive = tl.zeros((PADDED,), tl.float32)
    negative = tl.zeros((PADDED,), tl.float32)
    for head in tl.static_range(GROUP):
        q = tl.load(query + head * query_head + dims, mask=dims < DIM, other=0.0).to(tl.float32)
        positive += tl.maximum(q, 0.0)
        negative += tl.minimum(q, 0.0)
    return positive, negative


@triton.jit
def summed_scores(smallest, largest, positive, negative):
    """The score of each page, summed over the query heads."""
    return tl.sum(largest.to(tl.float32) * positive[None, :] + smallest.to(tl.float32) * negative[None, :], 1)


# A number that changes with the length is not specialised on: each kind of it would compile anew.
@triton.jit(do_not_specialize=["pages"])
def _scores_kernel(
    query,
    low,
    high,
    scores,
    lengths,
    first_rows,
    tail_rows,
    splits,
    pages,
    steps,
    query_sequence,
    query_head,
    query_token,
    SHARED: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One program: the scores of `TILE` pages of one sequence, whose bounds stay in registers for all queries."""
    sequence = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + sequence)
    complete = tl.minimum(tl.maximum(length - 1, 0) // SIZE, pages)
    start = tl.program_id(0) * TILE
    if start < complete:
        ids = start + tl.arange(0, TILE)
        first = tl.load(first_rows + sequence)
        tail, split = first, 0
        if tail_rows is not None:
            tail, split = tl.load(tail_rows + sequence), tl.load(splits + sequence) // SIZE
        smallest, largest = load_bounds(low, high, first, tail, split, ids, complete, DIM, PADDED)
        query += sequence * query_sequence
        scores += sequence * (1 if SHARED else GROUP) * steps * pages
        if SHARED:
            for _ in range(steps):
                positive, negative = signed_sums(query, query_head, GROUP, DIM, PADDED)
                tl.store(scores + ids, summed_scores(smallest, largest, positive, negative), mask=ids < complete)
                query += query_token
                scores += pages
        else:
            dims = tl.arange(0, PADDED)
            for _ in range(GROUP):
                row = query + dims
                for _ in range(steps):
                    q = tl.load(row, mask=dims < DIM, other=0.0).to(tl.float32)
                    found = tl.where(q[None, :] > 0.0, largest.to(tl.float32), smallest.to(tl.float32)) * q[None, :]
                    tl.store(scores + ids, tl.sum(found, 1), mask=ids < complete)
                    row += query_token
                    scores += pages
                query += query_head
