"""Triton kernel for the virtual keys of a selection (`Extra`): their part of the output, which `_combine` adds.

There are few of them and they are read by each query head for itself: one program a row, sums in the order of the keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Extra, RaggedKV

LOG2_E = 1.4426950408889634
#: Virtual keys that are read at a time.
TILE = 32


@triton.jit(do_not_specialize=["group", "steps", "number"])
def _virtual(
    query,
    keys,
    values,
    bias,
    lengths,
    partial,
    logs,
    query_sequence,
    query_head,
    query_step,
    group,
    steps,
    number,
    scale,
    softcap,
    BIAS_IS_OWN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One row: what a token's query head makes of the virtual keys, and the logarithm (base 2) of their sum."""
    sequence = (tl.program_id(0) // (steps * group)).to(tl.int64)
    row = tl.program_id(0) % (steps * group)
    step, head = row // group, row % group
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    # Nothing of a sequence of length 0 is looked at.
    present = tl.where(tl.load(lengths + sequence) > 0, number, 0)
    at = sequence * query_sequence + head.to(tl.int64) * query_head + step.to(tl.int64) * query_step
    q = tl.load(query + at + dims, mask=(dims < DIM) & (present > 0), other=0.0).to(tl.float32)
    for low in range(0, present, BLOCK_E):
        index = low + tl.arange(0, BLOCK_E)
        inside = index < number
        stored = sequence * number + index
        scores = tl.zeros((BLOCK_E,), tl.float32)
        if keys is not None:
            k_mask = inside[:, None] & (dims < DIM)[None, :]
            k = tl.load(keys + stored[:, None] * DIM + dims[None, :], mask=k_mask, other=0.0)
            scores = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale
            if HAS_SOFTCAP:
                # Here scale is that of the scores over the softcap: c * tanh(x) = c - 2 c / (exp(2 x) + 1).
                scores = softcap - 2 * softcap / (tl.exp2(scores * 2.8853900817779268) + 1)
        if bias is not None:
            own = sequence
            if BIAS_IS_OWN:
                own = sequence * group + head
            here = tl.load(bias + (own * steps + step) * number + index, mask=inside, other=0.0)
            scores += here * 1.4426950408889634
        scores = tl.where(inside, scores, float("-inf"))
        highest = tl.maximum(peak, tl.max(scores, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - base)
        shrink = tl.exp2(peak - base)
        v_mask = inside[:, None] & (value_dims < VALUE_DIM)[None, :]
        v = tl.load(values + stored[:, None] * VALUE_DIM + value_dims[None, :], mask=v_mask, other=0.0)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * v.to(tl.float32), 0)
        peak = highest
    some = total > 0
    target = tl.program_id(0).to(tl.int64)
    acc = acc / tl.where(some, total, 1.0)
    tl.store(partial + target * VALUE_DIM + value_dims, acc, mask=value_dims < VALUE_DIM)
    tl.store(logs + target, tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), float("-inf")))


def attend_virtual(
    query: Tensor, kv: RaggedKV, extra: Extra, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Outputs `(rows, D_v)` fp32 of the virtual keys alone and logarithms (base 2) `(rows,)` of their sums.

    Rows are those of `_combine`: the query heads of a token follow each other, tokens follow each other.
    """
    sequences, group, steps, dim = query.shape
    rows, value_dim = sequences * group * steps, kv.values.shape[-1]
    partial = query.new_empty(rows, value_dim, dtype=torch.float32)
    logs = query.new_empty(rows, dtype=torch.float32)
    _virtual[(rows,)](
        query,
        None if extra.keys is None else extra.keys.contiguous(),
        extra.values.contiguous(),
        None if extra.bias is None else extra.bias.contiguous(),
        kv.lengths,
        partial,
        logs,
        *query.stride()[:3],
        group,
        steps,
        extra.values.shape[1],
        scale * LOG2_E if softcap is None else scale / softcap,
        1.0 if softcap is None else softcap * LOG2_E,
        BIAS_IS_OWN=extra.bias is not None and extra.bias.shape[1] > 1,
        HAS_SOFTCAP=softcap is not None,
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_E=TILE,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_DV=triton.next_power_of_2(value_dim),
        num_warps=4,
    )
    return partial, logs
