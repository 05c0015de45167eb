"""Ada-SnapKV (Feng et al., 2024) as harmonised by The Sparse Frontier (section 3): capacity pooled over a layer.

SnapKV whose KV heads compete for the layer's capacity: heads with scattered attention keep more than heads that
look at few keys, so their caches have different lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...kernels.estimate import window_sums
from ..base import Call, number
from ..scored import Allocation, Pooled
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
    reference: ClassVar[str] = "Feng et al., 2024"
    allocation: ClassVar[Allocation] = Pooled()

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        number("floor", self.floor, 0, 1, example=0.2)

    def votes(self, call: Call) -> Tensor:
        """`(H_kv, L)`: the largest attention weight of any query of the window and any head of the group."""
        sums = window_sums(call.query, call.key, self.window, scale=call.scale, softcap=call.softcap, peaks=True)
        return sums.peaks.reshape(len(call.key), -1, call.length).amax(1)
