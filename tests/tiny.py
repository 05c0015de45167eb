"""Tiny random models, a tokenizer and lm-eval tasks for tests. Everything is made here: no network, fp32, CPU.

The weights are large enough for attention to be far from uniform, so that a wrong mask, a wrong position or a
wrong block shows in the logits.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 384
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "apple", "river", "stone", "cloud", "green", "letter", "window", "seven", "garden", "paper", "silver", "morning",
    "bridge", "yellow", "winter", "the", "of", "and", "to", "in", "is", "was", "number", "city", "box", "key", "red",
    "blue", "small", "old",
]  # fmt: skip

#: Arguments that every family understands.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

#: Family -> (configuration class, what differs from COMMON).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24, "num_hidden_layers": 3,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "mistral": ("MistralConfig", {"head_dim": 16, "sliding_window": 40}),
    "mistral_full": ("MistralConfig", {"head_dim": 16, "sliding_window": None}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    # Attention sinks; layer 0 has a window.
    "gpt_oss": (
        "GptOssConfig", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 24}
    ),
    # Layers of other kinds between those of attention, positions learned or elsewhere, latent attention.
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
         "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
         "num_key_value_heads": 4},
    ),
    "falcon_h1": (
        "FalconH1Config", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
    ),
    "lfm2": ("Lfm2Config", {"full_attn_idxs": [1]}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {"head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_hidden_layers": 4,
         "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "jamba": (
        "JambaConfig",
        {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
         "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig", {"head_dim": 16, "attention_window_size": 24, "num_hidden_layers": 3}
    ),
}  # fmt: skip

#: Models that sparse-hf cannot serve -> (configuration class, Auto class, what differs from COMMON).
UNSUPPORTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "AutoModelForMaskedLM", {}),
    "distilbert": ("DistilBertConfig", "AutoModelForMaskedLM", {"dim": 64, "n_heads": 4, "n_layers": 2}),
    "roberta": ("RobertaConfig", "AutoModelForMaskedLM", {}),
    "ernie": ("ErnieConfig", "AutoModelForMaskedLM", {}),
    "t5": (
        "T5Config",
        "AutoModelForSeq2SeqLM",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    ),
    "bart": (
        "BartConfig",
        "AutoModelForSeq2SeqLM",
        {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    ),
    "mamba": ("MambaConfig", "AutoModelForCausalLM", {"state_size": 8}),
    "rwkv": ("RwkvConfig", "AutoModelForCausalLM", {}),
    "bloom": ("BloomConfig", "AutoModelForCausalLM", {"n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", "AutoModelForCausalLM", {"d_model": 64, "n_heads": 4, "n_layers": 2}),
    "falcon_alibi": ("FalconConfig", "AutoModelForCausalLM", {"alibi": True}),
    "gpt_neo": (
        "GPTNeoConfig",
        "AutoModelForCausalLM",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    ),
    "minimax": ("MiniMaxConfig", "AutoModelForCausalLM", {"head_dim": 16, "num_local_experts": 2}),
}  # fmt: skip


def words(seed: int, count: int) -> str:
    """`count` words, the same for the same seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words(seed, 60) for seed in range(40)], trainer)
    return tokenizer.to_str()


def tiny_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `VOCABULARY` tokens (some words are one token, others several)."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHATML if chat else None,
        model_max_length=2048,
    )


def build(config: str, *, seed: int = 0, head: str = "AutoModelForCausalLM", **options: Any) -> PreTrainedModel:
    """A random model in evaluation mode of the configuration class `config`; `head` is its Auto class."""
    torch.manual_seed(seed)
    return getattr(transformers, head).from_config(getattr(transformers, config)(**options)).eval().float()


def family(name: str, *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random model of one of `FAMILIES`."""
    config, own = FAMILIES[name]
    return build(config, seed=seed, **{**COMMON, **own, **options})


def unsupported(name: str) -> PreTrainedModel:
    """A random model of one of `UNSUPPORTED`."""
    config, head, own = UNSUPPORTED[name]
    return build(config, head=head, **{**COMMON, **own})


def save(model: PreTrainedModel, folder: Path, *, chat: bool = False) -> Path:
    """Save a model and the tokenizer where `from_pretrained` finds them."""
    model.save_pretrained(folder)
    tiny_tokenizer(chat).save_pretrained(folder)
    return folder


def tiny_llama(folder: Path, *, chat: bool = False, seed: int = 0, **options: Any) -> Path:
    """A saved random Llama of two layers, four query heads and two KV heads of 16 dimensions."""
    return save(family("llama", seed=seed, **options), folder, chat=chat)


def tiny(name: str, folder: Path, *, chat: bool = False, seed: int = 0, **options: Any) -> Path:
    """A saved random model of one of `FAMILIES`."""
    return save(family(name, seed=seed, **options), folder, chat=chat)


# --- tasks ------------------------------------------------------------------------------------------------------------

#: Words per document; nearly all words are one token.
LENGTHS = (110, 190, 140, 9, 260, 111)

_ACC = {"aggregation": "mean", "higher_is_better": True}
TASKS: dict[str, dict[str, Any]] = {
    "tiny_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **_ACC}],
    },
    "tiny_loglikelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": " {{answer}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **_ACC},
        ],
    },
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", **_ACC}, {"metric": "acc_norm", **_ACC}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    """One document per length: a text, a gold answer and three choices of one and several tokens."""
    docs = []
    for index, length in enumerate(lengths):
        choices = [words(1000 + 10 * index, 1), words(1001 + 10 * index, 3), words(1002 + 10 * index, 5)]
        docs.append({"text": words(index, length), "choices": choices, "answer": choices[1], "gold": index % 3})
    return docs


def write_tasks(folder: Path, lengths: tuple[int, ...] = LENGTHS) -> Path:
    """Write `TASKS` on a local JSON data set; returns the folder, for `manager` and `--include_path`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "docs.json"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in documents(lengths)))
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "datasets")},
            "test_split": "test",
            "metadata": {"version": 1},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return folder


def manager(folder: Path) -> TaskManager:
    """The tasks of `folder` only: lm-eval's own thousands take five seconds to list."""
    return TaskManager(include_path=str(folder), include_defaults=False)


def lora(base: Path, folder: Path, *, seed: int = 7, **options: Any) -> Path:
    """Save a random LoRA adapter for the model in `base`, none of whose matrices is zero."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return folder
