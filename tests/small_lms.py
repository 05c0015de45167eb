"""`sparse-hf` of tiny random models, asked as lm-eval asks: scores and answers."""

from __future__ import annotations

from typing import Any

import tiny
from lm_eval.api.instance import Instance

from lm_eval_sparse import patches
from lm_eval_sparse.model.lm import SparseHFLM

patches.install()

PROMPTS = [tiny.words(seed, count) for seed, count in enumerate((105, 420, 150, 115, 240))]
CONTINUATIONS = (" apple", " river stone cloud", " river stone", " unusual zebra, said he")
PAIRS = [(prompt, continuation) for prompt in PROMPTS for continuation in CONTINUATIONS]


def request(kind: str, *args: Any, task: str = "t") -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=(task, 0, 1))


def score(lm: Any, pairs: list[tuple[str, str]], task: str = "t") -> list[tuple[float, bool]]:
    return lm.loglikelihood([request("loglikelihood", *pair, task=task) for pair in pairs], disable_tqdm=True)


def generate(lm: Any, prompts: list[str], **options: Any) -> list[str]:
    options = {"until": [], "max_gen_toks": 8, **options}
    return lm.generate_until([request("generate_until", prompt, options) for prompt in prompts], disable_tqdm=True)


def sparse(model: Any, **options: Any) -> SparseHFLM:
    """A `sparse-hf` of a saved model, or of a model in memory with the tiny tokenizer."""
    if not isinstance(model, str):
        options = {"tokenizer": tiny.tiny_tokenizer(), **options}
    return SparseHFLM(pretrained=model, **options)
