"""What `method=` and the knobs beside it mean: `+` joins methods of several phases, `:` puts one around another.

`method=twilight:quest+snapkv,twilight.p=0.9,page_size=8`: a knob that several of the methods have needs the name of its
method before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, nearest
from . import presets
from .base import Method
from .dense import Dense
from .registry import METHODS, PHASE_ARGUMENTS
from .wrappers import Wrapper


@dataclass(frozen=True)
class Chain:
    """What fills one phase: wrappers, the outermost first, and the method inside."""

    classes: tuple[type[Method], ...]

    @property
    def inner(self) -> type[Method]:
        return self.classes[-1]

    @property
    def phase(self) -> str:
        return self.inner.phase

    @property
    def name(self) -> str:
        return ":".join(cls.name for cls in self.classes)

    @property
    def budget_knobs(self) -> tuple[str, ...]:
        return tuple(name for cls in self.classes for name in cls.budget_knobs)

    def build(self, knobs: Mapping[str, Mapping[str, Any]], preset: str | None) -> Method:
        """The method with these knobs, by the name of the class that has them."""
        found: Any = self.inner(**{**presets.fixed(preset, self.inner), **knobs.get(self.inner.name, {})})
        for cls in reversed(self.classes[:-1]):
            found = cls(inner=found, **knobs.get(cls.name, {}))
        return found


def knob_names() -> dict[str, str]:
    """Every native knob and the methods that have it."""
    owners: dict[str, list[str]] = {}
    for cls in METHODS.values():
        for name in cls.knobs():
            owners.setdefault(name, []).append(cls.name)
    return {name: "+".join(methods) for name, methods in owners.items()}


def chains(names: list[str]) -> dict[str, Chain]:
    """What fills each phase, in the order of phases.

    Raises:
        UserError: an unknown method, two for one phase, a wrapper around nothing, around itself or of another phase.
    """
    in_full = "+".join(names)
    found: dict[str, Chain] = {}
    for name in names:
        chain = _chain(name, in_full)
        if chain.phase in found:
            raise UserError(
                f"method={in_full!r}: {found[chain.phase].name} and {name} both fill the {chain.phase} phase; "
                "give one method per phase"
            )
        if chain.inner is not Dense:
            found[chain.phase] = chain
    if len(names) > 1 and Dense.name in names:
        raise UserError(f"method={in_full!r}: dense is what every phase without a method does; leave it out")
    return {phase: found[phase] for phase in PHASE_ARGUMENTS if phase in found}


def _chain(name: str, in_full: str) -> Chain:
    *outer, last = name.split(":")
    classes = [_known(part, name, in_full) for part in (*outer, last)]
    for place, cls in enumerate(classes):
        inside = classes[-1]
        wraps = issubclass(cls, Wrapper)
        if place == len(classes) - 1 and wraps:
            raise UserError(
                f"method={in_full!r}: {cls.name} goes around a method; type one of {_inside(cls)} behind it, such as "
                f"method={cls.name}:{_inside(cls).split(', ')[0]}"
            )
        if place < len(classes) - 1 and not wraps:
            raise UserError(
                f"method={in_full!r}: {cls.name} goes around no method; join methods of several phases by a plus sign, "
                "as in method=flexprefill+snapkv+quest"
            )
        if wraps and cls in classes[:place]:
            raise UserError(f"method={in_full!r}: {cls.name} stands there twice; give it once")
        if wraps and inside.phase not in cls.wraps:
            raise UserError(
                f"method={in_full!r}: {cls.name} goes around methods of the {' or '.join(cls.wraps)} phase "
                f"({_inside(cls)}), and {inside.name} is one of the {inside.phase} phase"
            )
    return Chain(tuple(classes))


def _known(part: str, name: str, in_full: str) -> type[Method]:
    cls = METHODS.get(part)
    if cls is None:
        where = f" in method={in_full}" if in_full != part else ""
        if not part and where:
            where += " (a name is missing beside a colon or a plus sign)"
        raise UserError(
            f"method={part!r}{where} is unknown{nearest(part, METHODS)} (accepted: {', '.join(METHODS)}; "
            "type for example method=flexprefill, or method=flexprefill+snapkv+quest for several phases)"
        )
    return cls


def _inside(wrapper: type[Wrapper]) -> str:
    """The methods that a wrapper goes around."""
    return ", ".join(cls.name for cls in METHODS.values() if cls.phase in wrapper.wraps)


def assign_knobs(
    given: dict[str, Any], names: list[str], chosen: dict[str, Chain]
) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, dict[str, str]]]:
    """Typed knobs by phase and name of their method; and by phase the names that knobs were typed under."""
    knobs: dict[str, dict[str, dict[str, Any]]] = {phase: {} for phase in chosen}
    typed: dict[str, dict[str, str]] = {phase: {} for phase in chosen}
    places = [(phase, cls) for phase, chain in chosen.items() for cls in chain.classes]
    for argument, value in given.items():
        owner, _, name = argument.rpartition(".")
        having = [(phase, cls) for phase, cls in places if name in cls.knobs() and owner in ("", cls.name)]
        if not having:
            owners = owner or knob_names()[name]
            raise UserError(
                f"{argument}={value} is a knob of {owners}, but method={'+'.join(names)} has no such knob; "
                f"type method={owners.split('+')[0]},{name}={value} or leave it out"
            )
        if len(having) > 1:
            both = [cls.name for _, cls in having]
            forms = " or ".join(f"{method}.{name}={value}" for method in both)
            raise UserError(f"{name}={value} could mean a knob of {' or of '.join(both)}: type {forms}")
        (phase, cls) = having[0]
        own = knobs[phase].setdefault(cls.name, {})
        if name in own:
            dotted = f"{cls.name}.{name}"
            raise UserError(
                f"{name}={given[name]} and {dotted}={given[dotted]} are the same knob: leave one of them out"
            )
        own[name] = value
        typed[phase][name] = argument
    return knobs, typed
