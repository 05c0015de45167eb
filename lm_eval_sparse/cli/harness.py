"""lm-eval's own commands, with our model type and tasks in them, and its mistakes in one line as ours are."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence

from lm_eval_sparse import masking, spelling
from lm_eval_sparse.errors import PROGRAM, UserError, nearest

from .parser import Parser

#: For the help text only; a later lm-eval's sub-commands work as well.
COMMANDS: dict[str, str] = {
    "run": "evaluate a model on tasks (may be left out, as in lm-eval)",
    "ls": "list tasks, groups, subtasks or tags",
    "validate": "check task names",
}


def _commands() -> list[str]:
    """The sub-commands of the installed lm-eval, read from its parser, since a later release may have more."""
    try:
        from lm_eval._cli import HarnessCLI

        return list(HarnessCLI()._subparsers.choices)
    except (ImportError, AttributeError):
        return list(COMMANDS)


def run(argv: Sequence[str], ours: Sequence[str] = ()) -> None:
    """Run lm-eval's command line on `argv` (without the program's name), with the hook installed.

    Raises:
        UserError: a mistake; of a command that is none, `ours` are named beside lm-eval's own.
    """
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
    elif arguments[0] not in (known := _commands()):
        accepted = [*ours, *known]
        raise UserError(
            f"unknown command {arguments[0]!r}; commands are {', '.join(accepted)}{nearest(arguments[0], accepted)}"
        )
    if allowed := "--allow-code" in arguments:
        arguments.remove("--allow-code")
    from lm_eval_sparse import harness

    setup_logging()  # which lm-eval does first, once

    before = sys.argv
    sys.argv = [PROGRAM, *arguments]
    try:
        with (
            _one_line_arguments(),
            masking.masked_logs(masking.values_in(*arguments)),
            spelling.allowing_code(allowed),
        ):
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
