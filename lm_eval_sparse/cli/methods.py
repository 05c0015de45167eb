"""`lm-eval-sparse methods`."""

from __future__ import annotations

from .parser import Command, Parser


def run(argv: list[str]) -> None:
    """Print the methods: as text for the terminal, or as the table of docs/methods.md."""
    parser = Parser.of("methods", COMMAND.summary)
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/methods.md")
    options = parser.parse_args(argv)
    from lm_eval_sparse.methods.registry import listing, table
    from lm_eval_sparse.output import columns, say

    say(table() if options.markdown else listing(columns()))


COMMAND = Command("methods", "print the sparse-attention methods and their knobs", run)
