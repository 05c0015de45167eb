"""Bad and odd `--model_args`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import DEEP, EITHER, LEGAL, LONG, NAME, REFUSED, Row, evaluate, rows

AREA = "model_args"


def _added(text: str) -> tuple[str, ...]:
    return evaluate(f"pretrained=<llama>,{text}", "--limit", "1")


def _alone(text: str) -> tuple[str, ...]:
    return evaluate(text, "--limit", "1")


#: What each argument does not take. An empty text is a value that was forgotten.
VALUES: dict[str, tuple[str, ...]] = {
    "dtype": ("float17", "foo", "5", "", "int8", "int64", "complex64", "bool", "[1]", "nn", "float32;", "0.5", "True"),
    "softmax_dtype": ("foo", "5", "int8", "", "nn.Linear", "True"),
    "mixed_precision_dtype": ("foo", "5", "int8", "", "False"),
    "max_length": ("abc", "0", "-1", "1.5", "nan", "1e30", "inf", "True", "", "[128]", "{}", "1 000", "9" * 30, "1"),
    "tokenizer": ("5", "", "/no/such/folder", "./nowhere", "~nosuchuser/x", "True", "[]", "<tasks>", "a//b", NAME),
    "gguf_file": ("5", "", "nosuch.gguf", "True", "../x.gguf", "[]", "/dev/null", NAME),
    "prefix_token_id": ("abc", "1000000000", "-5", "1.5", "", "[1]", "True", "384"),
    "add_bos_token": ("maybe", "5", "", "[]", "2", "None5"),
    "load_in_4bit": ("True", "maybe", "5", ""),
    "load_in_8bit": ("True", "maybe", "-1"),
    "quantization_config": ("5", "abc", "", "[]", "{'quant_method': 'nosuch'}", "{'load_in_4bit': True}", "{'a': 1}"),
    "device_map": ("mars", "5", "", "[]", "{'': 'mars'}", "{'': 99}", "cuda:99"),
    "device": ("mars", "5", "", "cuda:99", "cuda:-1", "[]", "True", "CPU9"),
    "peft": ("", "/no/such/folder", "<tasks>", "5", "True", "[]", "~nosuchuser/x", NAME),
    "delta": ("", "/no/such/folder", "<tasks>", "5", "{}", NAME),
    "subfolder": ("nosuch", "5", "../nosuch", NAME),
    "trust_remote_code": ("maybe", "off", "2", "", "[]", "yes please"),
    "batch_size": ("0", "-1", "abc", "1.5", "", "auto:abc", "True", "[]", "auto:-1", "1e9"),
    "max_batch_size": ("0", "abc", "-3", "1.5", ""),
    "parallelize": ("maybe", "5", ""),
    "max_memory": ("5", "abc"),
    "use_fast_tokenizer": ("maybe", "5", ""),
    "think_end_token": ("1.5", "[1]", "{}", ""),
    "enable_thinking": ("maybe", "5", ""),
    "chat_template_args": ("5", "abc", "[]", "", "True"),
    "truncation": ("maybe", "5", ""),
    "logits_cache": ("maybe", "5", ""),
    "gptqmodel": ("True", "maybe"),
    "autogptq": ("True", "abc"),
    "low_cpu_mem_usage": ("maybe", "5"),
    "backend": ("fa4", "hopper", "None"),
    "cache_dir": ("5", "/dev/null/x"),
    "resume": ("maybe", "2", "-1", "0.5", "[]"),
    "diagnose": ("0", "-1", "1.5", "abc", "", "True", "[]", "nan", "1", "9" * 30),
    # fields of the model's own configuration
    "hidden_size": ("65", "0", "-1", "abc", "1e30", ""),
    "num_attention_heads": ("0", "3", "-1", "abc"),
    "num_key_value_heads": ("0", "3", "abc"),
    "num_hidden_layers": ("7", "-1", "abc"),
    "head_dim": ("0", "7", "abc"),
    "vocab_size": ("10", "0", "abc"),
    "intermediate_size": ("1", "abc"),
    "hidden_act": ("nosuch", "5"),
    "rms_norm_eps": ("abc", "[]"),
    "rope_parameters": ("5", "{'rope_type': 'nosuch'}"),
    "attention_bias": ("True",),
    "model_type": ("nosuch", "5"),
}

#: What a message has to hold where it need not be the argument's name.
SAYS = {
    "gguf_file": "gguf",
    "model_type": "model_type|model type",
    **{
        name: f"{name}|the model's shape|change its shape"
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim",
                     "vocab_size", "intermediate_size", "attention_bias")
    },
}  # fmt: skip

LEGAL_ADDED = (
    "dtype=float32", "dtype=bfloat16", "dtype=auto", "softmax_dtype=float32", "mixed_precision_dtype=bfloat16",
    "max_length=200", "max_length=None", "tokenizer=<llama>", "prefix_token_id=1", "prefix_token_id=None",
    "add_bos_token=True", "add_bos_token=False", "peft=<lora>", "trust_remote_code=False", "use_fast_tokenizer=True",
    "truncation=True", "logits_cache=False", "low_cpu_mem_usage=True",
    "rms_norm_eps=1e-5", ",,", ",", "stats=full", "think_end_token=</s>",
)  # fmt: skip

EITHER_ADDED = (
    "dtype=torch.float32", "dtype=FLOAT32", "dtype= float32", "dtype=float64", "max_length=128.0",
    "max_length=100000000", "batch_size=2", "device_map=cpu", "device_map=auto", "device_map={}", "parallelize=True",
    "use_fast_tokenizer=False", "num_hidden_layers=1", "revision=nosuch", "revision=", "token=True",
    "dtype=float32,dtype=bfloat16", "method=dense,method=quest", "max_position_embeddings=0",
    "tie_word_embeddings=True",
    "quantization_config={}", "architectures=5", "load_in_4bit=False", "quantization_config=None", "device=cpu",
    "chat_template_args={}", "chat_template_args={'a': 1}", "max_length=١٢٨٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠", "enable_thinking=False",
)  # fmt: skip

#: Whole texts of `--model_args`.
WHOLE = (
    "pretrained=", "pretrained=,", "=", "==", "=5", "a", "pretrained", "method", "pretrained==x", "=<llama>",
    "pretrained <llama>", "pretrained:<llama>", "pretrained=<llama>=x", "pretrained=<llama>,xyzzy=1",
    "pretrained=<llama>,=5", "pretrained=<llama>,dtype", "pretrained=<llama>,größe=5", "pretrained=<llama>,метод=dense",
    "pretrained=<llama>,dtype=ｆｌｏａｔ３２", "pretrained=<llama>,\u202edtype=float32", "pretrained=/модель",
    "pretrained=<llama>,max_length=²", "pretrained=<llama>,enable_thinking=True", "pretrained=\ud83d",
    f"pretrained={LONG}", f"pretrained=/{LONG}", f"pretrained=./{NAME}", "pretrained=~nosuchuser/x",
    f"pretrained={'/x' * 5000}", f"pretrained=<llama>,dtype={LONG}", f"pretrained=<llama>,tokenizer={LONG}",
    f"pretrained=<llama>,peft=/{LONG}", f"pretrained=<llama>,{LONG}=5", f"pretrained=<llama>,gguf_file={LONG}",
    f"pretrained=<llama>,max_length={'9' * 5000}", f"pretrained=<llama>,dtype={'(' * 5000}",
    f"pretrained={'-' * 9000}5",
    f"method={LONG}", "pretrained=<llama>,dtype=float\n17", "pretrained=<llama>,tokenizer=a\nb",
    "pretrained=<llama>,xyz\n=5", "pretrained=<llama>,method=den\nse",
    "pretrained=/no\nTraceback (most recent call last)",
    "pretrained=<llama>,dtype=\x1b[2J\x1b]0;x\x07", "pretrained=\x1b[31mred", "pretrained=<llama>\r\n",
    "pretrained=/dev/null", "pretrained=/dev/zero", "pretrained=/etc/passwd", "pretrained=/proc/self/mem",
    "pretrained=.", "pretrained=..", "pretrained=/", "pretrained=5", "pretrained=None5", "pretrained=[1]",
    "pretrained=True", "pretrained={'a': 1}", "pretrained=https://example.org/model", "pretrained=hf://a/b",
    "{", "[]", "5", "null", '"x"', "{}}", '{"pretrained": "<llama>", "dtype": 5}', '{"pretrained": ["<llama>"]}',
    '{"pretrained": 5}', '{"pretrained": "<llama>", "method": {"a": 1}}', '{"pretrained": "<llama>", "": 1}',
    '{"pretrained": "<llama>", "max_length": [1]}', '{"pretrained": "<llama>", "dtype": {"a": {"b": []}}}',
    DEEP, '{"a":' * 50_000, f"pretrained=<llama>,dtype={'[' * 3000}",
    "pretrained=<llama>,tokenizer=<llama>/config.json",
)  # fmt: skip

WHOLE_LEGAL = (
    '{"pretrained": "<llama>", "chat_template_args": {}}', '{"pretrained": "<chat>", "chat_template_args": {"a": 1}}',
    '{"pretrained": "<llama>"}', '{"pretrained": "<llama>", "dtype": "float32", "max_length": 200}',
    "pretrained=<llama>/", "pretrained=<llama>/../llama", "pretrained=<llama>,,,dtype=float32,",
    '{"pretrained": "<llama>", "dtype": null}', '{"pretrained": "<llama>", "max_length": null}',
)  # fmt: skip


def _fifo(work: Path, words: Any) -> None:
    os.mkfifo(work / "pipe")


def _loop(work: Path, words: Any) -> None:
    (work / "loop").symlink_to("loop")


#: Where a model, a tokenizer or an adapter is looked for, and something of another kind is.
_ODD = [
    Row(AREA, "pretrained is a pipe", _alone("pretrained=./pipe"), make=_fifo),
    Row(AREA, "pretrained is a link to itself", _alone("pretrained=./loop"), make=_loop),
    Row(AREA, "tokenizer is a pipe", _added("tokenizer=./pipe"), make=_fifo),
    Row(AREA, "gguf_file is a link to itself", _alone("pretrained=.,gguf_file=loop"), make=_loop),
    Row(AREA, "peft is a link to itself", _added("peft=./loop"), make=_loop),
    Row(AREA, "HOME is empty, pretrained below it", _alone("pretrained=~/no-such"), env={"HOME": ""}),
    Row(AREA, "a cache that cannot be", _alone("method=quest,nosuch=1"), env={"LM_EVAL_SPARSE_CACHE": f"/{NAME}"}),
]

#: Code of a model folder runs only when it is asked for in a word that means yes.
_REMOTE = [
    *rows(AREA, REFUSED, [f"remote,trust_remote_code={word}" for word in ("maybe", "off", "2", "", "nope", "None5")],
          lambda text: _alone(f"pretrained=<{text.partition(',')[0]}>,{text.partition(',')[2]}")),
    *rows(AREA, REFUSED, ["remote", "remote,trust_remote_code=False", "remote,trust_remote_code=0"],
          lambda text: _alone(f"pretrained=<{text.partition(',')[0]}>,{text.partition(',')[2]}")),
    *rows(AREA, REFUSED, ["remote,trust_remote_code=no"],
          lambda text: _alone("pretrained=<remote>,trust_remote_code=no")),
]  # fmt: skip

ROWS = [
    *(
        row
        for name, values in VALUES.items()
        for row in rows(AREA, REFUSED, [f"{name}={value}" for value in values], _added, says=SAYS.get(name, name))
    ),
    *rows(AREA, LEGAL, LEGAL_ADDED, _added),
    *rows(AREA, EITHER, EITHER_ADDED, _added),
    *rows(AREA, REFUSED, WHOLE, _alone),
    *rows(AREA, LEGAL, WHOLE_LEGAL, _alone),
    Row(AREA, "enable_thinking with its end", evaluate("pretrained=<llama>,enable_thinking=True,think_end_token=</s>",
        "--limit", "1", task="tiny_generate"), LEGAL),
    *_ODD,
    *_REMOTE,
]  # fmt: skip
