"""Encode many texts that begin with the same long prompt without reading the prompt again for each.

A twin scores up to hundreds of candidates after one prompt, and a tokenizer takes some 0.1 s for 128K tokens. Knows
strings and an encode function; nothing of models or tasks.
"""

from __future__ import annotations

from collections.abc import Callable

#: Characters before the end of the prompt that are encoded anew with what follows it.
TAIL = 256
#: Tokens at the start of that tail that must not change with what follows, as a proof that the cut is one for both.
AGREE = 8


class SharedEncoder:
    """`encode(text)` for texts whose first `shared` characters are the prompt of the call before, most of the time.

    The prompt is cut at the start of a line near its end. What follows is encoded with the line before it in front,
    whose tokens are then dropped: SentencePiece puts a blank before every text. The cut is used when the two parts give
    the tokens of the whole prompt, and a text's second part begins with the same tokens as the prompt's; otherwise
    (some tokenizers end each text with a token) the text is encoded as a whole. The result is the same in every case.
    """

    def __init__(self, encode: Callable[..., list[int]]):
        """`encode(text, add_special_tokens=...)` returns token ids; without the option it adds special tokens."""
        self._encode = encode
        self._prompt = ""
        self._tokens: list[int] = []
        self._start = 0  # of the line before the cut
        self._lead = 0  # tokens of that line
        self._head: list[int] = []
        self._first: list[int] = []

    def prompt(self, prompt: str) -> list[int]:
        """The prompt's own tokens."""
        if prompt != self._prompt or not self._tokens:
            self._prompt, self._tokens = prompt, self._encode(prompt)
            self._find_cut(prompt)
        return self._tokens

    def __call__(self, text: str, shared: int) -> list[int]:
        """The tokens of `text`, whose first `shared` characters are the prompt."""
        self.prompt(text[:shared])
        if self._first:
            tail = self._encode(text[self._start :], add_special_tokens=False)[self._lead :]
            if tail[:AGREE] == self._first:
                return self._head + tail
        return self._encode(text)

    def _find_cut(self, prompt: str) -> None:
        """Decide where the prompt is cut, if anywhere, and remember the tokens before and just behind the cut."""
        self._first = []
        cut = prompt.rfind("\n", 0, max(len(prompt) - TAIL, 0)) + 1
        self._start = prompt.rfind("\n", 0, max(cut - 1, 0)) + 1
        while self._start and prompt[self._start].isspace():  # an empty line gives a tokenizer nothing to hold on to
            self._start = prompt.rfind("\n", 0, self._start - 1) + 1
        if not cut or prompt[cut].isspace():
            return
        self._lead = len(self._encode(prompt[self._start : cut], add_special_tokens=False))
        head = self._encode(prompt[:cut])
        tail = self._encode(prompt[self._start :], add_special_tokens=False)[self._lead :]
        if len(tail) >= 2 * AGREE and head + tail == self._tokens:
            self._head, self._first = head, tail[:AGREE]
