"""The cache of one prompt: pools for full-attention layers, transformers' own layers elsewhere.

Several continuations of one context are scored from the same cache: `snapshot` and `restore` bring it back to
where the context ended without copying the keys and values of full-attention layers.

While the prompt is read, a layer's keys and values are a rectangle, which the model is handed. Where a method fills a
later phase, the layer is closed at the end of the prompt: from then on it hands new keys and values through, and
attention stores them (`steps`). After eviction every KV head holds a different number of tokens. The layer's length
stays the logical one, evicted tokens included, so that positions and masks of the model do not change.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
)

from ..kernels.cache.compact import compact
from ..kernels.cache.replace import replace, turn
from ..kernels.types import Keep, Slot
from ..methods.base import Layer
from .pool import Pool, Sequences

#: Model -> what its `forward` calls the cache.
_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def cache_argument(model: nn.Module) -> str:
    """What the model's `forward` calls its cache: `cache` from transformers 5.24 on, `past_key_values` before.

    Modelling code that comes with a model may be of another age than transformers. A wrapper that takes any argument
    passes it on to a model of the installed transformers.
    """
    if model not in _names:
        known = inspect.signature(model.forward).parameters
        _names[model] = next((name for name in ("cache", "past_key_values") if name in known), generation_argument())
    return _names[model]


@cache
def generation_argument() -> str:
    """What `generate` of the installed transformers calls the cache; it passes it on under the model's own name."""
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in known else "past_key_values"


def autocast(states: Tensor) -> Tensor:
    """States as torch's own attention takes them: under autocast in its dtype, else as they are.

    Casting once where they are kept gives what casting at each reading gives.
    """
    device = states.device.type
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


