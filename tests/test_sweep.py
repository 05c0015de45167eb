"""A ledger has every cell once, whatever goes wrong on the way, and says why a cell is not there."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sweeping import HERE, TEXT, cells, driven, surroundings, table, tries

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.results import cells as files
from lm_eval_sparse.results.load import read
from lm_eval_sparse.sweep import grid
from lm_eval_sparse.sweep.cell import Cell
from lm_eval_sparse.sweep.drive import Outcome
from lm_eval_sparse.sweep.ledger import Ledger
from lm_eval_sparse.sweep.status import status

__all__ = ["cells", "surroundings"]  # fixtures


def test_every_cell_is_run_once_and_read_by_analyses(tmp_path: Path, cells: list[Cell]) -> None:
    assert driven(tmp_path / "l", cells) == Outcome(done=len(cells))
    assert sorted(tries(tmp_path)) == sorted(cell.address for cell in cells)
    rows = read([tmp_path / "l"])
    assert len(rows) == 2 * len(cells) and {row.model for row in rows} == {cell.model for cell in cells}
    assert all(row.documents is not None and row.n == 20 for row in rows)
    assert not any(str(tmp_path) in row.model_dump_json() for row in rows)
    assert "20 of 20 cells done" in status(Ledger.of(tmp_path / "l"))
    assert len(list((tmp_path / "l" / "raw").rglob("results_*.json"))) == len(cells)
    # Again there is nothing to do; with another method only its cells are.
    left = Ledger.of(tmp_path / "l")
    assert all(left.is_done(cell.address) for cell in cells)
    (tmp_path / "g.yaml").write_text(TEXT.replace("[quest,", "[flexprefill, quest,"))
    more = list(grid.read(tmp_path / "g.yaml").cells)
    driven(tmp_path / "l", more)
    assert len(tries(tmp_path)) == len(more) == len(cells) + 8 and len(set(tries(tmp_path))) == len(more)


def test_where_weights_lie_is_in_no_record(tmp_path: Path, cells: list[Cell]) -> None:
    local = [
        Cell(**{**cell.as_json(), "pretrained": str(tmp_path / "models" / "m"), "model": "m"}) for cell in cells[:3]
    ]
    driven(tmp_path / "l", local)
    texts = [path.read_text() for path in (tmp_path / "l" / "cells").iterdir()]
    assert len(texts) == 3 and not any(str(tmp_path) in text for text in texts)
    rows = read([tmp_path / "l"])
    assert {row.model for row in rows} == {row.model_args["pretrained"] for row in rows} == {"m"}


@pytest.mark.parametrize("kind", ["user", "memory", "device", "die", "nothing"])
def test_a_cell_that_fails_stops_no_other_and_says_why(tmp_path: Path, cells: list[Cell], kind: str) -> None:
    bad = cells[3].address
    outcome = driven(tmp_path / "l", cells, {kind: [bad]})
    assert outcome == Outcome(done=len(cells) - 1, failed=1)
    ledger = Ledger.of(tmp_path / "l")
    (failure,) = ledger.failures().values()
    expected = {"die": "died", "nothing": "error"}.get(kind, kind)
    assert (failure.address, failure.kind) == (bad, expected)
    said = {"die": "status 9", "nothing": "no results"}.get(kind, f"no {kind} <b>here</b>")
    assert said in failure.why and failure.told == cells[3].told()
    assert kind != "die" or f"running {bad}" in failure.why  # the last words of the process
    # What may have been another's fault is tried in a new process; what was asked for wrongly is not.
    assert tries(tmp_path).count(bad) == failure.tries == (2 if kind in ("device", "die") else 1)
    assert "1 failed" in status(ledger) and said in status(ledger)
    # The next sweep tries it again, and nothing else.
    assert driven(tmp_path / "l", cells) == Outcome(done=len(cells)) and not ledger.failures()
    assert len(tries(tmp_path)) == len(cells) + failure.tries


@pytest.mark.parametrize("kind", ["device", "die"])
def test_what_goes_wrong_once_is_done_in_a_new_process(tmp_path: Path, cells: list[Cell], kind: str) -> None:
    bad = [cells[at].address for at in (0, 3, 4, 9)]
    outcome = driven(tmp_path / "l", cells, {kind: bad, "once": [kind]})
    assert outcome == Outcome(done=len(cells)) and not Ledger.of(tmp_path / "l").failures()
    assert sorted(tries(tmp_path)) == sorted([*bad, *(cell.address for cell in cells)])


def test_what_tasks_print_is_no_answer(tmp_path: Path, cells: list[Cell]) -> None:
    assert driven(tmp_path / "l", cells, {"garbage": ["*"]}).done == len(cells)


def test_a_model_is_loaded_once_in_a_process(tmp_path: Path, cells: list[Cell]) -> None:
    """One slot runs all of one model before the other; two slots take one each."""
    driven(tmp_path / "l", cells, slots=1)
    model = {cell.address: cell.model for cell in cells}
    assert [name for name, _ in itertools.groupby(model[address] for address in tries(tmp_path))] == [
        "org/small-0.5B", "org/medium-1.5B",
    ]  # fmt: skip


def test_records_that_were_spoilt_are_put_aside_and_made_again(tmp_path: Path, cells: list[Cell]) -> None:
    driven(tmp_path / "l", cells)
    before = table(tmp_path / "l")
    ways = (lambda b: b[:-9], lambda b: b.replace(b"0.5", b"0.6"), lambda b: b"", lambda b: b"{}")
    for cell, spoil in zip(cells[3:], ways, strict=False):
        path = Ledger.of(tmp_path / "l").path(cell.address)
        whole = path.read_bytes()
        assert (spoilt := spoil(whole)) != whole
        path.write_bytes(spoilt)
        with pytest.raises(UserError, match="not as a sweep has written it"):
            files.read(path)
    outcome = driven(tmp_path / "l", cells)
    assert outcome.done == len(cells)
    assert sorted(tries(tmp_path)) == sorted(cell.address for cell in [*cells, *cells[3:7]])
    assert table(tmp_path / "l") == before and len(list((tmp_path / "l" / "broken").iterdir())) == 4


def test_a_record_of_another_cell_is_not_taken_for_one(tmp_path: Path, cells: list[Cell]) -> None:
    driven(tmp_path / "l", cells)
    ledger = Ledger.of(tmp_path / "l")
    ledger.path(cells[0].address).write_bytes(ledger.path(cells[1].address).read_bytes())
    assert not ledger.is_done(cells[0].address) and ledger.is_done(cells[1].address)


def test_more_documents_go_on_from_the_answers_so_far(tmp_path: Path, cells: list[Cell]) -> None:
    ledger = Ledger.make(tmp_path / "l", "small")
    more = [Cell(**{**cell.as_json(), "limit": 40}) for cell in cells]
    assert [ledger.work(cell) for cell in cells] == [ledger.work(cell) for cell in more]
    assert not {cell.address for cell in cells} & {cell.address for cell in more}


def test_a_ledger_is_of_one_grid(tmp_path: Path, cells: list[Cell]) -> None:
    driven(tmp_path / "l", cells[:1])
    with pytest.raises(UserError, match="is the ledger of the grid small, and this one is called large"):
        Ledger.make(tmp_path / "l", "large")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="is no ledger of a sweep, and not empty"):
        Ledger.make(tmp_path / "other", "small")
    with pytest.raises(UserError, match="is no ledger of a sweep"):
        Ledger.of(tmp_path / "other")
    head = tmp_path / "l" / "ledger.json"
    head.write_text(json.dumps({"schema": 2, "name": "small"}))
    with pytest.raises(UserError, match="a ledger of schema 2, and this version reads up to 1; upgrade"):
        Ledger.of(tmp_path / "l")
    for text in ("{", "[]", "{}", '{"schema": "x", "name": "small"}'):
        head.write_text(text)
        with pytest.raises(UserError):
            Ledger.of(tmp_path / "l")


def test_two_sweeps_on_one_ledger_are_refused_and_shards_are_not(tmp_path: Path) -> None:
    ledger = Ledger.make(tmp_path / "l", "small")
    with ledger.shard(1, 2), ledger.shard(2, 2):
        for number, of in ((1, 2), (2, 2), (1, 1), (1, 3)):
            with (
                pytest.raises(UserError, match=rf"another sweep \(shard ./2\) is at work here: process {os.getpid()}"),
                ledger.shard(number, of),
            ):
                pass
    with ledger.shard(1, 1):
        pass


def test_what_a_killed_process_was_writing_is_gone_with_the_next_sweep(tmp_path: Path) -> None:
    ledger = Ledger.make(tmp_path / "l", "small")
    torn, old, kept = (tmp_path / "l" / "cells" / name for name in (".lm-eval-sparse-a", ".lm-eval-sparse-b", "mine"))
    for path in (torn, old, kept):
        path.write_text("half")
    os.utime(old, (0, 0))
    with ledger.shard(1, 2):  # another shard may be writing the one that is new
        assert torn.exists() and not old.exists() and kept.exists()
    with ledger.shard(1, 1):
        assert not torn.exists() and kept.exists()


def test_a_cell_is_claimed_by_one_process(tmp_path: Path, cells: list[Cell]) -> None:
    ledger = Ledger.make(tmp_path / "l", "small")
    with ledger.claim(cells[0].address) as mine, ledger.claim(cells[0].address) as again:
        assert mine and not again
    outcomes: list[Outcome] = []

    def run() -> None:
        outcomes.append(driven(tmp_path / "l", cells, {"slow": ["*"]}, slots=1))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(tries(tmp_path)) == sorted(cell.address for cell in cells), "each ran once, though two were at it"
    assert len(read([tmp_path / "l"])) == 2 * len(cells)


def test_a_disk_that_is_full_ends_the_sweep_and_loses_nothing(
    tmp_path: Path, cells: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    driven(tmp_path / "l", cells[:4])
    before = table(tmp_path / "l")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_whole", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); make room"):
            driven(tmp_path / "l", cells)
    assert table(tmp_path / "l") == before
    assert driven(tmp_path / "l", cells).done == len(cells)


DRIVER = """
import json, sys
from pathlib import Path
sys.path[:0] = {paths}
import sweeping
from lm_eval_sparse.sweep import grid
from lm_eval_sparse.sweep.ledger import Ledger
folder = Path({folder!r})
with Ledger.make(folder / "l", "small").shard(1, 1):
    sweeping.driven(folder / "l", list(grid.read(folder / "g.yaml").cells), {{"slow": ["*"]}})
