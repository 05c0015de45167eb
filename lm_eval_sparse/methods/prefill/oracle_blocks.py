"""The oracle of block-sparse prefill: blocks by the attention that they really hold.

It computes all attention to choose among it: an upper bound of what methods that estimate blocks can reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.types import BLOCK_SIZES, Cost, causal_pairs
from ..base import Call, number, one_of
from ..scored import ScoredPrefill

#: Rows of scores held at once, each as long as the prompt, so that they take no more than its tokens are planned with.
ROWS = 512


@dataclass(frozen=True)
class OracleBlocks(ScoredPrefill):
    """The same number of key blocks for every query block and head, those that hold most of its attention.

    Knobs:
        top_k: key blocks that a query block reads, the first and the diagonal one included.
        block_size: 16, 32, 64 or 128, or `auto`.
    """

    name: ClassVar[str] = "oracle_blocks"
    importance: ClassVar[str] = "exact attention"
    reference: ClassVar[str] = "upper bound of block-sparse prefill"
    budget_knobs: ClassVar[tuple[str, ...]] = ("top_k",)
    tiny: ClassVar = {"top_k": 4, "block_size": 16}
    usual_block: ClassVar[int] = 16

    top_k: int = 64
    block_size: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("top_k", self.top_k, 2, math.inf, whole=True, example=64)
        one_of("block_size", self.block_size, BLOCK_SIZES, auto=True)

    def score(self, call: Call) -> Tensor:
        (heads, length, _), block = call.query.shape, int(self.block_size)
        kv_heads, blocks = len(call.key), -(-length // block)
        group = heads // kv_heads
        score = torch.zeros(heads, blocks, blocks, device=call.query.device)
        some = max(1, ROWS // (group * block))  # KV heads at once
        rows = max(1, ROWS // (min(some, kv_heads) * group * block))  # query blocks at once
        for head in range(0, kv_heads, some):
            own = slice(head * group, (head + some) * group)
            keys = call.key[head : head + some]
            query = call.query[own].unflatten(0, (len(keys), group))
            for first in range(0, blocks, rows):
                start, end = first * block, min(length, (first + rows) * block)
                part = call.scores(query[:, :, start:end].flatten(1, 2), keys[:, :end])
                part = part.unflatten(1, (group, end - start)).flatten(0, 1)
                place = torch.arange(end, device=part.device)
                weights = part.masked_fill(place > place[start:, None], -torch.inf).softmax(-1)
                weights = F.pad(weights, (0, -end % block, 0, -(end - start) % block))
                score[own, first : first + rows, : -(-end // block)] = (
                    weights.unflatten(2, (-1, block)).sum(3).unflatten(1, (-1, block)).sum(2)
                )
        return score

    def cost(self, call: Call) -> Cost:
        heads, length, dim = call.query.shape
        states = call.query.element_size() * dim * (heads + len(call.key)) * length
        return Cost(2 * dim * heads * causal_pairs(length), states)
