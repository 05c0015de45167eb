"""Certificates of a study: how far a method may go on a task, a group of tasks and the worst task, with a guarantee.

A row is one method of one model at one length. Its tasks are one family, its groups another, its worst task a third;
each family has the level to itself (`guarantee`). What is not certified has a reason in words.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from . import guarantee
from .study import GROUPS, Cell, Chain, Point, Study


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        tolerance: mean loss that is accepted, in the score's own unit, in (0, 1).
        level: chance that a family has any false certificate, in (0, 1).
        margin: by how much dense must exceed chance besides 3 standard errors; of ties the difference that is none.
        test: a name in `guarantee.TESTS`.
        batch: sequences that are decoded side by side, for costs.

    Raises:
        UserError: a value that means nothing.
    """

    tolerance: float = 0.05
    level: float = 0.1
    margin: float = 0.05
    test: str = "hoeffding-bentkus"
    batch: float = 1.0

    def __post_init__(self) -> None:
        guarantee.check_options(self.tolerance, self.level, self.test, self.margin)
        if not 1 <= self.batch <= 1e9:
            raise UserError(f"--batch {self.batch:g}: a number of sequences, at least 1, is expected")


Key = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Line:
    """One chain on one cell, tested.

    Attributes:
        keys: of each point what was asked for, to find it on other tasks.
        lost: (points, documents) paired losses, nan where one is missing; no rows of documents without scores.
        tested: fields (points,).
        refused: why nothing can be certified whatever was scored; None where the chain is in a family.
        gate: why dense cannot do the task. Such a chain stays in its family: that was read from the same documents.
    """

    cell: Cell
    chain: Chain
    keys: tuple[Key, ...]
    lost: guarantee.Floats
    tested: guarantee.Tested
    refused: str | None
    gate: str | None


def key(point: Point) -> Key:
    """What a run was asked for, the same on all tasks."""
    row = point.record
    asked = row.requested if row.requested is not None else json.dumps(row.knobs, sort_keys=True, default=str)
    return asked, tuple((name, figures.requested) for name, figures in sorted(row.by_phase.items()))


def asked(point: Point) -> float:
    """Sparsity that was requested; that was measured where native knobs ruled."""
    return point.measured if point.requested is None else point.requested


def lines(cells: Iterable[Cell], options: Options) -> list[Line]:
    """All chains of the cells, tested against their dense runs; a cell's all at once."""
    found = []
    for cell in cells:
        points = [point for chain in cell.chains for point in chain.points]
        if not points:
            continue
        dense = None if cell.dense is None else cell.dense.scores
        refused = gate = None
        if not cell.bounded:
            refused = f"{cell.metric} is no share in [0, 1] of which more is better: its losses are never certified"
        elif cell.dense is None:
            refused = "no dense baseline: run the task with method=dense"
        elif dense is None:
            refused = "no per-document scores of the dense run (--log_samples): no bands, no certificate"
        else:
            gate = guarantee.beats_chance(dense, cell.chance, options.margin, cell.short, options.tolerance)
        sparse = np.full((len(points), len(cell.ids)), np.nan)
        for row, point in enumerate(points):
            if point.scores is not None:
                sparse[row] = point.scores
        baseline = np.full(len(cell.ids), np.nan) if refused or dense is None else dense
        if refused:
            sparse[:] = np.nan
        lost = guarantee.losses(baseline, sparse)
        tested = guarantee.tested(baseline, sparse, options.tolerance, options.test)
        start = 0
        for chain in cell.chains:
            part = slice(start, start := start + len(chain.points))
            own = guarantee.Tested(tested.p[part], tested.n[part], tested.loss[part], tested.stderr[part])
            why = refused
            if why is None and all(point.scores is None for point in chain.points):
                why = "no per-document scores (--log_samples): no bands, no certificate"
            if why is None and not own.n.any():
                why = "dense and sparse runs have no document in common: run both on the same documents"
            # What depends on numbers of documents only may leave the family: no score is looked at.
            why = why or guarantee.too_few(int(own.n.max()), options.tolerance, options.level)
            beaten = gate if why is None else None
            if why is None and gate is None:
                own, beaten = _gate_of_shared(cell, chain, lost[part], own, options)
            found.append(Line(cell, chain, tuple(map(key, chain.points)), lost[part], own, why, beaten))
    return found


