"""Bad and odd command lines with what is right for each: data, by area. `tests/attacks.py` runs them.

Texts in a row may hold `<name>`, which stands for something on disk, see `WORDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

#: `refused`: exit status above 0, one line of ours on stderr, no traceback, nothing new on disk.
#: `legal`: exit status 0, and what was asked for is there. `either`: one of the two; where both would be right.
#: `reported`: exit status above 0, no traceback, and a report on stdout that says FAILED, or as `refused`.
Verdict = Literal["refused", "legal", "either", "reported"]
REFUSED: Verdict = "refused"
LEGAL: Verdict = "legal"
EITHER: Verdict = "either"
REPORTED: Verdict = "reported"

#: What `<name>` stands for in the arguments, the environment and the files of a row.
WORDS = {
    "llama": "a folder with a tiny model whose tokenizer has no chat template",
    "chat": "the same with a chat template",
    "lora": "a folder with an adapter for the tiny model",
    "remote": "a model folder with code of its own, which leaves a file PWNED in the working folder when it runs",
    "tasks": "a folder with four tiny tasks: tiny_choice, tiny_generate, tiny_loglikelihood, tiny_rolling",
    "results": "a folder with two good result files, of dense attention and of a sparse method",
    "work": "the working folder, empty but for `files` and what `make` puts there",
    "cache": "LM_EVAL_SPARSE_CACHE",
}

LONG = "x" * 10_000
NAME = "n" * 300
DEEP = "[" * 100_000


@dataclass(frozen=True)
class Row:
    """One command line.

    Attributes:
        area: which table it is from.
        name: what tells it from the others of its area.
        argv: the arguments behind `lm-eval-sparse`.
        verdict: what is right.
        env: variables of the environment; None takes one away.
        files: what stands in the working folder before, by path; words in texts are replaced.
        make: puts more there: a function of the working folder and of what the words stand for.
        proof: what a legal row leaves: a glob below the working folder, or text on stdout behind `says `. By default
            results with a score.
        secret: what must stand nowhere: not on stdout or stderr, not in any file.
        says: what the message of a refused row must hold: the name of what is wrong, or `one|another`.
        keeps: what a refused row may leave in the working folder: a glob.
        doubt: why the verdict is a matter of opinion, if it is.
        slow: takes more than about a second: runs on request.
        alone: would end this process, so it always runs as one of its own.
    """

    area: str
    name: str
    argv: tuple[str, ...]
    verdict: Verdict = REFUSED
    env: Mapping[str, str | None] = field(default_factory=dict)
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    make: Callable[[Path, Mapping[str, str]], None] | None = None
    proof: str = "out/**/results_*.json"
    secret: str = ""
    says: str = ""
    keeps: str = ""
    doubt: str = ""
    slow: bool = False
    alone: bool = False

    @property
    def id(self) -> str:
        """The row's name for pytest."""
        return f"{self.area}: {self.name}"


def short(text: str) -> str:
    """`text` as a part of a row's name: printable and not endless."""
    text = text.encode("unicode_escape").decode()
    return text if len(text) <= 70 else f"{text[:60]}…{len(text)}"


def evaluate(model_args: str, *options: str, task: str = "tiny_choice") -> tuple[str, ...]:
    """The arguments of a run on the tiny tasks, whose results go to `out`."""
    return (
        "run",
        "--model",
        "sparse-hf",
        "--model_args",
        model_args,
        "--tasks",
        task,
        "--include_path",
        "<tasks>",
        "--output_path",
        "out",
        *options,
    )


def rows(
    area: str, verdict: Verdict, cases: Iterable[str], argv: Callable[[str], tuple[str, ...]], **more: Any
) -> list[Row]:
    """A row for each of `cases`, whose arguments `argv` makes of it."""
    return [Row(area, short(case), argv(case), verdict, **more) for case in cases]


def table() -> list[Row]:
    """All rows."""
    from attack_rows import (
        commands,
        folders,
        gen_kwargs,
        ggufs,
        metadata,
        methods,
        model_args,
        options,
        plots,
        secrets,
    )

    found = [
        row
        for part in (model_args, gen_kwargs, metadata, options, plots, commands, ggufs, folders, secrets, methods)
        for row in part.ROWS
    ]
    names = [row.id for row in found]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"rows of one name: {sorted(twice)}"
    return found


#: Of the rows of one kind the first runs always, and of the others every so many-th.
EVERY = 12


def daily(found: list[Row]) -> list[Row]:
    """The rows that run without being asked for: some of each kind, none that takes long."""
    kinds: dict[tuple[str, str, str], int] = {}
    chosen = []
    for row in found:
        if row.slow or row.alone:
            continue
        kind = (row.area, row.verdict, row.says)
        if kinds.setdefault(kind, 0) % EVERY == 0:
            chosen.append(row)
        kinds[kind] += 1
    return chosen
