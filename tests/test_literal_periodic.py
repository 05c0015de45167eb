"""Eviction in the course of an answer by StreamingLLM, K-norm, TOVA and H2O, against `literal_methods`.

A tiny model reads all tokens anew for each one, by transformers' own eager attention under explicit masks: what each KV
head still holds is a list of tokens here. At every compaction the tokens that the library keeps are compared with those
of the definition, given what was held and the weights so far. And keys that StreamingLLM turns are turned here, too.
"""

from __future__ import annotations

import copy
import os
import random
import sys
from typing import Any

import literal_methods as literal
import numpy as np
import pytest
import tiny
import torch
from small_lms import generate, score
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from lm_eval_sparse.kernels.types import Keep
from lm_eval_sparse.methods import METHODS, Call
from lm_eval_sparse.model.lm import SparseHFLM

EAGER = "literal_periodic_eager"
TOKENIZER = tiny.tiny_tokenizer()
WORDS = [word for word in tiny.WORDS if len(TOKENIZER(" " + word).input_ids) == 1]
#: Scores that two fp32 computations of a whole model may swap, as a share of the largest.
CLOSE = 1e-4


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("LITERAL_SEED", random.SystemRandom().randrange(2**31)))
    print(f"LITERAL_SEED={seed}")
    return random.Random(seed)


