"""Costs of prefill and decoding: every figure that the paper prints, and what a measured run costs."""

from __future__ import annotations

import importlib
import random
import sys
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lm_eval_sparse.analysis import cost, pareto, printed, shapes
from lm_eval_sparse.analysis.shapes import PUBLISHED, Sizes, published
from lm_eval_sparse.results.schema import PhaseFigures, Shape

ROOT = Path(__file__).parents[1]
FOUR = [PUBLISHED[f"Qwen2.5-{size}"] for size in ("7B", "14B", "32B", "72B")]
LENGTHS = (16384, 65536, 131072)


def fresh() -> random.Random:
    return random.Random(random.SystemRandom().getrandbits(64))


def some_sizes(rng: random.Random, window: bool = False) -> Sizes:
    layers = rng.randint(2, 40)
    full = rng.randint(1, layers - 1) if window else layers
    return Sizes(
        layers, full, 64 * rng.randint(1, 40), 4 * rng.randint(1, 8), rng.choice((1, 2, 4)), rng.choice((64, 128, 256)),
        rng.randint(100, 9000), rng.randint(1000, 200000), window=rng.randint(8, 4096) if window else None,
    )  # fmt: skip


# --- what the paper prints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch, shares, speedups",
    [
        (1, "7 22 35", "1.06 1.21 1.41"),
        (8, "35 67 80", "1.41 2.22 2.84"),
        (64, "80 94 97", "2.84 4.06 4.46"),
    ],
)
def test_decode_shares_and_speedups_are_the_plotted_ones(batch, shares, speedups):
    found = [fmean(cost.decode(one, length, batch=batch).attention_share for one in FOUR) for length in LENGTHS]
    assert " ".join(f"{100 * share:.0f}" for share in found) == shares
    found = [
        fmean(cost.decode(one, length, batch=batch).total / cost.decode(one, length, 0.2, batch).total for one in FOUR)
        for length in LENGTHS
    ]
    assert " ".join(f"{speedup:.2f}" for speedup in found) == speedups


def test_the_decode_formula_as_printed_gives_other_shares():
    found = [fmean(printed.decode(one, length).attention_share for one in FOUR) for length in LENGTHS]
    assert " ".join(f"{100 * share:.1f}" for share in found) == "6.0 20.0 32.9"


def test_the_largest_speedup_of_the_text_is_that_of_one_model():
    most = [cost.decode(one, 131072, batch=64).total / cost.decode(one, 131072, 0.2, 64).total for one in FOUR]
    assert f"{fmean(most):.2f}" == "4.46" and f"{max(most):.1f}" == "4.7" and max(most) == most[1]


def test_prefill_shares_are_the_plotted_ones_and_its_speedups_divide_projections_too():
    dense = [[cost.prefill(one, length) for one in FOUR] for length in LENGTHS]
    sparse = [[cost.prefill(one, length, 0.2) for one in FOUR] for length in LENGTHS]
    assert " ".join(f"{100 * fmean(one.attention_share for one in row):.0f}" for row in dense) == "40 68 80"

    def mean(total: Any) -> str:
        rows = zip(dense, sparse, strict=True)
        return " ".join(f"{fmean(a.total / total(b) for a, b in zip(*row, strict=True)):.2f}" for row in rows)

    assert mean(lambda one: one.total) == "1.31 2.00 2.59"
    assert mean(lambda one: one.total - 0.8 * one.projections) == "1.48 2.20 2.80"
    as_printed = [
        fmean(printed.prefill(one, length).total / printed.prefill(one, length, 0.2).total for one in FOUR)
        for length in LENGTHS
    ]
    assert " ".join(f"{speedup:.2f}" for speedup in as_printed) == "1.31 2.00 2.59"


def test_shares_of_a_model_with_windows():
    qwen, gemma = PUBLISHED["Qwen2.5-14B"], PUBLISHED["Gemma-3-12B"]
    for model, prefill, decode in ((qwen, "76", "79"), (gemma, "42", "61")):
        assert f"{100 * cost.prefill(model, 65536, batch=8).attention_share:.0f}" == prefill
        assert f"{100 * cost.decode(model, 65536, batch=8).attention_share:.0f}" == decode
    assert f"{100 * printed.prefill(gemma, 65536, batch=8).attention_share:.0f}" == "75"
    assert f"{100 * printed.decode(gemma, 65536, batch=8).attention_share:.0f}" == "89"


