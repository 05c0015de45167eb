"""Cells of a ledger run by a Ray cluster. A task is some cells of one model, run on its node as on any other machine.

What Ray is asked for is a place and to say when a node is gone. What is done stands in the ledger, which all nodes must
see, and how often something is tried is counted here: Ray's own retries know neither.
"""

from __future__ import annotations

import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..labels import label
from ..results.cells import LEDGER
from ..results.files import read_json, why
from . import worker
from .cell import Cell
from .drive import Driver, Slot
from .ledger import Ledger
from .worker import Answer

#: Seconds in which an address has to answer, and between two looks at the ledger.
_ANSWERS, _LOOK = 5.0, 0.5
#: Tasks that each place of the cluster gets, at least: the last ones should end together.
_EACH = 3
#: How often a task may be lost with its node before anything new is recorded.
TRIES = 3


@dataclass
class _Unit:
    """Some cells of one model. `lost`: how often it was lost without progress."""

    cells: list[Cell]
    lost: int = field(default=0)


def run(
    ledger: Ledger,
    cells: Iterable[Cell],
    address: str = "auto",
    *,
    keep_raw: bool = True,
    share: int = 1,
    command: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    told: Callable[[Cell, Answer | None], None] = lambda cell, answer: None,
) -> int:
    """Run cells on a cluster; returns how many of them have no record in the end.

    Args:
        address: `auto` (the cluster of this machine or of `RAY_ADDRESS`, else a new one of this machine alone), or
            `host:port`.
        share: processes that share a GPU.
        command, environment: as of `worker.Worker`.
        told: is called with each cell that is recorded or has failed.

    Raises:
        UserError: Ray is not installed, the address does not answer, a node does not see the ledger.
    """
    ray = _connected(address)
    try:
        return _run(
            ray, ledger, list(cells), keep_raw, share, tuple(command or worker.COMMAND), dict(environment or {}), told
        )
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    """Ray, connected. Raises `UserError`."""
    # Start-up hooks import nothing heavy, and a watch on memory that starts tasks again for ever is none of ours.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray; type pip install 'lm-eval-sparse[ray]'") from None
    options = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
    try:
        if address == "auto":
            given = os.environ.get("RAY_ADDRESS")
            if given and given != "local":
                _check_answers(given)
            ray.init(**options)
        else:
            _check_answers(address)
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"--ray {label(address, 100)}: no Ray cluster answers there ({why(error)}); start one with "
            "`ray start --head`, and give its host:port, or --ray alone for a new one on this machine"
        ) from None
    return ray


