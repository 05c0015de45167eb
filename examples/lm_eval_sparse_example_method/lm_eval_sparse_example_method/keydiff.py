"""KeyDiff (Park et al., 2025): keys that differ most from the mean direction of all keys stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from lm_eval_sparse.methods import Call, ScoredEviction, number


@dataclass(frozen=True)
class KeyDiff(ScoredEviction):
    """The `capacity` tokens of each KV head whose keys point farthest away from the mean direction.

    Knobs:
        capacity: tokens that each KV head keeps.
    """

    name: ClassVar[str] = "example_keydiff"
    importance: ClassVar[str] = "distance from the mean key"
    reference: ClassVar[str] = "Park et al., 2025 (KeyDiff)"
    tiny: ClassVar = {"capacity": 48}

    capacity: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        number("capacity", self.capacity, 1, float("inf"), whole=True, example=1024)

    def score(self, call: Call) -> Tensor:
        direction = F.normalize(call.key.float(), dim=-1)
        anchor = direction.mean(1, keepdim=True)
        return -F.cosine_similarity(direction, anchor, dim=-1)
