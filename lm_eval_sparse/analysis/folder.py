"""A folder that an analysis fills: all of it is there or nothing is, and nothing of anybody else is ever lost.

Where a link to a folder is given, the folder it leads to is filled, and the link stays.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..paths import check_writable, cut, expand, is_dir
from ..results.files import umask, why

#: Names the files of an analysis, so that the next one may replace them, and them only.
CONTENTS = "contents.json"


def checked(option: str, given: str) -> Path:
    """The folder to fill, as it is typed: none yet, an empty one, one that an earlier analysis has filled, or a link to
    one of them. Raises `UserError`, also for a link that leads nowhere.
    """
    folder = expand(option, given)
    check_writable(option, folder.absolute().parent, [])
    check_writable(option, folder, [CONTENTS])
    check_writable(option, resolved(folder).parent, [])  # where the new folder is made, and takes the old one's place
    if is_dir(folder) and (others := _others(folder)):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"{option}: {folder} holds {cut(others[0])}{more}, which no analysis has written; give a new folder, such "
            f"as {folder / 'analysis'}"
        )
    return folder


def resolved(folder: Path) -> Path:
    """Where a folder lies once all links on the way are followed; it need not exist."""
    return Path(os.path.realpath(folder))


def _others(folder: Path) -> list[str]:
    """Files in a folder that no analysis has left there."""
    found = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    try:
        known = set(json.loads((folder / CONTENTS).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    return [name for name in found if name not in known]


@contextmanager
def filled(option: str, folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block ends well; else it is gone.

    Raises:
        UserError: a file cannot be written, as on a full disk. What stood in `folder` stays.
    """
    target = resolved(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=".lm-eval-sparse-"))
    except OSError as error:
        raise UserError(f"{option} cannot be written ({why(error)}); give another folder") from None
    try:
        yield fresh
        files = sorted(str(path.relative_to(fresh)) for path in fresh.rglob("*") if path.is_file())
        (fresh / CONTENTS).write_text(json.dumps({"files": [CONTENTS, *files]}, indent=1) + "\n")
        os.chmod(fresh, 0o777 & ~umask())
        _swap(fresh, target)
    except OSError as error:
        raise UserError(f"{option} cannot be written ({why(error)}); give another folder") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(fresh: Path, target: Path) -> None:
    """Put `fresh` where `target` is. Somebody may have put files there meanwhile: then they stay."""
    if not is_dir(target):
        os.rename(fresh, target)
        return
    if others := _others(target):
        raise UserError(f"{target} holds {cut(others[0])} now, which no analysis has written; give another folder")
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=".lm-eval-sparse-"))
    os.rename(target, old / "old")
    try:
        os.rename(fresh, target)
    except OSError:
        os.rename(old / "old", target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
