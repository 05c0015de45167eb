"""What lm-eval raises from what the user typed, in one line. Knows lm-eval's module and function names only."""

from __future__ import annotations

from types import FrameType, TracebackType
from typing import Any

from .errors import UserError, nearest
from .files import why

MODEL = "sparse-hf"

#: Calls of lm-eval's command line that only read what was typed: whatever they raise is about that.
READING = {
    ("lm_eval.config.evaluate_config", "from_cli"),
    ("lm_eval.config.evaluate_config", "process_tasks"),
    ("lm_eval._cli.harness", "parse_args"),
    ("lm_eval.loggers.evaluation_tracker", "__init__"),
    ("lm_eval.loggers.wandb_logger", "__init__"),
    ("lm_eval.loggers.trackio_logger", "__init__"),
    ("lm_eval._cli.ls", "_execute"),
    ("lm_eval._cli.validate", "_execute"),
}
#: Calls of an evaluation that find and build tasks by the names and files that were typed.
BUILDING = {("lm_eval.tasks.manager", "load"), ("lm_eval.tasks.manager", "__init__")}
#: Modules whose own errors (not those of what they call) are about how they were called.
CALLED = ("lm_eval.evaluator", "lm_eval.evaluator_utils", "lm_eval.utils")


def line(error: BaseException, ours: bool = False) -> str | None:
    """What to say of an error that lm-eval raised from what was typed, or None for any other.

    Args:
        ours: this is our own script. Else only runs of our model type are spoken for; lm-eval speaks for the others.
    """
    if not isinstance(error, Exception) or isinstance(error, UserError):
        return None
    frames = _frames(error.__traceback__)
    places = [(str(frame.f_globals.get("__name__")), frame.f_code.co_name) for frame in frames]
    sparse = any(_model(frame) == MODEL for frame in frames)
    if not (ours or sparse):
        return None
    reading = any(place in READING for place in places)
    building = sparse and any(place in BUILDING for place in places)
    called = sparse and places and places[-1][0] in CALLED and isinstance(error, ValueError | TypeError)
    if not (reading or building or called):
        return None
    text = why(error)
    if not isinstance(error, ValueError | OSError):  # whose words are made to be read
        text = f"{type(error).__name__}: {text}"
    if building and not reading:
        text = f"the tasks cannot be built: {text}"
    return f"{text.rstrip('.')}{_near(text, frames)}; type 'lm_eval run --help' to see what is accepted"


def _frames(traceback: TracebackType | None) -> list[FrameType]:
    found = []
    while traceback is not None:
        found.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return found


def _model(frame: FrameType) -> Any:
    """The model type that this frame of lm-eval's is about to run, if it is one that knows."""
    if not str(frame.f_globals.get("__name__", "")).startswith("lm_eval."):
        return None
    names = frame.f_locals
    for owner in ("cfg", "args", "instance"):
        if (model := getattr(names.get(owner), "model", None)) is not None:
            return model
    return names.get("model") if frame.f_code.co_name == "simple_evaluate" else None


def _near(text: str, frames: list[FrameType]) -> str:
    """The names nearest to one that was not found, from the task manager that looked for it."""
    _, found, names = text.partition("Tasks not found: ")
    managers = (frame.f_locals.get("task_manager") for frame in frames)
    manager = next((manager for manager in managers if hasattr(manager, "all_tasks")), None)
    return nearest(names.split(",")[0].strip(), manager.all_tasks) if found and manager is not None else ""
