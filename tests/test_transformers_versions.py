"""What differs between the releases of transformers that are supported: nothing that a user is warned of."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
import transformers
from lm_eval.api.instance import Instance
from torch import nn

from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.runtime import cache

KNOBS: dict[str, Any] = {"method": "flexprefill+quest", "sparsity": 0.5, "backend": "gather"}


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What transformers logs as a warning or worse."""
    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    logger, handler = logging.getLogger("transformers"), Handler(logging.WARNING)
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "lfm2"])
def test_no_warning_of_what_is_deprecated(family: str, said: list[str]) -> None:
    model = tiny.family(family)
    pair = Instance("loglikelihood", {}, (tiny.words(1, 110), " river stone"), 0)
    text = Instance("loglikelihood_rolling", {}, (tiny.words(1, 110),), 0)
    prompt = tiny.words(2, 120)
    plain, beams = {"until": [], "max_gen_toks": 4}, {"until": [], "max_gen_toks": 4, "num_beams": 2}
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.filterwarnings("error", category=kind, message=".*(deprecat|removed in).*")
        lm = SparseHFLM(pretrained=model, tokenizer=tiny.tiny_tokenizer(), device="cpu", method="dense")
        lm.loglikelihood([pair], disable_tqdm=True)
        lm.loglikelihood_rolling([text], disable_tqdm=True)
        for kwargs in (plain, beams):  # by our decoder, and by transformers
            lm.generate_until([Instance("generate_until", {}, (prompt, kwargs), 0)], disable_tqdm=True)
    assert not [line for line in said if "deprecat" in line or "removed" in line]


def test_the_cache_reaches_the_model() -> None:
    """Under a name that it does not know it would be swallowed, and every step would see its own token only."""
    model = tiny.family("llama")
    ids = torch.arange(3, 40)[None]
    expected = model(ids).logits[:, -1]
    lm = SparseHFLM(pretrained=model, tokenizer=tiny.tiny_tokenizer(), device="cpu")
    held = lm.runtime.new_cache(model.config, reserve=1)
    with torch.no_grad():
        lm.forward(ids[:, :-1], cache=held)
        got = lm.forward(ids[:, -1:], cache=held, positions=torch.tensor([[ids.shape[1] - 1]]))[:, -1]
    assert torch.allclose(got, expected, atol=1e-4)


def made(forward: Callable[..., Any]) -> nn.Module:
    return type("Made", (nn.Module,), {"forward": forward})()


def test_what_a_model_calls_its_cache() -> None:
    """By its own signature, whatever the release."""
    assert cache.cache_argument(made(lambda self, input_ids, cache=None: None)) == "cache"
    assert cache.cache_argument(made(lambda self, input_ids, past_key_values=None: None)) == "past_key_values"
    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    if release in ((5, 17), (5, 24)):
        name = "cache" if release == (5, 24) else "past_key_values"
        assert cache.generation_argument() == name
        assert cache.cache_argument(tiny.family("llama")) == name
        assert cache.cache_argument(made(lambda self, *args, **kwargs: None)) == name
