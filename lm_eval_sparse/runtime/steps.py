"""One step of decoding in one layer, for scoring and generation alike: store, select, attend.

New keys and values are appended to their sequences; a decode method chooses what each new token reads; attention reads
it. On a GPU nothing here waits for the device, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.cache.append import append
from ..kernels.decode import BACKENDS, mass, paged_decode
from ..kernels.types import RaggedKV, Reads, State
from ..methods.base import Budget, CacheView, Call, DecodeMethod, Layer
from ..methods.plan import Plan
from .selections import check_reads, chosen, misfit


@dataclass(frozen=True)
class Filled:
    """The decode phase as a method fills it in one layer.

    Attributes:
        method: with the knobs that hold.
        budget: what it may read.
        state: what it keeps, or None.
        tokens: `(R,)` int64, tokens of each row so far, evicted ones and the newest included.
    """

    method: DecodeMethod
    budget: Budget
    state: State | None
    tokens: Tensor


@dataclass(frozen=True)
class Stepped:
    """What a step gave.

    Attributes:
        out: `(S, G, T, D_v)`.
        backend: what computed it.
        read: `(S, Gs, T)` int32 keys read, minus its faults for a list that is nonsense; None without a method.
        width: places of a list.
    """

    out: Tensor
    backend: str
    read: Tensor | None = None
    width: int = 0


def step(
    query: Tensor,
    new: tuple[Tensor, Tensor] | None,
    kv: RaggedKV,
    layer: Layer,
    filled: Filled | None,
    *,
    scale: float,
    softcap: float | None,
    plan: Plan,
    window: int | None = None,
    overlap: bool = False,
    room: Tensor | None = None,
) -> Stepped:
    """Attend to what is held.

    Args:
        query: `(S, G, T, D)`, the query heads of each sequence.
        new: keys `(S, T, D)` and values `(S, T, D_v)` that are yet to be stored at the ends of the sequences, or None.
        kv: the sequences, whose lengths count the new tokens in.
        layer: which it is.
        filled: None for dense attention, to the last `window` keys.
        overlap: whether the choice and attention may run into each other (`index.pages.choose_pages`).
        room: int32, where keys read are noted, flat and as long as there may be; made anew where there is none.
    """
    options = {"scale": scale, "softcap": softcap, "backend": backend_of(plan)}
    if filled is None:
        if new is not None:
            append(kv, *new)
        out, used = paged_decode(query, kv, window=window, **options)
        return Stepped(out, used)
    method, steps = filled.method, query.shape[2]
    # Only a method that appends is the last thing before attention: what is around one looks at its lists.
    cache = CacheView(kv, filled.tokens, layer.kv_heads, None, overlap and method.appends)
    call = Call(
        query, kv.keys, kv.values, scale, softcap, "decode", filled.budget, layer, cache=cache, state=filled.state
    )
    if new is not None and method.appends:
        call = replace(call, cache=replace(cache, new=new))
    elif new is not None:
        append(kv, *new)
        method.appended(call, (kv.lengths - steps).clamp(min=0))
    reads = chosen(method, call, Reads, plan.debug)
    check_reads(method, layer.index, reads, query, kv, options["backend"], plan.debug)
    if room is None:
        read = torch.empty(reads.counts.shape, dtype=torch.int32, device=query.device)
    else:
        read = room[: reads.counts.numel()].view(reads.counts.shape)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if method.wants_mass else None
    try:
        out, used = paged_decode(query, kv, reads, keys_read=read, lse=lse, **options)
    except ValueError as error:  # weights or virtual keys that do not fit
        raise misfit(method.name, layer.index, error) from error
    if lse is not None:
        method.attended(call, reads, mass(query, kv, reads, lse, scale=scale, softcap=softcap))
    return Stepped(out, used, read, reads.ids.shape[-1])


def backend_of(plan: Plan) -> str:
    """The backend of decoding under a plan whose backend may be one of prefill only."""
    return plan.backend if plan.backend in BACKENDS else "auto"
