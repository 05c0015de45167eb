"""Common words: ten words of a long shuffled list occur thirty times, all others three times; which ten?
(paper, §10 "CWE"; the task's idea is RULER's, Hsieh et al. 2024).

Nothing can be found by looking for it, the whole list must be weighed. Low dispersion, high scope.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from .recipe import Message, Recipe, first_answer, plain, ranking_chance, ranking_scores, rng

COMMON = 10
COMMON_TIMES = 30
RARE_TIMES = 3

_LISTS = ("nounlist.txt", "adjectivelist.txt", "verblist.txt")
# The number of an entry: at the start of a line with or without punctuation ("#1 word", "12 word"), later with it.
_NUMBER = re.compile(
    r"^[^\w\n]{0,12}\d{1,6}(?!\w)(?!\s+(?:times|occurrences)\b)[^\w\n]{0,12}|(?<![\w.,])\d{1,6}\s?[.):]\s{0,4}(?=[^\W\d])"
)
# What a model may add to a word: "(30 times)", ": 30", " - thirty times", "occurs thirty times".
_BRACKETS = re.compile(r"[(\[{][^()\[\]{}]*[)\]}]")
_ADDED = re.compile(
    r"[(\[{:=–—→]|\s-+\s|->|(?<!\w)x?\d|(?<=\s)(?:is|was|are|were|has|with|which|that|because|since|as|in|at|thirty|times"
    r"|appears|appeared|appearing|occurs|occurred|occurring"
    r"|(?:found|repeated|listed|counted|seen|used|mentioned|comes|came)(?=\s+(?:\d|thirty\b|in\b)))\b"
)
# Further words on the same line.
_FURTHER = re.compile(r"[,;/|&+\t、，；]|\b(?:and|or)\b")
# "the word oak", "first word: oak"; but "word" alone may be an answer.
_LABEL = re.compile(
    r"(?:the\s+)?(?:(?:first|second|third|last|next|most|common|frequent|[a-z]{3,5}th)\s+)*words?\b[*_\"'\s]*:[^\w\n]*(?=[^\W\d_])"
    r"|(?:the\s+)?word\b[^\w\n]*(?=[^\W\d_])|the\s+(?=[^\W\d_])"
)
_HEDGING = """
    or and also maybe perhaps possibly probably likely either even rather
"""
_HEDGES = frozenset(_HEDGING.split())
# What may be said of a word of the list.
_SAID = """
    the a an it is was of in at with as each time times thirty noun nouns adjective adjectives verb verbs word words
    plural singular common most frequent frequently often very list listed text total count counts counted exactly
    about around approximately occurrence occurrences occurs appears appearing occurring repeated found mentioned
    seen yes correct right sure same high top first last done end note answer
"""
_NOTE = frozenset(_SAID.split())
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_OUTSIDE = re.compile(r"[\W_]*")

_INTRO = (
    "Below is a long numbered list of words in random order. {common} of the words occur {common_times} times each, "
    "all others occur {rare_times} times each. You will be asked for the {common} common ones."
)
_TWICE = "The question is written twice, once before the list and once after it, so that you know what to look for."
_QUESTION = (
    "Which {common} words are the most common in the list? Each of them occurs {common_times} times, "
    "every other word {rare_times} times."
)
_HEADING = "List of words:"
_GENERATE = """\
Reply in two parts: an explanation, then the answer. First say in one or two sentences how you found the words, \
between <explanation> and </explanation>. Then give the {common} words as numbered lines between <answer> and \
</answer>. The reply has this form:

<explanation>
your explanation
</explanation>
<answer>
1. first word
2. second word
and so on, to
{common}. last word
</answer>

Rules:
- The answer has exactly {common} lines, numbered from 1 to {common}. Each has its number and one word, and nothing \
else: do not say how often a word occurs.
- Write each word once, as it is written in the list. The words may be in any order, and their numbers in the list do \
not matter.
- Write nothing before <explanation> and nothing after </answer>."""
_FORCED = """\
Reply with the {common} words as numbered lines, in any order, and nothing else.

