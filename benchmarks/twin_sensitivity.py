"""Does a twin fall when attention is destroyed? Per twin and phase: dense against attention that sees nothing useful.

    prefill    the first block and a local window only, at the same executed sparsity as a method would have
    eviction   the first tokens and the last ones are kept, the rest of the cache is dropped
    decode     random pages are read

None of the three looks at the queries. A twin on which dense attention does well and these do as well says nothing
about sparse attention in that phase: its scores there must not go into an average. The same documents for all, so that
differences are paired; what dense attention scores without the context is the floor, beside chance.

    python benchmarks/twin_sensitivity.py --model Qwen=FOLDER --lengths 4k=50 16k=20 --processes 8 --output OUT.json
    python benchmarks/twin_sensitivity.py --merge A.json B.json --output benchmarks/results/twin_sensitivity.json

Long, since the controls stand beside the measurement they are for.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lm_eval_sparse import patches

patches.install()

import torch  # noqa: E402
from prefill import say, table, versions, write  # noqa: E402
from torch import Tensor  # noqa: E402

from lm_eval_sparse.frontier.leaves import BUILT_IN  # noqa: E402
from lm_eval_sparse.kernels.types import Blocks, Keep, Reads  # noqa: E402
from lm_eval_sparse.methods import Call, DecodeMethod, Density, EvictionMethod, PrefillMethod  # noqa: E402
from lm_eval_sparse.methods.plan import Assignment, Plan  # noqa: E402
from lm_eval_sparse.methods.scored.prefill import row_budgets  # noqa: E402
from lm_eval_sparse.model.lm import SparseHFLM  # noqa: E402
from lm_eval_sparse.model.report import device_name  # noqa: E402
from lm_eval_sparse.model.scoring import Context, Scorer  # noqa: E402
from lm_eval_sparse.runtime.accounting import RowCounts  # noqa: E402
from lm_eval_sparse.runtime.cache import SparseCache  # noqa: E402

SPARSITY = 0.95
PHASES = ("prefill", "eviction", "decode")
SINKS = 4
#: Keys that the rows of a batch hold together, at most: candidates of a ranking are scored side by side.
KEYS_SIDE_BY_SIDE = 100_000
#: By how much dense must beat the floor, besides 3 standard errors, to count as well above it.
MARGIN = {"bits_per_char": 0.1}
USUAL_MARGIN = 0.05


def share_of(call: Call) -> float:
    """What a control may select; where nothing was requested, as much as under `SPARSITY`."""
    return call.budget.share if isinstance(call.budget, Density) else 1 - SPARSITY


@dataclass(frozen=True)
class SinksAndWindow(PrefillMethod):
    """The first key block and those up to the diagonal, the same number for every query block and head."""

    name: ClassVar[str] = "sinks_and_window"
    unit: ClassVar[str] = "blocks"
    importance: ClassVar[str] = "none"
    allocation: ClassVar[str] = "uniform"
    kv: ClassVar[str] = "full cache"
    reference: ClassVar[str] = "control"

    block_size: int = 16

    def select(self, call: Call) -> Blocks:
        query, length, heads = call.query, call.length, len(call.query)
        block = self.block_size
        blocks = -(-length // block)
        count, extra = row_budgets(length, block, share_of(call), 2)
        rows = torch.arange(blocks, device=query.device)
        counts = torch.minimum(rows + 1, count + (rows >= blocks - extra).long())
        place = torch.arange(count + 1, device=query.device)
        # The first block, then the last ones up to the row's own.
        indices = torch.where(place == 0, 0, rows[:, None] - counts[:, None] + 1 + place).clamp(min=0)
        return Blocks(
            indices.to(torch.int32).expand(heads, -1, -1).contiguous(),
            counts.to(torch.int32).expand(heads, -1).contiguous(),
            *(length, block, block),
        )


@dataclass(frozen=True)
class KeepEnds(EvictionMethod):
    """The first tokens and the last ones, the same for every KV head."""

    name: ClassVar[str] = "keep_ends"
    unit: ClassVar[str] = "tokens"
    importance: ClassVar[str] = "none"
    allocation: ClassVar[str] = "uniform"
    kv: ClassVar[str] = "evicted"
    reference: ClassVar[str] = "control"

    def select(self, call: Call) -> Keep:
        kv_heads, length = call.key.shape[:2]
        kept = max(SINKS + 1, round(share_of(call) * length))
        tokens = torch.arange(kept, device=call.key.device)
        ids = torch.where(tokens < SINKS, tokens, tokens + length - kept)
        return Keep(
            ids=ids.expand(kv_heads, -1).contiguous(),
            counts=torch.full((kv_heads,), kept, device=call.key.device),
            total=kv_heads * kept,
        )


@dataclass(frozen=True)
class RandomPages(DecodeMethod):
    """The page that a token is in and random ones before it, other ones in every layer, head and step."""

    name: ClassVar[str] = "random_pages"
    unit: ClassVar[str] = "pages"
    importance: ClassVar[str] = "none"
    allocation: ClassVar[str] = "uniform"
    kv: ClassVar[str] = "full cache"
    reference: ClassVar[str] = "control"

    page_size: int = 16

    def select(self, call: Call) -> Reads:
        query, steps = call.query, call.query.shape[2]
        own = (call.cache.kv.visible(steps) - 1) // self.page_size  # the page of each token: so many before it
        wanted = (share_of(call) * call.cache.logical(steps) / self.page_size).round().long().clamp(min=1) - 1
        wanted = torch.minimum(wanted, own)
        most, width = int(own.max()), int(wanted.max()) + 1
        draws = torch.rand(*own.shape, most + 1, device=query.device)
        ids = torch.arange(most + 1, device=query.device)
        draws = torch.where(ids < own[..., None], draws, -1.0)
        order = draws.argsort(-1, descending=True)[..., :width]
        place = torch.arange(width, device=query.device)
        beyond = most + 1
        chosen = torch.where(place < wanted[..., None], order, beyond)
        chosen = torch.where(place == wanted[..., None], own[..., None], chosen).sort(-1).values
        return Reads(
            chosen.clamp(max=most).to(torch.int32)[:, None], (wanted + 1).to(torch.int32)[:, None], self.page_size
        )


CONTROLS = {
    "prefill": Plan(prefill=Assignment(SinksAndWindow(), SPARSITY)),
    "eviction": Plan(eviction=Assignment(KeepEnds(), SPARSITY)),
    "decode": Plan(decode=Assignment(RandomPages(), SPARSITY)),
}


class ControlledScorer(Scorer):
    """Scores each context densely and under each control. One dense prefill serves dense and random decoding."""

    lm: ControlledLM

    def score_context(self, context: Context, *others: Any) -> list[tuple[float, bool]]:
        plain = self.lm.runtime.plan
        try:
            for phase in self.lm.wanted:
                if phase != "decode":
                    (answers,) = self._under(context, CONTROLS[phase], [CONTROLS[phase]])
                    self._note(phase, context, *answers)
            # Page bounds are kept where a decode method is planned; the prefill before it is dense.
            plans = [plain, CONTROLS["decode"]] if "decode" in self.lm.wanted else [plain]
            dense, *rest = self._under(context, plans[-1], plans)
            for answers in rest:
                self._note("decode", context, *answers)
            return dense[0]
        finally:
            self.lm.runtime.plan = plain

    def _under(
        self, context: Context, plan: Plan, plans: Sequence[Plan]
    ) -> list[tuple[list[tuple[float, bool]], RowCounts]]:
        """The answers after a prefill under `plan`, under each of `plans`, and what was counted."""
        self.lm.runtime.plan = plan
        sequences = context.sequences()
        cache = self.lm.runtime.new_cache(self.lm.model.config, reserve=max(map(len, sequences)))
        prefill = RowCounts()
        with self.lm.runtime.running(prefill, cache, len(context.prompt)):
            logits = self.lm.forward(torch.tensor([context.prompt], device=self.lm.device), cache=cache, keep=1)
            first = self.lm.forward.log_softmax(logits[:, -1])[0].double()
        counts = [context.counts if other is not plan else RowCounts() for other in plans]
        scored: list[dict[tuple, Tensor]] = [{} for _ in plans]
        hits: list[dict[tuple, Tensor]] = [{} for _ in plans]
        some = max(1, KEYS_SIDE_BY_SIDE // len(context.prompt))
        for begin in range(0, len(sequences), some):
            part = sequences[begin : begin + some]
            rows = copy.deepcopy(cache)
            rows.batch_repeat_interleave(len(part))
            snapshot = rows.snapshot()
            for number, other in enumerate(plans):
                self.lm.runtime.plan = other
                with self.lm.runtime.running(counts[number], rows, len(context.prompt), read=len(context.prompt)):
                    found = self._side_by_side(part, first, rows)
                rows.restore(snapshot)
                for tokens, (logprobs, greedy) in zip(part, found, strict=True):
                    scored[number][tuple(tokens)], hits[number][tuple(tokens)] = logprobs, greedy
        in_prefill = plan.prefill is not None or plan.eviction is not None
        return [
            (context.answers(*found), prefill if in_prefill else one)
            for *found, one in zip(scored, hits, counts, strict=True)
        ]

    def _side_by_side(
        self, sequences: Sequence[list[int]], first: Tensor, cache: SparseCache
    ) -> list[tuple[Tensor, Tensor]]:
        """Log-probability and greedy hit of each token of answers that continue the rows of `cache`.

        `first (V,)` predicts the first token of each. Shorter ones are filled up behind, which nothing before feels.
        """
        longest = max(map(len, sequences))
        ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in sequences], device=self.lm.device)
        later = self.lm.forward.log_softmax(self.lm.forward(ids[:, :-1], cache=cache)) if longest > 1 else None
        found = []
        for row, tokens in enumerate(sequences):
            logprobs = (
                first[None] if later is None else torch.cat([first[None], later[row, : len(tokens) - 1].double()])
            )
            wanted = ids[row, : len(tokens)]
            hit = logprobs.argmax(-1) == wanted
            found.append((logprobs.gather(-1, wanted[:, None])[:, 0].cpu(), hit.cpu()))
        return found

    def _note(self, phase: str, context: Context, answers: list[tuple[float, bool]], counts: RowCounts) -> None:
        for target, answer in zip(context.targets, answers, strict=True):
            self.lm.others.setdefault(phase, {})[target.index] = answer
        if (sparsity := counts.figures()[phase]["executed_sparsity"]) is not None:
            self.lm.measured.setdefault(phase, []).append(sparsity)


class ControlledLM(SparseHFLM):
    """`loglikelihood` answers densely; `others` holds the answers of the controls, and `measured` the sparsities."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.scorer = ControlledScorer(self)
        self.others: dict[str, dict[int, tuple[float, bool]]] = {}
        self.measured: dict[str, list[float]] = {}
        self.wanted: Sequence[str] = PHASES


