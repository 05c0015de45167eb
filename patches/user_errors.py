"""Shows a user's mistake as one line under plain `lm_eval`, and so the end of a run that was stopped.

Works around: lm-eval prints a traceback for whatever a model or task raises, and for what it raises itself from what
was typed. Only our own `UserError` and runs of our model type are affected. Delete when lm-eval has an exception for
user errors that its command line prints as one line.
"""

from __future__ import annotations

from types import ModuleType

from lm_eval_sparse import endings, harness
from lm_eval_sparse.errors import explain, install_excepthook


def apply(module: ModuleType) -> None:
    """Install the exception hook (once, however often this is called)."""
    install_excepthook()
    explain(harness.line)
    explain(_stopped)


def _stopped(error: BaseException) -> str | None:
    """What is said when Ctrl-C or SIGTERM ended a run of ours, by then beyond the evaluation itself."""
    return endings.line(error) if isinstance(error, KeyboardInterrupt) and endings.kept() else None
