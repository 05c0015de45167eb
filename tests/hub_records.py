"""Results and samples as lm-eval hands them to its tracker."""

from __future__ import annotations

from typing import Any

MEASURED = {
    "selected_sparsity": 0.91,
    "executed_sparsity": 0.899,
    "bytes_read_fraction": 0.3,
    "kv_memory_fraction": 1.0,
    "estimator_flops_fraction": 0.02,
    "calls": {"sparse": 60, "dense": 2, "fallback": 1},
    "backends": {"gather": 60, "sdpa": 3},
}
RESULTS: dict[str, Any] = {
    "results": {
        "tiny": {"alias": "tiny", "sample_len": 2, "acc,none": 0.5, "acc_stderr,none": 0.25, "a|b,none": 3.0},
        "long": {"alias": "long", "sample_len": 0},
    },
    "configs": {"tiny": {}, "long": {}},
    "versions": {"tiny": 1.0},
    "n-shot": {"tiny": 0},
    "higher_is_better": {"tiny": {"acc": True}},
    "n-samples": {"tiny": {"original": 9, "effective": 2}, "long": {"original": 9, "effective": 0}},
    "config": {
        "model": "sparse-hf",
        "model_args": {"method": "flexprefill", "sparsity": 0.9},
        "limit": 2.0,
        "batch_size": 1,
        "gen_kwargs": None,
        "sparse": {
            "method": "flexprefill",
            "requested_sparsity": 0.9,
            "knobs": {},
            "phases": {"prefill": MEASURED, "decode": {"calls": {"sparse": 0, "dense": 0, "fallback": 0}}},
            "tasks": {"tiny": {"prefill": {**MEASURED, "executed_sparsity": 0.9012}, "decode": {}}},
            "skipped": {"long": "128000 tokens are more than the model's 8192"},
            "versions": {"lm_eval_sparse": "0.1.0", "torch": "2.13.0"},
            "device": "cpu",
        },
    },
    "date": 1.7e9,
    "lm_eval_version": "0.4.13",
    "transformers_version": "5.23.0",
    # A tokenizer without BOS; released lm-eval cannot read this back for its card.
    "tokenizer_bos_token": [None, "None"],
}


def sample(doc_id: int) -> dict[str, Any]:
    text = {"doc_hash": "1", "prompt_hash": "2", "target_hash": "3", "filter": "none", "metrics": ["acc"]}
    answer = {"arguments": (("prompt", " yes"),), "resps": [[(-1.0, True)]], "filtered_resps": [(-1.0, True)]}
    return {"doc_id": doc_id, "doc": {"q": "?"}, "target": 0, "acc": 1.0, **text, **answer}
