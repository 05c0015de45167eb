"""The command `lm-eval-sparse`: lm-eval's own command line with our models and tasks in it, plus our sub-commands.

It installs the import hook itself, so it also works where Python reads no start-up files (`-S`, `--target`,
a checkout on PYTHONPATH). It knows nothing of models or results; each sub-command imports what it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lm_eval_sparse import __version__, endings
from lm_eval_sparse.errors import PROGRAM, UserError

from . import (
    analyze,
    check_method,
    check_task,
    harness,
    heat,
    methods,
    new_method,
    new_task,
    plot,
    recommend,
    show,
    sweep,
)
from .parser import Command

#: Our sub-commands, in the order of the help text. A new one is a file and one line here.
COMMANDS: dict[str, Command] = {
    "methods": methods.COMMAND,
    "sweep": sweep.COMMAND,
    "analyze": analyze.COMMAND,
    "recommend": recommend.COMMAND,
    "plot": plot.COMMAND,
    "heat": heat.COMMAND,
    "show": show.COMMAND,
    "check-task": check_task.COMMAND,
    "new-task": new_task.COMMAND,
    "check-method": check_method.COMMAND,
    "new-method": new_method.COMMAND,
}


def help_text() -> str:
    """What `lm-eval-sparse --help` prints."""
    ours = [(command.usage, command.summary) for command in COMMANDS.values()]
    width = max(len(left) for left, _ in [*ours, *harness.COMMANDS.items()])

    def lines(rows: Sequence[tuple[str, str]]) -> str:
        return "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)

    return f"""\
usage: {PROGRAM} COMMAND ...
       {PROGRAM} --model sparse-hf --model_args method=NAME,sparsity=S --tasks TASKS ...

Training-free sparse attention for the LM Evaluation Harness.

commands of lm-eval-sparse:
{lines(ours)}

commands of lm-eval, with the model type sparse-hf and the frontier tasks in them:
{lines(list(harness.COMMANDS.items()))}

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
        installed = version("lm_eval")
    except PackageNotFoundError:
        installed = "not installed"
    return f"{PROGRAM} {__version__} (lm_eval {installed})"


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
        harness.run(arguments, list(COMMANDS))
    return 0
