"""Block-Sparse (MInference, Jiang et al. 2024) as harmonised by The Sparse Frontier (section 3): top-k blocks.

Queries and keys are averaged per block; each query block reads the key blocks whose averages have the largest
product with its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...errors import UserError
from ...kernels.estimate import pool_both
from ...kernels.types import BLOCK_SIZES
from ..base import Call, number, one_of, yes_or_no
from ..presets import SEVEN, Parameters, rows
from ..scored import ScoredPrefill


@dataclass(frozen=True)
class BlockSparse(ScoredPrefill):
    """The same number of key blocks for every query block and head (paper: section 3 and Table 3).

    Knobs:
        top_k: key blocks that a query block reads, the first and the diagonal one included.
        block_size: 16 as in the paper, 32, 64 or 128.
        subdiagonal: whether the key block just left of the diagonal is always read, too. The paper's text does not say
            so; its code does, and made its numbers: `preset=paper` sets it.
    """

    name: ClassVar[str] = "block_sparse"
    importance: ClassVar[str] = "pooled scores"
    reference: ClassVar[str] = "Jiang et al., NeurIPS 2024 (MInference)"
    budget_knobs: ClassVar[tuple[str, ...]] = ("top_k",)
    tiny: ClassVar = {"top_k": 4}
    paper: ClassVar = Parameters(
        SEVEN,
        ("top_k",),
        rows(
            {
                16384: (26, 35, 53, 71, 108, 188, 300),
                32768: (52, 69, 105, 141, 216, 376, 600),
                65536: (104, 139, 210, 283, 432, 752, 1200),
            }
        ),
        fixed={"subdiagonal": True},
    )

    top_k: int = 64
    block_size: int = 16
    subdiagonal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        number("top_k", self.top_k, 2, math.inf, whole=True, example=64)
        one_of("block_size", self.block_size, BLOCK_SIZES)
        yes_or_no("subdiagonal", self.subdiagonal)
        if self.top_k < self._forced:
            raise UserError(
                f"top_k={self.top_k} cannot hold the {self._forced} blocks that are always read with subdiagonal=True "
                f"(the first, the one on the diagonal and the one left of it): give top_k={self._forced} or more, or "
                "leave subdiagonal out"
            )

    @property
    def near(self) -> int:
        return 1 + self.subdiagonal

    @property
    def always(self) -> str:
        return "first key block, diagonal and subdiagonal" if self.subdiagonal else "first key block and diagonal"

    def factors(self, call: Call) -> tuple[Tensor, Tensor]:
        # Neither the scale nor a softcap changes the order of scores.
        return pool_both(call.query, call.key, int(self.block_size))
