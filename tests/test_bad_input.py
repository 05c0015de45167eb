"""What a user can get wrong: one clear line with what was given, what is accepted and what to type; nothing written.

Most cases go through lm-eval's real command line in this process, on tiny models; its thousands of own tasks are left
out because listing them takes five seconds. Three go through a real process.

Long, since each way to go wrong is a row of one table.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_eval_sparse import patches
from lm_eval_sparse.cli import app as cli
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.methods import METHODS
from lm_eval_sparse.model import embedded
from lm_eval_sparse.model.lm import SparseHFLM

patches.install()

REPOSITORY = Path(__file__).resolve().parent.parent
FLEX = "method=flexprefill,gamma=0.5,min_budget=0,block_size=16,backend=gather"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tasks(tmp_path_factory.mktemp("tasks"), lengths=(110, 120))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, a working folder of its own, no embedded model, and no list of lm-eval's own tasks."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def no_download(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a mistake was only seen after the embedded model was fetched")

    monkeypatch.setattr(embedded, "ensure", no_download)
    original = TaskManager.__init__

    def __init__(self: TaskManager, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", __init__)


@pytest.fixture
def complaint(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Runs the command line and returns its one line of complaint, without `lm-eval-sparse: error: `."""
    # The command line configures logging for its process; give it back as it was.
    loggers = [logging.getLogger(name) for name in (None, "lm_eval", "lm_eval_sparse")]
    before = [(logger.level, logger.handlers[:]) for logger in loggers]

    def run(model_args: str, *argv: str, task: str = "tiny_choice") -> str:
        capsys.readouterr()
        command = ["run", "--model", "sparse-hf", "--model_args", model_args, "--tasks", task, "--include_path",
                   str(tasks), "--output_path", "out", "--log_samples", *argv]  # fmt: skip
        assert cli.main(command) == 1
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        lines = [line for line in printed.err.splitlines() if "error" in line.lower()]
        assert len(lines) == 1, lines
        assert lines[0].startswith("lm-eval-sparse: error: ")
        assert_only_answers(tmp_path / "out")
        return lines[0].removeprefix("lm-eval-sparse: error: ")

    yield run
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


def assert_only_answers(output: Path) -> None:
    """There are no results, and nothing else but the log of answers, where any were made."""
    assert all(path.parents[1].name == "resume_log" for path in output.rglob("*") if path.is_file())


def assert_says(message: str, *fragments: str) -> None:
    for fragment in fragments:
        assert fragment in message, message


# --- the method and its sparsity -------------------------------------------------------------------------------------

