"""What every method is: knobs, a place in the taxonomy, and a `select` that returns a selection.

A method knows scores and blocks. It never computes attention output, and it knows nothing of models, caches,
lm-eval or which kernel will run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.layout import BlockLayout


@dataclass(frozen=True)
class Geometry:
    """What a method may know of the attention layers it serves: query heads, KV heads, head dimension."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Selection:
    """The outcome of `select` for one layer and one unpadded row.

    Attributes:
        layout: key blocks per (query head, query block).
        selected_pairs: `(H,)` int64, pairs of the method's own pattern inside the causal triangle. Equal to the
            executed ones where the method selects whole tiles.
        estimator_flops: floating-point operations spent on selecting (multiply and add count as two).
        estimator_bytes: bytes of queries, keys and values read to select.
        knobs: the knobs as solved for this call, plain numbers, for the results.
    """

    layout: BlockLayout
    selected_pairs: Tensor
    estimator_flops: int
    estimator_bytes: int
    knobs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """Base of all methods: subclasses are frozen dataclasses whose fields are the native knobs.

    Class attributes give the name, the phase, the place in the taxonomy of "The Sparse Frontier" (section 2)
    and the paper; the documentation is generated from them.
    """

    name: ClassVar[str]
    phase: ClassVar[str]
    unit: ClassVar[str]
    importance: ClassVar[str]
    budget: ClassVar[str]
    kv: ClassVar[str]
    paper: ClassVar[str]

    @classmethod
    def knobs(cls) -> dict[str, Any]:
        """Native knobs and their defaults."""
        return {f.name: f.default for f in fields(cls) if f.init}


class PrefillMethod(Method):
    """A method for the prefill phase."""

    phase: ClassVar[str] = "prefill"

    def knobs_for(self, sparsity: float, length: int, geometry: Geometry) -> PrefillMethod:
        """The method with the knobs that a closed form gives for `sparsity` at this prompt length (tokens)."""
        raise NotImplementedError

    def too_short(self, sparsity: float | None, length: int) -> str | None:
        """Why a prompt of `length` tokens cannot be sparse under these knobs, or None when it can."""
        return None

    def largest_sparsity(self, length: int) -> float:
        """The largest executed sparsity that the forced parts leave reachable at this length."""
        return 1.0

    def select(
        self, query: Tensor, key: Tensor, *, scale: float, softcap: float | None, sparsity: float | None
    ) -> Selection:
        """Choose key blocks for one layer and one row.

        Args:
            query: `(H, L, D)` after rotary embedding.
            key: `(H_kv, L, D)`.
            scale, softcap: as the attention itself uses them.
            sparsity: executed sparsity to meet on average over the heads, or None to follow the native knobs.
        """
        raise NotImplementedError


def number(name: str, value: Any, low: float, high: float, *, whole: bool = False, example: Any) -> None:
    """Raise `UserError` unless `value` is a number (a whole one if asked) in [low, high]."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if fits and whole:
        fits = float(value).is_integer()
    if not fits or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        start = "above 0 and up to" if 0 < low < 1e-6 else f"from {low} to"
        bound = f"{start} {high}" if high != float("inf") else f"of at least {low}"
        raise UserError(f"{name}={value!r} is not accepted: give {kind} {bound}, for example {name}={example}")


def apply_softcap(scores: Tensor, softcap: float | None) -> Tensor:
    """Gemma 2's bounded scores, or the scores themselves."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
