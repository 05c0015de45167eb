"""The block-sparse operator against an fp64 definition written here, on random layouts and odd lengths.

Long, since all backends are tried on the same layouts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import random
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lm_eval_sparse.kernels import backends
from lm_eval_sparse.kernels.prefill import block_sparse_prefill, block_sparse_prefill_rows, fa4, flex
from lm_eval_sparse.kernels.types import BLOCK_SIZES, Blocks, block_lengths, causal_pairs, tile_pairs

LENGTHS = (1, 16, 17, 63, 127, 333, 1000)


def random_layout(length: int, block_q: int, block_k: int, heads: int, density: float, generator: torch.Generator):
    """A random causal layout with the first key block always in, and heads of very different densities."""
    n_q, n_k = -(-length // block_q), -(-length // block_k)
    last = torch.clamp((torch.arange(n_q) + 1) * block_q, max=length) - 1
    causal = torch.arange(n_k)[None, :] * block_k <= last[:, None]
    share = torch.linspace(0, 2 * density, heads)[:, None, None]
    mask = (torch.rand(heads, n_q, n_k, generator=generator) < share) & causal
    mask[:, :, 0] = True
    return Blocks.from_mask(mask, length, block_q, block_k), mask


def definition(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, layout: Blocks, softcap) -> Tensor:
    """Loop over queries: softmax over exactly the visible keys, in fp64."""
    heads, length, dim = query.shape
    group = heads // key.shape[0]
    out = torch.zeros(heads, length, dim, dtype=torch.float64)
    for head in range(heads):
        for i in range(length):
            keys = [j for j in range(i + 1) if mask[head, i // layout.block_q, j // layout.block_k]]
            scores = key[head // group, keys].double() @ query[head, i].double() * dim**-0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[head, i] = scores.softmax(0) @ value[head // group, keys].double()
    return out


def pick(seed: int) -> dict:
    rng = random.Random(seed)
    kv_heads = rng.choice((1, 2, 3))
    return {
        "length": rng.choice(LENGTHS[:-1]),
        "block_q": rng.choice(BLOCK_SIZES),
        "block_k": rng.choice(BLOCK_SIZES),
        "kv_heads": kv_heads,
        "heads": kv_heads * rng.choice((1, 2, 7)),
        "dim": rng.choice((16, 64, 80)),
        "softcap": rng.choice((None, None, 5.0)),
    }


@pytest.mark.parametrize("backend", ["naive", "gather"])
@pytest.mark.parametrize("seed", range(8))
def test_equals_the_definition(backend: str, seed: int) -> None:
    case = pick(seed)
    generator = torch.Generator().manual_seed(seed)
    layout, mask = random_layout(case["length"], case["block_q"], case["block_k"], case["heads"], 0.4, generator)
    layout.check(case["heads"])
    query = torch.randn(case["heads"], case["length"], case["dim"], generator=generator)
    key, value = (torch.randn(case["kv_heads"], case["length"], case["dim"], generator=generator) for _ in "kv")
    out, used = block_sparse_prefill(query, key, value, layout, softcap=case["softcap"], backend=backend)
    assert used == backend
    expected = definition(query, key, value, mask, layout, case["softcap"])
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def compiled_flex() -> None:
    """Skips where flex does not work. Finding out compiles a kernel, so that nobody does who runs other tests."""
    if (reason := flex.unavailable_reason("cpu", 32, 32)) is not None:
        pytest.skip(f"flex: {reason}")


needs_flex = pytest.mark.usefixtures("compiled_flex")


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend that works."""
    if request.param == "flex":
        request.getfixturevalue("compiled_flex")
    return request.param


@needs_flex
@pytest.mark.parametrize("length", [63, 1000, 4097])
def test_flex_equals_naive_without_recompiling(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    layout, _ = random_layout(length, 32, 32, 6, 0.2, generator)
    query = torch.randn(6, length, 64, generator=generator)
    key, value = (torch.randn(2, length, 64, generator=generator) for _ in "kv")
    block_sparse_prefill(query, key, value, layout, backend="flex")
    with torch.compiler.set_stance("fail_on_recompile"):
        out, used = block_sparse_prefill(query, key, value, layout, backend="flex")
    assert used == "flex"
    expected, _ = block_sparse_prefill(query.double(), key.double(), value.double(), layout, backend="naive")
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-4)


