"""Files of others are read here, and files of ours are written: whole or not at all.

What is read may be torn, huge, nested without end, or no file: each is refused in one line. Knows bytes and JSON only.
"""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

#: Larger files are refused: a results file with all its configurations has less than a hundredth of it.
MOST_BYTES = 1 << 30
#: How names of files begin that are not yet whole.
PARTIAL = ".lm-eval-sparse-"
#: JSON nested deeper is refused: everything that walks through it may call itself at every level.
DEEPEST = 100


@contextlib.contextmanager
def opened(path: Path, *, follow: bool = True) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, open for reading, and its size. Nothing else is opened: a pipe or a device may never end.

    Args:
        follow: whether `path` itself may be a link. Files of our caches never are; their folders may be.

    Raises:
        UserError: `path` cannot be read, is no regular file, or an `OSError` came while it was read.
    """
    try:
        if not follow and os.path.islink(path):
            raise UserError(f"{path} is a link; give a file")
        # Not blocking: opening a pipe without a writer would wait for one.
        file = os.open(path, os.O_RDONLY | flags("O_NONBLOCK", "O_CLOEXEC") | (0 if follow else flags("O_NOFOLLOW")))
        if stat.S_ISDIR(os.fstat(file).st_mode):  # which `fdopen` refuses without closing it
            os.close(file)
            raise UserError(f"{path} is a folder; give a file")
        with os.fdopen(file, "rb") as stream:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path} is no regular file; give a file")
            yield stream, status.st_size
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise UserError(f"{path} cannot be read ({why(error)})") from None


def read_bytes(path: Path, *, most: int = MOST_BYTES, follow: bool = True) -> bytes:
    """The content of a regular file. Raises `UserError` as `opened` does, and for more than `most` bytes."""
    with opened(path, follow=follow) as (stream, size):
        if size > most:
            raise UserError(f"{path} has {size:,} bytes, and at most {most:,} are read; give another file")
        return stream.read(most)


def flags(*names: str) -> int:
    """Flags for `os.open`, as far as this system has them."""
    return functools.reduce(operator.or_, (getattr(os, name, 0) for name in names))


def parse_json(content: bytes | str, where: str, wanted: type | None = dict) -> Any:
    """The JSON value in `content`, UTF-8 with or without a byte order mark.

    Args:
        where: what messages begin with: a file, a line of it, an option.
        wanted: the type it must have, `dict` or `list`; None for any.

    Raises:
        UserError: it is no JSON, is nested deeper than `DEEPEST`, or has another type.
    """
    names = {dict: "a JSON object", list: "a JSON list", None: "JSON"}[wanted]
    try:
        found = json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8 text; {names} is expected") from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno} of it"
        raise UserError(f"{where}: not JSON ({error.msg} in {at}); {names} is expected") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested by thousands
        raise UserError(f"{where}: not JSON that can be read ({why(error)}); {names} is expected") from None
    if depth(found) > DEEPEST:
        raise UserError(f"{where}: JSON nested more than {DEEPEST} levels deep; {names} is expected")
    if wanted is not None and not isinstance(found, wanted):
        raise UserError(f"{where}: {names} is expected, this is {brief(found)}")
    return found


def read_json(path: Path, wanted: type | None = dict, *, most: int = MOST_BYTES, follow: bool = True) -> Any:
    """The JSON value in a file of someone else. Raises `UserError` as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, most=most, follow=follow), str(path), wanted)


def depth(value: Any) -> int:
    """Levels of lists and objects in a JSON value; 0 for a number or a text. Does not call itself."""
    level, now = 0, [value]
    while now := [item for item in now if isinstance(item, dict | list)]:
        level += 1
        if level > DEEPEST:
            break
        now = [inner for item in now for inner in (item.values() if isinstance(item, dict) else item)]
    return level


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all, whatever happens; makes its folder. Raises `OSError`.

    A link in its place is replaced, never followed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # No part of the name: it may have as many characters as a name can have.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())  # or a power cut leaves a name with nothing behind it
        os.chmod(name, 0o666 & ~umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def umask() -> int:
    """The permissions that new files do not get. There is no way to ask without setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def brief(value: Any, longest: int = 60) -> str:
    """A value in one short line of a message."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else str(value)
    except (ValueError, RecursionError):
        text = type(value).__name__
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def why(error: BaseException) -> str:
    """The reason of an error in one line."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
