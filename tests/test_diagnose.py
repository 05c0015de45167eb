"""`diagnose=N` held against a brute-force recomputation in fp64 (`diagnose_cases`), and what it must not change.

Models are tiny and random, the prompts of odd lengths are drawn anew in every run.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from decoding_lms import lm_of
from diagnose_cases import BANDS, FIGURES, RUNS, SNAP, Drawn, Everything, Latest, Merged, Recorder, Triangle, expected
from small_lms import generate, request, score, sparse

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.methods import METHODS
from lm_eval_sparse.methods.plan import parse
from lm_eval_sparse.runtime import diagnose
from lm_eval_sparse.runtime.accounting import Ledger, RowCounts


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(autouse=True)
def _own_methods() -> None:
    for cls in (Drawn, Everything, Latest, Merged, Triangle):
        METHODS.add(cls)


def compare(lm: Any, wanted: dict[str, Any]) -> None:
    """The results say what was recomputed, of these phases and no others."""
    report = lm.report()
    for phase, block in report["phases"].items():
        assert ("diagnostics" in block) == (phase in wanted), phase
    for phase, layers in wanted.items():
        block = report["phases"][phase]["diagnostics"]
        assert [row["layer"] for row in block["layers"]] == sorted(layers)
        assert {block["samples"]} == {figures["samples"] for figures in layers.values()}
        for row in block["layers"]:
            for name in FIGURES:
                assert row[name] == pytest.approx(layers[row["layer"]][name], rel=1e-5, abs=1e-9), (phase, row, name)
        for name in FIGURES:
            values = [value for row in block["layers"] for value in row[name]]
            assert block["mean"][name] == pytest.approx(sum(values) / len(values), rel=1e-5)
    json.dumps(report, allow_nan=False)


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["scored", "generated"])
@pytest.mark.parametrize("name", RUNS)
def test_figures_are_those_of_a_brute_force(
    name: str, way: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, options = RUNS[name]
    monkeypatch.setattr(diagnose, "QUERIES", queries := rng.choice([7, 50, 256]))
    model = tiny.family(family, seed=rng.randrange(99)).double()  # in fp32 an oracle may be of another mind
    lm = sparse(model, diagnose=2, batch_size=2, **options)
    prompts = [tiny.words(rng.randrange(9999), rng.choice([61, 83, 107])) for _ in range(2)]
    recorder = Recorder(monkeypatch)
    if way == "scored":
        score(lm, [(prompt, end) for prompt in prompts for end in (" unusual zebra, said he", " red", " river stone")])
    else:
        generate(lm, prompts, max_gen_toks=8)
    wanted = expected(recorder, queries)
    # An answer may end with its first token, which the prefill gives.
    assert set(wanted) == set(lm.sparse.plan.phases) or way == "generated"
    compare(lm, wanted)
    assert all(layers.keys() == ({1} if family == "gemma2" else {0, 1}) for layers in wanted.values())


def test_layers_that_borrow_keys_are_held_against_all_that_their_lender_had(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "head_dim": 16, "sliding_window": 24, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 384,
        "intermediate_size": [96] * 4, "laurel_rank": 8, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    }  # fmt: skip
    model = tiny.build("Gemma3nTextConfig", seed=rng.randrange(99), **{**tiny.COMMON, **options}).double()
    lm = sparse(model, method="test_latest+quest", budget=8, page_size=8, diagnose=1)
    assert lm.runtime.lenders == {3: 1}
    recorder = Recorder(monkeypatch)
    prompt = tiny.words(rng.randrange(999), 83)
    score(lm, [(prompt, end) for end in (" unusual zebra, said he", " river stone")])
    wanted = expected(recorder)
    compare(lm, wanted)
    assert set(wanted) == {"eviction", "decode"} and all(set(layers) == {1, 3} for layers in wanted.values())


@pytest.mark.parametrize("way", ["scored", "generated"])
def test_what_reads_everything_loses_nothing(way: str) -> None:
    """Budgets beyond the prompt: mass and overlap are 1, and the output is off by rounding."""
    options = {"method": "test_triangle+test_everything+quest", "budget": 992, "diagnose": 1}
    lm = sparse(tiny.family("llama"), **options)
    prompt = tiny.words(5, 97)
    if way == "scored":
        score(lm, [(prompt, " unusual zebra, said he")])
    else:
        generate(lm, [prompt])
    for phase, block in lm.report()["phases"].items():
        mean = block["diagnostics"]["mean"]
        assert mean["mass_kept"] == pytest.approx(1, abs=1e-6) and mean["oracle_overlap"] == 1, phase
        assert mean["output_error"] < 1e-5, phase


def test_an_oracle_overlaps_with_itself(rng: random.Random) -> None:
    """The best keys of a query are the oracle's, any others are not; equal ones may be any of them."""
    scores = torch.rand(3, 41, generator=torch.Generator().manual_seed(rng.randrange(999)), dtype=torch.float64)
    order = scores.argsort(descending=True)
    best, worst = (torch.zeros(3, 41, dtype=torch.bool).scatter_(1, own, True) for own in (order[:, :9], order[:, -9:]))
    for chosen, wanted in ((best, 1.0), (worst, 0.0)):
        assert diagnose.overlap(scores, chosen, chosen.sum(1)).tolist() == [wanted] * 3
    some = torch.rand(3, 41) > 0.7
    assert diagnose.overlap(torch.zeros(3, 41), some, some.sum(1)).tolist() == [1.0] * 3


