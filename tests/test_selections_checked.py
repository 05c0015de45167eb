"""What methods select is checked: nonsense of any kind ends in one line that names method, layer and head.

What is nonsense is decided here anew, by loops over sets of keys. Lists and prompts are drawn anew in every run: a
failing test shows its seed, and SELECTIONS_SEED=<seed> repeats it.
"""

# ruff: noqa: F811 - fixtures of a helper module are arguments of tests

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from prefill_cases import interpreter_missing
from selection_cases import (
    KEPT,
    KV_HEADS,
    LAYERS,
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
    rng,  # noqa: F401 (fixtures)
    spoiled,
    wrong_lists,
)
from small_lms import generate, score, sparse
from torch import Tensor

from lm_eval_sparse.kernels.cache import compact as compaction
from lm_eval_sparse.kernels.decode import paged_decode
from lm_eval_sparse.kernels.types import Blocks, Cost, Keep, Reads
from lm_eval_sparse.methods import METHODS, Call, DecodeMethod
from lm_eval_sparse.methods.plan import Assignment, Plan, parse
from lm_eval_sparse.runtime import selections, steps
from lm_eval_sparse.runtime.accounting import RowCounts
from lm_eval_sparse.runtime.selections import COVERS, DEBUGGED

interpreted = pytest.mark.skipif(interpreter_missing() is not None, reason=str(interpreter_missing()))
BACKENDS = ("naive", "gather", pytest.param("triton", marks=interpreted))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.family("llama")


# --- lists: what the checks find is what is wrong -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "shared", "own"])
def test_faults_of_a_layout_are_what_is_wrong_with_it(rng: random.Random, kind: str | None) -> None:
    broken = 0
    for _ in range(150):
        layout = random_layout(rng, kind)
        layout.check(2)
        assert not layout.faults().any()
        parts = [part for part in (layout.indices, layout.counts, layout.columns, layout.column_counts)
                 if part is not None]  # fmt: skip
        spoiled(rng, *parts)
        wanted = [is_nonsense(layout, head) for head in range(2)]
        assert (layout.faults() != 0).tolist() == wanted, layout
        broken += any(wanted)
        if any(wanted):
            with pytest.raises(ValueError, match="^layout "):
                layout.check(2)
    assert 30 < broken < 150


@interpreted
@pytest.mark.parametrize("kind", [None, "shared", "own"])
def test_the_walk_raises_the_same_flags_and_mends(rng: random.Random, kind: str | None) -> None:
    for _ in range(3):
        layout = random_layout(rng, kind, 50)
        lists = layout.pairs_and_keys()
        walked, *counted, faults = layout.walk()
        assert not faults.any() and all(map(torch.equal, counted, lists))
        assert torch.equal(walked.indices, layout.indices) and torch.equal(walked.counts, layout.counts)
        parts = [part for part in (layout.indices, layout.counts, layout.columns, layout.column_counts)
                 if part is not None]  # fmt: skip
        spoiled(rng, *parts)
        wanted = layout.faults()
        walked, *_, faults = layout.walk()
        assert torch.equal(faults != 0, wanted != 0), (faults, wanted, layout)
        # What is walked can be read, whatever it was.
        assert bool(((walked.counts >= 1) & (walked.counts <= walked.indices.shape[-1])).all())
        listed_ids = walked.indices[walked.valid()]
        assert bool(((listed_ids >= 0) & (listed_ids < walked.blocks_k)).all())
        if walked.columns is not None:
            number = walked.column_counts
            assert bool(((number >= 0) & (number <= walked.columns.shape[-1])).all())
            valid = torch.arange(walked.columns.shape[-1]) < number[..., None]
            columns = walked.columns.expand(-1, walked.blocks_q, -1)[valid]
            assert bool(((columns >= 0) & (columns < walked.length)).all())


