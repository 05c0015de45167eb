"""`State`: what a method keeps of a layer between steps, in tensors whose memory the runtime owns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """One named tensor of a state.

    Attributes:
        name: what `State` finds it by.
        per: what it has an entry for: each `page` or `token` of each sequence, or each `sequence`.
        shape: of an entry; a dimension of -n is that of the keys over n, rounded up: -1 the same, -2 two to a number.
        dtype: of its numbers; None for that of the keys.
        derived: whether it follows from the keys alone, so that taking in a key again puts it right: nothing of it has
            to be kept to come back to an earlier length.
    """

    name: str
    per: Literal["sequence", "page", "token"]
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    derived: bool = False

    def empty(self, entries: int, keys: Tensor) -> Tensor:
        """Room for so many entries, beside keys `(N, D)`. What nobody has written is undefined."""
        shape = (size if size >= 0 else -(keys.shape[-1] // size) for size in self.shape)
        return keys.new_empty((entries, *shape), dtype=self.dtype or keys.dtype)

    def bytes(self, keys: Tensor) -> int:
        """Bytes of an entry beside these keys."""
        return self.empty(1, keys).nbytes


@dataclass(frozen=True)
class State:
    """The state of S sequences of one layer. Tensors are written in place, and keep their places.

    Attributes:
        tensors: by name of the slot. `page`: `(M, …)`, page p of sequence s is entry `first[s] + p`. `token`: `(N, …)`,
            beside the keys: token i of sequence s is entry `kv.starts[s] + i`. `sequence`: entry `place[s]`.
        page_size: keys per page.
        first, place: `(S,)` int64.
        tails: `(S,)` int64 where sequences share their beginnings (`RaggedKV.splits`), else None: page p behind the
            split is entry `tails[s] + p`, and token i entry `kv.tails[s] + i`.
    """

    tensors: Mapping[str, Tensor]
    page_size: int
    first: Tensor
    place: Tensor
    tails: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]
