"""What stands in a `--use_cache` file of ours: answers of one configuration, as JSON that carries checksums.

lm-eval keeps answers in an SQLite file and would pickle them. Reading a pickle runs what it says, and nothing in it
tells which model answered. So our answers are `sealed` JSON, bound to their file and request, and a file of its own
beside the database (`<name>_rank0.db.lm-eval-sparse.json`) holds what decided them. What does not fit is refused in one
line, and nothing of it is unpickled. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import masking, sealed
from ..errors import UserError
from ..protocol import MeasuredFloat, MeasuredLoglikelihood, MeasuredText
from ..results import files

#: What decides the answers of a database, in a file beside it with this at the end of its name.
BESIDE = ".lm-eval-sparse.json"

_KEY = "lm-eval-sparse fingerprint"  # under which older versions kept it, as a pickle in the database
_PLACE = "response cache"
_MOST_BESIDE = 4 << 20
#: The table of lm-eval's library, the index that comes with it, and ours, in which the database's name stands.
_TABLES = {"unnamed", "sqlite_autoindex_unnamed_1", "lm_eval_sparse"}
_ANSWERS = 'CREATE TABLE "unnamed" (key TEXT PRIMARY KEY, value BLOB)'
_OURS = "CREATE TABLE lm_eval_sparse (id TEXT)"
_WAIT = 30  # seconds, for another process that writes
_INSTEAD = "give another file name, or delete this one"

#: How answers are written: their kind, and what they are but for their `stats`.
_KINDS: dict[str, tuple[type, type]] = {
    "text": (MeasuredText, str),
    "loglikelihood": (MeasuredLoglikelihood, tuple),
    "rolling": (MeasuredFloat, float),
}


def check(name: str, rank: int = 0) -> None:
    """Raise `UserError` when the part of process `rank` of the cache that `--use_cache` names cannot be ours.

    For before the model is loaded; `guard` compares the configuration. A cache that does not exist yet is fine.
    """
    path = Path(f"{name}_rank{rank}.db")  # as lm-eval names it
    if not _is_new(path):
        with _database(path) as database:
            _check_answers(path, database, _settled(path, database))


def names(path: Path) -> list[str]:
    """Names of the files of which one cache is made."""
    return [path.name, _beside(path).name]


def guard(store: Any, fingerprint: dict[str, Any]) -> None:
    """Let lm-eval's `SqliteDict` keep and give answers of the configuration `fingerprint` (JSON) only.

    Raises `UserError` when the file holds other ones, or anything else.
    """
    store.commit()  # its thread makes the table when it gets to it
    path = Path(store.filename)
    mine = json.loads(json.dumps(fingerprint))
    with _database(path) as database:
        _check_answers(path, database, _settled(path, database))
        database.execute("BEGIN IMMEDIATE")  # of several processes that start at once, one settles it
        known = _settled(path, database)
        if known is None:
            known = {"id": uuid.uuid4().hex, "fingerprint": mine}
            database.execute("DROP TABLE IF EXISTS lm_eval_sparse")
            database.execute(_OURS)
            database.execute("INSERT INTO lm_eval_sparse VALUES (?)", (known["id"],))
            files.write_whole(_beside(path), sealed.seal(_PLACE, known) + b"\n")
        elif known["fingerprint"] != mine:
            raise _other_configuration(known["fingerprint"], mine)
        database.commit()
    codec = _Codec(path, known["id"])
    store.encode_key, store.encode, store.decode = codec.encode_key, codec.encode, codec.decode


def public(arguments: dict[str, Any]) -> dict[str, str]:
    """Model arguments as a fingerprint may hold them: as texts, without secrets."""
    return {
        name: masking.mask(str(value), masking.values_in(arguments))
        for name, value in arguments.items()
        if not masking.is_secret(name)
    }


class _Codec:
    """Writes and reads answers for a `SqliteDict`, which asks for the form of a key before that of its value."""

    def __init__(self, path: Path, identity: str):
        self._path, self._identity, self._key = path, identity, ""

    def encode_key(self, key: str) -> str:
        self._key = key
        return key

    def encode(self, answer: Any) -> bytes:
        for kind, (measured, plain) in _KINDS.items():
            if isinstance(answer, measured):
                value = list(answer) if plain is tuple else plain(answer)
                content = {"kind": kind, "value": value, "stats": answer.stats}
                return sealed.seal(_answer(self._identity, self._key), content)
        raise TypeError(f"{type(answer).__name__} is no answer of this model type")

    def decode(self, content: Any) -> Any:
        try:
            known = sealed.unseal(_answer(self._identity, self._key), bytes(content))
        except (sealed.Broken, TypeError) as error:
            raise _refused(self._path, f"an answer in it is not as it was written ({error})") from None
        measured, plain = _KINDS[known["kind"]]
        return measured(*known["value"], known["stats"]) if plain is tuple else measured(known["value"], known["stats"])


def _answer(identity: str, key: str) -> str:
    return f"answer {identity} {key}"


def _beside(path: Path) -> Path:
    return path.with_name(path.name + BESIDE)


def _is_new(path: Path) -> bool:
    """Whether there is no database yet. Raises `UserError` for what no database can be."""
    # Its journals too: SQLite writes into the database what they hold.
    for part in (path, *(path.with_name(path.name + end) for end in ("-journal", "-wal", "-shm"))):
        if not os.path.lexists(part):
            continue
        mode = os.lstat(part).st_mode
        if not stat.S_ISREG(mode):
            what = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link"}.get(stat.S_IFMT(mode), "no regular file")
            raise UserError(f"the --use_cache file {part} is {what}; give another file name, or move it away")
    return not path.exists() or path.stat().st_size == 0


@contextlib.contextmanager
def _database(path: Path) -> Iterator[sqlite3.Connection]:
    """The database at `path`. What SQLite says against it becomes a `UserError`; nothing is kept then."""
    _is_new(path)
    database = None
    try:
        # To be written, since one whose writer was killed has to be rolled back before it can be read.
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_WAIT, isolation_level=None)
        database.execute("PRAGMA trusted_schema = OFF")
        database.execute("PRAGMA cell_size_check = ON")
        yield database
    except (sqlite3.Error, OSError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise _refused(path, f"it cannot be used ({files.why(error)})") from None
    finally:
        if database is not None:
            database.close()


def _settled(path: Path, database: sqlite3.Connection) -> dict[str, Any] | None:
    """What decides the answers of a database (`id`, `fingerprint`); None when nothing does yet. Raises `UserError`."""
    tables = dict(database.execute("SELECT name, sql FROM sqlite_master"))
    for name in tables.keys() - _TABLES:
        raise _refused(path, f"it was written by another program (it has a table {name!r})")
    if tables.get("unnamed", _ANSWERS) != _ANSWERS or tables.get("lm_eval_sparse", _OURS) != _OURS:
        raise _refused(path, "it was written by another program (its tables have other columns)")
    answered = "unnamed" in tables and _any(database, "SELECT 1 FROM unnamed")
    if answered and _any(database, "SELECT 1 FROM unnamed WHERE key = ?", _KEY):
        raise _refused(path, "it was written by an older version of lm-eval-sparse, in a form that is not read anymore")
    if answered and not os.path.lexists(_beside(path)):
        raise UserError(
            f"the --use_cache file was written by another model type ({path} has no {_beside(path).name} beside it) "
            f"and does not say under which method; {_INSTEAD}"
        )
    names = database.execute("SELECT id FROM lm_eval_sparse LIMIT 2").fetchall() if "lm_eval_sparse" in tables else []
    try:
        known = _read_beside(path)
        if names != [(known["id"],)]:
            raise _refused(path, f"it does not belong to {_beside(path).name} beside it")
    except UserError:
        if answered:
            raise
        return None  # nothing is lost: left by a process that was killed, or by a database that was deleted
    return known


def _check_answers(path: Path, database: sqlite3.Connection, known: dict[str, Any] | None) -> None:
    """Raise `UserError` unless all that is in a database is as it was written. Takes 0.1 s for 10,000 answers."""
    wrong = database.execute("PRAGMA quick_check(1)").fetchone()
    if wrong != ("ok",):
        raise _refused(path, f"it is damaged ({files.brief(wrong)})")
    if known is None:
        return
    for key, value in database.execute("SELECT key, value FROM unnamed"):
        place = _answer(known["id"], key) if isinstance(key, str) else ""
        if not isinstance(value, bytes) or not sealed.fits(place, value):
            raise _refused(path, "an answer in it is not as it was written")


def _any(database: sqlite3.Connection, query: str, *values: str) -> bool:
    return bool(database.execute(f"SELECT EXISTS ({query})", values).fetchone()[0])


def _read_beside(path: Path) -> dict[str, Any]:
    beside = _beside(path)
    try:
        content = files.read_bytes(beside, most=_MOST_BESIDE, follow=False)
        known = sealed.unseal(_PLACE, content.rstrip(b"\n"))
    except (UserError, sealed.Broken) as error:
        raise UserError(
            f"{beside}, which says how the answers in the --use_cache file were made, is not as it was written "
            f"({error}); give another file name, or delete both"
        ) from None
    identity, fingerprint = known.get("id"), known.get("fingerprint")
    if not isinstance(identity, str) or not re.fullmatch("[0-9a-f]{32}", identity) or not isinstance(fingerprint, dict):
        raise UserError(f"{beside} does not describe a --use_cache file; give another file name, or delete both")
    return known


def _refused(path: Path, reason: str) -> UserError:
    return UserError(f"the --use_cache file {path} is refused: {reason}; {_INSTEAD}")


def _other_configuration(theirs: dict[str, Any], mine: dict[str, Any]) -> UserError:
    differing = [name for name in {**theirs, **mine} if mine.get(name) != theirs.get(name)]
    details = ", ".join(f"{name}: {theirs.get(name)!r} there, {mine.get(name)!r} now" for name in differing)
    return UserError(
        f"the --use_cache file was written under another configuration ({details}); "
        "give another file name for this run, or delete that one"
    )
