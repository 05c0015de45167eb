"""Score against measured sparsity as pictures. Knows matplotlib only."""

from __future__ import annotations

import io
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..labels import label
from ..results.files import why

logger = logging.getLogger(__name__)

#: Panels of one picture, and how many stand side by side.
MOST_PANELS = 24
COLUMNS = 4
#: Colours that stay apart for the colour-blind (Okabe and Ito's without black, which is dense, and yellow, which is
#: hard to see on white; and two of Tol's). Neighbours differ in their marks, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
MARKS = "osD^vPX*"
#: Lines that can be told apart. Up to as many as there are colours are named where they end, more in a legend.
MOST_METHODS = len(COLOURS) * len(MARKS)

#: Of a panel with all that belongs to it, of its margins (left, right, below, above), of the legend's column and of the
#: title of the whole, in inches. The right margin holds the names of the lines.
_PANEL = (5.0, 3.4)
_LEFT, _RIGHT, _BELOW, _ABOVE = 0.65, 1.6, 0.5, 0.5
_LEGEND, _TITLE = 2.7, 0.4
_FONT, _SMALLEST, _DOTS = 9.0, 4.0, 150


@dataclass(frozen=True)
class Row:
    """A point of a curve: names, and figures as in `results.schema.Record`; `stderr` is None where there is none."""

    model: str
    task: str
    metric: str
    method: str
    phases: str
    score: float
    stderr: float | None
    n: int
    requested: float | None
    measured: float
    higher_is_better: bool


#: What identifies a panel: model, task, metric.
Key = tuple[str, str, str]
#: How each method, with its phases, is drawn.
Styles = dict[tuple[str, str], dict[str, str]]


def panels(rows: Sequence[Row]) -> dict[Key, list[Row]]:
    """The records of each panel, sorted by model, task and metric."""
    found: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.model, row.task, row.metric].append(row)
    return dict(sorted(found.items()))


