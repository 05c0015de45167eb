"""Bad and odd `method=`: chains, files of the user's own, knobs; and bad arguments of `check-method`, `new-method`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import LEGAL, LONG, NAME, REFUSED, Row, evaluate, rows, short

AREA = "methods"

#: A file with a method that works.
_OWN = """\
from dataclasses import dataclass
from typing import ClassVar
from lm_eval_sparse.methods import ScoredEviction


@dataclass(frozen=True)
class Own(ScoredEviction):
    name: ClassVar[str] = "attacked"
    importance: ClassVar[str] = "norm"
    reference: ClassVar[str] = "nobody"
    tiny: ClassVar = {"capacity": 48}
    capacity: int = 16

    def score(self, call):
        return -call.key.float().norm(dim=-1)
"""


def _alone(text: str) -> tuple[str, ...]:
    """With the embedded model, which nothing may go for."""
    return evaluate(text)


def _small(text: str, *options: str) -> tuple[str, ...]:
    return evaluate(f"pretrained=<llama>,backend=gather,{text}", "--limit", "1", "--device", "cpu", *options)


#: What is no chain of methods.
CHAINS = (
    ":", "+", "::", "++", ":+:", "quest:", ":quest", "quest+", "+quest", "quest++snapkv", "quest:quest",
    "quest:snapkv", "nosuch:quest", "quest:nosuch", "quest+quest", "quest+dense", "dense+dense", "dense:quest",
    "snapkv+ada_snapkv", "quest;snapkv", "quest snapkv", "quest|snapkv", "QUEST", "quest.", "quest/", "quest\\", "-",
    "quest:" * 300, "quest+" * 300 + "quest", "ｑｕｅｓｔ", "quest\x1b[2J", "quest\nsnapkv", "\u202equest",
)  # fmt: skip

#: What names no file with a method; own.py has one, called Own.
FILES = (
    "own.py", "own.py:", "./own.py", "own.py:own", "own.py:Nosuch", "own.py:dataclass", "own.py:ScoredEviction",
    "own.py:__name__", "own.py:Own.name", "own.py:Own()", "own.py:Own:Own", "own.py:Own:quest", "own.py:Own+own.py:Own",
    "snapkv+own.py:Own", "nosuch.py:Own", "./nosuch.py:Own", "/no/such/own.py:Own", "../own.py:Own", "own.txt:Own",
    "./own:Own", "/", ".", "..", "./", "~", "~nosuchuser/own.py:Own", "~/nosuch.py:Own", "folder.py:Own", "pipe.py:Own",
    "zero.py:Own", "loop.py:Own", f"{NAME}.py:Own", f"./{NAME}.py:Own", f"/{LONG}.py:Own", "own.py:" + LONG[:2000],
    "/proc/self/mem.py:Own", "/dev/null", "/dev/stdin.py:Own", "own.py:Own\x1b[2J", "own.py:Ow\nn", "./\x1b[2J.py:Own",
    "https://example.org/own.py:Own", "hf://a/own.py:Own", ".py:Own", "./.py:Own", "large.py:Own",
)  # fmt: skip

#: What is in a file that is no method: what its code does.
CODE: dict[str, str] = {
    "ends the process": "import sys\nsys.exit(0)\n",
    "raises": "raise ValueError('no')\n",
    "raises lines": "raise ValueError('no\\nTraceback (most recent call last):')\n",
    "prints escapes": "raise ValueError('\\x1b[2J')\n",
    "is no Python": "def (:\n",
    "is torn": _OWN[: len(_OWN) // 2],
    "calls itself": "def f(): f()\nf()\n",
    "raises something of its own": "class Own(BaseException): pass\nraise Own('x')\n",
    "imports what is not there": "import nothing_of_this_name\n",
    "is empty": "",
    "has a number": "Own = 5\n",
    "has a function": "def Own(): pass\n",
    "has a class": "class Own: pass\n",
    "has a name of another": _OWN.replace('"attacked"', '"quest"'),
    "has no name": _OWN.replace('    name: ClassVar[str] = "attacked"\n', ""),
    "has a number for a name": _OWN.replace('"attacked"', "5"),
    "has a name with a plus sign": _OWN.replace('"attacked"', '"a+b"'),
    "has no reference": _OWN.replace('    reference: ClassVar[str] = "nobody"\n', ""),
    "has no score": _OWN.replace("def score", "def scores"),
    "has a knob of the model": _OWN.replace("capacity: int", "dtype: int"),
    "is no dataclass": _OWN.replace("@dataclass(frozen=True)", ""),
    "has a budget that is no knob": _OWN.replace("tiny: Cl", 'budget_knobs: ClassVar = ("size",)\n    tiny: Cl'),
    "has a text for budgets": _OWN.replace("tiny: Cl", 'budget_knobs: ClassVar = "capacity"\n    tiny: Cl'),
    "scores nothing": _OWN.replace("return -call.key.float().norm(dim=-1)", "return None"),
    "scores too much": _OWN.replace(".norm(dim=-1)", ""),
    "scores NaN": _OWN.replace("return -", "return float('nan') * "),
    "raises when it scores": _OWN.replace("return -", "1 // 0; return -"),
    "ends the process when it is made": _OWN + "    def __post_init__(self):\n        raise ValueError('x')\n",
}

#: Knobs that no method in use has, or values that it does not take.
KNOBS = (
    "method=quest,quest.bugdet=8", "method=quest,qeust.budget=8", "method=quest,snapkv.window=8",
    "method=quest,gamma=1",
    "method=dense,budget=8", "method=quest,.budget=8", "method=quest,quest.=8", "method=quest,quest.budget.x=8",
    "method=flexprefill,every=64", "method=quest,every=64", "method=snapkv,every=0", "method=snapkv,every=-1",
    "method=snapkv,every=1.5", "method=snapkv,every=often", "method=quest,budget=8,quest.budget=16",
    f"method=quest,quest.{LONG}=1",
)  # fmt: skip


def _odd(work: Path, words: Any) -> None:
    (work / "folder.py").mkdir()
    os.mkfifo(work / "pipe.py")
    (work / "zero.py").symlink_to("/dev/zero")
    (work / "loop.py").symlink_to("loop.py")
    with (work / "large.py").open("wb") as file:
        file.truncate(1 << 33)


_WITH = {"files": {"own.py": _OWN}}
_CONFIG = """\
model: sparse-hf
tasks: [tiny_choice]
include_path: <tasks>
output_path: out
limit: 1
device: cpu
model_args:
  pretrained: <llama>
  backend: gather
  method: METHOD
