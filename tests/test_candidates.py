"""Answers to one prompt side by side: each gets what it gets alone, to the bit, and what all get in turn."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import families
import pytest
import torch
from lm_eval.api.instance import Instance
from small_lms import score, sparse
from tiny import family, words

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.model import side_by_side
from lm_eval_sparse.model.side_by_side import SideBySide
from lm_eval_sparse.protocol import SharedPrompt
from lm_eval_sparse.runtime import candidates
from lm_eval_sparse.runtime.candidates import Candidates
from lm_eval_sparse.testing import bench

PROMPTS = [words(9, 90), words(7, 73)]
#: The longest one goes over more than a tile.
ANSWERS = (" apple", " river stone cloud", " river stone", " unusual zebra, said he", f" {words(3, 7)}")
PAIRS = [(prompt, answer) for prompt in PROMPTS for answer in ANSWERS]
HALF = torch.bfloat16
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "vertical_slash+snapkv": {"sparsity": 0.6},
    "quest": {"sparsity": 0.6},
    "ada_snapkv+quest": {"sparsity": 0.5},  # heads hold different numbers of tokens
    "h2o+quest": {"sparsity": 0.5, "every": 3},
    "oracle_topk": {"sparsity": 0.6},  # knows no shared beginnings
    "twilight:quest": {"sparsity": 0.6},
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def engine(own: SideBySide) -> Candidates:
    """Of a model in fp32 on a CPU, too."""
    lm = own.lm
    decoder, reason = lm.decoding.get()
    assert decoder is not None, reason
    softmax, config = lm.forward.log_softmax, lm.model.config
    return Candidates(decoder.call, softmax, config, lm.runtime, lm.device, 16, own._copies)


def figures(answer: Any) -> dict[str, Any]:
    """What a response carries but for the kernel that computed it."""
    found = {}
    for phase in ("prefill", "eviction", "decode"):
        for name, value in answer.stats[phase].items():
            if name != "backends":
                found |= {
                    f"{phase} {name} {k}": v for k, v in (value if isinstance(value, dict) else {"": value}).items()
                }
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shared", [True, False])
def test_as_alone_and_as_one_after_the_other(method: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shared and method in ("h2o+quest", "oracle_topk", "twilight:quest"):
        return  # never share
    monkeypatch.setattr(side_by_side, "SHARED_ON_CPU", shared)
    options = {"method": method, **METHODS[method]}
    half = sparse(bench.model(HALF), **options)
    together = score(half, PAIRS)
    assert half.scorer.side_by_side.get() is not None
    assert half.scorer.side_by_side.alone is None
    for pair, answer in zip(PAIRS, together, strict=True):
        (own,) = score(half, [pair])
        assert tuple(own) == tuple(answer), pair[1]
    assert half.report()["phases"]["decode"]["loops"]["side_by_side"] > 0

    one_by_one = score(sparse(bench.model(), **options), PAIRS)
    monkeypatch.setattr(SideBySide, "_make", engine)
    beside = score(sparse(bench.model(), **options), PAIRS)
    for one, other in zip(one_by_one, beside, strict=True):
        assert abs(one[0] - other[0]) < (1e-2 if "oracle" in method else 1e-4)  # whose scores may be nearly equal
        assert one[1] == other[1]
        assert figures(one) == pytest.approx(figures(other), abs=1e-12)


@pytest.mark.parametrize("name", ["gemma3", "qwen2", "gpt2"])
def test_families(name: str) -> None:
    """Windows, biases, positions that are learnt."""
    lm = sparse(family(name).to(HALF))
    assert lm.scorer.side_by_side.get() is not None, lm.scorer.side_by_side.reason
    together = score(lm, PAIRS)
    for pair, answer in list(zip(PAIRS, together, strict=True))[::3]:
        assert tuple(score(lm, [pair])[0]) == tuple(answer)


def test_more_answers_than_copies_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers beyond what memory holds at once, and more than a tile has rows, come in turn."""
    answers = [f" {words(seed, 1 + seed % 3)}" for seed in range(40)]
    pairs = [(PROMPTS[1], answer) for answer in answers]
    lm = sparse(bench.model(HALF), method="oracle_topk", sparsity=0.5)
    wanted = score(lm, pairs)
    monkeypatch.setattr(SideBySide, "_copies", lambda self, prompt, answer: 3)
    few = sparse(bench.model(HALF), method="oracle_topk", sparsity=0.5)
    found = score(few, pairs)
    assert list(map(tuple, found)) == list(map(tuple, wanted))
    assert figures(found[0]) == figures(wanted[0])


