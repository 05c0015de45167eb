"""Where results cannot be saved is found before a model is built, and looking leaves nothing behind."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval import evaluator
from lm_eval.loggers import EvaluationTracker

from lm_eval_sparse import patches
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.model import embedded
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.paths import check_writable

patches.install()

FOLDER = embedded.NAME.replace("/", "__")


class Built(Exception):
    """The model would have been built next."""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Starts an evaluation as lm-eval's command line does; raises what it refuses, or `Built`."""

    def built(*args: Any, **kwargs: Any) -> None:
        raise Built

    monkeypatch.setattr(SparseHFLM, "__init__", built)
    monkeypatch.chdir(tmp_path)

    def run(output: str | None, **options: Any) -> None:
        tracker = options.pop("tracker", None) or EvaluationTracker(output_path=output)
        evaluator.simple_evaluate(
            "sparse-hf", model_args="method=dense", tasks=["any"], evaluation_tracker=tracker, **options
        )

    return run


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


#: What is asked for in a folder with a file and links -> what the complaint must say.
REFUSED: dict[str, tuple[str, ...]] = {
    "file": ("/file is a file", "give a folder"),
    "file/deep/er": ("/file is a file",),
    "file/scores.json": ("/file is a file",),
    "taken": (f"/taken/{FOLDER} is a file",),
    "dangling": ("/dangling is a link that leads nowhere",),
    "dangling/out": ("/dangling is a link that leads nowhere",),
    "loop": ("/loop is a link that leads nowhere",),
    "/proc/nowhere": ("/proc cannot be written (it takes no files)",),
    "/proc/self/task/out.json": ("cannot be written",),
    "x" * 300: ("has 300 bytes, 255 are allowed", "shorter"),
    "a/" + "ö" * 200: ("has 400 bytes, 255 are allowed",),
    "x" * 240 + ".json": ("has 272 bytes, 255 are allowed",),
    "abcdefgh/" * 500: ("bytes, 4096 are allowed",),
}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
@pytest.mark.parametrize("output", REFUSED, ids=lambda output: output[:20])
def test_refused(output: str, start: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / FOLDER).write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = tree(tmp_path)
    with pytest.raises(UserError) as refusal:
        start(output)
    said = str(refusal.value)
    assert said.startswith("--output_path ") and "\n" not in said and len(said) < 500
    for words in REFUSED[output]:
        assert words in said
    assert tree(tmp_path) == before


@pytest.mark.parametrize("output", ["out", "deep/er/out", "scores.json", "deep/scores.json", "there", ".", "link/out"])
def test_what_can_be_written_is_not_touched(output: str, start: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "there" / FOLDER).mkdir(parents=True)
    (tmp_path / "there" / FOLDER / "results_1.json").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    before = tree(tmp_path)
    with pytest.raises(Built):
        start(output)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("place", ["folder", "file"])
def test_no_permission_read_only_or_full(
    number: int, place: str, start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, who passes all permissions: the system's answer is made up."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    owner, name = (tempfile, "mkdtemp") if place == "folder" else (Path, "write_bytes")
    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written .{os.strerror(number)}.; give another folder"):
        start("out/here")
    assert tree(tmp_path) == {}


def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    """The same by a process that is not root."""
    if os.getuid() != 0:
        pytest.skip("needs root to become somebody else")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o055)
    child = os.fork()
    if child == 0:
        status = 2
        try:
            os.setuid(65534)
            check_writable("--output_path closed", closed / "out", ["a"])
        except UserError as error:
            status = 0 if "Permission denied" in str(error) else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_output_path_and_other_models(start: Callable[..., None], tmp_path: Path) -> None:
    """Nothing to save is nothing to check; other model types keep lm-eval's behaviour."""
    with pytest.raises(Built):
        start(None)
    (tmp_path / "file").write_text("")
    tracker = EvaluationTracker(output_path=str(tmp_path / "file" / "out"))
    with pytest.raises(Exception) as caught:
        evaluator.simple_evaluate("hf", model_args="pretrained=./no", tasks=["any"], evaluation_tracker=tracker)
    assert not isinstance(caught.value, UserError)


def test_only_the_process_that_saves_looks(start: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Built):
        start("/proc/nowhere")


@pytest.mark.parametrize(
    "cache, words", [("file/answers", "/file is a file"), ("/proc/answers", "/proc cannot be written")]
)
def test_response_cache(cache: str, words: str, start: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--use_cache {cache}: .*{words}"):
        start("out", use_cache=cache)
    assert sorted(tree(tmp_path)) == ["file"]
    with pytest.raises(Built):
        start("out", use_cache="deep/answers")
    assert sorted(tree(tmp_path)) == ["file"]


def test_no_task(start: Callable[..., None]) -> None:
    with pytest.raises(UserError, match="no task was given: type --tasks"):
        evaluator.simple_evaluate("sparse-hf", tasks=[])


def test_a_home_folder_that_the_shell_left_alone(
    start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    tracker = EvaluationTracker(output_path="~/out")
    with pytest.raises(Built):
        start(None, tracker=tracker)
    assert tracker.output_path == str(tmp_path / "home" / "out")
    for output in ("~nosuchuser/out", "o\0ut", "o" * 300):
        with pytest.raises(UserError, match="^--output_path "):
            start(output)
    assert not list(tmp_path.glob("~*"))
