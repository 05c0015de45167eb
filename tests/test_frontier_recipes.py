"""What every recipe promises, checked for each one in `RECIPES`: lengths, determinism, evidence, twins, leaves.

Long, since what every recipe promises is asked of all recipes alike.
"""

# ruff: noqa: F811 - fixtures of a helper module are arguments of tests

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
from pathlib import Path

import pytest
from frontier_common import KINDS, TASKS, StandIn, build, written
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager
from recipe_cases import (
    LENGTHS,
    NAMES,
    QA,
    active,
    bound,
    check_evidence,
    docs,
    each,
    folder,  # noqa: F401 (fixtures)
    leaf,
    qa_folder,  # noqa: F401 (fixtures)
)

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.frontier import RECIPES, leaves, recipe
from lm_eval_sparse.frontier.recipe import first_answer, option_scores, ranking_chance, ranking_scores, slot_scores

SYSTEM = "You answer questions about long texts."


def unsealed(line):
    """A document as a line of the cache holds it, without the line's checksum."""
    return {key: value for key, value in json.loads(line).items() if key != "sha256"}


# ---------------------------------------------------------------------------------------------------- data and tasks


@pytest.fixture
def lm():
    return active("digits")


def contents(one, number: int, units: int, forced: bool = True, length: int = 4096, text: bool = True):
    """Documents as a task would merge them, cheaply: of a fixed number of units."""
    for index in range(number):
        draft = one.draft(length, 0, index, forced)
        fitting = min(units, draft.most)
        content = written(draft, fitting) if text else draft.gold(fitting)
        yield {"index": index, "length": length, **content}


# ------------------------------------------------------------------------------------------------------------ lengths

CASES = [(kind, False, None) for kind in KINDS] + [
    ("digits", True, SYSTEM),
    ("bos", True, SYSTEM),
]


@each
@pytest.mark.parametrize(("kind", "chat", "system"), CASES)
def test_prompts_have_their_length_and_their_evidence(name, kind, chat, system, qa_folder):
    lm = active(kind)
    for forced in (False, True):
        for length in ("4k", "8k"):
            task = leaf(name, length, forced, qa_folder=qa_folder)
            build(task, lm, chat=chat, limit=1, system_instruction=system)
            reason = task.config.metadata.get("skipped")
            # The ten common words of CWE alone, or four chapters byte by byte, are more than 4,096 tokens of some.
            assert not reason or (name, length) in (("cwe", "4k"), ("story_filtering", "4k")), reason
            if not reason:
                break
        tokens = LENGTHS[length]
        (doc,) = docs(task, limit=1).values()
        prompts = {i.args[0][: getattr(i.args[0], "shared", None)] for i in task.instances}
        assert len(prompts) == 1
        counted = lm.tokens(prompts.pop())
        assert 0.95 * tokens <= counted <= tokens and counted == doc["tokens"]
        assert counted == tokens  # whatever the tokenizer, filler makes it exact
        assert task.config.metadata["prompt_tokens"] == tokens
        check_evidence(task.recipe, doc)
        assert json.loads(json.dumps(doc)) == doc  # the same before it was in the cache and after


@each
@pytest.mark.parametrize(("kind", "chat", "less"), [("digits", True, 100), ("bytes", False, 9)])
def test_prompt_and_forced_answer_never_exceed_a_tight_model(name, kind, chat, less, qa_folder):
    # At 4K the common words of CWE, sixteen answers, or four chapters are too many of these tokenizers' short tokens.
    length = "8k" if name in ("cwe", "story_retrieval", "story_filtering") else "4k"
    tight = LENGTHS[length] - less
    lm = active(kind, max_length=tight)
    task = build(leaf(name, length, True, qa_folder=qa_folder, samples=30), lm, chat=chat, limit=2)
    if (name, kind) == ("story_retrieval", "bytes"):
        assert "for the answer" in task.config.metadata["skipped"]  # sixteen answers: more than 10% of the model
        return
    assert "skipped" not in task.config.metadata
    assert max(lm.tokens(i.args[0] + i.args[1]) for i in task.instances) <= tight
    assert task.config.metadata["prompt_tokens"] >= 0.9 * LENGTHS[length]


