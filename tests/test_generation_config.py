"""What a model's generation configuration and `--gen_kwargs` ask for: the texts of `hf`, or one line before any run.

The oracle is lm-eval's own `HFLM`, one prompt at a time, on the same tiny models with the same configuration.

Long, since each field of a generation configuration is a row of one table.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel, WatermarkingConfig

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.model import generation_fields, sampling
from lm_eval_sparse.model.generation_checks import check as check_generation
from lm_eval_sparse.model.generation_fields import FIELDS
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.results.files import brief

#: Fields that say something about the file, or hold what nobody can give here.
UNTRIED = {"transformers_version", "_from_model_config", "_commit_hash"}
PROMPTS = [tiny.words(seed, count) for seed, count in enumerate((40, 9))]
PLAIN = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOKENS = 5


class Pair:
    """The same model under `hf` and under `sparse-hf`."""

    def __init__(self, family: str, **options: Any):
        tokenizer = tiny.tiny_tokenizer()
        model = tiny.family(family)
        model.set_attn_implementation("eager")  # transformers 5.17 leaves Gemma's soft cap out of the others
        self.hf = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)
        self.ours = SparseHFLM(
            pretrained=tiny.family(family), tokenizer=tokenizer, device="cpu", batch_size=2, method="dense", **options
        )
        self.configure({})
        self.plain = generate(self.hf)
        ids = torch.tensor([tokenizer(PROMPTS[0]).input_ids])
        with torch.no_grad():
            self.tokens = self.hf.model.generate(ids, max_new_tokens=TOKENS)[0, ids.shape[1] :].tolist()
        self.prompt = ids[0].tolist()

    def configure(self, fields: dict[str, Any]) -> None:
        """As if these stood in generation_config.json."""
        for lm in (self.hf, self.ours):
            lm.model.generation_config = GenerationConfig(**PLAIN)
            for name, value in fields.items():
                setattr(lm.model.generation_config, name, value)

    def texts(self, fields: dict[str, Any], **typed: Any) -> tuple[list[str], list[str]]:
        self.configure(fields)
        return generate(self.ours, **typed), generate(self.hf, **typed)


def generate(lm: Any, prompts: list[str] = PROMPTS, **typed: Any) -> list[str]:
    options = {"until": [], "max_gen_toks": TOKENS, **typed}
    requests = [Instance("generate_until", {}, (prompt, options), 0, metadata=("t", 0, 1)) for prompt in prompts]
    return [str(text) for text in lm.generate_until(requests, disable_tqdm=True)]


@contextmanager
def unused(model: PreTrainedModel) -> Iterator[None]:
    """The model must not be run meanwhile."""

    @functools.wraps(model.forward)
    def forward(*args: Any, **options: Any) -> None:
        raise AssertionError("the model was run")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", forward)
        yield


def refusal(lm: SparseHFLM, **typed: Any) -> str:
    """The one line that a run ends with before the model has seen a token."""
    with unused(lm.model), pytest.raises(UserError) as raised:
        generate(lm, **typed)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 1200
    return message


@pytest.fixture(scope="module")
def llama() -> Pair:
    return Pair("llama")


@pytest.fixture(scope="module")
def gemma() -> Pair:
    return Pair("gemma2")


@pytest.fixture
def rng() -> random.Random:
    """Fresh values in every run; a failure shows its seed."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    yield
    logging.getLogger("transformers").setLevel(before)


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_field_has_its_place() -> None:
    known = {*vars(GenerationConfig()), *GenerationConfig().to_dict()}
    assert known <= set(FIELDS)
    assert set(FIELDS) - known <= {"_commit_hash"}  # of other releases
    tried = {name for case in (*CASES.values(), *SAMPLED.values()) for name in case(random.Random(0), FIRST)}
    tried |= {name for fields in (*IDLE.values(), *REFUSED.values()) for name in fields}
    assert set(FIELDS) - tried - UNTRIED == set()


def test_neutral_fields_are_idle() -> None:
    assert all(FIELDS[name].how == "idle" for name in generation_fields.NEUTRAL)


