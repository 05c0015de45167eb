"""Flips, ties and leads against statsmodels and scipy, and what is said of a study."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mapie")
pytest.importorskip("statsmodels")
from few_studies import built, of, record, right
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.weightstats import ttost_paired

from lm_eval_sparse.analysis import compare, pairs
from lm_eval_sparse.analysis.certify import Options

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import guarantee_simulation as simulation


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


# -- arrays


def test_flips_are_statsmodels_exact_mcnemar(rng):
    dense = (rng.random(60) < 0.7).astype(float)
    sparse = (rng.random((20, 60)) < rng.random((20, 1))).astype(float)
    sparse[0] = dense
    found = compare.flips(dense, sparse)
    for i in range(20):
        table = [[np.sum((dense == a) & (sparse[i] == b)) for b in (1, 0)] for a in (1, 0)]
        assert found.lost[i] == table[0][1] and found.gained[i] == table[1][0] and found.n[i] == 60
        assert found.p[i] == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_graded_scores_fall_and_rise():
    found = compare.flips([0.5, 0.5, 0.5, np.nan, 1.0], [[0.25, 0.75, 0.5, 1.0, np.nan]])
    assert (found.lost[0], found.gained[0], found.n[0]) == (1, 1, 3)
    assert compare.graded([0, 1, 0.5]) and not compare.graded([0, 1, np.nan])


def test_differences_are_scipys_paired_t_with_one_more_document_against_each_side(rng):
    first, second = rng.random((20, 40)), rng.random((20, 40)) + rng.normal(0, 0.15, (20, 1))
    holes = rng.random((20, 40)) < 0.2
    found = compare.compare(first, np.where(holes, np.nan, second), 0.05)
    for i in range(20):
        change = (first[i] - second[i])[~holes[i]]
        above = stats.ttest_1samp([*change, -1.0], 0, alternative="greater").pvalue
        below = stats.ttest_1samp([*change, 1.0], 0, alternative="less").pvalue
        against, seen = sorted([change[change > 0].sum(), -change[change < 0].sum()])
        # A Poisson variable of mean m is at most k as often as a Gamma variable of shape k + 1 is above m.
        unseen = stats.gamma.sf(seen, against + 1)
        assert found.p_differ[i] == pytest.approx(max(min(1, 2 * above, 2 * below), unseen))
        assert found.difference[i] == pytest.approx(change.mean()) and found.n[i] == len(change)


def test_with_many_documents_a_difference_is_scipys_paired_t(rng):
    first = rng.random(20_000)
    second = first + rng.normal(0.006, 0.5, 20_000)
    plain = stats.ttest_rel(first, second).pvalue
    found = compare.compare(first, second, 0.05).p_differ
    # One more document, of a difference of 1, takes 1 / (sd sqrt(n)) from t, and a two-sided p changes by at most twice
    # the density at 0 for each unit of t: by .0113 here. What it adds to the deviation is below a hundredth of that.
    assert plain <= found <= plain + 1.01 * 2 * stats.norm.pdf(0) / (np.std(first - second) * np.sqrt(20_000))


def test_a_tie_is_tost_with_one_more_document_against_it(rng):
    first = rng.random((20, 80))
    second = first + rng.normal(0, 0.1, (20, 80)) + rng.normal(0, 0.03, (20, 1))
    found = compare.compare(first, second, 0.05)
    for i in range(20):
        change = first[i] - second[i]
        upper = stats.ttest_1samp([*change, 1.0], 0.05, alternative="less").pvalue
        lower = stats.ttest_1samp([*change, -1.0], -0.05, alternative="greater").pvalue
        assert found.p_tie[i] == pytest.approx(max(upper, lower, 0.95**80))
        # Where the plain test leans to a tie; against one, both are near 1 and either may be the larger.
        if (plain := ttost_paired(first[i], second[i], -0.05, 0.05)[0]) < 0.5:
            assert found.p_tie[i] >= plain - 1e-9


def test_with_many_documents_a_tie_is_statsmodels_tost(rng):
    first = rng.random(20_000)
    second = first + rng.normal(0.045, 0.5, 20_000)
    assert compare.compare(first, second, 0.05).p_tie == pytest.approx(
        ttost_paired(first, second, -0.05, 0.05)[0], abs=0.03
    )


def test_no_tie_from_fewer_documents_than_could_show_it():
    """A t-test of no variance, or of two documents, would call anything a tie."""
    for n in (2, 10, 44):
        assert compare.compare(np.ones(n), np.ones(n), 0.05).p_tie >= 0.95**n > 0.1
    assert compare.compare(np.ones(100), np.ones(100), 0.05).p_tie < 0.01
    assert compare.compare(np.ones(100), np.full(100, 0.94), 0.05).p_tie > 0.5, "a difference of .06 throughout"
    assert compare.compare([1.0], [1.0], 0.05).p_tie == 1


def test_no_lead_from_fewer_documents_than_could_show_it():
    assert compare.compare([1.0, 1.0], [0.0, 0.0], 0.05).p_differ >= 0.5
    assert compare.compare([1.0, 1.0], [1.0, 1.0], 0.05).p_differ == 1
    assert compare.compare(np.ones(10), np.zeros(10), 0.05).p_differ == pytest.approx(2**-9)
    for n in (20, 45, 100):
        # All alike and small: one document in (1 + small) / small that the other method fails would make up for it.
        for small in (0.001, 0.01, 0.02):
            missed = (1 - small / (1 + small)) ** n
            assert compare.compare(np.full(n, small), np.zeros(n), 0.05).p_differ > 0.9 * missed
    assert compare.compare(np.full(200, 0.1), np.zeros(200), 0.05).p_differ < 1e-6


def test_false_ties_stay_below_the_level(rng):
    """Methods that differ by just the margin. The plain TOST, as the control, calls more than the level allows tied."""
    draws, plain = 2000, 0
    change = (rng.random((draws, 50)) < 0.05).astype(float)
    found = compare.compare(change, np.zeros_like(change), 0.05)
    assert np.mean(found.p_tie <= 0.1) <= 0.1 + 4 * np.sqrt(0.09 / draws)
    sd = change.std(1, ddof=1) / np.sqrt(50)
    with np.errstate(divide="ignore"):
        plain = np.mean(stats.t.cdf((change.mean(1) - 0.05) / sd, 49) <= 0.1)
    assert plain > 0.2


@pytest.mark.parametrize("name", [name for name, (mean, _) in simulation.DIFFERENCES.items() if not mean])
def test_false_differences_stay_below_the_level(name):
    """Methods of the same mean. The plain t-test, as the control, calls up to half of skewed draws different."""
    draws, plain = 10_000, {}
    for n in (20, 45, 100, 200):
        change = simulation.DIFFERENCES[name][1](np.random.default_rng([20_250_423, n]), (draws, n))
        found = compare.compare(change, np.zeros_like(change), 0.05)
        for level in (0.1, 0.05):
            assert np.mean(found.p_differ <= level) <= simulation.allowed(level, draws), (n, level)
        assert np.mean(found.p_differ <= 0.01) <= simulation.allowed(0.016, draws), n
        with np.errstate(divide="ignore", invalid="ignore"):
            t = change.mean(1) / change.std(1, ddof=1) * np.sqrt(n)
        plain[n] = np.mean(2 * stats.t.sf(np.abs(t), n - 1) <= 0.05)
    if "else" in name or "in 40" in name:
        assert max(plain.values()) > 0.1


def test_the_worst_false_difference_is_what_is_stated():
    """One document of 1 among losses that make up for it: the chance of each number of them is known."""
    worst = dict.fromkeys((0.1, 0.05, 0.01, 0.001), 0.0)
    for n in (20, 24, 45, 100, 200):
        many = np.arange(n) < np.arange(n + 1)[:, None]
        for rare in np.geomspace(1 / n, 0.5, 60):
            change = np.where(many, 1.0, -rare / (1 - rare))
            p = compare.compare(change, np.zeros_like(change), 0.05).p_differ
            for level in worst:
                worst[level] = max(worst[level], stats.binom.pmf(np.arange(n + 1), n, rare) @ (p <= level))
    for level, most in ((0.1, 0.099), (0.05, 0.051), (0.01, 0.016), (0.001, 0.0031)):
        assert worst[level] <= most, level
    assert worst[0.01] > 0.01, "the limits are not out of reach"


@pytest.mark.parametrize(
    ("name", "n", "power"),
    [
        ("10 % lost", 100, 0.85),
        ("15 % lost, 5 % gained", 200, 0.8),
        ("graded, normal, mean .1, sd .3", 100, 0.7),
        ("graded, normal, mean .05, sd .2", 200, 0.7),
    ],
)
def test_honest_differences_are_found(name, n, power):
    change = simulation.DIFFERENCES[name][1](np.random.default_rng(7), (2000, n))
    assert np.mean(compare.compare(change, np.zeros_like(change), 0.05).p_differ <= 0.05) > power


# -- the section


def table(section, name):
    found = next(one for one in section.tables if one.name == name)
    return [dict(zip(found.header, row, strict=True)) for row in found.rows]


def test_ahead_tied_and_not_told_apart():
    study = built(of({"quest": {0.9: 0}, "snapkv": {0.9: 1}, "tova": {0.9: 40}, "knorm": {0.9: 4}}, phase="decode"))
    section = pairs.section(study)
    (row,) = table(section, "standings")
    assert row["highest"] == "quest" and row["ahead of"] == "tova" and row["ties with"] == "snapkv"
    assert row["not told apart from"] == "knorm" and row["comparisons"] == 6
    study = built(of({"quest": {0.9: 0}, "snapkv": {0.9: 1}}))
    assert any("at 0.9 quest and snapkv tie" in said for said in pairs.section(study).sentences)


def test_phases_and_sparsities_are_not_mixed_and_oracles_left_out():
    rows = of({"quest": {0.9: 0, 0.5: 0}})
    rows += [
        record("niah", "flexprefill", 0.9, right(100), phase="prefill"),
        record("niah", "oracle_topk", 0.9, right(100)),
    ]
    section = pairs.section(built(rows))
    assert not any(one.name == "standings" for one in section.tables)
    rows.append(record("niah", "tova", None, right(100), measured=0.91, knobs={"tova": {"capacity": 9}}))
    (row,) = table(pairs.section(built(rows)), "standings")
    assert row["sparsity"] == 0.9 and (row["measured from"], row["to"]) == (0.9, 0.91)
    rows[-1] = record("niah", "tova", None, right(100), measured=0.93, knobs={"tova": {"capacity": 9}})
    assert not any(one.name == "standings" for one in pairs.section(built(rows)).tables), ".03 apart"


def at(method, requested, measured, wrong=0):
    return record("niah", method, requested, right(100, wrong), measured=measured)


def compared(*runs):
    """Of each row what was requested, what was measured, and who was compared."""
    rows = table(pairs.section(built([record("niah", "dense", None, right(100))], list(runs))), "standings")
    names = ("highest", "ahead of", "ties with", "not told apart from")
    return [
        (
            row["sparsity"], row["measured from"], row["to"],
            {name for key in names for name in str(row[key]).split(", ") if name},
        )
        for row in rows
    ]  # fmt: skip


def nothing(*runs):
    section = pairs.section(built([record("niah", "dense", None, right(100))], list(runs)))
    return not any(one.name == "standings" for one in section.tables)


def test_methods_are_compared_where_they_were_measured_alike():
    """What was requested is no sparsity: quest at .9 was measured at .82 here."""
    assert nothing(at("quest", 0.9, 0.82, 30), at("snapkv", 0.9, 0.9))
    assert not any("ahead" in line for line in pairs.section(
        built([record("niah", "dense", None, right(100))], [at("quest", 0.9, 0.82, 30), at("snapkv", 0.9, 0.9)])
    ).sentences)  # fmt: skip
    assert compared(at("quest", 0.9, 0.885), at("snapkv", 0.9, 0.905)) == [(0.9, 0.885, 0.905, {"quest", "snapkv"})]
    assert nothing(at("quest", 0.9, 0.884), at("snapkv", 0.9, 0.905))


def test_a_run_that_was_measured_elsewhere_gives_way_to_the_nearest_one():
    runs = at("quest", 0.9, 0.82, 30), at("quest", 0.95, 0.91, 40), at("snapkv", 0.9, 0.9), at("snapkv", 0.95, 0.95)
    assert compared(*runs) == [(0.9, 0.9, 0.91, {"quest", "snapkv"})]
    # The same pair of runs is compared once, though it is found from both requests.
    (line,) = [
        line for line in pairs.section(built([record("niah", "dense", None, right(100))], list(runs))).sentences
        if "ahead" in line
    ]  # fmt: skip
    assert "at 0.9 snapkv is ahead of quest (margin" in line


def test_two_groups_of_one_request_are_two_rows():
    runs = [at("a", 0.9, 0.8), at("b", 0.9, 0.81), at("c", 0.9, 0.9), at("d", 0.9, 0.91)]
    assert compared(*runs) == [(0.9, 0.8, 0.81, {"a", "b"}), (0.9, 0.9, 0.91, {"c", "d"})]
    section = pairs.section(built([record("niah", "dense", None, right(100))], runs))
    (line,) = [line for line in section.sentences if "tie" in line]
    assert "at 0.9 (measured 0.800 to 0.810) a and b tie; at 0.9 c and d tie" in line
    (caption,) = [one.caption for one in section.tables if one.name == "standings"]
    assert "measured within 0.02 of each other" in caption


def test_no_level_holds_runs_further_apart_than_counts_as_the_same(rng):
    """And every pair of chains that has two runs that near is in some level, at random sparsities."""
    for _ in range(50):
        runs = [
            at(f"m{i}", requested, float(np.clip(requested + rng.normal(0, 0.015), 0.01, 0.99)))
            for i in range(4) for requested in (0.8, 0.84, 0.9)
        ]  # fmt: skip
        study = built([record("niah", "dense", None, right(100))], runs)
        found = pairs.levels(study.cells[0].chains)
        kept = []
        for value, members in found:
            measured = [point.measured for _, point in members]
            assert len(members) > 1 and max(measured) - min(measured) <= pairs.NEAR + 1e-9
            assert len({chain.label for chain, _ in members}) == len(members)
            assert value in (0.8, 0.84, 0.9)
            kept.append({id(point) for _, point in members})
        assert not any(
            one < other or (one == other and a != b) for a, one in enumerate(kept) for b, other in enumerate(kept)
        )
        for value in (0.8, 0.84, 0.9):
            same = [run for run in runs if run.requested == value]
            if max(run.measured for run in same) - min(run.measured for run in same) <= pairs.NEAR:
                assert any(len(members) == 4 and level == value for level, members in found)


def test_ties_of_few_documents_are_not_called_ties():
    study = built(of({"quest": {0.9: 0}, "snapkv": {0.9: 0}}, 40))
    (row,) = table(pairs.section(study), "standings")
    assert row["not told apart from"] == "snapkv" and row["ties with"] == ""


def test_flips_and_worst_task():
    study = built(of({"quest": {0.9: 12}}), of({"quest": {0.9: 3}}, task="vt"))
    section = pairs.section(study)
    first = next(row for row in table(section, "flips") if row["task"] == "niah")
    assert (first["lost"], first["gained"], first["documents"]) == (12, 0, 100)
    assert first["p"] == pytest.approx(2 * 0.5**12) and first["scores"] == "0 or 1"
    assert (
        "niah (org/model, 4,096 tokens): the only run loses more documents than it gains (McNemar, level 0.1): quest "
        "at 0.9 (-12, +0 of 100)." in section.sentences
    )
    several = pairs.section(built(of({"quest": {0.8: 0, 0.9: 12}})))
    assert any("1 of 2 runs lose more documents than they gain (McNemar, Holm over 2 runs, level 0.1)" in said
               for said in several.sentences)  # fmt: skip
    (worst,) = table(section, "worst_task")
    assert worst["worst task"] == "niah" and worst["fall"] == pytest.approx(0.12) and worst["tasks"] == 2
    assert worst["mean fall"] == pytest.approx(0.075)


def test_no_word_where_dense_cannot_do_the_task():
    rows = [record("niah", "dense", None, right(100, 98))]
    rows += [record("niah", name, 0.9, right(100, 98)) for name in ("quest", "snapkv")]
    section = pairs.section(built(rows), Options())
    assert section.sentences == () and [one.name for one in section.tables] == ["flips"]
    assert all("dense cannot" in row["why nothing is said"] for row in table(section, "flips"))


def test_methods_are_not_compared_on_documents_that_dense_cannot_do() -> None:
    dense = np.concatenate([np.ones(240), np.zeros(60)])
    part = np.concatenate([np.full(240, np.nan), np.zeros(60)])
    both = [record("niah", "dense", None, dense), *(record("niah", name, 0.9, part) for name in ("quest", "snapkv"))]
    assert not pairs.standings(built(both).primary[0], Options())
    whole = [record("niah", "dense", None, dense), *(record("niah", name, 0.9, dense) for name in ("quest", "snapkv"))]
    (found,) = pairs.standings(built(whole).primary[0], Options())
    assert len(found.tied) == 1
