"""The conformance kit: whether a method holds what every method promises.

In a test file of its own, a method is checked by

    from lm_eval_sparse.testing import conformance

    test_my_method = conformance.tests(MyMethod)

which is one test for each check; `lm-eval-sparse check-method` prints the same. Both take a class, or what is typed
behind `method=`, such as `twilight:quest` or `own.py:MyMethod`. It all runs on a CPU with small random tensors and
models, in some five seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError, nearest
from ..methods.base import Method
from . import runs, selections
from .selections import Failed
from .subject import Subject, built_in

#: What is checked, in order: each takes a `Subject`, says what it found, and raises what is wrong.
CHECKS: dict[str, Callable[[Subject], str]] = {
    "taxonomy": selections.taxonomy,
    "odd-lengths": selections.odd_lengths,
    "gqa": selections.gqa,
    "dtype": selections.dtype,
    "determinism": selections.determinism,
    "promise": selections.promise,
    "causality": selections.causality,
    "memory": selections.memory,
    "full-budget": runs.full_budget,
    "batch": runs.batch,
    "counted": runs.counted,
    "every": runs.every,
}


@dataclass(frozen=True)
class Result:
    """How a check went.

    Attributes:
        check: its name, a key of `CHECKS`.
        passed: whether the method holds it.
        says: what was found, or what is wrong, in one line.
    """

    check: str
    passed: bool
    says: str


def applicable(subject: Subject) -> list[str]:
    """The checks that a method can be put to: not all of them evict in the course of an answer."""
    return [name for name in CHECKS if name != "every" or subject.periodic]


def check(method: str | type[Method] | Subject, name: str) -> str:
    """Put a method to one check; returns what was found.

    Raises:
        Failed: the method does not hold it; what else is raised comes from inside the method.
    """
    subject = method if isinstance(method, Subject) else Subject.of(method)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are small, and several threads wait for each other
    try:
        return CHECKS[name](subject)
    finally:
        torch.set_num_threads(threads)


def run(method: str | type[Method] | Subject, only: Collection[str] | None = None) -> Iterator[Result]:
    """Put a method to all checks that it can be put to, or to some; whatever is raised makes one fail.

    Raises:
        UserError: a method that cannot be checked, or a check that there is not.
    """
    subject = method if isinstance(method, Subject) else Subject.of(method)
    known = applicable(subject)
    for name in only or ():
        if name not in CHECKS:
            raise UserError(f"check {name!r} is unknown{nearest(name, CHECKS)} (accepted: {', '.join(CHECKS)})")
        if name not in known:
            raise UserError(f"check {name!r} is for eviction methods with a knob `every`, which {subject.name} lacks")
    for name in known if only is None else only:
        try:
            yield Result(name, True, check(subject, name))
        except Exception as error:  # methods are written by anybody
            line = (str(error).strip().splitlines() or [""])[0]
            yield Result(name, False, line if isinstance(error, Failed) else f"{type(error).__name__}: {line}")


def tests(method: str | type[Method]) -> Any:
    """A pytest function with one test for each check: `test_my_method = conformance.tests(MyMethod)`."""
    import pytest

    @pytest.mark.parametrize("name", applicable(Subject.of(method)))
    def test(name: str) -> None:
        check(method, name)

    return test


__all__ = ["CHECKS", "Failed", "Result", "Subject", "applicable", "built_in", "check", "run", "tests"]
