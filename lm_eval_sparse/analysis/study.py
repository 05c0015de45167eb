"""Records put together as they are compared: dense and sparse runs of one model on one task, document by document.

A *cell* is what dense and sparse runs must share: the model, the task with its version, hash, seed and prompt, and the
metric. A *chain* in it is one method at rising sparsity. What cannot be compared is refused or listed, never merged.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..labels import label
from ..results.schema import Record, Shape
from .settings import mixed, setting, stated, weights
from .variants import chain_labels, is_dense, is_oracle, kind, unlike

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Groups of tasks as the paper's second version plots them, by the short names of tasks.
GROUPS = {
    "single_qa": ("squad", "quality", "toefl"),
    "multiple_qa": ("niah", "story_retrieval"),
    "high_scope": ("cwe", "story_filtering"),
    "high_dispersion": ("vt", "story_multihop"),
}
_LEAF = re.compile(r"(?P<family>(?:forced_)?frontier_(?P<short>\w+?))_(?P<length>\d+k)")
#: At most so many mixtures are named.
_NAMED = 5
#: What is said of a level of chance that was given over another one.
TAKEN = "chance is taken to be"
#: Levels of chance that differ by less are of tasks whose documents differ in their choices.
_HARDLY = 0.05


@dataclass(frozen=True, eq=False)
class Point:
    """One run on a cell.

    Attributes:
        record: what was recorded of it.
        scores: (n,) float64, by document in the order of the cell's `ids`; NaN where this run lacks the document. None
            where no scores by document are kept.
    """

    record: Record
    scores: NDArray[np.float64] | None

    @property
    def requested(self) -> float | None:
        return self.record.requested

    @property
    def measured(self) -> float:
        return self.record.measured


@dataclass(frozen=True, eq=False)
class Chain:
    """Runs of one method that differ in sparsity only.

    Attributes:
        method, phases: as recorded.
        label: short name of the method with what tells it from other chains of the study, such as a knob.
        oracle: whether the method, or a part of it, knows what no method can know.
        points: sparsity ascending, as it was requested; as it was measured where native knobs ruled. Not by outcome.
    """

    method: str
    phases: str
    label: str
    oracle: bool
    points: tuple[Point, ...]


@dataclass(frozen=True, eq=False)
class Cell:
    """What dense and sparse runs share, and the runs.

    Attributes:
        model: name, with dtype or revision where the study has several of it.
        parameters, shape: of the model, None where no run says them.
        task: name. `family`: without the length. `short`: without `frontier_` as well; other tasks' own name.
        length: tokens that prompts aim at, None where the task says none.
        metric, higher_is_better: of the score.
        chance: score without knowledge, None where it is not known.
        bounded: whether it lies in [0, 1], the higher the better, so that losses can be certified.
        mark: what tells it from cells of the same task under `allow_mixed`, such as `seed 7`; else empty.
        ids: documents, in the task's order.
        dense: the baseline, None where there is none.
        chains: methods.
    """

    model: str
    parameters: int | None
    shape: Shape | None
    task: str
    family: str
    short: str
    length: int | None
    metric: str
    higher_is_better: bool
    chance: float | None
    bounded: bool
    mark: str
    ids: tuple[str, ...]
    dense: Point | None
    chains: tuple[Chain, ...]


@dataclass(frozen=True, eq=False)
class Study:
    """All that was read.

    Attributes:
        cells: sorted by model, task family, length, metric.
        records: every record that is in a cell.
        left_out: lines on what is not, and why.
        marks: lines on what is mixed, where that was allowed.
        unread: those of `left_out` on what could not be read or cannot be.
    """

    cells: tuple[Cell, ...]
    records: tuple[Record, ...]
    left_out: tuple[str, ...] = ()
    marks: tuple[str, ...] = field(default=())
    unread: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        """Names of models, the smallest first; those of unknown size last."""
        sizes = {cell.model: cell.parameters for cell in self.cells}
        return tuple(sorted(sizes, key=lambda name: (sizes[name] is None, sizes[name] or 0, name)))

    @property
    def primary(self) -> tuple[Cell, ...]:
        """Cells of one metric a task: the first in the task's own order that is bounded, else the first."""
        chosen: dict[tuple[str, str, str], Cell] = {}
        order = {id(record): place for place, record in enumerate(self.records)}
        for cell in self.cells:
            key = cell.model, cell.task, cell.mark
            best = chosen.get(key)
            if best is None or _rank(cell, order) < _rank(best, order):
                chosen[key] = cell
        picked = {id(cell) for cell in chosen.values()}
        return tuple(cell for cell in self.cells if id(cell) in picked)


