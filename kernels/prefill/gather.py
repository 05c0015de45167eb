"""Torch only, any device and block size: gather the listed keys of each query block, batch the matmuls.

Query blocks are processed in order of how many keys they read, so that a batch pads little, and in
chunks of bounded memory: nothing of size L x L is ever made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Blocks

#: Elements of the largest temporary of one chunk (scores, or gathered keys and values).
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
#: A batch may hold rows that need at least this share of its width; smaller rows start a new batch.
MIN_FILL = 0.8


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Blocks,
    scale: float,
    softcap: float | None,
    lse: Tensor | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """See `block_sparse_prefill`. Scores and softmax in fp32 (fp64 for fp64 input), values in the input dtype.

    A product in half precision would round the scores before the softmax, which attention kernels do not.
    """
    heads, length, dim = query.shape
    kv_heads, value_dim = key.shape[0], value.shape[-1]
    block_q, block_k, n_q, n_k = layout.block_q, layout.block_k, layout.blocks_q, layout.blocks_k
    device = query.device
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    q_blocks = F.pad(query, (0, 0, 0, n_q * block_q - length)).reshape(heads * n_q, block_q, dim)
    k_blocks = F.pad(key, (0, 0, 0, n_k * block_k - length)).reshape(kv_heads, n_k, block_k, dim)
    v_blocks = F.pad(value, (0, 0, 0, n_k * block_k - length)).reshape(kv_heads, n_k, block_k, value_dim)

    tiles, indices = layout.counts.flatten(), layout.indices.reshape(heads * n_q, -1)
    singles = torch.zeros_like(tiles) if layout.columns is None else layout.column_counts.flatten()
    shared = layout.columns is not None and layout.columns.shape[1] == 1
    columns = None if layout.columns is None else layout.columns.flatten(0, 1)
    in_tiles = layout.mask().flatten(0, 1) if shared else None
    k_tokens, v_tokens = (blocks.reshape(-1, blocks.shape[-1]) for blocks in (k_blocks, v_blocks))
    needed = tiles * block_k + singles
    order = torch.argsort(needed, descending=True, stable=True)
    needed, tile_widths, single_widths = needed[order].tolist(), tiles[order].tolist(), singles[order].tolist()
    within_q, within_k = torch.arange(block_q, device=device), torch.arange(block_k, device=device)
    out = query.new_empty(heads * n_q, block_q, value_dim)
    totals = None if lse is None else lse.new_empty(heads * n_q, block_q)
    limit = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])
    start = 0
    while start < len(needed):
        rows_at_most = max(1, limit // (needed[start] * max(block_q, dim + value_dim)))
        stop = start + 1
        while stop < len(needed) and stop - start < rows_at_most and needed[stop] >= MIN_FILL * needed[start]:
            stop += 1
        rows = order[start:stop]
        width, extra = max(tile_widths[start:stop]), max(single_widths[start:stop])
        listed = torch.arange(width, device=device) < tiles[rows, None]
        ids = torch.where(listed, indices[rows, :width], 0).long()
        kv_head = rows // n_q // (heads // kv_heads)
        k = k_blocks[kv_head[:, None], ids].reshape(len(rows), width * block_k, dim)
        v = v_blocks[kv_head[:, None], ids].reshape(len(rows), width * block_k, value_dim)
        if extra:
            single = torch.arange(extra, device=device) < singles[rows, None]
            position = torch.where(single, columns[rows // n_q if shared else rows, :extra].long(), 0)
            if shared:  # its columns in listed tiles are there already
                single &= ~in_tiles[rows[:, None], position // block_k]
            tokens = position + kv_head[:, None] * (n_k * block_k)
            k, v = torch.cat([k, k_tokens[tokens]], 1), torch.cat([v, v_tokens[tokens]], 1)
        scores = torch.bmm(q_blocks[rows].to(work), k.to(work).transpose(1, 2)).mul_(scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        # Unlisted slots get a key position after every query; keys past the end of the row lie there already.
        key_position = torch.where(listed[..., None], ids[..., None] * block_k + within_k, n_k * block_k)
        key_position = key_position.reshape(len(rows), -1)
        if extra:
            position = torch.where(single, position, n_k * block_k)
            key_position = torch.cat([key_position, position], 1)
        query_position = (rows % n_q)[:, None] * block_q + within_q
        hidden = key_position[:, None, :] > query_position[..., None]
        scores.masked_fill_(hidden, float("-inf"))
        if totals is not None:
            totals[rows] = scores.logsumexp(-1).to(totals.dtype)
        if sink is not None:  # one more key, of value 0
            own = sink.to(work)[rows // n_q, None, None].expand(-1, block_q, 1)
            scores = torch.cat([own, scores], -1)
        out[rows] = torch.bmm(scores.softmax(-1)[..., -v.shape[1] :].to(value.dtype), v)
        start = stop
    if totals is not None:
        lse.copy_(totals.reshape(heads, n_q * block_q)[:, :length])
    return out.reshape(heads, n_q * block_q, value_dim)[:, :length]
