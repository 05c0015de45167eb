"""`plot` on damaged result files, and its bad options."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import DEEP, EITHER, LEGAL, LONG, NAME, REFUSED, Row, Verdict
from .shared import result

AREA = "plot"
PICTURE = "p.png"


class _Gone:
    """What takes a key away."""


GONE = _Gone()


def changed(**changes: Any) -> str:
    """A good result file with `a__b__c=value` set at that place; `GONE` takes it away."""
    content: Any = copy.deepcopy(result())
    for place, value in changes.items():
        *way, last = place.split("__")
        inner = content
        for step in way:
            inner = inner[step]
        if value is GONE:
            del inner[last]
        else:
            inner[last] = value
    return json.dumps(content)


def _named(old: str, new: str) -> str:
    return json.dumps(result()).replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])


def _scored(value: Any, key: str = "exact,none") -> str:
    content = result()
    content["results"]["niah"][key] = value
    return json.dumps(content)


def _raw(content: str, old: str, new: str) -> str:
    assert old in content
    return content.replace(old, new)


#: One damaged file alone.
FILES: dict[str, str | bytes] = {
    "empty": "",
    "torn": json.dumps(result())[:700],
    "torn in the head": "{",
    "bytes": b"\xff\xfe{\x00}\x00",
    "a list": "[]",
    "a text": '"x"',
    "null": "null",
    "no results": changed(results=GONE),
    "results: []": changed(results=[]),
    "results: null": changed(results=None),
    "results: 5": changed(results=5),
    "results: {}": changed(results={}),
    "results: texts": changed(results={"niah": "x"}),
    "results: null inside": changed(results={"niah": None}),
    "results: a list inside": changed(results={"niah": [1]}),
    "config: []": changed(config=[]),
    "config: 5": changed(config=5),
    "config: a text": changed(config="x"),
    "sparse: null": changed(config__sparse=None),
    "sparse: 5": changed(config__sparse=5),
    "sparse: []": changed(config__sparse=[1]),
    "sparse: {}": changed(config__sparse={}),
    "sparse: no method": changed(config__sparse__method=GONE),
    "sparse: method 5": changed(config__sparse__method=5),
    "sparse: no tasks": changed(config__sparse__tasks=GONE),
    "sparse: tasks null": changed(config__sparse__tasks=None),
    "sparse: tasks []": changed(config__sparse__tasks=[]),
    "sparse: a task []": changed(config__sparse__tasks__niah=[]),
    "sparse: a task null": changed(config__sparse__tasks__niah=None),
    "sparse: a phase null": changed(config__sparse__tasks__niah__prefill=None),
    "sparse: a phase 5": changed(config__sparse__tasks__niah__prefill=5),
    "sparsity: a text": changed(config__sparse__tasks__niah__prefill__executed_sparsity="x"),
    "sparsity: a list": changed(config__sparse__tasks__niah__prefill__executed_sparsity=[0.5]),
    "sparsity: 5": changed(config__sparse__tasks__niah__prefill__executed_sparsity=5),
    "sparsity: -1": changed(config__sparse__tasks__niah__prefill__executed_sparsity=-1),
    "sparsity: null": changed(config__sparse__tasks__niah__prefill__executed_sparsity=None),
    "requested: a text": changed(config__sparse__requested_sparsity="x"),
    "requested: a list": changed(config__sparse__requested_sparsity=[1]),
    "sample_len: a text": changed(results__niah__sample_len="x"),
    "sample_len: a list": changed(results__niah__sample_len=[1]),
    "score: NaN": _raw(_scored(0.123), "0.123", "NaN"),
    "score: Infinity": _raw(_scored(0.123), "0.123", "Infinity"),
    "score: 1e400": _raw(_scored(0.123), "0.123", "1e400"),
    "score: 400 digits": _raw(_scored(0.123), "0.123", "9" * 400),
    "score: 5000 digits": _raw(_scored(0.123), "0.123", "9" * 5000),
    "score: a text alone": _scored("high"),
    "score: null alone": _scored(None),
    "stderr: a negative one": _scored(-0.5, "exact_stderr,none"),
    "stderr: NaN": _raw(_scored(0.123, "exact_stderr,none"), "0.123", "NaN"),
    "seconds: a text": changed(total_evaluation_time_seconds="long"),
    "seconds: a list": changed(total_evaluation_time_seconds=[1]),
    "higher_is_better: []": changed(higher_is_better=[]),
    "higher_is_better: a task []": changed(higher_is_better__niah=[1]),
    "nested": DEEP,
    "nested in results": changed(results=0).replace('"results": 0', f'"results": {"[" * 5000}{"]" * 5000}'),
}

#: Odd and good: a picture is drawn.
DRAWN: dict[str, str | bytes] = {
    "config: null": changed(config=None),
    "no config": changed(config=GONE),
    "no higher_is_better": changed(higher_is_better=GONE),
    "no model name": changed(model_name=GONE),
    "a name with one $": _named("org/model", "org/$model"),
    "a name with mathtext": _named("niah", "$\\frac{1}{$"),
    "a task with _ and ^": _named("niah", "a_b^c_{}$x_$"),
    "a task with line ends": _named("niah", "a\nb\r\nc"),
    "a task with markup": _named("niah", "<script>alert(1)</script>"),
    "a task of other letters": _named("niah", "задача 任务 \u202e🙂"),
    "a task of 10,000 characters": _named("niah", LONG),
    "a method with $": _named("flexprefill", "$flex_{$"),
    "a metric with $": _named("exact,none", "$ex_{act,none"),
    "a name of escapes": _named("niah", "\x1b[2Jniah"),
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps(result()).encode(),
    "score: 1e308": _scored(1e308),
    "score: -1e308": _scored(-1e308),
    "score: 0": _scored(0),
    "no stderr": _scored("N/A", "exact_stderr,none"),
    "sample_len: null": changed(results__niah__sample_len=None),
    "seconds: null": changed(total_evaluation_time_seconds=None),
    "requested: null": changed(config__sparse__requested_sparsity=None),
}  # fmt: skip

#: Whether these are refused or drawn is a matter of taste.
_EITHER = (
    "config: null", "no config", "a byte order mark", "sparsity: null", "sample_len: null", "score: 1e308",
    "score: -1e308",
    "no higher_is_better", "a task of 10,000 characters",
)  # fmt: skip
_TASTE = (
    "score: NaN", "stderr: NaN", "stderr: a negative one", "seconds: a text", "seconds: a list", "sample_len: a text",
    "sample_len: a list", "score: null alone", "sparse: {}", "higher_is_better: []", "higher_is_better: a task []",
    "sparse: no tasks", "sparse: tasks null",
)  # fmt: skip


def _plot(name: str, content: str | bytes, verdict: Verdict) -> Row:
    return Row(AREA, name, ("plot", "results_1.json", "--output", PICTURE), verdict, files={"results_1.json": content},
               proof=PICTURE, says="" if verdict != REFUSED else "results_1.json")  # fmt: skip


def _many(count: int) -> Callable[[Path, Any], None]:
    def make(work: Path, words: Any) -> None:
        for number in range(count):
            (work / f"results_{number}.json").write_text(json.dumps(result(0.5, f"task_{number}")))

    return make


def _loop(work: Path, words: Any) -> None:
    (work / "results_loop.json").symlink_to("results_loop.json")


def _folder(work: Path, words: Any) -> None:
    (work / PICTURE).mkdir()


#: Bad arguments; the good result files are there.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "nothing": ("plot",),
    "no file": ("plot", "--output", PICTURE),
    "no output": ("plot", "<results>"),
    "results that are not there": ("plot", "nosuch", "--output", PICTURE),
    "an empty name": ("plot", "", "--output", PICTURE),
    "300 characters": ("plot", NAME, "--output", PICTURE),
    "10,000 characters": ("plot", f"/{LONG}", "--output", PICTURE),
    "another user's home": ("plot", "~nosuchuser/x", "--output", PICTURE),
    "a folder without results": ("plot", "<llama>", "--output", PICTURE),
    "no result file": ("plot", "<llama>/config.json", "--output", PICTURE),
    "no JSON": ("plot", "<llama>/model.safetensors", "--output", PICTURE),
    "a device": ("plot", "/dev/null", "--output", PICTURE),
    "a device without end": ("plot", "/dev/zero", "--output", PICTURE),
    "a task that is not there": ("plot", "<results>", "--output", PICTURE, "--task", "nosuch"),
    "an empty task": ("plot", "<results>", "--output", PICTURE, "--task", ""),
    "output without a suffix": ("plot", "<results>", "--output", "p"),
    "output of another suffix": ("plot", "<results>", "--output", "p.pdf"),
    "output is empty": ("plot", "<results>", "--output", ""),
    "output is a suffix": ("plot", "<results>", "--output", ".png"),
    "output below a file": ("plot", "<results>", "--output", "<llama>/config.json/p.png"),
    "output on a device": ("plot", "<results>", "--output", "/dev/null/p.png"),
    "output in /proc": ("plot", "<results>", "--output", "/proc/p.png"),
    "output of 300 characters": ("plot", "<results>", "--output", f"{NAME}.png"),
    "output of another user": ("plot", "<results>", "--output", "~nosuchuser/p.png"),
    "one good output, one bad": ("plot", "<results>", "--output", PICTURE, "--output", "p.pdf"),
    "an unknown option": ("plot", "<results>", "--output", PICTURE, "--nosuch"),
    "heat: nothing": ("heat",),
    "heat: results that are not there": ("heat", "nosuch"),
    "heat: nothing was diagnosed": ("heat", "<results>", "--output", PICTURE),
    "heat: output of another suffix": ("heat", "<results>", "--output", "p.html"),
    "heat: output is empty": ("heat", "<results>", "--output", ""),
    "escapes": ("plot", "\x1b[2J", "--output", PICTURE),
    "a line end": ("plot", "a\nb", "--output", PICTURE),
}  # fmt: skip

ROWS: list[Row] = [
    *(_plot(name, content, EITHER if name in (*_TASTE, *_EITHER) else REFUSED) for name, content in FILES.items()),
    *(_plot(name, content, EITHER if name in _EITHER else LEGAL) for name, content in DRAWN.items()),
    *(Row(AREA, name, argv) for name, argv in ARGUMENTS.items()),
    Row(AREA, "output is a folder", ("plot", "<results>", "--output", PICTURE), make=_folder),
    Row(AREA, "a link to itself", ("plot", "results_loop.json", "--output", PICTURE), make=_loop),
    Row(AREA, "a pipe", ("plot", "results_1.json", "--output", PICTURE),
        make=lambda work, words: os.mkfifo(work / "results_1.json")),
    Row(AREA, "a pipe in a folder", ("plot", ".", "--output", PICTURE), EITHER,
        make=lambda work, words: os.mkfifo(work / "results_1.json")),
    Row(AREA, "a folder of that name", ("plot", ".", "--output", PICTURE), EITHER,
        make=lambda work, words: (work / "results_1.json").mkdir()),
    Row(AREA, "40 tasks", ("plot", ".", "--output", PICTURE), EITHER, make=_many(40), proof=PICTURE,
        doubt="a picture in rows of panels, or a line that asks for --task", slow=True),
    Row(AREA, "120 tasks", ("plot", ".", "--output", PICTURE), EITHER, make=_many(120), proof=PICTURE,
        doubt="a picture in rows of panels, or a line that asks for --task", slow=True),
    Row(AREA, "a torn file among good ones", ("plot", "<results>", "results_1.json", "--output", PICTURE), EITHER,
        files={"results_1.json": "{"}, proof=PICTURE, doubt="left out with a warning, or refused"),
    Row(AREA, "a page with markup", ("plot", ".", "--output", "p.html"), LEGAL, proof="p.html",
        files={"results_1.json": _named("niah", "<script>alert(1)</script>")}),
    Row(AREA, "good", ("plot", "<results>", "--output", PICTURE, "--output", "p.html"), LEGAL, proof="p.*"),
    Row(AREA, "into a new folder", ("plot", "<results>", "--output", "new/p.png"), LEGAL, proof="new/p.png"),
    Row(AREA, "the same file twice", ("plot", "<results>", "<results>", "--output", PICTURE), EITHER, proof=PICTURE),
    Row(AREA, "an old result file", ("plot", ".", "--output", PICTURE), LEGAL, proof=PICTURE,
        files={"results_1.json": changed(**{"n-samples": GONE, "higher_is_better": {}, "date": GONE})}),
]  # fmt: skip