# ------------------------------------------------------------------------------------------------------------ measuring


def without_context(prompt: str, doc: Mapping[str, Any]) -> str:
    """A rendered prompt with nothing where its context was."""
    text, (start, end) = doc["input"], doc["context"]
    if text not in prompt:
        raise ValueError("the chat template changes the message")
    return prompt.replace(text, text[:start].rstrip() + text[end:])


def documents(lm: ControlledLM, leaf: str, indexes: list[int], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Per document the scores of dense attention, of dense without the context, and under each control."""
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    from lm_eval_sparse.paths import task_folders
    from lm_eval_sparse.protocol import SharedPrompt

    metadata = {"qa_folder": options.qa_folder} if options.qa_folder else {}
    manager = TaskManager(include_path=task_folders(), include_defaults=False, metadata=metadata)
    task = manager.load([leaf])["tasks"][leaf]
    template = {"apply_chat_template": True, "chat_template": lm.apply_chat_template} if options.chat else {}
    task.build_all_requests(samples=indexes, rank=0, world_size=1, **template)
    if reason := task.config.metadata.get("skipped"):
        yield {"leaf": leaf, "skipped": reason}
        return
    better = {row["metric"]: row["higher_is_better"] for row in task.config.metric_list}
    by_doc: dict[int, list[Instance]] = {}
    for request in task.instances:
        by_doc.setdefault(request.doc["index"], []).append(request)
    for index, requests in by_doc.items():
        torch.manual_seed(index)
        start, doc = time.perf_counter(), requests[0].doc
        lm.others, lm.measured, lm.wanted = {}, {}, PHASES
        rows = {"dense": lm.loglikelihood(requests, disable_tqdm=True)}
        rows |= {phase: [lm.others[phase][i] for i in range(len(requests))] for phase in PHASES}
        measured = {phase: statistics.fmean(values) for phase, values in lm.measured.items()}
        lm.wanted, bare = (), []
        for request in requests:
            context, continuation = request.args
            text = without_context(context[: context.shared], doc)
            given = (SharedPrompt(text + context[context.shared :], len(text)), continuation)
            bare.append(Instance("loglikelihood", {}, given, 0, metadata=(leaf, index, 1)))
        rows["without context"] = lm.loglikelihood(bare, disable_tqdm=True)
        yield {
            "leaf": leaf,
            "index": index,
            "scores": {name: task.recipe.forced_score(doc, answers) for name, answers in rows.items()},
            "chance": task.recipe.chance(doc),
            "measured": measured,
            "better": {name: better[name] for name in task.recipe.forced_score(doc, rows["dense"])},
            "seconds": time.perf_counter() - start,
        }


def work(options: argparse.Namespace) -> None:
    """One process: every n-th document of each leaf, a JSON line each."""
    part, of = (int(number) for number in options.part.split("/"))
    _, _, folder = options.model.partition("=")
    given = {"pretrained": folder} if folder else {}
    lm = ControlledLM(**given, dtype=options.dtype, device=options.device)
    with options.lines.open("w") as file:
        for leaf, number in leaves(options):
            for row in documents(lm, leaf, list(range(part, number, of)), options):
                file.write(json.dumps(row) + "\n")
                file.flush()


def leaves(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Names of the twins and how many documents of each."""
    wanted = [given.partition("=") for given in options.lengths]
    return [(f"forced_frontier_{task}_{length}", int(number)) for length, _, number in wanted for task in options.tasks]


def spawn(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, from several processes on one device."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, running = options.rows or scratch, []
        Path(folder).mkdir(parents=True, exist_ok=True)
        for part in range(options.processes):
            lines = Path(folder) / f"{part}.jsonl"
            own = [*sys.argv[1:], "--part", f"{part}/{options.processes}", "--lines", str(lines)]
            devices = torch.cuda.device_count() if options.device == "cuda" else 0
            # Each takes the next device, where there are several.
            place = {"CUDA_VISIBLE_DEVICES": str(part % devices)} if devices > 1 else {}
            running.append((lines, subprocess.Popen([sys.executable, __file__, *own], env={**os.environ, **place})))
        for lines, process in running:
            if process.wait():
                raise SystemExit(f"part {lines.stem} ended with exit status {process.returncode}")
        return [json.loads(line) for lines, _ in running for line in lines.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------- verdicts


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def verdict(
    dense: Sequence[float], destroyed: Sequence[float], floors: Sequence[Sequence[float]], margin: float
) -> dict[str, Any]:
    """How a score that is better the higher it is falls, document by document.

    `at floor` where dense is not above each of `floors` by 3 standard errors and `margin`: then nothing can be said
    with this model; the figures are those of the floor that it is least above. Else `responds` where it falls by 2
    standard errors or more, and `insensitive` where it does not.
    """
    fall, error = mean_and_error([a - b for a, b in zip(dense, destroyed, strict=True)])
    each = [mean_and_error([a - b for a, b in zip(dense, floor, strict=True)]) for floor in floors]
    above, above_error = min(each, key=lambda one: one[0] - max(3 * one[1], margin))
    if not above >= max(3 * above_error, margin):
        word = "at floor"
    else:
        word = "responds" if fall > 0 and fall >= 2 * error else "insensitive"
    return {"fall": fall, "error": error, "above": above, "above_error": above_error, "verdict": word}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per leaf, metric and phase: means, the paired fall and the verdict."""
    found: dict[str, Any] = {}
    for leaf in dict.fromkeys(row["leaf"] for row in rows):
        mine = sorted((row for row in rows if row["leaf"] == leaf and "scores" in row), key=lambda row: row["index"])
        if not mine:
            found[leaf] = {"skipped": next(row["skipped"] for row in rows if row["leaf"] == leaf)}
            continue
        metrics: dict[str, Any] = {}
        for metric, higher in mine[0]["better"].items():
            sign = 1 if higher else -1
            of = {way: [sign * row["scores"][way][metric] for row in mine] for way in mine[0]["scores"]}
            floors = [of["without context"]]
            if metric in mine[0]["chance"]:
                floors.append([sign * row["chance"][metric] for row in mine])
            metrics[metric] = {
                "higher_is_better": higher,
                "means": {way: [sign * m, e] for way, (m, e) in ((w, mean_and_error(v)) for w, v in of.items())},
                "chance": statistics.fmean(row["chance"][metric] for row in mine)
                if metric in mine[0]["chance"]
                else None,
                "phases": {
                    phase: verdict(of["dense"], of[phase], floors, MARGIN.get(metric, USUAL_MARGIN)) for phase in PHASES
                },
            }
        words = {phase: [one["phases"][phase]["verdict"] for one in metrics.values()] for phase in PHASES}
        found[leaf] = {
            "documents": len(mine),
            "metrics": metrics,
            "measured": {phase: statistics.fmean(row["measured"][phase] for row in mine) for phase in PHASES},
            "verdicts": {phase: overall(given) for phase, given in words.items()},
            "seconds": statistics.fmean(row["seconds"] for row in mine),
        }
    return found


def overall(words: Sequence[str]) -> str:
    """The verdict of a twin whose metrics have these: it responds where one does."""
    return next(word for word in ("responds", "insensitive", "at floor") if word in words)


def markdown(content: Mapping[str, Any]) -> str:
    """The tables, from the content of the JSON file."""
    lines = [
        "# What destroyed attention does to the twins",
        "",
        f"Dense against attention that looks at nothing, at sparsity {SPARSITY} in one phase: in prefill the first "
        "block and a local window, in eviction the first and the last tokens, in decode random pages. Falls are paired "
        "over documents, ± standard error; ↓ marks a metric that is better the lower it is, its falls count rises. "
        "**at floor**: dense is not above both chance and what it scores without the context by 3 standard errors and "
        "a margin (.05; .1 bits); nothing can be said with this model. Else **responds**: falls by 2 standard errors "
        "or more; **insensitive**: does not.",
        "",
    ]
    for name, run in content["runs"].items():
        facts = ", ".join(f"{key} {value}" for key, value in run["versions"].items() if value)
        chat = "with" if run["chat"] else "without"
        note = f" {run['note']}" if run.get("note") else ""
        lines += [f"## {name}", "", f"{run['device']}, {run['dtype']}, {chat} chat template; {facts}.{note}", ""]
        rows = []
        for leaf, one in run["leaves"].items():
            short = leaf.removeprefix("forced_frontier_")
            if "skipped" in one:
                rows.append([short, "-", "-", f"not run: {one['skipped'][:60]}", *["-"] * 4])
                continue
            for metric, figures in one["metrics"].items():
                means = figures["means"]
                floor = f"{means['without context'][0]:.3f}"
                chance = "-" if figures["chance"] is None else f"{figures['chance']:.3f}"
                cells = [
                    f"{means[phase][0]:.3f} (fall {fall['fall']:.3f} ± {fall['error']:.3f}) {fall['verdict']}"
                    for phase, fall in figures["phases"].items()
                ]
                mark = "" if figures["higher_is_better"] else " ↓"
                dense = f"{means['dense'][0]:.3f} ± {means['dense'][1]:.3f}"
                rows.append([short, str(one["documents"]), metric + mark, f"{chance} / {floor}", dense, *cells])
        lines += table(["twin", "documents", "metric", "chance / without context", "dense", *PHASES], rows)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", metavar="NAME=FOLDER", help="left out: the embedded model")
    parser.add_argument("--tasks", nargs="+", default=[folder.name for folder in BUILT_IN])
    parser.add_argument("--lengths", nargs="+", default=["4k=20"], metavar="LENGTH=DOCUMENTS")
    parser.add_argument("--qa_folder", help="folder with the data of the QA tasks")
    parser.add_argument("--no_chat", dest="chat", action="store_false", help="without the model's chat template")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the device")
    parser.add_argument("--note", help="a sentence on the model, for the table")
    parser.add_argument("--rows", help="a folder that keeps what was measured, should the run be cut off")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--merge", nargs="+", type=Path, default=[], help="JSON files of earlier runs to put together")
    parser.add_argument("--output", type=Path, help="a .json file; the table lies beside it")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.part:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        work(options)
        return
    content: dict[str, Any] = {"sparsity": SPARSITY, "runs": {}}
    for path in options.merge:
        for name, run in json.loads(path.read_text())["runs"].items():
            content["runs"][name] = {**run, "leaves": summary(run["rows"])}
    if not options.merge:
        start, rows = time.perf_counter(), spawn(options)
        name = options.model.partition("=")[0] or "SmolLM2-135M-Instruct (embedded)"
        content["runs"][f"{name}, {' '.join(options.lengths)}"] = {
            "device": device_name(torch.device(options.device)),
            "versions": versions(),
            "dtype": options.dtype,
            "chat": options.chat,
            "note": options.note,
            "seconds": time.perf_counter() - start,
            "leaves": summary(rows),
            "rows": rows,
        }
    say(markdown(content))
    if options.output is not None:
        write(options.output, json.dumps(content, indent=1) + "\n")
        write(options.output.with_suffix(".md"), markdown(content))


if __name__ == "__main__":
    main()
