"""Golden records: what every method selects, scores, answers and measures, so that a rewrite can be held against them.

    python benchmarks/golden.py record --models tiny embedded --output before.json --lists before
    python benchmarks/golden.py record --models tiny embedded --output after.json --lists after
    python benchmarks/golden.py compare before.json after.json --lists before after
    python benchmarks/golden.py time --models Qwen=FOLDER --output times.json

`record` keeps for each model, configuration and phase a hash of every selection (with `--lists` the lists themselves),
log-probabilities and answers to the last digit, and the figures of the results. `compare` says what differs: bit-equal
is what is hoped for; where a solver was replaced it gives the overlap of what is selected. `time` measures prefill,
decoding behind a long prompt and generation once; alternating runs of two checkouts are for the caller to make
(`--merge` makes a table of them).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import tiny
import torch
import transformers
from lm_eval.api.instance import Instance

from lm_eval_sparse import patches
from lm_eval_sparse.kernels.types import Blocks
from lm_eval_sparse.methods import METHODS
from lm_eval_sparse.model.lm import SparseHFLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Configurations of tiny models: sparsities that a few hundred tokens allow, and native knobs.
TINY: dict[str, dict[str, Any]] = {
    "dense": {},
    "vertical_slash": {"method": "vertical_slash", "sparsity": 0.5},
    "vertical_slash native": {"method": "vertical_slash", "verticals": 24, "slashes": 20, "window": 32, "tile": 16},
    "flexprefill": {"method": "flexprefill", "sparsity": 0.5},
    "flexprefill native": {"method": "flexprefill", "gamma": 0.6, "min_budget": 16, "block_size": 16},
    "flexprefill aware": {"method": "flexprefill", "gamma": 0.6, "min_budget": 16, "block_size": 16, "tau": 0.9},
    "flexprefill_vs": {"method": "flexprefill_vs", "sparsity": 0.5},
    "flexprefill_vs native": {"method": "flexprefill_vs", "alpha": 0.5, "min_budget": 8, "tile": 16, "near": 8},
    "block_sparse": {"method": "block_sparse", "sparsity": 0.6},
    "block_sparse native": {"method": "block_sparse", "top_k": 4, "subdiagonal": True, "backend": "gather"},
    "snapkv": {"method": "snapkv", "sparsity": 0.7},
    "snapkv native": {"method": "snapkv", "capacity": 48, "window": 16, "sinks": 2, "local": 8},
    "ada_snapkv": {"method": "ada_snapkv", "sparsity": 0.7},
    "quest": {"method": "quest", "sparsity": 0.7},
    "quest own": {"method": "quest", "budget": 48, "page_size": 8, "share_pages": False},
    "three phases": {"method": "flexprefill+ada_snapkv+quest", "prefill_sparsity": 0.5, "kv_sparsity": 0.4,
                     "decode_sparsity": 0.7, "page_size": 8},
    "two phases": {"method": "block_sparse+snapkv", "sparsity": 0.5, "stats": "full"},
}  # fmt: skip
FAMILIES = ("llama", "qwen2", "gemma2", "gemma3", "phi3", "gpt2", "lfm2", "deepseek_v3")
#: Models that take methods of the prefill only, and those among them that answer in one pass.
PREFILL_ONLY = ("lfm2", "deepseek_v3")
ONE_PASS = ("lfm2",)

#: Configurations of real models.
REAL: dict[str, dict[str, Any]] = {
    "dense": {},
    **{f"{name} {s}": {"method": name, "sparsity": s} for name in METHODS if name != "dense" for s in (0.8, 0.95)},
    "quest own": {"method": "quest", "sparsity": 0.8, "share_pages": False},
    "three phases": {"method": "flexprefill+ada_snapkv+quest", "prefill_sparsity": 0.8, "kv_sparsity": 0.5,
                     "decode_sparsity": 0.9},
}  # fmt: skip
PRESET = {
    f"{name} paper": {"method": name, "sparsity": 0.9, "preset": "paper"}
    for name in ("vertical_slash", "flexprefill_vs", "block_sparse", "snapkv", "ada_snapkv", "quest")
}


class Watch:
    """Takes down every selection that methods make while it is on."""

    def __init__(self) -> None:
        self.lists: list[list[np.ndarray]] = []
        self.names: list[str] = []
        self.on = False
        for owner in {base for cls in METHODS.values() for base in cls.__mro__ if "select" in vars(base)}:
            self._wrap(owner)

    def _wrap(self, cls: type) -> None:
        select = cls.select

        def watched(method: Any, *args: Any, **kwargs: Any) -> Any:
            found = select(method, *args, **kwargs)
            if self.on:
                self.names.append(method.name)
                self.lists.append(lists_of(found))
            return found

        cls.select = watched


def lists_of(selection: Any) -> list[np.ndarray]:
    """The lists of a selection, what lies behind their ends set to -1."""
    if isinstance(selection, Blocks):
        parts = [(selection.indices, selection.counts)]
        if selection.columns is not None:
            parts.append((selection.columns, selection.column_counts))
    else:
        parts = [(selection.ids, selection.counts)]
    found = []
    for ids, counts in parts:
        if ids.dim() == 3 and ids.shape[1] == 1 < counts.shape[1]:  # one list of columns, and how far each row reads
            counts = counts[:, -1:]
        valid = torch.arange(ids.shape[-1], device=ids.device) < counts[..., None]
        listed = torch.where(valid, ids, -1)[..., : max(1, int(counts.max()))]
        found.append(listed.to(torch.int32).cpu().numpy())
    return found


def hashed(lists: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in lists:
        digest.update(str(part.shape).encode() + np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def digest(figures: dict[str, Any]) -> str:
    """What an answer says of its sparsity, as a hash."""
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()[:16]


def load(name: str, options: dict[str, Any]) -> SparseHFLM:
    """`tiny:FAMILY`, `embedded`, or `NAME=FOLDER`."""
    if name.startswith("tiny:"):
        model = tiny.family(name[5:]).to(DEVICE)
        return SparseHFLM(pretrained=model, tokenizer=tiny.tiny_tokenizer(), device=DEVICE, batch_size=2, **options)
    given = {} if name == "embedded" else {"pretrained": name.partition("=")[2]}
    return SparseHFLM(**given, device=DEVICE, dtype="bfloat16", batch_size=2, **options)


def text(tokens: int, seed: int, lm: SparseHFLM) -> str:
    """Words that come to just under so many tokens."""
    words = tiny.words(seed, 2 * tokens).split(" ")
    low, high = 1, len(words)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(lm.tok_encode(" ".join(words[:middle]))) <= tokens else (low, middle)
    return " ".join(words[:low])


def requests(lm: SparseHFLM, lengths: list[int], answer: int) -> tuple[list[Instance], list[Instance]]:
    scored, generated = [], []
    for seed, length in enumerate(lengths):
        prompt = text(length, seed, lm)
        for number, words in enumerate((1, 5)):
            pair = (prompt, " " + tiny.words(50 + seed, words))
            scored.append(Instance("loglikelihood", {}, pair, number, metadata=("golden", seed, 1)))
        options = {"until": [], "max_gen_toks": answer, "do_sample": False}
        generated.append(Instance("generate_until", {}, (prompt, options), 0, metadata=("golden", seed, 1)))
    return scored, generated


def record(name: str, options: dict[str, Any], lengths: list[int], answer: int, watch: Watch) -> dict[str, Any]:
    """Everything that one configuration gives."""
    lm = load(name, {**options, "debug": True} if DEVICE == "cuda" and "method" in options else options)
    scored, generated = requests(lm, lengths, answer)
    watch.lists, watch.names, watch.on = [], [], True
    try:
        found = lm.loglikelihood(scored, disable_tqdm=True)
        texts = [] if name[5:] in ONE_PASS else lm.generate_until(generated, disable_tqdm=True)
    finally:
        watch.on = False
    report = lm.report()
    figures = {key: report[key] for key in ("phases", "prompts", "layers", "knobs") if key in report}
    return {
        "selections": [f"{name} {hashed(lists)}" for name, lists in zip(watch.names, watch.lists, strict=True)],
        "scores": [[float(logprob), bool(greedy)] for logprob, greedy in found],
        "answers": [str(text) for text in texts],
        "stats": [digest({key: value for key, value in one.stats.items() if key != "run"}) for one in [*found, *texts]],
        "figures": json.loads(json.dumps(figures)),
    }


def file_name(key: str) -> str:
    """The file of a record's lists."""
    return f"{key.replace(' ', '_').replace('|', '-').replace('/', '_')}.npz"


