"""Runs the table of bad command lines (`attack_rows`) and says of each row how it went.

    python -m tests.attacks [--area AREA] [--name PART] [--log FILE.jsonl] [--real] [--slow]

Rows run in this process, as `lm_eval_sparse.cli.app.main` is called by the script, without lm-eval's thousands of own
tasks; `--real` runs every twentieth as a process of its own. To measure another version of the package, run this file
by its path with that version first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import faulthandler
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
for _name, _value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(_name, _value)

from attack_rows import LEGAL, REFUSED, REPORTED, Row, table  # noqa: E402

PREFIX = "lm-eval-sparse: error: "
#: Seconds a row may take.
LIMIT = 20.0
#: Bytes the runner may take: a file without end shows as a MemoryError then.
MEMORY = 6 << 30
#: How a row went; the first three are right where the verdict says so.
OUTCOMES = (
    "refused", "legal", "traceback", "badly refused", "accepted", "refused wrongly", "written", "leaked", "hang"
)  # fmt: skip
#: Printed where an exception was not caught: a traceback's head, or the last line of one.
_TRACEBACK = re.compile(r"^Traceback \(most recent call last\)|^[\w.]*(?:Error|Exception|Interrupt)\b: ", re.MULTILINE)


class Hang(BaseException):
    """A row took longer than it may."""


class Fetched(BaseException):
    """A row went for the embedded model: no mistake of that row was found before."""


@dataclass(frozen=True)
class Outcome:
    """How a row went: one of `OUTCOMES`, whether that is right, and what is wrong otherwise."""

    row: Row
    kind: str
    right: bool
    why: str = ""
    status: int | None = None
    seconds: float = 0.0
    message: str = ""

    def record(self) -> dict[str, Any]:
        """For the log."""
        return {
            "area": self.row.area, "name": self.row.name, "verdict": self.row.verdict, "outcome": self.kind,
            "right": self.right, "why": self.why, "status": self.status, "seconds": round(self.seconds, 2),
            "message": self.message, "doubt": self.row.doubt,
        }  # fmt: skip


@dataclass(frozen=True)
class Shared:
    """What rows share, made once, by the words of `attack_rows.WORDS`."""

    words: dict[str, str]

    @classmethod
    def make(cls, folder: Path) -> Shared:
        from attack_rows.shared import make

        return cls({name: str(path) for name, path in make(folder).items()})

    def filled(self, text: str, **more: Path) -> str:
        """`text` with the words in angle brackets replaced."""
        for name, path in {**self.words, **more}.items():
            text = text.replace(f"<{name}>", str(path))
        return text


class Streams:
    """Stdout and stderr, of this process and of its children, in two files that are emptied for every row.

    The files live as long as the process: handlers of `logging` keep the stream that was there when they were made.
    """

    def __init__(self) -> None:
        self.files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self.texts = [
            io.TextIOWrapper(io.FileIO(file.fileno(), "wb", closefd=False), encoding="utf-8", errors="surrogateescape",
                             write_through=True)
            for file in self.files
        ]  # fmt: skip
        for stream in (*self.texts, *self.files):
            atexit.register(stream.close)

    @contextlib.contextmanager
    def catch(self) -> Iterator[None]:
        """Everything that is printed goes to the files."""
        for file in self.files:
            file.seek(0)
            file.truncate()
        saved, before = [os.dup(1), os.dup(2)], (sys.stdout, sys.stderr)
        try:
            for stream, file in zip((1, 2), self.files, strict=True):
                os.dup2(file.fileno(), stream)
            sys.stdout, sys.stderr = self.texts
            yield
        finally:
            for text in self.texts:
                text.flush()
            sys.stdout, sys.stderr = before
            for stream, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, stream)
                os.close(copy)

    def read(self) -> tuple[str, str]:
        """What went to stdout and to stderr."""
        found = []
        for file in self.files:
            file.seek(0)
            found.append(file.read().decode("utf-8", errors="replace"))
        return found[0], found[1]


_streams: Streams | None = None


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Give back what a command line may change in its process."""
    loggers = [logging.getLogger(name) for name in (None, "lm_eval", "lm_eval_sparse", "transformers")]
    levels = [(logger.level, logger.handlers[:]) for logger in loggers]
    environment, folder, argv, path = dict(os.environ), os.getcwd(), sys.argv, sys.path[:]
    hook, signals = sys.excepthook, {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    recursion, umask = sys.getrecursionlimit(), os.umask(0o022)
    try:
        yield
    finally:
        os.umask(umask)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv, sys.path[:], sys.excepthook = argv, path, hook
        sys.setrecursionlimit(recursion)
        for number, handler in signals.items():
            signal.signal(number, handler)
        for logger, (level, handlers) in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            logger.handlers[:] = handlers


@contextlib.contextmanager
def _alone(frontier: bool) -> Iterator[None]:
    """No network, no embedded model, no list of lm-eval's own tasks; our own where a row names them."""
    from lm_eval.tasks import TaskManager

    from lm_eval_sparse import patches
    from lm_eval_sparse.frontier import show
    from lm_eval_sparse.model import embedded
    from lm_eval_sparse.paths import task_folders

    patches.install()
    original = TaskManager.__init__

    def listing(self: TaskManager, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "include_defaults": False})
        if frontier and "frontier_niah_4k" not in self.all_tasks:
            given = kwargs.get("include_path") or []
            given = [given] if isinstance(given, str | Path) else list(given)
            original(self, *args, **{**kwargs, "include_defaults": False, "include_path": [*given, *task_folders()]})

    def no_download(*args: Any, **kwargs: Any) -> Any:
        raise Fetched

    import datasets
    from huggingface_hub import constants

    patched = [
        (TaskManager, "__init__", listing), (embedded, "ensure", no_download), (show, "ensure", no_download),
        (constants, "HF_HUB_OFFLINE", True), (datasets.config, "HF_HUB_OFFLINE", True),
    ]  # fmt: skip
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patched if hasattr(owner, name)]
    try:
        for owner, name, value in patched:
            if hasattr(owner, name):
                setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextlib.contextmanager
