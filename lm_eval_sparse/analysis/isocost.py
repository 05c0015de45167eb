"""isoCost: what a score costs, over models, methods and sparsities; what no other configuration beats; equal costs.

As in The Sparse Frontier a point is a model with a method at a sparsity, and the line are the points that no other one
dominates. Costs are those of `cost`, with what each method was measured to spend on selecting.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import UserError
from ..labels import label
from .cost import Pairs
from .costed import GUESSED, Configuration, Group, able, groups, shared
from .equal import Comparison, Floor, comparisons
from .figure import Figure, Panel, Section, Series, Table
from .ladder import because, floor_of
from .pareto import front

FRONT = "Pareto front"
_AXES = {
    "prefill": "operations of the prefill",
    "decode": "elements read by a decode step",
}
#: Of so many configurations on a front, and reasons, each is named.
_NAMED = 8
#: Characters of a note that can be read in a picture.
_NOTE = 90
_HEADER = ("length", "phase", "tasks", "model", "method", "sparsity", "cost", "score", "on the front")
_EQUAL = (
    "length", "phase", "smaller, dense", "larger", "method", "equal cost", "sparsity", "smaller's score",
    "larger's score", "difference", "standard error", "better", "tasks",
)  # fmt: skip
_KINDS = {
    "equal": "between two runs",
    "cheaper": "even with dense attention",
    "beyond": "beyond the runs",
    "dearer": "in no run",
    "never": "never",
}


def section(study: Any, options: Any = None, floor: Floor | None = None) -> Section:
    """Scores against costs of a study.

    Args:
        options: `batch` (rows that are decoded together; 1), `pairs` (`square` as in the paper, or `triangle`) and
            `margin` (that dense must exceed chance by; .05), where it has them. Raises `UserError` for a batch below 1.
        floor: says of a cell why dense attention does not beat chance; by default `guarantee.beats_chance`.
    """
    batch: float = getattr(options, "batch", 1)
    if not 1 <= batch < float("inf"):
        raise UserError(f"--batch {batch:g}: sequences decoded side by side are at least 1; type --batch 1")
    pairs: Pairs = getattr(options, "pairs", None) or "square"
    floor = floor or floor_of(getattr(options, "margin", 0.05))
    marks = {model: place for place, model in enumerate(study.models)}
    figures, rows, equal, sentences = [], [], [], []
    used: set[str] = set()
    reasons: dict[str, set[str]] = defaultdict(set)
    remarks: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    missing: dict[str, None] = {}
    # The longest prompts first: there attention costs most.
    for group in sorted(groups(study, batch, pairs), key=lambda group: -(group.length or 0)):
        for phase in _AXES:
            chosen = _told(group, phase, reasons)
            if not any(not one.dense for one in chosen) and len(chosen) < 2:
                continue
            panels, means, said, absent = _panels(group, phase, chosen, batch, floor, marks)
            missing |= dict.fromkeys(f"{_where(group)}. {note}" for note in absent)
            if not panels:
                continue
            at = _where(group)
            figures.append(
                Figure(
                    _stem(used, "isocost", phase, group.length, group.kind),
                    f"Score against the cost of {'the prefill' if phase == 'prefill' else 'a decode step'}: {at}",
                    _caption(phase, batch, pairs),
                    tuple(panels),
                )
            )
            rows += means
            sentences += said
            found, cannot = comparisons(group, phase, floor, batch, pairs)
            equal += [_equal_row(group, one) for one in found]
            sentences += _equal_sentences(group, found, batch)
            if cannot:
                remarks[_where(group)] |= cannot
    sentences += missing
    sentences += [
        f"{at}: at equal cost nothing is said of {', '.join(sorted({label(task) for task, _ in cannot}))}: "
        f"{because((f'{label(task)} of {label(model)}', why) for (task, model), why in sorted(cannot.items()))}."
        for at, cannot in remarks.items()
    ]
    sentences += _unknown(reasons)
    tables = []
    if rows:
        caption = (
            f"{_caption_of_costs(batch, pairs)} Means are over the tasks named, which all configurations here have and "
            "dense attention of every model here can do."
        )
        tables.append(Table(_stem(used, "isocost_means"), "Scores and costs", _HEADER, tuple(rows), caption))
    if equal:
        caption = (
            "Where the larger model with a method costs what the smaller one costs with dense attention: measured "
            "sparsity and scores there, linearly between two runs. A model is better where the 95% confidence interval "
            "of the difference leaves out 0, each by itself, and scores of neighbouring costs go together. Tasks are "
            "those that dense attention of both models can do."
        )
        tables.append(Table(_stem(used, "isocost_equal"), "Equal costs", _EQUAL, tuple(equal), caption))
    if not figures:
        sentences.insert(0, "There are no two configurations whose costs are known and whose scores can be compared.")
    return Section("isocost", "Score against cost", tuple(sentences), tuple(figures), tuple(tables))


# -- points and fronts


def _told(group: Group, phase: str, reasons: dict[str, set[str]]) -> list[Configuration]:
    """Configurations of a phase on tasks that their cost is known of; notes why others are left out."""
    found = []
    for one in group.configurations:
        if not one.changes(phase):
            continue
        runs = {task: run for task, run in one.runs.items() if run.cost.total(phase) is not None}
        for run in one.runs.values():
            if run.cost.total(phase) is None:
                reasons[run.cost.unknown[phase]].add(one.model)
        if runs:
            found.append(Configuration(one.model, one.label, one.phases, one.oracle, runs))
    return found


def _panels(
    group: Group, phase: str, chosen: Sequence[Configuration], batch: float, floor: Floor, marks: Mapping[str, int]
) -> tuple[list[Panel], list[tuple[Any, ...]], list[str], list[str]]:
    """The mean over tasks and each task; lines of the table of means; sentences on the front of the mean; and on what
    is not in it."""
    why = {
        (task, model): reason
        for task in group.tasks
        for model, cell in group.cells(task).items()
        if (reason := floor(cell)) is not None
    }
    asked = {
        model: {task for one in chosen if one.model == model for task in one.runs if group.higher[task]}
        for model in dict.fromkeys(one.model for one in chosen)
    }
    models, kept = able(asked, {model: {task for task in own if (task, model) in why} for model, own in asked.items()})
    able_to = [one for one in chosen if one.model in models]
    tasks, lacking = shared(able_to, [task for task in group.tasks if task in kept])
    notes = _notes(asked, models, kept, why)
    panels, rows, sentences = [], [], []
    whole = [one for one in able_to if all(task in one.runs for task in tasks)] if tasks else []
    if len(whole) > 1:
        on = _front(whole, phase, tasks)
        named = ", ".join(map(label, tasks))
        if len(tasks) > 1:
            more = _lacking(lacking, len(able_to) - len(whole))
            title = f"mean of {len(tasks)} tasks"
            short = _notes(asked, models, kept, _heads(why))
            note = " ".join([*(_fitting(*both) for both in zip(notes, short, strict=True)), *more])
            panels.append(_panel(title, whole, phase, tasks, on, batch, note, "mean", marks))
        rows = [
            (
                group.length, phase, named, label(one.model), label(one.label), one.measured(tasks),
                one.cost(phase, tasks), one.score(tasks), bool(beats) if not one.oracle else "oracle",
            )
            for one, beats in zip(whole, on, strict=True)
        ]  # fmt: skip
        sentences = [_front_sentence(group, phase, whole, on, tasks)]
    for task in group.tasks:
        own = [one for one in chosen if task in one.runs]
        if len(own) > 1:
            # Drawn all the same, but what a model does that cannot do the task beats nobody.
            failed = {one.model: why[task, one.model] for one in own if (task, one.model) in why}
            on = _front(own, phase, (task,), group.higher[task], failed)
            many = len({one.model for one in own})
            note = _fitting(_refused(failed, many), _refused(_heads(failed), many))
            panels.append(_panel(label(task, 60), own, phase, (task,), on, batch, note, task, marks))
    return panels, rows, sentences, notes


def _front(
    chosen: Sequence[Configuration],
    phase: str,
    tasks: Sequence[str],
    higher: bool = True,
    failed: Collection[str] = (),
) -> list[bool]:
    """Which configurations no other one beats. Oracles beat nobody, nor does a model that failed, nor what guesses."""
    sign = 1 if higher else -1
    nobody = [one.oracle or one.model in failed or (higher and one.guesses(tasks)) for one in chosen]
    costs = [float("nan") if out else one.cost(phase, tasks) for one, out in zip(chosen, nobody, strict=True)]
    return front(costs, [sign * one.score(tasks) for one in chosen]).tolist()


def _panel(
    title: str,
    chosen: Sequence[Configuration],
    phase: str,
    tasks: Sequence[str],
    on: Sequence[bool],
    batch: float,
    note: str,
    task: str,
    marks: Mapping[str, int],
) -> Panel:
    by_name: dict[tuple[str, str], list[Configuration]] = defaultdict(list)
    for one in chosen:
        by_name[one.model, one.label].append(one)
    series = []
    best = sorted((one.cost(phase, tasks), one.score(tasks)) for one, beats in zip(chosen, on, strict=True) if beats)
    if best:
        series.append(Series(FRONT, [cost for cost, _ in best], [score for _, score in best], kind="step"))
    # Oracles first: what is drawn later lies on top.
    for (model, name), own in sorted(by_name.items(), key=lambda item: (not item[1][0].oracle, item[0])):
        own = sorted(own, key=lambda one: one.cost(phase, tasks))
        series.append(
            Series(
                f"{label(name)}, {label(model)}",
                [one.cost(phase, tasks) for one in own],
                [one.score(tasks) for one in own],
                kind="line",
                colour=label(name),
                mark=marks[model],
                hover=[_hover(one, phase, tasks) for one in own],
            )
        )
    return Panel(
        title,
        tuple(series),
        f"{_AXES[phase]}{f', batch {batch:g}' if batch != 1 else ''}",
        "score",
        log_x=True,
        note=note,
        facets=(("task", task), ("phase", phase)),
    )


def _hover(one: Configuration, phase: str, tasks: Sequence[str]) -> str:
    sparsity = "" if one.dense else f" at {one.measured(tasks):.3f}"
    return f"{label(one.model)}, {label(one.label)}{sparsity}: {one.cost(phase, tasks):.3g}, {one.score(tasks):.3f}"


# -- sentences


def _front_sentence(
    group: Group, phase: str, chosen: Sequence[Configuration], on: Sequence[bool], tasks: Sequence[str]
) -> str:
    found = sorted((one.cost(phase, tasks), place) for place, one in enumerate(chosen) if on[place])
    names: dict[str, list[str]] = defaultdict(list)
    for _, place in found:
        one = chosen[place]
        names[f"{label(one.model)} {label(one.label)}"] += [] if one.dense else [f"{one.measured(tasks):.2f}"]
    told = [f"{name} at {', '.join(sorted(at))}" if at else name for name, at in names.items()]
    more = f"; and {len(told) - _NAMED} more models or methods" if len(told) > _NAMED else ""
    sparse = sum(not chosen[place].dense for _, place in found)
    return (
        f"{_where(group)}, {phase}: of {len(chosen)} configurations {len(found)} are on the Pareto front of cost and "
        f"score (mean over {', '.join(map(label, tasks))}), {sparse} of them sparse: {'; '.join(told[:_NAMED])}{more}."
    )


def _notes(
    asked: Mapping[str, Collection[str]],
    models: Collection[str],
    kept: Collection[str],
    why: Mapping[tuple[str, str], str],
) -> list[str]:
    """Which tasks are not in the mean, then which models are not, each with its reason."""
    out: list[tuple[str, str]] = []
    for task in sorted({task for own in asked.values() for task in own} - set(kept)):
        having = [model for model in asked if task in asked[model]]
        failing = [model for model in having if (task, model) in why]
        alike = failing == having and len({why[task, model] for model in failing}) == 1
        # A task leaves for those that stay, unless none of them was asked it.
        for model in [model for model in failing if model in models] or failing:
            out.append((label(task) if alike else f"{label(task)} of {label(model)}", why[task, model]))
        if not failing:
            out.append((label(task), "no model of the mean was asked it"))
    left = [
        (f"{label(model)} for {label(task)}", why[task, model])
        for model in asked if model not in models
        for task in sorted(kept) if (task, model) in why
    ]  # fmt: skip
    named = ("Tasks that are not in the mean", out), ("Models that are neither in the mean nor on its front", left)
    return [f"{what}: {because(found)}." for what, found in named if found]


def _heads(why: Mapping[Any, str]) -> dict[Any, str]:
    """Reasons without their figures, for notes: in a picture there is room for few words."""
    return {what: reason.partition(": ")[0] for what, reason in why.items()}


def _fitting(whole: str, short: str) -> str:
    return whole if len(whole) <= _NOTE else short


def _refused(failed: Mapping[str, str], models: int) -> str:
    """Which of so many models are not on the front of a task, and why."""
    if len(failed) == models and len(set(failed.values())) == 1:
        return f"No front: {next(iter(failed.values()))}."
    found = [(label(model), reason) for model, reason in failed.items()]
    return f"Not on the front: {because(found)}." if found else ""


def _lacking(lacking: Sequence[str], out: int) -> list[str]:
    notes = []
    if lacking:
        notes.append(f"Not all configurations have {', '.join(map(label, lacking))}: not in the mean.")
    if out:
        notes.append(f"{out} configurations lack tasks of the mean and are not in it.")
    return notes


def _equal_sentences(group: Group, found: Sequence[Comparison], batch: float) -> list[str]:
    """A sentence for each pair of models."""
    by_pair: dict[tuple[str, str, str], list[Comparison]] = defaultdict(list)
    for one in found:
        by_pair[one.phase, one.small, one.large].append(one)
    sentences = []
    for (phase, small, large), own in by_pair.items():
        at = f"{_where(group)}, {phase}{f' at batch {batch:g}' if phase == 'decode' else ''}"
        parts = [_of_kind(kind, [one for one in own if one.kind == kind]) for kind in _KINDS]
        told = "; ".join(part for part in parts if part)
        sentences.append(f"{at}: against {label(small)} with dense attention {label(large)} {told}.")
    return sentences


def _of_kind(kind: str, own: Sequence[Comparison]) -> str:
    """What is said of methods of a larger model of which the same can be said."""
    if not own:
        return ""
    methods = ", ".join(label(one.method) for one in own)
    if kind == "never":
        return (
            f"never costs as little with {methods}, whatever the sparsity: what attention does not take is more already"
        )
    if kind == "cheaper":
        return "costs no more even with dense attention"
    if kind == "dearer":
        return f"costs more in every run with {methods}"
    if kind == "beyond":
        least = ", ".join(f"{label(one.method)} from {one.sparsity:.3f} on" for one in own)
        return f"costs as little only at sparsities that were not run ({least}), and nothing is said of scores there"
    parts = []
    for better, told in (
        (1, "scores better there with"), (-1, "scores worse there with"), (0, "cannot be told apart there with"),
        (None, "has scores there that cannot be compared (too few documents) with"),
    ):  # fmt: skip
        chosen = [one for one in own if _sign(one) == better]
        if chosen:
            parts.append(f"{told} {', '.join(map(_difference, chosen))}")
    where = ", ".join(f"{one.sparsity:.3f} ({label(one.method)})" for one in own)
    return f"costs the same at a sparsity of {where}; it {'; '.join(parts)}"


def _sign(one: Comparison) -> int | None:
    if one.error is None:
        return None
    return 0 if one.better is None else 1 if one.better == one.large else -1


def _difference(one: Comparison) -> str:
    return label(one.method) + (f" ({one.difference:+.3f} ± {one.error:.3f})" if one.error is not None else "")


def _unknown(reasons: dict[str, set[str]]) -> list[str]:
    """Why costs are not known."""
    told = []
    for reason, models in sorted(reasons.items())[:_NAMED]:
        names = ", ".join(label(model) for model in sorted(models)[:_NAMED])
        told.append(f"Costs that are not known, of runs of {names}: {label(reason, 300)}.")
    if more := len(reasons) - _NAMED:
        told += [f"Costs of other runs are not known for {more} more reasons."] if more > 0 else []
    return told


def _equal_row(group: Group, one: Comparison) -> tuple[Any, ...]:
    better = one.better or ("not told apart" if one.error is not None else None)
    return (
        group.length, one.phase, label(one.small), label(one.large), label(one.method), _KINDS[one.kind], one.sparsity,
        one.small_score, one.large_score, one.difference, one.error, label(better) if better else None,
        ", ".join(map(label, one.tasks)),
    )  # fmt: skip


# -- words


def _where(group: Group) -> str:
    kind = {"forced_frontier": "teacher-forced", "frontier": "generated"}.get(group.kind, label(group.kind, 60))
    length = f"{group.length:,} tokens" if group.length else "tasks without a length"
    return f"{length}{f', {kind}' if kind else ''}"


def _caption(phase: str, batch: float, pairs: Pairs) -> str:
    told = "Methods of the prefill" if phase == "prefill" else "Methods of decoding and eviction"
    return (
        f"{told}, and dense attention. A point is a model with a method at a sparsity; points of one model and method "
        "are joined. A colour is a method, a mark a model; dense attention is one point of each model. "
        f"{FRONT}: no other configuration costs no more and scores no less; points on it may differ by less than their "
        "standard errors. Not on it: oracles, models of which it cannot be said that their dense attention does "
        f"the task, and runs that score no more than {GUESSED:g} above chance. {_caption_of_costs(batch, pairs)}"
    )


def _caption_of_costs(batch: float, pairs: Pairs) -> str:
    half = "all pairs of a prompt, as in The Sparse Frontier" if pairs == "square" else "pairs of the causal triangle"
    return (
        f"Costs are of a batch of {batch:g}: of the prefill its operations, with attention over {half}; of decoding "
        "the elements of weights, keys and values that a step reads. What selecting was measured to take is in them."
    )


def _stem(used: set[str], *parts: Any) -> str:
    """A name of a file that is not taken."""
    wanted = "_".join(str(part) for part in parts if part not in (None, ""))
    name = re.sub(r"[^a-z0-9_]+", "_", wanted.lower())[:60].strip("_")
    if name in used or not name:
        name = f"{name}_{zlib.crc32(wanted.encode('utf-8', 'surrogatepass')):08x}_{len(used)}"
    used.add(name)
    return name


__all__ = ["section"]
