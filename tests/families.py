"""A tiny random model of every causal LM that transformers knows.

`names` lists the model types of transformers' causal LM mapping, `build` makes one of them, and
`python -m tests.families` prints what is built and what is not. A configuration is shrunk by the names of its fields
(`SIZES`) and keeps one layer of each kind; what a family needs beyond that stands in `OVERRIDES`.

Long, since it is one table of model families.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import signal
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests import tiny
from tests.tiny import VOCABULARY

#: Tokens of the trial prompt, and the most parameters that a model may have.
LENGTH = 48
MOST_PARAMETERS = 50_000_000


class NotBuildable(Exception):
    """No tiny model of this type can be made here; one line says why."""


#: Size -> names of fields (or of what their class calls them elsewhere) that have it in a tiny model.
_BY_SIZE: dict[Any, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    2048: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
    "model_max_length original_max_position_embeddings",
    96: "intermediate_size ffn_dim dff dim_ff d_inner n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size "
    "intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size feed_forward_size",
    64: "hidden_size d_model n_embd emb_dim embedding_size lru_width word_embed_proj_dim input_embedding_size "
    "hidden_size_global",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size "
    "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size local_attention "
    "mamba_chunk_size chunk_size block_size q_lora_rank",
    24: "index_topk keep_window_size",
    16: "head_dim swa_head_dim dim_head d_head attention_head_size attention_head_dim kv_channels v_head_dim "
    "kv_lora_rank o_lora_rank linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim "
    "query_pre_attn_scalar mamba_d_state state_size ssm_state_size rel_extent laurel_rank gated_norm_rank "
    "router_hidden_size hidden_size_per_layer_input mamba_head_dim",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim image_size mamba_n_heads mamba_num_heads",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads attention_heads "
    "linear_num_value_heads linear_num_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts patch_size",
    2: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads "
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_blocks depth conf_num_hidden_layers "
    "num_experts_per_tok moe_k moe_topk moe_top_k",
    1: "first_k_dense_replace num_dense_layers n_shared_experts num_shared_experts moe_num_shared_experts "
    "n_group topk_group bos_token_id",
    0.2: "initializer_range init_std",
    0: "pad_token_id num_nextn_predict_layers num_mtp_layers",
}  # fmt: skip
SIZES: dict[str, Any] = {field: size for size, fields in _BY_SIZE.items() for field in fields.split()} | {
    "eos_token_id": 2,
    "use_sliding_window": True,
    "max_window_layers": 1,
    # As many heads as are published: where none of an indexer's heads is positive all scores are zero, and ties between
    # keys are broken differently in one pass and step by step.
    "index_n_heads": 16,
}
#: Fields that say how many layers there are, and fields that name each layer's kind.
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")

_SLIDING_THEN_FULL: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
_LINEAR_THEN_FULL: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
#: Where the embeddings are the output matrix too, these models would say the last token again and again.
_UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
#: Two layers keep keys and values, two read theirs.
_SHARED_KV: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
_GEMMA4_SHARED: dict[str, Any] = {**_SHARED_KV, **_UNTIED, "global_head_dim": 32, "use_double_wide_mlp": True}
#: Experts, and keys that are values too.
_GEMMA4_EXPERTS: dict[str, Any] = {
    **_UNTIED,
    "global_head_dim": 32,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
_LLAMA4_TEXT: dict[str, Any] = {
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "interleave_moe_layer_step": 2,
    "floor_scale": 32,
}
_DOTS3_TEXT: dict[str, Any] = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_QWEN4_TEXT: dict[str, Any] = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 16,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 64,
    "heads_per_ngram": 2,
    "split_ngram_parts": 4,
}

#: Model type -> keyword arguments beyond the generic shrinking; a sub-configuration's are a dictionary.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"block_size": 16},
    # Its cache asks for layers that its own configuration does not count.
    "blt": {"encoder_hash_byte_group_vocab": 512, "num_hidden_layers": 2},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        **_SLIDING_THEN_FULL,
        "logit_scale": 1.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "ctrl": _UNTIED,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v3": {"n_group": 2},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_groups": 2,
        "index_topk": 8,
        "partial_rotary_factor": 0.5,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
    },
    "dory": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "dots3_note": {
        "text_config": _DOTS3_TEXT,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64, "mlp_layer_types": ["dense", "sparse"]},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS3_TEXT,
    "gemma2": _UNTIED,
    "gemma3": {**_UNTIED, "text_config": _UNTIED},
    "gemma3_text": _UNTIED,
    "gemma3n_text": {**_SHARED_KV, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4": {**_UNTIED, "text_config": _GEMMA4_SHARED},
    "gemma4_text": _GEMMA4_EXPERTS,
    "gemma4_unified": {**_UNTIED, "text_config": {**_UNTIED, "global_head_dim": 32}},
    "gemma4_unified_text": {**_SHARED_KV, **_UNTIED, "global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_LINEAR_THEN_FULL, "position_embedding_type": "rope"},
    "inkling_text": {"dense_mlp_idx": 1, "logits_mup_width_multiplier": 1.0},
    "inkling2_text": {"n_layers_per_attn_res_block": 1},
    "inkling2_loop_text": {
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        "num_hidden_layers": 3,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_num_passes": 2,
        "loop_gate_rank": 16,
    },
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 3},
    "laguna": {
        **_SLIDING_THEN_FULL,
        "mlp_layer_types": ["dense", "sparse"],
        "num_attention_heads_per_layer": [4, 8],
        "shared_expert_intermediate_size": 32,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"text_config": _LLAMA4_TEXT},
    "llama4_text": _LLAMA4_TEXT,
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "mellum": {**_SLIDING_THEN_FULL, "mlp_layer_types": ["sparse", "sparse"]},
    "minicpm3": _UNTIED,
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_n_heads": 2,
        "index_block_size": 16,
        "index_topk_blocks": 3,
    },
    "ministral": _SLIDING_THEN_FULL,
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "phi3": {"sliding_window": 32},
    "phimoe": {"sliding_window": 32},
    "qwen4_exp": {"text_config": _QWEN4_TEXT},
    "qwen4_exp_text": _QWEN4_TEXT,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [32, 64],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 32,
        "lsh_attn_chunk_length": 32,
        "num_buckets": 8,
        "hash_seed": 0,
    },
    "roc_bert": {"pronunciation_embed_dim": 32, "shape_vocab_size": 64, "shape_embed_dim": 32},
    "smollm3": {"no_rope_layers": [1, 0], **_SLIDING_THEN_FULL},
    "starcoder2": {"sliding_window": 32},
    "trocr": _UNTIED,
    "vaultgemma": _UNTIED,
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {**_UNTIED, "layer_types": ["hybrid", "hybrid_sliding"], "num_experts_per_tok": 1, "sliding_window": 32},
}  # fmt: skip

#: Model type -> why no tiny model of it can be built.
NOT_BUILDABLE: dict[str, str] = {
    "gemma3n": "its image tower is timm's, which is not among what the tests need; its text model is gemma3n_text",
    "gemma4_assistant": "it drafts for another model: its forward pass needs that model's embeddings, keys and values",
    "gemma4_unified_assistant": "it drafts for another model, as gemma4_assistant does",
    "musicgen": "AutoModelForCausalLM cannot make it, and its tokens are audio codes of several codebooks",
    "musicgen_melody": "AutoModelForCausalLM cannot make it, as with musicgen",
}

#: Causal although their configuration says `is_decoder=False`, or made here only as decoders. (What Reformer's hashed
#: attention sees depends on the buckets of all tokens, later ones too: its logits are not strictly causal.)
READS_FORWARDS = ("gpt_neox", "gpt_neox_japanese", "reformer", "trocr")
#: Every token of the prompt sees every other, and no option changes that.
READS_BOTH_WAYS = ("cpmant",)
#: Encoder -> what makes it causal, where that is not `is_decoder=True`.
AS_DECODER: dict[str, dict[str, Any]] = {
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
}


def names() -> list[str]:
    """Every model type that has a causal LM in transformers, in its order."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def kind(name: str) -> str:
    """`decoder`, `encoder` (causal only when told to be) or `encoder-decoder` (its causal LM is the decoder half)."""
    default = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[name])}
    if default["is_encoder_decoder"]:
        return "encoder-decoder"
    if name in AS_DECODER or name in READS_BOTH_WAYS:
        return "encoder"
    return "encoder" if default.get("is_decoder") is False and name not in READS_FORWARDS else "decoder"


