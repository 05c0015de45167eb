"""`lm-eval-sparse new-method`."""

from __future__ import annotations

from .parser import Command, Parser


def run(argv: list[str]) -> None:
    """Write a file with an example method, and its tests."""
    parser = Parser.of("new-method", "Write a file with a working example method to change, and its tests.")
    parser.add_argument("name", metavar="NAME", help="of the method: lower-case words joined by underscores")
    parser.add_argument("--phase", default="eviction", help="eviction (default), prefill or decode")
    parser.add_argument("--out", metavar="DIR", default=".", help="where the two files are written (default: here)")
    options = parser.parse_args(argv)
    from lm_eval_sparse import paths
    from lm_eval_sparse.output import say
    from lm_eval_sparse.testing import scaffold

    folder = paths.expand(f"--out {options.out}", options.out)
    files = scaffold.write(options.name, options.phase, folder)
    say(scaffold.next_steps(options.name, options.phase, files))


COMMAND = Command("new-method NAME", "write a file with a working example method to change, and its tests", run)
