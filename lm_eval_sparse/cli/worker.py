"""The process in which a sweep runs its cells: lm-eval's command line, one after the other, in one process.

It is started as `python -m lm_eval_sparse.cli.worker` and talks in lines of JSON. It says `{"ready": true, "pid": ...,
"device": ...}`, then reads requests `{"id": ..., "argv": [...]}` from its standard input, with the arguments of a
command line, and answers each with `{"id": ..., "ok": true, "seconds": ...}` or with `{"id": ..., "ok": false, "kind":
..., "error": ...}`. `kind` is

- `user` for a mistake in what was typed, in one line;
- `memory` where memory ran out;
- `device` where the device cannot be used by this process any more: it ends with status `UNUSABLE`;
- `error` for anything else; the end of its traceback stands in `trace`.

What a cell leaves in the process is undone before the next one, so that results are those of a process of its own; its
model stays loaded while the next one needs the same (`model.kept`). The answers go to what was standard output;
whatever else is printed goes to standard error. When standard input ends, so has the parent, and the process with it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import queue
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from lm_eval_sparse import endings
from lm_eval_sparse.errors import UserError, one_line

from . import harness

#: Exit status of a worker whose device is of no use to it any more: the parent starts another one.
UNUSABLE = 75
#: Lines of a traceback that are told.
TRACE = 40
#: Seconds that a worker which is told to end may take for cleaning up.
GRACE = 1.0
#: What errors say after which a process can do nothing more on its device.
_BROKEN = (
    "CUDA error", "cuBLAS", "CUBLAS_STATUS", "cuDNN error", "CUDNN_STATUS", "illegal memory access", "NCCL error",
)  # fmt: skip
#: Errors that name the device, and say only that memory ran out.
_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def main(argv: Sequence[str] | None = None) -> int:
    """Run requests until standard input ends. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lm_eval_sparse.cli.worker")
    parser.add_argument(
        "--share-prefill", type=int, metavar="BYTES",
        help="of beginnings of prompts that are kept for the next cells; 0 for none (default: half of what is free)",
    )  # fmt: skip
    limit = parser.parse_args(argv).share_prefill
    requests, answers = _take_channels()
    _end_when_told()
    try:
        return _serve(requests, answers, limit)
    except KeyboardInterrupt as ended:
        return endings.status(ended)


def _serve(requests: queue.SimpleQueue[bytes], answers: TextIO, limit: int | None) -> int:
    from lm_eval_sparse import patches

    patches.install()
    import torch

    from lm_eval_sparse.model import kept, lm  # noqa: F401 (what every cell needs)
    from lm_eval_sparse.model.report import device_name

    def tell(**said: Any) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with kept.keeping(limit) as keeper, _index_kept():
        gc.collect()
        gc.freeze()  # what is imported by now stays, and need not be looked through after every cell
        tell(ready=True, pid=os.getpid(), device=device_name(device))
        while True:
            request = _parsed(requests.get())
            if isinstance(request, str):
                tell(id=None, ok=False, kind="user", error=request)
                continue
            began = time.monotonic()
            failed = _run(request["argv"])
            if failed is not None and failed["kind"] == "memory" and keeper.shelf.clear():
                keeper.settle()  # a process of its own would have had that memory
                failed = _run(request["argv"])
            if failed is not None and failed["kind"] == "device":
                tell(id=request["id"], ok=False, **failed)
                return UNUSABLE
            keeper.settle()
            seconds = round(time.monotonic() - began, 3)
            tell(id=request["id"], **({"ok": True, "seconds": seconds} if failed is None else {"ok": False, **failed}))


def _run(argv: list[str]) -> dict[str, str] | None:
    """Run a cell; see `_failure`."""
    with _undone():
        return _failure(lambda: harness.run(argv))


def _parsed(line: bytes) -> dict[str, Any] | str:
    """A request, or what is wrong with it."""
    try:
        request = json.loads(line)
    except ValueError as error:
        return f"a request is no JSON ({error})"
    argv = request.get("argv") if isinstance(request, dict) else None
    if not isinstance(argv, list) or not argv or not all(isinstance(part, str) for part in argv) or "id" not in request:
        return 'a request is {"id": ..., "argv": [...]}, with the arguments of a command line'
    return request


# --- how a cell ends ---------------------------------------------------------------------------------------------


def _failure(run: Callable[[], Any]) -> dict[str, str] | None:
    """What is answered where `run` fails; None where it does not."""
    endings.keep(None)
    try:
        run()
    except SystemExit as ended:
        if endings.stopped():  # by a signal, and the evaluation has said so
            raise
        if ended.code in (None, 0):
            return None
        return {"kind": "user", "error": one_line(f"it ended with status {ended.code}")}
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        kind, lines = kind_of(error), traceback.format_exc().splitlines()
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        found = {"kind": kind, "error": one_line(said)}
        # Frames hold tensors and the model; nothing of them is to stay.
        traceback.clear_frames(error.__traceback__)
        if kind == "error":
            found["trace"] = "\n".join(map(one_line_kept, lines[-TRACE:]))
        return found
    return None


