"""The registry of methods: a new method is one file and one line here."""

from __future__ import annotations

from .base import Geometry, Method, PrefillMethod, Selection
from .dense import Dense
from .flexprefill import FlexPrefill

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (Dense, FlexPrefill)}

__all__ = ["METHODS", "Dense", "FlexPrefill", "Geometry", "Method", "PrefillMethod", "Selection", "table"]


def table() -> str:
    """A markdown table of all methods: phase, place in the taxonomy, knobs with defaults, paper."""
    lines = [
        "| method | phase | unit | importance | budget | KV cache | knobs (default) | paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cls in METHODS.values():
        knobs = ", ".join(f"`{name}` ({default})" for name, default in cls.knobs().items()) or "-"
        lines.append(
            f"| `{cls.name}` | {cls.phase} | {cls.unit} | {cls.importance} | {cls.budget} | {cls.kv} "
            f"| {knobs} | {cls.paper} |"
        )
    return "\n".join(lines)
