"""A made-up study as sections of a report: what pages and pictures are looked at with."""

from __future__ import annotations

import math
import random

from lm_eval_sparse.analysis.figure import Figure, Panel, Section, Series, Table

MODELS = {"Qwen2.5-7B-Instruct": 7.6e9, "Qwen2.5-72B-Instruct": 72.7e9}
LENGTHS = (16384, 32768, 65536)
TASKS = ("niah", "squad", "vt", "cwe", "story_retrieval", "quality")
METHODS = ("block_sparse", "flexprefill", "quest", "vertical_slash")
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.87, 0.9, 0.93, 0.95)


def sections(seed: int = 0, *, models: int = 2, lengths: int = 3, tasks: int = 6, methods: int = 4) -> list[Section]:
    """Curves with bands, certificates with reasons, costs with a front, tolerance by length. Numbers are invented."""
    draw = random.Random(seed)
    names = [*MODELS, *(f"model-{n}" for n in range(len(MODELS), models))][:models]
    sizes = [*LENGTHS, *(LENGTHS[-1] * (n + 2) for n in range(lengths - len(LENGTHS)))][:lengths]
    jobs = [*TASKS, *(f"task_{n}" for n in range(len(TASKS), tasks))][:tasks]
    ways = [*METHODS, *(f"method_{n}" for n in range(len(METHODS), methods))][:methods]
    return [
        _curves(draw, names, sizes, jobs, ways),
        _cost(draw),
        _certificates(draw, names, jobs, ways),
        _lengths(draw),
    ]


def _curves(draw: random.Random, names, sizes, jobs, ways) -> Section:
    panels = []
    for model in names:
        for length in sizes:
            for task in jobs:
                dense = draw.uniform(0.35, 0.98) if task != "vt" or "72B" in model else 0.03
                series = [Series("dense", (0, 1), (dense, dense), (dense - 0.03,) * 2, (dense + 0.03,) * 2, "dashed")]
                for method in ways:
                    fall, bend = draw.uniform(0.05, 0.9), draw.uniform(3, 20)
                    x = [min(max(s + draw.gauss(0, 0.004), 0), 0.99) for s in SPARSITIES]
                    y = [max(dense * (1 - fall * s**bend) + draw.gauss(0, 0.006), 0) for s in x]
                    half = [2 * math.sqrt(max(v * (1 - v), 0.01) / 100) * 0.5 for v in y]
                    low = [max(v - h, 0) for v, h in zip(y, half, strict=True)]
                    high = [min(v + h, 1) for v, h in zip(y, half, strict=True)]
                    if method == "flexprefill":  # a run that failed leaves a gap
                        y[3] = None
                    series.append(
                        Series(method, x, y, low, high, hover=[f"n = 100, requested {s}" for s in SPARSITIES])
                    )
                oracle = [dense * (1 - 0.1 * s**12) for s in SPARSITIES]
                series.append(Series("oracle (top-p)", SPARSITIES, oracle, kind="dashed"))
                about = (("model", model), ("length", f"{length:,}"), ("task", task))
                note = "dense cannot do this task" if dense < 0.1 else ""
                title = f"{task}, {length // 1024}K, {model}"
                panels.append(
                    Panel(
                        title,
                        tuple(series),
                        "measured sparsity",
                        "accuracy (higher is better)",
                        note=note,
                        facets=about,
                    )
                )
    figure = Figure(
        "curves",
        "Score against measured sparsity",
        "Each line joins the runs of one method; bands are 95% paired bootstrap intervals over documents. "
        "The broken line is dense attention.",
        tuple(panels),
    )
    sentences = (
        f"{len(ways)} methods were measured on {len(jobs)} tasks at {len(sizes)} lengths with {len(names)} models.",
        "On niah at 16K, quest and vertical_slash are tied: the 95% interval of their difference holds 0.",
        "Qwen2.5-7B-Instruct cannot do vt with dense attention, so nothing is said of methods there.",
    )
    return Section("curves", "Curves", sentences, (figure,))


