"""The paper's cost formulas as they are printed (its §5 and appendix), to show where its plots do not follow from them.

`analysis.cost` has those that do. Nothing but the check of both uses these.
"""

from __future__ import annotations

import math

from .cost import Decode, Prefill
from .shapes import Sizes


def prefill(sizes: Sizes, length: float, density: float = 1.0, batch: float = 1) -> Prefill:
    """Eq. 3: queries and outputs have d dimensions whatever d_h, and every layer sees everything."""
    n, d, m, head_dim = sizes.layers, sizes.hidden, sizes.mlp, sizes.head_dim
    return Prefill(
        embedding=batch * 2 * length * d,
        projections=batch * n * 2 * length * d * (2 * d + 2 * head_dim * sizes.kv_heads),
        attention=batch * n * density * sizes.query_heads * length**2 * (4 * head_dim + 3),
        windows=0.0,
        mlp=batch * n * 2 * length * m * (3 * d + 1),
        head=batch * 2 * length * d * sizes.vocab,
    )


def weights(sizes: Sizes) -> float:
    """N(4d² + 3dm) + dV + d: keys and values as wide as queries."""
    d = sizes.hidden
    return sizes.layers * (4 * d * d + 3 * d * sizes.mlp) + d * sizes.vocab + d


def decode(sizes: Sizes, length: float, density: float = 1.0, batch: float = 1) -> Decode:
    """Weights and cache of a step; every layer sees everything."""
    cached = batch * 2 * sizes.layers * length * sizes.head_dim * sizes.kv_heads * density
    return Decode(weights(sizes), cached, 0.0)


def vertical_slash_index(
    sizes: Sizes, length: float, window: int, verticals: float, slashes: float, batch: float = 1
) -> float:
    """With the width of the residual stream for each head."""
    scores = 2 * sizes.hidden * length * window + 5 * length * window
    ranking = 2 * length * math.log2(length) + length / 64 * (verticals + slashes)
    return batch * sizes.layers * sizes.query_heads * (scores + ranking)


def quest_index(sizes: Sizes, length: float, page_size: int = 16, batch: float = 1) -> float:
    """With the width of the residual stream for each KV head."""
    return batch * sizes.layers * sizes.kv_heads * 2 * sizes.hidden * length / page_size
