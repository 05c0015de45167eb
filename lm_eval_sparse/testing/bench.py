"""`sparse-hf` of a small random model: scores and answers of a method, with nothing to download.

The weights are large enough for attention to be far from uniform, so that a wrong mask, a wrong position or a wrong
block shows in the answers. Every word is a token.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from ..methods.base import Call
from ..model.lm import SparseHFLM
from .subject import Subject
from .tensors import counted

VOCABULARY, HEADS, LAYERS, MAX_LENGTH = 384, 4, 2, 8192
#: Tokens of the prompts.
LENGTHS = (63, 200, 331)


@cache
def model(dtype: torch.dtype = torch.float32, kv_heads: int = 2) -> Any:
    """A random Llama of two layers, four query heads of 16 dimensions."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, max_position_embeddings=MAX_LENGTH,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().to(dtype)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Each of its words, `w3` and so on, is a token of that number."""
    names = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>"}
    words = {names.get(number, f"w{number}"): number for number in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def text(length: int, seed: int = 0) -> str:
    """So many words, the same for the same seed."""
    source = random.Random(1000 * seed + length)
    return " ".join(f"w{source.randrange(4, VOCABULARY)}" for _ in range(length))


PROMPTS = [text(length, seed) for seed, length in enumerate(LENGTHS)]
ANSWER = " " + text(4, 9)


def lm_of(options: dict[str, Any], dtype: torch.dtype = torch.float32, kv_heads: int = 2, **more: Any) -> SparseHFLM:
    """On its own copy, since what runs is attached to the modules of a model."""
    given = {"backend": "gather", "device": "cpu", "max_length": MAX_LENGTH, **options, **more}
    return SparseHFLM(pretrained=copy.deepcopy(model(dtype, kv_heads)), tokenizer=tokenizer(), **given)


def score(lm: SparseHFLM, prompts: list[str], answer: str = ANSWER) -> list[Any]:
    """`(log-likelihood, greedy)` of the answer behind each prompt, with what was measured in `stats`."""
    asked = [_request("loglikelihood", prompt, answer) for prompt in prompts]
    return lm.loglikelihood(asked, disable_tqdm=True)


def generate(lm: SparseHFLM, prompts: list[str], tokens: int = 6) -> list[Any]:
    """The greedy answers of so many tokens."""
    options = {"until": [], "max_gen_toks": tokens, "do_sample": False}
    return lm.generate_until([_request("generate_until", prompt, options) for prompt in prompts], disable_tqdm=True)


def answers(lm: SparseHFLM) -> tuple[list[Any], list[Any]]:
    return score(lm, PROMPTS), generate(lm, PROMPTS)


def figures(found: tuple[list[Any], list[Any]]) -> list[Any]:
    """What answers say of themselves, but for the run that they belong to."""
    return [{**one.stats, "run": None} for part in found for one in part]


def _request(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("conformance", 0, 1))


@contextmanager
def recorded(subject: Subject) -> Iterator[list[tuple[Any, Any, Any]]]:
    """What the runtime asks of the outermost method: the method, the call (or the cache then), what it selected."""
    seen: list[tuple[Any, Any, Any]] = []
    with replaced(subject.outer, "select", None) as select:

        def noted(self: Any, call: Call) -> Any:
            selection = select(self, call)
            seen.append((self, counted(call) if call.phase == "decode" else call, selection))
            return selection

        subject.outer.select = noted
        yield seen


@contextmanager
def replaced(cls: type, name: str, value: Any) -> Iterator[Any]:
    """While this lasts, an attribute of a class is another one; gives what it was."""
    own, before = vars(cls).get(name), getattr(cls, name)
    setattr(cls, name, value)
    try:
        yield before
    finally:
        if own is None:
            delattr(cls, name)
        else:
            setattr(cls, name, own)
