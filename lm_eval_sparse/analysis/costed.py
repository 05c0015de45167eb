"""Configurations with what they cost: models, methods and sparsities that answered the same tasks, side by side.

A *configuration* is a model with a method at a sparsity. A *group* is all configurations on tasks of one length that
are asked in one way, so that scores may be compared and averaged.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .cost import Cost, Pairs, of
from .study import Cell, Chain, Point, Study

#: Phases that costs are told of, and the phases of methods that change them.
PHASES = {"prefill": ("prefill",), "decode": ("decode", "eviction")}
#: Sets of tasks that are looked at at a time.
_MOST_CHOICES = 1000


@dataclass(frozen=True, eq=False)
class Run:
    """A configuration on one task.

    Attributes:
        cell, chain: where it is from; no chain for dense attention.
        point: the run.
        cost: of it, with the batch that was asked for.
    """

    cell: Cell
    chain: Chain | None
    point: Point
    cost: Cost


#: A score that is no more above chance is a guess.
GUESSED = 0.05


@dataclass(frozen=True, eq=False)
class Configuration:
    """A model with a method at a sparsity.

    Attributes:
        model, label: names; `dense` where nothing is sparse.
        phases: that the method fills.
        oracle: whether the method knows what no method can know.
        runs: by task.
    """

    model: str
    label: str
    phases: tuple[str, ...]
    oracle: bool
    runs: dict[str, Run]

    @property
    def dense(self) -> bool:
        return not self.phases

    def measured(self, tasks: Sequence[str]) -> float:
        """Mean sparsity over tasks."""
        return _mean(self.runs[task].point.measured for task in tasks)

    def score(self, tasks: Sequence[str]) -> float:
        return _mean(self.runs[task].point.record.score for task in tasks)

    def cost(self, phase: str, tasks: Sequence[str]) -> float | None:
        """Mean cost over tasks, None where that of one is not known."""
        found = [self.runs[task].cost.total(phase) for task in tasks]
        return None if None in found else _mean(found)

    def guesses(self, tasks: Sequence[str]) -> bool:
        """Whether it scores hardly more than chance, where that is known of all tasks."""
        chances = [self.runs[task].cell.chance for task in tasks]
        return None not in chances and self.score(tasks) - _mean(chances) <= GUESSED

    def changes(self, phase: str) -> bool:
        """Whether its method changes what this phase costs: dense attention is always told."""
        return self.dense or any(name in self.phases for name in PHASES[phase])


@dataclass(frozen=True, eq=False)
class Group:
    """Configurations on tasks of one length.

    Attributes:
        length: tokens that prompts aim at, None where tasks do not say.
        kind: `frontier`, `forced_frontier`, or empty for other tasks.
        tasks: all of them, by short name (with the mark of mixed runs).
        higher: task -> whether a higher score is better.
        configurations: the smallest model first, dense first.
    """

    length: int | None
    kind: str
    tasks: tuple[str, ...]
    higher: dict[str, bool]
    configurations: tuple[Configuration, ...]

    def cells(self, task: str) -> dict[str, Cell]:
        """Of each model that was asked the task."""
        return {one.model: one.runs[task].cell for one in self.configurations if task in one.runs}

    @cached_property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.model for one in self.configurations))


def groups(study: Study, batch: float = 1, pairs: Pairs = "square") -> list[Group]:
    """The groups of a study, by kind and length."""
    members: dict[tuple[str, int | None], list[Cell]] = defaultdict(list)
    for cell in study.primary:
        members[_kind(cell), cell.length].append(cell)
    sizes = {model: place for place, model in enumerate(study.models)}
    found = []
    for (kind, length), cells in sorted(members.items(), key=lambda one: (one[0][0], one[0][1] or 0)):
        runs: dict[tuple[Any, ...], dict[str, Run]] = defaultdict(dict)
        for cell in cells:
            task = _task(cell)
            for chain, point in _points(cell):
                runs[_key(cell, chain, point)][task] = Run(cell, chain, point, _cost(cell, point, batch, pairs))
        made = [_configuration(own) for own in runs.values()]
        made.sort(key=lambda one: (sizes[one.model], not one.dense, one.label, one.measured(tuple(one.runs))))
        higher = {_task(cell): cell.higher_is_better for cell in cells}
        found.append(Group(length, kind, tuple(sorted(higher)), higher, tuple(made)))
    return found


def able(asked: Mapping[str, Collection[str]], failed: Mapping[str, Collection[str]]) -> tuple[set[str], set[str]]:
    """Models and tasks that a mean may be taken of: each of the models can do each of the tasks that it was asked.

    Of all such choices the one with most pairs of a model and a task it was asked, and of several the one with more
    models: a model that fails a task leaves, or the task does.

    Args:
        asked: model -> tasks that it was asked.
        failed: model -> those of them that nothing may be said of.
    """
    tasks = frozenset().union(*asked.values())
    fine = {model: tasks - frozenset(failed.get(model, ())) for model in asked}
    # The best choice has all tasks that its models do not fail.
    choices: set[frozenset[str]] = set()
    for own in sorted(set(fine.values()), key=lambda own: (-len(own), sorted(own))):
        choices |= {own, *(own & other for other in choices)}
        if len(choices) > _MOST_CHOICES:
            choices = set(sorted(choices, key=lambda own: (-len(own), sorted(own)))[:_MOST_CHOICES])

    def members(chosen: frozenset[str]) -> set[str]:
        return {model for model in asked if chosen <= fine[model] and not chosen.isdisjoint(asked[model])}

    def worth(chosen: frozenset[str]) -> tuple[int, int, list[str]]:
        models = members(chosen)
        return sum(len(chosen & frozenset(asked[model])) for model in models), len(models), sorted(chosen)

    best = max(choices, key=worth, default=frozenset())
    return members(best), set(best)


def shared(configurations: Sequence[Configuration], tasks: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tasks that a mean may be taken of, and those of `tasks` that some configurations lack.

    The tasks that all configurations have. Where there are none, those that most of them have: the others cannot be in
    the mean.
    """
    have = [frozenset(task for task in tasks if task in one.runs) for one in configurations]
    common = frozenset.intersection(*have) if have else frozenset()
    if not common and have:
        number = Counter(own for own in have if own)
        common = max(number, key=lambda own: (number[own], len(own), sorted(own)), default=frozenset())
    return tuple(task for task in tasks if task in common), tuple(task for task in tasks if task not in common)


