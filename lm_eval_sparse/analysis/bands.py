"""Bands of mean scores: a bootstrap over documents, paired wherever runs share their documents.

Runs of a cell answer the same documents, so every draw takes the same documents of all of them: a difference between
two runs is a mean of differences, and what makes a document hard cancels. Here are arrays only: nothing of records or
files.

What a band says, and where none is given:

* Bands are pointwise, by the percentiles of `DRAWS` resamples with a fixed seed: the same data has the same bands.
* Below `LEAST` documents there is none. (Percentiles of a mean of n scores are those of a normal law with n in place of
  n - 1: with 20 scores a band of 95% covers some 93%, with 10 some 90%.)
* Where all documents have the same score every resample has the same mean, and the percentiles would pretend to be
  certain. If scores are bounded, the limit of Clopper and Pearson for what was never seen takes their place: a share of
  up to `unseen(n)` of all documents may score something else, anything in the bounds. Elsewhere there is no band.
* Where documents are right or wrong and fewer than `RARE` are the one or the other, percentiles are too narrow still
  (of 100 documents with an accuracy of .965 they cover 88%); there the limits are those of Clopper and Pearson.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

#: Resamples, the seed of their random numbers, and what a band covers.
DRAWS, SEED, LEVEL = 2000, 20250418, 0.95
#: Documents below which there is no band.
LEAST = 20
#: Documents of the rarer kind, right or wrong, below which limits are exact instead of resampled.
RARE = 5
#: The sparsities that the paper reports (its section "Experimental setup"): budgets 1, 1/1.5, ..., 1/20.
PAPER = (0.0, 0.33, 0.5, 0.6, 0.7, 0.8, 0.87, 0.9, 0.93, 0.95)

#: Numbers held at a time: of resampled means, and of how often documents are drawn (32 and 2 MB).
_AT_ONCE, _KEPT = 8_000_000, 500_000
#: Scores that differ by less are the same, interpolated ones among them.
_ROUNDING = 1e-12


#: The least and the largest score there can be.
Bounds = tuple[float | np.ndarray, float | np.ndarray] | None


@dataclass(frozen=True)
class Bands:
    """Values with their bands, each array (P,) float64.

    Attributes:
        value: nan where nothing was measured.
        low, high: limits; nan where there is no band.
        why: for each value why it has no band; empty where it has one.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    why: tuple[str, ...]

    def part(self, start: int, size: int) -> Bands:
        """Some of them, from `start` on."""
        some = slice(start, start + size)
        return Bands(self.value[some], self.low[some], self.high[some], self.why[some])


@dataclass(frozen=True)
class Stratum:
    """Scores of one set of documents: of one task, for instance.

    Attributes:
        scores: float64 (P, n), P quantities of the same n documents; nan where a document is missing.
        key: names the documents; sets with other keys are drawn independently of each other.
        bounds: what a score may be, for all rows or (P,) for each; None where nothing bounds it.
    """

    scores: np.ndarray
    key: str
    bounds: Bounds = (0.0, 1.0)


def resampled(scores: np.ndarray, key: str = "", draws: int = DRAWS) -> np.ndarray:
    """Means of resampled documents.

    Args:
        scores: (P, n); nan where a document is missing: a mean is over those that are there.
        key: see `Stratum`; rows share their resamples.

    Returns:
        float32 (P, draws); nan where a resample has no document of a row.
    """
    scores = np.atleast_2d(np.asarray(scores, float))
    here = np.isfinite(scores)
    # Deviations from the mean: float32 rounds 1e6 + small differences away, not small differences.
    middle = _means(scores)[:, None]
    with np.errstate(invalid="ignore", over="ignore"):  # of inf, and beyond float32; `stratified` gives those no band
        deviations = np.where(here, scores - middle, 0.0).astype(np.float32)
    found = np.empty((len(scores), draws), np.float32)
    start = 0
    for drawn in _drawn(scores.shape[1], key, draws):
        block = slice(start, start := start + len(drawn))
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            found[:, block] = deviations @ drawn.T
            found[:, block] /= scores.shape[1] if here.all() else here.astype(np.float32) @ drawn.T
    with np.errstate(invalid="ignore", over="ignore"):
        return found + middle.astype(np.float32)


def _drawn(n: int, key: str, draws: int) -> Iterable[np.ndarray]:
    """How often each of n documents is drawn, as blocks (some draws, n) of float32 whose rows sum to n."""
    return _kept(n, key, draws) if n * draws <= _KEPT else _blocks(n, key, draws)


@lru_cache(maxsize=128)
def _kept(n: int, key: str, draws: int) -> tuple[np.ndarray, ...]:
    return tuple(_blocks(n, key, draws))


