"""`lm-eval-sparse new-task`: a folder with a small, complete task of its own to change.

Everything a task needs is in it: recipe, YAML files, README section, tests. It works as it is written, so that its
author always has something that runs.
"""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from .. import paths
from ..errors import PROGRAM, UserError
from ..results.files import umask, why
from . import RECIPES
from .leaves import LENGTHS, TaskFolder

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_LONGEST_NAME = 40
#: Names that Windows has for devices: a folder with one can be made and copied nowhere there.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}


def write(name: str, parent: Path) -> Path:
    """Make the folder `parent`/`name` and return it. It appears whole or not at all. Raises `UserError`."""
    _check_name(name)
    folder = parent / name
    if not paths.is_dir(parent):
        if os.path.lexists(parent):
            raise UserError(f"--folder {parent} given, which is no folder; give a folder")
        raise UserError(f"--folder {parent} given, but there is no such folder; type: mkdir -p {parent}")
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already, and nothing is overwritten; take another name or another --folder")
    if importlib.util.find_spec(name) is not None:
        raise UserError(f"{name!r} given, but a Python module has this name and would be hidden; take another name")
    try:
        part = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=parent))
        try:
            for file, text in files(name).items():
                (part / file).write_text(text, encoding="utf-8")
            part.chmod(0o777 & ~umask())
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({why(error)}); give another place with --folder DIR") from None
    return folder


def files(name: str) -> dict[str, str]:
    """File name -> content of the folder of the new task `name`."""
    cls = "".join(word.capitalize() for word in name.split("_"))
    yaml = TaskFolder(
        name, ["acc"], ["exact", "-bits_per_char"], ["retrieval"], recipe=f"recipe: !function {name}.{cls}"
    ).files()
    texts = {f"{name}.py": _RECIPE, f"test_{name}.py": _TESTS, "README.md": _README}
    return yaml | {
        file: text.replace("@NAME@", name).replace("@CLASS@", cls).replace("@PROGRAM@", PROGRAM)
        for file, text in texts.items()
    }


def _check_name(name: str) -> None:
    accepted = "a task's name is lower-case words of letters and digits joined by underscores, such as parcel_search"
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or len(name) > _LONGEST_NAME:
        most = f" (at most {_LONGEST_NAME} characters)" if len(name) > _LONGEST_NAME else ""
        most = " (and no word of the Python language)" if keyword.iskeyword(name) else most
        raise UserError(f"{name!r:.100} given, but {accepted}{most}")
    if name in _DEVICES:
        raise UserError(f"{name!r} given, but Windows has a device of this name; take another name")
    if name.rpartition("_")[2] in LENGTHS:
        raise UserError(f"{name!r} given, but a task's name may not end in a length; the leaves' names get theirs")
    if name.startswith(("frontier_", "forced_")) or name in ("frontier", "forced"):
        raise UserError(
            f"{name!r} given, but the leaves' names get frontier_ and forced_ themselves; type the task's own name"
        )
    if name in RECIPES:
        raise UserError(f"{name!r} given, but this task exists; names that are taken: {', '.join(RECIPES)}")
    if name in sys.stdlib_module_names or name == "test":
        raise UserError(f"{name!r} given, but a module of Python has this name and would be hidden; take another name")


def next_steps(name: str, folder: Path) -> str:
    """What the author of the new task in `folder` may do with it."""
    leaf = f"frontier_{name}_4k"
    return f"""\
{folder} holds a task that works. What to do next:

1. Read {folder / name}.py and change it; its comments say what each part is for.
2. After every change:
     {PROGRAM} check-task {folder}
     {PROGRAM} show {leaf} --index 0 --include_path {folder}
     python -m pytest {folder / f"test_{name}.py"}
3. Run it; the twin asks for likelihoods instead of text, which small models can be measured with too:
     lm_eval --model sparse-hf --include_path {folder} --tasks {leaf},forced_{leaf} --limit 5
4. To make it one of the package's tasks, in a clone: move {name}.py to lm_eval_sparse/frontier/ and its tests to
   tests/, add a line to RECIPES in lm_eval_sparse/frontier/__init__.py and one to BUILT_IN in
   lm_eval_sparse/frontier/leaves.py, let the YAML files be written by
     python -m lm_eval_sparse.frontier.leaves tasks
   and add the section of README.md to tasks/README.md."""


