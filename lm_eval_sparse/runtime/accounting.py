"""Counting what attention calls did, per prompt and phase, and turning the counts into the reported figures.

The definitions are those of docs/accounting.md: sparsity is counted over (query, key) pairs inside the causal
triangle of the unpadded prompt for prefill, and over keys read for decoding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

PHASES = ("prefill", "decode")


@dataclass
class PhaseCounts:
    """Sums over the sparse-eligible layers (and query heads) of one phase of one row.

    Attributes:
        pairs: (query, key) pairs a dense call computes; `selected`, `executed` are those of the calls made.
        bytes_dense: K and V bytes that a dense kernel of the same tiling reads; `bytes_read` those of the calls
            made, what selecting read included.
        flops_dense: attention operations of dense calls; `flops_estimator` those spent on selecting.
        calls: attention calls by kind (`sparse`, `dense`, `fallback`).
        backends: attention calls by the kernel that computed them.
        reasons: why calls fell back.
        knobs: for each solved knob its sum, smallest and largest value, and count, over layers.
    """

    pairs: int = 0
    selected: int = 0
    executed: int = 0
    bytes_dense: int = 0
    bytes_read: int = 0
    flops_dense: int = 0
    flops_estimator: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    backends: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    knobs: dict[str, list[float]] = field(default_factory=dict)

    def note_knobs(self, knobs: dict[str, Any]) -> None:
        for name, value in knobs.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                total, low, high, count = self.knobs.get(name, (0.0, value, value, 0))
                self.knobs[name] = [total + value, min(low, value), max(high, value), count + 1]

    def figures(self) -> dict[str, float | None]:
        """The measured figures of this phase for this row; None where nothing was computed."""

        def share(part: int, whole: int) -> float | None:
            return part / whole if whole else None

        selected, executed = share(self.selected, self.pairs), share(self.executed, self.pairs)
        return {
            "selected_sparsity": None if selected is None else 1 - selected,
            "executed_sparsity": None if executed is None else 1 - executed,
            "bytes_read_fraction": share(self.bytes_read, self.bytes_dense),
            "estimator_flops_fraction": share(self.flops_estimator, self.flops_dense),
        }


@dataclass
class RowCounts:
    """Counts of one prompt: its phases and the KV memory held once its prefill was over."""

    prefill: PhaseCounts = field(default_factory=PhaseCounts)
    decode: PhaseCounts = field(default_factory=PhaseCounts)
    kv_bytes: int = 0
    kv_bytes_dense: int = 0

    def phase(self, name: str) -> PhaseCounts:
        return self.prefill if name == "prefill" else self.decode

    def figures(self) -> dict[str, dict[str, float | None]]:
        kv = self.kv_bytes / self.kv_bytes_dense if self.kv_bytes_dense else None
        return {name: {**self.phase(name).figures(), "kv_memory_fraction": kv} for name in PHASES}


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None, or None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


@dataclass
class Ledger:
    """Running totals over the prompts of a run (or of one task): everything adds, so ranks can be merged."""

    rows: int = 0
    sums: dict[str, dict[str, list[float]]] = field(default_factory=lambda: {name: {} for name in PHASES})
    calls: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in PHASES})
    backends: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in PHASES})
    reasons: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in PHASES})
    knobs: dict[str, dict[str, list[float]]] = field(default_factory=lambda: {name: {} for name in PHASES})

    def add(self, row: RowCounts) -> None:
        """Count one prompt. Figures are averaged over prompts, not weighted by length."""
        figures = row.figures()
        self.rows += 1
        for name in PHASES:
            counts = row.phase(name)
            self._add_phase(name, figures[name], counts.calls, counts.backends)
            self.reasons[name].update(counts.reasons)
            merge_knobs(self.knobs[name], counts.knobs)

    def add_stats(self, stats: dict[str, Any]) -> None:
        """Count one prompt from the figures that its responses carry."""
        self.rows += 1
        for name in PHASES:
            phase = dict(stats[name])
            calls, backends = phase.pop("calls"), phase.pop("backends")
            self._add_phase(name, phase, calls, backends)

    def _add_phase(
        self, name: str, figures: dict[str, float | None], calls: dict[str, int], backends: dict[str, int]
    ) -> None:
        for figure, value in figures.items():
            if value is not None:
                total = self.sums[name].setdefault(figure, [0.0, 0])
                total[0] += value
                total[1] += 1
        self.calls[name].update(calls)
        self.backends[name].update(backends)

    def merge(self, other: Ledger) -> None:
        """Add another rank's totals to these."""
        self.rows += other.rows
        for name in PHASES:
            for figure, (total, count) in other.sums[name].items():
                mine = self.sums[name].setdefault(figure, [0.0, 0])
                mine[0] += total
                mine[1] += count
            self.calls[name].update(other.calls[name])
            self.backends[name].update(other.backends[name])
            self.reasons[name].update(other.reasons[name])
            merge_knobs(self.knobs[name], other.knobs[name])

    def report(self, name: str) -> dict[str, Any]:
        """The block of one phase for the results file."""
        figures = ("selected_sparsity", "executed_sparsity", "bytes_read_fraction")
        figures += ("kv_memory_fraction", "estimator_flops_fraction")
        sums = self.sums[name]
        return {
            **{figure: sums[figure][0] / sums[figure][1] if figure in sums else None for figure in figures},
            "calls": {kind: self.calls[name].get(kind, 0) for kind in ("sparse", "dense", "fallback")},
            "backends": dict(self.backends[name]),
            **({"fallback_reasons": dict(self.reasons[name].most_common(10))} if self.reasons[name] else {}),
            **(
                {
                    "knobs_solved": {
                        knob: {"mean": total / count, "min": low, "max": high}
                        for knob, (total, low, high, count) in self.knobs[name].items()
                    }
                }
                if self.knobs[name]
                else {}
            ),
        }


def merge_knobs(into: dict[str, list[float]], other: dict[str, list[float]]) -> None:
    """Add sums and counts, widen minima and maxima."""
    for knob, (total, low, high, count) in other.items():
        mine = into.get(knob, [0.0, low, high, 0])
        into[knob] = [mine[0] + total, min(mine[1], low), max(mine[2], high), mine[3] + count]
