"""One document of a leaf as text for a terminal, or as Markdown. Knows what is shown of it, and nothing of tasks."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..errors import plain
from ..markdown import text as escaped

_MARK, _PLAIN = "\x1b[1;33m", "\x1b[0m"
#: Rows that stay where the context is folded: around each piece of evidence, at both ends of the context, and at both
#: ends of a piece that is longer than `_PIECE` rows.
_AROUND, _ENDS, _PIECE = 1, 2, 8

#: From where to where in the prompt, in characters.
Span = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A piece of evidence.

    Attributes:
        text: as the recipe gives it.
        span: where it stands in the prompt; None when it is not there.
        first: tokens of the prompt before it.
        depth: the same as a share of all of them.
    """

    text: str
    span: Span | None
    first: int = 0
    depth: float = 0.0


@dataclass(frozen=True)
class Document:
    """What there is to show of a document.

    Attributes:
        facts: names and values, in order.
        gold: the gold answer.
        pieces: the evidence.
        requests: what a twin scores, (end of the text forced after the prompt, continuation), None for a gap.
        prompt: as the model gets it, rendered.
        context: the part of it that may be folded.
        tokens: gives the tokens of the prompt before a character.
    """

    facts: dict[str, str]
    gold: str
    pieces: Sequence[Piece]
    prompt: str
    context: Span
    tokens: Callable[[int], int]
    requests: Sequence[tuple[str, str]] = field(default_factory=list)
    most_requests: int = 12


# ------------------------------------------------------------------------------------------------------------ rendering


def terminal(document: Document, width: int, *, colour: bool = False, full: bool = False) -> str:
    """Lines of at most `width` columns, the context folded around the evidence; with `full` the prompt as it is.

    Texts may be anyone's, and a terminal would obey their control characters: they are written out. With `colour` the
    evidence is marked; nothing else differs.
    """
    left = max(map(len, document.facts)) + 2
    lines = []
    for name, value in document.facts.items():
        lines += _wrapped(value, width, f"{name:<{left}}")
    lines += ["", "gold answer"]
    for line in document.gold.splitlines():
        lines += _wrapped(line, width, "  ")
    lines += ["", f"evidence: {len(document.pieces)} (first token, depth in the prompt)"]
    for piece in document.pieces:
        where = f"{'?':>7}      ?" if piece.span is None else f"{piece.first:>7}  {piece.depth:5.1%}"
        lines.append(f"{where}  {abridged(plain(piece.text), width - len(where) - 2)}")
    if document.requests:
        lines += ["", f"requests: {len(document.requests)} (forced text | continuation)"]
        lines += [abridged(plain(row), width) for row in _requests(document, width)]
    head = "prompt" if full else "prompt, the context folded (--full shows all of it)"
    lines += ["", f"{head} {'-' * (width - len(head) - 1)}"]
    marks = [piece.span for piece in document.pieces if piece.span is not None] if colour else []
    if full:
        shown = _marked(document.prompt, (0, len(document.prompt)), marks)
    else:
        shown = "\n".join(
            f"  … {part} …" if isinstance(part, str) else _marked(document.prompt, part, marks)
            for part in folded(document, width)
        )
    return "\n".join([*lines, shown])


def markdown(document: Document, width: int, *, full: bool = False) -> str:
    """The same as a page: a table of the evidence, and the prompt as a block of code."""
    first, *facts = document.facts.items()
    lines = [f"# {escaped(first[1])}", "", *(f"* {name}: {escaped(value)}" for name, value in facts)]
    lines += ["", "## Gold answer", "", *_fenced(document.gold)]
    lines += ["", "## Evidence", "", "| first token | depth in the prompt | text |", "|---:|---:|---|"]
    for piece in document.pieces:
        where = "? | ?" if piece.span is None else f"{piece.first} | {piece.depth:.1%}"
        lines.append(f"| {where} | {escaped(abridged(piece.text, 3 * width))} |")
    if document.requests:
        lines += ["", f"## Requests: {len(document.requests)} (forced text | continuation)", ""]
        lines += _fenced("\n".join(_requests(document, width)))
    parts = [document.prompt] if full else [
        f"… {part} …" if isinstance(part, str) else document.prompt[slice(*part)] for part in folded(document, width)
    ]  # fmt: skip
    return "\n".join([*lines, "", "## Prompt", "", *_fenced("\n".join(parts))])


def abridged(text: str, longest: int) -> str:
    """`text` on one line, its middle left out when it is long."""
    line = text.replace("\n", " ⏎ ")
    half = (longest - 5) // 2
    return line if len(line) <= longest else f"{line[:half]} […] {line[-half:]}"


