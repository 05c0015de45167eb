"""Several answers to one prompt, scored side by side: the prompt is held once, each answer has a part of its own.

A pass of the model reads tokens of many answers at once, one token a row, in tiles of a fixed number of rows: a product
with other numbers of rows may round otherwise. Each token attends as it does alone. Its sequence is the prompt's keys,
as long as they are shared, and behind them those of its answer up to itself; the prompt's last page, where it is not
full, belongs to the answer's part, so that a page lies in one piece. A decode method is asked for each token as if it
were the newest. What attention reads of both parts is merged as parts of one sequence are, by the logarithms of their
sums, in an order that follows from the number of keys alone.

Answers get a copy of the prompt instead where a method does not know shared beginnings, or changes what is held: one
that weighs what is read, or is asked again in the course of an answer. The latter goes token by token.

Where answers share, a pass on a GPU is a fixed sequence of kernels over static tensors, which is captured in a CUDA
graph once some passes have run.

The file is long since storage, passes and counting share what stands where.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..kernels.cache.append import append
from ..kernels.types import RaggedKV, State
from ..methods.base import CacheView, Call, Layer
from . import diagnose
from .accounting import DecodeShape, PhaseCounts, RowCounts, count_rows, settle
from .cache import CacheLayer, SparseCache, same_memory
from .graphs import Graphs
from .memory import out_of_memory
from .periodic import evict_again, kept_by
from .pool import Pool, Sequences
from .rows import PassingLayer, adopt_window
from .selections import DEBUGGED, tell
from .session import Runtime
from .steps import Filled, Stepped, step

logger = logging.getLogger(__name__)

#: Kernels and methods are told that answers are as long as a multiple of this, so that what they make of it does not
#: depend on which answers are side by side.
ROUNDED = 256
#: Tokens of an answer that are scored in one call where answers come one after the other: bounds the logits held.
SCORE_CHUNK = 1024
#: Passes that run before one is captured: to capture one takes as long as some ten.
BEFORE_CAPTURE = 8
#: A captured pass is told that sequences are as long as a multiple of this.
CAPTURED = 4096
#: Tokens of answers that storage has room for from the beginning: a pass is captured anew when it moves.
ROOM = 4096
#: Tokens of answers, what they copy of the prompt's last page included, that are held at once at most.
MOST_HELD = 16384


@dataclass
class Held:
    """What one layer holds of the prompt, and of the answers that are being scored.

    Attributes:
        pool: where.
        heads: KV heads.
        starts, lengths: of the prompt's sequences `(H_kv,)`, on the host; first, place: of their state, where there is
            any.
        table: of the answers, `(7, C, H_kv)` int64: starts, lengths, tails, splits, first pages, pages of tails, and
            places.
    """

    pool: Pool
    heads: int
    starts: np.ndarray
    lengths: np.ndarray
    first: np.ndarray | None = None
    place: np.ndarray | None = None
    table: Tensor | None = None
    known: Layer | None = None
    newest: Tensor | None = None


@dataclass
class Tile:
    """The rows of a pass: tokens of answers. All tensors have W entries, 0 for rows and answers that are not there.

    Attributes:
        rows: `(answer, token)` of each.
        answer: which answer; seen: tokens of it so far, the row's included, since it was last evicted; tokens: those of
            prompt and answer; wanted: the token that follows.
        answers: of the tile, ascending; before, after: their tokens before and with the pass; so_far: those of prompt
            and answer with the pass.
        newest: the row of the last token of each.
        token_rows: `(W, most)` the rows of all their tokens, the last one repeated; None where answers share.
    """

    rows: list[tuple[int, int]]
    ids: Tensor
    positions: Tensor
    answer: Tensor
    seen: Tensor
    tokens: Tensor
    wanted: Tensor
    answers: Tensor
    before: Tensor
    after: Tensor
    so_far: Tensor
    newest: Tensor
    token_rows: Tensor | None = None


@dataclass
class Noted:
    """What the passes do in one layer, to be counted at the end.

    Attributes:
        reads: keys read in the last pass `(W * H_kv, Gs, 1)`, or None.
        held: of each pass, `(W, H_kv)` keys held, where that follows from what methods choose.
    """

    shape: DecodeShape | None = None
    backend: str = ""
    method: Any = None
    width: int = 0
    reads: Tensor | None = None
    held: list[Tensor] = field(default_factory=list)


class Candidates:
    """Scores answers to a prompt.

    Args:
        call: the model: `(ids (W, 1), positions (W, 1), cache)` to logits `(W, V)`.
        log_softmax: logits to log-probabilities.
        rows: W, of every pass.
        forked: answers at most that get a copy of the prompt, at once: from the prompt's tokens and the longest answer.
        no_graph: why passes must not be captured, if so.
        share: whether answers may share what is held of the prompt.
        landed: is told, after each pass, how many tokens it has read.
    """

    def __init__(
        self,
        call: Callable[[Tensor, Tensor, Cache], Tensor],
        log_softmax: Callable[[Tensor], Tensor],
        config: Any,
        runtime: Runtime,
        device: torch.device,
        rows: int,
        forked: Callable[[int, int], int],
        no_graph: str | None = None,
        share: bool = True,
        landed: Callable[[int], None] = lambda tokens: None,
    ):
        self.landed, self._share = landed, share
        self.call, self.log_softmax, self.config = call, log_softmax, config
        self.runtime, self.device, self.rows, self._forked = runtime, device, rows, forked
        self._cache = Cache(layers=[PassingLayer() for _ in SparseCache(config, longest=runtime.longest).layers])
        self.pools: list[Pool] = []
        self.prompt = 0
        #: The cache of the prompt whose answers can be scored.
        self.adopted: SparseCache | None = None
        #: Counts of the prompt, where every step of it is looked at.
        self.watched: RowCounts | None = None
        self._layers: list[Held] = []
        self._noted: dict[int, Noted] = {}
        self._since: list[int] = []
        self._longest = self._passes = self._width = 0
        self._numbers = torch.zeros(11 * rows, dtype=torch.int64, device=device)
        self._tile = Tile([], *self._numbers.view(11, rows))
        self._table = torch.zeros(0, dtype=torch.int64, device=device)
        self._found = torch.zeros(rows, dtype=torch.float32, device=device)
        self._hits = torch.zeros(rows, dtype=torch.bool, device=device)
        self._reads: Tensor | None = None
        refused = DEBUGGED if runtime.plan.debug else no_graph
        self.graphs = Graphs(self._step, list, refused)
        #: What was captured relies on these.
        self._relied: Any = None

    @property
    def shares(self) -> bool:
        """Whether answers share what is held of the prompt."""
        plan = self.runtime.plan
        return self._share and plan.every is None and (plan.decode is None or plan.decode.method.shares)

    @property
    def in_turn(self) -> bool:
        """Whether the tokens of an answer are read one after the other."""
        plan = self.runtime.plan
        return plan.every is not None or plan.one_by_one

    # --- the prompt --------------------------------------------------------------------------------------------

    def new_cache(self, prompt: int) -> SparseCache:
        """The cache for the prefill of a prompt, whose keys and values go where the answers will find them."""
        if not self.pools:
            self.pools = [Pool() for _ in self._cache.layers]
        for pool in self.pools:
            pool.clear(1 + ROOM / prompt if self.shares else 1.0, *self.runtime.kept_state())
        self.prompt, self.adopted = prompt, None
        return self.runtime.new_cache(self.config, 0, self.pools, prompt)

    def adopt(self, cache: SparseCache) -> None:
        """Take what the prefill has left. Waits for the device once."""
        self.adopted = cache
        held: list[Sequences] = []
        for index, (layer, pool) in enumerate(zip(cache.layers, self.pools, strict=True)):
            if not isinstance(layer, CacheLayer):
                held.append(adopt_window(layer, pool, 0))
                continue
            own = layer.ended()
            size = own.heads * (pool.keys.shape[1] + pool.values.shape[1]) * pool.keys.element_size()
            if size != self.runtime.sizes[index][0]:
                raise ValueError(f"layer {index} caches something else than the keys and values that attention reads")
            held.append(own)
        parts = [(own.starts, own.lengths, own.first, own.place) for own in held]
        numbers = torch.cat([part.long() for own in parts for part in own if part is not None]).cpu().numpy()
        self._layers, start = [], 0
        for own, pool, found in zip(held, self.pools, parts, strict=True):
            each = []
            for part in found:
                each.append(None if part is None else numbers[start : start + len(part)])
                start += 0 if part is None else len(part)
            self._layers.append(Held(pool, own.heads, *each))

    def release(self) -> None:
        """Give all memory back."""
        self.graphs.clear()
        self.pools, self._layers, self._noted, self._reads, self._relied = [], [], {}, None, None
        self.adopted = None

    # --- answers -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, answers: Sequence[Sequence[int]], first: Tensor, counts: RowCounts) -> list[tuple[Tensor, Tensor]]:
        """Log-probabilities fp64 and greedy hits of the tokens of each answer, on the host; counts them.

        Args:
            answers: token ids, at least one each.
            first: `(V,)` log-probabilities of their first tokens.
        """
        self.watched = counts if counts.diagnosis is not None else None
        self.runtime.decoder = self
        starts = torch.tensor([answer[0] for answer in answers], device=self.device)
        logprobs, hits = [first[starts].float()], [first.argmax() == starts]
        places: list[tuple[int, int]] = [(answer, 0) for answer in range(len(answers))]
        used = [dict(pool.used) for pool in self.pools]
        try:
            order = sorted(range(len(answers)), key=lambda place: -len(answers[place]))
            order = [place for place in order if len(answers[place]) > 1]
            limit = len(order)
            while order:
                most = min(limit, self._at_once([len(answers[place]) for place in order]))
                some, order = order[:most], order[most:]
                try:
                    found = self._run_some([answers[place] for place in some], counts)
                except RuntimeError as error:
                    if not out_of_memory(error) or len(some) == 1 or not self.shares:
                        raise
                    order, limit = some + order, len(some) // 2
                    found = None
                if found is None:  # the error is gone, and with it what it kept alive
                    self.graphs.clear()
                    torch.cuda.empty_cache()
                    logger.warning("memory ran out with %d answers to a prompt: trying again with %d", len(some), limit)
                else:
                    logprobs.append(found[0])
                    hits.append(found[1])
                    places += [(some[answer], token + 1) for answer, token in found[2]]
                for pool, before in zip(self.pools, used, strict=True):
                    pool.used = dict(before)
        finally:
            self.runtime.decoder = None
        settle([counts])
        number = max((len(answer) for answer in answers), default=0)
        self.runtime.longest_answer = max(self.runtime.longest_answer, number)
        made = [torch.cat(parts).cpu() for parts in (logprobs, hits)]
        results = [(torch.zeros(len(a), dtype=torch.float64), torch.zeros(len(a), dtype=torch.bool)) for a in answers]
        answer, token = (torch.tensor(part) for part in zip(*places, strict=True))
        for place, (logprob, hit) in enumerate(results):
            own = answer == place
            logprob[token[own]], hit[token[own]] = made[0][own].double(), made[1][own]
        return results

    def _at_once(self, lengths: Sequence[int]) -> int:
        """How many of the next answers of so many tokens, the longest first, are held at once."""
        if not lengths or self.watched is not None:  # what is looked at follows one answer at a time
            return 1
        most = len(lengths)
        if self.shares:
            plan = self.runtime.plan
            page = 1 if plan.decode is None else plan.decode.method.page_size
            held = np.cumsum([length + page for length in lengths])
            most = max(1, int((held <= MOST_HELD).sum()))
        else:  # a pass reads a token of each: more copies would do nothing
            most = max(1, min(most, self.rows, self._forked(self.prompt, lengths[0])))
        return most

    def _run_some(
        self, answers: Sequence[Sequence[int]], counts: RowCounts
    ) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """Log-probabilities and hits of all tokens but the first of these answers, and which `(answer, token)` each
        comes behind."""
        self._begin([len(answer) - 1 for answer in answers])
        read: list[tuple[int, int]] = []
        found: list[Tensor] = []
        hits: list[Tensor] = []
        reads: list[Tensor] = []
        for rows in self._tiles([len(answer) - 1 for answer in answers]):
            self._pass(rows, answers, counts)
            self.landed(len(rows))
            found.append(self._found[: len(rows)].clone())
            hits.append(self._hits[: len(rows)].clone())
            if self._reads is not None:
                reads.append(self._reads[: len(rows)].clone())
            read += rows
        self._count(counts, np.array(read), torch.cat(reads) if reads else None)
        return torch.cat(found), torch.cat(hits), read

    def _tiles(self, steps: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """`(answer, token)` of the rows of each pass, for answers of so many steps, the longest first."""
        if self.in_turn:
            for token in range(max(steps, default=0)):
                now = [(answer, token) for answer, number in enumerate(steps) if token < number]
                for first in range(0, len(now), self.rows):
                    yield now[first : first + self.rows]
            return
        rows = [(answer, token) for answer, number in enumerate(steps) for token in range(number)]
        for first in range(0, len(rows), self.rows):
            yield rows[first : first + self.rows]

    def _begin(self, steps: Sequence[int]) -> None:
        """Make room for answers of so many steps, and copies where they do not share."""
        number, most = len(steps), max(steps)
        plan = self.runtime.plan
        page = 1 if plan.decode is None else plan.decode.method.page_size
        self._since = [0] * number
        for noted in self._noted.values():
            noted.held = []
        longest = max(int(held.lengths.max()) for held in self._layers)
        self._longest = longest + -(-most // ROUNDED) * ROUNDED
        fill = self._shared if self.shares else self._copied
        tables = [fill(held, np.array(steps), page) for held in self._layers]
        # Room for twice as many answers each time: what was captured relies on where the table lies.
        if number > self._width or self._table.numel() != sum(7 * self._width * held.heads for held in self._layers):
            self._width = max(32, 1 << (number - 1).bit_length())
            size = sum(7 * self._width * held.heads for held in self._layers)
            self._table = torch.zeros(size, dtype=torch.int64, device=self.device)
        padded = [np.pad(table, ((0, 0), (0, self._width - number), (0, 0))) for table in tables]
        self._table.copy_(torch.from_numpy(np.concatenate([table.ravel() for table in padded])))
        sizes = [table.size for table in padded]
        for held, table, part in zip(self._layers, padded, self._table.split(sizes), strict=True):
            held.table, held.newest, held.known = part.view(table.shape), None, None

    def _shared(self, held: Held, steps: np.ndarray, page: int) -> np.ndarray:
        """The table of answers of so many steps that share the prompt, but for its last page where that is not full."""
        number = len(steps)
        table = np.zeros((7, number, held.heads), dtype=np.int64)
        pool = held.pool
        partial = held.lengths % page
        split = held.lengths - partial
        rooms = -(-(partial + steps[:, None]) // page) * page  # (C, H_kv)
        firsts, begins = self._room(held, rooms, rooms // page)
        table[0], table[1], table[2], table[3] = held.starts, held.lengths, firsts - split, split
        if held.first is not None:
            table[4], table[5] = held.first, begins - split // page
        if held.place is not None:
            table[6] = held.place
        if not partial.any():
            return table
        # The prompt's last page, of which every answer has its own.
        place = np.arange(page)
        there = np.broadcast_to(place < partial[:, None], (number, held.heads, page))
        source = np.broadcast_to((held.starts + split)[:, None] + place, there.shape)[there]
        target = (firsts[..., None] + place)[there]
        both = torch.from_numpy(np.stack([source, target])).to(self.device)
        for states in (
            pool.keys,
            pool.values,
            *(pool.tensors[slot.name] for slot in pool.slots if slot.per == "token"),
        ):
            states[both[1]] = states[both[0]]
        if held.first is not None:
            own = np.broadcast_to(partial > 0, begins.shape)
            source = np.broadcast_to(held.first + split // page, begins.shape)[own]
            both = torch.from_numpy(np.stack([source, begins[own]])).to(self.device)
            for slot in pool.slots:
                if slot.per == "page":
                    entries = pool.tensors[slot.name]
                    entries[both[1]] = entries[both[0]]
        return table

    def _copied(self, held: Held, steps: np.ndarray, page: int) -> np.ndarray:
        """The table of answers of so many steps that have copies of the prompt."""
        number, most = len(steps), int(steps.max())
        table = np.zeros((7, number, held.heads), dtype=np.int64)
        pool, answer = held.pool, np.arange(number)
        rooms = held.lengths + most
        firsts, begins = self._room(held, number * rooms, number * -(-rooms // page))
        place = 0 if held.place is None else pool.take_more("sequence", number * held.heads)
        for head, (start, length) in enumerate(zip(held.starts.tolist(), held.lengths.tolist(), strict=True)):
            room, first = int(rooms[head]), int(firsts[head])
            table[0, :, head], table[1, :, head] = first + answer * room, length
            for states in (pool.keys, pool.values, *(pool.tensors[s.name] for s in pool.slots if s.per == "token")):
                target = states[first : first + number * room].unflatten(0, (number, room))
                target[:, :length] = states[start : start + length]
            if held.first is not None:
                own, pages, complete = int(held.first[head]), -(-room // page), -(-length // page)
                begin = int(begins[head])
                table[4, :, head] = begin + answer * pages
                for slot in pool.slots:
                    if slot.per == "page":
                        entries = pool.tensors[slot.name]
                        target = entries[begin : begin + number * pages].unflatten(0, (number, pages))
                        target[:, :complete] = entries[own : own + complete]
            if held.place is not None:
                begin = place + head * number
                table[6, :, head] = begin + answer
                for slot in pool.slots:
                    if slot.per == "sequence":
                        entries = pool.tensors[slot.name]
                        entries[begin : begin + number] = entries[int(held.place[head])].clone()
        return table

    @staticmethod
    def _room(held: Held, tokens: np.ndarray, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First entries of so many tokens and pages of each head, granted at once."""
        pool = held.pool
        first = pool.take(int(tokens.sum()), pool.keys, pool.values)
        begin = 0 if held.first is None else pool.take_more("page", int(pages.sum()))
        ends, last = tokens.cumsum().reshape(tokens.shape), pages.cumsum().reshape(pages.shape)
        return first + ends - tokens, begin + last - pages

    # --- one pass ----------------------------------------------------------------------------------------------

    def _pass(self, rows: list[tuple[int, int]], answers: Sequence[Sequence[int]], counts: RowCounts) -> None:
        """Read these tokens; what is found of those that follow them stands in static tensors."""
        self._evict_due(rows, counts)
        self._load(rows, answers)
        self._passes += 1
        graph = None
        if self.device.type == "cuda" and self.shares and self.watched is None and self._passes > BEFORE_CAPTURE:
            graph = self._captured()
        if graph is None:
            self._step()
            counts.phases["decode"].loops["side_by_side"] += len(rows)
        else:
            graph.replay()
            counts.phases["decode"].loops["side_by_side_cuda_graph"] += len(rows)

    def _captured(self) -> Any:
        """The captured pass, for what is held now; None where it cannot be captured."""
        plan = self.runtime.plan
        longest = -(-self._longest // CAPTURED) * CAPTURED
        relied = (
            [pool.made for pool in self.pools],
            self._table.data_ptr(),
            None if plan.decode is None else plan.decode.at(self.prompt),
        )
        if self._relied is None or self._relied[0] != relied or self._relied[1] < longest:
            self.graphs.clear()
            self._relied = relied, longest
        self._longest = self._relied[1]
        return self.graphs.get(self.rows)

    def _step(self) -> None:
        """One pass over the rows that are loaded. Reads and writes nothing but static tensors, where answers share."""
        tile = self._tile
        logits = self.call(tile.ids[:, None], tile.positions[:, None], self._cache)
        logprobs = self.log_softmax(logits)
        self._found.copy_(logprobs.gather(-1, tile.wanted[:, None])[:, 0])
        self._hits.copy_(logprobs.argmax(-1) == tile.wanted)
        reads = [noted.reads.view(self.rows, -1) for noted in self._noted.values() if noted.reads is not None]
        if not reads:
            self._reads = None
            return
        found = torch.cat(reads, 1)
        if self._reads is None or self._reads.shape != found.shape:
            self._reads = torch.empty_like(found)
        self._reads.copy_(found)

    def _load(self, rows: list[tuple[int, int]], answers: Sequence[Sequence[int]]) -> None:
        """Make these the rows of the next pass."""
        number = len(rows)
        mine = sorted({answer for answer, _ in rows})
        of_answer = {answer: [place for place, (own, _) in enumerate(rows) if own == answer] for answer in mine}
        table = np.zeros((11, self.rows), dtype=np.int64)
        table[:6, :number] = [
            [answers[answer][token] for answer, token in rows],
            [self.prompt + token for _, token in rows],
            [answer for answer, _ in rows],
            [token + 1 - self._since[answer] for answer, token in rows],
            [self.prompt + token + 1 for _, token in rows],
            [answers[answer][token + 1] for answer, token in rows],
        ]
        table[6:, : len(mine)] = [
            mine,
            [rows[of_answer[answer][0]][1] - self._since[answer] for answer in mine],
            [rows[of_answer[answer][-1]][1] + 1 - self._since[answer] for answer in mine],
            [self.prompt + rows[of_answer[answer][-1]][1] + 1 for answer in mine],
            [of_answer[answer][-1] for answer in mine],
        ]
        self._numbers.copy_(torch.from_numpy(table.ravel()))
        self._tile.rows = rows
        if not self.shares:
            most = max(map(len, of_answer.values()))
            places = [own + [own[-1]] * (most - len(own)) for own in of_answer.values()]
            places += [[0] * most] * (self.rows - len(places))
            self._tile.token_rows = torch.tensor(places).to(self.device)

    def attend(
        self,
        known: Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
        eligible: bool,
        sink: Tensor | None = None,
    ) -> Tensor:
        """See `session.StepAttention`. Idle rows get 0."""
        held, tile, plan = self._layers[known.index], self._tile, self.runtime.plan
        rows, heads, _, dim = query.shape
        kv, state = self._view(held, tile.answer, tile.seen)
        new = key.reshape(rows * held.heads, 1, dim), value.reshape(rows * held.heads, 1, -1)
        grouped = query.reshape(rows * held.heads, heads // held.heads, 1, dim)
        filled = keeper = None
        if eligible and plan.decode is not None:
            method, sparsity = plan.decode.at(self.prompt)
            filled = Filled(*method.resolved(sparsity, 0, known), state, tile.tokens)
        if eligible and plan.every is not None:
            keeper = Filled(*kept_by(plan), state, tile.tokens)
            held.known, held.newest = self.runtime.known.evicted(known), grouped.clone()
        if not self.in_turn:
            append(kv, *new)
            if filled is not None and state is not None:
                self._tell_appended(held, known, filled, grouped, scale, softcap)
            new = None
        options = {"scale": scale, "softcap": softcap}
        found = step(grouped, new, kv, known, filled, plan=plan, window=window, keeper=keeper, sink=sink, **options)
        if eligible:
            self._note(known, heads, held, kv, filled, found)
            if self.watched is not None:
                self._look(known, held, grouped, kv, found, sink, **options)
        return found.out.reshape(rows, heads, 1, -1)

    def gave(self, index: int, key: Tensor, value: Tensor) -> bool:
        """See `session.StepAttention`."""
        return same_memory(self._cache.layers[index].given, (key, value))

    def _view(self, held: Held, answers: Tensor, seen: Tensor) -> tuple[RaggedKV, State | None]:
        """The sequences of these answers `(n,)` with so many tokens of each `(n,)`, none of it where that is 0."""
        starts, lengths, tails, splits, first, tail_pages, place = held.table[:, answers].flatten(1)
        more = seen.repeat_interleave(held.heads, output_size=len(starts))
        lengths = torch.where((lengths > 0) & (more > 0), lengths + more, 0).int()
        shared = (tails, splits) if self.shares else (None, None)
        kv = RaggedKV(held.pool.keys, held.pool.values, starts, lengths, self._longest, held.heads, None, *shared)
        if not held.pool.slots:
            return kv, None
        own = None if held.first is None else first, None if held.place is None else place
        state = held.pool.state(*own)
        return kv, replace(state, tails=tail_pages) if self.shares and held.first is not None else state

    def _tell_appended(
        self, held: Held, known: Layer, filled: Filled, grouped: Tensor, scale: float, softcap: float | None
    ) -> None:
        """Let the decode method take in the new tokens of each answer at once: several rows are of one answer."""
        tile = self._tile
        kv, state = self._view(held, tile.answers, tile.after)
        new = (tile.after - tile.before).repeat_interleave(held.heads, output_size=len(kv.lengths))
        had = (kv.lengths - new).clamp(min=0)
        by_row = grouped.unflatten(0, (-1, held.heads))
        # (answers, tokens, heads, G, 1, D); one that knows shared beginnings is given the newest token's query alone.
        by_row = by_row[tile.newest[:, None] if self.shares else tile.token_rows]
        query = by_row.squeeze(-2).movedim(1, 3).flatten(0, 1)
        cache = CacheView(kv, tile.so_far, held.heads)
        call = Call(query, kv.keys, kv.values, scale, softcap, "decode", filled.budget, known, cache=cache, state=state)
        tell(filled.method, "appended", call, had.int(), debug=self.runtime.plan.debug)

    def _evict_due(self, rows: list[tuple[int, int]], counts: RowCounts) -> None:
        """Let answers that have taken in enough, and go on, go on with less."""
        runtime = self.runtime
        every = runtime.plan.every
        for answer, token in rows if every is not None else ():
            if token - self._since[answer] < every:
                continue
            for index, held in enumerate(self._layers):
                starts, lengths, _, _, first, _, place = held.table[:, answer]
                lengths += token - self._since[answer]
                if runtime.layers.get(index, "") is not None:
                    continue
                numbers = lengths.int()
                first, place = (
                    own if there is not None else None for own, there in ((first, held.first), (place, held.place))
                )
                own = Sequences(starts, numbers, held.heads, int(numbers.max()), int(numbers.sum()), 0, first, place)
                at = next(place for place, row in enumerate(self._tile.rows) if row[0] == answer)
                query = held.newest[at * held.heads : (at + 1) * held.heads]
                scale, softcap = runtime.scales[index]
                tokens = self.prompt + token
                evict_again(
                    runtime.plan, held.known, held.pool, own, query, self.prompt, tokens,
                    scale=scale, softcap=softcap, counts=counts,
                )  # fmt: skip
                held.table[1, answer] = own.lengths
            self._since[answer] = token
            runtime.compactions += 1

    # --- counting ----------------------------------------------------------------------------------------------

    def _note(self, known: Layer, heads: int, held: Held, kv: RaggedKV, filled: Filled | None, found: Stepped) -> None:
        """Keep what a pass has read in a layer."""
        noted = self._noted.setdefault(known.index, Noted())
        noted.shape = DecodeShape.of(heads, held.heads, kv, found.virtual, found.weighed, found.altered)
        noted.backend, noted.width, noted.reads = found.backend, found.width, found.read
        noted.method = None if filled is None else filled.method
        if self.in_turn:
            noted.held.append(kv.lengths.view(-1, held.heads)[: len(self._tile.rows)])

    def _count(self, counts: RowCounts, rows: np.ndarray, reads: Tensor | None) -> None:
        """Count what the passes have read.

        Calls are those that answers would take one after the other.

        Args:
            rows: `(R, 2)` answer and token of each row.
            reads: `(R, …)` keys read by each, layer after layer.
        """
        order = np.lexsort((rows[:, 1], rows[:, 0]))
        tokens, plan = rows[order, 1], self.runtime.plan
        at_once = 1 if plan.one_by_one else plan.every
        new = tokens % SCORE_CHUNK == 0
        begun = np.flatnonzero(new if at_once is None else new | (tokens % at_once == 0))
        # To send something to a device waits for it.
        places = torch.from_numpy(order).to(self.device) if reads is not None or self.in_turn else None
        sizes = [noted.reads.numel() // self.rows for noted in self._noted.values() if noted.reads is not None]
        parts = iter(() if reads is None else reads[places].split(sizes, 1))
        alike: dict[Any, PhaseCounts] = {}
        for index, noted in self._noted.items():
            heads = self._layers[index].heads
            if noted.reads is None and not self.in_turn:  # nothing but lengths decides, and most layers have the same
                key = noted.shape, noted.backend, self._layers[index].lengths.tobytes()
                if key in alike:
                    counts.phases["decode"].merge_layer(index, alike[key])
                    continue
                alone = RowCounts()
                held = np.where((own := self._layers[index].lengths) > 0, own + 1 + tokens[:, None], 0)
                count_rows(alone, 0, noted.shape, held, self.prompt + tokens + 1, None, None, noted.backend, 0, begun)
                alike[key] = alone.phases["decode"]
                counts.phases["decode"].merge_layer(index, alike[key])
                continue
            if self.in_turn:
                held = torch.cat(noted.held)[places]
            else:
                held = np.where((own := self._layers[index].lengths) > 0, own + 1 + tokens[:, None], 0)
            read = next(parts).unflatten(1, (heads, -1)) if noted.reads is not None else None
            logical = self.prompt + tokens + 1
            count_rows(counts, index, noted.shape, held, logical, read, noted.method, noted.backend, noted.width, begun)

    def _look(
        self,
        known: Layer,
        held: Held,
        grouped: Tensor,
        kv: RaggedKV,
        found: Stepped,
        sink: Tensor | None,
        *,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Look at each row of a pass, where that was asked for."""
        for row in range(len(self._tile.rows)):
            own = slice(row * held.heads, (row + 1) * held.heads)
            mine = kv.part(own)
            part = replace(
                found,
                out=found.out[own],
                read=None if found.read is None else found.read[own],
                reads=None if found.reads is None else found.reads.part(own),
            )
            diagnose.step(
                self.watched, known.index, grouped[own], mine.copied() if mine.shared else mine, part,
                self._tile.tokens[row], scale=scale, softcap=softcap, sinks=sink,
            )  # fmt: skip


__all__ = ["SCORE_CHUNK", "Candidates"]
