"""The log of samples: a run that was killed, or is to have more documents, goes on from the answers that are there.

Beside the results of a model lies a folder `resume_log`, in it one folder for each configuration (named by a hash of
what decides an answer), in it one file for each process that answered anything. A line is a prompt with all requests
that continue it, which are prefilled and counted once: it is there whole, or the prompt is made again. Lines are
`sealed`: one that is torn, damaged, changed by hand or copied from another file is left out, visibly.

Every process makes a file of its own. Appending to one file from several hosts is not atomic on network file systems,
and nobody ever writes behind the torn line of a process that was killed. Reading takes all files of the folder, so that
any number of processes goes on from any other number.

A line is written at once: what the kernel was given survives `kill -9`. It goes to the disk every few seconds, and when
the run ends: a power cut takes those seconds, and a check on every line keeps half of one from being believed.

Knows files and JSON; nothing of models, torch or lm-eval.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import sealed
from ..errors import UserError, one_line
from ..results import files

logger = logging.getLogger(__name__)

#: The folder with the logs of all configurations, beside the results of a model.
FOLDER = "resume_log"
#: How lines are written. One of another number is never read.
SCHEMA = 1

_HEADER = "lm-eval-sparse log of samples"
#: Longer lines are no line of ours: the figures of every head of the largest models have less than a tenth of it.
_MOST_LINE = 1 << 27
#: Bytes that wait for room on the disk at most.
_MOST_WAITING = 1 << 26
#: Seconds between two times at which lines are made to reach the disk, and between two tries to write again.
_SYNC, _RETRY = 5.0, 5.0
#: Other configurations that are looked at to say how they differ, and differences that are named.
_COMPARED, _NAMED = 20, 5
#: Lines up to so many bytes are kept in memory, longer ones are read again when they are needed.
_SHORT = 1 << 15


def digest(value: Any) -> str:
    """A name for a JSON value, or for one that has a text: 32 hexadecimal digits."""
    try:
        text = json.dumps(value, sort_keys=True, default=str)
    except TypeError:  # keys of several types, which have no order
        text = json.dumps(value, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Line:
    """A line with a checksum that fits: whose it is, where it is, and what it says, unless it is long."""

    run: str
    check: bytes
    content: bytes | None
    path: Path
    start: int
    length: int

    def read(self) -> bytes:
        if self.content is not None:
            return self.content
        with files.opened(self.path, follow=False) as (stream, _):
            stream.seek(self.start)
            return stream.read(self.length)


class SampleLog:
    """The log of one configuration, as one process reads and writes it.

    Args:
        output: the folder of the results; need not exist.
        configuration: JSON of what decides an answer besides its request.
        run: tells the answers of this process from those of others; part of a file's name.
        about: JSON on this run, for the results: when, with what.
        tasks: by name, what decides the requests of a task besides their texts, as a hash.

    Attributes:
        folder: where the files of this configuration are.
        runs: run -> what its file says of it, this one included.
        off: why nothing is read and written, or None.
    """

    def __init__(
        self,
        output: Path,
        configuration: Mapping[str, Any],
        run: str,
        about: Mapping[str, Any],
        tasks: Mapping[str, str] | None = None,
    ):
        self.configuration = json.loads(json.dumps(configuration, default=str))
        self.name = digest(self.configuration)
        self.root = Path(os.path.abspath(output)) / FOLDER
        self.folder = self.root / self.name
        self.run, self.tasks = run, dict(tasks or {})
        self.runs: dict[str, dict[str, Any]] = {run: dict(about)}
        self.off: str | None = None
        #: Key -> the lines that have it.
        self._lines: dict[str, list[_Line]] = {}
        self._spoilt: dict[Path, int] = {}
        self._file: int | None = None
        self._whole = 0  # bytes of the own file that are whole lines
        self._waiting: list[bytes] = []
        self._lost = 0
        self._failed: float | None = None
        self._synced = time.monotonic()
        self._read()

    def __len__(self) -> int:
        """Prompts that the log had when it was opened."""
        return len(self._lines)

    # --- reading -----------------------------------------------------------------------------------------------------

    def take(self, key: str, fits: Callable[[dict[str, Any]], Any]) -> Any:
        """What `fits` makes of the entry of a prompt; None when there is none, or `fits` returns None for all.

        `fits` may raise what a value of a wrong form raises: the entry is left out then, as a damaged one.
        """
        for line in self._lines.get(key, ()):
            try:
                found = fits(sealed.unseal(self._place(line.run), line.read()))
            except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
                self._say(f"an entry of {line.path.name} cannot be read ({files.why(error)}): its prompt is made again")
                continue
            if found is not None:
                return found
        return None

    def _read(self) -> None:
        """Find all whole lines of this configuration."""
        for folder in (self.root, self.folder):
            self.off = _unfit(folder)
            if self.off is not None:
                self._say(f"nothing is read from and written to it: {self.off}")
                return
        try:
            names = sorted(os.listdir(self.folder)) if os.path.lexists(self.folder) else []
        except OSError as error:
            self._say(f"the answers in it cannot be read ({files.why(error)}), so all are made again")
            names = []
        for name in names:
            if name.endswith(".jsonl"):
                self._read_file(self.folder / name)
        if self._spoilt:
            number = sum(self._spoilt.values())
            named = ", ".join(f"{path.name}: {count}" for path, count in list(self._spoilt.items())[:5])
            more = f" and {len(self._spoilt) - 5} files more" if len(self._spoilt) > 5 else ""
            said = f"{number} lines are torn or not as they were written, and left out ({named}{more})"
            self._say(f"{said}: what is missing is made again")
        if not self._lines:
            self._tell_others()

    def _read_file(self, path: Path) -> None:
        try:
            with files.opened(path, follow=False) as (stream, _):
                lines = _lines_of(stream)
                first = next(lines, None)
                if first is None:
                    return  # killed before it wrote any
                header = self._header(first[0])
                if isinstance(header, str):
                    self._say(f"{path.name} is left out: {header}")
                    return
                run = header["run"]
                self.runs.setdefault(run, header["about"])
                for line, start in lines:
                    if (
                        line is None
                        or not sealed.fits(self._place(run), line)
                        or (found := _BEGINS.match(line)) is None
                    ):
                        self._spoilt[path] = self._spoilt.get(path, 0) + 1
                        continue
                    known = self._lines.setdefault(found["key"].decode(), [])
                    if all(found["check"] != other.check for other in known):
                        content = line if len(line) <= _SHORT else None
                        known.append(_Line(run, found["check"], content, path, start, len(line)))
        except UserError as error:
            self._say(f"{path.name} is left out: {error}")

    def _header(self, line: bytes | None) -> dict[str, Any] | str:
        """What a file says of itself in its first line, or why it is not read."""
        try:
            found = sealed.unseal(_HEADER, line or b"")
        except sealed.Broken:
            return "its first line is torn or not as it was written"
        if found.get("schema") != SCHEMA:
            return f"it has schema {files.brief(found.get('schema'))}, and {SCHEMA} is read here"
        run, about = found.get("run"), found.get("about")
        if not isinstance(run, str) or not re.fullmatch(r"[\w-]{1,64}", run) or not isinstance(about, dict):
            return "its first line does not describe a log"
        if found.get("configuration") != self.configuration:
            return "it was written under another configuration"
        return found

    def _tell_others(self) -> None:
        """Say what else is there, and how the nearest of it differs."""
        try:
            others = [entry.path for entry in os.scandir(self.root) if entry.is_dir(follow_symlinks=False)]
        except OSError:
            return
        others = [path for path in others if path != str(self.folder)]
        nearest: list[str] | None = None
        for path in others[:_COMPARED]:
            theirs = _configuration_in(Path(path))
            if theirs is None:
                continue
            mine = self.configuration
            names = [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)]
            said = [f"{n}: {files.brief(theirs.get(n))} there, {files.brief(mine.get(n))} now" for n in names]
            if nearest is None or len(said) < len(nearest):
                nearest = said
        if others:
            more = [f"and {len(nearest) - _NAMED} more"] if nearest and len(nearest) > _NAMED else []
            differing = f" (the nearest: {', '.join([*nearest[:_NAMED], *more])})" if nearest else ""
            self._say(
                f"it has answers of {len(others)} other configuration{'s' * (len(others) > 1)}, which are not "
                f"used{differing}"
            )

    # --- writing -----------------------------------------------------------------------------------------------------

    def append(self, key: str, entry: Mapping[str, Any]) -> None:
        """Keep a prompt with all its answers. What cannot be written waits for room, and the run goes on."""
        if self.off is not None:
            return
        try:
            line = sealed.seal(self._place(self.run), {"key": key, **entry}) + b"\n"
        except (TypeError, ValueError) as error:  # half a character, which no file can hold
            logger.warning("resume: an answer cannot be kept (%s)", files.why(error))
            return
        self._waiting.append(line)
        if self._failed is not None and time.monotonic() - self._failed < _RETRY:
            self._drop_surplus()
            return
        self._flush()

    def close(self) -> None:
        """Bring everything to the disk. What then could not be written is said."""
        if self._waiting:
            self._flush()
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file)
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None
        if lost := self._lost + len(self._waiting):
            self._say(f"{lost} prompts of this run are not in it, and would be made again")
        self._waiting = []

    def _flush(self) -> None:
        """Write what waits, in one call of the system, so that a line is there or not."""
        try:
            if self._file is None:
                self._file = self._open()
            self._write(b"".join(self._waiting))
            self._waiting.clear()
            if time.monotonic() - self._synced > _SYNC:
                self._synced = time.monotonic()
                os.fsync(self._file)
        except OSError as error:
            if self._failed is None:
                self._say(
                    f"answers cannot be kept there ({files.why(error)}): the run goes on, and only what it computes "
                    "from now on would be made again; make room, and they are written"
                )
            self._failed = time.monotonic()
            self._drop_surplus()
            return
        if self._failed is not None and not self._waiting:
            self._failed = None
            self._say("answers are kept there again")

    def _open(self) -> int:
        """A new file of this process, with its first line."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.root, self.folder):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder)
            if (why := _unfit(folder)) is not None:
                raise OSError(why)
        header = {"schema": SCHEMA, "run": self.run, "about": self.runs[self.run], "configuration": self.configuration}
        how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | files.flags("O_NOFOLLOW", "O_CLOEXEC")
        number = 0
        while True:
            path = self.folder / (f"{self.run}-{number}.jsonl" if number else f"{self.run}.jsonl")
            try:
                file = os.open(path, how, 0o666)
                break
            except FileExistsError:  # the same model was evaluated before
                number += 1
        self._file, self._whole = file, 0
        try:
            self._write(sealed.seal(_HEADER, header) + b"\n")
        except OSError:
            self._file = None
            os.close(file)
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        return file

    def _write(self, block: bytes) -> None:
        """Append whole lines. Of a part that was written only nothing is left, where the file can be cut."""
        status = os.fstat(self._file)
        if status.st_size > self._whole:  # half a line that could not be taken away
            block = b"\n" + block
        elif status.st_size < self._whole:
            raise OSError("the file was cut by somebody else")
        try:
            view = memoryview(block)
            while view:
                view = view[os.write(self._file, view) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._whole)
            raise
        self._whole = status.st_size + len(block)

    def _drop_surplus(self) -> None:
        while sum(map(len, self._waiting)) > _MOST_WAITING:
            self._waiting.pop(0)
            self._lost += 1

    def _place(self, run: str) -> str:
        """Where a line belongs: to a file of this configuration and of that run."""
        return f"sample {SCHEMA} {self.name} {run}"

    def _say(self, what: str) -> None:
        logger.warning("%s", one_line(f"resume: {self.folder}: {what}"))


