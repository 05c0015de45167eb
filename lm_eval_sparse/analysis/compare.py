"""Two runs on the same documents: how many changed sides, which is ahead, what is a tie. Numpy arrays only.

Many pairs at once. Nothing is concluded from fewer documents than could have shown it, nor from a variance of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .guarantee import Floats


@dataclass(frozen=True)
class Flips:
    """Documents that changed between dense and sparse, fields (...,).

    Attributes:
        lost, gained: documents with a lower and a higher score than dense.
        n: documents that both have.
        p: exact McNemar test of "as many are lost as gained"; of graded scores that is the sign test.
    """

    lost: NDArray[np.int64]
    gained: NDArray[np.int64]
    n: NDArray[np.int64]
    p: Floats


def flips(dense: ArrayLike, sparse: ArrayLike) -> Flips:
    """Flips of runs (..., n) against a dense one (n,); nan where a run lacks a document."""
    from scipy import stats

    change = np.asarray(sparse, np.float64) - np.asarray(dense, np.float64)
    lost, gained, n = (np.sum(which, axis=-1) for which in (change < 0, change > 0, ~np.isnan(change)))
    p = np.minimum(1.0, 2 * stats.binom.cdf(np.minimum(lost, gained), lost + gained, 0.5))
    return Flips(lost, gained, n, p)


def graded(scores: ArrayLike) -> bool:
    """Whether scores take other values than 0 and 1 (nan aside)."""
    scores = np.asarray(scores, np.float64)
    return bool(np.any((scores != 0) & (scores != 1) & ~np.isnan(scores)))


@dataclass(frozen=True)
class Compared:
    """Pairs of runs, fields (...,).

    Attributes:
        difference: mean of first - second over documents that both have; nan without any.
        n: those documents.
        p_differ: of "their means are equal", two-sided paired t-test.
        p_tie: of "their means differ by the margin or more": the larger p of two one-sided paired t-tests (TOST).
    """

    difference: Floats
    n: NDArray[np.int64]
    p_differ: Floats
    p_tie: Floats


def compare(first: ArrayLike, second: ArrayLike, margin: float) -> Compared:
    """Compare runs (..., n) document by document; nan where one lacks a document.

    With guards, since t-tests are wrong where differences are rare (the document in which one method fails may not be
    among the n) or all the same. Each side of a tie is tested with one more document, in which the methods differ as
    much as they can, against the tie. No p-value of a tie is below (1 - margin)^n, what n documents without any
    difference could show, and none of a difference below 2^(1 - n), the sign test's of n differences of one sign, which
    stands where all differences are one value. Below 2 documents both are 1. benchmarks/guarantee_simulation.py has the
    rates of error.

    Args:
        margin: difference of means, in the scores' own unit, in (0, 1), below which it is a tie.
    """
    from scipy import stats

    change = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    there = ~np.isnan(change)
    n = there.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        mean = np.where(there, change, 0.0).sum(axis=-1) / n
        squares = (np.where(there, change - mean[..., None], 0.0) ** 2).sum(axis=-1)
        error = np.sqrt(squares / (n - 1) / n)
        freedom = n - 1.0
        differ = 2 * stats.t.sf(np.abs(mean) / error, freedom)
        # One more document, of a difference of 1, changes the sum of squares by (1 - mean)^2 n / (n + 1).
        sides = [stats.t.cdf(_with_one_more(side * mean, squares, n, margin), n) for side in (1.0, -1.0)]
        constant = error < 1e-10
        differ = np.where(constant & (np.abs(mean) < 1e-10), 1.0, np.where(constant, 0.0, differ))
    differ = np.maximum(differ, 2.0 ** (1.0 - n))
    tie = np.maximum(np.maximum(*sides), (1.0 - margin) ** n)
    few = n < 2
    return Compared(mean, n, np.where(few, 1.0, differ), np.where(few, 1.0, tie))


def _with_one_more(mean: Floats, squares: Floats, n: NDArray[np.int64], margin: float) -> Floats:
    """t of "the mean is the margin or more" with one more difference of 1."""
    more = mean + (1 - mean) / (n + 1)
    error = np.sqrt((squares + (1 - mean) ** 2 * n / (n + 1)) / n / (n + 1))
    return (more - margin) / error
