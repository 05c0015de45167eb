"""The check at start-up: what is right is accepted in every dtype, what is wrong is refused with its layer.

Models are tiny and random. Answers are compared with lm-eval's `hf`; masks with brute force.

Long, since each wrong model is made from the same right one.
"""

from __future__ import annotations

import random
import types
from typing import Any

import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels import dense
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.runtime import cache, interface, probe, steps
from lm_eval_sparse.runtime import session as attention
from lm_eval_sparse.runtime.masks import sight_of
from tests import families
from tests.family_sweep import Answers, answers, examine, tokenizer
from tests.tiny import COMMON, build

CPU = torch.device("cpu")


def model(config: str = "LlamaConfig", **options: Any) -> transformers.PreTrainedModel:
    made = build(config, **{**COMMON, **options})
    made.generation_config.eos_token_id = None
    return made


def ours(given: transformers.PreTrainedModel, **arguments: Any) -> SparseHFLM:
    return SparseHFLM(pretrained=given, tokenizer=tokenizer(), device="cpu", batch_size=1, **arguments)


def of_hf(given: transformers.PreTrainedModel, **arguments: Any) -> Answers:
    lm = HFLM(pretrained=given, tokenizer=tokenizer(), device="cpu", batch_size=1, softmax_dtype="float32", **arguments)
    return answers(lm)


# --- what a mask function shows --------------------------------------------------------------------------------


def shown(mask_function: Any, length: int) -> torch.Tensor:
    """`(length, length)` bool, query by query."""
    at = torch.arange(length)
    zero = torch.zeros((), dtype=torch.long)
    return torch.stack([torch.as_tensor(mask_function(zero, zero, q, at)).expand(length) for q in at])


@pytest.mark.parametrize("seed", range(12))
def test_windows_and_chunks_are_read_from_far_positions(seed: int) -> None:
    rng = random.Random(seed)
    longest = rng.choice([70, 501, 2048, 131072, 10_485_760])
    size = rng.randint(2, min(longest - 2, 9000))
    window = sight_of(sliding_window_causal_mask_function(size), longest, CPU, False)
    assert (window.kind, window.size) == ("window", size)
    chunk = sight_of(chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long)), longest, CPU, False)
    assert (chunk.kind, chunk.size) == ("chunk", size)
    full = sight_of(causal_mask_function, longest, CPU, True)
    assert (full.kind, full.plain) == ("full", True)


@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_what_hides_nothing_below_the_longest_prompt_is_full(kind: str) -> None:
    made = {
        "window": sliding_window_causal_mask_function,
        "chunk": lambda size: chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long)),
    }[kind]
    for size, expected in ((99, kind), (100, "full"), (101, "full")):
        assert sight_of(made(size), 100, CPU, False).kind == expected
        assert bool((shown(made(size), 100) == torch.ones(100, 100).tril().bool()).all()) == (expected == "full")


@pytest.mark.parametrize("seed", range(6))
def test_other_masks_are_told_apart(seed: int) -> None:
    rng = random.Random(seed)
    step, hole = rng.randint(2, 9), rng.randint(3, 900)
    others = {
        "every other key": and_masks(causal_mask_function, lambda b, h, q, k: (q - k) % step == 0),
        "a hole": and_masks(causal_mask_function, lambda b, h, q, k: k != hole),
        "both ways": lambda b, h, q, k: (q >= 0) & (k >= 0),
        "one ahead": lambda b, h, q, k: k <= q + 1,
        "groups of tokens": or_masks(causal_mask_function, blockwise_overlay(torch.full((1, 55), -1))),
        "a window and sinks": and_masks(causal_mask_function, lambda b, h, q, k: (k < 4) | (q - k < 40)),
        "a window that grows": and_masks(causal_mask_function, lambda b, h, q, k: 2 * (q - k) <= q),
    }
    for name, function in others.items():
        assert sight_of(function, 1000, CPU, False).kind == "other", name


# --- right answers, as hf's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 90, 300])
def test_chunks_longer_than_the_trial_come_out_as_hf(size: int) -> None:
    options = {
        "head_dim": 16, "num_hidden_layers": 4, "intermediate_size_mlp": 96, "num_local_experts": 2,
        "num_experts_per_tok": 1, "attention_chunk_size": size, "no_rope_layers": [1, 1, 1, 0],
    }  # fmt: skip
    wanted = of_hf(model("Llama4TextConfig", **options))
    lm = ours(model("Llama4TextConfig", **options))
    assert answers(lm).differs(wanted) is None
    untouched = lm.report()["layers"]["untouched"]
    assert untouched == dict.fromkeys(range(3), f"attention within chunks of {size} tokens")


