"""Answers that models write in ways of their own, with the score that each must get by the paper's rule (§10)."""

from __future__ import annotations

import hashlib

import pytest

from lm_eval_sparse.frontier import recipe

VT = {
    "names": ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"],
    "variables": ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"],
}
ALL = ", ".join(VT["names"])
CWE = {"words": ["oak", "word", "the end", "mist"], "rare": []}
ONE = {"options": ["a", "b", "c", "d"], "letters": ["C"]}
FIRST = {"options": ["a", "b", "c", "d"], "letters": ["A"]}
TWO = {"options": ["a", "b", "c", "d"], "letters": ["A", "C"]}
HOP = {"value": "ornate brass bowl"}
ASKED = {"values": ["Apple Orchard", "Gustav"], "asked": [[3, "place"], [7, "character"]]}
BARE = {"numbers": [3, 17, 120]}


def tagged(text: str) -> str:
    return f"<answer>{text}</answer>"


CASES = [
    # task, document, output, score by hand
    ("vt", VT, ALL, 1.0),
    ("vt", VT, f"<explanation>{ALL} have it</explanation><answer>none</answer>", 0.0),  # tags are there: they count
    ("vt", VT, f"<explanation>{ALL} have it</explanation><answer></answer>", 0.0),
    ("vt", VT, f"<think>Is it <answer>{VT['names'][0]}</answer>? No.</think>\n{tagged(ALL)}", 1.0),
    ("vt", VT, f"<think>\n<answer>{VT['names'][0]}</answer>\n</think>\n{tagged(ALL)}", 1.0),
    ("cwe", CWE, tagged("1. word: oak\n2. the word mist\n3. word\n4. the end"), 0.6),  # "end" is wrong
    ("quality", ONE, tagged("A is incorrect; the answer is C"), 1.0),  # a letter that is refused is not given
    ("quality", FIRST, tagged("A is incorrect; the answer is C"), 0.0),
    ("quality", FIRST, tagged("Option A is wrong, so C"), 0.0),
    ("quality", FIRST, tagged("A is not right, C is"), 0.0),
    ("quality", FIRST, tagged("A isn't right"), 0.0),
    ("quality", ONE, tagged("C is correct"), 1.0),
    ("quality", ONE, "<think>\n<answer>A</answer>? no\n</think>\n<answer>C</answer>", 1.0),
    ("toefl", TWO, tagged("A as well as C"), 1.0),
    ("toefl", TWO, tagged("A plus C"), 1.0),
    ("toefl", TWO, tagged("A and also C"), 1.0),
    ("toefl", TWO, tagged("C"), 0.0),
    ("story_multihop", HOP, tagged("1. ornate brass bowl"), 1.0),
    ("story_multihop", HOP, tagged("Acquired last before the tiny oak box: ornate brass bowl"), 1.0),
    ("story_multihop", HOP, tagged("Acquired last before the ornate brass bowl: tiny oak box"), 0.0),
    ("story_retrieval", ASKED, tagged("Q1: Apple Orchard\nQ2. Gustav"), 1.0),
    ("story_retrieval", ASKED, tagged("Question 1: Apple Orchard\n2) gustav"), 1.0),
    ("story_filtering", BARE, tagged("the 3rd, 17th and 120th"), 1.0),
    ("story_filtering", BARE, tagged("3rd chapter"), 1 / 3),
    ("story_retrieval", ASKED, "1. Apple Orchard\n2. Gustav", 1.0),
]


@pytest.mark.parametrize(("task", "doc", "output", "score"), CASES, ids=[f"{c[0]}: {c[2][:60]!r}" for c in CASES])
def test_answers_as_models_write_them(task, doc, output, score):
    (value,) = recipe(task).score(doc, output).values()
    assert value == pytest.approx(score)


@pytest.mark.parametrize("tag", ["<explanation>", "<think>", "<answer>", "</answer>", "<explanation><answer>"])
@pytest.mark.parametrize("task", ["vt", "story_multihop"])
def test_many_tags_are_read_in_no_time(task, tag):
    doc = {"vt": VT, "story_multihop": HOP}[task]
    from time import process_time

    begun = process_time()
    recipe(task).score(doc, tag * (100_000 // len(tag)))
    assert process_time() - begun < 1


#: Of five documents and their twins, the same on Python 3.10 to 3.13. Another hash means another benchmark: raise the
#: recipe's `version` and say so in the changelog.
GOLDEN = {
    "niah": "92fab1e3eda77eb8",
    "vt": "e495d05996aee99e",
    "cwe": "4207a8323fcf6d1f",
    "story_retrieval": "0525c9c6c11cb01c",
    "story_multihop": "d12f74ed45afb164",
    "story_filtering": "d8e7359f68626d71",
}


@pytest.mark.parametrize("task", GOLDEN)
def test_documents_are_the_same_for_ever(task):
    digest = hashlib.sha256()
    for forced in (False, True):
        for index in range(5):
            digest.update(recipe(task).draft(4096, 0, index, forced).message(25, "Filler.").encode())
    assert recipe(task).version == 2 and digest.hexdigest()[:16] == GOLDEN[task]
