"""`lm-eval-sparse recommend`."""

from __future__ import annotations

from .analysis_options import add_options, add_results, number, options_of
from .parser import Command, Parser


def run(argv: list[str]) -> int:
    """Print the cheapest certified configuration; 1 when nothing is recommended."""
    parser = Parser.of("recommend", "The cheapest configuration that is certified to keep a task, or why none.")
    add_results(parser)
    parser.add_argument("--task", help="name, family or short name, such as forced_frontier_niah or niah")
    parser.add_argument("--group", help="single_qa, multiple_qa, high_scope or high_dispersion: all its tasks")
    parser.add_argument("--length", metavar="L", help="tokens, such as 4096 or 4k (default: all that were run)")
    parser.add_argument("--by", choices=("cost", "memory", "time"), default="cost", help="what is to be least")
    parser.add_argument(
        "--answer_tokens", metavar="N", default="256", help="tokens of an answer, for --by cost (default 256)"
    )
    parser.add_argument("--model", action="append", help="only this model; may be repeated")
    parser.add_argument("--method", action="append", help="only this method; may be repeated")
    add_options(parser)
    given = parser.parse_args(argv)
    from lm_eval_sparse.analysis import analyze, recommend
    from lm_eval_sparse.output import say

    analyze.check_installed("recommend")
    options, shared = options_of(given)
    study = analyze.study_of(given.results, models=given.model, methods=given.method, **shared)
    said, found = recommend.recommend(
        study,
        options,
        task=given.task,
        group=given.group,
        length=None if given.length is None else analyze.length_of(given.length),
        by=given.by,
        answer=number("--answer_tokens", given.answer_tokens),
    )
    say(said)
    return 0 if found else 1


COMMAND = Command("recommend RESULTS... --task NAME", "the cheapest certified configuration, or why there is none", run)
