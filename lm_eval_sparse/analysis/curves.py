"""Score against measured sparsity: curves with bands by task, means over tasks, and what may be said of them.

Between two runs a value is interpolated linearly over measured sparsity, as The Sparse Frontier does, with dense
attention at 0; nothing is extrapolated. Bands are those of `bands`: pointwise, over documents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..labels import label
from .bands import DRAWS, LEAST, LEVEL, PAPER, Bands, Stratum, bands, stratified
from .figure import Figure, Panel, Section, Series, Table
from .ladder import (
    SLACK,
    Floor,
    Ladder,
    Names,
    Suite,
    because,
    bounds,
    figure,
    floor_of,
    key,
    listed,
    over_tasks,
    paired,
    suites,
    thinned,
    where,
    with_band,
    without_bands,
)
from .study import Cell, Chain, Point, Study

#: What a panel says where a run has no scores by document.
NO_BANDS = "no bands, no certificate"
_X = "measured sparsity"
_CAPTION = (
    f"Bands cover {LEVEL:.0%}: bootstrap over documents, {DRAWS} draws, the same documents for all runs of a task, "
    f"each point by itself; none below {LEAST} documents. Sparsity is measured, in the phase that the method fills. "
    "Where a run has no scores by document its method has no bands: points, with whiskers of one standard error as "
    "lm-eval gave it."
)
_BETWEEN = (
    "Values are interpolated linearly between runs at the sparsities that the paper reports, dense attention at 0; "
    f"beyond the last run by at most {SLACK:g}, which a promise allows, that run stands for it."
)


def section(study: Study, options: Any = None, floor: Floor | None = None) -> Section:
    """Curves of a study.

    Args:
        options: its `margin` is what dense must exceed chance by; .05 by default.
        floor: says of a cell why dense does not beat chance; by default `guarantee.beats_chance`.
    """
    floor = floor or floor_of(getattr(options, "margin", 0.05))
    names = Names()
    floors = {id(cell): floor(cell) for cell in study.primary}
    groups = suites(study, lambda cell: floors[id(cell)])
    figures, rows, means, sentences = [], [], [], []
    for group in groups:
        cells = group.members
        at = where(group.model, group.length, group.kind)
        panels = [_panel(cell, floors[id(cell)]) for cell in cells]
        figures.append(
            Figure(
                names("curves", group.model, group.length, group.kind),
                f"Score against measured sparsity: {at}",
                _CAPTION + without_bands(panels),
                tuple(panels),
            )
        )
        for cell in cells:
            rows += _rows(cell, group.ladders[id(cell)])
        averaged, lines = _means(group)
        means += lines
        if averaged:
            figures.append(
                Figure(
                    names("means", group.model, group.length, group.kind),
                    f"Mean score over tasks: {at}",
                    f"{_BETWEEN} Documents are drawn within their task, and tasks weigh the same."
                    f"{without_bands(averaged)}{_left_out(group)}",
                    averaged,
                )
            )
        sentences += _sentences(group)
    sentences += _floors(study.primary, floors)
    header = ("model", "length", "task", "metric", "method", "sparsity", "score", "loss", "low", "high", "documents")
    tables = [
        Table(
            names("scores_at_sparsity"),
            "Scores at the paper's sparsities",
            (*header, "note"),
            tuple(rows),
            f"{_BETWEEN} Loss is dense minus sparse, with its band of {LEVEL:.0%} over the documents that both have.",
        )
    ]
    if means:
        header = ("model", "length", "tasks", "method", "sparsity", "score", "score low", "score high")
        tables.insert(
            0,
            Table(
                names("mean_scores_at_sparsity"),
                "Mean scores over tasks at the paper's sparsities",
                (*header, "loss", "loss low", "loss high"),
                tuple(means),
                f"Tasks that dense attention can do and the method was run on. Bands cover {LEVEL:.0%}.",
            ),
        )
    return Section("curves", "Score against sparsity", tuple(sentences), tuple(figures), tuple(tables))


# -- a task


def _panel(cell: Cell, floor: str | None) -> Panel:
    """Dense attention and every chain of a cell over measured sparsity."""
    points = [point for chain in cell.chains for point in chain.points]
    if cell.dense is not None:
        points = [cell.dense, *points]
    found = _point_bands(cell, points)
    series = []
    last = max((point.measured for point in points), default=0.0) or 1.0
    if cell.dense is not None:
        value, low, high = found[id(cell.dense)]
        limits = {} if np.isnan(low) else {"low": (low, low), "high": (high, high)}
        series.append(Series("dense", (0.0, last), (value, value), kind="dashed", **limits))
    # Oracles first: what is drawn later lies on top.
    for place, chain in enumerate(sorted(cell.chains, key=lambda chain: not chain.oracle)):
        # Broken grey lines all: marks tell oracles apart.
        series.append(_series(cell, chain, found, place if chain.oracle else None))
    notes = [floor] if floor else []
    if bare := _bare(cell):
        notes.append(bare)
    if points and not all(point.scores is None for point in points) and len(cell.ids) < LEAST:
        notes.append(f"{len(cell.ids)} documents: no bands below {LEAST}")
    better = "" if cell.higher_is_better else " (lower is better)"
    title = label(cell.short, 60) + (f" ({label(cell.mark, 60)})" if cell.mark else "")
    return Panel(
        title,
        thinned(series),
        _X,
        f"{label(cell.metric, 40)}{better}",
        note="; ".join(notes),
        facets=(("task", cell.short), ("model", cell.model), ("length", str(cell.length or ""))),
    )


def _point_bands(cell: Cell, points: Sequence[Point]) -> dict[int, tuple[float, float, float]]:
    """Score and limits of each point, by its id; nan where there is no band."""
    found = {id(point): (point.record.score, np.nan, np.nan) for point in points}
    kept = [point for point in points if point.scores is not None]
    if kept:
        limits = bands(np.stack([point.scores for point in kept]), key(cell), bounds(cell))
        for point, low, high in zip(kept, limits.low, limits.high, strict=True):
            found[id(point)] = point.record.score, low, high
    return found


def _bare(cell: Cell) -> str:
    """Which runs have no scores by document, and what there is none of therefore; empty where all have them."""
    whole, part = [], []
    for chain in cell.chains:
        lacking = [point for point in chain.points if point.scores is None]
        if len(lacking) == len(chain.points):
            whole.append(chain.label)
        elif lacking:
            runs = listed(map(_asked, lacking))
            part.append(f"no scores by document of {chain.label} at {runs}: no bands along {chain.label}")
    dense = cell.dense is not None and cell.dense.scores is None
    if (dense or cell.dense is None) and len(whole) == len(cell.chains):
        return NO_BANDS
    said = [f"no scores by document of {listed(whole)}: {NO_BANDS}"] if whole else []
    said += part
    # Without those of dense attention no loss is paired.
    said += ["no scores by document of the dense run: no losses, no certificate"] if dense else []
    return "; ".join(said)


def _asked(point: Point) -> str:
    return f"{point.measured:.3f} (knobs)" if point.requested is None else f"{point.requested:g}"


def _series(cell: Cell, chain: Chain, found: dict[int, tuple[float, float, float]], mark: int | None = None) -> Series:
    points = sorted(chain.points, key=lambda point: point.measured)
    by_document = all(point.scores is not None for point in points)
    if by_document:
        values = [found[id(point)] for point in points]
    else:
        errors = [point.record.stderr if point.record.stderr is not None else np.nan for point in points]
        scores = [point.record.score for point in points]
        values = [(score, score - error, score + error) for score, error in zip(scores, errors, strict=True)]
    hover = [_hover(point) for point in points]
    x = [point.measured for point in points]
    if by_document and cell.dense is not None and points and points[0].measured > 0:
        x, values, hover = [0.0, *x], [found[id(cell.dense)], *values], ["dense", *hover]
    value, low, high = map(list, zip(*values, strict=True))
    limits = {} if np.isnan(low).all() else {"low": low, "high": high}
    kind = "dots" if not by_document else ("dashed" if chain.oracle else "line")
    return Series(chain.label, x, value, kind=kind, hover=hover, mark=mark, **limits)


def _hover(point: Point) -> str:
    asked = "knobs" if point.requested is None else f"requested {point.requested:g}"
    return f"{asked}, measured {point.measured:.3f}, n={point.record.n}"


def _rows(cell: Cell, ladders: Sequence[Ladder]) -> list[tuple[Any, ...]]:
    """Lines of the table of a cell: its chains at the paper's sparsities, and losses with bands."""
    name = label(cell.short) + (f" ({label(cell.mark, 60)})" if cell.mark else "")
    head = (label(cell.model), cell.length, name, label(cell.metric))
    losses = [found for found in ladders if paired(cell) and found.scores is not None]
    limits: dict[int, Bands] = {}
    counted: dict[int, np.ndarray] = {}
    if losses:  # one call for all of a cell's: its draws are shared
        stacked = np.concatenate([found.losses(PAPER) for found in losses])
        reach = [found.spread(PAPER) for found in losses]
        spread = tuple(np.concatenate(side) for side in zip(*reach, strict=True)) if cell.bounded else None
        all_of = bands(stacked, key(cell), spread)
        n = np.isfinite(stacked).sum(axis=1)
        for place, found in enumerate(losses):
            limits[id(found)] = all_of.part(place * len(PAPER), len(PAPER))
            counted[id(found)] = n[place * len(PAPER) :][: len(PAPER)]
    rows: list[tuple[Any, ...]] = []
    for found in ladders:
        values = found.values(PAPER)
        own = limits.get(id(found))
        for place in np.flatnonzero(np.isfinite(values)):
            row = (*head, found.chain.label, PAPER[place], values[place])
            if own is None:
                least = min(point.record.n for point in found.chain.points)
                rows.append((*row, None, None, None, least, _bare(cell) if found.scores is None else "no dense run"))
            elif PAPER[place] > 0 or not found.dense:
                figures = own.value[place], own.low[place], own.high[place]
                rows.append((*row, *figures, int(counted[id(found)][place]), own.why[place]))
    return rows


