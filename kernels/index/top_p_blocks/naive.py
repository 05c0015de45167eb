"""The oracle of this choice: torch on any device, a loop over query-aware heads, a solve that waits for each step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...budget import bisect_share
from ...estimate import pool
from ...types import Blocks, causal_pairs, tile_pairs

#: Smaller shares to leave out than this cannot be told from 0 once written as gamma = 1 - share.
REPRESENTABLE = 1e-6
#: Relative offset between equal shares of different heads, so that the solve takes their blocks one by one.
APART = 1e-12
#: A share that is no attention at all, but orders blocks without any mass.
VANISHING = 1e-40


def select(
    query: Tensor,
    pooled_keys: Tensor,
    vertical: Tensor,
    slash: Tensor,
    query_aware: Tensor,
    block: int,
    scale: float,
    softcap: float | None,
    floor: int,
    ceiling: int,
    rest: float | None,
    density: float | None,
) -> tuple[Blocks, float, float]:
    """See `top_p_blocks.select`: the layout, gamma and rest."""
    heads, length, _ = query.shape
    blocks = vertical.shape[1]
    # Ties go to recent keys: to the larger key block, and to the nearer band.
    columns = Ranking(vertical, 0.0, larger_first=True)
    diagonals = Ranking(slash, 0.5, larger_first=False)
    group = heads // pooled_keys.shape[0]
    maps = {
        int(head): BlockMap(query[head], pooled_keys[head // group], block, scale, softcap, head=int(head))
        for head in query_aware.nonzero().flatten()
    }

    def counts(rest: float) -> tuple[Tensor, Tensor]:
        """Vertical and slash blocks of each head when the share `rest` = 1 - gamma may be left out."""
        result = []
        for ranking in (columns, diagonals):
            wanted = torch.where(query_aware, 0, ranking.count(rest))
            result.append(wanted.clamp(floor, max(ceiling, floor)))
        return result[0], result[1]

    def mean_density(rest: float) -> float:
        """Mean executed density of the heads; only asked for a density, when no floor but the forced tiles is."""
        pairs = union_pairs(columns, diagonals, *counts(rest), length, block)
        for head, block_map in maps.items():
            pairs[head] += block_map.pairs(rest)
        return float(pairs.sum()) / (heads * causal_pairs(length))

    rest = bisect_share(mean_density, density) if rest is None else rest
    gamma = max(0.0, 1 - rest)
    if REPRESENTABLE < rest < 1:  # so that the reported gamma, typed as a knob, selects the same blocks
        rest = 1 - gamma

    n_vertical, n_slash = counts(rest)
    ids = torch.arange(blocks, device=query.device)
    offset = ids[:, None] - ids[None, :]
    in_column, in_diagonal = columns.taken(n_vertical), diagonals.taken(n_slash)
    mask = in_column[:, None, :] | in_diagonal[:, offset.clamp(min=0)]
    for head, block_map in maps.items():
        mask[head] |= block_map.mask(rest)
    mask &= offset >= 0
    return Blocks.from_mask(mask, length, block, block), gamma, rest


def coverage_keys(mass: Tensor) -> Tensor:
    """For masses sorted descending along the last dimension: the share still missing before each is added.

    Item i belongs to the smallest set that leaves out at most `rest` exactly when its key exceeds `rest`.
    Summed from the small end in fp64 so that tiny tails keep their digits; a vanishing slope orders items
    without any mass, so that every density can be reached.
    """
    tail = mass.double().flip(-1).cumsum(-1).flip(-1)
    count = mass.shape[-1]
    slope = torch.arange(count, 0, -1, device=mass.device, dtype=torch.float64) / count
    return tail / tail[..., :1].clamp(min=1e-300) + VANISHING * slope


class Ranking:
    """Blocks of each head by descending mass. Block 0 is always taken besides."""

    def __init__(self, mass: Tensor, offset: float, larger_first: bool):
        heads, blocks = mass.shape
        ids = torch.arange(blocks, device=mass.device)
        if larger_first:  # a stable sort of the flipped array puts the larger of equals first
            order = blocks - 1 - mass.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        else:
            order = mass.sort(dim=-1, descending=True, stable=True).indices
        self.rank = torch.empty_like(order).scatter_(1, order, ids.expand(heads, -1))
        apart = 1 + APART * (torch.arange(heads, device=mass.device, dtype=torch.float64)[:, None] + offset)
        self.keys = coverage_keys(mass.gather(1, order)) * apart

    def count(self, rest: float) -> Tensor:
        """`(H,)`: blocks in the smallest set that leaves out at most the share `rest`."""
        return (self.keys > rest).sum(-1)

    def taken(self, count: Tensor) -> Tensor:
        """`(H, n)` bool: the first `count` blocks of each head, and block 0."""
        mask = self.rank < count[:, None]
        mask[:, 0] = True
        return mask


class BlockMap:
    """Query-aware branch of one head: the pooled score map over all causal blocks (paper: Algorithm 4)."""

    def __init__(self, query: Tensor, pooled_keys: Tensor, block: int, scale: float, softcap: float | None, head: int):
        length = query.shape[0]
        pooled_queries = pool(query[None], block, backend="naive")[0]
        blocks = pooled_keys.shape[0]
        causal = torch.ones(blocks, blocks, dtype=torch.bool, device=query.device).tril()
        scores = pooled_queries @ pooled_keys.T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~causal, float("-inf"))
        rows, cols = causal.nonzero(as_tuple=True)
        # Recent blocks first, so that a stable sort breaks ties towards them.
        by_recency = torch.argsort(cols, descending=True, stable=True)
        rows, cols = rows[by_recency], cols[by_recency]
        order = scores.softmax(-1)[rows, cols].sort(dim=-1, descending=True, stable=True)
        self.rows, self.cols = rows[order.indices], cols[order.indices]
        self.keys = coverage_keys(order.values) * (1 + APART * head)
        self.blocks = blocks
        weights = tile_pairs(length, block, block, query.device)[self.rows, self.cols]
        extra = torch.where((self.cols == 0) | (self.rows == self.cols), 0, weights)
        self.extra_pairs = F.pad(extra.cumsum(0), (1, 0))

    def pairs(self, rest: float) -> Tensor:
        """Pairs that the blocks which leave out at most `rest` add to the forced first column and diagonal."""
        return self.extra_pairs[(self.keys > rest).sum()]

    def mask(self, rest: float) -> Tensor:
        """`(n, n)` bool."""
        taken = self.keys > rest
        mask = torch.zeros(self.blocks, self.blocks, dtype=torch.bool, device=self.keys.device)
        mask[self.rows[taken], self.cols[taken]] = True
        return mask


def union_pairs(
    columns: Ranking, diagonals: Ranking, n_vertical: Tensor, n_slash: Tensor, length: int, block: int
) -> Tensor:
    """`(H,)` int64: pairs in the union of vertical and slash blocks, without building the block mask."""
    blocks = columns.rank.shape[1]
    ids = torch.arange(blocks, device=columns.rank.device)
    column, diagonal = columns.taken(n_vertical), diagonals.taken(n_slash)
    span = blocks - ids  # causal tiles of a column, and of a diagonal
    both = (column * diagonal.cumsum(-1).flip(-1)).sum(-1)
    tiles = (column * span).sum(-1) + (diagonal * span).sum(-1) - both
    # All tiles count block^2 pairs, but for diagonal tiles (all selected: band 0 is forced) and the last row.
    off_diagonal = tiles - blocks
    last_row = (column | diagonal.flip(-1))[:, :-1].sum(-1)
    last = length - (blocks - 1) * block
    triangle = (blocks - 1) * (block * (block + 1) // 2) + last * (last + 1) // 2
    return off_diagonal * block * block - last_row * (block - last) * block + triangle
