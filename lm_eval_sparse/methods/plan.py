"""From `--model_args` to a checked configuration: which method fills which phase, with which knobs.

Everything that can be wrong in what the user typed about sparsity is found here, before anything is loaded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UserError, nearest
from ..kernels.prefill import BACKENDS, DEBUG
from . import presets
from .base import PROMISED_LENGTH, Budget, Layer, Method, check_page_size, number
from .dense import Dense
from .grammar import Chain, assign_knobs, chains, knob_names, take_in, typed_chains
from .registry import METHODS, PHASE_ARGUMENTS
from .wrappers import Wrapper

logger = logging.getLogger(__name__)

#: Model arguments of sparse-hf itself, beside the knobs of the methods.
OWN_ARGS = (
    "method", "sparsity", *PHASE_ARGUMENTS.values(), "preset", "backend", "stats", "debug", "diagnose", "resume",
)  # fmt: skip

STATS = ("basic", "full")


def default(method: Any, knob: str) -> Any:
    """What a knob of a method, or of one inside it, is by default."""
    return next(part.knobs()[knob] for part in layers(method) if knob in part.knobs())


@dataclass(frozen=True)
class Assignment:
    """A method in its phase.

    Attributes:
        method: with the knobs as typed.
        sparsity: requested sparsity, or None when the native knobs rule.
        preset: name of the table that turns the sparsity into knobs, or None.
        argument: the model argument that asked for the sparsity.
        typed: the knobs that were typed, each with the name it was typed under.
    """

    method: Method
    sparsity: float | None
    preset: str | None = None
    argument: str = "sparsity"
    typed: Mapping[str, str] = field(default_factory=dict)

    def at(self, length: int, window: int | None = None) -> tuple[Any, float | None]:
        """The method and the sparsity that it has to meet, for a prompt of `length` tokens; None: its knobs rule.

        `window` is what the prompt's task says, which counts where the preset leaves it to tasks and none was typed.
        """
        if self.preset is None:
            return self.method, self.sparsity
        method = presets.lookup(self.preset, self.method, self.sparsity, length)
        if self.window_by_task:
            method = replace(method, window=presets.window(self.preset, type(method), window))
        return method, None

    def resolved(self, length: int, layer: Layer, window: int | None = None) -> tuple[Any, Budget]:
        """The method and its budget in a layer, for a prompt of `length` tokens; `window` as in `at`."""
        method, sparsity = self.at(length, window)
        # What a step may read follows the length it has then.
        return method.resolved(sparsity, 0 if method.phase == "decode" else length, layer)

    @property
    def window_by_task(self) -> bool:
        """Whether each prompt's task decides the method's window."""
        return "window" not in self.typed and presets.window(self.preset, type(self.method)) is not None

    @property
    def window(self) -> int | None:
        """The window of last queries that was typed. One that was not is cut to the prompt where it is longer."""
        looks_back = "window" in self.typed and self.method.phase != "decode"
        return self.method.window if looks_back else None

    def lacks_window(self, length: int) -> str | None:
        """Why a prompt of `length` tokens runs dense that is shorter than the typed window, or None."""
        if self.window is None or length >= self.window:
            return None
        return f"prompt of {length} tokens is shorter than {self.typed['window']}={self.window}"

    def check_window(self, shortest: int, longest: int) -> None:
        """Raise `UserError` when no prompt, of `shortest` to `longest` tokens, has the window that was typed."""
        if self.lacks_window(longest) is None:
            return
        name = self.typed["window"]
        raise UserError(
            f"{name}={self.window} was typed, and no prompt has so many tokens (the shortest {shortest}, the longest "
            f"{longest}): leave {name} out for {default(self.method, 'window')}, or type {name}={longest} or less "
            f"({shortest} for all to have it)"
        )

    def check_length(self, length: int) -> None:
        """Raise `UserError` when the sparsity is promised for a prompt of `length` tokens but out of reach there."""
        method, sparsity = self.at(length)
        if sparsity is None or length < PROMISED_LENGTH:
            return
        if (lacking := self.lacks_window(length)) is not None:
            name = self.typed["window"]
            raise UserError(
                f"{lacking}, and {self.argument}={sparsity:g} is promised from {PROMISED_LENGTH} tokens on: leave "
                f"{name} out for {default(self.method, 'window')}, or type {name}={length} or less"
            )
        largest = method.largest_sparsity(length)
        if largest < sparsity:
            raise UserError(
                f"{self.argument}={sparsity:g} is out of reach of {method.name} at {length} tokens, where the parts it "
                f"always keeps leave at most {largest:.3f}: type {self.argument}={int(largest * 100) / 100:g} or less, "
                "or use longer prompts"
            )


@dataclass(frozen=True)
class Plan:
    """What to run in each phase; None is dense.

    Attributes:
        backend: the kernel of sparse calls, or `auto`.
        debug: whether selections are checked at once on a GPU too, which waits for it.

    Raises:
        UserError: a decode method with pages of a size that no kernel takes, or states of two methods that do not go
            together.
    """

    prefill: Assignment | None = None
    eviction: Assignment | None = None
    decode: Assignment | None = None
    backend: str = "auto"
    debug: bool = False

    def __post_init__(self) -> None:
        if self.decode is not None:
            check_page_size(self.decode.method)
        if self.every is not None:
            self._check_state()

    @property
    def every(self) -> int | None:
        """Tokens of an answer between two evictions, or None."""
        return None if self.eviction is None else getattr(self.eviction.method, "every", None)

    @property
    def one_by_one(self) -> bool:
        """Whether what a token reads depends on what the one before it gave to its keys."""
        return self.decode is not None and self.decode.method.wants_mass

    def _check_state(self) -> None:
        own = self.eviction.method.slots()
        for slot in own:
            if slot.per == "page":
                raise UserError(
                    f"method {self.eviction.method.name} keeps {slot.name!r} of each page, but an eviction method has "
                    "no pages: give it a slot per token or per sequence"
                )
        others = () if self.decode is None else self.decode.method.slots()
        shared = {slot.name for slot in own} & {slot.name for slot in others}
        if shared:
            raise UserError(
                f"methods {self.eviction.method.name} and {self.decode.method.name} both keep a state called "
                f"{', '.join(sorted(shared))}: use one of them, or give the slots of one of them other names"
            )

    @property
    def phases(self) -> dict[str, Assignment]:
        """The phases that a method fills."""
        found = {"prefill": self.prefill, "eviction": self.eviction, "decode": self.decode}
        return {name: assignment for name, assignment in found.items() if assignment is not None}


@dataclass(frozen=True)
class SparseConfig:
    """The sparse part of the model arguments, checked.

    Attributes:
        method: the names in the order of their phases, such as `flexprefill+quest`.
        methods: method by phase; a phase that is missing is dense.
        sparsities: requested sparsity by phase, in [0, 1); None where native knobs were given. Phases with a method.
        preset: name of a table of knobs, or None.
        backend: kernel choice.
        stats: `basic`, or `full` to keep figures per layer and head.
        debug: whether selections are checked at once on a GPU too.
        typed: by phase, the knobs that the user typed, each with the name it was typed under.
        arguments: the model argument that asked for each phase's sparsity.
        diagnose: samples whose losses are looked at, layer by layer.
        resume: whether answers are taken from the log beside the results, and kept there.
    """

    method: str
    methods: dict[str, Method]
    sparsities: dict[str, float | None]
    preset: str | None
    backend: str
    stats: str
    typed: dict[str, dict[str, str]]
    arguments: dict[str, str]
    debug: bool = False
    diagnose: int = 0
    resume: bool = True

    @property
    def sparsity(self) -> float | None:
        """The sparsity that all phases with a method were given, or None when they differ or knobs rule."""
        values = set(self.sparsities.values())
        return values.pop() if len(values) == 1 else None

    @property
    def plan(self) -> Plan:
        """What the runtime executes. Sparsity 0 is dense attention, for every method."""
        filled = {
            phase: Assignment(method, self.sparsities[phase], self.preset, self.arguments[phase], self.typed[phase])
            for phase, method in self.methods.items()
            if self.sparsities[phase] != 0
        }
        return Plan(**filled, backend=self.backend, debug=self.debug)

    def describe(self) -> dict[str, Any]:
        """Methods and knobs as requested, for fingerprints and results. Solved knobs are not among them.

        `code` says where methods come from that are none of this package's, with a hash of the file they are in.
        `window_from` says of which methods the window was typed, and so is not cut to shorter prompts, or comes from
        the tasks.
        """
        sources = {
            method.name: "typed" if "window" in self.typed[phase] else "task"
            for phase, outer in self.methods.items()
            for method in layers(outer)[-1:]
            if "window" in self.typed[phase] or presets.window(self.preset, type(method)) is not None
        }
        knobs = {
            type(method).name: {
                name: getattr(method, name)
                for name in method.knobs()
                if (self.sparsities[phase] is None or name not in method.budget_knobs)
                and not (name == "window" and sources.get(method.name) == "task")
            }
            for phase, outer in self.methods.items()
            for method in layers(outer)
        }
        return {
            "method": self.method,
            "requested_sparsity": self.sparsity if self.methods else None,
            "requested_by_phase": dict(self.sparsities),
            "preset": self.preset,
            "knobs": knobs,
            **({"code": code} if (code := self._code()) else {}),
            **({"window_from": sources} if sources else {}),
            "backend": self.backend,
        }

    @property
    def budget_knobs(self) -> dict[str, list[str]]:
        """Of each method the knobs that a requested sparsity decides: runs that differ in them only are one curve."""
        used = (method for outer in self.methods.values() for method in layers(outer))
        return {type(method).name: list(method.budget_knobs) for method in used}

    def _code(self) -> dict[str, Any]:
        """Where methods come from that are none of this package's, and a hash of their code, by name."""
        used = {type(method) for outer in self.methods.values() for method in layers(outer)}
        return {cls.name: origin.describe() for cls in used if (origin := METHODS.origin(cls)) is not None}


