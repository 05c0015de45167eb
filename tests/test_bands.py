"""Bands of mean scores against scipy, closed forms and simulations; interpolation against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lm_eval_sparse.analysis import bands as b

RNG = np.random.default_rng()


def scipy_limits(samples, statistic, method="percentile", draws=20_000, **more):
    found = stats.bootstrap(
        samples, statistic, n_resamples=draws, method=method, batch=1000, rng=np.random.default_rng(), **more
    ).confidence_interval
    return float(found.low), float(found.high)


def test_percentile_bands_are_those_of_scipy() -> None:
    scores = np.stack([RNG.random(80), RNG.beta(0.4, 0.2, 80), (RNG.random(80) < 0.6).astype(float)])
    found = b.bands(scores, "task")
    assert found.value == pytest.approx(scores.mean(axis=1)) and found.why == ("", "", "")
    for row, low, high in zip(scores, found.low, found.high, strict=True):
        # Both are Monte Carlo; a limit of 2,000 draws has an error of some 5% of the band's half width.
        assert (low, high) == pytest.approx(scipy_limits((row,), np.mean), abs=0.15 * (high - low) / 2)


def test_differences_are_paired() -> None:
    hard = RNG.random(100)
    dense, sparse = np.clip(hard + 0.02, 0, 1), np.clip(hard - 0.02 * RNG.random(100), 0, 1)
    found = b.bands(dense - sparse, "task", (-1, 1))
    low, high = scipy_limits((dense, sparse), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True)
    assert found.low[0] == pytest.approx(low, abs=0.2 * (high - low)) and found.low[0] > 0
    # The same draws of both runs: the draws of their difference are the differences of their draws.
    draws = b.resampled(np.stack([dense, sparse, dense - sparse]), "task")
    assert draws[0] - draws[1] == pytest.approx(draws[2], abs=1e-6)


def test_bca_is_scipys() -> None:
    scores = np.stack([RNG.exponential(size=60), RNG.beta(0.3, 3, 60)])
    low, high = b.bca(scores, "task")
    for row, *limits in zip(scores, low, high, strict=True):
        assert limits == pytest.approx(scipy_limits((row,), np.mean, "BCa"), abs=0.2 * (limits[1] - limits[0]) / 2)


def test_means_over_tasks_are_drawn_within_tasks() -> None:
    one, two, three = RNG.random(40), RNG.random(70) < 0.5, RNG.random(25) ** 3
    strata = [b.Stratum(x[None].astype(float), str(i)) for i, x in enumerate((one, two, three))]
    found = b.stratified(strata)
    low, high = scipy_limits((one, two, three), lambda x, y, z, axis: (x.mean(axis) + y.mean(axis) + z.mean(axis)) / 3)
    assert found.value[0] == pytest.approx((one.mean() + two.mean() + three.mean()) / 3)
    assert (found.low[0], found.high[0]) == pytest.approx((low, high), abs=0.15 * (high - low) / 2)


def test_the_same_data_has_the_same_bands_and_other_documents_other_draws() -> None:
    scores = RNG.random((4, 50))
    assert all(
        np.array_equal(getattr(b.bands(scores, "a"), k), getattr(b.bands(scores, "a"), k)) for k in ("low", "high")
    )
    assert not np.array_equal(b.resampled(scores, "a"), b.resampled(scores, "b"))
    correlation = np.corrcoef(b.resampled(scores[:1], "a")[0], b.resampled(scores[:1], "b")[0])[0, 1]
    assert abs(correlation) < 0.12  # independent: 2,000 draws have a standard error of .022


def test_big_sets_of_documents_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = RNG.random((3, 300))
    whole = b.resampled(scores, "big")
    monkeypatch.setattr(b, "_KEPT", 300 * 64)
    assert b.resampled(scores, "big") == pytest.approx(whole, abs=1e-6)
    assert sum(len(block) for block in b._drawn(300, "big", 2000)) == 2000
    assert all((block.sum(axis=1) == 300).all() for block in b._drawn(300, "big", 2000))


def test_a_missing_document_is_left_out_of_its_run_only() -> None:
    scores = RNG.random((2, 60))
    scores[1, 7] = np.nan
    found = b.bands(scores, "task")
    assert found.value == pytest.approx(np.nanmean(scores, axis=1))
    low, high = scipy_limits((np.delete(scores[1], 7),), np.mean)
    assert (found.low[1], found.high[1]) == pytest.approx((low, high), abs=0.15 * (high - low) / 2)
    gone = b.bands(np.full((1, 60), np.nan), "task")
    assert np.isnan(gone.value[0]) and np.isnan(gone.low[0]) and gone.why == ("not measured",)


def test_few_documents_have_no_band() -> None:
    found = b.bands(RNG.random((1, b.LEAST - 1)), "task")
    assert np.isfinite(found.value[0]) and np.isnan([found.low[0], found.high[0]]).all()
    assert found.why == (f"{b.LEAST - 1} documents; a band needs {b.LEAST}",)
    assert b.bands(RNG.random((1, b.LEAST)), "task").why == ("",)


@pytest.mark.parametrize("n", [20, 100])
def test_scores_that_are_all_alike_have_the_limits_of_clopper_and_pearson(n: int) -> None:
    found = b.bands(np.stack([np.zeros(n), np.ones(n)]), "task")
    exact = [stats.binomtest(k, n).proportion_ci(0.95, "exact") for k in (0, n)]
    assert (found.low[0], found.high[0]) == pytest.approx((0, exact[0].high))
    assert (found.low[1], found.high[1]) == pytest.approx((exact[1].low, 1))
    equal = b.bands(np.zeros((1, n)), "task", (-1, 1))  # no document changed: some may that were not asked
    assert (equal.low[0], equal.high[0]) == pytest.approx((-exact[0].high, exact[0].high))
    unbounded = b.bands(np.full((1, n), 3.5), "task", None)
    assert np.isnan(unbounded.low[0]) and "same score" in unbounded.why[0]


def test_accuracies_near_a_bound_have_exact_limits() -> None:
    for k in range(1, b.RARE):
        scores = np.zeros(70)
        scores[RNG.choice(70, k, replace=False)] = 1
        found = b.bands(np.stack([scores, 1 - scores]), "task")
        for row, right in enumerate((k, 70 - k)):
            limits = stats.binomtest(right, 70).proportion_ci(0.95, "exact")
            assert (found.low[row], found.high[row]) == pytest.approx((limits.low, limits.high))


def test_a_task_without_spread_widens_a_mean_over_tasks() -> None:
    spread = RNG.random(100)
    alone = b.bands(spread, "a")
    both = b.stratified([b.Stratum(spread[None], "a"), b.Stratum(np.ones((1, 100)), "b")])
    below = np.hypot(alone.value[0] - alone.low[0], b.unseen(100)) / 2
    assert both.value[0] - both.low[0] == pytest.approx(below, rel=1e-3)
    assert both.high[0] - both.value[0] == pytest.approx((alone.high[0] - alone.value[0]) / 2, rel=1e-3)


@pytest.mark.parametrize("truth", [0.5, 0.965, 0.995])
def test_bands_cover_what_they_should(truth: float) -> None:
    """Accuracies of 100 documents: percentiles alone cover .995 in two of five samples only, .965 in 88%."""
    found = b.bands((RNG.random((3000, 100)) < truth).astype(float), "task")
    covered = ((found.low <= truth + 1e-9) & (truth - 1e-9 <= found.high)).mean()
    assert covered > 0.91


def test_interpolation_is_numpys_and_nothing_is_extrapolated() -> None:
    for size in (1, 2, 3, 9):
        x = np.sort(RNG.random(size)) * 0.9
        y = RNG.random((size, 5))
        wanted = np.concatenate([RNG.random(40), x, b.PAPER])
        found = b.between(x, wanted) @ y
        expected = np.stack([np.interp(wanted, x, column, np.nan, np.nan) for column in y.T], axis=1)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        shuffled = RNG.permutation(size)
        np.testing.assert_allclose(b.between(x[shuffled], wanted) @ y[shuffled], expected, atol=1e-12)
    assert b.between([], [0.5]).shape == (1, 0)


def test_runs_at_the_same_sparsity_count_with_their_mean() -> None:
    assert b.between([0.2, 0.5, 0.5, 0.8], [0.5, 0.65]) @ [0, 1, 2, 0] == pytest.approx([1.5, 0.75])


def test_interpolated_documents_lack_those_that_either_run_lacks() -> None:
    scores = np.array([[1.0, np.nan, 0.0], [0.0, 1.0, np.nan]])
    found = b.interpolated(b.between([0.2, 0.6], [0.2, 0.4, 0.9]), scores)
    np.testing.assert_allclose(found, [[1, np.nan, 0], [0.5, np.nan, np.nan], [np.nan] * 3])


def test_bands_of_interpolated_values_are_those_of_interpolated_documents() -> None:
    scores = (RNG.random((2, 100)) < [[0.9], [0.5]]).astype(float)
    found = b.bands(b.interpolated(b.between([0.5, 0.9], [0.6]), scores), "task")
    mixed = 0.75 * scores[0] + 0.25 * scores[1]
    low, high = scipy_limits((mixed,), np.mean)
    assert (found.low[0], found.high[0]) == pytest.approx((low, high), abs=0.15 * (high - low) / 2)


def test_large_numbers_keep_their_bands() -> None:
    scores = RNG.random((1, 50))
    plain, shifted = b.bands(scores, "task", None), b.bands(scores + 4096, "task", None)
    assert shifted.high - shifted.low == pytest.approx(plain.high - plain.low, rel=0.02)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0), (0.0, np.inf), (np.array([0, -np.inf, 0, 0]), 1.0)])
def test_bounds_and_scores_that_are_infinite_or_missing_make_no_warning(bounds) -> None:
    spread, rare = RNG.random(30), np.r_[1.0, np.zeros(29)]
    rows = np.stack([np.full(30, np.nan), np.full(30, 2.0), spread, rare])
    found = b.bands(rows, "task", bounds)
    assert found.why[0] == "not measured" and np.isnan(found.low[0]) and found.why[2] == ""
    alone = b.bands(spread, "task", None if bounds is None else (0.0, 1.0))
    assert (found.low[2], found.high[2]) == pytest.approx((alone.low[0], alone.high[0]))
    if bounds is None:
        assert "nothing bounds" in found.why[1]
    assert b.bands(np.full((4, 30), np.inf), "task", bounds).why == ("not measured",) * 4
    assert b.bands(np.zeros((4, 0)), "task", bounds).why == ("not measured",) * 4
    huge = b.bands(RNG.random((4, 30)) * 1e300, "task", None)
    assert huge.why == ("scores too large to resample",) * 4 and np.isfinite(huge.value).all()
    low, high = b.quantiles(np.array([[np.nan] * 5, [np.nan, 0, 1, 2, 3]]), 0.5)
    np.testing.assert_allclose([low, high], [[np.nan, 0.75], [np.nan, 2.25]])
