"""Damaged caches: what is in them is refused or made again; no other text, number or traceback comes of it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_damage import STRANGE, clear, spoil

from lm_eval_sparse import intact, sealed
from lm_eval_sparse.frontier import qa, qa_data, store
from lm_eval_sparse.frontier.squad import Squad
from lm_eval_sparse.frontier.store import DocumentStore
from lm_eval_sparse.model import embedded
from lm_eval_sparse.results import files

SEEDS = range(100)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_warned", False)
    return tmp_path / "cache"


# --- documents -------------------------------------------------------------------------------------------------------

DOCS = {i: {"index": i, "input": f"text {i} é " * 40, "target": str(i), "tokens": 100 + i} for i in range(4)}
OURS = "f" * 64


def filled(fingerprint: str = OURS) -> DocumentStore:
    made = DocumentStore("leaf", fingerprint)
    for doc in DOCS.values():
        made.add(doc)
    return made


@pytest.mark.parametrize("seed", SEEDS)
def test_documents(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    path = filled().path
    outside = Path(__file__).with_name("damage.py").read_bytes()
    spoil(path, seed)
    again = DocumentStore("leaf", OURS)
    known = again.load()
    assert known.items() <= DOCS.items()  # those that are left, as they were
    for index in DOCS.keys() - known.keys():
        again.add(DOCS[index])
    if again._usable:
        assert DocumentStore("leaf", OURS).load() == DocumentStore("leaf", OURS).load() == DOCS
    # Said once: a line without an end at the next start, when it is known that nobody is writing it.
    assert len(caplog.records) <= 1
    assert Path(__file__).with_name("damage.py").read_bytes() == outside


@pytest.mark.parametrize("line", STRANGE, ids=lambda line: repr(line[:20]))
def test_a_strange_line(line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    made = filled()
    made.path.write_bytes(line + b"\n" + made.path.read_bytes())
    assert DocumentStore("leaf", OURS).load() == DOCS
    assert "1 of the lines" in caplog.text and str(made.path) in caplog.text


def test_another_answer_and_lines_of_other_documents(caplog: pytest.LogCaptureFixture) -> None:
    """Well-formed all of them; only the checksum tells. Lines of another file fit that one only."""
    made = filled()
    lines = made.path.read_bytes().splitlines()
    other = filled("f" * 24 + "0" * 40)  # the same name of a file
    assert other.path == made.path
    theirs = made.path.read_bytes().splitlines()[len(lines) :]
    forged = json.dumps({**json.loads(lines[2]), "target": "7"}).encode()
    made.path.write_bytes(b"\n".join([lines[0], lines[1].replace(b'"1"', b'"2"'), forged, theirs[3], b""]))
    assert DocumentStore("leaf", OURS).load() == {0: DOCS[0]}
    assert "3 of the lines" in caplog.text


def test_a_line_that_is_being_written_is_let_be(caplog: pytest.LogCaptureFixture) -> None:
    made = filled()
    whole = made.path.read_bytes()
    made.path.write_bytes(whole[:-30])
    assert sorted(DocumentStore("leaf", OURS).load()) == [0, 1, 2]
    assert made.path.read_bytes() == whole[:-30] and not caplog.records


def test_appending_goes_on_while_damage_is_blanked_out() -> None:
    made, late = filled(), {**DOCS[0], "index": 9}
    made.path.write_bytes(b"torn\n" + made.path.read_bytes())
    reader, writer = DocumentStore("leaf", OURS), DocumentStore("leaf", OURS)
    blank = reader._blank
    reader._blank = lambda broken: (writer.add(late), blank(broken))  # between reading and mending
    reader.load()
    assert DocumentStore("leaf", OURS).load() == {**DOCS, 9: late}
    assert b"torn" not in made.path.read_bytes()


def test_a_file_without_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    made = filled()
    monkeypatch.setattr(store, "MOST_LINE", 2000)
    made.path.write_bytes(b"x" * 9000 + b"\n" + made.path.read_bytes())
    assert DocumentStore("leaf", OURS).load() == DOCS
    os.truncate(made.path, store.MOST_BYTES + 1)  # a hole: takes no space
    assert DocumentStore("leaf", OURS).load() == {}
    assert "more than 4,294,967,296 bytes" in caplog.text


def test_folders_of_the_cache_may_be_links(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    cache.mkdir()
    (cache / "docs").symlink_to(tmp_path / "disk")
    path = filled().path
    assert DocumentStore("leaf", OURS).load() == DOCS and path.resolve().parent == tmp_path / "disk"


# --- copies of data sets, costs --------------------------------------------------------------------------------------

ROWS = [
    {"context": f"Passage {i} has {'some words and ' * (20 + i)}no more.", "question": f"What is {i}?",
     "answers": {"text": [f"number {i}"]}}
    for i in range(12)
]  # fmt: skip


def count(text: str) -> int:
    return len(text.split())


def squad(monkeypatch: pytest.MonkeyPatch, task: type[Squad] = Squad) -> tuple[Any, list[str]]:
    """The data and the prompts, as a new process finds them."""
    monkeypatch.setattr(qa_data, "_known", {})
    monkeypatch.setattr(qa, "_corpora", {})
    monkeypatch.setattr(qa_data, "_hub_rows", lambda kind, hub: ROWS)
    recipe = task()
    recipe.find({})
    number = recipe.bind(512, 0, count, "words")
    return recipe._data, [recipe.draft(512, 0, index, False).message(3, "") for index in range(number)]


@pytest.mark.parametrize("name", ["squad", "costs"])
@pytest.mark.parametrize("seed", SEEDS)
def test_qa(name: str, seed: int, monkeypatch: pytest.MonkeyPatch, cache: Path, caplog: Any) -> None:
    first = squad(monkeypatch)
    (path,) = (cache / "qa").glob(f"{name}-*")
    whole = path.read_bytes()
    how = spoil(path, seed)
    stood = path.is_file() and not path.is_symlink()
    spoilt = path.read_bytes() if stood else None
    caplog.clear()
    assert squad(monkeypatch) == first
    if how != "gone" and spoilt != whole:
        assert "is not as it was written" in caplog.text
    assert len(caplog.records) <= 2
    if not path.is_dir():
        assert path.read_bytes() == whole
        caplog.clear()
        assert squad(monkeypatch) == first and not caplog.records


@pytest.mark.parametrize(
    "contexts", [{"a": 1}, [[1]] * 12, [True] * 12, ["1"] * 12, [1] * 11, None], ids=lambda value: str(value)[:12]
)
def test_costs_of_another_kind(contexts: Any, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Even where the checksum is right."""
    first = squad(monkeypatch)
    (path,) = (cache / "qa").glob("costs-*")
    whole = json.loads(path.read_bytes())
    monkeypatch.setattr(sealed, "fits", lambda place, line: True)
    path.write_bytes(sealed.seal("", {"contexts": contexts, "questions": whole["questions"]}))
    assert squad(monkeypatch) == first
    assert json.loads(path.read_bytes())["contexts"] == whole["contexts"]


