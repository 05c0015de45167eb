"""How `method=` is spelt: names joined by `+` and `:`, and files of the user's own. Whose word runs such a file.

`twilight:quest+snapkv` joins phases by a plus sign and puts one method around another by a colon. In the place of a
name `path/to/file.py:Class` may stand, whose colon belongs to it. A path that begins with `/`, `./`, `../` or `~` may
hold plus signs and colons, too. Knows the spelling only: no method, and no torch.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from .errors import UserError

#: Set to 1 it lets configuration files name code of the user's own.
ALLOW_CODE = "LM_EVAL_SPARSE_ALLOW_CODE"

_allowed: ContextVar[bool] = ContextVar("allowed", default=False)

_LOCAL = re.compile(r"(?:/|\.{1,2}/|~)")
_FILE = re.compile(r"(?P<path>[^:+]*\.py):(?P<attribute>[^:+]*)")
_LOCAL_FILE = re.compile(r"(?P<path>(?:/|\.{1,2}/|~).*?\.py):(?P<attribute>[^:+]*)", re.DOTALL)


def chains(text: str) -> list[list[str]]:
    """The parts of what stands behind `method=`: for each phase the methods around each other, the outermost first."""
    found: list[list[str]] = [[]]
    place = 0
    while True:
        part = _part(text, place)
        found[-1].append(part)
        place += len(part)
        if place >= len(text):
            return found
        if text[place] == "+":
            found.append([])
        place += 1


def _part(text: str, place: int) -> str:
    """What stands at `place`, up to the next sign that joins."""
    pattern = _FILE.match(text, place) or _LOCAL_FILE.match(text, place)
    if pattern is not None:
        return pattern.group()
    # What can only be meant as a path is taken whole, so that it is spoken of as one.
    until = "+" if _LOCAL.match(text, place) else ":+"
    return re.compile(f"[^{until}]*").match(text, place).group()


def file_of(part: str) -> tuple[str, str] | None:
    """Path and class of a part that names a file; the class is empty where none is named. None for a method's name."""
    pattern = _FILE.fullmatch(part) or _LOCAL_FILE.fullmatch(part)
    if pattern is not None:
        return pattern["path"], pattern["attribute"]
    if part.endswith(".py") or _LOCAL.match(part) or "/" in part:
        return part, ""
    return None


@contextlib.contextmanager
def allowing_code(allowed: bool = True) -> Iterator[None]:
    """While this lasts, configuration files may name code, if `allowed`; else nothing changes."""
    token = _allowed.set(_allowed.get() or allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def refuse_code(model_args: Any, source: str, allowed: bool = False) -> None:
    """Raise `UserError` when model arguments that were read from `source` name a file with code.

    Such a file runs when its path is typed on a command line or in a Python program. What somebody else has written, a
    configuration or results, may not run anything, unless the user says so: `allowed`, `allowing_code`, or `ALLOW_CODE`
    is set.

    Args:
        model_args: as lm-eval has them, a mapping or a text.
        source: where they were read, as a message names it.
    """
    if allowed or _allowed.get() or os.environ.get(ALLOW_CODE, "0") not in ("", "0"):
        return
    pairs: list[tuple[Any, Any]] = []
    if isinstance(model_args, str):
        pairs = [(name, value) for name, _, value in (pair.partition("=") for pair in model_args.split(","))]
    elif isinstance(model_args, Mapping):
        pairs = list(model_args.items())
    # Whatever reads them, and whichever of two it takes: no argument of that name may name a file.
    methods = [value for name, value in pairs if str(name).strip() == "method" and isinstance(value, str)]
    for method, part in ((typed, part) for typed in methods for chain in chains(typed) for part in chain):
        if file_of(part) is not None:
            raise UserError(
                f"{source} has method={method}, and {part} is a file with code, which runs only when you type it "
                "yourself: give method= in --model_args (with all other model arguments), or, if you trust whoever "
                f"wrote {source}, set {ALLOW_CODE}=1 (or add --allow-code to a command of lm-eval-sparse)"
            )
