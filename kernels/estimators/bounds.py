"""Bounds of pages of keys, for methods that score whole pages (Quest)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
