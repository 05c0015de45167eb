"""Result files to records, tables and pictures."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from result_files import result, save, size

from lm_eval_sparse.analysis import curve, picture
from lm_eval_sparse.cli import plot
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.results.figures import figures_table
from lm_eval_sparse.results.load import find, load
from lm_eval_sparse.results.records import records


def test_records_hold_what_was_measured() -> None:
    (row,) = records(result("niah", 0.25, 0.8999))
    assert (row.model, row.method, row.task, row.metric) == ("org/model", "flexprefill", "niah", "exact")
    assert (row.score, row.stderr, row.n, row.requested, row.measured) == (0.25, 0.1, 20, 0.9, 0.8999)
    assert row.higher_is_better and row.seconds == 12.5


def test_a_row_without_a_measurement_is_not_called_dense() -> None:
    content = result("niah", 0.25, 0.8999)
    content["results"]["forced_frontier"] = {"exact,none": 0.9, "sample_len": 20}
    assert {row.task for row in records(content)} == {"niah"}


def test_other_model_types_are_dense() -> None:
    (row,) = records(result("niah", 0.25, None))
    assert (row.method, row.measured) == ("dense", 0.0)


def test_models_are_kept_apart() -> None:
    rows = [row for model in ("a", "b") for s in (0.0, 0.9) for row in records(result("niah", 0.5, s, model))]
    header, *body = curve.table(rows)
    assert header[:3] == ["model", "task", "method"] and [line[0] for line in body] == ["a", "a", "b", "b"]
    three = [*rows, *records(result("niah", 0.5, 0.9, "c"))]
    widths = [size(picture.draw(some)[0])[0] for some in (rows[:2], rows, three)]
    assert widths[1] - widths[0] == widths[2] - widths[1] > 300  # a panel for each model


def test_phases_of_a_combination() -> None:
    content = result("niah", 0.25, 0.8)
    content["config"]["sparse"] |= {"method": "flexprefill+snapkv", "requested_sparsity": None}
    phases = content["config"]["sparse"]["tasks"]["niah"]
    phases["prefill"] |= {"method": "flexprefill", "requested_sparsity": 0.8}
    phases["eviction"] = {"method": "snapkv", "requested_sparsity": 0.5, "executed_sparsity": 0.52}
    phases["decode"] = {"method": "dense", "executed_sparsity": 0.51}
    (row,) = records(content)
    assert row.phases == "prefill+eviction" and row.method == "flexprefill+snapkv"
    assert (row.requested, row.measured) == pytest.approx((0.65, 0.66))
    lines = figures_table(content).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    assert cells[0][:6] == ["Task", "Phase", "Method", "requested", "selected", "executed"]
    assert [line[:6] for line in cells[1:]] == [
        ["niah", "prefill", "flexprefill", "0.8000", "-", "0.8000"],
        ["niah", "eviction", "snapkv", "0.5000", "-", "0.5200"],
    ]
    assert figures_table(result("niah", 0.25, 0.0)) == ""  # nothing but dense phases


def test_picture_and_page_are_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sparsity in (0.0, 0.5, 0.9):
        save(tmp_path / "runs" / str(sparsity), "x", result("niah", 1 - sparsity, sparsity))
    image, page = tmp_path / "out" / "curve.png", tmp_path / "out" / "curve.html"
    plot.run([str(tmp_path / "runs"), "--output", str(image), "--output", str(page)])
    assert image.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "0.9000" in text and "data:image/png;base64," in text and "http" not in text
    assert sorted(path.name for path in image.parent.iterdir()) == ["curve.html", "curve.png"]
    assert "wrote" in capsys.readouterr().out


def test_names_beside_lines_do_not_overlap() -> None:
    for _ in range(300):
        wanted = [random.choice([0.0, 1.0, random.random()]) for _ in range(random.randint(1, 9))]
        gap = random.choice([0.05, 0.1, 0.3])
        places = picture.spread(wanted, gap)
        gap = min(gap, 1 / max(len(wanted) - 1, 1))
        ordered = sorted(zip(places, wanted, strict=True))
        assert all(b[0] - a[0] > gap - 1e-9 and b[1] >= a[1] for a, b in zip(ordered, ordered[1:], strict=False))
        assert ordered[0][0] >= -1e-9 and ordered[-1][0] <= 1 + 1e-9
        apart = sorted(wanted)
        if all(b - a >= gap for a, b in zip(apart, apart[1:], strict=False)):
            assert places == pytest.approx(wanted)  # nothing moves without need
    assert picture.spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])


def test_styles_and_titles(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for s in (0.0, 0.9) for row in records(result("niah", 0.5, s))]
    ((key, members),) = picture.panels(rows).items()
    assert picture._common_title([(key, members)]) == "niah, model, 20 documents a point"
    assert picture._common_title([(key, members), (("other", *key[1:]), members)]) is None
    seen: list[dict[Any, dict[str, str]]] = []
    monkeypatch.setattr(picture, "_picture", lambda found, styles: seen.append(styles) or b"")
    picture.draw([rows[1].model_copy(update={"method": f"m{n}"}) for n in range(picture.MOST_METHODS)])
    assert len({tuple(style.values()) for style in seen[0].values()}) == picture.MOST_METHODS == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "--output", "x.png"], "no such file"),
        ([".", "--output", "x.png"], "no results_"),
        (["good", "--output", "x.pdf"], "give a name that ends in .png or .html"),
        (["good", "--output", "x.png", "--task", "vt"], "hold niah"),
        (["broken", "--output", "x.png"], "not JSON"),
        (["foreign", "--output", "x.png"], "not a result file of lm-eval"),
    ],
)
def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if arguments[0] != ".":
        save(tmp_path / "good", "x", result("niah", 0.5, 0.5))
        save(tmp_path / "broken", "x", "{")
        save(tmp_path / "foreign", "x", {"a": 1})
    with pytest.raises(UserError, match=message):
        plot.run(arguments)
    assert not list(tmp_path.glob("x.*"))


def test_find_takes_files_and_folders(tmp_path: Path) -> None:
    one = save(tmp_path / "a", "1", result("niah", 0.5, 0.5))
    two = save(tmp_path / "b" / "c", "2", result("niah", 0.5, 0.5))
    assert find([one, tmp_path / "b"]) == [one, two]
    assert load(one)["model_name"] == "org/model"
