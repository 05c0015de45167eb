"""Options that `analyze` and `recommend` share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lm_eval_sparse.errors import UserError

from .parser import Parser

if TYPE_CHECKING:
    from lm_eval_sparse.analysis.certify import Options

_TESTS = ("hoeffding-bentkus", "paired-t", "welch")


def add_results(parser: Parser) -> None:
    parser.add_argument(
        "results",
        nargs="+",
        metavar="RESULTS",
        help="result files of lm-eval, folders that hold them, or records.jsonl of an earlier analysis",
    )


def add_options(parser: Parser) -> None:
    parser.add_argument("--tolerance", metavar="T", default="0.05", help="mean loss that is accepted (default 0.05)")
    parser.add_argument("--level", metavar="P", default="0.1", help="chance of a false certificate (default 0.1)")
    parser.add_argument(
        "--margin",
        metavar="M",
        default="0.05",
        help="what dense must exceed chance by, and a tie is within (default 0.05)",
    )
    parser.add_argument("--test", choices=_TESTS, default=_TESTS[0], help="the last two are approximations")
    parser.add_argument(
        "--batch", metavar="B", default="1", help="sequences decoded side by side, for costs (default 1)"
    )
    parser.add_argument("--metric", help="only this metric (default: each task's first that is a share)")
    parser.add_argument(
        "--chance", metavar="TASK=LEVEL", action="append", default=[], help="score without knowledge; may be repeated"
    )
    parser.add_argument(
        "--allow-mixed", action="store_true", help="tasks of several versions, seeds or prompts side by side, marked"
    )


def options_of(given: argparse.Namespace) -> tuple[Options, dict[str, Any]]:
    """What was typed. Raises `UserError`."""
    from lm_eval_sparse.analysis.certify import Options

    options = Options(
        tolerance=number("--tolerance", given.tolerance),
        level=number("--level", given.level),
        margin=number("--margin", given.margin),
        test=given.test,
        batch=number("--batch", given.batch),
    )
    shared = {"metric": given.metric, "chance": levels(given.chance), "allow_mixed": given.allow_mixed}
    return options, shared


def number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option} {text:.40}: a number is expected") from None


def levels(given: list[str]) -> dict[str, float]:
    found = {}
    for pair in given:
        name, equals, value = pair.rpartition("=")
        try:
            found[name] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name or not 0 <= found[name] < 1:
            raise UserError(f"--chance {pair:.80}: TASK=LEVEL is expected, a level from 0 to 1, such as toefl=.25")
    return found