# -- means over tasks


def _means(group: Suite) -> tuple[tuple[Panel, ...], list[tuple[Any, ...]]]:
    """Panels of a suite's means, and lines of their table."""
    panels, rows = [], []
    for name, cells in group.groups.items():
        series = []
        dense = stratified([Stratum(cell.dense.scores[None], key(cell), bounds(cell)) for cell in cells])
        value, low, high = dense.value[0], dense.low[0], dense.high[0]
        limits = {} if np.isnan(low) else {"low": (low, low), "high": (high, high)}
        methods = group.shared(cells)
        of_scores, of_losses = over_tasks(methods, PAPER), over_tasks(methods, PAPER, losses=True)
        for method, ladders in methods.items():
            scores, losses = of_scores[method], of_losses[method]
            here = np.flatnonzero(np.isfinite(scores.value))
            if len(here) < 2:
                continue
            x = [PAPER[place] for place in here]
            whiskers = {} if np.isnan(scores.low[here]).all() else {"low": scores.low[here], "high": scores.high[here]}
            kind = "dashed" if ladders[0].chain.oracle else "line"
            mark = len(series) if ladders[0].chain.oracle else None
            series.append(Series(method, x, list(scores.value[here]), kind=kind, mark=mark, **whiskers))
            head = label(group.model), group.length, _group(name, cells), method
            rows += [
                (
                    *head,
                    PAPER[place],
                    *(found[place] for found in (scores.value, scores.low, scores.high)),
                    *(found[place] for found in (losses.value, losses.low, losses.high)),
                )
                for place in here
            ]
        if series:
            last = max(max(one.x) for one in series)
            line = Series("dense", (0.0, last), (value, value), kind="dashed", **limits)
            facets = (("model", group.model), ("length", str(group.length or "")))
            panels.append(Panel(_group(name, cells), thinned((line, *series)), _X, "mean score", facets=facets))
    return tuple(panels), rows


