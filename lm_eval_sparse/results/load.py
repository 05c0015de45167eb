"""Reading lm-eval result files that sparse-hf (or any other model type) wrote, one record per task and metric."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import paths as typed
from ..errors import UserError, one_line
from ..labels import label
from .files import read_json
from .parts import MISSING, Part, is_finite

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One score of one task in one run.

    Attributes:
        model, method, task, metric: names; `method` is `dense` for other model types. A metric of which several filters
            of answers give a score has the filter's name behind a comma.
        phases: those that the method fills, joined by `+`; empty for dense attention.
        score, stderr: as aggregated by lm-eval; `stderr` is None where it gave none.
        n: documents scored.
        requested, measured: sparsity asked for and executed sparsity of the phase that the method fills, in [0, 1];
            with methods in several phases the mean over those phases. `requested` is None when native knobs ruled.
        higher_is_better: direction of the metric.
        seconds: wall time of the whole run, or None.
    """

    model: str
    method: str
    task: str
    metric: str
    score: float
    stderr: float | None
    n: int
    requested: float | None
    measured: float
    higher_is_better: bool
    seconds: float | None
    phases: str = ""


# -- files

#: At most so many files that cannot be read are named.
_NAMED = 5


def find(paths: Iterable[str | Path]) -> list[Path]:
    """Result files among the given files and below the given folders, in the order given, each once.

    Raises:
        UserError: a path does not exist, or there is no such file.
    """
    return [path for path, _ in candidates(paths)]


def candidates(paths: Iterable[str | Path]) -> list[tuple[Path, bool]]:
    """Result files, and whether each was named itself. Links to folders are not followed: they may lead in circles."""
    found: dict[Any, tuple[Path, bool]] = {}
    given = [typed.expand(f"RESULTS {typed.cut(str(path))!r}", path) for path in paths]
    for path in given:
        if typed.is_dir(path):
            for file in below(path):
                found.setdefault(_identity(file), (file, False))
        elif typed.exists(path):
            found[_identity(path)] = path, True
        else:
            raise UserError(
                f"{typed.cut(str(path))}: no such file or folder that can be read; give result files of lm-eval or "
                "folders that hold them"
            )
    if not found:
        where = ", ".join(typed.cut(str(path)) for path in given)
        raise UserError(f"no results_*.json below {where}; run lm_eval with --output_path first")
    return list(found.values())


def below(folder: Path) -> list[Path]:
    """Files called `results_*.json` below a folder, sorted by path."""

    def unreadable(error: OSError) -> None:
        logger.warning("%s", one_line(f"a folder is left out: {error.filename} cannot be read ({error.strerror})"))

    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=unreadable)
        for name in names
        if name.startswith("results_") and name.endswith(".json")
    )


def _identity(path: Path) -> Any:
    """The same for two names of one file."""
    try:
        status = path.stat()
    except OSError:
        return path.absolute()
    return status.st_dev, status.st_ino


def load(path: Path) -> dict[str, Any]:
    """One result file, checked to be one. Raises `UserError`."""
    content = read_json(path)
    if "results" not in content:
        raise UserError(f"{path}: not a result file of lm-eval (it has no 'results')")
    return content


def read(paths: Iterable[str | Path]) -> list[Record]:
    """The scores of all result files among the given files and below the given folders.

    A file below a folder that is torn or none of lm-eval is left out with a warning: a run that was stopped must not
    hide the others. So is a score that is no finite number.

    Raises:
        UserError: a file that was named itself is not good, none below the folders is, or no score is left.
    """
    files = candidates(paths)
    rows: list[Record] = []
    refused: list[UserError] = []
    unusable: list[str] = []
    for path, named in files:
        try:
            rows += records(load(path), str(path), unusable)
        except UserError as error:
            if named:
                raise
            refused.append(error)
    if len(refused) == len(files):
        others = f" (and {len(refused) - 1} files more)" if len(refused) > 1 else ""
        raise UserError(f"no result file here can be read: {refused[0]}{others}")
    if not rows:
        names = f"{files[0][0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}"
        raise UserError(f"these result files hold no scores: {names}" + "".join(f"; {said}" for said in unusable[:1]))
    for what, said in (("file", refused), ("figure", unusable)):
        for line in said[:_NAMED]:
            logger.warning("a %s is left out: %s", what, one_line(str(line)))
        if more := said[_NAMED:]:
            logger.warning("%d more %ss are left out", len(more), what)
    return rows


