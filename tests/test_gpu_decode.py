"""Decode attention on a CUDA device: against fp64, to the bit, without waiting, and replayed in CUDA graphs.

Each combination of what Triton compiles for is one test that makes many random calls, so `pytest -n 8` spreads the
compilation. The combinations are the same in every run, the calls are not: a failing test shows its seed, and
GPU_DECODE_SEED=<seed> repeats it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from decode_cases import Case, Draw, every_page, one_of, random_case
from torch import Tensor

from lm_eval_sparse.kernels.decode import paged_decode
from lm_eval_sparse.kernels.types import RaggedKV

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
PAGE_SIZES = (8, 16, 32, 64)
#: Calls of each combination; with COMBINATIONS more than 1,200.
CALLS = 20
COMBINATIONS = 64


@pytest.fixture
def draw() -> Draw:
    seed = int(os.environ.get("GPU_DECODE_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"GPU_DECODE_SEED={seed}")
    return Draw(seed, DEVICE)


def deck(source: random.Random, values) -> Iterator:
    """The values over and over, each time shuffled, so that all come about equally often."""
    while True:
        yield from source.sample(list(values), len(values))


@dataclass(frozen=True)
class Combination:
    """What Triton compiles for, and the number of query heads of a KV head."""

    dim: int
    value_dim: int
    dtype: torch.dtype
    page_size: int | None
    own: bool
    softcap: float | None
    several: bool
    group: int

    def __str__(self) -> str:
        words = [f"{self.dim}x{self.value_dim}", str(self.dtype).removeprefix("torch."), f"group{self.group}"]
        words += ["dense"] if self.page_size is None else [f"page{self.page_size}", "own" if self.own else "shared"]
        words += ["several"] if self.several else []
        return "-".join(words + ([f"cap{self.softcap}"] if self.softcap is not None else []))

    def case(self, draw: Draw, lengths: list[int] | None = None) -> Case:
        steps = draw.rng.choice((2, 3, 17)) if self.several else 1
        if lengths is None:
            choices = (0, 1, 63, 64, 65, 127, 128, 129, 1000, 4097, draw.rng.randrange(1, 9000))
            lengths = [draw.rng.choice(choices) for _ in range(draw.rng.randrange(1, 7))]
        lengths = [max(length, steps) if length else 0 for length in lengths]
        window = draw.rng.choice((None, None, 1, 100, 1024)) if self.page_size is None else None
        return random_case(
            draw,
            lengths,
            self.group,
            steps,
            self.dim,
            self.value_dim,
            self.dtype,
            page_size=self.page_size,
            own=self.own,
            softcap=self.softcap,
            window=window,
        )


def combinations() -> list[Combination]:
    source = random.Random(11)
    dims, dtypes = deck(source, (64, 80, 96, 128, 128, 192, 256)), deck(source, (*DTYPES, *HALF))
    pages, owns = deck(source, (None, None, *PAGE_SIZES)), deck(source, (False, True))
    caps, several = deck(source, (None, None, 20.0)), deck(source, (False, False, True))
    groups, differ = deck(source, (1, 3, 4, 7, 8, 16, 20)), deck(source, (False, False, True))
    made = []
    for _ in range(COMBINATIONS):
        dim, page = next(dims), next(pages)
        value_dim = source.choice((64, 40, 128)) if next(differ) else dim
        made.append(
            Combination(
                dim,
                value_dim,
                next(dtypes),
                page,
                page is not None and next(owns),
                next(caps),
                next(several),
                next(groups),
            )
        )
    return made


@pytest.mark.parametrize("combination", combinations(), ids=str)
def test_the_definition(draw: Draw, combination: Combination) -> None:
    for _ in range(CALLS):
        combination.case(draw).check("triton")


MAIN = [
    Combination(128, 128, torch.bfloat16, page, own, None, False, 4)
    for page, own in ((None, False), (16, False), (16, True))
]
OTHERS = [
    Combination(64, 64, torch.float16, 64, False, 20.0, False, 3),
    Combination(96, 96, torch.float32, None, False, None, False, 7),
    Combination(128, 128, torch.bfloat16, None, False, None, True, 4),
    Combination(128, 128, torch.bfloat16, 16, False, None, True, 4),
]


@pytest.mark.parametrize("combination", MAIN, ids=str)
def test_long_sequences(draw: Draw, combination: Combination) -> None:
    combination.case(draw, [131072, 100_001, 0, 8193]).check("triton")


@pytest.mark.parametrize("combination", [*MAIN, *OTHERS], ids=str)
def test_a_sequence_alone_is_as_among_others(draw: Draw, combination: Combination) -> None:
    """Neither the other sequences, nor the storage, nor the longest length that there may be, change a bit."""
    for lengths in ([8193, 0, 8192, 63, 40_000], [300] * 9, None):
        case = combination.case(draw, lengths)
        together = case.run("triton")
        assert torch.equal(together, case.run("triton"))
        longer = replace(case, kv=replace(case.kv, longest=case.kv.longest + 100_000))
        assert torch.equal(together, longer.run("triton"))
        for place in range(len(together)):
            assert torch.equal(together[place], one_of(case, place).run("triton")[0])


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_all_pages_are_no_selection(draw: Draw, page_size: int, group: int) -> None:
    for dim, dtype in ((128, torch.bfloat16), (64, torch.float16), (80, torch.bfloat16), (64, torch.float32)):
        dense = Combination(dim, dim, dtype, None, False, draw.rng.choice((None, 20.0)), False, group)
        case = replace(dense.case(draw, [draw.rng.randrange(1, 20_000), 63, 4096, 0, 8193]), window=None)
        case = unpoisoned(case)
        out = case.run("triton")
        for lists in {1, group}:
            selection = every_page(case.kv, lists, 1, page_size)
            assert torch.equal(replace(case, selection=selection).run("triton"), out)


def unpoisoned(case: Case) -> Case:
    """All keys can be read: what a window has hidden is no NaN."""
    keys, values = (torch.where(held.isnan(), 1.0, held).to(held.dtype) for held in (case.kv.keys, case.kv.values))
    return replace(case, kv=replace(case.kv, keys=keys, values=values))


@pytest.mark.parametrize("combination", [*MAIN, *OTHERS], ids=str)
def test_nothing_waits_for_the_device(draw: Draw, combination: Combination) -> None:
    case = combination.case(draw, [1000, 0, 63])
    read = torch.zeros(3, case.seen[0].shape[0], case.query.shape[2], dtype=torch.int32, device=DEVICE)
    case.run("triton", read)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run("triton", read)
        if case.selection is not None:
            case.selection.keys_read(case.kv)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("window", [None, 700])
def test_replays_see_new_lengths(draw: Draw, window: int | None, paged: bool) -> None:
    """A captured call, replayed with other queries, lengths, places and lists, gives what an eager one gives."""
    if paged and window is not None:
        pytest.skip("a selection takes no window")
    sequences, room, group, dim = 6, 9000, 4, 128
    keys, values = (draw.normal(sequences * room, dim).bfloat16() for _ in "kv")
    starts = torch.arange(sequences, device=DEVICE) * room
    lengths = torch.ones(sequences, dtype=torch.int32, device=DEVICE)
    kv = RaggedKV(keys, values, starts, lengths, room)
    query = draw.normal(sequences, group, 1, dim).bfloat16()
    selection = every_page(replace(kv, lengths=torch.full_like(lengths, room)), 1, 1, 16) if paged else None
    if selection is not None:
        selection.counts.fill_(1)
    read = torch.zeros(sequences, 1, 1, dtype=torch.int32, device=DEVICE)

    def call(count: Tensor) -> Tensor:
        out, used = paged_decode(query, kv, selection, scale=0.1, window=window, keys_read=count)
        assert used == "triton"
        return out

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(read)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(read)
    for _ in range(10):
        held = [draw.rng.choice((0, 1, 63, 8192, 8193, draw.rng.randrange(1, room + 1))) for _ in range(sequences)]
        lengths.copy_(torch.tensor(held, dtype=torch.int32))
        starts.copy_(torch.tensor(draw.rng.sample(range(sequences), sequences)) * room)
        query.copy_(draw.normal(*query.shape))
        if selection is not None:
            for s, length in enumerate(held):
                pages = -(-length // 16)
                listed = sorted(draw.rng.sample(range(pages), draw.rng.randrange(1, pages + 1))) if length else []
                selection.counts[s] = len(listed)
                selection.ids[s].fill_(2**31 - 1)
                selection.ids[s, 0, 0, : len(listed)] = torch.tensor(listed, dtype=torch.int32)
        graph.replay()
        counted = torch.full_like(read, -1)
        assert torch.equal(out, call(counted)) and torch.equal(read, counted)
        free = lengths == 0
        assert not bool(out[free].any()) and bool(out[~free].flatten(1).any(1).all())


def test_fp64_falls_back_and_says_so(draw: Draw) -> None:
    case = random_case(draw, [100, 0, 7], 3, 1, 64, 64, torch.float64, page_size=16)
    out, used = paged_decode(case.query, case.kv, case.selection, scale=case.scale)
    assert used == "gather"
    case.close(out)
    with pytest.raises(ValueError, match="takes no torch.float64"):
        paged_decode(case.query, case.kv, case.selection, scale=case.scale, backend="triton")


@pytest.mark.parametrize("backend", ["naive", "gather"])
def test_torch_backends_on_the_device(draw: Draw, backend: str) -> None:
    for combination in MAIN:
        case = combination.case(draw, [1000, 0, 63])
        (unpoisoned(case) if backend == "naive" else case).check(backend)
