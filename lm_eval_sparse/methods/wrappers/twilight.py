"""Twilight (Lin et al., NeurIPS 2025): a selector with a loose budget; of what it selects, the top-p by 4-bit keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.types import Reads, Slot
from ..base import Call, Density, Mass, Method, number
from ..scored.decode import cover, joined, pieces
from .base import Wrapper

#: Numbers that are held at once.
ELEMENTS = 1 << 24
#: The largest number of 4 bits.
MOST = 15


@dataclass(frozen=True)
class Twilight(Wrapper):
    """The fewest tokens of the inner method's choice that hold the share `p` of its attention, for each query head.

    Attention is estimated from keys of 4 bits a number, quantised for each token and KV head (paper: section 4).

    Knobs:
        p: share of the attention to what was chosen, in (0, 1].
        loose: with a sparsity, how much more than is read in the end the inner method may choose.
    """

    name: ClassVar[str] = "twilight"
    wraps: ClassVar[tuple[str, ...]] = ("decode",)
    importance: ClassVar[str] = "4-bit scores of the inner choice"
    allocation: ClassVar[str] = "threshold"
    reference: ClassVar[str] = "Lin et al., NeurIPS 2025"
    budget_knobs: ClassVar[tuple[str, ...]] = ("p",)
    tiny: ClassVar = {"p": 0.6}

    p: float = 0.85
    loose: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("p", self.p, 1e-9, 1, example=0.85)
        number("loose", self.loose, 1, math.inf, example=4)

    @classmethod
    def refuses(cls, inside: type[Method]) -> str | None:
        return "weighs the keys that it reads, or adds to them" if getattr(inside, "weighs", False) else None

    @property
    def read_unit(self) -> int:
        return 1

    def slots(self) -> tuple[Slot, ...]:
        own = (
            Slot("codes", "token", (-2,), torch.uint8, derived=True),
            Slot("least", "token", (), derived=True),
            Slot("step", "token", (), derived=True),
        )
        return (*self.inner.slots(), *own)

    def prefilled(self, call: Call) -> None:
        self.inner.prefilled(call)
        self._take(call, torch.zeros_like(call.cache.kv.lengths), call.cache.kv.longest)

    def appended(self, call: Call, before: Tensor) -> None:
        self.inner.appended(call, before)
        self._take(call, before, call.query.shape[2])

    def _take(self, call: Call, before: Tensor, tokens: int) -> None:
        """Quantise the next `tokens` keys of each sequence."""
        at, state = call.cache.entries(before, tokens), call.state
        state["codes"][at], state["least"][at], state["step"][at] = quantised(call.key[at])

    @torch.no_grad()
    def select(self, call: Call) -> Reads:
        sequences, group, steps, dim = call.query.shape
        # Scores in several copies, and keys as they are estimated.
        some = max(1, (ELEMENTS // max(1, sequences * call.cache.kv.longest) - dim) // (4 * group))
        return self._choose(call) if steps <= some else joined(self._choose(part) for part in pieces(call, some))

    def _choose(self, call: Call) -> Reads:
        budget, loose = call.budget, call.budget
        match budget:
            case Density(share):
                loose = Density(min(1.0, self.loose * share))
            case _:
                budget = Mass(self.p)
        given = self.inner.select(replace(call, budget=loose))
        if given.bias is not None or given.extra is not None:
            raise ValueError(f"{self.inner.name} weighs the keys that it reads, or adds to them, and does not say so")
        kv, steps = call.cache.kv, call.query.shape[2]
        width = -(-kv.longest // given.unit) * given.unit
        codes, least, step = (call.cache.padded(call.state[name], width) for name in ("codes", "least", "step"))
        scores = call.scores(call.query, dequantised(codes, least, step, call.key.shape[-1])[:, None])
        place = torch.arange(width, device=kv.starts.device)
        among = (listed_tokens(given, width) & (place < kv.visible(steps)[:, None, :, None])).expand(scores.shape)
        # Idle rows choose from nothing: their scores are not looked at.
        weights = scores.masked_fill(~among, torch.finfo(scores.dtype).min).softmax(-1)
        return cover(call, weights, budget, 1, among)

    def cost(self, visible: Tensor, read: Tensor, group: int, dim: int, element: int) -> tuple[Tensor, Tensor]:
        # The inner method's own, and every 4-bit key with its two numbers.
        flops, read_bytes = self.inner.cost(visible, read, group, dim, element)
        return flops + visible * (2 * dim * group), read_bytes + visible * (-(-dim // 2) + 2 * element)


def listed_tokens(reads: Reads, tokens: int) -> Tensor:
    """`(S, Gs, T, tokens)` bool: the tokens of the pages that are listed."""
    pages = tokens // reads.unit
    valid = torch.arange(reads.ids.shape[-1], device=reads.ids.device) < reads.counts[..., None]
    place = torch.where(valid, reads.ids, pages).long().clamp(0, pages)
    mask = torch.zeros(*reads.counts.shape, pages + 1, dtype=torch.bool, device=reads.ids.device)
    return mask.scatter_(-1, place, True)[..., :pages].repeat_interleave(reads.unit, -1)


def quantised(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys `(…, D)` as 4 bits a number, two to a byte `(…, ceil(D / 2))` uint8; their least number and their step."""
    low, high = keys.float().aminmax(dim=-1)
    least, step = low.to(keys.dtype), ((high - low) / MOST).to(keys.dtype)
    unit = step.float().clamp(min=torch.finfo(torch.float32).tiny)  # all numbers may be equal
    codes = ((keys.float() - least.float()[..., None]) / unit[..., None]).round().clamp(0, MOST).to(torch.uint8)
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., ::2] | (codes[..., 1::2] << 4), least, step


def dequantised(codes: Tensor, least: Tensor, step: Tensor, dim: int) -> Tensor:
    """`(…, dim)` fp32."""
    both = torch.stack([codes & MOST, codes >> 4], -1).flatten(-2)[..., :dim]
    return least.float()[..., None] + both.float() * step.float()[..., None]
