"""Samples per hour of lm-eval's `hf` and of `sparse-hf`, dense and with each of the paper's methods, in one process.

    python benchmarks/throughput.py run --model FOLDER --rows ROWS --qa_folder FOLDER
    python benchmarks/throughput.py run --model FOLDER --rows ROWS --lengths 16k=5 --kinds twins --names hf,dense
    python benchmarks/throughput.py table ROWS --output benchmarks/results/throughput.json

`twins` are the leaves `forced_frontier_*`, scored by likelihood, `generated` their siblings `frontier_*`. Every row
answers the same requests of the same documents, which are made once, and scores the answers as the task does. What is
timed begins with the text of the prompts and ends with the answers: tokenizing, computing and counting. Not timed:
loading, the check of a model at start-up, writing documents, and one more document (`warm-up`) before each row, in
which kernels are compiled and memory is taken.

`hf` runs at several batch sizes (`hf/1` ...), of which the best counts. Requests are handed over in calls that a batch
size divides well: at least four batches of scored requests, from documents of all leaves in turn; one batch of prompts
to be generated from, in the order of their leaves, as `hf` itself sorts them, the batches in an order that is spread
over the leaves. After --seconds a row ends with the call that is under way and its rate is taken over what was done,
that of `hf` with twins by requests, since it reads the whole prompt for each. A row is a file of its own, written when
it is done; a run leaves out the rows that are there, and a folder of rows is of one device and one set of versions.

Long, since both model types, both kinds of tasks and the table are compared by the same arithmetic.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.metadata
import json
import logging
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_sparse import patches

patches.install()

import torch  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from prefill import device_facts, reason_of, say, table, versions, write  # noqa: E402

from lm_eval_sparse.errors import UserError  # noqa: E402
from lm_eval_sparse.frontier.leaves import BUILT_IN, LENGTHS  # noqa: E402
from lm_eval_sparse.model.report import device_name  # noqa: E402
from lm_eval_sparse.paths import task_folders  # noqa: E402
from lm_eval_sparse.protocol import mean_sparsities, stats_of  # noqa: E402

Row = dict[str, Any]

TWINS, GENERATED = "twins", "generated"
KINDS = (TWINS, GENERATED)
HF_BATCHES = (1, 4, 8, 16)
#: The methods of The Sparse Frontier, each at this sparsity.
METHODS = ("vertical_slash", "block_sparse", "flexprefill", "snapkv", "ada_snapkv", "quest")
SPARSITY = 0.9
NAMES = (*(f"hf/{batch}" for batch in HF_BATCHES), "dense", *METHODS)
#: Prompts that `sparse-hf` decodes side by side.
SPARSE_BATCH = 16
#: Scored requests of a call, in batches: what is left over at the end of a call is then an eighth of it on average.
BATCHES_A_CALL = 4
WARM_TOKENS = 8
#: Dense twins over the best of `hf`: length -> what `hf` does there, and times its samples per hour.
TARGETS = {"4k": (TWINS, 8.0), "16k": (GENERATED, 8.0)}
#: What makes rows comparable, beside the requests.
SAME = ("device", "versions", "dtype", "chat")
GOLDEN = (5**0.5 - 1) / 2


# --- what is asked -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One document of a leaf and its requests."""

    task: str
    index: int
    requests: tuple[Instance, ...]


@dataclass(frozen=True)
class Work:
    """All documents of one kind and length.

    Attributes:
        samples: in the order of tasks, then of documents.
        warm: a further document of the first task.
        tasks: what scores the answers, by name.
        skipped: why tasks were left out, by name.
        digest: of all prompts and what is asked of them: rows of another one are not comparable.
    """

    samples: list[Sample]
    warm: Sample
    tasks: dict[str, Any]
    skipped: dict[str, str]
    digest: str


def tokens_of(length: str) -> int:
    """Tokens of a length such as `4k`, or of a plain number. Raises `UserError`."""
    if length in LENGTHS:
        return LENGTHS[length]
    if length.isdecimal() and int(length) > 0:
        return int(length)
    raise UserError(f"length {length!r} is not known: give one of {', '.join(LENGTHS)}, or a number of tokens")