def cases(models: list[str], lengths: list[int]) -> list[tuple[str, str, dict[str, Any], list[int], int]]:
    found = []
    for model in models:
        if model == "tiny":
            for family in FAMILIES:
                for label, options in TINY.items():
                    phases = {METHODS[part].phase for part in options.get("method", "dense").split("+")}
                    if family not in PREFILL_ONLY or phases <= {"prefill", "any"}:
                        found.append((f"tiny:{family}", label, options, [331, 200], 10))
        else:
            every = {**REAL, **(PRESET if max(lengths) > 14746 else {})}
            for label, options in every.items():
                own = [max(lengths)] if "paper" in label else lengths
                found.append((model, label, options, own, 24))
    return found


def record_all(options: argparse.Namespace) -> None:
    watch, records = Watch(), {}
    for model, label, configuration, lengths, answer in cases(options.models, options.lengths):
        start = time.perf_counter()
        key = f"{model.partition('=')[0]} | {label}"
        records[key] = record(model, configuration, lengths, answer, watch)
        if options.lists:
            options.lists.mkdir(parents=True, exist_ok=True)
            flat = {f"{i}_{j}": part for i, parts in enumerate(watch.lists) for j, part in enumerate(parts)}
            np.savez_compressed(options.lists / file_name(key), **flat)
        print(f"{key}: {time.perf_counter() - start:.1f} s", flush=True)
        options.output.write_text(json.dumps({"about": about(), "records": records}, indent=1))


