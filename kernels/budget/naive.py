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
    flat, weights = admission.flatten(), weight.flatten()
    flat = torch.where(flat.isnan(), -torch.inf, flat)
    number = torch.arange(1, len(flat) + 1, device=flat.device)
    order = len(flat) - 1 - flat.flip(0).sort(descending=True, stable=True).indices
    ordered = flat[order]
    # In fp64: sums of pairs of long prompts are no fp32 numbers.
    apart = (weights[order].cumsum(0, dtype=torch.int64).double() - goal).abs()
    # Forced entries at least, impossible ones never.
    least, most = (ordered == torch.inf).sum(), (ordered > -torch.inf).sum()
    apart = apart.masked_fill((number < least) | (number > most), torch.inf)
    many = len(flat) - apart.flip(0).argmin()  # the first of equals, which is the larger number
    nothing = torch.as_tensor(goal, dtype=torch.float64, device=flat.device).abs()
    many = torch.where((least == 0) & (nothing < apart.gather(0, (many - 1)[None])[0]), 0, many)
    taken = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, order, number <= many)
    rest = torch.where(many > 0, ordered.gather(0, (many - 1).clamp(min=0)[None])[0], torch.inf)
    return taken.reshape(admission.shape), rest


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
