"""Writes the figures of every layer and head (`stats=full`) next to the results file.

Works around: a model type can add to lm-eval's results file, which these figures would swamp, but has no part in saving
and is never told where files go. Delete when a model type can save files of its own beside the results.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.results.files import why, write_whole

#: Where `patches.evaluator` leaves the figures in lm-eval's results.
KEY = "sparse_stats"


def _elsewhere(
    tracker: Any, results: dict[str, Any], samples: Any, content: bytes, file: Path, error: OSError
) -> UserError:
    """Save the figures, and the samples that would come next, where there is room; returns what the run says."""
    from lm_eval_sparse.patches import hub_tracker, saving

    run = hub_tracker.run_of(tracker)
    said = (
        f"the results are in {file}, but the figures per layer and head could not be saved beside them ({why(error)})"
    )
    if run is None:
        return UserError(said)
    hub_tracker.print_tables(results)
    where = saving.rescue(tracker, None, hub_tracker.original_of(tracker, "save_results_samples"), results, run.samples)
    if (folder := getattr(tracker, "_lm_eval_sparse_rescued", None)) is not None:
        write_whole(folder / "sparse_stats.json", content)
    return UserError(f"{said}, nor the samples; {where}")


def apply(module: ModuleType) -> None:
    """Wrap `save_results_aggregated` of `module.EvaluationTracker`; nothing changes for other results."""
    tracker = module.EvaluationTracker
    original = tracker.save_results_aggregated
    if getattr(original, "_lm_eval_sparse_stats", False):
        return

    @functools.wraps(original)
    def save_results_aggregated(self: Any, results: dict[str, Any], samples: Any = None) -> None:
        stats = results.get(KEY)
        if stats is None:
            return original(self, results=results, samples=samples)
        content = json.dumps(stats, indent=1).encode()
        try:
            original(self, results={name: value for name, value in results.items() if name != KEY}, samples=samples)
        except UserError:  # which says in which folder everything is instead
            if (folder := getattr(self, "_lm_eval_sparse_rescued", None)) is not None:
                write_whole(folder / "sparse_stats.json", content)
            raise
        if not self.output_path:
            return None
        from lm_eval_sparse.patches.hub_tracker import saved_results

        file = saved_results(self)
        if file is None:
            raise UserError("the results could not be saved, so the figures per layer and head were not either")
        name = f"sparse_stats_{file.stem.removeprefix('results_')}.json"
        try:
            write_whole(file.with_name(name), content)
        except OSError as error:
            raise _elsewhere(self, results, samples, content, file, error) from error
        return None

    save_results_aggregated._lm_eval_sparse_stats = True  # type: ignore[attr-defined]
    tracker.save_results_aggregated = save_results_aggregated
