"""`BlockLayout`: what a prefill method selects and a block-sparse operator executes, and how pairs are counted.

A layout is the single source of truth of the accounting: selected and executed (query, key) pairs are counted
from it, never estimated from knobs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
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
        columns: `(H, n_q, C)` int32, ids of single keys that a query block reads besides its tiles, or None. The
            first `column_counts` entries of a row are valid and ascending, the rest is 0; none lies in a listed
            tile of its row, none after the row's last query.
        column_counts: `(H, n_q)` int32, number of valid columns, may be 0.
    """

    indices: Tensor
    counts: Tensor
    length: int
    block_q: int
    block_k: int
    columns: Tensor | None = None
    column_counts: Tensor | None = None

    @staticmethod
    def from_mask(mask: Tensor, length: int, block_q: int, block_k: int) -> BlockLayout:
        """Build a layout from a boolean block mask `(H, n_q, n_k)`; non-causal blocks must be False."""
        indices, counts = listed(mask)
        return BlockLayout(indices, counts, length, block_q, block_k)

    def with_columns(self, keys: Tensor) -> BlockLayout:
        """This layout and single key columns: of the keys `(H, L)` bool, those outside the tiles of each row."""
        if self.columns is not None or keys.shape != (self.heads, self.length):
            raise ValueError(
                f"keys {tuple(keys.shape)} do not fit a layout of {self.heads} heads and {self.length} tokens, "
                "or it has columns already"
            )
        # In key blocks the question "outside the listed tiles?" has one answer for all columns of a block.
        open_blocks = ~self.mask()
        block_of = torch.arange(self.length, device=keys.device) // self.block_k
        last_query = torch.clamp((torch.arange(self.blocks_q, device=keys.device) + 1) * self.block_q, max=self.length)
        causal = torch.arange(self.length, device=keys.device) < last_query[:, None]
        wanted, counts = [], []
        for head in range(self.heads):  # one head at a time: n_q x L booleans, not H x n_q x L
            ids = keys[head].nonzero().flatten()
            mask = open_blocks[head][:, block_of[ids]] & causal[:, ids]
            places, count = listed(mask[None])
            inside = torch.arange(places.shape[-1], device=keys.device) < count[..., None]
            wanted.append(torch.where(inside, ids[places.long()] if len(ids) else places.long(), 0)[0].to(torch.int32))
            counts.append(count[0])
        width = max(rows.shape[-1] for rows in wanted)
        columns = torch.stack([F.pad(rows, (0, width - rows.shape[-1])) for rows in wanted])
        return replace(self, columns=columns, column_counts=torch.stack(counts))

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
        """`(H,)` int64: (query, key) pairs inside the causal triangle that lie in a listed tile or column."""
        weights = tile_pairs(self.length, self.block_q, self.block_k, self.indices.device)
        valid = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        rows = torch.arange(self.blocks_q, device=self.indices.device)[None, :, None]
        return torch.where(valid, weights[rows, self.indices.long()], 0).sum((1, 2)) + self._column_pairs()

    def _column_pairs(self) -> Tensor | int:
        if self.columns is None:
            return 0
        device = self.columns.device
        valid = torch.arange(self.columns.shape[-1], device=device) < self.column_counts[..., None]
        first = (torch.arange(self.blocks_q, device=device) * self.block_q)[None, :, None]
        last = torch.clamp(first + self.block_q, max=self.length)
        return torch.where(valid, last - torch.maximum(first, self.columns.long()), 0).sum((1, 2))

    def keys_read(self) -> Tensor:
        """`(H,)` int64: keys that are loaded, summed over query blocks (each loads K and V of its keys once)."""
        sizes = block_lengths(self.length, self.block_k, self.indices.device)
        valid = torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]
        tiles = torch.where(valid, sizes[self.indices.long()], 0).sum((1, 2))
        return tiles if self.columns is None else tiles + self.column_counts.sum(1)

    def check(self, heads: int) -> None:
        """Raise ValueError unless the layout is causal, in range, free of duplicates, and every query has a key.

        Costs a pass over the layout and a host synchronisation: for tests and debugging.
        """
        check_shapes(self, heads)
        if bool((self.counts < 1).any()) or bool((self.counts > self.indices.shape[-1]).any()):
            raise ValueError(
                f"layout lists fewer than one key block in a row, or more than its {self.indices.shape[-1]}"
            )
        if self.columns is not None and bool((self.column_counts > self.columns.shape[-1]).any()):
            raise ValueError(f"layout counts more columns than the {self.columns.shape[-1]} it lists")
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
        if self.columns is not None:
            columns = self.columns.long()
            valid = torch.arange(columns.shape[-1], device=ids.device) < self.column_counts[..., None]
            if bool(((columns < 0) | (columns > last_query[None, :, None])).logical_and(valid).any()):
                raise ValueError("layout holds a key column outside the keys that its query block may see")
            if bool((columns[..., 1:] <= columns[..., :-1]).logical_and(valid[..., 1:]).any()):
                raise ValueError("layout's key columns are not strictly ascending (duplicate or unsorted)")
            if bool(self.mask().gather(-1, columns // self.block_k).logical_and(valid).any()):
                raise ValueError("layout holds a key column that lies in a listed tile of its query block")
            reach = torch.where(valid, columns, self.length).amin(-1) if columns.shape[-1] else self.length
            smallest = torch.minimum(smallest * self.block_k, torch.as_tensor(reach, device=ids.device))
        else:
            smallest = smallest * self.block_k
        if bool((smallest > first_query).any()):
            raise ValueError("layout leaves a query without any key: select the first column or the diagonal")


def listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids `(H, n, W)` int32 of the True entries of `(H, n, m)`, ascending, then 0; and their counts `(H, n)` int32."""
    counts = mask.sum(-1, dtype=torch.int32)
    width = int(counts.max()) if counts.numel() else 0
    ids = counts.new_zeros(*counts.shape, width)
    for head in range(mask.shape[0]):  # 64-bit coordinates of one head at a time
        row, column = mask[head].nonzero(as_tuple=True)
        first = counts[head].long().cumsum(0) - counts[head]
        ids[head, row, torch.arange(len(row), device=mask.device) - first[row]] = column.to(torch.int32)
    return ids, counts


def check_shapes(layout: BlockLayout, heads: int) -> None:
    """The cheap checks that every call makes: they touch shapes only."""
    if layout.block_q not in BLOCK_SIZES or layout.block_k not in BLOCK_SIZES:
        raise ValueError(f"block sizes are {layout.block_q}x{layout.block_k}; accepted: {BLOCK_SIZES}")
    if layout.indices.shape[:2] != (heads, layout.blocks_q) or layout.counts.shape != (heads, layout.blocks_q):
        raise ValueError(
            f"layout has indices {tuple(layout.indices.shape)} and counts {tuple(layout.counts.shape)}; "
            f"expected ({heads}, {layout.blocks_q}, width) and ({heads}, {layout.blocks_q})"
        )
    if (layout.columns is None) != (layout.column_counts is None):
        raise ValueError("layout has only one of columns and column_counts; expected both or neither")
    if layout.columns is not None:
        shapes = tuple(layout.columns.shape[:2]), tuple(layout.column_counts.shape)
        if shapes != ((heads, layout.blocks_q), (heads, layout.blocks_q)):
            raise ValueError(
                f"layout has columns {tuple(layout.columns.shape)} and column_counts {shapes[1]}; "
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