#: Model arguments -> what the complaint must hold: the offending value, what is accepted, what to type.
SPARSE_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "method=flexprefil,sparsity=0.9": ("'flexprefil'", "did you mean 'flexprefill'", "accepted: dense", "method="),
    "method=FlexPrefill,sparsity=0.9": ("'FlexPrefill'", "did you mean 'flexprefill'"),
    "method=dens": ("'dens'", "did you mean 'dense'"),
    "method=xyzzy": ("'xyzzy'", "accepted: dense, vertical_slash, flexprefill", "method=flexprefill"),
    "method=": ("method=''", "accepted: dense, vertical_slash, flexprefill"),
    "method=5": ("'5'", "accepted: dense, vertical_slash, flexprefill"),
    "method=flexprefill+": ("method='flexprefill+'", "a name is missing beside a plus sign", "type method=flexprefill"),
    "method=dense+flexprefill,sparsity=0.5": ("dense+flexprefill", "leave it out"),
    "method=flexprefill+flexprefill": ("flexprefill+flexprefill", "prefill phase", "one method per phase"),
    "method=flexprefill,sparsity=1": ("sparsity=1 ", "from 0", "not including 1", "sparsity=0.9"),
    "method=flexprefill,sparsity=1.0": ("sparsity=1.0 ", "not including 1"),
    "method=flexprefill,sparsity=90": ("sparsity=90 ", "not including 1", "sparsity=0.9"),
    "method=flexprefill,sparsity=-0.1": ("sparsity=-0.1 ", "from 0"),
    "method=flexprefill,sparsity=much": ("sparsity='much'", "a number from 0", "sparsity=0.9"),
    "method=flexprefill,sparsity=90%": ("sparsity='90%'", "a number from 0", "sparsity=0.9"),
    "method=flexprefill,sparsity=nan": ("sparsity=nan", "a number from 0"),
    "method=flexprefill,sparsity=inf": ("sparsity=inf", "a number from 0"),
    "method=flexprefill,sparsity=True": ("sparsity=True", "a number from 0"),
    "method=flexprefill,sparsity=": ("sparsity=''", "a number from 0"),
    "sparsity=0.9": ("sparsity=0.9", "needs a method", "accepted: vertical_slash", "method=flexprefill,sparsity=0.9"),
    "method=dense,sparsity=0.5": ("sparsity=0.5", "needs a method", "method=flexprefill,sparsity=0.5"),
    "method=flexprefill,sparsity=0.9,gamma=0.95": ("sparsity=0.9", "gamma=0.95", "either"),
    "method=flexprefill,sparsity=0,gamma=0.95": ("sparsity=0", "gamma=0.95", "either"),
    "method=flexprefill,sparsity=0.9,block_size=64,min_budget=0": ("sparsity=0.9", "with min_budget=0:", "either"),
    "method=snapkv+ada_snapkv,sparsity=0.9": ("snapkv and ada_snapkv", "eviction phase", "one method per phase"),
    "method=quest,kv_sparsity=0.9": (
        "kv_sparsity=0.9",
        "eviction phase",
        ", ".join(name for name, cls in METHODS.items() if cls.phase == "eviction"),
        "quest fills the decode",
    ),
    "method=quest,preset=papr,sparsity=0.9": ("preset='papr'", "did you mean 'paper'"),
    "method=quest,preset=paper,sparsity=0.9": (
        "preset=paper",
        "from 14746 tokens on",
        "takes 2048",
        "leave preset out",
    ),
    "method=quest,budget=100": ("budget=100", "page_size=16", "budget=96 or budget=112"),
    "method=snapkv,capacity=200": ("capacity=200", "does not exceed window=256"),
    "method=flexprefill+,sparsity=0.5": ("method='flexprefill+'", "type method=flexprefill"),
    "method=snapkv+quest,stats=ful": ("stats='ful'", "did you mean 'full'"),
    "gamma=0.9": ("gamma=0.9", "knob of flexprefill", "method=dense", "method=flexprefill,gamma=0.9"),
    "method=flexprefill,gamma=2": ("gamma=2 ", "a number above 0", "to 1", "gamma=0.9"),
    "method=flexprefill,gamma=0": ("gamma=0 ", "a number above 0", "gamma=0.9"),
    "method=flexprefill,gamma=-1": ("gamma=-1", "gamma=0.9"),
    "method=flexprefill,gamma=nan": ("gamma=nan", "gamma=0.9"),
    "method=flexprefill,gamma=high": ("gamma='high'", "a number", "gamma=0.9"),
    "method=flexprefill,tau=1.5": ("tau=1.5 ", "from 0 to 1", "tau=0.1"),
    "method=flexprefill,min_budget=1.5": ("min_budget=1.5", "whole number", "min_budget=1024"),
    "method=flexprefill,min_budget=-1": ("min_budget=-1", "at least 0", "min_budget=1024"),
    "method=flexprefill,max_budget=0": ("max_budget=0", "at least 1"),
    "method=flexprefill,max_budget=512": ("max_budget=512", "min_budget=1024"),
    "method=flexprefill,block_size=48": ("block_size=48", "16, 32, 64, 128", "auto"),
    "method=flexprefill,block_size=big": ("block_size='big'", "16, 32, 64, 128", "auto"),
    "method=flexprefill,backend=flexx": ("'flexx'", "did you mean 'flex'", "auto", "gather", "naive"),
    "method=flexprefill,backend=7": ("backend=7", "auto", "flex", "gather", "naive"),
}


@pytest.mark.parametrize("model_args", SPARSE_ARGUMENTS)
def test_sparse_arguments(model_args: str, llama: str, complaint: Callable[..., str]) -> None:
    assert_says(complaint(f"pretrained={llama},{model_args}"), *SPARSE_ARGUMENTS[model_args])


@pytest.mark.parametrize("model_args", ["method=flexprefil", "method=flexprefill,gamma=2", "sparsty=0.9",
                                        "method=flexprefill,sparsity=2", "attn_implementation=sdpa"])  # fmt: skip
def test_seen_before_the_embedded_model_is_fetched(model_args: str, complaint: Callable[..., str]) -> None:
    assert_says(complaint(model_args), model_args.split(",")[-1].split("=")[1])


@pytest.mark.parametrize("value", ["0.9", True, float("nan"), [0.9], {}, 1, -1e-9, np.float64(1.0)])
def test_sparsity_from_python(llama: str, value: Any) -> None:
    with pytest.raises(UserError, match="sparsity=.* a number from 0"):
        SparseHFLM(pretrained=llama, method="flexprefill", sparsity=value)


