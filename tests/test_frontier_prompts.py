"""What stands before and after the context, for every task: length, the question once or twice, room for the answer."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
from frontier_common import build
from recipe_cases import (  # noqa: F401 (fixtures)
    LENGTHS,
    QA,
    active,
    bound,
    check_evidence,
    docs,
    each,
    folder,
    leaf,
    qa_folder,
)

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.frontier import recipe
from lm_eval_sparse.frontier.recipe import Message
from lm_eval_sparse.frontier.show import Reader

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
tails = importlib.import_module("tails")

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
#: A folder with Qwen2.5's tokenizer, to measure instead of believing what was measured.
QWEN = os.environ.get("SPARSE_HF_TEST_QWEN_TOKENIZER")
both = pytest.mark.parametrize("forced", [False, True])


# ------------------------------------------------------------------------------------------------- after the context


@each
def test_tails_were_measured_with_the_present_wording(name):
    """A change of what stands after the context needs a new run of benchmarks/tails.py."""
    found = json.loads((RESULTS / "tails.json").read_text())["tasks"][name]
    assert found["wording"] == tails.wording(name), "run benchmarks/tails.py again"
    for row in found["tokens"][tails.REFERENCE].values():
        assert abs(row["generated"]["mean"] / tails.PAPER[name] - 1) <= tails.TOLERANCE
    if QWEN:
        metadata = {"qa_folder": os.environ.get("SPARSE_HF_TEST_QA")}
        measured = tails.measure(f"frontier_{name}_4k", Reader.of(QWEN, {}, True), metadata, 20)
        if measured and not found["made_up"]:
            assert measured == found["tokens"][tails.REFERENCE]["4k"]["generated"]


def test_a_changed_wording_is_another_hash(monkeypatch):
    from lm_eval_sparse.frontier import niah, squad, vt

    before = {name: tails.wording(name) for name in ("niah", "vt", "squad", "toefl")}
    monkeypatch.setattr(niah, "_GENERATE", niah._GENERATE + " Be quick.")
    monkeypatch.setattr(vt, "_QUESTION", vt._QUESTION + " Say it.")
    monkeypatch.setattr(squad.Squad, "_rule", ("Other.", squad.Squad._rule[1]))
    after = {name: tails.wording(name) for name in before}
    assert [after[name] == before[name] for name in before] == [False, False, False, True]


# ------------------------------------------------------------------------------------------------ room for the answer


@pytest.fixture(scope="module")
def embedded() -> Reader:
    return Reader.of(None, {"max_length": 8192}, chat=True)


@each
@both
def test_no_8k_leaf_drops_out_of_a_model_of_8192_tokens(name, forced, qa_folder, embedded):  # noqa: F811
    def count(text: str) -> int:
        return len(embedded.tok_encode(text))

    task = build(leaf(name, "8k", forced, qa_folder=qa_folder), embedded, chat=True, limit=1)
    metadata = task.config.metadata
    assert "skipped" not in metadata and 0.9 * 8192 <= metadata["prompt_tokens"] <= 8192
    (doc,) = docs(task, limit=1).values()
    if forced:
        assert max(count(i.args[0] + i.args[1]) for i in task.instances) <= 8192
        return
    prompt, arguments = task.instances[0].args
    room = metadata["answer_tokens"]
    assert arguments["max_gen_toks"] == room and count(prompt) == doc["tokens"] == metadata["prompt_tokens"]
    assert count(prompt) + room == 8192 and room > 170
    thought = "I read the text to its end, and what is asked for is found in the places that I name here. " * 5
    answer = f"<explanation>\n{thought}\n</explanation>\n<answer>\n{doc['target']}\n</answer>"
    assert 100 < count(answer) <= room


@pytest.mark.parametrize(
    ("limit", "given", "prompt", "answer"),
    [
        (None, None, 4096, 1024),
        (4096 + 1024, None, 4096, 1024),
        (4096 + 1023, None, 4096, 1023),  # there is room for a fair answer, so the prompt stays whole
        (4096 + 700, None, 4096, 700),
        (4096 + 600, 600, 4096, 600),
        (4096 + 100, 50, 4096, 50),
        (4096 + 40, 50, 4086, 50),
        (4096 + 5000, 3000, 4096, 3000),
        (4096 + 2999, 3000, 4096, 2999),
        (3687 + 50, 50, 3687, 50),  # 90% of 4096 is 3686.4
        (3686 + 50, 50, None, None),
        (40, 50, None, None),
    ],
)
def test_answers_have_what_is_asked_for_or_what_the_model_takes(limit, given, prompt, answer):
    lm = active("digits", max_length=limit or 10**9)
    task = leaf("vt")
    if given:
        task.set_config("generation_kwargs", {"max_gen_toks": given}, update=True)
    for _ in range(2):  # a second model finds what was asked for, not what the first had room for
        build(task, lm, limit=1)
        metadata = task.config.metadata
        if prompt is None:
            assert "50 for the answer" in metadata["skipped"] and "answer_tokens" not in metadata
            continue
        assert (metadata["prompt_tokens"], metadata["answer_tokens"]) == (prompt, answer)
        assert task.instances[0].args[1]["max_gen_toks"] == answer
    build(task, active("digits"), limit=1)
    assert task.config.metadata["answer_tokens"] == (given or 1024)


def test_what_is_typed_for_a_further_run_of_a_task_holds():
    """lm-eval writes it into the very dictionary that an earlier run, whose model had less room, has left."""
    lm, task = active("digits", max_length=4096 + 404), leaf("vt")
    build(task, lm, limit=1)
    assert task.instances[0].args[1]["max_gen_toks"] == 404
    task.set_config("generation_kwargs", {"max_gen_toks": 64, "do_sample": True}, update=True)
    build(task, lm, limit=1)
    asked = task.instances[0].args[1]
    assert (asked["max_gen_toks"], asked["do_sample"]) == (64, True)


# -------------------------------------------------------------------------------------------------- the question once


@each
@both
def test_without_the_question_first_nothing_before_the_context_depends_on_it(name, forced, qa_folder):  # noqa: F811
    one = bound(name, qa_folder)
    heads = set()
    for index in range(4):
        message = one.draft(4096, 0, index, forced).message(20, "A line of no use.")
        intro, twice, question, context, _ = message._parts
        once = message.once
        begin, end = once.context
        assert once[begin:end] == context == message[slice(*message.context)] and once.tail == message.tail
        assert message.count(question) == 2 and once.count(question) == 1 and once.index(question) >= end
        assert twice in message and twice not in once and len(once) < len(message) and str(once).startswith(intro)
        assert once.once == once and once.question_first is False is not message.question_first
        heads.add(once[:begin])
    assert len(heads) == 1  # whatever is asked, several questions could share it


@each
@both
def test_a_leaf_with_the_question_once(name, forced, qa_folder, folder):  # noqa: F811
    length = "8k" if name == "cwe" else "4k"
    lm = active("digits")
    twice = build(leaf(name, length, forced, qa_folder=qa_folder), lm, limit=1)
    once = build(leaf(name, length, forced, qa_folder=qa_folder, question_first=False), lm, limit=2)
    assert once.config.metadata["question_first"] is False and "question_first" not in twice.config.metadata
    assert len(list(folder.iterdir())) == 2
    found, (usual,) = docs(once, limit=2), docs(twice, limit=1).values()
    for doc in found.values():
        begin, end = doc["context"]
        assert doc["tokens"] == LENGTHS[length]
        check_evidence(once.recipe, doc)
        for piece in once.recipe.evidence(doc):
            assert begin <= doc["input"].index(piece) < end
    assert len({doc["input"][: doc["context"][0]] for doc in found.values()}) == 1
    if name not in QA and not name.startswith("story"):  # there the question depends on how much fits
        question = usual["input"][usual["context"][1] :].strip("\n").split("\n\n")[0]
        assert usual["input"].count(question) == 2 and found[0]["input"].count(question) == 1
    for instance in once.instances:
        prompt = instance.args[0]
        assert lm.tokens(prompt[: getattr(prompt, "shared", None)]) == LENGTHS[length]
        assert prompt.startswith(instance.doc["input"])
        if forced:
            assert prompt[: prompt.shared] == instance.doc["input"]
    if forced:
        best = {id(i): (0.0, True) for i in once.instances}
        scores = once.process_results(found[0], [best[id(i)] for i in once.instances if i.doc_id == 0])
        assert set(scores) == set(twice.process_results(usual, [(0.0, True)] * len(twice.instances)))
    else:
        assert set(once.process_results(found[0], [once.doc_to_target(found[0])]).values()) == {1.0}


class _Plain:
    most, answer = 500, "no"

    def message(self, units, filler):
        return "Words:\n" + "word\n" * units + filler

    def gold(self, units):
        return {"target": "no"}


def test_a_recipe_without_a_separable_question_is_refused_in_one_line(monkeypatch):
    one = type(recipe("niah"))
    monkeypatch.setattr(one, "draft", lambda *_: _Plain())
    with pytest.raises(UserError, match="^frontier_niah_4k: question_first=false was given, but") as caught:
        build(leaf("niah", question_first=False), active("digits"), limit=1)
    assert "\n" not in str(caught.value) and "leave question_first out" in str(caught.value)


def test_a_message_survives_what_processes_do_to_it():
    import copy
    import pickle

    message = Message("Intro.", "Twice.", "Why?", "Text: why not.", "Say it.")
    assert message == "Intro.\nTwice.\n\nWhy?\n\nText: why not.\n\nWhy?\n\nSay it."
    assert message.once == "Intro.\n\nText: why not.\n\nWhy?\n\nSay it." and message.tail == "\n\nWhy?\n\nSay it."
    for one in (message, message.once):
        for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
            assert other == one and other.context == one.context and other.question_first == one.question_first
