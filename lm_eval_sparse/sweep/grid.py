"""What a grid file says, as cells. Whatever it does not understand is refused with key, line, and what is accepted.

A file is one block of axes, or several under `blocks`, each with what stands beside `blocks` as its defaults. A block
gives models × methods × sparsities × tasks × lengths × backends × seeds, and dense attention once for all methods.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import paths, spelling
from ..errors import UserError, nearest
from ..labels import label
from ..results.files import brief
from .cell import ASKING, COMMAND_LINE, IDLE, Cell, documents_of
from .document import Document

#: More cells than these are a slip of the pen.
MOST_CELLS = 100_000
#: Names of lengths as the tasks of this package end in them.
LENGTHS = ("4k", "8k", "16k", "32k", "64k", "128k")
PHASES = ("prefill_sparsity", "kv_sparsity", "decode_sparsity")
#: Where a sparsity may be asked for, `native` says that a method's own knobs are its budget.
NATIVE = "native"

#: What may run code that comes with a model or with tasks.
_CODE = ("trust_remote_code", "include_path")
_BLOCK = (
    "models", "methods", "tasks", "lengths", "sparsities", "backends", "seeds", "limit", "dense", "options", "run",
)  # fmt: skip
_TOP = ("name", "blocks", *_BLOCK)
_METHOD = ("method", "sparsity", *PHASES, "knobs", "preset", "backends", "lengths", "tasks")


@dataclass(frozen=True)
class Grid:
    """A grid file.

    Attributes:
        name: what its ledger is called.
        cells: in the order in which they run: model by model, the shortest prompts first, dense before sparse.
        places: of each address the line that asks for it, for messages.
    """

    name: str
    cells: tuple[Cell, ...]
    places: Mapping[str, str] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Cell]:
        """A cell of each model, by name."""
        return {cell.model: cell for cell in reversed(self.cells)}


def shard(cells: Sequence[Cell], number: int, of: int) -> list[Cell]:
    """The part of `cells` that shard `number` (from 1) of `of` runs; all shards together run each cell once.

    Cells on the same documents stay together, since what one has prefilled the next may use, unless there are fewer
    such groups than shards.
    """
    groups: dict[tuple[object, ...], int] = {}
    for cell in cells:
        groups.setdefault(documents_of(cell), len(groups))
    whole = len(groups) >= of
    return [cell for at, cell in enumerate(cells) if (groups[documents_of(cell)] if whole else at) % of == number - 1]


def read(path: Path, *, allow_code: bool = False) -> Grid:
    """A grid file.

    Args:
        allow_code: whether a method may be a file of somebody's own, `path.py:Class`.

    Raises:
        UserError: the file is no grid; the message begins with file, line and key.
    """
    document = Document(path)
    top = _mapping(document, (), document.value, _TOP)
    name = top.get("name", path.stem)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,80}", name) or name.startswith("."):
        raise UserError(f"{document.where('name')}: {brief(name)} is no name; letters, digits, '.', '_' and '-' are")
    blocks = top.get("blocks")
    places: list[tuple[tuple[str | int, ...], dict[str, Any]]] = [((), top)]
    if blocks is not None:
        shared = {key: value for key, value in top.items() if key in _BLOCK}
        places = []
        for at, block in enumerate(_list(document, ("blocks",), blocks)):
            own = _mapping(document, ("blocks", at), block, _BLOCK)
            places.append((("blocks", at), {**shared, **own}))
    found: dict[str, Cell] = {}
    where: dict[str, str] = {}
    for place, block in places:
        reader = _Block(document, place, block, allow_code)
        for cell in reader.cells():
            if cell.address not in found and len(found) >= MOST_CELLS:
                raise UserError(f"{document.where(*place)}: more than {MOST_CELLS:,} cells; take fewer values")
            found.setdefault(cell.address, cell)
            where.setdefault(cell.address, document.where(*place))
    return Grid(name, tuple(_ordered(found.values())), where)


def _ordered(cells: Any) -> list[Cell]:
    several = list(cells)
    models = {name: at for at, name in enumerate(dict.fromkeys(cell.model for cell in several))}
    tasks = {name: at for at, name in enumerate(dict.fromkeys(cell.task for cell in several))}
    lengths = {name: at for at, name in enumerate((None, *LENGTHS))}
    # Cells on the same documents follow each other: what one has prefilled the next may use.
    return sorted(
        several,
        key=lambda cell: (models[cell.model], lengths.get(cell.length, len(lengths)), tasks[cell.task],
                          cell.seed or 0, not cell.is_dense),
    )  # fmt: skip


class _Block:
    """One block of axes."""

    def __init__(self, document: Document, place: tuple[str | int, ...], block: dict[str, Any], allow_code: bool):
        self.document, self.place, self.block, self.allow_code = document, place, block, allow_code

    def _at(self, *place: str | int) -> tuple[str | int, ...]:
        """Where a value stands: in the block, or among the defaults."""
        own = (*self.place, *place)
        return own if self.document.holds(own) else place

    def _where(self, *place: str | int) -> str:
        return self.document.where(*self._at(*place))

    def _axis(self, name: str, default: list[Any] | None = None) -> list[Any]:
        if name not in self.block:
            if default is None:
                raise UserError(f"{self._where()}: {name} is missing; give {name}: [...]")
            return default
        return _list(self.document, self._at(name), self.block[name])

    def cells(self) -> Iterator[Cell]:
        models = list(self._models())
        backends, seeds = self._axis("backends", [None]), self._axis("seeds", [None])
        for at, backend in enumerate(backends):
            if backend is not None and not isinstance(backend, str):
                raise UserError(f"{self._where('backends', at)}: {brief(backend)}: the name of a backend is expected")
        for at, seed in enumerate(seeds):
            if seed is not None and (not _is_whole(seed) or seed < 0):
                raise UserError(f"{self._where('seeds', at)}: {brief(seed)}: a whole number is expected, such as 0")
        options, run = self._options("options", ASKING), self._options("run", (*COMMAND_LINE, *IDLE))
        dense = self.block.get("dense", True)
        if not isinstance(dense, bool):
            raise UserError(f"{self._where('dense')}: {brief(dense)}: true or false is expected")
        methods = list(self._methods(backends))
        if not methods and not dense:
            raise UserError(f"{self._where()}: no method and no dense attention; give methods: [...]")
        tasks = list(self._tasks())
        for (name, pretrained, model_args), (task, short, length), seed in itertools.product(models, tasks, seeds):
            limit = self._limit(length)
            of = functools.partial(
                Cell, name, pretrained, model_args, task=task, length=length, limit=limit, seed=seed, options=options,
                run=run,
            )  # fmt: skip
            if dense:
                yield of(sparse={"method": "dense", "sparsity": 0})
            for sparse, lengths, own in methods:
                if (lengths is None or length in lengths) and (own is None or short in own or task in own):
                    yield of(sparse=sparse)

    # -- models

    def _models(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        names: set[str] = set()
        for at, given in enumerate(self._axis("models")):
            where = self._where("models", at)
            model = {"pretrained": given} if isinstance(given, str) else given
            if not isinstance(model, dict) or not isinstance(model.get("pretrained"), str) or not model["pretrained"]:
                raise UserError(f"{where}: {brief(given)}: a folder or Hub name is expected, or a mapping with "
                                "pretrained: and further model arguments")  # fmt: skip
            rest = {key: value for key, value in model.items() if key not in ("pretrained", "name")}
            for key in ("method", "sparsity", "backend", "preset", *PHASES):
                if key in rest:
                    raise UserError(f"{self._where('models', at, key)}: this belongs to methods:, not to a model")
            for key in _CODE:
                if rest.get(key) and not self.allow_code:
                    where = self._where("models", at, key)
                    raise UserError(f"{where}: it may run code of others; type --allow-code to let it")
            pretrained = os.path.expandvars(model["pretrained"])
            if paths.looks_local(pretrained):
                pretrained = str(paths.expand(f"{where}.pretrained", pretrained).absolute())
            usual = os.path.basename(os.path.normpath(pretrained)) if paths.looks_local(pretrained) else pretrained
            name = model.get("name", usual)
            if not isinstance(name, str) or not name.strip() or len(name) > 200:
                raise UserError(f"{self._where('models', at, 'name')}: {brief(name)}: a name is expected")
            if name in names:
                raise UserError(f"{where}: a second model is called {label(name)}; give it a name: of its own")
            names.add(name)
            yield name, pretrained, rest

    # -- tasks

    def _tasks(self) -> Iterator[tuple[str, str, str | None]]:
        tasks = self._axis("tasks")
        lengths = self._axis("lengths", [None])
        for at, length in enumerate(lengths):
            if length is not None and length not in LENGTHS:
                raise UserError(f"{self._where('lengths', at)}: {brief(length)}: choose {', '.join(LENGTHS)}"
                                f"{nearest(str(length), LENGTHS)}")  # fmt: skip
        for at, task in enumerate(tasks):
            if not isinstance(task, str) or not re.fullmatch(r"[\w.,/+ ()-]{1,200}", task) or "," in task:
                raise UserError(f"{self._where('tasks', at)}: {brief(task)}: the name of one task is expected")
            ends = task.rpartition("_")[2]
            if ends in LENGTHS:
                if lengths != [None] and ends not in lengths:
                    raise UserError(f"{self._where('tasks', at)}: {task} has a length of its own, which is not in "
                                    "lengths:; leave it out, or the lengths")  # fmt: skip
                yield task, task.removesuffix(f"_{ends}"), ends
                continue
            for length in lengths:
                yield (task if length is None else f"{task}_{length}"), task, length

    def _limit(self, length: str | None) -> int | None:
        given = self.block.get("limit")
        if isinstance(given, dict):
            for key in given:
                if key not in LENGTHS:
                    raise UserError(f"{self._where('limit', key)}: no length; choose {', '.join(LENGTHS)}"
                                    f"{nearest(key, LENGTHS)}")  # fmt: skip
            if length is None or length not in given:
                raise UserError(f"{self._where('limit')}: nothing is said of {length or 'tasks without a length'}")
            value, where = given[length], self._where("limit", length)
        else:
            value, where = given, self._where("limit")
        if value in (None, "all"):
            return None
        if not _is_whole(value) or value < 1:
            raise UserError(f"{where}: {brief(value)}: a number of documents is expected, at least 1, or all")
        return value

    # -- methods

    def _methods(self, backends: list[Any]) -> Iterator[tuple[dict[str, Any], list[str] | None, list[str] | None]]:
        for at, given in enumerate(self._axis("methods", [])):
            place = ("methods", at)
            method = {"method": given} if isinstance(given, str) else given
            method = _mapping(self.document, self._at(*place), method, _METHOD)
            name = method.get("method")
            if not isinstance(name, str) or not name.strip():
                raise UserError(f"{self._where(*place)}: {brief(given)}: the name of a method is expected")
            if name == "dense":
                raise UserError(f"{self._where(*place)}: dense attention is in every grid; leave it out here, or type "
                                "dense: false for none")  # fmt: skip
            self._check_code(name, self._where(*place))
            lengths, tasks = (
                None if key not in method else _list(self.document, self._at(*place, key), method[key])
                for key in ("lengths", "tasks")
            )
            for length in lengths or ():
                if length not in LENGTHS:
                    raise UserError(f"{self._where(*place, 'lengths')}: {brief(length)}: choose {', '.join(LENGTHS)}")
            own = (
                _list(self.document, self._at(*place, "backends"), method["backends"])
                if "backends" in method
                else backends
            )
            for budget, knobs, backend in itertools.product(
                self._budgets(place, method), self._knobs(place, method), own
            ):
                sparse = {"method": name, **budget, **knobs}
                if "preset" in method:
                    sparse["preset"] = method["preset"]
                if backend is not None:
                    sparse["backend"] = backend
                yield sparse, lengths, tasks

    def _check_code(self, name: str, where: str) -> None:
        for part in itertools.chain.from_iterable(spelling.chains(name)):
            if spelling.file_of(part) is not None and not self.allow_code:
                raise UserError(f"{where}: {label(part)} is a file whose code would run; type --allow-code to let it")

    def _budgets(self, place: tuple[str | int, ...], method: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Sparsities that are asked for: one for all phases, or one for each."""
        phases = [phase for phase in PHASES if phase in method]
        if phases and "sparsity" in method:
            raise UserError(f"{self._where(*place)}: give either sparsity or {' and '.join(phases)}")
        if not phases:
            where = (*place, "sparsity") if "sparsity" in method else ("sparsities",)
            values = method.get("sparsity", self.block.get("sparsities"))
            if values is None:
                raise UserError(
                    f"{self._where(*place)}: no sparsity; give sparsities: [.5, .9], or {NATIVE} with knobs"
                )
            return [{} if value == NATIVE else {"sparsity": value} for value in self._shares(where, values)]
        axes = [[(phase, value) for value in self._shares((*place, phase), method[phase])] for phase in phases]
        return [dict(pairs) for pairs in itertools.product(*axes)]

    def _shares(self, place: tuple[str | int, ...], values: Any) -> list[Any]:
        several = values if isinstance(values, list) else [values]
        if not several:
            raise UserError(f"{self._where(*place)}: an empty axis; give at least one value")
        for at, value in enumerate(several):
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1
            if not number and not (value == NATIVE and place[-1] not in PHASES):
                raise UserError(f"{self._where(*place, at)}: {brief(value)}: a number above 0 and below 1 is expected"
                                f"{f', or {NATIVE}' if place[-1] not in PHASES else ''}")  # fmt: skip
        return several

    def _knobs(self, place: tuple[str | int, ...], method: Mapping[str, Any]) -> list[dict[str, Any]]:
        """All combinations of the values of knobs; a list is an axis."""
        given = method.get("knobs", {})
        if not isinstance(given, dict):
            raise UserError(f"{self._where(*place, 'knobs')}: {brief(given)}: a mapping of knobs is expected")
        axes = []
        for name, values in given.items():
            several = values if isinstance(values, list) else [values]
            if not several:
                raise UserError(f"{self._where(*place, 'knobs', name)}: an empty axis; give at least one value")
            axes.append([(name, value) for value in several])
        return [dict(pairs) for pairs in itertools.product(*axes)]

    def _options(self, name: str, accepted: tuple[str, ...]) -> dict[str, Any]:
        if name not in self.block:
            return {}
        found = _mapping(self.document, self._at(name), self.block[name], accepted)
        for key in _CODE:
            if found.get(key) and not self.allow_code:
                raise UserError(f"{self._where(name, key)}: it may run code of others; type --allow-code to let it")
        return dict(found)


def _mapping(document: Document, place: tuple[str | int, ...], value: Any, accepted: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{document.where(*place)}: {brief(value)}: a mapping is expected, with {', '.join(accepted)}")
    for key in value:
        if key not in accepted:
            raise UserError(f"{document.where(*place, key)}: no such key; accepted are {', '.join(accepted)}"
                            f"{nearest(key, accepted)}")  # fmt: skip
    return value


def _list(document: Document, place: tuple[str | int, ...], value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{document.where(*place)}: {brief(value)}: a list is expected, such as [{brief(value)}]")
    if not value:
        raise UserError(f"{document.where(*place)}: an empty axis; give at least one value")
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["LENGTHS", "Grid", "read", "shard"]
