"""Question answering: one question about one of very many numbered documents (paper, Table 1 and Appendix: QA).

Three tasks share everything but their data and scores. SQuAD (Rajpurkar et al. 2018): a short answer copied from a
paragraph. QuALITY (Pang et al. 2022): multiple choice about long stories and articles. TOEFL (Tseng et al. 2016; Chung
et al. 2018): multiple choice, one or several right options, about transcripts of talks. The question names the number
of its document, so nothing has to be searched for; the other documents are passages of the same data. Low dispersion,
low scope. Where the data comes from is told in `qa_data`.
"""

from __future__ import annotations

import math
import random
import string
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any

from .. import paths
from . import qa_data
from .qa_costs import HEADING, Corpus, Costs, Leaf
from .qa_data import DataSet, Item
from .recipe import Message, Recipe, Unavailable, rng

#: Share of the leaf's length that the documents must be able to fill.
FILLED = 0.95

# Left free when whole documents are chosen, so that a prefix of a further one can follow. The value is that of the
# paper's reference implementation.
_MARGIN = 25
# One unit is so many words of distractors: a prompt that is a unit short is short by more tokens than the shortest
# filler line has, and so can always be made exact. With single words it would often miss by one or two.
_UNIT = 8

_INTRO = "Below are numbered documents. You will be asked one question about one of them."
_TWICE = (
    "The question is written twice, once before the documents and once after them, so that you know what to look for."
)
_QUESTION = "Question about document {number}: {question}"
_REPLY = """\
Reply in two parts: an explanation, then the answer. First say in one or two sentences where in the document the \
answer is found, between <explanation> and </explanation>. Then give {what}, between <answer> and </answer>. The reply \
has this form:

<explanation>
your explanation
</explanation>
<answer>
{example}
</answer>

Rules:
- {rule}
- Use only what is said in the document that the question is about. Other documents do not count, nor does what you \
know from elsewhere.
- Write nothing before <explanation> and nothing after </answer>."""
_FORCED = """\
Reply with one line and nothing else: "The answer is:" and {what}. {rule} Use only the document that the question is \
about.

Answer:
"""
#: What the twin forces first: the tokens after it are predicted in decoding, where sparse decoding can show.
LEAD = "The answer is:"


#: Leaves of one task share their corpus, and it their costs: by the data's hash.
_corpora: dict[str, Corpus] = {}


class QaDraft:
    """Units are words of distractors, eight at a time: whole documents first, then a prefix of one more.

    Every document draws its place once: the order of those that fit does not depend on how many fit.
    """

    def __init__(self, leaf: Leaf, index: int, random_source: random.Random, forced: bool):
        self._leaf, self._random, self._forced = leaf, random_source, forced
        self._number = leaf.items[index]
        self.item = leaf.corpus.data.items[self._number]
        self._own = leaf.corpus.context_of[self._number]
        self.answer = max(
            (lead + continuation for lead, continuation in leaf.task.asked(self.item)), key=lambda s: len(s.encode())
        )

    @cached_property
    def _plan(self) -> tuple[list[int], list[float], float, list[int]]:
        """Distractors in the order in which they are added, their places, the own document's, words up to each."""
        leaf = self._leaf
        shuffled = [context for context in leaf.pool if context != self._own]
        self._random.shuffle(shuffled)
        room = leaf.length - leaf.costs.prompt(self._number) - _MARGIN
        whole: list[int] = []
        others: list[int] = []
        for context in shuffled:
            cost = leaf.costs.contexts[context] + leaf.costs.heading(len(whole) + 2)
            if cost <= room:
                whole.append(context)
                room -= cost
            else:
                others.append(context)
        order = [*whole, *others]
        own_place = self._random.random()
        places = [self._random.random() for _ in order]
        return order, places, own_place, list(accumulate(map(leaf.corpus.words, order)))

    @cached_property
    def most(self) -> int:
        """Enough for all other documents in full."""
        words = self._plan[3]
        return math.ceil(words[-1] / _UNIT) if words else 0

    def message(self, units: int, filler: str) -> Message:
        """The user message with the own document, `units` units of others and, unless empty, the line `filler`."""
        return self._written(units, filler)[0]

    def gold(self, units: int) -> dict[str, Any]:
        """`question`, `document` (its number), `documents` (how many there are), `span` of the document's text in
        the context, `options` and their right `letters` or `references`, and the gold `target` text."""
        item = self.item
        _, start, number, documents = self._written(units, "")
        return {
            "question": item.question,
            "document": number,
            "documents": documents,
            "span": [start, start + len(item.context)],
            **self._leaf.task.key(item),
            "target": self._leaf.task.gold_answer(item),
        }

    def _written(self, units: int, filler: str) -> tuple[Message, int, int, int]:
        """The message, where the own document's text begins in its context, its number, and how many there are."""
        corpus, task = self._leaf.corpus, self._leaf.task
        placed: list[tuple[float, str]] = [(0.0, self.item.context)]
        number = 1
        if units:
            order, places, own_place, upto = self._plan
            words = min(units * _UNIT, upto[-1] if upto else 0)
            whole = bisect_right(upto, words)
            placed = [(own_place, self.item.context)]
            placed += [(places[i], corpus.contexts[order[i]]) for i in range(whole)]
            if rest := words - (upto[whole - 1] if whole else 0):
                placed.append((places[whole], corpus.prefix(order[whole], rest)))
            placed.sort()
            number = 1 + sum(place < own_place for place, _ in placed)
        question = task.question(self.item, number)
        parts: list[str] = []
        for i, (_, text) in enumerate(placed, 1):
            if i == number:
                start = sum(map(len, parts)) + 2 * len(parts) + len(HEADING.format(number=i)) + 1
            parts.append(f"{HEADING.format(number=i)}\n{text}")
        if filler:
            parts.append(filler)
        message = Message(_INTRO, _TWICE, question, "\n\n".join(parts), task.instructions(self._forced))
        return message, start, number, len(placed)


