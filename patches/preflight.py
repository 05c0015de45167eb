"""What cannot work is found before a `sparse-hf` model is built: options, files that cannot be saved, the Hub.

Works around: `simple_evaluate` builds the model before anything about files or the Hub is checked, and takes numbers
and words of any kind until they fail somewhere. Delete when lm-eval checks before the run.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import Any

from lm_eval_sparse import paths
from lm_eval_sparse.errors import UserError, nearest
from lm_eval_sparse.harness import MODEL
from lm_eval_sparse.patches.evaluator import is_ours
from lm_eval_sparse.results.files import brief
from lm_eval_sparse.values import Takes, is_number, is_whole

logger = logging.getLogger("lm_eval_sparse")


def apply(module: ModuleType) -> None:
    """Wrap functions of `lm_eval.evaluator`; for other model types only metadata of our tasks is checked."""
    for name, wrap in (("simple_evaluate", _with_preflight), ("evaluate", _with_known_samples)):
        function = getattr(module, name)
        if not getattr(function, "_lm_eval_sparse_preflight", False):
            wrapped = wrap(function)
            wrapped._lm_eval_sparse_preflight = True
            setattr(module, name, wrapped)


@dataclass(frozen=True)
class Option:
    """An option of lm-eval: how it is typed, and what its value has to be, None aside."""

    typed: str
    takes: Takes


def _is_limit(value: Any) -> bool:
    return is_number(value) and (0 < value < 1 or (1 <= value < 2**53 and float(value).is_integer()))


def _are_samples(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    rows = value.values()
    return all(isinstance(row, list | tuple) and row and all(is_whole(index, 0) for index in row) for row in rows)


_SEED = Takes("a whole number from 0 to 4294967295", lambda value: is_whole(value, 0) and value < 2**32, "1234")

_LEVELS = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")

OPTIONS: dict[str, Option] = {
    "limit": Option(
        "--limit",
        Takes("a whole number of documents of at least 1, or a share of them between 0 and 1", _is_limit, "10"),
    ),
    "samples": Option(
        "--samples",
        Takes("a JSON object of tasks and lists of document numbers from 0", _are_samples, """'{"task": [0, 1]}'"""),
    ),
    "num_fewshot": Option(
        "--num_fewshot", Takes("a whole number of at least 0", lambda value: is_whole(value, 0), "5")
    ),
    "bootstrap_iters": Option(
        "bootstrap_iters", Takes("a whole number of at least 0", lambda value: is_whole(value, 0), "1000")
    ),
    **{name: Option("--seed", _SEED) for name in ("random_seed", "numpy_random_seed", "torch_random_seed")},
    "fewshot_random_seed": Option("--seed", _SEED),
    "system_instruction": Option("--system_instruction", Takes("a text", lambda value: isinstance(value, str))),
    "use_cache": Option("--use_cache", Takes("the name of a file", lambda value: isinstance(value, str))),
    # lm-eval would find out when the run is over.
    "gen_kwargs": Option(
        "--gen_kwargs",
        Takes("name=value pairs or a JSON object", lambda value: isinstance(value, str | Mapping), "temperature=0"),
    ),
    "verbosity": Option(
        "--verbosity",
        Takes(
            f"one of {', '.join(_LEVELS)}",
            lambda value: value in _LEVELS or (is_whole(value, 0)),
            "INFO",
        ),
    ),
}


def _with_preflight(simple_evaluate: Any) -> Any:
    signature = inspect.signature(simple_evaluate)

    @functools.wraps(simple_evaluate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        if options["metadata"] and any("frontier" in str(task) for task in options["tasks"] or ()):
            from lm_eval_sparse.frontier.metadata import check_metadata

            check_metadata(options["metadata"])
            _check_keys(options)
        if options["model"] == MODEL or is_ours(options["model"]):
            _check(options)
            return simple_evaluate(*given.args, **given.kwargs)
        return simple_evaluate(*args, **kwargs)

    return wrapper


def _check_keys(options: Mapping[str, Any]) -> None:
    """Raise `UserError` for metadata that nothing reads, where all tasks are ours and we know what they read.

    Beside other tasks, which may read more, what looks like a slip is a warning.
    """
    from lm_eval_sparse.frontier.leaves import is_built_in
    from lm_eval_sparse.frontier.metadata import KNOWN, check_keys

    metadata, given = options["metadata"], options["model_args"] or {}
    if isinstance(given, str):
        from lm_eval.utils import simple_parse_args_string

        given = simple_parse_args_string(given)
    # lm-eval puts the model arguments among the metadata.
    typed = [key for key in metadata if key not in given]
    if all(is_built_in(task) for task in options["tasks"]):
        check_keys(typed)
        return
    for key in typed:
        if key not in KNOWN and (close := nearest(key, KNOWN, cutoff=0.85)):
            logger.warning("no frontier task reads %s, which --metadata gives%s", brief(key), close)


def _with_known_samples(evaluate: Any) -> Any:
    signature = inspect.signature(evaluate)

    @functools.wraps(evaluate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if is_ours(given.get("lm")):
            if given.get("samples"):
                _check_samples(given["samples"], given.get("task_dict") or {})
            _check_diagnosed(given)
        return evaluate(*args, **kwargs)

    return wrapper


def _check_samples(samples: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """lm-eval runs all documents of a task that is not named, and so of one whose name is misspelt."""
    tasks = loaded.get("tasks", {})
    for name, indexes in samples.items():
        if tasks and name not in tasks:
            raise UserError(
                f"--samples names the task {name!r}, which does not run{nearest(name, tasks)}; these do: "
                f"{', '.join(list(tasks)[:10])}"
            )
        number = len(tasks[name].eval_docs) if name in tasks else None
        if number is not None and max(indexes) >= number:
            raise UserError(f"--samples {name}: there is no document {max(indexes)}; give 0 to {number - 1}")


def _check_diagnosed(given: Mapping[str, Any]) -> None:
    """Raise `UserError` where more samples are to be diagnosed than there are documents."""
    wanted = getattr(given["lm"], "lm", given["lm"]).sparse.diagnose
    tasks, limit = (given.get("task_dict") or {}).get("tasks", {}), given.get("limit")
    if not wanted or not tasks:
        return
    numbers = {name: len(task.eval_docs) for name, task in tasks.items()}
    if limit is not None:
        numbers = {name: min(n, ceil(n * limit) if limit < 1 else int(limit)) for name, n in numbers.items()}
    numbers |= {name: len(indexes) for name, indexes in (given.get("samples") or {}).items() if name in numbers}
    if (number := sum(numbers.values())) < wanted:
        raise UserError(
            f"diagnose={wanted} is more than the {number} samples of this run: give diagnose={number} or less"
            + ("" if limit is None else f", or a larger --limit than {limit:g}")
        )


def _check(options: dict[str, Any]) -> None:
    """Raise `UserError` for what is known to be wrong by now; expands `~` in what is typed, in place."""
    if not options["tasks"]:
        raise UserError("no task was given: type --tasks NAME; lm_eval ls tasks shows the names")
    for name, option in OPTIONS.items():
        value = options[name]
        if value is not None and not option.takes.good(value):
            example = f", such as {option.typed} {option.takes.example}" if option.takes.example else ""
            raise UserError(f"{option.typed} {brief(value)} is not accepted: give {option.takes.words}{example}")
    for name in ("model_args", "metadata", "gen_kwargs", "system_instruction"):
        try:
            json.dumps(options[name], default=str, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"--{name} holds half a character, which no file can hold: leave it out") from None
        except (TypeError, ValueError):  # objects, from Python
            continue
    _check_include_path(options["task_manager"])
    _check_model(options["model"], options["model_args"])
    if options["gen_kwargs"]:
        from lm_eval.utils import simple_parse_args_string

        from lm_eval_sparse.model import generation_checks

        typed = options["gen_kwargs"]
        generation_checks.check_early(simple_parse_args_string(typed) if isinstance(typed, str) else typed)
    from lm_eval_sparse.model import parallel, response_cache
    from lm_eval_sparse.patches import hub_tracker

    tracker = options["evaluation_tracker"]
    if getattr(tracker, "output_path", None):
        # A shell leaves `~` in `--output_path=~/out`, and lm-eval would make a folder of that name.
        tracker.output_path = str(paths.expand(f"--output_path {tracker.output_path}", tracker.output_path))
    if options["use_cache"]:
        options["use_cache"] = str(paths.expand(f"--use_cache {options['use_cache']}", options["use_cache"]))
    hub_tracker.preflight(
        tracker,
        log_samples=options["log_samples"],
        limit=options["limit"],
        predict_only=options["predict_only"],
        model_args=options["model_args"] if isinstance(options["model"], str) else None,
    )
    if options["use_cache"]:
        # lm-eval appends this for the first process, and the others' names are as long.
        cache = Path(f"{options['use_cache']}_rank0.db")
        paths.check_writable(f"--use_cache {options['use_cache']}", cache.parent, response_cache.names(cache))
        response_cache.check(options["use_cache"], parallel.rank_of_cache(options["model_args"]))
    full = _wants_full_stats(options["model"], options["model_args"])
    if full and tracker is not None and not getattr(tracker, "output_path", None):
        raise UserError("stats=full writes a file next to the results: add --output_path FOLDER")


def _check_model(model: Any, model_args: Any) -> None:
    """What the model is called decides where results go, so that a wrong path must not look like theirs."""
    if not isinstance(model, str) or model_args is None:
        return
    if not isinstance(model_args, str | Mapping):
        raise UserError(f"--model_args {brief(model_args)} is not accepted: give name=value pairs or a JSON object")
    for name in ("pretrained", "peft", "delta") if isinstance(model_args, Mapping) else ():
        if isinstance(value := model_args.get(name), str) and value.strip():
            paths.expand(f"{name}={value!r}", value)


def _check_include_path(manager: Any) -> None:
    """lm-eval finds no tasks in a folder that does not exist, and says nothing. It expands no `~`."""
    given = getattr(manager, "include_path", None)
    for path in given if isinstance(given, list | tuple) else [given]:
        if path is not None and not paths.is_dir(Path(path)):
            what = "is a file" if paths.exists(Path(path)) else "does not exist"
            raise UserError(f"--include_path {paths.cut(str(path))} {what}; give a folder with the YAML files of tasks")


def _wants_full_stats(model: Any, model_args: Any) -> bool:
    """Whether `stats=full` is among the arguments of a model that is yet to be made, or was."""
    return argument(model, model_args, "stats") == "full"


def argument(model: Any, model_args: Any, name: str, default: Any = None) -> Any:
    """An argument of ours as it was typed for a model that is yet to be made, or as one that was made has it."""
    if not isinstance(model, str):
        return getattr(getattr(model, "lm", model).sparse, name)
    pairs = model_args.items() if isinstance(model_args, Mapping) else ()
    if isinstance(model_args, str):
        pairs = (typed.partition("=")[::2] for typed in model_args.split(","))
    return dict(pairs).get(name, default)