def _cost(draw: random.Random) -> Section:
    panels = []
    for phase, unit in (("Prefill", "FLOPs a prompt"), ("Decode", "bytes a step")):
        series, points = [], []
        for size, base in (("Qwen2.5-7B", 5.4e17), ("Qwen2.5-14B", 1.0e18), ("Qwen2.5-72B", 3.9e18)):
            cost = [base * (0.35 + 0.65 * (1 - s)) for s in (0, *SPARSITIES)]
            score = [0.5 + 0.12 * math.log10(base / 1e17) - 0.3 * s**9 + draw.gauss(0, 0.01) for s in (0, *SPARSITIES)]
            points += zip(cost, score, strict=True)
            said = [f"sparsity {s}, n = 900" for s in (0, *SPARSITIES)]
            low, high = [v - 0.017 for v in score], [v + 0.017 for v in score]
            series.append(Series(size, cost, score, low, high, kind="dots", hover=said))
        front, best = [], -1.0
        for cost, score in sorted(points):
            if score > best:
                front.append((cost, score))
                best = score
        x, y = zip(*front, strict=True)
        series.append(Series("Pareto front", x, y, kind="step", colour="dense"))
        panels.append(Panel(f"{phase}, 128K, batch 64", tuple(series), unit, "mean score of 9 tasks", log_x=True))
    figure = Figure("isocost", "Score against cost", "Costs are computed, GQA-aware, with estimators.", tuple(panels))
    rows = [("Qwen2.5-0.5B", "Qwen2.5-1.5B", length, "prefill", "no equal cost") for length in LENGTHS]
    table = Table("equal_cost", "Sizes of equal cost", ("small", "large", "length", "phase", "from"), tuple(rows))
    return Section("isocost", "Cost", ("At equal cost 72B sparse beats 14B dense.",), (figure,), (table,))


def _certificates(draw: random.Random, names, jobs, ways) -> Section:
    header = ("model", "task", "method", "length", "n", "dense", "certified sparsity", "mean loss", "p", "reason")
    rows = []
    for model in names:
        for task in jobs:
            for method in ways:
                dense = 0.03 if task == "vt" and "7B" in model else draw.uniform(0.4, 0.98)
                if dense < 0.1:
                    figures = (None, None, None, "dense cannot do this task: .030 is not 3 SE above chance")
                elif draw.random() < 0.2:
                    figures = (None, draw.uniform(0.04, 0.2), draw.uniform(0.1, 1), "the first run already loses more")
                else:
                    figures = (draw.choice(SPARSITIES), draw.uniform(0, 0.03), 10 ** draw.uniform(-6, -1), "")
                rows.append((model, task, method, draw.choice(LENGTHS), 100, dense, *figures))
    table = Table(
        "certificates",
        "Largest sparsity with a guarantee",
        header,
        tuple(rows),
        "Tolerance .05, level .1, fixed sequence from the smallest sparsity, Holm over tasks.",
    )
    x = [task for task in jobs for _ in (0,)]
    bars = [Series(way, x, [draw.choice((0.5, 0.7, 0.8, 0.9)) for _ in x], kind="dots") for way in ways]
    panel = Panel(names[0], tuple(bars), "task", "certified sparsity", facets=(("model", names[0]),))
    figure = Figure("certified", "Certified sparsity by task", "A point for each task and method.", (panel,))
    return Section("certificates", "Guarantees", ("quest is certified to .9 on 4 of 6 tasks.",), (figure,), (table,))


def _lengths(draw: random.Random) -> Section:
    x = (4096, 8192, 16384, 32768, 65536, 131072)
    lines = []
    for n, method in enumerate(METHODS):
        y = [min(0.5 + 0.07 * k + 0.02 * n + draw.gauss(0, 0.01), 0.97) for k in range(len(x))]
        lines.append(Series(method, x, y, [v - 0.03 for v in y], [v + 0.02 for v in y]))
    joined = Panel("relative error .1", tuple(lines), "length (tokens)", "largest sparsity", log_x=True)
    x = ("mean", "worst task", "a group with a rather long name of its own")
    bars = tuple(Series(m, x, [draw.uniform(0, 0.3) for _ in x], [0.0] * 3, [0.33] * 3, kind="bars") for m in METHODS)
    loss = Panel("loss at .95", bars, "over", "loss of score")
    figure = Figure("tolerance", "Tolerance by length", "Where the loss reaches the tolerance.", (joined, loss))
    return Section("tolerance", "Length", ("Larger sparsity is tolerated at larger length.",), (figure,))
