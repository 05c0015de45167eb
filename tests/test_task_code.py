"""Code and files of a task's author that end the process, print, plant modules or break readers: never a success."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_cases import DRAFT, NAME, cache, command, folder, one_line, tokenizers  # noqa: F401 (fixtures)

from lm_eval_sparse import errors, output
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.frontier import apart, document, elsewhere, show, yamls

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------------------------- a process of its own

#: Name -> what the work does, as code with `progress`, and what `apart.run` must say of it.
WORKS = {
    "a status": ("return 3", ["status", 3]),
    "success": ("return 0", ["status", 0]),
    "_exit": ("progress.note('here'); os._exit(0)", ["ended", "with exit status 0", "here"]),
    "_exit with a status": ("os._exit(5)", ["ended", "with exit status 5", None]),
    "a crash": ("os.kill(os.getpid(), signal.SIGSEGV)", ["ended", "by the signal SIGSEGV", None]),
    "sys.exit": ("sys.exit(0)", ["bug", "SystemExit: 0"]),
    "GeneratorExit": ("raise GeneratorExit", ["bug", "GeneratorExit: GeneratorExit"]),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", ["bug", "KeyboardInterrupt: KeyboardInterrupt"]),
    "Ctrl-C": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", ["interrupted"]),
    "a mistake": ("raise UserError('no')", ["error", "no"]),
    "a thread": ("threading.Thread(target=time.sleep, args=(60,)).start(); return 0", ["status", 0]),
    "a split": ("os.fork(); return 0", ["status", 0]),
    "a split that stays": ("os.fork() or time.sleep(2); return 0", ["status", 0]),
    "no stdout": ("sys.stdout = None; progress.say('said'); return 0", ["status", 0]),
    "prints": ("print('printed'); os.system('echo echoed'); progress.say('said'); return 0", ["status", 0]),
    "closed": ("sys.stdout.close(); os.close(1); progress.say('said'); return 0", ["status", 0]),
}

SCRIPT = """
import json, os, signal, sys, tempfile, threading, time
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.frontier import apart
assert "torch" not in sys.modules
found = {{}}
for name, code in json.loads({works!r}).items():
    exec("def work(progress):\\n    " + code)
    try:
        found[name] = ["status", apart.run(work)]
    except apart.Ended as error:
        found[name] = ["ended", str(error), error.last]
    except UserError as error:
        found[name] = ["error", str(error)]
    except RuntimeError as error:
        found[name] = ["bug", str(error)]
    except KeyboardInterrupt:
        found[name] = ["interrupted"]
open({out!r}, "w").write(json.dumps(found))
"""


def python(code: str, folder: Path, **options: object) -> subprocess.CompletedProcess[str]:  # noqa: F811
    (folder / "temporary").mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "temporary")}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be split here")
def test_whatever_ends_the_process_is_told(tmp_path):
    works = json.dumps({name: code for name, (code, _) in WORKS.items()})
    begun = time.monotonic()
    done = python(SCRIPT.format(works=works, out=str(tmp_path / "out.json")), tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    for name, (_, expected) in WORKS.items():
        assert found[name][0] == expected[0], (name, found[name])
        assert found[name][2:] == expected[2:], name
        assert str(expected[1:2] and expected[1]) in str(found[name][1:2] and found[name][1]), (name, found[name])
    assert done.stdout.splitlines() == ["said"] * 3  # and nothing that the code printed
    assert "printed" in done.stderr and "echoed" in done.stderr
    assert time.monotonic() - begun < 50 and not list((tmp_path / "temporary").iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be split here")
@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_ends_the_child_and_leaves_nothing(tmp_path, name, status):
    code = f"""
import os, signal, sys, threading, time
from lm_eval_sparse.frontier import apart
parent = os.getpid()
def work(progress):
    open("child", "w").write(str(os.getpid()))
    open(os.environ["TMPDIR"] + "/left", "w").write("x")
    os.kill(parent, signal.{name})
    time.sleep(60)
try:
    apart.run(work)
except KeyboardInterrupt:
    sys.exit(130)
