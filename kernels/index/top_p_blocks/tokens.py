"""How FlexPrefill's public code counts: tokens that cover a share, and as many blocks as they would fill.

Of the token columns (and of the token diagonals) of a head the fewest that cover `gamma` are counted; their number over
the block size, plus one, is how many key blocks (and bands) the head takes, those with the largest pooled mass. In
torch on any device: every tile has an admission, the share that may be left out below which it is taken, and one cut
through all of them meets a density; of the last column or band it may take a part, later rows first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...budget import solve
from ...types import Blocks, causal_pairs, tile_pairs
from .naive import APART, BlockMap, Ranking, coverage_keys


def by_tokens(
    query: Tensor,
    pooled_keys: Tensor,
    columns: Tensor,
    diagonals: Tensor,
    vertical: Tensor,
    slash: Tensor,
    query_aware: Tensor,
    block: int,
    *,
    scale: float,
    softcap: float | None = None,
    floor: int = 0,
    ceiling: int | None = None,
    rest: float | None = None,
    density: float | None = None,
) -> tuple[Blocks, float | Tensor]:
    """Choose tiles, and say which share was left out; arguments as of `top_p_blocks.select`, and besides:

    Args:
        columns, diagonals: `(H, L)` fp32, mass of each key and of each distance between query and key.

    Raises:
        ValueError: both or none of `rest` and `density`.
    """
    if (rest is None) == (density is None):
        raise ValueError(f"rest={rest} and density={density} given; expected one of them")
    heads, length, _ = query.shape
    blocks = vertical.shape[1]
    floor, ceiling = (0, blocks) if density is not None else (floor, blocks if ceiling is None else ceiling)
    ids = torch.arange(blocks, device=query.device)
    offset = ids[:, None] - ids[None, :]

    def admissions(tokens: Tensor, mass: Tensor, apart: float, larger_first: bool) -> Tensor:
        """`(H, n)` fp64, for each block or band."""
        keys = coverage_keys(tokens.sort(dim=-1, descending=True).values)
        # The block of rank r is taken where covering takes r * block tokens at least: one fewer do not cover.
        at = keys[:, (ids * block - 1).clamp(0, length - 1)]
        # Equal heads are taken one by one.
        at = at * (1 + APART * (torch.arange(heads, device=at.device, dtype=torch.float64)[:, None] + apart))
        at = at.masked_fill(query_aware[:, None], -torch.inf).masked_fill(ids >= max(ceiling, floor), -torch.inf)
        at = at.masked_fill(ids < floor, torch.inf)
        if density is None:  # the one block besides; under a density nothing is taken that it leaves no room for
            at[:, 0] = torch.where(query_aware, at[:, 0], torch.inf)
        return at.gather(1, Ranking(mass, 0.0, larger_first=larger_first).rank)

    by_column, by_diagonal = admissions(columns, vertical, 0.0, True), admissions(diagonals, slash, 0.5, False)
    admission = torch.maximum(by_column[:, None, :], by_diagonal[:, offset.clamp(min=0)])
    group = heads // pooled_keys.shape[0]
    for head in query_aware.nonzero().flatten().tolist():
        own = BlockMap(query[head], pooled_keys[head // group], block, scale, softcap, head)
        mapped = torch.full_like(admission[head], -torch.inf)
        mapped[own.rows, own.cols] = own.keys
        admission[head] = torch.maximum(admission[head], mapped)
    admission = admission.masked_fill((offset == 0) | (ids == 0), torch.inf).masked_fill(offset < 0, -torch.inf)
    if density is None:
        taken = admission > rest
    else:
        weight = tile_pairs(length, block, block, query.device).clamp(min=0).expand_as(admission)
        taken, rest = solve(admission, weight, density * heads * causal_pairs(length))
        rest = rest.clamp(max=1.0)  # infinity where nothing is taken but the forced tiles
    return Blocks.from_mask(taken, length, block, block), rest
