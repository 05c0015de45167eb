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
) -> Tensor:
    """Causal attention of `(B, H, q_len, D)` queries over `(B, H_kv, kv_len, D)` keys and values.

    Args:
        scale: factor on the scores.
        softcap: `c` of `c * tanh(score / c)`, or None.
        window: a query sees this many keys, itself included; None for all.
        starts: `(B,)` first valid key of each row (left padding), or None when no row is padded.

    Returns:
        `(B, H, q_len, D_v)`. Queries that see no key (padding) give zeros.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    if window is not None and window >= kv_len:
        window = None
    if softcap is None and window is None and starts is None and q_len == 1:
        # One query per head: the query heads of a KV head are the rows of one small product, nothing is repeated.
        grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
        out = F.scaled_dot_product_attention(grouped, key, value, scale=scale)
        return out.reshape(*query.shape[:3], value.shape[3])
    if softcap is None and window is None and starts is None and q_len == kv_len:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
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
        pieces.append(masked_attention(part, *some, visible, scale=scale, softcap=softcap))
    return torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0]


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention of `(B, H, q_len, D)` queries to the keys that a mask shows them.

    Args:
        mask: `(q_len, kv_len)` or `(B or 1, 1, q_len, kv_len)` bool. Under one of four dimensions queries that see no
            key give zeros.
        scale: factor on the scores; softcap: `c` of `c * tanh(score / c)`, or None.

    Returns:
        `(B, H, q_len, D_v)`.
    """
    gqa = query.shape[1] != key.shape[1]
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
    weights = torch.nan_to_num(scores.masked_fill(~mask, float("-inf")).softmax(-1)).to(value.dtype)
    return torch.einsum("bgrqk,bgkd->bgrqd", weights, value).reshape(batch, heads, q_len, value.shape[-1])