def samples_of(
    lm: Any, kind: str, length: str, tasks: Sequence[str], documents: int, *, chat: bool, metadata: dict[str, Any]
) -> tuple[dict[str, list[Sample]], dict[str, Any], dict[str, str]]:
    """The first documents of each leaf, the tasks that score them, and the leaves that cannot run, all by task.

    `lm` is the model whose tokenizer, template and greatest length prompts are made for.
    """
    manager = TaskManager(include_path=task_folders(), include_defaults=False, metadata=metadata)
    template = {"apply_chat_template": True, "chat_template": lm.apply_chat_template} if chat else {}
    template |= {"tokenizer_name": lm.tokenizer_name} if chat else {}
    found: dict[str, list[Sample]] = {}
    built: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in tasks:
        leaf = f"{'forced_' if kind == TWINS else ''}frontier_{name}_{length if length in LENGTHS else '4k'}"
        task = manager.load([leaf])["tasks"][leaf]
        task.length = tokens_of(length)  # a plain number is no leaf of its own
        task.build_all_requests(limit=documents, rank=0, world_size=1, **template)
        if reason := task.config.metadata.get("skipped"):
            skipped[name] = re.split("[:;]", reason)[0]  # what follows is where data was looked for
            continue
        by_index: dict[int, list[Instance]] = defaultdict(list)
        for request in task.instances:
            by_index[request.doc["index"]].append(request)
        found[name] = [Sample(name, index, tuple(requests)) for index, requests in sorted(by_index.items())]
        built[name] = task
    return found, built, skipped


def work_of(lm: Any, kind: str, length: str, documents: int, options: argparse.Namespace) -> Work:
    """Documents of all tasks, each `documents` times, and one to warm up with."""
    metadata = {"pretrained": options.model} | ({"qa_folder": options.qa_folder} if options.qa_folder else {})
    found, tasks, skipped = samples_of(
        lm, kind, length, options.tasks, documents + 1, chat=options.chat, metadata=metadata
    )
    if not found:
        raise UserError(f"no leaf of {kind} at {length} can run: {'; '.join(f'{k}: {v}' for k, v in skipped.items())}")
    first = next(iter(found.values()))
    samples = [sample for own in found.values() for sample in own[:documents]]
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.task, sample.index, [r.args for r in sample.requests]]).encode())
    return Work(samples, first[-1], tasks, skipped, digest.hexdigest()[:16])


def calls_of(samples: Sequence[Sample], kind: str, batch: int) -> list[list[Sample]]:
    """The samples in calls of the model, in the order in which they are made."""
    if kind == GENERATED:
        batches = [list(samples[begin : begin + batch]) for begin in range(0, len(samples), batch)]
        order = sorted(range(len(batches)), key=lambda number: number * GOLDEN % 1)
        return [batches[number] for number in order]
    calls: list[list[Sample]] = [[]]
    for sample in sorted(samples, key=lambda sample: sample.index):  # stable: all leaves in turn
        if sum(len(other.requests) for other in calls[-1]) >= BATCHES_A_CALL * batch:
            calls.append([])
        calls[-1].append(sample)
    return calls


# --- one row -------------------------------------------------------------------------------------------------------


def ask(lm: Any, kind: str, samples: Sequence[Sample]) -> Iterator[tuple[Sample, list[Any]]]:
    """The answers to each sample's requests, all asked for in one call."""
    requests = [request for sample in samples for request in sample.requests]
    answered = iter((lm.loglikelihood if kind == TWINS else lm.generate_until)(requests, disable_tqdm=True))
    for sample in samples:
        yield sample, [next(answered) for _ in sample.requests]


def short(sample: Sample) -> Sample:
    """The same prompt with an answer of a few tokens, where answers are generated."""
    requests = []
    for request in sample.requests:
        context, wanted = request.args
        given = (context, {**wanted, "max_gen_toks": WARM_TOKENS} if isinstance(wanted, dict) else wanted)
        requests.append(Instance(request.request_type, request.doc, given, request.idx, metadata=request.metadata))
    return Sample(sample.task, sample.index, tuple(requests))


