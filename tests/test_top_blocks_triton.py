"""Pooling, the choice of blocks and the counting of layouts in Triton, under its interpreter, against plain torch."""

from __future__ import annotations

import random

import pytest
import torch
from prefill_cases import interpreter_missing

from lm_eval_sparse.kernels import backends
from lm_eval_sparse.kernels.estimate.pooling import pool, pool_both
from lm_eval_sparse.kernels.index.top_blocks import top_blocks
from lm_eval_sparse.kernels.types import Blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = backends.triton_unavailable(DEVICE) if DEVICE == "cuda" else interpreter_missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture
def source() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.mark.parametrize(
    ("length", "block", "dim", "heads", "kv_heads", "dtype"),
    [
        (1, 16, 64, 2, 1, torch.float16),
        (63, 16, 64, 2, 1, torch.float32),
        (1000, 64, 80, 3, 3, torch.bfloat16),
        (257, 128, 96, 7, 1, torch.bfloat16),
    ],
)
def test_pool(length: int, block: int, dim: int, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    query = torch.randn(length, heads, dim).to(DEVICE, dtype).transpose(0, 1)
    key = torch.randn(kv_heads, length, dim).to(DEVICE, dtype)
    near = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(pool(query, block, backend="triton"), pool(query, block, backend="naive"), **near)
    for found, states in zip(pool_both(query, key, block, backend="triton"), (query, key), strict=True):
        torch.testing.assert_close(found, pool(states, block, backend="naive"), **near)


@pytest.mark.parametrize(
    ("blocks", "dim", "heads", "kv_heads"), [(1, 64, 1, 1), (5, 16, 2, 2), (18, 16, 3, 1), (40, 80, 1, 1)]
)
@pytest.mark.parametrize("kind", ["ties", "equal", "apart"])
def test_top_blocks(
    source: random.Random,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    blocks: int,
    dim: int,
    heads: int,
    kv_heads: int,
) -> None:
    """Small whole numbers multiply exactly, so that ties are the same; `apart` spreads keys over 30 magnitudes."""
    from lm_eval_sparse.kernels.index.top_blocks import triton

    query, key = (torch.randint(-1, 2, (n, blocks, dim)).float() for n in (heads, kv_heads))
    if kind == "equal":
        query.zero_()
    elif kind == "apart":
        key *= 2.0 ** torch.linspace(-50, 50, blocks).round()[torch.randperm(blocks), None]
    states = query.to(DEVICE), key.to(DEVICE)
    near = source.choice((1, 2))
    least, most = near + 1, max(near + 1, blocks)
    drawn = source.randint(least, most), source.randint(0, blocks)
    for budget, extra in ((least, 0), (least, blocks), (most, 0), drawn):
        monkeypatch.setattr(triton, "SPLIT", source.choice((16, 512)))
        monkeypatch.setattr(triton, "SCORE_ELEMENTS", source.choice((1, 1 << 26)))
        found, counts = top_blocks(*states, budget, extra, near=near, backend="triton")
        expected, expected_counts = top_blocks(*states, budget, extra, near=near, backend="naive")
        assert torch.equal(found, expected) and torch.equal(counts, expected_counts), (budget, extra, near)


def test_top_blocks_refuses_what_it_cannot_do() -> None:
    query, key = torch.randn(4, 9, 16), torch.randn(3, 9, 16)
    with pytest.raises(ValueError, match="do not fit together"):
        top_blocks(query, key, 2)
    with pytest.raises(ValueError, match="expected torch.float32"):
        top_blocks(query.half(), query.half(), 2)
    for budget, extra in ((1, 0), (2, 10), (2, -1)):
        with pytest.raises(ValueError, match="expected at least 2, and 0 to 9"):
            top_blocks(query, query, budget, extra)
    with pytest.raises(ValueError, match="budget=2.*expected at least 3"):
        top_blocks(query, query, 2, near=2)
    with pytest.raises(ValueError, match="near=3 given; expected 1 or 2"):
        top_blocks(query, query, 5, near=3)


@pytest.mark.parametrize("columns", [None, "shared", "own"])
@pytest.mark.parametrize(("length", "block_q", "block_k"), [(1, 16, 16), (63, 16, 128), (130, 128, 32), (700, 64, 64)])
def test_pairs_and_keys(source: random.Random, length: int, block_q: int, block_k: int, columns: str | None) -> None:
    heads, blocks_q, blocks_k = 2, -(-length // block_q), -(-length // block_k)
    last = torch.clamp((torch.arange(blocks_q) + 1) * block_q, max=length) - 1
    mask = (torch.rand(heads, blocks_q, blocks_k) < source.random()) & (
        torch.arange(blocks_k) * block_k <= last[:, None]
    )
    mask[..., 0] = True
    layout = Blocks.from_mask(mask, length, block_q, block_k)
    lists = layout.columns, layout.column_counts
    share = source.choice((0, 1, source.random()))
    if columns == "shared":
        layout = layout.with_columns(torch.rand(heads, length) < share)
        lists = layout.columns, layout.column_counts
    elif columns == "own":
        free = (torch.arange(length) <= last[:, None]) & ~mask.repeat_interleave(block_k, -1)[..., :length]
        own = Blocks.from_mask((torch.rand(heads, blocks_q, length) < share) & free, length, 16, 16)
        lists = own.indices, own.counts
    # What lies behind the valid entries must not be looked at.
    indices = torch.where(layout.valid(), layout.indices, 1 << 30)
    parts = [part if part is None else part.to(DEVICE) for part in (indices, layout.counts, *lists)]
    layout = Blocks(*parts[:2], length, block_q, block_k, *parts[2:])
    for found, expected in zip(
        layout.pairs_and_keys(backend="triton"), layout.pairs_and_keys(backend="naive"), strict=True
    ):
        assert found.dtype == expected.dtype == torch.int64
        assert torch.equal(found, expected)
