"""Documents: the same whoever makes them, kept on disk, safe under kills and several writers."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from frontier_common import StandIn, build, leaf

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.frontier import niah, store
from lm_eval_sparse.frontier.store import DocumentStore
from lm_eval_sparse.protocol import set_active_lm

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(folder))
    monkeypatch.setattr(store, "_warned", False)
    return folder / "docs"


@pytest.fixture
def lm():
    model = StandIn("digits")
    set_active_lm(model)
    return model


@pytest.fixture
def made(monkeypatch):
    """Indices of the documents that were written (not read) since, in order."""
    indices = []
    draft = niah.Niah.draft

    class Spy:
        def __init__(self, inner, index):
            self.inner, self.index = inner, index

        def __getattr__(self, name):
            if name == "gold":
                indices.append(self.index)
            return getattr(self.inner, name)

    monkeypatch.setattr(
        niah.Niah,
        "draft",
        lambda self, length, seed, index, forced: Spy(draft(self, length, seed, index, forced), index),
    )
    return indices


def docs(task, **kwargs):
    return dict(task.doc_iterator(**kwargs))


# --------------------------------------------------------------------------------------------------------- determinism


def test_documents_are_independent_of_limit_order_rank_and_world_size(lm, monkeypatch, tmp_path):
    expected = docs(build(leaf(), lm, limit=6), limit=6)
    seen = {}
    for run, (world, limit, samples) in enumerate(
        [(1, 3, None), (4, 6, None), (1, None, [5, 0, 3]), (2, None, [4, 1, 2])]
    ):
        monkeypatch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path / f"other{run}"))  # nothing to be read
        for rank in range(world):
            task = build(leaf(), lm, limit=limit, samples=samples, rank=rank, world_size=world)
            for position, doc in docs(task, limit=limit, samples=samples, rank=rank, world_size=world).items():
                index = samples[position] if samples else position
                assert doc == expected[index]
                seen.setdefault(run, set()).add(index)
    assert seen == {0: {0, 1, 2}, 1: set(range(6)), 2: {0, 3, 5}, 3: {1, 2, 4}}


def test_ranks_share_the_documents_without_overlap_and_make_only_their_own(lm, made):
    tasks = [build(leaf(), lm, limit=7, rank=rank, world_size=3) for rank in range(3)]
    own = [[i.doc_id for i in task.instances] for task in tasks]
    assert own == [[0, 3, 6], [1, 4], [2, 5]]
    assert sorted(made) == list(range(7)) and made[:3] == [0, 3, 6]
    assert [list(docs(t, limit=7, rank=r, world_size=3)) for r, t in enumerate(tasks)] == own


def test_documents_are_made_lazily(lm, made):
    task = leaf()
    assert len(task.eval_docs) == 100 and made == []
    assert task.fewshot_docs() is None  # lm-eval would list them all
    build(task, lm, limit=2)
    assert made == [0, 1]


def test_samples_beyond_the_leaf_are_refused(lm):
    with pytest.raises(UserError, match="--samples takes 0 to 99"):
        build(leaf(), lm, samples=[0, 100])
    assert len(build(leaf(samples=101), lm, samples=[100]).instances) == 1


@pytest.mark.parametrize("metadata", [{"samples": 0}, {"samples": "many"}, {"seed": "x"}, {"seed": 1.5}])
def test_bad_metadata_is_one_clear_line(metadata):
    with pytest.raises(UserError, match=next(iter(metadata))):
        leaf(**metadata)


def test_metadata_of_others_is_ignored_but_seed_counts(lm):
    plain = docs(build(leaf(), lm, limit=1), limit=1)[0]
    extra = {
        "method": "flexprefill",
        "sparsity": 0.9,
        "pretrained": None,
        "length": 7,
        "version": 9,
        "config": "unknown",
    }
    task = build(leaf(**extra), lm, limit=1)
    assert docs(task, limit=1)[0] == plain
    assert task.config.metadata["length"] == 4096 and task.VERSION == task.config.metadata["version"] == 2
    assert docs(build(leaf(seed="7"), lm, limit=1), limit=1)[0]["keys"] != plain["keys"]


def test_the_twin_has_the_same_needles(lm):
    one = docs(build(leaf(), lm, limit=2), limit=2)
    twin = docs(build(leaf("forced_frontier_niah_4k"), lm, limit=2), limit=2)
    for i in range(2):
        assert one[i]["keys"] == twin[i]["keys"] and one[i]["values"] == twin[i]["values"]
        entries = [{x for x in doc["input"].splitlines() if x.startswith("Stored")} for doc in (one[i], twin[i])]
        assert min(entries, key=len) <= max(entries, key=len)


# -------------------------------------------------------------------------------------------------------------- cache


def test_documents_are_made_once_and_resumed(lm, made, cache):
    first = docs(build(leaf(), lm, limit=3), limit=3)
    (file,) = cache.iterdir()
    assert [json.loads(line)["index"] for line in file.read_text().splitlines()] == [0, 1, 2]
    made.clear()
    again = docs(build(leaf(), lm, limit=5), limit=5)
    assert made == [3, 4]
    assert {i: again[i] for i in range(3)} == first


def test_a_kill_at_any_moment_costs_one_document(lm, made, cache):
    first = docs(build(leaf(), lm, limit=3), limit=3)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in (last, last + 1, last + 1000, len(whole) - 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        made.clear()
        assert docs(build(leaf(), lm, limit=4), limit=4).items() >= first.items()
        assert made == ([3] if cut == len(whole) - 1 else [2, 3])  # only the line's end was missing: still whole
        made.clear()
        build(leaf(), lm, limit=4)
        assert made == []  # what was appended after the torn line can be read


def test_garbage_lines_are_skipped(lm, made, cache):
    first = docs(build(leaf(), lm, limit=2), limit=2)
    (file,) = cache.iterdir()
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([b"\xff\xfe", b"[1]", b"null", b'{"index": 0}', b"\0" * 50, lines[1], lines[0], b""]))
    made.clear()
    assert docs(build(leaf(), lm, limit=2), limit=2) == first and made == []


def test_another_prompt_means_another_file(lm, cache):
    build(leaf(), lm, limit=1)
    assert len(list(cache.iterdir())) == 1
    build(leaf(method="x", sparsity=0.5), lm, limit=1)
    assert len(list(cache.iterdir())) == 1
    variants = [
        lambda: build(leaf(seed=1), lm, limit=1),
        lambda: build(leaf("forced_frontier_niah_4k"), lm, limit=1),
        lambda: build(leaf("frontier_niah_8k"), lm, limit=1),
        lambda: build(leaf(), lm, limit=1, chat=True),
        lambda: build(leaf(), lm, limit=1, system_instruction="Be brief."),
    ]
    for number, variant in enumerate(variants, 2):
        variant()
        assert len(list(cache.iterdir())) == number
    other = StandIn("bpe")
    set_active_lm(other)
    build(leaf(), other, limit=1)
    assert len(list(cache.iterdir())) == len(variants) + 2
    tight = StandIn("digits", max_length=4200)
    set_active_lm(tight)
    build(leaf(), tight, limit=1)
    assert len(list(cache.iterdir())) == len(variants) + 3


def test_changed_code_does_not_meet_old_documents(monkeypatch, tmp_path):
    """Wording that no bare document shows, such as a story's sentences, is in the source files."""
    from lm_eval_sparse.frontier import sources, story
    from lm_eval_sparse.frontier.story_multihop import StoryMultihop

    before = sources.sources(StoryMultihop)
    copy = tmp_path / "frontier"
    copy.mkdir()
    for path in Path(story.__file__).parent.glob("*.py"):
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(sources, "__file__", str(copy / "sources.py"))
    sources.sources.cache_clear()
    assert sources.sources(StoryMultihop) == before  # content counts, not the place
    (copy / "story.py").write_text((copy / "story.py").read_text().replace("trombone", "tuba"))
    sources.sources.cache_clear()
    changed = sources.sources(StoryMultihop)
    sources.sources.cache_clear()
    assert changed != before


