"""Sparse decoding on a GPU beside every dense attention that is installed, in one run: one token of one layer.

    python benchmarks/decode.py --output benchmarks/results            # all of it, some five minutes on an H200
    python benchmarks/decode.py --quick                                # 8K and 128K, batch 1 and 8, at 0.9 and 0.95
    python benchmarks/decode.py --plot benchmarks/results/decode_cuda.json      # table and picture anew, without a GPU

1. Dense attention over all keys: SDPA (cuDNN, flash), flash-attn-4, our `paged_decode`. Libraries are asked in several
   ways (query heads as heads, or those of a KV head as rows of one head; with and without splits); the fastest counts.
2. Quest: the new token appended, pages scored and chosen, pages read; each alone, and all in one as the decode loop
   calls them, where they run into each other (`whole`, which is what speed-ups are of).
3. Eviction: `paged_decode` over what is left, unequally long heads.

Launching such kernels from Python takes longer than running them, so calls are captured in a CUDA graph, as the decode
loop does: up to 20 calls, each on other copies of the cache as far as they fit in memory, so that a call finds nothing
of its cache in L2; before each replay L2 is overwritten. A time is the median of 20 replays or more, divided by the
calls. What cannot be captured is called back to back, launches included, and marked. Every candidate is first compared
with fp32 attention over the keys that it should read. Bytes are those of keys, values and page bounds that must be
read; the share of the copy bandwidth (bytes read and written) that they make says how far a kernel is from its limit.

On a machine without a GPU everything runs in a small form with a clock on the wall, to see it work.

Long, since what is compared has to run in one process on the same caches.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from prefill import check_options, reason_of, say, short, table, versions, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lm_eval_sparse.kernels.cache.append import append
from lm_eval_sparse.kernels.decode import paged_decode
from lm_eval_sparse.kernels.estimate import page_scores, update_bounds
from lm_eval_sparse.kernels.index.pages import PageBudget
from lm_eval_sparse.kernels.prefill import fa4
from lm_eval_sparse.kernels.types import PageBounds, RaggedKV, Reads
from lm_eval_sparse.methods.decode.quest import Quest
from lm_eval_sparse.testing import Decoding, select

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
#: Calls in a graph, at most and at least, and milliseconds that they should take together.
CALLS, LEAST_CALLS, GRAPH_MS = 20, 4, 20.0
REPLAYS = 20
#: Bytes to be read between two reads of the same cache: several times the largest L2.
COLD_BYTES = 512 << 20
#: Relative error (2-norm over a sample of sequences) above which a candidate counts as wrong.
TOLERANCE = {"bfloat16": 1e-2, "float16": 3e-3, "float32": 1e-3}
#: Heads hold from a quarter of the mean to seven quarters of it after eviction.
UNEQUAL = (0.25, 1.75)
#: (batch, times faster than cuDNN at 128K and .95, selection included)
P6 = ((1, 6.0), (8, 7.5))
PICTURE = Path(__file__).parents[1] / "docs" / "results" / "decode.png"

Row = dict[str, Any]


# --- measuring -----------------------------------------------------------------------------------------------------


@functools.cache
def cold_cache(device: str) -> Tensor:
    """Writing this leaves nothing else in the L2 cache."""
    return torch.empty(1 << 28, dtype=torch.int8, device=device)


def captured(call: Callable[[int], Any], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of `call(0)` to `call(calls - 1)`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # whatever is compiled or allocated on first use
        for number in range(min(2, calls)):
            call(number)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            call(number)
    return graph


def gpu_us(run: Callable[[], Any], budget: float) -> float:
    """Median microseconds of `run`, `REPLAYS` times or as often as `budget` milliseconds allow, L2 cold."""
    device = f"cuda:{torch.cuda.current_device()}"
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    repeats = max(REPLAYS, min(100, int(budget / 1e3 / max(1e-6, time.perf_counter() - begin))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for first, last in events:
        cold_cache(device).zero_()
        first.record()
        run()
        last.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(first.elapsed_time(last) for first, last in events)


def measure(call: Callable[[int], Any], calls: int, options: argparse.Namespace) -> Row:
    """`us` per call, and `timed`: how."""

    def all_calls() -> None:
        for number in range(calls):
            call(number)

    if options.device != "cuda":
        all_calls()
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            all_calls()
            times.append(time.perf_counter() - begin)
        return {"us": 1e6 * statistics.median(times) / calls, "timed": "clock"}
    try:
        graph = captured(call, calls)
    except Exception as error:
        torch.cuda.synchronize()
        found = gpu_us(all_calls, options.budget) / calls
        return {"us": found, "timed": "launched", "not_captured": reason_of(error)}
    try:
        return {"us": gpu_us(graph.replay, options.budget) / calls, "timed": "graph"}
    finally:
        graph.reset()


# --- inputs --------------------------------------------------------------------------------------------------------


class Caches:
    """Copies of the keys and values of one layer of a batch, with a new token for each.

    Attributes:
        keys, values: `(copies, B * H_kv * L, D)`; query: `(copies, B * H_kv, G, 1, D)`.
        calls: calls of a graph; call `i` works on copy `i % copies`.
        lengths: `(S,)` int32, L everywhere, the new token included.
    """

    def __init__(self, batch: int, length: int, options: argparse.Namespace):
        self.batch, self.length, self.kv_heads, self.dim = batch, length, options.kv_heads, options.head_dim
        self.group = options.heads // options.kv_heads
        self.sequences = batch * self.kv_heads
        self.scale, device = self.dim**-0.5, options.device
        dtype = getattr(torch, options.dtype)
        self.bytes = 2 * self.sequences * length * self.dim * dtype.itemsize
        self.calls, self.copies = sizes(self.bytes, options)
        self.generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self.generator, device=device, dtype=dtype)

        self.keys, self.values = (normal(self.copies, self.sequences * length, self.dim) for _ in range(2))
        self.query = normal(self.copies, self.sequences, self.group, 1, self.dim)
        self.new_key, self.new_value = (normal(self.copies, self.sequences, 1, self.dim) for _ in range(2))
        self.starts = torch.arange(self.sequences, device=device) * length
        self.lengths = torch.full((self.sequences,), length, dtype=torch.int32, device=device)
        self.tickets = torch.zeros(2, self.sequences, dtype=torch.int32, device=device)
        self.tokens = torch.full((batch,), length, dtype=torch.int64, device=device)

    def kv(self, number: int) -> RaggedKV:
        copy = number % self.copies
        return self.ragged(copy, self.starts, self.lengths, self.length)

    def ragged(self, copy: int, starts: Tensor, lengths: Tensor, longest: int) -> RaggedKV:
        keys, values = self.keys[copy], self.values[copy]
        return RaggedKV(keys, values, starts, lengths, longest, self.kv_heads, self.tickets)

    def evicted(self, sparsity: float) -> tuple[Callable[[int], RaggedKV], int]:
        """Caches that hold (1 - sparsity) of the keys, in unequal shares of the heads, and their number of keys."""
        shares = torch.linspace(*UNEQUAL, self.kv_heads) * (1 - sparsity) * self.length
        held = [max(1, min(self.length, int(share))) for share in shares.tolist()] * self.batch
        starts = torch.tensor([0, *held[:-1]]).cumsum(0).to(self.keys.device)
        lengths = torch.tensor(held, dtype=torch.int32).to(self.keys.device)

        def kv(number: int) -> RaggedKV:
            return self.ragged(number % self.copies, starts, lengths, max(held))

        return kv, sum(held)

    def expected(self, out: Tensor, kv: RaggedKV, selection: Reads | None) -> float:
        """Distance of `out (S, G, 1, D)` of the first copy from fp32 attention over a sample of sequences, relative."""
        off, size = 0.0, 0.0
        for sequence in sorted({0, self.sequences // 2, self.sequences - 1}):
            start, length = int(kv.starts[sequence]), int(kv.lengths[sequence])
            positions = torch.arange(length, device=out.device)
            if selection is not None:
                listed = selection.ids[sequence, 0, 0, : int(selection.counts[sequence, 0, 0])].long()
                positions = (listed[:, None] * selection.unit + positions[: selection.unit]).flatten()
                positions = positions[positions < length]
            keys, values = kv.keys[start + positions].float(), kv.values[start + positions].float()
            weights = (self.query[0, sequence, :, 0].float() @ keys.T * self.scale).softmax(-1)
            wanted = weights @ values
            off += float((out[sequence, :, 0].float() - wanted).square().sum())
            size += float(wanted.square().sum())
        return (off / size) ** 0.5


def sizes(cache_bytes: int, options: argparse.Namespace) -> tuple[int, int]:
    """Calls of a graph and copies of a cache of so many bytes of keys and values.

    Copies suffice when even the sparsest call finds that `COLD_BYTES` were read since the last one on the same copy.
    """
    if options.device != "cuda":
        return options.calls, min(2, options.calls)
    fitting = max(1, int(options.memory * 2**30) // cache_bytes)
    estimate = cache_bytes / 3e9  # milliseconds at 3 TB/s
    calls = max(LEAST_CALLS, min(options.calls, int(GRAPH_MS / estimate)))
    least = (1 - max(options.sparsities)) * cache_bytes
    return calls, max(1, min(calls, fitting, -int(-COLD_BYTES // least)))


def checked(error: float, dtype: str) -> float:
    if not error <= TOLERANCE[dtype]:
        raise ValueError(f"wrong result: relative error {error:.2g}, accepted {TOLERANCE[dtype]:g}")
    return error


# --- dense attention -----------------------------------------------------------------------------------------------


def sdpa(backend: SDPBackend, as_rows: bool, caches: Caches) -> Callable[[int], Tensor]:
    """SDPA with the query heads of a KV head as heads of their own, or as rows of one head: none is masked."""
    shape = (caches.copies, caches.batch, caches.kv_heads, caches.length, caches.dim)
    keys, values = caches.keys.view(shape), caches.values.view(shape)
    query = caches.query.view(caches.copies, caches.batch, caches.kv_heads, caches.group, caches.dim)
    if not as_rows:
        query = query.flatten(2, 3).unsqueeze(3)

    def call(number: int) -> Tensor:
        copy = number % caches.copies
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                query[copy], keys[copy], values[copy], scale=caches.scale, enable_gqa=not as_rows
            )
        return out.reshape(caches.sequences, caches.group, 1, caches.dim)

    return call


def flash_attn_4(splits: int, caches: Caches) -> Callable[[int], Tensor]:
    """flash-attn-4 with its own number of splits (0), or none (1)."""
    reason = fa4.dense_unavailable_reason(caches.keys.device.type, caches.dim, caches.keys.dtype)
    if reason is not None:
        raise RuntimeError(reason)
    from flash_attn.cute.interface import flash_attn_func

    shape = (caches.copies, caches.batch, caches.kv_heads, caches.length, caches.dim)
    keys, values = (states.view(shape).transpose(2, 3) for states in (caches.keys, caches.values))
    query = caches.query.view(caches.copies, caches.batch, 1, caches.kv_heads * caches.group, caches.dim)

    def call(number: int) -> Tensor:
        copy = number % caches.copies
        out = flash_attn_func(
            query[copy], keys[copy], values[copy], softmax_scale=caches.scale, causal=False, num_splits=splits
        )
        out = out[0] if isinstance(out, tuple) else out
        return out.reshape(caches.sequences, caches.group, 1, caches.dim)

    return call


def own(caches: Caches) -> Callable[[int], Tensor]:
    return lambda number: paged_decode(caches.query[number % caches.copies], caches.kv(number), scale=caches.scale)[0]


#: Candidate -> ways to ask for it.
DENSE: dict[str, dict[str, Callable[[Caches], Callable[[int], Tensor]]]] = {
    "SDPA cuDNN": {
        "heads": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION, False),
        "rows": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION, True),
    },
    "SDPA flash": {
        "heads": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION, False),
        "rows": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION, True),
    },
    "flash-attn-4": {
        "its splits": functools.partial(flash_attn_4, 0),
        "one split": functools.partial(flash_attn_4, 1),
    },
    "paged_decode": {"": own},
}
CUDNN = "SDPA cuDNN"
#: Of a Quest step, in their order.
PARTS = ("append", "choose", "read")


def measure_dense(caches: Caches, options: argparse.Namespace) -> list[Row]:
    """A row per candidate: the fastest way to ask for it, or why there is none."""
    rows = []
    for name, ways in DENSE.items():
        found: dict[str, Row] = {}
        for way, prepare in ways.items():
            call = None
            try:
                with warnings.catch_warnings():  # they say why a backend refuses, which the error says too
                    warnings.simplefilter("ignore")
                    call = prepare(caches)
                    error = checked(caches.expected(call(0), caches.kv(0), None), options.dtype)
                    found[way] = {**measure(call, caches.calls, options), "relative_error": error}
            except Exception as error:
                found[way] = {"failed": reason_of(error)}
        row = {"kind": "dense", "name": name, "batch": caches.batch, "length": caches.length, "bytes": caches.bytes}
        times = {way: entry["us"] for way, entry in found.items() if "us" in entry}
        if times:
            best = min(times, key=times.__getitem__)
            row |= {**found[best], "way": best, "ways": times}
        else:
            row["failed"] = "; ".join(dict.fromkeys(entry["failed"] for entry in found.values()))
        rows.append(row)
    return rows


# --- Quest and eviction --------------------------------------------------------------------------------------------


def new_bounds(caches: Caches, page: int) -> list[PageBounds]:
    """Page bounds of every copy."""
    found = []
    for copy in range(caches.copies):
        kv = caches.kv(copy)
        bounds = PageBounds.empty([-(-caches.length // page)] * caches.sequences, kv.keys, page)
        update_bounds(kv, bounds, torch.zeros_like(kv.lengths))
        found.append(bounds)
    return found


def check_selection(selection: Reads, scores: Tensor, complete: int, budget: PageBudget, length: int) -> None:
    """Raise unless the pages have the best scores, the number is right, and the current page is the last."""
    keep = budget.keep or 0.0
    wanted = min(complete, max(0, round(keep * length / budget.page_size) - 1)) + 1
    for sequence in sorted({0, len(scores) // 2, len(scores) - 1}):
        count = int(selection.counts[sequence, 0, 0])
        pages = selection.ids[sequence, 0, 0, :count].long()
        best = scores[sequence, 0, 0, :complete].topk(count - 1).values
        mine = scores[sequence, 0, 0, pages[:-1]].sort(descending=True).values
        if (
            abs(count - wanted) > 1
            or int(pages[-1]) != complete
            or len(pages.unique()) != count
            or not torch.allclose(mine, best, rtol=1e-4, atol=1e-3)
        ):
            raise ValueError(f"wrong pages: {count} of sequence {sequence} listed, about {wanted} expected, best first")


def measure_append(caches: Caches, bounds: list[PageBounds], options: argparse.Namespace) -> Row:
    def add(number: int) -> None:
        copy = number % caches.copies
        append(caches.kv(number), caches.new_key[copy], caches.new_value[copy], bounds[copy])

    add(0)
    kv, page = caches.kv(0), bounds[0].page_size
    last = kv.starts + kv.lengths.long() - 1
    held = kv.keys.view(caches.sequences, caches.length, caches.dim)[:, (caches.length - 1) // page * page :]
    high = bounds[0].high[bounds[0].first + (caches.length - 1) // page]
    if not torch.equal(kv.keys[last], caches.new_key[0, :, 0]) or not torch.equal(high, held.amax(1)):
        raise ValueError("wrong result: append wrote something else")
    return measure(add, caches.calls, options)


def measure_quest(
    caches: Caches, bounds: list[PageBounds], appended: Row, sparsity: float, options: argparse.Namespace
) -> Row:
    """One row: the parts of a Quest step, and the whole of it."""
    page = bounds[0].page_size
    row: Row = {"kind": "quest", "name": f"quest/{page}", "page": page, "batch": caches.batch,
                "length": caches.length, "sparsity": sparsity}  # fmt: skip
    try:
        method = Quest(page_size=page)

        def choose(number: int, new: bool = False) -> Reads:
            copy = number % caches.copies
            tokens = (caches.new_key[copy], caches.new_value[copy]) if new else None
            context = Decoding(caches.kv(number), caches.tokens, bounds[copy], caches.kv_heads, tokens, new)
            return select(method, caches.query[copy], context, sparsity=sparsity)

        selections = [choose(copy) for copy in range(caches.copies)]
        reads = torch.zeros(caches.sequences, 1, 1, dtype=torch.int32, device=options.device)

        def attend(number: int, selection: Reads) -> tuple[Tensor, str]:
            query = caches.query[number % caches.copies]
            return paged_decode(query, caches.kv(number), selection, scale=caches.scale, keys_read=reads)

        def read(number: int) -> tuple[Tensor, str]:
            return attend(number, selections[number % caches.copies])

        def whole(number: int) -> Tensor:
            return attend(number, choose(number, new=True))[0]

        complete = (caches.length - 1) // page
        scores = page_scores(
            caches.query[0], bounds[0], caches.kv(0), shared=True, pages=complete, backend="naive"
        )  # fmt: skip
        budget = PageBudget(page, None, 1 - sparsity, caches.kv_heads)
        check_selection(selections[0], scores, complete, budget, caches.length)
        out, row["backend"] = read(0)
        row["relative_error"] = checked(caches.expected(out, caches.kv(0), selections[0]), options.dtype)
        keys = int(reads.sum())
        element = caches.keys.element_size()
        row["measured_sparsity"] = 1 - keys / caches.sequences / caches.length
        row["key_value_bytes"] = keys * 2 * caches.dim * element
        row["bound_bytes"] = bound_bytes(caches.length, page, caches.sequences, caches.dim, element)
        row["bytes"] = row["key_value_bytes"] + row["bound_bytes"]
        found = {
            "append": appended,
            "choose": measure(choose, caches.calls, options),
            "read": measure(read, caches.calls, options),
        }
        row["parts"] = {name: found[name]["us"] for name in PARTS}
        out = whole(0)
        if not torch.equal(out, attend(0, choose(0))[0]):
            raise ValueError("wrong result: it is another one when calls run into each other")
        row |= measure(whole, caches.calls, options)
        if others := sorted({entry["timed"] for entry in found.values()} - {row["timed"]}):
            row["parts_timed"] = others
    except Exception as error:
        row["failed"] = reason_of(error)
    return row


def bound_bytes(length: int, page: int, sequences: int, dim: int, element: int) -> int:
    """Bytes of the bounds of all complete pages before the current one: two numbers per dimension and page."""
    return sequences * ((length - 1) // page) * 2 * dim * element


def measure_eviction(caches: Caches, sparsity: float, options: argparse.Namespace) -> Row:
    """One row: dense attention over what eviction has left."""
    row: Row = {"kind": "eviction", "name": "eviction", "batch": caches.batch, "length": caches.length,
                "sparsity": sparsity}  # fmt: skip
    try:
        kv, keys = caches.evicted(sparsity)

        def call(number: int) -> Tensor:
            return paged_decode(caches.query[number % caches.copies], kv(number), scale=caches.scale)[0]

        row["relative_error"] = checked(caches.expected(call(0), kv(0), None), options.dtype)
        row["measured_sparsity"] = 1 - keys / caches.sequences / caches.length
        row["bytes"] = keys * 2 * caches.dim * caches.keys.element_size()
        row |= measure(call, caches.calls, options)
    except Exception as error:
        row["failed"] = reason_of(error)
    return row


# --- the run -------------------------------------------------------------------------------------------------------


def compared(rows: list[Row], copy_tb_s: float) -> list[Row]:
    """Rows of one batch and length with GB/s, their share of the copy bandwidth, and speed-ups over dense attention."""
    times = {row["name"]: row["us"] for row in rows if row["kind"] == "dense" and "us" in row}
    fastest = min(times, key=times.__getitem__) if times else None
    for row in rows:
        if "us" in row:
            row["gb_s"] = row["bytes"] / row["us"] / 1e3
            row["of_copy"] = row["gb_s"] / copy_tb_s / 1e3
            row["over_cudnn"] = times[CUDNN] / row["us"] if CUDNN in times else None
            row["over_fastest"] = times[fastest] / row["us"] if fastest else None
            row["fastest"] = fastest
    return rows


def targets(rows: list[Row]) -> list[Row]:
    """P6 for every batch that it names: what was found, and whether that is enough; None where not measured."""
    answers = []
    for batch, wanted in P6:
        found = [
            row.get("over_cudnn")
            for row in rows
            if (row["name"], row["batch"], row["length"], row.get("sparsity")) == ("quest/16", batch, 131072, 0.95)
        ]
        times = found[0] if found else None
        answers.append(
            {"target": "P6", "batch": batch, "wanted": wanted, "found": times,
             "reached": None if times is None else times >= wanted}
        )  # fmt: skip
    return answers


def device_facts(options: argparse.Namespace) -> Row:
    """What ran, and its copy bandwidth in this run (bytes read and written)."""
    size = 1 << (32 if options.device == "cuda" else 26)
    source = torch.zeros(size, dtype=torch.int8, device=options.device)
    target = torch.empty_like(source)
    found = measure(lambda number: target.copy_(source), 1, options)
    if options.device == "cuda":
        name, more = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).multi_processor_count
    else:
        name, more = f"CPU, {torch.get_num_threads()} threads", None
    return {"name": name, "multiprocessors": more, "copy_tb_s": 2 * size / found["us"] / 1e6}


def line(row: Row) -> str:
    where = f"{row['batch']:>3} {short(row['length']):>5} {row['name']:<13} {row.get('sparsity', 0):<5g}"
    if "us" not in row:
        return f"{where} not measured: {row['failed']}"
    parts = " + ".join(f"{name} {us:.1f}" for name, us in row.get("parts", {}).items())
    over = "" if row.get("over_cudnn") is None else f" {row['over_cudnn']:5.2f}x cuDNN"
    how = "" if row["timed"] != "launched" else " (launched)"
    return f"{where} {row['us']:9.1f} us{how} {row['gb_s']:6.0f} GB/s{over} {row.get('way', '')}{parts}"


@torch.no_grad()
def run(options: argparse.Namespace, save: Callable[[Row], None]) -> Row:
    """Measure; what is there is saved after each length, so that a run cut short is not lost."""
    content: Row = {
        "finished": False,
        "device": device_facts(options),
        "versions": versions(),
        "shape": {key: getattr(options, key) for key in ("heads", "kv_heads", "head_dim", "dtype")},
        "lengths": options.lengths,
        "batches": options.batches,
        "sparsities": options.sparsities,
        "page_size": options.page_size,
        "rows": [],
    }
    say(f"{content['device']['name']}: copy {content['device']['copy_tb_s']:.2f} TB/s")
    begin = time.perf_counter()
    # What the targets are about comes first, and last what has more numbers than 32 bits count: a library that does not
    # expect that may end with an error after which the device is lost.
    cells = [(length, batch) for batch in options.batches for length in options.lengths]
    width = options.kv_heads * options.head_dim
    cells.sort(key=lambda cell: (cell[0] * cell[1] * width >= 1 << 31, cell[1], -cell[0]))
    for length, batch in cells:
        if time.perf_counter() - begin > 60 * options.minutes:
            say(f"{options.minutes:g} minutes are over")
            content["rows"].append({"kind": "all", "name": "all", "batch": batch, "length": length,
                                    "failed": f"{options.minutes:g} minutes were over"})  # fmt: skip
            continue
        try:
            rows = compared(measure_cell(batch, length, options), content["device"]["copy_tb_s"])
        except Exception as error:  # memory
            rows = [{"kind": "all", "name": "all", "batch": batch, "length": length, "failed": reason_of(error)}]
        for row in rows:
            say(line(row))
        content["rows"] += rows
        content["targets"] = targets(content["rows"])
        save(content)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    content["seconds"] = time.perf_counter() - begin
    content["finished"] = True
    save(content)
    return content


def measure_cell(batch: int, length: int, options: argparse.Namespace) -> list[Row]:
    caches = Caches(batch, length, options)
    rows = measure_dense(caches, options)
    rows += [measure_eviction(caches, sparsity, options) for sparsity in options.sparsities]
    for page in (options.page_size, *options.other_pages):
        sparsities = options.sparsities
        if page != options.page_size:
            if length not in options.page_lengths or batch not in options.page_batches:
                continue
            sparsities = [sparsity for sparsity in sparsities if sparsity >= 0.9] or sparsities[-1:]
        try:
            bounds = new_bounds(caches, page)
            appended = measure_append(caches, bounds, options)
        except Exception as error:
            rows.append({"kind": "quest", "name": f"quest/{page}", "page": page, "batch": batch, "length": length,
                         "failed": reason_of(error)})  # fmt: skip
            continue
        rows += [measure_quest(caches, bounds, appended, sparsity, options) for sparsity in sparsities]
    return rows


# --- what comes out ------------------------------------------------------------------------------------------------


def us(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def times_faster(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def markdown(content: Row) -> str:
    """The tables, from the content of the JSON file."""
    device, shape, rows = content["device"], content["shape"], content["rows"]
    lengths = sorted(content["lengths"])
    known = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version)
    lines = [
        "# Sparse decoding, one layer, one token",
        "",
        f"{device['name']} (copy {device['copy_tb_s']:.2f} TB/s in this run); {known}. {shape['heads']} query heads, "
        f"{shape['kv_heads']} KV heads, head_dim {shape['head_dim']}, {shape['dtype']}. Made by "
        "`benchmarks/decode.py`, whose head says how times are taken. Times are in microseconds.",
        "",
    ]
    if not content["finished"]:
        lines += ["**The run was cut short.**", ""]
    lines += ["## Targets", ""]
    lines += table(
        ["", "Quest, 128K, .95, selection included, over cuDNN", "found", ""],
        [
            [answer["target"], f"batch {answer['batch']}: at least {answer['wanted']:g}x",
             times_faster(answer["found"]),
             {True: "reached", False: "**missed**", None: "not measured"}[answer["reached"]]]
            for answer in content.get("targets", targets(rows))
        ],
    )  # fmt: skip
    for batch in content["batches"]:
        own_rows = [row for row in rows if row["batch"] == batch]
        at = {(row["name"], row.get("sparsity"), row["length"]): row for row in own_rows}
        lines += [f"## Batch {batch}", "", "Dense attention (share of the copy bandwidth):", ""]
        body = []
        for name in DENSE:
            cells = []
            for length in lengths:
                row = at.get((name, None, length), {})
                cell = f"{us(row['us'])}{mark(row)} ({row['of_copy']:.0%})" if "us" in row else "-"
                cells.append(f"**{cell}**" if row.get("fastest") == name else cell)
            body.append([name, *cells])
        lines += table(["", *map(short, lengths)], body)
        quest = f"quest/{content['page_size']}"
        for name, title in ((quest, "Quest, the whole step"), ("eviction", "After eviction, unequal heads")):
            body = []
            for sparsity in content["sparsities"]:
                cells = []
                for length in lengths:
                    row = at.get((name, sparsity, length), {})
                    cells.append(
                        f"{us(row['us'])}{mark(row)} ({times_faster(row['over_cudnn'])}, "
                        f"{times_faster(row['over_fastest'])})"
                        if "us" in row
                        else "-"
                    )
                body.append([f"{sparsity:g}", *cells])
            lines += [f"{title} (times faster than cuDNN, than the fastest dense):", ""]
            lines += table(["sparsity", *map(short, lengths)], body)

    detail = [
        "append us", "choose us", "read us", "whole us", "selection", "MB read", "GB/s", "of copy",
        "over cuDNN", "over dense",
    ]  # fmt: skip
    lines += [
        "## Where the time of a Quest step goes",
        "",
        "Parts are timed alone, the whole as the decode loop calls it, where they run into each other; `selection` is "
        "the share of appending and choosing in the sum of the parts; `MB read` are keys, values and page bounds.",
        "",
    ]
    for title, usual in (("", True), ("Other page sizes:", False)):
        chosen = [
            row for row in rows
            if row["kind"] == "quest" and "us" in row and (row["page"] == content["page_size"]) == usual
        ]  # fmt: skip
        if not chosen:
            continue
        body = []
        for row in sorted(chosen, key=lambda row: (row["batch"], -row["length"], row["page"], row["sparsity"])):
            parts = row["parts"]
            body.append(
                [str(row["batch"]), short(row["length"]), str(row["page"]), f"{row['sparsity']:g}",
                 f"{row['measured_sparsity']:.4f}", *(us(parts[name]) for name in PARTS),
                 us(row["us"]) + mark(row), f"{1 - parts['read'] / sum(parts.values()):.0%}",
                 f"{row['bytes'] / 1e6:.1f}", f"{row['gb_s']:.0f}", f"{row['of_copy']:.0%}",
                 times_faster(row["over_cudnn"]), times_faster(row["over_fastest"])]
            )  # fmt: skip
        lines += [title, ""] if title else []
        lines += table(["batch", "length", "page", "sparsity", "measured", *detail], body)

    ways: dict[str, list[str]] = {}
    for row in rows:
        if row.get("way") and len(DENSE[row["name"]]) > 1:
            ways.setdefault(f"{row['name']}, {row['way']}", []).append(f"{row['batch']} x {short(row['length'])}")
    if ways:
        lines += ["## Which way of asking was the fastest", ""]
        lines += [
            "`heads`: query heads as heads (`enable_gqa`); `rows`: the query heads of a KV head as rows of one head.",
            "",
            *(f"- {way}: {', '.join(places)}" for way, places in ways.items()),
            "",
        ]
    if launched := [row for row in rows if row.get("timed") == "launched"]:
        lines += ["* not captured in a graph, so launches count: "]
        lines[-1] += "; ".join(dict.fromkeys(f"{row['name']}: {row['not_captured']}" for row in launched))
        lines += [""]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "failed" in row:
            reasons.setdefault(f"{row['name']}: {row['failed']}", []).append(f"{row['batch']} x {short(row['length'])}")
    if reasons:
        lines += ["## Not measured", "", *(f"- {why} ({', '.join(places)})" for why, places in reasons.items()), ""]
    return "\n".join(lines)


def mark(row: Row) -> str:
    return "\\*" if row.get("timed") == "launched" else ""


def draw(content: Row, path: Path) -> None:
    """Above, speed-ups over cuDNN against length; below, the parts of a Quest step at the largest sparsity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, lengths = content["rows"], sorted(content["lengths"])
    batches = [batch for batch in content["batches"] if batch in (1, 8)] or content["batches"][:2]
    quest, largest = f"quest/{content['page_size']}", max(content["sparsities"])
    figure, axes = plt.subplots(
        2, len(batches), figsize=(4.6 * len(batches) + 2, 7), squeeze=False, sharey="row", layout="constrained", dpi=130
    )
    for column, batch in enumerate(batches):
        axis, split = axes[0][column], axes[1][column]
        axis.axhline(1, color="black", linestyle="--", linewidth=1, label="cuDNN, dense")
        for place, sparsity in enumerate(content["sparsities"]):
            for name, style in ((quest, "-"), ("eviction", ":")):
                points = sorted(
                    (row["length"], row["over_cudnn"])
                    for row in rows
                    if (row["name"], row["batch"], row.get("sparsity")) == (name, batch, sparsity)
                    and row.get("over_cudnn")
                )
                if points:
                    label = f"{'Quest' if name == quest else 'eviction'}, {sparsity:g}"
                    axis.plot(
                        *zip(*points, strict=True), style, marker="o", markersize=4, color=f"C{place}", label=label
                    )
        wanted = dict(P6).get(batch)
        if wanted and 131072 in lengths:
            axis.plot(
                [131072], [wanted], marker="_", markersize=16, color="black", linestyle="none", label="target P6, .95"
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(lengths, [short(length) for length in lengths])
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.set_xlabel("keys")
        axis.grid(alpha=0.25)
        steps = {
            row["length"]: row
            for row in rows
            if (row["name"], row["batch"], row.get("sparsity")) == (quest, batch, largest) and "us" in row
        }
        shown = [length for length in lengths if length in steps]
        bottom = [0.0] * len(shown)
        for name in PARTS:
            shares = [steps[length]["parts"][name] / sum(steps[length]["parts"].values()) for length in shown]
            split.bar(range(len(shown)), shares, bottom=bottom, label=name, width=0.7)
            bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
        split.set_xticks(range(len(shown)), [f"{short(length)}\n{us(steps[length]['us'])} µs" for length in shown])
        split.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        split.set_title(f"parts of a Quest step, sparsity {largest:g} (below: the whole)", fontsize=9)
    axes[0][0].set_ylabel("times faster, selection included")
    axes[1][0].set_ylabel("share of the parts' time")
    for axis in axes[:, -1]:
        handles, labels = axis.get_legend_handles_labels()
        if handles:
            axis.legend(handles, labels, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=8)
    shape = content["shape"]
    figure.suptitle(
        f"Decode attention, {content['device']['name']}, {shape['heads']} query and {shape['kv_heads']} KV heads, "
        f"head_dim {shape['head_dim']}, {shape['dtype']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 4096 to 131072; on a CPU 512 and 1024")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1 8 32; on a CPU 1 and 2")
    parser.add_argument("--sparsities", type=float, nargs="+", help="default: 0.5 0.8 0.9 0.95")
    parser.add_argument("--page_size", type=int, default=16)
    parser.add_argument("--other_pages", type=int, nargs="*", default=[32, 64], help="for the smaller table")
    parser.add_argument("--page_lengths", type=int, nargs="*", help="default: 32768 and 131072; on a CPU the longest")
    parser.add_argument("--page_batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--heads", type=int, help="default: 32; on a CPU 8")
    parser.add_argument("--kv_heads", type=int, help="default: 8; on a CPU 2")
    parser.add_argument("--head_dim", type=int, help="default: 128; on a CPU 64")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), help="default: bfloat16; on a CPU float32")
    parser.add_argument("--calls", type=int, help=f"calls in a graph, at most; default: {CALLS}; on a CPU 2")
    parser.add_argument(
        "--budget", type=float, default=100.0, help="milliseconds of calls behind each figure, at least"
    )
    parser.add_argument("--memory", type=float, default=48.0, help="GiB for copies of keys and values")
    parser.add_argument("--minutes", type=float, default=6.0, help="no further cell is begun after so many")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="8K and 128K (on a CPU 512), batch 1 and 8 (on a CPU 1), 0.9 and 0.95, one page size",
    )
    parser.add_argument("--output", type=Path, help="folder for decode_cuda.json (or decode_cpu.json) and its .md")
    parser.add_argument(
        "--picture", type=Path, help=f"drawn at the end of a run on a GPU with --output: {PICTURE.name}"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw --picture, and the .md beside this JSON, from it alone"
    )
    options = parser.parse_args(arguments)
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = options.device == "cuda"
    if options.quick:
        options.lengths = options.lengths or ([8192, 131072] if gpu else [512])
        options.batches = options.batches or ([1, 8] if gpu else [1])
        options.sparsities, options.other_pages = options.sparsities or [0.9, 0.95], []
    defaults = {
        "lengths": (list(LENGTHS), [512, 1024]),
        "batches": ([1, 8, 32], [1, 2]),
        "sparsities": ([0.5, 0.8, 0.9, 0.95], [0.5, 0.8, 0.9, 0.95]),
        "heads": (32, 8),
        "kv_heads": (8, 2),
        "head_dim": (128, 64),
        "dtype": ("bfloat16", "float32"),
        "calls": (CALLS, 2),
    }
    for name, (on_gpu, on_cpu) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, on_gpu if gpu else on_cpu)
    if options.page_lengths is None:
        options.page_lengths = [32768, 131072] if gpu else [max(options.lengths)]
    check_options(
        parser, options, "lengths", "batches", "page_size", "other_pages", "page_lengths", "page_batches", "heads",
        "kv_heads", "head_dim", "calls", "budget", "memory", "minutes",
    )  # fmt: skip
    if options.heads % options.kv_heads:
        parser.error(f"--heads {options.heads} is not a multiple of --kv_heads {options.kv_heads}")
    if not all(0 <= sparsity < 1 for sparsity in options.sparsities):
        parser.error(f"--sparsities {options.sparsities}: give numbers from 0 to below 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    if options.plot is not None:
        if not options.plot.is_file():
            print(f"--plot {options.plot}: there is no such file; give a JSON that --output wrote", file=sys.stderr)
            return 1
        content = json.loads(options.plot.read_text())
        picture = options.picture or PICTURE
        write(options.plot.with_suffix(".md"), markdown(content))
        draw(content, picture)
        print(f"{options.plot.with_suffix('.md')} and {picture} written")
        return 0

    def save(content: Row) -> None:
        if options.output and any("us" in row for row in content["rows"]):
            write(options.output / f"decode_{options.device}.json", json.dumps(content, indent=1) + "\n")
            write(options.output / f"decode_{options.device}.md", markdown(content))

    content = run(options, save)
    measured = any("us" in row for row in content["rows"])
    picture = options.picture or (PICTURE if options.output and options.device == "cuda" else None)
    if picture is not None and measured:
        draw(content, picture)
    if not options.output or not measured:
        print(markdown(content))
    if not measured:
        print("nothing could be measured: the reasons are above", file=sys.stderr)
        return 1
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
