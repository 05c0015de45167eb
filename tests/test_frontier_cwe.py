"""CWE: words counted in the prompts by an independent reader, and answers scored by hand."""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import wonderwords
from frontier_common import StandIn, build, leaf, noise

from lm_eval_sparse.frontier import cwe
from lm_eval_sparse.frontier.cwe import Cwe
from lm_eval_sparse.protocol import set_active_lm

ASSETS = Path(wonderwords.__file__).parent / "assets"
ENTRY = re.compile(r"^([0-9]+)\. (.+)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path))


@pytest.fixture
def lm():
    model = StandIn("digits")
    set_active_lm(model)
    return model


def draft(index: int = 0, forced: bool = False, length: int = 4096, seed: int = 0):
    return Cwe().draft(length, seed, index, forced)


def listed(text: str) -> list[tuple[int, str]]:
    """(number, word) of every entry of the list, which the first blank line after its start ends."""
    start = text.index("\n1. ") + 1
    return [(int(number), word) for number, word in ENTRY.findall(text[start : text.index("\n\n", start)])]


@pytest.fixture(scope="module")
def word_list() -> set[str]:
    found = set()
    for name in ("noun", "adjective", "verb"):
        for line in (ASSETS / f"{name}list.txt").read_text(encoding="utf-8").split("\n"):
            found.add(line.strip().lower())
    return {word for word in found if word and "-" not in word}


# --------------------------------------------------------------------------------------------------------- documents


def test_the_pool_is_the_word_list_of_the_package(word_list):
    assert abs(len(word_list) - 8_063) < 60  # of 2.2.0; later releases differ by a few words
    assert set(cwe.pool()) == word_list and len(cwe.pool()) == len(word_list)
    for word in word_list:
        assert cwe.parse(f"1. {word}") == ({word}, set())  # every word can be answered


def test_two_hundred_documents_are_built_as_the_paper_says(word_list):
    places, rare_places, common_words, in_order = [], [], Counter(), 0
    for index in range(200):
        units = 25 + index % 7
        one = draft(index, forced=bool(index % 2))
        text, gold = one.message(units, ""), one.gold(units)
        entries = listed(text)
        total = 10 * 30 + units * 3
        assert [number for number, _ in entries] == list(range(1, total + 1))
        counts = Counter(word for _, word in entries)
        assert sorted(counts.values()) == [3] * units + [30] * 10
        common = {word for word, times in counts.items() if times == 30}
        assert set(gold["words"]) == common and len(gold["words"]) == 10
        assert len(gold["rare"]) == len(set(gold["rare"])) == 10
        assert all(counts[word] == 3 for word in gold["rare"])
        assert gold["distinct"] == len(counts) == 10 + units
        assert set(counts) <= word_list and all(word == word.lower() and "-" not in word for word in counts)
        assert sorted(line.split(". ", 1)[1] for line in gold["target"].splitlines()) == sorted(common)
        if index % 2:  # where the twin's words stand is another test's
            continue
        words = [word for _, word in entries]
        places += [i / (total - 1) for i, word in enumerate(words) if word in common]
        rare_places += [i / (total - 1) for i, word in enumerate(words) if word not in common]
        in_order += sum(a == b for a, b in zip(words, words[1:], strict=False))
        common_words.update(common)
    assert abs(statistics.fmean(places) - 0.5) < 4 * (1 / 12 / 30_000) ** 0.5
    assert abs(statistics.fmean(rare_places) - 0.5) < 4 * (1 / 12 / len(rare_places)) ** 0.5
    # Neighbours are equal as often as in a shuffle: 10 · 30 · 29 + 28 · 3 · 2 ordered pairs of about 384 · 383.
    assert abs(in_order / 100 - 384 * (8700 + 168) / (384 * 383)) < 2.1
    assert 880 < len(common_words) <= 1_000  # 1,000 draws from 8,059: 940 distinct ones expected


def test_a_local_window_sees_the_twins_rare_words_as_often_as_the_common_ones():
    """Else attention that sees nothing but the last part of the list ranks the words, and better the less it sees."""
    for units in (10, 151, 600):
        seen = {(kind, share): 0 for kind in ("words", "rare") for share in (0.02, 0.05, 0.1)}
        for index in range(60):
            one = draft(index, forced=True)
            words, gold = [word for _, word in listed(one.message(units, ""))], one.gold(units)
            for kind, share in seen:
                window = words[-round(share * len(words)) :]
                seen[kind, share] += sum(window.count(word) for word in gold[kind])
        for share in (0.02, 0.05, 0.1):
            common, rare = seen["words", share], seen["rare", share]
            assert abs(common - rare) < 5 * (common + rare) ** 0.5, (units, share)


def test_the_question_states_both_frequencies_before_and_after_the_list():
    for forced in (False, True):
        text = draft(0, forced).message(20, "")
        start, end = text.index("\n1. "), text.index("\n360. ")
        before, after = text[:start], text[end + 1 :].partition("\n")[2]
        (question,) = [
            line for line in before.splitlines() if line.endswith("words are the most common in the list?")
        ] or [line for line in before.splitlines() if "?" in line]
        assert re.search(r"\b30 times\b", question) and re.search(r"\b3 times\b", question)
        assert re.search(r"\b10 (common )?words\b", question)
        assert after.count(question) == 1 and before.count(question) == 1
        assert "twice" in before
        if forced:
            assert "<answer>" not in text
        else:
            assert after.index(question) < after.index("<explanation>") < after.index("<answer>")


def test_common_words_are_not_named_outside_the_list():
    for index in range(30):
        one = draft(index)
        text = one.message(20, "")
        outside = text.replace("\n".join(f"{i}. {w}" for i, w in listed(text)), "")
        shared = set(one.words) & set(re.findall(r"\w+", outside.lower()))
        assert not shared or len(shared) == 1  # "list" and "word" are words of the pool, too


@pytest.mark.parametrize("forced", [False, True])
def test_with_k_units_there_are_ten_and_k_words_and_each_list_is_in_the_next(forced):
    one = draft(5, forced)
    previous: list[str] = []
    sizes = [0, 1, 2, 3, 10, 11, 100, 1000, one.most]
    for units in sizes:
        text = one.message(units, "")
        words = [word for _, word in listed(text)]
        assert len(set(words)) == 10 + units and len(words) == 300 + 3 * units
        late = set(one.gold(1000)["rare"]) if forced else set()
        words = [word for word in words if word not in late]  # the others make way for them
        rest = iter(words)
        assert all(word in rest for word in previous)  # the same order
        previous = words
        assert one.gold(units)["rare"] == one.gold(1000)["rare"][: min(units, 10)]
        assert draft(5, forced).message(units, "") == text
        filled = one.message(units, "A line of no use.")
        assert listed(filled) == listed(text) and filled.count("A line of no use.") == 1
    assert one.most == len(cwe.pool()) - 10
    assert len(one.message(7, "")) < len(one.message(8, ""))  # asked again after more


def test_the_rare_words_of_the_twin_are_random(word_list):
    seen, firsts = set(), 0
    order = sorted(word_list)
    for index in range(100):
        rare = draft(index).gold(50)["rare"]
        seen |= set(rare)
        firsts += statistics.fmean(map(order.index, rare)) / len(order)
    assert len(seen) > 850 and abs(firsts / 100 - 0.5) < 4 * (1 / 12 / 1000) ** 0.5


def test_the_twin_has_the_same_words_and_ten_rare_ones_against_them(lm):
    one, twin = build(leaf("frontier_cwe_4k"), lm, limit=2), build(leaf("forced_frontier_cwe_4k"), lm, limit=2)
    for (_, doc), (_, forced) in zip(one.doc_iterator(limit=2), twin.doc_iterator(limit=2), strict=True):
        assert set(doc["words"]) == set(forced["words"]) and doc["rare"] == forced["rare"]
        lists = ([w for _, w in listed(d["input"]) if w not in doc["rare"]] for d in (doc, forced))
        few, many = sorted(lists, key=len)
        rest = iter(many)
        assert all(word in rest for word in few)
    asked = [i.args for i in twin.instances if i.doc_id == 0]
    counts = Counter(word for _, word in listed(twin.eval_docs[0]["input"]))
    continuations = [continuation for _, continuation in asked]
    assert Counter(counts[c.removeprefix(" ")] for c in continuations) == {30: 10, 3: 10}
    assert continuations == sorted(continuations)  # so that position tells nothing
    assert {context[context.shared :] for context, _ in asked} == {"1."}


def test_seed_index_and_length_each_change_the_document():
    texts = {
        draft(index, length=length, seed=seed).message(2, "")
        for length, seed, index in product((4096, 8192), (0, 1), (0, 1))
    }
    assert len(texts) == 8


def test_another_word_list_is_another_identity_and_another_cache_file(lm, tmp_path, monkeypatch):
    build(leaf("frontier_cwe_4k"), lm, limit=1)
    before, files = Cwe().identity(), set((tmp_path / "docs").iterdir())
    assert before == Cwe().identity() and len(files) == 1
    words = list(cwe.pool())
    for changed in (words[:-1], [*words[:-1], "zzzzz"]):
        monkeypatch.setattr(cwe, "pool", lambda changed=changed: tuple(changed))
        assert Cwe().identity() != before
        build(leaf("frontier_cwe_4k"), lm, limit=1)
        now = set((tmp_path / "docs").iterdir())
        assert len(now) == len(files) + 1
        files = now
    monkeypatch.setattr(cwe, "pool", lambda: tuple(words))
    build(leaf("frontier_cwe_4k"), lm, limit=1)
    assert set((tmp_path / "docs").iterdir()) == files


def test_the_gold_answer_scores_one_for_two_hundred_documents(lm):
    task = build(leaf("frontier_cwe_4k", samples=20), lm, limit=20)
    docs = [doc for _, doc in task.doc_iterator(limit=20)]
    for index in range(20, 200):  # the others of a fixed size, which is much faster
        one = draft(index)
        docs.append({**one.gold(30), "input": one.message(30, "")})
    for doc, other in zip(docs, [*docs[1:], docs[0]], strict=True):
        counts = Counter(word for _, word in listed(doc["input"]))
        common = [word for word, _ in counts.most_common(10)]
        rare = [word for word, _ in counts.most_common()[10:20]]

        def answer(words):
            return "<answer>\n" + "\n".join(f"{i}. {w}" for i, w in enumerate(words, 1)) + "\n</answer>"

        assert task.process_results(doc, [answer(common)]) == {"iou": 1.0}
        assert task.process_results(doc, [f"<answer>\n{doc['target']}\n</answer>"]) == {"iou": 1.0}
        assert task.process_results(doc, [answer(rare)]) == {"iou": 0.0}
        assert task.process_results(doc, [answer([*common[:5], *rare[:5]])]) == {"iou": 5 / 15}
        shared = len(set(other["words"]) & set(common))
        assert task.process_results(doc, [answer(other["words"])]) == {"iou": shared / (20 - shared)}


# ----------------------------------------------------------------------------------------------------------- scoring

G = ["apple", "river", "cloudy", "walk", "jalapeño", "dust storm", "tower", "gentle", "answer", "zoo"]
DOC = {"words": G, "rare": [f"rare{chr(97 + i)}" for i in range(10)]}


def lines(style: str = "{i}. {w}", words=G, between: str = "\n") -> str:
    return between.join(style.format(i=i, w=w, W=w.upper()) for i, w in enumerate(words, 1))


def tagged(text: str) -> str:
    return f"<answer>\n{text}\n</answer>"


LETTERS = noise(4, "abcdefghijklmnopqrstuvwxyz ,:-()[]\n")
DIGITS = noise(4, "0123456789 \n")

OUTPUTS = [
    # name, output, words both given and gold, words in either: worked out by hand
    ("as asked", f"<explanation>I counted.</explanation>\n{tagged(lines())}", 10, 10),
    ("only the answer", tagged(lines()), 10, 10),
    ("tags on the lines", f"<answer>{lines()}</answer>", 10, 10),
    ("no tags", lines(), 0, 10),
    ("only a closing tag", f"{lines()}\n</answer>", 0, 10),
    ("only an opening tag", f"<answer>\n{lines()}", 10, 10),
    ("upper-case tags", f"<ANSWER>\n{lines()}\n</ANSWER>", 10, 10),
    ("doubled tags", f"<answer><answer>{lines()}</answer></answer>", 10, 10),
    ("cut off after seven", f"<answer>\n{lines(words=G[:7])}\n8.", 7, 10),
    ("cut off within the eighth", f"<answer>\n{lines(words=G[:7])}\n8. gent", 7, 11),
    ("two blocks, first right", tagged(lines()) + tagged("1. bread"), 10, 10),
    ("two blocks, first wrong", tagged("1. bread") + tagged(lines()), 0, 11),
    ("empty block first", "<answer></answer>" + tagged(lines()), 10, 10),
    ("block without numbers first", tagged("these are the words") + tagged(lines()), 10, 10),
    ("empty block, lines outside", f"<answer></answer>\n{lines()}", 0, 10),
    ("explanation with numbered lines", f"<explanation>\n1. bread\n</explanation>{tagged(lines())}", 10, 10),
    ("tag named in the explanation", f"Then comes <answer>, so:\n{tagged(lines())}", 10, 10),
    ("text after the block", f"{tagged(lines())}\n11. bread", 10, 10),
    ("prose before the lines", tagged(f"Here are the words:\n{lines()}"), 10, 10),
    ("upper case", tagged(lines("{i}. {W}")), 10, 10),
    ("title case", tagged(lines().title()), 10, 10),
    ("1) style", tagged(lines("{i}) {w}")), 10, 10),
    ("(1) style", tagged(lines("({i}) {w}")), 10, 10),
    ("[1] style", tagged(lines("[{i}] {w}")), 10, 10),
    ("1: style", tagged(lines("{i}: {w}")), 10, 10),
    ("1 - style", tagged(lines("{i} - {w}")), 10, 10),
    ("#1: style", tagged(lines("#{i}: {w}")), 10, 10),
    ("01. style", tagged(lines("{i:02}. {w}")), 10, 10),
    ("no blank after the point", tagged(lines("{i}.{w}")), 10, 10),
    ("many blanks and indents", tagged(lines("    {i}.   {w}  ")), 10, 10),
    ("tab after the point", tagged(lines("{i}.\t{w}")), 10, 10),
    ("no-break space after the point", tagged(lines("{i}.\u00a0{w}")), 10, 10),
    ("bold words", tagged(lines("{i}. **{w}**")), 10, 10),
    ("bold numbers", tagged(lines("**{i}.** {w}")), 10, 10),
    ("bold lines", tagged(lines("**{i}. {w}**")), 10, 10),
    ("bullets before numbers", tagged(lines("- {i}. {w}")), 10, 10),
    ("double quotes", tagged(lines('{i}. "{w}"')), 10, 10),
    ("single quotes", tagged(lines("{i}. '{w}'")), 10, 10),
    ("curly quotes", tagged(lines("{i}. “{w}”")), 10, 10),
    ("French quotes", tagged(lines("{i}. «\u00a0{w}\u00a0»")), 10, 10),
    ("backticks", tagged(lines("{i}. `{w}`")), 10, 10),
    ("brackets around words", tagged(lines("{i}. {w}]")), 10, 10),
    ("full stops", tagged(lines("{i}. {w}.")), 10, 10),
    ("commas at line ends", tagged(lines("{i}. {w},")), 10, 10),
    ("(30 times)", tagged(lines("{i}. {w} (30 times)")), 10, 10),
    ("(30)", tagged(lines("{i}. {w} (30)")), 10, 10),
    ("[30]", tagged(lines("{i}. {w} [30]")), 10, 10),
    (": 30", tagged(lines("{i}. {w}: 30")), 10, 10),
    (": 30 occurrences", tagged(lines("{i}. {w}: 30 occurrences")), 10, 10),
    (", 30 times", tagged(lines("{i}. {w}, 30 times")), 10, 10),
    ("- 30 times", tagged(lines("{i}. {w} - 30 times")), 10, 10),
    ("en dash", tagged(lines("{i}. {w} – thirty times")), 10, 10),
    ("em dash without blanks", tagged(lines("{i}. {w}—thirty times")), 10, 10),
    ("arrow", tagged(lines("{i}. {w} -> 30")), 10, 10),
    ("= 30", tagged(lines("{i}. {w} = 30")), 10, 10),
    ("tab and count", tagged(lines("{i}. {w}\t30")), 10, 10),
    ("count and full stop", tagged(lines("{i}. {w}: 30.")), 10, 10),
    ("all on one line", tagged(lines(between=" ")), 10, 10),
    ("all on one line with commas", tagged(lines(between=", ")), 10, 10),
    ("all on one line with semicolons and brackets", tagged(lines("{i}) {w}", between="; ")), 10, 10),
    ("all on one line with counts", tagged(lines("{i}. {w} (30)", between=", ")), 10, 10),
    ("all on one line with counts after colons", tagged(lines("{i}. {w}: 30", between=", ")), 10, 10),
    ("one line, tags on it", f"<answer>{lines(between=' ')}</answer>", 10, 10),
    ("markdown table", tagged("| # | Word |\n|---|---|\n" + lines("| {i} | {w} |")), 10, 10),
    ("markdown table with counts", tagged("| # | Word | Count |\n|--|--|--|\n" + lines("| {i} | {w} | 30 |")), 10, 10),
    ("CRLF", tagged(lines()).replace("\n", "\r\n"), 10, 10),
    ("blank lines between", tagged(lines(between="\n\n")), 10, 10),
    ("code fence", tagged(f"```\n{lines()}\n```"), 10, 10),
    ("numbered from 0", tagged("\n".join(f"{i}. {w}" for i, w in enumerate(G))), 10, 10),
    ("all numbered 1", tagged(lines("1. {w}")), 10, 10),
    ("another order", tagged(lines(words=G[::-1])), 10, 10),
    ("a second word", tagged(lines("{i}. {w} thirty", words=[w for w in G if " " not in w])), 9, 10),
    ("no numbers", tagged("\n".join(G)), 0, 10),
    ("bullets instead of numbers", tagged(lines("- {w}")), 0, 10),
    ("commas instead of numbers", tagged(", ".join(G)), 0, 10),
    ("JSON list", tagged('["' + '", "'.join(G) + '"]'), 0, 10),
    ("half of the lines numbered", tagged("\n".join([*lines(words=G[:5]).splitlines(), *G[5:]])), 5, 10),
    ("words on the next lines", tagged(lines("{i}.\n{w}")), 10, 10),
    ("numbers alone", tagged(lines("{i}.")), 0, 10),
    ("each twice", tagged(f"{lines()}\n{lines()}"), 10, 10),
    ("each twice in two cases", tagged(lines("{i}. {w}\n{i}. {W}")), 10, 10),
    ("twelve lines", tagged(lines(words=[*G, "bread", "butter"])), 10, 12),
    ("five lines", tagged(lines(words=G[:5])), 5, 10),
    ("one line", tagged(lines(words=G[:1])), 1, 10),
    ("five right, five wrong", tagged(lines(words=[*G[:5], *DOC["rare"][:5]])), 5, 15),
    ("ten wrong", tagged(lines(words=[f"wrong{w}" for w in "abcdefghij"])), 0, 20),
    ("the same word ten times", tagged(lines("{i}. apple")), 1, 10),
    ("the same wrong word ten times", tagged(lines("{i}. bread")), 0, 11),
    ("two words in a line", tagged(lines(words=[*G[:9], f"{G[9]} abacus"])), 10, 11),
    ("two words in a line, the wrong one first", tagged(lines(words=[*G[:9], f"abacus {G[9]}"])), 10, 11),
    ("two right words in a line", tagged(lines(words=[*G[:8], f"{G[8]} {G[9]}"])), 10, 10),
    ("a word behind a comma", tagged(lines(words=[*G[:9], f"{G[9]}, abacus"])), 10, 11),
    ("words behind a slash", tagged(lines(words=[*G[:9], f"{G[9]}/abacus/bread"])), 10, 12),
    ("a word behind and", tagged(lines(words=[*G[:9], f"{G[9]} and abacus"])), 10, 11),
    *((f"hedged{x!r}", tagged(lines() + x), 10, 11) for x in (
        ": abacus", " (abacus)", " - abacus", " -> abacus", " = abacus", "\nabacus", "\nor abacus", ", maybe abacus",
        " and perhaps abacus", " (and abacus)", " or abacus",
    )),
    ("30 times each below", tagged(f"{lines()}\n30 times each."), 10, 10),
    ("a heading behind the number", tagged(lines().replace("1. ", "1. The most common words: ", 1)), 10, 10),
    ("the form's words as labels", tagged(lines("{i}. first word: {w}")), 10, 10),
    *((verb, tagged(lines(f"{{i}}. {{w}} {verb} 30 times")), 10, 10) for verb in ("found", "repeated", "listed")),
    ("joined by a hyphen", tagged(lines(words=[*G[:9], f"{G[9]}-abacus"])), 9, 11),
    ("in a sentence", tagged(lines("{i}. {w} occurs 30 times in the list")), 10, 10),
    ("emoji for numbers", tagged(lines("{i}\ufe0f\u20e3 {w}")), 10, 10),
    ("full-width points", tagged(lines("{i}．{w}")), 10, 10),
    ("LaTeX", tagged(lines("{i}. $\\text{{{w}}}$")), 10, 10),
    ("HTML", tagged(lines("<li>{i}. <b>{w}</b></li>")), 10, 10),
    ("plural", tagged(lines(words=["apples", *G[1:]])), 9, 11),
    ("a letter missing", tagged(lines(words=["appl", *G[1:]])), 9, 11),
    ("prefix of a two-word entry", tagged(lines(words=[*G[:5], "dust", *G[6:]])), 9, 11),
    ("placeholders copied", tagged(lines(words=["first word", "second word"])), 0, 13),
    ("the form copied", tagged("1. first word\n2. second word\nand so on, to\n10. last word"), 0, 13),
    ("empty", "", 0, 10),
    ("blank", " \r\n\t", 0, 10),
    ("empty tags", "<answer></answer>", 0, 10),
    ("refusal", "<answer>I cannot count so many words.</answer>", 0, 10),
    ("100 KB of letters", f"<answer>{LETTERS}", 0, 10),
    ("100 KB of letters before the block", f"{LETTERS}{tagged(lines())}", 10, 10),
    ("100 KB of letters after the block", f"{tagged(lines())}{LETTERS}", 10, 10),
    ("100 KB of letters in the block, then lines", f"<answer>{LETTERS}\n{lines()}", 10, 10),
    ("100 KB of digits", f"<answer>{DIGITS}", 0, 10),
    ("100 KB of one digit", "<answer>" + "1" * 100_000, 0, 10),
    ("100 KB of numbers", "<answer>" + "1. " * 33_000, 0, 10),
    ("100 KB of numbers with blanks", "<answer>" + "1    .    " * 10_000, 0, 10),
    ("100 KB of one entry", "<answer>" + "1. apple " * 11_000, 1, 10),
    ("100 KB of one entry on lines", "<answer>" + "1. apple\n" * 11_000, 1, 10),
    ("100 KB of digits and brackets", "<answer>" + "1)" * 50_000, 0, 10),
    ("100 KB of digits and blanks", "<answer>" + "1 " * 50_000, 0, 10),
    ("100 KB of blanks", "<answer>1." + " " * 100_000, 0, 10),
    ("100 KB of points", "<answer>1" + "." * 100_000, 0, 10),
    ("100 KB of opening tags", "<answer>" * 12_500, 0, 10),
    ("100 KB of opening tags, then lines", "<answer>" * 12_500 + lines(), 10, 10),
    ("100 KB of closing tags", "</answer>" * 11_200, 0, 10),
    ("100 KB of empty blocks, then the answer", "<answer></answer>" * 6_000 + tagged(lines()), 10, 10),
]  # fmt: skip


@pytest.mark.parametrize(("output", "both", "either"), [row[1:] for row in OUTPUTS], ids=[row[0] for row in OUTPUTS])
def test_hand_written_outputs(output, both, either):
    start = time.process_time()
    assert Cwe().score(DOC, output) == {"iou": pytest.approx(both / either)}
    assert time.process_time() - start < 1


LONG = "it stands at so many places of the list that there is no need to look for any other word than this one"


@pytest.mark.parametrize(
    "style",
    ["{i}. {w} (" + LONG + ")", "{i}. {w}: " + LONG, "{i}. {w}, " + LONG, "{i}. {w} – " + LONG],
    ids=["brackets", "colon", "comma", "dash"],
)
def test_what_follows_a_word_is_ignored_however_long(style):
    assert Cwe().score(DOC, tagged(lines(style))) == {"iou": 1.0}


@pytest.mark.parametrize("style", ["#{i} {w}", "{i} {w}"])
def test_a_number_without_punctuation_numbers_a_line(style):
    """As it does for NIAH: "#1 key -> value"."""
    assert Cwe().score(DOC, tagged(lines(style))) == {"iou": 1.0}


def test_lines_may_have_the_numbers_of_the_list():
    """A model may copy entries as they stand in the list, which has four- and five-digit numbers."""
    text = "\n".join(f"{n}. {w}" for n, w in zip(range(812, 22_000, 2_100), G, strict=False))
    assert Cwe().score(DOC, tagged(text)) == {"iou": 1.0}


def test_an_entry_that_is_a_word_of_the_pool_is_that_word():
    """`dump truck` is a word of the list, and an answer with it does not name `dump`."""
    assert {"dump truck", "dump"} <= set(cwe.pool())
    doc = {**DOC, "words": ["dump", *G[1:]]}
    answer = tagged(lines(words=["dump truck", *G[1:]]))
    assert Cwe().score(doc, answer) == {"iou": pytest.approx(9 / 11)}


def test_combining_accents_are_the_same_word():
    answer = tagged(lines()).replace("ñ", "n\u0303")
    assert Cwe().score(DOC, answer) == {"iou": 1.0}
