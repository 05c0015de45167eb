"""Block-Sparse (MInference, Jiang et al. 2024) as harmonised by The Sparse Frontier (section 3): top-k blocks.

Queries and keys are averaged per block; each query block reads the key blocks whose averages have the largest
product with its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.estimators import pool
from ..kernels.layout import BLOCK_SIZES, BlockLayout, block_lengths, causal_pairs, listed
from .base import Geometry, PrefillMethod, Selection, number, one_of
from .vertical_slash import closest

#: Block scores held at once.
SCORE_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class BlockSparse(PrefillMethod):
    """The same number of key blocks for every query block and head (paper: section 3 and Table 3).

    Knobs:
        top_k: key blocks that a query block reads, the first and the diagonal one included.
        block_size: 16 as in the paper, 32, 64 or 128.
    """

    name: ClassVar[str] = "block_sparse"
    unit: ClassVar[str] = "blocks"
    importance: ClassVar[str] = "pooled scores"
    allocation: ClassVar[str] = "uniform"
    kv: ClassVar[str] = "full cache"
    paper: ClassVar[str] = "Jiang et al., NeurIPS 2024 (MInference)"
    budget_knobs: ClassVar[tuple[str, ...]] = ("top_k",)

    top_k: int = 64
    block_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        number("top_k", self.top_k, 2, math.inf, whole=True, example=64)
        one_of("block_size", self.block_size, BLOCK_SIZES)

    def knobs_for(self, sparsity: float, length: int, geometry: Geometry | None = None) -> BlockSparse:
        """The largest `top_k` that stays within the budget; `select` spends what is left on the last rows."""
        budget = row_budgets(length, int(self.block_size), 1 - sparsity)
        return replace(self, top_k=max(2, int(budget[-1]) - int(budget[-1] > budget[0])))

    def largest_sparsity(self, length: int) -> float:
        return 1 - uniform_pairs(length, int(self.block_size), 2) / causal_pairs(length)

    def too_short(self, sparsity: float | None, length: int) -> str | None:
        if sparsity is None:
            blocks = -(-length // int(self.block_size))
            return (
                f"prompt of {length} tokens has no more than top_k={self.top_k} blocks"
                if self.top_k >= blocks
                else None
            )
        if self.largest_sparsity(length) < sparsity:
            return (
                f"prompt of {length} tokens is too short for sparsity {sparsity:g} (first key block and diagonal "
                f"are always kept: at most {max(0.0, self.largest_sparsity(length)):.3f} there)"
            )
        return None

    @torch.no_grad()
    def select(
        self, query: Tensor, key: Tensor, *, scale: float, softcap: float | None, sparsity: float | None
    ) -> Selection:
        heads, length, dim = query.shape
        kv_heads, block = key.shape[0], int(self.block_size)
        blocks = -(-length // block)
        if sparsity is None:
            budgets = torch.full((blocks,), int(self.top_k))
        else:
            budgets = row_budgets(length, block, 1 - sparsity)
        ids = torch.arange(blocks)
        budgets = torch.minimum(budgets, ids + 1).to(query.device)
        # Neither the scale nor a softcap changes the order of scores.
        pooled_queries, pooled_keys = pool(query, block), pool(key, block)
        indices = torch.zeros(heads, blocks, int(budgets.max()), dtype=torch.int32, device=query.device)
        step = max(1, SCORE_ELEMENTS // (heads * blocks))
        for first in range(0, blocks, step):
            rows = torch.arange(first, min(first + step, blocks), device=query.device)
            grouped = pooled_queries[:, rows].reshape(kv_heads, -1, dim)
            scores = (grouped @ pooled_keys.transpose(1, 2)).reshape(heads, len(rows), blocks)
            mask = best_blocks(scores, rows, budgets[rows])
            found, _ = listed(mask)
            indices[:, rows, : found.shape[-1]] = found
        layout = BlockLayout(indices, budgets.to(torch.int32).expand(heads, -1).contiguous(), length, block, block)
        return Selection(
            layout=layout,
            estimator_flops=heads * (2 * blocks * blocks * dim + length * dim) + kv_heads * length * dim,
            estimator_bytes=query.element_size() * dim * (heads + kv_heads) * length,
            knobs={"top_k": float(budgets[-1]), "block_size": block},
        )


def best_blocks(scores: Tensor, rows: Tensor, budgets: Tensor) -> Tensor:
    """`(H, r, n)` bool: in each row of block scores the `budgets` best causal blocks, the first and own included.

    Ties go to later blocks. The scores are overwritten.
    """
    columns = torch.arange(scores.shape[-1], device=scores.device)
    scores.masked_fill_(columns > rows[:, None], -math.inf)
    scores[..., 0] = math.inf
    scores[:, torch.arange(len(rows), device=scores.device), rows] = math.inf
    # The smallest score that is taken; of those equal to it only as many as there is room for, from the right.
    best = scores.topk(int(budgets.max()), dim=-1).values
    edge = best.gather(-1, (budgets - 1).expand(scores.shape[0], -1)[..., None])
    above, equal = scores > edge, scores == edge
    room = budgets[:, None] - above.sum(-1, keepdim=True)
    return above | (equal & (equal.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1) <= room))


def uniform_pairs(length: int, block: int, count: int) -> int:
    """Pairs that a head executes when every query block reads `count` key blocks, its own included."""
    return int(_row_pairs(length, block, torch.tensor(count)).sum())


def _row_pairs(length: int, block: int, budgets: Tensor) -> Tensor:
    """`(n,)` pairs of each row of blocks: its own block's triangle, and full tiles for the others."""
    rows = block_lengths(length, block)
    taken = torch.minimum(budgets, torch.arange(len(rows)) + 1)
    return rows * (rows + 1) // 2 + (taken - 1) * block * rows


def row_budgets(length: int, block: int, density: float) -> Tensor:
    """`(n,)` blocks per query block for an executed density: k everywhere, one more in the last rows where k is short.

    At least the two forced blocks.
    """
    blocks = -(-length // block)
    goal = density * causal_pairs(length)
    low, high = 2, max(2, blocks)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if uniform_pairs(length, block, middle) <= goal else (low, middle)
    count = high if uniform_pairs(length, block, high) <= goal else low
    budgets = torch.full((blocks,), count)

    def pairs(extra: int) -> int:
        longer = budgets.clone()
        longer[blocks - extra :] += 1
        return int(_row_pairs(length, block, longer).sum())

    budgets[blocks - closest(pairs, goal, 0, blocks) :] += 1
    return budgets
