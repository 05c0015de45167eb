"""Sweeps over a stub that makes results up, for tests."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lm_eval_sparse.results.load import read
from lm_eval_sparse.sweep import grid
from lm_eval_sparse.sweep.cell import Cell
from lm_eval_sparse.sweep.drive import Driver, Outcome, Slot
from lm_eval_sparse.sweep.ledger import Ledger

HERE = Path(__file__).parent
STUB = (sys.executable, str(HERE / "stub_worker.py"))
TEXT = """\
name: small
models: [org/small-0.5B, org/medium-1.5B]
tasks: [forced_frontier_niah, forced_frontier_toefl]
lengths: [4k]
sparsities: [.5, .9]
limit: 20
methods: [quest, vertical_slash]
"""


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    path = tmp_path / "g.yaml"
    path.write_text(TEXT)
    return list(grid.read(path).cells)


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_TRIES", str(tmp_path / "tries"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))
    (tmp_path / "tries").touch()


def driven(folder: Path, cells: Sequence[Cell], stub: Mapping[str, Any] | None = None, slots: int = 2) -> Outcome:
    ledger = Ledger.make(folder, "small")
    ledger.add(cells)
    places = [Slot(f"cpu{at}", {"STUB": json.dumps(stub or {})}) for at in range(slots)]
    return Driver(ledger, places, command=STUB).run(cells)


def tries(tmp_path: Path) -> list[str]:
    return (tmp_path / "tries").read_text().split()


def table(folder: Path) -> set[tuple[Any, ...]]:
    """All that the records of a ledger say, but for times."""
    idle = {"date", "source", "seconds", "seconds_by_phase", "speed"}
    return {json.dumps(row.model_dump(mode="json", exclude=idle), sort_keys=True) for row in read([folder])}
