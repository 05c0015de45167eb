"""Operators on caches on a CUDA device: against definitions, without waiting, in graphs, whatever else is in a call.

Each combination of what Triton compiles for is one test that makes many random calls, so `pytest -n 8` spreads the
compilation. A failing test shows its seed; GPU_CACHE_OPS_SEED=<seed> repeats it.

Long, since the operators of a step are captured together.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from cache_cases import (
    GROUPS,
    PAGE_SIZES,
    Case,
    Draw,
    assert_same_lists,
    check_append,
    check_budget,
    check_compact,
    check_scores,
    check_select,
    check_step,
    check_update,
    complete_pages,
    count_up,
    random_case,
    with_tickets,
)
from torch import Tensor

from lm_eval_sparse.kernels.cache.append import append
from lm_eval_sparse.kernels.cache.compact import compact
from lm_eval_sparse.kernels.decode import paged_decode
from lm_eval_sparse.kernels.estimate import page_scores, update_bounds
from lm_eval_sparse.kernels.index.pages import MOST_PAGES, PageBudget, choose_pages, select_pages
from lm_eval_sparse.kernels.types import PageBounds, RaggedKV, Reads

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIMS = (64, 80, 96, 128, 192, 256)
#: Calls of each operator for each dtype and page size: 12 * 18 * 5 calls.
CALLS = 18
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 1000, 5000)


@pytest.fixture(autouse=True, scope="module")
def few_threads() -> Iterator[None]:
    """Several of these tests run at a time, see above."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def draw() -> Draw:
    seed = int(os.environ.get("GPU_CACHE_OPS_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"GPU_CACHE_OPS_SEED={seed}")
    return Draw(seed)


@contextmanager
def not_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


COMBINATIONS = list(enumerate(itertools.product(DTYPES, PAGE_SIZES)))


@pytest.mark.parametrize(("place", "kinds"), COMBINATIONS, ids=str)
def test_random_calls(draw: Draw, place: int, kinds: tuple[torch.dtype, int]) -> None:
    dtype, page_size = kinds
    # What is compiled for is fixed for a combination.
    dims, heads, group = DIMS[place % 6 :][:1] or DIMS[:1], (8, 3, 1, 2)[place % 4], GROUPS[place // 3 % 4]
    for _ in range(CALLS):
        case = random_case(draw, dtype, heads=heads, page_size=page_size, dims=dims, lengths=LENGTHS)
        print(case.lengths, "steps", case.steps)
        check_update(case, "triton", DEVICE)
        check_append(case.to("cpu"), "triton", DEVICE)
        check_scores(case, "triton", DEVICE, group)
        check_select(case, "triton", DEVICE, naive=True)
        check_compact(draw, dtype, "triton", DEVICE, longest=2000)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("place", "kinds"), COMBINATIONS, ids=str)
def test_random_steps(draw: Draw, place: int, kinds: tuple[torch.dtype, int], overlap: bool) -> None:
    """Appended, chosen and attended to."""
    dtype, page_size = kinds
    dims, heads, group = DIMS[place % 6 :][:1] or DIMS[:1], (8, 3, 1, 2)[place % 4], GROUPS[place // 3 % 4]
    for _ in range(CALLS):
        options = {"heads": heads, "page_size": page_size, "dims": dims, "lengths": LENGTHS, "steps": 1}
        check_step(random_case(draw, dtype, **options), "triton", DEVICE, group=group, overlap=overlap)


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_steps_that_run_into_each_other(draw: Draw, rows: int) -> None:
    """Long ones, layers after each other over the same tickets, replayed: they give what they give one by one.

    Some rows are idle or short: what they store comes early.
    """
    heads, dim, size, layers, most = 8, 128, 16, 4, 130_000 if rows < 8 else 500_000
    device = torch.Generator(DEVICE).manual_seed(draw.rng.randrange(1 << 31))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=device, device=DEVICE).bfloat16()

    sequences, length = heads * rows, most // rows
    starts = torch.arange(sequences, device=DEVICE) * length
    lengths = torch.full((sequences,), length, dtype=torch.int32, device=DEVICE)
    tickets = torch.zeros(2, sequences, dtype=torch.int32, device=DEVICE)
    pages = -(-length // size)
    caches, bounds = [], []
    for _ in range(layers):
        keys, values = (normal(sequences * length, dim) for _ in "kv")
        caches.append(RaggedKV(keys, values, starts, lengths, length, heads, tickets))
        bounds.append(PageBounds.empty([pages] * sequences, keys, size))
        update_bounds(caches[-1], bounds[-1], torch.zeros_like(lengths))
    logical = torch.full((rows,), length, device=DEVICE)
    query, new = normal(layers, sequences, 4, 1, dim), normal(layers, 2, sequences, 1, dim)
    budget = PageBudget(size, None, 0.05, heads)
    reads = torch.full((layers, sequences, 1, 1), -1, dtype=torch.int32, device=DEVICE)

    def run(overlap: bool) -> list[Tensor]:
        found = []
        for layer, (kv, bound) in enumerate(zip(caches, bounds, strict=True)):
            options = {"width": pages, "pages": pages // 16 * 16 + 16, "new": tuple(new[layer]), "overlap": overlap}
            lists = choose_pages(query[layer], bound, kv, logical, budget, **options)
            # Nothing is launched between the two, and nothing that attention allocates may lie where choosing works.
            out = paged_decode(query[layer], kv, lists, scale=0.3, keys_read=reads[layer])[0]
            assert (lists.ready is not None) == overlap
            found += [out, lists.ids, lists.counts, reads[layer].clone()]
        return found

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(True)
    for _ in range(60):
        long = [draw.rng.randrange(length // 2, length + 1) for _ in range(rows)]
        held = torch.tensor(
            [n if not row or draw.chance(0.7) else draw.rng.choice((0, 1, 300)) for row, n in enumerate(long)]
        )
        held = held.to(DEVICE)
        logical.copy_(held)
        lengths.copy_(held.repeat_interleave(heads))
        query.copy_(normal(*query.shape) * 3)
        new.copy_(normal(*new.shape))
        graph.replay()
        for eager in (run(True), run(False)):
            for number, (mine, theirs) in enumerate(zip(replayed, eager, strict=True)):
                if number % 4 == 1:  # lists
                    valid = torch.arange(pages, device=DEVICE) < eager[number + 1][..., None]
                    mine, theirs = mine[valid], theirs[valid]
                assert torch.equal(mine, theirs), number
    assert not bool(tickets[0].any())


def test_naive_versions(draw: Draw) -> None:
    for _ in range(20):
        case = random_case(draw, draw.rng.choice(DTYPES))
        check_update(case, "naive", DEVICE)
        check_append(case.to("cpu"), "naive", DEVICE)
        check_scores(case, "naive", DEVICE)
        check_select(case, "naive", DEVICE)
        check_compact(draw, torch.bfloat16, "naive", DEVICE)
        check_budget(draw, DEVICE)


def test_budgets_of_many_rows(draw: Draw) -> None:
    """The kernel rounds shares of long rows as torch does."""
    heads, rows, size = 8, 400, 16
    for sparsity in (0.5, 0.75, 0.9, 0.95, 1 / 3, draw.rng.random()):
        top = torch.randint(1, 16000, (rows, 1), generator=draw.generator)
        lengths = (torch.rand(rows, heads, generator=draw.generator) * top).int().clamp(min=1).flatten()
        logical = top[:, 0] + torch.randint(0, 100000, (rows,), generator=draw.generator)
        keys = torch.zeros(16001, 16)
        kv = RaggedKV(keys, keys, torch.zeros(len(lengths), dtype=torch.int64), lengths, 16000)
        scores = draw.normal(len(lengths), 1, 1, 1000)
        budget = PageBudget(size, None, 1 - sparsity, heads)
        expected = select_pages(scores, kv, logical, budget, width=1001, backend="naive")
        on = RaggedKV(keys.to(DEVICE), keys.to(DEVICE), kv.starts.to(DEVICE), lengths.to(DEVICE), 16000)
        found = select_pages(scores.to(DEVICE), on, logical.to(DEVICE), budget, width=1001)
        assert_same_lists(found, expected)


@pytest.mark.parametrize("pages", [2048, 8192, 16384, MOST_PAGES, MOST_PAGES + 1])
def test_many_pages(draw: Draw, pages: int) -> None:
    """Up to more than a program holds, where the naive version takes over and does not wait either."""
    length = pages * 8 + 3
    keys = torch.zeros(length, 16, device=DEVICE)
    kv = RaggedKV.of(keys, keys, [0, 0], [length, length // 2])
    logical = torch.tensor([length, length], device=DEVICE)
    for kind in range(4):
        scores = draw.normal(2, 2, 1, pages)
        if kind == 1:
            scores = scores.round()
        elif kind == 2:
            scores[:] = float("nan")
        elif kind == 3:
            scores[..., :: draw.rng.randrange(2, 9)] *= 1e30
        for budget in (PageBudget(8, 128, None, 1), PageBudget(8, None, 0.05, 1), PageBudget(8, None, 0.9, 1)):
            on = scores.to(DEVICE)
            select_pages(on, kv, logical, budget, width=pages + 1)
            with not_waiting():
                found = select_pages(on, kv, logical, budget, width=pages + 1)
            cpu = RaggedKV(keys.cpu(), keys.cpu(), kv.starts.cpu(), kv.lengths.cpu(), kv.longest)
            assert_same_lists(found, select_pages(scores, cpu, logical.cpu(), budget, width=pages + 1))


def test_a_long_prompt(draw: Draw) -> None:
    """128K tokens of 8 heads: every program of a large grid."""
    heads, length, dim, size = 8, 131072 + 5, 128, 16
    keys = torch.randn(heads * length, dim, device=DEVICE).bfloat16()
    kv = RaggedKV.of(keys, keys, [head * length for head in range(heads)], [length] * heads)
    bounds = PageBounds.empty([-(-length // size)] * heads, keys, size)
    update_bounds(kv, bounds, torch.zeros(heads, dtype=torch.int32, device=DEVICE))
    paged = keys.view(heads, length, dim)[:, : length // size * size].unflatten(1, (-1, size))
    low, high = (bound.view(heads, -1, dim) for bound in (bounds.low, bounds.high))
    assert torch.equal(low[:, :-1], paged.amin(2)) and torch.equal(high[:, :-1], paged.amax(2))
    tail = keys.view(heads, length, dim)[:, length // size * size :]
    assert torch.equal(low[:, -1], tail.amin(1)) and torch.equal(high[:, -1], tail.amax(1))
    query = torch.randn(heads, 4, 1, dim, device=DEVICE).bfloat16()
    for shared in (True, False):
        scores = page_scores(query, bounds, kv, shared=shared, pages=length // size)
        expected = torch.maximum(query.float() * low[:, None].float(), query.float() * high[:, None].float()).sum(-1)
        expected = expected.sum(1, keepdim=True) if shared else expected
        torch.testing.assert_close(scores[:, :, 0], expected[..., : length // size], rtol=1e-5, atol=1e-3)


def test_storages_of_more_than_two_to_the_31_elements(draw: Draw) -> None:
    dim, size = 128, 16
    keys, values = (torch.empty((1 << 31) // dim + 1000, dim, dtype=torch.float16, device=DEVICE) for _ in range(2))
    start = len(keys) - 500
    keys[start : start + 100] = torch.randn(100, dim, device=DEVICE).half()
    kv = RaggedKV.of(keys, values, [start], [100])
    bounds = PageBounds(size, torch.empty_like(keys), torch.empty_like(keys), torch.tensor([start], device=DEVICE))
    update_bounds(kv, bounds, torch.zeros(1, dtype=torch.int32, device=DEVICE))
    new = torch.randn(1, 1, dim, device=DEVICE).half()
    count_up(kv, 1)
    append(kv, new, new + 1, bounds)
    assert torch.equal(keys[start + 100], new[0, 0]) and torch.equal(values[start + 100], new[0, 0] + 1)
    held = keys[start : start + 96].unflatten(0, (6, size))
    assert torch.equal(bounds.low[start : start + 6], held.amin(1))
    assert torch.equal(bounds.high[start + 6], keys[start + 96 : start + 101].amax(0))
    query = torch.randn(1, 1, 1, dim, device=DEVICE).half()
    scores = page_scores(query, bounds, kv, shared=True, pages=6)[0, 0, 0]
    expected = torch.maximum(query[0, 0] * held.amin(1).float(), query[0, 0] * held.amax(1).float()).sum(-1)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-3)
    ids, one = torch.tensor([[start + 100]], device=DEVICE), torch.tensor([1], device=DEVICE)
    compact(keys[None], values[None], ids, one, torch.tensor([start + 300], device=DEVICE), keys, values)
    assert torch.equal(keys[start + 300], new[0, 0]) and torch.equal(values[start + 300], new[0, 0] + 1)


def decode_step(case: Case, states: tuple[Tensor, ...], logical: Tensor, budget: PageBudget, pages: int) -> Callable:
    """Append, score and select; what a captured decode step does with these operators."""
    keys, values, query = states

    def step():
        count_up(case.kv, keys.shape[1])
        append(case.kv, keys, values, case.bounds)
        logical.add_(keys.shape[1])
        scores = page_scores(query, case.bounds, case.kv, shared=True, pages=pages)
        return select_pages(scores, case.kv, logical, budget, width=pages + 1)

    return step


@pytest.mark.parametrize("keep", [None, 0.3])
@pytest.mark.parametrize("steps", [1, 2])
def test_graphs_read_what_is_true_when_they_are_replayed(draw: Draw, steps: int, keep: float | None) -> None:
    case = random_case(draw, torch.bfloat16, rows=4, heads=2, steps=steps, page_size=16, dims=(128,), lengths=LENGTHS)
    case.set_bounds()
    most = 6000
    budget = PageBudget(16, 5 if keep is None else None, keep, 2)

    def states() -> list[Tensor]:
        return [draw.normal(8, steps, 128, dtype=torch.bfloat16), draw.normal(8, steps, 128, dtype=torch.bfloat16)] + [
            draw.normal(8, 4, steps, 128, dtype=torch.bfloat16)
        ]

    def logical(case: Case) -> Tensor:
        return torch.tensor([max(case.lengths[row : row + 2]) for row in range(0, 8, 2)], device=DEVICE)

    on = case.to(DEVICE)
    on.kv = RaggedKV(on.kv.keys, on.kv.values, on.kv.starts, on.kv.lengths, most)
    held, tokens = [state.to(DEVICE) for state in states()], logical(case)
    step = decode_step(on, tuple(held), tokens, budget, -(-most // 16))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        with not_waiting():
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        selection = step()
    whole = case.lengths
    for turn in range(6):
        # Sequences are cut back, leave and come back.
        lengths = [draw.rng.choice((length, max(steps, length // 3))) if length else 0 for length in whole]
        if turn % 2:
            row = draw.rng.randrange(4) * 2
            lengths[row : row + 2] = [0, 0]
        for some in (case, on):
            some.kv.lengths.copy_(torch.tensor(lengths))
            some.kv.keys.copy_(case.kv.keys)
            some.kv.values.copy_(case.kv.values)
        case.set_bounds()
        for bound in ("low", "high"):
            getattr(on.bounds, bound).copy_(getattr(case.bounds, bound))
        eager = case.to(DEVICE)
        fresh = states()
        for state, new in zip(held, fresh, strict=True):
            state.copy_(new)
        tokens.copy_(logical(case))
        graph.replay()
        expected = decode_step(eager, tuple(s.to(DEVICE) for s in fresh), logical(case), budget, -(-most // 16))()
        on.same(eager)
        assert_same_lists(selection, expected)


def test_nothing_waits(draw: Draw) -> None:
    case = random_case(draw, torch.bfloat16, rows=2, heads=2, steps=3, page_size=16, dims=(128,)).to(DEVICE)
    pages = -(-case.kv.longest // 16) + 10
    before = torch.zeros_like(case.kv.lengths)
    states = draw.normal(4, 3, 128, dtype=torch.bfloat16).to(DEVICE)
    query = draw.normal(4, 4, 3, 128, dtype=torch.bfloat16).to(DEVICE)
    logical = torch.tensor([500, 600], device=DEVICE)
    source = draw.normal(4, 50, 128, dtype=torch.bfloat16).to(DEVICE)
    indices = torch.arange(20, device=DEVICE).expand(4, -1).contiguous()
    counts, starts = torch.full((4,), 20, device=DEVICE), torch.arange(4, device=DEVICE) * 20
    outs = torch.empty(80, 128, dtype=torch.bfloat16, device=DEVICE), torch.empty(80, 128, device=DEVICE).bfloat16()

    def everything() -> None:
        update_bounds(case.kv, case.bounds, before)
        append(case.kv, states, states, case.bounds)
        append(case.kv, states[:, :1], states[:, :1])
        for shared in (True, False):
            scores = page_scores(query, case.bounds, case.kv, shared=shared, pages=pages)
            for budget in (PageBudget(16, 2, None, 2), PageBudget(16, None, 0.25, 2)):
                select_pages(scores, case.kv, logical, budget, width=pages + 1)
        compact(source, source, indices, counts, starts, *outs)

    everything()
    with not_waiting():
        everything()


@pytest.mark.parametrize("shared", [True, False])
def test_a_row_does_not_depend_on_others(draw: Draw, shared: bool) -> None:
    """To the bit, alone or in a batch, in a larger storage, with other bounds on lengths."""
    for _ in range(6):
        case = random_case(draw, torch.bfloat16, rows=5, heads=2, page_size=16, dims=(128,), lengths=LENGTHS)
        case.set_bounds()
        on, steps = case.to(DEVICE), case.steps
        query = draw.normal(10, 4, steps, 128, dtype=torch.bfloat16).to(DEVICE)
        logical = torch.tensor([max(case.lengths[row : row + 2]) for row in range(0, 10, 2)], device=DEVICE)
        budget = PageBudget(16, None, 0.3, 2)
        most = -(-max(case.lengths) // 16)
        scores = page_scores(query, on.bounds, on.kv, shared=shared, pages=most)
        together = select_pages(scores, on.kv, logical, budget, width=most + 1)
        for row in range(5):
            part, pages = slice(2 * row, 2 * row + 2), most + draw.rng.choice((0, 7, 500))
            kv = on.kv.part(part)
            kv = RaggedKV(kv.keys, kv.values, kv.starts, kv.lengths, pages * 16)
            alone = page_scores(query[part], on.bounds.part(part), kv, shared=shared, pages=pages)
            for s in range(2):
                for t in range(steps):
                    complete = complete_pages(case, 2 * row + s, t)
                    assert torch.equal(alone[s, :, t, :complete], scores[2 * row + s, :, t, :complete])
            found = select_pages(alone, kv, logical[row : row + 1], budget, width=pages + 1)
            counts = together.counts[part]
            assert torch.equal(found.counts, counts)
            valid = torch.arange(most + 1, device=DEVICE) < counts[..., None]
            assert torch.equal(found.ids[..., : most + 1][valid], together.ids[part][valid])


@pytest.mark.parametrize("keep", [None, 0.05, 0.4])
def test_a_choice_does_not_depend_on_others(draw: Draw, keep: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on how large the programs are that score pages, which follows from their number."""
    from lm_eval_sparse.kernels.index.pages import triton as kernel

    heads, rows, size = 8, 4, 16
    lengths = [draw.rng.choice((1, 16, 17, 5000, draw.rng.randrange(1, 131072))) for _ in range(rows)]
    held = [length for length in lengths for _ in range(heads)]
    keys = torch.randn(sum(held), 128, device=DEVICE).bfloat16()
    kv = RaggedKV.of(keys, keys, torch.tensor([0, *held[:-1]]).cumsum(0).tolist(), held, heads)
    bounds = PageBounds.empty([-(-length // size) for length in held], keys, size)
    update_bounds(kv, bounds, torch.zeros_like(kv.lengths))
    query = torch.randn(heads * rows, 4, 1, 128, device=DEVICE).bfloat16()
    logical = torch.tensor(lengths, device=DEVICE)
    budget = PageBudget(size, 64 if keep is None else None, keep, heads)
    tickets = torch.zeros(2, heads * rows, dtype=torch.int32, device=DEVICE)

    def choose(first: int, last: int, longest: int) -> Reads:
        pages, part = longest // size // 16 * 16 + 16, slice(first * heads, last * heads)
        some = RaggedKV(keys, keys, kv.starts[part], kv.lengths[part], longest, heads, tickets[:, part])
        options = {"width": pages + 1, "pages": pages}
        return choose_pages(query[part], bounds.part(part), some, logical[first:last], budget, **options)

    for most in (0, 10**9):
        monkeypatch.setattr(kernel, "MANY_PROGRAMS", most)
        together = choose(0, rows, 131071)
        for row, length in enumerate(lengths):
            monkeypatch.setattr(kernel, "MANY_PROGRAMS", draw.rng.choice((0, 10**9)))
            alone = choose(row, row + 1, min(length + draw.rng.choice((0, 3000)), 131071))
            part = slice(row * heads, (row + 1) * heads)
            assert torch.equal(alone.counts, together.counts[part])
            width = alone.ids.shape[-1]
            valid = torch.arange(width, device=DEVICE) < alone.counts[..., None]
            assert torch.equal(alone.ids[valid], together.ids[part][..., :width][valid])


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_to_choose_round_alike(draw: Draw, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages whose scores differ by nothing but rounding: which of them are chosen shows each bit of the scores."""
    from lm_eval_sparse.kernels.index.pages import triton as kernel

    heads, dim, size, pages = 4, 128, 16, 3000
    base = torch.randn(dim, device=DEVICE)
    keys = torch.stack([base[torch.randperm(dim, device=DEVICE)] for _ in range(heads * pages)]).to(dtype)
    keys = keys.repeat_interleave(size, 0)
    kv = RaggedKV.of(keys, keys, [head * pages * size for head in range(heads)], [pages * size] * heads, heads)
    bounds = PageBounds.empty([pages] * heads, keys, size)
    update_bounds(kv, bounds, torch.zeros_like(kv.lengths))
    query = torch.randn(heads, 4, 1, 1, device=DEVICE).to(dtype).expand(-1, -1, -1, dim).contiguous()
    logical = torch.tensor([pages * size], device=DEVICE)
    kv = with_tickets(kv)
    found = []
    for most in (1 << 13, 0):
        monkeypatch.setattr(kernel, "MOST_TOGETHER", most)
        for budget in (PageBudget(size, None, 0.3, heads), PageBudget(size, 500, None, heads)):
            found.append(choose_pages(query, bounds, kv, logical, budget, width=pages, pages=pages))
    for together, apart in zip(found[:2], found[2:], strict=True):
        assert torch.equal(together.counts, apart.counts)
        valid = torch.arange(pages, device=DEVICE) < apart.counts[..., None]
        assert torch.equal(together.ids[valid], apart.ids[valid])
