"""Find and read the data of the QA tasks: questions about passages. Knows nothing of prompts and tokenizers.

Three places are tried in this order, for each task on its own:

1. the folder that `--metadata '{"qa_folder": "FOLDER"}'` names, if it has one of the task's files;
2. the copy that an earlier download left in `$LM_EVAL_SPARSE_CACHE/qa`, by default ~/.cache/lm_eval_sparse/qa;
3. the Hub, through `datasets`; what comes is kept as that copy, so that later runs need no network.

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

import contextlib
import hashlib
import json
import logging
import os
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import paths
from ..errors import UserError
from ..results import files
from ..results.files import parse_json, read_bytes, why
from .recipe import Unavailable
from .store import keep

logger = logging.getLogger(__name__)

#: Characters that a context, and any other text, may have: a hundred times those of the real data.
_LONGEST, _LONGEST_LINE = 5_000_000, 50_000


@dataclass(frozen=True, order=True)
class Item:
    """One question. `answers` are reference texts, or with `options` the letters of the right ones, sorted."""

    context: str
    question: str
    options: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class DataSet:
    """Items without duplicates, in an order that depends on nothing but themselves; `sha256` is their hash."""

    items: tuple[Item, ...]
    sha256: str
    source: str


class _Malformed(Exception):
    """A row is not as it should be. The message says what is wrong and what is expected."""


#: What has been found, or why it could not be: twelve leaves ask for each data set, and a timeout is paid once.
_known: dict[tuple[Any, ...], DataSet | str] = {}
#: In `_known`, that the Hub cannot be reached. Finding that out takes its library 24 s, for any data set.
_UNREACHABLE = ("the Hub",)


def load(name: str, given: Mapping[str, Any]) -> DataSet:
    """The data of the task `name` (squad, quality or toefl); `given` is its metadata.

    Raises `Unavailable` when no place has the data, `UserError` for a folder or a file in it that cannot be right.
    """
    kind = _KINDS[name]
    file = _file_of(kind, _text(given, "qa_folder"))
    if file is not None:
        try:
            status = file.stat()
        except OSError as error:
            raise UserError(f"{file} cannot be read ({why(error)})") from None
        key = (name, str(file), status.st_mtime_ns, status.st_size)
        if key not in _known:
            _known[key] = _data_set(_read(file, kind), f"{file.name} in {file.parent.name or file.parent}")
        return _known[key]
    hub = _text(given, f"{name}_hub") or kind.hub
    key = (name, hub, str(_copies()))
    if key not in _known:
        _known[key] = _from_copy_or_hub(kind, hub)
    found = _known[key]
    if isinstance(found, DataSet):
        return found
    if folder := _text(given, "qa_folder"):
        found = f"{folder} has no {' or '.join(kind.files)}, and {found}"
    raise Unavailable(
        f"no {kind.title} data: {found}; put {' or '.join(kind.files)} into a folder and add "
        """--metadata '{"qa_folder": "<folder>"}'"""
    )


def _text(given: Mapping[str, Any], key: str) -> str | None:
    value = given.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        wanted = "a folder" if key == "qa_folder" else "the id of a data set on the Hub, such as owner/name"
        raise UserError(f"{key}={value!r:.60} given, but {key} must be {wanted}")
    return value


# ------------------------------------------------------------------------------------------------------------- places


def _file_of(kind: _Kind, named: str | None) -> Path | None:
    if named is None:
        return None
    folder = paths.folder(f"qa_folder={named!r:.80}", named)
    known = [file for other in _KINDS.values() for file in other.files]
    # What has the name and is no file is not passed over: reading it says what it is.
    if not any(os.path.lexists(folder / file) for file in known):
        raise UserError(f"qa_folder={named!r:.300} given, but the folder has none of {', '.join(known)}")
    return next((folder / file for file in kind.files if os.path.lexists(folder / file)), None)


def _read(file: Path, kind: _Kind) -> list[Item]:
    items = list(kind.files[file.name](file))
    if not items:
        raise UserError(f"{file} has no question with an answer")
    return items


def _from_copy_or_hub(kind: _Kind, hub: str | None) -> DataSet | str:
    if hub is None:
        return f'no data set on the Hub is known for it (name one with the metadata "{kind.name}_hub")'
    copy = _copies() / f"{kind.name}-{re.sub(r'[^A-Za-z0-9._-]+', '--', hub)}.jsonl"
    if (items := _from_copy(copy, kind, hub)) is not None:
        return _data_set(items, f"{hub} on the Hub")
    if _UNREACHABLE in _known:
        return f"{hub} cannot be loaded, the Hub is out of reach ({_known[_UNREACHABLE]})"
    try:
        items = [item for number, row in enumerate(_hub_rows(kind, hub), 1) for item in _checked(kind, row, number)]
    except Exception as error:  # whatever the network, the Hub or its libraries may raise
        first = next(iter(str(error).strip().splitlines()), "")
        reason = f"{type(error).__name__}: {first[:160]}"
        if isinstance(error, ConnectionError):
            _known[_UNREACHABLE] = type(error).__name__
        return f"{hub} cannot be loaded from the Hub ({reason})"
    if not items:
        return f"{hub} on the Hub has no question with an answer"
    found = _data_set(items, f"{hub} on the Hub")
    body = _body(found.items)
    keep(copy, json.dumps({"sha256": hashlib.sha256(body).hexdigest(), "hub": hub}).encode() + b"\n" + body)
    return found


def _hub_rows(kind: _Kind, hub: str) -> Iterable[Any]:
    import datasets

    with contextlib.nullcontext() if _answers(hub) else _offline():
        if kind.split:
            return datasets.load_dataset(hub, split=kind.split)
        splits = datasets.load_dataset(hub)
        return [row for split in sorted(splits) for row in splits[split]]


def _answers(hub: str) -> bool:
    """Whether the Hub answers at all, if with an error. Asked once: its libraries retry for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(hub, timeout=10)
    except (HfHubHTTPError, ValueError):  # it said no; ValueError: not an id of a data set, which loading will say
        return True
    except Exception:  # whatever the network may raise
        return False
    return True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let `datasets` look only into its own cache."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _checked(kind: _Kind, row: Any, number: int) -> Iterator[Item]:
    try:
        yield from kind.row(row)
    except _Malformed as error:
        raise ValueError(f"row {number}: {error}") from None