_RECIPE = '''\
"""@NAME@: which locker holds a parcel, among very many parcels and lockers.

This is an example to change. It shows all parts of a task; the two classes are all that lm-eval-sparse asks for:

* a draft is one document whose size is still open. It can be written with any number of units (here: lines about
  other parcels), and whoever calls it finds the number that makes the prompt exactly as long as it should be;
* a recipe makes drafts and scores answers.

`@PROGRAM@ check-task .` in this folder checks everything that is promised here.
"""

from __future__ import annotations

import random
import re
import string
from bisect import insort
from collections.abc import Sequence
from typing import Any

from lm_eval_sparse.frontier.recipe import Message, Recipe, first_answer, rng, slot_scores

# The texts of a prompt. The question stands before and after the context, then come the instructions.
_INTRO = "Below is a long list that says for each parcel in which locker it lies. You will be asked for one parcel."
_TWICE = "The question is written twice, once before the list and once after it, so that you know what to look for."
_QUESTION = "What is the number of the locker in which parcel {parcel} lies?"
_LINE = "Parcel {parcel}: it lies in locker {locker}."
# Instructions for a generated answer: anything may come before, what counts stands between answer tags.
_GENERATE = """\\
Reply in two parts. First say in one sentence how you found the locker, between <explanation> and </explanation>. \\
Then give its number, and nothing else, between <answer> and </answer>:

<explanation>
your explanation
</explanation>
<answer>
number of the locker
</answer>

Write nothing after </answer>."""
# Instructions of the twin, whose answer is not generated: it is put here, and its likelihood is the score.
_FORCED = """\\
Reply with the parcel, a colon and the number of its locker, and nothing else.

Answer:
"""

# How an answer is read: six digits that are no part of a longer word or number.
_LOCKER = re.compile(r"(?<![\\w.,])\\d{6}(?![\\w]|[.,]\\d)")


class Draft:
    """One document. Its units are lines about other parcels.

    All that is random must come from `random_source`, and line i must be the same whatever number of lines is asked
    for: `message` is called with many numbers until the length is right. Never iterate over a set (its order differs
    from process to process), and do not use the module `random` itself, the clock, or the number of calls.
    """

    def __init__(self, random_source: random.Random, forced: bool):
        self._random = random_source
        self._forced = forced
        self._used: set[str] = set()
        self._lines: list[tuple[float, str]] = []
        #: The largest number of units there can be; as many as there is material.
        self.most = 100_000
        # Every line draws its place in the list, so that the order does not depend on how many lines there are.
        self._filler_place = random_source.random()
        self.parcel, self.locker = self._add_line()
        #: The longest text that the twin puts after the prompt: room is kept for it. Cheap to know at the start.
        self.answer = "".join(_request(self.parcel, self.locker))

    def message(self, units: int, filler: str) -> Message:
        """The user message with `units` units and, unless it is empty, the line `filler` somewhere in the context.

        As a `Message` it also exists without the question before the context (`question_first` in the metadata).
        """
        while len(self._lines) < 1 + units:
            self._add_line()
        placed = sorted(self._lines[: 1 + units])
        if filler:
            insort(placed, (self._filler_place, filler))
        lines = "\\n".join(line for _, line in placed)
        question = _QUESTION.format(parcel=self.parcel)
        after = _FORCED if self._forced else _GENERATE
        return Message(_INTRO, _TWICE, question, f"List:\\n{lines}", after)

    def gold(self, units: int) -> dict[str, Any]:
        """What scoring needs, as JSON types (no tuples, no sets), and `target`, the gold answer without tags.

        Other names than task, length, seed, index, tokens and input, which the document has anyway.
        """
        return {"parcel": self.parcel, "locker": self.locker, "target": self.locker}

    def _add_line(self) -> tuple[str, str]:
        parcel = self._new(string.ascii_uppercase)
        locker = self._new(string.digits)
        self._lines.append((self._random.random(), _LINE.format(parcel=parcel, locker=locker)))
        return parcel, locker

    def _new(self, letters: str) -> str:
        """Six random letters that were not used before: nothing can be guessed, and nothing repeats."""
        while True:
            word = "".join(self._random.choices(letters, k=6))
            if word not in self._used:
                self._used.add(word)
                return word


class @CLASS@(Recipe):
    """One parcel among as many others as fit. Say here what the task measures and where its idea is from."""

    name = "@NAME@"
    #: Raise it whenever documents or scores change: results of other versions cannot be compared.
    version = 1

    def draft(self, length: int, seed: int, index: int, forced: bool) -> Draft:
        """Document `index` of the leaf with `length` tokens. The twin (`forced`) has the same parcels: the seed of
        the random numbers does not contain `forced`."""
        return Draft(rng(self.name, self.version, length, seed, index), forced)

    def score(self, doc: dict[str, Any], text: str) -> dict[str, float]:
        """Metrics of a generated answer, 0 where it cannot be read; their names stand in `_generated` as well.

        `doc` is what `Draft.gold` returned. `acc`: 1 when the first number of the answer is the right one. An answer
        without tags is read as a whole. Be lenient about form and strict about content.
        """
        found = first_answer(text, _LOCKER.findall) or _LOCKER.findall(text)
        return {"acc": float(found[:1] == [doc["locker"]])}

    def requests(self, doc: dict[str, Any]) -> list[tuple[str, str]]:
        """What the twin asks: pairs of (text put after the prompt, continuation whose likelihood is wanted).

        Here the gold answer alone, which is enough where answers are exact and cannot be guessed. Where they are some
        of few candidates, ask for each candidate and score with `recipe.ranking_scores` or `recipe.option_scores`.
        """
        return [_request(doc["parcel"], doc["locker"])]

    def forced_score(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """Metrics of the twin from one (log-probability, would greedy decoding write it?) per request."""
        return slot_scores([doc["locker"]], results)

    def evidence(self, doc: dict[str, Any]) -> list[str]:
        """The pieces of the context that the answer follows from, each of them once in the prompt, verbatim."""
        return [_LINE.format(parcel=doc["parcel"], locker=doc["locker"])]

    def secrets(self, doc: dict[str, Any]) -> list[str]:
        """Strings that give the answer away, to be found in the evidence and nowhere else in the prompt."""
        return [doc["locker"]]

    def chance(self, doc: dict[str, Any]) -> dict[str, float]:
        """What the twin's metrics are for a model that knows nothing, where that can be said."""
        return {"exact": 0.0}


def _request(parcel: str, locker: str) -> tuple[str, str]:
    # The blank belongs to the continuation: most tokenizers write it into the first token of the word.
    return f"{parcel}:", f" {locker}"
'''

