"""Variable tracking: which variables end up with a given number, over chains of assignments scattered in noise
(paper, §10 "VT"; the task's idea is RULER's, Hsieh et al. 2024).

Eight chains of five variables: one assignment of a number and four copies, one from the other. All assignments and
all noise are shuffled together, so that a copy may stand before what it copies. High dispersion, low scope.
"""

from __future__ import annotations

import random
import re
import string
from bisect import insort
from collections.abc import Callable, Sequence
from typing import Any

from .recipe import Message, Recipe, answer_or_all, plain, ranking_chance, ranking_scores, rng

CHAINS = 8
HOPS = 4

# Letters of other scripts, and markup, may touch a name.
_TOKEN = re.compile(r"[A-Za-z0-9\u00c0-\u024f]+")
_FIGURE = re.compile(r"\d+(?:st|nd|rd|th)?", re.IGNORECASE)
_POSSESSIVE = re.compile(r"(?<=\w)['’]s\b", re.IGNORECASE)
# What stands in brackets behind a word is a remark on it, but for further names: "(or X)".
_REMARK = re.compile(
    r"(?<=\w)([^\w\n(]{0,4})\((?!\W*(?:and|or|also|plus|maybe|perhaps|possibly)\b)([^()\n]*)\)", re.IGNORECASE
)
_SEPARATOR = re.compile(r"[,;/&+•·、，。\t]|->|=>|[→⇒]|\b(?:and|or)\b", re.IGNORECASE)
# What follows one of these is a remark on what stands before.
_ASIDE = re.compile(r"[=:|–—]|\s-+\s")
# Of what sentences, labels and headings around names are made. None of them is a name, unless the text has it as one.
_SAID = """
    var vars variable variables name names value values let set list answer answers result results solution output
    final correct following explanation reason note chain chains step steps index no number numbers source how via
    the a an this that these those it its they their there here which who what whose where i we you my
    is are was were be been being have has had do does did can will would must should may
    and or not nor but so if then than thus hence therefore because since as also only too both all each every any none
    other others same one two three four five six seven eight nine ten first second third fourth fifth last next finally
    in on of to from by with through for at into after before until between about
    equal equals equalling assigned assign assigns assignment copy copies copied copying share shares shared hold holds
    get gets take takes pass passed directly indirectly direct indirect likewise starting start starts ends end
    sure yes okay done total text given found form know empty unknown thinking summary conclusion
    indeed right namely respectively asked ask go goes going maybe perhaps possibly probably likely well just again
    below above along initially contain contains containing having with whose could might please see thank that's
"""
_WORDS = frozenset(_SAID.split())

_INTRO = (
    "Below is a text with assignments in it. Some give a variable a number, as in VAR A = 1, others give it the value "
    "of another variable, as in VAR B = VAR A. They stand in no particular order, among sentences that mean nothing. "
    "Each variable is assigned once."
)
_TWICE = "The question is written twice, once before the text and once after it, so that you know what to look for."
_QUESTION = (
    "Which variables have the value {value}, be it because the number is assigned to them or because they copy, "
    "directly or through others, a variable that it is assigned to?"
)
_NUMBER = "VAR {name} = {value}."
_COPY = "VAR {name} = VAR {source}."
# One unit: five short sentences that name and count nothing.
_NOISE = "The road is long. The hills are low. The river is cold. On we walk. Soon we shall rest."
_GENERATE = """\
Reply in two parts: an explanation, then the answer. First say in one or two sentences how the value is passed on from \
variable to variable, between <explanation> and </explanation>. Then give the names of all the variables that have the \
value asked for, on one line and with commas between them, between <answer> and </answer>. The reply has this form:

<explanation>
your explanation
</explanation>
<answer>
first name, second name, and so on
</answer>

Rules:
- The variables may be in any order. Copy their names exactly, in capital letters and without the word VAR.
- Do not leave out a variable that has the value, and do not give one that has another value.
- Between <answer> and </answer> write nothing but names.
- Write nothing before <explanation> and nothing after </answer>."""
_FORCED = """\
Reply with one line for each of these variables and nothing else, in the form: The value of NAME is {value}.

Answer:
"""
# Every variable is offered the same number, so that nothing but the variable makes a difference: how likely a model
# finds a name as such does not enter.
_LEAD = "The value of {name} is"


class VtDraft:
    """Units are noise. The assignments are the same, in the same order, however much noise fits."""

    most = 1_000_000

    def __init__(self, random_source: random.Random, forced: bool):
        self._random = random_source
        self._forced = forced
        self.chains = _chains(random_source)
        self.value, *self.gold_names = self.chains[0]
        lines = []
        for value, first, *copies in self.chains:
            lines.append(_NUMBER.format(name=first, value=value))
            lines += [_COPY.format(name=n, source=s) for s, n in zip([first, *copies[:-1]], copies, strict=True)]
        self._assignments = sorted((random_source.random(), line) for line in lines)
        self._filler_place = random_source.random()
        self._noise: list[tuple[float, str]] = []
        self.answer = "".join(_request(self.gold_names[0], self.value))

    def message(self, units: int, filler: str) -> Message:
        """The user message with all assignments, `units` times the noise and, unless empty, the line `filler`."""
        while len(self._noise) < units:
            self._noise.append((self._random.random(), _NOISE))
        lines = sorted(self._assignments + self._noise[:units])
        if filler:
            insort(lines, (self._filler_place, filler))
        question = _QUESTION.format(value=self.value)
        text = "\n".join(line for _, line in lines)
        after = _FORCED.format(value=self.value) if self._forced else _GENERATE
        return Message(_INTRO, _TWICE, question, f"Text:\n{text}", after)

    def gold(self, units: int) -> dict[str, Any]:
        """`names`: gold variables in the order of the chain; `value`; `variables`: all names; the `target` text."""
        return {
            "names": self.gold_names,
            "value": self.value,
            "variables": sorted(name for _, *names in self.chains for name in names),
            "target": ", ".join(self.gold_names),
        }


