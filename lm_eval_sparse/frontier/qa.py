"""Question answering: one question about one of very many numbered documents (paper, Table 1 and Appendix: QA).

Three tasks share everything but their data and scores. SQuAD (Rajpurkar et al. 2018): a short answer copied from a
paragraph. QuALITY (Pang et al. 2022): multiple choice about long stories and articles. TOEFL (Tseng et al. 2016; Chung
et al. 2018): multiple choice, one or several right options, about transcripts of talks. The question names the number
of its document, so nothing has to be searched for; the other documents are passages of the same data. Low dispersion,
low scope. Where the data comes from is told in `qa_data`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import re
import string
import unicodedata
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, islice
from typing import Any

from .. import paths, sealed
from ..errors import UserError
from ..results import files
from . import qa_data
from .qa_data import DataSet, Item
from .recipe import Message, Recipe, Unavailable, first_answer, option_scores, plain, rng, slot_scores
from .store import keep

logger = logging.getLogger(__name__)

#: Questions are used whose prompt has at most this many tokens with their own document alone (paper's reference
#: implementation), and at most this share of the leaf's length.
LONGEST = 8108
SHARE = 0.9
#: Share of the leaf's length that the documents must be able to fill.
FILLED = 0.95

#: Raise this when `_Costs` keeps something else, so that files of older versions are not read.
_COSTS_FORMAT = 2

# Costs are sums of parts measured one by one; where parts meet, a token more or less may arise.
_SEAMS = 16
# Left free when whole documents are chosen, so that a prefix of a further one can follow (paper, as above).
_MARGIN = 25
# One unit is so many words of distractors: a prompt that is a unit short is short by more tokens than the shortest
# filler line has, and so can always be made exact. With single words it would often miss by one or two.
_UNIT = 8

_INTRO = "Below are numbered documents. You will be asked one question about one of them."
_TWICE = (
    "The question is written twice, once before the documents and once after them, so that you know what to look for."
)
_QUESTION = "Question about document {number}: {question}"
_HEADING = "Document {number}:"
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
# What the twin forces first: the tokens after it are predicted in decoding, where sparse decoding can show.
_LEAD = "The answer is:"

_WORD = re.compile(r"\S+")


class _Corpus:
    """A data set as documents need it: distinct contexts, and for each item the number of its context."""

    def __init__(self, data: DataSet):
        self.data = data
        numbers: dict[str, int] = {}
        self.context_of = [numbers.setdefault(item.context, len(numbers)) for item in data.items]
        self.contexts = list(numbers)
        self.costs: dict[str, _Costs] = {}
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


#: Leaves of one task share their corpus, and it their costs: by the data's hash.
_corpora: dict[str, _Corpus] = {}


class _Costs:
    """Tokens of the parts of prompts, for one data set and one tokenizer with its template.

    `contexts`: of each context as document 1. `bare`: of a generated prompt without document and question. Contexts
    are measured once, questions when they are asked for; both are kept in memory and on disk.
    """

    def __init__(self, task: Qa, corpus: _Corpus, count: Callable[[str], int], identity: str):
        self._task, self._corpus, self._count = task, corpus, count
        self.bare = count(task.bare(None))
        parts = [_COSTS_FORMAT, corpus.data.sha256, identity, task.bare(None), self.bare]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self._place = f"costs {task.name} {key}"
        self._path = paths.cache_root() / "qa" / f"costs-{task.name}-{key[:24]}.json"
        below = f"{_HEADING.format(number=2)}\nThe end."
        alone = count(below)

        def measured(text: str) -> int:
            return count(f"{text}\n\n{below}") - alone

        first = _HEADING.format(number=1)
        one = measured(first)
        self._digits = [0, 0, *(measured(_HEADING.format(number=10**d)) - one for d in range(1, 7))]
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


class _Leaf:
    """What `bind` settles for one length and seed: which items there are, in which order, and the distractors' pool.

    `items` are numbers of items that fit, in an order which is the same at every length; `pool` are contexts.
    """

    def __init__(self, task: Qa, corpus: _Corpus, costs: _Costs, length: int, seed: int):
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


class QaDraft:
    """Units are words of distractors, eight at a time: whole documents first, then a prefix of one more.

    Every document draws its place once: the order of those that fit does not depend on how many fit.
    """

    def __init__(self, leaf: _Leaf, index: int, random_source: random.Random, forced: bool):
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
                start = sum(map(len, parts)) + 2 * len(parts) + len(_HEADING.format(number=i)) + 1
            parts.append(f"{_HEADING.format(number=i)}\n{text}")
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
        self._leaves: dict[tuple[int, int], _Leaf] = {}

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
        corpus = _corpora.get(self._data.sha256) or _corpora.setdefault(self._data.sha256, _Corpus(self._data))
        key = f"{paths.cache_root()} {self.name} {identity}"
        if key not in corpus.costs:
            corpus.costs[key] = _Costs(self, corpus, count, identity)
        leaf = _Leaf(self, corpus, corpus.costs[key], length, seed)
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


# -------------------------------------------------------------------------------------------------------------- squad


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
        return [(_LEAD, f" {reference}") for reference in doc["references"]]

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


# ---------------------------------------------------------------------------------------------------- multiple choice


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
        return [(_LEAD, continuation) for continuation in _continuations(doc["options"])]

    def forced_score(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """`acc`: 1 when as many options as are right, the likeliest ones, are the right ones."""
        gold = [string.ascii_uppercase.index(letter) for letter in doc["letters"]]
        return option_scores(_continuations(doc["options"]), gold, results)

    def chance(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"acc": 1 / math.comb(len(doc["options"]), len(doc["letters"]))}


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


_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
# Words that may stand before letters and between them: "The correct answers are A and C".
_FRAME = frozenset(
    ("the", "correct", "right", "best", "final", "answer", "answers", "option", "options", "letter", "letters")
    + ("choice", "choices", "is", "are", "both", "and", "or", "und", "oder", "et", "ou")
    + ("as", "well", "plus", "also")
)
# A letter that is refused is not given: "A is wrong, so C", "B, not C".
_REFUSED = re.compile(
    r"[*_`\"'”» \t)\]]*(?:(?:is|are|was|were|seems|can|could)\s+(?:clearly\s+)?(?:not|wrong|incorrect|false|out)"
    r"|(?:is|are|was|were|ca|could)n['’]t|cannot)\b",
    re.IGNORECASE,
)
_REFUSED_BEFORE = re.compile(
    r"(?:\bnot|n['’]t|\bcannot|\bnever|\bneither|\bnor|\brather\s+than|\binstead\s+of)"
    r"(?:\s+(?:be|the|answer|option|letter|choice|is))*[\W_]*\Z",
    re.IGNORECASE,
)
# Words after which "A" is a letter, not the article, and "I" no pronoun: "A and C", "A is right".
_AFTER = frozenset(
    (
        "and",
        "or",
        "und",
        "oder",
        "et",
        "ou",
        "is",
        "are",
        "ist",
        "est",
        "sind",
        "sont",
        "because",
        "as",
        "plus",
        "was",
        "seems",
    )
)


def letters(block: str, options: int, texts: Sequence[str] = ()) -> frozenset[str]:
    """The option letters that an answer gives, among the first `options` of the alphabet; `texts` are the options.

    Letters at the beginning of a line count in any case ("B", "b", "B. the text", "(B)", "**A, C**", "ac", "The answer
    is A and C"), and capitals that stand alone anywhere, single or run together ("AC"), but for those within an
    option's text behind a letter. Letters within words never count, nor do the words "A" and "I" before another word,
    nor a letter that is refused ("A is wrong", "not A").
    """
    own = string.ascii_uppercase[:options]
    said = re.compile(
        "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True) if len(text) > 1) or r"(?!)", re.I
    )
    found: set[str] = set()
    for line in block.splitlines():
        given, end = _labels(line, own)
        rest = said.sub(" ; ", line[end:]) if given else line[end:]
        if given and not _REFUSED.match(rest):
            found |= given
        found |= _alone(rest, own, small=bool(given))
    return frozenset(found)


def _labels(line: str, own: str) -> tuple[set[str], int]:
    """The letters at the beginning of a line, and where they end."""
    found: list[str] = []
    single_lower = ended = 0
    for token in _TOKEN.finditer(line):
        word = token.group()
        run = _run(word, own)
        if run and not _is_article(line, token, own):
            if len(word) > 1 and word.islower() and not _only(line, token):
                break
            found += run
            single_lower = word.islower()
            ended = token.end()
        elif word.lower() not in _FRAME:
            # "b the text" is no label: a small letter must be set off by punctuation.
            if single_lower and found and not line[ended : token.start()].strip():
                found.pop()
            break
    return set(found), ended


def _alone(text: str, own: str, small: bool) -> set[str]:
    """Capital letters, single or run together, that stand alone anywhere; with `small` also single small ones."""
    found: set[str] = set()
    for token in _TOKEN.finditer(text):
        word = token.group()
        is_given = word.isupper() or small and len(word) == 1 and word != "i"
        if not is_given or not (run := _run(word, own)) or _is_article(text, token, own):
            continue
        before = text[max(token.start() - 40, 0) : token.start()]
        if not _REFUSED_BEFORE.search(before) and not _REFUSED.match(text, token.end()):
            found.update(run)
    return found


def _run(word: str, own: str) -> str:
    """The letters of "B", "AC" or "ac" in capitals; empty for any other word."""
    run = word.upper()
    good = len(word) <= len(own) and set(run) <= set(own) and len(set(run)) == len(run)
    good = good and (word.isupper() or word.islower()) and word.isascii()
    # Small letters run together must be in order: "ac" may be an answer, "bad" is a word.
    return run if good and (word.isupper() or list(run) == sorted(run)) else ""


def _is_article(text: str, token: re.Match[str], own: str) -> bool:
    """Whether the letter is the word "a" or "I": another word follows, with nothing but blanks between."""
    if token.group().upper() not in ("A", "I"):
        return False
    following = _TOKEN.search(text, token.end(), token.end() + 40)
    if following is None or text[token.end() : following.start()].strip(" \t"):
        return False
    return following.group().lower() not in _AFTER and not _run(following.group(), own)


def _only(line: str, token: re.Match[str]) -> bool:
    others = (other.group().lower() for other in _TOKEN.finditer(line) if other.start() != token.start())
    return all(other in _FRAME for other in others)
