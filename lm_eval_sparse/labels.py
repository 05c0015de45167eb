"""Names of foreign files as one line of a table, a picture or a terminal."""

from __future__ import annotations

import re
from typing import Any

from .errors import plain


def label(name: Any, longest: int = 200) -> str:
    """`name` in one line of at most `longest` characters, without characters that a terminal or a page would obey.

    A long one loses its middle: names that belong together differ in how they end.
    """
    text = " ".join(plain(re.sub(r"[\r\n]+", " ", str(name))).split())
    if len(text) <= longest:
        return text
    end = longest // 2
    return f"{text[: longest - end - 1]}…{text[-end:]}"
