"""Scores as properties: a right answer scores full however it is decorated, and whatever wrong is added to it costs.

What is right is known by construction; no expected value is asked of a parser.
"""

from __future__ import annotations

import random
import string
import time
from typing import Any

import pytest
from damage import examples
from hypothesis import assume, given
from hypothesis import strategies as st

from lm_eval_sparse.frontier import cwe, recipe, story

ITEMS = [f"{a} {m} {t}" for a in story.ADJECTIVES for m in story.MATERIALS for t in story.TYPES]
#: What a model may put around a name without saying anything else.
AROUND = [
    "{}", "**{}**", "*{}*", "`{}`", '"{}"', "'{}'", "“{}”", "„{}“", "«\u00a0{}\u00a0»", "「{}」", "_{}_", "__{}__",
    "[{}]", "<b>{}</b>", "<code>{}</code>", "$\\text{{{}}}$", "\\textbf{{{}}}", "{}.", "{}!", "\u200b{}\u200b",
    "\u3000{}  ",
]  # fmt: skip
#: Lines of a numbered list.
NUMBERED = [
    "{i}. {x}", "{i}) {x}", "({i}) {x}", "[{i}] {x}", "{i}: {x}", "{i} - {x}", "{i} – {x}", "#{i} {x}", "{i:02}. {x}",
    "{i}.{x}", "**{i}.** {x}", "**{i}. {x}**", "- {i}. {x}", "> {i}. {x}", "\t{i}.\t{x}", "| {i} | {x} |",
    '"{i}": "{x}",', "{i}\ufe0f\u20e3 {x}", "{i}．{x}", "{i}、{x}", "{i}.\n{x}", "{i}.\n\n   {x}", "<li>{i}. {x}</li>",
]  # fmt: skip
BLOCKS = [
    "<answer>{}</answer>", "<answer>\n{}\n</answer>", "<ANSWER>\n\n{}\n\n</ANSWER>\nI hope this helps.",
    "<answer>\n{}", "<answer>\n{}\n</ans", "<explanation>So.</explanation>\n<answer>\n```\n{}\n```\n</answer>",
    "I put it between <answer> and </answer>:\n<answer>\n{}\n</answer>",
    "<think>\n<answer>?</answer>\n</think>\n<answer>{}</answer>", "<answer>\n```text\n{}\n```",
]  # fmt: skip
ENDS = ["\n", "\r\n", "\n\n", "\r", "  \n", "\u2028"]
#: A right answer and one more: each costs as much as if it were given outright.
HEDGES = [
    "{r}, maybe {x}",
    "{r} and perhaps {x}",
    "{r} (and {x})",
    "{r} or {x}",
    "{r}\nor {x}",
    "{r}, possibly also {x}",
]
CASES = [str, str.lower, str.upper, str.title]

blocks, ends, cases = st.sampled_from(BLOCKS), st.sampled_from(ENDS), st.sampled_from(CASES)
around, numbered = st.sampled_from(AROUND), st.sampled_from(NUMBERED)
sources = st.integers(0, 2**32).map(random.Random)


def score(task: str, doc: dict[str, Any], text: str) -> float:
    (value,) = recipe(task).score(doc, text).values()
    return value


def listed(names: list[str], style: str, inner: str = "{}") -> str:
    return "\n".join(style.format(i=i, x=inner.format(name)) for i, name in enumerate(names, 1))


def placed(block: str, text: str, end: str = "\n") -> str:
    return block.format(text.replace("\n", end))


# ------------------------------------------------------------------------------------------------------------------ vt

