"""Samples per hour of the twins on one and on several devices of a host, and whether their scores are the same.

    python benchmarks/data_parallel.py --model FOLDER --output benchmarks/results/data_parallel.json

Started by torchrun, process by process of one device each, as a user would start them. A first run, which is not
timed, makes the documents and compiles the kernels. What is timed is given twice: from the command to its end, and
from the first request, when models are loaded and prompts are made, until the statistics of all processes are
together. Scores are compared document by document, and have to be equal to the bit. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from lm_eval_sparse import patches

patches.install()

import lm_eval  # noqa: E402
import torch  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from prefill import say, table, versions, write  # noqa: E402

from lm_eval_sparse.frontier.leaves import BUILT_IN  # noqa: E402
from lm_eval_sparse.model.lm import SparseHFLM  # noqa: E402

TASKS = Path(__file__).parents[1] / "tasks"
#: Requests that the run that is not timed computes of each kind.
WARM = 40


class Timed(SparseHFLM):
    """Notes when the first request begins and how long this process computes."""

    first: float | None = None
    busy = 0.0
    warm = False

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._timed(super().loglikelihood, requests, (0.0, False))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._timed(super().generate_until, requests, "")

    def _timed(self, answer: Any, requests: list[Any], instead: Any) -> list[Any]:
        start = time.time()
        self.first = self.first or start
        if self.warm:  # those of the first, the middle and the last documents
            step = max(1, len(requests) // WARM)
            answer(requests[::step], True)
            return [instead] * len(requests)
        found = answer(requests, True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.busy += time.time() - start
        return found


def work(options: argparse.Namespace) -> None:
    """One process of a run. The first one writes what was found."""
    given = dict(argument.partition("=")[::2] for argument in options.model_args.split(",") if argument)
    device = {"device": options.device} if options.device else {}
    lm = Timed(**({"pretrained": options.model} if options.model else {}), dtype=options.dtype, **device, **given)
    lm.warm = options.warm
    metadata = {"qa_folder": options.qa_folder} if options.qa_folder else None
    results = lm_eval.simple_evaluate(
        model=lm, tasks=leaves(options), limit=options.limit, bootstrap_iters=0, metadata=metadata,
        task_manager=TaskManager(include_path=str(TASKS), metadata=metadata, include_defaults=False),
        apply_chat_template=options.chat and bool(lm.tokenizer.chat_template),
    )  # fmt: skip
    end = time.time()
    mine = {"busy": lm.busy, "first": lm.first or end}
    parts = lm.peers.gather(mine) if lm.peers is not None else [mine]
    if results is None:
        return
    scores = {
        task: {str(row["doc_id"]): {metric: row[metric] for metric in sorted(row["metrics"])} for row in rows}
        for task, rows in results["samples"].items()
        if any(row["metrics"] for row in rows)
    }
    block = lm.report()
    found = {
        "seconds": {"whole": end - options.begun, "computing": end - min(part["first"] for part in parts)},
        "busy": [part["busy"] for part in parts],
        "devices": lm.reporter.devices or [block["device"]],
        "scores": scores,
        "skipped": block["skipped"],
        "prompts": block["prompts"],
    }
    options.found.write_text(json.dumps(found))


def leaves(options: argparse.Namespace) -> list[str]:
    prefix = "frontier" if options.generated else "forced_frontier"
    return [f"{prefix}_{task}_{length}" for length in options.lengths for task in options.tasks]


def run(options: argparse.Namespace, processes: int, warm: bool = False) -> dict[str, Any]:
    """What `processes` processes find."""
    with tempfile.TemporaryDirectory() as scratch:
        found, begun = Path(scratch) / "found.json", time.time()
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *(__file__, *sys.argv[1:], "--found", str(found), "--begun", str(begun), *(["--warm"] if warm else [])),
        ]
        if status := subprocess.run(command).returncode:
            raise SystemExit(f"{processes} processes: ended with exit status {status}")
        content = json.loads(found.read_text())
    content["seconds"]["whole"] = time.time() - begun
    documents = sum(map(len, content["scores"].values()))
    content["documents"] = documents
    content["per_hour"] = {way: 3600 * documents / seconds for way, seconds in content["seconds"].items()}
    return content


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The documents that have another score in one of two runs, or none."""
    found = []
    for task in {**one, **other}:
        here, there = one.get(task, {}), other.get(task, {})
        found += [f"{task} {index}" for index in {**here, **there} if here.get(index) != there.get(index)]
    return found


def markdown(content: Mapping[str, Any]) -> str:
    """The table, from the content of the JSON file."""
    first = content["runs"][0]
    known = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version)
    lines = [
        "# Data parallel",
        "",
        f"{first['documents']} documents of {len(first['scores'])} tasks ({', '.join(first['scores'])}), "
        f"{first['prompts']} prompts; {content['model']}, {content['dtype']}, "
        f"`{content['model_args'] or 'method=dense'}`; {known}. A process has one device. *computing*: from the first "
        "request until all is put together; *whole*: from the command to its end, Python and the weights included.",
        "",
    ]
    rows = []
    for one in content["runs"]:
        hour, seconds = one["per_hour"], one["seconds"]
        devices = ", ".join(f"{one['devices'].count(name)} x {name}" for name in dict.fromkeys(one["devices"]))
        rows.append(
            [
                devices,
                *(f"{hour[way]:,.0f} ({seconds[way]:.1f} s)" for way in ("computing", "whole")),
                *(f"{hour[way] / first['per_hour'][way]:.2f}" for way in ("computing", "whole")),
                f"{sum(one['busy']) / len(one['busy']) / seconds['computing']:.0%}",
                "all" if not one["differing"] else f"all but {len(one['differing'])}",
            ]
        )
    header = ["devices", "samples/hour computing", "whole", "x computing", "x whole", "busy", "equal scores"]
    return "\n".join([*lines, *table(header, rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder; left out: the embedded model")
    parser.add_argument("--model_args", default="", help="as lm-eval's, such as method=quest,sparsity=0.9")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, max(2, torch.cuda.device_count())])
    parser.add_argument("--tasks", nargs="+", default=[folder.name for folder in BUILT_IN])
    parser.add_argument("--lengths", nargs="+", default=["4k"])
    parser.add_argument("--limit", type=int, default=20, help="documents of each task")
    parser.add_argument("--generated", action="store_true", help="frontier_* instead of their twins")
    parser.add_argument("--qa_folder", help="folder with the data of the QA tasks")
    parser.add_argument("--no_chat", dest="chat", action="store_false", help="without the model's chat template")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", help="such as cpu; by default a GPU where there is one")
    parser.add_argument("--output", type=Path, help="a .json file; the table lies beside it")
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--begun", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.found:
        work(options)
        return
    say("documents and kernels")
    run(options, 1, warm=True)
    runs: list[dict[str, Any]] = []
    for processes in options.processes:
        say(f"{processes} processes")
        runs.append(run(options, processes))
        runs[-1]["differing"] = differences(runs[0]["scores"], runs[-1]["scores"])
    content = {
        "model": Path(options.model).name or "SmolLM2-135M-Instruct (embedded)",
        "model_args": options.model_args,
        "dtype": options.dtype,
        "versions": versions(),
        "runs": runs,
    }
    say(markdown(content))
    for one in runs:
        say(f"differing: {', '.join(one['differing'][:10]) or 'none'}")
    if options.output is not None:
        write(options.output, json.dumps(content, indent=1) + "\n")
        write(options.output.with_suffix(".md"), markdown(content))


if __name__ == "__main__":
    main()
