"""The benchmark of the twins' sensitivity: what its controls select, and the verdicts."""

import importlib
import math
import random
import statistics
import sys
from pathlib import Path

import pytest
import tiny
import torch
from lm_eval.api.instance import Instance

from lm_eval_sparse.kernels.types import RaggedKV
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.protocol import SharedPrompt
from lm_eval_sparse.testing import Decoding, select

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
twins = importlib.import_module("twin_sensitivity")


@pytest.mark.parametrize("length", [None, 4097])
def test_the_window_of_the_prefill_control(length):
    length = length or random.SystemRandom().randint(300, 700)
    query, key = torch.randn(4, length, 8), torch.randn(2, length, 8)
    layout = select(twins.SinksAndWindow(), query, key, scale=1.0, softcap=None, sparsity=0.8)
    layout.check(4)
    sets = []
    for row in range(layout.blocks_q):
        found = layout.indices[1, row, : layout.counts[1, row]].tolist()
        assert found == sorted(set(found)) and found[0] == 0 and found[-1] == row
        assert found[1:] == list(range(row + 2 - len(found), row + 1))
        sets.append(len(found))
    assert sets == sorted(sets) and max(sets) - sets[len(sets) // 2] <= 1
    density = layout.executed_pairs().double().mean() / (length * (length + 1) / 2)
    assert abs(1 - density - 0.8) < 0.01


def test_the_ends_that_the_eviction_control_keeps():
    length = random.SystemRandom().randint(100, 900)
    kept = select(twins.KeepEnds(), torch.randn(4, length, 8), torch.randn(2, length, 8), scale=1.0, softcap=None,
                                   sparsity=0.9)  # fmt: skip
    kept.check(2, length)
    number = int(kept.counts[0])
    assert abs(number - 0.1 * length) < 0.51  # of a tenth and a half either neighbour will do
    assert kept.ids.tolist() == [[*range(4), *range(length - number + 4, length)]] * 2


def test_the_pages_of_the_decode_control():
    lengths = torch.tensor([random.SystemRandom().randint(500, 900), 333])
    starts = torch.tensor([0, 1000])
    kv = RaggedKV(torch.randn(2000, 8), torch.randn(2000, 8), starts, lengths, int(lengths.max()))
    context = Decoding(kv, lengths, None)
    found = [select(twins.RandomPages(), torch.randn(2, 2, 3, 8), context, sparsity=0.8) for _ in range(2)]
    for selection in found:
        assert not selection.faults(kv).any()
        for sequence, length in enumerate(lengths.tolist()):
            for step in range(3):
                visible = length - 2 + step
                count = int(selection.counts[sequence, 0, step])
                assert selection.ids[sequence, 0, step, count - 1] == (visible - 1) // 16
                assert count == round(0.2 * visible / 16)
    assert not torch.equal(found[0].ids, found[1].ids)


def test_one_prefill_serves_dense_and_random_decoding():
    options = {"tokenizer": tiny.tiny_tokenizer(), "device": "cpu", "method": "dense"}
    controlled = twins.ControlledLM(pretrained=tiny.family("llama"), **options)
    seed = random.SystemRandom().randrange(10**6)
    prompt = tiny.words(seed, 300)
    texts = [f" {tiny.words(seed + i, 6 - i)}" for i in range(3)]
    requests = [
        Instance("loglikelihood", {}, (SharedPrompt(f"{prompt} Answer:", len(prompt)), text), i, metadata=("t", 0, 1))
        for i, text in enumerate(texts)
    ]
    dense = SparseHFLM(pretrained=tiny.family("llama"), **options).loglikelihood(requests, disable_tqdm=True)
    found = controlled.loglikelihood(requests, disable_tqdm=True)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in dense], abs=1e-4)  # side by side there
    assert [one[1] for one in found] == [one[1] for one in dense]
    for phase in twins.PHASES:
        answers = [controlled.others[phase][i] for i in range(3)]
        assert all(math.isfinite(a) and a != b for (a, _), (b, _) in zip(answers, dense, strict=True)), phase
    assert {phase: len(values) for phase, values in controlled.measured.items()} == dict.fromkeys(twins.PHASES, 1)
    assert 0.8 < statistics.fmean(controlled.measured["decode"]) < 1 > controlled.measured["eviction"][0] > 0.9


@pytest.mark.parametrize(
    ("dense", "destroyed", "floor", "word"),
    [
        ([0.9, 0.8, 1.0], [0.5, 0.5, 0.5], [0.2] * 3, "responds"),
        ([0.9, 0.8, 1.0], [0.9, 0.8, 1.0], [0.2] * 3, "insensitive"),
        ([0.9, 0.8, 1.0], [1.0, 0.9, 1.0], [0.2] * 3, "insensitive"),
        ([0.9, 0.1, 0.5], [0.8, 0.3, 0.3], [0.2] * 3, "at floor"),
        ([0.23, 0.24, 0.25], [0.1, 0.1, 0.1], [0.2] * 3, "at floor"),  # a fall from nothing
        ([0.23, 0.24, 0.25], [0.23, 0.24, 0.25], [0.2] * 3, "at floor"),  # above it by less than the margin
        ([0.0] * 3, [0.0] * 3, [0.0] * 3, "at floor"),
    ],
)
def test_verdicts(dense, destroyed, floor, word):
    found = twins.verdict(dense, destroyed, [[-9.0] * 3, floor], 0.05)
    falls = [a - b for a, b in zip(dense, destroyed, strict=True)]
    assert found["verdict"] == word
    assert found["fall"] == pytest.approx(sum(falls) / 3)
    assert found["error"] == pytest.approx(statistics.stdev(falls) / 3**0.5)
    assert found["above"] == pytest.approx(statistics.fmean(dense) - floor[0])


def test_a_metric_that_is_better_the_lower_it_is_falls_when_it_rises():
    rows = [
        {
            "leaf": "forced_frontier_x_4k", "index": i, "chance": {}, "better": {"bits_per_char": False},
            "seconds": 1.0, "measured": dict.fromkeys(twins.PHASES, 0.95),
            "scores": {
                "dense": {"bits_per_char": 1 + i / 10}, "without context": {"bits_per_char": 5.0 + i / 10},
                "prefill": {"bits_per_char": 2 + i / 9}, "eviction": {"bits_per_char": 1 + i / 10},
                "decode": {"bits_per_char": 0.9 + i / 10},
            },
        }
        for i in range(4)
    ]  # fmt: skip
    found = twins.summary(rows)["forced_frontier_x_4k"]
    assert found["verdicts"] == {"prefill": "responds", "eviction": "insensitive", "decode": "insensitive"}
    assert found["metrics"]["bits_per_char"]["means"]["dense"][0] == pytest.approx(1.15)
    assert "| 1.150 ± " in twins.markdown(
        {"runs": {"a": {"versions": {}, "chat": True, "device": "d", "dtype": "f", "leaves": {"x": found}}}}
    )
