"""What a ledger says of its sweep, in lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..labels import label
from .cell import Cell
from .ledger import Ledger

#: Failures that are told, each with its reason.
_NAMED = 10


def status(ledger: Ledger) -> str:
    """How many cells are done, failed and left, model by model; why some failed."""
    plan, done, failed = ledger.plan(), ledger.addresses(), ledger.failures()
    lines = [f"{label(ledger.name)}: {_counts(plan.values(), done, set(failed))}"]
    models = dict.fromkeys(cell.model for cell in plan.values())
    for model in models if len(models) > 1 else ():
        lines.append(f"  {label(model)}: {_counts((c for c in plan.values() if c.model == model), done, set(failed))}")
    seconds = ledger.seconds()
    if seconds and len(seconds) < len(plan):
        mean = sum(seconds.values()) / len(seconds)
        lines.append(f"  {mean:.1f} s a cell so far, {hours(sum(seconds.values()))} in all")
    reasons = Counter(failure.why for failure in failed.values())
    for reason, many in reasons.most_common(_NAMED):
        first = next(failure for failure in failed.values() if failure.why == reason)
        more = f" (and {many - 1} more)" if many > 1 else ""
        lines.append(f"  failed: {label(first.told, 300)}{more}: {reason}")
    if more := len(reasons) - _NAMED:
        lines += [f"  and {more} more reasons, in {ledger.folder / 'failed'}"] if more > 0 else []
    return "\n".join(lines)


def _counts(cells: Iterable[Cell], done: set[str], failed: set[str]) -> str:
    addresses = [cell.address for cell in cells]
    ready = sum(address in done for address in addresses)
    broken = sum(address in failed and address not in done for address in addresses)
    parts = [f"{ready} of {len(addresses)} cells done"]
    parts += [f"{broken} failed"] if broken else []
    left = len(addresses) - ready - broken
    parts += [f"{left} to run"] if left else []
    return ", ".join(parts)


def hours(seconds: float) -> str:
    """A time in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


__all__ = ["hours", "status"]
