"""The parameters that The Sparse Frontier ran (its Table 3), by prompt length and sparsity.

With `preset=paper` the knobs of a method come from here instead of being solved: the runs of the paper as they were.
Their measured sparsity depends on the data (verticals and slashes were calibrated on the authors' models), so nothing
is promised; what was executed is in the results as always.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UserError, nearest
from .base import Method

#: Budgets (1 - sparsity) of the columns, densest last.
TEN = (0.05, 1 / 15, 0.1, 2 / 15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SEVEN = (0.05, 1 / 15, 0.1, 2 / 15, 0.2, 1 / 3, 0.5)

_COUNTS = {
    16384: (164, 240, 315, 400, 448, 576, 768, 1024, 1536, 2304),
    32768: (290, 384, 448, 576, 704, 1024, 1536, 2304, 3584, 4608),
    65536: (400, 448, 544, 640, 960, 1280, 2304, 4096, 6144, 8192),
    128000: (480, 768, 1024, 1536, 2048, 3584, 5632, 10240, 13312, 18432),
}
_COVERAGE = {
    16384: ((0, 164), (0, 240), (0, 315), (0, 400), (0.55, 512), (0.71, 512), (0.88, 512)),
    32768: ((0, 290), (0, 384), (0.45, 512), (0.6, 512), (0.7, 512), (0.8, 512), (0.92, 512)),
    65536: ((0, 400), (0.45, 512), (0.55, 512), (0.7, 512), (0.77, 512), (0.85, 512), (0.94, 512)),
}
_BLOCKS = {
    16384: (26, 35, 53, 71, 108, 188, 300),
    32768: (52, 69, 105, 141, 216, 376, 600),
    65536: (104, 139, 210, 283, 432, 752, 1200),
}
_CAPACITY = {
    16384: (819, 1092, 1638, 2183, 3276, 4915, 6553, 8192, 9830, 11468),
    32768: (1638, 2185, 3276, 4367, 6553, 9830, 13107, 16384, 19660, 22937),
    65536: (3276, 4371, 6553, 8735, 13107, 19660, 26214, 32768, 39321, 45875),
    128000: (6400, 8544, 12800, 17056, 25600, 38400, 51200, 64000, 76800, 89600),
}
_PAGES = {
    16384: (816, 1088, 1632, 2176, 3280, 4912, 6560, 8192, 9824, 11472),
    32768: (1632, 2192, 3280, 4368, 6560, 9824, 13104, 16384, 19664, 22944),
    65536: (3280, 4368, 6560, 8736, 13104, 19664, 26208, 32768, 39328, 45872),
    128000: (6400, 8544, 12800, 17056, 25600, 38400, 51200, 64000, 76800, 89600),
}


@dataclass(frozen=True)
class Parameters:
    """What a preset has for one method.

    Attributes:
        budgets: the columns, as shares that are kept.
        names: the knobs that a cell gives.
        rows: prompt length (tokens) -> the knobs' values for each budget.
        fixed: knobs that are the same in every cell. What is typed comes before them, and before the window.
        window: `window` for prompts whose task does not say one (`protocol.Prompt`); None where no task decides it.
    """

    budgets: tuple[float, ...]
    names: tuple[str, ...]
    rows: dict[int, tuple]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    window: int | None = None

    def column(self, sparsity: float) -> int | None:
        """Index of the budget that `sparsity` names, to two digits as the paper prints them, or None."""
        found = [i for i, budget in enumerate(self.budgets) if abs(1 - budget - sparsity) < 0.005]
        return found[0] if found else None


def _rows(table: dict[int, tuple], knobs: int = 1) -> dict[int, tuple]:
    """Rows of cells whose `knobs` knobs have the same value."""
    return {length: tuple((value,) * knobs for value in row) for length, row in table.items()}


#: Table 3; windows, and the block left of the diagonal that the authors' code forces: section 3.
PAPER: dict[str, Parameters] = {
    "vertical_slash": Parameters(TEN, ("verticals", "slashes"), _rows(_COUNTS, 2), window=256),
    "flexprefill_vs": Parameters(SEVEN, ("alpha", "min_budget"), _COVERAGE, window=256),
    "block_sparse": Parameters(SEVEN, ("top_k",), _rows(_BLOCKS), fixed={"subdiagonal": True}),
    "snapkv": Parameters(TEN, ("capacity",), _rows(_CAPACITY)),
    "ada_snapkv": Parameters(TEN, ("capacity",), _rows(_CAPACITY)),
    "quest": Parameters(TEN, ("budget",), _rows(_PAGES)),
}
PRESETS = {"paper": PAPER}

#: A prompt belongs to a length when it fills at least this share of it.
FILL = 0.9


def check(preset: str, method: Method, sparsity: float | None) -> None:
    """Raise `UserError` unless the preset has this method at this sparsity, and goes with the knobs given besides."""
    if preset not in PRESETS:
        raise UserError(f"preset={preset!r} is unknown{nearest(preset, PRESETS)} (accepted: {', '.join(PRESETS)})")
    table = PRESETS[preset]
    if method.name not in table:
        raise UserError(f"preset={preset} has no parameters for {method.name} (it has {', '.join(table)})")
    own = table[method.name]
    accepted = ", ".join(f"{1 - budget:.3g}" for budget in own.budgets)
    if sparsity is None:
        raise UserError(f"preset={preset} needs the sparsity whose parameters are meant: give one of {accepted}")
    if sparsity == 0:
        return
    if own.column(sparsity) is None:
        raise UserError(
            f"preset={preset} has no parameters of {method.name} for sparsity={sparsity:g}: give {accepted}"
        )
    for nominal in own.rows:
        try:
            lookup(preset, method, sparsity, nominal).check_native()
        except UserError as error:
            given = ", ".join(
                f"{name}={getattr(method, name)}"
                for name, default in method.knobs().items()
                if getattr(method, name) != own.fixed.get(name, default)
            )
            raise UserError(
                f"preset={preset} does not go with {given} at {nominal} tokens ({error}): leave {given} out, or leave "
                "preset out to have the knobs solved for the sparsity"
            ) from error


def fixed(preset: str | None, name: str) -> Mapping[str, Any]:
    """The knobs that a preset has for a method at all lengths and sparsities; none of an unknown preset or method."""
    own = PRESETS.get(preset or "", {}).get(name)
    return {} if own is None else own.fixed


def window(preset: str | None, name: str, told: int | None = None) -> int | None:
    """`window` of a method for prompts whose task says `told`; None where the task does not decide it."""
    own = PRESETS.get(preset or "", {}).get(name)
    default = None if own is None else own.window
    return default if default is None or told is None else told


def shortest(preset: str, method: type[Method]) -> int:
    """The shortest prompt, in tokens, that the preset has parameters for."""
    return math.ceil(FILL * min(PRESETS[preset][method.name].rows))


def lookup(preset: str, method: Method, sparsity: float, length: int) -> Method:
    """`method` with the preset's knobs for a prompt of `length` tokens; raises `UserError` for a length it lacks.

    What the preset has for all cells, and the window, are left as they are: they may have been typed.
    """
    own = PRESETS[preset][method.name]
    for nominal, row in own.rows.items():
        if FILL * nominal <= length <= nominal:
            return replace(method, **dict(zip(own.names, row[own.column(sparsity)], strict=True)))
    spans = ", ".join(f"{math.ceil(FILL * nominal)}-{nominal}" for nominal in own.rows)
    raise UserError(
        f"preset={preset} has no parameters of {method.name} for a prompt of {length} tokens (it has {spans}): "
        "use tasks of those lengths, or leave preset out to have the knobs solved for the sparsity"
    )
