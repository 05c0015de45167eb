"""What methods look at before they select: attention of the last queries, pooled queries and keys, bounds of pages.

Scores are fp32, and nothing of size L x L is ever made.
"""

from .page_bounds import page_scores, update_bounds
from .pooling import pool, pool_both, sum_blocks
from .window import WindowSums, diagonal_sums, window_flops, window_sums
from .window_blocks import WindowBlocks, window_blocks

__all__ = [
    "WindowBlocks",
    "WindowSums",
    "diagonal_sums",
    "page_scores",
    "pool",
    "pool_both",
    "sum_blocks",
    "update_bounds",
    "window_blocks",
    "window_flops",
    "window_sums",
]
