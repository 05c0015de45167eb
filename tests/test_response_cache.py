"""The `--use_cache` file: whatever else lies there is refused in one line, and nothing of it is unpickled."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_damage import STRANGE, clear, spoil
from sqlitedict import SqliteDict

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.model import response_cache
from lm_eval_sparse.protocol import MeasuredFloat, MeasuredLoglikelihood, MeasuredText

MINE = {"method": "dense", "requested_sparsity": None, "knobs": {"a": [1, 0.5]}}
STATS = {"run": "a", "sparsity": 0.1 + 0.2, "prefill": {"calls": {"x": 3}}}
ANSWERS: dict[str, Any] = {
    "0" * 64: MeasuredText("one é 😀", STATS),
    "1" * 64: MeasuredLoglikelihood(-1.5e-300, True, STATS),
    "2" * 64: MeasuredFloat(float("-inf"), {}),
    "3" * 64: MeasuredText("", {}),
}


class Bomb:
    """Runs what it says when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with answers."""
    path = tmp_path / "answers_rank0.db"
    with opened(path) as store:
        for key, answer in ANSWERS.items():
            store[key] = answer
    return path


def opened(path: Path, fingerprint: dict[str, Any] = MINE) -> SqliteDict:
    """As lm-eval opens it, behind what is looked at before the model is loaded."""
    response_cache.check(str(path).removesuffix("_rank0.db"))
    store = SqliteDict(str(path), autocommit=True)
    try:
        response_cache.guard(store, fingerprint)
    except BaseException:
        store.close()
        raise
    return store


def read(path: Path) -> dict[str, Any]:
    with opened(path) as store:
        return {key: store[key] for key in ANSWERS if key in store}


def beside(path: Path) -> Path:
    return path.with_name(path.name + ".lm-eval-sparse.json")


def refused(path: Path, *words: str, fingerprint: dict[str, Any] = MINE) -> None:
    with pytest.raises(UserError) as caught:
        opened(path, fingerprint)
    said = str(caught.value)
    assert "\n" not in said and "--use_cache" in said and "another file name" in said
    for word in words:
        assert word in said


def same(found: dict[str, Any]) -> bool:
    return all(
        type(answer) is type(ANSWERS[key]) and answer == ANSWERS[key] and answer.stats == ANSWERS[key].stats
        for key, answer in found.items()
    )


def test_answers_come_back_as_they_were(cache: Path) -> None:
    assert len(read(cache)) == len(ANSWERS) and same(read(cache))
    found = read(cache)["1" * 64]
    assert found[0] == -1.5e-300 and found[1] is True
    known = json.loads(beside(cache).read_text())
    assert known["fingerprint"] == MINE
    for (value,) in sqlite3.connect(cache).execute("SELECT value FROM unnamed"):
        assert set(json.loads(value)) == {"sha256", "kind", "value", "stats"}  # no pickle


@pytest.mark.parametrize("seed", range(100))
@pytest.mark.parametrize("part", ["database", "beside"])
def test_damage(part: str, seed: int, cache: Path) -> None:
    """Refused in one line, or made anew, or what was written; never another answer."""
    path = cache if part == "database" else beside(cache)
    content = path.read_bytes()
    spoil(path, seed)
    try:
        found = read(cache)
    except UserError as error:
        assert "\n" not in str(error) and "--use_cache" in str(error)
        return
    assert same(found)
    assert len(found) == len(ANSWERS) or not found or path.read_bytes() != content


@pytest.mark.parametrize("seed", range(30))
def test_rows_that_were_changed(seed: int, cache: Path) -> None:
    """Through SQLite, so that the file is sound."""
    rng = random.Random(seed)
    database = sqlite3.connect(cache)
    one, two = rng.sample(sorted(ANSWERS), 2)
    value = database.execute("SELECT value FROM unnamed WHERE key = ?", (one,)).fetchone()[0]
    place = rng.randrange(len(value))
    other = rng.choice(
        [*STRANGE, value[:place], value + b" ", value[:place] + b"7" + value[place:], None, 5, 0.5, value.decode()]
    )
    if rng.random() < 0.3:
        database.execute("UPDATE unnamed SET value = ? WHERE key = ?", (value, two))  # an answer to another question
    else:
        database.execute("UPDATE unnamed SET value = ? WHERE key = ?", (other, one))
    database.commit()
    database.close()
    refused(cache, "an answer in it is not as it was written")


def test_rows_that_change_during_a_run(cache: Path) -> None:
    with opened(cache) as store, pytest.raises(UserError, match="an answer in it is not as it was written"):
        database = sqlite3.connect(cache)
        database.execute("UPDATE unnamed SET value = ?", (pickle.dumps("planted"),))
        database.commit()
        store["0" * 64]


@pytest.mark.parametrize("key", ["lm-eval-sparse fingerprint", "0" * 64])
@pytest.mark.parametrize("with_beside", [False, True])
def test_a_planted_pickle_does_not_run(key: str, with_beside: bool, cache: Path, tmp_path: Path) -> None:
    if not with_beside:
        beside(cache).unlink()
    database = sqlite3.connect(cache)
    value = pickle.dumps(Bomb(tmp_path / "ran"))
    database.execute("REPLACE INTO unnamed VALUES (?, ?)", (key, value))
    database.commit()
    refused(cache)
    assert not (tmp_path / "ran").exists()
    pickle.loads(value)
    assert (tmp_path / "ran").exists()  # it would have


def test_a_cache_of_an_older_version(tmp_path: Path) -> None:
    path = tmp_path / "answers_rank0.db"
    with SqliteDict(str(path), autocommit=True) as store:
        store["lm-eval-sparse fingerprint"] = json.dumps(MINE)
    refused(path, "an older version of lm-eval-sparse", "delete this one")


def _sqlite(*statements: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        database = sqlite3.connect(path)
        for statement in statements:
            database.execute(statement)
        database.commit()
        database.close()

    return write


ANSWERS_TABLE = 'CREATE TABLE "unnamed" (key TEXT PRIMARY KEY, value BLOB)'
#: What lies in place of the cache -> what is said.
INSTEAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "a link": (lambda path: path.symlink_to(path.with_name("nothing")), "is a link"),
    "a pipe": (os.mkfifo, "is no regular file"),
    "a text": (lambda path: path.write_text("answers\n" * 200), "not a database"),
    "another program's": (_sqlite("CREATE TABLE visits (url TEXT)"), "another program"),
    "other columns": (_sqlite("CREATE TABLE unnamed (key TEXT, value TEXT, more TEXT)"), "another program"),
    "a view": (_sqlite("CREATE VIEW unnamed AS SELECT 1 AS key, 2 AS value"), "another program"),
    "a trigger": (
        _sqlite(ANSWERS_TABLE, "CREATE TRIGGER t AFTER INSERT ON unnamed BEGIN DELETE FROM unnamed; END"),
        "another program",
    ),
    "another model type's": (
        _sqlite(ANSWERS_TABLE, "INSERT INTO unnamed VALUES ('a', x'80044e2e')"), "another model type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INSTEAD)
def test_something_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / "answers_rank0.db"
    write, words = INSTEAD[name]
    write(path)
    refused(path, words)
    # Journals are written into the database: they must be no links either.
    clear(path)
    (tmp_path / "answers_rank0.db-journal").symlink_to(tmp_path / "elsewhere")
    refused(path, "is a link")


@pytest.mark.parametrize("line", STRANGE, ids=lambda line: repr(line[:20]))
def test_something_else_beside_it(line: bytes, cache: Path) -> None:
    beside(cache).write_bytes(line)
    refused(cache, "is not as it was written", "delete both")


def test_what_does_not_belong_together(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other_rank0.db"
    with opened(other, {"method": "flexprefill"}) as store:
        store["0" * 64] = MeasuredText("other", {})
    whole = cache.read_bytes()
    shutil.copy(other, cache)
    refused(cache, "does not belong to")
    cache.write_bytes(whole)
    shutil.copy(beside(other), beside(cache))
    refused(cache, "does not belong to")
    shutil.copy(other, cache)  # both moved: the same cache under another name
    refused(cache, "'flexprefill' there", "'dense' now")


def test_what_is_left_after_a_deletion_or_a_kill_is_taken_over(cache: Path) -> None:
    cache.unlink()
    assert read(cache) == {}
    beside(cache).unlink()  # stopped between table and file
    assert read(cache) == {}
    beside(cache).write_bytes(b"{")
    assert read(cache) == {}
    cache.write_bytes(b"")
    assert read(cache) == {}


def test_a_second_process_of_another_configuration(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "new_rank0.db"
    with opened(path) as store:  # no answer yet
        refused(path, "'dense' there", "'quest' now", fingerprint={**MINE, "method": "quest"})
        with opened(path) as other:
            other["0" * 64] = ANSWERS["0" * 64]
        assert store["0" * 64] == ANSWERS["0" * 64]


def test_a_database_in_use(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_cache, "_WAIT", 0.05)
    database = sqlite3.connect(cache)
    database.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match="it cannot be used .database is locked.*another file name"):
        response_cache.check(str(cache).removesuffix("_rank0.db"))
    database.close()


def test_only_own_answers_are_kept(cache: Path) -> None:
    with opened(cache) as store, pytest.raises(TypeError, match="dict is no answer"):
        store["4" * 64] = {}


def test_no_secrets_in_a_fingerprint() -> None:
    given = {
        "pretrained": "m", "token": "hf_abcdefghijklmnopqrstu1", "api_key": "abcdefgh", "revision": "main",
        "hub": "https://me:geheim1@host/m", "quantization_config": {"auth_token": "topsecret"},
    }  # fmt: skip
    found = response_cache.public(given)
    assert found.keys() == {"pretrained", "revision", "hub", "quantization_config"}
    for secret in ("hf_abc", "abcdefgh", "geheim1", "topsecret"):
        assert secret not in json.dumps(found)


def test_before_the_model_is_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval looks at the file after it, and would show a traceback."""
    from lm_eval import evaluator

    from lm_eval_sparse.model.lm import SparseHFLM

    monkeypatch.setattr(SparseHFLM, "__init__", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    for content in (cache.read_bytes()[:5000], b"x" * 9000):
        cache.write_bytes(content)
        with pytest.raises(UserError, match="--use_cache"):
            evaluator.simple_evaluate("sparse-hf", tasks=["any"], use_cache=str(cache).removesuffix("_rank0.db"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    (cache.with_name("answers_rank1.db")).mkdir()
    with pytest.raises(UserError, match="answers_rank1.db is a folder"):
        evaluator.simple_evaluate("sparse-hf", tasks=["any"], use_cache=str(cache).removesuffix("_rank0.db"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    yield
