"""Answers decoded token by token: the same alone and side by side, whatever the storage, the limits and the loop.

Long, since all cases decode with the same tiny models.
"""

# ruff: noqa: F811 - fixtures of a helper module are arguments of tests

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from decoding_lms import (
    DEVICE,
    all_stats,
    decode_stats,
    generate,
    lm_of,
    prompts_of,
    rng,  # noqa: F401 (fixtures)
    words,
)
from lm_eval.models.utils_hf import MultiTokenEOSCriteria
from prefill_cases import interpreter_missing
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels import backends
from lm_eval_sparse.kernels.types import RaggedKV
from lm_eval_sparse.methods.decode.quest import Quest
from lm_eval_sparse.methods.plan import Assignment
from lm_eval_sparse.model import decoding as model_decoding
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.model.sampling import Sampling, Stop
from lm_eval_sparse.runtime import decoder as decoding
from lm_eval_sparse.runtime import rounding
from lm_eval_sparse.runtime.decoder import Decoder
from lm_eval_sparse.runtime.interface import CALL
from lm_eval_sparse.runtime.memory import MemoryModel, out_of_memory
from lm_eval_sparse.runtime.rounding import rows_alike

LOOP = "cuda_graph" if DEVICE == "cuda" else "eager"
on_a_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="what a CPU does")

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt_oss")
#: Windows in all layers, learned positions.
DENSE_FAMILIES = ("mistral", "gpt2", "opt")
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "quest": {"method": "quest", "budget": 32},
    "quest own": {"method": "quest", "sparsity": 0.6, "page_size": 8, "share_pages": False},
    "snapkv": {"method": "snapkv", "capacity": 24, "window": 8, "sinks": 2, "local": 4},
    "ada+quest": {"method": "flexprefill+ada_snapkv+quest", "sparsity": 0.4, "page_size": 8},
}


# --- batches ---------------------------------------------------------------------------------------------------------


#: Every method where layers are alike and where windows lie between them; the other families dense and with all phases.
CASES = [
    *((family, method) for family in FAMILIES for method in METHODS
      if family in ("llama", "gemma3") or method in ("dense", "ada+quest") or DEVICE == "cuda"),
    *((family, "dense") for family in DENSE_FAMILIES),
]  # fmt: skip


