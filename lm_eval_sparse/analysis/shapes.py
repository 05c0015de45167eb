"""What costs follow from of a model: its sizes, those that were published of the paper's models, and those of a record.

Sizes are facts of configurations (`config.json` on the Hub). Knows no formula.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder whose layers are alike but for what their attention sees.

    Attributes:
        layers: all of them. attention_layers: those with full causal attention, where methods run.
        hidden: width of the residual stream (d).
        query_heads, kv_heads, head_dim: of a layer (h, n_kv, d_h); a value has as many dimensions as a key.
        mlp: width of the gated MLP that a token passes, on average over layers (m); of experts those that are active.
        vocab: rows of the output matrix (V).
        window: tokens that the other layers see; None where all layers have full attention.
        experts: whether tokens choose among experts, so that a batch reads more weights than a token passes.
    """

    layers: int
    attention_layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    window: int | None = None
    experts: bool = False

    @property
    def window_layers(self) -> int:
        return self.layers - self.attention_layers


def _full(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, mlp: int, vocab: int) -> Sizes:
    return Sizes(layers, layers, hidden, heads, kv_heads, head_dim, mlp, vocab)


#: What was published of the models of the paper (§2 of its grid), of their smaller kin, and of the embedded one.
PUBLISHED: dict[str, Sizes] = {
    "Qwen2.5-0.5B": _full(24, 896, 14, 2, 64, 4864, 151936),
    "Qwen2.5-1.5B": _full(28, 1536, 12, 2, 128, 8960, 151936),
    "Qwen2.5-3B": _full(36, 2048, 16, 2, 128, 11008, 151936),
    "Qwen2.5-7B": _full(28, 3584, 28, 4, 128, 18944, 152064),
    "Qwen2.5-14B": _full(48, 5120, 40, 8, 128, 13824, 152064),
    "Qwen2.5-32B": _full(64, 5120, 40, 8, 128, 27648, 152064),
    "Qwen2.5-72B": _full(80, 8192, 64, 8, 128, 29568, 152064),
    "Llama-3.1-8B": _full(32, 4096, 32, 8, 128, 14336, 128256),
    "Llama-3.1-70B": _full(80, 8192, 64, 8, 128, 28672, 128256),
    # Every sixth layer sees everything.
    "Gemma-3-4B": Sizes(34, 5, 2560, 8, 4, 256, 10240, 262208, window=1024),
    "Gemma-3-12B": Sizes(48, 8, 3840, 16, 8, 256, 15360, 262208, window=1024),
    "Gemma-3-27B": Sizes(62, 10, 5376, 32, 16, 128, 21504, 262208, window=1024),
    "SmolLM2-135M": _full(30, 576, 9, 3, 64, 1536, 49152),
}

#: What may stand behind a model's name without changing its sizes.
_TUNED = r"(-(instruct|it|pt|base|chat|hf|1m|bnb-4bit|gptq|awq|int4|int8|fp8))*"


def published(name: str) -> Sizes | None:
    """The published sizes of a model, by the last part of its name or path, such as `Qwen/Qwen2.5-7B-Instruct`.

    None for a model that is not in `PUBLISHED`. A name that only contains one of these (a distilled or a pruned model)
    is another model.
    """
    last = re.split(r"[/\\]", str(name).rstrip("/\\"))[-1].lower()
    last = last.removeprefix("meta-").replace("_", "-")
    for known, sizes in PUBLISHED.items():
        if re.fullmatch(re.escape(known.lower()) + _TUNED, last):
            return sizes
    return None


#: How a reason names what a configuration did not say.
_NEEDED = ("layers", "attention_layers", "hidden", "query_heads", "kv_heads", "head_dim", "value_dim", "mlp", "vocab")


def sizes_of(record: Any) -> tuple[Sizes | None, str]:
    """The sizes of a record's model, else why they are not known.

    Args:
        record: has `model` (a name) and `model_shape`, which may be None or lack sizes; what it says comes first.
    """
    shape, known = record.model_shape, published(record.model)
    if shape is None:
        if known is not None:
            return known, ""
        return None, f"the results of {record.model} do not hold the model's sizes, and no published ones are known"
    sizes, reason = _recorded(record.model, shape)
    # What was published of a model completes what the results say, where they do not contradict it.
    if sizes is None and known is not None and _agree(shape, known):
        return known, ""
    return sizes, reason


def _agree(shape: Any, known: Sizes) -> bool:
    values = {**asdict(known), "value_dim": known.head_dim}
    return all(getattr(shape, name, None) in (None, values[name]) for name in _NEEDED)


def _recorded(model: str, shape: Any) -> tuple[Sizes | None, str]:
    """The sizes as the results hold them, else what they lack."""
    lacking = [name for name in _NEEDED if getattr(shape, name, None) is None]
    if lacking:
        return None, f"the results of {model} do not say its {', '.join(lacking)}"
    if not 0 < shape.attention_layers <= shape.layers:
        return None, f"{model} is recorded with {shape.attention_layers} layers of full attention of {shape.layers}"
    if shape.value_dim != shape.head_dim:
        return None, (
            f"keys of {model} have {shape.head_dim} dimensions and values {shape.value_dim}: the ranks of latent "
            "attention, from which its projections follow, are not recorded"
        )
    others, window = shape.layers - shape.attention_layers, getattr(shape, "window", None)
    if others and not window:
        return None, f"what {others} of the {shape.layers} layers of {model} cost is not recorded"
    values = {name: getattr(shape, name) for name in _NEEDED if name != "value_dim"}
    return Sizes(**values, window=window if others else None, experts=bool(getattr(shape, "experts", None))), ""
