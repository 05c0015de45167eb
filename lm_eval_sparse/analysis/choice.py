"""Which configuration to take for a task or a group: the cheapest certified one, or why there is none.

All methods of all models that were run are one family, so that the cheapest of the certified may be picked without its
certificate losing what it promises. What it costs is asked of the caller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UserError, nearest
from ..labels import label as shown
from . import guarantee
from .certify import Key, Line, Options, asked, key, lines, stopped, together
from .ladder import reached
from .study import GROUPS, Cell, Point, Study

Cost = Callable[[Point], float | None]
#: Of what costs follow from, what a dense and a sparse run of one model on one task share.
_SIZES = ("model_shape", "model_dtype", "prompt_tokens")
#: Lines on what would have to be measured, at most.
MOST_LINES = 12


@dataclass(frozen=True, eq=False)
class Candidate:
    """A certified configuration.

    Attributes:
        model, label, method, phases: whose it is.
        points: its runs, one for each task and length. `dense`: the dense runs of the same.
        sparsity, measured: as asked for, and the mean that was measured.
        cost, dense_cost: means over the runs, in the unit of the caller; None where one is not known.
        loss, p, documents: the largest mean loss and p-value and the fewest documents of its tasks.
        score, dense_score: means over its runs, of documents that the run and the dense one both have.
    """

    model: str
    label: str
    method: str
    phases: str
    points: tuple[Point, ...]
    dense: tuple[Point, ...]
    sparsity: float
    measured: float
    cost: float | None
    dense_cost: float | None
    loss: float
    p: float
    documents: int

    @property
    def score(self) -> float:
        return self._mean(self.points, self.dense)

    @property
    def dense_score(self) -> float:
        return self._mean(self.dense, self.points)

    @staticmethod
    def _mean(points: Sequence[Point], others: Sequence[Point]) -> float:
        """Mean of the points' scores on documents that the others have as well; one without scores has no certificate,
        so all have them."""
        found = []
        for point, other in zip(points, others, strict=True):
            if point.scores is not None and other.scores is not None:
                found.append(float(np.nanmean(np.where(np.isnan(other.scores), np.nan, point.scores))))
        return sum(found) / len(found)


@dataclass(frozen=True, eq=False)
class Choice:
    """What is recommended, or why nothing is.

    Attributes:
        tasks: names of the tasks that a configuration must keep, with their lengths.
        best: the cheapest certified configuration; None with a `refusal`.
        runner_up: the next cheapest of another method or model, else the next cheapest.
        certified: all certified configurations, the cheapest first, those of unknown cost last.
        family: candidate sequences (models times methods) that share the level.
        refusal: why there is no recommendation.
        measure: what would have to be measured to certify more.
        notes: what has to be known beside the recommendation.
    """

    tasks: tuple[str, ...]
    best: Candidate | None
    runner_up: Candidate | None
    certified: tuple[Candidate, ...]
    family: int
    refusal: str | None
    measure: tuple[str, ...]
    notes: tuple[str, ...]


def choose(
    study: Study,
    options: Options,
    cost: Cost,
    *,
    task: str | None = None,
    group: str | None = None,
    length: int | None = None,
) -> Choice:
    """The cheapest configuration that keeps a task, or every task of a group, within the tolerance.

    A candidate is a method of a model, from its lowest sparsity on. It must keep every task at every length that is
    asked for: a configuration's p-value is the largest of its tasks' (intersection-union), for which no correction is
    due. Holm over the candidates' sequences corrects for picking among models and methods. Oracles are no candidates.

    Args:
        options: tolerance, level, margin, test.
        cost: of a run, the smaller the better; None where it is not known.
        task: name of a task, its family or its short name.
        group: a name in `GROUPS`; every task of it that was run must be kept.
        length: tokens; by default all that were run.

    Raises:
        UserError: no such task, group or length in the study.
    """
    cells = _cells(study, task, group, length)
    tasks = tuple(dict.fromkeys(cell.task for cell in cells))
    by_model: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_model[cell.model].append(cell)
    needed = {(cell.task, cell.mark) for cell in cells}
    tested = lines(cells, options)
    by_cell: dict[int, list[Line]] = defaultdict(list)
    for line in tested:
        by_cell[id(line.cell)].append(line)

    refused: dict[str, None] = {}
    candidates: list[tuple[str, str, list[Line]]] = []
    for model, own in by_model.items():
        missing = needed - {(cell.task, cell.mark) for cell in own}
        if missing:
            refused[f"{model} was not run on {_listed(missing)}"] = None
            continue
        labels = list(dict.fromkeys(line.chain.label for cell in own for line in by_cell[id(cell)]))
        if not labels:
            refused[f"{model} has dense runs only: {_nothing_else(study)}"] = None
        for label in labels:
            found = [line for cell in own for line in by_cell[id(cell)] if line.chain.label == label]
            if found[0].chain.oracle:
                continue
            if len(found) < len(own):
                lacking = {(cell.task, cell.mark) for cell in own} - {
                    (line.cell.task, line.cell.mark) for line in found
                }
                refused[f"{label} of {model} was not run on {_listed(lacking)}"] = None
            elif any(line.refused for line in found):
                refused[f"{label} of {model} on {_reasons((line.cell, line.refused) for line in found)}"] = None
            else:
                candidates.append((model, label, found))

    joined = [together(found) for *_, found in candidates]
    result = guarantee.sequences([tested.p for _, tested in joined], options.level)
    certified, measure = [], []
    for (model, label, found), (points, tested), count in zip(candidates, joined, result.certified, strict=True):
        if any(line.gate for line in found):
            refused[f"{model} on {_reasons((line.cell, line.gate) for line in found)}"] = None
            continue
        certified += [_candidate(model, label, found, key(points[at]), at, tested, cost) for at in range(int(count))]
        measure.append(_more(model, label, points, tested, int(count), float(result.level), options))
    found = _choice(tasks, certified, len(candidates), list(refused), measure, options)
    lacking = _lacking(cells, group)
    return replace(found, notes=(lacking, *found.notes)) if lacking else found


def _cells(study: Study, task: str | None, group: str | None, length: int | None) -> list[Cell]:
    if (task is None) == (group is None):
        raise UserError("give --task NAME or --group NAME, one of them")
    if group is not None:
        if group not in GROUPS:
            raise UserError(f"--group {shown(group)}: choose {', '.join(GROUPS)}{nearest(group, GROUPS)}")
        cells = [cell for cell in study.primary if cell.short in GROUPS[group]]
        what = f"--group {group}: none of its tasks ({', '.join(GROUPS[group])})"
    else:
        cells = [cell for cell in study.primary if task in (cell.task, cell.family, cell.short)]
        what = f"--task {shown(task)}: it"
    if not cells:
        present = list(dict.fromkeys(cell.family for cell in study.primary))
        close = nearest(task or "", sorted({*present, *(cell.short for cell in study.primary)})) if task else ""
        raise UserError(f"{what} is not in these results, which hold {', '.join(map(shown, present[:20]))}{close}")
    families = sorted({cell.family for cell in cells if cell.short == task})
    if len(families) > 1:
        raise UserError(f"--task {shown(task)} is {' and '.join(families)} here; give one of these names")
    if length is not None:
        lengths = sorted({cell.length for cell in cells if cell.length})
        cells = [cell for cell in cells if cell.length == length]
        if not cells:
            there = f"these results have {', '.join(map(str, lengths))}" if lengths else "these tasks state no length"
            raise UserError(f"--length {length}: {there}")
    return cells


def _reasons(found: Iterable[tuple[Cell, str | None]]) -> str:
    """The first task that has a reason, and on which others it is likewise."""
    (first, why), *others = [(cell, why) for cell, why in found if why]
    rest = f" (and likewise on {', '.join(shown(cell.task) for cell, _ in others[:4])}" if others else ""
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    return f"{shown(first.task)}: {why}{rest}{more}{')' if rest else ''}"


def _nothing_else(study: Study) -> str:
    """What to do where a model has no run of a method: nothing was run, or it could not be read."""
    if not study.unread:
        return "run a method"
    return f"its other runs may be among what was left out ({shown(study.unread[0], 200)})"


def _listed(cells: Iterable[tuple[str, str]]) -> str:
    """Tasks with their marks."""
    return ", ".join(sorted(f"{shown(name)}{f' ({mark})' if mark else ''}" for name, mark in cells))


def _lacking(cells: Sequence[Cell], group: str | None) -> str | None:
    """Tasks of a group that nobody has run: nothing is promised of them."""
    if group is None:
        return None
    there = {cell.short for cell in cells}
    lacking = [name for name in GROUPS[group] if name not in there]
    if not lacking:
        return None
    return f"{group} holds {' and '.join(lacking)} as well, of which there are no runs here: nothing is promised there"


def _mean(values: Sequence[float | None]) -> float | None:
    return None if not values or any(value is None for value in values) else sum(values) / len(values)


def _candidate(
    model: str, label: str, found: Sequence[Line], wanted: Key, at: int, tested: guarantee.Tested, cost: Cost
) -> Candidate:
    runs = tuple(line.chain.points[line.keys.index(wanted)] for line in found)
    dense = tuple(line.cell.dense for line in found if line.cell.dense is not None)
    return Candidate(
        model, label, found[0].chain.method, found[0].chain.phases, runs, dense, asked(runs[0]),
        sum(run.measured for run in runs) / len(runs), _mean([cost(run) for run in runs]),
        _mean([_of_dense(cost, one, run) for one, run in zip(dense, runs, strict=True)]),
        float(tested.loss[at]), float(tested.p[at]), int(tested.n[at]),
    )  # fmt: skip


def _of_dense(cost: Cost, dense: Point, sparse: Point) -> float | None:
    """What dense attention costs. Other model types do not record the model's sizes and the prompts' tokens, which are
    those of the sparse run on the same documents."""
    found = cost(dense)
    if found is not None:
        return found
    lacking = [name for name in _SIZES if getattr(dense.record, name) is None]
    filled = dense.record.model_copy(update={name: getattr(sparse.record, name) for name in lacking})
    return cost(replace(dense, record=filled)) if lacking else None


def _more(
    model: str,
    label: str,
    points: Sequence[Point],
    tested: guarantee.Tested,
    count: int,
    level: float,
    options: Options,
) -> str:
    """What would have to be measured to certify more of a candidate."""
    if count == len(points):
        up = reached(asked(points[-1]), points[-1].measured)
        return f"{label} of {model}: all that was run is certified, up to {up}; run a higher sparsity"
    why = stopped(points[count], tested, count, level, options)
    n, loss = int(tested.n[count]), float(tested.loss[count])
    lower = "run a lower sparsity"
    if count:
        lower = f"run a sparsity between {asked(points[count - 1]):.3g} and {asked(points[count]):.3g}"
    if n == 0:
        what = "run it on each, with --log_samples"
    elif "would do" in why:
        what = ""
    elif loss >= options.tolerance:
        what = f"no number of documents would do for such a loss: {lower}"
    elif few := guarantee.too_few(n, options.tolerance, level):
        what = f"{few}: run more documents"
    elif guarantee.least_documents(options.tolerance, level, 1, loss) is None:
        what = f"the loss is so near the tolerance that no run has documents enough: {lower}"
    else:
        what = "run more documents"
    return f"{label} of {model} {why}" + (f"; {what}" if what else "")


def _choice(
    tasks: tuple[str, ...],
    certified: list[Candidate],
    family: int,
    refused: list[str],
    measure: list[str],
    options: Options,
) -> Choice:
    known = sorted((one for one in certified if one.cost is not None), key=lambda one: (one.cost, -one.sparsity))
    unknown = [one for one in certified if one.cost is None]
    useful = [one for one in known if one.dense_cost is not None and one.cost < one.dense_cost]
    notes, refusal = [], None
    what = f"within {options.tolerance:g} of dense on {', '.join(map(shown, tasks))} (level {options.level:g})"
    if not certified:
        # What is nearest to a certificate first; what has no room here stands below.
        reasons = sorted([*refused, *measure], key=lambda line: "would do if" not in line) or ["no method was run"]
        # Where all lose too much, or dense cannot do the task, a larger share of the level helps nobody.
        divided = (
            f"; {shared(family, options)}: choose some with --model or --method before their scores are looked at, or "
            "run new documents"
            if family > 1 and any("no number of documents" not in line for line in measure)
            else ""
        )
        refusal = f"nothing is certified {what}: {'; '.join(reasons[:2])}{divided}"
        measure = reasons[2:]
    elif not known:
        some = ", ".join(f"{one.label} at {reached(one.sparsity, one.measured)} of {one.model}" for one in unknown[:5])
        refusal = f"what configurations cost is not known, so none is the cheapest; certified {what}: {some}"
    elif all(one.dense_cost is None for one in known):
        refusal = (
            f"what dense attention costs is not known, so nothing can be said to cost less (run it with --model "
            f"sparse-hf, method=dense); certified {what}: "
            + ", ".join(f"{one.label} at {one.sparsity:.3g} of {one.model}" for one in known[:5])
        )
    elif not useful:
        refusal = f"dense costs no more than any configuration that is certified {what}: take dense"
    best = useful[0] if useful else None
    runner_up = None
    if best is not None:
        others = [one for one in useful if (one.model, one.label) != (best.model, best.label)]
        runner_up = next(iter([*others, *useful[1:]]), None)
        better = [one for one in useful if one.model != best.model and one.dense_score > best.dense_score]
        if better:
            top = max(better, key=lambda one: one.dense_score)
            notes.append(
                f"a loss is one against the model's own dense run: {best.model} scores {best.dense_score:.3f} there, "
                f"and {top.model} {top.dense_score:.3f}"
            )
        if unknown:
            notes.append(f"{len(unknown)} certified configurations of unknown cost are not compared")
        notes += refused
    if more := measure[MOST_LINES:]:
        measure = [*measure[:MOST_LINES], f"and {len(more)} more, which `analyze` lists"]
    return Choice(tasks, best, runner_up, tuple(known + unknown), family, refusal, tuple(measure), tuple(notes))


def shared(family: int, options: Options) -> str:
    """Why a p-value has to be below a part of the level."""
    return f"level {options.level:g} is shared by {family} candidates, {options.level / family:.2g} each at first"
