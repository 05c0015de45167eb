"""A leaf's documents as lm-eval looks at them: a sequence whose members are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class Documents(Sequence):
    """A leaf's documents, made when they are first looked at. Before `bind` each is an empty placeholder."""

    def __init__(self, number: int):
        self._number = number
        self._docs: dict[int, dict[str, Any]] = {}
        self._make: Callable[[int], dict[str, Any]] | None = None

    def bind(self, number: int, known: dict[int, dict[str, Any]], make: Callable[[int], dict[str, Any]]) -> None:
        """There are `number` documents: use those in `known` and `make` the others."""
        self._number, self._docs, self._make = number, dict(known), make

    @property
    def features(self) -> dict[str, str]:
        return dict.fromkeys(("index", "length", "tokens", "input", "target"), "value")

    def has(self, index: int) -> bool:
        """Whether document `index` exists already, so that looking at it costs nothing."""
        return index in self._docs

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._number:
            raise IndexError(index)
        if self._make is None:
            return {"index": index, "input": "", "target": ""}
        if index not in self._docs:
            self._docs[index] = self._make(index)
        return self._docs[index]
