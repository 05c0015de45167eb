"""Gather result files of several methods into one JSON file and one table, for the docs.

python benchmarks/collect_results.py OUT/sweep --output docs/results/methods_niah_4k
python benchmarks/collect_results.py OUT/all --tasks --output docs/results/tasks   # many tasks, a line for each metric
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lm_eval_sparse.results.figures import PHASES
from lm_eval_sparse.results.load import find, load
from lm_eval_sparse.results.records import records


def gather(content: dict[str, Any]) -> dict[str, Any]:
    """One run: its scores and all measured figures."""
    rows = list(records(content))
    sparse = content["config"]["sparse"]
    return {
        "task": rows[0].task,
        "method": rows[0].method,
        "phases_filled": rows[0].phases,
        "requested": rows[0].requested or 0.0,
        "measured": rows[0].measured,
        "documents": rows[0].n,
        "scores": {row.metric: [row.score, row.stderr] for row in rows},
        "phases": {name: sparse["tasks"][rows[0].task][name] for name in PHASES},
        "seconds": rows[0].seconds,
        "model": rows[0].model,
        "device": sparse["device"],
        "versions": sparse["versions"],
    }


def table_of_methods(runs: list[dict[str, Any]]) -> list[str]:
    """A line for each method and sparsity on one task."""
    metrics = list(runs[0]["scores"])
    first = runs[0]
    lines = [
        f"# {first['task']}, {first['model']}",
        "",
        f"{first['documents']} documents, {first['device']}, torch {first['versions']['torch']}, transformers "
        f"{first['versions']['transformers']}; ± standard error. Bytes read and estimator FLOPs are those of the phase "
        "that the method fills.",
        "",
        "| method | phase | requested | measured | "
        + " | ".join(metrics)
        + " | bytes read | KV memory | estimator FLOPs |",
        "|---" * (7 + len(metrics)) + "|",
    ]
    for run in runs:
        phase = run["phases_filled"] or "prefill"
        figures = run["phases"].get(phase, {})
        scores = (run["scores"][metric] for metric in metrics)
        cells = [run["method"], run["phases_filled"] or "-", f"{run['requested']:g}", f"{run['measured']:.4f}"]
        cells += [f"{score:.3f} ± {error:.3f}" for score, error in scores]
        for name in ("bytes_read_fraction", "kv_memory_fraction", "estimator_flops_fraction"):
            value = figures.get(name)
            cells.append("-" if value is None else f"{value:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table_of_tasks(runs: list[dict[str, Any]]) -> list[str]:
    """A line for each task and metric, a column for each method and sparsity."""
    first = runs[0]
    methods = sorted({(run["requested"], run["method"]) for run in runs})
    lines = [
        f"# Tasks, {first['model']}",
        "",
        f"{first['device']}, torch {first['versions']['torch']}, transformers {first['versions']['transformers']}; "
        "± standard error. Seconds are those of whole runs, model loading included, several at once on the machine.",
        "",
        "| task | documents | metric | "
        + " | ".join(f"{method} {requested or ''}".strip() for requested, method in methods)
        + " | seconds |",
        "|---" * (4 + len(methods)) + "|",
    ]
    for task in sorted({run["task"] for run in runs}, key=lambda name: (name.rpartition("_")[2], name)):
        of_task = {(run["requested"], run["method"]): run for run in runs if run["task"] == task}
        some = next(iter(of_task.values()))
        for metric in some["scores"]:
            cells = []
            for key in methods:
                score, error = of_task[key]["scores"][metric] if key in of_task else (None, None)
                cells.append("-" if score is None else f"{score:.3f} ± {error or 0:.3f}")
            seconds = " / ".join(f"{of_task[key]['seconds']:.0f}" if key in of_task else "-" for key in methods)
            lines.append(f"| {task} | {some['documents']} | {metric} | {' | '.join(cells)} | {seconds} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+")
    parser.add_argument("--output", required=True, help="path without suffix: .json and .md are written")
    parser.add_argument("--note", help="a remark to put below the heading")
    parser.add_argument("--tasks", action="store_true", help="a line for each task instead of each method")
    options = parser.parse_args()
    runs = sorted(
        (gather(load(path)) for path in find(options.results)),
        key=lambda run: (PHASES.index(run["phases_filled"]) if run["phases_filled"] in PHASES else -1, run["method"],
                         run["requested"]),
    )  # fmt: skip
    lines = table_of_tasks(runs) if options.tasks else table_of_methods(runs)
    if options.note:
        lines[2:2] = [options.note, ""]
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
