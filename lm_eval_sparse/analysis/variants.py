"""What tells runs of one method apart, and what a figure calls them. Knows records."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..labels import label
from ..results.schema import Record

Name = TypeVar("Name", bound=tuple[Any, ...])
#: Method, phases and variant.
Kind = tuple[str, str, tuple[tuple[str, str], ...]]


def is_dense(row: Record) -> bool:
    """Every method is dense attention where sparsity 0 is asked for. One that was measured at 0 is not: what it did
    besides, such as with fewer bits, nobody knows."""
    return row.method == "dense" or (row.requested == 0 and row.measured == 0 and not row.code)


def is_oracle(method: str) -> bool:
    """Whether any part of a method knows what no method can know."""
    return any(part.rpartition(":")[2].startswith("oracle") for part in method.split("+"))


def variant(row: Record) -> tuple[tuple[str, str], ...]:
    """What tells chains of one method apart, by name: knobs but those of the budget, preset, backend, code, seeds."""
    knobs = {
        f"{method}.{name}": value
        for method, given in row.knobs.items()
        if isinstance(given, dict)
        for name, value in given.items()
        if name not in row.budget_knobs.get(method, ())
    }
    found = {**knobs, "preset": row.preset, "backend": row.backend, "model type": row.runner}
    if row.code:
        found["code"] = json.dumps(row.code, sort_keys=True, default=str)
    if row.requested is None:
        found["budget"] = "knobs"
    return tuple(sorted((name, json.dumps(value, default=str)) for name, value in found.items() if value is not None))


def kind(row: Record) -> Kind:
    """What all points of a chain share."""
    return row.method, row.phases, variant(row)


def chain_labels(rows: Iterable[Record]) -> dict[Kind, str]:
    """A label for each chain, no two alike: what all chains of the method share is not said."""
    by_method: dict[str, set[Kind]] = defaultdict(set)
    for row in rows:
        if not is_dense(row):
            by_method[row.method].add(kind(row))
    labels = {}
    for method, found in by_method.items():
        given = {one: {**dict(one[2]), **({"phases": json.dumps(one[1])} if one[1] else {})} for one in found}
        names = sorted({name for pairs in given.values() for name in pairs})
        differing = [name for name in names if len({pairs.get(name) for pairs in given.values()}) > 1]
        for one in found:
            parts = [
                f"{name.removeprefix(f'{method}.')}={json.loads(given[one][name])}"
                for name in differing
                if name in given[one]
            ]
            more = f" ({label(', '.join(parts), 120)})" if parts else ""
            labels[one] = f"{label(method, 60)}{more}"
    return unlike(labels)


def unlike(names: Mapping[Name, str]) -> dict[Name, str]:
    """The same names with `#2`, `#3` after those that stand already: texts that are cut, or a number and a text of it,
    may look alike, and what looks alike would be put together."""
    found: dict[Name, str] = {}
    taken: set[str] = set()
    for key in sorted(names, key=lambda key: (names[key], repr(key))):
        name, number = names[key], 1
        while name in taken:
            number += 1
            name = f"{names[key]} #{number}"
        taken.add(name)
        found[key] = name
    return found
