"""What is checked: a method, or wrappers around one, as it is typed behind `method=`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..methods.base import Method
from ..methods.grammar import Chain, chains, typed_chains
from ..methods.registry import BUILT_IN, METHODS, PHASE_ARGUMENTS
from ..methods.wrappers import Wrapper

#: Tokens of the longest prompt that is run under knobs which cover everything, and such a budget.
LONGEST, EVERYTHING = 331, 4096


@dataclass(frozen=True)
class Subject:
    """A method under test.

    Attributes:
        chain: its class, behind the wrappers around it.
    """

    chain: Chain

    @classmethod
    def of(cls, method: str | type[Method]) -> Subject:
        """What is meant by a text as it is typed, such as `twilight:quest`, or by a class.

        A wrapper that is given alone goes around the first built-in method that it can.

        Raises:
            UserError: no such method, or methods of several phases.
        """
        if isinstance(method, str):
            found = list(chains(typed_chains(method)).values())
            if len(found) > 1:
                raise UserError(
                    f"{method!r} joins methods of {len(found)} phases: type one method, such as {found[0].name}"
                )
            if not found:
                raise UserError(f"{method!r} selects nothing, so there is nothing to check: give another method")
            return cls(found[0])
        if isinstance(method, type) and issubclass(method, Wrapper):
            phase = next(iter(getattr(method, "wraps", ())), None)
            return cls(Chain((method, METHODS[first_of(phase)]))) if phase in PHASE_ARGUMENTS else cls(Chain((method,)))
        return cls(Chain((method,)))

    @property
    def outer(self) -> type[Method]:
        """The class that the runtime asks."""
        return self.chain.classes[0]

    @property
    def name(self) -> str:
        return self.chain.name

    @property
    def phase(self) -> str:
        return self.chain.phase

    @property
    def periodic(self) -> bool:
        """Whether it has the knob `every`."""
        return self.phase == "eviction" and "every" in self.chain.inner.knobs()

    @property
    def layered(self) -> bool:
        """Whether layers may have budgets of their own."""
        return len(self.chain.classes) > 1 or type(self.chain.inner.allocation).__name__ == "PerLayer"

    @property
    def tiny(self) -> dict[str, dict[str, Any]]:
        """Knobs that make it sparse at 200 tokens, by the method that has them."""
        return {cls.name: dict(cls.tiny) for cls in self.chain.classes}

    @property
    def covering(self) -> dict[str, dict[str, Any]]:
        """Knobs under which prompts of a few hundred tokens are read whole.

        They are the largest budgets that there are, or what a class says as its `whole`.
        """
        found = {}
        for cls in self.chain.classes:
            most = {name: _most(name, cls.knobs().get(name)) for name in cls.budget_knobs}
            found[cls.name] = {**cls.tiny, **(getattr(cls, "whole", None) or most)}
        return found

    def build(self, knobs: Mapping[str, Mapping[str, Any]]) -> Any:
        """The method with these knobs, by the name of the class that has them."""
        return self.chain.build(knobs, None)

    def options(self, knobs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The same as model arguments."""
        own = {f"{owner}.{name}": value for owner, given in knobs.items() for name, value in given.items()}
        return {"method": self.name, **own}

    @contextmanager
    def known(self) -> Iterator[None]:
        """While this lasts, its classes are in the registry."""
        before = {cls: METHODS.get(cls.name) for cls in self.chain.classes}
        added = {cls: other for cls, other in before.items() if other is not cls}
        for cls in added:
            METHODS.add(cls)
        try:
            yield
        finally:
            for cls, other in added.items():
                METHODS.discard(cls.name)
                if other is not None:
                    METHODS.add(other)


def _most(knob: str, default: Any) -> float:
    """The largest budget: the whole of what is divided by shares, else more than there is."""
    if isinstance(default, float) and 0 < default <= 1:
        return 1
    return LONGEST if knob == "window" else EVERYTHING  # a window that no prompt has is refused


def first_of(phase: str) -> str:
    """The first built-in method of a phase."""
    return next(name for name in BUILT_IN if METHODS[name].phase == phase)


def built_in() -> list[str]:
    """All built-in methods but `dense`, as they are typed; a wrapper around the first method of each of its phases."""
    rows = []
    for name in BUILT_IN:
        cls = METHODS[name]
        if cls.phase == "wrapper":
            rows += [f"{name}:{first_of(phase)}" for phase in cls.wraps]
        elif cls.phase in PHASE_ARGUMENTS:
            rows.append(name)
    return rows