@pytest.mark.parametrize("length", [1, 7, 255, 256, 257, 1000, 4097])
def test_queries_are_spread_evenly_over_a_prompt(length: int) -> None:
    found = diagnose.sampled(length, torch.device("cpu")).tolist()
    assert len(set(found)) == min(length, 256) and found == sorted(found) and found[-1] == length - 1
    gaps = {b - a for a, b in zip([-1, *found], found, strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_sinks_take_their_part_of_each_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a softmax with one key more, whose value is 0. Few scores are held at once."""
    monkeypatch.setattr(diagnose, "MOST_SCORES", 40)
    query, key, value = (torch.randn(heads, 19, dim, dtype=torch.float64) for heads, dim in ((4, 8), (2, 8), (2, 6)))
    sinks, where = torch.randn(4, dtype=torch.float64), torch.tensor([3, 11, 18])
    out, mass = torch.randn(4, 3, 6, dtype=torch.float64), torch.zeros(4)
    wanted = torch.zeros(2, 4, dtype=torch.float64)
    for head in range(4):
        for n, token in enumerate(where.tolist()):
            scores = torch.cat([key[head // 2, : token + 1] @ query[head, token] * 0.3, sinks[head, None]])
            weights = scores.softmax(0)[:-1]
            dense = weights @ value[head // 2, : token + 1]
            wanted[0, head] += (out[head, n] - dense).square().sum()
            wanted[1, head] += dense.square().sum()
            mass[head] += weights[::2].sum() / weights.sum()

    def even(head: int, some: torch.Tensor) -> torch.Tensor:
        return (torch.arange(19) % 2 == 0).expand(len(some), -1)

    found = diagnose.judge(query[:, where], key, value, where, even, out, scale=0.3, sinks=sinks)
    assert found[4:] == pytest.approx(wanted.numpy()) and found[1] == pytest.approx(mass.numpy())


def test_what_a_method_keeps_of_each_token() -> None:
    """Quest has two bounds of 16 dimensions in fp32 for a page of 8 tokens, of which the last one may hold fewer."""
    lm = sparse(tiny.family("llama"), method="quest", budget=16, page_size=8, diagnose=1)
    score(lm, [(tiny.words(5, 97), " river stone")])
    tokens = len(lm.tok_encode(tiny.words(5, 97)))
    rows = lm.report()["phases"]["decode"]["diagnostics"]["layers"]
    wanted = -(-tokens // 8) * 2 * 16 * 32 / tokens
    assert all(row["auxiliary_bits_per_token"] == pytest.approx([wanted] * 2, rel=1e-5) for row in rows)


def test_half_precision_rounds_and_no_more() -> None:
    """In bf16 the output of an attention that reads everything is off by the rounding of one layer."""
    lm = sparse(tiny.family("llama").bfloat16(), method="quest", budget=992, diagnose=1)
    score(lm, [(tiny.words(5, 97), " unusual zebra, said he")])
    mean = lm.report()["phases"]["decode"]["diagnostics"]["mean"]
    assert mean["mass_kept"] == pytest.approx(1, abs=1e-6) and 1e-4 < mean["output_error"] < 1e-2


# --- a run is not changed by it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_else_changes(dtype: torch.dtype) -> None:
    """Scores, answers and all that is counted are the same; prompts are decoded side by side in bf16."""
    knobs = {**RUNS["all"][1], "stats": "full", "batch_size": 4}
    prompts = [tiny.words(seed, words) for seed, words in enumerate((61, 83, 107, 9, 70))]
    runs = []
    for more in ({}, {"diagnose": 3}):
        lm = sparse(tiny.family("llama").to(dtype), **knobs, **more)
        scores = score(lm, [(prompt, end) for prompt in prompts[:3] for end in (" unusual zebra", " red")])
        texts = generate(lm, prompts)
        stats = [{**one.stats, "run": None} for one in (*scores, *texts)]
        report = lm.report()
        assert [one["prompts"] for one in report.pop("runs")] == [report["prompts"]]
        report.pop("run", None)  # seconds
        for block in [report, *report["tasks"].values()]:
            block.pop("prompts")
            for phase in (block.get("phases") or block).values():
                assert ("diagnostics" in phase) == bool(more)
                phase.pop("diagnostics", None)
                phase.pop("loop_reasons", None)
        runs.append((scores, texts, stats, report, lm.detail_report(), lm.fingerprint()))
    for plain, diagnosed in zip(*runs, strict=True):
        assert plain == diagnosed


def test_the_first_prompts_are_looked_at_each_once() -> None:
    """In the order in which lm-eval gives them, whatever their lengths, over scored and generated tasks."""
    lm = sparse(tiny.family("llama"), method="quest", budget=16, page_size=8, diagnose=4)
    prompts = [tiny.words(seed, words) for seed, words in enumerate((61, 107, 83))]
    score(lm, [(prompt, end) for prompt in prompts[:2] for end in (" unusual zebra", " red box")], task="a")
    score(lm, [(prompts[2], " river stone")], task="b")
    generate(lm, [*prompts, prompts[0]])
    report = lm.report()
    found = {task: block["decode"]["diagnostics"]["samples"] for task, block in report["tasks"].items()}
    assert (
        found == {"a": 2, "b": 1, "t": 1} == {**found}
        and lm.report()["phases"]["decode"]["diagnostics"]["samples"] == 4
    )
    assert "layers" not in report["tasks"]["a"]["decode"]["diagnostics"]


def test_prompts_that_a_method_does_not_run_on_are_none_of_its_samples(caplog: pytest.LogCaptureFixture) -> None:
    lm = sparse(tiny.family("llama"), method="vertical_slash", diagnose=2, **BANDS)
    score(lm, [(tiny.words(1, 9), " red box"), (tiny.words(2, 70), " red box"), (tiny.words(3, 70), " red box")])
    assert lm.report()["phases"]["prefill"]["diagnostics"]["samples"] == 1
    lm.check_it_ran()
    assert "diagnose=2: vertical_slash ran in 1 of the first 2 prompts only" in caplog.text


def test_windows_of_a_rolling_score_are_prefill() -> None:
    lm = sparse(tiny.family("llama"), method="block_sparse", top_k=3, diagnose=1, max_length=64)
    (found,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", tiny.words(5, 97))], disable_tqdm=True)
    block = lm.report()["phases"]["prefill"]["diagnostics"]
    read = sum(len(head) + len(tail) - 1 for head, tail in lm.scorer._rolling_windows(tiny.words(5, 97)))
    assert found < 0 and block["samples"] == 1 and block["queries"] == read > 64


def test_ranks_come_to_the_same() -> None:
    """Two processes have the documents in turn; what they found is merged."""
    options = {"method": "snapkv+quest", **SNAP, "budget": 8, "page_size": 8, "diagnose": 3}
    prompts = [tiny.words(seed, words) for seed, words in enumerate((61, 107, 83, 70))]
    whole = sparse(tiny.family("llama"), **options)
    score(whole, [(prompt, " unusual zebra") for prompt in prompts])
    merged = None
    for rank in (0, 1):
        lm = sparse(tiny.family("llama"), **options)
        same = {"unwrap_model": lambda own: own, "gather": lambda own: own}
        lm.accelerator, lm._rank, lm._world_size = SimpleNamespace(device=lm.device, **same), rank, 2
        lm.gather_object = lambda ledgers, dst: [ledgers]
        score(lm, [(prompt, " unusual zebra") for prompt in prompts[rank::2]])
        ledger = lm.reporter.ledgers["t"]
        merged = ledger if merged is None else merged
        if ledger is not merged:
            merged.merge(ledger)
    for phase in ("eviction", "decode"):
        one, two = (own.diagnostics(phase, True) for own in (whole.reporter.ledgers["t"], merged))
        assert one["samples"] == two["samples"] == 3 and one["queries"] == two["queries"]
        for left, right in zip(one["layers"], two["layers"], strict=True):
            for figure in FIGURES:
                assert left[figure] == pytest.approx(right[figure], rel=1e-5)
    assert whole.reporter.ledgers["t"].diagnostics("prefill", True) is None


def test_what_is_kept_of_a_sample_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = sparse(tiny.family("llama"), method="snapkv", diagnose=2, **SNAP)
    seen: list[RowCounts] = []
    add = Ledger.add

    def added(ledger: Ledger, row: RowCounts) -> None:
        add(ledger, row)
        seen.append(row)

    monkeypatch.setattr(Ledger, "add", added)
    score(lm, [(tiny.words(seed, 70), " red box") for seed in range(3)])
    assert [row.diagnosis is None for row in seen].count(True) == 1
    assert all(row.diagnosis is None or (row.diagnosis.sums and not row.diagnosis.whole) for row in seen)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 1.5, "some", True, float("nan")], ids=str)
def test_no_number_of_samples_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(UserError) as failed:
        parse({"method": "quest", "sparsity": 0.9, "diagnose": value})
    wanted = f"diagnose={value!r} is not accepted: give a whole number of at least 1, for example diagnose=8"
    assert str(failed.value) == wanted


@pytest.mark.parametrize("given", [{}, {"method": "dense"}, {"method": "quest", "sparsity": 0}])
def test_dense_attention_has_nothing_to_diagnose(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="diagnose=3 holds a method against dense attention, and .*leave diagnose out"):
        parse({**given, "diagnose": 3})
    assert parse({**given}).diagnose == 0 and parse({**given, "diagnose": None}).diagnose == 0


def test_more_samples_than_documents_are_refused_before_the_run(tmp_path: Path) -> None:
    from lm_eval import simple_evaluate

    folder = tiny.write_tasks(tmp_path / "tasks")
    lm = sparse(tiny.family("llama"), method="quest", budget=16, page_size=8, diagnose=3)
    options = {"model": lm, "tasks": ["tiny_loglikelihood"], "task_manager": tiny.manager(folder)}
    with pytest.raises(
        UserError, match="diagnose=3 is more than the 2 samples of this run: give diagnose=2 or less, or"
    ):
        simple_evaluate(**options, limit=2)
    assert not lm.reporter.begun
    with pytest.raises(UserError, match="diagnose=3 is more than the 1 samples"):
        simple_evaluate(**options, samples={"tiny_loglikelihood": [4]})
    results = simple_evaluate(**options, limit=3)
    assert results["config"]["sparse"]["phases"]["decode"]["diagnostics"]["samples"] == 3
    from lm_eval.utils import make_table

    assert "oracle overlap" in make_table(results)


def test_beams_are_refused() -> None:
    lm = sparse(tiny.family("llama"), method="block_sparse", top_k=3, diagnose=1)
    with pytest.raises(UserError, match="diagnose=N follows one answer to a prompt, and 2 beams are decoded here"):
        generate(lm, [tiny.words(5, 97)], num_beams=2)


def test_a_single_answer_of_transformers_loop_is_followed() -> None:
    """A model that our decoder does not know, with eviction in the course of the answer."""
    found = []
    for own in (True, False):
        lm = sparse(tiny.family("llama").double(), method="test_latest+quest", budget=8, page_size=8, diagnose=1)
        if not own:
            lm.decoding.reason = "for this test"
        generate(lm, [tiny.words(5, 97)], max_gen_toks=10)
        found.append({name: block["diagnostics"] for name, block in lm.report()["phases"].items() if name != "prefill"})
    assert found[0] == found[1]


@pytest.mark.gpu
def test_on_a_gpu_the_rest_runs_in_graphs() -> None:
    """Answers, scores and counts stay what they are, to the bit, and only the samples leave the graphs."""
    prompts = [tiny.words(seed, words) for seed, words in enumerate((261, 183, 307, 90))]
    runs = []
    for more in ({}, {"diagnose": 2}):
        lm = lm_of("llama", method="vertical_slash+snapkv+quest", sparsity=0.5, batch_size=4, **more)
        scores = score(lm, [(prompt, " unusual zebra") for prompt in prompts[:1]])
        texts = generate(lm, prompts, max_gen_toks=40)
        report = lm.report()
        runs.append((scores, texts, [{**one.stats, "run": None} for one in (*scores, *texts)], report))
    for plain, diagnosed in zip(runs[0][:3], runs[1][:3], strict=True):
        assert plain == diagnosed
    block = runs[1][3]["phases"]["decode"]
    assert block["diagnostics"]["samples"] == 2 and block["loops"]["cuda_graph"] > 0
    assert block["loop_reasons"][diagnose.LOOKS] == block["loops"]["eager"] > 0
    assert "eager" not in runs[0][3]["phases"]["decode"]["loops"]
