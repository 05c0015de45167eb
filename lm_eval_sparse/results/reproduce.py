"""The command that repeats a run, from its results. Knows lm-eval's result files and options, and shell quotes."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from typing import Any

from .. import masking, spelling


def reproduce_command(results: Mapping[str, Any]) -> str:
    """The command line that repeats the run, rebuilt from its results (so without local paths and secrets).

    One line whatever is in them; what has another shape than lm-eval gives it is left out.
    """
    config = _mapping(results.get("config"))
    secrets = masking.values_in(config.get("model_args"))
    parts = ["lm_eval", "--model", str(config.get("model", "sparse-hf"))]
    parts += _option("--model_args", _pairs(config.get("model_args")))
    tasks = _mapping(results.get("configs")) or _mapping(results.get("results"))
    parts += ["--tasks", ",".join(map(str, tasks))]
    shots = {shot for shot in _mapping(results.get("n-shot")).values() if isinstance(shot, int)}
    if len(shots) == 1 and shots != {0}:
        parts += ["--num_fewshot", str(shots.pop())]
    parts += _option("--limit", _number(config.get("limit")))
    if config.get("batch_size") not in (None, 1, "1"):
        parts += ["--batch_size", str(config["batch_size"])]
    parts += _option("--gen_kwargs", _pairs(config.get("gen_kwargs")))
    parts += _option("--system_instruction", results.get("system_instruction"))
    if results.get("chat_template"):
        parts.append("--apply_chat_template")
    return " ".join(_quoted(masking.mask(part, secrets)) for part in parts)


def _option(name: str, value: Any) -> list[str]:
    return [name, str(value)] if value else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _pairs(given: Any) -> str:
    """Arguments in lm-eval's form `name=value,…`, without secrets."""
    if isinstance(given, str):
        given = dict(pair.partition("=")[::2] for pair in given.split(",") if pair)
    shown = {name: value for name, value in _mapping(given).items() if not masking.is_secret(name)}
    return ",".join(f"{name}={_shown(name, masking.masked(value))}" for name, value in shown.items())


def _shown(name: str, value: Any) -> Any:
    if name != "method" or not isinstance(value, str):
        return _without_folder(value)
    return "+".join(":".join(map(_method, chain)) for chain in spelling.chains(value))


def _method(part: str) -> str:
    """A method's name, or a file of somebody's own without its folder."""
    path, attribute = spelling.file_of(part) or (part, "")
    return f"path/to/{os.path.basename(path)}:{attribute}" if "/" in path else part


def _number(value: Any) -> str:
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        return str(int(value)) if value.is_integer() else str(value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def _without_folder(value: Any) -> Any:
    """Where a folder lies on somebody's machine is nobody's business; its name is enough."""
    if isinstance(value, str) and (value.startswith(("/", ".", "~")) or os.path.isdir(value)):
        return f"path/to/{os.path.basename(os.path.abspath(value))}"
    return value


def _quoted(part: str) -> str:
    """A word of the command for a shell. What could end a line or a block of code is written as the shell's escapes."""
    if part.isprintable() and not any(character in part for character in "<`"):
        return shlex.quote(part)
    return "$'" + "".join(map(_escaped, part)) + "'"


def _escaped(character: str) -> str:
    if character in "\\'":
        return "\\" + character
    if character.isprintable() and character not in "<`":
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "replace"))