def _rank(cell: Cell, order: Mapping[int, int]) -> tuple[bool, int]:
    points = [cell.dense] if cell.dense else [point for chain in cell.chains for point in chain.points]
    return not cell.bounded, min(order[id(point.record)] for point in points)


def short_name(task: str) -> tuple[str, str]:
    """Family and short name of a task: `("forced_frontier_niah", "niah")` of `forced_frontier_niah_4k`."""
    found = _LEAF.fullmatch(task)
    return (found["family"], found["short"]) if found else (task, task)


def build(
    records: Iterable[Record],
    *,
    allow_mixed: bool = False,
    chance: Mapping[str, float] | None = None,
    metric: str | None = None,
    left_out: Iterable[str] = (),
) -> Study:
    """Put records together.

    Args:
        allow_mixed: tasks of several versions, seeds or prompts stand beside each other, marked; else they are refused.
        chance: levels by the name of a task, its family or its short name, over those that records carry.
        metric: keep this one only, by its name with or without its filter.
        left_out: lines on what could not be read.

    Raises:
        UserError: nothing is left, tasks are mixed, or an option names nothing.
    """
    rows = _once(records)
    said = list(dict.fromkeys(left_out))
    unread = tuple(said)
    if metric is not None:
        chosen = [row for row in rows if metric in (row.metric, row.metric.partition(",")[0])]
        if not chosen:
            known = ", ".join(sorted({label(row.metric) for row in rows})[:20])
            raise UserError(f"--metric {label(metric)}: no run here has it; they have {known}")
        rows = chosen
    if not rows:
        raise UserError("there are no records to analyse; give result files of lm-eval or folders that hold them")
    levels = dict(chance or {})
    _check_chance(levels, rows)
    names = _model_names(rows)
    settings: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for row in rows:
        settings[names[_identity(row)], row.task, row.metric, setting(row)].append(row)
    marks, lines = mixed((model, task, short_name(task)[0], name, shared) for model, task, name, shared in settings)
    if lines and not allow_mixed:
        more = f"; and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
        raise UserError(
            f"runs that cannot be compared: {'; '.join(lines[:_NAMED])}{more}; give the runs of one kind, or "
            "--allow-mixed to see them side by side, marked"
        )
    chains = chain_labels(rows)
    cells, kept = [], []
    for (model, task, metric_name, shared), members in settings.items():
        cell = _cell(model, task, metric_name, marks.get((model, task, shared), ""), members, chains, levels, said)
        cells.append(cell)
        kept += members
    cells.sort(key=lambda cell: (cell.model, cell.family, cell.length or 0, cell.task, cell.metric, cell.mark))
    return Study(tuple(cells), tuple(rows), tuple(dict.fromkeys(said)), tuple(lines), unread)


def _once(records: Iterable[Record]) -> list[Record]:
    """The records, those of a run that was read twice (from its file, and from `records.jsonl`) once."""
    found: dict[tuple[Any, ...], Record] = {}
    for row in records:
        key = (row.date, row.command, row.task, row.metric, row.score, row.n, row.measured, row.device)
        asked = row.requested, tuple((name, part.requested) for name, part in sorted(row.by_phase.items()))
        known = row.documents is None or hash(row.documents.scores)
        found.setdefault((*key, row.method, asked, known, _identity(row), setting(row), kind(row)), row)
    return list(found.values())


# -- models