def test_a_changed_wording_does_not_meet_old_documents(lm, cache, monkeypatch):
    build(leaf(), lm, limit=1)
    monkeypatch.setattr(niah, "_INTRO", "Another introduction.")
    task = build(leaf(), lm, limit=1)
    assert "Another introduction." in task.instances[0].args[0]


@pytest.mark.parametrize("obstacle", ["file in the way", "read-only"])
def test_an_unusable_cache_is_one_warning(lm, made, cache, caplog, obstacle):
    if obstacle == "file in the way":
        cache.parent.write_text("not a folder")
    else:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        cache.mkdir(parents=True)
        cache.chmod(0o500)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            task = build(leaf(), lm, limit=3)
    assert len(task.instances) == 3 and made == [0, 1, 2] * 2
    assert sum("LM_EVAL_SPARSE_CACHE" in record.message for record in caplog.records) == 1


WRITER = """
import sys
from lm_eval_sparse.frontier.store import DocumentStore
who = int(sys.argv[1])
store = DocumentStore("shared", "f" * 64)
for i in range(150):
    store.add({"index": (i * 7 + who * 50) % 150, "input": str(i) * 9000, "target": "é", "tokens": 1})
"""


def test_processes_may_write_at_once(cache):
    command = [sys.executable, "-c", WRITER]
    writers = [subprocess.Popen([*command, str(who)], cwd=ROOT) for who in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    written = DocumentStore("shared", "f" * 64)
    # A line may be empty: a writer that sees another's half-written line starts a new one to be safe.
    lines = [line for line in written.path.read_bytes().split(b"\n") if line]
    assert len(lines) == 450 and all(json.loads(line)["target"] == "é" for line in lines)
    assert sorted(written.load()) == list(range(150))


def test_two_tasks_at_once_make_the_same_documents(lm, cache):
    one, two = leaf(), leaf()
    build(one, lm, limit=1)
    build(two, lm, limit=1)
    for index in (3, 1, 2):  # both see an empty cache beyond document 0 and write all three
        one.eval_docs[index]
    for index in (2, 3, 1):
        two.eval_docs[index]
    (file,) = cache.iterdir()
    lines = file.read_text().splitlines()
    assert len(lines) == 7 and len(set(lines)) == 4


def test_a_hundred_documents_load_fast(lm, cache):
    import time

    build(leaf(), lm, limit=100)
    fresh = leaf()
    start = time.process_time()
    build(fresh, lm, limit=100)
    assert len(fresh.instances) == 100
    assert time.process_time() - start < 2  # 0.1 s on a quiet machine, and several seconds to make them


def test_documents_of_an_older_version_are_removed_and_told_of_once(lm, cache, caplog):
    cache.mkdir(parents=True, exist_ok=True)
    end = "0123456789abcdef01234567.jsonl"
    older = [f"niah-4096-{end}", f"niah-8192-{end}", f"niah-v1-4096-{end}", f"forced_vt-4096-{end}"]
    others = [f"niah-v2-8192-{end}",
              f"niah-v3-4096-{end}", f"my_niah-4096-{end}", "niah-4096-notes.jsonl",
              f"niah-4096-{end}.bak"]  # fmt: skip
    for name in older + others:
        (cache / name).write_text("{}\n")
    (cache / f"niah-64-{end}").mkdir()  # no file: left as it is
    caplog.set_level(logging.CRITICAL, "lm_eval_sparse")  # as under `show`, where nobody would hear of it
    build(leaf(), lm, limit=1)
    assert set(older) < {path.name for path in cache.iterdir()}
    caplog.set_level(logging.WARNING, "lm_eval_sparse")
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            build(leaf(), lm, limit=1)
    left = {path.name for path in cache.iterdir()}
    assert not left & set(older) and set(others) < left and f"niah-64-{end}" in left
    told = [record.getMessage() for record in caplog.records if "earlier versions" in record.getMessage()]
    assert told == [
        "documents of earlier versions of forced_vt, niah were in the cache (4 files, removed); they are made anew"
    ]