def _check_answers(address: str) -> None:
    """Raise `ConnectionError` for a host that does not answer: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ConnectionError("host:port is expected, such as 10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), _ANSWERS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(why(error)) from None


def _run(
    ray: Any,
    ledger: Ledger,
    cells: list[Cell],
    keep_raw: bool,
    share: int,
    command: tuple[str, ...],
    environment: dict[str, str],
    told: Callable[[Cell, Answer | None], None],
) -> int:
    gpus = ray.cluster_resources().get("GPU", 0)
    places = max(1, int(gpus * share if gpus else ray.cluster_resources().get("CPU", 1)))
    task = ray.remote(max_calls=1, max_retries=0, num_cpus=0 if gpus else 1, num_gpus=1 / share if gpus else 0)(_unit)
    folder, mark = str(ledger.folder.absolute()), _mark(ledger.folder)
    waiting: dict[Any, _Unit] = {}

    def submit(unit: _Unit) -> None:
        given = [cell.as_json() for cell in unit.cells]
        waiting[task.remote(folder, mark, given, keep_raw, share, command, environment)] = unit

    for unit in _units(cells, places):
        submit(unit)
    watch = _Watch(ledger, cells, told)
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_LOOK)
            watch.look()
            for reference in ready:
                unit = waiting.pop(reference)
                try:
                    refusal = ray.get(reference)
                except (
                    Exception
                ) as error:  # a node, a worker, the cluster: whatever it was, the ledger knows what is done
                    again = _again(ledger, unit, str(error))
                    if again is not None:
                        submit(again)
                    continue
                if refusal is not None:
                    raise UserError(refusal)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
    watch.look()
    return sum(not ledger.path(cell.address).exists() for cell in cells)


def _units(cells: Sequence[Cell], places: int) -> list[_Unit]:
    """Cells of one model in parts, in their order, so that each place gets some tasks of about one size."""
    by_model: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_model[cell.model].append(cell)
    size = max(1, -(-len(cells) // (places * _EACH)))
    return [_Unit(several[at : at + size]) for several in by_model.values() for at in range(0, len(several), size)]


def _again(ledger: Ledger, unit: _Unit, reason: str) -> _Unit | None:
    """What is left of a unit that was lost; None when nothing is, or it was lost too often: then its cells fail."""
    failed = ledger.failures()
    left = [cell for cell in unit.cells if not ledger.is_done(cell.address) and cell.address not in failed]
    lost = unit.lost + 1 if len(left) == len(unit.cells) else 1
    if lost < TRIES:
        return _Unit(left, lost) if left else None
    for cell in left:
        lines = reason.strip().splitlines() or ["no reason"]
        ledger.fail(cell, "died", f"its task was lost {lost} times: {lines[0][:300]}", reason, lost)
    return None


class _Watch:
    """Tells of cells as the ledger gets to know of them."""

    def __init__(self, ledger: Ledger, cells: Iterable[Cell], told: Callable[[Cell, Answer | None], None]):
        self.ledger, self.told = ledger, told
        self._left = {cell.address: cell for cell in cells}
        self._before = {address: failure.why for address, failure in ledger.failures().items()}
        self._started = time.time()

    def look(self) -> None:
        done, failed = self.ledger.addresses(), self.ledger.failures()
        for address in list(self._left):
            if address in done:
                self.told(self._left.pop(address), Answer("ok"))
            elif address in failed and self._is_new(address):
                self.told(self._left.pop(address), Answer(failed[address].kind, why=failed[address].why))

    def _is_new(self, address: str) -> bool:
        """Whether a failure is of this sweep, and not one that is being tried again."""
        if address not in self._before:
            return True
        try:
            return (self.ledger.folder / "failed" / f"{address}.json").stat().st_mtime > self._started
        except OSError:
            return False


# -- on a node


def _mark(folder: Path) -> dict[str, Any]:
    """What tells a ledger from one of the same path on another machine."""
    return {**read_json(folder / LEDGER), "plan": len((folder / "plan.json").read_bytes())}


def _unit(
    folder: str,
    mark: dict[str, Any],
    cells: list[dict[str, Any]],
    keep_raw: bool,
    share: int,
    command: tuple[str, ...],
    environment: dict[str, str],
) -> str | None:
    """Run cells on this node; returns what is wrong with the node, None when nothing is."""
    place = Path(folder)
    try:
        seen = _mark(place)
    except (OSError, UserError):
        seen = None
    if seen != mark:
        return (
            f"{socket.gethostname()}, a node of the cluster, does not see the ledger {folder}; give a folder that all "
            "nodes share: --ledger DIR"
        )
    import ray

    gpus = ",".join(str(gpu) for gpu in ray.get_gpu_ids())
    # A task that was given none sees all of them, whatever Ray says.
    bound = {**environment, "CUDA_VISIBLE_DEVICES": gpus}
    # Beside others nobody knows how much may be filled with prompts that were read.
    more = ("--share-prefill", "0") if share > 1 else ()
    slot = Slot(f"ray-{socket.gethostname()}-{os.getpid()}", bound, more)
    Driver(Ledger.of(place), [slot], command=command, keep_raw=keep_raw).run(Cell(**given) for given in cells)
    return None


__all__ = ["run"]
