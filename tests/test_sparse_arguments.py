"""The sparse model arguments: the paper's table as a preset, what fills which phase, and what is refused and how.

The table is typed here a second time, from the paper. Nothing is loaded: all cases go through `config.parse`.

Long, since every argument is a row of the same tables.
"""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels.types import RaggedKV
from lm_eval_sparse.methods import METHODS, PHASE_ARGUMENTS, Method, presets
from lm_eval_sparse.methods import plan as config
from lm_eval_sparse.methods.plan import SparseConfig, parse
from lm_eval_sparse.methods.registry import table
from lm_eval_sparse.testing import Decoding, select


def typed(arguments: str) -> dict[str, Any]:
    """Arguments from a string such as `method=quest,sparsity=0.9`, with the types that the command line gives them."""
    found: dict[str, Any] = {}
    for part in filter(None, arguments.split(",")):
        name, value = part.split("=", 1)
        word = {"True": True, "False": False, "None": None}.get(value, value)
        if isinstance(word, str):
            for kind in (int, float):
                try:
                    word = kind(value)
                    break
                except ValueError:
                    continue
        found[name] = word
    return found


def named(name: str) -> str:
    """What is typed for a method: a wrapper goes around something."""
    return f"{name}:quest" if METHODS[name].phase == "wrapper" else name


def phase_of(name: str) -> str:
    """The phase that it fills then."""
    return METHODS[named(name).rpartition(":")[2]].phase


def accept(arguments: str) -> SparseConfig:
    return parse(typed(arguments))


def refuse(arguments: str | dict[str, Any]) -> str:
    """The message with which the arguments are refused; one line, whatever was typed."""
    with pytest.raises(UserError) as caught:
        parse(typed(arguments) if isinstance(arguments, str) else arguments)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def assert_says(message: str, *fragments: str) -> None:
    for fragment in fragments:
        assert fragment in message, message


# --- the paper's table -----------------------------------------------------------------------------------------------

