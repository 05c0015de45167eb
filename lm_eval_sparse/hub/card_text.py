"""A dataset card as text: its front matter and its body, and ours put into the one that a repository has.

That one is foreign. Whatever it holds, it neither stops a push nor takes minutes; what cannot be kept is said, and
stays in the repository's history.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from ..errors import one_line
from ..results.files import DEEPEST, why

_log = logging.getLogger(__name__)

#: Our section of a card lies between these lines; what people write around it survives every push.
BEGIN = "<!-- lm-eval-sparse:begin: rewritten by every push, text outside these two marks is kept -->"
END = "<!-- lm-eval-sparse:end -->"

TITLE = "Sparse-attention evaluation of"

#: lm-eval's own cards say this; they are generated too, so ours replaces them instead of standing beside them.
_LM_EVAL_CARD = "Dataset automatically created during the evaluation run of model"

#: Longer cards are not kept, nor is front matter that takes long to read.
MOST_BYTES = 4 << 20
_MOST_FRONT = 1 << 20

_FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?^---[ \t]*(?:\r?\n|\Z)", re.S | re.M)


def decoded(content: bytes, where: str) -> str:
    """The text of a card of someone else. What is no text of a card is not kept, which is said."""
    if len(content) > MOST_BYTES:
        _warn(where, f"it has more than {MOST_BYTES:,} bytes")
        return ""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _warn(where, f"byte {error.start + 1} is not UTF-8 text")
        return ""


def merge_cards(previous: str, ours: str, where: str = "README.md") -> str:
    """Put the card `ours` into the repository's `previous` one, keeping whatever people have written there.

    Args:
        where: the previous card, as warnings begin.
    """
    front, body = _split(previous, where)
    if _LM_EVAL_CARD in previous:
        front, body = {}, ""
    our_front, our_body = _split(ours, where, most=len(ours))
    merged = {**front, **our_front}
    if isinstance(tags := front.get("tags"), list | str):
        tags = [*(tags if isinstance(tags, list) else [tags]), *our_front["tags"]]
        merged["tags"] = list({repr(tag): tag for tag in tags}.values())
    if not str(front.get("pretty_name") or TITLE).startswith(TITLE):
        merged["pretty_name"] = front["pretty_name"]
    configs = front.get("configs")
    theirs = [entry for entry in configs if "samples_" not in str(entry)] if isinstance(configs, list) else []
    merged["configs"] = [*theirs, *our_front.get("configs", ())]
    merged.pop("viewer", None)
    if not merged["configs"]:
        del merged["configs"]
        # Nested results files are no table; without this the Hub's viewer shows an error on them.
        merged["viewer"] = False
    return f"---\n{dump(merged)}\n---\n\n{_replaced(body, our_body)}\n"


def _replaced(body: str, ours: str) -> str:
    """`ours` in place of our section of `body`. A mark is one only where it has a line of its own."""
    marks = {mark: re.compile(rf"^{re.escape(mark)}[ \t]*\r?$", re.M) for mark in (BEGIN, END)}
    begins = list(marks[BEGIN].finditer(body))
    for end in marks[END].finditer(body):
        # The last one before it: what stands behind a mark without its other half is somebody's text.
        if before := [begin for begin in begins if begin.end() <= end.start()]:
            return (body[: before[-1].start()] + ours.strip() + body[end.end() :]).strip()
    return "\n\n".join(part for part in (body.strip(), ours.strip()) if part)


def _split(card: str, where: str, most: int = _MOST_FRONT) -> tuple[dict[str, Any], str]:
    """Front matter and body of a card."""
    found = _FRONT.match(card)
    if not found:
        return {}, card
    body = card[found.end() :]
    if len(found[1]) > most:
        _warn(where, f"its front matter has {len(found[1]):,} characters, and at most {most:,} are read")
        return {}, body
    try:
        front = _loaded(found[1])
    except Exception as error:  # a value that does not fit its tag raises whatever its conversion does
        _warn(where, f"its front matter cannot be kept: {why(error)}")
        return {}, body
    if front is not None and not isinstance(front, dict):
        _warn(where, "its front matter is no mapping")
    return front if isinstance(front, dict) else {}, body


def _loaded(text: str) -> Any:
    """YAML of someone else: without aliases, with which a few lines stand for more than any memory holds."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    level = 0
    for event in yaml.parse(text, Loader=loader):
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it uses aliases")
        if level > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return yaml.load(text, Loader=loader)  # a safe one


def dump(front: Mapping[str, Any]) -> str:
    """Front matter as YAML, one line for each text, in which nothing reads as a tag of HTML."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Texts with what could be a tag are quoted, so that it can be written as an escape."""

    def quoted(dumper: Any, text: str) -> Any:
        odd = "<" in text or not text.isprintable()
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if odd else None)

    Dumper.add_representer(str, quoted)
    Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]
    text = yaml.dump(front, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text.strip().replace("<", "\\x3c")


def _warn(where: str, reason: str) -> None:
    _log.warning("%s", one_line(f"{where} is not kept: {reason}; the repository's history has it"))
