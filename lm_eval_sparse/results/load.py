"""Finding and reading what analyses are made of: result files of lm-eval, whatever model type wrote them, and records
that `analyze` has written (`records.jsonl`)."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .. import paths as typed
from ..errors import UserError, one_line
from . import cells, documents
from .files import read_bytes, read_json
from .records import records
from .schema import Record, parse

logger = logging.getLogger(__name__)

# -- files

#: At most so many files that cannot be read are named, and lines of a file.
_NAMED, _NAMED_LINES = 5, 3
#: The file in which `analyze` leaves its records.
RECORDS = "records.jsonl"


def find(paths: Iterable[str | Path]) -> list[Path]:
    """Result files among the given files and below the given folders, in the order given, each once.

    Raises:
        UserError: a path does not exist, or there is no such file.
    """
    return [path for path, _ in candidates(paths)]


def candidates(paths: Iterable[str | Path], *, with_records: bool = False) -> list[tuple[Path, bool]]:
    """Result files, and whether each was named itself. Links to folders are not followed: they may lead in circles.

    Args:
        with_records: files of records below the folders as well.
    """
    found: dict[Any, tuple[Path, bool]] = {}
    given = [typed.expand(f"RESULTS {typed.cut(str(path))!r}", path) for path in paths]
    for path in given:
        if typed.is_dir(path):
            for file in below(path, with_records=with_records):
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


def below(folder: Path, *, with_records: bool = False) -> list[Path]:
    """Files called `results_*.json` below a folder, on request with files of records and cells of sweeps, by path.

    Of a ledger's folder its cells are taken then, and not what they were made of.
    """

    def unreadable(error: OSError) -> None:
        logger.warning("%s", one_line(f"a folder is left out: {error.filename} cannot be read ({error.strerror})"))

    found = []
    for parent, folders, names in os.walk(folder, onerror=unreadable):
        if with_records and cells.LEDGER in names:
            folders[:] = [name for name in folders if name not in cells.MADE_OF]
        found += [Path(parent, name) for name in names if _is_read(name, with_records)]
    return sorted(found)


def _is_read(name: str, with_records: bool) -> bool:
    if name.startswith("results_") and name.endswith(".json"):
        return True
    return with_records and (name == RECORDS or cells.address_of(name) is not None)


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


def read(
    paths: Iterable[str | Path], left_out: list[str] | None = None, *, without: Path | None = None
) -> list[Record]:
    """The scores of all result files and files of records among the given files and below the given folders.

    A file below a folder that is torn or none of lm-eval is left out with a warning: a run that was stopped must not
    hide the others. So is a score that is no finite number, or that cannot be, and a line that is no record of a schema
    that is known here, in whatever file of records it stands.

    Args:
        left_out: is given a line for each that is left out.
        without: a folder below them that is not read: where the next analysis goes, an earlier one may lie.

    Raises:
        UserError: a file that was named itself is not good (of records: has no good line), none below the folders is,
            or no score is left.
    """
    files = candidates(paths, with_records=True)
    if without is not None:
        there = os.path.realpath(without)  # which may be given as a link
        files = [
            (path, named) for path, named in files if named or not Path(os.path.realpath(path)).is_relative_to(there)
        ]
        if not files:
            raise UserError(f"there is nothing to read but what lies in {without}; give result files of lm-eval")
    rows: list[Record] = []
    refused: list[UserError] = []
    unusable: list[str] = []
    torn: list[str] = []
    with without_collecting():
        for path, named in files:
            try:
                if path.suffix == ".jsonl":
                    rows += _of_lines(path, torn)
                elif cells.address_of(path.name) is not None:
                    rows += cells.read(path)[1]
                else:
                    rows += records(load(path), str(path), unusable, _documents(path, unusable), path)
            except UserError as error:
                if named:
                    raise
                refused.append(error)
    if len(refused) == len(files):
        others = f" (and {len(refused) - 1} files more)" if len(refused) > 1 else ""
        raise UserError(f"no result file here can be read: {refused[0]}{others}")
    if not rows:
        names = f"{files[0][0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}"
        raise UserError(
            f"these result files hold no scores: {names}"
            + "".join(f"; {said}; run its tasks again" for said in unusable[:1])
        )
    for what, said in (("file", refused), ("line", torn), ("figure", unusable)):
        lines = [one_line(str(line)) for line in said]
        if left_out is not None:
            left_out += lines
        for line in lines[:_NAMED]:
            logger.warning("a %s is left out: %s", what, line)
        if more := lines[_NAMED:]:
            logger.warning("%d more %ss are left out", len(more), what)
    return rows


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Millions of small values are made and kept; looking among them for cycles takes a quarter of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _of_lines(path: Path, torn: list[str]) -> list[Record]:
    """The records in a file of lines; `torn` is given what says of each line that is none why. Raises `UserError`."""
    found: list[Record] = []
    refused: list[str] = []
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if line.strip():
            try:
                found.append(parse(line, f"{path}, line {number}"))
            except UserError as error:
                refused.append(str(error))
    if not found:
        expected = f"give result files of lm-eval, or {RECORDS} as `analyze` writes it"
        raise UserError(refused[0] if refused else f"{path}: no record in it; {expected}")
    torn += refused[:_NAMED_LINES]
    if len(refused) > _NAMED_LINES:
        torn.append(f"{path}: and {len(refused) - _NAMED_LINES} more of its lines")
    return found


def _documents(path: Path, unusable: list[str]) -> documents.Scores:
    """Scores by document beside a result file; without them its scores stand, with a word on why."""
    try:
        return documents.beside(path)
    except UserError as error:
        unusable.append(str(error))
        return {}
