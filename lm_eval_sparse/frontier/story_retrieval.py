"""Story retrieval: sixteen chapters of a long story, each with one question about its place, its character or the
item bought in it (paper, Table 1 and Appendix, "Story Retrieval").

Natural text, and every answer lies in one sentence of a chapter that is named by number. Low dispersion, low scope.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from .recipe import Message, Recipe, answer_or_all, plain, rng, slot_scores
from .story import CHARACTERS, HERO, INTRO, LONGEST_ITEM, MOST, PLACES, Chapter, Story, message, normalise

QUESTIONS = 16

KINDS = ("place", "character", "item")
_ASK = {
    "place": f"to which place did {HERO} come?",
    "character": f"which character did {HERO} meet?",
    "item": f"which item did {HERO} acquire?",
}
_LONGEST = {"place": max(PLACES, key=len), "character": max(CHARACTERS, key=len), "item": LONGEST_ITEM}
# An answer line starts with its number; punctuation, brackets or markup may stand around it, or the word "question".
_LINE = re.compile(
    r"((?:[^\w\n]|_)*(?:(?:answer\s+to\s+question|question|answer|q|a|no)(?!\w)[ \t.#*]{0,3}|[qa](?=\d))?)"
    r"(\d{1,2})(?!\w)([\W_]*)",
    re.IGNORECASE,
)
# The next number, where several answers stand on one line. That of a chapter is none.
_NEXT = re.compile(
    r"(?<=[\s,;|}])(?<!chapter )(?<!chapters )(?<!ch\. )[^\w\s]{0,3}(\d{1,2})[\"'*_]{0,3}[.):\]|]", re.IGNORECASE
)
_ASKED = re.compile(r".{0,40}?\b(?:which|what|whom?|where)\b[^?]{0,200}\?", re.IGNORECASE)

_INTRO = f"{INTRO} You will be asked about {{count}}."
_QUESTION = "Answer {count} about the story:\n{questions}"
_GENERATE = """\
Reply in two parts: an explanation, then the answer. First say in one or two sentences how you found the answers, \
between <explanation> and </explanation>. Then give {answers} in the order of the questions, as numbered lines between \
<answer> and </answer>. The reply has this form:

<explanation>
your explanation
</explanation>
<answer>
{form}
</answer>

Rules:
- Each line has nothing but the number of the question and what it asks for: the name of the place (for example Apple \
Orchard, without the chapter), the name of the character, or the full name of the item as the story first gives it.
- Do not repeat the questions, and do not write sentences.
- To acquire an item is to buy it; what is sold does not count.
- Do not leave a line out.
- Write nothing before <explanation> and nothing after </answer>."""
_FORCED = """\
Reply with {lines} and nothing else: for each question its number, the chapter, the word place, character or item, a \
colon, and the name as it stands in the story.

