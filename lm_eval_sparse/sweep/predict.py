"""What a sweep will take, before it runs: time from cells that are done, else from operations; memory from sizes; and
what its numbers of documents could certify at best."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .cell import Cell

#: Tokens that prompts of a length aim at.
TOKENS = {"4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768, "64k": 65536, "128k": 128000}
#: Operations a second that are taken where nothing was measured: about a third of what the devices have on paper.
RATES = {"cuda": 2e14, "cpu": 5e10}
#: Documents of a task that was given no number, as tasks of this package have them.
_DOCUMENTS = 100
#: Bytes beside weights, keys and values: the device's own, and a layer's activations for each token of a prompt.
_OWN = 1.5 * 2**30


@dataclass(frozen=True)
class Facts:
    """What is known of a model before it is loaded.

    Attributes:
        parameters: of the model. `weight_bytes`: what they take as they will be loaded.
        kv_bytes: keys and values of one token in all layers.
        attention: operations of full attention for a pair of tokens, all layers.
        activation: bytes of a layer's activations for a token.
    """

    parameters: int
    weight_bytes: int
    kv_bytes: int
    attention: int
    activation: int


def memory(cell: Cell, facts: Facts) -> float:
    """Bytes that a cell needs on its device, about: weights, keys and values of its longest batch, activations."""
    batch = cell.run.get("batch_size", 1)
    rows = batch if isinstance(batch, int) else 1
    tokens = TOKENS.get(cell.length or "", 4096)
    return facts.weight_bytes + tokens * (facts.kv_bytes * rows + facts.activation) + _OWN


def operations(cell: Cell, facts: Facts) -> float:
    """Operations of a dense prefill of one of its documents; two for each weight and token."""
    tokens = TOKENS.get(cell.length or "", 4096)
    return 2.0 * facts.parameters * tokens + facts.attention * tokens**2 / 2


@dataclass(frozen=True)
class Expected:
    """Seconds that cells take, by address, and of how many that was measured on others like them."""

    seconds: Mapping[str, float]
    measured: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def time(
    cells: Iterable[Cell],
    facts: Mapping[str, Facts],
    done: Mapping[str, tuple[Cell, float]],
    device: str,
) -> Expected:
    """What cells take, each in a process alone.

    Args:
        facts: by model; a model without any counts nothing where no cell of it is done.
        done: cells that are done, with their seconds.
        device: `cuda` or `cpu`.
    """
    alike: dict[tuple[str, ...], list[float]] = defaultdict(list)
    rates: list[float] = []
    for cell, seconds in done.values():
        each = seconds / _documents(cell)
        alike[cell.model, str(cell.length), cell.method].append(each)
        alike[cell.model, str(cell.length)].append(each)
        if cell.model in facts and each > 0:
            rates.append(operations(cell, facts[cell.model]) / each)
    rate = sum(rates) / len(rates) if rates else RATES[device]
    found, measured = {}, 0
    for cell in cells:
        known = alike.get((cell.model, str(cell.length), cell.method)) or alike.get((cell.model, str(cell.length)))
        if known:
            measured += 1
            found[cell.address] = sum(known) / len(known) * _documents(cell)
        elif cell.model in facts:
            found[cell.address] = operations(cell, facts[cell.model]) / rate * _documents(cell)
        else:
            found[cell.address] = 0.0
    return Expected(found, measured)


def _documents(cell: Cell) -> int:
    return cell.limit or _DOCUMENTS


__all__ = ["Expected", "Facts", "memory", "operations", "time"]
