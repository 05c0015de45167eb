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
from ..methods.base import Budget, CacheView, Call, DecodeMethod, EvictionMethod, Layer
from ..methods.plan import Plan
from .pool import Pool, Sequences
from .selections import check_reads, chosen, misfit, tell


@dataclass(frozen=True)
class Filled:
    """The decode phase as a method fills it in one layer, or an eviction method whose state a step goes on with.

    Attributes:
        method: with the knobs that hold.
        budget: what it may read.
        state: what it keeps, or None.
        tokens: `(R,)` int64, tokens of each row so far, evicted ones and the newest included.
    """

    method: DecodeMethod | EvictionMethod
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
        virtual: virtual keys that each token reads besides.
        weighed: whether the weights of what was read were made in a second pass over its keys.
        altered: whether reading everything would not be dense attention: scores have biases, or keys are virtual.
        reads: what was chosen; None without a method.
    """

    out: Tensor
    backend: str
    read: Tensor | None = None
    width: int = 0
    virtual: int = 0
    weighed: bool = False
    altered: bool = False
    reads: Reads | None = None


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
    keeper: Filled | None = None,
    sink: Tensor | None = None,
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
        keeper: the eviction method that will be asked again, whose state takes the new tokens in.
        sink: `(H,)` logits that join the denominators of the softmax, or None. What methods are told of weights leaves
            them out.
    """
    options = {"scale": scale, "softcap": softcap, "backend": backend_of(plan)}
    if filled is None:
        if new is not None:
            append(kv, *new)
        watch = None if keeper is None else _Watch(query, kv, layer, keeper, scale, softcap, new is not None)
        lse = None if watch is None else watch.lse
        out, used = paged_decode(query, kv, window=window, lse=lse, sink=sink, **options)
        if lse is not None:
            watch.attended(None, mass(query, kv, None, lse, scale=scale, softcap=softcap))
        return Stepped(out, used)
    method, steps = filled.method, query.shape[2]
    # Only a method that appends is the last thing before attention: what is around one looks at its lists.
    overlap = overlap and method.appends and keeper is None
    cache = CacheView(kv, filled.tokens, layer.kv_heads, None, overlap)
    call = Call(
        query, kv.keys, kv.values, scale, softcap, "decode", filled.budget, layer, cache=cache, state=filled.state
    )
    if new is not None and method.appends:
        call = replace(call, cache=replace(cache, new=new))
    elif new is not None:
        append(kv, *new)
        tell(method, "appended", call, (kv.lengths - steps).clamp(min=0), debug=plan.debug)
    reads = chosen(method, call, Reads, plan.debug)
    check_reads(method, layer.index, reads, query, kv, options["backend"], plan.debug)
    if room is None:
        read = torch.empty(reads.counts.shape, dtype=torch.int32, device=query.device)
    else:
        read = room[: reads.counts.numel()].view(reads.counts.shape)
    watch = None if keeper is None else _Watch(query, kv, layer, keeper, scale, softcap, new is not None)
    lse = None if watch is None else watch.lse
    if lse is None and method.wants_mass:
        lse = room_for_lse(query)
    try:
        out, used = paged_decode(query, kv, reads, keys_read=read, lse=lse, sink=sink, **options)
    except ValueError as error:  # weights or virtual keys that do not fit
        raise misfit(method.name, layer.index, error) from error
    if lse is not None:
        weights = mass(query, kv, reads, lse, scale=scale, softcap=softcap)
        if method.wants_mass and new is not None:  # a layer that borrows another's keys is none of its state's business
            tell(method, "attended", call, reads, weights, debug=plan.debug)
        if watch is not None:
            watch.attended(reads, weights)
    virtual = 0 if reads.extra is None else reads.extra.values.shape[1]
    altered = virtual > 0 or reads.bias is not None
    return Stepped(out, used, read, reads.ids.shape[-1], virtual, lse is not None, altered, reads)


class _Watch:
    """What an eviction method that will be asked again is told of a step, once its tokens are in the cache.

    Args:
        own: whether the step has stored tokens in this cache: a layer that borrows another's is none of its business.
    """

    def __init__(
        self,
        query: Tensor,
        kv: RaggedKV,
        layer: Layer,
        keeper: Filled,
        scale: float,
        softcap: float | None,
        own: bool,
    ):
        self.method = keeper.method
        cache = CacheView(kv, keeper.tokens, layer.kv_heads)
        self.call = Call(
            query, kv.keys, kv.values, scale, softcap, "eviction", keeper.budget, layer, cache=cache, state=keeper.state
        )
        #: Room for what weights are made from, where the method wants them.
        self.lse = room_for_lse(query) if own and self.method.wants_mass else None
        if own:
            tell(self.method, "appended", self.call, (kv.lengths - query.shape[2]).clamp(min=0))

    def attended(self, reads: Reads | None, weights: Tensor) -> None:
        if self.lse is not None:
            tell(self.method, "attended", self.call, reads, weights)


def room_for_lse(query: Tensor) -> Tensor:
    """`(S, G, T)` fp32 for the queries `(S, G, T, D)`."""
    return torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)


def call_of(
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
    """What a method is told of all that some rows hold, outside of a step.

    Args:
        query: `(S, G, T, D)` of the newest tokens; tokens: of each row so far, evicted ones included.
    """
    kv = held.kv(pool)
    so_far = torch.full((len(held.starts) // held.heads,), tokens, dtype=torch.int64, device=query.device)
    cache = CacheView(kv, so_far, held.heads)
    state = pool.state(held.first, held.place)
    return Call(query, kv.keys, kv.values, scale, softcap, phase, budget, layer, cache=cache, state=state)


def backend_of(plan: Plan) -> str:
    """The backend of decoding under a plan whose backend may be one of prefill only."""
    return plan.backend if plan.backend in BACKENDS else "auto"
