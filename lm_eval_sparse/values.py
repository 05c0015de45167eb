"""What the value of an argument has to be, in words and as a test, and the one way to refuse one that is not.

The arguments themselves stand in tables of `Takes`: of the model in `model.arguments`, of generation in
`model.generation_fields`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import UserError
from .masking import shown
from .results.files import brief


@dataclass(frozen=True)
class Takes:
    """What a value has to be: in words, as a test, and one that is good, for the user to type."""

    words: str
    good: Callable[[Any], bool]
    example: str = ""


def is_number(value: Any) -> bool:
    """A number, which True and NaN are not."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and not math.isnan(value)
    )


def is_whole(value: Any, least: int | None = None) -> bool:
    """A whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def is_tokens(value: Any) -> bool:
    """A token id or a list of them."""
    listed = value if isinstance(value, list | tuple) else [value]
    return all(is_whole(token) for token in listed)  # -1: none, by custom


FLAG = Takes("True or False", lambda value: isinstance(value, bool), "True")
COUNT = Takes("a whole number of at least 1", lambda value: is_whole(value, 1), "1")
MAYBE = Takes("a whole number of at least 0", lambda value: is_whole(value, 0), "0")
NUMBER = Takes("a number", is_number, "1.0")
FACTOR = Takes("a number above 0", lambda value: is_number(value) and value > 0, "1.0")
LEAST = Takes("a number of at least 0", lambda value: is_number(value) and value >= 0, "0.5")
SHARE = Takes("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1, "0.5")
TOKENS = Takes("a token id or a list of token ids", is_tokens, "2")
LENGTH = Takes(
    "a whole number from 1 to 2147483647", lambda value: is_whole(value, 1) and value < 2**31, "4096"
)  # of tokens: what counts them has 32 bits in places
TEXT = Takes("a name", lambda value: isinstance(value, str) and bool(value.strip()))
#: Given as whole numbers they mean the same, but transformers insists on fractions.
FRACTIONS = (NUMBER, FACTOR, LEAST, SHARE)

#: The words that stand for true and false in every argument of ours.
WORDS = {"true": True, "1": True, "false": False, "0": False}


def check(option: str, name: str, value: Any, takes: Takes) -> None:
    """Raise `UserError` unless `value` is what `takes` says.

    Args:
        option: what stands before the argument's name on the command line, such as `--gen_kwargs `; may be empty.
    """
    if takes.good(value):
        return
    said = f"{option}{name}={brief(shown(name, value))}"
    such = f", such as {name}={takes.example}" if takes.example else ""
    raise UserError(f"{said} is not accepted: give {takes.words}{such}, or leave {name} out")


def whole(option: str, name: str, value: Any, least: int | None, most: int | None = None) -> int:
    """`value`, a whole number, or a text or a float that stands for one, within bounds. Raises `UserError`."""
    try:
        number = int(value) if isinstance(value, float) and value.is_integer() else int(str(value))
    except (ValueError, OverflowError):
        number = None
    good = number is not None and not isinstance(value, bool)
    if not good or (least is not None and number < least) or (most is not None and number > most):
        bounds = [f"of at least {least}"] * (least is not None) + [f"of at most {most}"] * (most is not None)
        accepted = " ".join(["a whole number", " and ".join(bounds)]).strip()
        raise UserError(f"{option}{name}={brief(value)} is not accepted: {name} must be {accepted}")
    return number


def yes_or_no(option: str, name: str, value: Any) -> bool:
    """`value` as true or false, by its word. Raises `UserError`: anything else would be taken for true."""
    found = WORDS.get(str(value).strip().lower())
    if found is None:
        raise UserError(
            f"{option}{name}={brief(shown(name, value))} is not accepted: {name} must be true or false; type {name}="
            f"True or {name}=False"
        )
    return found
