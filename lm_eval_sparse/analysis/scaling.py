"""The scaling law of a study: one fit for each method and one for all methods of a phase, and what each may say.

The law and its tests are in `law`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from ..labels import label
from .bands import LEVEL
from .figure import Figure, Panel, Section, Series, Table
from .ladder import Floor, Names, because, figure, floor_of, listed, with_band
from .law import AXES, CLUSTERS, HeldOut, Law, Runs, fit, hold_out
from .study import Chain, Study

#: How sentences call several values of an axis; those of compression are dense attention's and one a sparsity.
_PLURAL = {"alpha": "sizes", "beta": "lengths", "gamma": "compressions"}
#: What methods of a phase are called when they stand together.
_ALL = "all methods"


def gather(study: Study, floor: Floor) -> tuple[dict[tuple[str, str], Runs], list[tuple[str, str]]]:
    """Runs by phases and method, with dense attention among them, and what is left out: task and reason.

    Several methods of a phase also stand together as `all methods`, oracles apart.
    """
    rows: dict[tuple[str, str], list[tuple[Any, ...]]] = defaultdict(list)
    out: list[tuple[str, str]] = []
    several = Counter((cell.model, cell.task) for cell in study.primary)
    twins = len({cell.family.removesuffix(cell.short) for cell in study.primary}) > 1
    for cell in study.primary:
        at = f", {cell.length:,} tokens" if cell.length else ""
        name = f"{label(cell.short)} ({label(cell.model, 60)}{at})"
        if several[cell.model, cell.task] > 1:
            out.append((name, f"runs of it differ ({label(cell.mark)})"))
            continue
        if cell.parameters is None or cell.length is None:
            out.append((name, f"{'parameters' if cell.parameters is None else 'length'} not known"))
            continue
        if (why := floor(cell)) or cell.dense is None:
            out.append((name, why or "no dense run"))
            continue
        if not cell.chains:
            out.append((name, "no sparse run"))
            continue
        where = cell.parameters, cell.length
        names = cell.family if twins else cell.short, f"{cell.model}\n{cell.task}"
        for key in {(chain.phases, name) for chain in cell.chains for name in _keys(chain)}:
            rows[key].append((cell.dense.record.score, cell.dense.record.n, *where, 1.0, 0.0, *names))
        for chain in cell.chains:
            for point in chain.points:
                record = point.record
                step = record.requested if record.requested is not None else round(record.measured, 2)
                if record.measured < 1:
                    row = record.score, record.n, *where, 1 / (1 - record.measured), step, *names
                    for key in _keys(chain):
                        rows[chain.phases, key].append(row)
    methods: dict[str, set[str]] = defaultdict(set)
    for cell in study.primary:
        for chain in cell.chains:
            if not chain.oracle:
                methods[chain.phases].add(chain.label)
    found = {}
    for (phases, name), lines in sorted(rows.items()):
        if name != _ALL or len(methods[phases]) > 1:
            columns = list(zip(*lines, strict=True))
            numbers = (np.array(column, float) for column in columns[:6])
            found[phases, name] = Runs(*numbers, *(np.array(column, object) for column in columns[6:]))
    return found, out


def _keys(chain: Chain) -> tuple[str, ...]:
    return (chain.label,) if chain.oracle else (chain.label, _ALL)


def section(study: Study, options: Any = None, floor: Floor | None = None) -> Section:
    """Laws of a study, one for each method and one for all methods of a phase. Arguments as of `curves.section`; `clip`
    of the options is that of `logit`."""
    floor = floor or floor_of(getattr(options, "margin", 0.05))
    clip = getattr(options, "clip", None)
    gathered, out = gather(study, floor)
    names = Names()
    coefficients: list[tuple[Any, ...]] = []
    tested: list[tuple[Any, ...]] = []
    figures, sentences = [], []
    refused: dict[str, list[str]] = defaultdict(list)
    for (phases, method), runs in gathered.items():
        head = phases, method
        law = fit(runs, clip)
        if isinstance(law, str):
            refused[law].append(f"{method} ({phases})")
            continue
        coefficients += _coefficients(head, "nothing", law, len(runs))
        sentences += _sentences(head, law, runs)
        panels = []
        for axis in AXES:
            found = hold_out(runs, axis, clip)
            at = _value(axis, found.value)
            if found.law is None:
                tested.append((*head, AXES[axis][1], at, None, None, None, None, None, found.why))
                continue
            coefficients += _coefficients(head, f"{AXES[axis][1]} {at}", found.law, len(runs) - len(found.measured))
            tested += [
                (
                    *head,
                    AXES[axis][1],
                    at,
                    label(task),
                    n,
                    rank,
                    p,
                    error,
                    "" if rank is not None else "too few or alike",
                )
                for task, (n, rank, p, error) in found.tasks.items()
            ]
            panels.append(_panel(axis, at, found))
            error = float(np.abs(found.measured - found.predicted).mean())
            sentences.append(
                f"{phases}, {method}: fitted without {AXES[axis][1]} {at}, the law misses the {len(found.measured)} "
                f"scores there by {figure(error)} on average."
            )
        if panels:
            figures.append(
                Figure(
                    names("scaling", phases, method),
                    f"Scores that the law predicts, and scores measured: {method} ({phases})",
                    "Each panel holds out the largest value of one axis. A dot is a run that was not fitted; those "
                    "on the broken line were predicted.",
                    tuple(panels),
                )
            )
    for why, methods in refused.items():
        sentences.append(f"No scaling law of {listed(methods)}: {why}.")
    if not gathered:
        why = because(out)
        sentences.append(f"No scaling law is fitted, for want of runs{f': {why}' if why else ''}.")
    left = f" Left out: {because(out, 20)}." if out else ""
    tables = []
    if coefficients:
        header = ("phases", "method", "held out", "coefficient", "value", "standard error", "low", "high")
        tables.append(
            Table(
                names("scaling_coefficients"),
                "Coefficients of the scaling law",
                (*header, "R² of logits", "runs", "clusters", "clipped", "note"),
                tuple(coefficients),
                "logit(score) = eps + delta_task + alpha ln N + beta ln L + gamma ln C, C = 1 / (1 - measured "
                "sparsity), of tasks that dense attention can do. Errors are clustered by model, task and length; "
                f"bands cover {LEVEL:.0%}; there are none below {CLUSTERS} clusters, or where coefficients are more. "
                f"Clipped: scores that were moved off 0 or 1.{left}",
            )
        )
    if tested:
        header = (
            "phases",
            "method",
            "held out",
            "value",
            "task",
            "runs",
            "Spearman",
            "p",
            "mean absolute error",
            "note",
        )
        tables.append(
            Table(
                names("scaling_held_out"),
                "The law on what it was not fitted to",
                header,
                tuple(tested),
                "Errors are in score, from 0 to 1.",
            )
        )
    return Section("scaling", "Scaling law", tuple(sentences), tuple(figures), tuple(tables))


def _value(axis: str, value: float) -> str:
    if not np.isfinite(value):
        return "?"
    if axis == "gamma":
        return f"at sparsity {value:g}"
    return f"{value:,.0f}" if axis == "beta" else f"{value:.3g}"


def _coefficients(head: tuple[str, str], held: str, law: Law, runs: int) -> list[tuple[Any, ...]]:
    after = law.r2, runs, law.clusters, law.clipped
    rows = [
        (*head, held, label(name), law.value[at], law.stderr[at], law.low[at], law.high[at], *after, "")
        for at, name in enumerate(law.names)
    ]
    for name in law.fixed:
        rows.append((*head, held, name, None, None, None, None, *after, f"one {AXES[name][1]} only; part of eps"))
    rows.append((*head, held, label(f"delta {law.reference}"), 0.0, None, None, None, *after, "reference"))
    return rows


def _panel(axis: str, at: str, found: HeldOut) -> Panel:
    series = [Series("predicted = measured", (0.0, 1.0), (0.0, 1.0), kind="dashed", colour="dense")]
    for task in sorted(set(found.task)):
        chosen = found.task == task
        series.append(Series(label(task, 60), found.predicted[chosen], found.measured[chosen], kind="dots"))
    return Panel(f"held out: {AXES[axis][1]} {at}", tuple(series), "predicted score", "measured score")


def _sentences(head: tuple[str, str], law: Law, runs: Runs) -> list[str]:
    """What the fit to all runs says of each axis, on how many values of it, and what it cannot say."""
    phases, method = head
    many = {axis: len(np.unique(runs.step if axis == "gamma" else getattr(runs, AXES[axis][0]))) for axis in AXES}
    said = []
    for axis, words in AXES.items():
        name = words[1]
        if axis in law.fixed:
            (value,) = np.unique(getattr(runs, words[0]))
            said.append(
                f"{phases}, {method}: one {name} only ({_value(axis, value)}); its effect is part of eps and not known."
            )
            continue
        at = law.names.index(axis)
        shown = with_band(law.value[at], law.low[at], law.high[at])
        rests = f"{many[axis]} {_PLURAL[axis]}"
        if np.isnan(law.low[at]):
            verdict = "without a band"
            rests += f", {law.clusters} cells"
        elif law.low[at] > 0:
            verdict = f"scores rise with {name}"
        elif law.high[at] < 0:
            verdict = f"scores fall with {name}"
        else:
            verdict = f"no effect of {name} is shown"
        said.append(f"{phases}, {method}: {axis} = {shown}: {verdict} ({rests}).")
    if law.clipped > 0.1 * len(runs):
        said.append(
            f"{phases}, {method}: {law.clipped} of {len(runs)} scores are 0 or 1 and were clipped; the coefficients "
            "hang on where."
        )
    return said
