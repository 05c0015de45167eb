"""Triton kernels of `top_p_blocks`: the choice, its solve and the layout stay on the device.

Ranks of verticals and slashes (`ranks_triton`) and maps of query-aware heads (`maps_triton`) go into a solve that is
one program (`solve_triton`). Passes over the maps count how many probabilities have which upper 15 bits, and which
lower 15 bits where the upper ones are those at the cut; what is left are equal values, which are told apart by place.
Kernels of query-aware heads are launched for all heads and end at once for the others.

The solve is `budget.bisect_share`, step by step, and not `budget.solve`: to sort all tiles of all maps, they would have
to be held.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...estimate.window_blocks.triton import LOG2E
from ...types import Blocks, causal_pairs
from .maps_triton import BINS, DEPTH, SIDE, count_tiles, pool_queries, probabilities, softmax_rows
from .ranks_triton import COUNTS, gains, rank_blocks
from .solve_triton import break_ties, refine, solve_share, tabulate

#: Lists of tiles have room for all blocks of a row up to this size; beyond it their longest is read from the device.
LIST_BYTES = 1 << 30
#: Programs that share the tiles of one row of tiles.
SPLITS = 8


@triton.jit(do_not_specialize=COUNTS)
def _emit(
    pooled, pooled_keys, aware, highest, inverse, cuts, places, ranks, numbers, indices, counts, key_head_stride,
    key_stride, group, heads, blocks, width, factor, cap, DIM: tl.constexpr, BD: tl.constexpr, CAPPED: tl.constexpr,
    LIST: tl.constexpr, MAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (head, rows): ascending lists of the rows' tiles, or only how long they are.

    Query-aware heads (MAPS) and the others are launched apart: the products of the former need many registers.
    """
    head = tl.program_id(0).to(tl.int64)
    if (tl.load(aware + head) != 0) == MAPS:
        tile = tl.num_programs(1) - 1 - tl.program_id(1)
        rows = tile * ROWS + tl.arange(0, ROWS)
        n_vertical = tl.load(numbers + head)
        n_slash = tl.load(numbers + heads + head)
        if MAPS:
            pooled += head * blocks * DIM
            pooled_keys += head // group * key_head_stride
            value = tl.load(cuts + head * 4 + 2)
            column = tl.load(places + head * 2)
            row = tl.load(places + head * 2 + 1)
            m = tl.load(highest + head * blocks + rows, mask=rows < blocks, other=0.0)
            inv = tl.load(inverse + head * blocks + rows, mask=rows < blocks, other=0.0)
        length = tl.zeros((ROWS,), tl.int32)
        lists = indices + (head * blocks + rows.to(tl.int64)) * width
        for first in range(0, tile * ROWS + ROWS, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            offset = rows[:, None] - columns[None, :]
            causal = (offset >= 0) & (rows < blocks)[:, None]
            vertical = tl.load(ranks + head * blocks + columns, mask=columns < blocks, other=0) < n_vertical
            slash = tl.load(ranks + (heads + head) * blocks + offset, mask=causal, other=0) < n_slash
            taken = (vertical | (columns == 0))[None, :] | slash | (offset == 0)
            if MAPS:
                bits = probabilities(
                    pooled, pooled_keys, key_stride, rows, columns, m, inv, blocks, factor, cap, DIM, BD, CAPPED
                )
                behind = (columns > column)[None, :] | ((columns == column)[None, :] & (rows <= row)[:, None])
                taken = taken | (bits > value) | ((bits == value) & behind)
            flags = (taken & causal).to(tl.int32)
            if LIST:
                place = length[:, None] + tl.cumsum(flags, 1) - 1
                ids = columns[None, :] + tl.zeros((ROWS, COLUMNS), tl.int32)
                tl.store(lists[:, None] + place, ids, mask=flags > 0)
            length += tl.sum(flags, 1)
        tl.store(counts + head * blocks + rows, length, mask=rows < blocks)


def select(
    query: Tensor,
    pooled_keys: Tensor,
    vertical: Tensor,
    slash: Tensor,
    query_aware: Tensor,
    block: int,
    scale: float,
    softcap: float | None,
    floor: int,
    ceiling: int,
    rest: float | None,
    density: float | None,
) -> tuple[Blocks, Tensor, Tensor]:
    """See `top_p_blocks.select`: the layout, gamma and rest, the latter two on the device."""
    heads, length, dim = query.shape
    blocks, device = vertical.shape[1], query.device
    group, last = heads // pooled_keys.shape[0], length - (blocks - 1) * block
    tiles = blocks * (blocks + 1) // 2
    # Pairs of the tiles that are not forced, over the block size.
    units = (blocks - 2) * (blocks - 1) // 2 * block - max(0, blocks - 2) * block + max(0, blocks - 2) * last
    forced = (blocks - 1) * (block * (block + 1) // 2) + last * (last + 1) // 2 + block * max(0, length - block)
    vertical, slash, aware = vertical.contiguous(), slash.contiguous(), query_aware.contiguous().view(torch.int8)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    keys = empty(2, 2 * heads, blocks, dtype=torch.float64)
    ranks = empty(2 * heads, blocks, dtype=torch.int32)
    grid = (2 * heads, triton.cdiv(blocks, 32))
    rank_blocks[grid](vertical, slash, keys[0], keys[1], ranks, heads, blocks, ITEMS=32, CHUNK=64, num_warps=4)
    if density is None:
        added = ranks
    else:
        added = empty(2 * heads, blocks, dtype=torch.int64)
        gains[grid](keys[0], ranks, aware, added, heads, blocks, block, last, ITEMS=32, CHUNK=64, num_warps=4)
        added = added.cumsum(-1)

    pooled = empty(heads, blocks, dim, dtype=torch.float32)
    softmax = empty(2, heads, blocks, dtype=torch.float32)
    padded = max(DEPTH.value, triton.next_power_of_2(dim))
    pool_queries[(heads, triton.cdiv(blocks, 8))](
        query, aware, pooled, query.stride(0), query.stride(1), length, blocks,
        DIM=dim, BD=padded, B=block, EACH=8, num_warps=4,
    )  # fmt: skip
    factor, cap = (scale * LOG2E, 0.0) if softcap is None else (scale / softcap, softcap * LOG2E)
    shape = {"DIM": dim, "BD": padded, "CAPPED": softcap is not None, "num_warps": 4, "num_stages": 1}
    strides = (pooled_keys.stride(0), pooled_keys.stride(1))
    states = (pooled, pooled_keys, aware, softmax[0], softmax[1])
    side = triton.cdiv(blocks, SIDE.value)
    softmax_rows[(heads, side)](*states, *strides, group, blocks, factor, cap, **shape)
    # Counters start from 0; each histogram, and the ties of each column, are a part of one buffer.
    bins = BINS.value
    zeros = torch.zeros(heads * (6 * bins + blocks), dtype=torch.int32, device=device)
    masses, counters = zeros[: 4 * heads * bins].view(torch.int64).view(2, heads, bins)
    sinks = zeros[4 * heads * bins : 5 * heads * bins]
    lower, ties = zeros[5 * heads * bins : 6 * heads * bins], zeros[6 * heads * bins :]
    cuts, places = empty(heads, 4, dtype=torch.int32), empty(heads, 2, dtype=torch.int32)
    counting = (*states, masses, counters, sinks, lower, ties, cuts, *strides, group, blocks, block, last, factor, cap)
    splits = (heads, side, min(side, SPLITS))
    count_tiles[splits](*counting, **shape, PASS=0)
    tails = empty(heads, bins, dtype=torch.float64)
    tabulate[(heads,)](aware, masses, tails, counters, sinks, CHUNK=4096, num_warps=8)
    solution, numbers = empty(2, dtype=torch.float64), empty(2 * heads, dtype=torch.int32)
    (given,) = struct.unpack("<q", struct.pack("<d", rest if density is None else density))
    solve_share[(1,)](
        keys[1], added, aware, tails, counters, sinks, solution, numbers, cuts, given, heads, blocks,
        blocks.bit_length(), block, tiles, units, heads * forced, heads * causal_pairs(length), floor,
        max(ceiling, floor),
        SOLVE=density is not None, LISTS=triton.next_power_of_2(2 * heads), HEADS=triton.next_power_of_2(heads),
        DEEP=5 if heads <= 32 else 3, num_warps=8,
    )  # fmt: skip
    count_tiles[splits](*counting, **shape, PASS=1)
    refine[(heads,)](aware, tails, counters, lower, solution, cuts, tiles, CHUNK=2048, num_warps=8)
    count_tiles[splits](*counting, **shape, PASS=2)
    break_ties[(heads,)](
        *states, ties, cuts, places, *strides, group, blocks, factor, cap, **shape, CHUNK=1024
    )  # fmt: skip

    counts = empty(heads, blocks, dtype=torch.int32)

    def emit(indices: Tensor, listed: bool) -> None:
        for maps, rows, columns in ((False, 16, 128), (True, SIDE.value, SIDE.value)):
            _emit[(heads, triton.cdiv(blocks, rows))](
                *states, cuts, places, ranks, numbers, indices, counts, *strides, group, heads, blocks,
                indices.shape[-1], factor, cap, **shape, LIST=listed, MAPS=maps, ROWS=rows, COLUMNS=columns,
            )  # fmt: skip

    width = blocks
    if 4 * heads * blocks * blocks > LIST_BYTES:
        emit(ranks, False)
        width = int(counts.max())
    indices = empty(heads, blocks, width, dtype=torch.int32)
    emit(indices, True)
    return Blocks(indices, counts, length, block, block), solution[0], solution[1]
