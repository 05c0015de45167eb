"""Secrets are masked wherever we save, print or push: by the name they are given under, by value, and by their shape.

The names and shapes are tables, the only ones. Nothing here knows what a text is for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

MASK = "***"

#: Names of arguments whose value is a secret; a name that ends in one of them behind an underscore is one, too.
NAMES = (
    "token", "auth", "authorization", "password", "passwd", "secret", "credential", "credentials", "apikey", "api_key",
    "access_key", "secret_key", "private_key", "bearer", "cookie",
)  # fmt: skip

#: Names that end like those and are none: special tokens, and how the Hub is asked.
INNOCENT = re.compile(
    r"(?:.*_)?(?:bos|eos|pad|unk|sep|cls|mask|prefix|image|audio|video|stop|end|start|begin|first|last|next|new|eot|eom|sos)_token"
)

#: What gives a secret away wherever it stands: the prefix of a token of the Hub and others, a password in a URL. Before
#: each shape stand texts of which one is in it: looking for those first takes a fortieth of the time.
SHAPES: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = (
    # Letters and digits of a random token: some capital or digit soon, or too long for a word.
    (
        ("hf_", "api_org_"),
        re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_(?:(?=[A-Za-z]*[A-Z0-9])[A-Za-z0-9]{8,}|[A-Za-z0-9]{16,})"),
    ),
    (("sk-",), re.compile(r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20,}")),
    (
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-"),
        re.compile(r"(?<![A-Za-z0-9])(?:gh[pousr]_|github_pat_|glpat-)[A-Za-z0-9_-]{16,}"),
    ),
    (("AKIA",), re.compile(r"(?<![A-Za-z0-9])AKIA[A-Z0-9]{16}(?![A-Za-z0-9])")),
    (("earer ",), re.compile(r"(?<=[Bb]earer )(?=\S*\d)[A-Za-z0-9._~+/=-]{16,}")),
    (("token=",), re.compile(r"(?<=[?&]token=)[^&\s]{4,}")),
    (("://",), re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")),
    # One slash is left where an address was taken for a path.
    ((":/",), re.compile(r"(?<=:/)[^\s/@:]*:[^\s/@]+(?=@)")),
)

#: `name=value` and `"name": "value"`, of which those under a secret's name are masked where somebody else's message
#: repeats what was typed.
_NAMED = (
    re.compile(r"""([\w.-]+)((?:=|["']\s*:\s*)["'])([^"']+)"""),
    re.compile(r"""([\w.-]+)(=)([^\s"',;&{}()\[\]]+)"""),
)

#: Variables of the environment that hold secrets.
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")

#: Shorter values are not looked for in texts: they would be found in words.
SHORTEST = 6


def is_secret(name: object) -> bool:
    """Whether what is given under `name` is a secret."""
    word = str(name).lower().replace("-", "_").rpartition(".")[2]
    if INNOCENT.fullmatch(word):
        return False
    return any(word == known or word.endswith(f"_{known}") for known in NAMES)


def is_nearly_secret(name: object) -> bool:
    """Whether `name` is a secret's, or a slip of one's (`tokn`)."""
    word = str(name).lower().replace("-", "_")
    return is_secret(name) or any(SequenceMatcher(None, word, known).ratio() >= 0.8 for known in NAMES)


def shown(name: object, value: Any) -> Any:
    """`value` as a message may repeat it: masked when `name` is a secret's or nearly one's."""
    return MASK if is_nearly_secret(name) and _holds(value) else value


def mask(text: str, values: Iterable[str] = ()) -> str:
    """`text` without any of `values` and without what has the shape of a secret."""
    text = _without(text, sorted(values, key=len, reverse=True))  # one may be a part of another
    for hints, shape in SHAPES:
        if any(hint in text for hint in hints):
            text = shape.sub(MASK, text)
    return text


def mask_named(text: str) -> str:
    """`text` without what stands in it under a secret's name, as on a command line or in JSON."""
    for named in _NAMED:
        text = named.sub(lambda m: f"{m[1]}{m[2]}{MASK}" if is_nearly_secret(m[1]) else m[0], text)
    return text


def masked(value: Any, values: Iterable[str] = (), shapes: bool = True) -> Any:
    """A copy of `value`, in whose mappings what stands under a secret's name is masked, and in all texts what `mask`
    masks. Other objects, and texts in which nothing is masked, are left as they are.

    Args:
        shapes: False: only `values` are masked, not what is named or shaped like a secret.
    """
    values = tuple(sorted(values, key=len, reverse=True))

    def walk(item: Any) -> Any:
        if isinstance(item, str):
            found = mask(item, values) if shapes else _without(item, values)
            return item if found == item else found
        if isinstance(item, Mapping):
            return {
                walk(key): MASK if shapes and is_secret(key) and _holds(inner) else walk(inner)
                for key, inner in item.items()
            }
        if type(item) in (list, tuple):
            return type(item)(walk(inner) for inner in item)
        return item

    return walk(value)


def _without(text: str, values: Iterable[str]) -> str:
    for value in values:
        text = text.replace(value, MASK)
    return text


def values_in(*places: Any) -> frozenset[str]:
    """The secrets that are given under their names in mappings, or in lm-eval's `name=value,…`, and by variables."""
    found = {os.environ.get(name, "") for name in VARIABLES}
    waiting = list(places)
    while waiting:
        place = waiting.pop()
        if isinstance(place, str):
            pairs = [pair.partition("=")[::2] for pair in place.split(",")]  # one name may come twice
            found |= {item for name, item in pairs if is_nearly_secret(name.strip()) and item}
            with contextlib.suppress(ValueError, RecursionError):
                place = json.loads(place)
        if isinstance(place, Mapping):
            found |= {str(item) for name, item in place.items() if is_nearly_secret(str(name).strip()) and _holds(item)}
            waiting += [item for item in place.values() if isinstance(item, Mapping | list | tuple)]
        elif isinstance(place, list | tuple):
            waiting += [item for item in place if isinstance(item, Mapping | list | tuple)]
    return frozenset(value for value in found if len(value) >= SHORTEST)


def left_in(text: str, values: Iterable[str] = ()) -> bool:
    """Whether a secret stands in `text`."""
    return any(value in text for value in values) or any(
        shape.search(text) for hints, shape in SHAPES if any(hint in text for hint in hints)
    )


def _holds(value: Any) -> bool:
    """Whether a value can be a secret: not None, an empty text, or the True that means the stored login; nor a mapping,
    which is what a task or a model of such a name has."""
    return value is not None and not isinstance(value, bool | Mapping) and value != ""


class _Mask(logging.Filter):
    """Masks what a record says before any handler writes it."""

    def __init__(self, secrets: frozenset[str]):
        super().__init__()
        self.secrets = secrets

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            said = record.getMessage()
        except Exception:  # whose handler will complain
            return True
        masked = mask(said, self.secrets)
        if masked != said:
            record.msg, record.args = masked, ()
        return True


@contextlib.contextmanager
def masked_logs(secrets: frozenset[str]) -> Iterator[None]:
    """Mask secrets in all that is logged meanwhile by handlers that there are."""
    names = ("", "lm_eval", "lm_eval_sparse", "transformers", "huggingface_hub", "datasets")
    handlers = {handler for name in names for handler in logging.getLogger(name).handlers}
    if logging.lastResort is not None:
        handlers.add(logging.lastResort)
    mask = _Mask(secrets)
    for handler in handlers:
        handler.addFilter(mask)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(mask)
