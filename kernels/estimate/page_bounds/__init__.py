"""Bounds of pages of keys, for methods that score whole pages (Quest)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import choose
from ...types import PageBounds, RaggedKV
from . import naive


def update_bounds(kv: RaggedKV, bounds: PageBounds, before: Tensor, *, backend: str = "auto") -> None:
    """Take in keys [before, lengths) of each sequence, in place; every page that they touch is computed anew.

    These are the pages `before // page_size` to `(lengths - 1) // page_size`.

    Args:
        before: `(S,)` int32.
        backend: `auto`, `naive` or `triton`.

    Raises:
        ValueError: bounds or `before` that do not fit the sequences, or an unknown backend.
    """
    bounds.check(kv)
    if before.shape != kv.lengths.shape or before.dtype != torch.int32 or before.device != kv.lengths.device:
        raise ValueError(
            f"before is {tuple(before.shape)} {before.dtype} on {before.device}; expected {tuple(kv.lengths.shape)} "
            f"torch.int32 on {kv.lengths.device}"
        )
    if choose(backend, kv.keys.device) == "triton":
        from . import triton

        triton.update(kv, bounds, before)
    else:
        naive.update(kv, bounds, before)


def page_scores(
    query: Tensor, bounds: PageBounds, kv: RaggedKV, *, shared: bool, pages: int, backend: str = "auto"
) -> Tensor:
    """Upper bound of the score of any key of a page: `sum_d max(q_d * low_d, q_d * high_d)` (Quest, equation 2).

    Defined are, for token t of a sequence, its `(lengths - T + t) // page_size` complete pages before the one that
    the token is in. What stands behind them is undefined.

    Args:
        query: `(S, G, T, D)`, the last T tokens of each sequence.
        shared: sum over the G query heads of a KV head, else each has scores of its own.
        pages: a number of pages that no sequence exceeds.
        backend: `auto`, `naive` or `triton`.

    Returns:
        `(S, 1 or G, T, pages)` fp32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or an unknown backend.
    """
    kv.check(query)
    bounds.check(kv)
    if choose(backend, query.device) == "triton":
        from . import triton

        return triton.scores(query, bounds, kv, shared, pages)
    return naive.scores(query, bounds, kv, shared, pages)
