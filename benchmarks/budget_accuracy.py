"""How exactly `sparsity=s` is met: every method on random, structured and real queries and keys, 4K to 32K tokens.

Blocks only, no attention output: the layouts, kept tokens and pages are counted. Real queries and keys are those
of every layer of the embedded model on a NIAH prompt (beyond 8192 tokens it reads more than it was trained for).

python benchmarks/budget_accuracy.py --output benchmarks/results/budget_accuracy
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import string
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lm_eval_sparse
from lm_eval_sparse.kernels.estimate import update_bounds
from lm_eval_sparse.kernels.types import PageBounds, RaggedKV, causal_pairs
from lm_eval_sparse.methods import METHODS, DecodeMethod, EvictionMethod, Method, PrefillMethod
from lm_eval_sparse.testing import Decoding, select

HEADS, KV_HEADS, DIM = 9, 3, 64
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
#: New tokens of a decode method: a page and a half, so that every fill of the current page occurs.
STEPS = 24


def random_states(length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(heads, length, DIM, generator=generator) for heads in (HEADS, KV_HEADS))


def structured_states(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """A few keys that every query looks at, and positions that attract near ones: verticals and slashes."""
    query, key = random_states(length, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    shared = torch.randn(DIM, generator=generator)
    query += shared
    key[:, torch.rand(length, generator=generator) < 0.01] += 2 * shared
    angles = torch.arange(length)[:, None] / 50 * torch.arange(1, 9)
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    strength = torch.rand(HEADS, 1, 1, generator=generator) * 3
    query[..., :16] += strength * waves
    key[..., :16] += 2 * waves
    return query, key


def real_states(length: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys of every layer of the embedded model on one prompt."""
    from lm_eval_sparse import patches
    from lm_eval_sparse.model.lm import SparseHFLM
    from lm_eval_sparse.runtime.session import Runtime

    patches.install()
    lm = SparseHFLM(device=device, max_length=length + 512)
    source = random.Random(length)

    def code() -> str:
        return "-".join("".join(source.choices(string.ascii_lowercase + string.digits, k=8)) for _ in range(4))

    text = " ".join(f"Stored under {code()}: {code()}." for _ in range(length // 20))
    ids = torch.tensor([lm.tok_encode(text)[:length]], device=device)
    seen: list[tuple[Tensor, Tensor]] = []
    attend = Runtime.attend

    def noted(self: Runtime, module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((query[0].float(), key[0].float()))
        return attend(self, module, query, key, *args, **kwargs)

    Runtime.attend = noted
    try:
        lm.forward(ids, cache=None, keep=1)
    finally:
        Runtime.attend = attend
    yield from seen


def measured(method: Method, query: Tensor, key: Tensor, sparsity: float) -> tuple[float, float, float]:
    """Measured sparsity, over all heads, and its smallest and largest value over heads."""
    heads, length, dim = query.shape
    kv_heads = key.shape[0]
    if isinstance(method, PrefillMethod):
        selection = select(method, query, key, scale=dim**-0.5, softcap=None, sparsity=sparsity)
        found = 1 - selection.executed_pairs().double() / causal_pairs(length)
    elif isinstance(method, EvictionMethod):
        selection = select(method, query, key, scale=dim**-0.5, softcap=None, sparsity=sparsity)
        found = 1 - selection.counts.double() / length
    else:
        assert isinstance(method, DecodeMethod)
        flat, starts = key.reshape(-1, dim), [head * length for head in range(kv_heads)]
        kv = RaggedKV.of(flat, flat, starts, [length] * kv_heads)
        bounds = PageBounds.empty([-(-length // method.page_size)] * kv_heads, flat, method.page_size)
        update_bounds(kv, bounds, torch.zeros_like(kv.lengths))
        context = Decoding(kv, torch.tensor([length], device=key.device), bounds, kv_heads)
        grouped = query[:, -STEPS:].reshape(kv_heads, heads // kv_heads, STEPS, dim)
        keys_read = select(method, grouped, context, sparsity=sparsity).keys_read(kv)
        found = 1 - keys_read.double().sum(-1).flatten() / kv.visible(STEPS)[0].sum()
    return float(found.mean()), float(found.min()), float(found.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--states", nargs="+", default=["random", "structured", "real"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", required=True, help="path without suffix: .json and .md are written")
    options = parser.parse_args()

    methods = [cls() for cls in METHODS.values() if cls.name != "dense"]
    rows: list[dict[str, Any]] = []
    for length in options.length:
        for states in options.states:
            if states == "real":
                layers = list(real_states(length, options.device))
            else:
                make = random_states if states == "random" else structured_states
                layers = [tuple(part.to(options.device) for part in make(length, length + seed)) for seed in range(3)]
            for method in methods:
                for sparsity in SPARSITIES:
                    begin = time.perf_counter()
                    found = [measured(method, query, key, sparsity) for query, key in layers]
                    rows.append(
                        {
                            "length": length,
                            "states": states,
                            "method": method.name,
                            "requested": sparsity,
                            "layers": len(layers),
                            "mean": sum(mean for mean, _, _ in found) / len(found),
                            "furthest": max((mean for mean, _, _ in found), key=lambda mean: abs(mean - sparsity)),
                            "head_min": min(low for _, low, _ in found),
                            "head_max": max(high for _, _, high in found),
                            "seconds": time.perf_counter() - begin,
                        }
                    )
                    figures = " ".join(f"{rows[-1][name]:.4f}" for name in ("mean", "furthest", "head_min", "head_max"))
                    print(f"{length} {states} {method.name} {sparsity}: {figures}", flush=True)
    place = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "lm_eval_sparse": lm_eval_sparse.__version__}
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"device": place, "versions": versions, "rows": rows}, indent=1))
    path.with_suffix(".md").write_text(table(rows, place, versions))


def table(rows: list[dict[str, Any]], place: str, versions: dict[str, str]) -> str:
    """Markdown: for each method and length the largest distance to the request, and the spread over heads."""
    cells: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["method"], row["length"], row["states"]].append(row)
    lines = [
        "# How exactly `sparsity=s` is met",
        "",
        f"Blocks only, {place}, torch {versions['torch']}; shape of SmolLM2-135M ({HEADS} query heads, {KV_HEADS} "
        f"KV heads, {DIM} dimensions); s = {', '.join(map(str, SPARSITIES))}. Largest distance of any layer's measured "
        "sparsity to s, and in brackets the widest range of the sparsity over the heads of all layers (0 for uniform "
        "budgets).",
        "",
    ]
    columns = sorted({(row["length"], row["states"]) for row in rows})
    lines.append("| method | " + " | ".join(f"{length // 1024}K {states}" for length, states in columns) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")
    for method in dict.fromkeys(row["method"] for row in rows):
        parts = []
        for length, states in columns:
            found = cells[method, length, states]
            off = max(abs(row["furthest"] - row["requested"]) for row in found)
            spread = max(row["head_max"] - row["head_min"] for row in found)
            parts.append(f"{off:.4f} ({spread:.2f})")
        lines.append(f"| {method} | " + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
