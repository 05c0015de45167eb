"""Foreign text in Markdown: shown as it is, never obeyed. Knows the syntax of Markdown only."""

from __future__ import annotations

import json
import re
import urllib.parse
from typing import Any

from .errors import plain
from .labels import label

#: Longer values are cut: a card is read by people.
LONGEST = 1000

_SYNTAX = re.compile(
    r"""[\\`*|~#{}]  # code, emphasis, cells, headings, templates
    | (?<![^\W_])_ | _(?![^\W_])  # emphasis, which an underscore inside a word is not
    | ^[-+](?=[\s+-]|$)  # lists and lines
    | (?<=\d)[.)](?=\s|$)  # numbered lists""",
    re.VERBOSE,
)
#: What a backslash does not stop everywhere: tags, comments, entities, formulas, links.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;", "[": "&#91;", "]": "&#93;"}


class Written(str):
    """Markdown that needs no escaping any more."""


def text(value: Any) -> Written:
    """Any value as text in one line, also in a table's cell or at the start of a line."""
    if isinstance(value, Written):
        return value
    line = label(value, LONGEST)
    escaped = "".join(_ENTITIES.get(character, character) for character in _SYNTAX.sub(_escape, line))
    return Written(escaped)


def _escape(found: re.Match[str]) -> str:
    if found[0] in ".)" and not found.string[: found.start()].isdigit():
        return found[0]  # a number begins a list at the start of a line only
    return "\\" + found[0]


def code(value: Any) -> Written:
    """A name as code where it is plain, else as text."""
    name = str(value)
    return Written(f"`{name}`") if re.fullmatch(r"[\w./ -]+", name) and name.isprintable() else text(name)


def quoted(value: Any) -> Written:
    """A text between the double quotes of Python in a block of code, which nothing in it can end."""
    inside = plain(json.dumps(str(value), ensure_ascii=False)[1:-1])
    return Written(re.sub(r"[<`]", lambda found: f"\\u{ord(found[0]):04x}", inside))


def address(path: str) -> Written:
    """A path in the repository as the target of a link, which can be nothing else."""
    return Written(urllib.parse.quote(path, safe="/", errors="replace"))


def url(given: Any) -> Written | None:
    """An address of the web as the target of a link; None for what is none, such as `javascript:`."""
    if not isinstance(given, str) or not re.match(r"https?://[^/\s]", given):
        return None
    return Written(urllib.parse.quote(given, safe="/:?&=#%@+,;~", errors="replace"))
