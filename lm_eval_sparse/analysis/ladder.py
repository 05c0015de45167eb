"""What curves, tolerances, splits and laws share: a chain from dense attention on, tasks that belong together, names.

A *ladder* is a chain over its measured sparsity with dense attention as the rung at 0. A *suite* is the tasks of one
model and length that may be averaged: forced and generated twins of a task are two suites, never one mean.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ..labels import label
from .bands import LEVEL, Bands, Bounds, Stratum, between, interpolated, stratified
from .figure import Panel, Series
from .study import GROUPS, Cell, Chain, Point, Study

#: Says why dense attention does not beat chance at a cell, or nothing where it does.
Floor = Callable[[Cell], str | None]
#: A sparsity is promised to .01 (docs/accounting.md): so far beyond the last run that run's value stands for it.
SLACK = 0.01
#: Bands of more lines than these cover each other in a panel.
MOST_BANDS = 4


@dataclass(frozen=True, eq=False)
class Ladder:
    """A chain of a cell over measured sparsity.

    Attributes:
        cell, chain: where it is from.
        x: (P,) float64, measured sparsity, ascending; 0 for dense attention, which is a rung unless the chain has a run
            that was measured at 0 itself.
        means: (P,) scores.
        scores: (P, n) by document, or None where a run has none.
        dense: whether the first rung is the dense run.
    """

    cell: Cell
    chain: Chain
    x: np.ndarray
    means: np.ndarray
    scores: np.ndarray | None
    dense: bool
    _weights: dict[tuple[float, ...], np.ndarray] = field(default_factory=dict, repr=False)

    @cached_property
    def key(self) -> str:
        return key(self.cell)

    @property
    def bounds(self) -> Bounds:
        return bounds(self.cell)

    @property
    def last(self) -> float:
        """The highest sparsity that a value may be said at."""
        return float(self.x[-1]) + SLACK

    def weights(self, wanted: Sequence[float]) -> np.ndarray:
        """(W, P) of each rung at sparsities; nan beyond what was measured."""
        at = tuple(wanted)
        if at not in self._weights:
            self._weights[at] = between(self.x, at, SLACK)
        return self._weights[at]

    def documents(self, wanted: Sequence[float]) -> np.ndarray:
        """(W, n) scores of documents, interpolated at sparsities; nan beyond what was measured."""
        return interpolated(self.weights(wanted), self.scores)

    def values(self, wanted: Sequence[float]) -> np.ndarray:
        """(W,) scores interpolated at sparsities; nan beyond what was measured."""
        return self.weights(wanted) @ self.means if self.scores is None else mean(self.documents(wanted))

    def losses(self, wanted: Sequence[float]) -> np.ndarray:
        """(W, n) dense minus sparse by document, interpolated at sparsities."""
        return interpolated(self.weights(wanted), self.cell.dense.scores - self.scores)

    def spread(self, wanted: Sequence[float]) -> Bounds:
        """What those losses may be: less where dense attention is part of a value, and 0 where it is all of it."""
        if not self.cell.bounded:
            return None
        sparse = 1 - self.weights(wanted)[:, 0] if self.dense else np.ones(len(wanted))
        return -sparse, sparse


def ladder(cell: Cell, chain: Chain) -> Ladder:
    """The ladder of a chain. Without a dense run it begins with the chain's first run."""
    points = sorted(chain.points, key=lambda point: point.measured)
    if cell.dense is not None and not (points and points[0].measured == 0):
        points = [cell.dense, *points]
    x = np.array([0.0 if point is cell.dense else point.measured for point in points])
    means = np.array([point.record.score for point in points])
    kept = [point.scores for point in points]
    scores = np.stack(kept) if kept and all(one is not None for one in kept) else None
    return Ladder(cell, chain, x, means, scores, bool(points) and points[0] is cell.dense)


def key(cell: Cell) -> str:
    """Names the documents of a cell, for `bands`: the same for all models that were asked them."""
    documents = zlib.crc32("\n".join(cell.ids).encode("utf-8", "surrogatepass"))
    return f"{cell.task}\n{cell.mark}\n{documents}"


def bounds(cell: Cell) -> Bounds:
    """What a score of the cell may be, where that is known."""
    return (0.0, 1.0) if cell.bounded else None


def paired(cell: Cell) -> bool:
    """Whether losses can be said document by document."""
    return cell.dense is not None and cell.dense.scores is not None


