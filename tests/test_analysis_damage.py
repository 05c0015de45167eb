"""Result files of any shape, names of any characters, outputs that cannot be: one line or a picture, no traceback."""

from __future__ import annotations

import copy
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from result_files import result, save, size

from lm_eval_sparse.analysis import curve, picture
from lm_eval_sparse.cli import plot
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.labels import label
from lm_eval_sparse.patches import evaluator
from lm_eval_sparse.results.figures import figures_table
from lm_eval_sparse.results.load import find, read
from lm_eval_sparse.results.records import records


def row(**given: Any) -> picture.Row:
    base = picture.Row("m", "t", "x", "a", "decode", 0.5, 0.1, 2, 0.5, 0.5, True)
    return replace(base, **given)


NAMES = {
    "formula": "$x_{",
    "formulas": "a$b$ \\frac{1}$",
    "backslash": "\\frac{\\nosuch",
    "underscore": "_private_",
    "lines": "a\nb\r\nc",
    "tab": "a\tb",
    "escape": "\x1b[31mred\x1b]0;title\x07",
    "null": "a\0b",
    "right to left": "a\u202eb שלום",
    "glyphs": "你好世界 🎉 ไทย",
    "surrogate": "a\ud800b",
    "long": "x" * 600,
    "wide": "W" * 600,
    "html": "</td><script>alert(1)</script>&amp;\"'",
    "percent": "%s %(a)s {0} {a}",
}


