"""How figures look, whatever draws them: colours, marks, places of categories, ranges of axes, figures as text.

`static` (matplotlib) and `page` (plotly) draw what is prepared here, so that both show the same. Knows no library.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..labels import label
from .figure import Figure, Panel, Series
from .picture import COLOURS

#: The colours of `picture`, as they stand out on dark ground.
DARK = ("#56A8E8", "#FF8B4D", "#33C494", "#E5A0C8", "#F2B632", "#8FD0F5", "#D97A9B", "#C4C45A")
#: Marks, as many as plotly and matplotlib both have.
MARKS = 8
#: Longest name of a line or a category, in characters, and of a title or of an axis.
LONGEST, LONGEST_TITLE = 40, 120
#: The smallest float that a column of a table shows: three decimals.
_LEAST = 0.001
#: Most values of x that get a tick each on a logarithmic axis.
_MOST_TICKS = 8


@dataclass(frozen=True)
class Style:
    """Colour on light and on dark ground (#rrggbb), and the number of a mark."""

    colour: str
    dark: str
    mark: int


def key(series: Series) -> str:
    """The name that decides the colour of a series."""
    return series.colour or series.name


def styles(figures: Iterable[Figure]) -> dict[str, Style]:
    """A style for each name, the same in all figures, and other colours for names that meet in a figure.

    Names take the first colour that none of those has which they meet; where all are taken, the one taken least, and
    another mark.
    """
    met: dict[str, set[str]] = {}
    for figure in figures:
        names = dict.fromkeys(key(series) for panel in figure.panels for series in panel.series)
        for name in names:
            met.setdefault(name, set()).update(names)
    chosen: dict[str, int] = {}
    found: dict[str, Style] = {}
    for name, others in met.items():
        if name.lower() == "dense":
            found[name] = Style("#111111", "#f2f2f2", 0)
            continue
        place = len(found) % MARKS
        if "oracle" in name.lower():
            found[name] = Style("#767676", "#a3a3a3", place)
            continue
        taken = Counter(chosen[other] for other in others if other in chosen)
        free = min(range(len(COLOURS)), key=lambda colour: (taken[colour], colour))
        chosen[name] = free
        found[name] = Style(COLOURS[free], DARK[free], (free + taken[free]) % MARKS)
    return found


# -- figures as text


def text(value: float | None, digits: int = 4) -> str:
    """A figure for people: `digits` significant digits, thousands apart; "unknown" for None."""
    if value is None:
        return "unknown"
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-4:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    if float(value).is_integer():
        return f"{int(value):,}" if abs(value) >= 10_000 else f"{int(value)}"
    decimals = min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 15)
    return f"{value:,.{decimals}f}".rstrip("0").rstrip(".") if decimals else f"{value:,.0f}"


def column(values: Sequence[object]) -> list[str]:
    """The cells of one column as text, by one rule; "" for None.

    Floats have as many decimals as the column needs, at most three, and what would be none of them is `<0.001`. Where
    one is a million or more, or none but zeros is 0.001, all of them have three digits and a power of ten. Thousands
    stand apart.
    """
    sizes = [abs(value) for value in values if isinstance(value, float) and value]
    powers = bool(sizes) and (max(sizes) >= 1e6 or max(sizes) < _LEAST)
    decimals = max((_decimals(size) for size in sizes if size >= _LEAST), default=0)
    cells = []
    for value in values:
        if value is None:
            cells.append("")
        elif isinstance(value, float):
            cells.append(_power(value) if powers else _fixed(value, decimals))
        elif isinstance(value, int):
            cells.append(f"{value:,}")
        else:
            cells.append(str(value))
    return cells


def _fixed(value: float, decimals: int) -> str:
    if 0 < abs(value) < _LEAST:
        return f"<{_LEAST:g}" if value > 0 else f">-{_LEAST:g}"
    return f"{value:,.{decimals}f}"


def _power(value: float) -> str:
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def _decimals(value: float) -> int:
    """Decimals that a figure needs, at most three."""
    return len(f"{value:.3f}".rstrip("0").partition(".")[2])


# -- panels, ready to be drawn


