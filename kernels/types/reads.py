"""`Reads`: which pages or tokens of the cache each new token reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .ragged import RaggedKV

#: What may be wrong with a list of pages; bit i of `Reads.faults` stands for the i-th.
FAULTS = (
    "selection leaves a token without any page, or counts more than the {width} it lists",
    "selection holds a page that its token may not see: it is negative",
    "selection holds a page that its token may not see: it begins after the token",
    "selection does not list pages in ascending order, or lists one twice",
)


@dataclass(frozen=True)
class Extra:
    """Virtual keys and values, E for each sequence, that stand for keys which are not read: centroids, a mean value.

    Attributes:
        values: `(S, E, D_v)` in the dtype of the cache.
        keys: `(S, E, D)`, or None: their scores are `bias` alone.
        bias: `(S, 1 or G, T, E)` fp32 added to their scaled (and capped) scores, -inf for none at all; or None, with
            keys.
    """

    values: Tensor
    keys: Tensor | None = None
    bias: Tensor | None = None

    def check_shapes(self, query: Tensor, value_dim: int) -> None:
        """Raise ValueError unless these fit queries `(S, G, T, D)`: shapes, dtypes and devices only."""
        sequences, group, steps, dim = query.shape
        number = self.values.shape[1] if self.values.dim() == 3 else 0
        if self.values.shape != (sequences, number, value_dim) or not number:
            raise ValueError(
                f"extra values are {tuple(self.values.shape)}; expected ({sequences}, at least 1, {value_dim})"
            )
        if self.keys is not None and self.keys.shape != (sequences, number, dim):
            raise ValueError(f"extra keys are {tuple(self.keys.shape)}; expected ({sequences}, {number}, {dim})")
        if self.keys is None and self.bias is None:
            raise ValueError("extra has neither keys nor bias; expected at least one of them, which give its scores")
        states = [part for part in (self.values, self.keys) if part is not None]
        if any(part.dtype != query.dtype for part in states):
            raise ValueError(f"extra holds {', '.join(str(part.dtype) for part in states)}; expected {query.dtype}")
        bias = self.bias
        shapes = {(sequences, lists, steps, number) for lists in (1, group)}
        if bias is not None and (bias.shape not in shapes or bias.dtype != torch.float32):
            raise ValueError(
                f"extra bias is {tuple(bias.shape)} {bias.dtype}; expected ({sequences}, 1 or {group}, {steps}, "
                f"{number}) torch.float32"
            )
        places = {part.device for part in (*states, bias) if part is not None}
        if places != {query.device}:
            raise ValueError(f"devices are {query.device}, {', '.join(map(str, places))} (extra); expected one device")


@dataclass(frozen=True)
class Reads:
    """Pages, or with a unit of 1 tokens, that each new token reads.

    Attributes:
        ids: `(S, Gs, T, W)` int32, ids of pages of the sequence; the first `counts` are valid, distinct and
            ascending, so that only the last of them can reach beyond what its token may see. Gs is 1 when the query
            heads of a KV head share their pages, else their number G.
        counts: `(S, Gs, T)` int32, at least 1. What stands at sequences of length 0 is not looked at.
        unit: keys per page.
        bias: `(S, Gs, T, W)` fp32, or None: what is added to the scaled (and capped) score of every key of a page:
            -log p for keys that were drawn with probability p, -inf for none of the page. What stands behind `counts`
            is not looked at.
        extra: virtual keys and values that each token reads besides, or None.
        ready: `(S,)` int32, or None: all lists are complete. Else they may become so while attention, the very next
            call on the stream, has already begun (`index.pages.choose_pages`): where `ready` is not 0, the list of a
            sequence is complete and has as many pages, 1 at least, the last of which is the one that the token is in.
        in_use: what such lists are still being made from. It must not be freed before attention is on the stream:
            what attention allocates could lie in its place.
    """

    ids: Tensor
    counts: Tensor
    unit: int
    bias: Tensor | None = None
    extra: Extra | None = None
    ready: Tensor | None = None
    in_use: tuple[Tensor, ...] = ()

    @staticmethod
    def from_mask(mask: Tensor, unit: int, bias: Tensor | None = None) -> Reads:
        """Lists of the True entries of `(S, Gs, T, P)`, pages that each token may see. Does not wait for the device.

        Args:
            bias: `(S, Gs, T, P)` fp32 of all pages, or None.
        """
        pages = mask.shape[-1]
        # Pages that are not read are written to a place behind the lists.
        place = torch.where(mask, mask.cumsum(-1) - 1, pages)
        page = torch.arange(pages, device=mask.device, dtype=torch.int32).expand(mask.shape)
        ids = page.new_zeros(*mask.shape[:-1], pages + 1).scatter_(-1, place, page)[..., :-1]
        counts = mask.sum(-1, dtype=torch.int32)
        if bias is not None:
            bias = torch.zeros_like(bias).scatter_(-1, place.clamp(max=pages - 1), torch.where(mask, bias, 0.0))
        return Reads(ids.contiguous(), counts, unit, bias=bias)

    def part(self, sequences: slice) -> Reads:
        """The lists of some of the sequences."""
        ids, counts = self.ids[sequences], self.counts[sequences]
        bias, ready = (None if own is None else own[sequences] for own in (self.bias, self.ready))
        extra = self.extra
        if extra is not None:
            extra = Extra(*(None if p is None else p[sequences] for p in (extra.values, extra.keys, extra.bias)))
        return Reads(ids, counts, self.unit, bias, extra, ready, self.in_use)

    def keys(self, own: int, step: int) -> Tensor:
        """`(S, W * unit)` int64: the keys of the pages that list `own` of token `step` names, in their order."""
        pages = self.ids[:, own, step].long()
        return (pages[..., None] * self.unit + torch.arange(self.unit, device=pages.device)).flatten(1)

    def keys_read(self, kv: RaggedKV) -> Tensor:
        """`(S, Gs, T)` int32: keys in the listed pages that each token may see; 0 at sequences of length 0."""
        steps, width = self.ids.shape[2:]
        at = (self.counts.long() - 1).clamp(0, width - 1)
        last = self.ids.gather(-1, at[..., None])[..., 0].long()
        partial = (kv.visible(steps)[:, None] - last * self.unit).clamp(max=self.unit)
        held = kv.lengths[:, None, None] > 0
        return torch.where(held, at * self.unit + partial, 0).to(torch.int32)

    def faults(self, kv: RaggedKV) -> np.ndarray:
        """`(S, Gs, T)` int32 on the host: what is wrong with each list, a bit for each of `FAULTS`.

        0 where nothing is, and at sequences of length 0. Waits for lists that are on a GPU.
        """
        # Not in torch: on a CPU this is done in every layer of every step, with few numbers.
        pages, counts, lengths = (part.cpu().numpy() for part in (self.ids, self.counts, kv.lengths))
        steps, width = pages.shape[2:]
        last = (lengths[:, None, None] + np.arange(-steps, 0)) // self.unit  # the page that each token is in
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
            raise ValueError(self.words(found[found > 0][0], self.ids.shape[-1]))

    @staticmethod
    def words(bits: int, width: int) -> str:
        """Words for the lowest of `bits` of `FAULTS`, for lists of `width` places."""
        return FAULTS[(int(bits) & -int(bits)).bit_length() - 1].format(width=width)

    def check_shapes(self, query: Tensor) -> None:
        """Raise ValueError unless lists fit queries `(S, G, T, D)`: shapes, dtypes and devices only."""
        sequences, group, steps, _ = query.shape
        pages, counts = self.ids, self.counts
        if self.bias is not None and (self.bias.shape != pages.shape or self.bias.dtype != torch.float32):
            raise ValueError(
                f"bias is {tuple(self.bias.shape)} {self.bias.dtype}; expected torch.float32 like ids "
                f"{tuple(pages.shape)}"
            )
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
        if self.bias is not None and self.bias.device != query.device:
            raise ValueError(f"devices are {query.device}, {self.bias.device} (bias); expected one device")
        if self.unit < 1 or not pages.shape[-1]:
            raise ValueError(f"page size is {self.unit}, pages listed {pages.shape[-1]}; expected at least 1")
        ready = self.ready
        if ready is not None and (
            ready.shape != (sequences,) or ready.dtype != torch.int32 or pages.shape[1:3] != (1, 1)
        ):
            raise ValueError(
                f"ready is {tuple(ready.shape)} {ready.dtype} for lists {tuple(pages.shape[:3])}; "
                f"expected ({sequences},) torch.int32 and one list for a sequence"
            )
        if ready is not None and (self.bias is not None or self.extra is not None):
            raise ValueError("lists that may not be complete yet (ready) take neither bias nor extra")
