"""What an analysis says, before it is a file: figures, tables and sentences as plain values.

Those who compute make these, `static` and `page` turn them into files. Names in them may be foreign text of any
content: what writes them escapes them. Knows no library.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

#: How a series is drawn: joined points, points alone, stairs (a value holds until the next one), a broken line for
#: references (dense), upright bars.
KINDS = ("line", "dots", "step", "dashed", "bars")

#: What a name that becomes the stem of a file may hold.
_STEM = re.compile(r"[a-z0-9_]{1,80}")

#: What a cell of a table may be; None is a figure that is not known.
Cell = str | float | int | None


def _fail(where: str, problem: str) -> None:
    raise ValueError(f"{where}: {problem}")


def _stem(where: str, name: str) -> None:
    if not isinstance(name, str) or not _STEM.fullmatch(name):
        _fail(where, f"the name {name!r} becomes a file; it has 1 to 80 characters of a-z, 0-9 and _")


def _texts(where: str, **fields: Any) -> None:
    for field, value in fields.items():
        if not isinstance(value, str):
            _fail(where, f"{field} is a text, not {type(value).__name__}")


def _number(value: Any) -> float | None:
    """`value` as a float, None where it is not known or not finite: that is a gap."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _of(where: str, field: str, values: Any, kind: type) -> tuple:
    """`values` as a tuple of `kind`."""
    found = tuple(values) if isinstance(values, Iterable) and not isinstance(values, str) else (values,)
    for value in found:
        if not isinstance(value, kind):
            _fail(where, f"{field} holds {kind.__name__} only, not {type(value).__name__}")
    return found


@dataclass(frozen=True)
class Series:
    """One line, cloud or row of bars of a panel.

    Attributes:
        name: what it is called, at its end and in the legend. Series of one name share their colour everywhere.
        x: numbers, or texts for categories (not both); finite, or the point is a gap.
        y: numbers; None, nan and infinities are gaps.
        low, high: ends of the band around `y` (of the whiskers where points are not joined); both or none of them.
        kind: one of `KINDS`.
        colour: the name whose colour it takes, by default its own. "dense" is black, names with "oracle" are grey.
        hover: a text for each point, shown beside its figures; or none.
        mark: number of the mark of its points, which broken lines have none of otherwise; None for that of its colour.
        band: whether the band is drawn; its ends are written down either way.

    Raises:
        ValueError: lengths that differ, an unknown kind, numbers mixed with texts, a mark below 0.
    """

    name: str
    x: Sequence[float | str | None]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    kind: str = "line"
    colour: str = ""
    hover: Sequence[str] = ()
    mark: int | None = None
    band: bool = True

    def __post_init__(self) -> None:
        where = f"series {self.name!r}"
        _texts(where, name=self.name, kind=self.kind, colour=self.colour)
        if self.kind not in KINDS:
            _fail(where, f"kind {self.kind!r} is unknown; there are {', '.join(KINDS)}")
        if self.mark is not None and (not isinstance(self.mark, int) or self.mark < 0):
            _fail(where, f"a mark is a number from 0 on, not {self.mark!r}")
        x = tuple(self.x)
        texts = sum(isinstance(value, str) for value in x)
        if texts not in (0, len(x)):
            _fail(where, "x holds numbers or texts, not both")
        if not texts:
            x = tuple(map(_number, x))
        y = tuple(None if at is None else _number(value) for at, value in zip(x, self.y, strict=False))
        if (self.low is None) != (self.high is None):
            _fail(where, "low and high are given together, or neither")
        for field in ("y", "low", "high", "hover"):
            given = getattr(self, field)
            if given is not None and len(given) != len(x) and not (field == "hover" and len(given) == 0):
                _fail(where, f"{len(x)} values of x and {len(given)} of {field}")
        for field, value in (("x", x), ("y", y), ("hover", _of(where, "hover", self.hover, str))):
            object.__setattr__(self, field, value)
        for field in ("low", "high"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, tuple(map(_number, getattr(self, field))))

    @property
    def categories(self) -> bool:
        """Whether x holds texts."""
        return bool(self.x) and isinstance(self.x[0], str)


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: one short line; what tells this panel from its neighbours first.
        series: drawn in this order, the last on top.
        x_label, y_label: with units, and with which direction is better where that is not plain.
        log_x, log_y: whether an axis is logarithmic (figures that are not positive are gaps there).
        note: shown in the panel in words, such as "dense cannot do this task".
        facets: (name, value) pairs that the page's filter offers, such as ("task", "niah").

    Raises:
        ValueError: series of numbers beside series of categories.
    """

    title: str
    series: tuple[Series, ...]
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    note: str = ""
    facets: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        where = f"panel {self.title!r}"
        _texts(where, title=self.title, x_label=self.x_label, y_label=self.y_label, note=self.note)
        object.__setattr__(self, "series", _of(where, "series", self.series, Series))
        object.__setattr__(self, "facets", tuple((str(name), str(value)) for name, value in self.facets))
        if len({series.categories for series in self.series if series.x}) > 1:
            _fail(where, "one series has numbers along x and another texts")

    @property
    def categories(self) -> bool:
        """Whether x holds texts."""
        return any(series.categories for series in self.series)


@dataclass(frozen=True)
class Figure:
    """Panels that are looked at together; one file of each kind.

    Attributes:
        name: stem of its files, [a-z0-9_]; unique in a report.
        title: one line.
        caption: what is seen and how it was computed, in plain sentences; also read by screen readers.
        panels: in the order of reading.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]

    def __post_init__(self) -> None:
        where = f"figure {self.name!r}"
        _stem(where, self.name)
        _texts(where, title=self.title, caption=self.caption)
        object.__setattr__(self, "panels", _of(where, "panels", self.panels, Panel))


