"""StreamingLLM (Xiao et al., ICLR 2024): the first tokens, on which attention rests, and the most recent ones.

One definition serves two phases: `a_shape` lets the queries of a prompt read no more than that, `streaming_llm` keeps
no more than that once the prompt is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.types import Blocks, Cost, Keep, causal_pairs
from .base import Call, Count, Density, PrefillMethod, number, yes_or_no
from .scored import ScoredEviction
from .scored.prefill import row_budgets, uniform_pairs

#: Keys of a block of `a_shape`.
BLOCK = 16


def streamed(place: Tensor, last: Tensor, first: int, near: int | Tensor) -> Tensor:
    """Which places are read from `last` on backwards: the first ones, and the nearest, its own included."""
    return (place <= last) & ((place < first) | (last - place < near))


@dataclass(frozen=True)
class AShape(PrefillMethod):
    """Each query reads the first keys and those before it, in blocks of 16 (A-shape; paper: section 3.2).

    Knobs:
        local: nearest keys that a query block reads, its own included, in whole blocks.
        sinks: first keys that all read, in whole blocks.
    """

    name: ClassVar[str] = "a_shape"
    unit: ClassVar[str] = "sinks + local window"
    importance: ClassVar[str] = "fixed"
    allocation: ClassVar[str] = "uniform"
    kv: ClassVar[str] = "full cache"
    reference: ClassVar[str] = "Xiao et al., ICLR 2024"
    budget_knobs: ClassVar[tuple[str, ...]] = ("local",)
    tiny: ClassVar = {"local": 48}

    local: int = 4096
    sinks: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        number("local", self.local, 1, math.inf, whole=True, example=4096)
        number("sinks", self.sinks, 0, math.inf, whole=True, example=16)

    @property
    def _first(self) -> int:
        return -(-self.sinks // BLOCK)

    def largest_sparsity(self, length: int) -> float:
        return 1 - uniform_pairs(length, BLOCK, self._first + 1) / causal_pairs(length)

    def too_short(self, sparsity: float | None, length: int) -> str | None:
        if sparsity is None:
            least = self.sinks + self.local
            return (
                f"prompt of {length} tokens fits into sinks and local window, {least} tokens"
                if length <= least
                else None
            )
        if self.largest_sparsity(length) < sparsity:
            return (
                f"prompt of {length} tokens is too short for sparsity {sparsity:g} (sinks={self.sinks} and a query's "
                f"own block are always read: at most {max(0.0, self.largest_sparsity(length)):.3f} there)"
            )
        return None

    @torch.no_grad()
    def select(self, call: Call) -> Blocks:
        heads, length, _ = call.query.shape
        first, more = self._first, 0
        match call.budget:
            case Count(tokens):
                near = -(-tokens // BLOCK)
            case Density(share):
                count, more = row_budgets(length, BLOCK, share, first + 1)
                near = count - first
        block = torch.arange(-(-length // BLOCK), device=call.query.device)
        wide = near + (block >= len(block) - more).long()
        # All heads read the same, so one list is made.
        one = Blocks.from_mask(streamed(block, block[:, None], first, wide[:, None])[None], length, BLOCK, BLOCK)
        lists = (part.expand(heads, *part.shape[1:]).contiguous() for part in (one.indices, one.counts))
        return Blocks(*lists, length, BLOCK, BLOCK, knobs={"local": near * BLOCK, "sinks": self.sinks})


@dataclass(frozen=True)
class StreamingLLM(ScoredEviction):
    """The first `sinks` and the last tokens of a prompt, `capacity` together (paper: section 3.2).

    Knobs:
        capacity: tokens that each KV head keeps.
        sinks: first tokens that are kept: 4, fewer where a requested sparsity leaves no room for them.
        rotate: whether kept keys are turned to neighbouring positions, so that distances are those inside the cache, as
            in the paper; else they stay what they were in the prompt.
        every: tokens of the answer after which the oldest of the recent ones are dropped; None for once.
    """

    name: ClassVar[str] = "streaming_llm"
    importance: ClassVar[str] = "fixed"
    reference: ClassVar[str] = "Xiao et al., ICLR 2024"
    forced: ClassVar[Mapping[str, int]] = {"sinks": 4}
    tiny: ClassVar = {"capacity": 48, "sinks": 2}

    capacity: int = 1024
    sinks: int | Literal["auto"] = "auto"
    rotate: bool = False
    every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number("capacity", self.capacity, 1, math.inf, whole=True, example=1024)
        yes_or_no("rotate", self.rotate)
        if self.sinks != "auto":
            number("sinks", self.sinks, 0, math.inf, whole=True, example=4)
        if self.rotate and self.every is not None:
            raise UserError(
                f"rotate=True and every={self.every} do not go together, since keys are turned once, behind the "
                "prompt: leave one of them out"
            )

    def check_native(self) -> None:
        sinks = self.as_native().sinks
        if self.capacity < sinks:
            raise UserError(f"capacity={self.capacity} cannot hold sinks={sinks}: give capacity={sinks} or more")

    def score(self, call: Call) -> Tensor:
        heads, length = (len(call.key), call.length) if call.cache is None else self._held(call)
        return torch.arange(length, device=call.key.device, dtype=torch.float32).expand(heads, -1).clone()

    @staticmethod
    def _held(call: Call) -> tuple[int, int]:
        return len(call.cache.kv.starts), call.cache.kv.longest

    def cost(self, call: Call) -> Cost:
        return Cost()  # nothing is looked at

    def select(self, call: Call) -> Keep:
        keep = super().select(call)
        if not self.rotate:
            return keep
        width = keep.ids.shape[1]
        place = torch.arange(call.length - width, call.length, device=keep.ids.device)
        return replace(keep, positions=place.expand_as(keep.ids).contiguous())
