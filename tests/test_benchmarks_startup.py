"""The benchmark of start-up: its arithmetic and its table, without starting anything."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
startup = importlib.import_module("startup")


def test_parts_exclude_what_runs_inside_them_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setenv(startup.STARTED, "99.5")
    monkeypatch.setattr(startup, "BORN", 100.0)
    monkeypatch.setattr(startup.time, "time", lambda: now[0])

    class Model:
        def load(self) -> str:
            now[0] += 3
            return self.read()

        def read(self) -> str:
            now[0] += 4
            return "read"

    parts = startup.Parts()
    parts.time(Model, "load", "model, the rest")
    parts.time(Model, "read", "weights")
    now[0] += 1
    assert Model().load() == "read"
    now[0] += 2
    parts.switch()
    assert parts.seconds == {"python": 0.5, "the rest": 3.0, "model, the rest": 3.0, "weights": 4.0}
    assert sum(parts.seconds.values()) == now[0] - 99.5


def run(scale: float, *kernels: tuple[str, bool]) -> dict:
    seconds = {"python": 0.1 * scale, "import torch": 2 * scale, "find tasks": 1 * scale, "first prefill": 0.5 * scale}
    found = [{"kernel": name, "found": on_disk, "seconds": 0.25} for name, on_disk in kernels]
    return {"seconds": seconds, "total": sum(seconds.values()), "kernels": found, "versions": {"transformers": "5"}}


def test_rows_and_table() -> None:
    cold = run(10, ("attend", False), ("append", False))
    row = startup.summed(cold, [run(1, ("attend", True), ("append", False)), run(3, ("attend", True)), run(2)])
    assert row["parts"]["import torch"] == [2, 4] and row["parts"]["weights"] == [0, 0]
    assert row["total"] == pytest.approx([3.6, 7.2]) and row["beyond_imports"] == pytest.approx([1.5, 3.0])
    assert [len(one["compiled"]) for one in row["kernels"]] == [2, 1, 0, 0]
    assert [one["found"] for one in row["kernels"]] == [0, 1, 1, 0] and row["kernels"][1]["seconds"] == 0.5
    content = {
        "device": "a card", "versions": {"torch": "2"}, "model": "m", "dtype": "bfloat16", "times": 3, "whole": False,
        "kinds": {"sparse, scored": row}, "ls": {"with": {"least": 1.0, "median": 2.0}},
    }  # fmt: skip
    table = importlib.import_module("prefill").table
    text = startup.markdown(content, table)
    assert "| import torch | 4.00 (20.00) |" in text and "| **all** | **7.20** (36.00) |" in text
    assert "| beyond the first 4 | **3.00** |" in text and "| sparse, scored | 2 | 0 | 0 | none |" in text
    assert "| with | 1.00 | 2.00 |" in text and "a card, torch 2; m, bfloat16" in text
    assert set(startup.IMPORTS) < set(startup.PARTS)
