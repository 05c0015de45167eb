"""Kernel for Hopper GPUs and tiles of 64 x 64 or 128 x 128, in Triton's Gluon language, with specialised warps.

To keep the matrix units busy, every program stays on its multiprocessor and takes one query block after the other. One
warp fetches queries, keys and values with the bulk copy engine; groups of four warps own 64 queries each, compute the
scores of one key block while the products of the last one with its values are still running, and share what is fetched.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..types import Blocks
from . import naive
from .schedule import order_programs
from .triton import add_columns

logger = logging.getLogger(__name__)

LOG2_E = 1.4426950408889634
#: Blocks of keys, and of values, that are fetched ahead.
STAGES = 2
#: The name of the copy changed between releases of Triton.
fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _produce(given, stages: gl.constexpr):
    """Fetch what the consumers need, in their order: the last key block of a list first."""
    descriptors, buffers, bars, lists, numbers, group = given
    query, key, value = descriptors
    queries, keys, values = buffers
    blocks, width, _, _, items = numbers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    order, ids, counts = lists
    height: gl.constexpr = queries.shape[2]
    tile: gl.constexpr = keys.shape[2]
    dim: gl.constexpr = keys.shape[3]
    size: gl.constexpr = tile * dim * 2
    turn = 0
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        code = gl.load(order + item)
        head = code // blocks
        count = gl.load(counts + code)
        listed = ids + code.to(gl.int64) * width
        block = gl.load(listed + count - 1)
        mbarrier.wait(q_empty.index(turn % 2), ((turn // 2) & 1) ^ 1)
        mbarrier.expect(q_full.index(turn % 2), height * dim * 2)
        fetch(query, [head, code % blocks * height, 0], q_full.index(turn % 2), queries.index(turn % 2))
        turn += 1  # noqa: SIM113 - Gluon has no enumerate
        for i in range(count):
            following = gl.load(listed + gl.maximum(count - 2 - i, 0))
            stage = step % stages
            phase = ((step // stages) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), size)
            fetch(key, [head // group, block * tile, 0], k_full.index(stage), keys.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), size)
            fetch(value, [head // group, block * tile, 0], v_full.index(stage), values.index(stage))
            block = following
            step += 1


@gluon.jit
def _multiply(queries, turn, keys, step, part: gl.constexpr, stages: gl.constexpr):
    """Start the scores of a key block, `(64, tile)`."""
    height: gl.constexpr = queries.shape[2]
    tile: gl.constexpr = keys.shape[2]
    dim: gl.constexpr = keys.shape[3]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile, 16])
    mine = queries.index(turn % 2).reshape([height, dim]).slice(part * 64, 64)
    key = keys.index(step % stages).reshape([tile, dim]).permute([1, 0])
    blank = gl.zeros([64, tile], gl.float32, layout)
    return warpgroup_mma(mine, key, blank, use_acc=False, is_async=True)


@gluon.jit
def _accumulate(weights, values, acc, step, stages: gl.constexpr):
    """Start adding the values of a key block, weighted."""
    tile: gl.constexpr = values.shape[2]
    dim: gl.constexpr = values.shape[3]
    return warpgroup_mma(weights, values.index(step % stages).reshape([tile, dim]), acc, is_async=True)


@gluon.jit
def _begin(scores, first, block, scale):
    """Softmax of the first block that is read: the last of the list, the only one that can reach beyond a query."""
    layout: gl.constexpr = scores.type.layout
    tile: gl.constexpr = scores.shape[1]
    at = first + gl.arange(0, 64, gl.SliceLayout(1, layout))
    keys_at = block * tile + gl.arange(0, tile, gl.SliceLayout(0, layout))
    scores = gl.where(keys_at[None, :] <= at[:, None], scores, float("-inf"))
    peak = gl.max(scores, 1)
    weights = gl.exp2(scores * scale - (peak * scale)[:, None])
    return weights, peak, gl.sum(weights, 1)


@gluon.jit
def _continue(
    acc, w, peak, total, queries, turn, keys, values, bars, step, count, scale, guard, part, stages: gl.constexpr
):
    """All blocks of a list but the first one read; the weights of the last one are left to be used."""
    dtype: gl.constexpr = queries.dtype
    out_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    weight_layout: gl.constexpr = w.type.layout
    paired: gl.constexpr = queries.shape[2] == 128
    for _ in range(1, count):
        mbarrier.wait(bars[2].index((step + 1) % stages), ((step + 1) // stages) & 1)
        scores = _multiply(queries, turn, keys, step + 1, part, stages)
        mbarrier.wait(bars[4].index(step % stages), (step // stages) & 1)
        running = _accumulate(w, values, acc, step, stages)
        scores = warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(bars[3].index((step + 1) % stages), count=1)
        highest = gl.maximum(peak, gl.max(scores, 1))
        shrink = gl.exp2((peak - highest) * scale)
        weights = gl.exp2(scores * scale - (highest * scale)[:, None])
        total = total * shrink + gl.sum(weights, 1)
        peak = highest
        if paired:
            # Never done: it keeps the assembler from waiting for the values before it computes the weights.
            gl.store(guard + gl.arange(0, 64, total.type.layout), total.to(dtype), mask=total < 0)
            gl.thread_barrier()
        acc = warpgroup_mma_wait(0, [running])
        mbarrier.arrive(bars[5].index(step % stages), count=1)
        acc = acc * gl.convert_layout(shrink, out_row)[:, None]
        w = gl.convert_layout(weights.to(dtype), weight_layout)
        step += 1
    return acc, w, peak, total, step


@gluon.jit
def _finish(acc, peak, total, place_out, head, first, length, scale, keeps_sums: gl.constexpr):
    out, out_head, out_token, sums = place_out
    layout: gl.constexpr = acc.type.layout
    out_row: gl.constexpr = gl.SliceLayout(1, layout)
    rows = first + gl.arange(0, 64, out_row)
    dims = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    places = out + head.to(gl.int64) * out_head + rows.to(gl.int64)[:, None] * out_token + dims[None, :]
    inside = rows < length
    acc = acc / gl.convert_layout(total, out_row)[:, None]
    gl.store(places, acc.to(out.dtype.element_ty), mask=inside[:, None])
    if keeps_sums:
        found = gl.convert_layout(peak * scale + gl.log2(total), out_row)
        gl.store(sums + head.to(gl.int64) * length + rows, found, mask=inside)


@gluon.jit
def _consume(
    part: gl.constexpr, buffers, bars, lists, place_out, numbers, stages: gl.constexpr, keeps_sums: gl.constexpr
):
    """Attention of 64 queries of a query block, for one query block after the other.

    The first scores of a query block are computed before the last values of the one before are added.
    """
    queries, keys, values = buffers
    order, ids, counts = lists
    out = place_out[0]
    blocks, width, length, scale, items = numbers
    height: gl.constexpr = queries.shape[2]
    dim: gl.constexpr = keys.shape[3]
    dtype: gl.constexpr = queries.dtype
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    item = gl.program_id(0)
    code = gl.load(order + item)
    count = gl.load(counts + code)
    block = gl.load(ids + code.to(gl.int64) * width + count - 1)
    first = code % blocks * height + part * 64
    turn = 0
    step = 0
    mbarrier.wait(bars[0].index(0), 0)
    mbarrier.wait(bars[2].index(0), 0)
    scores = _multiply(queries, turn, keys, step, part, stages)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(bars[3].index(0), count=1)
    weights, peak, total = _begin(scores, first, block, scale)
    w = gl.convert_layout(weights.to(dtype), weight_layout)
    acc = gl.zeros([64, dim], gl.float32, out_layout)
    for following in range(item + gl.num_programs(0), items, gl.num_programs(0)):
        acc, w, peak, total, step = _continue(
            acc, w, peak, total, queries, turn, keys, values, bars, step, count, scale, out, part, stages
        )
        mbarrier.arrive(bars[1].index(turn % 2), count=1)
        turn += 1
        next_code = gl.load(order + following)
        count = gl.load(counts + next_code)
        block = gl.load(ids + next_code.to(gl.int64) * width + count - 1)
        next_first = next_code % blocks * height + part * 64
        mbarrier.wait(bars[0].index(turn % 2), (turn // 2) & 1)
        mbarrier.wait(bars[2].index((step + 1) % stages), ((step + 1) // stages) & 1)
        scores = _multiply(queries, turn, keys, step + 1, part, stages)
        mbarrier.wait(bars[4].index(step % stages), (step // stages) & 1)
        running = _accumulate(w, values, acc, step, stages)
        scores = warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(bars[3].index((step + 1) % stages), count=1)
        weights, next_peak, next_total = _begin(scores, next_first, block, scale)
        acc = warpgroup_mma_wait(0, [running])
        mbarrier.arrive(bars[5].index(step % stages), count=1)
        w = gl.convert_layout(weights.to(dtype), weight_layout)
        _finish(acc, peak, total, place_out, code // blocks, first, length, scale, keeps_sums)
        acc = gl.zeros([64, dim], gl.float32, out_layout)
        peak = next_peak
        total = next_total
        code = next_code
        first = next_first
        step += 1
    acc, w, peak, total, step = _continue(
        acc, w, peak, total, queries, turn, keys, values, bars, step, count, scale, out, part, stages
    )
    mbarrier.wait(bars[4].index(step % stages), (step // stages) & 1)
    running = _accumulate(w, values, acc, step, stages)
    acc = warpgroup_mma_wait(0, [running])
    _finish(acc, peak, total, place_out, code // blocks, first, length, scale, keeps_sums)


@gluon.jit(do_not_specialize=["length", "blocks", "width", "items", "group"])
def _attend(
    query,
    key,
    value,
    out,
    ids,
    counts,
    order,
    out_head,
    out_token,
    length,
    blocks,
    width,
    items,
    scale,
    group,
    sums,
    stages: gl.constexpr,
    keeps_sums: gl.constexpr,
):
    dtype: gl.constexpr = query.dtype
    height: gl.constexpr = query.block_type.shape[1]
    tile: gl.constexpr = key.block_type.shape[1]
    dim: gl.constexpr = key.block_type.shape[2]
    parts: gl.constexpr = height // 64
    queries = gl.allocate_shared_memory(dtype, [2, 1, height, dim], query.layout)
    keys = gl.allocate_shared_memory(dtype, [stages, 1, tile, dim], key.layout)
    values = gl.allocate_shared_memory(dtype, [stages, 1, tile, dim], value.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for turn in gl.static_range(2):
        mbarrier.init(q_full.index(turn), count=1)
        mbarrier.init(q_empty.index(turn), count=parts)
    for stage in gl.static_range(stages):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=parts)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=parts)
    fence_async_shared()
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    buffers = (queries, keys, values)
    lists = (order, ids, counts)
    place = (out, out_head, out_token, sums)
    # A literal part stays a constant only where the tuple is written.
    numbers = (blocks, width, length, scale, items)
    fetching = ((query, key, value), buffers, bars, lists, numbers, group)
    if parts == 2:
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), buffers, bars, lists, place, numbers, stages, keeps_sums)),
                (_consume, (gl.constexpr(1), buffers, bars, lists, place, numbers, stages, keeps_sums)),
                (_produce, (fetching, stages)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (gl.constexpr(0), buffers, bars, lists, place, numbers, stages, keeps_sums)),
                (_produce, (fetching, stages)),
            ],
            [1],
            [24],
        )


#: Sizes of query and key blocks that the kernel takes.
BLOCKS = ((64, 64), (128, 128))


@functools.cache
def unavailable_reason(device: str, block_q: int, block_k: int, dim: int, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run here, or None when it can. The first call for these arguments compiles and probes."""
    if device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        return "it needs a Hopper GPU (compute capability 9.0)"
    if (block_q, block_k) not in BLOCKS:
        return f"it takes blocks of {' or '.join(f'{q}x{k}' for q, k in BLOCKS)}, not {block_q}x{block_k}"
    if dim not in (64, 128):
        return f"it takes head_dim 64 or 128, not {dim}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes torch.float16 or torch.bfloat16, not {dtype}"
    heads, length = 4, 3 * block_q + 1
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(n, length, dim, generator=generator).to(device, dtype) for n in (heads, 2, 2)]
    blocks = torch.arange(-(-length // block_q))
    mask = (torch.rand(heads, len(blocks), len(blocks), generator=generator) < 0.5) & (blocks <= blocks[:, None])
    mask |= blocks == blocks[:, None]
    layout = Blocks.from_mask(mask.to(device), length, block_q, block_k)
    try:
        out = forward(*states, layout, dim**-0.5, None)
    except Exception as error:  # Gluon changes between releases of Triton; the portable kernel still works
        reason = f"it does not compile or run with Triton {triton.__version__} ({_last_line(error)})"
        logger.warning("the Hopper kernel is not used: %s", reason)
        return reason
    expected = naive.forward(*(state.float() for state in states), layout, dim**-0.5, None)
    if not torch.allclose(out.float(), expected, atol=3e-2):
        logger.warning("the Hopper kernel is not used: it computed a wrong result for a known case")
        return "it computed a wrong result for a known case"
    return None


def _last_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[-1][:200]


def misaligned(tensors: Iterable[Tensor]) -> bool:
    """Whether the copy engine cannot fetch from one of `(H, L, D)` tensors: it wants steps of 16 bytes."""
    return any(
        state.stride(2) != 1 or state.data_ptr() % 16 or state.stride(0) % 8 or state.stride(1) % 8 for state in tensors
    )


def forward(query: Tensor, key: Tensor, value: Tensor, layout: Blocks, scale: float, softcap: float | None) -> Tensor:
    """See `block_sparse_prefill`. Half precision, head_dim 64 or 128, tiles of 64 x 64 or 128 x 128, no softcap."""
    out = torch.empty_like(query)
    forward_into(query, key, value, layout, scale, out)
    return out


def forward_into(query: Tensor, key: Tensor, value: Tensor, layout: Blocks, scale: float, out: Tensor) -> None:
    """`forward` into a given tensor of any strides."""
    heads, length, dim = query.shape
    # Single columns are added by the portable kernel, which needs to know the sums of the softmax over the tiles.
    sums = None if layout.columns is None else query.new_empty(heads, length, dtype=torch.float32)
    group = heads // key.shape[0]
    kind = gl.bfloat16 if query.dtype == torch.bfloat16 else gl.float16
    sizes = (layout.block_q, layout.block_k, layout.block_k)
    states = [_described(state, size, kind) for state, size in zip((query, key, value), sizes, strict=True)]
    ids, counts = layout.indices.contiguous(), layout.counts.contiguous()
    items = heads * layout.blocks_q
    # Programs of 64 queries are small enough for two on a multiprocessor.
    parts = layout.block_q // 64
    programs = torch.cuda.get_device_properties(query.device).multi_processor_count * (2 // parts)
    _attend[(min(items, programs),)](
        *states,
        out,
        ids,
        counts,
        order_programs(counts, group),
        out.stride(0),
        out.stride(1),
        length,
        layout.blocks_q,
        ids.shape[-1],
        items,
        scale * LOG2_E,
        group,
        out if sums is None else sums,
        stages=STAGES,
        keeps_sums=sums is not None,
        num_warps=4,
        maxnreg=168 if parts == 2 else 128,
    )
    if sums is not None:
        add_columns(query, key, value, layout, scale, out, sums)


def _described(states: Tensor, size: int, kind: gl.dtype) -> TensorDescriptor:
    """How the copy engine finds blocks of `size` tokens; what lies behind the last token is read as zeros."""
    shape = [1, size, states.shape[-1]]
    form = gl.NVMMASharedLayout.get_default_for(shape, kind)
    return TensorDescriptor(states, list(states.shape), list(states.stride()), shape, form)
