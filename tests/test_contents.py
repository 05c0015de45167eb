"""Hashes of what decides a model's answers: whatever changes one of them changes its hash, and nothing else does."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from tiny import tiny_tokenizer

from lm_eval_sparse.model import contents
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.testing import bench


def test_any_number_of_the_weights_counts() -> None:
    rng = random.Random()
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(bench.model(dtype))
        found = {contents.weights(model)}
        assert contents.weights(copy.deepcopy(model)) in found
        parameters = list(model.parameters())
        for _ in range(20):
            flat = rng.choice(parameters).data.view(-1)
            place = rng.randrange(len(flat))
            before = float(flat[place])
            flat[place] = -before if before else 1.0
            found.add(contents.weights(model))
            flat[place] = before
        table = model.get_input_embeddings().weight.data
        table[[3, 9]] = table[[9, 3]]
        found.add(contents.weights(model))
        model.register_buffer("scales", torch.ones(3))
        found.add(contents.weights(model))
        assert len(found) == 23


def test_what_ends_an_answer_is_part_of_a_tokenizer() -> None:
    one, other = tiny_tokenizer(), tiny_tokenizer()
    assert contents.tokenizer(one, one.eos_token_id) == contents.tokenizer(other, other.eos_token_id)
    other("padded", padding="max_length", max_length=20)  # leaves settings behind that change no token
    assert contents.tokenizer(one, one.eos_token_id) == contents.tokenizer(other, other.eos_token_id)
    found = {contents.tokenizer(one, one.eos_token_id), contents.tokenizer(one, 5)}
    other.eos_token = other.convert_ids_to_tokens(9)
    found.add(contents.tokenizer(other, other.eos_token_id))
    third = tiny_tokenizer()
    third.add_tokens(["<more>"])
    found.add(contents.tokenizer(third, third.eos_token_id))
    assert len(found) == 4


def test_both_decide_what_a_log_and_a_cache_may_answer() -> None:
    def fingerprint(weight: float = 1.0, end: str | None = None) -> dict[str, Any]:
        model, own = copy.deepcopy(bench.model()), copy.deepcopy(bench.tokenizer())
        model.model.layers[1].mlp.down_proj.weight.data[7, 11] *= weight
        if end is not None:
            own.eos_token = end
        return SparseHFLM(pretrained=model, tokenizer=own, method="dense").fingerprint()

    plain, weights, ended = fingerprint(), fingerprint(weight=-1.0), fingerprint(end="w9")
    assert plain == fingerprint()
    assert {name for name in plain if plain[name] != weights[name]} == {"weights"}
    end = bench.tokenizer().eos_token_id
    assert plain["tokenizer"] == contents.tokenizer(bench.tokenizer(), end) != ended["tokenizer"]