@pytest.mark.parametrize(
    ("change", "bit"),
    [
        (lambda layout: layout.counts[1].fill_(0), 0),
        (lambda layout: layout.indices[1, 2].fill_(9), 1),
        (lambda layout: layout.indices[1, 1, :1].fill_(3), 2),
        (lambda layout: layout.indices[1, 3].fill_(1), 3),
        (lambda layout: layout.column_counts[1].fill_(-1), 5),
        (lambda layout: layout.columns[1, 2].fill_(96), 6),
        (lambda layout: layout.columns[1, 3].fill_(5), 7),
        (lambda layout: layout.columns[1, 3].copy_(torch.tensor([5, 32])), 8),
    ],
)
def test_each_fault_has_its_word(change: Callable[[Blocks], Any], bit: int) -> None:
    """Two heads, 100 tokens in blocks of 32; block i reads blocks i - 1 and i, and two columns from the third on."""
    indices = torch.tensor([[0, 0], [0, 1], [1, 2], [1, 3]], dtype=torch.int32).repeat(2, 1, 1)
    counts = torch.tensor([1, 2, 2, 2], dtype=torch.int32).repeat(2, 1)
    columns = torch.tensor([[0, 0], [0, 0], [3, 30], [3, 30]], dtype=torch.int32).repeat(2, 1, 1)
    layout = Blocks(indices, counts, 100, 32, 32, columns, torch.tensor([0, 0, 2, 2]).int().repeat(2, 1))
    layout.check(2)
    change(layout)
    faults = layout.faults().tolist()
    assert not faults[0] and faults[1] & -faults[1] == 1 << bit
    with pytest.raises(ValueError, match=re.escape(layout.words(1 << bit))):
        layout.check(2)
    if interpreter_missing() is None:
        assert layout.walk()[3].tolist()[1] & (1 << bit)


@pytest.mark.parametrize("steps", [1, 3])
def test_faults_of_lists_of_pages(rng: random.Random, steps: int) -> None:
    for turn in range(60):
        kv, selection = random_pages(rng, rng.choice((1, 2)), steps)
        selection.check(kv)
        spoiled(rng, selection.ids, selection.counts)
        wrong = wrong_lists(kv, selection)
        found = torch.from_numpy(selection.faults(kv))
        assert torch.equal(found != 0, wrong)
        if turn < 2 and interpreter_missing() is None:
            query = torch.randn(4, 2, steps, 16)
            read = torch.full(selection.counts.shape, -99, dtype=torch.int32)
            out, _ = paged_decode(query, kv, selection, scale=0.25, backend="triton", keys_read=read)
            assert torch.equal(torch.where(wrong, read, 0), -found)
            assert bool((read >= 0)[~wrong].all()) and bool(out.isfinite().all())


