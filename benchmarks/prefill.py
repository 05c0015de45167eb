"""Sparse prefill on a GPU beside every dense attention that is installed, in one run: where does it pay, and why?

    python benchmarks/prefill.py --output benchmarks/results           # all of it, some five minutes on an H200
    python benchmarks/prefill.py --quick                               # 8K and 128K only
    python benchmarks/prefill.py --plot benchmarks/results/prefill_cuda.json    # table and picture anew, without a GPU

1. Dense attention: flash-attn-4, SDPA (cuDNN, flash), FlexAttention. The fastest one of each length is the measure.
2. Whole methods on structured inputs: estimator, index and solve, kernel, and all in one timed call.
3. Kernels alone on random layouts of a given density; each is first compared with fp32 on a sample of queries.

Times are medians over calls with a cold L2 cache, as `triton.testing.do_bench` takes them. Dense attention and whole
methods are also called back to back: where launching takes longer than computing, events do not show it. The larger of
the two counts. One layer, one prompt.

Long, since what is compared has to run in one process on the same prompts.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lm_eval_sparse.kernels import estimate as estimators
from lm_eval_sparse.kernels.prefill import BACKENDS, block_sparse_prefill, fa4
from lm_eval_sparse.kernels.types import Blocks, causal_pairs
from lm_eval_sparse.methods import METHODS, PrefillMethod
from lm_eval_sparse.testing import select as select_by

DEVICE = "cuda"
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
METHOD_NAMES = (
    "flexprefill/128",
    "block_sparse/128",
    "block_sparse/64",
    "block_sparse/16",
    "vertical_slash",
    "flexprefill_vs",
)
BLOCKS = (128, 64, 32, 16)
#: From here on the torch-only backend takes seconds, so it is not a candidate.
GATHER_UP_TO = 16384
#: Relative error (2-norm over a sample of queries) above which a kernel counts as wrong.
TOLERANCE = {"bfloat16": 1e-2, "float16": 3e-3, "float32": 1e-3}
PICTURE = Path(__file__).parents[1] / "docs" / "results" / "prefill.png"


# --- measuring -----------------------------------------------------------------------------------------------------


@functools.cache
def cold_cache() -> Tensor:
    """Writing this leaves nothing else in the L2 cache."""
    return torch.empty(1 << 28, dtype=torch.int8, device=DEVICE)


def event_ms(call: Callable[[], Any], budget: float) -> float:
    """Median milliseconds of as many calls as fit `budget` milliseconds, 3 to 100, between events on the GPU."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = max(3, min(100, int(budget / 1e3 / max(1e-6, time.perf_counter() - begin))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for first, last in events:
        cold_cache().zero_()
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events)


def steady_ms(call: Callable[[], Any], estimate: float, budget: float) -> float:
    """Milliseconds per call of a queue of calls: what a model's layers see, launches included."""
    repeats = max(3, min(50, int(budget / max(1e-3, estimate))))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin) / repeats


def both_ms(call: Callable[[], Any], budget: float) -> dict[str, float]:
    """`ms`, which counts, is the larger of `event_ms` and `steady_ms`."""
    found = event_ms(call, budget)
    steady = steady_ms(call, found, budget / 2)
    return {"ms": max(found, steady), "event_ms": found, "steady_ms": steady}


def peak_extra_bytes(call: Callable[[], Tensor]) -> int:
    """Largest memory held during a call, besides what was held before and its result."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size())


def reason_of(error: BaseException) -> str:
    """One line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


# --- inputs and checks ---------------------------------------------------------------------------------------------


