"""How much sparsity a relative error allows, and whether longer prompts allow more (The Sparse Frontier, "Findings").

The relative error is (dense - sparse) / dense, of means: over documents, and over tasks where several are put together.
It is said only of tasks that dense attention can do. A sparsity is *tolerated* up to where the error, interpolated
between runs from dense attention on, first exceeds what is allowed; what no run went far enough to show is not known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..labels import label
from .bands import LEAST, LEVEL, PAPER, Stratum, exact, interpolated, quantiles, resampled
from .figure import Figure, Panel, Section, Series, Table
from .ladder import (
    Floor,
    Ladder,
    Names,
    Suite,
    because,
    figure,
    floor_of,
    listed,
    mean,
    suites,
    thinned,
    where,
    with_band,
    without_bands,
)
from .study import Study

#: Relative errors that are allowed.
ERRORS = (0.05, 0.1, 0.2)
#: Why a sparsity is not known where dense and sparse runs share no documents.
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Errors:
    """Relative errors along a ladder, or along the mean of several.

    Attributes:
        x: (G,) sparsities, ascending from where all ladders begin to where the first ends.
        value, low, high: (G,); limits are nan below `LEAST` documents of a task.
        draws: (G, D) of the resamples that the limits are from.
        wider: (2, G) what tasks whose documents all lose the same add to the limits below and above, squared.
    """

    x: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    draws: np.ndarray
    wider: np.ndarray


@dataclass(frozen=True)
class Tolerated:
    """The largest sparsity that an error allows.

    Attributes:
        sparsity: None where that is not known, for the reason `why`.
        low, high: its band; nan where the band reaches beyond what was measured, or there is none.
    """

    sparsity: float | None
    low: float
    high: float
    why: str = ""


@dataclass(frozen=True)
class Rungs:
    """A ladder's scores with dense attention's above them, of the documents that all of its runs have.

    Attributes:
        scores: (1 + P, n), nan for the other documents.
        draws: (1 + P, D) resampled means.
    """

    scores: np.ndarray
    draws: np.ndarray


def rungs(ladders: Sequence[Ladder]) -> dict[int, Rungs]:
    """Rungs of ladders of one task, by the ladder's id; all from the same draws."""
    scores = []
    for found in ladders:
        rows = np.concatenate([found.cell.dense.scores[None], found.scores])
        scores.append(np.where(np.isfinite(rows).all(axis=0), rows, np.nan))
    draws = np.split(resampled(np.concatenate(scores), ladders[0].key), np.cumsum([len(rows) for rows in scores])[:-1])
    return {id(found): Rungs(*both) for found, *both in zip(ladders, scores, draws, strict=True)}


def errors(
    ladders: Sequence[Ladder], wanted: Sequence[float] | None = None, known: Mapping[int, Rungs] | None = None
) -> Errors:
    """Relative errors of the mean over tasks, a ladder each, with bands that are paired over documents.

    Args:
        ladders: with scores by document; dense attention at their foot has a mean above 0.
        wanted: sparsities. By default those of the runs of a single ladder; of several the paper's, as far as all of
            them go, and where the first ends.
        known: rungs that were made before.
    """
    first, last = max(found.x[0] for found in ladders), min(found.x[-1] for found in ladders)
    if wanted is not None:
        x = np.asarray(wanted, float)
    else:
        x = np.unique(ladders[0].x if len(ladders) == 1 else [*PAPER, last])
        x = x[(x >= first) & (x <= last)]
    share = 1 / len(ladders)
    dense, sparse = 0.0, np.zeros(len(x))
    dense_draws, sparse_draws = np.float32(0), np.float32(0)
    below, above = np.zeros(len(x)), np.zeros(len(x))
    least = np.inf
    for found in ladders:
        own = (known or rungs([found]))[id(found)]
        weights = found.weights(x)
        means = mean(own.scores)
        dense, sparse = dense + share * means[0], sparse + share * (weights @ means[1:])
        dense_draws = dense_draws + np.float32(share) * own.draws[0]
        sparse_draws = sparse_draws + (share * weights).astype(np.float32) @ own.draws[1:]
        losses = interpolated(weights, own.scores[0] - own.scores[1:])
        n, low, high = exact(Stratum(losses, found.key, found.spread(x)))
        least = min(least, n.min(initial=10**9))
        loss = mean(losses)
        below += np.where(np.isnan(low), 0.0, share * (loss - low)) ** 2
        above += np.where(np.isnan(high), 0.0, share * (high - loss)) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        value, draws = 1 - sparse / dense, 1 - sparse_draws / dense_draws
        wider = np.stack([below, above]) / dense**2
    low, high = _limits(value, draws, wider) if least >= LEAST else np.full((2, len(x)), np.nan)
    return Errors(x, value, low, high, draws, wider)