def _copies() -> Path:
    return paths.cache_root() / "qa"


def _from_copy(copy: Path, kind: _Kind, hub: str) -> list[Item] | None:
    """The items of a copy, None if there is none or it is not as it was written."""
    if not os.path.lexists(copy):
        return None
    try:
        head, _, body = files.read_bytes(copy, follow=False).partition(b"\n")
        known = files.parse_json(head, "its first line")
        if known.get("sha256") != hashlib.sha256(body).hexdigest():
            raise UserError("it does not fit its checksum")
        if known.get("hub") != hub:
            raise UserError("it is that of another data set")
        return [item for line in body.splitlines() for item in _kept(files.parse_json(line, "a line"), kind)]
    except UserError as error:
        logger.warning("the copy %s is not as it was written (%s); it is made again", copy, error)
        return None


def _kept(group: dict[str, Any], kind: _Kind) -> Iterator[Item]:
    """The items of one line of a copy. Raises `UserError`."""
    context, questions = group.get("context"), group.get("questions")
    if not isinstance(context, str) or not isinstance(questions, list):
        raise UserError("a line has no context or no questions")
    for asked in questions:
        if not isinstance(asked, list) or [type(part) for part in asked] != [str, list, list]:
            raise UserError("a question has other parts")
        question, options, answers = asked
        letters = string.ascii_uppercase[: len(options)]
        if not answers or not all(isinstance(text, str) for text in (*options, *answers)):
            raise UserError("an option or an answer is no text")
        if bool(options) != kind.choice or (options and not all(len(a) == 1 and a in letters for a in answers)):
            raise UserError("the answers do not belong to the options")
        yield Item(context, question, tuple(options), tuple(answers))


# ---------------------------------------------------------------------------------------------------------- data sets


def _data_set(items: Iterable[Item], source: str) -> DataSet:
    unique: dict[tuple[str, str], Item] = {}
    for item in sorted(items):  # so that neither the order of a file nor its format decides any document
        unique.setdefault((item.question, item.context), item)
    kept = tuple(unique.values())
    return DataSet(kept, hashlib.sha256(_body(kept)).hexdigest(), source)


def _body(items: Iterable[Item]) -> bytes:
    """The items as JSON Lines, one line per context."""
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(item.context, []).append([item.question, item.options, item.answers])
    lines = ({"context": context, "questions": questions} for context, questions in groups.items())
    return "\n".join(json.dumps(line, ensure_ascii=True) for line in lines).encode()


# --------------------------------------------------------------------------------------------------------------- rows


