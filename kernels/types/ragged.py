"""Keys and values of sequences of different lengths in one flat storage.

A sequence is what one KV head of one row holds; sequence `row * H_kv + head`. After eviction every head may hold
a different number of keys; before, all heads of a row hold the same. Either way the storage is `(N, D)` and a
sequence is a contiguous part of it. Where sequences begin and how long they are stands in tensors on the device, so
that decoding never waits for it and a captured step reads what is true when it is replayed.

Sequences may share their beginning: several answers to one prompt hold its keys once, and a part of their own behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RaggedKV:
    """S sequences of keys and values.

    Attributes:
        keys: `(N, D)`; values: `(N, D_v)`, contiguous.
        starts: `(S,)` int64, first entry of each sequence in the storage.
        lengths: `(S,)` int32, keys that each sequence holds. A sequence of length 0 is a place that nobody uses:
            nothing of it is read or written, and its outputs are 0.
        longest: a number that no length exceeds, known on the host.
        heads: sequences of one row, which follow each other; S is a multiple of it. What is computed for a row never
            depends on other rows, to the bit, but it may be computed for all its heads at once.
        tickets: `(2, S)` int32, or None. Where programs of a kernel count who is the last one, which then finishes what
            they have begun, and where the next kernel sees that it is done. Zeros when they are made; each call leaves
            them so that another can use them. Calls that share tickets must follow each other on one stream.
    """

    keys: Tensor
    values: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int
    heads: int = 1
    tickets: Tensor | None = None
    tails: Tensor | None = None
    splits: Tensor | None = None

    @staticmethod
    def of(keys: Tensor, values: Tensor, starts: Sequence[int], lengths: Sequence[int], heads: int = 1) -> RaggedKV:
        """From starts and lengths known on the host.

        Raises:
            ValueError: a sequence outside of the storage, or numbers that do not fit together.
        """
        if len(keys) != len(values) or len(starts) != len(lengths):
            raise ValueError(
                f"{len(keys)} keys, {len(values)} values, {len(starts)} starts and {len(lengths)} lengths "
                "do not fit together"
            )
        ends = (start + length for start, length in zip(starts, lengths, strict=True))
        if min(starts, default=0) < 0 or max(ends, default=0) > len(keys):
            raise ValueError(f"a sequence reaches outside the {len(keys)} stored keys")
        places = torch.tensor(starts, dtype=torch.int64).to(keys.device)
        held = torch.tensor(lengths, dtype=torch.int32).to(keys.device)
        return RaggedKV(keys, values, places, held, max(lengths, default=0), heads)

    def part(self, sequences: slice) -> RaggedKV:
        """Some of the sequences, whole rows of them, over the same storage."""
        starts, lengths = self.starts[sequences], self.lengths[sequences]
        tickets = None if self.tickets is None else self.tickets[:, sequences]
        shared = (None if own is None else own[sequences] for own in (self.tails, self.splits))
        return RaggedKV(self.keys, self.values, starts, lengths, self.longest, self.heads, tickets, *shared)

    @property
    def shared(self) -> bool:
        """Whether sequences share their beginnings."""
        return self.tails is not None

    def at(self, places: Tensor) -> Tensor:
        """`(S, …)` int64: the entries of these keys `(S, …)` of each sequence in the storage."""

        def own(part: Tensor) -> Tensor:
            return part.view(-1, *[1] * (places.dim() - 1))

        found = own(self.starts) + places
        return found if self.tails is None else torch.where(places < own(self.splits), found, own(self.tails) + places)

    def copied(self) -> RaggedKV:
        """The same sequences, each in one piece, in storage of its own. Waits for the device."""
        numbers = self.lengths.tolist()
        most = max(numbers, default=0)
        places = torch.arange(most, device=self.starts.device).expand(len(numbers), -1)
        held = places < self.lengths[:, None]
        at = self.at(places)[held]
        ends = torch.tensor([0, *numbers[:-1]]).cumsum(0).to(self.starts.device)
        return RaggedKV(self.keys[at], self.values[at], ends, self.lengths, most, self.heads)

    def rows(self) -> list[tuple[slice, tuple[int, int, int] | None]]:
        """The rows, read on the host: their sequences, and where heads are equally long and equally far from each
        other the first entry of the first one, that distance and that length, else None.

        Raises:
            ValueError: sequences that share their beginnings: they do not lie in one piece.
        """
        self.refuse_shared()
        starts, lengths, heads = self.starts.tolist(), self.lengths.tolist(), self.heads
        found: list[tuple[slice, tuple[int, int, int] | None]] = []
        for first in range(0, len(starts), heads):
            end, start = first + heads, starts[first]
            apart = starts[first + 1] - start if heads > 1 else 0
            even = apart >= 0 and starts[first:end] == [start + apart * head for head in range(heads)]
            alike = even and lengths[first:end] == [lengths[first]] * heads
            found.append((slice(first, end), (start, apart, lengths[first]) if alike else None))
        return found

    def refuse_shared(self) -> None:
        """Raise ValueError where sequences do not lie in one piece each."""
        if self.shared:
            raise ValueError("sequences share their beginnings; expected each in one piece (see `RaggedKV.copied`)")

    def visible(self, steps: int) -> Tensor:
        """`(S, T)` int64: keys that each of the last T tokens of a sequence may see, itself included."""
        behind = torch.arange(1 - steps, 1, device=self.lengths.device)
        return self.lengths.long()[:, None] + behind

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
        if self.starts.dtype != torch.int64 or self.lengths.dtype != torch.int32:
            raise ValueError(
                f"starts are {self.starts.dtype}, lengths {self.lengths.dtype}; expected torch.int64 and torch.int32"
            )
        if not query.device == self.keys.device == self.values.device == self.starts.device == self.lengths.device:
            raise ValueError(
                f"devices are {query.device}, {self.keys.device}, {self.values.device}, {self.starts.device}, "
                f"{self.lengths.device}; expected one device"
            )
        if (self.tails is None) != (self.splits is None) or any(
            own is not None and (own.shape != (sequences,) or own.dtype != torch.int64 or own.device != query.device)
            for own in (self.tails, self.splits)
        ):
            told = [None if own is None else (tuple(own.shape), own.dtype) for own in (self.tails, self.splits)]
            raise ValueError(
                f"tails and splits are {told[0]} and {told[1]}; expected both ({sequences},) torch.int64 on "
                f"{query.device}, or neither"
            )
        tickets = self.tickets
        if tickets is not None and (
            tickets.shape != (2, sequences) or tickets.dtype != torch.int32 or tickets.device != query.device
        ):
            raise ValueError(
                f"tickets are {tuple(tickets.shape)} {tickets.dtype} on {tickets.device}; expected (2, {sequences}) "
                f"torch.int32 on {query.device}"
            )
        steps = query.shape[2]
        # What lies on a GPU is not read: that would wait for it.
        if steps > 1 and not self.lengths.is_cuda:
            held = self.lengths[self.lengths > 0]
            if len(held) and int(held.min()) < steps:
                raise ValueError(f"a sequence holds {int(held.min())} keys, but {steps} queries are among them")