@needs_flex
def test_flex_takes_other_lengths_without_recompiling() -> None:
    def run(length: int) -> None:
        generator = torch.Generator().manual_seed(length)
        layout, _ = random_layout(length, 32, 32, 4, 0.3, generator)
        states = [torch.randn(heads, length, 64, generator=generator) for heads in (4, 2, 2)]
        block_sparse_prefill(*states, layout, backend="flex")

    run(500)
    run(777)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (640, 1024, 1531, 2048):
            run(length)


@pytest.mark.parametrize("backend", ["gather", "flex"], indirect=True)
def test_half_precision_stays_close(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    layout, _ = random_layout(1000, 32, 32, 4, 0.3, generator)
    states = [torch.randn(heads, 1000, 64, generator=generator).bfloat16() for heads in (4, 2, 2)]
    out, _ = block_sparse_prefill(*states, layout, backend=backend)
    expected, _ = block_sparse_prefill(*(state.double() for state in states), layout, backend="naive")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", ["naive", "gather", "flex"], indirect=True)
def test_full_layout_is_dense_attention(backend: str) -> None:
    generator = torch.Generator().manual_seed(5)
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    layout = Blocks.from_mask(causal.expand(4, -1, -1), 333, 32, 32)
    query, key, value = (torch.randn(heads, 333, 64, generator=generator) for heads in (4, 2, 2))
    out, _ = block_sparse_prefill(query, key, value, layout, backend=backend)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, enable_gqa=True
    )[0]
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-4)
    assert int(layout.executed_pairs().sum()) == 4 * causal_pairs(333)


@pytest.mark.parametrize("backend", ["gather", "flex"], indirect=True)
def test_keys_outside_the_layout_are_never_read(backend: str) -> None:
    """NaN in every key and value that no listed block holds must not reach the output."""
    generator = torch.Generator().manual_seed(9)
    mask = torch.zeros(4, 16, 16, dtype=torch.bool)
    mask[:, :, 0] = True
    mask |= torch.eye(16, dtype=torch.bool)
    layout = Blocks.from_mask(mask, 500, 32, 32)
    query, key, value = (torch.randn(heads, 500, 64, generator=generator) for heads in (4, 2, 2))
    rows = slice(320, 352)  # query block 10 reads key blocks 0 and 10
    key[:, 32:320], value[:, 32:320] = float("nan"), float("nan")
    out, _ = block_sparse_prefill(query, key, value, layout, backend=backend)
    assert bool(out[:, rows].isfinite().all())


