"""Reading lm-eval result files that sparse-hf (or any other model type) wrote, one record per task and metric."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class Record:
    """One score of one task in one run.

    Attributes:
        model, method, task, metric: names; `method` is `dense` for other model types.
        phases: those that the method fills, joined by `+`; empty for dense attention.
        score, stderr: as aggregated by lm-eval; `stderr` is None where it gave none.
        n: documents scored.
        requested, measured: sparsity asked for and executed sparsity of the phase that the method fills, in [0, 1];
            with methods in several phases the mean over those phases. `requested` is None when native knobs ruled.
        higher_is_better: direction of the metric.
        seconds: wall time of the whole run, or None.
    """

    model: str
    method: str
    task: str
    metric: str
    score: float
    stderr: float | None
    n: int
    requested: float | None
    measured: float
    higher_is_better: bool
    seconds: float | None
    phases: str = ""


def find(paths: Iterable[str | Path]) -> list[Path]:
    """Result files among the given files and below the given folders, sorted by path."""
    found: list[Path] = []
    for given in map(Path, paths):
        if given.is_dir():
            found += sorted(given.rglob("results_*.json"))
        elif given.is_file():
            found.append(given)
        else:
            raise UserError(f"{given}: no such file or folder; give result files of lm-eval or folders that hold them")
    if not found:
        raise UserError(f"no results_*.json below {', '.join(map(str, paths))}; run lm_eval with --output_path first")
    return found


def load(path: Path) -> dict[str, Any]:
    """One result file, checked to be one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable result file ({error})") from error
    if not isinstance(content, dict) or "results" not in content:
        raise UserError(f"{path}: not a result file of lm-eval (it has no 'results')")
    return content


#: Phases of a result file, and the figures of each with their short names.
PHASES = ("prefill", "eviction", "decode")
FIGURES = {
    "requested_sparsity": "requested",
    "selected_sparsity": "selected",
    "executed_sparsity": "executed",
    "bytes_read_fraction": "bytes read",
    "kv_memory_fraction": "KV memory",
    "estimator_flops_fraction": "estimator FLOPs",
}
#: Measurements among lm-eval's metrics.
MEASURED = ("sparsity", "prefill_sparsity", "kv_sparsity", "decode_sparsity")


def filled_phases(phases: dict[str, dict[str, Any]]) -> list[str]:
    """The phases that a sparse method fills; prefill when all are dense."""
    return [name for name in PHASES if phases.get(name, {}).get("method", "dense") != "dense"] or ["prefill"]


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean, or None when any value is missing."""
    known = list(values)
    return None if None in known or not known else sum(known) / len(known)


def figures_table(content: dict[str, Any]) -> str:
    """A markdown table of the six figures: a line per task and phase with a method. Empty for dense runs."""
    rows = [["Task", "Phase", "Method", *FIGURES.values()]]
    for task, phases in content["config"]["sparse"]["tasks"].items():
        for phase in PHASES:
            figures = phases.get(phase, {})
            if figures.get("method", "dense") != "dense":
                values = (figures.get(name) for name in FIGURES)
                rows.append([task, phase, figures["method"], *("-" if v is None else f"{v:.4f}" for v in values)])
    if len(rows) == 1:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["|" + "|".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + "|" for row in rows]
    lines.insert(1, "|" + "|".join("-" * width for width in widths) + "|")
    return "\n".join(lines) + "\n"


def records(content: dict[str, Any]) -> Iterator[Record]:
    """The scores in one result file. Rows of measured sparsity are measurements, not scores, and are left out."""
    config = content.get("config", {})
    sparse = config.get("sparse")
    seconds = content.get("total_evaluation_time_seconds")
    for task, row in content["results"].items():
        # Other model types are dense. In a run of ours, groups and skipped tasks have no measurement of their own.
        phases = (sparse or {}).get("tasks", {}).get(task, {})
        filled = [phases.get(name, {}) for name in filled_phases(phases)]
        measured = 0.0 if sparse is None else _mean(phase.get("executed_sparsity") for phase in filled)
        if measured is None:
            continue
        if sparse is None:
            requested = 0.0
        elif len(filled) == 1:
            requested = sparse["requested_sparsity"]
        else:
            requested = _mean(phase.get("requested_sparsity") for phase in filled)
        for key, value in row.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or metric in MEASURED or not isinstance(value, (int, float)):
                continue
            stderr = row.get(f"{metric}_stderr,{rule}")
            yield Record(
                model=str(content.get("model_name") or config.get("model", "?")),
                method=sparse["method"] if sparse else "dense",
                task=task,
                metric=metric,
                score=float(value),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                n=int(row.get("sample_len") or 0),
                requested=requested,
                measured=float(measured),
                higher_is_better=bool(content.get("higher_is_better", {}).get(task, {}).get(metric, True)),
                seconds=float(seconds) if seconds is not None else None,
                phases="+".join(name for name in PHASES if phases.get(name, {}).get("method", "dense") != "dense"),
            )
