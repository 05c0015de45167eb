"""Every causal family against lm-eval's `hf`: which phases come out right, and what is refused.

`examine` compares one tiny model; `python -m tests.family_sweep` goes through all of transformers' and writes
docs/models.md. A family is right when dense answers equal those of `hf` and every phase under a method that selects
everything equals dense; what is refused must say so before the first prompt. Nothing may be wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import re
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels.types import Blocks, Keep, Reads
from lm_eval_sparse.methods import METHODS, Call, DecodeMethod, EvictionMethod, PrefillMethod
from lm_eval_sparse.model.lm import SparseHFLM
from tests import families

#: Tokens of a prompt: more than any window or chunk of the tiny models.
LENGTH, ANSWER = 203, 6
#: How far log-likelihoods of answers may be off in fp32.
NEAR = 2e-3
PHASES = ("dense", "prefill", "eviction", "decode")
WORDS = [f"w{number}" for number in range(families.VOCABULARY - 8)]


class AllBlocks(PrefillMethod):
    """Every key block that a query block may see."""

    name, unit, importance, allocation, kv, reference = "all_blocks", "blocks", "-", "-", "full cache", "-"

    def select(self, call: Call) -> Blocks:
        query = call.query
        heads, length, _ = query.shape
        wanted = torch.ones(-(-length // 16), -(-length // 16), dtype=torch.bool, device=query.device).tril()
        return Blocks.from_mask(wanted.expand(heads, -1, -1), length, 16, 16)


class AllTokens(EvictionMethod):
    """Every token of the prompt."""

    name, unit, importance, allocation, kv, reference = "all_tokens", "tokens", "-", "-", "evicted", "-"

    def select(self, call: Call) -> Keep:
        key = call.key
        heads, length, _ = key.shape
        ids = torch.arange(length, device=key.device).expand(heads, -1)
        return Keep(ids, torch.full((heads,), length, device=key.device), heads * length)


class AllPages(DecodeMethod):
    """Every page of the cache."""

    name, unit, importance, allocation, kv, reference = "all_pages", "pages", "-", "-", "full cache", "-"
    page_size = 16

    def select(self, call: Call) -> Reads:
        query, kv = call.query, call.cache.kv
        visible = kv.visible(query.shape[2])
        width = max(1, -(-kv.longest // 16))
        pages = torch.arange(width, dtype=torch.int32, device=query.device).expand(*visible.shape, -1)
        counts = ((visible + 15) // 16).clamp(min=1).int()
        return Reads(pages[:, None].contiguous(), counts[:, None].contiguous(), 16)


EVERYTHING = {"prefill": AllBlocks, "eviction": AllTokens, "decode": AllPages}


@contextlib.contextmanager
def everything() -> Iterator[None]:
    """Inside the block the methods that select everything can be named."""
    for cls in EVERYTHING.values():
        METHODS.add(cls)
    try:
        yield
    finally:
        for cls in EVERYTHING.values():
            METHODS.discard(cls.name)


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, one token each."""
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def pair(seed: int) -> tuple[str, str]:
    """A prompt and an answer."""
    words = random.Random(seed).choices(WORDS[: families.VOCABULARY - 80], k=LENGTH + ANSWER)
    return " ".join(words[:LENGTH]), " " + " ".join(words[LENGTH:])


@dataclass
class Answers:
    """What a model says: log-likelihoods of answers, and a generated text."""

    scored: list[tuple[float, bool]]
    generated: str

    def differs(self, other: Answers) -> str | None:
        """How these differ from others, or None."""
        for (mine, hit), (theirs, their_hit) in zip(self.scored, other.scored, strict=True):
            if not abs(mine - theirs) <= NEAR * max(1.0, abs(theirs)) or hit != their_hit:
                return f"log-likelihood {mine:.4f}, not {theirs:.4f}"
        return None if self.generated == other.generated else f"text {self.generated!r}, not {other.generated!r}"


def scored(lm: Any) -> list[tuple[float, bool]]:
    """Log-likelihoods and greedy hits of two answers."""
    requests = [Instance("loglikelihood", {}, pair(seed), seed, ("t", seed, 1)) for seed in (1, 2)]
    return [(float(value), bool(hit)) for value, hit in lm.loglikelihood(requests, disable_tqdm=True)]