@pytest.mark.parametrize("length", LENGTHS)
def test_pairs_equal_brute_force(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    triangle = torch.ones(length, length, dtype=torch.bool).tril()
    for block_q, block_k in ((16, 16), (128, 32), (32, 64)):
        layout, mask = random_layout(length, block_q, block_k, 3, 0.4, generator)
        dense = mask.repeat_interleave(block_q, 1).repeat_interleave(block_k, 2)[:, :length, :length]
        assert layout.executed_pairs().tolist() == (dense & triangle).sum((1, 2)).tolist()
        assert torch.equal(layout.mask(), mask)
        sizes = block_lengths(length, block_k)
        assert layout.keys_read().tolist() == (mask * sizes).sum((1, 2)).tolist()
        assert int(tile_pairs(length, block_q, block_k).sum()) == causal_pairs(length)


def valid() -> tuple[list[Tensor], Blocks]:
    layout, _ = random_layout(100, 32, 32, 4, 0.5, torch.Generator().manual_seed(0))
    return [torch.randn(heads, 100, 16) for heads in (4, 2, 2)], layout


def moved(layout: Blocks, device: str) -> Blocks:
    return replace(layout, indices=layout.indices.to(device), counts=layout.counts.to(device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states, layout: ([states[0], states[1], states[2][:, :-1]], layout, {}), "do not fit together"),
        (lambda states, layout: ([states[0][:3], *states[1:]], layout, {}), "do not fit together"),
        (lambda states, layout: ([states[0], states[1].double(), states[2]], layout, {}), "dtypes are"),
        (lambda states, layout: ([state.long() for state in states], layout, {}), "floating-point"),
        (lambda states, layout: ([state[:, :90] for state in states], layout, {}), "layout is for 100 tokens"),
        (
            lambda states, layout: (states, layout, {"backend": "cuda"}),
            "backend 'cuda' is unknown; accepted: auto, naive",
        ),
        (lambda states, layout: (states, layout, {"backend": None}), "backend None is unknown; accepted: auto, naive"),
        (lambda states, layout: ([states[0][None], *states[1:]], layout, {}), r"query \(1, 4, 100, 16\).*\(H, L, D\)"),
        (lambda states, layout: ([*states[:2], states[2][0]], layout, {}), r"value \(100, 16\) do not fit together"),
        (lambda states, layout: ([states[0][..., :8], *states[1:]], layout, {}), r"\(4, 100, 8\), key \(2, 100, 16\)"),
        (lambda states, layout: ([state.to("meta") for state in states], layout, {}), "meta, layout cpu; expected one"),
        (lambda states, layout: (states, moved(layout, "meta"), {}), "devices are cpu, cpu, cpu, layout meta"),
        (lambda states, layout: (states, replace(layout, block_q=48), {}), r"48x32; accepted: \(16, 32, 64, 128\)"),
        (
            lambda states, layout: (states, replace(layout, block_q=16), {}),
            r"indices \(4, 4, .* expected \(4, 7, width\)",
        ),
        (lambda states, layout: (states, layout, {"backend": "flex", "softcap": 5.0}), "it takes no softcap"),
    ],
)
def test_bad_calls_are_refused(change, message: str) -> None:
    states, layout, options = change(*valid())
    with pytest.raises(ValueError, match=message):
        block_sparse_prefill(*states, layout, **options)


@pytest.mark.parametrize(
    ("ids", "block_q", "message"),
    [
        ([0, 3, 0, 0], 32, "wholly after"),
        ([0, 9, 0, 0], 32, "outside"),
        ([0, 3], 64, "without any key"),  # key block 3 starts inside query block 1, after its first query
    ],
)
def test_check_finds_broken_layouts(ids: list[int], block_q: int, message: str) -> None:
    indices = torch.tensor(ids, dtype=torch.int32)[None, :, None]
    layout = Blocks(indices, torch.ones_like(indices[..., 0]), 100, block_q, 32)
    with pytest.raises(ValueError, match=message):
        layout.check(1)


def test_check_finds_duplicates() -> None:
    indices = torch.tensor([[[0, 0], [0, 1], [0, 1], [1, 1]]], dtype=torch.int32)
    layout = Blocks(indices, torch.tensor([[1, 2, 2, 2]], dtype=torch.int32), 100, 32, 32)
    with pytest.raises(ValueError, match="ascending"):
        layout.check(1)


@pytest.mark.parametrize(
    ("entry", "count", "message"),
    [(-1, 1, "outside"), (10**6, 1, "outside"), (0, 0, "fewer than one"), (0, 2, "more than its 1")],
)
def test_check_finds_broken_lists(entry: int, count: int, message: str) -> None:
    indices = torch.arange(4, dtype=torch.int32).reshape(1, 4, 1)
    counts = torch.ones(1, 4, dtype=torch.int32)
    Blocks(indices, counts, 100, 32, 32).check(1)
    indices[0, 2], counts[0, 2] = entry, count
    with pytest.raises(ValueError, match=message):
        Blocks(indices, counts, 100, 32, 32).check(1)


