"""Scores by document that stand beside a result file: in `documents_<date>.jsonl`, or in lm-eval's files of samples.

Knows names of files and JSON lines.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from ..errors import UserError
from .files import read_bytes
from .parts import is_finite
from .sample_files import sample_file_name
from .schema import Documents

_RESULTS = re.compile(r"results_(?P<date>.+)\.json")
#: Characters of a document's hash that are kept: of a billion documents hardly two would share them.
_HASH = 16
#: Of each task, metric and filter of answers: the scores by document.
Scores = dict[tuple[str, str, str], Documents]


def beside(path: Path) -> Scores:
    """Scores by document of the run whose result file this is; empty where none are kept. Raises `UserError`."""
    found = _RESULTS.fullmatch(path.name)
    if found is None:
        return {}
    log = path.with_name(f"documents_{found['date']}.jsonl")
    return read(log) if log.is_file() else {}


def of_samples(path: Path, task: str) -> Scores:
    """The same from lm-eval's file of a task's samples (`--log_samples`). Raises `UserError`."""
    found = _RESULTS.fullmatch(path.name)
    if found is None:
        return {}
    samples = path.with_name(sample_file_name(task, found["date"]))
    return read(samples, task) if samples.is_file() else {}


def read(path: Path, task: str | None = None) -> Scores:
    """Scores in a file of JSON lines, one for each document.

    Args:
        task: of lm-eval's samples, which do not say it.

    Raises:
        UserError: it cannot be read, holds no line, or one that is none of such a file.
    """
    rows: dict[tuple[str, str], list[tuple[int, str, dict[str, Any]]]] = defaultdict(list)
    for number, row in enumerate(_lines(path), 1):
        try:
            metrics = row["metrics"]
            if task is not None:
                metrics = {name: row[name] for name in metrics if name in row}
            elif not isinstance(metrics, dict):
                raise TypeError
            key = task if task is not None else row["task"], row.get("filter", "none")
            rows[key].append((int(row["doc_id"]), str(row["doc_hash"]), metrics))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise UserError(f"{path}: line {number} {_NONE_OF_SUCH}") from None
    if not rows:
        raise UserError(f"{path} is empty: {_WITHOUT}")
    return {key: documents for (name, rule), lines in rows.items() for key, documents in _columns(name, rule, lines)}


_WITHOUT = "its run stands without scores by document; run it again for them"
_NONE_OF_SUCH = f"is none of a file of documents, or is cut off: {_WITHOUT}"


def _lines(path: Path) -> list[Any]:
    """The JSON values of a file's lines. Raises `UserError`."""
    lines = [line for line in read_bytes(path).splitlines() if line.strip()]
    try:
        # All at once, which takes a third of the time.
        found = from_json(b"[" + b",".join(lines) + b"]")
        if len(found) == len(lines):
            return found
    except ValueError:
        pass
    for number, line in enumerate(lines, 1):
        try:
            from_json(line)
        except ValueError:
            raise UserError(f"{path}: line {number} {_NONE_OF_SUCH}") from None
    raise UserError(f"{path}: a line {_NONE_OF_SUCH}")


def _columns(
    task: str, rule: str, lines: list[tuple[int, str, dict[str, Any]]]
) -> list[tuple[tuple[str, str, str], Documents]]:
    """The documents of each metric that has a number for every document."""
    lines.sort(key=lambda line: line[0])
    ids = [digest[:_HASH] for _, digest, _ in lines]
    if len(set(ids)) < len(ids):  # the same document again
        seen: dict[str, int] = defaultdict(int)
        for place, name in enumerate(ids):
            seen[name] += 1
            if seen[name] > 1:
                ids[place] = f"{name}-{seen[name]}"
    names, found = tuple(ids), []
    for metric in lines[0][2]:
        scores = [metrics.get(metric) for _, _, metrics in lines]
        if all(map(_is_number, scores)):
            documents = Documents.model_construct(ids=names, scores=tuple(map(float, scores)))
            found.append(((task, metric, rule), documents))
    return found


def _is_number(value: Any) -> bool:
    """True and false are: some metrics of lm-eval score so."""
    return isinstance(value, bool) or is_finite(value)
