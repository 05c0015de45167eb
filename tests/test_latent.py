"""Values of other dimensions than keys: latent attention (DeepSeek) under prefill methods, MiMo's heads in all phases.

The oracle is the definition in fp64, and transformers' own models. LATENT_SEED=<seed> repeats a run.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import tiny
import torch
from decoding_lms import all_stats, generate, lm_of, prompts_of
from prefill_cases import KINDS, Draw, assert_close, attention, interpreter_missing, random_call, random_row
from transformers import PreTrainedModel

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels.prefill import block_sparse_prefill, block_sparse_prefill_rows, flex, unavailable_reason
from lm_eval_sparse.kernels.types import RaggedKV
from lm_eval_sparse.runtime.accounting import DecodeShape, RowCounts, count_dense, count_eviction, count_step
from lm_eval_sparse.runtime.accounting.rows import FIELDS
from lm_eval_sparse.runtime.layers import halves_turn
from tests import families
from tests.family_sweep import examine

MISSING = interpreter_missing()
TRITON = pytest.param("triton", marks=pytest.mark.skipif(MISSING is not None, reason=MISSING or ""))
#: Dimensions of keys and of values: DeepSeek's, its tiny model's, odd ones, and values that are wider.
DIMS = ((192, 128), (24, 16), (33, 7), (16, 80))


@pytest.fixture
def seed() -> int:
    seed = int(os.environ.get("LATENT_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"LATENT_SEED={seed}")
    return seed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["naive", "gather", TRITON])
def test_prefill(seed: int, backend: str, kind: str | None) -> None:
    draw = Draw(seed)
    for dim, value_dim in DIMS:
        lengths = draw.rng.choice(([63], [40, 17]))
        dtype = draw.rng.choice((torch.float32, torch.float16))
        call = random_call(
            draw, lengths, (2, 1), dim, dtype, (32, 16), kind=kind, poison=backend != "naive", value_dim=value_dim
        )
        _, used = block_sparse_prefill_rows(*call.inputs, outs=call.outs, scale=call.scale, backend=backend)
        assert used == backend
        call.check()


def test_flex(seed: int) -> None:
    if (reason := flex.unavailable_reason("cpu", 32, 32, 24, torch.float32, 16)) is not None:
        pytest.skip(f"flex: {reason}")
    draw = Draw(seed)
    row = random_row(draw, 4, 150, 32, 32, None)
    states = [draw.normal(heads, 150, dim) for heads, dim in ((4, 24), (2, 24), (2, 16))]
    out, used = block_sparse_prefill(*states, row.layout, scale=0.2, backend="flex")
    assert used == "flex"
    assert_close(out, attention(*states, row, 0.2, None))


@pytest.mark.parametrize("backend", ["hopper", "fa4"])
def test_kernels_of_one_dimension_say_so(seed: int, backend: str) -> None:
    draw = Draw(seed)
    layout = random_row(draw, 2, 100, 128, 128, None).layout
    states = [draw.normal(heads, 100, dim) for heads, dim in ((2, 64), (1, 64), (1, 128))]
    said = "keys have 64 dimensions, values 128; it takes one number"
    assert unavailable_reason(backend, states, layout, None) == said


def test_outputs_of_the_wrong_size_are_refused(seed: int) -> None:
    draw = Draw(seed)
    call = random_call(draw, [40], (2, 1), 24, torch.float32, (32, 16), value_dim=16)
    with pytest.raises(ValueError, match=r"out is \(2, 40, 24\).*expected \(2, 40, 16\)"):
        block_sparse_prefill_rows(*call.inputs, outs=[call.queries[0].clone()])
    other = random_call(draw, [40], (2, 1), 24, torch.float32, (32, 16), value_dim=8)
    both = [[*mine, *theirs] for mine, theirs in zip(call.inputs, other.inputs, strict=True)]
    with pytest.raises(ValueError, match="rows differ in heads, KV heads, dimensions"):
        block_sparse_prefill_rows(*both)


# --- models ----------------------------------------------------------------------------------------------------------

#: Every prefill method, and what makes it sparse in prompts of some 100 tokens.
PREFILL: dict[str, dict[str, Any]] = {
    "block_sparse": {"top_k": 4},
    "flexprefill": {"gamma": 0.5, "min_budget": 0, "block_size": 16},
    "vertical_slash": {"verticals": 8, "slashes": 8, "window": 16, "sinks": 2, "near": 4, "tile": 16},
}


def latent() -> PreTrainedModel:
    """DeepSeek-V3 with keys of 24 dimensions and values of 16, a layer of experts among two."""
    return tiny.family("deepseek_v3", qk_nope_head_dim=16)


@pytest.mark.parametrize("method", PREFILL)
def test_latent_attention_counts_all_layers_and_feels_no_neighbour(method: str) -> None:
    prompts = prompts_of(random.Random(3), 4, 60, 120)
    options = {"method": method, "backend": "gather", **PREFILL[method]}
    alone = lm_of(latent, **options)
    texts = generate(alone, prompts)
    report = alone.report()
    assert report["layers"]["sparse_eligible"] == 2 and not report["layers"]["untouched"]
    found = report["phases"]["prefill"]
    assert found["calls"] == {"sparse": 8, "dense": 0, "fallback": 0} and found["executed_sparsity"] > 0.05
    together = lm_of(latent, **options, batch_size=4)
    again = generate(together, prompts)
    assert again == texts and all_stats(again) == all_stats(texts)


@pytest.mark.parametrize("method", ["snapkv", "quest"])
def test_what_a_latent_cache_has_no_place_for_is_refused(method: str) -> None:
    with pytest.raises(UserError) as error:
        lm_of(latent, method=method, sparsity=0.5)
    assert "2 heads" not in str(error.value) and "\n" not in str(error.value)
    assert "is given other keys and values (4 heads of 24 and 4 heads of 16) than its cache holds" in str(error.value)
    assert "latent attention" in str(error.value) and "a prefill method" in str(error.value)


def test_only_a_part_of_latent_keys_is_turned() -> None:
    """And it is not the first one: methods that move keys to other positions must not be told how."""
    assert not halves_turn(latent().model.layers[0].self_attn)
    assert halves_turn(tiny.family("llama").model.layers[0].self_attn)


def test_values_of_their_own_dimension_in_a_cache_of_ours() -> None:
    """MiMo-V2: plain keys and values of 16 and 8 dimensions, so later phases have a place; sinks in its windows."""
    found = examine("mimo_v2_flash", ("dense", "eviction", "decode"), v_head_dim=8)
    assert set(found.phases.values()) == {"right"}


def test_figures_weigh_keys_and_values() -> None:
    """KV memory and bytes of an eviction method in MiMo's two full layers, by hand."""
    made = families.build("mimo_v2_flash", v_head_dim=8)
    made.generation_config.eos_token_id = None
    prompts = prompts_of(random.Random(4), 1, 100, 120)
    lm = lm_of(lambda: made, torch.float32, method="snapkv", capacity=24, window=8, sinks=2, local=4)
    (text,) = generate(lm, prompts, max_gen_toks=4)
    tokens = len(lm.tok_encode(prompts[0]))
    full = [index for index, reason in lm.runtime.layers.items() if reason is None]
    assert [lm.runtime.sizes[index][0] for index in full] == [2 * (16 + 8) * 4] * 2
    assert text.stats["eviction"]["kv_memory_fraction"] == pytest.approx(24 / tokens)
    read = sum(24 + step for step in (1, 2, 3)) / sum(tokens + step for step in (1, 2, 3))
    assert text.stats["decode"]["bytes_read_fraction"] == pytest.approx(read)


