"""Fit a document into a prompt of exactly so many tokens, with a few calls of the tokenizer.

Knows drafts and a function that counts tokens; nothing of tokenizers, templates or tasks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .recipe import Draft

#: Units measured first, to learn their mean size: about 1% exact, at half the cost of a 4096-token prompt.
_PROBE = 32
#: A rest of fewer tokens may be less than any filler line has.
_SHORT = 8
# In each line the first place between two words of small letters: byte-level tokenizers begin a token at the blank.
_CUT = re.compile(r"^.*?[a-z](?= [a-z])", re.MULTILINE)

# Filler says nothing, names nothing, counts nothing, and reads on wherever it is cut off.
SENTENCES = (
    "this part of the text is of no use to anyone and can be passed over without any loss",
    "it was put here only so that the whole comes out at the right size and not for what it says",
    "what comes before it and what comes after it would be just the same if it had been left out",
    "so there is no need to keep it in mind or to look for more in it than there is",
)
# Last words of many sizes: where a tokenizer has no one-token words, one of these makes up the difference.
_TAILS = (
    "so", "too", "here", "again", "indeed", "perhaps", "as it is", "after all", "otherwise", "and so on",
    "at any rate", "in every way", "nevertheless", "notwithstanding",
)  # fmt: skip


class DoesNotFit(Exception):
    """The prompt without a single unit already has `tokens` tokens, more than the budget."""

    def __init__(self, tokens: int):
        super().__init__(f"{tokens} tokens without any content")
        self.tokens = tokens


@dataclass(frozen=True)
class Fitted:
    """A document's size: how many units, which filler line, and the tokens of the prompt that has both."""

    units: int
    filler: str
    tokens: int


class Filler:
    """Neutral lines by token cost.

    Costs are measured inside a fixed short text, so that they depend on the tokenizer alone: a document must not
    come out differently because of the documents made before it.
    """

    def __init__(self, count: Callable[[str], int]):
        self._count = count
        self._costs: dict[str, int] = {}
        self._lines: dict[int, str] = {0: ""}

    def cost(self, line: str) -> int:
        """Tokens that `line` adds as a line of its own between two others."""
        if "" not in self._costs:
            self._costs[""] = self._count("One line stands above.\nOne line stands below.")
        if line not in self._costs:
            self._costs[line] = self._count(f"One line stands above.\n{line}\nOne line stands below.")
        return self._costs[line] - self._costs[""]

    def line(self, tokens: int) -> str:
        """The costliest line known of at most `tokens` tokens; exactly `tokens` nearly always. May be empty."""
        if tokens not in self._lines:
            self._lines[tokens] = self._search(tokens)
        return self._lines[tokens]

    def _search(self, tokens: int) -> str:
        fits, over = 0, max(tokens, 0) + 1  # a word costs one token or more
        while over - fits > 1:
            words = (fits + over) // 2
            if self.cost(_prose(words)) <= tokens:
                fits = words
            else:
                over = words
        best = _prose(fits) if fits else ""
        for words in range(fits, max(fits - 4, -1), -1):
            for tail in _TAILS:
                if best and self.cost(best) == tokens:
                    return best
                line = _prose(words, tail)
                if self.cost(line) <= tokens and (not best or self.cost(line) > self.cost(best)):
                    best = line
        return best


def _prose(words: int, tail: str = "") -> str:
    """The first `words` words of the filler text, sentence by sentence, then `tail`, then a full stop."""
    sentences: list[str] = []
    while words > 0:
        taken = SENTENCES[len(sentences) % len(SENTENCES)].split()[:words]
        sentences.append(" ".join(taken))
        words -= len(taken)
    if tail:
        sentences = [*sentences[:-1], f"{sentences[-1]} {tail}"] if sentences else [tail]
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


class Sizes:
    """Tokens of a draft's messages, by units and filler, with as little of the tokenizer as possible.

    Messages of nearby sizes share nearly all of their lines. They are cut between two words in each line, where the
    tokenizers that are in use never join tokens, and the parts are counted once each. `parts` counts texts as they
    stand in the middle of a prompt. Whether the parts add up is checked on the first two sizes: if not, or without
    `parts`, whole messages are counted.
    """

    def __init__(
        self,
        draft: Draft,
        count: Callable[[str], int],
        parts: Callable[[Sequence[str]], Sequence[int]] | None,
        costs: dict[str, int] | None = None,
    ):
        """`costs` holds what parts cost, for several drafts with parts in common."""
        self._draft, self._count, self._parts = draft, count, parts
        self._known: dict[tuple[int, str], int] = {}
        self._costs = {} if costs is None else costs
        self._offsets: list[int] = []

    def __call__(self, units: int, filler: str = "") -> int:
        if (units, filler) not in self._known:
            message = self._draft.message(units, filler)
            if self._parts and len(self._offsets) == 2:
                tokens = self._sum(_cut(message)) + self._offsets[0]
            else:
                tokens = self._count(message)
                if self._parts:
                    texts = _cut(message)
                    self._offsets.append(tokens - self._sum(texts))
                    # A list without two words in a line (CWE) stays in one part: nothing would be shared.
                    if self._offsets[0] != self._offsets[-1] or 2 * max(map(len, texts)) > len(message):
                        self._parts = None
            self._known[units, filler] = tokens
        return self._known[units, filler]

    def confirms(self, fitted: Fitted) -> bool:
        """Whether the message as a whole has the tokens that its parts add up to."""
        if not self._parts:
            return True
        return self._count(self._draft.message(fitted.units, fitted.filler)) == fitted.tokens

    def _sum(self, texts: Sequence[str]) -> int:
        new = [text for text in dict.fromkeys(texts) if text not in self._costs]
        self._costs.update(zip(new, self._parts(new), strict=True))
        return sum(self._costs[text] for text in texts)


