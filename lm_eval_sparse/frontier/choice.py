"""Multiple choice about one of many documents: QuALITY (Pang et al. 2022) and TOEFL (Tseng et al. 2016)."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

from .letters import letters
from .qa import LEAD, Qa
from .qa_data import Item
from .recipe import first_answer, option_scores, plain


class Choice(Qa):
    """Multiple choice; `_what` and `_rule` say whether several options may be right."""

    def key(self, item: Item) -> dict[str, Any]:
        return {"options": list(item.options), "letters": list(item.answers)}

    def gold_answer(self, item: Item) -> str:
        return ", ".join(item.answers)

    def score(self, doc: dict[str, Any], text: str) -> dict[str, float]:
        """`exact_match`: 1 when the letters in the answer block are exactly the right ones, see `letters`."""
        found = first_answer(text, lambda block: letters(plain(block), len(doc["options"]), doc["options"]))
        return {"exact_match": float(found == frozenset(doc["letters"]))}

    def requests(self, doc: dict[str, Any]) -> list[tuple[str, str]]:
        """One request per option, each after the same short lead-in."""
        return [(LEAD, continuation) for continuation in _continuations(doc["options"])]

    def forced_score(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """`acc`: 1 when as many options as are right, the likeliest ones, are the right ones."""
        gold = [string.ascii_uppercase.index(letter) for letter in doc["letters"]]
        return option_scores(_continuations(doc["options"]), gold, results)

    def chance(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"acc": 1 / math.comb(len(doc["options"]), len(doc["letters"]))}

    def guessed(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"exact_match": self.chance(doc)["acc"]}


def _continuations(options: Sequence[str]) -> list[str]:
    """What the twin scores for each option: its letter. The tokens of the lead-in come before it, so that it is
    predicted in decoding. Letters tell most of the context, see benchmarks/results/twin_normalisation.md."""
    return [f" {letter}" for letter, _ in zip(string.ascii_uppercase, options, strict=False)]


class Quality(Choice):
    """Multiple choice, one right option, about long stories and articles."""

    name = "quality"
    version = 2
    _what = ("the letter of the right option", "the letter of the right option")
    _example = "letter"
    _rule = (
        "Exactly one option is right: give its letter and not its text.\n"
        "- If several options seem possible, choose the one that the document bears out best.",
        "Exactly one option is right.",
    )


class Toefl(Choice):
    """Multiple choice, one or several right options, about transcripts of talks and conversations."""

    name = "toefl"
    version = 2
    _what = ("the letter of the right option, or the letters if several are right", "the letter of a right option")
    _example = "letter, or letters with commas between them"
    _rule = (
        "One or several options are right: give the letters of all that are, and not their texts.",
        "One or several options are right.",
    )
