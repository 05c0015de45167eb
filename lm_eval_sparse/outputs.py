"""Whether a file can be written where it is to go, found before hours of compute. Leaves nothing behind."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError


def check_writable(option: str, folder: Path, names: Sequence[str]) -> None:
    """Raise `UserError` unless files of these names can be made in `folder`, which need not exist yet.

    What is made to find out lies under a name of its own and is gone afterwards, so that runs that save in the same
    place at this moment neither see nor miss anything.

    Args:
        option: what the user typed, as the message begins.
    """
    path = folder.absolute()
    existing = _existing(option, path)
    _check_lengths(option, existing, path, names)
    if not existing.is_dir():
        raise UserError(f"{option}: {existing} is a file; give a folder, or a file name in a folder")
    # Permissions tell little: root passes all of them, and a file system may be read-only or full.
    try:
        with tempfile.TemporaryDirectory(prefix=".lm-eval-sparse-", dir=existing) as probe:
            (Path(probe) / "probe").write_bytes(b"\n")
    except OSError as error:
        raise UserError(f"{option}: {existing} cannot be written ({_why(error)}); give another folder") from None


def _existing(option: str, path: Path) -> Path:
    """The deepest part of `path` that exists."""
    for part in (path, *path.parents):
        try:
            os.stat(part)
            return part
        except OSError as error:
            if os.path.islink(part):
                raise UserError(f"{option}: {part} is a link that leads nowhere; give another folder") from None
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
                raise UserError(f"{option}: {part} cannot be read ({_why(error)}); give another folder") from None
    return Path(path.anchor)


def _check_lengths(option: str, existing: Path, folder: Path, names: Sequence[str]) -> None:
    """Raise when a name or the whole path is longer than the file system takes; its limits are in bytes."""
    if not hasattr(os, "pathconf"):
        return
    for limit, parts in (
        ("PC_NAME_MAX", [*folder.relative_to(existing).parts, *names]),
        ("PC_PATH_MAX", [str(folder / name) for name in names]),
    ):
        most = os.pathconf(existing, limit)
        for part in parts:
            if (size := len(os.fsencode(part))) > most > 0:
                raise UserError(
                    f"{_cut(option)}: {_cut(part)} has {size} bytes, {most} are allowed; give a shorter one"
                )


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}…"


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__
