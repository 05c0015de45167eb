"""Blocks that cover a share of the estimated attention: FlexPrefill's choice, from block masses to a layout.

Two kinds of heads: most take key blocks (verticals) and bands of diagonals (slashes) by descending mass; query-aware
heads take tiles by descending probability in the map of pooled queries and keys. Either takes the smallest set that
leaves out at most the share `rest` = 1 - gamma, besides the first key block and the diagonal. Ties go to recent keys.
`rest` is given, or it is solved for, one for all heads, so that their mean density meets a target.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...backends import choose
from ...types import Blocks
from . import naive
from .naive import APART, coverage_keys
from .tokens import by_tokens

__all__ = ["APART", "Coverage", "by_tokens", "coverage_keys", "select"]

#: The counters of the Triton backend hold the tiles of a map of fewer blocks than this.
MAX_BLOCKS = 1 << 14


@dataclass(frozen=True)
class Coverage:
    """What `select` chose.

    Attributes:
        layout: the tiles of each head.
        gamma, rest: the share covered at least, and the share that may be left out; fp64 tensors of one number where
            they were solved on the device, floats elsewhere.
    """

    layout: Blocks
    gamma: float | Tensor
    rest: float | Tensor


def select(
    query: Tensor,
    pooled_keys: Tensor,
    vertical: Tensor,
    slash: Tensor,
    query_aware: Tensor,
    block: int,
    *,
    scale: float,
    softcap: float | None = None,
    floor: int = 0,
    ceiling: int | None = None,
    rest: float | None = None,
    density: float | None = None,
    backend: str = "auto",
) -> Coverage:
    """Choose tiles of `block` x `block` for every query head (Lai et al., ICLR 2025, Algorithms 1, 3 and 4).

    Args:
        query: `(H, L, D)`.
        pooled_keys: `(H_kv, n, D)` fp32, means of the key blocks.
        vertical, slash: `(H, n)` fp32, mass of each key block and of each band of `block` diagonals.
        query_aware: `(H,)` bool, heads that follow the map of pooled scores.
        scale, softcap: as the attention itself uses them.
        floor, ceiling: least and most verticals, and slashes, of a head. Query-aware heads take `floor` of each
            besides; with a `density` there is no floor and no ceiling.
        rest: share of the estimated attention that may be left out; or, instead,
        density: executed pairs over causal pairs, on average over the heads, to come close to.
        backend: `auto`, `naive` or `triton`. The latter does not wait for the device, except where lists that hold
            all blocks would take more than 1 GiB: then it reads how long they are.

    Raises:
        ValueError: both or none of `rest` and `density`, or a backend that cannot run here.
    """
    if (rest is None) == (density is None):
        raise ValueError(f"rest={rest} and density={density} given; expected one of them")
    blocks = vertical.shape[1]
    ceiling = blocks if ceiling is None else ceiling
    floor, ceiling = (0, blocks) if density is not None else (min(floor, blocks), ceiling)
    arguments = (query, pooled_keys, vertical, slash, query_aware, block, scale, softcap, floor, ceiling, rest, density)
    if backend == "triton" and blocks >= MAX_BLOCKS:
        raise ValueError(f"backend 'triton' takes fewer than {MAX_BLOCKS} blocks, not {blocks}; use 'auto' or 'naive'")
    if choose(backend, query.device) == "triton" and blocks < MAX_BLOCKS:
        from . import triton

        return Coverage(*triton.select(*arguments))
    return Coverage(*naive.select(*arguments))
