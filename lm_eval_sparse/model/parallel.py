"""Several processes that share the documents of one evaluation, each with the whole model on its own device.

`torchrun` or `accelerate launch` starts them and tells each which one it is. lm-eval gives every process the documents
rank, rank + world size, …; what they found is put together once, at the end. Until then nobody waits for anybody, so
that a process with nothing to do holds up none. All that is exchanged is a few Python objects, which gloo carries on
any device. `patches.several_processes` uses this around lm-eval's evaluator; nothing here knows methods or metrics.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..protocol import SKIPPED
from ..results.files import brief
from .watch import Watch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

#: How long processes wait for the last of them to start.
JOIN = timedelta(minutes=10)
#: How long one waits for what the others compute. Not a limit on them: `Watch` notices those that are gone.
WORK = timedelta(weeks=4)
#: Seconds after which it says so.
_PATIENCE = 10.0

#: Names under which launchers tell a process its place; `torchrun`'s, which `accelerate launch` shares.
_RANK, _WORLD, _LOCAL_RANK, _LOCAL_WORLD = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
#: What tells a process of MPI its number of processes, as accelerate reads it.
_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

_ABSENT = object()


@dataclass(frozen=True)
class Place:
    """Which of how many processes this one is.

    Attributes:
        rank: among all, from 0.
        world_size: number of all.
        local_rank: among those of this host, from 0: the GPU it takes.
        local_size: number of those of this host.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int

    @property
    def one_host(self) -> bool:
        return self.local_size == self.world_size


def place_of(environment: Mapping[str, str]) -> Place | None:
    """The place that a launcher gave this process, or None for one that is alone.

    Raises `UserError` for numbers that make no sense, and where `accelerate launch` was asked for several processes
    but starts one (it leaves CPUs to MPI).
    """
    if environment.get(_WORLD) is None:
        mpi = any(environment.get(name) is not None for name in _MPI)
        # `accelerate launch` sets this address for several processes only; one of a cluster is another.
        local = environment.get("MASTER_ADDR") == "127.0.0.1"
        if "ACCELERATE_MIXED_PRECISION" in environment and local and not mpi:
            raise UserError(
                "`accelerate launch` was asked for several processes, and starts only one without GPUs: type "
                "torchrun --nproc-per-node N -m lm_eval ... for N processes (or --num_processes 1)"
            )
        return None
    numbers = {}
    for name in (_RANK, _WORLD, _LOCAL_RANK, _LOCAL_WORLD):
        # A script that starts processes itself may give the first two only.
        given = environment.get(name, environment.get(_RANK if name == _LOCAL_RANK else _WORLD, "0"))
        if not given.isdecimal():
            raise UserError(f"{name}={brief(given)} in the environment is no number of a process: unset it")
        numbers[name] = int(given)
    place = Place(*numbers.values())
    if place.world_size <= 1:
        return None
    if place.rank >= place.world_size or place.local_rank >= place.local_size or place.local_size > place.world_size:
        said = ", ".join(f"{name}={number}" for name, number in numbers.items())
        raise UserError(f"{said} in the environment contradict each other: start the processes by torchrun")
    return place


def rank_of_cache(model_args: Any = None) -> int:
    """The number in the name of this process's `--use_cache` file, as lm-eval counts: there the processes of a model
    that is itself split (`tp_plan`) are told apart by their number on this host."""
    given = model_args if isinstance(model_args, Mapping) else {}
    if isinstance(model_args, str):
        given = dict(argument.partition("=")[::2] for argument in model_args.split(","))
    rank = os.environ.get(_LOCAL_RANK if given.get("tp_plan") else _RANK, os.environ.get(_LOCAL_RANK, "0"))
    return int(rank) if rank.isdecimal() else 0


