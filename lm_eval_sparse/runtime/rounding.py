"""For which numbers of rows the products of a model round alike, on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

#: Rows at most that are decoded side by side on a CPU, and what their number may be a multiple of.
CPU_ROWS, CPU_MULTIPLES = 16, (2, 4, 8)
#: Entries of each product that are compared for every number of rows: other sums round to the same half-precision
#: number nearly always (four of 100,000 differed where a product with two rows was summed in another order).
COMPARED = 1 << 19
PRODUCTS = (torch.bfloat16, torch.float16, torch.float32)

#: Rows of a tile, the first that will do, in which answers are scored side by side on a GPU: up to some 256 rows a
#: product takes as long as with one, since the weights have to be read.
GPU_TILES = (256, 128, 64, 32)

_alike: dict[tuple[Any, ...], frozenset[int]] = {}


@torch.no_grad()
def rows_alike(model: torch.nn.Module) -> int | None:
    """The least number of rows for whose multiples all products of a model on a CPU round alike, or None.

    Sizes and rows decide by which kernel a product is made, and in which order that one sums.
    """
    found = frozenset(range(1, CPU_ROWS + 1))
    for module in model.modules():
        # What is quantized goes other ways, and is left to the trial before rows are decoded side by side.
        if type(module) in (torch.nn.Linear, Conv1D) and module.weight.dtype in PRODUCTS:
            weight, biased = module.weight, module.bias is not None
            kind = type(module), tuple(weight.shape), biased, weight.dtype, torch.get_num_threads()
            if kind not in _alike:
                _alike[kind] = _widths_alike(module)
            found &= _alike[kind]
    for multiple in CPU_MULTIPLES:
        if found.issuperset(range(multiple, CPU_ROWS + 1, multiple)):
            return multiple
    return None


def _widths_alike(module: torch.nn.Module) -> frozenset[int]:
    """Even numbers of rows for which a layer gives what it gives for `CPU_ROWS` rows."""
    inputs, outputs = module.weight.shape if type(module) is Conv1D else reversed(module.weight.shape)
    widths = set(range(2, CPU_ROWS + 1, 2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(-(-COMPARED // (outputs * CPU_ROWS))):
        rows = torch.randn(CPU_ROWS, 1, inputs, generator=generator).to(module.weight.dtype)
        together = module.forward(rows)
        for width in sorted(widths - {CPU_ROWS}):
            parts = [module.forward(part.contiguous()) for part in rows.split(width)[: CPU_ROWS // width]]
            if not torch.equal(torch.cat(parts), together[: len(parts) * width]):
                widths.discard(width)
    return frozenset(widths)


def is_routed(model: torch.nn.Module) -> bool:
    """Whether a model sends each row to some of many experts: how many rows a product of theirs has depends on all."""
    for name, module in model.named_modules():
        if "expert" in name.lower() or "expert" in type(module).__name__.lower():
            return True
        stacked = any(weight.dim() == 3 for weight in module.parameters(recurse=False))
        if stacked and not isinstance(module, torch.nn.modules.conv._ConvNd):
            return True
    return False


@torch.no_grad()
def tile_alike(model: torch.nn.Module) -> int | None:
    """The rows of a tile in which it makes no difference to a row where it stands, in any product of a model on a GPU;
    None where there is none."""
    layers = {
        (type(module), tuple(module.weight.shape), module.bias is not None, module.weight.dtype): module
        for module in model.modules()
        # What is quantized goes other ways, and is left to the trial.
        if type(module) in (torch.nn.Linear, Conv1D) and module.weight.dtype in PRODUCTS
    }
    return next((rows for rows in GPU_TILES if all(_places_alike(layer, rows) for layer in layers.values())), None)


def _places_alike(module: torch.nn.Module, rows: int) -> bool:
    """Whether a layer gives every row the same wherever it stands among so many."""
    weight = module.weight
    inputs = weight.shape[0] if type(module) is Conv1D else weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(rows, 1, inputs, generator=generator).to(weight.device, weight.dtype)
    found = module.forward(given)
    others = (torch.arange(rows).roll(shift) for shift in (1, rows // 2 + 1))
    return all(
        torch.equal(module.forward(given[order]), found[order]) for order in (*others, torch.arange(rows).flip(0))
    )
