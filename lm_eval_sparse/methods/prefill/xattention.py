"""XAttention (Xu et al., ICML 2025): blocks by sums along antidiagonals, which cross every vertical and every slash."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.types import BLOCK_SIZES, Cost
from ..base import Call, Mass, number, one_of
from ..scored import Allocation, ScoredPrefill, TopP


@dataclass(frozen=True)
class XAttention(ScoredPrefill):
    """The fewest key blocks of each query block whose antidiagonal scores hold a share of the row's (section 3).

    Knobs:
        threshold: that share, in (0, 1]; 1 reads everything.
        block_size: 16, 32, 64 or 128, or `auto`.
        stride: distance of the antidiagonals that are scored: 4, 8 or 16.
    """

    name: ClassVar[str] = "xattention"
    importance: ClassVar[str] = "antidiagonal sums"
    allocation: ClassVar[Allocation] = TopP()
    reference: ClassVar[str] = "Xu et al., ICML 2025"
    budget_knobs: ClassVar[tuple[str, ...]] = ("threshold",)
    native: ClassVar[type] = Mass
    tiny: ClassVar = {"threshold": 0.5, "block_size": 16}

    threshold: float = 0.9
    block_size: int | Literal["auto"] = "auto"
    stride: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        number("threshold", self.threshold, 1e-9, 1, example=0.9)
        one_of("block_size", self.block_size, BLOCK_SIZES, auto=True)
        one_of("stride", self.stride, (4, 8, 16))

    def score(self, call: Call) -> Tensor:
        heads, length, _ = call.query.shape
        padding, blocks = (0, 0, 0, -length % self.block_size), (-1, self.block_size // self.stride)
        # Queries in reverse beside keys in order: their product is the sum of an antidiagonal.
        query, key = (F.pad(part.float(), padding).unflatten(1, (-1, self.stride)) for part in (call.query, call.key))
        place = torch.arange(key.shape[1], device=key.device)
        found = []
        for head, own in enumerate(query.flip(2).flatten(2)):  # one map of single scores at a time
            sums = own @ key[head * len(key) // heads].flatten(1).T * (call.scale / self.stride)
            mass = sums.masked_fill(place > place[:, None], -torch.inf).softmax(-1)
            mass = mass * (place * self.stride < length)[:, None]  # rows of padding weigh nothing
            found.append(mass.unflatten(1, blocks).sum(2).unflatten(0, blocks).sum(1))
        return torch.stack(found)

    def cost(self, call: Call) -> Cost:
        heads, length, dim = call.query.shape
        states = call.query.element_size() * dim * (heads + len(call.key)) * length
        return Cost(2 * dim * heads * length * length // self.stride, states)
