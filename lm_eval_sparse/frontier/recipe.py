"""What a task must supply, and what several tasks share: seeds, answer blocks and scores of teacher-forced answers.

A recipe knows its text and its scoring, and nothing of tokenizers, lm-eval or files: `fill.fit` decides how many
units a document gets, `task.FrontierTask` does the rest.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import unicodedata
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

_OPEN = re.compile(r"<answer>", re.IGNORECASE)
_CLOSE = re.compile(r"</answer>", re.IGNORECASE)
_ENDED = re.compile(r"</(explanation|think|thinking|reasoning)$", re.IGNORECASE)
_THOUGHT = re.compile(r"<(/?)(explanation|think|thinking|reasoning)>", re.IGNORECASE)
# What is left of a closing tag when the tokens run out within it.
_CUT = re.compile(r"<(?:/(?:a(?:n(?:s(?:w(?:er?)?)?)?)?)?)?\s*$", re.IGNORECASE)

_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
_HYPHENS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2212"), "-")
_FENCE = re.compile(
    r"^[^\w\n`]*`{3,}[ \t]*"
    r"(?:json|python|text|txt|plaintext|plain|markdown|md|xml|html|yaml|csv|bash|latex|answer)?[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)
_BREAK = re.compile(r"</?(?:br|p|li|ul|ol|tr|table|div)\b[^<>\n]{0,80}>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][\w-]{0,20}(?: [^<>\n]{0,80})?/?>")
_LATEX = re.compile(r"\\(?:begin|end)\{\w{1,20}\*?\}|\\[A-Z]?[a-z]+")


class Unavailable(Exception):
    """What a task's documents are made from cannot be had; its leaves drop out. The message is the reason."""


class Message(str):
    """A user message in the paper's order (§10, "Common"): intro, question, context, question again, instructions.

    As a string it is that text. `once` is the same without the question before the context, `context` the span of the
    context's characters in either of them. A recipe that returns a plain string has no question that can be taken out.
    """

    question_first: bool
    context: tuple[int, int]
    _parts: tuple[str, ...]

    def __new__(
        cls, intro: str, twice: str, question: str, context: str, after: str, question_first: bool = True
    ) -> Message:
        """`twice` is the note, below the intro, that the question is written twice; `after` the instructions."""
        head = f"{intro}\n{twice}\n\n{question}\n\n" if question_first else f"{intro}\n\n"
        self = super().__new__(cls, f"{head}{context}\n\n{question}\n\n{after}")
        self.question_first = question_first
        self.context = (len(head), len(head) + len(context))
        self._parts = (intro, twice, question, context, after)
        return self

    @property
    def once(self) -> Message:
        """The message with the question behind the context alone, so that nothing before it depends on the question."""
        return Message(*self._parts, question_first=False)

    @property
    def tail(self) -> str:
        """What stands after the context."""
        return self[self.context[1] :]

    def __reduce__(self):
        return Message, (*self._parts, self.question_first)


class Draft(Protocol):
    """One document whose size is still open: it can be written with any number of units from 0 to `most`."""

    #: The largest number of units (distractor pairs, chapters, repetitions, …) this document can have.
    most: int
    #: The longest text the twin forces after the prompt, answer included. Room is kept for it.
    answer: str

    def message(self, units: int, filler: str) -> str:
        """The user message with `units` units; `filler`, unless empty, is one neutral line inside the context.

        Must grow with `units`, and must not depend on what was asked for before. Where it is a `Message`, the task has
        the variant without the question before the context.
        """
        ...

    def gold(self, units: int) -> dict[str, Any]:
        """What scoring needs, as JSON types only, and `target`: the gold answer, without the answer tags."""
        ...


