"""Around a whole evaluation of `sparse-hf`: secrets stay out of logs and results, and a stopped run says what is kept.

Works around: lm-eval logs, prints and saves model arguments and metadata as they were typed, tokens included, and ends
in a traceback when it is stopped. Delete when lm-eval masks secrets and says what a stopped run leaves.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sqlite3
import sys
from collections.abc import Iterator
from types import FrameType, ModuleType
from typing import Any

from lm_eval_sparse import endings, harness, masking, paths
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.harness import MODEL
from lm_eval_sparse.model.resume import FOLDER
from lm_eval_sparse.patches import preflight
from lm_eval_sparse.patches.evaluator import is_ours


def apply(module: ModuleType) -> None:
    """Wrap `module.simple_evaluate` (as the last of the patches, so that it is the outermost)."""
    function = module.simple_evaluate
    if not getattr(function, "_lm_eval_sparse_guarded", False):
        wrapped = _guarded(function)
        wrapped._lm_eval_sparse_guarded = True
        module.simple_evaluate = wrapped


def _guarded(simple_evaluate: Any) -> Any:
    signature = inspect.signature(simple_evaluate)

    @functools.wraps(simple_evaluate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        options = signature.bind(*args, **kwargs).arguments
        if options.get("model") != MODEL and not is_ours(options.get("model")):
            return simple_evaluate(*args, **kwargs)
        frame = inspect.currentframe()
        typed = _typed(frame.f_back if frame else None)
        tracker = options.get("evaluation_tracker")
        token = getattr(getattr(tracker, "api", None), "token", None)
        secrets = masking.values_in(options.get("model_args"), options.get("metadata"), {"token": token})
        masking.remember(secrets)
        if tracker is not None:
            tracker._lm_eval_sparse_secrets = secrets
        with masking.masked_logs(secrets), _explained(options):
            if not typed:
                return harness.without_secrets(simple_evaluate(*args, **kwargs), secrets)
            endings.keep(_kept(options))
            try:
                with endings.sigterm_raises():
                    results = simple_evaluate(*args, **kwargs)
            except KeyboardInterrupt as error:
                print(f"lm-eval-sparse: error: {endings.line(error)}", file=sys.stderr)
                endings.stop()
                raise SystemExit(endings.status(error)) from None
        if isinstance(options.get("model_args"), dict):
            # lm-eval's command line prints its own copy once it has saved the results.
            options["model_args"].update(masking.masked(options["model_args"], secrets))
        return harness.without_secrets(results, secrets)

    return wrapper


@contextlib.contextmanager
def _explained(options: dict[str, Any]) -> Iterator[None]:
    """One line for two ends that would look like success or like a mistake of ours."""
    try:
        yield
    except SystemExit as ended:
        if endings.stopped():
            raise
        raise UserError(
            f"code of a task or of the model ended the run (sys.exit({ended.code!r})): no results were saved; mend "
            "that code, or leave the task out"
        ) from ended
    except sqlite3.OperationalError as error:
        raise UserError(
            f"--use_cache {options.get('use_cache')}: no more answers can be kept ({error}); those given so far are: "
            "make room, and type the same line to go on from there"
        ) from error


def _typed(frame: FrameType | None) -> bool:
    """Whether the caller is lm-eval's command line. A Python program handles what it is sent itself."""
    while frame is not None and frame.f_globals.get("__name__", "").startswith("lm_eval_sparse."):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == "lm_eval._cli.run"


def _kept(options: dict[str, Any]) -> str:
    """What a run that is stopped leaves, and what to type to go on."""
    documents = f"documents made so far are kept in {paths.cache_root()}"
    kept = []
    if output := getattr(options.get("evaluation_tracker"), "output_path", None):
        model, typed = options.get("model"), options.get("model_args")
        if preflight.argument(model, typed, "resume", True) not in (0, "0", "False"):
            kept.append(f"below {output} ({FOLDER})")
    if cache := options.get("use_cache"):
        kept.append(f"in {cache}_rank*.db (--use_cache)")
    if kept:
        return (
            f"no results were saved; answers given so far are kept {' and '.join(kept)} and {documents}; type the same "
            "line to go on from there"
        )
    return (
        f"no results were saved; {documents}; type the same line to start again, with --output_path DIR in it if "
        "answers are to be kept the next time"
    )
