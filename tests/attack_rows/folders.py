"""Model folders that are damaged: configuration, weights, tokenizer, generation configuration."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import DEEP, EITHER, LEGAL, REFUSED, Row, Verdict, evaluate

AREA = "folders"
_RUN = evaluate("pretrained=./model", "--limit", "1")
_GENERATE = evaluate("pretrained=./model", "--limit", "1", task="tiny_generate")
_INDEX = "model.safetensors.index.json"
Change = Callable[[Path], Any]


def _model(*changes: Change) -> Callable[[Path, Mapping[str, str]], None]:
    """A copy of the tiny model in `model`, changed."""

    def make(work: Path, words: Mapping[str, str]) -> None:
        shutil.copytree(words["llama"], work / "model")
        for change in changes:
            change(work / "model")

    return make


def _fields(file: str, **fields: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **fields}))

    return change


def _config(**fields: Any) -> Change:
    return _fields("config.json", **fields)


def _write(file: str, content: str | bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def _replaced(file: str, old: str, new: str) -> Change:
    return lambda folder: _write(file, (folder / file).read_text().replace(old, new))(folder)


def _both(first: Change, then: Change) -> Change:
    return lambda folder: (first(folder), then(folder))


def _gone(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def _cut(file: str, keep: float) -> Change:
    def change(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * keep)])

    return change


def _link(file: str, to: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(to)

    return change


def _pipe(file: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return change


class _Runs:
    """Unpickled, it writes PWNED into the working folder."""

    def __reduce__(self) -> Any:
        return exec, ("import pathlib; pathlib.Path('PWNED').write_text('a pickle ran')",)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    buffer = io.BytesIO()
    pickle.dump({"model.embed_tokens.weight": _Runs()}, buffer)
    (folder / "pytorch_model.bin").write_bytes(buffer.getvalue())


def _torch_saved(folder: Path) -> None:
    import torch

    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": _Runs()}, folder / "pytorch_model.bin")


def _index(where: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": where, "model.norm.weight": where}}
        (folder / _INDEX).write_text(json.dumps(index))

    return change


def _without(*names: str) -> Change:
    """Weights without those whose name holds one of `names`."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        kept = {name: weight for name, weight in weights.items() if not any(part in name for part in names)}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _nan(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


