"""lm-eval's evaluator: measured sparsity in every logged sample, and Hub mistakes found before any compute.

Works around: a model type can add figures to the results as a whole (`get_model_info`) but not to a logged
sample of a task that it does not own; and `simple_evaluate` builds the model before anything about the Hub is
checked. Delete the first half when lm-eval lets a response carry metadata into logged samples, the second when
its tracker checks before the run.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any


def apply(module: Any) -> None:
    """Wrap `evaluate` and `simple_evaluate` of `lm_eval.evaluator`; nothing changes for other model types."""
    for name, wrap in (("evaluate", _with_sample_stats), ("simple_evaluate", _with_preflight)):
        function = getattr(module, name)
        if not getattr(function, "_lm_eval_sparse", False):
            wrapped = wrap(function)
            wrapped._lm_eval_sparse = True
            setattr(module, name, wrapped)


def is_ours(lm: Any) -> bool:
    """Whether `lm` is a sparse-hf model, under a response cache or not."""
    import sys

    model = sys.modules.get("lm_eval_sparse.model")
    return model is not None and isinstance(getattr(lm, "lm", lm), model.SparseHFLM)


def _with_sample_stats(evaluate: Any) -> Any:
    signature = inspect.signature(evaluate)

    @functools.wraps(evaluate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        results = evaluate(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        if is_ours(given.get("lm")):
            _count_restored(given["lm"], given.get("task_dict") or {})
            if results is not None and results.get("samples"):
                _add_to_samples(results["samples"])
        return results

    return wrapper


def _distinct(responses: Any) -> list[dict[str, Any]]:
    """The measurements that responses carry, each once: requests that share a context share theirs."""
    from lm_eval_sparse.protocol import stats_of

    found: list[dict[str, Any]] = []
    for response in responses:
        stats = stats_of(response)
        if stats and stats not in found:
            found.append(stats)
    return found


def _add_to_samples(samples: dict[str, list[dict[str, Any]]]) -> None:
    for rows in samples.values():
        for row in rows:
            distinct = _distinct(response for responses in row["resps"] for response in responses)
            measured = [entry["sparsity"] for entry in distinct if entry["sparsity"] is not None]
            row["sparse"] = {
                "sparsity": sum(measured) / len(measured) if measured else None,
                "requests": distinct,
            }


def _count_restored(lm: Any, task_dict: Any) -> None:
    """Tell the model of answers that lm-eval took from its response cache without asking it."""
    model = getattr(lm, "lm", lm)
    tasks = task_dict.get("tasks", {}) if "tasks" in task_dict else {}
    for name, task in tasks.items():
        by_document: dict[Any, list[Any]] = {}
        for instance in task.instances or []:
            by_document.setdefault(instance.doc_id, []).extend(instance.resps)
        for responses in by_document.values():
            for stats in _distinct(responses):
                if stats["run"] != model.run_id:
                    model.count_restored(name, stats)


def _with_preflight(simple_evaluate: Any) -> Any:
    signature = inspect.signature(simple_evaluate)

    @functools.wraps(simple_evaluate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        if options["model"] == "sparse-hf" or is_ours(options["model"]):
            from lm_eval_sparse.patches import hub_tracker

            hub_tracker.preflight(
                options["evaluation_tracker"],
                log_samples=options["log_samples"],
                limit=options["limit"],
                predict_only=options["predict_only"],
            )
        return simple_evaluate(*args, **kwargs)

    return wrapper
