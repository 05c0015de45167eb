"""Decode attention on the CPU: `naive`, `gather`, and the Triton kernels under Triton's interpreter; against fp64.

Shapes, selections and inputs are fresh in every run. A failing test shows its seed; PAGED_DECODE_SEED=<seed> repeats
it. The interpreter computes products of bf16 wrongly, so Triton in that dtype is tested on GPUs (test_gpu_decode.py).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_cases import Case, Draw, assert_close, attention, dense_keys, every_page, one_of, random_case, random_kv
from prefill_cases import interpreter_missing
from torch import Tensor

from lm_eval_sparse.kernels.backends import triton_unavailable
from lm_eval_sparse.kernels.decode import paged_decode
from lm_eval_sparse.kernels.dense import dense_attention
from lm_eval_sparse.kernels.types import RaggedKV, Reads

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")

MISSING = interpreter_missing()
TRITON = pytest.param("triton", marks=pytest.mark.skipif(MISSING is not None, reason=MISSING or ""))
BACKENDS = ("naive", "gather", TRITON)
DTYPES = {
    "naive": (torch.float64, torch.float32, torch.bfloat16),
    "gather": (torch.float64, torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.float16),
}
#: Random calls of a test.
CALLS = {"naive": 20, "gather": 40, "triton": 2}
PAGE_SIZES = (None, 8, 16, 64)


@pytest.fixture
def draw() -> Draw:
    seed = int(os.environ.get("PAGED_DECODE_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"PAGED_DECODE_SEED={seed}")
    return Draw(seed)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def lengths_of(draw: Draw, steps: int) -> list[int]:
    lengths = [draw.rng.choice((0, 1, 63, 65, 128, 257, draw.rng.randrange(1, 400))) for _ in range(3)]
    if draw.rng.random() < 0.4:
        lengths = [lengths[0] or 90] * 3
    return [max(length, steps) if length else 0 for length in lengths[: draw.rng.choice((1, 3))]]


def any_case(draw: Draw, backend: str, **changes: Any) -> Case:
    steps = changes.pop("steps", None) or draw.rng.choice((1, 1, 3))
    dim = draw.rng.choice((64, 96))
    page_size = changes.pop("page_size") if "page_size" in changes else draw.rng.choice(PAGE_SIZES)
    options = {
        "page_size": page_size,
        "own": draw.rng.random() < 0.5,
        "softcap": draw.rng.choice((None, None, 5.0)),
        "window": draw.rng.choice((None, 1, 17, 200)) if page_size is None else None,
        "poison": backend != "naive",
        **changes,
    }
    lengths = options.pop("lengths", None) or lengths_of(draw, steps)
    value_dim = draw.rng.choice((dim, dim, 40))
    return random_case(
        draw, lengths, draw.rng.choice((1, 3, 4, 7)), steps, dim, value_dim, draw.rng.choice(DTYPES[backend]), **options
    )


def splits_of(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes with which short sequences fill and overflow the splits of the Triton kernel."""
    from lm_eval_sparse.kernels.decode import triton as kernel

    most, least = draw.rng.choice(((64, 128), (3, 32), (4, 16), (1, 64)))
    monkeypatch.setattr(kernel, "split_limit", lambda heads: most)
    monkeypatch.setattr(kernel, "MIN_SPLIT", least)


