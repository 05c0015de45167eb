"""The parameters that The Sparse Frontier ran (its Table 3), by prompt length and sparsity; each method holds its own.

With `preset=paper` the knobs of a method come from here instead of being solved: the runs of the paper as they were.
Their measured sparsity depends on the data (verticals and slashes were calibrated on the authors' models), so nothing
is promised; what was executed is in the results as always.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError, nearest

if TYPE_CHECKING:
    from .base import Method

#: Budgets (1 - sparsity) of the columns, densest last.
TEN = (0.05, 1 / 15, 0.1, 2 / 15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SEVEN = (0.05, 1 / 15, 0.1, 2 / 15, 0.2, 1 / 3, 0.5)

#: Tokens that an eviction method keeps.
CAPACITY_TABLE = {
    16384: (819, 1092, 1638, 2183, 3276, 4915, 6553, 8192, 9830, 11468),
    32768: (1638, 2185, 3276, 4367, 6553, 9830, 13107, 16384, 19660, 22937),
    65536: (3276, 4371, 6553, 8735, 13107, 19660, 26214, 32768, 39321, 45875),
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


def rows(table: dict[int, tuple], knobs: int = 1) -> dict[int, tuple]:
    """Rows of cells whose `knobs` knobs have the same value."""
    return {length: tuple((value,) * knobs for value in row) for length, row in table.items()}


CAPACITY = rows(CAPACITY_TABLE)

#: Names of presets; each is the attribute of a method that holds its `Parameters`, or None.
PRESETS = ("paper",)

#: A prompt belongs to a length when it fills at least this share of it.
FILL = 0.9


def check(preset: str, method: Method, sparsity: float | None) -> None:
    """Raise `UserError` unless the preset has this method at this sparsity, and goes with the knobs given besides."""
    if preset not in PRESETS:
        raise UserError(f"preset={preset!r} is unknown{nearest(preset, PRESETS)} (accepted: {', '.join(PRESETS)})")
    own = of(preset, type(method))
    if own is None:
        from .registry import METHODS

        known = ", ".join(name for name, cls in METHODS.items() if of(preset, cls) is not None)
        raise UserError(f"preset={preset} has no parameters for {method.name} (it has {known})")
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


def of(preset: str | None, method: type[Method]) -> Parameters | None:
    """What a preset has for a method; None of an unknown preset, or method."""
    return getattr(method, preset, None) if preset in PRESETS else None


def fixed(preset: str | None, method: type[Method]) -> Mapping[str, Any]:
    """The knobs that a preset has for a method at all lengths and sparsities; none of an unknown preset or method."""
    own = of(preset, method)
    return {} if own is None else own.fixed


def window(preset: str | None, method: type[Method], told: int | None = None) -> int | None:
    """`window` of a method for prompts whose task says `told`; None where the task does not decide it."""
    own = of(preset, method)
    default = None if own is None else own.window
    return default if default is None or told is None else told


def shortest(preset: str, method: type[Method]) -> int:
    """The shortest prompt, in tokens, that the preset has parameters for."""
    return math.ceil(FILL * min(of(preset, method).rows))


def lookup(preset: str, method: Method, sparsity: float, length: int) -> Method:
    """`method` with the preset's knobs for a prompt of `length` tokens; raises `UserError` for a length it lacks.

    What the preset has for all cells, and the window, are left as they are: they may have been typed.
    """
    own = of(preset, type(method))
    for nominal, row in own.rows.items():
        if FILL * nominal <= length <= nominal:
            return replace(method, **dict(zip(own.names, row[own.column(sparsity)], strict=True)))
    spans = ", ".join(f"{math.ceil(FILL * nominal)}-{nominal}" for nominal in own.rows)
    raise UserError(
        f"preset={preset} has no parameters of {method.name} for a prompt of {length} tokens (it has {spans}): "
        "use tasks of those lengths, or leave preset out to have the knobs solved for the sparsity"
    )