names = st.lists(st.text(string.ascii_uppercase, min_size=5, max_size=5), min_size=40, max_size=40, unique=True)
JOINS = [", ", "\n", " ", "; ", " and ", ",", "/", "\n- ", "\n* ", "、", " → ", " & ", "\t"]
PROSE = [
    "The variables are {}, {}, {}, {} and {}.",
    "It is {} that holds the value. It goes on to {}, {}, {} and then {}.", "Answer: {}, {}, {}, {}, {}",
    "Final answer:\n{}\n{}\n{}\n{}\n{}", "VAR {} = 48213\nVAR {}\nVAR {}\nVAR {}\nVAR {}",
    "1. {}\n2. {}\n3. {}\n4. {}\n5. {}", '{{"variables": ["{}", "{}", "{}", "{}", "{}"]}}',
    "Sure! Here they are: {} {} {} {} {}", "{} (assigned directly), {} (a copy), {}, {} and {}.",
    "- {}: 48213\n- {}: 48213\n- {}: 48213\n- {}: 48213\n- {}: 48213",
    "| Step | Variable | How |\n|---|---|---|\n| 1 | {} | direct |\n| 2 | {} | copy |"
    "\n| 3 | {} | |\n| 4 | {} | |\n| 5 | {} | |",
    "\\boxed{{{}, {}, {}, {}, {}}}", "{} - the number is assigned to it\n{} - copies it\n{} - likewise\n{}\n{}",
]  # fmt: skip


def chains(variables: list[str]) -> dict[str, Any]:
    return {"names": variables[:5], "value": "48213", "variables": sorted(variables)}


@examples(120)
@given(names, sources, st.sampled_from(JOINS), around, cases, st.sampled_from(["{}", *BLOCKS]), st.integers(0, 4))
def test_vt_lists(variables, source, join, inner, case, block, added):
    """Each further name, of the document or invented, of any length and case, adds to the union."""
    doc = chains(variables)
    invented = ["".join(source.choices("QXZJKVW", k=source.choice([2, 3, 4, 6, 7, 9]))) for _ in range(4)]
    invented[0] = source.choice([invented[0].lower(), invented[0].title(), invented[0], source.choice(variables[5:])])
    wrong = set(map(str.upper, invented[:added]))
    given_ones = [*map(case, doc["names"]), *invented[:added]]
    source.shuffle(given_ones)
    text = placed(block, join.join(inner.format(name) for name in given_ones))
    expected = 5 / (5 + len(wrong))
    assert score("vt", doc, text) == pytest.approx(expected)
    right = join.join(map(case, doc["names"]))
    assert score("vt", doc, placed(block, right)) == 1
    hedged = source.choice(HEDGES).format(r=right, x=invented[0])
    tags = block if "<" in block else "<answer>{}</answer>"
    assert score("vt", doc, placed(tags, hedged)) == pytest.approx(5 / 6)


@examples(100)
@given(names, sources, st.sampled_from(PROSE), st.sampled_from(["{}", *BLOCKS]), st.integers(0, 3))
def test_vt_in_words(variables, source, words, block, wrong):
    doc = chains(variables)
    assume(not {"ASSIGN", "VALUE", "STEPS", "COPY", "IT"} & set(variables))
    right = source.sample(doc["names"], 5)
    assert score("vt", doc, placed(block, words.format(*right))) == 1
    others = ["".join(source.choices("QXZJKVW", k=source.choice([3, 4, 6, 8]))) for _ in range(wrong)]
    text = placed(block, words.format(*right[wrong:], *others))
    assert score("vt", doc, text) == pytest.approx((5 - wrong) / (5 + len(set(others))))


# ----------------------------------------------------------------------------------------------------------------- cwe

pool_words = st.lists(st.sampled_from(cwe.pool()), min_size=20, max_size=20, unique=True)
SAID = [
    "",
    " (30 times)",
    ": 30",
    " - thirty times",
    " — very common",
    ", which occurs 30 times",
    " appears 30 times",
    "\t30",
]


@examples(120)
@given(pool_words, sources, numbered, around, cases, blocks, ends, st.sampled_from(SAID))
def test_cwe(words, source, style, inner, case, block, end, said):
    doc = {"words": words[:10], "rare": words[10:]}
    assume(not any(" " in word or "word" in word for word in words))
    right = source.sample(words[:10], 10)
    text = listed([inner.format(case(word)) + said for word in right], style)
    assert score("cwe", doc, placed(block, text, end)) == 1
    further = source.choice(
        ["{r} {x}", "{r}, {x}", "{r}/{x}", "{r}; {x}", "{r}: {x}", "{r} - {x}", "{r} -> {x}", "{r}\n{x}", *HEDGES]
    )
    at = source.randrange(10)
    assume(words[10] not in cwe._NOTE | cwe._HEDGES)
    decoys = [further.format(r=word, x=words[10]) if i == at else word for i, word in enumerate(right)]
    pair = f"{right[at]} {words[10]}" in cwe.pool()
    assert score("cwe", doc, placed(block, listed(decoys, style), end)) == pytest.approx(9 / 11 if pair else 10 / 11)
    assert score("cwe", doc, placed(block, listed([*right, *words[10:13]], style), end)) == pytest.approx(10 / 13)
    assert score("cwe", doc, text) == 0  # no tags
    assert score("cwe", doc, placed(block, "\n".join(right), end)) == 0  # no numbers


