"""Values in a file of someone else, each with the way there, taken only as what they have to be.

`Part("out/r.json", "", content)["config"]["limit"].number()` gives a number or says in one line that
`config.limit` of `out/r.json` is none. Knows JSON values only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..paths import cut
from .files import brief

#: What stands in for a value that is not there.
MISSING = object()
#: Larger numbers are none that anybody measures, and sums and pictures of them overflow.
LARGEST = 1e100
#: Likewise of whole numbers: up to here a float holds them exactly, and columns of tables hold them at all.
MOST = 2**53


def is_finite(value: Any) -> bool:
    """A number of reasonable size; True, NaN and infinity are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


@dataclass(slots=True)  # frozen it would take twice as long to make, and a study has millions
class Part:
    """A JSON value, the file that it stands in, and its name there; `MISSING` where there is none."""

    where: str
    name: str
    value: Any

    def __getitem__(self, key: str) -> Part:
        """A part of this object, which may be missing. Raises `UserError` when this is no object."""
        return Part(self.where, f"{self.name}.{cut(key)}" if self.name else cut(key), self.object().get(key, MISSING))

    def __bool__(self) -> bool:
        """Whether there is a value: neither missing nor null."""
        return self.value is not MISSING and self.value is not None

    def refuse(self, expected: str) -> UserError:
        """The error that says what this is and what it has to be."""
        said = "is missing" if self.value is MISSING else f"is {_shown(self.value)}"
        return UserError(f"{self.where}: {self.name} {said}, {expected} is expected")

    def object(self) -> dict[str, Any]:
        """A JSON object. Raises `UserError`."""
        if not isinstance(self.value, dict):
            raise self.refuse("a JSON object")
        return self.value

    def items(self) -> Iterator[tuple[str, Part]]:
        """The parts of a JSON object by name. Raises `UserError`."""
        return ((key, self[key]) for key in self.object())

    def list(self) -> list[Part]:
        """The parts of a JSON list. Raises `UserError`."""
        if not isinstance(self.value, list):
            raise self.refuse("a JSON list")
        return [Part(self.where, f"{self.name}[{place}]", value) for place, value in enumerate(self.value)]

    def text(self) -> str:
        """A text that is not empty. Raises `UserError`."""
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.refuse("a name")
        return self.value

    def share(self) -> float:
        """A number from 0 to 1. Raises `UserError`."""
        if not is_finite(self.value) or not 0 <= self.value <= 1:
            raise self.refuse("a number from 0 to 1")
        return float(self.value)

    def count(self) -> int:
        """A whole number of at least 0. Raises `UserError`."""
        if not is_finite(self.value) or self.value < 0 or self.value != math.floor(self.value):
            raise self.refuse("a whole number of at least 0")
        if self.value > MOST:
            raise self.refuse(f"a whole number of at most {MOST}")
        return int(self.value)

    def flag(self) -> bool:
        """True or false. Raises `UserError`."""
        if not isinstance(self.value, bool):
            raise self.refuse("true or false")
        return self.value

    def seconds(self) -> float:
        """A number of at least 0, which lm-eval saves as a text. Raises `UserError`."""
        try:
            found = float(self.value) if isinstance(self.value, str) else self.value
        except ValueError:
            found = None
        if not is_finite(found) or found < 0:
            raise self.refuse("a number of seconds")
        return float(found)


def _shown(value: Any) -> str:
    return repr(brief(value)) if isinstance(value, str) else brief(value)
