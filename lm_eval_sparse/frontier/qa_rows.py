"""The forms that questions about passages come in, and what is wrong with a row that has none of them.

Files, UTF-8; other fields are ignored, and so are blank lines:

squad    dev-v2.0.json   the official file: `data[].paragraphs[]` with `context` and `qas[]`, each with `question` and
                         `answers[].text`.
         squad.jsonl     one JSON object per line, as rows on the Hub: `context`, `question`, `answers` with a list
                         `text`. Questions without answers are left out (both files).
quality  QuALITY.v1.0.1.htmlstripped.dev   the official file, one JSON object per line: `article` and `questions[]`,
                         each with `question`, `options` and `gold_label`, the right option counted from 1.
         quality.jsonl   one JSON object per line, as rows on the Hub: `article`, `question`, `options`, and `answer`,
                         the right option counted from 0.
toefl    toeflqa.jsonl   one JSON object per line: `context`, `questions`, a list of texts of the form
                         "Question: … Options: A.… B.… C.… D.…", and `answer`, a list with one text per question, the
                         letters of all right options ("B", "AC").

Data sets on the Hub: rajpurkar/squad_v2 and emozilla/quality, both split `validation`; the metadata `squad_hub` and
`quality_hub` name others with the same rows. For TOEFL none is known; `toefl_hub` may name one with rows like the
lines of toeflqa.jsonl (all of its splits are read).
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..results.files import parse_json, read_bytes

#: Characters that a context, and any other text, may have: a hundred times those of the real data.
_LONGEST, _LONGEST_LINE = 5_000_000, 50_000


@dataclass(frozen=True, order=True)
class Item:
    """One question. `answers` are reference texts, or with `options` the letters of the right ones, sorted."""

    context: str
    question: str
    options: tuple[str, ...]
    answers: tuple[str, ...]


class Malformed(Exception):
    """A row is not as it should be. The message says what is wrong and what is expected."""


def _field(row: Any, key: str, kind: type, wanted: str) -> Any:
    if not isinstance(row, dict):
        raise Malformed(f"a JSON object is expected, this is {_short(row)}")
    if key not in row:
        raise Malformed(f"{key!r} is missing; it must be {wanted}")
    value = row[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise Malformed(f"{key!r} is {_short(value)}; it must be {wanted}")
    return value


def _string(row: Any, key: str) -> str:
    value = _field(row, key, str, "a text").replace("\r\n", "\n").strip()
    if not value:
        raise Malformed(f"{key!r} is empty; it must be a text")
    return _whole_text(value, key, _LONGEST)


def _whole_text(value: str, key: str, longest: int = _LONGEST_LINE) -> str:
    """`value`, unless it cannot be written as UTF-8 or is too long for any prompt."""
    if len(value) > longest:
        raise Malformed(f"{key!r} has {len(value):,} characters; it must have at most {longest:,}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start].encode("unicode_escape").decode()
        raise Malformed(f"{key!r} holds {half}, half a character; it must be a text") from None
    return value


def _texts(row: Any, key: str, least: int) -> list[str]:
    wanted = f"a list of {least} or more texts" if least else "a list of texts"
    values = _field(row, key, list, wanted)
    if len(values) < least or not all(isinstance(value, str) and value.strip() for value in values):
        raise Malformed(f"{key!r} is {_short(values)}; it must be {wanted}")
    return [_whole_text(" ".join(value.split()), key) for value in values]


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _line(row: Any, key: str) -> str:
    return _whole_text(" ".join(_string(row, key).split()), key)


def _squad_row(row: Any) -> Iterator[Item]:
    answers = _texts(_field(row, "answers", dict, 'an object with a list "text"'), "text", 0)
    if answers:  # what else an unanswerable question has or lacks does not matter
        context, question = _string(row, "context"), _line(row, "question")
        yield Item(context, question, (), tuple(dict.fromkeys(answers)))


def _squad_official(row: Any) -> Iterator[Item]:
    for i, article in enumerate(_field(row, "data", list, "a list of articles")):
        for j, paragraph in enumerate(_within(f"data[{i}]", _field, article, "paragraphs", list, "a list")):
            where = f"data[{i}].paragraphs[{j}]"
            context = _within(where, _string, paragraph, "context")
            for k, asked in enumerate(_within(where, _field, paragraph, "qas", list, "a list of questions")):
                where_asked = f"{where}.qas[{k}]"
                answers = _within(where_asked, _field, asked, "answers", list, "a list of objects with a text")
                texts = [_within(where_asked, _string, answer, "text") for answer in answers]
                whole = {**asked, "context": context, "answers": {"text": texts}}
                yield from _within(where_asked, lambda whole: list(_squad_row(whole)), whole)


def _within(where: str, read: Callable[..., Any], *args: Any) -> Any:
    try:
        return read(*args)
    except Malformed as error:
        raise Malformed(f"{where}: {error}") from None


def _quality_row(row: Any, answer: str = "answer", first: int = 0) -> Iterator[Item]:
    context, question = _string(row, "article"), _line(row, "question")
    options = _texts(row, "options", 2)
    _letter(len(options) - 1)
    wanted = f"the right option as a number from {first} to {len(options) - 1 + first}"
    right = _field(row, answer, int, wanted) - first
    if not 0 <= right < len(options):
        raise Malformed(f"{answer!r} is {right + first}; it must be {wanted}")
    yield Item(context, question, tuple(options), (_letter(right),))


def _quality_official(row: Any) -> Iterator[Item]:
    article = _string(row, "article")
    for i, asked in enumerate(_field(row, "questions", list, "a list of questions")):
        whole = {**asked, "article": article} if isinstance(asked, dict) else asked
        yield from _within(f"questions[{i}]", lambda whole: list(_quality_row(whole, "gold_label", 1)), whole)


def _letter(position: int) -> str:
    if position >= len(string.ascii_uppercase):
        raise Malformed(f"option {position + 1} is more than the {len(string.ascii_uppercase)} that letters can name")
    return string.ascii_uppercase[position]


_TOEFL_FORM = '"Question: … Options: A.… B.…"'
_TOEFL_QUESTION = re.compile(r"\s*Question:\s*(\S.*?)\s*Options:\s*(\S.*)", re.DOTALL)


def _toefl_row(row: Any) -> Iterator[Item]:
    context = _tidy(_string(row, "context"))
    questions, answers = _texts(row, "questions", 1), _texts(row, "answer", 1)
    if len(questions) != len(answers):
        raise Malformed(f"{len(questions)} questions and {len(answers)} answers; there must be as many of either")
    for i, (asked, answer) in enumerate(zip(questions, answers, strict=True)):
        form = _TOEFL_QUESTION.fullmatch(asked)
        options = _split_options(form.group(2)) if form else []
        if form is None or len(options) < 2:
            raise Malformed(f"questions[{i}] is {_short(asked)}; it must have the form {_TOEFL_FORM}")
        letters = re.sub(r"[\s,]", "", answer)
        possible = [_letter(j) for j in range(len(options))]
        if not letters or len(set(letters)) < len(letters) or not set(letters) <= set(possible):
            wanted = f"the letters of the right options, from A to {possible[-1]}"
            raise Malformed(f"answer[{i}] is {_short(answer)}; it must be {wanted}")
        yield Item(context, _tidy(form.group(1)), tuple(map(_tidy, options)), tuple(sorted(letters)))


def _split_options(text: str) -> list[str]:
    """The texts after "A.", "B." and so on, as far as the letters go on in order; [] unless "A." comes first."""
    starts, ends = [], []
    for letter in string.ascii_uppercase:
        label = re.compile(rf"(?<!\S){letter}\.").search(text, starts[-1] if starts else 0)
        if label is None or (not starts and label.start()):
            break
        ends.append(label.start())
        starts.append(label.end())
    options = [text[start:end].strip() for start, end in zip(starts, [*ends, len(text)][1:], strict=True)]
    return options if all(options) else []


def _tidy(text: str) -> str:
    """Tokenised speech (" hi ,  um  .") as one writes it: single blanks, and none before punctuation."""
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r"(?<!\s)\s+([,.?!;:])(?=\s|$)", r"\1", text)  # at the start of a run only: it may be long
    return "\n".join(line.strip() for line in text.split("\n")).strip()


# -------------------------------------------------------------------------------------------------------------- files


def _lines(row: Callable[[Any], Iterator[Item]]) -> Callable[[Path], Iterator[Item]]:
    """A reader of files with one row per line."""

    def read(file: Path) -> Iterator[Item]:
        for number, line in enumerate(read_bytes(file).split(b"\n"), 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                items = list(row(parse_json(line, where)))
            except Malformed as error:
                raise UserError(f"{where}: {error}") from None
            yield from items

    return read


def _whole_json(row: Callable[[Any], Iterator[Item]]) -> Callable[[Path], Iterator[Item]]:
    """A reader of files that are one JSON object."""

    def read(file: Path) -> Iterator[Item]:
        try:
            yield from row(parse_json(read_bytes(file), str(file)))
        except Malformed as error:
            raise UserError(f"{file}: {error}") from None

    return read


@dataclass(frozen=True)
class Kind:
    """One data set: its files and their readers, best first; its id, split and rows on the Hub; whether its questions
    have options."""

    name: str
    title: str
    files: dict[str, Callable[[Path], Iterable[Item]]]
    row: Callable[[Any], Iterator[Item]]
    hub: str | None
    split: str | None
    choice: bool = True


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="squad",
            title="SQuAD",
            files={"dev-v2.0.json": _whole_json(_squad_official), "squad.jsonl": _lines(_squad_row)},
            row=_squad_row,
            hub="rajpurkar/squad_v2",
            split="validation",
            choice=False,
        ),
        Kind(
            name="quality",
            title="QuALITY",
            files={
                "QuALITY.v1.0.1.htmlstripped.dev": _lines(_quality_official),
                "quality.jsonl": _lines(_quality_row),
            },
            row=_quality_row,
            hub="emozilla/quality",
            split="validation",
        ),
        Kind(
            name="toefl",
            title="TOEFL",
            files={"toeflqa.jsonl": _lines(_toefl_row)},
            row=_toefl_row,
            hub=None,
            split=None,
        ),
    )
}