# ---------------------------------------------------------------------------------------------------------------- niah

codes = st.integers(0, 2**64).map(
    lambda seed: "-".join(
        "".join(random.Random(seed * 4 + i).choices(string.ascii_lowercase + string.digits, k=8)) for i in range(4)
    )
)
PAIRS = [
    "{k}: {v}", "{k} -> {v}", "{k} = {v}", "{k} — {v}", "{k}\n{v}", "{k}:\n   {v}", "{k} | {v}",
    "The value for {k} is {v}.", "Stored under {k}: {v}.", "Key: {k}, value: {v}", "Key: {k}\n   - Value: {v}",
    "**{k}**: `{v}`", "“{k}”: “{v}”", "_{k}_: _{v}_", "$\\text{{{k}}}$: $\\text{{{v}}}$",
    "{k}: {v} (found under {k})", '{{"key": "{k}", "value": "{v}"}},', "For {k}, {v} {v}",
]  # fmt: skip


@examples(120)
@given(
    st.lists(codes, min_size=10, max_size=10, unique=True), sources, numbered, st.sampled_from(PAIRS), ends,
    st.sampled_from(["{}", "Here are the 4 values:\n{}", *BLOCKS]), st.sampled_from(["-", "\u2011", "\u2010"]),
)  # fmt: skip
def test_niah(drawn, source, style, pair, end, block, hyphen):
    doc = {"keys": drawn[:4], "values": drawn[4:8]}
    lines = [pair.format(k=k, v=source.choice([v, v.upper()])) for k, v in zip(drawn[:4], drawn[4:8], strict=True)]
    text = listed(lines, style)
    text = "\n\n".join(reversed(text.split("\n"))) if text.count("\n") == 3 and source.random() < 0.5 else text
    assert score("niah", doc, placed(block, text.replace("-", hyphen) if "- " not in text else text, end)) == 1
    at = source.randrange(4)

    def changed(line: str) -> float:
        return score("niah", doc, placed(block, listed([*lines[:at], line, *lines[at + 1 :]], style), end))

    wrong, k, v = drawn[8], drawn[at], drawn[4 + at]
    for line in (
        f"{lines[at]} {wrong}", pair.format(k=k, v=wrong), pair.format(k=wrong, v=v), pair.format(k=f"{k}x", v=v),
        *(hedge.format(r=lines[at], x=wrong) for hedge in HEDGES), f"{lines[at]}\n\n  or {wrong}",
        pair.format(k=k, v=f"{wrong} or {v}"), pair.format(k=k, v=v[:-1]), pair.format(k=v, v=k), k,
    ):  # fmt: skip
        assert changed(line) == 0.75
    assert (
        score("niah", doc, placed(block, listed([*lines, f"{wrong}: {drawn[9]}"], style), end)) == 1
    )  # of no question
    assert score("niah", doc, placed(block, text.replace(k, wrong), end)) == 0.75


# ------------------------------------------------------------------------------------------------------------- stories

values = st.lists(st.sampled_from([*story.PLACES, *story.CHARACTERS, *ITEMS]), min_size=8, max_size=16, unique=True)
LABELS = [
    "{} (Chapter 7)", "{}, Chapter 7", "{} - Chapter 7", "{} (item)", "The item is the {}.", "place {}",
    "{}", "the {}", "A {}", "Chapter 7: {}", "Chapter 12, item: {}", "**Place:** {}", "Answer: {}", "Chapter 7 - {}",
    "{}, {}", "Chapter 3: which character did Nora meet? {}",
    "Chapter 3: which item did Nora acquire?\n   Answer: {}", "Item acquired: the {}",
]  # fmt: skip


