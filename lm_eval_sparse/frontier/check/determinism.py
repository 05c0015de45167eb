"""Documents that depend on their seed and nothing else, and that differ from each other."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from ... import paths
from .. import elsewhere
from .folder import scratch
from .report import SHOWN, Wrong, fail_on
from .subject import Made, Subject


def order(subject: Subject) -> str:
    problems = []
    for made in subject.plain()[:2]:
        with scratch():
            other = subject.make(
                made.task.config.task, order=[doc["index"] for doc in reversed(made.docs)], samples=subject.samples
            )
        assert isinstance(other, Made)
        for doc, again in zip(made.docs, other.docs, strict=True):
            if doc != again:
                problems.append(
                    f"document {doc['index']} of {made.name} {_difference(doc, again)} when made in another order"
                )
    fail_on(problems)
    return "the same documents in reversed order from an empty cache"


def other_process(subject: Subject) -> str:
    content = subject.leaves()[subject.plain()[0].task.config.task]
    kwargs = {key: str(value) for key, value in content["dataset_kwargs"].items() if key in ("task", "recipe")}
    job = {
        "folder": str(subject.folder),
        "recipe": kwargs,
        "metadata": _metadata_anywhere(subject),
        "length": subject.plain()[0].task.length,
        "indexes": [doc["index"] for doc in subject.plain()[0].docs],
    }
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    try:
        theirs = elsewhere.run(job, seed)
    except elsewhere.Failed as error:
        raise Wrong(f"another process cannot write the documents: {error}") from None
    ours = elsewhere.digests(job)
    problems = [f"{key} is another in another process (hash order? clock? global state?)" for key in ours
                if theirs.get(key) != ours[key]]  # fmt: skip
    fail_on(problems)
    return f"the same documents with PYTHONHASHSEED={seed}"


def _metadata_anywhere(subject: Subject) -> dict[str, Any]:
    """The metadata as it reads from every folder."""
    found = {**subject.metadata, "samples": subject.samples}
    if "qa_folder" in found:
        found["qa_folder"] = str(paths.folder("qa_folder", found["qa_folder"]).resolve())
    return found


def other_seed(subject: Subject) -> str:
    made = subject.plain(False)[0] if subject.plain(False) else subject.plain()[0]
    seed = made.task.seed + 1
    other = subject.make(made.task.config.task, samples=subject.samples, seed=seed)
    if isinstance(other, str):
        raise Wrong(f"{made.name} is skipped with seed {seed}: {other}")
    same = [a["index"] for a, b in zip(made.docs, other.docs, strict=False) if a["input"] == b["input"]]
    if len(same) > len(made.docs) / 2:
        raise Wrong(f"document {same[0]} of {made.name} is the same with seed {seed}; expected another")
    return f"other documents with seed {seed}"


def variety(subject: Subject) -> str:
    problems = []
    for made in subject.plain():
        seen: dict[str, int] = {}
        for doc in made.docs:
            first = seen.setdefault(doc["input"], doc["index"])
            if first != doc["index"]:
                problems.append(f"documents {first} and {doc['index']} of {made.name} are equal; expected others")
        golds = {json.dumps(doc["target"]) for doc in made.docs}
        if len(golds) == 1 and not problems:
            problems.append(f"all documents of {made.name} have the same gold answer {made.docs[0]['target']!r:.60}")
    fail_on(problems)
    return "documents differ, and so do gold answers"


def survives_json(subject: Subject) -> str:
    problems = []
    for made in subject.plain():
        for doc in made.docs:
            try:
                again = json.loads(json.dumps(doc))
            except (TypeError, ValueError) as error:
                raise Wrong(f"`gold` of {made.name} holds what JSON has no type for: {error}") from None
            if doc != again:
                problems.append(f"document {doc['index']} of {made.name} {_difference(doc, again)} as JSON")
            if not isinstance(doc["target"], str) or not doc["target"].strip():
                problems.append(f"`target` of {made.name} is {doc['target']!r:.40}; expected a text")
    fail_on(problems)
    return "documents survive JSON"


def _difference(doc: Mapping[str, Any], again: Mapping[str, Any]) -> str:
    keys = [key for key in {**doc, **again} if doc.get(key) != again.get(key)]
    return f"has another {', '.join(repr(key) for key in keys[:SHOWN])}"
