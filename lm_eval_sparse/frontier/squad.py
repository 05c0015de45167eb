"""SQuAD (Rajpurkar et al. 2018): a short answer copied from one of many Wikipedia paragraphs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from .qa import LEAD, Qa
from .qa_data import Item
from .recipe import first_answer, plain, slot_scores


class Squad(Qa):
    """A short answer, copied from a Wikipedia paragraph. Scored by words shared with the references."""

    name = "squad"
    version = 2
    _what = ("the answer", "the answer")
    _example = "the answer in a few words"
    _rule = (
        "The answer is as short as possible: a name, a number, a date or a few words copied from the document as "
        "they stand there.\n"
        "- Give the words that answer the question and no others: no whole sentence, no second answer, and no reasons, "
        "which belong in the explanation.",
        "It is as short as possible, a few words copied from the document.",
    )

    def key(self, item: Item) -> dict[str, Any]:
        return {"references": list(item.answers)}

    def gold_answer(self, item: Item) -> str:
        return item.answers[0]

    def score(self, doc: dict[str, Any], text: str) -> dict[str, float]:
        """`f1`: of the set of words in the answer block against that of a reference, the best of all references.

        Words are in lower case, without punctuation, and "a", "an", "the", "and", "or", "about", "to" do not count,
        except in an answer or reference that has no other words. Where the answer begins with a list number,
        "Answer:" or "The answer is", or has LaTeX commands, the better of its readings with and without them counts.
        Rounded to .01; 0 without an answer block.
        """
        answers = first_answer(text, _readings) or [frozenset()]
        scores = [_f1(answer, words(reference)) for reference in doc["references"] for answer in answers]
        return {"f1": round(max(scores), 2)}

    def requests(self, doc: dict[str, Any]) -> list[tuple[str, str]]:
        """One request per reference, each after the same short lead-in."""
        return [(LEAD, f" {reference}") for reference in doc["references"]]

    def forced_score(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """`exact`: 1 when greedy decoding would have written one of the references. `bits_per_char`: that of the
        reference for which it is lowest; see `recipe.slot_scores`."""
        each = [
            slot_scores([reference], [result]) for reference, result in zip(doc["references"], results, strict=True)
        ]
        return {
            "exact": max(scores["exact"] for scores in each),
            "bits_per_char": min(scores["bits_per_char"] for scores in each),
        }

    def chance(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"exact": 0.0}

    def guessed(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"f1": 0.0}


_ANSWER_LABEL = re.compile(
    r"\A[\W_]*(?:the\s+)?(?:(?:final|correct|short)\s+)?answer(?:(?:\s+is)?[*_\"'\s]{0,8}:|\s+is\b)(?=.*\w)",
    re.IGNORECASE | re.DOTALL,
)
_ONE = re.compile(r"\A[\W_]*1[.)][\W_]*\s(?=.*\w)", re.DOTALL)
_EMPTY_WORDS = frozenset(("a", "an", "the", "and", "or", "about", "to"))


class _WithoutPunctuation(dict):
    """For `str.translate`: punctuation and symbols of any script vanish, all else stays. Filled as needed."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PS" else code
        return self[code]


_without_punctuation = _WithoutPunctuation()


def words(text: str) -> frozenset[str]:
    """The words of an answer that count, see `Squad.score`."""
    for form in (plain(text), text):  # of nothing but a LaTeX command, as in some references, plain text has nothing
        if found := frozenset(form.lower().translate(_without_punctuation).split()):
            return found - _EMPTY_WORDS or found
    return frozenset()


def _readings(block: str) -> list[frozenset[str]]:
    """The words of an answer without its label, and also without its list number; none for a block without words."""
    forms = plain(block), _ONE.sub("", plain(block))
    unlabelled = (_ANSWER_LABEL.sub("", form) for form in forms)
    return [found for form in (*unlabelled, block) if (found := words(form))]


def _f1(answer: frozenset[str], reference: frozenset[str]) -> float:
    shared = len(answer & reference)
    return 2 * shared / (len(answer) + len(reference)) if shared else 0.0