def generated(lm: Any) -> str:
    """The greedy continuation of a prompt."""
    options = {"until": ["w0 w0"], "max_gen_toks": ANSWER, "do_sample": False}
    request = Instance("generate_until", {}, (pair(3)[0], options), 0, ("t", 0, 1))
    return str(lm.generate_until([request], disable_tqdm=True)[0])


def answers(lm: Any) -> Answers:
    return Answers(scored(lm), generated(lm))


@dataclass
class Family:
    """What was found of one model type.

    Attributes:
        built: why no tiny model of it could be built, or None.
        phases: phase -> `right`, `refused: …`, or `WRONG: …`.
        layers: what its layers are, as the results tell.
    """

    name: str
    kind: str
    built: str | None = None
    phases: dict[str, str] = field(default_factory=dict)
    layers: str = ""
    seconds: float = 0.0


def examine(name: str, phases: tuple[str, ...] = PHASES, **options: Any) -> Family:
    """Build a tiny model of a type, and compare it with `hf`: densely, and in every phase selecting everything."""
    found = Family(name, families.kind(name))
    start = time.perf_counter()
    try:
        model = families.build(name, **(families.as_decoder(name) or {}), **options)
    except families.NotBuildable as error:
        found.built = str(error)
        return found
    model.generation_config.eos_token_id = None  # random models end at once otherwise
    try:
        wanted: Answers | str = answers(HFLM(pretrained=model, tokenizer=tokenizer(), device="cpu", batch_size=1))
    except Exception as error:
        wanted = f"hf does not run it either ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    dense: Answers | None = None
    with everything():
        for phase in phases:
            method = "dense" if phase == "dense" else EVERYTHING[phase].name
            found.phases[phase], made = _phase(model, method, wanted if phase == "dense" else dense, found)
            if phase == "dense":
                dense = made
                if made is None:
                    found.phases |= dict.fromkeys(phases[1:], found.phases["dense"])
                    break
    found.seconds = time.perf_counter() - start
    return found


def _phase(model: PreTrainedModel, method: str, wanted: Any, found: Family) -> tuple[str, Answers | None]:
    """`right`, `refused: …` or `WRONG: …` for one method, and the answers."""
    try:
        lm = SparseHFLM(pretrained=model, tokenizer=tokenizer(), device="cpu", batch_size=1, method=method)
    except UserError as error:
        return f"refused: {error}", None
    if method == "dense":
        found.layers = "; ".join(dict.fromkeys(str(reason) for reason in lm.report()["layers"]["untouched"].values()))
    notes = []
    try:
        text = generated(lm)
    except UserError as error:
        return f"WRONG: refused late: {error}", None
    try:
        made = Answers(scored(lm), text)
    except UserError as error:  # recurrent states: answers are scored in one pass with their context
        if not isinstance(wanted, Answers):
            return f"refused: {error}", None
        notes.append("generated tasks only")
        made = Answers(wanted.scored, text)
    if isinstance(wanted, str):
        return f"WRONG: runs, but {wanted}", made
    if (how := made.differs(wanted)) is not None:
        return f"WRONG: {how}", made
    return ", ".join(["right", *notes]), made


# --- the table -------------------------------------------------------------------------------------------------