@pytest.fixture
def fresh_reasons() -> Iterator[None]:
    """Why a backend cannot run is remembered, and said once; forget it before and after."""
    from lm_eval_sparse.kernels import prefill as operator

    remembered = (backends.triton_unavailable, fa4.unavailable_reason, operator._warn_once)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states: [state.double() for state in states], "dtype is torch.float64; the kernel takes torch.float32"),
        (
            lambda states: [*states[:2], states[2].repeat(1, 1, 5)],
            "heads have 64 dimensions, of values 320; the kernel takes 256 at most",
        ),
    ],
)
def test_triton_says_what_it_takes(monkeypatch: pytest.MonkeyPatch, change, message: str) -> None:
    """And `auto` takes another backend."""
    monkeypatch.setattr(backends, "triton_unavailable", lambda device: None)
    layout, _ = random_layout(100, 32, 32, 4, 0.5, torch.Generator().manual_seed(0))
    states = change([torch.randn(heads, 100, 64) for heads in (4, 2, 2)])
    with pytest.raises(ValueError, match=f"backend 'triton' cannot run here: {message}.*use 'auto'"):
        block_sparse_prefill(*states, layout, backend="triton")
    expected, _ = block_sparse_prefill(*states, layout, backend="naive")
    out, used = block_sparse_prefill(*states, layout)
    assert used in ("gather", "flex")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_triton_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch, fresh_reasons: None) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    states, layout = valid()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"triton is not installed \(pip install triton\); use 'auto' or 'gather'"):
        block_sparse_prefill(*states, layout, backend="triton")
    backends.triton_unavailable.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="Triton kernels run on CUDA devices, not on 'cpu'"):
        block_sparse_prefill(*states, layout, backend="triton")
    assert block_sparse_prefill(*states, layout)[1] in ("gather", "flex")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r"package flash-attn-4 is not installed \(pip install"),
        ("4.0.0b12", r"flash-attn-4 4.0.0b12 is too old: .* or newer is needed \(pip install"),
    ],
)
def test_flash_attention_4_missing_or_too_old(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fresh_reasons: None,
    version: str | None,
    message: str,
) -> None:
    """As on a GPU: only the name of the device is looked at before the package is. Others run, and that is said."""

    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    reason = fa4.unavailable_reason("cuda", 128, 128, 128, torch.bfloat16)
    assert reason is not None and re.search(message, reason), reason
    states, layout = valid()
    with caplog.at_level(logging.WARNING):
        used = block_sparse_prefill(*states, layout, backend="fa4")[1]
    assert used in ("gather", "flex")
    assert re.search("backend 'fa4' cannot run here: .*not on device 'cpu'; 'auto' chooses another", caplog.text)
    assert block_sparse_prefill(*states, layout)[1] == used


def two_rows() -> tuple[list[list[Tensor]], list[Blocks]]:
    rows = [valid(), valid()]
    return [list(states) for states in zip(*(states for states, _ in rows), strict=True)], [row[1] for row in rows]


def other_blocks(states, layouts, options):
    layouts[1], _ = random_layout(100, 32, 64, 4, 0.5, torch.Generator().manual_seed(0))


def other_columns(states, layouts, options):
    layouts[1] = layouts[1].with_columns(torch.zeros(4, 100, dtype=torch.bool))


def other_heads(states, layouts, options):
    layouts[1], _ = random_layout(100, 32, 32, 2, 0.5, torch.Generator().manual_seed(0))
    for row in states:
        row[1] = row[1][:2]


def other_dtype(states, layouts, options):
    for row in states:
        row[1] = row[1].double()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_blocks, "32x32.*32x64.*expected the same in all rows"),
        (other_columns, "kind of columns.*no columns.*shared columns.*expected the same"),
        (other_heads, "rows differ in heads.*expected the same for all rows"),
        (other_dtype, "float32.*float64.*expected the same for all rows"),
        (lambda states, layouts, options: layouts.pop(), "2 queries, 2 keys, 2 values and 1 layouts.*one of each"),
        (lambda states, layouts, options: states[2].pop(), "2 keys, 1 values.*one of each"),
        (lambda states, layouts, options: [part.clear() for part in (*states, layouts)], "0 queries.*at least one row"),
        (lambda states, layouts, options: options.update(outs=states[0][:1]), "1 outs given for 2 rows"),
        (
            lambda states, layouts, options: options.update(outs=[out[:, :-1] for out in states[0]]),
            r"out is \(4, 99, 16\), torch.float32, cpu; expected \(4, 100, 16\)",
        ),
        (
            lambda states, layouts, options: options.update(outs=[out.double() for out in states[0]]),
            r"out is .*torch.float64, cpu; expected \(4, 100, 16\), torch.float32",
        ),
    ],
)
def test_bad_calls_with_several_rows_are_refused(change, message: str) -> None:
    states, layouts = two_rows()
    options: dict = {}
    change(states, layouts, options)
    with pytest.raises(ValueError, match=message):
        block_sparse_prefill_rows(*states, layouts, **options)