# -------------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize(
    ("name", "forced"), [(name, False) for name in NAMES] + [(name, True) for name in NAMES if name.startswith("story")]
)
def test_documents_are_the_same_whoever_makes_them(name, forced, lm, qa_folder, tmp_path, monkeypatch):
    def made(where, **kwargs):
        monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path / where))
        # Few: where CWE is tight, the shortest prompt of each document is looked at.
        return docs(build(leaf(name, forced=forced, qa_folder=qa_folder, samples=5), lm, **kwargs), **kwargs)

    expected = made("one", limit=3)
    assert sorted(expected) == [0, 1, 2] and len({doc["input"] for doc in expected.values()}) == 3
    backwards = made("two", samples=[2, 0])
    assert [backwards[0], backwards[1]] == [expected[2], expected[0]]
    assert made("three", limit=3, rank=1, world_size=2) == {1: expected[1]}
    assert made("three", limit=3, rank=0, world_size=2) == {0: expected[0], 2: expected[2]}
    assert made("three", limit=3) == expected  # read, each made by another rank

    (file,) = (tmp_path / "one" / "docs").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])  # torn
    assert made("one", limit=3) == expected
    file.write_bytes(b'{"index": 0, "inp\n' + whole.replace(b"\n", b"\n\xff{]\n", 1))
    assert made("one", limit=3) == expected
    assert made("one", limit=3, samples=None) == expected
    assert [unsealed(line) for line in (whole.splitlines())] == [expected[i] for i in range(3)]


def _write(name, forced, qa_folder, order, barrier):
    lm = active("digits")
    task = leaf(name, forced=forced, qa_folder=qa_folder, samples=20)
    barrier.wait()
    build(task, lm, samples=order)
    os._exit(0 if len({i.doc_id for i in task.instances}) == len(order) else 1)


@each
def test_two_processes_write_the_cache_at_once(name, lm, qa_folder, folder, tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(2)
    StandIn("digits")  # trained once, before the processes part
    writers = [
        fork.Process(target=_write, args=(name, False, qa_folder, order, barrier)) for order in ([0, 1, 2], [2, 1, 0])
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    (file,) = folder.iterdir()
    lines = [unsealed(line) for line in file.read_bytes().splitlines() if line]
    assert {doc["index"] for doc in lines} == {0, 1, 2} and 3 <= len(lines) <= 6
    together = docs(build(leaf(name, qa_folder=qa_folder, samples=20), lm, limit=3), limit=3)
    assert all(doc == together[doc["index"]] for doc in lines)
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path / "alone"))
    assert docs(build(leaf(name, qa_folder=qa_folder, samples=20), lm, limit=1), limit=1)[0] == together[0]


@each
def test_what_decides_a_document_decides_its_cache_file(name, lm, qa_folder, folder, monkeypatch):
    few = {"qa_folder": qa_folder, "samples": 5}

    def files(**metadata):
        build(leaf(name, **{**few, **metadata}), active("digits"), limit=1)
        return set(folder.iterdir())

    first = files()
    assert len(first) == 1 == len(files(method="flexprefill", sparsity=0.9, samples=7, strict=True))
    assert len(files(seed=1)) == 2
    build(leaf(name, **few), active("bpe"), limit=1)
    with_bpe = 0 if name == "cwe" and len(set(folder.iterdir())) == 2 else 1  # where CWE does not fit
    assert len(set(folder.iterdir())) == 2 + with_bpe
    lm = active("digits")
    build(leaf(name, **few), lm, limit=1, chat=True)
    build(leaf(name, **few), lm, limit=1, system_instruction=SYSTEM)
    build(leaf(name, forced=True, **few), lm, limit=1)
    assert len(set(folder.iterdir())) == 5 + with_bpe
    build(leaf(name, **few, question_first=False), lm, limit=1)
    assert len(set(folder.iterdir())) == 6 + with_bpe
    before = set(folder.iterdir())
    monkeypatch.setattr(type(recipe(name)), "version", 99)
    # Those of the older version go; the twin's are its own.
    assert {path.name.partition("-")[0] for path in before & files()} == {f"forced_{name}"}
    assert len(files()) == 2
    monkeypatch.undo()


@pytest.mark.parametrize("name", [name for name in NAMES if name in QA])
def test_other_data_is_another_cache_file(name, lm, qa_folder, folder, tmp_path):
    build(leaf(name, qa_folder=qa_folder), lm, limit=1)
    assert len(set(folder.iterdir())) == 1
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(qa_folder).iterdir():
        (other / file.name).write_text(file.read_text().replace("What does the text say", "What is said", 1))
    build(leaf(name, qa_folder=str(other)), lm, limit=1)
    assert len(set(folder.iterdir())) == 2


