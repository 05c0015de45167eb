"""Selections that are sense or nonsense, oracles that tell them apart, and methods that select nonsense."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import tiny
import torch
from torch import Tensor

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels.types import Blocks, Keep, RaggedKV, Reads, listed
from lm_eval_sparse.methods import METHODS, Call, DecodeMethod, EvictionMethod, PrefillMethod

SEED = int(os.environ.get("SELECTIONS_SEED") or random.SystemRandom().randrange(1 << 31))
GARBAGE = (-(2**31), -1, 0, 1, 2, 3, 5, 10**6, 2**31 - 1)
HEADS, KV_HEADS, LAYERS, PAGE = 4, 2, 2, 8


@pytest.fixture
def rng() -> random.Random:
    print(f"SELECTIONS_SEED={SEED}")
    return random.Random(SEED)


def random_layout(rng: random.Random, kind: str | None, longest: int = 200) -> Blocks:
    """A good layout with columns of a kind, contiguous."""
    length, heads = rng.randrange(1, longest), 2
    block_q, block_k = rng.choice((16, 32, 64)), rng.choice((16, 32, 64))
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    queries, keys = -(-length // block_q), -(-length // block_k)
    last = torch.clamp((torch.arange(queries) + 1) * block_q, max=length) - 1
    mask = torch.rand(heads, queries, keys, generator=generator) < rng.random()
    mask &= torch.arange(keys) * block_k <= last[:, None]
    mask[..., 0] = True
    layout = Blocks.from_mask(mask, length, block_q, block_k)
    some = torch.rand(heads, queries, length, generator=generator) < rng.random()
    if kind == "shared":
        layout = layout.with_columns(some[:, 0])
        layout = replace(layout, columns=layout.columns.contiguous())
    elif kind == "own":
        some &= torch.arange(length) <= last[:, None]
        ids, counts = listed(some & ~mask.repeat_interleave(block_k, 2)[..., :length])
        layout = replace(layout, columns=ids, column_counts=counts)
    return layout


def spoiled(rng: random.Random, *parts: Tensor) -> None:
    """Change entries of some of these tensors."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        part = rng.choice([part for part in parts if part.numel()])
        place = rng.randrange(part.numel())
        near = int(part.view(-1)[place]) + rng.choice((-1, 1))
        part.view(-1)[place] = max(-(2**31), min(2**31 - 1, rng.choice((*GARBAGE, near))))


def is_nonsense(layout: Blocks, head: int) -> bool:
    """By the definition of `Blocks`, key by key."""
    block_q, block_k, length = layout.block_q, layout.block_k, layout.length
    shared = layout.columns is not None and layout.columns.shape[1] == 1
    everything: list[int] = []
    if shared:
        everything = layout.columns[head, 0, : max(0, int(layout.column_counts[head, -1]))].tolist()
    for row in range(layout.blocks_q):
        first, end = row * block_q, min(length, (row + 1) * block_q)
        count = int(layout.counts[head, row])
        if not 1 <= count <= layout.indices.shape[-1]:
            return True
        tiles = layout.indices[head, row, :count].tolist()
        columns: list[int] = []
        if layout.columns is not None:
            number = int(layout.column_counts[head, row])
            if not 0 <= number <= layout.columns.shape[-1]:
                return True
            columns = layout.columns[head, 0 if shared else row, :number].tolist()
            if shared and columns != [key for key in everything if key < end]:
                return True
        for ids, size in ((tiles, block_k), (columns, 1)):
            if ids != sorted(set(ids)) or any(not 0 <= one * size < end for one in ids):
                return True
        read = {key for tile in tiles for key in range(tile * block_k, (tile + 1) * block_k)}
        if not shared and read & set(columns):
            return True
        if any(not any(key <= query for key in read | set(columns)) for query in range(first, end)):
            return True
    return False


