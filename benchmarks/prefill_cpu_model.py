"""Sparse prefill of the embedded model on a CPU: attention of one layer against SDPA, and the model's prefill.

    python benchmarks/prefill_cpu_model.py --output benchmarks/results     # 8K tokens, sparsity 0.9, 2 threads

The prompt is this repository's own text. Attention is that of one layer, on the queries, keys and values that the model
computes there. The model's prefill is one request for one token through lm-eval's `hf` (transformers' SDPA) and through
`sparse-hf`, tokenizing included. Medians of several calls after one that warms up and compiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from prefill import build, executed_pairs, relative_error, write
from prefill_backends import processor
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lm_eval_sparse.kernels.prefill import block_sparse_prefill
from lm_eval_sparse.kernels.types import causal_pairs
from lm_eval_sparse.methods import METHODS
from lm_eval_sparse.model import embedded
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.testing import select as select_by

METHOD_NAMES = ("flexprefill", "block_sparse/64", "block_sparse", "vertical_slash")


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median of `repeats` calls after one more."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def prompt(tokenizer: Any, tokens: int) -> str:
    """Text of about `tokens` tokens: the repository's documentation, then its sources."""
    root = Path(__file__).parents[1]
    files = [*sorted(root.glob("*.md")), *sorted((root / "docs").glob("*.md")), *sorted(root.glob("*/*.py"))]
    text = "\n\n".join(path.read_text() for path in files)
    ids = tokenizer.encode(text[: 12 * tokens])[:tokens]
    if len(ids) < tokens:
        raise ValueError(f"the repository's text has {len(ids)} tokens, {tokens} are needed: give a smaller --length")
    return tokenizer.decode(ids)


def states_of(lm: HFLM, text: str, layer: int) -> list[Tensor]:
    """Query `(H, L, D)`, key and value `(H_kv, L, D)` of one layer, after rotary embedding."""
    found: list[Tensor] = []

    def capture(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        if module.layer_idx == layer:
            found[:] = [query[0].clone(), key[0].clone(), value[0].clone()]
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("noted_sdpa", capture)
    lm.model.set_attn_implementation("noted_sdpa")
    try:
        lm.generate_until([request(text)], disable_tqdm=True)
    finally:
        lm.model.set_attn_implementation("sdpa")
    return found


def request(text: str) -> Instance:
    settings = {"until": [], "max_gen_toks": 1, "do_sample": False}
    return Instance("generate_until", {}, (text, settings), 0, metadata=("prefill", 0, 1))


@torch.no_grad()
def measure_attention(states: list[Tensor], options: argparse.Namespace) -> dict[str, Any]:
    query, key, value = states
    heads, length, dim = query.shape
    scale = dim**-0.5

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=len(query) != len(key)
        )[0]

    dense_s = seconds(dense, options.repeats)
    print(f"attention, {length} tokens: SDPA {1e3 * dense_s:.1f} ms", flush=True)
    rows = []
    for name in options.methods:
        method = build(name)
        row: dict[str, Any] = {"method": name}
        rows.append(row)
        if (reason := method.too_short(options.sparsity, length)) is not None:
            row["failed"] = reason
            continue

        def select(method: Any = method) -> Any:
            return select_by(method, query, key, scale=scale, softcap=None, sparsity=options.sparsity)

        def whole(select: Callable[[], Any] = select) -> Tensor:
            return block_sparse_prefill(query, key, value, select(), scale=scale, backend=options.backend)[0]

        layout = select()
        out, row["backend"] = block_sparse_prefill(query, key, value, layout, scale=scale, backend=options.backend)
        row |= {
            "block": layout.block_q,
            "measured_sparsity": 1 - executed_pairs(layout) / heads / causal_pairs(length),
            "relative_error": relative_error(out, query, key, value, layout, scale),
            "select_ms": 1e3 * seconds(select, options.repeats),
            "whole_ms": 1e3 * seconds(whole, options.repeats),
        }
        row["speedup"] = 1e3 * dense_s / row["whole_ms"]
        print(
            f"attention, {name}: sparsity {row['measured_sparsity']:.4f}, blocks of {row['block']}, {row['backend']}, "
            f"select {row['select_ms']:.1f} ms, whole {row['whole_ms']:.1f} ms = {row['speedup']:.2f}x, "
            f"relative error {row['relative_error']:.1e}",
            flush=True,
        )
    return {"layer": options.layer, "tokens": length, "sdpa_ms": 1e3 * dense_s, "methods": rows}