def check(place: Place, model_args: Mapping[str, Any], gpus: int) -> None:
    """Raise `UserError` for arguments with which several processes cannot each have the model to themselves.

    `gpus` is how many torch sees on this host.
    """
    if (given := model_args.get("device_map")) is not None:
        raise UserError(
            f"device_map={brief(given)} with {place.world_size} processes: all would place the model alike; leave it "
            "out, and each takes its own device, or type parallelize=True to give each some of the GPUs"
        )
    kind, _, number = str(model_args.get("device", "cpu")).partition(":")
    if kind != "cuda":
        return
    if number and int(number):
        raise UserError(
            f"device={model_args['device']} with {place.world_size} processes: each takes its own GPU; leave device "
            "out, and choose the GPUs by CUDA_VISIBLE_DEVICES"
        )
    if place.local_size > gpus:
        raise UserError(
            f"{place.local_size} processes on a host with {gpus} GPUs, and each takes one: type --nproc-per-node "
            f"{gpus} (accelerate: --num_processes), or --device cpu"
        )


def join(model_args: Mapping[str, Any], alone: bool = False) -> Peers | None:
    """Find the other processes of this evaluation; None where there are none.

    Called before lm-eval makes its `Accelerator`, which takes part in what it finds: it would have all processes talk
    by NCCL, which takes seconds to start and says nothing of a process that is gone.

    Args:
        model_args: those of `hf`, with the device.
        alone: whether the model was given as an object: then each process evaluates by itself, as with `hf`.

    Raises:
        UserError: the processes cannot share the work with these arguments, or do not come together.
    """
    place = place_of(os.environ)
    if place is None or alone or model_args.get("tp_plan") is not None:  # a split model is one, of all processes
        return None
    check(place, model_args, torch.cuda.device_count())
    if str(model_args["device"]).partition(":")[0] == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate sees one process where there is no GPU
    try:
        _interruptibly(_initialise)
        peers = Peers.of(place)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {place.rank} of {place.world_size} does not find the others ({_first_line(error)}): start "
            "all of them by torchrun, with the same --master-addr and --master-port (or --rdzv-endpoint)"
        ) from error
    if place.rank:  # what lm-eval says of its progress is said by the first
        told = logging.getLogger("lm_eval")
        told.setLevel(max(told.level, logging.WARNING))
    return peers


def _initialise() -> None:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=JOIN)


