"""Which of several configurations no other one beats. Knows numbers only."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def front(cost: ArrayLike, score: ArrayLike) -> NDArray[np.bool_]:
    """`(n,)`: whether a point is on the Pareto front: no other one costs no more and scores no less, with one of both
    better.

    Points that are equal in both are all on it, or none. A point without a finite cost and score is not.

    Args:
        cost: `(n,)`, the lower the better; score: `(n,)`, the higher the better.
    """
    cost, score = np.asarray(cost, dtype=float), np.asarray(score, dtype=float)
    known = np.isfinite(cost) & np.isfinite(score)
    on = np.zeros(len(cost), dtype=bool)
    order = np.flatnonzero(known)
    if not len(order):
        return on
    order = order[np.lexsort((-score[order], cost[order]))]
    sorted_cost, sorted_score = cost[order], score[order]
    # The best of all that cost less: of equal cost only the best can be on the front.
    starts = np.r_[True, sorted_cost[1:] != sorted_cost[:-1]]
    first = np.flatnonzero(starts)[np.cumsum(starts) - 1]
    before = np.r_[-np.inf, np.maximum.accumulate(sorted_score)][first]
    on[order] = (sorted_score > before) & (sorted_score == sorted_score[first])
    return on