def about() -> dict[str, str]:
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version()}  # fmt: skip


def overlap(left: Path, right: Path, calls: list[int]) -> float:
    """The least share of what a selection of `left` lists that the same one of `right` lists too, over these calls."""
    with np.load(left) as before, np.load(right) as after:
        least = 1.0
        for call in calls:
            for part in range(2):
                key = f"{call}_{part}"
                if key not in before:
                    continue
                a, b = before[key], after[key]
                rows = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
                same = whole = 0
                for x, y in rows:
                    x, y = set(x[x >= 0].tolist()), set(y[y >= 0].tolist())
                    same, whole = same + len(x & y), whole + max(len(x), len(y))
                least = min(least, same / max(1, whole))
    return least


def compare(options: argparse.Namespace) -> None:
    before, after = (json.loads(path.read_text())["records"] for path in options.files)
    if missing := sorted(before.keys() ^ after.keys()):
        print(f"only in one of both: {', '.join(missing)}")
    equal, differing = 0, 0
    for key in sorted(before.keys() & after.keys()):
        old, new = before[key], after[key]
        parts = [part for part in old if old[part] != new[part]]
        if not parts:
            equal += 1
            continue
        differing += 1
        words = ", ".join(parts)
        if "selections" in parts:
            calls = [i for i, (a, b) in enumerate(zip(old["selections"], new["selections"], strict=False)) if a != b]
            words += f"; {len(calls)} of {len(old['selections'])} selections ({len(new['selections'])} now)"
            if options.lists and len(old["selections"]) == len(new["selections"]):
                name = file_name(key)
                words += f", overlap at least {overlap(options.lists[0] / name, options.lists[1] / name, calls):.4f}"
        if "scores" in parts:
            off = max(abs(a[0] - b[0]) for a, b in zip(old["scores"], new["scores"], strict=True))
            words += f"; log-probabilities up to {off:.3g} off"
        if "figures" in parts:
            words += "; figures: " + ", ".join(different(old["figures"], new["figures"])[:4])
        print(f"{key}: {words}")
    print(f"{equal} of {equal + differing} records are equal to the bit")
    sys.exit(1 if differing or missing else 0)


def different(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two records of figures differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in sorted({*old, *new}) for line in different(old.get(key), new.get(key), f"{path}/{key}")]
    return [] if old == new else [f"{path} {old} -> {new}"]


# --- time -------------------------------------------------------------------------------------------------------------

TIMED: dict[str, dict[str, Any]] = {
    "dense": {},
    **{name: {"method": name, "sparsity": 0.9} for name in ("vertical_slash", "flexprefill", "flexprefill_vs",
                                                            "block_sparse", "ada_snapkv", "quest")},
}  # fmt: skip