_HUGE = struct.pack("<Q", 2**62) + b"{}" + b"\0" * 64
REFUSED_MODELS: dict[str, Change] = {
    "config.json empty": _write("config.json", ""),
    "config.json torn": _cut("config.json", 0.5),
    "config.json a list": _write("config.json", "[]"),
    "config.json a number": _write("config.json", "5"),
    "config.json null": _write("config.json", "null"),
    "config.json bytes": _write("config.json", b"\xff\xfe\x00"),
    "config.json nested": _write("config.json", DEEP),
    "config.json {}": _write("config.json", "{}"),
    "config.json a pipe": _pipe("config.json"),
    "config.json a link to itself": _link("config.json", "config.json"),
    "config.json a device": _link("config.json", "/dev/zero"),
    "config.json of 5000 digits": _write("config.json", '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}"),
    "model_type a number": _config(model_type=5),
    "model_type a list": _config(model_type=["llama"]),
    "model_type unknown": _config(model_type="nosuch"),
    "model_type bert": _config(model_type="bert", architectures=["BertModel"]),
    "model_type of an image model": _config(model_type="vit", architectures=["ViTModel"]),
    "hidden_size huge": _config(hidden_size=10**12),
    "hidden_size a text": _config(hidden_size="64"),
    "hidden_size 1e400": _replaced("config.json", '"hidden_size": 64', '"hidden_size": 1e400'),
    "num_hidden_layers more than there are": _config(num_hidden_layers=4),
    "num_attention_heads 0": _config(num_attention_heads=0),
    "num_attention_heads null": _config(num_attention_heads=None),
    "vocab_size huge": _config(vocab_size=2**40),
    "vocab_size smaller": _config(vocab_size=64),
    "rope_parameters a list": _config(rope_parameters=[1]),
    "hidden_act unknown": _config(hidden_act="nosuch"),
    "dtype unknown": _config(dtype="float17"),
    "quantization unknown": _config(quantization_config={"quant_method": "nosuch"}),
    "quantization a list": _config(quantization_config=[1]),
    "auto_map outside": _config(auto_map={"AutoConfig": "../outside.Own", "AutoModelForCausalLM": "../outside.Own"},
                                model_type="own"),
    "weights empty": _write("model.safetensors", b""),
    "weights torn": _cut("model.safetensors", 0.5),
    "weights torn in the head": _cut("model.safetensors", 0.001),
    "weights with a huge head": _write("model.safetensors", _HUGE),
    "weights with a head that is no JSON": _write("model.safetensors", struct.pack("<Q", 8) + b"notjson!" + b"\0" * 64),
    "weights of another kind": _write("model.safetensors", b"PK\x03\x04" + b"\0" * 1000),
    "weights gone": _gone("model.safetensors"),
    "weights a pipe": _pipe("model.safetensors"),
    "weights a device": _link("model.safetensors", "/dev/zero"),
    "weights without a layer": _without("layers.1."),
    "weights without a matrix": _without("q_proj"),
    "weights without the last norm": _without("model.norm"),
    "weights without embeddings": _without("embed_tokens", "lm_head"),
    "weights of NaN": _nan,
    "a pickle": _pickled,
    "a pickle in torch's own format": _torch_saved,
    "pytorch_model.bin torn": _both(_gone("model.safetensors"),
                                    _write("pytorch_model.bin", b"PK\x03\x04" + b"\0" * 100)),
    "an index that leads outside": _index("../outside.safetensors"),
    "an index that leads to the root": _index("/etc/passwd"),
    "an index of nothing": _index("nosuch.safetensors"),
    "an index that is torn": _both(_index("x"), _write(_INDEX, "{")),
    "an index without a map": _both(_index("x"), _write(_INDEX, "{}")),
    "an index of numbers": _both(_index("x"), _write(_INDEX, '{"weight_map": {"a": 5}}')),
    "tokenizer.json empty": _write("tokenizer.json", ""),
    "tokenizer.json torn": _cut("tokenizer.json", 0.5),
    "tokenizer.json a list": _write("tokenizer.json", "[]"),
    "tokenizer.json bytes": _write("tokenizer.json", b"\xff\xfe\x00"),
    "tokenizer.json nested": _write("tokenizer.json", DEEP),
    "tokenizer.json of an unknown model": _fields("tokenizer.json", model={"type": "nosuch"}),
    "tokenizer.json a pipe": _pipe("tokenizer.json"),
    "tokenizer_config.json torn": _cut("tokenizer_config.json", 0.5),
    "tokenizer_config.json a list": _write("tokenizer_config.json", "[]"),
    "tokenizer_class a number": _fields("tokenizer_config.json", tokenizer_class=5),
}  # fmt: skip

#: Found by what is generated: the generation configuration.
REFUSED_GENERATION: dict[str, Change] = {
    "torn": _write("generation_config.json", "{"),
    "a list": _write("generation_config.json", "[]"),
    "bytes": _write("generation_config.json", b"\xff\xfe"),
    "nested": _write("generation_config.json", DEEP),
    "num_beams 0": _fields("generation_config.json", num_beams=0),
    "num_beams of letters": _fields("generation_config.json", num_beams="two"),
    "eos of letters": _fields("generation_config.json", eos_token_id="x"),
    "max_new_tokens -1": _fields("generation_config.json", max_new_tokens=-1),
    "repetition_penalty 0": _fields("generation_config.json", repetition_penalty=0.0),
    "num_return_sequences 2": _fields("generation_config.json", num_return_sequences=2, do_sample=True),
    "suppress_tokens of letters": _fields("generation_config.json", suppress_tokens="x"),
}

EITHER_MODELS: dict[str, Change] = {
    "tokenizer_config.json gone": _gone("tokenizer_config.json"),
    "architectures unknown": _config(architectures=["NoSuchModel"]),
    "architectures a number": _config(architectures=5),
    "max_position_embeddings 0": _config(max_position_embeddings=0),
    "max_position_embeddings huge": _config(max_position_embeddings=10**15),
    "a field nobody knows": _config(nosuch={"a": [1]}),
    "chat_template a number, not used": _fields("tokenizer_config.json", chat_template=5),
    "rms_norm_eps NaN": _config(rms_norm_eps=float("nan")),
}

LEGAL_MODELS: dict[str, Change] = {
    "unchanged": lambda folder: None,
    "no generation configuration": _gone("generation_config.json"),
    "a file beside the weights": _write("notes.txt", "x"),
    "a template that is torn, not used": _fields("tokenizer_config.json", chat_template="{% if"),
}


def _rows(models: Mapping[str, Change], verdict: Verdict, argv: tuple[str, ...] = _RUN, head: str = "") -> list[Row]:
    return [
        Row(AREA, f"{head}{name}", argv, verdict, make=_model(change), keeps="model/**/*")
        for name, change in models.items()
    ]


ROWS: list[Row] = [
    *_rows(REFUSED_MODELS, REFUSED),
    *_rows(REFUSED_GENERATION, REFUSED, _GENERATE, "generation configuration: "),
    *_rows(EITHER_MODELS, EITHER),
    Row(AREA, "generation configuration: temperature of letters", _GENERATE, EITHER, keeps="model/**/*",
        make=_model(_fields("generation_config.json", do_sample=True, temperature="hot")),
        doubt="lm-eval gives a temperature of its own, which replaces it"),
    *_rows(LEGAL_MODELS, LEGAL),
    Row(AREA, "num_hidden_layers huge", _RUN, make=_model(_config(num_hidden_layers=10**6)), slow=True,
        doubt="transformers builds a million layers before it looks at the weights"),
    Row(AREA, "a template that is torn", evaluate("pretrained=./model", "--limit", "1", "--apply_chat_template"),
        make=_model(_fields("tokenizer_config.json", chat_template="{% if")), says="template"),
    Row(AREA, "a template that raises", evaluate("pretrained=./model", "--limit", "1", "--apply_chat_template"),
        make=_model(_fields("tokenizer_config.json", chat_template="{{ raise_exception('no') }}")), says="template"),
    Row(AREA, "an adapter torn", evaluate("pretrained=<llama>,peft=./model", "--limit", "1"), says="peft",
        make=lambda work, words: (shutil.copytree(words["lora"], work / "model"),
                                  _cut("adapter_model.safetensors", 0.5)(work / "model"))),
    Row(AREA, "an adapter's configuration torn", evaluate("pretrained=<llama>,peft=./model", "--limit", "1"),
        make=lambda work, words: (shutil.copytree(words["lora"], work / "model"),
                                  _cut("adapter_config.json", 0.5)(work / "model")), says="peft"),
]  # fmt: skip
