"""What `method=` and the knobs beside it mean: `+` joins methods of several phases, `:` puts one around another.

`method=twilight:quest+snapkv,twilight.p=0.9,page_size=8`: a knob that several of the methods have needs the name of its
method before it. A file of the user's own may stand in the place of a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import spelling
from ..errors import UserError, nearest
from . import presets
from .base import Method
from .dense import Dense
from .registry import METHODS, PHASE_ARGUMENTS
from .wrappers import Wrapper


@dataclass(frozen=True)
class Chain:
    """What fills one phase: wrappers, the outermost first, and the method inside.

    Attributes:
        typed: as it was typed, where a file may stand in the place of a name.
    """

    classes: tuple[type[Method], ...]
    typed: str = ""

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
        """The method with these knobs, by the name of the class that has them. Raises `UserError` for what is none."""
        found: Any = _made(self.inner, {**presets.fixed(preset, self.inner), **knobs.get(self.inner.name, {})})
        for cls in reversed(self.classes[:-1]):
            found = _made(cls, {"inner": found, **knobs.get(cls.name, {})})
        return found


def _made(cls: type[Method], knobs: Mapping[str, Any]) -> Any:
    """A method with these knobs, whose author may have forgotten what users type."""
    try:
        return cls(**knobs)
    except UserError:
        raise
    except Exception as error:  # methods are written by anybody
        given = ", ".join(f"{name}={value}" for name, value in knobs.items() if name != "inner") or "its defaults"
        line = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"method {cls.name} cannot be made with {given} ({type(error).__name__}: {line})") from error


def knob_names() -> dict[str, str]:
    """Every native knob, and the methods that have it, of those at hand."""
    owners: dict[str, list[str]] = {}
    for cls in METHODS.values():
        for name in cls.knobs():
            owners.setdefault(name, []).append(cls.name)
    return {name: "+".join(methods) for name, methods in owners.items()}


def typed_chains(method: Any) -> list[str]:
    """What stands behind `method=`, cut at the plus signs that join phases. Raises `UserError` for what is no text."""
    if not isinstance(method, str):
        raise _unknown(f"method={str(method)!r}")
    return [":".join(parts) for parts in spelling.chains(method)]


def take_in(method: Any) -> None:
    """Have plug-ins and files at hand that `method=` names, so that their knobs are known. Others are left alone.

    Raises:
        UserError: one that cannot be used.
    """
    for part in (part for parts in spelling.chains(method if isinstance(method, str) else "") for part in parts):
        if spelling.file_of(part) is not None:
            METHODS.add_file(part)
        elif part not in list(METHODS):
            METHODS.get(part)


def chains(names: list[str]) -> dict[str, Chain]:
    """What fills each phase, in the order of phases.

    Raises:
        UserError: an unknown method, two for one phase, a wrapper around nothing, around itself or of another phase.
    """
    in_full = "+".join(names)
    found: dict[str, Chain] = {}
    for chain in (_chain(names, place) for place in range(len(names))):
        if chain.phase in found:
            raise UserError(
                f"method={in_full!r}: {found[chain.phase].name} and {chain.name} both fill the {chain.phase} phase; "
                "give one method per phase"
            )
        if chain.inner is not Dense:
            found[chain.phase] = chain
    if len(names) > 1 and Dense.name in names:
        raise UserError(f"method={in_full!r}: dense is what every phase without a method does; leave it out")
    _check_names([cls for chain in found.values() for cls in chain.classes], in_full)
    return {phase: found[phase] for phase in PHASE_ARGUMENTS if phase in found}


def _check_names(classes: list[type[Method]], in_full: str) -> None:
    """Knobs and figures are found by the names of methods."""
    for cls in classes:
        if any(other is not cls and other.name == cls.name for other in classes):
            raise UserError(
                f"method={in_full!r}: two methods call themselves {cls.name!r}; give one of them another name in its "
                "class"
            )


def _chain(names: list[str], at: int) -> Chain:
    """The chain that is typed as `names[at]`."""
    in_full, typed = "+".join(names), names[at]
    (parts,) = spelling.chains(typed) if typed else [[""]]

    def instead(*chain: str) -> str:
        """All that was typed, with another chain in this place; or with none."""
        return f"method={'+'.join([*names[:at], *chain, *names[at + 1 :]]) or Dense.name}"

    if "" in parts and in_full:
        _refuse_gap(parts, in_full, instead)
    classes = []
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        classes.append(_known(part, in_full, None if last else instead(":".join(parts[place + 1 :]))))
    inside = classes[-1]
    if issubclass(inside, Wrapper):
        if len(classes) > 1 and not issubclass(classes[0], Wrapper) and classes[0].phase in inside.wraps:
            raise UserError(
                f"method={in_full!r}: {inside.name} goes around {classes[0].name}, and stands in front of it; type "
                f"{instead(f'{parts[-1]}:{parts[0]}')}"
            )
        fitting = _inside(inside)
        example = f", such as {instead(f'{typed}:{fitting[0]}')}" if fitting else ""
        raise UserError(
            f"method={in_full!r}: {inside.name} goes around a method; type one of {', '.join(fitting)} behind it"
            f"{example}"
        )
    for place, cls in enumerate(classes[:-1]):
        if not issubclass(cls, Wrapper):
            both = cls.phase != inside.phase and cls.phase != "any" != inside.phase
            pair = instead(parts[place], parts[-1]) if both else "method=flexprefill+snapkv+quest"
            raise UserError(
                f"method={in_full!r}: {cls.name} goes around no method; join methods of several phases by a plus sign, "
                f"as in {pair}"
            )
        if cls in classes[:place]:
            once = ":".join(dict.fromkeys(parts))
            raise UserError(f"method={in_full!r}: {cls.name} stands there twice; give it once: type {instead(once)}")
        if inside.phase not in cls.wraps:
            fitting = _inside(cls)
            others = [parts[-1]] if inside is not Dense else []
            example = f"; type for example {instead(*others, f'{parts[place]}:{fitting[0]}')}" if fitting else ""
            raise UserError(
                f"method={in_full!r}: {cls.name} goes around methods of the {' or '.join(cls.wraps)} phase "
                f"({', '.join(fitting)}), and {inside.name} is one of the {inside.phase} phase{example}"
            )
        if (reason := cls.refuses(inside)) is not None:
            raise UserError(
                f"method={in_full!r}: {cls.name} does not go around {inside.name}, which {reason}; type "
                f"{instead(parts[-1])}, or one of {', '.join(_inside(cls))} behind it"
            )
    return Chain(tuple(classes), typed)


def _refuse_gap(parts: list[str], in_full: str, instead: Callable[..., str]) -> None:
    """Raise for a name that is missing beside a colon or a plus sign."""
    there = [part for part in parts if part]
    sign = "a colon" if len(parts) > 1 else "a plus sign"
    wrapper = METHODS.get(there[-1]) if there and not parts[-1] and spelling.file_of(there[-1]) is None else None
    fitting = _inside(wrapper) if wrapper is not None and issubclass(wrapper, Wrapper) else []
    example = instead(":".join([*there, *fitting[:1]])) if there else instead()
    more = f"; {wrapper.name} goes around one of {', '.join(fitting)}" if fitting else ""
    raise UserError(f"method={in_full!r}: a name is missing beside {sign}{more}; type {example}")


def _known(part: str, in_full: str, without: str | None) -> type[Method]:
    """The class of one name or file; `without` is what is typed to leave it out, where it stands before a colon."""
    if spelling.file_of(part) is not None:
        return METHODS.add_file(part)
    cls = METHODS.get(part)
    if cls is not None:
        return cls
    where = f" in method={in_full}" if in_full != part else ""
    if without is not None:
        around = [name for name, known in METHODS.items() if issubclass(known, Wrapper)]
        raise UserError(
            f"method={part!r}{where} is unknown{nearest(part, around)} (what goes around a method: "
            f"{', '.join(around) or 'nothing here'}; type {without} to leave it out)"
        )
    raise _unknown(f"method={part!r}{where}", part)


def _unknown(given: str, name: str = "") -> UserError:
    """What is said of something that is no method."""
    names = [known for known in METHODS.names() if known not in METHODS.wrappers()]
    return UserError(
        f"{given} is unknown{nearest(name, METHODS.names())} (accepted: {', '.join(names)}; "
        "type for example method=flexprefill, or method=flexprefill+snapkv+quest for several phases)"
    )


def example(name: str) -> str:
    """A method as it can be typed behind `method=`: a wrapper goes around the first method that it can."""
    return f"{name}:{_inside(METHODS[name])[0]}" if name in METHODS.wrappers() else name


def _inside(wrapper: type[Wrapper]) -> list[str]:
    """The methods at hand that a wrapper goes around."""
    return [cls.name for cls in METHODS.values() if cls.phase in wrapper.wraps and wrapper.refuses(cls) is None]


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
            raise _nobodys(argument, value, names, chosen)
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


def _nobodys(argument: str, value: Any, names: list[str], chosen: dict[str, Chain]) -> UserError:
    """What is said of a knob that no method in use has: whose it is, and what to type to use it."""
    owner, _, name = argument.rpartition(".")
    if owner and name not in METHODS[owner].knobs():
        own = list(METHODS[owner].knobs())
        return UserError(
            f"{argument}={value}: {owner} has no knob {name!r}{nearest(name, own)} (knobs of {owner}: "
            f"{', '.join(own) or 'none'})"
        )
    owners = [METHODS[method] for method in (owner or knob_names()[name]).split("+")]
    # One of a phase that has a method already is the likelier to be meant.
    owners.sort(key=lambda cls: not {cls.phase, *getattr(cls, "wraps", ())} & set(chosen))
    phases = dict.fromkeys(" or ".join(getattr(cls, "wraps", ())) or cls.phase for cls in owners)
    whose = ", ".join(cls.name for cls in owners)
    return UserError(
        f"{argument}={value} is a knob of {whose} ({' and '.join(phases)} phase), but method={'+'.join(names)} has no "
        f"such knob; type method={_with(owners[0], chosen)},{argument}={value} or leave it out"
    )


def _with(cls: type[Method], chosen: dict[str, Chain]) -> str:
    """What to type to use a method besides those that were chosen, or in the place of the one of its phase."""
    typed = {phase: chain.typed or chain.name for phase, chain in chosen.items()}
    if issubclass(cls, Wrapper):
        phase = next((phase for phase in chosen if phase in cls.wraps), None)
        inside = typed.get(phase) or example(cls.name).partition(":")[2]
        typed[phase or METHODS[inside].phase] = f"{cls.name}:{inside}"
    else:
        outer = [part.name for part in chosen[cls.phase].classes[:-1]] if cls.phase in chosen else []
        typed[cls.phase] = ":".join([*outer, cls.name])
    return "+".join(typed[phase] for phase in PHASE_ARGUMENTS if phase in typed) or Dense.name