def _gate_of_shared(
    cell: Cell, chain: Chain, lost: guarantee.Floats, tested: guarantee.Tested, options: Options
) -> tuple[guarantee.Tested, str | None]:
    """Hold what dense can do against the documents that each run has in common with it, which its loss is one of.

    Returns:
        the tests, with a p-value of 1 where dense cannot do a run's documents, and why, where that is the first run's.
    """
    dense = cell.dense.scores if cell.dense is not None else None
    if dense is None:
        return tested, None
    kept = ~np.isnan(dense)
    known: dict[bytes, str | None] = {}
    p, first = tested.p.copy(), None
    for at, (point, row) in enumerate(zip(chain.points, lost, strict=True)):
        there = ~np.isnan(row)
        if not there.any() or np.array_equal(there, kept):
            continue
        mask = there.tobytes()
        if mask not in known:
            scores = np.where(there, dense, np.nan)
            known[mask] = guarantee.beats_chance(scores, cell.chance, options.margin, cell.short, options.tolerance)
        if known[mask]:
            p[at] = 1.0
            if at == 0:
                many = int(there.sum())
                first = f"of the {many} documents that the run at {asked(point):.3g} has as well, {known[mask]}"
    return guarantee.Tested(p, tested.n, tested.loss, tested.stderr), first


@dataclass(frozen=True, eq=False)
class Certificate:
    """What is certified of one task, group or worst task of a row.

    Attributes:
        kind: "task", "group" or "worst".
        name: as it is shown. `tasks`: short names of what is in it.
        points: those of its first task, sparsity ascending; `tested` (points,) goes with them.
        certified: how many of them, from the first on.
        level: what a p-value had to be at most. `family`: how many sequences shared the options' level.
        reason: why no more is certified, None where all is.
        refused: whether nothing can be said at all (no dense run, dense cannot do it, too few documents).
    """

    kind: str
    name: str
    tasks: tuple[str, ...]
    points: tuple[Point, ...]
    tested: guarantee.Tested
    certified: int
    level: float
    family: int
    reason: str | None
    refused: bool

    @property
    def sparsity(self) -> float | None:
        """Largest certified sparsity, as asked for; None where nothing is."""
        return asked(self.points[self.certified - 1]) if self.certified else None

    @property
    def documents(self) -> int:
        return int(self.tested.n.max(initial=0))


@dataclass(frozen=True, eq=False)
class Row:
    """One method of one model at one length, with its certificates: tasks, then groups, then the worst task."""

    model: str
    parameters: int | None
    label: str
    oracle: bool
    length: int | None
    mark: str
    certificates: tuple[Certificate, ...]


def task_names(cells: Iterable[Cell]) -> dict[str, str]:
    """Names of tasks as they are shown, by family: short, unless two families would share one."""
    shorts: dict[str, set[str]] = defaultdict(set)
    for cell in cells:
        shorts[cell.short].add(cell.family)
    return {
        family: short if len(families) == 1 else family for short, families in shorts.items() for family in families
    }


def certify(study: Study, options: Options) -> tuple[Row, ...]:
    """Certificates of every method of every model at every length, on one metric a task."""
    names = task_names(study.primary)
    rows: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for line in lines(study.primary, options):
        cell = line.cell
        rows[cell.model, line.chain.label, cell.length, cell.mark].append(line)
    there: dict[tuple[str, int | None], dict[str, Cell]] = defaultdict(dict)
    for cell in study.primary:
        if cell.bounded:
            there[cell.model, cell.length].setdefault(cell.family, cell)
    found = []
    for (model, label, length, mark), members in rows.items():
        own = {line.cell.family for line in members}
        absent = [cell for family, cell in there[model, length].items() if family not in own]
        certificates = (
            *_tasks(members, names, options),
            *_groups(members, names, options, absent),
            *_worst(members, names, options, absent),
        )
        first = members[0]
        found.append(Row(model, first.cell.parameters, label, first.chain.oracle, length, mark, certificates))
    return tuple(sorted(found, key=lambda row: (study.models.index(row.model), row.label, row.length or 0, row.mark)))


