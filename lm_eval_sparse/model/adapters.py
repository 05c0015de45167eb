"""`peft=` and `delta=`: one line for what cannot work, found before the model is loaded where it can be known.

lm-eval loads both behind the model itself, so that what goes wrong there looks like the model's fault. It adds whatever
weights find a place by name and leaves the rest out without a word; here an adapter fits whole or is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn

from .. import paths
from ..errors import UserError
from .load import first_line

#: What each argument takes, as messages say it.
ACCEPTED = {
    "peft": "the folder that `save_pretrained` of a peft model wrote (with adapter_config.json) or the name of such a "
    "Hub repository (org/name)",
    "delta": "a folder with the weights to add (a transformers model of the same classes and shapes as pretrained=) or "
    "the name of such a Hub repository (org/name)",
}


def check_given(model_args: dict[str, Any], *, in_memory: bool) -> None:
    """Check `peft` and `delta` among the arguments of the model; expands `~` in place. Loads nothing.

    Args:
        in_memory: the model itself was given as an object, to which lm-eval would add nothing.

    Raises:
        UserError: both are given, one is empty, or names a file or a folder that is not what it must be.
    """
    given = {name: model_args[name] for name in ACCEPTED if model_args.get(name) is not None}
    if len(given) > 1:
        raise UserError(
            f"peft={given['peft']} and delta={given['delta']} are both given: a model takes one of them; leave one out"
        )
    for name, value in given.items():
        if in_memory:
            raise UserError(
                f"{name}={value} is given with a model in memory, to which nothing would be added: add it to that "
                f"model yourself and leave {name} out, or give pretrained= as a folder or a name"
            )
        model_args[name] = _path(name, value)


def _path(name: str, value: Any) -> str:
    """`value` with `~` expanded, if it may be what `name` takes."""
    text = str(value)
    if not isinstance(value, str) or not text.strip():
        what = "is empty" if isinstance(value, str) else "is no path"
        raise UserError(f"{name}={text} {what}: give {ACCEPTED[name]}, or leave {name} out")
    path = paths.expand(f"{name}={text!r}", text)
    needed = {"peft": "adapter_config.json", "delta": "config.json"}[name]
    if paths.is_dir(path):
        if not (path / needed).is_file():
            raise UserError(f"{name}={text!r} is a folder without {needed}: give {ACCEPTED[name]}")
    elif paths.exists(path):
        raise UserError(f"{name}={text!r} is a file: give {ACCEPTED[name]}")
    elif paths.looks_local(text):
        raise UserError(f"{name}={text!r}: there is no such folder; give {ACCEPTED[name]}, or leave {name} out")
    return str(path) if paths.exists(path) else text


@contextmanager
def loading(lm: Any, model_args: Mapping[str, Any]) -> Iterator[None]:
    """Around lm-eval's loading of the model: what it adds to the model must fit, and a complaint names the argument.

    An adapter's layers then stay in the model, without peft's wrapper around it, which hides what arguments the model
    takes.

    Raises:
        UserError: the adapter or the delta cannot be read, or was made for another model.
    """
    name = next((name for name in ACCEPTED if model_args.get(name)), None)
    if name is None:
        yield
        return
    source = model_args[name]
    if name == "peft":
        made_for = _check_adapter(source, model_args)
    else:
        made_for = _check_delta(source, model_args, lm.config)
    lm._model = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if lm._model is None:  # the model itself did not load
                raise
            raise _misfit(name, source, made_for, first_line(error)) from error
    missing = None
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            missing = str(warning.message)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if name != "peft":
        return
    if missing is not None:
        keys = re.findall(r"'([^']+)'", missing)
        raise _misfit(name, source, made_for, f"{len(keys)} of its weights are missing, such as {keys[0]}")
    _check_whole(lm._model, source, made_for, model_args)
    lm._model = lm._model.get_base_model()


def _check_adapter(source: str, model_args: Mapping[str, Any]) -> str:
    """Read an adapter's configuration; returns the model it says it was made for."""
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise UserError(f"peft={source!r} needs the package peft ({error}): type pip install peft") from None
    try:
        config = PeftConfig.from_pretrained(source, revision=model_args.get("revision"))
    except Exception as error:  # a broken file or an unknown kind of adapter: exceptions of any class
        reason = first_line(error)
        raise UserError(f"peft={source!r} could not be loaded ({reason}); give {ACCEPTED['peft']}") from error
    if config.is_prompt_learning:
        raise UserError(
            f"peft={source!r} is of kind {config.peft_type.value}, which puts tokens of its own before every prompt: "
            "sparse-hf takes adapters that change weights, such as LoRA; use --model hf for this one"
        )
    return str(config.base_model_name_or_path or "")


def _check_delta(source: str, model_args: Mapping[str, Any], base: Any) -> str:
    """Compare the weights that the two configurations ask for, without loading any; returns the delta's class."""
    options = {name: model_args.get(name) for name in ("revision", "trust_remote_code") if model_args.get(name)}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        theirs = _shapes(config, options)
    except Exception as error:  # modelling code of any age
        reason = first_line(error)
        raise UserError(f"delta={source!r} could not be loaded ({reason}); give {ACCEPTED['delta']}") from error
    ours, kind = _shapes(base, options), str(config.model_type)
    for there, here, words in ((theirs, ours, "has {}, which the model lacks"), (ours, theirs, "lacks {}")):
        if extra := [key for key in there if key not in here]:
            raise _misfit("delta", source, kind, words.format(extra[0]))
    for key, shape in ours.items():
        if theirs[key] != shape:
            raise _misfit("delta", source, kind, f"{key} is {list(theirs[key])}, the model's is {list(shape)}")
    return kind


def _shapes(config: Any, options: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Name and shape of every weight of a model of this configuration."""
    trusted = {name: value for name, value in options.items() if name == "trust_remote_code"}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, **trusted)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _check_whole(model: Any, source: str, made_for: str, model_args: Mapping[str, Any]) -> None:
    """Raise when the file holds weights for which the model has no place, such as those of further layers."""
    from peft import get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    there = load_peft_weights(source, device="cpu", revision=model_args.get("revision"))
    here = get_peft_model_state_dict(model, save_embedding_layers=False)
    if not here.keys() <= there.keys():  # peft has read them under other names, and found all that it needs
        return
    base: nn.Module = model.get_base_model()
    own = {f"base_model.model.{key}" for key in base.state_dict()}  # embeddings may be saved along
    extra = [key for key in there if key not in here and key not in own]
    if extra:
        reason = f"{len(extra)} of its weights have no place in the model, such as {extra[0]}"
        raise _misfit("peft", source, made_for, reason)


def _misfit(name: str, source: str, made_for: str, reason: str) -> UserError:
    about = f", made for {made_for!r}," if name == "peft" and made_for else f" ({made_for})" if made_for else ""
    return UserError(
        f"{name}={source!r}{about} does not fit the model that pretrained= names ({reason}); give {ACCEPTED[name]}, "
        "made for this model"
    )
