"""The cache of one batch: preallocated storage for full-attention layers, transformers' own layers elsewhere.

Several continuations of one context are scored from the same cache: `snapshot` and `restore` bring it back to
where the context ended without copying the keys and values of full-attention layers.

After eviction a layer holds a different number of tokens in every KV head, one sequence after the other in one flat
storage, and the rectangular storage is gone. The layer's length stays the logical one, evicted tokens included, so
that positions and masks of the model do not change.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..kernels.estimators import PageBounds
from ..kernels.ragged import RaggedKV, compact


class RaggedStorage:
    """Keys and values of B x H_kv sequences of their own lengths, each with room to grow."""

    def __init__(self, keys: Tensor, values: Tensor, lengths: list[int], room: int):
        self.keys, self.values = keys, values
        self.lengths, self.room = list(lengths), [room] * len(lengths)
        self._place()

    def _place(self) -> None:
        ends = torch.tensor([0, *map(sum, zip(self.lengths, self.room, strict=True))]).cumsum(0).tolist()
        self.starts = ends[:-1]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append `(B, H_kv, T, D)` to the sequences."""
        steps = keys.shape[-2]
        if min(self.room) < steps:
            self._grow(steps + max(64, max(self.lengths) // 4))
        ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
        index = torch.tensor(ends, device=keys.device)[:, None] + torch.arange(steps, device=keys.device)
        self.keys[index] = keys.reshape(*index.shape, -1)
        self.values[index] = values.reshape(*index.shape, -1)
        self.resize([length + steps for length in self.lengths])

    def resize(self, lengths: list[int]) -> None:
        """Let the sequences have these lengths within their room: forget tokens, or own what was written."""
        self.room = [room + old - new for room, old, new in zip(self.room, self.lengths, lengths, strict=True)]
        self.lengths = list(lengths)

    def _grow(self, room: int) -> None:
        self.take(list(range(len(self.lengths))), room)

    def take(self, sequences: list[int], room: int | None = None) -> None:
        """Hold these sequences, in this order; one may be taken several times."""
        old = [(self.starts[s], self.lengths[s], self.room[s]) for s in sequences]
        self.lengths = [length for _, length, _ in old]
        self.room = [left if room is None else room for _, _, left in old]
        keys, values, starts = self.keys, self.values, [start for start, _, _ in old]
        self._place()
        size = sum(self.lengths) + sum(self.room)
        self.keys, self.values = (states.new_empty(size, states.shape[-1]) for states in (keys, values))
        for source, target, length in zip(starts, self.starts, self.lengths, strict=True):
            self.keys[target : target + length] = keys[source : source + length]
            self.values[target : target + length] = values[source : source + length]


class PreallocatedLayer(DynamicLayer):
    """A full-attention layer that writes new tokens into storage allocated ahead, instead of concatenating.

    `keys` and `values` are views `(B, H_kv, length, D)` of that storage; after `evict` they are empty.

    Args:
        reserve: tokens that are expected after the prompt.
        evicts: whether the prompt's storage will be replaced by a smaller one; then it gets no room of its own.
    """

    def __init__(self, reserve: int = 0, evicts: bool = False):
        super().__init__()
        self.reserve = reserve
        self.evicts = evicts
        self.ragged: RaggedStorage | None = None
        self.bounds: PageBounds | None = None
        #: Padding tokens at the beginning of each row; known from the end of the prefill on.
        self.pads: list[int] = []
        self._logical = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def get_seq_length(self) -> int:
        """Tokens so far, evicted ones and padding included."""
        return self._logical if self.ragged is not None else super().get_seq_length()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `(B, H_kv, new, D)` and return all of both; after eviction the new ones only."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.ragged is not None:
            before = list(self.ragged.lengths)
            self.ragged.append(key_states, value_states)
            self._logical += key_states.shape[-2]
            self._update_bounds(before)
            return key_states, value_states
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        if self._keys is None or self._keys.shape[-2] < total or self._keys.shape[0] != key_states.shape[0]:
            # Room for what is known to come, or a quarter more when generation outgrows it.
            room = (0 if self.evicts else self.reserve) if held == 0 else max(256, total // 4)
            self._keys = self._grown(self.keys if held else None, key_states, total + room)
            self._values = self._grown(self.values if held else None, value_states, total + room)
        self._keys[..., held:total, :] = key_states
        self._values[..., held:total, :] = value_states
        self.keys, self.values = self._keys[..., :total, :], self._values[..., :total, :]
        if self.bounds is not None:
            heads = self.keys.shape[1]
            self._update_bounds([held - pad for pad in self.pads for _ in range(heads)])
        return self.keys, self.values

    @staticmethod
    def _grown(held: Tensor | None, new: Tensor, capacity: int) -> Tensor:
        storage = new.new_empty(*new.shape[:-2], capacity, new.shape[-1])
        if held is not None:
            storage[..., : held.shape[-2], :] = held
        return storage

    # --- after prefill ---------------------------------------------------------------------------------------

    def evict(self, kept: list[tuple[Tensor, list[int]] | None]) -> None:
        """Keep only some tokens of the prompt in each head, and give the rest of the memory back.

        Args:
            kept: for each row the ids `(H_kv, W)` of unpadded tokens and how many of each head's are valid, or None
                to keep the whole row. `pads` must be set.
        """
        heads, total = self.keys.shape[1], self.keys.shape[2]
        parts: list[tuple[Tensor, Tensor]] = []
        lengths: list[int] = []
        for row, choice in enumerate(kept):
            pad = self.pads[row]
            if choice is None:
                indices = torch.arange(total - pad, device=self.keys.device).expand(heads, -1)
                choice = (indices, [total - pad] * heads)
            indices, counts = choice
            parts.append(
                tuple(
                    compact(states[row, :, pad:], indices, counts, self.reserve) for states in (self.keys, self.values)
                )
            )
            lengths += counts
        keys, values = (torch.cat(found) if len(found) > 1 else found[0] for found in zip(*parts, strict=True))
        self._logical = total
        self.ragged = RaggedStorage(keys, values, lengths, self.reserve)
        self._keys = self._values = None
        self.keys, self.values = self.keys[..., :0, :].clone(), self.values[..., :0, :].clone()

    def keep_bounds(self, page_size: int) -> None:
        """From now on keep the bounds of pages of this size. `pads` must be set."""
        view = self.view()
        pages = -(-(max(view.lengths) + self.reserve) // page_size)
        self.bounds = PageBounds.empty(len(view.lengths), pages, view.keys, page_size)
        self._update_bounds([0] * len(view.lengths))

    def _update_bounds(self, before: list[int]) -> None:
        if self.bounds is not None:
            view = self.view()
            self.bounds.update(view.keys, view.starts, before, view.lengths)

    def view(self) -> RaggedKV:
        """The tokens held, unpadded, as one sequence per row and KV head, without a copy."""
        if self.ragged is not None:
            return RaggedKV(self.ragged.keys, self.ragged.values, self.ragged.starts, self.ragged.lengths)
        keys, values = (self.keys, self.values) if self._keys is None else (self._keys, self._values)
        rows, heads, capacity, _ = keys.shape
        total = self.keys.shape[2]
        starts = [(row * heads + head) * capacity + self.pads[row] for row in range(rows) for head in range(heads)]
        lengths = [total - self.pads[row] for row in range(rows) for _ in range(heads)]
        return RaggedKV(keys.reshape(-1, keys.shape[-1]), values.reshape(-1, values.shape[-1]), starts, lengths)

    def held_bytes(self, row: int) -> tuple[list[int], int]:
        """Bytes of keys, values and page bounds that each KV head of a row holds, and those of all its tokens."""
        heads = self.keys.shape[1]
        storage = self.ragged or self
        sizes = [states.shape[-1] * states.element_size() for states in (storage.keys, storage.values)]
        tokens = self.get_seq_length() - self.pads[row]
        lengths = [tokens] * heads if self.ragged is None else self.ragged.lengths[row * heads : (row + 1) * heads]
        page = 0 if self.bounds is None else self.bounds.page_size
        metadata = [2 * sizes[0] * -(-length // page) if page else 0 for length in lengths]
        return [length * sum(sizes) + extra for length, extra in zip(lengths, metadata, strict=True)], tokens * sum(
            sizes
        )

    def storage_bytes(self) -> int:
        """Bytes of all tensors that this layer holds, room to grow included."""
        tensors = [
            self.keys if self._keys is None else self._keys,
            self.values if self._values is None else self._values,
        ]
        if self.ragged is not None:
            tensors += [self.ragged.keys, self.ragged.values]
        if self.bounds is not None:
            tensors += [self.bounds.low, self.bounds.high]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    # --- going back ------------------------------------------------------------------------------------------

    def state(self) -> Any:
        """What `truncate` needs to come back to the present length."""
        return (self._logical, list(self.ragged.lengths)) if self.ragged is not None else self.get_seq_length()

    def truncate(self, state: Any) -> None:
        """Forget everything after `state`; the storage stays. Bounds of a cut page are redone with its next key."""
        if self.ragged is not None:
            self._logical, lengths = state
            self.ragged.resize(lengths)
        else:
            self.keys, self.values = self.keys[..., :state, :], self.values[..., :state, :]

    # Beam search and batch selection replace `keys` and `values`; everything else has to follow.
    def _choose(self, rows: list[int]) -> None:
        self._keys = self._values = None
        heads = self.keys.shape[1]
        sequences = [row * heads + head for row in rows for head in range(heads)]
        if self.ragged is not None:
            self.ragged.take(sequences)
        if self.bounds is not None:
            index = torch.tensor(sequences, device=self.bounds.low.device)
            self.bounds.low, self.bounds.high = self.bounds.low[index], self.bounds.high[index]
        if self.pads:
            self.pads = [self.pads[row] for row in rows]

    def reset(self) -> None:
        super().reset()
        self._keys = self._values = self.ragged = self.bounds = None
        self.pads, self._logical = [], 0

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
    """

    def __init__(self, config: Any, reserve: int = 0, evicts: bool = False):
        layers = DynamicCache(config=config).layers
        if not layers:  # a configuration that does not tell: make a layer whenever one is first used
            super().__init__(layer_class_to_replicate=lambda: PreallocatedLayer(reserve, evicts))
            return
        longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        full = [
            type(x) is DynamicLayer
            # A window of all that the model can hold hides nothing (Phi-3 has such configurations).
            or (type(x) is DynamicSlidingWindowLayer and longest is not None and x.sliding_window >= longest)
            for x in layers
        ]
        super().__init__(
            layers=[PreallocatedLayer(reserve, evicts) if ours else x for ours, x in zip(full, layers, strict=True)]
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


def position_ids(mask: Tensor) -> Tensor:
    """Positions `(B, L)` of left-padded rows: real tokens count from 0, padding is 0."""
    return torch.clamp(mask.long().cumsum(-1) - 1, min=0)
