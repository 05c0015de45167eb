"""Story multi-hop: which item did the traveller acquire last before she acquired another one (paper, Table 1 and
Appendix, "Story Multi-hop")?

The named item leads to a chapter, and the order of the chapters to the one before it. High dispersion, low scope.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from .recipe import Message, Recipe, first_answer, rng, slot_scores
from .story import HERO, INTRO, LONGEST_ITEM, MOST, Chapter, Story, message, normalise

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


_BEFORE = re.compile(r"^[^\w\n]*(?:\d{1,2}[.):]\s+)?[^\w\n]*(?:acquired last before [^:\n]{1,80}:)?", re.IGNORECASE)


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
        """`exact_match`: 1 when the answer block names the item (`normalise`), else 0, also without an answer."""
        return {"exact_match": float(parse(text) == normalise(doc["value"]))}

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


def _request(item: str, value: str) -> tuple[str, str]:
    return f"Acquired last before the {item}:", f" {value}"


def parse(text: str) -> str:
    """The first line with a word in it of the first answer block that has one, normalised; "" when there is none."""
    return first_answer(text, _first_line) or ""


def _first_line(block: str) -> str:
    """Without a list number, and without "Acquired last before …:", which is how the twin's answer begins."""
    lines = (normalise(_BEFORE.sub("", line)) for line in block.splitlines())
    return next(filter(None, lines), "")