Answer:
"""


class StoryRetrievalDraft:
    """Units are chapters. Which are asked about depends on how many there are, but seldom changes with one more."""

    most = MOST

    def __init__(self, random_source: random.Random, forced: bool):
        self._story = Story(random_source)
        self._forced = forced
        # The longest there can be: which chapters are asked for what is only known with the number of chapters.
        kind = max(KINDS, key=lambda k: len(k) + len(_LONGEST[k]))
        tail, continuation = _requests([(MOST, kind)] * QUESTIONS, [_LONGEST[kind]] * QUESTIONS)[-1]
        self.answer = tail + continuation

    def message(self, units: int, filler: str) -> Message:
        """The user message with `units` chapters and, unless empty, the line `filler` after them."""
        asked = self._asked(units)
        number = len(asked)
        questions = "\n".join(f"{i}. {c.heading}: {_ASK[_kind(c)]}" for i, c in enumerate(asked, 1))
        question = _QUESTION.format(count=_count(number, "this question", "these {} questions"), questions=questions)
        after = (_FORCED if self._forced else _GENERATE).format(
            answers=_count(number, "the answer", "the {} answers"),
            lines=_count(number, "1 numbered line", "{} numbered lines"),
            form="\n".join(f"{i}. answer to question {i}" for i in range(1, number + 1) if i < 3 or i == number),
        )
        intro = _INTRO.format(count=_count(number, "1 chapter", "{} of the chapters"))
        return message(intro, question, self._story.written(units), filler, after)

    def gold(self, units: int) -> dict[str, Any]:
        """`chapters` there are; of the questions in order (chapter, kind) as `asked`, `values`, and `pieces`, the
        sentences with the answers; `secrets`, the values that only these have; the gold `target` text."""
        asked = self._asked(units)
        values = [_value(chapter) for chapter in asked]
        sold = {chapter.sold for chapter in self._story.chapters(units)}
        return {
            "chapters": units,
            "asked": [[chapter.number, _kind(chapter)] for chapter in asked],
            "values": values,
            "pieces": [_piece(chapter) for chapter in asked],
            "secrets": [c.item for c in asked if _kind(c) == "item" and c.number not in sold],
            "target": "\n".join(f"{i}. {value}" for i, value in enumerate(values, 1)),
        }

    def _asked(self, units: int) -> list[Chapter]:
        return self._story.chosen(QUESTIONS, self._story.chapters(units))


class StoryRetrieval(Recipe):
    """Sixteen questions about single chapters. Scored per question (paper, Story Retrieval: accuracy)."""

    name = "story_retrieval"
    version = 2
    twin_keeps_units = True
    least_units = 1
    paper_window = 512

    def draft(self, length: int, seed: int, index: int, forced: bool) -> StoryRetrievalDraft:
        return StoryRetrievalDraft(rng(self.name, self.version, length, seed, index), forced)

    def score(self, doc: dict[str, Any], text: str) -> dict[str, float]:
        """`acc`: share of the questions whose numbered line is the right name (`normalise`), see `parse`."""
        found = parse(text)
        right = [found.get(i) == normalise(value) for i, value in enumerate(doc["values"], 1)]
        return {"acc": sum(right) / max(len(right), 1)}

    def requests(self, doc: dict[str, Any]) -> list[tuple[str, str]]:
        """One request per question; each forced text continues the one before, so one forward can score them all."""
        return _requests(doc["asked"], doc["values"])

    def forced_score(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """`exact` and `bits_per_char` over the answers, see `recipe.slot_scores`."""
        return slot_scores(doc["values"], results)

    def evidence(self, doc: dict[str, Any]) -> list[str]:
        """Per question the purchase, or the chapter from its heading to the arrival or the meeting."""
        return doc["pieces"]

    def secrets(self, doc: dict[str, Any]) -> list[str]:
        """The items that are asked for and not sold later on."""
        return doc["secrets"]

    def chance(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"exact": 0.0}

    def guessed(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"acc": 0.0}


def _kind(chapter: Chapter) -> str:
    return KINDS[int(chapter.fraction * len(KINDS))]


def _value(chapter: Chapter) -> str:
    return {"place": chapter.place, "character": chapter.character, "item": chapter.item}[_kind(chapter)]


def _piece(chapter: Chapter) -> str:
    kind = _kind(chapter)
    return chapter.purchase if kind == "item" else chapter.arrival() if kind == "place" else chapter.meeting()


def _count(number: int, one: str, more: str) -> str:
    return one if number == 1 else more.format(number)


def _requests(asked: Sequence[Sequence[Any]], values: Sequence[str]) -> list[tuple[str, str]]:
    requests, before = [], ""
    for i, ((chapter, kind), value) in enumerate(zip(asked, values, strict=True), 1):
        lead = f"{before}{i}. Chapter {chapter}, {kind}:"
        requests.append((lead, f" {value}"))
        before = f"{lead} {value}\n"
    return requests


def parse(text: str) -> dict[int, str]:
    """The numbered lines of an answer: number -> normalised rest of the line.

    Read from the first answer block that has any, or without a block from the whole text. The first line of a number
    counts; the question repeated is no part of it; a number alone belongs to the line below, and so does a question,
    unless a line of its number has a name. Several answers may stand on one line when their numbers follow one another.
    Numbers without any punctuation ("3 Name") count where no others do.
    """
    return answer_or_all(text, _lines) or {}


def _lines(block: str) -> dict[int, str]:
    marked: dict[int, str] = {}
    unmarked: dict[int, str] = {}
    below: dict[int, str] = {}  # a repeated question; it may be a copy of all questions, and the answers come later
    waiting: tuple[dict[int, str], int] | None = None
    for line in plain(block).splitlines():
        start = _LINE.match(line)
        if not start:
            if waiting and (name := normalise(line)):
                found, number = waiting
                found.setdefault(number, name)
                waiting = None
            continue
        found = marked if (start.group(1) + start.group(3)).strip() else unmarked
        first, rest = int(start.group(2)), line[start.end() :]
        pieces, begin = [], 0
        for following in _NEXT.finditer(rest):
            if int(following.group(1)) == first + len(pieces) + 1:
                pieces.append(rest[begin : following.start()])
                begin = following.end()
        waiting = None
        for number, piece in enumerate([*pieces, rest[begin:]], first):
            asked = _ASKED.match(piece)
            if name := normalise(piece[asked.end() :] if asked else piece):
                found.setdefault(number, name)
            else:
                waiting = below if asked else found, number
    return {**below, **(marked or unmarked)}
