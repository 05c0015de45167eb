"""Strategies for input that is nearly right (values, JSON, lines and bytes with a few things wrong), and how many."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

THOROUGH = settings.get_current_profile_name() == "fuzz"


def examples(count: int, seconds: float = 2) -> Any:
    """So many examples, the same in every run; with `--fuzz` fifty times more, others in every run. None may hang."""
    return settings(
        max_examples=count * 50 if THOROUGH else count,
        deadline=1000 * seconds,
        derandomize=not THOROUGH,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


#: What stands where something else should.
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 5, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.5, 1e308, -1e308, 1e-320,
    float("nan"), float("inf"), float("-inf"), "", " ", "x", "0", "1e5", "None", "nan", "a\nb", "\x1b[2J", "\0",
    "\ud800", "$\\frac{1}{$",
    "<script>alert(1)</script>", "| a | b |", "---", "{{ x }}", "/etc/passwd", "../..", "~nosuchuser/x", "~", "x" * 400,
    "\u202e", "１２", "²", [], [None], [[]], ["x"], [0, 0], {}, {"": None}, {"a": []}, {"x": {"y": 1}}, {"0": 1},
]  # fmt: skip

odd = st.sampled_from(ODD).map(copy.deepcopy)
text = st.text(max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
json_values = odd | st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
)


def places(value: Any) -> list[tuple[Any, ...]]:
    """The ways to everything inside a JSON value, itself left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, inner in items for way in [(key,), *((key, *rest) for rest in places(inner))]]


@st.composite
def damaged(draw: st.DrawFn, base: Any, most: int = 3) -> Any:
    """`base`, a JSON object or list, with up to `most` values replaced, taken away, doubled or added."""
    value = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, most))):
        known = places(value)
        if not known:
            break
        *way, last = draw(st.sampled_from(known))
        inner = value
        for key in way:
            inner = inner[key]
        what = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "wrap"]))
        if what == "replace":
            inner[last] = draw(json_values)
        elif what == "delete":
            del inner[last]
        elif what == "wrap":
            inner[last] = [inner[last]]
        elif isinstance(inner, dict):
            inner[draw(text)] = draw(odd)
        else:
            inner.append(draw(odd))
    return value


@st.composite
def torn(draw: st.DrawFn, base: bytes, most: int = 3) -> bytes:
    """`base` with up to `most` pieces cut out, replaced or doubled."""
    value = base
    for _ in range(draw(st.integers(1, most))):
        start = draw(st.integers(0, len(value)))
        end = min(len(value), start + draw(st.integers(0, 1) | st.integers(0, 40) | st.just(len(value))))
        what = draw(st.sampled_from(["cut", "bytes", "flip", "double", "odd"]))
        piece = value[start:end]
        if what == "cut":
            piece = b""
        elif what == "bytes":
            piece = draw(st.binary(max_size=8))
        elif what == "flip":
            piece = bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in piece[:1]) + piece[1:]
        elif what == "double":
            piece = piece * 2
        else:
            piece = json.dumps(draw(odd)).encode()
        value = value[:start] + piece + value[end:]
    return value


def file_of(base: Any) -> st.SearchStrategy[bytes]:
    """`base` as the bytes of a JSON file, damaged in its values or in its bytes."""
    return damaged(base).map(lambda value: json.dumps(value).encode()) | torn(json.dumps(base).encode())


def lines_of(*rows: Any) -> st.SearchStrategy[bytes]:
    """Files of a JSON object per line, one of which is damaged, or the file as a whole is."""
    good = [json.dumps(row).encode() for row in rows]
    whole = b"\n".join(good) + b"\n"
    return torn(whole) | st.integers(0, len(rows) - 1).flatmap(
        lambda which: file_of(rows[which]).map(lambda bad: b"\n".join([*good[:which], bad, *good[which + 1 :]]) + b"\n")
    )