def test_ticks_of_the_third_version():
    seven, most = (cost.prefill(PUBLISHED[f"Qwen2.5-{size}"], 128000, batch=64).total for size in ("7B", "72B"))
    assert (f"{seven:.1e}", f"{most:.1e}") == ("5.4e+17", "3.9e+18")


def test_an_index_over_the_residual_stream_would_exceed_the_cache():
    for one in FOUR:
        length = fresh().randint(16384, 131072) // 16 * 16
        whole = cost.cache(one, length)
        assert cost.quest_index(one, length) / whole == pytest.approx(1 / 16, rel=1e-12)
        assert printed.quest_index(one, length) > whole
        assert 1 / 20 + cost.quest_index(one, length) / whole == pytest.approx(0.1125, rel=1e-12)


def test_the_committed_table_is_what_the_script_writes():
    sys.path.append(str(ROOT / "benchmarks"))
    script = importlib.import_module("cost_check")
    written = (ROOT / "docs" / "results" / "cost_check.md").read_text(encoding="utf-8")
    assert written == script.text()
    wrong = [line for line in script.table() if "**" in line.split("|")[3]]
    assert len(wrong) == 2 and "1.48 / 2.20 / 2.80" in wrong[0] and "4.7" in wrong[1]


# --- where two sizes cost the same -----------------------------------------------------------------------------------

SMALL, LARGE = PUBLISHED["Qwen2.5-0.5B"], PUBLISHED["Qwen2.5-1.5B"]


@pytest.mark.parametrize(
    "phase, batch, length, first",
    [
        ("prefill", 1, 16384, None),
        ("prefill", 1, 32768, 0.9),
        ("prefill", 1, 65536, 0.8),
        *(("decode", 1, length, None) for length in (4096, 16384, 32768, 65536, 131072)),
        ("decode", 64, 4096, 0.9),
        ("decode", 64, 16384, 0.8),
    ],
)
def test_from_which_sparsity_a_larger_model_costs_no_more(phase, batch, length, first):
    """At the sparsities that are usually run; `None` is never."""
    count = cost.prefill if phase == "prefill" else cost.decode
    budget = count(SMALL, length, batch=batch).total
    enough = [s for s in (0.5, 0.8, 0.9, 0.95, 1.0) if count(LARGE, length, 1 - s, batch).total <= budget]
    found = cost.equal_cost(SMALL, LARGE, length, phase, batch)
    assert (enough[0] if enough else None) == first
    assert (found.sparsity is None) == (first is None)
    if first is not None:
        assert count(LARGE, length, 1 - found.sparsity, batch).total == pytest.approx(budget, rel=1e-12)


def test_equal_cost_by_bisection():
    """With what selecting takes, at any sizes, against a search for the sparsity."""
    rng = fresh()
    kinds = set()
    for _ in range(200):
        small, large = some_sizes(rng, rng.random() < 0.5), some_sizes(rng, rng.random() < 0.5)
        length, batch, overhead = rng.randint(2, 200_000), rng.choice((1, 8, 64)), rng.choice((0, 0.06, 0.3))
        pairs, phase = rng.choice(("square", "triangle")), rng.choice(("prefill", "decode"))

        def total(s: float, large=large, length=length, batch=batch, overhead=overhead, pairs=pairs, phase=phase):
            if phase == "prefill":
                return cost.prefill(large, length, 1 - s, batch, overhead, pairs).total
            return cost.decode(large, length, 1 - s + overhead, batch).total

        same = cost.prefill if phase == "prefill" else cost.decode
        more = {"pairs": pairs} if phase == "prefill" else {}
        budget = same(small, length, batch=batch, **more).total
        found = cost.equal_cost(small, large, length, phase, batch, pairs, overhead)
        if total(1.0) >= budget:
            assert found.sparsity is None and found.share <= 1e-9
        elif total(0.0) <= budget:
            assert found.sparsity == pytest.approx(0, abs=1e-9) and found.share >= 1 - 1e-9
        else:
            low, high = 0.0, 1.0
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if total(middle) > budget else (low, middle)
            assert found.sparsity == pytest.approx(high, abs=1e-6)
        kinds.add(None if found.sparsity is None else found.sparsity > 0)
    assert kinds == {None, False, True}


# --- formulas --------------------------------------------------------------------------------------------------------


