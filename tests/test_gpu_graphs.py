"""CUDA graphs on a GPU: captured anew whenever storage moves, and for hundreds of answers of a real model.

The last test wants a model's folder in SPARSE_HF_TEST_MODEL (Qwen2.5-Coder-1.5B-Instruct) and the data of the QA tasks
in SPARSE_HF_TEST_QA.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from decoding_lms import generate, lm_of, prompts_of

from lm_eval_sparse.runtime.graphs import Graphs

pytestmark = pytest.mark.gpu

MODEL, QA = os.environ.get("SPARSE_HF_TEST_MODEL"), os.environ.get("SPARSE_HF_TEST_QA")
#: Seven generated tasks; together some 300 answers.
TASKS = [
    f"frontier_{name}_4k"
    for name in ("niah", "vt", "cwe", "toefl", "story_retrieval", "story_multihop", "story_filtering")
]
DOCUMENTS = 43


@pytest.mark.parametrize("method", ["dense", "quest"])
def test_a_capture_after_all_graphs_were_dropped(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something made during a capture outlives its graph, as what modelling code keeps for itself does."""
    rng = random.Random(5)
    kept: list[Any] = []
    capture = Graphs._capture

    def keeping(self: Graphs) -> Any:
        decoder = self._step.__self__
        call = decoder.call

        def noted(*args: Any) -> Any:
            logits = call(*args)
            if torch.cuda.is_current_stream_capturing():
                kept.append(logits * 2)
            return logits

        decoder.call = noted
        try:
            return capture(self)
        finally:
            decoder.call = call

    monkeypatch.setattr(Graphs, "_capture", keeping)
    lm = lm_of("llama", method=method, batch_size=4, **({"sparsity": 0.5} if method == "quest" else {}))
    for low, high in ((5, 60), (100, 180), (10, 170)):  # longer prompts move storage: everything is captured anew
        texts = generate(lm, prompts_of(rng, 9, low, high), max_gen_toks=9)
        for text in texts:
            assert text.stats is not None
    loops = lm.report()["phases"]["decode"]
    assert set(loops["loops"]) == {"cuda_graph"} and "loop_reasons" not in loops
    assert len(kept) > 3


@pytest.mark.skipif(not MODEL or not QA, reason="SPARSE_HF_TEST_MODEL and SPARSE_HF_TEST_QA name no folders")
def test_three_hundred_answers_of_a_real_model() -> None:
    import lm_eval

    from lm_eval_sparse import patches

    patches.install()  # where packages lie on PYTHONPATH Python reads no start-up files
    results = lm_eval.simple_evaluate(
        model="sparse-hf",
        model_args={"pretrained": MODEL, "dtype": "bfloat16", "method": "quest", "sparsity": 0.95},
        tasks=TASKS,
        limit=DOCUMENTS,
        batch_size=8,
        device="cuda",
        metadata={"qa_folder": QA},
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    decode = results["config"]["sparse"]["phases"]["decode"]
    print({task: len(samples) for task, samples in results["samples"].items()}, decode)
    assert sum(len(samples) for samples in results["samples"].values()) == len(TASKS) * DOCUMENTS
    assert set(decode["loops"]) == {"cuda_graph"} and decode["loops"]["cuda_graph"] > 20 * DOCUMENTS
    assert not decode.get("loop_reasons") and decode["calls"]["sparse"] and not decode["calls"]["dense"]
    assert decode["executed_sparsity"] == pytest.approx(0.95, abs=0.01)
