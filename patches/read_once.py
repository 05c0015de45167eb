"""Reads a YAML file that many tasks include once, while tasks are listed.

Works around: lm-eval up to 0.4.13 parses 13,986 files of tasks at every start and, for each of them, once more what it
includes: 12,640 times one of 686 files, half of the time. What is found, and what is refused, stays the same.
Delete when lm-eval reads included files once, or finds tasks without reading all of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def apply(module: ModuleType) -> None:
    """Wrap `TaskIndex.build` and `TaskManager.list_all_tasks` of `lm_eval.tasks.manager`, where they are as known."""
    try:
        from lm_eval.tasks import _yaml_loader as loader

        index = module.TaskIndex
        if "_seen" not in inspect.signature(loader.load_yaml).parameters:
            return
    except (ImportError, AttributeError):
        return
    for owner, name in ((index, "build"), (module.TaskManager, "list_all_tasks")):
        function = getattr(owner, name, None)
        if function is None or getattr(function, "_lm_eval_sparse", False):
            continue
        wrapped = _reading_once(function, loader)
        wrapped._lm_eval_sparse = True  # type: ignore[attr-defined]
        setattr(owner, name, staticmethod(wrapped) if owner is index else wrapped)


def _reading_once(function: Callable[..., Any], loader: ModuleType) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _remembered(loader):
            return function(*args, **kwargs)

    return wrapper


@contextmanager
def _remembered(loader: ModuleType) -> Iterator[None]:
    """Inside the block `load_yaml` remembers what was included: it calls itself by its name in `loader`.

    lm-eval copies the settings of a task before it changes them, so tasks may share what they include.
    """
    original, make = loader.load_yaml, getattr(loader, "_make_loader", None)
    #: Settings, and the files that they were read from.
    known: dict[str, tuple[dict[str, Any], set[Any]]] = {}

    def load_yaml(path: Any, *, resolve_func: bool = True, recursive: bool = True, _seen: Any = None) -> Any:
        if resolve_func or not recursive or _seen is None:  # not an included file of one that is listed
            return original(path, resolve_func=resolve_func, recursive=recursive, _seen=_seen)
        settings, read = known.get(str(path), ({}, _seen))
        if read & _seen:  # not known, or a file comes twice: for lm-eval to refuse
            before = set(_seen)
            settings = original(path, resolve_func=False, recursive=True, _seen=_seen)
            known[str(path)] = settings, _seen - before
        else:
            _seen |= read
        return dict(settings)

    loader.load_yaml = load_yaml
    if make is not None:  # a class for each file, which is the same for all of a folder
        loader._make_loader = functools.cache(make)
    try:
        yield
    finally:
        loader.load_yaml = original
        if make is not None:
            loader._make_loader = make


__all__ = ["apply"]
