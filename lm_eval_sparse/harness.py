"""What lm-eval raises from what the user typed, in one line; and its results without secrets.

Knows the names of lm-eval's modules and functions, and the parts of its results, only.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from . import masking
from .errors import UserError, nearest
from .paths import is_dir
from .results.files import why

MODEL = "sparse-hf"

#: Calls of lm-eval's command line that only read what was typed: whatever they raise is about that.
READING = {
    ("lm_eval.config.evaluate_config", "from_cli"),
    ("lm_eval.config.evaluate_config", "process_tasks"),
    ("lm_eval._cli.harness", "parse_args"),
    ("lm_eval.api.registry", "get_model"),
    ("lm_eval.loggers.evaluation_tracker", "__init__"),
    ("lm_eval.loggers.wandb_logger", "__init__"),
    ("lm_eval.loggers.trackio_logger", "__init__"),
    ("lm_eval._cli.ls", "_execute"),
    ("lm_eval._cli.validate", "_execute"),
}
#: Calls of an evaluation that find and build tasks by the names and files that were typed.
BUILDING = {
    ("lm_eval.tasks.manager", "load"),
    ("lm_eval.tasks.manager", "__init__"),
    ("lm_eval.api.task", "build_all_requests"),
}
#: Calls that read one option, and the option.
OPTIONS = {
    ("lm_eval.config.evaluate_config", "_process_arguments"): "--samples",
    ("lm_eval.config.evaluate_config", "load_yaml_config"): "--config",
    ("lm_eval.loggers.wandb_logger", "__init__"): "--wandb_args",
    ("lm_eval.loggers.trackio_logger", "__init__"): "--trackio_args",
    ("lm_eval.tasks.manager", "__init__"): "--include_path",
}
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
    building = sparse and any(place in BUILDING for place in places) and not _own_code(frames)
    called = sparse and places and places[-1][0] in CALLED and isinstance(error, ValueError | TypeError)
    # Arguments that a model type of lm-eval's own does not take.
    refused = ours and places[-1:] == [("lm_eval.api.model", "create_from_arg_obj")] and isinstance(error, TypeError)
    if not (reading or building or called or refused):
        return None
    text = why(error)
    if not isinstance(error, ValueError | OSError):  # whose words are made to be read
        text = f"{type(error).__name__}: {text}"
    if building and not reading:
        text = f"the tasks cannot be built: {text}"
    said = f"{_option(frames, places, text)}{text.rstrip('.')}{_near(text, frames)}{_nowhere(frames)}"
    return f"{said}; type 'lm_eval run --help' to see what is accepted"


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


def _own_code(frames: list[FrameType]) -> bool:
    """Whether the error came from code that is neither Python's nor an installed package's: a task of the user's, whose
    author needs to see where."""
    roots = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    here = str(Path(__file__).parents[1])
    files = [frame.f_code.co_filename for frame in frames[1:]]
    return any(not file.startswith((*roots, here, "<")) for file in files)


def _option(frames: list[FrameType], places: list[tuple[str, str]], text: str) -> str:
    """The option that was being read, as the message begins; empty where that is not known."""
    options = [frame.f_locals.get("option_string") for frame in frames]
    options += [OPTIONS.get(place) for place in places]
    found = next((option for option in reversed(options) if isinstance(option, str)), None)
    if found is None and "Sample larger than population" in text:  # so says the module random
        found = "--num_fewshot, more examples than a task has"
    return f"{found}: " if found else ""


def _nowhere(frames: list[FrameType]) -> str:
    """A folder with tasks that was named and is none: lm-eval finds no tasks there, and says nothing."""
    for frame in frames:
        given = getattr(frame.f_locals.get("task_manager"), "include_path", None)
        for path in given if isinstance(given, list | tuple) else [given]:
            if path is not None and not is_dir(Path(path)):
                return f"; --include_path {path} is no folder"
    return ""


def _near(text: str, frames: list[FrameType]) -> str:
    """The names nearest to one that was not found, from the task manager that looked for it."""
    _, found, names = text.partition("Tasks not found: ")
    managers = (frame.f_locals.get("task_manager") for frame in frames)
    manager = next((manager for manager in managers if hasattr(manager, "all_tasks")), None)
    return nearest(names.split(",")[0].strip(), manager.all_tasks) if found and manager is not None else ""


def without_secrets(results: Any, secrets: frozenset[str]) -> Any:
    """Results as they may be saved, printed and pushed.

    Names tell secrets among settings only: elsewhere they are those of tasks, metrics and the data's own fields. In
    samples only the secrets that were given are looked for: what looks like one there is masked when they are saved.
    """
    if not isinstance(results, dict):
        return results
    masked = {}
    for part, value in results.items():
        if part == "config":
            masked[part] = masking.masked(value, secrets)
        elif part == "configs" and isinstance(value, dict):
            masked[part] = {
                masking.masked(task, secrets, shapes=False): masking.masked(settings, secrets)
                for task, settings in value.items()
            }
        elif part == "samples":
            masked[part] = masking.masked(value, secrets, names=False, shapes=False) if secrets else value
        else:
            masked[part] = masking.masked(value, secrets, names=False)
    return masked
