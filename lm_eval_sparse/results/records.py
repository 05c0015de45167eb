"""From a result file of lm-eval to records, one for each task and metric. Knows lm-eval's result files.

Long, since each part of a result file that a record needs is read here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import UserError
from . import arguments
from .documents import Scores, of_samples
from .figures import PHASES
from .parts import MISSING, Part, is_finite
from .reproduce import reproduce_command
from .schema import Documents, PhaseFigures, Range, Record, Shape, are_of, is_share, said

#: Measurements among lm-eval's metrics, and what it writes where nothing is scored.
MEASURED = ("sparsity", "prefill_sparsity", "kv_sparsity", "decode_sparsity", "bypass")
#: What stands for a figure that there is not.
_NONE = (None, "N/A", MISSING)
#: What makes the prompts and scores of a task, of all that lm-eval says of it.
_DECIDES = (
    "task", "dataset_path", "dataset_name", "dataset_kwargs", "test_split", "validation_split", "fewshot_split",
    "process_docs", "doc_to_text", "doc_to_target", "doc_to_choice", "process_results", "use_prompt", "description",
    "target_delimiter", "fewshot_delimiter", "gen_prefix", "output_type", "generation_kwargs", "repeats", "filter_list",
    "metric_list",
)  # fmt: skip
#: The same of few-shot examples, and of what users may set of our tasks. Seed and length are fields of their own.
_FEWSHOT = ("training_split", "fewshot_config")
_METADATA = ("question_first",)
#: Where a function lay in the memory of one process.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_SEEDS = {"random": "random_seed", "numpy": "numpy_seed", "torch": "torch_seed", "fewshot": "fewshot_seed"}
_FIGURES = {
    "requested": "requested_sparsity",
    "selected": "selected_sparsity",
    "executed": "executed_sparsity",
    "bytes_read_fraction": "bytes_read_fraction",
    "kv_memory_fraction": "kv_memory_fraction",
    "estimator_flops_fraction": "estimator_flops_fraction",
}
_DIAGNOSED = {
    "mass_kept": "mass_kept",
    "output_error": "output_error",
    "oracle_overlap": "oracle_overlap",
    "auxiliary_bits": "auxiliary_bits_per_token",
}


@dataclass(frozen=True)
class _Measured:
    """What a run of a task says of sparsity."""

    method: str
    phases: str
    requested: float | None
    measured: float


def records(
    content: dict[str, Any],
    where: str = "the results",
    unusable: list[str] | None = None,
    documents: Scores | None = None,
    path: Path | None = None,
) -> Iterator[Record]:
    """The scores in one result file. Rows of measured sparsity are measurements, not scores, and are left out.

    Args:
        content: a JSON object of any shape.
        where: the file, as messages begin.
        unusable: is given what says of each score and standard error that is no finite number, or cannot be, that it is
            none; such a score has no record. Likewise of a task with a figure that cannot be, and of documents whose
            mean the score is not.
        documents: scores by document, where there are any.
        path: the file itself, beside which lm-eval's samples may lie.

    Raises:
        UserError: a part that all tasks share, or the only one that there is, has another shape than lm-eval gives it.
    """
    left_out = unusable if unusable is not None else []
    try:
        json.dumps(content, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        content = _whole_characters(content)
    except ValueError:
        pass  # numbers of thousands of digits are refused where they stand
    try:
        return iter(_records(Part(where, "", content), left_out, documents or {}, path))
    except ValidationError as error:  # a figure that cannot be, such as a negative one
        raise UserError(f"{where}: {said(error)}") from None


def _records(whole: Part, left_out: list[str], documents: Scores, path: Path | None) -> list[Record]:
    where = whole.where
    whole["results"].object()
    whole["config"].object()
    run = _run(whole)
    groups = set(whole["groups"].object()) if whole["groups"] else set()
    found: list[Record] = []
    refused: list[UserError] = []
    for task, row in whole["results"].items():
        try:
            found += _of_task(whole, task, row, run, task in groups, left_out, documents, path)
        except UserError as error:  # what is wrong with one task says nothing of the others
            refused.append(error)
        except ValidationError as error:
            refused.append(UserError(f"{where}: results.{task}: {said(error)}"))
    if refused and not found:
        raise refused[0]
    left_out += dict.fromkeys(map(str, refused))
    return found


def _of_task(
    whole: Part,
    task: str,
    row: Part,
    run: dict[str, Any],
    group: bool,
    left_out: list[str],
    documents: Scores,
    path: Path | None,
) -> list[Record]:
    """The scores of one task. Raises `UserError` and `ValidationError`."""
    where = whole.where
    # In a run of ours, groups and skipped tasks have no measurement of their own.
    if (measured := _measured(whole["config"]["sparse"], task)) is None or group:
        row.object()
        return []
    n = row["sample_len"].count() if row["sample_len"] else _samples(whole, task)
    scores = list(_scores(row, left_out))
    if scores and not n:
        left_out.append(f"{where}: results.{task} has no documents (sample_len and n-samples are missing or 0)")
        return []
    about = _about(whole, task) if scores else {}
    if scores and path is not None and not any(key[0] == task for key in documents):
        try:
            documents = of_samples(path, task)
        except UserError as error:  # scores stand without them
            left_out.append(str(error))
    found: list[Record] = []
    for metric, rule, score, stderr in scores:
        try:
            found.append(
                Record(
                    **run,
                    **about,
                    method=measured.method,
                    phases=measured.phases,
                    requested=measured.requested,
                    measured=measured.measured,
                    metric=metric if rule == "none" else f"{metric},{rule}",
                    score=score,
                    stderr=stderr,
                    n=n,
                    higher_is_better=_higher_is_better(whole["higher_is_better"], task, metric),
                    chance=_chance(whole, task, metric),
                    documents=_documents(documents.get((task, metric, rule)), score, n, where, task, metric, left_out),
                )
            )
        except ValidationError as error:
            left_out.append(f"{where}: results.{task}.{metric}: {said(error)}")
    return found


def _samples(whole: Part, task: str) -> int:
    """Documents of a task as older versions of lm-eval say it."""
    counted = whole["n-samples"]
    if not counted or not isinstance(counted[task].value, dict):
        return 0
    effective = counted[task]["effective"]
    return effective.count() if effective else 0


def _documents(
    found: Documents | None, score: float, n: int, where: str, task: str, metric: str, left_out: list[str]
) -> Documents | None:
    if found is None or are_of(found, score, n):
        return found
    if len(found.scores) != n:
        left_out.append(f"{where}: of {task} {len(found.scores)} documents are beside it and {n} were scored")
    # Of others a score may be none of a mean; one that cannot be is a line of its own.
    elif is_share(task, metric) and 0 <= score <= 1:
        left_out.append(
            f"{where}: {metric} of {task} is {score:.4g} and not the mean of the documents beside it: they are not used"
        )
    return None


def _run(whole: Part) -> dict[str, Any]:
    """What all tasks of a run share."""
    config, sparse = whole["config"], whole["config"]["sparse"]
    model_args = arguments.masked(config["model_args"])
    method, asked = model_args.get("method", "dense"), model_args.get("sparsity", 0)
    if not sparse and (_text(config["model"]) == "sparse-hf" or method != "dense" or asked not in (0, None)):
        raise UserError(
            f"{whole.where}: a run of sparse-hf without what it measured (config.sparse is missing), so nothing says "
            "whether it was dense; run it again"
        )
    seconds = whole["total_evaluation_time_seconds"]
    found: dict[str, Any] = {
        "model": _model(whole, model_args),
        "model_revision": _text(config["model_revision"]),
        "model_hash": _text(config["model_sha"]),
        "model_dtype": (_text(config["model_dtype"]) or "").removeprefix("torch.") or None,
        "model_parameters": _count(config["model_num_parameters"]),
        "runner": _text(config["model"]) or "?",
        "gen_kwargs": arguments.given(config["gen_kwargs"]),
        "fewshot_as_multiturn": _flag(whole["fewshot_as_multiturn"]),
        "chat_template": _short(whole["chat_template_sha"]),
        "system_instruction": _short(whole["system_instruction_sha"]),
        "seeds": {name: _whole(config[key]) for name, key in _SEEDS.items() if config[key]},
        "seconds": seconds.seconds() if seconds else None,
        "commit": _text(whole["git_hash"]),
        "date": _date(whole["date"]),
        "command": reproduce_command(whole.value),
        "model_args": model_args,
        "source": whole.where,
        "versions": {
            name: version
            for name, key in (("lm_eval", "lm_eval_version"), ("transformers", "transformers_version"))
            if (version := _text(whole[key]))
        },
    }
    if not sparse:
        found["device"] = _text(config["device"])
        return found
    ran = sparse["run"]
    if sparse["versions"]:
        found["versions"] |= {name: part.value for name, part in sparse["versions"].items() if _text(part)}
    found |= {
        "preset": _text(sparse["preset"]),
        "knobs": _object(sparse["knobs"]),
        "budget_knobs": _object(sparse["budget_knobs"]),
        "code": _object(sparse["code"]),
        "backend": _text(sparse["backend"]),
        "device": _text(sparse["device"]),
        "model_shape": Shape(**{k: v for k, v in _object(sparse["model"]).items() if k in Shape.model_fields})
        if sparse["model"]
        else None,
    }
    if ran:
        found |= {
            "seconds_by_phase": _numbers(ran["seconds"]),
            "speed": _numbers(ran["tokens_per_second"]),
            "peak_memory_bytes": _count(ran["peak_memory_bytes"]["seen"]) if ran["peak_memory_bytes"] else None,
        }
    return found


def _about(whole: Part, task: str) -> dict[str, Any]:
    """What a file says of one task."""
    configs, tasks = whole["configs"], whole["config"]["sparse"]
    given = configs[task] if configs and configs[task] else None
    metadata = given["metadata"] if given is not None and isinstance(given["metadata"].value, dict) else None
    version = whole["versions"][task].value if whole["versions"] else None
    measured = tasks["tasks"][task] if tasks else None
    prompts = measured["prompts"] if measured is not None else None
    found: dict[str, Any] = {
        "task": task,
        "task_version": None if version in _NONE else str(version),
        "task_hash": _task_hash(given),
        "length": _count(metadata["length"]) if metadata is not None else None,
        "seed": _whole(metadata["seed"]) if metadata is not None else None,
        "prompt_tokens": _mean_of(prompts),
        "output_type": _text(given["output_type"]) if given is not None else None,
        "shots": _count(whole["n-shot"][task]) if whole["n-shot"] else None,
    }
    if measured is not None:
        found["by_phase"] = {name: _figures(phase) for name, phase in measured.items() if name in PHASES}
    return found


def _figures(phase: Part) -> PhaseFigures:
    found: dict[str, Any] = {"method": phase["method"].text()} if phase["method"] else {}
    for name, key in _FIGURES.items():
        if phase[key]:
            found[name] = phase[key].share() if name in ("requested", "selected", "executed") else phase[key].seconds()
    for name in ("calls", "backends"):
        if phase[name]:
            found[name] = {key: part.count() for key, part in phase[name].items()}
    if phase["knobs_solved"]:
        found["solved"] = {
            knob: Range(**{end: float(part[end].value) for end in ("mean", "min", "max")})
            for knob, part in phase["knobs_solved"].items()
            if all(is_finite(part[end].value) for end in ("mean", "min", "max"))
        }
    if phase["diagnostics"] and (means := phase["diagnostics"]["mean"]):
        found |= {name: float(means[key].value) for name, key in _DIAGNOSED.items() if is_finite(means[key].value)}
    return PhaseFigures(**found)


def _task_hash(given: Part | None) -> str | None:
    """Of what makes prompts and scores. Where files lie, and what a run adds, is left out."""
    if given is None:
        return None
    decides = {name: given[name].value for name in _DECIDES if given[name].value is not MISSING}
    if given["num_fewshot"].value not in (None, 0, MISSING):
        decides |= {name: given[name].value for name in _FEWSHOT if given[name].value is not MISSING}
    if isinstance(metadata := given["metadata"].value, dict):
        decides |= {name: metadata[name] for name in _METADATA if name in metadata}
    text = _ADDRESS.sub("", json.dumps(decides, sort_keys=True, default=str))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _chance(whole: Part, task: str, metric: str) -> float | None:
    """The score without knowledge, where the task says it or it follows from how it is asked."""
    configs = whole["configs"]
    if not configs or not configs[task]:
        return None
    given = configs[task]
    metadata = given["metadata"].value
    levels = metadata.get("chance") if isinstance(metadata, dict) else None
    if isinstance(levels, dict) and is_finite(levels.get(metric)):
        return float(levels[metric])
    choices = given["doc_to_choice"].value
    if given["output_type"].value == "multiple_choice" and metric in ("acc", "acc_norm", "acc_mutual_info"):
        return 1 / len(choices) if isinstance(choices, list) and choices else None
    # An answer that is written may be one of four letters all the same: what guessing scores has to be said.
    return None


def _measured(sparse: Part, task: str) -> _Measured | None:
    """The sparsity of a task; None where none was measured. Other model types are dense."""
    if not sparse:
        return _Measured("dense", "", 0.0, 0.0)
    method, tasks = sparse["method"].text(), sparse["tasks"]
    tasks.object()
    asked = sparse["requested_sparsity"].share() if sparse["requested_sparsity"] else None
    if tasks[task].value is MISSING:
        return None
    phases = {name: phase for name, phase in tasks[task].items() if name in PHASES}
    methods = {name: phase["method"].text() for name, phase in phases.items() if phase["method"]}
    filled = [name for name in PHASES if methods.get(name, "dense") != "dense"]
    parts = [phases[name] for name in filled or ["prefill"] if name in phases]
    measured = _mean(_share(phase["executed_sparsity"]) for phase in parts)
    if measured is None:
        return None
    if len(parts) > 1:
        asked = _mean(_share(phase["requested_sparsity"]) for phase in parts)
    return _Measured(method, "+".join(filled), asked, measured)


def _scores(row: Part, unusable: list[str]) -> Iterator[tuple[str, str, float, float | None]]:
    """Metric, filter, score and standard error of what can be drawn of a task's row."""
    for key, part in row.items():
        metric, _, rule = key.partition(",")
        if not rule or metric.endswith("_stderr") or metric in MEASURED or part.value in _NONE:
            continue
        if not is_finite(part.value):
            unusable.append(str(part.refuse("a finite number")))
            continue
        error = row[f"{metric}_stderr,{rule}"]
        stderr = None
        if error.value not in _NONE:
            if is_finite(error.value) and error.value >= 0:
                stderr = float(error.value)
            else:
                unusable.append(str(error.refuse("a finite number of at least 0")))
        yield metric, rule, float(part.value), stderr


