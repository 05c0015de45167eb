"""What every method promises, for each one in the registry: a new method is tested here without a word about it.

Sparse at 200 tokens by its `tiny` knobs. What a layout, a cache or a list comes to is counted here entry by entry;
what single methods choose is compared with their definitions elsewhere (test_methods_oracle.py).
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from small_lms import generate, score, sparse
from torch import Tensor

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels.types import RaggedKV, State
from lm_eval_sparse.methods import METHODS, PHASE_ARGUMENTS, CacheView, Call, Layer, Mass, Method
from lm_eval_sparse.testing import call_of

NAMES = [name for name, cls in METHODS.items() if cls.phase in PHASE_ARGUMENTS]
each = pytest.mark.parametrize("name", NAMES)

DIM, STEPS = 16, 5
#: Query heads and KV heads: one each, a group of two, all heads on one, and a group for each.
HEADS = ((1, 1), (4, 2), (7, 1), (3, 3))
LENGTHS = (63, 200, 331)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def states(heads: int, kv_heads: int, length: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Queries and keys in which some directions stand out, so that attention is far from uniform; and values."""
    generator = torch.Generator().manual_seed(1000 * length + 10 * heads + kv_heads + seed)
    stretch = torch.linspace(0.3, 3, DIM)
    return [
        (torch.randn(number, length, DIM, generator=generator) * stretch).to(dtype)
        for number in (heads, kv_heads, kv_heads)
    ]


def covering(name: str) -> dict[str, Any]:
    """Knobs under which the budget of prompts of these tests leaves nothing out."""
    cls = METHODS[name]
    if cls.whole:
        return {**cls.tiny, **cls.whole}
    most = dict.fromkeys(cls.budget_knobs, 4096) if cls.native is not Mass else {cls.budget_knobs[0]: 1}
    return {**cls.tiny, **most}


def ask(name: str, query: Tensor, key: Tensor, value: Tensor, sparsity: float | None = None) -> tuple[Method, Any]:
    """The method as it was asked, and what it selects; a decode method for the last `STEPS` tokens."""
    cls = METHODS[name]
    method = cls(**(cls.tiny if sparsity is None else {}))
    if cls.phase == "decode":
        return decode(method, query, key, value, STEPS, STEPS, sparsity)
    found, call = call_of(method, query, key, value, scale=DIM**-0.5, sparsity=sparsity)
    return found, found.select(call)