@pytest.mark.parametrize("value", [["flexprefill"], 5, ("dense",)])
def test_method_from_python(llama: str, value: Any) -> None:
    with pytest.raises(UserError, match="method=.*accepted: dense, vertical_slash, flexprefill"):
        SparseHFLM(pretrained=llama, method=value)


def test_methods_joined_by_a_comma(llama: str) -> None:
    with pytest.raises(UserError, match=r"snapkv stands alone .* plus sign, as in method=flexprefill\+snapkv\+quest"):
        SparseHFLM.create_from_arg_string(f"pretrained={llama},method=flexprefill,snapkv,sparsity=0.5")


@pytest.mark.parametrize(("backend", "words"), [("triton", "a CUDA device"), ("hopper", "Hopper")])
def test_kernels_of_gpus_are_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, backend: str, words: str
) -> None:
    from lm_eval_sparse.kernels.backends import triton_unavailable

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton_unavailable.cache_clear()
    try:
        with pytest.raises(UserError, match=f"backend={backend} needs .*{words}.*on cpu.*backend=gather"):
            SparseHFLM(pretrained="sshleifer/tiny-gpt2", method="block_sparse", backend=backend, device="cpu")
    finally:
        triton_unavailable.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval_sparse.kernels.backends import triton_unavailable

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton_unavailable.cache_clear()
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"device={device}: torch sees no CUDA device here; .* type --device cpu"):
            SparseHFLM(pretrained=llama, device=device)
    # lm-eval's default means the CPU then; kernels of GPUs are refused all the same.
    assert SparseHFLM(pretrained=llama, device="cuda:0").device.type == "cpu"
    with pytest.raises(UserError, match="backend=triton needs a CUDA device, and this run is on cpu"):
        SparseHFLM(pretrained=llama, method="block_sparse", backend="triton", device="cuda:0")
    # What torch itself would end with is not what is asked.
    assert "no CUDA device" in (triton_unavailable("cuda") or "")
    triton_unavailable.cache_clear()


def test_what_is_given_twice(llama: str) -> None:
    with pytest.raises(UserError, match="device=cpu in --model_args, and device=cuda:0 beside it: .* --device cpu"):
        SparseHFLM.create_from_arg_string(f"pretrained={llama},device=cpu", {"device": "cuda:0"})
    SparseHFLM.create_from_arg_string(f"pretrained={llama},device=cpu", {"device": None, "batch_size": 1})


def test_generation_arguments_that_are_no_numbers(llama: str) -> None:
    lm = SparseHFLM(pretrained=llama, device="cpu")
    request = Instance("generate_until", {}, ("abc def", {"until": [], "max_gen_toks": "x"}), 0)
    with pytest.raises(UserError, match=r"--gen_kwargs until=\[\] max_gen_toks=x is not understood"):
        lm.generate_until([request], disable_tqdm=True)


@pytest.mark.parametrize("value", [["gather"], {}, None.__class__, 3])
def test_backend_from_python(llama: str, value: Any) -> None:
    with pytest.raises(UserError, match="backend=.*accepted: auto"):
        SparseHFLM(pretrained=llama, method="flexprefill", sparsity=0.5, backend=value)


@pytest.mark.parametrize("value", [[16], "16", {}, 16.5, True])
def test_block_size_from_python(llama: str, value: Any) -> None:
    with pytest.raises(UserError, match="block_size=.*16, 32, 64, 128"):
        SparseHFLM(pretrained=llama, method="flexprefill", block_size=value)


def test_sparsity_beyond_what_is_reachable_on_long_prompts(tmp_path: Path) -> None:
    """From 4096 tokens on sparsity is a promise; what cannot be kept is an error that says what can be."""
    folder = tiny.tiny_llama(tmp_path / "long", max_position_embeddings=8192, num_hidden_layers=1)
    lm = SparseHFLM(pretrained=str(folder), method="flexprefill", sparsity=0.999, backend="gather")
    ids = torch.arange(4100)[None] % 300
    with pytest.raises(UserError, match=r"sparsity=0\.999 .*4100 tokens.*at most 0\.98\d.*type sparsity=0\.98"):
        lm.forward(ids, cache=None, keep=1)


# --- the arguments of the model --------------------------------------------------------------------------------------