# --- the same texts --------------------------------------------------------------------------------------------------

Case = Callable[[random.Random, Pair | None], dict[str, Any]]
FIRST = None


def some(rng: random.Random, pair: Pair | None) -> list[int]:
    """Tokens that the model would generate."""
    return rng.sample(range(3, 300), 3) if pair is None else pair.tokens[: rng.randint(1, 3)]


#: What a field is set to; nearly all of it shows in the texts.
CASES: dict[str, Case] = {
    "max_new_tokens": lambda rng, pair: {"max_new_tokens": rng.choice([1, 2, 4, 12])},
    "max_length": lambda rng, pair: {"max_length": rng.randint(1, 50), "max_new_tokens": rng.randint(2, 5)},
    "eos": lambda rng, pair: {"eos_token_id": [2, *some(rng, pair)]},
    "min_length": lambda rng, pair: {"eos_token_id": some(rng, pair)[0], "min_length": 400},
    "min_new_tokens": lambda rng, pair: {"eos_token_id": [*some(rng, pair)], "min_new_tokens": rng.randint(2, 6)},
    "repetition_penalty": lambda rng, pair: {"repetition_penalty": rng.uniform(4, 8)},
    "encoder_repetition_penalty": lambda rng, pair: {"encoder_repetition_penalty": rng.uniform(2, 4)},
    "no_repeat_ngram_size": lambda rng, pair: {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": lambda rng, pair: {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": lambda rng, pair: {"bad_words_ids": [[token] for token in some(rng, pair)]},
    "sequence_bias": lambda rng, pair: {"sequence_bias": [[[rng.randrange(3, 300)], rng.uniform(20.0, 40.0)]]},
    "forced_bos_token_id": lambda rng, pair: {"forced_bos_token_id": rng.randrange(3, 300)},
    "forced_eos_token_id": lambda rng, pair: {"forced_eos_token_id": rng.randrange(3, 300)},
    "forced_eos_token_id and max_new_tokens": lambda rng, pair: {
        # Other lengths than the plain texts have: at theirs the forced token may be the one that ends them anyway.
        "forced_eos_token_id": [rng.randrange(3, 300)], "max_new_tokens": rng.choice([2, 3, 4, 8, 9])
    },
    "suppress_tokens": lambda rng, pair: {"suppress_tokens": some(rng, pair)},
    "begin_suppress_tokens": lambda rng, pair: {"begin_suppress_tokens": some(rng, pair)},
    "exponential_decay_length_penalty": lambda rng, pair: {
        "exponential_decay_length_penalty": (rng.randint(1, 4), rng.uniform(2.0, 4.0))
    },
    "remove_invalid_values": lambda rng, pair: {"remove_invalid_values": True},
    "renormalize_logits": lambda rng, pair: {"renormalize_logits": True},
    "watermarking_config": lambda rng, pair: {
        "watermarking_config": WatermarkingConfig(bias=rng.uniform(20, 40), hashing_key=rng.randrange(10**6))
    },
    "prefill_chunk_size": lambda rng, pair: {"prefill_chunk_size": rng.randint(1, 50)},
    "max_time": lambda rng, pair: {"max_time": rng.choice([0.0, 100.0])},
    "num_beams": lambda rng, pair: {"num_beams": rng.randint(2, 4), "early_stopping": rng.choice([True, "never"])},
    "length_penalty": lambda rng, pair: {"num_beams": 3, "length_penalty": rng.uniform(-3, 3)},
}  # fmt: skip
BEAMS = ("num_beams", "length_penalty")
#: What may leave the texts as they are.
SILENT = {
    "forced_bos_token_id", "remove_invalid_values", "renormalize_logits", "prefill_chunk_size", "max_time", "num_beams",
    "length_penalty", "exponential_decay_length_penalty", "max_length",
}  # fmt: skip


WAYS = [
    *((name, "decoder") for name in CASES if name not in BEAMS),
    *((name, "beams") for name in CASES if name not in ("renormalize_logits", "remove_invalid_values", "max_length")),
]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_the_configuration_acts_as_with_hf(name: str, way: str, llama: Pair, rng: random.Random) -> None:
    fields = CASES[name](rng, llama)
    if way == "beams":
        fields = {"num_beams": 2, **fields}
    found, expected = llama.texts(fields)
    assert found == expected
    assert way == "beams" or name in SILENT or found != llama.plain


@pytest.mark.parametrize("name", ["max_new_tokens", "forced_eos_token_id", "repetition_penalty", "min_new_tokens"])
def test_a_model_with_windows(name: str, gemma: Pair, rng: random.Random) -> None:
    found, expected = gemma.texts(CASES[name](rng, gemma))
    assert found == expected != gemma.plain


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("max_new_tokens", "max_length")])
def test_typed_as_with_hf(name: str, llama: Pair, rng: random.Random) -> None:
    typed = CASES[name](rng, llama)
    found, expected = llama.texts({}, **{**typed, "max_gen_toks": rng.randint(2, 6)})
    assert found == expected


