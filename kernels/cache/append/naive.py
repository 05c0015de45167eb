"""Appending in torch. It waits for lengths that are on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ...estimate import update_bounds
from ...types import PageBounds, RaggedKV


def forward(kv: RaggedKV, keys: Tensor, values: Tensor, bounds: PageBounds | None) -> None:
    steps = keys.shape[1]
    held = kv.lengths > 0
    before = torch.where(held, kv.lengths - steps, 0)
    # The usual case on a CPU, in as few operations as can be.
    if not kv.shared and not kv.lengths.is_cuda and all(kv.lengths.tolist()):
        place = kv.starts + before
        place = place if steps == 1 else (place[:, None] + torch.arange(steps)).flatten()
        kv.keys.index_copy_(0, place, keys.reshape(-1, keys.shape[-1]))
        kv.values.index_copy_(0, place, values.reshape(-1, values.shape[-1]))
    else:
        place = kv.at(before[:, None].long() + torch.arange(steps, device=keys.device))[held]
        kv.keys[place], kv.values[place] = keys[held], values[held]
    if bounds is not None:
        update_bounds(kv, bounds, before, backend="naive")