def mean(scores: np.ndarray) -> np.ndarray:
    """(P,) means of rows over the documents that are there; nan for a row with none."""
    here = np.isfinite(scores)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(here, scores, 0.0).sum(axis=1) / here.sum(axis=1)


def floor_of(margin: float = 0.05) -> Floor:
    """The floor that every part of an analysis goes by: dense must beat chance by 3 standard errors and `margin`."""
    from .guarantee import beats_chance

    def why(cell: Cell) -> str | None:
        if cell.dense is None:
            return "no dense run"
        if not cell.bounded:
            return f"{label(cell.metric)} is no share of right answers: a loss of it is not relative to anything"
        return beats_chance(cell.dense.scores, cell.chance, margin, cell.short)

    return why


# -- tasks that belong together


@dataclass(frozen=True, eq=False)
class Suite:
    """Cells of one model, length and kind of task that may be averaged.

    Attributes:
        model, length: of all of them.
        kind: `frontier`, `forced_frontier`, or empty for other tasks.
        members: all of them, by task.
        cells: those that means are taken of; none at its floor, all with scores by document, dense ones included.
        out: what is left out of means: task and reason.
    """

    model: str
    length: int | None
    kind: str
    members: tuple[Cell, ...]
    cells: tuple[Cell, ...]
    out: tuple[tuple[str, str], ...]

    @cached_property
    def ladders(self) -> dict[int, list[Ladder]]:
        """Those of every member, by the member's id, of the runs of which something can be said."""
        kept = set(map(id, self.cells))
        return {
            id(cell): [
                ladder(cell, chain)
                for chain in (spoken_of(cell, chain) if id(cell) in kept else chain for chain in cell.chains)
                if chain.points
            ]
            for cell in self.members
        }

    def shared(self, cells: Sequence[Cell]) -> dict[str, list[Ladder]]:
        """Ladders, one for each of the cells, of the chains that all of them have with scores by document, by the
        chain's label; oracles first."""
        by_label: dict[str, list[Ladder]] = defaultdict(list)
        for cell in cells:
            for found in self.ladders[id(cell)]:
                if found.scores is not None:
                    by_label[found.chain.label].append(found)
        complete = [(name, found) for name, found in by_label.items() if len(found) == len(cells)]
        return dict(sorted(complete, key=lambda item: (not item[1][0].chain.oracle, item[0])))

    @property
    def groups(self) -> dict[str, tuple[Cell, ...]]:
        """All tasks, then the paper's groups of which two tasks or more are here."""
        found = {"all tasks": self.cells}
        for name, shorts in GROUPS.items():
            members = tuple(cell for cell in self.cells if cell.short in shorts)
            if self.kind and len(members) > 1:
                found[name] = members
        return {name: cells for name, cells in found.items() if len(cells) > 1}


def spoken_of(cell: Cell, chain: Chain) -> Chain:
    """A chain without its runs on a part of the documents that dense cannot do: nothing could be lost there."""
    from .guarantee import beats_chance

    dense = None if cell.dense is None else cell.dense.scores
    if dense is None:
        return chain
    known = ~np.isnan(dense)

    def is_said(point: Point) -> bool:
        if point.scores is None:
            return True
        shared = known & ~np.isnan(point.scores)
        whole = not shared.any() or np.array_equal(shared, known)
        return whole or beats_chance(np.where(shared, dense, np.nan), cell.chance) is None

    points = tuple(point for point in chain.points if is_said(point))
    return chain if len(points) == len(chain.points) else replace(chain, points=points)


def suites(study: Study, floor: Floor) -> list[Suite]:
    """The suites of a study, in the order of its models, then of lengths."""
    members: dict[tuple[str, int | None, str], list[Cell]] = defaultdict(list)
    for cell in study.primary:
        kind = cell.family.removesuffix(cell.short).rstrip("_") if cell.family != cell.short else ""
        members[cell.model, cell.length, kind].append(cell)
    order = {model: place for place, model in enumerate(study.models)}
    found = []
    for (model, length, kind), cells in sorted(members.items(), key=lambda item: (order[item[0][0]], *_least(item[0]))):
        kept, out = [], []
        for cell in cells:
            if sum(other.task == cell.task for other in cells) > 1:
                why = f"runs of it differ ({label(cell.mark)})"
            elif not paired(cell):
                why = "no scores by document of the dense run" if cell.dense else "no dense run"
            else:
                why = floor(cell)
            if why:
                out.append((label(cell.task), why))
            else:
                kept.append(cell)
        found.append(Suite(model, length, kind, tuple(cells), tuple(kept), tuple(out)))
    return found