# ------------------------------------------------------------------------------------------------------ skipped leaves


@each
@pytest.mark.parametrize("forced", [False, True])
def test_a_model_that_is_too_short_skips_the_leaf(name, forced, qa_folder, folder):
    lm = active("digits", max_length=3000)
    task = build(leaf(name, forced=forced, qa_folder=qa_folder), lm, limit=3)
    assert task.config.metadata["skipped"] and "prompt_tokens" not in task.config.metadata
    (doc,) = docs(task, limit=3).values()
    assert task.process_results(doc, [(0.0, True)] if forced else ["x"]) == {}
    assert not folder.exists()
    strict = leaf(name, forced=forced, qa_folder=qa_folder, strict=True)
    with pytest.raises(UserError, match="strict"):
        build(strict, lm, limit=3)
    assert not getattr(strict, "_instances", None)


@pytest.mark.parametrize("name", [name for name in NAMES if name in QA])
@pytest.mark.parametrize("forced", [False, True])
def test_missing_data_skips_the_leaf(name, forced, qa_folder, lm, tmp_path, monkeypatch):
    from lm_eval_sparse.frontier import qa_data

    asked = []

    def nothing(kind, hub):
        asked.append(hub)
        raise ConnectionError("no network")

    monkeypatch.setattr(qa_data, "_hub_rows", nothing)
    monkeypatch.setattr(qa_data, "_known", {})
    others = tmp_path / "others"
    others.mkdir()
    for file in Path(qa_folder).iterdir():
        if {"squad": "dev-v2", "quality": "QuALITY", "toefl": "toefl"}[name] not in file.name:
            (others / file.name).write_bytes(file.read_bytes())
    for metadata in ({}, {"qa_folder": str(others)}, {f"{name}_hub": "nobody/nothing"}):
        task = build(leaf(name, forced=forced, **metadata), lm, limit=2)
        reason = task.config.metadata["skipped"]
        assert "qa_folder" in reason and len(task.instances) == 1
        (doc,) = docs(task, limit=2).values()
        assert task.process_results(doc, [(0.0, True)] if forced else ["x"]) == {}
        with pytest.raises(UserError, match="strict"):
            build(leaf(name, forced=forced, strict=True, **metadata), lm, limit=2)
    assert asked


# ------------------------------------------------------------------------------------------------------------- drafts


@each
@pytest.mark.parametrize("forced", [False, True])
def test_a_message_depends_on_nothing_asked_before(name, forced, qa_folder):
    one = bound(name, qa_folder)
    for index in range(3):
        sizes = [7, 0, 30, 12, 7, 3, 31, 30]
        used = one.draft(4096, 0, index, forced)
        for units in sizes:
            filler = "A line of no use." if units % 2 else ""
            fresh = one.draft(4096, 0, index, forced)
            if units >= 12:
                assert used.gold(units) == fresh.gold(units)
            text = used.message(units, filler)
            assert text == one.draft(4096, 0, index, forced).message(units, filler)
            assert text.count("A line of no use.") == bool(filler)
            if filler:
                assert "\nA line of no use.\n" in text  # a line of its own
        again = bound(name, qa_folder).draft(4096, 0, index, forced)
        assert again.message(30, "") == used.message(30, "")


@each
@pytest.mark.parametrize("forced", [False, True])
def test_a_message_grows_with_its_units(name, forced, qa_folder):
    one = bound(name, qa_folder)
    for index in range(3):
        draft = one.draft(4096, 0, index, forced)
        sizes = [len(draft.message(units, "")) for units in range(min(80, draft.most + 1))]
        assert all(a < b for a, b in itertools.pairwise(sizes))


@each
def test_a_message_and_its_gold_agree_for_every_number_of_units(name, qa_folder):
    one = bound(name, qa_folder)
    for forced in (False, True):
        for index in range(2):
            draft = one.draft(4096, 0, index, forced)
            for units in [*range(4, 40), *range(40, min(draft.most, 200), 23)]:
                doc = written(draft, units)
                assert json.loads(json.dumps(doc)) == doc
                check_evidence(one, doc)
                if not forced:
                    answer = f"<answer>\n{doc['target']}\n</answer>"
                    assert set(one.score(doc, answer).values()) == {1.0}
                asked = one.requests(doc)
                assert max(len((lead + more).encode()) for lead, more in asked) <= len(draft.answer.encode()) + 8
                if name == "vt" or len(asked) == 1:  # all of one size
                    assert max(len(lead + more) for lead, more in asked) <= len(draft.answer)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("story")])