def _interruptibly(work: Callable[[], Any]) -> Any:
    """What `work` returns. torch waits for others without looking at signals, so that it does so in a thread."""
    done: list[Any] = []
    wrong: list[Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if wrong:
        raise wrong[0]
    return done[0]


class Peers:
    """The processes of one evaluation, as one of them sees them. Every method but `lost` has to be called by all.

    Attributes:
        place: which of them this one is.
    """

    _known: Peers | None = None

    def __init__(self, place: Place, group: ProcessGroup):
        self.place = place
        self._group = group
        self._watch: Watch | None = None

    @classmethod
    def of(cls, place: Place) -> Peers:
        """The peers of this process, however many models it makes."""
        if cls._known is None or cls._known.place != place:
            group = _interruptibly(lambda: torch.distributed.new_group(backend="gloo", timeout=WORK))
            cls._known = cls(place, group)
        return cls._known

    def gather(self, thing: Any, dst: int = 0) -> list[Any] | None:
        """What each process gives, by rank, at process `dst`; None elsewhere."""
        found = [None] * self.place.world_size if self.place.rank == dst else None
        # It has a progress bar that stands still by then.
        said = threading.Timer(_PATIENCE, logger.warning, ["this process is done; waiting for the others"])
        if found is not None:
            said.daemon = True
            said.start()
        try:
            with self._reached():
                torch.distributed.gather_object(thing, found, dst=dst, group=self._group)
        finally:
            said.cancel()
        return found

    def all(self, thing: Any) -> list[Any]:
        """What each process gives, by rank, at all."""
        found = [None] * self.place.world_size
        with self._reached():
            torch.distributed.all_gather_object(found, thing, group=self._group)
        return found

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Raise `UserError`, in every process, when one has another setting than the first."""
        check_same(self.all({name: str(value) for name, value in settings.items()}))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Until all have come to the end of this, a process that is gone ends the others, too, in one line."""
        try:
            with Watch(self.place, self.all) as self._watch:
                yield
        finally:
            self._watch = None

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """One line for what gloo says where a process is gone."""
        try:
            yield
        except RuntimeError as error:
            known = self._watch.reason() if self._watch is not None else None
            said = known or f"another of the {self.place.world_size} processes is gone ({_first_line(error)})"
            raise UserError(f"{said}; what it said itself stands above, or in its own log") from error


def check_same(settings: list[dict[str, str]]) -> None:
    """Raise `UserError` when a process, by rank, has another setting than the first."""
    first = settings[0]
    for rank, mine in enumerate(settings):
        for name in {**first, **mine}:
            if (there := mine.get(name, "nothing")) != (here := first.get(name, "nothing")):
                raise UserError(
                    f"the processes differ in {name}: {brief(here)} in process 0, {brief(there)} in process {rank}; "
                    "start all of them with the same arguments and the same versions"
                )


def in_order(parts: list[Any]) -> list[Any]:
    """What lm-eval gathers at the end, such that it comes in the order in which one process would have it.

    lm-eval puts the lists of the processes one behind the other, and asks each for every metric that the first has.
    Documents went round the processes: the first's are 0, W, 2 W, … of W processes. Floating-point sums, logged samples
    and what is drawn for standard errors depend on the order.

    Args:
        parts: by process, either samples by task, or by task the values of each (metric, filter).

    Returns:
        As many parts, of which the first holds everything; anything else than samples and metrics as it is.
    """
    if not all(isinstance(part, dict) and part.keys() == parts[0].keys() for part in parts):
        return parts
    tasks = [(name, [part[name] for part in parts]) for name in parts[0]]
    if all(map(_are_samples, chain.from_iterable(rows for _, rows in tasks))):
        whole = {name: _samples_in_order(rows) for name, rows in tasks}
        return [whole, *({name: [] for name in whole} for _ in parts[1:])]
    if not all(map(_are_metrics, chain.from_iterable(values for _, values in tasks))):
        return parts
    metrics: dict[str, dict[Any, list[Any]]] = {}
    for name, values in tasks:
        for rank, mine in enumerate(values):
            if more := mine.keys() - values[0].keys():
                metric = next(iter(more))
                raise UserError(
                    f"task {name}: process {rank} has the metric {brief(str(metric))} of its documents and process 0 "
                    "has not, and lm-eval would leave it out: run this task with one process"
                )
        metrics[name] = {key: _round_robin([mine.get(key, []) for mine in values]) for key in values[0]}
    return [metrics, *({name: {key: [] for key in found} for name, found in metrics.items()} for _ in parts[1:])]


def _samples_in_order(rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Logged samples of a task, filter by filter, of which each process has its documents in order."""
    filters = dict.fromkeys(row.get("filter") for mine in rows for row in mine)
    found = []
    for name in filters:
        of_filter = _round_robin([[row for row in mine if row.get("filter") == name] for mine in rows])
        # A leaf that cannot run has a document in every process that stands for it.
        stub = bool(of_filter) and isinstance(of_filter[0].get("doc"), dict) and SKIPPED in of_filter[0]["doc"]
        found += of_filter[:1] if stub else of_filter
    return found


def _are_samples(part: Any) -> bool:
    return isinstance(part, list) and all(isinstance(row, dict) and {"doc_id", "filter"} <= row.keys() for row in part)


def _are_metrics(part: Any) -> bool:
    return isinstance(part, dict) and all(isinstance(key, tuple) and len(key) == 2 for key in part)


def _round_robin(lists: list[list[Any]]) -> list[Any]:
    """The first of each, the second of each, …"""
    return [one for one in chain.from_iterable(zip_longest(*lists, fillvalue=_ABSENT)) if one is not _ABSENT]


def _first_line(error: BaseException) -> str:
    return brief(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__), 200)


__all__ = ["Peers", "Place", "check_same", "in_order", "join", "place_of", "rank_of_cache"]
