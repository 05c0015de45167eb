"""The ledger of a sweep: a folder that says what is done, what failed and who is at work. Executors stand on top of it.

    ledger.json                what this is: schema and name of the grid
    plan.json                  all cells that were ever asked for, by address
    cells/cell_ADDRESS.json    one for each cell that is done: its records, written whole or not at all
    raw/ADDRESS/               lm-eval's own results of it, where they are kept
    failed/ADDRESS.json        why a cell has no record yet
    work/LOG/                  where a cell runs: answers so far, which the next try goes on from
    logs/                      what workers print
    locks/                     who is at work

Every file is written atomically, so whoever is killed at any moment leaves nothing half done. Locks are of the kernel
and end with the process that holds them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from ..errors import UserError, one_line
from ..labels import label
from ..results import cells
from ..results.files import PARTIAL, read_json, why, write_whole
from ..results.schema import Record
from .cell import Cell

#: Raised when a folder of this version cannot be read by an older one.
SCHEMA = 1
_BROKEN = "broken"
#: Seconds after which nobody is still writing a file.
_OLD = 3600


@dataclass(frozen=True)
class Failure:
    """Why a cell has no record.

    Attributes:
        kind: `user`, `memory`, `device`, `died` or `error`.
        told: the cell in words. `why`: one line. `trace`: the end of a traceback, where there is one.
        tries: how often it was tried in its last sweep.
    """

    address: str
    told: str
    kind: str
    why: str
    trace: str
    tries: int


class Ledger:
    """A ledger in a folder. All methods that write raise `OSError` where the disk is full or the folder is gone."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def make(cls, folder: Path, name: str) -> Ledger:
        """The ledger of a grid, in a new folder, an empty one, or one that is a ledger of that grid.

        Raises:
            UserError: the folder holds something else, another grid's ledger, or that of a newer version.
        """
        head = folder / cells.LEDGER
        if not head.exists():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"{folder} is no ledger of a sweep, and not empty; give a new folder: --ledger DIR")
            write_whole(head, json.dumps({"schema": SCHEMA, "name": name}, indent=1).encode() + b"\n")
        found = cls.of(folder)
        if (there := found.name) != name:
            raise UserError(
                f"{folder} is the ledger of the grid {label(there)}, and this one is called {label(name)}; give "
                "another folder: --ledger DIR"
            )
        for part in ("cells", "failed", "work", "logs", "locks"):
            (folder / part).mkdir(exist_ok=True)
        return found

    @classmethod
    def of(cls, folder: Path) -> Ledger:
        """The ledger in a folder. Raises `UserError` where there is none, or one of a newer version."""
        if not (folder / cells.LEDGER).is_file():
            raise UserError(f"{folder} is no ledger of a sweep (it has no {cells.LEDGER}); give the folder of one")
        head = read_json(folder / cells.LEDGER)
        schema = head.get("schema")
        if not isinstance(schema, int) or schema < 1 or not isinstance(head.get("name"), str):
            raise UserError(f"{folder / cells.LEDGER}: no ledger's; give the folder of one")
        if schema > SCHEMA:
            raise UserError(
                f"{folder} is a ledger of schema {schema}, and this version reads up to {SCHEMA}; upgrade "
                "lm-eval-sparse, or give another folder: --ledger DIR"
            )
        return cls(folder)

    @property
    def name(self) -> str:
        return str(read_json(self.folder / cells.LEDGER)["name"])

    # -- what is asked for

    def plan(self) -> dict[str, Cell]:
        """All cells that were ever asked for. Raises `UserError` for a plan that was damaged."""
        path = self.folder / "plan.json"
        if not path.exists():
            return {}
        try:
            return {address: Cell(**given) for address, given in read_json(path)["cells"].items()}
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: no plan of a sweep; delete it, and the next sweep writes it anew") from None

    def add(self, wanted: Iterable[Cell]) -> None:
        """Ask for cells, beside those that were asked for before."""
        with self._short_lock():
            known = self.plan()
            merged = {**known, **{cell.address: cell for cell in wanted}}
            if merged.keys() != known.keys():
                content = {"cells": {address: cell.as_json() for address, cell in merged.items()}}
                write_whole(self.folder / "plan.json", json.dumps(content).encode() + b"\n")

    # -- what is done

    def path(self, address: str) -> Path:
        return cells.file_of(self.folder / "cells", address)

    def is_done(self, address: str) -> bool:
        """Whether a cell has a record that is as it was written; one that is not is put aside, and run again."""
        path = self.path(address)
        if not path.exists():
            return False
        try:
            cells.read(path)
        except UserError:
            with contextlib.suppress(OSError):
                (self.folder / _BROKEN).mkdir(exist_ok=True)
                os.replace(path, self.folder / _BROKEN / f"{path.stem}.{time.time_ns()}.json")
            return False
        return True

    def addresses(self) -> set[str]:
        """Cells that have a file; whether it is whole is not looked at."""
        folder = self.folder / "cells"
        names = os.listdir(folder) if folder.is_dir() else []
        return {address for name in names if (address := cells.address_of(name))}

    def put(self, cell: Cell, records: Sequence[Record], seconds: float, raw: Sequence[Path] = ()) -> None:
        """Record a cell that is done. A second record of it changes nothing.

        Args:
            raw: lm-eval's own files, which are moved to the ledger.
        """
        if raw:
            place = self.folder / "raw" / cell.address
            place.mkdir(parents=True, exist_ok=True)
            for path in raw:
                os.replace(path, place / path.name)
        made = {
            "host": socket.gethostname(), "seconds": round(seconds, 3),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }  # fmt: skip
        if not self.path(cell.address).exists():
            # Where the weights lay is of no use to anyone else.
            cells.write(self.path(cell.address), {**cell.as_json(), "pretrained": cell.model}, records, made)
        (self.folder / "failed" / f"{cell.address}.json").unlink(missing_ok=True)

    def seconds(self) -> dict[str, float]:
        """How long the cells took that are done, by address."""
        found = {}
        for address in self.addresses():
            with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
                found[address] = float(cells.read(self.path(address))[0]["made"]["seconds"])
        return found

    # -- what failed

    def fail(self, cell: Cell, kind: str, reason: str, trace: str, tries: int) -> None:
        content = {"told": cell.told(), "kind": kind, "why": one_line(reason), "trace": trace[-20_000:], "tries": tries}
        write_whole(self.folder / "failed" / f"{cell.address}.json", json.dumps(content, indent=1).encode() + b"\n")

    def failures(self) -> dict[str, Failure]:
        """Cells that have failed and were not done since."""
        found = {}
        folder = self.folder / "failed"
        for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
            address = name.removesuffix(".json")
            with contextlib.suppress(UserError, KeyError, TypeError):
                given = read_json(folder / name)
                if not self.path(address).exists():
                    found[address] = Failure(
                        address, str(given["told"]), str(given["kind"]), str(given["why"]), str(given["trace"]),
                        int(given["tries"]),
                    )  # fmt: skip
        return found

    # -- where cells run

    def work(self, cell: Cell) -> Path:
        """The folder that lm-eval is given for a cell's results and answers so far."""
        return self.folder / "work" / cell.log

    def forget(self, cell: Cell) -> None:
        """Remove the answers so far of a cell."""
        shutil.rmtree(self.work(cell), ignore_errors=True)

    # -- who is at work

    @contextlib.contextmanager
    def shard(self, number: int, of: int) -> Iterator[None]:
        """Hold a shard, while the block runs.

        Raises:
            UserError: another sweep holds it, or works in another number of shards.
        """
        locks = self.folder / "locks"
        path = locks / f"shard-{number}-of-{of}.lock"
        with self._short_lock():
            for other in sorted(locks.glob("shard-*.lock")):
                mine = other.name == path.name
                if (mine or not other.name.endswith(f"-of-{of}.lock")) and (holder := self._held(other)):
                    _, i, _, n = other.stem.split("-")
                    part = "" if n == "1" else f" (shard {int(i)}/{n})"
                    raise UserError(
                        f"{self.folder}: another sweep{part} is at work here: {holder}; wait for it, or stop it"
                        + ("" if mine else f". Shards of {n} and of {of} would run the same cells")
                    )
            lock = filelock.FileLock(path, timeout=0)
            self._take(lock)
            write_whole(path.with_suffix(".json"), json.dumps(_me()).encode())
        self._tidy(alone=of == 1)
        try:
            yield
        finally:
            lock.release()

    def _tidy(self, alone: bool) -> None:
        """Remove what killed processes were writing. Other shards may be writing now: of theirs only the old goes."""
        for folder in (self.folder, self.folder / "cells", self.folder / "failed", self.folder / "locks"):
            for path in folder.glob(f"{PARTIAL}*"):
                with contextlib.suppress(OSError):
                    if alone or time.time() - path.stat().st_mtime > _OLD:
                        path.unlink()

    @contextlib.contextmanager
    def claim(self, address: str) -> Iterator[bool]:
        """Whether a cell is ours to run, while the block runs; another process may be at it."""
        lock = filelock.FileLock(self.folder / "locks" / f"cell-{address}.lock", timeout=0)
        try:
            self._take(lock)
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()  # the file stays: taking it away would let a third process hold another one of its name

    def _held(self, path: Path) -> str:
        """Who holds a lock, in words; empty for nobody."""
        lock = filelock.FileLock(path, timeout=0)
        try:
            self._take(lock)
        except filelock.Timeout:
            with contextlib.suppress(UserError, KeyError):
                about = read_json(path.with_suffix(".json"))
                return f"process {about['pid']} on {label(about['host'], 80)}, since {label(about['since'], 40)}"
            return "a process that does not say which"
        lock.release()
        return ""

    @contextlib.contextmanager
    def _short_lock(self) -> Iterator[None]:
        lock = filelock.FileLock(self.folder / "locks" / "ledger.lock", timeout=60)
        try:
            self._take(lock)
        except filelock.Timeout:
            raise UserError(f"{self.folder}: another process has been writing to this ledger for a minute") from None
        try:
            yield
        finally:
            lock.release()

    @staticmethod
    def _take(lock: filelock.BaseFileLock) -> None:
        try:
            lock.acquire()
        except NotImplementedError as error:
            raise UserError(f"the file system of {lock.lock_file} has no locks ({why(error)}); give another folder: "
                            "--ledger DIR") from None  # fmt: skip


def _me() -> Mapping[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
