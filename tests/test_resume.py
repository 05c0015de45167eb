"""The log of samples: what `kill -9` leaves, what is damaged, strange or of somebody else, and disks without room."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_damage import PLACES, clear, spoil
from resume_stub import CONFIGURATION, entry, key

from lm_eval_sparse import sealed
from lm_eval_sparse.model import resume
from lm_eval_sparse.model.resume import FOLDER, SampleLog

STUB = Path(__file__).with_name("resume_stub.py")
NUMBERS = [4 * n for n in range(6)]  # of prompts with short answers


def opened(output: Path, run: str = "later", **configuration: Any) -> SampleLog:
    return SampleLog(output, {**CONFIGURATION, **configuration}, run, {"began": "now"})


def taken(log: SampleLog, numbers: Any = NUMBERS) -> dict[int, Any]:
    """What the log gives for prompts, each held against what was put in."""
    found = {}
    for number in numbers:
        if (one := log.take(key(number), lambda kept: kept)) is not None:
            assert one == {"key": key(number), **entry(number)}
            found[number] = one
    return found


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The file of a run that was answered."""
    log = opened(tmp_path, "first")
    assert not (tmp_path / FOLDER).exists() and len(log) == 0
    for number in NUMBERS:
        log.append(key(number), entry(number))
    log.close()
    (file,) = log.folder.iterdir()
    return file


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.INFO)
    yield caplog
    assert all("\n" not in record.getMessage() for record in caplog.records)


# --- killed -----------------------------------------------------------------------------------------------------------


def test_twenty_kills(tmp_path: Path) -> None:
    """By one process or two, in turn, nothing that was kept is made again, and all is there in the end."""
    prompts, rng, marks = 100, random.Random(), tmp_path / "marks"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(ranks: int) -> list[subprocess.Popen[bytes]]:
        command = [sys.executable, str(STUB), str(tmp_path / "out"), str(marks), str(prompts)]
        return [subprocess.Popen([*command, str(rank), str(ranks)], env=environment) for rank in range(ranks)]

    killed = 0
    for attempt in range(20):
        running = start(1 + attempt % 2)
        size = marks.stat().st_size if marks.exists() else 0
        deadline = time.monotonic() + 20
        while not (marks.exists() and marks.stat().st_size > size) and time.monotonic() < deadline:
            if all(one.poll() is not None for one in running):
                break
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)
        for one in running:
            one.send_signal(signal.SIGKILL)
            killed += one.wait() == -signal.SIGKILL
    assert killed >= 10, "the stub is too fast to be killed"
    for one in start(2):
        assert one.wait() == 0
    kept: set[int] = set()
    for line in marks.read_text().splitlines():
        what, number = line.split()
        assert what == "kept" or int(number) not in kept, f"prompt {number} was answered again"
        if what == "kept":
            kept.add(int(number))
    log = opened(tmp_path / "out")
    assert taken(log, range(prompts)).keys() == set(range(prompts))
    assert all(len(lines) == 1 for lines in log._lines.values()), "a prompt is in the log twice"


