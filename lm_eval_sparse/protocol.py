"""What our tasks and our model type say to each other beyond lm-eval's own interface.

Every object here degrades to the plain type that other model types and other tasks expect: a `SharedPrompt`
is a `str`, a measured response is a `str` or a `(logprob, is_greedy)` tuple. Nothing heavy is imported.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

#: Key of a document that stands for a leaf that cannot run (model too short, no data); its value is the reason.
SKIPPED = "frontier_skipped"


class Prompt(str):
    """A context that says what its task wants of a method. Other model types see an ordinary string.

    Attributes:
        window: last queries that vote under `preset=paper` (`frontier.recipe.Recipe.paper_window`), or None.
    """

    window: int | None

    def __new__(cls, text: str, window: int | None = None) -> Prompt:
        self = super().__new__(cls, text)
        self.window = window
        return self

    def __reduce__(self):
        return Prompt, (str(self), self.window)


class SharedPrompt(Prompt):
    """A context whose first `shared` characters are the prompt and whose rest is teacher-forced answer text.

    The prompt part is prefilled once for all requests that share it; the rest runs in the decode phase, where
    a generating model would have produced it.
    """

    shared: int

    def __new__(cls, text: str, shared: int, window: int | None = None) -> SharedPrompt:
        self = super().__new__(cls, text, window)
        self.shared = shared
        return self

    def __reduce__(self):
        return SharedPrompt, (str(self), self.shared, self.window)


def window_of(context: Any) -> int | None:
    """The window that a context's task says, or None for a context of a task that says none."""
    return getattr(context, "window", None)


class MeasuredText(str):
    """A generated text that carries the sparsity measured while it was made, in `stats`.

    lm-eval casts gold answers to the type of the response, so a text alone is accepted too.
    """

    stats: dict[str, Any]

    def __new__(cls, text: str, stats: dict[str, Any] | None = None) -> MeasuredText:
        self = super().__new__(cls, text)
        self.stats = stats or {}
        return self

    def __reduce__(self):
        return MeasuredText, (str(self), self.stats)


class MeasuredLoglikelihood(tuple):
    """`(logprob, is_greedy)` with the sparsity measured while it was computed, in `stats`."""

    stats: dict[str, Any]

    def __new__(cls, logprob: float, is_greedy: bool, stats: dict[str, Any] | None = None) -> MeasuredLoglikelihood:
        self = super().__new__(cls, (logprob, is_greedy))
        self.stats = stats or {}
        return self

    def __reduce__(self):
        return MeasuredLoglikelihood, (*self, self.stats)


class MeasuredFloat(float):
    """The result of a rolling log-likelihood, with its `stats`."""

    stats: dict[str, Any]

    def __new__(cls, value: float, stats: dict[str, Any] | None = None) -> MeasuredFloat:
        self = super().__new__(cls, value)
        self.stats = stats or {}
        return self

    def __reduce__(self):
        return MeasuredFloat, (float(self), self.stats)


def stats_of(response: Any) -> dict[str, Any] | None:
    """The measured figures a response carries, or None when another model type made it.

    `stats["sparsity"]` is the measured sparsity of the one phase that a sparse method filled (a float in [0, 1]), or
    None; with methods in several phases `stats["sparsities"]` holds theirs by name.
    """
    return getattr(response, "stats", None)


def mean_sparsities(measurements: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Measured sparsities by metric name, averaged over the measurements that have them.

    `sparsity` for a method in one phase; `prefill_sparsity`, `kv_sparsity`, `decode_sparsity` for several.
    """
    found: dict[str, list[float]] = {}
    for stats in measurements:
        for name, value in (stats.get("sparsities") or {"sparsity": stats.get("sparsity")}).items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


_active: weakref.ref | None = None


def set_active_lm(lm: Any) -> None:
    """Remember the model under evaluation, so that tasks can fill prompts to its exact length.

    lm-eval builds the model before it loads tasks, but never shows it to them.
    """
    global _active
    _active = weakref.ref(lm)


def active_lm() -> Any | None:
    """The last `sparse-hf` model made in this process, while it is alive."""
    return _active() if _active is not None else None
