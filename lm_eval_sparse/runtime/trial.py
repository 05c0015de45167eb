"""Methods whose selections are known: what the check at start-up runs in the phases that a method is to fill.

Each leaves something out that its place would otherwise hide, and notes what it has chosen, so that the same keys can
be shown to transformers' own attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.types import Blocks, Keep, Reads
from ..methods.base import Call, DecodeMethod, EvictionMethod, PrefillMethod

#: Keys of a block and of a page.
BLOCK, PAGE = 16, 8


@dataclass(eq=False)
class Trial:
    """What the methods on trial have chosen.

    Attributes:
        layer: the layer that runs.
        shown: `(1, q_len, kv_len)` bool, keys that the running call of the prefill may read; None for all.
        kept: layer -> `(H_kv, prompt)` bool, what stays after the prefill.
        pages: `(H_kv, q_len)` the page that each new token is in; the first one is read beside it. None for all.
    """

    layer: int = 0
    shown: Tensor | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)
    pages: Tensor | None = None

    def later(self, lender: int, length: int) -> Tensor | None:
        """`(H_kv, 1 or q_len, length)` bool: keys that the running call behind the prefill may read; None for all.

        Args:
            lender: the layer whose cache the call reads.
            length: tokens so far.
        """
        kept, pages = self.kept.get(lender), self.pages
        if kept is None and pages is None:
            return None
        if kept is None:
            kept = torch.ones(len(pages), 0, dtype=torch.bool, device=pages.device)
        kept = torch.cat([kept, kept.new_ones(len(kept), length - kept.shape[1])], 1)[:, None]
        if pages is None:
            return kept
        page = (kept.cumsum(-1) - 1) // PAGE
        return kept & ((page == 0) | (page == pages[..., None]))


@dataclass(frozen=True)
class TrialPrefill(PrefillMethod):
    """The first block of keys, and a query block's own."""

    name = "prefill on trial"
    trial: Any = None

    def select(self, call: Call) -> Blocks:
        heads, length, _ = call.query.shape
        blocks = torch.arange(-(-length // BLOCK), device=call.query.device)
        wanted = ((blocks[None] == 0) | (blocks[None] == blocks[:, None])).expand(heads, -1, -1)
        own = torch.arange(length, device=call.query.device) // BLOCK
        self.trial.shown = wanted[:1, own][..., own]
        return Blocks.from_mask(wanted, length, BLOCK, BLOCK)


@dataclass(frozen=True)
class TrialEviction(EvictionMethod):
    """Two tokens of three, other ones in each KV head, and the last one."""

    name = "eviction on trial"
    trial: Any = None

    def select(self, call: Call) -> Keep:
        key = call.key
        heads, length, _ = key.shape
        ids, own = torch.arange(length, device=key.device), torch.arange(heads, device=key.device)
        kept = ((ids + own[:, None]) % 3 != 0) | (ids == length - 1)
        counts = kept.sum(1)
        indices = torch.where(kept, ids, length).sort(1).values[:, : int(counts.max())]
        self.trial.kept[self.trial.layer] = kept
        return Keep(indices.clamp(max=length - 1), counts, int(counts.sum()))


@dataclass(frozen=True)
class TrialDecode(DecodeMethod):
    """The first page, and the one being written."""

    name = "decode on trial"
    page_size: int = PAGE
    trial: Any = None

    def select(self, call: Call) -> Reads:
        steps = call.query.shape[2]
        last = (call.cache.kv.visible(steps) - 1).clamp(min=0) // PAGE
        pages = torch.stack([torch.zeros_like(last), last], -1)[:, None].int()
        self.trial.pages = last[: call.cache.kv_heads]
        return Reads(pages.contiguous(), (1 + (last > 0).int())[:, None].contiguous().int(), PAGE)


#: By phase.
METHODS = {"prefill": TrialPrefill, "eviction": TrialEviction, "decode": TrialDecode}
