"""Hybrids: attention beside recurrent layers, in one layer with them, or shared by several. Figures count attention.

That dense answers are those of `hf`, and those of methods which select everything dense ones, is for test_probe.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoding_lms import all_stats, generate, lm_of, prompts_of
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from lm_eval_sparse.runtime.cache import MixedLayer, SparseCache, cache_argument
from lm_eval_sparse.runtime.rows import undecodable
from tests import families

#: Family -> layers that count.
HYBRIDS = {"falcon_h1": [0, 1], "zaya": [0], "zamba2": [1, 3], "bamba": [1]}
METHODS: dict[str, dict[str, Any]] = {
    "flexprefill": {"gamma": 0.3, "min_budget": 0, "block_size": 16, "backend": "gather"},
    "snapkv": {"capacity": 24, "window": 8, "sinks": 2, "local": 4},
    "quest": {"budget": 32, "page_size": 8},
}
PHASE = {"flexprefill": "prefill", "snapkv": "eviction", "quest": "decode"}


def tiny_one(name: str) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        made = families.build(name)
        made.generation_config.eos_token_id = None
        return made

    return build


@pytest.mark.parametrize(
    ("name", "method"),
    [*(("falcon_h1", method) for method in METHODS), ("zaya", "quest"), ("zamba2", "snapkv"), ("bamba", "flexprefill")],
)
def test_figures_count_attention_and_no_neighbour_is_felt(name: str, method: str) -> None:
    prompts = prompts_of(random.Random(5), 3, 80, 140)
    alone = lm_of(tiny_one(name), torch.float32, method=method, **METHODS[method])
    texts = generate(alone, prompts)
    counted = [layer for layer, reason in alone.runtime.layers.items() if reason is None]
    assert counted == HYBRIDS[name]
    found = alone.report()["phases"][PHASE[method]]
    assert found["calls"]["sparse"] and not found["calls"]["fallback"] and found["executed_sparsity"] > 0.02
    passes = 3 if method != "quest" else 3 * 11
    assert sum(found["calls"].values()) == passes * len(counted)
    together = lm_of(tiny_one(name), torch.float32, method=method, **METHODS[method], batch_size=3)
    again = generate(together, prompts)
    assert again == texts and all_stats(again) == all_stats(texts)


@pytest.mark.parametrize("name", ["falcon_h1", "zaya"])
def test_going_back_brings_both_states_back(name: str) -> None:
    """Keys and values, and the recurrent states, which transformers writes in place; also beside a window."""
    model = families.build(name)
    cache, ids = SparseCache(model.config, reserve=8), families.prompt(20)
    assert isinstance(cache.layers[0], MixedLayer)
    options = {cache_argument(model): cache, "use_cache": True}
    with torch.no_grad():
        model(ids[:, :12], **options)
        states, before = cache.snapshot(), copy.deepcopy([layer.__dict__ for layer in cache.layers])
        first = [model(ids[:, at : at + 1], **options).logits for at in range(12, 20)]
        assert cache.layers[0].get_seq_length() == 20
        for _ in range(2):  # the snapshot stays what it was
            cache.restore(states)
            for layer, was in zip(cache.layers, before, strict=True):
                assert layer.get_seq_length() == 12
                for index, state in was["conv_states"].items():
                    assert torch.equal(layer.conv_states[index], state)
                assert torch.equal(layer.keys, was["keys"])
            again = [model(ids[:, at : at + 1], **options).logits for at in range(12, 20)]
            assert all(map(torch.equal, first, again))


def test_a_mixed_layer_is_as_transformers() -> None:
    """Logits step by step as with transformers' own cache, beams reordered and all."""
    model, ids = families.build("falcon_h1"), families.prompt(20)
    ids = torch.cat([ids, ids.roll(1, 1)])
    found = []
    for cache in (DynamicCache(config=model.config), SparseCache(model.config, reserve=4)):
        options = {cache_argument(model): cache, "use_cache": True}
        with torch.no_grad():
            model(ids[:, :12], **options)
            cache.reorder_cache(torch.tensor([1, 1]))
            found.append([model(ids[:, at : at + 1], **options).logits for at in (12, 13, 14)])
    for own, theirs in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-4, rtol=1e-4)


def test_recurrent_states_are_left_to_transformers_loop() -> None:
    lm = lm_of(tiny_one("falcon_h1"), torch.float32)
    assert "keeps more than keys and values (MixedLayer)" in undecodable(lm.model.config, lm.runtime)
