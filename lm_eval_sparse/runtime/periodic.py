"""Eviction in the course of an answer: what a row holds is compacted in place, every so many tokens.

The same for scoring and generation, between two passes of the model: nothing here is part of a captured step, which
goes on with other starts and lengths in the same tensors. It waits for the device once a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.types import Keep
from ..methods.base import Budget, Density, EvictionMethod, Layer
from ..methods.plan import Plan
from . import diagnose
from .accounting import RowCounts, count_compaction
from .cache import CacheLayer, SparseCache
from .pool import Pool, Sequences
from .selections import check_held, chosen, tell
from .steps import call_of

#: Why nothing was asked to leave.
TOO_FEW = "too few tokens so far to evict again"


def kept_by(plan: Plan) -> tuple[EvictionMethod, Budget] | None:
    """The method whose state is kept for the next eviction, as it was typed, and its budget; None without one."""
    if plan.every is None:
        return None
    method, sparsity = plan.eviction.method, plan.eviction.sparsity
    return method, method.native_budget() if sparsity is None else Density(1 - sparsity)


def evict_due(
    plan: Plan,
    cache: SparseCache,
    prompt: int,
    scales: Mapping[int, tuple[float, float | None]],
    counts: RowCounts | None,
) -> bool:
    """Evict again in the layers of a prompt's cache, or its beams', that have taken in enough of the answer.

    Args:
        prompt: tokens of the prompt; scales: by layer, the factor on its scores and its softcap.

    Returns:
        Whether there were any.
    """
    due = [each for each in cache.layers if isinstance(each, CacheLayer) and each.newest and each.fresh >= plan.every]
    for each in due:
        (layer, query), held, tokens = each.newest, each.sequences, each.get_seq_length()
        scale, softcap = scales[layer.index]
        rows = held.rows()
        freed = [
            evict_again(plan, layer, each.pool, row, own, prompt, tokens, scale=scale, softcap=softcap, counts=counts)
            for row, own in zip(rows, query.split(held.heads), strict=True)
        ]
        held.lengths = torch.cat([row.lengths for row in rows])
        held.longest, held.total = max(row.longest for row in rows), sum(row.total for row in rows)
        held.room += min(freed)
        each.fresh = 0
    return bool(due)


def evict_again(
    plan: Plan,
    layer: Layer,
    pool: Pool,
    held: Sequences,
    query: Tensor,
    prompt: int,
    tokens: int,
    *,
    scale: float,
    softcap: float | None,
    counts: RowCounts | None,
) -> int:
    """Let the eviction method choose anew what stays of one row in one layer, and move that together.

    Args:
        held: the sequences of the row, which are changed.
        query: `(H_kv, G, 1, D)` of the newest token.
        prompt: tokens of the prompt; tokens: of the row so far, evicted ones included.
        counts: where it is counted, if anywhere.

    Returns:
        How many tokens more each sequence of the row has room for.
    """
    method, sparsity = plan.eviction.at(prompt)
    number = layer.heads, held.heads, tokens
    if method.too_short(sparsity, tokens) is not None:
        if counts is not None:
            counts.phases["eviction"].reasons[TOO_FEW] += 1
            count_compaction(counts, layer.index, method.name, *number, pool.keys, value_dim=pool.values.shape[-1])
        return 0
    method, budget = method.resolved(sparsity, tokens, layer)
    call = call_of(layer, pool, held, query, tokens, scale, softcap, "eviction", budget)
    kept = chosen(method, call, Keep, plan.debug)
    check_held(method.name, layer.index, kept, held.lengths)
    if counts is not None:
        count_compaction(counts, layer.index, method.name, *number, pool.keys, kept, pool.values.shape[-1])
    diagnose.compacted(counts, layer.index, kept)
    if kept.total == int(held.lengths.sum()):
        return 0
    pool.keep(held.starts, kept.ids, kept.counts)
    before, held.lengths = held.lengths, kept.counts.to(held.lengths)
    held.longest, freed = torch.stack([held.lengths.max(), (before - held.lengths).min()]).tolist()
    held.total = kept.total
    held.room += freed
    _rebuild(plan, layer, pool, held, query, prompt, tokens, scale, softcap)
    return freed


def _rebuild(
    plan: Plan,
    layer: Layer,
    pool: Pool,
    held: Sequences,
    query: Tensor,
    prompt: int,
    tokens: int,
    scale: float,
    softcap: float | None,
) -> None:
    """Fill what the decode method keeps of pages from what is held now; what else it keeps stays as it is."""
    if plan.decode is None or not any(slot.per == "page" for slot in plan.decode.method.slots()):
        return
    method, budget = plan.decode.resolved(prompt, layer)
    last = query[:, :, query.shape[2] - min(method.looks_back, query.shape[2]) :]
    call = call_of(layer, pool, held, last, tokens, scale, softcap, "decode", budget)
    place = torch.arange(held.longest, device=held.starts.device)
    entries = {"sequence": held.place, "token": held.starts[:, None] + place.minimum(held.lengths[:, None] - 1)}
    own = {slot.name: entries[slot.per] for slot in method.slots() if slot.per != "page"}
    before = {name: pool.tensors[name][at] for name, at in own.items()}
    tell(method, "prefilled", call, debug=plan.debug)
    for name, at in own.items():
        pool.tensors[name][at] = before[name]
