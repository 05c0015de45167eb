"""Triton kernel of `decode.mass`: each weight is made by one program from its score and the row's `lse`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..types import RaggedKV, Reads
from .lists_triton import reach
from .naive import width_of
from .triton import LOG2_E, NO_WINDOW, tile_keys


@triton.jit(do_not_specialize=["group", "steps", "rows", "tiles", "width", "places", "window"])
def _mass(
    query,
    keys,
    starts,
    lengths,
    pages,
    counts,
    bias,
    lse,
    out,
    query_sequence,
    query_head,
    query_step,
    group,
    steps,
    rows,
    tiles,
    width,
    places,
    window,
    scale,
    softcap,
    PAGE: tl.constexpr,
    LISTS_ARE_OWN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some places of one tile: the query heads of a token that share a list."""
    sequence = tl.program_id(1) // tiles
    tile = tl.program_id(1) % tiles
    length = tl.load(lengths + sequence)
    start = tl.load(starts + sequence)
    within = tl.arange(0, BLOCK_M)
    row = tile * rows + within
    used = (within < rows) & (row < steps * group)
    head, step = (row % group).to(tl.int64), (row // group).to(tl.int64)
    first, number, place, count, end = reach(
        length, pages, counts, 0, sequence, tile, group, steps, rows, width, window, LISTS_ARE_OWN, PAGE, False
    )
    index = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = (sequence.to(tl.int64) * group + head) * steps + step
    inside = used[:, None] & (index < places)[None, :]
    weights = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tl.program_id(0) * BLOCK_N < number:
        dims = tl.arange(0, BLOCK_D)
        at = sequence.to(tl.int64) * query_sequence + head[:, None] * query_head + step[:, None] * query_step
        q = tl.load(query + at + dims[None, :], mask=used[:, None] & (dims < DIM)[None, :], other=0.0)
        # As in attention: behind the last key it is read again, and no key is read that the token may not see.
        some = tl.minimum(index, number - 1)
        if PAGE > 0:
            position = tl.load(pages + place * width + some // PAGE) * PAGE + some % PAGE
            position = tl.maximum(tl.minimum(position, end - 1), 0)
        else:
            position = first + some
        k_at = keys + (start + position)[:, None] * DIM + dims[None, :]
        if BLOCK_D == DIM:
            k = tl.load(k_at)
        else:
            k = tl.load(k_at, mask=(dims < DIM)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            scores = softcap - 2 * softcap / (tl.exp2(scores * 2.8853900817779268) + 1)
        if bias is not None:
            scores += tl.load(bias + place * width + some // PAGE)[None, :] * 1.4426950408889634
        total = tl.load(lse + target, mask=used, other=float("-inf")) * 1.4426950408889634
        known = total > float("-inf")
        seen = (index < number)[None, :] & known[:, None]
        weights = tl.where(seen, tl.exp2(scores - tl.where(known, total, 0.0)[:, None]), 0.0)
    tl.store(out + target[:, None] * places + index[None, :], weights, mask=inside)


def mass(
    query: Tensor, kv: RaggedKV, selection: Reads | None, lse: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """See `decode.mass`."""
    if not kv.keys.is_contiguous():
        raise ValueError(f"keys have strides {kv.keys.stride()}; expected contiguous storage")
    query = query if query.stride(3) == 1 else query.contiguous()
    sequences, group, steps, dim = query.shape
    places = width_of(kv, selection)
    out = lse.new_empty(sequences, group, steps, places)
    if not out.numel():
        return out
    pages = counts = kv.lengths  # not looked at
    page, width, own, bias = 0, 0, False, None
    if selection is not None:
        pages, counts, page = selection.ids.contiguous(), selection.counts.contiguous(), selection.unit
        width, own = pages.shape[-1], selection.ids.shape[1] != 1
        bias = None if selection.bias is None else selection.bias.contiguous()
    rows = 1 if own else group
    tiles = steps * group // rows
    block_d = max(16, triton.next_power_of_2(dim))
    block_n = max(16, tile_keys(block_d, query.element_size()))
    _mass[(triton.cdiv(places, block_n), sequences * tiles)](
        query,
        kv.keys,
        kv.starts,
        kv.lengths,
        pages,
        counts,
        bias,
        lse,
        out,
        *query.stride()[:3],
        group,
        steps,
        rows,
        tiles,
        width,
        places,
        NO_WINDOW,
        scale * LOG2_E if softcap is None else scale / softcap,
        1.0 if softcap is None else softcap * LOG2_E,
        PAGE=page,
        LISTS_ARE_OWN=own,
        HAS_SOFTCAP=softcap is not None,
        DIM=dim,
        BLOCK_M=max(16, triton.next_power_of_2(rows)),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        PRECISION="ieee",
        num_warps=4,
    )
    return out
