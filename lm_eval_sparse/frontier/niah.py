"""Needle in a haystack: four of very many random key-value pairs are asked for (paper, Table 1 and Appendix;
the task's idea is RULER's multi-query needle test, Hsieh et al. 2024).

Keys and values are four hyphen-joined groups of eight characters from [a-z0-9], so nothing can be guessed and
nothing repeats; every distractor looks exactly like a needle. Low dispersion, low scope.
"""

from __future__ import annotations

import random
import re
import string
from bisect import insort
from collections.abc import Sequence
from typing import Any

from .recipe import Message, Recipe, answer_or_all, plain, rng, slot_scores

TARGETS = 4

_ALPHABET = string.ascii_lowercase + string.digits
# Not part of a longer code: no group more on either side.
_CODE = r"(?<![^\W_])(?<![^\W_]{2}-)[A-Za-z0-9]{8}(?:[-–—][A-Za-z0-9]{8}){3}(?!-?[^\W_])"
_VALUE = re.compile(_CODE)
# A line of the answer starts with its number, whatever punctuation (quotes, brackets, markup) stands around it; one
# without any has a code on its line ("4 keys were found" numbers nothing). Within a line a number starts a further one
# where it is set off by punctuation ("1. … 2. …") and is not that of a value ("value 1: …").
_NUMBER = re.compile(
    rf"""
    ^(?:[^\w\n]|_)*(?:[^\w\s]|_|\b(?:key|entry|pair|question|answer|index|id|no|q|a))[^\w\n]{{0,4}}(\d{{1,2}})(?!\w)
    |^[ \t]*(\d{{1,2}})(?!\w)(?=[ \t]*$|[ \t]*[^\w\s]|[^\n]*?{_CODE})
    |(?<![\w.:-])(?<!value[ ])(?<![(]key[ ])
        (\d{{1,2}})(?:[.):\]]{{1,2}}[^\w\n]{{0,4}}\s|[^\w\n]{{1,8}}(?:key[^\w\n]{{1,4}})?(?={_CODE}))
    """,
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
# A blank line ends a line that has its value, unless a further value follows: "or X".
_BLANK_LINE = re.compile(
    r"\n[ \t]*\n(?!\W*(?:(?:or|and|also|maybe|perhaps|possibly|alternatively|else|it|is|may|be)\b\W*)+\Z)",
    re.IGNORECASE,
)

_INTRO = (
    "Below is a long list of entries. Each entry gives one key and the value stored under it. "
    "You will be asked for the values of four of the keys."
)
_TWICE = "The question is written twice, once before the list and once after it, so that you know what to look for."
_QUESTION = "Which values are stored under the following keys?\n{keys}"
# Key and value meet as they do in an answer line. With a verb between them small models know a value but miss its
# first character: SmolLM2-135M, 4096 tokens, 20 needles: .05 exact and .55 bits per character, against .25 and .33.
_ENTRY = "Stored under {key}: {value}."
_GENERATE = """\
Reply in two parts: an explanation, then the answer. First say in one or two sentences how you found the values, \
between <explanation> and </explanation>. Then give the four keys in the order of the question, each followed by its \
value, as numbered lines between <answer> and </answer>. The reply has this form:

<explanation>
your explanation
</explanation>
<answer>
1. first key: its value
2. second key: its value
3. third key: its value
4. fourth key: its value
</answer>

Rules:
- The answer has exactly four lines. Each has the number of the key in the question, the key, a colon and the value.
- Copy keys and values exactly, character by character, with all of their four groups.
- Do not leave a line out, and do not give a value that is stored under another key.
- Keep the explanation short: keys and values belong in the answer.
- Write nothing before <explanation> and nothing after </answer>."""
_FORCED = """\
Reply with four numbered lines and nothing else: the four keys in the order of the question, each followed by a colon \
and its value. Copy keys and values exactly, character by character.

Answer:
"""


class NiahDraft:
    """Units are distractor pairs. Pair i is the same, and lies at the same relative place, whatever else fits."""

    most = 1_000_000

    def __init__(self, random_source: random.Random, forced: bool):
        self._random = random_source
        self._forced = forced
        self._seen: set[str] = set()
        self._pairs: list[tuple[str, str]] = []
        # Every pair draws its place in the list: the order of those that fit does not depend on how many fit.
        self._filler_place = random_source.random()
        self._places: list[float] = []
        self._draw(TARGETS)
        self.keys = [key for key, _ in self._pairs]
        self.values = [value for _, value in self._pairs]
        tail, continuation = _requests(self.keys, self.values)[-1]
        self.answer = tail + continuation

    def message(self, units: int, filler: str) -> Message:
        """The user message with four targets, `units` distractors and, unless empty, the line `filler`."""
        self._draw(TARGETS + units)
        placed = [(self._places[i], _ENTRY.format(key=k, value=v)) for i, (k, v) in enumerate(self._pairs)]
        placed = sorted(placed[: TARGETS + units])
        if filler:
            insort(placed, (self._filler_place, filler))
        question = _QUESTION.format(keys="\n".join(f"{i}. {key}" for i, key in enumerate(self.keys, 1)))
        entries = "\n".join(line for _, line in placed)
        after = _FORCED if self._forced else _GENERATE
        return Message(_INTRO, _TWICE, question, f"List of entries:\n{entries}", after)

    def gold(self, units: int) -> dict[str, Any]:
        """`keys` and `values` of the targets in query order, `pairs` in the list, and the gold `target` text."""
        target = "\n".join(f"{i}. {k}: {v}" for i, (k, v) in enumerate(zip(self.keys, self.values, strict=True), 1))
        return {"keys": self.keys, "values": self.values, "pairs": TARGETS + units, "target": target}

    def _draw(self, pairs: int) -> None:
        while len(self._pairs) < pairs:
            self._pairs.append((self._code(), self._code()))
            self._places.append(self._random.random())

    def _code(self) -> str:
        while True:
            letters = "".join(self._random.choices(_ALPHABET, k=32))
            code = "-".join(letters[i : i + 8] for i in range(0, 32, 8))
            if code not in self._seen:
                self._seen.add(code)
                return code


class Niah(Recipe):
    """Four needles among as many distractor pairs as fit. Scored per needle (paper, NIAH: accuracy)."""

    name = "niah"
    version = 2
    paper_window = 512

    def draft(self, length: int, seed: int, index: int, forced: bool) -> NiahDraft:
        return NiahDraft(rng(self.name, self.version, length, seed, index), forced)

    def score(self, doc: dict[str, Any], text: str) -> dict[str, float]:
        """`acc`: share of the four numbered lines with the right key (case counts) and value (case does not), and no
        other code."""
        found = parse(text)
        right = [found.get(i) == pair for i, pair in enumerate(zip(doc["keys"], doc["values"], strict=True), 1)]
        return {"acc": sum(right) / len(right)}

    def requests(self, doc: dict[str, Any]) -> list[tuple[str, str]]:
        """One request per needle; each forced text continues the one before, so one forward can score all four."""
        return _requests(doc["keys"], doc["values"])

    def forced_score(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """`exact` and `bits_per_char` over the four values, see `recipe.slot_scores`."""
        return slot_scores(doc["values"], results)

    def evidence(self, doc: dict[str, Any]) -> list[str]:
        """The four entries."""
        return [_ENTRY.format(key=k, value=v) for k, v in zip(doc["keys"], doc["values"], strict=True)]

    def secrets(self, doc: dict[str, Any]) -> list[str]:
        return doc["values"]

    def chance(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"exact": 0.0}

    def guessed(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"acc": 0.0}


def _requests(keys: Sequence[str], values: Sequence[str]) -> list[tuple[str, str]]:
    requests, before = [], ""
    for i, (key, value) in enumerate(zip(keys, values, strict=True), 1):
        requests.append((f"{before}{i}. {key}:", f" {value}"))
        before += f"{i}. {key}: {value}\n"
    return requests


def parse(text: str) -> dict[int, tuple[str, ...]]:
    """The numbered lines of an answer: number -> (key as written, value in lower case, and what other codes it has).

    Read from the first answer block that has such a line, or without a block from the whole text. A line may say
    anything around its codes, and go on in the next ones: it ends where another number starts one, or at a blank line
    once it has its value, unless "or" and the like lead on to a further one. The first line of a number with two
    codes counts; a code given twice is given once.
    """
    return answer_or_all(text, _lines) or {}


def _lines(text: str) -> dict[int, tuple[str, ...]]:
    text = plain(text)
    starts = list(_NUMBER.finditer(text))
    found: dict[int, tuple[str, ...]] = {}
    for start, following in zip(starts, [*starts[1:], None], strict=False):
        codes: dict[str, str] = {}
        last = start.end()
        for code in _VALUE.finditer(text, last, following.start() if following else len(text)):
            if len(codes) > 1 and _BLANK_LINE.search(text[last : code.start()]):
                break
            written = re.sub("[–—]", "-", code.group())
            codes.setdefault(written.lower(), written)
            last = code.end()
        if len(codes) > 1:
            key, *others = codes.values()
            found.setdefault(int(start[start.lastindex]), (key, *map(str.lower, others)))
    return found
