"""The scaling law of The Sparse Frontier's first version: how accuracy moves with size, length and compression.

    logit(score) = eps + delta_task + alpha ln N + beta ln L + gamma ln C

N are parameters, L tokens of the prompts, and C = 1 / (1 - measured sparsity); dense attention stands at C = 1. Least
squares, with standard errors that are clustered by model, task and length, since runs at several sparsities share their
documents. A score of 0 or 1 has no logit; it is clipped to half a document, 1/(2n), and what such scores say hangs on
that. Each axis is tested by fitting without its largest value and predicting that. Only cells that dense attention can
do are fitted, and what the data cannot tell apart gets no number. Here are arrays only; `scaling` knows the study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .bands import LEVEL

#: Axes: coefficient, what it is the logarithm of, and how sentences call it.
AXES = {"alpha": ("parameters", "model size"), "beta": ("length", "length"), "gamma": ("compression", "compression")}
#: Clusters below which clustered errors are no basis for a band.
CLUSTERS = 10
#: Held-out runs of a task below which no rank correlation is said.
RANKED = 4
#: Logits that differ by less are the same.
_ROUNDING = 1e-9
#: The task whose effect is 0, as in the paper, where it is there.
REFERENCE = "quality"


@dataclass(frozen=True)
class Runs:
    """Runs that a law is fitted to, each array (R,).

    Attributes:
        score, n: mean score in [0, 1], and documents.
        parameters, length, compression: N, L and C.
        step: sparsity as it was asked for (in two decimals as it was measured, where knobs ruled): runs of one step
            differ in measured compression by chance only.
        task, cluster: names; a cluster is what shares documents.
    """

    score: np.ndarray
    n: np.ndarray
    parameters: np.ndarray
    length: np.ndarray
    compression: np.ndarray
    step: np.ndarray
    task: np.ndarray
    cluster: np.ndarray

    def __len__(self) -> int:
        return len(self.score)

    def where(self, chosen: np.ndarray) -> Runs:
        return Runs(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        names: `eps`, a `delta TASK` for every task but the reference, and the axes that vary.
        value, stderr, low, high: (K,); errors and limits are nan below `CLUSTERS` clusters.
        r2: of the logits; nan where they are all the same.
        reference: the task whose effect is 0.
        clusters, clipped: clusters; and runs whose score was clipped.
        fixed: axes with a single value: their effect is part of eps.
        names_of_tasks: tasks that the law knows.
    """

    names: tuple[str, ...]
    value: np.ndarray
    stderr: np.ndarray
    low: np.ndarray
    high: np.ndarray
    r2: float
    reference: str
    clusters: int
    clipped: int
    fixed: tuple[str, ...]
    names_of_tasks: tuple[str, ...]

    def __getitem__(self, name: str) -> float:
        return float(self.value[self.names.index(name)])

    def predict(self, runs: Runs) -> np.ndarray:
        """(R,) scores in [0, 1]; nan for a task that the law does not know."""
        from scipy.special import expit

        tasks = list(self.names_of_tasks)
        known = np.isin(runs.task, tasks)
        axes = [name for name in self.names if name in AXES]
        design = _design(runs, [task for task in tasks if task != self.reference], axes)
        return np.where(known, expit(design @ self.value), np.nan)


@dataclass(frozen=True)
class HeldOut:
    """A test on the largest value of an axis.

    Attributes:
        axis: its coefficient's name.
        value: what was held out.
        law: fitted without it; None with the reason `why`.
        tasks: of each task held-out runs, Spearman's correlation with its p-value (None where they are not defined),
            and the mean absolute error of scores.
        measured, predicted, task: (H,) of the held-out runs.
    """

    axis: str
    value: float
    law: Law | None
    why: str = ""
    tasks: Mapping[str, tuple[int, float | None, float | None, float]] | None = None
    measured: np.ndarray | None = None
    predicted: np.ndarray | None = None
    task: np.ndarray | None = None


def logit(score: np.ndarray, n: np.ndarray, clip: float | None = None) -> np.ndarray:
    """Logits of scores, each clipped to `clip` from 0 and 1: by default to half a document, 1/(2n)."""
    edge = np.asarray(1 / (2 * np.asarray(n, float)) if clip is None else clip)
    inside = np.clip(np.asarray(score, float), edge, 1 - edge)
    return np.log(inside / (1 - inside))


def _design(runs: Runs, tasks: Sequence[str], axes: Sequence[str]) -> np.ndarray:
    """(R, K): ones, a column for each task but the reference, logarithms of axes."""
    columns = [np.ones(len(runs))]
    columns += [(runs.task == task).astype(float) for task in tasks]
    columns += [np.log(getattr(runs, AXES[name][0])) for name in axes]
    return np.stack(columns, axis=1)


