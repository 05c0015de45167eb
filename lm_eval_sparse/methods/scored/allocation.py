"""How the budget of a layer is divided among its heads and rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import UserError
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


def checked(
    score: Any,
    shape: tuple[int | tuple[int, ...], ...],
    least: float | None = None,
    *,
    undefined: bool = False,
) -> Tensor:
    """A method's scores, as fp32 without NaN.

    On a CPU a NaN, or a score below `least`, is an error; on a GPU, which is not waited for, it counts as the least
    that there is.

    Args:
        shape: what each dimension has to be, or one of what.
        undefined: whether some scores are of nothing that is there, so that they may be anything.

    Raises:
        ValueError: such a score, or a tensor that is none of scores.
    """
    if not isinstance(score, Tensor):
        raise ValueError(f"score returned {type(score).__name__}; expected a tensor")
    accepted = [size if isinstance(size, tuple) else (size,) for size in shape]
    if score.dim() != len(shape) or any(n not in sizes for n, sizes in zip(score.shape, accepted, strict=True)):
        words = ", ".join(" or ".join(map(str, dict.fromkeys(sizes))) for sizes in accepted)
        raise ValueError(f"score returned {tuple(score.shape)}; expected ({words})")
    if not score.dtype.is_floating_point:
        raise ValueError(f"score returned {score.dtype}; expected torch.float32")
    low = -math.inf if least is None else least
    if undefined:  # what scores are chosen from knows
        return score.float()
    if score.device.type == "cpu":
        if bool(score.isnan().any()):
            raise ValueError("score returned NaN")
        if least is not None and score.numel() and float(score.min()) < least:
            raise ValueError(f"score returned {float(score.min()):.3g}; expected shares of at least {least:g}")
        return score.float()
    return score.float().nan_to_num(nan=low, posinf=math.inf, neginf=-math.inf).clamp(min=low)


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
        shape: from `(layer, layers)` to that layer's factor, counting the layers that may be sparse. The mean over them
            is 1, so that the promise holds on average; a sparsity at which a layer would keep more than it has is
            refused.
    """

    words: str = "per layer"
    shape: Callable[[int, int], float] = lambda layer, layers: 1.0

    def at(self, budget: Budget, layer: Layer) -> Budget:
        place, count = layer.place
        factors = [self.shape(index, count) for index in range(count)]
        if min(factors) < 0 or abs(sum(factors) - count) > 1e-6 * count:
            raise ValueError(f"factors of {count} layers are {factors}; expected their mean to be 1, none below 0")
        factor = factors[place]
        match budget:
            case Density(share):
                if share * max(factors) > 1 + 1e-9:
                    raise UserError(
                        f"a layer would keep {share * max(factors):.3g} times what it has: with a budget for each "
                        f"layer the sparsity must be at least {1 - 1 / max(factors):.3f}"
                    )
                return Density(min(1.0, share * factor))
            case Count(number):
                return Count(max(1, round(number * factor)))
        return budget
