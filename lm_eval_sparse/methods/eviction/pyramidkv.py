"""PyramidKV (Cai et al., 2024): SnapKV with more room in the first layers, where attention is scattered.

Budgets fall linearly from layer to layer, as in the paper (section 4.2): the last layer has 1 / beta of the mean, the
first as much above the mean as the last is below. Where the first would have more than the prompt has, it has all of
it, and the slope is what leaves the mean as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ...errors import UserError
from ..base import Budget, Call, Count, Density, Layer, number
from ..scored import Allocation, PerLayer
from .snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's scores, and `capacity` tokens of each KV head in the mean over the layers.

    Knobs:
        beta: how much less than the mean the last layer keeps, from 1 (as much).
        capacity, window, kernel: as in `snapkv`.
        sinks, local: first and last tokens that are always kept: 4 and 128, and no more than a quarter of what a layer
            keeps; what is typed is kept in every layer, or refused.
    """

    name: ClassVar[str] = "pyramidkv"
    reference: ClassVar[str] = "Cai et al., 2024"
    allocation: ClassVar[Allocation] = PerLayer()
    tiny: ClassVar = {"capacity": 60, "window": 16, "sinks": 2, "local": 8, "beta": 2}
    paper: ClassVar = None

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("beta", self.beta, 1, 1e6, example=20)

    # What is always kept follows the capacity of each layer.

    def check_native(self) -> None:
        self.check_window()
        if self._typed() > self.capacity / self.beta:
            raise UserError(
                f"capacity={self.capacity} leaves {self.capacity / self.beta:.3g} tokens to the last layer (beta="
                f"{self.beta:g}), which cannot hold the {self._typed()} of sinks and local that are always kept: give "
                "a larger capacity, a smaller beta, or leave sinks and local out"
            )

    def _typed(self) -> int:
        """First and last tokens that were asked for; others follow what a layer keeps."""
        return sum(count for count in (self.sinks, self.local) if count != "auto")

    def largest_sparsity(self, length: int) -> float:
        """Where the last layer, which keeps the least, just holds what was asked for."""
        forced = self._typed() / length
        share = self.beta * forced
        if share > self.beta / (2 * self.beta - 1):  # the first layer keeps all, so that the last keeps 2 share - 1
            share = (1 + forced) / 2
        return max(0.0, 1 - share)

    def as_native(self) -> PyramidKV:
        return self

    def knobs_for(self, sparsity: float, length: int, layer: Layer | None = None) -> PyramidKV:
        return replace(self, capacity=max(1, round((1 - sparsity) * length)))

    def kept_ends(self, capacity: int) -> tuple[int, int]:
        own = self.ends(capacity)
        return own["sinks"], own["local"]

    def layer_budget(self, call: Call, length: int) -> Budget:
        match call.budget:
            case Density(mean):
                share = mean
            case Count(number):
                share = min(1.0, number / length)
            case other:
                raise TypeError(f"{other} is no number of tokens")
        spread = min(1 - 1 / self.beta, 1 / share - 1)
        return PerLayer(shape=lambda layer, layers: slope(layer, layers, spread)).at(call.budget, call.layer)


def slope(layer: int, layers: int, spread: float) -> float:
    """Linear from 1 + spread in the first layer to 1 - spread in the last."""
    return 1.0 if layers < 2 else 1 + spread * (1 - 2 * layer / (layers - 1))