def _chains(random_source: random.Random) -> list[list[str]]:
    """Each a five-digit number and the names of a chain; all numbers and all names distinct."""
    values = random_source.sample(range(10_000, 100_000), CHAINS)
    names: dict[str, None] = {}
    while len(names) < CHAINS * (HOPS + 1):
        names["".join(random_source.choices(string.ascii_uppercase, k=5))] = None
    given = iter(names)
    return [[str(value), *(next(given) for _ in range(HOPS + 1))] for value in values]


class Vt(Recipe):
    """Eight chains of four hops in noise; the variables of one are asked for (paper, VT: IoU)."""

    name = "vt"
    version = 2

    def draft(self, length: int, seed: int, index: int, forced: bool) -> VtDraft:
        return VtDraft(rng(self.name, self.version, length, seed, index), forced)

    def score(self, doc: dict[str, Any], text: str) -> dict[str, float]:
        """`iou` of the names given and the gold ones, in any case and order; see `parse`."""
        found, gold = parse(text, doc["variables"]), set(doc["names"])
        return {"iou": len(found & gold) / len(found | gold)}

    def requests(self, doc: dict[str, Any]) -> list[tuple[str, str]]:
        """One request per variable of the document: that it has the value asked for."""
        return [_request(name, doc["value"]) for name in doc["variables"]]

    def forced_score(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """`average_precision` of the five gold variables among all forty."""
        return ranking_scores(doc["variables"], doc["names"], results)

    def evidence(self, doc: dict[str, Any]) -> list[str]:
        """The five assignments of the chain, from the number on."""
        first, *copies = doc["names"]
        return [
            _NUMBER.format(name=first, value=doc["value"]),
            *(_COPY.format(name=n, source=s) for s, n in zip(doc["names"], copies, strict=False)),
        ]

    def secrets(self, doc: dict[str, Any]) -> list[str]:
        return doc["names"]

    def chance(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"average_precision": ranking_chance(len(doc["variables"]), len(doc["names"]))}

    def guessed(self, doc: dict[str, Any]) -> dict[str, float]:
        return {"iou": len(doc["names"]) / len(doc["variables"])}


def _request(name: str, value: str) -> tuple[str, str]:
    return _LEAD.format(name=name), f" {value}"


def parse(text: str, variables: Sequence[str]) -> set[str]:
    """The names that an answer gives, in capitals: read from the first answer block that has any, or without a block
    from all of it.

    In a block every word is given as a name, whatever its length and case, but for VAR, for numbers, for `_WORDS`, for
    labels made of these ("Answer: …") and for remarks (in brackets, behind a dash or a colon). A word of `_WORDS` that
    stands alone between commas is a name as well, unless the line is a sentence. In remarks, and in sentences outside
    of any block, names are words in capitals and, in any case, the document's `variables`.
    """
    known = frozenset(variables)
    tagged = "<answer>" in text.lower()

    def names(part: str) -> set[str]:
        return {name for line in plain(part).splitlines() for name in _given(line, known, tagged)}

    return answer_or_all(text, names) or set()


def _given(line: str, known: frozenset[str], tagged: bool) -> set[str]:
    """The names that one line gives."""
    line = _POSSESSIVE.sub("", line)
    remarks = [token for remark in _REMARK.finditer(line) for token in _TOKEN.findall(remark.group(2))]
    named = {token.upper() for token in remarks if _stands_out(token, known)}
    items: list[list[str]] = []
    for item in map(_unlabelled(known), _SEPARATOR.split(_REMARK.sub(r"\1", line))):
        named.update(token.upper() for token in _TOKEN.findall(item) if _stands_out(token, known))
        parts = ([t for t in _TOKEN.findall(part) if not _is_filler(t)] for part in _ASIDE.split(item))
        items.append(next(filter(None, parts), []))
    words = [token for item in items for token in item if _is_word(token, known)]
    others = [token.upper() for item in items for token in item if not _is_word(token, known)]
    sentence = any(len(item) > 1 and _is_word(token, known) for item in items for token in item)
    if sentence and not tagged:
        return named
    alone = [] if sentence or not others else [token.upper() for token in words]
    return named.union(others, alone)


def _unlabelled(known: frozenset[str]) -> Callable[[str], str]:
    """Takes the label from an item: "Answer: …" has one, "x: 12345" has none."""

    def without(item: str) -> str:
        label, colon, rest = item.partition(":")
        is_label = colon and all(_is_filler(t) or _is_word(t, known) for t in _TOKEN.findall(label))
        return rest if is_label else item

    return without


def _is_filler(token: str) -> bool:
    return token.lower() == "var" or bool(_FIGURE.fullmatch(token))


def _is_word(token: str, known: frozenset[str]) -> bool:
    return token.lower() in _WORDS and token.upper() not in known


def _stands_out(token: str, known: frozenset[str]) -> bool:
    """Whether a word is a name wherever it stands. One of five capitals is, even if it reads as a word: names do."""
    if token.upper() in known:
        return True
    capitals = len(token) > 1 and token.isupper() and not token[0].isdigit()
    return capitals and (token.lower() not in _WORDS or len(token) == 5)
