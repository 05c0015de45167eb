"""K-norm (Devoto et al., EMNLP 2024): keys of small norm attract much attention."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..base import Call, number
from ..scored import ScoredEviction


@dataclass(frozen=True)
class KNorm(ScoredEviction):
    """The `capacity` tokens of each KV head whose keys have the smallest norm.

    Knobs:
        capacity: tokens that each KV head keeps.
        every: tokens of the answer after which all is chosen anew; None for once, behind the prompt.
    """

    name: ClassVar[str] = "knorm"
    importance: ClassVar[str] = "norm of the key"
    reference: ClassVar[str] = "Devoto et al., EMNLP 2024"
    tiny: ClassVar = {"capacity": 48}

    capacity: int = 1024
    every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number("capacity", self.capacity, 1, float("inf"), whole=True, example=1024)

    def score(self, call: Call) -> Tensor:
        held = call.key if call.cache is None else call.cache.padded(call.key)
        return -held.float().norm(dim=-1)
