"""Find and read the data of the QA tasks: questions about passages. Knows nothing of prompts and tokenizers.

Three places are tried in this order, for each task on its own:

1. the folder that `--metadata '{"qa_folder": "FOLDER"}'` names, if it has one of the task's files;
2. the copy that an earlier download left in `$LM_EVAL_SPARSE_CACHE/qa`, by default ~/.cache/lm_eval_sparse/qa;
3. the Hub, through `datasets`; what comes is kept as that copy, so that later runs need no network.

Their formats, and the data sets on the Hub, are told in `qa_rows`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import paths
from ..errors import UserError
from ..results import files
from ..results.files import why
from .qa_rows import KINDS, Item, Kind, Malformed
from .recipe import Unavailable
from .store import keep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSet:
    """Items without duplicates, in an order that depends on nothing but themselves; `sha256` is their hash."""

    items: tuple[Item, ...]
    sha256: str
    source: str


#: What has been found, or why it could not be: twelve leaves ask for each data set, and a timeout is paid once.
_known: dict[tuple[Any, ...], DataSet | str] = {}
#: In `_known`, that the Hub cannot be reached. Finding that out takes its library 24 s, for any data set.
_UNREACHABLE = ("the Hub",)


def load(name: str, given: Mapping[str, Any]) -> DataSet:
    """The data of the task `name` (squad, quality or toefl); `given` is its metadata.

    Raises `Unavailable` when no place has the data, `UserError` for a folder or a file in it that cannot be right.
    """
    kind = KINDS[name]
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


def _file_of(kind: Kind, named: str | None) -> Path | None:
    if named is None:
        return None
    folder = paths.folder(f"qa_folder={named!r:.80}", named)
    known = [file for other in KINDS.values() for file in other.files]
    # What has the name and is no file is not passed over: reading it says what it is.
    if not any(os.path.lexists(folder / file) for file in known):
        raise UserError(f"qa_folder={named!r:.300} given, but the folder has none of {', '.join(known)}")
    return next((folder / file for file in kind.files if os.path.lexists(folder / file)), None)


def _read(file: Path, kind: Kind) -> list[Item]:
    items = list(kind.files[file.name](file))
    if not items:
        raise UserError(f"{file} has no question with an answer")
    return items


def _from_copy_or_hub(kind: Kind, hub: str | None) -> DataSet | str:
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


def _hub_rows(kind: Kind, hub: str) -> Iterable[Any]:
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


def _checked(kind: Kind, row: Any, number: int) -> Iterator[Item]:
    try:
        yield from kind.row(row)
    except Malformed as error:
        raise ValueError(f"row {number}: {error}") from None


def _copies() -> Path:
    return paths.cache_root() / "qa"


def _from_copy(copy: Path, kind: Kind, hub: str) -> list[Item] | None:
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


def _kept(group: dict[str, Any], kind: Kind) -> Iterator[Item]:
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