def timed(
    calls: Sequence[Sequence[Sample]],
    answer: Callable[[Sequence[Sample]], Iterator[tuple[Sample, list[Any]]]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Row, list[tuple[Sample, list[Any]]]]:
    """Make the calls, none of them after `seconds`. Returns what was done and how long it took, and the answers."""
    answers: list[tuple[Sample, list[Any]]] = []
    begin = clock()
    took = 0.0
    for number, call in enumerate(calls):
        if number and took >= seconds:
            break
        answers += answer(call)
        took = clock() - begin
    every = [sample for call in calls for sample in call]
    return {
        "documents": len(answers),
        "of_documents": len(every),
        "requests": sum(len(own) for _, own in answers),
        "of_requests": sum(len(sample.requests) for sample in every),
        "seconds": took,
        "cut": len(answers) < len(every),
    }, answers


def is_hf(name: str) -> bool:
    return name.startswith("hf/")


def samples_per_hour(row: Row) -> float:
    """Documents per hour; of `hf` stopped among twins by requests, each of which costs it the same."""
    if row["cut"] and row["kind"] == TWINS and is_hf(row["name"]):
        return 3600 * row["requests"] / row["seconds"] * row["of_documents"] / row["of_requests"]
    return 3600 * row["documents"] / row["seconds"]


def scores_of(work: Work, answers: Sequence[tuple[Sample, list[Any]]]) -> dict[str, dict[str, float]]:
    """Mean of each metric over the documents that were answered, by task."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sample, own in answers:
        metrics = work.tasks[sample.task].process_results(sample.requests[0].doc, own)
        for metric, value in metrics.items():
            if "sparsity" not in metric:
                found[sample.task][metric].append(float(value))
    return {task: {name: statistics.fmean(own) for name, own in metrics.items()} for task, metrics in found.items()}


def row_of(model: Models, name: str, kind: str, length: str, work: Work, seconds: float) -> Row:
    """Measure one row; what goes wrong stands in it."""
    row: Row = {"name": name, "kind": kind, "length": length, "digest": work.digest, "skipped": work.skipped}
    row["stopped_after"] = seconds
    cuda = model.device == "cuda"
    try:
        lm, batch = model.named(name)
        start = time.perf_counter()
        list(ask(lm, kind, [short(work.warm)]))
        row["warm_up_s"] = time.perf_counter() - start
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        calls = calls_of(work.samples, kind, batch)
        figures, answers = timed(calls, lambda call: ask(lm, kind, call), seconds)
        row |= figures
        row["samples_per_hour"] = samples_per_hour(row)
        row["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
        if kind == GENERATED:
            row["tokens"] = sum(len(model.tokenizer.encode(str(text))) for _, own in answers for text in own)
        row["scores"] = scores_of(work, answers)
        measured = [stats for _, own in answers for answer in own if (stats := stats_of(answer))]
        row["sparsities"] = mean_sparsities(measured)
        if name in METHODS and not max(row["sparsities"].values(), default=0.0):
            raise UserError(f"{name} was never sparse: give longer prompts")
    except torch.OutOfMemoryError as error:
        row["failed"] = f"out of memory ({reason_of(error)})"
    except Exception as error:
        row["failed"] = reason_of(error)
    if "failed" in row:  # behind the exception, which holds what memory was used for
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    return row


class Models:
    """One set of weights, under every model type and method of the run; each is made once."""

    def __init__(self, folder: str, dtype: str, device: str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = device
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._sparse: dict[str, Any] = {}

    def named(self, name: str) -> tuple[Any, int]:
        """The model of a row, ready to answer, and its batch size."""
        from lm_eval.models.huggingface import HFLM

        from lm_eval_sparse.model.lm import SparseHFLM
        from lm_eval_sparse.runtime.interface import IMPLEMENTATION

        common = {"pretrained": self.model, "tokenizer": self.tokenizer, "device": self.device}
        if is_hf(name):
            self.model.set_attn_implementation("sdpa")
            batch = int(name.partition("/")[2])
            return HFLM(**common, batch_size=batch), batch
        if name not in self._sparse:
            typed = {"method": name} | ({} if name == "dense" else {"sparsity": SPARSITY})
            self._sparse[name] = SparseHFLM(**common, batch_size=SPARSE_BATCH, **typed)
            self._sparse[name].warned_about_template = True
        self.model.set_attn_implementation(IMPLEMENTATION)
        return self._sparse[name], SPARSE_BATCH


# --- a run ---------------------------------------------------------------------------------------------------------


def path_of(rows: Path, length: str, kind: str, name: str) -> Path:
    return rows / f"{length}_{kind}_{name.replace('/', '-')}.json"


def about(options: argparse.Namespace) -> Row:
    """What all rows of a folder share."""
    found = {name: importlib.metadata.version(name) for name in ("transformers", "lm_eval")}
    device = device_facts() if options.device == "cuda" else {"name": device_name(torch.device("cpu"))}
    return {"device": device, "versions": {**versions(), **found}, "dtype": options.dtype, "chat": options.chat}


def check_same(rows: Path, now: Row) -> None:
    """Note what this run is of, or raise `UserError` where the rows there are of something else."""
    place = rows / "about.json"
    if not place.exists():
        write(place, json.dumps(now, indent=1))
        return
    before = json.loads(place.read_text())
    for name in SAME:
        # The rates of a card differ from run to run.
        was, is_now = (known[name]["name"] if name == "device" else known[name] for known in (before, now))
        if was != is_now:
            raise UserError(f"the rows in {rows} are of {name} {was}, this run is of {is_now}: give another folder")


def run(options: argparse.Namespace) -> int:
    """Measure every row that is not there yet. Returns an exit status: 1 where no row could be measured."""
    wanted = [
        (length, kind, name)
        for length in options.lengths
        for kind in options.kinds
        for name in options.names
        if not path_of(options.rows, length, kind, name).exists()
    ]
    wanted.sort(key=lambda cell: cell[2] in METHODS)  # what targets are about comes first
    if not wanted:
        say("all rows are there")
        return 0
    check_same(options.rows, about(options))
    models = Models(options.model, options.dtype, options.device)
    say("loaded")
    works: dict[tuple[str, str], Work] = {}
    measured = 0
    for length, kind, name in wanted:
        if (length, kind) not in works:
            start = time.perf_counter()
            number = options.lengths[length] if kind == TWINS else options.generated or options.lengths[length]
            works[length, kind] = work_of(models.named("hf/1")[0], kind, length, number, options)
            work, took = works[length, kind], time.perf_counter() - start
            say(f"{length} {kind}: {len(work.samples)} documents written in {took:.0f} s; skipped {work.skipped}")
        seconds = options.hf_seconds if is_hf(name) and options.hf_seconds else options.seconds
        row = row_of(models, name, kind, length, works[length, kind], seconds)
        write(path_of(options.rows, length, kind, name), json.dumps(row, indent=1))
        measured += "failed" not in row
        say(f"{length} {kind} {name}: {told(row)}")
    return 0 if measured else 1


def told(row: Row) -> str:
    """A row in a line."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    end = f", stopped after {row['documents']} of {row['of_documents']}" if row["cut"] else ""
    return f"{row['samples_per_hour']:.0f} samples per hour, {row['requests']} requests in {row['seconds']:.1f} s{end}"


# --- the table -----------------------------------------------------------------------------------------------------


def best_of_hf(rows: Sequence[Row], length: str, kind: str) -> Row | None:
    """The row of `hf` at the batch size with most samples per hour; None where no batch size was measured."""
    own = [row for row in rows if (row["length"], row["kind"]) == (length, kind) and is_hf(row["name"])]
    return max((row for row in own if "failed" not in row), key=lambda row: row["samples_per_hour"], default=None)


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with their ratio to the best of `hf` for the same requests, `over_hf`. Raises `UserError` on others'."""
    found = []
    for row in rows:
        best = best_of_hf(rows, row["length"], row["kind"])
        cell = (row["length"], row["kind"])
        if len({other["digest"] for other in rows if (other["length"], other["kind"]) == cell}) > 1:
            raise UserError(f"rows of {row['kind']} at {row['length']} answer different requests: measure them anew")
        measured = best is not None and "failed" not in row
        found.append(row | ({"over_hf": row["samples_per_hour"] / best["samples_per_hour"]} if measured else {}))
    return found


def targets(rows: Sequence[Row]) -> list[Row]:
    """What is aimed at: dense twins beside what `hf` does with twins, or with what they stand for."""
    found = []
    for length, (kind, wanted) in TARGETS.items():
        dense = [row for row in rows if (row["length"], row["kind"], row["name"]) == (length, TWINS, "dense")]
        best = best_of_hf(rows, length, kind)
        if not dense or "failed" in dense[0] or best is None:
            continue
        ratio = dense[0]["samples_per_hour"] / best["samples_per_hour"]
        found.append({"length": length, "kind": kind, "hf": best["name"], "wanted": wanted, "ratio": ratio,
                      "reached": ratio >= wanted})  # fmt: skip
    return found


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def cells(row: Row) -> list[str]:
    """A row of the table."""
    if "failed" in row:
        return [row["name"], "-", "-", "-", "-", "-", "-", "-", row["failed"]]
    done = f"{row['documents']} of {row['of_documents']}" + ("*" if row["cut"] else "")
    sparsity = ", ".join(f"{value:.3f}" for value in row["sparsities"].values()) if row["name"] in METHODS else "-"
    tokens = row["tokens"] / row["documents"] if "tokens" in row else None
    memory = row["peak_bytes"] / 2**30 if row["peak_bytes"] is not None else None
    # The first metric of a leaf is its score.
    scores = [next(iter(own.values())) for own in row["scores"].values()]
    return [
        row["name"], f"{row['samples_per_hour']:.0f}", number(row.get("over_hf"), ".2f"), done,
        f"{row['requests'] / row['seconds']:.1f}", number(tokens, ".0f"), number(memory, ".1f"), sparsity,
        f"{statistics.fmean(scores):.3f}",
    ]  # fmt: skip


HEAD = [
    "row", "samples per hour", "over hf", "documents", "requests per s", "tokens per answer", "peak GiB",
    "measured sparsity", "mean score",
]  # fmt: skip


def markdown(content: Row) -> str:
    known = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version)
    rows = content["rows"]
    limits = sorted({f"{row['stopped_after']:g}" for row in rows})
    lines = [
        f"# Samples per hour: {content['model']}",
        "",
        f"{content['device']['name']}, {content['dtype']}, {'with' if content['chat'] else 'without'} the chat "
        f"template; {known}. One process; methods at sparsity {SPARSITY:g}. Timed from the text of the prompts to the "
        "answers; loading, the check at start-up, writing the documents and a document to warm up with are not. "
        "`hf/4` is lm-eval's `hf` with a batch size of 4; *over hf* is against its best batch size for the same "
        "requests. Peak memory holds the weights. The mean score is that of the leaves' first metrics, over the "
        "documents that were answered.",
        "",
        f"\\* made no further call after {' or '.join(limits)} s: the rate is that of what was done, "
        "of `hf` with twins that of its requests.",
        "",
    ]
    for target in content["targets"]:
        what = "`hf` with the same twins" if target["kind"] == TWINS else "`hf` generating their siblings"
        lines += [
            f"* {target['length']}: dense twins have {target['ratio']:.1f} times the samples per hour of {what} "
            f"(best: `{target['hf']}`); aimed at {target['wanted']:g}: {'reached' if target['reached'] else 'missed'}.",
        ]
    for length in dict.fromkeys(row["length"] for row in rows):
        for kind in KINDS:
            own = [row for row in rows if (row["length"], row["kind"]) == (length, kind)]
            if not own:
                continue
            leaf = f"`{'forced_' if kind == TWINS else ''}frontier_*_{length}`"
            left = own[0]["skipped"]
            lines += ["", f"## {leaf}", ""]
            if left:
                told = "; ".join(f"{task} ({reason})" for task, reason in left.items())
                lines += [f"Not run: {told}.", ""]
            lines += table(HEAD, [cells(row) for row in own])[:-1]
    return "\n".join(lines) + "\n"


