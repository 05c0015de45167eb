"""Dense causal attention of one row or a batch: torch SDPA where it can express the case, chunked torch otherwise.

`q_len` queries are the last `q_len` positions of the `kv_len` keys (lower-right causal alignment).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Queries per chunk where a mask has to be built: bounds it to CHUNK x kv_len.
CHUNK = 512


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    starts: Tensor | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Causal attention of `(B, H, q_len, D)` queries over `(B, H_kv, kv_len, D)` keys and values.

    Args:
        scale: factor on the scores.
        softcap: `c` of `c * tanh(score / c)`, or None.
        window: a query sees this many keys, itself included; None for all.
        starts: `(B,)` first valid key of each row (left padding), or None when no row is padded.
        sink: `(H,)` a logit of each query head that joins the denominator of its softmax (an attention sink), or None.

    Returns:
        `(B, H, q_len, D_v)`. Queries that see no key (padding) give zeros.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    if window is not None and window >= kv_len:
        window = None
    if softcap is None and window is None and starts is None and q_len == 1:
        # One query per head: the query heads of a KV head are the rows of one small product, nothing is repeated.
        dim_v = value.shape[3]
        if sink is not None:
            query, key, value = with_sink(query, key, value, sink, scale)
        grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
        out = F.scaled_dot_product_attention(grouped, key, value, scale=scale)[..., :dim_v]
        return out.reshape(*query.shape[:3], dim_v)
    if softcap is None and window is None and starts is None and q_len == kv_len:
        gqa, dim_v = query.shape[1] != key.shape[1], value.shape[3]
        if sink is None:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
        query, key, value = with_sink(query, key, value, sink, scale)
        query = F.pad(query, (0, 0, 1, 0))  # beside the key in front, so that all others see it
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
        return out[:, :, 1:, :dim_v]
    pieces = []
    for first in range(0, q_len, CHUNK):
        part = query[:, :, first : first + CHUNK]
        positions = torch.arange(kv_len - q_len + first, kv_len - q_len + first + part.shape[2], device=query.device)
        low = 0 if window is None else max(0, kv_len - q_len + first - window + 1)
        high = kv_len - q_len + first + part.shape[2]
        keys = torch.arange(low, high, device=query.device)
        visible = keys[None, :] <= positions[:, None]
        if window is not None:
            visible = visible & (keys[None, :] > positions[:, None] - window)
        if starts is not None:
            visible = visible & (keys[None, None, None, :] >= starts[:, None, None, None])
        some = key[:, :, low:high], value[:, :, low:high]
        pieces.append(masked_attention(part, *some, visible, scale=scale, softcap=softcap, sink=sink))
    return torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0]


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Attention of `(B, H, q_len, D)` queries to the keys that a mask shows them.

    Args:
        mask: `(q_len, kv_len)` or `(B or 1, 1, q_len, kv_len)` bool. Under one of four dimensions queries that see no
            key give zeros.
        scale: factor on the scores; softcap: `c` of `c * tanh(score / c)`, or None.
        sink: as in `dense_attention`.

    Returns:
        `(B, H, q_len, D_v)`.
    """
    gqa = query.shape[1] != key.shape[1]
    if softcap is None and sink is not None:
        dim_v = value.shape[-1]
        query, key, value = with_sink(query, key, value, sink, scale)
        mask = F.pad(mask, (1, 0), value=True)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa)
        return out[..., :dim_v]
    if softcap is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa)
        return torch.nan_to_num(out) if mask.dim() == 4 else out
    batch, heads, q_len, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, q_len, dim)
    # In half precision the product itself would round the scores before the softmax.
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = torch.einsum("bgrqd,bgkd->bgrqk", grouped.to(work), key.to(work)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    mask = mask[:, :, None] if mask.dim() == 4 else mask
    scores = scores.masked_fill(~mask, float("-inf"))
    if sink is not None:
        own = sink.to(work).view(1, key.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([own, scores], -1)
    weights = torch.nan_to_num(scores.softmax(-1))[..., -key.shape[2] :].to(value.dtype)
    return torch.einsum("bgrqk,bgkd->bgrqd", weights, value).reshape(batch, heads, q_len, value.shape[-1])


def with_sink(query: Tensor, key: Tensor, value: Tensor, sink: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with sinks as attention without: a key in front whose value is 0 and whose score is each head's sink.

    Every kernel computes that, and none has to know of sinks. Queries get two more dimensions, and zeros up to a
    multiple of 8, which is what kernels take.

    Args:
        query: `(B, H, q_len, D)`; key: `(B, H_kv, kv_len, D)`; value: `(B, H_kv, kv_len, D_v)`.
        sink: `(H,)`; scale: factor on the scores.

    Returns:
        `(B, H, q_len, E)`, `(B, H_kv, kv_len + 1, E)` and `(B, H_kv, kv_len + 1, D_v or E)`, whichever is more; the
        output's first `D_v` dimensions are what was asked for.
    """
    batch, heads, q_len, dim = query.shape
    width = -(-(dim + 2) // 8) * 8
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    # Two numbers, since one of half precision rounds. A sink of minus infinity, that is none, weighs nothing.
    most = min(1e30, 0.9 * torch.finfo(query.dtype).max)
    whole = (sink.to(work) / scale).clamp(-most, most)
    high = whole.to(query.dtype)
    low = (whole - high.to(work)).to(query.dtype)
    own = F.pad(torch.stack([high, low], -1), (0, width - dim - 2))
    query = torch.cat([query, own[None, :, None].expand(batch, -1, q_len, -1)], -1)
    front = key.new_zeros(width)
    front[dim : dim + 2] = 1
    key = torch.cat([front.expand(*key.shape[:2], 1, -1), F.pad(key, (0, width - dim))], 2)
    return query, key, F.pad(value, (0, max(0, width - value.shape[-1]), 1, 0))
