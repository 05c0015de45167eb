"""Own Triton kernels: split-KV decode attention, dense or over listed pages, and the sum of the splits.

The splits of a sequence are summed by the last of its programs where sequences have tickets, else by a second kernel.
How the keys of a query are divided follows from their number alone, never from other sequences of the call or from
the storage, so an output is the same, to the bit, whatever it is computed together with. A selection that lists all
pages of a token is read in the same pieces as no selection, and one token's output is then the same to the bit, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from ..backends import can_overlap
from ..ragged import RaggedKV

if TYPE_CHECKING:
    from . import PageSelection

# The numbers below are tuned. They may depend on dtype, dimensions and heads, never on lengths or on how many rows
# there are: they say in which order sums are made.
#: Splits of the keys of a row's heads together, of one head at least and at most, and keys that a split holds at least.
ROW_SPLITS, LEAST_SPLITS, MOST_SPLITS, MIN_SPLIT = 256, 16, 128, 128
#: Bytes of keys that are loaded at a time; several such pieces, of keys and of values, are under way (`STAGES`).
TILE_BYTES = 16384
WARPS, STAGES = 4, 3
#: Triton divides the stages of a loop among loads that wait for each other: ids of pages, then keys and values.
PAGED_STAGES = 5
#: Rows (query heads times tokens) of a tile of several tokens; in fp32, without matrix units, more do not fit. Their
#: queries and weights take shared memory, too.
MANY_ROWS, MANY_ROWS_FP32, MANY_STAGES = 64, 16, 2
#: Splits that are loaded at a time to be summed, and dimensions of an output that a program of the second kernel sums.
SUM_TOGETHER, SUM_DIMS = 32, 64

#: A window that no sequence fills, and whose difference from any length is an int32.
NO_WINDOW = 1 << 30
LOG2_E = 1.4426950408889634


@triton.jit
def _reach(
    length,
    pages,
    counts,
    known,
    sequence,
    tile,
    group,
    steps,
    rows,
    width,
    window,
    LISTS_ARE_OWN: tl.constexpr,
    PAGE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """What a tile reads: position of its first key, number of keys, and the place of its list of pages."""
    first_step = tile * rows // group
    last_step = (tl.minimum(tile * rows + rows, steps * group) - 1) // group
    visible = length - steps + 1 + last_step
    # Where nobody is, nothing but the length is looked at.
    held = length > 0
    if PAGE > 0:
        own = 0
        lists = 1
        if LISTS_ARE_OWN:
            own = tile * rows % group
            lists = group
        place = (sequence * lists + own).to(tl.int64) * steps + first_step
        if OVERLAP:  # known without waiting for them
            count = known
            last = (visible - 1) // PAGE
        else:
            count = tl.load(counts + place, mask=held, other=1)
            last = tl.load(pages + place * width + count - 1, mask=held, other=0)
        first = 0
        number = (count - 1) * PAGE + tl.minimum(PAGE, visible - last * PAGE)
    else:
        place = sequence.to(tl.int64)
        first = tl.maximum(length - steps + 1 + first_step - window, 0)
        number = visible - first
    number = tl.where(held, tl.maximum(number, 0), 0)
    return first, number, place


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
    out,
    keys_read,
    tickets,
    ready,
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
    FINISHES: tl.constexpr,
    COUNTED: tl.constexpr,
    OVERLAP: tl.constexpr,
    DEPENDENT: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """One split of one tile: some of the rows (token, query head) of a sequence, and a part of their keys.

    With tickets a tile is a sequence, and the program that is its last one sums the splits.
    """
    split = tl.program_id(0)
    sequence = tl.program_id(1) // tiles
    tile = tl.program_id(1) % tiles
    length = tl.load(lengths + sequence)
    start = tl.load(starts + sequence)
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
    first, number, place = _reach(
        length, pages, counts, known, sequence, tile, group, steps, rows, width, window, LISTS_ARE_OWN, PAGE, OVERLAP
    )
    size = _split_size(number, SPLITS, MIN_SPLIT, BLOCK_N)
    begin = split * size
    if begin < number:
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
            else:
                position = first + some
            stored = start + position
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
    if FINISHES:
        made = tl.cdiv(number, size)
        last = (split == 0) & (made == 0)
        if split < made:
            tl.debug_barrier()
            last = tl.atomic_add(tickets + sequence, 1, sem="acq_rel") == made - 1
        if last:
            tl.store(tickets + sequence, 0)
            heads = tl.arange(0, GROUP_PADDED)
            ours = sequence * group + heads
            result = _summed(partial, logs, ours, heads < group, value_dims, made, splits, VALUE_DIM, TOGETHER)
            mask = (heads < group)[:, None] & (value_dims < VALUE_DIM)[None, :]
            target = out + ours.to(tl.int64)[:, None] * VALUE_DIM + value_dims[None, :]
            tl.store(target, result.to(out.dtype.element_ty), mask=mask)
            if COUNTED:
                tl.store(keys_read + sequence, number)
    if DEPENDENT:
        gdc_wait()  # whatever comes after this kernel comes after the one before it, too


@triton.jit
def _summed(partial, logs, rows, used, dims, made, splits, VALUE_DIM: tl.constexpr, TOGETHER: tl.constexpr):
    """Outputs `(rows, dims)`: splits summed one after the other, whatever the number of threads. None of them: 0."""
    at = rows.to(tl.int64) * splits
    highest = tl.full(at.shape, float("-inf"), tl.float32)
    # Each thread reads what it needs, so that none waits for another.
    for first in range(0, made, TOGETHER):
        for number in tl.static_range(TOGETHER):
            some = used & (first + number < made)
            highest = tl.maximum(highest, tl.load(logs + at + first + number, mask=some, other=float("-inf")))
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros(at.shape, tl.float32)
    acc = total[:, None] + tl.zeros(dims.shape, tl.float32)[None, :]
    for first in range(0, made, TOGETHER):
        for number in tl.static_range(TOGETHER):
            some = used & (first + number < made)
            place = at + first + number
            mask = some[:, None] & (dims < VALUE_DIM)[None, :]
            part = tl.load(partial + place[:, None] * VALUE_DIM + dims[None, :], mask=mask, other=0.0)
            weight = tl.exp2(tl.load(logs + place, mask=some, other=float("-inf")) - highest)
            acc += part * weight[:, None]
            total += weight
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit(do_not_specialize=["group", "steps", "rows", "width", "window", "splits"])
def _combine(
    partial,
    logs,
    out,
    keys_read,
    lengths,
    pages,
    counts,
    group,
    steps,
    rows,
    width,
    window,
    splits,
    PAGE: tl.constexpr,
    LISTS_ARE_OWN: tl.constexpr,
    COUNTED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SUM_DIMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Some dimensions of one row: its splits summed; and the number of its keys."""
    sequence = tl.program_id(0) // (steps * group)
    row = tl.program_id(0) % (steps * group)
    step = row // group
    head = row % group
    length = tl.load(lengths + sequence)
    first, number, place = _reach(
        length, pages, counts, 0, sequence, row // rows, group, steps, rows, width, window, LISTS_ARE_OWN, PAGE, False
    )
    made = tl.cdiv(number, _split_size(number, SPLITS, MIN_SPLIT, BLOCK_N))
    dims = tl.program_id(1) * SUM_DIMS + tl.arange(0, SUM_DIMS)
    ours = tl.program_id(0) + tl.arange(0, 1)
    result = _summed(partial, logs, ours, ours >= 0, dims, made, splits, VALUE_DIM, TOGETHER)
    target = (sequence * group + head).to(tl.int64) * steps + step
    place = out + target * VALUE_DIM + dims[None, :] + tl.zeros_like(ours)[:, None]
    tl.store(place, result.to(out.dtype.element_ty), mask=(dims < VALUE_DIM)[None, :])
    if COUNTED:
        if PAGE > 0:
            read = number
        else:
            read = tl.where(length > 0, tl.minimum(length - steps + 1 + step, window), 0)
        lists = 1
        own = 0
        if LISTS_ARE_OWN:
            lists = group
            own = head
        if (tl.program_id(1) == 0) & (LISTS_ARE_OWN | (head == 0)):
            tl.store(keys_read + (sequence * lists + own).to(tl.int64) * steps + step, read)


