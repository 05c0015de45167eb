"""H2O (Zhang et al., NeurIPS 2023): heavy hitters, the keys that have gathered most attention, and recent ones.

How the capacity is divided between the two, and that scores of evicted tokens are forgotten, is the paper's
(section 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.estimate import window_flops, window_sums
from ...kernels.types import Cost, Reads, Slot
from ..base import Call, number
from ..scored import ScoredEviction

#: Rows of attention, one of a query and a head, that are summed at once.
ROWS = 512
#: The name of the state.
GATHERED = "gathered"


@dataclass(frozen=True)
class H2O(ScoredEviction):
    """Half of `capacity` for the most recent tokens, the rest for those with the largest sum of attention weights.

    Weights are summed over all queries so far, and over the query heads of a KV head.

    Knobs:
        capacity: tokens that each KV head keeps.
        recent: share of them that are the last ones, from 0 to 1; the paper has as many recent as heavy ones.
        every: tokens of the answer after which all is chosen anew, by sums that go on meanwhile; None for once, behind
            the prompt. The paper's own is 1.
    """

    name: ClassVar[str] = "h2o"
    importance: ClassVar[str] = "accumulated attention"
    reference: ClassVar[str] = "Zhang et al., NeurIPS 2023"
    carries: ClassVar[str | None] = GATHERED
    tiny: ClassVar = {"capacity": 48}

    capacity: int = 1024
    recent: float = 0.5
    every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number("capacity", self.capacity, 1, math.inf, whole=True, example=1024)
        number("recent", self.recent, 0, 1, example=0.5)

    def kept_ends(self, capacity: int) -> tuple[int, int]:
        return 0, math.ceil(round(self.recent * capacity, 9))  # .07 of 100 is 7

    def score(self, call: Call) -> Tensor:
        if call.cache is not None:
            return call.cache.padded(call.state[GATHERED])
        return gathered(call.query, call.key, call.scale, call.softcap)

    def cost(self, call: Call) -> Cost:
        if call.cache is not None:
            return Cost(0, 4 * int(call.cache.kv.lengths.sum()))
        heads, length, dim = call.query.shape
        states = call.query.element_size() * dim * (heads + len(call.key)) * length
        return Cost(window_flops(heads, length, length, dim) // 2, states)

    # --- with every: sums go on ------------------------------------------------------------------------------------

    def slots(self) -> tuple[Slot, ...]:
        return () if self.every is None else (Slot(GATHERED, "token", (), torch.float32),)

    @property
    def looks_back(self) -> int:
        return 0 if self.every is None else 1 << 40  # at all of them

    @property
    def wants_mass(self) -> bool:
        return self.every is not None

    def prefilled(self, call: Call) -> None:
        """Sums of a prompt of which all is held; what was evicted comes with its selection."""
        kv = call.cache.kv
        sequences, group, queries, dim = call.query.shape
        for first in range(0, sequences, kv.heads):
            own, tokens = slice(first, first + kv.heads), int(call.cache.tokens[first // kv.heads])
            starts, lengths = kv.starts[own].tolist(), kv.lengths[own].tolist()
            if queries != tokens or lengths != [tokens] * kv.heads:
                continue
            keys = torch.stack([kv.keys[start : start + tokens] for start in starts])
            asked = call.query[own].reshape(kv.heads * group, queries, dim)
            for start, sums in zip(starts, gathered(asked, keys, call.scale, call.softcap), strict=True):
                call.state[GATHERED][start : start + tokens] = sums

    def appended(self, call: Call, before: Tensor) -> None:
        """New tokens begin with nothing."""
        sums = call.state[GATHERED]
        # A number of the host would be waited for.
        sums[call.cache.entries(before, call.query.shape[2])] = sums.new_zeros(())

    def attended(self, call: Call, reads: Reads | None, mass: Tensor) -> None:
        kv, sums = call.cache.kv, call.state[GATHERED]
        place = torch.arange(mass.shape[-1], device=mass.device).expand(len(mass), -1)
        for head in range(mass.shape[1]):
            for step in range(mass.shape[2]):
                if reads is not None:
                    place = reads.keys(min(head, reads.ids.shape[1] - 1), step)
                there = (place >= 0) & (place < kv.lengths[:, None])  # behind a list stands anything
                at = (kv.starts[:, None] + place).clamp(0, len(sums) - 1)
                # One list names no key twice, and to add nothing is safe: the order of additions does not matter.
                sums.index_add_(0, at.flatten(), torch.where(there, mass[:, head, step], 0.0).flatten())


def gathered(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    """`(H_kv, L)` fp32: attention weights on each key, summed over all queries and the heads of its group."""
    (heads, length, _), kv_heads = query.shape, len(key)
    sums = torch.zeros(kv_heads, length, device=query.device)
    # On a GPU nothing is kept of the scores, and few large pieces are quicker.
    some = length if query.is_cuda else max(1, ROWS // heads)
    for first in range(0, length, some):
        end = min(first + some, length)
        found = window_sums(
            query[:, :end], key[:, :end], end - first, scale=scale, softcap=softcap, columns=True
        ).columns
        sums[:, :end] += found.reshape(kv_heads, heads // kv_heads, end).sum(1)
    return sums
