"""What the model arguments of `sparse-hf` that lm-eval's `hf` and transformers know have to be, as a table.

A value that is none is refused before anything is loaded: deep inside a loader it would be a traceback, or be taken
for something else (`trust_remote_code=no` for true). Arguments that name sparsity are checked in `methods.plan`, fields
of a model's own configuration by transformers when it makes the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from .. import paths
from ..errors import UserError, nearest
from ..masking import shown
from ..results.files import brief
from ..values import FLAG, LENGTH, MAYBE, NUMBER, Takes, check, is_whole, yes_or_no

#: Names of the types that weights and softmax are computed in.
DTYPES = ("float32", "float16", "bfloat16", "float64", "float", "half", "double")
#: Names that transformers takes for a way to spread a model over devices.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_DEVICE = re.compile(r"(cpu|cuda|mps|npu|xpu|hpu|meta|disk)(:\d+)?")
_MEMORY = re.compile(r"\d+(\.\d+)?\s*([KMGT]i?B)?", re.IGNORECASE)


def _is_dtype(value: Any) -> bool:
    if isinstance(value, torch.dtype):
        return value.is_floating_point
    return value in DTYPES if isinstance(value, str) else False


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def is_device(value: Any) -> bool:
    """Whether a value names a kind of device that torch has, and perhaps a number."""
    if isinstance(value, torch.device) or is_whole(value, 0):
        return True
    return isinstance(value, str) and _DEVICE.fullmatch(value) is not None


def _is_device_map(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and is_device(place) for name, place in value.items())
    return is_device(value) or (isinstance(value, str) and value in DEVICE_MAPS)


def _is_memory(value: Any) -> bool:
    return is_whole(value, 1) or (isinstance(value, str) and _MEMORY.fullmatch(value) is not None)


def _is_object(value: Any) -> bool:
    """Given from Python, or as a JSON object."""
    return value is not None and not isinstance(value, str | int | float | list | tuple)


DTYPE = Takes(f"one of {', '.join(DTYPES)}", _is_dtype, "bfloat16")
DTYPE_OR_AUTO = Takes(f"auto or one of {', '.join(DTYPES)}", lambda v: v == "auto" or _is_dtype(v), "bfloat16")
MIXED = Takes("float16 or bfloat16", lambda v: _is_dtype(v) and str(v).endswith("16"), "bfloat16")
TEXT = Takes("a name", _is_text)
NAME_OR_EMPTY = Takes("a name", lambda value: value == "" or _is_text(value))
#: lm-eval makes a number of a hash that has digits only, and a text of it again.
REVISION = Takes("a branch, a tag or a commit", lambda value: _is_text(value) or is_whole(value, 0))
DEVICE_MAP = Takes(f"one of {', '.join(DEVICE_MAPS)}, a device, or a JSON object of them", _is_device_map, "auto")
MEMORY = Takes("a size in bytes or with its unit", _is_memory, "20GiB")
OBJECT = Takes("a JSON object, or an object from Python", _is_object)
DICT = Takes("a JSON object", lambda value: isinstance(value, dict))
TOKEN = Takes("a token, or True for the stored login", lambda value: isinstance(value, bool) or _is_text(value))
END = Takes(
    "a text or a token id",
    lambda value: _is_text(value) or is_whole(value, 0),
    "</think>",
)
PLAN = Takes("auto or a JSON object", lambda value: value == "auto" or isinstance(value, dict), "auto")
TOKENIZER = Takes(
    "the name or folder of a tokenizer, or a tokenizer object",
    lambda v: _is_text(v) or _is_object(v) and not isinstance(v, dict),
)


@dataclass(frozen=True)
class Argument:
    """A model argument.

    Attributes:
        takes: what a value has to be.
        none: whether None is one (which for most means that it was left out).
        needs: package without which a value that asks for something cannot work, and what to type for it.
    """

    takes: Takes
    none: bool = True
    needs: str = ""


_BITS = "bitsandbytes"

ARGUMENTS: dict[str, Argument] = {
    # of lm-eval's `hf`
    "backend": Argument(TEXT, none=False),
    "revision": Argument(REVISION),
    "subfolder": Argument(NAME_OR_EMPTY, none=False),
    "tokenizer": Argument(TOKENIZER),
    "truncation": Argument(FLAG),
    "logits_cache": Argument(FLAG),
    "max_length": Argument(LENGTH),
    "dtype": Argument(DTYPE_OR_AUTO),
    "softmax_dtype": Argument(DTYPE),
    "mixed_precision_dtype": Argument(MIXED),
    "trust_remote_code": Argument(FLAG),
    "use_fast_tokenizer": Argument(FLAG),
    "add_bos_token": Argument(FLAG),
    "prefix_token_id": Argument(MAYBE),
    "parallelize": Argument(FLAG),
    "max_memory_per_gpu": Argument(MEMORY),
    "max_cpu_memory": Argument(MEMORY),
    "offload_folder": Argument(TEXT),
    "tp_plan": Argument(PLAN),
    "autogptq": Argument(
        Takes("True, False or a path", lambda v: isinstance(v, bool) or _is_text(v), "True"), needs="auto_gptq"
    ),
    "gptqmodel": Argument(FLAG, needs="gptqmodel"),
    "gguf_file": Argument(TEXT),
    "think_end_token": Argument(END),
    "enable_thinking": Argument(FLAG),
    "chat_template_args": Argument(DICT),
    # of transformers' `from_pretrained`
    "cache_dir": Argument(TEXT),
    "device_map": Argument(DEVICE_MAP),
    "distributed_config": Argument(OBJECT),
    "force_download": Argument(FLAG),
    "ignore_mismatched_sizes": Argument(FLAG),
    "key_mapping": Argument(DICT),
    "load_in_4bit": Argument(FLAG, needs=_BITS),
    "load_in_8bit": Argument(FLAG, needs=_BITS),
    "local_files_only": Argument(FLAG),
    "low_cpu_mem_usage": Argument(FLAG),
    "max_memory": Argument(DICT),
    "offload_buffers": Argument(FLAG),
    "proxies": Argument(DICT),
    "quantization_config": Argument(OBJECT),
    "state_dict": Argument(OBJECT),
    "token": Argument(TOKEN),
    "torch_dtype": Argument(DTYPE_OR_AUTO),
    "use_safetensors": Argument(FLAG),
    "variant": Argument(TEXT),
    "weights_only": Argument(FLAG),
    "bnb_4bit_compute_dtype": Argument(DTYPE),
    "bnb_4bit_quant_type": Argument(Takes("fp4 or nf4", lambda value: value in ("fp4", "nf4"), "nf4")),
    "bnb_4bit_use_double_quant": Argument(FLAG),
    "llm_int8_threshold": Argument(NUMBER),
    "llm_int8_enable_fp32_cpu_offload": Argument(FLAG),
}

#: Checked with their own tables: devices, numbers of prompts and adapters have more to them than a type.
ELSEWHERE = ("device", "batch_size", "max_batch_size", "peft", "delta", "pretrained")

#: Arguments that are paths if they look like one, in which `~` is expanded.
PATHS = ("tokenizer", "cache_dir", "offload_folder", "gguf_file")


def check_all(model_args: dict[str, Any]) -> None:
    """Check the values of the arguments that the table knows; puts words for true and false right, and `~`, in place.

    Raises:
        UserError: a value that is none, a library that an argument needs and is missing, code that nobody trusted.
    """
    for name in model_args:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.]*", name):
            raise UserError(
                f"model argument {brief(shown(name, name))} is no name: give arguments as name=value, joined by commas "
                "without blanks"
            )
    for name, argument in ARGUMENTS.items():
        if name not in model_args:
            continue
        value = model_args[name]
        if value is None:
            if not argument.none:
                check("", name, value, argument.takes)
            continue
        if argument.takes is FLAG:
            value = model_args[name] = yes_or_no("", name, value)
        check("", name, value, argument.takes)
        if name in PATHS and isinstance(value, str) and (value.startswith("~") or len(value) > 255):
            model_args[name] = str(paths.expand(f"{name}={value}", value))
        if argument.needs and value and find_spec(argument.needs) is None:
            raise UserError(
                f"{name}={brief(value)} needs the package {argument.needs}, which is not installed here: type pip "
                f"install {argument.needs.replace('_', '-')}, or leave {name} out"
            )
    if model_args.get("quantization_config", 0) is None:
        del model_args["quantization_config"]  # lm-eval gives the model's own beside it
    name = model_args.get("tokenizer")
    local = isinstance(name, str) and paths.looks_local(name)
    if local and not paths.exists(paths.expand(f"tokenizer={name}", name)):
        raise UserError(f"tokenizer={brief(name)}: there is no such folder; give {TOKENIZER.words}")
    if (folder := model_args.get("cache_dir")) is not None:
        paths.look_up(f"cache_dir={brief(folder)}", paths.expand(f"cache_dir={folder}", folder))
    if model_args.get("enable_thinking") and model_args.get("think_end_token") is None:
        raise UserError(
            "enable_thinking=True needs think_end_token=, the text or token id that ends the thinking: type for "
            "example think_end_token=</think>, or leave enable_thinking out"
        )
    if model_args.get("ignore_mismatched_sizes"):
        raise UserError(
            "ignore_mismatched_sizes=True puts random numbers where the files have weights of another shape, so no "
            "score would mean anything: leave it out"
        )
    _check_places(model_args)
    if model_args.get("weights_only") is False and not model_args.get("trust_remote_code"):
        raise UserError(
            "weights_only=False lets a file of weights run code: leave it out, or add trust_remote_code=True if you "
            "trust whoever wrote it"
        )
    if (folder := model_args.get("offload_folder")) is not None and model_args.get("parallelize"):
        paths.check_writable(f"offload_folder={folder}", paths.expand(f"offload_folder={folder}", folder), ["x"])


def _check_places(model_args: dict[str, Any]) -> None:
    """Raise `UserError` when weights are to lie on devices that there are not."""
    gpus = torch.cuda.device_count()
    if model_args.get("parallelize") and not gpus:
        raise UserError("parallelize=True spreads the weights over GPUs, and torch sees none here: leave it out")
    given = model_args.get("device_map")
    for place in given.values() if isinstance(given, dict) else [given]:
        kind, _, number = str(place).partition(":")
        number = number or (str(place) if is_whole(place) else "0")
        if (kind == "cuda" or is_whole(place)) and int(number) >= gpus:
            raise UserError(
                f"device_map={brief(given)}: torch sees {gpus} CUDA devices here; give one of them, cpu, or leave "
                "device_map out"
            )


def unknown(name: str, value: Any, known: set[str], accepted: str) -> UserError:
    """What is said of an argument that nothing understands; never a secret that was typed under a wrong name."""
    return UserError(
        f"model argument {name}={shown(name, value)!r} is unknown{nearest(name, known)} (accepted: {accepted}, and the "
        "arguments of --model hf)"
    )
