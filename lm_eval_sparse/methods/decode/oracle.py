"""Oracles of decoding: every query head knows its exact scores. What they lose, sparsity has lost; what another method
loses besides, its estimates have.

All keys are read to choose among them, which the bytes read say: these are upper bounds, not methods to run fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base import Call, Mass, number
from ..scored import Allocation, ScoredDecode, TopP


@dataclass(frozen=True)
class OracleTopK(ScoredDecode):
    """Each query head reads the keys with the largest scores, and the newest one.

    Knobs:
        budget: keys that a new token reads besides its own.
    """

    name: ClassVar[str] = "oracle_topk"
    unit: ClassVar[str] = "tokens"
    importance: ClassVar[str] = "exact scores"
    reference: ClassVar[str] = "upper bound of top-k"
    tiny: ClassVar = {"budget": 48}
    page_size: ClassVar[int] = 1

    budget: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        number("budget", self.budget, 1, math.inf, whole=True, example=1024)

    def score(self, call: Call, pages: int) -> Tensor:
        return exact_scores(call, pages)

    def cost(self, visible: Tensor, read: Tensor, group: int, dim: int, element: int) -> tuple[Tensor, Tensor]:
        return all_keys(visible, read, group, dim, element)


@dataclass(frozen=True)
class OracleTopP(ScoredDecode):
    """Each query head reads the fewest keys that hold the share `p` of its attention, and the newest one.

    Knobs:
        p: share of the attention, in (0, 1]; 1 reads everything.
    """

    name: ClassVar[str] = "oracle_topp"
    unit: ClassVar[str] = "tokens"
    importance: ClassVar[str] = "exact scores"
    allocation: ClassVar[Allocation] = TopP()
    reference: ClassVar[str] = "upper bound of top-p"
    budget_knobs: ClassVar[tuple[str, ...]] = ("p",)
    native: ClassVar[type] = Mass
    tiny: ClassVar = {"p": 0.5}
    page_size: ClassVar[int] = 1

    p: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        number("p", self.p, 1e-9, 1, example=0.95)

    def score(self, call: Call, pages: int) -> Tensor:
        visible = call.cache.kv.visible(call.query.shape[2])[:, None, :, None]
        hidden = torch.arange(pages, device=visible.device) >= visible.clamp(min=1)
        return exact_scores(call, pages).masked_fill(hidden, -math.inf).softmax(-1)

    def cost(self, visible: Tensor, read: Tensor, group: int, dim: int, element: int) -> tuple[Tensor, Tensor]:
        return all_keys(visible, read, group, dim, element)


def exact_scores(call: Call, keys: int) -> Tensor:
    """`(S, G, T, keys)` fp32: scores as attention has them; what lies behind a sequence is undefined."""
    return call.scores(call.query, call.cache.padded(call.key, keys)[:, None])


def all_keys(visible: Tensor, read: Tensor, group: int, dim: int, element: int) -> tuple[Tensor, Tensor]:
    """What it takes to score every key for each query head."""
    return visible * (2 * dim * group), visible * (dim * element)
