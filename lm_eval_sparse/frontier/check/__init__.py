"""`lm-eval-sparse check-task`: does a task keep what the package promises of every task?

One line per check. What a task's author gets wrong most easily is looked for without knowing the task: documents that
depend on more than their seed, prompts of a wrong length, answers that leak, scorers that reward nonsense, twins whose
chance level is not what they say.

A check is a function of the `Subject`, which returns what it found or raises `report.Wrong`; those of one kind stand in
one module. What lies here does not decide what documents say (see `sources`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from ...cli.app import PROGRAM, Parser
from .. import apart
from ..metadata import add_options, check_keys, read_metadata, read_number
from ..show import Reader
from . import determinism, documents, drafts, leaks, names, scores, twins
from .folder import built_in, folder_of, lengths_of, scratch
from .report import Report
from .subject import Subject


def main(argv: list[str]) -> int:
    """`lm-eval-sparse check-task PATH [...]`: the exit status, 0 when every check passed."""
    parser = Parser(prog=f"{PROGRAM} check-task", description="Check a folder with the YAML files of one task.")
    parser.add_argument("path", metavar="PATH", help="the folder, or the name of a built-in task")
    add_options(parser)
    parser.add_argument(
        "--lengths", metavar="4k,8k", help="whose documents are made (default: two, and one of the longest)"
    )
    parser.add_argument("--samples", metavar="N", default="8", help="documents per leaf (default: 8)")
    options = parser.parse_args(argv)
    samples = read_number("--samples", options.samples, 2)
    metadata = read_metadata(options.metadata)
    folder = folder_of(options.path)
    if folder in built_in().values():  # recipes from elsewhere may read more
        check_keys(metadata)
    lengths = lengths_of(options.lengths)

    def work(progress: apart.Progress) -> int:
        reader = Reader.of(options.tokenizer, metadata, chat=False)
        report = Report(folder, progress)
        with scratch():
            check_all(Subject(folder, reader, metadata, lengths, samples), report)
        return report.close()

    try:
        return apart.run(work)
    except apart.Ended as error:
        return Report(folder, apart.Progress(sys.stdout)).ended(error)


def check_all(subject: Subject, report: Report) -> None:
    """All checks of one folder, in order."""

    def check(name: str, function: Callable[[Subject], str]) -> bool:
        return report.check(name, function, subject)

    if not check("files", names.files):
        return
    check("names", names.names)
    check("tags", names.tags)
    check("clashes", names.clashes)
    if subject.built_in:
        check("groups", names.groups)
    check("README", names.readme)
    if not (check("classes", documents.classes) and check("documents", documents.documents)):
        report.progress.say("      (what needs documents was not checked)")
        return
    check("lengths", documents.lengths)
    check("content", documents.content)
    check("order", determinism.order)
    check("other process", determinism.other_process)
    check("other seed", determinism.other_seed)
    check("variety", determinism.variety)
    check("JSON", determinism.survives_json)
    check("metrics", scores.metrics)
    check("gold answer", scores.gold)
    check("no answer", scores.nothing)
    check("wrong answer", scores.wrong_answer)
    check("copied prompt", scores.echo)
    check("evidence", leaks.evidence)
    check("secrets", leaks.secrets)
    if subject.twins():
        check("twin: same gold", twins.same_gold)
        check("twin: one prompt", twins.one_prompt)
        check("twin: gold requests", twins.gold_requests)
        check("twin: chance", twins.chance)
    check("draft: pure", drafts.pure)
    check("draft: filler", drafts.filler)
    check("draft: room", drafts.room)
    check("draft: cheap", drafts.cheap)
