"""What of a loss is the sparsity's and what the method's: the oracle of the phase stands between.

An oracle knows the attention weights that it leaves out: what it loses is put down to the sparsity, and what a method
loses beyond that to the method's choice. At the same measured sparsity dense - oracle is the sparsity's part and
oracle - method the method's; they add up to the loss. An oracle maximises attention mass, not scores: a method may do
better, and its part is negative then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..labels import label
from ..results.schema import PhaseFigures
from .bands import LEVEL, PAPER, Bands, Stratum, stratified
from .figure import Figure, Panel, Section, Series, Table
from .ladder import Floor, Ladder, Names, Suite, floor_of, listed, suites, where, with_band
from .study import Cell, Chain, Study

_MEASURED = ("output_error", "mass_kept", "oracle_overlap", "auxiliary_bits", "kv_memory_fraction")


#: A method and its oracle, each with a ladder for every task.
Pair = tuple[Sequence[Ladder], Sequence[Ladder]]


def parts(pairs: Sequence[Pair], wanted: Sequence[float]) -> list[tuple[Bands, Bands]]:
    """The sparsity's and the method's part of the loss at sparsities, of the mean over tasks.

    Args:
        pairs: ladders of the same tasks in the same order, with scores by document.
        wanted: (W,).

    Returns:
        For each pair two of (W,), with bands that are paired over documents; nan where either was not measured.
    """
    if not pairs:
        return []
    strata = []
    for task in range(len(pairs[0][0])):
        rows, limits = [], []
        for methods, oracles in pairs:
            one, oracle = methods[task], oracles[task]
            # A document counts in both parts or in none, so that they add up to the loss.
            own, best = one.losses(wanted), oracle.losses(wanted)
            missing = np.where(np.isnan(own + best), np.nan, 0.0)
            rows += [best + missing, own - best + missing]
            limits += [oracle.spread(wanted), _wider(oracle.spread(wanted), one.spread(wanted))]
        bounded = all(limits)
        bounds = tuple(map(np.concatenate, zip(*limits, strict=True))) if bounded else None
        strata.append(Stratum(np.concatenate(rows), pairs[0][0][task].key, bounds))
    found = stratified(strata)
    size = len(wanted)
    return [(found.part(2 * at * size, size), found.part((2 * at + 1) * size, size)) for at in range(len(pairs))]


def _wider(one: Any, two: Any) -> Any:
    """The wider of two spreads."""
    return None if one is None else (np.minimum(one[0], two[0]), np.maximum(one[1], two[1]))


def section(study: Study, options: Any = None, floor: Floor | None = None) -> Section:
    """The two parts of losses, and what was measured of attention itself. Arguments as of `curves.section`."""
    floor = floor or floor_of(getattr(options, "margin", 0.05))
    names = Names()
    rows: list[tuple[Any, ...]] = []
    figures, sentences = [], []
    without: dict[str, set[str]] = defaultdict(set)
    marks: dict[str, int] = {}
    groups = suites(study, floor)
    for group in groups:
        sets = [(cell.short, (cell,)) for cell in group.cells]
        if len(group.cells) > 1:
            sets.insert(0, (f"mean of {len(group.cells)}", group.cells))
        panels: list[Panel] = []
        for place, (name, cells) in enumerate(sets):
            shown = place == 0
            for method, oracle, found in _pairs(group, cells, without):
                here = np.flatnonzero(np.isfinite(found[0].value))
                head = label(group.model), group.length, label(name), method[0].chain.label, oracle[0].chain.label
                rows += [
                    (
                        *head,
                        PAPER[1:][at],
                        found[0].value[at] + found[1].value[at],
                        *(figure for part in found for figure in (part.value[at], part.low[at], part.high[at])),
                    )
                    for at in here
                ]
                if shown and len(here):
                    mark = marks.setdefault(oracle[0].chain.label, len(marks))
                    panels.append(_panel(method[0], oracle[0], found, here, mark))
                    sentences.append(_sentence(group, name, method[0], oracle[0], found, here[-1]))
        if panels:
            figures.append(
                Figure(
                    names("split", group.model, group.length, group.kind),
                    f"Loss of the sparsity and of the method: {where(group.model, group.length, group.kind)}",
                    "Dense minus oracle, and oracle minus method, at the same measured sparsity, of the mean over "
                    f"tasks that dense attention can do. Bands cover {LEVEL:.0%}, paired over documents.",
                    tuple(panels),
                )
            )
    for why, methods in sorted(without.items()):
        sentences.append(f"{why[0].upper()}{why[1:]}: the loss of {listed(sorted(methods))} is not split.")
    tables = []
    if rows:
        header = ("model", "length", "tasks", "method", "oracle", "sparsity", "loss")
        limits = ("sparsity's part", "low", "high", "method's part", "low", "high")
        tables.append(
            Table(
                names("loss_split"),
                "Loss of the sparsity and of the method",
                (*header, *limits),
                tuple(rows),
                f"Dense minus sparse = (dense minus oracle) + (oracle minus method). Bands of {LEVEL:.0%}.",
            )
        )
    if measured := _attention(groups):
        tables.append(measured)
    return Section(
        "split", "The method's error apart from the sparsity's", tuple(sentences), tuple(figures), tuple(tables)
    )


def _pairs(
    group: Suite, cells: Sequence[Cell], without: dict[str, set[str]]
) -> list[tuple[list[Ladder], list[Ladder], tuple[Bands, Bands]]]:
    """Each method with each oracle of its phases over some tasks. What has none is noted in `without`."""
    everything = group.shared(cells)
    oracles = [found for found in everything.values() if pure(found[0].chain)]
    pairs: list[tuple[list[Ladder], list[Ladder]]] = []
    for name, found in everything.items():
        phases = found[0].chain.phases
        if pure(found[0].chain):
            continue
        if found[0].chain.oracle:
            without["an oracle fills a part of its phases"].add(name)
            continue
        fitting = [one for one in oracles if one[0].chain.phases == phases]
        if not fitting:
            without[f"no oracle of the phase {phases} was measured on the same tasks"].add(name)
        pairs += [(found, oracle) for oracle in fitting]
    measured = []
    for pair, split in zip(pairs, parts(pairs, PAPER[1:]), strict=True):
        chain = pair[0][0].chain
        if np.isfinite(split[0].value).any():
            measured.append((*pair, split))
        else:
            without[f"no oracle of the phase {chain.phases} was measured at the same sparsities"].add(chain.label)
    return measured


def pure(chain: Chain) -> bool:
    """Whether an oracle fills each phase of a chain: what is an oracle in one phase only loses what the other loses."""
    return chain.oracle and all(part.rpartition(":")[2].startswith("oracle") for part in chain.method.split("+"))


def _panel(method: Ladder, oracle: Ladder, found: tuple[Bands, Bands], here: np.ndarray, mark: int) -> Panel:
    series = []
    x = [PAPER[1:][at] for at in here]
    # Oracles are grey and broken all: marks tell them apart.
    named = (f"sparsity ({oracle.chain.label})", "dashed", mark), (f"method ({method.chain.label})", "line", None)
    for (name, kind, own_mark), part, own in zip(named, found, (oracle, method), strict=True):
        limits = {} if np.isnan(part.low[here]).all() else {"low": part.low[here], "high": part.high[here]}
        series.append(Series(name, x, part.value[here], kind=kind, colour=own.chain.label, mark=own_mark, **limits))
    title = f"{method.chain.label} against {oracle.chain.label}"
    return Panel(title, tuple(series), "measured sparsity", "loss of score", note="")


def _sentence(group: Suite, name: str, method: Ladder, oracle: Ladder, found: tuple[Bands, Bands], at: int) -> str:
    values = [with_band(part.value[at], part.low[at], part.high[at]) for part in found]
    sparsity, own = found
    if np.isnan(own.low[at]):
        verdict = "too few documents to say which part is real"
    elif own.low[at] > 0:
        verdict = f"{method.chain.label} loses more than the oracle does"
    elif own.high[at] < 0:
        verdict = f"{method.chain.label} does better than the oracle of attention mass"
    else:
        verdict = f"no loss of {method.chain.label} beyond the oracle's is shown"
    over = label(name) if not name.startswith("mean of") else f"the {name} tasks"
    return (
        f"{where(group.model, group.length, group.kind)}, {over}, {method.chain.label} at sparsity {PAPER[1:][at]:g}: "
        f"{values[0]} is lost by the oracle ({oracle.chain.label}), {values[1]} beyond it: {verdict}."
    )


# -- attention itself


def _attention(groups: Sequence[Suite]) -> Table | None:
    """What was measured of attention where a run looked (`diagnose=N`), averaged over tasks."""
    found: dict[tuple[Any, ...], list[tuple[float, PhaseFigures]]] = defaultdict(list)
    for group in groups:
        for cell in group.members:
            for chain in cell.chains:
                for point in chain.points:
                    asked = point.requested if point.requested is not None else round(point.measured, 2)
                    for phase, figures in point.record.by_phase.items():
                        if any(getattr(figures, name) is not None for name in _MEASURED[:-1]):
                            head = label(group.model), group.length, group.kind, chain.label, phase, asked
                            found[head].append((point.measured, figures))
    rows = []
    for head, several in found.items():
        values = [
            _average([getattr(figures, name) for _, figures in several]) for name in (*_MEASURED, "bytes_read_fraction")
        ]
        rows.append((*head, float(np.mean([measured for measured, _ in several])), *values, len(several)))
    if not rows:
        return None
    header = ("model", "length", "kind", "method", "phase", "requested", "measured", "output error", "mass kept")
    more = ("oracle overlap", "auxiliary bits per token", "KV memory", "bytes read", "tasks")
    return Table(
        "attention_loss",
        "Output error and memory of attention itself",
        (*header, *more),
        tuple(rows),
        "Means over tasks, layers and heads of what docs/accounting.md defines, of runs with diagnose=N; KV memory "
        "and bytes read against dense attention.",
    )


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
