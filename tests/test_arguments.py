"""Every argument of the model takes what it says and nothing else; models are whole, or refused."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lm_eval.utils import simple_parse_args_string
from safetensors.torch import load_file, save_file

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.model import arguments
from lm_eval_sparse.model.arguments import ARGUMENTS, check_all
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.model.load import Whole
from lm_eval_sparse.results.files import DEEPEST, parse_json, read_bytes, write_whole
from lm_eval_sparse.values import FLAG, MAYBE, whole, yes_or_no

#: Of every kind that a command line or a Python program may bring.
VALUES: tuple[Any, ...] = (
    "", " ", "abc", "maybe", "no", "off", "True", "5", "-1", 5, 0, -1, 1.5, 1e30, float("nan"), float("inf"), True,
    False, [], [1], {}, {"a": 1}, "\0", "x" * 10_000, 10**400, "~nosuchuser/x", b"abc", object(),
    torch.float32, torch.int8,
)  # fmt: skip

#: What must be accepted, as it is typed.
GOOD: dict[str, tuple[str, ...]] = {
    "dtype": ("auto", "bfloat16", "float32"),
    "softmax_dtype": ("float32", "None"),
    "max_length": ("1", "4096", "None"),
    "trust_remote_code": ("True", "false", "1", "0"),
    "add_bos_token": ("None", "FALSE"),
    "prefix_token_id": ("0", "5"),
    "revision": ("main", "1234567", "v1.0-rc"),
    "subfolder": ("", "sub/folder"),
    "device_map": ("auto", "cpu", "balanced"),
    "think_end_token": ("</think>", "7"),
    "max_memory_per_gpu": ("20GiB", "1000000"),
    "token": ("True", "hf_abcdefghijklmnop"),
    "use_safetensors": ("true",),
    "quantization_config": ("None",),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_value_is_taken_or_refused_in_one_line(name: str) -> None:
    taken = 0
    for value in VALUES:
        given = {name: value}
        try:
            check_all(given)
        except UserError as error:
            assert str(error).startswith(name) and "\n" not in str(error) and len(str(error)) < 600
            continue
        taken += 1
        if ARGUMENTS[name].takes is FLAG:
            assert given[name] in (True, False) and isinstance(given[name], bool)
            assert str(value).lower() in ("true", "false", "1", "0"), value
    assert taken < len(VALUES) / 2, "nearly anything is taken"


@pytest.mark.parametrize("name", GOOD)
def test_what_is_right_is_taken(name: str) -> None:
    for typed in GOOD[name]:
        check_all(simple_parse_args_string(f"{name}={typed}"))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="load_in_4bit=True needs the package bitsandbytes"):
        check_all({"load_in_4bit": True})
    check_all({"load_in_4bit": False})


def test_pickled_weights_run_no_code(tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    folder = tiny.tiny_llama(tmp_path)
    (Path(folder) / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Planted()}, Path(folder) / "pytorch_model.bin")
    for options in ({}, {"weights_only": False}):
        with pytest.raises(UserError):
            SparseHFLM(str(folder), **options)
    assert not (tmp_path / "ran").exists()


# --- models with something missing -----------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(tiny.tiny_llama(tmp_path))


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_weights_that_files_lack_are_not_made_up(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = next(name for name in sorted(weights) if "mlp" in name)
    del weights[name]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lack 1 weights .* such as {name}"):
        SparseHFLM(str(model))


def test_more_layers_than_there_are(model: Path) -> None:
    with pytest.raises(UserError, match="files lack .* weights"):
        SparseHFLM(str(model), num_hidden_layers=9)
    with pytest.raises(UserError, match="in its files, and .* by its configuration"):
        SparseHFLM(str(model), intermediate_size=72)
    with pytest.raises(UserError, match="ignore_mismatched_sizes=True puts random numbers"):
        SparseHFLM(str(model), ignore_mismatched_sizes=True)


DAMAGE: dict[str, Any] = {
    "config torn": lambda folder: (folder / "config.json").write_text('{"model_type": "lla'),
    "config a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config deep": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "config not text": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\0"),
    "no heads": lambda folder: change(folder, num_attention_heads=0),
    "heads a word": lambda folder: change(folder, num_attention_heads="four"),
    "size a list": lambda folder: change(folder, hidden_size=[64]),
    "size huge": lambda folder: change(folder, hidden_size=2**40),
    "layers below zero": lambda folder: change(folder, num_hidden_layers=-2),
    "dtype unknown": lambda folder: change(folder, dtype="float17", torch_dtype="float17"),
    "rope unknown": lambda folder: change(folder, rope_parameters={"rope_type": "spiral"}),
    "activation unknown": lambda folder: change(folder, hidden_act="frobnicate"),
    "weights torn": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-1000]
    ),
    "weights empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "weights a header of 2**60 bytes": lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 7 + b"\x10"),
    "tokenizer torn": lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0", '),
    "tokenizer a number": lambda folder: (folder / "tokenizer.json").write_text("5"),
    "index outside": lambda folder: (
        (folder / "model.safetensors").rename(folder / "moved.safetensors"),
        (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"x": "../../y"}}'),
    ),
    "generation config torn": lambda folder: (folder / "generation_config.json").write_text('{"do_sample": '),
    "generation config a list": lambda folder: (folder / "generation_config.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_refused_in_one_line(model: Path, damage: str) -> None:
    DAMAGE[damage](model)
    with pytest.raises(UserError) as failure:
        SparseHFLM(str(model))
    assert "\n" not in str(failure.value) and str(model) in str(failure.value)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_positions_beyond_the_table(kind: str) -> None:
    if kind == "gpt2":
        from transformers import GPT2Config as Config
        from transformers import GPT2LMHeadModel as Model

        config = Config(n_embd=32, n_layer=1, n_head=2, n_positions=128, vocab_size=384)
    else:
        from transformers import OPTConfig as Config
        from transformers import OPTForCausalLM as Model

        config = Config(
            hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=128,
            vocab_size=384, word_embed_proj_dim=32,
        )  # fmt: skip
    tokenizer = tiny.tiny_tokenizer()
    with pytest.raises(UserError, match="max_length=129 .* table of 128 positions .* max_length=128 or less"):
        SparseHFLM(Model(config), tokenizer=tokenizer, max_length=129)
    assert SparseHFLM(Model(config), tokenizer=tokenizer, max_length=128).max_length == 128


# --- values and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["yes", "no", "on", "off", "maybe", "", 2, None, 0.5, [], "tru"])
def test_words_that_are_not_true_or_false(value: Any) -> None:
    with pytest.raises(UserError, match="x must be true or false"):
        yes_or_no("", "x", value)


@pytest.mark.parametrize("value", [True, 1e30, 1e300, "1e5", "", "abc", float("nan"), None, [1], 101, -1, "9" * 5000])
def test_whole_numbers_out_of_bounds(value: Any) -> None:
    with pytest.raises(UserError, match="x must be a whole number of at least 0 and of at most 100"):
        whole("", "x", value, 0, 100)
    assert not MAYBE.good(value) or value == 101


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b'{"a":' * 2000 + b"1" + b"}" * 2000, b"\xff", b"[]", b"5", b"9" * 10_000]
)
def test_json_that_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match="^here: ") as failure:
        parse_json(content, "here")
    assert len(str(failure.value)) < 300


def test_json_as_deep_as_is_read() -> None:
    for levels, good in ((DEEPEST, True), (DEEPEST + 1, False)):
        content = "[" * levels + "]" * levels
        if good:
            parse_json(content, "x", list)
        else:
            with pytest.raises(UserError, match="nested"):
                parse_json(content, "x", list)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "big").write_bytes(b"12345")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "loop", tmp_path / "none", Path("a\0b")):
        with pytest.raises(UserError):
            read_bytes(path)
    with pytest.raises(UserError, match="5 bytes, and at most 4"):
        read_bytes(tmp_path / "big", most=4)
    assert read_bytes(tmp_path / "big", most=5) == b"12345"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    target = tmp_path / "theirs"
    target.write_text("theirs")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_whole(link, b"ours")
    assert target.read_text() == "theirs" and link.read_text() == "ours" and not link.is_symlink()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_whole(link, b"other")
    assert link.read_text() == "ours" and sorted(path.name for path in tmp_path.iterdir()) == ["link", "theirs"]
    monkeypatch.undo()
    write_whole(tmp_path / ("n" * 255), b"a name as long as can be")


def test_a_class_that_gives_no_report_is_taken_as_it_is() -> None:
    model = torch.nn.Linear(1, 1)

    class Own:
        @classmethod
        def from_pretrained(cls, name: str, **options: Any) -> torch.nn.Module:
            return model

    assert Whole(Own).from_pretrained("own") is model


def test_no_knob_takes_an_argument_from_the_model() -> None:
    """What `hf` takes, and what is checked here: a method with a knob of that name would hide it."""
    from lm_eval.models.huggingface import HFLM

    from lm_eval_sparse.methods.registry import MODEL_ARGUMENTS, RESERVED

    theirs = {*inspect.signature(HFLM.__init__).parameters, *ARGUMENTS} - {"self", "kwargs"}
    assert theirs - {*MODEL_ARGUMENTS, *RESERVED} == set()
