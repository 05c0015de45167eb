"""What every method promises, for each one in the registry: a new method is tested here without a word about it.

The checks are those of the conformance kit (`lm_eval_sparse.testing.conformance`), which are tested in
test_conformance.py; what single methods choose is compared with their definitions elsewhere (test_methods_oracle.py).
"""

from __future__ import annotations

import inspect
import re

import pytest

from lm_eval_sparse.methods import METHODS, PHASE_ARGUMENTS, Method
from lm_eval_sparse.methods.registry import BUILT_IN
from lm_eval_sparse.testing import conformance

ROWS = conformance.built_in()


@pytest.mark.parametrize(
    ("method", "check"), [(row, name) for row in ROWS for name in conformance.applicable(conformance.Subject.of(row))]
)
def test_it_holds(method: str, check: str) -> None:
    conformance.check(method, check)


def test_all_methods_have_rows() -> None:
    named = {name for row in ROWS for name in row.split(":")}
    assert named == set(BUILT_IN) - {"dense"}
    assert {METHODS[row.split(":")[-1]].phase for row in ROWS} == set(PHASE_ARGUMENTS)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "dense"])
def test_its_knobs_are_documented(name: str) -> None:
    """Each has a line under `Knobs:`, of the class or of one that it is built on."""
    written = "\n".join(inspect.getdoc(base) or "" for base in METHODS[name].__mro__ if issubclass(base, Method))
    told = {
        knob.strip(" `") for line in re.findall(r"^ +([\w, `]+): \S", written, re.MULTILINE) for knob in line.split(",")
    }
    assert set(METHODS[name].knobs()) <= told
