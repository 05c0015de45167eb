"""Prompts that begin alike: what they share is read once, and nobody sees it in the numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_lms import request, score, sparse
from test_candidates import figures
from tiny import family

from lm_eval_sparse.model import beginnings
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.model.progress import Call
from lm_eval_sparse.testing import bench

TEXT = bench.text(300)
QUESTIONS = [f"{TEXT} {bench.text(20 + 3 * seed, seed)}" for seed in range(4)]
ANSWERS = (" w9 w17", " w31")
PAIRS = [(prompt, answer) for prompt in (*QUESTIONS, bench.text(310, 7)) for answer in ANSWERS]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in (("LONG", 200), ("STEP", 100), ("LEAST", 10)):
        monkeypatch.setattr(beginnings, name, value)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def own(model: Any, **options: Any) -> SparseHFLM:
    """With a tokenizer to which every word is a token."""
    return sparse(model, tokenizer=bench.tokenizer(), **options)


def lengths_read(lm: SparseHFLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass over a prompt, as they run."""
    found: list[int] = []
    read = beginnings.Beginnings._read

    def noted(self: Any, tokens: list[int], first: int, cache: Any) -> Any:
        found.append(len(tokens))
        return read(self, tokens, first, cache)

    monkeypatch.setattr(beginnings.Beginnings, "_read", noted)
    return found


@pytest.mark.parametrize("method", ["dense", "quest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_as_alone(method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = own(bench.model(dtype), method=method, **({} if method == "dense" else {"sparsity": 0.6}))
    passes, planned = lengths_read(lm, monkeypatch), []
    expect = Call.expect
    monkeypatch.setattr(Call, "expect", lambda self, work: planned.append(work) or expect(self, work))
    together = score(lm, PAIRS)
    assert sum(tokens for tokens, _ in planned[0].values()) == sum(passes)
    assert passes.count(300) == 2  # one for four questions, one for the other text
    assert len(passes) == 2 + 5
    for pair in range(0, len(PAIRS), 2):
        alone = score(lm, PAIRS[pair : pair + 2])
        assert list(map(tuple, alone)) == list(map(tuple, together[pair : pair + 2]))
        assert figures(alone[0]) == figures(together[pair])


def test_near_what_one_pass_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = score(own(bench.model()), PAIRS)
    monkeypatch.setattr(beginnings, "LONG", 10**6)
    whole = score(own(bench.model()), PAIRS)
    assert all(abs(one[0] - other[0]) < 1e-4 for one, other in zip(cut, whole, strict=True))


def test_windows_go_on_from_a_copy() -> None:
    lm = sparse(family("gemma3"))
    together = score(lm, PAIRS)
    for pair in range(0, len(PAIRS), 2):
        assert list(map(tuple, score(lm, PAIRS[pair : pair + 2]))) == list(map(tuple, together[pair : pair + 2]))


@pytest.mark.parametrize("method", ["vertical_slash", "snapkv"])
def test_methods_that_look_at_the_whole_prompt_get_it(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = own(bench.model(), method=method, sparsity=0.5)
    passes = lengths_read(lm, monkeypatch)
    score(lm, PAIRS)
    assert min(passes) > 300


def test_no_room_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = own(bench.model())
    wanted = score(lm, PAIRS)
    monkeypatch.setattr(type(lm.decoding.memory), "free", lambda self: 0)
    passes = lengths_read(lm, monkeypatch)
    assert list(map(tuple, score(lm, PAIRS))) == list(map(tuple, wanted))
    assert passes.count(300) == 5


def test_questions_of_several_tasks() -> None:
    """Each task is told of its own prompts, whoever had to read their beginning."""
    lm = own(bench.model())
    mixed = [request("loglikelihood", prompt, " w9", task=f"t{number}") for number, prompt in enumerate(QUESTIONS)]
    found = lm.loglikelihood(mixed, disable_tqdm=True)
    report = lm.report()["tasks"]
    for number, (one, answer) in enumerate(zip(mixed, found, strict=True)):
        alone = own(bench.model())
        assert tuple(alone.loglikelihood([one], disable_tqdm=True)[0]) == tuple(answer)
        assert report[f"t{number}"] == alone.report()["tasks"][f"t{number}"]
