"""Scores against costs of whole studies: fronts by brute force, costs by formula, who is better at equal cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_up
import numpy as np
import pytest
from scipy import stats

from lm_eval_sparse.analysis import cost, isocost
from lm_eval_sparse.analysis.costed import Configuration, able, groups, shared
from lm_eval_sparse.analysis.shapes import PUBLISHED
from lm_eval_sparse.analysis.study import Study, build
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.results.load import read
from lm_eval_sparse.results.schema import Record

SMALL, MEDIUM = "org/small-0.5B", "org/medium-1.5B"
SIZES = {SMALL: PUBLISHED["Qwen2.5-0.5B"], MEDIUM: PUBLISHED["Qwen2.5-1.5B"]}
TASKS = ("niah", "vt", "toefl")
METHODS = ("vertical_slash", "quest", "oracle_blocks", "snapkv")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("study")
    grid = made_up.runs((SMALL, MEDIUM), ("16k", "32k"), TASKS, METHODS)
    made_up.write(folder, grid, documents=60, seed=int(np.random.default_rng().integers(10**6)))
    return read([folder])


FLOOR = "dense cannot do this task"


def can(cell: Any) -> str | None:
    return None


def options(batch: float = 1, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(batch=batch, margin=0.05, **more)


def changed(records: Iterable[Record], where: Callable[[Record], bool], **update: Any) -> list[Record]:
    return [one.model_copy(update=update) if where(one) else one for one in records]


def rows(section: Any, name: str) -> list[dict[str, Any]]:
    found = next((table for table in section.tables if table.name == name), None)
    return [dict(zip(found.header, row, strict=True)) for row in found.rows] if found else []


@pytest.mark.parametrize("batch", [1, 64])
def test_costs_scores_and_fronts_are_those_of_a_plain_count(records: list[Record], batch: float) -> None:
    section = isocost.section(build(records), options(batch), floor=can)
    table = rows(section, "isocost_means")
    assert {(row["length"], row["phase"]) for row in table} == {
        (length, phase) for length in (16384, 32768) for phase in ("prefill", "decode")
    }
    for row in table:
        phase, method = row["phase"], row["method"]
        own = [
            one for one in records
            if (one.model, one.method, one.length) == (row["model"], method, row["length"])
            and one.metric != "bits_per_char" and (method == "dense" or abs(one.measured - row["sparsity"]) < 0.02)
        ]  # fmt: skip
        assert len(own) == len(TASKS)
        assert row["score"] == pytest.approx(np.mean([one.score for one in own]))
        assert row["sparsity"] == pytest.approx(np.mean([one.measured for one in own]))
        sizes, expected = SIZES[row["model"]], []
        for one in own:
            figures = one.by_phase
            if phase == "prefill":
                estimator = sum(figures[name].estimator_flops_fraction for name in ("prefill", "eviction"))
                density = 1 - figures["prefill"].executed
                expected.append(cost.prefill(sizes, one.prompt_tokens, density, batch, estimator).total)
            else:
                read = figures["decode"].bytes_read_fraction
                expected.append(cost.decode(sizes, one.prompt_tokens, read, batch).total)
        assert row["cost"] == pytest.approx(np.mean(expected))
        if phase == "prefill":
            assert method in ("dense", "vertical_slash", "oracle_blocks")
        else:
            assert method in ("dense", "quest", "snapkv")
        rivals = [
            other for other in table
            if (other["length"], other["phase"]) == (row["length"], phase) and not other["method"].startswith("oracle")
        ]  # fmt: skip
        beaten = any(
            other["cost"] <= row["cost"] and other["score"] >= row["score"]
            and (other["cost"] < row["cost"] or other["score"] > row["score"])
            for other in rivals
        )  # fmt: skip
        assert row["on the front"] == ("oracle" if method.startswith("oracle") else "no" if beaten else "yes")
    for figure in section.figures:
        mean, *own = figure.panels
        assert [panel.title for panel in own] == sorted(TASKS)
        at = [row for row in table if f"{row['length']:,}" in figure.title and row["phase"] in figure.name]
        line = next(series for series in mean.series if series.name == isocost.FRONT)
        best = sorted((row["cost"], row["score"]) for row in at if row["on the front"] == "yes")
        assert list(zip(line.x, line.y, strict=True)) == [pytest.approx(point) for point in best]
        drawn = [
            point for series in mean.series if series is not line for point in zip(series.x, series.y, strict=True)
        ]
        assert sorted(drawn) == [pytest.approx(point) for point in sorted((row["cost"], row["score"]) for row in at)]
        assert mean.log_x and not mean.log_y


def test_where_no_cost_is_equal_it_is_said_and_nothing_is_extrapolated(records: list[Record]) -> None:
    for batch in (1, 64):
        section = isocost.section(build(records), options(batch), floor=can)
        equal = {(row["length"], row["phase"], row["method"]): row for row in rows(section, "isocost_equal")}
        never = equal[16384, "prefill", "vertical_slash"]
        assert never["equal cost"] == "never" and never["sparsity"] is None and never["larger's score"] is None
        assert any("16,384" in line and "prefill" in line and "never" in line for line in section.sentences)
        # At 32K from .867 on, and somewhat more with what selecting takes.
        found = equal[32768, "prefill", "vertical_slash"]
        wanted = cost.equal_cost(SIZES[SMALL], SIZES[MEDIUM], 32768 - 10.5, "prefill", batch, "square", 0.01).sparsity
        assert found["sparsity"] == pytest.approx(wanted, abs=1e-3) and 0.867 < wanted < 0.9
        for length in (16384, 32768):
            quest = equal[length, "decode", "quest"]
            if batch == 1:
                assert quest["equal cost"] == "never"
            else:
                wanted = cost.equal_cost(SIZES[SMALL], SIZES[MEDIUM], length - 10.5, "decode", 64, "square", 0.0625)
                assert quest["sparsity"] == pytest.approx(wanted.sparsity, abs=5e-3)
        assert not any(name.startswith("oracle") for *_, name in equal)


def test_a_sparsity_above_all_runs_has_no_score(records: list[Record]) -> None:
    kept = [one for one in records if one.method == "dense" or one.measured < 0.85]
    section = isocost.section(build(kept), options(), floor=can)
    row = next(row for row in rows(section, "isocost_equal") if (row["length"], row["phase"]) == (32768, "prefill"))
    assert row["equal cost"] == "beyond the runs" and row["sparsity"] == pytest.approx(0.877, abs=2e-3)
    assert row["larger's score"] is None and row["better"] is None
    assert any("not run (vertical_slash from 0.877 on)" in line for line in section.sentences)


@pytest.mark.parametrize("paired", [True, False])
def test_who_is_better_at_equal_cost(records: list[Record], paired: bool) -> None:
    """The difference and its error, from documents; by chance alone the two models are seldom told apart."""

    def renamed(one: Record) -> Record:
        names = tuple(f"x{name}" for name in one.documents.ids)
        return one.model_copy(update={"documents": one.documents.model_copy(update={"ids": names})})

    given = [one if paired or one.model != SMALL else renamed(one) for one in records]
    section = isocost.section(build(given), options(64), floor=can)
    row = next(
        row for row in rows(section, "isocost_equal")
        if (row["length"], row["phase"], row["method"]) == (32768, "decode", "quest")
    )  # fmt: skip
    own = [one for one in records if one.length == 32768 and one.metric != "bits_per_char"]
    at = np.array([0.0, 0.5, 0.8, 0.9, 0.95])

    def runs(model: str, task: str) -> list[Record]:
        found = [one for one in own if one.model == model and task in one.task and one.method in ("dense", "quest")]
        return sorted(found, key=lambda one: one.measured)

    costs = np.mean([[cost.of(one, 64).decode.total for one in runs(MEDIUM, task)] for task in TASKS], 0)
    budget = np.mean([cost.of(runs(SMALL, task)[0], 64).decode.total for task in TASKS])
    place = int(np.argmax(costs <= budget))
    weight = (costs[place - 1] - budget) / (costs[place - 1] - costs[place])
    assert row["sparsity"] == pytest.approx((1 - weight) * at[place - 1] + weight * at[place], abs=5e-3)
    gaps, errors = [], []
    for task in TASKS:
        ladder = [np.array(one.documents.scores) for one in runs(MEDIUM, task)]
        ours = (1 - weight) * ladder[place - 1] + weight * ladder[place]
        theirs = np.array(runs(SMALL, task)[0].documents.scores)
        gaps.append(ours.mean() - theirs.mean())
        errors.append(stats.sem(ours - theirs) if paired else np.hypot(stats.sem(ours), stats.sem(theirs)))
    assert row["difference"] == pytest.approx(np.mean(gaps))
    assert row["larger's score"] - row["smaller's score"] == pytest.approx(row["difference"])
    assert row["standard error"] == pytest.approx(np.sqrt(np.sum(np.square(errors))) / len(TASKS))
    told = abs(row["difference"]) > stats.norm.ppf(0.975) * row["standard error"]
    better = MEDIUM if row["difference"] > 0 else SMALL
    assert row["better"] == (better if told else "not told apart")


def test_a_clear_difference_is_told_and_few_documents_tell_none(records: list[Record]) -> None:
    def doubt(one: Record, shift: float) -> Record:
        scores = tuple(max(0.0, score - shift) for score in one.documents.scores)
        return one.model_copy(
            update={"documents": one.documents.model_copy(update={"scores": scores}), "score": float(np.mean(scores))}
        )

    worse = [doubt(one, 0.4) if one.model == SMALL and one.metric != "bits_per_char" else one for one in records]
    section = isocost.section(build(worse), options(64), floor=can)
    assert any("scores better there with quest" in line for line in section.sentences)
    few = [
        one.model_copy(
            update={
                "documents": one.documents.model_copy(
                    update={"ids": one.documents.ids[:10], "scores": one.documents.scores[:10]}
                ),
                "n": 10,
            }
        )
        for one in worse
    ]
    section = isocost.section(build(few), options(64), floor=can)
    assert any("cannot be compared (too few documents) with quest" in line for line in section.sentences)
    assert not any("better" in line for line in section.sentences)
    without = [one.model_copy(update={"documents": None}) for one in worse]
    row = next(
        row for row in rows(isocost.section(build(without), options(64), floor=can), "isocost_equal")
        if (row["length"], row["phase"], row["method"]) == (32768, "decode", "quest")
    )  # fmt: skip
    assert row["better"] == MEDIUM and row["standard error"] > 0


def test_a_task_that_a_model_cannot_do_is_in_no_comparison(records: list[Record]) -> None:
    def floor(cell: Any) -> str | None:
        return "dense cannot do this task" if (cell.model, cell.short) == (MEDIUM, "vt") else None

    section = isocost.section(build(records), options(64), floor=floor)
    assert {row["tasks"] for row in rows(section, "isocost_equal")} == {"niah, toefl"}
    reason = f"nothing is said of vt: vt of {MEDIUM}: dense cannot do this task."
    assert any(line.endswith(reason) for line in section.sentences)
    # Nor in the mean: four pairs of a model and a task stay without it, three would without the model.
    assert {row["tasks"] for row in rows(section, "isocost_means")} == {"niah, toefl"}
    assert {row["model"] for row in rows(section, "isocost_means")} == {SMALL, MEDIUM}
    reason = f"Tasks that are not in the mean: vt of {MEDIUM}: dense cannot do this task."
    assert any(line.endswith(reason) for line in section.sentences)
    section = isocost.section(build(records), options(), floor=lambda cell: FLOOR if cell.short == "vt" else None)
    assert {row["tasks"] for row in rows(section, "isocost_means")} == {"niah, toefl"}
    notes = {panel.title: panel.note for figure in section.figures for panel in figure.panels}
    assert notes["vt"] == f"No front: {FLOOR}." and notes["niah"] == notes["toefl"] == ""
    assert notes["mean of 2 tasks"] == f"Tasks that are not in the mean: vt: {FLOOR}."
    section = isocost.section(build(records), options(64), floor=lambda cell: "no")
    assert not rows(section, "isocost_equal") and not rows(section, "isocost_means")
    assert not any("score" in line for line in section.sentences)


def test_a_model_that_fails_most_tasks_is_in_no_mean(records: list[Record]) -> None:
    def floor(cell: Any) -> str | None:
        return FLOOR if cell.model == MEDIUM and cell.short != "toefl" else None

    section = isocost.section(build(records), options(), floor=floor)
    table = rows(section, "isocost_means")
    assert {(row["model"], row["tasks"]) for row in table} == {(SMALL, "niah, toefl, vt")}
    said = f"Models that are neither in the mean nor on its front: {MEDIUM} for niah, {MEDIUM} for vt: {FLOOR}."
    assert any(line.endswith(said) for line in section.sentences)
    for figure in section.figures:
        mean = figure.panels[0]
        assert mean.title == "mean of 3 tasks" and MEDIUM in mean.note and FLOOR in mean.note
        assert not any(MEDIUM in series.name for series in mean.series)


@pytest.mark.parametrize("reason", [FLOOR, "what chance scores is unknown: give --chance vt=.25", "no dense run"])
def test_a_model_that_cannot_do_a_task_is_drawn_and_not_on_its_front(records: list[Record], reason: str) -> None:
    """The larger model scores more here, and would be on every front."""

    def best(one: Record) -> bool:
        return one.model == MEDIUM and "_vt_" in one.task and one.method == "dense"

    good = changed(records, best, score=0.99)

    def floor(cell: Any) -> str | None:
        return reason if (cell.model, cell.short) == (MEDIUM, "vt") else None

    for floored in (floor, can):
        section = isocost.section(build(good), options(), floor=floored)
        for figure in section.figures:
            (panel,) = [panel for panel in figure.panels if panel.title == "vt"]
            front = next(series for series in panel.series if series.name == isocost.FRONT)
            points = {
                point for series in panel.series if MEDIUM in series.name
                for point in zip(series.x, series.y, strict=True)
            }  # fmt: skip
            beats = points & set(zip(front.x, front.y, strict=True))
            assert points and bool(beats) == (floored is can)
            assert panel.note == ("" if floored is can else f"Not on the front: {MEDIUM}: {reason}.")
        told = [line for line in section.sentences if reason in line]
        assert bool(told) == (floored is floor)
        assert reason == FLOOR or not any("cannot do" in line for line in section.sentences)


@pytest.mark.parametrize(("above", "chance", "on"), [(0.03, 0.2, False), (0.08, 0.2, True), (0.03, None, True)])
def test_a_run_that_guesses_is_on_no_front(above: float, chance: float | None, on: bool) -> None:
    """The cheapest run is on a front whatever it scores, unless that is what guessing scores."""

    def one(label: str, cost: float, score: float) -> Configuration:
        run = SimpleNamespace(
            cell=SimpleNamespace(chance=chance),
            cost=SimpleNamespace(total=lambda phase: cost),
            point=SimpleNamespace(measured=0.9, record=SimpleNamespace(score=score)),
        )
        return Configuration("m", label, ("decode",), False, {"vt": run})

    runs = [one("quest", 1.0, 0.2 + above), one("snapkv", 2.0, 0.7)]
    assert isocost._front(runs, "decode", ("vt",)) == [on, True]


def test_a_level_of_chance_that_is_not_known_is_no_failure(records: list[Record]) -> None:
    unknown = [one.model_copy(update={"chance": None}) if "vt" in one.task else one for one in records]
    section = isocost.section(build(unknown), options(64))
    said = [line for line in section.sentences if "vt" in line and "not in the mean" in line]
    assert said and all("what chance scores is unknown: give --chance vt=.25" in line for line in said)
    assert any("at equal cost nothing is said of vt" in line and "is unknown" in line for line in section.sentences)
    notes = {panel.note for figure in section.figures for panel in figure.panels if panel.title == "vt"}
    assert notes == {"No front: what chance scores is unknown."}
    everything = [*section.sentences, *(panel.note for figure in section.figures for panel in figure.panels)]
    assert not any("cannot" in line and "vt" in line for line in everything)


def test_models_and_tasks_of_a_mean_keep_most_pairs() -> None:
    """Against every choice of models and tasks."""
    rng = np.random.default_rng()
    for _ in range(200):
        models, tasks = [f"m{i}" for i in range(rng.integers(1, 5))], [f"t{i}" for i in range(rng.integers(1, 6))]
        asked = {model: {task for task in tasks if rng.random() < 0.8} for model in models}
        failed = {model: {task for task in own if rng.random() < 0.35} for model, own in asked.items()}

        def some(names: list[str]) -> Iterable[tuple[str, ...]]:
            return chain.from_iterable(combinations(names, size) for size in range(1, len(names) + 1))

        best = max(
            (
                sum(task in asked[model] for model in chosen for task in kept)
                for chosen in some(models) for kept in some(tasks)
                if not any(task in failed[model] for model in chosen for task in kept)
            ),
            default=0,
        )  # fmt: skip
        found, kept = able(asked, failed)
        assert sum(len(asked[model] & kept) for model in found) == best, (asked, failed)
        assert not any(failed[model] & kept for model in found)
    assert able({"a": {"x", "y"}, "b": {"x", "y"}}, {"b": {"y"}}) == ({"a", "b"}, {"x"}), "of two choices more models"


def test_models_have_marks_of_their_own_and_dense_points_are_not_joined(records: list[Record]) -> None:
    section = isocost.section(build(records), options(), floor=can)
    for figure in section.figures:
        for panel in figure.panels:
            drawn = [series for series in panel.series if series.name != isocost.FRONT]
            dense = [series for series in drawn if series.colour == "dense"]
            assert sorted(series.name for series in dense) == [f"dense, {MEDIUM}", f"dense, {SMALL}"]
            assert [len(series.x) for series in dense] == [1, 1]
            marks = {model: {one.mark for one in drawn if one.name.endswith(model)} for model in (SMALL, MEDIUM)}
            assert sorted(map(len, marks.values())) == [1, 1] and marks[SMALL] != marks[MEDIUM]
            assert {one.colour for one in drawn} == {one.name.split(",")[0] for one in drawn}, "a colour is a method"


def test_a_mean_has_tasks_that_all_have(records: list[Record]) -> None:
    kept = [
        one for one in records
        if not ("toefl" in one.task and one.method == "quest" and one.model == SMALL and one.measured > 0.92)
    ]  # fmt: skip
    section = isocost.section(build(kept), options(), floor=can)
    tasks = {row["phase"]: row["tasks"] for row in rows(section, "isocost_means")}
    assert tasks == {"prefill": "niah, toefl, vt", "decode": "niah, vt"}
    notes = [figure.panels[0].note for figure in section.figures if "decode" in figure.name]
    assert all("Not all configurations have toefl" in note for note in notes) and notes


def test_tasks_that_most_have_where_none_is_shared(records: list[Record]) -> None:
    (group, *_) = groups(build(records))
    some = list(group.configurations[:4])
    alone = [replace(some[0], runs={"vt": some[0].runs["vt"]}), replace(some[1], runs={"niah": some[1].runs["niah"]})]
    assert shared([*alone, *some[2:]], group.tasks) == (group.tasks, ())
    assert shared(some, group.tasks) == (group.tasks, ())
    assert shared([], group.tasks) == ((), group.tasks)


def test_unknown_costs_are_said_with_their_reason(records: list[Record]) -> None:
    unknown = changed(records, lambda one: one.model == MEDIUM, model_shape=None)
    section = isocost.section(build(unknown), options(), floor=can)
    assert {row["model"] for row in rows(section, "isocost_means")} == {SMALL}
    assert any(MEDIUM in line and "do not hold the model's sizes" in line for line in section.sentences)
    assert not rows(section, "isocost_equal")
    nothing = changed(records, lambda one: True, prompt_tokens=None)
    section = isocost.section(build(nothing), options(), floor=can)
    assert not section.figures and "no two configurations" in section.sentences[0]


def test_a_dense_run_of_another_model_type_has_the_prompts_of_the_sparse_runs(records: list[Record]) -> None:
    def foreign(one: Record) -> bool:
        return one.method == "dense"

    given = changed(records, foreign, runner="hf", prompt_tokens=None, model_shape=None, by_phase={})
    expected = rows(isocost.section(build(records), options(), floor=can), "isocost_means")
    found = rows(isocost.section(build(given), options(), floor=can), "isocost_means")
    assert [(row["model"], row["method"], row["cost"]) for row in found] == [
        (row["model"], row["method"], pytest.approx(row["cost"])) for row in expected
    ]


def test_a_metric_of_which_less_is_better_is_in_no_mean(records: list[Record]) -> None:
    section = isocost.section(build(records, metric="bits_per_char"), options(), floor=can)
    assert not rows(section, "isocost_means") and not rows(section, "isocost_equal")
    for figure in section.figures:
        for panel in figure.panels:
            line = next(series for series in panel.series if series.name == isocost.FRONT)
            assert list(line.y) == sorted(line.y, reverse=True)
            others = [value for series in panel.series if "oracle" not in series.name for value in series.y]
            assert min(others) == line.y[-1]


@pytest.mark.parametrize("batch", [0, -3, float("nan"), float("inf"), 0.5])
def test_a_batch_has_at_least_one_row(records: list[Record], batch: float) -> None:
    with pytest.raises(UserError, match="--batch"):
        isocost.section(build(records), options(batch), floor=can)


def test_half_of_the_pairs_where_that_is_asked_for(records: list[Record]) -> None:
    section = isocost.section(build(records), options(pairs="triangle"), floor=can)
    equal = {(row["length"], row["phase"]): row["equal cost"] for row in rows(section, "isocost_equal")}
    assert equal[32768, "prefill"] == "never"  # which all pairs are not
    assert "causal triangle" in section.figures[0].caption


def test_names_of_files_do_not_meet(tmp_path: Path) -> None:
    used: set[str] = set()
    names = [isocost._stem(used, "isocost", "prefill", length, kind) for length, kind in
             ((4096, "é"), (4096, "ü"), (4096, ""), (None, ""), (None, "a" * 90), (None, "a" * 91))]  # fmt: skip
    assert len(set(names)) == len(names) and all(len(name) <= 80 for name in names)


def test_an_empty_study_says_so() -> None:
    section = isocost.section(Study((), ()), options(), floor=can)
    assert len(section.sentences) == 1 and not section.figures and not section.tables
