"""Write a task's documents anew in another process, where only their seed can make them the same.

That process needs no lm-eval. It runs in a folder of its own, which is not among those that modules are looked for in:
a `random.py` that lies where the command is typed must not run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import frontier
from ..errors import UserError
from ..results.files import read_json
from .recipe import Recipe

#: Before anything else is imported: `-c` puts the working folder first, which `-P` keeps out from Python 3.11 on.
_START = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; from {name} import write_digests; write_digests({job!r})"
)


class Failed(Exception):
    """The other process did not write the documents. The message says why, in one line."""


def run(job: Mapping[str, Any], hash_seed: str) -> dict[str, str]:
    """`digests` of the job, made in another process under another order of hashes. Raises `Failed`."""
    with tempfile.TemporaryDirectory(prefix="check-task-", ignore_cleanup_errors=True) as folder:
        file, found = Path(folder) / "job.json", Path(folder) / "digests.json"
        file.write_text(json.dumps({**job, "digests": str(found)}))
        done = subprocess.run(
            [sys.executable, "-c", _START.format(name=__name__, job=str(file))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": _path()},
        )
        # The exit status says little: the task's code may end the process as it likes.
        if not found.is_file():
            last = (done.stderr.decode(errors="replace").strip().splitlines() or [""])[-1][:300]
            raise Failed(last if done.returncode and last else f"it ended with exit status {done.returncode}")
        try:
            return read_json(found)
        except UserError as error:
            raise Failed(str(error)) from None


def _path() -> str:
    """PYTHONPATH with this package, and without what stands for the working folder unless it is named."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(Path(__file__).parents[2]), *(os.path.abspath(part) for part in given if part)])


def digests(job: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of texts and gold answers that the recipe writes, without a tokenizer: sizes are counted in characters."""
    recipe = _recipe(job["recipe"], Path(job["folder"]))
    recipe.find(job["metadata"])
    length, seed = int(job["length"]), int(job["metadata"].get("seed", 0))
    recipe.bind(length, seed, lambda message: len(message) // 4, "check-task")
    found = {}
    for index in job["indexes"]:
        for forced in (False, True):
            draft = recipe.draft(length, seed, index, forced)
            parts = []
            for units in (0, 7, 40):
                units = min(units, draft.most)
                parts.append([draft.message(units, "A line of filler."), draft.gold(units)])
            text = json.dumps([draft.answer, draft.most, parts], sort_keys=True, default=str)
            found[f"document {index} of the {'twin' if forced else 'leaf'} with {length} tokens"] = hashlib.sha256(
                text.encode()
            ).hexdigest()
    return found


def write_digests(file: str) -> None:
    """`digests` of the job in `file`, in the opposite order, into the file that it names."""
    job = read_json(Path(file))
    found = digests({**job, "indexes": job["indexes"][::-1]})
    Path(job["digests"]).write_text(json.dumps(found))


def _recipe(given: Mapping[str, str], folder: Path) -> Recipe:
    if "recipe" not in given:
        return frontier.recipe(given["task"])
    module, _, cls = given["recipe"].removeprefix("!function ").rpartition(".")
    path = folder / f"{module.replace('.', '/')}.py"
    if not path.exists():
        return getattr(importlib.import_module(module), cls)()
    spec = importlib.util.spec_from_file_location(f"_check_task_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return getattr(loaded, cls)()
