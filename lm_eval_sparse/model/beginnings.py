"""Prompts that begin alike: several questions on one text, from any task. What they share is prefilled once.

The cells of a sweep that run in one process share beginnings in the same way (`kept.Shelf`).

Only where the whole prefill is dense and nothing is evicted: a prefill or eviction method looks at a prompt as a whole.
A long prompt is always read in two passes then, cut at a place that its length decides, so that it gets the same
numbers, to the bit, whether the first of them had to be made for it or was there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.accounting import PhaseCounts, RowCounts
from ..runtime.cache import CacheLayer, SparseCache
from .kept import shelf_of

if TYPE_CHECKING:
    from .lm import SparseHFLM

#: Prompts of more tokens are cut: at a multiple of STEP, with at least LEAST tokens behind it.
LONG, STEP, LEAST = 4096, 1024, 256


@dataclass
class Beginning:
    """The first tokens of a prompt, what a model keeps of them in each layer, and what reading them was counted as."""

    tokens: list[int]
    layers: list[Any]
    counts: PhaseCounts


class Beginnings:
    """Prefills prompts of a `SparseHFLM`, and keeps the beginning of one for the next."""

    def __init__(self, lm: SparseHFLM):
        self.lm = lm
        self._kept: Beginning | None = None
        #: Prompts whose beginning an evaluation before this one had read.
        self.shared = 0

    def cut(self, length: int) -> int:
        """Where a prompt of `length` tokens is cut; 0 for nowhere."""
        runtime = self.lm.runtime
        plan = runtime.plan
        whole = plan.prefill is not None or plan.eviction is not None or (plan.decode and plan.decode.method.looks_back)
        if (
            length <= LONG
            or whole
            or runtime.masked
            or runtime.uncached
            or runtime.lenders
            or self.lm.lengths.stretches
        ):
            return 0
        return (length - LEAST) // STEP * STEP

    def order(self, prompt: list[int]) -> tuple[int, list[int], int, list[int]]:
        """Sorts prompts so that those that begin alike follow each other, the longest first."""
        at = self.cut(len(prompt))
        return -(at or len(prompt)), prompt[:at], -len(prompt), prompt

    def there(self, before: list[int], prompt: list[int]) -> int:
        """Tokens of a prompt that are not read again when it follows another one."""
        if before == prompt:
            return len(prompt)
        at = self.cut(len(prompt))
        return at if at and self.cut(len(before)) == at and before[:at] == prompt[:at] else 0

    def prefill(self, prompt: list[int], cache: SparseCache, counts: RowCounts, following: list[int] | None) -> Tensor:
        """Logits `(1, 1, V)` behind a prompt, while it runs.

        Args:
            following: the prompt that will be read next, if any.
        """
        lm, at = self.lm, self.cut(len(prompt))
        if not at:
            self._kept = None
            return self._read(prompt, 0, cache)
        kept, self._kept = self._kept, None
        shelf = shelf_of(lm.model)
        if (kept is None or kept.tokens != prompt[:at]) and shelf is not None:
            kept = shelf.get(prompt[:at])
            self.shared += kept is not None
        if kept is not None and kept.tokens == prompt[:at]:
            for layer, state in zip(cache.layers, kept.layers, strict=True):
                if isinstance(layer, CacheLayer):
                    layer.update(*state)
                else:
                    layer.__dict__.update(state)
            counts.phase("prefill")
            counts.phases["prefill"] = copy.deepcopy(kept.counts)
            lm.runtime.resume(at)
        else:
            kept = None
            self._read(prompt[:at], 0, cache)
            if shelf is not None:
                size, free = _size(cache), lm.decoding.memory.free()
                kept = shelf.put(prompt[:at], size, free, lambda: self._copy(prompt[:at], cache, counts))
        if following is not None and self.there(prompt, following) == at:
            self._kept = kept or self._keep(prompt[:at], cache, counts)
        return self._read(prompt[at:], at, cache)

    def _keep(self, tokens: list[int], cache: SparseCache, counts: RowCounts) -> Beginning | None:
        """A copy of what has been read, where there is room for one."""
        if cache.storage_bytes() > self.lm.decoding.memory.free() // 2:
            return None
        return self._copy(tokens, cache, counts)

    @staticmethod
    def _copy(tokens: list[int], cache: SparseCache, counts: RowCounts) -> Beginning:
        layers = [
            (layer.keys.clone(), layer.values.clone()) if isinstance(layer, CacheLayer) else _own(layer)
            for layer in cache.layers
        ]
        return Beginning(tokens, layers, copy.deepcopy(counts.phase("prefill")))

    def _read(self, tokens: Sequence[int], first: int, cache: SparseCache) -> Tensor:
        ids = torch.tensor([tokens], device=self.lm.device)
        positions = None if not first else torch.arange(first, first + len(tokens), device=self.lm.device)[None]
        return self.lm.forward(ids, cache=cache, positions=positions, keep=1)


def _own(layer: Any) -> dict[str, Any]:
    """The state of a layer that is none of ours. A window is a view, which would keep the whole prompt alive."""
    return {name: part.clone() if isinstance(part, Tensor) else part for name, part in vars(layer).items()}


def _size(cache: SparseCache) -> int:
    """Bytes of a copy of what a cache holds."""
    tensors = (
        (layer.keys, layer.values) if isinstance(layer, CacheLayer) else vars(layer).values() for layer in cache.layers
    )
    return sum(part.numel() * part.element_size() for own in tensors for part in own if isinstance(part, Tensor))


__all__ = ["Beginnings"]
