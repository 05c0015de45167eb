"""Relative errors and the sparsity they allow, against closed forms; lengths are compared only as bands allow."""

from __future__ import annotations

import numpy as np
import pytest
from curve_cases import build, record, runs
from scipy import stats

from lm_eval_sparse.analysis import ladder, study, tolerance

RNG = np.random.default_rng()


def falls(by: float):
    return lambda s: 0.9 * (1 - by * s)


def only(rows) -> ladder.Ladder:
    (cell,) = build(rows).primary
    return ladder.ladder(cell, cell.chains[0])


def test_errors_are_ratios_of_means_with_paired_bands() -> None:
    one = only(runs({"quest": falls(0.5)}, RNG, n=200))
    found = tolerance.errors([one])
    dense, sparse = one.cell.dense.scores, one.scores[3]
    assert found.value == pytest.approx(1 - one.means / dense.mean()) and found.value[0] == 0
    limits = stats.bootstrap(
        (dense, sparse),
        lambda x, y, axis: 1 - y.mean(axis) / x.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        batch=1000,
    ).confidence_interval
    assert (found.low[3], found.high[3]) == pytest.approx((limits.low, limits.high), abs=0.02)


def test_the_first_crossing_of_a_line() -> None:
    x = np.array([0.0, 0.4, 0.8, 0.9])
    assert tolerance.crossing(x, np.array([0, 0.04, 0.24, 0.1]), 0.14) == pytest.approx(0.6)
    assert tolerance.crossing(x, np.zeros(4), 0.1) is None


def test_what_is_not_reached_has_no_number() -> None:
    limit = tolerance.tolerated(tolerance.errors([only(runs({"quest": falls(0.0)}, RNG))]), 0.1)
    assert limit.sparsity is None and "the highest sparsity measured" in limit.why
    few = tolerance.tolerated(tolerance.errors([only(runs({"quest": falls(0.9)}, RNG, n=19))]), 0.1)
    assert np.isnan(few.low) and np.isnan(few.high)


@pytest.mark.parametrize(("short", "long", "verdict"), [(0.8, 0.1, "more"), (0.1, 0.8, "less"), (0.4, 0.4, "")])
def test_lengths_are_compared_as_bands_allow(short: float, long: float, verdict: str) -> None:
    rows = [
        row
        for task in ("niah", "vt")
        for by, length, name in ((short, 4096, "4k"), (long, 16384, "16k"))
        for row in runs({"quest": falls(by)}, RNG, n=200, task=f"frontier_{task}_{name}", length=length)
    ]
    section = tolerance.section(build(rows), floor=lambda cell: None)
    (line,) = [one for one in section.sentences if "difference" in one]
    if verdict:
        assert f"longer prompts tolerate {verdict}" in line
    assert len(section.figures) == 2 and section.tables[0].rows


def test_floors_have_no_tolerance() -> None:
    section = tolerance.section(build(runs({"quest": falls(0.5)}, RNG)), floor=lambda cell: "dense cannot do this task")
    assert not section.tables and not section.figures
    assert section.sentences == (
        "No relative error is said of any task here: frontier_niah_4k: dense cannot do this task.",
    )


def test_why_nothing_is_said_is_why() -> None:
    """Not that dense attention cannot do a task of which runs are mixed, or lack something."""
    one, two = (runs({"quest": falls(0.5)}, RNG, seed=seed) for seed in (7, 8))
    mixed = tolerance.section(study.build([*one, *two], allow_mixed=True))
    assert mixed.sentences == (
        "No relative error is said of any task here: frontier_niah_4k: runs of it differ (seed 7); frontier_niah_4k: "
        "runs of it differ (seed 8).",
    )
    (line,) = tolerance.section(build([row for row in one if row.method != "dense"])).sentences
    assert line.endswith("frontier_niah_4k: no dense run.")
    (line,) = tolerance.section(build([row.model_copy(update={"chance": None}) for row in one])).sentences
    assert "frontier_niah_4k: what chance scores is unknown" in line
    bits = [row.model_copy(update={"metric": "bits_per_char", "higher_is_better": False}) for row in one]
    (line,) = tolerance.section(build(bits)).sentences
    assert "bits_per_char is no share of right answers" in line
    bare = tolerance.section(build([one[0], record("quest", 0.9, None, score=0.5, n=100, seed=7)]))
    (line,) = bare.sentences
    assert line.endswith("frontier_niah_4k: no sparse run with scores by document.") and not bare.figures
    # What can be said is said, and the others' reasons stand below the table.
    both = tolerance.section(build([*one, *runs({"quest": falls(0.5)}, RNG, task="frontier_vt_4k", chance=None)]))
    assert not any("No relative error" in line for line in both.sentences) and both.figures
    assert "frontier_vt_4k: what chance scores is unknown" in both.tables[0].caption


@pytest.mark.parametrize("shared", [True, False])
def test_what_was_not_measured_is_not_within_anything(shared: bool) -> None:
    """Dense and sparse runs of one task share no document: it may be the one that tolerates least."""
    rows = runs({"quest": falls(0.5)}, RNG, task="frontier_niah_4k") + runs(
        {"quest": falls(0.3)}, RNG, task="frontier_vt_4k"
    )
    if not shared:
        for place, row in enumerate(rows):
            if row.method != "dense" and "vt" in row.task:
                ids = tuple(f"other {name}" for name in row.documents.ids)
                documents = row.documents.model_copy(update={"ids": ids})
                rows[place] = row.model_copy(update={"documents": documents})
    section = tolerance.section(build(rows), floor=lambda cell: None)
    assert any("the task that tolerates least" in line for line in section.sentences) == shared
    (figure,) = [one for one in section.figures if one.name.startswith("least_density")]
    if not shared:
        assert {panel.note for panel in figure.panels} == {""}
    flat = tolerance.section(build(runs({"quest": falls(0.0)}, RNG)), floor=lambda cell: None)
    (figure,) = [one for one in flat.figures if one.name.startswith("least_density")]
    assert all("as far as measured" in panel.note for panel in figure.panels)


def test_reasons_are_listed_once_and_shortly() -> None:
    out = [("a", "x"), ("b", "y"), ("c", "x"), ("a", "x")]
    assert ladder.because(out) == "a, c: x; b: y"
    assert ladder.because(out, 1) == "a and 1 more: x; and 1 more for other reasons"
    assert ladder.because([]) == ""
