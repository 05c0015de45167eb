"""Eviction in the course of an answer: what a row holds is compacted in place, every so many tokens.

The same for scoring and generation, between two passes of the model: nothing here is part of a captured step, which
goes on with other starts and lengths in the same tensors. It waits for the device once a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.types import Keep
from ..methods.base import Budget, CacheView, Call, Density, EvictionMethod, Layer
from ..methods.plan import Plan
from .accounting import RowCounts, count_compaction
from .pool import Pool, Sequences
from .selections import check_held, chosen

#: Why nothing was asked to leave.
TOO_FEW = "too few tokens so far to evict again"


def kept_by(plan: Plan) -> tuple[EvictionMethod, Budget] | None:
    """The method whose state is kept for the next eviction, as it was typed, and its budget; None without one."""
    if plan.every is None:
        return None
    method, sparsity = plan.eviction.method, plan.eviction.sparsity
    return method, method.native_budget() if sparsity is None else Density(1 - sparsity)


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
            count_compaction(counts, layer.index, method.name, *number, pool.keys)
        return 0
    method, budget = method.resolved(sparsity, tokens, layer)
    call = _call(layer, pool, held, query, tokens, scale, softcap, "eviction", budget)
    kept = chosen(method, call, Keep, plan.debug)
    check_held(method.name, layer.index, kept, held.lengths)
    if counts is not None:
        count_compaction(counts, layer.index, method.name, *number, pool.keys, kept)
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
    call = _call(layer, pool, held, last, tokens, scale, softcap, "decode", budget)
    place = torch.arange(held.longest, device=held.starts.device)
    entries = {"sequence": held.place, "token": held.starts[:, None] + place.minimum(held.lengths[:, None] - 1)}
    own = {slot.name: entries[slot.per] for slot in method.slots() if slot.per != "page"}
    before = {name: pool.tensors[name][at] for name, at in own.items()}
    method.prefilled(call)
    for name, at in own.items():
        pool.tensors[name][at] = before[name]


def _call(
    layer: Layer,
    pool: Pool,
    held: Sequences,
    query: Tensor,
    tokens: int,
    scale: float,
    softcap: float | None,
    phase: str,
    budget: Budget,
) -> Call:
    kv = held.kv(pool)
    so_far = torch.full((len(held.starts) // held.heads,), tokens, dtype=torch.int64, device=query.device)
    cache = CacheView(kv, so_far, held.heads)
    state = pool.state(held.first, held.place)
    return Call(query, kv.keys, kv.values, scale, softcap, phase, budget, layer, cache=cache, state=state)