@pytest.mark.parametrize(
    "group",
    [
        {"context": None, "questions": []},
        {"context": "a", "questions": {"a": 1}},
        {"context": "a", "questions": [[1, [], ["x"]]]},
        {"context": "a", "questions": [["q", [], []]]},
        {"context": "a", "questions": [["q", [], [True]]]},
        {"context": "a", "questions": [["q", ["one", "two"], ["A"]]]},
        {"questions": [["q", [], ["x"]]]},
        [],
    ],
    ids=str,
)
@pytest.mark.parametrize("hub", ["rajpurkar/squad_v2", "another/one"])
def test_a_copy_of_another_kind(group: Any, hub: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """The checksum is no secret, and a copy of another data set has a right one."""
    first = squad(monkeypatch)
    (path,) = (cache / "qa").glob("squad-*")
    good = {"context": "a", "questions": [["q", [], ["x"]]]}
    body = json.dumps(group if hub.startswith("raj") else good).encode()
    head = {"sha256": hashlib.sha256(body).hexdigest(), "hub": hub}
    path.write_bytes(json.dumps(head).encode() + b"\n" + body)
    assert squad(monkeypatch) == first


# --- the default model -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """`ensure` with small files and without pip; yields a list that grows by one each time the folder is made."""
    made: list[int] = []

    def fetch(raw: Path) -> tuple[Path, str]:
        return raw, "nowhere"

    def convert(gguf: Path, folder: Path) -> dict[str, str]:
        made.append(1)
        for name, content in MODEL.items():
            (folder / name).write_bytes(content)
        return {}

    monkeypatch.setattr(embedded, "_fetch", fetch)
    monkeypatch.setattr(embedded, "_convert", convert)
    yield made


MODEL = {
    "model.safetensors": random.Random(0).randbytes(5000),
    "config.json": b'{\n "num_hidden_layers": 30,\n "hidden_size": 64\n}\n',
    "tokenizer.json": json.dumps({"model": {"vocab": {"a": 1, "b": 2}}}).encode(),
}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_default_model(seed: int, model: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    folder = embedded.ensure()
    good = content(folder)
    name = random.Random(seed).choice(sorted(good))
    spoil(folder / name, seed)
    spoilt = {p.name: p.read_bytes() if p.is_file() and not p.is_symlink() else None for p in folder.iterdir()} != good
    capfd.readouterr()
    assert embedded.ensure() == folder
    found = content(folder)
    # What is in the record beside hashes decides nothing; where only that differs, nothing needs to be done.
    if name != "lm_eval_sparse.json" or len(model) == 2:
        assert found == good and len(model) == 1 + spoilt
    assert {name: found[name] for name in MODEL} == MODEL
    said = capfd.readouterr().err.splitlines()
    assert sum("is damaged" in line for line in said) == len(model) - 1


PLANTED = (
    "pytorch_model.bin", "adapter_config.json", "modeling_x.py", "model-00001-of-00002.safetensors", ".hidden",
    "model.safetensors.index.json", "generation_config.json", "chat_template.jinja", "added_tokens.json",
)  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_file(name: str, model: list[int]) -> None:
    folder = embedded.ensure()
    (folder / name).write_text("{}")
    assert not (embedded.ensure() / name).exists() and len(model) == 2


def aged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let time pass, so that the folder is stamped, and stamp it."""
    now = intact.time.time_ns
    monkeypatch.setattr(intact.time, "time_ns", lambda: now() + 10**9)
    assert embedded.ensure() == folder
    assert folder.with_name(f".{folder.name}.stamp").is_file()


def test_hashed_once(model: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded.ensure()
    assert not folder.with_name(f".{folder.name}.stamp").exists()  # too young: a change might not show
    aged(folder, monkeypatch)
    monkeypatch.setattr(intact, "sha256", None)
    assert embedded.ensure() == folder


def test_times_put_back_do_not_deceive(model: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded.ensure()
    aged(folder, monkeypatch)
    weights = folder / "model.safetensors"
    before = weights.stat()
    intact.time.sleep(0.02)  # a tick of the clock of files
    with weights.open("r+b") as file:
        file.write(bytes([MODEL["model.safetensors"][0] ^ 1]))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = weights.stat()
    same = ("st_size", "st_mtime_ns", "st_ino")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]
    embedded.ensure()
    assert weights.read_bytes() == MODEL["model.safetensors"] and len(model) == 2


@pytest.mark.parametrize("seed", SEEDS[:20])
def test_a_damaged_stamp(seed: int, model: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded.ensure()
    aged(folder, monkeypatch)
    spoil(folder.with_name(f".{folder.name}.stamp"), seed)
    assert embedded.ensure() == folder and len(model) == 1


def test_a_cache_that_cannot_be_written(model: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, who passes all permissions: the system's answer is made up."""
    folder = embedded.ensure()
    aged(folder, monkeypatch)
    folder.with_name(f".{folder.name}.stamp").unlink()

    def refuse(*args: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files, "write_whole", refuse)
    assert embedded.ensure() == folder and len(model) == 1


def test_what_is_in_the_way_is_cleared(model: list[int], tmp_path: Path) -> None:
    """A folder that is a file or a link, and leftovers that are links: what they lead to stays."""
    folder = embedded.ensure()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    part = folder.with_name(f".{folder.name}.part")
    for obstacle in (folder, part):
        for put in (lambda path: path.write_text("x"), lambda path: path.symlink_to(tmp_path / "mine")):
            clear(obstacle)
            put(obstacle)
            clear(folder) if obstacle == part else None
            assert content(embedded.ensure()).items() >= MODEL.items()
            assert (tmp_path / "mine" / "file").read_text() == "mine"


def test_nobody_sees_half_a_folder(model: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is made again the old one stays whole in its place, until it goes in one step."""
    folder = embedded.ensure()
    (folder / "config.json").write_bytes(b"{}")
    damaged = content(folder)
    seen, replace = [], os.replace

    def watch(source: Any, target: Any) -> None:
        if folder in (Path(source), Path(target)):
            seen.append(content(folder) if folder.exists() else None)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    embedded.ensure()
    assert seen == [damaged, None] and content(folder).items() >= MODEL.items()


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("filelock").setLevel(logging.WARNING)