def decode(
    method: Method, query: Tensor, key: Tensor, value: Tensor, new: int, steps: int, sparsity: float | None
) -> tuple[Method, Any]:
    """What is selected for the last `steps` tokens, of which the last `new` have come since the prompt.

    They come `steps` at a time, and each time the method takes them into its state, if it has one.
    """
    (heads, total, _), kv_heads = query.shape, len(key)
    layer = Layer(0, 1, heads, kv_heads, DIM)
    method, budget = method.resolved(sparsity, total - new, layer)
    flat = [part.reshape(-1, DIM) for part in (key, value)]
    starts = [head * total for head in range(kv_heads)]
    pages = -(-total // method.page_size)
    entries = {"page": pages * kv_heads, "token": kv_heads * total, "sequence": kv_heads}
    tensors = {slot.name: slot.empty(entries[slot.per], flat[0]) for slot in method.slots()}
    state = State(tensors, method.page_size, torch.arange(kv_heads) * pages, torch.arange(kv_heads))

    def call(length: int, last: int) -> Call:
        kv = RaggedKV.of(*flat, starts, [length] * kv_heads)
        asked = query[:, length - last : length].reshape(kv_heads, heads // kv_heads, last, DIM)
        view = CacheView(kv, torch.tensor([length]), kv_heads)
        return Call(asked, *flat, DIM**-0.5, None, "decode", budget, layer, view, state if tensors else None)

    length = total - new
    method.prefilled(call(length, min(length, max(1, method.looks_back))))
    while length < total:
        before = torch.full((kv_heads,), length, dtype=torch.int32)
        length += steps
        now = call(length, steps)
        method.appended(now, before)
        selection = method.select(now)
        selection.check(now.cache.kv)
    return method, selection


def shown(selection: Any, phase: str, kv_heads: int, length: int) -> Tensor:
    """What is selected, entry by entry.

    `(H, L, L)` pairs of the prompt; `(H_kv, L)` tokens that stay; or `(H_kv, Gs, T, L)` keys that new tokens read.
    """
    if phase == "prefill":
        seen = torch.zeros(selection.heads, length, length, dtype=torch.bool)
        for head in range(selection.heads):
            for row in range(selection.blocks_q):
                queries = slice(row * selection.block_q, (row + 1) * selection.block_q)
                for block in selection.indices[head, row, : int(selection.counts[head, row])].tolist():
                    seen[head, queries, block * selection.block_k : (block + 1) * selection.block_k] = True
                if selection.columns is not None:
                    own = selection.columns[head, row if selection.columns.shape[1] > 1 else 0]
                    seen[head, queries, own[: int(selection.column_counts[head, row])].long()] = True
        return seen.tril()
    if phase == "eviction":
        seen = torch.zeros(kv_heads, length, dtype=torch.bool)
        for head in range(kv_heads):
            seen[head, selection.ids[head, : int(selection.counts[head])]] = True
        return seen
    lists, steps = selection.counts.shape[1:]
    seen = torch.zeros(kv_heads, lists, steps, length, dtype=torch.bool)
    for head, own, step in torch.cartesian_prod(*map(torch.arange, (kv_heads, lists, steps))).reshape(-1, 3).tolist():
        for page in selection.ids[head, own, step, : int(selection.counts[head, own, step])].tolist():
            seen[head, own, step, page * selection.unit : (page + 1) * selection.unit] = True
        seen[head, own, step, length - steps + 1 + step :] = False
    return seen


def same(one: Any, other: Any, phase: str, kv_heads: int, length: int) -> bool:
    return torch.equal(*(shown(selection, phase, kv_heads, length) for selection in (one, other)))


# --- what it says of itself -------------------------------------------------------------------------------------------


@each
def test_it_has_its_place_in_the_taxonomy(name: str) -> None:
    cls = METHODS[name]
    assert cls.name == name and cls.__dataclass_params__.frozen
    for place in (cls.unit, cls.importance, str(cls.allocation), cls.kv, cls.reference):
        assert isinstance(place, str) and place.strip() == place != "" and "|" not in place
    assert cls.tiny and set(cls.tiny) <= set(cls.knobs()), "`tiny` makes it sparse at 200 tokens"
    assert set(cls.budget_knobs) <= set(cls.knobs()) and cls.budget_knobs
    if cls.paper is not None:
        assert {*cls.paper.names, *cls.paper.fixed} <= set(cls.knobs())
        assert all(len(row) == len(cls.paper.budgets) for row in cls.paper.rows.values())


@each
def test_its_knobs_are_documented(name: str) -> None:
    """Each has a line under `Knobs:`, of the class or of one that it is built on."""
    written = "\n".join(inspect.getdoc(base) or "" for base in METHODS[name].__mro__ if issubclass(base, Method))
    told = {
        knob.strip(" `") for line in re.findall(r"^ +([\w, `]+): \S", written, re.MULTILINE) for knob in line.split(",")
    }
    assert set(METHODS[name].knobs()) <= told


# --- what it selects --------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_it_selects_sense_and_counts_it(name: str, heads: tuple[int, int], length: int) -> None:
    """In every dtype: no future, something left out, the same twice, and each count is that of the entries."""
    phase, kv_heads = METHODS[name].phase, heads[1]
    for dtype in DTYPES:
        query, key, value = states(*heads, length, dtype)
        method, selection = ask(name, query, key, value)
        why = method.too_short(None, length)
        assert why is None or length < 200, why
        if phase == "prefill":
            selection.check(heads[0])
            seen = shown(selection, phase, kv_heads, length)
            whole = torch.ones(length, length).tril().sum()
            assert selection.executed_pairs().tolist() == seen.sum((1, 2)).tolist()
            assert (selection.selected_pairs() <= selection.executed_pairs()).all() and seen.any(-1).all()
            left = 1 - seen.sum() / (whole * heads[0])
        elif phase == "eviction":
            selection.check(kv_heads, length)
            seen = shown(selection, phase, kv_heads, length)
            assert selection.total == int(seen.sum()) and seen.sum(-1).tolist() == selection.counts.tolist()
            left = 1 - seen.float().mean()
        else:
            seen = shown(selection, phase, kv_heads, length)
            flat = key.reshape(-1, DIM)
            kv = RaggedKV.of(flat, flat, [head * length for head in range(kv_heads)], [length] * kv_heads)
            assert selection.keys_read(kv).tolist() == seen.sum(-1).tolist()
            assert seen[..., range(STEPS), range(length - STEPS, length)].all(), "a token reads itself"
            left = 1 - (seen.sum(-1) / torch.arange(length - STEPS + 1, length + 1)).mean()
        assert float(left) > 0.1 or length < 200
        again = ask(name, *(part.clone() for part in (query, key, value)))[1]
        assert same(selection, again, phase, kv_heads, length)
        if phase != "decode":
            assert float(selection.cost.flops) >= 0 <= float(selection.cost.bytes)


@each
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_it_keeps_the_promise(name: str, sparsity: float) -> None:
    heads, kv_heads, length = 4, 2, 4097
    phase = METHODS[name].phase
    query, key, value = states(heads, kv_heads, length)
    _, selection = ask(name, query, key, value, sparsity)
    if phase == "prefill":
        density = float(selection.executed_pairs().sum()) / (heads * length * (length + 1) / 2)
    elif phase == "eviction":
        density = selection.total / (kv_heads * length)
    else:
        # Pages are whole and the page of a token is read in full: over all places in a page the mean is promised.
        size, read, seen = selection.unit, 0, 0
        for end in range(length - size + 1, length + 1):
            _, selection = ask(name, *(part[:, :end] for part in (query, key, value)), sparsity)
            flat = key[:, :end].reshape(-1, DIM)
            kv = RaggedKV.of(flat, flat, [head * end for head in range(kv_heads)], [end] * kv_heads)
            read += float(selection.keys_read(kv).double().mean((0, 1)).sum())
            seen += sum(range(end - STEPS + 1, end + 1))
        density = read / seen
    assert 1 - density == pytest.approx(sparsity, abs=0.01)


@each
@pytest.mark.parametrize("heads", HEADS[1:3], ids=str)
def test_later_keys_change_no_earlier_choice(name: str, heads: tuple[int, int]) -> None:
    """Tokens that come together read what they would have read one by one; no prompt's query reads a later key."""
    kv_heads, length = heads[1], 203
    phase = METHODS[name].phase
    query, key, value = states(*heads, length)
    if phase == "decode":
        method = METHODS[name](**METHODS[name].tiny)
        together = shown(decode(method, query, key, value, STEPS, STEPS, None)[1], phase, kv_heads, length)
        for step in range(STEPS):
            end = length - STEPS + 1 + step
            parts = (part[:, :end].contiguous() for part in (query, key, value))
            alone = shown(decode(method, *parts, step + 1, 1, None)[1], phase, kv_heads, end)
            assert torch.equal(together[:, :, step, :end], alone[:, :, 0]), step
            assert not together[:, :, step, end:].any()
        return
    # What earlier queries read may hang on the last ones, which vote; it must not lie after them.
    _, selection = ask(name, query, key, value)
    if phase == "prefill":
        tiles = selection.mask()
        last = torch.clamp((torch.arange(selection.blocks_q) + 1) * selection.block_q, max=length) - 1
        assert not (tiles & (torch.arange(selection.blocks_k) * selection.block_k > last[:, None])).any()
    else:
        assert int(selection.ids[:, : int(selection.counts.min())].max()) < length


# --- in a model -------------------------------------------------------------------------------------------------------

#: Some 63, 200 and 331 tokens.
PROMPTS = [tiny.words(seed, count) for seed, count in ((1, 26), (2, 84), (3, 140))]
ANSWER = " river stone cloud window"


@cache
def model(dtype: torch.dtype = torch.float32, kv_heads: int = 2) -> Any:
    return tiny.family("llama", num_key_value_heads=kv_heads).to(dtype)


def lm_of(options: dict[str, Any], **more: Any) -> Any:
    """On its own copy, since what runs is attached to the modules of a model."""
    dtype = more.pop("dtype", torch.float32)
    kv_heads = more.pop("kv_heads", 2)
    return sparse(copy.deepcopy(model(dtype, kv_heads)), backend="gather", **options, **more)


def answers(lm: Any) -> tuple[list[Any], list[Any]]:
    return score(lm, [(prompt, ANSWER) for prompt in PROMPTS]), generate(lm, PROMPTS, max_gen_toks=6)


def figures(found: tuple[list[Any], list[Any]]) -> list[Any]:
    """What answers say of themselves, but for the run that they belong to."""
    return [{**one.stats, "run": None} for part in found for one in part]


@pytest.fixture(scope="module")
def dense() -> tuple[list[Any], list[Any]]:
    return answers(lm_of({"method": "dense"}))


@each
@pytest.mark.parametrize("forced", [False, True])
def test_a_budget_that_covers_everything_is_dense(
    name: str, forced: bool, dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a fallback that says why; `forced`: selected and executed all the same, and then told from what was read."""
    if forced:
        monkeypatch.setattr(METHODS[name], "too_short", lambda self, sparsity, length: None)
    lm = lm_of({"method": name, **covering(name)}, batch_size=2)
    found = answers(lm)
    assert [float(one[0]) for one in found[0]] == pytest.approx([float(one[0]) for one in dense[0]], abs=1e-4)
    assert found[1] == dense[1]
    report = lm.report()["phases"][METHODS[name].phase]
    assert report["calls"]["sparse"] == 0 < report["calls"]["fallback"] and report["fallback_reasons"]
    assert report["executed_sparsity"] == 0
    with pytest.raises(UserError, match=f"{name} never ran"):
        lm.check_it_ran()


@each
def test_it_does_not_feel_neighbours_nor_its_own_past(name: str) -> None:
    """Alone, in a batch, in another order and once more: answers and figures are the same."""
    options = {"method": name, **METHODS[name].tiny}
    alone = lm_of(options, batch_size=1)
    first = answers(alone)
    again = answers(alone)
    together = answers(lm_of(options, batch_size=3))
    for other in (again, together):
        assert [one[0] for one in other[0]] == pytest.approx([one[0] for one in first[0]], abs=1e-4)
        assert other[1] == first[1] and figures(other) == figures(first)
    # An answer does not hang on what follows it.
    for long, short in zip(first[1], generate(alone, PROMPTS, max_gen_toks=3), strict=True):
        assert long.startswith(short)


@contextmanager
def recorded() -> Iterator[list[tuple[Method, Call, Any]]]:
    """Who was asked what, and selected what."""
    seen: list[tuple[Method, Call, Any]] = []
    depth = [0]  # a method may ask that of its base class

    def noted(select: Any) -> Any:
        def wrapped(self: Method, call: Call) -> Any:
            depth[0] += 1
            try:
                selection = select(self, call)
            finally:
                depth[0] -= 1
            if depth[0]:
                return selection
            lengths = call.cache and replace(call.cache.kv, lengths=call.cache.kv.lengths.clone())
            seen.append((self, lengths or call, selection))
            return selection

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for owner in {base for cls in METHODS.values() for base in cls.__mro__ if "select" in vars(base)}:
            patch.setattr(owner, "select", noted(vars(owner)["select"]))
        yield seen


@each
@pytest.mark.parametrize(
    ("dtype", "kv_heads"), [(torch.float32, 1), (torch.float32, 2), (torch.float16, 2), (torch.bfloat16, 4)], ids=str
)
def test_what_is_measured_is_what_it_selects(name: str, dtype: torch.dtype, kv_heads: int) -> None:
    cls, prompt = METHODS[name], PROMPTS[2]
    lm = lm_of({"method": name, **cls.tiny}, dtype=dtype, kv_heads=kv_heads)
    length = len(lm.tok_encode(prompt))
    with recorded() as seen:
        (found,) = score(lm, [(prompt, ANSWER)])
    assert len(seen) == lm.model.config.num_hidden_layers and {type(method) for method, *_ in seen} == {cls}
    kept = []
    for _, call, selection in seen:
        if cls.phase == "prefill":
            kept.append(shown(selection, cls.phase, kv_heads, length).sum() / (4 * length * (length + 1) / 2))
        elif cls.phase == "eviction":
            kept.append(shown(selection, cls.phase, kv_heads, length).float().mean())
        else:
            read = selection.keys_read(call).double().mean((0, 1))
            kept.append(read.sum() / sum(range(length + 1, length + 1 + len(read))))
    measured = found.stats[cls.phase]
    assert 0.1 < measured["executed_sparsity"] < 1
    assert measured["executed_sparsity"] == pytest.approx(1 - float(sum(kept) / len(kept)), abs=1e-6)
    assert set(measured["calls"]) == {"sparse"}
    assert float(found[0]) < 0
    lm.check_it_ran()
