"""The command `lm-eval-sparse`: which sub-command goes where, and one line for a mistake."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lm_eval_sparse import __version__
from lm_eval_sparse.cli import app as cli
from lm_eval_sparse.cli import harness
from lm_eval_sparse.cli.parser import Command


@pytest.fixture
def passed_on(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The argument lists that reached lm-eval, in whose place a recorder stands."""
    main = pytest.importorskip("lm_eval.__main__")
    calls: list[list[str]] = []
    monkeypatch.setattr(main, "cli_evaluate", lambda: calls.append(sys.argv))
    monkeypatch.setattr("lm_eval_sparse.patches.install", lambda: calls.append(["hook"]))
    return calls


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_shows_both_groups(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    for name in [*cli.COMMANDS, *harness.COMMANDS, "--version"]:
        assert f"\n  {name}" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"lm-eval-sparse {__version__} (lm_eval ")


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["run", "--tasks", "a"], ["run", "--tasks", "a"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        (["validate", "--tasks", "a"], ["validate", "--tasks", "a"]),
        (["run"], ["run"]),
        (["--model", "sparse-hf", "--tasks", "a"], ["run", "--model", "sparse-hf", "--tasks", "a"]),
        (["--config=a.yaml"], ["run", "--config=a.yaml"]),
    ],
)
def test_lm_eval_commands_are_passed_on(passed_on: list[list[str]], argv: list[str], expected: list[str]) -> None:
    before = list(sys.argv)
    assert cli.main(argv) == 0
    assert passed_on == [["hook"], ["lm-eval-sparse", *expected]]
    assert sys.argv == before