BESIDE: list[dict[str, Any]] = [{"max_length": 48}, {"max_gen_toks": 2}, {"max_new_tokens": 4}, {"eos_token_id": None}]


@pytest.mark.parametrize("typed", BESIDE)
def test_typed_beside_the_configuration(typed: dict[str, Any], llama: Pair, rng: random.Random) -> None:
    for fields in ({"max_new_tokens": rng.randint(1, 9)}, {"max_length": 30}, {"forced_eos_token_id": 9}, {}):
        found, expected = llama.texts(fields, **typed)
        assert found == expected, fields


def test_rows_of_a_batch_have_their_own_lengths(llama: Pair, rng: random.Random) -> None:
    """Prompts of several lengths side by side: processors look at each one's own beginning and end."""
    prompts = [tiny.words(rng.randrange(10**6), rng.randint(5, 60)) for _ in range(5)]
    llama.configure({
        "forced_eos_token_id": 9, "begin_suppress_tokens": llama.tokens[:1], "min_new_tokens": 3,
        "encoder_no_repeat_ngram_size": 2, "eos_token_id": [2, *llama.tokens],
    })  # fmt: skip
    assert generate(llama.ours, prompts) == generate(llama.hf, prompts)


#: Sampling: which tokens are left, with which shares.
SAMPLED: dict[str, Case] = {
    "temperature": lambda rng, pair: {"temperature": rng.uniform(0.2, 3.0)},
    "top_k": lambda rng, pair: {"top_k": rng.randint(1, 60)},
    "top_p": lambda rng, pair: {"top_p": rng.uniform(0.1, 0.95)},
    "min_p": lambda rng, pair: {"min_p": rng.uniform(0.01, 0.9)},
    "top_h": lambda rng, pair: {"top_h": rng.uniform(0.1, 0.9)},
    "typical_p": lambda rng, pair: {"typical_p": rng.uniform(0.1, 0.95)},
    "epsilon_cutoff": lambda rng, pair: {"epsilon_cutoff": rng.uniform(0.001, 0.2)},
    "eta_cutoff": lambda rng, pair: {"eta_cutoff": rng.uniform(0.001, 0.2)},
    "several": lambda rng, pair: {
        "top_k": rng.randint(2, 9), "top_p": rng.uniform(0.5, 1), "repetition_penalty": 1.3, "renormalize_logits": True
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLED)
def test_draws_are_from_the_shares_of_hf(
    name: str, llama: Pair, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draw that takes the token at a fixed part of all shares, in place of a random one."""
    part = rng.uniform(0.05, 0.95)

    def draw(shares: Tensor, num_samples: int, generator: Any = None) -> Tensor:
        return (shares.double().cumsum(-1) < part).sum(-1, keepdim=True).clamp_max(shares.shape[-1] - 1)

    monkeypatch.setattr(torch, "multinomial", draw)
    fields = SAMPLED[name](rng, llama)
    typed = {"do_sample": True, "temperature": rng.uniform(0.5, 1.5)}
    found, expected = llama.texts(fields, **typed)  # a temperature of the configuration is lm-eval's to replace
    assert found == expected
    found, expected = llama.texts({}, **{**typed, **fields})
    assert found == expected
    found, expected = llama.texts({"do_sample": True, **fields})  # lm-eval is greedy unless asked
    assert found == expected


#: What must not be felt. Under `hf` some of it ends in a traceback.
IDLE: dict[str, dict[str, Any]] = {
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "max_cache_len": 300},
    "dynamic cache": {"cache_implementation": "dynamic", "cache_config": {"a": 1}},
    "a dictionary": {
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_attentions": True,
        "output_hidden_states": True,
    },
    "attentions": {"output_attentions": True},
    "compilation": {"compile_config": CompileConfig(), "disable_compile": False},
    "other tokens": {"pad_token_id": 7, "bos_token_id": 9, "decoder_start_token_id": 5},
    "no end": {"eos_token_id": None},
    "assistants that are not there": {
        "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.9,
        "max_matching_ngram_size": 4, "assistant_lookbehind": 3, "target_lookbehind": 4,
        "assistant_ensemble_weight": 0.4, "speculation_type": "dflash",
    },
    "batching": {"continuous_batching_config": {"a": 1}},
    "beams that are not there": {"early_stopping": True, "length_penalty": 3.0, "diversity_penalty": 1.5},
    "memory": {"low_memory": True},
    "shares without sampling": {"temperature": 0.0, "top_k": -3, "top_p": 7.0, "do_sample": False},
}  # fmt: skip
#: What `generate` would come to see with beams.
BY_GENERATE = ("no cache", "static cache", "a dictionary", "attentions", "memory", "other tokens")
CRASHES = {("a dictionary", 1), ("a dictionary", 2), ("memory", 2)}


@pytest.mark.parametrize(("name", "beams"), [*((name, 1) for name in IDLE), *((name, 2) for name in BY_GENERATE)])
def test_idle_fields_are_not_felt(name: str, beams: int, llama: Pair) -> None:
    fields = {**IDLE[name], "num_beams": beams}
    llama.configure({"num_beams": beams} if (name, beams) in CRASHES else fields)
    expected = generate(llama.hf)
    llama.configure(fields)
    assert generate(llama.ours) == expected


# --- refused ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, dict[str, Any]] = {
    "num_return_sequences": {"num_return_sequences": 2},
    "stop_strings": {"stop_strings": ["a"]},
    "token_healing": {"token_healing": True},
    "guidance_scale": {"guidance_scale": 1.5},
    "is_assistant": {"is_assistant": True},
    "cache_implementation": {"cache_implementation": "quantized"},
    "constraints": {"constraints": [3]},
    "force_words_ids": {"force_words_ids": [[3]]},
    "num_beam_groups": {"num_beam_groups": 2, "num_beams": 4},
    "penalty_alpha": {"penalty_alpha": 0.6},
    "dola_layers": {"dola_layers": "high"},
    "use_mtp": {"use_mtp": True},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "assistant_early_exit": {"assistant_early_exit": 1},
    # What transformers itself would end with
    "num_beams": {"num_beams": 0},
    "max_new_tokens": {"max_new_tokens": 2.5},
    "prefill_chunk_size": {"prefill_chunk_size": 0},
    "repetition_penalty": {"repetition_penalty": 2},
    "min_new_tokens": {"min_new_tokens": 2.5},
    "early_stopping": {"early_stopping": "sometimes"},
    "sequence_bias": {"sequence_bias": [[[5000], 1.0]]},
    "forced_eos_token_id": {"forced_eos_token_id": 5000},
    "bad_words_ids": {"bad_words_ids": [3]},
    "suppress_tokens": {"suppress_tokens": "all"},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": 3},
}


#: transformers validates these in the file, whatever is typed (lm-eval takes a typed max_new_tokens for its own).
UNTYPED = {"num_return_sequences", "early_stopping", "max_new_tokens"}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_any_run(name: str, llama: Pair) -> None:
    fields = REFUSED[name]
    llama.configure(fields)
    message = refusal(llama.ours)
    assert f"{name}={brief(fields[name])}, which the model's generation_config.json sets, is not accepted" in message
    off = FIELDS[name].off
    assert message.endswith("take it out there")
    typing = f"type --gen_kwargs {name}={off}, or" in message
    assert typing != (name in UNTYPED)
    if not typing:
        return
    llama.configure({key: value for key, value in fields.items() if key != name})
    expected = generate(llama.hf)
    llama.configure(fields)
    assert generate(llama.ours, **{name: off}) == expected


def test_a_field_that_only_transformers_knows(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a later release: refused when it asks for something, typed or configured."""
    monkeypatch.delitem(FIELDS, "top_h")
    llama.configure({"top_h": 0.5})
    assert "generation_config.json sets top_h=0.5, which transformers" in refusal(llama.ours)
    llama.configure({})
    assert "top_h=0.5: transformers" in refusal(llama.ours, top_h=0.5)
    assert generate(llama.ours) == llama.plain


def test_a_field_that_nobody_knows(llama: Pair, caplog: pytest.LogCaptureFixture) -> None:
    name = f"max_window_{random.SystemRandom().randrange(10**9)}"
    llama.configure({name: 6144})
    with caplog.at_level(logging.WARNING, "lm_eval_sparse"):
        assert generate(llama.ours) == generate(llama.hf) == generate(llama.ours)
    assert [name in record.getMessage() for record in caplog.records] == [True]


def test_a_prompt_read_in_chunks_is_no_whole_prompt() -> None:
    model = tiny.family("llama")
    model.generation_config.prefill_chunk_size = 16
    lm = SparseHFLM(pretrained=model, tokenizer=tiny.tiny_tokenizer(), method="snapkv", sparsity=0.5, window=8)
    message = refusal(lm)
    assert "generation_config.json sets prefill_chunk_size=16: snapkv" in message
    assert "--gen_kwargs prefill_chunk_size=None" in message
    generate(lm, prefill_chunk_size=None)


def test_the_file_beside_the_weights(tmp_path: Path) -> None:
    folder = tiny.tiny_llama(tmp_path)
    path = folder / "generation_config.json"
    fields = {"max_new_tokens": 3, "chat_format": "chatml", "use_cache": False, "repetition_penalty": 1.4}
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    hf, ours = (cls(pretrained=str(folder), device="cpu", dtype="float32") for cls in (HFLM, SparseHFLM))
    texts = generate(ours)
    assert texts == generate(hf)
    path.write_text(json.dumps({"cache_implementation": "no such"}))
    with pytest.raises(UserError, match="cache_implementation") as raised:
        SparseHFLM(pretrained=str(folder), device="cpu")
    assert "\n" not in str(raised.value)


# --- what is left to transformers ------------------------------------------------------------------------------------


def reasons(lm: SparseHFLM) -> dict[str, int]:
    return lm.report()["phases"]["decode"].get("loop_reasons", {})


def test_a_model_that_generates_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.family("llama")

    class Short(type(model)):
        def _get_stopping_criteria(self, generation_config: Any, **options: Any) -> Any:
            generation_config.max_length -= 3
            return super()._get_stopping_criteria(generation_config=generation_config, **options)

    texts = []
    for cls in (HFLM, SparseHFLM):
        model = tiny.family("llama")
        model.__class__ = Short
        lm = cls(pretrained=model, tokenizer=tiny.tiny_tokenizer(), device="cpu")
        texts.append(generate(lm))
    assert texts[1] == texts[0] and "the model brings its own _get_stopping_criteria" in reasons(lm)


def test_another_release_of_transformers(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its inner methods are called otherwise, `generate` decodes."""

    def other(self: PreTrainedModel, other_name: Any) -> None:
        raise AssertionError

    llama.configure({"max_new_tokens": 3})
    expected = generate(llama.hf)
    monkeypatch.setattr(sampling.Sampling, "processors", lambda self, ids: other(self.model, name=ids))
    lm = SparseHFLM(pretrained=llama.ours.model, tokenizer=tiny.tiny_tokenizer(), device="cpu")
    assert generate(lm) == expected and "transformers has changed" in next(iter(reasons(lm)))


def test_objects_from_python(llama: Pair) -> None:
    def never(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(-1, torch.tensor(llama.tokens), -torch.inf)

    found, expected = llama.texts({}, logits_processor=LogitsProcessorList([never]))
    assert found == expected != llama.plain


# --- what is typed ---------------------------------------------------------------------------------------------------

TYPED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a seed": ({"seed": 3}, ("seed=3", "lm-eval's --seed")),
    "a name nearly right": ({"temprature": 0.5}, ("temprature=0.5", "unknown", "'temperature'", "accepted: until")),
    "another": ({"repetition_penalti": 1.5}, ("unknown", "'repetition_penalty'")),
    "none of this": ({"zzz": 1}, ("zzz=1 is unknown", "no_repeat_ngram_size")),
    "a method's name": ({"validate": 1}, ("validate=1 is unknown",)),
    "a private name": ({"_from_model_config": True}, ("_from_model_config=True is unknown",)),
    "lm-eval's own": ({"stopping_criteria": 3}, ("lm-eval gives transformers its own", "leave stopping_criteria out")),
    "lm-eval's own pad": ({"pad_token_id": 3}, ("pad_token_id=3", "leave pad_token_id out")),
    "stop": ({"stop": "a"}, ("stop=a", "type until=")),
    "a cache": ({"past_key_values": 3}, ("own KV cache", "leave past_key_values out")),
    "its new name": ({"cache": 3}, ("own KV cache", "leave cache out")),
    "an assistant": ({"assistant_model": "a"}, ("assistant_model=a", "leave assistant_model out")),
    "cold sampling": ({"do_sample": True, "temperature": 0.0}, ("temperature=0.0", "above 0", "temperature=1.0")),
    "sampling": ({"do_sample": True}, ("do_sample=True", "above 0", "temperature=1.0")),
    "do_sample": ({"do_sample": "maybe"}, ("do_sample=maybe", "True or False")),
    "one": ({"do_sample": 1, "temperature": 1.0}, ("do_sample=1", "True or False")),
    "below zero": ({"temperature": -1.0}, ("temperature=-1.0", "a number of at least 0")),
    "hot": ({"temperature": "hot"}, ("temperature=hot", "not understood")),
    "quoted": ({"temperature": "0.7"}, ("temperature=0.7", "a number of at least 0")),
    "no temperature": ({"temperature": None}, ("temperature=None", "not understood")),
    "top_p": ({"top_p": 2}, ("top_p=2", "a number from 0 to 1")),
    "top_p, sampled": ({"top_p": 1.2, "temperature": 1.0}, ("top_p=1.2", "a number from 0 to 1")),
    "top_k": ({"top_k": -1}, ("top_k=-1", "a whole number of at least 0")),
    "top_k in parts": ({"top_k": 2.5}, ("top_k=2.5", "a whole number")),
    "no beams": ({"num_beams": 0}, ("num_beams=0", "a whole number of at least 1")),
    "beams of None": ({"num_beams": None}, ("num_beams=None", "a whole number of at least 1")),
    "sequences": ({"num_return_sequences": 2, "num_beams": 2}, ("num_return_sequences=2", "one text per prompt")),
    "max_gen_toks": ({"max_gen_toks": "abc"}, ("max_gen_toks=abc", "not understood")),
    "endless": ({"max_gen_toks": float("inf")}, ("max_gen_toks=inf", "not understood")),
    "nothing": ({"max_gen_toks": 0}, ("max_gen_toks=0", "at least 1")),
    "until a number": ({"until": 5}, ("until=[5]", "5 is no text")),
    "until None": ({"until": ["a", None]}, ("None is no text",)),
    "penalty": ({"repetition_penalty": -1.5}, ("repetition_penalty=-1.5", "a number above 0")),
    "no penalty": ({"repetition_penalty": 0}, ("repetition_penalty=0", "a number above 0")),
    "ngrams": ({"no_repeat_ngram_size": -2}, ("no_repeat_ngram_size=-2", "a whole number of at least 0")),
    "cutoff": ({"epsilon_cutoff": 3}, ("epsilon_cutoff=3", "a number from 0 to 1")),
    "min_length": ({"min_length": -4}, ("min_length=-4", "a whole number of at least 0")),
    "max_length": ({"max_length": 3}, ("max_length=3", "no room for an answer")),
    "max_length None": ({"max_length": None}, ("max_length=None", "a whole number of at least 1")),
    "max_length text": ({"max_length": "long"}, ("max_length=long", "a whole number of at least 1")),
    "tokens": ({"eos_token_id": 2.5}, ("eos_token_id=2.5", "a token id or a list of token ids")),
    "no tokens": ({"suppress_tokens": [3, "a"]}, ('suppress_tokens=[3, "a"]', "token ids")),
    "nan": ({"length_penalty": float("nan"), "num_beams": 2}, ("length_penalty=nan", "a number")),
    "typical": ({"typical_p": 0.0, "temperature": 1.0}, ("typical_p=0.0", "not accepted by transformers")),
    "stop early": ({"early_stopping": "sometimes"}, ("early_stopping=sometimes", "not accepted by transformers")),
    "bad words": ({"bad_words_ids": [3]}, ("bad_words_ids=[3]", "not accepted by transformers")),
    "a bias": ({"sequence_bias": "x"}, ("sequence_bias=x", "not accepted by transformers")),
    "a bias beyond": ({"sequence_bias": [[[999], 1.0]]}, ("sequence_bias=", "not accepted by transformers", "999")),
    "all tokens": (
        {"suppress_tokens": list(range(384)), "temperature": 1.0},
        ("suppress_tokens=", "no token is left to be drawn"),
    ),
    "a dictionary": ({"return_dict_in_generate": True}, ("return_dict_in_generate=True", "leave")),
    "chunks": ({"prefill_chunk_size": 0}, ("prefill_chunk_size=0", "a whole number of at least 1")),
    "watermark": ({"watermarking_config": {"seeding_scheme": "x"}}, ("watermarking_config=", "not accepted")),
}


@pytest.mark.parametrize("name", TYPED)
def test_bad_arguments_give_one_line(name: str, llama: Pair) -> None:
    typed, said = TYPED[name]
    llama.configure({})
    message = refusal(llama.ours, **typed)
    assert [words for words in said if words not in message] == [], message


def test_whole_numbers_are_numbers(llama: Pair) -> None:
    """`repetition_penalty=2` on a command line is a whole number, which transformers refuses."""
    llama.configure({})
    assert generate(llama.ours, repetition_penalty=2) == generate(llama.hf, repetition_penalty=2.0)


def test_off_is_accepted(llama: Pair) -> None:
    llama.configure({})
    for name, field in FIELDS.items():
        if not name.startswith("_") and name not in (*generation_fields.NEVER_TYPED, "max_length", "temperature"):
            check_generation(llama.ours.model, {"until": [], "max_gen_toks": 3, name: field.off})


def test_an_empty_prompt_is_found_first(llama: Pair) -> None:
    llama.configure({})
    with unused(llama.ours.model), pytest.raises(UserError, match="a prompt is empty"):
        generate(llama.ours, [*PROMPTS, ""])


# --- empty continuations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [PROMPTS[1], "", " "])
def test_an_empty_continuation(context: str, llama: Pair) -> None:
    request = Instance("loglikelihood", {}, (context, ""), 0, metadata=("my_task", 0, 1))
    if context == " ":  # it belongs to the continuation, which is not empty then
        assert llama.ours.loglikelihood([request], disable_tqdm=True)
        return
    with pytest.raises(UserError) as raised:
        llama.ours.loglikelihood([request], disable_tqdm=True)
    message = str(raised.value)
    assert "\n" not in message and "max_length" not in message
    for words in ("task my_task: the continuation of a document is empty", context[-20:], "doc_to_target"):
        assert words in message


def test_what_decoding_stands_for_is_there() -> None:
    """The methods of transformers that are looked at exist under these names."""
    assert all(inspect.isfunction(sampling.mixin(name)) for name in sampling.REPLACED)
