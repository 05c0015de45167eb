"""The choice of pages in torch, on any device and without waiting for it. See the package for what it means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...types import RaggedKV

if TYPE_CHECKING:
    from . import PageBudget


def budget_pages(visible: Tensor, logical: Tensor, budget: PageBudget) -> tuple[Tensor, Tensor]:
    size = budget.page_size
    before = ((visible - 1) // size).clamp(min=0)
    if budget.pages is not None:
        return before, before.clamp(max=budget.pages)
    current = visible - before * size
    wanted = torch.round((budget.keep * logical.double() - current) / size).long().clamp(min=0)
    wanted = torch.where(visible > 0, wanted, 0)
    rows = (-1, budget.kv_heads, *before.shape[1:])
    wanted, held = wanted.reshape(rows), before.reshape(rows)
    enough = (wanted <= held).all(1, keepdim=True)
    return before, torch.where(enough, wanted, _fill(wanted.sum(1), held)).reshape(before.shape)


def _fill(total: Tensor, held: Tensor) -> Tensor:
    """Share `total (R, T)` among the heads `(R, H, T)` evenly, none getting more than it holds."""
    total = torch.minimum(total, held.sum(1))[:, None]
    # All get the same number, the level, or all that they hold. For the head with the next smaller heads given all
    # they hold, the rest is shared among it and the larger ones; the largest such share is the level.
    ordered = held.sort(1).values
    smaller = ordered.cumsum(1) - ordered
    sharing = torch.arange(held.shape[1], 0, -1, device=held.device)[:, None]
    level = ((total - smaller) // sharing).amax(1, keepdim=True)
    given = torch.minimum(held, level)
    # Fewer are left than heads that could take one: the largest first, of equals the first.
    rank = held.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return given + ((rank < total - given.sum(1, keepdim=True)) & (given < held))


def forward(scores: Tensor, kv: RaggedKV, logical: Tensor, budget: PageBudget, width: int) -> tuple[Tensor, Tensor]:
    sequences, lists, steps, pages = scores.shape
    visible = kv.visible(steps)
    tokens = (logical[:, None] + torch.arange(1 - steps, 1, device=logical.device)).repeat_interleave(
        budget.kv_heads, 0, output_size=sequences
    )
    before, read = budget_pages(visible, tokens, budget)
    most = min(width - 1, pages)
    if not read.is_cuda:  # where looking costs nothing, no more is sorted than need be
        most = min(most, int(read.max()))
    before, read, exists = (part[:, None, :, None] for part in (before, read, visible > 0))
    ids = torch.arange(pages, device=scores.device)
    # Scores as integers in their order, with the page's id below them, so that no two are equal.
    finite = torch.where(scores.isnan(), float("-inf"), scores) + 0.0  # -0 is 0
    bits = finite.view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() * (1 << 31) + ids
    order = torch.where(ids < before, order, torch.iinfo(torch.int64).min)
    best = order.topk(most, dim=-1).indices
    # Behind the pages that are read stands an id above all of them.
    found = torch.where(torch.arange(most, device=scores.device) < read, best, before).sort(-1).values
    found = torch.cat([found, before.expand(sequences, lists, steps, width - most)], -1)
    counts = torch.where(exists, read + 1, 0)[..., 0].expand(sequences, lists, steps)
    return found.to(torch.int32), counts.to(torch.int32).contiguous()