def masked_eager(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """The model's own eager attention, in which each KV head hides keys from its queries."""
    shown = module._shown[module.layer_idx].repeat_interleave(query.shape[1] // key.shape[1], 0)[None]
    hidden = torch.zeros(shown.shape).masked_fill(~shown, -torch.inf)
    out, weights = sys.modules[type(module).__module__].eager_attention_forward(
        module, query, key, value, hidden, **kwargs
    )
    module._weights[module.layer_idx] = weights[0].double().numpy()
    module._norms[module.layer_idx] = key[0].double().norm(dim=-1).numpy()
    return out, weights


AttentionInterface.register(EAGER, masked_eager)
AttentionMaskInterface.register(EAGER, eager_mask)


class Reader:
    """A model that tells the weights of its attention, and the next token, under masks of its own."""

    def __init__(self, model: PreTrainedModel, tokens: int):
        self.model = model
        self.layers, self.heads = model.config.num_hidden_layers, model.config.num_key_value_heads
        self.norms: dict[int, np.ndarray] = {}
        self.shown = torch.ones(self.layers, self.heads, tokens, tokens, dtype=torch.bool).tril()

    @torch.no_grad()
    def read(self, tokens: list[int]) -> tuple[dict[int, np.ndarray], int]:
        """Weights `(H, T, T)` of each layer, and the likeliest next token."""
        found: dict[int, np.ndarray] = {}
        for module in self.model.modules():
            module._weights, module._norms = found, self.norms
            module._shown = self.shown[:, :, : len(tokens), : len(tokens)]
        logits = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        return found, int(logits.argmax())


def want(
    name: str, knobs: dict[str, Any], held: list[list[int]], scores: list[list[float]], capacity: int
) -> list[set[int]]:
    """Tokens that each KV head of a layer keeps."""
    if name == "streaming_llm":
        sinks = knobs["sinks"]
        return [literal.streaming_llm(own, capacity, sinks) for own in held]
    places = [
        literal.h2o(own, capacity, knobs["recent"]) if name == "h2o" else literal.best(own, capacity) for own in scores
    ]
    return [{own[at] for at in chosen} for own, chosen in zip(held, places, strict=True)]


CASES = [
    ("streaming_llm", {"sinks": 3}, 20, None),
    ("streaming_llm", {"sinks": 4}, None, 0.6),
    ("knorm", {}, 20, None),
    ("tova", {}, 20, None),
    ("tova", {}, None, 0.6),
    ("h2o", {"recent": 0.5}, 20, None),
    ("h2o", {"recent": 0.3}, None, 0.6),
]


@pytest.mark.parametrize("by", ["scoring", "generation"])
@pytest.mark.parametrize(("name", "knobs", "capacity", "sparsity"), CASES)
def test_what_stays_is_the_definition_s(
    name: str,
    knobs: dict[str, Any],
    capacity: int | None,
    sparsity: float | None,
    by: str,
    rng: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every, steps, length = 4, 15, 120 if sparsity else 50
    model = tiny.family("llama", seed=rng.randrange(1 << 31))
    with torch.no_grad():
        model.get_output_embeddings().weight[2] = 0  # a greedy answer does not end
    own = copy.deepcopy(model)
    own.set_attn_implementation(EAGER)
    keeps: dict[int, list[Keep]] = {}
    cls = METHODS[name]
    selects = cls.select

    def watch(self: Any, call: Call) -> Keep:
        found = selects(self, call)
        keeps.setdefault(call.layer.index, []).append(found)
        return found

    monkeypatch.setattr(cls, "select", watch)
    budget = {"capacity": capacity} if sparsity is None else {"sparsity": sparsity}
    lm = SparseHFLM(
        pretrained=model, tokenizer=tiny.tiny_tokenizer(), device="cpu", method=name, every=every, **knobs, **budget
    )
    context, answer = ("".join(" " + rng.choice(WORDS) for _ in range(number)) for number in (length, steps))
    if by == "scoring":
        score(lm, [(context, answer)])
    else:
        answer = str(generate(lm, [context], max_gen_toks=steps)[0])
    prompt = TOKENIZER(context).input_ids
    given = TOKENIZER(answer).input_ids if by == "scoring" else []
    tokens = list(prompt)
    reader = Reader(own, len(prompt) + steps)
    layers, heads = reader.layers, reader.heads
    held = {(layer, head): list(range(len(prompt))) for layer in range(layers) for head in range(heads)}
    found, following = reader.read(tokens)
    total = {layer: np.array(literal.h2o_scores(found[layer], heads)) for layer in range(layers)}
    different = 0
    for step in range(steps - 1):
        if step % every == 0:
            number = capacity if sparsity is None else literal.capacity_of(1 - sparsity, len(tokens))
            for layer in range(layers):
                keep = keeps[layer][step // every]
                lists = [held[layer, head] for head in range(heads)]
                if name == "h2o":
                    scores = [total[layer][head][lists[head]].tolist() for head in range(heads)]
                elif name == "knorm":
                    scores = [(-reader.norms[layer][head][lists[head]]).tolist() for head in range(heads)]
                else:  # all heads hold the same tokens
                    scores = [literal.tova_scores(found[layer][:, -1][:, lists[0]])] * heads
                wanted = want(name, knobs, lists, scores, number)
                for head in range(heads):
                    places = keep.ids[head, : int(keep.counts[head])].tolist()
                    got = [lists[head][place] for place in places]
                    assert len(got) == min(number, len(lists[head])), (layer, head, step)
                    assert sparsity is None or abs(1 - len(got) / len(tokens) - sparsity) <= 0.01
                    if set(got) != wanted[head]:
                        different += name != "knorm"  # a word's keys in the first layer have one norm, wherever it is
                        value = dict(zip(lists[head], scores[head], strict=True))
                        parts = set(got) - wanted[head], wanted[head] - set(got)
                        more, less = (sorted(value[token] for token in part) for part in parts)
                        near = CLOSE * max(map(abs, scores[head]))
                        assert all(abs(a - b) < near for a, b in zip(more, less, strict=True)), (
                            layer, head, step, [sorted(part) for part in parts], more, less
                        )  # fmt: skip
                    held[layer, head] = got
        tokens.append(given[step] if given else following)
        at = len(tokens) - 1
        for (layer, head), own_list in held.items():
            own_list.append(at)
            reader.shown[layer, head, at] = False
            reader.shown[layer, head, at, own_list] = True
        found, following = reader.read(tokens)
        for layer in range(layers):
            newest = np.array(literal.h2o_scores(found[layer][:, -1:], heads))
            total[layer] = np.pad(total[layer], ((0, 0), (0, 1))) + newest
    if by == "generation":
        assert answer == TOKENIZER.decode([*tokens[len(prompt) :], following], skip_special_tokens=True)
    assert all(len(own) == 1 + (steps - 2) // every for own in keeps.values())
    assert different <= 1


@torch.no_grad()
def test_turned_keys_are_read_where_they_are_in_the_cache(rng: random.Random) -> None:
    """The model's own cache, cut to what stays, its keys turned by hand to the last places before the answer."""
    model = tiny.family("llama", seed=rng.randrange(1 << 31))
    own = copy.deepcopy(model)
    context, answer = ("".join(" " + rng.choice(WORDS) for _ in range(number)) for number in (70, 6))
    prompt, given = (TOKENIZER(part).input_ids for part in (context, answer))
    length, capacity, sinks = len(prompt), 20, 4
    held = sorted(literal.streaming_llm(range(length), capacity, sinks))
    moved = torch.tensor(literal.streaming_positions(length, capacity)) - torch.tensor(held)
    angles = moved[:, None].double() * own.model.rotary_emb.inv_freq.double()

    def logprob(turn: bool) -> float:
        first = own(input_ids=torch.tensor([prompt]), use_cache=True)
        cache = DynamicCache()
        for index, layer in enumerate(first.past_key_values.layers):
            one, two = layer.keys[:, :, held].double().chunk(2, dim=-1)
            cos, sin = (angles.cos(), angles.sin()) if turn else (torch.ones(()), torch.zeros(()))
            key = torch.cat([one * cos - two * sin, two * cos + one * sin], -1).float()
            cache.update(key, layer.values[:, :, held], index)
        places = torch.arange(length, length + len(given) - 1)[None]
        rest = own(input_ids=torch.tensor([given[:-1]]), past_key_values=cache, position_ids=places)
        logits = torch.cat([first.logits[0, -1:], rest.logits[0]]).log_softmax(-1)
        return float(logits[torch.arange(len(given)), torch.tensor(given)].sum())

    found = {}
    for rotate in (True, False):
        knobs = {"method": "streaming_llm", "capacity": capacity, "sinks": sinks, "rotate": rotate}
        lm = SparseHFLM(pretrained=copy.deepcopy(model), tokenizer=tiny.tiny_tokenizer(), device="cpu", **knobs)
        ((found[rotate], _),) = score(lm, [(context, answer)])
        assert found[rotate] == pytest.approx(logprob(rotate), abs=2e-4)
    assert abs(found[True] - found[False]) > 1e-3
