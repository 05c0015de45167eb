"""`new-method` writes a method that works, `check-method` says of each check how it went."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lm_eval_sparse.cli import app
from lm_eval_sparse.testing import conformance, scaffold

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command line in an empty folder; returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*argv: object) -> tuple[int, str, str]:
        status = app.main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def refused(done: tuple[int, str, str]) -> str:
    status, printed, said = done
    (line,) = said.splitlines()
    assert status == 1 and printed == "" and line.startswith("lm-eval-sparse: error: ")
    return line


# --- new-method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", scaffold.PHASES)
def test_a_new_method_works_as_it_is_written(phase: str, command: Command, tmp_path: Path) -> None:
    status, said, _ = command("new-method", "mean_keys", *(() if phase == "eviction" else ("--phase", phase)))
    assert status == 0 and {path.name for path in tmp_path.iterdir()} == {"mean_keys.py", "test_mean_keys.py"}
    (line,) = re.findall(r"^ +lm-eval-sparse (check-method .*)$", said, re.MULTILINE)
    assert line == "check-method ./mean_keys.py:MeanKeys" and f"of the {phase} phase" in said
    status, said, _ = command(*line.split(), "--json")
    found = json.loads(said)
    assert status == 0 and found["passed"] and found["phase"] == phase and found["method"] == "mean_keys"
    assert [one["check"] for one in found["checks"]] == [name for name in conformance.CHECKS if name != "every"]
    # Its own tests: all checks, and a literal version of what it chooses.
    spec = importlib.util.spec_from_file_location("own_tests", tmp_path / "test_mean_keys.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    for _ in range(3):
        module.test_it_chooses_what_it_should()
    (mark,) = module.test_it_holds_what_every_method_promises.pytestmark
    assert len(mark.args[1]) == len(found["checks"])
    module.test_it_holds_what_every_method_promises("taxonomy")


@pytest.mark.parametrize("phase", scaffold.PHASES)
def test_its_tests_find_what_is_changed(phase: str, command: Command, tmp_path: Path) -> None:
    command("new-method", "mean_keys", "--phase", phase)
    path = tmp_path / "mean_keys.py"
    old, new = {"eviction": ("-call.key", "call.key"), "prefill": ("return query @", "return -query @"),
                "decode": ("mean.float())\n", "-mean.float())\n")}[phase]  # fmt: skip
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    spec = importlib.util.spec_from_file_location("own_tests", tmp_path / "test_mean_keys.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    with pytest.raises(AssertionError):
        module.test_it_chooses_what_it_should()


@pytest.mark.parametrize("phase", scaffold.PHASES)
def test_what_is_written_is_formatted(phase: str) -> None:
    import subprocess

    for text in scaffold.texts("mean_keys", phase).values():
        assert "@" not in re.sub(r"@(dataclass|pytest)| @ ", "", text) and max(map(len, text.splitlines())) <= 120
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--select", "E,F,I,UP,B", "--line-length", "120", "-"],
            input=text, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("Bad-Name",), "lower-case words"),
        (("x" * 41,), "at most 40 characters"),
        (("class",), "no word of Python"),
        (("",), "lower-case words"),
        (("../own",), "lower-case words"),
        (("quest",), "there is a method of this name; names that are taken: dense, "),
        (("sparsity",), "the name of a model argument"),
        (("gamma",), "the name of a model argument"),
        (("mean_keys", "--phase", "later"), "--phase later given; phases are eviction, prefill, decode"),
        (("mean_keys", "--out", "nowhere"), "--out nowhere is no folder; type: mkdir -p nowhere"),
        (("mean_keys", "--out", "file"), "--out file is no folder"),
        (("mean_keys", "--out", ""), "--out  is empty"),
        (("taken",), "taken.py exists already, and nothing is overwritten"),
        (("tested",), "test_tested.py exists already, and nothing is overwritten"),
    ],
)
def test_what_cannot_be_written(argv: tuple[str, ...], words: str, command: Command, tmp_path: Path) -> None:
    for name in ("file", "taken.py", "test_tested.py"):
        (tmp_path / name).write_text("mine")
    assert words in refused(command("new-method", *argv))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("file", "taken.py", "test_tested.py"), "mine"
    )


# --- check-method -----------------------------------------------------------------------------------------------------


def test_one_line_a_check_and_a_status(command: Command, tmp_path: Path) -> None:
    command("new-method", "own")
    path = tmp_path / "own.py"
    status, said, _ = command("check-method", "own.py:Own", "--only", "promise", "--only", "gqa")
    lines = said.splitlines()
    assert status == 0 and lines[-1] == "own: all 2 checks passed"
    assert lines[0].startswith("pass  promise       0.50") and lines[1].startswith("pass  gqa           1:1, 4:2")
    path.write_text(
        path.read_text().replace("return -call.key.float()", "return -call.key.repeat(1, 1, 1).double() * 0\n        ")
    )
    path.write_text(path.read_text().replace(".norm(dim=-1)  # call.key", "  # call.key"))
    status, said, _ = command("check-method", "own.py:Own", "--only", "promise", "--only", "taxonomy")
    lines = said.splitlines()
    assert status == 1 and lines[-1] == "own: 1 of 2 checks failed: promise"
    assert lines[0].startswith("FAIL  promise       ValueError: score returned (2, 4097, 16); expected (2, 4097)")
    status, said, _ = command("check-method", "own.py:Own", "--only", "promise", "--json")
    found = json.loads(said)
    assert status == 1 and not found["passed"] and found["checks"][0]["says"].startswith("ValueError: score returned")


def test_built_in_methods_can_be_checked(command: Command) -> None:
    for typed in ("quest", "method=quest"):
        status, said, _ = command("check-method", typed, "--only", "causality")
        assert status == 0 and "new tokens read the same one by one" in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("quset",), "did you mean 'quest'"),
        (("dense",), "'dense' selects nothing"),
        (("quest+snapkv",), "type one method"),
        (("quest:",), "a name is missing beside a colon"),
        (("./own.py:Own",), "own.py does not exist"),
        (("",), "is unknown"),
        (("quest", "--only", "promises"), "check 'promises' is unknown; did you mean 'promise'"),
        (("quest", "--only", "every"), "for eviction methods with a knob `every`, which quest lacks"),
    ],
)
def test_what_cannot_be_checked(argv: tuple[str, ...], words: str, command: Command) -> None:
    assert words in refused(command("check-method", *argv))
