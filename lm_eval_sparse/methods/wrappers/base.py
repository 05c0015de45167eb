"""What a wrapper is: a method of the phase of the one inside, which it asks and whose selection it changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from ...kernels.types import Reads, Slot
from ..base import Budget, Call, Layer, Method


@dataclass(frozen=True)
class Wrapper(Method):
    """A method around another one.

    A subclass names the phases whose methods it goes around (`wraps`), has knobs of its own, and writes `select`, which
    may ask `self.inner` with a call of another budget (`dataclasses.replace(call, budget=...)`). All else is that of
    the method inside unless it says otherwise.
    """

    phase: ClassVar[str] = "wrapper"
    wraps: ClassVar[tuple[str, ...]]
    unit: ClassVar[str] = "as inside"
    kv: ClassVar[str] = "as inside"
    #: New tokens are stored before the method inside is asked, and its lists are complete when it answers.
    appends: ClassVar[bool] = False
    #: What a wrapper does with keys and state itself may not know sequences that share their beginnings.
    shares: ClassVar[bool] = False

    inner: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner is None:
            raise ValueError(f"{type(self).name} has no method inside; expected one of phase {' or '.join(self.wraps)}")
        for name, value in (("name", f"{type(self).name}:{self.inner.name}"), ("phase", self.inner.phase)):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    @classmethod
    def refuses(cls, inside: type[Method]) -> str | None:
        """Why this does not go around a method of a phase that it wraps, as words behind the method's name; or None."""
        return None

    @classmethod
    def knobs(cls) -> dict[str, Any]:
        return {name: default for name, default in super().knobs().items() if name != "inner"}

    # Asked of the method inside; a wrapper that knows better overrides it.

    def check_native(self) -> None:
        self.inner.check_native()

    def too_short(self, sparsity: float | None, length: int) -> str | None:
        return self.inner.too_short(sparsity, length)

    def largest_sparsity(self, length: int) -> float:
        return self.inner.largest_sparsity(length)

    def knobs_for(self, sparsity: float, length: int, layer: Layer | None = None) -> Wrapper:
        return replace(self, inner=self.inner.knobs_for(sparsity, length, layer))

    def as_native(self) -> Wrapper:
        return replace(self, inner=self.inner.as_native())

    def native_budget(self) -> Budget:
        return self.inner.native_budget()

    def slots(self) -> tuple[Slot, ...]:
        return self.inner.slots()

    def prefilled(self, call: Call) -> None:
        self.inner.prefilled(call)

    def appended(self, call: Call, before: Tensor) -> None:
        self.inner.appended(call, before)

    def attended(self, call: Call, reads: Reads, mass: Tensor) -> None:
        self.inner.attended(call, reads, mass)

    @property
    def page_size(self) -> int:
        return self.inner.page_size

    @property
    def read_unit(self) -> int:
        return self.inner.read_unit

    def cost(self, visible: Tensor, read: Tensor, group: int, dim: int, element: int) -> tuple[Tensor, Tensor]:
        return self.inner.cost(visible, read, group, dim, element)

    @property
    def looks_back(self) -> int:
        return self.inner.looks_back

    @property
    def wants_mass(self) -> bool:
        return self.inner.wants_mass
