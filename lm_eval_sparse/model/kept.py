"""A model that stays loaded from one evaluation of this process to the next, as if each had loaded it itself.

Only the process in which a sweep runs its cells turns this on (`keeping`). A model is taken again where everything that
decides its weights and where they lie is the same, its files included; what an evaluation has left on it (attributes,
hooks, replaced methods, buffers, fields of its configurations) is undone before, and weights that it has changed are
loaded anew. Loading may draw random numbers, so the state of the generators is that behind a loading, too.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
import transformers
from torch import Tensor, nn

from . import contents

if TYPE_CHECKING:
    from .lm import SparseHFLM

#: Arguments that spread a model over devices by what is free at the moment, or bring code of their own, whose state
#: nobody knows: such a model is loaded for every cell.
NEVER = (
    "trust_remote_code", "parallelize", "tp_plan", "gpus", "max_memory_per_gpu", "max_cpu_memory", "autogptq",
    "gptqmodel", "device_map", "load_in_8bit", "load_in_4bit",
)  # fmt: skip


@dataclass
class Loaded:
    """A loaded model as it was before anything touched it.

    Attributes:
        key: what decided its weights and where they lie.
        drawn: states of the generators of random numbers, before it was loaded and after.
        weights: the hash of its parameters and lasting buffers.
        modules: module -> its class and attributes.
        configs: configuration -> its fields.
        buffers: buffers that no file holds, and copies of them.
    """

    key: str
    model: nn.Module
    drawn: tuple[list[Any], list[Any]]
    weights: str
    modules: dict[nn.Module, tuple[type, dict[str, Any]]] = field(default_factory=dict)
    configs: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.modules = {module: (type(module), _copied(module.__dict__)) for module in self.model.modules()}
        lasting = {id(tensor) for tensor in self.model.state_dict(keep_vars=True).values()}
        own = [buffer for buffer in self.model.buffers() if id(buffer) not in lasting]
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in own]
        configs = _configs(self.model)
        # Configurations that are part of others stay the very objects that modules hold.
        self.configs = [(config, _fields(config, configs)) for config in configs.values()]

    def restore(self) -> None:
        """Undo whatever was done to the model since, its weights excepted."""
        for module, (kind, attributes) in self.modules.items():
            if type(module) is not kind:
                module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(_copied(attributes))
        known = {id(config): config for config, _ in self.configs}
        for config, fields in self.configs:
            config.__dict__.clear()
            config.__dict__.update(copy.deepcopy(fields, dict(known)))
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)
        for parameter in self.model.parameters():
            parameter.grad = None


class Shelf:
    """Beginnings of prompts that a kept model has read densely, for evaluations to come.

    Evaluations read the same prompts in the same order, so the one unused for longest is the next to be asked for: what
    this evaluation and the one before it have used stays, and only what is older makes room.

    Args:
        limit: bytes that are held at most; None for half of what is free on the device when the first one comes.
    """

    def __init__(self, limit: int | None):
        self.limit, self.bytes = limit, 0
        #: Tokens -> what is kept of them, its bytes, and the evaluation that used it last.
        self._held: OrderedDict[tuple[int, ...], tuple[Any, int, int]] = OrderedDict()
        self._evaluation, self._used = 0, False

    def get(self, tokens: Sequence[int]) -> Any:
        """What is kept of these very tokens, or None."""
        found = self._held.get(key := tuple(tokens))
        if found is None:
            return None
        self._use(key, *found[:2])
        return found[0]

    def _use(self, key: tuple[int, ...], made: Any, size: int) -> None:
        self._held[key] = made, size, self._evaluation
        self._held.move_to_end(key)
        self._used = True

    def turn(self) -> None:
        """An evaluation has ended. One that has used nothing here does not count."""
        self._evaluation += self._used
        self._used = False

    def put(self, tokens: Sequence[int], size: int, free: int, make: Callable[[], Any]) -> Any:
        """Keep what `make` makes, of `size` bytes, where there is room or can be made; returns it, or None.

        Args:
            free: bytes that could be allocated now.
        """
        if self.limit is None:
            self.limit = free // 2
        if size > self.limit or (key := tuple(tokens)) in self._held:
            return None
        while self._held and self.bytes + size > self.limit:
            oldest, (_, less, used) = next(iter(self._held.items()))
            if used >= self._evaluation - 1:
                return None
            del self._held[oldest]
            self.bytes -= less
            free += less
        if size > free // 2:
            return None
        made = make()
        self._use(key, made, size)
        self.bytes += size
        return made

    def clear(self) -> int:
        """Hold nothing; returns the bytes that were held."""
        held, self.bytes = self.bytes, 0
        self._held.clear()
        return held


class Keeper:
    """Holds the model of the evaluation before, for the next one.

    Args:
        limit: see `Shelf`; 0 keeps no prompt.
    """

    def __init__(self, limit: int | None = 0) -> None:
        self.shelf = Shelf(limit)
        self.loaded: Loaded | None = None
        #: How often a model was loaded, and how often one was there.
        self.loadings = self.taken = 0

    def settle(self) -> None:
        """Let go of what the evaluation that has ended leaves on the model, and of the memory that it held."""
        self.shelf.turn()
        if self.loaded is not None:
            self.loaded.restore()
        gc.collect()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # Linux: the most that the process held begins anew
                Path("/proc/self/clear_refs").write_text("5")

    def drop(self) -> None:
        """Hold nothing."""
        self.loaded = None
        self.shelf.clear()
        self.settle()

    @contextmanager
    def loading(self, lm: SparseHFLM, pretrained: str, options: Mapping[str, Any]) -> Iterator[bool]:
        """Around the loading of a model into `lm`; gives whether it is there already, and nothing is to be done."""
        key = identity(lm, pretrained, options)
        before = _drawn()
        if self._fits(key, before):
            lm._model = self.loaded.model
            _draw_on(self.loaded.drawn[1])
            self.taken += 1
            yield True
            return
        self.drop()
        yield False
        self.loadings += 1
        model = getattr(lm, "_model", None)
        if key is not None and isinstance(model, nn.Module):
            self.loaded = Loaded(key, model, (before, _drawn()), contents.weights(model))

    def _fits(self, key: str | None, drawn: list[Any]) -> bool:
        found = self.loaded
        if found is None or key is None or found.key != key:
            return False
        before, after = found.drawn
        if not _same(before, after) and not _same(before, drawn):  # loading drew numbers, from other seeds than now
            return False
        found.restore()
        if _same(before, after):
            found.drawn = drawn, drawn
        return contents.weights(found.model) == found.weights


def identity(lm: SparseHFLM, pretrained: str, options: Mapping[str, Any]) -> str | None:
    """What decides the weights of a model and where they lie, as a text; None where that is not all known."""
    if any(options.get(name) or lm.model_args.get(name) for name in NEVER):
        return None
    files: dict[str, Any] = {}
    for name in (pretrained, options.get("peft"), options.get("delta"), lm.model_args.get("tokenizer")):
        if name is None or not isinstance(name, str):
            continue
        if os.path.isdir(name):
            files[name] = _files(Path(name))
        elif name == pretrained and (commit := getattr(lm.config, "_commit_hash", None)):
            files[name] = commit
        else:
            return None
    typed = {name: value for name, value in lm.model_args.items() if name not in ("batch_size", "max_batch_size")}
    parts = [pretrained, sorted(options.items(), key=str), sorted(typed.items(), key=str), sorted(files.items())]
    text = repr([*parts, str(lm.device), torch.get_default_dtype()])
    return None if " at 0x" in text else text  # objects that say nothing of themselves


def _files(folder: Path) -> list[tuple[Any, ...]]:
    """Each file of a folder, with what changes when it is written."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            try:
                stat = os.stat(path)
            except OSError:
                continue
            found.append((path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return sorted(found)


def _copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a module with containers of their own: what is registered later does not get into them."""
    kinds = dict, list, set
    return {name: copy.copy(value) if isinstance(value, kinds) else value for name, value in attributes.items()}


def _configs(model: nn.Module) -> dict[int, Any]:
    """All configurations that a model holds, by identity: those of its parts, and those that are part of others."""
    kinds = transformers.PretrainedConfig, transformers.GenerationConfig
    waiting = [value for module in model.modules() for value in module.__dict__.values() if isinstance(value, kinds)]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [value for value in vars(config).values() if isinstance(value, kinds)]
    return found


def _fields(config: Any, known: Mapping[int, Any]) -> dict[str, Any]:
    return copy.deepcopy(vars(config), dict(known))


def _drawn() -> list[Any]:
    """The states of all generators of random numbers."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [random.getstate(), numpy.random.get_state(), torch.get_rng_state(), *cuda]


def _draw_on(states: list[Any]) -> None:
    own, numbers, torchs, *cuda = states
    random.setstate(own)
    numpy.random.set_state(numbers)
    torch.set_rng_state(torchs)
    if cuda and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return torch.equal(left, right)
    if isinstance(left, numpy.ndarray):
        return bool(numpy.array_equal(left, right))
    if isinstance(left, list | tuple) and not (left and isinstance(left[0], int)):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right


_keeper: Keeper | None = None


@contextmanager
def keeping(limit: int | None = 0) -> Iterator[Keeper]:
    """Inside the block models stay loaded from one evaluation to the next, and prompts that they have read.

    Args:
        limit: see `Keeper`.
    """
    global _keeper
    before, _keeper = _keeper, Keeper(limit)
    try:
        yield _keeper
    finally:
        _keeper = before


@contextmanager
def loading(lm: SparseHFLM, pretrained: str, options: Mapping[str, Any]) -> Iterator[bool]:
    """As `Keeper.loading`, where models are kept; else nothing is ever there."""
    if _keeper is None:
        yield False
    else:
        with _keeper.loading(lm, pretrained, options) as there:
            yield there


def shelf_of(model: nn.Module) -> Shelf | None:
    """Where prompts that `model` has read are kept; None for a model that is not, and where none are to be."""
    if _keeper is None or _keeper.shelf.limit == 0 or _keeper.loaded is None or _keeper.loaded.model is not model:
        return None
    return _keeper.shelf


__all__ = ["Keeper", "Shelf", "keeping", "loading", "shelf_of"]
