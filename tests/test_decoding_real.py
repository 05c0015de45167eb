"""The embedded model decodes the same tokens alone and side by side, with and without CUDA graphs.

On a CUDA device with 200 prompts; on a CPU with a few, and with as many as LM_EVAL_SPARSE_PROMPTS says.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from decoding_lms import all_stats, generate

from lm_eval_sparse.model import decoding as model_decoding
from lm_eval_sparse.model import embedded
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.runtime import decoder as decoding
from lm_eval_sparse.runtime.decoder import Decoder

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NUMBER = int(os.environ.get("LM_EVAL_SPARSE_PROMPTS") or (200 if ON_GPU else 6))
LONGEST = 900 if ON_GPU or NUMBER >= 200 else 150
ANSWER = 48 if ON_GPU else 10

METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "quest": {"method": "quest", "sparsity": 0.6},
    "all": {"method": "flexprefill+ada_snapkv+quest", "sparsity": 0.5},
}
WORDS = tiny.WORDS


def prompts_of(number: int, longest: int = LONGEST) -> list[str]:
    rng = random.Random(random.SystemRandom().randrange(2**32))
    kinds = ("Continue: {}", "Write a list of words like {}.", "Question: what is {}?\nAnswer:", "{}")
    return [rng.choice(kinds).format(" ".join(rng.choices(WORDS, k=rng.randint(1, longest)))) for _ in range(number)]


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    yield
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def lm_of(**options: Any) -> SparseHFLM:
    return SparseHFLM(pretrained=str(embedded.ensure()), device=DEVICE, **options)


@pytest.mark.parametrize("method", METHODS if ON_GPU else ["all"])
def test_tokens_do_not_depend_on_the_batch(method: str) -> None:
    prompts = prompts_of(NUMBER)
    options = {"until": ["\n\n", "."], "max_gen_toks": ANSWER}
    alone = generate(lm_of(**METHODS[method]), prompts, **options)
    assert len({len(text) for text in alone}) > NUMBER // 8
    for batch_size in (8, 32) if ON_GPU else (5,):
        lm = lm_of(**METHODS[method], batch_size=batch_size)
        found = generate(lm, prompts, **options)
        assert found == alone and all_stats(found) == all_stats(alone)
        decode = lm.report()["phases"]["decode"]
        assert set(decode["loops"]) == {"cuda_graph" if ON_GPU else "eager"} and "loop_reasons" not in decode


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_do_not_depend_on_the_graph(method: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(NUMBER if batch_size == 8 else 20)
    options = {"until": ["\n\n", "."], "max_gen_toks": ANSWER}
    captured = generate(lm_of(**METHODS[method], batch_size=batch_size), prompts, **options)
    monkeypatch.setattr(Decoder, "_graph", lambda self: None)
    lm = lm_of(**METHODS[method], batch_size=batch_size)
    eager = generate(lm, prompts, **options)
    assert set(lm.report()["phases"]["decode"]["loops"]) == {"eager"}
    assert captured == eager and all_stats(captured) == all_stats(eager)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
def test_full_budget_is_dense_for_500_steps(shared: bool) -> None:
    prompts = prompts_of(8)
    options = {"max_gen_toks": 501, "min_new_tokens": 501}
    dense = generate(lm_of(batch_size=8), prompts, **options)
    found = generate(lm_of(batch_size=8, method="quest", budget=8192, share_pages=shared), prompts, **options)
    assert found == dense
    for text in found:
        assert text.stats["decode"]["calls"] == {"fallback": 500 * 30}


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_answers_longer_than_their_room(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(6)
    texts = generate(lm_of(**METHODS[method], batch_size=6), prompts, max_gen_toks=90)
    monkeypatch.setattr(model_decoding, "RESERVE", 8)
    monkeypatch.setattr(decoding, "LEAST_GROWTH", 16)
    captures: list[int] = []
    capture = Decoder._capture
    monkeypatch.setattr(Decoder, "_capture", lambda self: (captures.append(1), capture(self))[1])
    found = generate(lm_of(**METHODS[method], batch_size=6), prompts, max_gen_toks=90)
    assert found == texts and len(captures) >= 3


@pytest.mark.gpu
def test_a_step_is_captured_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[int] = []
    capture = Decoder._capture
    monkeypatch.setattr(Decoder, "_capture", lambda self: (captures.append(self._bucket), capture(self))[1])
    generate(lm_of(batch_size=4), prompts_of(12), max_gen_toks=10, min_new_tokens=10)
    assert captures == [4]


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["snapkv", "ada_snapkv"])
def test_memory_after_eviction_is_what_is_counted(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device has allocated for keys and values, against the figures of the results."""
    lm, found = lm_of(method=method, sparsity=0.5, batch_size=4), []
    run = Decoder.run

    def inspect(decoder: Decoder, rows: list[Any]) -> None:
        for row in rows:
            row.counts.figures()
        counted = sum(float(layer[0].sum()) for row in rows for layer in row.counts.kv.values())
        text = lm.model.config
        per_token = 2 * text.num_key_value_heads * 64 * 2 * text.num_hidden_layers
        gc.collect()
        found.append((torch.cuda.memory_allocated() - before, counted + len(rows) * decoder.reserve * per_token))
        run(decoder, rows)

    monkeypatch.setattr(Decoder, "run", inspect)
    lm.decoding.get()
    gc.collect()
    before = torch.cuda.memory_allocated()
    (prompt,) = prompts_of(1, 3000)
    prompt = (prompt + " river stone" * 7000)[:32000]
    generate(lm, [prompt] * 4, max_gen_toks=8)
    ((held, expected),) = found
    # The allocator may give each of the 60 large tensors up to a MiB more than it asks for.
    assert (200 << 20) < expected <= held <= expected * 1.2


@pytest.mark.gpu
def test_a_device_that_is_too_small_halves_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    prompts = [("river stone " * 3500)[: 30000 + 10 * n] for n in range(16)]
    texts = generate(lm_of(), prompts, max_gen_toks=6)
    lm = lm_of(batch_size=16)
    gc.collect()
    torch.cuda.empty_cache()
    need = lm.decoding.memory.row(6000, 6, lm.runtime.plan)
    free, total = torch.cuda.mem_get_info()
    limit = torch.cuda.memory_allocated() + lm.decoding.memory.prefill(6000) + 10 * need
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        found = generate(lm, prompts, max_gen_toks=6)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found == texts and lm.report()["batches_halved"] >= 1 and "trying again with" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"do_sample": True, "temperature": 0.8}, {"repetition_penalty": 1.3}])
def test_chosen_tokens_with_graphs(options: dict[str, Any]) -> None:
    prompts = prompts_of(10)
    alone = generate(lm_of(), prompts, max_gen_toks=24, **options)
    lm = lm_of(batch_size=8)
    assert generate(lm, prompts, max_gen_toks=24, **options) == alone
    assert set(lm.report()["phases"]["decode"]["loops"]) == {"cuda_graph"}
