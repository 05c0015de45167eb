"""Story multi-hop: which item did the traveller acquire last before she acquired another one (paper, Table 1 and
Appendix, "Story Multi-hop")?

The named item leads to a chapter, and the order of the chapters to the one before it. High dispersion, low scope.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from .recipe import Message, Recipe, first_answer, plain, rng, slot_scores
from .story import HERO, INTRO, LONGEST_ITEM, MOST, TYPES, Chapter, Story, message, normalise

_INTRO = f"{INTRO} You will be asked about the order in which she acquired two of the items."
_QUESTION = f"Which item did {HERO} acquire last before she acquired the {{item}}?"
_GENERATE = """\
Reply in two parts: an explanation, then the answer. First say in one or two sentences in which chapters the two items \
were acquired, between <explanation> and </explanation>. Then give the item that is asked for between <answer> and \
</answer>. The reply has this form:

<explanation>
your explanation
</explanation>
<answer>
the full name of the item
</answer>

Rules:
- Look for the chapter in which she acquired the item that the question names, then go back to what she acquired \
before that.
- Give the full name of the one item as the story does, on one line, without the chapter and without a sentence.
- To acquire an item is to buy it; what is sold does not count.
- Write nothing before <explanation> and nothing after </answer>."""
_FORCED = """\
Reply with one line and nothing else: the words "Acquired last before the {item}", a colon, and the full name of the \
item that is asked for.

Answer:
"""


# How the twin's answer begins, and the question: "Acquired last before the …:".
_ASKED = re.compile(r"(?:[\W_]*answer[^\w\n]*:)?([^:?]{0,60})\bbefore\b[^:?]{1,80}[:?]", re.IGNORECASE)
_LIST_NUMBER = re.compile(r"(?:[^\w\n]|_)*\d{1,2}[.):](?:\s+|(?=\W))")
# Words that make a line a remark ("I hope this helps."), so that it is no further item.
_REMARK = re.compile(
    r"\b(?:i|you|she|nora|it|this|that|these|here|is|was|are|were|has|had|chapter|chapters|note|explanation|because|hope)\b"
)
# A line below the answer that says which item it is ("it was the tin cup") gives one more, whatever it calls it.
_CLAIM = re.compile(
    r"\b(?:(?:it|this|that|item|answer)(?:['’]s|\s+(?:is|was|were|(?:may|might|could|must|should)\s+be))"
    r"|bought|acquired|purchased|got)\s+(?:also\s+|rather\s+|actually\s+|perhaps\s+|maybe\s+)?(?:an?|the|her|my)\s+"
    r"(?!(?:full\s+|right\s+|correct\s+|last\s+|only\s+|same\s+|final\s+|other\s+)*"
    r"(?:item|items|one|answer|name|purchase|object|thing|last|chapter|story)\b)\w"
)
_TYPE = re.compile(rf"\b(?:{'|'.join(TYPES)})\b")


class StoryMultihopDraft:
    """Units are chapters. The target depends on how many there are, but seldom changes with one more."""

    most = MOST

    def __init__(self, random_source: random.Random, forced: bool):
        self._story = Story(random_source)
        self._forced = forced
        self.answer = "".join(_request(LONGEST_ITEM, LONGEST_ITEM))  # the target is known only with the chapters

    def message(self, units: int, filler: str) -> Message:
        """The user message with `units` chapters and, unless empty, the line `filler` after them."""
        item = self._pair(units)[1].item
        question = _QUESTION.format(item=item)
        after = _FORCED.format(item=item) if self._forced else _GENERATE
        return message(_INTRO, question, self._story.written(units), filler, after)

    def gold(self, units: int) -> dict[str, Any]:
        """`chapters` there are, `chapter` and `item` that the question names, `value` asked for, `pieces` with the
        two purchases, `secrets` (the value, unless it is sold later), the gold `target` text."""
        before, target = self._pair(units)
        sold = before.number in {chapter.sold for chapter in self._story.chapters(units)}
        return {
            "chapters": units,
            "chapter": target.number,
            "item": target.item,
            "value": before.item,
            "pieces": [before.purchase, target.purchase],
            "secrets": [] if sold else [before.item],
            "target": before.item,
        }

    def _pair(self, units: int) -> tuple[Chapter, Chapter]:
        """The chapter of the answer and that of the target, which is any but the first."""
        chapters = self._story.chapters(max(units, 2))  # with fewer the question has no answer, but it has a text
        target = self._story.chosen(1, chapters[1:])[0]
        return chapters[target.number - 2], target


class StoryMultihop(Recipe):
    """One step back from a named purchase. Scored by exact match (paper, Story Multi-hop)."""

    name = "story_multihop"
    version = 2
    twin_keeps_units = True
    least_units = 2

    def draft(self, length: int, seed: int, index: int, forced: bool) -> StoryMultihopDraft:
        return StoryMultihopDraft(rng(self.name, self.version, length, seed, index), forced)

    def score(self, doc: dict[str, Any], text: str) -> dict[str, float]:
        """`exact_match`: 1 when the answer block names the item and no other (`parse`), else 0, also without an answer.

        The item may be broken over lines. Lines below it may be remarks, which may name the item of the question.
        """
        lines, value = parse(text), normalise(doc["value"])
        known = [normalise(doc[name]) for name in ("value", "item") if name in doc]
        for count in range(1, len(value.split()) + 1):
            if " ".join(lines[:count]) == value:
                rest = lines[count:]
                return {"exact_match": float(all(line == value or _is_remark(line, known) for line in rest))}
        return {"exact_match": 0.0}

    def requests(self, doc: dict[str, Any]) -> list[tuple[str, str]]:
        return [_request(doc["item"], doc["value"])]

    def forced_score(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """`exact` and `bits_per_char` of the item, see `recipe.slot_scores`."""
        return slot_scores([doc["value"]], results)

    def evidence(self, doc: dict[str, Any]) -> list[str]:
        """The two purchases, the earlier one first."""
        return doc["pieces"]

    def secrets(self, doc: dict[str, Any]) -> list[str]:
        """The item asked for, unless a later chapter sells it."""
        return doc["secrets"]

    def chance(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"exact": 0.0}

    def guessed(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"exact_match": 0.0}


def _request(item: str, value: str) -> tuple[str, str]:
    return f"Acquired last before the {item}:", f" {value}"


def parse(text: str) -> list[str]:
    """The normalised lines of the first answer block that has a word in it, without list numbers, labels and lines that
    only lead up to the answer ("Here is the item:")."""
    return first_answer(text, _lines) or []


def _lines(block: str) -> list[str]:
    lines: list[str] = []
    for line in plain(block).splitlines():
        line = _LIST_NUMBER.sub("", line, count=1) if _LIST_NUMBER.match(line) else line
        if (asked := _ASKED.match(line)) and not _TYPE.search(asked.group(1).lower()):
            line = line[asked.end() :]
        name = normalise(line)
        leads = line.rstrip(" \t*_").endswith((":", "?")) and _is_remark(name, ())
        if name and (lines or not leads and normalise(f"{name}:")):  # with a colon a label is nothing
            lines.append(name)
    return lines


def _is_remark(line: str, known: Sequence[str]) -> bool:
    """Whether a line reads as a sentence and names no item beside the `known` ones."""
    for item in known:
        line = line.replace(item, "")
    return bool(_REMARK.search(line)) and not _TYPE.search(line) and not _CLAIM.search(line)
