"""Count a prompt's tokens as the model under evaluation will encode it, and know how many it takes.

lm-eval shows a task neither the model nor its tokenizer. Three ways lead to them, best first: the model that
rendered the chat template, the `sparse-hf` model of this process, and the names in the task's metadata, where
lm-eval puts the model arguments.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..model.embedded import is_embedded
from ..paths import expand, is_dir
from ..protocol import active_lm
from ..results.files import brief, why
from ..values import whole
from .metadata import (
    MODEL_OPTIONS,
    NAMES,
    TOKENIZER_OPTIONS,
    add_bos,
    limit,
    loader_options,
    tokenizer_name,
)

_NEEDED = (
    "frontier tasks fill every prompt to an exact number of tokens and need the evaluated model's tokenizer; "
    """give it with --metadata '{"tokenizer": "<name or path>"}'"""
)
# lm-eval's API models cut prompts from the left at this many tokens unless `max_length` is given.
_API_MAX_LENGTH = 2048


@dataclass(frozen=True)
class Meter:
    """`count(prompt)`: tokens of a rendered prompt, special tokens included. `limit`: tokens of prompt and answer
    the model takes, None when unknown. `identity`: hash of the tokenizer's content, the same on every machine.
    `parts(texts)`: tokens of each text without special ones, None where that is not to be had."""

    count: Callable[[str], int]
    limit: int | None
    identity: str
    parts: Callable[[Sequence[str]], Sequence[int]] | None = None


def meter_for(metadata: Mapping[str, Any], chat_template: Callable[..., Any] | None) -> Meter:
    """The meter of the model under evaluation.

    `metadata` is the task's, `chat_template` what lm-eval passes to `build_all_requests` (the model's own bound
    method, or None). Raises `UserError` when no tokenizer is known or the named one cannot be loaded.
    """
    rendering = getattr(chat_template, "__self__", None)
    if getattr(rendering, "tokenizer", None) is not None:
        return _of_model(rendering)
    lm = active_lm()
    if lm is not None and _is_made_from(lm, metadata):
        return _of_model(lm)
    return _of_names(metadata)


def _is_made_from(lm: Any, metadata: Mapping[str, Any]) -> bool:
    """False when `metadata` names another model than `lm`: a `sparse-hf` model may outlive its evaluation."""
    named = metadata.get("pretrained")
    own = [getattr(lm, name, None) for name in ("pretrained", "model_label")]
    return is_embedded(named) or own == [None, None] or named in own


def _of_model(lm: Any) -> Meter:
    if hasattr(lm, "tok_batch_encode") and not hasattr(lm, "tokenizer_backend"):

        def count(prompt: str) -> int:
            return int(lm.tok_batch_encode([prompt])[0].shape[1])

    else:

        def count(prompt: str) -> int:
            ids = lm.tok_encode(prompt)
            return len(ids[0] if ids and isinstance(ids[0], list) else ids)

    limit = getattr(lm, "max_length", None)
    return _meter(lm.tokenizer, count, int(limit) if limit else None)


def _of_names(metadata: Mapping[str, Any]) -> Meter:
    pretrained = metadata.get("pretrained")
    name = metadata.get("tokenizer") or pretrained or metadata.get("model")
    if name is None:
        raise UserError(_NEEDED)
    for key in NAMES:
        tokenizer_name("", key, metadata.get(key))
    if isinstance(name, str | os.PathLike):
        keys = TOKENIZER_OPTIONS if metadata.get("tokenizer") else MODEL_OPTIONS
        tokenizer = _load_tokenizer(str(name), tuple(loader_options("", metadata, keys).items()))
    elif hasattr(name, "encode"):
        tokenizer = name
    elif path := str(getattr(name, "name_or_path", "")):  # a model object given as `pretrained`
        tokenizer = _load_tokenizer(path, (("trust_remote_code", False),))
    else:
        raise UserError(_NEEDED)
    beginning, bos = add_bos("", metadata), getattr(tokenizer, "bos_token", None)

    def count(prompt: str) -> int:
        if isinstance(bos, str) and prompt.startswith(bos):  # as HFLM does: a template may have written it already
            return len(tokenizer.encode(prompt, add_special_tokens=False))
        if beginning is not None:
            return len(tokenizer.encode(prompt, add_special_tokens=beginning))
        return len(tokenizer.encode(prompt))

    return _meter(tokenizer, count, _limit(metadata, tokenizer))


def _meter(tokenizer: Any, count: Callable[[str], int], limit: int | None) -> Meter:
    """A meter that counts with the tokenizer's Rust core where it can: without offsets and tensors, which take a third
    of the time, and several texts at once.

    Whether special tokens are added is read off `count` itself, for prompts that begin alike; where the core does not
    agree with it, as with slow tokenizers, `count` does all the work.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(core, "encode_batch_fast"):
        return Meter(count, limit, tokenizer_hash(tokenizer))
    special: dict[str, bool | None] = {}

    def lengths(texts: Sequence[str], add_special_tokens: bool = False) -> list[int]:
        core.no_truncation()  # calls of others leave their settings here
        core.no_padding()
        return [len(encoded) for encoded in core.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]

    def quick(prompt: str) -> int:
        beginning = prompt[:200]
        if beginning not in special:
            truth = count(beginning)
            agree = (flag for flag in (True, False) if lengths([beginning], flag) == [truth])
            special[beginning] = next(agree, None)
        flag = special[beginning]
        return count(prompt) if flag is None else lengths([prompt], flag)[0]

    return Meter(quick, limit, tokenizer_hash(tokenizer), lengths)


