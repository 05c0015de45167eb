"""Are answers scored side by side those that are scored one by one, bit for bit? Per twin and method.

    python benchmarks/side_by_side.py run --rows ROWS --dtypes bfloat16,float32             # a tiny random model, CPU
    python benchmarks/side_by_side.py run --rows ROWS --model FOLDER --qa_folder FOLDER --processes 8 \\
        --methods dense,snapkv,quest,vertical_slash+quest
    python benchmarks/side_by_side.py table ROWS --output benchmarks/results/side_by_side_cpu.json

The requests of a document share its prompt. They are scored in one call of `loglikelihood`, as lm-eval does, and then
each by itself in a call of its own, which reads the prompt anew. Compared are log-probabilities, greedy flags, and what
was measured: all figures of prefill and eviction, which are of the prompt; of decoding, whose counts are those of all
answers to the prompt together, whether they lie between those of its answers alone (where all of them were asked for).

With --alone K only K requests of each document are asked again alone: the first, the last and random ones. After
--seconds a twin ends with the document that is under way. A twin under a method is a row, a file of its own that a
further run leaves out. `run` and `table` end with status 1 where anything differs, 2 where nothing could be compared.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from prefill import reason_of, say, table, versions, write
from throughput import TWINS, Row, Sample, listed, samples_of, tokens_of

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.frontier.leaves import BUILT_IN
from lm_eval_sparse.methods import METHODS as REGISTRY
from lm_eval_sparse.methods import PHASE_ARGUMENTS
from lm_eval_sparse.model.report import device_name
from lm_eval_sparse.protocol import stats_of

TINY = "tiny"
#: All methods of the package, and some together.
METHODS = (
    *("dense", "vertical_slash", "flexprefill", "flexprefill_vs", "block_sparse", "xattention", "a_shape"),
    *("oracle_blocks", "snapkv", "ada_snapkv", "pyramidkv", "knorm", "tova", "h2o", "streaming_llm"),
    *("quest", "magicpig", "oracle_topk", "oracle_topp", "twilight:quest"),
    *("snapkv+quest", "vertical_slash+quest", "flexprefill+ada_snapkv+quest"),
)
SPARSITY = 0.8
#: Share evicted where a decode method chooses among the rest.
KV_BESIDE_DECODE = 0.5
#: On a CPU single precision runs one answer at a time, in parts as long as the answer: where one begins with another,
#: the two are one run of another length than alone, whose sums round differently.
TOLERANCE_FP32_CPU = 1e-4
#: Figures of decoding that must lie between those of the answers alone, but for the rounding of a quotient.
BETWEEN = ("selected_sparsity", "executed_sparsity", "bytes_read_fraction")
ROUNDING = 1e-9
#: The shortest prompts, about, that all twins have documents for.
LENGTHS = "1300,cwe=2600,toefl=2600"


def typed(method: str) -> Row:
    """Arguments of `sparse-hf`."""
    phases = [REGISTRY[name.rpartition(":")[2]].phase for name in method.split("+") if name != "dense"]
    evicts_less = "eviction" in phases and "decode" in phases
    shares = {phase: KV_BESIDE_DECODE if phase == "eviction" and evicts_less else SPARSITY for phase in phases}
    return {"method": method, **{PHASE_ARGUMENTS[phase]: share for phase, share in shares.items()}}


# --- one row -------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """What was compared so far.

    Attributes:
        documents, requests: asked for side by side.
        alone: requests asked for once more by themselves.
        equal: of those, how many have the same log-probability to the bit, and the same flag.
        largest: difference of two log-probabilities.
        flags: requests with another greedy flag.
        figures: documents with other figures, with the first of them.
    """

    documents: int = 0
    requests: int = 0
    alone: int = 0
    equal: int = 0
    largest: float = 0.0
    flags: int = 0
    figures: list[str] = field(default_factory=list)

    def add(self, together: Sequence[Any], alone: dict[int, Any]) -> None:
        """One document: its answers side by side, and some or all of them alone, by place."""
        self.documents += 1
        self.requests += len(together)
        for place, own in alone.items():
            (logprob, greedy), (other, flag) = together[place], own
            self.alone += 1
            self.equal += logprob == other and greedy == flag
            difference = 0.0 if logprob == other else abs(logprob - other)
            self.largest = max(self.largest, difference if math.isfinite(difference) else math.inf)
            self.flags += greedy != flag
        if (found := other_figures(together, alone)) is not None:
            self.figures.append(f"document {self.documents - 1}: {found}")

    def row(self) -> Row:
        return {
            "documents": self.documents, "requests": self.requests, "alone": self.alone, "equal": self.equal,
            "largest": self.largest, "flags": self.flags, "other_figures": len(self.figures),
            "first_other_figures": self.figures[:3],
        }  # fmt: skip


def other_figures(together: Sequence[Any], alone: dict[int, Any]) -> str | None:
    """The first figure that answers side by side do not share with those alone; None where there is none."""
    shared = stats_of(together[0]) or {}
    own = [stats_of(answer) or {} for answer in alone.values()]
    for phase in ("prefill", "eviction"):
        for stats in own:
            if stats.get(phase) != shared.get(phase):
                return f"{phase} {shared.get(phase)} and alone {stats.get(phase)}"
    if len(alone) < len(together):
        return None
    for name in BETWEEN:
        value = shared.get("decode", {}).get(name)
        others = [stats.get("decode", {}).get(name) for stats in own]
        known = [other for other in others if other is not None]
        if (value is None) != (not known):
            return f"decode {name} {value} and alone {others}"
        if known and not min(known) - ROUNDING <= value <= max(known) + ROUNDING:
            return f"decode {name} {value} and alone {min(known)} to {max(known)}"
    return None


def places(sample: Sample, most: int | None) -> list[int]:
    """Which requests of a document are asked for alone: all, or the first, the last and random ones."""
    count = len(sample.requests)
    if most is None or most >= count:
        return list(range(count))
    ends = list(dict.fromkeys([0, count - 1]))[:most]
    drawn = random.Random(f"{sample.task} {sample.index}").sample(range(1, count - 1), most - len(ends))
    return sorted([*ends, *drawn])


def ask(lm: Any, requests: Sequence[Any]) -> list[Any]:
    return lm.loglikelihood(list(requests), disable_tqdm=True)


def compare(lm: Any, samples: Sequence[Sample], most: int | None, seconds: float) -> Row:
    """Both ways for each document, as many as `seconds` allow, at least one."""
    found, begin = Comparison(), time.perf_counter()
    sparsities: list[Any] = []
    for sample in samples:
        if found.documents and time.perf_counter() - begin >= seconds:
            break
        together = ask(lm, sample.requests)
        found.add(together, {place: ask(lm, [sample.requests[place]])[0] for place in places(sample, most)})
        sparsities.append((stats_of(together[0]) or {}).get("sparsity"))
    known = [value for value in sparsities if value is not None]
    return found.row() | {
        "of_documents": len(samples),
        "sparsity": sum(known) / len(known) if known else None,
        "seconds": time.perf_counter() - begin,
    }


# --- a run ---------------------------------------------------------------------------------------------------------


def load(options: argparse.Namespace, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer: those of a folder, or a random model of two layers with some tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if options.model != TINY:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, dtype))
        return model.to(options.device).eval(), AutoTokenizer.from_pretrained(options.model)
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import tiny

    from lm_eval_sparse.model import embedded

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or embedded.ensure())
    model = tiny.family(options.family, vocab_size=len(tokenizer), max_position_embeddings=32768)
    return model.to(options.device, getattr(torch, dtype)).eval(), tokenizer


def cells(options: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    """Data type, method, twin and length of every row, those of one model and twin together."""
    return [
        (dtype, method, task, options.lengths.get(task, options.lengths[""]))
        for dtype in options.dtypes
        for task in options.tasks
        for method in options.methods
    ]


def path_of(rows: Path, dtype: str, method: str, task: str, length: str) -> Path:
    plain = "".join(letter if letter.isalnum() or letter == "_" else "-" for letter in method)
    return rows / f"row.{dtype}.{plain}.{task}.{length}.json"


def work(options: argparse.Namespace, part: int, of: int) -> None:
    """Every n-th of the rows that are not there yet."""
    from lm_eval_sparse.model.lm import SparseHFLM

    loaded: tuple[str, Any, Any] | None = None
    lms: dict[str, Any] = {}  # each is tried on its model when it is made
    documents: dict[tuple[str, str, str], tuple[list[Sample], str | None]] = {}
    for dtype, method, task, length in cells(options)[part::of]:
        place = path_of(options.rows, dtype, method, task, length)
        if place.exists():
            continue
        if loaded is None or loaded[0] != dtype:
            loaded, lms = None, {}  # two models need not fit
            loaded = (dtype, *load(options, dtype))
        _, model, tokenizer = loaded
        row: Row = {"dtype": dtype, "method": method, "task": task, "length": length, "typed": typed(method)}
        row["device"] = options.device
        try:
            if method not in lms:
                common = {"pretrained": model, "tokenizer": tokenizer, "device": options.device, "batch_size": 16}
                lms[method] = SparseHFLM(**common, **typed(method))
                lms[method].warned_about_template = True
            lm = lms[method]
            if (dtype, task, length) not in documents:
                metadata = {"qa_folder": options.qa_folder} if options.qa_folder else {}
                found, _, skipped = samples_of(
                    lm, TWINS, length, [task], options.documents, chat=options.chat, metadata=metadata
                )
                documents[dtype, task, length] = found.get(task, []), skipped.get(task)
            samples, reason = documents[dtype, task, length]
            if reason is not None:
                row["skipped"] = reason
            else:
                row |= compare(lm, samples, options.alone, options.seconds)
        except Exception as error:  # the row says so, the others go on
            row["failed"] = reason_of(error)
        write(place, json.dumps(row))
        say(f"{dtype} {method} {task}: {told(row)}")


def told(row: Row) -> str:
    """A row in a line."""
    if "failed" in row or "skipped" in row:
        return f"failed: {row['failed']}" if "failed" in row else f"skipped: {row['skipped']}"
    end = f", largest difference {row['largest']:.2g}" if row["equal"] < row["alone"] else ""
    end += f", other figures in {row['other_figures']} documents" if row["other_figures"] else ""
    return f"{row['equal']} of {row['alone']} equal ({row['documents']} documents, {row['seconds']:.0f} s){end}"


def run(options: argparse.Namespace) -> int:
    """All rows, by one process or several on one device. Returns the exit status of what is there at the end."""
    if options.part is not None:
        work(options, options.part, options.processes)
        return 0
    options.rows.mkdir(parents=True, exist_ok=True)
    name = device_name(torch.device(options.device))
    write(options.rows / "about.json", json.dumps({"device": name, "versions": versions()}))
    if options.processes == 1:
        work(options, 0, 1)
    else:
        workers = []
        for part in range(options.processes):
            with (options.rows / f"worker{part}.log").open("w") as log:
                given = [sys.executable, __file__, *sys.argv[1:], "--part", str(part)]
                workers.append(subprocess.Popen(given, stdout=log, stderr=subprocess.STDOUT, env={**os.environ}))
        codes = [worker.wait() for worker in workers]
        if any(codes):
            say(f"workers ended with {codes}; see {options.rows}/worker*.log")
    return status(read(options.rows))


def read(folder: Path) -> list[Row]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("row.*.json"))]


def differs(row: Row) -> bool:
    """Whether any answer of a row is another side by side than alone, as far as they have to be the same."""
    if "equal" not in row:
        return False
    tolerance = TOLERANCE_FP32_CPU if (row["dtype"], row["device"]) == ("float32", "cpu") else 0.0
    return row["largest"] > tolerance or row["flags"] > 0 or row["other_figures"] > 0


def status(rows: Sequence[Row]) -> int:
    """0 where all is equal, 1 where anything differs, 2 where something failed or nothing was compared."""
    if any(map(differs, rows)):
        return 1
    return 2 if any("failed" in row for row in rows) or not any(row.get("alone") for row in rows) else 0


# --- the table -----------------------------------------------------------------------------------------------------


def cell(row: Row | None) -> str:
    """What stands in the table for a twin under a method."""
    if row is None or "skipped" in row:
        return "-"
    if "failed" in row:
        return f"failed: {row['failed'][:60]}"
    if row["equal"] == row["alone"]:
        text = f"{row['alone']} of {row['alone']}"
    else:
        text = f"**{row['equal']} of {row['alone']}** ({row['largest']:.1g})"
    text += f", {row['documents']} documents" if row["documents"] < row["of_documents"] else ""
    return text + (f", **other figures in {row['other_figures']}**" if row["other_figures"] else "")


def markdown(content: Row) -> str:
    rows, known = content["rows"], ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    compared = [row for row in rows if "alone" in row]
    unequal = sum(row["alone"] - row["equal"] for row in compared)
    lines = [
        "# Side by side and one by one",
        "",
        f"{content['model']}; {content['device']}; {known}. Answers to one prompt scored in one call, beside the same "
        "answers each in a call of its own: how many of those asked for alone have the same log-probability to the "
        "bit and the same greedy flag (else with the largest difference). Also compared: the measured figures of "
        f"prefill and eviction, and whether those of decoding lie between those alone. Sparsity {SPARSITY:g}, of "
        f"evictions before a decode method {KV_BESIDE_DECODE:g}. In single precision on a CPU answers run one at a "
        f"time and may differ by {TOLERANCE_FP32_CPU:g}: where one begins with another, both are one run, whose parts "
        "are as long as the longer one.",
        "",
        f"In all {sum(row['requests'] for row in compared)} answers to {sum(row['documents'] for row in compared)} "
        f"prompts, {sum(row['alone'] for row in compared)} of them once more alone; {unequal or 'none'} of those "
        "differed.",
        "",
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        tasks = [
            folder.name for folder in BUILT_IN if any(r["task"] == folder.name and "skipped" not in r for r in own)
        ]
        lengths = {task: sorted({row["length"] for row in own if row["task"] == task}) for task in tasks}
        documents = max((row.get("of_documents", 0) for row in own), default=0)
        lines += [f"## {dtype}, up to {documents} documents of each twin", ""]
        head = ["method", *(f"{task} ({', '.join(lengths[task])})" for task in tasks)]
        body = []
        for method in sorted({row["method"] for row in own}, key=lambda name: (order(name), name)):
            for_method = {row["task"]: row for row in own if row["method"] == method}
            body.append([f"`{method}`", *(cell(for_method.get(task)) for task in tasks)])
        lines += table(head, body)
    return "\n".join(lines).rstrip() + "\n"


def order(method: str) -> int:
    return METHODS.index(method) if method in METHODS else len(METHODS)


def tabulate(options: argparse.Namespace) -> int:
    rows = read(options.folder)
    if not rows:
        raise UserError(f"{options.folder} holds no rows: type `side_by_side.py run --rows {options.folder}` first")
    about = json.loads((options.folder / "about.json").read_text())
    content = {**about, "model": options.name, "rows": rows}
    write(options.output, json.dumps(content, indent=1) + "\n")
    write(options.output.with_suffix(".md"), markdown(content))
    return status(rows)


# --- arguments -----------------------------------------------------------------------------------------------------


def lengths_of(given: str) -> dict[str, str]:
    """`900,cwe=2600` as a length by twin, that of the others under an empty name. Raises `UserError`."""
    found = {}
    for part in listed(given):
        task, _, length = part.rpartition("=")
        tokens_of(length)
        if task and task not in [folder.name for folder in BUILT_IN]:
            raise UserError(f"--lengths {part}: {task} is no twin")
        found[task] = length
    if "" not in found:
        raise UserError(f"--lengths {given}: give one for all twins first, as in {LENGTHS}")
    return found


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--rows", type=Path, required=True, help="a folder for the rows")
    running.add_argument("--model", default=TINY, help="a folder, or `tiny`: two random layers")
    running.add_argument("--family", default="llama", help="of the tiny model, a name in tests/tiny.py")
    running.add_argument("--tokenizer", help="a folder; of the tiny model: left out, that of the embedded model")
    running.add_argument("--methods", default=",".join(METHODS))
    running.add_argument("--tasks", default=",".join(folder.name for folder in BUILT_IN))
    running.add_argument("--lengths", default=LENGTHS, help="LENGTH, and TWIN=LENGTH where it is another")
    running.add_argument("--documents", type=int, default=100)
    running.add_argument("--alone", type=int, help="requests of a document asked for alone; left out, all")
    running.add_argument("--seconds", type=float, default=1e9, help="a row begins no further document after so many")
    running.add_argument("--dtypes", default="bfloat16")
    running.add_argument("--qa_folder", help="folder with the data of the QA tasks")
    running.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    running.add_argument("--processes", type=int, default=1, help="processes that share the device")
    running.add_argument("--no_chat", dest="chat", action="store_false", help="without the model's chat template")
    running.add_argument("--part", type=int, help=argparse.SUPPRESS)
    making = commands.add_parser("table")
    making.add_argument("folder", type=Path)
    making.add_argument("--name", default="a random Llama of two layers with the tokenizer of SmolLM2")
    making.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.command == "run":
        try:
            options.lengths = lengths_of(options.lengths)
            if options.documents < 1 or options.processes < 1 or (options.alone is not None and options.alone < 1):
                raise UserError("--documents, --processes and --alone take numbers above 0")
        except UserError as error:
            parser.error(str(error))
        options.methods, options.tasks, options.dtypes = map(
            listed, (options.methods, options.tasks, options.dtypes)
        )  # fmt: skip
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        return tabulate(options) if options.command == "table" else run(options)
    except UserError as error:
        print(f"side_by_side.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