@dataclass(frozen=True)
class Placed:
    """A series on the axes of its panel.

    Attributes:
        name: label of the line, one line of text.
        key: the name in `styles`.
        x, y: places on the axes; None is a gap in both.
        low, high: ends of the band, empty where there is none.
        at: each x in words.
        width: of a bar, in units of x; else 0.
        mark: number of its own mark, None for that of its style.
        band: whether the band is drawn.
    """

    name: str
    key: str
    kind: str
    x: tuple[float | None, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    at: tuple[str, ...]
    hover: tuple[str, ...]
    width: float = 0.0
    mark: int | None = None
    band: bool = True

    @property
    def points(self) -> list[int]:
        """The numbers of the points that are no gaps."""
        return [n for n, y in enumerate(self.y) if y is not None]


@dataclass(frozen=True)
class Prepared:
    """A panel with places and ranges, and ticks: places and words along x and y."""

    panel: Panel
    series: tuple[Placed, ...]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def prepare(figure: Figure) -> list[Prepared]:
    """The panels of a figure, ready to be drawn. Panels with the same axis along x share its range."""
    found = []
    spans: dict[tuple[str, bool], list[float]] = {}
    for panel in figure.panels:
        names = list(dict.fromkeys(x for series in panel.series for x in series.x)) if panel.categories else []
        series = tuple(_placed(panel, names))
        places = [x for one in series for x in one.x if x is not None]
        if not names:
            spans.setdefault((panel.x_label, panel.log_x), []).extend(places)
        found.append((panel, names, series))
    prepared = []
    for panel, names, series in found:
        if names:
            x_range = (-0.6, len(names) - 0.4)
            ticks = tuple((float(n), label(name, LONGEST)) for n, name in enumerate(names))
        else:
            span = spans[panel.x_label, panel.log_x]
            x_range = _range(span, panel.log_x)
            ticks = (_ticks(span, x_range) if panel.log_x else ()) or round_ticks(x_range, panel.log_x)
        drawn = [values for one in series for values in ((one.y, one.low, one.high) if one.band else (one.y,))]
        heights = [v for values in drawn for v in values if v is not None]
        if any(one.kind == "bars" for one in series) and not panel.log_y:
            heights.append(0.0)
        y_range = _range(heights, panel.log_y)
        prepared.append(Prepared(panel, series, x_range, y_range, ticks, round_ticks(y_range, panel.log_y)))
    return prepared


def _placed(panel: Panel, names: Sequence[str]) -> Iterator[Placed]:
    places = {name: float(n) for n, name in enumerate(names)}
    # Points and bars of several series would lie on each other where they share a place.
    apart = [n for n, series in enumerate(panel.series) if series.kind in ("dots", "bars")] if names else []
    bars = [n for n, series in enumerate(panel.series) if series.kind == "bars"]
    width = 0.0
    if bars:
        values = sorted({places[x] if names else x for n in bars for x in panel.series[n].x if x is not None})
        steps = [after - before for before, after in zip(values, values[1:], strict=False)]
        width = 0.8 * min(steps, default=1.0) / len(apart if names else bars)
    for n, series in enumerate(panel.series):
        xs = [places[x] if names else x for x in series.x]
        rank = (apart if names else bars).index(n) if n in (apart if names else bars) else None
        if rank is not None:
            many = len(apart if names else bars)
            step = width or 0.6 / max(many, 4)
            xs = [None if x is None else x + (rank - (many - 1) / 2) * step for x in xs]
        good = [
            x is not None and y is not None and (x > 0 or not panel.log_x) and (y > 0 or not panel.log_y)
            for x, y in zip(xs, series.y, strict=True)
        ]
        low, high = ((), ()) if series.low is None else _band(series, panel.log_y)
        yield Placed(
            label(series.name, LONGEST),
            key(series),
            series.kind,
            tuple(x if fine else None for x, fine in zip(xs, good, strict=True)),
            tuple(y if fine else None for y, fine in zip(series.y, good, strict=True)),
            tuple(value if fine else None for value, fine in zip(low, good, strict=False)),
            tuple(value if fine else None for value, fine in zip(high, good, strict=False)),
            tuple(label(x, LONGEST) if names else text(x) for x in series.x),
            tuple(label(words, 400) for words in series.hover),
            width if series.kind == "bars" else 0.0,
            None if series.mark is None else series.mark % MARKS,
            series.band,
        )


def _band(series: Series, log: bool) -> tuple[Sequence[float | None], Sequence[float | None]]:
    """Both ends where both are known. On a logarithmic axis an end below zero lies below all that is drawn."""
    pairs = [
        (low, high) if low is not None and high is not None and (high > 0 or not log) else (None, None)
        for low, high in zip(series.low, series.high, strict=True)
    ]
    if log:
        positive = [value for values in (series.y, series.low, series.high) for value in values if value and value > 0]
        floor = min(positive, default=1.0) / 2
        pairs = [(max(low, floor) if low is not None else None, high) for low, high in pairs]
    return [low for low, _ in pairs], [high for _, high in pairs]


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    """From below the smallest to above the largest; of a logarithmic axis too in plain units."""
    values = [value for value in values if value > 0] if log else values
    if not values:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.06, 1.08) if low < high else 2.0
        return max(low / room, 1e-300), min(high * room, 1e300)
    room = 0.05 * (high - low) if low < high else max(0.05 * abs(high), 0.05)
    return max(low - room, -1e300), min(high + room, 1e300)


def _ticks(values: Sequence[float], ends: tuple[float, float]) -> tuple[tuple[float, str], ...]:
    """The values themselves, where a logarithmic axis has few of them and far enough apart: lengths, sizes."""
    distinct = sorted({value for value in values if value > 0})
    if not 1 <= len(distinct) <= _MOST_TICKS:
        return ()
    least = math.log(ends[1] / ends[0]) / 14
    if any(math.log(after / before) < least for before, after in zip(distinct, distinct[1:], strict=False)):
        return ()
    return tuple((value, text(value, 3)) for value in distinct)


def round_ticks(ends: tuple[float, float], log: bool = False, most: int = 6) -> tuple[tuple[float, str], ...]:
    """At most some `most` round figures between `ends`, with their words."""
    low, high = ends
    if log and high / low > 2.5:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        for multiples in ((1, 2, 5), (1, 3), (1,)):
            found = [float(f"{m}e{p}") for p in range(first, last + 1) for m in multiples]
            found = [value for value in found if low <= value <= high]
            if len(found) <= most:
                break
        found = found[:: -(-len(found) // most)] if found else []
        return tuple((value, text(value, 3)) for value in found)
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(size * m for m in (1, 2, 2.5, 5, 10, 20) if (high - low) / (size * m) <= most)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    decimals = next((d for d in range(12) if math.isclose(round(step, d), step, rel_tol=1e-9)), 12)
    if 1e-4 <= step < 1e6 and max(abs(low), abs(high)) < 1e7:
        return tuple((n * step, f"{n * step:,.{decimals}f}") for n in numbers)
    # As many digits as tell neighbours apart, one more for steps of 2.5.
    digits = math.ceil(math.log10(max(abs(low), abs(high)) / step)) + 2
    return tuple((n * step, text(n * step, min(max(digits, 2), 15))) for n in numbers)