def test_faults_of_kept_tokens(rng: random.Random) -> None:
    backends = ("naive",) if interpreter_missing() is not None else ("naive", "triton")
    for turn in range(40):
        heads, length = rng.randrange(1, 5), rng.randrange(1, 40)
        width = rng.choice((length, length + 3, max(1, length // 2)))
        counts = torch.tensor([rng.randrange(1, min(width, length) + 1) for _ in range(heads)])
        indices = torch.tensor(rng.choices((-5, 0, 10**12, 3), k=heads * width)).view(heads, width)
        for head, count in enumerate(counts.tolist()):
            indices[head, :count] = torch.tensor(sorted(rng.sample(range(length), count)))
        total = int(counts.sum())
        Keep(indices, counts, total).check(heads, length)
        spoiled(rng, indices, counts)
        most = min(width, length)
        wrong = []
        for ids, count in zip(indices.tolist(), counts.tolist(), strict=True):
            ids = ids[: max(count, 0)]
            fits = 1 <= count <= most and ids == sorted(set(ids)) and all(0 <= one < length for one in ids)
            wrong.append(not fits)
        if all(1 <= count <= most for count in counts.tolist()) and int(counts.sum()) != total:
            wrong = [True] * heads
        for backend in backends if turn < 5 else ("naive",):
            ids, number, faults = compaction.check_kept(indices.clone(), counts, total, length, backend=backend)
            assert (faults != 0).tolist() == wrong
            assert int(number.sum()) <= total and all(
                0 <= one < length for head in range(heads) for one in ids[head, : number[head]].tolist()
            )
            if not any(wrong):
                assert torch.equal(number, counts)


# --- methods that select nonsense -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_nonsensical_layout(rng: random.Random, model: Any, monkeypatch: Any, kind: str, backend: str) -> None:
    spoil, words = LAYOUTS[kind]
    # Triton's kernel takes no heads of 16 dimensions, so the first layer has to be to blame.
    layer = 0 if backend == "triton" else rng.randrange(LAYERS)
    bad(monkeypatch, Prefill, spoil, layer)
    lm = sparse(model, method="bad_prefill", backend=backend)
    found = line_of(lambda: score(lm, [(prompt_of(rng), " apple")]))
    assert found.startswith(f"method bad_prefill, layer {layer}") and words in found


@pytest.mark.parametrize("backend", ["naive", "gather"])
def test_a_query_without_any_key(rng: random.Random, model: Any, monkeypatch: Any, backend: str) -> None:
    """Wide query blocks that read a later tile only leave their first queries without a key: nan, once."""

    def spoil(layout: Blocks) -> Blocks:
        mask = torch.zeros(layout.heads, -(-layout.length // 64), layout.blocks_k, dtype=torch.bool)
        mask[..., 0] = True
        mask[3, 0] = torch.arange(layout.blocks_k) == 2
        return Blocks.from_mask(mask, layout.length, 64, 16)

    bad(monkeypatch, Prefill, spoil)
    lm = sparse(model, method="bad_prefill", backend=backend)
    found = line_of(lambda: score(lm, [(prompt_of(rng), " apple")]))
    assert found.startswith("method bad_prefill, layer 1, query head 3: the layout leaves a query without any key")


@pytest.mark.parametrize("kind", KEPT)
def test_nonsensical_kept_tokens(rng: random.Random, model: Any, monkeypatch: Any, kind: str) -> None:
    spoil, words = KEPT[kind]
    bad(monkeypatch, Eviction, spoil)
    lm = sparse(model, method="bad_eviction")
    run = rng.choice((score, generate))
    prompt = prompt_of(rng)
    found = line_of(lambda: run(lm, [(prompt, " apple")] if run is score else [prompt]))
    assert found.startswith("method bad_eviction, layer 1")
    assert words.replace("\\", "") in found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PAGES)
def test_nonsensical_pages(rng: random.Random, model: Any, monkeypatch: Any, kind: str, backend: str) -> None:
    spoil, words = PAGES[kind]
    own, run, prompt = rng.random() < 0.5, rng.choice((score, generate)), prompt_of(rng)
    if kind == "for ever":
        own, run = False, generate
    bad(monkeypatch, Decode, spoil)
    monkeypatch.setattr(Decode, "own", own)
    lm = sparse(model, method="bad_decode", backend=backend, batch_size=1)
    found = line_of(lambda: run(lm, [(prompt, " river stone")] if run is score else [prompt]))
    assert found.startswith("method bad_decode, layer 1") and words in found
    if "page size" not in kind and kind not in ("int64", "for ever"):
        assert f"layer 1, {'query head 2' if own else 'KV head 1'}: the selection " in found


@interpreted
def test_flags_of_layouts_are_read_with_the_counts(rng: random.Random, model: Any, monkeypatch: Any) -> None:
    """As on a GPU: nothing is looked at before the counts of the batch are fetched."""
    spoil, words = LAYOUTS[rng.choice([kind for kind in LAYOUTS if "head 1" in LAYOUTS[kind][1]])]
    bad(monkeypatch, Prefill, spoil)
    lm = sparse(model, method="bad_prefill", backend="gather")
    monkeypatch.setattr(selections, "choose", lambda backend, device: "triton")
    later: list[Any] = []
    monkeypatch.setattr(RowCounts, "later", lambda self, count, *numbers: later.append((count, numbers)))
    score(lm, [(tiny.words(3, 50), " apple")])
    monkeypatch.undo()
    faulty = [call for call in later if call[0].__qualname__.startswith("count_prefill")]
    assert len(faulty) == LAYERS
    settled = [
        lambda call=call: call[0](*(n.numpy() if isinstance(n, Tensor) else n for n in call[1])) for call in faulty
    ]
    settled[0]()
    assert words in line_of(settled[1])


@interpreted
@pytest.mark.parametrize("run", [score, generate])
def test_flags_of_pages_are_read_with_the_counts(rng: random.Random, model: Any, monkeypatch: Any, run: Any) -> None:
    """As on a GPU: attention raises them, and they are fetched together with the keys read."""
    monkeypatch.setattr(steps, "check_reads", lambda *args: None)
    spoil, words = PAGES[rng.choice(("no page", "too many", "negative", "wraps", "twice", "descending"))]
    bad(monkeypatch, Decode, spoil)
    lm, prompt = sparse(model, method="bad_decode", backend="triton"), tiny.words(3, 25)
    if run is score:
        found = line_of(lambda: score(lm, [(prompt, " river stone")]))
    else:
        found = line_of(lambda: generate(lm, [prompt], max_gen_toks=2))
    assert found.startswith("method bad_decode, layer 1, KV head 1: the selection ") and words in found


@pytest.mark.parametrize("cls", [Prefill, Eviction, Decode])
def test_sense_is_accepted(rng: random.Random, model: Any, monkeypatch: Any, cls: Any) -> None:
    bad(monkeypatch, cls, lambda selection: None)
    lm = sparse(model, method=cls.name, backend="gather", batch_size=2)
    prompts = [prompt_of(rng) for _ in range(3)]
    generate(lm, prompts)
    score(lm, [(prompt, " river stone") for prompt in prompts])
    lm.check_it_ran()
    assert lm.report()["phases"][cls.phase]["calls"]["fallback"] == 0


# --- what covers everything -----------------------------------------------------------------------------------------


def every_block(layout: Blocks) -> Blocks:
    number = layout.blocks_q
    mask = torch.ones(layout.heads, number, number, dtype=torch.bool).tril()
    return Blocks.from_mask(mask, layout.length, 16, 16)


@pytest.mark.parametrize("phase", ["prefill", "eviction", "decode"])
def test_what_leaves_nothing_out_is_a_fallback(rng: random.Random, model: Any, monkeypatch: Any, phase: str) -> None:
    """Whatever a method says of itself: where one layer leaves something out, the run stands; else it is refused."""
    prompt = prompt_of(rng)
    length = len(tiny.tiny_tokenizer()(prompt).input_ids)

    def keep_all(kept: Keep) -> Keep:
        ids = torch.arange(length).repeat(KV_HEADS, 1)
        return Keep(ids, torch.full((KV_HEADS,), length), KV_HEADS * length)

    def all_pages(found: Reads) -> Reads:
        number = int(found.ids[0, 0, 0, 1]) + 1
        pages = torch.arange(number).int().repeat(*found.counts.shape, 1)
        return replace(found, ids=pages, counts=torch.full_like(found.counts, number))

    cls, spoil = {"prefill": (Prefill, every_block), "eviction": (Eviction, keep_all), "decode": (Decode, all_pages)}[
        phase
    ]
    bad(monkeypatch, cls, spoil)
    lm = sparse(model, method=cls.name, backend="gather")
    (text,) = generate(lm, [prompt])
    calls = text.stats[phase]["calls"]
    assert calls["fallback"] == calls["sparse"] > 0
    lm.check_it_ran()
    assert lm.report()["phases"][phase]["fallback_reasons"] == {COVERS[phase]: calls["fallback"]}
    bad(monkeypatch, cls, spoil, None)
    lm = sparse(model, method=cls.name, backend="gather")
    (text,) = generate(lm, [prompt])
    assert set(text.stats[phase]["calls"]) == {"fallback"} and text.stats[phase]["executed_sparsity"] == 0
    assert f"{cls.name} never ran" in (found := line_of(lm.check_it_ran)) and COVERS[phase] in found


# --- page sizes, debug ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, None, True, "16", 16.5, -8, 3, 12, 512])
def test_page_sizes_that_no_kernel_takes(model: Any, monkeypatch: Any, size: Any) -> None:
    bad(monkeypatch, Decode, lambda pages: None)
    found = line_of(lambda: sparse(model, method="bad_decode", page_size=size))
    assert found == line_of(lambda: Plan(decode=Assignment(Decode(size), None)))
    assert f"method bad_decode has page_size={size!r}" in found and "one of 1, 2, 4, 8, 16" in found


def test_a_decode_method_without_a_page_size(model: Any, monkeypatch: Any) -> None:
    class Forgetful(DecodeMethod):
        name, unit, importance, allocation, kv, reference = "forgetful", "-", "-", "-", "full cache", "-"

        def select(self, call: Call) -> Reads:
            raise AssertionError("it is refused before")

    METHODS.add(Forgetful)
    assert "method forgetful has no page_size" in line_of(lambda: sparse(model, method="forgetful"))


@pytest.mark.parametrize(
    ("typed", "wanted"), [({}, False), ({"debug": True}, True), ({"debug": False}, False), ({"debug": 1}, True),
                          ({"debug": 0}, False)],
)  # fmt: skip
def test_debug(monkeypatch: Any, typed: dict[str, Any], wanted: bool) -> None:
    monkeypatch.delenv("LM_EVAL_SPARSE_DEBUG", raising=False)
    assert parse(typed).plan.debug is wanted
    for value, meant in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("LM_EVAL_SPARSE_DEBUG", value)
        assert parse(typed).plan.debug is (wanted if typed else meant)


@pytest.mark.parametrize("value", ["yes", "no", "", 2, -1, 0.5, "1"])
def test_debug_is_yes_or_no(value: Any) -> None:
    found = line_of(lambda: parse({"debug": value}))
    assert f"debug={value!r} is not accepted: give True or False (or 1 or 0)" in found


def test_debug_takes_no_graphs(model: Any) -> None:
    lm = sparse(model, method="quest", debug=True)
    decoder, _ = lm.decoding.get()
    assert decoder is not None and decoder.graphs.refused == DEBUGGED


# --- what a method returns beside its lists --------------------------------------------------------------------


def odd(monkeypatch: Any, cls: Any, change: Callable[[Any, Call], Any]) -> None:
    """Let a method return what `change` makes of its selection and its call."""
    bad(monkeypatch, cls, lambda selection: None)
    select = cls.select
    monkeypatch.setattr(cls, "select", lambda self, call: change(select(self, call), call))


@pytest.mark.parametrize("run", [score, generate])
@pytest.mark.parametrize("cls", [Prefill, Eviction, Decode])
@pytest.mark.parametrize("returned", [None, [], "selection"])
def test_what_is_no_selection(model: Any, monkeypatch: Any, cls: Any, returned: Any, run: Any) -> None:
    odd(monkeypatch, cls, lambda selection, call: returned)
    lm, prompt = sparse(model, method=cls.name, backend="gather"), tiny.words(3, 60)
    found = line_of(lambda: run(lm, [(prompt, " river stone")] if run is score else [prompt]))
    assert found.startswith(f"method {cls.name}, layer 0: select returned {type(returned).__name__}")


@pytest.mark.parametrize("cls", [Prefill, Eviction, Decode])
def test_a_method_that_fails(model: Any, monkeypatch: Any, cls: Any) -> None:
    odd(monkeypatch, cls, lambda selection, call: 1 // 0)
    lm = sparse(model, method=cls.name, backend="gather")
    found = line_of(lambda: score(lm, [(tiny.words(3, 60), " river stone")]))
    assert found.startswith(f"method {cls.name}, layer 0: select failed (ZeroDivisionError")
    with pytest.raises(ZeroDivisionError):
        score(sparse(model, method=cls.name, backend="gather", debug=True), [(tiny.words(3, 60), " river stone")])


@pytest.mark.parametrize("cls", [Prefill, Eviction, Decode])
@pytest.mark.parametrize("run", [score, generate])
def test_a_method_that_writes_into_what_it_is_given(model: Any, monkeypatch: Any, cls: Any, run: Any) -> None:
    def write(selection: Any, call: Call) -> Any:
        call.key.mul_(0.5)
        return selection

    odd(monkeypatch, cls, write)
    lm, prompt = sparse(model, method=cls.name, backend="gather"), tiny.words(3, 60)
    found = line_of(lambda: run(lm, [(prompt, " river stone")] if run is score else [prompt]))
    assert found.startswith(f"method {cls.name}, layer 0: select wrote into")


FIGURES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "operations that are no number": (Prefill, {"cost": Cost(flops=float("nan"))}, "estimator_flops is nan"),
    "bytes below 0": (Prefill, {"cost": Cost(bytes=-1e9)}, "estimator_bytes is"),
    "operations without end": (Eviction, {"cost": Cost(flops=float("inf"))}, "estimator_flops is inf"),
    "bytes of nothing": (Eviction, {"cost": Cost(bytes=-1)}, "estimator_bytes is -1"),
    "pairs below 0": (Prefill, {"count_selected": lambda: torch.full((4,), -5)}, "selected is"),
    "pairs beyond all": (Prefill, {"count_selected": lambda: torch.full((4,), 10**9)}, "pairs are selected of"),
    "pairs of one head": (Prefill, {"count_selected": lambda: torch.ones(1)}, "count_selected gives (1,)"),
    "a total that is a fraction": (Eviction, {"total": 46.0}, "total is a float"),
    "a total on a device": (Eviction, {"total": torch.tensor(46)}, "total is a Tensor"),
}


@pytest.mark.parametrize("kind", FIGURES)
def test_figures_that_are_none(model: Any, monkeypatch: Any, kind: str) -> None:
    cls, changed, words = FIGURES[kind]
    odd(monkeypatch, cls, lambda selection, call: replace(selection, **changed))
    lm = sparse(model, method=cls.name, backend="gather")
    found = line_of(lambda: score(lm, [(tiny.words(3, 60), " river stone")]))
    assert found.startswith(f"method {cls.name}, layer 0: ") and words in found
