"""Statistics of the analysis against scipy, statsmodels, MAPIE, closed forms and simulations, on fresh random data."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from few_studies import built, of
from scipy import stats

from lm_eval_sparse.analysis import bands as b
from lm_eval_sparse.analysis import compare as c
from lm_eval_sparse.analysis import cost, law, pareto
from lm_eval_sparse.analysis import guarantee as g
from lm_eval_sparse.analysis.certify import Options
from lm_eval_sparse.analysis.choice import choose
from lm_eval_sparse.analysis.costed import Configuration, Group
from lm_eval_sparse.analysis.equal import comparisons
from lm_eval_sparse.analysis.shapes import Sizes

mapie = pytest.importorskip("mapie.risk_control")
pd = pytest.importorskip("pandas")
smf = pytest.importorskip("statsmodels.formula.api")
sms = pytest.importorskip("statsmodels.stats.api")
SIDES = ("greater", "less")
PLANTED = np.array([-10.5, 0.5, -0.7, 0.65, -0.4, -0.45])  # eps, delta cwe, delta vt, alpha, beta, gamma


@pytest.fixture
def rng():
    """Fresh in every run; a failure prints the seed, and STATISTICS_SEED repeats it."""
    seed = int(os.environ.get("STATISTICS_SEED") or np.random.SeedSequence().entropy)
    print(f"STATISTICS_SEED={seed}")
    return np.random.default_rng(seed)


def at_most(hits: int, draws: int, rate: float) -> bool:
    """Whether so many hits are no evidence against `rate` (one run in a million fails by chance)."""
    return stats.binom.sf(hits - 1, draws, rate) > 1e-6


def bound(total: float, n: int, tolerance: float) -> float:
    """Hoeffding-Bentkus as Bates et al. (2021) print it."""
    kl = stats.entropy([m := min(total / n, tolerance), 1 - m], [tolerance, 1 - tolerance])
    return min(1.0, np.exp(-n * kl), np.e * stats.binom.cdf(np.ceil(total - 1e-9), n, tolerance))


def graph(chains: list[np.ndarray], level: float) -> list[int]:
    """The sequentially rejective graph of Bretz et al. (2009), Algorithm 1, hypothesis by hypothesis."""
    first = np.cumsum([0, *map(len, chains)])[:-1]
    p, size = np.concatenate(chains), sum(map(len, chains))
    w, edges, left = np.zeros(size), np.zeros((size, size)), set(range(size))
    w[first] = level / len(chains)
    edges[np.arange(size - 1), np.arange(1, size)] = 1
    for i, chain in enumerate(chains):
        edges[first[i] + len(chain) - 1] = [len(chains) > 1 and k in first and k != first[i] for k in range(size)]
    edges /= np.maximum(1, edges.sum(axis=1, keepdims=True))
    while out := [k for k in left if p[k] <= w[k]]:
        left.remove(k := out[0])
        w, new = w + w[k] * edges[k], np.zeros_like(edges)
        for i in left:
            for j in left - {i}:
                loop = edges[i, k] * edges[k, i]
                new[i, j] = (edges[i, j] + edges[i, k] * edges[k, j]) / (1 - loop) if loop < 1 else 0
        edges = new
    return [sum(k not in left for k in range(f, f + len(chain))) for f, chain in zip(first, chains, strict=True)]


def test_hoeffding_bentkus(rng):
    for n, tolerance in zip(rng.integers(1, 400, 40), rng.uniform(0.01, 0.6, 40), strict=True):
        total = np.append(rng.uniform(0, n, 5), rng.integers(0, n + 1, 5)) * rng.choice([0.1, 1], 10)
        ours = g.hoeffding_bentkus(total, n, tolerance)
        assert ours == pytest.approx([bound(t, n, tolerance) for t in total], rel=1e-9)
        theirs = mapie.methods.compute_hoeffding_bentkus_p_value(total[:5] / n, int(n), float(tolerance))[:, 0]
        assert ours[:5] == pytest.approx(np.minimum(theirs, 1), rel=1e-7)
    for n in (30, 45, 150):  # losses at the tolerance are rarely certified
        uniform = rng.random((8000, n))
        for sparse in (uniform > 0.1, rng.beta(9, 1, (8000, n)), 1 - 0.2 * (uniform < 0.5)):
            assert at_most(np.sum(g.tested(np.ones(n), sparse.astype(float), 0.1).p <= 0.1), 8000, 0.1)


def test_least_documents(rng):
    assert (g.least_documents(0.05, 0.1), g.least_documents(0.05, 0.1, chains=7)) == (45, 83)
    # The p-value is a saw in n: at a mean loss of .025 it is below .1 at 272 and above again at 281 to 287.
    assert [g.least_documents(0.05, 0.1, mean_loss=m) for m in (0.01, 0.025, 0.05)] == [94, 288, None]
    for chains in range(1, 10):
        tolerance, level = rng.uniform([0.02, 0.01], [0.3, 0.2])
        closed = int(np.ceil(np.log(level / chains) / np.log1p(-tolerance)))
        assert g.least_documents(tolerance, level, chains) == closed
        assert g.could_certify(closed, level, chains) <= tolerance < g.could_certify(closed - 1, level, chains)
        assert g.too_few(closed, tolerance, level, chains) is None and g.too_few(closed - 1, tolerance, level, chains)
        mean = rng.uniform(0, 0.5) * tolerance
        least = g.least_documents(tolerance, level, chains, mean)
        failing = (n for n in range(2 * least + 200, 0, -1) if bound(n * mean, n, tolerance) > level / chains)
        assert least == next(failing, 0) + 1


def test_sequences_are_the_graph_and_holm_and_fixed_sequence(rng):
    for draw in range(60):
        chains = [rng.random(rng.integers(1, 5)) ** rng.choice([1, 4, 8]) for _ in range(rng.integers(1, 6))]
        level = rng.uniform(0.02, 0.3)
        assert g.sequences(chains, level).certified.tolist() == graph(chains, level)
        p = rng.random(6) ** 3
        if draw < 3:  # it collects garbage, which takes long
            assert g.holm(p) == pytest.approx(sms.multipletests(p, method="holm")[1])
        assert np.sum(g.sequences(p[:, None], level).certified) == len(mapie.control_fwer(p, level, "bonferroni_holm"))
        assert g.sequences(p[None], level).certified[0] == len(mapie.control_fwer(p, level, "fixed_sequence"))
    assert g.sequences([[0.0, np.nan, 0.0]], 0.1).certified.tolist() == [1]
    shape = (20000, 5, 4)  # the family-wise error
    for first in (np.zeros(5, int), np.array([0, 4, 4, 4, 4]), rng.integers(0, 5, 5)):  # first true null of a chain
        true = np.arange(4) >= first[:, None]
        p = np.where(true, rng.random(shape), rng.random(shape) ** 12)
        same = stats.norm.cdf(rng.normal(size=(20000, 1, 1)) * 0.9 + rng.normal(size=shape) * 0.19**0.5)
        for q in (p, np.where(true, same, p)):  # independent nulls, and alike ones
            assert at_most(np.any(g.sequences(q, 0.1).certified > first, axis=1).sum(), 20000, 0.1)


def test_mean_over_tasks_with_unequal_documents(rng):
    lost = [rng.random((3, n)) ** 6 for n in (70, 41, 55)]
    lost[0][1, [2, 9]] = lost[1][2, :4] = np.nan
    result = g.mean_over_tasks(lost, 0.2)
    for run in range(3):
        rows = [task[run][~np.isnan(task[run])] for task in lost]
        total = sum(row[: (least := min(map(len, rows)))].sum() for row in rows)
        assert (result.n[run], result.p[run]) == (3 * least, pytest.approx(bound(total, 3 * least, 0.2)))
    # The mean over tasks is at the tolerance; that over all documents is .035.
    lost = [(rng.random((10000, n)) < m).astype(float) for n, m in ((60, 0.2), (400, 0.0), (60, 0.1))]
    assert at_most(np.sum(g.mean_over_tasks(lost, 0.1).p <= 0.1), 10000, 0.1)


def test_chance_gate(rng):
    for _ in range(300):
        n, chance, margin = int(rng.integers(2, 80)), rng.choice([0, 0.1, 0.25, 0.5]), rng.choice([0.02, 0.05, 0.1])
        score = rng.random(n) if rng.random() < 0.3 else (rng.random(n) < rng.random()).astype(float)
        above = score.mean() - chance
        good = above > margin and above > 3 * stats.sem(score)
        if n < 30:
            good &= bound(np.sum(1 - score), n, 1 - chance - margin) <= stats.norm.sf(3)
        assert (g.beats_chance(score, chance, margin) is None) == good
    assert [g.beats_chance(np.ones(n), c0) is None for n, c0 in ((2, 0), (3, 0), (5, 0.25), (6, 0.25))] == [0, 1, 0, 1]
    assert g.beats_chance(None, 0.0) and g.beats_chance(np.ones(90), None)
    for n in (4, 12, 29, 40, 120):  # models that guess: exactly, .0008 of them pass at n = 30
        passed = sum(g.beats_chance(row, 0.25) is None for row in (rng.random((600, n)) < 0.25).astype(float))
        assert at_most(passed, 600, 0.005)


def test_bands(rng):
    scores = np.stack([rng.beta(2, 1, 120), rng.normal(5, 3, 120), (rng.random(120) < 0.6).astype(float)])
    band, spread = b.bands(scores, bounds=None), stats.sem(scores, axis=1)
    theirs = stats.bootstrap((scores,), np.mean, axis=1, method="percentile", n_resamples=9999, rng=rng)
    assert np.all(np.abs(np.array([band.low, band.high]) - np.array(theirs.confidence_interval)) < 0.3 * spread)
    draws = b.resampled(np.stack([scores[0], scores[1], scores[0] - scores[1]]), "documents")
    assert np.allclose(draws[0] - draws[1], draws[2], atol=1e-4)
    hard = rng.beta(1, 1, (1500, 80))
    gap = (rng.random((1500, 80)) < hard).astype(float) - (rng.random((1500, 80)) < 0.8 * hard)
    for scores, mean in ((gap, 0.1), (rng.beta(1, 3, (1500, 60)), 0.25)):
        band = b.bands(scores, bounds=(-1.0, 1.0))
        assert 0.915 < np.mean((band.low <= mean) & (mean <= band.high)) < 0.975
    strata = [b.Stratum(rng.beta(a, 2, (1500, n)), str(a)) for a, n in ((1, 40), (2, 90), (4, 60))]
    band, mean = b.stratified(strata), np.mean([a / (a + 2) for a in (1, 2, 4)])
    assert 0.915 < np.mean((band.low <= mean) & (mean <= band.high)) < 0.975
    se = np.sqrt(sum(stats.sem(s.scores, axis=1) ** 2 for s in strata)) / 3
    assert np.mean(band.high - band.low) == pytest.approx(2 * 1.96 * np.mean(se), rel=0.05)
    for n, wrong in ((20, 0), (100, 0), (60, 1), (100, 3), (500, 4)):
        band = b.bands(np.stack([row := np.r_[np.zeros(wrong), np.ones(n - wrong)], 1 - row]))
        low, high = sms.proportion_confint(n - wrong, n, method="beta")
        assert [*band.low, *band.high] == pytest.approx([low, 1 - high, high, 1 - low])


def test_flips_are_mcnemar_and_ties_tost_with_a_document_against_them(rng):
    for n in rng.integers(5, 200, 30):
        dense, sparse = (rng.random((2, n)) < rng.random((2, 1))).astype(float)
        table = [[np.sum((dense == i) & (sparse == j)) for j in (1, 0)] for i in (1, 0)]
        ours = c.flips(dense, sparse)
        assert (ours.lost, ours.gained, ours.n) == (table[0][1], table[1][0], n)
        assert ours.p == pytest.approx(min(1, sms.mcnemar(table, exact=True).pvalue))
    for n in rng.integers(8, 300, 30):
        first, second, margin = rng.random(n), rng.random(n), rng.uniform(0.05, 0.3)
        ours = c.compare(first, second, margin)
        sides = [stats.ttest_rel(np.r_[first, i], np.r_[second, 1 - i], alternative=a) for i, a in enumerate(SIDES)]
        up, down = np.maximum(first - second, 0).sum(), np.maximum(second - first, 0).sum()
        unseen = stats.gamma.sf(max(up, down), min(up, down) + 1)
        assert ours.p_differ == pytest.approx(max(min(1, 2 * min(s.pvalue for s in sides)), unseen, 2.0 ** (1 - n)))
        above = sms.ttost_paired(np.r_[first, 1], np.r_[second, 0], -margin, margin)[2][1]  # difference below margin
        below = sms.ttost_paired(np.r_[first, 0], np.r_[second, 1], -margin, margin)[1][1]  # difference above -margin
        assert ours.p_tie == pytest.approx(max(above, below, (1 - margin) ** n))
    for n in (20, 45, 60, 125, 200):  # a true difference of the margin: the t-test holds its level only nearly
        lost = np.tri(n + 1, n, -1)  # 0, 1, ... n whole documents; the chance of each is known
        tied = c.compare(np.ones(n), 1 - lost, 0.1).p_tie <= 0.05
        assert stats.binom.pmf(np.arange(n + 1), n, 0.1) @ tied < 0.066


def test_t_tests_of_the_fall(rng):
    for n, tolerance in zip(rng.integers(3, 120, 25), rng.uniform(0.01, 0.3, 25), strict=True):
        dense, sparse = rng.random(n), np.clip(rng.normal(0.5, 0.3, n), 0, 1)
        there = ~(np.r_[[False] * 3, rng.random(n - 3) < 0.2])
        given = np.where(there, sparse, np.nan)
        x, y = dense[there], sparse[there]
        # "dense falls by more than the tolerance" is rejected where dense - tolerance is below sparse.
        paired = stats.ttest_rel(x - tolerance, y, alternative="less").pvalue
        apart = stats.ttest_ind(x - tolerance, y, equal_var=False, alternative="less").pvalue
        assert g.tested(dense, given, tolerance, "paired-t").p == pytest.approx(paired)
        assert g.tested(dense, given, tolerance, "welch").p == pytest.approx(apart)
        turned = stats.ttest_rel(y + tolerance, x, alternative="greater").pvalue
        assert paired == pytest.approx(turned)


def test_bca_by_leaving_one_out(rng):
    scores = np.stack([rng.exponential(size=50), rng.beta(0.3, 2, 50), rng.normal(size=50)])
    low, high = b.bca(scores, "task", level=0.9)
    for row, limits in zip(scores, np.c_[low, high], strict=True):
        draws = b.resampled(row[None], "task")[0].astype(float)
        left = np.array([np.delete(row, i).mean() for i in range(50)])
        down = left.mean() - left
        a = np.sum(down**3) / (6 * np.sum(down**2) ** 1.5)
        z0 = stats.norm.ppf(np.mean(draws < row.mean()))
        z = z0 + stats.norm.ppf([0.05, 0.95])
        expected = np.quantile(draws, stats.norm.cdf(z0 + z / (1 - a * z)))
        assert limits == pytest.approx(expected, abs=0.01 * np.ptp(expected))
    skewed = rng.exponential(size=(1500, 30))
    low, high = b.bca(skewed, "task")
    plain = b.bands(skewed, "task", None)
    held, of_plain = np.mean((low <= 1) & (high >= 1)), np.mean((plain.low <= 1) & (plain.high >= 1))
    assert held > of_plain and 0.89 < held < 0.97


def test_what_is_chosen_is_the_cheapest_that_the_graph_certifies(rng):
    names, levels, seen = ("quest", "snapkv", "tova", "knorm"), (0.5, 0.7, 0.8, 0.9), set()
    for _ in range(40):
        n, level = int(rng.integers(60, 130)), rng.uniform(0.05, 0.2)
        methods = names[: rng.integers(1, 5)]
        wrong = {
            task: {m: dict(zip(levels, np.sort(rng.choice(6, 4)) // rng.integers(1, 3), strict=True)) for m in methods}
            for task in ("niah", "vt")
        }
        study = built(*(of(runs, n, task=task) for task, runs in wrong.items()))
        price = dict(zip(((m, s) for m in methods for s in levels), rng.random(16), strict=False))
        found = choose(
            study,
            Options(level=level),
            lambda point, price=price: price.get((point.record.method, point.record.requested), 2.0),
            task=(task := str(rng.choice(["niah", "vt"]))),
        )
        chains = [np.array([bound(wrong[task][m][s], n, 0.05) for s in levels]) for m in methods]
        passed = graph(chains, level)
        certified = {(m, s) for m, count in zip(methods, passed, strict=True) for s in levels[:count]}
        assert {(one.label, one.sparsity) for one in found.certified} == certified
        assert found.family == len(methods)
        cheapest = min(certified, key=price.get, default=None)
        assert (found.best and (found.best.label, found.best.sparsity)) == cheapest
        seen.add(tuple(passed))
    assert len(seen) > 10


def configuration(label: str, sparsity: float, costs, scores) -> Configuration:
    """Of as many tasks as there are costs and rows of scores."""
    cell = SimpleNamespace(ids=tuple(range(len(scores[0]))))
    runs = {
        f"t{i}": SimpleNamespace(
            cell=cell,
            cost=SimpleNamespace(total=lambda phase, cost=cost: cost),
            point=SimpleNamespace(measured=sparsity, scores=row, record=SimpleNamespace(score=float(row.mean()))),
        )
        for i, (cost, row) in enumerate(zip(costs, scores, strict=True))
    }
    dense = label == "dense"
    return Configuration(
        "small" if dense and costs[0] < 5 else "large", label, () if dense else ("decode",), False, runs
    )


def test_equal_cost_by_walking_along_the_runs(rng):
    kinds = set()
    for _ in range(60):
        tasks, n, runs = int(rng.integers(1, 4)), int(rng.integers(25, 60)), int(rng.integers(1, 6))
        small = configuration("dense", 0.0, rng.uniform(2, 4, tasks), rng.random((tasks, n)))
        large = configuration("dense", 0.0, rng.uniform(7, 9, tasks), rng.random((tasks, n)))
        sparsities = np.sort(rng.uniform(0.05, 0.95, runs))
        ladder = [(s, 9 * (1 - s) * rng.uniform(0.6, 1.1, tasks), rng.random((tasks, n))) for s in sparsities]
        ladder[-1] = (sparsities[-1], rng.uniform(0.1, 1.9, tasks), ladder[-1][2])
        sparse = [configuration("quest", *one) for one in ladder]
        names = tuple(f"t{i}" for i in range(tasks))
        group = Group(None, "", names, dict.fromkeys(names, True), (small, large, *rng.permutation(sparse)))
        ((told,), cannot) = comparisons(group, "decode", lambda cell: None, 1, None)
        # A walk in small steps from dense attention to the sparsest run, all in between linear: where it is paid for.
        rows = [(0.0, large), *zip(sparsities, sparse, strict=True)]
        steps = np.linspace(0, runs, 400_001)
        places = np.arange(runs + 1)
        budget = np.mean([run.cost.total("decode") for run in small.runs.values()])
        means = [np.mean([run.cost.total("decode") for run in one.runs.values()]) for _, one in rows]
        costs = np.interp(steps, places, means)
        at = int(np.argmax(costs <= budget))
        at_least, part = int(np.ceil(steps[at])) - 1, steps[at] % 1 or 1.0
        documents = {
            task: (1 - part) * rows[at_least][1].runs[task].point.scores
            + part * rows[at_least + 1][1].runs[task].point.scores
            for task in names
        }
        gaps = [documents[task] - small.runs[task].point.scores for task in names]
        assert (told.kind, told.tasks, cannot) == ("equal", names, {})
        assert told.sparsity == pytest.approx(np.interp(steps[at], places, [s for s, _ in rows]), abs=1e-4)
        assert told.difference == pytest.approx(np.mean(gaps), abs=1e-4)
        assert told.large_score - told.small_score == pytest.approx(told.difference)
        assert told.error == pytest.approx(np.sqrt(sum(stats.sem(gap) ** 2 for gap in gaps)) / tasks, rel=1e-3)
        away = abs(told.difference) > stats.norm.ppf(0.975) * told.error
        assert told.better == (("large" if told.difference > 0 else "small") if away else None)
        kinds.add(told.better)
    assert None in kinds


def test_interpolation_and_front(rng):
    x, y = rng.permutation(rng.random(7)), rng.random(7)
    wanted = rng.uniform(x.min(), x.max(), 20)
    assert b.between(x, wanted) @ y == pytest.approx(np.interp(wanted, np.sort(x), y[np.argsort(x)]))
    assert np.all(np.isnan(b.between(x, [x.min() - 0.01, x.max() + 0.01])))
    assert b.between([0.2, 0.2, 0.6], [0.2, 0.4]) @ [0.0, 1.0, 0.9] == pytest.approx([0.5, 0.7])
    for _ in range(50):
        x, y = rng.integers(0, 6, (2, 15)).astype(float)
        x[rng.random(15) < 0.1] = np.nan
        beats = (x[:, None] <= x) & (y[:, None] >= y) & ((x[:, None] < x) | (y[:, None] > y))
        assert np.array_equal(pareto.front(x, y), ~beats.any(axis=0) & ~np.isnan(x))


def planted(rng) -> law.Runs:
    """Runs of a law with effects of a cluster and of a run."""
    i, j, k, t = (a.ravel() for a in np.indices((4, 4, 6, 3)))
    size, length, asked = np.array([7e9, 14e9, 32e9, 72e9])[i], 16384 * 2**j, np.array([1, 2, 3.33, 5, 10, 20])[k]
    squeeze = np.where(k > 0, asked * rng.uniform(0.97, 1.03, len(asked)), 1.0)  # measured, not asked for
    line = np.stack([t**0, t == 1, t == 2, np.log(size), np.log(length), np.log(squeeze)], axis=1) @ PLANTED
    line += rng.normal(0, 0.3, (4, 4, 3))[i, j, t] + rng.normal(0, 0.3, len(line))
    task, names = np.array(["quality", "cwe", "vt"])[t], np.array([f"{x}" for x in zip(i, j, t, strict=True)])
    return law.Runs(1 / (1 + np.exp(-line)), t * 0 + 200, size, length, squeeze, 1 - 1 / asked, task, names)


def frame(runs: law.Runs):
    p = np.clip(runs.score, 1 / (2 * runs.n), 1 - 1 / (2 * runs.n))
    y, x = np.log(p / (1 - p)), {"N": runs.parameters, "L": runs.length, "K": runs.compression, "task": runs.task}
    return pd.DataFrame({"y": y, **x})


def by_formula(runs: law.Runs):
    model = smf.ols("y ~ C(task, Treatment('quality')) + np.log(N) + np.log(L) + np.log(K)", frame(runs))
    return model.fit(cov_type="cluster", cov_kwds={"groups": pd.factorize(runs.cluster)[0]}, use_t=True)


def test_scaling_law_and_hold_outs(rng):
    runs = planted(rng)
    runs.score[:2] = 0.0, 1.0
    ours, theirs = law.fit(runs), by_formula(runs)
    assert ours.names == ("eps", "delta cwe", "delta vt", "alpha", "beta", "gamma")  # as patsy has them
    found = (ours.reference, ours.clusters, ours.clipped, ours.r2)
    assert found == ("quality", 48, 2, pytest.approx(theirs.rsquared))
    table = pd.concat([theirs.params, theirs.bse, theirs.conf_int()], axis=1).to_numpy()
    assert np.c_[ours.value, ours.stderr, ours.low, ours.high] == pytest.approx(table, rel=1e-5)
    inside = [(x.low <= PLANTED) & (x.high >= PLANTED) for x in (law.fit(planted(rng)) for _ in range(40))]
    assert np.mean(inside) > 0.82  # of 95% intervals
    runs = planted(rng)
    for axis, by in (("alpha", runs.parameters), ("beta", runs.length), ("gamma", runs.step)):
        out = runs.where(by == by.max())
        held, model = law.hold_out(runs, axis), by_formula(runs.where(by < by.max()))
        predicted = 1 / (1 + np.exp(-model.predict(frame(out)).to_numpy()))
        assert held.predicted[np.argsort(held.measured)] == pytest.approx(predicted[np.argsort(out.score)])
        assert held.law.r2 == pytest.approx(model.rsquared)
        assert set(held.tasks) == {"quality", "cwe", "vt"}
        for task, found in held.tasks.items():
            x, y = out.score[out.task == task], predicted[out.task == task]
            assert found == pytest.approx((len(x), *stats.spearmanr(x, y), np.abs(x - y).mean()))


def test_decode_shares_of_qwen():
    qwen = [(28, 3584, 28, 4, 18944), (48, 5120, 40, 8, 13824), (64, 5120, 40, 8, 27648), (80, 8192, 64, 8, 29568)]
    sizes = [Sizes(n, n, d, h, kv, 128, m, 152064) for n, d, h, kv, m in qwen]
    weights = np.array([n * (2 * d * d + 2 * d * 128 * k + 3 * d * m) + 152064 * d for n, d, _, k, m in qwen])
    for batch, shares in ((1, (7, 22, 35)), (8, (35, 67, 80)), (64, (80, 94, 97))):
        for length, share in zip((16384, 65536, 131072), shares, strict=True):
            cache = np.array([2 * n * length * 128 * kv * batch for n, _, _, kv, _ in qwen])
            ours = [cost.decode(s, length, batch=batch).attention_share for s in sizes]
            assert ours == pytest.approx(cache / (cache + weights)) and round(100 * np.mean(ours)) == share
