"""Tensors to ask methods about, and what methods select counted entry by entry: nothing here knows their counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.types import RaggedKV, State
from ..methods.base import CacheView, Call, Layer
from .calls import call_of
from .subject import Subject

DIM, STEPS = 16, 5
#: Query heads and KV heads: one each, a group of two, all heads on one, and a group for each.
HEADS = ((1, 1), (4, 2), (7, 1), (3, 3))
#: No multiple of any block or page.
LENGTHS = (63, 200, 331)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def states(
    heads: int, kv_heads: int, length: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `(H, L, D)` and keys in which some directions stand out, so that attention is far from uniform; values.

    The same for the same arguments, whatever else was drawn.
    """
    generator = torch.Generator().manual_seed(1000 * length + 10 * heads + kv_heads + seed)
    stretch = torch.linspace(0.3, 3, DIM)
    query, key, value = (
        (torch.randn(number, length, DIM, generator=generator) * stretch).to(dtype)
        for number in (heads, kv_heads, kv_heads)
    )
    return query, key, value


def ask(
    subject: Subject,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparsity: float | None = None,
    layer: tuple[int, int] = (0, 1),
) -> tuple[Any, Any]:
    """The method as it was asked, and what it selects; a decode method for the last `STEPS` tokens.

    Args:
        sparsity: what to skip; None: the knobs of `tiny` rule.
        layer: its index, and how many there are.
    """
    method = subject.build(subject.tiny if sparsity is None else {})
    if subject.phase == "decode":
        return decode(method, [(query, key, value)], STEPS, STEPS, sparsity, layer)
    told = Layer(*layer, len(query), len(key), DIM)
    found, call = call_of(method, query, key, value, scale=DIM**-0.5, sparsity=sparsity, layer=told)
    return found, found.select(call)


def decode(
    method: Any,
    rows: Sequence[tuple[Tensor, Tensor, Tensor]],
    new: int,
    steps: int,
    sparsity: float | None,
    layer: tuple[int, int] = (0, 1),
    state: State | None = None,
) -> tuple[Any, Any]:
    """What is selected for the last `steps` tokens of each row, of which the last `new` have come since its prompt.

    They come `steps` at a time, and each time the method takes them into its state, if it has one.

    Args:
        rows: queries, keys and values of each; they are decoded side by side.
        state: room for what the method keeps; left out, it is made here.
    """
    heads, kv_heads = len(rows[0][0]), len(rows[0][1])
    totals = [query.shape[1] for query, *_ in rows]
    told = Layer(*layer, heads, kv_heads, DIM)
    method, budget = method.resolved(sparsity, totals[0] - new, told)
    flat = [torch.cat([row[part].reshape(-1, DIM) for row in rows]) for part in (1, 2)]
    held = [total for total in totals for _ in range(kv_heads)]
    starts = [sum(held[:place]) for place in range(len(held))]
    state = state or state_of(method, flat[0], held)

    def call(behind: int, last: int) -> Call:
        """All but the last `behind` tokens of each row are cached; the last of those ask."""
        lengths = [total - behind for total in totals]
        kv = RaggedKV.of(*flat, starts, [length - behind for length in held])
        asked = torch.cat(
            [
                query[:, length - last : length].reshape(kv_heads, heads // kv_heads, last, DIM)
                for (query, *_), length in zip(rows, lengths, strict=True)
            ]
        )
        view = CacheView(kv, torch.tensor(lengths), kv_heads)
        return Call(asked, *flat, DIM**-0.5, None, "decode", budget, told, view, state)

    behind, selection = new, None
    method.prefilled(call(behind, min(min(totals) - behind, max(1, method.looks_back))))
    while behind:
        before = torch.tensor([length - behind for length in held], dtype=torch.int32)
        behind -= steps
        now = call(behind, steps)
        method.appended(now, before)
        selection = method.select(now)
        selection.check(now.cache.kv)
    return method, selection


def state_of(method: Any, keys: Tensor, lengths: Sequence[int]) -> State | None:
    """Room for what a method keeps of sequences of so many tokens; None where it keeps nothing."""
    if not method.slots():
        return None
    pages = [-(-length // method.page_size) for length in lengths]
    entries = {"page": sum(pages), "token": sum(lengths), "sequence": len(lengths)}
    tensors = {slot.name: slot.empty(entries[slot.per], keys) for slot in method.slots()}
    first = torch.tensor([sum(pages[:place]) for place in range(len(pages))])
    return State(tensors, method.page_size, first, torch.arange(len(lengths)))


def shown(selection: Any, phase: str, kv_heads: int, length: int) -> Tensor:
    """What is selected, entry by entry.

    `(H, L, L)` pairs of the prompt; `(H_kv, L)` tokens that stay; or `(H_kv, Gs, T, L)` keys that new tokens read.
    """
    if phase == "prefill":
        return _pairs(selection, length)
    if phase == "eviction":
        seen = torch.zeros(kv_heads, length, dtype=torch.bool)
        for head in range(kv_heads):
            seen[head, selection.ids[head, : int(selection.counts[head])]] = True
        return seen
    lists, steps = selection.counts.shape[1:]
    seen = torch.zeros(kv_heads, lists, steps, length, dtype=torch.bool)
    for head, own, step in torch.cartesian_prod(*map(torch.arange, (kv_heads, lists, steps))).reshape(-1, 3).tolist():
        for page in selection.ids[head, own, step, : int(selection.counts[head, own, step])].tolist():
            seen[head, own, step, page * selection.unit : (page + 1) * selection.unit] = True
        seen[head, own, step, length - steps + 1 + step :] = False
    return seen


def _pairs(selection: Any, length: int) -> Tensor:
    seen = torch.zeros(selection.heads, length, length, dtype=torch.bool)
    for head in range(selection.heads):
        for row in range(selection.blocks_q):
            queries = slice(row * selection.block_q, (row + 1) * selection.block_q)
            for block in selection.indices[head, row, : int(selection.counts[head, row])].tolist():
                seen[head, queries, block * selection.block_k : (block + 1) * selection.block_k] = True
            if selection.columns is not None:
                own = selection.columns[head, row if selection.columns.shape[1] > 1 else 0]
                seen[head, queries, own[: int(selection.column_counts[head, row])].long()] = True
    return seen.tril()


def weights(selection: Any) -> list[Tensor]:
    """What a selection carries beside its lists, where that enters the attention: biases, virtual keys, new values."""
    parts = [getattr(selection, name, None) for name in ("bias", "extra", "values", "positions")]
    flat = [part if isinstance(part, Sequence) else (part,) for part in parts if part is not None]
    return [tensor for part in flat for tensor in part if isinstance(tensor, Tensor)]


def same(one: Any, other: Any, phase: str, kv_heads: int, length: int) -> bool:
    """Whether two selections are the same, entry by entry."""
    return torch.equal(*(shown(selection, phase, kv_heads, length) for selection in (one, other)))


def keys_of(key: Tensor, length: int) -> RaggedKV:
    """A cache that holds `length` of the keys `(H_kv, L, D)` of each KV head."""
    flat, (kv_heads, total, _) = key.reshape(-1, key.shape[-1]), key.shape
    return RaggedKV.of(flat, flat, [head * total for head in range(kv_heads)], [length] * kv_heads)


def counted(call: Call) -> RaggedKV:
    """The cache of a call as it is now: a runtime goes on writing into its lengths."""
    return replace(call.cache.kv, lengths=call.cache.kv.lengths.clone())
