"""Where the keys, the values and the state of one layer are stored: flat, one sequence after the other.

A `Pool` is the storage, `Sequences` are what some rows hold in it. There is one way to get room (`take`), one to get
more of it for what is held (`move`), and one to come back to an earlier length (`Sequences.snapshot`, `restore`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.types import RaggedKV, Slot, State


@dataclass(eq=False)
class Sequences:
    """What some rows hold in a pool: sequence `row * heads + head`.

    Attributes:
        starts: `(S,)` int64, first entry of each; lengths: `(S,)` int32, tokens held.
        heads: sequences of a row.
        longest: a number that no length exceeds; total: one that their sum does not exceed, known on the host.
        room: tokens that each can still take.
        first, place: `(S,)` int64, the first page of each and its own entry in the state, where there is one.
    """

    starts: Tensor
    lengths: Tensor
    heads: int
    longest: int
    total: int
    room: int
    first: Tensor | None = None
    place: Tensor | None = None

    def kv(self, pool: Pool) -> RaggedKV:
        return RaggedKV(pool.keys, pool.values, self.starts, self.lengths, self.longest, self.heads)

    def lengthen(self, steps: int) -> None:
        """Count so many new tokens in; whoever has called this appends them."""
        self.lengths = torch.where(self.lengths > 0, self.lengths + steps, 0)
        self.longest += steps
        self.total += steps * len(self.starts)
        self.room -= steps

    def rows(self) -> list[Sequences]:
        """What each row holds, one after the other, to be changed on their own."""
        ends = range(self.heads, len(self.starts) + 1, self.heads)
        tensors = [
            None if part is None else part.split(self.heads)
            for part in (self.starts, self.lengths, self.first, self.place)
        ]
        total = self.heads * self.longest
        return [
            Sequences(starts, lengths, self.heads, self.longest, total, self.room, first, place)
            for starts, lengths, first, place in zip(
                *([None] * len(ends) if part is None else part for part in tensors), strict=True
            )
        ]

    def snapshot(self) -> Any:
        """What `restore` needs to come back to the present lengths."""
        return self.lengths.clone(), self.longest, self.total, self.room

    def restore(self, state: Any) -> None:
        """Forget what was appended since. Storage that has grown in the meantime has more room than there was."""
        lengths, longest, total, room = state
        grown = self.longest - longest
        self.lengths, self.longest, self.total = lengths.clone(), longest, total
        self.room = max(room, self.room + grown)


class Pool:
    """Flat storage of one layer: keys `(N, D)`, values `(N, D_v)`, and the tensors of a method's state.

    Room is granted from the beginning on; `clear` takes all of it back.

    Args:
        slots: what is kept beside keys and values; page_size: keys per page.
    """

    def __init__(self, slots: Sequence[Slot] = (), page_size: int = 0) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.slots, self.page_size = tuple(slots), page_size
        self.tensors: dict[str, Tensor] = {}
        #: Entries granted: of tokens, of pages, of sequences.
        self.used = {"token": 0, "page": 0, "sequence": 0}
        #: How often storage was made: who relies on where it lies compares this, since addresses come again.
        self.made = 0
        #: How much more than the first row all rows will need.
        self.share = 1.0

    def clear(self, share: float, slots: Sequence[Slot] = (), page_size: int = 0) -> None:
        """Forget what is stored. `share`: room that all rows will need, over that of the first."""
        if (tuple(slots), page_size) != (self.slots, self.page_size):
            self.slots, self.page_size, self.tensors = tuple(slots), page_size, {}
            self.made += 1
        self.used, self.share = dict.fromkeys(self.used, 0), share

    # --- room --------------------------------------------------------------------------------------------------

    def take(self, entries: int, key: Tensor, value: Tensor) -> int:
        """Room for `entries` keys like `key (…, D)` and values like `value (…, D_v)`; returns the first of them."""
        first = self._grant("token", entries)
        held = 0 if self.keys is None else len(self.keys)
        if self.keys is None or self.used["token"] > held:
            size = self._size("token", entries, first)
            self.made += 1
            if first == 0:  # nothing to keep: give it back before more is asked for
                self.keys = self.values = None
            self.keys, self.values = (
                grown(old, first, like.new_empty(size, like.shape[-1]))
                for old, like in ((self.keys, key), (self.values, value))
            )
            self._resize("token", size, first)
        return first

    def take_state(self, sequences: Sequences) -> None:
        """Room in the state for these sequences and what they may grow by. A device is not waited for."""
        if not self.slots:
            return
        number = len(sequences.starts)
        place = self._grant("sequence", number)
        self._fit("sequence", number, place)
        sequences.place = torch.arange(place, place + number, device=sequences.starts.device)
        if not self.page_size:
            return
        room, size = sequences.room, self.page_size
        pages = (sequences.lengths.long() + room + size - 1) // size
        # How much each head holds stands on the device; what all hold together is known.
        most = (sequences.total + number * (room + size - 1)) // size
        first = self._grant("page", most)
        self._fit("page", most, first)
        sequences.first = pages.cumsum(0) - pages + first

    def take_more(self, per: str, entries: int) -> int:
        """Room for `entries` pages or sequences in the state; returns the first of them."""
        first = self._grant(per, entries)
        self._fit(per, entries, first)
        return first

    def _grant(self, per: str, entries: int) -> int:
        first = self.used[per]
        self.used[per] += entries
        return first

    def _size(self, per: str, entries: int, first: int) -> int:
        """Entries that storage needs, those that further rows will ask for included."""
        return max(self.used[per], -int(-entries * self.share // 1)) if first == 0 else self.used[per]

    def _fit(self, per: str, entries: int, first: int) -> None:
        """Make room for what was granted in the slots of this kind."""
        own = [slot for slot in self.slots if slot.per == per]
        if any(slot.name not in self.tensors or len(self.tensors[slot.name]) < self.used[per] for slot in own):
            self.made += 1
            self._resize(per, self._size(per, entries, first), first)

    def _resize(self, per: str, size: int, held: int) -> None:
        for slot in self.slots:
            if slot.per == per:
                old = self.tensors.pop(slot.name, None) if held else None
                self.tensors[slot.name] = grown(old, held, slot.empty(size, self.keys))

    def move(self, parts: Sequence[tuple[Sequences, int]], room: int) -> None:
        """Move sequences to storage in which each has `room` for more tokens; what is not moved is lost.

        Waits for the device. Storage never becomes smaller: the next batch may need as much.

        Args:
            parts: rows, and tokens that their sequences hold beyond their lengths.
        """
        held = [list(zip(part.starts.tolist(), (part.lengths + more).tolist(), strict=True)) for part, more in parts]
        firsts = [[0] * len(part.starts) if part.first is None else part.first.tolist() for part, _ in parts]
        places = [[0] * len(part.starts) if part.place is None else part.place.tolist() for part, _ in parts]
        old, tensors, size = (self.keys, self.values), self.tensors, self.page_size
        lengths = [length for own in held for _, length in own]
        starts = _places(length + room for length in lengths)
        pages = _places(-(-(length + room) // size) if size else 0 for length in lengths)
        self.made += 1
        self.used = {
            "token": starts[-1],
            "page": pages[-1] if any(part.first is not None for part, _ in parts) else 0,
            "sequence": len(lengths) if any(part.place is not None for part, _ in parts) else 0,
        }
        entries = max(starts[-1], len(old[0]))
        self.keys, self.values = (states.new_empty(entries, states.shape[-1]) for states in old)
        self.tensors = {
            slot.name: slot.empty(
                entries if slot.per == "token" else max(self.used[slot.per], len(tensors[slot.name])), old[0]
            )
            for slot in self.slots
            if slot.name in tensors
        }
        sequences = [
            (*own, first, place)
            for part, own_firsts, own_places in zip(held, firsts, places, strict=True)
            for own, first, place in zip(part, own_firsts, own_places, strict=True)
        ]
        for number, (start, length, first, place) in enumerate(sequences):
            spans = {
                "token": (starts[number], start, length),
                "page": (pages[number], first, -(-length // size) if size else 0),
                "sequence": (number, place, 1),
            }
            now, before, count = spans["token"]
            for new, states in ((self.keys, old[0]), (self.values, old[1])):
                new[now : now + count] = states[before : before + count]
            for slot in self.slots:
                if slot.name in tensors:
                    now, before, count = spans[slot.per]
                    self.tensors[slot.name][now : now + count] = tensors[slot.name][before : before + count]
        done = 0
        for part, _ in parts:
            own = slice(done, done + len(part.starts))
            device = part.starts.device
            part.starts = torch.tensor(starts[:-1][own]).to(device)
            part.first = None if part.first is None else torch.tensor(pages[:-1][own]).to(device)
            part.place = None if part.place is None else torch.arange(own.start, own.stop, device=device)
            part.room = room
            done = own.stop

    def keep(self, starts: Tensor, ids: Tensor, counts: Tensor) -> None:
        """Move tokens of sequences to their beginnings, in place: keys, values, and what is kept of each token.

        Nothing beyond the kept tokens is written, and a device is not waited for.

        Args:
            starts: `(S,)` int64.
            ids: `(S, W)` int64, of which the first `counts (S,)` are places in a sequence, ascending.
        """
        # Places behind a list repeat its last one: to write the same twice is safe.
        place = torch.arange(ids.shape[1], device=ids.device).minimum(counts[:, None].long() - 1)
        source = (starts[:, None] + ids.gather(1, place)).flatten()
        target = (starts[:, None] + place).flatten()
        tokens = [self.tensors[slot.name] for slot in self.slots if slot.per == "token"]
        for states in (self.keys, self.values, *tokens):
            states[target] = states[source]  # all is read before anything is written

    # --- what is stored ----------------------------------------------------------------------------------------

    def state(self, first: Tensor | None, place: Tensor | None) -> State | None:
        """The state of sequences whose pages and entries begin there; None where nothing is kept."""
        if not self.slots:
            return None
        return State(self.tensors, self.page_size, first, place)

    def kept(self) -> dict[str, Tensor]:
        """What does not follow from the keys."""
        return {s.name: self.tensors[s.name] for s in self.slots if not s.derived and s.name in self.tensors}

    def snapshot(self, held: Sequences) -> Any:
        """A copy of that and where it belongs, for `restore`."""
        where = held.starts, held.lengths, held.first, held.place
        return self.made, where, {name: tensor.clone() for name, tensor in self.kept().items()}

    def restore(self, held: Sequences, state: Any) -> None:
        """Put back what sequences `held` had. Waits for the device where storage has moved in the meantime."""
        made, (starts, lengths, first, place), kept = state
        if made == self.made:
            for name, tensor in kept.items():
                self.tensors[name][: len(tensor)] = tensor
            return
        size, per = self.page_size, {slot.name: slot.per for slot in self.slots}
        now = {"token": held.starts, "page": held.first, "sequence": held.place}
        was = {"token": starts, "page": first, "sequence": place}
        for name, tensor in kept.items():
            kind = per[name]
            places = zip(now[kind].tolist(), was[kind].tolist(), lengths.tolist(), strict=True)
            for there, here, length in places:
                count = {"token": length, "page": -(-length // size) if size else 0, "sequence": 1}[kind]
                self.tensors[name][there : there + count] = tensor[here : here + count]

    def whole(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """A copy of all that is stored, for `put_back`."""
        return self.keys.clone(), self.values.clone(), {name: part.clone() for name, part in self.tensors.items()}

    def put_back(self, whole: tuple[Tensor, Tensor, dict[str, Tensor]]) -> None:
        """Store all of it again, where it was. Storage never becomes smaller in the meantime."""
        keys, values, tensors = whole
        for now, was in ((self.keys, keys), (self.values, values), *((self.tensors[n], t) for n, t in tensors.items())):
            now[: len(was)] = was

    def nbytes(self) -> int:
        """Bytes of all that is stored, room to grow included."""
        held = [tensor for tensor in (self.keys, self.values, *self.tensors.values()) if tensor is not None]
        return sum(tensor.untyped_storage().nbytes() for tensor in held)


def grown(old: Tensor | None, held: int, new: Tensor) -> Tensor:
    """`new` storage that begins with the first `held` entries of `old`."""
    if held:
        new[:held] = old[:held]
    return new


def _places(sizes: Any) -> list[int]:
    """Where each begins, and where the last one ends."""
    return torch.tensor([0, *sizes]).cumsum(0).tolist()
