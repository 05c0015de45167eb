"""The scaling law: planted coefficients, statsmodels' formulas as the oracle, hold-outs, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from curve_cases import build, record, runs
from scipy import stats

from lm_eval_sparse.analysis import law as laws
from lm_eval_sparse.analysis import scaling, study

RNG = np.random.default_rng()
DELTA = {"cwe": 0.4, "niah": 1.3, "quality": 0.0, "vt": -0.6}
ALPHA, BETA, GAMMA, EPS = 0.5, -0.3, -0.4, -6.5
SIZES, LENGTHS, SPARSITIES = (0.5e9, 1.5e9, 7e9), (4096, 16384, 65536), (0.0, 0.5, 0.8, 0.9, 0.95)


def planted(noise: float = 0.0, n: int = 100, sizes=SIZES, lengths=LENGTHS, tasks=tuple(DELTA)) -> laws.Runs:
    rows: list[tuple[Any, ...]] = []
    for size in sizes:
        for length in lengths:
            for task in tasks:
                shared = noise * RNG.normal()
                for step in SPARSITIES:
                    measured = step and step + RNG.uniform(-0.005, 0.005)
                    compression = 1 / (1 - measured)
                    eta = EPS + DELTA[task] + ALPHA * np.log(size) + BETA * np.log(length) + GAMMA * np.log(compression)
                    score = 1 / (1 + np.exp(-(eta + shared + noise * RNG.normal() / 3)))
                    rows.append((score, n, size, length, compression, step, task, f"{size}/{length}/{task}"))
    columns = list(zip(*rows, strict=True))
    return laws.Runs(*(np.array(c, float) for c in columns[:6]), *(np.array(c, object) for c in columns[6:]))


def test_planted_coefficients_come_back() -> None:
    law = laws.fit(planted())
    truth = {"eps": EPS, "alpha": ALPHA, "beta": BETA, "gamma": GAMMA, "delta niah": 1.3, "delta vt": -0.6}
    assert law.reference == "quality" and "delta quality" not in law.names
    assert {name: law[name] for name in truth} == pytest.approx(truth, abs=1e-6)
    assert law.r2 == pytest.approx(1) and law.clipped == 0 and law.fixed == ()


def test_bands_hold_planted_coefficients_and_are_those_of_clusters() -> None:
    """Runs of a cell share an error, so that plain errors would be too small: 95% bands must hold most truths."""
    held = []
    for _ in range(60):
        law = laws.fit(planted(noise=0.4))
        for name, truth in (("alpha", ALPHA), ("beta", BETA), ("gamma", GAMMA)):
            at = law.names.index(name)
            held.append(law.low[at] <= truth <= law.high[at])
    assert np.mean(held) > 0.85


def test_the_fit_is_that_of_statsmodels_formulas() -> None:
    runs_ = planted(noise=0.5)
    runs_ = replace(runs_, score=np.round(runs_.score * 100) / 100)
    frame = pd.DataFrame({name: getattr(runs_, name) for name in runs_.__dataclass_fields__})
    half = 0.5 / frame.n
    frame["y"] = stats.logistic.ppf(frame.score.clip(half, 1 - half))
    groups = frame.cluster.astype("category").cat.codes
    expected = smf.ols(
        "y ~ C(task, Treatment('quality')) + np.log(parameters) + np.log(length) + np.log(compression)", frame
    ).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    law = laws.fit(runs_)
    assert law.value == pytest.approx(expected.params.to_numpy(), rel=1e-6, abs=1e-8)
    assert law.stderr == pytest.approx(expected.bse.to_numpy(), rel=1e-6)
    limits = expected.conf_int().to_numpy()
    assert law.low == pytest.approx(limits[:, 0], rel=1e-6, abs=1e-8)
    assert law.high == pytest.approx(limits[:, 1], rel=1e-6, abs=1e-8)
    assert law.r2 == pytest.approx(expected.rsquared) and law.clusters == 36
    assert law.predict(runs_) == pytest.approx(stats.logistic.cdf(expected.predict(frame).to_numpy()), abs=1e-9)


def test_clustered_errors_are_those_of_the_sandwich() -> None:
    """Without statsmodels: the formula of Liang and Zeger with the usual correction for few clusters."""
    runs_ = planted(noise=0.5)
    law = laws.fit(runs_)
    x = np.column_stack(
        [np.ones(len(runs_))]
        + [(runs_.task == task).astype(float) for task in ("cwe", "niah", "vt")]
        + [np.log(runs_.parameters), np.log(runs_.length), np.log(runs_.compression)]
    )
    y = laws.logit(runs_.score, runs_.n)
    beta = np.linalg.lstsq(x, y, rcond=None)[0]
    bread = np.linalg.inv(x.T @ x)
    sums = np.stack([(x * (y - x @ beta)[:, None])[runs_.cluster == one].sum(0) for one in set(runs_.cluster)])
    groups, (rows, columns) = len(sums), x.shape
    correction = groups / (groups - 1) * (rows - 1) / (rows - columns)
    errors = np.sqrt(np.diag(bread @ (sums.T @ sums) @ bread) * correction)
    assert law.value == pytest.approx(beta, rel=1e-6) and law.stderr == pytest.approx(errors, rel=1e-5)
    half = stats.t.ppf(0.975, groups - 1) * errors
    assert law.high - law.low == pytest.approx(2 * half, rel=1e-5)


def test_scores_of_0_and_1_are_clipped_to_half_a_document() -> None:
    assert laws.logit(np.array([0.0, 1.0, 0.5]), np.array([100, 50, 10])) == pytest.approx(
        stats.logistic.ppf([0.005, 0.99, 0.5])
    )
    assert laws.logit(np.array([0.0]), np.array([100]), 0.02) == pytest.approx(stats.logistic.ppf(0.02))
    runs_ = planted()
    law = laws.fit(replace(runs_, score=np.where(runs_.score > 0.9, 1.0, runs_.score)))
    assert law.clipped == (runs_.score > 0.9).sum()


@pytest.mark.parametrize("axis", ["alpha", "beta", "gamma"])
def test_the_largest_of_an_axis_is_held_out(axis: str) -> None:
    runs_ = planted()
    found = laws.hold_out(runs_, axis)
    values = runs_.step if axis == "gamma" else getattr(runs_, laws.AXES[axis][0])
    out = values == values.max()
    assert found.value == values.max() and np.array_equal(found.measured, runs_.score[out])
    # A law that holds predicts what it never saw; the oracle of its figures is scipy.
    assert found.predicted == pytest.approx(runs_.score[out], abs=1e-6)
    noisy = planted(noise=0.6)
    found = laws.hold_out(noisy, axis)
    for task, (n, rank, p, error) in found.tasks.items():
        own = found.task == task
        expected = stats.spearmanr(found.measured[own], found.predicted[own])
        assert (n, rank, p) == (own.sum(), pytest.approx(expected.statistic), pytest.approx(expected.pvalue))
        assert error == pytest.approx(np.mean(np.abs(found.measured[own] - found.predicted[own])))
    # What was held out plays no part: other scores there give the same law.
    changed = replace(noisy, score=np.where(values == values.max(), 0.5, noisy.score))
    assert laws.hold_out(changed, axis).law.value == pytest.approx(found.law.value)


def test_an_axis_with_one_value_has_no_number() -> None:
    law = laws.fit(planted(sizes=SIZES[:1]))
    assert law.fixed == ("alpha",) and "alpha" not in law.names
    assert law["beta"] == pytest.approx(BETA) and law["gamma"] == pytest.approx(GAMMA)
    assert law["eps"] == pytest.approx(EPS + ALPHA * np.log(SIZES[0]))  # that is what the effect of size is part of
    assert "1 value of model size" in laws.hold_out(planted(sizes=SIZES[:1]), "alpha").why
    assert "2 values of length" in laws.hold_out(planted(lengths=LENGTHS[:2]), "beta").why


def test_what_cannot_be_told_apart_is_refused() -> None:
    runs_ = planted(noise=0.3)
    tied = (runs_.parameters == SIZES[0]) & (runs_.length == LENGTHS[0])
    tied |= (runs_.parameters == SIZES[2]) & (runs_.length == LENGTHS[2])
    assert "cannot be told apart" in laws.fit(runs_.where(tied))
    assert "a law of compression needs 3" in laws.fit(runs_.where(np.isin(runs_.step, (0, 0.9))))
    assert laws.fit(runs_.where(np.zeros(len(runs_), bool))).startswith("no runs of a task")
    one = runs_.where((runs_.parameters == SIZES[0]) & (runs_.length == LENGTHS[0]) & (runs_.task == "vt"))
    assert laws.fit(one) == "one model, task and length only"
    few = runs_.where((runs_.parameters == SIZES[0]) & np.isin(runs_.length, LENGTHS[:2]))
    assert np.isnan(laws.fit(few).stderr).all() and np.isfinite(laws.fit(few).value).all()  # 8 clusters, 6 coefficients


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_scores_that_are_all_the_same_have_no_r2_and_make_no_warning(score: float) -> None:
    runs_ = planted()
    runs_ = replace(runs_, score=np.full(len(runs_), score))
    law = laws.fit(runs_)
    assert np.isnan(law.r2) and law["gamma"] == pytest.approx(0, abs=1e-9)
    for axis in laws.AXES:
        assert np.isnan(laws.hold_out(runs_, axis).law.r2)


@pytest.mark.filterwarnings("error")
def test_a_prediction_far_outside_is_0_or_1() -> None:
    law, runs_ = laws.fit(planted()), planted()
    far = replace(law, value=law.value * 1e12)
    assert set(np.round(far.predict(runs_), 9)) <= {0.0, 1.0}


# -- the section


def made_up(sizes=(500_000_000, 7_000_000_000), lengths=((4096, "4k"), (16384, "16k"), (32768, "32k")), chance=None):
    found = []
    for size in sizes:
        for length, name in lengths:
            for task in ("niah", "vt", "quality"):
                top = {"niah": 0.9, "vt": 0.6, "quality": 0.7}[task] * (1 - 0.05 * np.log(8e9 / size))
                truths = {"quest": lambda s, top=top: top * (1 - 0.3 * s**4), "oracle_topk": lambda s, top=top: top}
                settings = {"model": f"org/{size}", "model_parameters": size, "length": length}
                found += runs(truths, RNG, task=f"frontier_{task}_{name}", **settings)
    return found


def test_a_section_says_what_was_fitted() -> None:
    section = scaling.section(build(made_up()), floor=lambda cell: None)
    text = " ".join(section.sentences)
    assert "decode, quest: gamma = -" in text and "scores fall with compression" in text
    assert {figure.name for figure in section.figures} == {"scaling_decode_oracle_topk", "scaling_decode_quest"}
    coefficients, held = section.tables
    names = {row[3] for row in coefficients.rows if row[1] == "quest" and row[2] == "nothing"}
    assert names == {"eps", "alpha", "beta", "gamma", "delta niah", "delta vt", "delta quality"}
    assert {row[2] for row in held.rows} == {"model size", "length", "compression"}
    # Dense attention is a run at compression 1, once a cell.
    ((quest, _),) = [
        (found, key) for key, found in scaling.gather(build(made_up()), lambda c: None)[0].items() if "quest" in key
    ]
    assert (quest.compression == 1).sum() == 18 and len(quest) == 18 * 5


def test_a_section_says_what_is_not_known() -> None:
    section = scaling.section(build(made_up(sizes=(7_000_000_000,))), floor=lambda cell: None)
    assert any("one model size only (7e+09); its effect is part of eps" in line for line in section.sentences)
    floors = scaling.section(build(made_up()), floor=lambda cell: "dense cannot do this task")
    (line,) = floors.sentences
    assert line.startswith("No scaling law is fitted, for want of runs: niah (org/500000000, 4,096 tokens), ")
    assert line.endswith(" and 13 more: dense cannot do this task.")
    unknown = [
        record("dense", 0.0, [1, 0] * 20, model_parameters=None),
        record("quest", 0.9, [1, 0] * 20, model_parameters=None),
    ]
    section = scaling.section(build(unknown), floor=lambda cell: None)
    assert not section.tables and "parameters not known" in section.sentences[0]
    mixed = [row for seed in (7, 8) for row in runs({"quest": lambda s: 0.9}, RNG, seed=seed)]
    (line,) = scaling.section(study.build(mixed, allow_mixed=True)).sentences
    assert "runs of it differ (seed 7)" in line and "(seed 8)" in line and "can do" not in line
    (line,) = scaling.section(build(mixed[:1]), floor=lambda cell: None).sentences
    assert line.endswith("niah (org/model, 4,096 tokens): no sparse run.")
    tied = made_up(sizes=(5_000_000,), lengths=((4096, "4k"),)) + made_up(sizes=(7_000_000,), lengths=((16384, "16k"),))
    (line,) = [line for line in scaling.section(build(tied), floor=lambda c: None).sentences if "quest" in line]
    assert "cannot be told apart" in line


def test_what_an_effect_rests_on_is_said() -> None:
    """A slope from two models is said as such, and none from one."""
    text = " ".join(scaling.section(build(made_up()), floor=lambda cell: None).sentences)
    for axis, many in (("alpha", "(2 sizes)"), ("beta", "(3 lengths)"), ("gamma", "(5 compressions)")):
        (line,) = [line for line in text.split("decode, ") if line.startswith(f"quest: {axis} = ")]
        assert line.strip().endswith(f"{many}.")
    section = scaling.section(build(made_up(sizes=(7_000_000_000,))), floor=lambda cell: None)
    assert not any("with model size" in line or "sizes)" in line for line in section.sentences)
    assert any("without a band (3 lengths, 9 cells)." in line for line in section.sentences)
