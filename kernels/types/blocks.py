"""`Blocks`: what a prefill method selects and a block-sparse operator executes, and how pairs are counted.

A layout is the single source of truth of the accounting: selected and executed (query, key) pairs are counted
from it, never estimated from knobs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import choose
from .cost import Cost

BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Blocks:
    """Key blocks that each query block of each query head reads, for one unpadded row.

    Attributes:
        indices: `(H, n_q, W)` int32, ids of key blocks; the first `counts` entries of a row are valid and
            ascending, what lies behind them is undefined.
        counts: `(H, n_q)` int32, number of valid entries, at least 1.
        length: number of tokens `L` of the row (queries = keys).
        block_q, block_k: block sizes in tokens; the last block of each kind may be partial.
        columns: single keys that a query block reads besides its tiles, or None. `(H, n_q, C)` int32: a list for
            each query block; or `(H, 1, C)`: one list for all query blocks of a head. The first `column_counts`
            entries are valid and ascending, what lies behind them is undefined; none lies after the last query of
            the block. A column in a listed tile of the block adds nothing (shared lists hold such, own lists do not).
        column_counts: `(H, n_q)` int32, number of valid columns, may be 0.
        skip_below: logarithm of the share of a query's largest weight so far below which a tile's values are not read,
            or None. No backend skips yet: anything but None is refused.
        cost: what selecting took.
        knobs: the knobs as solved for this call, numbers (tensors of one number on a GPU), for the results.
        count_selected: gives the `(H,)` int64 pairs of the method's own pattern inside the causal triangle; None
            where the method selects whole tiles, so that they are the executed ones.
    """

    indices: Tensor
    counts: Tensor
    length: int
    block_q: int
    block_k: int
    columns: Tensor | None = None
    column_counts: Tensor | None = None
    skip_below: float | None = None
    cost: Cost = Cost()
    knobs: dict[str, Any] = field(default_factory=dict)
    count_selected: Callable[[], Tensor] | None = None

    @staticmethod
    def from_mask(mask: Tensor, length: int, block_q: int, block_k: int) -> Blocks:
        """Build a layout from a boolean block mask `(H, n_q, n_k)`; non-causal blocks must be False."""
        indices, counts = listed(mask)
        return Blocks(indices, counts, length, block_q, block_k)

    def with_columns(self, keys: Tensor) -> Blocks:
        """This layout and single key columns: in every query block of a head the keys `(H, L)` bool that it may see."""
        if self.columns is not None or keys.shape != (self.heads, self.length):
            raise ValueError(
                f"keys {tuple(keys.shape)} do not fit a layout of {self.heads} heads and {self.length} tokens, "
                "or it has columns already"
            )
        before = keys.cumsum(-1, dtype=torch.int32)  # columns up to and including each key
        ids = torch.arange(self.length, dtype=torch.int32, device=keys.device)
        # Keys that are not kept are written to a place behind the list.
        columns = ids.new_empty(self.heads, 1, self.length + 1)
        columns[:, 0].scatter_(1, torch.where(keys, before - 1, self.length).long(), ids.expand(self.heads, -1))
        last = torch.clamp((torch.arange(self.blocks_q, device=keys.device) + 1) * self.block_q, max=self.length) - 1
        return replace(self, columns=columns[..., : self.length], column_counts=before[:, last].contiguous())

    @property
    def heads(self) -> int:
        return self.indices.shape[0]

    @property
    def blocks_q(self) -> int:
        return -(-self.length // self.block_q)

    @property
    def blocks_k(self) -> int:
        return -(-self.length // self.block_k)

    def valid(self) -> Tensor:
        """`(H, n_q, W)` bool: which entries of `indices` are valid."""
        return torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts[..., None]

    def mask(self) -> Tensor:
        """The boolean block mask `(H, n_q, n_k)` of this layout."""
        blocks = torch.where(self.valid(), self.indices, self.blocks_k).long()
        hits = torch.zeros(*self.counts.shape, self.blocks_k + 1, dtype=torch.bool, device=self.indices.device)
        return hits.scatter_(-1, blocks, True)[..., :-1]

    def selected_pairs(self) -> Tensor:
        """`(H,)` int64: pairs of the method's own pattern, counted anew at each call."""
        return self.executed_pairs() if self.count_selected is None else self.count_selected()

    def executed_pairs(self) -> Tensor:
        """`(H,)` int64: (query, key) pairs inside the causal triangle that lie in a listed tile or column."""
        return self._pairs() if choose("auto", self.indices.device) == "naive" else self.pairs_and_keys()[0]

    def keys_read(self) -> Tensor:
        """`(H,)` int64: keys that are loaded, summed over query blocks (each loads K and V of its keys once)."""
        return self._keys() if choose("auto", self.indices.device) == "naive" else self.pairs_and_keys()[1]

    def pairs_and_keys(self, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """`executed_pairs` and `keys_read`, which `triton` counts at once and without waiting for the device."""
        if choose(backend, self.indices.device) == "naive":
            return self._pairs(), self._keys()
        from . import blocks_triton

        return blocks_triton.walk(self)[:2]

    def walk(self) -> tuple[Blocks, Tensor, Tensor, Tensor]:
        """A layout that kernels can execute whatever this one lists, and of this one pairs, keys and `faults`.

        In Triton, and without waiting for the device: whether anything is wrong can be read when all has run. Lists
        with a fault are mended, in place where they are contiguous: their results are worth nothing, as are the numbers
        of their heads, but nothing outside of the keys is read on the way.
        """
        from . import blocks_triton

        parts = (self.indices, self.counts, self.columns, self.column_counts)
        indices, counts, *columns = (None if part is None else part.contiguous() for part in parts)
        layout = replace(self, indices=indices, counts=counts, columns=columns[0], column_counts=columns[1])
        return layout, *blocks_triton.walk(layout, mend=True)

    def _pairs(self) -> Tensor:
        weights = tile_pairs(self.length, self.block_q, self.block_k, self.indices.device)
        valid = self.valid()
        rows = torch.arange(self.blocks_q, device=self.indices.device)[None, :, None]
        tiles = torch.where(valid, weights[rows, torch.where(valid, self.indices, 0).long()], 0).sum((1, 2))
        return tiles if self.columns is None else tiles + self._open_columns(pairs=True)

    def _keys(self) -> Tensor:
        sizes = block_lengths(self.length, self.block_k, self.indices.device)
        valid = self.valid()
        tiles = torch.where(valid, sizes[torch.where(valid, self.indices, 0).long()], 0).sum((1, 2))
        return tiles if self.columns is None else tiles + self._open_columns(pairs=False)

    def _open_columns(self, *, pairs: bool) -> Tensor:
        """`(H,)` int64: columns outside the listed tiles of their query block, or the pairs that they add."""
        device = self.columns.device
        first = torch.arange(self.blocks_q, device=device) * self.block_q
        last = torch.clamp(first + self.block_q, max=self.length)
        if self.columns.shape[1] > 1:  # own lists: none lies in a listed tile
            if not pairs:
                return self.column_counts.sum(1)
            valid = torch.arange(self.columns.shape[-1], device=device) < self.column_counts[..., None]
            seen = last[:, None] - torch.maximum(first[:, None], self.columns.long())
            return torch.where(valid, seen, 0).sum((1, 2))
        keys = self.column_keys().long()
        number, places = (
            F.pad(table.cumsum(-1), (1, 0)) for table in (keys, keys * torch.arange(self.length).to(keys))
        )
        queries = last - first

        def before(head: int, rows: Tensor, end: Tensor) -> Tensor:
            """What the columns below `end` add to the query blocks `rows` of a head."""
            if not pairs:
                return number[head, end]
            # From the block's first query on, a column is seen by part of the queries only.
            far, near, start = torch.minimum(end, first[rows]), torch.maximum(end, first[rows]), first[rows]
            seen = last[rows] * (number[head, near] - number[head, start]) - (places[head, near] - places[head, start])
            return queries[rows] * number[head, far] + seen

        total = []
        for head, listed in enumerate(self.valid()):
            row, place = listed.nonzero(as_tuple=True)
            block = self.indices[head, row, place].long()
            low, high = (torch.minimum(last[row], edge * self.block_k) for edge in (block, block + 1))
            every = before(head, torch.arange(self.blocks_q, device=device), last).sum()
            total.append(every - before(head, row, high).sum() + before(head, row, low).sum())
        return torch.stack(total)

    def column_keys(self) -> Tensor:
        """`(H, L)` bool: the keys of shared column lists."""
        if self.columns is None or self.columns.shape[1] != 1:
            raise ValueError("only shared lists of columns, (H, 1, C), are the same keys for all query blocks")
        valid = torch.arange(self.columns.shape[-1], device=self.columns.device) < self.column_counts[:, -1:]
        places = torch.where(valid, self.columns[:, 0], self.length).long()
        keys = torch.zeros(self.heads, self.length + 1, dtype=torch.bool, device=self.columns.device)
        return keys.scatter_(1, places, True)[:, :-1]

    def check(self, heads: int) -> None:
        """Raise ValueError unless the layout is causal, in range, free of duplicates, and every query has a key.

        Costs a pass over the layout and a host synchronisation.
        """
        check_shapes(self, heads)
        for bits in self.faults().tolist():
            if bits:
                raise ValueError(f"layout {self.words(bits)}")

    def words(self, bits: int) -> str:
        """What the lowest of these bits of `faults` says of a head."""
        columns = 0 if self.columns is None else self.columns.shape[-1]
        return Blocks.fault(bits, self.indices.shape[-1], self.blocks_k, columns)

    @staticmethod
    def fault(bits: int, width: int, blocks: int, columns: int) -> str:
        """Words for the lowest of `bits` of `FAULTS`, for lists of `width` of so many key blocks and columns."""
        lowest = (int(bits) & -int(bits)).bit_length() - 1
        return FAULTS[lowest].format(width=width, blocks=blocks - 1, columns=columns)

    def faults(self) -> Tensor:
        """`(H,)` int32: what is wrong with the lists of each head, a bit for each of `FAULTS`; 0 where nothing is."""
        device, width = self.indices.device, self.indices.shape[-1]
        first = torch.arange(self.blocks_q, device=device, dtype=torch.int32) * self.block_q
        last = torch.clamp(first + self.block_q, max=self.length) - 1
        ids, counts = self.indices, self.counts.clamp(0, width)
        valid = torch.arange(width, device=device) < counts[..., None]
        inside = (ids >= 0) & (ids < self.blocks_k)
        found = [
            (self.counts < 1) | (self.counts > width),
            ~inside & valid,
            inside & (ids > (last // self.block_k)[:, None]) & valid,
            (ids[..., 1:] <= ids[..., :-1]) & valid[..., 1:],
        ]
        has_key = torch.zeros_like(counts, dtype=torch.bool)
        if width:
            has_key = (counts > 0) & inside[..., 0] & (ids[..., 0] <= first // self.block_k)
        if self.columns is not None:
            number = self.column_counts.clamp(0, self.columns.shape[-1])
            if self.columns.shape[-1]:
                has_key |= (number > 0) & (self.columns[..., 0] >= 0) & (self.columns[..., 0] <= first)
            found += [~has_key, number != self.column_counts]
            if self.columns.shape[1] == 1:
                found += self._shared_faults(number, first, last)
            else:
                found += self._own_faults(number, last, valid & inside)
        else:
            found.append(~has_key)
        bits = torch.zeros(self.heads, dtype=torch.int32, device=device)
        for place, wrong in enumerate(found):
            bits |= wrong.flatten(1).any(1).int() << place
        return bits

    def _own_faults(self, number: Tensor, last: Tensor, tiles: Tensor) -> list[Tensor]:
        """Faults of column lists of which every query block has its own; `tiles` says which listed tiles exist."""
        columns = self.columns
        valid = torch.arange(columns.shape[-1], device=columns.device) < number[..., None]
        inside = (columns >= 0) & (columns <= last[:, None])
        blocks = torch.where(tiles, self.indices, self.blocks_k).long()
        listed = torch.zeros(*self.counts.shape, self.blocks_k + 1, dtype=torch.bool, device=columns.device)
        listed.scatter_(-1, blocks, True)[..., -1] = False
        taken = listed.gather(-1, torch.where(inside, columns // self.block_k, self.blocks_k).long())
        return [~inside & valid, (columns[..., 1:] <= columns[..., :-1]) & valid[..., 1:], taken & valid]

    def _shared_faults(self, number: Tensor, first: Tensor, last: Tensor) -> list[Tensor]:
        """Faults of column lists that all query blocks of a head share: each block counts those up to its last query.

        What a block counts more than the one before it must lie within its own queries.
        """
        columns = self.columns[:, 0]
        highest = number.cummax(1).values
        place = torch.arange(columns.shape[-1], device=columns.device, dtype=highest.dtype)
        valid = place < highest[:, -1:]
        # The first query block that counts a column.
        owner = torch.searchsorted(highest, place.expand(len(columns), -1).contiguous(), right=True)
        owner = owner.clamp(max=self.blocks_q - 1)
        outside = (columns < 0) | (columns > last[owner])
        missed = (columns >= 0) & (columns < first[owner]) & valid
        falls = (number[:, 1:] < number[:, :-1]).any(1, keepdim=True)
        unordered = (columns[:, 1:] <= columns[:, :-1]) & valid[:, 1:]
        nothing = torch.zeros_like(falls)
        return [outside & valid, unordered, nothing, missed.any(1, keepdim=True) | falls]


#: What may be wrong with the lists of a head; bit i of `Blocks.faults` stands for the i-th.
FAULTS = (
    "lists fewer than one key block in a row, or more than its {width}",
    "holds a key block outside 0..{blocks}",
    "lists a key block that lies wholly after its query block",
    "lists key blocks that are not strictly ascending (duplicate or unsorted)",
    "leaves a query without any key: select the first column or the diagonal",
    "counts more columns than the {columns} it lists, or fewer than none",
    "holds a key column outside the keys that its query block may see",
    "lists key columns that are not strictly ascending (duplicate or unsorted)",
    "holds a key column that lies in a listed tile of its query block",
    "counts fewer columns of a shared list than a query block may see",
)


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


def check_shapes(layout: Blocks, heads: int) -> None:
    """The cheap checks that every call makes: they touch shapes and dtypes only."""
    if layout.skip_below is not None:
        raise ValueError(f"layout has skip_below={layout.skip_below}, and no backend skips tiles yet; expected None")
    lists = (layout.indices, layout.counts, layout.columns, layout.column_counts)
    if any(part is not None and part.dtype != torch.int32 for part in lists):
        found = ", ".join(str(part.dtype) for part in lists if part is not None)
        raise ValueError(f"layout's ids and counts are {found}; expected torch.int32")
    if layout.block_q not in BLOCK_SIZES or layout.block_k not in BLOCK_SIZES:
        raise ValueError(f"block sizes are {layout.block_q}x{layout.block_k}; accepted: {BLOCK_SIZES}")
    if (
        layout.indices.dim() != 3
        or layout.indices.shape[:2] != (heads, layout.blocks_q)
        or layout.counts.shape != (heads, layout.blocks_q)
    ):
        raise ValueError(
            f"layout has indices {tuple(layout.indices.shape)} and counts {tuple(layout.counts.shape)}; "
            f"expected ({heads}, {layout.blocks_q}, width) and ({heads}, {layout.blocks_q})"
        )
    if not layout.indices.shape[2]:
        raise ValueError("layout lists no key block at all; expected at least one in each row")
    if (layout.columns is None) != (layout.column_counts is None):
        raise ValueError("layout has only one of columns and column_counts; expected both or neither")
    if layout.columns is not None:
        shapes = tuple(layout.columns.shape[:2]), tuple(layout.column_counts.shape)
        if (
            layout.columns.dim() != 3
            or shapes[0] not in ((heads, layout.blocks_q), (heads, 1))
            or shapes[1] != (heads, layout.blocks_q)
        ):
            raise ValueError(
                f"layout has columns {tuple(layout.columns.shape)} and column_counts {shapes[1]}; "
                f"expected ({heads}, {layout.blocks_q} or 1, width) and ({heads}, {layout.blocks_q})"
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
