"""What a sub-command is, and how its arguments are read: a complaint is one line, which says what to type.

Arguments are read with argparse, as lm-eval's own are, so that both complain alike: it names everything that is missing
at once. Knows nothing of what commands do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

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
    """An argument parser whose complaint is one line, and that takes no beginning of an option for the option.

    What is the only option that begins so today is another one, or none, in the next version.
    """

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **{"allow_abbrev": False, **named})

    @classmethod
    def of(cls, name: str, description: str) -> Parser:
        """The parser of the sub-command `name`."""
        return cls(prog=f"{PROGRAM} {name}", description=description)

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):  # type: ignore[override]
        """As argparse does it; of an option that is not known the nearest ones are named."""
        given = sys.argv[1:] if args is None else list(args)
        options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        words = given[: given.index("--")] if "--" in given else given
        unknown = [word for word in words if word.startswith("--") and " " not in word and _name(word) not in options]
        try:
            found, left = self.parse_known_args(given, namespace)
        except UserError:
            if not unknown:
                raise
            left = unknown  # what is missing may be just what was mistyped
        if left:
            meant = next((_name(word) for word in left if word.startswith("--")), None)
            close = "" if meant is None else _meant(meant, options)
            self.error(f"unrecognized arguments: {' '.join(left)}{close}")
        return found

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; type '{self.prog} --help'")


def _name(word: str) -> str:
    return word.partition("=")[0]


def _meant(name: str, options: Sequence[str]) -> str:
    """The options that begin like a name that is none, else those that look like it, as a phrase."""
    longer = [option for option in options if option.startswith(name)]
    return nearest(name, longer or options, cutoff=0.0 if longer else 0.7)


def add_task_options(parser: Parser) -> None:
    """Options of commands that render documents of tasks."""
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="name or path of a tokenizer (default: the embedded model's)"
    )
    parser.add_argument("--metadata", metavar="JSON", help="""as in lm_eval, such as '{"seed": 7}'""")
