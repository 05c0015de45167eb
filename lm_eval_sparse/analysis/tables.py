"""Tables and the points of figures as CSV and as text for a terminal. Knows no library.

Cells are foreign text. A spreadsheet computes a cell that begins like a formula, a terminal obeys control characters:
neither gets through.
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence

from ..errors import plain
from ..labels import label
from ..output import WIDEST
from .figure import Cell, Figure, Table
from .look import column

#: What a formula begins with. Some spreadsheets read wide and small forms of it alike.
_FORMULA = "=+-@"
#: With these in front a cell may lose its quotes, or be split, and what follows be computed.
_BREAKS = ("\t", "\r", "\n")
#: Longest text of a cell in a CSV file: what spreadsheets take.
_LONGEST = 32_000


def table_csv(table: Table) -> str:
    """A table as CSV: header and rows, numbers in full, nothing where a figure is not known."""
    return _csv([table.header, *table.rows])


def figure_csv(figure: Figure) -> str:
    """The points of a figure as CSV, a row each: panel, axes, series, x, y, ends of the band, words."""
    rows: list[Sequence[Cell]] = [("panel", "note", "x_label", "y_label", "series", "x", "y", "low", "high", "about")]
    for panel in figure.panels:
        for series in panel.series:
            many = len(series.x)
            nothing = (None,) * many
            ends = (series.low or nothing, series.high or nothing, series.hover or nothing)
            about = panel.title, panel.note, panel.x_label, panel.y_label, series.name
            rows.extend((*about, *point) for point in zip(series.x, series.y, *ends, strict=True))
    return _csv(rows)


def _csv(rows: Iterable[Sequence[Cell]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([_safe(cell) for cell in row] for row in rows)
    return buffer.getvalue()


def is_formula(text: str) -> bool:
    """Whether a spreadsheet may compute a cell with this text: what cannot be seen in front of it may be dropped."""
    for character in text:
        if unicodedata.normalize("NFKC", character) in _FORMULA:
            return True
        if not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf"):
            break
    return text.startswith(_BREAKS)


def guarded(text: str) -> str:
    """`text` as a cell in full, without control characters; an apostrophe before what may be taken for a formula."""
    said = plain(text)
    return f"'{said}" if is_formula(text) or is_formula(said) else said


def _safe(cell: Cell) -> Cell:
    if isinstance(cell, str):
        said = label(cell, _LONGEST)
        return f"'{said}" if is_formula(cell) or is_formula(said) else said
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53:
        return int(cell)  # lengths are whole numbers, which the axes of figures hold as floats
    return "" if cell is None else cell


def show(table: Table, width: int = WIDEST) -> str:
    """A table as text for a terminal of `width` columns: numbers to the right, texts broken into lines.

    Columns of texts give way where the table is too wide; words longer than their column are broken. With more columns
    than fit each cell has a line, an empty one a dash.
    """
    head = [label(name) for name in table.header]
    columns = [
        [label(cell) for cell in column([row[n] for row in table.rows])] if table.rows else [] for n in range(len(head))
    ]
    right = [numeric([row[n] for row in table.rows]) for n in range(len(head))]
    widths = _widths(head, columns, right, width - 2 * (len(head) - 1))
    lines = [label(table.title)] if table.title else []
    if sum(widths) + 2 * (len(widths) - 1) <= width:
        lines += _row(head, widths, right)
        lines.append("  ".join("─" * wide for wide in widths))
        for cells in zip(*columns, strict=True):
            lines += _row(cells, widths, right)
    else:  # too many columns: a line for each cell
        names = min(max(map(_wide, head)), width // 3)
        for cells in zip(*columns, strict=True):
            lines.append("─" * width)
            for pair in zip(head, cells, strict=True):
                name, cell = pair
                lines += _row((name, cell or "-"), (names, width - names - 2), (False, False))
    if not table.rows:
        lines.append("(no rows)")
    if table.caption:
        lines += ["", *textwrap.wrap(label(table.caption, 2000), width)]
    return plain("\n".join(lines))


def numeric(values: Iterable[Cell]) -> bool:
    """Whether a column holds numbers, and nothing else but what is not known."""
    known = [value for value in values if value is not None and value != ""]
    return bool(known) and all(isinstance(value, int | float) for value in known)


def _wide(text: str) -> int:
    """Columns that a text takes: East Asian characters two, marks that stand over others none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _widths(head: Sequence[str], columns: Sequence[Sequence[str]], right: Sequence[bool], room: int) -> list[int]:
    """Columns of each column: what it needs, and where that is too much, texts as wide as is left for them."""
    needs = [max(map(_wide, (name, *cells))) for name, cells in zip(head, columns, strict=True)]
    widths = [
        # A long name over short numbers is broken.
        max(max(map(_wide, cells), default=1), min(need, 12), 1) if numbers else max(need, 1)
        for need, cells, numbers in zip(needs, columns, right, strict=True)
    ]
    while sum(widths) > room:
        widest = max((n for n in range(len(widths)) if not right[n]), key=lambda n: widths[n], default=None)
        if widest is None or widths[widest] <= 8:
            break
        widths[widest] -= 1
    return widths


def _row(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    broken = [_broken(cell, wide) for cell, wide in zip(cells, widths, strict=True)]
    lines = []
    for n in range(max(map(len, broken), default=1)):
        parts = [part[n] if n < len(part) else "" for part in broken]
        padded = [
            " " * (wide - _wide(part)) + part if numbers else part + " " * (wide - _wide(part))
            for part, wide, numbers in zip(parts, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _broken(cell: str, width: int) -> list[str]:
    """A text in lines of at most `width` columns."""
    if _wide(cell) <= width:
        return [cell]
    lines, line = [], ""
    # After a blank, or where names are joined.
    for word in re.findall(r"[^ \-_/+]*[ \-_/+]?", cell):
        if _wide(line) + _wide(word.rstrip(" ")) <= width:
            line += word
            continue
        if line:
            lines.append(line)
        line = ""
        for c in word:
            if line and _wide(line) + _wide(c) > width:
                lines.append(line)
                line = ""
            line += c
    return [line.rstrip(" ") for line in (*lines, line)]