"""
    begun = time.monotonic()
    assert python(code, tmp_path).returncode == status
    assert time.monotonic() - begun < 30 and not list((tmp_path / "temporary").iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)


# ----------------------------------------------------------------------------------------------------------- check-task

SCORE = "found = first_answer"
#: Name -> (before, after) in the recipe's file, the check that fails, and what it says.
ENDS = {
    "at import": ("class Draft:", "raise SystemExit(0)\n\n\nclass Draft:", "classes", "SystemExit: 0 at "),
    "in draft": (DRAFT, DRAFT + "        __import__('sys').exit(0)\n", "documents", "SystemExit: 0 at "),
    "interrupts": (DRAFT, DRAFT + "        raise KeyboardInterrupt\n", "documents", "KeyboardInterrupt: at "),
    "in a score": (SCORE, "raise GeneratorExit\n        " + SCORE, "metrics", "GeneratorExit: at "),
    "in evidence": ("return [_LINE", "raise SystemExit\n        return [_LINE", "evidence", "SystemExit"),
    "mute": (
        SCORE,
        "raise type('Mute', (BaseException,), {'__str__': lambda self: 1 / 0})()\n        " + SCORE,
        "metrics",
        "Mute: without a message that can be read at ",
    ),
    "a terminal's codes": (SCORE, "raise ValueError(chr(27) + '[2J')\n        " + SCORE, "metrics", "\\x1b[2J at "),
}  # fmt: skip


def edit(folder: Path, before: str, after: str) -> None:  # noqa: F811
    text = (folder / f"{NAME}.py").read_text()
    assert text.count(before) == 1
    (folder / f"{NAME}.py").write_text(text.replace(before, after))


@pytest.mark.parametrize("case", ENDS)
def test_task_code_that_wants_to_end_the_process_has_failed(case, folder, command, tokenizers):  # noqa: F811
    before, after, check, told = ENDS[case]
    edit(folder, before, after)
    status, out, err = command(
        "check-task", folder, "--tokenizer", tokenizers("bpe"), "--lengths", "4k", "--samples", 2
    )
    (line,) = (line for line in out.splitlines() if line.startswith(f"FAIL  {check} "))
    assert status == 1 and told in line and err == ""
    assert out.splitlines()[-1].endswith(" FAILED") and "\x1b" not in out


def test_what_task_code_prints_is_no_part_of_the_report(folder, command, tokenizers):  # noqa: F811
    edit(folder, "class Draft:", "print('printed ' * 100_000)\n\n\nclass Draft:")
    argv = ["check-task", folder, "--tokenizer", tokenizers("bpe"), "--lengths", "4k", "--samples", 2]
    status, out, _ = command(*argv)
    assert status == 0 and "printed" not in out and out.endswith("checks, all ok\n")


def test_show_says_so_too(folder, command, tokenizers):  # noqa: F811
    edit(folder, DRAFT, DRAFT + "        raise SystemExit(0)\n")
    argv = ["show", f"frontier_{NAME}_4k", "--index", 0, "--include_path", folder, "--tokenizer", tokenizers("bpe")]
    status, out, err = command(*argv)
    assert (status, out) == (1, "") and f"cannot be shown: SystemExit: 0 at {folder}" in one_line(err)


@pytest.mark.slow
def test_a_process_that_task_code_ends_with_success(folder, tokenizers, tmp_path):  # noqa: F811
    edit(folder, DRAFT, DRAFT + "        __import__('os')._exit(0)\n")
    argv = ["check-task", str(folder), "--tokenizer", tokenizers("bpe"), "--lengths", "4k", "--samples", "2"]
    done = python(f"import sys; from lm_eval_sparse.cli.app import main; sys.exit(main({argv!r}))", tmp_path)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "7 checks, 1 FAILED"
    assert "FAIL  documents            the task's code ended the process with exit status 0" in done.stdout


def job(folder: Path) -> dict:  # noqa: F811
    recipe = {"recipe": f"!function {NAME}.ParcelSearch"}
    return {"folder": str(folder), "recipe": recipe, "metadata": {}, "length": 4096, "indexes": [0, 1]}


def test_modules_in_the_working_folder_do_not_run_in_the_other_process(folder, tmp_path, monkeypatch):  # noqa: F811
    for name in ("json", "random", "hashlib", "pip", "sitecustomize", "lm_eval_sparse"):
        (tmp_path / f"{name}.py").write_text("open('planted', 'w')\nraise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    for given in (None, "", os.pathsep, f"{os.pathsep}/no/such"):
        monkeypatch.delenv("PYTHONPATH", raising=False) if given is None else monkeypatch.setenv("PYTHONPATH", given)
        if given is not None or "PYTHONPATH" not in os.environ:
            assert elsewhere.run(job(folder), "1") == elsewhere.digests(job(folder))
        monkeypatch.setenv("PYTHONPATH", "")
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize(
    "code, told",
    [
        ("import os; os._exit(0)", "it ended with exit status 0"),
        ("raise SystemExit(0)", "it ended with exit status 0"),
        ("raise RuntimeError('no lockers')", "RuntimeError: no lockers"),
    ],
)
def test_the_other_process_that_ends_early(folder, code, told):  # noqa: F811
    (folder / f"{NAME}.py").write_text(code)
    with pytest.raises(elsewhere.Failed, match=told):
        elsewhere.run(job(folder), "1")


# ----------------------------------------------------------------------------------------------------------- YAML files

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
#: Content of a.yaml -> what is said of it.
YAMLS = {
    "[" * 100_000: "cannot be read as YAML",
    "- " * 100_000: "cannot be read as YAML",
    "a: " + "[" * 200 + "]" * 200: "nested more than 50 levels deep",
    LAUGHS: "once its aliases are written out",
    "a: &a [*a]": "nested more than",
    "a: &a {b: *a, c: *a}": "nested more than",
    "a: !!python/object:os.system {}": "could not determine a constructor",
    "a: !!python/object/apply:os.system [exit]": "could not determine a constructor",
    "a: !!bool maybe": "cannot be read as YAML: 'maybe'",
    "a: !!int x": "invalid literal",
    "a: 2024-13-45": "month must be",
    "a: " + "9" * 5000: "Exceeds the limit",
    "? [b]\n: c": "unhashable",
    "a:\n\tb: 1": "cannot start any token",
    "a: \0": "not allowed",
    "a: !function {b: c}": "expected a scalar node",
    "- a": "must hold a mapping",
    "": "must hold a mapping, such as `task: frontier_name_4k`, but holds None",
    "include: [1]": "includes 1, which is no file's name",
    "include: {a: b}": 'includes {"a": "b"}, which is no file',
    "include: ''": "includes , which is no file's name",
    "include: a.yaml": "is included twice, or includes itself",
    "include: [b, b]": "is included twice",
    "include: ../../nowhere": "cannot be read",
    "include: \"a\\0b\"": "cannot be read",
    "include: pipe": "is no regular file",
    "include: /dev/zero": "is no regular file",
    "include: .": "is a folder",
    "include: " + "x" * 300: "cannot be read",
}  # fmt: skip


@pytest.mark.parametrize("content", YAMLS, ids=range(len(YAMLS)))
def test_yaml_that_would_break_a_reader(tmp_path, content):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "b").write_text("x: 1")
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        yamls.leaf_files(tmp_path)
    said = str(caught.value)
    assert YAMLS[content] in said and (str(tmp_path) in said or "/dev" in said) and "\n" not in said and len(said) < 700


def test_files_called_yaml_that_are_none(tmp_path):
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)):
        make(tmp_path / "a.yaml")
        with pytest.raises(UserError, match=r"a\.yaml (cannot be read|is no regular file|is a folder)"):
            yamls.leaf_files(tmp_path)
        (tmp_path / "a.yaml").rmdir() if (tmp_path / "a.yaml").is_dir() else (tmp_path / "a.yaml").unlink()
    (tmp_path / "a.yaml").write_bytes(b"a: \xff")
    with pytest.raises(UserError, match="utf-8"):
        yamls.leaf_files(tmp_path)
    with (tmp_path / "a.yaml").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(UserError, match="8,589,934,592 bytes"):
        yamls.leaf_files(tmp_path)


def test_aliases_that_end_are_kept(tmp_path):
    (tmp_path / "b").write_text("x: 1\ny: 2\n")
    (tmp_path / "a.yaml").write_text("include: b\ntask: t\ny: &y [1, 2]\nz: *y\nf: !function m.f\n")
    expected = {"x": 1, "task": "t", "y": [1, 2], "z": [1, 2], "f": "!function m.f"}
    assert yamls.leaf_files(tmp_path) == {"t": (tmp_path / "a.yaml", expected)}


# ----------------------------------------------------------------------------------------------------- what is printed


def test_show_writes_control_characters_out(tokenizers):  # noqa: F811
    from types import SimpleNamespace as Some

    evil = "one \x1b]0;owned\x07 two\x1b[2J\r\x9b3m \u202e end\ttab\nline"
    doc = {"index": 0, "target": f"gold {evil}", "input": evil}
    recipe = Some(evidence=lambda doc: ["two\x1b[2J"], chance=lambda doc: {})
    task = Some(
        config=Some(task="frontier_x_4k", metadata={}), samples=1, eval_docs=[doc], forced=False, seed=0, length=9,
        question_first=True, recipe=recipe, instances=[Some(doc=doc, args=(evil, {}))],
        build_all_requests=lambda **kwargs: None,
    )  # fmt: skip
    reader = show.Reader.of(tokenizers("bytes"), {}, False)
    found = show.read(task, 0, reader)
    for full in (True, False):
        plain, coloured = (document.terminal(found, 100, colour=colour, full=full) for colour in (False, True))
        assert plain.rpartition("-\n")[2] == errors.plain(evil) and evil.count("\n") == 1
        assert all(c.isprintable() or c in "\n\t" for c in plain)
        assert coloured.count("\x1b") == 2 and "\x1b[1;33mtwo\\x1b[2J\x1b[0m" in coloured
        assert coloured.replace("\x1b[1;33m", "").replace("\x1b[0m", "") == plain
        page = document.markdown(found, 100, full=full)
        assert all(c.isprintable() or c in "\n\t" for c in page) and errors.plain(evil) in page


def test_a_reader_who_has_seen_enough(tmp_path):
    receive, send = os.pipe()
    os.close(receive)
    with os.fdopen(send, "w") as stream:
        output.say("one", stream)
        output.say("two", stream)  # and no complaint when it is closed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_without_room_for_what_is_printed():
    with Path("/dev/full").open("w") as stream, pytest.raises(UserError, match="No space left"):
        output.say("one", stream)


def test_characters_that_a_terminal_lacks_are_written_out():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    output.say("a ⏎ \ud800", stream)
    assert stream.buffer.getvalue() == b"a \\u23ce \\ud800\n"
    closed = io.StringIO()
    closed.close()
    with pytest.raises(UserError, match="closed"):
        output.say("a", closed)


def test_in_a_process_with_threads_it_runs_here(capsys):
    assert apart.run(lambda progress: progress.say("said") or 4) == 4 and capsys.readouterr().out == "said\n"
