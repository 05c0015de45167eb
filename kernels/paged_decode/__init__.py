"""Paged-gather decode attention: each new token attends to the keys of the pages that were selected for it.

One public function, several backends, over sequences of different lengths in one flat storage (`ragged.RaggedKV`),
with native GQA: the query heads of a KV head may share their pages (and then its keys are read once) or have
their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ragged import RaggedKV
from . import gather, naive

BACKENDS = {"naive": naive.forward, "gather": gather.forward}


@dataclass(frozen=True)
class PageSelection:
    """Pages that each new token reads.

    Attributes:
        pages: `(S, Gs, T, W)` int32, ids of pages of the sequence, distinct; the first `counts` are valid. Gs is 1
            when the query heads of a KV head share their pages, else their number G.
        counts: `(S, Gs, T)` int32, at least 1.
        page_size: keys per page.
    """

    pages: Tensor
    counts: Tensor
    page_size: int

    def check(self, kv: RaggedKV) -> None:
        """Raise ValueError unless every page begins before the end of what its token may see, once each.

        Costs a host synchronisation: for tests and debugging.
        """
        steps = self.pages.shape[2]
        visible = torch.tensor(kv.lengths, device=self.pages.device)[:, None] - steps + 1
        visible = (visible + torch.arange(steps, device=self.pages.device))[:, None, :, None]
        valid = torch.arange(self.pages.shape[-1], device=self.pages.device) < self.counts[..., None]
        if bool((self.counts < 1).any()) or bool((self.counts > self.pages.shape[-1]).any()):
            raise ValueError(
                f"selection leaves a token without any page, or counts more than the {self.pages.shape[-1]} it lists"
            )
        if bool(((self.pages < 0) | (self.pages.long() * self.page_size >= visible)).logical_and(valid).any()):
            raise ValueError("selection holds a page that its token may not see")
        ids = torch.where(valid, self.pages, -1 - torch.arange(self.pages.shape[-1], device=self.pages.device))
        ids = ids.sort(-1).values
        if bool((ids[..., 1:] == ids[..., :-1]).any()):
            raise ValueError("selection holds a page twice")


def paged_decode(
    query: Tensor,
    kv: RaggedKV,
    selection: PageSelection,
    *,
    scale: float,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, str]:
    """Attention of the last T tokens of each sequence to the keys of their pages.

    Args:
        query: `(S, G, T, D)`; query t sees the first `lengths[s] - T + 1 + t` keys of sequence s at most.
        kv: keys and values of the S sequences, those of the T tokens included.
        selection: pages per (sequence, query head or all of the group, token).
        scale: factor on the scores.
        softcap: `c` of `c * tanh(score / c)`, or None.
        backend: `auto`, `naive` or `gather`.

    Returns:
        `(S, G, T, D_v)` in the query's dtype, and the name of the backend that computed it.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit together, or an unknown backend.
    """
    kv.check(query)
    sequences, group, steps, _ = query.shape
    pages, counts = selection.pages, selection.counts
    if pages.dim() != 4 or pages.shape[:3] != counts.shape or pages.shape[1] not in (1, group):
        raise ValueError(
            f"pages {tuple(pages.shape)} and counts {tuple(counts.shape)} do not fit together: expected "
            f"({sequences}, 1 or {group}, {steps}, width) and the same without width"
        )
    if (pages.shape[0], pages.shape[2]) != (sequences, steps):
        raise ValueError(
            f"pages {tuple(pages.shape)} are for {pages.shape[0]} sequences and {pages.shape[2]} tokens, query "
            f"{tuple(query.shape)} has {sequences} and {steps}"
        )
    if not pages.device == counts.device == query.device:
        raise ValueError(f"devices are {query.device}, {pages.device}, {counts.device} (pages); expected one device")
    if selection.page_size < 1 or not pages.shape[-1]:
        raise ValueError(f"page size is {selection.page_size}, pages listed {pages.shape[-1]}; expected at least 1")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; accepted: auto, {', '.join(BACKENDS)}")
    name = "gather" if backend == "auto" else backend
    return BACKENDS[name](query, kv, selection, scale, softcap), name