def one_line_kept(line: str) -> str:
    """A line of a traceback without secrets and control characters; its indentation stays."""
    return line[: len(line) - len(line.lstrip())] + one_line(line)


def kind_of(error: BaseException) -> str:
    """What an error means for the cells behind it; see the module."""
    from lm_eval_sparse.runtime.memory import out_of_memory

    chain = list(_causes(error))
    full = [out_of_memory(each) or isinstance(each, MemoryError) or _says(each, _FULL) for each in chain]
    if any(_is_broken(each) and not fits for each, fits in zip(chain, full, strict=True)) or not _device_answers():
        return "device"
    if any(full):
        return "memory"
    return "user" if isinstance(error, UserError) else "error"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_broken(error: BaseException) -> bool:
    import torch

    accelerator = getattr(torch, "AcceleratorError", None)
    if accelerator is not None and isinstance(error, accelerator):
        return True
    return isinstance(error, RuntimeError) and _says(error, _BROKEN)


def _says(error: BaseException, words: Iterable[str]) -> bool:
    return any(word in str(error) for word in words)


def _device_answers() -> bool:
    """Whether the device still does what it is asked."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception:  # whatever it is, nothing can be run here
            return False
    return True


# --- what a cell leaves ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _undone() -> Iterator[None]:
    """What a command line may change in its process is as before behind the block: no cell is to see another."""
    import numpy
    import torch

    environment, folder, path = dict(os.environ), os.getcwd(), list(sys.path)
    drawn = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    dtype, threads, filters = torch.get_default_dtype(), torch.get_num_threads(), list(warnings.filters)
    grad, out, err = torch.is_grad_enabled(), sys.stdout, sys.stderr
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[:] = path
        random.setstate(drawn[0])
        numpy.random.set_state(drawn[1])
        torch.set_rng_state(drawn[2])
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        warnings.filters[:] = filters
        torch.set_grad_enabled(grad)
        sys.stdout, sys.stderr = out, err


@contextlib.contextmanager
def _index_kept() -> Iterator[None]:
    """Read the tasks of installed packages once: lm-eval parses thousands of files at every start.

    Folders that a command line names are read every time, and tasks of later folders replace those of earlier ones with
    a warning, as in lm-eval.
    """
    import functools
    import logging

    import lm_eval.tasks
    from lm_eval.tasks import manager

    from lm_eval_sparse.paths import task_folders

    log, index = logging.getLogger("lm_eval.tasks._index"), getattr(manager, "TaskIndex", None)
    if index is None or not callable(original := getattr(index, "build", None)):
        yield
        return
    lasting = {str(Path(lm_eval.tasks.__file__).parent), *map(str, task_folders())}
    known: dict[str, dict[str, Any]] = {}

    @functools.wraps(original)
    def build(paths: Iterable[Path], **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for root in paths:
            own = known.get(str(root)) if not options else None
            if own is None:
                own = original([root], **options)
                if str(root) in lasting and not options:
                    known[str(root)] = own
            for name, entry in own.items():
                if name in found:
                    log.warning(
                        "Task '%s' from %s overrides existing task from %s",
                        name, entry.yaml_path, found[name].yaml_path,
                    )  # fmt: skip
                found[name] = entry
        return found

    index.build = staticmethod(build)
    try:
        yield
    finally:
        index.build = staticmethod(original)


# --- the parent --------------------------------------------------------------------------------------------------


def _take_channels() -> tuple[queue.SimpleQueue[bytes], TextIO]:
    """Requests as they come, and where answers go. Neither is in the reach of code that prints or reads."""
    source = os.dup(0)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdout.flush()
    os.dup2(2, 1)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        with os.fdopen(source, "rb") as stream:
            for line in stream:
                if line.strip():
                    requests.put(line)
        os._exit(0)  # nobody would hear of what is not done; files of results are there whole, or not at all

    threading.Thread(target=read, name="requests", daemon=True).start()
    return requests, answers


def _end_when_told() -> None:
    """Let SIGTERM and SIGINT end the process: by an exception, or at once where a long call leaves no room for one.

    Python's own handlers run between two calls of the main thread, and cells have calls that take minutes. Processes
    that a cell forks (lm-eval's pool for standard errors) get signals of their own, which are none to this one.
    """
    numbers = signal.SIGTERM, signal.SIGINT
    told, write = os.pipe()
    os.set_blocking(write, False)

    def stop(number: int, frame: Any) -> None:
        raise endings.Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def watch() -> None:
        while (number := os.read(told, 1)[0]) not in numbers:
            pass
        time.sleep(GRACE)
        os._exit(128 + number)

    masks = threading.local()

    def hold() -> None:
        masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.before)

    def forget() -> None:  # in a child, which would write to the pipe of its parent
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        release()

    for number in numbers:
        signal.signal(number, stop)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=forget)
    threading.Thread(target=watch, name="signals", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