def tabulate(options: argparse.Namespace) -> int:
    """The rows of a folder in one file, and the table beside it."""
    found = [json.loads(path.read_text()) for path in sorted(options.folder.glob("*_*.json"))]
    if not found:
        raise UserError(f"{options.folder} holds no rows: type `throughput.py run --rows {options.folder}` first")
    order = [*NAMES, *sorted({row["name"] for row in found} - {*NAMES})]
    found.sort(key=lambda row: (tokens_of(row["length"]), KINDS.index(row["kind"]), order.index(row["name"])))
    content = {
        **json.loads((options.folder / "about.json").read_text()),
        "model": options.name, "targets": targets(found), "rows": compared(found),
    }  # fmt: skip
    write(options.output, json.dumps(content, indent=1) + "\n")
    write(options.output.with_suffix(".md"), markdown(content))
    for target in content["targets"]:
        say(f"{target['length']}: {target['ratio']:.2f} times hf ({target['kind']}), aimed at {target['wanted']:g}")
    return 0


# --- arguments -----------------------------------------------------------------------------------------------------


def listed(given: str) -> list[str]:
    return [part for part in given.split(",") if part]


def lengths_of(given: str, documents: int) -> dict[str, int]:
    """`4k=20,16k` as documents by length. Raises `UserError`."""
    found = {}
    for part in listed(given):
        length, _, number = part.partition("=")
        tokens_of(length)
        if number and not (number.isdecimal() and int(number)):
            raise UserError(f"--lengths {part}: give documents as in {length}=20")
        found[length] = int(number) if number else documents
    return found


