"""Figures as pictures (PNG, SVG) and all parts of a report as files. Knows matplotlib.

A picture of matplotlib with a hundred pairs of axes takes many seconds, most of it for ticks and layout. Here one pair
that fills the picture has inches for units, and all lines, bands and marks of all panels are a few collections of it.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..labels import label
from ..results.files import write_whole
from .figure import Figure, Section
from .look import LONGEST_TITLE, Placed, Prepared, Style, prepare, styles
from .picture import COLOURS, MARKS, fit, spread, started
from .tables import figure_csv, table_csv

FORMATS = ("png", "svg", "csv")

#: Of a panel, of its margins, of the room for names beside or below it, in inches.
_PANEL = (3.9, 2.9)
_LEFT, _RIGHT, _BELOW, _ABOVE = 0.7, 0.2, 0.55, 0.45
_NAMES, _TITLE, _LINE = 1.35, 0.38, 0.2
_FONT, _SMALL = 9.0, 7.5
#: Most of the width of a letter, in font sizes, and inches that a letter of a name takes on the whole.
_WIDEST, _LETTER = 0.0085, 0.075
#: Dots an inch, and the most dots of a picture: with more panels they get fewer.
_DOTS, _MOST_DOTS = 150, 30e6
#: Longest name of a category that stands aslant.
_SLANTED = 24
_GREY, _GRID, _BAND = "#555555", "#e4e4e4", 0.15
#: Area of a mark in square points; those with arms or corners look smaller.
_MARK, _THIN = 20, 36
#: Of a legend: name, key of its style, kind, and number of a mark of its own.
_Entry = tuple[str, str, str, int | None]
#: Dashes of broken lines, in widths of the line.
_DASHES = {"dashed": (0, (4, 2.2)), "plain": "solid"}


def write(folder: Path, sections: Iterable[Section], formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write each figure as NAME.png, NAME.svg and NAME.csv and each table as NAME.csv, all whole or not at all.

    Args:
        folder: made where it does not exist.
        sections: figures have the same colours in all of them.
        formats: those of `FORMATS` to write; tables are written with "csv".

    Returns:
        The files, in the order of the sections.

    Raises:
        OSError: a file cannot be written.
        UserError: matplotlib cannot start.
    """
    sections = tuple(sections)
    looks = styles(figure for section in sections for figure in section.figures)
    written = []
    for section in sections:
        for figure in section.figures:
            pictures = [kind for kind in formats if kind != "csv"]
            contents = draw(figure, looks, pictures) if pictures else {}
            if "csv" in formats:
                contents["csv"] = figure_csv(figure).encode()
            for kind, content in contents.items():
                written.append(folder / f"{figure.name}.{kind}")
                write_whole(written[-1], content)
        for table in section.tables if "csv" in formats else ():
            written.append(folder / f"{table.name}.csv")
            write_whole(written[-1], table_csv(table).encode())
    return written


def draw(
    figure: Figure, looks: Mapping[str, Style] | None = None, formats: Sequence[str] = ("png", "svg")
) -> dict[str, bytes]:
    """A figure as pictures, by format.

    Raises:
        UserError: matplotlib cannot start.
    """
    looks = styles([figure]) if looks is None else looks
    panels = prepare(figure)
    with started():
        sheet = _arranged(figure, panels, looks)
        return {kind: sheet.picture(kind) for kind in formats}


