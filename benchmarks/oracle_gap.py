"""How much of what is lost is the sparsity's, how much the method's: every method beside the oracle of its phase.

    python benchmarks/oracle_gap.py run --model FOLDER --lengths 4k=50 --processes 6 --rows ROWS
    python benchmarks/oracle_gap.py run --model FOLDER --lengths 16k=20 --only ORACLES quest snapkv --rows ROWS
    python benchmarks/oracle_gap.py table ROWS --output benchmarks/results/oracle_gap.json

The teacher-forced twins of NIAH and of story retrieval, dense and every method at sparsities of .8 and .95; each run
diagnoses its first documents, so that the output error stands beside the score. A row is a file of its own, written
once; a run leaves out the rows that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lm_eval_sparse import patches

patches.install()

from prefill import device_facts, say, table, versions, write  # noqa: E402

#: By name of the row, what is typed for it beside the sparsity.
ROWS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    **{
        name: {"method": name}
        for name in (
            "oracle_blocks", "vertical_slash", "flexprefill_vs", "block_sparse", "xattention", "a_shape",
            "snapkv", "ada_snapkv", "pyramidkv", "knorm", "tova", "h2o", "streaming_llm",
            "oracle_topk", "oracle_topp", "quest", "magicpig", "twilight:quest",
        )
    },
    "flexprefill (blocks)": {"method": "flexprefill", "coverage": "blocks"},
    "flexprefill (tokens)": {"method": "flexprefill", "coverage": "tokens"},
    "streaming_llm (rotate)": {"method": "streaming_llm", "rotate": True},
    "quest (own pages)": {"method": "quest", "share_pages": False},
    "twilight:quest (own pages)": {"method": "twilight:quest", "share_pages": False},
}  # fmt: skip
ORACLES = ("oracle_blocks", "oracle_topk", "oracle_topp")
SPARSITIES = (0.8, 0.95)
TASKS = ("niah", "story_retrieval")
#: Documents that are diagnosed of each run.
DIAGNOSED = 2


def cells(lengths: dict[str, int], only: list[str]) -> list[tuple[str, str, float, int]]:
    """Length, row, sparsity and documents of everything that is to be run."""
    names = [name for name in ROWS if not only or name in only or ("ORACLES" in only and name in ORACLES)]
    return [
        (length, name, sparsity, documents)
        for length, documents in lengths.items()
        for name in names
        for sparsity in (SPARSITIES if name != "dense" else (0.0,))
    ]


def path_of(rows: Path, length: str, name: str, sparsity: float) -> Path:
    plain = "".join(letter if letter.isalnum() or letter == "_" else "-" for letter in name)
    return rows / f"{length}_{plain}_{sparsity:g}.json"


def work(options: argparse.Namespace, lengths: dict[str, int]) -> None:
    """Run every cell that nobody has run yet and no other process of this run is at."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lm_eval_sparse.model.lm import SparseHFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    manager = TaskManager(metadata={"pretrained": options.model})  # reading all tasks takes seconds: once for all rows
    say("loaded")
    options.rows.mkdir(parents=True, exist_ok=True)
    for length, name, sparsity, documents in cells(lengths, options.only):
        place = path_of(options.rows, length, name, sparsity)
        claim = place.with_suffix(f".{options.run}")
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            continue
        if place.exists():
            continue
        start, typed = time.perf_counter(), dict(ROWS[name])
        typed |= {"sparsity": sparsity, "diagnose": DIAGNOSED} if sparsity else {}
        try:
            lm = SparseHFLM(pretrained=model, tokenizer=tokenizer, device=device, batch_size=16, **typed)
            tasks = [f"forced_frontier_{task}_{length}" for task in options.tasks]
            found = simple_evaluate(
                model=lm, tasks=tasks, limit=documents, apply_chat_template=options.chat, bootstrap_iters=100,
                metadata={"pretrained": options.model}, log_samples=False, task_manager=manager,
            )  # fmt: skip
        except Exception as error:  # the row says so, the others go on
            say(f"{length} {name} {sparsity:g}: {type(error).__name__}: {str(error)[:500]}")
            continue
        row = {
            "length": length, "name": name, "typed": typed, "requested": sparsity, "documents": documents,
            "scores": {task: found["results"][task] for task in tasks}, "sparse": lm.report(),
            "seconds": time.perf_counter() - start,
        }  # fmt: skip
        write(place, json.dumps(row, default=str))
        del lm
        say(f"{length} {name} {sparsity:g}: {row['seconds']:.0f} s {told(row)}")


def told(row: dict[str, Any]) -> str:
    scores = [f"{score.get('exact,none', float('nan')):.3f}" for score in row["scores"].values()]
    phase = phase_of(row)
    return " ".join(scores) + ("" if phase is None else f" at {row['sparse']['phases'][phase]['executed_sparsity']}")


def phase_of(row: dict[str, Any]) -> str | None:
    """The phase that the row's method fills; None when all is dense."""
    named = [phase for phase, measured in row["sparse"]["phases"].items() if measured["method"] != "dense"]
    return named[0] if named else None


def run(options: argparse.Namespace, lengths: dict[str, int]) -> None:
    if options.worker:
        return work(options, lengths)
    options.rows.mkdir(parents=True, exist_ok=True)
    given = [*sys.argv[1:], "--worker", "--run", str(os.getpid())]
    workers = []
    for number in range(options.processes):
        with (options.rows / f"worker{number}.log").open("w") as log:
            workers.append(subprocess.Popen([sys.executable, __file__, *given], stdout=log, stderr=subprocess.STDOUT))
    codes = [worker.wait() for worker in workers]
    for claim in options.rows.glob(f"*.{os.getpid()}"):
        claim.unlink()
    import torch

    device = device_facts() if torch.cuda.is_available() else {"name": "CPU"}
    write(options.rows / "about.json", json.dumps({"device": device, "versions": versions()}))
    say(f"workers ended with {codes}")


