"""Tokens per second of lm-eval's `hf` and of `sparse-hf`, dense and with each method, in one run.

    python benchmarks/generate.py --output benchmarks/results      # SmolLM2 and an 8B shape; six minutes on a GPU
    python benchmarks/generate.py --device cpu --output benchmarks/results     # SmolLM2, short prompts
    python benchmarks/generate.py --models smollm2 --batches 1 --methods hf dense quest
    python benchmarks/generate.py --table benchmarks/results/generate_cuda.json # the table anew

Requests go through `generate_until` of both model types, with the same model object, prompts and generation arguments.
Prompts of one batch are unequally long (95 to 100% of the length that is asked for), as tasks have them. Answers never
end early: end tokens get a logit of -100 in both. The model `8b` has the shape of Llama 3.1 8B and random weights.

Each cell is run once, after a short run with one prompt in which kernels are compiled (`warm-up`). In it a clock notes
every call of the model and every token, so that one run gives
- prefill: seconds from the first call of the model to the first token, all prompts of the batch,
- start: seconds between the last first token and the step after it, less one step: storage, CUDA graphs,
- tokens/s: tokens of all rows in the steps that follow, per second: what decoding does once it runs,
- an answer: seconds for answers of --answer tokens to all prompts with everything (tokenizing, prefill, start and
  counting), from the time of the whole call and the length of a step.
A cell that takes longer than --cell_seconds is ended; what its clock has seen by then counts and is marked.

Long, since both ways to generate run in one process.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_sparse import patches

patches.install()

import torch  # noqa: E402
import transformers  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from prefill import check_options, reason_of, say, table, versions, write  # noqa: E402

from lm_eval_sparse.errors import UserError  # noqa: E402
from lm_eval_sparse.methods import METHODS, PHASE_ARGUMENTS  # noqa: E402
from lm_eval_sparse.methods.plan import parse  # noqa: E402
from lm_eval_sparse.model import embedded  # noqa: E402
from lm_eval_sparse.model.lm import SparseHFLM  # noqa: E402
from lm_eval_sparse.runtime.rows import Row as DecodedRow  # noqa: E402

Row = dict[str, Any]

HF = "hf"
NAMES = (HF, "dense", "quest", "snapkv", "ada_snapkv", "ada_snapkv+quest", "flexprefill+snapkv+quest")
SMOLLM2, LLAMA_8B = "smollm2", "8b"
#: Device -> model -> (prompt tokens, batch), what targets are about first.
CELLS: dict[str, dict[str, list[tuple[int, int]]]] = {
    "cuda": {
        SMOLLM2: [(1000, 1), (1000, 8), (7500, 1), (7500, 8)],
        LLAMA_8B: [(8192, 1), (32768, 1), (8192, 8), (100_000, 1), (32768, 8)],
    },
    "cpu": {SMOLLM2: [(300, 1), (300, 8), (1500, 1), (1500, 8)]},
}
#: The shape of Llama 3.1 8B.
SHAPE_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rope_theta": 5e5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
#: P8: dense SmolLM2 over `hf`, device -> batch -> times the tokens/s.
P8: dict[str, dict[int, float]] = {"cuda": {1: 10.0, 8: 3.0}, "cpu": {1: 1.0, 8: 1.0}}
#: Share of keys evicted where a decode method chooses among the others: the more are gone, the less is left to skip.
KV_BESIDE_DECODE = 0.5
#: The short run compiles kernels: prompts at most that long, so many tokens.
WARM_LENGTH, WARM_TOKENS = 8192, 6
#: A logit that no token with it is ever the best one.
NEVER = -100.0


# --- models and prompts --------------------------------------------------------------------------------------------


def random_llama(device: str, **shape: Any) -> transformers.PreTrainedModel:
    """A Llama of that shape in bfloat16, its weights drawn on the device."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(**{**SHAPE_8B, **shape})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    # Layers add little to what tokens begin with, as in trained models: else what two kernels round differently grows
    # from layer to layer until their logits differ by several percent.
    spreads = {"embed_tokens": 1.0, "o_proj": 0.02 / (2 * config.num_hidden_layers) ** 0.5}
    spreads["down_proj"] = spreads["o_proj"]
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, spreads.get(name.split(".")[-2], 0.02), generator=generator)
        else:
            parameter.data.fill_(1)
    # Its frequencies are no parameters, and are computed where it is made.
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    return model


