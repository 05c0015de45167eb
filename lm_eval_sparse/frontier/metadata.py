"""What tasks read of --metadata, where lm-eval also puts the model arguments, and what each value must be.

Every value is looked at here, before a model is loaded and again where it is used; so are the values of options that
`show` and `check-task` share. Knows values, and nothing of tasks, tokenizers or data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .. import paths
from ..errors import UserError, nearest
from ..results.files import brief, parse_json
from ..values import TEXT, check, whole, yes_or_no

OPTION = "--metadata "

#: Documents of a leaf that may be asked for: more take longer to number than anyone waits.
MOST_SAMPLES = 1_000_000
_SEEDS = (-(10**15), 10**15)
_MOST_TOKENS = 10**9

#: What leads to a tokenizer and may be given as an object by who calls lm-eval from Python.
NAMES = ("tokenizer", "pretrained", "model")
#: Arguments of `from_pretrained`, texts but for the switch.
_SWITCH = "trust_remote_code"
_TEXTS = ("revision", "subfolder", "gguf_file")
#: Those that a tokenizer takes; with `gguf_file` those of a model.
TOKENIZER_OPTIONS = ("revision", "subfolder", _SWITCH)
MODEL_OPTIONS = (*_TEXTS, _SWITCH)
_LIMITS = ("max_length", "max_model_len")
_HUBS = ("squad_hub", "quality_hub", "toefl_hub")

#: All that the tasks of this package read of --metadata.
KNOWN = (
    "samples", "seed", "strict", "question_first",
    "qa_folder", *_HUBS, *NAMES, *MODEL_OPTIONS, *_LIMITS, "add_bos_token",
)  # fmt: skip


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """What every leaf reads of --metadata, so that a mistake is found before a model is loaded. Raises `UserError`."""
    if not isinstance(metadata, Mapping):
        raise UserError(f"""--metadata must be a JSON object, such as '{{"seed": 7}}'; this is {brief(metadata)}""")
    samples(OPTION, metadata)
    seed(OPTION, metadata)
    strict(OPTION, metadata)
    question_first(OPTION, metadata)
    # Given to the model as often as here, so no option is named.
    for name in NAMES:
        tokenizer_name("", name, metadata.get(name))
    loader_options("", metadata, MODEL_OPTIONS)
    limit("", metadata)
    add_bos("", metadata)
    if (folder := metadata.get("qa_folder")) is not None:
        check(OPTION, "qa_folder", folder, TEXT)
        paths.folder(f"{OPTION}qa_folder={folder!r:.80}", folder)
    for name in _HUBS:
        if metadata.get(name) is not None:
            check(OPTION, name, metadata[name], TEXT)


def check_keys(typed: Iterable[str]) -> None:
    """Raise `UserError` for a name in --metadata that no task of this package reads, and would silently pass over."""
    if unknown := [str(key) for key in typed if key not in KNOWN]:
        close = nearest(unknown[0], KNOWN, 1)
        known = f"{f'{close} Frontier' if close else '; frontier'} tasks read {', '.join(KNOWN)}"
        raise UserError(f"{OPTION}{brief(unknown[0])} is unknown{known}")


def samples(option: str, metadata: Mapping[str, Any]) -> int:
    """How many documents. `option` is what a message begins with. Raises `UserError`, as all of these do."""
    return whole(option, "samples", metadata.get("samples", 100), 1, MOST_SAMPLES)


def seed(option: str, metadata: Mapping[str, Any]) -> int:
    """What documents are drawn with."""
    return whole(option, "seed", metadata.get("seed", 0), *_SEEDS)


def strict(option: str, metadata: Mapping[str, Any]) -> bool:
    """Whether a leaf that cannot run is an error."""
    return _flag(option, "strict", metadata.get("strict", False))


def question_first(option: str, metadata: Mapping[str, Any]) -> bool:
    """Whether the question stands before the context as well."""
    return _flag(option, "question_first", metadata.get("question_first", True))


def _flag(option: str, name: str, value: Any) -> bool:
    """A switch that only --metadata has, so that what to type is said as one types it there."""
    try:
        return yes_or_no(option, name, value)
    except UserError:
        raise UserError(
            f"{option}{name}={brief(value)} is not accepted: {name} must be true or false; type "
            f"""--metadata '{{"{name}": true}}' or --metadata '{{"{name}": false}}'"""
        ) from None


def tokenizer_name(option: str, name: str, value: Any) -> None:
    """Raise `UserError` where `value` can be neither a name nor a path, nor an object that stands for one."""
    if value is None:
        return
    if isinstance(value, str | os.PathLike):
        check(option, name, str(value), TEXT)
        paths.expand(f"{option}{name}={str(value)!r:.80}", value)
    elif isinstance(value, bool | int | float | Mapping | list | tuple):
        check(option, name, value, TEXT)


def loader_options(option: str, metadata: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Arguments for `from_pretrained` of those `names` that are given. Without the user's word no code is run."""
    found: dict[str, Any] = {}
    for name in names:
        value = metadata.get(name)
        if name == _SWITCH:
            found[name] = value is not None and yes_or_no(option, name, value)
        elif value is not None:
            check(option, name, value, TEXT)
            found[name] = value
    return found


def limit(option: str, metadata: Mapping[str, Any]) -> int | None:
    """Tokens that the model was told to take, None where it was not."""
    found = [whole(option, name, metadata[name], 1, _MOST_TOKENS) for name in _LIMITS if metadata.get(name) is not None]
    return found[0] if found else None


def add_bos(option: str, metadata: Mapping[str, Any]) -> bool | None:
    """Whether prompts begin with the token for that, None where nothing was said."""
    value = metadata.get("add_bos_token")
    return None if value is None else yes_or_no(option, "add_bos_token", value)


# ------------------------------------------------------------------------------------------------------- command lines


def read_metadata(given: str | None) -> dict[str, Any]:
    """The value of --metadata. Raises `UserError` unless it is a JSON object whose values tasks can take."""
    if given is None:
        return {}
    try:
        found = parse_json(given, "--metadata")
    except UserError as error:
        raise UserError(f"""{error}, such as --metadata '{{"seed": 7}}'""") from None
    check_metadata(found)
    return found


def read_number(option: str, given: str, least: int, most: int = MOST_SAMPLES) -> int:
    """The value of an option that is a whole number. Raises `UserError`."""
    if not re.fullmatch("[0-9]{1,9}", given) or not least <= int(given) <= most:
        raise UserError(
            f"{option} {brief(given)} given, but it must be a whole number from {least} to {most:,}; such as "
            f"{option} {least}"
        )
    return int(given)
