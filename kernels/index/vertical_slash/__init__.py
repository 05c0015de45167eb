"""Verticals and slashes: which columns and diagonals a budget takes, how many fit a density, and the layout they make.

It knows masses of columns and of diagonals, not where they come from.
"""

from __future__ import annotations

from torch import Tensor

from ...backends import choose
from .naive import Pattern

__all__ = ["Pattern", "rank"]


def rank(columns: Tensor, diagonals: Tensor, sinks: int, near: int, tile: int, *, backend: str = "auto") -> Pattern:
    """The columns and diagonals of every head, in the order in which a growing budget takes them.

    Args:
        columns, diagonals: `(H, L)` fp32 mass of each column, and of each diagonal (query - key).
        sinks, near: first columns and nearest diagonals, which are taken before all others.
        tile: 16, 32, 64 or 128; diagonals are executed as tiles of this size.
        backend: `auto`, `naive` or `triton`. The latter never waits for the device, except where the lists of
            `Pattern.layout` might not fit (see there).
    """
    if choose(backend, columns.device) == "triton":
        from . import triton

        return triton.Pattern(columns, diagonals, sinks, near, tile)
    return Pattern(columns, diagonals, sinks, near, tile)
