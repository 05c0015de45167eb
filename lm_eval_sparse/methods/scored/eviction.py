"""What stays of the cache, by a score for each token."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import UserError
from ...kernels.types import Cost, Keep
from ..base import FORCED_SHARE, Budget, Call, Count, Density, EvictionMethod, Layer, top
from .allocation import Allocation, PerLayer, Pooled, Uniform, checked


@dataclass(frozen=True)
class ScoredEviction(EvictionMethod):
    """Tokens by a score for each (KV head, token).

    `forced` names the knobs that say how many of the first and of the last tokens are always kept, with the paper's
    numbers: a knob that is `auto` has that number, and fewer where a requested sparsity leaves no room for it. The
    first of `budget_knobs` is how many tokens a KV head keeps on average.

    With `every`, forced are the first and the last of what each head holds.
    """

    unit: ClassVar[str] = "tokens"
    kv: ClassVar[str] = "evicted"
    allocation: ClassVar[Allocation] = Uniform()
    allocations: ClassVar[tuple[type, ...]] = (Uniform, Pooled, PerLayer)
    budget_knobs: ClassVar[tuple[str, ...]] = ("capacity",)
    forced: ClassVar[Mapping[str, int]] = {}
    #: With `every`: the slot per token in which the scores of the kept tokens go on, for scores that accumulate.
    carries: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every is not None and isinstance(self.allocation, Pooled):
            raise UserError(
                f"every={self.every}: heads that compete for a budget are not evicted periodically; leave every out, "
                "or use a method whose heads keep the same number"
            )

    @abstractmethod
    def score(self, call: Call) -> Tensor:
        """`(H_kv, L)` fp32, the larger the better; `(H_kv, longest)` of what is held where `call.cache` is given."""

    def cost(self, call: Call) -> Cost:
        """What `score` costs: by default every key is read once, with two operations a number."""
        dim = call.key.shape[-1]
        keys = call.key.shape[:-1].numel() if call.cache is None else int(call.cache.kv.lengths.sum())
        return Cost(2 * keys * dim, call.key.element_size() * dim * keys)

    @property
    def _capacity(self) -> int:
        return int(getattr(self, self.budget_knobs[0]))

    def as_native(self) -> ScoredEviction:
        typed = {name: number for name, number in self.forced.items() if getattr(self, name) == "auto"}
        return replace(self, **typed)

    def knobs_for(self, sparsity: float, length: int, layer: Layer | None = None) -> ScoredEviction:
        """Capacity in closed form; first and last tokens shrink to a quarter of it, unless they were typed."""
        capacity = max(1, round((1 - sparsity) * length))
        found = {name: count for name, count in self.ends(capacity).items() if getattr(self, name) == "auto"}
        return replace(self, **found, **{self.budget_knobs[0]: capacity})

    def ends(self, capacity: int) -> dict[str, int]:
        """The knobs of what is always kept: what was typed, the others at most a quarter of `capacity` together."""
        room, found = int(capacity * FORCED_SHARE), {}
        for name, paper in self.forced.items():
            found[name] = getattr(self, name)
            if found[name] == "auto":
                # The last tokens hold the one that answers begin from.
                found[name] = min(paper, room) if name == "sinks" else max(1, min(paper, room))
            room = max(0, room - found[name])
        return found

    def largest_sparsity(self, length: int) -> float:
        typed = sum(value for name in self.forced if (value := getattr(self, name)) != "auto")
        return max(0.0, 1 - typed / length)

    def too_short(self, sparsity: float | None, length: int) -> str | None:
        if sparsity is not None and self.largest_sparsity(length) < sparsity:
            typed = " and ".join(f"{name}={getattr(self, name)}" for name in self.forced)
            return (
                f"prompt of {length} tokens is too short for sparsity {sparsity:g} ({typed} are always kept: at most "
                f"{self.largest_sparsity(length):.3f} there)"
            )
        capacity = self._capacity if sparsity is None else max(1, round((1 - sparsity) * length))
        if capacity >= length:
            return f"prompt of {length} tokens fits into the capacity of {capacity}"
        return None

    def keeps(self, sparsity: float | None, length: int) -> int:
        return min(length, self._capacity) if sparsity is None else super().keeps(sparsity, length)

    @torch.no_grad()
    def select(self, call: Call) -> Keep:
        if call.cache is not None:
            return self._again(call)
        length, kv_heads = call.length, len(call.key)
        capacity = self._tokens(self.layer_budget(call, length), length)
        score = checked(self.score(call), (kv_heads, length))
        found = score.clone() if self.every is not None and self.carries is not None else None
        first, last = self.kept_ends(capacity)
        score[:, :first] = math.inf
        score[:, max(0, length - last) :] = math.inf
        if isinstance(self.allocation, Pooled):
            kept, counts, width = pooled(score, capacity, getattr(self, self.allocation.floor), first + last)
        else:
            width = min(capacity, length)
            kept, counts = top(score, width), torch.full((kv_heads,), width, device=score.device)
        keep = self._kept(call, kept, counts, width, kv_heads * min(capacity, length), capacity, length)
        return keep if found is None else replace(keep, carried={self.carries: found.gather(1, keep.ids)})

    def layer_budget(self, call: Call, length: int) -> Budget:
        """The budget of the call's layer, for `length` tokens so far."""
        return self.allocation.at(call.budget, call.layer)

    def kept_ends(self, capacity: int) -> tuple[int, int]:
        """How many of the first and of the last tokens stay whatever their score, of `capacity`."""
        return getattr(self, "sinks", 0), getattr(self, "local", 0)

    def _again(self, call: Call) -> Keep:
        """What stays of what is held in the course of an answer. Waits for the device, which knows how much that is."""
        kv, so_far = call.cache.kv, int(call.cache.tokens[0])
        lengths = kv.lengths.long()[:, None]
        capacity = self._tokens(self.layer_budget(call, so_far), so_far)
        first, last = self.kept_ends(capacity)
        place = torch.arange(kv.longest, device=lengths.device)
        # Nothing that is held may lose to what is not.
        score = checked(self.score(call), (len(kv.starts), kv.longest)).clamp(min=torch.finfo(torch.float32).min)
        score = score.masked_fill((place < first) | (place >= lengths - last), math.inf)
        counts = lengths[:, 0].clamp(max=capacity)
        kept = top(score.masked_fill(place >= lengths, -math.inf), counts)
        numbers = counts.tolist()
        return self._kept(call, kept, counts, max(numbers), sum(numbers), capacity, so_far)

    def _kept(
        self, call: Call, kept: Tensor, counts: Tensor, width: int, total: int, capacity: int, length: int
    ) -> Keep:
        """The selection `kept (H_kv, L)` bool as lists of `width` places."""
        # Tokens that are not kept are written to a place behind the lists.
        places = torch.where(kept, kept.cumsum(-1) - 1, width)
        tokens = torch.arange(kept.shape[1], device=kept.device).expand_as(places)
        ids = places.new_zeros(len(kept), width + 1).scatter_(1, places, tokens)
        knobs = {name: getattr(self, name) for name in self.knobs()}
        return Keep(
            ids[:, :width],
            counts,
            total,
            cost=self.cost(call),
            knobs={**knobs, self.budget_knobs[0]: capacity, **self.solved(length)},
        )

    def solved(self, length: int) -> dict[str, Any]:
        """Knobs as they are for a prompt of so many tokens, for the results."""
        return {}

    def _tokens(self, budget: Budget, length: int) -> int:
        """Tokens that a KV head keeps on average."""
        match budget:
            case Count(number):
                return int(number)
            case Density(share):
                return max(1, round(share * length))
        raise TypeError(f"{budget} is no number of tokens")


def pooled(score: Tensor, capacity: int, floor: float, forced: int) -> tuple[Tensor, Tensor, int]:
    """What a layer keeps whose KV heads share `capacity` times their number of tokens (Feng et al., 2024).

    Args:
        score: `(H_kv, L)`; what is forced is infinite.
        floor: share of `capacity` that each head keeps at least; never fewer than `forced`.

    Returns:
        What is kept `(H_kv, L)` bool, how many of each head `(H_kv,)` int64, and how many one may keep at most.
    """
    heads, length = score.shape
    capacity = min(capacity, length)
    least = min(capacity, max(int(floor * capacity), forced))
    own = top(score, least)
    # The rest of the layer's capacity goes to the largest scores of any head. Of equals the more recent position is
    # taken, then the lower head: that is the order of this transposed and flipped list.
    rest = score.masked_fill(own, -math.inf).T.flip(0).flatten()
    order = rest.sort(descending=True, stable=True).indices[: (capacity - least) * heads]
    more = torch.zeros_like(rest, dtype=torch.bool).scatter_(0, order, True)
    kept = own | more.reshape(length, heads).flip(0).T
    # One head may take all that the others may leave.
    return kept, kept.sum(-1), min(length, least + (capacity - least) * heads)