Answer:
"""
_LEAD = "1."
_FIGURES = {"common": COMMON, "common_times": COMMON_TIMES, "rare_times": RARE_TIMES}


@lru_cache(maxsize=1)
def pool() -> tuple[str, ...]:
    """The nouns, adjectives and verbs of the package `wonderwords` without a hyphen, in lower case, sorted."""
    folder = files("wonderwords") / "assets"
    lines = [line for name in _LISTS for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return tuple(sorted({word for line in lines if (word := " ".join(line.lower().split())) and "-" not in word}))


@lru_cache(maxsize=1)
def _words() -> frozenset[str]:
    return frozenset(pool())


@lru_cache(maxsize=1)
def _longest() -> str:
    return max(pool(), key=lambda word: len(word.encode()))


class CweDraft:
    """Units are rare words. Every copy of every word draws its place: the order does not depend on how many fit.

    The twin ranks the common words against ten rare ones, whose copies it moves to the end of the list: there each of
    them stands as often, on average, as each common word. Where they stood anywhere, an attention that sees nothing but
    the last part of the list saw common words alone, and ranked better than one that sees it all.
    """

    def __init__(self, random_source: random.Random, forced: bool):
        self._random, self._forced = random_source, forced
        words = list(pool())
        self.words = random_source.sample(words, COMMON)
        self.most = len(words) - COMMON
        self._copies: list[int] = []
        self._rare: list[str] = []
        self._late: list[tuple[float, int]] = []
        self.answer = f"{_LEAD} {_longest()}"

    def _write(self) -> None:
        """Order the rare words and all copies, once: a draft is often begun for nothing but its `answer`."""
        common = set(self.words)
        self._rare = [word for word in pool() if word not in common]
        self._random.shuffle(self._rare)
        # −1 − i stands for common word i, i for rare word i.
        self._copies = [-1 - i for i in range(COMMON) for _ in range(COMMON_TIMES)]
        self._copies += [i for i in range(self.most) for _ in range(RARE_TIMES)]
        self._random.shuffle(self._copies)
        # Where each copy of the rare words that the twin ranks goes, as a share of the last part of the list.
        self._late = sorted((self._random.random(), i) for i in range(COMMON) for _ in range(RARE_TIMES))

    def message(self, units: int, filler: str) -> Message:
        """The user message with the common words, `units` rare ones and, unless empty, `filler` below the list."""
        if not self._copies:
            self._write()
        order = [i for i in self._copies if i < units]
        if self._forced:
            late = [(share, i) for share, i in self._late if i < units]
            order = _moved_late([i for i in order if not 0 <= i < COMMON], late)
        listed = (self.words[-1 - i] if i < 0 else self._rare[i] for i in order)
        entries = "\n".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        question = _QUESTION.format(**_FIGURES)
        after = (_FORCED if self._forced else _GENERATE).format(**_FIGURES)
        below = f"\n\n{filler}" if filler else ""
        return Message(_INTRO.format(**_FIGURES), _TWICE, question, f"{_HEADING}\n{entries}{below}", after)

    def gold(self, units: int) -> dict[str, Any]:
        """`words`: the common ones; `rare`: as many rare ones, which the twin holds against them; the `target`."""
        if not self._copies:
            self._write()
        return {
            "words": self.words,
            "rare": self._rare[: min(units, COMMON)],
            "distinct": COMMON + units,
            "target": "\n".join(f"{i}. {word}" for i, word in enumerate(self.words, 1)),
        }


def _moved_late(order: Sequence[int], late: Sequence[tuple[float, int]]) -> list[int]:
    """`order` with the entries of `late` (share of the last part, entry; ascending) put into its last part.

    That part is as long as needed for a common word to occur there, on average, as often as each late one: 3 times
    among the entries of `order` in it, of which there are a tenth because it occurs 30 times in all.
    """
    part = len(late) + len(order) * RARE_TIMES // COMMON_TIMES
    whole = len(order) + len(late)
    found: list[int | None] = [None] * whole
    free = whole - part
    for behind, (share, entry) in zip(range(len(late), 0, -1), late, strict=True):
        free = min(max(free, whole - part + int(share * part)), whole - behind)
        found[free] = entry
        free += 1
    rest = iter(order)
    return [next(rest) if entry is None else entry for entry in found]


class Cwe(Recipe):
    """Ten words occur thirty times, all others three times (paper, CWE: IoU)."""

    name = "cwe"
    version = 2
    least_units = COMMON
    # Measured. Why is a conjecture: the step that answers reads every copy of a word in a dense cache, and can count by
    # itself whatever the prompt's own attention saw.
    insensitive = ("prefill",)

    def identity(self) -> list[Any]:
        """The version of the word list's package and the list itself."""
        return list(self.origin().values())

    def origin(self) -> dict[str, Any]:
        """The package and its version, and the hash of the list."""
        digest = hashlib.sha256("\n".join(pool()).encode()).hexdigest()
        return {"source": f"wonderwords {version('wonderwords')}", "sha256": digest}

    def draft(self, length: int, seed: int, index: int, forced: bool) -> CweDraft:
        return CweDraft(rng(self.name, self.version, length, seed, index), forced)

    def score(self, doc: dict[str, Any], text: str) -> dict[str, float]:
        """`iou` of the words in numbered lines and the gold ones, see `parse`; without an answer block 0."""
        gold = set(doc["words"])
        found, further = first_answer(text, parse) or (set(), set())
        return {"iou": len(found & gold) / len(found | further | gold)}

    def requests(self, doc: dict[str, Any]) -> list[tuple[str, str]]:
        """One request per common word and per rare one, as the first of the answer."""
        return [(_LEAD, f" {word}") for word in self._candidates(doc)]

    def forced_score(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """`average_precision` of the ten common words among them and ten rare ones."""
        return ranking_scores(self._candidates(doc), doc["words"], results)

    def evidence(self, doc: dict[str, Any]) -> list[str]:
        """The whole list: no part of it is enough."""
        text = doc["input"]
        start = text.index(f"{_HEADING}\n") + len(_HEADING) + 1
        return [text[start : text.index("\n\n", start)]]

    def secrets(self, doc: dict[str, Any]) -> list[str]:
        """None: common words may be words of the instructions as well."""
        return []

    def chance(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"average_precision": ranking_chance(len(self._candidates(doc)), len(doc["words"]))}

    def guessed(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"iou": len(doc["words"]) / doc["distinct"]}

    def _candidates(self, doc: dict[str, Any]) -> list[str]:
        # In alphabetical order: where a model type breaks ties by position, the gold words gain nothing.
        return sorted([*doc["words"], *doc["rare"]])


def parse(text: str) -> tuple[set[str], set[str]] | None:
    """The words of an answer's numbered lines, in lower case, and those of the pool that stand alone on lines below.

    The latter are not given as asked, so that they can cost and not gain; None without numbered words. A line without
    a number is read as a numbered one where the number stands alone above it.

    All words of a line count: those before its first comma (or "and", "/", …), and behind one a single word or words of
    the pool. What a model adds is ignored: what stands in brackets, after a colon, a dash, a number or a verb ("oak
    appears thirty times"), and phrases behind a comma; but a single word of the pool counts there too, unless it is
    said of words (`_NOTE`). Two words are one where the pool has them ("contact lens").
    """
    found: set[str] = set()
    further: set[str] = set()
    waiting = False
    for line in plain(text).lower().splitlines():
        numbers = list(_NUMBER.finditer(line))
        for number, following in zip(numbers, [*numbers[1:], None], strict=False):
            named = _named(line[number.end() : following.start() if following else None])
            found |= named
            waiting = not named
        if waiting and not numbers and (named := _named(line)):
            found |= named
            waiting = False
        elif found and not numbers:
            further |= _single(line)
    return (found, further) if found else None


def _named(entry: str) -> set[str]:
    """The words that an entry gives."""
    entry = entry[_OUTSIDE.match(entry).end() :]
    if label := _LABEL.match(entry):
        entry = entry[label.end() :]
    brackets = _BRACKETS.findall(entry)
    said, *added = _ADDED.split(_BRACKETS.sub(" ", entry), maxsplit=1)
    first, *further = _FURTHER.split(said)
    found = set(_items(first))
    for piece in further:
        items = [item for item in _items(piece) if item not in _HEDGES]
        if len(items) == 1 or _words().issuperset(items):
            found.update(items)
    for piece in [*brackets, *added]:
        found.update(*map(_single, _FURTHER.split(piece)))
    return found


def _single(text: str) -> set[str]:
    """The word of the pool that `text` is, beside what is said of words."""
    items = [item for item in _items(text) if item not in _HEDGES and item not in _NOTE]
    return set(items) if len(items) == 1 and items[0] in _words() else set()


def _items(text: str) -> list[str]:
    """Words, two of them as one where the pool has them."""
    words, items = _WORD.findall(text), []
    i = 0
    while i < len(words):
        single = words[i].replace("-", " ")
        if (pair := " ".join(words[i : i + 2])) in _words():
            items.append(pair)
            i += pair.count(" ") + 1
        else:
            items.append(single if single in _words() else words[i])
            i += 1
    return items