MODEL_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "sparsty=0.9,method=flexprefill": ("sparsty=0.9", "did you mean 'sparsity'", "accepted", "sparsity"),
    "methd=flexprefill": ("methd='flexprefill'", "did you mean 'method'"),
    "gama=0.9,method=flexprefill": ("gama=0.9", "did you mean 'gamma'"),
    "blocksize=16,method=flexprefill": ("blocksize=16", "'block_size'"),
    "dtyp=float32": ("dtyp='float32'", "did you mean 'dtype'"),
    "max_lenght=512": ("max_lenght=512", "'max_length'"),
    "xyzzy=1": ("xyzzy=1", "is unknown", "accepted", "method", "sparsity", "gamma"),
    "attn_implementation=sdpa": ("attn_implementation=sdpa", "leave it out", "--model hf"),
    "attn_implementation=flash_attention_2,method=flexprefill,sparsity=0.9": ("flash_attention_2", "leave it out"),
}


@pytest.mark.parametrize("model_args", MODEL_ARGUMENTS)
def test_model_arguments(model_args: str, llama: str, complaint: Callable[..., str]) -> None:
    assert_says(complaint(f"pretrained={llama},{model_args}"), *MODEL_ARGUMENTS[model_args])


def test_unknown_argument_with_a_model_in_memory() -> None:
    with pytest.raises(UserError, match="gama=0.9.*did you mean 'gamma'"):
        SparseHFLM(pretrained=tiny.family("llama"), tokenizer=tiny.tiny_tokenizer(), gama=0.9)


def test_fields_of_the_configuration_are_accepted(llama: str) -> None:
    """Such as `rope_parameters`: not a mistake."""
    lm = SparseHFLM(pretrained=llama, rms_norm_eps=1e-3)
    assert lm.model.config.rms_norm_eps == 1e-3


# --- where the model is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "../nowhere/model", "~/no-such-folder-here", "a/b/c"])
def test_local_path_that_does_not_exist(path: str, complaint: Callable[..., str]) -> None:
    message = complaint(f"pretrained={path}")
    assert_says(message, repr(path), "no such folder", "path of a folder", "leave pretrained out")


@pytest.mark.parametrize("name", ["nowhere", "models/nowhere"])
def test_path_that_could_be_a_repository(name: str, complaint: Callable[..., str]) -> None:
    """A relative path without `./` looks like a name on the Hub, which cannot be asked either."""
    assert_says(complaint(f"pretrained={name}"), repr(name), "could not be loaded", "folder", "leave pretrained out")


@pytest.mark.parametrize("name", ["two words", "a//b", "-model", "some:thing", "x" * 120])
def test_name_that_no_repository_can_have(name: str, complaint: Callable[..., str]) -> None:
    assert_says(complaint(f"pretrained={name}"), name[:20], "leave pretrained out")


