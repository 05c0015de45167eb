"""What a method holds on to: bytes of tensors that it makes, at their peak, and those that outlive it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """While this is entered, memory of tensors that operations return is counted, until it is given back.

    What an operation needs within itself is not seen, nor what is not made by torch.

    Attributes:
        now: bytes that are held, after the end too; peak: the most there have been since the last `mark`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._given: set[int] = set()

    def give(self, *tensors: Tensor) -> None:
        """Leave these out: they are somebody else's."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            self._given.add(storage._cdata)
            weakref.finalize(storage, self._given.discard, storage._cdata)  # something else may lie there then

    def mark(self) -> None:
        """Begin a new peak."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._given:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