def _group(name: str, cells: Sequence[Cell]) -> str:
    shorts = listed([label(cell.short, 40) for cell in cells])
    return f"{name.replace('_', ' ')}: {shorts}"


def _left_out(group: Suite) -> str:
    return f" Not in the means: {because(group.out, 20)}." if group.out else ""


# -- sentences


def _sentences(group: Suite) -> list[str]:
    """What the mean over tasks (one task where there is one) says at the highest sparsity that methods share."""
    if not group.cells:
        return []
    over = f"the mean over {len(group.cells)} tasks" if len(group.cells) > 1 else label(group.cells[0].short)
    at = where(group.model, group.length, group.kind)
    by_phase: dict[str, dict[str, list[Ladder]]] = defaultdict(dict)
    for method, ladders in group.shared(group.cells).items():
        if not ladders[0].chain.oracle:
            by_phase[ladders[0].chain.phases][method] = ladders
    said = []
    for phases, methods in sorted(by_phase.items()):
        ends = {name: min(found.last for found in ladders) for name, ladders in methods.items()}
        reached = [sparsity for sparsity in PAPER[1:] if sparsity <= min(ends.values())]
        if not reached:
            continue
        losses = over_tasks(methods, reached[-1:], losses=True)
        # Runs that have no document in common with dense: nothing is paired, nothing can be said.
        losses = {name: found for name, found in losses.items() if not np.isnan(found.value[0])}
        if not losses:
            continue
        parts = listed((_loss(name, found) for name, found in losses.items()), 20)
        said.append(f"{at}, {phases} at sparsity {reached[-1]:g}, {over}: {parts}.")
        said += _compared(
            {name: methods[name] for name in losses}, losses, reached[-1], f"{at}, {phases} at sparsity {reached[-1]:g}"
        )
    return said