def structured(heads: int, kv_heads: int, length: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries and keys with smooth positions and a few keys that every query likes, as trained models have."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    phase = torch.arange(length, device=DEVICE)[:, None] * torch.logspace(0, -3, dim // 4, device=DEVICE)[None, :]
    smooth = torch.cat([phase.sin(), phase.cos()], -1)
    query, key, value = (normal(n, length, dim) for n in (heads, kv_heads, kv_heads))
    query[..., : smooth.shape[1]] += 2 * smooth * torch.rand(heads, 1, 1, generator=generator, device=DEVICE)
    key[..., : smooth.shape[1]] += 2 * smooth
    liked = torch.randperm(length, generator=generator, device=DEVICE)[: length // 250 + 1]
    direction = normal(dim // 2)
    query[..., dim // 2 :] += 0.5 * direction
    key[:, liked, dim // 2 :] += 2 * direction
    return [tensor.to(dtype) for tensor in (query, key, value)]


def random_layout(heads: int, length: int, block: int, density: float) -> Blocks:
    """The first and the diagonal block, and others at random so that rows have `density` where they are long enough.

    Rows are drawn and listed a few at a time: the whole (H, n, n) map is never held.
    """
    generator = torch.Generator(DEVICE).manual_seed(1)
    blocks = -(-length // block)
    expected = density * blocks
    width = min(blocks, int(expected + 7 * math.sqrt(expected * (1 - density))) + 3)
    indices = torch.zeros(heads, blocks, width + 1, dtype=torch.int32, device=DEVICE)
    counts = torch.empty(heads, blocks, dtype=torch.int32, device=DEVICE)
    ids = torch.arange(blocks, device=DEVICE)
    step = max(1, (1 << 27) // (heads * blocks))
    for first in range(0, blocks, step):
        rows = ids[first : first + step, None]
        # In units of blocks, a row may read rows + 1/2, and reads 3/2 at least.
        chance = (density * (rows + 0.5) - 1.5) / (rows - 1).clamp(min=1)
        drawn = torch.rand(heads, len(rows), blocks, generator=generator, device=DEVICE) < chance
        mask = (drawn | (ids == 0) | (ids == rows)) & (ids <= rows)
        place = mask.cumsum(-1, dtype=torch.int32)
        counts[:, first : first + step] = place[..., -1].clamp(max=width)
        # What is not listed goes to the place behind the list.
        place = torch.where(mask & (place <= width), place - 1, width).long()
        indices[:, first : first + step].scatter_(-1, place, ids.to(torch.int32).expand_as(place))
    return Blocks(indices[..., :width], counts, length, block, block)


def executed_pairs(layout: Blocks) -> int:
    """Pairs of all heads; head by head, since counting holds several times what it counts."""
    total = 0
    for head in range(layout.heads):
        one = slice(head, head + 1)
        columns = {} if layout.columns is None else {
            "columns": layout.columns[one], "column_counts": layout.column_counts[one]
        }  # fmt: skip
        part = replace(layout, indices=layout.indices[one], counts=layout.counts[one], **columns)
        total += int(part.executed_pairs().sum())
    return total


def relative_error(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, layout: Blocks | None, scale: float
) -> float:
    """Distance of `out` from fp32 attention over a sample of queries, relative; without a layout, dense."""
    heads, length, _ = query.shape
    generator = torch.Generator().manual_seed(2)
    places = torch.randint(length, (20,), generator=generator).tolist() + [0, length // 2, length - 2, length - 1]
    off, size = 0.0, 0.0
    for place, head in zip(places, torch.randint(heads, (len(places),), generator=generator).tolist(), strict=True):
        visible = torch.arange(length, device=out.device) <= place
        if layout is not None:
            row = place // layout.block_q
            listed = torch.zeros_like(visible)
            tiles = layout.indices[head, row, : layout.counts[head, row]].long()
            tokens = tiles[:, None] * layout.block_k + torch.arange(layout.block_k, device=out.device)
            listed[tokens.flatten().clamp(max=length - 1)] = True
            if layout.columns is not None:
                own = layout.columns[head, row if layout.columns.shape[1] > 1 else 0]
                listed[own[: layout.column_counts[head, row]].long()] = True
            visible &= listed
        kv_head = head // (heads // key.shape[0])
        keys, values = key[kv_head][visible].float(), value[kv_head][visible].float()
        expected = (keys @ query[head, place].float() * scale).softmax(0) @ values
        off += float((out[head, place].float() - expected).square().sum())
        size += float(expected.square().sum())
    return math.sqrt(off / size) if size else 0.0


def check(error: float, dtype: str) -> None:
    if not error <= TOLERANCE[dtype]:
        raise ValueError(f"wrong result: relative error {error:.2g}, accepted {TOLERANCE[dtype]:g}")


# --- dense attention -----------------------------------------------------------------------------------------------


def flash_attn_4(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Callable[[], Tensor]:
    reason = fa4.dense_unavailable_reason(query.device.type, query.shape[-1], query.dtype)
    if reason is not None:
        raise RuntimeError(reason)
    return lambda: fa4.dense(query[None], key[None], value[None], scale)[0]


def sdpa(backend: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Callable[[], Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def call(key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(
                query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=len(query) != len(key)
            )[0]

    with warnings.catch_warnings():  # they say why a backend refuses, which the error says too
        warnings.simplefilter("ignore")
        try:
            call(key, value)
        except RuntimeError:  # no grouped queries in this backend: repeat keys and values, outside the timed call
            group = len(query) // len(key)
            key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
            call(key, value)
    return lambda: call(key, value)


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Shapes as symbols: one compilation serves all lengths.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def causal(batch: Tensor, head: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
    """FlexAttention's mask inside a block."""
    return q_index >= kv_index


def flex_call(query: Tensor, key: Tensor, value: Tensor, layout: Blocks | None, scale: float) -> Callable[[], Tensor]:
    """FlexAttention over a layout of 128-blocks (dense causal without one), its `BlockMask` made beforehand."""
    from torch.nn.attention.flex_attention import BlockMask

    length, block = query.shape[1], 128
    blocks = -(-length // block)
    ids = torch.arange(blocks, dtype=torch.int32, device=query.device)
    if layout is None:
        counts, indices = (ids + 1)[None], ids.expand(1, blocks, blocks)
    else:
        counts, indices = layout.counts, F.pad(layout.indices, (0, blocks - layout.indices.shape[-1]))
    # The last listed block is the only one that the diagonal may cross.
    last = torch.zeros_like(indices)
    last[..., :1] = indices.gather(-1, (counts - 1).long()[..., None])
    mask = BlockMask.from_kv_blocks(
        torch.ones_like(counts)[None],
        last[None],
        (counts - 1)[None],
        indices[None].contiguous(),
        BLOCK_SIZE=block,
        mask_mod=causal,
        seq_lengths=(length, length),
    )
    gqa = len(query) != len(key)
    return lambda: compiled_flex()(
        query[None], key[None], value[None], block_mask=mask, scale=scale, enable_gqa=gqa
    )[0]  # fmt: skip


DENSE: dict[str, Callable[..., Callable[[], Tensor]]] = {
    "flash-attn-4": flash_attn_4,
    "SDPA cuDNN": functools.partial(sdpa, "CUDNN_ATTENTION"),
    "SDPA flash": functools.partial(sdpa, "FLASH_ATTENTION"),
    "FlexAttention": lambda query, key, value, scale: flex_call(query, key, value, None, scale),
}


def measure_dense(states: list[Tensor], options: argparse.Namespace) -> dict[str, Any]:
    """`{name: times, or why there are none}` at one length, and the fastest."""
    query, length = states[0], states[0].shape[1]
    scale, flops = query.shape[-1] ** -0.5, 4 * query.shape[-1] * len(query) * causal_pairs(length)
    found: dict[str, Any] = {}
    for name, prepare in DENSE.items():
        try:
            call = prepare(*states, scale)
            error = relative_error(call(), *states, None, scale)
            check(error, options.dtype)
            times = both_ms(call, options.budget)
            found[name] = {**times, "tflops": flops / times["ms"] / 1e9, "relative_error": error}
            say(f"dense  {length:>7} {name:<22} {times['ms']:9.3f} ms {found[name]['tflops']:6.0f} TFLOP/s")
        except Exception as error:
            found[name] = {"failed": reason_of(error)}
            say(f"dense  {length:>7} {name:<22} not measured: {found[name]['failed']}")
        finally:
            call = None  # it may hold copies
    times = {name: row["ms"] for name, row in found.items() if "ms" in row}
    fastest = min(times, key=times.__getitem__) if times else None
    return {"length": length, "fastest": fastest, "ms": times.get(fastest), "backends": found}


# --- whole methods -------------------------------------------------------------------------------------------------


def build(name: str) -> PrefillMethod:
    """A method from `name` or `name/block_size`."""
    method, _, block = name.partition("/")
    return METHODS[method](**({"block_size": int(block)} if block else {}))


@contextmanager
def recorded(calls: list[Callable[[], Any]]) -> Iterator[None]:
    """Note the calls that methods make to the estimators, to be repeated alone."""
    names = [name for name in estimators.__all__ if not isinstance(getattr(estimators, name), type)]
    modules = [module for name, module in sys.modules.items() if name.startswith("lm_eval_sparse.methods.")]
    patched = []
    for name in names:
        original = getattr(estimators, name)

        def noted(*args: Any, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            calls.append(functools.partial(_original, *args, **kwargs))
            return _original(*args, **kwargs)

        for module in modules:
            if getattr(module, name, None) is original:
                setattr(module, name, noted)
                patched.append((module, name, original))
    try:
        yield
    finally:
        for module, name, original in patched:
            setattr(module, name, original)


def measure_method(
    name: str, sparsity: float, states: list[Tensor], dense_ms: float | None, options: argparse.Namespace
) -> dict[str, Any]:
    """One row: what a method at one sparsity and length takes, or why it was not measured."""
    query, key, value = states
    heads, length, dim = query.shape
    scale = dim**-0.5
    row: dict[str, Any] = {"method": name, "length": length, "sparsity": sparsity}
    try:
        method = build(name)
        if (reason := method.too_short(sparsity, length)) is not None:
            return {**row, "skipped": reason}

        def select() -> Blocks:
            return select_by(method, query, key, scale=scale, softcap=None, sparsity=sparsity)

        def whole() -> Tensor:
            return block_sparse_prefill(query, key, value, select(), scale=scale, backend=options.backend)[0]

        calls: list[Callable[[], Any]] = []
        with recorded(calls):
            layout = select()
        out, row["backend"] = block_sparse_prefill(query, key, value, layout, scale=scale, backend=options.backend)
        row["block"] = layout.block_q
        row["measured_sparsity"] = 1 - executed_pairs(layout) / heads / causal_pairs(length)
        row["relative_error"] = relative_error(out, query, key, value, layout, scale)
        out = None
        check(row["relative_error"], options.dtype)
        row["estimator_ms"] = event_ms(lambda: [call() for call in calls], options.budget) if calls else None
        row["kernel_ms"] = event_ms(
            lambda: block_sparse_prefill(query, key, value, layout, scale=scale, backend=row["backend"]), options.budget
        )
        layout = None
        calls.clear()
        row["select_ms"] = event_ms(select, options.budget)
        if row["estimator_ms"] is not None:
            row["index_ms"] = max(0.0, row["select_ms"] - row["estimator_ms"])
        times = both_ms(whole, options.budget)
        row |= {"whole_ms": times["ms"], "whole_event_ms": times["event_ms"], "whole_steady_ms": times["steady_ms"]}
        row["peak_extra_bytes"] = peak_extra_bytes(whole)
        row["speedup"] = None if dense_ms is None else dense_ms / row["whole_ms"]
    except Exception as error:
        row["failed"] = reason_of(error)
    return row


def crossover(rows: list[dict[str, Any]], method: str, sparsity: float, lengths: list[int]) -> int | None:
    """The smallest length from which on the method is faster than the fastest dense attention."""
    speedups = {
        row["length"]: row.get("speedup") or 0.0
        for row in rows
        if row["method"] == method and row["sparsity"] == sparsity
    }
    found = None
    for length in sorted(lengths, reverse=True):
        if speedups.get(length, 0.0) <= 1:
            break
        found = length
    return found


# --- kernels alone -------------------------------------------------------------------------------------------------


def kernel_call(name: str, states: list[Tensor], layout: Blocks, scale: float) -> Callable[[], Tensor]:
    if name == "flex":
        if layout.block_q != 128:
            raise ValueError("FlexAttention's CUDA kernel takes blocks of 128 only")
        return flex_call(*states, layout, scale)
    return lambda: block_sparse_prefill(*states, layout, scale=scale, backend=name)[0]


def measure_kernels(length: int, block: int, density: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per kernel on one random layout."""
    generator = torch.Generator(DEVICE).manual_seed(3)
    shape = (length, options.head_dim)
    states = [
        torch.randn(heads, *shape, generator=generator, device=DEVICE, dtype=getattr(torch, options.dtype))
        for heads in (options.heads, options.kv_heads, options.kv_heads)
    ]
    scale = options.head_dim**-0.5
    layout = random_layout(options.heads, length, block, density)
    pairs = executed_pairs(layout)
    rows = []
    for name in options.kernels:
        row = {"kernel": name, "block": block, "length": length, "density": density,
               "executed_density": pairs / options.heads / causal_pairs(length)}  # fmt: skip
        # Kernels with one block size, and one that is not made for this, are no candidates elsewhere.
        narrow = {"fa4": (128,), "flex": (128,), "hopper": (128, 64)}.get(name, BLOCKS)
        if block not in narrow or (name == "gather" and length > GATHER_UP_TO):
            continue
        try:
            call = kernel_call(name, states, layout, scale)
            row["relative_error"] = relative_error(call(), *states, layout, scale)
            check(row["relative_error"], options.dtype)
            row["ms"] = event_ms(call, options.budget)
            row["tflops"] = 4 * options.head_dim * pairs / row["ms"] / 1e9
            result = f"{row['ms']:9.3f} ms {row['tflops']:6.0f} TFLOP/s, relative error {row['relative_error']:.1e}"
        except Exception as error:
            row["failed"] = result = reason_of(error)
        finally:
            call = None
        say(f"kernel {length:>7} {block:>4} {density:5.0%} {name:<12} {result}")
        rows.append(row)
    return rows


# --- the run -------------------------------------------------------------------------------------------------------

START = time.perf_counter()


def say(line: str) -> None:
    print(f"[{time.perf_counter() - START:5.0f} s] {line}", flush=True)


def device_facts() -> dict[str, Any]:
    """What ran, and what the card does in this run: a copy (bytes read and written) and a bf16 product of 8192^3."""
    source = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    copy_ms = event_ms(lambda: target.copy_(source), 100)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product_ms = event_ms(lambda: a @ b, 100)
    return {
        "name": torch.cuda.get_device_name(),
        "multiprocessors": torch.cuda.get_device_properties(DEVICE).multi_processor_count,
        "copy_tb_s": 2 * source.numel() / copy_ms / 1e9,
        "matmul_tflops": 2 * 8192**3 / product_ms / 1e9,
    }


def versions() -> dict[str, str | None]:
    def installed(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    driver = None
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split("\n")[0] or None
    except (OSError, subprocess.TimeoutExpired):
        pass
    return {
        "torch": torch.__version__,
        "triton": installed("triton"),
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
        "driver": driver,
        "flash-attn-4": installed("flash-attn-4"),
        "nvidia-cutlass-dsl": installed("nvidia-cutlass-dsl"),
        "python": platform.python_version(),
    }


@torch.no_grad()
def run(options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure; what is there is saved after each length, so that a run cut short is not lost."""
    shape = {key: getattr(options, key) for key in ("heads", "kv_heads", "head_dim", "dtype")}
    content: dict[str, Any] = {
        "finished": False,
        "device": device_facts(),
        "versions": versions(),
        "shape": shape,
        "lengths": options.lengths,
        "sparsities": options.sparsities,
        "backend": options.backend,
        "dense": [],
        "methods": [],
        "kernels": [],
    }
    device = content["device"]
    say(f"{device['name']}: copy {device['copy_tb_s']:.2f} TB/s, bf16 product {device['matmul_tflops']:.0f} TFLOP/s")
    say(", ".join(f"{name} {version}" for name, version in content["versions"].items()))
    # Longest first: what the targets are about comes first.
    for length in sorted(options.lengths, reverse=True):
        states = structured(options.heads, options.kv_heads, length, options.head_dim, getattr(torch, options.dtype))
        dense = measure_dense(states, options)
        content["dense"].append(dense)
        for name in options.methods:
            for sparsity in options.sparsities:
                row = measure_method(name, sparsity, states, dense["ms"], options)
                content["methods"].append(row)
                say(f"method {length:>7} {name:<17} {sparsity:<4g} {method_line(row)}")
        states = None
        save(content)
        torch.cuda.empty_cache()
    for length in sorted(options.kernel_lengths, reverse=True):
        for block in options.blocks:
            for density in options.densities:
                try:
                    content["kernels"] += measure_kernels(length, block, density, options)
                except Exception as error:  # making the layout: memory
                    say(f"kernel {length:>7} {block:>4} {density:5.0%} not measured: {reason_of(error)}")
                    content["kernels"].append(
                        {"kernel": "all", "block": block, "length": length, "density": density,
                         "failed": reason_of(error)}
                    )  # fmt: skip
                torch.cuda.empty_cache()
        save(content)
    content["crossover"] = [
        {"method": name, "sparsity": sparsity,
         "length": crossover(content["methods"], name, sparsity, options.lengths)}
        for name in options.methods
        for sparsity in options.sparsities
    ]  # fmt: skip
    content["seconds"] = time.perf_counter() - START
    content["finished"] = True
    save(content)
    return content


def method_line(row: dict[str, Any]) -> str:
    if "whole_ms" not in row:
        return f"not measured: {row.get('skipped') or row.get('failed')}"
    speedup = "" if row["speedup"] is None else f" = {row['speedup']:.2f}x"
    return (
        f"{row['measured_sparsity']:.4f} {row['backend']:<7} estimator {ms(row['estimator_ms'])} index "
        f"{ms(row.get('index_ms'))} kernel {ms(row['kernel_ms'])} whole {ms(row['whole_ms'])} ms{speedup}, "
        f"{row['peak_extra_bytes'] / 2**30:.2f} GiB"
    )


# --- what comes out ------------------------------------------------------------------------------------------------


def ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows), ""]


def markdown(content: dict[str, Any]) -> str:
    """The tables, from the content of the JSON file."""
    device, shape = content["device"], content["shape"]
    lengths = sorted(content["lengths"])
    names = list(dict.fromkeys(row["method"] for row in content["methods"]))
    known = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version)
    lines = [
        "# Sparse prefill, CUDA",
        "",
        f"{device['name']} (copy {device['copy_tb_s']:.2f} TB/s, bf16 8192³ product {device['matmul_tflops']:.0f} "
        f"TFLOP/s, both in this run); {known}. {shape['heads']} query heads, {shape['kv_heads']} KV heads, head_dim "
        f"{shape['head_dim']}, {shape['dtype']}, one prompt, one layer, causal. Made by `benchmarks/prefill.py`, whose "
        "head says how times are taken. TFLOP/s count pairs inside the causal triangle.",
        "",
    ]
    if not content["finished"]:
        lines += ["**The run was cut short.**", ""]
    lines += ["## Dense attention, ms (TFLOP/s)", ""]
    by_length = {row["length"]: row for row in content["dense"]}
    backends = list(dict.fromkeys(name for row in content["dense"] for name in row["backends"]))
    rows = []
    for name in backends:
        cells = []
        for length in lengths:
            found = by_length.get(length, {"backends": {}, "fastest": None})
            entry = found["backends"].get(name, {})
            cell = f"{ms(entry['ms'])} ({entry['tflops']:.0f})" if "ms" in entry else "-"
            cells.append(f"**{cell}**" if found["fastest"] == name else cell)
        rows.append([name, *cells])
    lines += table(["", *map(short, lengths)], rows)

    lines += ["## Whole methods, ms, and how many times faster than the fastest dense attention", ""]
    found_rows = {(row["method"], row["sparsity"], row["length"]): row for row in content["methods"]}
    for sparsity in content["sparsities"]:
        rows = []
        for name in names:
            cells = []
            for length in lengths:
                row = found_rows.get((name, sparsity, length), {})
                speedup = "" if row.get("speedup") is None else f" ({row['speedup']:.2f}x)"
                cells.append(f"{ms(row['whole_ms'])}{speedup}" if "whole_ms" in row else "-")
            rows.append([name, *cells])
        lines += [f"Sparsity {sparsity:g}:", "", *table(["method", *map(short, lengths)], rows)]

    if content.get("crossover"):
        lines += ["## Crossover: the length from which on a method is faster than the fastest dense attention", ""]
        at = {(row["method"], row["sparsity"]): row["length"] for row in content["crossover"]}
        rows = [
            [name, *("-" if (found := at.get((name, s))) is None else short(found) for s in content["sparsities"])]
            for name in names
        ]
        lines += table(["method", *(f"{sparsity:g}" for sparsity in content["sparsities"])], rows)

    lines += [
        "## Where the time goes",
        "",
        "`index` is what selecting takes besides the estimator; `select` is both; its share is of the whole call. "
        "`peak` is the largest memory besides inputs and output.",
        "",
    ]
    rows = []
    for row in sorted(content["methods"], key=lambda row: (-row["length"], names.index(row["method"]))):
        if "whole_ms" not in row:
            continue
        rows.append(
            [short(row["length"]), row["method"], f"{row['sparsity']:g}", f"{row['measured_sparsity']:.4f}",
             row["backend"], ms(row["estimator_ms"]), ms(row.get("index_ms")), ms(row["kernel_ms"]),
             ms(row["whole_ms"]), f"{row['select_ms'] / row['whole_ms']:.0%}",
             f"{row['peak_extra_bytes'] / 2**30:.2f} GiB",
             "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"]
        )  # fmt: skip
    lines += table(
        ["length", "method", "sparsity", "measured", "kernel", "estimator ms", "index ms", "kernel ms", "whole ms",
         "select", "peak", "over dense"],
        rows,
    )  # fmt: skip

    if content["kernels"]:
        lines += ["## Kernels alone on random layouts, ms (TFLOP/s of executed pairs)", ""]
        kernels = list(dict.fromkeys(row["kernel"] for row in content["kernels"] if row["kernel"] != "all"))
        places = list(dict.fromkeys((row["block"], row["density"], row["length"]) for row in content["kernels"]))
        entries = {(row["kernel"], row["block"], row["density"], row["length"]): row for row in content["kernels"]}
        rows = []
        for place in sorted(places, key=lambda place: (-place[0], place[1], place[2])):
            cells = []
            for name in kernels:
                entry = entries.get((name, *place), {})
                cells.append(f"{ms(entry['ms'])} ({entry['tflops']:.0f})" if "ms" in entry else "-")
            rows.append([str(place[0]), f"{place[1]:.0%}", short(place[2]), *cells])
        lines += table(["block", "density", "length", *kernels], rows)
        lines += ["FlexAttention's `BlockMask` is made beforehand; the other kernels take the layout as it is.", ""]

    reasons: dict[str, list[str]] = {}
    for row in content["dense"]:
        for name, entry in row["backends"].items():
            if "failed" in entry:
                reasons.setdefault(f"{name}: {entry['failed']}", []).append(short(row["length"]))
    for row in content["methods"]:
        if reason := row.get("failed") or row.get("skipped"):
            reasons.setdefault(f"{row['method']} at {row['sparsity']:g}: {reason}", []).append(short(row["length"]))
    for row in content["kernels"]:
        if "failed" in row:
            place = f"{short(row['length'])} {row['density']:.0%}"
            reasons.setdefault(f"{row['kernel']} on blocks of {row['block']}: {row['failed']}", []).append(place)
    if reasons:
        lines += ["## Not measured", "", *(f"- {reason} ({', '.join(at)})" for reason, at in reasons.items()), ""]
    return "\n".join(lines)


def draw(content: dict[str, Any], path: Path) -> None:
    """Speed-up over the fastest dense attention against length, a panel per sparsity (.9 and .95 where measured)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sparsities = [s for s in content["sparsities"] if s in (0.9, 0.95)] or sorted(content["sparsities"])[-2:]
    names = list(dict.fromkeys(row["method"] for row in content["methods"]))
    lengths = sorted(content["lengths"])
    figure, axes = plt.subplots(
        1, len(sparsities), figsize=(4.6 * len(sparsities) + 2.2, 4), squeeze=False, sharey=True, layout="constrained",
        dpi=130,
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for axis, sparsity in zip(axes[0], sparsities, strict=True):
        handles["fastest dense attention"] = axis.axhline(1, color="black", linestyle="--", linewidth=1)
        handles["1 / density"] = axis.axhline(1 / (1 - sparsity), color="grey", linestyle=":", linewidth=1)
        for place, name in enumerate(names):
            line = sorted(
                (row["length"], row["speedup"])
                for row in content["methods"]
                if row["method"] == name and row["sparsity"] == sparsity and row.get("speedup")
            )
            if line:
                (handles[name],) = axis.plot(*zip(*line, strict=True), marker="o", markersize=4, color=f"C{place}")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(lengths, [short(length) for length in lengths])
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.set_xlabel("prompt length, tokens")
        axis.set_title(f"sparsity {sparsity:g}", fontsize=10)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("times faster, selection included")
    shape = content["shape"]
    figure.suptitle(
        f"Prefill attention, {content['device']['name']}, {shape['heads']} query and {shape['kv_heads']} KV heads, "
        f"head_dim {shape['head_dim']}, {shape['dtype']}",
        fontsize=10,
    )
    order = [*names, "fastest dense attention", "1 / density"]
    order = [name for name in order if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside right upper", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace, *numbers: str) -> None:
    """End with a message on numbers that are not positive, a device that is not there, a folder that cannot be one."""
    for name in numbers:
        value = getattr(options, name)
        given = value if isinstance(value, list) else [] if value is None else [value]
        if any(one <= 0 for one in given):
            parser.error(f"--{name} {' '.join(map(str, given))}: give numbers above 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; leave --device out or type --device cpu")
    output = options.output
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--output {output} cannot be made a folder ({error.strerror}); give one to write to")
        if not os.access(output, os.W_OK | os.X_OK):
            parser.error(f"--output {output} cannot be written to; give another folder")


def write(path: Path, text: str) -> None:
    """Write at once: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--methods", nargs="*", default=list(METHOD_NAMES), help="names, or name/block_size")
    parser.add_argument("--backend", default="auto", help="kernel of the methods")
    parser.add_argument("--kernels", nargs="*", default=[name for name in BACKENDS if name != "naive"])
    parser.add_argument("--kernel_lengths", type=int, nargs="+", default=None, help="default: --lengths from 16384 on")
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS))
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(TOLERANCE))
    parser.add_argument("--budget", type=float, default=100.0, help="milliseconds of calls behind each figure")
    parser.add_argument("--quick", action="store_true", help="8K and 128K at 0.9 and 0.95, kernels at 128K and 5%%")
    parser.add_argument("--output", type=Path, help="folder for prefill_cuda.json and prefill_cuda.md")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="drawn at the end when there is an --output")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw --picture, and the .md beside this JSON, from it alone"
    )
    options = parser.parse_args()

    if options.plot is not None:
        if not options.plot.is_file():
            print(f"--plot {options.plot}: there is no such file; give a JSON that --output wrote", file=sys.stderr)
            return 1
        content = json.loads(options.plot.read_text())
        write(options.plot.with_suffix(".md"), markdown(content))
        draw(content, options.picture)
        print(f"{options.plot.with_suffix('.md')} and {options.picture} written")
        return 0
    if not torch.cuda.is_available():
        print(
            "prefill.py measures on a CUDA GPU, and torch sees none here; on a CPU run "
            "`python benchmarks/prefill_backends.py` or `python benchmarks/prefill_cpu_model.py`",
            file=sys.stderr,
        )
        return 1
    unknown = [name for name in options.methods if name.partition("/")[0] not in METHODS]
    unknown += [name for name in options.kernels if name not in BACKENDS]
    if unknown:
        parser.error(f"{', '.join(unknown)} unknown; methods: {', '.join(METHODS)}; kernels: {', '.join(BACKENDS)}")
    if options.quick:
        options.lengths, options.sparsities = [8192, 131072], [0.9, 0.95]
        options.kernel_lengths, options.densities = [131072], [0.05]
    if options.kernel_lengths is None:
        options.kernel_lengths = [length for length in options.lengths if length >= 16384] or options.lengths

    def save(content: dict[str, Any]) -> None:
        if options.output:
            write(options.output / "prefill_cuda.json", json.dumps(content, indent=1) + "\n")
            write(options.output / "prefill_cuda.md", markdown(content))

    content = run(options, save)
    if options.output:
        draw(content, options.picture)
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
