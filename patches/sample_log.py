"""A `sparse-hf` run whose results are saved goes on from the answers that are there, and scores every document.

Works around: a model type is never told where results go, nor which tasks its requests are of, and lm-eval keeps what a
document scored only where all samples are logged. Delete when lm-eval tells a model type where results go and saves the
scores of documents without the documents.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from lm_eval_sparse.patches.evaluator import distinct, is_ours
from lm_eval_sparse.protocol import SKIPPED, mean_sparsities, stats_of

#: The tracker of the evaluation that runs, which knows where results go.
_tracker: ContextVar[Any] = ContextVar("lm_eval_sparse_tracker", default=None)


def apply(module: ModuleType) -> None:
    """Wrap functions of `lm_eval.evaluator`; nothing changes for other model types."""
    for name, wrap in (("simple_evaluate", _with_tracker), ("evaluate", _with_log)):
        function = getattr(module, name)
        if not getattr(function, "_lm_eval_sparse_log", False):
            wrapped = wrap(function)
            wrapped._lm_eval_sparse_log = True
            setattr(module, name, wrapped)


def _with_tracker(simple_evaluate: Any) -> Any:
    signature = inspect.signature(simple_evaluate)

    @functools.wraps(simple_evaluate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        token = _tracker.set(signature.bind(*args, **kwargs).arguments.get("evaluation_tracker"))
        try:
            return simple_evaluate(*args, **kwargs)
        finally:
            _tracker.reset(token)

    return wrapper


def _with_log(evaluate: Any) -> Any:
    signature = inspect.signature(evaluate)

    @functools.wraps(evaluate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        tracker, loaded = _tracker.get(), given.get("task_dict") or {}
        if not is_ours(given.get("lm")) or not getattr(tracker, "output_path", None) or "tasks" not in loaded:
            return evaluate(*args, **kwargs)
        model, tasks = getattr(given["lm"], "lm", given["lm"]), loaded["tasks"]
        tracker._lm_eval_sparse_documents = []
        with _log(model, _folder(tracker), tasks), _scored(tasks) as scores:
            results = evaluate(*args, **kwargs)
        picked = given.get("samples") or {}
        rows = [row for name, task in tasks.items() for row in scores[name].rows(name, task, picked.get(name))]
        parts = model.gather_object(rows, dst=0) if model.world_size > 1 else [rows]
        order = {name: number for number, name in enumerate(tasks)}
        rows = [row for part in parts or () for row in part]
        tracker._lm_eval_sparse_documents = sorted(rows, key=lambda row: (order[row["task"]], row["doc_id"]))
        return results

    return wrapper


def _folder(tracker: Any) -> Path:
    from lm_eval_sparse.patches import saving

    return saving.place(tracker)[0]


# --- the log ----------------------------------------------------------------------------------------------------------


@contextmanager
def _log(model: Any, output: Path, tasks: Mapping[str, Any]) -> Iterator[None]:
    """Let the model go on from the log in `output`."""
    model.open_log(output, {task.config.task: _decides(task) for task in tasks.values()})
    try:
        yield
    finally:
        model.close_log()


def _decides(task: Any) -> str:
    """What decides the requests of a task beside the document and the texts made of it, which are looked at themselves.

    Metrics and filters are not among it: lm-eval scores answers from the log as it scores new ones.
    """
    from lm_eval_sparse.model.resume import digest

    config = task.config
    metadata = config.metadata if isinstance(config.metadata, Mapping) else {}
    settings = ("output_type", "dataset_path", "dataset_name", "test_split", "validation_split", "num_fewshot")
    said = [getattr(config, setting, None) for setting in settings]
    return digest([config.task, str(task.VERSION), str(metadata.get("version")), said])


# --- scores of documents ----------------------------------------------------------------------------------------------


class _Scores:
    """What the documents of a task scored in this process, in the order in which lm-eval asks: filter by filter."""

    def __init__(self) -> None:
        self.document: Any = None
        self.rounds: list[list[tuple[Any, Any, Mapping[str, Any]]]] = []

    def iterator(self, original: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        """As `doc_iterator`, and notes which document is at hand."""

        @functools.wraps(original)
        def doc_iterator(*args: Any, **kwargs: Any) -> Iterator[Any]:
            self.rounds.append([])
            for number, document in original(*args, **kwargs):
                self.document = number
                yield number, document

        return doc_iterator

    def process(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """As `process_results`, and notes what it gives."""

        @functools.wraps(original)
        def process_results(doc: Any, results: Any, *args: Any, **kwargs: Any) -> Any:
            metrics = original(doc, results, *args, **kwargs)
            if self.rounds and isinstance(metrics, Mapping):
                self.rounds[-1].append((self.document, doc, metrics))
            return metrics

        return process_results

    def rows(self, called: str, task: Any, samples: Sequence[int] | None) -> list[dict[str, Any]]:
        """A row for each filter and document. `called`: the task; `samples`: documents that were picked."""
        instances: dict[Any, list[Any]] = {}
        for instance in task.instances or ():
            instances.setdefault(instance.doc_id, []).append(instance)
        filters = list(task.instances[0].filtered_resps) if task.instances else []
        rounds = [found for found in self.rounds if found]  # requests are built in a round of their own
        # lm-eval numbers the documents that --samples picks in the order of the data, whatever was typed.
        picked = sorted(set(samples or ()))
        made = []
        for name, found in zip(filters, rounds, strict=False):
            for number, doc, metrics in found:
                if isinstance(doc, Mapping) and doc.get(SKIPPED) is not None:
                    continue
                own = instances.get(number, [])
                responses = [response for instance in own for response in instance.resps]
                repeats = max((instance.repeats or 1 for instance in own), default=1)
                made.append({
                    "task": called,
                    "doc_id": picked[number] if picked else number,
                    "doc_hash": _doc_hash(own[0].doc if own else doc),
                    "filter": name,
                    **({"repeats": repeats} if repeats > 1 else {}),
                    "metrics": {metric: _plain(value) for metric, value in metrics.items() if _is_score(value)},
                    **mean_sparsities(distinct(responses)),
                    "runs": list(dict.fromkeys(stats["run"] for r in responses if (stats := stats_of(r)))),
                })  # fmt: skip
        return made


@contextmanager
def _scored(tasks: Mapping[str, Any]) -> Iterator[dict[str, _Scores]]:
    """Note what the documents of these tasks score meanwhile."""
    found = {name: _Scores() for name in tasks}
    try:
        for name, task in tasks.items():
            task.doc_iterator = found[name].iterator(task.doc_iterator)
            task.process_results = found[name].process(task.process_results)
        yield found
    finally:
        for task in tasks.values():
            for name in ("doc_iterator", "process_results"):
                task.__dict__.pop(name, None)


def _is_score(value: Any) -> bool:
    """Whether a document's value of a metric is a number, or a few: of metrics of a whole corpus it may be texts."""
    if isinstance(value, list | tuple):
        return len(value) <= 8 and all(not isinstance(one, list | tuple) and _is_score(one) for one in value)
    return isinstance(_plain(value), bool | int | float)


def _plain(value: Any) -> Any:
    """A number as JSON has them, also one of numpy's or torch's."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _doc_hash(doc: Any) -> str | None:
    """As lm-eval's, by which these rows are found in files of samples."""
    from lm_eval.utils import handle_non_serializable, hash_string

    try:
        return hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False))
    except (TypeError, ValueError):  # half a character
        return None