def names_of(given: str) -> list[str]:
    """Names of rows, `hf` for all of its batch sizes. Raises `UserError`."""
    found: list[str] = []
    for name in listed(given):
        known = is_hf(name) and name.removeprefix("hf/").isdecimal() and int(name.removeprefix("hf/")) > 0
        if name not in NAMES and name != "hf" and not known:
            raise UserError(f"--names {name} is not known: give hf, hf/BATCH, {', '.join(NAMES[len(HF_BATCHES) :])}")
        found += [f"hf/{batch}" for batch in HF_BATCHES] if name == "hf" else [name]
    return found


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--model", required=True, help="a folder")
    running.add_argument("--rows", type=Path, required=True, help="a folder for the rows")
    running.add_argument("--names", default=",".join(NAMES), help="rows, such as hf,dense,quest or hf/8")
    running.add_argument("--kinds", default=",".join(KINDS))
    running.add_argument("--lengths", default="4k,16k", help="LENGTH or LENGTH=DOCUMENTS, with commas between")
    running.add_argument("--documents", type=int, default=20, help="documents of each leaf")
    running.add_argument("--generated", type=int, default=2, help="documents of each leaf to be generated from; 0: all")
    running.add_argument("--seconds", type=float, default=60.0, help="a row makes no further call after so many")
    running.add_argument("--hf_seconds", type=float, help="the same for rows of hf; left out, as many")
    running.add_argument("--tasks", default=",".join(folder.name for folder in BUILT_IN))
    running.add_argument("--qa_folder", help="folder with the data of the QA tasks")
    running.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    running.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    running.add_argument("--no_chat", dest="chat", action="store_false", help="without the model's chat template")
    making = commands.add_parser("table")
    making.add_argument("folder", type=Path)
    making.add_argument("--name", default="Qwen2.5-Coder-1.5B-Instruct")
    making.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.command == "run":
        try:
            if (
                options.documents < 1
                or options.generated < 0
                or not min(options.seconds, options.hf_seconds or 1.0) > 0
            ):
                raise UserError("--documents and --seconds take numbers above 0, --generated 0 or more")
            options.lengths = lengths_of(options.lengths, options.documents)
            options.names, options.kinds, options.tasks = (
                names_of(options.names), listed(options.kinds), listed(options.tasks)
            )  # fmt: skip
            for name, given, known in (
                ("kinds", options.kinds, KINDS), ("tasks", options.tasks, [folder.name for folder in BUILT_IN])
            ):  # fmt: skip
                if unknown := [one for one in given if one not in known]:
                    raise UserError(f"--{name} {unknown[0]} is not known: give some of {', '.join(known)}")
        except UserError as error:
            parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        return tabulate(options) if options.command == "table" else run(options)
    except UserError as error:
        print(f"throughput.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