@pytest.mark.parametrize(("family", "method"), CASES)
def test_side_by_side_as_alone(rng: random.Random, family: str, method: str) -> None:
    """Half precision, where products of one row and of several round differently: tokens and figures are the same."""
    prompts = prompts_of(rng, 9)
    alone = lm_of(family, **METHODS[method])
    # What some of the answers hold ends them, so that rows leave the batch at different times.
    until = [text[len(text) // 2] for text in generate(alone, prompts[:3]) if text]
    texts = generate(alone, prompts, until=until)
    together = lm_of(family, **METHODS[method], batch_size=7)
    found = generate(together, prompts, until=until)
    assert found == texts and all_stats(found) == all_stats(texts)
    assert together.decoding.decoder.alone is None, "this machine rounds differently for several rows"
    assert set(together.report()["phases"]["decode"]["loops"]) == {LOOP}
    assert "loop_reasons" not in together.report()["phases"]["decode"]


@on_a_cpu
def test_rows_are_really_side_by_side(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard for the test above: steps of a batch see several rows, and fewer once rows have ended."""
    widths: list[int] = []
    launch = Decoder._launch
    monkeypatch.setattr(Decoder, "_launch", lambda self, rows: (widths.append(self._bucket), launch(self, rows))[1])
    lm = lm_of("llama", batch_size=6)
    texts = generate(lm, prompts_of(rng, 6), max_gen_toks=30)
    steps = [stats["calls"].get("dense", 0) // 2 for stats in decode_stats(texts)]
    assert len(widths) == max(steps) < sum(steps) == sum(widths)


@on_a_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_is_decoded_one_at_a_time_on_a_cpu(
    rng: random.Random, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    prompts, lm = prompts_of(rng, 5), lm_of("llama", dtype)
    texts = generate(lm, prompts)
    assert "loop_reasons" not in lm.report()["phases"]["decode"] and "one at a time" not in caplog.text
    lm = lm_of("llama", dtype, batch_size=5)
    with caplog.at_level(logging.WARNING):
        assert generate(lm, prompts) == texts and lm.decoding.decoder.most == 1
    assert caplog.text.count("one at a time") == 1
    decode = lm.report()["phases"]["decode"]
    assert decode["loop_reasons"] == {lm.decoding.decoder.alone: sum(decode["loops"].values())}


@on_a_cpu
@pytest.mark.parametrize(("odd", "multiple"), [((), 2), ((2, 6), 4), ((2, 4, 12), 8), ((8,), None)])
def test_products_that_round_otherwise_now_and_then(
    rng: random.Random, odd: tuple[int, ...], multiple: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number in 20,000 differs for some numbers of rows: too few for a step to show it."""
    linear = torch.nn.functional.linear

    def product(module: torch.nn.Linear, rows: Tensor) -> Tensor:
        # As a product in full precision would be, which no number of rows changes; and then a bit in some places.
        out = linear(rows.double(), module.weight.double()).to(rows.dtype)
        if len(rows) in odd and rows.shape[1] == 1:
            some = (rows.double().sum(-1, keepdim=True) * 1e4 + torch.arange(out.shape[-1])).sin() > 1 - 1.2e-8
            out = torch.where(some, out * 1.01, out)
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", product)
    monkeypatch.setattr(rounding, "_alike", {})
    lm = lm_of("llama", batch_size=5)
    texts = generate(lm, prompts_of(rng, 5))
    assert rows_alike(lm.model) == multiple and lm.decoding.decoder.multiple == (multiple or 1)
    assert lm.decoding.decoder.most == (1 if multiple is None else 16) and len(texts) == 5
    reasons = lm.report()["phases"]["decode"].get("loop_reasons", {})
    assert [*reasons] == ([] if multiple else [lm.decoding.decoder.alone])


@on_a_cpu
def test_steps_are_as_wide_as_products_round_alike(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one row, too: a row among others must find the same."""
    widths: set[tuple[int, int]] = set()
    launch = Decoder._launch
    monkeypatch.setattr(
        Decoder, "_launch", lambda self, rows: (launch(self, rows), widths.add((len(rows), self._width)))[0]
    )
    monkeypatch.setattr(model_decoding, "rows_alike", lambda model: 4)
    prompts = prompts_of(rng, 6)
    for batch_size in (1, 6):
        generate(lm_of("llama", batch_size=batch_size), prompts)
    assert widths >= {(1, 4), (6, 8)} and all(width == -(-rows // 4) * 4 for rows, width in widths)


@pytest.mark.parametrize("who", ["all", "last"])
def test_a_model_that_feels_its_neighbours_is_decoded_one_at_a_time(
    rng: random.Random, who: str, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = prompts_of(rng, 8)

    def rounded(module: Any, arguments: Any, out: Tensor) -> Tensor:
        if DEVICE == "cuda":  # where there are always as many rows: what the others hold tells
            others = out.float().sum(0, keepdim=True) - out.float()
            touched = torch.arange(len(out), device=out.device)[:, None, None] == (7 if who == "last" else 0)
            return torch.where(touched, out * (1 + 0.01 * others.sin()).to(out.dtype), out) if len(out) > 1 else out
        factor = 1 + len(out) / 256
        rows = torch.arange(len(out), device=out.device)[:, None, None]
        # Two or four rows of half precision are how one is decoded.
        touched = (rows >= 0) if who == "all" else (rows == len(out) - 1) & (rows > 1)
        return torch.where(touched, out * factor, out)

    def made(**options: Any) -> SparseHFLM:
        lm = lm_of("llama", **options)
        # Its output depends on how many rows there are, as that of products does on other machines.
        lm.model.lm_head.register_forward_hook(rounded)
        return lm

    texts = generate(made(), prompts)
    lm = made(batch_size=8)
    with caplog.at_level(logging.WARNING):
        found = generate(lm, prompts)
    assert found == texts and "one at a time" in caplog.text
    reasons = lm.report()["phases"]["decode"]["loop_reasons"]
    assert len(reasons) == 1 and "round differently" in next(iter(reasons))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="steps are captured on CUDA devices only")
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 1.0}])
def test_a_step_that_cannot_be_captured(
    rng: random.Random, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A layer that waits for the device: eager steps, the same tokens, and the reason in the results."""
    prompts = prompts_of(rng, 5)
    texts = generate(lm_of("llama", method="quest", budget=32), prompts, **options)
    lm = lm_of("llama", method="quest", budget=32, batch_size=4)
    lm.model.model.norm.register_forward_hook(lambda module, args, out: out * float(out.isfinite().any()))
    with caplog.at_level(logging.WARNING):
        found = generate(lm, prompts, **options)
    decode = lm.report()["phases"]["decode"]
    assert found == texts and set(decode["loops"]) == {"eager"}
    assert (
        decode["loop_reasons"].keys() == {lm.decoding.decoder.graphs.refused}
        and "cannot be captured" in lm.decoding.decoder.graphs.refused
    )
    assert sum(decode["loop_reasons"].values()) == sum(decode["loops"].values())
    assert "without CUDA graphs" in caplog.text
    assert generate(lm, prompts, **options) == texts


@on_a_cpu
@pytest.mark.parametrize("given", [0, -1, "0", "x", "", "1.5", 2.0, True, "auto:x", "auto:0", "auto:", "automatic"])
def test_batch_sizes_that_are_none(given: Any) -> None:
    with pytest.raises(UserError, match="batch_size=.* is not accepted: give auto or a whole number of at least 1"):
        lm_of("llama", batch_size=given)
    if not str(given).startswith("auto"):
        with pytest.raises(UserError, match="max_batch_size=.* is not accepted: give a whole number"):
            lm_of("llama", batch_size="auto", max_batch_size=given)


@on_a_cpu
@pytest.mark.parametrize("given", [1, "2", "auto", "auto:3"])
def test_batch_sizes_that_are_some(rng: random.Random, given: Any) -> None:
    lm = lm_of("llama", batch_size=given, max_batch_size="3")
    assert len(generate(lm, prompts_of(rng, 2), max_gen_toks=2)) == 2


@on_a_cpu
@pytest.mark.parametrize("number", [0, -3])
def test_answers_of_no_token(rng: random.Random, number: int) -> None:
    with pytest.raises(UserError, match=f"max_gen_toks={number} is no number of tokens"):
        generate(lm_of("llama"), prompts_of(rng, 1), max_gen_toks=number)


@on_a_cpu
def test_a_step_that_fails_leaves_nothing_behind(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding is looked for again as soon as a step has ended, however it did."""
    lm, seen = lm_of("opt"), []
    handle = lm.model.register_forward_pre_hook(lambda module, args: seen.append(CALL.get().unpadded))
    generate(lm, prompts_of(rng, 1), max_gen_toks=4)
    assert {True, False} == set(seen) and CALL.get() is None
    ids = torch.tensor([lm.tok_encode("abc def")])
    monkeypatch.setattr(lm.model, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm.forward(ids, cache=None, step=True)
    monkeypatch.undo()
    handle.remove()
    assert CALL.get() is None
    # Prompts run one at a time, so a padded one is nobody's: it is found, and refused.
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1)
    mask = torch.ones_like(padded)
    lm.model(input_ids=padded, attention_mask=mask)
    mask[:, :3] = 0
    with pytest.raises(UserError, match="a prompt is padded"):
        lm.model(input_ids=padded, attention_mask=mask)


def longrope() -> torch.nn.Module:
    """A Phi-3 whose positions are stretched otherwise beyond 64 tokens."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0 + n for n in range(8)]}
    torch.manual_seed(0)
    config = Phi3Config(
        **tiny.COMMON, original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors},
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


def test_positions_that_depend_on_neighbours(rng: random.Random) -> None:
    lm = lm_of(longrope, batch_size=4)
    prompts = [words(rng, n) for n in (150, 60, 20, 55)]
    assert generate(lm, prompts) == generate(lm_of(longrope), prompts)
    assert "longrope" in " ".join(lm.report()["phases"]["decode"]["loop_reasons"])


@on_a_cpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fixed", [8, 32])
def test_idle_rows_and_steps_ahead_change_nothing(
    rng: random.Random, method: str, fixed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: a fixed number of rows, attention for some of them, one step running ahead of the host."""
    prompts = prompts_of(rng, 7)
    texts = generate(lm_of("gemma2", **METHODS[method]), prompts, until=["e"])
    make = Decoder.__init__

    def init(self: Decoder, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.fixed, self.depth, self.most = fixed, 2, 7
        self.ids, self.positions, self.tokens_held, self.alive = (torch.zeros(32, dtype=torch.long) for _ in range(4))

    monkeypatch.setattr(Decoder, "__init__", init)
    monkeypatch.setattr(decoding, "RECORDED", 3)
    lm = lm_of("gemma2", **METHODS[method], batch_size=7)
    found = generate(lm, prompts, until=["e"])
    assert lm.decoding.decoder.alone is None
    assert found == texts and all_stats(found) == all_stats(texts)


def test_prompts_with_budgets_of_their_own(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a preset, which gives knobs by the prompt's length."""
    prompts = prompts_of(rng, 7, 60, 180)
    lm, alone = (lm_of("llama", **METHODS["quest"], batch_size=rows) for rows in (7, 1))
    lengths = sorted(len(lm.tok_encode(prompt)) for prompt in prompts)
    budgets = {True: Quest(budget=16), False: Quest(budget=32)}
    monkeypatch.setattr(Assignment, "at", lambda self, length, window=None: (budgets[length > lengths[3]], None))
    texts = generate(alone, prompts)
    found = generate(lm, prompts)
    assert found == texts and all_stats(found) == all_stats(texts)
    knob = lm.report()["phases"]["decode"]["knobs_solved"]["budget"]
    assert knob["min"] < 33 < knob["max"]


@on_a_cpu
@pytest.mark.skipif(interpreter_missing() is not None, reason=str(interpreter_missing()))
@pytest.mark.parametrize(("family", "method"), [("llama", "ada+quest"), ("gemma3", "dense")])
def test_kernels_decode_the_same_tokens(
    rng: random.Random, family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All operators of a step in Triton, under its interpreter, against torch."""
    prompts = prompts_of(rng, 3, 5, 60)
    options = {"until": [], "max_gen_toks": 3}
    knobs = {**METHODS[method], "method": METHODS[method].get("method", "dense").removeprefix("flexprefill+")}
    expected = generate(lm_of(family, torch.float32, **knobs), prompts, **options)
    monkeypatch.setattr(backends, "AUTO_ELSEWHERE", "triton")
    lm = lm_of(family, torch.float32, **knobs, backend="triton")
    found = generate(lm, prompts, **options)
    assert found == expected and set(lm.report()["phases"]["decode"]["backends"]) == {"triton"}
    for one, other in zip(decode_stats(found), decode_stats(expected), strict=True):
        assert {**one, "backends": None} == {**other, "backends": None}


# --- storage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method"), [*(("llama", method) for method in METHODS), ("gemma3", "dense"), ("gemma3", "ada+quest")]
)
def test_answers_longer_than_their_room(
    rng: random.Random, family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(rng, 5)
    texts = generate(lm_of(family, **METHODS[method], batch_size=5), prompts, max_gen_toks=40)
    grown: list[int] = []
    grow = Decoder._grow
    monkeypatch.setattr(Decoder, "_grow", lambda self: (grown.append(1), grow(self))[1])
    monkeypatch.setattr(model_decoding, "RESERVE", 3)
    monkeypatch.setattr(decoding, "LEAST_GROWTH", 5)
    for batch_size in (1, 3):
        grown.clear()
        lm = lm_of(family, **METHODS[method], batch_size=batch_size)
        found = generate(lm, prompts, max_gen_toks=40)
        assert found == texts and all_stats(found) == all_stats(texts)
        assert len(grown) >= 2


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step may make a sequence longer than a kernel is told, nor reach beyond the room that it has."""
    step = Decoder._step

    def checked(self: Decoder) -> None:
        step(self)
        for layer in self.layers:
            assert int(layer.lengths.max()) <= layer.longest
            held = layer.lengths > 0
            assert int((layer.starts + layer.lengths)[held].max()) <= layer.pool.used
            ends = dict(zip(layer.starts[held].tolist(), layer.lengths[held].tolist(), strict=True))
            places = sorted(ends)
            assert all(a + ends[a] <= b for a, b in zip(places, places[1:], strict=False)), "sequences overlap"

    monkeypatch.setattr(Decoder, "_step", checked)


@on_a_cpu
@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("method", ["quest", "ada+quest"])
def test_rows_that_wait_are_moved_too(rng: random.Random, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded one at a time, a row that has grown must not leave the others in storage that is gone."""
    monkeypatch.setattr(model_decoding, "RESERVE", 2)
    monkeypatch.setattr(decoding, "LEAST_GROWTH", 4)
    prompts = prompts_of(rng, 4)
    texts = generate(lm_of("llama", **METHODS[method]), prompts, max_gen_toks=20)
    monkeypatch.setattr(Decoder, "_goes_together", lambda self, rows: False)
    assert generate(lm_of("llama", **METHODS[method], batch_size=4), prompts, max_gen_toks=20) == texts


@on_a_cpu
@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reserve", [3, 5])
def test_a_row_that_ends_where_room_does(
    rng: random.Random, method: str, reserve: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are left are one row fewer, which is tried out first: that step needs room, too."""
    prompts = [words(rng, 90)] + prompts_of(rng, 4, 20, 80)
    lm = lm_of("llama", **METHODS[method])
    longest = max(len(lm.tok_encode(prompt)) for prompt in prompts)
    options = {"max_length": longest + reserve + 1}
    texts = generate(lm, prompts, **options)
    monkeypatch.setattr(model_decoding, "RESERVE", reserve)
    monkeypatch.setattr(decoding, "LEAST_GROWTH", 4)
    lm = lm_of("llama", **METHODS[method], batch_size=5)
    found = generate(lm, prompts, **options)
    assert found == texts and all_stats(found) == all_stats(texts)


def test_no_room_for_an_answer(rng: random.Random) -> None:
    with pytest.raises(UserError, match="max_length=10 leaves a prompt of .* no room"):
        generate(lm_of("llama"), [words(rng, 80)], max_length=10)


@pytest.mark.parametrize("method", METHODS)
def test_memory_held_is_what_is_accounted(rng: random.Random, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of the pools = bytes counted of every row + the room that is left for its answer."""
    lm = lm_of("llama", **METHODS[method], batch_size=4)
    length, reserve, seen = 150, 9, []
    run = Decoder.run

    def inspect(decoder: Decoder, rows: list[Any]) -> None:
        config = lm.model.config
        per_token = 2 * config.num_key_value_heads * config.head_dim * 2 * config.num_hidden_layers
        for row in rows:
            row.counts.figures()  # settle
        counted = sum(float(layer[0].sum()) for row in rows for layer in row.counts.kv.values())
        room = len(rows) * reserve * per_token
        bounds = sum(tensor.nbytes for pool in decoder.pools for tensor in pool.tensors.values())
        page = lm.runtime.plan.decode.method.page_size if lm.runtime.plan.decode else 0
        lengths = [int(n) for row in rows for held in row.held for n in held.lengths]
        each = 2 * config.head_dim * 2
        counted_pages = sum(-(-n // page) for n in lengths) * each if page else 0
        # Bounds have room for the pages of the answer, too.
        held_pages = sum(-(-(n + reserve) // page) for n in lengths) * each if page else 0
        # Their number is known without waiting for the lengths to within a page of each sequence.
        more = len(lengths) * each if page else 0
        seen.append((decoder.held_bytes() - bounds, counted - counted_pages + room, bounds, held_pages, more))
        run(decoder, rows)

    monkeypatch.setattr(Decoder, "run", inspect)
    generate(lm, [words(rng, length)] * 4, max_gen_toks=reserve)
    ((held, expected, bounds, pages, more),) = seen
    assert held == expected and pages <= bounds <= pages + more


def test_storage_outlives_a_batch_and_no_call(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[int] = []
    run = Decoder.run
    monkeypatch.setattr(
        Decoder, "run", lambda self, rows: (places.append(self.pools[0].keys.data_ptr()), run(self, rows))[1]
    )
    lm = lm_of("llama", batch_size=2)
    generate(lm, prompts_of(rng, 6))
    assert len(places) == 3 and len(set(places)) == 1  # the longest prompts come first
    assert lm.decoding.decoder.held_bytes() == 0


# --- a budget that takes everything ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "shared"), [(torch.bfloat16, True), (torch.float32, False)])
def test_full_budget_is_dense_for_500_steps(rng: random.Random, dtype: torch.dtype, shared: bool) -> None:
    prompts = prompts_of(rng, 2, 20, 200)
    options = {"max_gen_toks": 501, "min_new_tokens": 501}
    texts = generate(lm_of("llama", dtype, batch_size=2), prompts, **options)
    lm = lm_of("llama", dtype, batch_size=2, method="quest", budget=1024, share_pages=shared)
    found = generate(lm, prompts, **options)
    assert found == texts
    for stats in decode_stats(found):
        assert stats["calls"] == {"fallback": 500 * 2} and stats["executed_sparsity"] == 0


# --- running out of memory -------------------------------------------------------------------------------------------


def short_of(most: int, error: type[Exception] = torch.OutOfMemoryError) -> Callable[..., None]:
    run = Decoder.run

    def wrapper(decoder: Decoder, rows: list[Any]) -> None:
        if len(rows) > most:
            raise error("CUDA out of memory. Tried to allocate 20.00 GiB")
        run(decoder, rows)

    return wrapper


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 1.0}])
def test_a_batch_that_does_not_fit_is_halved(
    rng: random.Random, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = prompts_of(rng, 11)
    texts = generate(lm_of("llama", method="quest", budget=32), prompts, **options)
    monkeypatch.setattr(Decoder, "run", short_of(2))
    lm = lm_of("llama", method="quest", budget=32, batch_size=8)
    with caplog.at_level(logging.WARNING):
        found = generate(lm, prompts, **options)
    assert found == texts and all_stats(found) == all_stats(texts)
    assert lm.report()["batches_halved"] == 2
    assert "with 8 prompts side by side" in caplog.text and "trying again with 4" in caplog.text
    assert "trying again with 2" in caplog.text and lm.report()["prompts"] == 11


@on_a_cpu
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 1.0}])
def test_memory_that_runs_out_in_the_middle(
    rng: random.Random, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was recorded of steps until then is not taken for that of the steps that follow."""
    prompts = prompts_of(rng, 2, 100, 150)
    texts = generate(lm_of("llama", method="quest", budget=32), prompts, **options)
    step, steps = Decoder._step, itertools.count()

    def short(decoder: Decoder) -> None:
        step(decoder)
        if len(decoder._batch) > 1 and next(steps) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Decoder, "_step", short)
    lm = lm_of("llama", method="quest", budget=32, batch_size=2)
    found = generate(lm, prompts, **options)
    assert lm.report()["batches_halved"] == 1
    assert found == texts and all_stats(found) == all_stats(texts)


def test_a_single_prompt_that_does_not_fit(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "run", short_of(0))
    with pytest.raises(UserError, match="memory ran out with a single prompt of .* tokens"):
        generate(lm_of("llama", batch_size=2), prompts_of(rng, 2))


def test_other_errors_are_not_taken_for_want_of_memory(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(decoder: Decoder, rows: list[Any]) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Decoder, "run", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        generate(lm_of("llama", batch_size=2), prompts_of(rng, 2))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert out_of_memory(torch.OutOfMemoryError("any")) and not out_of_memory(RuntimeError("shapes"))


# --- batch_size=auto -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "snapkv"])
def test_the_memory_model_knows_what_rows_hold(
    rng: random.Random, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lm_of("gemma3", **METHODS[method], batch_size=3)
    length, held = 140, []
    run = Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda self, rows: (held.append(self.held_bytes()), run(self, rows))[1])
    prompts = [words(rng, length)] * 3
    tokens = len(lm.tok_encode(prompts[0]))
    generate(lm, prompts, max_gen_toks=7)
    assert held == [3 * lm.decoding.memory.row(tokens, 7, lm.runtime.plan)]


def test_auto_takes_what_fits(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_of("llama", batch_size="auto")
    plan, lengths = lm.runtime.plan, [4000, 3000, 3000, 2000, 1000]
    need = [lm.decoding.memory.row(length, 64, plan) for length in lengths]
    for number in range(1, 6):
        enough = (lm.decoding.memory.prefill(4000) + sum(need[:number])) / 0.8
        monkeypatch.setattr(MemoryModel, "free", lambda self, enough=enough: enough + 16)
        assert lm.decoding.memory.rows(lengths, 64, plan) == number
        monkeypatch.setattr(MemoryModel, "free", lambda self, enough=enough: enough - 16)
        assert lm.decoding.memory.rows(lengths, 64, plan) == max(1, number - 1)
    rows: list[int] = []
    run = Decoder.run
    monkeypatch.setattr(Decoder, "run", lambda self, batch: (rows.append(len(batch)), run(self, batch))[1])
    prompts = prompts_of(rng, 5)
    monkeypatch.setattr(MemoryModel, "free", lambda self: 1 << 34)
    texts = generate(lm, prompts)
    monkeypatch.setattr(MemoryModel, "free", lambda self: 0)
    assert rows == [5] and generate(lm, prompts) == texts and rows == [5] + [1] * 5


@pytest.mark.parametrize("batch_size", ["auto", "auto:4", 3])
def test_auto_means_the_same_answers(rng: random.Random, batch_size: Any) -> None:
    prompts = prompts_of(rng, 6)
    lm = lm_of("qwen3", **METHODS["ada+quest"], batch_size=batch_size, max_batch_size=4)
    assert generate(lm, prompts) == generate(lm_of("qwen3", **METHODS["ada+quest"]), prompts)


# --- when an answer ends ---------------------------------------------------------------------------------------------


def test_stop_strings_as_lm_eval(rng: random.Random) -> None:
    tokenizer = tiny.tiny_tokenizer()
    for _ in range(60):
        until = [words(rng, rng.randint(1, 4)) for _ in range(rng.randint(1, 3))]
        stop = Stop(tokenizer, Stop.lookback(tokenizer, until), set(), 10**6)
        theirs = [MultiTokenEOSCriteria(text, tokenizer, 0, 1) for text in until]
        tokens: list[int] = []
        for _ in range(40):
            tokens.append(rng.choice(tokenizer(words(rng, 3)).input_ids))
            expected = any(criterion(torch.tensor([tokens]), None) for criterion in theirs)
            assert stop(tokens) == expected
            if expected:
                break


def test_ends_and_limits() -> None:
    stop = Stop(tiny.tiny_tokenizer(), {}, {5, 7}, 3)
    assert [stop(tokens) for tokens in ([1], [5], [1, 7], [1, 5, 2], [7, 1])] == [False, True, True, True, False]


# --- sampling --------------------------------------------------------------------------------------------------------

SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 20, "max_gen_toks": 10}


def test_sampled_answers_do_not_feel_their_neighbours(rng: random.Random) -> None:
    prompts = prompts_of(rng, 5)
    texts = generate(lm_of("llama"), prompts, **SAMPLED)
    found = generate(lm_of("llama", batch_size=5), [*prompts[::-1]], **SAMPLED)
    assert found[::-1] == texts
    assert generate(lm_of("llama"), prompts[2:3], **SAMPLED) == texts[2:3]


def test_repetitions_of_a_prompt_differ(rng: random.Random) -> None:
    (prompt,) = prompts_of(rng, 1)
    texts = generate(lm_of("llama", batch_size=3), [prompt] * 6, **SAMPLED)
    assert len(set(texts)) > 3
    assert Counter(generate(lm_of("llama"), [prompt] * 6, **SAMPLED)) == Counter(texts)


def test_draws_have_the_distribution_asked_for(rng: random.Random) -> None:
    """A chi-square test of 4000 first draws against the processed softmax."""
    lm = lm_of("llama", torch.float32)
    logits = torch.randn(lm.model.config.vocab_size, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    sampling = Sampling.of(lm.model, {"do_sample": True, "temperature": 0.8, "top_k": 12}, lm.device)
    ids, met = torch.tensor([[3, 5, 8]], device=DEVICE), Counter()
    draws = Counter(sampling.row(ids, met)(logits.to(DEVICE), []) for _ in range(4000))
    best = logits.topk(12).indices
    expected = (logits[best] / 0.8).softmax(-1) * 4000
    assert set(draws) <= set(best.tolist())
    observed = torch.tensor([float(draws[int(token)]) for token in best])
    # 11 degrees of freedom: above 45 once in 200,000 runs.
    assert float(((observed - expected) ** 2 / expected).sum()) < 45


# --- what transformers decodes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("llama", {"num_beams": 2}, "generation by beam_search"),
        ("llama", {"max_time": 1000.0}, "generation arguments max_time"),
        ("lfm2", {}, "the model keeps more than keys and values"),
        ("deepseek_v3", {}, "is given other keys and values"),
    ],
)
def test_what_is_not_decoded_here_is_counted(
    rng: random.Random, family: str, options: dict[str, Any], reason: str
) -> None:
    prompts = prompts_of(rng, 3)
    lm = lm_of(family, torch.float32, batch_size=3)
    found = generate(lm, prompts, **options)
    assert found == generate(lm_of(family, torch.float32), prompts, **options)
    decode = lm.report()["phases"]["decode"]
    assert set(decode["loops"]) == {"transformers"} and reason in next(iter(decode["loop_reasons"]))


def test_a_model_whose_decoding_goes_wrong_is_left_to_transformers(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token decoded must be that of the model's own attention."""
    prompts = prompts_of(rng, 2)
    texts = generate(lm_of("llama", torch.float32), prompts)

    def shifted(layer: Any, rows: int) -> RaggedKV:
        kv = kv_of(layer, rows)
        return RaggedKV(kv.keys, kv.values.flip(0), kv.starts, kv.lengths, kv.longest)

    kv_of = decoding.DecodeLayer.kv
    monkeypatch.setattr(decoding.DecodeLayer, "kv", shifted)
    lm = lm_of("llama", torch.float32)
    assert generate(lm, prompts) == texts
    assert "off transformers' own" in next(iter(lm.report()["phases"]["decode"]["loop_reasons"]))


@on_a_cpu
def test_positions_are_those_of_the_prompt(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    step = Decoder._step

    def noted(self: Decoder) -> None:
        seen.append((self.positions.clone(), self.alive.clone()))
        step(self)

    monkeypatch.setattr(Decoder, "_step", noted)
    prompt = words(rng, 50)
    lm = lm_of("llama", torch.float32)
    generate(lm, [prompt], max_gen_toks=5)
    length = len(lm.tok_encode(prompt))
    assert [int(positions[0]) for positions, _ in seen[-4:]] == list(range(length, length + 4))