def _loss(name: str, found: Bands) -> str:
    value, low, high = found.value[0], found.low[0], found.high[0]
    if np.isnan(low):
        return f"{name} is {figure(abs(value))} {'below' if value > 0 else 'above'} dense, without a band"
    if low > 0:
        return f"{name} loses {with_band(value, low, high)} against dense"
    if high < 0:
        return f"{name} gains {with_band(-value, -high, -low)} over dense"
    return f"{name} shows no loss ({with_band(value, low, high)}), and one of {figure(high)} is not excluded"


def _compared(methods: dict[str, list[Ladder]], losses: dict[str, Bands], sparsity: float, at: str) -> list[str]:
    """Which methods the one with the highest score is ahead of: their differences are paired, and the level is divided
    by their number, since the first was chosen by its score."""
    if len(methods) < 2:
        return []
    best, *others = sorted(methods, key=lambda name: losses[name].value[0])
    level = 1 - (1 - LEVEL) / len(others)
    ahead, apart = [], []
    for other in others:
        pairs = zip(methods[best], methods[other], strict=True)
        differences = [
            Stratum(one.documents([sparsity]) - two.documents([sparsity]), one.key, (-1.0, 1.0)) for one, two in pairs
        ]
        low = stratified(differences, level).low[0]
        (ahead if low > 0 else apart).append(other)
    said = []
    if ahead:
        said.append(f"{at}: {best} is ahead of {listed(ahead)}.")
    if apart:
        said.append(f"{at}: {best} has the highest score, and these runs do not tell it from {listed(apart)}.")
    return said


def _floors(cells: Iterable[Cell], floors: dict[int, str | None]) -> list[str]:
    """What cannot be said of cells: dense attention at its floor, and no scores by document."""
    why: dict[str, list[str]] = defaultdict(list)
    bare: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        name = f"{label(cell.short)} ({where(cell.model, cell.length)})"
        if cell.dense is not None and paired(cell) and floors[id(cell)] and cell.bounded:
            why[floors[id(cell)]].append(name)
        if lacking := _bare(cell):
            bare[f"no scores by document, so {NO_BANDS}" if lacking == NO_BANDS else lacking].append(name)
    return [f"{listed(names, 5)}: {reason}." for reason, names in (*why.items(), *bare.items())]
