"""Secrets are masked wherever we save, print or push: by the name they are given under, by value, and by their shape.

The names and shapes are tables, the only ones. Nothing here knows what a text is for.
"""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import os
import re
import traceback
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

MASK = "***"

#: Names of arguments whose value is a secret; a name that ends in one of them behind an underscore is one, too.
NAMES = (
    "token", "auth", "authorization", "password", "passwd", "pwd", "secret", "credential", "credentials", "apikey",
    "api_key", "access_key", "secret_key", "private_key", "wandb_key", "openai_key", "anthropic_key", "azure_key",
    "aws_key", "hf_key", "bearer", "cookie", "jwt",
)  # fmt: skip

#: Of these, a name that differs by a slip is taken for one where a message would repeat what was typed.
_SLIPS = ("token", "hf_token", "password", "passwd", "secret", "api_key", "apikey", "credentials")

#: Names that end like those, or look like a slip, and are none: special tokens, numbers of tokens, and per token.
INNOCENT = re.compile(
    r"(?:.*_)?(?:bos|eos|pad|unk|sep|cls|mask|prefix|image|audio|video|stop|end|start|begin|first|last|next|new|eot|"
    r"eom|sos|per)_token|tokens"
)

#: What gives a secret away wherever it stands: the prefix of a token of the Hub and others, a password in a URL. What a
#: first group holds stays. Before each shape stand texts of which one is in it: looking for those first takes a tenth
#: of the time. None reaches beyond a quote, so that JSON stays what it is.
SHAPES: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = (
    (("hf_", "api_org_"), re.compile(r"(?<![A-Za-z0-9])()(?:hf|api_org)_[A-Za-z0-9]{20,}")),
    (("sk-",), re.compile(r"(?<![A-Za-z0-9])()sk-[A-Za-z0-9_-]{20,}")),
    (
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-"),
        re.compile(r"(?<![A-Za-z0-9])()(?:gh[pousr]_|github_pat_|glpat-)[A-Za-z0-9_-]{16,}"),
    ),
    (("xox",), re.compile(r"(?<![A-Za-z0-9])()xox[abeprs]-[A-Za-z0-9-]{16,}")),
    (("AIza",), re.compile(r"(?<![A-Za-z0-9])()AIza[A-Za-z0-9_-]{30,}")),
    (("AKIA",), re.compile(r"(?<![A-Za-z0-9])()AKIA[A-Z0-9]{16}(?![A-Za-z0-9])")),
    (("eyJ",), re.compile(r"(?<![A-Za-z0-9])()eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*")),
    (("earer ", "asic "), re.compile(r"((?:[Bb]earer|Authorization: [Bb]asic) )(?=\S*\d)[A-Za-z0-9._~+/=-]{16,}")),
    (("token=", "key=", "password="), re.compile(r"""([?&][a-z_]*(?:token|api_?key|password)=)[^&\s"'<>\\]{4,}""")),
    (("://",), re.compile(r"""(://)[^\s/@:"'<>\\]*:[^\s/@"'<>\\]+(?=@)""")),
    (("://",), re.compile(r"""(://)[^\s/@:"'<>\\]{16,}(?=@)""")),
    # One slash is left where an address was taken for a path.
    ((":/",), re.compile(r"""(:/)[^\s/@:"'<>\\]*:[^\s/@"'<>\\]+(?=@)""")),
)

#: `name=value` and `"name": "value"`, of which those under a secret's name are masked where a log or somebody else's
#: message repeats what was typed.
_NAMED = (
    re.compile(r"""([\w.-]+)((?:=|["']\s*:\s*)["'])([^"']+)"""),
    re.compile(r"""([\w.-]+)(=)(?!\$)([^\s"',;&{}()\[\]]+)"""),
)

#: Variables of the environment that hold secrets.
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY")

#: Shorter values are not looked for in texts: they would be found in words.
SHORTEST = 6

#: Secrets that this process was given, for messages of whatever ends it.
_known: set[str] = set()


def _plain(name: object) -> str:
    """A name in lower case, its words joined by underscores; of a dotted one the last part."""
    word = str(name).rpartition(".")[2].replace("-", "_")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", word).lower()


def is_secret(name: object) -> bool:
    """Whether what is given under `name` is a secret."""
    word = _plain(name)
    return not INNOCENT.fullmatch(word) and any(word == known or word.endswith(f"_{known}") for known in NAMES)


def is_nearly_secret(name: object) -> bool:
    """Whether `name` is a secret's, or a slip of one's (`tokn`)."""
    word = _plain(name)
    slip = any(SequenceMatcher(None, word, known).ratio() > 0.82 for known in _SLIPS)
    return is_secret(name) or (slip and not INNOCENT.fullmatch(word))


def shown(name: object, value: Any) -> Any:
    """`value` as a message may repeat it: masked when `name` is a secret's or nearly one's."""
    return MASK if is_nearly_secret(name) and _holds(value) else value