def test_operations_and_bytes_weigh_keys_and_values() -> None:
    """A dense prompt of 10 tokens, one that is evicted, and a step of decoding: 24 numbers of a key, 16 of a value."""
    counts, (query, key, value) = RowCounts(), (torch.zeros(n, 10, d) for n, d in ((4, 24), (2, 24), (2, 16)))
    both, pairs = 24 + 16, 55
    count_dense(counts, "prefill", 0, query, key, value, fallback=False)
    count_eviction(counts, 0, query, key, "m", value_dim=16)
    kv = RaggedKV.of(key.flatten(0, 1), value.flatten(0, 1), [0, 10], [10, 10], 2)
    shape = DecodeShape.of(4, 2, kv, 0, False, False)
    count_step(counts, 0, shape, kv.lengths, 10, 1, None, None, "gather")

    def per_head(phase: str, name: str) -> float:
        values = counts.phase(phase).layers[0][FIELDS.index(name)]
        assert len(set(values)) == 1
        return float(values[0])

    assert per_head("prefill", "flops_dense") == 2 * both * pairs == per_head("eviction", "flops_dense")
    assert per_head("prefill", "bytes_dense") == both * 4 * 10
    assert per_head("eviction", "bytes_dense") == both * 4 * 10 / 2  # a KV head serves two query heads
    assert per_head("decode", "flops_dense") == 2 * both * 10
    assert per_head("decode", "bytes_read") == both * 4 * 10 / 2
