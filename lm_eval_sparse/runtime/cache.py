"""The cache of one batch: preallocated storage for full-attention layers, transformers' own layers elsewhere.

Several continuations of one context are scored from the same cache: `snapshot` and `restore` bring it back to
where the context ended without copying the keys and values of full-attention layers.

After eviction a layer holds a different number of tokens in every KV head, one sequence after the other in one flat
storage, and the rectangular storage is gone. The layer's length stays the logical one, evicted tokens included, so
that positions and masks of the model do not change.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..kernels.cache.append import append
from ..kernels.cache.compact import compact
from ..kernels.estimate import update_bounds
from ..kernels.types import PageBounds, RaggedKV

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


class Storage(Protocol):
    """Where a layer takes room for keys and values from, when not from torch itself."""

    def take(self, entries: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        """Room for `entries` keys like `key (…, D)` and values like `value (…, D_v)`.

        Returns:
            The whole flat storage of keys `(N, D)` and of values `(N, D_v)`, and the first entry that is granted.
        """
        ...


class OwnStorage:
    """Room of exactly the size that is asked for."""

    def take(self, entries: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        return key.new_empty(entries, key.shape[-1]), value.new_empty(entries, value.shape[-1]), 0


class RaggedStorage:
    """Keys and values of B x H_kv sequences of their own lengths, each with room to grow.

    Attributes:
        kv: the sequences.
        room: tokens that each sequence can still take, the same for all.
        total: tokens held together, known on the host.
    """

    def __init__(self, kv: RaggedKV, room: int, total: int):
        self.kv, self.room, self.total = kv, room, total

    def append(self, keys: Tensor, values: Tensor, bounds: PageBounds | None) -> None:
        """Append `(B, H_kv, T, D)` to the sequences, and keep the bounds of their pages."""
        steps = keys.shape[-2]
        if self.room < steps:
            self.take(list(range(len(self.kv.starts))), steps + max(64, self.kv.longest // 4))
        lengths = torch.where(self.kv.lengths > 0, self.kv.lengths + steps, 0)
        kv = self.kv = replace(self.kv, lengths=lengths, longest=self.kv.longest + steps)
        append(kv, *(states.reshape(-1, steps, states.shape[-1]) for states in (keys, values)), bounds)
        self.room -= steps
        self.total += steps * len(kv.starts)

    def cut(self, lengths: Tensor, longest: int, room: int, total: int) -> None:
        """Forget tokens: come back to what these numbers were."""
        self.kv = replace(self.kv, lengths=lengths.clone(), longest=longest)
        self.room, self.total = room, total

    def take(self, sequences: Sequence[int], room: int | None = None) -> None:
        """Hold these sequences, in this order; one may be taken several times."""
        old, room = self.kv, self.room if room is None else room
        starts, lengths = old.starts.tolist(), old.lengths.tolist()
        held = [lengths[s] for s in sequences]
        places = torch.tensor([0, *(length + room for length in held)]).cumsum(0).tolist()
        keys, values = (states.new_empty(places[-1], states.shape[-1]) for states in (old.keys, old.values))
        for s, place in zip(sequences, places, strict=False):
            keys[place : place + lengths[s]] = old.keys[starts[s] : starts[s] + lengths[s]]
            values[place : place + lengths[s]] = old.values[starts[s] : starts[s] + lengths[s]]
        self.kv = RaggedKV.of(keys, values, places[:-1], held, old.heads)
        self.room, self.total = room, sum(held)


class PreallocatedLayer(DynamicLayer):
    """A full-attention layer that writes new tokens into storage allocated ahead, instead of concatenating.

    `keys` and `values` are views `(B, H_kv, length, D)` of that storage; after `evict` they are empty.

    Args:
        reserve: tokens that are expected after the prompt.
        evicts: whether the prompt's storage will be replaced by a smaller one; then it gets no room of its own.
        storage: where room for what stays after the prefill comes from.
        prompt: tokens of the whole prompt, should it come in chunks.
    """

    def __init__(self, reserve: int = 0, evicts: bool = False, storage: Storage | None = None, prompt: int = 0):
        super().__init__()
        self.reserve = reserve
        self.prompt = prompt
        self.evicts = evicts
        self.storage = storage or OwnStorage()
        self.ragged: RaggedStorage | None = None
        self.bounds: PageBounds | None = None
        #: Keys of a page when bounds are kept; whoever gave the storage makes them there.
        self.page_size = 0
        #: The keys and values that the model was given last.
        self.given: tuple[Tensor, Tensor] | None = None
        self.hands_over = storage is not None
        #: Padding tokens at the beginning of each row; known from the end of the prefill on.
        self.pads: list[int] = []
        self._logical = 0
        #: The flat storage of a layer that was not evicted, its first entry, and the tokens each head has room for.
        self._flat: tuple[Tensor, Tensor, int] | None = None
        self._capacity = 0

    def get_seq_length(self) -> int:
        """Tokens so far, evicted ones and padding included."""
        return self._logical if self.ragged is not None else super().get_seq_length()

    @property
    def room(self) -> int:
        """Tokens that every sequence can take before storage grows."""
        return self.ragged.room if self.ragged is not None else self._capacity - self.get_seq_length()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `(B, H_kv, new, D)` and return all of both; after eviction the new ones only."""
        self.given = self._updated(autocast(key_states), autocast(value_states))
        return self.given

    def gave(self, key: Tensor, value: Tensor) -> bool:
        """Whether these lie where what the model was given last lies; True once that has been evicted."""
        return self.given is None or same_memory(self.given, (key, value))

    def _updated(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.ragged is not None:
            grows = self.ragged.room < key_states.shape[-2]
            self.ragged.append(key_states, value_states, None if grows else self.bounds)
            if grows and self.bounds is not None:
                self.keep_bounds(self.page_size)
            self._logical += key_states.shape[-2]
            return key_states, value_states
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        if grows := self._flat is None or self._capacity < total:
            self._grow(held, total, key_states, value_states)
        keys, values = self._rectangle(self._flat[0]), self._rectangle(self._flat[1])
        keys[..., held:total, :] = key_states
        values[..., held:total, :] = value_states
        self.keys, self.values = keys[..., :total, :], values[..., :total, :]
        if self.bounds is not None and grows:
            self.keep_bounds(self.page_size)
        elif self.bounds is not None:
            kv = self.view()
            update_bounds(kv, self.bounds, (kv.lengths - key_states.shape[-2]).clamp(min=0))
        return self.keys, self.values

    def _grow(self, held: int, total: int, keys: Tensor, values: Tensor) -> None:
        """Make room for `total` tokens and more, and keep what is held."""
        # Room for what is known to come, or a quarter more when generation outgrows it.
        room = max(256, total // 4)
        if held == 0:
            room = max(0, self.prompt - total) + (0 if self.evicts else self.reserve)
        lasting = held == 0 and not self.evicts
        old = (self.keys, self.values)
        self._rows, self._heads, self._capacity = keys.shape[0], keys.shape[1], total + room
        entries = self._rows * self._heads * self._capacity
        self._flat = (self.storage if lasting else OwnStorage()).take(entries, keys, values)
        for flat, states in zip(self._flat, old, strict=False):
            if held:
                self._rectangle(flat)[..., :held, :] = states

    def _rectangle(self, flat: Tensor) -> Tensor:
        """The layer's part of the flat storage as `(B, H_kv, capacity, D)`."""
        first = self._flat[2]
        shape = self._rows, self._heads, self._capacity
        return flat[first : first + shape[0] * shape[1] * shape[2]].view(*shape, flat.shape[-1])

    # --- after prefill ---------------------------------------------------------------------------------------

    def evict(self, kept: list[tuple[Tensor, Tensor, int] | None]) -> None:
        """Keep only some tokens of the prompt in each head, and give the rest of the memory back.

        Args:
            kept: for each row the ids `(H_kv, W)` of unpadded tokens, how many of each head's are valid `(H_kv,)`, and
                the sum of those; or None to keep the whole row. `pads` must be set.
        """
        heads, total = self.keys.shape[1], self.keys.shape[2]
        device = self.keys.device
        choices = []
        for row, choice in enumerate(kept):
            length = total - self.pads[row]
            if choice is None:
                every = torch.arange(length, device=device).expand(heads, -1)
                choice = every, torch.full((heads,), length, device=device), length * heads
            choices.append(choice)
        held = sum(choice[2] for choice in choices)
        entries = held + len(kept) * heads * self.reserve
        keys, values, first = self.storage.take(entries, self.keys, self.values)
        counts = torch.cat([choice[1] for choice in choices])
        ends = (counts + self.reserve).cumsum(0)
        starts = ends - counts - self.reserve + first
        for row, (indices, own, _) in enumerate(choices):
            states = (part[row, :, self.pads[row] :] for part in (self.keys, self.values))
            compact(*states, indices, own, starts[row * heads : (row + 1) * heads], keys, values)
        longest = max(min(choice[0].shape[1], total) for choice in choices)
        self._logical = total
        kv = RaggedKV(keys, values, starts, counts.int(), longest, heads)
        self.ragged = RaggedStorage(kv, self.reserve, held)
        self._flat = self.given = None
        self.keys, self.values = self.keys[..., :0, :].clone(), self.values[..., :0, :].clone()

    def keep_bounds(self, page_size: int) -> None:
        """From now on keep the bounds of pages of this size. `pads` must be set."""
        self.page_size = page_size
        if self.hands_over:
            return
        kv, room = self.view(), self.room
        pages = (kv.lengths.long() + room + page_size - 1) // page_size
        # How much each head holds stands on the device; what all hold together is known.
        held = len(pages) * kv.longest if self.ragged is None else self.ragged.total
        most = (held + len(pages) * (room + page_size - 1)) // page_size
        low, high = (kv.keys.new_empty(most, kv.keys.shape[-1]) for _ in range(2))
        self.bounds = PageBounds(page_size, low, high, pages.cumsum(0) - pages)
        update_bounds(kv, self.bounds, torch.zeros_like(kv.lengths))

    def view(self) -> RaggedKV:
        """The tokens held, unpadded, as one sequence per row and KV head, without a copy."""
        if self.ragged is not None:
            return self.ragged.kv
        keys, values, first = self._flat
        sequences, total = self._rows * self._heads, self.keys.shape[2]
        starts = torch.arange(sequences, device=keys.device) * self._capacity + first
        lengths = torch.full((sequences,), total, dtype=torch.int32, device=keys.device)
        if any(self.pads):
            pads = torch.tensor(self.pads).to(keys.device).repeat_interleave(self._heads)
            starts, lengths = starts + pads, lengths - pads.int()
        return RaggedKV(keys, values, starts, lengths, total - min(self.pads, default=0), self._heads)

    def held_bytes(self, row: int) -> tuple[Tensor, int]:
        """Bytes of keys, values and page bounds that each KV head of a row holds `(H_kv,)`, and those of all tokens."""
        heads = self.keys.shape[1]
        kv = self.view()
        sizes = [states.shape[-1] * states.element_size() for states in (kv.keys, kv.values)]
        tokens = self.get_seq_length() - self.pads[row]
        lengths = kv.lengths[row * heads : (row + 1) * heads].long()
        held = lengths * sum(sizes)
        if self.page_size:
            held = held + (lengths + self.page_size - 1) // self.page_size * (2 * sizes[0])
        return held, tokens * sum(sizes)

    def storage_bytes(self) -> int:
        """Bytes of all tensors that this layer holds, room to grow included."""
        held = [self.keys, self.values] if self._flat is None else list(self._flat[:2])
        if self.ragged is not None:
            held += [self.ragged.kv.keys, self.ragged.kv.values]
        if self.bounds is not None:
            held += [self.bounds.low, self.bounds.high]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)

    # --- going back ------------------------------------------------------------------------------------------

    def state(self) -> Any:
        """What `truncate` needs to come back to the present length."""
        if self.ragged is None:
            return self.get_seq_length()
        kv = self.ragged.kv
        return self._logical, kv.lengths.clone(), kv.longest, self.ragged.room, self.ragged.total

    def truncate(self, state: Any) -> None:
        """Forget everything after `state`; the storage stays. Bounds of a cut page are redone with its next key."""
        if self.ragged is not None:
            self._logical, lengths, longest, room, total = state
            # Storage that has grown in the meantime has more room than there was.
            grown = self.ragged.kv.longest - longest
            self.ragged.cut(lengths, longest, max(room, self.ragged.room + grown), total)
        elif self.is_initialized:  # a model may leave layers of its cache alone
            self.keys, self.values = self.keys[..., :state, :], self.values[..., :state, :]

    # Beam search and batch selection replace `keys` and `values`; everything else has to follow.
    def _choose(self, rows: list[int]) -> None:
        heads = self.keys.shape[1]
        if self.ragged is None:
            # They are tensors of their own now, without room.
            self._rows, self._heads, self._capacity = self.keys.shape[:3]
            self._flat = *(s.reshape(-1, s.shape[-1]) for s in (self.keys.contiguous(), self.values.contiguous())), 0
        sequences = [row * heads + head for row in rows for head in range(heads)]
        if self.ragged is not None:
            self.ragged.take(sequences)
        if self.pads:
            self.pads = [self.pads[row] for row in rows]
        if self.bounds is not None:
            self.keep_bounds(self.page_size)

    def reset(self) -> None:
        super().reset()
        self._flat = self.ragged = self.bounds = None
        self.pads, self._logical, self._capacity = [], 0, 0

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


class SparseCache(Cache):
    """Cache of one batch of prompts.

    Args:
        config: the model's configuration; decides which layers are windowed, linear or full.
        reserve: tokens that are expected after the prompt; storage for them is allocated with the prompt's.
        evicts: whether full-attention layers will be evicted after prefill.
        storages: where each layer's room comes from, by layer; None for storage of their own.
        prompt: tokens of the whole prompt, should it come in chunks.
        longest: tokens that are held at most: a window of as many hides nothing.
    """

    def __init__(
        self,
        config: Any,
        reserve: int = 0,
        evicts: bool = False,
        storages: Sequence[Storage] | None = None,
        prompt: int = 0,
        longest: int | None = None,
    ):
        layers = DynamicCache(config=config).layers
        if not layers:  # a configuration that does not tell: make a layer whenever one is first used
            super().__init__(layer_class_to_replicate=lambda: PreallocatedLayer(reserve, evicts))
            return
        full = [
            type(x) is DynamicLayer
            # A window of all that the model can hold hides nothing (Phi-3 has such configurations).
            or (type(x) is DynamicSlidingWindowLayer and longest is not None and x.sliding_window >= longest)
            for x in layers
        ]
        own = storages or [None] * len(layers)
        super().__init__(
            layers=[
                PreallocatedLayer(reserve, evicts, storage, prompt) if ours else x
                for ours, x, storage in zip(full, layers, own, strict=True)
            ]
        )

    def snapshot(self) -> list[Any]:
        """The present state of every layer, for `restore`."""
        return [self._layer_state(layer) for layer in self.layers]

    def restore(self, states: list[Any]) -> None:
        """Go back to a snapshot: everything appended since is forgotten."""
        for layer, state in zip(self.layers, states, strict=True):
            if isinstance(layer, PreallocatedLayer):
                layer.truncate(state)
            else:
                layer.__dict__.update(self._copied(layer, state))

    @classmethod
    def _layer_state(cls, layer: Any) -> Any:
        return layer.state() if isinstance(layer, PreallocatedLayer) else cls._copied(layer, layer.__dict__)

    @staticmethod
    def _copied(layer: Any, state: dict[str, Any]) -> dict[str, Any]:
        # Window layers replace their tensors on update, so references suffice; recurrent states are written
        # in place and have to be copied.
        return dict(state) if isinstance(layer, DynamicSlidingWindowLayer) else copy.deepcopy(state)

    def storage_bytes(self) -> int:
        """Bytes that the full-attention layers hold, room to grow included."""
        return sum(layer.storage_bytes() for layer in self.layers if isinstance(layer, PreallocatedLayer))
