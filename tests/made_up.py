"""Made-up results of a whole study, as runs of lm-eval under sparse-hf leave them: files with planted losses.

python tests/made_up.py FOLDER   # a study of 132 files and 1848 records, to look at its report
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_SHAPE = ("layers", "hidden", "query_heads", "kv_heads", "head_dim", "mlp")
#: Parameters, and sizes.
SHAPES = {
    "org/small-0.5B": (494_032_768, (24, 896, 14, 2, 64, 4864)),
    "org/medium-1.5B": (1_543_714_304, (28, 1536, 12, 2, 128, 8960)),
    "org/large-3B": (3_085_938_688, (36, 2048, 16, 2, 128, 11008)),
    "org/huge-7B": (7_615_616_512, (28, 3584, 28, 4, 128, 18944)),
}
LENGTHS = {"4k": 4096, "16k": 16384, "32k": 32768, "64k": 65536}
#: Dense score and chance, and how fast each task breaks.
TASKS = {
    "niah": ("exact", 0.92, 0.0, 1.0), "vt": ("average_precision", 0.6, 0.15, 2.0),
    "cwe": ("average_precision", 0.8, 0.1, 0.3),
    "story_retrieval": ("exact", 0.75, 0.0, 1.2), "story_filtering": ("average_precision", 0.5, 0.12, 1.5),
    "story_multihop": ("exact", 0.04, 0.0, 1.0), "toefl": ("acc", 0.7, 0.25, 0.2), "quality": ("acc", 0.55, 0.25, 0.3),
    "squad": ("exact", 0.65, 0.0, 0.4),
}  # fmt: skip
METHODS = {
    "vertical_slash": ("prefill", 0.5), "flexprefill": ("prefill", 0.8), "block_sparse": ("prefill", 1.0),
    "oracle_blocks": ("prefill", 0.15), "snapkv": ("eviction", 1.2), "ada_snapkv": ("eviction", 0.9),
    "quest": ("decode", 0.3), "oracle_topk": ("decode", 0.05),
}  # fmt: skip
PHASES = ("prefill", "eviction", "decode")
#: Bounds of a page of 16 tokens beside its keys and values.
BOUNDS = 1 / 16


@dataclass(frozen=True)
class Run:
    """What is to be made up: one result file."""

    model: str
    method: str
    sparsity: float
    length: str
    tasks: tuple[str, ...]


def runs(
    models: Sequence[str] = tuple(SHAPES)[:2],
    lengths: Sequence[str] = ("4k", "16k"),
    tasks: Sequence[str] = tuple(TASKS)[:7],
    methods: Sequence[str] = tuple(METHODS),
    sparsities: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
) -> Iterator[Run]:
    """A grid of runs, dense first."""
    for model in models:
        for length in lengths:
            yield Run(model, "dense", 0.0, length, tuple(tasks))
            for method in methods:
                for sparsity in sparsities:
                    yield Run(model, method, sparsity, length, tuple(tasks))


def true_loss(run: Run, task: str) -> float:
    """The planted loss: more with sparsity, less with length and size, of each task and method its own."""
    if run.method == "dense":
        return 0.0
    size = SHAPES[run.model][0]
    steep = METHODS[run.method][1] * TASKS[task][3]
    eased = (4096 / LENGTHS[run.length]) ** 0.3 * (0.5e9 / size) ** 0.1
    return min(1.0, 0.02 * steep * eased * (run.sparsity / (1 - run.sparsity)) ** 0.9)


def figures(phase: str, run: Run, measured: float) -> dict[str, Any]:
    """What a report says of a phase of a task; `measured` is the sparsity that the method reached."""
    filled = "" if run.method == "dense" else METHODS[run.method][0]
    method = run.method if filled == phase else "dense"
    sparsity = measured if filled == phase else 0.0
    # Decoding reads what an eviction left, though it has no method itself.
    read = 1 - measured if phase == "decode" and filled == "eviction" else 1 - sparsity
    return {
        "method": method,
        "requested_sparsity": run.sparsity if method != "dense" else None,
        "selected_sparsity": sparsity,
        "executed_sparsity": sparsity,
        "bytes_read_fraction": read + (BOUNDS if method == "quest" else 0.0),
        "estimator_flops_fraction": 0.01 if method != "dense" else 0.0,
        "kv_memory_fraction": held(run, measured),
        "calls": {"sparse": 100 if method != "dense" else 0, "dense": 0 if method != "dense" else 100, "fallback": 0},
        "backends": {"triton": 100},
        **({"knobs_solved": {"budget": {"mean": 400.0, "min": 390.0, "max": 410.0}}} if method != "dense" else {}),
    }


def held(run: Run, measured: float) -> float:
    """Keys and values held after the prompt, a figure of the prompt and so the same in every phase: what evicts keeps
    less, what chooses in decoding keeps all and what it chooses by."""
    filled = "" if run.method == "dense" else METHODS[run.method][0]
    return 1 - measured if filled == "eviction" else 1.0 + (BOUNDS if run.method == "quest" else 0.0)


def times(run: Run, documents: int) -> dict[str, Any]:
    """Seconds, tokens and their quotients of a run: what a method leaves out of a phase takes no time in it."""
    parameters, _ = SHAPES[run.model]
    length, filled = LENGTHS[run.length], "" if run.method == "dense" else METHODS[run.method][0]
    left = 1 - run.sparsity
    pairs = left if filled == "prefill" else 1.0
    read = left if filled in ("eviction", "decode") else 1.0
    tokens = {"prefill": round(documents * (length - 10.5)), "decode": 100 * documents}
    # A prefill is bound by operations, decoding by what it reads.
    each = {
        "prefill": parameters / 1e14 * (1.0 + length / 16384 * pairs) * (1.01 if filled == "prefill" else 1.0),
        "decode": parameters / 1e12 * (1.0 + length / 16384 * read),
    }
    seconds = {phase: tokens[phase] * each[phase] for phase in tokens}
    return {
        "seconds": {**seconds, "total": sum(seconds.values())},
        "tokens": tokens,
        "tokens_per_second": {phase: tokens[phase] / seconds[phase] for phase in tokens},
        "samples": documents,
    }


def contents(
    run: Run, documents: int, seed: int = 0, task_seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A result file and the lines of its file of documents."""
    parameters, sizes = SHAPES[run.model]
    shape = dict(zip(_SHAPE, sizes, strict=True))
    shape |= {"attention_layers": shape["layers"], "value_dim": shape["head_dim"], "vocab": 151936}
    rng = np.random.default_rng([seed, *map(ord, f"{run.model}{run.method}{run.sparsity}{run.length}")])
    results: dict[str, Any] = {}
    lines, directions, configs, by_task = [], {}, {}, {}
    for short in run.tasks:
        metric, level, chance, _ = TASKS[short]
        task = f"forced_frontier_{short}_{run.length}"
        shared = np.random.default_rng([seed, task_seed, *map(ord, task + run.model)])
        strength = min(0.98, level * (parameters / 0.5e9) ** 0.05)
        # Each document has one threshold for all runs, so that runs are paired as real ones are.
        hard = shared.random((documents, 4))
        right = np.where(hard < strength, 1.0, 0.0)
        lost = rng.random((documents, 4)) < true_loss(run, short)
        score = np.where(lost, np.where(rng.random((documents, 4)) < chance, 1.0, 0.0), right).mean(1)
        if metric == "acc":
            score = (score >= 0.5).astype(float)
        bits = 2.0 - score + shared.normal(0, 0.1, documents)
        results[task] = {"name": task, "alias": task, "sample_len": documents}
        for name, values in ((metric, score), ("bits_per_char", bits)):
            results[task] |= {
                f"{name},none": float(values.mean()),
                f"{name}_stderr,none": float(values.std(ddof=1) / np.sqrt(documents)),
            }
        results[task] |= {"sparsity,none": run.sparsity, "sparsity_stderr,none": 0.0}
        directions[task] = {metric: True, "bits_per_char": False}
        configs[task] = {
            "task": task,
            "dataset_path": "lm_eval_sparse",
            "dataset_kwargs": {"task": short, "length": LENGTHS[run.length]},
            "output_type": "loglikelihood",
            "metadata": {
                "version": "2", "samples": 100, "seed": task_seed, "length": LENGTHS[run.length],
                "chance": {metric: chance},
            },
        }  # fmt: skip
        measured = float(np.clip(run.sparsity + rng.normal(0, 0.002), 0, 1)) if run.method != "dense" else 0.0
        by_task[task] = {phase: figures(phase, run, measured) for phase in PHASES}
        by_task[task]["prompts"] = {
            "number": documents,
            "tokens": {"mean": LENGTHS[run.length] - 10.5, "min": 1, "max": 2},
        }
        for place in range(documents):
            digest = hashlib.sha256(f"{task}{place}{task_seed}".encode()).hexdigest()
            lines.append(
                {
                    "task": task, "doc_id": place, "doc_hash": digest, "filter": "none",
                    "metrics": {metric: float(score[place]), "bits_per_char": float(bits[place])}, "runs": ["a"],
                }
            )  # fmt: skip
    model_args = {"method": run.method, "pretrained": run.model}
    if run.method != "dense":
        model_args["sparsity"] = run.sparsity
    took = times(run, documents * len(run.tasks))
    content = {
        "results": results,
        "configs": configs,
        "versions": dict.fromkeys(results, "2"),
        "n-shot": dict.fromkeys(results, 0),
        "higher_is_better": directions,
        "config": {
            "model": "sparse-hf",
            "model_args": model_args,
            "model_num_parameters": parameters,
            "model_dtype": "torch.bfloat16",
            "model_revision": "main",
            "model_sha": hashlib.sha256(run.model.encode()).hexdigest(),
            "random_seed": 0, "numpy_seed": 1234, "torch_seed": 1234, "fewshot_seed": 1234,
            "gen_kwargs": {},
            "limit": None,
            "sparse": {
                "method": run.method,
                "requested_sparsity": run.sparsity if run.method != "dense" else None,
                "preset": None,
                "knobs": {} if run.method == "dense" else {run.method: {"page_size": 16}},
                "backend": "auto",
                "tasks": by_task,
                "model": shape,
                "versions": {"lm_eval_sparse": "0.1.0", "torch": "2.13.0"},
                "device": "NVIDIA H200",
                "run": {**took, "peak_memory_bytes": {"predicted": 10**9, "seen": 10**9}},
            },
        },
        "git_hash": "abcdef0",
        "date": 1796074837.0,
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.24.0",
        "model_name": run.model,
        "chat_template_sha": "c" * 64,
        "total_evaluation_time_seconds": str(took["seconds"]["total"] + 4.5),
    }  # fmt: skip
    return content, lines


def write(
    folder: Path, grid: Iterator[Run] | None = None, documents: int = 100, seed: int = 0, task_seed: int = 0
) -> int:
    """Write a study; returns the number of files."""
    count = 0
    for run in grid or runs():
        content, lines = contents(run, documents, seed, task_seed)
        place = folder / f"{run.method}_{run.sparsity:g}_{run.length}" / run.model.replace("/", "__")
        place.mkdir(parents=True, exist_ok=True)
        stamp = "2026-11-30T12-00-00.000000"
        (place / f"results_{stamp}.json").write_text(json.dumps(content))
        (place / f"documents_{stamp}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        count += 1
    return count


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1]))} files")
