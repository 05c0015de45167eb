"""MagicPIG (Chen et al., ICLR 2025): keys are sampled by locality-sensitive hashing and weighted by 1 / probability.

Keys and queries have signatures of random signs (SimHash), `bits` in each of `tables`. A key is drawn when its
signature is the query's in two tables at least. The probability of that follows from the angle between them, so that
attention over the drawn keys, each score less the logarithm of its probability, estimates attention over all without
bias (sections 3 and 4). The paper leaves every 16th layer dense; here all are sparse, as the other methods' are.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...kernels.types import Reads, Slot
from ..base import FORCED_SHARE, Call, DecodeMethod, Density, number

#: Projections held at once, fp64, or signatures compared.
ELEMENTS = 1 << 21
#: Sinks and recent tokens of the paper.
FORCED = {"sinks": 4, "local": 64}


@dataclass(frozen=True)
class MagicPIG(DecodeMethod):
    """Keys drawn by hashing, with the weight that each stands for, and the first and the last ones.

    For a sparsity the number of bits and of tables is solved at every step: the most bits with which all tables draw
    enough, then the first tables whose keys come nearest to it.

    Knobs:
        tables: hash tables, at least 2.
        bits: of a signature in a table, 1 to 15.
        sinks, local: first and last tokens that are always read, as they are: 4 and 64, fewer where a requested
            sparsity leaves no room for them; what is typed is read.
        seed: of the random directions.
    """

    name: ClassVar[str] = "magicpig"
    unit: ClassVar[str] = "tokens, sampled"
    importance: ClassVar[str] = "hash collisions"
    allocation: ClassVar[str] = "threshold"
    kv: ClassVar[str] = "full cache"
    reference: ClassVar[str] = "Chen et al., ICLR 2025"
    budget_knobs: ClassVar[tuple[str, ...]] = ("tables", "bits")
    tiny: ClassVar = {"tables": 12, "bits": 4, "sinks": 2, "local": 8}
    whole: ClassVar = {"local": 4096}
    weighs: ClassVar[bool] = True
    page_size: ClassVar[int] = 1

    tables: int = 150
    bits: int = 10
    sinks: int | Literal["auto"] = "auto"
    local: int | Literal["auto"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("tables", self.tables, 2, 10_000, whole=True, example=150)
        number("bits", self.bits, 1, 15, whole=True, example=10)
        number("seed", self.seed, 0, 2**31, whole=True, example=0)
        if self.sinks != "auto":
            number("sinks", self.sinks, 0, math.inf, whole=True, example=4)
        if self.local != "auto":
            number("local", self.local, 1, math.inf, whole=True, example=64)

    def largest_sparsity(self, length: int) -> float:
        typed = sum(int(getattr(self, name)) for name in FORCED if getattr(self, name) != "auto")
        return max(0.0, 1 - typed / max(1, length))

    # --- signatures ------------------------------------------------------------------------------------------------

    def slots(self) -> tuple[Slot, ...]:
        return (
            Slot("centre", "sequence", (-1,), torch.float32),
            Slot("signatures", "token", (self.tables,), torch.int16, derived=True),
        )

    def prefilled(self, call: Call) -> None:
        kv, state = call.cache.kv, call.state
        held = call.cache.padded(call.key).float()
        there = torch.arange(kv.longest, device=held.device) < kv.lengths[:, None]
        total = torch.where(there[..., None], held, 0.0).double().sum(1)
        state["centre"][state.place] = (total / kv.lengths[:, None].clamp(min=1)).float()
        self._take(call, torch.zeros_like(kv.lengths), kv.longest)

    def appended(self, call: Call, before: Tensor) -> None:
        self._take(call, before, call.query.shape[2])

    def _take(self, call: Call, before: Tensor, tokens: int) -> None:
        """Signatures of the next `tokens` keys of each sequence."""
        state, own = call.state, call.cache.working()
        some = max(1, ELEMENTS // (len(own) * self.tables * self.bits))
        for at in call.cache.entries(before, tokens).split(some, 1):
            centred = call.key[at].float() - state["centre"][state.place[own], None]
            state["signatures"][at] = self._signed(centred, call.layer.index)

    def _signed(self, states: Tensor, layer: int) -> Tensor:
        """Signatures `(…, tables)` int16 of `(…, D)`, the first bit the highest."""
        # In fp64, so that how many rows are projected together turns no sign.
        found = states.double() @ directions(states.shape[-1], self.tables, self.bits, self.seed, layer, states.device)
        bit = 2 ** torch.arange(self.bits - 1, -1, -1, device=states.device)
        return ((found >= 0).unflatten(-1, (self.tables, self.bits)) * bit).sum(-1).to(torch.int16)

    # --- the choice ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def select(self, call: Call) -> Reads:
        found = [self._step(call, step) for step in range(call.query.shape[2])]
        masks, biases = (torch.stack(parts, 2) for parts in zip(*found, strict=True))
        typed = [getattr(self, name) for name in FORCED]
        if "auto" not in typed and call.cache.kv.longest <= sum(typed):
            return Reads.from_mask(masks, 1)
        return Reads.from_mask(masks, 1, biases)

    def _step(self, call: Call, step: int) -> tuple[Tensor, Tensor]:
        """For one token: keys that are read `(S, G, P)` bool, and their biases fp32."""
        kv, state, heads = call.cache.kv, call.state, call.cache.kv_heads
        query = call.query[:, :, step].float()
        sequences, group, _ = query.shape
        place = torch.arange(kv.longest, device=kv.starts.device)
        visible = kv.visible(call.query.shape[2])[:, step, None]

        own, signatures = self._signed(query, call.layer.index), call.cache.padded(state["signatures"])
        equal = torch.empty(sequences, group, len(place), self.tables, dtype=torch.int8, device=query.device)
        some = max(1, ELEMENTS // (sequences * group * self.tables))
        for first in range(0, len(place), some):
            apart = own[:, :, None] ^ signatures[:, None, first : first + some]
            # Leading bits that are equal: what is not begins at the highest bit of the difference.
            equal[:, :, first : first + some] = self.bits - torch.frexp(apart.float()).exponent.clamp(min=0)
        there = (place < visible)[:, None]
        bits, tables = torch.full_like(visible, self.bits), torch.full_like(visible, self.tables)
        sinks, local = self._forced(call, step)
        forced = there & ((place < sinks[:, None, None]) | (place >= (visible - local[:, None])[:, None]))
        if isinstance(call.budget, Density):
            tokens = call.cache.logical(call.query.shape[2])[:, step, None]
            wanted = call.budget.share * heads * group * tokens.double()
            bits, tables = self._solved(equal, forced, there, wanted, heads)
        second = second_hit(equal, bits)
        drawn = there & (second < tables[:, :, None]) & ~forced
        centred = call.cache.padded(call.key).float() - state["centre"][state.place, None]
        chance = self._chance(query, centred, bits, tables)
        return drawn | forced, torch.where(drawn, -chance.log().float(), 0.0)

    def _forced(self, call: Call, step: int) -> tuple[Tensor, Tensor]:
        """First and last tokens that are always read, `(S,)` int64 each."""
        tokens = call.cache.logical(call.query.shape[2])[:, step]
        room = torch.full_like(tokens, sum(FORCED.values()))
        if isinstance(call.budget, Density):
            room = (tokens.double() * (call.budget.share * FORCED_SHARE)).long()
        sinks = room.clamp(max=FORCED["sinks"]) if self.sinks == "auto" else torch.full_like(tokens, self.sinks)
        left = (room - sinks).clamp(1, FORCED["local"])
        return sinks, left if self.local == "auto" else torch.full_like(tokens, self.local)

    def _solved(
        self, equal: Tensor, forced: Tensor, there: Tensor, wanted: Tensor, heads: int
    ) -> tuple[Tensor, Tensor]:
        """Bits and tables `(S, 1)` with which the heads of a row together read nearest to `wanted (S, 1)`."""

        def of_row(counts: Tensor) -> Tensor:
            """Sums over the heads of a row, for each of its sequences: `(S, n)` of `(S, n)`."""
            return counts.unflatten(0, (-1, heads)).sum(1).repeat_interleave(heads, 0)

        drawn = (there & ~forced).expand(equal.shape[:-1])  # each query head reads its own
        fixed = of_row(forced.expand_as(drawn).sum((1, 2))[:, None])
        both = equal.topk(2, -1).values[..., -1]  # bits that two tables agree in
        levels = torch.arange(self.bits, 0, -1, device=equal.device)
        enough = torch.stack([(drawn & (both >= level)).sum((1, 2)) for level in range(self.bits, 0, -1)], 1)
        enough = of_row(enough) + fixed
        reaches = enough >= wanted
        # The first of the levels that reaches; the last where none does.
        level = torch.where(reaches.any(1), reaches.int().argmax(1), self.bits - 1)
        bits = levels[level][:, None]
        second = second_hit(equal, bits)
        hits = torch.zeros(len(equal), self.tables + 1, dtype=torch.int64, device=equal.device)
        hits.scatter_add_(1, second.flatten(1), drawn.long().flatten(1))
        sums = of_row(hits[:, : self.tables].cumsum(1)) + fixed
        tables = (sums - wanted).abs()[:, 1:].argmin(1) + 2
        return bits, tables[:, None]

    def _chance(self, query: Tensor, centred: Tensor, bits: Tensor, tables: Tensor) -> Tensor:
        """`(S, G, P)` fp64: how probable it is that a key is drawn."""
        product = torch.einsum("sgd,spd->sgp", query.double(), centred.double())
        norms = query.double().norm(dim=-1)[..., None] * centred.double().norm(dim=-1)[:, None]
        cosine = (product / norms.clamp(min=1e-30)).clamp(-1, 1)
        hit = (1 - torch.arccos(cosine) / math.pi) ** bits[..., None].double()
        number = tables[..., None].double()
        miss = (1 - hit) ** (number - 1)
        return (1 - miss * (1 - hit) - number * hit * miss).clamp(1e-12, 1.0)

    def cost(self, visible: Tensor, read: Tensor, group: int, dim: int, element: int) -> tuple[Tensor, Tensor]:
        # Signatures of the queries, and of every key two bytes a table.
        return torch.full_like(visible, 2 * dim * self.bits * self.tables * group), visible * (2 * self.tables)


def second_hit(equal: Tensor, bits: Tensor) -> Tensor:
    """Index of the second table `(S, G, P)` in which so many bits `(S, 1)` are equal `(S, G, P, tables)`, or their
    number where there are not two."""
    some = max(1, ELEMENTS // equal[:, :, 0].numel())
    found = []
    for part in equal.split(some, 2):
        hits = part >= bits[:, :, None, None]
        found.append((hits.cumsum(-1, dtype=torch.int16) < 2).sum(-1))
    return torch.cat(found, 2)


@functools.lru_cache(maxsize=256)
def directions(dim: int, tables: int, bits: int, seed: int, layer: int, device: torch.device) -> Tensor:
    """Gaussian directions `(D, tables * bits)` fp64, always the same ones."""
    generator = torch.Generator().manual_seed(seed * 100_003 + layer)
    return torch.randn(dim, tables * bits, generator=generator, dtype=torch.float64).to(device)
