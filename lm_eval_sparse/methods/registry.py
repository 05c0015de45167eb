"""The registry of methods: a new method is one file and one line here. Methods are imported when they are asked for."""

from __future__ import annotations

import importlib
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from .base import Mass, Method

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
    "oracle_blocks": "prefill.oracle_blocks:OracleBlocks",
    "oracle_topk": "decode.oracle:OracleTopK",
    "oracle_topp": "decode.oracle:OracleTopP",
    "xattention": "prefill.xattention:XAttention",
    "a_shape": "streaming:AShape",
    "streaming_llm": "streaming:StreamingLLM",
    "knorm": "eviction.knorm:KNorm",
    "tova": "eviction.tova:TOVA",
    "h2o": "eviction.h2o:H2O",
    "pyramidkv": "eviction.pyramidkv:PyramidKV",
    "twilight": "wrappers.twilight:Twilight",
    "magicpig": "decode.magicpig:MagicPIG",
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
        """Take in a method under its name, in this process.

        Raises:
            ValueError: what is no whole method, or has the name of another one.
        """
        check_class(method)
        if method.name in self._places:
            raise ValueError(
                f"{method.__name__}: {method.name!r} is the name of a built-in method; give it another one"
            )
        self._found[method.name] = method

    def discard(self, name: str) -> None:
        """Forget a method that was added."""
        if name not in self._places:
            self._found.pop(name, None)


METHODS = Registry(BUILT_IN)


#: One of these makes a scored method.
SCORING = ("score", "factors", "choose", "select")
#: Arguments that are no knobs.
RESERVED = ("method", "sparsity", *PHASE_ARGUMENTS.values(), "preset", "backend", "stats", "debug", "diagnose")
#: What a method says of itself: a row of the table.
ROW = ("name", "unit", "importance", "allocation", "kv", "reference")


def check_class(method: Any) -> None:
    """Raise ValueError for a class that is no whole method: what it lacks would be found in the middle of a run."""
    who = getattr(method, "__name__", repr(method))
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise ValueError(f"{who} is no subclass of Method; derive it from the base class of its phase")
    own = [name for name, kind in vars(method).get("__annotations__", {}).items() if "ClassVar" not in str(kind)]
    plain = "__dataclass_fields__" not in vars(method)
    if not method.__dataclass_params__.frozen or (own and plain):
        raise ValueError(f"{who} is no frozen dataclass; write @dataclass(frozen=True) above it")
    missing = [
        name for name in ("name", "unit", "importance", "allocation", "kv", "reference") if not said(method, name)
    ]
    if said(method, "phase") and method.phase == "wrapper" and not said(method, "wraps"):
        missing.append("wraps")
    if missing:
        raise ValueError(f"{who} does not say its {', '.join(missing)}; give it as a class attribute")
    if not re.fullmatch(r"[a-z0-9_]+", method.name):
        raise ValueError(f"{who}: its name {method.name!r} cannot be typed; use lower-case letters, digits and _")
    taken = [name for name in method.knobs() if name in RESERVED]
    if taken:
        raise ValueError(f"{who} has a knob {taken[0]!r}, which is an argument of every method; give it another name")
    if method.phase not in (*PHASE_ARGUMENTS, "any", "wrapper"):
        raise ValueError(f"{who} is of phase {method.phase!r}; expected one of {', '.join(PHASE_ARGUMENTS)}")
    for name in method.budget_knobs:
        if name not in method.knobs():
            raise ValueError(f"{who} says that a sparsity decides {name!r}, which is none of its knobs")
    allocations = getattr(method, "allocations", None)
    if allocations is None:
        return
    scored = next(base for base in method.__mro__ if "allocations" in vars(base))
    if all(getattr(method, name, None) is getattr(scored, name, None) for name in SCORING):
        raise ValueError(f"{who} does not score: write score(self, call, ...), as its base class says")
    if not isinstance(method.allocation, allocations):
        kinds = ", ".join(kind.__name__ for kind in allocations)
        raise ValueError(f"{who} divides its budget by {type(method.allocation).__name__}; here are {kinds}")
    floor = getattr(method.allocation, "floor", None)
    if floor is not None and floor not in method.knobs():
        raise ValueError(f"{who} pools its budget and has no knob {floor!r}")
    by_mass = type(method.allocation).__name__ == "TopP"
    if by_mass != (method.native is Mass):
        raise ValueError(f"{who}: native is {method.native.__name__}; TopP goes with Mass, every other one with Count")


def said(method: type, name: str) -> bool:
    """Whether a method says this of itself; a property is for its instances to say."""
    return bool(getattr(method, name, None))


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
