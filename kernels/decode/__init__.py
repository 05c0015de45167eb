"""Decode attention: each new token attends to all keys of its sequence, or to those of the pages selected for it.

One public function, several backends, over sequences of different lengths in one flat storage (`ragged.RaggedKV`),
with native GQA: the query heads of a KV head may share their pages (and then its keys are read once) or have
their own. `auto` is `triton` on CUDA, else `gather`. The output of a sequence does not depend, to the bit, on which
other sequences are in the call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
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

#: What may be wrong with a list of pages; bit i of `PageSelection.faults` stands for the i-th.
FAULTS = (
    "selection leaves a token without any page, or counts more than the {width} it lists",
    "selection holds a page that its token may not see: it is negative",
    "selection holds a page that its token may not see: it begins after the token",
    "selection does not list pages in ascending order, or lists one twice",
)


def fault(bits: int, width: int) -> str:
    """Words for the lowest of `bits` of `FAULTS`, for lists of `width` places."""
    return FAULTS[(int(bits) & -int(bits)).bit_length() - 1].format(width=width)


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

    def faults(self, kv: RaggedKV) -> np.ndarray:
        """`(S, Gs, T)` int32 on the host: what is wrong with each list, a bit for each of `FAULTS`.

        0 where nothing is, and at sequences of length 0. Waits for lists that are on a GPU.
        """
        # Not in torch: on a CPU this is done in every layer of every step, with few numbers.
        pages, counts, lengths = (part.cpu().numpy() for part in (self.pages, self.counts, kv.lengths))
        steps, width = pages.shape[2:]
        last = (lengths[:, None, None] + np.arange(-steps, 0)) // self.page_size  # the page that each token is in
        valid = np.arange(width) < counts[..., None]
        bits = ((counts < 1) | (counts > width)).astype(np.int32)
        bits |= ((pages < 0) & valid).any(-1).astype(np.int32) << 1
        bits |= ((pages > last[..., None]) & valid).any(-1).astype(np.int32) << 2
        bits |= ((pages[..., 1:] <= pages[..., :-1]) & valid[..., 1:]).any(-1).astype(np.int32) << 3
        return np.where(lengths[:, None, None] > 0, bits, 0)

    def check(self, kv: RaggedKV) -> None:
        """Raise ValueError unless lists ascend and every page begins before the end of what its token may see.

        Costs a host synchronisation.
        """
        if (found := self.faults(kv)).any():
            raise ValueError(fault(found[found > 0][0], self.pages.shape[-1]))

    def check_shapes(self, query: Tensor) -> None:
        """Raise ValueError unless lists fit queries `(S, G, T, D)`: shapes, dtypes and devices only."""
        sequences, group, steps, _ = query.shape
        pages, counts = self.pages, self.counts
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
        if self.page_size < 1 or not pages.shape[-1]:
            raise ValueError(f"page size is {self.page_size}, pages listed {pages.shape[-1]}; expected at least 1")
        ready = self.ready
        if ready is not None and (
            ready.shape != (sequences,) or ready.dtype != torch.int32 or pages.shape[1:3] != (1, 1)
        ):
            raise ValueError(
                f"ready is {tuple(ready.shape)} {ready.dtype} for lists {tuple(pages.shape[:3])}; "
                f"expected ({sequences},) torch.int32 and one list for a sequence"
            )


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
            each token attends to. `triton` gives minus the `faults` of a list that has some instead.

    Returns:
        `(S, G, T, D_v)` in the query's dtype, 0 at sequences of length 0, and the name of the backend that computed
        it. On CUDA `triton` does not wait for the device.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit together, a window with a selection, an unknown backend
            or one that cannot run here. What a selection lists is looked at by `PageSelection.check`, and by
            `triton` where it gives `keys_read`; whatever is listed, `triton` reads keys that a token may see.
    """
    kv.check(query)
    _check(query, selection, softcap, window, keys_read)
    name = choose_backend(query, kv, backend)
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
    sequences, _, steps, _ = query.shape
    lists = 1
    if selection is not None:
        selection.check_shapes(query)
        if window is not None:
            raise ValueError(f"window is {window}, with a selection; expected one of them, or neither")
        lists = selection.pages.shape[1]
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


def choose_backend(query: Tensor, kv: RaggedKV, backend: str) -> str:
    """The backend that `paged_decode` takes for these. Raises ValueError as it does."""
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
