"""Run what calls the code of a task's author so that nothing it does is taken for success.

Such code may end the process (`sys.exit`, `os._exit`, a crash of a library), close or replace stdout, print, and leave
threads running. So it runs in a child process, which reports to this one; that it ended is not enough. Where a process
cannot be split (Windows; one with threads, such as torch has), it runs here, and only exceptions are caught.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TextIO

from ..errors import UserError
from ..output import say
from ..results.files import why

#: Seconds that a child gets to clean up after it was told to end.
_PATIENCE = 5.0
#: Signals that end a process unless it says otherwise.
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_ENDED = 70  # the child's own exit status says nothing


class Ended(Exception):
    """The child ended without a report. The message says how, `last` is what it noted last."""

    def __init__(self, how: str, last: Any):
        super().__init__(how)
        self.last = last


class Progress:
    """What the work notes of itself, `note`, and where it prints, `say`, whatever becomes of stdout."""

    def __init__(self, stream: TextIO | None, pipe: int | None = None):
        self._stream, self._pipe = stream, pipe

    def note(self, what: Any) -> None:
        """Remember `what`, a JSON value, in case the process ends."""
        if self._pipe is not None:
            _send(self._pipe, {"note": what})

    def say(self, text: str) -> None:
        """Print a line of the report. Raises `UserError` when that is not possible."""
        if self._stream is not None:
            say(text, self._stream)


def run(work: Callable[[Progress], int]) -> int:
    """`work(progress)`: its exit status. What it prints by itself goes to stderr; only `Progress.say` to stdout.

    Raises:
        UserError: as `work` did.
        Ended: the process in which it ran ended before it was done.
    """
    if not _can_split():
        stream = sys.stdout
        with _interrupts(), contextlib.redirect_stdout(sys.stderr):
            return work(Progress(stream))
    with tempfile.TemporaryDirectory(prefix="lm-eval-sparse-", ignore_cleanup_errors=True) as folder, _signals():
        sys.stdout.flush()
        receive, send = os.pipe()
        # A signal waits until either process can tell which of the two it is.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        child = os.fork()
        if child == 0:
            os.close(receive)
            _in_child(work, send, folder, before)
        try:
            os.close(send)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            _, status = os.waitpid(child, 0)
        except BaseException:
            _end(child)
            raise
        finally:
            said = _received(receive)
    return _outcome(said, status)


def _can_split() -> bool:
    try:
        sys.stdout.fileno()  # what a child writes into memory is lost
    except (AttributeError, OSError, ValueError):
        return False
    return hasattr(os, "fork") and threading.active_count() == 1 and "torch" not in sys.modules


#: Whether Ctrl-C was typed, which code of others cannot do by raising KeyboardInterrupt.
_typed = {"interrupt": False}


def was_interrupted() -> bool:
    """Whether a KeyboardInterrupt is the user's."""
    return _typed["interrupt"]


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Tell a Ctrl-C from a KeyboardInterrupt that code of others raises."""

    def interrupted(*_: Any) -> NoReturn:
        _typed["interrupt"] = True
        raise KeyboardInterrupt

    _typed["interrupt"] = False
    here = threading.current_thread() is threading.main_thread()
    ours = here and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_child(work: Callable[[Progress], int], pipe: int, folder: str, mask: Iterable[int]) -> NoReturn:
    """Do the work, send the outcome, and end this process, whatever threads and clean-ups the author's code left."""
    try:
        for number in _ENDING:
            if callable(signal.getsignal(number)) and number != signal.SIGINT:  # what is ignored stays so
                signal.signal(number, signal.SIG_DFL)
        me = os.getpid()
        tempfile.tempdir = os.environ["TMPDIR"] = folder  # what is left there vanishes with it
        stream = _own_stdout()
        with _interrupts():
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            try:
                outcome: dict[str, Any] = {"status": work(Progress(stream, pipe))}
            except UserError as error:
                outcome = {"error": str(error)}
            except BaseException as error:
                outcome = {"interrupt": True} if was_interrupted() else {"bug": f"{type(error).__name__}: {why(error)}"}
        if os.getpid() == me:  # the author's code may have split the process once more
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stderr.flush()
            _send(pipe, outcome)
    finally:
        os._exit(_ENDED)


def _own_stdout() -> TextIO | None:
    """Stdout for the report alone; what else is written there goes to stderr from now on, also by other programs."""
    if sys.stdout is None:
        return None
    try:
        own = os.dup(sys.stdout.fileno())
        os.dup2(2, sys.stdout.fileno())
    except (OSError, ValueError):  # in memory, or without a stderr
        return sys.stdout
    encoding = sys.stdout.encoding
    sys.stdout = sys.stderr
    return io.TextIOWrapper(os.fdopen(own, "wb"), encoding=encoding, write_through=True)


def _send(pipe: int, message: dict[str, Any]) -> None:
    os.write(pipe, json.dumps(message).encode() + b"\n")


def _received(pipe: int) -> list[dict[str, Any]]:
    """The child's messages. Others may still hold the pipe open, so its end is not waited for."""
    os.set_blocking(pipe, False)
    parts: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while part := os.read(pipe, 1 << 16):
            parts.append(part)
    os.close(pipe)
    found = []
    for line in b"".join(parts).splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let signals that would end this process at once be exceptions instead, so that it can clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ending(number: int, _: Any) -> NoReturn:
        raise SystemExit(128 + number)  # on whose way the child is ended

    default = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in default:
        signal.signal(number, ending)
    try:
        yield
    finally:
        for number in default:
            signal.signal(number, signal.SIG_DFL)


def _end(child: int) -> None:
    """End the child: asked first, then not."""
    with contextlib.suppress(OSError):  # it has ended
        os.kill(child, signal.SIGTERM)
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            if os.waitpid(child, os.WNOHANG)[0]:
                return
            time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _outcome(said: list[dict[str, Any]], status: int) -> int:
    last = said[-1] if said else {}
    if "status" in last:
        return int(last["status"])
    if "error" in last:
        raise UserError(last["error"])
    if "interrupt" in last:
        raise KeyboardInterrupt
    if "bug" in last:
        raise RuntimeError(last["bug"])
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        names = {member.value: member.name for member in signal.Signals}
        how = f"by the signal {names.get(number, number)}"
    else:
        how = f"with exit status {os.WEXITSTATUS(status)}"
    raise Ended(f"the task's code ended the process {how}", last.get("note"))