def test_attention_is_counted_pair_by_pair():
    rng = fresh()
    for _ in range(20):
        length, window = rng.randint(1, 60), rng.choice((None, rng.randint(1, 80)))
        causal = sum(min(at + 1, window or length) for at in range(length))
        assert cost.causal_pairs(length, window, "triangle") == causal
        assert cost.causal_pairs(length, window) == length * min(length, window or length)


def test_prefill_of_a_small_model_by_hand():
    """Against products of matrices, one by one."""
    rng = fresh()
    one, length = some_sizes(rng, window=True), rng.randint(10, 5000)
    d, h, kv, dim, m = one.hidden, one.query_heads, one.kv_heads, one.head_dim, one.mlp

    def matmul(rows: int, inner: int, columns: int) -> int:
        return 2 * rows * inner * columns

    projections = matmul(length, d, h * dim) + 2 * matmul(length, d, kv * dim) + matmul(length, h * dim, d)
    mlp = 3 * matmul(length, d, m) + 2 * length * m
    pair = 2 * dim + 2 * dim + 3
    density = Fraction(rng.randint(1, 100), 100)
    full, near = length * length, length * min(length, one.window)
    expected = {
        "embedding": 2 * length * d,
        "projections": one.layers * projections,
        "attention": float(one.attention_layers * h * full * pair * density),
        "windows": (one.layers - one.attention_layers) * h * near * pair,
        "mlp": one.layers * mlp,
        "head": matmul(length, d, one.vocab),
        "estimator": 0.25 * one.attention_layers * h * full * 4 * dim,
    }
    found = cost.prefill(one, length, float(density), 3, 0.25)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(3 * value, rel=1e-12), name
    assert found.total == pytest.approx(3 * sum(expected.values()), rel=1e-12)


def test_weights_are_those_of_the_model():
    """What a step reads is all parameters but the biases, the norms and an embedding that is not the output matrix."""
    billions = {name: cost.weights(sizes) / 1e9 for name, sizes in PUBLISHED.items()}
    # Published parameters without the embedding where it is not tied (Qwen2.5 7B and up, Llama), as in model cards.
    assert billions["Qwen2.5-0.5B"] == pytest.approx(0.494, abs=5e-4)
    assert billions["Qwen2.5-1.5B"] == pytest.approx(1.544, abs=5e-4)
    assert billions["Qwen2.5-3B"] == pytest.approx(3.086, abs=5e-4)
    assert billions["Qwen2.5-7B"] == pytest.approx(7.616 - 152064 * 3584 / 1e9, abs=1e-3)
    assert billions["Qwen2.5-14B"] == pytest.approx(14.770 - 152064 * 5120 / 1e9, abs=2e-3)
    assert billions["Qwen2.5-32B"] == pytest.approx(32.764 - 152064 * 5120 / 1e9, abs=2e-3)
    assert billions["Qwen2.5-72B"] == pytest.approx(72.706 - 152064 * 8192 / 1e9, abs=3e-3)
    assert billions["Llama-3.1-8B"] == pytest.approx(8.030 - 128256 * 4096 / 1e9, abs=1e-3)
    assert billions["Llama-3.1-70B"] == pytest.approx(70.554 - 128256 * 8192 / 1e9, abs=3e-3)
    assert billions["SmolLM2-135M"] == pytest.approx(0.1345, abs=1e-4)


def test_sizes_of_gemma_are_those_that_transformers_counts():
    """The layers that see everything, and parameters (without the norms), of a configuration with published values."""
    configs = pytest.importorskip("transformers")
    known = PUBLISHED["Gemma-3-4B"]
    config = configs.Gemma3TextConfig(
        num_hidden_layers=known.layers, hidden_size=known.hidden, sliding_window=known.window
    )
    kinds = [kind == "full_attention" for kind in config.layer_types]
    assert sum(kinds) == known.attention_layers
    assert [
        sum((at + 1) % 6 == 0 for at in range(PUBLISHED[name].layers)) for name in ("Gemma-3-12B", "Gemma-3-27B")
    ] == [PUBLISHED[name].attention_layers for name in ("Gemma-3-12B", "Gemma-3-27B")]


