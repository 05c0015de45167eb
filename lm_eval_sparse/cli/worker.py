"""A process that runs evaluations one after another, for a sweep. Weights stay from one to the next.

Lines of JSON on its standard input ask for one each: an `id`, and `argv`, arguments of lm-eval's command line. Each is
answered by a line on its standard output: `{"id", "ok": true, "seconds"}`, or `"ok": false` with `kind`, `error` (one
line) and `trace`. Kinds: `user`, what was asked for cannot work; `memory`, it ran out; `device`, the device has failed,
after which the process ends; `error`, anything else. What evaluations print goes to standard error.

The end of its input ends it at once, wherever it is: whoever asked is gone. Results are written whole or not at all.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

from lm_eval_sparse.errors import UserError, one_line
from lm_eval_sparse.results.files import why

from . import harness

#: The exit status after a device has failed.
SPENT = 75
#: Lines of a traceback that are told.
_LINES = 40
#: What torch says of a device that no later call in this process can use.
_DEVICE = ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "CUDNN_STATUS", "device-side assert", "misaligned address")


def main() -> int:
    """Answer until there is nothing more to read."""
    answers = _answers()
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    from lm_eval_sparse import patches

    patches.install()
    import torch

    from lm_eval_sparse.model import kept

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    _say(answers, {"ready": True, "pid": os.getpid(), "device": device})
    with kept.keeping():
        while True:
            message = json.loads(asked.get())
            answer = run(message["argv"])
            _say(answers, {"id": message["id"], **answer})
            if answer.get("kind") == "device":
                return SPENT


def _answers() -> TextIO:
    """Where answers go: the standard output this process was given, which nothing else is written to from now on."""
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return own


def _listen(asked: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        asked.put(line)
    os._exit(0)


def _say(stream: TextIO, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def run(argv: list[str]) -> dict[str, Any]:
    """One evaluation, as the command line runs it; returns what is answered."""
    begin = time.perf_counter()
    try:
        with _tidied():
            harness.run(argv)
        found: dict[str, Any] = {"ok": True}
    except SystemExit as ended:
        found = {
            "ok": not ended.code,
            "kind": "error",
            "error": f"the evaluation ended itself with status {ended.code}",
        }
        if found["ok"]:
            found = {"ok": True}
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:  # of tasks, models and methods of any kind
        found = {"ok": False, "kind": kind_of(error), "error": one_line(f"{_named(error)}{why(error)}")}
        if found["kind"] in ("error", "device"):
            lines = traceback.format_exception(error)
            found["trace"] = "\n".join("".join(lines).splitlines()[-_LINES:])
    return {**found, "seconds": time.perf_counter() - begin}


@contextlib.contextmanager
def _tidied() -> Iterator[None]:
    """What an evaluation leaves in memory is gone before the next one."""
    try:
        yield
    finally:
        gc.collect()


def _named(error: BaseException) -> str:
    return "" if isinstance(error, UserError) else f"{type(error).__name__}: "


def kind_of(error: BaseException) -> str:
    """`memory`, `device`, `user` or `error`, by an error and what it came of."""
    from lm_eval_sparse.runtime.memory import out_of_memory

    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    if any(isinstance(one, Exception) and out_of_memory(one) for one in chain):
        return "memory"
    if any(type(one).__name__ == "AcceleratorError" or any(text in str(one) for text in _DEVICE) for one in chain):
        return "device"
    return "user" if isinstance(error, UserError) else "error"


if __name__ == "__main__":
    sys.exit(main())
