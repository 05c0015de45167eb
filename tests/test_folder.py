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


def test_a_link_to_a_folder_stays_and_its_target_is_filled(tmp_path: Path) -> None:
    target, link = tmp_path / "disk" / "real", tmp_path / "link"
    target.mkdir(parents=True)
    link.symlink_to(target)
    fill(link, a="1", b="2")
    fill(link, b="3")
    assert link.is_symlink() and os.readlink(link) == str(target)
    assert not target.is_symlink() and holds(target) == {"b/file": "3"} == holds(link)
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"] and os.listdir(target.parent) == ["real"]
    # What others have there is as safe as without a link, and what fails leaves what was there.
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes.txt, which no analysis has written"):
        fill(link, a="4")
    (target / "notes.txt").unlink()
    with pytest.raises(UserError), folder.filled("--output out", link) as fresh:
        (fresh / "half").write_text("2")
        raise OSError(28, "No space left on device")
    assert link.is_symlink() and holds(target) == {"b/file": "3"} and os.listdir(target.parent) == ["real"]


def test_a_link_on_the_way_is_followed_to_where_nothing_is_yet(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    fill(tmp_path / "link" / "out", a="1")
    assert holds(tmp_path / "disk" / "out") == {"a/file": "1"} and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("leads", ["nowhere", "link"])
def test_a_link_that_leads_nowhere_is_one_line(tmp_path: Path, leads: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / leads)
    with pytest.raises(UserError, match=r"^--output link: .*link is a link that leads nowhere; give another folder$"):
        folder.checked("--output link", str(tmp_path / "link"))
    assert os.listdir(tmp_path) == ["link"]
