"""Writes files of ours next to the results: the scores of every document, and the figures of every head (`stats=full`).

Works around: a model type can add to lm-eval's results file, which these figures would swamp, but has no part in saving
and is never told where files go. Delete when a model type can save files of its own beside the results.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from lm_eval_sparse import masking
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.results.files import why, write_whole

#: Where `patches.evaluator` leaves the figures in lm-eval's results.
KEY = "sparse_stats"
#: How the names of these files begin, and what is said of each.
_BESIDE = {"documents": "the scores of every document", KEY: "the figures per layer and head"}


def apply(module: ModuleType) -> None:
    """Wrap `save_results_aggregated` of `module.EvaluationTracker`; nothing changes for other results."""
    tracker = module.EvaluationTracker
    original = tracker.save_results_aggregated
    if getattr(original, "_lm_eval_sparse_stats", False):
        return

    @functools.wraps(original)
    def save_results_aggregated(self: Any, results: dict[str, Any], samples: Any = None) -> None:
        contents = _contents(self, results)
        if not contents:
            return original(self, results=results, samples=samples)
        try:
            original(self, results={name: value for name, value in results.items() if name != KEY}, samples=samples)
        except UserError:  # which says in which folder everything is instead
            if (folder := getattr(self, "_lm_eval_sparse_rescued", None)) is not None:
                for name, content in contents.items():
                    write_whole(folder / f"{name}{_ending(name)}", content)
            raise
        if not self.output_path:
            return None
        from lm_eval_sparse.patches.hub_tracker import saved_results

        file = saved_results(self)
        if file is None:
            raise UserError(f"the results could not be saved, so {_said(contents)} were not either")
        for number, (name, content) in enumerate(contents.items()):
            try:
                write_whole(file.with_name(f"{name}_{file.stem.removeprefix('results_')}{_ending(name)}"), content)
            except OSError as error:
                left = dict(list(contents.items())[number:])
                raise _elsewhere(self, results, samples, left, file, error) from error
        return None

    save_results_aggregated._lm_eval_sparse_stats = True  # type: ignore[attr-defined]
    tracker.save_results_aggregated = save_results_aggregated


def _contents(tracker: Any, results: dict[str, Any]) -> dict[str, bytes]:
    """What is to be written, by how its name begins."""
    from lm_eval_sparse.patches import hub_tracker

    found = {}
    rows = getattr(tracker, "_lm_eval_sparse_documents", None)
    if rows and hub_tracker.run_of(tracker) is not None:
        secrets = getattr(tracker, "_lm_eval_sparse_secrets", frozenset())
        lines = []
        for row in rows:
            line = json.dumps(row, ensure_ascii=False)
            if masking.left_in(line, secrets):
                line = json.dumps(masking.masked(row, secrets, names=False), ensure_ascii=False)
            lines.append(line.encode("utf-8", "backslashreplace") + b"\n")
        found["documents"] = b"".join(lines)
    if (stats := results.get(KEY)) is not None:
        found[KEY] = json.dumps(stats, indent=1).encode()
    return found


def _ending(name: str) -> str:
    return ".json" if name == KEY else ".jsonl"


def _said(contents: dict[str, bytes]) -> str:
    return " and ".join(_BESIDE[name] for name in contents)


def _elsewhere(
    tracker: Any, results: dict[str, Any], samples: Any, contents: dict[str, bytes], file: Path, error: OSError
) -> UserError:
    """Save files, and the samples that would come next, where there is room; returns what the run says."""
    from lm_eval_sparse.patches import hub_tracker, saving

    run = hub_tracker.run_of(tracker)
    said = f"the results are in {file}, but {_said(contents)} could not be saved beside them ({why(error)})"
    if run is None:
        return UserError(said)
    hub_tracker.print_tables(results)
    where = saving.rescue(tracker, None, hub_tracker.original_of(tracker, "save_results_samples"), results, run.samples)
    if (folder := getattr(tracker, "_lm_eval_sparse_rescued", None)) is not None:
        for name, content in contents.items():
            write_whole(folder / f"{name}{_ending(name)}", content)
    return UserError(f"{said}, nor the samples; {where}")