def _whole(identity: tuple[Any, ...], others: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """An identity with what it does not say, as other model types do not, where all that fit it and say more agree."""
    first, last = identity[:1], identity[1:]
    fitting = [
        other[1:]
        for other in others
        if other[:1] == first and all(a is None or b in (None, a) for a, b in zip(last, other[1:], strict=True))
    ]
    known = [{one[place] for one in fitting if one[place] is not None} for place in range(len(last))]
    found = (
        mine if mine is not None or len(values) != 1 else next(iter(values))
        for mine, values in zip(last, known, strict=True)
    )
    return (*first, *found)


#: Where the number of parameters and the hash stand in an identity.
_COUNT, _HASH = 4, 5


def _identity(row: Record) -> tuple[Any, ...]:
    revision, dtype = stated(row, "model_revision", "revision"), stated(row, "model_dtype", "dtype", "torch_dtype")
    return row.model, revision, dtype, weights(row), row.model_parameters, row.model_hash


def _part(place: int, part: Any) -> str:
    """A part of an identity in words."""
    return f"{part:,} parameters" if place == _COUNT else part[:8] if place == _HASH else str(part)


def _unknown(place: int) -> str:
    """What stands for a part of an identity that a run does not say."""
    return f"{('name', 'revision', 'dtype', 'weights', 'parameters', 'hash')[place]} unknown"


def _model_names(rows: Sequence[Record]) -> dict[tuple[Any, ...], str]:
    """A name for each model, with what tells it from others of the same name.

    A run that does not know its revision, dtype, parameters or the hash of its weights, as of other model types, is of
    the one model that has its name and fits what it says, where there is but one.
    """
    identities = {_identity(row) for row in rows}
    resolved = {identity: _whole(identity, identities) for identity in identities}
    by_name: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    for found in resolved.values():
        by_name[found[0]].add(found)

    def shown(found: tuple[Any, ...]) -> str:
        others = by_name[found[0]]
        parts = [
            label(_unknown(place) if part is None else _part(place, part), 60)
            for place, part in enumerate(found)
            if place and part != "" and len({other[place] for other in others}) > 1
        ]
        return f"{found[0]} ({', '.join(parts)})" if parts else found[0]

    names = unlike({found: label(shown(found), 300) for found in set(resolved.values())})
    return {identity: names[found] for identity, found in resolved.items()}


# -- cells


def _cell(
    model: str,
    task: str,
    metric: str,
    mark: str,
    members: Sequence[Record],
    labels: Mapping[tuple[Any, ...], str],
    levels: Mapping[str, float],
    said: list[str],
) -> Cell:
    family, short = short_name(task)
    where = f"{label(task)} of {label(model)}"
    ids = _order(members)
    place = {name: at for at, name in enumerate(ids)}
    by_chain: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Record]]] = defaultdict(lambda: defaultdict(list))
    dense: list[Record] = []
    for row in members:
        if is_dense(row):
            dense.append(row)
        else:
            key = (
                (row.requested,)
                if row.requested is not None
                else (None, json.dumps(row.knobs, sort_keys=True, default=str))
            )
            phases = tuple((name, figures.requested) for name, figures in sorted(row.by_phase.items()))
            by_chain[kind(row)][(*key, phases)].append(row)
    # One baseline: with scores by document, what ran under our own runtime, with the most documents, the newest.
    dense.sort(
        key=lambda row: (
            row.documents is not None, row.method == "dense", row.runner == "sparse-hf", row.n, row.date or "",
        ),
        reverse=True,
    )  # fmt: skip
    if not dense and by_chain:
        said.append(f"{where} ({label(metric)}) has no dense run: no loss can be said; run it with method=dense")
    _again(dense, f"{where}: dense", said, "the one with most documents, the newest,")
    chains = []
    kept = set(dense[0].documents.ids) if dense and dense[0].documents else set()
    for chain, configurations in by_chain.items():
        method, phases, _ = chain
        name = labels[chain]
        rows = []
        for again in configurations.values():
            # A loss is one on documents that dense has as well.
            again.sort(key=lambda row: (_shared(row, kept), row.n, row.date or ""), reverse=True)
            shared = "the one with most documents that dense has as well, then most, then the newest,"
            _again(again, f"{where}: {name} at {_asked(again[0])}", said, shared)
            rows.append(again[0])
        rows.sort(key=lambda row: (row.measured if row.requested is None else row.requested, row.measured))
        chains.append(Chain(method, phases, name, is_oracle(method), tuple(_point(row, place) for row in rows)))
    chains.sort(key=lambda chain: chain.label)
    first = members[0]
    given = next((levels[name] for name in (task, family, short) if name in levels), None)
    return Cell(
        model=model,
        parameters=next((row.model_parameters for row in members if row.model_parameters), None),
        shape=next((row.model_shape for row in members if row.model_shape), None),
        task=task,
        family=family,
        short=short,
        length=next((row.length for row in members if row.length), None),
        metric=metric,
        higher_is_better=first.higher_is_better,
        chance=_chance(members, f"{where} ({label(metric)})", short, given, said),
        bounded=first.bounded,
        mark=mark,
        ids=ids,
        dense=_point(dense[0], place) if dense else None,
        chains=tuple(chains),
    )