def test_shared_prompts_side_by_side() -> None:
    """What a task says to be answer text is scored beside it, in steps of decoding."""
    lm = sparse(bench.model(HALF), method="quest", sparsity=0.6)
    prompt = PROMPTS[0]
    context = SharedPrompt(f"{prompt} {words(5, 6)}", shared=len(prompt))
    answers = score(lm, [(context, answer) for answer in ANSWERS])
    assert all(tuple(score(lm, [(context, a)])[0]) == tuple(b) for a, b in zip(ANSWERS, answers, strict=True))
    assert answers[0].stats["decode"]["calls"]["sparse"] > 0


def test_rows_that_round_otherwise_run_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    logging.disable(logging.NOTSET)
    lm = sparse(bench.model(HALF))
    wanted = [tuple(score(lm, [pair])[0]) for pair in PAIRS]
    own = lm.scorer.side_by_side
    own._checked, made = False, Candidates.run

    def run(self: Candidates, answers: Any, first: Any, counts: Any) -> Any:
        found = made(self, answers, first, counts)
        return [(logprob + 1e-3 * (len(answers) > 1), hit) for logprob, hit in found]

    monkeypatch.setattr(Candidates, "run", run)
    found = score(lm, PAIRS)
    assert list(map(tuple, found)) == wanted
    assert "round differently for several answers" in caplog.text
    assert own.alone in lm.report()["phases"]["decode"]["loop_reasons"]


def test_an_answer_of_no_tokens_is_refused() -> None:
    lm = sparse(bench.model(HALF))
    with pytest.raises(UserError, match="nothing to score"):
        score(lm, [(PROMPTS[0], " apple"), (PROMPTS[0], "")])


def test_what_is_looked_at_stays_the_same() -> None:
    """With `diagnose` answers are looked at one at a time, and stay what they are."""
    plain = score(sparse(bench.model(HALF), method="quest", sparsity=0.6), PAIRS)
    lm = sparse(bench.model(HALF), method="quest", sparsity=0.6, diagnose=1)
    assert list(map(tuple, score(lm, PAIRS))) == list(map(tuple, plain))
    assert lm.report()["phases"]["decode"]["diagnostics"]["samples"] == 1


def test_storage_is_used_again() -> None:
    """The next prompt takes no more room than the one before it."""
    lm = sparse(bench.model(HALF), method="quest", sparsity=0.6)
    own = lm.scorer.side_by_side.get()
    assert own is not None
    sizes = []
    run = candidates.Candidates.run

    def noted(self: Candidates, *args: Any) -> Any:
        found = run(self, *args)
        sizes.append([len(pool.keys) for pool in self.pools])
        return found

    candidates.Candidates.run = noted
    try:
        score(lm, [(prompt, answer) for prompt in (PROMPTS[0], words(4, 90)) for answer in ANSWERS])
    finally:
        candidates.Candidates.run = run
    assert sizes[0] == sizes[-1]


def test_long_contexts_are_read_once_with_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context of any task: what lm-eval's own way of encoding gives, whatever follows."""
    lm = sparse(bench.model(HALF))
    scorer, read = lm.scorer, []
    encode = type(lm).tok_encode
    monkeypatch.setattr(
        type(lm), "tok_encode", lambda self, text, *a, **k: read.append(len(text)) or encode(self, text, *a, **k)
    )
    context = "\n".join(words(seed, 60) for seed in range(20))
    tails = [" apple", "\nriver", "s", " ", f" {words(3, 5)}", ".", "\n\n"]
    found = [scorer._encode(context, tail) for tail in tails]
    assert sum(read) < 3 * len(context) + len(tails) * 1200
    assert found == [lm._encode_pair(context, tail) for tail in tails]