NOMINAL = (16384, 32768, 65536, 128000)
#: Sparsities as the paper prints them, in the order of the columns (densest last).
TEN = (0.95, 0.93, 0.9, 0.87, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
SEVEN = (0.95, 0.93, 0.9, 0.87, 0.8, 0.67, 0.5)

#: Table 3, one line per length.
VERTICALS_AND_SLASHES = """
164 240 315 400 448 576 768 1024 1536 2304
290 384 448 576 704 1024 1536 2304 3584 4608
400 448 544 640 960 1280 2304 4096 6144 8192
480 768 1024 1536 2048 3584 5632 10240 13312 18432
"""
ALPHA_AND_MINIMUM = """
0:164 0:240 0:315 0:400 .55:512 .71:512 .88:512
0:290 0:384 .45:512 .6:512 .7:512 .8:512 .92:512
0:400 .45:512 .55:512 .7:512 .77:512 .85:512 .94:512
"""
TOP_K = """
26 35 53 71 108 188 300
52 69 105 141 216 376 600
104 139 210 283 432 752 1200
"""
CAPACITY = """
819 1092 1638 2183 3276 4915 6553 8192 9830 11468
1638 2185 3276 4367 6553 9830 13107 16384 19660 22937
3276 4371 6553 8735 13107 19660 26214 32768 39321 45875
6400 8544 12800 17056 25600 38400 51200 64000 76800 89600
"""
BUDGET = """
816 1088 1632 2176 3280 4912 6560 8192 9824 11472
1632 2192 3280 4368 6560 9824 13104 16384 19664 22944
3280 4368 6560 8736 13104 19664 26208 32768 39328 45872
6400 8544 12800 17056 25600 38400 51200 64000 76800 89600
"""
#: Method -> its sparsities, its knobs, its lines.
TABLE: dict[str, tuple[tuple[float, ...], tuple[str, ...], str]] = {
    "vertical_slash": (TEN, ("verticals", "slashes"), VERTICALS_AND_SLASHES),
    "flexprefill_vs": (SEVEN, ("alpha", "min_budget"), ALPHA_AND_MINIMUM),
    "block_sparse": (SEVEN, ("top_k",), TOP_K),
    "snapkv": (TEN, ("capacity",), CAPACITY),
    "ada_snapkv": (TEN, ("capacity",), CAPACITY),
    "quest": (TEN, ("budget",), BUDGET),
}


def cells(method: str) -> list[tuple[int, float, dict[str, float]]]:
    """Every cell of a method: prompt length, sparsity, knobs."""
    sparsities, names, lines = TABLE[method]
    found = []
    for nominal, line in zip(NOMINAL, lines.strip().splitlines(), strict=False):
        for sparsity, cell in zip(sparsities, line.split(), strict=True):
            values = [float(value) for value in cell.split(":")]
            found.append((nominal, sparsity, dict(zip(names, values * (len(names) // len(values)), strict=True))))
    return found


@pytest.mark.parametrize("name", TABLE)
def test_every_cell_of_the_papers_table(name: str) -> None:
    """In full prompts, in the shortest that count as this length, and through the plan that the runtime follows."""
    for nominal, sparsity, knobs in cells(name):
        plan = parse({"method": name, "sparsity": sparsity, "preset": "paper"}).plan
        (assignment,) = plan.phases.values()
        always = {"subdiagonal": True} if name == "block_sparse" else {}  # section 3: what made the paper's numbers
        method = replace(METHODS[name](), **always)
        expected = replace(method, **knobs)
        for length in (nominal, math.ceil(0.9 * nominal), nominal - 1):
            assert presets.lookup("paper", method, sparsity, length) == expected, (nominal, sparsity)
            # Nothing is left for the method to solve.
            assert assignment.at(length) == (expected, None)


def test_the_table_has_no_other_cells() -> None:
    assert {name: len(cells(name)) for name in TABLE} == {
        "vertical_slash": 40, "flexprefill_vs": 21, "block_sparse": 21, "snapkv": 40, "ada_snapkv": 40, "quest": 40
    }  # fmt: skip
    for name in METHODS:
        if name not in TABLE and name != "dense":
            message = refuse({"method": named(name), "sparsity": 0.9, "preset": "paper"})
            assert_says(message, "preset=paper", name, *TABLE)


def test_sparsity_may_be_typed_exactly_or_as_printed() -> None:
    method = METHODS["quest"]()
    for sparsity in (1 - 1 / 15, 0.933, 0.93, 0.9333333):
        parse({"method": "quest", "sparsity": sparsity, "preset": "paper"})
        assert presets.lookup("paper", method, sparsity, 16384).budget == 1088


def test_a_preset_leaves_other_knobs_as_typed() -> None:
    plan = accept("method=vertical_slash+ada_snapkv+quest,sparsity=0.9,preset=paper,vertical_slash.window=512,"
                  "floor=0.5,share_pages=False").plan  # fmt: skip
    at = {phase: assignment.at(16384)[0] for phase, assignment in plan.phases.items()}
    assert (at["prefill"].window, at["prefill"].verticals, at["prefill"].slashes) == (512, 315, 315)
    assert (at["eviction"].floor, at["eviction"].window, at["eviction"].capacity) == (0.5, 256, 1638)
    assert (at["decode"].share_pages, at["decode"].budget) == (False, 1632)


def test_windows_and_the_subdiagonal_of_a_preset() -> None:
    """A task's window reaches the methods whose paper runs had one by task; what is typed wins, and others keep 256."""
    for name, method in METHODS.items():
        if "window" not in method.knobs() or method.paper is None:
            continue
        by_task = name in ("vertical_slash", "flexprefill_vs")
        for more, windows in (({}, (256, 512, 300) if by_task else (256,) * 3), ({"window": 77}, (77,) * 3)):
            found = parse({"method": name, "sparsity": 0.9, "preset": "paper", **more})
            (assignment,) = found.plan.phases.values()
            assert tuple(assignment.at(16000, told)[0].window for told in (None, 512, 300)) == windows
            source = "typed" if more else "task" if by_task else None
            assert found.describe().get("window_from") == ({name: source} if source else None)
            assert found.describe()["knobs"][name].get("window") == (None if source == "task" else windows[0])
        (assignment,) = parse({"method": name, "sparsity": 0.9}).plan.phases.values()
        assert assignment.at(16000, 512)[0].window == 256  # without a preset nothing changes
    for more, forced in (({}, True), ({"subdiagonal": False}, False), ({"block_sparse.subdiagonal": True}, True)):
        found = parse({"method": "block_sparse", "sparsity": 0.9, "preset": "paper", **more})
        assert found.plan.prefill.at(16384)[0].subdiagonal is forced
        assert found.describe()["knobs"]["block_sparse"]["subdiagonal"] is forced


def test_a_preset_with_a_sparsity_per_phase() -> None:
    plan = accept("method=snapkv+quest,kv_sparsity=0.3,decode_sparsity=0.95,preset=paper").plan
    assert plan.eviction.at(30000)[0].capacity == 22937 and plan.decode.at(30000)[0].budget == 1632
    plan = accept("method=snapkv+quest,kv_sparsity=0,decode_sparsity=0.95,preset=paper").plan
    assert plan.eviction is None and plan.decode.at(30000)[0].budget == 1632


@pytest.mark.parametrize("name", TABLE)
def test_lengths_that_the_table_lacks(name: str) -> None:
    lengths = NOMINAL[: len(TABLE[name][2].strip().splitlines())]
    between = [1, 4096, 8192, 14745, 16385, 20000, 29491, 32769, 50000, 58982, 65537, 100000, 115199]
    for length in [*between, 128001, 131072, 10**6, *([115200, 128000] if len(lengths) == 3 else [])]:
        with pytest.raises(UserError) as caught:
            presets.lookup("paper", METHODS[name](), 0.9, length)
        assert_says(str(caught.value), "preset=paper", name, f"{length} tokens", *map(str, lengths))
        assert ("128000" in str(caught.value).replace(f"{length} tokens", "")) == (len(lengths) == 4)


@pytest.mark.parametrize("name", TABLE)
def test_the_lengths_that_the_message_offers_are_accepted(name: str) -> None:
    with pytest.raises(UserError) as caught:
        presets.lookup("paper", METHODS[name](), 0.9, 4096)
    spans = re.findall(r"(\d+)-(\d+)", str(caught.value))
    assert len(spans) == len(TABLE[name][2].strip().splitlines())
    for low, high in spans:
        for length in (int(low), int(high)):
            presets.lookup("paper", METHODS[name](), 0.9, length)
        with pytest.raises(UserError):
            presets.lookup("paper", METHODS[name](), 0.9, int(low) - 1)


#: Arguments -> what the refusal must hold.
PRESETS: dict[str, tuple[str, ...]] = {
    "method=quest,sparsity=0.9,preset=papr": ("preset='papr'", "did you mean 'paper'", "accepted: paper"),
    "method=quest,sparsity=0.9,preset=v1": ("preset='v1'", "accepted: paper"),
    "method=quest,sparsity=0.9,preset=5": ("preset=5", "accepted: paper"),
    "method=quest,sparsity=0.9,preset=True": ("preset=True", "accepted: paper"),
    "method=quest,sparsity=0.9,preset=": ("preset=''", "accepted: paper"),
    "preset=paper": ("preset=paper", "needs a method", "method="),
    "method=dense,preset=paper": ("preset=paper", "needs a method"),
    "method=quest,preset=paper": ("preset=paper", "needs the sparsity", "0.95", "0.933", "0.3"),
    "method=quest,preset=paper,budget=1024": ("preset=paper", "needs the sparsity"),
    "method=quest,sparsity=0.92,preset=paper": ("sparsity=0.92", "quest", "0.95, 0.933, 0.9, 0.867, 0.8, 0.7"),
    "method=quest,sparsity=0.9,budget=1024,preset=paper": ("sparsity=0.9", "budget=1024"),
    "method=block_sparse,sparsity=0.7,preset=paper": ("sparsity=0.7", "block_sparse", "0.8, 0.667, 0.5"),
    "method=flexprefill_vs,sparsity=0.3,preset=paper": ("sparsity=0.3", "flexprefill_vs", "0.667, 0.5"),
    "method=flexprefill,sparsity=0.9,preset=paper": ("no parameters for flexprefill", "flexprefill_vs"),
    "method=snapkv+quest,decode_sparsity=0.9,preset=paper": ("preset=paper", "needs the sparsity"),
    "method=flexprefill+quest,sparsity=0.9,preset=paper": ("no parameters for flexprefill",),
}


@pytest.mark.parametrize("arguments", PRESETS)
def test_refused_presets(arguments: str) -> None:
    assert_says(refuse(arguments), *PRESETS[arguments])


@pytest.mark.parametrize("page_size", [8, 16, 32, 64])
def test_a_page_size_that_the_presets_budgets_do_not_fit(page_size: int) -> None:
    """Whatever is wrong in the arguments is found before a model is loaded, not at the first prompt."""
    for sparsity in TEN:
        try:
            plan = parse({"method": "quest", "sparsity": sparsity, "preset": "paper", "page_size": page_size}).plan
        except UserError:
            continue
        for length in NOMINAL:
            plan.decode.at(length)


@pytest.mark.parametrize("knobs", [{"window": 1024}, {"local": 2000}, {"sinks": 800}], ids=str)
@pytest.mark.parametrize("name", ["snapkv", "ada_snapkv"])
def test_knobs_that_the_presets_capacity_does_not_fit(name: str, knobs: dict[str, int]) -> None:
    """`capacity=819` beside any of these is refused; so it is when the capacity comes from the preset."""
    assert_says(refuse({"method": name, "capacity": 819, **knobs}), "capacity=819", next(iter(knobs)))
    try:
        plan = parse({"method": name, "sparsity": 0.95, "preset": "paper", **knobs}).plan
        plan.eviction.at(16384)
    except UserError:
        return
    pytest.fail(f"{knobs} were accepted beside a capacity of 819")


# --- which method fills which phase ----------------------------------------------------------------------------------

TRIPLE = ("flexprefill", "snapkv", "quest")


@pytest.mark.parametrize("order", list(permutations(TRIPLE)), ids="+".join)
def test_methods_in_any_order(order: tuple[str, ...]) -> None:
    found = accept(f"method={'+'.join(order)},sparsity=0.8")
    assert found.method == "+".join(TRIPLE)  # one configuration, one name
    assert {phase: method.name for phase, method in found.methods.items()} == dict(
        zip(("prefill", "eviction", "decode"), TRIPLE, strict=True)
    )
    assert found.sparsities == {"prefill": 0.8, "eviction": 0.8, "decode": 0.8} and found.sparsity == 0.8
    assert {phase: a.at(5000) for phase, a in found.plan.phases.items()} == {
        phase: (method, 0.8) for phase, method in found.methods.items()
    }


def test_every_pair_of_methods() -> None:
    for one, other in permutations([name for name in METHODS if name != "dense"], 2):
        arguments = f"method={named(one)}+{named(other)},sparsity=0.5"
        if phase_of(one) == phase_of(other):
            assert_says(refuse(arguments), named(one), named(other), f"{phase_of(one)} phase", "one method per phase")
        else:
            assert {method.name for method in accept(arguments).methods.values()} == {named(one), named(other)}


#: Arguments -> requested sparsity by phase.
SPARSITIES: dict[str, dict[str, float | None]] = {
    "": {},
    "method=dense": {},
    "method=dense,sparsity=0": {},
    "method=quest": {"decode": None},
    "method=quest,sparsity=0.9": {"decode": 0.9},
    "method=quest,decode_sparsity=0.9": {"decode": 0.9},
    "method=quest,sparsity=0.5,decode_sparsity=0.9": {"decode": 0.9},
    "method=quest,sparsity=0.9,decode_sparsity=0": {"decode": 0},
    "method=snapkv,kv_sparsity=0.25": {"eviction": 0.25},
    "method=flexprefill,prefill_sparsity=0.25": {"prefill": 0.25},
    "method=flexprefill+snapkv+quest": {"prefill": None, "eviction": None, "decode": None},
    "method=flexprefill+snapkv+quest,sparsity=0.9": {"prefill": 0.9, "eviction": 0.9, "decode": 0.9},
    "method=flexprefill+snapkv+quest,sparsity=0.9,kv_sparsity=0.5": {"prefill": 0.9, "eviction": 0.5, "decode": 0.9},
    "method=flexprefill+snapkv+quest,sparsity=0.9,kv_sparsity=0": {"prefill": 0.9, "eviction": 0, "decode": 0.9},
    "method=quest+snapkv+flexprefill,prefill_sparsity=0.1,kv_sparsity=0.2,decode_sparsity=0.3": {
        "prefill": 0.1, "eviction": 0.2, "decode": 0.3
    },
    "method=flexprefill+quest,decode_sparsity=0.5": {"prefill": None, "decode": 0.5},
    "method=flexprefill+quest,decode_sparsity=0.5,gamma=0.8": {"prefill": None, "decode": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("arguments", SPARSITIES)
def test_sparsity_of_each_phase(arguments: str) -> None:
    found = accept(arguments)
    expected = SPARSITIES[arguments]
    assert found.sparsities == expected
    # A phase that was asked for nothing is dense; one with native knobs runs.
    running = {phase: value for phase, value in expected.items() if value != 0}
    assert {phase: a.sparsity for phase, a in found.plan.phases.items()} == running
    assert found.sparsity == (next(iter(expected.values())) if len(set(expected.values())) == 1 else None)
    assert found.describe()["requested_by_phase"] == expected


def test_a_decode_sparsity_below_the_kv_sparsity_warns(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("lm_eval_sparse").propagate = True
    with caplog.at_level(logging.WARNING):
        accept("method=snapkv+quest,kv_sparsity=0.5,decode_sparsity=0.8")
        assert not caplog.records
        accept("method=snapkv+quest,kv_sparsity=0.8,decode_sparsity=0.5")
    (record,) = caplog.records
    assert_says(record.getMessage(), "decode_sparsity=0.5", "snapkv", "quest", "kv_sparsity=0.8")


# --- knobs -----------------------------------------------------------------------------------------------------------

STRUCTURAL = [
    ("vertical_slash", "window", 512),
    ("vertical_slash", "tile", 32),
    ("vertical_slash", "tile", "auto"),
    ("vertical_slash", "sinks", 0),
    ("vertical_slash", "near", 16),
    ("flexprefill_vs", "window", 512),
    ("flexprefill_vs", "tile", 16),
    ("flexprefill", "block_size", 32),
    ("flexprefill", "block_size", "auto"),
    ("flexprefill", "tau", 0.2),
    ("flexprefill", "tau", 0),
    ("block_sparse", "block_size", 32),
    ("block_sparse", "subdiagonal", True),
    ("snapkv", "window", 512),
    ("snapkv", "kernel", 7),
    ("snapkv", "local", 64),
    ("ada_snapkv", "floor", 0.5),
    ("ada_snapkv", "window", 2048),  # beside a sparsity there is no capacity that it could exceed
    ("quest", "page_size", 32),
    ("quest", "share_pages", False),
]


@pytest.mark.parametrize(("method", "knob", "value"), STRUCTURAL)
def test_structural_knobs_beside_a_sparsity(method: str, knob: str, value: Any) -> None:
    phase = METHODS[method].phase
    for argument in ("sparsity", PHASE_ARGUMENTS[phase]):
        for name in (knob, f"{method}.{knob}"):
            found = parse({"method": method, argument: 0.9, name: value})
            assert getattr(found.methods[phase], knob) == value and found.sparsities == {phase: 0.9}
            assert found.describe()["knobs"][method][knob] == value


BUDGETS = [(cls.name, knob) for cls in METHODS.values() for knob in cls.budget_knobs]


@pytest.mark.parametrize(("method", "knob"), BUDGETS)
def test_budget_knobs_beside_a_sparsity(method: str, knob: str) -> None:
    phase, given = phase_of(method), named(method)
    own = PHASE_ARGUMENTS[phase]
    value = {"bits": 8}.get(knob, 0.8 if isinstance(METHODS[method].knobs()[knob], float) else 2048)
    for argument in ("sparsity", own):
        for name in (knob, f"{method}.{knob}"):
            for sparsity in (0.9, 0):
                message = refuse({"method": given, argument: sparsity, name: value})
                assert_says(message, f"{argument}={sparsity:g}", f"{knob}={value}", "either", "type for example")
                # What it says to type works.
                accept(message.rsplit("type for example ", 1)[1])
    # The knob alone is fine, and so is a sparsity of another phase.
    assert getattr(parse({"method": given, knob: value}).methods[phase], knob) == value
    other = "quest" if phase != "decode" else "snapkv"
    argument = PHASE_ARGUMENTS[METHODS[other].phase]
    assert parse({"method": f"{given}+{other}", argument: 0.9, knob: value}).sparsities[phase] is None


def test_several_budget_knobs_are_all_named() -> None:
    message = refuse("method=vertical_slash,sparsity=0.9,verticals=100,slashes=200")
    assert_says(message, "verticals=100", "slashes=200", "sparsity=0.9")
    message = refuse("method=snapkv+quest,sparsity=0.9,capacity=512")
    assert_says(message, "capacity=512", "sparsity=0.9")
    message = refuse("method=snapkv+quest,sparsity=0.9,kv_sparsity=0.5,capacity=512")
    assert_says(message, "capacity=512", "kv_sparsity=0.5")


SHARED = [
    ("vertical_slash", "snapkv", "window", 128),
    ("vertical_slash", "snapkv", "sinks", 8),
    ("flexprefill_vs", "ada_snapkv", "window", 128),
]


@pytest.mark.parametrize(("first", "second", "knob", "value"), SHARED)
def test_a_knob_that_two_chosen_methods_have(first: str, second: str, knob: str, value: int) -> None:
    for methods in (f"{first}+{second}", f"{second}+{first}+quest"):
        message = refuse({"method": methods, "sparsity": 0.5, knob: value})
        assert_says(message, f"{knob}={value}", first, second, f"{first}.{knob}={value}", f"{second}.{knob}={value}")
        # Each of the two forms works and sets this one only; both together set both.
        for name in (first, second):
            found = parse({"method": methods, "sparsity": 0.5, f"{name}.{knob}": value})
            by_name = {m.name: getattr(m, knob) for m in found.methods.values() if m.name != "quest"}
            other = first if name == second else second
            assert by_name == {name: value, other: METHODS[other].knobs()[knob]}
        both = parse({"method": methods, "sparsity": 0.5, f"{first}.{knob}": value, f"{second}.{knob}": value + 1})
        assert getattr(both.methods["prefill"], knob) == value and getattr(both.methods["eviction"], knob) == value + 1


def test_every_knob_with_its_methods_name_before_it() -> None:
    names = config.argument_names()
    for cls in METHODS.values():
        for knob, default in cls.knobs().items():
            assert {knob, f"{cls.name}.{knob}"} <= names
            found = parse({"method": named(cls.name), f"{cls.name}.{knob}": default})
            inside = {"inner": METHODS["quest"]()} if cls.phase == "wrapper" else {}
            assert found.methods[phase_of(cls.name)] == cls(**inside)


def test_a_knob_given_twice() -> None:
    """`window` and `snapkv.window` mean the same knob here: neither may win silently."""
    assert_says(refuse("method=snapkv,sparsity=0.5,window=64,snapkv.window=128"), "window=64", "snapkv.window=128")


def test_arguments_of_the_model_are_not_ours() -> None:
    ours, others = config.split(typed("method=snapkv+quest,pretrained=x,dtype=float32,snapkv.window=64,kv_sparsity=0.5,"
                                      "stats=full,preset=paper,quest.window=3,window=2"))  # fmt: skip
    assert set(others) == {"pretrained", "dtype"}
    # A knob that its method does not have is none of the model, either.
    assert set(ours) == {"method", "snapkv.window", "kv_sparsity", "stats", "preset", "window", "quest.window"}


#: Arguments -> what the refusal must hold: what was given, what is accepted, what to type.
REFUSED: dict[str, tuple[str, ...]] = {
    # methods
    "method=quset": ("'quset'", "did you mean 'quest'", "accepted: dense"),
    "method=snapkv+qest": ("'qest'", "'quest'"),
    "method=quest+": ("method='quest+'", "a name is missing beside a plus sign", "type method=quest"),
    "method=quest quest": ("'quest quest'", "accepted: dense"),
    "method=None": ("None", "accepted: dense"),
    "method=snapkv+ada_snapkv": ("snapkv", "ada_snapkv", "eviction phase", "one method per phase"),
    "method=block_sparse+vertical_slash": ("block_sparse", "vertical_slash", "prefill phase"),
    "method=quest+snapkv+quest": ("quest", "decode phase"),
    "method=quest+dense": ("dense", "leave it out"),
    # sparsities of phases without a method
    "method=quest,kv_sparsity=0.5": ("kv_sparsity=0.5", "eviction", "snapkv, ada_snapkv", "quest fills the decode"),
    "method=quest,sparsity=0.5,kv_sparsity=0.5": ("kv_sparsity=0.5", "eviction", "quest fills the decode"),
    "method=snapkv,decode_sparsity=0.5": ("decode_sparsity=0.5", "decode phase", "quest", "snapkv fills the eviction"),
    "method=flexprefill,kv_sparsity=0.9": ("kv_sparsity=0.9", "snapkv", "flexprefill fills the prefill"),
    "method=snapkv+quest,prefill_sparsity=0.9": ("prefill_sparsity=0.9", "vertical_slash", "snapkv", "quest"),
    "method=dense,prefill_sparsity=0.5": ("prefill_sparsity=0.5", "prefill", "flexprefill", "all phases are dense"),
    "prefill_sparsity=0.5": ("prefill_sparsity=0.5", "prefill", "all phases are dense"),
    "decode_sparsity=0.5": ("decode_sparsity=0.5", "decode", "quest"),
    "sparsity=0.5": ("sparsity=0.5", "needs a method", "quest", "method="),
    # knobs of other methods
    "method=flexprefill,quest.page_size=32": ("quest.page_size=32", "type method=flexprefill+quest,quest.page_size=32"),
    "method=quest,snapkv.window=32": ("snapkv.window=32", "type method=snapkv+quest,snapkv.window=32"),
    "method=vertical_slash,snapkv.window=32": (
        "snapkv.window=32",
        "type method=vertical_slash+snapkv,snapkv.window=32",
    ),
    "method=quest,gamma=0.5": ("gamma=0.5", "flexprefill (prefill phase)", "method=flexprefill+quest,gamma=0.5"),
    "method=dense,top_k=5": ("top_k=5", "block_sparse", "method=block_sparse,top_k=5"),
    "floor=0.5": ("floor=0.5", "ada_snapkv", "method=dense"),
    "method=snapkv,floor=0.5": ("floor=0.5", "ada_snapkv", "method=snapkv"),
    # values
    "method=snapkv,capacity=256": ("capacity=256", "window=256", "above 256"),
    "method=snapkv,capacity=100": ("capacity=100", "window=256", "smaller window"),
    "method=ada_snapkv,capacity=1024,window=1024": ("capacity=1024", "window=1024"),
    "method=snapkv,capacity=131,window=64": ("capacity=131", "sinks=4", "local=128", "at least 132"),
    "method=ada_snapkv,capacity=131,window=64": ("capacity=131", "at least 132"),
    "method=snapkv,capacity=0": ("capacity=0", "at least 1"),
    "method=snapkv,kernel=8": ("kernel=8", "odd", "kernel=9"),
    "method=snapkv,sparsity=0.5,kernel=20": ("kernel=20", "odd", "kernel=21"),
    "method=snapkv,local=0": ("local=0", "at least 1"),
    "method=ada_snapkv,floor=1.5": ("floor=1.5", "from 0 to 1"),
    "method=ada_snapkv,floor=-0.1": ("floor=-0.1", "from 0 to 1"),
    "method=quest,page_size=128": ("page_size=128", "8, 16, 32, 64"),
    "method=quest,page_size=12": ("page_size=12", "8, 16, 32, 64"),
    "method=quest,page_size=256": ("page_size=256", "8, 16, 32, 64"),
    "method=quest,page_size=0": ("page_size=0", "8, 16, 32, 64"),
    "method=quest,page_size=auto": ("page_size='auto'", "8, 16, 32, 64"),
    "method=quest,budget=1000": ("budget=1000", "page_size=16", "budget=992", "budget=1008"),
    "method=quest,budget=1008,page_size=32": ("budget=1008", "page_size=32", "budget=992", "budget=1024"),
    "method=quest,budget=5": ("budget=5", "page_size=16", "budget=16"),
    "method=quest,budget=0": ("budget=0", "at least 1"),
    "method=quest,share_pages=maybe": ("share_pages='maybe'", "True or False"),
    "method=quest,share_pages=1": ("share_pages=1", "True or False"),
    "method=block_sparse,top_k=1": ("top_k=1", "at least 2"),
    "method=block_sparse,top_k=2,subdiagonal=True": ("top_k=2", "subdiagonal=True", "top_k=3"),
    "method=block_sparse,subdiagonal=1": ("subdiagonal=1", "True or False"),
    "method=ada_snapkv,window=0": ("window=0", "at least 1"),
    "method=flexprefill_vs,window=0": ("window=0", "at least 1"),
    "method=block_sparse,block_size=48": ("block_size=48", "16, 32, 64, 128"),
    "method=block_sparse,block_size=auto": ("block_size='auto'", "16, 32, 64, 128"),
    "method=vertical_slash,tile=8": ("tile=8", "16, 32, 64, 128", "auto"),
    "method=vertical_slash,verticals=0": ("verticals=0", "at least 1"),
    "method=vertical_slash,near=0": ("near=0", "at least 1"),
    "method=flexprefill_vs,alpha=1.1": ("alpha=1.1", "from 0 to 1"),
    "method=flexprefill_vs,alpha=-0.1": ("alpha=-0.1", "from 0 to 1"),
    "method=flexprefill,gamma=0": ("gamma=0", "up to 1"),
    "method=flexprefill,min_budget=512,max_budget=256": ("max_budget=256", "min_budget=512"),
    # the rest
    "stats=fulll": ("stats='fulll'", "did you mean 'full'", "accepted: basic, full"),
    "stats=True": ("stats=True", "accepted: basic, full"),
    "stats=": ("stats=''", "accepted: basic, full"),
    "backend=gathr": ("backend='gathr'", "'gather'", "accepted: auto"),
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_refused(arguments: str) -> None:
    assert_says(refuse(arguments), *REFUSED[arguments])


def test_what_a_message_offers_works() -> None:
    for arguments in ("method=quest,budget=1000", "method=quest,budget=5", "method=quest,budget=1008,page_size=32"):
        base = {name: value for name, value in typed(arguments).items() if name != "budget"}
        for budget in re.findall(r"budget=(\d+)", refuse(arguments).split("give", 1)[1]):
            assert parse({**base, "budget": int(budget)}).methods["decode"].budget == int(budget)
    accept("method=snapkv,capacity=257")
    accept("method=snapkv,capacity=132,window=64")
    accept("method=snapkv,capacity=100,window=64,local=90,sinks=4")


# --- values of every kind for every knob -----------------------------------------------------------------------------

KNOBS = [(cls.name, knob) for cls in METHODS.values() for knob in cls.knobs()]
WRONG: tuple[Any, ...] = (
    [], [16], (16,), {}, {"a": 1}, "", "many", "16", "0.5", "true", True, False, None, math.nan, math.inf, -math.inf,
    -1, -0.5, 1.5, b"16", 1j, object(), int,
)  # fmt: skip


@pytest.mark.parametrize(("method", "knob"), KNOBS)
def test_wrong_kinds_of_values(method: str, knob: str) -> None:
    default = METHODS[method].knobs()[knob]
    for value in WRONG:
        arguments = {"method": named(method), knob: value}
        if (value is None and default is None) or (isinstance(value, bool) and isinstance(default, bool)):
            parse(arguments)
        elif value == 1.5 and isinstance(default, float) and default > 1:
            continue  # no share: it may be one of its values
        else:
            assert_says(refuse(arguments), knob)


@pytest.mark.parametrize(("method", "knob"), [*KNOBS, *(("quest", name) for name in ("sparsity", "decode_sparsity"))])
def test_numbers_too_large_for_a_float(method: str, knob: str) -> None:
    """They are refused, or a count that is never reached; no other exception than `UserError`."""
    for value in (10**400, -(10**400)):
        try:
            json.dumps(parse({"method": named(method), knob: value}).describe())
        except UserError as error:
            assert knob in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("argument", ["sparsity", *PHASE_ARGUMENTS.values()])
def test_wrong_kinds_of_sparsities(argument: str) -> None:
    for value in WRONG:
        if value is None:  # as if it were not there
            assert set(parse({"method": "+".join(TRIPLE), argument: None}).sparsities.values()) == {None}
            continue
        message = refuse({"method": "+".join(TRIPLE), argument: value})
        assert_says(message, argument, "from 0", "not including 1")


@pytest.mark.parametrize("argument", ["method", "preset", "backend", "stats"])
def test_wrong_kinds_of_words(argument: str) -> None:
    for value in WRONG:
        if argument == "preset" and value is None:
            continue
        message = refuse({"method": "quest", "sparsity": 0.9, argument: value})
        assert argument in message and "accepted" in message, message


def try_out(method: Method, sparsity: float | None) -> None:
    """Select on a small random input."""
    torch.manual_seed(0)
    query, key = torch.randn(4, 80, 16), torch.randn(2, 80, 16)
    method.too_short(sparsity, 80)
    method.largest_sparsity(80)
    if method.phase != "decode":
        select(method, query, key, scale=0.25, softcap=None, sparsity=sparsity)
        return
    held = RaggedKV.of(key.reshape(-1, 16), key.reshape(-1, 16), [0, 80], [80, 80])
    context = Decoding(held, torch.tensor([80]), kv_heads=2)
    pages = select(method, query[:, -1:].reshape(2, 2, 1, 16), context, sparsity=sparsity)
    pages.check(held)
    method.cost(held.visible(1), pages.keys_read(held).amax(1).long(), group=2, dim=16, element=4)


@pytest.mark.parametrize(("method", "knob"), KNOBS)
def test_a_whole_number_written_as_a_float(method: str, knob: str) -> None:
    """`capacity=1e3` and `window=256.0` arrive as floats: they are refused, or mean the whole number throughout."""
    default = METHODS[method].knobs()[knob]
    if isinstance(default, bool) or (default is not None and not isinstance(default, (int, str))):
        return
    value = {"auto": 32.0, None: 4096.0}.get(default, default if isinstance(default, str) else float(default or 0))
    # Counts small enough for a prompt of 80 tokens.
    small = {"window": 16.0, "capacity": 40.0, "local": 8.0, "verticals": 10.0, "slashes": 10.0, "top_k": 3.0,
             "near": 4.0, "budget": 32.0, "kernel": 3.0}  # fmt: skip
    rest = {"snapkv": {"capacity": 40, "window": 16, "local": 8, "kernel": 3}, "quest": {"budget": 32}}
    rest["ada_snapkv"] = rest["snapkv"]
    budgets = METHODS[method].budget_knobs
    for sparsity in (None, 0.5):
        if sparsity is not None and knob in budgets:
            continue
        arguments = {"method": named(method), **rest.get(method, {}), knob: small.get(knob, value)}
        if sparsity is not None:
            arguments = {name: given for name, given in arguments.items() if name not in budgets}
            arguments["sparsity"] = sparsity
        try:
            found = parse(arguments)
        except UserError:
            continue
        try_out(found.methods[phase_of(method)], sparsity)


# --- what is written down --------------------------------------------------------------------------------------------

#: Arguments that each ask for something else.
DIFFERENT = [
    "",
    "method=quest",
    "method=quest,sparsity=0.9",
    "method=quest,sparsity=0.91",
    "method=quest,sparsity=0.9,preset=paper",
    "method=quest,sparsity=0.9,page_size=32",
    "method=quest,sparsity=0.9,share_pages=False",
    "method=quest,sparsity=0",
    "method=quest,budget=512",
    "method=quest,budget=512,page_size=32",
    "method=quest,sparsity=0.9,backend=naive",
    "method=snapkv,sparsity=0.9",
    "method=snapkv,sparsity=0.9,window=64",
    "method=snapkv,sparsity=0.9,kernel=7",
    "method=snapkv,sparsity=0.9,local=64",
    "method=snapkv,sparsity=0.9,sinks=8",
    "method=snapkv,capacity=512",
    "method=ada_snapkv,sparsity=0.9",
    "method=ada_snapkv,sparsity=0.9,floor=0.5",
    "method=snapkv+quest,sparsity=0.9",
    "method=snapkv+quest,sparsity=0.9,kv_sparsity=0.5",
    "method=snapkv+quest,kv_sparsity=0.9,decode_sparsity=0.95",
    "method=snapkv+quest,kv_sparsity=0.5",
    "method=snapkv+quest,kv_sparsity=0.5,budget=512",
    "method=flexprefill+snapkv+quest,sparsity=0.9",
    "method=flexprefill,sparsity=0.9",
    "method=flexprefill,sparsity=0.9,tau=0.2",
    "method=flexprefill,sparsity=0.9,block_size=32",
    "method=flexprefill",
    "method=flexprefill,gamma=0.8",
    "method=flexprefill,min_budget=512",
    "method=flexprefill,max_budget=2048",
    "method=flexprefill_vs,sparsity=0.9",
    "method=vertical_slash,sparsity=0.9",
    "method=vertical_slash,sparsity=0.9,window=512",
    "method=vertical_slash,sparsity=0.9,tile=32",
    "method=vertical_slash,sparsity=0.9,near=16",
    "method=vertical_slash,sparsity=0.9,window=256",  # typed, so that shorter prompts are dense
    "method=vertical_slash,sparsity=0.9,preset=paper",
    "method=vertical_slash,sparsity=0.9,preset=paper,window=256",
    "method=vertical_slash+snapkv,sparsity=0.9,snapkv.window=128",
    "method=vertical_slash+snapkv,sparsity=0.9,vertical_slash.window=128",
    "method=block_sparse,sparsity=0.9",
    "method=block_sparse,sparsity=0.9,block_size=32",
    "method=block_sparse,sparsity=0.9,subdiagonal=True",
    "method=block_sparse,sparsity=0.9,preset=paper",
    "method=block_sparse,sparsity=0.9,preset=paper,subdiagonal=False",
    "method=block_sparse,top_k=32",
]


def test_descriptions_tell_configurations_apart() -> None:
    """They are the fingerprint by which answers of other configurations are refused."""
    seen: dict[str, str] = {}
    for arguments in DIFFERENT:
        text = json.dumps(accept(arguments).describe(), sort_keys=True, allow_nan=False)
        assert text not in seen, f"{arguments!r} and {seen[text]!r} are described alike"
        seen[text] = arguments
        assert json.loads(text) == accept(arguments).describe()


def test_defaults_written_out_change_no_description() -> None:
    for arguments in DIFFERENT:
        base = typed(arguments)
        found = parse(base)
        for phase, method in found.methods.items():
            for knob in method.knobs():
                decided = found.sparsities[phase] is not None and knob in method.budget_knobs
                # A typed window is not cut to shorter prompts.
                if knob != "window" and not decided and not {knob, f"{method.name}.{knob}"} & set(base):
                    more = parse({**base, f"{method.name}.{knob}": getattr(method, knob)})
                    assert more.describe() == found.describe()


# --- the table of methods --------------------------------------------------------------------------------------------


def test_the_table_of_methods() -> None:
    header, rule, *rows = table().splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns[:2] == ["method", "phase"] and set(rule) <= {"|", "-"}
    known = {
        "dense": "any", "vertical_slash": "prefill", "flexprefill": "prefill", "flexprefill_vs": "prefill",
        "block_sparse": "prefill", "snapkv": "eviction", "ada_snapkv": "eviction", "quest": "decode",
    }  # fmt: skip
    phases = {name: cls.phase for name, cls in METHODS.items()}
    assert known.items() <= phases.items() and len(rows) == len(phases)
    for row, (name, phase) in zip(rows, phases.items(), strict=True):
        cells_of = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells_of) == len(columns) and all(cells_of)
        assert cells_of[:2] == [f"`{name}`", phase]
        knobs = cells_of[columns.index("knobs (default)")]
        if name == "dense":
            assert knobs == "-"
            continue
        for knob, default in METHODS[name].knobs().items():
            assert f"`{knob}` ({default})" in knobs


def test_defaults_are_the_papers() -> None:
    knobs = {name: METHODS[name].knobs() for name in METHODS}
    query, key = torch.randn(2, 700, 16), torch.randn(1, 700, 16)
    options = {"scale": 0.25, "softcap": None, "sparsity": None}
    # What `auto` stands for when native knobs rule.
    for name in ("vertical_slash", "flexprefill_vs"):
        used = select(METHODS[name](), query, key, **options).knobs
        assert used | {"window": 256, "sinks": 4, "near": 64, "tile": 64} == used
    for name in ("snapkv", "ada_snapkv"):
        used = select(METHODS[name](capacity=400), query, key, **options).knobs
        assert used | {"window": 256, "kernel": 21, "sinks": 4, "local": 128} == used
    assert knobs["block_sparse"]["block_size"] == 16
    assert knobs["ada_snapkv"] == {**knobs["snapkv"], "floor": 0.2}
    assert knobs["quest"]["page_size"] == 16
