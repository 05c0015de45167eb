"""Prompts that one evaluation has read are there for the next: the same numbers to the bit, and no others are taken."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from lm_eval_sparse.model import kept
from lm_eval_sparse.model.lm import SparseHFLM

LENGTHS = (4095, 4097, 4352, 5119, 5377)
PLANS: list[dict[str, Any]] = [
    {"method": "dense"},
    {"method": "quest", "sparsity": 0.6},
    {"method": "oracle_topk", "sparsity": 0.8},
    {"method": "quest", "budget": 512},
    {"method": "snapkv", "sparsity": 0.5},
    {"method": "vertical_slash", "sparsity": 0.5},
]
FAMILIES = ("llama", "qwen2", "gemma3", "mistral_full")


def saved(family: str, folder: Path, **options: Any) -> Path:
    return tiny(family, folder, max_position_embeddings=8192, **options)


def requests(seed: int) -> list[tuple[Any, list[int], list[int]]]:
    rng = random.Random(seed)
    tokens = [[rng.randrange(3, 380) for _ in range(length)] for length in LENGTHS]
    return [(None, prompt, [rng.randrange(3, 380) for _ in range(9)]) for prompt in tokens]


def answered(folder: Path, asked: list[Any], **arguments: Any) -> tuple[list[Any], dict[str, Any], int]:
    """What a new evaluation answers and measures, and how many prompts it found."""
    lm = SparseHFLM(pretrained=str(folder), device="cpu", dtype=arguments.pop("dtype", "float32"), **arguments)
    answers = lm.scorer.loglikelihood_tokens(asked, True)
    report = lm.report()
    stats = [{name: part for name, part in answer.stats.items() if name != "run"} for answer in answers]
    measured = {name: report[name] for name in ("phases", "prompts", "tasks", "layers", "model")}
    tokens = report["run"]["tokens"]["prefill"]
    assert tokens == sum(LENGTHS) - sum((n - 256) // 1024 * 1024 for n in LENGTHS if n > 4096) * bool(
        report["run"].get("prefills_shared")
    )
    return [tuple(answer) for answer in answers] + stats, measured, report["run"].get("prefills_shared", 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_give_the_same(family: str, tmp_path: Path) -> None:
    folder, asked = saved(family, tmp_path), requests(len(family))
    plans = PLANS if family == "llama" else PLANS[:2]
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
        dense = [plan["method"] in ("dense", "quest", "oracle_topk") for plan in plans]
        assert found == [4 * (limit > 0 and number > 0 and own) for number, own in enumerate(dense)]
    assert [shared for *_, shared in alone] == [0] * len(plans)


def test_another_model_or_dtype_never_hits(tmp_path: Path) -> None:
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
    folder, asked = saved("llama", tmp_path), requests(6)
    one = 2 * 2 * 2 * 16 * 4 * 4096  # layers, keys and values, heads, dimensions, bytes, tokens
    with kept.keeping(2 * one) as keeper:
        answered(folder, asked)
        assert 0 < keeper.shelf.bytes <= 2 * one
        held = sum(t.untyped_storage().nbytes() for b, _ in keeper.shelf._held.values() for kv in b.layers for t in kv)
        assert held == keeper.shelf.bytes


def test_the_shelf_drops_what_was_not_used_longest() -> None:
    shelf = kept.Shelf(10)
    for token in (1, 2):
        assert shelf.put([token], 5, 100, lambda token=token: token) == token
    assert shelf.get([1]) == 1
    assert shelf.put([3], 5, 100, lambda: 3) == 3
    assert [shelf.get([token]) for token in (1, 2, 3)] == [1, None, 3]
    assert shelf.put([4], 11, 100, lambda: 4) is None
    assert shelf.bytes == 10
    assert shelf.clear() == 10
    assert shelf.get([1]) is None
