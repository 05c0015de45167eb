"""Sequences that share their beginnings: every kernel that takes them gives what it gives each in one piece."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from lm_eval_sparse.kernels.cache.append import append
from lm_eval_sparse.kernels.decode import mass, paged_decode
from lm_eval_sparse.kernels.estimate import page_scores, update_bounds
from lm_eval_sparse.kernels.types import PageBounds, RaggedKV, Reads

DIM, PAGE, HEADS = 16, 8, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("naive", "gather", "triton")


def shared(seed: int, dtype: torch.dtype = torch.float32, page: int = PAGE) -> RaggedKV:
    """Five rows of two prompts with answers of their own, an idle row among them, in storage full of other numbers."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = [[rng.randrange(3, 70) for _ in range(HEADS)] for _ in range(2)]
    starts, free = [], rng.randrange(5)
    for prompt in lengths:
        starts.append([])
        for length in prompt:
            starts[-1].append(free)
            free += length + rng.randrange(3)
    firsts, tails, splits, held = [], [], [], []
    storage = torch.randn(2, 2000, DIM, generator=generator, dtype=torch.float64)
    for row in range(5):
        prompt = row % 2
        for head in range(HEADS):
            length, more = lengths[prompt][head], rng.randrange(1, 20)
            split = length // page * page
            firsts.append(starts[prompt][head])
            splits.append(split)
            tails.append(free - split)
            held.append(0 if row == 3 else length + more)
            last = slice(starts[prompt][head] + split, starts[prompt][head] + length)
            storage[:, free : free + length - split] = storage[:, last]  # the page that is not full is each row's own
            free += length - split + more + rng.randrange(3)
    numbers = (torch.tensor(part, device=DEVICE) for part in (firsts, tails, splits))
    first, tail, split = numbers
    keys, values = storage.to(DEVICE, dtype)
    lengths_ = torch.tensor(held, dtype=torch.int32, device=DEVICE)
    return RaggedKV(keys, values, first, lengths_, max(held), HEADS, None, tail, split)


def reads(kv: RaggedKV, lists: int, seed: int) -> Reads:
    generator = torch.Generator().manual_seed(seed)
    pages = -(-kv.longest // PAGE)
    own = (kv.lengths.long().cpu()[:, None, None, None] - 1).clamp(min=0) // PAGE
    place = torch.arange(pages).expand(len(kv.starts), lists, 1, pages)
    mask = (torch.rand(place.shape, generator=generator) < 0.4) & (place < own) | (place == own)
    return Reads.from_mask(mask.to(DEVICE), PAGE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lists", [0, 1, 3])
def test_attention(backend: str, lists: int) -> None:
    kv = shared(lists)
    query = torch.randn(len(kv.starts), 3, 1, DIM, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    selection = reads(kv, lists, 11) if lists else None
    apart = replace(kv.copied(), longest=kv.longest)
    options = {"scale": 0.3, "backend": backend}
    lse, wanted_lse = (torch.empty(query.shape[:3], device=DEVICE) for _ in range(2))
    out, _ = paged_decode(query, kv, selection, lse=lse, **options)
    same, _ = paged_decode(query, apart, selection, lse=wanted_lse, **options)
    assert torch.equal(out, same)
    assert torch.equal(lse, wanted_lse)
    wide = replace(apart, keys=apart.keys.double(), values=apart.values.double())
    oracle, _ = paged_decode(query.double(), wide, selection, scale=0.3, backend="naive")
    assert (out - oracle).abs().max() < 1e-5
    assert out[6:8].abs().max() == 0  # the idle row


@pytest.mark.parametrize("backend", ["naive", "triton"])
def test_appending_and_bounds(backend: str) -> None:
    """New tokens go where they belong; bounds of pages of both parts are those of their keys."""
    kv = shared(3)
    generator = torch.Generator().manual_seed(5)
    new, more = (torch.randn(len(kv.starts), 1, DIM, generator=generator).to(DEVICE) for _ in range(2))
    before = kv.keys.clone()
    append(kv, new, more, backend=backend)
    held = kv.lengths > 0
    last = kv.at((kv.lengths.long() - 1).clamp(min=0)[:, None])[:, 0]
    assert torch.equal(kv.keys[last[held]], new[held, 0])
    assert torch.equal(kv.values[last[held]], more[held, 0])
    assert int((kv.keys != before).any(1).sum()) == int(held.sum())  # and nowhere else

    pages = -(-kv.longest // PAGE)
    low = torch.full((3 * len(kv.starts) * pages, DIM), torch.nan, device=DEVICE)
    first = torch.arange(len(kv.starts), device=DEVICE) * pages
    # The pages behind the split lie elsewhere.
    tails = first + len(kv.starts) * pages + 5
    bounds = PageBounds(PAGE, low, low.clone(), first, tails)
    update_bounds(kv, bounds, torch.zeros_like(kv.lengths), backend=backend)
    query = torch.randn(len(kv.starts), 3, 1, DIM, generator=generator).to(DEVICE)
    apart = kv.copied()
    for sequence in range(len(kv.starts)):
        length, split = int(kv.lengths[sequence]), int(kv.splits[sequence])
        for page in range(-(-length // PAGE)):
            keys = apart.keys[int(apart.starts[sequence]) :][page * PAGE : min(length, page * PAGE + PAGE)]
            row = int((tails if page * PAGE >= split else first)[sequence]) + page
            assert torch.equal(bounds.low[row], keys.amin(0))
            assert torch.equal(bounds.high[row], keys.amax(0))
    for together in (True, False):
        found = page_scores(query, bounds, kv, shared=together, pages=pages, backend=backend)
        for sequence in range(len(kv.starts)):
            complete = max(int(kv.lengths[sequence]) - 1, 0) // PAGE
            keys = apart.keys[int(apart.starts[sequence]) :][: complete * PAGE].unflatten(0, (complete, PAGE)).double()
            q = query[sequence, :, 0].double()[:, None]
            wanted = torch.maximum(q * keys.amin(1), q * keys.amax(1)).sum(-1) if complete else q[:, 0, :0]
            wanted = wanted.sum(0, keepdim=True) if together else wanted
            assert torch.allclose(found[sequence, :, 0, :complete].double(), wanted, atol=1e-4)


def test_what_does_not_take_them_says_so() -> None:
    kv = shared(4)
    query = torch.randn(len(kv.starts), 3, 1, DIM).to(DEVICE)
    with pytest.raises(ValueError, match="share their beginnings"):
        mass(query, kv, None, torch.zeros(query.shape[:3], device=DEVICE), scale=1.0)
    with pytest.raises(ValueError, match="share their beginnings"):
        kv.rows()
    with pytest.raises(ValueError, match="tails and splits"):
        paged_decode(query, replace(kv, splits=None), scale=1.0)
    with pytest.raises(ValueError, match="both or neither"):
        low = torch.zeros(9, DIM, device=DEVICE)
        update_bounds(kv, PageBounds(PAGE, low, low, kv.starts), torch.zeros_like(kv.lengths))