"""


def killed(tmp_path: Path, rng: random.Random, victims: Sequence[str], moments: int) -> int:
    """Run the grid in a process of its own, and kill it or its workers at random moments, until it is through."""
    code = DRIVER.format(paths=[str(HERE), str(HERE.parent)], folder=str(tmp_path))
    kills = 0
    while True:
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        try:
            while process.poll() is None and kills < moments:
                time.sleep(rng.uniform(0.2, 1.5))
                victim = rng.choice(victims)
                children = subprocess.run(
                    ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
                ).stdout.split()
                if victim == "worker" and children:
                    os.kill(int(rng.choice(children)), signal.SIGKILL)
                    kills += 1
                elif victim == "driver" and process.poll() is None:
                    process.kill()
                    kills += 1
                    process.wait()
                    for child in children:  # which end by themselves
                        until = time.monotonic() + 5
                        while Path(f"/proc/{child}").exists() and time.monotonic() < until:
                            time.sleep(0.05)
                        assert not Path(f"/proc/{child}").exists(), "a worker outlives its sweep"
            if process.wait(120) == 0:
                return kills
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def through(tmp_path: Path, cells: list[Cell], victims: Sequence[str], moments: int) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    undisturbed = tmp_path / "undisturbed"
    driven(undisturbed, cells)
    (tmp_path / "tries").write_text("")
    assert killed(tmp_path, random.Random(seed), victims, moments) == moments
    # A cell whose process was killed twice in one sweep is given up by it, and tried again by the next one.
    failures = Ledger.of(tmp_path / "l").failures().values()
    assert all((failure.kind, failure.tries) == ("died", 2) for failure in failures)
    assert len(failures) <= moments // 2
    if failures:
        driven(tmp_path / "l", cells)
    assert table(tmp_path / "l") == table(undisturbed)
    assert Ledger.of(tmp_path / "l").addresses() == {cell.address for cell in cells}
    assert not list((tmp_path / "l" / "cells").glob(".*")), "half a file"
    assert len(tries(tmp_path)) <= len(cells) + 2 * moments


def test_killed_workers_and_drivers_leave_every_cell_once(tmp_path: Path, cells: list[Cell]) -> None:
    through(tmp_path, cells, ("driver", "worker"), 3)


@pytest.mark.kills
def test_kill_9_at_20_random_moments(tmp_path: Path, cells: list[Cell]) -> None:
    through(tmp_path, cells, ("driver", "driver", "worker"), 20)
