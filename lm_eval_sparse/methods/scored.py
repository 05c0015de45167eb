"""The scored level: a method writes a score, its base class makes the selection.

The class says what its unit is, which parts are always read, and how the budget is divided (`Allocation`); the base
class forces those parts, breaks ties towards recent keys, solves for the budget, refuses prompts that are too short for
what is forced, lets forced defaults shrink, and counts what selecting costs by default.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.budget import solve
from ..kernels.index.pages import PageBudget, select_pages
from ..kernels.index.top_blocks import top_blocks, top_scored
from ..kernels.types import Blocks, Cost, Keep, Reads, causal_pairs, tile_pairs
from .base import (
    FORCED_SHARE,
    Budget,
    Call,
    Count,
    DecodeMethod,
    Density,
    EvictionMethod,
    Layer,
    Mass,
    PrefillMethod,
    top,
)

#: Scores of pages held at once.
SCORE_ELEMENTS = 1 << 25


# --- how a budget is divided ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allocation:
    """How the budget of a layer is divided among its heads and rows; `words` names it in the taxonomy."""

    words: str

    def __str__(self) -> str:
        return self.words

    def at(self, budget: Budget, layer: Layer) -> Budget:
        """The budget of one layer, from what all layers have on average."""
        return budget


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same number for every head, and where there are rows for every row."""

    words: str = "uniform"


@dataclass(frozen=True)
class Pooled(Allocation):
    """The heads of a layer compete for its budget; each keeps at least the share `floor` of its own part.

    Attributes:
        floor: the knob that says so.
    """

    words: str = "adaptive per head"
    floor: str = "floor"


@dataclass(frozen=True)
class TopP(Allocation):
    """Each row takes what covers one share of its estimated attention, the same share for all heads of a layer."""

    words: str = "threshold"


@dataclass(frozen=True)
class PerLayer(Allocation):
    """Uniform in a layer, and from layer to layer as `shape` has it.

    Attributes:
        shape: from `(layer, layers)` to that layer's factor; factors average 1.
    """

    words: str = "per layer"
    shape: Callable[[int, int], float] = lambda layer, layers: 1.0

    def at(self, budget: Budget, layer: Layer) -> Budget:
        factor = self.shape(layer.index, layer.count)
        match budget:
            case Density(share):
                return Density(min(1.0, share * factor))
            case Count(number):
                return Count(max(1, round(number * factor)))
        return budget


