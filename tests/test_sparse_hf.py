"""`sparse-hf` on tiny random models: equal to `hf` when dense, and the same for every batch when sparse.

Long, since one saved model and its tasks serve all cases.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import tiny
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from small_lms import CONTINUATIONS, PAIRS, PROMPTS, generate, request, score, sparse

from lm_eval_sparse import __version__, patches
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.model.decoding import Decoding
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.model.scoring import Scorer
from lm_eval_sparse.protocol import MeasuredFloat, MeasuredLoglikelihood, MeasuredText, SharedPrompt, stats_of
from lm_eval_sparse.runtime.interface import IMPLEMENTATION

patches.install()

REPOSITORY = Path(__file__).resolve().parent.parent
#: Small blocks and no floor, so that prompts of 100 tokens are sparse; `gather` needs no compiler.
FLEX: dict[str, Any] = {
    "method": "flexprefill", "gamma": 0.5, "min_budget": 0, "block_size": 16, "backend": "gather"
}  # fmt: skip
HALF: dict[str, Any] = {"method": "flexprefill", "sparsity": 0.5, "backend": "gather"}
BRIEF = [tiny.words(seed, count) for seed, count in enumerate((30, 90, 9, 55, 31))]
BRIEF_PAIRS = [(prompt, continuation) for prompt in BRIEF for continuation in CONTINUATIONS]


@pytest.fixture(scope="module", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Asks a dozen programs about this machine, which takes most of a tiny evaluation.
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def templated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama whose tokenizer has a chat template; its path holds none of the words that lm-eval looks for."""
    return str(tiny.tiny_llama(tmp_path_factory.mktemp("templated"), chat=True))


def evaluate(folder: Path, names: str | list[str], args: Any, *, model: Any = "sparse-hf", **options: Any) -> Any:
    """`simple_evaluate` as from Python; `hf` alone has to be told its device."""
    if model == "hf":
        options.setdefault("device", "cpu")
    names = names.split(",") if isinstance(names, str) else names
    manager = tiny.manager(folder)
    return lm_eval.simple_evaluate(
        model=model, model_args=args, tasks=names, task_manager=manager, bootstrap_iters=0, **options
    )


@torch.no_grad()
def reference(model: torch.nn.Module, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Log-likelihoods by the book: one unpadded forward pass of the model's own attention for each pair."""
    tokenizer = tiny.tiny_tokenizer()
    answers = []
    for context, continuation in pairs:
        start, ids = len(tokenizer(context).input_ids), tokenizer(context + continuation).input_ids
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        tokens = range(start, len(ids))
        total = sum(float(logprobs[i - 1, ids[i]]) for i in tokens)
        answers.append((total, all(int(logprobs[i - 1].argmax()) == ids[i] for i in tokens)))
    return answers


def assert_same_scores(found: list[Any], expected: list[Any]) -> None:
    assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in expected], abs=1e-4)
    assert [bool(answer[1]) for answer in found] == [bool(answer[1]) for answer in expected]


