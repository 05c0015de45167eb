"""The command that repeats a run, from its results. Knows lm-eval's result files and options, and shell quotes."""

from __future__ import annotations

import ast
import json
import math
import os
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from .. import masking, spelling

#: Seeds of lm-eval by their names in results, in the order of `--seed`, and what they are by default.
_SEEDS = {"random_seed": 0, "numpy_seed": 1234, "torch_seed": 1234, "fewshot_seed": 1234}
#: What users may give our tasks by `--metadata`, and what it is by default.
_METADATA = {
    "samples": 100, "seed": 0, "strict": False, "question_first": True,
    "tokenizer": None, "qa_folder": None, "squad_hub": None, "quality_hub": None, "toefl_hub": None,
}  # fmt: skip
#: What every task of ours says of itself in its metadata.
_OURS = {"samples", "seed", "length"}
#: With one of these in a value, lm-eval's `name=value,…` means something else.
_MEANING = frozenset(",\"'[](){}")


def reproduce_command(results: Mapping[str, Any]) -> str:
    """The command line that repeats the run, rebuilt from its results (so without local paths and secrets).

    One line whatever is in them; what has another shape than lm-eval gives it is left out.
    """
    config = _mapping(results.get("config"))
    secrets = masking.values_in(config.get("model_args"))
    parts = ["lm_eval", *_option("--model", config.get("model", "sparse-hf"))]
    parts += _option("--model_args", _pairs(config.get("model_args")))
    tasks = _mapping(results.get("configs")) or _mapping(results.get("results"))
    parts += _option("--tasks", ",".join(map(str, tasks)))
    parts += _option("--num_fewshot", _shots(results, tasks))
    parts += _option("--limit", _number(config.get("limit")))
    if config.get("batch_size") not in (None, 1, "1"):
        parts += _option("--batch_size", config["batch_size"])
    parts += _option("--gen_kwargs", _pairs(config.get("gen_kwargs")))
    parts += _option("--seed", _seeds(config))
    parts += _option("--metadata", _pairs(_metadata(tasks, config)))
    parts += _option("--system_instruction", results.get("system_instruction"))
    if results.get("chat_template") or results.get("chat_template_sha"):
        parts.append("--apply_chat_template")
        if isinstance(turns := results.get("fewshot_as_multiturn"), bool):
            parts += _option("--fewshot_as_multiturn", str(turns).lower())
    return " ".join(_quoted(masking.mask(part, secrets)) for part in parts)


def model_args_option(given: Mapping[str, Any]) -> str:
    """`--model_args` with these arguments, in their order, as words of a shell that lm-eval reads as they are.

    Folders stay as they are, since the line is for the machine that they lie on; only a method in a file of somebody's
    own loses its folder: whose code runs is for whoever pastes the line to say. Without secrets.
    """
    shown = {name: masking.masked(value) for name, value in given.items() if not masking.is_secret(name)}
    if isinstance(method := shown.get("method"), str):
        shown["method"] = _shown("method", method)
    return " ".join(map(_quoted, _option("--model_args", _written(shown))))


def _option(name: str, value: Any) -> list[str]:
    """Words of an option. A value that begins like an option is joined to its name, or it would be taken for one."""
    if not value:
        return []
    return [f"{name}={value}"] if str(value).startswith("-") else [name, str(value)]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _shots(results: Mapping[str, Any], tasks: Mapping[str, Any]) -> str:
    """Few-shot examples, where all tasks have as many; none at all where a task may have some by default."""
    counted = _mapping(results.get("n-shot"))
    shots = {shot for shot in counted.values() if isinstance(shot, int) and not isinstance(shot, bool)}
    if len(shots) != 1 or (shots == {0} and all(map(_is_ours, tasks.values()))):
        return ""
    return str(shots.pop())


def _seeds(config: Mapping[str, Any]) -> str:
    """Seeds, where one is not lm-eval's own; None is one that was not set."""
    seeds = [config.get(name, usual) for name, usual in _SEEDS.items()]
    if any(seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)) for seed in seeds):
        return ""
    return "" if seeds == list(_SEEDS.values()) else ",".join(map(str, seeds))


def _is_ours(task: Any) -> bool:
    return _mapping(_mapping(task).get("metadata")).keys() >= _OURS


def _metadata(tasks: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What users gave our tasks. lm-eval puts model arguments there as well; what tasks do not share was not given."""
    found: list[dict[str, Any]] = []
    given = dict(arguments_of(config.get("model_args")))
    for metadata in (_mapping(task["metadata"]) for task in tasks.values() if _is_ours(task)):
        found.append(
            {
                name: metadata[name]
                for name, usual in _METADATA.items()
                if metadata.get(name) not in (None, usual) and name not in given
            }
        )
    return (
        {name: value for name, value in found[0].items() if all(one.get(name) == value for one in found)}
        if found
        else {}
    )


def arguments_of(arguments: Any) -> Mapping[str, Any]:
    """Arguments by name, from an object or a text. In lm-eval's form `name=value,…` values stay texts."""
    if not isinstance(arguments, str):
        return _mapping(arguments)
    if arguments.lstrip().startswith("{"):
        try:
            return _mapping(json.loads(arguments))
        except (ValueError, RecursionError):
            return {}
    return {name: _Text(value) for name, _, value in (pair.partition("=") for pair in _split(arguments)) if name}


class _Text(str):
    """A value as it was typed."""


def _split(text: str) -> list[str]:
    """`text` at its commas, but for those in brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[({":
            depth += 1
        elif character in "])}":
            depth = max(depth - 1, 0)
        elif character == "," and not depth:
            parts.append("")
            continue
        parts[-1] += character
    return parts


def _pairs(given: Any) -> str:
    """Arguments in lm-eval's form `name=value,…`, or as JSON where that would be read otherwise; without secrets."""
    arguments = arguments_of(given)
    typed = {name for name, value in arguments.items() if isinstance(value, _Text)}
    shown = {name: value for name, value in arguments.items() if not masking.is_secret(name)}
    shown = {name: _shown(name, masking.masked(value)) for name, value in shown.items()}
    return _written(shown, typed)


def _written(shown: Mapping[str, Any], typed: Collection[str] = ()) -> str:
    """Arguments as lm-eval reads them; those that were `typed` are written as they were."""
    if all(name in typed or _reads_back(name, value) for name, value in shown.items()):
        return ",".join(f"{name}={value}" for name, value in shown.items())
    return json.dumps(shown, default=str)


def _reads_back(name: Any, value: Any) -> bool:
    """Whether lm-eval makes the value out of `name=value` again: of a text that looks like a number it makes one."""
    if not isinstance(name, str) or name.startswith(("-", "{")) or _MEANING & set(name) or "=" in name:
        return False
    if isinstance(value, float):
        return math.isfinite(value)
    if not isinstance(value, str):
        return value is None or (isinstance(value, int) and abs(value) < 2**53)
    if _MEANING & set(value) or value.lower() in ("true", "false") or value.isnumeric():
        return False
    for read in (float, ast.literal_eval):
        try:
            read(value)
            return False
        except Exception:  # whatever it raises, it is no value
            pass
    return True


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
