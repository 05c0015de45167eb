"""What a sub-command is, and how its arguments are read: a complaint is one line, which says what to type.

Arguments are read with argparse, as lm-eval's own are, so that both complain alike: it names everything that is missing
at once. Knows nothing of what commands do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from lm_eval_sparse.errors import PROGRAM, UserError, nearest


@dataclass(frozen=True)
class Command:
    """One of our own sub-commands.

    Attributes:
        usage: its name and what must be given besides, for the help text.
        summary: one line of that text.
        run: gets the arguments after the name and returns the exit status, None for 0; raises `UserError`.
    """

    usage: str
    summary: str
    run: Callable[[list[str]], int | None]


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    @classmethod
    def of(cls, name: str, description: str) -> Parser:
        """The parser of the sub-command `name`."""
        return cls(prog=f"{PROGRAM} {name}", description=description)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):  # type: ignore[override]
        """As argparse does it; of an option that is not known the nearest ones are named."""
        found, left = self.parse_known_args(args, namespace)
        if left:
            options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            meant = next((word.split("=")[0] for word in left if word.startswith("--")), None)
            close = "" if meant is None else nearest(meant, options, cutoff=0.7)
            self.error(f"unrecognized arguments: {' '.join(left)}{close}")
        return found

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; type '{self.prog} --help'")


def add_task_options(parser: Parser) -> None:
    """Options of commands that render documents of tasks."""
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="name or path of a tokenizer (default: the embedded model's)"
    )
    parser.add_argument("--metadata", metavar="JSON", help="""as in lm_eval, such as '{"seed": 7}'""")
