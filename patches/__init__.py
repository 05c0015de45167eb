"""What makes released versions of lm-eval and transformers see us, one file per workaround.

Every patch module has `apply(module) -> None`, which changes the given, freshly imported module and may be called
again on a module it has already changed. Its docstring says what it works around and when to delete it.
Nothing heavy is imported here: this runs in every process that imports lm-eval.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

#: Imported module -> the patches applied to it, in this order. `_lm_eval_sparse_hook.TARGETS` lists the same names.
PATCHES: dict[str, tuple[str, ...]] = {
    "lm_eval.models": ("register_model",),
    "lm_eval.tasks.manager": ("register_tasks", "read_once"),
    "lm_eval.evaluator": (
        "user_errors",
        "evaluator",
        "sample_log",
        "preflight",
        "several_processes",
        "task_tokenizer",
        "guarded_run",
    ),  # fmt: skip
    "lm_eval.config.evaluate_config": ("masked_config",),
    "lm_eval.loggers.evaluation_tracker": ("hub_tracker", "stats_file"),
}

_log = logging.getLogger("lm_eval_sparse")
_warned: set[str] = set()


def install() -> None:
    """Install the import hook, whether or not a start-up file already did; lm-eval may be imported or not yet."""
    try:
        from lm_eval_sparse.patches import _lm_eval_sparse_hook as hook
    except ImportError:
        # A wheel has the hook at the root of site-packages instead, where the start-up files find it.
        import _lm_eval_sparse_hook as hook
    hook.install()


def after_import(name: str, module: ModuleType) -> None:
    """Apply the patches of module `name`. One that is missing or fails costs one warning, never an exception."""
    for patch in PATCHES.get(name, ()):
        try:
            importlib.import_module(f"{__name__}.{patch}").apply(module)
        except Exception as error:
            if patch in _warned:
                continue
            _warned.add(patch)
            _log.warning(
                "lm-eval-sparse: patch %r was not applied to %s (%s: %s); lm-eval runs without it.",
                patch,
                name,
                type(error).__name__,
                error,
            )