@pytest.mark.parametrize(
    "name, known",
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("/data/models/Qwen2.5-14B-Instruct-1M/", "Qwen2.5-14B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("google/gemma-3-4b-it", "Gemma-3-4B"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", None),
        ("Qwen/Qwen2.5-7B-pruned", None),
        ("Qwen/Qwen2.5-Coder-7B", None),
        ("gpt2", None),
        ("", None),
    ],
)
def test_names_of_models(name, known):
    assert published(name) == (PUBLISHED[known] if known else None)


# --- a measured run --------------------------------------------------------------------------------------------------


def shape(sizes: Sizes, **more: Any) -> Shape:
    return Shape(
        layers=sizes.layers, attention_layers=sizes.attention_layers, hidden=sizes.hidden,
        query_heads=sizes.query_heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim, value_dim=sizes.head_dim,
        mlp=sizes.mlp, vocab=sizes.vocab, **{"window": sizes.window, **more},
    )  # fmt: skip


def run(sizes: Sizes | None, phases: str = "", **figures: Any) -> SimpleNamespace:
    """A record as far as costs read it; `figures` are those of phases, or other fields."""
    by_phase = {
        name: PhaseFigures(**figures.pop(name)) for name in ("prefill", "eviction", "decode") if name in figures
    }
    values = {
        "model": "some/model", "model_shape": None if sizes is None else shape(sizes), "model_dtype": "bfloat16",
        "task": "niah", "phases": phases, "prompt_tokens": 5000.5, "by_phase": by_phase, "speed": {},
        "seconds_by_phase": {},
    }  # fmt: skip
    return SimpleNamespace(**{**values, **figures})


def test_prefill_of_a_run_has_its_density_and_what_selecting_took():
    one = some_sizes(fresh(), window=True)
    figures = {"method": "mine", "executed": 0.9, "estimator_flops_fraction": 0.031}
    found = cost.of(run(one, "prefill", prefill=figures), batch=4)
    assert found.prefill == cost.prefill(one, 5000.5, 1 - 0.9, 4, 0.031)
    assert found.decode == cost.decode(one, 5000.5, 1.0, 4)  # decodes densely
    dense = cost.of(run(one), batch=4)
    assert found.prefill.estimator == pytest.approx(
        0.031 * dense.prefill.attention * 4 * one.head_dim / (4 * one.head_dim + 3)
    )
    both = {"prefill": figures, "eviction": {"method": "e", "executed": 0.5, "estimator_flops_fraction": 0.1},
            "decode": {"bytes_read_fraction": 0.52}}  # fmt: skip
    found = cost.of(run(one, "prefill+eviction", **both), pairs="triangle")
    assert found.prefill == cost.prefill(one, 5000.5, 1 - 0.9, 1, 0.131, "triangle")
    assert found.decode.cache == pytest.approx(0.52 * cost.cache(one, 5000.5))


def test_decoding_of_a_run_reads_what_was_measured_metadata_included():
    one = some_sizes(fresh())
    figures = {"method": "quest", "executed": 0.95, "bytes_read_fraction": 0.1125, "kv_memory_fraction": 1.0625}
    found = cost.of(run(one, "decode", decode=figures), batch=64)
    assert found.decode.cache == pytest.approx(64 * 0.1125 * cost.cache(one, 5000.5))
    assert found.decode.weights == cost.weights(one)
    assert found.memory == pytest.approx(64 * 2 * 1.0625 * cost.cache(one, 5000.5))
    assert found.total("prefill") == cost.prefill(one, 5000.5, batch=64).total


def test_what_was_held_is_read_where_nothing_was_decoded():
    one = some_sizes(fresh())
    kept = {"method": "snapkv", "executed": 0.8, "estimator_flops_fraction": 0.01, "kv_memory_fraction": 0.2}
    found = cost.of(run(one, "eviction", eviction=kept))
    assert found.decode.cache == pytest.approx(0.2 * cost.cache(one, 5000.5))
    found = cost.of(run(one, "eviction", eviction=kept, decode={"bytes_read_fraction": 0.23}))
    assert found.decode.cache == pytest.approx(0.23 * cost.cache(one, 5000.5))


def test_memory_has_the_bytes_of_an_element():
    one = some_sizes(fresh(), window=True)
    for name, size in (("bfloat16", 2), ("float32", 4)):
        held = one.layers - one.attention_layers, min(5000.5, one.window)
        elements = 2 * one.kv_heads * one.head_dim * (one.attention_layers * 5000.5 + held[0] * held[1])
        assert cost.of(run(one, model_dtype=name)).memory == pytest.approx(size * elements)
    assert "int3" in cost.of(run(one, model_dtype="int3")).unknown["memory"]
    assert cost.of(run(one, model_dtype=None)).memory is None


