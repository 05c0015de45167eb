"""Loading a model with our attention: one line for whatever is wrong with its files, and no made-up weights.

Files of models are foreign: torn, of another model, with a configuration that fits nothing. transformers says so in
exceptions of every class, or fills what is missing with random numbers and a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from .. import paths
from ..errors import UserError
from ..results.files import brief, read_json
from ..runtime import probe
from ..runtime.interface import IMPLEMENTATION
from ..runtime.memory import out_of_memory
from . import gguf_check

if TYPE_CHECKING:
    from .lm import SparseHFLM

#: Names of modules that hold one row per position of a text.
_POSITIONS = re.compile(r"(wpe|position_embeddings?|embed_positions|pos_embed\w*|position_embedding)$")

#: Model types that transformers can load with a causal head although their attention looks both ways.
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "camembert", "megatron-bert", "roformer", "data2vec-text")


def check_pretrained(pretrained: Any) -> None:
    """Raise `UserError` when what is given as the model is neither a name nor a model nor nothing."""
    if pretrained is not None and not isinstance(pretrained, str | nn.Module):
        raise UserError(
            f"pretrained={pretrained!r} is not accepted: give a folder, the name of a Hub repository (org/name) or a "
            "model of transformers, or leave pretrained out for the embedded model"
        )


def check_path(pretrained: str, gguf_file: str | None, subfolder: str | None = None) -> str:
    """Return `pretrained` with `~` expanded; raise for a local path that does not exist, or whose files are broken."""
    if not pretrained.strip():
        raise UserError(
            "pretrained= is empty: give a folder or a Hub name, or leave pretrained out for the embedded model"
        )
    path = paths.expand(f"pretrained={pretrained!r}", pretrained)
    if paths.looks_local(pretrained) and not paths.exists(path):
        raise UserError(
            f"pretrained={pretrained!r}: there is no such folder; give the path of a folder with a transformers "
            "model, the name of a Hub repository (org/name), or leave pretrained out for the embedded model"
        )
    if paths.exists(path) and not path.is_dir():
        raise UserError(
            f"pretrained={pretrained!r} is a file; give its folder"
            + (f": pretrained={path.parent},gguf_file={path.name}" if path.suffix == ".gguf" else "")
        )
    if paths.is_dir(path):
        _check_folder(path, gguf_file, subfolder)
    return str(path) if paths.exists(path) else pretrained


def _check_folder(path: Path, gguf_file: str | None, subfolder: str | None) -> None:
    if gguf_file is not None:
        try:
            gguf_check.check(path / gguf_file)
        except UserError as error:
            raise UserError(f"gguf_file={brief(gguf_file)}: {error}") from None
    if subfolder:
        if not paths.is_dir(path / subfolder):
            raise UserError(
                f"subfolder={brief(subfolder)}: {path} has no such folder; leave subfolder out, or give another"
            )
        path = path / subfolder
    if paths.exists(generation := path / "generation_config.json"):
        read_json(generation)  # transformers would go on with its defaults, and say nothing
    for index in path.glob("*.index.json"):
        files = read_json(index).get("weight_map")
        for name in files.values() if isinstance(files, dict) else ():
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(
                    f"{index} names the file {brief(name)}, which is not in that folder; give another model"
                )


@contextmanager
def explained(what: str, typed: dict[str, Any] | None = None) -> Iterator[None]:
    """Turn what goes wrong while files are looked for and read into one line.

    Args:
        what: the argument and its value that named the files.
        typed: fields of the model's configuration that were typed, and may be at fault.

    Raises:
        UserError: in place of any exception but those that say that memory has run out.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # configurations and weights of any kind meet code that expects its own
        if out_of_memory(error):
            raise
        reason = first_line(error)
        if not isinstance(error, OSError | ValueError):  # whose words are made to be read
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(
            f"{what} could not be loaded ({reason}); {changed(typed)}give a folder with a transformers model or the "
            f"name of a Hub repository, or leave {what.partition('=')[0]} out"
        ) from error


def changed(typed: dict[str, Any] | None) -> str:
    """What to say of fields of the configuration that were typed, where a model does not load."""
    fields = ", ".join(f"{name}={brief(value)}" for name, value in (typed or {}).items())
    return f"{fields} changes the model's configuration: leave that out, or " if fields else ""


class Whole:
    """An automatic class of transformers, whose `from_pretrained` refuses files that lack some of the model's weights.

    transformers fills them with random numbers: a file of a split model, fewer layers than the configuration says.
    """

    def __init__(self, automatic: Any, typed: dict[str, Any] | None = None):
        """`typed` are fields of the model's configuration that were typed, and may be at fault."""
        self.automatic, self.typed = automatic, typed

    def from_pretrained(self, pretrained: str, **options: Any) -> Any:
        """As transformers'. Raises `UserError` where a weight is missing or has another shape."""
        options |= {"ignore_mismatched_sizes": False, "output_loading_info": True}
        try:
            found = self.automatic.from_pretrained(pretrained, **options)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise self._misfit(pretrained, options) from error
        if not isinstance(found, tuple):  # a class of the model's own that gives no report
            return found
        model, report = found
        missing = set(report["missing_keys"]) - set(getattr(model, "all_tied_weights_keys", None) or ())
        if missing:
            raise UserError(
                f"{pretrained}: its files lack {len(missing)} weights that its configuration asks for, such as "
                f"{min(missing)}, and random numbers would stand in for them; {changed(self.typed)}give the whole model"
            )
        return model

    def _misfit(self, pretrained: str, options: dict[str, Any]) -> UserError:
        """What to say of weights of another shape, which transformers' own complaint does not name."""
        named = "some of its weights have another shape in its files than by its configuration"
        try:
            _, report = self.automatic.from_pretrained(pretrained, **{**options, "ignore_mismatched_sizes": True})
            name, there, here = min(report["mismatched_keys"])
            named = f"{name} is {list(there)} in its files, and {list(here)} by its configuration"
        except (RuntimeError, MemoryError, ValueError):  # such as no memory for shapes that no model has
            pass
        return UserError(f"{pretrained}: {named}; {changed(self.typed)}give files that belong together")

    def from_config(self, *args: Any, **options: Any) -> Any:
        """As transformers'."""
        return self.automatic.from_config(*args, **options)