def _field(row: Any, key: str, kind: type, wanted: str) -> Any:
    if not isinstance(row, dict):
        raise _Malformed(f"a JSON object is expected, this is {_short(row)}")
    if key not in row:
        raise _Malformed(f"{key!r} is missing; it must be {wanted}")
    value = row[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _Malformed(f"{key!r} is {_short(value)}; it must be {wanted}")
    return value


def _string(row: Any, key: str) -> str:
    value = _field(row, key, str, "a text").replace("\r\n", "\n").strip()
    if not value:
        raise _Malformed(f"{key!r} is empty; it must be a text")
    return _whole_text(value, key, _LONGEST)


def _whole_text(value: str, key: str, longest: int = _LONGEST_LINE) -> str:
    """`value`, unless it cannot be written as UTF-8 or is too long for any prompt."""
    if len(value) > longest:
        raise _Malformed(f"{key!r} has {len(value):,} characters; it must have at most {longest:,}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start].encode("unicode_escape").decode()
        raise _Malformed(f"{key!r} holds {half}, half a character; it must be a text") from None
    return value


def _texts(row: Any, key: str, least: int) -> list[str]:
    wanted = f"a list of {least} or more texts" if least else "a list of texts"
    values = _field(row, key, list, wanted)
    if len(values) < least or not all(isinstance(value, str) and value.strip() for value in values):
        raise _Malformed(f"{key!r} is {_short(values)}; it must be {wanted}")
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
    except _Malformed as error:
        raise _Malformed(f"{where}: {error}") from None


def _quality_row(row: Any, answer: str = "answer", first: int = 0) -> Iterator[Item]:
    context, question = _string(row, "article"), _line(row, "question")
    options = _texts(row, "options", 2)
    _letter(len(options) - 1)
    wanted = f"the right option as a number from {first} to {len(options) - 1 + first}"
    right = _field(row, answer, int, wanted) - first
    if not 0 <= right < len(options):
        raise _Malformed(f"{answer!r} is {right + first}; it must be {wanted}")
    yield Item(context, question, tuple(options), (_letter(right),))


def _quality_official(row: Any) -> Iterator[Item]:
    article = _string(row, "article")
    for i, asked in enumerate(_field(row, "questions", list, "a list of questions")):
        whole = {**asked, "article": article} if isinstance(asked, dict) else asked
        yield from _within(f"questions[{i}]", lambda whole: list(_quality_row(whole, "gold_label", 1)), whole)


def _letter(position: int) -> str:
    if position >= len(string.ascii_uppercase):
        raise _Malformed(f"option {position + 1} is more than the {len(string.ascii_uppercase)} that letters can name")
    return string.ascii_uppercase[position]


_TOEFL_FORM = '"Question: … Options: A.… B.…"'
_TOEFL_QUESTION = re.compile(r"\s*Question:\s*(\S.*?)\s*Options:\s*(\S.*)", re.DOTALL)


def _toefl_row(row: Any) -> Iterator[Item]:
    context = _tidy(_string(row, "context"))
    questions, answers = _texts(row, "questions", 1), _texts(row, "answer", 1)
    if len(questions) != len(answers):
        raise _Malformed(f"{len(questions)} questions and {len(answers)} answers; there must be as many of either")
    for i, (asked, answer) in enumerate(zip(questions, answers, strict=True)):
        form = _TOEFL_QUESTION.fullmatch(asked)
        options = _split_options(form.group(2)) if form else []
        if form is None or len(options) < 2:
            raise _Malformed(f"questions[{i}] is {_short(asked)}; it must have the form {_TOEFL_FORM}")
        letters = re.sub(r"[\s,]", "", answer)
        possible = [_letter(j) for j in range(len(options))]
        if not letters or len(set(letters)) < len(letters) or not set(letters) <= set(possible):
            wanted = f"the letters of the right options, from A to {possible[-1]}"
            raise _Malformed(f"answer[{i}] is {_short(answer)}; it must be {wanted}")
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
            except _Malformed as error:
                raise UserError(f"{where}: {error}") from None
            yield from items

    return read


def _whole_json(row: Callable[[Any], Iterator[Item]]) -> Callable[[Path], Iterator[Item]]:
    """A reader of files that are one JSON object."""

    def read(file: Path) -> Iterator[Item]:
        try:
            yield from row(parse_json(read_bytes(file), str(file)))
        except _Malformed as error:
            raise UserError(f"{file}: {error}") from None

    return read


@dataclass(frozen=True)
class _Kind:
    """One data set: its files and their readers, best first; its id, split and rows on the Hub; whether its questions
    have options."""

    name: str
    title: str
    files: dict[str, Callable[[Path], Iterable[Item]]]
    row: Callable[[Any], Iterator[Item]]
    hub: str | None
    split: str | None
    choice: bool = True


_KINDS = {
    kind.name: kind
    for kind in (
        _Kind(
            name="squad",
            title="SQuAD",
            files={"dev-v2.0.json": _whole_json(_squad_official), "squad.jsonl": _lines(_squad_row)},
            row=_squad_row,
            hub="rajpurkar/squad_v2",
            split="validation",
            choice=False,
        ),
        _Kind(
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
        _Kind(
            name="toefl",
            title="TOEFL",
            files={"toeflqa.jsonl": _lines(_toefl_row)},
            row=_toefl_row,
            hub=None,
            split=None,
        ),
    )
}