def _points(cell: Cell) -> Iterable[tuple[Chain | None, Point]]:
    if cell.dense is not None:
        yield None, cell.dense
    for chain in cell.chains:
        for point in chain.points:
            yield chain, point


def _kind(cell: Cell) -> str:
    return cell.family.removesuffix(cell.short).rstrip("_") if cell.family != cell.short else ""


def _task(cell: Cell) -> str:
    return cell.short + (f" ({cell.mark})" if cell.mark else "")


def _key(cell: Cell, chain: Chain | None, point: Point) -> tuple[Any, ...]:
    """What tells a configuration from others on every task alike."""
    if chain is None:
        return (cell.model,)
    asked = tuple((name, figures.requested) for name, figures in sorted(point.record.by_phase.items()))
    budget = point.requested if point.requested is not None else json.dumps(point.record.knobs, default=str)
    return cell.model, chain.label, chain.phases, budget, asked


def _configuration(runs: dict[str, Run]) -> Configuration:
    run = next(iter(runs.values()))
    chain = run.chain
    phases = tuple(chain.phases.split("+")) if chain is not None and chain.phases else ()
    label = "dense" if chain is None else chain.label
    return Configuration(run.cell.model, label, phases, chain is not None and chain.oracle, runs)


def _cost(cell: Cell, point: Point, batch: float, pairs: Pairs) -> Cost:
    """Runs of a cell share the model and the prompts: what one of them does not say, another one may."""
    record = point.record
    lacks: dict[str, Any] = {}
    if record.model_shape is None and cell.shape is not None:
        lacks["model_shape"] = cell.shape
    if record.prompt_tokens is None:
        told = (other.record.prompt_tokens for _, other in _points(cell))
        lacks["prompt_tokens"] = next((tokens for tokens in told if tokens), None)
    return of(record.model_copy(update=lacks) if lacks else record, batch, pairs)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
