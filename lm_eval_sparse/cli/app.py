"""The command `lm-eval-sparse`: lm-eval's own command line with our models and tasks in it, plus our sub-commands.

It installs the import hook itself, so it also works where Python reads no start-up files (`-S`, `--target`,
a checkout on PYTHONPATH). It knows nothing of models or results; each sub-command imports what it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from lm_eval_sparse import __version__, endings, masking
from lm_eval_sparse.errors import UserError, nearest

PROGRAM = "lm-eval-sparse"


@dataclass(frozen=True)
class Command:
    """One of our own sub-commands. `run` gets the arguments after its name and returns the exit status."""

    usage: str
    summary: str
    run: Callable[[list[str]], int | None]


def _methods(argv: list[str]) -> None:
    parser = Parser(prog=f"{PROGRAM} methods", description=COMMANDS["methods"].summary)
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/methods.md")
    options = parser.parse_args(argv)
    from lm_eval_sparse.methods.registry import listing, table
    from lm_eval_sparse.output import columns, say

    say(table() if options.markdown else listing(columns()))


def _plot(argv: list[str]) -> int | None:
    from lm_eval_sparse.analysis import curve

    return curve.main(argv)


def _show(argv: list[str]) -> int | None:
    from lm_eval_sparse.frontier import show

    return show.main(argv)


def _check_task(argv: list[str]) -> int | None:
    from lm_eval_sparse.frontier import check

    return check.main(argv)


def _new_task(argv: list[str]) -> int | None:
    from lm_eval_sparse.frontier import scaffold

    return scaffold.main(argv)


#: Our sub-commands, in the order of the help text. A new one is one function and one line here.
COMMANDS: dict[str, Command] = {
    "methods": Command("methods", "print the sparse-attention methods and their knobs", _methods),
    "plot": Command("plot RESULTS... --output FILE", "draw score against measured sparsity", _plot),
    "show": Command("show TASK --index I", "print a document of a task: prompt, evidence, gold answer", _show),
    "check-task": Command("check-task PATH", "check a task folder: names, lengths, scores, leaks, chance", _check_task),
    "new-task": Command("new-task NAME", "write a folder with a working example task to change", _new_task),
}

#: For the help text only; a later lm-eval's sub-commands work as well.
LM_EVAL_COMMANDS: dict[str, str] = {
    "run": "evaluate a model on tasks (may be left out, as in lm-eval)",
    "ls": "list tasks, groups, subtasks or tags",
    "validate": "check task names",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; type '{self.prog} --help'")


def help_text() -> str:
    """What `lm-eval-sparse --help` prints."""
    ours = [(command.usage, command.summary) for command in COMMANDS.values()]
    width = max(len(left) for left, _ in [*ours, *LM_EVAL_COMMANDS.items()])

    def lines(rows: Sequence[tuple[str, str]]) -> str:
        return "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)

    return f"""\
usage: {PROGRAM} COMMAND ...
       {PROGRAM} --model sparse-hf --model_args method=NAME,sparsity=S --tasks TASKS ...

Training-free sparse attention for the LM Evaluation Harness.

commands of lm-eval-sparse:
{lines(ours)}

commands of lm-eval, with the model type sparse-hf and the frontier tasks in them:
{lines(list(LM_EVAL_COMMANDS.items()))}

options:
  -h, --help  show this text; '{PROGRAM} COMMAND --help' shows a command's own
  --version   show the versions of lm-eval-sparse and lm-eval

example:
  {PROGRAM} run --model sparse-hf --model_args method=flexprefill,sparsity=0.9 --tasks frontier_niah_4k --limit 5
"""


def version_text() -> str:
    """What `lm-eval-sparse --version` prints."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        harness = version("lm_eval")
    except PackageNotFoundError:
        harness = "not installed"
    return f"{PROGRAM} {__version__} (lm_eval {harness})"


def _lm_eval_commands() -> list[str]:
    """The sub-commands of the installed lm-eval, read from its parser, since a later release may have more."""
    try:
        from lm_eval._cli import HarnessCLI

        return list(HarnessCLI()._subparsers.choices)
    except (ImportError, AttributeError):
        return list(LM_EVAL_COMMANDS)


def run_lm_eval(argv: Sequence[str]) -> None:
    """Run lm-eval's command line on `argv` (without the program's name), with the hook installed."""
    from lm_eval_sparse import patches

    patches.install()
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.utils import setup_logging
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError("lm-eval is not installed here; type: pip install 'lm_eval[hf]>=0.4.13'") from None
    arguments = list(argv)
    if arguments[0].startswith("-"):
        # lm-eval's form without a sub-command. It inserts `run` itself, but not before a single `--option=value`.
        arguments.insert(0, "run")
    elif arguments[0] not in (known := _lm_eval_commands()):
        accepted = [*COMMANDS, *known]
        raise UserError(
            f"unknown command {arguments[0]!r}; commands are {', '.join(accepted)}{nearest(arguments[0], accepted)}"
        )
    from lm_eval_sparse import harness

    setup_logging()  # which lm-eval does first, once

    before = sys.argv
    sys.argv = [PROGRAM, *arguments]
    try:
        with _one_line_arguments(), masking.masked_logs(masking.values_in(*arguments)):
            cli_evaluate()
    except SystemExit as ended:
        if arguments[0] == "validate" and ended.code:
            raise UserError(
                "lm-eval found mistakes, which stand above; 'lm_eval ls tasks' shows what there is"
            ) from None
        raise
    except Exception as error:
        if (text := harness.line(error, ours=True)) is None:
            raise
        raise UserError(text) from error
    finally:
        sys.argv = before


@contextlib.contextmanager
def _one_line_arguments() -> Iterator[None]:
    """Let lm-eval's argument parsers complain in one line, as ours do."""
    before = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = Parser.error  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.error = before  # type: ignore[method-assign]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the script. Returns the exit status.

    A `UserError` is printed as one line and returns 1, and so does a signal, which returns 128 and its number.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    endings.keep(None)
    try:
        with endings.sigterm_raises():
            return _run(arguments)
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"{PROGRAM}: error: {endings.line(error)}", file=sys.stderr)
        return endings.status(error)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text(), end="")
    elif arguments[0] == "--version":
        print(version_text())
    elif arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]].run(arguments[1:]) or 0
    else:
        run_lm_eval(arguments)
    return 0
