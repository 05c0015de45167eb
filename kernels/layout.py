"""`BlockLayout`: what a prefill method selects and a block-sparse operator executes, and how pairs are counted.

A layout is the single source of truth of the accounting: selected and executed (query, key) pairs are counted
from it, never estimated from knobs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class BlockLayout:
    """Key blocks that each query block of each query head reads, for one unpadded row.

    Attributes:
        indices: `(H, n_q, W)` int32, ids of key blocks; the first `counts` entries of a row are valid and
            ascending, the rest is 0.
        counts: `(H, n_q)` int32, number of valid entries, at least 1.
        length: number of tokens `L` of the row (queries = keys).
        block_q, block_k: block sizes in tokens; the last block of each kind may be partial.
    """

    indices: Tensor
    counts: Tensor
    length: int
    block_q: int
    block_k: int

    @staticmethod
    def from_mask(mask: Tensor, length: int, block_q: int, block_k: int) -> BlockLayout:
        """Build a layout from a boolean block mask `(H, n_q, n_k)`; non-causal blocks must be False."""
        counts = mask.sum(-1, dtype=torch.int32)
        width = int(counts.max())
        # A stable sort of "not selected" puts the selected ids first, still ascending.
        indices = torch.sort((~mask).to(torch.int8), dim=-1, stable=True).indices[..., :width].to(torch.int32)
        valid = torch.arange(width, device=mask.device) < counts[..., None]
        return BlockLayout(torch.where(valid, indices, 0), counts, length, block_q, block_k)

    @property
    def heads(self) -> int:
        return self.indices.shape[0]

    @property
    def blocks_q(self) -> int:
        return -(-self.length // self.block_q)

    @property
    def blocks_k(self) -> int:
        return -(-self.length // self.block_k)

    def mask(self) -> Tensor:
        """The boolean block mask `(H, n_q, n_k)` of this layout."""
        valid = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        # Padding entries carry id 0, so count hits instead of writing booleans that could overwrite a hit.
        hits = torch.zeros(*self.counts.shape, self.blocks_k, dtype=torch.int32, device=self.indices.device)
        hits.scatter_add_(-1, self.indices.long(), valid.to(torch.int32))
        return hits > 0

    def executed_pairs(self) -> Tensor:
        """`(H,)` int64: (query, key) pairs inside the causal triangle that lie in a listed tile."""
        weights = tile_pairs(self.length, self.block_q, self.block_k, self.indices.device)
        valid = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        rows = torch.arange(self.blocks_q, device=self.indices.device)[None, :, None]
        return torch.where(valid, weights[rows, self.indices.long()], 0).sum((1, 2))

    def keys_read(self) -> Tensor:
        """`(H,)` int64: keys that tiles load, summed over query blocks (each loads K and V of its blocks once)."""
        sizes = block_lengths(self.length, self.block_k, self.indices.device)
        valid = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        return torch.where(valid, sizes[self.indices.long()], 0).sum((1, 2))

    def check(self, heads: int) -> None:
        """Raise ValueError unless the layout is causal, in range, free of duplicates, and every query has a key.

        Costs a pass over the layout and a host synchronisation: for tests and debugging.
        """
        check_shapes(self, heads)
        ids, counts = self.indices.long(), self.counts.long()
        valid = torch.arange(ids.shape[-1], device=ids.device) < counts[..., None]
        if bool(((ids < 0) | (ids >= self.blocks_k)).logical_and(valid).any()):
            raise ValueError(f"layout holds a key block outside 0..{self.blocks_k - 1}")
        last_query = (
            torch.clamp((torch.arange(self.blocks_q, device=ids.device) + 1) * self.block_q, max=self.length) - 1
        )
        if bool((ids * self.block_k > last_query[None, :, None]).logical_and(valid).any()):
            raise ValueError("layout holds a key block that lies wholly after its query block")
        if bool((ids[..., 1:] <= ids[..., :-1]).logical_and(valid[..., 1:]).any()):
            raise ValueError("layout's key blocks are not strictly ascending (duplicate or unsorted)")
        first_query = torch.arange(self.blocks_q, device=ids.device) * self.block_q
        smallest = torch.where(valid, ids, self.blocks_k).amin(-1)
        if bool((smallest * self.block_k > first_query).any()):
            raise ValueError("layout leaves a query without any key: select the first column or the diagonal")


def check_shapes(layout: BlockLayout, heads: int) -> None:
    """The cheap checks that every call makes: they touch shapes only."""
    if layout.block_q not in BLOCK_SIZES or layout.block_k not in BLOCK_SIZES:
        raise ValueError(f"block sizes are {layout.block_q}x{layout.block_k}; accepted: {BLOCK_SIZES}")
    if layout.indices.shape[:2] != (heads, layout.blocks_q) or layout.counts.shape != (heads, layout.blocks_q):
        raise ValueError(
            f"layout has indices {tuple(layout.indices.shape)} and counts {tuple(layout.counts.shape)}; "
            f"expected ({heads}, {layout.blocks_q}, width) and ({heads}, {layout.blocks_q})"
        )


def causal_pairs(length: int) -> int:
    """Pairs inside the causal triangle of an unpadded prompt: L(L+1)/2."""
    return length * (length + 1) // 2


def block_lengths(length: int, block: int, device: torch.device | str = "cpu") -> Tensor:
    """`(n,)` int64: tokens in each block; all but the last are full."""
    starts = torch.arange(0, length, block, device=device)
    return torch.clamp(length - starts, max=block)


def tile_pairs(length: int, block_q: int, block_k: int, device: torch.device | str = "cpu") -> Tensor:
    """`(n_q, n_k)` int64: (query, key) pairs of each tile that lie inside the causal triangle."""
    queries = torch.arange(0, length, block_q, device=device)[:, None]
    rows = block_lengths(length, block_q, device)[:, None]
    keys = torch.arange(0, length, block_k, device=device)[None, :]
    cols = block_lengths(length, block_k, device)[None, :]

    def below(first: Tensor, count: Tensor, edge: Tensor) -> Tensor:
        """Sum over `count` queries starting at `first` of the keys before `edge` each may see."""
        seen = torch.clamp(edge - first - 1, min=0)  # queries that see fewer than `edge` keys
        part = torch.minimum(seen, count)
        return part * (first + 1) + part * (part - 1) // 2 + (count - part) * edge

    return below(queries, rows, keys + cols) - below(queries, rows, keys)