def test_stories_of_few_chapters_can_be_scored(name, qa_folder):
    """A tokenizer of bytes or a long system prompt leaves a 4K story few chapters."""
    one = bound(name, qa_folder)
    for units in (2, 3, 4):
        for index in range(5):
            draft = one.draft(4096, 0, index, True)
            doc = written(draft, units)
            check_evidence(one, doc)
            one.forced_score(doc, [(-1.0, False)] * len(one.requests(doc)))
            one.chance(doc)
            assert set(one.score(doc, f"<answer>{doc['target']}</answer>").values()) == {1.0}


@pytest.mark.parametrize(
    ("name", "kind", "forced", "system"),
    [
        ("story_filtering", "bytes", True, "x" * 2000),
        ("story_filtering", "bytes", False, "x" * 2000),
        ("story_multihop", "bytes", True, "x" * 1600),
        ("story_multihop", "bytes", False, "x" * 1600),
        ("cwe", "digits", True, " the" * 962),
        ("vt", "bytes", True, "x" * 1000),
        ("niah", "bytes", False, "x" * 800),
    ],
)
def test_a_question_with_hardly_any_room_can_be_answered_or_is_skipped(name, kind, forced, system):
    """A long system prompt may leave room for less content than a question needs to have an answer."""
    lm = active(kind)
    task = build(leaf(name, forced=forced), lm, limit=3, system_instruction=system)
    if "skipped" in task.config.metadata:
        assert "the shortest prompt" in task.config.metadata["skipped"]
        return
    for doc in docs(task, limit=3).values():
        check_evidence(task.recipe, doc)
        if forced:
            asked = task.recipe.requests(doc)
            task.recipe.forced_score(doc, [(-1.0, False)] * len(asked))
            assert all(chance < 0.6 for chance in task.recipe.chance(doc).values())


@each
def test_documents_differ_and_the_twin_has_the_same_gold(name, qa_folder):
    one = bound(name, qa_folder)
    generated, forced = (list(contents(one, 20, 30, f)) for f in (False, True))
    assert len({doc["input"] for doc in generated}) == 20
    for a, b in zip(generated, forced, strict=True):
        same = {k: v for k, v in a.items() if k not in ("input", "span", "context")}
        assert same == {k: v for k, v in b.items() if k not in ("input", "span", "context")}
        assert a["input"] != b["input"]
        if name == "cwe":  # the twin's list has the same words in another order
            lists = [sorted(line.split(". ")[1] for line in one.evidence(doc)[0].splitlines()) for doc in (a, b)]
            assert lists[0] == lists[1]
        else:
            assert one.evidence(a) == one.evidence(b)
        assert "<answer>" in a["input"] and "<answer>" not in b["input"]


@each
def test_an_answer_to_another_document_is_seldom_right(name, qa_folder):
    one = bound(name, qa_folder)
    found = list(contents(one, 60, 40, False))
    wrong = [
        next(iter(one.score(doc, f"<answer>{other['target']}</answer>").values()))
        for doc, other in zip(found, [*found[1:], found[0]], strict=True)
    ]
    assert statistics.fmean(wrong) < (0.45 if name in ("quality", "toefl") else 0.1)
    for doc in found[:5]:
        for text in ("", " ", "<answer></answer>", "<answer>", "</answer>", "\x00", "I do not know."):
            assert set(one.score(doc, text).values()) == {0.0}


# -------------------------------------------------------------------------------------------------------------- twins


def gold_requests(name: str, doc: dict, asked: list[tuple[str, str]]) -> set[int]:
    """Positions of the right candidates, found by what they say."""
    if name == "vt":  # "The value of NAME is"
        return {i for i, (lead, _) in enumerate(asked) if set(lead.split()) & set(doc["names"])}
    if name == "cwe":
        return {i for i, (_, more) in enumerate(asked) if more.strip() in doc["words"]}
    if name == "story_filtering":
        return {i for i, (_, more) in enumerate(asked) if int(more) in doc["numbers"]}
    if name in ("quality", "toefl"):  # the letters or the texts, with or without more before them
        right = {text for letter in doc["letters"] for text in (letter, doc["options"]["ABCDEFGH".index(letter)])}
        return {i for i, (_, more) in enumerate(asked) if any(more.endswith(f" {text}") for text in right)}
    return set(range(len(asked)))


