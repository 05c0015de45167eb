"""`question_first=false`: prompts without the question before the context."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from .recipe import Draft, Message


class AskedOnce:
    """A draft whose messages have the question behind the context alone."""

    def __init__(self, draft: Draft, where: str, name: str):
        self._draft, self._where, self._name = draft, where, name
        self.most, self.answer = draft.most, draft.answer

    def message(self, units: int, filler: str) -> Message:
        """As `Draft.message`. Raises `UserError` where the recipe has no question that can be taken out."""
        message = self._draft.message(units, filler)
        if not isinstance(message, Message):
            raise UserError(
                f"{self._where}question_first=false was given, but the prompts of {self._name} have no separable "
                "question (its drafts return a plain text instead of a Message): leave question_first out"
            )
        return message.once

    def gold(self, units: int) -> dict[str, Any]:
        return self._draft.gold(units)
