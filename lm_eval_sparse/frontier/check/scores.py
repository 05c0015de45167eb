"""Scorers that give all to the gold answer, and nothing to nonsense."""

from __future__ import annotations

import math
from typing import Any

from ..leaves import MEASURED
from .report import fail_on
from .subject import Made, Subject

_REFUSAL = "I am sorry, but this is something with which help is not possible."
#: What is no answer to anything. No digits, no capital letters on their own, no words of five capitals.
_NOTHING = {
    "no text": "",
    "blanks": " \n\t \n",
    "empty tags": "<explanation></explanation>\n<answer>\n</answer>",
    "a refusal": _REFUSAL,
    "a refusal in tags": f"<answer>{_REFUSAL}</answer>",
    "noise": "<answer>\nqzx wvqj; ~~~ §§ %%% -- xkcdq\n</answer>" + " lorem ipsum ((((" * 50,
}
_LOW = (-50.0, False)
_MOST_ECHO = 0.75


def metrics(subject: Subject) -> str:
    problems, shown = [], []
    for made in subject.plain():
        listed = [row["metric"] for row in made.task.config.metric_list]
        listed = [name for name in listed if name not in MEASURED]
        requests = len(made.instances[0])
        results = [_LOW] * requests if made.task.forced else [""]
        given = list(made.task.process_results(made.docs[0], results))
        if set(listed) != set(given):
            problems.append(f"{made.name} scores {', '.join(given)}; its metric_list has {', '.join(listed)}")
        shown += [name for name in listed if name not in shown]
    fail_on(problems)
    return f"metric_list names what is scored: {', '.join(shown)}"


def _scores(made: Made, doc: dict[str, Any], text: str) -> dict[str, float]:
    better = made.task.higher_is_better()
    return {name: value for name, value in made.task.process_results(doc, [text]).items() if better.get(name, True)}


def gold(subject: Subject) -> str:
    problems = []
    for made in subject.generated():
        for doc in made.docs:
            for text in {answer(doc["target"]): 0, made.task.doc_to_target(doc): 0}:  # lm-eval logs the latter
                for metric, value in _scores(made, doc, text).items():
                    if not math.isclose(value, 1.0, abs_tol=1e-9):
                        problems.append(
                            f"the gold answer of document {doc['index']} of {made.name} ({doc['target']!r:.60}) "
                            f"scores {metric} {value:.4g}; expected 1"
                        )
                if problems:
                    break
    fail_on(problems)
    return "the gold answer in tags scores 1"


def nothing(subject: Subject) -> str:
    problems = []
    for made in subject.plain(False):
        for doc in made.docs:
            for what, text in _NOTHING.items():
                for metric, value in _scores(made, doc, text).items():
                    if value != 0:
                        problems.append(
                            f"{what} scores {metric} {value:.4g} on document {doc['index']} of {made.name}; expected 0"
                        )
    fail_on(problems)
    return f"{', '.join(_NOTHING)} score 0"


def wrong_answer(subject: Subject) -> str:
    if natural := subject.natural():
        return f"not looked at: {natural}"
    problems = []
    for made in subject.plain(False):
        for doc, other in zip(made.docs, made.docs[1:] + made.docs[:1], strict=True):
            scores = _scores(made, doc, answer(other["target"]))
            if doc["target"] != other["target"] and scores and min(scores.values()) >= 1:
                problems.append(
                    f"the gold answer of document {other['index']} scores 1 on document {doc['index']} of "
                    f"{made.name}; expected less"
                )
    fail_on(problems)
    return "the gold answer of another document scores less than 1"


def echo(subject: Subject) -> str:
    """A scorer that only looks whether the gold answer occurs somewhere pays for a copy of the prompt."""
    problems = []
    for made in subject.plain(False):
        for what, wrap in (("a copy of the prompt", str), ("a copy of the prompt in answer tags", answer)):
            scores = [_scores(made, doc, wrap(text)) for doc, text in zip(made.docs, made.prompts, strict=True)]
            for metric in scores[0] if scores else ():
                mean = sum(score[metric] for score in scores) / len(scores)
                if mean >= _MOST_ECHO:
                    problems.append(f"{what} scores {metric} {mean:.4g} on average in {made.name}; expected little")
    fail_on(problems)
    return "a copy of the prompt does not score"


def answer(target: str) -> str:
    return f"<explanation>\nThe text was read.\n</explanation>\n<answer>\n{target}\n</answer>"
