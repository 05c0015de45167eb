"""Score against measured sparsity: a picture (PNG) or a page that holds the picture and its numbers (HTML)."""

from __future__ import annotations

import base64
import html
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cli import PROGRAM, Parser
from ..errors import UserError
from ..files import write_whole
from ..paths import check_writable
from .results import Record, find, load, records

SUFFIXES = (".png", ".html")


def draw(rows: Sequence[Record]) -> bytes:
    """A PNG: a panel per (model, task, metric), a line per method, the dense score as a dashed line with its error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for row in rows:
        panels[row.model, row.task, row.metric].append(row)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels) + 2.2, 3.9), squeeze=False, layout="constrained", dpi=130
    )
    # The same colour in every panel, and one legend for all of them.
    methods = sorted({(row.phases, row.method) for row in rows if row.measured})
    colours = {method: f"C{place % 10}" for place, (_, method) in enumerate(methods)}
    names = {method: f"{method} ({phases})" if phases else method for phases, method in methods}
    shown: dict[str, Any] = {}
    for axis, ((model, task, metric), members) in zip(axes[0], sorted(panels.items()), strict=True):
        dense = next((row for row in members if row.measured == 0), None)
        if dense is not None:
            shown["dense"] = axis.axhline(dense.score, color="black", linestyle="--", linewidth=1)
            if dense.stderr:
                low, high = dense.score - dense.stderr, dense.score + dense.stderr
                axis.axhspan(low, high, color="black", alpha=0.08, linewidth=0)
        for method in sorted({row.method for row in members}):
            line = sorted((row for row in members if row.method == method), key=lambda row: row.measured)
            if not any(row.measured for row in line):
                continue
            # Every method at sparsity 0 is dense attention, so its curve starts there.
            if dense is not None and dense not in line:
                line.insert(0, dense)
            shown[names[method]] = axis.errorbar(
                [row.measured for row in line],
                [row.score for row in line],
                yerr=[row.stderr or 0.0 for row in line],
                marker="o",
                capsize=3,
                color=colours[method],
            )
        better = "higher" if members[0].higher_is_better else "lower"
        axis.set_xlabel("measured sparsity of the phase that the method fills")
        axis.set_ylabel(f"{metric} ({better} is better)")
        counts = sorted({row.n for row in members})
        axis.set_title(
            f"{task}, {model}\nn = {', '.join(map(str, counts))} documents, bars: standard error", fontsize=9
        )
        axis.set_xlim(-0.03, 1.0)
        axis.grid(alpha=0.25)
    order = [name for name in ("dense", *names.values()) if name in shown]
    figure.legend([shown[name] for name in order], order, loc="outside right upper", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()


def table(rows: Sequence[Record]) -> list[list[str]]:
    """Header and rows: one line per model, task, method and measured sparsity, one column per metric."""
    metrics = sorted({row.metric for row in rows})
    header = ["model", "task", "method", "requested", "measured", "n", *metrics]
    lines: dict[tuple, dict[str, Record]] = defaultdict(dict)
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
            error = f" ± {row.stderr:.3f}" if row and row.stderr is not None else ""
            cells.append("" if row is None else f"{row.score:.3f}{error}")
        asked = "knobs" if requested is None and method != "dense" else f"{requested or 0:g}"
        body.append([model, task, method, asked, f"{measured:.4f}", str(max(row.n for row in found.values())), *cells])
    return [header, *body]


def page(rows: Sequence[Record], picture: bytes) -> str:
    """A self-contained HTML page: the picture and the table."""
    header, *body = table(rows)
    cells = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
    models = ", ".join(sorted({row.model for row in rows}))
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
th:nth-child(-n+3), td:nth-child(-n+3) {{ text-align: left; }}
</style>
</head>
<body>
<h1>Score against measured sparsity</h1>
<p>Model: {html.escape(models)}. Sparsity is measured, in the phase that the method fills: the share of (query, key)
pairs inside the causal triangle that were not computed while the prompt was read, of the prompt's keys and values that
were dropped, or of the keys that were not read while decoding; averaged over heads, layers and documents (and over
phases where several methods are combined).</p>
<img alt="score against measured sparsity" src="data:image/png;base64,{base64.b64encode(picture).decode()}">
<table>
<tr>{"".join(f"<th>{html.escape(cell)}</th>" for cell in header)}</tr>
{cells}
</table>
</body>
</html>
"""


def main(argv: Sequence[str] | None = None) -> int:
    """`lm-eval-sparse plot RESULTS... --output FILE [--task NAME]`: the exit status."""
    parser = Parser(
        prog=f"{PROGRAM} plot", description="Draw score against measured sparsity from result files of lm-eval."
    )
    parser.add_argument(
        "results", nargs="+", metavar="RESULTS", help="result files, or folders that hold results_*.json"
    )
    parser.add_argument("--output", required=True, action="append", help="FILE.png or FILE.html; may be repeated")
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    options = parser.parse_args(argv)
    for name in options.output:
        if Path(name).suffix not in SUFFIXES:
            raise UserError(f"--output {name}: give a name that ends in {' or '.join(SUFFIXES)}")
        output = Path(name)
        check_writable(f"--output {name}", output.parent, [output.name])
        if output.is_dir():
            raise UserError(f"--output {name} is a folder; give the name of a file")
    rows = [row for path in find(options.results) for row in records(load(path))]
    if options.task:
        present = sorted({row.task for row in rows})
        rows = [row for row in rows if row.task in options.task]
        if not rows:
            raise UserError(f"--task {' '.join(options.task)}: not in these results, which hold {', '.join(present)}")
    if not rows:
        raise UserError("these result files hold no scores")
    picture = draw(rows)
    for name in options.output:
        content = picture if name.endswith(".png") else page(rows, picture).encode()
        write_whole(Path(name), content)
        print(f"wrote {name}")
    return 0
