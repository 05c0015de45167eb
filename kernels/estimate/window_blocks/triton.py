"""Triton kernels of `window_blocks`: one pass over the keys, one over its partial sums, one over the blocks.

Scores are kept in units of log2, so that weights are powers of two. A partial sum is relative to the largest score
that its row had met by then; rows of the query heads of a KV head share the products with its keys.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Keys of one product; no block is larger.
TILE = 128
#: Partial sums that one program of the second kernel takes in at a time.
PARTIALS = 2048
LOG2E = math.log2(math.e)
#: Numbers that differ from prompt to prompt: kernels are not compiled anew for some of their values.
COUNTS = ["length", "window", "blocks", "tiles", "tiles_per_chunk", "chunks"]


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 elsewhere, so that the interpreter splits rows too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def tanh(x):
    """Hyperbolic tangent to fp32's relative precision: a series near 0, where the closed form cancels."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    square = x * x
    near = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(x) < 0.1, near, tl.where(x < 0, -far, far))


@triton.jit
def capped(scores, factor, cap, CAPPED: tl.constexpr):
    """Scores in units of log2 from raw products; `factor` is scale * log2(e), or scale / cap where there is a cap."""
    if CAPPED:
        return cap * tanh(scores * factor)
    return scores * factor


@triton.jit
def _tile(
    q, q_pointers, key_base, token_stride, start, m, s, rows, position, within, partial_a, partial_c, maxima,
    block_stride, length, factor, cap,
    DIM: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr, B: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of keys; stores its partial sums and returns the running maximum and sum of the rows."""
    columns = start + tl.arange(0, BN)
    products = tl.zeros((BM, BN), tl.float32)
    if BK == BD:
        d = tl.arange(0, BD)
        pointers = key_base + columns[:, None].to(tl.int64) * token_stride + d[None, :]
        if MASKED:
            k = tl.load(pointers, mask=(columns < length)[:, None] & (d < DIM)[None, :], other=0.0)
        elif BD == DIM:
            k = tl.load(pointers)
        else:
            k = tl.load(pointers, mask=(d < DIM)[None, :], other=0.0)
        products = tl.dot(q, tl.trans(k), products)
    else:
        for first in range(0, BD, BK):
            d = first + tl.arange(0, BK)
            some = tl.load(q_pointers + first, mask=(rows < block_stride)[:, None] & (d < DIM)[None, :], other=0.0)
            k = tl.load(
                key_base + columns[:, None].to(tl.int64) * token_stride + d[None, :],
                mask=(columns < length)[:, None] & (d < DIM)[None, :],
                other=0.0,
            )
            if WIDE:
                some, k = some.to(tl.float32), k.to(tl.float32)
            products = tl.dot(some, tl.trans(k), products, input_precision="ieee")
    scores = capped(products, factor, cap, CAPPED)
    if MASKED:
        scores = tl.where(columns[None, :] <= position[:, None], scores, float("-inf"))
    highest = tl.maximum(m, tl.max(scores, 1))
    # A row may have met no key that it sees.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - base[:, None])
    # Of a key block the first keys lie in one band of diagonals of this query, the others in the band before it.
    near = (tl.arange(0, BN) % B)[None, :] <= within[:, None]
    a = tl.sum(tl.reshape(tl.where(near, weights, 0.0), (BM, BN // B, B)), 2)
    c = tl.sum(tl.reshape(tl.where(near, 0.0, weights), (BM, BN // B, B)), 2)
    s = s * tl.exp2(m - base) + tl.sum(a + c, 1)
    blocks = start // B + tl.arange(0, BN // B)
    places = blocks[None, :] * block_stride + rows[:, None]
    inside = (rows < block_stride)[:, None] & (blocks * B < length)[None, :]
    tl.store(partial_a + places, a, mask=inside)
    tl.store(partial_c + places, c, mask=inside)
    tl.store(maxima + start // BN * block_stride + rows, highest, mask=rows < block_stride)
    return highest, s


@triton.jit(do_not_specialize=COUNTS)
def _window(
    query, key, partial_a, partial_c, maxima, chunk_max, chunk_sum, q_head_stride, q_token_stride, k_head_stride,
    k_token_stride, length, window, group, blocks, tiles, tiles_per_chunk, factor, cap,
    DIM: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr, B: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, KV head, chunk of keys); a row is a window query of a query head of the group."""
    all_rows = group * window
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    kv_head, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2)
    position = length - window + rows % window
    head = kv_head * group + tl.minimum(rows // window, group - 1)
    d = tl.arange(0, BK)
    q_pointers = query + (head * q_head_stride + position.to(tl.int64) * q_token_stride)[:, None] + d[None, :]
    q = tl.load(q_pointers, mask=(rows < all_rows)[:, None] & (d < DIM)[None, :], other=0.0)
    key_base = key + kv_head * k_head_stride
    partial_a += kv_head * blocks * all_rows
    partial_c += kv_head * blocks * all_rows
    maxima += kv_head * tiles * all_rows
    m = tl.full((BM,), float("-inf"), tl.float32)
    s = tl.zeros((BM,), tl.float32)
    first = chunk * tiles_per_chunk
    last = tl.minimum(first + tiles_per_chunk, tiles)
    clean = tl.minimum(tl.maximum((length - window) // BN, first), last)  # tiles that every row sees wholly
    for tile in tl.range(first, clean):
        m, s = _tile(
            q, q_pointers, key_base, k_token_stride, tile * BN, m, s, rows, position, position % B, partial_a,
            partial_c, maxima, all_rows, length, factor, cap,
            DIM, False, CAPPED, WIDE, B, BM, BN, BD, BK,
        )  # fmt: skip
    for tile in tl.range(clean, last):
        m, s = _tile(
            q, q_pointers, key_base, k_token_stride, tile * BN, m, s, rows, position, position % B, partial_a,
            partial_c, maxima, all_rows, length, factor, cap,
            DIM, True, CAPPED, WIDE, B, BM, BN, BD, BK,
        )  # fmt: skip
    place = (kv_head * tl.num_programs(2) + chunk) * all_rows + rows
    tl.store(chunk_max + place, m, mask=rows < all_rows)
    tl.store(chunk_sum + place, s, mask=rows < all_rows)


@triton.jit(do_not_specialize=COUNTS)
def _reduce(
    query, pooled_keys, partial_a, partial_c, maxima, chunk_max, chunk_sum, vertical, slash, predicted, q_head_stride,
    q_token_stride, pooled_head_stride, pooled_block_stride, length, window, group, blocks, tiles, chunks, factor, cap,
    DIM: tl.constexpr, CAPPED: tl.constexpr, B: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, NB: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Program (tile of key blocks, query head): masses of its blocks and bands, and the scores that means predict."""
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // group
    all_rows = group * window
    i = tl.arange(0, ROWS)
    rows = (head % group) * window + i
    valid = i < window
    # The softmax of each row over all chunks.
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    for first in range(0, chunks, 16):
        chunk = first + tl.arange(0, 16)
        place = (kv_head * chunks + chunk[None, :]) * all_rows + rows[:, None]
        some = tl.load(chunk_max + place, mask=valid[:, None] & (chunk < chunks)[None, :], other=float("-inf"))
        highest = tl.maximum(highest, tl.max(some, 1))
    highest = tl.where(valid, highest, 0.0)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, chunks, 16):
        chunk = first + tl.arange(0, 16)
        place = (kv_head * chunks + chunk[None, :]) * all_rows + rows[:, None]
        inside = valid[:, None] & (chunk < chunks)[None, :]
        some = tl.load(chunk_max + place, mask=inside, other=float("-inf"))
        total += tl.sum(tl.load(chunk_sum + place, mask=inside, other=0.0) * tl.exp2(some - highest[:, None]), 1)
    share = 1 / (tl.where(valid, total, 1.0) * B)

    ids = tl.program_id(0) * NB + tl.arange(0, NB)
    # Bands are counted from the last one: entry b is band n - 1 - b. Queries of the block before the last, met where
    # the length is no multiple of the block, are one block nearer to every key block.
    shift = blocks - 1 - (length - window + i) // B
    columns = tl.zeros((NB,), tl.float32)
    bands = tl.zeros((NB,), tl.float32)
    part_a = partial_a + kv_head * blocks * all_rows + rows
    part_c = partial_c + kv_head * blocks * all_rows + rows
    part_m = maxima + kv_head * tiles * all_rows + rows
    for step in tl.static_range(3):
        at = ids[:, None] - step + tl.zeros((ROWS,), tl.int32)[None, :]
        inside = valid[None, :] & (at >= 0) & (at < blocks)
        place = at.to(tl.int64) * all_rows
        level = tl.load(part_m[None, :] + (at * B // BN).to(tl.int64) * all_rows, mask=inside, other=float("-inf"))
        weight = tl.exp2(level - highest[None, :]) * share[None, :]
        is_a, is_c = shift[None, :] == step, shift[None, :] + 1 == step
        a = tl.load(part_a[None, :] + place, mask=inside & (is_a | (step == 0)), other=0.0) * weight
        c = tl.load(part_c[None, :] + place, mask=inside & (is_c | (step == 0)), other=0.0) * weight
        if step == 0:
            columns = tl.sum(a + c, 1)
        bands += tl.sum(tl.where(is_a, a, 0.0) + tl.where(is_c, c, 0.0), 1)
    tl.store(vertical + head * blocks + ids, columns, mask=ids < blocks)
    tl.store(slash + head * blocks + blocks - 1 - ids, bands, mask=ids < blocks)

    d = tl.arange(0, BD)
    mean = tl.zeros((BD,), tl.float32)
    for first in range(0, window, 16):
        token = first + tl.arange(0, 16)
        pointers = query + head * q_head_stride + (length - window + token[:, None]).to(tl.int64) * q_token_stride
        some = tl.load(pointers + d[None, :], mask=(token < window)[:, None] & (d < DIM)[None, :], other=0.0)
        mean += tl.sum(some.to(tl.float32), 0)
    mean /= window
    for first in tl.static_range(0, NB, 16):
        some = tl.program_id(0) * NB + first + tl.arange(0, 16)
        pointers = pooled_keys + kv_head * pooled_head_stride + some[:, None].to(tl.int64) * pooled_block_stride
        k = tl.load(pointers + d[None, :], mask=(some < blocks)[:, None] & (d < DIM)[None, :], other=0.0)
        scores = capped(tl.sum(k * mean[None, :], 1), factor, cap, CAPPED)
        tl.store(predicted + head * blocks + some, scores, mask=some < blocks)


@triton.jit(do_not_specialize=COUNTS)
def _divergence(vertical, predicted, divergence, blocks, CHUNK: tl.constexpr):
    """Program (query head): square root of the Jensen-Shannon divergence of the softmax of `predicted`."""
    head = tl.program_id(0).to(tl.int64)
    highest = tl.full((CHUNK,), float("-inf"), tl.float32)
    for first in range(0, blocks, CHUNK):
        ids = first + tl.arange(0, CHUNK)
        highest = tl.maximum(highest, tl.load(predicted + head * blocks + ids, mask=ids < blocks, other=float("-inf")))
    top = tl.max(highest, 0)
    sums = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, blocks, CHUNK):
        ids = first + tl.arange(0, CHUNK)
        scores = tl.load(predicted + head * blocks + ids, mask=ids < blocks, other=float("-inf"))
        sums += tl.exp2(scores - top)
    total = tl.sum(sums, 0)
    terms = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, blocks, CHUNK):
        ids = first + tl.arange(0, CHUNK)
        p = tl.exp2(tl.load(predicted + head * blocks + ids, mask=ids < blocks, other=float("-inf")) - top) / total
        q = tl.load(vertical + head * blocks + ids, mask=ids < blocks, other=0.0)
        m = tl.log(tl.maximum((p + q) / 2, 2e-38))
        terms += tl.where(p > 0, p * (tl.log(tl.maximum(p, 2e-38)) - m), 0.0)
        terms += tl.where(q > 0, q * (tl.log(tl.maximum(q, 2e-38)) - m), 0.0)
    tl.store(divergence + head, tl.sqrt(tl.maximum(tl.sum(terms, 0) / 2, 0.0)))


def window_blocks(
    query: Tensor, key: Tensor, pooled_keys: Tensor, block: int, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `window_blocks.window_blocks`: vertical and slash masses `(H, n)`, and the divergence `(H,)`."""
    heads, length, dim = query.shape
    kv_heads, device = key.shape[0], query.device
    group, window, blocks = heads // kv_heads, min(block, length), -(-length // block)
    rows, tiles = group * window, -(-length // TILE)
    wide = query.dtype not in (torch.bfloat16, torch.float16)
    padded = max(64 if wide else 16, triton.next_power_of_2(dim))  # wide dtypes take 32 dimensions at a time
    bm = min(max(16, triton.next_power_of_2(rows)), 32 if wide else 128)
    row_tiles = triton.cdiv(rows, bm)
    # As many programs as run at once, two on each processor.
    per_chunk = triton.cdiv(tiles, max(1, min(tiles, 2 * processors(device) // (kv_heads * row_tiles))))
    chunks = triton.cdiv(tiles, per_chunk)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    partials = empty(2, kv_heads, blocks, rows)
    maxima, softmax = empty(kv_heads, tiles, rows), empty(2, kv_heads, chunks, rows)
    masses, predicted, divergence = empty(2, heads, blocks), empty(heads, blocks), empty(heads)
    factor, cap = (scale * LOG2E, 0.0) if softcap is None else (scale / softcap, softcap * LOG2E)
    _window[(row_tiles, kv_heads, chunks)](
        query, key, partials[0], partials[1], maxima, softmax[0], softmax[1], query.stride(0), query.stride(1),
        key.stride(0), key.stride(1), length, window, group, blocks, tiles, per_chunk, factor, cap,
        DIM=dim, CAPPED=softcap is not None, WIDE=query.dtype == torch.float64, B=block, BM=bm, BN=TILE, BD=padded,
        BK=32 if wide else padded,
        num_warps=8 if bm == 128 else 4, num_stages=1 if wide else 2,
        maxnreg=128 if bm == 128 and padded <= 128 else None,  # two programs of that size on each processor
    )  # fmt: skip
    window_rows = triton.next_power_of_2(window)
    tile = max(16, PARTIALS // window_rows)
    _reduce[(triton.cdiv(blocks, tile), heads)](
        query, pooled_keys, partials[0], partials[1], maxima, softmax[0], softmax[1], masses[0], masses[1], predicted,
        query.stride(0), query.stride(1), pooled_keys.stride(0), pooled_keys.stride(1), length, window, group,
        blocks, tiles, chunks, factor, cap,
        DIM=dim, CAPPED=softcap is not None, B=block, BN=TILE, ROWS=window_rows, NB=tile, BD=padded, num_warps=4,
    )  # fmt: skip
    _divergence[(heads,)](masses[0], predicted, divergence, blocks, CHUNK=1024, num_warps=4)
    return masses[0], masses[1], divergence