def test_a_torn_line_is_made_again(written: Path, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    written.write_bytes(written.read_bytes()[:-5])
    log = opened(tmp_path)
    assert list(taken(log)) == NUMBERS[:-1] and "1 lines are torn" in said.text and written.name in said.text
    log.append(key(NUMBERS[-1]), entry(NUMBERS[-1]))  # not behind the torn line, but in a file of its own
    log.close()
    assert list(taken(opened(tmp_path))) == NUMBERS


def test_the_same_process_once_more(written: Path, tmp_path: Path) -> None:
    for number in (100, 104):
        log = opened(tmp_path, "first")
        log.append(key(number), entry(number))
        log.close()
    assert {path.name for path in log.folder.iterdir()} == {"first.jsonl", "first-1.jsonl", "first-2.jsonl"}
    assert list(taken(opened(tmp_path), [*NUMBERS, 100, 104])) == [*NUMBERS, 100, 104]


# --- damaged, or somebody else's --------------------------------------------------------------------------------------


def test_damage(written: Path, tmp_path: Path, said: pytest.LogCaptureFixture, request: Any) -> None:
    """Whatever happened to the file, what is taken from it is what was put in, and the rest is made again."""
    content = written.read_bytes()
    fuzz = request.config.getoption("--fuzz")
    seeds = range(random.randrange(10**9), 10**10)[:10_000] if fuzz else range(200)
    for seed in seeds:
        said.clear()
        how = spoil(written, seed)
        nothing = how == "gone" or (written.is_file() and written.read_bytes() in (b"", b"\n"))
        found = taken(opened(tmp_path))
        if len(found) < len(NUMBERS) and not nothing and how not in ("a line dropped", "cut off"):
            assert said.text, (seed, how)
        clear(written)
        written.write_bytes(content)
    assert list(taken(opened(tmp_path))) == NUMBERS


def test_lines_of_another_file_or_configuration(written: Path, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    other = opened(tmp_path, "second", method="other")
    assert taken(other) == {} and "answers of 1 other configuration, which are not used" in said.text
    assert "method: stub there, other now" in said.text
    wrong = {**entry(0), "number": 99}
    other.append(key(0), wrong)
    other.close()
    (file,) = other.folder.iterdir()
    # As a whole file, and its line behind ours.
    (written.parent / file.name).write_bytes(file.read_bytes())
    said.clear()
    assert list(taken(opened(tmp_path))) == NUMBERS
    assert f"{file.name} is left out: it was written under another configuration" in said.text
    written.write_bytes(written.read_bytes() + file.read_bytes())
    assert list(taken(opened(tmp_path))) == NUMBERS and "2 lines are torn or not as they were written" in said.text


@pytest.mark.parametrize("change", [{"schema": 2}, {"schema": None}, {"run": "../x"}, {"about": 5}])
def test_a_first_line_that_says_something_else(
    written: Path, tmp_path: Path, said: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    first, *rest = written.read_bytes().split(b"\n")
    header = sealed.unseal(resume._HEADER, first)
    header = {name: value for name, value in {**header, **change}.items() if name != "sha256"}
    written.write_bytes(b"\n".join([sealed.seal(resume._HEADER, header), *rest]))
    log = opened(tmp_path)
    assert taken(log) == {}
    why = "it has schema" if "schema" in change else "its first line does not describe a log"
    assert f"{written.name} is left out: {why}" in said.text
    before = written.read_bytes()
    log.append(key(0), entry(0))
    log.close()
    assert written.read_bytes() == before and list(taken(opened(tmp_path))) == [0]


def test_a_value_of_another_form(written: Path, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    """A line with a checksum that fits, and nothing in it that a model could have answered."""
    for error in (KeyError("answers"), TypeError("list"), ValueError("nan"), AttributeError("items"), IndexError()):

        def fits(found: Any, error: Exception = error) -> Any:
            raise error

        assert opened(tmp_path).take(key(0), fits) is None and "its prompt is made again" in said.text
        said.clear()


@pytest.mark.parametrize("place", [name for name in PLACES if name not in ("gone", "a folder")])
@pytest.mark.parametrize("which", ["root", "folder"])
def test_something_else_in_place_of_the_folder(
    written: Path, tmp_path: Path, said: pytest.LogCaptureFixture, place: str, which: str
) -> None:
    """Links are not followed, whatever they lead to: nothing is read there, nothing written."""
    folder = {"root": tmp_path / FOLDER, "folder": written.parent}[which]
    folder.rename(tmp_path / "elsewhere")
    PLACES[place](folder)
    log = opened(tmp_path)
    assert taken(log) == {} and "nothing is read from and written to it" in said.text
    log.append(key(0), entry(0))
    log.close()
    assert len(said.records) == 1


def test_a_link_to_a_folder(written: Path, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    written.parent.rename(tmp_path / "elsewhere")
    written.parent.symlink_to(tmp_path / "elsewhere")
    log = opened(tmp_path)
    log.append(key(100), entry(100))
    assert taken(log) == {} and "is a link" in said.text and len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_a_folder_of_another_user(
    written: Path, tmp_path: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be read, all is made; where nothing can be written, the run goes on."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(resume.os, "listdir", refuse)
        assert taken(opened(tmp_path)) == {} and "cannot be read (Permission denied)" in said.text
    own = os.open
    monkeypatch.setattr(resume.os, "open", lambda path, how, *a, **k: refuse() if how & os.O_CREAT else own(path, how))
    log = opened(tmp_path)
    assert list(taken(log)) == NUMBERS
    said.clear()
    for number in (100, 104):
        log.append(key(number), entry(number))
    log.close()
    first, last = [record.getMessage() for record in said.records]
    assert "answers cannot be kept there (Permission denied): the run goes on" in first
    assert "2 prompts of this run are not in it" in last


# --- no room ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "not cut"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_without_room(
    tmp_path: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: int, cut: bool
) -> None:
    """It is said once, the run goes on, and what could not be written is written when there is room again."""
    own, room, seconds = os.write, [10**9], [0.0]

    def write_part(file: int, block: bytes) -> int:
        if len(block) > room[0] > 0:
            part, room[0] = room[0], 0
            return own(file, bytes(block[:part]))
        if room[0] == 0:
            raise OSError(error, os.strerror(error))
        return own(file, block)

    monkeypatch.setattr(resume.os, "write", write_part)
    monkeypatch.setattr(resume.time, "monotonic", lambda: seconds[0])
    if not cut:

        def refuse(*args: Any) -> None:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(resume.os, "ftruncate", refuse)
    log = opened(tmp_path, "first")
    log.append(key(0), entry(0))
    room[0] = 40
    for number in (4, 8):
        log.append(key(number), entry(number))
    assert len(said.records) == 1 and os.strerror(error) in said.text and "make room" in said.text
    seconds[0] += 100
    log.append(key(12), entry(12))  # it still has none
    room[0] = 10**9
    assert list(taken(opened(tmp_path), NUMBERS)) == [0]
    seconds[0] += 100
    log.append(key(16), entry(16))
    assert "answers are kept there again" in said.text
    log.close()
    said.clear()
    again = opened(tmp_path)
    assert list(taken(again)) == [0, 4, 8, 12, 16] and all(len(lines) == 1 for lines in again._lines.values())
    assert ("torn" in said.text) != cut
    assert "not in it" not in said.text


def test_no_room_at_all(tmp_path: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resume.os, "write", full)
    monkeypatch.setattr(resume, "_MOST_WAITING", 5_000)
    log = opened(tmp_path, "first")
    for number in range(40):
        log.append(key(4 * number), entry(4 * number))
    assert sum(map(len, log._waiting)) <= 5_000  # memory does not fill up, either
    log.close()
    assert len(said.records) == 2 and "40 prompts of this run are not in it" in said.text
    assert list(log.folder.iterdir()) == []
    monkeypatch.undo()
    assert taken(opened(tmp_path)) == {}


def test_what_no_file_can_hold(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    log = opened(tmp_path, "first")
    log.append(key(0), {"text": "\ud800"})
    log.append(key(4), entry(4))
    log.close()
    assert "cannot be kept" in said.text and list(taken(opened(tmp_path))) == [4]


def test_names_are_stable() -> None:
    """They are on disks: another way to make them would make all answers anew."""
    assert key(0) == "1b702d150b3fcf295a678a09fdeff65d"
    assert resume.digest({"b": 1, "a": [0.1, None]}) == resume.digest(json.loads('{"a": [0.1, null], "b": 1}'))
    assert resume.digest({1: 2, "a": 3}) == resume.digest({1: 2, "a": 3})
