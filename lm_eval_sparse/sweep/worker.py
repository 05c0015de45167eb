"""A process that runs cells, seen from outside: started, asked, watched, stopped. Knows its protocol only.

The process reads lines of JSON, each an id and arguments of lm-eval's command line, and answers each with one. It keeps
a model's weights from one cell to the next, and ends when what it reads from is closed: nobody leaves it behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import one_line

#: What runs cells. Another program with the same protocol may stand in for it.
COMMAND = (sys.executable, "-m", "lm_eval_sparse.cli.worker")
#: Bytes of a log that are read to say how a process ended.
_TAIL = 4096
#: Seconds that a process has to end by itself.
_PATIENCE = 10.0


@dataclass(frozen=True)
class Answer:
    """What came of a cell.

    Attributes:
        kind: `ok`, `user` (what was asked for cannot work), `memory`, `device` (the process is of no use any more),
            `died` (it is gone), or `error`.
        seconds: how long it took. `why`, `trace`: of a failure.
    """

    kind: str
    seconds: float = 0.0
    why: str = ""
    trace: str = ""


class Worker:
    """One such process.

    Args:
        command: program and arguments.
        environment: variables beside those of this process, such as `CUDA_VISIBLE_DEVICES`.
        log: file that gets what it prints.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            # A group of its own, so that children of it can be ended with it.
            self.process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream,
                env={**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip
        self._write = threading.Lock()

    def run(self, address: str, argv: Sequence[str]) -> Answer:
        """Run a cell, and wait for it."""
        try:
            self._send({"id": address, "argv": list(argv)})
            while (answer := self._receive()) is not None:
                if answer.get("id") == address:
                    return _answer(answer)
        except OSError:
            pass
        return Answer("died", why=self._how_it_ended())

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with self._write:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def _receive(self) -> dict[str, Any] | None:
        """The next line that is an answer; None when there are no more."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                if isinstance(found := json.loads(line), dict):
                    return found
        return None

    def _how_it_ended(self) -> str:
        try:
            status = self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            return "its process closed its end and goes on"
        how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
        said = ""
        with contextlib.suppress(OSError), self.log.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL))
            lines = stream.read().decode(errors="replace").strip().splitlines()
            said = f"; its last words: {lines[-1][-300:]}" if lines else ""
        return one_line(f"its process ended {how}{said} ({self.log} has all of them)")

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """End the process and what it has started."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_PATIENCE)
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill(self) -> None:
        """End it now."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)


def _answer(found: Mapping[str, Any]) -> Answer:
    seconds = found.get("seconds")
    seconds = float(seconds) if isinstance(seconds, int | float) else 0.0
    if found.get("ok") is True:
        return Answer("ok", seconds)
    kind = found.get("kind")
    return Answer(
        kind if kind in ("user", "memory", "device") else "error", seconds, one_line(str(found.get("error", "?"))),
        str(found.get("trace", "")),
    )  # fmt: skip
