"""The one exception a user's mistake raises, and how it is shown: one line, exit status 1, no traceback."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable
from traceback import format_exception

from .masking import known, mask, mask_named

#: What users type, and what the line of a mistake begins with.
PROGRAM = "lm-eval-sparse"
#: Characters of a message: more is no line that anyone reads.
_LONGEST = 3000


class UserError(ValueError):
    """Something the user typed cannot work.

    The message is one line that says what was given, what is accepted, and what to type instead; secrets in it are
    masked. It is a `ValueError`, so Python callers of `simple_evaluate` catch it as usual.
    """

    def __init__(self, message: object = ""):
        super().__init__(one_line(str(message)))


def one_line(text: str) -> str:
    """`text` as a terminal may be given it in one line: no control characters, no secrets, not endless."""
    text = mask_named(plain(re.sub(r"\s*[\r\n]+\s*", " ", text.strip())))
    text = mask(text, known())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def plain(text: str) -> str:
    """`text` with control characters written out: a terminal would obey them. Line ends and tabs stay."""
    if text.isprintable():
        return text
    kept = " \n\t\u00a0\u3000"
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def nearest(word: str, known: Iterable[str], n: int = 3, cutoff: float = 0.5) -> str:
    """Return a phrase such as `; did you mean 'gamma'?`, or the empty string when nothing is close."""
    close = difflib.get_close_matches(str(word), list(known), n=n, cutoff=cutoff)
    if not close:
        return ""
    return "; did you mean " + " or ".join(repr(name) for name in close) + "?"


def install_excepthook() -> None:
    """Let an uncaught `UserError`, and what `explain` was told of, print as one line instead of a traceback.

    Other exceptions are untouched.
    """
    previous = sys.excepthook
    if getattr(previous, "_lm_eval_sparse", False):
        return

    def hook(kind, value, traceback):
        told = (str(value),) if isinstance(value, UserError) else (tell(value) for tell in _tellers)
        said = next(filter(None, told), None)
        if said is None:
            whole = "".join(format_exception(kind, value, traceback))
            if (shown := mask(whole, known())) != whole:  # an address with a password, a token in a library's words
                print(shown, end="", file=sys.stderr)
            else:
                previous(kind, value, traceback)
        else:
            print(f"{PROGRAM}: error: {one_line(said)}", file=sys.stderr)

    hook._lm_eval_sparse = True
    sys.excepthook = hook


_tellers: list[Callable[[BaseException], str | None]] = []


def explain(tell: Callable[[BaseException], str | None]) -> None:
    """Let `tell` say in one line what an uncaught exception means to the user, or None where it does not know."""
    if tell not in _tellers:
        _tellers.append(tell)
