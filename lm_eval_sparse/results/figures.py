"""The table of the six figures under a run. It is printed at its end, which must not fail over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..labels import label
from .parts import is_finite

#: Phases of a result file, in the order of a run.
PHASES = ("prefill", "eviction", "decode")
FIGURES = {
    "requested_sparsity": "requested",
    "selected_sparsity": "selected",
    "executed_sparsity": "executed",
    "bytes_read_fraction": "bytes read",
    "kv_memory_fraction": "KV memory",
    "estimator_flops_fraction": "estimator FLOPs",
}


def figures_table(content: Mapping[str, Any]) -> str:
    """A markdown table of the six figures: a line per task and phase with a method. Empty for dense runs.

    It is printed at the end of a run, which must not fail over it: what has another shape is left out.
    """
    rows = [["Task", "Phase", "Method", *FIGURES.values()]]
    for task, phases in _object(_object(_object(content, "config"), "sparse"), "tasks").items():
        for phase in PHASES:
            figures = _object(phases, phase)
            if figures.get("method", "dense") != "dense":
                rows.append(
                    [label(task), phase, label(figures["method"]), *(_figure(figures, name) for name in FIGURES)]
                )
    if len(rows) == 1:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["|" + "|".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + "|" for row in rows]
    lines.insert(1, "|" + "|".join("-" * width for width in widths) + "|")
    return "\n".join(lines) + "\n"


def _object(value: Any, key: str) -> Mapping[str, Any]:
    found = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _figure(figures: Mapping[str, Any], name: str) -> str:
    value = figures.get(name)
    return f"{value:.4f}" if is_finite(value) else "-"
