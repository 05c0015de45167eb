"""`PageBounds`: the smallest and the largest value of each key dimension in each page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ragged import RaggedKV


@dataclass
class PageBounds:
    """Smallest and largest value of each key dimension in each page, for S sequences of one flat key storage.

    A sequence is what one KV head of one row holds; its page p covers its keys [p * page_size, (p + 1) * page_size).
    Bounds are exact, so they are kept in the keys' dtype.

    Attributes:
        page_size: keys per page, a power of two.
        low, high: `(M, D)`; page p of sequence s is row `first[s] + p`. What no keys belong to is undefined.
        first: `(S,)` int64.
        tails: `(S,)` int64 where sequences share their beginnings (`RaggedKV.splits`), else None: a page behind the
            split, p, is row `tails[s] + p`.
    """

    page_size: int
    low: Tensor
    high: Tensor
    first: Tensor
    tails: Tensor | None = None

    @staticmethod
    def empty(pages: Sequence[int], like: Tensor, page_size: int) -> PageBounds:
        """Room for `pages[s]` pages of each sequence, one after the other.

        Args:
            like: gives dimension, dtype and device.

        Raises:
            ValueError: a page size that is no power of two.
        """
        if page_size < 1 or page_size & (page_size - 1):
            raise ValueError(f"page_size={page_size} given; expected a power of two")
        # Made on the host and moved once.
        ends = torch.tensor([0, *pages], dtype=torch.int64).cumsum(0)
        shape = (int(ends[-1]), like.shape[-1])
        return PageBounds(page_size, like.new_empty(shape), like.new_empty(shape), ends[:-1].to(like.device))

    def part(self, sequences: slice) -> PageBounds:
        """Those of some of the sequences, over the same storage."""
        tails = None if self.tails is None else self.tails[sequences]
        return PageBounds(self.page_size, self.low, self.high, self.first[sequences], tails)

    def rows(self, kv: RaggedKV, pages: Tensor) -> Tensor:
        """`(S, …)` int64: the rows of these pages `(S, …)` of each sequence."""

        def own(part: Tensor) -> Tensor:
            return part.view(-1, *[1] * (pages.dim() - 1))

        found = own(self.first) + pages
        if self.tails is None:
            return found
        return torch.where(pages * self.page_size < own(kv.splits), found, own(self.tails) + pages)

    def check(self, kv: RaggedKV) -> None:
        """Raise ValueError unless these can be bounds of `kv`: the cheap checks that every call makes."""
        if len(self.first) != len(kv.starts) or self.low.shape[-1] != kv.keys.shape[-1]:
            raise ValueError(
                f"bounds {tuple(self.low.shape)} of {len(self.first)} sequences do not fit {len(kv.starts)} sequences "
                f"of keys {tuple(kv.keys.shape)}"
            )
        if (self.tails is None) != (kv.tails is None):
            raise ValueError("either keys or bounds share their beginnings; expected both or neither")
        if self.low.dtype != kv.keys.dtype or self.low.device != kv.keys.device:
            raise ValueError(
                f"bounds are {self.low.dtype} on {self.low.device}, keys {kv.keys.dtype} on {kv.keys.device}"
            )
