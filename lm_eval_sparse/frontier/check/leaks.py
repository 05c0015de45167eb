"""Evidence that stands in the prompt once, and an answer that stands nowhere else in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .report import Wrong, fail_on
from .subject import Subject

_TELLING = 12  # characters from which a gold line in the prompt is no coincidence


def evidence(subject: Subject) -> str:
    problems, pieces = [], 0
    for made in subject.made:
        for doc, prompt in zip(made.docs, made.prompts, strict=True):
            found = made.task.recipe.evidence(doc)
            pieces += len(found)
            where = f"of document {doc['index']} of {made.name}"
            if not found:
                problems.append(f"no evidence {where}; expected at least one piece")
            for piece in found:
                times = prompt.count(piece) if piece else 0
                if times != 1:
                    problems.append(f"the evidence {piece!r:.80} {where} stands {times} times in the prompt, not once")
    fail_on(problems)
    return f"{pieces} pieces, each once in its prompt"


def secrets(subject: Subject) -> str:
    natural, problems, named, looked = subject.natural(), [], 0, 0
    for made in subject.made:
        for doc, prompt in zip(made.docs, made.prompts, strict=True):
            rest = _outside(made.task.recipe.evidence(doc), prompt)
            secrets = list(made.task.recipe.secrets(doc))
            named += len(secrets)
            lines = (line.strip() for line in str(doc["target"]).splitlines())
            telling = secrets or ([] if natural else [line for line in lines if len(line) >= _TELLING])
            looked += len(telling)
            for secret in telling:
                if not secret or secret.lower() in rest.lower():
                    problems.append(
                        f"{'the secret' if secrets else 'the gold line'} {secret!r:.60} of document "
                        f"{doc['index']} of {made.name} stands in the prompt outside the evidence"
                    )
    fail_on(problems)
    _told_outright(subject, natural)
    if not looked:
        why = natural or "its gold answers are short"
        return f"not looked at: the recipe names no secrets, and {why}; see that the prompt does not tell the answer"
    return f"{looked} {'secrets' if named else 'gold lines'} stand nowhere outside the evidence"


def _told_outright(subject: Subject, natural: str) -> None:
    """Short gold answers may stand in any prompt by chance; but not each in its own and in few of the others."""
    for made in () if natural else subject.made:
        golds = [str(doc["target"]).strip().lower() for doc in made.docs]
        rests = [
            _outside(made.task.recipe.evidence(doc), prompt).lower()
            for doc, prompt in zip(made.docs, made.prompts, strict=True)
        ]
        stands = [
            [bool(re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", rest)) for gold in golds if gold] for rest in rests
        ]
        own = [row[i] for i, row in enumerate(stands)]
        others = [value for i, row in enumerate(stands) for j, value in enumerate(row) if golds[i] != golds[j]]
        if len(set(golds)) > 2 and all(own) and sum(others) < len(others) / 2:
            raise Wrong(
                f"the gold answer of every document of {made.name} stands in its own prompt outside the evidence, "
                "and in few of the others: the prompt seems to tell it"
            )


def _outside(evidence: Sequence[str], prompt: str) -> str:
    """The prompt without the pieces of evidence; nothing is joined that they parted."""
    for piece in sorted(evidence, key=len, reverse=True):
        prompt = prompt.replace(piece, "\n\0\n") if piece else prompt
    return prompt
