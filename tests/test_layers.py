"""What methods are told of the layers they run in, and what they say of themselves: it has to hold in every layer."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import tiny
import torch
import transformers
from small_lms import score, sparse

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.methods import METHODS, Call, Layer
from lm_eval_sparse.methods.eviction.knorm import KNorm
from lm_eval_sparse.methods.eviction.pyramidkv import PyramidKV

PAIR = tiny.words(3, 420), " river stone cloud, said he"


def lm_of(kind: str, **more: Any) -> Any:
    """`sparse-hf` of a tiny random model of a configuration class."""
    method = {name: more.pop(name) for name in ("method", "sparsity", "capacity", "rotate", "beta") if name in more}
    torch_seed = random.SystemRandom().randrange(2**31)
    print(f"seed {torch_seed}")
    transformers.set_seed(torch_seed)
    config = getattr(transformers, kind)(**{**tiny.COMMON, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return sparse(model, device="cpu", backend="gather", max_length=2048, **method)


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("full", [(1, 3, 5), (0, 1), (5,)])
def test_a_budget_per_layer_counts_layers_that_may_be_sparse(full: tuple[int, ...], sparsity: float) -> None:
    kinds = ["full_attention" if layer in full else "sliding_attention" for layer in range(6)]
    lm = lm_of(
        "Gemma2Config", num_hidden_layers=6, sliding_window=32, layer_types=kinds, method="pyramidkv", sparsity=sparsity
    )
    score(lm, [PAIR])
    measured = lm.report()["phases"]["eviction"]
    # The first layer may keep everything.
    assert measured["calls"]["sparse"] + measured["calls"]["fallback"] == len(full) and measured["calls"]["sparse"]
    assert measured["executed_sparsity"] == pytest.approx(sparsity, abs=0.01)


def test_layers_that_borrow_keep_nothing() -> None:
    lm = lm_of(
        "Gemma3nTextConfig", num_hidden_layers=15, num_kv_shared_layers=5, head_dim=16, sliding_window=40,
        layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 3, hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=384, intermediate_size=[96] * 15, laurel_rank=8, altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 15, method="pyramidkv", sparsity=0.7,
    )  # fmt: skip
    assert lm.runtime.lenders == {14: 9}
    score(lm, [PAIR])
    found = lm.report()["phases"]["eviction"]
    assert found["calls"]["sparse"] == 2 and found["executed_sparsity"] == pytest.approx(0.7, abs=0.01)


#: Models whose full layers leave the rotary embedding out, or whose embedding follows how long a text is.
UNTURNED: dict[str, dict[str, Any]] = {
    "SmolLM3Config": {"no_rope_layers": [0, 0], "use_sliding_window": False, "layer_types": ["full_attention"] * 2},
    "Exaone4Config": {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    "LlamaConfig": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("kind", list(UNTURNED))
def test_keys_that_do_not_turn_by_fixed_angles_are_not_turned(kind: str) -> None:
    with pytest.raises(UserError, match="rotary embedding|positions of kind"):
        score(lm_of(kind, **UNTURNED[kind], method="streaming_llm", capacity=48, rotate=True), [PAIR])


@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen3Config", "Phi3Config"])
def test_keys_that_turn_are_turned(kind: str) -> None:
    more = {"pad_token_id": 0} if kind == "Phi3Config" else {}
    lm = lm_of(kind, **more, method="streaming_llm", capacity=48, rotate=True)
    score(lm, [PAIR])
    assert set(lm.report()["phases"]["eviction"]["calls"]) and lm.report()["phases"]["eviction"]["calls"]["sparse"] == 2


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("reference", 5, "reference is 5; expected a text"),
        ("unit", 5, "unit is 5; expected a text"),
        ("budget_knobs", None, "budget_knobs is None; expected a tuple of names"),
        ("budget_knobs", 5, "budget_knobs is 5; expected a tuple of names"),
        ("tiny", None, "tiny is None; expected knobs and their values"),
        ("whole", 3, "whole is 3; expected knobs and their values"),
        ("paper", "x", "paper is 'x'; expected presets.Parameters, or None"),
    ],
)
def test_what_a_class_says_of_itself_is_of_the_right_kind(name: str, value: Any, says: str) -> None:
    """Else it would be found in the middle of a run, or of a list of all methods."""
    cls = type("Own", (KNorm,), {"name": "own", name: value})
    with pytest.raises(ValueError, match=re.escape(says)):
        METHODS.add(cls)
    assert "own" not in METHODS


@pytest.mark.parametrize(("beta", "typed"), [(20, 20), (2, 300), (1, 700)])
def test_what_is_typed_is_kept_in_every_layer_or_refused(beta: float, typed: int) -> None:
    """The last layer keeps the least: where it cannot hold the tokens that are always kept, nothing may run."""
    method, length, layers = PyramidKV(beta=beta, sinks=0, local=typed), 4096, 12
    largest = method.largest_sparsity(length)
    for sparsity in (largest - 0.01, largest + 0.01):
        found, budget = method.resolved(sparsity, length, Layer(0, layers))
        call = Call(*[torch.zeros(1, length, 8)] * 3, 1.0, None, "eviction", budget, Layer(layers - 1, layers))
        kept = found._tokens(found.layer_budget(call, length), length)
        assert (kept >= typed) == (sparsity < largest)
    with pytest.raises(UserError, match="cannot hold"):
        PyramidKV(beta=beta, sinks=0, local=typed, capacity=int(typed * beta) - 1, window=2).check_native()
