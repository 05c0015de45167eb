"""Compaction in Triton: one launch for keys and values of all heads, counts read on the device; one for the check."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Ids that a program of the check looks at.
ENTRIES = 2048
#: Bits of `FAULTS`.
COUNT, TOTAL, RANGE, ORDER = (tl.constexpr(1 << bit) for bit in range(4))
#: Bytes of keys, and as many of values, that a program copies.
COPY_BYTES = 1 << 14


def forward(
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    starts: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
) -> None:
    heads, _, dim = keys.shape
    dim_v = values.shape[2]
    keys, values = (part if part.shape[2] == 1 or part.stride(2) == 1 else part.contiguous() for part in (keys, values))
    if indices.stride(1) != 1:
        indices = indices.contiguous()
    padded, padded_v = triton.next_power_of_2(dim), triton.next_power_of_2(dim_v)
    tokens = max(1, COPY_BYTES // (max(padded, padded_v) * keys.element_size()))
    _compact_kernel[(triton.cdiv(indices.shape[1], tokens), heads)](
        keys,
        values,
        indices,
        counts,
        starts,
        out_keys,
        out_values,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        indices.stride(0),
        TOKENS=tokens,
        DIM=dim,
        PADDED=padded,
        DIM_V=dim_v,
        PADDED_V=padded_v,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["indices_head"])
def _compact_kernel(
    keys,
    values,
    indices,
    counts,
    starts,
    out_keys,
    out_values,
    keys_head,
    keys_token,
    values_head,
    values_token,
    indices_head,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED_V: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + head).to(tl.int32)
    first = tl.program_id(0) * TOKENS
    if first < count:
        place = first + tl.arange(0, TOKENS)
        token = tl.load(indices + head * indices_head + tl.minimum(place, count - 1))[:, None]
        row = (tl.load(starts + head) + place)[:, None]
        dims, dims_v = tl.arange(0, PADDED)[None, :], tl.arange(0, PADDED_V)[None, :]
        key = tl.load(keys + head * keys_head + token * keys_token + dims, mask=dims < DIM)
        value = tl.load(values + head * values_head + token * values_token + dims_v, mask=dims_v < DIM_V)
        kept = (place < count)[:, None]
        tl.store(out_keys + row * DIM + dims, key, mask=kept & (dims < DIM))
        tl.store(out_values + row * DIM_V + dims_v, value, mask=kept & (dims_v < DIM_V))


def check_kept(indices: Tensor, counts: Tensor, total: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `check_kept` of the package."""
    heads, width = indices.shape
    counts = counts.contiguous()
    mended, faults = torch.empty_like(counts), torch.zeros(heads, dtype=torch.int32, device=counts.device)
    _check_kernel[(triton.cdiv(width, ENTRIES), heads)](
        indices,
        counts,
        mended,
        faults,
        heads,
        width,
        total,
        length,
        PADDED=triton.next_power_of_2(heads),
        ENTRIES=ENTRIES,
        num_warps=4,
    )
    return indices, mended, faults


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=["heads", "width", "total", "length"])
def _check_kernel(
    indices,
    counts,
    mended,
    faults,
    heads,
    width,
    total,
    length,
    PADDED: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Some of the ids of one head. All programs see all counts, so that they agree on what stands in for wrong ones."""
    head = tl.program_id(1)
    every = tl.arange(0, PADDED)
    numbers = tl.load(counts + every, mask=every < heads, other=1).to(tl.int64)
    wrong = (numbers < 1) | (numbers > tl.minimum(width, length))
    uncountable = tl.sum(wrong.to(tl.int32), 0) > 0
    added = tl.sum(tl.where((every < heads) & ~wrong, numbers, 0), 0)
    miscounted = (uncountable == 0) & (added != total)
    count = tl.sum(tl.where(every == head, numbers, 0), 0)
    bad = tl.where((count < 1) | (count > tl.minimum(width, length)), COUNT, 0) | tl.where(miscounted, TOTAL, 0)
    slot = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    place = indices + head.to(tl.int64) * width + slot
    token = tl.load(place, mask=slot < width, other=0)
    before = tl.load(place - 1, mask=(slot < width) & (slot > 0), other=0)
    outside = (token < 0) | (token >= length)
    here = tl.where(outside, RANGE, 0) | tl.where((slot > 0) & (before >= token), ORDER, 0)
    bad |= tl.reduce(tl.where((slot < width) & (slot < count), here, 0), 0, _either)
    if bad != 0:
        tl.atomic_or(faults + head, bad, sem="relaxed")
    unknown = uncountable | miscounted
    # Counts that stand in for wrong ones may reach what was not meant to be looked at.
    reached = (slot < width) & ((slot < count) | unknown)
    tl.store(place, tl.minimum(tl.maximum(token, 0), length - 1), mask=reached & outside)
    if tl.program_id(0) == 0:
        even = total // heads + tl.where(head < total % heads, 1, 0)
        tl.store(mended + head, tl.where(unknown, even.to(tl.int64), count).to(mended.dtype.element_ty))
