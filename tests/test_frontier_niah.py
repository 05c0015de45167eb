"""NIAH: what its documents contain, how answers are scored, what its twin asks."""

from __future__ import annotations

import math
import re
import time

import pytest
from frontier_common import KINDS, StandIn, build, leaf, noise, tokenizer

from lm_eval_sparse.frontier.niah import Niah, NiahDraft, parse
from lm_eval_sparse.protocol import MeasuredLoglikelihood, MeasuredText, SharedPrompt, set_active_lm

CODE = re.compile(r"[a-z0-9]{8}(?:-[a-z0-9]{8}){3}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path))


@pytest.fixture
def lm():
    model = StandIn("digits")
    set_active_lm(model)
    return model


def draft(index: int = 0, forced: bool = False) -> NiahDraft:
    return Niah().draft(4096, 0, index, forced)


# --------------------------------------------------------------------------------------------------------- documents


def test_two_hundred_documents_are_built_as_the_paper_says():
    for index in range(200):
        one = draft(index)
        text, gold = one.message(20, ""), one.gold(20)
        assert gold["pairs"] == 24 and len(gold["keys"]) == len(gold["values"]) == 4
        entries = dict(re.findall(rf"^Stored under ({CODE.pattern}): ({CODE.pattern})\.$", text, re.MULTILINE))
        assert len(entries) == 24  # keys are unique
        assert len({*entries, *entries.values()}) == 48  # and no value equals a key or another value
        for key, value in zip(gold["keys"], gold["values"], strict=True):
            assert entries[key] == value
            assert text.count(value) == 1  # nowhere but in its entry: not in question, format or rules
            assert text.count(key) == 3  # its entry and the question, twice
        order = [text.index(f"under {key}") for key in gold["keys"]]
        positions = sorted(order)
        assert text.index(gold["keys"][0]) < positions[0] and positions[-1] < text.rindex(gold["keys"][0])


def test_query_order_and_needle_places_vary():
    firsts, sorted_orders = set(), 0
    for index in range(60):
        one = draft(index)
        lines = one.message(28, "").splitlines()
        places = [next(i for i, line in enumerate(lines) if line.startswith(f"Stored under {k}")) for k in one.keys]
        start = lines.index("List of entries:") + 1
        firsts.update(place - start for place in places)
        sorted_orders += places == sorted(places)
    assert firsts == set(range(32))  # needles lie everywhere, the ends included
    assert sorted_orders < 15  # 60/24 expected


def test_question_stands_before_and_after_the_list():
    one = draft()
    before, _, after = one.message(3, "").partition("List of entries:")
    question = "\n".join(f"{i}. {key}" for i, key in enumerate(one.keys, 1))
    assert before.count(question) == after.count(question) == 1
    assert after.index(question) > after.rindex("Stored under")
    assert "<explanation>" in after and after.index("<explanation>") < after.index("<answer>")
    assert not CODE.search(re.sub("|".join(one.keys), "", before))


def test_pairs_do_not_depend_on_how_many_fit_and_the_twin_has_the_same():
    few, many, twin = draft(7), draft(7), draft(7, forced=True)
    entries = [
        [line for line in text.splitlines() if line.startswith("Stored")]
        for text in (few.message(5, ""), many.message(40, "Some filler."), twin.message(40, ""))
    ]
    assert [line for line in entries[1] if line in entries[0]] == entries[0]
    assert entries[1] == entries[2]
    assert many.message(5, "") == few.message(5, "")  # asking for more before changes nothing
    assert few.gold(5) == {**twin.gold(40), "pairs": 9}


def test_seed_index_and_length_each_change_the_document():
    texts = {
        Niah().draft(length, seed, index, False).message(2, "")
        for length in (4096, 8192)
        for seed in (0, 1)
        for index in (0, 1)
    }
    assert len(texts) == 8


def test_a_document_is_the_same_for_ever():
    """Another text here means another benchmark: raise `Niah.version` and say so in the changelog."""
    one = draft()
    assert Niah.version == 2
    assert (one.keys[0], one.values[3]) == (GOLDEN_KEY, GOLDEN_VALUE)


GOLDEN_KEY, GOLDEN_VALUE = "ieegdg2u-dygxu3hn-kzf85v4l-go9tqh2u", "eq5a64an-8ugtnl0f-ecmfqk54-nok0umpv"


# ----------------------------------------------------------------------------------------------------------- scoring


def test_the_gold_answer_scores_one_for_two_hundred_documents(lm):
    task = build(leaf(samples=200), lm, limit=200)
    assert len(task.instances) == 200
    for index, doc in task.doc_iterator(limit=200):
        assert task.process_results(doc, [task.doc_to_target(doc)]) == {"acc": 1.0}
        wrapped = f"<explanation>I looked for each key.</explanation>\n<answer>\n{doc['target']}\n</answer>"
        assert task.process_results(doc, [wrapped]) == {"acc": 1.0}
        other = task.eval_docs[(index + 1) % 200]
        assert task.process_results(doc, [other["target"]]) == {"acc": 0.0}


K = [f"key{i}aaaa-bbbbbbbb-cccccccc-dddddddd" for i in range(1, 5)]
V = [f"val{i}aaaa-11111111-22222222-3333333z" for i in range(1, 5)]
DOC = {"keys": K, "values": V}
LINES = [f"{i}. {k}: {v}" for i, (k, v) in enumerate(zip(K, V, strict=True), 1)]
ALL = "\n".join(LINES)
NOISE = noise(5, "abcdefghij0123456789-.:<>/ \n")

OUTPUTS = [
    # name, output, hand-derived share of the four
    ("plain lines", ALL, 1.0),
    ("tagged", f"<answer>\n{ALL}\n</answer>", 1.0),
    ("tags on the lines", f"<answer>{ALL}</answer>", 1.0),
    ("explanation first", f"<explanation>1. I read. 2. I found.</explanation><answer>{ALL}</answer>", 1.0),
    ("upper-case tags", f"<ANSWER>{ALL}</ANSWER>", 1.0),
    ("never closed", f"<explanation>So.</explanation>\n<answer>\n{ALL}", 1.0),
    ("cut off in the third value", f"<answer>\n{ALL}"[: len("<answer>\n") + ALL.index(V[2]) + 10], 0.5),
    ("only the closing tag", f"{ALL}\n</answer>", 1.0),
    ("text around", f"Here you are:\n<answer>\nThe values:\n{ALL}\nThat is all.\n</answer>\nBye.", 1.0),
    ("rambling after the answer", f"<answer>{ALL}</answer>\n<answer>\n1. {K[0]}: {V[1]}\n</answer>", 1.0),
    ("tags named in the explanation", f"I will write <answer> and </answer>.\n<answer>{ALL}</answer>", 1.0),
    ("open tag named in the explanation", f"Then comes <answer>: so <answer>\n{ALL}</answer>", 1.0),
    ("empty block, lines outside", f"<answer></answer>\n{ALL}", 0.0),  # the whole text counts only without tags
    ("nothing in the block, values explained", f"<explanation>{ALL}</explanation>\n<answer>none</answer>", 0.0),
    (
        "thought of another answer first",
        f"<think>\n<answer>1. {K[0]}: {V[1]}</answer>?\n</think>\n<answer>{ALL}</answer>",
        1.0,
    ),
    ("stray closing tag first", f"1. {K[0]}: {V[1]}</answer>\n<answer>{ALL}</answer>", 1.0),
    ("started over", f"<answer>\n1. {K[0]}: {V[1]}\nNo. Again:\n<answer>\n{ALL}\n</answer>", 1.0),
    ("wrong lines inside, right ones outside", f"{ALL}\n<answer>\n1. {K[0]}: {V[1]}\n</answer>", 0.0),
    ("values in upper case", "\n".join(f"{i + 1}. {K[i]}: {V[i].upper()}" for i in range(4)), 1.0),
    ("keys in upper case", "\n".join(f"{i + 1}. {K[i].upper()}: {V[i]}" for i in range(4)), 0.0),
    ("one key in upper case", "\n".join([f"1. {K[0].upper()}: {V[0]}", *LINES[1:]]), 0.75),
    ("1) style", "\n".join(f"{i + 1}) {K[i]}: {V[i]}" for i in range(4)), 1.0),
    ("(1) style", "\n".join(f"({i + 1}) {K[i]} - {V[i]}" for i in range(4)), 1.0),
    ("1: style", "\n".join(f"{i + 1}: {K[i]} = {V[i]}" for i in range(4)), 1.0),
    ("#1 style", "\n".join(f"#{i + 1} {K[i]} -> {V[i]}" for i in range(4)), 1.0),
    ("01. style", "\n".join(f"0{i + 1}. {K[i]}: {V[i]}" for i in range(4)), 1.0),
    ("bullets and bold", "\n".join(f"- **{i + 1}.** **{K[i]}**: `{V[i]}`" for i in range(4)), 1.0),
    ("double quotes", "\n".join(f'{i + 1}. "{K[i]}": "{V[i]}",' for i in range(4)), 1.0),
    ("curly quotes", "\n".join(f"{i + 1}. “{K[i]}”: “{V[i]}”." for i in range(4)), 1.0),
    ("table", "\n".join(f"| {i + 1} | {K[i]} | {V[i]} |" for i in range(4)), 1.0),
    ("labelled", "\n".join(f"{i + 1}. Key: {K[i]}, value: {V[i]}" for i in range(4)), 1.0),
    ("in words", "\n".join(f"{i + 1}. {K[i]} has the value {V[i]}." for i in range(4)), 1.0),
    ("all on one line", " ".join(LINES), 1.0),
    ("blank lines and indents", "\n\n".join(f"   {line}   " for line in LINES), 1.0),
    ("Windows line ends", ALL.replace("\n", "\r\n"), 1.0),
    ("lines in another order, numbers right", "\n".join(reversed(LINES)), 1.0),
    ("numbers swapped", f"2. {K[0]}: {V[0]}\n1. {K[1]}: {V[1]}\n{LINES[2]}\n{LINES[3]}", 0.5),
    ("values swapped", f"1. {K[0]}: {V[1]}\n2. {K[1]}: {V[0]}\n{LINES[2]}\n{LINES[3]}", 0.5),
    ("numbered from 0", "\n".join(f"{i}. {K[i]}: {V[i]}" for i in range(4)), 0.0),
    ("no numbers", "\n".join(f"{K[i]}: {V[i]}" for i in range(4)), 0.0),
    ("values only", "\n".join(f"{i + 1}. {V[i]}" for i in range(4)), 0.0),
    ("keys only", "\n".join(f"{i + 1}. {K[i]}" for i in range(4)), 0.0),
    ("first line only", LINES[0], 0.25),
    ("three of four", "\n".join([LINES[0], LINES[2], LINES[3]]), 0.75),
    ("duplicate, first is right", f"{ALL}\n1. {K[0]}: {V[1]}", 1.0),
    ("duplicate, first is wrong", f"1. {K[0]}: {V[1]}\n{ALL}", 0.75),
    ("same pair four times", "\n".join(f"{i}. {K[0]}: {V[0]}" for i in range(1, 5)), 0.25),
    ("value a character short", ALL.replace(V[1], V[1][:-1]), 0.75),
    ("value a character long", ALL.replace(V[1], V[1] + "q"), 0.75),
    ("value a group long", ALL.replace(V[1], V[1] + "-44444444"), 0.75),
    ("malformed value on a shared line", f"1. {K[0]}: oops 2. {K[1]}: {V[1]}", 0.25),
    ("value on the next line", f"1. {K[0]}:\n{V[0]}", 0.25),
    ("values on the next lines", "\n".join(f"{i + 1}. {K[i]}:\n{V[i]}" for i in range(4)), 1.0),
    ("keys and values on lines of their own", "\n\n".join(f"{i + 1}.\n{K[i]}\n{V[i]}" for i in range(4)), 1.0),
    ("in a sentence", "\n".join(f"{i + 1}. The value for {K[i]} is {V[i]}." for i in range(4)), 1.0),
    ("as in the list", "\n".join(f"{i + 1}. Stored under {K[i]}: {V[i]}." for i in range(4)), 1.0),
    ("sentences on one line", " ".join(f"{i + 1}. The value for {K[i]} is {V[i]}." for i in range(4)), 1.0),
    ("key 1, value 1", "\n".join(f"Key {i + 1}: {K[i]}\nValue {i + 1}: {V[i]}" for i in range(4)), 1.0),
    ("key 1, value 1 on a line", "\n".join(f"Key {i + 1}: {K[i]}, value {i + 1}: {V[i]}" for i in range(4)), 1.0),
    ("JSON", "\n".join(f'"{i + 1}": {{\n  "key": "{K[i]}",\n  "value": "{V[i]}"\n}},' for i in range(4)), 1.0),
    ("an explanation below", f"{ALL}\n\nI found them beside {V[0]} and {K[0]}.", 1.0),
    ("pair given twice on a line", ALL.replace(V[1], f"{V[1]} ({K[1]}: {V[1]})"), 1.0),
    ("a second value on a line", ALL.replace(V[1], f"{V[1]} or {V[0]}"), 0.75),
    ("or a second value below a blank line", ALL.replace(V[1], f"{V[1]}\n\n   or {V[0]}\n"), 0.75),
    ("numbers of keys in brackets", "\n".join(f"{i + 1}. {K[i]} (key {i + 1}): {V[i]}" for i in range(4)), 1.0),
    ("a second value in brackets", ALL.replace(V[1], f"{V[1]} ({V[0]})"), 0.75),
    ("a wrong value before the right one", ALL.replace(V[1], f"not {V[0]} but {V[1]}"), 0.75),
    ("a second value on the next line", f"1. {K[0]}:\n{V[0]}\n{V[1]}", 0.0),
    ("a bare number before a malformed key", f"3 {K[2]}: {V[2]}\n4 {K[3]}x: {V[3]}", 0.25),
    ("keys first, then the lines", "\n".join(f"{i + 1}. {K[i]}" for i in range(4)) + f"\n\n{ALL}", 1.0),
    ("empty", "", 0.0),
    ("blank", " \n\t ", 0.0),
    ("empty tags", "<answer></answer>", 0.0),
    ("refusal", "I could not find these keys.", 0.0),
    ("100 KB of noise", NOISE, 0.0),
    ("100 KB of noise, then the answer", f"{NOISE}\n<answer>{ALL}</answer>", 1.0),
    ("answer, then 100 KB of noise", f"<answer>{ALL}</answer>{NOISE}", 1.0),
    ("100 KB of opening tags", "<answer>" * 12_500, 0.0),
    ("100 KB of explanations that begin", "<explanation>" * 8_000, 0.0),
    ("100 KB of numbers", "1. " * 33_000, 0.0),
    ("100 KB of hyphens and digits", "1-" * 50_000, 0.0),
    ("100 KB of one key", f"1. {K[0]} " * 2_500, 0.0),
]


@pytest.mark.parametrize(("output", "share"), [row[1:] for row in OUTPUTS], ids=[row[0] for row in OUTPUTS])
def test_hand_written_outputs(output, share):
    start = time.process_time()
    assert Niah().score(DOC, output) == {"acc": share}
    assert time.process_time() - start < 1


def test_parse_returns_what_was_written():
    assert parse(f"<answer>3. {K[2]}: {V[0].upper()}</answer>") == {3: (K[2], V[0])}


# ----------------------------------------------------------------------------------------------------- sparsity, twins


def test_sparsity_is_a_metric_only_when_it_was_measured(lm):
    task = build(leaf(), lm, limit=1)
    doc = task.eval_docs[0]
    assert task.process_results(doc, [MeasuredText(doc["target"], {"sparsity": 0.5})]) == {"acc": 1.0, "sparsity": 0.5}
    assert task.process_results(doc, [MeasuredText(doc["target"], {})]) == {"acc": 1.0}
    twin = build(leaf("forced_frontier_niah_4k"), lm, limit=1)
    results = [MeasuredLoglikelihood(-1.0, True, {"sparsity": s}) for s in (0.5, 0.5, 0.7, 0.7)]
    assert twin.process_results(twin.eval_docs[0], results)["sparsity"] == pytest.approx(0.6)
    several = {"sparsity": None, "sparsities": {"kv_sparsity": 0.5, "decode_sparsity": 0.9}}
    both = task.process_results(doc, [MeasuredText(doc["target"], several)])
    assert both == {"acc": 1.0, "kv_sparsity": 0.5, "decode_sparsity": 0.9}
    names = {"acc", "sparsity", "prefill_sparsity", "kv_sparsity", "decode_sparsity"}
    assert names == set(task.aggregation()) == set(task.higher_is_better())


def test_twin_scores_by_hand(lm):
    twin = build(leaf("forced_frontier_niah_4k"), lm, limit=1)
    doc = twin.eval_docs[0]
    results = [(-7.0 * math.log(2), True), (-7.0 * math.log(2), False), (-14.0 * math.log(2), True), (0.0, False)]
    # 28 bits for four values of 35 characters
    assert twin.process_results(doc, results) == {"exact": 0.5, "bits_per_char": pytest.approx(28 / 140)}
    assert twin.higher_is_better()["bits_per_char"] is False


def test_twin_requests_share_the_prompt_and_force_the_gold_answer(lm):
    for chat in (False, True):
        twin = build(leaf("forced_frontier_niah_4k"), lm, chat=chat, limit=2)
        assert [(i.doc_id, i.idx, i.request_type) for i in twin.instances] == [
            (d, s, "loglikelihood") for d in range(2) for s in range(4)
        ]
        for instance in twin.instances:
            doc, slot = instance.doc, instance.idx
            context, continuation = instance.args
            assert isinstance(context, SharedPrompt)
            prompt, forced = context[: context.shared], context[context.shared :]
            assert lm.tokens(prompt) == doc["tokens"] == 4096
            assert prompt == twin.fewshot_context(
                doc, 0, apply_chat_template=chat, chat_template=lm.apply_chat_template if chat else None
            )
            assert continuation == f" {doc['values'][slot]}"
            lines = doc["target"].splitlines()
            assert forced + continuation == "\n".join(lines[: slot + 1])
            assert prompt.endswith("<|im_start|>assistant\n" if chat else "\n")


@pytest.mark.parametrize("kind", KINDS)
def test_each_slot_continues_the_one_before_in_tokens(kind):
    """So that one forward pass over the last slot scores all four."""
    tok, twin = tokenizer(kind), draft(forced=True)
    prompt = twin.message(3, "")
    ids = [tok.encode(prompt)]
    for forced, continuation in Niah().requests(twin.gold(3)):
        context, whole = tok.encode(prompt + forced), tok.encode(prompt + forced + continuation)
        assert whole[: len(context)] == context  # the continuation starts at a token of its own
        assert context[: len(ids[-1])] == ids[-1]  # and the slot where the one before ended
        ids.append(whole)
