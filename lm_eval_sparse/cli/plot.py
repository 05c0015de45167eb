"""`lm-eval-sparse plot`."""

from __future__ import annotations

from .parser import Command, Parser


def run(argv: list[str]) -> None:
    """Draw curves from result files."""
    parser = Parser.of("plot", "Draw score against measured sparsity from result files of lm-eval.")
    parser.add_argument(
        "results", nargs="+", metavar="RESULTS", help="result files, or folders that hold results_*.json"
    )
    parser.add_argument("--output", required=True, action="append", help="FILE.png or FILE.html; may be repeated")
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    parser.add_argument(
        "--allow-mixed", action="store_true", help="draw tasks of several versions, seeds or prompts beside each other"
    )
    options = parser.parse_args(argv)
    from lm_eval_sparse.analysis import curve

    curve.plot(options.results, options.output, options.task, allow_mixed=options.allow_mixed)


COMMAND = Command("plot RESULTS... --output FILE", "draw score against measured sparsity", run)
