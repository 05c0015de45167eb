"""Vertical-slash selection in Triton on the CPU, under Triton's interpreter: the bits that the torch version selects.

Inputs are drawn anew in every run. A failing test shows its seed; PATTERN_SEED=<seed> repeats it.
The interpreter computes products of bf16 wrongly, so that dtype is tested on GPUs only.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from prefill_cases import interpreter_missing
from torch import Tensor

from lm_eval_sparse.kernels import backends
from lm_eval_sparse.kernels.estimate import window_sums
from lm_eval_sparse.kernels.index.top_p_blocks import APART, coverage_keys
from lm_eval_sparse.kernels.index.vertical_slash import Pattern, rank
from lm_eval_sparse.methods.eviction.ada_snapkv import AdaSnapKV
from lm_eval_sparse.methods.eviction.snapkv import SnapKV
from lm_eval_sparse.methods.prefill.flexprefill_vs import FlexPrefillVS
from lm_eval_sparse.methods.prefill.vertical_slash import VerticalSlash
from lm_eval_sparse.testing import select

if (reason := interpreter_missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from lm_eval_sparse.kernels.estimate.window import triton as window_triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("PATTERN_SEED", random.SystemRandom().randrange(2**31)))
    print(f"PATTERN_SEED={seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.mark.parametrize(
    ("length", "window", "dim"), [(1, 1, 64), (63, 256, 80), (200, 7, 16), (261, 130, 64), (150, 140, 128)]
)
@pytest.mark.parametrize("partial_bytes", [1 << 29, 1])
def test_window_sums(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch, length: int, window: int, dim: int, partial_bytes: int
) -> None:
    monkeypatch.setattr(window_triton, "PARTIAL_BYTES", partial_bytes)  # long windows in parts
    heads, kv_heads = rng.choice(((4, 4), (3, 1), (6, 2), (7, 1)))
    dtype = rng.choice((torch.float16, torch.float32))
    query = torch.randn(length, heads, dim).to(dtype).transpose(0, 1)
    key = torch.randn(kv_heads, length + 3, dim).to(dtype)[:, 3:]
    options = {"scale": dim**-0.5, "softcap": rng.choice((None, 5.0))}
    for asked in ("columns", "diagonals", "peaks"), ("columns", "diagonals"), ("peaks",):
        options |= dict.fromkeys(("columns", "diagonals", "peaks"), False) | dict.fromkeys(asked, True)
        expected = window_sums(query.double(), key.double(), window, backend="naive", **options)
        found = window_sums(query, key, window, backend="triton", **options)
        for name in ("columns", "diagonals", "peaks"):
            if name in asked:
                sums = getattr(found, name)
                torch.testing.assert_close(sums.double(), getattr(expected, name).double(), atol=1e-5, rtol=1e-5)
            else:
                assert getattr(found, name) is None


def masses(rng: random.Random, heads: int, length: int) -> tuple[Tensor, Tensor]:
    """Columns and diagonals: even, with many ties, of very different sizes, or the same in all heads."""
    kind = rng.choice(("even", "ties", "peaky", "alike"))
    columns, diagonals = torch.rand(2, heads, length)
    if kind == "ties":
        columns, diagonals = (columns * 5).round(), (diagonals * 5).round()
    elif kind == "peaky":
        columns, diagonals = ((mass * 20).exp() for mass in (columns, diagonals))
    elif kind == "alike":
        columns, diagonals = (mass[:1].repeat(heads, 1) for mass in (columns, diagonals))
    return columns, diagonals


def same_layouts(one: Pattern, other: Pattern, counts: tuple[Tensor, Tensor]) -> None:
    expected, found = one.layout(*counts), other.layout(*counts)
    found.check(one.heads)
    assert torch.equal(found.counts, expected.counts) and torch.equal(found.mask(), expected.mask())
    assert torch.equal(found.column_counts, expected.column_counts)
    assert torch.equal(found.column_keys(), expected.column_keys())


@pytest.mark.parametrize("length", [1, 63, 130, 300])
@pytest.mark.parametrize("tile", [16, 128])
def test_pattern(rng: random.Random, length: int, tile: int) -> None:
    heads, sinks, near = rng.choice((1, 3)), rng.choice((0, 4, 5000)), rng.choice((1, 64))
    density = rng.choice((0.05, 0.3, 0.9, 0.999))
    columns, diagonals = masses(rng, heads, length)
    one, other = (rank(columns, diagonals, sinks, near, tile, backend=name) for name in ("naive", "triton"))
    for name in ("column_rank", "diagonal_rank", "band_rank", "last_rank"):
        assert torch.equal(getattr(one, name).int(), getattr(other, name)), name
    counts = one.equal_counts(density)
    assert torch.equal(torch.stack(counts).int(), torch.stack(other.equal_counts(density)))
    same_layouts(one, other, counts)

    apart = 1 + APART * torch.arange(heads, dtype=torch.float64)[:, None]
    keys = tuple(coverage_keys(mass) * apart for mass in one.descending())
    for mass, sorted_mass in zip(other.descending(), one.descending(), strict=True):
        assert torch.equal(mass, sorted_mass)
    (rest, *counts), (solved, *found) = one.solve_covering(keys, density), other.solve_covering(keys, density)
    assert abs(float(solved) / rest - 1) < 1e-14  # exp may differ in the last bit
    assert torch.equal(torch.stack(counts).int(), torch.stack(found))
    same_layouts(one, other, counts)

    counts = torch.randint(1, length + 1, (2, heads))
    fitted = torch.stack(one._fit(*counts, one._goal(density)))
    assert torch.equal(fitted.int(), other._fit_counts(counts.int(), one._goal(density)))


def test_layouts_that_do_not_fit_are_sized_by_their_longest_row(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval_sparse.kernels.index.vertical_slash import triton as device

    monkeypatch.setattr(device, "LIST_BYTES", 0)
    columns, diagonals = masses(rng, 2, 500)
    one, other = (rank(columns, diagonals, 4, 16, 16, backend=name) for name in ("naive", "triton"))
    counts = torch.tensor([9, 40]), torch.tensor([30, 3])
    same_layouts(one, other, counts)
    assert other.layout(*counts).indices.shape == one.layout(*counts).indices.shape


@pytest.mark.parametrize(
    "method", [VerticalSlash(window=64), FlexPrefillVS(window=64), SnapKV(window=64), AdaSnapKV(window=64)]
)
def test_methods_select_as_in_torch(rng: random.Random, monkeypatch: pytest.MonkeyPatch, method: object) -> None:
    query, key = torch.randn(2, 161, 32), torch.randn(1, 161, 32)  # the interpreter is slow
    sparsity = rng.choice((0.5, 0.8))
    chosen = []
    for name in ("naive", "triton"):
        monkeypatch.setattr(backends, "AUTO_ELSEWHERE", name)
        chosen.append(select(method, query, key, scale=32**-0.5, softcap=None, sparsity=sparsity))
    expected, found = chosen
    assert found.knobs.keys() == expected.knobs.keys()
    if isinstance(method, SnapKV):
        assert found.ids.shape == expected.ids.shape
        assert float((found.ids == expected.ids).float().mean()) > 0.98
    else:  # equal but for near ties, which fp32 sums in another order may decide otherwise
        both, either = (op(found.mask(), expected.mask()) for op in (torch.bitwise_and, torch.bitwise_or))
        assert float(both.sum()) >= 0.98 * float(either.sum())
        pairs = [selection.executed_pairs().sum() / (2 * 161 * 162 / 2) for selection in chosen]
        assert abs(float(pairs[0] - pairs[1])) < 0.005
