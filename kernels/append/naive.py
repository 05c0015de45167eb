"""Appending in torch. It waits for lengths that are on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..estimators import PageBounds, update_bounds
from ..ragged import RaggedKV


def forward(kv: RaggedKV, keys: Tensor, values: Tensor, bounds: PageBounds | None) -> None:
    steps = keys.shape[1]
    before, held = kv.lengths.clone(), kv.lengths > 0
    place = (kv.starts + before)[held, None] + torch.arange(steps, device=keys.device)
    kv.keys[place], kv.values[place] = keys[held], values[held]
    kv.lengths.add_(held, alpha=steps)
    if bounds is not None:
        update_bounds(kv, bounds, before, backend="naive")