def measure_model(hf: HFLM, text: str, options: argparse.Namespace) -> dict[str, Any]:
    call = request(text)
    hf_s = seconds(lambda: hf.generate_until([call], disable_tqdm=True), options.repeats)
    print(f"model, hf: {hf_s:.2f} s", flush=True)
    rows = []
    for name in options.methods:
        method, _, block = name.partition("/")
        row: dict[str, Any] = {"method": name}
        rows.append(row)
        try:
            lm = SparseHFLM(
                method=method,
                sparsity=options.sparsity,
                backend=options.backend,
                dtype="bfloat16",
                device="cpu",
                batch_size=1,
                **({"block_size": int(block)} if block else {}),
            )
            lm.templated = True  # the prompt is plain text on purpose
            row["seconds"] = seconds(lambda lm=lm: lm.generate_until([call], disable_tqdm=True), options.repeats)
            lm.check_it_ran()
            row["prefill"] = lm.report()["phases"]["prefill"]
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            print(f"model, {name}: {row['failed']}", flush=True)
            continue
        row["speedup"] = hf_s / row["seconds"]
        measured = row["prefill"].get("executed_sparsity")
        print(f"model, {name}: {row['seconds']:.2f} s = {row['speedup']:.2f}x, sparsity {measured}", flush=True)
    return {"hf_seconds": hf_s, "methods": rows}


def markdown(content: dict[str, Any]) -> str:
    attention, model = content["attention"], content["model"]
    lines = [
        "# Sparse prefill of SmolLM2-135M-Instruct on a CPU",
        "",
        f"{content['device']}, {content['threads']} threads; torch {content['versions']['torch']}, transformers "
        f"{content['versions']['transformers']}; {attention['tokens']} tokens of this repository's text, sparsity "
        f"{content['sparsity']:g}, bfloat16; medians of {content['repeats']} calls. Made by "
        "`benchmarks/prefill_cpu_model.py`.",
        "",
        f"Attention of layer {attention['layer']} on the model's own queries, keys and values; SDPA takes "
        f"{attention['sdpa_ms']:.0f} ms. The model's prefill through lm-eval's `hf` takes {model['hf_seconds']:.2f} s.",
        "",
        "| method | measured sparsity | block | kernel | select ms | attention ms | SDPA / attention "
        "| model's prefill s | `hf` / prefill |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one, whole in zip(attention["methods"], model["methods"], strict=True):
        cells = [one["method"]]
        if "failed" in one:
            cells += [f"not measured: {one['failed']}", *["-"] * 5]
        else:
            cells += [
                f"{one['measured_sparsity']:.4f}",
                str(one["block"]),
                one["backend"],
                f"{one['select_ms']:.1f}",
                f"{one['whole_ms']:.1f}",
                f"{one['speedup']:.2f}x",
            ]
        if "failed" in whole:
            cells += [f"not measured: {whole['failed']}", "-"]
        else:
            cells += [f"{whole['seconds']:.2f}", f"{whole['speedup']:.2f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the prompt and of the one answer token")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--methods", nargs="+", default=list(METHOD_NAMES), help="names, or name/block_size")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--layer", type=int, default=15, help="layer whose attention is timed, of 30")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for prefill_cpu_model.json and .md")
    options = parser.parse_args()
    if unknown := [name for name in options.methods if name.partition("/")[0] not in METHODS]:
        parser.error(f"{', '.join(unknown)} unknown; accepted: {', '.join(METHODS)}, each also with /block_size")
    torch.set_num_threads(options.threads)
    hf = HFLM(pretrained=str(embedded.ensure()), dtype="bfloat16", device="cpu", batch_size=1)
    text = prompt(hf.tokenizer, options.length - 1)
    content: dict[str, Any] = {
        "device": processor(),
        "threads": options.threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sparsity": options.sparsity,
        "repeats": options.repeats,
        "attention": measure_attention(states_of(hf, text, options.layer), options),
        "model": measure_model(hf, text, options),
    }
    if options.output:
        write(options.output / "prefill_cpu_model.json", json.dumps(content, indent=1, default=str) + "\n")
        write(options.output / "prefill_cpu_model.md", markdown(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
