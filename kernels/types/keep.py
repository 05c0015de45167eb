"""`Keep`: what stays of a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cost import Cost

#: What may be wrong with what a head keeps; bit i of `kept_faults` stands for the i-th.
FAULTS = (
    "keeps fewer than one token, or more than {most}",
    "keeps numbers of tokens that do not add up to its total of {total} tokens",
    "lists token ids that are negative or not below the prompt's {length} tokens",
    "lists token ids that are not strictly ascending (one twice, or unsorted)",
)


@dataclass(frozen=True)
class Keep:
    """What stays of one layer's cache of one unpadded row.

    Attributes:
        ids: `(H_kv, W)` int64, token ids; the first `counts` of a head are kept, ascending, the rest is undefined.
        counts: `(H_kv,)` int64 on the same device, tokens that each KV head keeps, at least 1.
        total: their sum, known on the host: it sizes the cache without waiting for the device.
        values: `(H_kv, W, D_v)` in the dtype of the cache, what takes the place of the kept tokens' values (merging),
            or None.
        positions: `(H_kv, W)` int64, positions that the kept keys are turned to (StreamingLLM), or None: their own.
        carried: by name of a slot per token, `(H_kv, W, …)`: what the method's state begins with for the kept tokens,
            in place of what `prefilled` has filled in. Only with periodic eviction, which has a state.
        cost: what selecting took.
        knobs: the knobs as solved for this call, numbers, for the results.
    """

    ids: Tensor
    counts: Tensor
    total: int
    values: Tensor | None = None
    positions: Tensor | None = None
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    cost: Cost = Cost()
    knobs: dict[str, Any] = field(default_factory=dict)

    def check(self, kv_heads: int, length: int) -> None:
        """Raise ValueError unless every head keeps at least one token, each once, ascending, and in range.

        Waits for lists that are on a GPU.
        """
        self.check_shapes(kv_heads, length)
        for bits in kept_faults(self.ids, self.counts, self.total, length)[2].tolist():
            if bits:
                raise ValueError(self.words(bits, self.ids.shape[1], self.total, length))

    @staticmethod
    def words(bits: int, width: int, total: int, length: int) -> str:
        """Words for the lowest of `bits` of `FAULTS`, for lists of `width` places."""
        lowest = (int(bits) & -int(bits)).bit_length() - 1
        return FAULTS[lowest].format(most=min(width, length), total=total, length=length)

    def check_shapes(self, kv_heads: int, length: int, value_dim: int | None = None) -> None:
        """The part of `check` that looks at shapes, dtypes and the total only. `value_dim`: of the cached values."""
        shape = tuple(self.ids.shape)
        if len(shape) != 2 or shape[0] != kv_heads or tuple(self.counts.shape) != (kv_heads,):
            raise ValueError(
                f"ids {shape} and counts {tuple(self.counts.shape)} given, expected ({kv_heads}, W) and ({kv_heads},)"
            )
        if self.ids.dtype != torch.int64 or self.counts.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids are {self.ids.dtype}, counts {self.counts.dtype}; expected torch.int64")
        if not isinstance(self.total, int) or isinstance(self.total, bool):
            raise ValueError(f"total is a {type(self.total).__name__}; expected an int, which the host knows")
        if not kv_heads <= self.total <= kv_heads * min(length, shape[1]):
            raise ValueError(f"total is {self.total}, expected {kv_heads} to {kv_heads * min(length, shape[1])} tokens")
        if self.values is not None:
            given, dim = tuple(self.values.shape), "D_v" if value_dim is None else value_dim
            if len(given) != 3 or given[:2] != shape or value_dim not in (None, given[2]):
                raise ValueError(f"values are {given}, expected ({shape[0]}, {shape[1]}, {dim}) like ids")
        if self.positions is not None and (tuple(self.positions.shape) != shape or self.positions.dtype != torch.int64):
            raise ValueError(
                f"positions are {tuple(self.positions.shape)} {self.positions.dtype}, expected torch.int64 like ids "
                f"{shape}"
            )
        for name, entries in self.carried.items():
            if entries.shape[:2] != shape or entries.device != self.ids.device:
                raise ValueError(
                    f"carried {name!r} is {tuple(entries.shape)} on {entries.device}, expected {shape} first, like ids"
                )


def kept_faults(ids: Tensor, counts: Tensor, total: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `cache.compact.check_kept`. The mended lists of a faulty selection are as those of the Triton version."""
    heads, width = ids.shape
    uncountable = (counts < 1) | (counts > min(width, length))
    miscounted = ~uncountable.any() & (counts.sum() != total)
    place = torch.arange(width, device=ids.device)
    valid = place < counts[:, None]
    outside = (ids < 0) | (ids >= length)
    unordered = (ids[:, 1:] <= ids[:, :-1]) & valid[:, 1:]
    bits = uncountable.int() | (miscounted.int() << 1) | ((outside & valid).any(1).int() << 2)
    bits |= unordered.any(1).int() << 3
    even = total // heads + (torch.arange(heads, device=counts.device) < total % heads)
    mended = torch.where(uncountable.any() | miscounted, even.to(counts.dtype), counts)
    return torch.where(bits.any(), ids.clamp(0, length - 1), ids), mended, bits.int()
