"""Answers in the making: rows of a batch, and what each layer is handed while they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..kernels.types import RaggedKV, State
from ..methods.base import Layer
from .accounting import RowCounts
from .cache import CacheLayer, SparseCache, autocast
from .pool import Pool, Sequences
from .session import Runtime


@dataclass(eq=False)
class Row:
    """An answer in the making.

    Attributes:
        prompt: tokens of the prompt.
        counts: where its steps are counted.
        ended: whether the tokens generated so far are the whole answer.
        choose: from the last logits `(V,)` and the tokens generated so far to the next token; None for the largest.
        tokens: generated so far; the first one comes from the prefill.
        held: by layer.
        room: tokens that fit behind the prompt; fed: those that are there, each by one step of the model.
        since: of these, those that were there when `held` was last brought up to date: it counts them in.
        spans: for each time that decoding began, or went on with less, the tokens fed by then and the lengths by layer.
        reads: keys read in each step, all layers after each other.
        done: whether the answer is whole.
    """

    prompt: int
    counts: RowCounts
    ended: Callable[[list[int]], bool]
    choose: Callable[[Tensor, list[int]], int] | None
    tokens: list[int] = field(default_factory=list)
    held: list[Sequences] = field(default_factory=list)
    room: int = 0
    fed: int = 0
    since: int = 0
    spans: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    reads: list[np.ndarray] = field(default_factory=list)
    done: bool = False

    def take(self, token: int) -> None:
        """Add a token to the answer."""
        self.tokens.append(token)
        self.done = self.ended(self.tokens)


class DecodeLayer:
    """One layer during decoding: its storage, and which sequence stands where, in tensors that never move."""

    def __init__(self, pool: Pool, lengths: Tensor, tickets: Tensor, like: Sequences):
        self.pool, self.heads = pool, like.heads
        #: `lengths (R * H_kv,)` is counted up by the decoder, for all layers at once.
        self.lengths, self.tickets = lengths, tickets
        self.starts = torch.zeros(len(lengths), dtype=torch.int64, device=lengths.device)
        self.first, self.place = (
            None if own is None else torch.zeros_like(self.starts) for own in (like.first, like.place)
        )
        #: A number that no length exceeds until storage grows, and which storage it is: what a captured step relies on.
        self.longest = 0
        self.made = -1
        #: Keys read in the last step, `(S, Gs, 1)` of all rows in room for any Gs; by which backend, for which heads.
        #: Negative where a list of pages is nonsense; `width` places of such a list.
        self.width = 0
        self.room: Tensor | None = None
        self.reads: Tensor | None = None
        self.backend, self.shape = "", None
        #: Where an eviction method will be asked again: the layer, and the newest queries `(S, G, 1, D)` of all rows.
        self.known: Layer | None = None
        self.newest: Tensor | None = None

    def note(self, known: Layer, query: Tensor) -> None:
        """Keep the queries of a step `(S, G, 1, D)` of the first rows."""
        self.known = known
        if self.newest is None:
            self.newest = query.new_zeros(len(self.starts), *query.shape[1:])
        self.newest[: len(query)].copy_(query)

    def load(self, helds: Sequence[Sequences], fed: Sequence[int]) -> None:
        """Let these rows be the first ones, and the others idle."""
        sequences = len(helds) * self.heads
        for part in (self.lengths, self.starts, self.first, self.place):
            if part is not None:  # idle rows point nowhere else than they did before any was loaded
                part.zero_()
        self.starts[:sequences] = torch.cat([held.starts for held in helds])
        self.lengths[:sequences] = torch.cat([held.lengths + more for held, more in zip(helds, fed, strict=True)])
        for name in ("first", "place"):
            if (own := getattr(self, name)) is not None:
                own[:sequences] = torch.cat([getattr(held, name) for held in helds])

    def kv(self, rows: int) -> RaggedKV:
        own = slice(rows * self.heads)
        places = self.starts[own], self.lengths[own]
        return RaggedKV(self.pool.keys, self.pool.values, *places, self.longest, self.heads, self.tickets[:, own])

    def state(self, rows: int) -> State | None:
        own = slice(rows * self.heads)
        return self.pool.state(*(None if part is None else part[own] for part in (self.first, self.place)))


class PassingLayer(DynamicLayer):
    """What the model takes for a cache layer: it hands new keys and values through, attention stores them."""

    #: Tokens that it says to hold. The model is told positions: only whether there is a past may depend on this.
    claims = 1
    given: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.given = autocast(key_states), autocast(value_states)
        return self.given

    def get_seq_length(self) -> int:
        return self.claims


def adopt_window(layer: DynamicSlidingWindowLayer, pool: Pool, reserve: int) -> Sequences:
    """What a window layer holds of one row, copied to where steps find it, with room for `reserve` tokens more."""
    heads, held = layer.keys.shape[1:3]
    capacity = held + reserve
    first = pool.take(heads * capacity, layer.keys, layer.values)
    for flat, states in ((pool.keys, layer.keys), (pool.values, layer.values)):
        flat[first : first + heads * capacity].view(heads, capacity, -1)[:, :held] = states[0]
    starts = torch.arange(heads, device=pool.keys.device) * capacity + first
    lengths = torch.full_like(starts, held, dtype=torch.int32)
    return Sequences(starts, lengths, heads, held, heads * held, reserve)


def undecodable(config: Any, runtime: Runtime) -> str | None:
    """Why a model of this configuration, whose layers the runtime has seen, cannot be decoded here, or None."""
    layers = SparseCache(config, longest=runtime.longest).layers
    if not layers:
        return "the model's configuration does not tell its layers"
    if runtime.uncached or runtime.lenders:
        lent = {
            layer: f"layer {layer} borrows the keys and values of layer {of}" for layer, of in runtime.lenders.items()
        }
        return next(iter({**runtime.uncached, **lent}.values()))
    if runtime.masked:
        return "it has layers that need a mask made for each step"
    kinds = {type(layer) for layer in layers} - {CacheLayer, DynamicSlidingWindowLayer}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        return f"the model keeps more than keys and values ({names})"
    if set(runtime.layers) != set(range(len(layers))):
        return f"{len(layers)} cache layers, but attention in {len(runtime.layers)} layers"
    return None
