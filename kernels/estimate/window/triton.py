"""Attention of the last queries of a row in Triton: two passes over the keys, and nothing is kept of the scores.

The first pass finds each query's normaliser, the second computes the scores again and reduces the weights. All sums
run in a fixed order, so equal inputs give equal bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)
#: Partial sums of diagonals held at once, in bytes; longer windows are taken in parts.
PARTIAL_BYTES = 1 << 29
#: Programs of the first pass that keep all multiprocessors busy.
PROGRAMS = 1024
#: Queries of a tile of the second pass: more leave too few programs on a multiprocessor (benchmarks/NOTES.md).
ROWS = 32


def sums(
    query: Tensor, key: Tensor, window: int, scale: float, softcap: float | None, wanted: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """Columns, diagonals and peaks, `(H, L)` fp32, where `wanted`; arguments as of `window_sums`."""
    heads, length, dim = query.shape
    query, key = (states if states.stride(2) == 1 else states.contiguous() for states in (query, key))
    window = min(window, length)
    normaliser = _normalisers(query, key, window, scale, softcap)

    out = [torch.empty(heads, length, device=query.device) if asked else None for asked in wanted]
    kv_heads, group = len(key), heads // len(key)
    columns, diagonals, peaks = out
    rows, keys = _tile(query, window, ROWS)
    skew = min(rows, 32)
    blocks = triton.cdiv(length, keys)
    part = triton.cdiv(window, rows) * rows
    if diagonals is not None:  # two sums for each key and strip of `skew` queries
        part = min(part, max(rows, PARTIAL_BYTES // (8 * heads * blocks * keys) * skew // rows * rows))
    strips = part // skew
    partial = query.new_empty((2, heads, strips, blocks * keys) if diagonals is not None else 1, dtype=torch.float32)
    nothing = normaliser  # stands for a tensor that is not asked for
    for first in range(0, window, part):
        tiles = triton.cdiv(min(part, window - first), rows)
        _sums_kernel[(blocks, kv_heads)](
            query,
            key,
            normaliser,
            nothing if columns is None else columns,
            nothing if peaks is None else peaks,
            partial,
            length,
            window,
            first,
            tiles,
            strips,
            group,
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            *_factors(scale, softcap),
            CAPPED=softcap is not None,
            COLUMNS=columns is not None,
            PEAKS=peaks is not None,
            DIAGONALS=diagonals is not None,
            FIRST=first == 0,
            ROWS=rows,
            KEYS=keys,
            SKEW=skew,
            **_shape(query),
            num_warps=4,
            num_stages=2,
        )
        if diagonals is not None:
            _diagonals_kernel[(triton.cdiv(length, 1024), heads)](
                partial,
                diagonals,
                length,
                length - window + first,
                tiles * (rows // skew),
                strips,
                blocks * keys,
                FIRST=first == 0,
                SKEW=skew,
                BLOCK=1024,
                num_warps=4,
            )
    return out


def _normalisers(query: Tensor, key: Tensor, window: int, scale: float, softcap: float | None) -> Tensor:
    """`(H, w)` fp32: base-2 logarithm of the sum of the exponentials of each query's scores."""
    heads, length, _ = query.shape
    kv_heads, group = len(key), heads // len(key)
    rows, keys = _tile(query, window, 128)
    tiles = triton.cdiv(window, rows)
    # At least four blocks of keys, so that loads and products overlap.
    splits = max(1, min(PROGRAMS // (heads * tiles), triton.cdiv(length, 4 * keys)))
    chunk = triton.cdiv(triton.cdiv(length, splits), keys) * keys
    splits = triton.cdiv(length, chunk)
    parts = torch.empty(splits, heads, window, device=query.device)
    _normaliser_kernel[(group * tiles, splits, kv_heads)](
        query,
        key,
        parts,
        length,
        window,
        tiles,
        group,
        chunk,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        *_factors(scale, softcap),
        CAPPED=softcap is not None,
        ROWS=rows,
        KEYS=keys,
        **_shape(query),
        num_warps=8 if rows == 128 else 4,
        num_stages=2,
    )
    if splits == 1:
        return parts[0]
    merged = torch.empty_like(parts[0])
    _merge_kernel[(triton.cdiv(merged.numel(), 256),)](parts, merged, merged.numel(), splits, BLOCK=256, num_warps=4)
    return merged


def _tile(query: Tensor, window: int, rows: int) -> tuple[int, int]:
    """Queries and keys of a tile: fewer for small windows, and where shared memory or registers would run out."""
    dim = triton.next_power_of_2(query.shape[2])
    if query.dtype == torch.float32:  # exact products are made without tensor cores
        return min(32, max(16, triton.next_power_of_2(window))), 32
    return min(rows if dim <= 128 else 64, max(16, triton.next_power_of_2(window))), 128 if dim <= 128 else 64


def _factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """What `_logits` multiplies products, and their bounded exponentials, with."""
    if softcap is None:
        return scale * LOG2_E, 1.0
    return 2 * LOG2_E * scale / softcap, softcap * LOG2_E


def _shape(query: Tensor) -> dict[str, int | bool]:
    dim = query.shape[2]
    return {"DIM": dim, "PADDED": max(16, triton.next_power_of_2(dim)), "EXACT": query.dtype == torch.float32}


@triton.jit
def _product(a, b, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def _logits(products, inner, outer, CAPPED: tl.constexpr):
    """Scores in units of log 2, for exp2; bounded by c * tanh(score / c) = c * (1 - 2 / (1 + exp(2 * score / c)))."""
    if CAPPED:
        return outer * (1.0 - 2.0 / (1.0 + tl.exp2(products * inner)))
    else:
        return products * inner


@triton.jit
def _rows_of(base, rows, token_stride, inside, DIM: tl.constexpr, PADDED: tl.constexpr):
    dims = tl.arange(0, PADDED)
    where = base + rows.to(tl.int64)[:, None] * token_stride + dims[None, :]
    return tl.load(where, mask=inside[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=["tiles"])
def _normaliser_kernel(
    query,
    key,
    parts,
    length,
    window,
    tiles,
    group,
    chunk,
    query_head,
    query_token,
    key_head,
    key_token,
    inner,
    outer,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program: `ROWS` queries of one head against one chunk of keys. Programs that share keys are neighbours."""
    split = tl.program_id(1)
    kv_head = tl.program_id(2)
    head = kv_head * group + tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    first = length - window + tl.program_id(0) % tiles * ROWS
    q = _rows_of(query + head.to(tl.int64) * query_head, length - window + row, query_token, row < window, DIM, PADDED)
    base = key + kv_head.to(tl.int64) * key_head
    begin = split * chunk
    end = tl.minimum(begin + chunk, tl.minimum(length, first + ROWS))
    # All queries of the tile see the keys before `open`.
    open = tl.maximum(begin, tl.minimum(end, (first + 1) // KEYS * KEYS))
    # Finite, so that a row that sees no key of the chunk makes no NaN.
    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(begin, open, KEYS):
        places = start + tl.arange(0, KEYS)
        k = _rows_of(base, places, key_token, places >= 0, DIM, PADDED)
        scores = _logits(_product(q, k.T, EXACT), inner, outer, CAPPED)
        higher = tl.maximum(peak, tl.max(scores, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        peak = higher
    for start in range(open, end, KEYS):
        places = start + tl.arange(0, KEYS)
        k = _rows_of(base, places, key_token, places < length, DIM, PADDED)
        scores = _logits(_product(q, k.T, EXACT), inner, outer, CAPPED)
        scores = tl.where(places[None, :] <= (length - window + row)[:, None], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        peak = higher
    place = (split * tl.num_programs(2) * group + head).to(tl.int64) * window
    tl.store(parts + place + row, peak + tl.log2(total), mask=row < window)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(parts, merged, count, splits, BLOCK: tl.constexpr):
    """Normalisers over all keys from those over chunks of keys."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        part = tl.load(parts + split * count + place, mask=place < count, other=0.0)
        higher = tl.maximum(peak, part)
        total = total * tl.exp2(peak - higher) + tl.exp2(part - higher)
        peak = higher
    tl.store(merged + place, peak + tl.log2(total), mask=place < count)


@triton.jit
def _turn(weights, at, apart, KEYS: tl.constexpr, ROWS: tl.constexpr, SKEW: tl.constexpr, width):
    """Store the sums of a tile's `(KEYS, ROWS)` diagonals.

    The tile is cut into squares of `SKEW` keys and queries. Rotating key b's row by b turns a square's diagonals into
    columns: query - key = c where the rotation did not wrap around, c - SKEW where it did. The two are summed apart,
    one number for each key subblock and c; `_diagonals_kernel` puts them together.
    """
    DOWN: tl.constexpr = KEYS // SKEW
    ACROSS: tl.constexpr = ROWS // SKEW
    c = tl.arange(0, SKEW)
    turned = (tl.arange(0, KEYS)[:, None, None] + c[None, None, :]) % SKEW
    turned = tl.broadcast_to(turned, [KEYS, ACROSS, SKEW])
    skewed = tl.gather(tl.reshape(weights, [KEYS, ACROSS, SKEW]), turned, 2)
    skewed = tl.reshape(skewed, [DOWN, SKEW, ACROSS, SKEW])
    whole = (c[:, None] + c[None, :] < SKEW)[None, :, None, :]
    place = tl.arange(0, ACROSS)[None, :, None] * width + tl.arange(0, DOWN)[:, None, None] * SKEW + c[None, None, :]
    tl.store(at + place, tl.sum(tl.where(whole, skewed, 0.0), 1))
    tl.store(at + apart + place, tl.sum(tl.where(whole, 0.0, skewed), 1))


@triton.jit(do_not_specialize=["first", "tiles", "strips"])
def _sums_kernel(
    query,
    key,
    normaliser,
    columns,
    peaks,
    partial,
    length,
    window,
    first,
    tiles,
    strips,
    group,
    query_head,
    query_token,
    key_head,
    key_token,
    inner,
    outer,
    CAPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
    PEAKS: tl.constexpr,
    DIAGONALS: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SKEW: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program: one block of keys against `tiles` tiles of queries of each head of a group, keys along axis 0."""
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    places = block * KEYS + tl.arange(0, KEYS)
    k = _rows_of(key + kv_head.to(tl.int64) * key_head, places, key_token, places < length, DIM, PADDED)
    column = tl.zeros([KEYS], tl.float32)
    top = tl.zeros([KEYS], tl.float32)
    for step in range(group * tiles):
        head = kv_head * group + step // tiles
        tile = step % tiles
        row = first + tile * ROWS + tl.arange(0, ROWS)
        begin = length - window + first + tile * ROWS
        q = _rows_of(
            query + head.to(tl.int64) * query_head, length - window + row, query_token, row < window, DIM, PADDED
        )
        # Rows behind the window weigh nothing.
        norm = tl.load(normaliser + head.to(tl.int64) * window + row, mask=row < window, other=float("inf"))
        weights = tl.exp2(_logits(_product(k, q.T, EXACT), inner, outer, CAPPED) - norm[None, :])
        if block * KEYS + KEYS > begin + 1:
            weights = tl.where(places[:, None] <= (length - window + row)[None, :], weights, 0.0)
        out = head.to(tl.int64) * length + places
        if COLUMNS:
            column = tl.where(tile == 0, 0.0, column) + tl.sum(weights, 1)
            if tile == tiles - 1:
                if FIRST:
                    tl.store(columns + out, column, mask=places < length)
                else:
                    before = tl.load(columns + out, mask=places < length)
                    tl.store(columns + out, before + column, mask=places < length)
        if PEAKS:
            top = tl.maximum(tl.where(tile == 0, 0.0, top), tl.max(weights, 1))
            if tile == tiles - 1:
                if FIRST:
                    tl.store(peaks + out, top, mask=places < length)
                else:
                    before = tl.load(peaks + out, mask=places < length)
                    tl.store(peaks + out, tl.maximum(before, top), mask=places < length)
        if DIAGONALS:
            width = tl.num_programs(0) * KEYS
            at = partial + (head.to(tl.int64) * strips + tile * (ROWS // SKEW)) * width + block * KEYS
            heads = tl.num_programs(1) * group
            _turn(weights, at, heads.to(tl.int64) * strips * width, KEYS, ROWS, SKEW, width)


@triton.jit(do_not_specialize=["begin", "used", "strips"])
def _diagonals_kernel(
    partial,
    diagonals,
    length,
    begin,
    used,
    strips,
    width,
    FIRST: tl.constexpr,
    SKEW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over `used` strips of `SKEW` queries, the first of which begins at position `begin`."""
    head = tl.program_id(1)
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    apart = tl.num_programs(1).to(tl.int64) * strips * width
    total = tl.zeros([BLOCK], tl.float32)
    for strip in range(used):
        # Diagonal o crosses two key subblocks in this strip: o = query - key with query = begin + strip * SKEW + a.
        behind = offset - begin - strip * SKEW
        c = behind & (SKEW - 1)
        place = c - behind  # first key of the subblock in which it does not wrap
        at = partial + (head.to(tl.int64) * strips + strip) * width + place + c
        total += tl.load(at, mask=(place >= 0) & (place < width), other=0.0)
        total += tl.load(at + apart - SKEW, mask=(place >= SKEW) & (place < width + SKEW), other=0.0)
    out = diagonals + head.to(tl.int64) * length + offset
    if not FIRST:
        total += tl.load(out, mask=offset < length, other=0.0)
    tl.store(out, total, mask=offset < length)