def synchronized() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def once(lm: SparseHFLM, tokens: int, answer: int, rows: int) -> float:
    """Seconds to answer `rows` prompts of so many tokens with so many."""
    some = min(20000, len(lm.tokenizer))
    ids = torch.randint(10, some, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = lm.tok_decode(ids)
    options = {"until": [], "max_gen_toks": answer, "do_sample": False, "min_new_tokens": answer}
    prompts = [lm.tok_decode(lm.tok_encode(prompt)[: tokens - 8 - row]) for row in range(rows)]
    wanted = [Instance("generate_until", {}, (one, options), 0, metadata=("t", 0, 1)) for one in prompts]
    start = synchronized()
    lm.generate_until(wanted, disable_tqdm=True)
    return synchronized() - start


def time_all(options: argparse.Namespace) -> None:
    found: dict[str, float] = {}
    for model in options.models:
        name, _, folder = model.partition("=")
        tokens = options.tokens
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        for label in options.configurations:
            configuration = TIMED[label]
            given = {"max_length": tokens + 512, "batch_size": 8, "device": DEVICE, **configuration}
            lm = SparseHFLM(pretrained=loaded, tokenizer=tokenizer, **given)
            once(lm, 4200, 4, 1)  # kernels are compiled
            once(lm, tokens, 4, 1)
            first = min(once(lm, tokens, 1, 1) for _ in range(2))
            found[f"{name}, {label}: prefill of {tokens} tokens, s"] = first
            found[f"{name}, {label}: step behind {tokens} tokens, ms"] = (once(lm, tokens, 129, 1) - first) / 128 * 1e3
            once(lm, 4200, 9, 8)
            found[f"{name}, {label}: 8 answers of 65 tokens to 4200, s"] = min(once(lm, 4200, 65, 8) for _ in range(2))
            print(name, {key: round(value, 4) for key, value in list(found.items())[-3:]}, flush=True)
            del lm
        options.output.write_text(json.dumps({"about": about(), "times": found}, indent=1))


def merge(options: argparse.Namespace) -> None:
    """A table of medians: files whose names begin with `before`, and with `after`."""
    runs: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    told: dict[str, str] = {}
    for path in options.files:
        content = json.loads(path.read_text())
        told = content["about"]
        runs["before" if path.name.startswith("before") else "after"].append(content["times"])
    lines = ["| | before | after | after / before |", "|---|---:|---:|---:|"]
    for key in runs["before"][0]:
        old, new = (statistics.median(run[key] for run in runs[side] if key in run) for side in ("before", "after"))
        lines.append(f"| {key} | {old:.4g} | {new:.4g} | {new / old:.3f} |")
    words = ", ".join(f"{name} {value}" for name, value in told.items())
    options.output.write_text(
        f"Medians of {len(runs['before'])} and {len(runs['after'])} alternating runs; {words}.\n\n"
        + "\n".join(lines) + "\n"
    )  # fmt: skip
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record")
    recording.add_argument("--models", nargs="+", default=["tiny", "embedded"], help="tiny, embedded or NAME=FOLDER")
    recording.add_argument("--lengths", type=int, nargs="+", default=[4096], help="prompts of real models, in tokens")
    recording.add_argument("--output", type=Path, required=True)
    recording.add_argument("--lists", type=Path, help="a folder for the lists themselves")
    recording.set_defaults(run=record_all)
    comparing = commands.add_parser("compare")
    comparing.add_argument("files", type=Path, nargs=2)
    comparing.add_argument("--lists", type=Path, nargs=2)
    comparing.set_defaults(run=compare)
    timing = commands.add_parser("time")
    timing.add_argument("--models", nargs="+", required=True, help="NAME=FOLDER")
    timing.add_argument("--tokens", type=int, default=36 * 1024)
    timing.add_argument("--configurations", nargs="+", choices=TIMED, default=list(TIMED))
    timing.add_argument("--output", type=Path, required=True)
    timing.set_defaults(run=time_all)
    merging = commands.add_parser("merge")
    merging.add_argument("files", type=Path, nargs="+")
    merging.add_argument("--output", type=Path, required=True)
    merging.set_defaults(run=merge)
    patches.install()
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
