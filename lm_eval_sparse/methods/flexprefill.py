"""FlexPrefill (Lai et al., ICLR 2025): per head, either a vertical-slash pattern or query-aware blocks.

For each query head the last `block_size` queries are compared with all keys. If the block-level attention that
pooled queries and keys predict is close to their true block-level attention (square root of the Jensen-Shannon
divergence below `tau`), pooled scores can be trusted everywhere and blocks are chosen from the whole pooled
score map; otherwise vertical columns and slash diagonals are. Either way just enough is taken to cover the
share `gamma` of the estimated attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..kernels.estimators import pool, sum_blocks, window_sums
from ..kernels.layout import BLOCK_SIZES, BlockLayout, block_lengths, causal_pairs, tile_pairs
from .base import FORCED_SHARE, MAX_STEP, PROMISED_LENGTH, Geometry, PrefillMethod, Selection, apply_softcap, number

#: A typed block is refused where one column of one head changes it by more than this.
MAX_COARSE = 0.03
#: The solve stops once the mean density is this close to the target (a tenth of the promised tolerance).
CLOSE_ENOUGH = 0.001
#: Smaller shares to leave out than this cannot be told from 0 once written as gamma = 1 - share.
REPRESENTABLE = 1e-6
#: Relative offset between equal shares of different heads, so that the solve takes their blocks one by one.
APART = 1e-12


@dataclass(frozen=True)
class FlexPrefill(PrefillMethod):
    """FlexPrefill at block granularity (paper: Algorithms 1-4; defaults as published).

    Knobs:
        gamma: share of the estimated attention to cover, in (0, 1]; 1 selects everything.
        tau: a head whose root Jensen-Shannon divergence is below this is query-aware, in [0, 1].
        min_budget: tokens' worth of vertical and of slash blocks that each head gets at least.
        max_budget: tokens' worth that each of the two may get at most; None for no limit.
        block_size: 16, 32, 64 or 128, or `auto`.

    Coverage is counted in blocks: the mass of a key block, and of a band of `block_size` diagonals, is summed
    first, and the smallest set of blocks with a share of at least `gamma` is taken. The first key block and the
    diagonal blocks are kept besides.
    """

    name: ClassVar[str] = "flexprefill"
    unit: ClassVar[str] = "verticals + slashes, or blocks"
    importance: ClassVar[str] = "last query block, pooled scores"
    allocation: ClassVar[str] = "threshold"
    kv: ClassVar[str] = "full cache"
    paper: ClassVar[str] = "Lai et al., ICLR 2025"
    budget_knobs: ClassVar[tuple[str, ...]] = ("gamma", "min_budget", "max_budget")

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    block_size: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("gamma", self.gamma, 1e-9, 1, example=0.9)
        number("tau", self.tau, 0, 1, example=0.1)
        number("min_budget", self.min_budget, 0, math.inf, whole=True, example=1024)
        if self.max_budget is not None:
            number("max_budget", self.max_budget, 1, math.inf, whole=True, example=8192)
            if self.max_budget < self.min_budget:
                raise UserError(
                    f"max_budget={self.max_budget} is below min_budget={self.min_budget}: "
                    f"give max_budget of at least min_budget, or leave one of them out"
                )
        if self.block_size != "auto" and self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise UserError(f"block_size={self.block_size!r} is not accepted: give one of {sizes}, or auto")

    # --- knobs from a sparsity -------------------------------------------------------------------------------

    def knobs_for(self, sparsity: float, length: int, geometry: Geometry) -> FlexPrefill:
        """Block size in closed form unless given, no floor; `gamma` is left to `select`, which solves it on the scores.

        The block is the largest whose forced tiles take at most a quarter of the budget, and whose single steps
        are fine enough to meet the sparsity; 16 where none is.
        """
        if self.block_size != "auto":
            if length >= PROMISED_LENGTH and 2 * self.block_size / (length * geometry.heads) > MAX_COARSE:
                raise UserError(
                    f"block_size={self.block_size} is too coarse to meet a sparsity at {length} tokens with "
                    f"{geometry.heads} query heads: give a smaller one, or leave it out"
                )
            return replace(self, min_budget=0, max_budget=None)
        fitting = [
            block
            for block in BLOCK_SIZES
            if forced_density(length, block) <= FORCED_SHARE * (1 - sparsity)
            and 2 * block / (length * geometry.heads) <= MAX_STEP
        ]
        return replace(self, block_size=max(fitting, default=BLOCK_SIZES[0]), min_budget=0, max_budget=None)

    def _native_block(self) -> int:
        return 128 if self.block_size == "auto" else self.block_size

    def too_short(self, sparsity: float | None, length: int) -> str | None:
        if sparsity is not None:
            if self.largest_sparsity(length) < sparsity:
                return (
                    f"prompt of {length} tokens is too short for sparsity {sparsity:g} (first key block and diagonal "
                    f"are always kept: at most {max(0.0, self.largest_sparsity(length)):.3f} there)"
                )
            return None
        least = max(self.min_budget, 2 * self._native_block())
        if length <= least:
            return f"prompt of {length} tokens does not exceed {least} (the larger of min_budget and two blocks)"
        return None

    def largest_sparsity(self, length: int) -> float:
        return 1 - forced_density(length, BLOCK_SIZES[0] if self.block_size == "auto" else int(self.block_size))

    # --- selection -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def select(
        self, query: Tensor, key: Tensor, *, scale: float, softcap: float | None, sparsity: float | None
    ) -> Selection:
        heads, length, dim = query.shape
        kv_heads = key.shape[0]
        if sparsity is None:
            knobs = replace(self, block_size=self._native_block())
        else:
            knobs = self.knobs_for(sparsity, length, Geometry(heads, kv_heads, dim))
        block = int(knobs.block_size)
        blocks = -(-length // block)

        vertical, slash = window_scores(query, key, block, scale, softcap)
        pooled_keys = pool(key, block).repeat_interleave(heads // kv_heads, 0)
        predicted = apply_softcap(
            torch.einsum("hd,hnd->hn", query[:, -block:].float().mean(1), pooled_keys) * scale, softcap
        ).softmax(-1)
        query_aware = root_jensen_shannon(predicted, vertical) < knobs.tau

        # Ties go to recent keys: to the larger key block, and to the nearer band.
        columns = Ranking(vertical, 0.0, larger_first=True)
        diagonals = Ranking(slash, 0.5, larger_first=False)
        maps = {
            int(head): BlockMap(query[head], pooled_keys[head], block, scale, softcap, head=int(head))
            for head in query_aware.nonzero().flatten()
        }
        floor = min(blocks, -(-knobs.min_budget // block))
        ceiling = blocks if knobs.max_budget is None else max(1, min(blocks, -(-knobs.max_budget // block)))

        def counts(rest: float) -> tuple[Tensor, Tensor]:
            """Vertical and slash blocks of each head when the share `rest` = 1 - gamma may be left out."""
            result = []
            for ranking in (columns, diagonals):
                wanted = torch.where(query_aware, 0, ranking.count(rest))
                result.append(wanted.clamp(floor, max(ceiling, floor)))
            return result[0], result[1]

        def density(rest: float) -> float:
            """Mean executed density of the heads; only asked for a sparsity, when no floor but the forced tiles is."""
            pairs = union_pairs(columns, diagonals, *counts(rest), length, block)
            for head, block_map in maps.items():
                pairs[head] += block_map.pairs(rest)
            return float(pairs.sum()) / (heads * causal_pairs(length))

        rest = 1 - knobs.gamma if sparsity is None else solve(density, 1 - sparsity)
        gamma = max(0.0, 1 - rest)
        if REPRESENTABLE < rest < 1:  # so that the reported gamma, typed as a knob, selects the same blocks
            rest = 1 - gamma

        n_vertical, n_slash = counts(rest)
        ids = torch.arange(blocks, device=query.device)
        offset = ids[:, None] - ids[None, :]
        in_column, in_diagonal = columns.taken(n_vertical), diagonals.taken(n_slash)
        mask = in_column[:, None, :] | in_diagonal[:, offset.clamp(min=0)]
        for head, block_map in maps.items():
            mask[head] |= block_map.mask(rest)
        mask &= offset >= 0
        layout = BlockLayout.from_mask(mask, length, block, block)

        map_cost = length * dim + 2 * dim * blocks * blocks
        element = query.element_size()
        return Selection(
            layout=layout,
            estimator_flops=heads * (2 * block * length * dim + 2 * blocks * dim + block * dim)
            + kv_heads * length * dim
            + len(maps) * map_cost,
            # Keys twice (window, pooling), the window's queries once, and all queries of query-aware heads.
            estimator_bytes=element * dim * (2 * kv_heads * length + heads * block + len(maps) * length),
            knobs={
                "gamma": gamma,
                "one_minus_gamma": rest,
                "tau": knobs.tau,
                "block_size": block,
                "min_budget": knobs.min_budget,
                "max_budget": knobs.max_budget,
                "query_aware_heads": len(maps),
            },
        )


def forced_density(length: int, block: int) -> float:
    """Share of the causal triangle that the first key block and the diagonal blocks take."""
    rows = block_lengths(length, block)
    diagonal = (rows * (rows + 1) // 2).sum()
    first = block * rows[1:].sum()
    return float(diagonal + first) / causal_pairs(length)


def window_scores(query: Tensor, key: Tensor, block: int, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Attention of the last `block` queries, averaged over them and summed into blocks.

    Returns `(H, n)` mass of each key block, and `(H, n)` mass of each band of `block` token diagonals: band d
    holds the offsets query - key in [d * block, (d + 1) * block).
    """
    sums = window_sums(query, key, block, scale=scale, softcap=softcap, columns=True, diagonals=True)
    return sum_blocks(sums.columns, block) / block, sum_blocks(sums.diagonals, block) / block


