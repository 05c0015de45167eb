"""FlexPrefill (Lai et al., ICLR 2025): per head, either a vertical-slash pattern or query-aware blocks.

For each query head the last `block_size` queries are compared with all keys. If the block-level attention that
pooled queries and keys predict is close to their true block-level attention (square root of the Jensen-Shannon
divergence below `tau`), pooled scores can be trusted everywhere and blocks are chosen from the whole pooled
score map; otherwise vertical columns and slash diagonals are. Either way just enough is taken to cover the
share `gamma` of the estimated attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from ...errors import UserError
from ...kernels.estimate import pool, window_blocks, window_sums
from ...kernels.index import top_p_blocks as coverage
from ...kernels.types import BLOCK_SIZES, Blocks, Cost, causal_pairs
from ..base import FORCED_SHARE, MAX_STEP, PROMISED_LENGTH, Call, Density, Layer, Mass, PrefillMethod, number, one_of

#: A typed block is refused where one column of one head changes it by more than this.
MAX_COARSE = 0.03


@dataclass(frozen=True)
class FlexPrefill(PrefillMethod):
    """FlexPrefill at block granularity (paper: Algorithms 1-4; defaults as published).

    Knobs:
        gamma: share of the estimated attention to cover, in (0, 1]; 1 selects everything.
        tau: a head whose root Jensen-Shannon divergence is below this is query-aware, in [0, 1].
        min_budget: tokens' worth of vertical and of slash blocks that each head gets at least.
        max_budget: tokens' worth that each of the two may get at most; None for no limit.
        block_size: 16, 32, 64 or 128, or `auto`.
        coverage: how verticals and slashes are counted. `blocks`: the mass of a key block, and of a band of
            `block_size` diagonals, is summed first, and the smallest set with a share of at least `gamma` is taken.
            `tokens`, as the authors' code has it: the fewest single keys (and diagonals) with that share are counted,
            and as many blocks taken as these would fill, and one.

    The first key block and the diagonal blocks are kept besides.
    """

    name: ClassVar[str] = "flexprefill"
    unit: ClassVar[str] = "verticals + slashes, or blocks"
    importance: ClassVar[str] = "last query block, pooled scores"
    allocation: ClassVar[str] = "threshold"
    kv: ClassVar[str] = "full cache"
    reference: ClassVar[str] = "Lai et al., ICLR 2025"
    budget_knobs: ClassVar[tuple[str, ...]] = ("gamma", "min_budget", "max_budget")
    native: ClassVar[type] = Mass
    tiny: ClassVar = {"gamma": 0.6, "min_budget": 16, "block_size": 16}

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    block_size: int | Literal["auto"] = "auto"
    coverage: Literal["blocks", "tokens"] = "blocks"

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
        one_of("coverage", self.coverage, ("blocks", "tokens"))

    # --- knobs from a sparsity -------------------------------------------------------------------------------

    def knobs_for(self, sparsity: float, length: int, layer: Layer) -> FlexPrefill:
        """Block size in closed form unless given, no floor; `gamma` is left to `select`, which solves it on the scores.

        The block is the largest whose forced tiles take at most a quarter of the budget, and whose single steps
        are fine enough to meet the sparsity; 16 where none is.
        """
        if self.block_size != "auto":
            if length >= PROMISED_LENGTH and 2 * self.block_size / (length * layer.heads) > MAX_COARSE:
                raise UserError(
                    f"block_size={self.block_size} is too coarse to meet a sparsity at {length} tokens with "
                    f"{layer.heads} query heads: give a smaller one, or leave it out"
                )
            return replace(self, min_budget=0, max_budget=None)
        fitting = [
            block
            for block in BLOCK_SIZES
            if forced_density(length, block) <= FORCED_SHARE * (1 - sparsity)
            and 2 * block / (length * layer.heads) <= MAX_STEP
        ]
        return replace(self, block_size=max(fitting, default=BLOCK_SIZES[0]), min_budget=0, max_budget=None)

    def _native_block(self) -> int:
        return 128 if self.block_size == "auto" else self.block_size

    def as_native(self) -> FlexPrefill:
        return replace(self, block_size=self._native_block())

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
    def select(self, call: Call) -> Blocks:
        query, key, scale, softcap = call.query, call.key, call.scale, call.softcap
        heads, length, dim = query.shape
        kv_heads = key.shape[0]
        block = int(self.block_size)
        match call.budget:
            case Mass(share):
                wanted = {"rest": 1 - share}
            case Density(share):
                wanted = {"density": share}
        blocks = -(-length // block)

        pooled_keys = pool(key, block)
        window = window_blocks(query, key, pooled_keys, block, scale=scale, softcap=softcap)
        query_aware = window.divergence < self.tau
        masses = window.vertical, window.slash
        options = {
            "scale": scale,
            "softcap": softcap,
            "floor": min(blocks, -(-self.min_budget // block)),
            "ceiling": blocks if self.max_budget is None else max(1, min(blocks, -(-self.max_budget // block))),
            **wanted,
        }
        if self.coverage == "blocks":
            chosen = coverage.select(query, pooled_keys, *masses, query_aware, block, **options)
            layout, gamma, rest = chosen.layout, chosen.gamma, chosen.rest
        else:
            sums = window_sums(query, key, block, scale=scale, softcap=softcap, columns=True, diagonals=True)
            single = sums.columns, sums.diagonals
            layout, rest = coverage.by_tokens(query, pooled_keys, *single, *masses, query_aware, block, **options)
            gamma = 1 - rest

        aware = query_aware.sum()
        if query.device.type == "cpu":  # elsewhere reading it would wait for the device
            aware = int(aware)
        map_cost = length * dim + 2 * dim * blocks * blocks
        element = query.element_size()
        return replace(
            layout,
            cost=Cost(
                heads * (2 * block * length * dim + 2 * blocks * dim + block * dim)
                + kv_heads * length * dim
                + aware * map_cost,
                # Keys twice (window, pooling), the window's queries once, and all queries of query-aware heads.
                element * dim * (2 * kv_heads * length + heads * block + aware * length),
            ),
            knobs={
                "gamma": gamma,
                "one_minus_gamma": rest,
                "tau": self.tau,
                "block_size": block,
                "min_budget": self.min_budget,
                "max_budget": self.max_budget,
                "query_aware_heads": aware,
                "coverage": self.coverage,
            },
        )


def forced_density(length: int, block: int) -> float:
    """Share of the causal triangle that the first key block and the diagonal blocks take."""
    blocks = -(-length // block)
    last = length - (blocks - 1) * block
    diagonal = (blocks - 1) * (block * (block + 1) // 2) + last * (last + 1) // 2
    first = block * max(0, length - block)
    return (diagonal + first) / causal_pairs(length)
