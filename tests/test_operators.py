"""The operators in kernels/ against definitions written here in fp64: loops over tokens, or a mask over all pairs.

Inputs are fresh in every run. A test's seed is printed when it fails; TEST_OPERATORS_SEED=<seed> repeats it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lm_eval_sparse.kernels.block_sparse_prefill import block_sparse_prefill, flex
from lm_eval_sparse.kernels.block_sparse_prefill import gather as prefill_gather
from lm_eval_sparse.kernels.dense import dense_attention
from lm_eval_sparse.kernels.estimators import (
    PageBounds,
    bound_scores,
    diagonal_sums,
    pool,
    sum_blocks,
    window_flops,
    window_sums,
)
from lm_eval_sparse.kernels.estimators import window as window_estimator
from lm_eval_sparse.kernels.layout import BLOCK_SIZES, BlockLayout
from lm_eval_sparse.kernels.paged_decode import PageSelection, paged_decode
from lm_eval_sparse.kernels.paged_decode import gather as paged_gather
from lm_eval_sparse.kernels.ragged import RaggedKV, compact, ragged_decode

LENGTHS = (1, 63, 65, 257, 1000)
HEADS = ((1, 1), (4, 2), (6, 2), (7, 1))  # query heads, KV heads
DIMS = (16, 64, 80, 96, 128, 256)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SOFTCAPS = (None, None, 5.0)
PAGE_SIZES = (16, 32, 64)
TOLERANCE = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-10},
    torch.float32: {"atol": 2e-5, "rtol": 1e-4},
    torch.bfloat16: {"atol": 4e-2, "rtol": 2e-2},
}
PREFILL_BACKENDS = ("naive", "gather")
PAGED_BACKENDS = ("naive", "gather")


class Draw:
    """A source of random choices and tensors."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def chance(self, *shape: int, share: float) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < share


