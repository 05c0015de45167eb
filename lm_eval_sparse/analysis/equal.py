"""Where a larger model with sparse attention costs what a smaller one costs with dense attention, and which is better.

Nothing is extrapolated: where no run of the larger model is as cheap, it is said whether any sparsity could be. Scores
are compared at the sparsity where costs are equal, linearly between two runs, and a difference is one only where its
confidence interval leaves out 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .cost import Pairs, equal_cost
from .costed import Configuration, Group, Run
from .shapes import sizes_of
from .study import Cell

#: Standard errors on both sides of a difference: 95 % where means are normal.
_WIDTH = 1.959963984540054
#: Documents below which a mean is not taken for normal.
LEAST = 20

Floor = Callable[[Cell], str | None]


@dataclass(frozen=True)
class Comparison:
    """A smaller model with dense attention against a larger one with a method.

    Attributes:
        phase: whose cost is compared.
        small, large, method: names.
        tasks: that both models can do, and all runs of the method have.
        kind: `equal` where costs are equal between two runs, `cheaper` where the larger model costs no more even with
            dense attention, `beyond` where only a sparsity above all runs is enough, `never` where none is, `dearer`
            where every run costs more though its sparsity should be enough.
        sparsity: measured, where costs are equal; for `beyond` what would be enough.
        small_score, large_score, difference: means over the tasks, the larger model's minus the smaller one's.
        error: standard error of the difference, None where that is not known or documents are few.
    """

    phase: str
    small: str
    large: str
    method: str
    tasks: tuple[str, ...]
    kind: str
    sparsity: float | None = None
    small_score: float | None = None
    large_score: float | None = None
    difference: float | None = None
    error: float | None = None

    @property
    def better(self) -> str | None:
        """Which model scores better; None where the difference may be none."""
        if self.difference is None or self.error is None or abs(self.difference) <= _WIDTH * self.error:
            return None
        return self.large if self.difference > 0 else self.small


def comparisons(
    group: Group, phase: str, floor: Floor, batch: float, pairs: Pairs
) -> tuple[list[Comparison], dict[tuple[str, str], str]]:
    """Each pair of models of neighbouring cost, with each method of the larger one; and (task, model) of which nothing
    is said, with the reason that `floor` gives.

    Oracles are no methods and stand in no comparison.
    """
    dense = {one.model: one for one in group.configurations if one.dense}
    floors: dict[int, str | None] = {}

    def why(run: Run) -> str | None:
        place = id(run.cell)
        if place not in floors:
            floors[place] = floor(run.cell)
        return floors[place]

    cannot: dict[tuple[str, str], str] = {}
    found: list[Comparison] = []
    for small, large in _pairs(dense, phase):
        both = [task for task in group.tasks if task in dense[small].runs and task in dense[large].runs]
        told = {(task, model): why(dense[model].runs[task]) for task in both for model in (small, large)}
        cannot |= {pair: reason for pair, reason in told.items() if reason is not None}
        able = [task for task in both if told[task, small] is None and told[task, large] is None]
        methods: dict[str, list[Configuration]] = {}
        for one in group.configurations:
            if one.model == large and not one.dense and not one.oracle and one.changes(phase):
                methods.setdefault(one.label, []).append(one)
        for label, runs in methods.items():
            tasks = tuple(task for task in able if all(task in one.runs for one in runs) and group.higher[task])
            if tasks:
                compared = _compare(phase, dense[small], dense[large], label, runs, tasks, batch, pairs)
                if compared is not None:
                    found.append(compared)
    return found, cannot


def _pairs(dense: dict[str, Configuration], phase: str) -> list[tuple[str, str]]:
    """Models of neighbouring cost that share tasks, the cheaper one first."""
    costs = {model: one.cost(phase, tuple(one.runs)) for model, one in dense.items()}
    order = sorted((cost, model) for model, cost in costs.items() if cost is not None)
    return [
        (a, b) for (_, a), (_, b) in zip(order, order[1:], strict=False) if dense[a].runs.keys() & dense[b].runs.keys()
    ]


def _compare(
    phase: str,
    small: Configuration,
    large: Configuration,
    label: str,
    runs: Sequence[Configuration],
    tasks: tuple[str, ...],
    batch: float,
    pairs: Pairs,
) -> Comparison | None:
    about = phase, small.model, large.model, label, tasks
    budget = small.cost(phase, tasks)
    ladder = [large, *sorted(runs, key=lambda one: one.measured(tasks))]
    costs = [one.cost(phase, tasks) for one in ladder]
    if budget is None or None in costs:
        return None
    at = next((place for place, cost in enumerate(costs) if cost <= budget), None)
    if at == 0:
        return Comparison(*about, "cheaper")
    if at is None:
        return _never(about, small, ladder[-1], batch, pairs)
    share = (costs[at - 1] - budget) / (costs[at - 1] - costs[at])
    weights = ((ladder[at - 1], 1 - share), (ladder[at], share))
    score = sum(weight * one.score(tasks) for one, weight in weights)
    gaps = [_gap(small.runs[task], [(one.runs[task], weight) for one, weight in weights]) for task in tasks]
    errors = [error for _, error in gaps]
    return Comparison(
        *about,
        "equal",
        sum(weight * one.measured(tasks) for one, weight in weights),
        small.score(tasks),
        score,
        sum(gap for gap, _ in gaps) / len(tasks),
        None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(tasks),
    )


def _never(
    about: tuple[str, str, str, str, tuple[str, ...]],
    small: Configuration,
    last: Configuration,
    batch: float,
    pairs: Pairs,
) -> Comparison | None:
    """No run is cheap enough: whether any could be, with what selecting took in the sparsest one."""
    phase, tasks = about[0], about[-1]
    run, other = last.runs[tasks[0]], small.runs[tasks[0]]
    ours, theirs = (
        sizes_of(one.point.record.model_copy(update={"model_shape": one.cell.shape}))[0] for one in (run, other)
    )
    length = _tokens(run) or _tokens(other)
    if ours is None or theirs is None or not length:
        return None
    figures = run.point.record.by_phase
    if phase == "prefill":
        shares = (figures[name].estimator_flops_fraction for name in ("prefill", "eviction") if name in figures)
        overhead = sum(share or 0.0 for share in shares)
    else:
        decode = figures.get("decode")
        read = decode.bytes_read_fraction if decode else None
        overhead = max(0.0, read - (1 - (decode.executed or 0.0))) if read is not None else 0.0
    sparsity = equal_cost(theirs, ours, length, phase, batch, pairs, overhead).sparsity
    if sparsity is None:
        return Comparison(*about, "never")
    return Comparison(*about, "beyond", sparsity) if sparsity > last.measured(tasks) else Comparison(*about, "dearer")


def _tokens(run: Run) -> float | None:
    return run.point.record.prompt_tokens


def _gap(small: Run, large: Sequence[tuple[Run, float]]) -> tuple[float, float | None]:
    """Mean difference of a task and its standard error: paired where both models answered the same documents."""
    arrays = [run.point.scores for run, _ in large]
    mean = sum(weight * run.point.record.score for run, weight in large) - small.point.record.score
    if small.point.scores is None or any(scores is None for scores in arrays):
        errors = [(small.point.record.stderr, 1.0), *((run.point.record.stderr, weight) for run, weight in large)]
        numbers = [small.point.record.n, *(run.point.record.n for run, _ in large)]
        if min(numbers) < LEAST or any(error is None for error, _ in errors):
            return mean, None
        # Two runs of one model on the same documents go together: at worst their errors add.
        return mean, math.hypot(errors[0][0], sum(error * weight for error, weight in errors[1:]))
    ours = sum(weight * scores for (_, weight), scores in zip(large, arrays, strict=True))
    theirs = small.point.scores
    mine, other = large[0][0].cell.ids, small.cell.ids
    if set(mine) == set(other):
        place = {name: at for at, name in enumerate(other)}
        theirs = theirs[[place[name] for name in mine]]
        gaps = (ours - theirs)[np.isfinite(ours - theirs)]
        return (float(gaps.mean()), _error(gaps)) if len(gaps) else (mean, None)
    parts = [_error(scores[np.isfinite(scores)]) for scores in (ours, theirs)]
    return mean, None if None in parts else math.hypot(*parts)


def _error(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) >= LEAST else None
