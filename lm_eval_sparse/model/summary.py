"""The end of a run: where its time went, what memory it took, and what did not run as asked.

The same stands in the results, under `run` and beside it in the `sparse` block.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import psutil
import torch

from ..errors import plain
from ..labels import label
from .progress import PHASES

if TYPE_CHECKING:
    from .lm import SparseHFLM

#: Leaves and reasons that are named one by one.
NAMED = 8


class Summary:
    """What a run took, and a text that says so."""

    def __init__(self, lm: SparseHFLM):
        self.lm = lm
        #: Bytes that were held before the first request: the weights, and on a CPU all else of the process.
        self._held: int | None = None
        self._largest: int | None = 0

    def begin(self) -> None:
        """The first request is about to run."""
        if self._held is None:
            on_gpu = self.lm.device.type == "cuda"
            self._held = torch.cuda.memory_allocated(self.lm.device) if on_gpu else psutil.Process().memory_info().rss

    def expect(self, lengths: list[int], reserve: int) -> None:
        """Prompts of these lengths, the longest first, are to be held side by side with room for `reserve` tokens."""
        if self._largest is None or not lengths:
            return
        try:
            memory, plan = self.lm.decoding.memory, self.lm.runtime.plan
            wanted = memory.prefill(max(lengths)) + sum(memory.row(length, reserve, plan) for length in lengths)
        except Exception:  # configurations and methods of any kind: an estimate is no reason to end a run
            self._largest = None
            return
        self._largest = max(self._largest, wanted)

    def figures(self) -> dict[str, Any]:
        """Of this process: `seconds` by phase, `tokens` read and those of a second, `samples`, `peak_memory_bytes`."""
        clock = self.lm.clock
        clock.settle()
        seconds = {phase: round(clock.seconds[phase], 3) for phase in PHASES}
        predicted = None if self._held is None or not self._largest else self._held + self._largest
        return {
            "seconds": {**seconds, "total": round(sum(clock.seconds.values()), 3)},
            "tokens": dict(clock.tokens),
            "tokens_per_second": {
                phase: round(tokens / clock.seconds[phase], 1) if tokens and clock.seconds[phase] else None
                for phase, tokens in clock.tokens.items()
            },
            "samples": clock.samples,
            **({"prefills_shared": shared} if (shared := self.lm.scorer.beginnings.shared) else {}),
            "peak_memory_bytes": {"predicted": predicted, "seen": peak(self.lm.device)},
        }

    def show(self, report: dict[str, Any]) -> None:
        """Write it to standard error, unless no call showed its progress either."""
        if self.lm.clock.shown:
            print(plain(text(report)), file=sys.stderr, flush=True)


def together(mine: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several processes: `seconds` are those of the first one, which waits for the others; tokens and
    samples are those of all, memory that of the one that took most."""
    every = [mine, *others]
    tokens = {phase: sum(figures["tokens"][phase] for figures in every) for phase in mine["tokens"]}
    memory = {}
    for kind in mine["peak_memory_bytes"]:
        found = [figures["peak_memory_bytes"][kind] for figures in every]
        memory[kind] = max((size for size in found if size is not None), default=None)
    return {
        "seconds": mine["seconds"],
        "tokens": tokens,
        "tokens_per_second": {
            phase: round(number / mine["seconds"][phase], 1) if number and mine["seconds"][phase] else None
            for phase, number in tokens.items()
        },
        "samples": sum(figures["samples"] for figures in every),
        **({"prefills_shared": shared} if (shared := sum(f.get("prefills_shared", 0) for f in every)) else {}),
        "peak_memory_bytes": memory,
    }


def peak(device: torch.device) -> int | None:
    """Bytes held at most: allocated on a GPU; on a CPU by the process since it began, None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return getattr(psutil.Process().memory_info(), "peak_wset", None)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def text(report: dict[str, Any]) -> str:
    """A few lines from the `sparse` block."""
    run, phases = report["run"], report["phases"]
    seconds = run["seconds"]
    parts = ", ".join(f"{phase} {seconds[phase]:.1f}" for phase in PHASES if seconds[phase] >= 0.05)
    lines = [f"Run of {seconds['total']:.1f} s: {parts or 'nothing'}"]
    read = [
        f"{run['tokens'][phase]:,} tokens in {phase} ({speed:,.1f}/s)"
        for phase, speed in run["tokens_per_second"].items()
        if speed is not None
    ]
    lines.append(f"  {run['samples']} samples{''.join(f', {part}' for part in read)}")
    memory = run["peak_memory_bytes"]
    told = [f"{memory[kind] / 2**30:.2f} GiB {kind}" for kind in ("predicted", "seen") if memory[kind] is not None]
    if told:
        lines.append(f"  peak memory: {', '.join(told)}")
    for name, phase in phases.items():
        if number := phase["calls"]["fallback"]:
            reasons = list(phase.get("fallback_reasons", {}).items())[:NAMED]
            named = "; ".join(f"{count}: {label(reason, 200)}" for reason, count in reasons)
            lines.append(f"  {name}: {number} of {sum(phase['calls'].values())} calls fell back to dense ({named})")
    if halved := report.get("batches_halved"):
        lines.append(f"  memory ran out {halved} times: those batches ran again with half as many prompts")
    by_reason: dict[str, list[str]] = {}
    for task, reason in report["skipped"].items():
        by_reason.setdefault(reason, []).append(task)
    for reason, tasks in list(by_reason.items())[:NAMED]:
        more = f" and {len(tasks) - NAMED} more" if len(tasks) > NAMED else ""
        lines.append(f"  not run: {', '.join(map(label, tasks[:NAMED]))}{more}: {label(reason, 300)}")
    return "\n".join(lines)


__all__ = ["Summary", "peak", "text"]
