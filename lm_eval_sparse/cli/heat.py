"""`lm-eval-sparse heat`."""

from __future__ import annotations

from .parser import Command, Parser


def run(argv: list[str]) -> None:
    """Print what methods lose by phase, and draw it by layer and head."""
    parser = Parser.of("heat", "Show what methods lose, layer by layer, from result files of runs with diagnose=N.")
    parser.add_argument(
        "results", nargs="+", metavar="RESULTS", help="result files, or folders that hold results_*.json"
    )
    parser.add_argument("--output", metavar="FILE", help="FILE.png: a heat map of layers and heads")
    options = parser.parse_args(argv)
    from lm_eval_sparse.analysis import heat
    from lm_eval_sparse.output import say

    say(heat.heat(options.results, options.output))


COMMAND = Command("heat RESULTS...", "show what methods lose by layer and head (runs with diagnose=N)", run)
