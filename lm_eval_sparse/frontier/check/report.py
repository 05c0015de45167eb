"""What checks find: one line each, and how many failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import plain
from .. import apart
from ..show import told

#: What is listed of many.
SHOWN = 3
_LONGEST_LINE = 2000  # characters of a finding


class Wrong(Exception):
    """A check has failed. The message says what was found and what is expected."""


class Report:
    """Prints a line per check and counts."""

    def __init__(self, folder: Path, progress: apart.Progress):
        self.folder, self.progress, self.passed, self.failed = folder, progress, 0, 0

    def check(self, name: str, function: Callable[..., str], *args: Any) -> bool:
        """Run one check; `function` returns what it found, or raises."""
        self.progress.note([name, self.passed, self.failed])
        try:
            found, good = function(*args), True
        except Wrong as wrong:
            found, good = str(wrong), False
        except BaseException as error:  # code of the task's author, which may also try to end the process
            if apart.was_interrupted():
                raise
            found, good = told(error, self.folder), False
        return self.line(name, found, good)

    def line(self, name: str, found: str, good: bool) -> bool:
        """Print the line of a check; returns `good`."""
        self.passed, self.failed = self.passed + good, self.failed + (not good)
        self.progress.say(f"{'ok' if good else 'FAIL':<5} {name:<20} {_cut(plain(' '.join(found.split())))}")
        return good

    def ended(self, error: apart.Ended) -> int:
        """The rest of the report of a process that the task's code has ended."""
        name, self.passed, self.failed = error.last or ["start", 0, 0]
        self.line(name, f"{error}; expected that it lives on", False)
        return self.close()

    def close(self) -> int:
        """Print the sum; returns the exit status."""
        checks = self.passed + self.failed
        self.progress.say(f"\n{checks} checks, " + (f"{self.failed} FAILED" if self.failed else "all ok"))
        return int(bool(self.failed))


def fail_on(problems: Sequence[str]) -> None:
    """Raise `Wrong` with the first of the problems, if there are any."""
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise Wrong("; ".join(problems[:SHOWN]) + more)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}…"


def some(names: Sequence[str] | Mapping[str, Any]) -> str:
    """The first of the names, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")


def told_scores(scores: Mapping[str, float]) -> str:
    """Scores in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