def of_documents(pairs: list[tuple[str, str]], documents: list[int]) -> list[Any]:
    kind = "loglikelihood"
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=0, metadata=("t", number, 1))
        for pair, number in zip(pairs, documents, strict=True)
    ]


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("method", ["ada_snapkv+quest", "h2o"])
def test_documents_that_share_a_prompt(method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read once, and what is measured of a document is what is measured of it alone."""
    lm = sparse(bench.model(dtype), method=method, sparsity=0.5, **({"every": 3} if method == "h2o" else {}))
    pairs, documents = [(PROMPTS[1], answer) for answer in ANSWERS], [0, 0, 1, 2, 1]
    read: list[int] = []
    prefill = type(lm.scorer.beginnings).prefill
    monkeypatch.setattr(type(lm.scorer.beginnings), "prefill", lambda *args: read.append(1) or prefill(*args))
    together = lm.loglikelihood(of_documents(pairs, documents), disable_tqdm=True)
    assert len(read) == 1
    assert lm.report()["prompts"] == 3
    for number in range(3):
        own = [place for place, document in enumerate(documents) if document == number]
        alone = lm.loglikelihood(of_documents([pairs[place] for place in own], [number] * len(own)), disable_tqdm=True)
        for place, answer in zip(own, alone, strict=True):
            assert tuple(answer) == tuple(together[place])
            assert figures(answer) == figures(together[place])


def test_answers_that_do_not_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is made for each answer's own length, for so many at once; where memory runs out, for half as many."""
    monkeypatch.setattr(side_by_side, "SHARED_ON_CPU", True)
    answers = [f" {words(1, 12)}", *(f" {words(seed, 2)}" for seed in range(60))]
    pairs = [(PROMPTS[1], answer) for answer in answers]
    lm = sparse(bench.model(HALF), method="quest", sparsity=0.5)
    wanted, room = score(lm, pairs), []
    took = candidates.Candidates._room

    def noted(held: Any, tokens: Any, pages: Any) -> Any:
        room.append(int(tokens.sum()))
        return took(held, tokens, pages)

    monkeypatch.setattr(candidates.Candidates, "_room", staticmethod(noted))
    assert list(map(tuple, score(lm, pairs))) == list(map(tuple, wanted))
    heads, page = 2, 8
    lengths = [len(lm.tok_encode(answer)) for answer in answers]
    assert max(room) <= heads * sum(length + 2 * page for length in lengths)
    monkeypatch.setattr(candidates, "MOST_HELD", 100)
    room.clear()
    assert list(map(tuple, score(lm, pairs))) == list(map(tuple, wanted))
    assert max(room) <= heads * 100 * 2
    monkeypatch.setattr(candidates, "MOST_HELD", 10**6)
    run, failed = candidates.Candidates._run_some, []

    def full(self: Candidates, some: Any, counts: Any) -> Any:
        if len(some) > 20:
            failed.append(len(some))
            raise torch.OutOfMemoryError("out of memory")
        return run(self, some, counts)

    monkeypatch.setattr(candidates.Candidates, "_run_some", full)
    assert list(map(tuple, score(lm, pairs))) == list(map(tuple, wanted))
    assert failed[0] > 40
    assert failed[1:] == [failed[0] // 2] * (failed[0] // 2 > 20)


@pytest.mark.parametrize(
    ("name", "routed"), [("qwen3_moe", True), ("mixtral", True), ("llama", False), ("gpt2", False)]
)
def test_rows_that_are_routed_to_experts_run_alone(name: str, routed: bool) -> None:
    lm = sparse(families.build(name).to(HALF))
    own = lm.scorer.side_by_side
    assert own.get() is not None
    assert (own.alone is not None) == routed
    score(lm, PAIRS[:3])
    assert (own.alone in lm.report()["phases"]["decode"].get("loop_reasons", {})) == routed


def test_answers_that_no_method_can_change_are_said(caplog: pytest.LogCaptureFixture) -> None:
    logging.disable(logging.NOTSET)
    lm = sparse(bench.model(), tokenizer=bench.tokenizer(), method="quest", sparsity=0.5)
    pairs = [(bench.text(200), answer) for answer in (" w9", " w9 w10", " w11")]
    score(lm, pairs)
    assert "quest can change 1 of 3 answers" in caplog.text
    caplog.clear()
    score(lm, pairs[1:2])
    assert "can change" not in caplog.text