_TESTS = '''\
"""Tests of the task @NAME@. Add an answer here for every way in which models really write theirs."""

from __future__ import annotations

import pytest

from @NAME@ import @CLASS@

RECIPE = @CLASS@()


def document(index: int = 0, *, units: int = 40, forced: bool = False) -> dict:
    draft = RECIPE.draft(4096, 0, index, forced)
    return {"input": draft.message(units, "A line of filler."), **draft.gold(units)}


def test_the_gold_answer_scores_one():
    doc = document()
    assert RECIPE.score(doc, f"<answer>\\n{doc['target']}\\n</answer>") == {"acc": 1.0}


@pytest.mark.parametrize("text", ["", " \\n", "<answer></answer>", "I cannot help with that.", "000000", "1" * 5000])
def test_what_is_no_answer_scores_zero(text):
    assert RECIPE.score(document(), text) == {"acc": 0.0}


@pytest.mark.parametrize(
    "text, score",
    [
        ("<explanation>I read the list.</explanation>\\n<answer>271828</answer>", 1),
        ("<answer>\\n**271828**\\n</answer>", 1),
        ("<ANSWER>Locker 271828.</ANSWER>", 1),
        ("<answer>271828", 1),  # out of tokens
        ("The parcel lies in locker 271828.", 1),
        ("Parcel ABCDEF: it lies in locker 271828.", 1),
        ("<explanation>Not 314159.</explanation><answer>271828</answer>", 1),
        ("<answer>314159</answer>", 0),
        ("<answer>314159 or 271828</answer>", 0),
        ("<answer>2718281</answer>", 0),
        ("<answer>27182</answer>", 0),
    ],
)
def test_answers_written_by_hand(text, score):
    doc = {"parcel": "ABCDEF", "locker": "271828", "target": "271828"}
    assert RECIPE.score(doc, text) == {"acc": score}


def test_a_document_has_its_evidence_once_and_keeps_its_secret():
    for index in range(5):
        doc = document(index)
        (line,) = RECIPE.evidence(doc)
        assert doc["input"].count(line) == 1 and doc["input"].count(doc["locker"]) == 1


def test_a_document_depends_on_its_arguments_alone():
    draft = RECIPE.draft(4096, 0, 3, False)
    short = draft.message(5, "")
    draft.message(50, "")
    assert draft.message(5, "") == short == RECIPE.draft(4096, 0, 3, False).message(5, "")


def test_the_twin_has_the_same_gold_answer():
    assert document(2)["target"] == document(2, forced=True)["target"]
    doc = document()
    assert RECIPE.forced_score(doc, [(0.0, True)]) == {"exact": 1.0, "bits_per_char": 0.0}
    assert RECIPE.forced_score(doc, [(-9.0, False)])["exact"] == 0.0
'''

_README = """\
# The task @NAME@

One section like this one, changed to what your task does, belongs into `tasks/README.md` of lm-eval-sparse once the
task is contributed; `@PROGRAM@ check-task` looks for a heading or a table row with the task's name.

## @NAME@

*Low dispersion, low scope.* Very many parcels lie in numbered lockers; the locker of one is asked for. Names and
numbers are random, so nothing can be guessed and every other line looks like the one that counts.

A document, with most of its lines left out:

```
Below is a long list that says for each parcel in which locker it lies. You will be asked for one parcel.
The question is written twice, once before the list and once after it, so that you know what to look for.

What is the number of the locker in which parcel QWERTZ lies?

List:
Parcel ABCDEF: it lies in locker 314159.
Parcel QWERTZ: it lies in locker 271828.
…

What is the number of the locker in which parcel QWERTZ lies?
…
```

and its gold answer: `271828`.

Metric `acc`: 1 when the first six-digit number of the answer is the right one, mean over documents. Chance is 0.
Twin: `exact` (would greedy decoding have written the number; chance is 0) and `bits_per_char` (a model that knows
nothing needs 3.3 per digit).

Citation: name here the paper that the task or its idea is from.

| files | |
|---|---|
| `@NAME@.py` | the recipe: how documents are written and answers scored |
| `_generated`, `_forced` | what the leaves share, for generated answers and for the twins |
| `frontier_@NAME@_4k.yaml` …, `forced_frontier_@NAME@_4k.yaml` … | one leaf per prompt length |
| `test_@NAME@.py` | tests |
"""
