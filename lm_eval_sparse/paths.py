"""Paths that users type: expanded, looked for, and tried before hours of compute. Looking leaves nothing behind.

Messages begin with what was typed, as the user typed it (`pretrained='~/m'`, `--output_path out`): `option`.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .results.files import why

#: The variable that names the folder of our caches, and the folder without it.
CACHE = "LM_EVAL_SPARSE_CACHE"
_CACHE = "~/.cache/lm_eval_sparse"
#: The package that holds the YAML files of our tasks.
TASKS = "lm_eval_sparse.tasks"


def expand(option: str, given: Any) -> Path:
    """`given` as a path, with `~` expanded; it need not exist.

    Raises:
        UserError: it is no text or an empty one, names a user who does not exist, or no file system takes it.
    """
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"{cut(option)}: {given!r} is no path; give a path")
    text = os.fspath(given)
    if not str(text).strip():
        raise UserError(f"{cut(option)} is empty; give a path, such as . for this folder")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise UserError(f"{cut(option)}: a path cannot hold half a character; give another path") from None
    if "\0" in str(text):
        raise UserError(f"{cut(option)}: a path cannot hold a null character; give another path")
    try:
        path = _home(Path(text))
    except (RuntimeError, KeyError):
        user = Path(text).parts[0]
        raise UserError(f"{cut(option)}: there is no home folder for {user}; give the path in full") from None
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            whole = path.absolute()
            _check_lengths(option, _existing(option, whole.parent), whole.parent, [whole.name])
            raise UserError(f"{cut(option)}: the path is too long for the file system; give a shorter one") from None
    return path


def _home(path: Path) -> Path:
    if path.parts[:1] == ("~",) and not os.environ.get("HOME", "-"):
        # An empty HOME would mean the root of the disk.
        import pwd

        return Path(pwd.getpwuid(os.getuid()).pw_dir, *path.parts[1:])
    return path.expanduser()


def folder(option: str, given: Any) -> Path:
    """`given` as the path of a folder that exists. Raises `UserError`."""
    path = expand(option, given)
    if is_dir(path):
        return path
    what = "is a file, not a folder" if exists(path) else "does not exist"
    raise UserError(f"{cut(option)}: {cut(str(path))} {what}; give a folder")


def looks_local(name: str) -> bool:
    """Whether a name can only be meant as a path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def look_up(option: str, path: Path) -> None:
    """Raise `UserError` when `path` lies below a file, so that there can be no such folder."""
    existing = _existing(option, path.absolute())
    if not existing.is_dir():
        raise UserError(f"{cut(option)}: {existing} is a file; give a folder")


def exists(path: Path) -> bool:
    """As `Path.exists`; also False where the file system refuses to say."""
    try:
        return path.exists()
    except OSError:
        return False


def is_dir(path: Path) -> bool:
    """As `Path.is_dir`; also False where the file system refuses to say."""
    try:
        return path.is_dir()
    except OSError:
        return False


def cache_root() -> Path:
    """The folder of our caches, which need not exist: `$LM_EVAL_SPARSE_CACHE`, by default ~/.cache/lm_eval_sparse."""
    typed = os.environ.get(CACHE)
    try:
        return expand(f"{CACHE}={typed or _CACHE}", typed or _CACHE).absolute()
    except UserError as error:
        if typed:
            raise
        raise UserError(f"{error}, in the variable {CACHE}") from None


def task_folders() -> list[str]:
    """The folders of `lm_eval_sparse.tasks`, in a wheel as in a checkout (a namespace package: data, no Python)."""
    spec = importlib.util.find_spec(TASKS)
    if spec is None or spec.submodule_search_locations is None:
        raise FileNotFoundError(f"the folder of {TASKS} is missing")
    return [str(folder) for folder in spec.submodule_search_locations]


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
    for name in names:
        if is_dir(path / name):
            raise UserError(f"{option}: {path / name} is a folder; give the name of a file")
    # Permissions tell little: root passes all of them, and a file system may be read-only or full.
    try:
        with tempfile.TemporaryDirectory(prefix=".lm-eval-sparse-", dir=existing) as probe:
            (Path(probe) / "probe").write_bytes(b"\n")
    except OSError as error:
        # So says the kernel of its own folders, which are there all the same.
        reason = "it takes no files" if isinstance(error, FileNotFoundError) and is_dir(existing) else why(error)
        raise UserError(f"{option}: {existing} cannot be written ({reason}); give another folder") from None


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
                raise UserError(f"{option}: {part} cannot be read ({why(error)}); give another folder") from None
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
                raise UserError(f"{cut(option)}: {cut(part)} has {size} bytes, {most} are allowed; give a shorter one")


def cut(text: str, longest: int = 120) -> str:
    """`text`, its middle left out where it is too long for a message: the end of a path says most."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"
