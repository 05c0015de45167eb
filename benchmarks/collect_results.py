"""Gather result files of several methods into one JSON file and one table, for the docs.

python benchmarks/collect_results.py OUT/sweep --output docs/results/methods_niah_4k
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lm_eval_sparse.analysis.results import PHASES, find, load, records


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
        "model": rows[0].model,
        "device": sparse["device"],
        "versions": sparse["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+")
    parser.add_argument("--output", required=True, help="path without suffix: .json and .md are written")
    options = parser.parse_args()
    runs = sorted(
        (gather(load(path)) for path in find(options.results)),
        key=lambda run: (PHASES.index(run["phases_filled"]) if run["phases_filled"] in PHASES else -1, run["method"],
                         run["requested"]),
    )  # fmt: skip
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
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