def _arranged(figure: Figure, panels: Sequence[Prepared], looks: Mapping[str, Style]) -> _Sheet:
    """All panels in their places, with title and legend."""
    names = {}  # the first kind of a name stands for all
    for one in (one for panel in panels for one in panel.series):
        names.setdefault((one.name, one.key), (one.kind, one.mark))
    alone = {one.kind for panel in panels for one in panel.series} & {"dots", "bars"}
    direct = len(names) <= len(COLOURS) and not alone  # clouds have no end to write a name at
    across, below = _PANEL[0] + (_NAMES if direct else 0.0), _PANEL[1]
    below += _slanted(panels)
    columns = max(min(len(panels), 4), math.ceil(math.sqrt(len(panels) * 0.7)), 1)
    rows = max(-(-len(panels) // columns), 1)
    width = max(across * columns, 5.0)
    legend = [] if direct else _legend([(*name, *look) for name, look in names.items()], width)
    height = _TITLE + below * rows + _LINE * len(legend) + (0.1 if legend else 0)
    sheet = _Sheet(width, height)
    sheet.text(0.12, height - 0.12, label(figure.title, LONGEST_TITLE), 11, va="top", weight="bold", room=width - 0.2)
    for n, panel in enumerate(panels):
        left = (n % columns) * across + _LEFT
        bottom = height - _TITLE - (n // columns + 1) * below + _BELOW + _slanted(panels)
        box = left, bottom, _PANEL[0] - _LEFT - _RIGHT, _PANEL[1] - _BELOW - _ABOVE
        _panel(sheet, box, panel, looks, direct)
    for n, line in enumerate(reversed(legend)):
        for at, (name, key, kind, mark) in line:
            style, y = looks[key], 0.12 + n * _LINE
            _swatch(sheet, at, y, style, kind, mark)
            sheet.text(at + 0.4, y, name, _SMALL + 0.5, va="center_baseline")
    return sheet


def _slanted(panels: Sequence[Prepared]) -> float:
    """Inches below the panels that names of categories need, which stand upright where they are long."""
    longest = [len(words) for panel in panels if panel.panel.categories for _, words in panel.ticks]
    return 0.036 * min(max(longest), _SLANTED) if longest and not _lying(panels) else 0.0


def _lying(panels: Sequence[Prepared]) -> bool:
    """Whether all names of categories fit side by side."""
    room = _PANEL[0] - _LEFT - _RIGHT
    return all(
        max((len(words) for _, words in panel.ticks), default=0) * _LETTER * len(panel.ticks) <= room
        for panel in panels
        if panel.panel.categories
    )


def _legend(names: Iterable[_Entry], width: float) -> list[list[tuple[float, _Entry]]]:
    """Lines of names with the place at which each begins."""
    lines: list[list[tuple[float, _Entry]]] = [[]]
    at = 0.15
    for entry in names:
        needs = 0.4 + _LETTER * len(entry[0]) + 0.2
        if lines[-1] and at + needs > width:
            lines.append([])
            at = 0.15
        lines[-1].append((at, entry))
        at += needs
    return lines


def _swatch(sheet: _Sheet, x: float, y: float, style: Style, kind: str, mark: int | None) -> None:
    if kind == "bars":
        sheet.area(
            [(x + 0.08, y - 0.05), (x + 0.28, y - 0.05), (x + 0.28, y + 0.05), (x + 0.08, y + 0.05)], style.colour, 0.85
        )
        return
    if kind != "dots":
        sheet.line([(x, y), (x + 0.32, y)], style.colour, 1.5, "dashed" if kind == "dashed" else "plain")
    if kind in ("dots", "line") or mark is not None:
        sheet.mark(x + 0.16, y, style.mark if mark is None else mark, style.colour)


def _panel(
    sheet: _Sheet, box: tuple[float, float, float, float], panel: Prepared, looks: Mapping[str, Style], direct: bool
) -> None:
    left, bottom, width, height = box
    about = panel.panel
    across = _scale(panel.x_range, about.log_x, left, width)
    up = _scale(panel.y_range, about.log_y, bottom, height)
    _axes(sheet, box, panel, across, up)
    ends = []
    for one in panel.series:
        style = looks[one.key]
        _series(sheet, one, style, across, up, up(0.0) if not about.log_y else bottom)
        if direct and (points := one.points):
            last = max(points, key=lambda n: one.x[n])
            ends.append((one.name, style.colour, across(one.x[last]), up(one.y[last])))
    if direct:
        _named(sheet, box, ends)


def _axes(sheet: _Sheet, box: tuple[float, float, float, float], panel: Prepared, across: Any, up: Any) -> None:
    """Title, grid, ticks and labels."""
    left, bottom, width, height = box
    about = panel.panel
    above = bottom + height + 0.07
    note = {"colour": _GREY, "style": "italic", "room": width + 0.55}
    sheet.text(left - 0.45, above, label(about.note, LONGEST_TITLE), _SMALL, **note)
    title = label(about.title, LONGEST_TITLE)
    sheet.text(left - 0.45, above + (0.17 if about.note else 0.05), title, _FONT, room=width + 0.55)
    for value, words in panel.y_ticks:
        sheet.line([(left, up(value)), (left + width, up(value))], _GRID, 0.6, below=True)
        sheet.text(left - 0.06, up(value), words, _SMALL, colour=_GREY, ha="right", va="center_baseline")
    lying = _lying([panel])
    for value, words in panel.ticks:
        at = across(value)
        if not about.categories:
            sheet.line([(at, bottom), (at, bottom + height)], _GRID, 0.6, below=True)
        if about.categories and not lying:
            sheet.text(
                at + 0.05,
                bottom - 0.06,
                label(words, _SLANTED),
                _SMALL,
                colour=_GREY,
                ha="right",
                va="top",
                rotation=40,
            )
        else:
            sheet.text(at, bottom - 0.06, words, _SMALL, colour=_GREY, ha="center", va="top")
    sheet.line([(left, bottom), (left + width, bottom)], "#888888", 0.8, below=True)
    if not (about.categories and not lying):  # slanted names say what they are
        words = label(about.x_label, LONGEST_TITLE)
        sheet.text(left + width / 2, bottom - 0.24, words, _SMALL + 0.5, ha="center", va="top", room=width + 0.4)
    words = label(about.y_label, LONGEST_TITLE)
    sheet.text(
        left - 0.52, bottom + height / 2, words, _SMALL + 0.5, ha="right", va="center", rotation=90, room=height + 0.3
    )


def _series(sheet: _Sheet, one: Placed, style: Style, across: Any, up: Any, ground: float) -> None:
    colour = style.colour
    for run in runs(one):
        xs = [across(one.x[n]) for n in run]
        ys = [up(one.y[n]) for n in run]
        banded = one.band and one.low and one.low[run[0]] is not None
        ends = [(up(one.low[n]), up(one.high[n])) for n in run] if banded else []
        if one.kind == "bars":
            half = (across(one.x[run[0]] + one.width) - across(one.x[run[0]])) / 2
            for x, y in zip(xs, ys, strict=True):
                sheet.area([(x - half, ground), (x + half, ground), (x + half, y), (x - half, y)], colour, 0.85)
        if one.kind in ("dots", "bars"):
            for x, (low, high) in zip(xs, ends, strict=False):
                sheet.line([(x, low), (x, high)], colour if one.kind == "dots" else "#333333", 0.9)
        else:
            lows, highs = [low for low, _ in ends], [high for _, high in ends]
            if one.kind == "step":
                places, ys = stairs(xs, ys)
                lows, highs = (stairs(xs, values)[1] if ends else [] for values in (lows, highs))
                xs = places
            if ends:
                sheet.area([*zip(xs, lows, strict=True), *reversed([*zip(xs, highs, strict=True)])], colour, _BAND)
            sheet.line([*zip(xs, ys, strict=True)], colour, 1.5, "dashed" if one.kind == "dashed" else "plain")
        if one.kind in ("line", "dots") or one.mark is not None:
            for x, y in zip(xs, ys, strict=True):
                sheet.mark(x, y, style.mark if one.mark is None else one.mark, colour)


def runs(one: Placed) -> list[list[int]]:
    """Points that are joined: without gaps, and all of them with a band or none."""
    found: list[list[int]] = []
    before = None
    for n in range(len(one.x)):
        state = None if one.y[n] is None else bool(one.low) and one.low[n] is not None
        if state is not None:
            if state != before:
                found.append([])
            found[-1].append(n)
        before = state
    return found


def stairs(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Points of stairs: each value holds until the next place."""
    places = [x for n, x in enumerate(xs) for _ in range(2 if n else 1)]
    values = [y for n, y in enumerate(ys) for _ in range(2 if n < len(ys) - 1 else 1)]
    return places, values


def _named(
    sheet: _Sheet, box: tuple[float, float, float, float], ends: Sequence[tuple[str, str, float, float]]
) -> None:
    """Each line's name beside its end, in its colour, moved up or down as far as names would overlap."""
    left, bottom, width, height = box
    places = spread([min(max((y - bottom) / height, 0), 1) for *_, y in ends], gap=1.3 * _SMALL / 72 / height)
    right = left + width
    for (name, colour, x, y), place in zip(ends, places, strict=True):
        at = bottom + place * height
        sheet.line([(x + 0.05, y), (right, y), (right + 0.1, at)], colour, 0.6, faint=True)
        sheet.text(
            right + 0.13, at, name, _SMALL + 0.5, colour=colour, va="center_baseline", room=_NAMES + _RIGHT - 0.2
        )


def _scale(ends: tuple[float, float], log: bool, start: float, length: float) -> Any:
    """Figures as inches."""
    if log:
        low, high = map(math.log, ends)
        return lambda value: start + length * (math.log(value) - low) / (high - low)
    low, high = ends
    return lambda value: start + length * (value - low) / (high - low)


class _Sheet:
    """What is to be drawn, in inches from the lower left."""

    def __init__(self, width: float, height: float):
        self.size = width, height
        self.lines: dict[bool, list[tuple]] = {True: [], False: []}
        self.areas: list[tuple] = []
        self.marks: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
        self.texts: list[tuple] = []

    def line(
        self, points: Sequence[tuple[float, float]], colour: str, width: float, dash: str = "plain", *,
        below: bool = False, faint: bool = False,
    ) -> None:  # fmt: skip
        self.lines[below].append((points, colour + ("99" if faint else "ff"), width, _DASHES[dash]))

    def area(self, points: Sequence[tuple[float, float]], colour: str, alpha: float) -> None:
        self.areas.append((points, f"{colour}{round(alpha * 255):02x}"))

    def mark(self, x: float, y: float, shape: int, colour: str) -> None:
        self.marks[shape].append((x, y, colour))

    def text(
        self, x: float, y: float, words: str, size: float, *, colour: str = "#222222", room: float = 0.0, **style: Any
    ) -> None:
        if words:
            self.texts.append((x, y, words, room, {"fontsize": size, "color": colour, **style}))

    def picture(self, kind: str) -> bytes:
        """PNG or SVG. Raises `ValueError` for what matplotlib does not write."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import LineCollection, PolyCollection
        from matplotlib.figure import Figure as Picture

        width, height = self.size
        dots = min(_DOTS, math.sqrt(_MOST_DOTS / (width * height)), 60_000 / max(width, height))
        picture = Picture(figsize=self.size, dpi=dots if kind == "png" else _DOTS, facecolor="white")
        FigureCanvasAgg(picture)
        axes = picture.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        axes.set_axis_off()
        for below, order in ((True, 1), (False, 3)):
            if found := self.lines[below]:
                points, colours, widths, dashes = zip(*found, strict=True)
                # A list: a tuple of two, as of a panel with two lines, is taken for one pattern.
                lines = LineCollection(points, colors=colours, linewidths=widths, linestyles=list(dashes), zorder=order)
                axes.add_collection(lines, autolim=False)
        if self.areas:
            points, colours = zip(*self.areas, strict=True)
            axes.add_collection(PolyCollection(points, facecolors=colours, linewidths=0, zorder=2), autolim=False)
        for shape, found in self.marks.items():
            xs, ys, colours = zip(*found, strict=True)
            area = _MARK if MARKS[shape] in "osD" else _THIN
            axes.scatter(xs, ys, s=area, c=colours, marker=MARKS[shape], linewidths=0.5, edgecolors="white", zorder=4)
        for x, y, words, room, style in self.texts:
            written = axes.text(x, y, words, zorder=5, **style)
            if room and len(words) * style["fontsize"] * _WIDEST > room:  # to measure takes as long as to draw
                fit(written, room, upright=bool(style.get("rotation")))
        axes.set(xlim=(0, width), ylim=(0, height))
        buffer = io.BytesIO()
        # Text stays text, and the same figure gives the same bytes.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lm-eval-sparse"}):
            how = {"metadata": {"Date": None}} if kind == "svg" else {"pil_kwargs": {"compress_level": 3}}
            picture.savefig(buffer, format=kind, **how)
        return buffer.getvalue()