# --- the table --------------------------------------------------------------------------------------------------------


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a row that the table shows."""
    phase = phase_of(row)
    measured = {} if phase is None else row["sparse"]["phases"][phase]
    lost = (measured.get("diagnostics") or {}).get("mean", {})
    return {
        "length": row["length"],
        "name": row["name"],
        "phase": phase,
        "requested": row["requested"],
        "measured": measured.get("executed_sparsity", 0.0),
        "documents": row["documents"],
        "scores": {
            task: {
                metric: [score[f"{metric},none"], score.get(f"{metric}_stderr,none")]
                for metric in ("exact", "bits_per_char")
            }
            for task, score in row["scores"].items()
        },
        "bytes_read_fraction": measured.get("bytes_read_fraction"),
        "diagnostics": lost,
        "seconds": row["seconds"],
    }


def number(value: Any, digits: int = 3) -> str:
    return "-" if not isinstance(value, (int, float)) else f"{value:.{digits}f}"


def shown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    known = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    lines = [
        f"# What is the sparsity's, and what the method's: {about['model']}",
        "",
        f"{about['device']['name']}, bf16; {known}. Teacher-forced twins, exact answers ± standard error; measured is "
        "the executed sparsity of the phase that the method fills; output error and attention mass kept are those of "
        f"{DIAGNOSED} diagnosed documents. What an oracle loses to dense is the sparsity's; what a method loses to the "
        "best oracle of its phase at the same sparsity is its own, in exact answers on average over the tasks. Where "
        "no oracle was measured, and for evictions, which have none, the loss is to dense.",
        "",
    ]
    for length in dict.fromkeys(row["length"] for row in rows):
        own = [row for row in rows if row["length"] == length]
        tasks = list(own[0]["scores"])
        dense = next((row for row in own if row["phase"] is None), None)
        lines += [f"## {length}, {own[0]['documents']} documents", ""]
        if dense is not None:
            scores = [
                f"{task} {number(dense['scores'][task]['exact'][0])} "
                f"({number(dense['scores'][task]['bits_per_char'][0])} bits per character)"
                for task in tasks
            ]
            lines += [f"Dense: {', '.join(scores)}.", ""]
        for phase in ("prefill", "eviction", "decode"):
            for sparsity in SPARSITIES:
                here = [row for row in own if row["phase"] == phase and row["requested"] == sparsity]
                if not here:
                    continue
                bounds = [row for row in here if row["name"] in ORACLES]
                best = bounds or ([dense] if dense is not None else [])
                here.sort(key=lambda row: (row["name"] not in ORACLES, -mean(row, tasks)))
                lines += [f"### {phase}, sparsity {sparsity:g}", ""]
                head = ["method", "measured", *(task.replace("forced_frontier_", "") for task in tasks)]
                against = "oracle" if bounds else "dense"
                head += ["bits per character", f"loss to {against}", "output error", "mass kept", "bytes read"]
                body = []
                for row in here:
                    scores = []
                    for task in tasks:
                        score, error = row["scores"][task]["exact"]
                        scores.append(f"{number(score)} ± {number(error)}" if error is not None else number(score))
                    bits = [number(row["scores"][task]["bits_per_char"][0]) for task in tasks]
                    scores.append(" / ".join(bits))
                    gap = (
                        "-"
                        if row["name"] in ORACLES or not best
                        else number(max(mean(other, tasks) for other in best) - mean(row, tasks))
                    )
                    lost = row["diagnostics"]
                    name = f"**{row['name']}**" if row["name"] in ORACLES else row["name"]
                    figures = [number(lost.get("output_error")), number(lost.get("mass_kept"))]
                    body.append(
                        [name, number(row["measured"], 4), *scores, gap, *figures, number(row["bytes_read_fraction"])]
                    )
                lines += table(head, body)
    return "\n".join(lines).rstrip() + "\n"


def mean(row: dict[str, Any], tasks: list[str]) -> float:
    """Exact answers on average over the tasks."""
    return sum(row["scores"][task]["exact"][0] for task in tasks) / len(tasks)


def tabulate(options: argparse.Namespace) -> None:
    rows = [json.loads(path.read_text()) for path in sorted(options.folder.glob("*k_*.json"))]
    about = {**json.loads((options.folder / "about.json").read_text()), "model": options.name}
    order = list(ROWS)
    found = sorted(
        map(summary, rows), key=lambda row: (int(row["length"][:-1]), order.index(row["name"]), row["requested"])
    )
    write(options.output, json.dumps({"about": about, "rows": found}, indent=1) + "\n")
    write(options.output.with_suffix(".md"), shown(found, about))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--model", required=True, help="a folder")
    running.add_argument("--lengths", nargs="+", default=["4k=50"], help="LENGTH=DOCUMENTS")
    running.add_argument("--tasks", nargs="+", default=list(TASKS))
    running.add_argument("--only", nargs="*", default=[], help="names of rows, or ORACLES")
    running.add_argument("--processes", type=int, default=1)
    running.add_argument("--rows", type=Path, required=True)
    running.add_argument("--no_chat", dest="chat", action="store_false", help="without the model's chat template")
    running.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    running.add_argument("--run", default="0", help=argparse.SUPPRESS)
    making = commands.add_parser("table")
    making.add_argument("folder", type=Path)
    making.add_argument("--name", default="Qwen2.5-Coder-1.5B-Instruct")
    making.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "table":
        tabulate(options)
    else:
        run(options, {length: int(many) for length, many in (part.split("=") for part in options.lengths)})


if __name__ == "__main__":
    main()
