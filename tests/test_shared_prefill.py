"""Prompts that one evaluation has read are there for the next: the same numbers to the bit, and no others are taken."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from lm_eval_sparse.model import beginnings, kept
from lm_eval_sparse.model.lm import SparseHFLM

#: Of prompts, where they are cut as soon as a quarter as long as they are for users: reading them costs a tenth.
LENGTHS = (1023, 1025, 1088, 1279, 1345)
#: Of prompts where they are cut as for users.
LONG_LENGTHS = (4095, 4097, 4352, 5119)
DENSE_FIRST: list[dict[str, Any]] = [
    {"method": "dense"},
    {"method": "quest", "sparsity": 0.6},
    {"method": "oracle_topk", "sparsity": 0.8},
    {"method": "quest", "budget": 128},
]
#: The last two look at whole prompts: they neither take nor leave anything.
PLANS = [
    *DENSE_FIRST,
    {"method": "snapkv", "sparsity": 0.5},
    {"method": "vertical_slash", "sparsity": 0.5},
    {"method": "dense"},
]
FAMILIES = ("llama", "qwen2", "gemma3", "mistral_full")


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are cut from a quarter of the tokens on."""
    for name in ("LONG", "STEP", "LEAST"):
        monkeypatch.setattr(beginnings, name, getattr(beginnings, name) // 4)


def saved(family: str, folder: Path, **options: Any) -> Path:
    return tiny(family, folder, max_position_embeddings=8192, **options)


def requests(seed: int, lengths: Sequence[int] = LENGTHS) -> list[tuple[Any, list[int], list[int]]]:
    rng = random.Random(seed)
    tokens = [[rng.randrange(3, 380) for _ in range(length)] for length in lengths]
    return [(None, prompt, [rng.randrange(3, 380) for _ in range(9)]) for prompt in tokens]


def answered(folder: Path, asked: list[Any], **arguments: Any) -> tuple[list[Any], dict[str, Any], int]:
    """What a new evaluation answers and measures, and how many prompts it found."""
    lm = SparseHFLM(pretrained=str(folder), device="cpu", dtype=arguments.pop("dtype", "float32"), **arguments)
    answers = lm.scorer.loglikelihood_tokens(asked, True)
    report = lm.report()
    stats = [{name: part for name, part in answer.stats.items() if name != "run"} for answer in answers]
    measured = {name: report[name] for name in ("phases", "prompts", "tasks", "layers", "model")}
    shared = report["run"].get("prefills_shared", 0)
    lengths, step = sorted((len(prompt) for _, prompt, _ in asked), reverse=True), beginnings.STEP
    there = [(n - beginnings.LEAST) // step * step for n in lengths if n > beginnings.LONG]
    # All that are long are found, or none.
    if shared in (0, len(there)):
        assert report["run"]["tokens"]["prefill"] == sum(lengths) - bool(shared) * sum(there)
    return [tuple(answer) for answer in answers] + stats, measured, shared


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_give_the_same(family: str, tmp_path: Path, early: None) -> None:
    folder, asked = saved(family, tmp_path), requests(len(family))
    plans = PLANS if family in ("llama", "mistral_full") else DENSE_FIRST[:2]
    alone = [answered(folder, asked, **plan) for plan in plans]
    for limit in (1 << 30, 0):
        with kept.keeping(limit) as keeper:
            together = []
            for plan in plans:
                together.append(answered(folder, asked, **plan))
                keeper.settle()
            assert keeper.loadings == 1
        for plan, mine, theirs in zip(plans, together, alone, strict=True):
            assert mine[:2] == theirs[:2], plan
        found = [shared for *_, shared in together]
        own = [plan["method"] in ("dense", "quest", "oracle_topk") for plan in plans]
        assert found == [4 * (limit > 0 and number > 0 and takes) for number, takes in enumerate(own)]
    assert [shared for *_, shared in alone] == [0] * len(plans)


def test_another_model_or_dtype_never_hits(tmp_path: Path, early: None) -> None:
    folders = [saved("llama", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    asked = requests(5)
    alone = answered(folders[0], asked)
    with kept.keeping(1 << 30) as keeper:
        for folder, dtype in ((folders[1], "float32"), (folders[0], "bfloat16"), (folders[0], "float32")):
            *found, shared = answered(folder, asked, dtype=dtype)
            assert shared == 0
            keeper.settle()
        assert tuple(found) == alone[:2]
        assert keeper.loadings == 3
        with torch.no_grad():
            next(keeper.loaded.model.parameters()).data.mul_(1.5)  # what an evaluation leaves
        keeper.settle()
        *found, shared = answered(folders[0], asked)
        assert (tuple(found), shared) == (alone[:2], 0)
        assert keeper.loadings == 4


def test_the_limit_is_kept(tmp_path: Path) -> None:
    """Of long prompts as users have them. What is kept stays while the next evaluation asks for it."""
    folder, asked = saved("llama", tmp_path), requests(6, LONG_LENGTHS)
    one = 2 * 2 * 2 * 16 * 4 * 4096  # layers, keys and values, heads, dimensions, bytes, tokens
    alone = answered(folder, asked)
    with kept.keeping(2 * one) as keeper:
        for expected in (0, 2, 2):
            assert answered(folder, asked) == (*alone[:2], expected)
            assert 0 < keeper.shelf.bytes <= 2 * one
            held = [
                t.untyped_storage().nbytes() for b, *_ in keeper.shelf._held.values() for kv in b.layers for t in kv
            ]
            assert sum(held) == keeper.shelf.bytes
            keeper.settle()


def kept_of(shelf: kept.Shelf, tokens: Sequence[int]) -> list[Any]:
    """What a shelf has, without using it."""
    return [token for token in tokens if (token,) in shelf._held]


def put(shelf: kept.Shelf, *tokens: int) -> list[Any]:
    return [shelf.put([token], 5, 100, lambda token=token: f"of {token}") for token in tokens]


def test_the_shelf_holds_what_fits_and_no_more() -> None:
    shelf = kept.Shelf(10)
    assert put(shelf, 1, 2) == ["of 1", "of 2"] and shelf.bytes == 10
    assert put(shelf, 1, 3) == [None, None], "one that is there, and one for which nothing of this evaluation goes"
    assert shelf.get([1]) == "of 1" and shelf.get([3]) is None
    assert shelf.put([4], 11, 100, pytest.fail) is None
    assert shelf.clear() == 10 and shelf.bytes == 0
    assert shelf.get([1]) is None
    assert shelf.put([5], 5, 9, pytest.fail) is None, "half of what is free stays free"
    assert kept.Shelf(None).put([5], 51, 100, pytest.fail) is None, "without a limit it is half of what is free"
    assert kept.Shelf(None).put([5], 50, 100, lambda: "of 5") == "of 5"


def test_prompts_that_come_round_stay_though_not_all_fit() -> None:
    """All are asked for in the same order: with the longest unused dropped first none would ever be found."""
    shelf = kept.Shelf(10)
    for number in range(4):
        found = [shelf.get([token]) or (put(shelf, token), None)[1] for token in (1, 2, 3)]
        assert found == (["of 1", "of 2", None] if number else [None] * 3)
        shelf.turn()


def test_what_two_evaluations_have_not_used_makes_room() -> None:
    shelf = kept.Shelf(10)
    put(shelf, 1, 2)
    shelf.turn()
    assert shelf.get([1]) == "of 1"  # and 2 was of use to the one before
    assert put(shelf, 3) == [None]
    shelf.turn()
    for _ in range(3):
        shelf.turn()  # evaluations that use nothing, as those of methods that look at whole prompts
    assert put(shelf, 3) == ["of 3"] and kept_of(shelf, (1, 2, 3)) == [1, 3]
    assert put(shelf, 4) == [None] and kept_of(shelf, (1, 2, 3, 4)) == [1, 3]
    shelf.turn()
    assert put(shelf, 4) == ["of 4"] and kept_of(shelf, (1, 3, 4)) == [3, 4]
    assert shelf.bytes == 10
