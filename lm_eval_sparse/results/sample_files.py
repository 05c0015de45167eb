"""Files with the samples of a task: their names, and how a dataset card opens them. Knows names only."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

_SAMPLES_FILE = re.compile(
    r"(?:(?P<folder>.*)/)?samples_(?P<task>[^/]+)_(?P<date>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.jsonl"
)

#: What stays in the name of a file: letters and digits of any script, and what is no pattern, no path and no address.
_UNFIT = re.compile(r"[^\w .,+=@-]")
#: Bytes of a task's name in the name of its file, of 255 that file systems take.
_MOST_BYTES = 180


def sample_file_name(task: str, date: str) -> str:
    """The name of the file with a task's samples: lm-eval's, `samples_TASK_DATE.jsonl`, where a file can have it.

    Elsewhere `_` stands for what no file's name can hold, an over-long name is cut, and a few letters of its hash keep
    two tasks apart that would then have the same name.
    """
    name = _cut(_UNFIT.sub("_", task), _MOST_BYTES)
    if name != task or not name:
        digest = hashlib.sha256(task.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        name = f"{name}_{digest}"
    return f"samples_{name}_{date}.jsonl"


def _cut(name: str, most: int) -> str:
    return name.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")


def sample_configs(files: Iterable[str]) -> list[dict[str, Any]]:
    """The card's `configs` for lm-eval's sample files: one per model and task, split `latest` and the run's date.

    Only the newest run of each: samples of older runs may have other columns, and one configuration has one schema.
    Files whose name no card can hold in one line are left out.
    """
    newest: dict[tuple[str, str], tuple[str, str]] = {}
    for path in files:
        if path.isprintable() and (found := _SAMPLES_FILE.fullmatch(path)):
            key = found["folder"] or "", found["task"]
            newest[key] = max(newest.get(key, ("", "")), (found["date"], path))
    names = {key: _config_name(*key) for key in newest}
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    for key, name in names.items():
        if name in shared:
            names[key] = f"{name}_{hashlib.sha256('/'.join(key).encode()).hexdigest()[:8]}"
    return [
        {
            "config_name": names[key],
            "data_files": [
                {"split": re.sub(r"[^\w.]", "_", date), "path": [path]},
                {"split": "latest", "path": [path]},
            ],
        }
        for key, (date, path) in sorted(newest.items(), key=lambda item: names[item[0]])
    ]


def _config_name(folder: str, task: str) -> str:
    """By lm-eval's rules: what `datasets` takes for a name."""
    folder = re.sub(r'[<>:/\\|?*"]+', "__", folder)
    return "__".join(part for part in (folder, re.sub(r"\W", "_", task)) if part)