def check_loaded(model: nn.Module, max_length: int, prefix_token_id: int | None) -> None:
    """Raise `UserError` for lengths and tokens that this model has no row for."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    rows = getattr(embedding, "num_embeddings", None)
    if prefix_token_id is not None and isinstance(rows, int) and prefix_token_id >= rows:
        raise UserError(f"prefix_token_id={prefix_token_id} is not accepted: the model has tokens 0 to {rows - 1}")
    towers = tuple(_towers(model))
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or _POSITIONS.search(name) is None or name.startswith(towers):
            continue
        positions = module.num_embeddings - int(getattr(module, "offset", 0) or 0)
        if positions < max_length:
            raise UserError(
                f"max_length={max_length} is not accepted: the model has a table of {positions} positions ({name}); "
                f"type max_length={positions} or less, or leave max_length out"
            )


def _towers(model: nn.Module) -> Iterator[str]:
    """Prefixes of the names of modules in image and audio towers: models in the model, of another configuration."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name, part in model.named_modules():
        if (
            name
            and isinstance(part, transformers.PreTrainedModel)
            and not isinstance(part.config, (type(config), type(text)))
        ):
            yield f"{name}."


def check_causal(config: Any, label: str | None, backend: str, trust_remote_code: bool | None) -> None:
    """Raise `UserError` for a model that is no decoder-only causal one; `backend` is what lm-eval takes it for."""
    if backend != "causal":
        raise UserError(
            f"pretrained={label!r} is an encoder-decoder model ({config.model_type}): sparse-hf "
            "evaluates decoder-only causal models; use --model hf for this one"
        )
    name = getattr(config, "model_type", None)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    encoder = getattr(config, "is_decoder", None) is False and not getattr(config, "is_causal", True)
    architectures = getattr(config, "architectures", None) or []
    if encoder or (name in ENCODERS and not getattr(config, "is_decoder", False)):
        raise UserError(
            f"pretrained={label!r} ({name}) has no causal attention: sparse-hf evaluates decoder-only causal models"
        )
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not trust_remote_code:
        raise UserError(
            f"pretrained={label!r} ({name or architectures}) is not a causal language model that "
            "transformers knows: sparse-hf evaluates decoder-only causal models"
        )


def our_attention(config: Any) -> str | dict[str, str]:
    """What to ask transformers for, so that text attends by our function; image towers and the like keep their own."""
    parts = getattr(config, "sub_configs", None) or {}
    if "text_config" in parts:
        return {name: IMPLEMENTATION if name == "text_config" else "sdpa" for name in parts}
    return IMPLEMENTATION


@contextmanager
def interface_known(kind: str) -> Iterator[None]:
    """Say so where a model, named `kind`, takes no registered attention function."""
    try:
        yield
    except (ValueError, KeyError) as error:
        # Models older than the interface look the name up in a table of their own.
        refused = isinstance(error, KeyError) and error.args == (IMPLEMENTATION,)
        if isinstance(error, UserError) or not (refused or "attention" in str(error).lower()):
            raise
        raise UserError(
            f"{kind} does not support registered attention functions in transformers "
            f"{transformers.__version__}: use --model hf for this model"
        ) from error


@torch.no_grad()
def check_attention(lm: SparseHFLM) -> Tensor:
    """Find out what each layer is, and whether it comes out of our runtime as it is, before any prompt.

    Returns:
        `(1, L)` the tokens that were tried.

    Raises:
        UserError: the model cannot be evaluated, or not with the phases that were asked for.
    """
    text = lm.config.get_text_config(decoder=True)
    lm.runtime.longest = max(getattr(text, "max_position_embeddings", None) or 0, lm.max_length)
    steps = 1 if lm.is_recurrent else probe.STEPS
    try:
        return probe.check(lm.model, lm.forward, lm.runtime, steps)
    except probe.CheckError as error:
        raise UserError(f"{lm.kind} cannot be evaluated as asked: {error}; {error.instead}") from error
    except UserError as error:  # which says what to type
        raise UserError(f"{lm.kind} cannot be evaluated: {error}") from error
    except Exception as error:  # modelling code of any age, with requirements of any kind
        if out_of_memory(error):
            raise
        raise UserError(
            f"{lm.kind} does not run here ({type(error).__name__}: {first_line(error)}); sparse-hf evaluates "
            "decoder-only causal models that use transformers' attention interface: use --model hf for this one"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something; torch's says only that something does not fit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if len(text) <= 300 else f"{text[:300]}…"


__all__ = [
    "Whole",
    "check_attention",
    "check_causal",
    "check_loaded",
    "check_path",
    "check_pretrained",
    "explained",
    "first_line",
    "interface_known",
    "our_attention",
]
