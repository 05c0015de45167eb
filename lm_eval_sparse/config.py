"""From `--model_args` to a checked configuration: which method fills which phase, with which knobs.

Everything that can be wrong in what the user typed about sparsity is found here, before anything is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .errors import UserError, nearest
from .kernels.block_sparse_prefill import BACKENDS
from .methods import METHODS, Dense, Method, PrefillMethod
from .runtime.attention import Plan

#: Model arguments of sparse-hf itself, beside the knobs of the methods.
OWN_ARGS = ("method", "sparsity", "backend")


@dataclass(frozen=True)
class SparseConfig:
    """The sparse part of the model arguments, checked.

    Attributes:
        method: the name as given, such as `flexprefill`.
        sparsity: requested sparsity in [0, 1), or None when native knobs were given or the method is dense.
        backend: kernel choice.
        methods: method by phase; a phase that is missing is dense.
        given: knobs that the user typed.
    """

    method: str
    sparsity: float | None
    backend: str
    methods: dict[str, Method]
    given: dict[str, Any]

    @property
    def plan(self) -> Plan:
        """What the runtime executes. Sparsity 0 is dense attention, for every method."""
        prefill = self.methods.get("prefill")
        if not isinstance(prefill, PrefillMethod) or self.sparsity == 0:
            prefill = None
        return Plan(prefill=prefill, sparsity=self.sparsity if prefill else None, backend=self.backend)

    def describe(self) -> dict[str, Any]:
        """Method and knobs as requested, for fingerprints and results."""
        knobs = (
            {}
            if self.sparsity is not None
            else {name: getattr(method, name) for method in self.methods.values() for name in method.knobs()}
        )
        return {"method": self.method, "requested_sparsity": self.sparsity, "knobs": knobs, "backend": self.backend}


def knob_names() -> dict[str, str]:
    """Every native knob and the methods that have it."""
    owners: dict[str, list[str]] = {}
    for cls in METHODS.values():
        for name in cls.knobs():
            owners.setdefault(name, []).append(cls.name)
    return {name: "+".join(methods) for name, methods in owners.items()}


def split(model_args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate our arguments from those of the model."""
    ours = {*OWN_ARGS, *knob_names()}
    return (
        {name: value for name, value in model_args.items() if name in ours},
        {name: value for name, value in model_args.items() if name not in ours},
    )


def parse(ours: dict[str, Any]) -> SparseConfig:
    """Check the sparse arguments.

    Raises:
        UserError: unknown method or backend, sparsity out of range or beside native knobs, knobs of a method that
            is not in use, knob values out of range, two methods for one phase.
    """
    given = {name: value for name, value in ours.items() if name not in OWN_ARGS}
    names = str(ours.get("method", Dense.name)).split("+")
    chosen: dict[str, type[Method]] = {}
    for name in names:
        cls = METHODS.get(name)
        if cls is None:
            raise UserError(
                f"method={name!r} is unknown{nearest(name, METHODS)} (accepted: {', '.join(METHODS)}; "
                "type for example method=flexprefill)"
            )
        if cls.phase in chosen:
            raise UserError(
                f"method={'+'.join(names)!r}: {chosen[cls.phase].name} and {name} both fill the {cls.phase} phase; "
                "give one method per phase"
            )
        if cls is not Dense:
            chosen[cls.phase] = cls
    if len(names) > 1 and Dense.name in names:
        raise UserError(f"method={'+'.join(names)!r}: dense is what every phase without a method does; leave it out")

    backend = ours.get("backend", "auto")
    if not isinstance(backend, str) or (backend != "auto" and backend not in BACKENDS):
        accepted = ", ".join(("auto", *BACKENDS))
        raise UserError(f"backend={backend!r} is unknown{nearest(backend, BACKENDS)} (accepted: {accepted})")

    sparsity = ours.get("sparsity")
    if sparsity is not None:
        sparsity = check_sparsity(sparsity)
        if given:
            knobs = ", ".join(f"{name}={value}" for name, value in given.items())
            raise UserError(
                f"sparsity={sparsity:g} was given together with {knobs}: give either sparsity, which is turned into "
                "the method's knobs, or the knobs themselves; type for example "
                f"method={'+'.join(names)},sparsity={sparsity:g}"
            )
        if not chosen and sparsity > 0:
            sparse = ", ".join(name for name in METHODS if name != Dense.name)
            raise UserError(
                f"sparsity={sparsity:g} needs a method (accepted: {sparse}); type for example "
                f"method=flexprefill,sparsity={sparsity:g}"
            )

    methods: dict[str, Method] = {}
    left = dict(given)
    for phase, cls in chosen.items():
        mine = {name: left.pop(name) for name in list(left) if name in cls.knobs()}
        methods[phase] = cls(**mine)
    if left:
        name, value = next(iter(left.items()))
        raise UserError(
            f"{name}={value} is a knob of {knob_names()[name]}, but method={'+'.join(names)} has no such knob; "
            f"type method={knob_names()[name].split('+')[0]},{name}={value} or leave it out"
        )
    return SparseConfig("+".join(names), sparsity, backend, methods, given)


def check_sparsity(value: Any) -> float:
    """Return the sparsity as a float in [0, 1)."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value < 1
    if not fits:
        raise UserError(
            f"sparsity={value!r} is not accepted: give a number from 0 (dense) up to but not including 1, "
            "for example sparsity=0.9 to skip 90% of the attention"
        )
    return float(value)