def test_seconds_are_those_that_were_recorded():
    found = cost.of(run(None, speed={"prefill": 2000.2, "decode": 40.0}))
    assert found.seconds == {"prefill": pytest.approx(2.5), "decode": 0.025} and "seconds" not in found.unknown
    assert cost.of(run(None)).unknown["seconds"]
    # 40 prompts: 100 s of prefill, 60 s of answers.
    spent = {"prefill": 100.0, "decode": 60.0, "total": 190.0}
    found = cost.of(run(None, speed={"prefill": 40 * 5000.5 / 100, "decode": 40.0}, seconds_by_phase=spent))
    assert found.seconds["document"] == pytest.approx(160 / 40)


@pytest.mark.parametrize(
    "change, kinds, reason",
    [
        ({"model_shape": None}, {"prefill", "decode", "memory"}, "do not hold the model's sizes"),
        ({"prompt_tokens": None}, {"prefill", "decode", "memory"}, "prompts of niah"),
        ({"phases": "prefill"}, {"prefill"}, "what its prefill computed"),
        (
            {"phases": "prefill", "by_phase": {"prefill": PhaseFigures(executed=0.5)}},
            {"prefill"},
            "selecting took in prefill",
        ),
        ({"phases": "decode"}, {"decode", "memory"}, "is not recorded"),
        ({"phases": "eviction"}, {"prefill", "decode", "memory"}, "is not recorded"),
    ],
)
def test_what_is_not_known_gets_no_number(change, kinds, reason):
    record = run(some_sizes(fresh()))
    found = cost.of(SimpleNamespace(**{**vars(record), **change}))
    assert set(found.unknown) - {"seconds"} == kinds
    assert {kind for kind in ("prefill", "decode", "memory") if getattr(found, kind) is None} == kinds
    assert any(reason in said for said in found.unknown.values())


def test_sizes_that_leave_the_cost_open_have_none():
    one = some_sizes(fresh(), window=True)
    whole = shape(one)
    for change, reason in (
        ({"mlp": None}, "do not say its mlp"),
        ({"window": None}, "cost is not recorded"),
        ({"value_dim": one.head_dim // 2}, "latent attention"),
        ({"attention_layers": 0}, "layers of full attention"),
    ):
        record = run(one, model_shape=whole.model_copy(update=change))
        assert reason in cost.of(record).unknown["prefill"]
    # A batch reads experts that no single token chooses; a token alone reads its own.
    record = run(one, model_shape=whole.model_copy(update={"experts": 8}))
    assert "experts" in cost.of(record, batch=2).unknown["decode"] and cost.of(record, batch=1).decode is not None


def test_published_sizes_stand_in_and_never_against_what_was_recorded():
    name, known = "google/gemma-3-4b-it", PUBLISHED["Gemma-3-4B"]
    for given in (None, shape(known, window=None), shape(known).model_copy(update={"mlp": None})):
        assert shapes.sizes_of(run(known, model=name, model_shape=given)) == (known, "")
    other = shape(known).model_copy(update={"mlp": None, "layers": 30})
    assert shapes.sizes_of(run(known, model=name, model_shape=other))[0] is None


# --- fronts ----------------------------------------------------------------------------------------------------------


def test_the_front_is_what_nothing_dominates():
    rng = np.random.default_rng()
    for trial in range(300):
        size = int(rng.integers(0, 40))
        grid = trial % 2  # many ties
        cost_of = rng.integers(1, 6, size).astype(float) if grid else rng.random(size)
        score = rng.integers(0, 5, size) / 4 if grid else rng.random(size)
        if size > 3:
            score[int(rng.integers(size))] = np.nan
            cost_of[int(rng.integers(size))] = np.inf
        expected = [
            np.isfinite(c) and np.isfinite(s) and not any(
                np.isfinite(other) and np.isfinite(better) and other <= c and better >= s and (other < c or better > s)
                for other, better in zip(cost_of, score, strict=True)
            )
            for c, s in zip(cost_of, score, strict=True)
        ]  # fmt: skip
        assert pareto.front(cost_of, score).tolist() == expected
