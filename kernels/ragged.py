"""Keys and values of sequences of different lengths in one flat storage, and dense attention over it.

A sequence is what one KV head of one row holds; sequence `row * H_kv + head`. After eviction every head may hold
a different number of keys; before, all heads of a row hold the same. Either way the storage is `(N, D)` and a
sequence is a contiguous part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RaggedKV:
    """S sequences of keys and values.

    Attributes:
        keys: `(N, D)`; values: `(N, D_v)`, contiguous.
        starts: first entry of each sequence in the storage.
        lengths: keys that each sequence holds, at least 1.
    """

    keys: Tensor
    values: Tensor
    starts: list[int]
    lengths: list[int]

    def check(self, query: Tensor) -> None:
        """Raise ValueError unless `(S, G, T, D)` queries fit: the cheap checks that every call makes."""
        sequences = len(self.starts)
        if query.dim() != 4 or query.shape[0] != sequences or query.shape[3] != self.keys.shape[-1]:
            raise ValueError(
                f"query {tuple(query.shape)} does not fit {sequences} sequences of keys {tuple(self.keys.shape)}: "
                "expected (S, G, T, D)"
            )
        if len(self.keys) != len(self.values) or len(self.lengths) != sequences:
            raise ValueError(
                f"{len(self.keys)} keys, {len(self.values)} values, {sequences} starts and {len(self.lengths)} lengths "
                "do not fit together"
            )
        if query.dtype != self.keys.dtype or query.dtype != self.values.dtype or not query.dtype.is_floating_point:
            raise ValueError(
                f"dtypes are {query.dtype}, {self.keys.dtype}, {self.values.dtype}; expected one floating-point dtype"
            )
        if not query.device == self.keys.device == self.values.device:
            raise ValueError(
                f"devices are {query.device}, {self.keys.device}, {self.values.device}; expected one device"
            )
        if min(self.lengths, default=query.shape[2]) < query.shape[2]:
            raise ValueError(f"a sequence holds {min(self.lengths)} keys, but {query.shape[2]} queries are among them")
        ends = (start + length for start, length in zip(self.starts, self.lengths, strict=True))
        if min(self.starts, default=0) < 0 or max(ends, default=0) > len(self.keys):
            raise ValueError(f"a sequence reaches outside the {len(self.keys)} stored keys")


def compact(states: Tensor, indices: Tensor, counts: list[int], room: int = 0) -> Tensor:
    """Copy the kept tokens of each head, head after head: `(H, L, D)` to `(sum of counts + H * room, D)`.

    Args:
        indices: `(H, W)` int64, token ids; the first `counts[h]` of a head are kept.
        room: uninitialised entries behind the tokens of each head.
    """
    if len(counts) != len(states) or not all(0 < count <= indices.shape[1] for count in counts):
        raise ValueError(
            f"counts {counts} do not fit {len(states)} heads with up to {indices.shape[1]} listed tokens each; "
            "every head keeps at least one"
        )
    out = states.new_empty(sum(counts) + len(counts) * room, states.shape[-1])
    start = 0
    for head, count in enumerate(counts):
        torch.index_select(states[head], 0, indices[head, :count], out=out[start : start + count])
        start += count + room
    return out


def ragged_decode(query: Tensor, kv: RaggedKV, *, scale: float, softcap: float | None = None) -> Tensor:
    """Dense attention of the last T tokens of each sequence to all keys of it that they may see.

    Args:
        query: `(S, G, T, D)`, the G query heads that share a KV head; query t sees the first
            `lengths[s] - T + 1 + t` keys of sequence s.

    Returns:
        `(S, G, T, D_v)` in the query's dtype. Softmax in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    kv.check(query)
    steps = query.shape[2]
    out = query.new_empty(*query.shape[:3], kv.values.shape[-1])
    for row, (start, length) in enumerate(zip(kv.starts, kv.lengths, strict=True)):
        # The queries of a group are the rows of one product: keys and values are read once, nothing is repeated.
        key, value = kv.keys[start : start + length], kv.values[start : start + length]
        if softcap is None and steps == 1:
            out[row] = F.scaled_dot_product_attention(
                query[row].transpose(0, 1)[None], key[None, None], value[None, None], scale=scale
            )[0].transpose(0, 1)
            continue
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        # In half precision the product itself would round the scores before the softmax.
        scores = query[row].to(work) @ key.to(work).T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if steps > 1:
            visible = length - steps + 1 + torch.arange(steps, device=query.device)
            hidden = torch.arange(length, device=query.device) >= visible[:, None]
            scores = scores.masked_fill(hidden, float("-inf"))
        out[row] = scores.softmax(-1).to(value.dtype) @ value
    return out
