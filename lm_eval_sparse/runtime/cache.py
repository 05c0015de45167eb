"""The cache of one batch: preallocated storage for full-attention layers, transformers' own layers elsewhere.

Several continuations of one context are scored from the same cache: `snapshot` and `restore` bring it back to
where the context ended without copying the keys and values of full-attention layers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


class PreallocatedLayer(DynamicLayer):
    """A full-attention layer that writes new tokens into storage allocated ahead, instead of concatenating.

    `keys` and `values` are views `(B, H_kv, length, D)` of that storage.
    """

    def __init__(self, reserve: int = 0):
        super().__init__()
        self.reserve = reserve
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `(B, H_kv, new, D)` and return all of both."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        if self._keys is None or self._keys.shape[-2] < total or self._keys.shape[0] != key_states.shape[0]:
            # Room for what is known to come, or a quarter more when generation outgrows it.
            room = self.reserve if held == 0 else max(256, total // 4)
            self._keys = self._grown(self.keys if held else None, key_states, total + room)
            self._values = self._grown(self.values if held else None, value_states, total + room)
        self._keys[..., held:total, :] = key_states
        self._values[..., held:total, :] = value_states
        self.keys, self.values = self._keys[..., :total, :], self._values[..., :total, :]
        return self.keys, self.values

    @staticmethod
    def _grown(held: Tensor | None, new: Tensor, capacity: int) -> Tensor:
        storage = new.new_empty(*new.shape[:-2], capacity, new.shape[-1])
        if held is not None:
            storage[..., : held.shape[-2], :] = held
        return storage

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens; the storage stays."""
        self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]

    # Beam search and batch selection replace `keys` and `values`; the storage has to follow.
    def _rebuild(self) -> None:
        self._keys = self._values = None

    def reset(self) -> None:
        super().reset()
        self._rebuild()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rebuild()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rebuild()

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rebuild()


class SparseCache(Cache):
    """Cache of one batch of prompts.

    Args:
        config: the model's configuration; decides which layers are windowed, linear or full.
        reserve: tokens that are expected after the prompt; storage for them is allocated with the prompt's.
    """

    def __init__(self, config: Any, reserve: int = 0):
        layers = DynamicCache(config=config).layers
        if not layers:  # a configuration that does not tell: make a layer whenever one is first used
            super().__init__(layer_class_to_replicate=lambda: PreallocatedLayer(reserve))
            return
        super().__init__(layers=[PreallocatedLayer(reserve) if type(x) is DynamicLayer else x for x in layers])

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
        if isinstance(layer, PreallocatedLayer):
            return layer.get_seq_length()
        return cls._copied(layer, layer.__dict__)

    @staticmethod
    def _copied(layer: Any, state: dict[str, Any]) -> dict[str, Any]:
        # Window layers replace their tensors on update, so references suffice; recurrent states are written
        # in place and have to be copied.
        return dict(state) if isinstance(layer, DynamicSlidingWindowLayer) else copy.deepcopy(state)

    def kv_bytes(self, layer: int) -> tuple[int, int]:
        """Bytes of keys and values that one row of this layer holds, and those that a full cache would hold."""
        keys, values = self.layers[layer].keys, self.layers[layer].values
        per_token = keys.shape[1] * (keys.shape[-1] * keys.element_size() + values.shape[-1] * values.element_size())
        return keys.shape[-2] * per_token, self.get_seq_length(layer) * per_token


def position_ids(mask: Tensor) -> Tensor:
    """Positions `(B, L)` of left-padded rows: real tokens count from 0, padding is 0."""
    return torch.clamp(mask.long().cumsum(-1) - 1, min=0)