@pytest.mark.parametrize("what", NAMES)
def test_names_are_text(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    name = NAMES[what]
    content = result(name, 0.5, 0.9, name)
    content["config"]["sparse"]["method"] = name
    content["results"][name][f"{name.replace(',', '')},none"] = 0.5
    save(tmp_path, "x", content)
    save(tmp_path, "y", result(name, 0.7, 0.0, name))
    outputs = [str(tmp_path / "out" / f"a{suffix}") for suffix in curve.SUFFIXES]
    plot.run([str(tmp_path), "--output", outputs[0], "--output", outputs[1], "--task", name])
    page = Path(outputs[1]).read_bytes().decode()
    assert all(character.isprintable() or character == "\n" for character in page)
    assert "<script" not in page and page.count("<tr>") == 3
    assert Path(outputs[0]).read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.isascii()
    assert len(caplog.records) <= 2  # not one for each character that no font has; no dense run of one metric


def test_names_never_change_the_size_of_a_picture() -> None:
    """A name is drawn inside its panel: cut, and smaller where that is not enough."""
    sizes = {size(picture.draw(list(records(result(name, 0.5, 0.9, name))))[0]) for name in ("a", "W" * 9000)}
    assert len(sizes) == 1


def test_a_label_keeps_both_ends() -> None:
    assert label("a" * 50 + "end", 21) == "a" * 10 + "…" + "aaaaaaaend"
    assert label("short\n\x1b[1m") == r"short \x1b[1m"


def changed(path: str, value: Any) -> dict[str, Any]:
    """A result file in which the part at `path` is another one; `...` takes it away."""
    content = copy.deepcopy(result("t", 0.5, 0.9))
    if not path:
        return value
    *way, last = path.split("/")
    part = content
    for key in way:
        part = part[key]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return content


OBJECTS = ("results", "results/t", "config", "config/sparse", "config/sparse/tasks", "config/sparse/tasks/t")
SHARE = "config/sparse/tasks/t/prefill/executed_sparsity"
SHAPES = [
    *((path, value) for path in OBJECTS for value in ([], 5, "a", True)),
    *((path, None) for path in OBJECTS if path != "config/sparse"),  # None: another model type
    *((path, ...) for path in ("config", "config/sparse/tasks", "config/sparse/method")),
    ("config/sparse/tasks/t/prefill", None),
    ("config/sparse/tasks/t/prefill", [1]),
    *((SHARE, value) for value in ("a", -0.1, 1.5, True, [0.5], {}, float("nan"), float("inf"), 10**400)),
    *(("config/sparse/requested_sparsity", value) for value in ("0.9", [], -1, 2, True, float("nan"))),
    *(("config/sparse/method", value) for value in (5, "", None, ["a"])),
    *(("results/t/sample_len", value) for value in ("20", -1, 2.5, True, [], 1e300, 10**400, float("nan"))),
    *(("higher_is_better", value) for value in ([1], 5, "a")),
    *(("higher_is_better/t", value) for value in ([1], 5, "a")),
    *(("higher_is_better/t/exact", value) for value in ([1], 5, "a", {})),
    *(("total_evaluation_time_seconds", value) for value in ("a", [], -1, "nan", "inf", True)),
    *(("model_name", value) for value in (5, [], {}, True, " ")),
]


@pytest.mark.parametrize(("path", "value"), SHAPES, ids=lambda value: str(value)[:40])
def test_a_part_of_another_shape_is_named(path: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        list(records(changed(path, value), "r.json"))
    said = str(error.value)
    assert said.startswith(f"r.json: {path.replace('/', '.')} ") and said.endswith("is expected") and "\n" not in said


MISSING = ("model_name", "higher_is_better", "higher_is_better/t", "higher_is_better/t/exact")


@pytest.mark.parametrize("path", [*MISSING, "total_evaluation_time_seconds", "results/t/exact_stderr,none"])
@pytest.mark.parametrize("value", [None, ...])
def test_what_lm_eval_may_leave_out(path: str, value: Any) -> None:
    (row,) = records(changed(path, value))
    assert row.score == 0.5 and row.higher_is_better


@pytest.mark.parametrize("value", [None, ..., 0])
def test_a_score_of_no_documents_is_none(value: Any) -> None:
    said: list[str] = []
    assert not list(records(changed("results/t/sample_len", value), "r.json", said))
    assert said == ["r.json: results.t has no documents (sample_len and n-samples are missing or 0)"]


NO_FIGURES = (float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 10**400, True, "a", [0.5], {"a": 1})


@pytest.mark.parametrize("value", NO_FIGURES, ids=lambda value: str(value)[:20])
def test_a_score_that_is_no_number_is_left_out_and_said(value: Any) -> None:
    unusable: list[str] = []
    content = changed("results/t/other,none", value)
    assert [row.metric for row in records(content, "r.json", unusable)] == ["exact"]
    assert len(unusable) == 1 and unusable[0].startswith("r.json: results.t.other,none is ")
    unusable.clear()
    (row,) = records(changed("results/t/exact_stderr,none", value), "r.json", unusable)
    assert row.stderr is None and "results.t.exact_stderr,none is " in unusable[0]


def test_a_file_with_no_score_that_can_be_drawn(tmp_path: Path) -> None:
    for number, content in enumerate((changed("results/t/exact,none", 1e308), changed("results", {}))):
        with pytest.raises(UserError, match="these result files hold no scores"):
            read([save(tmp_path, str(number), content)])


def test_filters_of_one_metric_are_kept_apart() -> None:
    content = changed("results/t/exact,strict", 0.25)
    assert {row.metric: row.score for row in records(content)} == {"exact": 0.5, "exact,strict": 0.25}


def test_what_was_not_scored_is_no_score() -> None:
    assert [row.metric for row in records(changed("results/t/bypass,none", 999))] == ["exact"]


@pytest.mark.parametrize("score", [1e-320, -1e-320, 1e99, -1e99, 0.0, 5])
@pytest.mark.parametrize("stderr", [0.0, 1e-320, 1e99])
def test_scores_of_any_size_are_drawn(score: float, stderr: float) -> None:
    rows = [row(score=score, stderr=stderr, n=10**30, measured=s) for s in (0.0, 0.5)]
    assert picture.draw(rows)[0].startswith(b"\x89PNG")
    assert max(map(len, curve.table(rows)[1])) < 40


# -- files

TORN = {
    "empty": b"",
    "half": json.dumps(result("t", 0.5, 0.9)).encode()[:200],
    "binary": bytes(range(256)),
    "UTF-16": json.dumps(result("t", 0.5, 0.9)).encode("utf-16"),
    "nested": b"[" * 100_000,
    "nested objects": b'{"results":' * 100_000,
    "digits": b'{"results": {"t": {"a,none": ' + b"9" * 5000 + b"}}}",
    "list": b"[]",
    "number": b"5",
    "null": b"null",
    "other": b'{"a": 1}',
}


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_file_is_left_out_of_a_folder_and_refused_by_name(
    torn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "results_bad.json"
    bad.write_bytes(TORN[torn])
    with pytest.raises(UserError, match=r"results_bad\.json"):
        read([tmp_path])  # all are torn
    save(tmp_path, "good", result("t", 0.5, 0.9))
    caplog.clear()
    assert [row.task for row in read([tmp_path])] == ["t"]
    (said,) = (record.getMessage() for record in caplog.records)
    assert "left out" in said and str(bad) in said and "\n" not in said
    with pytest.raises(UserError, match=r"results_bad\.json"):
        read([tmp_path, bad])


def test_many_torn_files_are_few_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(30):
        save(tmp_path, f"bad{number}", "{")
    save(tmp_path, "good", result("t", 0.5, 0.9))
    assert len(read([tmp_path])) == 1
    assert len(caplog.records) < 10 and "25 more" in caplog.messages[-1]


def test_what_is_no_file_is_never_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "results_pipe.json")
    (tmp_path / "results_gone.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "results_self.json").symlink_to(tmp_path / "results_self.json")
    (tmp_path / "results_zero.json").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path)
    save(tmp_path / "results_folder.json", "good", result("t", 0.5, 0.9))
    assert len(read([tmp_path])) == 1
    assert len(caplog.records) == 4
    for name in ("results_pipe.json", "results_zero.json", "results_gone.json", "results_self.json"):
        with pytest.raises(UserError, match=name):
            read([tmp_path / name])
    with pytest.raises(UserError, match="regular file"):
        read(["/dev/zero"])


@pytest.mark.parametrize("given", ["", " ", "~nosuchuser/x", "x" * 300, "y/" * 3000, "a\0b", "gone", "good.json/x"])
def test_paths_that_lead_nowhere(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.json").write_text(json.dumps(result("t", 0.5, 0.9)))
    with pytest.raises(UserError) as error:
        find(["good.json", given])
    assert len(str(error.value)) < 400


def test_a_folder_that_may_not_be_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "open", "good", result("t", 0.5, 0.9))
    (tmp_path / "shut").mkdir()
    scandir = os.scandir

    def refused(path: Any) -> Any:  # permissions do not stop root
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert len(find([tmp_path])) == 1
    assert "shut cannot be read (Permission denied)" in caplog.text


def test_a_file_given_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = save(tmp_path / "a", "1", result("t", 0.5, 0.9))
    (tmp_path / "link").symlink_to(path)
    given = [path, path, tmp_path, tmp_path / "a" / ".." / "a", tmp_path / "link", "~/a"]
    assert len(find(given)) == len(read(given)) == 1


# -- outputs

OUTPUTS = {
    "folder.png": "is a folder",
    "file/a.png": "is a file",
    "/dev/null/x.png": "is a file",
    "": "is empty",
    ".png": "give a name before .png, such as curve.png",
    "x/.html": "give a name before .html",
    ".PNG": "give a name before",
    "a.jpg": "ends in .png or .html",
    "png": "ends in .png or .html",
    "a.png/": "is a folder|ends in",
    "~nosuchuser/a.png": "no home folder",
    "n" * 300 + ".png": "bytes|longer",
    "d" * 300 + "/a.png": "bytes|longer",
    "input.html": "one of the result files",
    "linked.html": "one of the result files",
    "hard.png": "one of the result files",
    "gone/a.png": "link that leads nowhere",
}


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda name: name[:20])
def test_outputs_that_cannot_be(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    Path("file").write_text("")
    Path("input.html").write_text(json.dumps(result("t", 0.5, 0.9)))
    Path("linked.html").symlink_to("input.html")
    Path("hard.png").hardlink_to("input.html")
    Path("gone").symlink_to("nowhere")
    if output == "a.png/":
        Path("a.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=OUTPUTS[output]):
        plot.run(["input.html", "--output", output])
    assert sorted(tmp_path.rglob("*")) == before


def test_outputs_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path, "x", result("t", 0.5, 0.9))
    names = ("new/er/A.PNG", "new/er/../er/A.PNG", "~/a.Html", "a.b.png")
    plot.run([str(tmp_path), *(word for name in names for word in ("--output", name))])
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert Path("new/er/A.PNG").read_bytes() == Path("a.b.png").read_bytes()
    assert Path("a.Html").read_text().startswith("<!doctype html>")
    assert not Path("~").exists()


def test_a_disk_that_fills_up_while_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, "x", result("t", 0.5, 0.9))

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(curve, "write_whole", full)
    with pytest.raises(UserError, match="No space left on device"):
        plot.run([str(path), "--output", str(tmp_path / "a.png")])


# -- how much is drawn


def many(tasks: int, methods: int = 1) -> list[picture.Row]:
    return [row(method=f"method{method}", task=f"t{task}") for task in range(tasks) for method in range(methods)]


def test_panels_stand_in_a_grid() -> None:
    one, four, five = (size(picture.draw(many(count))[0]) for count in (1, 4, 5))
    assert four[0] > 3 * one[0] / 1.5 and one[1] == four[1] and five[0] == four[0] and 1.7 < five[1] / four[1] < 2


def test_a_picture_is_bounded_and_a_page_has_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def quick(found: Any, styles: Any) -> bytes:
        drawn.append(len(found))
        return b"\x89PNG"

    monkeypatch.setattr(picture, "_picture", quick)
    content = result("t", 0.5, None)
    content["results"] = {
        f"t{number}": {"exact,none": 0.5, "sample_len": 2} for number in range(picture.MOST_PANELS + 1)
    }
    path, page, image = save(tmp_path, "x", content), tmp_path / "a.html", tmp_path / "a.png"
    with pytest.raises(UserError, match=r"25 panels .* at most 24; choose tasks with --task NAME, or write a page"):
        plot.run([str(path), "--output", str(image)])
    assert not drawn and not image.exists()
    plot.run([str(path), "--output", str(page)])
    assert drawn == [24, 1] and page.read_text().count("<img ") == 2
    plot.run([str(path), "--output", str(image), "--task", "t1", "--task", "t2"])
    content["results"] = {f"t{number}": {"exact,none": 0.5, "sample_len": 2} for number in range(1000)}
    with pytest.raises(UserError, match=r"1000 panels .* a page has at most 240; choose tasks with --task NAME$"):
        plot.run([str(save(tmp_path, "x", content)), "--output", str(page)])


def test_a_task_that_is_not_there_is_refused_although_others_are(tmp_path: Path) -> None:
    path = save(tmp_path, "x", result("niah", 0.5, 0.9))
    with pytest.raises(UserError, match="--task nia: .* hold niah; did you mean 'niah'"):
        plot.run([str(path), "--output", str(tmp_path / "a.png"), "--task", "niah", "--task", "nia"])


def test_methods_that_cannot_be_told_apart_are_refused() -> None:
    assert picture.draw(many(1, picture.MOST_METHODS))
    with pytest.raises(UserError, match="hold 65 methods"):
        picture.draw(many(1, picture.MOST_METHODS + 1))


# -- the table under a run

ODD = ([], 5, "a", True, None, {}, {"t": 5}, {"t": []}, {"t": {"prefill": 5}}, {5: {"prefill": {"method": 5}}})


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_the_table_under_a_run_never_fails(odd: Any) -> None:
    for content in (odd, {"config": odd}, {"config": {"sparse": odd}}, {"config": {"sparse": {"tasks": odd}}}):
        assert isinstance(figures_table(content), str)


def test_the_table_under_a_run_gives_a_terminal_nothing_to_obey() -> None:
    phase = {"method": "a\x1b[2J\nb", "requested_sparsity": "x", "executed_sparsity": float("nan")}
    table = figures_table({"config": {"sparse": {"tasks": {"t\x07\r\n|": {"prefill": phase}}}}})
    assert len(table.splitlines()) == 3 and all(c.isprintable() for c in table.replace("\n", ""))
    assert io.StringIO(table).readlines()[2].startswith(r"|t\x07 ||prefill")


@pytest.mark.parametrize("metadata", [None, [], 5, "a", {"skipped": "too\x1b[2J\nlong"}, {"skipped": ["a"]}], ids=str)
def test_the_lines_on_what_did_not_run_are_safe_to_print(metadata: Any) -> None:
    content = {"configs": {"t\x1b]0;x\x07\n": {"metadata": metadata}, "u": None}, "config": {"sparse": 5}}
    table = evaluator._with_figures(lambda results, column: "|a\x1b[1m|\n")(content)
    assert table.startswith("|a\\x1b[1m|\n") and all(c.isprintable() for c in table.replace("\n", ""))
    assert ("Not run: t" in table) == (isinstance(metadata, dict))
