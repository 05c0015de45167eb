"""Methods of a file of the user's own: `method=path/to/file.py:Class`.

The file is a Python module that stands alone. It is read once, hashed as it was read, and run under a name that no
import finds. Whoever calls this knows that the user typed the path (`spelling.refuse_code`).
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

from .. import paths
from ..errors import UserError, nearest
from ..results.files import read_bytes
from .base import Method

#: No file that somebody wrote has more.
MOST_BYTES = 4 << 20


@dataclass(frozen=True)
class Origin:
    """Where the code of a method comes from, as results name it.

    Attributes:
        place: a file's name with the class, or a package with its version.
        sha256: of the file that holds the class. What that file imports is not in it.
    """

    place: str
    sha256: str | None

    def describe(self) -> dict[str, Any]:
        return {"from": self.place, "sha256": self.sha256}


def load(typed: str, path: str, attribute: str) -> tuple[Any, Origin]:
    """What a file holds under a name, and where it is from. Whether it is a method is not looked at.

    Args:
        typed: as messages begin, such as `method=./own.py:Own`.

    Raises:
        UserError: no such file, none of Python, one that fails, or without such a class.
    """
    if not path.endswith(".py"):
        raise UserError(f"{typed}: a file with a method ends in .py; type method=path/to/file.py:Class")
    file = paths.expand(typed, path).absolute()
    if not paths.exists(file):
        raise UserError(f"{typed}: {paths.cut(str(file))} does not exist; type method=path/to/file.py:Class")
    try:
        source = read_bytes(file, most=MOST_BYTES)
    except UserError as error:
        raise UserError(f"{typed}: {error}; type method=path/to/file.py:Class") from None
    digest = hashlib.sha256(source).hexdigest()
    name = f"lm_eval_sparse_file_{hashlib.sha256(f'{file} {digest}'.encode()).hexdigest()[:16]}"
    module = sys.modules.get(name) or _run(typed, name, file, source)
    if attribute not in vars(module):
        own = [value.__name__ for value in vars(module).values() if _defined(value, name)]
        missing = f"has no {attribute!r}{nearest(attribute, own)}" if attribute else "is named without a class"
        known = f"methods in it: {', '.join(own)}" if own else "there is no method in it"
        raise UserError(f"{typed}: {file.name} {missing}; {known}; type method={path}:{(*own, 'Class')[0]}")
    return vars(module)[attribute], Origin(f"{file.name}:{attribute}", digest)


def _defined(value: Any, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, Method) and value.__module__ == module


def _run(typed: str, name: str, file: Path, source: bytes) -> ModuleType:
    """The module of a file, run under a name of its own."""
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # where dataclasses look for it
    try:
        exec(compile(source, str(file), "exec"), module.__dict__)
    except BaseException as error:  # written by anybody, who may end the program or raise what is no Exception
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(
            f"{typed}: {file.name} fails when it is imported ({told(error, str(file))}); mend it, or give another file"
        ) from error
    return module


def told(error: BaseException, file: str | None = None) -> str:
    """What was raised while code was imported, in one line, with the line of `file` that was running."""
    lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == file]
    number = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
    words = error.msg if isinstance(error, SyntaxError) else str(error)
    first = (words.strip().splitlines() or [""])[0]
    where = f", line {number}" if number else ""
    return f"{type(error).__name__}: {first}{where}" if first else f"{type(error).__name__}{where}"