@pytest.mark.parametrize("backend", ["naive", "gather", "auto"])
def test_several_rows(backend: str) -> None:
    """Rows of any lengths, one after the other where a backend knows no better; into given outputs too."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for length in (1, 333, 64):
        layout, mask = random_layout(length, 32, 16, 4, 0.4, generator)
        rows.append(([torch.randn(heads, length, 16, generator=generator) for heads in (4, 2, 2)], layout, mask))
    states = [list(parts) for parts in zip(*(row[0] for row in rows), strict=True)]
    layouts = [row[1] for row in rows]
    given = [torch.full_like(query, torch.nan) for query in states[0]]
    for outs in (None, given):
        found, used = block_sparse_prefill_rows(*states, layouts, backend=backend, outs=outs)
        assert used == backend or backend == "auto"
        for (parts, layout, mask), out in zip(rows, found if outs is None else given, strict=True):
            torch.testing.assert_close(out.double(), definition(*parts, mask, layout, None), atol=2e-5, rtol=1e-4)


@needs_flex
def test_a_kernel_that_would_run_uncompiled_is_not_called_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its limit of variants the compiler only warns and runs L x L attention; that must fall back and say so."""
    from lm_eval_sparse.kernels import prefill as operator

    monkeypatch.setattr(operator, "_broken", {})
    layout, _ = random_layout(200, 64, 64, 4, 0.5, torch.Generator().manual_seed(1))
    flex.unavailable_reason("cpu", 64, 64, 24)

    def run(kv_heads: int) -> tuple[Tensor, str]:
        generator = torch.Generator().manual_seed(2)
        states = [torch.randn(heads, 200, 24, generator=generator) for heads in (4, kv_heads, kv_heads)]
        out, used = block_sparse_prefill(*states, layout)
        return out - block_sparse_prefill(*states, layout, backend="naive")[0], used

    assert run(2)[1] == "flex"
    with torch._dynamo.config.patch(recompile_limit=1):
        difference, used = run(1)
    assert used == "gather" and float(difference.abs().max()) < 1e-5


def test_debugging_looks_at_what_layouts_list(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.randn(heads, 64, 16) for heads in (2, 1, 1)]
    twice = torch.zeros(2, 2, 2, dtype=torch.int32)
    layout = Blocks(twice, torch.tensor([[1, 2], [1, 2]], dtype=torch.int32), 64, 32, 32)
    block_sparse_prefill(*states, layout, backend="naive")
    monkeypatch.setenv("LM_EVAL_SPARSE_DEBUG", "1")
    with pytest.raises(ValueError, match="duplicate"):
        block_sparse_prefill(*states, layout, backend="naive")
    beyond = Blocks(torch.full((2, 2, 1), 2, dtype=torch.int32), layout.counts.clamp(max=1), 64, 32, 32)
    with pytest.raises(ValueError, match="outside 0..1"):
        block_sparse_prefill(*states, beyond, backend="naive")


@pytest.mark.parametrize("backend", ["auto", "naive", "gather"])
def test_no_tokens_are_refused(backend: str) -> None:
    states = [torch.randn(heads, 0, 16) for heads in (2, 1, 1)]
    none = torch.zeros(2, 0, dtype=torch.int32)
    with pytest.raises(ValueError, match="at least one"):
        block_sparse_prefill(*states, Blocks(none[..., None], none, 0, 32, 32), backend=backend)


@pytest.mark.parametrize("options", [{"softcap": 0.0}, {"softcap": float("nan")}, {"scale": -1.0}, {"scale": 0.0}])
def test_scale_and_softcap_are_positive(options: dict[str, float]) -> None:
    states = [torch.randn(heads, 40, 16) for heads in (2, 1, 1)]
    layout = Blocks.from_mask(torch.ones(2, 2, 2, dtype=torch.bool).tril(), 40, 32, 32)
    with pytest.raises(ValueError, match="expected a positive number"):
        block_sparse_prefill(*states, layout, backend="naive", **options)
