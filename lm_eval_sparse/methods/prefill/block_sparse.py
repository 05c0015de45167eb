"""Block-Sparse (MInference, Jiang et al. 2024) as harmonised by The Sparse Frontier (section 3): top-k blocks.

Queries and keys are averaged per block; each query block reads the key blocks whose averages have the largest
product with its own.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import UserError
from ...kernels.estimate import pool_both
from ...kernels.index.top_blocks import top_blocks
from ...kernels.layout import BLOCK_SIZES, BlockLayout, causal_pairs
from ..base import Geometry, PrefillMethod, Selection, number, one_of


@dataclass(frozen=True)
class BlockSparse(PrefillMethod):
    """The same number of key blocks for every query block and head (paper: section 3 and Table 3).

    Knobs:
        top_k: key blocks that a query block reads, the first and the diagonal one included.
        block_size: 16 as in the paper, 32, 64 or 128.
        subdiagonal: whether the key block just left of the diagonal is always read, too. The paper's text does not say
            so; its code does, and made its numbers: `preset=paper` sets it.
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
    subdiagonal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        number("top_k", self.top_k, 2, math.inf, whole=True, example=64)
        one_of("block_size", self.block_size, BLOCK_SIZES)
        if not isinstance(self.subdiagonal, bool):
            raise UserError(f"subdiagonal={self.subdiagonal!r} is not accepted: give True or False")
        if self.top_k < self._forced:
            raise UserError(
                f"top_k={self.top_k} cannot hold the {self._forced} blocks that are always read with subdiagonal=True "
                f"(the first, the one on the diagonal and the one left of it): give top_k={self._forced} or more, or "
                "leave subdiagonal out"
            )

    @property
    def _near(self) -> int:
        """Key blocks up to the diagonal that every query block reads."""
        return 1 + self.subdiagonal

    @property
    def _forced(self) -> int:
        """Key blocks that every query block reads, where there are so many."""
        return 1 + self._near

    def knobs_for(self, sparsity: float, length: int, geometry: Geometry | None = None) -> BlockSparse:
        """The largest `top_k` that stays within the budget; `select` spends what is left on the last rows."""
        return replace(self, top_k=self._budgets(sparsity, length)[0])

    def _budgets(self, sparsity: float, length: int) -> tuple[int, int]:
        return row_budgets(length, int(self.block_size), 1 - sparsity, self._forced)

    def largest_sparsity(self, length: int) -> float:
        return 1 - uniform_pairs(length, int(self.block_size), self._forced) / causal_pairs(length)

    def too_short(self, sparsity: float | None, length: int) -> str | None:
        if sparsity is None:
            blocks = -(-length // int(self.block_size))
            return (
                f"prompt of {length} tokens has no more than top_k={self.top_k} blocks"
                if self.top_k >= blocks
                else None
            )
        if self.largest_sparsity(length) < sparsity:
            always = "first key block, diagonal and subdiagonal" if self.subdiagonal else "first key block and diagonal"
            return (
                f"prompt of {length} tokens is too short for sparsity {sparsity:g} ({always} "
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
        budget, extra = (int(self.top_k), 0) if sparsity is None else self._budgets(sparsity, length)
        # Neither the scale nor a softcap changes the order of scores.
        indices, counts = top_blocks(*pool_both(query, key, block), budget, extra, near=self._near)
        return Selection(
            layout=BlockLayout(indices, counts, length, block, block),
            estimator_flops=heads * (2 * blocks * blocks * dim + length * dim) + kv_heads * length * dim,
            estimator_bytes=query.element_size() * dim * (heads + kv_heads) * length,
            knobs={"top_k": float(min(budget + (extra > 0), blocks)), "block_size": block},
        )


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
