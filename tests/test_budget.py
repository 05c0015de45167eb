"""`budget.solve` against trying every number of entries. BUDGET_SEED=<seed> repeats a run."""

from __future__ import annotations

import math
import os
import random

import pytest
import torch

from lm_eval_sparse.kernels.budget import bisect_share, closest_count, solve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("BUDGET_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"BUDGET_SEED={seed}")
    return random.Random(seed)


def best(admission: list[float], weight: list[int], goal: float) -> tuple[set[int], float]:
    """What is taken, and the least admission of it, by looking at all numbers of entries."""
    possible = [i for i, value in enumerate(admission) if value > -math.inf]
    order = sorted(possible, key=lambda i: (-admission[i], -i))
    forced = sum(value == math.inf for value in admission)
    apart = {many: abs(sum(weight[i] for i in order[:many]) - goal) for many in range(forced, len(order) + 1)}
    many = max(many for many in apart if apart[many] == min(apart.values()))
    return set(order[:many]), min((admission[i] for i in order[:many]), default=math.inf)


def test_all_numbers_of_entries(rng: random.Random) -> None:
    """Ties, forced and impossible entries, NaN, entries without weight, goals below the first and above all."""
    for _ in range(1500):
        number = rng.choice((1, 2, 7, 12))
        few = rng.choice(([0.0, 1.0], [rng.random() for _ in range(5)], [math.inf, 0.5, -math.inf], [0.1, math.nan]))
        admission = [rng.choice(few) for _ in range(number)]
        weight = [rng.choice((0, 0, 1, 2, rng.randrange(50))) for _ in range(number)]
        goal = rng.choice((-3.0, 0.0, 0.5, rng.uniform(0, sum(weight) + 3), float(sum(weight)), 1e9))
        taken, rest = solve(
            torch.tensor(admission, device=DEVICE).reshape(1, -1),
            torch.tensor(weight, device=DEVICE).reshape(1, -1),
            rng.choice((goal, torch.tensor(goal, dtype=torch.float64, device=DEVICE))),
        )
        admission = torch.tensor(admission).tolist()  # as fp32
        expected, least = best(admission, weight, goal)
        assert set(taken[0].nonzero().flatten().tolist()) == expected, (admission, weight, goal)
        assert float(rest) == least


def test_sums_that_are_no_fp32_numbers() -> None:
    """Pairs of a long prompt: neighbouring sums differ by less than fp32 can tell."""
    weight = torch.tensor([2**40, 1, 1, 1, 1], device=DEVICE)
    taken, _ = solve(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], device=DEVICE), weight, 2.0**40 + 2)
    assert taken.tolist() == [True, True, True, False, False]


def test_shapes_and_nothing() -> None:
    admission = torch.rand(2, 3, 4, device=DEVICE, dtype=torch.float64)
    taken, rest = solve(admission, torch.ones(2, 3, 4, dtype=torch.int64, device=DEVICE), 5)
    assert taken.shape == admission.shape and int(taken.sum()) == 5
    assert torch.equal(taken, admission >= rest)
    taken, rest = solve(admission[:0], torch.ones(0, 3, 4, dtype=torch.int64, device=DEVICE), 5)
    assert taken.shape == (0, 3, 4) and math.isinf(float(rest))
    for wrong in (torch.ones(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool), torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="expected"):
            solve(admission, wrong.to(DEVICE), 5)


@pytest.mark.gpu
def test_no_waiting() -> None:
    admission, weight = torch.rand(5000, device="cuda"), torch.ones(5000, dtype=torch.int64, device="cuda")
    goal = torch.tensor(7.0, dtype=torch.float64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        solve(admission, weight, 5.0), solve(admission, weight, goal)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bisections(rng: random.Random) -> None:
    """A share and a count come as close to what is asked for as any."""
    for _ in range(50):
        pairs = sorted(rng.randrange(1000) for _ in range(rng.randrange(2, 60)))
        goal = rng.uniform(-10, 1010)
        found = closest_count(lambda n, pairs=pairs: pairs[n], goal, 0, len(pairs) - 1)
        assert abs(pairs[found] - goal) == min(abs(value - goal) for value in pairs)
        slope, target = rng.uniform(0.05, 0.5), rng.uniform(0.01, 0.99)
        share = bisect_share(lambda rest, slope=slope: 1 - rest**slope, target)
        assert abs(1 - share**slope - target) <= 0.002