def _tasks(members: Sequence[Line], names: dict[str, str], options: Options) -> list[Certificate]:
    inside = [line for line in members if line.refused is None]
    result = guarantee.sequences([line.tested.p for line in inside], options.level)
    counts = dict(zip(map(id, inside), result.certified.tolist(), strict=True))
    return [
        _certificate("task", names[line.cell.family], [line], line.chain.points, line.tested, counts.get(id(line), 0),
                     float(result.level), len(inside), line.refused or line.gate, options)
        for line in members
    ]  # fmt: skip


def _groups(
    members: Sequence[Line], names: dict[str, str], options: Options, absent: Sequence[Cell] = ()
) -> list[Certificate]:
    """Means over the tasks of a group, where at least two of them are there: all that the model has at this length."""
    kinds = sorted({line.cell.family.removesuffix(line.cell.short) for line in members})
    several = len(kinds) > 1
    found = []
    refused: list[Certificate] = []
    for kind in kinds:
        for group, shorts in GROUPS.items():
            inside = [
                line for line in members
                if line.cell.short in shorts and line.cell.family == kind + line.cell.short
            ]  # fmt: skip
            lacking = [c for c in absent if c.short in shorts and c.family == kind + c.short]
            if not inside or len(inside) + len(lacking) < 2:
                continue
            name = f"{group} ({kind.strip('_')})" if several else group
            if why := _first_refusal(inside, names) or _not_run(lacking, names):
                refused.append(_refused("group", name, inside, why, options))
                continue
            points, tables = aligned(inside)
            found.append((name, inside, points, guarantee.mean_over_tasks(tables, options.tolerance)))
    result = guarantee.sequences([tested.p for *_, tested in found], options.level)
    certified = [
        _certificate("group", name, inside, points, tested, int(count), float(result.level), len(found),
                     _first_gate(inside, names), options)
        for (name, inside, points, tested), count in zip(found, result.certified, strict=True)
    ]  # fmt: skip
    return certified + refused


def _worst(
    members: Sequence[Line], names: dict[str, str], options: Options, absent: Sequence[Cell] = ()
) -> list[Certificate]:
    """Every task at most the tolerance. Where dense cannot do one of them nothing is said: there is nothing to lose on
    it, and leaving it out would be a choice by what was scored. Nor where a run or documents of one are missing: the
    worst of the others is another statement. Metrics that are never certified are in none."""
    inside = [line for line in members if line.cell.bounded]
    if not inside or len(inside) + len(absent) < 2:
        return []
    if why := _first_refusal(inside, names) or _not_run(absent, names):
        return [_refused("worst", "worst task", inside, why, options)]
    points, tested = together(inside)
    result = guarantee.sequences([tested.p], options.level)
    gate = _first_gate(inside, names)
    count, level = int(result.certified[0]), float(result.level)
    return [_certificate("worst", "worst task", inside, points, tested, count, level, 1, gate, options)]


def _first_refusal(inside: Sequence[Line], names: dict[str, str]) -> str | None:
    return next((f"{names[line.cell.family]}: {line.refused}" for line in inside if line.refused), None)


def _not_run(absent: Sequence[Cell], names: dict[str, str]) -> str | None:
    if not absent:
        return None
    return f"not run on {', '.join(names[cell.family] for cell in absent[:5])}, as it was set here"