RANKED = [name for name in NAMES if name in ("vt", "cwe", "story_filtering", "quality", "toefl")]


@each
def test_an_oracle_gets_everything_and_its_opposite_nothing(name, qa_folder):
    one = bound(name, qa_folder)
    for doc in contents(one, 30, 30):
        asked = one.requests(doc)
        gold = gold_requests(name, doc, asked)
        assert len(set(asked)) == len(asked) and all(more.strip() for _, more in asked)
        best = one.forced_score(doc, [(-1e-9, True) if i in gold else (-400.0, False) for i in range(len(asked))])
        worst = one.forced_score(doc, [(-400.0, False) if i in gold else (-1e-9, True) for i in range(len(asked))])
        if "bits_per_char" in best:
            assert best == {"exact": 1.0, "bits_per_char": pytest.approx(0, abs=1e-6)}
            assert worst["exact"] == 0.0 and worst["bits_per_char"] > 1
        else:
            (metric,) = best
            assert best == {metric: 1.0} and worst[metric] < 0.5
            assert 0 < len(gold) < len(asked)


@pytest.mark.parametrize("name", RANKED)
def test_a_random_scorer_gets_what_chance_says(name, qa_folder):
    one = bound(name, qa_folder)
    source = random.Random(11)
    differences = []
    for doc in contents(one, 220, 20, text=False):
        asked, expected = one.requests(doc), one.chance(doc)
        for _ in range(3):
            got = one.forced_score(doc, [(-source.random(), False) for _ in asked])
            assert set(got) == set(expected)
            differences += [got[metric] - expected[metric] for metric in expected]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    assert abs(statistics.fmean(differences)) < 4 * error


@pytest.mark.parametrize("name", RANKED)
def test_a_scorer_that_cannot_tell_candidates_apart_gains_nothing(name, qa_folder):
    one = bound(name, qa_folder)
    for doc in contents(one, 30, 20, text=False):
        asked = one.requests(doc)
        (got,) = one.forced_score(doc, [(-5.0, True)] * len(asked)).values()
        gold = len(gold_requests(name, doc, asked))
        last = range(len(asked) - gold + 1, len(asked) + 1)
        ap = sum(hits / rank for hits, rank in enumerate(last, 1)) / gold
        assert got == pytest.approx(ap if "average_precision" in one.chance(doc) else 0.0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANKED])
def test_exact_answer_twins_have_no_chance(name, qa_folder):
    one = bound(name, qa_folder)
    doc = next(contents(one, 1, 30))
    assert one.chance(doc) == {"exact": 0.0}
    asked = one.requests(doc)
    got = one.forced_score(doc, [(-math.log(2), i == 0) for i in range(len(asked))])
    assert got["exact"] == (1.0 if name == "squad" else 1 / len(asked))
    assert got["bits_per_char"] == pytest.approx(
        1 / max(map(len, doc["references"])) if name == "squad" else len(asked) / sum(map(len, values(doc)))
    )
    target = doc["target"]
    for lead, more in asked:
        assert more.startswith(" ") and more == more.rstrip() and not lead.endswith(" ")
        assert name == "squad" or more[1:] in target


def values(doc: dict) -> list[str]:
    return doc["values"] if "values" in doc else [doc["value"]]


# --------------------------------------------------------------------------------------------- scores by brute force


def plain_average_precision(ranked: tuple[bool, ...]) -> float:
    return statistics.fmean(sum(ranked[:k]) / k for k in range(1, len(ranked) + 1) if ranked[k - 1])


@pytest.mark.parametrize(("n", "gold"), [(n, g) for n in range(1, 8) for g in range(1, n + 1)])
def test_ranking_chance_is_the_mean_over_all_orders(n, gold):
    orders = set(itertools.permutations([True] * gold + [False] * (n - gold)))
    assert len(orders) == math.comb(n, gold)
    assert ranking_chance(n, gold) == pytest.approx(statistics.fmean(map(plain_average_precision, orders)))


def test_ranking_chance_of_the_tasks():
    for n, gold in ((40, 5), (20, 10), (29, 3)):
        source = random.Random(1)
        drawn = []
        for _ in range(5_000):
            ranks = [i < gold for i in range(n)]
            source.shuffle(ranks)
            drawn.append(plain_average_precision(tuple(ranks)))
        assert abs(statistics.fmean(drawn) - ranking_chance(n, gold)) < 4 * statistics.stdev(drawn) / 5_000**0.5


