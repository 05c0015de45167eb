"""SnapKV (Li et al., NeurIPS 2024) as harmonised by The Sparse Frontier (section 3): a fixed capacity per KV head.

Once the prompt is read, the last queries vote for the keys that they attend to; neighbours of a chosen key score
with it (pooling); what is not chosen is dropped from the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from ...kernels.estimate import window_flops, window_sums
from ..base import FORCED_SHARE, EvictionMethod, EvictionSelection, Geometry, number, top

#: First and last tokens that are always kept, as in the paper.
SINKS, LOCAL = 4, 128


@dataclass(frozen=True)
class SnapKV(EvictionMethod):
    """The `capacity` tokens of each KV head with the largest pooled attention (paper: section 3 and Table 3).

    Knobs:
        capacity: tokens that each KV head keeps (on average), forced ones included.
        window: last queries that vote, fewer where the prompt is shorter, unless it is typed.
        kernel: width of the average pooling over keys, odd; zeros are padded at both ends.
        sinks, local: first and last tokens that are always kept: 4 and 128, fewer where a requested sparsity leaves no
            room for them; what is typed is kept.
    """

    name: ClassVar[str] = "snapkv"
    unit: ClassVar[str] = "tokens"
    importance: ClassVar[str] = "window of last queries"
    allocation: ClassVar[str] = "uniform"
    kv: ClassVar[str] = "evicted"
    paper: ClassVar[str] = "Li et al., NeurIPS 2024"
    budget_knobs: ClassVar[tuple[str, ...]] = ("capacity",)

    capacity: int = 1024
    window: int = 256
    kernel: int = 21
    sinks: int | Literal["auto"] = "auto"
    local: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("capacity", self.capacity, 1, math.inf, whole=True, example=1024)
        number("window", self.window, 1, math.inf, whole=True, example=256)
        number("kernel", self.kernel, 1, math.inf, whole=True, example=21)
        if self.sinks != "auto":
            number("sinks", self.sinks, 0, math.inf, whole=True, example=4)
        if self.local != "auto":
            number("local", self.local, 1, math.inf, whole=True, example=128)
        if self.kernel % 2 == 0:
            raise UserError(f"kernel={self.kernel} is even: give an odd width, for example kernel={self.kernel + 1}")

    def check_native(self) -> None:
        """What only matters when the capacity rules: it must exceed the window and hold what is always kept."""
        if self.capacity <= self.window:
            raise UserError(
                f"capacity={self.capacity} does not exceed window={self.window}: give a capacity above "
                f"{self.window}, or a smaller window"
            )
        sinks, local = self._native().sinks, self._native().local
        if self.capacity < sinks + local:
            raise UserError(
                f"capacity={self.capacity} cannot hold sinks={sinks} and local={local}, which are always kept: give a "
                f"capacity of at least {sinks + local}, or smaller sinks and local"
            )

    def _native(self) -> SnapKV:
        """With the paper's sinks and local tokens where none were typed."""
        sinks, local = (
            paper if typed == "auto" else typed for typed, paper in ((self.sinks, SINKS), (self.local, LOCAL))
        )
        return replace(self, sinks=sinks, local=local)

    def knobs_for(self, sparsity: float, length: int, geometry: Geometry | None = None) -> SnapKV:
        """Capacity in closed form; sinks and local tokens shrink to a quarter of it, unless they were typed."""
        capacity = max(1, round((1 - sparsity) * length))
        forced = int(capacity * FORCED_SHARE)
        sinks = min(SINKS, forced) if self.sinks == "auto" else self.sinks
        local = max(1, min(LOCAL, forced - sinks)) if self.local == "auto" else self.local
        return replace(self, capacity=capacity, sinks=sinks, local=local)

    def largest_sparsity(self, length: int) -> float:
        typed = sum(value for value in (self.sinks, self.local) if value != "auto")
        return max(0.0, 1 - typed / length)

    def too_short(self, sparsity: float | None, length: int) -> str | None:
        if sparsity is not None and self.largest_sparsity(length) < sparsity:
            return (
                f"prompt of {length} tokens is too short for sparsity {sparsity:g} (sinks={self.sinks} and "
                f"local={self.local} are always kept: at most {self.largest_sparsity(length):.3f} there)"
            )
        capacity = self.capacity if sparsity is None else self.knobs_for(sparsity, length).capacity
        if capacity >= length:
            return f"prompt of {length} tokens fits into the capacity of {capacity}"
        return None

    def keeps(self, sparsity: float | None, length: int) -> int:
        return min(length, self.capacity) if sparsity is None else super().keeps(sparsity, length)

    @torch.no_grad()
    def select(
        self, query: Tensor, key: Tensor, *, scale: float, softcap: float | None, sparsity: float | None
    ) -> EvictionSelection:
        heads, length, dim = query.shape
        kv_heads = key.shape[0]
        method = self._native() if sparsity is None else self.knobs_for(sparsity, length)
        scores = method._scores(query, key, scale, softcap)
        padding = method.kernel // 2
        pooled = F.avg_pool1d(scores[:, None], method.kernel, stride=1, padding=padding)[:, 0]
        pooled[:, : method.sinks] = math.inf
        pooled[:, max(0, length - method.local) :] = math.inf
        kept, counts, width = method._keep(pooled)
        # Tokens that are not kept are written to a place behind the lists.
        places = torch.where(kept, kept.cumsum(-1) - 1, width)
        tokens = torch.arange(length, device=query.device).expand_as(places)
        indices = places.new_zeros(kv_heads, width + 1).scatter_(1, places, tokens)
        return EvictionSelection(
            indices=indices[:, :width],
            counts=counts,
            total=kv_heads * min(method.capacity, length),
            estimator_flops=window_flops(heads, method.window, length, dim),
            estimator_bytes=query.element_size() * dim * (kv_heads * length + heads * min(method.window, length)),
            knobs={**{name: getattr(method, name) for name in method.knobs()}, "window": min(method.window, length)},
        )

    def _scores(self, query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
        """`(H_kv, L)`: attention of the window's queries, summed over them, averaged over the heads of the group."""
        sums = window_sums(query, key, self.window, scale=scale, softcap=softcap, columns=True).columns
        return sums.reshape(key.shape[0], -1, key.shape[1]).mean(1)

    def _keep(self, pooled: Tensor) -> tuple[Tensor, Tensor, int]:
        """What to keep, `(H_kv, L)` bool; how many tokens of each head that is, `(H_kv,)` int64; and at most.

        Forced tokens score infinity.
        """
        count = min(self.capacity, pooled.shape[-1])
        return top(pooled, count), torch.full((len(pooled),), count, device=pooled.device), count