def mask(text: str, values: Iterable[str] = ()) -> str:
    """`text` without any of `values`, however it is spelt, and without what has the shape of a secret."""
    return _without_shapes(_without(text, _spellings(values)))


def mask_named(text: str) -> str:
    """`text` without what stands in it under a secret's name, as on a command line or in JSON."""
    for named in _NAMED:
        text = named.sub(lambda m: f"{m[1]}{m[2]}{MASK}" if is_nearly_secret(m[1]) else m[0], text)
    return text


def masked(value: Any, values: Iterable[str] = (), *, names: bool = True, shapes: bool = True) -> Any:
    """A copy of `value` in which texts are without `values`. Other objects, numbers among them, and texts in which
    nothing is masked, are left as they are; so are the keys of mappings, but for `values`.

    Args:
        names: also mask what stands under a secret's name: for settings, not for tables of tasks and metrics.
        shapes: also mask what has the shape of a secret.
    """
    given = _spellings(values)

    def text(item: str) -> str:
        found = _without(item, given)
        found = _without_shapes(found) if shapes else found
        return item if found == item else found

    def walk(item: Any, secret: bool = False) -> Any:
        if isinstance(item, str):
            return MASK if secret and item else text(item)
        if isinstance(item, Mapping):
            return {
                _without(key, given) if isinstance(key, str) else key: walk(inner, secret or (names and is_secret(key)))
                for key, inner in item.items()
            }
        if type(item) in (list, tuple):
            return type(item)(walk(inner, secret) for inner in item)
        return MASK if secret and _holds(item) else item

    return walk(value)


def values_in(*places: Any) -> frozenset[str]:
    """The secrets that are given under their names in mappings, or in lm-eval's `name=value,…`, and by variables."""
    found = {os.environ.get(name, "") for name in VARIABLES}
    waiting: list[tuple[Any, bool]] = [(place, False) for place in places]
    while waiting:
        place, secret = waiting.pop()
        if isinstance(place, str) and secret:
            found.add(str(place))
        elif isinstance(place, str):
            pairs = [pair.partition("=")[::2] for pair in place.split(",")]  # one name may come twice
            found |= {item for name, item in pairs if is_secret(name.strip()) and item}
            if place[:1] == "{":
                for read in (json.loads, ast.literal_eval):
                    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                        waiting.append((read(place), False))
                        break
        elif isinstance(place, Mapping):
            # Texts in lists and mappings that are no settings would be read as such.
            waiting += [
                (item, secret or is_secret(name))
                for name, item in place.items()
                if secret or is_secret(name) or isinstance(item, Mapping | list | tuple)
            ]
        elif isinstance(place, list | tuple):
            waiting += [(item, secret) for item in place if secret or isinstance(item, Mapping | list | tuple)]
    return frozenset(value for value in found if len(value) >= SHORTEST)


def remember(values: Iterable[str]) -> None:
    """Mask `values` in all that this process says from now on in messages that end it."""
    _known.update(values)


def known() -> frozenset[str]:
    """The secrets that this process was given, those of the environment among them."""
    return values_in() | frozenset(_known)


def left_in(text: str, values: Iterable[str] = ()) -> bool:
    """Whether a secret stands in `text`, however it is spelt."""
    return any(value in text for value in _spellings(values)) or any(
        shape.search(text) for hints, shape in SHAPES if any(hint in text for hint in hints)
    )


def _spellings(values: Iterable[str]) -> list[str]:
    """Values as they are, as Python and JSON write them, and as an address holds them; longest first."""
    found: set[str] = set()
    for value in values:
        found |= {value, repr(value)[1:-1], json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
        found |= {
            urllib.parse.quote(value, safe="", errors="replace"),
            urllib.parse.quote_plus(value, errors="replace"),
        }
    return sorted(found, key=len, reverse=True)


def _without(text: str, values: Iterable[str]) -> str:
    for value in values:
        text = text.replace(value, MASK)
    return text


def _without_shapes(text: str) -> str:
    for hints, shape in SHAPES:
        if any(hint in text for hint in hints):
            text = shape.sub(rf"\g<1>{MASK}", text)
    return text


def _holds(value: Any) -> bool:
    """Whether a value can be a secret: not None, an empty text, or the True that means the stored login."""
    return value is not None and not isinstance(value, bool) and value != ""


class _Mask(logging.Filter):
    """Masks what a record says, its traceback included, before any handler writes it."""

    def __init__(self, secrets: frozenset[str]):
        super().__init__()
        self.secrets = secrets

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            said = record.getMessage()
        except Exception:  # whose handler will complain
            return True
        masked = mask(mask_named(said), self.secrets)
        if masked != said:
            record.msg, record.args = masked, ()
        if record.exc_info and not record.exc_text:
            record.exc_text = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        if record.exc_text:
            record.exc_text = mask(record.exc_text, self.secrets)
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
