"""What a task must supply, and what several tasks share: seeds and scores of teacher-forced answers.

A recipe knows its text and its scoring, and nothing of tokenizers, lm-eval or files: `fill.fit` decides how many
units a document gets, `task.FrontierTask` does the rest.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Any, Protocol


class Draft(Protocol):
    """One document whose size is still open: it can be written with any number of units from 0 to `most`."""

    #: The largest number of units (distractor pairs, chapters, repetitions, …) this document can have.
    most: int
    #: The longest text the twin forces after the prompt, answer included. Room is kept for it.
    answer: str

    def message(self, units: int, filler: str) -> str:
        """The user message with `units` units; `filler`, unless empty, is one neutral line inside the context.

        Must grow with `units`, and must not depend on what was asked for before.
        """
        ...

    def gold(self, units: int) -> dict[str, Any]:
        """What scoring needs, as JSON types only, and `target`: the gold answer as a model should write it."""
        ...


class Recipe(Protocol):
    """One task: how its documents are written and scored. Raise `version` whenever documents or scores change."""

    name: str
    version: int

    def draft(self, length: int, seed: int, index: int, forced: bool) -> Draft:
        """Start document `index` of the leaf with `length` prompt tokens.

        A pure function of its arguments. The twin (`forced`) has the same content under its own instructions.
        """
        ...

    def score(self, doc: dict[str, Any], text: str) -> dict[str, float]:
        """Metrics of a generated answer to `doc` (the merged `Draft.gold`)."""
        ...

    def requests(self, doc: dict[str, Any]) -> list[tuple[str, str]]:
        """The twin's log-likelihood requests: (text forced after the prompt, continuation to score)."""
        ...

    def forced_score(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        """Metrics of the twin from one (logprob in nats, is_greedy) per request."""
        ...


def rng(*key: Any) -> random.Random:
    """A generator seeded by `key` alone: the same on every machine, whatever ran before."""
    return random.Random(int.from_bytes(hashlib.sha256("|".join(map(str, key)).encode()).digest(), "big"))


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