def _timed(seconds: float) -> Iterator[None]:
    """Raise `Hang` after so long; what does not even see that ends the process later."""

    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 15.0)  # again, should something swallow the first
    faulthandler.dump_traceback_later(seconds + 100, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _files(*folders: Path) -> dict[str, tuple[int, int]]:
    """Everything below `folders`, with size and time of change."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            status = path.lstat()
            found[str(path)] = (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return found


def run(row: Row, shared: Shared, folder: Path, real: bool = False, limit: float = LIMIT) -> Outcome:
    """Run one row in the empty `folder`."""
    work, cache = folder / "work", folder / "cache"
    for path in (work, cache):
        path.mkdir(parents=True)
    places = {"work": work, "cache": cache}
    for name, content in row.files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(content if isinstance(content, bytes) else shared.filled(content, **places).encode())
    if row.make:
        row.make(work, shared.words)
    argv = [shared.filled(text, **places) for text in row.argv]
    variables = {"LM_EVAL_SPARSE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    variables |= {name: value if value is None else shared.filled(value, **places) for name, value in row.env.items()}
    before = _files(work, cache)
    began = time.perf_counter()
    apart = real or row.alone
    ran = (_real if apart else _in_process)(
        argv, variables, work, limit * (6 if apart else 1), "frontier" in " ".join(argv)
    )
    seconds = time.perf_counter() - began
    written = [path for path, what in _files(work, cache).items() if before.get(path) != what]
    return _judged(row, ran, work, cache, written, seconds)


@dataclass(frozen=True)
class Ran:
    """What came of a command: exit status (None: it did not end by itself), what it printed, what it ended in."""

    status: int | None
    out: str
    err: str
    raised: str = ""


def _in_process(argv: list[str], variables: dict[str, str | None], work: Path, limit: float, frontier: bool) -> Ran:
    global _streams
    from lm_eval_sparse.cli import app as cli

    _streams = _streams or Streams()
    status: int | None = None
    raised = ""
    with _restored(), _alone(frontier):
        os.chdir(work)
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        with _streams.catch():
            try:
                with _timed(limit):
                    status = cli.main(argv)
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(bool(end.code))
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except (Hang, Fetched) as end:
                raised = type(end).__name__
            except BaseException as end:
                where = traceback.extract_tb(end.__traceback__)[-1]
                raised = f"{type(end).__name__}: {' '.join(str(end).split())[:200]} ({where.filename}:{where.lineno})"
    return Ran(status, *_streams.read(), raised)


def _real(argv: list[str], variables: dict[str, str | None], work: Path, limit: float, frontier: bool) -> Ran:
    environment = {**os.environ, **{name: value for name, value in variables.items() if value is not None}}
    for name, value in variables.items():
        if value is None:
            environment.pop(name, None)
    package = Path(sys.modules["lm_eval_sparse"].__file__ or "").parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(package), environment.get("PYTHONPATH", "")]).strip(os.pathsep)
    command = [sys.executable, "-m", "lm_eval_sparse", *argv]
    try:
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return Ran(None, "", "", "Hang")
    except OSError as error:  # an argument longer than the system takes
        return Ran(1, "", f"{PREFIX}{error.strerror}\n")
    return Ran(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def _judged(row: Row, ran: Ran, work: Path, cache: Path, written: list[str], seconds: float) -> Outcome:
    lines = [line for line in ran.err.splitlines() if line.startswith(PREFIX)]
    message = lines[0] if lines else next(reversed(ran.err.strip().splitlines() or [""]))

    def outcome(kind: str, right: bool, why: str = "") -> Outcome:
        return Outcome(row, kind, right, why, ran.status, seconds, message[:400])

    if ran.raised == "Hang":
        return outcome("hang", False, f"not done in {seconds:.0f} s")
    if row.secret and (places := _leaks(row.secret, ran, work, cache)):
        return outcome("leaked", False, f"the secret stands in {', '.join(places)}")
    if (work / "PWNED").exists():
        return outcome("accepted", False, "code ran that must not")
    if ran.raised == "Fetched":
        return outcome("accepted", False, "the embedded model would have been fetched")
    if ran.raised or ran.status is None or ran.status < 0:
        return outcome("traceback", False, ran.raised or f"status {ran.status}")
    if found := _TRACEBACK.search(ran.out) or _TRACEBACK.search(ran.err):
        return outcome("traceback", False, f"printed: {found[0]}")
    if ran.status:
        return _refused(row, ran, lines, work, written, outcome)
    if row.verdict in (REFUSED, REPORTED):
        return outcome("accepted", False, "exit status 0")
    if lines:
        return outcome("accepted", False, "exit status 0 with a line of complaint")
    if not _proven(row, ran, work):
        return outcome("accepted", False, f"exit status 0 without {row.proof}")
    return outcome("legal", True)


def _refused(row: Row, ran: Ran, lines: list[str], work: Path, written: list[str], outcome: Any) -> Outcome:
    kept = {str(path) for path in work.glob(row.keeps)} if row.keeps else set()
    answers = [Path(path) for path in written if "resume_log" in Path(path).parts]  # made before it was refused
    kept |= {str(path) for answer in answers for path in (answer, *answer.parents)}
    if left := [path for path in written if path not in kept]:
        return outcome("written", False, f"new: {', '.join(Path(path).name for path in left[:4])}")
    if row.verdict == REPORTED and not lines and "FAILED" in ran.out:
        return outcome("refused", True)
    if len(lines) != 1:
        return outcome("badly refused", False, f"{len(lines)} lines of ours on stderr, exit status {ran.status}")
    if bad := [
        character for character in lines[0] if not character.isprintable() and character not in "\t\u00a0\u3000"
    ]:
        return outcome("badly refused", False, f"{bad[0]!r} in the message")
    if ran.err.rstrip().splitlines()[-1].rstrip() != lines[0].rstrip():
        return outcome("badly refused", False, "more is printed after the message")
    if len(lines[0]) > 4000:
        return outcome("badly refused", False, f"a message of {len(lines[0])} characters")
    if not any(part in lines[0].lower() for part in row.says.lower().split("|")):
        return outcome("badly refused", False, f"the message does not say {row.says!r}")
    if row.verdict == LEGAL:
        return outcome("refused wrongly", False, "refused")
    return outcome("refused", True)


def _leaks(secret: str, ran: Ran, *folders: Path) -> list[str]:
    places = [name for name, text in (("stdout", ran.out), ("stderr", ran.err)) if secret in text]
    for folder in folders:
        files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("given")]
        places += [path.name for path in files if secret.encode() in path.read_bytes() or secret in str(path)]
    return places


def _proven(row: Row, ran: Ran, work: Path) -> bool:
    """Whether a legal row did what it was asked for."""
    if row.proof.startswith("says "):
        return row.proof.removeprefix("says ") in ran.out
    found = list(work.glob(row.proof))
    if not found or not all(path.stat().st_size for path in found):
        return False
    if found[0].name.startswith("results_"):
        scores = json.loads(found[0].read_text())["results"]
        return any("," in key for task in scores.values() for key in task)
    return True


def report(outcomes: list[Outcome]) -> str:
    """A line per area: rows, and how they went; right rows are those that went as their verdict says."""
    rows = [["area", "rows", "right", *OUTCOMES]]
    for area in [*dict.fromkeys(outcome.row.area for outcome in outcomes), None]:
        some = [outcome for outcome in outcomes if area in (None, outcome.row.area)]
        kinds = Counter(outcome.kind for outcome in some)
        rows.append(
            [area or "all", str(len(some)), str(sum(o.right for o in some)), *(str(kinds[k]) for k in OUTCOMES)]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> int:
    """The runner's own command line: the number of rows that did not go as they should, at most 100."""
    parser = argparse.ArgumentParser(description="Run the table of bad command lines.")
    parser.add_argument("--area", action="append", help="only this area; may be repeated")
    parser.add_argument("--name", help="only rows with this in their name")
    parser.add_argument("--log", type=Path, help="a JSON line per row")
    parser.add_argument("--real", action="store_true", help="every twentieth row, as a process of its own")
    parser.add_argument("--slow", action="store_true", help="also the rows that take long")
    parser.add_argument("--verbose", action="store_true", help="also print the messages of right rows")
    options = parser.parse_args()
    rows = [row for row in table() if not options.area or row.area in options.area]
    rows = [row for row in rows if (options.slow or not row.slow) and (options.name or "") in row.name]
    rows = rows[::20] if options.real else rows
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    import lm_eval_sparse

    print(f"{len(rows)} rows against {Path(lm_eval_sparse.__file__).parent}", flush=True)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="attacks-") as name:
        shared = Shared.make(Path(name) / "shared")
        for number, row in enumerate(rows):
            folder = Path(name) / str(number)
            outcome = run(row, shared, folder, real=options.real)
            shutil.rmtree(folder, ignore_errors=True)
            outcomes.append(outcome)
            if not outcome.right or options.verbose:
                told = f"{row.id}  [{outcome.seconds:.1f} s] {outcome.why} | {outcome.message[:300]}"
                print(f"{outcome.kind:>15}  {told}", flush=True)
            if options.log:
                with options.log.open("a") as log:
                    log.write(json.dumps(outcome.record(), ensure_ascii=False) + "\n")
    print(report(outcomes))
    return min(sum(not outcome.right for outcome in outcomes), 100)


if __name__ == "__main__":
    sys.exit(main())
