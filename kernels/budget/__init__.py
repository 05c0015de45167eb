"""Where a budget ends: the entries that are taken, best first, until their weights come to a goal."""

from __future__ import annotations

import torch
from torch import Tensor


def solve(admission: Tensor, weight: Tensor, goal: float) -> tuple[Tensor, Tensor]:
    """Take entries by descending admission until the sum of their weights is as close to `goal` as whole entries allow.

    What has an admission of infinity is always taken, of minus infinity never. Ties go to later entries. A device is
    not waited for.

    Args:
        admission: of any shape, floating point, no NaN.
        weight: int64 of the same shape, not negative.
        goal: in units of the weights.

    Returns:
        What is taken, bool of the same shape, and the least admission that was taken, a tensor of one number.
    """
    flat, weights = admission.flatten(), weight.reshape(-1)
    order = len(flat) - 1 - flat.flip(0).sort(descending=True, stable=True).indices
    ordered = flat[order]
    total = weights[order].cumsum(0)
    below = (total - goal).abs()
    # The closest of all numbers of entries, the larger of equals; forced ones at least, impossible ones never.
    least, most = (ordered == torch.inf).sum(), (ordered > -torch.inf).sum()
    place = torch.arange(1, len(flat) + 1, device=flat.device)
    inside = (place >= least.clamp(min=1)) & (place <= most)
    near = below.masked_fill(~inside, torch.inf)
    number = len(flat) - near.flip(0).argmin()
    none = (least == 0) & ((goal < below.gather(0, (number - 1).clamp(min=0)[None])[0]) | (most == 0))
    number = torch.where(none, 0, number)
    taken = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, order, place <= number)
    rest = ordered.gather(0, (number - 1).clamp(min=0)[None])[0]
    return taken.reshape(admission.shape), rest
