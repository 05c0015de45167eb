"""What a run is doing and how far it has come: seconds by phase, and one bar for each call of lm-eval's.

Time is taken on the host, where one phase ends and the next begins: the answer to a prompt waits for the device anyway,
and nothing here does. A bar is drawn when a forward pass begins, when decoded tokens arrive, and when a request is
answered; at most four times a second.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from ..protocol import stats_of

#: What a run spends its time with. `prefill` and `decode` are those of the runtime: in scoring, too, what follows a
#: prompt is decoded. `prompts` are made and cut into tokens; `rest` is what is left, lm-eval's metrics among it.
PHASES = ("loading", "checks", "prompts", "prefill", "decode", "rest")
#: Seconds between two drawings of a bar in a terminal, and between two lines elsewhere, of which the first is early.
DRAW, LINES, FIRST_LINE = 0.25, 30.0, 3.0
#: Tokens of prompts that one of an answer weighs as in the bar, until both have been timed.
WEIGHT = 50.0

T = TypeVar("T")


class Clock:
    """Seconds and tokens of a run by phase.

    Attributes:
        seconds: of each phase in `PHASES`.
        tokens: read in the phases `prefill` and `decode`; the first token of an answer comes from the prefill.
        samples: documents that were answered.
        call: the running call of lm-eval's, if any.
        shown: whether any call showed its progress.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now = now
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.tokens = {"prefill": 0, "decode": 0}
        self.samples = 0
        self.call: Call | None = None
        self.shown = False
        self._phase, self._since = PHASES[0], now()
        #: Tokens of the forward pass that runs: they are read once the next thing begins.
        self._flying = 0
        self._checks = False

    def switch(self, phase: str, tokens: int = 0) -> None:
        """From here on the run is in `phase`; `tokens` are what a forward pass that begins is about to read."""
        if self._checks:
            return
        self.settle()
        self._phase, self._flying = phase, tokens
        if self.call is not None:
            self.call.tick()

    def settle(self) -> None:
        """Add what has gone by since the last time."""
        now = self.now()
        self.seconds[self._phase] += now - self._since
        self._since = now
        if self._flying:
            self.tokens[self._phase] += self._flying
            self._flying = 0

    def landed(self, tokens: int) -> None:
        """So many tokens of answers have arrived from the decoder."""
        if self._checks:
            return
        self.tokens["decode"] += tokens
        if self.call is not None:
            self.call.tick()

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Inside the block forward passes are those of a check: no token of them counts."""
        before = self._phase
        self.switch("checks")
        self._checks = True
        try:
            yield
        finally:
            self._checks = False
            self.switch(before)


class Call:
    """The progress of one call of lm-eval's.

    Time left is the tokens left of each phase times the seconds that a token of it has taken in this call, so it is
    known once a token of every phase that is left was read. How long answers get is not known before they are made:
    those that are left are taken to be as long, measured by their limits, as those that were given. The longest prompts
    come first, and attention takes longer the longer they are: at first the estimate is rather too long.

    Args:
        kind: `loglikelihood`, `loglikelihood_rolling` or `generate_until`.
        total: requests.
        quiet: whether nothing is shown.
        stream: where the bar goes; standard error without it.
    """

    def __init__(self, clock: Clock, kind: str, total: int, quiet: bool = False, stream: TextIO | None = None):
        self.clock, self.kind, self.total = clock, kind, total
        self._of: Sequence[Hashable] = range(total)
        self._open: Counter[Hashable] = Counter(self._of)
        self._documents = total
        self._work: Mapping[int, tuple[int, int]] = {}
        self._planned, self._finished = [0, 0], [0, 0]
        clock.settle()
        self._begun = clock.now()
        self._seconds, self._tokens = dict(clock.seconds), dict(clock.tokens)
        #: Tokens of answers that are given, as they were read.
        self._credited = dict(clock.tokens)
        self._sparsity: dict[str, list[float]] = {}
        self._stats: Any = None
        self._share, self._reading = 0.0, 0
        self._bar = new_bar(kind, quiet, stream or sys.stderr)
        self._drawn, self._wait = self._begun, self._bar.first
        clock.call = self
        clock.shown |= not self._bar.disable

    # --- what happens ------------------------------------------------------------------------------------------

    def documents(self, of: Sequence[Hashable]) -> None:
        """Say which document each request is of: those are the samples that are shown."""
        self._of, self._open = of, Counter(of)
        self._documents = len(self._open)

    def reading(self, requests: Iterable[T]) -> Iterator[T]:
        """The requests, while their prompts are cut into tokens."""
        for request in requests:
            yield request
            self._reading += 1
            self.tick()
        self._reading = 0

    def expect(self, work: Mapping[int, tuple[int, int]]) -> None:
        """Say how many tokens requests will read, by index: of prompts (once where they share one), and of answers."""
        self._work = work
        self._planned = [sum(tokens[place] for tokens in work.values()) for place in (0, 1)]

    def answered(self, index: int, answer: Any = None, found: bool = False) -> None:
        """A request is answered. `found`: nothing was read for it, another run made it."""
        document = self._of[index]
        self._open[document] -= 1
        if self._open[document] == 0:
            self.clock.samples += 1
        stats = stats_of(answer)
        if stats and stats is not self._stats:  # requests that share a prompt share theirs
            self._stats = stats
            for name, value in (stats.get("sparsities") or {"sparsity": stats.get("sparsity")}).items():
                if value is not None:
                    self._sparsity.setdefault(name, []).append(value)
        self.clock.switch("rest")
        if index in self._work and found:  # the rest tells how fast the run is
            for place, tokens in enumerate(self._work[index]):
                self._planned[place] -= tokens
        elif index in self._work:
            self._credited = dict(self.clock.tokens)
            for place, tokens in enumerate(self._work[index]):
                self._finished[place] += tokens
        self.tick()

    def tick(self) -> None:
        """Draw, unless that was done a moment ago."""
        now = self.clock.now()
        if now - self._drawn < self._wait or self._bar.disable:
            return
        self._drawn, self._wait = now, self._bar.every
        self.clock.settle()
        self._bar.show(self.share(), self.text())

    def close(self) -> None:
        """The call has ended."""
        self.clock.switch("rest")
        self.clock.call = None
        if not self._bar.disable:
            self._bar.show(self.share(), self.text())
            self._bar.close()

    # --- what is shown -----------------------------------------------------------------------------------------

    def _flown(self) -> list[int]:
        """Tokens read for answers that are not given yet."""
        return [self.clock.tokens[phase] - self._credited[phase] for phase in ("prefill", "decode")]

    def share(self) -> float:
        """How much of the work is done, in [0, 1]; it never falls."""
        if any(self._planned):
            left = [planned - done for planned, done in zip(self._planned, self._finished, strict=True)]
            flown = map(min, self._flown(), left)
            prompts, answers = (sum(pair) for pair in zip(self._finished, flown, strict=True))
            weight = self._weight()
            done, total = prompts + weight * answers, self._planned[0] + weight * self._planned[1]
            self._share = max(self._share, done / total)
        elif self._documents:
            self._share = max(self._share, self.samples / self._documents)
        return self._share

    def _weight(self) -> float:
        """How many tokens of prompts take as long as one of an answer."""
        prompts, answers = (self._pace(phase) for phase in ("prefill", "decode"))
        return answers / prompts if prompts and answers else WEIGHT

    def _pace(self, phase: str) -> float | None:
        """Seconds that a token of a phase has taken in this call."""
        read = self.clock.tokens[phase] - self._tokens[phase]
        return (self.clock.seconds[phase] - self._seconds[phase]) / read if read else None

    @property
    def samples(self) -> int:
        """Documents of which all requests are answered."""
        return sum(not left for left in self._open.values())

    def speed(self) -> float | None:
        """Tokens of prompts and answers that were read in a second, of those in which tokens were read."""
        tokens = sum(self.clock.tokens.values()) - sum(self._tokens.values())
        seconds = sum(self.clock.seconds[phase] - self._seconds[phase] for phase in self.clock.tokens)
        return tokens / seconds if tokens and seconds > 0 else None

    def left(self) -> float | None:
        """Seconds that the rest of the call will take, as far as can be told."""
        if not any(self._planned):
            return None
        given = self._credited["decode"] - self._tokens["decode"]
        length = given / self._finished[1] if self._finished[1] else 1.0
        seconds = 0.0
        for place, phase in enumerate(("prefill", "decode")):
            planned = self._planned[place] - self._finished[place]
            left = planned * (min(1.0, length) if place else 1.0) - self._flown()[place]
            if planned <= 0 or left <= 0:
                continue
            pace = self._pace(phase)
            if pace is None:
                return None
            seconds += left * pace
        return seconds

    def text(self) -> str:
        """What is shown beside the bar."""
        elapsed = tqdm.format_interval(self.clock.now() - self._begun)
        if self._reading:
            return f"reading prompts {self._reading}/{self.total} [{elapsed}]"
        left, speed = self.left(), self.speed()
        remaining = "?" if left is None else tqdm.format_interval(left)
        rate = "?" if speed is None else f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"
        facts = [f"{elapsed}<{remaining}", f"{rate} tokens/s"]
        means = {name: sum(values) / len(values) for name, values in self._sparsity.items()}
        if means:
            phases = (
                f"{name.removesuffix('sparsity').rstrip('_')} {value:.2f}".strip() for name, value in means.items()
            )
            facts.append(f"sparsity {', '.join(phases)}")
        return f"{self.samples}/{self._documents} samples [{', '.join(facts)}]"


class Bar(tqdm):
    """A bar in a terminal, with a text of ours."""

    first = every = DRAW

    def __init__(self, kind: str, stream: TextIO, **options: Any):
        self.text = ""
        shape = "{desc}: {percentage:3.0f}%|{bar}| {text}"
        super().__init__(total=1.0, desc=kind, file=stream, bar_format=shape, dynamic_ncols=True, **options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """As tqdm's, with the text."""
        return {**super().format_dict, "text": self.text}

    def show(self, share: float, text: str) -> None:
        """Draw `share` of the bar, and the text."""
        self.n, self.text = share, text
        self.refresh()


