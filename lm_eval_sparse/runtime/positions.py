"""Positions whose meaning depends on how long a text is: rotary embeddings that stretch.

`longrope` ones change once, at the original length. What was cached before stays as it was: an answer scored with a
cache is then not the one scored without. `dynamic` ones are computed anew for every length beyond the original one, and
stay those of the longest text that ran: an answer then depends on what was asked before, and none is the right one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Stretch:
    """A rotary embedding that stretches.

    Attributes:
        module: it; kind: `dynamic` or `longrope`; prefix: before the names of its numbers, for one kind of layers.
        bound: tokens up to which it is what it was trained as.
    """

    module: nn.Module
    kind: str
    bound: int
    prefix: str = ""

    def within(self, prompt: int, total: int) -> bool:
        """Whether the tokens behind a prompt find the positions of the prompt changed."""
        return prompt <= self.bound < total

    def __str__(self) -> str:
        return f"positions of kind {self.kind!r}, which change beyond {self.bound} tokens"


def stretches(model: nn.Module) -> list[Stretch]:
    """The rotary embeddings of a model that stretch."""
    return [found for module in model.modules() for found in _of(module)]


def _of(module: nn.Module) -> Iterator[Stretch]:
    kinds: Any = getattr(module, "rope_type", None)
    for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
        prefix = "" if layer is None else f"{layer}_"
        if kind == "longrope":
            parameters = module.config.rope_parameters
            own = parameters if layer is None else parameters[layer]
            yield Stretch(module, kind, int(own["original_max_position_embeddings"]), prefix)
        elif isinstance(kind, str) and "dynamic" in kind:
            yield Stretch(module, "dynamic", int(module.original_max_seq_len), prefix)
