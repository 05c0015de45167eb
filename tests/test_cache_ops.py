"""Operators on caches on the CPU: bounds of pages, scores from them, the choice of pages, appending, compaction.

Naive versions stand against definitions in cache_cases.py; the Triton sources run under Triton's interpreter against
the same. Cases are fresh in every run. A failing test shows its seed; CACHE_OPS_SEED=<seed> repeats it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cache_cases import (
    PAGE_SIZES,
    SCORE_KINDS,
    Draw,
    check_append,
    check_budget,
    check_compact,
    check_scores,
    check_select,
    check_step,
    check_update,
    count_up,
    random_case,
)
from prefill_cases import interpreter_missing

from lm_eval_sparse.kernels.cache.append import append
from lm_eval_sparse.kernels.cache.compact import compact
from lm_eval_sparse.kernels.estimate import page_scores, update_bounds
from lm_eval_sparse.kernels.index.pages import PageBudget, budget_pages, choose_pages, select_pages
from lm_eval_sparse.kernels.types import PageBounds, RaggedKV

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered in add:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]

BACKENDS = (
    "naive",
    pytest.param(
        "triton", marks=pytest.mark.skipif(interpreter_missing() is not None, reason=str(interpreter_missing()))
    ),
)
CHOICES = ("naive",) if interpreter_missing() is not None else ("naive", "triton")
#: Of the floating-point dtypes those that the interpreter takes, and that all backends do.
DTYPES = {"naive": (torch.float64, torch.float32, torch.bfloat16), "triton": (torch.float32, torch.float16)}
#: Cases of a test: the interpreter is slow.
CASES = {"naive": 12, "triton": 4}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def draw() -> Draw:
    seed = int(os.environ.get("CACHE_OPS_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"CACHE_OPS_SEED={seed}")
    return Draw(seed)


def cases(draw: Draw, backend: str, page_size: int, **options):
    for _ in range(CASES[backend]):
        case = random_case(draw, draw.rng.choice(DTYPES[backend]), page_size=page_size, **options)
        print(case.kv.keys.dtype, case.lengths, "heads", case.heads, "steps", case.steps)
        yield case


@pytest.mark.parametrize("sizes", [PAGE_SIZES[:2], PAGE_SIZES[2:]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds(draw: Draw, backend: str, sizes: tuple[int, ...]) -> None:
    page_size = draw.rng.choice(sizes)
    for case in cases(draw, backend, page_size, room=3):
        check_update(case, backend)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_append(draw: Draw, backend: str, page_size: int) -> None:
    for case in cases(draw, backend, page_size):
        check_append(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_append_token_by_token(draw: Draw, backend: str) -> None:
    """Over more than two pages, cut back at times: at every moment as if computed from scratch."""
    case = random_case(draw, rows=1, steps=1, page_size=draw.rng.choice((8, 16)), lengths=(1, 15, 16, 63))
    case.set_bounds()
    for _ in range(40):
        before = case.lengths
        if draw.chance(0.2):
            back = torch.tensor([draw.rng.randrange(min(length, 20)) if length else 0 for length in before])
            case.kv.lengths.sub_(back.int())
            before = case.lengths
        new = draw.states(len(before), 1, case.kv.keys.shape[1], case.kv.keys.dtype)
        new_values = draw.states(len(before), 1, case.kv.values.shape[1], case.kv.values.dtype)
        count_up(case.kv, 1)
        append(case.kv, new, new_values, case.bounds, backend=backend)
        scratch = case.to("cpu")
        scratch.set_bounds()
        case.same(scratch)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores(draw: Draw, backend: str, page_size: int) -> None:
    for case in cases(draw, backend, page_size, room=3):
        check_scores(case, backend)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_selection(draw: Draw, backend: str, page_size: int) -> None:
    for case in cases(draw, backend, page_size, room=3, dims=(16,)):
        check_select(case, backend)


@pytest.mark.parametrize("kind", range(SCORE_KINDS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_selection_from_scores_of_all_kinds(draw: Draw, backend: str, kind: int) -> None:
    for keep in (0.3, 0.7):
        case = random_case(draw, rows=3, steps=1, heads=2, page_size=8, room=3, dims=(16,), lengths=(63, 65, 200))
        check_select(case, backend, kind=kind, keep=keep)


@pytest.mark.parametrize("sizes", [PAGE_SIZES[:2], PAGE_SIZES[2:]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step(draw: Draw, backend: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    page_size = draw.rng.choice(sizes)
    for overlap in (True, False):
        for case in cases(draw, backend, page_size, room=3, steps=1):
            if backend == "triton":
                from lm_eval_sparse.kernels.decode import triton as attention
                from lm_eval_sparse.kernels.index.pages import triton as chooser

                # Short sequences take several programs, too.
                monkeypatch.setattr(chooser, "SCORE_BYTES", draw.rng.choice((16, 1 << 14)))
                monkeypatch.setattr(attention, "MIN_SPLIT", draw.rng.choice((16, 128)))
            check_step(case, backend, overlap=overlap)


@pytest.mark.parametrize("heads", [3, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_selection_shares_the_pages_of_evicted_rows(draw: Draw, backend: str, heads: int) -> None:
    """Many rows, so that all kinds of sharing are among them; shares that leave halves of pages to be rounded."""
    for keep in (0.25, 0.5):
        case = random_case(
            draw, rows=20, steps=1, heads=heads, page_size=8, room=3, dims=(16,), lengths=tuple(range(1, 90))
        )
        check_select(case, backend, kind=0, keep=keep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sequences(draw: Draw, backend: str) -> None:
    """More pages than one tile of any kernel."""
    case = random_case(draw, rows=1, steps=1, page_size=8, room=5, lengths=(1, 63, 1000, 2200), dims=(16, 40))
    check_scores(case, backend)
    check_update(case, backend)
    check_select(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compaction(draw: Draw, backend: str) -> None:
    for _ in range(5 * CASES[backend]):
        check_compact(draw, draw.rng.choice(DTYPES[backend]), backend)


def test_budgets(draw: Draw) -> None:
    for _ in range(30):
        check_budget(draw)


def test_a_budget_does_not_depend_on_other_rows_and_tokens(draw: Draw) -> None:
    visible = torch.randint(1, 900, (12, 4), generator=draw.generator)
    logical = torch.randint(900, 1500, (3, 4), generator=draw.generator).repeat_interleave(4, 0)
    budget = PageBudget(16, None, 0.4, 4)
    _, read = budget_pages(visible, logical, budget)
    for row in range(0, 12, 4):
        for t in range(4):
            part = slice(row, row + 4), slice(t, t + 1)
            assert torch.equal(budget_pages(visible[part], logical[part], budget)[1], read[part])


def test_a_head_that_holds_too_little_leaves_its_pages_to_others() -> None:
    """100 tokens at 0.5 in pages of 10: 4 complete pages for each of three heads, as their current ones are full."""
    budget, logical = PageBudget(10, None, 0.5, 3), torch.full((3, 1), 100)
    for visible, expected in (([100, 100, 100], [4, 4, 4]), ([100, 10, 100], [6, 0, 6]), ([20, 95, 100], [1, 6, 5])):
        _, read = budget_pages(torch.tensor(visible)[:, None], logical, budget)
        assert read[:, 0].tolist() == expected


def test_scores_bound_the_products_with_all_keys(draw: Draw) -> None:
    case = random_case(draw, torch.float64, steps=1, room=3)
    case.set_bounds()
    query = draw.normal(len(case.lengths), 3, 1, case.kv.keys.shape[1], dtype=torch.float64)
    pages = -(-max(case.lengths) // case.size)
    scores = page_scores(query, case.bounds, case.kv, shared=False, pages=pages)
    for s, (start, length) in enumerate(zip(case.kv.starts.tolist(), case.lengths, strict=True)):
        complete = max(0, length - 1) // case.size * case.size
        products = query[s] @ case.kv.keys[start : start + complete].T
        assert bool((products <= scores[s][..., torch.arange(complete) // case.size] + 1e-4).all())


def test_parts_of_bounds_are_of_the_same_storage(draw: Draw) -> None:
    keys = draw.normal(30, 16)
    kv = RaggedKV.of(keys, keys, [0, 10, 20], [9, 10, 8])
    bounds = PageBounds.empty([2, 3, 1], keys, 8)
    assert bounds.first.tolist() == [0, 2, 5] and bounds.low.shape == (6, 16)
    bounds.low.fill_(7.0)
    update_bounds(kv.part(slice(1, 3)), bounds.part(slice(1, 3)), torch.zeros(2, dtype=torch.int32))
    assert torch.equal(bounds.low[2], keys[10:18].amin(0)) and torch.equal(bounds.high[5], keys[20:28].amax(0))
    assert bool((bounds.low[[0, 1, 4]] == 7.0).all())


def test_refusals(draw: Draw) -> None:
    keys = draw.normal(40, 16)
    kv = RaggedKV.of(keys, keys.clone(), [0, 20], [10, 12])
    bounds = PageBounds.empty([3, 3], keys, 8)
    new, zeros = draw.normal(2, 1, 16), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="page_size=12.*power of two"):
        PageBounds.empty([3], keys, 12)
    with pytest.raises(ValueError, match="before is"):
        update_bounds(kv, bounds, zeros.long())
    with pytest.raises(ValueError, match="do not fit 1 sequences"):
        update_bounds(kv.part(slice(0, 1)), bounds, zeros[:1])
    with pytest.raises(ValueError, match="bounds are torch.float64"):
        update_bounds(kv, PageBounds(8, bounds.low.double(), bounds.high.double(), bounds.first), zeros)
    with pytest.raises(ValueError, match="expected .S, T, D. and .S, T, D_v."):
        append(kv, new[:1], new)
    with pytest.raises(ValueError, match="dtypes are"):
        append(kv, new.double(), new)
    scores, budget, logical = draw.normal(2, 1, 1, 3), PageBudget(8, 1, None, 2), torch.tensor([12])
    for bad, message in (
        ({"scores": scores.double()}, "scores are"),
        ({"scores": scores[:1]}, "scores are"),
        ({"logical": logical.int()}, "logical is"),
        ({"budget": replace(budget, kv_heads=1)}, "logical is"),
        ({"width": 0}, "width=0"),
    ):
        with pytest.raises(ValueError, match=message):
            select_pages(**{"scores": scores, "kv": kv, "logical": logical, "budget": budget, "width": 2, **bad})
    for bad, message in (
        ({"query": new[:, :, None].double()}, "dtypes are"),
        ({"bounds": bounds.part(slice(0, 1))}, "do not fit 2 sequences"),
        ({"logical": logical.int()}, "logical is"),
        ({"width": 0}, "width=0"),
        ({"new": (new[:1], new)}, "expected .S, T, D. and .S, T, D_v."),
        ({"budget": replace(budget, page_size=2 * budget.page_size)}, "expected one size"),
        ({"kv": replace(kv, tickets=zeros)}, "tickets are"),
    ):
        for backend in CHOICES:
            given = {"query": new[:, :, None], "bounds": bounds, "kv": replace(kv, tickets=zeros.repeat(2, 1))}
            with pytest.raises(ValueError, match=message):
                choose_pages(
                    **{**given, "logical": logical, "budget": budget, "width": 2, "pages": 3, **bad}, backend=backend
                )
    for wrong in ({"pages": 1, "keep": 0.5}, {"pages": None, "keep": None}):
        with pytest.raises(ValueError, match="expected one of them"):
            PageBudget(8, **wrong, kv_heads=1)
    with pytest.raises(ValueError, match="expected a page size"):
        PageBudget(0, 1, None, 1)
    states, table = draw.normal(2, 5, 16), torch.zeros(2, dtype=torch.int64)
    outs = torch.zeros(9, 16), torch.zeros(9, 16)
    for bad, message in (
        ((states, states[:1], table[:, None], table, table, *outs), "values"),
        ((states, states, table[:, None], table[:1], table, *outs), "counts"),
        ((states, states, table[:, None].int(), table, table, *outs), "indices are"),
        ((states, states, table[:, None], table, table, outs[0], outs[1].double()), "out_values"),
    ):
        with pytest.raises(ValueError, match=message):
            compact(*bad)
