"""Relative errors and the sparsity they allow, against closed forms; lengths are compared only as bands allow."""

from __future__ import annotations

import numpy as np
import pytest
from curve_cases import build, runs
from scipy import stats

from lm_eval_sparse.analysis import ladder, tolerance

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
    assert not section.tables and not section.figures and section.sentences[0].startswith("No task here")
