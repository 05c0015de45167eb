"""What commands print: a reader who has seen enough is no error, and characters that a terminal lacks are written out.

Knows streams only.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import TextIO

from .errors import UserError
from .results.files import why

#: Columns of what commands print, whatever the terminal has: a narrower one breaks lines itself, and longer lines are
#: hard to read.
NARROWEST, WIDEST = 60, 100


def columns() -> int:
    """Columns to print in: those of the terminal (or of `COLUMNS`), within bounds; the most where there is none."""
    return min(max(shutil.get_terminal_size((WIDEST, 24)).columns, NARROWEST), WIDEST)


def say(text: str, stream: TextIO | None = None) -> None:
    """Write `text` and a line end to `stream`, by default stdout. When its reader is gone (`… | head`), go on quietly.

    Raises:
        UserError: the text cannot be written: a full disk, a closed stream.
    """
    out = sys.stdout if stream is None else stream
    if out is None:  # the process was started without one
        return
    try:
        encoding = getattr(out, "encoding", None) or "utf-8"
        out.write(text.encode(encoding, errors="backslashreplace").decode(encoding) + "\n")
        out.flush()
    except BrokenPipeError:
        silence(out)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        silence(out)
        raise UserError(f"what was found cannot be written ({why(error)}); give the output another place") from None


def silence(stream: TextIO) -> None:
    """Let what is still written to `stream` vanish, so that Python does not complain about it when it ends."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # no stream of the system
        pass
