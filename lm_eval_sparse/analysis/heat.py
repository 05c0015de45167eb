"""What methods lose by layer and head, as a picture. Knows results and matplotlib only."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, plain
from ..labels import label
from ..paths import check_writable, cut, exists, expand, is_dir
from ..results.diagnostics import HEADS, MOST, Diagnosed, read, table
from ..results.files import why, write_whole
from ..results.load import find
from .picture import started

#: Phases of runs that one picture shows.
MOST_ROWS = 12
#: Of a cell (across, down), of a panel at least and at most, of its margins (left, right with the colour bar, below,
#: above) and of the title over a row, in inches.
_CELL, _LEAST, _MOST = (0.34, 0.18), (2.6, 0.5), (6.5, 7.5)
_LEFT, _RIGHT, _BELOW, _ABOVE, _TITLE = 0.6, 0.75, 0.55, 0.35, 0.3
_FONT, _DOTS = 9.0, 150
#: Dark is lost. Mass and overlap run from 0 to 1, errors from 0 to the largest, but to 1 where that is larger: from
#: there on nothing is left of an output.
_COLOURS = {"mass_kept": "cividis", "oracle_overlap": "cividis", "output_error": "cividis_r"}


def heat(results: Sequence[str], output: str | None = None) -> str:
    """Draw what result files say of diagnosed samples; names as they are typed.

    Args:
        results: files, or folders that hold results_*.json.
        output: the picture (.png) to write, if any.

    Returns:
        The table of the same figures, averaged, and the name of what was written.

    Raises:
        UserError: results that cannot be read or hold nothing of the kind, an output that cannot be written.
    """
    path = None if output is None else _checked(output, [])  # a mistake is said before anything is read
    found = read(results)
    said = table(found)
    if path is None:
        return said
    _checked(output, find(results))
    if len(found) > MOST_ROWS:
        raise UserError(
            f"--output {cut(output)}: these results hold {len(found)} diagnosed phases, and a picture shows at most "
            f"{MOST_ROWS}; give fewer result files"
        )
    try:
        write_whole(path, draw(found))
    except OSError as error:
        raise UserError(f"--output {cut(output)} cannot be written ({why(error)}); give another name") from None
    return f"{said}\n{plain(f'wrote {output}')}"


def _checked(name: str, inputs: Sequence[Path]) -> Path:
    """Where to write. Raises `UserError` where that cannot be."""
    option = f"--output {cut(name)}"
    path = expand(option, name)
    if path.suffix.lower() != ".png":
        raise UserError(f"{option}: give a name that ends in .png, such as heat.png")
    check_writable(option, path.parent, [path.name])
    if is_dir(path):
        raise UserError(f"{option} is a folder; give the name of a file")
    if any(exists(path) and path.samefile(other) for other in inputs if exists(other)):
        raise UserError(f"{option} is one of the result files; give another name, or it would be lost")
    return path


def draw(found: Sequence[Diagnosed]) -> bytes:
    """A PNG: a row for each phase of each run, in it a panel for each figure, layers downwards and heads across.

    Raises:
        UserError: more layers or heads than can be drawn, or matplotlib cannot start.
    """
    for one in found:
        layers, heads = len(one.layers), len(one.figures["mass_kept"][0])
        if max(layers, heads) > MOST:
            raise UserError(f"{one.where}: {layers} layers of {heads} heads; at most {MOST} of each can be drawn")
    with started():
        return _picture(found)


def _picture(found: Sequence[Diagnosed]) -> bytes:
    """All sizes are set here, as in `picture`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = [_size(one) for one in found]
    wide = max(width for width, _ in sizes)
    width = len(HEADS) * (_LEFT + wide + _RIGHT)
    height = sum(_TITLE + _ABOVE + tall + _BELOW for _, tall in sizes) + 0.1
    figure = Figure(figsize=(width, height), dpi=_DOTS)
    FigureCanvasAgg(figure)
    top = 0.1
    for one, (across, down) in zip(found, sizes, strict=True):
        said = f"{label(one.method, 48)} ({one.phase}), {label(one.model, 56)}"
        samples = f"{one.samples} sample{'s' if one.samples != 1 else ''}, {one.queries:,} queries a head"
        for at, words, style in (
            (0.04, said, {"weight": "bold", "fontsize": _FONT + 1.5}),
            (0.24, samples, {"fontsize": _FONT - 1, "color": "#555555"}),
        ):
            figure.text(_LEFT / width, 1 - (top + at) / height, words, va="top", **style)
        top += _TITLE + _ABOVE
        for place, (figure_name, words) in enumerate(HEADS.items()):
            left = place * (_LEFT + wide + _RIGHT) + _LEFT
            box = left / width, 1 - (top + down) / height, across / width, down / height
            bar = (left + across + 0.1) / width, box[1], 0.1 / width, box[3]
            _panel(figure, figure.add_axes(box), figure.add_axes(bar), one, figure_name, words)
        top += down + _BELOW
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _size(one: Diagnosed) -> tuple[float, float]:
    """Inches of a panel, across and down."""
    heads, layers = len(one.figures["mass_kept"][0]), len(one.layers)
    across, down = (
        min(max(number * cell, least), most)
        for number, cell, least, most in zip((heads, layers), _CELL, _LEAST, _MOST, strict=True)
    )
    return across, down


def _panel(figure: Any, axis: Any, bar: Any, one: Diagnosed, name: str, words: str) -> None:
    import numpy as np
    from matplotlib import colormaps

    values = np.array([[np.nan if value is None else value for value in row] for row in one.figures[name]], dtype=float)
    known = values[~np.isnan(values)]
    largest = float(known.max()) if known.size else 0.0
    most = largest if name == "output_error" and 0 < largest < 1 else 1.0
    axis.set_facecolor("#dddddd")  # where there is no figure
    colours = colormaps[_COLOURS[name]]
    image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=most)
    axis.set_title(f"{words} (mean {known.mean():.3f})" if known.size else words, fontsize=_FONT, loc="left")
    axis.set_xlabel("query head", fontsize=_FONT)
    axis.set_ylabel("layer", fontsize=_FONT)
    axis.set_xticks(_ticks(values.shape[1]))
    rows = _ticks(values.shape[0])
    axis.set_yticks(rows, [str(one.layers[row]) for row in rows])
    axis.tick_params(labelsize=_FONT - 1, length=2)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, cax=bar, extend="max" if largest > most else "neither", extendfrac=0.03).ax.tick_params(
        labelsize=_FONT - 1, length=2
    )
    bar.spines[:].set_visible(False)


def _ticks(number: int) -> list[int]:
    """Some dozen of so many places, evenly spaced."""
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, 200) if number <= 14 * step)
    return list(range(0, number, step))
