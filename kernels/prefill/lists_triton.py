"""What the Triton kernel reads of layouts: lists, united for query blocks that share a program, and where rows lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Blocks
from .attend_triton import ID_BITS


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
class Lists:
    """What the kernel reads of a layout: lists of (super) blocks, columns, and the bits of listed tiles."""

    ids: Tensor
    counts: Tensor
    columns: Tensor | None
    column_counts: Tensor | None
    words: Tensor | None
    work: Tensor


def lists_of(layout: Blocks, together: int, shared: bool, columns_only: bool = False) -> Lists:
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
    return Lists(ids, counts, columns, column_counts, words, work)


def offset(tensor: Tensor | None, base: Tensor | None) -> int:
    """Elements from the beginning of `base` to that of `tensor`, in whatever memory."""
    return 0 if tensor is None else (tensor.data_ptr() - base.data_ptr()) // tensor.element_size()


#: Numbers of a row in the table of rows.
FIELDS = 17


def table_of(
    states: list[tuple[Tensor, ...]],
    parts: list[Lists],
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
            [offset(tensor, base) for tensor, base in zip(state, states[0], strict=True)]
            + [offset(tensor, base) for tensor, base in zip(lists, bases, strict=True)]
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
