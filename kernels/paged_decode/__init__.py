"""Decode attention: each new token attends to all keys of its sequence, or to those of the pages selected for it.

One public function, several backends, over sequences of different lengths in one flat storage (`ragged.RaggedKV`),
with native GQA: the query heads of a KV head may share their pages (and then its keys are read once) or have
their own. `auto` is `triton` on CUDA, else `gather`. The output of a sequence does not depend, to the bit, on which
other sequences are in the call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import triton_unavailable
from ..ragged import RaggedKV
from . import gather, naive

#: Backends in the order in which they are listed to users.
BACKENDS = ("naive", "gather", "triton")

#: What the Triton kernel takes.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class PageSelection:
    """Pages that each new token reads.

    Attributes:
        pages: `(S, Gs, T, W)` int32, ids of pages of the sequence; the first `counts` are valid, distinct and
            ascending, so that only the last of them can reach beyond what its token may see. Gs is 1 when the query
            heads of a KV head share their pages, else their number G.
        counts: `(S, Gs, T)` int32, at least 1. What stands at sequences of length 0 is not looked at.
        page_size: keys per page.
        ready: `(S,)` int32, or None: all lists are complete. Else they may become so while attention, the very next
            call on the stream, has already begun (`page_select.choose_pages`): where `ready` is not 0, the list of a
            sequence is complete and has as many pages, 1 at least, the last of which is the one that the token is in.
        in_use: what such lists are still being made from. It must not be freed before attention is on the stream:
            what attention allocates could lie in its place.
    """

    pages: Tensor
    counts: Tensor
    page_size: int
    ready: Tensor | None = None
    in_use: tuple[Tensor, ...] = ()

    def keys_read(self, kv: RaggedKV) -> Tensor:
        """`(S, Gs, T)` int32: keys in the listed pages that each token may see; 0 at sequences of length 0."""
        steps, width = self.pages.shape[2:]
        at = (self.counts.long() - 1).clamp(0, width - 1)
        last = self.pages.gather(-1, at[..., None])[..., 0].long()
        partial = (kv.visible(steps)[:, None] - last * self.page_size).clamp(max=self.page_size)
        held = kv.lengths[:, None, None] > 0
        return torch.where(held, at * self.page_size + partial, 0).to(torch.int32)

    def check(self, kv: RaggedKV) -> None:
        """Raise ValueError unless lists ascend and every page begins before the end of what its token may see.

        Costs a host synchronisation: for tests and debugging.
        """
        width = self.pages.shape[-1]
        used = (kv.lengths > 0)[:, None, None]
        visible = kv.visible(self.pages.shape[2])[:, None, :, None]
        valid = (torch.arange(width, device=self.pages.device) < self.counts[..., None]) & used[..., None]
        if bool((((self.counts < 1) | (self.counts > width)) & used).any()):
            raise ValueError(f"selection leaves a token without any page, or counts more than the {width} it lists")
        if bool(((self.pages < 0) | (self.pages.long() * self.page_size >= visible)).logical_and(valid).any()):
            raise ValueError("selection holds a page that its token may not see")
        if bool(((self.pages[..., 1:] <= self.pages[..., :-1]) & valid[..., 1:]).any()):
            raise ValueError("selection does not list pages in ascending order, or lists one twice")


def paged_decode(
    query: Tensor,
    kv: RaggedKV,
    selection: PageSelection | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    backend: str = "auto",
    keys_read: Tensor | None = None,
) -> tuple[Tensor, str]:
    """Attention of the last T tokens of each sequence to its keys, or to those of their pages.

    Args:
        query: `(S, G, T, D)`; query t sees the first `lengths[s] - T + 1 + t` keys of sequence s at most.
        kv: keys and values of the S sequences, those of the T tokens included.
        selection: pages per (sequence, query head or all of the group, token), or None for all keys.
        scale: factor on the scores.
        softcap: `c` of `c * tanh(score / c)`, or None.
        window: only that many of the last keys that a token may see, itself included; without a selection only.
        backend: `auto`, `naive`, `gather` or `triton`.
        keys_read: `(S, Gs, T)` int32, contiguous, Gs as in the selection, else 1: filled with the number of keys that
            each token attends to.

    Returns:
        `(S, G, T, D_v)` in the query's dtype, 0 at sequences of length 0, and the name of the backend that computed
        it. On CUDA `triton` does not wait for the device.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit together, a window with a selection, an unknown backend
            or one that cannot run here. What a selection lists is checked by `PageSelection.check`.
    """
    kv.check(query)
    _check(query, selection, softcap, window, keys_read)
    name = _choose(query, kv, backend)
    if name == "triton":
        from . import triton

        return triton.forward(query, kv, selection, scale, softcap, window, keys_read), name
    if keys_read is not None:
        keys_read.copy_(_dense_keys(kv, query.shape[2], window) if selection is None else selection.keys_read(kv))
    forward = naive.forward if name == "naive" else gather.forward
    return forward(query, kv, selection, scale, softcap, window), name


def _dense_keys(kv: RaggedKV, steps: int, window: int | None) -> Tensor:
    """`(S, 1, T)` int64: keys that each token sees."""
    seen = torch.where(kv.lengths[:, None] > 0, kv.visible(steps), 0)
    return (seen if window is None else seen.clamp(max=window))[:, None]


def _check(
    query: Tensor, selection: PageSelection | None, softcap: float | None, window: int | None, keys_read: Tensor | None
) -> None:
    sequences, group, steps, _ = query.shape
    lists = 1
    if selection is not None:
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
        if pages.dtype != torch.int32 or counts.dtype != torch.int32:
            raise ValueError(f"pages are {pages.dtype}, counts {counts.dtype}; expected torch.int32")
        if not pages.device == counts.device == query.device:
            raise ValueError(
                f"devices are {query.device}, {pages.device}, {counts.device} (pages); expected one device"
            )
        if selection.page_size < 1 or not pages.shape[-1]:
            raise ValueError(f"page size is {selection.page_size}, pages listed {pages.shape[-1]}; expected at least 1")
        if window is not None:
            raise ValueError(f"window is {window}, with a selection; expected one of them, or neither")
        if selection.ready is not None and (
            selection.ready.shape != (sequences,) or selection.ready.dtype != torch.int32 or pages.shape[1:3] != (1, 1)
        ):
            raise ValueError(
                f"ready is {tuple(selection.ready.shape)} {selection.ready.dtype} for lists {tuple(pages.shape[:3])}; "
                f"expected ({sequences},) torch.int32 and one list for a sequence"
            )
        lists = pages.shape[1]
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; expected at least 1, or None")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; expected a positive number, or None")
    if keys_read is not None:
        shape = (sequences, lists, steps)
        if keys_read.shape != shape or keys_read.dtype != torch.int32 or not keys_read.is_contiguous():
            raise ValueError(
                f"keys_read is {tuple(keys_read.shape)} {keys_read.dtype}; expected contiguous {shape} torch.int32"
            )
        if keys_read.device != query.device:
            raise ValueError(f"devices are {query.device}, {keys_read.device} (keys_read); expected one device")


def _choose(query: Tensor, kv: RaggedKV, backend: str) -> str:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is unknown; accepted: auto, {', '.join(BACKENDS)}")
    if backend not in ("auto", "triton") or (backend == "auto" and not query.is_cuda):
        return "gather" if backend == "auto" else backend
    reason = triton_unavailable(query.device.type)
    if reason is None and query.dtype not in DTYPES:
        reason = f"it takes no {query.dtype}"
    if reason is None and max(query.shape[-1], kv.values.shape[-1]) > MAX_HEAD_DIM:
        reason = f"its heads have up to {MAX_HEAD_DIM} dimensions, not {query.shape[-1]} and {kv.values.shape[-1]}"
    if reason is None:
        return "triton"
    if backend == "auto":
        return "gather"
    raise ValueError(f"backend 'triton' cannot run here: {reason}; use 'auto' or 'gather'")
