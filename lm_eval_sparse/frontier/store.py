"""Documents on disk: one append-only JSON Lines file per fingerprint, so that no document is made twice.

Any number of processes may append at once and any of them may be killed at any moment: a document is one line
written by one call, with a checksum (`sealed`). A line that does not fit its checksum is blanked out where it stands,
which moves nothing that others append, and its document is made again; one written twice is the same twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import paths, sealed
from ..results import files

logger = logging.getLogger(__name__)

#: Bytes of a file and of a line in it that are read: some fifty times what they have at 128k tokens.
MOST_BYTES = 4 << 30
MOST_LINE = 64 << 20

_NAMED = re.compile(r"(?P<leaf>[a-z0-9_]+)-(?:v(?P<version>\d+)-)?\d+-[0-9a-f]{24}\.jsonl")

_warned = False


def cache_dir() -> Path:
    """`$LM_EVAL_SPARSE_CACHE`/docs, by default ~/.cache/lm_eval_sparse/docs. It need not exist."""
    return paths.cache_root() / "docs"


def keep(path: Path, content: bytes) -> None:
    """Write a file of a cache, whole. A cache that cannot be used is a warning, not an error."""
    try:
        files.write_whole(path, content)
    except OSError as error:
        logger.warning("cannot keep %s (%s); it is made again in every run", path, files.why(error))


def forget_older(versions: Mapping[str, int]) -> None:
    """Remove the documents that earlier versions of tasks wrote, and say so in a line: they are made anew.

    `versions` holds the present version by recipe, for twins behind `forced_`. Files of version 1 had no version in
    their names. Nothing is removed where nobody would hear of it.
    """
    if not logger.isEnabledFor(logging.WARNING):
        return
    removed: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for path in cache_dir().iterdir():
            match = _NAMED.fullmatch(path.name)
            if match and int(match["version"] or 1) < versions.get(match["leaf"], 0):
                with contextlib.suppress(OSError):
                    path.unlink()
                    removed[match["leaf"]] = removed.get(match["leaf"], 0) + 1
    if removed:
        logger.warning(
            "documents of earlier versions of %s were in the cache (%d files, removed); they are made anew",
            *(", ".join(sorted(removed)), sum(removed.values())),
        )


class DocumentStore:
    """The documents of one leaf under one fingerprint. A cache that cannot be used is one warning, not an error."""

    def __init__(self, name: str, fingerprint: str):
        # In full in the checksums, so that lines of another file of the same beginning do not fit.
        self._place = f"document {name} {fingerprint}"
        self.path = cache_dir() / f"{name}-{fingerprint[:24]}.jsonl"
        self._usable = True

    def load(self) -> dict[int, dict[str, Any]]:
        """All whole documents of the file, by index; the first one where an index stands twice."""
        docs: dict[int, dict[str, Any]] = {}
        broken: list[tuple[int, int]] = []
        try:
            with self._opened(os.O_RDONLY) as file, os.fdopen(file, "rb", closefd=False) as stream:
                if os.fstat(file).st_size > MOST_BYTES:
                    raise OSError(f"{self.path.name} has more than {MOST_BYTES:,} bytes")
                start = 0
                while line := stream.readline(MOST_LINE):
                    try:
                        doc = self._document(line)
                    except sealed.Broken:
                        # Without a line end it is the last one: another process may be writing it right now.
                        if line.endswith(b"\n") or len(line) == MOST_LINE:
                            broken.append((start, len(line.rstrip(b"\n"))))
                    else:
                        if doc is not None:
                            docs.setdefault(doc["index"], doc)
                    start += len(line)
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._give_up(error)
            return {}
        if broken:
            logger.warning(
                "%d of the lines in %s are not as they were written (damaged, or cut off when a run was stopped); "
                "their documents are made again",
                *(len(broken), self.path),
            )
            self._blank(broken)
        return docs

    def _document(self, line: bytes) -> dict[str, Any] | None:
        """The document of a line, None when it is blank. Raises `sealed.Broken`."""
        if not line.strip(b" \n"):
            return None
        doc = sealed.unseal(self._place, line.rstrip(b"\n"))
        if type(doc.get("index")) is not int or not {"input", "target", "tokens"} <= doc.keys():
            raise sealed.Broken("is no document")
        return doc

    def _blank(self, broken: list[tuple[int, int]]) -> None:
        """Write blanks over lines, so that they are told of once."""
        with contextlib.suppress(OSError), self._opened(os.O_RDWR) as file:
            for start, length in broken:
                os.pwrite(file, b" " * length, start)

    def add(self, doc: dict[str, Any]) -> None:
        """Append one document."""
        if not self._usable:
            return
        line = sealed.seal(self._place, doc) + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._opened(os.O_RDWR | os.O_APPEND | os.O_CREAT) as file:
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":  # someone was killed while writing
                    line = b"\n" + line
                if os.write(file, line) != len(line):
                    raise OSError("the disk took only a part of a document")
        except OSError as error:
            self._give_up(error)

    @contextlib.contextmanager
    def _opened(self, how: int) -> Iterator[int]:
        """The file, if it is one: what a link leads to is not ours, and a pipe would be waited for without end."""
        if self.path.is_symlink():  # where the system has no O_NOFOLLOW, and for its words
            raise OSError(f"{self.path.name} is a link")
        file = os.open(self.path, how | files.flags("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"), 0o666)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(f"{self.path.name} is no regular file")
            yield file
        finally:
            os.close(file)

    def _give_up(self, error: OSError) -> None:
        global _warned
        self._usable = False
        if not _warned:
            _warned = True
            logger.warning(
                "cannot keep documents in %s (%s); they are made again in every run. "
                "Set LM_EVAL_SPARSE_CACHE to a folder that can be written.",
                self.path.parent,
                files.why(error),
            )
