"""What a model shows of its attention layers beyond queries, keys and values: rotary embedding, output projection."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..methods.base import Layer
from .positions import stretches

#: What modelling code calls the projection behind attention.
OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
#: And what makes its cosines and sines.
ROTARY_NAMES = ("rotary_emb", "rotary_pos_emb")


class Layers:
    """The layers of one model, as methods may know them. Holds no module alive."""

    def __init__(self, model: nn.Module | None = None):
        self._found: dict[int, Layer] = {}
        self._rotary: Callable[[], nn.Module | None] = lambda: None
        self._kinds: list[str] = []
        self.count = 0
        #: Layers that may be sparse, and those of them with keys and values of their own; None while that is not known.
        self._among: tuple[int, ...] | None = None
        self._owners: tuple[int, ...] | None = None
        #: Layers whose keys were seen to be turned as the rotary embedding says; None while that is not known.
        self._turned: frozenset[int] | None = None
        if model is not None:
            indices = {m.layer_idx for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)}
            self.count = max(indices, default=-1) + 1
            config = getattr(model, "config", None)
            text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
            self._kinds = list(getattr(text, "layer_types", None) or [])
            own = [m for name, m in model.named_modules() if name.rpartition(".")[2] in ROTARY_NAMES]
            if len(own) == 1:  # several belong to layers of different kinds
                self._rotary = weakref.ref(own[0])

    def of(self, module: nn.Module, heads: int, kv_heads: int, dim: int, value_dim: int) -> Layer:
        """The layer of an attention module."""
        index = module.layer_idx
        found = self._found.get(index)
        if found is None or (found.heads, found.kv_heads, found.head_dim) != (heads, kv_heads, dim):
            found = self._found[index] = Layer(
                index,
                max(self.count, index + 1),
                heads,
                kv_heads,
                dim,
                rope=self._rope(index) if halves_turn(module) else None,
                weight=_weight(module, heads * value_dim),
                among=self._among if self._among is None or index in self._among else None,
            )
        return found

    def sparse(self, among: Iterable[int], lenders: Mapping[int, int]) -> None:
        """Note which layers may be sparse, and which of them borrow keys and values: nothing is evicted there."""
        self._among = tuple(sorted(among))
        self._owners = tuple(index for index in self._among if index not in lenders)
        self._found.clear()

    def turned(self, layers: Iterable[int]) -> None:
        """Note in which layers keys are turned by the rotary embedding: no other layer has one."""
        self._turned = frozenset(layers)
        self._found.clear()

    def with_rope(self) -> dict[int, Layer]:
        """The layers that have been asked for so far, and that have a rotary embedding."""
        return {index: layer for index, layer in self._found.items() if layer.rope is not None}

    def remember(self, other: Layers) -> None:
        """Take over what was noted of the same model."""
        self._among, self._owners, self._turned = other._among, other._owners, other._turned

    def evicted(self, layer: Layer) -> Layer:
        """The layer as an eviction method is told of it."""
        return layer if layer.among == self._owners else replace(layer, among=self._owners)

    def _rope(self, index: int) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        place, options = self._rotary, {}
        if place() is None or (self._turned is not None and index not in self._turned):
            return None
        if any(stretches(place())):  # angles follow how long a text is: a turn by so many tokens is not one turn
            return None
        if "layer_type" in inspect.signature(place().forward).parameters:  # Gemma 3 has an embedding for each kind
            if index >= len(self._kinds):
                return None
            options["layer_type"] = self._kinds[index]

        def rope(positions: Tensor) -> tuple[Tensor, Tensor]:
            like = torch.empty(1, 1, 1, dtype=torch.float32, device=positions.device)
            cosines, sines = place()(like, positions[None], **options)
            return cosines[0], sines[0]

        return rope


def follow(module: nn.Module) -> None:
    """Let `layer_idx` of a module that several layers share (Zamba) be that of the layer which runs.

    Such a module is told by an argument of its `forward`, and its own `layer_idx` is none.
    """
    index = module.layer_idx
    shared = not isinstance(index, int) or index < 0
    if shared and "layer_idx" in inspect.signature(module.forward).parameters:
        module.register_forward_pre_hook(_note_layer, with_kwargs=True)


def _note_layer(module: nn.Module, given: tuple, named: dict) -> None:
    told = inspect.signature(module.forward).bind_partial(*given, **named).arguments.get("layer_idx")
    if isinstance(told, int):
        module.layer_idx = told


def halves_turn(module: nn.Module) -> bool:
    """Whether the model turns the two halves of a key's dimensions against each other, as Llama does.

    Others turn neighbouring dimensions; what modelling code calls `rotate_half` tells. In latent attention only some of
    the dimensions are turned, and they are not the first ones.
    """
    if hasattr(module, "qk_rope_head_dim"):
        return False
    for kind in type(module).__mro__:
        rotate = getattr(sys.modules.get(kind.__module__), "rotate_half", None)
        if rotate is not None:
            given = torch.arange(4.0)
            return rotate(given).tolist() == [-2.0, -3.0, 0.0, 1.0]
    return False


def _weight(module: nn.Module, inputs: int) -> Callable[[], Tensor] | None:
    """What gives the output projection `(hidden, inputs)` of an attention module, or None where there is none."""
    names = [name for name in OUTPUT_NAMES if isinstance(getattr(module, name, None), nn.Linear | Conv1D)]
    if len(names) != 1:
        return None
    place = weakref.ref(getattr(module, names[0]))

    def weight() -> Tensor:
        projection = place()
        return projection.weight.T if isinstance(projection, Conv1D) else projection.weight

    found = weight()
    return weight if found.dim() == 2 and found.shape[1] == inputs and found.dtype.is_floating_point else None
