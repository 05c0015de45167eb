"""A run that is stopped ends in one line that says what is kept and how to go on, and with the usual exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from lm_eval_sparse import endings, patches
from lm_eval_sparse.cli import app as cli
from lm_eval_sparse.cli.parser import Command
from lm_eval_sparse.model.lm import SparseHFLM

patches.install()

SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: r"terminated (SIGTERM)"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("llama", "tasks"):
        (tmp_path / name).mkdir()
    tiny.tiny_llama(tmp_path / "llama")
    tiny.write_tasks(tmp_path / "tasks", lengths=(40,))
    return tmp_path


@pytest.fixture(autouse=True)
def _handlers() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before
    endings.keep(None)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("cache", [False, True])
def test_a_stopped_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, cache: bool
) -> None:
    from lm_eval.tasks import TaskManager

    original = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, *a, **k: original(self, *a, **{**k, "include_defaults": False})
    )
    monkeypatch.setattr(SparseHFLM, "loglikelihood", lambda *args, **kwargs: os.kill(os.getpid(), number))
    command = ["run", "--model", "sparse-hf", "--model_args", "pretrained=llama/", "--tasks", "tiny_choice",
               "--include_path", "tasks", "--output_path", "out"]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, *(["--use_cache", "answers"] if cache else [])])
    assert ended.value.code == 128 + number
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lm-eval-sparse")]
    assert len(said) == 1 and said[0].startswith(f"lm-eval-sparse: error: {SIGNALS[number]}: no results were saved; ")
    assert str(folder / "cache") in said[0]
    assert "kept below out (resume_log)" in said[0] and ("answers_rank*.db (--use_cache)" in said[0]) is cache
    assert not (folder / "out").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stopped_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int) -> None:
    stop = Command("stop", "", lambda argv: os.kill(os.getpid(), number))
    monkeypatch.setitem(cli.COMMANDS, "stop", stop)
    assert cli.main(["stop"]) == 128 + number
    assert capsys.readouterr().err == (
        f"lm-eval-sparse: error: {SIGNALS[number]}: nothing was written; type the same line to start again\n"
    )


def test_a_process_that_handles_signals_itself_keeps_its_handler() -> None:
    mine = lambda number, frame: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    try:
        with endings.sigterm_raises():
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_child_that_is_terminated_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with endings.sigterm_raises():
        ready, there = os.pipe()  # a signal during the fork itself is lost
        child = os.fork()
        if child == 0:
            try:
                os.write(there, b".")
                for _ in range(600):
                    time.sleep(0.05)
            finally:
                os.write(2, b"it went on")
                os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert capfd.readouterr().err == ""


SCRIPT = """
import os, sys
from lm_eval.tasks import TaskManager
original = TaskManager.__init__
TaskManager.__init__ = lambda self, *a, **k: original(self, *a, **{**k, "include_defaults": False})
from lm_eval_sparse.model.lm import SparseHFLM
SparseHFLM.loglikelihood = lambda *a, **k: os.kill(os.getpid(), 15)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def test_plain_lm_eval_that_is_terminated(folder: Path) -> None:
    command = ["--model", "sparse-hf", "--model_args", "pretrained=llama/", "--tasks", "tiny_choice",
               "--include_path", "tasks"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", SCRIPT, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 143, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("lm-eval-sparse: error: terminated (SIGTERM): no results were saved")