def same_memory(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> bool:
    """Whether keys and values are the same tensors; their numbers are not looked at."""
    return all(a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in zip(left, right, strict=True))


class CacheLayer(DynamicLayer):
    """A full-attention layer that writes new tokens into a pool, instead of concatenating.

    Until the layer is closed `keys` and `values` are views `(B, H_kv, length, D)` of the pool; then they are empty.

    Args:
        reserve: tokens that are expected after the prompt.
        evicts: whether the prompt's storage will be replaced by a smaller one; then it gets no room of its own.
        pool: where what stays after the prefill is stored; its own without one.
        prompt: tokens of the whole prompt, should it come in chunks.
    """

    def __init__(self, reserve: int = 0, evicts: bool = False, pool: Pool | None = None, prompt: int = 0):
        super().__init__()
        self.reserve, self.evicts, self.prompt = reserve, evicts, prompt
        self.pool = Pool() if pool is None else pool
        #: What is held once the layer is closed.
        self.sequences: Sequences | None = None
        #: Tokens of an answer between two evictions, if any, and those since the last one.
        self.every: int | None = None
        self.fresh = 0
        #: Then also which layer this is, and the query of the newest token `(S, G, 1, D)`.
        self.newest: tuple[Layer, Tensor] | None = None
        #: The keys and values that the model was given last.
        self.given: tuple[Tensor, Tensor] | None = None
        self._logical = 0
        #: The rectangle: its flat storages and the first entry there, and the tokens each head has room for.
        self._flat: tuple[Tensor, Tensor, int] | None = None
        self._capacity = 0

    def get_seq_length(self) -> int:
        """Tokens so far, evicted ones included."""
        return self._logical if self.sequences is not None else super().get_seq_length()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `(B, H_kv, new, D)` and return all of both; once closed, hand the new ones through."""
        key_states, value_states = autocast(key_states), autocast(value_states)
        if self.sequences is None:
            self._write(key_states, value_states)
            self.given = self.keys, self.values
        else:
            self._logical += key_states.shape[-2]
            self.fresh += key_states.shape[-2]
            self.given = key_states, value_states
        return self.given

    def gave(self, key: Tensor, value: Tensor) -> bool:
        """Whether these lie where what the model was given last lies; True once that has been evicted."""
        return self.given is None or same_memory(self.given, (key, value))

    # --- the rectangle -----------------------------------------------------------------------------------------

    def _write(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        if self._flat is None:
            self._begin(total, key_states, value_states)
        elif self._capacity < total:
            # A quarter more when generation outgrows what was expected.
            self._enlarge(total - held + max(256, total // 4))
        keys, values = self._rectangle(self._flat[0]), self._rectangle(self._flat[1])
        keys[..., held:total, :] = key_states
        values[..., held:total, :] = value_states
        self.keys, self.values = keys[..., :total, :], values[..., :total, :]

    def _begin(self, total: int, keys: Tensor, values: Tensor) -> None:
        """Room for the whole prompt, and for what is known to come where it stays."""
        room = max(0, self.prompt - total) + (0 if self.evicts else self.reserve)
        self._rows, self._heads, self._capacity = keys.shape[0], keys.shape[1], total + room
        # What will be evicted takes no room where its rest will lie.
        pool = Pool() if self.evicts else self.pool
        first = pool.take(self._rows * self._heads * self._capacity, keys, values)
        self._flat = pool.keys, pool.values, first

    def _enlarge(self, room: int) -> None:
        pool = Pool(self.pool.slots, self.pool.page_size)
        pool.keys, pool.values = self._flat[:2]
        sequences = self._as_sequences()
        pool.move([(sequences, 0)], room)
        if not self.evicts:
            self.pool = pool
        self._capacity = self.get_seq_length() + room
        self._flat = pool.keys, pool.values, 0

    def _rectangle(self, flat: Tensor) -> Tensor:
        """The layer's part of the flat storage as `(B, H_kv, capacity, D)`."""
        first = self._flat[2]
        shape = self._rows, self._heads, self._capacity
        return flat[first : first + shape[0] * shape[1] * shape[2]].view(*shape, flat.shape[-1])

    def _as_sequences(self) -> Sequences:
        """What the rectangle holds, without a copy."""
        keys, _, first = self._flat
        number, total = self._rows * self._heads, self.keys.shape[2]
        starts = torch.arange(number, device=keys.device) * self._capacity + first
        lengths = torch.full((number,), total, dtype=torch.int32, device=keys.device)
        return Sequences(starts, lengths, self._heads, total, number * total, self._capacity - total)

    # --- after the prompt --------------------------------------------------------------------------------------

    def close(self, kept: Sequence[Keep | None] | None = None, layer: Layer | None = None) -> None:
        """The prompt is complete: hold sequences from now on, with their state.

        Args:
            kept: for each row what stays of it, or None for all of it; None where nothing is evicted.
            layer: which it is, for keys that are turned to other positions.
        """
        self._logical = self.keys.shape[2]
        self.sequences = self._as_sequences() if kept is None else self._evicted(kept, layer)
        self._flat = self.given = None
        self.keys, self.values = self.keys[..., :0, :].clone(), self.values[..., :0, :].clone()
        self.pool.take_state(self.sequences)

    def _evicted(self, kept: Sequence[Keep | None], layer: Layer | None) -> Sequences:
        """Keep only some tokens of the prompt in each head, in storage of their size."""
        _, heads, total, _ = self.keys.shape
        device = self.keys.device
        every = torch.arange(total, device=device).expand(heads, -1)
        whole = Keep(every, torch.full((heads,), total, device=device), total * heads)
        rows = [whole if row is None else row for row in kept]
        held = sum(row.total for row in rows)
        first = self.pool.take(held + len(rows) * heads * self.reserve, self.keys, self.values)
        counts = torch.cat([row.counts for row in rows])
        ends = (counts + self.reserve).cumsum(0)
        starts = ends - counts - self.reserve + first
        for number, row in enumerate(rows):
            own = starts[number * heads : (number + 1) * heads]
            keys, values = self.keys[number], self.values[number]
            compact(keys, values, row.ids, row.counts, own, self.pool.keys, self.pool.values)
            if row.values is not None:
                replace(self.pool.values, own, row.counts, row.values.to(values.dtype))
            if row.positions is not None:
                ids = row.ids.clamp(0, total - 1)
                replace(self.pool.keys, own, row.counts, turned(keys, ids, row.positions, layer))
        longest = max(min(row.ids.shape[1], total) for row in rows)
        return Sequences(starts, counts.int(), heads, longest, held, self.reserve)

    def ended(self) -> Sequences:
        """What is held behind a prefill, closed or not."""
        return self._as_sequences() if self.sequences is None else self.sequences

    def make_room(self, steps: int) -> None:
        """Let every sequence take so many tokens more."""
        if self.sequences.room < steps:
            self.pool.move([(self.sequences, 0)], steps + max(64, self.sequences.longest // 4))

    def held_bytes(self, row: int) -> tuple[Tensor, int]:
        """Bytes of keys, values and state that each KV head of a row holds `(H_kv,)`, and those of all tokens."""
        keys, values = (self.pool.keys, self.pool.values) if self._flat is None else self._flat[:2]
        size = sum(states.shape[-1] * states.element_size() for states in (keys, values))
        if self.sequences is None:  # all heads hold all tokens: nothing of it is on a device
            return torch.full((self._heads,), self.get_seq_length() * size), self.get_seq_length() * size
        held = self.sequences
        lengths = held.lengths[row * held.heads : (row + 1) * held.heads].long()
        return lengths * size + self.state_bytes(row, self.pool.slots), self.get_seq_length() * size

    def state_bytes(self, row: int, slots: Sequence[Slot]) -> Tensor:
        """Bytes that each KV head of a row has in these slots, once the layer is closed: `(H_kv,)` int64."""
        held, page = self.sequences, max(1, self.pool.page_size)
        lengths = held.lengths[row * held.heads : (row + 1) * held.heads].long()
        entries = {"token": lengths, "page": (lengths + page - 1) // page, "sequence": (lengths > 0).long()}
        return sum((entries[slot.per] * slot.bytes(self.pool.keys) for slot in slots), torch.zeros_like(lengths))

    def storage_bytes(self) -> int:
        """Bytes of all tensors that this layer holds, room to grow included."""
        if self.sequences is not None:
            return self.pool.nbytes()
        held = [self.keys, self.values] if self._flat is None else list(self._flat[:2])
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    # --- going back --------------------------------------------------------------------------------------------

    def state(self) -> Any:
        """What `truncate` needs to come back to the present length."""
        if self.sequences is None:
            return self.get_seq_length()
        if self.every is not None:  # what is held will be moved in place
            return self._logical, self.fresh, copy.copy(self.sequences), self.pool.whole()
        return self._logical, self.sequences.snapshot(), self.pool.snapshot(self.sequences)

    def truncate(self, state: Any) -> None:
        """Forget everything after `state`; the storage stays."""
        if self.sequences is not None and self.every is not None:
            self._logical, self.fresh, sequences, whole = state
            self.sequences = copy.copy(sequences)
            self.pool.put_back(whole)
        elif self.sequences is not None:
            self._logical, sequences, kept = state
            self.sequences.restore(sequences)
            self.pool.restore(self.sequences, kept)
        elif self.is_initialized:  # a model may leave layers of its cache alone
            self.keys, self.values = self.keys[..., :state, :], self.values[..., :state, :]

    # --- beams: they replace `keys` and `values`; everything else has to follow ----------------------------------

    def _choose(self, rows: list[int]) -> None:
        if self.sequences is None:
            # They are tensors of their own now, without room.
            self._rows, self._heads, self._capacity = self.keys.shape[:3]
            self._flat = *(s.reshape(-1, s.shape[-1]) for s in (self.keys.contiguous(), self.values.contiguous())), 0
            return
        held = self.sequences
        order = torch.tensor([row * held.heads + head for row in rows for head in range(held.heads)])
        order = order.to(held.starts.device)
        held.starts, held.lengths = held.starts[order], held.lengths[order]
        held.first, held.place = (None if part is None else part[order] for part in (held.first, held.place))
        held.total = len(order) * held.longest
        if self.newest is not None:
            self.newest = self.newest[0], self.newest[1][order]
        self.pool.move([(held, 0)], held.room)

    def reset(self) -> None:
        super().reset()
        self._flat = self.sequences = self.given = self.newest = None
        self._logical = self._capacity = self.fresh = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._choose(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = self.keys.shape[0]
        super().batch_repeat_interleave(repeats)
        self._choose([row for row in range(rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.arange(self.keys.shape[0], device=indices.device)[indices].tolist()
        super().batch_select_indices(indices)
        self._choose(rows)


class MixedLayer(CacheLayer, LinearAttentionAndFullAttentionLayer):
    """A `CacheLayer` whose layer keeps a recurrent state, too (Falcon-H1): full attention beside a state space.

    Args:
        like: what transformers would take for the layer; unused so far.
    """

    def __init__(self, like: LinearAttentionAndFullAttentionLayer, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.__dict__.update(self._recurrent(like))

    @staticmethod
    def _recurrent(layer: Any) -> dict[str, Any]:
        """A copy of what a layer has that plain full attention has not: such states are written in place."""
        plain = CacheLayer().__dict__
        return {name: copy.deepcopy(part) for name, part in layer.__dict__.items() if name not in plain}

    def state(self) -> Any:
        return super().state(), self._recurrent(self)

    def truncate(self, state: Any) -> None:
        own, recurrent = state
        super().truncate(own)
        self.__dict__.update(copy.deepcopy(recurrent))


def turned(keys: Tensor, ids: Tensor, positions: Tensor, layer: Layer) -> Tensor:
    """The keys of tokens `ids (H_kv, W)` of a prompt, turned from their own positions to others.

    Args:
        keys: `(H_kv, L, D)`; positions: `(H_kv, W)` int64.

    Returns:
        `(H_kv, W, D)`.
    """
    cosines, sines = layer.rotary((positions - ids).flatten())
    # Some embeddings scale keys and queries; the keys are scaled already.
    scale = layer.rotary(ids.new_zeros(1))[0]
    own = keys.gather(1, ids[..., None].expand(-1, -1, keys.shape[-1]))
    shape = *ids.shape, cosines.shape[-1]
    return turn(own, (cosines / scale).reshape(shape), (sines / scale).reshape(shape))


def _ours(like: DynamicLayer, *options: Any) -> CacheLayer:
    """Our layer in the place of one of transformers'."""
    mixed = isinstance(like, LinearAttentionAndFullAttentionLayer)
    return MixedLayer(like, *options) if mixed else CacheLayer(*options)


class SparseCache(Cache):
    """Cache of one prompt, or of its beams.

    Args:
        config: the model's configuration; decides which layers are windowed, linear or full.
        reserve: tokens that are expected after the prompt; storage for them is allocated with the prompt's.
        evicts: whether full-attention layers will be evicted after prefill.
        pools: where each layer stores, by layer; left out, pools of their own that keep `slots` of pages of
            `page_size` keys.
        prompt: tokens of the whole prompt, should it come in chunks.
        longest: tokens that are held at most: a window of as many hides nothing.
    """

    def __init__(
        self,
        config: Any,
        reserve: int = 0,
        evicts: bool = False,
        pools: Sequence[Pool] | None = None,
        prompt: int = 0,
        longest: int | None = None,
        slots: Sequence[Slot] = (),
        page_size: int = 0,
    ):
        layers = DynamicCache(config=config).layers
        if not layers:  # a configuration that does not tell: make a layer whenever one is first used
            super().__init__(layer_class_to_replicate=lambda: CacheLayer(reserve, evicts, Pool(slots, page_size)))
            return
        full = [
            type(x) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)
            # A window of all that the model can hold hides nothing (Phi-3 has such configurations).
            or (type(x) is DynamicSlidingWindowLayer and longest is not None and x.sliding_window >= longest)
            for x in layers
        ]
        own = pools or [Pool(slots, page_size) for _ in layers]
        super().__init__(
            layers=[
                _ours(x, reserve, evicts, pool, prompt) if ours else x
                for ours, x, pool in zip(full, layers, own, strict=True)
            ]
        )

    def logical(self) -> int:
        """Tokens so far in full-attention layers, evicted ones included."""
        return max((layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayer)), default=0)

    def snapshot(self) -> list[Any]:
        """The present state of every layer, for `restore`."""
        return [self._layer_state(layer) for layer in self.layers]

    def restore(self, states: list[Any]) -> None:
        """Go back to a snapshot: everything appended since is forgotten."""
        for layer, state in zip(self.layers, states, strict=True):
            if isinstance(layer, CacheLayer):
                layer.truncate(state)
            else:
                layer.__dict__.update(self._copied(layer, state))

    @classmethod
    def _layer_state(cls, layer: Any) -> Any:
        return layer.state() if isinstance(layer, CacheLayer) else cls._copied(layer, layer.__dict__)

    @staticmethod
    def _copied(layer: Any, state: dict[str, Any]) -> dict[str, Any]:
        # Window layers replace their tensors on update, so references suffice; recurrent states, which a window may
        # have beside it, are written in place and have to be copied.
        return dict(state) if type(layer) is DynamicSlidingWindowLayer else copy.deepcopy(state)

    def storage_bytes(self) -> int:
        """Bytes that the full-attention layers hold, room to grow included."""
        return sum(layer.storage_bytes() for layer in self.layers if isinstance(layer, CacheLayer))
