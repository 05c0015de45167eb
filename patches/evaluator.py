"""lm-eval's evaluator: measured sparsity in every logged sample and under the table, and there also the leaves that
did not run; and means of groups without twins that are insensitive in some phase.

Works around: a model type can add figures to the results as a whole (`get_model_info`) but not to a logged
sample of a task that it does not own, nor to the table that is printed, and a task cannot say there that it dropped
out. Delete the first part when lm-eval lets a response carry metadata into logged samples, the second when model types
and tasks can print, the third when a task can stay out of its group's means.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from typing import Any

from lm_eval_sparse.errors import plain


def apply(module: Any) -> None:
    """Wrap `evaluate` of `lm_eval.evaluator`, and `make_table` of `lm_eval.utils`.

    For other model types nothing changes but the lines on leaves that did not run. lm-eval's command line takes
    `make_table` after it has imported the evaluator.
    """
    utils = importlib.import_module("lm_eval.utils")
    groups = importlib.import_module("lm_eval.api.group")
    for owner, name, wrap in (
        (module, "evaluate", _with_sample_stats),
        (groups.Group, "aggregate", _without_insensitive),
        (utils, "make_table", _with_figures),
    ):
        function = getattr(owner, name)
        if not getattr(function, "_lm_eval_sparse", False):
            wrapped = wrap(function)
            wrapped._lm_eval_sparse = True
            setattr(owner, name, wrapped)


def _without_insensitive(aggregate: Any) -> Any:
    """Means over twins that respond in every phase, so that runs of any phase, and dense ones, have the same."""

    @functools.wraps(aggregate)
    def wrapper(self: Any, task_metrics: Any) -> Any:
        tasks = self.get_all_tasks()
        kept = [task for task in tasks if not _insensitive(getattr(task.config, "metadata", None))]
        if not kept or len(kept) == len(tasks):  # a group of nothing else has its mean
            return aggregate(self, task_metrics)
        group = copy.copy(self)
        group.get_all_tasks = lambda *args, **kwargs: kept
        return aggregate(group, task_metrics)

    return wrapper


def _insensitive(metadata: Any) -> bool:
    return isinstance(metadata, dict) and bool(metadata.get("insensitive"))


def is_ours(lm: Any) -> bool:
    """Whether `lm` is a sparse-hf model, under a response cache or not."""
    import sys

    model = sys.modules.get("lm_eval_sparse.model.lm")
    return model is not None and isinstance(getattr(lm, "lm", lm), model.SparseHFLM)


def _with_sample_stats(evaluate: Any) -> Any:
    signature = inspect.signature(evaluate)

    @functools.wraps(evaluate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        results = evaluate(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        if is_ours(given.get("lm")):
            _count_restored(given["lm"], given.get("task_dict") or {})
            getattr(given["lm"], "lm", given["lm"]).reporter.reduce()
            if results is not None and results.get("samples"):
                _add_to_samples(results["samples"])
            model = getattr(given["lm"], "lm", given["lm"])
            if results is not None and model.reporter.full:
                results["sparse_stats"] = {
                    "model": model.model_label,
                    **model.sparse.describe(),
                    "figures": "one value per query head, averaged over prompts; see docs/accounting.md",
                    "tasks": model.detail_report(),
                }
        return results

    return wrapper


def _with_figures(make_table: Any) -> Any:
    @functools.wraps(make_table)
    def wrapper(result_dict: Any, column: str = "results", *args: Any, **kwargs: Any) -> str:
        table = make_table(result_dict, column, *args, **kwargs)
        if column == "results" and (left_out := not_run(result_dict) + not_in_means(result_dict)):
            table = f"{table}\n{left_out}"
        figures = ""
        if column == "results":
            from lm_eval_sparse.results.diagnostics import summary
            from lm_eval_sparse.results.figures import figures_table

            figures = figures_table(result_dict)
            if diagnosed := summary(result_dict):
                figures = f"{figures}\n{diagnosed}"
        # Names come from files and from the Hub, and a terminal would obey the control characters in them.
        return plain(f"{table}\n{figures}" if figures else table)

    return wrapper


def not_run(result_dict: Any) -> str:
    """A line per reason for which frontier leaves dropped out of the table; empty when all ran."""
    from lm_eval_sparse.labels import label

    reasons: dict[str, list[str]] = {}
    for name, config in (result_dict.get("configs") or {}).items():
        metadata = config.get("metadata") if isinstance(config, dict) else None
        if isinstance(metadata, dict) and (reason := metadata.get("skipped")):
            reasons.setdefault(label(reason, 1000), []).append(label(name))
    return "".join(f"Not run: {', '.join(names)}: {reason}\n" for reason, names in reasons.items())


def not_in_means(result_dict: Any) -> str:
    """A line for each group's leaves that its means leave out; empty when there are none."""
    from lm_eval_sparse.labels import label

    configs, subtasks = result_dict.get("configs") or {}, result_dict.get("group_subtasks") or {}
    metadata = {name: config.get("metadata") for name, config in configs.items() if isinstance(config, dict)}

    def leaves(name: str, seen: tuple[str, ...] = ()) -> list[str]:
        if not subtasks.get(name) or name in seen:
            return [name]
        return [leaf for part in subtasks[name] for leaf in leaves(part, (*seen, name))]

    lines = []
    for group in result_dict.get("groups") or {}:
        ours = list(dict.fromkeys(leaves(group)))
        out = [name for name in ours if _insensitive(metadata.get(name))]
        for name in out if len(out) < len(ours) else ():
            if not metadata[name].get("skipped"):
                phases = " and ".join(map(str, metadata[name]["insensitive"]))
                lines.append(f"Not in the means of {label(group)}: {label(name)} (insensitive in {label(phases)})\n")
    return "".join(lines)


def distinct(responses: Any) -> list[dict[str, Any]]:
    """The measurements that responses carry, each once: requests that share a context share theirs.

    Which run made them makes no difference: a run that went on from another has what a whole one has.
    """
    from lm_eval_sparse.protocol import stats_of

    found: list[dict[str, Any]] = []
    known: list[dict[str, Any]] = []
    for response in responses:
        stats = stats_of(response)
        if stats and (figures := {**stats, "run": None}) not in known:
            found.append(stats)
            known.append(figures)
    return found


def _add_to_samples(samples: dict[str, list[dict[str, Any]]]) -> None:
    from lm_eval_sparse.protocol import mean_sparsities

    for rows in samples.values():
        for row in rows:
            found = distinct(response for responses in row["resps"] for response in responses)
            row["sparse"] = {"sparsity": None, **mean_sparsities(found), "requests": found}


def _count_restored(lm: Any, task_dict: Any) -> None:
    """Tell the model of answers that lm-eval took from its response cache without asking it.

    Those that the model took from its own log are counted.
    """
    from lm_eval_sparse.protocol import window_of

    model = getattr(lm, "lm", lm)
    tasks = task_dict.get("tasks", {}) if "tasks" in task_dict else {}
    for name, task in tasks.items():
        by_document: dict[Any, list[Any]] = {}
        windows: dict[Any, int | None] = {}
        for instance in task.instances or []:
            by_document.setdefault(instance.doc_id, []).extend(instance.resps)
            windows[instance.doc_id] = window_of(instance.args[0])
        for document, responses in by_document.items():
            for stats in distinct(responses):
                if not model.reporter.is_counted(stats):
                    model.count_restored(name, stats, windows[document])
