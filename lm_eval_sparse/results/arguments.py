"""Arguments of a run as result files hold them: an object, a list or a text of `name=value`, JSON. Knows JSON only."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from .. import masking
from .parts import MISSING, Part
from .reproduce import arguments_of


def given(part: Part) -> dict[str, Any]:
    """Arguments by name, in any form that `simple_evaluate` takes: an object, a list or a text of `name=value`, JSON.

    Raises:
        UserError: they are something else: what was asked for would not be known.
    """
    value = part.value
    if value is MISSING or value is None or isinstance(value, dict):
        return value if isinstance(value, dict) else {}
    if isinstance(value, list) and all(isinstance(pair, str) for pair in value):
        value = ",".join(value)
    if not isinstance(value, str):
        raise part.refuse("an object or a text of name=value")
    return {name.strip(): _typed(text) for name, text in arguments_of(value).items()}


def _typed(value: Any) -> Any:
    """A value as lm-eval reads it in `name=value`."""
    if not isinstance(value, str):
        return value
    text = str(value).strip()
    if text in ("True", "true", "False", "false"):
        return text in ("True", "true")
    for read in (int, float, json.loads):
        with contextlib.suppress(ValueError, RecursionError):
            return read(text)
    return text


def masked(part: Part) -> dict[str, Any]:
    """The same without secrets. Raises `UserError`."""
    return {name: masking.masked(value) for name, value in given(part).items() if not masking.is_secret(name)}
