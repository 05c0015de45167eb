"""A folder is filled whole or not at all, and holds nothing of anybody else that could be lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lm_eval_sparse.analysis import folder
from lm_eval_sparse.errors import UserError


def fill(place: Path, **files: str) -> None:
    with folder.filled("--output out", folder.checked("--output out", str(place))) as fresh:
        for name, text in files.items():
            (fresh / name).mkdir()
            (fresh / name / "file").write_text(text)


def holds(place: Path) -> dict[str, str]:
    return {str(path.relative_to(place)): path.read_text() for path in place.rglob("file")}


def test_what_an_analysis_left_is_replaced_whole(tmp_path: Path) -> None:
    place = tmp_path / "new" / "out"
    fill(place, a="1", b="2")
    fill(place, b="3")
    assert holds(place) == {"b/file": "3"}  # what an earlier one had besides is not left to mislead
    assert sorted(os.listdir(place.parent)) == ["out"]


@pytest.mark.parametrize("where", ["notes.txt", "figures/mine.png", "a/other"])
def test_files_of_others_are_never_lost(tmp_path: Path, where: str) -> None:
    fill(tmp_path, a="1")
    mine = tmp_path / where
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=rf"^--output out: .* holds {where}, which no analysis has written; give a new"):
        fill(tmp_path, a="2")
    assert mine.read_text() == "mine" and holds(tmp_path) == {"a/file": "1"}


def test_a_file_that_comes_meanwhile_stays(tmp_path: Path) -> None:
    place = tmp_path / "out"
    fill(place, a="1")
    with pytest.raises(UserError, match="holds late now"), folder.filled("--output out", place) as fresh:
        (fresh / "file").write_text("2")
        (place / "late").write_text("mine")
    assert (place / "late").read_text() == "mine" and holds(place) == {"a/file": "1"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UserError("no"), KeyboardInterrupt()])
def test_what_fails_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    place = tmp_path / "out"
    fill(place, a="1")
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError
    with pytest.raises(expected) as said, folder.filled("--output out", place) as fresh:
        (fresh / "half").write_text("2")
        raise error
    if isinstance(error, OSError):
        assert str(said.value) == "--output out cannot be written (No space left on device); give another folder"
    assert holds(place) == {"a/file": "1"} and os.listdir(tmp_path) == ["out"]


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        folder.checked("--output x", str(tmp_path / "x"))
    with pytest.raises(UserError, match="is a file"):
        folder.checked("--output x/y", str(tmp_path / "x" / "y"))
