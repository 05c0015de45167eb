"""The sizes of a loaded model that its costs follow from, for the results.

Attention is described as it ran; the rest is read from modules whose names say what they are. What is not understood is
None: a cost that follows from a guess looks like any other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from torch import nn

from ..runtime.session import Runtime

#: Projections of a gated MLP as modelling code names them; the last one is down, whose inputs are the width.
_GATED = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("w1", "w3", "w2"))
#: What configurations call the number of experts that a token chooses.
_CHOSEN = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_EXPERT = re.compile(r"\bexperts\.\d+$")


#: What is said of a model, each as `sizes_of` describes it.
_NAMES = (
    "layers", "attention_layers", "hidden", "query_heads", "kv_heads", "head_dim", "value_dim", "mlp", "vocab",
    "window", "experts",
)  # fmt: skip


def sizes_of(model: nn.Module, runtime: Runtime) -> dict[str, int | None]:
    """Sizes of a model that `runtime` has run at least once; None for what is not known.

    `attention_layers` are those where methods run, and heads and dimensions are theirs. `window` is what the other
    layers see where all of them have a window of one size and the same heads. `mlp` is the width of the gated MLP that
    a token passes, averaged over layers and rounded; of experts those that it chooses and shared ones. `experts` is how
    many it chooses from, 0 where there are none.
    """
    try:
        return _sizes(model, runtime)
    except Exception:  # modelling code of any kind: what a cost would follow from is no reason to end a run
        return dict.fromkeys(_NAMES)


def _sizes(model: nn.Module, runtime: Runtime) -> dict[str, int | None]:
    text = model.config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", None)
    layers = layers if isinstance(layers, int) else None
    attention = sorted(index for index, reason in runtime.layers.items() if reason is None)
    shapes = {runtime.shapes.get(index) for index in attention}
    heads = shapes.pop() if len(shapes) == 1 else None
    query_heads, kv_heads, head_dim, value_dim = heads or (None,) * 4
    others = [index for index in range(layers or 0) if index not in attention]
    sights = {(runtime.sights.get(index), runtime.shapes.get(index) == heads) for index in others}
    sight, alike = sights.pop() if len(sights) == 1 else (None, False)
    hidden, head = getattr(text, "hidden_size", None), model.get_output_embeddings()
    mlp, experts = _mlp(model, text, layers, hidden) if layers and isinstance(hidden, int) else (None, None)
    window = sight.size if sight is not None and sight.kind == "window" and alike else None
    # A layer that borrows keys and values of another one holds none.
    kv_heads = None if runtime.lenders else kv_heads
    hidden = hidden if isinstance(hidden, int) else None
    vocab = getattr(head, "out_features", None)
    found = (
        layers, len(attention), hidden, query_heads, kv_heads, head_dim, value_dim, mlp, vocab, window, experts,
    )  # fmt: skip
    return dict(zip(_NAMES, found, strict=True))


def _mlp(model: nn.Module, text: Any, layers: int, hidden: int) -> tuple[int | None, int | None]:
    """Mean width of what a token passes in a layer, and the experts there are; None where a layer has nothing known."""
    chosen = next((value for name in _CHOSEN if isinstance(value := getattr(text, name, None), int)), None)
    widths: dict[int, float] = defaultdict(float)
    routed: dict[tuple[int, str], list[int]] = defaultdict(list)
    for name, module in _decoder(model).named_modules():
        layer, width = _LAYER.search(f"{name}."), _width(module, hidden)
        if layer is None or width is None:
            continue
        index, (experts, each) = int(layer[1]), width
        if experts or _EXPERT.search(name):
            # All experts in one module, or one of those that have a module each.
            routed[index, name.rpartition(".")[0]] += [each] * (experts or 1)
        else:
            widths[index] += each
    if routed and chosen is None:
        return None, None
    for (index, _), each in routed.items():
        widths[index] += chosen * sum(each) / len(each)
    if set(widths) != set(range(layers)):
        return None, None
    return round(sum(widths.values()) / layers), max(map(len, routed.values()), default=0)


def _width(module: nn.Module, hidden: int) -> tuple[int, int] | None:
    """(experts, width of one) of a gated MLP, 0 experts for an MLP alone; None for any other module."""
    for names in _GATED:
        parts = [getattr(module, name, None) for name in names]
        widths = [getattr(part, "in_features", None) for part in parts]
        if all(isinstance(width, int) for width in widths):
            return 0, widths[-1]
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    stacked = all(isinstance(part, nn.Parameter) and part.dim() == 3 for part in (up, down))
    # (experts, width, hidden), or the last two the other way round; up has twice the width.
    if stacked and up.numel() == 2 * down.numel() and hidden in down.shape[1:]:
        return len(down), down[0].numel() // hidden
    return None


def _decoder(model: nn.Module) -> nn.Module:
    """What answers of a model that sees pictures, too."""
    for part in (model, getattr(model, "model", None)):
        if isinstance(found := getattr(part, "language_model", None), nn.Module):
            return found
    return model


__all__ = ["sizes_of"]