"""
_LEAVES = "open('PWNED', 'w').close()\n" + _OWN


def _config(method: str, code: str = _LEAVES) -> dict[str, str]:
    return {"run.yaml": _CONFIG.replace("METHOD", method), "own.py": code}


CHECK: dict[str, tuple[str, ...]] = {
    "nothing": (),
    **{short(name): (name,) for name in ("", "nosuch", "quset", "dense", "quest+snapkv", "quest:", ":", "./nosuch.py:X",
                                         "./own.py", "./own.py:Nosuch", "/dev/null", LONG, NAME, "a\nb", "\x1b[2J")},
    "a check that is not there": ("quest", "--only", "nosuch"),
    "a check that does not apply": ("quest", "--only", "every"),
    "an empty check": ("quest", "--only", ""),
    "an unknown option": ("quest", "--nosuch"),
    "a word too many": ("quest", "snapkv"),
}  # fmt: skip

NEW: dict[str, tuple[str, ...]] = {
    "nothing": (),
    **{f"name {short(name)}": (name,) for name in
       ("", "A", "a-b", "a b", "1a", "a__b", "_a", "a/b", "../a", "/tmp/a", ".", "quest", "dense", "sparsity", "gamma",
        "class", "größe", "a\nb", "\x1b[2J", "a" * 41, LONG, "a.py", "~")},
    "a phase that is none": ("mine", "--phase", "later"),
    "an empty phase": ("mine", "--phase", ""),
    "a wrapper": ("mine", "--phase", "wrapper"),
    "a folder that is not there": ("mine", "--out", "nosuch"),
    "an empty folder": ("mine", "--out", ""),
    "a folder of another user": ("mine", "--out", "~nosuchuser/x"),
    "a folder of 300 characters": ("mine", "--out", NAME),
    "a file for a folder": ("mine", "--out", "<llama>/config.json"),
    "a device for a folder": ("mine", "--out", "/dev/null"),
    "a folder in /proc": ("mine", "--out", "/proc"),
    "an unknown option": ("mine", "--nosuch"),
    "a word too many": ("mine", "x"),
}  # fmt: skip

ROWS: list[Row] = [
    *rows(AREA, REFUSED, CHAINS, lambda text: _alone(f"method={text}"), says="method"),
    *(
        Row(AREA, f"file {short(text)}", _alone(f"method={text}"), files={"own.py": _OWN}, make=_odd, says="method")
        for text in FILES
    ),
    *(
        Row(AREA, f"a file that {name}", _small("method=own.py:Own"), files={"own.py": code}, says="own.py|attacked")
        for name, code in CODE.items()
    ),
    *rows(AREA, REFUSED, KNOBS, _alone),
    Row(AREA, "a file", _small("method=./own.py:Own"), LEGAL, **_WITH),
    Row(AREA, "a file beside a method", _small("method=own.py:Own+quest,capacity=20,quest.budget=16"), LEGAL, **_WITH),
    Row(AREA, "a file in JSON", evaluate('{"pretrained": "<llama>", "method": "<work>/own.py:Own"}', "--limit", "1",
        "--device", "cpu"), LEGAL, **_WITH),
    Row(AREA, "a configuration that names a file", ("run", "--config", "run.yaml"), files=_config("./own.py:Own"),
        says="ALLOW_CODE"),
    Row(AREA, "a configuration that names a file in a chain", ("run", "--config", "run.yaml"),
        files=_config("flexprefill+<work>/own.py:Own"), says="ALLOW_CODE"),
    Row(AREA, "a configuration that allows itself", ("run", "--config", "run.yaml"),
        files=_config("own.py:Own\n  allow_code: true"), says="ALLOW_CODE"),
    Row(AREA, "a configuration of the same model with another method typed", ("run", "--config", "run.yaml",
        "--model_args", "pretrained=<llama>,method=quest,budget=16"), LEGAL, files=_config("own.py:Own")),
    Row(AREA, "a configuration whose code is allowed", ("run", "--config", "run.yaml", "--allow-code"), LEGAL,
        files=_config("own.py:Own", _OWN)),
    Row(AREA, "a configuration whose code is allowed by a variable", ("run", "--config", "run.yaml"), LEGAL,
        files=_config("own.py:Own", _OWN), env={"LM_EVAL_SPARSE_ALLOW_CODE": "1"}),
    *(Row(AREA, f"check-method: {name}", ("check-method", *argv), **_WITH) for name, argv in CHECK.items()),
    *(Row(AREA, f"new-method: {name}", ("new-method", *argv)) for name, argv in NEW.items()),
    Row(AREA, "new-method: is there", ("new-method", "mine"), files={"mine.py": "mine"}),
    Row(AREA, "new-method: its tests are there", ("new-method", "mine"), files={"test_mine.py": "mine"}),
    Row(AREA, "new-method", ("new-method", "mine"), LEGAL, proof="mine.py"),
    Row(AREA, "new-method: into a folder", ("new-method", "mine", "--phase", "decode", "--out", "<work>"), LEGAL,
        proof="test_mine.py"),
    Row(AREA, "check-method", ("check-method", "quest", "--only", "gqa"), LEGAL, proof="says pass"),
    Row(AREA, "check-method: a file", ("check-method", "own.py:Own", "--only", "taxonomy"), LEGAL, proof="says pass",
        **_WITH),
]  # fmt: skip
