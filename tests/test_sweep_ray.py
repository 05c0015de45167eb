"""A sweep on a real Ray cluster of two nodes: every cell once, whoever is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweeping import HERE, STUB, TEXT, driven, surroundings, table, tries

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.sweep import grid, on_ray
from lm_eval_sparse.sweep.ledger import Ledger

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
__all__ = ["surroundings"]  # a fixture of every test here


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without places and two nodes with two each, for all tests: the last one kills a node."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.setenv("RAY_health_check_failure_threshold", "3")
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        found.nodes = [found.add_node(num_cpus=2) for _ in range(2)]
        yield found
        ray.shutdown()
        found.shutdown()


DRIVER = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths}
import sweeping
from lm_eval_sparse.sweep import grid, on_ray
from lm_eval_sparse.sweep.ledger import Ledger
folder = Path({folder!r})
cells = list(grid.read(folder / "g.yaml").cells)
ledger = Ledger.make(folder / "l", "small")
with ledger.shard(1, 1):
    ledger.add(cells)
    left = [cell for cell in cells if not ledger.is_done(cell.address)]
    stub = {{"STUB": '{{"slow": ["*"]}}', "STUB_TRIES": str(folder / "tries")}}
    print(on_ray.run(ledger, left, {address!r}, command=sweeping.STUB, environment=stub))
"""


def started(tmp_path: Path, address: str) -> subprocess.Popen[str]:
    code = DRIVER.format(paths=[str(HERE), str(HERE.parent)], folder=str(tmp_path), address=address)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def recorded(tmp_path: Path) -> int:
    folder = tmp_path / "l" / "cells"
    return len(list(folder.glob("cell_*.json"))) if folder.is_dir() else 0


def until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def workers(tmp_path: Path) -> list[int]:
    """The workers of this test. Others of the same name may run beside it."""
    found, mine = [], f"STUB_TRIES={tmp_path / 'tries'}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            is_worker = str(HERE / "stub_worker.py").encode() in (place / "cmdline").read_bytes().split(b"\0")
            if is_worker and mine in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
    return found


def test_a_node_that_does_not_see_the_ledger_is_said(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g.yaml").write_text(TEXT)
    cells = list(grid.read(tmp_path / "g.yaml").cells)
    ledger = Ledger.make(tmp_path / "l", "small")
    ledger.add(cells)
    monkeypatch.setattr(on_ray, "_mark", lambda folder: {"another": "ledger"})
    with pytest.raises(
        UserError, match="a node of the cluster, does not see the ledger .*; give a folder that all nodes"
    ):
        on_ray.run(ledger, cells, cluster.address, command=STUB)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "x", "127.0.0.1:99999999"])
def test_an_address_that_does_not_answer_is_one_line(tmp_path: Path, address: str) -> None:
    ledger = Ledger.make(tmp_path / "l", "small")
    begin = time.monotonic()
    with pytest.raises(UserError, match="no Ray cluster answers there"):
        on_ray.run(ledger, [], address)
    assert time.monotonic() - begin < 30


def test_a_node_a_worker_and_the_driver_are_killed_and_every_cell_is_there_once(tmp_path: Path, cluster: Any) -> None:
    (tmp_path / "g.yaml").write_text(TEXT.replace("[.5, .9]", "[.5, .8, .9, .95]").replace("[4k]", "[4k, 16k]"))
    cells = list(grid.read(tmp_path / "g.yaml").cells)
    driven(tmp_path / "undisturbed", cells, slots=1)
    (tmp_path / "tries").write_text("")

    first = started(tmp_path, cluster.address)
    until(lambda: recorded(tmp_path) >= 4)
    os.kill(workers(tmp_path)[0], signal.SIGKILL)  # a worker
    until(lambda: recorded(tmp_path) >= 10)
    cluster.remove_node(cluster.nodes[0], allow_graceful=False)  # a node, with all that runs there
    until(lambda: recorded(tmp_path) >= 18)
    first.kill()  # the driver
    first.wait()
    until(lambda: not workers(tmp_path), 30)
    there = recorded(tmp_path)
    assert 18 <= there < len(cells)

    cluster.add_node(num_cpus=2)
    second = started(tmp_path, cluster.address)
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0 and said.strip() == "0"
    assert table(tmp_path / "l") == table(tmp_path / "undisturbed")
    ledger = Ledger.of(tmp_path / "l")
    assert ledger.addresses() == {cell.address for cell in cells} and not ledger.failures()
    # Only what was under way when something was killed ran again.
    assert len(tries(tmp_path)) <= len(cells) + 1 + 2 + 4