def responses(results: Any, task: str) -> list[Any]:
    """What the model answered, in the order of documents and requests."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for requests in sample["resps"] for response in requests]


# --- dense: what `hf` gives ------------------------------------------------------------------------------------------

ALL = "tiny_generate,tiny_loglikelihood,tiny_choice,tiny_rolling"


@pytest.fixture(scope="module")
def by_hf(tasks: Path, llama: str) -> Any:
    return evaluate(tasks, ALL, {"pretrained": llama, "dtype": "float32"}, model="hf", batch_size=1)


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_dense_equals_hf_on_all_output_types(tasks: Path, llama: str, by_hf: Any, batch_size: Any) -> None:
    args = {"pretrained": llama, "dtype": "float32", "method": "dense"}
    results = evaluate(tasks, ALL, args, batch_size=batch_size)
    assert_same_results(results, by_hf)


def assert_same_results(results: Any, expected: Any) -> None:
    for task, metrics in expected["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert results["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)
            else:
                assert results["results"][task][name] == value
    for task in ("tiny_loglikelihood", "tiny_choice"):
        assert_same_scores(responses(results, task), responses(expected, task))
    assert responses(results, "tiny_generate") == responses(expected, "tiny_generate")
    assert responses(results, "tiny_rolling") == pytest.approx(responses(expected, "tiny_rolling"), abs=1e-3)


def test_dense_equals_hf_when_texts_are_longer_than_the_model(tasks: Path, llama: str) -> None:
    args = {"pretrained": llama, "dtype": "float32", "max_length": 64}
    expected = evaluate(tasks, ALL, args, model="hf", batch_size=1)
    for batch_size in (1, 4):
        assert_same_results(evaluate(tasks, ALL, {**args, "method": "dense"}, batch_size=batch_size), expected)


def test_arguments_as_a_string_and_without_a_method(tasks: Path, llama: str, by_hf: Any) -> None:
    results = evaluate(tasks, ALL, f"pretrained={llama},dtype=float32", batch_size=4)
    assert_same_results(results, by_hf)
    block = results["config"]["sparse"]
    assert block["method"] == "dense" and block["requested_sparsity"] is None
    assert block["phases"]["prefill"]["calls"]["fallback"] == block["phases"]["prefill"]["calls"]["sparse"] == 0


@pytest.mark.parametrize("sliding", [24, None])
def test_chat_template_system_instruction_and_gen_kwargs_equal_hf(
    tasks: Path, templated: str, sliding: int | None
) -> None:
    options: dict[str, Any] = {
        "apply_chat_template": True,
        "system_instruction": "speak of silver clouds",
        "gen_kwargs": "max_gen_toks=5,until=a",
        "limit": 3,
        "num_fewshot": 0,
    }
    if sliding:
        options |= {"system_instruction": None, "gen_kwargs": {"max_gen_toks": 4}}
    args = {"pretrained": templated, "dtype": "float32"}
    expected = evaluate(tasks, ALL, args, model="hf", **options)
    results = evaluate(tasks, ALL, args, **options)
    assert_same_results(results, expected)
    prompts = [sample["arguments"] for sample in results["samples"]["tiny_generate"]]
    assert prompts == [sample["arguments"] for sample in expected["samples"]["tiny_generate"]]


# --- model families --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_scores_equal_brute_force(name: str) -> None:
    """Continuations of one and of several tokens, alone and left-padded, against the model's eager attention."""
    own = tiny.family(name)
    own.set_attn_implementation("eager")
    expected = reference(own, BRIEF_PAIRS)
    for batch_size in (1, 4):
        found = score(sparse(tiny.family(name), batch_size=batch_size), BRIEF_PAIRS)
        assert [a[0] for a in found] == pytest.approx([a[0] for a in expected], abs=5e-4)
        assert [a[1] for a in found] == [a[1] for a in expected]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_generation_equals_transformers(name: str) -> None:
    own, tokenizer = tiny.family(name), tiny.tiny_tokenizer()
    own.set_attn_implementation("eager")
    expected = []
    for prompt in BRIEF:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        out = own.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    for batch_size in (1, 5):
        assert generate(sparse(tiny.family(name), batch_size=batch_size), BRIEF) == expected


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3"])
@torch.no_grad()
def test_logits_of_rows(name: str) -> None:
    """The attention function alone, without a cache: each row by itself as eager attention has it, padded ones refused.

    Several prompts of different lengths run one after the other, so that none is ever padded.
    """
    own = tiny.family(name)
    own.set_attn_implementation("eager")
    lm = sparse(tiny.family(name))
    rows = [lm.tok_encode(prompt) for prompt in BRIEF]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with pytest.raises(UserError, match="a prompt is padded"):
        lm.model(input_ids=ids, attention_mask=mask, position_ids=positions)
    for row in rows:
        found, expected = (model(torch.tensor([row])).logits[0] for model in (lm.model, own))
        assert found.isfinite().all() and torch.allclose(found, expected, atol=1e-4)


# --- scoring ---------------------------------------------------------------------------------------------------------


