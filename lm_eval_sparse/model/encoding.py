"""Encode many texts that begin with the same long prompt without reading the prompt again for each.

A twin scores up to hundreds of candidates after one prompt, and a tokenizer takes some 0.1 s for 128K tokens. Knows
strings and an encode function; nothing of models or tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: Prompts that are encoded at once, which a tokenizer may do on several processors.
TOGETHER = 16
#: Characters before the end of the prompt that are encoded anew with what follows it.
TAIL = 256
#: Tokens at the start of that tail that must not change with what follows, as a proof that the cut is one for both.
AGREE = 8


class SharedEncoder:
    """`encode(text)` for texts whose first `shared` characters are the prompt of the call before, most of the time.

    The prompt is cut at the start of a line near its end. What follows is encoded with the line before it in front,
    whose tokens are then dropped: SentencePiece puts a blank before every text. The cut is used when the second part
    gives the last tokens of the whole prompt (and, until that was so once, the first part the others), and a text's
    second part begins with the same tokens as the prompt's; otherwise (some tokenizers end each text with a token) the
    text is encoded as a whole. The result is the same in every case.
    """

    def __init__(self, encode: Callable[..., list[int]], encode_many: Callable[..., list[list[int]]] | None = None):
        """
        Args:
            encode: `encode(text, add_special_tokens=...)` returns token ids; without the option it adds special tokens.
            encode_many: the same for several texts.
        """
        self._encode, self._encode_many = encode, encode_many
        #: Prompts to come, the next one last, and the tokens of some of them.
        self._coming: list[str] = []
        self._proven = False
        self._known: dict[str, list[int]] = {}
        #: Tokens of the ends of some texts of the present prompt.
        self._tails: dict[str, list[int]] = {}
        self._prompt = ""
        self._tokens: list[int] = []
        self._start = 0  # of the line before the cut
        self._lead = 0  # tokens of that line
        self._head: list[int] = []
        self._first: list[int] = []

    def expect(self, prompts: Sequence[str]) -> None:
        """These prompts will be asked for, in this order."""
        self._coming, self._known = list(reversed(prompts)), {}

    def together(self, texts: Sequence[str], shared: int) -> None:
        """These texts, which begin with the same prompt of `shared` characters, will be asked for next."""
        self._tails = {}
        if self._encode_many is None or len(texts) < 2:
            return
        self.prompt(texts[0][:shared])
        if self._first:
            ends = [text[self._start :] for text in texts]
            self._tails = dict(zip(ends, self._encode_many(ends, add_special_tokens=False), strict=True))

    def prompt(self, prompt: str) -> list[int]:
        """The prompt's own tokens."""
        if prompt != self._prompt or not self._tokens:
            self._prompt, self._tokens = prompt, self._read(prompt)
            self._find_cut(prompt)
        return self._tokens

    def _read(self, prompt: str) -> list[int]:
        if prompt not in self._known and self._encode_many is not None and self._coming[-1:] == [prompt]:
            some = self._coming[-TOGETHER:]
            del self._coming[-TOGETHER:]
            self._known = dict(zip(some, self._encode_many(some), strict=True))
        return self._known.pop(prompt) if prompt in self._known else self._encode(prompt)

    def __call__(self, text: str, shared: int) -> list[int]:
        """The tokens of `text`, whose first `shared` characters are the prompt."""
        self.prompt(text[:shared])
        if self._first:
            end = text[self._start :]
            tail = self._tails.get(end) or self._encode(end, add_special_tokens=False)
            tail = tail[self._lead :]
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
        tail = self._encode(prompt[self._start :], add_special_tokens=False)[self._lead :]
        if len(tail) < 2 * AGREE or tail != self._tokens[-len(tail) :]:
            return
        head = self._tokens[: -len(tail)]
        # To encode nearly all of the prompt once more takes as long as the prompt.
        self._proven = self._proven or self._encode(prompt[:cut]) == head
        if self._proven:
            self._head, self._first = head, tail[:AGREE]
