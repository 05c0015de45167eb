"""Budgets in torch: a sort and a cut on any device, and bisections on the host that ask for one answer at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: A bisection stops once the density is this close to the target (a tenth of the promised tolerance).
CLOSE_ENOUGH = 0.001
#: Natural logarithms of the shares between which it searches: the first leaves nothing out, the last everything.
LOWEST, HIGHEST = -100.0, 1e-6
#: It halves that range at most so often.
HALVINGS = 60


def solve(admission: Tensor, weight: Tensor, goal: float | Tensor) -> tuple[Tensor, Tensor]:
    """See `budget.solve`."""
    goal = torch.as_tensor(goal, dtype=torch.float64, device=admission.device)
    taken, rest = solve_each(admission.reshape(1, -1), weight.reshape(1, -1), goal.reshape(1))
    return taken.reshape(admission.shape), rest[0]


def solve_each(admission: Tensor, weight: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """See `budget.solve_each`."""
    admission = torch.where(admission.isnan(), -torch.inf, admission)
    last = admission.shape[1] - 1
    number = torch.arange(1, last + 2, device=admission.device)
    order = last - admission.flip(1).sort(dim=1, descending=True, stable=True).indices
    ordered = admission.gather(1, order)
    # In fp64: sums of pairs of long prompts are no fp32 numbers.
    apart = (weight.gather(1, order).cumsum(1, dtype=torch.int64).double() - goal[:, None]).abs()
    # Forced entries at least, impossible ones never.
    least, most = ((ordered == torch.inf).sum(1), (ordered > -torch.inf).sum(1))
    apart = apart.masked_fill((number < least[:, None]) | (number > most[:, None]), torch.inf)
    many = last + 1 - apart.flip(1).argmin(1)  # the first of equals, which is the larger number
    nearest = apart.gather(1, (many - 1)[:, None])[:, 0]
    many = torch.where((least == 0) & (goal.abs() < nearest), 0, many)
    taken = torch.zeros_like(admission, dtype=torch.bool).scatter_(1, order, number <= many[:, None])
    rest = torch.where(many > 0, ordered.gather(1, (many - 1).clamp(min=0)[:, None])[:, 0], torch.inf)
    return taken, rest


def bisect_share(density: Callable[[float], float], target: float) -> float:
    """The share left out whose density comes closest to `target`.

    `density` falls as the share grows. The share spans many orders of magnitude (attention is concentrated), so the
    bisection runs on its logarithm.
    """
    low, high = LOWEST, HIGHEST
    below = density(math.exp(low))
    if below <= target:
        return math.exp(low)
    above = density(math.exp(high))
    if above >= target - 1e-9:
        return math.exp(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        value = density(math.exp(middle))
        if value > target:
            low, below = middle, value
        else:
            high, above = middle, value
        if min(below - target, target - above) < CLOSE_ENOUGH:
            break
    return math.exp(low if below - target < target - above else high)


def closest_count(pairs: Callable[[int], int], goal: float, low: int, high: int) -> int:
    """The count in [low, high] whose `pairs`, which do not fall, come closest to `goal`; the larger of equals."""
    while high - low > 1:
        middle = (low + high) // 2
        if pairs(middle) <= goal:
            low = middle
        else:
            high = middle
    return high if pairs(high) - goal <= goal - pairs(low) else low