def table(found: list[Family]) -> str:
    """docs/models.md."""
    decoders = [family for family in found if family.built is None]
    lines = [
        "# Model families",
        "",
        "<!-- Made by `python -m tests.family_sweep`; do not edit. -->",
        "",
        f"Every entry of transformers {transformers.__version__}'s mapping of causal language models, as a tiny "
        f"random model, {LENGTH} tokens, more than its windows and chunks, on a CPU in fp32. **dense**: "
        "log-likelihoods and greedy text equal those of lm-eval's `hf`. **prefill, eviction, decode**: a method of "
        "that phase which selects everything equals dense. Where a cell says no, the run is refused in one line before "
        "its first prompt; the "
        "reasons stand below. *gen*: generated tasks only, since a recurrent state cannot go back to the end of a "
        "context.",
        "",
        f"{len(decoders)} of {len(found)} entries can be built: "
        + ", ".join(
            f"{sum(f.phases[phase].startswith('right') for f in decoders)} right {phase}"
            if phase == "dense"
            else f"{sum(f.phases[phase].startswith('right') for f in decoders)} under {phase} methods"
            for phase in PHASES
        )
        + f"; {sum(state.startswith('WRONG') for f in decoders for state in f.phases.values())} wrong.",
        "",
        "| model type | dense | prefill | eviction | decode | layers left as they are |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    short = {"right": "yes", "right, generated tasks only": "gen"}
    reasons: dict[str, list[str]] = {}
    for family in decoders:
        cells = []
        for phase in PHASES:
            state = family.phases[phase]
            cells.append(short.get(state, "no" if state.startswith("refused") else "**WRONG**"))
        for phase in PHASES:
            state = family.phases[phase]
            if state not in short:
                reasons.setdefault(_reason(state), []).append(f"{family.name}" if phase == "dense" else family.name)
        lines.append(f"| {family.name} | {' | '.join(cells)} | {family.layers} |")
    lines += ["", "## Why not", ""]
    for reason, names in sorted(reasons.items(), key=lambda item: -len(set(item[1]))):
        lines.append(f"- {reason}: {', '.join(dict.fromkeys(names))}")
    missing = [family for family in found if family.built is not None]
    lines += ["", "## Not built", ""]
    lines += [f"- {family.name} ({family.kind}): {family.built}" for family in missing]
    return "\n".join(lines) + "\n"


def _reason(state: str) -> str:
    """What is the same in the messages of all models that are refused for one reason."""
    kind, _, text = state.partition(": ")
    for before in (
        "; type method=dense",
        "; use --model hf",
        ": use --model hf",
        "; sparse-hf evaluates",
        ": sparse-hf",
    ):
        text = text.split(before)[0]
    text = re.sub(r"^(the given model|pretrained='\S*')( \(\S+\))? (cannot be evaluated( as asked)?: )?", "", text)
    text = re.sub(r"all_\w+ cannot be applied to it: ", "", text)
    text = re.sub(r"does not run here \((.*?)\)?$", r"\1", text)
    text = re.sub(r"^\w+ (of layer \d+ is handed)", r"its attention \1", text)
    text = re.sub(r"^\w+ uses ('\w+'.*) in its attention, which.*", r"its attention is given \1", text)
    text = re.sub(r"\b(in|of|to) layer -?\d+\b", r"\1 some layer", re.sub(r"^layer \d+", "a layer", text))
    text = re.sub(r" \((\w|-)+\)$", "", text)
    return (kind + ": " if kind == "WRONG" else "") + text


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare every causal family with hf; write docs/models.md.")
    parser.add_argument("names", nargs="*", help="model types; all by default")
    parser.add_argument("--output", type=Path, help="where to write the table; by default docs/models.md, for all")
    parser.add_argument("--log", type=Path, help="a JSON line for each family; those that are there are not run again")
    parser.add_argument("--seconds", type=int, default=120, help="the most that one family may take")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {given.seconds} s")

    signal.signal(signal.SIGALRM, stop)
    done = {}
    if given.log and given.log.exists():
        done = {row["name"]: Family(**row) for row in map(json.loads, given.log.read_text().splitlines())}
    found = []
    for name in given.names or families.names():
        if name not in done:
            signal.alarm(given.seconds)
            try:
                done[name] = examine(name)
            except Exception as error:
                state = f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                done[name] = Family(name, families.kind(name), None, dict.fromkeys(PHASES, state))
            finally:
                signal.alarm(0)
            if given.log:
                with given.log.open("a") as log:
                    log.write(json.dumps(asdict(done[name])) + "\n")
        found.append(done[name])
        row = found[-1]
        print(
            f"{name:24} {row.built or ''} " + " | ".join(row.phases.values())[:600], f"{row.seconds:.1f} s", flush=True
        )
    if given.output or not given.names:
        (given.output or Path(__file__).parents[1] / "docs" / "models.md").write_text(table(found))


if __name__ == "__main__":
    main()
