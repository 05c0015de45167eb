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

from .. import apart
from ..metadata import check_keys, read_metadata, read_number
from ..show import Reader
from . import determinism, documents, drafts, leaks, names, scores, twins
from .folder import built_in, folder_of, lengths_of, scratch
from .report import Report
from .subject import Subject


def run(
    path: str,
    *,
    tokenizer: str | None = None,
    metadata: str | None = None,
    lengths: str | None = None,
    samples: str = "8",
) -> int:
    """Check the folder of one task, or a built-in task; values as they are typed. Returns the exit status.

    It is 0 when every check passed.

    Raises:
        UserError: a value that cannot be, or no such folder.
    """
    number = read_number("--samples", samples, 2)
    given = read_metadata(metadata)
    folder = folder_of(path)
    if folder in built_in().values():  # recipes from elsewhere may read more
        check_keys(given)
    chosen = lengths_of(lengths)

    def work(progress: apart.Progress) -> int:
        reader = Reader.of(tokenizer, given, chat=False)
        report = Report(folder, progress)
        with scratch():
            check_all(Subject(folder, reader, given, chosen, number), report)
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
