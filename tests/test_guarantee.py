"""Certificates against closed forms, MAPIE, scipy, statsmodels, a graph by brute force, and draws of known risks."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mapie")
pytest.importorskip("statsmodels")
from mapie.risk_control import control_fwer
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lm_eval_sparse.analysis import guarantee
from lm_eval_sparse.analysis.certify import Options
from lm_eval_sparse.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import guarantee_simulation as simulation


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


# -- losses and p-values


def test_losses_are_paired_clipped_and_keep_what_is_missing():
    dense = np.array([1.0, 0.5, 0.0, np.nan, 1.0])
    sparse = np.array([[0.0, 0.75, 0.5, 1.0, np.nan], [1.0, 0.25, 0.0, np.nan, 0.75]])
    lost = guarantee.losses(dense, sparse)
    np.testing.assert_array_equal(lost, [[1, 0, 0, np.nan, np.nan], [0, 0.25, 0, np.nan, 0.25]])
    for wrong in (1.5, -0.1):
        with pytest.raises(ValueError, match="outside"):
            guarantee.losses(np.array([wrong]), np.array([0.0]))


def test_gains_do_not_pay_for_losses():
    found = guarantee.tested([1, 1, 0, 0], [[0, 0, 1, 1]], 0.05)
    assert found.loss[0] == 0.5 and found.n[0] == 4


def exact_bound(total: Fraction, n: int, tolerance: float) -> float:
    """Hoeffding-Bentkus by its definition, the sum exact."""
    mean = float(total) / n
    kl = 0.0
    if mean < tolerance:
        kl = (mean * math.log(mean / tolerance) if mean else 0.0) + (1 - mean) * math.log((1 - mean) / (1 - tolerance))
    return min(math.exp(-n * kl), math.e * stats.binom.cdf(math.ceil(total), n, tolerance), 1.0)


def test_the_bound_is_its_definition_where_sums_carry_rounding(rng):
    losses, expected = [], []
    for _ in range(300):
        n = int(rng.integers(1, 200))
        tenths = rng.multinomial(1, [0.75, 0.1, 0.05, 0.05, 0.05], n) @ [0, 1, 2, 7, 3]
        losses.append(tenths / 10)
        expected.append(exact_bound(Fraction(int(tenths.sum()), 10), n, 0.07))
    # .1 + .2 + .7 and such, in float64, ten of .1, and k/n for which n * (k/n) is not k.
    for n, tenths in ((40, [1, 2, 7]), (60, [1] * 10), (90, [7, 1, 2, 10]), (80, [1] * 30)):
        losses.append(np.array([*tenths, *[0] * (n - len(tenths))]) / 10)
        expected.append(exact_bound(Fraction(sum(tenths), 10), n, 0.07))
    total, n = np.array([one.sum() for one in losses]), np.array([len(one) for one in losses])
    np.testing.assert_allclose(guarantee.hoeffding_bentkus(total, n, 0.07), expected, rtol=1e-9)


def test_a_sum_that_rounds_above_a_whole_number_counts_as_that_number():
    n = next(n for n in range(2, 500) for k in range(1, 9) if math.ceil(n * (k / n)) == k + 1)
    k = next(k for k in range(1, 9) if math.ceil(n * (k / n)) == k + 1)
    assert guarantee.hoeffding_bentkus(k, n, 0.3) == pytest.approx(exact_bound(Fraction(k), n, 0.3), rel=1e-9)


def test_many_runs_of_unequal_n_are_each_as_alone(rng):
    total, n = rng.random((3, 40)) * 5, rng.integers(0, 300, (3, 40))
    total = np.minimum(total, n)
    many = guarantee.hoeffding_bentkus(total, n, 0.05)
    assert many.shape == (3, 40)
    for i, j in ((0, 0), (1, 20), (2, 39)):
        assert many[i, j] == guarantee.hoeffding_bentkus(total[i, j], n[i, j], 0.05)
    assert (many[n == 0] == 1).all()


def test_missing_documents_are_left_out_of_pairs(rng):
    dense, sparse = rng.random(90), rng.random((4, 90))
    hole, holes = rng.random(90) < 0.2, rng.random((4, 90)) < 0.3
    found = {}
    for name in guarantee.TESTS:
        found = guarantee.tested(np.where(hole, np.nan, dense), np.where(holes, np.nan, sparse), 0.4, name)
        for i in range(4):
            there = ~hole & ~holes[i]
            alone = guarantee.tested(dense[there], sparse[i][there], 0.4, name)
            assert found.p[i] == pytest.approx(alone.p) and found.n[i] == there.sum()
            assert found.loss[i] == pytest.approx(alone.loss) and found.stderr[i] == pytest.approx(alone.stderr)
            assert found.stderr[i] == pytest.approx(stats.sem(np.maximum(0, dense - sparse[i])[there]))


def test_t_tests_are_those_of_scipy(rng):
    for n in (2, 3, 17, 120):
        dense, sparse = rng.random(n), rng.random((6, n))
        paired = guarantee.tested(dense, sparse, 0.05, "paired-t").p
        welch = guarantee.tested(dense, sparse, 0.05, "welch").p
        for i in range(6):
            assert paired[i] == pytest.approx(stats.ttest_1samp(dense - sparse[i], 0.05, alternative="less").pvalue)
            expected = stats.ttest_ind(dense, sparse[i] + 0.05, equal_var=False, alternative="less").pvalue
            assert welch[i] == pytest.approx(expected)


def test_t_tests_without_variance_say_what_the_bound_says():
    dense = np.ones(30)
    for name in ("paired-t", "welch"):
        assert guarantee.tested(dense, dense, 0.05, name).p == pytest.approx(0.95**30)
        assert guarantee.tested(dense, np.full(30, 0.9), 0.05, name).p == 1
        assert guarantee.tested([1.0], [1.0], 0.05, name).p == 1, "one document has no variance"


# -- several tasks


def test_a_group_takes_as_many_documents_of_each_task(rng):
    lost = [rng.random((3, 40)), rng.random((3, 70)), rng.random((3, 55))]
    lost[1][0, 5:60] = np.nan
    found = guarantee.mean_over_tasks(lost, 0.45)
    for i, few in enumerate((15, 40, 40)):
        first = [task[i][~np.isnan(task[i])][:few] for task in lost]
        assert found.n[i] == 3 * few
        assert found.loss[i] == pytest.approx(np.mean([task.mean() for task in first]))
        assert found.p[i] == pytest.approx(guarantee.hoeffding_bentkus(np.concatenate(first).sum(), 3 * few, 0.45))
        assert found.stderr[i] == pytest.approx(math.sqrt(sum(task.var(ddof=1) / few for task in first)) / 3)


def test_the_worst_task_is_the_largest_p():
    np.testing.assert_array_equal(guarantee.every_task([[0.01, 0.2], [0.04, 0.1]]), [0.04, 0.2])


# -- sequences


def test_one_chain_is_mapies_fixed_sequence(rng):
    for _ in range(200):
        p = rng.random(int(rng.integers(1, 9))) ** 4
        assert guarantee.sequences([p], 0.1).certified[0] == len(control_fwer(p, 0.1, "fixed_sequence"))


def test_one_member_each_is_statsmodels_holm(rng, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda *args: 0)  # multipletests collects garbage in every call
    for _ in range(200):
        p = rng.random(int(rng.integers(1, 9))) ** 5
        expected = multipletests(p, 0.1, "holm")[0]
        np.testing.assert_array_equal(guarantee.sequences([[one] for one in p], 0.1).certified, expected)
        np.testing.assert_allclose(guarantee.holm(p), multipletests(p, 0.1, "holm")[1], rtol=1e-12)
    many = rng.random((3, 5, 6)) ** 3
    np.testing.assert_array_equal(guarantee.holm(many)[2, 4], guarantee.holm(many[2, 4]))


def graph(chains: list[np.ndarray], level: float) -> list[int]:
    """Algorithm 1 of Bretz et al. (2009) with its update of all edges, hypothesis by hypothesis."""
    names = [(c, i) for c, chain in enumerate(chains) for i in range(len(chain))]
    p = {(c, i): chains[c][i] for c, i in names}
    weight = {name: level / len(chains) if name[1] == 0 else 0.0 for name in names}
    edge = {(a, b): 0.0 for a in names for b in names}
    for c, i in names:
        if i + 1 < len(chains[c]):
            edge[(c, i), (c, i + 1)] = 1.0
        else:
            for other in set(range(len(chains))) - {c}:
                edge[(c, i), (other, 0)] = 1 / (len(chains) - 1)
    left = set(names)
    while found := [name for name in left if p[name] <= weight[name] * (1 + 1e-12)]:
        j = found[0]
        left.discard(j)
        new = {}
        for a in left:
            weight[a] += weight[j] * edge[j, a]
            for b in left - {a}:
                back = edge[a, j] * edge[j, a]
                new[a, b] = (edge[a, b] + edge[a, j] * edge[j, b]) / (1 - back) if back < 1 else 0.0
        edge.update(new)
    return [sum((c, i) not in left for i in range(len(chain))) for c, chain in enumerate(chains)]


def test_several_chains_are_the_sequentially_rejective_graph(rng):
    seen = set()
    for _ in range(400):
        chains = [rng.random(int(rng.integers(1, 5))) ** 6 for _ in range(int(rng.integers(1, 6)))]
        found = guarantee.sequences(chains, 0.1).certified.tolist()
        assert found == graph(chains, 0.1)
        seen.add(tuple(found))
    assert len(seen) > 50


def test_many_families_at_once_and_what_was_not_measured(rng):
    p = rng.random((50, 3, 4)) ** 5
    p[rng.random(p.shape) < 0.1] = np.nan
    together = guarantee.sequences(p, 0.1)
    for i in range(50):
        alone = guarantee.sequences(list(p[i]), 0.1)
        np.testing.assert_array_equal(together.certified[i], alone.certified)
        assert together.level[i] == alone.level
    assert guarantee.sequences([[0.001, np.nan, 0.001]], 0.1).certified[0] == 1
    assert guarantee.sequences([], 0.1).certified.size == 0


# -- what n documents can say


@pytest.mark.parametrize(("mean", "chains", "n"), [(0, 1, 45), (0.01, 1, 94), (0.025, 1, 288), (0, 7, 83)])
def test_documents_that_are_needed(mean, chains, n):
    """The figures printed in the documentation."""
    assert guarantee.least_documents(0.05, 0.1, chains, mean) == n
    enough, short = (guarantee.hoeffding_bentkus(m * mean, m, 0.05) for m in (n, n - 1))
    assert enough <= 0.1 / chains < short
    if not mean:
        assert guarantee.could_certify(n, 0.1, chains) <= 0.05 < guarantee.could_certify(n - 1, 0.1, chains)


def test_more_documents_than_are_needed_certify_as_well(rng):
    """The last number that fails, by looking at all of them: some loss of .025 passes at 272 and fails at 281."""
    some = guarantee.hoeffding_bentkus(np.array([272, 281, 287, 288]) * 0.025, [272, 281, 287, 288], 0.05)
    assert (some <= 0.1).tolist() == [True, False, False, True]
    for draw in range(150):
        tolerance, level, chains = rng.uniform(0.01, 0.3), rng.uniform(0.005, 0.95), int(rng.integers(1, 9))
        mean = tolerance * (rng.uniform(0, 0.85) if draw else 0.97)
        found = guarantee.least_documents(tolerance, level, chains, mean)
        n = np.arange(1, 2 * found + 200)
        failing = n[guarantee.hoeffding_bentkus(n * mean, n, tolerance) > level / chains]
        assert found == max(failing, default=0) + 1


def test_losses_of_0_and_1_are_promised_the_whole_number_below():
    n = guarantee.least_documents(0.05, 0.1, mean_loss=0.03)
    for more in range(n, n + 300):
        assert guarantee.hoeffding_bentkus(math.floor(more * 0.03 + 1e-9), more, 0.05) <= 0.1


TINY = (5e-324, 1e-320, 1e-300, 1e-12, 0.05, 0.999, 1 - 1e-12, 1 - 2**-53)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("level", TINY)
@pytest.mark.parametrize("tolerance", TINY)
def test_tolerances_and_levels_next_to_0_and_1_are_answered(tolerance, level):
    options = Options(tolerance=tolerance, level=level, margin=tolerance)
    for chains in (1, 7):
        for mean in (0, 1e-17, 1e-9, 0.01, tolerance / 2, tolerance * 0.999, tolerance * (1 - 1e-9), tolerance):
            least = guarantee.least_documents(options.tolerance, options.level, chains, mean)
            assert least is None or 1 <= least <= 1_000_000
    for n in (0, 1, 45, 1_000_000, 10_000_000):
        assert 0 <= guarantee.could_certify(n, level, 3) <= 1
        said = guarantee.too_few(n, tolerance, level, 3)
        assert said is None or said.startswith(f"{n} documents are too few")
    for test in guarantee.TESTS:
        for sparse in (np.linspace(0, 1, 40), np.ones(40)):
            assert 0 <= guarantee.tested(np.ones(40), sparse, tolerance, test).p <= 1
    for chance in (0.0, 0.5):
        guarantee.beats_chance(np.ones(10), chance, options.margin)


def test_a_tolerance_that_no_number_of_documents_reaches():
    assert guarantee.least_documents(1e-320, 0.1) is None and guarantee.least_documents(1e-12, 0.1) is None
    assert "needs more than 1,000,000 even where" in guarantee.too_few(100, 1e-320, 0.1)
    assert guarantee.could_certify(100, 1e-320) == pytest.approx(1 - 10**-3.2)
    assert guarantee.least_documents(0.05, 0.1, mean_loss=0.0499) is None


@pytest.mark.filterwarnings("error")
def test_no_margin_and_no_chance_need_one_right_answer():
    assert guarantee.beats_chance(np.ones(3), 0.0, 0.0) is None
    assert "must exceed" in guarantee.beats_chance(np.zeros(3), 0.0, 0.0)


def test_no_number_of_documents_certifies_a_loss_at_the_tolerance():
    assert guarantee.least_documents(0.05, 0.1, mean_loss=0.05) is None
    assert guarantee.could_certify(0, 0.1) == 1


def test_too_few_documents_say_what_they_could():
    assert guarantee.too_few(45, 0.05, 0.1) is None
    said = guarantee.too_few(44, 0.05, 0.1)
    assert "needs 45" in said and "could certify 0.051" in said
    assert "in a family of 7 needs 83" in guarantee.too_few(45, 0.05, 0.1, 7)


def scores(right: int, wrong: int) -> np.ndarray:
    return np.array([1.0] * right + [0.0] * wrong)


def test_dense_must_beat_chance_by_three_errors_and_the_margin():
    assert guarantee.beats_chance(scores(60, 40), 0.25) is None
    assert "0.03 ± 0.02 against chance 0" in guarantee.beats_chance(scores(3, 97), 0.0), "within the margin"
    assert "standard errors" in guarantee.beats_chance(scores(35, 65), 0.25), ".10 above, 3 errors are .14"
    assert guarantee.beats_chance(scores(350, 650), 0.25) is None
    assert guarantee.beats_chance(scores(350, 650), 0.25, margin=0.1) is not None
    assert "cannot" in guarantee.beats_chance(scores(0, 100), 0.0)


def test_an_error_of_zero_from_few_documents_is_no_certainty():
    assert "too few" in guarantee.beats_chance(scores(2, 0), 0.0)
    assert guarantee.beats_chance(scores(3, 0), 0.0) is None
    assert "too few" in guarantee.beats_chance(np.full(3, 0.5), 0.0), "3 times .5 have no error either"
    assert "too few" in guarantee.beats_chance(scores(5, 0), 0.25)
    assert guarantee.beats_chance(scores(6, 0), 0.25) is None
    assert "too few" in guarantee.beats_chance(scores(1, 0), 0.0)
    assert "too few" in guarantee.beats_chance(scores(20, 0), 0.97, margin=0.02)


def test_the_bound_for_few_documents_is_no_weaker_than_three_errors(rng):
    """A model at chance + margin is let through in 1 of 741 draws at most, whatever it is made of."""
    passed = 0
    for right in range(9):
        if guarantee.beats_chance(scores(right, 8 - right), 0.25) is None:
            passed += stats.binom.pmf(right, 8, 0.3)
    assert 0 < passed <= stats.norm.sf(3)


def test_what_is_missing_is_a_refusal_that_says_what_to_type():
    assert "--chance niah=.25" in guarantee.beats_chance(scores(50, 0), None, task="niah")
    assert "no bands, no certificate" in guarantee.beats_chance(None, 0.0)
    assert "no document" in guarantee.beats_chance(np.array([np.nan]), 0.0)


@pytest.mark.parametrize("wrong", [{"tolerance": 0}, {"tolerance": 1.0}, {"level": float("nan")}, {"margin": -0.1}])
def test_options_that_mean_nothing_are_one_line(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        guarantee.check_options(**{"tolerance": 0.05, "level": 0.1, **wrong})
    with pytest.raises(UserError, match="did you mean 'paired-t'"):
        guarantee.check_options(0.05, 0.1, "paired_t")
    with pytest.raises(UserError, match=r"^--tolerance 2: give a number"):
        guarantee.check_options(2.0, 0.1)


# -- simulation with known risks: a small form of benchmarks/guarantee_simulation.py on fresh draws


DRAWS = 1500


@pytest.mark.parametrize("case", simulation.CASES, ids=lambda case: case.name)
def test_false_certificates_stay_below_the_level(case, rng):
    found = simulation.run(case, DRAWS, rng)
    assert found["false"] <= simulation.allowed(0.1, DRAWS), case


def test_a_wrong_level_would_be_seen(rng):
    """The control: the same draws at a level five times too high fail the test above."""
    case = next(case for case in simulation.CASES if case.name == "knife edge, binary, n=59")
    near = next(case for case in simulation.CASES if case.name == "knife edge, binary, n=45")
    assert simulation.run(near, DRAWS, rng)["false"] > 0.06, "the level is used up: 45 of 45 without a loss have .0994"
    assert simulation.run(case, DRAWS, rng, level=0.5)["false"] > simulation.allowed(0.1, DRAWS)


def test_an_order_taken_from_the_data_would_be_seen(rng):
    """The control: testing the levels by how little they lost, each at the whole level, certifies falsely."""
    case = next(case for case in simulation.CASES if case.name == "order, independent levels")
    assert simulation.run(case, DRAWS, rng)["false"] <= simulation.allowed(0.1, DRAWS)
    assert simulation.run(case, DRAWS, rng, order="by outcome")["false"] > simulation.allowed(0.1, DRAWS)


def test_cheapest_without_a_common_family_would_be_seen(rng):
    """The control: each method at the whole level, then the cheapest certified one."""
    case = next(case for case in simulation.CASES if case.name == "cheapest of 8 methods")
    assert simulation.run(case, DRAWS, rng, family="each alone")["false"] > simulation.allowed(0.1, DRAWS)
