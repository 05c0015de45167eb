"""Result files as lm-eval saves them, as far as they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def result(task: str, exact: float, sparsity: float | None, model: str = "org/model", **more: Any) -> dict[str, Any]:
    """What lm-eval saves, as far as it is read. `sparsity` None: another model type."""
    content: dict[str, Any] = {
        "model_name": model,
        "results": {
            task: {"name": task, "sample_len": 20, "exact,none": exact, "exact_stderr,none": 0.1, "sparsity,none": 0.5}
        },
        "higher_is_better": {task: {"exact": True}},
        "config": {"model": "hf"},
        "total_evaluation_time_seconds": "12.5",
        **more,
    }
    if sparsity is not None:
        content["config"]["sparse"] = {
            "method": "flexprefill",
            "requested_sparsity": round(sparsity, 1),
            "tasks": {task: {"prefill": {"executed_sparsity": sparsity}}},
        }
    return content


def save(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"results_{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG in pixels."""
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
