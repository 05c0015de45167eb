"""Shows a user's mistake as one line under plain `lm_eval`.

Works around: lm-eval prints a traceback for whatever a model or task raises. Only our own `UserError` is affected.
Delete when lm-eval has an exception for user errors that its command line prints as one line.
"""

from __future__ import annotations

from types import ModuleType

from lm_eval_sparse.errors import install_excepthook


def apply(module: ModuleType) -> None:
    """Install the exception hook (once, however often this is called)."""
    install_excepthook()