def random_pages(rng: random.Random, lists: int, steps: int) -> tuple[RaggedKV, Reads]:
    size = rng.choice((2, 8, 16))
    lengths = [rng.choice((0, steps + rng.randrange(90))) for _ in range(4)]
    width = max(-(-max(lengths) // size), 1) + rng.randrange(3)
    pages = torch.tensor(rng.choices(GARBAGE, k=4 * lists * steps * width)).int().view(4, lists, steps, width)
    counts = torch.tensor(rng.choices(GARBAGE, k=4 * lists * steps)).int().view(4, lists, steps)
    for s, length in enumerate(lengths):
        for g in range(lists if length else 0):
            for t in range(steps):
                there = -(-(length - steps + 1 + t) // size)
                chosen = sorted(rng.sample(range(there), rng.randrange(1, there + 1)))
                pages[s, g, t, : len(chosen)] = torch.tensor(chosen)
                counts[s, g, t] = len(chosen)
    starts = [sum(lengths[:s]) for s in range(4)]
    storage = (torch.randn(max(1, sum(lengths)), 16) for _ in "kv")
    return RaggedKV.of(*storage, starts, lengths), Reads(pages, counts, size)


def wrong_lists(kv: RaggedKV, selection: Reads) -> Tensor:
    """`(S, Gs, T)` bool, page by page."""
    found = torch.zeros_like(selection.counts, dtype=torch.bool)
    steps, width = selection.ids.shape[2:]
    for s, g, t in itertools.product(*map(range, found.shape)):
        length, count = int(kv.lengths[s]), int(selection.counts[s, g, t])
        if length:
            ids = selection.ids[s, g, t, : max(count, 0)].tolist()
            seen = [0 <= one * selection.unit < length - steps + 1 + t for one in ids]
            found[s, g, t] = not 1 <= count <= width or ids != sorted(set(ids)) or not all(seen)
    return found


@dataclass(frozen=True)
class Prefill(PrefillMethod):
    """The first block and the diagonal; `spoil` changes the layout in layer `layer`, or in all."""

    name: ClassVar[str] = "bad_prefill"
    unit: ClassVar[str] = "-"
    importance: ClassVar[str] = "-"
    allocation: ClassVar[str] = "-"
    kv: ClassVar[str] = "-"
    reference: ClassVar[str] = "-"
    spoil: ClassVar[Callable[[Blocks], Blocks | None]] = lambda layout: None
    layer: ClassVar[int | None] = 1
    calls: ClassVar[list[int]] = []

    def select(self, call: Call) -> Blocks:
        query, length = call.query, call.length
        number = -(-length // 16)
        mask = torch.eye(number, dtype=torch.bool, device=query.device).repeat(len(query), 1, 1)
        mask[..., 0] = True
        layout = Blocks.from_mask(mask, length, 16, 16)
        type(self).calls.append(1)
        if type(self).layer in (None, (len(type(self).calls) - 1) % LAYERS):
            layout = type(self).spoil(layout) or layout
        return layout


@dataclass(frozen=True)
class Eviction(EvictionMethod):
    """The first and the last tokens."""

    name: ClassVar[str] = "bad_eviction"
    unit = importance = allocation = kv = reference = "-"
    spoil: ClassVar[Callable[[Keep], Keep | None]] = lambda kept: None
    layer: ClassVar[int | None] = 1
    calls: ClassVar[list[int]] = []

    def select(self, call: Call) -> Keep:
        query, key, length = call.query, call.key, call.length
        ids = torch.tensor([0, 1, 2, *range(length - 20, length)], device=query.device).repeat(len(key), 1)
        kept = Keep(ids, torch.full((len(key),), 23, device=query.device), 23 * len(key))
        type(self).calls.append(1)
        if type(self).layer in (None, (len(type(self).calls) - 1) % LAYERS):
            kept = type(self).spoil(kept) or kept
        return kept


@dataclass(frozen=True)
class Decode(DecodeMethod):
    """The first page and the current one."""

    name: ClassVar[str] = "bad_decode"
    unit = importance = allocation = kv = reference = "-"
    spoil: ClassVar[Callable[[Reads], Reads | None]] = lambda pages: None
    layer: ClassVar[int | None] = 1
    calls: ClassVar[list[int]] = []
    own: ClassVar[bool] = False

    page_size: int = PAGE

    def select(self, call: Call) -> Reads:
        query = call.query
        sequences, group, steps, _ = query.shape
        current = (call.cache.kv.visible(steps) - 1) // PAGE
        pages = torch.stack([torch.zeros_like(current), current, torch.full_like(current, 10**6)], -1).int()[:, None]
        lists = group if type(self).own else 1
        pages = pages.repeat(1, lists, 1, 1)
        counts = torch.full((sequences, lists, steps), 2, dtype=torch.int32, device=query.device)
        selection = Reads(pages, counts, PAGE)
        type(self).calls.append(1)
        if type(self).layer in (None, (len(type(self).calls) - 1) % LAYERS):
            selection = type(self).spoil(selection) or selection
        return selection


def change(part: str, place: Any, value: Any) -> Callable[[Any], None]:
    def spoil(selection: Any) -> None:
        tensor = getattr(selection, part)
        tensor[place] = torch.tensor(value, dtype=tensor.dtype)

    return spoil


#: Kind of nonsense -> what it does to a good selection of some 60 tokens, and what the line says. Head 1 is to blame.
LAYOUTS: dict[str, tuple[Callable[[Blocks], Any], str]] = {
    "no key": (change("counts", (1, 2), 0), "query head 1: the layout lists fewer than one key block"),
    "too many": (
        change("counts", (1, 2), 9),
        "query head 1: the layout lists fewer than one key block in a row, or more",
    ),
    "negative": (change("indices", (1, 2, 0), -1), "query head 1: the layout holds a key block outside 0.."),
    "out of range": (change("indices", (1, 2, 1), 999), "query head 1: the layout holds a key block outside 0.."),
    "future": (change("indices", (1, 2, 1), 3), "query head 1: the layout lists a key block that lies wholly after"),
    "twice": (change("indices", (1, 2), [2, 2]), "query head 1: the layout lists key blocks that are not strictly"),
    "descending": (
        change("indices", (1, 2), [2, 0]),
        "query head 1: the layout lists key blocks that are not strictly",
    ),
    "int64": (lambda layout: replace(layout, counts=layout.counts.long()), "layout's ids and counts are"),
    "another length": (lambda layout: replace(layout, length=5), "layout is for 5 tokens"),
    "no lists": (lambda layout: replace(layout, indices=layout.indices[..., :0]), "layout lists no key block"),
}
KEPT: dict[str, tuple[Callable[[Keep], Any], str]] = {
    "nothing": (change("counts", 1, 0), "KV head 1: it keeps fewer than one token, or more than 23"),
    "too many": (change("counts", 1, 24), "KV head 1: it keeps fewer than one token, or more than 23"),
    "miscounted": (change("counts", 1, 22), "KV head 0: it keeps numbers of tokens that do not add up"),
    "negative": (change("ids", (1, 0), -1), "KV head 1: it lists token ids that are negative or not below"),
    "out of range": (change("ids", (1, 22), 10**9), "KV head 1: it lists token ids that are negative or not"),
    "twice": (change("ids", (1, 1), 0), "KV head 1: it lists token ids that are not strictly ascending"),
    "descending": (change("ids", (1, slice(0, 2)), [1, 0]), "KV head 1: it lists token ids that are not strictly"),
    "total": (lambda kept: replace(kept, total=0), "total is 0, expected"),
    "int32": (lambda kept: replace(kept, ids=kept.ids.int()), "ids are torch.int32"),
    "shape": (lambda kept: replace(kept, counts=kept.counts[:1]), r"expected \(2, W\)"),
}
PAGES: dict[str, tuple[Callable[[Reads], Any], str]] = {
    "no page": (change("counts", (1, 0, 0), 0), "leaves a token without any page"),
    "too many": (change("counts", (1, 0, 0), 4), "or counts more than the 3 it lists"),
    "negative": (change("ids", (1, 0, 0, 0), -1), "may not see: it is negative"),
    "future": (change("ids", (1, 0, 0, 1), 500), "may not see: it begins after the token"),
    "wraps": (change("ids", (1, 0, 0, 1), 1 << 29), "may not see: it begins after the token"),
    "twice": (change("ids", (1, 0, 0, 1), 0), "does not list pages in ascending order"),
    "descending": (change("ids", (1, 0, 0, slice(0, 2)), [2, 1]), "does not list pages in ascending order"),
    "int64": (lambda found: replace(found, counts=found.counts.long()), "counts torch.int64"),
    "page size": (lambda found: replace(found, unit=16), "read_unit is 8"),
    "for ever": (lambda found: replace(found, ready=torch.zeros(len(found.ids)).int()), "ready is given"),
}


def bad(monkeypatch: pytest.MonkeyPatch, cls: Any, spoil: Callable[[Any], Any], layer: int | None = 1) -> None:
    METHODS.add(cls)
    monkeypatch.setattr(cls, "spoil", staticmethod(spoil))
    monkeypatch.setattr(cls, "layer", layer)
    monkeypatch.setattr(cls, "calls", [])


def prompt_of(rng: random.Random) -> str:
    return tiny.words(rng.randrange(10**6), rng.randrange(60, 90))


def line_of(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)
