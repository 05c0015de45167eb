"""Compaction in Triton: one launch for keys and values of all heads, counts read on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

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
