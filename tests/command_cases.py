"""A draft of a task and the commands that read it: `new-task`, `show`, `check-task`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from frontier_common import tokenizer

from lm_eval_sparse import protocol
from lm_eval_sparse.cli import app as cli

NAME = "parcel_search"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(protocol, "_active", None)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> Callable[[str], str]:
    root = tmp_path_factory.mktemp("tokenizers")

    def saved(kind: str) -> str:
        if not (root / kind).exists():
            tokenizer(kind).save_pretrained(root / kind)
        return str(root / kind)

    return saved


@pytest.fixture
def command(capsys):
    """Runs a command line; returns exit status, stdout and stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def folder(tmp_path, command) -> Path:
    assert command("new-task", NAME, "--folder", tmp_path)[0] == 0
    return tmp_path / NAME


def one_line(error: str) -> str:
    (line,) = error.splitlines()
    assert line.startswith("lm-eval-sparse: error: ")
    return line


DRAFT = "self._random = random_source\n"