def _blocks(n: int, key: str, draws: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng([SEED, n, zlib.crc32(key.encode("utf-8", "surrogatepass"))])
    step = max(1, _KEPT // n)
    for start in range(0, draws, step):
        size = min(step, draws - start)
        drawn = generator.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float32)


def unseen(n: int | np.ndarray, level: float = LEVEL) -> Any:
    """The largest share of documents that may differ from n that are all alike: the upper limit of Clopper and Pearson.

    n such documents are drawn with probability (1 - share)^n; the limit is where that is (1 - level) / 2.
    """
    return 1 - ((1 - level) / 2) ** (1 / np.asarray(n, float))


def bands(scores: np.ndarray, key: str = "", bounds: Bounds = (0.0, 1.0), level: float = LEVEL) -> Bands:
    """Mean scores with percentile bands. `scores` (P, n), see `Stratum`; a row with one document less has its mean over
    the others."""
    return stratified([Stratum(np.atleast_2d(np.asarray(scores, float)), key, bounds)], level)


def stratified(strata: Sequence[Stratum], level: float = LEVEL) -> Bands:
    """Means over strata of the means over their documents, each stratum with the same weight.

    Documents are drawn within their stratum. What a stratum with exact limits adds to a band is no spread of resamples;
    it is joined to theirs as distances of independent limits are: the root of the sum of squares (Zou and Donner 2008,
    "MOVER").

    Args:
        strata: with the same number of rows P.

    Returns:
        P values; nan for a row of which a stratum has no document.
    """
    rows = strata[0].scores.shape[0]
    share = 1 / len(strata)
    value = share * sum(_means(stratum.scores) for stratum in strata)
    below, above = np.zeros(rows), np.zeros(rows)
    given = np.zeros((len(strata), rows), bool)
    why = np.full(rows, "", object)
    for place, stratum in enumerate(strata):
        n, low, high = exact(stratum, level)
        given[place] = ~np.isnan(low)
        mean = _means(stratum.scores)
        below += np.where(given[place], share * (mean - low), 0.0) ** 2
        above += np.where(given[place], share * (high - mean), 0.0) ** 2
        unbounded = given[place] & (np.isinf(low) | np.isinf(high))
        why = np.where(unbounded, "all documents have the same score, and nothing bounds what others would have", why)
        few = n < LEAST
        why = np.where(few, [f"{count} documents; a band needs {LEAST}" for count in n], why)
    why = np.where(np.isnan(value), "not measured", why)
    low, high = value.copy(), value.copy()
    drawn = np.flatnonzero((~given).any(axis=0) & (why == ""))
    step = max(1, _AT_ONCE // DRAWS)
    for start in range(0, len(drawn), step):
        some = drawn[start : start + step]
        means = sum(share * resampled(stratum.scores[some], stratum.key) for stratum in strata)
        low[some], high[some] = quantiles(means, level)
    with np.errstate(invalid="ignore"):
        low, high = value - np.sqrt((value - low) ** 2 + below), value + np.sqrt((high - value) ** 2 + above)
    why = np.where((why == "") & ~(np.isfinite(low) & np.isfinite(high)), "scores too large to resample", why)
    none = why != ""
    low[none], high[none] = np.nan, np.nan
    return Bands(value, low, high, tuple(str(reason) for reason in why))


def exact(stratum: Stratum, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row its documents, and the limits of its mean that need no resamples: where all documents have the same
    score, and where nearly all are right or wrong. nan elsewhere; infinite where nothing bounds scores. Three arrays
    (P,)."""
    from scipy.special import betaincinv

    scores = stratum.scores
    here = np.isfinite(scores)
    n = here.sum(axis=1)
    least = np.where(here, scores, np.inf).min(axis=1, initial=np.inf)
    most = np.where(here, scores, -np.inf).max(axis=1, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        same = (n > 0) & (most - least <= _ROUNDING * np.maximum(1, np.abs(most)))
    smallest, largest = (np.broadcast_to(bound, n.shape) for bound in stratum.bounds or (-np.inf, np.inf))
    share = unseen(np.maximum(n, 1), level)
    seen = np.where(same, least, 0.0) * (1 - share)  # a row without documents has no least one
    low = np.where(same, seen + smallest * share, np.nan)
    high = np.where(same, seen + largest * share, np.nan)
    known = np.where(here, scores, np.nan)  # inf is missing as nan is
    right, wrong = ((np.abs(known - bound[:, None]) <= _ROUNDING).sum(axis=1) for bound in (largest, smallest))
    few = ~same & (right + wrong == n) & (np.minimum(right, wrong) < RARE) & (n > 0)
    if few.any():  # right and wrong are both at least 1 here
        tail, least, width = (1 - level) / 2, smallest[few], (largest - smallest)[few]
        low[few] = least + width * betaincinv(right[few], wrong[few] + 1, tail)
        high[few] = least + width * betaincinv(right[few] + 1, wrong[few], 1 - tail)
    return n, low, high


def quantiles(draws: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """The limits between which the middle `level` of each row of `draws` (P, D) lies, by linear interpolation between
    neighbours in order, as numpy does it; draws that are nan are left out."""
    if np.isnan(draws).any():
        limits = np.full((2, len(draws)), np.nan)
        some = ~np.isnan(draws).all(axis=1)
        limits[:, some] = np.nanpercentile(draws[some], [50 * (1 - level), 50 * (1 + level)], axis=1)
        return limits[0], limits[1]
    # np.percentile would sort again for each limit and copy rows: this is its rule, at a third of the time.
    places = np.array([(1 - level) / 2, (1 + level) / 2]) * (draws.shape[1] - 1)
    floors = np.floor(places).astype(int)
    ceilings = np.minimum(floors + 1, draws.shape[1] - 1)
    ordered = np.partition(draws, sorted({*floors, *ceilings}), axis=1)
    found = ordered[:, floors] + (places - floors) * (ordered[:, ceilings] - ordered[:, floors])
    return found[:, 0].astype(float), found[:, 1].astype(float)


def bca(scores: np.ndarray, key: str = "", level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Limits of mean scores, corrected for bias and skewness (Efron 1987, "BCa").

    Nearer to the stated coverage than percentiles where few scores are skewed; with two or three different scores
    (accuracies) it gains nothing, so curves do without.

    Args:
        scores: float64 (P, n) without nan, n at least `LEAST`, and no row with one score only.

    Returns:
        Two arrays (P,).
    """
    from scipy.special import ndtr, ndtri

    scores = np.atleast_2d(np.asarray(scores, float))
    deviations = scores - scores.mean(axis=1, keepdims=True)
    # Of a mean the jackknife is linear in the scores, and the acceleration the skewness of the scores.
    acceleration = (deviations**3).sum(axis=1) / (6 * (deviations**2).sum(axis=1) ** 1.5)
    draws = np.sort(resampled(deviations, key).astype(float), axis=1)
    bias = ndtri(((draws < 0).sum(axis=1) + (draws <= 0).sum(axis=1)) / (2 * draws.shape[1]))
    limits = []
    for quantile in (ndtri((1 - level) / 2), ndtri((1 + level) / 2)):
        share = ndtr(bias + (bias + quantile) / (1 - acceleration * (bias + quantile)))
        place = share * (draws.shape[1] - 1)
        floor = np.floor(place).astype(int)[:, None]
        pair = np.take_along_axis(draws, np.concatenate([floor, np.minimum(floor + 1, draws.shape[1] - 1)], 1), 1)
        limits.append(pair[:, 0] + (place - floor[:, 0]) * (pair[:, 1] - pair[:, 0]) + scores.mean(axis=1))
    return limits[0], limits[1]


# -- between run points


def between(x: Sequence[float], wanted: Sequence[float], slack: float = 0.0) -> np.ndarray:
    """Weights of linear interpolation, (W, P) float64: `between(x, wanted) @ y` is y at `wanted`.

    The weights are those of runs, so that they serve scores of documents as well as their means. Beyond the measured
    range a row is nan: nothing is extrapolated. Runs at the same x count with their mean.

    Args:
        x: (P,) measured sparsities in any order.
        wanted: (W,).
        slack: so far beyond the range the run at its end counts unchanged.
    """
    x, wanted = np.asarray(x, float), np.asarray(wanted, float)
    places, index = np.unique(x, return_inverse=True)
    weights = np.zeros((len(wanted), len(places)))
    if not len(places):
        return np.full((len(wanted), 0), np.nan)
    inside = (wanted >= places[0] - slack) & (wanted <= places[-1] + slack)
    wanted = np.clip(wanted, places[0], places[-1])
    right = np.clip(np.searchsorted(places, wanted), 0, len(places) - 1)
    left = np.clip(right - 1, 0, None)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(places[right] > places[left], (wanted - places[left]) / (places[right] - places[left]), 1.0)
    rows = np.arange(len(wanted))
    weights[rows, left] = 1 - part
    weights[rows, right] += np.where(left == right, 0.0, part)
    weights[rows[left == right], right[left == right]] = 1.0
    weights[~inside] = np.nan
    return (weights / np.bincount(index))[:, index]


def interpolated(weights: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Scores of documents between runs: `weights` (W, P) of `between`, `scores` (P, n); gives (W, n) float64.

    A document is missing (nan) where a run that counts there lacks it: a run with weight 0 does not matter.
    """
    scores = np.asarray(scores, float)
    missing = ~np.isfinite(scores)
    found = weights @ np.where(missing, 0.0, scores)
    if missing.any():
        found[((np.abs(np.nan_to_num(weights, nan=1.0)) > 0).astype(float) @ missing.astype(float)) > 0] = np.nan
    return found


def _means(scores: np.ndarray) -> np.ndarray:
    """Means of rows over what is there; nan for a row with nothing."""
    here = np.isfinite(scores)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(here, scores, 0.0).sum(axis=1) / here.sum(axis=1)
