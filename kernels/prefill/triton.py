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
from torch import Tensor

from ..types import Blocks
from .attend_triton import attend
from .lists_triton import FIELDS, lists_of, offset, table_of
from .schedule import order_programs

LOG2_E = 1.4426950408889634


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
    out = query.new_empty(*query.shape[:2], value.shape[-1])
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
    sink: Tensor | None = None,
) -> None:
    """Several rows in one launch, into `outs`. All layouts have the same block sizes and kind of columns.

    With `sums`, see `add_columns`, only the columns are read; then there is one row. With `lses`, `(H, L)` fp32 each,
    rows are launched one by one. `sink`: `(H,)` contiguous, or None.
    """
    layout = layouts[0]
    heads, _, dim = queries[0].shape
    value_dim = values[0].shape[-1]
    states = list(zip(queries, keys, values, outs, strict=True))
    strides = [[stride for state in row for stride in state.stride()[:2]] for row in states]
    kinds = {own.columns.shape[1] == 1 for own in layouts if own.columns is not None}
    # One launch knows one set of strides and one kind of lists (that of a row of one query block may be called either),
    # and takes it that rows lie whole vectors apart.
    apart = any(row != strides[0] for row in strides) or len(kinds) > 1
    apart |= any(offset(state, base) % 8 for row in states for state, base in zip(row, states[0], strict=True))
    if apart or (lses is not None and len(queries) > 1):
        logs = [None] * len(queries) if lses is None else [[lse] for lse in lses]
        for q, k, v, own, out, log in zip(queries, keys, values, layouts, outs, logs, strict=True):
            forward_rows([q], [k], [v], [own], scale, softcap, [out], choice, lses=log, sink=sink)
        return
    shared = kinds == {True}
    choice = choice or tiling(layout, max(dim, value_dim), queries[0].dtype)
    parts = [lists_of(own, choice.together, shared, columns_only=sums is not None) for own in layouts]
    supers = [-(-own.blocks_q // choice.together) for own in layouts]
    group = heads // keys[0].shape[0]
    work = torch.cat([part.work for part in parts], 1) if len(parts) > 1 else parts[0].work
    order = order_programs(work, group)
    table = row_of = None
    if len(parts) > 1:
        table, row_of = table_of(states, parts, layouts, supers, shared)
    part = parts[0]
    block_d, block_dv = (max(16, triton.next_power_of_2(size)) for size in (dim, value_dim))
    if softcap is None:
        factors = (scale * LOG2_E, 0.0)
    else:
        factors = (scale / softcap, softcap * LOG2_E)
    attend[(heads * sum(supers),)](
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
        sink,
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
        value_dim=value_dim,
        block_dv=block_dv,
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
