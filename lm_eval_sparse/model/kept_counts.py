"""What the log of samples keeps of the counts of a prompt, as JSON, so that a run that goes on reports all of them.

Floats are written with all their digits: what is read is what was counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from ..runtime.accounting import PHASES, Ledger
from ..runtime.accounting.ledger import ByLayer, with_number

#: Counters of a ledger, and its sums of several numbers with how many there are of each.
_COUNTERS = ("calls", "backends", "reasons", "loops", "loop_reasons")
_LISTS = {"sums": 2, "knobs": 4}


def packed(ledger: Ledger) -> dict[str, Any]:
    """The ledger of one prompt as JSON."""
    return {
        phase: {
            **{name: dict(getattr(ledger, name)[phase]) for name in _COUNTERS},
            **{
                name: {key: list(map(float, row)) for key, row in getattr(ledger, name)[phase].items()}
                for name in _LISTS
            },
            **({"details": _values(ledger.details[phase])} if ledger.full else {}),
            **({"diagnosed": _values(found)} if (found := ledger.diagnosed[phase]) else {}),
            **({"samples": ledger.samples[phase].tolist()} if ledger.samples[phase].any() else {}),
        }
        for phase in PHASES
    } | ({"tokens": int(ledger.lengths["tokens"][0])} if ledger.lengths else {})


def unpacked(found: dict[str, Any], ledger: Ledger, *, diagnosed: bool) -> Ledger | None:
    """The empty `ledger` with the counts of the prompt that `packed` gave; None where figures of heads are missing.

    Args:
        diagnosed: whether what was diagnosed of the prompt counts.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: `packed` did not give it.
    """
    ledger.rows = 1
    ledger.add_length(_whole(found.get("tokens", 0)))
    for phase in PHASES:
        part = found[phase]
        for name in _COUNTERS:
            getattr(ledger, name)[phase] = Counter({key: _whole(number) for key, number in part[name].items()})
        for name, length in _LISTS.items():
            rows = {key: [float(number) for number in row] for key, row in part[name].items()}
            if any(len(row) != length for row in rows.values()):
                raise ValueError(f"{name} of another length")
            for row in rows.values():
                row[-1] = _whole(row[-1])
            getattr(ledger, name)[phase] = rows
        if ledger.full:
            if "details" not in part:
                return None
            ledger.details[phase] = _arrays(part["details"])
        if diagnosed:
            ledger.diagnosed[phase] = _arrays(part.get("diagnosed", {}))
            ledger.samples[phase] = np.array([_whole(number) for number in part.get("samples", (0, 0))])
    return ledger


def _values(by_layer: ByLayer) -> dict[str, Any]:
    """Layer -> figure -> its value in each head, None where there is none."""
    return {
        str(layer): {
            figure: [float(total) if number else None for total, number in values.T]
            for figure, values in figures.items()
        }
        for layer, figures in by_layer.items()
    }


def _arrays(found: dict[str, Any]) -> ByLayer:
    return {
        int(layer): {
            figure: with_number(np.array([np.nan if one is None else float(one) for one in values]))
            for figure, values in figures.items()
        }
        for layer, figures in found.items()
    }


def _whole(number: Any) -> int:
    if isinstance(number, bool) or int(number) != number or number < 0:
        raise ValueError(f"{number!r} is no count")
    return int(number)


__all__ = ["packed", "unpacked"]
