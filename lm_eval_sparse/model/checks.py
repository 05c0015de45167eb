"""Whether what was asked for can be had here: arguments that are known, a device, its kernels, a chat template.

`arguments` says what a value has to be by itself; here it is held against the machine, the model's configuration and
its tokenizer, before a model is loaded.
"""

from __future__ import annotations

import atexit
import inspect
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from ..errors import UserError, nearest
from ..kernels.backends import triton_unavailable
from ..methods import METHODS
from ..methods.grammar import example, knob_names
from ..methods.plan import OWN_ARGS, argument_names
from ..results.files import why
from . import arguments

logger = logging.getLogger(__name__)


def refuse_attention_choice(model_args: dict[str, Any]) -> None:
    """Raise when the user names an attention implementation: that is what sparse-hf replaces."""
    if "attn_implementation" in model_args:
        raise UserError(
            f"attn_implementation={model_args['attn_implementation']} is not accepted: sparse-hf brings its own "
            "attention; leave it out (choose a kernel with backend=), or use --model hf"
        )


def check_known(model_args: dict[str, Any], source: tuple[str, dict[str, Any]] | None) -> dict[str, Any]:
    """Raise on a model argument that nothing would understand; returns those that are fields of the configuration.

    Fields of the model's own configuration (such as `rope_parameters`) are accepted; the configuration is only
    loaded when an argument is not known otherwise.
    """
    known = {name for name in inspect.signature(HFLM.__init__).parameters if name not in ("self", "kwargs")}
    known |= {*arguments.ARGUMENTS}
    fields = unknown = [name for name in model_args if name not in known]
    if unknown and source is not None:
        pretrained, args = source
        options = {
            name: args[name] for name in ("revision", "trust_remote_code", "gguf_file", "subfolder") if name in args
        }
        try:
            config = transformers.AutoConfig.from_pretrained(pretrained, **options)
        except Exception:  # a damaged configuration: what is wrong with it is said when the model is loaded
            config = None
        if config is not None:
            theirs = {*config.to_dict(), *config.get_text_config(decoder=True).to_dict()}
            unknown = [name for name in unknown if name not in theirs]
    if unknown:
        name = unknown[0]
        if name in METHODS:
            raise UserError(
                f"{name} stands alone among the model arguments: type method={example(name)}, and join methods of "
                "several phases by a plus sign, as in method=flexprefill+snapkv+quest"
            )
        everything, own = {*known, *argument_names()}, ", ".join((*OWN_ARGS, *knob_names()))
        raise arguments.unknown(name, model_args[name], everything, own)
    return {name: model_args[name] for name in fields}


def check_device(model_args: dict[str, Any]) -> None:
    """Raise `UserError` for a device that there is not. `cuda:0`, lm-eval's default, then means the CPU, as for `hf`.

    lm-eval takes any name that it does not know for the CPU.
    """
    device = str(model_args["device"])
    kind, _, number = device.partition(":")
    there = {"cpu": True, "cuda": True, "mps": torch.backends.mps.is_available(), "xpu": torch.xpu.is_available()}
    if not arguments.is_device(device) or not there.get(kind, False):
        raise UserError(f"device={device} is not accepted: give cpu, cuda or cuda:N, such as --device cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        if device != "cuda:0":
            raise UserError(f"device={device}: torch sees no CUDA device here; leave it out, or type --device cpu")
        model_args["device"] = "cpu"
    elif kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise UserError(
            f"device={device}: torch sees {torch.cuda.device_count()} CUDA devices here, from cuda:0 on; give one of "
            "them, or type --device cpu"
        )


def check_backend(backend: str, device: str) -> None:
    """Raise `UserError` before a model is loaded for kernels that cannot run on its device."""
    kinds = {
        "triton": "a CUDA device",
        "hopper": "a CUDA device of the Hopper generation (H100, H200)",
        "fa4": "a CUDA device of the Hopper or Blackwell generation (H100, H200, B200)",
    }
    kind = device.split(":")[0]
    interpreted = backend != "fa4" and triton_unavailable(kind) is None  # Triton's kernels run in its interpreter
    if backend in kinds and not (kind == "cuda" and triton_unavailable(kind) is None) and not interpreted:
        raise UserError(
            f"backend={backend} needs {kinds[backend]}, and this run is on {device}: leave it out, or type "
            "backend=gather"
        )


def check_kernel_folder(device: str) -> None:
    """Make sure that Triton has a folder for what it compiles, in which the next run finds it.

    Where its own cannot be written (a home that is missing, full or read-only), this process gets one of its own, which
    goes when it ends; nobody else can have put anything there.

    Raises:
        UserError: there is none to be had either.
    """
    if not device.startswith("cuda"):
        return
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~/")
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = why(error)
        try:
            own = tempfile.mkdtemp(prefix="lm_eval_sparse_kernels_")
        except OSError:
            raise UserError(
                f"compiled kernels can be kept neither in {folder} ({reason}) nor in a temporary folder: set "
                "TRITON_CACHE_DIR to a folder that can be written"
            ) from error
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        logger.warning(
            "compiled kernels cannot be kept in %s (%s), so this run compiles all of them: set TRITON_CACHE_DIR to a "
            "folder that can be written", folder, reason,
        )  # fmt: skip
        folder = Path(own)
    os.environ["TRITON_CACHE_DIR"] = str(folder)


def check_batch_size(model_args: dict[str, Any]) -> None:
    """Raise `UserError` for numbers of prompts that are none; a batch_size of None is left out."""
    if model_args.get("batch_size", 1) is None:
        del model_args["batch_size"]
    for name in ("batch_size", "max_batch_size"):
        given = model_args.get(name)
        if given is None:
            continue
        kind, _, times = str(given).partition(":")
        if name == "batch_size" and kind == "auto":  # lm-eval's auto:N measures again N times, we measure each batch
            good = given == "auto" or (times.isdecimal() and int(times) > 0)
        else:
            good = isinstance(given, int | str) and str(given).isdecimal() and int(given) > 0
        if not good:
            accepted = f"{'auto or ' if name == 'batch_size' else ''}a whole number of at least 1"
            raise UserError(f"{name}={given} is not accepted: give {accepted}, such as --{name} 8")


def check_template(tokenizer: Any, asked: bool | str) -> None:
    """Raise `UserError` when the tokenizer has no chat template, or none of the name that was asked for."""
    there = getattr(tokenizer, "chat_template", None)
    if not there and getattr(tokenizer, "default_chat_template", None) is None:
        raise UserError(
            "--apply_chat_template: the model's tokenizer has no chat template; leave the option out, or give another "
            "tokenizer="
        )
    if isinstance(asked, str) and not isinstance(there, dict):
        raise UserError(
            f"--apply_chat_template {asked}: the model's tokenizer has one chat template, which has no name; type "
            "--apply_chat_template alone"
        )
    if isinstance(there, dict):
        names = ", ".join(there)
        if isinstance(asked, str) and asked not in there:
            raise UserError(
                f"--apply_chat_template {asked}: there is no such template{nearest(asked, there)}; there are {names}"
            )
        if not isinstance(asked, str) and "default" not in there:
            raise UserError(f"--apply_chat_template: the tokenizer has several chat templates; name one of {names}")


__all__ = [
    "check_backend",
    "check_batch_size",
    "check_device",
    "check_known",
    "check_template",
    "refuse_attention_choice",
]