class Recipe(ABC):
    """One task: how its documents are written and scored. Raise `version` whenever documents or scores change.

    A task whose documents are made from nothing but a seed overrides the abstract methods only. `find`, `identity`,
    `origin` and `bind` are for tasks that read data.
    """

    name: str
    version: int
    #: Whether the twin has exactly as many units as the document it is the twin of: as many as fit under either
    #: format's instructions. Needed where the question or the answer depends on them; elsewhere the room that shorter
    #: instructions leave is better used for more units.
    twin_keeps_units: bool = False
    #: Phases in which attention may be destroyed without the twin's scores falling, though dense attention does well
    #: (benchmarks/twin_sensitivity.py): they say nothing about methods of these. `task` keeps such a twin's leaves out
    #: of groups' means.
    insensitive: tuple[str, ...] = ()
    #: Units without which the question cannot be asked or the twin's candidates are too few. A leaf whose prompts have
    #: no room for them drops out.
    least_units: int = 0
    #: Last queries whose attention votes in `vertical_slash` and `flexprefill_vs` under `preset=paper`. The paper has
    #: 512 for NIAH and Story Retrieval, 256 elsewhere (section 3).
    paper_window: int = 256

    def find(self, given: Mapping[str, Any]) -> None:  # noqa: B027 (most tasks need no data)
        """Get hold of the data that documents are made from; `given` is the task's metadata.

        Raises `Unavailable` when the data cannot be had, `UserError` when something the user named is wrong.
        """

    def identity(self) -> list[Any]:
        """What decides a document beyond name, version, wording, length, seed and tokenizer, as JSON types."""
        return []

    def origin(self) -> dict[str, Any] | None:
        """Where the data came from, for the results."""
        return None

    def bind(self, length: int, seed: int, count: Callable[[str], int], identity: str) -> int | None:
        """Get ready to write documents for one leaf; called before any `draft`.

        `count` returns the tokens of the rendered prompt for a user message, `identity` names tokenizer and template.
        Returns how many documents there can be, None when there is no end to them. Raises `Unavailable`.
        """
        return None

    @abstractmethod
    def draft(self, length: int, seed: int, index: int, forced: bool) -> Draft:
        """Start document `index` of the leaf with `length` prompt tokens.

        A pure function of its arguments. The twin (`forced`) has the same content under its own instructions.
        """

    @abstractmethod
    def score(self, doc: dict[str, Any], text: str) -> dict[str, float]:
        """Metrics of a generated answer to `doc` (the merged `Draft.gold`). An answer that cannot be read scores 0."""

    @abstractmethod
    def requests(self, doc: dict[str, Any]) -> list[tuple[str, str]]:
        """The twin's log-likelihood requests: (text forced after the prompt, continuation to score)."""

    @abstractmethod
    def forced_score(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """Metrics of the twin from one (logprob in nats, is_greedy) per request."""

    @abstractmethod
    def evidence(self, doc: dict[str, Any]) -> list[str]:
        """The pieces of the context that the answer follows from, each of them once in `doc["input"]`, verbatim."""

    @abstractmethod
    def secrets(self, doc: dict[str, Any]) -> list[str]:
        """Strings that give the answer away: they may stand in the evidence and nowhere else in the prompt.

        Empty where nothing is so telling, as with chapter numbers or with words that occur by chance elsewhere.
        """

    @abstractmethod
    def chance(self, doc: dict[str, Any]) -> dict[str, float]:
        """What a scorer that answers at random gets on average in each forced metric that has such a value."""

    def guessed(self, doc: dict[str, Any]) -> dict[str, float]:
        """What a generated answer without knowledge gets in each metric of which that can be said; none by default.

        An option drawn at random where there are options; all candidates where any number of them may be named, which
        gets more than some drawn at random; 0 where nothing is there to be drawn from.
        """
        return {}


def rng(*key: Any) -> random.Random:
    """A generator seeded by `key` alone: the same on every machine, whatever ran before."""
    return random.Random(int.from_bytes(hashlib.sha256("|".join(map(str, key)).encode()).digest(), "big"))


def first_answer(text: str, parse: Callable[[str], T]) -> T | None:
    """What `parse` finds in the first `<answer>` block in which it finds anything (a truthy value), else None.

    A block may lack its end, as when a model runs out of tokens, and begins with the last opening tag before its end.
    Tags may also be talked about ("between <answer> and </answer>"): blocks that begin a line outside of explanation
    and thinking are read first, then the others outside of them, then those within.
    """
    thoughts = _thoughts(text)

    def doubt(start: int) -> int:
        before = bisect_right(thoughts, (start, len(text)))
        if before and start < thoughts[before - 1][1]:
            return 2
        line = text[max(start - 40, 0) : start].rstrip(" \t*_`#>")
        return 0 if not line or line[-1] == "\n" or _ENDED.search(line) else 1

    blocks, begin = [], 0
    for end in [*(match.span() for match in _CLOSE.finditer(text)), (len(text), len(text))]:
        opened = list(_OPEN.finditer(text, begin, end[0]))
        if opened:
            blocks.append((doubt(opened[-1].start()), opened[-1].end(), end[0]))
        begin = end[1]
    for _, start, end in sorted(blocks):
        block = text[start:end]
        if found := parse(_CUT.sub("", block) if end == len(text) else block):
            return found
    return None


def answer_or_all(text: str, parse: Callable[[str], T]) -> T | None:
    """As `first_answer`, but where no answer block begins anywhere, what `parse` finds in all of `text`."""
    return first_answer(text, parse) if _OPEN.search(text) else parse(text)


def plain(text: str) -> str:
    """`text` without what surrounds an answer and is none of it, lines kept: code fences, HTML tags and LaTeX commands
    (what they hold stays), invisible characters; full-width forms, blanks and hyphens of any kind are the usual ones.
    """
    text = _UNSEEN.sub("", _LINE_ENDS.sub("\n", text)).replace("\u20e3", ".")  # "1️⃣" is "1."
    text = unicodedata.normalize("NFKC", text).translate(_HYPHENS)
    return _LATEX.sub(" ", _TAG.sub(" ", _BREAK.sub("\n", _FENCE.sub("", text))))


def _thoughts(text: str) -> list[tuple[int, int]]:
    """Spans from an opening tag of an explanation (or of thinking) to the next closing tag, in order."""
    spans, begin = [], None
    for tag in _THOUGHT.finditer(text):
        if not tag.group(1):
            begin = tag.start() if begin is None else begin
        elif begin is not None:
            spans.append((begin, tag.end()))
            begin = None
    return spans


def slot_scores(values: Sequence[str], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Scores of an exact-answer twin, one result per answer slot.

    `exact`: share of slots in which greedy decoding would have written the gold value. `bits_per_char`:
    −Σ logprob / ln 2 ÷ characters of the values, lower is better; the slot's leading space is predicted, not counted.
    """
    bits = -sum(logprob for logprob, _ in results) / math.log(2)
    return {
        "exact": sum(bool(greedy) for _, greedy in results) / len(results),
        "bits_per_char": bits / sum(len(value) for value in values),
    }


def normalised(continuations: Sequence[str], results: Sequence[tuple[float, bool]]) -> list[float]:
    """By what the candidates of a ranking or options twin are compared: log-probability."""
    return [logprob for _, (logprob, _) in zip(continuations, results, strict=True)]


def ranking_scores(
    candidates: Sequence[str], gold: Collection[str], results: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    """`average_precision` of the `gold` ones among `candidates` ranked by likelihood, one result per candidate.

    The mean over the gold candidates of precision at their rank. Among equals a gold one counts as the later, so that
    a model that cannot tell them apart gains nothing.
    """
    scores = normalised(candidates, results)
    order = sorted(range(len(candidates)), key=lambda i: (-scores[i], candidates[i] in gold))
    hits, total = 0, 0.0
    for rank, i in enumerate(order, 1):
        if candidates[i] in gold:
            hits += 1
            total += hits / rank
    return {"average_precision": total / len(gold)}


def mean_levels(levels: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over documents, those that every document has."""
    rows = list(levels)
    names = [name for name in (rows[0] if rows else ()) if all(name in row for row in rows)]
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in names}


def ranking_chance(candidates: int, gold: int) -> float:
    """Expected average precision of `gold` items in a random order of `candidates`.

    At rank k a candidate is gold with probability g/n, and then each of the k − 1 before it with (g − 1)/(n − 1).
    """
    if candidates == gold:
        return 1.0
    before = (gold - 1) / (candidates - 1)
    return sum((1 + (k - 1) * before) / k for k in range(1, candidates + 1)) / candidates


def option_scores(
    options: Sequence[str], gold: Collection[int], results: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    """`acc`: 1 when the best `len(gold)` options by likelihood are the gold ones (positions), else 0.

    Among equals a gold one counts as the worse.
    """
    scores = normalised(options, results)
    order = sorted(range(len(options)), key=lambda i: (-scores[i], i in gold))
    return {"acc": float(set(order[: len(gold)]) == set(gold))}