def _limits(value: np.ndarray, draws: np.ndarray, wider: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles, widened as in `bands.stratified`."""
    low, high = quantiles(draws)
    return value - np.sqrt((value - low) ** 2 + wider[0]), value + np.sqrt((high - value) ** 2 + wider[1])


def crossing(x: np.ndarray, y: np.ndarray, allowed: float) -> float | None:
    """The first x at which y, linear between its values, exceeds `allowed`; None where it never does."""
    over = np.flatnonzero(y > allowed)
    if not len(over):
        return None
    at = over[0]
    if at == 0:
        return float(x[0])
    part = (allowed - y[at - 1]) / (y[at] - y[at - 1])
    return float(x[at - 1] + part * (x[at] - x[at - 1]))


def tolerated(found: Errors, allowed: float) -> Tolerated:
    """The sparsity up to which the error stays within `allowed`. Its band is where the band of the error crosses."""
    if np.isnan(found.value).any() or not len(found.x):
        return Tolerated(None, np.nan, np.nan, NOT_MEASURED)
    at = crossing(found.x, found.value, allowed)
    if np.isnan(found.low).any():
        low = high = None
    else:
        low, high = crossing(found.x, found.high, allowed), crossing(found.x, found.low, allowed)
    limits = (np.nan if low is None else low), (np.nan if high is None else high)
    if at is None:
        return Tolerated(None, *limits, f"within {allowed:g} up to {found.x[-1]:.3g}, the highest sparsity measured")
    return Tolerated(at, *limits)


def section(study: Study, options: Any = None, floor: Floor | None = None) -> Section:
    """Tolerance against length. Arguments as of `curves.section`."""
    floor = floor or floor_of(getattr(options, "margin", 0.05))
    names = Names()
    everything = suites(study, floor)
    found = {id(group): _of_suite(group) for group in everything}
    groups = [group for group in everything if found[id(group)]]
    rows = [row for group in groups for row in _rows(group, found[id(group)])]
    figures: list[Figure] = []
    sentences: list[str] = []
    by_model: dict[tuple[str, str], list[Suite]] = defaultdict(list)
    for group in groups:
        by_model[group.model, group.kind].append(group)
    for (model, kind), members in by_model.items():
        members = [group for group in members if group.length]
        if not members:
            continue
        at = where(model, None, kind)
        tasks = _same(members)
        figures += _figures(names, model, kind, at, members, found)
        sentences += _worst(members, found)
        if len(members) > 1 and tasks:
            sentences += _longer(members, tasks, at)
        elif len(members) > 1:
            sentences.append(f"{at}: no task was measured at all lengths, so lengths are not compared.")
    out = [line for group in everything for line in group.out]
    bare = [
        (label(cell.task), "no sparse run with scores by document")
        for group in everything
        for cell in group.cells
        if not any(one.scores is not None for one in group.ladders[id(cell)])
    ]
    if not groups:
        why = because([*out, *bare])
        sentences.append(f"No relative error is said of any task here{f': {why}' if why else ''}.")
    header = ("model", "length", "tasks", "method", "allowed error", "sparsity", "low", "high", "least density", "note")
    table = Table(
        names("tolerated_sparsity"),
        "Sparsity that a relative error allows",
        header,
        tuple(rows),
        f"The error is (dense - sparse) / dense of means; bands of {LEVEL:.0%} are where the band of the error crosses "
        "what is allowed, and an end that is missing lies beyond what was measured. "
        + (f"Left out: {because([*out, *bare], 20)}." if out or bare else ""),
    )
    return Section("tolerance", "Tolerance against length", tuple(sentences), tuple(figures), (table,) if rows else ())


_Found = Mapping[str, tuple[Errors | None, dict[str, Errors]]]


def _of_suite(group: Suite) -> dict[str, tuple[Errors | None, dict[str, Errors]]]:
    """For each method the errors of the mean over all tasks (None where it was not run on all, or there is one only)
    and of each task, by short name."""
    whole = group.shared(group.cells) if len(group.cells) > 1 else {}
    known: dict[int, Rungs] = {}
    tasks: dict[str, dict[str, Errors]] = defaultdict(dict)

    def alone(ladders: Sequence[Ladder]) -> Errors:
        # Without draws, which a whole study would not hold in memory.
        found = errors(ladders, known=known)
        return replace(found, draws=found.draws[:0])

    for cell in group.cells:
        ladders = [one for one in group.ladders[id(cell)] if one.scores is not None]
        if ladders:
            known |= rungs(ladders)
        for one in ladders:
            tasks[one.chain.label][cell.short] = alone([one])
    return {name: (alone(whole[name]) if name in whole else None, of_tasks) for name, of_tasks in tasks.items()}


def _rows(group: Suite, found: _Found) -> list[tuple[Any, ...]]:
    rows = []
    for method, (whole, tasks) in found.items():
        several = {**({f"mean of {len(tasks)}": whole} if whole is not None else {}), **tasks}
        for name, one in several.items():
            for allowed in ERRORS:
                limit = tolerated(one, allowed)
                density = None if limit.sparsity is None else 1 - limit.sparsity
                row = (label(group.model), group.length, label(name), method, allowed, limit.sparsity)
                rows.append((*row, limit.low, limit.high, density, limit.why))
    return rows


# -- figures


def _figures(
    names: Names, model: str, kind: str, at: str, members: Sequence[Suite], found: Mapping[int, _Found]
) -> list[Figure]:
    """Error by sparsity, a line for each length; and tolerated density by length, a line for each method."""
    methods = list(dict.fromkeys(method for group in members for method in found[id(group)]))
    panels = []
    for method in methods:
        series = []
        for group in members:
            one = _shown(found[id(group)].get(method))
            if one is not None:
                limits = {} if np.isnan(one.low).any() else {"low": one.low, "high": one.high}
                series.append(Series(f"{group.length:,} tokens", one.x, one.value, **limits))
        panels.append(Panel(method, thinned(series), "measured sparsity", "(dense - sparse) / dense"))
    error = Figure(
        names("relative_error", model, kind),
        f"Relative error by length: {at}",
        f"Of the mean over tasks that dense attention can do; bands cover {LEVEL:.0%}.{without_bands(panels)}",
        tuple(panels),
    )
    by_error = []
    for allowed in ERRORS:
        series, beyond = [], []
        for method in methods:
            limits = {}
            for group in members:
                one = _shown(found[id(group)].get(method))
                if one is not None:
                    limits[group.length] = tolerated(one, allowed)
            if any(limit.sparsity is not None for limit in limits.values()):
                y = [None if limit.sparsity is None else 1 - limit.sparsity for limit in limits.values()]
                # A band that ends beyond what was measured is no band: the point stands alone.
                ends = [
                    (1 - limit.high, 1 - limit.low) if np.isfinite(limit.low + limit.high) else (np.nan, np.nan)
                    for limit in limits.values()
                ]
                low, high = zip(*ends, strict=True)
                series.append(Series(method, list(limits), y, low=low, high=high))
            if any(limit.why and limit.why != NOT_MEASURED for limit in limits.values()):
                beyond.append(method)
        note = f"within {allowed:g} as far as measured at some length: {listed(beyond)}" if beyond else ""
        title = f"error within {allowed:g}"
        by_error.append(Panel(title, thinned(series), "tokens", "least density", log_x=True, log_y=True, note=note))
    density = Figure(
        names("least_density", model, kind),
        f"Density that a relative error needs: {at}",
        "The smallest share of keys with which the relative error of the mean over tasks stays within what is allowed; "
        f"lower is better. Bands of {LEVEL:.0%} where both ends lie within what was measured.{without_bands(by_error)}",
        tuple(by_error),
    )
    return [error, density]


def _shown(found: tuple[Errors | None, dict[str, Errors]] | None) -> Errors | None:
    """The errors of a method that a figure shows: of the mean, or of its only task."""
    if found is None:
        return None
    whole, tasks = found
    return whole if whole is not None else (next(iter(tasks.values())) if len(tasks) == 1 else None)


# -- sentences


def _worst(members: Sequence[Suite], found: Mapping[int, _Found]) -> list[str]:
    """Of each length the task that tolerates least at an error of .1, for methods that were run on several."""
    said = []
    for group in members:
        parts = []
        for method, (_, tasks) in found[id(group)].items():
            limits = {name: tolerated(one, 0.1) for name, one in tasks.items()}
            known = {name: limit for name, limit in limits.items() if limit.sparsity is not None}
            # What is not reached allows more; what was not measured may allow less.
            if len(tasks) > 1 and known and not any(limit.why == NOT_MEASURED for limit in limits.values()):
                name = min(known, key=lambda task: known[task].sparsity)
                parts.append(f"{method} {figure(known[name].sparsity)} ({label(name)})")
        if parts:
            at = where(group.model, group.length, group.kind)
            said.append(f"{at}: the task that tolerates least allows, at a relative error of 0.1, {listed(parts, 20)}.")
    return said


def _same(members: Sequence[Suite]) -> list[str]:
    """Short names of the tasks that all lengths have."""
    return sorted(set.intersection(*({cell.short for cell in group.cells} for group in members)))


def _longer(members: Sequence[Suite], tasks: Sequence[str], at: str) -> list[str]:
    """Whether the longest prompts lose less than the shortest, on the same tasks at the same sparsity. Documents of two
    lengths are others, so they are drawn apart."""
    first, last = members[0], members[-1]
    some = [first.shared(_cells(first, tasks)), last.shared(_cells(last, tasks))]
    said = []
    for method in some[0]:
        if method not in some[1]:
            continue
        end = min(found.last for ladders in some for found in ladders[method])
        reached = [sparsity for sparsity in PAPER[1:] if sparsity <= end]
        if not reached:
            continue
        one, two = (errors(ladders[method], reached[-1:]) for ladders in some)
        value = one.value - two.value
        if np.isnan(one.low).any() or np.isnan(two.low).any():
            continue
        low, high = _limits(value, one.draws - two.draws, one.wider + two.wider[::-1])
        if low[0] > 0:
            verdict = "longer prompts tolerate more"
        elif high[0] < 0:
            verdict = "longer prompts tolerate less"
        else:
            verdict = "no difference between lengths is shown"
        over = listed(tasks) if len(tasks) == 1 else f"the mean over {len(tasks)} tasks"
        said.append(
            f"{at}, {method} at sparsity {reached[-1]:g}, {over}: the relative error is {figure(one.value[0])} at "
            f"{first.length:,} tokens and {figure(two.value[0])} at {last.length:,} (difference "
            f"{with_band(value[0], low[0], high[0])}): {verdict}."
        )
    return said


def _cells(group: Suite, tasks: Sequence[str]) -> list[Any]:
    return sorted((cell for cell in group.cells if cell.short in tasks), key=lambda cell: cell.short)
