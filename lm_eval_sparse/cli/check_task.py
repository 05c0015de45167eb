"""`lm-eval-sparse check-task`."""

from __future__ import annotations

from .parser import Command, Parser, add_task_options


def run(argv: list[str]) -> int:
    """Check the folder of a task."""
    parser = Parser.of("check-task", "Check a folder with the YAML files of one task.")
    parser.add_argument("path", metavar="PATH", help="the folder, or the name of a built-in task")
    add_task_options(parser)
    parser.add_argument(
        "--lengths", metavar="4k,8k", help="whose documents are made (default: two, and one of the longest)"
    )
    parser.add_argument("--samples", metavar="N", default="8", help="documents per leaf (default: 8)")
    options = parser.parse_args(argv)
    from lm_eval_sparse.frontier import check

    return check.run(
        options.path,
        tokenizer=options.tokenizer,
        metadata=options.metadata,
        lengths=options.lengths,
        samples=options.samples,
    )


COMMAND = Command("check-task PATH", "check a task folder: names, lengths, scores, leaks, chance", run)
