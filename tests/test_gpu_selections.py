"""Selections on a CUDA device: flags are raised without waiting, also in captured graphs, and nonsense faults nothing.

The kinds of nonsense and the oracles are those of selection_cases.py; SELECTIONS_SEED=<seed> repeats a run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from selection_cases import (
    KEPT,
    LAYOUTS,
    PAGES,
    Decode,
    Eviction,
    Prefill,
    bad,
    is_nonsense,
    line_of,
    prompt_of,
    random_layout,
    random_pages,
    rng,  # noqa: F401 - a fixture
    spoiled,
    wrong_lists,
)
from small_lms import generate, score, sparse
from torch import Tensor

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels.cache import compact as compaction
from lm_eval_sparse.kernels.decode import paged_decode
from lm_eval_sparse.kernels.prefill import block_sparse_prefill
from lm_eval_sparse.kernels.types import Blocks, RaggedKV, Reads
from lm_eval_sparse.runtime.selections import DEBUGGED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def on_gpu(layout: Blocks) -> Blocks:
    parts = ("indices", "counts", "columns", "column_counts")
    moved = {name: getattr(layout, name) for name in parts}
    return replace(layout, **{name: None if part is None else part.cuda() for name, part in moved.items()})


def parts_of(layout: Blocks) -> list[Tensor]:
    parts = (layout.indices, layout.counts, layout.columns, layout.column_counts)
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("kind", [None, "shared", "own"])
def test_the_walk(rng: random.Random, kind: str | None) -> None:  # noqa: F811
    """The flags are those of the definition, good layouts keep theirs down, and attention survives all of them."""
    for turn in range(120):
        layout = random_layout(rng, kind, 900 if turn % 10 == 0 else 300)
        if turn % 3:
            spoiled(rng, *parts_of(layout))
        wanted = [is_nonsense(layout, head) for head in range(2)]
        copy = on_gpu(layout)
        query, key, value = (
            torch.randn(heads, layout.length, 64, device="cuda", dtype=torch.bfloat16) for heads in (2, 1, 1)
        )
        copy.walk()  # compiled
        copy = on_gpu(layout)
        with no_waiting():
            walked, pairs, keys, faults = copy.walk()
        assert (faults != 0).tolist() == wanted, layout
        assert torch.equal(layout.faults() != 0, (faults != 0).cpu())
        if not any(wanted):
            assert [found.tolist() for found in (pairs, keys)] == [found.tolist() for found in layout.pairs_and_keys()]
        for backend in ("auto", "triton"):
            block_sparse_prefill(query, key, value, walked, backend=backend)
        torch.cuda.synchronize()


@pytest.mark.parametrize("block", [64, 128])
def test_specialised_kernels_survive_what_was_mended(rng: random.Random, block: int) -> None:  # noqa: F811
    """Counts of 0 or of a million would make a kernel with specialised warps wait for ever."""
    number = 6
    mask = torch.ones(4, number, number, dtype=torch.bool).tril()
    for _ in range(20):
        layout = on_gpu(Blocks.from_mask(mask, number * block - 3, block, block))
        spoiled(rng, layout.indices, layout.counts)
        states = [torch.randn(heads, layout.length, 128, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]
        for backend in ("auto", "triton"):
            block_sparse_prefill(*states, layout.walk()[0], backend=backend)
        torch.cuda.synchronize()


@pytest.mark.parametrize("steps", [1, 3])
def test_lists_of_pages(rng: random.Random, steps: int) -> None:  # noqa: F811
    for turn in range(150):
        kv, selection = random_pages(rng, rng.choice((1, 2)), steps)
        if turn % 3:
            spoiled(rng, selection.ids, selection.counts)
        wrong, bits = wrong_lists(kv, selection), torch.from_numpy(selection.faults(kv))
        dim = 64
        keys, values = (torch.randn(len(kv.keys), dim, device="cuda").bfloat16() for _ in "kv")
        held = RaggedKV(keys, values, kv.starts.cuda(), kv.lengths.cuda(), kv.longest)
        lists = replace(selection, ids=selection.ids.cuda(), counts=selection.counts.cuda())
        query = torch.randn(4, 2, steps, dim, device="cuda").bfloat16()
        read = torch.full(selection.counts.shape, -99, dtype=torch.int32, device="cuda")
        call = {"scale": 0.1, "backend": "triton", "keys_read": read}
        if turn == 0:
            paged_decode(query, held, lists, **call)  # compiled
        with no_waiting():
            out, _ = paged_decode(query, held, lists, **call)
        read = read.cpu()
        assert torch.equal(torch.where(wrong, read, 0), -bits)
        assert torch.equal(read[~wrong], selection.keys_read(kv)[~wrong])
        assert bool(out.isfinite().all())


def test_long_lists_of_pages() -> None:
    """More pages than are looked at together; one is wrong, in any place."""
    length, size = 40_000, 8
    keys, values = (torch.randn(length, 64, device="cuda").bfloat16() for _ in "kv")
    kv = RaggedKV.of(keys, values, [0], [length])
    query = torch.randn(1, 4, 1, 64, device="cuda").bfloat16()
    pages = torch.arange(length // size, device="cuda", dtype=torch.int32).view(1, 1, 1, -1)
    counts = torch.full((1, 1, 1), length // size, dtype=torch.int32, device="cuda")
    for place in (None, 0, 1, 511, 512, 513, 2500, length // size - 1):
        own = pages.clone()
        if place is not None:
            own[..., place] = own[..., place - 1] if place else -1
        read = torch.zeros(1, 1, 1, dtype=torch.int32, device="cuda")
        selection = Reads(own, counts, size)
        paged_decode(query, kv, selection, scale=0.1, backend="triton", keys_read=read)
        assert int(read) == (length if place is None else -8 if place else -2)


def test_kept_tokens(rng: random.Random) -> None:  # noqa: F811
    for turn in range(150):
        heads, length = rng.randrange(1, 9), rng.choice((rng.randrange(1, 40), rng.randrange(2000, 9000)))
        width = rng.choice((length, length + 3, max(1, length // 2)))
        counts = torch.tensor([rng.randrange(1, min(width, length) + 1) for _ in range(heads)])
        indices = torch.tensor(rng.choices((-5, 0, 10**12, 3), k=heads * width)).view(heads, width)
        for head, count in enumerate(counts.tolist()):
            indices[head, :count] = torch.tensor(sorted(rng.sample(range(length), count)))
        total = int(counts.sum())
        if turn % 3:
            spoiled(rng, indices, counts)
        wanted = compaction.check_kept(indices, counts, total, length, backend="naive")
        given = indices.cuda(), counts.cuda()
        if turn == 0:
            compaction.check_kept(*given, total, length)
        with no_waiting():
            ids, number, faults = compaction.check_kept(*given, total, length)
        assert torch.equal(faults.cpu(), wanted[2]) and torch.equal(number.cpu(), wanted[1])
        starts = number.cumsum(0) - number
        keys = torch.randn(heads, length, 16, device="cuda")
        out = [torch.empty(total, 16, device="cuda") for _ in "kv"]
        compaction.compact(keys, keys, ids, number, starts, *out)
        torch.cuda.synchronize()


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.family("llama", head_dim=64).to("cuda", torch.bfloat16)


def lm_of(model: Any, **options: Any) -> Any:
    return sparse(model, device="cuda", **options)


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_nonsensical_layout(rng: random.Random, model: Any, monkeypatch: Any, kind: str, debug: bool) -> None:  # noqa: F811
    spoil, words = LAYOUTS[kind]
    bad(monkeypatch, Prefill, spoil)
    lm = lm_of(model, method="bad_prefill", debug=debug)
    found = line_of(lambda: score(lm, [(prompt_of(rng), " apple")]))
    assert found.startswith("method bad_prefill, layer 1") and words in found


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("kind", KEPT)
def test_nonsensical_kept_tokens(rng: random.Random, model: Any, monkeypatch: Any, kind: str, debug: bool) -> None:  # noqa: F811
    spoil, words = KEPT[kind]
    bad(monkeypatch, Eviction, spoil)
    lm = lm_of(model, method="bad_eviction", debug=debug)
    found = line_of(lambda: generate(lm, [prompt_of(rng)]))
    assert found.startswith("method bad_eviction, layer 1") and words.replace("\\", "") in found


@pytest.mark.parametrize("run", [score, generate])
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("kind", PAGES)
def test_nonsensical_pages(
    rng: random.Random, model: Any, monkeypatch: Any, kind: str, debug: bool, run: Any  # noqa: F811
) -> None:  # fmt: skip
    """Answers of 8 tokens: all steps but the first ones are replayed."""
    if kind == "for ever" and run is score:
        pytest.skip("a list for one token only")
    spoil, words = PAGES[kind]
    prompt = prompt_of(rng)
    bad(monkeypatch, Decode, spoil)
    lm = lm_of(model, method="bad_decode", debug=debug, batch_size=2)
    found = line_of(lambda: run(lm, [(prompt, " river stone")] if run is score else [prompt, prompt + " x"]))
    assert found.startswith("method bad_decode, layer 1") and words in found


def test_nonsense_in_a_captured_step(rng: random.Random, model: Any, monkeypatch: Any) -> None:  # noqa: F811
    """Lists are sense for three steps and nonsense after: what was captured is not what is judged."""
    count = lambda text: len(tiny.tiny_tokenizer()(text).input_ids)  # noqa: E731
    for _ in range(5):  # an answer may end before
        prompt = prompt_of(rng)
        while count(prompt) % 8 != 5:
            prompt = prompt[: prompt.rindex(" ")]
        page = count(prompt) // 8

        def spoil(selection: Any, page: int = page) -> Any:
            new = selection.ids[..., 1:2] > page  # what that is stands on the device
            return replace(selection, ids=torch.where(new, 10**6, selection.ids))

        bad(monkeypatch, Decode, spoil)
        lm = lm_of(model, method="bad_decode")
        try:
            generate(lm, [prompt])
        except UserError as error:
            found = str(error)
            assert found.startswith("method bad_decode, layer 1, KV head 0: the selection holds a page that its token")
            decoder, _ = lm.decoding.get()
            assert decoder.graphs._graphs and decoder.graphs.refused is None
            return
    pytest.fail("all answers ended before their fourth token")


def test_debug_decodes_without_graphs(rng: random.Random, model: Any) -> None:  # noqa: F811
    prompts = [prompt_of(rng) for _ in range(3)]
    plain, debug = (lm_of(model, method="quest", budget=16, page_size=8, debug=value) for value in (False, True))
    texts = generate(plain, prompts)
    assert generate(debug, prompts) == texts
    loops = [lm.report()["phases"]["decode"] for lm in (plain, debug)]
    assert set(loops[0]["loops"]) == {"cuda_graph"} and set(loops[1]["loops"]) == {"eager"}
    assert set(loops[1]["loop_reasons"]) == {DEBUGGED}


@pytest.mark.parametrize("method", ["flexprefill", "vertical_slash", "flexprefill_vs", "block_sparse", "snapkv",
                                    "ada_snapkv", "quest"])  # fmt: skip
def test_all_methods_make_sense(rng: random.Random, model: Any, method: str) -> None:  # noqa: F811
    lm = lm_of(model, method=method, sparsity=0.5, max_length=2000)
    prompts = [tiny.words(rng.randrange(10**6), rng.randrange(100, 400)) for _ in range(3)]
    score(lm, [(prompt, " river stone cloud") for prompt in prompts])
    generate(lm, prompts, max_gen_toks=4)
