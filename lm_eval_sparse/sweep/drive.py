"""Runs cells of a ledger in processes of this machine, until none is left that can be run.

A slot is a place for one process: a GPU or a part of one, or some processors. A process has one model at a time; when
no cell of it is left the slot turns to another one. What a cell fails of is recorded and stops no other.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..results.files import why
from ..results.load import read
from ..results.schema import Record
from . import worker
from .cell import Cell, Documents, documents_of
from .ledger import Ledger
from .worker import Answer, Worker

#: How often a cell is tried whose process died or whose device failed: that may have been another's fault.
TRIES = 2
#: After these a process is not asked again: what is left of its memory is not known.
_SPENT = ("memory", "device", "died")


@dataclass(frozen=True)
class Slot:
    """A place for a process: `name` for its log, the variables that bind it to a device, and what it is told besides,
    such as how much of a device it may fill."""

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


class Queue:
    """Cells that are waiting. A slot is given what suits what it has: cells on the same documents first, whose prompts
    its process may have kept, then those of its model; and where others are not at work already."""

    def __init__(self, cells: Iterable[Cell]):
        self._waiting: dict[Documents, list[Cell]] = {}
        for cell in cells:
            self._waiting.setdefault(documents_of(cell), []).append(cell)
        self._order = {group: at for at, group in enumerate(self._waiting)}
        self._at: Counter[Documents] = Counter()
        self._lock = threading.Lock()

    def take(self, last: Cell | None) -> Cell | None:
        """The next cell for a slot whose last one was `last`; None when none is waiting."""
        with self._lock:
            group = None if last is None else documents_of(last)
            if group is not None and not self._waiting[group]:
                self._at[group] -= 1
                group = None
            if group is None:
                left = [name for name, cells in self._waiting.items() if cells]
                if not left:
                    return None
                slots = Counter(name[0] for name, many in self._at.items() for _ in range(many))
                group = min(
                    left,
                    key=lambda name: (
                        last is not None and name[0] != last.model, self._at[name], slots[name[0]], self._order[name],
                    ),
                )  # fmt: skip
                self._at[group] += 1
            return self._waiting[group].pop(0)

    def give_back(self, cell: Cell) -> None:
        with self._lock:
            self._waiting[documents_of(cell)].insert(0, cell)


@dataclass
class Outcome:
    """What became of the cells: how many are done, failed, and left to another process that is at them."""

    done: int = 0
    failed: int = 0
    elsewhere: int = 0


class Driver:
    """Runs cells.

    Args:
        ledger: where they are recorded.
        slots: one process each.
        command: what runs a cell, by default `worker.COMMAND`.
        keep_raw: whether lm-eval's own results are kept.
        told: is called with each cell that came to an end, and how.
    """

    def __init__(
        self,
        ledger: Ledger,
        slots: Sequence[Slot],
        *,
        command: Sequence[str] | None = None,
        keep_raw: bool = True,
        told: Callable[[Cell, Answer | None], None] = lambda cell, answer: None,
    ):
        self.ledger, self.slots, self.keep_raw, self.told = ledger, slots, keep_raw, told
        self.command = worker.COMMAND if command is None else command
        self._workers: dict[str, Worker] = {}
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._stopped: BaseException | None = None
        self.outcome = Outcome()

    def run(self, cells: Iterable[Cell]) -> Outcome:
        """Run all of them that are not done.

        Raises:
            UserError: the ledger cannot be written. What is recorded stays, and the next sweep goes on.
        """
        queue = Queue(cells)
        threads = [threading.Thread(target=self._serve, args=(slot, queue), daemon=True) for slot in self.slots]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        finally:
            self._end()
            for thread in threads:
                thread.join(30)
        if self._stopped is not None:
            raise self._stopped
        return self.outcome

    def _end(self) -> None:
        self._ending.set()
        with self._lock:
            for process in self._workers.values():
                process.kill()

    def _serve(self, slot: Slot, queue: Queue) -> None:
        """One slot, from the first cell to the last."""
        process: Worker | None = None
        last: Cell | None = None
        tries: dict[str, int] = defaultdict(int)
        try:
            while not self._ending.is_set() and (cell := queue.take(last)) is not None:
                with self.ledger.claim(cell.address) as ours:
                    if not ours:
                        self._count(cell, "elsewhere", None)
                        last = cell
                        continue
                    if self.ledger.is_done(cell.address):  # by another process, meanwhile
                        self._count(cell, "done", None)
                        last = cell
                        continue
                    if process is not None and (last is None or cell.model != last.model or not process.is_alive):
                        process.stop()
                        process = None
                    last = cell
                    if process is None:
                        process = self._start(slot)
                    answer = self._one(process, cell)
                    if self._ending.is_set():
                        return
                    tries[cell.address] += 1
                    again = answer.kind in ("device", "died") and tries[cell.address] < TRIES
                    if answer.kind != "ok" and not again:
                        self.ledger.fail(cell, answer.kind, answer.why, answer.trace, tries[cell.address])
                if answer.kind in _SPENT:
                    process.stop()
                    process = None
                if again:
                    queue.give_back(cell)
                else:
                    self._count(cell, "done" if answer.kind == "ok" else "failed", answer)
        except BaseException as error:  # noqa: B036 - of a thread, and raised in the one that waits
            self._stop(error)
        finally:
            if process is not None:
                process.kill() if self._ending.is_set() else process.stop()
                with self._lock:
                    self._workers.pop(slot.name, None)

    def _start(self, slot: Slot) -> Worker:
        process = Worker(
            (*self.command, *slot.arguments), slot.environment, self.ledger.folder / "logs" / f"{slot.name}.log"
        )
        with self._lock:
            self._workers[slot.name] = process
            if self._ending.is_set():
                process.kill()
        return process

    def _one(self, process: Worker, cell: Cell) -> Answer:
        """Run a cell and record what came of it."""
        place = self.ledger.work(cell)
        before = set(place.rglob("results_*.json"))
        answer = process.run(cell.address, cell.argv(str(place)))
        if answer.kind != "ok":
            return answer
        found = sorted(set(place.rglob("results_*.json")) - before, key=lambda path: path.name)
        if not found:
            return Answer("error", answer.seconds, "the run ended well and left no results", answer.trace)
        try:
            records = [_named(row, cell) for row in read([found[-1]])]
        except UserError as error:
            return Answer("error", answer.seconds, str(error))
        date = found[-1].stem.removeprefix("results_")
        raw = [path for path in found[-1].parent.iterdir() if path.is_file() and date in path.name]
        self.ledger.put(cell, records, answer.seconds, raw if self.keep_raw else ())
        if not self.keep_raw:
            for path in raw:
                path.unlink(missing_ok=True)
        return answer

    def _count(self, cell: Cell, name: str, answer: Answer | None) -> None:
        with self._lock:
            setattr(self.outcome, name, getattr(self.outcome, name) + 1)
            with contextlib.suppress(Exception):  # what is shown stops no run
                self.told(cell, answer)

    def _stop(self, error: BaseException) -> None:
        with self._lock:
            if self._stopped is None:
                self._stopped = (
                    UserError(
                        f"{self.ledger.folder} cannot be written ({why(error)}); make room, and run the sweep again"
                    )
                    if isinstance(error, OSError)
                    else error
                )
        self._end()


def _named(row: Record, cell: Cell) -> Record:
    """A record under the name that the grid gives its model, without where it lies on this machine."""
    return row.model_copy(
        update={
            "model": cell.model,
            "model_args": {**row.model_args, "pretrained": cell.model},
            "source": Path(row.source).name if row.source else row.source,
        }
    )


__all__ = ["Driver", "Outcome", "Slot"]
