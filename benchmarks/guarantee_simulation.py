"""How often certificates are false where the risks are known, and how many of the true ones are given.

Losses are drawn from distributions whose means are known; `lm_eval_sparse.analysis.guarantee` tests them as it tests
runs. A draw is false when anything certified in it has a mean loss at the tolerance or above. The share of such draws
may be the level at most. It is measured from a finite number of draws, so what is allowed is the level and 3 standard
errors of that many draws (`allowed`).

    python benchmarks/guarantee_simulation.py --output benchmarks/results/guarantee_simulation

writes .json and .md; `--seed` for other draws. tests/test_guarantee.py runs the same cases, smaller, on fresh draws.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_sparse.analysis import compare, guarantee

TOLERANCE, LEVEL = 0.05, 0.1


@dataclass(frozen=True)
class Case:
    """Chains of known mean losses.

    Attributes:
        risks: of each chain the mean losses, in the order of testing.
        n: documents of each chain.
        losses: a name in `DISTRIBUTIONS`.
        shared: which runs see the same documents: "levels" of a chain, "all" chains, too, or "none".
        family: how chains are put together: "holm", "bonferroni", "each alone", "worst task" or "group".
        order: "fixed", or "by outcome" (a wrong procedure, to see that the simulation sees it).
        cheapest: only the cheapest certified configuration counts: the furthest along a chain, of the first such chain.
    """

    name: str
    risks: tuple[tuple[float, ...], ...]
    n: int = 100
    losses: str = "binary"
    shared: str = "levels"
    family: str = "holm"
    order: str = "fixed"
    test: str = "hoeffding-bentkus"
    cheapest: bool = False


#: From uniform draws u in [0, 1) and means r in [0, .5] to losses in [0, 1] of that mean.
DISTRIBUTIONS = {
    "binary": lambda u, r: np.where(u < r, 1.0, 0.0),
    "halves": lambda u, r: np.where(u < 2 * r, 0.5, 0.0),
    # The mean of (1 - u)^k is 1 / (k + 1).
    "graded": lambda u, r: np.where(r > 0, (1 - u) ** (1 / np.where(r > 0, r, 1) - 1), 0.0),
    "heavy at 0": lambda u, r: np.where(u < 2 * r, u / np.where(r > 0, 2 * r, 1), 0.0),
    # Almost always less than what is rare and large: what a t-test of few documents does not see.
    "rare": lambda u, r: np.where(r > 0, np.where(u < 0.8 * r, 1.0, np.where(u > 0.7, 0.2 * r / 0.3, 0.0)), 0.0),
}

EDGE = TOLERANCE
CASES = (
    Case("knife edge, binary, n=45", ((EDGE,),), 45),
    Case("knife edge, binary, n=59", ((EDGE,),), 59),
    Case("knife edge, halves", ((EDGE,),), losses="halves"),
    Case("knife edge, graded", ((EDGE,),), losses="graded"),
    Case("knife edge, heavy at 0", ((EDGE,),), losses="heavy at 0"),
    Case("knife edge, rare", ((EDGE,),), 50, losses="rare"),
    Case("up and down", ((0.0, 0.01, 0.06, 0.0, EDGE, 0.02),)),
    Case("slowly upwards", ((0.0, 0.005, 0.01, 0.02, 0.03, 0.051),), 275, losses="graded"),
    Case("order, independent levels", ((EDGE,) * 10,), 45, shared="none"),
    Case("4 chains, independent", ((0.0, 0.0, EDGE), (0.0, EDGE), (0.06, 0.0), (0.0, 0.01, 0.02)), losses="graded"),
    Case("4 chains, same documents", ((0.0, 0.0, EDGE), (0.0, EDGE), (0.06, 0.0), (0.0, 0.01, 0.02)), shared="all"),
    Case("7 chains at the edge, independent", ((EDGE,),) * 7, 83),
    Case("7 chains at the edge, same documents", ((EDGE,),) * 7, 83, shared="all"),
    Case("7 chains at the edge, Bonferroni", ((EDGE,),) * 7, 83, family="bonferroni"),
    Case("3 get through, 1 at the edge", ((0.0,), (0.0, 0.0), (0.0,), (EDGE, 0.1))),
    Case("3 get through, 1 at the edge, Bonferroni", ((0.0,), (0.0, 0.0), (0.0,), (EDGE, 0.1)), family="bonferroni"),
    Case("worst of 3 tasks", ((0.0, 0.01), (0.0, 0.01), (0.0, EDGE)), 45, family="worst task"),
    Case("mean of 3 unlike tasks", ((0.0, 0.01), (0.005, EDGE), (0.01, 0.1)), 15, family="group"),
    Case("cheapest of 8 methods", ((0.0, EDGE),) * 8, cheapest=True),
    Case("cheapest of 8 methods, same documents", ((0.0, EDGE),) * 8, shared="all", cheapest=True),
)


def draw(case: Case, draws: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Losses (draws, chains, members, n) and their means (chains, members); nan behind the end of a chain."""
    members = max(map(len, case.risks))
    risks = np.array([[*chain, *[np.nan] * (members - len(chain))] for chain in case.risks])
    chains = 1 if case.shared == "all" else len(risks)
    u = rng.random((draws, chains, members if case.shared == "none" else 1, case.n))
    lost = DISTRIBUTIONS[case.losses](u, np.nan_to_num(risks)[:, :, None])
    return np.where(np.isnan(risks)[:, :, None], np.nan, lost), risks