def _refused(kind: str, name: str, inside: Sequence[Line], why: str, options: Options) -> Certificate:
    """A certificate that there is none, of tasks of which one has no tested run."""
    tasks = tuple(dict.fromkeys(line.cell.short for line in inside))
    empty = np.zeros(0)
    nothing = guarantee.Tested(empty, np.zeros(0, np.int64), empty, empty)
    return Certificate(kind, name, tasks, (), nothing, 0, options.level, 0, why, True)


def _first_gate(inside: Sequence[Line], names: dict[str, str]) -> str | None:
    return next((f"{names[line.cell.family]}: {line.gate}" for line in inside if line.gate), None)


def _union(inside: Sequence[Line]) -> dict[Key, Point]:
    """Everything that was asked for on any of the tasks, in the order of sparsity."""
    union = {k: point for line in reversed(inside) for k, point in zip(line.keys, line.chain.points, strict=True)}
    return dict(sorted(union.items(), key=lambda item: (asked(item[1]), item[1].measured)))


def aligned(inside: Sequence[Line]) -> tuple[tuple[Point, ...], list[guarantee.Floats]]:
    """Points of several tasks together, and of each task its losses (points, documents); nan where it was not run."""
    union = _union(inside)
    tables = []
    for line in inside:
        place = {k: row for row, k in enumerate(line.keys)}
        blank = np.full(line.lost.shape[1], np.nan)
        tables.append(np.stack([line.lost[place[k]] if k in place else blank for k in union]))
    return tuple(union.values()), tables


def together(inside: Sequence[Line]) -> tuple[tuple[Point, ...], guarantee.Tested]:
    """Points of several tasks together, and the worst of them at each: largest p and loss, fewest documents."""
    union = _union(inside)
    found = []
    for line in inside:
        place = {k: row for row, k in enumerate(line.keys)}
        rows = np.array([place.get(k, -1) for k in union])
        there = rows >= 0
        t = line.tested
        absent = ((t.p, 1.0), (t.n, 0), (t.loss, np.nan), (t.stderr, np.nan))
        found.append([np.where(there, values[rows], without) for values, without in absent])
    p, n, loss, stderr = (np.stack(part) for part in zip(*found, strict=True))
    worst = np.argmax(np.where(np.isnan(loss), np.inf, loss), axis=0)[None]
    at = lambda table: np.take_along_axis(table, worst, 0)[0]  # noqa: E731
    return tuple(union.values()), guarantee.Tested(guarantee.every_task(p), n.min(axis=0), at(loss), at(stderr))


def _certificate(
    kind: str,
    name: str,
    inside: Sequence[Line],
    points: tuple[Point, ...],
    tested: guarantee.Tested,
    certified: int,
    level: float,
    family: int,
    refused: str | None,
    options: Options,
) -> Certificate:
    reason = refused
    if refused:
        certified = 0
    elif certified < len(points):
        reason = stopped(points[certified], tested, certified, level, options, len(inside) if kind == "group" else 1)
    tasks = tuple(dict.fromkeys(line.cell.short for line in inside))
    return Certificate(kind, name, tasks, points, tested, certified, level, family, reason, refused is not None)


def stopped(point: Point, tested: guarantee.Tested, at: int, level: float, options: Options, tasks: int = 1) -> str:
    """Why a point is not certified, and what would do."""
    n, p, loss = int(tested.n[at]), float(tested.p[at]), float(tested.loss[at])
    what = f"at {asked(point):.3g}"
    if n == 0:
        return f"{what}: not run, or no per-document scores, on every task of it"
    error = float(tested.stderr[at])
    seen = f"loss {loss:.3f}" if math.isnan(error) else f"loss {loss:.3f} ± {error:.3f}"
    said = f"{what}: {seen} on {n} documents, p={p:.2g} > {level:.2g}"
    if loss >= options.tolerance:
        return f"{said}: it loses more than {options.tolerance:g}"
    least = guarantee.least_documents(options.tolerance, level, 1, loss)
    if options.test != "hoeffding-bentkus" or least is None or least <= n:
        return said
    return f"{said}; {least} documents would do if the loss stays as seen"