@examples(120)
@given(
    values, sources, numbered, around, cases, ends, st.sampled_from(LABELS),
    st.sampled_from(["{}", "Here are the answers:\n\n{}\n\nThat is all.", *BLOCKS]),
)  # fmt: skip
def test_story_retrieval(right, source, style, inner, case, end, label, block):
    doc = {"values": right}
    assume(style.count("\n") + label.count("\n") < 2)  # a number alone, and then the question alone
    lines = [label.format(*[inner.format(case(value))] * 2) for value in right]
    assert score("story_retrieval", doc, placed(block, listed(lines, style), end)) == 1
    at = source.randrange(len(right))
    name = right[at]
    others = [value for value in right if value != name]
    for wrong in (
        f"{name}, {others[0]}",
        f"{name} or {others[0]}",
        f"{others[0]} {name}",
        others[0],
        f"{name} x",
        f"x: {name}",
        *(hedge.format(r=name, x=others[0]) for hedge in HEDGES if "\n" not in hedge),
    ):
        text = listed([*lines[:at], label.format(wrong, wrong), *lines[at + 1 :]], style)
        assert score("story_retrieval", doc, placed(block, text, end)) == pytest.approx(1 - 1 / len(right))
    again = f"{listed(lines, style)}\n{at + 1}. {others[0]}"  # the first line of a number counts
    if "\n" not in label:
        assert score("story_retrieval", doc, placed(block, again, end)) == 1


HOPS = [
    "{}", "The {}.", "Item: {}", "Item:\n{}", "**Answer:**\n\n{}", "1. {}", "- {}", "{}\n{}", '{{"item": "{}"}}',
    "Here is the item:\n{}", "The item acquired last before the tiny tin spoon is:\n{}",
    "Acquired last before the tiny tin spoon: {}", "{}\n\nI hope this helps.",
    "{}\n\nShe bought it in chapter 4, just before the tiny tin spoon.",
    "The item Nora acquired last before the tiny tin spoon: the {}",
    "Which item did Nora acquire last before she acquired the tiny tin spoon?\n{}", "Final answer: {}",
]  # fmt: skip


@examples(120)
@given(st.sampled_from(ITEMS), st.sampled_from(ITEMS), sources, st.sampled_from(HOPS), around, cases, blocks, ends)
def test_story_multihop(value, other, source, way, inner, case, block, end):
    doc = {"value": value, "item": "tiny tin spoon"}
    assume(len({value, other, doc["item"]}) == 3)
    shown = inner.format(case(value))
    text = way.format(*[shown] * 2)
    assert score("story_multihop", doc, placed(block, text, end)) == 1
    broken = way.format(*[shown.replace(" ", "\n", source.choice([1, 2]))] * 2)
    if inner == "{}" and "{}\n{}" not in way:
        assert score("story_multihop", doc, placed(block, broken, end)) == 1
    for wrong in (
        f"{text}\n{other}", f"{other}\n{text}", f"{text}\n- {other}\n- tiny tin spoon", way.format(*[other] * 2),
        way.format(*[f"{value}, {other}"] * 2), way.format(*[f"{value} {other}"] * 2), f"{text}\nshiny plastic knob",
        *(hedge.format(r=shown, x=f"the {source.choice([other, 'gold ring'])}") for hedge in HEDGES),
        f"{text}\nWait, it is the silver mirror.",
        f"{text}\nIt could be the {other} as well.",
        way.format(*[f"{value} or tiny tin spoon"] * 2),
    ):  # fmt: skip
        assert score("story_multihop", doc, placed(block, wrong, end)) == 0
    assert score("story_multihop", doc, text) == 0  # no tags