@pytest.fixture
def draw() -> Draw:
    seed = int(os.environ.get("TEST_OPERATORS_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"TEST_OPERATORS_SEED={seed}")
    return Draw(seed)


def close(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype
    assert not bool(out.isnan().any())
    torch.testing.assert_close(out.double(), expected.double(), **TOLERANCE[dtype])


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Softmax attention of one query `(D,)` to all of `(n, D)` keys, in fp64."""
    scores = keys.double() @ query.double() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.softmax(0) @ values.double()


# --- layouts -----------------------------------------------------------------------------------------------------


def last_queries(length: int, block_q: int) -> Tensor:
    return torch.tensor([min(first + block_q, length) - 1 for first in range(0, length, block_q)])


def tile_keys(tiles: Tensor, length: int, block_k: int) -> Tensor:
    """`(H, n_q, L)`: the keys of the tiles `(H, n_q, n_k)`."""
    return tiles[..., torch.arange(length) // block_k]


def visible_pairs(keys: Tensor, block_q: int) -> Tensor:
    """`(H, L, L)`: of the keys `(H, n_q, L)` that each query block reads, those that each query may see."""
    length = keys.shape[-1]
    return keys[:, torch.arange(length) // block_q] & torch.ones(length, length, dtype=torch.bool).tril()


def random_tiles(draw: Draw, heads: int, length: int, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """Causal tiles `(H, n_q, n_k)`, at least one per row, and the rows `(H, n_q)` that need key 0 as a column."""
    n_q, n_k = -(-length // block_q), -(-length // block_k)
    causal = torch.arange(n_k) * block_k <= last_queries(length, block_q)[:, None]
    share = draw.rng.choice((0.05, 0.3, 0.8))
    tiles = draw.chance(heads, n_q, n_k, share=share) & causal
    uncovered = torch.zeros(heads, n_q, dtype=torch.bool)
    for head in range(heads):
        for row in range(n_q):
            cover = draw.rng.choice(("first", "diagonal", "column"))
            if cover == "first":
                tiles[head, row, 0] = True
            elif cover == "diagonal":
                tiles[head, row, row * block_q // block_k] = True
            else:
                tiles[head, row, draw.rng.choice(causal[row].nonzero().flatten().tolist())] = True
                uncovered[head, row] = not bool(tiles[head, row, 0])
    return tiles, uncovered


def row_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids `(H, n, W)` int32, ascending, then 0, and counts `(H, n)` int32 of the True entries of `(H, n, m)`."""
    found = [[row.nonzero().flatten().tolist() for row in head] for head in mask]
    width = max(len(row) for head in found for row in head)
    ids = [[row + [0] * (width - len(row)) for row in head] for head in found]
    counts = [[len(row) for row in head] for head in found]
    ids_tensor = torch.tensor(ids, dtype=torch.int32).reshape(*mask.shape[:2], width)
    return ids_tensor, torch.tensor(counts, dtype=torch.int32)


def random_layout(draw: Draw, heads: int, length: int, block_q: int, block_k: int) -> tuple[BlockLayout, Tensor]:
    """A layout whose rows have columns of their own, written from its definition, and the keys `(H, n_q, L)`."""
    tiles, uncovered = random_tiles(draw, heads, length, block_q, block_k)
    in_tiles = tile_keys(tiles, length, block_k)
    before_end = torch.arange(length) <= last_queries(length, block_q)[:, None]
    # Some heads have many columns, some few, some only those that they need.
    share = torch.tensor([draw.rng.choice((0.0, 0.02, 0.4)) for _ in range(heads)])[:, None, None]
    wanted = torch.rand(in_tiles.shape, generator=draw.generator) < share
    wanted[..., 0] |= uncovered
    columns = wanted & ~in_tiles & before_end
    indices, counts = row_lists(tiles)
    layout = BlockLayout(indices, counts, length, block_q, block_k, *row_lists(columns))
    layout.check(heads)
    return layout, in_tiles | columns


def random_blocks(draw: Draw) -> tuple[int, int]:
    return draw.rng.choice(BLOCK_SIZES), draw.rng.choice(BLOCK_SIZES)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("block_q", BLOCK_SIZES)
def test_with_columns_equals_brute_force(draw: Draw, length: int, block_q: int) -> None:
    block_k, heads = draw.rng.choice(BLOCK_SIZES), draw.rng.choice((1, 3))
    tiles, uncovered = random_tiles(draw, heads, length, block_q, block_k)
    keys = draw.chance(heads, length, share=draw.rng.choice((0.0, 0.1, 0.7)))
    keys[:, 0] |= uncovered.any(1)
    bare = BlockLayout.from_mask(tiles, length, block_q, block_k)
    layout = bare.with_columns(keys)
    layout.check(heads)
    in_tiles = tile_keys(tiles, length, block_k)
    before_end = torch.arange(length) <= last_queries(length, block_q)[:, None]
    columns = keys[:, None] & ~in_tiles & before_end
    assert layout.columns is not None and layout.column_counts is not None
    assert layout.columns.shape[:2] == (heads, 1) and layout.columns.dtype == torch.int32
    assert torch.equal(layout.column_keys(), keys) and layout.column_counts.dtype == torch.int32
    assert torch.equal(layout.column_counts.long(), (keys[:, None] & before_end).sum(-1))
    assert torch.equal(layout.indices, bare.indices) and torch.equal(layout.mask(), tiles)
    read = in_tiles | columns
    assert layout.executed_pairs().tolist() == visible_pairs(read, block_q).sum((1, 2)).tolist()
    assert layout.keys_read().tolist() == read.sum((1, 2)).tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_pairs_and_keys_equal_brute_force(draw: Draw, length: int) -> None:
    """Rows with columns of their own, which `with_columns` never makes."""
    for _ in range(3):
        block_q, block_k = random_blocks(draw)
        layout, keys = random_layout(draw, 3, length, block_q, block_k)
        assert layout.executed_pairs().dtype == layout.keys_read().dtype == torch.int64
        assert layout.executed_pairs().tolist() == visible_pairs(keys, block_q).sum((1, 2)).tolist()
        assert layout.keys_read().tolist() == keys.sum((1, 2)).tolist()


def test_columns_of_no_keys_and_of_all_keys(draw: Draw) -> None:
    tiles = torch.eye(9, dtype=torch.bool)[None].repeat(2, 1, 1)
    bare = BlockLayout.from_mask(tiles, 257, 32, 32)
    none = bare.with_columns(torch.zeros(2, 257, dtype=torch.bool))
    none.check(2)
    assert none.columns is not None and not none.column_counts.any()
    assert none.executed_pairs().tolist() == bare.executed_pairs().tolist()
    assert none.keys_read().tolist() == bare.keys_read().tolist()
    every = bare.with_columns(torch.ones(2, 257, dtype=torch.bool))
    every.check(2)
    assert every.executed_pairs().tolist() == [257 * 258 // 2] * 2
    states = [draw.normal(heads, 257, 16) for heads in (2, 1, 1)]
    for backend in PREFILL_BACKENDS:
        out, _ = block_sparse_prefill(*states, every, backend=backend)
        dense = dense_attention(*(state[None] for state in states), scale=16**-0.5)[0]
        close(out, dense, torch.float64)
        alone, _ = block_sparse_prefill(*states, none, backend=backend)
        close(alone, block_sparse_prefill(*states, bare, backend=backend)[0], torch.float64)


def small_layout() -> BlockLayout:
    """One head, 100 tokens in blocks of 32: every query block reads its diagonal tile and, if it is not the first,
    keys 3 and 30 as columns."""
    indices = torch.arange(4, dtype=torch.int32).reshape(1, 4, 1)
    columns = torch.tensor([[[0, 0], [3, 30], [3, 30], [3, 30]]], dtype=torch.int32)
    counts = torch.tensor([[0, 2, 2, 2]], dtype=torch.int32)
    return BlockLayout(indices, torch.ones(1, 4, dtype=torch.int32), 100, 32, 32, columns, counts)


@pytest.mark.parametrize(
    ("row", "ids", "message"),
    [
        (1, [3, 3], "ascending"),
        (1, [30, 3], "ascending"),
        (2, [3, 64], "in a listed tile"),
        (2, [3, 96], "outside"),  # after the last query of its block
        (3, [3, 100], "outside"),  # after the last token
        (1, [-1, 3], "outside"),
    ],
)
def test_check_finds_broken_columns(row: int, ids: list[int], message: str) -> None:
    layout = small_layout()
    layout.check(1)
    assert layout.columns is not None
    layout.columns[0, row] = torch.tensor(ids, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        layout.check(1)


def test_check_wants_a_key_for_every_query() -> None:
    """Query block 0 of 64 queries reads key block 1 only: its first 32 queries need a column, 0 at best."""
    indices = torch.tensor([[[1]]], dtype=torch.int32)
    layout = BlockLayout(indices, torch.ones(1, 1, dtype=torch.int32), 64, 64, 32)
    for bare in (layout, layout.with_columns(torch.arange(64)[None] == 5), layout.with_columns(torch.zeros(1, 64) > 0)):
        with pytest.raises(ValueError, match="without any key"):
            bare.check(1)
    layout.with_columns(torch.arange(64)[None] == 0).check(1)


def test_check_refuses_a_layout_without_tiles() -> None:
    """`counts` is at least 1; nothing but a ValueError may come of a layout that lists no tile at all."""
    layout = BlockLayout.from_mask(torch.zeros(1, 2, 2, dtype=torch.bool), 64, 32, 32)
    with pytest.raises(ValueError):
        layout.check(1)


# --- prefill -----------------------------------------------------------------------------------------------------


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, pairs: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """The definition, in fp64: each query attends to exactly the keys that `pairs` `(H, L, L)` gives it."""
    group = query.shape[0] // key.shape[0]
    out = []
    for head in range(query.shape[0]):
        scores = query[head].double() @ key[head // group].double().T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = torch.where(pairs[head], scores, float("-inf")).softmax(-1)
        out.append(weights @ value[head // group].double())
    return torch.stack(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_with_columns_equals_the_definition(draw: Draw, length: int, dtype: torch.dtype) -> None:
    (heads, kv_heads), dim, softcap = draw.rng.choice(HEADS), draw.rng.choice(DIMS), draw.rng.choice(SOFTCAPS)
    block_q, block_k = random_blocks(draw)
    layout, keys = random_layout(draw, heads, length, block_q, block_k)
    states = [draw.normal(number, length, dim, dtype=dtype) for number in (heads, kv_heads, kv_heads)]
    expected = masked_attention(*states, visible_pairs(keys, block_q), dim**-0.5, softcap)
    for backend in PREFILL_BACKENDS:
        out, used = block_sparse_prefill(*states, layout, softcap=softcap, backend=backend)
        assert used == backend
        close(out, expected, dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("dim", DIMS)
def test_prefill_takes_all_heads_and_dimensions(draw: Draw, dim: int, heads: int, kv_heads: int) -> None:
    length, softcap, scale = draw.rng.choice(LENGTHS[:-1]), draw.rng.choice(SOFTCAPS), draw.rng.uniform(0.05, 0.5)
    block_q, block_k = random_blocks(draw)
    layout, keys = random_layout(draw, heads, length, block_q, block_k)
    states = [draw.normal(number, length, dim) for number in (heads, kv_heads, kv_heads)]
    expected = masked_attention(*states, visible_pairs(keys, block_q), scale, softcap)
    for backend in PREFILL_BACKENDS:
        out, _ = block_sparse_prefill(*states, layout, scale=scale, softcap=softcap, backend=backend)
        close(out, expected, torch.float64)


def test_prefill_in_small_chunks(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, keys = random_layout(draw, 4, 257, 32, 16)
    states = [draw.normal(number, 257, 16) for number in (4, 2, 2)]
    expected = masked_attention(*states, visible_pairs(keys, 32), 0.25, None)
    for limit in (1, 10_000, 50_000):
        monkeypatch.setattr(prefill_gather, "CHUNK_ELEMENTS", {"cpu": limit, "cuda": limit})
        close(block_sparse_prefill(*states, layout, backend="gather")[0], expected, torch.float64)


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_prefill_reads_listed_keys_only(draw: Draw, poison: float) -> None:
    """Keys that no row of their KV head lists are never read; key block 0 stands in where a row lists less."""
    tiles = torch.eye(32, dtype=torch.bool)[None].repeat(4, 1, 1)
    tiles[:, :, 0] = True
    tiles[:, 1:25] &= ~torch.eye(32, dtype=torch.bool)[1:25]
    columns = torch.arange(1000) % 37 == 5
    layout = BlockLayout.from_mask(tiles, 1000, 32, 32).with_columns(columns.expand(4, -1))
    layout.check(4)
    query, key, value = (draw.normal(number, 1000, 64, dtype=torch.float32) for number in (4, 2, 2))
    keys = tile_keys(tiles, 1000, 32) | (columns & (torch.arange(1000) <= last_queries(1000, 32)[:, None]))
    expected = masked_attention(query, key, value, visible_pairs(keys, 32), 0.125, None)
    unread = ~keys.any(1).any(0)
    assert int(unread.sum()) > 500
    key[:, unread], value[:, unread] = poison, poison
    close(block_sparse_prefill(query, key, value, layout, backend="gather")[0], expected, torch.float32)


def test_flex_refuses_columns_and_auto_says_gather(draw: Draw) -> None:
    for block, dtype in ((16, torch.bfloat16), (64, torch.float32), (128, torch.float64)):
        layout, keys = random_layout(draw, 4, 257, block, block)
        states = [draw.normal(number, 257, 16, dtype=dtype) for number in (4, 2, 2)]
        with pytest.raises(ValueError, match="no single key columns"):
            block_sparse_prefill(*states, layout, backend="flex")
        with pytest.raises(ValueError, match="single key columns"):
            flex.forward(*states, layout, 0.25, None)
        out, used = block_sparse_prefill(*states, layout)
        assert used == "gather"
        close(out, masked_attention(*states, visible_pairs(keys, block), 0.25, None), dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": None}, "only one of columns and column_counts"),
        ({"column_counts": None}, "only one of columns and column_counts"),
        ({"columns": torch.zeros(1, 3, 2, dtype=torch.int32)}, "layout has columns"),
        ({"columns": torch.zeros(2, 4, 2, dtype=torch.int32)}, "layout has columns"),
        ({"column_counts": torch.zeros(1, 3, dtype=torch.int32)}, "layout has columns"),
        ({"indices": torch.zeros(1, 3, 1, dtype=torch.int32)}, "layout has indices"),
        ({"counts": torch.ones(2, 4, dtype=torch.int32)}, "layout has indices"),
        ({"block_q": 48}, "block sizes are 48x32"),
        ({"block_k": 8}, "block sizes are 32x8"),
        ({"length": 99}, "layout is for 99 tokens"),
    ],
)
def test_prefill_refuses_layouts_that_do_not_fit(changes: dict, message: str) -> None:
    layout = replace(small_layout(), **changes)
    states = [torch.randn(1, 100, 16) for _ in "qkv"]
    with pytest.raises(ValueError, match=message):
        block_sparse_prefill(*states, layout)
    if "length" not in changes:
        with pytest.raises(ValueError, match=message):
            layout.check(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: ((q, k[:, :-1], v), {}), "do not fit together"),
        (lambda q, k, v: ((q, k, v[..., :8]), {}), "do not fit together"),
        (lambda q, k, v: ((q, k[..., :8], v[..., :8]), {}), "do not fit together"),
        (lambda q, k, v: ((q, k.repeat(2, 1, 1), v.repeat(2, 1, 1)), {}), "do not fit together"),
        (lambda q, k, v: ((q, k, v.double()), {}), "dtypes are"),
        (lambda q, k, v: ((q.int(), k.int(), v.int()), {}), "floating-point"),
        (lambda q, k, v: ((q, k.to("meta"), v), {}), "devices are"),
        (lambda q, k, v: ((q.to("meta"), k.to("meta"), v.to("meta")), {}), "devices are"),
        (lambda q, k, v: ((q, k, v), {"backend": "paged"}), "backend 'paged' is unknown"),
        (lambda q, k, v: ((q, k, v), {"backend": "flex", "softcap": 5.0}), "it takes no softcap"),
    ],
)
def test_prefill_refuses_bad_calls(change: Callable, message: str) -> None:
    states, options = change(*(torch.randn(1, 100, 16) for _ in "qkv"))
    with pytest.raises(ValueError, match=message):
        block_sparse_prefill(*states, small_layout(), **options)


# --- ragged storage ----------------------------------------------------------------------------------------------


def ragged(
    draw: Draw, lengths: list[int], dim: int, value_dim: int, dtype: torch.dtype, poison: float = float("nan")
) -> RaggedKV:
    """Sequences in random order in the storage, with poisoned gaps before, between and behind them."""
    starts, end = [0] * len(lengths), draw.rng.randrange(1, 9)
    for sequence in draw.rng.sample(range(len(lengths)), len(lengths)):
        starts[sequence] = end
        end += lengths[sequence] + draw.rng.randrange(0, 9)
    end += draw.rng.randrange(1, 9)
    keys, values = (torch.full((end, width), poison, dtype=dtype) for width in (dim, value_dim))
    for start, length in zip(starts, lengths, strict=True):
        keys[start : start + length] = draw.normal(length, dim, dtype=dtype)
        values[start : start + length] = draw.normal(length, value_dim, dtype=dtype)
    return RaggedKV(keys, values, starts, lengths)


def decode_definition(
    query: Tensor, kv: RaggedKV, scale: float, softcap: float | None, selection: PageSelection | None = None
) -> Tensor:
    """Loop over sequences, query heads and tokens: attention to the visible keys (of the listed pages), in fp64."""
    sequences, group, steps, _ = query.shape
    out = torch.zeros(*query.shape[:3], kv.values.shape[-1], dtype=torch.float64)
    for s in range(sequences):
        for g in range(group):
            for t in range(steps):
                keys = list(range(kv.lengths[s] - steps + 1 + t))
                if selection is not None:
                    own = 0 if selection.pages.shape[1] == 1 else g
                    count = int(selection.counts[s, own, t])
                    pages = set(selection.pages[s, own, t, :count].tolist())
                    keys = [key for key in keys if key // selection.page_size in pages]
                stored = [kv.starts[s] + key for key in keys]
                out[s, g, t] = attend(query[s, g, t], kv.keys[stored], kv.values[stored], scale, softcap)
    return out


def random_lengths(draw: Draw, rows: int, kv_heads: int, steps: int) -> list[int]:
    return [max(steps, draw.rng.choice((*LENGTHS, draw.rng.randrange(1, 400)))) for _ in range(rows * kv_heads)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 2, 5, 17])
def test_ragged_decode_equals_the_definition(draw: Draw, steps: int, dtype: torch.dtype) -> None:
    for heads, kv_heads in HEADS:
        dim, softcap = draw.rng.choice(DIMS), draw.rng.choice(SOFTCAPS)
        lengths = random_lengths(draw, draw.rng.choice((1, 2)), kv_heads, steps)
        poison = draw.rng.choice((float("nan"), 1e30))
        kv = ragged(draw, lengths, dim, draw.rng.choice((dim, 24)), dtype, poison)
        query = draw.normal(len(lengths), heads // kv_heads, steps, dim, dtype=dtype)
        out = ragged_decode(query, kv, scale=dim**-0.5, softcap=softcap)
        close(out, decode_definition(query, kv, dim**-0.5, softcap), dtype)


def test_compact_keeps_what_is_listed(draw: Draw) -> None:
    heads, length, dim = 5, 257, 16
    key, value = draw.normal(heads, length, dim), draw.normal(heads, length, dim)
    counts = [1, 257, *(draw.rng.randrange(2, length) for _ in range(heads - 2))]
    kept = [sorted(draw.rng.sample(range(length), count)) for count in counts]
    indices = torch.tensor([ids + [0] * (length - len(ids)) for ids in kept])
    room = draw.rng.choice((0, 1, 17))
    keys, values = compact(key, indices, counts, room), compact(value, indices, counts, room)
    assert keys.shape == (sum(counts) + heads * room, dim) and keys.is_contiguous()
    starts = [sum(counts[:head]) + head * room for head in range(heads)]
    for start, count in zip(starts, counts, strict=True):
        keys[start + count : start + count + room] = values[start + count : start + count + room] = float("nan")
    query = draw.normal(heads, 3, 1, dim)
    out = ragged_decode(query, RaggedKV(keys, values, starts, counts), scale=0.25)
    for head, ids in enumerate(kept):
        assert torch.equal(keys[starts[head] : starts[head] + counts[head]], key[head, ids])
        for row in range(3):
            expected = attend(query[head, row, 0], key[head, ids], value[head, ids], 0.25, None)
            close(out[head, row, 0], expected, out.dtype)
    bare, untouched = compact(key, indices, counts), key.clone()
    assert torch.equal(bare, torch.cat([key[head, ids] for head, ids in enumerate(kept)]))
    keys[:], bare[:] = 0, 0
    assert torch.equal(key, untouched)  # copies, not views of the states


# --- paged decode ------------------------------------------------------------------------------------------------


def random_selection(draw: Draw, kv: RaggedKV, lists: int, steps: int, page_size: int) -> PageSelection:
    """Some pages of each token, in any order; what follows the listed ones is garbage."""
    chosen = {}
    for s, length in enumerate(kv.lengths):
        for g in range(lists):
            for t in range(steps):
                pages = -(-(length - steps + 1 + t) // page_size)
                chosen[s, g, t] = draw.rng.sample(range(pages), draw.rng.randrange(1, pages + 1))
    width = max(map(len, chosen.values())) + draw.rng.randrange(2)
    pages = torch.randint(-3, 1000, (len(kv.lengths), lists, steps, width), generator=draw.generator, dtype=torch.int32)
    counts = torch.zeros(pages.shape[:3], dtype=torch.int32)
    for place, ids in chosen.items():
        pages[place][: len(ids)] = torch.tensor(ids, dtype=torch.int32)
        counts[place] = len(ids)
    selection = PageSelection(pages, counts, page_size)
    selection.check(kv)
    return selection


def every_page(kv: RaggedKV, lists: int, steps: int, page_size: int) -> PageSelection:
    width = -(-max(kv.lengths) // page_size)
    pages = torch.arange(width, dtype=torch.int32).expand(len(kv.lengths), lists, steps, width)
    visible = torch.tensor(kv.lengths)[:, None, None] - steps + 1 + torch.arange(steps)
    counts = (-(-visible // page_size)).to(torch.int32).expand(-1, lists, -1)
    selection = PageSelection(pages, counts, page_size)
    selection.check(kv)
    return selection


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("shared", [True, False])
def test_paged_decode_equals_the_definition(
    draw: Draw, shared: bool, steps: int, page_size: int, dtype: torch.dtype
) -> None:
    for heads, kv_heads in HEADS:
        group, dim, softcap = heads // kv_heads, draw.rng.choice(DIMS), draw.rng.choice(SOFTCAPS)
        lengths = random_lengths(draw, draw.rng.choice((1, 2)), kv_heads, steps)
        poison = draw.rng.choice((float("nan"), 1e30))
        kv = ragged(draw, lengths, dim, draw.rng.choice((dim, 24)), dtype, poison)
        query = draw.normal(len(lengths), group, steps, dim, dtype=dtype)
        selection = random_selection(draw, kv, 1 if shared else group, steps, page_size)
        expected = decode_definition(query, kv, dim**-0.5, softcap, selection)
        for backend in PAGED_BACKENDS:
            out, used = paged_decode(query, kv, selection, scale=dim**-0.5, softcap=softcap, backend=backend)
            assert used == backend
            close(out, expected, dtype)
        out, used = paged_decode(query, kv, selection, scale=dim**-0.5, softcap=softcap)
        assert used == "gather"
        close(out, expected, dtype)


@pytest.mark.parametrize("length", LENGTHS)
def test_paged_decode_takes_all_lengths(draw: Draw, length: int) -> None:
    """One length for all sequences, as before any eviction; and all queries of the row at once, where it is short."""
    for steps in {1, min(length, 7), length if length < 100 else 3}:
        kv = ragged(draw, [length] * 2, 16, 16, torch.float64)
        query = draw.normal(2, 3, steps, 16)
        selection = random_selection(draw, kv, draw.rng.choice((1, 3)), steps, draw.rng.choice(PAGE_SIZES))
        expected = decode_definition(query, kv, 0.3, None, selection)
        for backend in PAGED_BACKENDS:
            close(paged_decode(query, kv, selection, scale=0.3, backend=backend)[0], expected, torch.float64)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_paged_decode_in_small_chunks(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, shared: bool, softcap: float | None
) -> None:
    kv = ragged(draw, [63, 257, 90], 16, 16, torch.float64)
    query = draw.normal(3, 2, 11, 16)
    selection = random_selection(draw, kv, 1 if shared else 2, 11, 16)
    expected = decode_definition(query, kv, 0.25, softcap, selection)
    one_token = selection.pages.numel() // 11 * 16 * 16
    for limit in (1, one_token, 4 * one_token, 100 * one_token):
        monkeypatch.setattr(paged_gather, "CHUNK_ELEMENTS", {"cpu": limit, "cuda": limit})
        out, _ = paged_decode(query, kv, selection, scale=0.25, softcap=softcap, backend="gather")
        close(out, expected, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [1, 5])
def test_every_page_is_dense_attention(draw: Draw, steps: int, dtype: torch.dtype) -> None:
    for length in LENGTHS[1:]:
        heads, kv_heads = draw.rng.choice(HEADS)
        rows, group, dim = 2, heads // kv_heads, draw.rng.choice(DIMS)
        softcap = draw.rng.choice(SOFTCAPS)
        query = draw.normal(rows, heads, steps, dim, dtype=dtype)
        key, value = (draw.normal(rows, kv_heads, length, dim, dtype=dtype) for _ in "kv")
        dense = dense_attention(query, key, value, scale=dim**-0.5, softcap=softcap)
        starts = [sequence * length for sequence in range(rows * kv_heads)]
        kv = RaggedKV(key.reshape(-1, dim), value.reshape(-1, dim), starts, [length] * len(starts))
        grouped = query.reshape(rows * kv_heads, group, steps, dim)
        # Dense attention with a softcap computes the softmax in fp32, whatever the input is.
        tolerance = torch.float32 if softcap is not None and dtype == torch.float64 else dtype
        out = ragged_decode(grouped, kv, scale=dim**-0.5, softcap=softcap)
        torch.testing.assert_close(out.reshape(dense.shape), dense.to(dtype), **TOLERANCE[tolerance])
        for lists in {1, group}:
            selection = every_page(kv, lists, steps, draw.rng.choice(PAGE_SIZES))
            for backend in PAGED_BACKENDS:
                paged, _ = paged_decode(grouped, kv, selection, scale=dim**-0.5, softcap=softcap, backend=backend)
                close(paged, out, dtype)


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
@pytest.mark.parametrize("shared", [True, False])
def test_paged_decode_reads_listed_pages_only(draw: Draw, shared: bool, poison: float) -> None:
    """Keys that no token may see in a listed page are not read; a sequence's first key stands in for them."""
    kv = ragged(draw, [65, 257, 1000], 16, 16, torch.float32, poison)
    query = draw.normal(3, 2, 3, 16, dtype=torch.float32)
    selection = random_selection(draw, kv, 1 if shared else 2, 3, 16)
    expected = decode_definition(query, kv, 0.25, None, selection)
    for s, (start, length) in enumerate(zip(kv.starts, kv.lengths, strict=True)):
        read = {0}
        for g in range(selection.pages.shape[1]):
            for t in range(3):
                for page in selection.pages[s, g, t, : selection.counts[s, g, t]].tolist():
                    read |= set(range(page * 16, min(page * 16 + 16, length - 2 + t)))
        unread = [start + key for key in range(length) if key not in read]
        kv.keys[unread], kv.values[unread] = poison, poison
    close(paged_decode(query, kv, selection, scale=0.25, backend="gather")[0], expected, torch.float32)


@pytest.mark.parametrize("backend", PAGED_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_pages_does_not_matter(draw: Draw, backend: str, dtype: torch.dtype) -> None:
    kv = ragged(draw, random_lengths(draw, 2, 2, 3), 64, 64, dtype)
    query = draw.normal(4, 3, 3, 64, dtype=dtype)
    selection = random_selection(draw, kv, draw.rng.choice((1, 3)), 3, 16)
    pages = selection.pages.clone()
    for place in torch.cartesian_prod(*map(torch.arange, selection.counts.shape)).tolist():
        count = int(selection.counts[tuple(place)])
        ids = pages[tuple(place)]
        ids[:count] = ids[torch.randperm(count, generator=draw.generator)]
    permuted = replace(selection, pages=pages)
    permuted.check(kv)
    first, second = (paged_decode(query, kv, one, scale=0.125, backend=backend)[0] for one in (selection, permuted))
    close(second, first, dtype)


@pytest.mark.parametrize("width", [1, 3])
def test_the_listed_pages_may_be_one_key(draw: Draw, width: int) -> None:
    """A page whose only visible key is the token itself: the output is its value."""
    kv = ragged(draw, [65, 129], 16, 16, torch.float64)
    pages = torch.full((2, 1, 1, width), 0, dtype=torch.int32)
    pages[:, 0, 0, 0] = torch.tensor([1, 2])
    selection = PageSelection(pages, torch.ones(2, 1, 1, dtype=torch.int32), 64)
    selection.check(kv)
    for backend in PAGED_BACKENDS:
        out, _ = paged_decode(draw.normal(2, 4, 1, 16), kv, selection, scale=1.0, backend=backend)
        for s in range(2):
            close(out[s, :, 0], kv.values[kv.starts[s] + kv.lengths[s] - 1].expand(4, -1), torch.float64)


@pytest.mark.parametrize(
    ("ids", "counts", "message"),
    [
        ([[0, 1], [0, 2]], [2, 2], "may not see"),  # 35 keys: page 2 of 16 begins at key 32, token 0 sees 32 keys
        ([[0, -1], [0, 1]], [2, 2], "may not see"),
        ([[0, 1], [1, 1]], [2, 2], "twice"),
        ([[1, 0], [0, 0]], [2, 0], "without any page"),
        ([[0, 1], [1 << 28, 0]], [2, 1], "may not see"),  # times 16 it is 0 in 32 bits
    ],
)
def test_selection_check_finds_faults(ids: list[list[int]], counts: list[int], message: str) -> None:
    kv = RaggedKV(torch.zeros(40, 16), torch.zeros(40, 16), [3], [33])
    good = PageSelection(torch.tensor([[[[1, 0], [0, 0]]]]).int(), torch.tensor([[[2, 1]]]).int(), 16)
    good.check(kv)  # what is not counted may be anything
    bad = PageSelection(torch.tensor(ids).int()[None, None], torch.tensor(counts).int()[None, None], 16)
    if message == "may not see" and ids[1] == [0, 2]:
        bad.check(kv)  # the last token sees key 32
        bad = replace(bad, pages=bad.pages.flip(2))
    with pytest.raises(ValueError, match=message):
        bad.check(kv)


def decode_call() -> tuple[Tensor, RaggedKV, PageSelection]:
    kv = RaggedKV(torch.randn(100, 16), torch.randn(100, 24), [50, 0], [50, 33])
    pages = torch.zeros(2, 1, 3, 2, dtype=torch.int32)
    return torch.randn(2, 4, 3, 16), kv, PageSelection(pages, torch.ones(2, 1, 3, dtype=torch.int32), 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, kv: (q[0], kv), "does not fit 2 sequences"),
        (lambda q, kv: (q[:1], kv), "does not fit 2 sequences"),
        (lambda q, kv: (q[..., :8], kv), "does not fit 2 sequences"),
        (lambda q, kv: (q, replace(kv, values=kv.values[:99])), "do not fit together"),
        (lambda q, kv: (q, replace(kv, lengths=[50])), "do not fit together"),
        (lambda q, kv: (q, replace(kv, starts=[0])), "does not fit 1 sequences"),
        (lambda q, kv: (q.double(), kv), "dtypes are"),
        (lambda q, kv: (q, replace(kv, values=kv.values.bfloat16())), "dtypes are"),
        (lambda q, kv: (q.int(), replace(kv, keys=kv.keys.int(), values=kv.values.int())), "floating-point"),
        (lambda q, kv: (q.to("meta"), kv), "devices are"),
        (lambda q, kv: (q, replace(kv, values=kv.values.to("meta"))), "devices are"),
        (lambda q, kv: (q, replace(kv, lengths=[50, 2])), "holds 2 keys, but 3 queries"),
        (lambda q, kv: (q, replace(kv, starts=[50, -1])), "outside the 100 stored keys"),
        (lambda q, kv: (q, replace(kv, starts=[51, 0])), "outside the 100 stored keys"),
    ],
)
def test_decode_refuses_storage_that_does_not_fit(change: Callable, message: str) -> None:
    query, kv, selection = decode_call()
    ragged_decode(query, kv, scale=1.0)
    query, kv = change(query, kv)
    with pytest.raises(ValueError, match=message):
        ragged_decode(query, kv, scale=1.0)
    for backend in ("auto", *PAGED_BACKENDS):
        with pytest.raises(ValueError, match=message):
            paged_decode(query, kv, selection, scale=1.0, backend=backend)


@pytest.mark.parametrize(
    ("pages", "counts", "message"),
    [
        ((2, 3, 2), (2, 3), "do not fit together"),
        ((2, 1, 3, 2), (2, 3), "do not fit together"),
        ((2, 1, 3, 2), (2, 1, 2), "do not fit together"),
        ((2, 2, 3, 2), (2, 2, 3), "do not fit together"),  # lists for 2 of 4 heads
        ((1, 1, 3, 2), (1, 1, 3), "are for 1 sequences"),
        ((2, 4, 1, 2), (2, 4, 1), "and 1 tokens"),
    ],
)
def test_decode_refuses_pages_that_do_not_fit(pages: tuple[int, ...], counts: tuple[int, ...], message: str) -> None:
    query, kv, _ = decode_call()
    selection = PageSelection(torch.zeros(pages, dtype=torch.int32), torch.ones(counts, dtype=torch.int32), 16)
    with pytest.raises(ValueError, match=message):
        paged_decode(query, kv, selection, scale=1.0)


def test_decode_refuses_other_devices_and_backends() -> None:
    query, kv, selection = decode_call()
    away = PageSelection(selection.pages.to("meta"), selection.counts.to("meta"), 16)
    with pytest.raises(ValueError, match="devices are"):
        paged_decode(query, kv, away, scale=1.0)
    with pytest.raises(ValueError, match="backend 'flex' is unknown"):
        paged_decode(query, kv, selection, scale=1.0, backend="flex")


@pytest.mark.parametrize(("dtype", "mean"), [(torch.bfloat16, 4.0), (torch.float16, 30.0)])
@pytest.mark.parametrize("operator", ["ragged_decode", "paged_decode", "prefill"])
def test_half_precision_is_as_good_as_dense_attention(
    draw: Draw, operator: str, dtype: torch.dtype, mean: float
) -> None:
    """Queries and keys with a common offset, as key biases make them: products are large and differ little.

    At 4 a bf16 score is off by 8 before the scale, at 30 it is beyond fp16's 65504. SDPA keeps its scores in fp32.
    """
    dim, length = 128, 257
    query, key, value = (draw.normal(1, 1, length, dim) for _ in "qkv")
    query, key, value = (query + mean).to(dtype), (key + mean).to(dtype), value.to(dtype)
    expected = masked_attention(
        query[0], key[0], value[0], torch.ones(1, length, length, dtype=torch.bool).tril(), dim**-0.5, None
    )
    dense = dense_attention(query, key, value, scale=dim**-0.5)[0]
    allowed = 4 * float((dense.double() - expected).abs().max()) + 1e-2
    kv = RaggedKV(key[0, 0], value[0, 0], [0], [length])
    if operator == "prefill":
        layout = BlockLayout.from_mask(torch.ones(9, 9, dtype=torch.bool).tril()[None], length, 32, 32)
        out, _ = block_sparse_prefill(query[0], key[0], value[0], layout, backend="gather")
    elif operator == "paged_decode":
        out = paged_decode(query[:, :, -32:], kv, every_page(kv, 1, 32, 16), scale=dim**-0.5)[0][0]
    else:
        out = ragged_decode(query[:, :, -32:], kv, scale=dim**-0.5)[0]
    error = float((out.double() - expected[:, -out.shape[1] :]).abs().max())
    assert error <= allowed  # not so for NaN


# --- estimators --------------------------------------------------------------------------------------------------


def window_definition(
    query: Tensor, key: Tensor, window: int, scale: float, softcap: float | None
) -> dict[str, Tensor]:
    """Loop over heads and queries, in fp64."""
    heads, length, _ = query.shape
    columns, diagonals, peaks = (torch.zeros(heads, length, dtype=torch.float64) for _ in range(3))
    for head in range(heads):
        for position in range(max(0, length - window), length):
            scores = key[head // (heads // key.shape[0]), : position + 1].double() @ query[head, position].double()
            scores = scores * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.softmax(0)
            columns[head, : position + 1] += weights
            diagonals[head, : position + 1] += weights.flip(0)
            peaks[head, : position + 1] = torch.maximum(peaks[head, : position + 1], weights)
    return {"columns": columns, "diagonals": diagonals, "peaks": peaks}


@pytest.mark.parametrize("window", [1, 7, 64, 2000])
@pytest.mark.parametrize("length", LENGTHS)
def test_window_sums_equal_the_definition(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, length: int, window: int
) -> None:
    (heads, kv_heads), dim = draw.rng.choice(HEADS), draw.rng.choice(DIMS)
    softcap, dtype = draw.rng.choice(SOFTCAPS), draw.rng.choice(DTYPES)
    query, key = (draw.normal(number, length, dim, dtype=dtype) for number in (heads, kv_heads))
    expected = window_definition(query, key, window, dim**-0.5, softcap)
    for elements in (window_estimator.WINDOW_ELEMENTS, 1, 2 * min(window, length) * length + 1):
        monkeypatch.setattr(window_estimator, "WINDOW_ELEMENTS", elements)
        asked = dict.fromkeys(expected, True)
        found = window_sums(query, key, window, scale=dim**-0.5, softcap=softcap, **asked)
        for name, tensor in expected.items():
            close(getattr(found, name), tensor, torch.float32)


def test_window_sums_give_what_is_asked_for(draw: Draw) -> None:
    query, key = draw.normal(4, 65, 16), draw.normal(2, 65, 16)
    both = window_sums(query, key, 9, scale=0.25, columns=True, peaks=True)
    assert both.diagonals is None and both.columns is not None and both.peaks is not None
    alone = window_sums(query, key, 9, scale=0.25, diagonals=True)
    assert alone.columns is None and alone.peaks is None and alone.diagonals is not None
    torch.testing.assert_close(both.columns.sum(1), torch.full((4,), 9.0))
    torch.testing.assert_close(alone.diagonals.sum(1), torch.full((4,), 9.0))
    assert window_flops(4, 9, 65, 16) == 2 * 4 * 9 * 65 * 16
    assert window_flops(4, 900, 65, 16) == 2 * 4 * 65 * 65 * 16


@pytest.mark.parametrize("length", LENGTHS)
def test_diagonal_sums_equal_the_definition(draw: Draw, length: int) -> None:
    for window in {1, min(length, 2), min(length, 50), min(length, 257)}:
        positions = torch.arange(length - window, length)
        weights = draw.normal(3, window, length) * (torch.arange(length) <= positions[:, None])
        expected = torch.zeros(3, length, dtype=torch.float64)
        for row, position in enumerate(positions.tolist()):
            expected[:, : position + 1] += weights[:, row, : position + 1].flip(-1)
        close(diagonal_sums(weights), expected, torch.float64)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_and_sum_blocks_equal_the_definition(draw: Draw, dtype: torch.dtype, length: int) -> None:
    states, mass = draw.normal(3, length, 16, dtype=dtype), draw.normal(3, length)
    for block in BLOCK_SIZES:
        starts = range(0, length, block)
        means = torch.stack([states[:, start : start + block].double().mean(1) for start in starts], 1)
        close(pool(states, block), means, torch.float32)
        sums = torch.stack([mass[:, start : start + block].sum(1) for start in starts], 1)
        close(sum_blocks(mass, block), sums, torch.float64)


class Growing:
    """Sequences that grow and are cut, each in a place of its own of one storage that is poisoned behind their ends."""

    def __init__(self, draw: Draw, lengths: list[int], room: int, dim: int, dtype: torch.dtype) -> None:
        self.draw, self.lengths = draw, [0] * len(lengths)
        order = draw.rng.sample(range(len(lengths)), len(lengths))
        self.starts = [5 + place * (room + 3) for place in order]
        self.keys = torch.full((5 + len(lengths) * (room + 3), dim), float("nan"), dtype=dtype)
        self.grow(lengths)

    def grow(self, by: list[int]) -> tuple[list[int], list[int]]:
        """Append keys; lengths before and after."""
        before = list(self.lengths)
        for s, count in enumerate(by):
            first = self.starts[s] + before[s]
            self.keys[first : first + count] = self.draw.normal(count, self.keys.shape[1], dtype=self.keys.dtype)
            self.lengths[s] += count
        return before, list(self.lengths)

    def cut(self, to: list[int]) -> None:
        for s, length in enumerate(to):
            self.keys[self.starts[s] + length : self.starts[s] + self.lengths[s]] = float("nan")
        self.lengths = list(to)

    def agrees(self, bounds: PageBounds) -> None:
        """Bounds of all pages that hold keys, from scratch."""
        for s, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            for page, first in enumerate(range(0, length, bounds.page_size)):
                held = self.keys[start + first : start + min(first + bounds.page_size, length)]
                place = f"sequence {s} of {length} keys, page {page}"
                assert torch.equal(bounds.low[s, page], held.amin(0)), place
                assert torch.equal(bounds.high[s, page], held.amax(0)), place


def start_bounds(draw: Draw, lengths: list[int], page_size: int, dtype: torch.dtype) -> tuple[Growing, PageBounds]:
    sequences = Growing(draw, lengths, 1500, 16, dtype)
    bounds = PageBounds.empty(len(lengths), draw.rng.choice((0, 1, 100)), sequences.keys, page_size)
    bounds.update(sequences.keys, sequences.starts, [0] * len(lengths), lengths)
    assert bounds.low.dtype == bounds.high.dtype == dtype
    sequences.agrees(bounds)
    return sequences, bounds


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_bounds_from_scratch(draw: Draw, page_size: int, dtype: torch.dtype) -> None:
    for length in LENGTHS:
        start_bounds(draw, [length] * 3, page_size, dtype)
    start_bounds(draw, list(LENGTHS), page_size, dtype)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_bounds_token_by_token(draw: Draw, page_size: int) -> None:
    sequences, bounds = start_bounds(draw, [1, 15, 16, 63, draw.rng.randrange(1, 300)], page_size, torch.float32)
    for _ in range(2 * page_size + 3):
        bounds.update(sequences.keys, sequences.starts, *sequences.grow([1] * 5))
        sequences.agrees(bounds)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_bounds_of_equal_lengths_in_random_pieces(draw: Draw, page_size: int) -> None:
    """All sequences of a row grow and are cut together, as before any eviction."""
    sequences, bounds = start_bounds(draw, [draw.rng.randrange(1, 100)] * 3, page_size, torch.float64)
    for _ in range(20):
        if draw.rng.random() < 0.3:
            sequences.cut([draw.rng.randrange(1, sequences.lengths[0] + 1)] * 3)
        step = draw.rng.choice((1, 2, page_size, draw.rng.randrange(1, page_size + 2), draw.rng.randrange(1, 70)))
        bounds.update(sequences.keys, sequences.starts, *sequences.grow([step] * 3))
        sequences.agrees(bounds)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_bounds_of_ragged_lengths_in_random_pieces(draw: Draw, page_size: int) -> None:
    """After eviction the sequences differ in length, but take in the same number of tokens at a time."""
    lengths = [draw.rng.randrange(1, 100) for _ in range(4)]
    sequences, bounds = start_bounds(draw, lengths, page_size, torch.bfloat16)
    for _ in range(20):
        if draw.rng.random() < 0.3:
            back = draw.rng.randrange(min(sequences.lengths))
            sequences.cut([length - back for length in sequences.lengths])
        step = draw.rng.choice((1, 2, page_size, draw.rng.randrange(1, page_size + 2), draw.rng.randrange(1, 70)))
        bounds.update(sequences.keys, sequences.starts, *sequences.grow([step] * 4))
        sequences.agrees(bounds)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_bounds_of_sequences_that_grow_apart(draw: Draw, page_size: int) -> None:
    """Each sequence in pieces of its own, of no keys at times, and cut to lengths of its own."""
    lengths = [draw.rng.randrange(1, 100) for _ in range(4)]
    sequences, bounds = start_bounds(draw, lengths, page_size, torch.float32)
    for _ in range(20):
        if draw.rng.random() < 0.3:
            sequences.cut([draw.rng.randrange(1, length + 1) for length in sequences.lengths])
            before = list(sequences.lengths)
            bounds.update(sequences.keys, sequences.starts, before, before)  # pages that lost keys are not touched ...
            before = [length // page_size * page_size for length in before]
            bounds.update(sequences.keys, sequences.starts, before, list(sequences.lengths))  # ... but here they are
            sequences.agrees(bounds)
        most = draw.rng.choice((1, 2, page_size, 70))
        bounds.update(sequences.keys, sequences.starts, *sequences.grow([draw.rng.randint(0, most) for _ in range(4)]))
        sequences.agrees(bounds)


def test_bounds_where_one_sequence_crosses_a_page_and_another_does_not(draw: Draw) -> None:
    """Two tokens each: the first sequence touches two pages, the second one."""
    sequences, bounds = start_bounds(draw, [15, 3], 16, torch.float32)
    bounds.update(sequences.keys, sequences.starts, *sequences.grow([2, 2]))
    sequences.agrees(bounds)


def test_bounds_where_one_sequence_takes_in_nothing_at_the_end_of_a_page(draw: Draw) -> None:
    sequences, bounds = start_bounds(draw, [16, 16], 16, torch.float32)
    bounds.update(sequences.keys, sequences.starts, *sequences.grow([1, 0]))
    sequences.agrees(bounds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_bound_scores(draw: Draw, page_size: int, dtype: torch.dtype) -> None:
    for group, steps in ((1, 1), (2, 1), (3, 4), (7, 2)):
        lengths = [draw.rng.choice(LENGTHS[1:]) for _ in range(3)]
        pages = -(-min(lengths) // page_size)
        sequences = Growing(draw, lengths, 1000, 16, dtype)
        bounds = PageBounds.empty(3, pages + draw.rng.randrange(2), sequences.keys, page_size)
        for s, page in torch.cartesian_prod(torch.arange(3), torch.arange(pages)).tolist():
            first = sequences.starts[s] + page * page_size
            held = sequences.keys[first : min(first + page_size, sequences.starts[s] + lengths[s])]
            bounds.low[s, page], bounds.high[s, page] = held.amin(0), held.amax(0)
        query = draw.normal(3, group, steps, 16, dtype=dtype)
        scores = bound_scores(query, bounds, pages)
        assert scores.shape == (3, group, steps, pages)
        q = query.double()[:, :, :, None]
        low, high = (bound[:, None, None, :pages].double() for bound in (bounds.low, bounds.high))
        close(scores, torch.maximum(q * low, q * high).sum(-1), torch.float32)
        for s, (start, length) in enumerate(zip(sequences.starts, lengths, strict=True)):
            held = sequences.keys[start : start + min(length, pages * page_size)].double()
            products = query[s].double() @ held.T
            bound = scores[s].double()[..., torch.arange(len(held)) // page_size]
            assert bool((products <= bound + 1e-4).all())
