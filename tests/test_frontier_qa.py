"""The QA tasks: reading their data, what their documents contain, how answers are scored, what their twins ask.

Long, since four data sets share the made-up files and the tokenizers.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from frontier_common import KINDS, StandIn, build, leaf, tokenizer

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.frontier import qa, qa_data, qa_rows
from lm_eval_sparse.frontier.choice import Quality, Toefl
from lm_eval_sparse.frontier.fill import Filler, fit
from lm_eval_sparse.frontier.letters import letters
from lm_eval_sparse.frontier.recipe import Unavailable, rng
from lm_eval_sparse.frontier.squad import Squad, words
from lm_eval_sparse.protocol import SharedPrompt, set_active_lm

TASKS = (Squad, Quality, Toefl)
REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not (REAL / "toeflqa.jsonl").exists(), reason="the TOEFL data is not here")

# Made-up words, so that passages are like prose in shape and like nothing in content.
_SYLLABLES = "ba ko li mu ne po ra si tu ve wo xa zi dor fen gul".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(qa_data, "_known", {})
    monkeypatch.setattr(qa, "_corpora", {})


@pytest.fixture
def offline(monkeypatch):
    """No Hub; returns the list of tries to reach it."""
    return hub(monkeypatch, ConnectionError("no route\nto the host"))


def hub(monkeypatch, answer):
    datasets = pytest.importorskip("datasets")
    tries = []

    def load_dataset(*args, **kwargs):
        tries.append((*args, *kwargs.values()))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return tries


def sentence(source: random.Random, length: int) -> str:
    return " ".join("".join(source.choices(_SYLLABLES, k=source.randint(1, 3))) for _ in range(length))


@cache
def passages(number: int, shortest: int, longest: int) -> list[str]:
    source = random.Random(number)
    return [
        f"Passage {i}. " + ".\n".join(sentence(source, 12) for _ in range(source.randint(shortest, longest) // 12 + 1))
        for i in range(number)
    ]


@cache
def rows(name: str, number: int = 60, shortest: int = 20, longest: int = 150) -> list[dict]:
    """Four questions on each of `number` made-up passages, as rows on the Hub."""
    source, found = random.Random(1), []
    for i, context in enumerate(passages(number, shortest, longest)):
        options = [[sentence(source, 4) for _ in "ABCD"] for _ in range(4)]
        asked = [f"what {sentence(source, 6)} {i}-{j}?" for j in range(4)]
        if name == "toefl":
            texts = [
                f"Question: {question} Options: " + " ".join(f"{x}.{o}" for x, o in zip("ABCD", four, strict=True))
                for question, four in zip(asked, options, strict=True)
            ]
            found.append({"context": context, "questions": texts, "answer": ["A", "BD", "C", "ABC"]})
        for j, question in enumerate(asked):
            if name == "squad":
                text = [" ".join(context.split()[k : k + 3]) for k in (2 + j, 4 + j)]
                found.append({"context": context, "question": question, "answers": {"text": text}})
            elif name == "quality":
                found.append({"article": context, "question": question, "options": options[j], "answer": j})
    return found


FILE = {"squad": "squad.jsonl", "quality": "quality.jsonl", "toefl": "toeflqa.jsonl"}


def write(folder: Path, name: str, lines: list, file: str | None = None) -> dict[str, str]:
    """Write JSON Lines; returns the metadata that names their folder."""
    folder.mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / (file or FILE[name])).write_text(text + "\n", encoding="utf-8")
    return {"qa_folder": str(folder)}


def by_words(text: str) -> int:
    return len(text.split())


def counter(kind: str):
    tok = tokenizer(kind)
    return lambda text: len(tok.encode(text))


def bound(task: type, folder: Path, length: int = 4096, count=by_words, seed: int = 0, **kwargs):
    """A recipe that has made-up data and is bound."""
    recipe = task()
    recipe.find(write(folder, task.name, rows(task.name, **kwargs)))
    recipe.number = recipe.bind(length, seed, count, f"{count}")
    return recipe


def documents(message: str) -> dict[int, str]:
    """The documents of a message by their number; the last one with all that follows it."""
    parts = re.split(r"\n\nDocument (\d+):\n", message)
    return {int(number): text for number, text in zip(parts[1::2], parts[2::2], strict=True)}


def shown(message: str, question: str) -> dict[int, str]:
    """The documents of a message without what follows the last one: a filler line perhaps, and the question."""
    found = documents(message)
    last = max(found)
    found[last] = found[last].split("\n\nQuestion about document")[0]
    assert question in message
    return found


# --------------------------------------------------------------------------------------------------------------- data


def official_squad(lines: list[dict]) -> dict:
    paragraphs: dict[str, list] = {}
    for row in lines:
        answers = [{"text": text, "answer_start": 0} for text in row["answers"]["text"]]
        paragraphs.setdefault(row["context"], []).append(
            {"question": row["question"], "id": "x", "answers": answers, "is_impossible": not answers}
        )
    return {
        "version": "v2.0",
        "data": [{"title": "t", "paragraphs": [{"context": c, "qas": q}]} for c, q in paragraphs.items()],
    }


def official_quality(lines: list[dict]) -> list[dict]:
    articles: dict[str, list] = {}
    for row in lines:
        asked = {"question": row["question"], "options": row["options"], "gold_label": row["answer"] + 1}
        articles.setdefault(row["article"], []).append(asked)
    return [{"article_id": "1", "article": article, "questions": asked} for article, asked in articles.items()]


def test_official_files_and_hub_rows_give_the_same_data(tmp_path):
    squad = rows("squad") + [{"context": "Nobody knows.", "question": "who?", "answers": {"text": []}}]
    plain = qa_data.load("squad", write(tmp_path / "a", "squad", random.Random(0).sample(squad, len(squad))))
    official = qa_data.load("squad", write(tmp_path / "b", "squad", [official_squad(squad)], "dev-v2.0.json"))
    assert plain.items == official.items and plain.sha256 == official.sha256
    assert len(plain.items) == 240  # the question without an answer is not asked
    assert (plain.source, official.source) == ("squad.jsonl in a", "dev-v2.0.json in b")

    plain = qa_data.load("quality", write(tmp_path / "a", "quality", rows("quality")))
    lines = official_quality(rows("quality"))
    official = qa_data.load("quality", write(tmp_path / "b", "quality", lines, "QuALITY.v1.0.1.htmlstripped.dev"))
    assert plain.items == official.items and plain.sha256 == official.sha256
    assert {item.answers for item in plain.items} == {("A",), ("B",), ("C",), ("D",)}


def test_toefl_lines_are_tidied_and_split(tmp_path):
    line = {
        "context": " hi ,  um  ,  mr.  grey .\n that costs 1.5   dollars .\n , or  more ?\n",
        "questions": ["Question: why is it , so? Options: A.an u.s.a. map B.it 's  b. C. and D.what ? E.x F.y "],
        "answer": ["FA"],
        "dataset": "ignored",
    }
    (item,) = qa_data.load("toefl", write(tmp_path, "toefl", [line, ""])).items
    assert item.context == "hi, um, mr. grey.\nthat costs 1.5 dollars., or more?"
    assert item.question == "why is it, so?"
    assert item.options == ("an u.s.a. map", "it 's b.", "and", "what?", "x", "y")
    assert item.answers == ("A", "F")


@needs_real_data
def test_the_real_toefl_file():
    data = qa_data.load("toefl", {"qa_folder": str(REAL)})
    assert (len(data.items), len({item.context for item in data.items})) == (962, 198)
    assert sum(len(item.answers) > 1 for item in data.items) == 133
    assert {len(item.options) for item in data.items} == {4}
    for item in data.items:
        for text in (item.context, item.question, *item.options):
            assert text and text == text.strip() and not re.search(r" [,.?!](\s|$)|  ", text)


def test_duplicates_count_once_and_the_order_of_a_file_does_not_count(tmp_path):
    lines = rows("squad")
    again = [{**row, "question": f"  {row['question']} "} for row in lines[:9]]
    one = qa_data.load("squad", write(tmp_path / "a", "squad", lines))
    two = qa_data.load("squad", write(tmp_path / "b", "squad", [*reversed(lines), *again]))
    assert one.items == two.items and one.sha256 == two.sha256 and len(one.items) == len(lines)
    other = qa_data.load("squad", write(tmp_path / "c", "squad", lines[1:]))
    assert other.sha256 != one.sha256
    (item,) = qa_data.load(
        "squad",
        write(tmp_path / "d", "squad", [{"context": "c", "question": "q", "answers": {"text": ["x", "y", "x"]}}]),
    ).items
    assert item.answers == ("x", "y")


GOOD = {name: {json.dumps(row): row for row in rows(name, 2)} for name in FILE}
BAD = [
    ("squad", "{", "not JSON"),
    ("squad", "[]", "a JSON object is expected, this is []"),
    ("squad", '"text"', "a JSON object is expected"),
    ("squad", '{"question": "q", "answers": {"text": ["x"]}}', "'context' is missing"),
    ("squad", '{"context": " ", "question": "q", "answers": {"text": ["x"]}}', "'context' is empty"),
    ("squad", '{"context": "c", "question": 3, "answers": {"text": ["x"]}}', "'question' is 3; it must be a text"),
    ("squad", '{"context": "c", "question": "q"}', "'answers' is missing"),
    ("squad", '{"context": "c", "question": "q", "answers": ["x"]}', "'answers' is [\"x\"]"),
    ("squad", '{"context": "c", "question": "q", "answers": {"text": "x"}}', "'text' is \"x\""),
    ("squad", '{"context": "c", "question": "q", "answers": {"text": [""]}}', "'text' is [\"\"]"),
    ("quality", '{"article": "c", "question": "q", "options": ["x"], "answer": 0}', "'options' is [\"x\"]"),
    ("quality", '{"article": "c", "question": "q", "options": ["x", "y"], "answer": 2}', "from 0 to 1"),
    ("quality", '{"article": "c", "question": "q", "options": ["x", "y"], "answer": -1}', "from 0 to 1"),
    ("quality", '{"article": "c", "question": "q", "options": ["x", "y"], "answer": "A"}', "from 0 to 1"),
    ("quality", '{"article": "c", "question": "q", "options": ["x", "y"], "answer": true}', "from 0 to 1"),
    ("toefl", '{"context": "c", "questions": ["Question: q Options: A.x B.y"], "answer": []}', "'answer' is []"),
    ("toefl", '{"context": "c", "questions": ["Question: q Options: A.x B.y"], "answer": ["A", "B"]}', "as many"),
    ("toefl", '{"context": "c", "questions": ["Question: q Options: A.x B.y"], "answer": ["C"]}', "from A to B"),
    ("toefl", '{"context": "c", "questions": ["Question: q Options: A.x B.y"], "answer": ["AA"]}', "from A to B"),
    ("toefl", '{"context": "c", "questions": ["Question: q Options: A.x B.y"], "answer": ["b"]}', "from A to B"),
    ("toefl", '{"context": "c", "questions": ["Question: q Options: A.x"], "answer": ["A"]}', "must have the form"),
    ("toefl", '{"context": "c", "questions": ["Question: q Options: x B.y"], "answer": ["A"]}', "must have the form"),
    ("toefl", '{"context": "c", "questions": ["Question: q Options: A. B.y"], "answer": ["A"]}', "must have the form"),
    ("toefl", '{"context": "c", "questions": ["q? A.x B.y"], "answer": ["A"]}', "must have the form"),
    ("toefl", '{"context": "c", "questions": "q", "answer": ["A"]}', "'questions' is \"q\""),
]


@pytest.mark.parametrize(("name", "line", "said"), BAD)
def test_a_malformed_line_is_named(tmp_path, name, line, said):
    given = write(tmp_path, name, [*GOOD[name], "", line])
    with pytest.raises(UserError) as error:
        qa_data.load(name, given)
    number = len(GOOD[name]) + 2
    message = str(error.value)
    assert f"{FILE[name]}, line {number}: " in message and said in message and "\n" not in message


def test_malformed_official_files(tmp_path):
    def error(name, file, content):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(UserError) as caught:
            qa_data.load(name, {"qa_folder": str(tmp_path)})
        assert "\n" not in str(caught.value) and file in str(caught.value)
        return str(caught.value)

    assert "not JSON (Expecting value in line 2, column 2 of it)" in error("squad", "dev-v2.0.json", b'{"data":\n[}')
    assert "byte 11 is not UTF-8 text" in error("squad", "dev-v2.0.json", b'{"data":\n"\xff"}')
    assert "'data' is missing" in error("squad", "dev-v2.0.json", b"{}")
    assert "no question" in error("squad", "dev-v2.0.json", b'{"data": []}')
    whole = official_squad(rows("squad", 3))
    del whole["data"][1]["paragraphs"][0]["qas"][2]["answers"][1]["text"]
    said = error("squad", "dev-v2.0.json", json.dumps(whole).encode())
    assert "data[1].paragraphs[0].qas[2]: 'text' is missing" in said
    whole["data"][1]["paragraphs"] = {}
    assert "data[1]: 'paragraphs' is {}" in error("squad", "dev-v2.0.json", json.dumps(whole).encode())

    lines = official_quality(rows("quality", 3))
    lines[2]["questions"][1]["gold_label"] = 5
    said = error("quality", "QuALITY.v1.0.1.htmlstripped.dev", "\n".join(map(json.dumps, lines)).encode())
    assert "line 3: questions[1]: 'gold_label' is 5; it must be the right option as a number from 1 to 4" in said
    del lines[2]["questions"][1]["gold_label"]  # as in the official test file
    said = error("quality", "QuALITY.v1.0.1.htmlstripped.dev", "\n".join(map(json.dumps, lines)).encode())
    assert "line 3: questions[1]: 'gold_label' is missing" in said
    assert "line 1: byte 14 is not UTF-8 text" in error("toefl", "toeflqa.jsonl", b'{"context": "\xe9"}')
    assert "no question" in error("toefl", "toeflqa.jsonl", b"\n\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "not JSON that can be read"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "nested more than"),
        (b'{"data": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
        (b'{"data": NaN}', "'data' is NaN; it must be a list of articles"),
        (b'{"data": Infinity}', "'data' is Infinity"),
        (b"\0", "not JSON"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", "not JSON"),
        (b"", "not JSON"),
        (b"[]", "a JSON object is expected"),
    ],
)
@pytest.mark.parametrize(("name", "file"), [("squad", "dev-v2.0.json"), ("squad", "squad.jsonl")])
def test_json_that_would_break_a_reader(tmp_path, name, file, content, said):
    (tmp_path / file).write_bytes(content)
    if file.endswith("l") and (b"data" in content or not content):  # a row has other fields
        said = "'answers' is missing" if b"NaN" in content or b"Inf" in content else said
        said = said if content else "has no question"
    with pytest.raises(UserError, match=re.escape(said)) as error:
        qa_data.load(name, {"qa_folder": str(tmp_path)})
    assert file in str(error.value) and "\n" not in str(error.value)


def _squad_with(**fields: Any) -> dict[str, Any]:
    return {"context": "c", "question": "q", "answers": {"text": ["x"]}, **fields}


def _toefl_with(context: str, question: str) -> dict[str, Any]:
    return {"context": context, "questions": [f"Question: {question} Options: A.x B.y"], "answer": ["A"]}


def _quality_with(**fields: Any) -> dict[str, Any]:
    return {"article": "c", "question": "q", "options": ["x", "y"], "answer": 0, **fields}


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("squad", _squad_with(context="a\ud800b"), "'context' holds \\ud800, half a character"),
        ("squad", _squad_with(question="a\udfff"), "'question' holds \\udfff, half a character"),
        ("squad", _squad_with(answers={"text": ["x", "\ud800"]}), "'text' holds \\ud800, half a character"),
        ("squad", _squad_with(question="q" * 60_000), "'question' has 60,000 characters"),
        ("squad", _squad_with(context="q" * 6_000_000), "'context' has 6,000,000 characters"),
        ("squad", _squad_with(answers={"text": [5]}), "'text' is [5]"),
        ("squad", _squad_with(answers=None), "'answers' is null"),
        ("quality", _quality_with(article="\udc80"), "'article' holds \\udc80, half a character"),
        ("quality", _quality_with(options=["x", "\ud800"]), "'options' holds \\ud800"),
        ("quality", _quality_with(options=["x"] * 1_000_000), "more than the 26 that"),
        ("quality", _quality_with(answer=float("nan")), "'answer' is NaN"),
        ("quality", _quality_with(answer=1.0), "'answer' is 1.0"),
        ("quality", _quality_with(answer=10**1000), "from 0 to 1"),
        ("toefl", _toefl_with("\ud800", "q"), "'context' holds"),
        ("toefl", _toefl_with("c", "\ud800"), "'questions'"),
    ],
)  # fmt: skip
def test_a_text_that_no_prompt_can_hold(tmp_path, name, row, said):
    given = write(tmp_path, name, [json.dumps(row)])
    with pytest.raises(UserError, match=re.escape(said)) as error:
        qa_data.load(name, given)
    assert f"{FILE[name]}, line 1: " in str(error.value) and len(str(error.value)) < 2000
    kind = qa_rows.KINDS[name]  # a row on the Hub is one like it
    with pytest.raises(ValueError, match="^row 7: ") as caught:
        list(qa_data._checked(kind, row, 7))
    assert said in str(caught.value)


def test_blanks_without_end_cost_no_time(tmp_path):
    line = {"context": "a" + "\n" * 300_000 + "b", "questions": ["Question: q Options: A.x B.y"], "answer": ["A"]}
    begun = time.process_time()
    qa_data.load("toefl", write(tmp_path, "toefl", [json.dumps(line)]))
    assert time.process_time() - begun < 5


LINKS = [lambda path, to=to: path.symlink_to(to) for to in ("/dev/zero", "nowhere", "squad.jsonl")]


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, *LINKS])
def test_what_has_the_name_of_a_file_and_is_none(tmp_path, make):
    write(tmp_path, "quality", rows("quality"))
    make(tmp_path / "squad.jsonl")
    with pytest.raises(UserError, match=r"squad\.jsonl (is no regular file|is a folder|cannot be read)"):
        qa_data.load("squad", {"qa_folder": str(tmp_path)})
    assert qa_data.load("quality", {"qa_folder": str(tmp_path)}).items


def test_a_byte_order_mark_and_other_line_ends(tmp_path):
    plain = qa_data.load("squad", write(tmp_path / "a", "squad", rows("squad")))
    given = write(tmp_path / "b", "squad", rows("squad"))
    file = tmp_path / "b" / "squad.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert qa_data.load("squad", given).sha256 == plain.sha256


def test_a_wrong_folder_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    for given_folder, said in [
        (str(tmp_path / "nowhere"), "does not exist"),
        (str(tmp_path / "file"), "is a file, not a folder"),
        ("~nosuchuser/x", "there is no home folder for ~nosuchuser"),
        ("x" * 300, "255 are allowed"),
        ("x/" * 5000, "4096 are allowed"),
        ("a\0b", "cannot hold a null character"),
        ({"a": 1}, "qa_folder={'a': 1} given"),
        (str(tmp_path), "has none of dev-v2.0.json, squad.jsonl, QuALITY"),
        (7, "qa_folder=7 given"),
        ("", "qa_folder='' given"),
    ]:
        with pytest.raises(UserError, match=re.escape(said)):
            qa_data.load("squad", {"qa_folder": given_folder})
    with pytest.raises(UserError, match="squad_hub=3 given"):
        qa_data.load("squad", {"squad_hub": 3})


def test_missing_data_is_a_reason_and_is_looked_for_once(tmp_path, offline):
    given = write(tmp_path / "x", "toefl", rows("toefl", 2))
    for _ in range(12):
        with pytest.raises(Unavailable) as error:
            qa_data.load("squad", given)
    assert offline == [("rajpurkar/squad_v2", "validation")]
    message = str(error.value)
    assert "\n" not in message
    for said in ("SQuAD", "x has no dev-v2.0.json or squad.jsonl", "rajpurkar/squad_v2", "no route", "qa_folder"):
        assert said in message
    with pytest.raises(Unavailable, match="emozilla/quality"):
        qa_data.load("quality", {})
    with pytest.raises(Unavailable, match="toefl_hub"):
        qa_data.load("toefl", {})
    assert len(offline) == 1  # nor is a Hub that cannot be reached tried again for another data set
    assert len(qa_data.load("toefl", given).items) == 8  # the others still have theirs


@pytest.mark.parametrize("name", FILE)
def test_what_came_from_the_hub_is_kept(tmp_path, monkeypatch, name):
    answer = rows(name, 5)
    given = {"toefl_hub": "some/toefl"} if name == "toefl" else {}
    tries = hub(monkeypatch, {"test": answer[2:], "train": answer[:2]} if name == "toefl" else answer)
    first = qa_data.load(name, given)
    assert qa_data.load(name, given) is first and len(tries) == 1
    from_file = qa_data.load(name, write(tmp_path / "f", name, answer))
    assert from_file.items == first.items and from_file.sha256 == first.sha256
    assert first.source.endswith("on the Hub")

    forget(monkeypatch)
    tries = hub(monkeypatch, ConnectionError())
    assert qa_data.load(name, given) == first and not tries

    (copy,) = (tmp_path / "cache" / "qa").iterdir()  # and no half-written file beside it
    whole = copy.read_bytes()
    for torn in (whole[:-9], b"", b"\xff", b"[]\n[]", whole.replace(b"Passage 3", b"Passage 4", 1)):
        copy.write_bytes(torn)
        forget(monkeypatch)
        with pytest.raises(Unavailable):
            qa_data.load(name, given)
    hub(monkeypatch, {"train": answer} if name == "toefl" else answer)
    forget(monkeypatch)
    assert qa_data.load(name, given) == first
    assert copy.read_bytes() == whole


def test_other_data_sets_on_the_hub_have_copies_of_their_own(monkeypatch):
    tries = hub(monkeypatch, rows("squad", 5))
    one = qa_data.load("squad", {})
    hub(monkeypatch, rows("squad", 4))
    other = qa_data.load("squad", {"squad_hub": "me/mine"})
    assert one.sha256 != other.sha256 and other.source == "me/mine on the Hub"
    assert tries == [("rajpurkar/squad_v2", "validation")]
    hub(monkeypatch, [{"text": "x"}])
    with pytest.raises(Unavailable, match=r"me/bad cannot be loaded .*row 1: 'answers' is missing"):
        qa_data.load("squad", {"squad_hub": "me/bad"})
    hub(monkeypatch, [])
    with pytest.raises(Unavailable, match="me/empty on the Hub has no question"):
        qa_data.load("squad", {"squad_hub": "me/empty"})


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path / "file"))
    hub(monkeypatch, rows("squad"))
    recipe = Squad()
    recipe.find({})
    assert recipe.bind(4096, 0, by_words, "x") == 240
    assert "cannot keep" in caplog.text


# ---------------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("task", TASKS)
def test_two_hundred_documents(tmp_path, task):
    recipe = bound(task, tmp_path, 2048)
    assert recipe.number == 240
    own_places, most = [], 0
    for index in range(200):
        draft = recipe.draft(2048, 0, index, False)
        units = 150 + index % 9
        text, gold = draft.message(units, "Nothing here."), draft.gold(units)
        found = documents(text)
        assert list(found) == list(range(1, gold["documents"] + 1))
        # The question names the number of the document that it is about, before and after the documents.
        asked = f"Question about document {gold['document']}: {gold['question']}\n"
        assert text.count(asked) == 2 and text.count("Question about document") == 2
        before, after = (m.start() for m in re.finditer(re.escape(asked), text))
        assert before < text.index("\n\nDocument 1:") and text.index("\n\nNothing here.\n\n") < after
        (evidence,) = recipe.evidence({**gold, "input": text, "context": text.context})
        assert text.count(evidence) == 1 and found[gold["document"]].startswith(evidence)
        assert evidence in passages(60, 20, 150)
        assert gold["question"].endswith(f" {evidence.split()[1][:-1]}-{gold['question'][-2]}?")
        for number, other in shown(text, gold["question"]).items():
            body = other.removesuffix("\n\nNothing here.")
            if number != gold["document"]:
                assert body != evidence
            assert any(passage.startswith(body) for passage in passages(60, 20, 150))
        if task is Squad:
            assert all(reference in evidence for reference in gold["references"])
        else:
            for letter, option in zip("ABCD", gold["options"], strict=True):
                assert text.count(f"\n{letter}. {option}\n") == 2
        assert recipe.score(gold, f"<explanation>x</explanation>\n<answer>\n{gold['target']}\n</answer>") in (
            {"f1": 1.0},
            {"exact_match": 1.0},
        )
        json.dumps(gold)
        own_places.append(gold["document"] / gold["documents"])
        most = max(most, gold["documents"])
    assert most >= 9
    assert 0.4 < sum(own_places) / 200 < 0.7  # anywhere


def test_wording_of_the_formats(tmp_path):
    for task in TASKS:
        recipe = bound(task, tmp_path, 2048)
        generated, forced = (recipe.draft(2048, 0, 0, f).message(9, "") for f in (False, True))
        assert generated.endswith("nothing after </answer>.") and "<explanation>" in generated
        assert forced.endswith("\n\nAnswer:\n") and "<" not in forced
        assert ("several are right" in generated) == ("several options are right" in forced) == (task is Toefl)
        assert recipe.version == 2 and recipe.identity() == [recipe.origin()["sha256"]]


@pytest.mark.parametrize("task", TASKS)
def test_the_same_questions_at_every_length_and_in_the_twin(tmp_path, task):
    def questions(length, forced, seed=0):
        recipe = bound(task, tmp_path, length, seed=seed)
        drafts = [recipe.draft(length, seed, i, forced) for i in range(50)]
        return [(d.item.question, d.item.context) for d in drafts]

    short = questions(2048, False)
    assert len(set(short)) == 50
    assert short == questions(4096, False) == questions(2048, True) == questions(4096, True)
    assert short != questions(2048, False, seed=1)


def single(recipe, item) -> str:
    """The generated message for `item` with its own document alone."""
    question = recipe.question(item, 1)
    return recipe.bare(item).replace(f"{question}\n\n", f"{question}\n\nDocument 1:\n{item.context}\n\n", 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_questions_fit_with_their_document(tmp_path, task, kind):
    """The bound is never exceeded, what is left out is over it, and lengths agree on the order of what fits."""
    count = counter(kind)
    recipe = bound(task, tmp_path, 4096, count, number=30)
    every = recipe._data.items
    alone = {item: count(single(recipe, item)) for item in every}
    length = int(sorted(alone.values())[len(every) // 2] / 0.9)
    limit = math.floor(0.9 * length)
    recipe.number = recipe.bind(length, 0, count, f"{count}")
    fitting = []
    for index in range(recipe.number):
        draft = recipe.draft(length, 0, index, False)
        assert draft.message(0, "") == single(recipe, draft.item)
        assert alone[draft.item] <= limit
        assert count(recipe.draft(length, 0, index, True).message(0, "")) <= limit
        fitting.append(draft.item)
    assert 0 < len(fitting) < len(every)
    for item in set(every) - set(fitting):
        assert alone[item] > limit - 24
    longer = [recipe.draft(4 * length, 0, i, False).item for i in range(recipe.bind(4 * length, 0, count, f"{count}"))]
    assert [item for item in longer if item in set(fitting)] == fitting
    assert len(longer) > len(fitting)


def test_the_paper_bound_holds_at_every_length(tmp_path):
    lines = rows("squad", 90) + [
        {"context": "long " * 9000 + "end", "question": "q?", "answers": {"text": ["end"]}},
        {"context": "fits " * 7900 + "end", "question": "q?", "answers": {"text": ["end"]}},
    ]
    recipe = Squad()
    recipe.find(write(tmp_path, "squad", lines))
    assert recipe.bind(16_000, 0, by_words, "x") == 361
    draft = recipe.draft(16_000, 0, 0, False)
    assert "long long" not in draft.message(draft.most, "")  # nor is it a distractor
    # A document too long for the questions of a short leaf is one of its distractors all the same.
    assert recipe.bind(4096, 0, by_words, "x") == 360
    draft = recipe.draft(4096, 0, 0, False)
    assert "fits fits" in draft.message(draft.most, "")


@pytest.mark.parametrize("task", TASKS)
def test_distractors_are_chosen_greedily(tmp_path, task):
    """Against the spec written out: whole documents as they come if they fit, then the beginning of one more."""
    length, recipe = 3000, bound(task, tmp_path, 3000)
    pool = sorted({item.context for item in recipe._data.items})
    for index in range(25):
        draft = recipe.draft(length, 0, index, False)
        source = rng(recipe.name, recipe.version, length, 0, index)
        shuffled = [context for context in pool if context != draft.item.context]
        source.shuffle(shuffled)
        taken: list[str] = []
        used = by_words(draft.message(0, ""))
        for context in shuffled:
            added = by_words(f"Document 1:\n{context}")
            if used + added <= length - 25:
                taken.append(context)
                used += added
        fitted = fit(draft, length, by_words, Filler(by_words))
        assert fitted.tokens == length
        found = shown(draft.message(fitted.units, ""), draft.item.question).values()
        whole = [text for text in found if text in pool and text != draft.item.context]
        assert set(taken) <= set(whole) and len(whole) <= len(taken) + 1
        parts = [text for text in found if text not in pool]
        assert len(parts) <= 1
        rest = [context for context in shuffled if context not in whole]
        assert all(rest[0].startswith(part) for part in parts)  # the first that did not fit
        # Cut between words, and as long as can be up to a unit and a filler line.
        assert all(part.split() == rest[0].split()[: len(part.split())] for part in parts)


@pytest.mark.parametrize("task", TASKS)
def test_messages_grow_and_keep_their_order(tmp_path, task):
    draft = bound(task, tmp_path, 4096).draft(4096, 0, 3, False)
    before: list[str] = []
    size = 0
    for units in [*range(60), *range(60, draft.most, 41), draft.most]:
        message = draft.message(units, "")
        assert by_words(message) > size
        size = by_words(message)
        now = list(shown(message, draft.item.question).values())
        whole = [text for text in now if text in before]
        assert whole == [text for text in before if text in now]  # order is stable
        assert len(whole) >= len(before) - 1  # at most one, the cut one, has changed
        before = now
    assert len(before) == 60
    assert draft.message(draft.most + 5, "") == message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_exact_lengths(tmp_path, task, kind):
    count = counter(kind)
    for length in (2500, 4096):
        recipe = bound(task, tmp_path, length, count)
        filler = Filler(count)
        for index in range(3):
            for forced in (False, True):
                draft = recipe.draft(length, 0, index, forced)
                fitted = fit(draft, length, count, filler)
                assert count(draft.message(fitted.units, fitted.filler)) == fitted.tokens == length
                assert len(fitted.filler.split()) < 60
                shorter = fit(draft, math.ceil(0.9 * length), count, filler)  # where the answer needs room
                assert shorter.tokens == math.ceil(0.9 * length)


def test_documents_depend_on_nothing_else(tmp_path, monkeypatch):
    def texts(order):
        forget(monkeypatch)
        recipe = bound(Quality, tmp_path, 2048)
        return {i: recipe.draft(2048, 0, i, False).message(70 + i, "x") for i in order}

    one, again = texts([0, 1, 2, 3]), texts([3, 1])
    assert {i: one[i] for i in again} == again
    recipe = bound(Quality, tmp_path, 2048)
    draft = recipe.draft(2048, 0, 1, False)
    for units in (90, 3, 0, 71):
        last = draft.message(units, "x")
    assert last == one[1]
    assert recipe.bind(4096, 0, by_words, f"{by_words}") and recipe.bind(2048, 5, by_words, f"{by_words}")
    assert recipe.draft(2048, 0, 1, False).message(71, "x") == one[1]  # another leaf does not disturb it
    own = one[0].split("Document 1:")[1:]
    assert own != recipe.draft(2048, 5, 0, False).message(70, "x").split("Document 1:")[1:]


def test_costs_are_measured_once_and_kept(tmp_path, monkeypatch):
    asked = []

    def count(text):
        asked.append(text)
        return by_words(text)

    bound(Quality, tmp_path, 2048, count)
    cold = len(asked)
    assert cold > 60
    bound(Quality, tmp_path, 4096, count)
    assert len(asked) < cold + 10  # in memory
    forget(monkeypatch)
    asked.clear()
    warm = bound(Quality, tmp_path, 2048, count)
    assert len(asked) < 20  # on disk
    (file,) = (tmp_path / "cache" / "qa").glob("costs-*")
    whole = json.loads(file.read_text())
    for broken in ("", "[]", "{}", json.dumps({**whole, "contexts": whole["contexts"][1:]}), file.read_text()[:-5]):
        file.write_text(broken)
        forget(monkeypatch)
        recipe = bound(Quality, tmp_path, 2048, count)
        assert recipe.number == warm.number and json.loads(file.read_text())["contexts"] == whole["contexts"]
    recipe = Quality()
    recipe.find({"qa_folder": str(tmp_path)})
    recipe.bind(2048, 0, count, "another tokenizer")
    assert len(list((tmp_path / "cache" / "qa").glob("costs-*"))) == 2


def test_too_little_data_is_a_reason(tmp_path):
    with pytest.raises(Unavailable, match=r"the 5 documents in squad.jsonl in .* tokens, and 3892 are needed"):
        bound(Squad, tmp_path, 4096, number=5)
    with pytest.raises(Unavailable, match=r"none of the 20 questions .* fits into 90 tokens"):
        bound(Squad, tmp_path, 100, number=5)
    with pytest.raises(Unavailable, match="no data"):
        Squad().bind(4096, 0, by_words, "x")
    # What just suffices is used up, and filler makes up the rest.
    recipe = Squad()
    recipe.find({"qa_folder": str(tmp_path)})
    whole = by_words(recipe.bare(None)) + sum(by_words(c) + 2 for c in {i.context for i in recipe._data.items})
    length = int(whole / 0.96)
    assert recipe.bind(length, 0, by_words, "x") == 20
    draft = recipe.draft(length, 0, 0, False)
    fitted = fit(draft, length, by_words, Filler(by_words))
    assert fitted.units == draft.most and fitted.tokens == length


# ------------------------------------------------------------------------------------------------------------- scores


def tagged(text: str) -> str:
    return f"<explanation>It says so.</explanation>\n<answer>\n{text}\n</answer>"


NOISE = "The quick brown fox, 12 ~ jumps; " * 3200
SQUAD = {"references": ["the Rhine river", "Rhine"]}
SQUAD_OUTPUTS = [
    ("gold", tagged("the Rhine river"), 1.0),
    ("other reference", tagged("Rhine"), 1.0),
    ("upper case", tagged("THE RHINE RIVER"), 1.0),
    ("other article", tagged("a Rhine river"), 1.0),
    ("punctuation", tagged('"Rhine".'), 1.0),
    ("German quotes", tagged("„Rhine“"), 1.0),
    ("French quotes", tagged("« Rhine »"), 1.0),
    ("curly quotes", tagged("“the Rhine river”"), 1.0),
    ("markup", tagged("**Rhine**"), 1.0),
    ("word order", tagged("river Rhine"), 1.0),
    ("words twice", tagged("Rhine Rhine Rhine"), 1.0),
    ("empty words do not count", tagged("about the Rhine and to or an a"), 1.0),
    ("no tags", "the Rhine river", 0.0),
    ("no tags, empty", "", 0.0),
    ("empty tags", "<answer></answer>", 0.0),
    ("only punctuation", tagged("..."), 0.0),
    ("only empty words", tagged("the"), 0.0),
    ("cut-off tag", "<explanation>x</explanation><answer>Rhine", 1.0),
    ("opening tag in capitals", "<ANSWER>Rhine</ANSWER>", 1.0),
    ("text around the tags", f"Well.\n{tagged('Rhine')}\nI hope that helps.", 1.0),
    ("tag named before", "I put it in <answer> tags: <answer>Rhine</answer>", 1.0),
    ("first block is empty", "<answer></answer><answer>Rhine</answer>", 1.0),
    ("two blocks", "<answer>Elbe</answer><answer>Rhine</answer>", 0.0),
    ("one word more", tagged("Rhine valley"), 0.67),  # 2·1/(2+1); against the other 2·1/(2+2)
    ("a sentence", tagged("It is the Rhine river in Germany"), 0.5),  # 2·2/(6+2) against the longer reference
    ("wrong", tagged("Danube"), 0.0),
    ("label", tagged("**Answer:** Rhine"), 1.0),
    ("label as a sentence", tagged("The answer is: the Rhine river."), 1.0),
    ("label alone", tagged("Answer:"), 0.0),
    ("LaTeX", tagged("$\\boxed{\\text{Rhine}}$"), 1.0),
    ("full-width", tagged("Ｒｈｉｎｅ．"), 1.0),
    ("over lines", tagged("the Rhine\nriver"), 1.0),
    ("joined by a hyphen", tagged("Rhine-river"), 0.0),  # one word, as SQuAD's own script has it
    ("100 KB of noise", NOISE, 0.0),
    ("100 KB of noise, then the answer", NOISE + tagged("Rhine"), 1.0),
    ("the answer, then 100 KB of noise", tagged("Rhine") + NOISE, 1.0),
    ("100 KB of noise in the answer", tagged(f"Rhine {NOISE}"), 0.29),  # Rhine quick brown fox 12 jumps: 2·1/(6+1)
    ("100 KB of tags", "<answer>" * 12_500, 0.0),
]


@pytest.mark.parametrize(("output", "score"), [row[1:] for row in SQUAD_OUTPUTS], ids=[row[0] for row in SQUAD_OUTPUTS])
def test_squad_outputs(output, score):
    start = time.process_time()
    assert Squad().score(SQUAD, output) == {"f1": score}
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("reference", "answer", "score"),
    [
        ("the", "The.", 1.0),  # nothing but empty words on both sides: compared as they are
        ("a", "the", 0.0),
        ("to the", "the", 0.67),
        ("the Normans", "the", 0.0),
        ("$5 million", "5 million", 1.0),
        ("10th and 11th centuries", "in the 10th and 11th centuries", 0.86),  # 2·3/(4+3)
        ("caf\u00e9", "cafe\u0301", 1.0),
        ("don’t", "don't", 1.0),
        ("1990–1995", "1990-1995", 1.0),
        ("...", "...", 0.0),
        ("\\alpha", "\\alpha", 1.0),
        ("Denver Broncos", "1. Denver Broncos", 1.0),
        ("Denver Broncos", "The answer is Denver Broncos", 1.0),
        ("1. FC Köln", "1. FC Köln", 1.0),
    ],
)
def test_f1_by_hand(reference, answer, score):
    assert Squad().score({"references": [reference]}, f"<answer>{answer}</answer>") == {"f1": score}


def test_words():
    assert words("The cat, and A dog—about to (run)!") == {"cat", "dogabout", "run"}
    assert words(" \n") == words("?!") == frozenset()


AC = {"options": ["to sign up", "a dog", "vitamin B", "none of these"], "letters": ["A", "C"]}
B = {**AC, "letters": ["B"]}
A = {**AC, "letters": ["A"]}
CHOICE_OUTPUTS = [
    ("letter", B, tagged("B"), 1.0),
    ("small letter", B, tagged("b"), 1.0),
    ("full stop", B, tagged("B."), 1.0),
    ("brackets", B, tagged("(B)"), 1.0),
    ("square brackets", B, tagged("[B]"), 1.0),
    ("bold", B, tagged("**B**"), 1.0),
    ("bold with stop", B, tagged("**B.** a dog"), 1.0),
    ("quotes", B, tagged("“B”"), 1.0),
    ("German quotes", B, tagged("„B“"), 1.0),
    ("French quotes", B, tagged("« B »"), 1.0),
    ("with its text", B, tagged("B. a dog"), 1.0),
    ("with its text, no blank", B, tagged("B.a dog"), 1.0),
    ("with its text, bracket", B, tagged("b) a dog"), 1.0),
    ("with its text, colon", B, tagged("B: A dog was seen"), 1.0),
    ("with its text, no mark", B, tagged("B a dog"), 1.0),
    ("with its text in capitals", B, tagged("B. A DOG"), 1.0),
    ("text on the next line", B, tagged("B\nA dog was seen by the man."), 1.0),
    ("named", B, tagged("Option B"), 1.0),
    ("named, small", B, tagged("option b"), 1.0),
    ("sentence", B, tagged("The answer is B."), 1.0),
    ("sentence elsewhere", B, tagged("I think it must be B, because I saw a dog."), 1.0),
    ("German sentence", B, tagged("Die richtige Antwort ist B."), 1.0),
    ("twice", B, tagged("B, B"), 1.0),
    ("twice on lines", B, tagged("B\nB"), 1.0),
    ("text only", B, tagged("a dog"), 0.0),
    ("text only, capital article", A, tagged("A dog"), 0.0),
    ("text only, letter in it", B, tagged("to get vitamin B"), 1.0),  # cannot be told from an answer
    ("text with a letter in it", {**AC, "letters": ["C"]}, tagged("C. vitamin B"), 1.0),
    (
        "text with a list in it",
        {"options": ["x", "y", "vitamins A, B, D"], "letters": ["C"]},
        tagged("C. vitamins A, B, D."),
        1.0,
    ),
    ("another text with a list in it", {**AC, "letters": ["C"]}, tagged("C. vitamins A, B, D."), 0.0),
    *(
        (x, B, tagged(x), 0.0)
        for x in (
            "B, maybe D",
            "B and perhaps D",
            "B, possibly also D",
            "B is right, and so is D",
            "B (and D)",
            "B or D",
            "B\nor D",
            "B. A quick way to B or D",
            "b, maybe d",
            "not B",
            "The answer is not B",
            "It cannot be B",
            "B is not right",
        )
    ),
    ("reasons", AC, tagged("A is correct because X; C is correct because Y"), 1.0),
    ("a wrong one is refused first", B, tagged("A is wrong, B"), 1.0),
    ("None", A, tagged("None"), 0.0),
    ("Answer", A, tagged("Answer"), 0.0),
    ("ANSWER", A, tagged("ANSWER"), 0.0),
    ("a word of letters", {**AC, "letters": ["A", "B", "D"]}, tagged("bad"), 0.0),
    ("letter beyond", B, tagged("E"), 0.0),
    ("number", B, tagged("2"), 0.0),
    ("wrong", B, tagged("C"), 0.0),
    ("right and a wrong one", B, tagged("B, C"), 0.0),
    ("right and a wrong one, with texts", B, tagged("(B) a dog (C) vitamin B"), 0.0),
    ("right and not a wrong one", B, tagged("The answer is B, not A."), 1.0),
    ("boxed", B, tagged("$\\boxed{\\text{B}}$"), 1.0),
    ("full-width", B, tagged("Ｂ．"), 1.0),
    ("HTML", B, tagged("<b>B</b>"), 1.0),
    ("several, texts in brackets", AC, tagged("A (to sign up) and C (vitamin B)"), 1.0),
    ("several, texts behind dashes", AC, tagged("A - to sign up, C - vitamin B"), 1.0),
    ("several, boxed", AC, tagged("\\boxed{A}, \\boxed{C}"), 1.0),
    ("no tags", B, "B", 0.0),
    ("empty", B, "", 0.0),
    ("empty tags", B, "<answer></answer>", 0.0),
    ("cut-off tag", B, "<explanation>x</explanation>\n<answer>\nB", 1.0),
    ("text around", B, f"Sure! A and C.\n{tagged('B')}\nA is wrong.", 1.0),
    ("first block without letters", B, "<answer>see below</answer><answer>B</answer>", 1.0),
    ("two blocks", B, "<answer>B</answer><answer>C</answer>", 1.0),
    ("A is no article here", A, tagged("A is right"), 1.0),
    ("A with text", A, tagged("A. to sign up"), 1.0),
    ("A in a sentence", A, tagged("My choice would be A."), 1.0),
    ("several", AC, tagged("A, C"), 1.0),
    ("several, other order", AC, tagged("C, A"), 1.0),
    ("several, small", AC, tagged("a, c"), 1.0),
    ("several, run together", AC, tagged("AC"), 1.0),
    ("several, run together, small", AC, tagged("ac"), 1.0),
    ("several, run together, other order", AC, tagged("CA"), 1.0),
    ("several, and", AC, tagged("A and C"), 1.0),
    ("several, ampersand", AC, tagged("A & C"), 1.0),
    ("several, blank", AC, tagged("A C"), 1.0),
    ("several, slash", AC, tagged("A/C"), 1.0),
    ("several, brackets", AC, tagged("(A) (C)"), 1.0),
    ("several, list", AC, tagged("['A', 'C']"), 1.0),
    ("several, lines", AC, tagged("A\nC"), 1.0),
    ("several, bullets", AC, tagged("- A\n- C"), 1.0),
    ("several, with texts on lines", AC, tagged("A. to sign up\nC. vitamin B"), 1.0),
    ("several, with texts on one line", AC, tagged("A. to sign up; C. vitamin B"), 1.0),
    ("several, with texts and a word", AC, tagged("A) to sign up and C) vitamin B"), 1.0),
    ("several, sentence", AC, tagged("The correct answers are A and C."), 1.0),
    ("several, German", AC, tagged("Richtig sind A und C."), 1.0),
    ("several, French", AC, tagged("Les bonnes réponses sont A et C."), 1.0),
    ("one of two", AC, tagged("A"), 0.0),
    ("one too many", AC, tagged("A, B, C"), 0.0),
    ("all", AC, tagged("ABCD"), 0.0),
    ("100 KB of noise", B, NOISE, 0.0),
    ("100 KB of noise, then the answer", B, NOISE + tagged("B"), 1.0),
    ("100 KB of noise below the letter", B, tagged(f"B\n{NOISE}"), 1.0),
    ("100 KB of letters", B, tagged("B " * 50_000), 1.0),
    ("100 KB of small letters", {**AC, "letters": ["A", "B", "C", "D"]}, tagged("a b c d " * 12_500), 1.0),
    ("100 KB of commas", B, tagged(f"B {',' * 100_000}"), 1.0),
    ("100 KB of brackets", B, tagged("(" * 50_000 + "B" + ")" * 50_000), 1.0),
    ("100 KB of As", A, tagged("A " * 50_000), 1.0),
    ("100 KB of one word", B, tagged("B" * 100_000), 0.0),
]


@pytest.mark.parametrize(
    ("doc", "output", "score"), [row[1:] for row in CHOICE_OUTPUTS], ids=[row[0] for row in CHOICE_OUTPUTS]
)
def test_choice_outputs(doc, output, score):
    start = time.process_time()
    assert Toefl().score(doc, output) == Quality().score(doc, output) == {"exact_match": score}
    assert time.process_time() - start < 2


def test_letters_of_more_or_fewer_options():
    assert letters("E", 4) == frozenset() and letters("E", 5) == {"E"}
    assert letters("C", 2) == frozenset() and letters("AB", 2) == {"A", "B"}
    assert letters("I think it is C.", 10) == {"C"}
    assert letters("I", 10) == {"I"} and letters("A, I", 10) == {"A", "I"}


# -------------------------------------------------------------------------------------------------------------- twins


def test_squad_twin_by_hand():
    recipe, doc = Squad(), {"references": ["four", "five words"]}
    assert recipe.requests(doc) == [("The answer is:", " four"), ("The answer is:", " five words")]
    results = [(-8 * math.log(2), False), (-5 * math.log(2), True)]
    assert recipe.forced_score(doc, results) == {"exact": 1.0, "bits_per_char": pytest.approx(0.5)}
    results = [(-4 * math.log(2), False), (-15 * math.log(2), False)]
    assert recipe.forced_score(doc, results) == {"exact": 0.0, "bits_per_char": pytest.approx(1.0)}
    assert recipe.chance(doc) == {"exact": 0.0}


def test_choice_twin_by_hand():
    recipe = Toefl()
    assert recipe.requests(AC) == [("The answer is:", f" {letter}") for letter in "ABCD"]

    def acc(doc, *logprobs):
        return recipe.forced_score(doc, [(logprob, False) for logprob in logprobs])["acc"]

    assert acc(B, -9.0, -1.0, -9.0, -9.0) == 1.0
    assert acc(B, -9.0, -2.0, -9.0, -1.0) == 0.0
    assert acc(AC, -2.0, -9.0, -1.0, -8.0) == 1.0
    assert acc(AC, -2.0, -1.0, -1.0, -8.0) == 0.0
    assert acc(B, -1.0, -1.0, -1.0, -1.0) == 0.0  # a model that cannot tell gains nothing
    assert recipe.chance(B) == {"acc": 1 / 4} and recipe.chance(AC) == {"acc": 1 / 6}


@pytest.mark.parametrize("doc", [B, AC], ids=["one right", "two right"])
def test_a_random_scorer_meets_chance(doc):
    source, recipe = random.Random(0), Quality()
    runs = [recipe.forced_score(doc, [(source.random(), False) for _ in "ABCD"])["acc"] for _ in range(6000)]
    assert sum(runs) / 6000 == pytest.approx(recipe.chance(doc)["acc"], abs=0.02)


@pytest.mark.parametrize("task", TASKS)
def test_an_oracle_gets_all_right(tmp_path, task):
    recipe = bound(task, tmp_path, 2048)
    for index in range(60):
        draft = recipe.draft(2048, 0, index, True)
        doc = draft.gold(9)
        requests = recipe.requests(doc)
        assert draft.answer in {lead + continuation for lead, continuation in requests}
        assert len(draft.answer) == max(len(lead + continuation) for lead, continuation in requests)
        right = doc.get("references") or doc["letters"]
        results = [(-1.0, True) if c.strip() in right else (-50.0, False) for _, c in requests]
        scores = recipe.forced_score(doc, results)
        assert scores.get("exact", scores.get("acc")) == 1.0
        wrong = recipe.forced_score(doc, [(-51.0 - logprob, False) for logprob, _ in results])
        assert wrong.get("exact", wrong.get("acc")) == (0.0 if len(right) < 4 else 1.0)
        assert wrong.get("bits_per_char", 1.0) > scores.get("bits_per_char", 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_starts_at_a_token_of_its_own(kind):
    tok = tokenizer(kind)
    for recipe, doc in ((Squad(), SQUAD), (Toefl(), AC)):
        for lead, continuation in recipe.requests(doc):
            context = tok.encode(f"Answer:\n{lead}")
            assert tok.encode(f"Answer:\n{lead}{continuation}")[: len(context)] == context


# ----------------------------------------------------------------------------------------------------------- as tasks


@pytest.fixture
def lm():
    model = StandIn("digits")
    set_active_lm(model)
    return model


@pytest.mark.parametrize("name", FILE)
def test_leaves_end_to_end(tmp_path, lm, name):
    given = write(tmp_path / "my data", name, rows(name))
    task = build(leaf(f"frontier_{name}_4k", **given), lm, chat=True, limit=4)
    twin = build(leaf(f"forced_frontier_{name}_4k", **given), lm, chat=True, limit=4)
    assert task.config.metadata["data"]["source"] == f"{FILE[name]} in my data"
    assert str(tmp_path) not in task.config.metadata["data"]["source"]
    for i in range(4):
        doc, other = task.eval_docs[i], twin.eval_docs[i]
        assert doc["tokens"] == other["tokens"] == 4096
        assert doc["question"] == other["question"] and task.recipe.evidence(doc) == twin.recipe.evidence(other)
        (metric,) = {"squad": ["f1"]}.get(name, ["exact_match"])
        assert task.process_results(doc, [task.doc_to_target(doc)]) == {metric: 1.0}
    for instance in twin.instances:
        context, continuation = instance.args
        assert isinstance(context, SharedPrompt)
        assert context.endswith("The answer is:") and continuation.startswith(" ")
        assert lm.tokens(context[: context.shared]) == 4096


def test_a_leaf_without_data_drops_out(lm, offline):
    for name in FILE:
        task = build(leaf(f"frontier_{name}_4k"), lm)
        assert task.config.metadata["skipped"].startswith("no ")
        assert "qa_folder" in task.config.metadata["skipped"] and "data" not in task.config.metadata
    assert len(offline) == 1


def test_fewer_documents_than_samples(tmp_path, lm):
    given = write(tmp_path, "squad", rows("squad", 20, 150, 200))
    task = build(leaf("frontier_squad_4k", **given), lm, limit=1)
    assert len(task.eval_docs) == 80
