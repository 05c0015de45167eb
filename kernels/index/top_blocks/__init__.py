"""The key blocks whose pooled keys have the largest product with a query block's pooled query.

It knows nothing of budgets but two numbers, and returns what a `Blocks` holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import choose
from . import naive

#: Blocks of a row that one program of the Triton version can hold.
MOST_BLOCKS = 1 << 15


def top_blocks(
    pooled_queries: Tensor,
    pooled_keys: Tensor,
    budget: int,
    extra: int = 0,
    *,
    near: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The best causal key blocks of each query block, the first and the `near` nearest always included.

    Row i takes min(budget, i + 1) blocks, the last `extra` rows one more where there is one. Ties go to later blocks.
    Neither a positive scale nor a softcap would change the order of the scores, so there is none.

    Args:
        pooled_queries: `(H, n, D)` fp32.
        pooled_keys: `(H_kv, n, D)` fp32 with `H % H_kv == 0`.
        budget: at least `near` + 1.
        extra: 0 to n.
        near: 1 for the block on the diagonal, 2 for the one just left of it, too.
        backend: `auto`, `naive` or `triton`. From 32768 blocks on `auto` is `naive`.

    Returns:
        indices `(H, n, W)` int32, ascending, 0 behind the valid ones; counts `(H, n)` int32. W is the largest count.

    Raises:
        ValueError: shapes that do not fit, a dtype other than fp32, budgets out of range, an unknown backend.
    """
    heads, blocks, dim = pooled_queries.shape
    if pooled_keys.shape[1:] != (blocks, dim) or not len(pooled_keys) or heads % len(pooled_keys):
        raise ValueError(
            f"pooled queries {tuple(pooled_queries.shape)} and keys {tuple(pooled_keys.shape)} do not fit together: "
            "expected (H, n, D) and (H_kv, n, D) with H a multiple of H_kv"
        )
    if pooled_queries.dtype != torch.float32 or pooled_keys.dtype != torch.float32:
        raise ValueError(f"dtypes are {pooled_queries.dtype} and {pooled_keys.dtype}; expected torch.float32")
    if near not in (1, 2):
        raise ValueError(f"near={near} given; expected 1 or 2")
    if budget < near + 1 or not 0 <= extra <= blocks:
        raise ValueError(f"budget={budget}, extra={extra} given; expected at least {near + 1}, and 0 to {blocks}")
    chosen = choose(backend, pooled_queries.device)
    if chosen == "triton" and blocks > MOST_BLOCKS:
        if backend == "triton":
            raise ValueError(f"backend 'triton' takes at most {MOST_BLOCKS} blocks, {blocks} given; use 'auto'")
        chosen = "naive"
    if chosen == "triton":
        from . import triton

        return triton.forward(pooled_queries, pooled_keys, budget, extra, near)
    return naive.forward(pooled_queries, pooled_keys, budget, extra, near)


def top_scored(score: Tensor, budget: int, extra: int = 0, *, first: int = 1, near: int = 1) -> tuple[Tensor, Tensor]:
    """The causal key blocks of each query block with the largest scores, the first and the nearest always included.

    As `top_blocks`, from scores that are there.

    Args:
        score: `(H, n, n)` fp32.
        budget: at least `first` + `near`.
        extra: 0 to n.
        first, near: key blocks that are always taken, in front and up to the diagonal.
    """
    blocks = score.shape[1]
    if score.dim() != 3 or score.shape[2] != blocks or score.dtype != torch.float32:
        raise ValueError(f"scores are {tuple(score.shape)} {score.dtype}; expected (H, n, n) torch.float32")
    if budget < first + near or not 0 <= extra <= blocks:
        raise ValueError(f"budget={budget}, extra={extra} given; expected at least {first + near}, and 0 to {blocks}")
    return naive.listed_scores(score, budget, extra, first, near)
