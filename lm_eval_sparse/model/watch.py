"""Notices that a process of an evaluation is gone, and ends the others: they would compute for hours, and then wait.

Each process keeps a connection to the first one. The system closes it when a process dies, however it dies, and
keep-alive packets find out where a whole host is gone. Knows nothing of torch; what is evaluated is not its business.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .. import endings
from ..errors import PROGRAM, UserError, one_line

if TYPE_CHECKING:
    from .parallel import Place

#: Seconds within which all have connected.
_CONNECT = 60
#: Seconds within which one that has connected says who it is.
_HELLO = 5
#: Seconds for a process to end by its own error, such as the one that another has just told of: it says more.
_OWN_WORDS = 5.0
#: Seconds without a sign after which the system asks, between its questions, and how many may stay without answer.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
_TOKEN = 32
_LONGEST = 1 << 14

_DONE, _FAILED, _GONE = "done", "failed", "gone"


class Watch:
    """From its beginning to its end no process may go away.

    Ends without a word in a process that gets to the end. One that raises tells the others why. Where one is gone, or
    has told, the others print a line and end with status 1.

    Args:
        place: which process this is.
        exchange: gives what every process gives it, by rank (a collective).
        end: ends this process after the line it is given; for tests.
    """

    def __init__(self, place: Place, exchange: Callable[[Any], list[Any]], end: Callable[[str], None] | None = None):
        self._place, self._exchange, self._end = place, exchange, end or _end
        self._links: dict[int, socket.socket] = {}
        self._names: list[str] = []
        self._reason: str | None = None
        self._over, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def reason(self, wait: float = 1.0) -> str | None:
        """Why another process has ended, if that is known, or will be in so many seconds."""
        until = time.monotonic() + wait
        while self._reason is None and time.monotonic() < until:
            time.sleep(0.02)
        return self._reason

    def __enter__(self) -> Watch:
        mine = {"name": f"process {os.getpid()} on {socket.gethostname()}"}
        server = None
        try:
            if self._place.rank == 0:
                server = socket.create_server(("127.0.0.1" if self._place.one_host else "", 0))
                server.settimeout(_CONNECT)
                mine |= {"port": server.getsockname()[1], "token": secrets.token_hex(_TOKEN // 2)}
            all_ = self._exchange(mine)
            self._names = [one["name"] for one in all_]
            if server is not None:
                self._accept(server, mine["token"])
            else:
                host = "127.0.0.1" if self._place.one_host else os.environ["MASTER_ADDR"]
                link = self._links[0] = socket.create_connection((host, all_[0]["port"]), timeout=_CONNECT)
                link.sendall(f"{all_[0]['token']}{self._place.rank:08d}".encode())
        except (OSError, KeyError) as error:
            raise UserError(
                f"process {self._place.rank} of {self._place.world_size} cannot reach the first one ({error}): "
                "processes have to reach the host in MASTER_ADDR at any port"
            ) from error
        finally:
            if server is not None:
                server.close()
        for link in self._links.values():
            link.settimeout(None)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                if hasattr(socket, option):
                    link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._thread = threading.Thread(target=self._look, name="lm-eval-sparse-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        how, why = (_DONE, "") if error is None else (_FAILED, one_line(str(error)) or type(error).__name__)
        self._tell(how, self._place.rank, why)
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_WR)  # so that what was told arrives
        self._closed.set()
        if error is None and self._place.rank and self._thread is not None:
            # The first is still to read what this one has sent it, which a process that ends may take with it.
            self._thread.join()

    def _accept(self, server: socket.socket, token: str) -> None:
        """Take the connections of all others. Whoever does not know the token is none of them."""
        until = time.monotonic() + _CONNECT
        while len(self._links) < self._place.world_size - 1:
            if time.monotonic() > until:
                raise OSError("timed out")
            link, _ = server.accept()
            link.settimeout(_HELLO)
            with contextlib.suppress(OSError, ValueError, TypeError):
                said = link.recv(_TOKEN + 8, socket.MSG_WAITALL).decode()
                if hmac.compare_digest(said[:_TOKEN], token):
                    self._links[int(said[_TOKEN:])] = link
                    continue
            link.close()

    def _tell(self, how: str, rank: int, why: str) -> None:
        line = json.dumps({"how": how, "rank": rank, "why": why[:2000]}).encode() + b"\n"
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.sendall(line)

    def _look(self) -> None:
        """Read what the others tell, in a thread, until all are done or one is gone."""
        with selectors.DefaultSelector() as selector:
            heard = {}
            for rank, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, rank)
                heard[rank] = b""
            while selector.get_map():
                for key, _ in selector.select():
                    rank = key.data
                    try:
                        more = key.fileobj.recv(_LONGEST)  # type: ignore[union-attr]
                    except OSError:
                        more = b""
                    heard[rank] = (heard[rank] + more)[-_LONGEST:]
                    *lines, heard[rank] = heard[rank].split(b"\n")
                    told = [self._told(line) for line in lines]
                    bad = [one for one in told if one is not None and one["how"] != _DONE]
                    if not bad and not more and not any(told):
                        bad = [{"how": _GONE, "rank": rank, "why": ""}]
                    if bad:
                        self._bad(**bad[0])
                        return
                    if any(told) or not more:  # done: it may go
                        selector.unregister(key.fileobj)
        self._closed.wait()
        for link in self._links.values():
            link.close()

    @staticmethod
    def _told(line: bytes) -> dict[str, Any] | None:
        try:
            told = json.loads(line)
            return {"how": str(told["how"]), "rank": int(told["rank"]), "why": str(told["why"])}
        except (ValueError, TypeError, KeyError):
            return None

    def _bad(self, how: str, rank: int, why: str) -> None:
        who = f"process {rank} of {self._place.world_size} ({self._names[rank]})"
        if how == _FAILED:
            self._reason = f"{who} has stopped: {why}"
        else:
            self._reason = f"{who} is gone: it was killed, ran out of memory, or its host is down"
        if self._place.rank == 0:
            self._tell(how, rank, why)
        if how == _FAILED and self._over.wait(_OWN_WORDS):
            return
        if not self._over.is_set():
            kept = endings.kept() or "no results were saved"
            self._end(f"{self._reason}; {kept}")


def _end(line: str) -> None:
    """Print a line and end this process, whatever it is doing: its own threads may wait for what never comes."""
    print(f"{PROGRAM}: error: {one_line(line)}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(1)


__all__ = ["Watch"]
