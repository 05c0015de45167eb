"""What no knowledge gets in each task, in the metadata of a run: held against answers that know nothing."""

# ruff: noqa: F811 - fixtures of a helper module are arguments of tests

from __future__ import annotations

import itertools
import json
import re
from statistics import fmean
from typing import Any

import pytest
from frontier_common import TASKS, build
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from recipe_cases import (
    active,
    docs,
    each,
    folder,  # noqa: F401 (fixtures)
    leaf,
    qa_folder,  # noqa: F401 (fixtures)
)

from lm_eval_sparse.frontier.recipe import mean_levels


def blind(name: str, doc: dict[str, Any]) -> list[str]:
    """Answers to a document that know what may be answered and not what is right."""
    if name in ("quality", "toefl"):
        letters = "ABCDEFGH"[: len(doc["options"])]
        return [", ".join(some) for some in itertools.combinations(letters, len(doc["letters"]))]
    if name == "vt":
        return [" ".join(sorted(set(re.findall(r"\b[A-Z]{5}\b", doc["input"][slice(*doc["context"])]))))]
    if name == "story_filtering":
        numbers = set(re.findall(r"(?m)^\W*Chapter (\d+)\b", doc["input"][slice(*doc["context"])]))
        return [", ".join(sorted(numbers, key=int))]
    if name == "cwe":
        listed = re.findall(r"(?m)^\d+\. (\w+)$", doc["input"][slice(*doc["context"])])
        return ["\n".join(f"{at}. {word}" for at, word in enumerate(dict.fromkeys(listed), 1))]
    return ["1. nothing\n2. of it", "I do not know."]


@each
def test_generated_tasks_say_what_answers_without_knowledge_get(name, qa_folder):
    number = 3
    task = build(leaf(name, "8k", False, qa_folder=qa_folder), active("digits"), limit=number)
    levels = task.config.metadata["chance"]
    written = docs(task, limit=number).values()
    scores = [
        {metric: fmean(row[metric] for row in rows) for metric in rows[0]}
        for rows in (
            [task.recipe.score(doc, f"<answer>\n{answer}\n</answer>") for answer in blind(name, doc)] for doc in written
        )
    ]
    assert len(scores) == number and set(levels) == set(scores[0])
    for metric, level in levels.items():
        assert level == pytest.approx(fmean(row[metric] for row in scores), abs=1e-12)
    assert set(levels) <= {entry["metric"] for entry in task.config.metric_list}


@each
def test_twins_say_what_random_likelihoods_get(name, qa_folder):
    number = 3
    task = build(leaf(name, "8k", True, qa_folder=qa_folder), active("digits"), limit=number)
    rows = [task.recipe.chance(doc) for doc in docs(task, limit=number).values()]
    assert task.config.metadata["chance"] == {
        metric: pytest.approx(fmean(row[metric] for row in rows)) for metric in rows[0]
    }


def test_levels_change_no_document_and_are_never_read(folder):
    """Typed values are replaced; documents, requests and what names them stay what they are."""
    made = []
    for metadata in ({}, {"chance": {"acc": 0.9}}):
        task = build(leaf("niah", **metadata), active("digits"), limit=2)
        made.append(([i.args for i in task.instances], sorted(path.name for path in folder.rglob("*"))))
        assert task.config.metadata["chance"] == {"acc": 0.0}
        # A second build counts anew.
        assert build(task, active("digits"), limit=1).config.metadata["chance"] == {"acc": 0.0}
    assert made[0] == made[1] and made[0][1]


def test_a_skipped_leaf_says_nothing():
    task = build(leaf("niah", chance={"acc": 0.5}), active("digits", max_length=300))
    assert task.config.metadata["skipped"] and "chance" not in task.config.metadata


def test_results_hold_the_levels():
    lm = active("digits", answer=lambda request: (-1.0, False))
    manager = TaskManager(include_defaults=False, include_path=str(TASKS))
    results = simple_evaluate(
        model=lm, tasks=["forced_frontier_vt_4k"], limit=2, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    found = json.loads(json.dumps(results, default=str))["configs"]["forced_frontier_vt_4k"]["metadata"]["chance"]
    assert 0.125 < found["average_precision"] < 0.25


def test_a_metric_that_some_documents_lack_has_no_level():
    assert mean_levels([{"a": 0.25, "b": 1.0}, {"a": 0.75}]) == {"a": 0.5}
    assert mean_levels([]) == {} == mean_levels([{}, {"a": 1.0}])