CHAPTERS = [
    "{}, {}, {}", "{} and {} and {}", "[{}, {}, {}]", '{{"chapters": [{}, {}, {}]}}', "Chapters {}, {} and {}.",
    "Chapter {}, {}, {}", "Chapter {}: 0 items\nChapter {}: 0 items\nChapter {}: 0 items",
    "Chapter {} (of 40), Chapter {}, Chapter {}", "{}: 0\n{}: 0\n{}: 0",
    "Chapter {} - nothing bought, 1 item sold\nChapter {}\nChapter {}",
    "**Chapter {}**\n\n**Chapter {}**\n\n**Chapter {}**", "1. {}\n2. {}\n3. {}",
    "1. Chapter {}\n2. Chapter {}\n3. Chapter {}", "1) {}, 2) {}, 3) {}", '{{"1": {}, "2": {}, "3": {}}}',
    "| Chapter | Items |\n|---|---|\n| {} | 0 |\n| {} | 0 |\n| {} | 0 |",
    "| # | Chapter |\n|---|---|\n| 1 | {} |\n| 2 | {} |\n| 3 | {} |", "The 3 chapters are {}, {} and {}.",
    "\\boxed{{{}, {}, {}}}", "Chapter {} has 0 purchases, {} has none, and {} has none.", "`{}`, `{}`, `{}`",
    "{}\n{}\n{}\n\nTotal: 3", "Of the 40 chapters, chapters {}, {} and {} have 0 purchases.", "（{}，{}，{}）",
    "- Ch. {} (Nora sold 1 item)\n- Ch. {}\n- Ch. {}", "<li>Chapter {}</li><li>Chapter {}</li><li>Chapter {}</li>",
]  # fmt: skip


@examples(150)
@given(st.sets(st.integers(1, 39), min_size=5, max_size=6), sources, st.sampled_from(CHAPTERS), blocks, ends, cases)
def test_story_filtering(numbers, source, way, block, end, case):
    three, *others = [sorted(numbers)[:3], *sorted(numbers)[3:]]
    doc = {"numbers": three, "chapters": 39}
    shown = source.sample(three, 3)
    # "1: 0, 2: 0, 3: 0" is a list of zeros
    assume(not (way.startswith("{}:") and shown == [1, 2, 3]))
    text = case(way.format(*shown)) if "\\" not in way else way.format(*shown)
    assert score("story_filtering", doc, placed(block, text, end)) == 1
    for more in (f"\nChapter {others[0]}", f"\n{others[0]}" if "1. " not in way else f"\n4. {others[0]}"):
        assert score("story_filtering", doc, placed(block, text + more, end)) == pytest.approx(3 / 4)
    for hedge in HEDGES if "|" not in way else []:  # of a table one column counts
        hedged = hedge.format(r=text, x=others[0])
        assert score("story_filtering", doc, placed(block, hedged, end)) == pytest.approx(3 / 4)
    if way.startswith(("{},", "Chapter {},", "[", "`")):
        joined = way.rstrip("]`{}") and f"{others[0]}, {others[1]}, {text}"
        assert score("story_filtering", doc, placed(block, joined, end)) == pytest.approx(3 / 5)
    swapped = way.format(*shown[:2], others[0])
    assert score("story_filtering", doc, placed(block, swapped, end)) == pytest.approx(2 / 4)
    assert score("story_filtering", doc, text) == 0  # no tags


# ------------------------------------------------------------------------------------------------------------------ qa

plain_words = st.text(string.ascii_lowercase, min_size=3, max_size=8).filter(
    lambda word: word not in ("the", "and", "about")
)


@examples(100)
@given(st.lists(plain_words, min_size=2, max_size=5, unique=True), sources, around, cases, blocks, ends)
def test_squad(drawn, source, inner, case, block, end):
    *reference, wrong = drawn
    assume("answer" not in reference)
    doc = {"references": ["something else", " ".join(reference)]}
    assume(not {"something", "else"} & set(drawn))
    shown = source.choice(["{}", "the {}", "{} {}", "Answer: {}", "**The answer is:** {}"]).format(
        *[inner.format(case(" ".join(reference)))] * 2
    )
    assert score("squad", doc, placed(block, shown, end)) == 1
    assert score("squad", doc, placed(block, shown.replace(" ", "\n"), end)) == 1
    count = len(reference)
    assert score("squad", doc, placed(block, f"{shown} {wrong}", end)) == pytest.approx(
        round(2 * count / (2 * count + 1), 2)
    )
    assert score("squad", doc, placed(block, wrong, end)) == 0


LETTERS = [
    "{}",
    "{}.",
    "({})",
    "[{}]",
    "**{}**",
    "`{}`",
    "“{}”",
    "$\\boxed{{{}}}$",
    "<b>{}</b>",
    "\u200b{}",
    "{}\ufe0f",
]
OPTIONS = ["sign up early", "many dogs", "vitamin pills", "none of these"]


