"""Around lm-eval's evaluator where several processes share the documents of a run of `sparse-hf`.

Works around, in lm-eval 0.4.13: a process without a document of some task raises, and the others wait for it without
end; few-shot examples are drawn one document after the other, so that they depend on which documents a process has;
`--cache_requests` builds more documents than `--limit` in each process; and a process that dies leaves the others
waiting. Delete when lm-eval lets a process have no documents, draws examples by document, and notices who is gone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

from lm_eval_sparse.patches.evaluator import is_ours


def apply(module: ModuleType) -> None:
    """Wrap `module.evaluate`; nothing changes for one process, or another model type."""
    function = module.evaluate
    if not getattr(function, "_lm_eval_sparse_processes", False):
        wrapped = _together(function)
        wrapped._lm_eval_sparse_processes = True
        module.evaluate = wrapped


def _together(evaluate: Any) -> Any:
    signature = inspect.signature(evaluate)

    @functools.wraps(evaluate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        model = getattr(given["lm"], "lm", given["lm"]) if is_ours(given.get("lm")) else None
        if model is None or model.peers is None:
            return evaluate(*args, **kwargs)
        found = given["task_dict"].get("tasks", given["task_dict"])
        tasks = {str(name): task for name, task in found.items() if hasattr(task, "build_all_requests")}
        with model.peers.watched():
            model.peers.agree(_settings(given, tasks))
            with _shared(tasks.values()):
                return evaluate(*args, **kwargs)

    return wrapper


#: Arguments of `evaluate` that decide what is asked, or what is gathered.
_DECIDE = (
    "limit", "samples", "cache_requests", "log_samples", "system_instruction", "apply_chat_template",
    "fewshot_as_multiturn",
)  # fmt: skip


def _settings(given: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, str]:
    """What has to be the same in all processes, by what it is called; tasks by a hash of their configuration."""
    found = {f"--{name}": str(given.get(name)) for name in _DECIDE}
    found["--use_cache"] = str(hasattr(given["lm"], "dbdict"))
    found["--tasks"] = ", ".join(tasks)
    for name, task in tasks.items():
        settings = json.dumps(task.dump_config(), default=lambda thing: type(thing).__name__, sort_keys=True)
        found[f"the configuration of task {name}"] = hashlib.sha256(settings.encode()).hexdigest()[:12]
    return found


@contextlib.contextmanager
def _shared(tasks: Any) -> Iterator[None]:
    """Let each task build the requests of this process as they are in one process, and none where it has none."""
    changed = []
    for task in tasks:
        task.build_all_requests = functools.partial(_build, task, task.build_all_requests)
        changed.append(task)
    try:
        yield
    finally:
        for task in changed:
            for name in ("build_all_requests", "apply_filters"):
                vars(task).pop(name, None)


def _build(task: Any, build: Any, *, rank: int, world_size: int, **options: Any) -> None:
    """lm-eval's `build_all_requests`, for documents rank, rank + world_size, … of those that one process would have."""
    drawn = bool(getattr(task.config, "num_fewshot", None))
    try:
        if drawn or options.get("cache_requests"):
            build(rank=0, world_size=1, **options)
            task._instances = [one for one in task.instances if one.doc_id % world_size == rank]
        else:
            build(rank=rank, world_size=world_size, **options)
    except ValueError as error:
        # The first process has a document wherever there is one.
        if rank == 0 or "did not find any docs" not in str(error):
            raise
        task._instances = []
    if not task._instances:
        task._instances = _Nothing()
        task.apply_filters = lambda: None


class _Nothing(list):
    """No requests. lm-eval reads the names of the filters from the first, and does the rest for each of them."""

    def __getitem__(self, index: Any) -> Any:
        return SimpleNamespace(filtered_resps={}) if index == 0 else super().__getitem__(index)