def as_decoder(name: str) -> dict[str, Any] | None:
    """What `build` takes to make an encoder causal, such as `is_decoder=True`; None where nothing does."""
    if name in READS_BOTH_WAYS:
        return None
    return AS_DECODER.get(name, {"is_decoder": True}) if kind(name) == "encoder" else {}


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Arguments of `build` that make everything: each model type, and each encoder once more as a decoder."""
    pairs: list[tuple[str, dict[str, Any]]] = []
    for name in names():
        pairs.append((name, {}))
        if options := as_decoder(name):
            pairs.append((name, options))
    return pairs


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Each layer's kind, where the configuration names it: its attention and, after a slash, its feed-forward part."""
    config = config.get_text_config(decoder=True)
    given = [list(kinds) for field in ("layer_types", "mlp_layer_types") if (kinds := getattr(config, field, None))]
    return ["/".join(map(str, parts)) for parts in zip(*given, strict=False)]


def _shrunk(cls: type[PreTrainedConfig], own: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that make `cls` tiny; `own` are those that differ from the general rule."""
    fields = {field.name for field in dataclasses.fields(cls)}
    standard = {alias: field for field, alias in cls.attribute_map.items()}
    options: dict[str, Any] = {}
    for field in fields:
        size = SIZES.get(field, SIZES.get(standard.get(field, "")))
        if size is not None:
            options[field] = size
    if "kv_lora_rank" in fields:  # latent attention has a key of its own for every head
        options["num_key_value_heads"] = options.get("num_attention_heads", 4)
        if {"qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"} <= fields:
            usual = {field.name: field.default for field in dataclasses.fields(cls)}
            if usual["qk_nope_head_dim"] + usual["qk_rope_head_dim"] != usual["v_head_dim"]:
                options["qk_nope_head_dim"] = 16  # keys are wider than values, as published
    if cls.sub_configs:
        default = cls()
        for part in cls.sub_configs:
            inner = own.get(part, {})
            if isinstance(inner, dict) and (given := getattr(default, part, None)) is not None:
                part_class = CONFIG_MAPPING[inner["model_type"]] if "model_type" in inner else type(given)
                options[part] = {"model_type": part_class.model_type, **_shrunk(part_class, inner)}
    options |= {key: value for key, value in own.items() if key not in cls.sub_configs or not isinstance(value, dict)}
    return options | _one_layer_of_each_kind(cls, options, own)


def _one_layer_of_each_kind(
    cls: type[PreTrainedConfig], options: dict[str, Any], own: dict[str, Any]
) -> dict[str, Any]:
    """The kinds of layers that the published depth has, each once; nothing where all layers are of one kind."""
    fields = {field.name for field in dataclasses.fields(cls)}
    named = [field for field in KINDS if field in fields]
    if not named or any(field in own for field in (*DEPTHS, *KINDS)):
        return {}
    deep = cls(**{key: value for key, value in options.items() if key not in DEPTHS})
    lists = [getattr(deep, field) for field in named]
    if any(kinds is None for kinds in lists):
        return {}
    distinct = list(dict.fromkeys(zip(*lists, strict=True)))
    if len(distinct) < 2:
        return {}
    chosen: dict[str, Any] = {
        field: list(kinds) for field, kinds in zip(named, zip(*distinct, strict=True), strict=True)
    }
    return chosen | {field: len(distinct) for field in DEPTHS if field in fields}


def configuration(name: str, **options: Any) -> PreTrainedConfig:
    """The tiny configuration of a model type; `options` come last."""
    cls = CONFIG_MAPPING[name]
    return cls(**_shrunk(cls, {**OVERRIDES.get(name, {}), **options}))


def _make(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration; memory that no initialisation writes is not a number afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what `torch.empty` gives
    try:
        return AutoModelForCausalLM.from_config(config).eval().float()
    finally:
        torch.use_deterministic_algorithms(before)


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Give parameters that would hide a mistake values that show it.

    Those that are all alike (sinks, gates, norms, biases) or that nothing initialises get values of their own, and
    matrices of very small weights, as some families have whatever `initializer_range` says, become larger.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        if not parameter.isfinite().all():
            parameter.zero_()
        if (parameter == parameter.flatten()[0]).all():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        elif parameter.dim() > 1 and (spread := parameter.std()) < 0.1:
            parameter *= 0.2 / spread


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[batch, tokens, vocabulary]` of `ids` `[batch, tokens]`."""
    return model(input_ids=ids).logits


def prompt(length: int = LENGTH) -> torch.Tensor:
    """Random token ids `[1, length]` without special tokens."""
    return torch.randint(8, VOCABULARY - 8, (1, length), generator=torch.Generator().manual_seed(2))


def _try(model: PreTrainedModel) -> None:
    """Raises NotBuildable unless the last logits are finite and depend on the first token."""
    ids = prompt()
    other = ids.clone()
    other[0, 0] += 1
    ours, theirs = logits(model, ids), logits(model, other)
    if ours.shape[:2] != ids.shape or not ours.isfinite().all():
        raise NotBuildable(f"logits of shape {tuple(ours.shape)} are not finite, or not one row for each token")
    if torch.equal(ours[0, -1], theirs[0, -1]):
        raise NotBuildable("the first token does not change the last logits")


def build(name: str, **options: Any) -> PreTrainedModel:
    """A tiny random model, in fp32 and evaluation mode; the same weights every time.

    `options` are arguments of the configuration, such as `is_decoder=True` for an encoder. Raises NotBuildable.
    """
    if name in NOT_BUILDABLE:
        raise NotBuildable(NOT_BUILDABLE[name])
    torch.manual_seed(0)
    try:
        model = _make(configuration(name, **options))
    except Exception as error:
        raise NotBuildable(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    if (count := sum(parameter.numel() for parameter in model.parameters())) > MOST_PARAMETERS:
        raise NotBuildable(f"{count:,} parameters, more than {MOST_PARAMETERS:,}")
    _randomise(model)
    try:
        _try(copy.deepcopy(model))  # some families keep what the first prompt made them choose
    except NotBuildable:
        raise
    except Exception as error:
        raise NotBuildable(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    return model


def save(name: str, folder: Path, **options: Any) -> Path:
    """Save `build(name, **options)` and a tokenizer where `AutoModelForCausalLM.from_pretrained` finds them."""
    model = build(name, **options)
    tiny.save(model, folder)
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # a text model that only the whole's name leads to
        configuration(name, **options).save_pretrained(folder)
    return folder


def _row(name: str, options: dict[str, Any], seconds: int) -> tuple[bool, str]:
    """Whether a model is built within `seconds`, and its line of the table."""
    start = time.perf_counter()
    signal.alarm(seconds)
    try:
        model = build(name, **options)
        count = sum(parameter.numel() for parameter in model.parameters())
        built, said = True, f"{count / 1e6:.2f}M {' '.join(layer_kinds(model.config))}"
    except (NotBuildable, TimeoutError) as error:
        built, said = False, str(error)
    finally:
        signal.alarm(0)
    type_of = " ".join([kind(name), *(f"{key}={value}" for key, value in options.items())])
    state = f"{'built' if built else 'NOT':5} {time.perf_counter() - start:5.1f} s"
    return built, f"{name:25} {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]:45} {type_of:24} {state} {said}"


def _report(chosen: list[str], seconds: int) -> None:
    """Print a line for each model of `chosen`; what takes longer than `seconds` is stopped."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    built: list[str] = []
    for name, options in variants():
        if name in chosen:
            done, line = _row(name, options, seconds)
            print(line, flush=True)
            built += [kind(name) + (" as decoder" if options else "")] * done
    print(", ".join(f"{built.count(sort)} {sort}" for sort in sorted(set(built))) + f" built of {len(chosen)} types")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Builds a tiny model of every causal LM of transformers.")
    parser.add_argument("names", nargs="*", help="model types; all by default")
    parser.add_argument("--seconds", type=int, default=30, help="the most that one model may take")
    given = parser.parse_args()
    _report(given.names or names(), given.seconds)
