"""`lm-eval-sparse analyze`."""

from __future__ import annotations

import shlex

from .analysis_options import add_options, add_results, options_of
from .parser import Command, Parser


def run(argv: list[str]) -> None:
    """Write a report, figures and tables from result files."""
    parser = Parser.of("analyze", "Analyse result files of lm-eval: curves, certificates, costs, a report.")
    add_results(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder, or one of an earlier analysis")
    parser.add_argument("--task", action="append", help="only this task, family or short name; may be repeated")
    parser.add_argument("--no-pictures", action="store_true", help="no PNG and SVG files: the report draws for itself")
    add_options(parser)
    given = parser.parse_args(argv)
    from lm_eval_sparse.analysis import analyze
    from lm_eval_sparse.output import say

    analyze.check_installed("analyze")
    options, shared = options_of(given)
    say(
        analyze.analyze(
            given.results,
            given.output,
            options,
            tasks=given.task,
            pictures=not given.no_pictures,
            command=shlex.join(["lm-eval-sparse", "analyze", *argv]),
            **shared,
        )
    )


COMMAND = Command("analyze RESULTS... --output DIR", "report: curves, certified sparsity, costs, scaling law", run)
