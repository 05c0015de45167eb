"""The summary of a report: what was compared, what dense attention can do, what is missing, and key sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import made_up
import pytest
from few_studies import built, record, right

from lm_eval_sparse.analysis import certificates, overview, recommend
from lm_eval_sparse.analysis.analyze import sections, study_of
from lm_eval_sparse.analysis.certify import Options
from lm_eval_sparse.analysis.figure import Section, Table
from lm_eval_sparse.analysis.study import Study, build
from lm_eval_sparse.cli import app

MODELS, TASKS = tuple(made_up.SHAPES)[:2], ("niah", "story_multihop", "toefl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("study")
    grid = made_up.runs(MODELS, ("4k", "16k"), TASKS, ("quest", "snapkv", "oracle_topk"), (0.5, 0.9))
    made_up.write(place, grid, documents=60)
    return place


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    return study_of([str(folder)])


def test_the_head_says_what_was_compared(study: Study) -> None:
    first, second, *more = overview.head(study, Options())
    assert first == (
        "2 models (org/small-0.5B, org/medium-1.5B); 3 methods (oracle_topk, quest, snapkv) at sparsities from 0.5 to "
        "0.9; 3 tasks (niah, story_multihop, toefl) at 4,096, 16,384 tokens: 28 runs, 60 documents a task."
    )
    # The gate, counted from the records: by .05 and three standard errors above what guessing scores.
    dense = [row for row in study.records if row.method == "dense" and not row.metric.startswith("bits")]
    able, unable = 0, 0
    for row in dense:
        scores = row.documents.scores
        mean = math.fsum(scores) / len(scores)
        error = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores))
        above = mean - row.chance
        able += above > 0.05 and above > 3 * error
        unable += not (above > 0.05 and above > 3 * error)
    assert 0 < able < len(dense) == 12
    assert second == (
        f"Dense attention can do {able} of 12 tasks, counted once for each model and length; it cannot do "
        f"story_multihop ({unable} times)."
    )
    assert not more and overview.lacks(study) == ""


def test_what_is_missing_is_said_with_what_to_type(study: Study) -> None:
    alone = build(row for row in study.records if row.method == "dense")
    said = overview.lacks(alone)
    assert "no sparse run" in said and "method=NAME,sparsity=S" in said and "dense run to compare" not in said
    head = overview.head(alone, Options())
    assert "method" not in head[0] and "4 runs" in head[0] and head[1].startswith("Dense attention can do ")
    without = build(row for row in study.records if row.method != "dense" and row.model == MODELS[0])
    said = overview.lacks(without)
    assert said.startswith("There is no dense run here, so nothing can be compared: run the same tasks with ")
    assert f"--model_args pretrained={MODELS[0]},method=dense," in said
    assert "Dense attention" not in " ".join(overview.head(without, Options()))
    some = build(row for row in study.records if row.method != "dense" or row.task.endswith("niah_4k"))
    assert overview.lacks(some) == ""
    assert "10 of 12 tasks, counted once for each model and length, have sparse runs and no dense run" in " ".join(
        overview.head(some, Options())
    )


def test_what_chance_scores_unknown_is_not_what_dense_cannot_do(study: Study) -> None:
    unknown = build(row.model_copy(update={"chance": None}) for row in study.records)
    said = " ".join(overview.head(unknown, Options()))
    assert "Dense attention can" not in said and "is not known: what chance scores is unknown" in said
    assert "Whether dense attention can do niah" in said
    assert "--chance TASK=.25" in said and said.count("what chance scores is unknown") == 1


def _reasons(*rows: tuple[str, str, int, str, str, float | None, float | None]) -> Section:
    header = ("model", "method", "length", "what", "name", "largest certified", "at most", "why no more")
    table = Table("certificate_reasons", "t", header, tuple((*row, "") for row in rows))
    return Section("certificates", "C", ("one", "two", "three"), (), (table,))


def test_certificates_say_how_far_they_go_and_what_ends_first() -> None:
    part = _reasons(
        ("m", "quest", 4096, "task", "niah", 0.5, 0.1), ("m", "quest", 4096, "task", "vt", None, 0.05),
        ("m", "snapkv", 4096, "task", "niah", 0.9, 0.1), ("m", "snapkv", 4096, "task", "vt", 0.3, 0.1),
        ("m", "snapkv", 4096, "worst", "worst task", 0.3, 0.1), ("m", "oracle_topk", 4096, "task", "vt", 0.99, 0.1),
        ("m", "snapkv", 4096, "task", "cwe", None, None),
    )  # fmt: skip
    assert overview.key_sentences(part) == (
        "3 of 4 sequences of a method on a task are certified at some sparsity, the furthest up to 0.9: snapkv (m, "
        "4,096 tokens) on niah; on all tasks at once 0.3, by snapkv (m, 4,096 tokens).",
        "vt ends first (certified up to 0.15 on average over methods, 0 where nothing is), niah last (0.70).",
    )
    none = _reasons(("m", "quest", 4096, "task", "niah", None, 0.1))
    assert overview.key_sentences(none) == ("0 of 1 sequence of a method on a task is certified at some sparsity.",)
    refused = _reasons(("m", "quest", 4096, "task", "niah", None, None))
    assert overview.key_sentences(refused)[0].startswith("Nothing can be certified: ")
    assert overview.key_sentences(replace(part, first=("mine",))) == ("mine",)


def test_all_that_tie_end_first_and_last() -> None:
    some = [("m", "quest", 4096, "task", name, 0.5, 0.1) for name in ("niah", "vt", "cwe", "squad")]
    none = [("m", "quest", 4096, "task", name, None, 0.1) for name in ("toefl", "quality")]
    longer = [(*row[:2], 16384, *row[3:]) for row in (*some, *none)]
    assert len(overview.key_sentences(_reasons(*some, *none))) == 1, "of one row nothing is an average"
    assert overview.key_sentences(_reasons(*some, *none, *longer))[1] == (
        "toefl, quality end first (certified up to 0.00 on average over lengths, 0 where nothing is), niah, vt, cwe "
        "and 1 more last (0.50)."
    )
    alike = [(*row[:2], 16384, *row[3:]) for row in some]
    assert len(overview.key_sentences(_reasons(*some, *alike))) == 1, "nothing ends first where all tie"
    three = [("other", *row[1:]) for row in longer]
    assert "on average over models and lengths" in overview.key_sentences(_reasons(*some, *none, *longer, *three))[1]


def test_a_certified_sparsity_is_said_with_a_lower_measured_one() -> None:
    """Where a method fell back to dense attention it lost nothing, and skipped nothing."""
    runs = {"niah": 0.01, "vt": 0.89}
    rows = [record(task, "dense", None, right(100)) for task in runs]
    rows += [record(task, "quest", 0.9, right(100), measured=measured) for task, measured in runs.items()]
    made = built(rows)
    part = certificates.section(made, Options())
    assert any("niah up to sparsity 0.9 requested, 0.01 measured, vt up to sparsity 0.9 (" in s for s in part.sentences)
    row = dict(zip(part.tables[0].header, part.tables[0].rows[0], strict=True))
    assert row["niah"] == 0.9 and row["measured less than requested"].startswith("niah: 0.9 requested, 0.01 measured")
    assert "vt:" not in row["measured less than requested"]
    said = overview.key_sentences(part)[0]
    assert "quest (org/model, 4,096 tokens) on niah (0.9 requested, 0.01 measured), quest" in said
    text, _ = recommend.recommend(made, Options(), task="niah")
    assert "0.9 requested, 0.01 measured" in text
    honest = certificates.section(built([row for row in rows if "niah" not in row.task]), Options())
    assert "measured less than requested" not in honest.tables[0].header


def test_sentences_about_the_longest_prompts_and_the_largest_model_stand_for_a_part() -> None:
    said = ("m at 4096 tokens: a", "m at 16,384 tokens: b", "big at 16384 tokens: c", "big at 16384 tokens: d", "e")
    part = Section("curves", "C", said)
    assert overview.key_sentences(part) == said[1:3]
    assert overview.key_sentences(part, "big") == said[2:4]
    assert overview.key_sentences(Section("x", "X", ("a", "b", "c"))) == ("a", "b")
    assert overview.key_sentences(Section("x", "X")) == ()


def test_a_summary_says_nothing_twice(study: Study) -> None:
    parts = [Section("a", "A", ("the same", "one")), Section("b", "B", first=("the same", "two", "the same"))]
    said = overview.summary(study, Options(), parts)
    assert said == (*overview.head(study, Options()), "the same", "one", "two")


def test_of_a_whole_study_every_part_has_its_say(study: Study) -> None:
    parts = sections(study, Options())
    said = overview.summary(study, Options(), parts)
    assert len(set(said)) == len(said)
    for part in parts:
        assert 1 <= len(overview.key_sentences(part)) <= overview.MOST
    assert any("the scaling law explains (R²) " in line for line in said)
    curves = overview.key_sentences(parts[0], MODELS[1])
    assert (
        curves and all(line.startswith(f"{MODELS[1]} at 16,384 tokens") for line in curves) and set(curves) <= set(said)
    )


def analyzed(arguments: list[str], capsys: pytest.CaptureFixture[str], out: Path) -> tuple[str, str]:
    """What is printed, and what stands above the first part of the page."""
    assert app.main(["analyze", *arguments, "--output", str(out), "--no-pictures"]) == 0
    page = (out / "report.html").read_text()
    return capsys.readouterr().out, page[page.index("<h1>") : page.index('id="section-')]


def only(kept: Callable[[str], bool], folder: Path, place: Path) -> Path:
    """Copies of the runs of a study whose folder has such a name."""
    place.mkdir()
    for run in folder.iterdir():
        if kept(run.name):
            for file in run.rglob("*.json*"):
                copy = place / file.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    return place


def test_without_a_dense_run_the_first_line_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = only(lambda name: not name.startswith("dense"), folder, tmp_path / "sparse")
    printed, top = analyzed([str(place)], capsys, tmp_path / "out")
    assert printed.startswith("There is no dense run here, so nothing can be compared: run the same tasks with ")
    assert "method=dense" in printed.splitlines()[0]
    assert top.index("Before you read") < top.index("There is no dense run here") < top.index("Summary")
    place = only(lambda name: name.startswith("dense"), folder, tmp_path / "dense")
    printed, top = analyzed([str(place)], capsys, tmp_path / "out")
    assert printed.startswith("There is no sparse run here, ") and "There is no sparse run here" in top


def torn(folder: Path, name: str, place: Path) -> Path:
    """A copy of a study in which the first run of such a folder has a score that cannot be."""
    place = only(lambda _: True, folder, place)
    file = next((place / name).rglob("results_*.json"))
    content = json.loads(file.read_text())
    for row in content["results"].values():
        row.update({key: 1.5 for key in row if key.endswith(",none") and "stderr" not in key})
    file.write_text(json.dumps(content))
    return place


def test_what_is_left_out_is_said_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], study: Study
) -> None:
    assert overview.left_out(study) == ""
    place = torn(folder, "quest_0.5_4k", tmp_path / "study")
    printed, top = analyzed([str(place)], capsys, tmp_path / "out")
    first = printed.splitlines()[0]
    assert (
        " files or figures are left out, and what is said is of the rest only (run those again to have them in); "
        "the first: " in first
    )
    assert "quest_0.5_4k" in first and "a number from 0 to 1 is expected" in first
    assert top.index("Before you read") < top.index("left out, and what is said") < top.index("Summary")
    assert app.main(["recommend", str(place), "--task", "niah"]) in (0, 1)
    assert capsys.readouterr().out.startswith(f"Note: {first}")


def test_runs_that_are_left_out_need_not_be_run(study: Study) -> None:
    dense = [row for row in study.records if row.method == "dense"]
    alone = build(dense, left_out=["r.json: results.niah.exact is 1.5"])
    (said,) = overview.warnings(alone)
    assert said == (
        "There is no sparse run among the results that can be used, so there is nothing to compare dense attention "
        "with. 1 file or figure is left out, and what is said is of the rest only (run that again to "
        "have it in); r.json: results.niah.exact is 1.5."
    )
    text, found = recommend.recommend(alone, Options(), task="niah")
    assert not found and "run a method" not in text and "left out (r.json: results.niah.exact is 1.5)" in text


def test_a_mark_is_printed_first_and_stands_on_top(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 7):
        few = made_up.runs(MODELS[:1], ("4k",), ("niah",), ("quest",), (0.5,))
        made_up.write(tmp_path / "runs" / str(seed), few, documents=30, task_seed=seed)
    printed, top = analyzed([str(tmp_path / "runs"), "--allow-mixed"], capsys, tmp_path / "out")
    mark = printed.splitlines()[0]
    assert "has seed 0 and 7" in mark
    assert top.index("Before you read") < top.index("has seed 0 and 7") < top.index("Summary")
