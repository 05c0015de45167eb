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

    The prompt is cut at the start of a line near its end. The cut is used when the two parts, encoded apart, give the
    tokens of the whole prompt, and a text's tail begins with the same tokens as the prompt's; otherwise (SentencePiece
    puts a space before every text, some tokenizers end each text with a token) the text is encoded as a whole. The
    result is the same in every case.
    """

    def __init__(self, encode: Callable[..., list[int]]):
        """`encode(text, add_special_tokens=...)` returns token ids; None leaves special tokens to the tokenizer."""
        self._encode = encode
        self._prompt = ""
        self._tokens: list[int] = []
        self._cut = 0
        self._head: list[int] = []
        self._start: list[int] = []

    def prompt(self, prompt: str) -> list[int]:
        """The prompt's own tokens."""
        if prompt != self._prompt or not self._tokens:
            self._prompt, self._tokens = prompt, self._encode(prompt)
            self._cut = self._find_cut(prompt)
        return self._tokens

    def __call__(self, text: str, shared: int) -> list[int]:
        """The tokens of `text`, whose first `shared` characters are the prompt."""
        self.prompt(text[:shared])
        if self._cut:
            tail = self._encode(text[self._cut :], add_special_tokens=False)
            if tail[:AGREE] == self._start:
                return self._head + tail
        return self._encode(text)

    def _find_cut(self, prompt: str) -> int:
        """Where the prompt may be cut, 0 for nowhere; remembers the tokens before it and the first ones behind it."""
        cut = prompt.rfind("\n", 0, max(len(prompt) - TAIL, 0)) + 1
        if not cut or prompt[cut].isspace():
            return 0
        head = self._encode(prompt[:cut])
        tail = self._encode(prompt[cut:], add_special_tokens=False)
        if len(tail) < 2 * AGREE or head + tail != self._tokens:
            return 0
        self._head, self._start = head, tail[:AGREE]
        return cut
