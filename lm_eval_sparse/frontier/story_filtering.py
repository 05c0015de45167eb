"""Story filtering: in which chapters did the traveller buy nothing (paper, Table 1 and Appendix, "Story Filtering")?

Every chapter has a purchase but three, and only reading them all shows which. Low dispersion, high scope.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from .recipe import Message, Recipe, first_answer, plain, ranking_chance, ranking_scores, rng
from .story import HERO, INTRO, MOST, Chapter, Story, message

MISSING = 3

# A number in an answer, with the word "chapter" before it if there is one.
_NUMBER = re.compile(
    r"(?:\b(chapters?|ch\.?)(?:[\W_]{0,3}(?:numbers?|nos?)\b)?[\W_]{0,6}|(?<![^\W_]))(\d+)(st|nd|rd|th)?(?![^\W_])",
    re.IGNORECASE,
)
_CHAPTER_FOLLOWS = re.compile(r"[.):\]]?[*_`\"'“„«([ \t]{0,8}(?:such[ \t]+)?chapters?\b", re.IGNORECASE)
# A number with one of these behind it counts something else: "0 items".
_COUNTED = re.compile(
    r"[*_`\"' \t]{1,4}(?:items?|purchases?|objects?|things?|sales?|bought|sold|times|in total|altogether|such)\b",
    re.IGNORECASE,
)
# Nor is one a chapter that a total is given by, or that follows another and "of": "Total: 3", "25 of 40".
_TOTAL = re.compile(r"\b(?:total|count)\b(?:[\W_]|\b(?:of|is)\b)*$", re.IGNORECASE)
_OF = re.compile(r"[\W_]*(?:out\s+)?of[\W_]*", re.IGNORECASE)
# What may stand between the chapters of a list: a 0 behind anything else counts something, as in "3: 0".
_JOIN = re.compile(r"(?:[\s,;&/]|\b(?:and|or)\b)*", re.IGNORECASE)
_RANGE = re.compile(r"[*_]{0,3}\s*(?:[-–—]|\.{2,3}|…|\b(?:to|through|until)\b)\s*[*_]{0,3}", re.IGNORECASE)
_LONGEST_RANGE = 10_000
_LIST_NUMBER = re.compile(
    r"(?:[^\w\n]|_)*(?:(?:number|no|item|answer)\b[ \t.#]{0,3})?(\d+)(?:st|nd|rd|th)?"
    r"[*_`\"']{0,3}[.):\]](?=[^\w\n]*[ \t*_|\"'])(?=.*\d)",
    re.IGNORECASE,
)
# List numbers on one line: "1) 3, 2) 17, 3) 25".
_LISTED = re.compile(
    r"(?<![^\W_])(?<!chapter )(\d+)(?:st|nd|rd|th)?[*_`\"']{0,3}[.):\]][*_`\"']{0,3}\s[*_`\"'\[(]{0,3}(?=\d)",
    re.IGNORECASE,
)

_INTRO = f"{INTRO} There are also chapters in which she buys nothing at all, and you will be asked to find them."
_QUESTION = f"In which chapters did {HERO} buy nothing? There {{are}}."
_GENERATE = """\
Reply in two parts: an explanation, then the answer. First say in one or two sentences how you found the chapters, \
between <explanation> and </explanation>. Then give {numbers} between <answer> and </answer>. The reply has this form:

<explanation>
your explanation
</explanation>
<answer>
{form}
</answer>

Rules:
- Between <answer> and </answer> write nothing but {numbers}{commas}.
- To acquire an item, to purchase it or to pay for it is to buy it.
- A chapter in which an item is sold but none is bought counts as one in which nothing was bought.
- Write nothing before <explanation> and nothing after </answer>."""
_FORCED = """\
Reply with one line and nothing else: the word Chapter and the number of a chapter in which nothing was bought.