def refuse(runs: Runs) -> str | None:
    """Why no law can be fitted; None where one can."""
    if not len(runs):
        return "no runs of a task that dense attention can do, with known size and length"
    steps = len(np.unique(runs.step))
    if steps < 3:
        return f"{steps} sparsit{'y' if steps == 1 else 'ies'}, dense attention counted; a law of compression needs 3"
    fixed = [name for name in AXES if len(np.unique(getattr(runs, AXES[name][0]))) == 1]
    tasks = sorted(set(runs.task))
    axes = [name for name in AXES if name not in fixed]
    design = _design(runs, tasks[1:], axes)
    if len(runs) <= design.shape[1]:
        return f"{len(runs)} runs for {design.shape[1]} coefficients"
    # Columns are centred and scaled: parameters and lengths differ by orders of magnitude.
    spread = design[:, 1:] - design[:, 1:].mean(axis=0)
    scale = spread.std(axis=0)
    if (scale == 0).any() or np.linalg.matrix_rank(spread / scale, tol=1e-6 * np.sqrt(len(runs))) < spread.shape[1]:
        return (
            "size, length, compression and tasks do not vary apart from each other here (as where every model was run "
            "at one length only): their effects cannot be told apart"
        )
    if len(set(runs.cluster)) < 2:
        return "one model, task and length only"
    return None


def fit(runs: Runs, clip: float | None = None, level: float = LEVEL) -> Law | str:
    """Fit the law, or say why that cannot be done.

    Args:
        clip: see `logit`.
    """
    if why := refuse(runs):
        return why
    from statsmodels.regression.linear_model import OLS

    tasks = sorted(set(runs.task))
    reference = next((task for task in tasks if task.endswith(REFERENCE)), tasks[0])
    others = [task for task in tasks if task != reference]
    fixed = tuple(name for name in AXES if len(np.unique(getattr(runs, AXES[name][0]))) == 1)
    axes = [name for name in AXES if name not in fixed]
    groups = np.unique(runs.cluster, return_inverse=True)[1]
    clusters = int(groups.max()) + 1
    logits = logit(runs.score, runs.n, clip)
    model = OLS(logits, _design(runs, others, axes))
    found = model.fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    limits = found.conf_int(1 - level)
    errors = np.stack([found.bse, limits[:, 0], limits[:, 1]])
    if clusters < CLUSTERS or clusters <= len(found.params):
        errors[:] = np.nan
    edge = 1 / (2 * runs.n) if clip is None else np.full(len(runs), clip)
    return Law(
        ("eps", *(f"delta {task}" for task in others), *axes),
        np.asarray(found.params),
        *errors,
        float(found.rsquared) if np.ptp(logits) > _ROUNDING else np.nan,
        reference,
        clusters,
        int(((runs.score < edge) | (runs.score > 1 - edge)).sum()),
        fixed,
        tuple(tasks),
    )


def hold_out(runs: Runs, axis: str, clip: float | None = None) -> HeldOut:
    """Fit without the largest value of an axis, and predict it; of compression the largest that was asked for."""
    name = AXES[axis][1]
    if why := refuse(runs):
        return HeldOut(axis, np.nan, None, why)
    values = runs.step if axis == "gamma" else getattr(runs, AXES[axis][0])
    largest = float(values.max())
    out = values == largest
    if len(np.unique(values[~out])) < 2:
        found = len(np.unique(values))
        why = f"{found} value{'s' if found > 1 else ''} of {name}: without the largest none of its effect is left"
        return HeldOut(axis, largest, None, why)
    law = fit(runs.where(~out), clip)
    if isinstance(law, str):
        return HeldOut(axis, largest, None, f"without the largest {name}: {law}")
    rest = runs.where(out)
    predicted = law.predict(rest)
    known = np.isfinite(predicted)
    if not known.any():
        return HeldOut(axis, largest, None, f"no task at the largest {name} was measured below it as well")
    rest, predicted = rest.where(known), predicted[known]
    tasks = {
        task: _task(rest.score[rest.task == task], predicted[rest.task == task]) for task in sorted(set(rest.task))
    }
    return HeldOut(axis, largest, law, "", tasks, rest.score, predicted, rest.task)


def _task(measured: np.ndarray, predicted: np.ndarray) -> tuple[int, float | None, float | None, float]:
    from scipy.stats import spearmanr

    rank = p = None
    if len(measured) >= RANKED and np.ptp(measured) > 0 and np.ptp(predicted) > 0:
        found = spearmanr(measured, predicted)
        rank, p = float(found.statistic), float(found.pvalue)
    return len(measured), rank, p, float(np.abs(measured - predicted).mean())
