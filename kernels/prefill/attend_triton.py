"""The Triton kernel of block-sparse prefill: online softmax over the key blocks of a query block, then over columns.

One program owns the queries of one head in one query block, or in several adjacent ones, see `triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Ids of key blocks take the low bits of an entry of a union list, the query blocks that list them the others.
ID_BITS = tl.constexpr(24)
ID_MASK = tl.constexpr((1 << 24) - 1)


@triton.jit
def _fold(acc, peak, total, scores, value, precision: tl.constexpr):
    """One step of the online softmax; `scores` are in units of log2, hidden ones -inf."""
    highest = tl.maximum(peak, tl.max(scores, 1))
    # A query may not have seen any key yet: -inf - -inf would be NaN.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=precision)
    return acc, highest, total


@triton.jit
def _scores(query, key, scale, softcap, has_softcap: tl.constexpr, precision: tl.constexpr):
    scores = tl.dot(query, tl.trans(key), input_precision=precision) * scale
    if has_softcap:
        # Here scale is that of the scores over the softcap: c * tanh(x) = c - 2 c / (exp(2 x) + 1), in log2 units.
        scores = softcap - 2 * softcap / (tl.exp2(scores * 2.8853900817779268) + 1)
    return scores


@triton.jit
def _load(base, rows, stride, dims, inside, head_dim: tl.constexpr, padded: tl.constexpr, checked: tl.constexpr):
    """Rows of keys or values, `(N, block_d)`."""
    places = base + rows[:, None] * stride + dims[None, :]
    if checked and padded:
        return tl.load(places, mask=inside[:, None] & (dims < head_dim)[None, :], other=0.0)
    elif checked:
        return tl.load(places, mask=inside[:, None], other=0.0)
    elif padded:
        return tl.load(places, mask=(dims < head_dim)[None, :], other=0.0)
    else:
        return tl.load(places)


@triton.jit(
    do_not_specialize=["length", "blocks_q", "supers", "width", "column_head", "column_row", "word_count"],
)
def attend(
    query,
    key,
    value,
    out,
    ids,
    counts,
    columns,
    column_counts,
    words,
    order,
    table,
    row_of,
    sums,
    lse,
    sink,
    query_head,
    query_token,
    key_head,
    key_token,
    value_head,
    value_token,
    out_head,
    out_token,
    length,
    blocks_q,
    supers,
    width,
    column_head,
    column_row,
    word_count,
    scale,
    softcap,
    group: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
    together: tl.constexpr,
    step: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
    value_dim: tl.constexpr,
    block_dv: tl.constexpr,
    fields: tl.constexpr,
    many: tl.constexpr,
    has_columns: tl.constexpr,
    shared: tl.constexpr,
    has_softcap: tl.constexpr,
    precision: tl.constexpr,
    resumed: tl.constexpr,
):
    item = tl.load(order + tl.program_id(0))
    head = item // supers
    place = item % supers
    if many:  # several rows of tokens: where their tensors lie stands in a table
        at = table + tl.load(row_of + place) * fields
        query += tl.multiple_of(tl.load(at), 8)
        key += tl.multiple_of(tl.load(at + 1), 8)
        value += tl.multiple_of(tl.load(at + 2), 8)
        out += tl.multiple_of(tl.load(at + 3), 8)
        ids += tl.load(at + 4)
        counts += tl.load(at + 5)
        if has_columns:
            columns += tl.load(at + 6)
            column_counts += tl.load(at + 7)
            if shared:
                words += tl.load(at + 8)
        place -= tl.load(at + 9).to(tl.int32)
        length = tl.load(at + 10).to(tl.int32)
        blocks_q = tl.load(at + 11).to(tl.int32)
        supers = tl.load(at + 12).to(tl.int32)
        width = tl.load(at + 13).to(tl.int32)
        column_head = tl.load(at + 14)
        column_row = tl.load(at + 15)
        word_count = tl.load(at + 16).to(tl.int32)
    height: tl.constexpr = block_q * together
    padded: tl.constexpr = block_d != head_dim
    padded_v: tl.constexpr = block_dv != value_dim
    wide = head.to(tl.int64)
    key += wide // group * key_head
    value += wide // group * value_head
    first = place * height
    positions = first + tl.arange(0, height)
    dims = tl.arange(0, block_d)
    dims_v = tl.arange(0, block_dv)
    queries = query + wide * query_head + positions.to(tl.int64)[:, None] * query_token + dims[None, :]
    if padded:
        q = tl.load(queries, mask=(positions < length)[:, None] & (dims < head_dim)[None, :], other=0.0)
    else:
        q = tl.load(queries, mask=(positions < length)[:, None], other=0.0)
    outs = out + wide * out_head + positions.to(tl.int64)[:, None] * out_token + dims_v[None, :]
    if resumed:  # the tiles have been read, `sums` holds the logarithm (base 2) of their sums
        some = (positions < length)[:, None] & (dims_v < value_dim)[None, :]
        acc = tl.load(outs, mask=some, other=0.0).to(tl.float32)
        peak = tl.load(sums + wide * length + positions, mask=positions < length, other=0.0)
        total = tl.full((height,), 1.0, tl.float32)
    else:
        acc = tl.zeros((height, block_dv), tl.float32)
        peak = tl.full((height,), float("-inf"), tl.float32)
        total = tl.zeros((height,), tl.float32)
    span = tl.arange(0, step)
    inside = span < step

    row = wide * supers + place
    count = tl.load(counts + row)
    listed = ids + row * width
    if resumed:
        tl.static_assert(has_columns)
    elif together == 1:
        # Lists ascend, so what reaches beyond the first query lies at their end; the rest needs no mask.
        tail: tl.constexpr = 2 * (block_q // block_k) if block_q > block_k else 2
        behind = count - tail + tl.arange(0, tail)
        ends = (tl.load(listed + behind, mask=behind >= 0, other=0) + 1) * block_k
        full = count - tl.sum(((ends > first + 1) & (behind >= 0)).to(tl.int32))
        if block_k >= step:
            pieces: tl.constexpr = block_k // step
            for i in tl.range(0, full * pieces):
                start = tl.load(listed + i // pieces).to(tl.int64) * block_k + i % pieces * step
                k = _load(key + start * key_token, span, key_token, dims, inside, head_dim, padded, False)
                scores = _scores(q, k, scale, softcap, has_softcap, precision)
                v = _load(value + start * value_token, span, value_token, dims_v, inside, value_dim, padded_v, False)
                acc, peak, total = _fold(acc, peak, total, scores, v, precision)
            done = full * pieces
            # Not pipelined, here and below: Triton 3.6 then hides the wrong scores where a mask depends on loaded ids.
            for i in tl.range(done, count * pieces, num_stages=1):
                start = tl.load(listed + i // pieces).to(tl.int64) * block_k + i % pieces * step
                rows = start + span
                k = _load(key, rows, key_token, dims, rows < length, head_dim, padded, True)
                scores = _scores(q, k, scale, softcap, has_softcap, precision)
                scores = tl.where(rows[None, :] <= positions[:, None], scores, float("-inf"))
                v = _load(value, rows, value_token, dims_v, rows < length, value_dim, padded_v, True)
                acc, peak, total = _fold(acc, peak, total, scores, v, precision)
        else:
            blocks: tl.constexpr = step // block_k
            chunks = full // blocks
            for i in tl.range(0, chunks):
                rows = tl.load(listed + i * blocks + span // block_k).to(tl.int64) * block_k + span % block_k
                k = _load(key, rows, key_token, dims, inside, head_dim, padded, False)
                scores = _scores(q, k, scale, softcap, has_softcap, precision)
                v = _load(value, rows, value_token, dims_v, inside, value_dim, padded_v, False)
                acc, peak, total = _fold(acc, peak, total, scores, v, precision)
            for i in tl.range(chunks, tl.cdiv(count, blocks), num_stages=1):
                slots = i * blocks + span // block_k
                block = tl.load(listed + slots, mask=slots < count, other=0).to(tl.int64)
                rows = block * block_k + span % block_k
                seen = (slots < count) & (rows < length)
                k = _load(key, rows, key_token, dims, seen, head_dim, padded, True)
                scores = _scores(q, k, scale, softcap, has_softcap, precision)
                visible = seen[None, :] & (rows[None, :] <= positions[:, None])
                scores = tl.where(visible, scores, float("-inf"))
                v = _load(value, rows, value_token, dims_v, seen, value_dim, padded_v, True)
                acc, peak, total = _fold(acc, peak, total, scores, v, precision)
    else:
        part = tl.arange(0, height) // block_q
        entries: tl.constexpr = step // block_k if step > block_k else 1
        pieces: tl.constexpr = block_k // step if block_k > step else 1
        tail: tl.constexpr = 2 * (height // block_k) if height > block_k else 2
        behind = count - tail + tl.arange(0, tail)
        ends = ((tl.load(listed + behind, mask=behind >= 0, other=0) & ID_MASK) + 1) * block_k
        full = (count - tl.sum(((ends > first + 1) & (behind >= 0)).to(tl.int32))) // entries
        for i in tl.range(0, full * pieces):
            slots = i // pieces * entries + span // block_k
            entry = tl.load(listed + slots)
            rows = (entry & ID_MASK).to(tl.int64) * block_k + i % pieces * step + span % block_k
            k = _load(key, rows, key_token, dims, inside, head_dim, padded, False)
            scores = _scores(q, k, scale, softcap, has_softcap, precision)
            mine = ((entry >> ID_BITS)[None, :] >> part[:, None]) & 1
            scores = tl.where(mine != 0, scores, float("-inf"))
            v = _load(value, rows, value_token, dims_v, inside, value_dim, padded_v, False)
            acc, peak, total = _fold(acc, peak, total, scores, v, precision)
        for i in tl.range(full * pieces, tl.cdiv(count, entries) * pieces, num_stages=1):
            slots = i // pieces * entries + span // block_k
            entry = tl.load(listed + slots, mask=slots < count, other=0)
            block = (entry & ID_MASK).to(tl.int64)
            rows = block * block_k + i % pieces * step + span % block_k
            seen = rows < length
            k = _load(key, rows, key_token, dims, seen, head_dim, padded, True)
            scores = _scores(q, k, scale, softcap, has_softcap, precision)
            # Slots behind the list have no bit set.
            mine = ((entry >> ID_BITS)[None, :] >> part[:, None]) & 1
            scores = tl.where((mine != 0) & (rows[None, :] <= positions[:, None]), scores, float("-inf"))
            v = _load(value, rows, value_token, dims_v, seen, value_dim, padded_v, True)
            acc, peak, total = _fold(acc, peak, total, scores, v, precision)

    if has_columns:
        last = tl.minimum((place + 1) * together, blocks_q) - 1  # its query block sees the most columns
        number = tl.load(column_counts + wide * blocks_q + last)
        singles = columns + wide * column_head + place.to(tl.int64) * column_row
        owner = tl.arange(0, height) // block_q
        for i in tl.range(0, tl.cdiv(number, step)):
            single = i * step + span
            counted = single < number
            tokens = tl.load(singles + single, mask=counted, other=0)
            k = _load(key, tokens.to(tl.int64), key_token, dims, counted, head_dim, padded, True)
            scores = _scores(q, k, scale, softcap, has_softcap, precision)
            open = counted[None, :] & (tokens[None, :] <= positions[:, None])
            if shared:  # a column in a listed tile has been read there
                tile = tokens // block_k
                for r in tl.static_range(together):
                    own = tl.minimum(place * together + r, blocks_q - 1)
                    word = tl.load(words + (wide * blocks_q + own) * word_count + tile // 32, mask=counted, other=0)
                    taken = (word >> (tile % 32)) & 1
                    open = open & ((owner != r)[:, None] | (taken == 0)[None, :])
            scores = tl.where(open, scores, float("-inf"))
            v = _load(value, tokens.to(tl.int64), value_token, dims_v, counted, value_dim, padded_v, True)
            acc, peak, total = _fold(acc, peak, total, scores, v, precision)

    if lse is not None:  # one row of tokens
        log = (peak + tl.log2(total)) * 0.6931471805599453
        tl.store(lse + wide * length + positions, log, mask=positions < length)
    if sink is not None:  # one more key, of value 0
        logit = tl.load(sink + head).to(tl.float32) * 1.4426950408889634
        total += tl.exp2(logit - peak)
    acc = acc / total[:, None]
    if padded_v:
        tl.store(outs, acc.to(out.dtype.element_ty), mask=(positions < length)[:, None] & (dims_v < value_dim)[None, :])
    else:
        tl.store(outs, acc.to(out.dtype.element_ty), mask=(positions < length)[:, None])