Answer:
"""
_LEAD = "Chapter"


class StoryFilteringDraft:
    """Units are chapters. Which have no purchase depends on how many there are, but seldom changes with one more."""

    most = MOST

    def __init__(self, random_source: random.Random, forced: bool):
        self._story = Story(random_source)
        self._forced = forced
        self.answer = _LEAD + _candidate(MOST)

    def message(self, units: int, filler: str) -> Message:
        """The user message with `units` chapters and, unless empty, the line `filler` after them."""
        chapters = self._story.written(units)
        for number, text in self._changed(units).items():
            chapters[number - 1] = f"Chapter {number}\n{text}"
        count = len(self._bare(units))
        numbers = "the number of the chapter" if count == 1 else f"the {count} chapter numbers"
        question = _QUESTION.format(
            are="is exactly 1 such chapter" if count == 1 else f"are exactly {count} such chapters"
        )
        form = ", ".join(("first number", "second number", "third number")[:count])
        after = (
            _FORCED
            if self._forced
            else _GENERATE.format(numbers=numbers, commas=", separated by commas" * (count > 1), form=form)
        )
        return message(_INTRO, question, chapters, filler, after)

    def gold(self, units: int) -> dict[str, Any]:
        """`chapters` there are, `numbers` of those without a purchase, their texts as `pieces`, the gold `target`."""
        numbers = sorted(chapter.number for chapter in self._bare(units))
        changed = self._changed(units)
        return {
            "chapters": units,
            "numbers": numbers,
            "pieces": [changed[number] for number in numbers],
            "target": ", ".join(map(str, numbers)),
        }

    def _bare(self, units: int) -> list[Chapter]:
        return self._story.chosen(min(MISSING, max(units - 1, 0)), self._story.chapters(units))

    def _changed(self, units: int) -> dict[int, str]:
        """The chapters that are not as the story has them, by number: those without a purchase, and the sales of what
        would have been bought there.

        Such a sale is of another item that is held then, and so is the sale of that item if one follows. There is no
        sale when nothing is held, as at the start of any story.
        """
        chapters = self._story.chapters(units)
        bare = {chapter.number for chapter in self._bare(units)}
        held: dict[int, None] = {}  # the chapters whose item is held, in order
        changed = {}
        for chapter in chapters:
            sold = chapter.sold
            if sold is not None and sold not in held:
                sold = list(held)[int(chapter.fraction * len(held))] if held else None
            held.pop(sold, None)
            if chapter.number not in bare:
                held[chapter.number] = None
            if sold != chapter.sold or chapter.number in bare:
                item = None if sold is None else chapters[sold - 1].item
                changed[chapter.number] = chapter.text(item, purchase=chapter.number not in bare)
        return changed


class StoryFiltering(Recipe):
    """Three chapters without a purchase, found among all. Scored by overlap (paper, Story Filtering: IoU)."""

    name = "story_filtering"
    version = 2
    twin_keeps_units = True
    least_units = 4

    def draft(self, length: int, seed: int, index: int, forced: bool) -> StoryFilteringDraft:
        return StoryFilteringDraft(rng(self.name, self.version, length, seed, index), forced)

    def score(self, doc: dict[str, Any], text: str) -> dict[str, float]:
        """`iou`: chapters both given and right, among those given or right; 0 without an answer."""
        given, right = parse(text), set(doc["numbers"])
        return {"iou": len(given & right) / max(len(given | right), 1)}

    def requests(self, doc: dict[str, Any]) -> list[tuple[str, str]]:
        """One request per chapter of the story, all after the same lead-in."""
        return [(_LEAD, _candidate(number)) for number in range(1, doc["chapters"] + 1)]

    def forced_score(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """`average_precision` of the chapters without a purchase among all, see `recipe.ranking_scores`."""
        candidates = [_candidate(number) for number in range(1, doc["chapters"] + 1)]
        return ranking_scores(candidates, {_candidate(number) for number in doc["numbers"]}, results)

    def evidence(self, doc: dict[str, Any]) -> list[str]:
        """The whole text of each chapter without a purchase."""
        return doc["pieces"]

    def secrets(self, doc: dict[str, Any]) -> list[str]:
        """None: numbers of chapters stand in their headings."""
        return []

    def chance(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"average_precision": ranking_chance(doc["chapters"], len(doc["numbers"]))}

    def guessed(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"iou": len(doc["numbers"]) / doc["chapters"]}


def _candidate(number: int) -> str:
    # As in a heading, and with an end, or the likelihood of 1 would contain those of 10 to 19.
    return f" {number}\n"


def parse(text: str) -> set[int]:
    """The chapter numbers in the first answer block that has any.

    Every whole number counts, however the numbers are joined and hedged, except those that number the lines of a list
    (1, 2, 3, …) or count something: with "chapters" or "items" right after it, "total" before it, "of" between it and
    another number, and a 0 that is no item of a list ("Chapter 3: 0"). In a table with a column of chapters only those
    in it count. A range gives all of its chapters.
    """
    return first_answer(text, _numbers) or set()


def _numbers(block: str) -> set[int]:
    lines = _columns(plain(block).splitlines())
    starts = [_LIST_NUMBER.match(line) for line in lines]
    is_list = _is_count([start.group(1) for start in starts if start])
    found: set[int] = set()
    for line, start in zip(lines, starts, strict=True):
        listed = list(_LISTED.finditer(line))
        if len(listed) > 1 and _is_count([number.group(1) for number in listed]):
            line = _LISTED.sub(" ", line)
        elif is_list and start:
            line = line[start.end() :]
        found |= _chapters(line)
    return found


def _is_count(numbers: Sequence[str]) -> bool:
    return [number.lstrip("0") for number in numbers] == [str(i) for i in range(1, len(numbers) + 1)]


def _columns(lines: Sequence[str]) -> list[str]:
    """The lines, and of those of a table with a column of chapters that column alone."""
    kept: list[str] = []
    column, width = None, 0
    for line in lines:
        cells = line.strip().strip("|").split("|")
        if len(cells) == 1:
            column = None if line.strip() else column
        elif column is None:
            heads = (i for i, cell in enumerate(cells) if "chapter" in cell.lower() and not re.search(r"\d", cell))
            column, width = next(heads, None), len(cells)
        kept.append(cells[column] if column is not None and len(cells) == width else line)
    return kept


def _chapters(line: str) -> set[int]:
    """The chapters that one line names."""
    numbers = list(_NUMBER.finditer(line))
    gaps = [line[a.end() : b.start()] for a, b in zip(numbers, numbers[1:], strict=False)]
    found: set[int] = set()
    before: int | None = None  # the chapter before, if it may begin a range
    for i, number in enumerate(numbers):
        gap = gaps[i - 1] if i else line[: number.start()]
        value = int(number.group(2)[:9])
        if not (number.group(1) or number.group(3)) and _counts(line, number, value, gap, first=not i):
            before = None
            continue
        if before is not None and before < value <= before + _LONGEST_RANGE and _RANGE.fullmatch(gap):
            found.update(range(before, value))
            before = None
        else:
            # "3 - 17 - 25" is a list
            chain = i + 1 < len(gaps) and _RANGE.fullmatch(gaps[i]) and _RANGE.fullmatch(gaps[i + 1])
            before = None if chain or i and _RANGE.fullmatch(gap) else value
        found.add(value)
    return found


def _counts(line: str, number: re.Match[str], value: int, gap: str, first: bool) -> bool:
    """Whether a number, `gap` after the one before it, says how many there are and not which."""
    if _CHAPTER_FOLLOWS.match(line, number.end()) or _COUNTED.match(line, number.end()) or _TOTAL.search(gap):
        return True
    return not first and bool(_OF.fullmatch(gap) or value == 0 and not _JOIN.fullmatch(gap))
