"""The option letters that an answer to a multiple-choice question gives, however a model words it."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

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
