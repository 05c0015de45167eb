"""TOVA (Oren et al., EMNLP 2024): what the newest query attends to least is dropped, the same tokens in all heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.estimate import window_flops, window_sums
from ...kernels.types import Cost
from ..base import Call, number
from ..scored import ScoredEviction


@dataclass(frozen=True)
class TOVA(ScoredEviction):
    """The `capacity` tokens with the largest attention of the last query, averaged over all query heads (section 4).

    Knobs:
        capacity: tokens that each KV head keeps; they are the same in all heads of a layer.
        every: tokens of the answer after which the newest query chooses anew; None for once, behind the prompt. The
            paper's own is 1.
    """

    name: ClassVar[str] = "tova"
    importance: ClassVar[str] = "last query, all heads"
    reference: ClassVar[str] = "Oren et al., EMNLP 2024"
    tiny: ClassVar = {"capacity": 48}

    capacity: int = 1024
    every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number("capacity", self.capacity, 1, math.inf, whole=True, example=1024)

    def score(self, call: Call) -> Tensor:
        if call.cache is None:
            options = {"scale": call.scale, "softcap": call.softcap}
            weights = window_sums(call.query, call.key, 1, columns=True, **options).columns
            return weights.mean(0).expand(len(call.key), -1).clone()
        weights = held_weights(call)
        # All heads of a layer hold the same tokens, so that places in them are the same tokens.
        return weights.flatten(0, 1).mean(0).expand(len(weights), -1).clone()

    def cost(self, call: Call) -> Cost:
        dim, element = call.key.shape[-1], call.key.element_size()
        if call.cache is None:
            heads, length = len(call.query), call.length
            return Cost(window_flops(heads, 1, length, dim), element * dim * (len(call.key) * length + heads))
        keys, group = int(call.cache.kv.lengths.sum()), call.query.shape[1]
        return Cost(2 * keys * group * dim, element * dim * (keys + len(call.query) * group))


def held_weights(call: Call) -> Tensor:
    """Attention of the newest query to what is held: `(H_kv, G, longest)` fp32, 0 behind a head's length."""
    scores = call.scores(call.query[:, :, -1], call.cache.padded(call.key))
    lengths = call.cache.kv.lengths[:, None, None]
    place = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(place >= lengths, -math.inf).softmax(-1)