def draw(rows: Sequence[Row]) -> list[bytes]:
    """PNGs of at most `MOST_PANELS` panels each: a panel per (model, task, metric), a line per method with bars of its
    standard error, the dense score as a dashed line in a band of its own.

    Raises:
        UserError: there are more methods than can be told apart, or matplotlib cannot start.
    """
    methods = sorted({(row.method, row.phases) for row in rows if row.measured})
    if len(methods) > MOST_METHODS:
        raise UserError(
            f"these results hold {len(methods)} methods, and at most {MOST_METHODS} can be told apart in a picture; "
            "give fewer result files"
        )
    styles = {
        method: {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKS[(place + place // len(COLOURS)) % len(MARKS)],
        }
        for place, method in enumerate(methods)
    }
    found = list(panels(rows).items())
    with started():
        return [_picture(found[at : at + MOST_PANELS], styles) for at in range(0, len(found), MOST_PANELS)]


@contextmanager
def started() -> Iterator[None]:
    """Inside the block matplotlib draws as we want it. Raises `UserError` where it cannot start."""
    try:
        import matplotlib
    except ValueError as error:  # its settings are read while it is imported
        raise UserError(
            f"matplotlib cannot start ({why(error)}); look at MPLBACKEND and at your matplotlibrc"
        ) from None
    # Names are text: a dollar sign in one is no formula.
    settings = {
        "text.parse_math": False,
        "text.usetex": False,
        "axes.unicode_minus": False,
        "axes.formatter.use_mathtext": False,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    if any("missing from" in str(warning.message) for warning in said):
        logger.warning("no font here has all characters of these names; empty boxes stand for those that are missing")


def _picture(found: Sequence[tuple[Key, list[Row]]], styles: Styles) -> bytes:
    """One PNG. All sizes are set here: to let the library solve for them takes minutes for a hundred panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    direct = len(styles) <= len(COLOURS)
    title = _common_title(found)
    right = _RIGHT if direct else 0.2
    columns = min(COLUMNS, len(found))
    lines = -(-len(found) // columns)
    # A title over all panels takes the place of one over each: the picture has the same size with either.
    above = _ABOVE if title is None else _ABOVE - 0.15
    legend_width = 0.0 if direct else _LEGEND
    width, height = _PANEL[0] * columns + legend_width, _PANEL[1] * lines + _TITLE
    inner = (_PANEL[0] - _LEFT - right, _PANEL[1] - _BELOW - above)
    figure = Figure(figsize=(width, height), dpi=_DOTS)
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    figure.subplots_adjust(
        left=_LEFT / width,
        right=(width - legend_width - right) / width,
        bottom=_BELOW / height,
        top=(height - _TITLE - above) / height,
        wspace=(_LEFT + right) / inner[0],
        hspace=(_BELOW + above) / inner[1],
    )
    if title is not None:
        for at, said, style in (
            (0.12, title, {"fontsize": _FONT + 1.5, "weight": "bold"}),
            (0.35, "bars and band: standard error", {"fontsize": _FONT - 1, "color": "#555555"}),
        ):
            written = figure.text(_LEFT / width, 1 - at / height, said, va="top", **style)
            fit(written, width - _LEFT - 0.2)
    shown: dict[str, Any] = {}
    for axis, (key, members) in zip(axes.flat, found, strict=False):
        lines_of_panel = _fill(axis, key, members, styles, inner, title is not None)
        shown |= {name: handle for name, handle, _ in lines_of_panel}
        if direct:
            _name_lines(axis, lines_of_panel, inner[1], right - 0.3)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    if not direct:
        _add_legend(figure, shown, styles, (width, height))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _common_title(found: Sequence[tuple[Key, list[Row]]]) -> str | None:
    """The title of the picture where all panels are of one task, model and number of documents, else None."""
    common = {(model, task, tuple(sorted({row.n for row in rows}))) for (model, task, _), rows in found}
    if len(common) > 1:
        return None
    ((model, task, counts),) = common
    return f"{label(task, 56)}, {label(model.rpartition('/')[2] or model, 56)}, {_documents(counts)}"


def _documents(counts: Sequence[int]) -> str:
    said = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{said} document{'' if said == '1' else 's'} a point"


def _add_legend(figure: Any, shown: dict[str, Any], styles: Styles, inches: tuple[float, float]) -> None:
    names = ["dense", *(_name(method) for method in styles)]
    order = list(dict.fromkeys(name for name in names if name in shown))
    legend = figure.legend(
        [shown[name] for name in order],
        order,
        loc="upper left",
        bbox_to_anchor=((inches[0] - _LEGEND) / inches[0], (inches[1] - 0.3) / inches[1]),
        frameon=False,
        fontsize=_FONT,
    )
    for text in legend.get_texts():
        fit(text, _LEGEND - 0.7)


def _name(method: tuple[str, str]) -> str:
    name, phases = method
    return f"{label(name, 32)} ({phases})" if phases else label(name, 32)


def _fill(
    axis: Any, key: Key, members: Sequence[Row], styles: Styles, inner: tuple[float, float], titled: bool
) -> list[tuple[str, Any, Row]]:
    """Draw one panel of `inner` inches. Returns name, handle and last point of each line."""
    model, task, metric = key
    found: list[tuple[str, Any, Row]] = []
    dense = next((row for row in members if row.measured == 0), None)
    if dense is not None:
        if dense.stderr:
            low, high = dense.score - dense.stderr, dense.score + dense.stderr
            axis.axhspan(low, high, color="black", alpha=0.1, linewidth=0)
        found.append(("dense", axis.axhline(dense.score, color="black", linestyle="--", linewidth=1), dense))
    for method, style in styles.items():
        line = sorted(
            (row for row in members if (row.method, row.phases) == method and row.measured),
            key=lambda row: row.measured,
        )
        if not line:
            continue
        # Every method at sparsity 0 is dense attention, so its curve starts there, at a point that has its band.
        if dense is not None:
            axis.plot(
                [0, line[0].measured], [dense.score, line[0].score], color=style["color"], linewidth=1.3, alpha=0.55
            )
        handle = axis.errorbar(
            [row.measured for row in line],
            [row.score for row in line],
            yerr=[row.stderr or 0.0 for row in line],
            capsize=2,
            elinewidth=1,
            linewidth=1.6,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            **style,
        )
        found.append((_name(method), handle, line[-1]))
    better = "higher" if members[0].higher_is_better else "lower"
    axis.set_xlabel("measured sparsity", fontsize=_FONT)
    about = f"{label(metric, 50)} ({better} is better)"
    if titled:
        title = about
    else:
        axis.set_ylabel(about, fontsize=_FONT)
        fit(axis.yaxis.label, inner[1], upright=True)
        counts = sorted({row.n for row in members})
        title = f"{label(task, 56)}\n{label(model, 56)}, {_documents(counts)}, bars: standard error"
    fit(axis.set_title(title, fontsize=_FONT if titled else _FONT - 1, loc="left"), _PANEL[0] - _LEFT)
    axis.set_xlim(-0.03, 1.0)
    axis.tick_params(labelsize=_FONT - 1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2)
    return found


def _name_lines(axis: Any, lines: Sequence[tuple[str, Any, Row]], height: float, room: float) -> None:
    """Write each line's name beside its end, in its colour, moved up or down as far as names would overlap."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high)  # what is added below must not move them
    wanted = [min(max((row.score - low) / (high - low), 0.0), 1.0) if high > low else 0.5 for _, _, row in lines]
    places = spread(wanted, gap=1.3 * _FONT / 72 / height)
    for (name, handle, row), at, place in zip(lines, wanted, places, strict=True):
        colour = "black" if name == "dense" else handle[0].get_color()
        begin = 1.0 if name == "dense" else (row.measured + 0.03) / 1.03
        axis.plot(
            [begin, 1.0, 1.035], [at, at, place], color=colour, linewidth=0.6, alpha=0.6, clip_on=False,
            transform=axis.transAxes,
        )  # fmt: skip
        text = axis.text(
            1.045, place, name, color=colour, fontsize=_FONT - 0.5, va="center", transform=axis.transAxes
        )  # fmt: skip
        fit(text, room)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1] at least `gap` apart, in the order of the wanted ones, and as near to them as can be.

    Least squares under the order: neighbours that are too close are pooled around their mean. Where all do not fit,
    they are as far apart as they can be.
    """
    gap = min(gap, 1 / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda n: wanted[n])
    pools: list[list[float]] = []  # sum and number of the wanted places, each less what the gaps below it take
    for rank, n in enumerate(order):
        pools.append([wanted[n] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    highest = 1 - (len(wanted) - 1) * gap
    shifts = [min(max(total / count, 0.0), max(highest, 0.0)) for total, count in pools for _ in range(int(count))]
    places = [0.0] * len(wanted)
    for rank, n in enumerate(order):
        places[n] = shifts[rank] + rank * gap
    return places


def fit(text: Any, inches: float, *, upright: bool = False) -> None:
    """Make a text smaller until it does not reach into its neighbour."""
    figure = text.get_figure(root=True)
    box = text.get_window_extent(figure.canvas.get_renderer())
    length = (box.height if upright else box.width) / figure.dpi
    if length > inches:
        text.set_fontsize(max(_SMALLEST, text.get_fontsize() * inches / length))