# -- what a file says

#: Phases of a result file, and the figures of each with their short names.
PHASES = ("prefill", "eviction", "decode")
#: Measurements among lm-eval's metrics, and what it writes where nothing is scored.
MEASURED = ("sparsity", "prefill_sparsity", "kv_sparsity", "decode_sparsity", "bypass")
#: What stands for a figure that there is not.
_NONE = (None, "N/A", MISSING)


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean, or None when any value is missing."""
    known = list(values)
    return None if None in known or not known else sum(known) / len(known)


@dataclass(frozen=True)
class _Measured:
    """What a run of a task says of sparsity."""

    method: str
    phases: str
    requested: float | None
    measured: float


def records(content: dict[str, Any], where: str = "the results", unusable: list[str] | None = None) -> Iterator[Record]:
    """The scores in one result file. Rows of measured sparsity are measurements, not scores, and are left out.

    Args:
        content: a JSON object of any shape.
        where: the file, as messages begin.
        unusable: is given what says of each score and standard error that is no finite number that it is none; such a
            score has no record.

    Raises:
        UserError: a part has another shape than lm-eval gives it.
    """
    whole = Part(where, "", content)
    config = whole["config"]
    whole["results"].object()
    config.object()
    model = whole["model_name"] if whole["model_name"].value not in (None, "", MISSING) else config["model"]
    seconds = whole["total_evaluation_time_seconds"]
    found: list[Record] = []
    for task, row in whole["results"].items():
        # In a run of ours, groups and skipped tasks have no measurement of their own.
        if (measured := _measured(config["sparse"], task)) is None:
            row.object()
            continue
        n = row["sample_len"].count() if row["sample_len"] else 0
        for metric, rule, score, stderr in _scores(row, unusable if unusable is not None else []):
            found.append(
                Record(
                    model=model.text() if model else "?",
                    method=measured.method,
                    task=task,
                    metric=metric if rule == "none" else f"{metric},{rule}",
                    score=score,
                    stderr=stderr,
                    n=n,
                    requested=measured.requested,
                    measured=measured.measured,
                    higher_is_better=_higher_is_better(whole["higher_is_better"], task, metric),
                    seconds=seconds.seconds() if seconds else None,
                    phases=measured.phases,
                )
            )
    return iter(found)


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


def _share(part: Part) -> float | None:
    return part.share() if part else None


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


# -- the table under a run

FIGURES = {
    "requested_sparsity": "requested",
    "selected_sparsity": "selected",
    "executed_sparsity": "executed",
    "bytes_read_fraction": "bytes read",
    "kv_memory_fraction": "KV memory",
    "estimator_flops_fraction": "estimator FLOPs",
}


def figures_table(content: Mapping[str, Any]) -> str:
    """A markdown table of the six figures: a line per task and phase with a method. Empty for dense runs.

    It is printed at the end of a run, which must not fail over it: what has another shape is left out.
    """
    rows = [["Task", "Phase", "Method", *FIGURES.values()]]
    for task, phases in _object(_object(_object(content, "config"), "sparse"), "tasks").items():
        for phase in PHASES:
            figures = _object(phases, phase)
            if figures.get("method", "dense") != "dense":
                rows.append(
                    [label(task), phase, label(figures["method"]), *(_figure(figures, name) for name in FIGURES)]
                )
    if len(rows) == 1:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["|" + "|".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + "|" for row in rows]
    lines.insert(1, "|" + "|".join("-" * width for width in widths) + "|")
    return "\n".join(lines) + "\n"


def _object(value: Any, key: str) -> Mapping[str, Any]:
    found = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _figure(figures: Mapping[str, Any], name: str) -> str:
    value = figures.get(name)
    return f"{value:.4f}" if is_finite(value) else "-"