@lru_cache(maxsize=4)
def _load_tokenizer(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    from transformers import AutoTokenizer

    try:
        return load_tokenizer(AutoTokenizer, name, dict(options))
    except CannotLoad as error:
        raise UserError(f"cannot load the tokenizer {brief(name)!r} ({error}): {_NEEDED}") from error


class CannotLoad(Exception):
    """A tokenizer cannot be loaded. The message is the reason, in one line."""


def load_tokenizer(kind: Any, name: str, options: Mapping[str, Any]) -> Any:
    """`kind.from_pretrained` of a name on the Hub or a folder, whatever is wrong with its files.

    Raises `UserError` for what can be no name and no path, `CannotLoad` for everything else.
    """
    path = expand(f"tokenizer {brief(name)!r}", name)
    try:
        _check_files(path)
        return kind.from_pretrained(str(path) if is_dir(path) else name, **options)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a damaged file may make the Rust library panic, which is no Exception
        raise CannotLoad(why(error)[:200]) from error


def _check_files(folder: Path) -> None:
    """Raise `OSError` where a folder holds a pipe or a device: reading one may never end."""
    if is_dir(folder):
        for path in folder.iterdir():
            if path.exists() and not path.is_file() and not path.is_dir():
                raise OSError(f"{path.name} is no regular file")


def _limit(metadata: Mapping[str, Any], tokenizer: Any) -> int | None:
    """As lm-eval's model types do: the model argument, else the config, else the tokenizer."""
    given = limit("", metadata)
    if metadata.get("base_url"):  # lm-eval's API models keep one token free
        return (_API_MAX_LENGTH if given is None else given) - 1
    if given is not None:
        return given
    config = getattr(metadata.get("pretrained"), "config", None)
    if isinstance(metadata.get("pretrained"), str):
        config = _load_config(metadata["pretrained"], tuple(loader_options("", metadata, MODEL_OPTIONS).items()))
    config = getattr(config, "text_config", None) or config
    for key in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, key, None):
            return whole("the model's config: ", key, getattr(config, key), 1)
    longest = getattr(tokenizer, "model_max_length", None)
    if not longest or (isinstance(longest, int | float) and longest >= 10**9):  # transformers writes 10**30: unknown
        return None
    return whole("the tokenizer's config: ", "model_max_length", longest, 1)


@lru_cache(maxsize=4)
def _load_config(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    from transformers import AutoConfig

    try:
        _check_files(Path(name))
        return AutoConfig.from_pretrained(name, **dict(options))
    except Exception:  # not a transformers model: the limit stays unknown
        return None


_hashes: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does, not of where it came from; unchanged by padding and truncation settings."""
    try:
        return _hashes[tokenizer]
    except (KeyError, TypeError):
        pass
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        content = json.loads(backend.to_str())
        content["padding"] = content["truncation"] = None  # every padded call leaves its settings here
    elif hasattr(tokenizer, "get_vocab"):
        added = getattr(tokenizer, "added_tokens_decoder", {})
        content = [
            type(tokenizer).__qualname__,
            tokenizer.get_vocab(),
            sorted((str(key), str(value)) for key, value in tokenizer.special_tokens_map.items()),
            sorted((int(key), str(value)) for key, value in added.items()),
        ]
    else:
        sample = "The value stored under 0a1b2c3d-x is 4e5f6g7h-y.\n\nWhat (else) is there? 1234567890 ÄÖ 数"
        content = [type(tokenizer).__qualname__, [int(i) for i in tokenizer.encode(sample)]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    with contextlib.suppress(TypeError):
        _hashes[tokenizer] = digest
    return digest
