"""Where a budget ends: what is taken, best first, until it comes to a goal.

`solve` answers where every entry has an admission and a weight of its own: a sort, sums and a cut, without waiting for
the device. Where what is taken together weighs otherwise than its parts (the union of verticals and slashes; pooled
maps of a layer that are too large to be sorted) only the density of a whole choice can be asked for:
`bisect_share` and `closest_count` do that on the host, one question after the other. Their twins on a device look at
many answers at once, and are written into the kernels that count (`index.top_p_blocks`, `index.vertical_slash`); what
they have in common with these is in `triton.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import naive
from .naive import bisect_share, closest_count

__all__ = ["bisect_share", "closest_count", "solve", "solve_each"]


def solve(admission: Tensor, weight: Tensor, goal: float | Tensor) -> tuple[Tensor, Tensor]:
    """Take entries by descending admission until the sum of their weights is as close to `goal` as whole entries allow.

    What has an admission of infinity is always taken; of minus infinity, or one that is not a number, never. Ties go
    to later entries, and of two numbers of entries that are equally close the larger is taken. A device is not waited
    for.

    Args:
        admission: of any shape, floating point.
        weight: integers of the same shape, not negative; their sum is below 2^53.
        goal: in units of the weights, a number, or a tensor of one number on the device.

    Returns:
        What is taken, bool of the same shape, and the least admission that was taken, a tensor of one number, infinity
        where nothing was.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    if not admission.dtype.is_floating_point or weight.dtype.is_floating_point or weight.dtype == torch.bool:
        raise ValueError(f"admission is {admission.dtype}, weight {weight.dtype}; expected floating point and integers")
    if admission.shape != weight.shape:
        raise ValueError(f"admission is {tuple(admission.shape)}, weight {tuple(weight.shape)}; expected one shape")
    if admission.device != weight.device:
        raise ValueError(f"devices are {admission.device} and {weight.device} (weight); expected one device")
    if not admission.numel():
        return torch.zeros_like(admission, dtype=torch.bool), admission.new_full((), torch.inf)
    return naive.solve(admission, weight, goal)


def solve_each(admission: Tensor, weight: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """`solve` for each row of `admission (N, M)` and `weight (N, M)` and its own `goal (N,)` fp64.

    Returns:
        What is taken `(N, M)`, and the least admission that was taken of each row `(N,)`.

    Raises:
        ValueError: shapes or devices that do not fit together.
    """
    rows = admission.shape[:1]
    if admission.dim() != 2 or weight.shape != admission.shape or goal.shape != rows or not admission.shape[1]:
        raise ValueError(
            f"admission is {tuple(admission.shape)}, weight {tuple(weight.shape)}, goal {tuple(goal.shape)}; expected "
            "(N, M) twice and (N,), with M of at least 1"
        )
    if not admission.device == weight.device == goal.device:
        raise ValueError(f"devices are {admission.device}, {weight.device}, {goal.device}; expected one device")
    return naive.solve_each(admission, weight, goal.double())
