"""VT: chains read back from the prompts by an independent reader, and answers scored by hand."""

from __future__ import annotations

import random
import re
import statistics
import string
import time
from itertools import islice, product

import pytest
from frontier_common import StandIn, build, leaf, noise

from lm_eval_sparse.frontier.vt import Vt
from lm_eval_sparse.protocol import set_active_lm

ASSIGNMENT = re.compile(r"VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5})|([0-9]{5}))\b")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path))


@pytest.fixture
def lm():
    model = StandIn("digits")
    set_active_lm(model)
    return model


def draft(index: int = 0, forced: bool = False, length: int = 4096, seed: int = 0):
    return Vt().draft(length, seed, index, forced)


def assignments(text: str) -> list[tuple[str, str]]:
    """(variable, number or variable) in the order of the text; nothing but the text is looked at."""
    return [(name, source or number) for name, source, number in ASSIGNMENT.findall(text)]


def resolve(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Variable -> number, each found by walking from variable to variable."""
    given, values = dict(pairs), {}
    for name in given:
        at, steps = name, 0
        while not at.isdigit():
            at, steps = given[at], steps + 1
            assert steps <= len(given)  # no circle
        values[name] = at
    return values


# --------------------------------------------------------------------------------------------------------- documents


def test_two_hundred_documents_are_built_as_the_paper_says():
    before_source, in_chain_order, gold_places, all_names, gold_depths = [], 0, [], set(), []
    for index in range(200):
        one = draft(index)
        text, gold = one.message(25, ""), one.gold(25)
        pairs = assignments(text)
        names = [name for name, _ in pairs]
        assert len(names) == len(set(names)) == 40  # each variable is assigned once
        assert len(re.findall(r"VAR [A-Z]{5}\b", text)) == 40 + 32  # and no other statement in disguise
        numbers = [value for _, value in pairs if value.isdigit()]
        assert len(numbers) == len(set(numbers)) == 8 and all(10_000 <= int(n) <= 99_999 for n in numbers)
        sources = [value for _, value in pairs if not value.isdigit()]
        assert len(sources) == len(set(sources)) == 32  # chains: nobody is copied twice
        values = resolve(pairs)
        by_value = {n: {name for name, value in values.items() if value == n} for n in numbers}
        assert [len(chain) for chain in by_value.values()] == [5] * 8

        (asked,) = {n for n in numbers if text.count(n) > 1}
        assert text.count(asked) == 3  # its assignment, and the question twice
        assert asked == gold["value"] and by_value[asked] == set(gold["names"]) and len(gold["names"]) == 5
        assert set(gold["variables"]) == set(names) and len(gold["variables"]) == 40
        assert gold["variables"] == sorted(gold["variables"])  # so that its order tells nothing
        assert set(re.findall(r"\w+", gold["target"])) == by_value[asked]
        for name in names:  # its own assignment, and one copy unless it is the chain's end
            assert text.count(name) == 1 + sources.count(name)

        place = {name: i for i, name in enumerate(names)}
        before_source += [place[name] < place[value] for name, value in pairs if not value.isdigit()]
        chain = sorted(by_value[asked], key=place.__getitem__)
        in_chain_order += chain == gold["names"]
        gold_places += [place[name] for name in chain]
        gold_depths.append(place[next(name for name, value in pairs if value == asked)])
        all_names |= set(names)
    # 6,400 copies, half of them before what they copy (chains of dependent signs: four standard errors, doubled)
    assert abs(statistics.fmean(before_source) - 0.5) < 8 * 0.5 / 6400**0.5
    assert in_chain_order <= 10  # 200/120 expected
    assert abs(statistics.fmean(gold_places) - 19.5) < 4 * (40**2 / 12 / 1000) ** 0.5
    assert set(gold_depths) > set(range(0, 40, 39)) and len(set(gold_depths)) > 35  # everywhere, the ends included
    assert len(all_names) > 7_990  # drawn anew for each document
    assert {letter for name in all_names for letter in name} == set(string.ascii_uppercase)


def test_the_question_stands_before_and_after_the_text_and_the_format_last():
    for index, forced in ((0, False), (1, True)):
        one = draft(index, forced)
        text, value = one.message(10, ""), one.gold(10)["value"]
        found = list(ASSIGNMENT.finditer(text))
        before, after = text[: found[0].start()], text[found[-1].end() :]
        asked = [next(line for line in part.splitlines() if value in line) for part in (before, after)]
        assert asked[0] == asked[1] and asked[0].endswith("?")
        # Nothing says how many names are asked for: the only numbers are the value and those of the first examples.
        frame = f"{before}{after}".replace(value, "")
        assert "= 1," in frame and not re.search(r"\d", frame.replace("= 1,", ""))
        assert not re.search(r"\b(four|five|six|eight|forty)\b", frame, re.IGNORECASE)
        assert "twice" in before
        if forced:
            assert "<answer>" not in text and "explanation" not in text
        else:
            assert 0 < after.index(asked[1]) < after.index("<explanation>") < after.index("<answer>")
        assert not re.search(r"\b[A-Z]{5}\b", before) and not re.search(r"\b[A-Z]{5}\b", after)


def test_noise_and_assignments_are_shuffled_together():
    lines = re.compile(r"^The road is long\b.*$|" + ASSIGNMENT.pattern, re.MULTILINE)
    shares, gaps = [], set()
    for index in range(60):
        kinds = [match.group().startswith("VAR") for match in lines.finditer(draft(index).message(80, ""))]
        assert sum(kinds) == 40 and len(kinds) == 120
        shares += [i / 119 for i, is_assignment in enumerate(kinds) if is_assignment]
        gaps |= {kinds[0], kinds[-1]}
    assert gaps == {True, False}
    assert abs(statistics.fmean(shares) - 0.5) < 4 * (1 / 12 / 2400) ** 0.5
    assert abs(statistics.pvariance(shares) - 1 / 12) < 0.008


@pytest.mark.parametrize("forced", [False, True])
def test_assignments_do_not_depend_on_how_much_noise_fits(forced):
    for index in range(20):
        expected = assignments(draft(index).message(0, ""))
        one = draft(index, forced)
        texts = {units: one.message(units, "") for units in (3, 200, 0, 77)}
        assert [assignments(text) for text in texts.values()] == [expected] * 4
        for units, text in texts.items():
            assert text.count("Soon we shall rest.") == units
            assert draft(index, forced).message(units, "") == text  # asking for more before changes nothing
        with_filler = one.message(77, "A line of no use.")
        assert with_filler.count("A line of no use.\n") == 1
        assert with_filler.replace("A line of no use.\n", "") == texts[77]
        # Noise that fits first keeps its place among the assignments.
        lines = [[line for line in texts[units].splitlines() if "VAR " in line or "road" in line] for units in (3, 77)]
        rest = iter(lines[1])
        assert all(line in rest for line in lines[0])


def test_the_twin_has_the_same_assignments_and_gold(lm):
    one, twin = build(leaf("frontier_vt_4k"), lm, limit=2), build(leaf("forced_frontier_vt_4k"), lm, limit=2)
    for (_, doc), (_, forced) in zip(one.doc_iterator(limit=2), twin.doc_iterator(limit=2), strict=True):
        assert assignments(doc["input"]) == assignments(forced["input"])
        assert {k: doc[k] for k in ("names", "value", "variables")} == {
            k: forced[k] for k in ("names", "value", "variables")
        }
    asked = [i for i in twin.instances if i.doc_id == 0]
    variables = asked[0].doc["variables"]
    # Every variable is offered the same number: only the variable makes a difference.
    assert [i.args[0][i.args[0].shared :] for i in asked] == [f"The value of {name} is" for name in variables]
    assert {i.args[1] for i in asked} == {f" {asked[0].doc['value']}"}


def test_seed_index_and_length_each_change_the_document():
    texts = {
        draft(index, length=length, seed=seed).message(2, "")
        for length, seed, index in product((4096, 8192), (0, 1), (0, 1))
    }
    assert len(texts) == 8


def test_the_gold_answer_scores_one_for_two_hundred_documents(lm):
    task = build(leaf("frontier_vt_4k", samples=200), lm, limit=20)
    docs = [doc for _, doc in task.doc_iterator(limit=20)]
    for index in range(20, 200):  # the others of a fixed size, which is much faster
        one = draft(index)
        docs.append({**one.gold(30), "input": one.message(30, ""), "index": index})
    for doc, other in zip(docs, [*docs[1:], docs[0]], strict=True):
        gold = [n for n, v in resolve(assignments(doc["input"])).items() if v == doc["value"]]
        random.Random(doc["index"]).shuffle(gold)
        assert task.process_results(doc, [doc["target"]]) == {"iou": 1.0}
        wrapped = f"<explanation>Copies of copies.</explanation>\n<answer>\n{', '.join(gold)}\n</answer>"
        assert task.process_results(doc, [wrapped]) == {"iou": 1.0}
        assert task.process_results(doc, [other["target"]]) == {"iou": 0.0}
        text = doc["input"].split("Reply in two parts")[0]
        assert task.process_results(doc, [text]) == {"iou": 5 / 40}  # the text read back
        assert task.process_results(doc, [doc["input"]]) == {"iou": 0.0}  # with its example of tags


# ----------------------------------------------------------------------------------------------------------- scoring

G = ["QWXYA", "LMPTE", "ZZKRO", "BNEUV", "HJSDI"]
OTHERS = ["OTHER", "ABOUT", *("".join(t) for t in islice(product("FGW", repeat=5), 33))]
DOC = {"names": G, "value": "48213", "variables": sorted([*G, *OTHERS])}
ALL = ", ".join(G)
W = OTHERS[2:]  # FFFFF, FFFFG, …: other chains' names

LOWER = noise(3, "acdfghijkmopqrstuvwxyz0123456789 .,:<>/\n")  # b, e, l, n: never
MANY = [f"C{''.join(t)}" for t in islice(product(string.ascii_uppercase, repeat=4), 14_280)]  # 100 KB, none known

OUTPUTS = [
    # name, output, intersection and union worked out by hand
    ("plain", ALL, 5, 5),
    ("as asked", f"<explanation>Copied on.</explanation>\n<answer>\n{ALL}\n</answer>", 5, 5),
    ("tags on the line", f"<answer>{ALL}</answer>", 5, 5),
    ("upper-case tags", f"<ANSWER>{ALL}</ANSWER>", 5, 5),
    ("mixed-case tags", f"<Answer>\n{ALL}\n</Answer>", 5, 5),
    ("no closing tag", f"<explanation>So.</explanation><answer>\n{ALL}", 5, 5),
    ("only a closing tag", f"{ALL}\n</answer>", 5, 5),
    ("cut off within the fourth name", f"<answer>\n{ALL}"[: len("<answer>\n") + 3 * 7 + 3], 3, 6),
    ("cut off within the tag", f"<answer>{ALL}</ans", 5, 5),
    ("doubled tags", f"<answer><answer>{ALL}</answer></answer>", 5, 5),
    ("two blocks, first right", f"<answer>{ALL}</answer><answer>{W[0]}</answer>", 5, 5),
    ("two blocks, first wrong", f"<answer>{W[0]}</answer><answer>{ALL}</answer>", 0, 6),
    ("first block without names", f"<answer>the five names:</answer>\n<answer>{ALL}</answer>", 5, 5),
    ("empty block, names outside", f"<answer></answer> {ALL}", 0, 5),  # the whole counts without tags only
    ("names outside do not count beside a block", f"{W[0]} {W[1]} <answer>{ALL}</answer> {W[2]}", 5, 5),
    ("explanation names others", f"<explanation>{W[0]} copies {W[1]}.</explanation><answer>{ALL}</answer>", 5, 5),
    ("no tags, explanation names others", f"Not {W[0]} and {W[1]}. {ALL}", 5, 7),
    ("started over", f"<answer>{W[0]}, {W[1]}. No, again: <answer>{ALL}</answer>", 5, 5),
    ("lower case", ALL.lower(), 5, 5),
    ("title case", ALL.title(), 5, 5),
    ("mixed case, one of another chain", f"<answer>qWxYa, LmPtE, {W[4].lower()}</answer>", 2, 6),
    ("with VAR", ", ".join(f"VAR {g}" for g in G), 5, 5),
    ("with var", ", ".join(f"var {g.lower()}" for g in G), 5, 5),
    ("as assignments", "\n".join(f"VAR {g} = 48213" for g in G), 5, 5),
    ("as a chain", "VAR QWXYA = 48213. " + " ".join(f"VAR {G[i]} = VAR {G[i - 1]}." for i in range(1, 5)), 5, 5),
    ("arrows", " -> ".join(G), 5, 5),
    ("unicode arrows, no blanks", "→".join(G), 5, 5),
    ("numbered", "\n".join(f"{i}. {g}" for i, g in enumerate(G, 1)), 5, 5),
    ("numbered without blanks", "\n".join(f"{i}){g}" for i, g in enumerate(G, 1)), 5, 5),
    ("bullets", "\n".join(f"- {g}" for g in G), 5, 5),
    ("round bullets", "\n".join(f"•{g}" for g in G), 5, 5),
    ("one per line", "\n".join(G), 5, 5),
    ("CRLF", "<answer>\r\n" + "\r\n".join(G) + "\r\n</answer>\r\n", 5, 5),
    ("CR alone", "\r".join(G), 5, 5),
    ("tabs", "\t".join(G), 5, 5),
    ("no-break spaces", "\u00a0".join(G), 5, 5),
    ("blanks only", " ".join(G), 5, 5),
    ("commas without blanks", ",".join(G), 5, 5),
    ("semicolons", ";".join(G), 5, 5),
    ("slashes", "/".join(G), 5, 5),
    ("full-width commas", "，".join(G), 5, 5),
    ("ideographic commas", "、".join(G) + "。", 5, 5),
    ("among Chinese", "变量" + "和".join(G) + "的值", 5, 5),
    ("JSON", '<answer>["' + '", "'.join(G) + '"]</answer>', 5, 5),
    ("JSON object", '```json\n{"names": ["' + '","'.join(G) + '"]}\n```', 5, 5),
    ("Python set", "{'" + "', '".join(G) + "'}", 5, 5),
    ("curly quotes", ", ".join(f"“{g}”" for g in G), 5, 5),
    ("German quotes", ", ".join(f"„{g}“" for g in G), 5, 5),
    ("French quotes", ", ".join(f"«\u00a0{g}\u00a0»" for g in G), 5, 5),
    ("Japanese quotes", "".join(f"「{g}」" for g in G), 5, 5),
    ("backticks", ", ".join(f"`{g}`" for g in G), 5, 5),
    ("bold", ", ".join(f"**{g}**" for g in G), 5, 5),
    ("markdown table", "| # | Name |\n|---|---|\n" + "\n".join(f"| {i} | {g} |" for i, g in enumerate(G)), 5, 5),
    ("XML items", "<answer>" + "".join(f"<name>{g}</name>" for g in G) + "</answer>", 5, 5),
    ("LaTeX", r"\boxed{\text{" + r"}, \text{".join(G) + "}}", 5, 5),
    ("in prose", f"<answer>The names which share that value are {ALL}; these are right.</answer>", 5, 5),
    ("in prose without tags", f"I found these after three steps: first {G[0]}, then {' and '.join(G[1:])}.", 5, 5),
    ("prose with a known variable in lower case", f"<answer>{ALL} and no other</answer>", 5, 6),
    ("prose with two known variables", f"<answer>Other names: about {ALL}</answer>", 5, 7),
    ("prose in capitals", f"<answer>THESE NAMES SHARE 48213: {ALL}</answer>", 5, 5),
    ("all capitals, one word", f"<answer>FINAL: {ALL}</answer>", 5, 5),
    ("possessive", f"<answer>{G[0]}'s, {', '.join(G[1:])}</answer>", 5, 5),
    ("each twice", f"{ALL}, {ALL}", 5, 5),
    ("each twice in two cases", f"{ALL}, {ALL.lower()}", 5, 5),
    ("four of five", ", ".join(G[:4]), 4, 5),
    ("one of five", f"<answer>{G[3]}</answer>", 1, 5),
    ("one more", f"{ALL}, {W[0]}", 5, 6),
    ("five more", f"{ALL}, {', '.join(W[:5])}", 5, 10),
    ("three right, two wrong", ", ".join([*G[:3], *W[:2]]), 3, 7),
    ("another chain", ", ".join(W[:5]), 0, 10),
    ("all forty", ", ".join(DOC["variables"]), 5, 40),
    ("invented names", "CCCCC, CCCCD, CCCCE, CCCCH, CCCCI", 0, 10),
    ("an invented name", f"{ALL}, CCCCC", 5, 6),
    ("an invented name in lower case", f"{ALL}, ccccc", 5, 6),
    ("names of four and six letters", f"{ALL}, QWXY, QWXYAB", 5, 7),
    ("a name with a digit", f"{', '.join(G[:4])}, HJSD1", 4, 6),
    ("one letter off", f"{', '.join(G[:4])}, HJSDJ", 4, 6),
    ("glued", "".join(G), 0, 6),
    ("VAR glued to a name", f"VAR{G[0]}, {', '.join(G[1:])}", 4, 6),
    ("two glued", f"{G[0]}{G[1]}, {', '.join(G[2:])}", 3, 6),
    ("hyphens between", "-".join(G), 5, 5),
    ("a listed word as a name", f"<answer>{ALL}, VALUE</answer>", 5, 6),
    ("a listed word as a name, no tags", f"{ALL}, NONE", 5, 6),
    ("single letters", f"<answer>{ALL}, X, Y, A</answer>", 5, 8),
    ("a letter and words", f"<answer>{ALL}, A, foo, bar, Baz</answer>", 5, 9),
    ("two words behind and", f"<answer>{ALL} and foo bar</answer>", 5, 7),
    ("an invented name in title case in prose", f"<answer>The variables are {ALL} and Dbpnsx.</answer>", 5, 6),
    ("an invented name first in prose", f"<answer>The variables are Dbpnsx and {ALL}.</answer>", 5, 6),
    ("an invented name with a hedge", f"<answer>{ALL}, maybe foo</answer>", 5, 6),
    ("an invented name with a hedge in brackets", f"<answer>{ALL} (and foo)</answer>", 5, 6),
    ("an invented name on a line with a hedge", f"<answer>{ALL}\nor foo</answer>", 5, 6),
    ("invented names of other lengths", f"<answer>{ALL}, DBPNSX, ABC, XYZXYZ</answer>", 5, 8),
    ("a longer name for the fifth", f"<answer>{', '.join(G[:4])}, DBPNSX</answer>", 4, 6),
    ("invented names on lines", "\n".join([*G, "abcdef", "Xyz"]), 5, 7),
    ("an invented name among blanks", f"{' '.join(G)} DBPNSX", 5, 6),
    ("an invented name, lower case, among blanks", f"{' '.join(G).lower()} dbpnsx", 5, 6),
    ("an invented name with its value", f"{', '.join(f'{g}: 48213' for g in G)}, dbpnsx: 48213", 5, 6),
    ("an invented name in prose", f"The names are {', '.join(G[:4])} and DBPNSX.", 4, 6),
    ("prose with a word between commas", f"Indeed, the variables are, finally, {ALL}.", 5, 5),
    ("remarks in brackets", ", ".join(f"{g} (copied)" for g in G), 5, 5),
    ("remarks behind a dash", "\n".join(f"- {g} – somewhere initially" for g in G), 5, 5),
    ("another name in a remark", f"{ALL} (not {W[0]})", 5, 6),
    ("a table with words", "\n".join(f"| {i} | {g} | initially |" for i, g in enumerate(G)), 5, 5),
    ("the form copied", "<answer>first name, second name, and so on</answer>", 0, 5),
    ("full-width letters", "、".join(G).translate({i: i + 0xFEE0 for i in range(65, 91)}), 5, 5),
    ("the number alone", "48213", 0, 5),
    ("empty", "", 0, 5),
    ("blank", " \r\n\t ", 0, 5),
    ("empty tags", "<answer></answer>", 0, 5),
    ("only an opening tag", "<answer>", 0, 5),
    ("refusal", "I could not tell which these might be.", 0, 5),
    ("NUL and other control characters", "\x00".join(G), 5, 5),
    ("100 KB of lower-case noise", LOWER, 0, 5),
    ("100 KB of lower-case noise, then the answer", f"{LOWER}<answer>{ALL}</answer>", 5, 5),
    ("the answer, then 100 KB of noise", f"<answer>{ALL}</answer>{LOWER}", 5, 5),
    ("the answer, then 100 KB of invented names", f"<answer>{ALL}</answer>{', '.join(MANY)}", 5, 5),
    ("100 KB of invented names", ", ".join(MANY), 0, 14_285),
    ("100 KB of invented names and the right ones", f"<answer>{', '.join(MANY)}, {ALL}", 5, 14_285),
    ("100 KB of one letter", "A" * 100_000, 0, 5),
    ("100 KB of blanks", " " * 100_000, 0, 5),
    ("100 KB of one name", f"{G[0]}, " * 14_000, 1, 5),
    ("100 KB of VAR", "VAR " * 25_000, 0, 5),
    ("100 KB of opening tags", "<answer>" * 12_500, 0, 5),
    ("100 KB of closing tags", "</answer>" * 11_200, 0, 5),
    ("100 KB of empty blocks", "<answer></answer>" * 6_000, 0, 5),
    ("100 KB of empty blocks, then the answer", "<answer></answer>" * 6_000 + f"<answer>{ALL}</answer>", 5, 5),
    ("100 KB of opening tags, then the answer", "<answer>" * 12_500 + ALL, 5, 5),
    ("100 KB of half tags", "<answer" * 14_000, 0, 5),
    ("100 KB of emoji", "🙂" * 25_000, 0, 5),
]  # fmt: skip


@pytest.mark.parametrize(("output", "both", "either"), [row[1:] for row in OUTPUTS], ids=[row[0] for row in OUTPUTS])
def test_hand_written_outputs(output, both, either):
    start = time.process_time()
    assert Vt().score(DOC, output) == {"iou": pytest.approx(both / either)}
    assert time.process_time() - start < 1


@pytest.mark.parametrize("word", ["ÉTOILE", "ÜBERAL", "FEDERŸ"])
def test_letters_of_other_languages_are_letters(word):
    """Of a word with such a letter the others are no word of their own."""
    assert Vt().score(DOC, f"<answer>{ALL}, {word}</answer>") == {"iou": pytest.approx(5 / 6)}


@pytest.mark.parametrize("mark", ["*", "***", "~~", "_", "__"])
def test_names_may_be_emphasised(mark):
    """Markdown writes emphasis with underscores as well as with stars."""
    text = ", ".join(f"{mark}{name}{mark}" for name in G)
    assert Vt().score(DOC, f"<answer>{text}</answer>") == {"iou": 1.0}
