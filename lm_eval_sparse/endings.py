"""How a command ends when it is stopped: one line that says what is kept and how to go on, and an exit status."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as what Ctrl-C raises: what cleans up after the one cleans up after the other."""


#: What is kept of the evaluation that a command line runs in this process, and how to go on; None when none does.
_kept: str | None = None
_stopped = False


def keep(kept: str | None) -> None:
    """Say what is kept of the evaluation that begins, or has come further, should it be stopped."""
    global _kept, _stopped
    _kept, _stopped = kept, False


def stop() -> None:
    """Say that a signal has ended the evaluation, so that the exit that follows is ours."""
    global _stopped
    _stopped = True


def stopped() -> bool:
    """Whether a signal has ended the evaluation."""
    return _stopped


def kept() -> str | None:
    """What `keep` was told last."""
    return _kept


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`, unless this process has decided otherwise."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    own = os.getpid()

    def raise_(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever asks twice does not want to wait
        if os.getpid() != own:  # a child that was forked meanwhile, such as a pool's, is ended as any other
            os.kill(os.getpid(), signal.SIGTERM)
            return
        raise Terminated

    signal.signal(signal.SIGTERM, raise_)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def line(error: KeyboardInterrupt) -> str:
    """What is said when `error` ended the command."""
    what = "terminated (SIGTERM)" if isinstance(error, Terminated) else "interrupted"
    return f"{what}: {_kept or 'nothing was written; type the same line to start again'}"


def status(error: KeyboardInterrupt) -> int:
    """The exit status of a command that `error` ended: 128 and the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
