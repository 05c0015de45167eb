"""The heat map and the table of `lm-eval-sparse heat`, and the files that it refuses."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from diagnose_cases import SNAP
from small_lms import score, sparse

from lm_eval_sparse.analysis import heat
from lm_eval_sparse.cli import app
from lm_eval_sparse.results import diagnostics


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """A result file as far as it is read."""
    lm = sparse(tiny.family("gemma2"), method="snapkv+quest", **SNAP, budget=8, page_size=8, diagnose=1)
    score(lm, [(tiny.words(5, 97), " unusual zebra")])
    return {"results": {}, "model_name": "tiny $x$", "config": {"model": "sparse-hf", "sparse": lm.report()}}


def written(folder: Path, content: Any) -> str:
    path = folder / "results_1.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_a_picture_and_a_table(content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, content)
    assert app.main(["heat", str(tmp_path), "--output", str(tmp_path / "heat.png")]) == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "model" and [row.split()[2:4] for row in rows] == [
        ["snapkv", "eviction"], ["quest", "decode"]
    ]  # fmt: skip
    mean = content["config"]["sparse"]["phases"]["decode"]["diagnostics"]["mean"]
    assert (
        f"{mean['mass_kept']:.4f}" in rows[1]
        and f"{mean['output_error']:.4f}" in rows[1]
        and "(layer 1, head" in rows[1]
    )
    assert last.startswith("wrote ") and (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_a_torn_file_does_not_hide_the_others(
    content: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, content)
    (tmp_path / "results_2.json").write_text("{")
    assert app.main(["heat", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3 and "results_2.json: not JSON" in caplog.text
    assert app.main(["heat", str(tmp_path / "results_2.json"), str(tmp_path)]) == 1


def test_cells_are_layers_and_heads(content: dict[str, Any]) -> None:
    """A panel shows the numbers of its figure, a row for each layer, also where there are none."""
    (eviction, decode) = diagnostics.diagnosed(content, "here")
    mass = [[0.1, 0.2], [0.3, None], [0.5, 0.6]]
    figures = {"mass_kept": mass, "output_error": [[0.1, 3.0]] * 3, "oracle_overlap": [[None] * 2] * 3}
    many = replace(decode, layers=[3, 4, 7], figures=figures)
    from matplotlib.figure import Figure

    figure = Figure()
    axis, bar = figure.subplots(1, 2)
    heat._panel(figure, axis, bar, many, "mass_kept", "mass kept")
    (image,) = axis.images
    assert image.get_array().tolist() == mass and image.get_clim() == (0, 1)
    assert [text.get_text() for text in axis.get_yticklabels()] == ["3", "4", "7"]
    assert axis.get_title(loc="left") == "mass kept (mean 0.340)"
    assert heat.draw([eviction, many]).startswith(b"\x89PNG")


def bent(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy in which one part is another."""
    found = copy.deepcopy(content)
    part = found
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return found


BLOCK = ("config", "sparse", "phases", "decode", "diagnostics")
DAMAGED = {
    "no list": ((*BLOCK, "layers"), 3, "layers is 3, a JSON list is expected"),
    "no layer": ((*BLOCK, "layers"), [], "a list of layers, each with figures of its heads is expected"),
    "text": ((*BLOCK, "layers", 0, "mass_kept", 1), "a", "layers[0].mass_kept[1] is 'a', a number of at least 0"),
    "too much": ((*BLOCK, "layers", 0, "mass_kept", 1), 1.5, "mass_kept[1] is 1.5, a number from 0 to 1"),
    "ragged": ((*BLOCK, "layers", 0, "oracle_overlap"), [0.5], "each with figures of its heads is expected"),
    "negative": ((*BLOCK, "samples"), -1, "samples is -1, a whole number of at least 0"),
    "not diagnosed": (BLOCK[:2], {"method": "quest", "phases": {}}, "nothing was diagnosed in these runs"),
    "not ours": (("config",), {"model": "hf"}, "nothing was diagnosed in these runs"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_files_of_another_shape_end_in_one_line(
    name: str, content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, value, words = DAMAGED[name]
    file = written(tmp_path, bent(content, path, value))
    assert app.main(["heat", file, "--output", str(tmp_path / "heat.png")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said and not (tmp_path / "heat.png").exists()


@pytest.mark.parametrize(
    ("output", "words"),
    [("heat.pdf", "give a name that ends in .png"), ("results_1.json", "ends in .png"), ("no/", "ends in .png")],
)
def test_outputs_that_cannot_be(
    output: str, words: str, content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, content)
    assert app.main(["heat", file, "--output", str(tmp_path / output)]) == 1
    assert words in (said := capsys.readouterr().err) and said.count("\n") == 1