@pytest.mark.parametrize("size", [60, 150])
def test_a_window_that_only_the_mask_knows(size: int) -> None:
    # PhiMoE's attention module has no window and is given none.
    options = {"sliding_window": size, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}
    wanted = of_hf(model("PhimoeConfig", **options))
    assert wanted.differs(of_hf(model("PhimoeConfig", **{**options, "sliding_window": 2048}))) is not None
    lm = ours(model("PhimoeConfig", **options))
    assert answers(lm).differs(wanted) is None
    assert set(lm.report()["layers"]["untouched"].values()) == {f"sliding window of {size} tokens"}


def test_a_window_given_to_attention_that_the_mask_does_not_have_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given = model()
    wanted = of_hf(given)
    forward = type(given.model.layers[0].self_attn).forward

    def with_window(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, "sliding_window": 8})

    monkeypatch.setattr(type(given.model.layers[0].self_attn), "forward", with_window)
    assert answers(ours(given)).differs(wanted) is None


@pytest.mark.parametrize("config", ["LlamaConfig", "Qwen3Config", "Gemma2Config"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_is_accepted_and_near_hf(config: str, dtype: str) -> None:
    options = {"initializer_range": 0.05}
    lm = ours(model(config, **options), mixed_precision_dtype=dtype, method="quest", budget=4096)
    wanted = of_hf(model(config, **options), mixed_precision_dtype=dtype)
    for (mine, _), (theirs, _) in zip(answers(lm).scored, wanted.scored, strict=True):
        assert mine == pytest.approx(theirs, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deep_models_in_half_precision_are_accepted(dtype: torch.dtype) -> None:
    # Weights that let rounding grow: transformers' own two implementations are far apart.
    deep = model(num_hidden_layers=24).to(dtype)
    ids = torch.arange(24)[None] * 7 % 300 + 3
    logits = {}
    with torch.no_grad():
        for name in ("eager", "sdpa"):
            deep.set_attn_implementation(name)
            logits[name] = deep(input_ids=ids).logits.float()
    apart = probe.distance(logits["sdpa"], logits["eager"])
    assert apart > {torch.bfloat16: 0.05, torch.float16: 0.005}[dtype]
    ours(deep, method="snapkv+quest", sparsity=0.5)


# --- every kind of family --------------------------------------------------------------------------------------

#: What a family stands for -> what is right in it, and what the refusal of the rest says.
SPREAD = {
    "llama": ("dense prefill eviction decode", ""),
    "gemma3_text": ("dense prefill eviction decode", ""),  # windows and full layers
    "gemma3n_text": ("dense prefill eviction decode", ""),  # layers that borrow keys and values
    "llama4_text": ("dense prefill eviction decode", ""),  # chunks
    "cohere_compass_text": (
        "dense prefill eviction decode",
        "",
    ),  # full layers without the rotary embedding of the others
    "gpt2": ("dense prefill eviction decode", ""),
    "camembert": ("dense prefill eviction decode", ""),  # positions that do not begin at 0
    "jamba": ("dense prefill eviction decode", ""),  # a recurrent state: generated tasks only
    "mistral": ("dense", "no method can be applied to any of its layers (sliding window of 32 tokens)"),
    "phi4_multimodal": ("dense", "sliding window of 32 tokens"),  # its image tower is none of ours
    "glm4_moe_lite": ("dense prefill", "is given other keys and values"),  # latent attention
    "jetmoe": ("dense prefill", "is given other keys and values"),  # they are repeated behind the cache
    "diffllama": ("dense prefill", "runs 2 times in layer 0"),
    "deepseek_v3": ("dense prefill", "latent attention"),  # values of other dimensions than keys
    "falcon_h1": ("dense prefill eviction decode", ""),  # a recurrent state in the same layer: generated tasks only
    "gpt_oss": ("dense prefill eviction decode", ""),  # attention sinks, windows and full layers
    "granite_swa": ("dense prefill eviction decode", ""),  # sinks that its own function applies behind the softmax
    "zamba2": ("dense prefill eviction decode", ""),  # one attention module that several layers share
    "deepseek_v32": ("", "'indices'"),
    "inkling_text": ("", "'position_bias'"),
    "doge": ("", "a mask that transformers' mask functions did not make"),
    "blt": ("", "is called with several masks"),
    "moshi": ("", "keeps 32 tokens while its mask shows more"),
    "bloom": ("", "no attention layer that goes through"),
    "minimax": ("", "uses cache of its own"),
}


@pytest.mark.parametrize("name", SPREAD)
def test_a_family_is_right_or_refused(name: str) -> None:
    found = examine(name)
    assert found.built is None
    right = [phase for phase, state in found.phases.items() if state.startswith("right")]
    wrong = {phase: state for phase, state in found.phases.items() if not state.startswith(("right", "refused"))}
    assert not wrong
    assert right == SPREAD[name][0].split()
    refusals = [state for phase, state in found.phases.items() if phase not in right]
    assert all("\n" not in state and SPREAD[name][1] in state for state in refusals)


@pytest.mark.parametrize("name", ["gemma3_text", "mistral", "phimoe"])
def test_windows_longer_than_the_trial(name: str) -> None:
    found = examine(name, ("dense", "decode"), sliding_window=100)
    assert found.phases["dense"] == "right" and not found.phases["decode"].startswith("WRONG")


@pytest.mark.families
@pytest.mark.parametrize("name", [name for name in families.names() if name not in families.NOT_BUILDABLE])
def test_every_family_is_right_or_refused(name: str) -> None:
    found = examine(name)
    assert not {phase: state for phase, state in found.phases.items() if not state.startswith(("right", "refused"))}


def test_borrowers_read_what_the_lender_kept_and_count() -> None:
    options = {
        "num_hidden_layers": 10, "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
        "num_kv_shared_layers": 5, "head_dim": 16, "sliding_window": 40, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 384,
        "intermediate_size": [96] * 10, "laurel_rank": 8, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 10,
    }  # fmt: skip
    lm = ours(model("Gemma3nTextConfig", **options), method="snapkv+quest", sparsity=0.5, window=32)
    assert lm.runtime.lenders == {9: 4}
    answers(lm)
    phases = lm.report()["phases"]
    assert phases["eviction"]["calls"] == {"sparse": 3, "dense": 0, "fallback": 0}  # the lender's, in three prompts
    calls = phases["decode"]["calls"]
    assert calls["dense"] == 0 and sum(calls.values()) == 2 * (2 + 5)  # lender and borrower: two answers, five steps
    assert phases["decode"]["executed_sparsity"] == pytest.approx(0.5, abs=0.05)
    assert phases["eviction"]["kv_memory_fraction"] < 0.7


# --- what is wrong is refused, with its layer ------------------------------------------------------------------


def refusal(**arguments: Any) -> str:
    dtype = arguments.pop("dtype", torch.float32)
    with pytest.raises(UserError) as error:
        ours(model(**arguments.pop("options", {})).to(dtype), **arguments)
    message = str(error.value)
    assert "\n" not in message and "use --model hf" in message or "--model hf" in message
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", ["scale", "window", "neighbour", "last value"])
def test_an_attention_that_is_off_is_refused(broken: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dense.dense_attention

    def wrong(query: Any, key: Any, value: Any, **options: Any) -> Any:
        if broken == "scale":
            options["scale"] *= 1.2
        elif broken == "window":
            options["window"] = 30
        elif broken == "neighbour":
            key = torch.roll(key, 1, 1)
        else:
            value = torch.cat([value[:, :, :-1], 0 * value[:, :, -1:]], 2)
        return right(query, key, value, **options)

    monkeypatch.setattr(attention, "dense_attention", wrong)
    message = refusal(dtype=dtype)
    assert "layer 0" in message and "off transformers' own" in message and "rounding" in message


def test_a_single_wrong_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run = attention.Runtime.attend

    def wrong(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        out = run(self, module, *args, **kwargs)
        return out * 1.01 if module.layer_idx == 3 else out

    monkeypatch.setattr(attention.Runtime, "attend", wrong)
    message = refusal(options={"num_hidden_layers": 5})
    assert "layer 3" in message and "full causal attention" in message


@pytest.mark.parametrize("method", ["snapkv", "quest", "snapkv+quest"])
def test_a_cache_that_mixes_tokens_up_is_found(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    append, compact = steps.append, cache.compact

    def late(kv: Any, keys: Any, values: Any, *rest: Any) -> None:
        append(kv, keys, torch.roll(values, 1, 0), *rest)

    def shifted(keys: Any, values: Any, *rest: Any) -> None:
        compact(keys, torch.roll(values, 1, 1), *rest)

    ours(model(), method=method, sparsity=0.5)
    if "snapkv" in method:
        monkeypatch.setattr(steps, "append", late)
        assert "layer 0" in refusal(method=method, sparsity=0.5)
        monkeypatch.setattr(steps, "append", append)
        monkeypatch.setattr(cache, "compact", shifted)
        assert "layer 0" in refusal(method=method, sparsity=0.5)
    else:
        paged = steps.paged_decode

        def everything(query: Any, kv: Any, selection: Any = None, **options: Any) -> Any:
            return paged(query, kv, None, **options)

        monkeypatch.setattr(steps, "paged_decode", everything)
        assert "layer 0" in refusal(method=method, sparsity=0.5)


def test_it_fails_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no reference today")

    monkeypatch.setattr(probe, "own_function", lambda module: broken)
    assert "no reference today" in refusal()
    monkeypatch.undo()
    monkeypatch.setattr(probe, "own_logits", broken)
    assert "no reference today" in refusal()
    monkeypatch.undo()
    monkeypatch.setattr(interface, "sdpa_mask", broken)
    assert "no reference today" in refusal()


def test_a_model_that_asks_for_the_name_of_its_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    given = model()
    mlp = given.model.layers[1].mlp
    forward = mlp.forward
    config = given.config

    def other(self: Any, states: Any) -> Any:
        return forward(states) * (1.05 if config._attn_implementation == interface.IMPLEMENTATION else 1.0)

    mlp.forward = types.MethodType(other, mlp)
    with pytest.raises(UserError, match="its logits come out"):
        ours(given)


def test_a_mask_that_is_changed_on_its_way_is_refused() -> None:
    given = model()
    layer = given.model.layers[1]
    forward = layer.forward

    def other(self: Any, states: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        mask = None if attention_mask is None else attention_mask.clone()
        return forward(states, *args, attention_mask=mask, **kwargs)

    layer.forward = types.MethodType(other, layer)
    with pytest.raises(UserError, match="layer 1 is handed a mask that transformers' mask functions did not make"):
        ours(given)


@pytest.mark.parametrize("name", ["block_indices", "sinks", "attention_bias", "something_new"])
def test_arguments_that_nobody_knows_are_refused_by_name(name: str) -> None:
    given = model()
    module = given.model.layers[1].self_attn
    forward = module.forward
    module.forward = types.MethodType(lambda self, *a, **k: forward(*a, **{**k, name: torch.ones(1)}), module)
    with pytest.raises(UserError, match=repr(name)):
        ours(given)
    module.forward = types.MethodType(lambda self, *a, **k: forward(*a, **{**k, name: None}), module)
    ours(given)


def test_modules_that_do_not_say_their_layer_are_refused() -> None:
    given = model()
    given.model.layers[1].self_attn.layer_idx = -1  # where the last layer lies, as it happens
    ours(given, method="flexprefill", sparsity=0.5)
    with pytest.raises(UserError, match="several layers share one attention module"):
        ours(given, method="snapkv", sparsity=0.5)
    given.model.layers[1].self_attn.layer_idx = None
    with pytest.raises(UserError, match="LlamaAttention does not say which layer it is in"):
        ours(given)


def test_a_layer_that_first_runs_later_is_refused() -> None:
    given = model(num_hidden_layers=3)
    lm = ours(given)
    del lm.runtime.sights[2]
    with pytest.raises(UserError, match="layer 2 did not run when the model was checked"):
        answers(lm)


def test_what_was_found_is_noted() -> None:
    lm = ours(model("Gemma2Config", head_dim=16, query_pre_attn_scalar=16, sliding_window=24))
    assert {sight.kind for sight in lm.runtime.sights.values()} == {"window", "full"}
    assert not lm.runtime.uncached and not lm.runtime.masked and lm.runtime.probe is None


# --- what was found is held against every pass -----------------------------------------------------------------

LONG = 60


def refused_later(given: transformers.PreTrainedModel, **arguments: Any) -> str:
    """The refusal of a model that passes the check and does something else with longer prompts."""
    lm = ours(given, **arguments)
    with pytest.raises(UserError) as error:
        answers(lm)
    assert "\n" not in str(error.value) and "--model hf" in str(error.value)
    return str(error.value)


def attention_that(change: Any, monkeypatch: pytest.MonkeyPatch) -> transformers.PreTrainedModel:
    """A model whose attention hands over what `change` makes of the arguments of its attention function."""
    given = model()
    module = __import__(type(given).__module__, fromlist=["ALL_ATTENTION_FUNCTIONS"])
    functions = module.ALL_ATTENTION_FUNCTIONS

    class Changing:
        def get_interface(self, name: str, default: Any) -> Any:
            function = functions.get_interface(name, default)
            return lambda *args, **kwargs: change(function, *args, **kwargs)

    monkeypatch.setattr(module, "ALL_ATTENTION_FUNCTIONS", Changing())
    return given


def test_keys_that_are_changed_behind_the_cache_in_long_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(function: Any, module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        return function(module, q, k * 1.3 if k.shape[2] > LONG else k, v, mask, **options)

    assert "layer 0 is given other keys" in refused_later(attention_that(change, monkeypatch))


def test_a_scale_that_changes_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(function: Any, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **options: Any) -> Any:
        return function(module, q, k, v, mask, scaling=scaling * (1.1 if k.shape[2] > LONG else 1), **options)

    assert "layer 0 scales its scores" in refused_later(attention_that(change, monkeypatch))


def test_an_attention_of_its_own_for_long_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(function: Any, module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        if q.shape[2] <= LONG:
            return function(module, q, k, v, mask, **options)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2), None

    assert "called attention 0 times" in refused_later(attention_that(change, monkeypatch))


def test_a_mask_that_is_first_asked_for_in_long_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    causal = modeling_llama.create_causal_mask

    def window(config: Any, inputs_embeds: Any, *args: Any, **kwargs: Any) -> Any:
        if inputs_embeds.shape[1] <= LONG:
            return causal(config, inputs_embeds, *args, **kwargs)
        config.sliding_window = 20
        return transformers.masking_utils.create_sliding_window_causal_mask(config, inputs_embeds, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", window)
    assert "a mask that it did not ask for" in refused_later(model()).replace("an attention mask", "a mask")


def test_a_model_that_counts_on_its_cache_is_left_to_transformers() -> None:
    given = model()
    layer = given.model.layers[0]
    forward = layer.forward

    def scaled(self: Any, states: Any, *args: Any, **kwargs: Any) -> Any:
        held = kwargs.get("cache", kwargs.get("past_key_values"))
        past = 0 if held is None else held.get_seq_length()
        at = past + torch.arange(states.shape[1])
        return forward(states * (1 + at // 16)[None, :, None].float(), *args, **kwargs)

    layer.forward = types.MethodType(scaled, layer)
    wanted = of_hf(given)
    lm = ours(given)
    assert answers(lm).differs(wanted) is None
    assert set(lm.report()["phases"]["decode"]["loops"]) == {"transformers"}


def test_a_model_that_prepares_its_own_inputs_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    given = model()
    prepare = type(given).prepare_inputs_for_generation

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = prepare(self, *args, **kwargs)
        found["position_ids"] = found["position_ids"] * 2
        return found

    monkeypatch.setattr(type(given), "prepare_inputs_for_generation", other, raising=False)
    wanted = of_hf(given)
    assert answers(ours(given)).differs(wanted) is None


@pytest.mark.parametrize("config", ["LlamaConfig", "Phi3Config"])
@pytest.mark.parametrize("bound", [100, 204, 206, 1000])
def test_longrope_that_changes_within_the_answer(bound: int, config: str) -> None:
    # Phi-3 reads its prompt anew when an answer crosses the bound, others go on.
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": bound,
        "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    }  # fmt: skip
    given = model(config, rope_parameters=rope, original_max_position_embeddings=bound)
    wanted = of_hf(given)
    lm = ours(given)
    assert answers(lm).differs(wanted) is None
    crosses = bound in (204, 206)
    for method in ("snapkv", "quest"):
        lm = ours(given, method=method, sparsity=0.5, **({"window": 32} if method == "snapkv" else {}))
        if crosses:
            with pytest.raises(UserError, match="change beyond"):
                answers(lm)
        else:
            answers(lm)


def test_dynamic_positions_have_no_answer_beyond_their_length() -> None:
    given = model(
        max_position_embeddings=150, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    )
    lm = ours(given, max_length=2048)
    with pytest.raises(UserError, match="has no answer of its own"):
        answers(lm)
    given = model(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    wanted = of_hf(given)
    assert answers(ours(given)).differs(wanted) is None


def test_attention_that_looks_both_ways_is_refused() -> None:
    given = model()
    given.config.is_causal = False  # transformers then makes masks that show everything
    with pytest.raises(UserError, match="not causal|not plainly causal"):
        ours(given)
    module = (given := model()).model.layers[0].self_attn
    forward = module.forward
    module.forward = types.MethodType(lambda self, *a, **k: forward(*a, **{**k, "is_causal": False}), module)
    with pytest.raises(UserError, match="is not causal attention"):
        ours(given)


def test_what_half_precision_would_hide_is_seen_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounding in half precision would hide is seen in fp32."""
    right = dense.dense_attention

    def wrong(query: Any, key: Any, value: Any, **options: Any) -> Any:
        return right(query, key, value, **{**options, "scale": options["scale"] * 1.01})

    monkeypatch.setattr(attention, "dense_attention", wrong)
    monkeypatch.setattr(probe, "dense_attention", wrong)
    assert "in full precision" in refusal(dtype=torch.bfloat16)
