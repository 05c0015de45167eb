"""Models that decode token by token, the prompts they are given, and what their answers carry."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from lm_eval.api.instance import Instance

from lm_eval_sparse.model.lm import SparseHFLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def rng() -> random.Random:
    """Fresh prompts in every run; a failure shows its seed."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def words(rng: random.Random, number: int) -> str:
    return "".join(rng.choice("abcdefghij klm nop qrs tuv") for _ in range(number))


def prompts_of(rng: random.Random, number: int, low: int = 5, high: int = 180) -> list[str]:
    return [words(rng, rng.randint(low, high)) for _ in range(number)]


def request(prompt: str, options: dict[str, Any]) -> Instance:
    return Instance("generate_until", {}, (prompt, options), 0, metadata=("t", 0, 1))


def lm_of(family: str | Callable[[], Any], dtype: torch.dtype = torch.bfloat16, **options: Any) -> SparseHFLM:
    model = tiny.family(family) if isinstance(family, str) else family()
    model = model.to(DEVICE, dtype)
    return SparseHFLM(pretrained=model, tokenizer=tiny.tiny_tokenizer(), device=DEVICE, **options)


def generate(lm: SparseHFLM, prompts: list[str], **options: Any) -> list[Any]:
    options = {"until": [], "max_gen_toks": 12, **options}
    return lm.generate_until([request(prompt, options) for prompt in prompts], disable_tqdm=True)


def decode_stats(texts: list[Any]) -> list[dict[str, Any]]:
    return [text.stats["decode"] for text in texts]


def all_stats(texts: list[Any]) -> list[dict[str, Any]]:
    return [{**text.stats, "run": None} for text in texts]