def layers(method: Any) -> list[Any]:
    """A method and those inside it, the outermost first."""
    found = [method]
    while isinstance(found[-1], Wrapper):
        found.append(found[-1].inner)
    return found


def argument_names() -> set[str]:
    """Everything that is ours: our own arguments, knobs, and knobs with their method's name before them."""
    knobs = knob_names()
    dotted = {f"{owner}.{name}" for name, owners in knobs.items() for owner in owners.split("+")}
    return {*OWN_ARGS, *knobs, *dotted}


def split(model_args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate our arguments from those of the model.

    Raises:
        UserError: `method=` names a plug-in or a file that cannot be used: its knobs have to be known here.
    """
    take_in(model_args.get("method", Dense.name))
    ours = argument_names()

    def is_ours(name: Any) -> bool:
        owner = name.rpartition(".")[0] if isinstance(name, str) else ""
        return name in ours or owner in list(METHODS)  # a knob that its method has not is for us to refuse

    return (
        {name: value for name, value in model_args.items() if is_ours(name)},
        {name: value for name, value in model_args.items() if not is_ours(name)},
    )


def parse(ours: dict[str, Any], *, quiet: bool = False) -> SparseConfig:
    """Check the sparse arguments.

    Args:
        quiet: log no warnings.

    Raises:
        UserError: unknown method, preset or backend, sparsity out of range or beside the knobs that it decides,
            sparsity of a phase without a method, knobs of a method that is not in use, knob values out of range, two
            methods for one phase.
    """
    given = {name: value for name, value in ours.items() if name not in OWN_ARGS}
    names = typed_chains(ours.get("method", Dense.name))
    chosen = chains(names)
    for line in METHODS.shadowed({cls.name for chain in chosen.values() for cls in chain.classes}):
        if not quiet:
            logger.warning(line)
    backend = ours.get("backend", "auto")
    if not isinstance(backend, str) or (backend != "auto" and backend not in BACKENDS):
        accepted = ", ".join(("auto", *BACKENDS))
        raise UserError(f"backend={backend!r} is unknown{nearest(backend, BACKENDS)} (accepted: {accepted})")
    stats = ours.get("stats", STATS[0])
    if stats not in STATS:
        raise UserError(f"stats={stats!r} is unknown{nearest(stats, STATS)} (accepted: {', '.join(STATS)})")
    debug = ours.get("debug")
    if debug is None:
        debug = os.environ.get(DEBUG, "0") not in ("", "0")
    elif not isinstance(debug, (bool, int)) or debug not in (0, 1):
        raise UserError(f"debug={debug!r} is not accepted: give True or False (or 1 or 0), for example debug=True")
    resume = True if ours.get("resume") is None else ours["resume"]
    if not isinstance(resume, (bool, int)) or resume not in (0, 1):
        raise UserError(
            f"resume={resume!r} is not accepted: give 0 to answer all anew and keep no log, or leave it out"
        )
    sparsities = _sparsities(ours, names, chosen)

    knobs, typed = assign_knobs(given, names, chosen)
    preset = ours.get("preset")
    if preset is not None and not isinstance(preset, str):
        raise UserError(f"preset={preset!r} is unknown (accepted: {', '.join(presets.PRESETS)})")
    methods: dict[str, Method] = {}
    for phase, chain in chosen.items():
        every = {name: value for own in knobs[phase].values() for name, value in own.items()}
        decided = {name: value for name, value in every.items() if name in chain.budget_knobs}
        if sparsities[phase] is not None and decided:
            _refuse_both(ours, names, phase, decided)
        methods[phase] = chain.build(knobs[phase], preset)
        if phase == "decode":
            check_page_size(methods[phase])
        if sparsities[phase] is None:
            methods[phase].check_native()
    if preset is not None:
        if not chosen:
            raise UserError(f"preset={preset} needs a method; type for example method=quest,preset=paper,sparsity=0.9")
        for phase, method in methods.items():
            presets.check(preset, method, sparsities[phase])
    kept, read = sparsities.get("eviction"), sparsities.get("decode")
    if kept and read and read <= kept and not quiet:
        logger.warning(
            "decode_sparsity=%g is measured against the whole context, of which %s keeps %g: %s has little left to "
            "skip; give a decode_sparsity above kv_sparsity=%g",
            read, chosen["eviction"].name, 1 - kept, chosen["decode"].name, kept,
        )  # fmt: skip
    arguments = {
        phase: PHASE_ARGUMENTS[phase] if ours.get(PHASE_ARGUMENTS[phase]) is not None else "sparsity"
        for phase in methods
    }
    name = "+".join(method.name for method in methods.values()) or Dense.name
    diagnose = _diagnose(ours.get("diagnose"), sparsities)
    return SparseConfig(
        name, methods, sparsities, preset, backend, stats, typed, arguments, bool(debug), diagnose, bool(resume)
    )


def _diagnose(value: Any, sparsities: Mapping[str, float | None]) -> int:
    """How many samples to look at, 0 where that is not asked for."""
    if value is None:
        return 0
    number("diagnose", value, 1, float("inf"), whole=True, example=8)
    if all(sparsity == 0 for sparsity in sparsities.values()):
        dense = "sparsity=0 is dense attention" if sparsities else f"method={Dense.name} is that itself"
        raise UserError(
            f"diagnose={value} holds a method against dense attention, and {dense}: type for example "
            f"method=quest,sparsity=0.9,diagnose={value}, or leave diagnose out"
        )
    return int(value)


def _sparsities(ours: dict[str, Any], names: list[str], chosen: dict[str, Chain]) -> dict[str, float | None]:
    """Requested sparsity of each phase that a method fills: its own argument, else `sparsity=`, else None."""
    common = ours.get("sparsity")
    if common is not None:
        common = check_sparsity("sparsity", common)
        if not chosen and common > 0:
            sparse = ", ".join(name for name in METHODS.names() if name not in (Dense.name, *METHODS.wrappers()))
            raise UserError(
                f"sparsity={common:g} needs a method (accepted: {sparse}); type for example "
                f"method=flexprefill,sparsity={common:g}"
            )
    found = dict.fromkeys(chosen, common)
    for phase, argument in PHASE_ARGUMENTS.items():
        if (value := ours.get(argument)) is None:
            continue
        value = check_sparsity(argument, value)
        if phase not in chosen:
            fitting = ", ".join(cls.name for cls in METHODS.values() if cls.phase == phase)
            phases = (
                ", ".join(f"{chain.name} fills the {at} phase" for at, chain in chosen.items())
                or "all phases are dense"
            )
            raise UserError(
                f"{argument}={value:g} needs a method of the {phase} phase ({fitting}), but method={'+'.join(names)} "
                f"has none ({phases}); add one, or leave {argument} out"
            )
        found[phase] = value
    return found


def _refuse_both(ours: dict[str, Any], names: list[str], phase: str, decided: dict[str, Any]) -> None:
    argument = PHASE_ARGUMENTS[phase] if ours.get(PHASE_ARGUMENTS[phase]) is not None else "sparsity"
    typed = ", ".join(f"{name}={value}" for name, value in decided.items())
    raise UserError(
        f"{argument}={float(ours[argument]):g} was given together with {typed}: give either {argument}, which is "
        f"turned into the method's knobs, or the knobs themselves; type for example "
        f"method={'+'.join(names)},{argument}={float(ours[argument]):g}"
    )


def check_sparsity(name: str, value: Any) -> float:
    """Return the sparsity as a float in [0, 1)."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
    if not fits:
        raise UserError(
            f"{name}={value!r} is not accepted: give a number from 0 (dense) up to but not including 1, "
            f"for example {name}=0.9 to skip 90% of the attention"
        )
    return float(value) + 0.0  # no -0.0
