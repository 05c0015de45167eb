"""Block-sparse prefill backends beside dense SDPA on this machine: which one should be the default?

    python benchmarks/prefill_backends.py                       # SmolLM2's shape at 4K and 8K
    python benchmarks/prefill_backends.py --lengths 4096 --output benchmarks/results

Selections come from FlexPrefill on structured random queries and keys, so that heads have different budgets. Every
figure is the median of several calls after warm-up; the compilation of `flex` is timed apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lm_eval_sparse.kernels.dense import dense_attention
from lm_eval_sparse.kernels.prefill import block_sparse_prefill, flex
from lm_eval_sparse.kernels.types import causal_pairs
from lm_eval_sparse.methods.prefill.flexprefill import FlexPrefill
from lm_eval_sparse.testing import select as select_by


def structured(heads: int, kv_heads: int, length: int, dim: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Queries and keys with smooth positions and a few keys that every query likes, as trained models have."""
    generator = torch.Generator().manual_seed(0)
    phase = torch.arange(length)[:, None] * torch.logspace(0, -3, dim // 4)[None, :]
    smooth = torch.cat([phase.sin(), phase.cos()], -1)
    query, key, value = (torch.randn(n, length, dim, generator=generator) for n in (heads, kv_heads, kv_heads))
    query[..., : dim // 2] += 2 * smooth * torch.rand(heads, 1, 1, generator=generator)
    key[..., : dim // 2] += 2 * smooth
    liked = torch.randperm(length, generator=generator)[: length // 250 + 1]
    direction = torch.randn(dim // 2, generator=generator)
    query[..., dim // 2 :] += 0.5 * direction
    key[:, liked, dim // 2 :] += 2 * direction
    return [tensor.to(device, dtype) for tensor in (query, key, value)]


def median_ms(call: Callable[[], Any], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv_heads", type=int, default=3)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder for the JSON and the table")
    options = parser.parse_args()
    device, method, rows = options.device, FlexPrefill(), []
    scale = options.head_dim**-0.5
    print(
        f"{'length':>7} {'sparsity':>8} {'block':>5} {'select':>8} {'gather':>8} {'flex':>8} {'dense':>8}  ms",
        flush=True,
    )
    for length in options.lengths:
        dtype = getattr(torch, options.dtype)
        query, key, value = structured(options.heads, options.kv_heads, length, options.head_dim, dtype, device)
        dense = median_ms(
            lambda q=query, k=key, v=value: dense_attention(q[None], k[None], v[None], scale=scale),
            device,
            options.repeats,
        )
        for sparsity in options.sparsities:

            def select(q: torch.Tensor = query, k: torch.Tensor = key, s: float = sparsity) -> Any:
                return select_by(method, q, k, scale=scale, softcap=None, sparsity=s)

            layout = select()
            row: dict[str, Any] = {
                "length": length,
                "requested_sparsity": sparsity,
                "executed_sparsity": 1 - int(layout.executed_pairs().sum()) / options.heads / causal_pairs(length),
                "block_size": layout.block_q,
                "select_ms": median_ms(select, device, options.repeats),
                "dense_sdpa_ms": dense,
            }
            for backend in ("gather", "flex"):
                if backend == "flex":
                    begin = time.perf_counter()
                    if (reason := flex.unavailable_reason(device, layout.block_q, layout.block_k)) is not None:
                        row["flex_ms"], row["flex_unavailable"] = None, reason
                        continue
                    row["flex_first_use_s"] = time.perf_counter() - begin

                def run(name: str = backend, chosen: Any = layout, q=query, k=key, v=value) -> None:
                    block_sparse_prefill(q, k, v, chosen, scale=scale, backend=name)

                row[f"{backend}_ms"] = median_ms(run, device, options.repeats)
            rows.append(row)
            flex_ms = "-" if row["flex_ms"] is None else f"{row['flex_ms']:.1f}"
            print(
                f"{length:>7} {row['executed_sparsity']:>8.4f} {row['block_size']:>5} {row['select_ms']:>8.1f} "
                f"{row['gather_ms']:>8.1f} {flex_ms:>8} {dense:>8.1f}",
                flush=True,
            )
    if options.output:
        save(options, rows)


def save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write `prefill_backends_<device>.json` and a markdown table beside it."""
    on_cpu = f"{processor()}, {torch.get_num_threads()} threads"
    name = on_cpu if options.device == "cpu" else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    shape = {key: getattr(options, key) for key in ("heads", "kv_heads", "head_dim", "dtype")}
    content = {"device": name, "versions": versions, "shape": shape, "repeats": options.repeats, "rows": rows}
    lines = [
        f"# Block-sparse prefill backends, {options.device}",
        "",
        f"{name}; torch {versions['torch']}; {shape['heads']} query heads, {shape['kv_heads']} KV heads, "
        f"head_dim {shape['head_dim']}, {shape['dtype']}; medians of {options.repeats} calls. One layer. "
        "`select` is FlexPrefill's estimator and solve.",
        "",
        "| length | measured sparsity | block | select ms | gather ms | flex ms | dense SDPA ms "
        "| dense / (select + best) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        best = min(value for value in (row["gather_ms"], row["flex_ms"]) if value is not None)
        flex_ms = "-" if row["flex_ms"] is None else f"{row['flex_ms']:.1f}"
        lines.append(
            f"| {row['length']} | {row['executed_sparsity']:.4f} | {row['block_size']} | {row['select_ms']:.1f} "
            f"| {row['gather_ms']:.1f} | {flex_ms} | {row['dense_sdpa_ms']:.1f} "
            f"| {row['dense_sdpa_ms'] / (row['select_ms'] + best):.2f}x |"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"prefill_backends_{options.device}"
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


def processor() -> str:
    """The processor's name where the system tells, else its architecture."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