def certify(case: Case, lost: np.ndarray, risks: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """What is certified (draws, chains, members), and the mean losses (chains, members) that this is about."""
    if case.family == "group":
        p, risks = guarantee.mean_over_tasks(list(np.moveaxis(lost, 1, 0)), TOLERANCE).p[:, None], risks.mean(0)[None]
    else:
        # Dense is right everywhere, so that losses are what is drawn.
        p = guarantee.tested(np.ones(case.n), 1 - lost, TOLERANCE, case.test).p
        if case.family == "worst task":
            p, risks = guarantee.every_task(np.moveaxis(p, 1, 0))[:, None], risks.max(0)[None]
    p = np.where(np.isnan(risks), 0.0, p)  # behind the end of a chain nothing holds it up
    if case.order == "by outcome":
        order = np.argsort(p, axis=-1)
        found = np.arange(p.shape[-1]) < guarantee.sequences(np.sort(p, axis=-1), level).certified[..., None]
        certified = np.zeros(p.shape, bool)
        np.put_along_axis(certified, order, found, -1)
    else:
        if case.family in ("each alone", "bonferroni"):
            share = level / (p.shape[1] if case.family == "bonferroni" else 1)
            count = guarantee.sequences(p[:, :, None], share).certified[..., 0]
        else:
            count = guarantee.sequences(p, level).certified
        certified = np.arange(p.shape[-1]) < count[..., None]
    return certified & ~np.isnan(risks), risks


def run(case: Case, draws: int, rng: np.random.Generator, level: float = LEVEL, **changed: Any) -> dict[str, float]:
    """Shares over draws: `false`, and `power`, of what is true and reachable the part that is certified.

    Reachable is what comes before the first hypothesis of a chain that is not to be rejected.
    """
    case = replace(case, **changed)
    false, power, done = 0, 0.0, 0
    while done < draws:
        size = min(draws - done, max(1, 4_000_000 // (len(case.risks) * max(map(len, case.risks)) * case.n)))
        certified, risks = certify(case, *draw(case, size, rng), level)
        bad = risks >= TOLERANCE - 1e-12
        reachable = ~np.maximum.accumulate(bad | np.isnan(risks), axis=-1)
        if case.cheapest:
            reached = certified.sum(axis=-1)
            chosen = np.argmax(reached, axis=-1)
            last = np.take_along_axis(reached, chosen[:, None], -1)[:, 0] - 1
            wrong = (last >= 0) & bad[chosen, last]
        else:
            wrong = (certified & bad).any(axis=(1, 2))
        false += int(wrong.sum())
        power += float((certified & reachable).sum(axis=(1, 2)).sum() / max(1, reachable.sum()))
        done += size
    return {"false": false / draws, "power": power / draws if reachable.any() else math.nan}


def allowed(level: float, draws: int, errors: float = 4.0) -> float:
    """The largest share of false draws that a rate of `level` gives, `errors` standard errors above it."""
    return level + errors * math.sqrt(level * (1 - level) / draws)


def wider() -> list[Case]:
    """Cases beyond those of the tests: the other tests, and how much is certified at what loss and n."""
    edge = [case for case in CASES if case.name.startswith(("knife", "up", "4 chains, same"))]
    found = [replace(case, test=test) for test in ("paired-t", "welch") for case in edge]
    found += [
        Case(f"knife edge, {name}, n={n}", ((EDGE,),), n, losses=name, test=test)
        for test in guarantee.TESTS
        for name in DISTRIBUTIONS
        for n in (10, 20, 200, 1000)
    ]
    found += [
        Case(f"loss {risk:g}, {name}, n={n}", ((risk,),), n, losses=name)
        for name in ("binary", "graded", "heavy at 0")
        for risk in (0.0, 0.005, 0.01, 0.025)
        for n in (50, 100, 200, 500)
    ]
    found += [
        replace(case, family="each alone", n=45 if "at the edge" in case.name else case.n)
        for case in CASES
        if len(case.risks) > 1 and case.family in ("holm", "bonferroni")
    ]
    return found


#: What two methods differ by, of documents that both answer: shares of -1, 0 and 1, or the two values of graded ones.
PAIRS = {
    "one loses, never the other": (0.0, 1.0),
    "both lose": (0.1, 1.0),
    "graded, one loses": (0.0, 0.25),
}


def tie_rates(draws: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """How often two methods are called tied although they differ by the margin, or different although they do not."""
    rows = []
    for name, (share, size) in PAIRS.items():
        for n in (50, 100, 400):
            row: dict[str, Any] = {"pairs": name, "n": n}
            for kind, gap in (("tie", TOLERANCE), ("ahead", 0.0)):
                up, down = gap / size + share, share
                u = rng.random((draws, n))
                change = np.where(u < up, size, np.where(u > 1 - down, -size, 0.0))
                found = compare.compare(change, np.zeros((draws, n)), TOLERANCE)
                p = found.p_tie if kind == "tie" else found.p_differ
                row[kind] = float(np.mean(p <= LEVEL))
            rows.append(row)
    return rows


Sample = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def _three(low: float, often: float, high: float, rarely: float) -> Sample:
    """Draws (draws, n) of a low value as often, of a high one as rarely, and of 0 else."""

    def sample(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        u = rng.random(shape)
        return np.where(u < often, low, np.where(u > 1 - rarely, high, 0.0))

    return sample


#: Differences of two methods by document, of a known mean: skewed ones, the hardest first, and even ones.
DIFFERENCES: dict[str, tuple[float, Sample]] = {
    "-.1 in 40 %, +1 in 4 %": (0.0, _three(-0.1, 0.4, 1.0, 0.04)),
    "-1 in 4 %, +.1 in 40 %": (0.0, _three(-1.0, 0.04, 0.1, 0.4)),
    "+1 in 2 %, a small loss else": (0.0, _three(-0.02 / 0.98, 0.98, 1.0, 0.02)),
    "+1 in 10 %, a small loss else": (0.0, _three(-0.1 / 0.9, 0.9, 1.0, 0.1)),
    "+.5 in 4 %, -.05 in 40 %": (0.0, _three(-0.05, 0.4, 0.5, 0.04)),
    "0/1, 10 % flip to either side": (0.0, _three(-1.0, 0.1, 1.0, 0.1)),
    "graded, normal, sd .2": (0.0, lambda rng, shape: np.clip(rng.normal(0, 0.2, shape), -1, 1)),
    "10 % lost": (0.1, _three(-1.0, 0.0, 1.0, 0.1)),
    "15 % lost, 5 % gained": (0.1, _three(-1.0, 0.05, 1.0, 0.15)),
    "graded, normal, mean .1, sd .3": (0.1, lambda rng, shape: np.clip(rng.normal(0.1, 0.3, shape), -1, 1)),
    "graded, normal, mean .05, sd .2": (0.05, lambda rng, shape: np.clip(rng.normal(0.05, 0.2, shape), -1, 1)),
}
LEVELS = (0.1, 0.05, 0.01)


def differ_rates(draws: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """How often two methods are called different, by `compare.compare` and by the plain paired t-test."""
    from scipy import stats

    rows = []
    for name, (mean, sample) in DIFFERENCES.items():
        for n in (20, 45, 100, 200):
            change = sample(rng, (draws, n))
            plain = np.full(draws, np.nan)
            varies = np.ptp(change, axis=1) > 1e-12  # of one value only, whatever it is, t is infinite
            plain[varies] = stats.ttest_1samp(change[varies], 0, axis=1).pvalue
            plain[~varies] = np.where(np.abs(change[~varies, 0]) > 1e-12, 0.0, 1.0)
            found = compare.compare(change, np.zeros_like(change), TOLERANCE).p_differ
            rates = {
                f"{kind} {a:g}": float(np.mean(p <= a)) for kind, p in (("t", plain), ("p", found)) for a in LEVELS
            }
            rows.append({"differences": name, "mean": mean, "n": n, **rates})
    return rows


def markdown(content: dict[str, Any]) -> str:
    """The tables, from the content of the JSON file."""
    rows, limit = content["rows"], content["allowed"]
    bound = "hoeffding-bentkus"
    guaranteed = [row for row in rows if row["test"] == bound and row["family"] != "each alone"]
    main = [row for row in guaranteed if row["tested"]]
    power = [row for row in guaranteed if row["name"].startswith("loss")]
    edge = [row for row in guaranteed if not row["tested"] and row["name"].startswith("knife")]
    worst = max(row["false"] for row in guaranteed)
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [
        "# Certificates where the risks are known",
        "",
        f"Made by `benchmarks/guarantee_simulation.py` (its head says what is drawn): {content['draws']} draws a "
        f"row, tolerance {TOLERANCE}, level {LEVEL}, seed {content['seed']}; {versions}. "
        "**False**: share of draws with a certificate for a mean loss at the "
        f"tolerance or above. {limit:.4f} is allowed: the level and 3 standard errors of that many "
        f"draws. The largest share of all {len(guaranteed)} rows with the bound is {worst:.4f}. **Power**: of what "
        "is true and can be reached in the order of testing, the part certified.",
        "",
        "## The procedures that are used",
        "",
        "Mean losses in the order of testing, chains apart by |. Knife edge is a mean loss of just the tolerance, "
        "the hardest that must not be certified.",
        "",
        "| case | mean losses | n | losses | family | false | power |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in main:
        chains = [", ".join(f"{risk:g}" for risk in chain) for chain in row["risks"]]
        shown = f"{chains[0]} (x{len(chains)})" if len(chains) > 1 and len(set(chains)) == 1 else " \\| ".join(chains)
        family = "one chain" if len(chains) == 1 else row["family"]
        lines.append(
            f"| {row['name']} | {shown} | {row['n']} | {row['losses']} | {family} | {row['false']:.4f} | "
            f"{_share(row['power'])} |"
        )
    lines += [
        "",
        "## Power: one run of a known mean loss",
        "",
        "| losses | mean loss | n=50 | 100 | 200 | 500 |",
        "|---|" * 1,
    ]
    lines[-1] = "|---|---|---|---|---|---|"
    for name in dict.fromkeys(row["losses"] for row in power):
        for risk in dict.fromkeys(row["risks"][0][0] for row in power):
            cells = [_share(r["power"]) for r in power if r["losses"] == name and r["risks"][0][0] == risk]
            lines.append(f"| {name} | {risk:g} | {' | '.join(cells)} |")
    lines += [
        "",
        "## What is not used, or not by default",
        "",
        "Rates above what is allowed are **bold**. The t-tests have no guarantee: where losses are rare, a few "
        "documents show none of them, and variance and mean are both too small. One run at the knife edge:",
        "",
        f"| losses | n | {' | '.join(guarantee.TESTS)} |",
        "|---|---|" + "---|" * len(guarantee.TESTS),
    ]
    for row in edge:
        others = [_other(rows, row, test) for test in guarantee.TESTS]
        lines.append(f"| {row['losses']} | {row['n']} | {' | '.join(_rate(x, limit) for x in others)} |")
    lines += [
        "",
        "Every chain at the whole level, instead of one family:",
        "",
        "| case | n | each alone |",
        "|---|---|---|",
    ]
    for row in rows:
        if row["family"] == "each alone" and "Bonferroni" not in row["name"]:
            lines.append(f"| {row['name']} | {row['n']} | {_rate(row['false'], limit)} |")
    lines += [
        "",
        "The order of levels taken from what they lost (ten levels at the edge, n=45): "
        f"{_rate(content['by_outcome'], limit)}.",
        "",
        "## Ties and leads",
        "",
        f"Two methods on the same documents, one comparison at level {LEVEL}, margin {TOLERANCE}. False tie: called "
        "tied although they differ by just the margin. False lead: called different although their means are equal. "
        "Both are t-tests with guards against few documents and no variance: approximations, as the reports say, whose "
        "worst rates `lm_eval_sparse/analysis/compare.py` states.",
        "",
        "| pairs | n | false tie | false lead |",
        "|---|---|---|---|",
        *(
            f"| {r['pairs']} | {r['n']} | {_rate(r['tie'], limit)} | {_rate(r['ahead'], limit)} |"
            for r in content["ties"]
        ),
        "",
        "How often two methods are called different at a level, by the plain paired t-test and by what is used: one "
        "more document against each side, and a Poisson bound on what was not seen. Where means are equal, rates above "
        "the level and 3 standard errors are **bold**; else it is power.",
        "",
        f"| differences | mean | n | {' | '.join(f'{kind}, {a:g}' for kind in ('t', 'used') for a in LEVELS)} |",
        "|---|---|---|" + "---|" * (2 * len(LEVELS)),
        *(
            f"| {r['differences']} | {r['mean']:g} | {r['n']} | "
            + " | ".join(
                _rate(r[f"{kind} {a:g}"], 1.0 if r["mean"] else allowed(a, content["draws"], 3.0))
                for kind in ("t", "p")
                for a in LEVELS
            )
            + " |"
            for r in content["differ"]
        ),
        "",
    ]
    return "\n".join(lines)


def _other(rows: Sequence[dict[str, Any]], row: dict[str, Any], test: str) -> float:
    return next(r["false"] for r in rows if r["name"] == row["name"] and r["test"] == test and not r["tested"])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _rate(value: float, limit: float) -> str:
    return f"**{value:.4f}**" if value > limit else f"{value:.4f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=20_250_423)
    parser.add_argument("--output", required=True, help="without a suffix: .json and .md are written")
    options = parser.parse_args()
    rng, rows, start = np.random.default_rng(options.seed), [], time.perf_counter()
    for tested, case in [*((True, case) for case in CASES), *((False, case) for case in wider())]:
        found = run(case, options.draws, rng)
        found["power"] = None if math.isnan(found["power"]) else found["power"]
        rows.append({**asdict(case), "tested": tested, **found})
        print(f"[{time.perf_counter() - start:5.0f} s] {case.name}, {case.family}, {case.test}: {found}", flush=True)
    order = next(case for case in CASES if case.name.startswith("order"))
    limit = allowed(LEVEL, options.draws, 3.0)
    content = {
        "draws": options.draws,
        "seed": options.seed,
        "tolerance": TOLERANCE,
        "level": LEVEL,
        "allowed": limit,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "scipy", "mapie")},
        },
        "ties": tie_rates(options.draws, rng),
        "differ": differ_rates(options.draws, np.random.default_rng([options.seed, 1])),
        "by_outcome": run(order, options.draws, rng, order="by outcome")["false"],
        "rows": rows,
    }
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(content))
    guaranteed = [r for r in rows if r["test"] == "hoeffding-bentkus" and r["family"] != "each alone"]
    above = [row["name"] for row in guaranteed if row["false"] > limit]
    print(f"false above what is allowed: {above or 'none'}")
    return 1 if above else 0


if __name__ == "__main__":
    raise SystemExit(main())
