"""Own Triton kernels: split-KV decode attention, dense or over listed pages, and the sum of the splits.

How the keys of a query are divided follows from their number alone, never from other sequences of the call or from
the storage, so an output is the same, to the bit, whatever it is computed together with. A selection that lists all
pages of a token is read in the same pieces as no selection, and one token's output is then the same to the bit, too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..backends import can_overlap
from ..types import RaggedKV, Reads
from .extra_triton import attend_virtual
from .lists_triton import CHECKED, faults, reach

# The numbers below are tuned. They may depend on dtype, dimensions and heads, never on lengths or on how many rows
# there are: they say in which order sums are made.
#: Splits of the keys of a row's heads together, of one head at least and at most, and keys that a split holds at least.
ROW_SPLITS, LEAST_SPLITS, MOST_SPLITS, MIN_SPLIT = 256, 16, 128, 128
#: Bytes of keys that are loaded at a time; several such pieces, of keys and of values, are under way (`STAGES`).
TILE_BYTES = 32768
WARPS, STAGES = 4, 3
#: Triton divides the stages of a loop among loads that wait for each other: ids of pages, then keys and values. Few, so
#: that several programs share a multiprocessor: while one waits for its keys, another computes.
PAGED_STAGES = 4
#: Rows (query heads times tokens) of a tile of several tokens; in fp32, without matrix units, more do not fit. Their
#: queries and weights take shared memory, too.
MANY_ROWS, MANY_ROWS_FP32, MANY_STAGES = 64, 16, 2
#: Dimensions of an output that one program of the second kernel sums.
SUM_DIMS = 32

#: A window that no sequence fills, and whose difference from any length is an int32.
NO_WINDOW = 1 << 30
LOG2_E = 1.4426950408889634


@triton.jit
def _split_size(number, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.maximum(tl.cdiv(tl.cdiv(number, SPLITS), BLOCK_N) * BLOCK_N, MIN_SPLIT)


@triton.jit(do_not_specialize=["group", "steps", "rows", "tiles", "width", "window", "splits"])
def _attend(
    query,
    keys,
    values,
    starts,
    lengths,
    pages,
    counts,
    partial,
    logs,
    keys_read,
    ready,
    bias,
    tails,
    splits_at,
    query_sequence,
    query_head,
    query_step,
    group,
    steps,
    rows,
    tiles,
    width,
    window,
    splits,
    scale,
    softcap,
    PAGE: tl.constexpr,
    LISTS_ARE_OWN: tl.constexpr,
    MANY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    COUNTED: tl.constexpr,
    CHECKED: tl.constexpr,
    OVERLAP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One split of one tile: some of the rows (token, query head) of a sequence, and a part of their keys.

    Where keys of pages are counted, a program behind the last split looks at the whole list meanwhile.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    split = tl.program_id(0)
    sequence = tl.program_id(1) // tiles
    tile = tl.program_id(1) % tiles
    length = tl.load(lengths + sequence)
    start = tl.load(starts + sequence)
    if tails is not None:  # where the sequence lies from its split on
        tail = tl.load(tails + sequence)
        split_at = tl.load(splits_at + sequence)
    within = tl.arange(0, BLOCK_M)
    row = tile * rows + within
    step = row // group
    used = (within < rows) & (row < steps * group)
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    at = sequence.to(tl.int64) * query_sequence
    at += (row % group).to(tl.int64)[:, None] * query_head + step.to(tl.int64)[:, None] * query_step
    q = tl.load(query + at + dims[None, :], mask=used[:, None] & (dims < DIM)[None, :], other=0.0)
    known = 0
    if OVERLAP:
        known = tl.atomic_add(ready + sequence, 0, sem="acquire")
        while known == 0:
            known = tl.atomic_add(ready + sequence, 0, sem="acquire")
    first, number, place, count, end = reach(
        length, pages, counts, known, sequence, tile, group, steps, rows, width, window, LISTS_ARE_OWN, PAGE, OVERLAP
    )
    size = _split_size(number, SPLITS, MIN_SPLIT, BLOCK_N)
    begin = split * size
    if (begin < number) & (split < splits):
        visible = length - steps + 1 + step
        listed = pages + place * width
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
        for low in tl.range(begin, tl.minimum(begin + size, number), BLOCK_N):
            index = low + tl.arange(0, BLOCK_N)
            # Behind the last key it is read again: no load needs a mask that depends on what has been loaded, with
            # which Triton 3.6 computes wrongly, and no key that nobody may see is touched.
            some = tl.minimum(index, number - 1)
            if PAGE > 0:
                position = tl.load(listed + some // PAGE) * PAGE + some % PAGE
                # Whatever is listed, what is read are keys that the token may see. No mask: see above.
                position = tl.maximum(tl.minimum(position, end - 1), 0)
            else:
                position = first + some
            stored = start + position
            if tails is not None:
                stored = tl.where(position < split_at, stored, tail + position)
            k_at = keys + stored[:, None] * DIM + dims[None, :]
            v_at = values + stored[:, None] * VALUE_DIM + value_dims[None, :]
            if BLOCK_D == DIM:
                k = tl.load(k_at)
            else:
                k = tl.load(k_at, mask=(dims < DIM)[None, :], other=0.0)
            if BLOCK_DV == VALUE_DIM:
                v = tl.load(v_at)
            else:
                v = tl.load(v_at, mask=(value_dims < VALUE_DIM)[None, :], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if HAS_SOFTCAP:
                # Here scale is that of the scores over the softcap: c * tanh(x) = c - 2 c / (exp(2 x) + 1).
                scores = softcap - 2 * softcap / (tl.exp2(scores * 2.8853900817779268) + 1)
            if bias is not None:
                scores += tl.load(bias + place * width + some // PAGE)[None, :] * 1.4426950408889634
            seen = (index < number)[None, :]
            if MANY:
                seen &= (position[None, :] < visible[:, None]) & (position[None, :] >= (visible - window)[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            highest = tl.maximum(peak, tl.max(scores, 1))
            # A row of several tokens may not have seen any key yet: -inf - -inf would be NaN.
            base = tl.where(highest == float("-inf"), 0.0, highest)
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(peak - base)
            total = total * shrink + tl.sum(weights, 1)
            acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            peak = highest
        target = ((sequence.to(tl.int64) * steps * group) + row) * splits + split
        some = total > 0
        acc = acc / tl.where(some, total, 1.0)[:, None]
        mask = used[:, None] & (value_dims < VALUE_DIM)[None, :]
        tl.store(partial + target[:, None] * VALUE_DIM + value_dims[None, :], acc, mask=mask)
        log = tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
        tl.store(logs + target, log, mask=used)
    else:
        # So that the sum knows, which then need not know how many keys there are.
        target = (sequence.to(tl.int64) * steps * group + row) * splits + split
        tl.store(logs + target, float("-inf"), mask=used & (split < splits))
    if COUNTED:
        if PAGE > 0:
            if split == splits:
                bad = 0
                if length > 0:
                    bad = faults(pages + place * width, count, width, end, PAGE, CHECKED)
                tl.store(keys_read + place, tl.where(bad != 0, -bad, number))
        else:
            if split == 0:
                seen = tl.where(length > 0, tl.minimum(length - steps + 1 + step, window), 0)
                tl.store(keys_read + place * steps + step, seen, mask=used & (row % group == 0))
    if OVERLAP and DEPENDENT:
        gdc_wait()  # whatever waits for this kernel waits for the one before it, too


@triton.jit(do_not_specialize=["group", "heads", "steps", "splits"])
def _combine(
    partial,
    logs,
    out,
    lse,
    sink,
    virtual,
    virtual_logs,
    group,
    heads,
    steps,
    splits,
    VALUE_DIM: tl.constexpr,
    SUM_DIMS: tl.constexpr,
    PADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Some dimensions of one row: its splits summed, always in the same order, and virtual keys behind them."""
    if DEPENDENT:
        gdc_wait()
    sequence = tl.program_id(0) // (steps * group)
    row = tl.program_id(0) % (steps * group)
    split = tl.arange(0, PADDED)
    at = tl.program_id(0).to(tl.int64) * splits + split
    log = tl.load(logs + at, mask=split < splits, other=float("-inf"))
    highest = tl.max(log, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(log - base)
    dims = tl.program_id(1) * SUM_DIMS + tl.arange(0, SUM_DIMS)
    mask = (log > float("-inf"))[:, None] & (dims < VALUE_DIM)[None, :]
    parts = tl.load(partial + at[:, None] * VALUE_DIM + dims[None, :], mask=mask, other=0.0)
    total = tl.sum(weights, 0)
    # Of a sequence of length 0 there is no split, and its output is 0.
    result = tl.sum(parts * weights[:, None], 0)
    if virtual is not None:
        more = tl.load(virtual_logs + tl.program_id(0))
        top = tl.maximum(highest, more)
        base = tl.where(top == float("-inf"), 0.0, top)
        shrink, grow = tl.exp2(highest - base), tl.exp2(more - base)
        at = tl.program_id(0).to(tl.int64) * VALUE_DIM + dims
        result = result * shrink + tl.load(virtual + at, mask=dims < VALUE_DIM, other=0.0) * grow
        total = total * shrink + grow
    whole = total
    if sink is not None:  # one more key, of value 0
        logit = tl.load(sink + sequence % heads * group + row % group).to(tl.float32) * 1.4426950408889634
        whole += tl.exp2(logit - base)
    result = result / tl.where(total > 0, whole, 1.0)
    target = (sequence * group + row % group).to(tl.int64) * steps + row // group
    if lse is not None:
        log = tl.where(total > 0, base + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(lse + target, log * 0.6931471805599453, mask=tl.program_id(1) == 0)
    tl.store(out + target * VALUE_DIM + dims, result.to(out.dtype.element_ty), mask=dims < VALUE_DIM)


def forward(
    query: Tensor,
    kv: RaggedKV,
    selection: Reads | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    keys_read: Tensor | None,
    lse: Tensor | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """See `paged_decode`."""
    if not (kv.keys.is_contiguous() and kv.values.is_contiguous()):
        raise ValueError(
            f"keys and values have strides {kv.keys.stride()} and {kv.values.stride()}; expected contiguous storage"
        )
    query = query if query.stride(3) == 1 else query.contiguous()
    sequences, group, steps, dim = query.shape
    value_dim = kv.values.shape[-1]
    out = query.new_empty(sequences, group, steps, value_dim)
    if not out.numel():
        if lse is not None:
            lse.fill_(float("-inf"))
        return out
    bias = virtual = virtual_logs = None
    if selection is not None:
        bias = None if selection.bias is None else selection.bias.contiguous()
        if selection.extra is not None:
            virtual, virtual_logs = attend_virtual(query, kv, selection.extra, scale, softcap)
    most = kv.longest
    if selection is None:
        many = steps > 1
        # Tokens that follow each other see almost the same keys: they are read once for several of them.
        most_rows = MANY_ROWS_FP32 if query.dtype == torch.float32 else MANY_ROWS
        rows = min(most_rows, steps * group) if many else group
        pages = counts = kv.lengths  # not looked at
        page, width, own = 0, 0, False
        most = most if window is None else min(most, window + steps - 1)
    else:
        many, own = False, selection.ids.shape[1] != 1
        rows = 1 if own else group
        pages, counts, page = selection.ids.contiguous(), selection.counts.contiguous(), selection.unit
        width = pages.shape[-1]
        most = min(most, width * page)
    block_d, block_dv = (max(16, triton.next_power_of_2(size)) for size in (dim, value_dim))
    # A product takes 16 keys at least.
    block_n = max(16, tile_keys(max(block_d, block_dv), query.element_size()) // (2 if many else 1))
    tiles = -(-steps * group // rows)
    shares = split_limit(kv.heads)
    splits = max(1, min(shares, -(-most // MIN_SPLIT)))
    ready = None if selection is None else selection.ready
    dependent = can_overlap(query.device)
    launch = {"launch_pdl": True} if dependent else {}  # no word that Triton's interpreter knows
    partial = query.new_empty(sequences * steps * group * splits * value_dim, dtype=torch.float32)
    logs = query.new_empty(sequences * steps * group * splits, dtype=torch.float32)
    reach = NO_WINDOW if window is None else min(window, NO_WINDOW)
    counted = keys_read is not None
    checks = counted and selection is not None
    unused = kv.lengths
    _attend[(splits + checks, sequences * tiles)](
        query,
        kv.keys,
        kv.values,
        kv.starts,
        kv.lengths,
        pages,
        counts,
        partial,
        logs,
        keys_read if counted else unused,
        unused if ready is None else ready,
        bias,
        kv.tails,
        kv.splits,
        *query.stride()[:3],
        group,
        steps,
        rows,
        tiles,
        width,
        reach,
        splits,
        scale * LOG2_E if softcap is None else scale / softcap,
        1.0 if softcap is None else softcap * LOG2_E,
        PAGE=page,
        LISTS_ARE_OWN=own,
        MANY=many,
        HAS_SOFTCAP=softcap is not None,
        DIM=dim,
        VALUE_DIM=value_dim,
        # The least that a product on matrix units takes is 16.
        BLOCK_M=max(16, triton.next_power_of_2(rows)),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        SPLITS=shares,
        MIN_SPLIT=MIN_SPLIT,
        PRECISION="ieee",
        COUNTED=counted,
        CHECKED=CHECKED,
        OVERLAP=ready is not None,
        DEPENDENT=dependent,
        num_warps=WARPS,
        num_stages=MANY_STAGES if many else STAGES if selection is None else PAGED_STAGES,
        **({} if ready is None else launch),
    )
    _combine[(sequences * steps * group, triton.cdiv(value_dim, SUM_DIMS))](
        partial,
        logs,
        out,
        lse,
        sink,
        virtual,
        virtual_logs,
        group,
        kv.heads,
        steps,
        splits,
        VALUE_DIM=value_dim,
        SUM_DIMS=SUM_DIMS,
        PADDED=triton.next_power_of_2(shares),  # and so always the same order of sums
        DEPENDENT=dependent,
        num_warps=4,
        **launch,
    )
    return out


def split_limit(heads: int) -> int:
    """Into how many splits the keys of a sequence are divided at most, a power of two: fewer where a row has more."""
    return max(LEAST_SPLITS, min(MOST_SPLITS, triton.next_power_of_2(ROW_SPLITS // heads)))


def tile_keys(dims: int, element_size: int) -> int:
    """Keys that are loaded at a time, a power of two that divides `MIN_SPLIT`. In fp32, without matrix units, fewer."""
    size = TILE_BYTES if element_size < 4 else TILE_BYTES // 2
    return max(16, min(MIN_SPLIT, 128, size // (dims * element_size)))
