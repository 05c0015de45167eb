"""The operators in kernels/ against definitions written here in fp64: loops over tokens, or a mask over all pairs.

Inputs are fresh in every run. A test's seed is printed when it fails; TEST_OPERATORS_SEED=<seed> repeats it.

Long, since all operators are held against references of one kind.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lm_eval_sparse.kernels.dense import dense_attention
from lm_eval_sparse.kernels.estimate import diagonal_sums, pool, sum_blocks, window_flops, window_sums
from lm_eval_sparse.kernels.estimate.window import naive as window_estimator
from lm_eval_sparse.kernels.prefill import block_sparse_prefill, flex
from lm_eval_sparse.kernels.prefill import gather as prefill_gather
from lm_eval_sparse.kernels.types import BLOCK_SIZES, Blocks

LENGTHS = (1, 63, 65, 257, 1000)
HEADS = ((1, 1), (4, 2), (6, 2), (7, 1))  # query heads, KV heads
DIMS = (16, 64, 80, 96, 128, 256)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SOFTCAPS = (None, None, 5.0)
TOLERANCE = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-10},
    torch.float32: {"atol": 2e-5, "rtol": 1e-4},
    torch.bfloat16: {"atol": 4e-2, "rtol": 2e-2},
}
PREFILL_BACKENDS = ("naive", "gather")


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


def random_layout(draw: Draw, heads: int, length: int, block_q: int, block_k: int) -> tuple[Blocks, Tensor]:
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
    layout = Blocks(indices, counts, length, block_q, block_k, *row_lists(columns))
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
    bare = Blocks.from_mask(tiles, length, block_q, block_k)
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
    bare = Blocks.from_mask(tiles, 257, 32, 32)
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


def small_layout() -> Blocks:
    """One head, 100 tokens in blocks of 32: every query block reads its diagonal tile and, if it is not the first,
    keys 3 and 30 as columns."""
    indices = torch.arange(4, dtype=torch.int32).reshape(1, 4, 1)
    columns = torch.tensor([[[0, 0], [3, 30], [3, 30], [3, 30]]], dtype=torch.int32)
    counts = torch.tensor([[0, 2, 2, 2]], dtype=torch.int32)
    return Blocks(indices, torch.ones(1, 4, dtype=torch.int32), 100, 32, 32, columns, counts)


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
    layout = Blocks(indices, torch.ones(1, 1, dtype=torch.int32), 64, 64, 32)
    for bare in (layout, layout.with_columns(torch.arange(64)[None] == 5), layout.with_columns(torch.zeros(1, 64) > 0)):
        with pytest.raises(ValueError, match="without any key"):
            bare.check(1)
    layout.with_columns(torch.arange(64)[None] == 0).check(1)


def test_check_refuses_a_layout_without_tiles() -> None:
    """`counts` is at least 1; nothing but a ValueError may come of a layout that lists no tile at all."""
    layout = Blocks.from_mask(torch.zeros(1, 2, 2, dtype=torch.bool), 64, 32, 32)
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
    layout = Blocks.from_mask(tiles, 1000, 32, 32).with_columns(columns.expand(4, -1))
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
        (lambda q, k, v: ((q, k, v[..., :0]), {}), "do not fit together"),
        (lambda q, k, v: ((q, k[..., :8], v[..., :8]), {}), "do not fit together"),
        (lambda q, k, v: ((q, k.repeat(2, 1, 1), v.repeat(2, 1, 1)), {}), "do not fit together"),
        (lambda q, k, v: ((q, k, v.double()), {}), "dtypes are"),
        (lambda q, k, v: ((q.int(), k.int(), v.int()), {}), "floating-point"),
        (lambda q, k, v: ((q, k.to("meta"), v), {}), "devices are"),
        (lambda q, k, v: ((q.to("meta"), k.to("meta"), v.to("meta")), {}), "devices are"),
        (lambda q, k, v: ((q, k, v), {"backend": "paged"}), "backend 'paged' is unknown"),
        (lambda q, k, v: ((q, k, v), {"backend": "flex", "softcap": 5.0}), "it takes no softcap"),
        (lambda q, k, v: ((q, k, v), {"backend": "flex", "sink": torch.zeros(1)}), "it takes no attention sinks"),
        (lambda q, k, v: ((q, k, v), {"sink": torch.zeros(2)}), r"sink is \(2,\).*expected contiguous \(1,\)"),
        (lambda q, k, v: ((q, k, v), {"sink": torch.zeros(1).int()}), "of a float dtype"),
    ],
)
def test_prefill_refuses_bad_calls(change: Callable, message: str) -> None:
    states, options = change(*(torch.randn(1, 100, 16) for _ in "qkv"))
    with pytest.raises(ValueError, match=message):
        block_sparse_prefill(*states, small_layout(), **options)


@pytest.mark.parametrize(("dtype", "mean"), [(torch.bfloat16, 4.0), (torch.float16, 30.0)])
def test_half_precision_is_as_good_as_dense_attention(draw: Draw, dtype: torch.dtype, mean: float) -> None:
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
    layout = Blocks.from_mask(torch.ones(9, 9, dtype=torch.bool).tril()[None], length, 32, 32)
    out, _ = block_sparse_prefill(query[0], key[0], value[0], layout, backend="gather")
    assert float((out.double() - expected).abs().max()) <= allowed  # not so for NaN


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