def _least(name: tuple[str, int | None, str]) -> tuple[int, str]:
    return name[1] or 0, name[2]


def over_tasks(
    methods: Mapping[str, Sequence[Ladder]], wanted: Sequence[float], losses: bool = False, level: float = LEVEL
) -> dict[str, Bands]:
    """Mean scores over tasks, or mean losses against dense, at sparsities: (W,) for each method.

    Args:
        methods: of each its ladders, a task each, the same tasks in the same order.
    """
    if not methods:
        return {}
    found = []
    for task in zip(*methods.values(), strict=True):
        rows = np.concatenate([one.losses(wanted) if losses else one.documents(wanted) for one in task])
        limits = task[0].bounds
        if losses and limits:
            limits = tuple(map(np.concatenate, zip(*(one.spread(wanted) for one in task), strict=True)))
        found.append(Stratum(rows, task[0].key, limits))
    whole = stratified(found, level)
    return {name: whole.part(place * len(wanted), len(wanted)) for place, name in enumerate(methods)}


# -- bands


def thinned(series: Iterable[Series]) -> tuple[Series, ...]:
    """Series of a panel; where more than `MOST_BANDS` lines have a band none is drawn but dense attention's."""
    found = tuple(series)
    lines = [one.low is not None and one.kind != "dots" and one.name != "dense" for one in found]
    if sum(lines) <= MOST_BANDS:
        return found
    return tuple(replace(one, band=False) if own else one for one, own in zip(found, lines, strict=True))


def without_bands(panels: Iterable[Panel]) -> str:
    """What a caption says where `thinned` left bands out."""
    if all(one.band for panel in panels for one in panel.series):
        return ""
    return (
        f" Where more than {MOST_BANDS} lines of a panel have bands, which would cover each other, only dense "
        "attention's, if it is there, is drawn; the CSV file of the figure has all of them."
    )


# -- words

#: By how much less than was asked for may be measured before both are said.
_NEAR = 0.02


def where(model: str, length: int | None, kind: str = "") -> str:
    """`SmolLM2-135M at 4,096 tokens`, for sentences and titles."""
    at = f" at {length:,} tokens" if length else ""
    return f"{label(model, 80)}{at}{f' ({kind})' if kind else ''}"


def reached(requested: float, measured: float | None) -> str:
    """A sparsity in words, with what was measured where that is less than was asked for."""
    if measured is None or requested - measured <= _NEAR:
        return f"{requested:.3g}"
    return f"{requested:.3g} requested, {measured:.2g} measured"


class Names:
    """Stems of files, [a-z0-9_], that are never given twice."""

    def __init__(self) -> None:
        self._given: dict[str, int] = {}

    def __call__(self, *parts: object) -> str:
        text = "_".join(str(part) for part in parts if part not in (None, ""))
        stem = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:70] or "figure"
        again = self._given[stem] = self._given.get(stem, 0) + 1
        return stem if again == 1 else self(stem, again)


def figure(value: float | None, digits: int = 2) -> str:
    """A number in a sentence: `0.25`, `-0.03`; `?` where it is not known."""
    return "?" if value is None or not np.isfinite(value) else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.00


def with_band(value: float, low: float, high: float) -> str:
    """`0.03 [0.01, 0.05]`; without a band the value alone."""
    return f"{figure(value)} [{figure(low)}, {figure(high)}]" if np.isfinite(low) else figure(value)


def because(out: Iterable[tuple[str, str]], most: int = 5) -> str:
    """What is left out, by reason: `niah, vt: no dense run; cwe: ...`; `most` reasons, and of each `most` names."""
    names: dict[str, dict[str, None]] = defaultdict(dict)
    for name, why in out:
        names[why][name] = None
    said = [f"{listed(found, most)}: {why}" for why, found in list(names.items())[:most]]
    more = sum(map(len, list(names.values())[most:]))
    return "; ".join(said) + (f"; and {more} more for other reasons" if more else "")


def listed(names: Iterable[str], most: int = 10) -> str:
    """Names in a sentence, the first of many."""
    found = list(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