def _higher_is_better(directions: Part, task: str, metric: str) -> bool:
    """The direction of a metric; upwards where lm-eval knows none."""
    if not directions or not directions[task] or not (direction := directions[task][metric]):
        return True
    return direction.flag()


# -- values


def _whole_characters(value: Any) -> Any:
    """JSON without halves of characters (`\\ud800`), which no file and no page can hold: they are spelled out."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [_whole_characters(item) for item in value]
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(item) for key, item in value.items()}
    return value


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean, or None when any value is missing."""
    known = list(values)
    return None if None in known or not known else sum(known) / len(known)


def _share(part: Part) -> float | None:
    return part.share() if part else None


def _text(part: Part) -> str | None:
    """A text; None for anything else, which lm-eval writes where it knows nothing."""
    return part.value if isinstance(part.value, str) and part.value.strip() else None


def _short(part: Part) -> str | None:
    found = _text(part)
    return found[:12] if found else None


def _whole(part: Part) -> int | None:
    value = part.value
    return int(value) if is_finite(value) and value == int(value) else None


def _count(part: Part) -> int | None:
    found = _whole(part)
    return found if found is not None and found >= 0 else None


def _object(part: Part) -> dict[str, Any]:
    return part.value if isinstance(part.value, dict) else {}


def _numbers(part: Part) -> dict[str, float]:
    return {key: float(value) for key, value in _object(part).items() if is_finite(value) and value >= 0}


def _mean_of(prompts: Part | None) -> float | None:
    if prompts is None or not prompts or not prompts["tokens"]:
        return None
    mean = prompts["tokens"]["mean"]
    return mean.seconds() if mean else None


def _date(part: Part) -> str | None:
    from datetime import datetime, timezone

    if not is_finite(part.value):
        return None
    try:
        return datetime.fromtimestamp(part.value, timezone.utc).isoformat(timespec="seconds")
    except (OverflowError, OSError, ValueError):
        return None


def _flag(part: Part) -> bool | None:
    return part.value if isinstance(part.value, bool) else None


def _model(whole: Part, model_args: dict[str, Any]) -> str:
    """What a run calls its model: by its name, else by where it was loaded from. lm-eval makes a name up, the same for
    all, where it was given a model as an object."""
    given = whole["model_name"]
    own = given.text() if given.value not in (None, "", MISSING) else None
    if whole["model_source"].value == "CUSTOM":
        own = None
    for name in (own, model_args.get("pretrained"), whole["config"]["model"].value):
        if isinstance(name, str) and name:
            return name.rstrip("/") or name
    return "?"