def test_unknown_command_is_one_line(passed_on: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["metods"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "lm-eval-sparse: error: unknown command 'metods'; commands are methods, sweep, analyze, recommend, "
    )
    assert "did you mean 'methods' or " in line
    assert passed_on == [["hook"]]


def test_without_lm_eval_one_line_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Absent:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "lm_eval":
                raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")

    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    assert cli.main(["ls", "tasks"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'lm_eval[hf]" in line


@pytest.mark.parametrize("columns, width", [("80", 80), ("400", 100), ("7", 60)])
def test_methods_fit_the_terminal(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval_sparse.methods import METHODS

    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width and "|" not in shown and "\x1b" not in shown
    paragraphs = {text.split(" ")[0]: " ".join(text.split()) for text in shown.split("\n\n")}
    for name, method in METHODS.items():
        assert f"{name} ({'any phase' if method.phase == 'any' else method.phase}) " in paragraphs[name]
        assert method.reference in paragraphs[name] and method.kv in paragraphs[name]
        assert all(f" {knob}={default} " in paragraphs[name] for knob, default in method.knobs().items())


def test_documented_table_of_methods_is_the_generated_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "--markdown"]) == 0
    page = (Path(__file__).resolve().parent.parent / "docs" / "methods.md").read_text()
    assert (table := capsys.readouterr().out) in page and "| `flexprefill` |" in table


@pytest.mark.parametrize("status, expected", [(None, 0), (0, 0), (3, 3)])
def test_a_command_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, status: int | None, expected: int) -> None:
    seen: list[list[str]] = []

    def run(argv: list[str]) -> int | None:
        seen.append(argv)
        return status

    monkeypatch.setitem(cli.COMMANDS, "plot", Command("plot", "", run))
    assert cli.main(["plot", "results", "--output", "a.png"]) == expected
    assert seen == [["results", "--output", "a.png"]]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_file_and_a_help_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = cli.COMMANDS[name]
    assert command.run.__module__ == f"lm_eval_sparse.cli.{name.replace('-', '_')}" and command.usage.startswith(name)
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    shown = capsys.readouterr()
    assert ended.value.code == 0 and shown.out.startswith(f"usage: lm-eval-sparse {name} ") and shown.err == ""


@pytest.mark.parametrize(
    "line, meant",
    [
        ("plot results --output a.png --tsk niah", "--task"),
        ("show frontier_niah_4k --index 0 --apply_chat_tmplate", "--apply_chat_template"),
        ("check-task niah --sample=3", "--samples"),  # a beginning of an option is none
        ("analyze results --output out --tol .1", "--tolerance"),
        ("analyze results --outpu out", "--output"),  # though --output is missing, too
        ("recommend results --leng 4k", "--length"),
        ("check-task niah --smples=3", "--samples"),
        ("methods --markdwn", "--markdown"),
        ("new-task words --fodler here", "--folder"),
        ("methods --qqq", None),
    ],
)
def test_a_misspelt_option_is_told_the_nearest(
    line: str, meant: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval_sparse.frontier.check.run", lambda *_, **__: 0)
    status = cli.main(line.split())
    said = capsys.readouterr().err
    if meant is None:
        assert "did you mean" not in said
    else:
        assert status == 1 and f"; did you mean {meant!r}?; type 'lm-eval-sparse {line.split()[0]} --help'" in said


#: A sub-command of ours without what it needs, or with what it does not know -> what the complaint must name.
INCOMPLETE = {
    "analyze": "RESULTS, --output",
    "analyze results": "--output",
    "analyze results --output out --colour red": "--colour red",
    "analyze results --output out --test t": "--test: invalid choice: 't'",
    "recommend": "RESULTS",
    "recommend results --by price": "--by: invalid choice: 'price'",
    "plot": "RESULTS, --output",
    "plot results": "--output",
    "plot results --output": "--output: expected one argument",
    "plot results --output a.png --colour red": "--colour red",
    "heat": "RESULTS",
    "heat results --output": "--output: expected one argument",
    "heat results --colour red": "--colour red",
    "show": "TASK, --index",
    "show frontier_niah_4k": "--index",
    "show frontier_niah_4k --index 0 --colour red": "--colour red",
    "sweep": "GRID",
    "sweep grid.yaml --colour red": "--colour red",
    "sweep grid.yaml --ledger": "--ledger: expected one argument",
    "check-task": "PATH",
    "check-task folder --colour red": "--colour red",
    "check-method": "METHOD",
    "check-method quest --colour red": "--colour red",
    "new-method": "NAME",
    "new-method name --colour red": "--colour red",
    "new-task": "NAME",
    "new-task name --colour red": "--colour red",
    "methods all": "all",
}


def test_every_command_of_ours_is_among_them() -> None:
    assert {line.split()[0] for line in INCOMPLETE} == set(cli.COMMANDS)


@pytest.mark.parametrize("line", INCOMPLETE)
def test_what_is_missing_or_unknown_is_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 1
    printed = capsys.readouterr()
    (said,) = printed.err.splitlines()
    assert printed.out == ""
    assert said.startswith("lm-eval-sparse: error: ")
    assert INCOMPLETE[line] in said and f"type 'lm-eval-sparse {line.split()[0]} --help'" in said


@pytest.mark.parametrize(
    "line, words",
    [
        ("run --model sparse-hf --tasks nowhere --log_samples", "Specify --output_path"),
        ("run --model sparse-hf --tasks nowhere", "Tasks not found: nowhere"),
        ("run --model sparse-hf --tasks nowhere --fewshot_as_multiturn True", "apply_chat_template"),
    ],
)
def test_settings_that_lm_eval_refuses_are_one_line(
    line: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval raises a ValueError that nothing catches."""
    tasks = pytest.importorskip("lm_eval.tasks")
    known = tasks.TaskManager.__init__
    monkeypatch.setattr(
        tasks.TaskManager, "__init__", lambda self, *a, **k: known(self, *a, **{**k, "include_defaults": False})
    )
    assert cli.main(line.split()) == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    (said,) = (text for text in shown.splitlines() if text.startswith("lm-eval-sparse: error: "))
    assert words in said


@pytest.mark.parametrize("output, words", [("folder.png", "is a folder"), ("file/a.png", "file is a file")])
def test_a_picture_that_cannot_be_written(
    output: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    assert cli.main(["plot", "results", "--output", output]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert f"--output {output}" in said and words in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
