"""Lets every `TaskManager` find our task YAMLs without `--include_path`.

Works around: lm-eval up to 0.4.13 does not read the entry-point group `lm_eval.tasks`; its `run`, `ls` and
`validate` and `simple_evaluate` all find tasks through `TaskManager.__init__`, which is therefore wrapped.
Does nothing on a lm-eval that discovers plug-in tasks itself. Delete when the oldest supported lm-eval does.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType

from lm_eval_sparse.paths import task_folders


def apply(module: ModuleType) -> None:
    """Wrap `module.TaskManager.__init__` so that our folder comes after lm-eval's own and before `include_path`.

    A manager that was asked for no default tasks gets none of ours.
    """
    manager = module.TaskManager
    if hasattr(module, "discover_plugin_task_paths") or getattr(manager, "_lm_eval_sparse", False):
        return
    original = manager.__init__
    signature = inspect.signature(original)
    if "include_path" not in signature.parameters:
        raise TypeError("TaskManager takes no include_path")
    ours = task_folders()

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        call = signature.bind(self, *args, **kwargs)
        if not call.arguments.get("include_defaults", True):
            original(*call.args, **call.kwargs)
            return
        given = call.arguments.get("include_path")
        if not given:
            theirs = []
        elif isinstance(given, (list, tuple)):
            theirs = list(given)
        else:
            theirs = [given]
        # Later folders win, so a user's task of the same name replaces ours.
        call.arguments["include_path"] = [*ours, *theirs]
        original(*call.args, **call.kwargs)
        self.include_path = given

    manager.__init__ = __init__
    manager._lm_eval_sparse = True