def load(name: str, device: str) -> tuple[transformers.PreTrainedModel, Any]:
    """Model and tokenizer by name (`smollm2`, `8b`) or folder; end tokens of the model are never generated."""
    folder = embedded.ensure() if name in (SMOLLM2, LLAMA_8B) else name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if name == LLAMA_8B:
        model = random_llama(device)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)
    forbid(model, ends(model, tokenizer))
    return model.eval(), tokenizer


def ends(model: transformers.PreTrainedModel, tokenizer: Any) -> list[int]:
    """Tokens that end an answer."""
    found = {tokenizer.eos_token_id}
    for config in (model.config, model.generation_config):
        own = config.eos_token_id
        found |= set(own if isinstance(own, list) else [own])
    return sorted(found - {None})


def forbid(model: transformers.PreTrainedModel, tokens: list[int]) -> None:
    """Let the model never predict these tokens: a minimum length would cost each loop a pass over the logits."""

    def hook(module: torch.nn.Module, arguments: Any, logits: torch.Tensor) -> torch.Tensor:
        for token in tokens:
            logits[..., token] = NEVER
        return logits

    model.get_output_embeddings().register_forward_hook(hook)


WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "seven", "birds", "sang", "about", "rain", "and", "stone")


def prompts(tokenizer: Any, length: int, batch: int) -> list[str]:
    """Texts of 95 to 100% of `length` tokens, the first the longest; the same for the same arguments.

    Each repeats some random words, so that a trained model is sure of what follows, however its sums are rounded.
    """
    found = []
    for row in range(batch):
        generator = random.Random(f"{length} {row}")
        wanted = length if row == 0 else length - generator.randrange(max(1, length // 20))
        passage = " ".join(generator.choices(WORDS, k=40)) + ". "
        ids = tokenizer.encode(passage * (wanted // 40 + 1), add_special_tokens=False)[:wanted]
        found.append(tokenizer.decode(ids))
    return found


# --- the clock -----------------------------------------------------------------------------------------------------


class TimeUp(BaseException):
    """A cell took too long. No `Exception`, so that nobody on the way takes it for a failure of their own."""


@dataclass
class Clock:
    """What happened when, in seconds.

    Attributes:
        calls: `(time, rows, whether of a prompt)` when a call of the model begins.
        taken: `(time, row)` when a row of our own decode loop gets a token.
    """

    calls: list[tuple[float, int, bool]] = field(default_factory=list)
    taken: list[tuple[float, Any]] = field(default_factory=list)

    def figures(self) -> Row:
        """`prefill_s`, `start_s` (own loop only), `tokens` and `decode_s`, as far as they are known."""
        return self._of_tokens() if self.taken else self._of_calls()

    def _of_calls(self) -> Row:
        """transformers' loop: what one call has predicted is known when the next one begins."""
        prefill, decode, tokens = 0.0, 0.0, 0
        for (begin, rows, prompt), (end, _, next_prompt) in zip(self.calls, self.calls[1:], strict=False):
            if prompt:
                prefill += end - begin
            elif not next_prompt:
                decode += end - begin
                tokens += rows
        return {"prefill_s": prefill, "tokens": tokens, "decode_s": decode}

    def _of_tokens(self) -> Row:
        """Our loop: all prompts, then one token for each row that has not ended, and again."""
        rows: dict[Any, int] = {}
        prefill, last_first = 0.0, 0.0
        later: list[tuple[float, Any]] = []
        for when, row in self.taken:
            rows[row] = rows.get(row, 0) + 1
            if rows[row] == 1:
                prefill += when - max(begin for begin, _, prompt in self.calls if prompt and begin <= when)
                last_first = when
            else:
                later.append((when, row))
        found: Row = {"prefill_s": prefill, "tokens": 0, "decode_s": 0.0}
        if not later:
            return found
        # The first step ends where a row gets its second token of a step.
        seen: set[Any] = set()
        first = next((i for i, (_, row) in enumerate(later) if row in seen or seen.add(row)), len(later))
        found["tokens"], found["decode_s"] = len(later) - first, later[-1][0] - later[first - 1][0]
        if found["tokens"]:
            found["start_s"] = max(0.0, later[0][0] - last_first - found["decode_s"] * first / found["tokens"])
        return found


@contextmanager
def noted(model: torch.nn.Module, limit: float) -> Iterator[Clock]:
    """A clock over the model's calls and the tokens of our loop; raises `TimeUp` after `limit` seconds."""
    clock, take = Clock(), DecodedRow.take

    def before(module: torch.nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        ids = options.get("input_ids", arguments[0] if arguments else None)
        clock.calls.append((time.perf_counter(), ids.shape[0], ids.shape[1] > 1))

    def noted_take(row: Any, token: int) -> None:
        take(row, token)
        clock.taken.append((time.perf_counter(), row))  # kept: an id would come again

    def up(*_: Any) -> None:
        raise TimeUp

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    DecodedRow.take = noted_take
    previous = signal.signal(signal.SIGALRM, up)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield clock
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        DecodedRow.take = take
        handle.remove()


# --- one cell ------------------------------------------------------------------------------------------------------


def language_model(method: str, model: Any, tokenizer: Any, batch: int, options: argparse.Namespace) -> HFLM:
    common = {"pretrained": model, "tokenizer": tokenizer, "batch_size": batch, "device": options.device}
    if method == HF:
        model.set_attn_implementation("sdpa")
        return HFLM(**common)
    lm = SparseHFLM(**common, **sparse_arguments(method, options.sparsity))
    lm.warned_about_template = True  # the prompts are no questions
    return lm


def sparse_arguments(method: str, sparsity: float) -> Row:
    """Arguments of `sparse-hf`. Where a decode method reads what an eviction method has left, that is half of all."""
    if method in (HF, "dense"):
        return {}
    phases = [METHODS[name].phase for name in method.split("+") if name in METHODS]  # others are refused by name
    return {
        "method": method,
        **{
            PHASE_ARGUMENTS[phase]: KV_BESIDE_DECODE if phase == "eviction" and "decode" in phases else sparsity
            for phase in phases
        },
    }


def answer(lm: HFLM, texts: list[str], tokens: int) -> list[str]:
    requests = [
        Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": tokens}), index)
        for index, text in enumerate(texts)
    ]
    return [str(text) for text in lm.generate_until(requests, disable_tqdm=True)]


def measure(
    name: str,
    method: str,
    length: int,
    batch: int,
    loaded: tuple[Any, Any],
    warmed: dict[tuple, float],
    options: argparse.Namespace,
) -> tuple[Row, list[str] | None]:
    """One row, and the answers."""
    model, tokenizer = loaded
    tokens = options.hf_tokens if method == HF else options.tokens
    row: Row = {"model": name, "method": method, "length": length, "batch": batch, "max_gen_toks": tokens}
    row["sparsities"] = {
        key: value for key, value in sparse_arguments(method, options.sparsity).items() if key != "method"
    }
    texts, gpu = prompts(tokenizer, length, batch), options.device == "cuda"
    lm, answers, begin = None, None, time.perf_counter()
    try:
        lm = language_model(method, model, tokenizer, batch, options)
        warm = (name, method, min(length, WARM_LENGTH))
        with noted(model, options.cell_seconds):
            if warm not in warmed:
                start = time.perf_counter()
                answer(lm, prompts(tokenizer, warm[2], 1), WARM_TOKENS)
                warmed[warm] = row["warm_up_s"] = time.perf_counter() - start
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        lm = language_model(method, model, tokenizer, batch, options)  # with nothing counted yet
        with noted(model, max(1.0, options.cell_seconds - (time.perf_counter() - begin))) as clock:
            start = time.perf_counter()
            try:
                answers = answer(lm, texts, tokens)
                row["whole_s"] = time.perf_counter() - start
            except TimeUp:
                row["cut"] = f"ended after {options.cell_seconds:g} s"
        row |= with_rates(clock.figures(), row.get("whole_s"), batch, tokens, options.answer)
        if "cut" in row and not row["tokens"]:
            row["failed"] = row["cut"]
        if gpu:
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
        row |= counted(lm)
    except TimeUp:
        row["failed"] = f"the warm-up took longer than {options.cell_seconds:g} s"
    except Exception as error:
        row["failed"] = reason_of(error)
    finally:
        # A cell that was ended may have left its cache, and something may still know the object.
        if (decoder := getattr(lm, "_decoder", None)) is not None:
            decoder.release()
        lm = None
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
    return row, answers


def with_rates(figures: Row, whole_s: float | None, batch: int, tokens: int, wanted: int) -> Row:
    """Figures of a clock, tokens/s, and seconds for answers of `wanted` tokens to the whole batch."""
    figures["tokens_s"] = figures["tokens"] / figures["decode_s"] if figures["decode_s"] else None
    if whole_s is not None and figures["tokens_s"]:
        figures["answer_s"] = whole_s + (wanted - tokens) * batch / figures["tokens_s"]
    return figures


def counted(lm: HFLM) -> Row:
    """What `sparse-hf` says about its run."""
    if not isinstance(lm, SparseHFLM):
        return {"loops": {"hf": 1}}
    decode = lm.report()["phases"]["decode"]
    kept = ("loops", "loop_reasons", "backends", "executed_sparsity", "kv_memory_fraction")
    found: Row = {key: decode[key] for key in kept if decode.get(key) is not None}
    if lm.decoding.halved:
        found["halved"] = lm.decoding.halved
    return found


def same(own: list[str], other: list[str]) -> int:
    """Answers that begin alike, as far as the shorter of two goes."""
    return sum(
        longer.startswith(shorter)
        for shorter, longer in (
            sorted((a.rstrip("\ufffd"), b.rstrip("\ufffd")), key=len) for a, b in zip(own, other, strict=True)
        )
    )


# --- the run -------------------------------------------------------------------------------------------------------


def compared(rows: list[Row]) -> list[Row]:
    """Rows with `over_hf` (tokens/s) and `answer_over_hf` (whole answers), against `hf` in the same cell."""
    at = {(row["model"], row["length"], row["batch"]): row for row in rows if row["method"] == HF}
    for row in rows:
        base = at.get((row["model"], row["length"], row["batch"]), {})
        if row.get("tokens_s") and base.get("tokens_s"):
            row["over_hf"] = row["tokens_s"] / base["tokens_s"]
        if row.get("answer_s") and base.get("answer_s"):
            row["answer_over_hf"] = base["answer_s"] / row["answer_s"]
    return rows


def targets(rows: list[Row], device: str) -> list[Row]:
    """P8 for each cell of dense SmolLM2 that it speaks of: what was found, and whether it is enough."""
    return [
        {"target": "P8", "length": row["length"], "batch": row["batch"], "wanted": P8[device][row["batch"]],
         "found": row.get("over_hf"),
         "reached": None if row.get("over_hf") is None else row["over_hf"] >= P8[device][row["batch"]]}
        for row in rows
        if row["model"] == SMOLLM2 and row["method"] == "dense" and row["batch"] in P8[device]
    ]  # fmt: skip


def run(options: argparse.Namespace, save: Any) -> Row:
    """Measure; what is there is saved after each row, so that a run cut short is not lost."""
    gpu = options.device == "cuda"
    content: Row = {
        "finished": False,
        "device": {
            "name": torch.cuda.get_device_name() if gpu else processor(),
            "kind": options.device,
            "threads": torch.get_num_threads(),
        },
        "versions": {**versions(), "transformers": transformers.__version__, "lm_eval": installed("lm_eval")},
        "options": {key: getattr(options, key) for key in ("tokens", "hf_tokens", "answer", "sparsity", "methods")},
        "rows": [],
        "targets": [],
    }
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about a model object in each cell
    say(f"{content['device']['name']}, {content['device']['threads']} threads")
    begin, warmed = time.perf_counter(), {}
    for name in options.models:
        start, reason, loaded = time.perf_counter(), None, (None, None)
        try:
            loaded = load(name, options.device)
            say(f"{name} loaded in {time.perf_counter() - start:.1f} s, {loaded[0].dtype}")
        except Exception as error:
            reason = reason_of(error)
        for length, batch in cells(name, options):
            expected: list[str] | None = None
            for method in options.methods:
                over = time.perf_counter() - begin > 60 * options.minutes
                if reason is not None or over:
                    row = {"model": name, "method": method, "length": length, "batch": batch,
                           "failed": reason or f"{options.minutes:g} minutes were over"}  # fmt: skip
                else:
                    row, answers = measure(name, method, length, batch, loaded, warmed, options)
                    if method == HF:
                        expected = answers
                    elif method == "dense" and name != LLAMA_8B and None not in (expected, answers):
                        row["same_as_hf"] = [same(answers, expected), batch]
                content["rows"].append(row)
                compared(content["rows"])
                say(line(row))
                content["targets"] = targets(content["rows"], options.device)
                save(content)
        loaded = None
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
    content["seconds"] = time.perf_counter() - begin
    content["finished"] = True
    save(content)
    return content


def cells(name: str, options: argparse.Namespace) -> list[tuple[int, int]]:
    """Prompt tokens and batch sizes for a model: --lengths and --batches choose from its own, or replace them."""
    usual = CELLS[options.device].get(name, CELLS["cpu"][SMOLLM2])
    lengths = options.lengths or list(dict.fromkeys(length for length, _ in usual))
    batches = options.batches or list(dict.fromkeys(batch for _, batch in usual))
    if options.lengths is None:
        return [(length, batch) for length, batch in usual if batch in batches] or [
            (length, batch) for length in lengths for batch in batches
        ]
    return [(length, batch) for length in lengths for batch in batches]


def processor() -> str:
    try:
        names = [
            text.partition(":")[2] for text in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in text
        ]
    except OSError:
        names = []
    return names[0].strip() if names else "CPU"


def installed(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- what comes out ------------------------------------------------------------------------------------------------


def number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def line(row: Row) -> str:
    where = f"{row['model']:<8} {row['length']:>6} x {row['batch']:<2} {row['method']:<25}"
    if "failed" in row:
        return f"{where} not measured: {row['failed']}"
    return (
        f"{where} {number(row['tokens_s']):>8} tokens/s ({number(row.get('over_hf'), '.2f')}x hf), prefill "
        f"{row['prefill_s']:.2f} s, start {number(row.get('start_s'), '.2f')} s, {loops(row)}"
        + (f", {row['cut']}" if "cut" in row else "")
        + (f", same as hf: {row['same_as_hf'][0]} of {row['same_as_hf'][1]}" if "same_as_hf" in row else "")
    )


def loops(row: Row) -> str:
    return ", ".join(row.get("loops", {})) or "-"


def markdown(content: Row) -> str:
    """The tables, from the content of the JSON file."""
    device, options = content["device"], content["options"]
    known = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version)
    threads = f", {device['threads']} threads" if device["kind"] == "cpu" else ""
    lines = [
        "# Generation",
        "",
        f"{device['name']}{threads}; {known}. {options['tokens']} tokens an answer ({options['hf_tokens']} for `hf`); "
        f"methods at sparsity {options['sparsity']:g}, eviction beside a decode method at {KV_BESIDE_DECODE:g}. "
        "Made by `benchmarks/generate.py`, whose head says what the columns are.",
        "",
    ]
    if not content["finished"]:
        lines += ["**The run was cut short.**", ""]
    if content["targets"]:
        lines += ["## Targets", ""]
        lines += table(
            ["", "dense SmolLM2, tokens/s over `hf`", "found", ""],
            [
                [answer["target"],
                 f"{answer['length']} tokens, batch {answer['batch']}: at least {answer['wanted']:g}x",
                 "-" if answer["found"] is None else f"{answer['found']:.2f}x",
                 {True: "reached", False: "**missed**", None: "not measured"}[answer["reached"]]]
                for answer in content["targets"]
            ],
        )  # fmt: skip
    rows = content["rows"]
    for name in dict.fromkeys(row["model"] for row in rows):
        lines += [f"## {name}", ""]
        body = []
        for row in rows:
            if row["model"] != name or "failed" in row:
                continue
            agrees = "-" if "same_as_hf" not in row else "{} of {}".format(*row["same_as_hf"])
            peak = row.get("peak_bytes")
            body.append(
                [str(row["length"]), str(row["batch"]), row["method"],
                 number(row["tokens_s"]) + ("\\*" if "cut" in row else ""), ratio(row.get("over_hf")),
                 number(row["prefill_s"], ".2f"), number(row.get("start_s"), ".2f"),
                 number(row.get("warm_up_s"), ".1f"), number(row.get("answer_s"), ".1f"),
                 ratio(row.get("answer_over_hf")), "-" if peak is None else f"{peak / 2**30:.1f}", loops(row),
                 number(row.get("executed_sparsity"), ".3f"), agrees]
            )  # fmt: skip
        lines += table(
            ["prompt", "batch", "method", "tokens/s", "over hf", "prefill s", "start s", "warm-up s",
             f"{options['answer']} tokens, s", "over hf", "peak GiB", "loop", "keys not read", "same as hf"],
            body,
        )  # fmt: skip
    if cut := list(dict.fromkeys(row["cut"] for row in rows if "cut" in row)):
        lines += [f"\\* {'; '.join(cut)}: tokens/s of the steps until then.", ""]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        place = f"{row['model']} {row['length']} x {row['batch']}"
        for reason in [row["failed"]] if "failed" in row else row.get("loop_reasons") or []:
            if reason:
                reasons.setdefault(f"{row['method']}: {reason}", []).append(place)
        if "halved" in row:
            reasons.setdefault(f"{row['method']}: memory ran out, the batch was halved", []).append(place)
    if reasons:
        lines += ["## Not measured, or not as it should be", ""]
        lines += [*(f"- {reason} ({', '.join(places)})" for reason, places in reasons.items()), ""]
    return "\n".join(lines)


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument(
        "--models", nargs="+", help=f"{SMOLLM2}, {LLAMA_8B}, folders; default: both, on a CPU {SMOLLM2}"
    )
    parser.add_argument("--methods", nargs="+", default=list(NAMES), help="hf, dense, and what `method=` takes")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of the prompts, instead of the model's usual")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 and 8")
    parser.add_argument("--tokens", type=int, help="of an answer; default: 257, on a CPU 33")
    parser.add_argument("--hf_tokens", type=int, default=33, help="of an answer of hf, which is slow")
    parser.add_argument("--answer", type=int, default=256, help="tokens of an answer whose time is worked out")
    parser.add_argument("--threads", type=int, help="on a CPU; default: all cores")
    parser.add_argument("--cell_seconds", type=float, help="limit of a cell; default: 60, on a CPU 600")
    parser.add_argument("--minutes", type=float, help="nothing is begun after so many; default: 6, on a CPU 60")
    parser.add_argument(
        "--quick", action="store_true", help="hf, dense and quest, on the first two cells of each model"
    )
    parser.add_argument("--output", type=Path, help="folder for generate_cuda.json (or generate_cpu.json) and its .md")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the .md beside this JSON anew")
    options = parser.parse_args(arguments)
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = options.device == "cuda"
    defaults = {
        "models": ([SMOLLM2, LLAMA_8B], [SMOLLM2]),
        "tokens": (257, 33),
        "cell_seconds": (60.0, 600.0),
        "minutes": (6.0, 60.0),
    }
    for name, (on_gpu, on_cpu) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, on_gpu if gpu else on_cpu)
    if options.quick:
        options.methods = [method for method in options.methods if method in (HF, "dense", "quest")]
    if HF in options.methods:  # what the others are compared with comes first
        options.methods = [HF, *(method for method in options.methods if method != HF)]
    check_options(
        parser, options, "lengths", "batches", "answer", "threads", "cell_seconds", "minutes"
    )  # fmt: skip
    if not 0 <= options.sparsity < 1:
        parser.error(f"--sparsity {options.sparsity}: give a number from 0 to below 1")
    for method in options.methods:
        if method not in (HF, "dense"):
            try:
                parse(sparse_arguments(method, options.sparsity))
            except UserError as error:
                parser.error(f"--methods {method}: {error}")
    for name in options.models:
        if name not in (SMOLLM2, LLAMA_8B) and not Path(name).is_dir():
            parser.error(f"--models {name}: accepted are {SMOLLM2}, {LLAMA_8B} and folders with a model")
    if min(options.tokens, options.hf_tokens) < 3:
        parser.error("--tokens and --hf_tokens: give at least 3, for one step between two tokens")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.table is not None:
        if not options.table.is_file():
            print(f"--table {options.table}: there is no such file; give a JSON that --output wrote", file=sys.stderr)
            return 1
        write(options.table.with_suffix(".md"), markdown(json.loads(options.table.read_text())))
        print(f"{options.table.with_suffix('.md')} written")
        return 0
    if options.device == "cpu":
        torch.set_num_threads(options.threads or os.cpu_count() or 1)

    def save(content: Row) -> None:
        if options.output and any("failed" not in row for row in content["rows"]):
            write(options.output / f"generate_{options.device}.json", json.dumps(content, indent=1) + "\n")
            write(options.output / f"generate_{options.device}.md", markdown(content))

    content = run(options, save)
    measured = any("failed" not in row for row in content["rows"])
    if not options.output or not measured:
        print(markdown(content))
    if not measured:
        print("nothing could be measured: the reasons are above", file=sys.stderr)
        return 1
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
