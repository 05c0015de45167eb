"""A report as one HTML page that needs no network: sentences, figures (plotly) and tables, for screens and paper.

What is foreign goes through autoescape, or into JSON that holds no character of HTML; and the page forbids itself all
scripts but its own two, and all addresses.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..labels import label
from .figure import Figure, Section, Table
from .look import Placed, Prepared, column, prepare, styles
from .tables import numeric

#: Longest sentence or command in a page, in characters.
_LONGEST = 4000
#: From so many panels on there is a filter, and from so many rows on a table gets one.
_MANY_PANELS, _MANY_ROWS = 9, 16
#: Rows of a table that a page holds: nobody scrolls further, and each of ten thousand is drawn by the browser.
_MOST_ROWS = 500
#: Texts of a column that stay in one line, and those that get room for several, in characters.
_SHORT, _LONG = 28, 40
#: Where the size of the file is written, once it is known. Foreign text cannot hold it: there "<" is escaped.
_SIZE = '<data id="file-size"></data>'


@dataclass(frozen=True)
class Facts:
    """What a page says besides its sections.

    Attributes:
        title: one line.
        summary: plain sentences, each generated from a tested condition; the first thing that is read.
        made_by: program and version, such as "lm-eval-sparse 1.0".
        made_with: the command that made the report, "" where none did.
        runs: how many runs were read.
        commands: the lines that made the runs, each once.
        versions: names and versions of what made the runs; a name may have several.
        devices: names of devices, with numbers of runs where there are several.
        dates: of the runs, first and last, or one.
        left_out: what was left out, each with its reason.
        marks: what the reader must know before anything else, such as that runs of different seeds are mixed.
    """

    title: str
    summary: tuple[str, ...] = ()
    made_by: str = ""
    made_with: str = ""
    runs: int = 0
    commands: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    devices: tuple[str, ...] = ()
    dates: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()


def page(sections: Iterable[Section], facts: Facts) -> str:
    """A report as HTML, complete in itself.

    Raises:
        ValueError: two sections, figures or tables have one name.
        UserError: plotly is not installed.
    """
    from markupsafe import Markup

    sections = tuple(sections)
    figures = [figure for section in sections for figure in section.figures]
    _check_names(sections)
    looks = styles(figures)
    order = {name: n for n, name in enumerate(looks)}
    prepared = {figure.name: prepare(figure) for figure in figures}
    data = {
        "styles": [[style.colour, style.dark, style.mark] for style in looks.values()],
        "figures": {name: [_panel(panel, order) for panel in panels] for name, panels in prepared.items()},
    }
    plotly, own, css = _plotly(), _part("report.js"), _part("report.css")
    environment = _environment()
    said = environment.get_template("report.html.j2").render(
        facts=facts,
        sections=sections,
        prepared=prepared,
        many=sum(map(len, prepared.values())) >= _MANY_PANELS,
        facets=_facets(figures),
        many_rows=_MANY_ROWS,
        most_rows=_MOST_ROWS,
        cells=_cells,
        css=Markup(css),
        plotly=Markup(plotly),
        own=Markup(own),
        data=Markup(_json(data)),
        hashes=Markup(" ".join(f"'sha256-{_hash(script)}'" for script in (plotly, own))),
        size=Markup(_SIZE),
    )
    return said.replace(_SIZE, f"{len(said.encode()) / 1e6:.1f} MB", 1)


def _check_names(sections: Sequence[Section]) -> None:
    for kind, names in (
        ("sections", [section.name for section in sections]),
        ("figures and tables", [part.name for section in sections for part in (*section.figures, *section.tables)]),
    ):
        twice = [name for name, many in Counter(names).items() if many > 1]
        if twice:
            raise ValueError(f"{kind} have their names once in a report; {', '.join(twice)} come twice")


def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["line"] = lambda value: label(value, _LONGEST)
    return environment


@functools.cache
def _part(name: str) -> str:
    """A file beside this one, with line ends as a browser reads them (its hash must not depend on the checkout)."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8").replace("\r\n", "\n").strip()


@functools.cache
def _plotly() -> str:
    """The script of plotly. Raises `UserError` where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError(
            "a report needs plotly, which comes with an extra; type: pip install 'lm-eval-sparse[analysis]'"
        ) from None
    return get_plotlyjs().replace("\r\n", "\n").strip()


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(value: Any) -> str:
    """JSON that can stand in HTML: ASCII, without the characters that a parser of HTML looks for."""
    said = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return said.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _panel(panel: Prepared, order: Mapping[str, int]) -> dict[str, Any]:
    about = panel.panel
    return {
        "title": label(about.title),
        "x": label(about.x_label),
        "y": label(about.y_label),
        "log": [about.log_x, about.log_y],
        "range": [_round(panel.x_range), _round(panel.y_range)],
        # Figures along a linear axis are left to plotly, which changes them where a reader looks closer.
        "ticks": [
            panel.ticks if about.log_x or about.categories else [],
            panel.y_ticks if about.log_y else [],
        ],
        "names": about.categories,
        "facets": [[label(name), label(value)] for name, value in about.facets],
        "series": [_series(one, order[one.key]) for one in panel.series],
    }


def _series(one: Placed, style: int) -> dict[str, Any]:
    return {
        "name": one.name,
        "style": style,
        "kind": one.kind,
        "x": _round(one.x),
        "y": _round(one.y),
        "low": _round(one.low),
        "high": _round(one.high),
        "at": one.at,
        "about": one.hover,
        "width": one.width,
        "mark": one.mark,
        "band": one.band,
    }


def _round(values: Iterable[float | None]) -> list[float | None]:
    """Seven digits: more than anyone sees, half the size."""
    return [None if value is None else float(f"{value:.7g}") for value in values]


def _facets(figures: Iterable[Figure]) -> dict[str, list[str]]:
    """What panels can be chosen by: names with at least two values, in the order of the panels."""
    found: dict[str, dict[str, None]] = {}
    for figure in figures:
        for panel in figure.panels:
            for name, value in panel.facets:
                found.setdefault(label(name), {})[label(value)] = None
    return {name: list(values) for name, values in found.items() if len(values) > 1}


def _cells(table: Table) -> dict[str, Any]:
    """Names and kinds of columns, and the first rows as (text, number to sort by or None, whether it is known).

    A column of nothing but empty texts, such as settings where none are mixed, is left to the CSV file.
    """
    first = table.rows[:_MOST_ROWS]
    shown_columns = [n for n in range(len(table.header)) if not first or any(row[n] != "" for row in first)]
    columns = [[row[n] for row in first] for n in shown_columns]
    right = [numeric(values) for values in columns]
    shown = [column(values) for values in columns]
    rows = [
        [
            (label(cell, _LONGEST), value if isinstance(value, int | float) else None, value is not None)
            for cell, value in zip(cells, row, strict=True)
        ]
        for cells, row in zip(zip(*shown, strict=True), zip(*columns, strict=True), strict=True)
    ]
    longest = [max((len(str(value)) for value in values), default=0) for values in columns]
    kinds = [
        "number" if number else "wide" if long > _LONG else "short" if long <= _SHORT else ""
        for number, long in zip(right, longest, strict=True)
    ]
    return {"names": [table.header[n] for n in shown_columns], "kinds": kinds, "rows": rows}