def count_runs(lm: SparseHFLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes of token ids that the model is run on from here on."""
    seen: list[tuple[int, int]] = []
    forward = lm.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", counted)
    return seen


def test_requests_that_share_a_context_prefill_it_once(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = sparse(llama)
    expected = score(lm, PAIRS)
    runs = count_runs(lm, monkeypatch)
    # Interleaved: the requests of a context need not follow each other.
    order = sorted(range(len(PAIRS)), key=lambda index: PAIRS[index][1])
    found = score(lm, [PAIRS[index] for index in order])
    assert_same_scores(found, [expected[index] for index in order])
    lengths = [len(lm.tok_encode(prompt)) for prompt in PROMPTS]
    prefills = [length for _, length in runs if length > 50]
    assert sorted(prefills) == sorted(lengths)


def test_a_target_that_another_begins_with_needs_no_run(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = sparse(llama)
    nested = [(PROMPTS[0], " river"), (PROMPTS[0], " river stone cloud"), (PROMPTS[0], " river stone")]
    expected = [score(lm, [pair])[0] for pair in nested]
    runs = count_runs(lm, monkeypatch)
    assert_same_scores(score(lm, nested), expected)
    assert len(runs) == 2
    assert_same_scores(score(lm, [*nested, *nested[::-1]]), [*expected, *expected[::-1]])


def test_one_token_after_the_context_needs_the_prefill_only(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = sparse(llama)
    (token,) = lm.tok_encode(" apple")
    assert token
    runs = count_runs(lm, monkeypatch)
    score(lm, [(PROMPTS[0], " apple")])
    assert [length for _, length in runs] == [len(lm.tok_encode(PROMPTS[0]))]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_shared_prompt_equals_plain_prompt(llama: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = sparse(llama, batch_size=batch_size)
    answer = " seven: river. The second is green"
    texts = [prompt + answer for prompt in PROMPTS] + [PROMPTS[0] + answer + answer]
    pairs = [(text, continuation) for text in texts for continuation in CONTINUATIONS]
    expected = score(lm, pairs)
    lengths = [len(prompt) for prompt in [*PROMPTS, PROMPTS[0]]]
    shared = [
        (SharedPrompt(text, length), continuation)
        for text, length in zip(texts, lengths, strict=True)
        for continuation in CONTINUATIONS
    ]
    runs = count_runs(lm, monkeypatch)
    assert_same_scores(score(lm, shared), expected)
    if batch_size == 1:
        assert sum(length > 50 for _, length in runs) == len(PROMPTS)
    # The whole text may be the prompt, the prompt may be empty, and it may end inside a token.
    for cut in (len(texts[0]), 0, 3, len(PROMPTS[0]) - 2):
        found = score(lm, [(SharedPrompt(texts[0], cut), " apple tree")])
        assert_same_scores(found, score(lm, [(texts[0], " apple tree")]))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_odd_requests_equal_hf(llama: str, batch_size: int) -> None:
    """Empty contexts, whitespace at the seam, one-token contexts, a context that is not aligned with tokens."""
    hf = HFLM(pretrained=llama, device="cpu", dtype="float32")
    lm = sparse(llama, batch_size=batch_size)
    pairs = [("", " apple"), ("", "river stone"), ("", "</s>"), ("", "</s> apple"), ("a", "b"), ("river ", "stone"),
             ("river", "stone"), ("ri", "ver stone"), ("<s>river", " stone"), ("river\n", "\nstone"),
             ("", tiny.words(1, 30)), (BRIEF[0], " " + tiny.words(2, 60))]  # fmt: skip
    # One by one: `hf` confuses some of these when it is given them together.
    expected = [score(hf, [pair])[0] for pair in pairs]
    assert_same_scores([score(lm, [pair])[0] for pair in pairs], expected)
    assert_same_scores(score(lm, pairs), expected)


@pytest.mark.parametrize("context", [" ", "\n", "  \n"])
def test_context_of_nothing_but_space(llama: str, context: str) -> None:
    """lm-eval moves it into the continuation, which leaves no context; `hf` refuses, so a part must not be scored."""
    hf, lm = HFLM(pretrained=llama, device="cpu", dtype="float32"), sparse(llama)
    pair = (context, " apple tree unusual")
    with pytest.raises(AssertionError):
        score(hf, [pair])
    try:
        found = score(lm, [pair])
    except (UserError, AssertionError):
        return
    assert_same_scores(found, score(lm, [("", "".join(pair))]))


@pytest.mark.parametrize("pair", [("apple", ""), ("", "<s>")])
def test_nothing_to_score(llama: str, pair: tuple[str, str]) -> None:
    """`hf` fails on an assertion; a bare StopIteration says nothing, and inside a generator it ends the run early."""
    with pytest.raises((UserError, AssertionError)):
        score(sparse(llama), [pair])


def test_context_is_cut_from_the_left_as_in_hf(llama: str) -> None:
    hf = HFLM(pretrained=llama, device="cpu", dtype="float32", max_length=40)
    pairs = [*PAIRS, (PROMPTS[0], " " + tiny.words(9, 12)), ("apple", " " + tiny.words(9, 17))]
    expected = score(hf, pairs)
    for batch_size in (1, 4):
        assert_same_scores(score(sparse(llama, max_length=40, batch_size=batch_size), pairs), expected)


@pytest.mark.parametrize("context", ["", "apple", PROMPTS[0]])
def test_continuation_as_long_as_the_model(llama: str, context: str) -> None:
    """One that just fits is scored in full as `hf` does; a longer one cannot be, and must not be in part."""
    hf = HFLM(pretrained=llama, device="cpu", dtype="float32", max_length=32)
    lm = sparse(llama, max_length=32)
    fits = " " + tiny.words(3, 60)
    while len(lm.tok_encode(fits)) > 32:
        fits = fits[:-1]
    assert_same_scores(score(lm, [(context, fits)]), score(hf, [(context, fits)]))
    longer = fits + " " + tiny.words(4, 5)
    with pytest.raises((UserError, AssertionError)):
        score(hf, [(context, longer)])
    with pytest.raises((UserError, AssertionError)):
        score(lm, [(context, longer)])


def test_token_level_entry_point_equals_hf(llama: str) -> None:
    hf, lm = HFLM(pretrained=llama, device="cpu", dtype="float32"), sparse(llama, batch_size=2)
    requests = [(pair, lm.tok_encode(pair[0]), lm.tok_encode(pair[1])) for pair in PAIRS[:6]]
    assert_same_scores(lm._loglikelihood_tokens(requests, disable_tqdm=True), hf._loglikelihood_tokens(requests))


def test_rolling_equals_hf(llama: str) -> None:
    for max_length in (2048, 50):
        hf = HFLM(pretrained=llama, device="cpu", dtype="float32", max_length=max_length)
        requests = [request("loglikelihood_rolling", text) for text in [*PROMPTS, "apple", "river stone"]]
        expected = hf.loglikelihood_rolling(requests)
        found = sparse(llama, max_length=max_length).loglikelihood_rolling(requests, disable_tqdm=True)
        assert found == pytest.approx(expected, abs=1e-3)
        assert all(isinstance(value, float) and value.stats["sparsity"] == 0 for value in found)


# --- generation ------------------------------------------------------------------------------------------------------

GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "until": {"until": ["a", "st"], "max_gen_toks": 24},
    "until a word": {"until": " the"},
    "one token": {"max_gen_toks": 1},
    "max_new_tokens": {"max_new_tokens": 5},
    "penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "one of one": {"do_sample": True, "temperature": 0.7, "top_k": 1},
    "cold": {"temperature": 0.0, "do_sample": False},
    "beams": {"num_beams": 2},
    "beams and penalty": {"num_beams": 3, "length_penalty": 0.5, "repetition_penalty": 1.3},
    "chunks": {"prefill_chunk_size": 32},
}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_generation_arguments_equal_hf(llama: str, options: dict[str, Any], batch_size: int) -> None:
    options = {"until": [], "max_gen_toks": 6, **options}
    if "max_new_tokens" in options:
        del options["max_gen_toks"]
    requests = [request("generate_until", prompt, options) for prompt in BRIEF]
    texts = []
    for cls in (HFLM, SparseHFLM):
        lm = cls(pretrained=llama, device="cpu", dtype="float32", batch_size=batch_size)
        torch.manual_seed(7)
        texts.append(lm.generate_until(requests, disable_tqdm=True))
    assert texts[1] == texts[0]


def test_sampling_follows_the_seed(llama: str) -> None:
    lm = sparse(llama, **FLEX)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generate(lm, PROMPTS, do_sample=True, temperature=1.0))
    assert texts[0] == texts[1] != texts[2]


def test_requests_with_different_arguments_in_one_call(llama: str) -> None:
    lm = sparse(llama, batch_size=4)
    settings = [{"until": [], "max_gen_toks": 3}, {"until": ["e"], "max_gen_toks": 8}]
    mixed = [request("generate_until", prompt, settings[i % 2]) for i, prompt in enumerate(PROMPTS)]
    alone = [lm.generate_until([one], disable_tqdm=True)[0] for one in mixed]
    assert lm.generate_until(mixed, disable_tqdm=True) == alone


def test_generation_cuts_long_prompts_as_hf(llama: str) -> None:
    hf = HFLM(pretrained=llama, device="cpu", dtype="float32", max_length=40, batch_size=2)
    assert generate(sparse(llama, max_length=40, batch_size=2), PROMPTS) == generate(hf, PROMPTS)


# --- sparse ----------------------------------------------------------------------------------------------------------

METHODS = {"gamma": FLEX, "sparsity": HALF}
SPARSE_FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "phi3", "lfm2")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPARSE_FAMILIES)
def test_a_prompt_does_not_feel_its_neighbours(name: str, method: str) -> None:
    """Alone and in a batch of five of other lengths: the same text, likelihood and measured sparsity."""
    pairs = [(prompt, continuation) for prompt in PROMPTS for continuation in CONTINUATIONS[:2]]
    model = tiny.family(name)
    alone = sparse(model, **METHODS[method], batch_size=1)
    texts, scores = generate(alone, PROMPTS), score(alone, pairs)
    together = sparse(model, **METHODS[method], batch_size=5)
    texts5, scores5 = generate(together, PROMPTS), score(together, pairs)
    assert texts5 == texts
    assert_same_scores(scores5, scores)
    for one, other in [*zip(texts, texts5, strict=True), *zip(scores, scores5, strict=True)]:
        assert stats_of(one)["sparsity"] == stats_of(other)["sparsity"] > 0.02
        assert stats_of(one)["prefill"] == stats_of(other)["prefill"]
        assert stats_of(one)["prefill"]["calls"].get("fallback", 0) == 0
    # Scoring and generation prefill the same prompt with the same blocks.
    assert [stats_of(text)["sparsity"] for text in texts] == [stats_of(answer)["sparsity"] for answer in scores[::2]]
    if method == "sparsity":
        assert [stats_of(text)["sparsity"] for text in texts] == pytest.approx([0.5] * len(texts), abs=0.1)


def test_a_row_that_has_ended_is_not_counted_on(llama: str) -> None:
    """Decode steps after a row's stop string are its neighbours'; counting them makes its figures depend on those."""
    options = {"until": ["e", " "], "max_gen_toks": 20}
    alone = [text.stats["decode"] for text in generate(sparse(llama, **FLEX), PROMPTS, **options)]
    together = [text.stats["decode"] for text in generate(sparse(llama, **FLEX, batch_size=5), PROMPTS, **options)]
    assert len({str(stats["calls"]) for stats in alone}) > 1
    assert together == alone


def test_order_of_requests_does_not_matter(llama: str) -> None:
    lm = sparse(llama, **FLEX, batch_size=2)
    texts = generate(lm, PROMPTS)
    assert generate(lm, PROMPTS[::-1]) == texts[::-1]
    assert [text.stats for text in generate(lm, PROMPTS[::-1])] == [text.stats for text in texts[::-1]]


def test_sparse_attention_changes_the_answers(llama: str) -> None:
    """A guard for the tests around it: were nothing sparse, they would all pass."""
    dense, lossy = score(sparse(llama), PAIRS), score(sparse(llama, **{**FLEX, "gamma": 0.2}), PAIRS)
    assert max(abs(a[0] - b[0]) for a, b in zip(dense, lossy, strict=True)) > 0.1


@pytest.mark.parametrize("name", SPARSE_FAMILIES)
def test_full_budget_equals_dense(name: str) -> None:
    model = tiny.family(name)
    dense = sparse(model, batch_size=4)
    texts, scores = generate(dense, PROMPTS), score(dense, PAIRS)
    full = sparse(model, **{**FLEX, "gamma": 1}, batch_size=4)
    assert generate(full, PROMPTS) == texts
    found = score(full, PAIRS)
    assert_same_scores(found, scores)
    assert {stats_of(answer)["sparsity"] for answer in found} == {0}
    prefill = full.report()["phases"]["prefill"]
    assert prefill["backends"]["gather"] > 0 == prefill["calls"]["sparse"] < prefill["calls"]["fallback"]


@pytest.mark.parametrize("backend", ["naive", "gather"])
def test_backends_agree_and_are_named(llama: str, backend: str) -> None:
    lm = sparse(llama, **{**FLEX, "backend": backend})
    assert_same_scores(score(lm, PAIRS), score(sparse(llama, **FLEX), PAIRS))
    assert set(lm.report()["phases"]["prefill"]["backends"]) == {backend}


def test_window_layers_are_left_alone_and_listed(tasks: Path, tmp_path: Path) -> None:
    folder = tiny.tiny("gemma3", tmp_path / "model")
    block = evaluate(tasks, "tiny_choice", {"pretrained": str(folder), **FLEX}, limit=2)["config"]["sparse"]
    assert block["layers"]["sparse_eligible"] == 1
    assert {int(layer) for layer in block["layers"]["untouched"]} == {0, 2}
    assert all("24" in reason for reason in block["layers"]["untouched"].values())
    # Two documents of one context each, one eligible layer.
    assert block["phases"]["prefill"]["calls"] == {"sparse": 2, "dense": 0, "fallback": 0}


def test_linear_layers_are_listed() -> None:
    """Recurrent and convolution layers have nothing to skip."""
    lm = sparse(tiny.family("lfm2"), **FLEX)
    score(lm, PAIRS[:2])
    layers = lm.report()["layers"]
    assert layers["sparse_eligible"] == 1 and set(layers["untouched"]) == {0}


def test_the_sparse_block_of_the_results(tasks: Path, llama: str) -> None:
    results = evaluate(tasks, "tiny_choice,tiny_generate", {"pretrained": llama, **HALF, "dtype": "float32"}, limit=3)
    block = results["config"]["sparse"]
    json.dumps(block)
    assert (block["method"], block["requested_sparsity"], block["backend"]) == ("flexprefill", 0.5, "gather")
    prefill, decode = block["phases"]["prefill"], block["phases"]["decode"]
    assert (prefill["method"], prefill["requested_sparsity"]) == ("flexprefill", 0.5)
    assert (decode["method"], decode["requested_sparsity"]) == ("dense", None)
    for phase in (prefill, decode):
        for figure in ("selected_sparsity", "executed_sparsity", "bytes_read_fraction", "kv_memory_fraction"):
            assert 0 <= phase[figure] <= 2, figure
        assert phase["kv_memory_fraction"] == 1
    assert prefill["executed_sparsity"] == pytest.approx(0.5, abs=0.1)
    assert decode["executed_sparsity"] == 0 and decode["bytes_read_fraction"] == 1
    assert 0 < prefill["estimator_flops_fraction"] < 1
    # Two layers, two tasks, three documents.
    assert prefill["calls"] == {"sparse": 12, "dense": 0, "fallback": 0}
    assert prefill["backends"] == {"gather": 12} and decode["calls"]["dense"] > 0 == decode["calls"]["sparse"]
    assert {"gamma", "block_size"} <= set(prefill["knobs_solved"])
    assert block["prompts"] == 6 and set(block["tasks"]) == {"tiny_choice", "tiny_generate"}
    assert block["versions"]["lm_eval_sparse"] == __version__ and block["versions"]["lm_eval"].startswith("0.4")
    assert {"transformers", "torch", "python"} <= set(block["versions"]) and block["device"]
    for task in ("tiny_choice", "tiny_generate"):
        measured = []
        for sample in results["samples"][task]:
            json.dumps(sample["sparse"])
            assert 0 < sample["sparse"]["sparsity"] < 1
            measured.append(sample["sparse"]["sparsity"])
        mean = sum(measured) / len(measured)
        assert block["tasks"][task]["prefill"]["executed_sparsity"] == pytest.approx(mean)


def test_native_knobs_are_in_the_results(tasks: Path, llama: str) -> None:
    block = evaluate(tasks, "tiny_choice", {"pretrained": llama, **FLEX}, limit=1)["config"]["sparse"]
    assert block["requested_sparsity"] is None
    expected = {"gamma": 0.5, "tau": 0.1, "min_budget": 0, "max_budget": None, "block_size": 16}
    assert block["knobs"] == {"flexprefill": {**expected, "coverage": "blocks"}}


def test_measured_sparsity_is_what_the_layout_says(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted again from the block layouts, pair by pair."""
    from lm_eval_sparse.methods.prefill.flexprefill import FlexPrefill

    lm, layouts = sparse(llama, **FLEX), []
    select = FlexPrefill.select

    def noted(self: FlexPrefill, *args: Any, **kwargs: Any) -> Any:
        layouts.append(selection := select(self, *args, **kwargs))
        return selection

    monkeypatch.setattr(FlexPrefill, "select", noted)
    (answer,) = score(lm, [PAIRS[0]])
    length = len(lm.tok_encode(PROMPTS[0]))
    shares = []
    for selection in layouts:
        tokens = selection.mask().repeat_interleave(16, -1).repeat_interleave(16, -2)
        pairs = int(tokens[..., :length, :length].tril().sum())
        shares.append(1 - pairs / (4 * length * (length + 1) / 2))
    assert len(shares) == 2
    assert stats_of(answer)["sparsity"] == pytest.approx(sum(shares) / 2)


@pytest.mark.parametrize("task", tiny.TASKS)
def test_every_logged_sample_has_its_own_figure(tasks: Path, llama: str, task: str) -> None:
    results = evaluate(tasks, task, {"pretrained": llama, **FLEX})
    figures = [sample["sparse"]["sparsity"] for sample in results["samples"][task]]
    assert len(figures) == len(tiny.LENGTHS) and len(set(figures)) > 3
    short = tiny.LENGTHS.index(9)
    by_document = {sample["doc_id"]: sample["sparse"]["sparsity"] for sample in results["samples"][task]}
    assert by_document[short] == 0 and by_document[4] > 0.1


def test_no_sample_figures_for_hf(tasks: Path, llama: str) -> None:
    results = evaluate(tasks, "tiny_choice", {"pretrained": llama}, model="hf", limit=1)
    assert "sparse" not in results["samples"]["tiny_choice"][0] and "sparse" not in results["config"]


# --- carried through lm-eval -----------------------------------------------------------------------------------------


def test_responses_survive_pickling(llama: str) -> None:
    lm = sparse(llama, **FLEX)
    rolling = lm.loglikelihood_rolling([request("loglikelihood_rolling", PROMPTS[0])], disable_tqdm=True)
    kinds = [MeasuredText, MeasuredLoglikelihood, MeasuredFloat]
    for answer, kind in zip([*generate(lm, PROMPTS[:1]), *score(lm, PAIRS[:1]), *rolling], kinds, strict=True):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            copy = pickle.loads(pickle.dumps(answer, protocol))
            assert type(copy) is type(answer) is kind and copy == answer
            assert copy.stats == answer.stats and copy.stats["sparsity"] > 0
        json.dumps(answer.stats)
    prompt = pickle.loads(pickle.dumps(SharedPrompt("river stone", 5)))
    assert prompt == "river stone" and prompt.shared == 5


def samples_of(results: Any) -> dict[str, list[Any]]:
    """Samples without what the cache may change: the name of the run that made an answer."""
    kept = {}
    for task, samples in results["samples"].items():
        kept[task] = [{key: sample[key] for key in ("doc_id", "resps", "filtered_resps")} for sample in samples]
        for mine, sample in zip(kept[task], samples, strict=True):
            requests = [{**request, "run": None} for request in sample["sparse"]["requests"]]
            mine["sparse"] = {**sample["sparse"], "requests": requests}
    return kept


def cached(tasks: Path, folder: Path, names: str, args: dict[str, Any]) -> Any:
    """Run twice with a response cache. The second run must not touch the model."""
    first = evaluate(tasks, names, args, use_cache=str(folder / "answers"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "score_context", None)
        patch.setattr(Decoding, "_decode", None)
        patch.setattr(SparseHFLM, "loglikelihood_rolling", None)
        return first, evaluate(tasks, names, args, use_cache=str(folder / "answers"))


@pytest.mark.parametrize("names", ["tiny_generate,tiny_loglikelihood,tiny_rolling", "tiny_choice"])
def test_samples_from_the_response_cache_are_identical(tasks: Path, llama: str, tmp_path: Path, names: str) -> None:
    first, second = cached(tasks, tmp_path, names, {"pretrained": llama, **FLEX})
    assert second["results"] == first["results"]
    figures = [[s["sparse"]["sparsity"] for s in group] for group in first["samples"].values()]
    assert [[s["sparse"]["sparsity"] for s in group] for group in second["samples"].values()] == figures
    assert samples_of(second) == samples_of(first)


def test_sparse_block_survives_the_response_cache(tasks: Path, llama: str, tmp_path: Path) -> None:
    """Proof that it ran, for a run answered from a cache: what was measured when the answers were made."""
    first, second = cached(tasks, tmp_path, "tiny_generate,tiny_loglikelihood", {"pretrained": llama, **FLEX})
    before, after = (results["config"]["sparse"]["phases"]["prefill"] for results in (first, second))
    assert after["executed_sparsity"] == pytest.approx(before["executed_sparsity"])
    assert after["calls"] == before["calls"]


def test_a_cache_that_is_half_full(tasks: Path, llama: str, tmp_path: Path) -> None:
    args, cache = {"pretrained": llama, **FLEX}, str(tmp_path / "answers")
    whole = evaluate(tasks, "tiny_loglikelihood", args)
    evaluate(tasks, "tiny_loglikelihood", args, use_cache=cache, limit=3)
    results = evaluate(tasks, "tiny_loglikelihood", args, use_cache=cache)
    assert samples_of(results) == samples_of(whole)


def test_predict_only_and_cached_requests(
    tasks: Path, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.caching import cache

    monkeypatch.setattr(cache, "PATH", str(tmp_path))
    args = {"pretrained": llama, **FLEX}
    plain = evaluate(tasks, ALL, args, limit=3)
    first = evaluate(tasks, ALL, args, limit=3, cache_requests=True)
    assert any(tmp_path.iterdir())
    again = evaluate(tasks, ALL, args, limit=3, cache_requests=True)
    assert samples_of(again) == samples_of(first) == samples_of(plain)
    bypassed = evaluate(tasks, "tiny_generate", args, limit=3, predict_only=True)
    samples = samples_of(bypassed)["tiny_generate"]
    assert [s["sparse"] for s in samples] == [s["sparse"] for s in samples_of(plain)["tiny_generate"]]
    assert bypassed["config"]["sparse"]["phases"]["prefill"]["calls"]["sparse"] == 6


def test_python_api_needs_no_device(tasks: Path, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hf` asserts for lack of CUDA; the caller's arguments are not changed either."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = {"pretrained": llama, **FLEX}
    given = dict(args)
    results = evaluate(tasks, ["tiny_choice"], args, limit=1)
    assert args == given
    assert results["config"]["model"] == "sparse-hf"
    assert results["config"]["sparse"]["phases"]["prefill"]["calls"]["sparse"] == 2


def test_model_object_and_its_dtype_and_length(llama: str) -> None:
    for dtype in ("float32", "bfloat16"):
        lm = sparse(llama, dtype=dtype, max_length=100, **FLEX)
        assert lm.model.dtype is getattr(torch, dtype) and lm.max_length == 100
        answers = score(lm, PAIRS[:4])
        assert all(answer[0] < 0 and stats_of(answer)["prefill"]["calls"] == {"sparse": 2} for answer in answers)
        # Cut to the model's length: 100 tokens with the continuation.
        assert generate(lm, PROMPTS[:1])[0].stats["sparsity"] is not None
    dense, exact = score(sparse(llama, dtype="bfloat16"), PAIRS), score(sparse(llama), PAIRS)
    assert [a[0] for a in dense] == pytest.approx([a[0] for a in exact], rel=0.1, abs=0.5)


def test_prebuilt_model_as_pretrained(tasks: Path, by_hf: Any) -> None:
    lm = sparse(tiny.family("llama"), dtype="float32", batch_size=4)
    assert lm.model.config._attn_implementation == IMPLEMENTATION
    results = evaluate(tasks, ALL, None, model=lm)
    assert_same_results(results, by_hf)
    assert results["config"]["sparse"]["method"] == "dense"


def test_prebuilt_model_in_the_python_api(tasks: Path, by_hf: Any) -> None:
    args = {"pretrained": tiny.family("llama"), "tokenizer": tiny.tiny_tokenizer()}
    assert_same_results(evaluate(tasks, ALL, args), by_hf)


def test_two_wrappers_of_one_model_keep_their_methods() -> None:
    """A sweep from Python: the weights are loaded once and wrapped once for each method."""
    model = tiny.family("llama")
    dense = sparse(model)
    expected = score(dense, PAIRS)
    lossy = sparse(model, **{**FLEX, "gamma": 0.2})
    changed = score(lossy, PAIRS)
    assert_same_scores(score(dense, PAIRS), expected)
    assert {stats_of(answer)["sparsity"] for answer in score(dense, PAIRS)} == {0}
    assert_same_scores(score(lossy, PAIRS), changed)


# --- the missing template --------------------------------------------------------------------------------------------


def template_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [message for message in messages if "template" in message]


@pytest.fixture
def listening(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The warnings about templates so far, lm-eval's included."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm_eval_sparse")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.propagate = True
    with caplog.at_level(logging.WARNING):
        yield lambda: template_warnings(caplog)
    for logger, value in zip(loggers, before, strict=True):
        logger.propagate = value


def test_template_warning_comes_once(tasks: Path, templated: str, listening: Callable[[], list[str]]) -> None:
    evaluate(tasks, ALL, {"pretrained": templated}, limit=2)
    (message,) = listening()
    assert "--apply_chat_template" in message and templated in message


def test_no_template_warning_when_applied(tasks: Path, templated: str, listening: Callable[[], list[str]]) -> None:
    evaluate(tasks, ALL, {"pretrained": templated}, limit=2, apply_chat_template=True)
    assert listening() == []


def test_no_template_warning_without_a_template(tasks: Path, llama: str, listening: Callable[[], list[str]]) -> None:
    evaluate(tasks, ALL, {"pretrained": llama}, limit=2)
    assert listening() == []


@pytest.mark.parametrize("how", ["arguments", "object"])
def test_template_warning_for_a_name_that_lm_eval_knows(
    tasks: Path, tmp_path_factory: pytest.TempPathFactory, listening: Callable[[], list[str]], how: str
) -> None:
    """lm-eval warns itself when `instruct` is in the model arguments, but not when it is given a model object."""
    folder = str(tiny.tiny_llama(tmp_path_factory.mktemp("Tiny-Instruct"), chat=True))
    if how == "arguments":
        evaluate(tasks, "tiny_choice", {"pretrained": folder}, limit=2)
    else:
        evaluate(tasks, "tiny_choice", None, model=sparse(folder), limit=2)
    assert len(listening()) == 1


# --- proof that it ran -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"method": "flexprefill"}, "does not exceed 1024"),
        ({"method": "flexprefill", "sparsity": 0.99}, "too short for sparsity 0.99"),
    ],
)
def test_run_fails_when_all_prompts_are_too_short(tasks: Path, llama: str, args: dict[str, Any], reason: str) -> None:
    for task in tiny.TASKS:
        with pytest.raises(UserError, match="never ran") as caught:
            evaluate(tasks, task, {"pretrained": llama, **args}, limit=2)
        message = str(caught.value)
        assert reason in message and "flexprefill" in message and "method=dense" in message and "\n" not in message


def test_some_short_prompts_are_counted_as_fallback(tasks: Path, llama: str) -> None:
    results = evaluate(tasks, "tiny_generate", {"pretrained": llama, **FLEX})
    prefill = results["config"]["sparse"]["phases"]["prefill"]
    assert prefill["calls"] == {"sparse": 10, "dense": 0, "fallback": 2}
    assert prefill["backends"] == {"gather": 10, "sdpa": 2}
    ((reason, count),) = prefill["fallback_reasons"].items()
    assert count == 2 and "does not exceed 32" in reason


def test_short_prompts_are_dense(llama: str) -> None:
    pairs = [(tiny.words(5, 6), continuation) for continuation in CONTINUATIONS]
    lm = sparse(llama, **FLEX, batch_size=4)
    found = score(lm, [*pairs, PAIRS[0]])
    assert_same_scores(found[:4], score(sparse(llama), pairs))
    assert stats_of(found[0])["sparsity"] == 0
    assert stats_of(found[0])["prefill"]["calls"] == {"fallback": 2}
    assert stats_of(found[4])["prefill"]["calls"] == {"sparse": 2}


def test_sparsity_zero_is_dense_and_no_failure(tasks: Path, llama: str, by_hf: Any) -> None:
    args = {"pretrained": llama, "method": "flexprefill", "sparsity": 0}
    results = evaluate(tasks, ALL, args)
    assert_same_results(results, by_hf)
    assert results["config"]["sparse"]["requested_sparsity"] == 0
    assert results["config"]["sparse"]["phases"]["prefill"]["executed_sparsity"] == 0


# --- the command line ------------------------------------------------------------------------------------------------


def lm_eval_sparse(home: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """`python -m lm_eval_sparse` with caches of its own, as in a checkout that is not installed."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    env |= {"LM_HARNESS_CACHE_PATH": str(home / "lm"), "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1"}
    env |= {"LM_EVAL_SPARSE_CACHE": str(home / "cache")}
    command = [sys.executable, "-m", "lm_eval_sparse", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=home, env=env, timeout=300)


@pytest.mark.slow
def test_command_line(tasks: Path, templated: str, tmp_path: Path) -> None:
    """All of lm-eval's options at once."""
    knobs = ",".join(f"{name}={value}" for name, value in FLEX.items())
    shared = ["run", "--model", "sparse-hf", "--model_args", f"pretrained={templated},{knobs}", "--include_path",
              str(tasks), "--apply_chat_template", "--system_instruction", "be brief", "--limit", "3",
              "--cache_requests", "true", "--batch_size", "4"]  # fmt: skip
    first = lm_eval_sparse(tmp_path, *shared, "--tasks", ALL, "--gen_kwargs", "max_gen_toks=3", "--log_samples",
                           "--output_path", "out", "--use_cache", "answers")  # fmt: skip
    assert first.returncode == 0, first.stderr[-3000:]
    assert "|tiny_generate" in first.stdout and "Traceback" not in first.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    block = results["config"]["sparse"]
    assert block["method"] == "flexprefill" and block["phases"]["prefill"]["calls"]["sparse"] == 24
    assert results["config"]["model_args"]["gamma"] == 0.5
    for task in tiny.TASKS:
        (file,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(samples) == 3 and all(0 < sample["sparse"]["sparsity"] < 1 for sample in samples)
    assert (tmp_path / "answers_rank0.db").exists() and any((tmp_path / "lm").iterdir())


# --- our own tasks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_main_job_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    """The line of the README, in small: both tasks, 4096 tokens, sparsity 0.9, and a length the model cannot take."""
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path / "cache"))
    folder = str(tiny.tiny_llama(tmp_path / "model", max_position_embeddings=6000))
    leaves = ["frontier_niah_4k", "forced_frontier_niah_4k", "forced_frontier_niah_8k"]
    results = lm_eval.simple_evaluate(
        model="sparse-hf",
        model_args={"pretrained": folder, "method": "flexprefill", "sparsity": 0.9, "backend": "gather"},
        tasks=leaves,
        task_manager=TaskManager(include_defaults=False, include_path=str(REPOSITORY / "tasks")),
        limit=2,
        batch_size=batch_size,
        gen_kwargs={"max_gen_toks": 8},
        bootstrap_iters=0,
    )
    sparse_block = results["config"]["sparse"]
    assert list(sparse_block["skipped"]) == ["forced_frontier_niah_8k"]
    assert "sparsity,none" not in results["results"]["forced_frontier_niah_8k"]
    for leaf in leaves[:2]:
        assert results["results"][leaf]["sparsity,none"] == pytest.approx(0.9, abs=0.01)
        prefill = sparse_block["tasks"][leaf]["prefill"]
        # Two documents, two layers: the four slots of a document share one prefill.
        assert prefill["calls"] == {"sparse": 4, "dense": 0, "fallback": 0}
        for sample in results["samples"][leaf]:
            assert sample["sparse"]["sparsity"] == pytest.approx(0.9, abs=0.01)
            assert len(sample["sparse"]["requests"]) == 1
            assert sample["doc"]["tokens"] == 4096


def test_a_window_wider_than_the_model_is_no_window() -> None:
    """Phi-3's long-context models state a window that no prompt can fill."""
    model = tiny.family("phi3", sliding_window=262144)
    lm = sparse(model, **FLEX)
    assert set(lm.runtime.layers.values()) == {None}
    (answer,) = score(lm, [PAIRS[0]])
    assert stats_of(answer)["sparsity"] > 0.05