def _cut(message: str) -> list[str]:
    """The parts of a message, see `_CUT`."""
    texts, begin = [], 0
    for cut in _CUT.finditer(message):
        texts.append(message[begin : cut.end()])
        begin = cut.end()
    return [*texts, message[begin:]]


def fit(
    draft: Draft,
    budget: int,
    count: Callable[[str], int],
    filler: Filler,
    parts: Callable[[Sequence[str]], Sequence[int]] | None = None,
) -> Fitted:
    """Give `draft` as many units as fit into `budget` prompt tokens, then fill the rest, exactly where possible.

    `count` returns the tokens of the whole rendered prompt for a user message; see `Sizes` for `parts`. The result is
    counted as a whole, never exceeds `budget`, and falls short of it only by what neither a unit nor the filler can
    supply. Raises `DoesNotFit`.
    """
    size = Sizes(draft, count, parts)
    fits = _search(draft, budget, size)
    best = _fill(fits, budget, size, filler)
    # When the rest is smaller than the shortest line, or cannot be hit, one unit less leaves more to fill, or two.
    for units in range(fits - 1, max(fits - 3, -1), -1):
        if best.tokens < budget:
            best = max(best, _fill(units, budget, size, filler), key=lambda one: one.tokens)
    return best if size.confirms(best) else fit(draft, budget, count, filler)


def fit_both(
    draft: Draft,
    sibling: Draft,
    budget: int,
    count: Callable[[str], int],
    filler: Filler,
    parts: Callable[[Sequence[str]], Sequence[int]] | None = None,
) -> Fitted:
    """As `fit`, with as many units as fit for both `draft` and `sibling`, the same content under other instructions.

    The two get the same units whichever of them is the draft. Whether one unit less is taken, to leave the filler more
    than its shortest lines, depends on the smaller of the two rests alone.
    """
    costs: dict[str, int] = {}
    sizes = [Sizes(one, count, parts, costs) for one in (draft, sibling)]
    units = min(_search(one, budget, size) for one, size in zip((draft, sibling), sizes, strict=True))
    rest = budget - max(size(units) for size in sizes)
    if units and 0 < rest < _SHORT:
        units -= 1
    fitted = _fill(units, budget, sizes[0], filler)
    return fitted if sizes[0].confirms(fitted) else fit_both(draft, sibling, budget, count, filler)


def _search(draft: Draft, budget: int, size: Sizes) -> int:
    """The most units whose message fits into `budget`, but for one that would be much smaller than the mean."""
    if size(0) > budget:
        raise DoesNotFit(size(0))
    fits, over = 0, draft.most + 1
    before, last, mean = 0, 0, 0.0
    for attempt in range(64):
        if over - fits <= 1:
            break
        if not last:
            guess = min(_PROBE, draft.most)
        elif attempt < 12:
            # By the mean of all units; by that of the last ones where they are many, as their cost may grow.
            far = abs(last - before) > 0.1 * last
            slope = (size(last) - size(before)) / (last - before) if far else mean
            guess = last + int((budget - size(last)) // max(slope, 1.0))
        else:  # units so uneven that the secant crawls
            guess = (fits + over) // 2
        if guess <= fits and last and (budget - size(fits)) < 0.75 * mean:
            break  # a further unit would have to be a quarter smaller than the mean: leave it to the filler
        before, last = last, min(max(guess, fits + 1), over - 1)
        if size(last) <= budget:
            fits = last
        else:
            over = last
        mean = max((size(last) - size(0)) / last, 1.0)
    return fits


def _fill(units: int, budget: int, size: Sizes, filler: Filler) -> Fitted:
    """The best filler line for `units` units."""
    best = Fitted(units, "", size(units))
    want, tried = budget - best.tokens, set()
    while want > 0 and want not in tried and len(tried) < 5:
        tried.add(want)
        line = filler.line(want)
        if not line:
            break
        tokens = size(units, line)
        if best.tokens < tokens <= budget:
            best = Fitted(units, line, tokens)
        if tokens == budget:
            break
        want += budget - tokens  # a line costs a token more or less here than where its cost was measured
    return best