@dataclass(frozen=True)
class Table:
    """Rows of figures and texts.

    Attributes:
        name: stem of its file, [a-z0-9_]; unique in a report.
        title: one line.
        header: a text for each column.
        rows: a cell for each column; None is a figure that is not known. nan and infinities become None.
        caption: what the columns mean, in plain sentences.

    Raises:
        ValueError: a row that is shorter or longer than the header, a cell that is neither text, number nor None.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        where = f"table {self.name!r}"
        _stem(where, self.name)
        _texts(where, title=self.title, caption=self.caption)
        object.__setattr__(self, "header", _of(where, "header", self.header, str))
        rows = tuple(tuple(_cell(where, cell) for cell in row) for row in self.rows)
        for row in rows:
            if len(row) != len(self.header):
                _fail(where, f"{len(self.header)} columns, and a row of {len(row)}")
        object.__setattr__(self, "rows", rows)


def _cell(where: str, cell: Any) -> Cell:
    if cell is None or isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return cell
    try:
        if hasattr(cell, "dtype"):  # a scalar of numpy
            return _cell(where, cell.item())
        return _number(cell)
    except (TypeError, ValueError):
        _fail(where, f"a cell is a text, a number or None, not {type(cell).__name__}")
        raise AssertionError from None


@dataclass(frozen=True)
class Section:
    """One part of a report.

    Attributes:
        name: [a-z0-9_], unique in a report; what links lead to.
        title: one line.
        sentences: plain sentences, each generated from a tested condition.
        figures, tables: in the order of reading.
        first: sentences for the top of the report, where the part knows which say most; they need not be among its
            sentences.
    """

    name: str
    title: str
    sentences: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    first: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"section {self.name!r}"
        _stem(where, self.name)
        _texts(where, title=self.title)
        # A text alone would be taken for a row of characters.
        object.__setattr__(self, "sentences", _of(where, "sentences", self.sentences, str))
        object.__setattr__(self, "first", _of(where, "first", self.first, str))
        object.__setattr__(self, "figures", _of(where, "figures", self.figures, Figure))
        object.__setattr__(self, "tables", _of(where, "tables", self.tables, Table))
