"""SnapKV (Li et al., NeurIPS 2024) as harmonised by The Sparse Frontier (section 3): a fixed capacity per KV head.

Once the prompt is read, the last queries vote for the keys that they attend to; neighbours of a chosen key score
with it (pooling); what is not chosen is dropped from the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from ...kernels.estimate import window_flops, window_sums
from ...kernels.types import Cost
from ..base import Call, number
from ..presets import CAPACITY, TEN, Parameters
from ..scored import ScoredEviction


@dataclass(frozen=True)
class SnapKV(ScoredEviction):
    """The `capacity` tokens of each KV head with the largest pooled attention (paper: section 3 and Table 3).

    Knobs:
        capacity: tokens that each KV head keeps (on average), forced ones included.
        window: last queries that vote, fewer where the prompt is shorter, unless it is typed.
        kernel: width of the average pooling over keys, odd; zeros are padded at both ends.
        sinks, local: first and last tokens that are always kept: 4 and 128, fewer where a requested sparsity leaves no
            room for them; what is typed is kept.
    """

    name: ClassVar[str] = "snapkv"
    importance: ClassVar[str] = "window of last queries"
    reference: ClassVar[str] = "Li et al., NeurIPS 2024"
    forced: ClassVar[Mapping[str, int]] = {"sinks": 4, "local": 128}
    tiny: ClassVar = {"capacity": 48, "window": 16, "sinks": 2, "local": 8}
    paper: ClassVar = Parameters(TEN, ("capacity",), CAPACITY)

    capacity: int = 1024
    window: int = 256
    kernel: int = 21
    sinks: int | Literal["auto"] = "auto"
    local: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("capacity", self.capacity, 1, math.inf, whole=True, example=1024)
        number("window", self.window, 1, math.inf, whole=True, example=256)
        number("kernel", self.kernel, 1, math.inf, whole=True, example=21)
        if self.sinks != "auto":
            number("sinks", self.sinks, 0, math.inf, whole=True, example=4)
        if self.local != "auto":
            number("local", self.local, 1, math.inf, whole=True, example=128)
        if self.kernel % 2 == 0:
            raise UserError(f"kernel={self.kernel} is even: give an odd width, for example kernel={self.kernel + 1}")

    def check_native(self) -> None:
        """What only matters when the capacity rules: it must exceed the window and hold what is always kept."""
        self.check_window()
        native = self.as_native()
        if self.capacity < native.sinks + native.local:
            raise UserError(
                f"capacity={self.capacity} cannot hold sinks={native.sinks} and local={native.local}, which are always "
                f"kept: give a capacity of at least {native.sinks + native.local}, or smaller sinks and local"
            )

    def check_window(self) -> None:
        """Raise `UserError` unless the capacity exceeds the window."""
        if self.capacity <= self.window:
            raise UserError(
                f"capacity={self.capacity} does not exceed window={self.window}: give a capacity above "
                f"{self.window}, or a smaller window"
            )

    def score(self, call: Call) -> Tensor:
        votes = self.votes(call)
        return F.avg_pool1d(votes[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]

    def votes(self, call: Call) -> Tensor:
        """`(H_kv, L)`: attention of the window's queries, summed over them, averaged over the heads of the group."""
        sums = window_sums(call.query, call.key, self.window, scale=call.scale, softcap=call.softcap, columns=True)
        return sums.columns.reshape(len(call.key), -1, call.length).mean(1)

    def cost(self, call: Call) -> Cost:
        heads, length, dim = call.query.shape
        keys = len(call.key) * length + heads * min(self.window, length)
        return Cost(window_flops(heads, self.window, length, dim), call.query.element_size() * dim * keys)

    def solved(self, length: int) -> dict[str, Any]:
        return {"window": min(self.window, length)}
