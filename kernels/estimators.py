"""What methods look at before they select: attention of the last queries, pooled queries and keys, bounds of pages.

All in torch, fp32, in chunks: nothing of size L x L is ever made. The window estimators hold at most
`WINDOW_ELEMENTS` scores, or those of one head, at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import block_lengths

#: fp32 scores held at once.
WINDOW_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class WindowSums:
    """Attention weights of the last queries of a row, reduced over those queries.

    Attributes:
        columns: `(H, L)` fp32, sum of the weights on each key.
        diagonals: `(H, L)` fp32, sum over each token diagonal: entry o for query - key = o.
        peaks: `(H, L)` fp32, largest weight on each key. Any of the three is None unless it was asked for.
    """

    columns: Tensor | None
    diagonals: Tensor | None
    peaks: Tensor | None


def window_sums(
    query: Tensor,
    key: Tensor,
    window: int,
    *,
    scale: float,
    softcap: float | None = None,
    columns: bool = False,
    diagonals: bool = False,
    peaks: bool = False,
) -> WindowSums:
    """Causal softmax attention of the last `window` queries, reduced to what is asked for.

    Args:
        query: `(H, L, D)`; the last min(window, L) queries are used.
        key: `(H_kv, L, D)`.
        scale, softcap: as the attention itself uses them.
    """
    heads, length, _ = query.shape
    group = heads // key.shape[0]
    window = min(window, length)
    future = torch.ones(window, window, dtype=torch.bool, device=query.device).triu(1)
    parts: dict[str, list[Tensor]] = {"columns": [], "diagonals": [], "peaks": []}
    step = max(1, min(group, WINDOW_ELEMENTS // (window * length)))
    for kv_head, key_states in enumerate(key):
        # The query heads of a group are rows of one product with their keys, which are not repeated.
        keys = key_states.float().T
        for first in range(kv_head * group, (kv_head + 1) * group, step):
            scores = query[first : min(first + step, (kv_head + 1) * group), -window:].float() @ keys
            scores *= scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores[..., -window:].masked_fill_(future, float("-inf"))
            weights = scores.softmax(-1)
            if columns:
                parts["columns"].append(weights.sum(1))
            if diagonals:
                parts["diagonals"].append(diagonal_sums(weights))
            if peaks:
                parts["peaks"].append(weights.amax(1))
    return WindowSums(**{name: torch.cat(found) if found else None for name, found in parts.items()})


def window_flops(heads: int, window: int, length: int, dim: int) -> int:
    """Multiplications and additions of `window_sums`' scores; what softmax and sums cost besides is not counted."""
    return 2 * heads * min(window, length) * length * dim


def diagonal_sums(weights: Tensor) -> Tensor:
    """Sum of `(H, w, L)` weights over each token diagonal: `(H, L)`, entry o for query - key = o.

    The w queries are the last of L. Rows are skewed by reading a padded copy with a stride that is one longer
    than its rows, so that a diagonal becomes a column.
    """
    heads, window, length = weights.shape
    width = length + window
    flat = F.pad(F.pad(weights, (0, window)).reshape(heads, window * width), (window - 1, 0))
    skewed = flat.as_strided((heads, window, length), (flat.stride(0), width + 1, 1))
    return skewed.sum(1).flip(-1)


def sum_blocks(mass: Tensor, block: int) -> Tensor:
    """Sum `(H, L)` over blocks of tokens: `(H, n)`."""
    heads, length = mass.shape
    blocks = -(-length // block)
    return F.pad(mass, (0, blocks * block - length)).reshape(heads, blocks, block).sum(-1)


def pool(states: Tensor, block: int) -> Tensor:
    """Mean of each block of tokens: `(H, L, D)` to `(H, n, D)` in fp32; a partial last block counts its tokens."""
    heads, length, dim = states.shape
    blocks = -(-length // block)
    padded = F.pad(states.float(), (0, 0, 0, blocks * block - length)).reshape(heads, blocks, block, dim)
    return padded.sum(2) / block_lengths(length, block, states.device)[:, None]


@dataclass
class PageBounds:
    """Smallest and largest value of each key dimension in each page, for S sequences of one flat key storage.

    A sequence is what one KV head of one row holds; its page p covers its keys [p * page_size, (p + 1) * page_size).
    Bounds are exact, so they are kept in the keys' dtype.

    Attributes:
        page_size: keys per page.
        low, high: `(S, P, D)`, for pages that hold keys; what lies behind them is undefined.
    """

    page_size: int
    low: Tensor
    high: Tensor

    @staticmethod
    def empty(sequences: int, pages: int, like: Tensor, page_size: int) -> PageBounds:
        """Room for `pages` pages of each sequence; `like` gives dimension, dtype and device."""
        shape = (sequences, pages, like.shape[-1])
        return PageBounds(page_size, like.new_zeros(shape), like.new_zeros(shape))

    def update(self, keys: Tensor, starts: list[int], before: list[int], after: list[int]) -> None:
        """Take in keys [before, after) of each sequence; every page that they touch is computed anew.

        Args:
            keys: `(N, D)` flat storage; sequence s begins at `starts[s]`.
        """
        size = self.page_size
        most = -(-max(after, default=0) // size)
        if most > self.low.shape[1]:
            room = max(most, self.low.shape[1] * 5 // 4) - self.low.shape[1]
            self.low, self.high = (F.pad(bound, (0, 0, 0, room)) for bound in (self.low, self.high))
        device = keys.device
        touched = max((-(-end // size) - begin // size for begin, end in zip(before, after, strict=True)), default=0)
        if touched <= 0:
            return
        if touched <= 2:  # decoding: all sequences at once
            rows = [row for row, end in enumerate(after) if end]
            row, offset, begin, end = (
                torch.tensor(values, device=device)
                for values in (rows, *([table[row] for row in rows] for table in (starts, before, after)))
            )
            # A sequence that touches fewer pages than others does its last one again.
            page = torch.minimum(
                begin[:, None] // size + torch.arange(touched, device=device), (end[:, None] - 1) // size
            )
            token = page[..., None] * size + torch.arange(size, device=device)
            # Behind the end the last key is read again, which changes no bound.
            found = keys[offset[:, None, None] + torch.minimum(token, end[:, None, None] - 1)]
            row = row[:, None]
            self.low[row, page], self.high[row, page] = found.amin(2), found.amax(2)
            return
        for row, (offset, begin, end) in enumerate(zip(starts, before, after, strict=True)):
            first = begin // size
            held = keys[offset + first * size : offset + end]
            whole = len(held) // size
            if whole:
                paged = held[: whole * size].reshape(whole, size, -1)
                self.low[row, first : first + whole] = paged.amin(1)
                self.high[row, first : first + whole] = paged.amax(1)
            if len(held) % size:
                self.low[row, first + whole] = held[whole * size :].amin(0)
                self.high[row, first + whole] = held[whole * size :].amax(0)


def bound_scores(query: Tensor, bounds: PageBounds, pages: int) -> Tensor:
    """Upper bound of the score of any key of a page: `sum_d max(q_d * low_d, q_d * high_d)` (Quest, equation 2).

    Args:
        query: `(S, G, T, D)`.
        pages: how many pages of each sequence to look at.

    Returns:
        `(S, G, T, pages)` fp32.
    """
    q = query.float()
    low, high = (bound[:, None, :pages].float().transpose(-1, -2) for bound in (bounds.low, bounds.high))
    # Where q_d is positive the largest product is with the upper bound, elsewhere with the lower one.
    return q.clamp(min=0) @ high + q.clamp(max=0) @ low