def _unfit(folder: Path) -> str | None:
    """Why a folder of the log is not used, or None: it is fine, or does not exist yet. Links are not followed."""
    try:
        mode = os.lstat(folder).st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{folder} cannot be looked at ({files.why(error)})"
    if stat.S_ISLNK(mode):
        return f"{folder} is a link, and links are not followed here"
    return None if stat.S_ISDIR(mode) else f"{folder} is no folder"


#: How a line of ours begins.
_BEGINS = re.compile(rb'\{"sha256": "(?P<check>[0-9a-f]{64})", "key": "(?P<key>[0-9a-f]{32})"')


def _lines_of(stream: Any) -> Iterator[tuple[bytes | None, int]]:
    """Whole lines without their ends, empty ones left out, and where they begin; None for what is torn or too long."""
    start = 0
    while line := stream.readline(_MOST_LINE):
        length = len(line)
        if line.endswith(b"\n"):
            if length > 1:
                yield line[:-1], start
        else:
            while line and not line.endswith(b"\n"):
                length += len(line := stream.readline(_MOST_LINE))
            yield None, start
        start += length


def _configuration_in(folder: Path) -> dict[str, Any] | None:
    """The configuration of a folder, from the first of its files that says one."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir())[:3]:
            with contextlib.suppress(UserError, sealed.Broken), files.opened(path, follow=False) as (stream, _):
                found = sealed.unseal(_HEADER, stream.readline(_MOST_LINE).rstrip(b"\n")).get("configuration")
                if isinstance(found, dict):
                    return found
    return None


__all__ = ["FOLDER", "SCHEMA", "SampleLog", "digest"]