@pytest.mark.parametrize(("n", "gold"), [(n, g) for n in range(1, 6) for g in range(1, n + 1)])
def test_ranking_scores_and_option_scores_for_all_orders_and_ties(n, gold):
    """Every assignment of likelihoods 0 to 2: among all ways to break ties the worst one counts."""
    candidates = [f" c{'x' * i}" for i in range(n)]
    right, positions = set(candidates[:gold]), set(range(gold))
    for levels in itertools.product(range(3), repeat=n):
        results = [(-1.0 - level, False) for level in levels]
        orders = [
            order
            for order in itertools.permutations(range(n))
            if all(levels[a] <= levels[b] for a, b in itertools.pairwise(order))
        ]
        precision = min(plain_average_precision(tuple(i in positions for i in order)) for order in orders)
        assert ranking_scores(candidates, right, results) == {"average_precision": pytest.approx(precision)}
        best = min(float(set(order[:gold]) == positions) for order in orders)
        assert option_scores(candidates, positions, results) == {"acc": best}


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-500, 0), min_size=2, max_size=12, unique=True), st.data())
def test_the_order_of_candidates_does_not_matter(logprobs, data):
    n = len(logprobs)
    gold = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))
    order = data.draw(st.permutations(range(n)))
    names, results = [f" name{i}" for i in range(n)], [(x, False) for x in logprobs]
    one = ranking_scores(names, {names[i] for i in gold}, results)
    assert one == ranking_scores([names[i] for i in order], {names[i] for i in gold}, [results[i] for i in order])
    moved = {order.index(i) for i in gold}
    assert option_scores(names, gold, results) == option_scores(
        [names[i] for i in order], moved, [results[i] for i in order]
    )


def test_ranking_and_options_by_hand():
    names = [" a", " b", " c", " d"]
    results = [(-3.0, False), (-1.0, True), (-2.0, False), (-4.0, False)]  # b, c, a, d
    assert ranking_scores(names, [" b"], results) == {"average_precision": 1.0}
    assert ranking_scores(names, [" d"], results) == {"average_precision": 0.25}
    assert ranking_scores(names, [" b", " a"], results) == {"average_precision": pytest.approx((1 + 2 / 3) / 2)}
    assert ranking_scores(names, [" c", " d"], results) == {"average_precision": pytest.approx((1 / 2 + 2 / 4) / 2)}
    assert option_scores(names, [1], results) == {"acc": 1.0}
    assert option_scores(names, [2], results) == {"acc": 0.0}
    assert option_scores(names, [1, 2], results) == {"acc": 1.0}
    assert option_scores(names, [0, 1], results) == {"acc": 0.0}
    infinite = [(-math.inf, False), (-1.0, True), (-math.inf, False), (-2.0, False)]
    assert ranking_scores(names, [" a"], infinite) == {"average_precision": 0.25}
    with pytest.raises(ValueError):
        ranking_scores(names, [" a"], results[:3])  # a result is missing


def test_slot_scores_by_hand():
    ln2 = math.log(2)
    assert slot_scores(["abcd"], [(-8 * ln2, True)]) == {"exact": 1.0, "bits_per_char": pytest.approx(2)}
    assert slot_scores(["ab", "cdef"], [(-3 * ln2, True), (-9 * ln2, False)]) == {
        "exact": 0.5,
        "bits_per_char": pytest.approx(12 / 6),
    }
    assert slot_scores(["x", "y", "z"], [(0.0, True)] * 3) == {"exact": 1.0, "bits_per_char": 0.0}
    assert slot_scores(["jalapeño"], [(-4 * ln2, 0)])["bits_per_char"] == pytest.approx(0.5)  # characters, not bytes


