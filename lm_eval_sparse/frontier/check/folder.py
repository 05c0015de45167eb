"""Which folder and which lengths are meant, and a cache of documents for the time of the checks."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ... import frontier, paths
from ...errors import PROGRAM, UserError, nearest
from ..leaves import LENGTHS
from ..store import cache_dir


def folder_of(given: str) -> Path:
    """The folder that PATH means. Raises `UserError`."""
    path, known = paths.expand(f"PATH {given!r:.80}", given), built_in()
    if paths.is_dir(path) and (any(path.glob("*.yaml")) or given not in frontier.RECIPES):
        if not any(path.rglob("*.yaml")):
            raise UserError(
                f"{given} given, but it has no YAML files; give the folder of a task (`{PROGRAM} new-task` writes one)"
            )
        return path.resolve()
    if given in known:
        return known[given]
    if paths.exists(path):
        raise UserError(
            f"{given} given, which is a file; give the folder that it is in, or the name of a built-in task"
        )
    names, close = ", ".join(known), nearest(given[:200], known)
    raise UserError(f"{given!r:.300} given, which is neither a folder nor a built-in task ({names}){close}")


def built_in() -> dict[str, Path]:
    """The folders of this package's tasks, by their names."""
    roots = [Path(folder) for folder in paths.task_folders()]
    return {name: (root / name).resolve() for name in frontier.RECIPES for root in roots if (root / name).is_dir()}


def lengths_of(given: str | None) -> list[str]:
    """The lengths that --lengths names. Raises `UserError`."""
    lengths = [part.strip() for part in (given or "").split(",") if part.strip()]
    if bad := [length for length in lengths if length not in LENGTHS]:
        raise UserError(
            f"--lengths {given} given, but {bad[0]!r} is none of {', '.join(LENGTHS)}; type --lengths 4k,8k"
        )
    if given is not None and not lengths:
        raise UserError(f"--lengths {given!r} given, but it must name lengths; type --lengths 4k,8k")
    return lengths


@contextlib.contextmanager
def scratch() -> Iterator[None]:
    """A cache without documents that vanishes at the end; all else in the user's cache stays within reach."""
    before, theirs = os.environ.get("LM_EVAL_SPARSE_CACHE"), cache_dir().parent
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # no __pycache__ beside the author's code
    with tempfile.TemporaryDirectory(prefix="check-task-", ignore_cleanup_errors=True) as folder:
        for entry in theirs.iterdir() if theirs.is_dir() else ():
            if entry.name != cache_dir().name:
                (Path(folder) / entry.name).symlink_to(entry.resolve())
        os.environ["LM_EVAL_SPARSE_CACHE"] = folder
        try:
            yield
        finally:
            sys.dont_write_bytecode = bytecode
            if before is None:
                os.environ.pop("LM_EVAL_SPARSE_CACHE", None)
            else:
                os.environ["LM_EVAL_SPARSE_CACHE"] = before
