"""Key blocks by a score for each query block."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.budget import solve
from ...kernels.index.top_blocks import top_blocks, top_scored
from ...kernels.types import BLOCK_SIZES, Blocks, Cost, causal_pairs, tile_pairs
from ..base import FORCED_SHARE, Budget, Call, Count, Density, Layer, Mass, PrefillMethod
from .allocation import Allocation, PerLayer, TopP, Uniform, checked


@dataclass(frozen=True)
class ScoredPrefill(PrefillMethod):
    """Key blocks by a score for each (query head, query block, key block).

    The first `first` key blocks and the `near` nearest ones, the diagonal included, are always read. A subclass has a
    knob `block_size`, which may be `auto`: `usual_block` under native knobs, and for a sparsity the largest whose
    forced blocks take a quarter of the budget at most. It writes `score`, or `factors` where the score is a product of
    two pooled tensors, which is then never made whole.
    """

    unit: ClassVar[str] = "blocks"
    kv: ClassVar[str] = "full cache"
    allocation: ClassVar[Allocation] = Uniform()
    allocations: ClassVar[tuple[type, ...]] = (Uniform, TopP, PerLayer)
    #: Key blocks that are always read, in front.
    first: ClassVar[int] = 1
    #: Tokens of a block where `block_size` is `auto` and no sparsity decides.
    usual_block: ClassVar[int] = 128
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

    def as_native(self) -> ScoredPrefill:
        return replace(self, block_size=self._usual) if self.block_size == "auto" else self

    def knobs_for(self, sparsity: float, length: int, layer: Layer | None = None) -> ScoredPrefill:
        if self.block_size != "auto":
            return self
        fitting = [size for size in BLOCK_SIZES if self._forced_density(length, size) <= FORCED_SHARE * (1 - sparsity)]
        return replace(self, block_size=max(fitting, default=BLOCK_SIZES[0]))

    @property
    def _usual(self) -> int:
        return self.usual_block if self.block_size == "auto" else int(self.block_size)

    def _forced_density(self, length: int, block: int) -> float:
        return uniform_pairs(length, block, self._forced) / causal_pairs(length)

    def largest_sparsity(self, length: int) -> float:
        return 1 - self._forced_density(length, BLOCK_SIZES[0] if self.block_size == "auto" else int(self.block_size))

    def too_short(self, sparsity: float | None, length: int) -> str | None:
        if sparsity is None:
            budget = self.native_budget()
            if isinstance(budget, Count) and budget.number >= -(-length // self._usual):
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
        shape = len(call.query), blocks, blocks
        knobs: dict[str, Any] = {}
        if isinstance(budget, Mass) or isinstance(self.allocation, TopP):
            indices, counts, knobs["rest"] = self._covering(
                checked(self.score(call), shape, 0.0), budget, length, block
            )
        else:
            most, extra = self._rows(budget, length)
            pooled = self.factors(call)
            if pooled is not None:
                indices, counts = top_blocks(*pooled, most, extra, near=self.near)
            else:
                indices, counts = top_scored(
                    checked(self.score(call), shape), most, extra, first=self.first, near=self.near
                )
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