def forward(
    query: Tensor,
    kv: RaggedKV,
    selection: PageSelection | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    keys_read: Tensor | None,
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
        return out
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
        many, own = False, selection.pages.shape[1] != 1
        rows = 1 if own else group
        pages, counts, page = selection.pages.contiguous(), selection.counts.contiguous(), selection.page_size
        width = pages.shape[-1]
        most = min(most, width * page)
    block_d, block_dv = (max(16, triton.next_power_of_2(size)) for size in (dim, value_dim))
    block_n = tile_keys(max(block_d, block_dv), query.element_size())
    tiles = -(-steps * group // rows)
    shares = split_limit(kv.heads)
    splits = max(1, min(shares, -(-most // MIN_SPLIT)))
    finishes = kv.tickets is not None and tiles == 1 and steps == 1
    ready = None if selection is None else selection.ready
    if ready is not None and not finishes:
        raise ValueError("lists that may not be complete yet need sequences with tickets")
    dependent = ready is not None and can_overlap(query.device)
    partial = query.new_empty(sequences * steps * group * splits * value_dim, dtype=torch.float32)
    logs = query.new_empty(sequences * steps * group * splits, dtype=torch.float32)
    reach = NO_WINDOW if window is None else min(window, NO_WINDOW)
    counted = keys_read is not None
    unused = kv.lengths
    _attend[(splits, sequences * tiles)](
        query,
        kv.keys,
        kv.values,
        kv.starts,
        kv.lengths,
        pages,
        counts,
        partial,
        logs,
        out,
        keys_read if counted else unused,
        kv.tickets[0] if finishes else unused,
        unused if ready is None else ready,
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
        FINISHES=finishes,
        COUNTED=counted,
        OVERLAP=ready is not None,
        DEPENDENT=dependent,
        GROUP_PADDED=triton.next_power_of_2(group),
        TOGETHER=SUM_TOGETHER,
        num_warps=WARPS,
        num_stages=MANY_STAGES if many else STAGES if selection is None else PAGED_STAGES,
        **({"launch_pdl": True} if dependent else {}),  # no word of Triton's interpreter
    )
    if finishes:
        return out
    _combine[(sequences * steps * group, triton.cdiv(value_dim, SUM_DIMS))](
        partial,
        logs,
        out,
        keys_read if counted else unused,
        kv.lengths,
        pages,
        counts,
        group,
        steps,
        rows,
        width,
        reach,
        splits,
        PAGE=page,
        LISTS_ARE_OWN=own,
        COUNTED=counted,
        VALUE_DIM=value_dim,
        SUM_DIMS=SUM_DIMS,
        BLOCK_N=block_n,
        SPLITS=shares,
        MIN_SPLIT=MIN_SPLIT,
        TOGETHER=SUM_TOGETHER,
        num_warps=1,
    )
    return out


def split_limit(heads: int) -> int:
    """Into how many splits the keys of a sequence are divided at most, a power of two: fewer where a row has more."""
    return max(LEAST_SPLITS, min(MOST_SPLITS, triton.next_power_of_2(ROW_SPLITS // heads)))


def tile_keys(dims: int, element_size: int) -> int:
    """Keys that are loaded at a time, a power of two that divides `MIN_SPLIT`."""
    return max(16, min(MIN_SPLIT, 128, TILE_BYTES // (dims * element_size)))