def _chance(members: Sequence[Record], where: str, short: str, given: float | None, said: list[str]) -> float | None:
    """What guessing scores: what was `given`, else what runs state, the largest of levels that hardly differ."""
    known = sorted({row.chance for row in members if row.chance is not None})
    if given is not None:
        if known and abs(known[-1] - given) > _HARDLY:
            said.append(f"{where}: {TAKEN} {given:g}, as it was given; its runs say {known[-1]:g}")
        return given
    if not known or known[-1] - known[0] <= _HARDLY:
        return known[-1] if known else None
    said.append(
        f"{where}: its runs say that chance is {known[0]:g} and {known[-1]:g}, so it is not known; give --chance "
        f"{label(short)}={known[-1]:g}, or what it is"
    )
    return None


def _shared(row: Record, kept: set[str]) -> int:
    """Documents that a run has in common with the dense one."""
    return len(kept.intersection(row.documents.ids)) if row.documents else 0


def _again(rows: Sequence[Record], what: str, said: list[str], why: str) -> None:
    """Say which runs of one configuration are not used; the same run, read twice, is no word worth."""
    used = [(row.score, row.n, row.date) for row in rows[:1]]
    others = [row for row in rows if (row.score, row.n, row.date) not in used]
    if others:
        told = (f"{row.score:.4g} (n={row.n}{_ran_on(row)})" for row in others[:3])
        scores = ", ".join(told)
        said.append(
            f"{what} was run {len(others) + 1} times; {why} is used"
            f"{label(_ran_on(rows[0]), 100)}; left out: {label(scores, 200)}"
        )


def _ran_on(row: Record) -> str:
    return "".join(f", {part}" for part in (row.backend and f"backend {row.backend}", row.device) if part)


def _asked(row: Record) -> str:
    return f"{row.requested:g}" if row.requested is not None else f"{row.measured:.3f} (knobs)"


def _order(members: Sequence[Record]) -> tuple[str, ...]:
    """All documents of a cell: those of the longest run in its order, then what others have besides."""
    lists = sorted((row.documents.ids for row in members if row.documents), key=len, reverse=True)
    return tuple(dict.fromkeys(name for ids in lists for name in ids))


def _point(row: Record, place: Mapping[str, int]) -> Point:
    if row.documents is None:
        return Point(row, None)
    scores = np.full(len(place), np.nan)
    scores[[place[name] for name in row.documents.ids]] = row.documents.scores
    return Point(row, scores)


def _check_chance(levels: Mapping[str, float], rows: Sequence[Record]) -> None:
    names = {name for row in rows for name in (row.task, *short_name(row.task))}
    for name, level in levels.items():
        if not 0 <= level <= 1:  # nor is it a number
            raise UserError(f"--chance {label(name)}={level:g}: a level from 0 to 1 is expected")
        if name not in names:
            known = ", ".join(sorted({label(row.task) for row in rows})[:20])
            raise UserError(f"--chance {label(name)}: no such task in these results, which hold {known}")


__all__ = ["GROUPS", "Cell", "Chain", "Point", "Study", "build", "short_name"]
