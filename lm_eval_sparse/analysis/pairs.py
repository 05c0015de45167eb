"""The section of a report on pairs of runs: documents that flip, ties called ties, the task that loses most.

Methods are compared at one measured sparsity, in one phase, on one task; sparse runs with the dense one of their task.
Nothing is said in words where dense cannot do a task.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from . import compare, guarantee
from .certify import Options, asked, key, task_names
from .figure import Section, Table
from .ladder import spoken_of
from .study import Cell, Chain, Point, Study

#: How far measured sparsities may lie apart where they count as the same.
NEAR = 0.02
#: What was measured is said beside what was requested where it is further off than is promised.
PROMISED = 0.01
#: Sentences of each kind at most.
MOST_SENTENCES = 30


def gates(study: Study, options: Options) -> dict[int, str | None]:
    """By the id of a cell why nothing is said of it; None where dense does the task."""
    found: dict[int, str | None] = {}
    for cell in study.primary:
        if not cell.bounded:
            found[id(cell)] = f"{cell.metric} is no share in [0, 1] of which more is better"
        elif cell.dense is None:
            found[id(cell)] = "no dense baseline"
        else:
            found[id(cell)] = guarantee.beats_chance(
                cell.dense.scores, cell.chance, options.margin, cell.short, options.margin
            )
    return found


# -- ties


@dataclass(frozen=True)
class Standing:
    """How methods of one phase compare on a cell at one sparsity.

    Attributes:
        sparsity: as requested, see `levels`. `measured`: the smallest and largest of those compared.
        leader: label of the method with the highest mean score. `score`: that score.
        ahead, tied, open: labels of the others: the leader is ahead of them, ties with them, or neither is shown.
        comparisons: pairs of methods that Holm corrects for.
    """

    cell: Cell
    phases: str
    sparsity: float
    measured: tuple[float, float]
    leader: str
    score: float
    ahead: tuple[str, ...]
    tied: tuple[str, ...]
    open: tuple[str, ...]
    comparisons: int


def levels(chains: Sequence[Chain]) -> list[tuple[float, list[tuple[Chain, Point]]]]:
    """Sparsities at which at least two chains have a run, and of each chain that run: all measured within `NEAR` of
    each other, whatever was requested.

    Runs of one requested sparsity stand together as far as they were measured alike. Where another chain's run of it
    was not, the one that was measured nearest stands in for it, if it is near enough. A level is called what was
    requested, and what was measured where native knobs ruled.
    """
    runs = [(chain, point) for chain in chains for point in chain.points]
    by_request: dict[float, list[tuple[Chain, Point]]] = defaultdict(list)
    for chain, point in runs:
        if point.requested is not None:
            by_request[point.requested].append((chain, point))
    cores = [(value, alike) for value, same in sorted(by_request.items()) for alike in _alike(same)]
    ruled = [run for run in runs if run[1].requested is None]
    cores += [(point.measured, [(chain, point)]) for chain, point in sorted(ruled, key=lambda run: run[1].measured)]
    found = [(value, members) for value, core in cores if len(members := _joined(core, chains)) > 1]
    points = [{id(point) for _, point in members} for _, members in found]
    # What another level compares as well is not said twice.
    again = [
        any(own < other or (own == other and before < place) for before, other in enumerate(points))
        for place, own in enumerate(points)
    ]
    kept = [level for level, same in zip(found, again, strict=True) if not same]
    return sorted(kept, key=lambda level: (level[0], min(point.measured for _, point in level[1])))


def _alike(runs: Sequence[tuple[Chain, Point]]) -> list[list[tuple[Chain, Point]]]:
    """Runs of one requested sparsity, those together that were measured within `NEAR` of the first."""
    found: list[list[tuple[Chain, Point]]] = []
    for run in sorted(runs, key=lambda run: run[1].measured):
        taken = {id(chain) for chain, _ in found[-1]} if found else set()
        if found and id(run[0]) not in taken and _spread([*found[-1], run]) <= NEAR:
            found[-1].append(run)
        else:
            found.append([run])
    return found


def _joined(core: Sequence[tuple[Chain, Point]], chains: Sequence[Chain]) -> list[tuple[Chain, Point]]:
    """A level's runs, with those of other chains that were measured nearest to their middle and near to all of them; in
    the order of the chains."""
    members = list(core)
    middle = (min(point.measured for _, point in core) + max(point.measured for _, point in core)) / 2
    others = [chain for chain in chains if not any(chain is own for own, _ in core)]
    nearest = [(chain, min(chain.points, key=lambda point: abs(point.measured - middle))) for chain in others]
    for run in sorted(nearest, key=lambda run: abs(run[1].measured - middle)):
        if _spread([*members, run]) <= NEAR:
            members.append(run)
    order = {id(chain): place for place, chain in enumerate(chains)}
    return sorted(members, key=lambda run: order[id(run[0])])


def _spread(runs: Sequence[tuple[Chain, Point]]) -> float:
    """How far apart runs were measured; float64 rounds .92 - .9 up."""
    measured = [point.measured for _, point in runs]
    return round(max(measured) - min(measured), 9)


def standings(cell: Cell, options: Options) -> list[Standing]:
    """All comparisons on a cell. Oracles are left out: they know what no method can know."""
    by_phase: dict[str, list[Chain]] = defaultdict(list)
    for chain in (spoken_of(cell, chain) for chain in cell.chains):
        scored = tuple(point for point in chain.points if point.scores is not None)
        if scored and not chain.oracle:
            by_phase[chain.phases].append(Chain(chain.method, chain.phases, chain.label, False, scored))
    jobs = [(phases, value, members) for phases, chains in by_phase.items() for value, members in levels(chains)]
    if not jobs:
        return []
    pairs = [list(combinations(range(len(members)), 2)) for *_, members in jobs]
    sides = [
        np.stack(
            [members[pair[side]][1].scores for (*_, members), some in zip(jobs, pairs, strict=True) for pair in some]
        )
        for side in (0, 1)
    ]
    result = compare.compare(*sides, max(options.margin, 1e-9))
    found, start = [], 0
    for (phases, value, members), some in zip(jobs, pairs, strict=True):
        part = slice(start, start := start + len(some))
        differ, tie = guarantee.holm(result.p_differ[part]), guarantee.holm(result.p_tie[part])
        scores = [float(np.nanmean(point.scores)) for _, point in members]
        best = int(np.argmax(scores))
        kinds: dict[str, list[str]] = {"ahead": [], "tied": [], "open": []}
        for at, (one, other) in enumerate(some):
            if best in (one, other):
                sign = 1 if one == best else -1
                ahead = differ[at] <= options.level and sign * result.difference[part][at] > 0
                # A difference can be real and within the margin: that is a tie, and of no use to anyone as a lead.
                kind = "tied" if tie[at] <= options.level else "ahead" if ahead else "open"
                kinds[kind].append(members[other if one == best else one][0].label)
        measured = [point.measured for _, point in members]
        found.append(
            Standing(
                cell, phases, value, (min(measured), max(measured)), members[best][0].label, scores[best],
                tuple(kinds["ahead"]), tuple(kinds["tied"]), tuple(kinds["open"]), len(some),
            )
        )  # fmt: skip
    return found


# -- the section


def section(study: Study, options: Options | None = None) -> Section:
    """Tables of flips, of ties and of the task that loses most, and sentences where dense does the task."""
    options = options or Options()
    gate, names = gates(study, options), task_names(study.primary)
    flip_rows, flip_said = _flips(study, gate, names, options)
    ranked = [one for cell in study.primary if gate[id(cell)] is None for one in standings(cell, options)]
    worst = _worst(study, gate, names)
    tables = []
    if flip_rows:
        tables.append(_flip_table(flip_rows))
    if ranked:
        tables.append(_standing_table(ranked, names, options))
    if worst:
        tables.append(_worst_table(worst))
    return Section("pairs", "Run against run", (*flip_said, *_standing_said(ranked, names, options)), (), tuple(tables))


def _place(cell: Cell) -> str:
    length = f", {cell.length:,} tokens" if cell.length else ""
    return f"{cell.model}{length}{f', {cell.mark}' if cell.mark else ''}"


def _flips(
    study: Study, gate: dict[int, str | None], names: dict[str, str], options: Options
) -> tuple[list[tuple[Any, ...]], list[str]]:
    rows, said = [], []
    for cell in study.primary:
        runs = [(chain, point) for chain in cell.chains for point in chain.points if point.scores is not None]
        if cell.dense is None or cell.dense.scores is None or not runs or not cell.bounded:
            continue
        sparse = np.stack([point.scores for _, point in runs])
        found = compare.flips(cell.dense.scores, sparse)
        adjusted = guarantee.holm(found.p)
        kind = "graded" if compare.graded(cell.dense.scores) or compare.graded(sparse) else "0 or 1"
        worse = []
        for at, (chain, point) in enumerate(runs):
            lost, gained = int(found.lost[at]), int(found.gained[at])
            rows.append(
                (cell.model, names[cell.family], cell.length, cell.mark, chain.label, asked(point), point.measured,
                 int(found.n[at]), lost, gained, float(found.p[at]), float(adjusted[at]), kind, gate[id(cell)] or "")
            )  # fmt: skip
            if adjusted[at] <= options.level and lost > gained and point in spoken_of(cell, chain).points:
                worse.append(f"{chain.label} at {asked(point):.3g} (-{lost}, +{gained} of {int(found.n[at])})")
        if worse and gate[id(cell)] is None:
            more = f" and {len(worse) - 4} more" if len(worse) > 4 else ""
            many = len(runs) > 1
            lose, gain = f"{len(worse)} of {len(runs)} runs lose", "they gain"
            if not many:
                lose, gain = "the only run loses", "it gains"
            said.append(
                f"{names[cell.family]} ({_place(cell)}): {lose} more documents than {gain} "
                f"(McNemar{f', Holm over {len(runs)} runs' if many else ''}, level {options.level:g}): "
                f"{', '.join(worse[:4])}{more}."
            )
    return rows, _first(said)


def _first(said: list[str]) -> list[str]:
    if len(said) > MOST_SENTENCES:
        said[MOST_SENTENCES:] = [f"{len(said) - MOST_SENTENCES} more such sentences stand as rows in the tables."]
    return said


def _flip_table(rows: list[tuple[Any, ...]]) -> Table:
    header = (
        "model", "task", "length", "setting", "method", "sparsity", "measured", "documents", "lost", "gained", "p",
        "p (Holm)", "scores", "why nothing is said",
    )  # fmt: skip
    caption = (
        "Documents with a lower (lost) and a higher score (gained) than with dense attention. p: exact McNemar test "
        "of as many lost as gained; where scores are graded it is the sign test of documents that fell and rose, by "
        "however much. Holm: over all runs of the task, model and length."
    )
    return Table("flips", "Documents that flip", header, tuple(rows), caption)


def _standing_table(ranked: Sequence[Standing], names: dict[str, str], options: Options) -> Table:
    header = (
        "model", "task", "length", "setting", "phase", "sparsity", "measured from", "to", "highest", "score",
        "ahead of", "ties with", "not told apart from", "comparisons",
    )  # fmt: skip
    rows = tuple(
        (one.cell.model, names[one.cell.family], one.cell.length, one.cell.mark, one.phases, one.sparsity,
         *one.measured, one.leader, one.score, ", ".join(one.ahead), ", ".join(one.tied), ", ".join(one.open),
         one.comparisons)
        for one in ranked
    )  # fmt: skip
    caption = (
        f"Methods of one phase whose sparsities were measured within {NEAR:g} of each other, document by document. "
        "Sparsity: what was requested, or measured where native knobs ruled; a method whose run of it was measured "
        "elsewhere stands here with its run that was measured nearest, or not at all. "
        f"Tie: two one-sided paired t-tests show that means differ by less than {options.margin:g}; ahead: "
        "a paired t-test shows a difference that is no tie (both with one more document against them); else they are "
        "not told apart. Holm over all pairs of methods "
        f"of a row, for ties and for differences each, level {options.level:g}. t-tests are approximations; "
        "from fewer documents than could show it without any difference no tie is concluded. Oracles are left "
        "out, and tasks of which it cannot be said that dense does them (the table of flips has the reasons)."
    )
    return Table("standings", "Ahead, tied, not told apart", header, rows, caption)


def _standing_said(ranked: Sequence[Standing], names: dict[str, str], options: Options) -> list[str]:
    cells: dict[tuple[int, str], list[Standing]] = defaultdict(list)
    for one in ranked:
        cells[id(one.cell), one.phases].append(one)
    said = []
    for (_, phases), several in cells.items():
        parts = []
        for one in several:
            at = f"at {one.sparsity:.3g}"
            low, high = one.measured
            if round(max(abs(low - one.sparsity), abs(high - one.sparsity)), 9) > PROMISED:
                at += f" (measured {low:.3f} to {high:.3f})"
            if one.ahead and not one.tied and not one.open:
                parts.append(f"{at} {one.leader} is ahead of {_and(one.ahead)}")
            elif one.tied and not one.open:
                behind = f", ahead of {_and(one.ahead)}" if one.ahead else ""
                parts.append(f"{at} {_and((one.leader, *one.tied))} tie{behind}")
        if parts:
            cell = several[0].cell
            said.append(
                f"{names[cell.family]} ({_place(cell)}), {phases}: {'; '.join(parts)} (margin {options.margin:g}, "
                f"level {options.level:g})."
            )
    return _first(said)


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# -- the worst task


def _worst(study: Study, gate: dict[int, str | None], names: dict[str, str]) -> list[tuple[Any, ...]]:
    """Of each run on several tasks the one that falls most."""
    runs: dict[tuple[Any, ...], list[tuple[float, float, int, str, Point]]] = defaultdict(list)
    for cell in study.primary:
        if gate[id(cell)] is not None or cell.dense is None:
            continue
        for chain in (spoken_of(cell, chain) for chain in cell.chains):
            points = [point for point in chain.points if point.scores is not None]
            if not points:
                continue
            fall = cell.dense.scores - np.stack([point.scores for point in points])
            n = np.sum(~np.isnan(fall), axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                mean = np.nansum(fall, axis=1) / n
                error = np.sqrt(np.nansum((fall - mean[:, None]) ** 2, axis=1) / (n - 1) / n)
            for at, point in enumerate(points):
                if n[at]:
                    where = cell.model, chain.label, cell.length, cell.mark, key(point)
                    runs[where].append((float(mean[at]), float(error[at]), int(n[at]), names[cell.family], point))
    rows = []
    for (model, label, length, mark, _), several in runs.items():
        if len(several) > 1:
            fall, error, n, name, point = max(several, key=lambda one: one[0])
            mean = float(np.mean([one[0] for one in several]))
            rows.append((model, label, length, mark, asked(point), name, fall, error, n, mean, len(several)))
    return sorted(rows, key=lambda row: (row[0], row[1], row[2] or 0, row[3], row[4]))


def _worst_table(rows: list[tuple[Any, ...]]) -> Table:
    header = (
        "model", "method", "length", "setting", "sparsity", "worst task", "fall", "standard error", "documents",
        "mean fall", "tasks",
    )  # fmt: skip
    caption = (
        "Fall: mean of dense - sparse over the documents of the task that falls most, gains included; mean fall: over "
        "all tasks of the row that dense can do. The largest of several falls is larger than it would be in a new "
        "run; what a test says of the worst task stands with the certificates."
    )
    return Table("worst_task", "The task that loses most", header, tuple(rows), caption)
