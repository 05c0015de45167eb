"""Totals of many prompts: what the results of a run, or of a task, say of sparsity."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .rows import FIGURES, PHASES, RowCounts, merge_knobs

#: Layer -> figure -> `(2, H)` sums of the figure, and numbers of what was added.
ByLayer = dict[int, dict[str, np.ndarray]]


@dataclass
class Ledger:
    """Running totals over the prompts of a run (or of one task): everything adds, so ranks can be merged.

    Attributes:
        restored: prompts that were counted from stored answers, without details.
        full: whether figures are kept per layer and head, too.
        details: phase -> layer -> figure -> `(2, H)` sums of the figure over prompts, and numbers of prompts.
        diagnosed: the same of the figures of `diagnose=N`.
        samples: phase -> prompts that have some of these, and queries of each head that were looked at in them.
        runs: prompts by the run that answered them, as far as that was told.
        lengths: under `tokens` the sum, smallest and largest number of tokens of prompts, and how many it is known of.
    """

    rows: int = 0
    sums: dict[str, dict[str, list[float]]] = field(default_factory=lambda: {name: {} for name in PHASES})
    calls: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in PHASES})
    backends: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in PHASES})
    reasons: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in PHASES})
    knobs: dict[str, dict[str, list[float]]] = field(default_factory=lambda: {name: {} for name in PHASES})
    loops: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in PHASES})
    loop_reasons: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in PHASES})
    restored: int = 0
    restored_compactions: int = 0
    full: bool = False
    details: dict[str, ByLayer] = field(default_factory=lambda: {name: {} for name in PHASES})
    diagnosed: dict[str, ByLayer] = field(default_factory=lambda: {name: {} for name in PHASES})
    samples: dict[str, np.ndarray] = field(default_factory=lambda: {name: np.zeros(2, dtype=int) for name in PHASES})
    runs: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[float]] = field(default_factory=dict)

    def add(self, row: RowCounts) -> None:
        """Count one prompt. Figures are averaged over prompts, not weighted by length."""
        figures = row.figures()
        self.rows += 1
        self.add_length(row.tokens)
        if row.diagnosis is not None:
            row.diagnosis.end()
        for name in PHASES:
            counts = row.phase(name)
            self._add_phase(name, figures[name], counts.calls, counts.backends)
            self.reasons[name].update(counts.reasons)
            merge_knobs(self.knobs[name], counts.knobs)
            self.loops[name].update(counts.loops)
            self.loop_reasons[name].update(counts.loop_reasons)
            if self.full:
                for layer in counts.layers:
                    for figure, values in row.layer_figures(name, layer).items():
                        add_figure(self.details[name], layer, figure, with_number(values))
            if row.diagnosis is not None and (found := row.diagnosis.figures(name)):
                self.samples[name] += (1, row.diagnosis.queries(name))
                for layer, values_by in found.items():
                    for figure, values in values_by.items():
                        add_figure(self.diagnosed[name], layer, figure, with_number(values))

    def add_length(self, tokens: int) -> None:
        """Note how many tokens a prompt had; 0 where that is not known."""
        if tokens:
            merge_knobs(self.lengths, {"tokens": [tokens, tokens, tokens, 1]})

    def add_stats(self, stats: dict[str, Any]) -> None:
        """Count one prompt from the figures that its responses carry."""
        self.rows += 1
        self.restored += 1
        for name in PHASES:
            phase = dict(stats[name])
            if again := phase.pop("compactions", 0):  # of how much each dropped nothing is known any more
                self.restored_compactions += again
            calls, backends = phase.pop("calls"), phase.pop("backends")
            if (window := phase.pop("window", None)) is not None:
                number = sum(calls.get(kind, 0) for kind in ("sparse", "fallback"))
                merge_knobs(self.knobs[name], {"window": [window * number, window, window, number]})
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
        self.runs.update(other.runs)
        merge_knobs(self.lengths, other.lengths)
        self.restored += other.restored
        self.restored_compactions += other.restored_compactions
        for name in PHASES:
            for figure, (total, count) in other.sums[name].items():
                mine = self.sums[name].setdefault(figure, [0.0, 0])
                mine[0] += total
                mine[1] += count
            self.calls[name].update(other.calls[name])
            self.backends[name].update(other.backends[name])
            self.reasons[name].update(other.reasons[name])
            merge_knobs(self.knobs[name], other.knobs[name])
            self.loops[name].update(other.loops[name])
            self.loop_reasons[name].update(other.loop_reasons[name])
            self.samples[name] += other.samples[name]
            for mine, theirs in (
                (self.details[name], other.details[name]),
                (self.diagnosed[name], other.diagnosed[name]),
            ):
                for layer, figures in theirs.items():
                    for figure, values in figures.items():
                        add_figure(mine, layer, figure, values)

    @property
    def compactions(self) -> int:
        """How often a layer of a prompt was evicted again in the course of an answer."""
        return compactions(self.knobs["eviction"]) + self.restored_compactions

    def prompts(self) -> dict[str, Any]:
        """How many prompts there were whose length is known, and their tokens."""
        if not self.lengths:
            return {"number": 0, "tokens": None}
        total, low, high, number = self.lengths["tokens"]
        return {"number": number, "tokens": {"mean": total / number, "min": low, "max": high}}

    def report(self, name: str) -> dict[str, Any]:
        """The block of one phase for the results file."""
        sums = self.sums[name]
        return {
            **{figure: sums[figure][0] / sums[figure][1] if figure in sums else None for figure in FIGURES},
            "calls": {kind: self.calls[name].get(kind, 0) for kind in ("sparse", "dense", "fallback")},
            "backends": dict(self.backends[name]),
            **({"fallback_reasons": dict(self.reasons[name].most_common(10))} if self.reasons[name] else {}),
            **({"loops": dict(self.loops[name])} if self.loops[name] else {}),
            **({"loop_reasons": dict(self.loop_reasons[name].most_common(10))} if self.loop_reasons[name] else {}),
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

    def detail_report(self, name: str) -> list[dict[str, Any]]:
        """Per layer of one phase: its index, and each figure per query head, averaged over prompts."""
        return by_layer(self.details[name])

    def diagnostics(self, name: str, layers: bool) -> dict[str, Any] | None:
        """What `diagnose=N` has found of one phase, or None: means over layers and heads of the figures, which are
        themselves averages over samples; with `layers` those of each head, too."""
        samples, queries = self.samples[name].tolist()
        if not samples:
            return None
        rows = [
            {key: value if key == "layer" else [rounded(one) for one in value] for key, value in row.items()}
            for row in by_layer(self.diagnosed[name])
        ]
        values: dict[str, list[float]] = {}
        for row in rows:
            for figure, heads in row.items():
                if figure != "layer":
                    values.setdefault(figure, []).extend(value for value in heads if value is not None)
        mean = {figure: rounded(sum(known) / len(known)) if known else None for figure, known in values.items()}
        return {"samples": samples, "queries": queries, "mean": mean, **({"layers": rows} if layers else {})}


def with_number(values: np.ndarray) -> np.ndarray:
    """`(2, H)`: values, 0 for those that are NaN, and how many there are of each, 1 or 0."""
    known = ~np.isnan(values)
    return np.stack([np.where(known, values, 0.0), known])


def add_figure(into: ByLayer, layer: int, figure: str, values: np.ndarray) -> None:
    """Add sums and numbers `(2, H)` of a figure to those of its layer."""
    mine = into.setdefault(layer, {})
    mine[figure] = mine[figure] + values if figure in mine else values


def by_layer(sums: ByLayer) -> list[dict[str, Any]]:
    """Layer by layer its index, and the mean of each figure per head; None where there is none."""
    return [
        {
            "layer": layer,
            **{
                figure: [float(total / count) if count else None for total, count in values.T]
                for figure, values in figures.items()
            },
        }
        for layer, figures in sorted(sums.items())
    ]


def rounded(value: float | None) -> float | None:
    """Six digits, which is more than anybody reads and keeps a file of all heads small."""
    return None if value is None else float(f"{value:.6g}")


def compactions(knobs: dict[str, list[float]]) -> int:
    """How often a layer was evicted again, from solved knobs of an eviction phase: each time notes what it dropped."""
    return int(knobs["dropped"][3]) if "dropped" in knobs else 0
