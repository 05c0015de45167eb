"""`lm-eval-sparse new-task`."""

from __future__ import annotations

from .parser import Command, Parser


def run(argv: list[str]) -> None:
    """Write a folder with an example task."""
    parser = Parser.of("new-task", "Write a folder with a working example task to change.")
    parser.add_argument("name", metavar="NAME", help="of the task: lower-case words joined by underscores")
    parser.add_argument("--folder", metavar="DIR", default=".", help="where the folder NAME is made (default: here)")
    options = parser.parse_args(argv)
    from lm_eval_sparse import paths
    from lm_eval_sparse.frontier import scaffold
    from lm_eval_sparse.output import say

    folder = scaffold.write(options.name, paths.expand(f"--folder {options.folder}", options.folder))
    say(scaffold.next_steps(options.name, folder))


COMMAND = Command("new-task NAME", "write a folder with a working example task to change", run)
