"""Score against measured sparsity: a picture (PNG) or a page that holds the picture and its numbers (HTML)."""

from __future__ import annotations

import base64
import html
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UserError, nearest, one_line, plain
from ..labels import label
from ..paths import check_writable, cut, exists, expand, is_dir
from ..results.files import why, write_whole
from ..results.load import find, read
from ..results.schema import Record
from .picture import MOST_PANELS, Row, draw, panels
from .study import Study, build

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".html")
#: Pictures of one page.
MOST_PICTURES = 10


def rows_of(study: Study) -> list[Row]:
    """Every run of a study as a row: what differs in knobs, backend or seed keeps its own name, and so its own line."""
    found = []
    for cell in study.cells:
        task = f"{cell.task} ({cell.mark})" if cell.mark else cell.task
        runs = [("dense", "", cell.dense)] if cell.dense else []
        runs += [(chain.label, chain.phases, point) for chain in cell.chains for point in chain.points]
        for name, phases, point in runs:
            record = point.record
            found.append(
                Row(
                    model=cell.model, task=task, metric=cell.metric, method=name, phases=phases, score=record.score,
                    stderr=record.stderr, n=record.n, requested=record.requested, measured=record.measured,
                    higher_is_better=cell.higher_is_better,
                )
            )  # fmt: skip
    return found


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Header and rows: one line per model, task, method and measured sparsity, one column per metric."""
    metrics = sorted({row.metric for row in rows})
    header = ["model", "task", "method", "requested", "measured", "n", *map(label, metrics)]
    lines: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        lines[row.model, row.task, row.method, row.measured, row.requested][row.metric] = row
    body = []
    # Dense first, then method by method.
    for (model, task, method, measured, requested), found in sorted(
        lines.items(), key=lambda item: (*item[0][:2], item[0][2] != "dense", *item[0][2:4])
    ):
        cells = []
        for metric in metrics:
            row = found.get(metric)
            error = f" ± {_figure(row.stderr)}" if row and row.stderr is not None else ""
            cells.append("" if row is None else f"{_figure(row.score)}{error}")
        asked = "knobs" if requested is None and method != "dense" else f"{requested or 0:g}"
        names = map(label, (model, task, method))
        body.append([*names, asked, f"{measured:.4f}", str(max(row.n for row in found.values())), *cells])
    return [header, *body]


def _figure(value: float) -> str:
    """Three decimals; of a number that these would swamp, or that would swamp them, three digits."""
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"


def page(rows: Sequence[Row], pictures: Sequence[bytes]) -> str:
    """A self-contained HTML page: the pictures and the table."""
    header, *body = table(rows)
    cells = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
    models = sorted({label(row.model) for row in rows})
    images = "\n".join(
        f'<img alt="score against measured sparsity" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        for picture in pictures
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Score against measured sparsity</title>
<style>
body {{ font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; margin-top: 1rem; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .35rem .8rem; text-align: right; }}
th:nth-child(-n+3), td:nth-child(-n+3) {{ text-align: left; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>Score against measured sparsity</h1>
<p>Model: {html.escape(_listed(models))}. Sparsity is measured, in the phase that the method fills: the share of (query,
key) pairs inside the causal triangle that were not computed while the prompt was read, of the prompt's keys and values
that were dropped, or of the keys that were not read while decoding; averaged over heads, layers and documents (and over
phases where several methods are combined).</p>
{images}
<table>
<tr>{"".join(f"<th>{html.escape(cell)}</th>" for cell in header)}</tr>
{cells}
</table>
</body>
</html>
"""


def _listed(names: Sequence[str], most: int = 20) -> str:
    """Names in a sentence, the first of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# -- the files


def _outputs(names: Sequence[str], inputs: Sequence[Path]) -> dict[Path, str]:
    """The files to write, each once, with what the user typed. Raises `UserError` when one cannot be written."""
    found: dict[Path, str] = {}
    for name in names:
        option = f"--output {cut(name)}"
        output = expand(option, name)
        if output.name.lower() in SUFFIXES:
            raise UserError(f"{option}: give a name before {output.name}, such as curve{output.name.lower()}")
        if output.suffix.lower() not in SUFFIXES:
            raise UserError(f"{option}: give a name that ends in {' or '.join(SUFFIXES)}")
        check_writable(option, output.parent, [output.name])
        if is_dir(output):
            raise UserError(f"{option} is a folder; give the name of a file")
        if any(exists(output) and output.samefile(path) for path in inputs if exists(path)):
            raise UserError(f"{option} is one of the result files; give another name, or it would be lost")
        found.setdefault(output.parent.resolve() / output.name, name)
    return found


def _chosen(rows: Sequence[Record], tasks: Sequence[str] | None) -> list[Record]:
    """The records of the tasks that were asked for. Raises `UserError` when one is not there."""
    if not tasks:
        return list(rows)
    present = sorted({row.task for row in rows})
    tasks = [task.encode("utf-8", "backslashreplace").decode() for task in tasks]  # as records spell them
    for task in tasks:
        if task not in present:
            known = _listed([label(name) for name in present])
            raise UserError(
                f"--task {label(task)}: not in these results, which hold {known}{nearest(cut(task), present)}"
            )
    return [row for row in rows if row.task in tasks]


def _check_panels(rows: Sequence[Row], outputs: Mapping[Path, str]) -> None:
    """Raise `UserError` when there are more panels than an output can show."""
    count = len(panels(rows))
    for path, name in outputs.items():
        most = MOST_PANELS if path.suffix.lower() == ".png" else MOST_PANELS * MOST_PICTURES
        if count > most:
            page = ", or write a page (.html)" if most == MOST_PANELS and count <= most * MOST_PICTURES else ""
            raise UserError(
                f"--output {cut(name)}: these results need {count} panels (one for each model, task and metric), and "
                f"{'a picture' if most == MOST_PANELS else 'a page'} has at most {most}; choose tasks with --task NAME"
                f"{page}"
            )


def plot(
    results: Sequence[str], outputs: Sequence[str], tasks: Sequence[str] | None = None, *, allow_mixed: bool = False
) -> None:
    """Draw score against measured sparsity from result files of lm-eval; names as they are typed.

    Args:
        results: files, or folders that hold results_*.json.
        outputs: pictures (.png) and pages (.html) to write.
        tasks: those to draw; all by default.
        allow_mixed: tasks of several versions, seeds or prompts are drawn beside each other.

    Raises:
        UserError: results that cannot be read or drawn, outputs that cannot be written.
    """
    _outputs(outputs, [])  # a mistake is said before anything is read
    files = _outputs(outputs, find(results))
    study = build(_chosen(read(results), tasks), allow_mixed=allow_mixed)
    for line in study.left_out:
        logger.warning("%s", one_line(line))
    rows = rows_of(study)
    _check_panels(rows, files)
    pictures = draw(rows)
    for path, name in files.items():
        content = pictures[0] if path.suffix.lower() == ".png" else page(rows, pictures).encode()
        try:
            write_whole(path, content)
        except OSError as error:
            raise UserError(f"--output {cut(name)} cannot be written ({why(error)}); give another name") from None
        print(plain(f"wrote {name}"))
