"""The best blocks in plain torch: chunks of rows, a top-k for the threshold, a mask, and its True entries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...types import listed

#: Block scores held at once.
SCORE_ELEMENTS = 1 << 23


def forward(pooled_queries: Tensor, pooled_keys: Tensor, budget: int, extra: int, near: int) -> tuple[Tensor, Tensor]:
    heads, blocks, dim = pooled_queries.shape
    kv_heads, device = pooled_keys.shape[0], pooled_queries.device
    ids = torch.arange(blocks, device=device)
    budgets = torch.minimum(budget + (ids >= blocks - extra).long(), ids + 1)
    width = min(blocks, budget + (extra > 0))
    indices = torch.zeros(heads, blocks, width, dtype=torch.int32, device=device)
    step = max(1, SCORE_ELEMENTS // (heads * blocks))
    for first in range(0, blocks, step):
        rows = torch.arange(first, min(first + step, blocks), device=device)
        grouped = pooled_queries[:, rows].reshape(kv_heads, -1, dim)
        scores = (grouped @ pooled_keys.transpose(1, 2)).reshape(heads, len(rows), blocks)
        mask = best_blocks(scores, rows, budgets[rows], width, 1, near)
        found, _ = listed(mask)
        indices[:, rows, : found.shape[-1]] = found
    return indices, budgets.to(torch.int32).expand(heads, -1).contiguous()


def listed_scores(scores: Tensor, budget: int, extra: int, first: int, near: int) -> tuple[Tensor, Tensor]:
    """See `top_scored` of the package."""
    heads, blocks, _ = scores.shape
    ids = torch.arange(blocks, device=scores.device)
    budgets = torch.minimum(budget + (ids >= blocks - extra).long(), ids + 1)
    mask = best_blocks(scores.clone(), ids, budgets, min(blocks, budget + (extra > 0)), first, near)
    return listed(mask)[0], budgets.to(torch.int32).expand(heads, -1).contiguous()


def best_blocks(scores: Tensor, rows: Tensor, budgets: Tensor, width: int, first: int, near: int) -> Tensor:
    """`(H, r, n)` bool: in each row of block scores the `budgets` best causal blocks, first and nearest included.

    Ties go to later blocks. The scores are overwritten. No budget exceeds `width`.
    """
    columns = torch.arange(scores.shape[-1], device=scores.device)
    behind = rows[:, None] - columns
    scores.masked_fill_(behind < 0, -math.inf)
    scores.masked_fill_((behind >= 0) & ((columns < first) | (behind < near)), math.inf)
    # The smallest score that is taken; of those equal to it only as many as there is room for, from the right.
    best = scores.topk(width, dim=-1).values
    edge = best.gather(-1, (budgets - 1).expand(scores.shape[0], -1)[..., None])
    above, equal = scores > edge, scores == edge
    room = budgets[:, None] - above.sum(-1, keepdim=True)
    return above | (equal & (equal.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1) <= room))