class Qa(Recipe):
    """One question, whose number names its document, among as many documents of the same data as fit."""

    twin_keeps_units = True  # the number in the question depends on them

    #: What the answer is called, how it is shown, and what is said about it: for the generated and the forced format.
    _what: tuple[str, str]
    _example: str
    _rule: tuple[str, str]

    def __init__(self) -> None:
        self._data: DataSet | None = None
        self._leaves: dict[tuple[int, int], Leaf] = {}

    # ------------------------------------------------------------------------------------------------------- data

    def find(self, given: Mapping[str, Any]) -> None:
        """Load the data (see `qa_data`). Raises `Unavailable` or `UserError`."""
        self._data = qa_data.load(self.name, given)

    def identity(self) -> list[Any]:
        """The data's hash."""
        return [self._data.sha256 if self._data else None]

    def origin(self) -> dict[str, Any] | None:
        """Where the data was found, and its hash."""
        return {"source": self._data.source, "sha256": self._data.sha256} if self._data else None

    def bind(self, length: int, seed: int, count: Callable[[str], int], identity: str) -> int:
        """Measure the documents and choose the questions. Returns how many fit.

        Raises `Unavailable` when no question does, or all documents together do not fill the prompt.
        """
        if self._data is None:
            raise Unavailable(f"no data was found for {self.name}")
        corpus = _corpora.get(self._data.sha256) or _corpora.setdefault(self._data.sha256, Corpus(self._data))
        key = f"{paths.cache_root()} {self.name} {identity}"
        if key not in corpus.costs:
            corpus.costs[key] = Costs(self, corpus, count, identity)
        leaf = Leaf(self, corpus, corpus.costs[key], length, seed)
        if not leaf.items:
            raise Unavailable(
                f"with its document, none of the {len(corpus.data.items)} questions in {self._data.source} fits into "
                f"{leaf.bound} tokens"
            )
        if leaf.most() < FILLED * length:
            raise Unavailable(
                f"the {len(leaf.pool)} documents in {self._data.source} make a prompt of {leaf.most()} tokens, "
                f"and {math.ceil(FILLED * length)} are needed"
            )
        self._leaves[length, seed] = leaf
        return len(leaf.items)

    # -------------------------------------------------------------------------------------------------- documents

    def draft(self, length: int, seed: int, index: int, forced: bool) -> QaDraft:
        """Item `index` of the shuffled data, the same at every length as far as it fits. Needs `bind`."""
        source = rng(self.name, self.version, length, seed, index)
        return QaDraft(self._leaves[length, seed], index, source, forced)

    def question(self, item: Item, number: int) -> str:
        """The question as it stands before and after the documents, with its options one per line."""
        lines = [_QUESTION.format(number=number, question=item.question)]
        return "\n".join(lines + [f"{letter}. {text}" for letter, text in _lettered(item)])

    def instructions(self, forced: bool) -> str:
        """What the message ends with."""
        template = _FORCED if forced else _REPLY
        return template.format(what=self._what[forced], example=self._example, rule=self._rule[forced])

    def bare(self, item: Item | None) -> str:
        """A generated message without any document, for measuring; without an item, without its question too."""
        question = self.question(item, 1) if item else _QUESTION.format(number=1, question="")
        return f"{_INTRO}\n{_TWICE}\n\n{question}\n\n{question}\n\n{self.instructions(False)}"

    @abstractmethod
    def key(self, item: Item) -> dict[str, Any]:
        """The part of a document that scoring needs."""

    @abstractmethod
    def gold_answer(self, item: Item) -> str:
        """What stands between the answer tags in a right answer."""

    def asked(self, item: Item) -> list[tuple[str, str]]:
        """The twin's requests for `item`."""
        return self.requests(self.key(item))

    def evidence(self, doc: dict[str, Any]) -> list[str]:
        """The text of the document that the question is about."""
        begin, (start, end) = doc["context"][0], doc["span"]
        return [doc["input"][begin + start : begin + end]]

    def secrets(self, doc: dict[str, Any]) -> list[str]:
        """None: other passages may well have the words of an answer, and options stand in the question."""
        return []


def _lettered(item: Item) -> list[tuple[str, str]]:
    return list(zip(string.ascii_uppercase, item.options, strict=False))
