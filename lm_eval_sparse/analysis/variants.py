"""What tells runs of one method apart, and what a figure calls them. Knows records."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from ..labels import label
from ..results.schema import Record


def is_dense(row: Record) -> bool:
    """Every method at sparsity 0 is dense attention."""
    return row.method == "dense" or (row.measured == 0 and not row.requested)


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


def chain_labels(rows: Iterable[Record]) -> dict[tuple[Any, ...], str]:
    """A label for each method and variant: what all variants of the method share is not said."""
    variants: dict[str, set[tuple[tuple[str, str], ...]]] = defaultdict(set)
    for row in rows:
        if not is_dense(row):
            variants[row.method].add(variant(row))
    labels = {}
    for method, found in variants.items():
        names = sorted({name for one in found for name, _ in one})
        differing = [name for name in names if len({dict(one).get(name) for one in found}) > 1]
        for one in found:
            given = dict(one)
            parts = [
                f"{name.removeprefix(f'{method}.')}={json.loads(given[name])}" for name in differing if name in given
            ]
            more = f" ({label(', '.join(parts), 120)})" if parts else ""
            labels[method, one] = f"{label(method, 60)}{more}"
    return labels
