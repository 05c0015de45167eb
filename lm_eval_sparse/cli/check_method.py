"""`lm-eval-sparse check-method`."""

from __future__ import annotations

import json
import logging
import textwrap

from .parser import Command, Parser


def run(argv: list[str]) -> int:
    """Put a method to the conformance kit."""
    parser = Parser.of("check-method", "Check that a method holds what every method promises.")
    parser.add_argument(
        "method", metavar="METHOD", help="as behind method=: a name, WRAPPER:NAME, or path/to/file.py:Class"
    )
    parser.add_argument("--only", metavar="CHECK", action="append", help="this check only; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object when all checks are done")
    options = parser.parse_args(argv)
    from lm_eval_sparse.output import columns, say
    from lm_eval_sparse.testing import conformance

    # What lm-eval and the model have to say of the small models that are made on the way.
    logging.disable(logging.WARNING)
    try:
        subject = conformance.Subject.of(options.method.removeprefix("method="))  # as messages say it
        results = []
        for result in conformance.run(subject, options.only):
            results.append(result)
            if not options.json:
                head = f"{'pass' if result.passed else 'FAIL'}  {result.check:<12}  "
                say(textwrap.fill(head + result.says, columns(), subsequent_indent=" " * len(head)))
    finally:
        logging.disable(logging.NOTSET)
    failed = [result.check for result in results if not result.passed]
    if options.json:
        checks = [{"check": one.check, "passed": one.passed, "says": one.says} for one in results]
        found = {"method": subject.name, "phase": subject.phase, "passed": not failed, "checks": checks}
        say(json.dumps(found, indent=2))
    elif failed:
        say(f"{subject.name}: {len(failed)} of {len(results)} checks failed: {', '.join(failed)}")
    else:
        say(f"{subject.name}: all {len(results)} checks passed")
    return 1 if failed else 0


COMMAND = Command("check-method METHOD", "check a method: budget, causality, batches, dtypes, memory, counts", run)
