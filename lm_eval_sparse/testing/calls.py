"""A method asked outside of the runtime: one layer, on tensors that are there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.types import PageBounds, RaggedKV, State
from ..methods.base import CacheView, Call, Layer, Method
from ..runtime.pool import Pool, Sequences


@dataclass(frozen=True)
class Decoding:
    """A cache while T new tokens are decoded; fields as in `methods.CacheView`.

    With `bounds` of its pages they are the state, as Quest keeps it; without, a method fills the state that it
    declares.
    """

    kv: RaggedKV
    tokens: Tensor
    bounds: PageBounds | None = None
    kv_heads: int = 1
    new: tuple[Tensor, Tensor] | None = None
    overlap: bool = False


def call_of(
    method: Method,
    query: Tensor,
    key: Tensor | Decoding,
    value: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    sparsity: float | None = None,
    layer: Layer | None = None,
) -> tuple[Any, Call]:
    """The method as it is asked for `sparsity` (None: its knobs rule), and what it is asked.

    Args:
        query: `(H, L, D)` of a prompt, or `(S, G, T, D)` of new tokens.
        key: `(H_kv, L, D)`, or the cache.
        value: `(H_kv, L, D_v)`; left out, the keys stand for them.
        layer: what is known of the layer; left out, what the shapes say.
    """
    if isinstance(key, Decoding):
        kv, bounds = key.kv, key.bounds
        layer = layer or Layer(0, 1, key.kv_heads * query.shape[1], key.kv_heads, query.shape[-1])
        found, budget = method.resolved(sparsity, 0, layer)
        cache = CacheView(kv, key.tokens, key.kv_heads, key.new, key.overlap)
        state = None
        if bounds is not None:
            place = torch.arange(len(bounds.first), device=bounds.first.device)
            state = State({"low": bounds.low, "high": bounds.high}, bounds.page_size, bounds.first, place)
        call = Call(query, kv.keys, kv.values, scale, softcap, "decode", budget, layer, cache, state)
        if state is None and found.slots():
            call = replace(call, state=_state_of(found, kv))
            found.prefilled(call)
        return found, call
    layer = layer or Layer(0, 1, len(query), len(key), query.shape[-1])
    found, budget = method.resolved(sparsity, query.shape[1], layer)
    return found, Call(query, key, key if value is None else value, scale, softcap, found.phase, budget, layer)


def select(method: Method, query: Tensor, key: Tensor | Decoding, value: Tensor | None = None, **options: Any) -> Any:
    """What the method selects; arguments as in `call_of`."""
    found, call = call_of(method, query, key, value, **options)
    return found.select(call)


def _state_of(method: Any, kv: RaggedKV) -> State | None:
    """Room for what a method keeps of these sequences."""
    pool = Pool(method.slots(), method.page_size)
    held = Sequences(kv.starts, kv.lengths, kv.heads, kv.longest, int(kv.lengths.sum()), 0)
    pool.take(len(kv.keys), kv.keys, kv.values)
    pool.take_state(held)
    return pool.state(held.first, held.place)
