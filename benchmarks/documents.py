"""How long the tasks' documents take to write and to load, and how exactly they have their length.

For every task and tokenizer: one 128K document from nothing, a hundred documents from the cache (of 4096 tokens),
and statistics of prompt lengths. Nothing but tokenizers is needed; QA tasks need `--metadata '{"qa_folder": ...}'`
and are left out without data.

    python benchmarks/documents.py --tokenizers smollm2= qwen=DIR llama3=DIR --output benchmarks/results/documents

An empty path stands for the embedded model's tokenizer. Further ones come from benchmarks/public_tokenizers.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import tokenizers
import transformers

import lm_eval_sparse
from lm_eval_sparse import patches
from lm_eval_sparse.frontier.leaves import BUILT_IN, LENGTHS
from lm_eval_sparse.frontier.show import Reader
from lm_eval_sparse.paths import task_folders


def leaf(name: str, metadata: dict[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=task_folders(), include_defaults=False, metadata=metadata)
    return tasks.load([name])["tasks"][name]


def timed(name: str, reader: Reader, documents: int, metadata: dict[str, Any]) -> tuple[Any, float]:
    """The task with that many documents made or loaded, and the seconds from a loaded task to its requests."""
    task = leaf(name, metadata)
    begun = time.perf_counter()
    task.build_all_requests(
        limit=documents, rank=0, world_size=1, apply_chat_template=True, chat_template=reader.apply_chat_template
    )
    return task, time.perf_counter() - begun


def measure(task: str, reader: Reader, metadata: dict[str, Any], samples: int) -> dict[str, Any] | None:
    """The figures of one task under one tokenizer, None when it cannot run."""
    row: dict[str, Any] = {"lengths": {}}
    # Once at 4K, so that word lists, data and the tokenizer itself are there: a run pays for them once.
    made, row["first_4k_s"] = timed(f"frontier_{task}_4k", reader, 1, metadata)
    if made.config.metadata.get("skipped"):
        print(f"{task} is left out: {made.config.metadata['skipped']}")
        return None
    for length in ("4k", "32k", "128k"):
        made, _ = timed(f"frontier_{task}_{length}", reader, samples if length != "128k" else 3, metadata)
        tokens = [len(reader.tok_encode(instance.args[0])) for instance in made.instances]
        if tokens:
            row["lengths"][length] = {
                "documents": len(tokens), "target": LENGTHS[length],
                "least": min(tokens), "mean": statistics.fmean(tokens), "most": max(tokens),
            }  # fmt: skip
    timed(f"frontier_{task}_4k", reader, 100, metadata)
    row["cached_100_s"] = min(timed(f"frontier_{task}_4k", reader, 100, metadata)[1] for _ in range(3))
    for prefix in ("", "forced_"):
        runs = [timed(f"{prefix}frontier_{task}_128k", reader, 1, {**metadata, "seed": seed})[1] for seed in (1, 2, 3)]
        row[f"{prefix}one_128k_s"] = statistics.median(runs)
    return row


def table(report: dict[str, Any]) -> str:
    lines = [
        "| task | tokenizer | one 128K document, s | its twin, s | 100 cached documents, s "
        "| 4K: least–most | 32K: least–most | 128K (128000): least–most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, rows in report["tasks"].items():
        for name, row in rows.items():
            spans = [row["lengths"].get(length) for length in ("4k", "32k", "128k")]
            cells = [f"{span['least']}–{span['most']}" if span else "-" for span in spans]
            times = f"{row['one_128k_s']:.2f} | {row['forced_one_128k_s']:.2f} | {row['cached_100_s']:.3f}"
            lines.append(f"| {task} | {name} | {times} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"# Documents: time and length\n\n{report['device']}; {versions}. Chat template applied. "
        f"{report['samples']} documents of 4K and 32K, 3 of 128K; times of one 128K document are medians of three, "
        "those of cached documents are for 4K.\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", default=["smollm2="])
    parser.add_argument("--tasks", nargs="+", default=[folder.name for folder in BUILT_IN])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--metadata", type=json.loads, default={})
    parser.add_argument("--output", help="path without suffix")
    arguments = parser.parse_args()
    patches.install()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    report: dict[str, Any] = {
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "samples": arguments.samples,
        "versions": {
            "lm-eval-sparse": lm_eval_sparse.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "tasks": {},
    }
    readers = {
        name: Reader.of(path or None, {}, chat=True)
        for name, _, path in (t.partition("=") for t in arguments.tokenizers)
    }
    for task in arguments.tasks:
        for name, reader in readers.items():
            with tempfile.TemporaryDirectory() as cache:
                os.environ["LM_EVAL_SPARSE_CACHE"] = cache
                if row := measure(task, reader, arguments.metadata, arguments.samples):
                    report["tasks"].setdefault(task, {})[name] = row
                    print(task, name, json.dumps(row), flush=True)
    if arguments.output:
        Path(arguments.output).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        Path(arguments.output).with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
