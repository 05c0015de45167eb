"""Ada-SnapKV (Feng et al., 2024) as harmonised by The Sparse Frontier (section 3): capacity pooled over a layer.

SnapKV whose KV heads compete for the layer's capacity: heads with scattered attention keep more than heads that
look at few keys, so their caches have different lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.estimate import window_sums
from ..base import number, top
from .snapkv import SnapKV


@dataclass(frozen=True)
class AdaSnapKV(SnapKV):
    """The layer's `capacity * H_kv` tokens with the largest pooled attention, and a floor for each KV head.

    Knobs:
        floor: share of `capacity` that each KV head keeps at least (and never less than the forced tokens).
        capacity, window, kernel, sinks, local: as in `snapkv`.
    """

    name: ClassVar[str] = "ada_snapkv"
    importance: ClassVar[str] = "window of last queries, largest"
    allocation: ClassVar[str] = "adaptive per head"
    paper: ClassVar[str] = "Feng et al., 2024"

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        number("floor", self.floor, 0, 1, example=0.2)

    def _scores(self, query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
        """`(H_kv, L)`: the largest attention weight of any query of the window and any head of the group."""
        peaks = window_sums(query, key, self.window, scale=scale, softcap=softcap, peaks=True).peaks
        return peaks.reshape(key.shape[0], -1, key.shape[1]).amax(1)

    def _keep(self, pooled: Tensor) -> tuple[Tensor, Tensor, int]:
        heads, length = pooled.shape
        capacity = min(self.capacity, length)
        least = min(capacity, max(int(self.floor * capacity), self.sinks + self.local))
        own = top(pooled, least)
        # The rest of the layer's capacity goes to the largest scores of any head. Of equals the more recent
        # position is taken, then the lower head: that is the order of this transposed and flipped list.
        rest = pooled.masked_fill(own, -math.inf).T.flip(0).flatten()
        order = rest.sort(descending=True, stable=True).indices[: (capacity - least) * heads]
        more = torch.zeros_like(rest, dtype=torch.bool).scatter_(0, order, True)
        kept = own | more.reshape(length, heads).flip(0).T
        # One head may take all that the others may leave.
        return kept, kept.sum(-1), min(length, least + (capacity - least) * heads)
