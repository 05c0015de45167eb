"""The registry of methods: a new method is one file and one line here. Methods are imported when they are asked for."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Iterator, Mapping

from .base import Method

#: Name -> module and class.
BUILT_IN = {
    "dense": "dense:Dense",
    "vertical_slash": "prefill.vertical_slash:VerticalSlash",
    "flexprefill": "prefill.flexprefill:FlexPrefill",
    "flexprefill_vs": "prefill.flexprefill_vs:FlexPrefillVS",
    "block_sparse": "prefill.block_sparse:BlockSparse",
    "snapkv": "eviction.snapkv:SnapKV",
    "ada_snapkv": "eviction.ada_snapkv:AdaSnapKV",
    "quest": "decode.quest:Quest",
}

#: Phases in the order in which they come, and the model argument that asks for a sparsity in each.
PHASE_ARGUMENTS: dict[str, str] = {
    "prefill": "prefill_sparsity",
    "eviction": "kv_sparsity",
    "decode": "decode_sparsity",
}


class Registry(Mapping[str, "type[Method]"]):
    """Methods by name."""

    def __init__(self, places: dict[str, str]):
        self._places = dict(places)
        self._found: dict[str, type[Method]] = {}

    def __getitem__(self, name: str) -> type[Method]:
        if name not in self._found:
            module, _, attribute = self._places[name].partition(":")
            self._found[name] = getattr(importlib.import_module(f"{__package__}.{module}"), attribute)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._places, **self._found})

    def __len__(self) -> int:
        return len({**self._places, **self._found})

    def add(self, method: type[Method]) -> None:
        """Take in a method under its name, in this process."""
        self._found[method.name] = method

    def discard(self, name: str) -> None:
        """Forget a method that was added."""
        if name not in self._places:
            self._found.pop(name, None)


METHODS = Registry(BUILT_IN)


def table() -> str:
    """A markdown table of all methods: phase, place in the taxonomy, knobs with defaults, paper."""
    lines = [
        "| method | phase | unit | importance | budget | KV cache | knobs (default) | paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cls in METHODS.values():
        knobs = ", ".join(f"`{name}` ({default})" for name, default in cls.knobs().items()) or "-"
        lines.append(
            f"| `{cls.name}` | {cls.phase} | {cls.unit} | {cls.importance} | {cls.allocation} | {cls.kv} "
            f"| {knobs} | {cls.reference} |"
        )
    return "\n".join(lines)


def listing(width: int) -> str:
    """The same as text of at most `width` columns: a paragraph per method, knobs as they are typed."""

    def wrapped(text: str, name: str | None = None) -> str:
        first, later = ("", "") if name is None else (f"  {name:<9}", " " * 11)
        return textwrap.fill(text, width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)

    head = "Sparse-attention methods by phase. Knobs are model arguments, here with their defaults."
    paragraphs = [wrapped(head)]
    for cls in METHODS.values():
        allocation = "" if cls.allocation == "-" else f"{cls.allocation}; "
        fields = {
            "selects": "all keys" if cls.unit == "-" else f"{cls.unit}, by {cls.importance}",
            "budget": f"{allocation}KV: {cls.kv}",
            "knobs": "  ".join(f"{name}={default}" for name, default in cls.knobs().items()) or "none",
            "paper": cls.reference,
        }
        title = f"{cls.name} ({'any phase' if cls.phase == 'any' else cls.phase})"
        paragraphs.append("\n".join([title, *(wrapped(value, name) for name, value in fields.items())]))
    return "\n\n".join(paragraphs)
