"""The command `sweep`, over a stub that makes results up: what it prints, what it refuses, what docs say to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from sweeping import STUB, surroundings, tries

from lm_eval_sparse.cli import sweep_checks
from lm_eval_sparse.cli.app import main
from lm_eval_sparse.model import embedded
from lm_eval_sparse.sweep import worker
from lm_eval_sparse.sweep.ledger import Ledger

__all__ = ["surroundings"]
DOCS = Path(__file__).parents[1] / "docs"
TEXT = f"""\
name: small
models: [{embedded.NAME}]
tasks: [forced_frontier_niah, forced_frontier_cwe]
lengths: [4k]
sparsities: [.5, .9]
limit: 60
methods: [quest, vertical_slash]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, surroundings: None) -> Path:
    """A folder to work in, with a grid file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "COMMAND", STUB)
    monkeypatch.setattr(sweep_checks, "devices", dict)
    (tmp_path / "g.yaml").write_text(TEXT)
    return tmp_path


def run(*arguments: str) -> int:
    return main(["sweep", *arguments])


def test_a_grid_is_told_run_looked_at_and_analysed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("g.yaml", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "small: 10 cells; of these 10 here, 0 of them done" in said and not (place / "small").exists()
    assert said.count("forced_frontier_cwe_4k, 60 documents") == 5
    assert re.search(r"time: .* of one process \(0 as cells like them took, 10 by operations", said)
    assert re.search(rf"memory: {embedded.NAME} some [12]\.\d GiB\n", said)
    # (1 - x)^60 = .1, and .05 for one of two tasks; rounded up, as a promise is.
    alone, shared = (1 - level ** (1 / 60) for level in (0.1, 0.05))
    assert f"certify a loss of {alone:.3f} at best for a task alone, {shared:.3f} for one of 2 tasks" in said
    assert run("g.yaml") == 0
    said = capsys.readouterr().out
    assert "small: 10 of 10 cells done" in said and "lm-eval-sparse analyze small --output small-report" in said
    assert run("g.yaml", "--dry-run") == 0 and "10 of them done" in capsys.readouterr().out
    assert run("status", "small") == 0 and "10 of 10 cells done" in capsys.readouterr().out
    assert len(tries(place)) == 10
    pytest.importorskip("mapie")
    capsys.readouterr()
    assert main(["analyze", "small", "--output", "report", "--no-pictures"]) == 0
    assert ": 10 runs, 60 documents a task." in capsys.readouterr().out
    assert (place / "report" / "report.html").is_file()


def test_time_is_that_of_cells_like_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("g.yaml") == 0
    (place / "g.yaml").write_text(TEXT.replace(".5, .9", ".5, .8, .9"))
    capsys.readouterr()
    assert run("g.yaml", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "14 cells; of these 14 here, 10 of them done" in said and "(4 as cells like them took)" in said


def test_failures_are_told_and_end_in_status_1(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB", '{"memory": ["*"]}')
    assert run("g.yaml") == 1
    said = capsys.readouterr()
    assert "0 of 10 cells done, 10 failed" in said.out and "(and 9 more): no memory <b>here</b>" in said.out
    assert "failed: " in said.err
    monkeypatch.delenv("STUB")
    assert run("g.yaml") == 0 and "10 of 10 cells done\n" in capsys.readouterr().out


def test_the_shards_of_docs_cluster_run_every_cell_once(place: Path) -> None:
    """The commands of the page, with variables as SLURM and Kubernetes set them."""
    page = (DOCS / "cluster.md").read_text().replace("/shared/sweeps/", "").replace("/shared/", "")
    slurm = next(line.removeprefix("srun ") for line in page.splitlines() if line.startswith("srun "))
    kubernetes = re.search(r"args: \['(.*)'\]", page)[1]
    (place / "grid.yaml").write_text(TEXT.replace("name: small\n", ""))
    for number in (1, 2):
        line = slurm.replace("$SLURM_ARRAY_TASK_ID", str(number)).replace("$SLURM_ARRAY_TASK_COUNT", "2")
        assert main(shlex.split(line)[1:]) == 0
    assert len(tries(place)) == len(set(tries(place))) == 10
    for index in (0, 1):
        line = kubernetes.replace("$((JOB_COMPLETION_INDEX + 1))/16", f"{index + 1}/2")
        assert main(shlex.split(line)[1:]) == 0
    assert len(tries(place)) == 10, "all were done"
    for line in page.splitlines():
        if line.startswith("    lm-eval-sparse sweep status"):
            assert main(shlex.split(line)[1:]) == 0


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({}, ["h.yaml"], "h.yaml cannot be read"),
        ({}, ["g.yaml", "--shard", "3/2"], "--shard 3/2: I/N is expected"),
        ({}, ["g.yaml", "--shard", "0/2"], "--shard 0/2: I/N is expected"),
        ({}, ["g.yaml", "--processes", "0"], "--processes 0: a whole number"),
        ({}, ["g.yaml", "--gpus", "0"], "--gpus 0: '0' is no GPU of this machine: there are none here"),
        ({}, ["g.yaml", "--per-gpu", "x"], "--per-gpu x: a whole number"),
        ({}, ["g.yaml", "--ray", "127.0.0.1:1"], "--ray 127.0.0.1:1: no Ray cluster answers there"),
        ({}, ["g.yaml", "--ledger", "file"], "file"),
        ({}, ["g.yaml", "--dry"], "unrecognized arguments: --dry"),
        ({}, ["status", "."], "is no ledger of a sweep"),
        ({"quest": "quest_"}, ["g.yaml"], "line 1: methods: .*quest_.*did you mean 'quest'"),
        ({"niah": "nia"}, ["g.yaml"], "tasks: forced_frontier_nia_4k is unknown; did you mean"),
        ({embedded.NAME: "./nowhere"}, ["g.yaml"], "models: pretrained='.*/nowhere': there is no such folder"),
        (
            {"vertical_slash": "{method: quest, knobs: {page_sise: 3}}"},
            ["g.yaml"],
            "methods: page_sise: no such knob; did you mean 'page_size'",
        ),
        ({"vertical_slash": "{method: quest, kv_sparsity: [.5]}"}, ["g.yaml"], "methods: "),
        ({"[quest": "[x.py:Mine"}, ["g.yaml"], "x.py:Mine is a file whose code would run; type --allow-code"),
        ({"[quest": "[x.py:Mine"}, ["g.yaml", "--allow-code"], "methods: .*x.py"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], arguments: list[str], said: str
) -> None:
    (place / "file").touch()
    text = TEXT
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    (place / "g.yaml").write_text(text)
    assert run(*arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lm-eval-sparse: error: ") and re.search(said, error), error
    assert not (place / "small" / "cells").exists() or not list((place / "small" / "cells").iterdir())
    assert not tries(place)


def test_a_model_that_does_not_fit_is_refused_before_the_run(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_checks, "_free", lambda places: (1e9, "GPU 0", 2))
    assert run("g.yaml") == 1
    said = capsys.readouterr().err
    assert re.search(r"with prompts of 4k needs some [12]\.\d GiB, and GPU 0 has 1\.9 GiB free", said)
    assert not (place / "small").exists()
    assert run("g.yaml", "--dry-run") == 0
    assert "MORE than a process has on GPU 0 (0.9 GiB)" in capsys.readouterr().out


def test_another_sweep_and_another_grid_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger.make(place / "small", "small")
    with ledger.shard(1, 1):
        assert run("g.yaml") == 1 and "another sweep is at work here: process" in capsys.readouterr().err
    assert run("g.yaml") == 0
    capsys.readouterr()
    (place / "g.yaml").write_text(TEXT.replace("niah", "vt").replace("cwe", "toefl"))
    assert run("g.yaml") == 1
    assert "none of the 10 cells that are done in small is in this grid" in capsys.readouterr().err
    (place / "g.yaml").write_text(TEXT.replace("name: small", "name: other"))
    assert run("g.yaml", "--ledger", "small") == 1
    assert "is the ledger of the grid small, and this one is called other" in capsys.readouterr().err


def test_gpus_become_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_checks, "devices", lambda: {"0": 10, "3": 20})

    def given(*arguments: Any) -> list[tuple[str, str]]:
        return [(slot.name, slot.environment["CUDA_VISIBLE_DEVICES"]) for slot in sweep_checks.slots(*arguments)]

    assert given(None, None, 1) == [("gpu0", "0"), ("gpu3", "3")]
    assert given("3", None, 2) == [("gpu3-0", "3"), ("gpu3-1", "3")]
    assert given("none", "2", 1) == [("cpu0", ""), ("cpu1", "")]
    # Processes that share a device fill a part of it each, one alone finds out itself.
    assert [slot.arguments for slot in sweep_checks.slots("3", None, 2)] == [("--share-prefill", "2")] * 2
    assert sweep_checks.slots("3", None, 1)[0].arguments == ()
    assert all(slot.arguments[0] == "--share-prefill" for slot in sweep_checks.slots("none", "2", 1))
