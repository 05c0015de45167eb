"""Counting what attention calls did, per prompt, phase, layer and head, and turning the counts into figures.

The definitions are those of docs/accounting.md: sparsity is counted over (query, key) pairs inside the causal
triangle of the unpadded prompt for prefill, over the prompt's keys for eviction, and over keys read for decoding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..diagnose import Diagnosis

PHASES = ("prefill", "eviction", "decode")

#: What is counted of each attention call, for each query head.
FIELDS = ("pairs", "selected", "executed", "bytes_dense", "bytes_read", "flops_dense", "flops_estimator")
#: Figure -> the two counts whose quotient it is. The sparsities are 1 minus theirs.
QUOTIENTS = {
    "selected_sparsity": ("selected", "pairs"),
    "executed_sparsity": ("executed", "pairs"),
    "bytes_read_fraction": ("bytes_read", "bytes_dense"),
    "estimator_flops_fraction": ("flops_estimator", "flops_dense"),
}
MEMORY = "kv_memory_fraction"
FIGURES = (*QUOTIENTS, MEMORY)

#: Numbers that a row leaves on the device at most, in calls; a 128K prompt of 80 layers leaves 240.
MOST_PENDING = 1024

Numbers = float | Sequence[float] | np.ndarray


@dataclass
class PhaseCounts:
    """Counts of one phase of one row.

    Attributes:
        layers: sparse-eligible layer -> `(7, H)` sums of `FIELDS` over its calls. `pairs` are the (query, key) pairs a
            dense call computes (for eviction: keys of the prompt), `selected` and `executed` those of the calls made;
            `bytes_dense` the K and V bytes that a dense kernel of the same tiling reads, `bytes_read` those of the
            calls made, what selecting read included; `flops_dense` operations of dense attention,
            `flops_estimator` those spent on selecting.
        calls: attention calls by kind (`sparse`, `dense`, `fallback`).
        backends: attention calls by the kernel that computed them.
        reasons: why calls fell back.
        knobs: for each solved knob its sum, smallest and largest value, and count, over layers.
        loops: decode steps of the whole model by what ran them: `cuda_graph`, `eager` or `transformers`.
        loop_reasons: why steps were not run as they could have been.
    """

    layers: dict[int, np.ndarray] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    backends: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    knobs: dict[str, list[float]] = field(default_factory=dict)
    loops: Counter[str] = field(default_factory=Counter)
    loop_reasons: Counter[str] = field(default_factory=Counter)

    def add(self, layer: int, heads: int, kind: str | None, backend: str | None, **counts: Numbers) -> None:
        """Count one call, or with no `kind` what several calls did that the caller counts.

        Each of `FIELDS` is given per query head, or as a number that every head gets.
        """
        table = self.layers.get(layer)
        if table is None:
            table = self.layers[layer] = np.zeros((len(FIELDS), heads))
        for row, name in enumerate(FIELDS):
            table[row] += counts[name]
        if kind is not None:
            self.calls[kind] += 1
        if backend is not None:
            self.backends[backend] += 1

    def merge_layer(self, layer: int, other: PhaseCounts) -> None:
        """Count in this layer what `other` counted in its layer 0, without knobs."""
        table = other.layers[0]
        self.layers[layer] = self.layers[layer] + table if layer in self.layers else table.copy()
        for mine, theirs in ((self.calls, other.calls), (self.backends, other.backends), (self.reasons, other.reasons)):
            mine.update(theirs)

    def note_knobs(self, knobs: dict[str, Any]) -> None:
        for name, value in knobs.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                total, low, high, count = self.knobs.get(name, (0.0, value, value, 0))
                self.knobs[name] = [total + value, min(low, value), max(high, value), count + 1]

    def note_many(self, name: str, values: np.ndarray) -> None:
        """Note the values of a knob in several calls."""
        merge_knobs(self.knobs, {name: [float(values.sum()), float(values.min()), float(values.max()), len(values)]})

    def figures(self) -> dict[str, float | None]:
        """The measured figures of this phase for this row, over layers and heads; None where nothing was computed."""
        totals = sum((table.sum(1) for table in self.layers.values()), np.zeros(len(FIELDS)))
        found = quotients(totals)
        return {name: None if np.isnan(value) else float(value) for name, value in found.items()}


def quotients(counts: np.ndarray) -> dict[str, np.ndarray]:
    """The figures of `(7, …)` counts, NaN where the dense count is 0."""
    by_name = dict(zip(FIELDS, counts, strict=True))
    figures = {}
    for name, (part, whole) in QUOTIENTS.items():
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(by_name[whole] > 0, by_name[part] / by_name[whole], np.nan)
        figures[name] = 1 - share if name.endswith("sparsity") else share
    return figures


@dataclass
class RowCounts:
    """Counts of one prompt: its phases, and the KV memory held once its prefill was over.

    Attributes:
        phases: counts by phase, without those that are pending: `phase` gives them with all.
        kv: sparse-eligible layer -> `(2, H_kv)` bytes that each KV head holds, and those of the whole prompt.
        pending: what is to be counted once its numbers are fetched from a device: how, and the numbers.
        diagnosis: what its calls are looked at by, where it is a sample of `diagnose=N`.
        tokens: of the prompt; 0 where context and answer run in one pass, so that nothing says where it ended.
    """

    phases: dict[str, PhaseCounts] = field(default_factory=lambda: {name: PhaseCounts() for name in PHASES})
    kv: dict[int, np.ndarray] = field(default_factory=dict)
    pending: list[tuple[Callable[..., None], tuple[Any, ...]]] = field(default_factory=list, repr=False)
    diagnosis: Diagnosis | None = field(default=None, repr=False)
    tokens: int = 0

    def later(self, count: Callable[..., None], *numbers: Any) -> None:
        """Call `count(*numbers)` when figures are first read, with the tensors among the numbers as host numbers.

        A tensor of one number becomes an int or a float, another one an array of fp64. Numbers that are all on the
        host are counted at once. `count` must not hold on to device memory.
        """
        self.pending.append((count, numbers))
        if len(self.pending) > MOST_PENDING or not any(map(on_device, numbers)):
            settle([self])

    def phase(self, name: str) -> PhaseCounts:
        settle([self])
        return self.phases[name]

    def figures(self) -> dict[str, dict[str, float | None]]:
        settle([self])
        held, dense = sum((table.sum(1) for table in self.kv.values()), np.zeros(2))
        memory = float(held / dense) if dense else None
        return {name: {**self.phases[name].figures(), MEMORY: memory} for name in PHASES}

    def layer_figures(self, phase: str, layer: int) -> dict[str, np.ndarray]:
        """The figures of one layer, `(H,)` each; NaN where nothing was counted."""
        counts = self.phase(phase).layers[layer]
        figures = quotients(counts)
        if layer in self.kv:
            held, dense = self.kv[layer]
            figures[MEMORY] = np.repeat(held / dense, counts.shape[1] // len(held))
        else:
            figures[MEMORY] = np.full(counts.shape[1], np.nan)
        return figures


def on_device(value: Any) -> bool:
    """Whether reading this number waits for a device."""
    return isinstance(value, Tensor) and value.device.type != "cpu"


def settle(rows: Iterable[RowCounts]) -> None:
    """Count what is pending in these rows, fetching all numbers of a device at once."""
    rows = list(rows)
    waiting = [call for row in rows for call in row.pending]
    tensors = [number for _, numbers in waiting for number in numbers if isinstance(number, Tensor)]
    fetched = iter(to_host(tensors))  # should it fail, nothing is lost
    for row in rows:
        row.pending = []
    for count, numbers in waiting:
        count(*(next(fetched) if isinstance(number, Tensor) else number for number in numbers))


def to_host(tensors: Sequence[Tensor]) -> list[Any]:
    """The numbers of these tensors: an int or a float for one without dimensions, else an array of fp64.

    Whole numbers below 2**53 stay exact.
    """
    values: list[Any] = [None] * len(tensors)
    for device in {tensor.device for tensor in tensors}:
        # One concatenation for each dtype, one copy to the host for all.
        places: dict[torch.dtype, list[int]] = {}
        for place, tensor in enumerate(tensors):
            if tensor.device == device:
                places.setdefault(tensor.dtype, []).append(place)
        parts = [torch.cat([tensors[place].detach().reshape(-1) for place in own]).double() for own in places.values()]
        numbers = torch.cat(parts).cpu().numpy()
        start = 0
        for place in (place for own in places.values() for place in own):
            tensor = tensors[place]
            found = numbers[start : start + tensor.numel()].reshape(tuple(tensor.shape))
            if not tensor.dim():
                found = float(found) if tensor.dtype.is_floating_point else int(found)
            values[place] = found
            start += tensor.numel()
    return values


def merge_knobs(into: dict[str, list[float]], other: dict[str, list[float]]) -> None:
    """Add sums and counts, widen minima and maxima."""
    for knob, (total, low, high, count) in other.items():
        mine = into.get(knob, [0.0, low, high, 0])
        into[knob] = [mine[0] + total, min(mine[1], low), max(mine[2], high), mine[3] + count]
