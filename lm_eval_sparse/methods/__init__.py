"""The registry of methods: a new method is one file and one line here."""

from __future__ import annotations

import textwrap

from .base import (
    PROMISED_LENGTH,
    DecodeContext,
    DecodeMethod,
    EvictionMethod,
    EvictionSelection,
    Geometry,
    Method,
    PrefillMethod,
    Selection,
    check_page_size,
)
from .decode.quest import Quest
from .dense import Dense
from .eviction.ada_snapkv import AdaSnapKV
from .eviction.snapkv import SnapKV
from .prefill.block_sparse import BlockSparse
from .prefill.flexprefill import FlexPrefill
from .prefill.flexprefill_vs import FlexPrefillVS
from .prefill.vertical_slash import VerticalSlash

METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (Dense, VerticalSlash, FlexPrefill, FlexPrefillVS, BlockSparse, SnapKV, AdaSnapKV, Quest)
}

#: Phases in the order in which they come, and the model argument that asks for a sparsity in each.
PHASE_ARGUMENTS: dict[str, str] = {
    "prefill": "prefill_sparsity",
    "eviction": "kv_sparsity",
    "decode": "decode_sparsity",
}

__all__ = [
    "METHODS",
    "PHASE_ARGUMENTS",
    "PROMISED_LENGTH",
    "AdaSnapKV",
    "BlockSparse",
    "DecodeContext",
    "DecodeMethod",
    "Dense",
    "EvictionMethod",
    "EvictionSelection",
    "FlexPrefill",
    "FlexPrefillVS",
    "Geometry",
    "Method",
    "PrefillMethod",
    "Quest",
    "Selection",
    "SnapKV",
    "VerticalSlash",
    "check_page_size",
    "listing",
    "table",
]


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
            f"| {knobs} | {cls.paper} |"
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
            "paper": cls.paper,
        }
        title = f"{cls.name} ({'any phase' if cls.phase == 'any' else cls.phase})"
        paragraphs.append("\n".join([title, *(wrapped(value, name) for name, value in fields.items())]))
    return "\n\n".join(paragraphs)
