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
        p_differ: of "their means are equal": two-sided, twice the smaller p of two one-sided paired t-tests.
        p_tie: of "their means differ by the margin or more": the larger p of two one-sided paired t-tests (TOST).
    """

    difference: Floats
    n: NDArray[np.int64]
    p_differ: Floats
    p_tie: Floats


def compare(first: ArrayLike, second: ArrayLike, margin: float) -> Compared:
    """Compare runs (..., n) document by document; nan where one lacks a document.

    With guards, since t-tests are wrong where differences are rare (the document in which one method fails may not be
    among the n) or all the same. Each side is tested with one more document, in which the methods differ as much as
    they can, against what is to be shown. Besides:

    * No p-value of a tie is below (1 - margin)^n, what n documents without any difference could show.
    * None of a difference is below 2^(1 - n), the sign test's of n differences of one sign, nor below the chance that
      so little was seen against it, where as much is due as was seen for it and comes in whole documents: a Poisson
      variable's, of the mean that the differences for it sum to, to be at most the sum of those against it.

    Below 2 documents both are 1.

    These are approximations still. With ties that are none, losses of 0 and 1 whose mean is the margin (exact, margins
    from .02 to .2, n from 20 to 600), the worst rates found are .107 at level .1, .067 at .05, .030 at .01 and .010 at
    .001. With differences that are none, one rare and large against many small ones, in 2 or 3 values (exact, n from 20
    to 2000), they are .099, .051, .016 and .0031. Of many pairs Holm's procedure looks at levels as small as the last.
    benchmarks/guarantee_simulation.py draws more.

    Args:
        margin: difference of means, in the scores' own unit, in (0, 1), below which it is a tie.
    """
    from scipy import special, stats

    change = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    there = ~np.isnan(change)
    n = there.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        mean = np.where(there, change, 0.0).sum(axis=-1) / n
        squares = (np.where(there, change - mean[..., None], 0.0) ** 2).sum(axis=-1)
        # One more document, of a difference of 1, changes the sum of squares by (1 - mean)^2 n / (n + 1).
        ties = [stats.t.cdf(_with_one_more(side * mean, squares, n, margin), n) for side in (1.0, -1.0)]
        leads = [stats.t.cdf(_with_one_more(side * mean, squares, n, 0.0), n) for side in (1.0, -1.0)]
    sums = [np.where(there, np.maximum(side * change, 0.0), 0.0).sum(axis=-1) for side in (1.0, -1.0)]
    unseen = special.gammaincc(np.minimum(*sums) + 1, np.maximum(*sums))
    differ = np.maximum(np.minimum(1.0, 2 * np.minimum(*leads)), np.maximum(unseen, 2.0 ** (1.0 - n)))
    tie = np.maximum(np.maximum(*ties), (1.0 - margin) ** n)
    few = n < 2
    return Compared(mean, n, np.where(few, 1.0, differ), np.where(few, 1.0, tie))


def _with_one_more(mean: Floats, squares: Floats, n: NDArray[np.int64], margin: float) -> Floats:
    """t of "the mean is the margin or more" with one more difference of 1."""
    more = mean + (1 - mean) / (n + 1)
    error = np.sqrt((squares + (1 - mean) ** 2 * n / (n + 1)) / n / (n + 1))
    return (more - margin) / error