def root_jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence (natural logarithm) along the last dimension."""
    m = (p + q) / 2
    divergence = (torch.xlogy(p, p) - torch.xlogy(p, m) + torch.xlogy(q, q) - torch.xlogy(q, m)).sum(-1) / 2
    return divergence.clamp(min=0).sqrt()


def coverage_keys(mass: Tensor) -> Tensor:
    """For masses sorted descending along the last dimension: the share still missing before each is added.

    Item i belongs to the smallest set that leaves out at most `rest` exactly when its key exceeds `rest`.
    Summed from the small end in fp64 so that tiny tails keep their digits; a vanishing slope orders items
    without any mass, so that every density can be reached.
    """
    tail = mass.double().flip(-1).cumsum(-1).flip(-1)
    count = mass.shape[-1]
    slope = torch.arange(count, 0, -1, device=mass.device, dtype=torch.float64) / count
    return tail / tail[..., :1].clamp(min=1e-300) + 1e-40 * slope


class Ranking:
    """Blocks of each head by descending mass. Block 0 is always taken besides."""

    def __init__(self, mass: Tensor, offset: float, larger_first: bool):
        heads, blocks = mass.shape
        ids = torch.arange(blocks, device=mass.device)
        if larger_first:  # a stable sort of the flipped array puts the larger of equals first
            order = blocks - 1 - mass.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        else:
            order = mass.sort(dim=-1, descending=True, stable=True).indices
        self.rank = torch.empty_like(order).scatter_(1, order, ids.expand(heads, -1))
        apart = 1 + APART * (torch.arange(heads, device=mass.device, dtype=torch.float64)[:, None] + offset)
        self.keys = coverage_keys(mass.gather(1, order)) * apart

    def count(self, rest: float) -> Tensor:
        """`(H,)`: blocks in the smallest set that leaves out at most the share `rest`."""
        return (self.keys > rest).sum(-1)

    def taken(self, count: Tensor) -> Tensor:
        """`(H, n)` bool: the first `count` blocks of each head, and block 0."""
        mask = self.rank < count[:, None]
        mask[:, 0] = True
        return mask


class BlockMap:
    """Query-aware branch of one head: the pooled score map over all causal blocks (paper: Algorithm 4)."""

    def __init__(self, query: Tensor, pooled_keys: Tensor, block: int, scale: float, softcap: float | None, head: int):
        length = query.shape[0]
        pooled_queries = pool(query[None], block)[0]
        blocks = pooled_keys.shape[0]
        causal = torch.ones(blocks, blocks, dtype=torch.bool, device=query.device).tril()
        scores = apply_softcap(pooled_queries @ pooled_keys.T * scale, softcap).masked_fill(~causal, float("-inf"))
        rows, cols = causal.nonzero(as_tuple=True)
        # Recent blocks first, so that a stable sort breaks ties towards them.
        by_recency = torch.argsort(cols, descending=True, stable=True)
        rows, cols = rows[by_recency], cols[by_recency]
        order = scores.softmax(-1)[rows, cols].sort(dim=-1, descending=True, stable=True)
        self.rows, self.cols = rows[order.indices], cols[order.indices]
        self.keys = coverage_keys(order.values) * (1 + APART * head)
        self.blocks = blocks
        weights = tile_pairs(length, block, block, query.device)[self.rows, self.cols]
        extra = torch.where((self.cols == 0) | (self.rows == self.cols), 0, weights)
        self.extra_pairs = F.pad(extra.cumsum(0), (1, 0))

    def pairs(self, rest: float) -> Tensor:
        """Pairs that the blocks which leave out at most `rest` add to the forced first column and diagonal."""
        return self.extra_pairs[(self.keys > rest).sum()]

    def mask(self, rest: float) -> Tensor:
        """`(n, n)` bool."""
        taken = self.keys > rest
        mask = torch.zeros(self.blocks, self.blocks, dtype=torch.bool, device=self.keys.device)
        mask[self.rows[taken], self.cols[taken]] = True
        return mask


def union_pairs(
    columns: Ranking, diagonals: Ranking, n_vertical: Tensor, n_slash: Tensor, length: int, block: int
) -> Tensor:
    """`(H,)` int64: pairs in the union of vertical and slash blocks, without building the block mask."""
    blocks = columns.rank.shape[1]
    ids = torch.arange(blocks, device=columns.rank.device)
    column, diagonal = columns.taken(n_vertical), diagonals.taken(n_slash)
    span = blocks - ids  # causal tiles of a column, and of a diagonal
    both = (column * diagonal.cumsum(-1).flip(-1)).sum(-1)
    tiles = (column * span).sum(-1) + (diagonal * span).sum(-1) - both
    # All tiles count block^2 pairs, but for diagonal tiles (all selected: band 0 is forced) and the last row.
    off_diagonal = tiles - blocks
    last_row = (column | diagonal.flip(-1))[:, :-1].sum(-1)
    last = length - (blocks - 1) * block
    triangle = (blocks - 1) * (block * (block + 1) // 2) + last * (last + 1) // 2
    return off_diagonal * block * block - last_row * (block - last) * block + triangle


def solve(density: Callable[[float], float], target: float) -> float:
    """The share left out, 1 - gamma, whose density comes closest to `target`.

    `density` falls as the share grows. The share spans many orders of magnitude (attention is concentrated),
    so the bisection runs on its logarithm.
    """
    low, high = -100.0, 1e-6  # natural logarithms: exp(low) leaves nothing out, exp(high) everything
    below = density(math.exp(low))
    if below <= target:
        return math.exp(low)
    above = density(math.exp(high))
    if above >= target - 1e-9:
        return math.exp(high)
    for _ in range(60):
        middle = (low + high) / 2
        value = density(math.exp(middle))
        if value > target:
            low, below = middle, value
        else:
            high, above = middle, value
        if min(below - target, target - above) < CLOSE_ENOUGH:
            break
    return math.exp(low if below - target < target - above else high)