# --- against the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_definition(draw: Draw, monkeypatch: pytest.MonkeyPatch, backend: str, page_size: int | None) -> None:
    for _ in range(CALLS[backend]):
        if backend == "triton":
            splits_of(draw, monkeypatch)
        any_case(draw, backend, page_size=page_size).check(backend)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sequences_beside_short_ones(draw: Draw, backend: str, steps: int) -> None:
    for own, page_size in ((False, None), (True, 16)):
        any_case(draw, backend, lengths=[1000, 0, steps], steps=steps, page_size=page_size, own=own).check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_a_tile_holds(draw: Draw, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Tokens of a tile see different keys, and a tile begins in the middle of a token."""
    for window in (None, 5):
        if backend == "triton":
            splits_of(draw, monkeypatch)
        dtype = draw.rng.choice(DTYPES[backend])
        random_case(draw, [100, 31], 3, 23, 64, 64, dtype, window=window, poison=backend != "naive").check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_heads_of_a_group(draw: Draw, backend: str) -> None:
    for page_size in (None, 8):
        case = random_case(draw, [70], 71, 1, 64, 64, torch.float32, page_size=page_size)
        case.check(backend if backend != "naive" else "gather")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequence_at_all(draw: Draw, backend: str) -> None:
    any_case(draw, backend, lengths=[0, 0]).check(backend)
    kv = RaggedKV.of(torch.zeros(4, 16), torch.zeros(4, 16), [], [])
    out, _ = paged_decode(torch.zeros(0, 2, 1, 16), kv, scale=1.0, backend=backend)
    assert out.shape == (0, 2, 1, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 3])
def test_the_listed_pages_may_be_one_key(draw: Draw, width: int, backend: str) -> None:
    """A page whose only visible key is the token itself: the output is its value."""
    kv = random_kv(draw, [65, 129], 16, 16, torch.float32)
    pages = torch.full((2, 1, 1, width), 0, dtype=torch.int32)
    pages[:, 0, 0, 0] = torch.tensor([1, 2])
    selection = Reads(pages, torch.ones(2, 1, 1, dtype=torch.int32), 64)
    selection.check(kv)
    assert selection.keys_read(kv).flatten().tolist() == [1, 1]
    out, _ = paged_decode(draw.normal(2, 4, 1, 16), kv, selection, scale=1.0, backend=backend)
    for s in range(2):
        assert_close(out[s, :, 0], kv.values[kv.starts[s] + kv.lengths[s] - 1].double().expand(4, -1))


@pytest.mark.parametrize("backend", ["naive", "gather"])
def test_a_row_equals_dense_attention(draw: Draw, backend: str) -> None:
    for dtype in DTYPES[backend]:
        for steps, length in ((1, 63), (5, 257)):
            query = draw.normal(2, 6, steps, 64).to(dtype)
            key, value = (draw.normal(2, 2, length, 64).to(dtype) for _ in "kv")
            dense = dense_attention(query, key, value, scale=0.125)
            kv = RaggedKV.of(key.reshape(-1, 64), value.reshape(-1, 64), [i * length for i in range(4)], [length] * 4)
            out, _ = paged_decode(query.reshape(4, 3, steps, 64), kv, scale=0.125, backend=backend)
            assert_close(out.reshape(dense.shape), dense.double(), factor=2)


@pytest.mark.parametrize(("dtype", "mean"), [(torch.bfloat16, 4.0), (torch.float16, 30.0)])
@pytest.mark.parametrize("steps", [1, 32])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("backend", ["gather", TRITON])
def test_half_precision_is_as_good_as_dense_attention(
    draw: Draw, backend: str, paged: bool, steps: int, dtype: torch.dtype, mean: float
) -> None:
    """Queries and keys with a common offset, as key biases make them: products are large and differ little.

    At 4 a bf16 score is off by 8 before the scale, at 30 it is beyond fp16's 65504. SDPA keeps its scores in fp32.
    """
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes products of bf16 wrongly")
    dim, length = 128, 257
    query, key, value = (draw.normal(length, dim) for _ in "qkv")
    query, key, value = (query + mean).to(dtype), (key + mean).to(dtype), value.to(dtype)
    kv = RaggedKV.of(key, value, [0], [length])
    expected = attention(query[None, None, -steps:], kv, dense_keys([length], steps, None), dim**-0.5, None)
    dense = dense_attention(*(state[None, None] for state in (query, key, value)), scale=dim**-0.5)[:, :, -steps:]
    allowed = 4 * float((dense.double() - expected).abs().max()) + 1e-2
    selection = every_page(kv, 1, steps, 16) if paged else None
    out, _ = paged_decode(query[None, None, -steps:], kv, selection, scale=dim**-0.5, backend=backend)
    assert float((out.double() - expected).abs().max()) <= allowed  # not so for NaN


# --- to the bit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "threads"),
    [("gather", 1), ("gather", 2), pytest.param("triton", 1, marks=TRITON.marks)],
    indirect=["threads"],
)
def test_a_sequence_alone_is_as_among_others(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, threads: int, backend: str
) -> None:
    """Neither the other sequences, nor the storage, nor the longest length that there may be, change a bit."""
    calls = [(1, None), (3, None), (1, 8), (3, 64)]
    for steps, page_size in calls if backend == "triton" else calls * 2:
        if backend == "triton":
            splits_of(draw, monkeypatch)
        lengths = draw.rng.choice(([200, 0, 40], [97] * 9, [257, 5]))[: 12 if backend == "gather" else 2]
        case = any_case(draw, backend, lengths=lengths, steps=steps, page_size=page_size)
        together = case.run(backend)
        longer = replace(case, kv=replace(case.kv, longest=case.kv.longest + 5000))
        if case.selection is not None:
            more = torch.full((*case.selection.counts.shape, 77), 2**31 - 1, dtype=torch.int32)
            pages = torch.cat([case.selection.ids, more], -1)
            longer = replace(longer, selection=replace(case.selection, ids=pages))
        assert torch.equal(together, longer.run(backend))
        for place in range(len(lengths)):
            assert torch.equal(together[place], one_of(case, place).run(backend)[0]), f"{lengths}, sequence {place}"


@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
def test_all_pages_are_no_selection(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    for page_size in (8, 64):
        splits_of(draw, monkeypatch)
        case = any_case(
            draw, "triton", lengths=[draw.rng.randrange(1, 400), 63, 0], steps=1, page_size=None, window=None
        )
        dense = case.run("triton")
        read = torch.zeros(3, 1, 1, dtype=torch.int32)
        shared = replace(case, selection=every_page(case.kv, 1, 1, page_size))
        assert torch.equal(shared.run("triton", read), dense)
        assert torch.equal(read.flatten(), case.kv.lengths)
        own = replace(case, selection=every_page(case.kv, case.query.shape[1], 1, page_size))
        assert torch.equal(own.run("triton"), dense)


# --- what selections say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "counts", "message"),
    [
        ([[0, 1], [0, 2]], [2, 2], "may not see"),  # 33 keys: page 2 of 16 begins at key 32, token 0 sees 32 keys
        ([[0, -1], [0, 1]], [2, 2], "may not see"),
        ([[0, 1], [1, 1]], [2, 2], "ascending"),
        ([[1, 0], [0, 1]], [2, 2], "ascending"),
        ([[0, 1], [0, 0]], [2, 0], "without any page"),
        ([[0, 1], [0, 0]], [3, 1], "counts more than the 2"),
        ([[0, 1], [1 << 28, 0]], [2, 1], "may not see"),  # times 16 it is 0 in 32 bits
    ],
)
def test_selection_check_finds_faults(ids: list[list[int]], counts: list[int], message: str) -> None:
    kv = RaggedKV.of(torch.zeros(40, 16), torch.zeros(40, 16), [3], [33])
    good = Reads(torch.tensor([[[[0, 1], [1, 0]]]]).int(), torch.tensor([[[2, 1]]]).int(), 16)
    good.check(kv)  # what is not counted may be anything
    assert good.keys_read(kv).tolist() == [[[32, 16]]]
    bad = Reads(torch.tensor(ids).int()[None, None], torch.tensor(counts).int()[None, None], 16)
    if message == "may not see" and ids[1] == [0, 2]:
        bad.check(kv)  # the last token sees key 32
        bad = replace(bad, ids=bad.ids.flip(2))
    with pytest.raises(ValueError, match=message):
        bad.check(kv)
    nobody = replace(kv, lengths=torch.zeros(1, dtype=torch.int32))
    bad.check(nobody)
    assert bad.keys_read(nobody).tolist() == [[[0, 0]]]


# --- refusals --------------------------------------------------------------------------------------------------------


def decode_call() -> tuple[Tensor, RaggedKV, Reads]:
    kv = RaggedKV.of(torch.randn(100, 16), torch.randn(100, 24), [50, 0], [50, 33])
    pages = torch.zeros(2, 1, 3, 2, dtype=torch.int32)
    return torch.randn(2, 4, 3, 16), kv, Reads(pages, torch.ones(2, 1, 3, dtype=torch.int32), 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, kv: (q[0], kv), "does not fit 2 sequences"),
        (lambda q, kv: (q[:1], kv), "does not fit 2 sequences"),
        (lambda q, kv: (q[..., :8], kv), "does not fit 2 sequences"),
        (lambda q, kv: (q, replace(kv, values=kv.values[:99])), "do not fit together"),
        (lambda q, kv: (q, replace(kv, lengths=kv.lengths[:1])), "do not fit together"),
        (lambda q, kv: (q, replace(kv, starts=kv.starts[:1])), "does not fit 1 sequences"),
        (lambda q, kv: (q.double(), kv), "dtypes are"),
        (lambda q, kv: (q, replace(kv, values=kv.values.bfloat16())), "dtypes are"),
        (lambda q, kv: (q.int(), replace(kv, keys=kv.keys.int(), values=kv.values.int())), "floating-point"),
        (lambda q, kv: (q.to("meta"), kv), "devices are"),
        (lambda q, kv: (q, replace(kv, values=kv.values.to("meta"))), "devices are"),
        (lambda q, kv: (q, replace(kv, lengths=kv.lengths.to("meta"))), "devices are"),
        (lambda q, kv: (q, replace(kv, lengths=kv.lengths.long())), "lengths torch.int64"),
        (lambda q, kv: (q, replace(kv, starts=kv.starts.int())), "starts are torch.int32"),
        (lambda q, kv: (q, replace(kv, lengths=torch.tensor([50, 2], dtype=torch.int32))), "holds 2 keys, but 3"),
    ],
)
def test_storage_that_does_not_fit_is_refused(change: Callable, message: str) -> None:
    query, kv, selection = decode_call()
    paged_decode(query, kv, scale=1.0)
    query, kv = change(query, kv)
    for backend in ("auto", "naive", "gather"):
        for pages in (None, selection):
            with pytest.raises(ValueError, match=message):
                paged_decode(query, kv, pages, scale=1.0, backend=backend)


@pytest.mark.parametrize(
    ("pages", "counts", "message"),
    [
        ((2, 3, 2), (2, 3), "do not fit together"),
        ((2, 1, 3, 2), (2, 3), "do not fit together"),
        ((2, 1, 3, 2), (2, 1, 2), "do not fit together"),
        ((2, 2, 3, 2), (2, 2, 3), "do not fit together"),  # lists for 2 of 4 heads
        ((1, 1, 3, 2), (1, 1, 3), "are for 1 sequences"),
        ((2, 4, 1, 2), (2, 4, 1), "and 1 tokens"),
        ((2, 4, 3, 0), (2, 4, 3), "pages listed 0"),
    ],
)
def test_pages_that_do_not_fit_are_refused(pages: tuple[int, ...], counts: tuple[int, ...], message: str) -> None:
    query, kv, _ = decode_call()
    selection = Reads(torch.zeros(pages, dtype=torch.int32), torch.ones(counts, dtype=torch.int32), 16)
    with pytest.raises(ValueError, match=message):
        paged_decode(query, kv, selection, scale=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "flex"}, "backend 'flex' is unknown"),
        ({"window": 5}, "window is 5, with a selection"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"keys_read": torch.zeros(2, 4, 3, dtype=torch.int32)}, "keys_read is"),
        ({"keys_read": torch.zeros(2, 1, 3, dtype=torch.int64)}, "keys_read is"),
        ({"keys_read": torch.zeros(2, 1, 6, dtype=torch.int32)[..., ::2]}, "keys_read is"),
        ({"keys_read": torch.zeros(2, 1, 3, dtype=torch.int32, device="meta")}, "devices are"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    query, kv, selection = decode_call()
    with pytest.raises(ValueError, match=message):
        paged_decode(query, kv, selection, scale=1.0, **options)


def test_other_pages_and_windows_are_refused() -> None:
    query, kv, selection = decode_call()
    for change, message in (
        ({"ids": selection.ids.to("meta"), "counts": selection.counts.to("meta")}, "devices are"),
        ({"ids": selection.ids.long()}, "pages are torch.int64"),
        ({"unit": 0}, "page size is 0"),
        ({"ready": torch.ones(len(query), dtype=torch.int64)}, "ready is"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_decode(query, kv, replace(selection, **change), scale=1.0)
    with pytest.raises(ValueError, match="window is 0"):
        paged_decode(query, kv, scale=1.0, window=0)


def test_triton_refuses_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    query, kv, _ = decode_call()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    triton_unavailable.cache_clear()
    with pytest.raises(ValueError, match="'triton' cannot run here"):
        paged_decode(query, kv, scale=1.0, backend="triton")
    triton_unavailable.cache_clear()
    monkeypatch.undo()
    if MISSING is None:
        wide = [torch.zeros(1, 1, 1, 300), RaggedKV.of(torch.zeros(9, 300), torch.zeros(9, 300), [0], [9])]
        double = [query.double(), replace(kv, keys=kv.keys.double(), values=kv.values.double())]
        for (states, held), message in ((wide, "up to 256 dimensions"), (double, "takes no torch.float64")):
            with pytest.raises(ValueError, match=message):
                paged_decode(states, held, scale=1.0, backend="triton")