WORDS = [
    ("", None),
    ("x", None),
    ("<answer>x</answer>", ["x"]),
    ("<answer>x", ["x"]),
    ("x</answer>", None),
    ("<ANSWER>x</ANSWER>", ["x"]),
    ("<answer></answer>", None),
    ("<answer></answer><answer>x</answer>", ["x"]),
    ("<answer>x</answer><answer>y</answer>", ["x"]),
    ("<answer>x<answer>y</answer>", ["y"]),
    ("<answer>x<answer></answer>", None),
    ("<answer><answer>x</answer></answer>", ["x"]),
    ("a </answer> b <answer>x y</answer> z", ["x", "y"]),
    ("a <answer> </answer> b", None),
    ("<answer>x</answer></answer><answer>y", ["x"]),
    ("<answer>\r\nx\r\n</answer>\r\n", ["x"]),
    ("I write <answer> and </answer>. <answer>x</answer>", ["and"]),
    ("<answer >x</answer>", None),
    ("<answer>x</ans", ["x"]),
    ("<answer>x<", ["x"]),
    ("<answer>x</ans y", ["x</ans", "y"]),
    ("</answer><answer>x", ["x"]),
]


@pytest.mark.parametrize(("text", "expected"), WORDS)
def test_first_answer_by_hand(text, expected):
    assert first_answer(text, str.split) == expected


# ------------------------------------------------------------------------------------------------------------- leaves


def test_the_files_are_what_leaves_writes():
    written = {
        str(path.relative_to(TASKS)): path.read_text()
        for path in TASKS.rglob("*")
        if path.is_file() and (path.suffix == ".yaml" or path.name.startswith("_"))
    }
    assert written == leaves.tree()


def test_leaf_names_folders_and_recipes_agree():
    assert [one.name for one in leaves.BUILT_IN] == list(RECIPES)
    assert leaves.LENGTHS == LENGTHS
    for one in leaves.BUILT_IN:
        if one.name in NAMES:
            assert recipe(one.name).version == one.version and recipe(one.name).name == one.name


def test_every_leaf_loads_and_patterns_match_leaves_only(qa_folder):
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"qa_folder": qa_folder})
    expected = [f"frontier_{name}_{length}" for name in RECIPES for length in LENGTHS]
    assert len(expected) == 54
    names = {"": expected, "forced_": [f"forced_{name}" for name in expected]}
    assert set(manager.all_subtasks) == {*names[""], *names["forced_"]}
    assert set(manager.all_groups) == {"frontier", "forced_frontier"}
    for prefix, group in names.items():
        matched = manager.match_tasks([f"{prefix}frontier_*"])
        assert sorted(matched) == sorted(group)
        assert not set(matched) & ({*manager.all_groups} | {*manager.all_tags})
    assert not any("_" in tag for tag in manager.all_tags)
    if list(RECIPES) != NAMES:
        pytest.skip("not all recipes are there yet")
    for prefix, group in names.items():
        loaded = manager.load([f"{prefix}frontier"])["tasks"]
        assert sorted(loaded) == sorted(group)
        for name, task in loaded.items():
            _, _, rest = name.rpartition("frontier_")
            kind, _, length = rest.rpartition("_")
            assert (task.recipe.name, task.length, task.forced) == (kind, LENGTHS[length], bool(prefix))
            assert task.config.metadata["samples"] == 100 and "skipped" not in task.config.metadata


@pytest.mark.parametrize(
    ("tag", "kinds"),
    [
        ("qa", ("squad", "quality", "toefl")),
        ("retrieval", ("niah", "story_retrieval")),
        ("high-scope", ("cwe", "story_filtering")),
        ("high-dispersion", ("vt", "story_multihop")),
    ],
)
def test_tags_are_the_groups_of_the_paper(tag, kinds):
    for forced in (False, True):
        found = {
            one.name
            for one in leaves.BUILT_IN
            for text in one.files().values()
            if f"{'forced-' if forced else ''}frontier-{tag},"
            in text.replace("]", ",").replace("[", ",").replace(" ", "")
        }
        assert found == set(kinds)


@each
def test_metrics_of_the_files_are_those_of_the_recipe(name, qa_folder):
    one = bound(name, qa_folder)
    folder = next(folder for folder in leaves.BUILT_IN if folder.name == name)
    doc = next(contents(one, 1, 20))
    assert list(one.score(doc, "x")) == list(folder.metrics)
    forced = one.forced_score(doc, [(-1.0, False)] * len(one.requests(doc)))
    assert list(forced) == [metric.lstrip("-") for metric in folder.forced_metrics]
    assert set(one.chance(doc)) <= set(forced)
    paper = {"niah": "acc", "vt": "iou", "cwe": "iou", "squad": "f1", "quality": "exact_match", "toefl": "exact_match"}
    paper |= {"story_retrieval": "acc", "story_multihop": "exact_match", "story_filtering": "iou"}
    assert list(folder.metrics) == [paper[name]]