@examples(120)
@given(
    st.sets(st.sampled_from("ABCD"), min_size=1, max_size=3), sources, st.sampled_from(LETTERS),
    st.sampled_from([
        "{}", "Answer: {}", "**Final answer:**\n{}", "The answer is {}", "Options: {}", "The correct answers are {}",
    ]),  # fmt: skip
    st.sampled_from([", ", "\n", " and ", "; ", " & ", "\n- ", "/"]), blocks, ends,
)  # fmt: skip
def test_choices(right, source, inner, around_all, between, block, end):
    doc = {"options": OPTIONS, "letters": sorted(right)}
    order = source.sample(sorted(right), len(right))

    def written(letters: list[str], style: str = "{}") -> str:
        return placed(
            block, around_all.format(between.join(inner.format(style.format(letter)) for letter in letters)), end
        )

    wrong = source.choice(sorted(set("ABCD") - right))
    for task in ("quality", "toefl"):
        assert score(task, doc, written(order)) == 1
        assert score(task, doc, written([*order, order[0]])) == 1  # given twice
        for letters in ([*order, wrong], [wrong, *order], [wrong, *order[1:]]):
            assert score(task, doc, written(letters)) == 0
        for hedge in HEDGES:
            assert (
                score(task, doc, placed(block, hedge.format(r=around_all.format(between.join(order)), x=wrong), end))
                == 0
            )
        texts = [f"{letter}. {OPTIONS['ABCD'.index(letter)]}" for letter in order]
        assert score(task, doc, placed(block, "\n".join(texts), end)) == 1
        assert score(task, doc, placed(block, "\n".join([*texts, f"{wrong}. it"]), end)) == 0


# -------------------------------------------------------------------------------------------------------- every parser

_variables = ["".join(random.Random(i).choices(string.ascii_uppercase, k=5)) for i in range(40)]
_codes = ["-".join(["".join(random.Random(i).choices(string.ascii_lowercase, k=8))] * 4) for i in range(8)]
DOCS: dict[str, dict[str, Any]] = {
    "niah": {"keys": _codes[:4], "values": _codes[4:]},
    "vt": chains(_variables),
    "cwe": {"words": list(cwe.pool()[:10]), "rare": []},
    "squad": {"references": ["the Rhine river"]},
    "quality": {"options": OPTIONS, "letters": ["B"]},
    "toefl": {"options": OPTIONS, "letters": ["A", "C"]},
    "story_retrieval": {"values": [*story.CHARACTERS[:8], *ITEMS[:8]]},
    "story_multihop": {"value": ITEMS[0], "item": ITEMS[1]},
    "story_filtering": {"numbers": [3, 17, 25], "chapters": 30},
}
odd_text = st.text(max_size=60) | st.text("0123456789.,:;()[]{}<>/|*_`#-–—\\ \n\tchapterANSWERitem'\"“”&=", max_size=80)


@pytest.mark.parametrize("task", DOCS)
def test_any_text_can_be_scored(task):
    @examples(60)
    @given(odd_text, st.sampled_from(["{}", *BLOCKS]))
    def check(text: str, block: str) -> None:
        assert 0 <= score(task, DOCS[task], block.replace("{}", text)) <= 1

    check()


@pytest.mark.parametrize("unit", ["1. ", "chapter 3, ", "the ", "item: ", "1\n", "(a ", "<b", "| 1 | "])
def test_long_answers_are_read_in_no_time(unit):
    """What takes time that grows with the square of a text takes many seconds here."""
    for task in DOCS:
        begun = time.process_time()
        score(task, DOCS[task], f"<answer>1. {unit * (30_000 // len(unit))}")
        assert time.process_time() - begun < 1


@pytest.mark.parametrize("task", ["niah", "vt", "cwe", "story_retrieval", "story_multihop", "story_filtering"])
def test_the_prompt_read_back_is_no_answer(task):
    for index in range(5):
        draft = recipe(task).draft(4096, 0, index, False)
        message, doc = draft.message(30, ""), draft.gold(30)
        before = message[: message.context[1]]
        for text in (before, f"<answer>\n{before}\n</answer>", f"<answer>{message.tail}"):
            # nor are all words, or all chapters
            assert score(task, doc, text) <= 0.25
        assert score(task, doc, f"<explanation>So.</explanation>\n<answer>\n{doc['target']}\n</answer>") == 1
