"""How the budget of a layer is divided among its heads and rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..base import Budget, Count, Density, Layer


@dataclass(frozen=True)
class Allocation:
    """How the budget of a layer is divided among its heads and rows; `words` names it in the taxonomy."""

    words: str

    def __str__(self) -> str:
        return self.words

    def at(self, budget: Budget, layer: Layer) -> Budget:
        """The budget of one layer, from what all layers have on average."""
        return budget


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same number for every head, and where there are rows for every row."""

    words: str = "uniform"


@dataclass(frozen=True)
class Pooled(Allocation):
    """The heads of a layer compete for its budget; each keeps at least the share `floor` of its own part.

    Attributes:
        floor: the knob that says so.
    """

    words: str = "adaptive per head"
    floor: str = "floor"


@dataclass(frozen=True)
class TopP(Allocation):
    """Each row takes what covers one share of its estimated attention, the same share for all heads of a layer."""

    words: str = "threshold"


@dataclass(frozen=True)
class PerLayer(Allocation):
    """Uniform in a layer, and from layer to layer as `shape` has it.

    Attributes:
        shape: from `(layer, layers)` to that layer's factor; factors average 1.
    """

    words: str = "per layer"
    shape: Callable[[int, int], float] = lambda layer, layers: 1.0

    def at(self, budget: Budget, layer: Layer) -> Budget:
        factor = self.shape(layer.index, layer.count)
        match budget:
            case Density(share):
                return Density(min(1.0, share * factor))
            case Count(number):
                return Count(max(1, round(number * factor)))
        return budget
