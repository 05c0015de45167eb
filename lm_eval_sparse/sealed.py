"""JSON objects in our caches, each a line that carries its own checksum and says whose line it is.

What was damaged, cut off, changed by hand or taken from another place does not fit its checksum; it is told from what
we wrote before any of it is parsed. No protection against someone who can write checksums, too.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .errors import UserError
from .results import files

_HEAD = b'{"sha256": "'
_NECK = b'", '
_START = len(_HEAD) + 64 + len(_NECK)


class Broken(ValueError):
    """A line is not as it was written."""


def seal(place: str, value: dict[str, Any]) -> bytes:
    """`value`, which must not be empty, as one line of JSON, without its line end.

    Args:
        place: where the line belongs; it does not fit anywhere else.
    """
    body = json.dumps(value, ensure_ascii=False).encode()
    return _HEAD + _digest(place, body) + _NECK + body[1:]


def unseal(place: str, line: bytes) -> dict[str, Any]:
    """What `seal` was given. Raises `Broken`."""
    if not fits(place, line):
        raise Broken("it does not fit its checksum")
    try:
        return files.parse_json(b"{" + line[_START:], "a line")
    except UserError as error:
        raise Broken(str(error)) from None


def fits(place: str, line: bytes) -> bool:
    """Whether `line` is as `seal` made it for `place`."""
    if not line.startswith(_HEAD) or line[_START - len(_NECK) : _START] != _NECK:
        return False
    return line[len(_HEAD) : len(_HEAD) + 64] == _digest(place, b"{" + line[_START:])


def _digest(place: str, body: bytes) -> bytes:
    return hashlib.sha256(place.encode() + b"\n" + body).hexdigest().encode()
