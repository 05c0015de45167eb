"""Own Triton kernel: online softmax over the listed key blocks of a query block, then over its single columns.

One program owns the queries of one head in one query block, or in several adjacent ones ("super block") where blocks
are too small to fill the matrix units and to reuse what is loaded: then it runs over the union of their lists and hides
from each query block what it did not list. Programs start in the order of their KV head, so that the keys and values
being read fit the L2 cache, and in each KV head with the longest lists first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Blocks
from .schedule import order_programs

#: Ids of key blocks take the low bits of an entry of a union list, the query blocks that list them the others.
ID_BITS = tl.constexpr(24)
ID_MASK = tl.constexpr((1 << 24) - 1)
LOG2_E = 1.4426950408889634


@triton.jit
def _fold(acc, peak, total, scores, value, precision: tl.constexpr):
    """One step of the online softmax; `scores` are in units of log2, hidden ones -inf."""
    highest = tl.maximum(peak, tl.max(scores, 1))
    # A query may not have seen any key yet: -inf - -inf would be NaN.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=precision)
    return acc, highest, total


@triton.jit
def _scores(query, key, scale, softcap, has_softcap: tl.constexpr, precision: tl.constexpr):
    scores = tl.dot(query, tl.trans(key), input_precision=precision) * scale
    if has_softcap:
        # Here scale is that of the scores over the softcap: c * tanh(x) = c - 2 c / (exp(2 x) + 1), in log2 units.
        scores = softcap - 2 * softcap / (tl.exp2(scores * 2.8853900817779268) + 1)
    return scores


@triton.jit
def _load(base, rows, stride, dims, inside, head_dim: tl.constexpr, padded: tl.constexpr, checked: tl.constexpr):
    """Rows of keys or values, `(N, block_d)`."""
    places = base + rows[:, None] * stride + dims[None, :]
    if checked and padded:
        return tl.load(places, mask=inside[:, None] & (dims < head_dim)[None, :], other=0.0)
    elif checked:
        return tl.load(places, mask=inside[:, None], other=0.0)
    elif padded:
        return tl.load(places, mask=(dims < head_dim)[None, :], other=0.0)
    else:
        return tl.load(places)


@triton.jit(
    do_not_specialize=["length", "blocks_q", "supers", "width", "column_head", "column_row", "word_count"],
)
def _attend(
    query,
    key,
    value,
    out,
    ids,
    counts,
    columns,
    column_counts,
    words,
    order,
    table,
    row_of,
    sums,
    lse,
    query_head,
    query_token,
    key_head,
    key_token,
    value_head,
    value_token,
    out_head,
    out_token,
    length,
    blocks_q,
    supers,
    width,
    column_head,
    column_row,
    word_count,
    scale,
    softcap,
    group: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    together: tl.constexpr,
    step: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    fields: tl.constexpr,
    many: tl.constexpr,
    has_columns: tl.constexpr,
    shared: tl.constexpr,
    has_softcap: tl.constexpr,
    precision: tl.constexpr,
    resumed: tl.constexpr,
):
    item = tl.load(order + tl.program_id(0))
    head = item // supers
    place = item % supers
    if many:  # several rows of tokens: where their tensors lie stands in a table
        at = table + tl.load(row_of + place) * fields
        query += tl.multiple_of(tl.load(at), 8)
        key += tl.multiple_of(tl.load(at + 1), 8)
        value += tl.multiple_of(tl.load(at + 2), 8)
        out += tl.multiple_of(tl.load(at + 3), 8)
        ids += tl.load(at + 4)
        counts += tl.load(at + 5)
        if has_columns:
            columns += tl.load(at + 6)
            column_counts += tl.load(at + 7)
            if shared:
                words += tl.load(at + 8)
        place -= tl.load(at + 9).to(tl.int32)
        length = tl.load(at + 10).to(tl.int32)
        blocks_q = tl.load(at + 11).to(tl.int32)
        supers = tl.load(at + 12).to(tl.int32)
        width = tl.load(at + 13).to(tl.int32)
        column_head = tl.load(at + 14)
        column_row = tl.load(at + 15)
        word_count = tl.load(at + 16).to(tl.int32)
    height: tl.constexpr = block_q * together
    padded: tl.constexpr = block_d != head_dim
    wide = head.to(tl.int64)
    key += wide // group * key_head
    value += wide // group * value_head
    first = place * height
    positions = first + tl.arange(0, height)
    dims = tl.arange(0, block_d)
    queries = query + wide * query_head + positions.to(tl.int64)[:, None] * query_token + dims[None, :]
    if padded:
        q = tl.load(queries, mask=(positions < length)[:, None] & (dims < head_dim)[None, :], other=0.0)
    else:
        q = tl.load(queries, mask=(positions < length)[:, None], other=0.0)
    outs = out + wide * out_head + positions.to(tl.int64)[:, None] * out_token + dims[None, :]
    if resumed:  # the tiles have been read, `sums` holds the logarithm (base 2) of their sums
        acc = tl.load(outs, mask=(positions < length)[:, None] & (dims < head_dim)[None, :], other=0.0).to(tl.float32)
        peak = tl.load(sums + wide * length + positions, mask=positions < length, other=0.0)
        total = tl.full((height,), 1.0, tl.float32)
    else:
        acc = tl.zeros((height, block_d), tl.float32)
        peak = tl.full((height,), float("-inf"), tl.float32)
        total = tl.zeros((height,), tl.float32)
    span = tl.arange(0, step)
    inside = span < step

    row = wide * supers + place
    count = tl.load(counts + row)
    listed = ids + row * width
    if resumed:
        tl.static_assert(has_columns)
    elif together == 1:
        # Lists ascend, so what reaches beyond the first query lies at their end; the rest needs no mask.
        tail: tl.constexpr = 2 * (block_q // block_k) if block_q > block_k else 2
        behind = count - tail + tl.arange(0, tail)
        ends = (tl.load(listed + behind, mask=behind >= 0, other=0) + 1) * block_k
        full = count - tl.sum(((ends > first + 1) & (behind >= 0)).to(tl.int32))
        if block_k >= step:
            pieces: tl.constexpr = block_k // step
            for i in tl.range(0, full * pieces):
                start = tl.load(listed + i // pieces).to(tl.int64) * block_k + i % pieces * step
                k = _load(key + start * key_token, span, key_token, dims, inside, head_dim, padded, False)
                scores = _scores(q, k, scale, softcap, has_softcap, precision)
                v = _load(value + start * value_token, span, value_token, dims, inside, head_dim, padded, False)
                acc, peak, total = _fold(acc, peak, total, scores, v, precision)
            done = full * pieces
            # Not pipelined, here and below: Triton 3.6 then hides the wrong scores where a mask depends on loaded ids.
            for i in tl.range(done, count * pieces, num_stages=1):
                start = tl.load(listed + i // pieces).to(tl.int64) * block_k + i % pieces * step
                rows = start + span
                k = _load(key, rows, key_token, dims, rows < length, head_dim, padded, True)
                scores = _scores(q, k, scale, softcap, has_softcap, precision)
                scores = tl.where(rows[None, :] <= positions[:, None], scores, float("-inf"))
                v = _load(value, rows, value_token, dims, rows < length, head_dim, padded, True)
                acc, peak, total = _fold(acc, peak, total, scores, v, precision)
        else:
            blocks: tl.constexpr = step // block_k
            chunks = full // blocks
            for i in tl.range(0, chunks):
                rows = tl.load(listed + i * blocks + span // block_k).to(tl.int64) * block_k + span % block_k
                k = _load(key, rows, key_token, dims, inside, head_dim, padded, False)
                scores = _scores(q, k, scale, softcap, has_softcap, precision)
                v = _load(value, rows, value_token, dims, inside, head_dim, padded, False)
                acc, peak, total = _fold(acc, peak, total, scores, v, precision)
            for i in tl.range(chunks, tl.cdiv(count, blocks), num_stages=1):
                slots = i * blocks + span // block_k
                block = tl.load(listed + slots, mask=slots < count, other=0).to(tl.int64)
                rows = block * block_k + span % block_k
                seen = (slots < count) & (rows < length)
                k = _load(key, rows, key_token, dims, seen, head_dim, padded, True)
                scores = _scores(q, k, scale, softcap, has_softcap, precision)
                visible = seen[None, :] & (rows[None, :] <= positions[:, None])
                scores = tl.where(visible, scores, float("-inf"))
                v = _load(value, rows, value_token, dims, seen, head_dim, padded, True)
                acc, peak, total = _fold(acc, peak, total, scores, v, precision)
    else:
        part = tl.arange(0, height) // block_q
        entries: tl.constexpr = step // block_k if step > block_k else 1
        pieces: tl.constexpr = block_k // step if block_k > step else 1
        tail: tl.constexpr = 2 * (height // block_k) if height > block_k else 2
        behind = count - tail + tl.arange(0, tail)
        ends = ((tl.load(listed + behind, mask=behind >= 0, other=0) & ID_MASK) + 1) * block_k
        full = (count - tl.sum(((ends > first + 1) & (behind >= 0)).to(tl.int32))) // entries
        for i in tl.range(0, full * pieces):
            slots = i // pieces * entries + span // block_k
            entry = tl.load(listed + slots)
            rows = (entry & ID_MASK).to(tl.int64) * block_k + i % pieces * step + span % block_k
            k = _load(key, rows, key_token, dims, inside, head_dim, padded, False)
            scores = _scores(q, k, scale, softcap, has_softcap, precision)
            mine = ((entry >> ID_BITS)[None, :] >> part[:, None]) & 1
            scores = tl.where(mine != 0, scores, float("-inf"))
            v = _load(value, rows, value_token, dims, inside, head_dim, padded, False)
            acc, peak, total = _fold(acc, peak, total, scores, v, precision)
        for i in tl.range(full * pieces, tl.cdiv(count, entries) * pieces, num_stages=1):
            slots = i // pieces * entries + span // block_k
            entry = tl.load(listed + slots, mask=slots < count, other=0)
            block = (entry & ID_MASK).to(tl.int64)
            rows = block * block_k + i % pieces * step + span % block_k
            seen = rows < length
            k = _load(key, rows, key_token, dims, seen, head_dim, padded, True)
            scores = _scores(q, k, scale, softcap, has_softcap, precision)
            # Slots behind the list have no bit set.
            mine = ((entry >> ID_BITS)[None, :] >> part[:, None]) & 1
            scores = tl.where((mine != 0) & (rows[None, :] <= positions[:, None]), scores, float("-inf"))
            v = _load(value, rows, value_token, dims, seen, head_dim, padded, True)
            acc, peak, total = _fold(acc, peak, total, scores, v, precision)

    if has_columns:
        last = tl.minimum((place + 1) * together, blocks_q) - 1  # its query block sees the most columns
        number = tl.load(column_counts + wide * blocks_q + last)
        singles = columns + wide * column_head + place.to(tl.int64) * column_row
        owner = tl.arange(0, height) // block_q
        for i in tl.range(0, tl.cdiv(number, step)):
            single = i * step + span
            counted = single < number
            tokens = tl.load(singles + single, mask=counted, other=0)
            k = _load(key, tokens.to(tl.int64), key_token, dims, counted, head_dim, padded, True)
            scores = _scores(q, k, scale, softcap, has_softcap, precision)
            open = counted[None, :] & (tokens[None, :] <= positions[:, None])
            if shared:  # a column in a listed tile has been read there
                tile = tokens // block_k
                for r in tl.static_range(together):
                    own = tl.minimum(place * together + r, blocks_q - 1)
                    word = tl.load(words + (wide * blocks_q + own) * word_count + tile // 32, mask=counted, other=0)
                    taken = (word >> (tile % 32)) & 1
                    open = open & ((owner != r)[:, None] | (taken == 0)[None, :])
            scores = tl.where(open, scores, float("-inf"))
            v = _load(value, tokens.to(tl.int64), value_token, dims, counted, head_dim, padded, True)
            acc, peak, total = _fold(acc, peak, total, scores, v, precision)

    if lse is not None:  # one row of tokens
        log = (peak + tl.log2(total)) * 0.6931471805599453
        tl.store(lse + wide * length + positions, log, mask=positions < length)
    acc = acc / total[:, None]
    if padded:
        tl.store(outs, acc.to(out.dtype.element_ty), mask=(positions < length)[:, None] & (dims < head_dim)[None, :])
    else:
        tl.store(outs, acc.to(out.dtype.element_ty), mask=(positions < length)[:, None])


@triton.jit
def _mark(ids, counts, words, width, word_count, step: tl.constexpr):
    """Set the bit of each listed block: lists `(rows, width)` to zeroed `(rows, word_count)` words."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    for start in tl.range(0, count, step):
        slots = start + tl.arange(0, step)
        block = tl.load(ids + row * width + slots, mask=slots < count, other=0)
        bit = tl.full((step,), 1, tl.int32) << (block % 32)
        tl.atomic_or(words + row * word_count + block // 32, bit, mask=slots < count, sem="relaxed")


@triton.jit
def _unite(
    words, ids, counts, blocks_q, blocks_k, supers, width, word_count, together: tl.constexpr, step: tl.constexpr
):
    """Union of the lists of adjacent query blocks: ids, ascending, each with a bit for every block that lists it."""
    place = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = head * supers + place
    found = 0
    for start in tl.range(0, blocks_k, step):
        block = start + tl.arange(0, step)
        bits = tl.zeros((step,), tl.int32)
        for r in tl.static_range(together):
            own = tl.minimum(place * together + r, blocks_q - 1)  # bits of queries that do not exist do no harm
            at = words + (head * blocks_q + own) * word_count + block // 32
            word = tl.load(at, mask=block < blocks_k, other=0)
            bits |= ((word >> (block % 32)) & 1) << r
        listed = (bits != 0).to(tl.int32)
        slots = found + tl.cumsum(listed, 0) - 1
        tl.store(ids + row * width + slots, block | (bits << ID_BITS), mask=bits != 0)
        found += tl.sum(listed, 0)
    tl.store(counts + row, found)


@dataclass(frozen=True)
class Tiling:
    """How the kernel runs: query blocks per program, keys per step, and Triton's own options."""

    together: int
    step: int
    warps: int
    stages: int


def tiling(layout: Blocks, dim: int, dtype: torch.dtype) -> Tiling:
    """The measured choice for a layout (benchmarks/NOTES.md)."""
    own = layout.columns is not None and layout.columns.shape[1] > 1
    together = 1 if own else max(1, 64 // layout.block_q)
    height = together * layout.block_q
    wide = dim > 128 or dtype == torch.float32
    if wide:
        return Tiling(together, 32 if height * dim > 128 * 128 else 64, 8 if height >= 128 else 4, 2)
    if height >= 128:
        return Tiling(together, 128 if layout.block_k >= 128 else 64, 8, 2)
    # Columns need registers that a third stage would spill.
    return Tiling(together, 64, 4, 3 if layout.columns is None else 2)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Blocks,
    scale: float,
    softcap: float | None,
    choice: Tiling | None = None,
) -> Tensor:
    """See `block_sparse_prefill`. Scores, softmax and sums in fp32; half-precision weights in the second product."""
    out = torch.empty_like(query)
    forward_rows([query], [key], [value], [layout], scale, softcap, [out], choice)
    return out


def forward_rows(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    layouts: Sequence[Blocks],
    scale: float,
    softcap: float | None,
    outs: Sequence[Tensor],
    choice: Tiling | None = None,
    sums: Tensor | None = None,
    lses: Sequence[Tensor] | None = None,
) -> None:
    """Several rows in one launch, into `outs`. All layouts have the same block sizes and kind of columns.

    With `sums`, see `add_columns`, only the columns are read; then there is one row. With `lses`, `(H, L)` fp32 each,
    rows are launched one by one.
    """
    layout = layouts[0]
    heads, _, dim = queries[0].shape
    states = list(zip(queries, keys, values, outs, strict=True))
    strides = [[stride for state in row for stride in state.stride()[:2]] for row in states]
    kinds = {own.columns.shape[1] == 1 for own in layouts if own.columns is not None}
    # One launch knows one set of strides and one kind of lists (that of a row of one query block may be called either),
    # and takes it that rows lie whole vectors apart.
    apart = any(row != strides[0] for row in strides) or len(kinds) > 1
    apart |= any(_offset(state, base) % 8 for row in states for state, base in zip(row, states[0], strict=True))
    if apart or (lses is not None and len(queries) > 1):
        logs = [None] * len(queries) if lses is None else [[lse] for lse in lses]
        for q, k, v, own, out, log in zip(queries, keys, values, layouts, outs, logs, strict=True):
            forward_rows([q], [k], [v], [own], scale, softcap, [out], choice, lses=log)
        return
    shared = kinds == {True}
    choice = choice or tiling(layout, dim, queries[0].dtype)
    parts = [_lists(own, choice.together, shared, columns_only=sums is not None) for own in layouts]
    supers = [-(-own.blocks_q // choice.together) for own in layouts]
    group = heads // keys[0].shape[0]
    work = torch.cat([part.work for part in parts], 1) if len(parts) > 1 else parts[0].work
    order = order_programs(work, group)
    table = row_of = None
    if len(parts) > 1:
        table, row_of = _table(states, parts, layouts, supers, shared)
    part = parts[0]
    block_d = max(16, triton.next_power_of_2(dim))
    if softcap is None:
        factors = (scale * LOG2_E, 0.0)
    else:
        factors = (scale / softcap, softcap * LOG2_E)
    _attend[(heads * sum(supers),)](
        queries[0],
        keys[0],
        values[0],
        outs[0],
        part.ids,
        part.counts,
        part.columns,
        part.column_counts,
        part.words,
        order,
        table,
        row_of,
        sums,
        None if lses is None else lses[0],
        *strides[0],
        layout.length,
        layout.blocks_q,
        sum(supers),
        part.ids.shape[-1],
        0 if part.columns is None else part.columns.stride(0),
        0 if part.columns is None or shared else part.columns.stride(1),
        0 if part.words is None else part.words.shape[-1],
        *factors,
        group=group,
        block_q=layout.block_q,
        block_k=layout.block_k,
        together=choice.together,
        step=choice.step,
        head_dim=dim,
        block_d=block_d,
        fields=FIELDS,
        many=len(parts) > 1,
        has_columns=layout.columns is not None,
        shared=shared,
        has_softcap=softcap is not None,
        precision="ieee" if queries[0].dtype == torch.float32 else "tf32",
        resumed=sums is not None,
        num_warps=choice.warps,
        num_stages=choice.stages,
    )


def add_columns(
    query: Tensor, key: Tensor, value: Tensor, layout: Blocks, scale: float, out: Tensor, sums: Tensor
) -> None:
    """Add a layout's single columns to attention over its tiles.

    Args:
        out: `(H, L, D)`, attention over the tiles, overwritten.
        sums: `(H, L)` fp32, contiguous, logarithm (base 2) of the sum of the exponentials of the scores in the tiles.
    """
    own = layout.columns.shape[1] > 1
    choice = Tiling(1 if own else max(1, 128 // layout.block_q), 64, 8 if layout.block_q == 128 or not own else 4, 2)
    forward_rows([query], [key], [value], [layout], scale, None, [out], choice, sums)


@dataclass(frozen=True)
class _Lists:
    """What the kernel reads of a layout: lists of (super) blocks, columns, and the bits of listed tiles."""

    ids: Tensor
    counts: Tensor
    columns: Tensor | None
    column_counts: Tensor | None
    words: Tensor | None
    work: Tensor


def _lists(layout: Blocks, together: int, shared: bool, columns_only: bool = False) -> _Lists:
    heads, blocks_q = layout.counts.shape
    ids, counts = layout.indices.contiguous(), layout.counts.contiguous()
    words = None
    if (together > 1 and not columns_only) or shared:
        words = ids.new_zeros(heads, blocks_q, -(-layout.blocks_k // 32))
        grid = (heads * blocks_q,)
        _mark[grid](ids, counts, words, ids.shape[-1], words.shape[-1], step=128, num_warps=1)
    if together > 1 and not columns_only:
        supers = -(-blocks_q // together)
        width = min(layout.blocks_k, together * ids.shape[-1])
        united, numbers = ids.new_empty(heads, supers, width), counts.new_empty(heads, supers)
        step = min(1024, triton.next_power_of_2(layout.blocks_k))
        _unite[(supers, heads)](
            words,
            united,
            numbers,
            blocks_q,
            layout.blocks_k,
            supers,
            width,
            words.shape[-1],
            together=together,
            step=step,
            num_warps=4,
        )
        ids, counts = united, numbers
    columns = None if layout.columns is None else layout.columns.contiguous()
    work = counts
    if columns is not None:
        last = torch.arange(together - 1, blocks_q + together - 1, together, device=ids.device).clamp(max=blocks_q - 1)
        work = layout.column_counts[:, last]
        work = work if columns_only else counts * layout.block_k + work
    column_counts = None if layout.columns is None else layout.column_counts.contiguous()
    return _Lists(ids, counts, columns, column_counts, words, work)


def _offset(tensor: Tensor | None, base: Tensor | None) -> int:
    """Elements from the beginning of `base` to that of `tensor`, in whatever memory."""
    return 0 if tensor is None else (tensor.data_ptr() - base.data_ptr()) // tensor.element_size()


#: Numbers of a row in the table of rows.
FIELDS = 17


def _table(
    states: list[tuple[Tensor, ...]],
    parts: list[_Lists],
    layouts: Sequence[Blocks],
    supers: list[int],
    shared: bool,
) -> tuple[Tensor, Tensor]:
    """`(rows, FIELDS)` int64, and `(sum of supers,)` int32 row of each super block, sent without waiting."""
    numbers, rows = [], []
    for place, (state, part, layout) in enumerate(zip(states, parts, layouts, strict=True)):
        lists = [part.ids, part.counts, part.columns, part.column_counts, part.words]
        bases = [parts[0].ids, parts[0].counts, parts[0].columns, parts[0].column_counts, parts[0].words]
        numbers.append(
            [_offset(tensor, base) for tensor, base in zip(state, states[0], strict=True)]
            + [_offset(tensor, base) for tensor, base in zip(lists, bases, strict=True)]
            + [sum(supers[:place]), layout.length, layout.blocks_q, supers[place], part.ids.shape[-1]]
            + [0 if part.columns is None else part.columns.stride(0)]
            + [0 if part.columns is None or shared else part.columns.stride(1)]
            + [0 if part.words is None else part.words.shape[-1]]
        )
        rows += [place] * supers[place]
    device = states[0][0].device
    table, row_of = torch.tensor(numbers), torch.tensor(rows, dtype=torch.int32)
    if device.type == "cuda":
        table, row_of = table.pin_memory(), row_of.pin_memory()
    return table.to(device, non_blocking=True), row_of.to(device, non_blocking=True)
