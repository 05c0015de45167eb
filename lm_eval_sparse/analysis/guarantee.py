"""What may be promised of a sparse run: paired losses, p-values, sequences of tests, and when to refuse. Numpy only.

Of every document the loss is max(0, dense - sparse), in [0, 1]. What gains do not pay back is counted, so the mean loss
is at least the fall of the mean score: a bound on it is a bound on the fall, and a conservative one. A configuration is
certified where "its mean loss over documents like these is above the tolerance" is rejected (Learn then Test,
Angelopoulos et al. 2021). Along one method the hypotheses are tested in the order of sparsity, fixed before any score
is seen, and the first that is not rejected ends it. Knows nothing of records, tasks or files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError, nearest

Floats = NDArray[np.float64]

#: The tests there are, and what is said of each beside its figures.
TESTS = {
    "hoeffding-bentkus": "Hoeffding-Bentkus bound on the mean of max(0, dense - sparse): holds at any number of "
    "documents",
    "paired-t": "paired t-test of dense - sparse: an approximation without a finite-sample guarantee",
    "welch": "Welch's t-test of dense and sparse as if on different documents: an approximation without a "
    "finite-sample guarantee",
}
#: How many standard errors dense must be above chance, and the share of a normal distribution beyond them.
STANDARD_ERRORS = 3.0
_BEYOND = 0.5 * math.erfc(STANDARD_ERRORS / math.sqrt(2))
#: Below so many documents a standard error is not relied on alone: 2 of 2 right have one of 0.
FEW = 30
#: Sums of losses nearer to a whole number than this are that number: float64 sums of some 1e6 losses err by less.
_ROUNDING = 1e-9
#: Documents beyond which it is not looked for a number that would do.
MOST_DOCUMENTS = 1_000_000


def check_options(tolerance: float, level: float, test: str = "hoeffding-bentkus", margin: float = 0.05) -> None:
    """Raise `UserError` for a tolerance, level, margin or test that means nothing."""
    for name, value, low in (("tolerance", tolerance, "above 0"), ("level", level, "above 0"), ("margin", margin, "0")):
        fits = isinstance(value, int | float) and value < 1 and (value > 0 or (low == "0" and value == 0))
        if not fits:
            usual = 0.1 if name == "level" else 0.05
            given = f"{value:g}" if isinstance(value, int | float) else value
            raise UserError(f"--{name} {given}: give a number from {low} to below 1, such as --{name} {usual}")
    if test not in TESTS:
        raise UserError(f"--test {test}: choose {', '.join(TESTS)}{nearest(test, TESTS)}")


# -- losses and p-values


def losses(dense: ArrayLike, sparse: ArrayLike) -> Floats:
    """Paired losses max(0, dense - sparse).

    Args:
        dense: (n,) scores in [0, 1], nan where the run lacks the document.
        sparse: (..., n) scores of the same documents.

    Returns:
        (..., n), nan where either run lacks the document.

    Raises:
        ValueError: scores outside [0, 1], of which no bound holds.
    """
    dense, sparse = np.asarray(dense, np.float64), np.asarray(sparse, np.float64)
    for scores in (dense, sparse):
        known = scores[~np.isnan(scores)]
        if known.size and (known.min() < 0 or known.max() > 1):
            raise ValueError("scores outside [0, 1] have no bounded loss")
    return np.maximum(dense - sparse, 0.0)  # np.maximum hands nan on


@dataclass(frozen=True)
class Tested:
    """What a test says of runs against dense ones, each field (...,): of one run each.

    Attributes:
        p: of "the loss is above the tolerance"; 1 where no document is shared.
        n: documents that both have (over all tasks, where they are put together).
        loss: mean of max(0, dense - sparse); nan where n is 0.
        stderr: its standard error; nan below two documents.
    """

    p: Floats
    n: NDArray[np.int64]
    loss: Floats
    stderr: Floats


def tested(dense: ArrayLike, sparse: ArrayLike, tolerance: float, test: str = "hoeffding-bentkus") -> Tested:
    """Test of each run whether its loss against dense exceeds `tolerance`.

    Args:
        dense: (n,) scores in [0, 1], nan for a document that is missing.
        sparse: (..., n) of the same documents.
        tolerance: in (0, 1).
        test: a name in `TESTS`. The t-tests look at the fall of the mean, not at the clipped loss. Where nothing varies
            they have no p-value (a run that answers as dense does, in every document); the bound's stands there.
    """
    dense = np.asarray(dense, np.float64)
    lost = losses(dense, sparse)
    n = np.sum(~np.isnan(lost), axis=-1)
    total = np.nansum(lost, axis=-1)
    bound = hoeffding_bentkus(total, n, tolerance)
    p = bound if test == "hoeffding-bentkus" else _t_test(dense, np.asarray(sparse, np.float64), tolerance, test, bound)
    with np.errstate(invalid="ignore", divide="ignore"):
        loss = total / n
        spread = np.nansum((lost - loss[..., None]) ** 2, axis=-1)
        stderr = np.where(n > 1, np.sqrt(spread / (n - 1) / n), np.nan)
    return Tested(p, n, loss, stderr)


def hoeffding_bentkus(total: ArrayLike, n: ArrayLike, tolerance: float) -> Floats:
    """p-values of "the mean loss exceeds `tolerance`" from independent losses in [0, 1] (Bates et al. 2021).

    The losses need not be alike: Hoeffding's bound (1963, Theorem 1) and Bentkus's (2004, Theorem 1.2) hold for the
    average of unequal means as well, so documents of several tasks may be put together.

    Args:
        total: (...,) sums of losses.
        n: (...,) or one number for all: how many losses each sum has; 0 gives 1.
        tolerance: in (0, 1).
    """
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

    total, n = np.broadcast_arrays(np.asarray(total, np.float64), np.asarray(n, np.int64))
    shape, total, n = total.shape, total.ravel(), n.ravel()
    # Bentkus's bound counts ceil(n * mean) losses, and a sum of .1 + .2 + .7 that comes out above 1 would be 2. Whole
    # sums are made whole, and their mean is a little less, so that multiplying by n does not end above it again.
    whole = np.rint(total)
    sums = np.where(np.abs(total - whole) < _ROUNDING, whole * (1 - 4 * np.finfo(np.float64).eps), total)
    mean = np.where(n > 0, sums / np.maximum(n, 1), 1.0)
    p = compute_hoeffding_bentkus_p_value(mean, np.maximum(n, 1).astype(np.float64), np.array([tolerance]))
    return np.minimum(p[:, 0], 1.0).reshape(shape)


def _t_test(dense: Floats, sparse: Floats, tolerance: float, test: str, fixed: Floats) -> Floats:
    """(...,) p-values of "the mean falls by more than `tolerance`", `fixed` where nothing varies."""
    from scipy import stats

    there = ~np.isnan(dense + sparse)
    n = there.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        if test == "paired-t":
            mean, variance = _moments(dense - sparse, there)
            error, freedom = variance / n, n - 1.0
        else:
            means, variances = zip(
                *(_moments(np.broadcast_to(s, there.shape), there) for s in (dense, sparse)), strict=True
            )
            mean, (one, other) = means[0] - means[1], (variances[0] / n, variances[1] / n)
            error = one + other
            freedom = error**2 / ((one**2 + other**2) / (n - 1.0))
        p = stats.t.cdf((mean - tolerance) / np.sqrt(error), freedom)
    return np.where(n < 2, 1.0, np.where(error > 1e-20, p, fixed))


def _moments(values: Floats, there: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """(...,) means and unbiased variances of the values that are there."""
    n = there.sum(axis=-1)
    mean = np.where(there, values, 0.0).sum(axis=-1) / n
    squares = np.where(there, values - mean[..., None], 0.0) ** 2
    return mean, squares.sum(axis=-1) / (n - 1)


# -- several tasks together


def mean_over_tasks(lost: Sequence[Floats], tolerance: float) -> Tested:
    """Test whether the mean over tasks of their mean losses exceeds `tolerance`, run by run.

    With as many documents of each task that is the mean over all documents, whose losses are independent though not
    alike, and `hoeffding_bentkus` holds for it. So where tasks differ in documents the first ones count, as many as the
    smallest has, in their fixed order. Where the mean over tasks of all their documents reaches the tolerance, so that
    only what was left out speaks against it, the p-value is 1: what is certified must not hang on that choice.

    Args:
        lost: of each task (..., n_task) losses; nan where a document is missing. The same leading shape for all.
    """
    there = [~np.isnan(task) for task in lost]
    few = np.min([mask.sum(axis=-1) for mask in there], axis=0)
    total, squares = np.zeros(few.shape), np.zeros(few.shape)
    for task, mask in zip(lost, there, strict=True):
        used = np.where(mask & (np.cumsum(mask, axis=-1) <= few[..., None]), task, 0.0)
        share = used.sum(axis=-1)
        total += share
        with np.errstate(invalid="ignore", divide="ignore"):
            squares += (used**2).sum(axis=-1) - share**2 / few
    n = few * len(lost)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Of a mean over strata of equal size: variances within tasks alone.
        stderr = np.where(few > 1, np.sqrt(squares / (few - 1) * few) / n, np.nan)
        p = hoeffding_bentkus(total, n, tolerance)
        whole = np.mean(
            [np.nansum(task, axis=-1) / mask.sum(axis=-1) for task, mask in zip(lost, there, strict=True)], 0
        )
        return Tested(np.where(whole >= tolerance, 1.0, p), n, total / n, stderr)


def every_task(p: ArrayLike) -> Floats:
    """(...,) p-values of "some task loses more than the tolerance" from (tasks, ...): the largest of them.

    An intersection-union test (Berger 1982): all must be rejected, so no correction for their number is due.
    """
    return np.max(np.asarray(p, np.float64), axis=0)


@dataclass(frozen=True)
class Sequences:
    """What a family of sequences ends with.

    Attributes:
        certified: (..., chains) how many members from the first on are certified.
        level: (...,) what a member's p-value had to be at most, in the end, in chains that are not through.
    """

    certified: NDArray[np.int64]
    level: Floats


def sequences(p: ArrayLike | Sequence[ArrayLike], level: float) -> Sequences:
    """Certify along several chains at once; the chance that any certificate is false is at most `level`.

    A sequentially rejective graph (Bretz et al. 2009): every chain of T starts with level/T, hands it from a member
    that is certified to the next one, and a chain that is through hands it in equal parts to the others. All chains
    that are not through have the same level at any time, level/(T - through), so it can be said in two steps: Holm's
    procedure over the largest p-value of each chain says how many get through, and the rest are fixed sequences at the
    level that is then theirs. With one member each this is Holm's procedure, with one chain the fixed sequence.

    Args:
        p: p-values in the order of testing, (..., chains, members), or a list of (members,) of different length. nan
            (nothing measured) is never certified, nor what follows.
        level: in (0, 1), of the whole family.
    """
    if not isinstance(p, np.ndarray):
        longest = max((len(chain) for chain in p), default=0)
        # What is behind a chain's end must not hold it up: p-values of 0.
        rows = [
            np.pad(np.nan_to_num(np.asarray(chain, np.float64), nan=np.inf), (0, longest - len(chain))) for chain in p
        ]
        lengths = np.array([len(chain) for chain in p], np.int64)
        p = np.stack(rows) if rows else np.zeros((0, 0))
    else:
        p = np.where(np.isnan(p), np.inf, p)
        lengths = np.full(p.shape[-2], p.shape[-1], np.int64)
    chains = p.shape[-2]
    if not chains:
        return Sequences(np.zeros(p.shape[:-1], np.int64), np.full(p.shape[:-2], level))
    worst = np.maximum.accumulate(p, axis=-1) if p.shape[-1] else p
    ends = np.sort(worst[..., -1], axis=-1) if p.shape[-1] else np.zeros(p.shape[:-1])
    through = np.cumprod(ends <= level / np.arange(chains, 0, -1), axis=-1).sum(axis=-1)
    final = level / np.maximum(chains - through, 1)
    certified = np.minimum((worst <= final[..., None, None]).sum(axis=-1), lengths)
    return Sequences(certified, final)


def holm(p: ArrayLike) -> Floats:
    """Adjusted p-values (..., m) of m hypotheses by Holm's procedure: at most the level where one is rejected.

    As statsmodels's `multipletests`, many families at once (and without a collection of garbage in each call).
    """
    p = np.asarray(p, np.float64)
    order = np.argsort(p, axis=-1)
    rising = np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(rising, axis=-1), 1.0), -1)
    return adjusted


# -- what n documents can say


@functools.lru_cache(maxsize=4096)  # a study asks the same a thousand times
def least_documents(tolerance: float, level: float, chains: int = 1, mean_loss: float = 0.0) -> int | None:
    """The fewest documents from which on a mean loss of `mean_loss` is certified, in a family of `chains`.

    Every larger number certifies it as well. (The p-value is a saw in n, since Bentkus's bound counts whole losses: at
    a tolerance of .05, level .1 and a mean loss of .025 272 documents do, 281 to 287 do not, and 288 is the answer.)
    That is said of losses that sum to n * mean_loss, whole or not, or to less. Losses of 0 and 1 have whole sums: what
    is promised is of the whole number below n * mean_loss, and the one above may be refused.

    Counts for the first chain that is certified, at level/chains. None where no number would do: the loss reaches the
    tolerance, or more than `MOST_DOCUMENTS` would be needed.
    """
    if mean_loss >= tolerance:
        return None
    needed = math.log(chains) - math.log(level)
    if mean_loss * MOST_DOCUMENTS <= _ROUNDING:  # (1 - tolerance)^n <= level / chains
        n = needed / -math.log1p(-tolerance)
        return max(1, math.ceil(n - _ROUNDING)) if n <= MOST_DOCUMENTS else None

    def fails(n: NDArray[np.int64]) -> NDArray[np.bool_]:
        return hoeffding_bentkus(n * mean_loss, n, tolerance) > level / chains

    def start(count: NDArray[np.int64]) -> NDArray[np.int64]:
        """The fewest documents whose losses count as so many whole ones."""
        return np.maximum(np.floor((count - 1 + _ROUNDING) / mean_loss), 0).astype(np.int64) + 1

    # Hoeffding's bound falls with every document: where it certifies, so do all larger numbers.
    rate = mean_loss * math.log(mean_loss / tolerance) + (1 - mean_loss) * math.log((1 - mean_loss) / (1 - tolerance))
    sure = needed / rate if rate > 0 else math.inf
    if sure > MOST_DOCUMENTS:
        beyond = np.linspace(MOST_DOCUMENTS, min(sure, 1000 * MOST_DOCUMENTS), 1000)[1:-1].astype(np.int64)
        if fails(beyond).any():
            return None
    # From there downwards to the last number that fails. While as many losses count the p-value falls with every
    # document, so that a stretch of such numbers fails where it starts or nowhere.
    last, size = math.ceil(sure * mean_loss) + 1, 64
    while last >= 0:
        counts = np.arange(max(0, last + 1 - size), last + 1)
        failing = counts[fails(start(counts))]
        if failing.size:
            first, end = start(failing[-1:] + np.array([0, 1]))
            n = np.arange(first, min(end, math.ceil(sure) + 1))
            found = int(n[fails(n)].max()) + 1
            return found if found <= MOST_DOCUMENTS else None
        last, size = int(counts[0]) - 1, 2 * size
    return 1


def could_certify(n: int, level: float, chains: int = 1) -> float:
    """The smallest tolerance that `n` documents can certify when none of them loses anything; 1 without documents."""
    return 1.0 if n < 1 else -math.expm1((math.log(level) - math.log(chains)) / n)


def too_few(n: int, tolerance: float, level: float, chains: int = 1) -> str | None:
    """Why `n` documents can certify nothing whatever they score, and what they could; None where they can."""
    least = least_documents(tolerance, level, chains)
    if n >= least if least is not None else could_certify(n, level, chains) <= tolerance:
        return None
    family = f" in a family of {chains}" if chains > 1 else ""
    needs = least if least is not None else f"more than {MOST_DOCUMENTS:,}"
    return (
        f"{n} documents are too few: a tolerance of {tolerance:g} at level {level:g}{family} needs {needs} even where "
        f"none loses anything; {n} could certify {_up(could_certify(n, level, chains))} at best"
    )


def _up(value: float) -> str:
    """`value` in three decimals, rounded up: a promise must not become better by rounding."""
    return f"{math.ceil(value * 1000 - _ROUNDING) / 1000:.3f}"


def beats_chance(
    scores: ArrayLike | None, chance: float | None, margin: float = 0.05, task: str = "TASK", tolerance: float = 0.0
) -> str | None:
    """Why dense attention does not do better than chance at a task, as far as its documents show; None where it does.

    Its mean must exceed chance by more than `margin` and by more than 3 standard errors. The margin keeps out what is
    real and small: where dense is .03 above chance, a tolerance of .05 would be kept by a model that has lost all. With
    fewer than 30 documents the standard error is not relied on (2 of 2 right have one of 0, and so have 3 times .5):
    there the Hoeffding-Bentkus bound must also refute that the mean is chance + margin or less, as surely as 3 standard
    errors would (1 in 741). For 0/1 scores without a mistake that takes 3 documents at chance 0 and 6 at chance .25.

    Args:
        scores: (n,) of the dense run, in [0, 1], nan for missing documents; None without per-document scores.
        chance: what guessing scores, in [0, 1]; None where unknown.
        margin: in [0, 1).
        task: its name, for the line that says what to type.
        tolerance: loss that is to be tolerated. Chance must be exceeded by more than twice of it: where it is half of
            what dense has above chance, a model that keeps within it may have lost as much as it has kept.
    """
    if scores is None:
        return "no per-document scores of the dense run: no bands, no certificate"
    known = np.asarray(scores, np.float64)
    known = known[~np.isnan(known)]
    n = len(known)
    if n == 0:
        return "the dense run has no document"
    if chance is None:
        return f"what chance scores is unknown: give --chance {task}=.25, or =0 where nothing can be guessed"
    mean = float(known.mean())
    error = float(known.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    said = (
        f"{mean:.2f} ± {error:.2f} against chance {chance:.2g}" if n > 1 else f"{mean:.2f} against chance {chance:.2g}"
    )
    above = mean - chance
    if above <= margin:
        return f"dense cannot do this task: {said}, which it must exceed by more than {margin:g}"
    if above <= 2 * tolerance:
        return (
            f"dense is too near to chance for a loss of {tolerance:g}: {said}, which it must exceed by more than twice "
            "of that; give a smaller --tolerance"
        )
    if n > 1 and above <= STANDARD_ERRORS * error:
        short = f"not {STANDARD_ERRORS:g} standard errors above"
        return f"dense cannot do this task as far as {n} documents show: {said}, {short}"
    if n < FEW:
        null = chance + margin
        # The bound is one on small means: scores are turned round, 1 - score against 1 - null. A null of 0, as far as
        # 1 - null can tell, is refuted by any score above it.
        turned = 1 - null
        refuted = turned == 1 or (turned > 0 and hoeffding_bentkus(float((1 - known).sum()), n, turned) <= _BEYOND)
        if not refuted:
            return (
                f"{n} documents are too few to say that dense can do this task: {said}, and so few can be right by "
                f"luck where {null:.2g} of all are"
            )
    return None