def _fenced(text: str) -> list[str]:
    """A block of code that nothing in `text` ends."""
    fence = "`" * max(3, *(1 + len(run) for run in re.findall("`+", text)), 3)
    return [f"{fence}text", *plain(text).split("\n"), fence]


def _wrapped(text: str, width: int, head: str) -> list[str]:
    later = " " * len(head)
    shown = plain(text)
    found = textwrap.wrap(shown, width, initial_indent=head, subsequent_indent=later, break_on_hyphens=False)
    return found or [head.rstrip()]


def _requests(document: Document, width: int) -> list[str]:
    rows = []
    room = (width - 16) // 2
    for number, (forced, continuation) in enumerate(document.requests):
        tail = forced if len(forced) <= room else f"…{forced[1 - room :]}"
        rows.append(f"{number:>7}  {tail!r} | {abridged(continuation, room)!r}")
    most = document.most_requests
    if len(rows) > most:
        rows[most - 2 : -1] = [f"         … {len(rows) - most + 1} more …"]
    return rows


def _marked(text: str, part: Span, spans: Sequence[Span]) -> str:
    """The `part` of a text, control characters written out, with the `spans` marked."""
    pieces, last = [], part[0]
    for start, end in sorted(spans):
        start, end = max(start, last), min(end, part[1])  # pieces may overlap
        if end > start:
            pieces += [plain(text[last:start]), _MARK, plain(text[start:end]), _PLAIN]
            last = end
    return "".join([*pieces, plain(text[last : part[1]])])


# -------------------------------------------------------------------------------------------------------------- folding


def folded(document: Document, width: int) -> list[Span | str]:
    """Rows of the prompt of at most `width` columns, as spans, and in place of rows that are folded what they were.

    All rows outside the context stay; in it those at its ends, with evidence, and next to evidence.
    """
    found = rows(document.prompt, width)
    begin, end = document.context
    inside = [n for n, row in enumerate(found) if begin <= row[0] and row[1] <= end]
    keep = set(range(len(found))) - set(inside[_ENDS:-_ENDS])
    evidence: set[int] = set()
    for piece in document.pieces:
        start, stop = piece.span or (0, 0)
        touched = [n for n in inside if found[n][0] < stop and start < found[n][1]]
        evidence.update(touched)
        if len(touched) > _PIECE:
            touched = [*touched[: _PIECE // 2], *touched[-_PIECE // 2 :]]
        keep.update(near for n in touched for near in range(n - _AROUND, n + _AROUND + 1))
    parts: list[Span | str] = []
    at = 0
    while at < len(found):
        stop = at
        while stop < len(found) and stop not in keep:
            stop += 1
        if stop - at > 1:  # a note is no shorter than one row
            parts.append(_note(document, (found[at][0], found[stop - 1][1]), evidence.issuperset(range(at, stop))))
            at = stop
        else:
            parts.append(found[at])
            at += 1
    return parts


def _note(document: Document, hidden: Span, evidence: bool) -> str:
    lines = document.prompt.count("\n", *hidden) + 1
    tokens = document.tokens(hidden[1]) - document.tokens(hidden[0])
    what = "line" if lines == 1 else "lines"
    return f"{lines} {what}{' of evidence' if evidence else ''}, {tokens} tokens"


def rows(text: str, width: int) -> list[Span]:
    """The lines of `text` as spans without their ends, each broken at spaces, or anywhere where there are none, into
    rows of at most `width` columns. The space at which a line is broken is in no row."""
    found, start = [], 0
    for line in text.split("\n"):
        found += [(start + first, start + last) for first, last in _broken(line, width)]
        start += len(line) + 1
    return found


def _broken(line: str, width: int) -> list[Span]:
    if len(line) <= width and line.isascii() and line.isprintable():
        return [(0, len(line))]
    sizes = [_columns(character) for character in line]
    spans, start = [], 0
    while start < len(line):
        stop, used = start, 0
        while stop < len(line) and used + sizes[stop] <= width:
            used += sizes[stop]
            stop += 1
        if stop < len(line):
            space = line.rfind(" ", start, stop + 1)
            if space > start:
                spans.append((start, space))
                start = space + 1
                continue
            stop = max(stop, start + 1)  # a character that is wider than a row
        spans.append((start, stop))
        start = stop
    return spans or [(0, 0)]


def _columns(character: str) -> int:
    """Columns that a terminal gives a character as it is shown."""
    if unicodedata.combining(character):
        return 0
    return len(plain(character)) * (2 if unicodedata.east_asian_width(character) in "WF" else 1)
