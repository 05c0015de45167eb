"""A folder is compared with the record of what was put into it: the same files and no others, each with its hash.

Hashing a model takes some tenths of a second. So that only the first process pays for it, a stamp beside the folder
says what the files looked like when their content was good: size, times and inode. The time of a file's last change
(ctime) cannot be set by anyone, and overwriting sets it, whatever is done to the other times. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

from .errors import UserError
from .results import files

_MOST_RECORD = 1 << 20
#: Nanoseconds. A clock of files ticks in steps of up to 10 ms: what changed so lately may change without a trace.
_TICK = 50_000_000

#: What a file looks like: bytes, time of its last writing, time of its last change (ns), inode.
Look = dict[str, list[int]]


class Damaged(Exception):
    """A folder is not as its record says; the message says what is wrong."""


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """The hash of each file in `folder`, for its record."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def read_record(path: Path) -> dict[str, Any]:
    """The record at `path`. Raises `Damaged`."""
    try:
        return files.read_json(path, most=_MOST_RECORD, follow=False)
    except UserError as error:
        raise Damaged(str(error)) from None


def check(folder: Path, record: str, stamp: Path) -> dict[str, Any]:
    """Return the record of `folder`, all of whose files are as it says.

    Args:
        record: name of the record in `folder`, JSON with `files`: a hash by name, for all files but itself.
        stamp: a file beside the folder, written here if it can be.

    Raises:
        Damaged: they are not.
        OSError: the folder cannot be looked at; `FileNotFoundError` when there is none.
    """
    look = _look(folder)
    known = read_record(folder / record)
    if _stamped(stamp) == look:
        return known
    wanted = known.get("files")
    if not isinstance(wanted, dict) or not wanted:
        raise Damaged(f"{record} names no files")
    if extra := sorted(look.keys() - wanted.keys() - {record}):
        raise Damaged(f"{extra[0]} does not belong there")
    if missing := sorted(wanted.keys() - look.keys()):
        raise Damaged(f"{missing[0]} is missing")
    for name, digest in wanted.items():
        if sha256(folder / name) != digest:
            raise Damaged(f"{name} has other content")
    if _look(folder) != look:
        raise Damaged("its files are being changed")
    _write_stamp(stamp, look)
    return known


def _look(folder: Path) -> Look:
    """What the files in `folder` look like. Raises `Damaged` for anything else in it, a link included."""
    found: Look = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise Damaged(f"{entry.name} is no regular file")
            found[entry.name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return found


def _stamped(stamp: Path) -> Look | None:
    try:
        return files.read_json(stamp, most=_MOST_RECORD, follow=False)
    except UserError:
        return None


def _write_stamp(stamp: Path, look: Look) -> None:
    if max(changed for _, _, changed, _ in look.values()) + _TICK > time.time_ns():
        return  # the next process will
    try:
        files.write_whole(stamp, json.dumps(look).encode())
    except OSError:
        return  # a cache that others filled may be read-only: then each process hashes
