"""Dense answers of `sparse-hf` beside those of lm-eval's `hf`, in the same run: scores of twins, document by document.

    python benchmarks/dense_vs_hf.py --models qwen=FOLDER --qa_folder FOLDER --output benchmarks/results
    python benchmarks/dense_vs_hf.py --merge A.json B.json --output benchmarks/results    # runs of several processes

The same tasks, documents and dtype for both. An answer slot (one teacher-forced item) counts as right where the model
would have written it greedily; bits per character and accuracies are those of the tasks.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

from lm_eval_sparse import patches

patches.install()

import lm_eval  # noqa: E402
import torch  # noqa: E402
from prefill import say, table, versions, write  # noqa: E402

from lm_eval_sparse.model.report import device_name  # noqa: E402

TASKS = ("forced_frontier_niah_4k", "forced_frontier_vt_4k", "forced_frontier_toefl_4k")
TYPES = ("hf", "sparse-hf")


def run(kind: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Scores of one model type by task, right slots of each document, seconds."""
    start = time.perf_counter()
    metadata = {"pretrained": folder} | ({"qa_folder": options.qa_folder} if options.qa_folder else {})
    results = lm_eval.simple_evaluate(
        model=kind,
        model_args={"pretrained": folder, "dtype": options.dtype},
        tasks=list(options.tasks),
        limit=options.limit,
        batch_size=1,
        device=options.device,
        metadata=metadata,
        apply_chat_template=options.chat,
        bootstrap_iters=0,
    )
    scores = {
        task: {name.partition(",")[0]: value for name, value in figures.items() if isinstance(value, float)}
        for task, figures in results["results"].items()
    }
    slots = {
        task: sum(bool(response[1]) for sample in samples for responses in sample["resps"] for response in responses)
        for task, samples in results["samples"].items()
    }
    requests = {task: sum(len(sample["resps"]) for sample in samples) for task, samples in results["samples"].items()}
    return {"scores": scores, "greedy": slots, "requests": requests, "seconds": time.perf_counter() - start}


def markdown(content: dict[str, Any]) -> str:
    rows = []
    for model, kinds in content["models"].items():
        for task in kinds[TYPES[0]]["scores"]:
            theirs, ours = (kinds[kind]["scores"][task] for kind in TYPES)
            cells = [f"{name} {theirs[name]:.4f} / {ours[name]:.4f}" for name in theirs if not name.endswith("stderr")]
            greedy = " / ".join(f"{kinds[kind]['greedy'][task]}" for kind in TYPES)
            rows.append([model, task, "; ".join(cells), f"{greedy} of {kinds['hf']['requests'][task]}"])
    facts = ", ".join(f"{name} {value}" for name, value in content["versions"].items() if value)
    lines = [
        "# Dense answers beside those of hf", "",
        f"{content['limit']} documents, {content['dtype']}, {content['device']}, {facts}; `hf` / `sparse-hf`.", "",
    ]  # fmt: skip
    return "\n".join(lines + table(["model", "task", "scores", "requests answered greedily"], rows)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--qa_folder", help="folder with the data of the QA tasks")
    parser.add_argument("--no_chat", dest="chat", action="store_false", help="without the model's chat template")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], help="JSON files of earlier runs to put together")
    parser.add_argument("--output", type=Path, help="a folder for dense_vs_hf.json and its table, or a .json file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    content: dict[str, Any] = {
        "device": device_name(torch.device(options.device)), "versions": versions(), "dtype": options.dtype,
        "limit": options.limit, "models": {},
    }  # fmt: skip
    for path in options.merge:
        found = json.loads(path.read_text())
        content = {**found, "models": {**content["models"], **found["models"]}}
    for given in options.models:
        name, _, folder = given.partition("=")
        content["models"][name] = {}
        for kind in TYPES:
            content["models"][name][kind] = run(kind, folder, options)
            say(f"{name} {kind}: {content['models'][name][kind]['seconds']:.0f} s")
    say(markdown(content))
    if options.output is not None:
        path = options.output if options.output.suffix == ".json" else options.output / "dense_vs_hf.json"
        write(path, json.dumps(content, indent=1) + "\n")
        write(path.with_suffix(".md"), markdown(content))


if __name__ == "__main__":
    main()
