"""Appending in Triton: one program for each page that the new tokens of a sequence touch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...types import PageBounds, RaggedKV

#: Tokens of a program where there are no pages.
TOKENS = 16
#: Bytes of a page of keys that a warp holds.
WARP_BYTES = 1 << 12


def forward(kv: RaggedKV, keys: Tensor, values: Tensor, bounds: PageBounds | None) -> None:
    sequences, steps, dim = keys.shape
    dim_v = values.shape[2]
    keys, values = (part if part.shape[2] == 1 or part.stride(2) == 1 else part.contiguous() for part in (keys, values))
    size = TOKENS if bounds is None else bounds.page_size
    touched = (steps + size - 2) // size + 1
    padded, padded_v = triton.next_power_of_2(dim), triton.next_power_of_2(dim_v)
    tile = size * max(padded, padded_v) * keys.element_size()
    _append_kernel[(touched, sequences)](
        keys,
        values,
        kv.keys,
        kv.values,
        kv.starts,
        kv.lengths,
        kv.keys if bounds is None else bounds.low,
        kv.keys if bounds is None else bounds.high,
        kv.starts if bounds is None else bounds.first,
        kv.tails,
        kv.splits,
        steps,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        HAS_BOUNDS=bounds is not None,
        SIZE=size,
        DIM=dim,
        PADDED=padded,
        DIM_V=dim_v,
        PADDED_V=padded_v,
        num_warps=min(16, max(4, tile // WARP_BYTES)),
    )


@triton.jit(do_not_specialize=["steps"])
def _append_kernel(
    keys,
    values,
    held_keys,
    held_values,
    starts,
    lengths,
    low,
    high,
    first_rows,
    tails,
    splits,
    steps,
    keys_sequence,
    keys_token,
    values_sequence,
    values_token,
    HAS_BOUNDS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED_V: tl.constexpr,
):
    sequence = tl.program_id(1).to(tl.int64)
    end = tl.load(lengths + sequence)
    length = end - steps  # before
    page = length // SIZE + tl.program_id(0)
    if (end > 0) & (page * SIZE < end):
        first = 0
        if HAS_BOUNDS:
            first = tl.load(first_rows + sequence)
        start = tl.load(starts + sequence)
        tail, split = start, 0
        if tails is not None:
            tail, split = tl.load(tails + sequence), tl.load(splits + sequence)
        write_tokens(
            keys + sequence * keys_sequence,
            values + sequence * values_sequence,
            held_keys,
            held_values,
            low,
            high,
            start,
            tail,
            split,
            first,
            length,
            end,
            page,
            keys_token,
            values_token,
            HAS_BOUNDS,
            SIZE,
            DIM,
            PADDED,
            DIM_V,
            PADDED_V,
        )


@triton.jit
def write_tokens(
    keys,
    values,
    held_keys,
    held_values,
    low,
    high,
    start,
    tail,
    split,
    first,
    length,
    end,
    page,
    keys_token,
    values_token,
    HAS_BOUNDS: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED_V: tl.constexpr,
):
    """Write tokens [length, end) of a sequence, as far as they are in `page`, and its bounds: row `first + page`.

    Token i is entry `start + i`, from `split` on `tail + i`.
    """
    dims, dims_v = tl.arange(0, PADDED), tl.arange(0, PADDED_V)
    token = page * SIZE + tl.arange(0, SIZE)
    old = token < length
    written = (token >= length) & (token < end)
    # Behind the last new token it is read again, which changes no bound.
    new = tl.minimum(tl.maximum(token - length, 0), end - length - 1).to(tl.int64)
    held = tl.where(token < split, start + token, tail + token)[:, None]
    some, inside = (dims < DIM)[None, :], (dims_v < DIM_V)[None, :]
    key = tl.load(keys + (new * keys_token)[:, None] + dims[None, :], mask=(token >= length)[:, None] & some, other=0.0)
    value = tl.load(values + (new * values_token)[:, None] + dims_v[None, :], mask=written[:, None] & inside, other=0.0)
    if HAS_BOUNDS:
        before = tl.load(held_keys + held * DIM + dims[None, :], mask=old[:, None] & some, other=0.0)
    tl.store(held_keys + held * DIM + dims[None, :], key, mask=written[:, None] & some)
    tl.store(held_values + held * DIM_V + dims_v[None, :], value, mask=written[:, None] & inside)
    if HAS_BOUNDS:
        key = tl.where(old[:, None], before, key)
        row = (first + page) * DIM + dims
        tl.store(low + row, tl.min(key, 0), mask=dims < DIM)
        tl.store(high + row, tl.max(key, 0), mask=dims < DIM)