class Lines:
    """Lines in place of a bar, for files and pipes: no control characters, and not many of them."""

    first, every = FIRST_LINE, LINES

    def __init__(self, kind: str, stream: TextIO, disable: bool = False):
        self.kind, self.stream = kind, stream
        self.disable = disable or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")

    def show(self, share: float, text: str) -> None:
        """Write a line."""
        print(f"{self.kind}: {share:4.0%} {text}", file=self.stream, flush=True)

    def close(self) -> None:
        """Nothing is left open."""


def new_bar(kind: str, quiet: bool, stream: TextIO) -> Bar | Lines:
    """A bar in a terminal, lines elsewhere; nothing where `quiet`, or where tqdm is told to be (`TQDM_DISABLE=1`)."""
    return (Bar if is_terminal(stream) else Lines)(kind, stream, **({"disable": True} if quiet else {}))


def is_terminal(stream: Any) -> bool:
    """Whether a stream ends in a terminal that has a size: some pseudo-terminals have none, and tqdm draws nothing."""
    if not getattr(stream, "isatty", lambda: False)():
        return False
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError, AttributeError):  # no file behind it
        return True


def documents_of(requests: Sequence[Any]) -> list[Hashable]:
    """The document of each request; those that say none are one by themselves."""
    found: list[Hashable] = []
    for index, request in enumerate(requests):
        task, document = request.task_name, request.doc_id
        found.append(index if task is None or document is None else (task, document))
    return found


__all__ = ["PHASES", "Call", "Clock", "documents_of"]
