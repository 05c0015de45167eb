"""What the parts of a QA prompt cost in tokens, and so which questions and documents a length has room for.

Knows the data and how its parts are measured; how a prompt is put together stands in `qa`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from .. import paths, sealed
from ..errors import UserError
from ..results import files
from .qa_data import DataSet
from .recipe import rng
from .store import keep

if TYPE_CHECKING:
    from .qa import Qa

logger = logging.getLogger(__name__)

#: Questions are used whose prompt has at most this many tokens with their own document alone (paper's reference
#: implementation), and at most this share of the leaf's length.
LONGEST = 8108
SHARE = 0.9

#: Raise this when `Costs` keeps something else, so that files of older versions are not read.
_COSTS_FORMAT = 2

# Costs are sums of parts measured one by one; where parts meet, a token more or less may arise.
_SEAMS = 16

#: What stands above each document.
HEADING = "Document {number}:"

_WORD = re.compile(r"\S+")


class Corpus:
    """A data set as documents need it: distinct contexts, and for each item the number of its context."""

    def __init__(self, data: DataSet):
        self.data = data
        numbers: dict[str, int] = {}
        self.context_of = [numbers.setdefault(item.context, len(numbers)) for item in data.items]
        self.contexts = list(numbers)
        self.costs: dict[str, Costs] = {}
        self._words = [0] * len(numbers)

    def words(self, context: int) -> int:
        """Number of words of a context."""
        if not self._words[context]:
            self._words[context] = len(self.contexts[context].split())
        return self._words[context]

    def prefix(self, context: int, words: int) -> str:
        """The first `words` words of a context (at least one), blanks and line ends between them as they are."""
        text = self.contexts[context]
        *_, last = islice(_WORD.finditer(text), words)
        return text[: last.end()]


class Costs:
    """Tokens of the parts of prompts, for one data set and one tokenizer with its template.

    `contexts`: of each context as document 1. `bare`: of a generated prompt without document and question. Contexts
    are measured once, questions when they are asked for; both are kept in memory and on disk.
    """

    def __init__(self, task: Qa, corpus: Corpus, count: Callable[[str], int], identity: str):
        self._task, self._corpus, self._count = task, corpus, count
        self.bare = count(task.bare(None))
        parts = [_COSTS_FORMAT, corpus.data.sha256, identity, task.bare(None), self.bare]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self._place = f"costs {task.name} {key}"
        self._path = paths.cache_root() / "qa" / f"costs-{task.name}-{key[:24]}.json"
        below = f"{HEADING.format(number=2)}\nThe end."
        alone = count(below)

        def measured(text: str) -> int:
            return count(f"{text}\n\n{below}") - alone

        first = HEADING.format(number=1)
        one = measured(first)
        self._digits = [0, 0, *(measured(HEADING.format(number=10**d)) - one for d in range(1, 7))]
        self.contexts, self._questions = self._load()
        self._saved = len(self._questions)
        if not self.contexts:
            self.contexts = [measured(f"{first}\n{context}") for context in corpus.contexts]
            self._saved = -1
        self.save()

    def heading(self, number: int) -> int:
        """What document `number` costs more than if it were document 1."""
        return self._digits[len(str(number))]

    def prompt(self, item: int) -> int:
        """About the tokens of the generated prompt of `item` with its own document alone."""
        if item not in self._questions:
            self._questions[item] = self._count(self._task.bare(self._corpus.data.items[item]))
        return self._questions[item] + self.contexts[self._corpus.context_of[item]]

    def fits(self, item: int, bound: int) -> bool:
        """Whether that prompt has at most `bound` tokens."""
        without = self.bare + self.contexts[self._corpus.context_of[item]] + _SEAMS
        if without > bound:
            return False
        # No tokenizer makes more tokens than bytes: mostly these are few enough, and nothing is counted.
        one = self._corpus.data.items[item]
        size = len(one.question.encode()) + sum(len(option.encode()) + len("\nA. ") for option in one.options)
        return without + 2 * size <= bound or self.prompt(item) + _SEAMS <= bound

    def save(self) -> None:
        """Keep on disk what was measured since the last time."""
        if self._saved < len(self._questions):
            self._saved = len(self._questions)
            content = {"contexts": self.contexts, "questions": list(self._questions.items())}
            keep(self._path, sealed.seal(self._place, content))

    def _load(self) -> tuple[list[int], dict[int, int]]:
        """What is known from an earlier run. What is not as it was written is measured again."""
        if not os.path.lexists(self._path):
            return [], {}
        try:
            known = sealed.unseal(self._place, files.read_bytes(self._path, follow=False))
            contexts, pairs = known.get("contexts"), known.get("questions")
            if not _whole_numbers(contexts) or len(contexts) != len(self._corpus.contexts):
                raise sealed.Broken("it does not fit the data")
            items = range(len(self._corpus.data.items))
            if not isinstance(pairs, list) or not all(
                _whole_numbers(pair) and len(pair) == 2 and pair[0] in items for pair in pairs
            ):
                raise sealed.Broken("it does not fit the data")
        except (UserError, sealed.Broken) as error:
            logger.warning("%s is not as it was written (%s); it is made again", self._path, error)
            return [], {}
        return contexts, dict(pairs)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


class Leaf:
    """What `bind` settles for one length and seed: which items there are, in which order, and the distractors' pool.

    `items` are numbers of items that fit, in an order which is the same at every length; `pool` are contexts.
    """

    def __init__(self, task: Qa, corpus: Corpus, costs: Costs, length: int, seed: int):
        self.task, self.corpus, self.costs, self.length = task, corpus, costs, length
        order = list(range(len(corpus.context_of)))
        rng(task.name, task.version, "order", seed).shuffle(order)
        # The pool is the same at every length, though at short ones not every question with a document in it fits.
        kept = [item for item in order if costs.fits(item, LONGEST)]
        self.pool = sorted({corpus.context_of[item] for item in kept})
        self.bound = min(LONGEST, math.floor(SHARE * length))
        self.items = [item for item in kept if costs.fits(item, self.bound)]
        costs.save()

    def most(self) -> int:
        """About the tokens that a prompt has with the whole pool, its question aside."""
        each = (self.costs.contexts[context] + self.costs.heading(n) for n, context in enumerate(self.pool, 1))
        return self.costs.bare + sum(each)
