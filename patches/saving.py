"""Results and samples of a `sparse-hf` run are saved whole or not at all, and never lost.

Works around: lm-eval writes results in place and only logs what goes wrong: a full disk leaves half a file and exit
status 0. Its own code still makes the files, in a folder beside their place, from which they are moved once they are
whole; what cannot be put there goes to a temporary folder, and the run ends with an exit status that says so. Delete
when lm-eval writes atomically and reports what it could not save.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm_eval_sparse import masking
from lm_eval_sparse.results import sample_files
from lm_eval_sparse.results.files import read_json, why

logger = logging.getLogger(__name__)


class NotSaved(Exception):
    """A file could not be put where it belongs. The message says why."""


def results(tracker: Any, original: Callable[..., None], found: dict[str, Any], samples: Any) -> Path:
    """Let lm-eval save the results; returns the file. Raises `NotSaved`."""
    _, stem = place(tracker)

    def write() -> tuple[str, str]:
        original(tracker, results=found, samples=samples)
        name = f"{stem}_{tracker.date_id}.json"
        return name, name

    return _staged(tracker, write)


def task_samples(tracker: Any, original: Callable[..., None], task: str, rows: list[Any]) -> Path:
    """Let lm-eval save the samples of a task beside the results; returns the file. Raises `NotSaved`."""

    def write() -> tuple[str, str]:
        # Copies: lm-eval changes the rows, and a second attempt must find them as they were. A task's name may hold
        # what no file's name can.
        original(tracker, task_name="task", samples=[dict(row) for row in rows])
        return f"samples_task_{tracker.date_id}.jsonl", sample_files.sample_file_name(task, tracker.date_id)

    return _staged(tracker, write, lines=len(rows))


def place(tracker: Any) -> tuple[Path, str]:
    """The folder of the results, and how the name of their file begins, by lm-eval's rules."""
    output = Path(tracker.output_path)
    if output.suffix == ".json":
        return output.parent, output.stem
    return output / str(tracker.general_config_tracker.model_name_sanitized), "results"


def _staged(tracker: Any, write: Callable[[], tuple[str, str]], lines: int | None = None) -> Path:
    """Let `write` make a file in a folder beside its place, and move it there once it is whole.

    Args:
        write: makes the file in the folder that `tracker.output_path` then names; returns its name, and its last one.
        lines: of a file of samples, how many there must be.
    """
    folder, stem = place(tracker)
    output = tracker.output_path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".lm-eval-sparse-", dir=folder))
    except OSError as error:
        raise NotSaved(f"{folder} ({why(error)})") from error
    log = logging.getLogger("lm_eval.loggers.evaluation_tracker")
    renamed = _Renamed(str(stage), str(folder))
    log.addFilter(renamed)
    try:
        tracker.output_path = str(stage / f"{stem}.json")
        try:
            made, name = write()
        finally:
            tracker.output_path = output
        try:
            _check_whole(stage / made, lines)
            secrets = getattr(tracker, "_lm_eval_sparse_secrets", frozenset())
            _mask(stage / made, name, secrets, lines is not None)
            _check_whole(stage / made, lines)
            with (stage / made).open("rb") as file:
                os.fsync(file.fileno())
            os.replace(stage / made, folder / name)
        except (OSError, ValueError) as error:
            raise NotSaved(f"{folder} ({_reason(stage, error)})") from error
    finally:
        log.removeFilter(renamed)
        shutil.rmtree(stage, ignore_errors=True)
    return folder / name


class _Renamed(logging.Filter):
    """Lets lm-eval's log name the folder where files end up."""

    def __init__(self, stage: str, folder: str):
        super().__init__()
        self.stage, self.folder = stage, folder

    def filter(self, record: logging.LogRecord) -> bool:
        if self.stage in (said := record.getMessage()):
            record.msg, record.args = said.replace(self.stage, self.folder), ()
        return True


def _check_whole(file: Path, lines: int | None) -> None:
    """Raise `OSError` or `ValueError` unless lm-eval has written all of it: it only logs what goes wrong."""
    if lines is None:
        read_json(file)
        return
    with file.open("rb") as stream:
        found = sum(1 for line in stream if line.endswith(b"\n"))
    if found != lines:
        raise ValueError(f"{found} of {lines} samples were written")


def _mask(file: Path, name: str, secrets: frozenset[str], lines: bool) -> None:
    """The last look: mask what is still there, in what the file says, not in how it says it.

    Files of samples are looked through line by line, since they are large.
    """
    with file.open(encoding="utf-8") as stream:
        if not any(masking.left_in(line, secrets) for line in stream):
            return
    if lines:
        with file.open(encoding="utf-8") as stream, file.with_name("masked").open("w", encoding="utf-8") as target:
            for line in stream:
                if masking.left_in(line, secrets):
                    row = masking.masked(json.loads(line), secrets, names=False)
                    line = json.dumps(row, ensure_ascii=False) + "\n"
                target.write(line)
        os.replace(file.with_name("masked"), file)
    else:
        content = masking.masked(json.loads(file.read_text(encoding="utf-8")), secrets, names=False)
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    logger.warning("what is a secret, or looks like one, was masked in %s", name)


def _reason(stage: Path, error: Exception) -> str:
    """Why a file is missing or torn, which lm-eval does not say: tried once more."""
    try:
        with (stage / "probe").open("wb") as probe:
            probe.write(b"\0" * (1 << 20))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as again:
        return why(again)
    return f"{why(error)}; lm-eval's log says more"


def rescue(
    tracker: Any,
    save_results: Callable[..., None] | None,
    save_samples: Callable[..., None],
    found: Mapping[str, Any],
    samples: Mapping[str, list[Any]],
) -> str:
    """Save what could not be put where it belongs in a temporary folder; says where it is.

    Args:
        save_results: lm-eval's function, or None when the results themselves are saved.
        samples: by task, those that are not saved yet.
    """
    output = tracker.output_path
    try:
        folder = Path(tempfile.mkdtemp(prefix="lm-eval-sparse-results-"))
        tracker.output_path = str(folder / f"{place(tracker)[1]}.json")
        if save_results is not None:
            results(tracker, save_results, dict(found), samples or None)
        for task, rows in samples.items():
            task_samples(tracker, save_samples, task, rows)
    except (OSError, NotSaved) as error:
        return f"nor elsewhere ({why(error)}): the scores are above, and nothing else is kept"
    finally:
        tracker.output_path = output
    tracker._lm_eval_sparse_rescued = folder
    return f"it is in {folder} instead: move it before that folder is cleaned up"
