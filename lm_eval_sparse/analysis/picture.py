"""Score against measured sparsity as pictures. Knows records and matplotlib only."""

from __future__ import annotations

import io
import logging
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..files import why
from .labels import label
from .results import Record

logger = logging.getLogger(__name__)

#: Panels of one picture, and how many stand side by side.
MOST_PANELS = 24
COLUMNS = 4
#: Lines that can be told apart: ten colours by so many marks.
MARKS = "os^vDP"
MOST_METHODS = 10 * len(MARKS)

#: Of a panel, of the legend's column and of the title above each panel, in inches.
_PANEL = (5.2, 3.9)
_LEGEND = 2.7
_FONT, _SMALLEST = 9.0, 4.0

#: What identifies a panel: model, task, metric.
Key = tuple[str, str, str]


def panels(rows: Sequence[Record]) -> dict[Key, list[Record]]:
    """The records of each panel, sorted by model, task and metric."""
    found: dict[Key, list[Record]] = defaultdict(list)
    for row in rows:
        found[row.model, row.task, row.metric].append(row)
    return dict(sorted(found.items()))


def draw(rows: Sequence[Record]) -> list[bytes]:
    """PNGs of at most `MOST_PANELS` panels each: a panel per (model, task, metric), a line per method, the dense score
    as a dashed line with its error.

    Raises:
        UserError: there are more methods than can be told apart, or matplotlib cannot start.
    """
    methods = sorted({(row.method, row.phases) for row in rows if row.measured})
    if len(methods) > MOST_METHODS:
        raise UserError(
            f"these results hold {len(methods)} methods, and at most {MOST_METHODS} can be told apart in a picture; "
            "give fewer result files"
        )
    try:
        import matplotlib
    except ValueError as error:  # its settings are read while it is imported
        raise UserError(
            f"matplotlib cannot start ({why(error)}); look at MPLBACKEND and at your matplotlibrc"
        ) from None
    styles = {method: {"color": f"C{place % 10}", "marker": MARKS[place // 10]} for place, method in enumerate(methods)}
    found = list(panels(rows).items())
    # Names are text: a dollar sign in one is no formula.
    settings = {
        "text.parse_math": False,
        "text.usetex": False,
        "axes.unicode_minus": False,
        "axes.formatter.use_mathtext": False,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pictures = [_picture(found[at : at + MOST_PANELS], styles) for at in range(0, len(found), MOST_PANELS)]
    if any("missing from" in str(warning.message) for warning in said):
        logger.warning("no font here has all characters of these names; empty boxes stand for those that are missing")
    return pictures


def _picture(found: Sequence[tuple[Key, list[Record]]], styles: dict[tuple[str, str], dict[str, str]]) -> bytes:
    """One PNG. All sizes are set here: to let the library solve for them takes minutes for a hundred panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(found))
    lines = -(-len(found) // columns)
    width, height = _PANEL[0] * columns + _LEGEND, _PANEL[1] * lines
    figure = Figure(figsize=(width, height), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.85 / width,
        right=(width - _LEGEND - 0.15) / width,
        bottom=0.55 / height,
        top=(height - 0.55) / height,
        wspace=0.95 / (_PANEL[0] - 0.95),
        hspace=1.15 / (_PANEL[1] - 1.15),
    )
    shown: dict[str, Any] = {}
    for axis, (key, members) in zip(axes.flat, found, strict=False):
        _fill(axis, key, members, styles, shown)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    names = ["dense", *(_name(method) for method in styles)]
    order = list(dict.fromkeys(name for name in names if name in shown))
    legend = figure.legend(
        [shown[name] for name in order],
        order,
        loc="upper left",
        bbox_to_anchor=((width - _LEGEND) / width, (height - 0.3) / height),
        frameon=False,
        fontsize=_FONT,
    )
    for text in legend.get_texts():
        _fit(text, _LEGEND - 0.7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _name(method: tuple[str, str]) -> str:
    name, phases = method
    return f"{label(name, 32)}\n({phases})" if phases else label(name, 32)


def _fill(
    axis: Any,
    key: Key,
    members: Sequence[Record],
    styles: dict[tuple[str, str], dict[str, str]],
    shown: dict[str, Any],
) -> None:
    """Draw one panel, and put what the legend names into `shown`."""
    model, task, metric = key
    dense = next((row for row in members if row.measured == 0), None)
    if dense is not None:
        shown["dense"] = axis.axhline(dense.score, color="black", linestyle="--", linewidth=1)
        if dense.stderr:
            low, high = dense.score - dense.stderr, dense.score + dense.stderr
            axis.axhspan(low, high, color="black", alpha=0.08, linewidth=0)
    for method, style in styles.items():
        line = sorted(
            (row for row in members if (row.method, row.phases) == method and row.measured),
            key=lambda row: row.measured,
        )
        if not line:
            continue
        # Every method at sparsity 0 is dense attention, so its curve starts there.
        points = [dense, *line] if dense is not None else line
        shown[_name(method)] = axis.errorbar(
            [row.measured for row in points],
            [row.score for row in points],
            yerr=[row.stderr or 0.0 for row in points],
            capsize=3,
            **style,
        )
    better = "higher" if members[0].higher_is_better else "lower"
    counts = sorted({row.n for row in members})
    said = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    axis.set_xlabel("measured sparsity of the phase that the method fills", fontsize=_FONT)
    axis.set_ylabel(f"{label(metric, 50)} ({better} is better)", fontsize=_FONT)
    _fit(axis.yaxis.label, _PANEL[1] - 1.0, upright=True)
    axis.set_title(
        f"{label(task, 56)}\n{label(model, 56)}\nn = {said} documents, bars: standard error", fontsize=_FONT - 1
    )
    _fit(axis.title, _PANEL[0] - 0.3)
    axis.set_xlim(-0.03, 1.03)
    axis.grid(alpha=0.25)


def _fit(text: Any, inches: float, *, upright: bool = False) -> None:
    """Make a text smaller until it does not reach into its neighbour."""
    figure = text.get_figure(root=True)
    box = text.get_window_extent(figure.canvas.get_renderer())
    length = (box.height if upright else box.width) / figure.dpi
    if length > inches:
        text.set_fontsize(max(_SMALLEST, text.get_fontsize() * inches / length))