def test_folder_without_a_model(tmp_path: Path, complaint: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    message = complaint(f"pretrained={tmp_path / 'empty'}")
    assert_says(message, "empty", "folder with a transformers model")


def test_folder_without_weights(tmp_path: Path, complaint: Callable[..., str]) -> None:
    folder = tiny.tiny_llama(tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    message = complaint(f"pretrained={folder}")
    assert_says(message, str(folder), "could not be loaded", "folder with a transformers model")


def test_pretrained_is_a_file(tmp_path: Path, complaint: Callable[..., str]) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    message = complaint(f"pretrained={file}")
    assert_says(message, str(file), "give its folder", f"pretrained={tmp_path},gguf_file=model.gguf")


def write_gguf(path: Path) -> Path:
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(128)
    out.add_tensor("a.weight", np.ones((64, 64), dtype=np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.mark.parametrize("keep", [0.9, 0.02])
def test_truncated_gguf(tmp_path: Path, complaint: Callable[..., str], keep: float) -> None:
    """Cut in the weights, and in the header."""
    file = write_gguf(tmp_path / "cut.gguf")
    whole = file.read_bytes()
    size = int(len(whole) * keep)
    file.write_bytes(whole[:size])
    message = complaint(f"pretrained={tmp_path},gguf_file=cut.gguf,{FLEX}")
    assert_says(message, "cut.gguf", "truncated", f"{size:,} bytes", "copy or download it again")


def test_gguf_that_is_not_there(tmp_path: Path, complaint: Callable[..., str]) -> None:
    write_gguf(tmp_path / "there.gguf")
    assert_says(complaint(f"pretrained={tmp_path},gguf_file=missing.gguf"), "missing.gguf", "there.gguf")


def test_gguf_without_a_folder(complaint: Callable[..., str]) -> None:
    assert_says(complaint("gguf_file=model.gguf"), "gguf_file=model.gguf", "pretrained=")


# --- what is added to the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["peft", "delta"])
@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "~/no-such-folder-here", "a/b/c"])
def test_addition_that_does_not_exist(name: str, path: str, llama: str, complaint: Callable[..., str]) -> None:
    message = complaint(f"pretrained={llama},{name}={path}")
    assert_says(message, f"{name}={path!r}", "no such folder", f"leave {name} out")


@pytest.mark.parametrize("name", ["peft", "delta"])
@pytest.mark.parametrize("path", ["nowhere", "models/nowhere", "two words"])
def test_addition_that_could_be_a_repository(name: str, path: str, llama: str, complaint: Callable[..., str]) -> None:
    message = complaint(f"pretrained={llama},{name}={path}")
    assert_says(message, f"{name}={path!r} could not be loaded", "such a Hub repository")


@pytest.mark.parametrize(("name", "file"), [("peft", "adapter_config.json"), ("delta", "config.json")])
def test_addition_of_another_kind(
    name: str, file: str, llama: str, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    """Nothing, a folder that is none, a file; each seen before the model is."""
    assert_says(complaint(f"pretrained={llama},{name}="), f"{name}= is empty", f"leave {name} out")
    (tmp_path / "folder").mkdir()
    assert_says(complaint(f"pretrained=no-model,{name}={tmp_path / 'folder'}"), str(tmp_path), f"without {file}")
    (tmp_path / "weights").write_bytes(b"")
    assert_says(complaint(f"{name}={tmp_path / 'weights'}"), str(tmp_path), "is a file")
    (tmp_path / "folder" / file).write_text("{")
    message = complaint(f"pretrained={llama},{name}={tmp_path / 'folder'}")
    assert_says(message, f"{name}=", str(tmp_path / "folder"), "could not be loaded")
    (tmp_path / "folder" / file).write_text('{"peft_type": "XYZZY", "model_type": "xyzzy"}')
    assert_says(complaint(f"pretrained={llama},{name}={tmp_path / 'folder'}"), f"{name}=", "could not be loaded")


def test_adapter_without_weights(llama: str, tmp_path: Path, complaint: Callable[..., str]) -> None:
    folder = tiny.lora(Path(llama), tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert_says(complaint(f"pretrained={llama},peft={folder}"), f"peft={str(folder)!r}", "does not fit")
    (folder / "adapter_model.safetensors").unlink()
    assert_says(complaint(f"pretrained={llama},peft={folder}"), f"peft={str(folder)!r}", "made for this model")


#: What differs in the model that the adapter or the delta was made for -> what the complaint must say.
OTHERS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "wider": ("llama", {"hidden_size": 128}, "size mismatch", ".weight is ["),
    "more layers": ("llama", {"num_hidden_layers": 3}, "layers.2", "has model.layers.2"),
    "fewer layers": ("llama", {"num_hidden_layers": 1}, "layers.1", "lacks model.layers.1"),
    "another class": ("phi3", {}, "q", "qkv_proj"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_adapter_made_for_another_model(other: str, llama: str, tmp_path: Path, complaint: Callable[..., str]) -> None:
    """peft raises at other shapes and names; layers that the model has not are dropped, missing ones left random."""
    name, options, words, _ = OTHERS[other]
    base = tiny.tiny(name, tmp_path / "other", **options)
    targets = ["qkv_proj"] if name == "phi3" else ["q_proj", "v_proj"]
    folder = tiny.lora(base, tmp_path / "adapter", target_modules=targets)
    message = complaint(f"pretrained={llama},peft={folder}")
    assert_says(message, f"peft={str(folder)!r}", f"made for {str(base)!r}", "does not fit", words, "made for this")
    assert len(message) < 1000


@pytest.mark.parametrize("other", OTHERS)
def test_delta_of_another_model(
    other: str, llama: str, tmp_path: Path, complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options, _, words = OTHERS[other]
    folder = tiny.tiny(name, tmp_path / "other", **options)
    (folder / "model.safetensors").unlink()  # the configuration is enough to know
    message = complaint(f"pretrained={llama},delta={folder}")
    assert_says(message, f"delta={str(folder)!r}", "does not fit", words, "made for this model")


def test_adapter_that_changes_the_prompt(llama: str, tmp_path: Path, complaint: Callable[..., str]) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(tiny.family("llama"), config).save_pretrained(tmp_path / "prompt")
    message = complaint(f"pretrained={llama},peft={tmp_path / 'prompt'}")
    assert_says(message, "PROMPT_TUNING", "such as LoRA", "--model hf")


def test_two_additions(llama: str, complaint: Callable[..., str]) -> None:
    assert_says(complaint(f"pretrained={llama},peft=a,delta=b"), "peft=a and delta=b", "leave one out")


@pytest.mark.parametrize("name", ["peft", "delta"])
def test_addition_to_a_model_in_memory(name: str, llama: str) -> None:
    """lm-eval would ignore it with a warning."""
    with pytest.raises(UserError, match=f"{name}=.* model in memory"):
        SparseHFLM(pretrained=tiny.family("llama"), tokenizer=tiny.tiny_tokenizer(), **{name: llama})


def test_a_model_that_does_not_load_is_not_the_fault_of_its_adapter(
    tmp_path: Path, complaint: Callable[..., str]
) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    folder = tiny.lora(base, tmp_path / "adapter")
    (base / "model.safetensors").unlink()
    assert_says(complaint(f"pretrained={base},peft={folder}"), f"pretrained={str(base)!r} could not be loaded")


# --- models without the attention we need ----------------------------------------------------------------------------

#: Model -> what the complaint must say of its kind.
KINDS: dict[str, str] = {
    "bert": "causal",
    "distilbert": "causal",
    "roberta": "causal",
    "ernie": "causal",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    **dict.fromkeys(("mamba", "rwkv", "bloom", "mpt", "falcon_alibi", "gpt_neo", "minimax"), ""),
}


@pytest.mark.parametrize("name", tiny.UNSUPPORTED)
def test_model_with_an_attention_that_is_not_supported(
    name: str, tmp_path: Path, complaint: Callable[..., str]
) -> None:
    folder = tiny.save(tiny.unsupported(name), tmp_path / f"tiny-{name}")
    message = complaint(f"pretrained={folder},{FLEX}")
    # What was given, why not, and what to type.
    assert_says(message, str(folder), KINDS[name], "sparse-hf evaluates" if KINDS[name] else "--model hf")


@pytest.mark.parametrize("name", ["mamba", "bloom", "gpt_neo", "ernie"])
def test_unsupported_model_in_memory(name: str) -> None:
    with pytest.raises(UserError) as caught:
        SparseHFLM(pretrained=tiny.unsupported(name), tokenizer=tiny.tiny_tokenizer())
    assert "\n" not in str(caught.value) and "''" not in str(caught.value)


def test_no_layer_with_full_attention(tmp_path: Path, complaint: Callable[..., str]) -> None:
    """Windows in every layer: dense works, a method has nothing to do."""
    folder = tiny.tiny("mistral", tmp_path / "windows")
    assert SparseHFLM(pretrained=str(folder)).runtime.layers
    assert_says(complaint(f"pretrained={folder},{FLEX}"), str(folder), "sliding window of 40")


def test_the_model_in_memory_is_usable_after_a_complaint() -> None:
    """A model that was refused keeps its own attention."""
    model = tiny.family("mistral")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.raises(UserError):
            SparseHFLM(pretrained=model, tokenizer=tiny.tiny_tokenizer(), method="flexprefill", sparsity=0.5)
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)


# --- prompts and generation arguments --------------------------------------------------------------------------------


def test_short_prompts_only(llama: str, complaint: Callable[..., str]) -> None:
    """Prompts below the minimum are dense and counted; when no other came, the method never ran."""
    message = complaint(f"pretrained={llama},method=flexprefill", task="tiny_generate")
    assert_says(message, "flexprefill never ran", "does not exceed 1024", "longer prompts", "method=dense")


GENERATION: dict[str, tuple[str, ...]] = {
    "cache_implementation=static": ("cache_implementation=static", "own KV cache", "leave cache_implementation out"),
    "use_cache=False": ("use_cache=False", "leave use_cache out"),
    "prefill_chunk_size=32": ("prefill_chunk_size=32", "flexprefill", "leave prefill_chunk_size out"),
    "max_gen_toks=4096": ("max_gen_toks=4096", "2048 tokens", "max_gen_toks="),
}


@pytest.mark.parametrize("options", GENERATION)
def test_generation_arguments(options: str, llama: str, complaint: Callable[..., str]) -> None:
    message = complaint(f"pretrained={llama},{FLEX}", "--gen_kwargs", options, task="tiny_generate")
    assert_says(message, *GENERATION[options])


def test_thinking_in_scored_tasks(llama: str, complaint: Callable[..., str]) -> None:
    message = complaint(f"pretrained={llama},enable_thinking=True,think_end_token=</think>")
    assert_says(message, "enable_thinking=True", "generated tasks only")


# --- the response cache ----------------------------------------------------------------------------------------------


def answer(args: dict[str, Any], cache: Path, cls: type[HFLM] = SparseHFLM) -> list[Any]:
    """Score a pair the way `--use_cache` does."""
    pair = (tiny.words(1, 110), " river stone")
    request = Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0, metadata=("t", 0, 1))
    lm = CachingLM(cls(device="cpu", **args), f"{cache}_rank0.db")
    try:
        return lm.loglikelihood([request])
    finally:
        lm.dbdict.close()


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "flexprefill", "sparsity": 0.5, "backend": "gather"}, "method"),
    "knob": ({"gamma": 0.7}, "gamma"),
    "dtype": ({"dtype": "bfloat16"}, "dtype"),
    "length": ({"max_length": 64}, "max_length"),
    "bos": ({"add_bos_token": True}, "add_bos_token"),
    "configuration": ({"rms_norm_eps": 0.1}, "rms_norm_eps"),
}
KNOBS: dict[str, Any] = {
    "method": "flexprefill", "gamma": 0.5, "min_budget": 0, "block_size": 16, "backend": "gather"
}  # fmt: skip


@pytest.mark.parametrize("other", OTHER)
def test_cache_of_another_configuration(other: str, llama: str, tmp_path: Path) -> None:
    """Its answers are others; lm-eval would replay them."""
    cache = tmp_path / "answers"
    base = {"pretrained": llama, **(KNOBS if other == "knob" else {"method": "dense"})}
    first = answer(base, cache)
    changed, word = OTHER[other]
    with pytest.raises(UserError) as caught:
        answer({**base, **changed}, cache)
    assert_says(str(caught.value), "--use_cache", word, "another file name", "delete")
    assert "\n" not in str(caught.value)
    # The refusal leaves the file as it was.
    assert answer(base, cache) == first


def test_cache_of_other_weights_in_the_same_folder(tmp_path: Path) -> None:
    """A model that was trained on, saved in its place: same path, same size, other answers."""
    folder, cache = tmp_path / "model", tmp_path / "answers"
    tiny.tiny_llama(folder, seed=0)
    answer({"pretrained": str(folder)}, cache)
    tiny.tiny_llama(folder, seed=1)
    with pytest.raises(UserError, match="--use_cache"):
        answer({"pretrained": str(folder)}, cache)


def test_cache_of_another_subfolder(tmp_path: Path) -> None:
    """As with two GGUF files of one folder: `pretrained` alone does not name the model."""
    cache = tmp_path / "answers"
    for seed, name in enumerate(("one", "two")):
        tiny.tiny_llama(tmp_path / "models" / name, seed=seed)
    tiny.tiny_llama(tmp_path / "models")
    one = answer({"pretrained": str(tmp_path / "models"), "subfolder": "one"}, cache)
    two = answer({"pretrained": str(tmp_path / "models"), "subfolder": "two"}, tmp_path / "others")
    assert one != two
    with pytest.raises(UserError, match="--use_cache"):
        answer({"pretrained": str(tmp_path / "models"), "subfolder": "two"}, cache)


def test_cache_of_model_hf(llama: str, tmp_path: Path) -> None:
    cache = tmp_path / "answers"
    answer({"pretrained": llama}, cache, HFLM)
    for args in ({}, KNOBS):
        with pytest.raises(UserError, match="--use_cache file was written by another model type.*another file name"):
            answer({"pretrained": llama, **args}, cache)


def test_cache_through_the_command_line(llama: str, tmp_path: Path, complaint: Callable[..., str]) -> None:
    answer({"pretrained": llama}, tmp_path / "answers")
    message = complaint(f"pretrained={llama},{FLEX}", "--use_cache", str(tmp_path / "answers"))
    assert_says(message, "--use_cache", "'dense' there", "'flexprefill' now", "another file name")


def test_the_same_configuration_is_no_mistake(llama: str, tmp_path: Path) -> None:
    first, second = (answer({"pretrained": llama, **KNOBS}, tmp_path / "answers") for _ in range(2))
    assert first == second and first[0].stats == second[0].stats


# --- real processes --------------------------------------------------------------------------------------------------

#: lm-eval's own tasks are left out here too; then plain `lm_eval`, or our command.
QUICK = """
import sys
from lm_eval_sparse import patches
patches.install()
import lm_eval.tasks.manager as manager
original = manager.TaskManager.__init__
manager.TaskManager.__init__ = lambda self, *a, **k: original(self, *a, **{**k, "include_defaults": False})
"""
PLAIN = QUICK + "from lm_eval.__main__ import cli_evaluate\ncli_evaluate()"
OURS = QUICK + "from lm_eval_sparse.cli.app import main\nsys.exit(main())"


def process(tmp_path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"HF_HOME": str(tmp_path / "hf"), "LM_EVAL_SPARSE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr + done.stdout
    assert_only_answers(tmp_path / "out")
    return done


def the_line(stderr: str) -> str:
    (line,) = (line for line in stderr.splitlines() if re.search("error", line, re.IGNORECASE))
    return line


@pytest.mark.slow
def test_process_of_plain_lm_eval(tmp_path: Path, tasks: Path, llama: str) -> None:
    """Under `lm_eval` itself the line comes from the exception hook, after a model was loaded and run."""
    done = process(tmp_path, "-c", PLAIN, "run", "--model", "sparse-hf", "--model_args",
                   f"pretrained={llama},method=flexprefill", "--tasks", "tiny_generate", "--include_path", str(tasks),
                   "--output_path", "out")  # fmt: skip
    assert_says(the_line(done.stderr), "lm-eval-sparse: error: flexprefill never ran", "does not exceed 1024")
    assert "tiny_generate" not in done.stdout


@pytest.mark.slow
def test_process_of_our_command(tmp_path: Path, tasks: Path, llama: str) -> None:
    done = process(tmp_path, "-c", OURS, "run", "--model", "sparse-hf", "--model_args",
                   f"pretrained={llama},method=flexprefil,sparsity=0.9", "--tasks", "tiny_generate", "--include_path",
                   str(tasks), "--output_path", "out")  # fmt: skip
    assert_says(the_line(done.stderr), "lm-eval-sparse: error: ", "'flexprefil'", "did you mean 'flexprefill'")


def test_hf_model_still_raises_its_own_errors(tasks: Path, tmp_path: Path) -> None:
    """Our checks are for sparse-hf only."""
    with pytest.raises((OSError, ValueError)) as caught:
        HFLM(pretrained=str(tmp_path / "nowhere"), device="cpu")
    assert not isinstance(caught.value, UserError)


def own_task(tasks: Path, folder: Path, llama: str, body: str) -> list[str]:
    """The command line that runs a task in `folder` whose prompts are made by a function with this body."""
    folder.mkdir()
    text = (tasks / "tiny_choice.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("task:", "doc_to_text:"))]
    (folder / "own.yaml").write_text("\n".join(["task: own_task", "doc_to_text: !function own.text", *lines]) + "\n")
    (folder / "own.py").write_text(f"def text(doc):\n    {body}\n")
    return ["run", "--model", "sparse-hf", "--model_args", f"pretrained={llama}", "--tasks", "own_task",
            "--include_path", str(folder)]  # fmt: skip


def test_a_mistake_in_the_code_of_a_task_is_shown_where_it_is(
    tasks: Path, tmp_path: Path, llama: str, complaint: Any
) -> None:
    with pytest.raises(KeyError, match="nosuch"):
        cli.main(own_task(tasks, tmp_path / "own", llama, "return doc['nosuch']"))


@pytest.mark.parametrize(
    "line, said",
    [
        ("trust_remote_code: 'no'", "trust_remote_code=no is not accepted"),
        ("log_samples: 'no'", "log_samples=no is not accepted"),
        ("predict_only: maybe", "predict_only=maybe is not accepted"),
        ("apply_chat_template: 5", "apply_chat_template=5 is not accepted"),
        ("hf_hub_log_args: [1]", "hf_hub_log_args: [1] is not accepted"),
        ("gen_kwargs: {5: 6}", "gen_kwargs: {"),
    ],
)
def test_a_configuration_file_is_checked_like_options(
    line: str, said: str, tasks: Path, tmp_path: Path, llama: str, complaint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["model: sparse-hf", f"model_args: {{pretrained: {llama}}}", "tasks: [tiny_choice]", line]
    (tmp_path / "run.yaml").write_text("\n".join([*lines, f"include_path: {tasks}", "output_path: out"]) + "\n")
    assert cli.main(["run", "--config", "run.yaml"]) == 1
    assert f"lm-eval-sparse: error: {said}" in capsys.readouterr().err
    assert_only_answers(tmp_path / "out")


@pytest.mark.parametrize(
    "option, value", [("--metadata", '{"a": "\\ud800"}'), ("--gen_kwargs", '{"until": "\\ud800"}')]
)
def test_half_a_character(option: str, value: str, llama: str, complaint: Callable[..., str]) -> None:
    assert_says(complaint(f"pretrained={llama}", option, value), f"{option} holds half a character")


def test_code_of_a_task_that_ends_the_run(
    tasks: Path, tmp_path: Path, llama: str, complaint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(own_task(tasks, tmp_path / "own", llama, "raise SystemExit(0)")) == 1
    assert "code of a task or of the model ended the run (sys.exit(0))" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["xpu", "meta", "hpu", "npu:0", "disk"])
def test_devices_that_there_are_not(device: str, llama: str, complaint: Callable[..., str]) -> None:
    assert_says(complaint(f"pretrained={llama}", "--device", device), f"device={device} is not accepted")