# --- prefill ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredPrefill(PrefillMethod):
    """Key blocks by a score for each (query head, query block, key block).

    The first `first` key blocks and the `near` nearest ones, the diagonal included, are always read. A subclass has a
    knob `block_size` and writes `score`, or `factors` where the score is a product of two pooled tensors, which is then
    never made whole.
    """

    unit: ClassVar[str] = "blocks"
    kv: ClassVar[str] = "full cache"
    allocation: ClassVar[Allocation] = Uniform()
    #: Key blocks that are always read, in front.
    first: ClassVar[int] = 1
    #: Words for what is always read.
    always: ClassVar[str] = "first key block and diagonal"

    @property
    def near(self) -> int:
        """Key blocks up to the diagonal that every query block reads."""
        return 1

    def score(self, call: Call) -> Tensor:
        """`(H, n, n)` fp32, the larger the better; under `TopP` a share of the row's mass, not negative.

        What lies above the diagonal is not looked at.
        """
        raise NotImplementedError

    def factors(self, call: Call) -> tuple[Tensor, Tensor] | None:
        """Pooled queries `(H, n, D)` and keys `(H_kv, n, D)` fp32 whose products order like the scores, or None."""
        return None

    def cost(self, call: Call) -> Cost:
        """What `score` costs: by default every query and key is read once, and every pair of blocks multiplied."""
        heads, length, dim = call.query.shape
        kv_heads, blocks = len(call.key), -(-length // int(self.block_size))
        return Cost(
            heads * (2 * blocks * blocks * dim + length * dim) + kv_heads * length * dim,
            call.query.element_size() * dim * (heads + kv_heads) * length,
        )

    @property
    def _forced(self) -> int:
        """Key blocks that every query block reads, where there are so many."""
        return self.first + self.near

    def largest_sparsity(self, length: int) -> float:
        return 1 - uniform_pairs(length, int(self.block_size), self._forced) / causal_pairs(length)

    def too_short(self, sparsity: float | None, length: int) -> str | None:
        if sparsity is None:
            budget = self.native_budget()
            if isinstance(budget, Count) and budget.number >= -(-length // int(self.block_size)):
                return f"prompt of {length} tokens has no more than {self.budget_knobs[0]}={budget.number} blocks"
            return None
        if self.largest_sparsity(length) < sparsity:
            return (
                f"prompt of {length} tokens is too short for sparsity {sparsity:g} ({self.always} "
                f"are always kept: at most {max(0.0, self.largest_sparsity(length)):.3f} there)"
            )
        return None

    @torch.no_grad()
    def select(self, call: Call) -> Blocks:
        length, block = call.length, int(self.block_size)
        blocks = -(-length // block)
        budget = self.allocation.at(call.budget, call.layer)
        knobs: dict[str, Any] = {}
        if isinstance(budget, Mass) or isinstance(self.allocation, TopP):
            indices, counts, knobs["rest"] = self._covering(self.score(call), budget, length, block)
        else:
            most, extra = self._rows(budget, length)
            pooled = self.factors(call)
            if pooled is not None:
                indices, counts = top_blocks(*pooled, most, extra, near=self.near)
            else:
                indices, counts = top_scored(self.score(call), most, extra, first=self.first, near=self.near)
            knobs[self.budget_knobs[0]] = float(min(most + (extra > 0), blocks))
        knobs["block_size"] = block
        return Blocks(indices, counts, length, block, block, cost=self.cost(call), knobs=knobs)

    def _rows(self, budget: Budget, length: int) -> tuple[int, int]:
        """Blocks of each row, and in how many last rows one more is read."""
        match budget:
            case Count(number):
                return int(number), 0
            case Density(share):
                return row_budgets(length, int(self.block_size), share, self._forced)
        raise TypeError(f"{budget} is no number of blocks")

    def _covering(
        self, score: Tensor, budget: Budget, length: int, block: int
    ) -> tuple[Tensor, Tensor, float | Tensor]:
        """The fewest blocks of each row that leave out at most `rest` of its mass, and `rest`."""
        heads, blocks = score.shape[:2]
        ids = torch.arange(blocks, device=score.device)
        causal = ids[None] <= ids[:, None]
        forced = causal & ((ids[None] < self.first) | (ids[None] > ids[:, None] - self.near))
        admission = missing_mass(score.masked_fill(~causal, 0.0), forced)
        admission = admission.masked_fill(forced, math.inf).masked_fill(~causal, -math.inf)
        match budget:
            case Mass(share):
                rest: float | Tensor = 1 - share
                taken = admission > rest
            case Density(share):
                weight = tile_pairs(length, block, block, score.device).clamp(min=0).expand_as(admission)
                goal = share * heads * causal_pairs(length)
                taken, rest = solve(admission.masked_fill(~causal, -math.inf), weight, goal)
            case _:
                raise TypeError(f"{budget} is no share")
        chosen = Blocks.from_mask(taken & causal, length, block, block)
        return chosen.indices, chosen.counts, rest


def missing_mass(score: Tensor, forced: Tensor) -> Tensor:
    """For each entry the share of its row that is missing before it is taken: forced ones first, then the largest.

    An entry belongs to the fewest that leave out at most `rest` exactly when this is larger than `rest`. Ties are taken
    from the last entry on.

    Args:
        score: `(…, n)`, not negative; forced: bool that broadcasts to it.
    """
    score = score.double()
    order = score.masked_fill(forced, math.inf).flip(-1).sort(dim=-1, descending=True, stable=True).indices
    order = score.shape[-1] - 1 - order
    # Summed from the small end, so that no entry's share is lost beside the large ones.
    tail = score.gather(-1, order).flip(-1).cumsum(-1).flip(-1)
    share = tail / tail[..., :1].clamp(min=1e-300)
    return torch.empty_like(share).scatter_(-1, order, share)


def uniform_pairs(length: int, block: int, count: int, extra: int = 0) -> int:
    """Pairs that a head executes when every query block reads `count` key blocks, its own included.

    The last `extra` query blocks read one more. Each reads its own block's triangle, and full tiles of the others.
    """
    blocks = -(-length // block)
    last = length - (blocks - 1) * block

    def others(rows: int, most: int) -> int:
        """Tiles besides their own that the first `rows` query blocks read, each at most `most`."""
        short = min(rows, most + 1)
        return short * (short - 1) // 2 + (rows - short) * most

    # Row r has r tiles besides its own; the last row of blocks may be partial.
    usual = min(blocks - extra, blocks - 1)
    tiles = others(usual, count - 1) + others(blocks - 1, count) - others(usual, count)
    most = count if extra else count - 1
    triangles = (blocks - 1) * (block * (block + 1) // 2) + last * (last + 1) // 2
    return triangles + tiles * block * block + min(most, blocks - 1) * block * last


@functools.lru_cache(maxsize=1024)
def row_budgets(length: int, block: int, density: float, least: int) -> tuple[int, int]:
    """Blocks per query block for an executed density: a number for all, and in how many last rows one more is read.

    The number is the largest within the density, and at least `least`, the forced blocks; with the extra ones the
    density is met as closely as whole blocks can.
    """
    blocks = -(-length // block)
    goal = density * causal_pairs(length)
    low, high = least, max(least, blocks)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if uniform_pairs(length, block, middle) <= goal else (low, middle)
    count = high if uniform_pairs(length, block, high) <= goal else low
    low, high = 0, blocks
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if uniform_pairs(length, block, count, middle) <= goal else (low, middle)
    above, below = (uniform_pairs(length, block, count, extra) for extra in (high, low))
    extra = high if above - goal <= goal - below else low
    return (count, extra) if extra < blocks else (count + 1, 0)


# --- eviction ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredEviction(EvictionMethod):
    """Tokens by a score for each (KV head, token).

    `forced` names the knobs that say how many of the first and of the last tokens are always kept, with the paper's
    numbers: a knob that is `auto` has that number, and fewer where a requested sparsity leaves no room for it. The
    first of `budget_knobs` is how many tokens a KV head keeps on average.
    """

    unit: ClassVar[str] = "tokens"
    kv: ClassVar[str] = "evicted"
    allocation: ClassVar[Allocation] = Uniform()
    budget_knobs: ClassVar[tuple[str, ...]] = ("capacity",)
    forced: ClassVar[Mapping[str, int]] = {}

    @abstractmethod
    def score(self, call: Call) -> Tensor:
        """`(H_kv, L)` fp32, the larger the better."""

    def cost(self, call: Call) -> Cost:
        """What `score` costs: by default every key is read once, with two operations a number."""
        kv_heads, length, dim = call.key.shape
        return Cost(2 * kv_heads * length * dim, call.key.element_size() * dim * kv_heads * length)

    @property
    def _capacity(self) -> int:
        return int(getattr(self, self.budget_knobs[0]))

    def as_native(self) -> ScoredEviction:
        typed = {name: number for name, number in self.forced.items() if getattr(self, name) == "auto"}
        return replace(self, **typed)

    def knobs_for(self, sparsity: float, length: int, layer: Layer | None = None) -> ScoredEviction:
        """Capacity in closed form; first and last tokens shrink to a quarter of it, unless they were typed."""
        capacity = max(1, round((1 - sparsity) * length))
        room, found = int(capacity * FORCED_SHARE), {}
        for name, paper in self.forced.items():
            if getattr(self, name) == "auto":
                # The last tokens hold the one that answers begin from.
                found[name] = min(paper, room) if name == "sinks" else max(1, min(paper, room))
                room -= found[name]
            elif name == "sinks":
                room -= getattr(self, name)
        return replace(self, **found, **{self.budget_knobs[0]: capacity})

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
        length, kv_heads = call.length, len(call.key)
        capacity = self._tokens(self.allocation.at(call.budget, call.layer), length)
        score = self.score(call)
        first, last = (getattr(self, name, 0) for name in ("sinks", "local"))
        score[:, :first] = math.inf
        score[:, max(0, length - last) :] = math.inf
        if isinstance(self.allocation, Pooled):
            kept, counts, width = pooled(score, capacity, getattr(self, self.allocation.floor), first + last)
        else:
            width = min(capacity, length)
            kept, counts = top(score, width), torch.full((kv_heads,), width, device=score.device)
        # Tokens that are not kept are written to a place behind the lists.
        places = torch.where(kept, kept.cumsum(-1) - 1, width)
        tokens = torch.arange(length, device=score.device).expand_as(places)
        ids = places.new_zeros(kv_heads, width + 1).scatter_(1, places, tokens)
        knobs = {name: getattr(self, name) for name in self.knobs()}
        return Keep(
            ids[:, :width],
            counts,
            kv_heads * min(capacity, length),
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


# --- decode -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredDecode(DecodeMethod):
    """Pages, or with `page_size = 1` tokens, by a score for each (new token, page).

    The page that a token is in is always read. The first of `budget_knobs` is how many keys are read besides.
    """

    kv: ClassVar[str] = "full cache"
    allocation: ClassVar[Allocation] = Uniform()
    budget_knobs: ClassVar[tuple[str, ...]] = ("budget",)

    def score(self, call: Call, pages: int) -> Tensor:
        """`(S, Gs, T, P)` fp32 of the first P = `pages` pages of each sequence, of which complete ones count.

        Gs is 1 where the query heads of a KV head share their pages, else their number.
        """
        raise NotImplementedError

    def lists(self, call: Call) -> int:
        """Lists of each sequence: 1, or as many as query heads."""
        return call.query.shape[1]

    @torch.no_grad()
    def select(self, call: Call) -> Reads:
        sequences, _, steps, _ = call.query.shape
        kv = call.cache.kv
        # Nothing that the host does not know: the longest sequence may hold that many pages before its current one.
        # A multiple of 16 lets kernels load scores in whole vectors.
        most = -(-((kv.longest - 1) // self.page_size) // 16) * 16
        some = max(1, SCORE_ELEMENTS // max(1, sequences * self.lists(call) * most))
        if steps <= some or call.cache.new is not None:  # new ones are few
            return self._choose(call, most)
        parts = []
        for first in range(0, steps, some):
            part = call.query[:, :, first : first + some]
            behind = steps - first - part.shape[2]
            cache = replace(
                call.cache,
                kv=replace(kv, lengths=(kv.lengths - behind).clamp(min=0)),
                tokens=call.cache.tokens - behind,
            )
            parts.append(self._choose(replace(call, query=part, cache=cache), most))
        ids, counts = (torch.cat(found, 2) for found in zip(*((p.ids, p.counts) for p in parts), strict=True))
        return Reads(ids, counts, self.page_size)

    def _choose(self, call: Call, most: int) -> Reads:
        """Choose among at most `most` complete pages of each sequence."""
        pages = keep = None
        match self.allocation.at(call.budget, call.layer):
            case Count(number):
                pages = int(number) // self.page_size
            case Density(share):
                keep = share
            case other:
                raise TypeError(f"{other} is no number of keys")
        budget = PageBudget(self.page_size, pages, keep, call.cache.kv_heads)
        width = 1 + (most if pages is None else min(most, pages))
        return self.choose(call, budget, width, most)

    def choose(self, call: Call, budget: PageBudget, width: int, most: int) -> Reads:
        """Lists of `width` places among the first `most` pages; a method with one kernel for all overrides it."""
        score = self.score(call, most)
        return select_pages(score, call.cache.kv, call.cache.tokens, budget, width=width)
