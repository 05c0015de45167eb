"""Do two devices select and score the same? Every method on the same documents in fp32, on the CPU and on CUDA.

What each layer selects is compared entry by entry (tiles and columns, kept tokens, pages); scores as lm-eval sees them.
Rounding moves hidden states a little, so ties and near-ties may fall either way; anything more is a defect.

python benchmarks/compare_devices.py --task forced_frontier_niah_4k --limit 2 --output benchmarks/results/cpu_cuda_4k
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from lm_eval.tasks import TaskManager
from torch import Tensor

from lm_eval_sparse import patches
from lm_eval_sparse.kernels.types import Blocks, Keep
from lm_eval_sparse.methods import METHODS

METHOD_NAMES = [name for name in METHODS if name != "dense"]


def entries(selection: Any) -> Tensor:
    """What was selected, as booleans on the CPU."""
    if isinstance(selection, Blocks):
        found = [selection.mask().flatten()]
        if selection.columns is not None:
            found.append(selection.column_keys().flatten())
        return torch.cat(found).cpu()
    if isinstance(selection, Keep):
        counts = selection.counts.tolist()
        chosen = [set(ids[:count].tolist()) for ids, count in zip(selection.ids, counts, strict=True)]
        longest = 1 + max(max(ids) for ids in chosen)
        return torch.tensor([[token in ids for token in range(longest)] for ids in chosen]).flatten()
    counts = selection.counts
    valid = torch.arange(selection.ids.shape[-1], device=counts.device) < counts[..., None]
    pages = selection.ids.long().where(valid, 0)  # what stands behind the counts is undefined
    hits = torch.zeros(*counts.shape, int(pages.max()) + 1, dtype=torch.int32, device=pages.device)
    return (hits.scatter_add_(-1, pages, valid.to(torch.int32)) > 0).flatten().cpu()


def recorded(cls: type, into: list[Tensor]) -> Callable[[], None]:
    """Let `cls.select` note what it selects; returns what undoes it."""
    select = cls.select

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        selection = select(self, *args, **kwargs)
        into.append(entries(selection))
        return selection

    cls.select = noted

    def undo() -> None:
        cls.select = select

    return undo


def run(device: str, method: str, options: argparse.Namespace, tasks: TaskManager) -> dict[str, Any]:
    seen: list[Tensor] = []
    undo = recorded(METHODS[method], seen)
    begin = time.perf_counter()
    try:
        results = lm_eval.simple_evaluate(
            model="sparse-hf",
            model_args={"method": method, "sparsity": options.sparsity, "dtype": "float32", "device": device,
                        "backend": "gather"},
            tasks=[options.task],
            limit=options.limit,
            task_manager=tasks,
            bootstrap_iters=0,
        )  # fmt: skip
    finally:
        undo()
    samples = sorted(results["samples"][options.task], key=lambda sample: sample["doc_id"])
    return {
        "selections": seen,
        "answers": [response for sample in samples for turn in sample["resps"] for response in turn],
        "measured": [
            figures["executed_sparsity"]
            for figures in results["config"]["sparse"]["phases"].values()
            if figures["method"] == method
        ][0],
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="forced_frontier_niah_4k", help="one that is scored, not generated")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--limit", type=int, default=2)
    parser.add_argument("--method", nargs="+", default=METHOD_NAMES)
    parser.add_argument("--devices", nargs=2, default=["cpu", "cuda"])
    parser.add_argument("--output", required=True, help="path without suffix: .json and .md are written")
    options = parser.parse_args()
    patches.install()
    torch.backends.cuda.matmul.allow_tf32 = False
    tasks = TaskManager()
    rows = []
    for method in options.method:
        one, other = (run(device, method, options, tasks) for device in options.devices)
        pairs = list(zip(one["selections"], other["selections"], strict=True))
        same = [a.shape == b.shape and bool((a == b).all()) for a, b in pairs]
        both = sum(int((a & b).sum()) for a, b in pairs if a.shape == b.shape)
        either = sum(int((a | b).sum()) for a, b in pairs if a.shape == b.shape)
        rows.append(
            {
                "method": method,
                "selections": len(pairs),
                "identical": sum(same),
                "first_layer_identical": bool(same[0]),
                "overlap": both / either,
                "answers": len(one["answers"]),
                "greedy_equal": sum(a[1] == b[1] for a, b in zip(one["answers"], other["answers"], strict=True)),
                "logprob_off": max(abs(a[0] - b[0]) for a, b in zip(one["answers"], other["answers"], strict=True)),
                "measured": [one["measured"], other["measured"]],
                "seconds": [one["seconds"], other["seconds"]],
            }
        )
        print(rows[-1], flush=True)
    head = {
        "task": options.task,
        "sparsity": options.sparsity,
        "documents": options.limit,
        "devices": options.devices,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({**head, "rows": rows}, indent=1))
    lines = [
        f"# {options.task} at sparsity {options.sparsity:g}: {options.devices[0]} against {options.devices[1]}",
        "",
        f"SmolLM2-135M-Instruct (embedded), fp32, {options.limit} documents, {head['gpu']}, torch {head['torch']}, "
        f"transformers {head['transformers']}. Overlap: entries that both selected ÷ entries that either did.",
        "",
        "| method | selections identical | overlap | largest difference of a log-likelihood | greedy answers equal |"
        " measured sparsity |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['identical']} of {row['selections']} | {row['overlap']:.6f} "
            f"| {row['logprob_off']:.2g} | {row['greedy_equal']} of {row['answers']} "
            f"| {row['measured'][0]:.5f}, {row['measured'][1]:.5f} |"
        )
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
