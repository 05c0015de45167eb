"""Decoding token by token: the answers of several prompts side by side, from one cache that knows no padding.

Each prompt is prefilled alone, into the pool of its layer. From then on a step of the whole model is a fixed sequence
of kernels over static tensors: what sequences begin where, how long they are, what was generated last. On a GPU it is
captured in a CUDA graph and replayed, and the host looks at the tokens of a step while the next one runs.

What a row gets does not depend on its neighbours, to the bit. Attention works sequence by sequence. Everything else in
the model sees numbers of rows for which products round alike, of which some may be idle: a product with one row and one
with eight are computed by different kernels, which round differently. `Decoder` checks that this holds for a model
before it decodes rows side by side, and otherwise decodes them one at a time.

The file is long since the loop, what it launches and what it fetches share their static tensors.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..methods.base import DecodeMethod, Layer
from . import diagnose
from .accounting import DecodeShape, RowCounts, count_answer
from .cache import CacheLayer, SparseCache, same_memory
from .graphs import Graphs
from .periodic import evict_again, kept_by
from .pool import Pool
from .rounding import CPU_ROWS
from .rows import DecodeLayer, PassingLayer, Row, adopt_window
from .selections import DEBUGGED, refuse_reads
from .session import Runtime
from .steps import Filled, step

logger = logging.getLogger(__name__)

#: Rows that the layers of a model see in each step on a GPU: products with that many rows take as long as with one,
#: since the weights have to be read.
GPU_ROWS = 32
#: Rows for which attention is captured; idle ones among them cost next to nothing.
BUCKETS = (1, 2, 4, 8, 16, 32)
#: Steps whose numbers of keys read stay on the device before they are fetched.
RECORDED = 256
#: Tokens that every sequence gets room for, at least, when storage grows.
LEAST_GROWTH = 256


class Decoder:
    """Decodes answers of a model.

    Args:
        call: the model: `(ids (B, 1), positions (B, 1), cache)` to logits `(B, V)`.
        config: its configuration.
        runtime: it is made to attend here while steps run.
        device: of the model.
        multiple: what the number of rows that the model sees is a multiple of on a CPU; None: of nothing, since
            products round otherwise for each number.
        no_graph: why steps must not be captured in CUDA graphs, if so.
        landed: is told, after each step, of how many rows a token has arrived.
    """

    def __init__(
        self,
        call: Callable[[Tensor, Tensor, Cache], Tensor],
        config: Any,
        runtime: Runtime,
        device: torch.device,
        multiple: int | None = None,
        no_graph: str | None = None,
        landed: Callable[[int], None] = lambda tokens: None,
    ):
        self.landed = landed
        self.call, self.config, self.runtime, self.device = call, config, runtime, device
        self.on_gpu = device.type == "cuda"
        self.multiple = multiple or 1
        #: Rows that the model sees in every step; None where that depends on how many are decoded.
        self.fixed = GPU_ROWS if self.on_gpu else None
        #: Steps under way at once: the host looks at a step's tokens while the next one runs.
        self.depth = 2 if self.on_gpu else 1
        #: Rows that can be decoded side by side.
        self.most = GPU_ROWS if self.on_gpu else CPU_ROWS if self.multiple > 1 else 1
        #: Why rows are decoded one at a time, if so.
        self.alone: str | None = None
        if self.most == 1:
            self.alone = "products of this model round differently for each number of rows on this CPU"
        #: Rows that are asked for side by side.
        self._asked = 1
        self._batch: list[Row] = []
        #: The counts of the row that is loaded, where every step of it is looked at: such rows are run alone.
        self.watched: RowCounts | None = None
        self.pools: list[Pool] = []
        self.reserve = 0
        #: The most room that answers have needed since storage was given back.
        self.grown = 0
        self.layers: list[DecodeLayer] = []
        #: Those of all layers, one after the other: each layer has its part.
        self.lengths = torch.zeros(0, dtype=torch.int32, device=device)
        self._checked: set[int] = set()
        self._record: dict[int, Tensor] = {}
        self._host: list[Tensor] = []
        self._bucket = self._width = 0
        self._recorded = self._launched = 0
        self.method: DecodeMethod | None = None
        self.sparsity: float | None = None
        self._cache = Cache(layers=[PassingLayer() for _ in SparseCache(config, longest=runtime.longest).layers])
        size = GPU_ROWS if self.on_gpu else CPU_ROWS
        self.ids, self.positions, self.tokens_held, self.alive = (
            torch.zeros(size, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
        #: Captured steps, by the bucket of rows.
        self.graphs = Graphs(
            self._step,
            lambda: [self.ids, self.positions, self.cursor, self.lengths, *self._states()],
            DEBUGGED if runtime.plan.debug else no_graph,
        )
        self.logits: dict[int, Tensor] = {}

    # --- storage -----------------------------------------------------------------------------------------------

    def start(self, lengths: Sequence[int], reserve: int) -> None:
        """Begin a batch of prompts of these lengths, the longest first, with room for `reserve` tokens of each."""
        share = sum(length + reserve for length in lengths) / (lengths[0] + reserve)
        if not self.pools:
            self.pools = [Pool() for _ in self._cache.layers]
        for pool in self.pools:
            pool.clear(share, *self.runtime.kept_state())
        self.reserve = reserve

    def ask(self, rows: int) -> None:
        """Say how many rows are wanted side by side: what does not come to that is said once, and counted."""
        if self._asked == 1 < rows and self.alone is not None:
            self._warn_alone()
        self._asked = rows

    def _warn_alone(self) -> None:
        logger.warning("answers are decoded one at a time: %s", self.alone)

    def new_cache(self, prompt: int) -> SparseCache:
        """The cache for the prefill of a prompt, whose keys and values go where decoding will find them."""
        return self.runtime.new_cache(self.config, self.reserve, self.pools, prompt)

    def adopt(self, row: Row, cache: SparseCache) -> None:
        """Take what the prefill of a row has left. Waits for the device once, as the first token does."""
        row.room = self.reserve
        for index, (layer, pool) in enumerate(zip(cache.layers, self.pools, strict=True)):
            if not isinstance(layer, CacheLayer):
                row.held.append(adopt_window(layer, pool, self.reserve))
                continue
            held = layer.ended()
            size = held.heads * (pool.keys.shape[1] + pool.values.shape[1]) * pool.keys.element_size()
            if size != self.runtime.sizes[index][0]:
                raise ValueError(f"layer {index} caches something else than the keys and values that attention reads")
            row.held.append(held)
            row.room = min(row.room, held.room)
        longest = [held.lengths.max() for held in row.held]
        for held, length in zip(row.held, torch.stack(longest).tolist(), strict=True):
            held.longest = length
        row.spans = [(0, [held.lengths for held in row.held])]

    def _prepare(self) -> None:
        """Make the layers ready for the batch; what was captured stays good as long as no tensor moves."""
        rows = [row for row in self._batch if not row.done]
        if not self.layers:
            sizes = [len(self.ids) * held.heads for held in rows[0].held]
            self.lengths = torch.zeros(sum(sizes), dtype=torch.int32, device=self.device)
            # Layers follow each other, so they can share their tickets.
            tickets = torch.zeros(2, max(sizes), dtype=torch.int32, device=self.device)
            self.layers = [
                DecodeLayer(pool, lengths, tickets, held)
                for pool, lengths, held in zip(self.pools, self.lengths.split(sizes), rows[0].held, strict=True)
            ]
        for place, layer in enumerate(self.layers):
            longest = max(row.held[place].longest + row.room - row.since for row in rows)
            if longest > layer.longest or layer.pool.made != layer.made:
                layer.made, layer.longest = layer.pool.made, max(longest, layer.longest)
                self.graphs.clear()

    def release(self) -> None:
        """Give all memory back."""
        self.graphs.clear()
        self.grown = 0
        self.pools, self.layers, self._record, self.logits = [], [], {}, {}
        self._checked.clear()

    def _grow(self) -> None:
        """Move the rows that have not ended to storage with more room."""
        rows = [row for row in self._batch if not row.done]
        # Twice as much each time: a step has to be captured anew for each size.
        more = max(LEAST_GROWTH, self.reserve, *(row.fed for row in rows))
        self.graphs.clear()
        for place, layer in enumerate(self.layers):
            layer.pool.move([(row.held[place], row.fed - row.since) for row in rows], more)
        for row in rows:
            row.room = row.fed + more
        self.grown = max(self.grown, *(row.room for row in rows))
        self._prepare()

    def held_bytes(self) -> int:
        """Bytes of keys, values and bounds that the pools hold, room to grow included."""
        return sum(pool.nbytes() for pool in self.pools)

    # --- one step ----------------------------------------------------------------------------------------------

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
        """See `session.StepAttention`. Rows beyond those of attention's bucket are idle and get 0."""
        layer, rows, method = self.layers[known.index], self._bucket, self.method if eligible else None
        width, heads, _, dim = query.shape
        sequences = rows * layer.heads
        filled = keeper = None
        if method is not None:
            if layer.room is None:
                layer.room = torch.zeros(len(self.ids) * heads, dtype=torch.int32, device=self.device)
            method, budget = method.resolved(self.sparsity, 0, known)
            filled = Filled(method, budget, layer.state(rows), self.tokens_held[:rows])
        kv = layer.kv(rows)
        grouped = query[:rows].reshape(sequences, heads // layer.heads, 1, dim)
        if eligible and self.runtime.plan.every is not None:
            layer.note(self.runtime.known.evicted(known), grouped)
            keeper = Filled(*kept_by(self.runtime.plan), layer.state(rows), self.tokens_held[:rows])
        found = step(
            grouped,
            (key[:rows].reshape(sequences, 1, dim), value[:rows].reshape(sequences, 1, -1)),
            kv,
            known,
            filled,
            scale=scale,
            softcap=softcap,
            plan=self.runtime.plan,
            window=window,
            overlap=self.watched is None,
            room=layer.room,
            keeper=keeper,
            sink=sink,
        )
        if self.watched is not None and eligible:
            so_far, options = self.tokens_held[0], {"scale": scale, "softcap": softcap, "sinks": sink}
            diagnose.step(self.watched, known.index, grouped, kv, found, so_far, **options)
        if filled is not None:
            layer.reads, layer.width = found.read, found.width
        layer.backend = found.backend
        layer.shape = DecodeShape.of(heads, layer.heads, kv, found.virtual, found.weighed, found.altered)
        out = found.out.reshape(rows, heads, 1, -1)
        return out if rows == width else torch.cat([out, out.new_zeros(width - rows, *out.shape[1:])])

    def _step(self) -> None:
        """One step of the model for the rows that are loaded. Reads and writes nothing but static tensors."""
        width = self._width
        torch.add(self.positions, 1, out=self.tokens_held)
        self.lengths.add_(self.lengths > 0)  # places that nobody uses stay at 0
        logits = self.call(self.ids[:width, None], self.positions[:width, None], self._cache)
        if width not in self.logits:
            self.logits[width] = torch.empty_like(logits)
        self.logits[width].copy_(logits)
        self.ids[:width].copy_(logits.argmax(-1))
        self.positions[:width].add_(self.alive[:width])
        if self.method is not None:
            reads = self._reads()
            if self._bucket not in self._record:
                self._record[self._bucket] = reads.new_zeros(RECORDED, len(reads))
            self._record[self._bucket].index_copy_(0, self.cursor, reads[None])
            self.cursor.add_(1)

    def _reads(self) -> Tensor:
        """Keys read in the last step by the lists of the rows that are loaded, layer after layer."""
        return torch.cat([layer.reads.flatten() for layer in self.layers if layer.reads is not None])

    # --- the loop ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, rows: Sequence[Row]) -> None:
        """Decode these rows to their ends, side by side as far as they go together, and count their steps."""
        self._batch = [row for row in rows if not row.done]
        # Where memory ran out in the middle of an earlier batch, what was recorded of it is nobody's.
        self._recorded = 0
        self.cursor.zero_()
        self.runtime.decoder = self
        try:
            if self._batch:
                self._prepare()
            for alike in self._alike():
                most = 1 if self.alone is not None else self.most
                for first in range(0, len(alike), most):
                    self._run(alike[first : first + most])
                for row in alike:
                    self._count(row)
        finally:
            self.runtime.decoder = None

    def _alike(self) -> Iterator[list[Row]]:
        """The rows of the batch by their decode method and sparsity, which are those of the decoder meanwhile."""
        plan = self.runtime.plan.decode
        own = [(None, None) if plan is None else plan.at(row.prompt) for row in self._batch]
        for wanted in dict.fromkeys(own):
            if wanted != (self.method, self.sparsity):  # budgets are constants of what was captured
                self.graphs.clear()
            self.method, self.sparsity = wanted
            yield [row for row, mine in zip(self._batch, own, strict=True) if mine == (self.method, self.sparsity)]

    def gave(self, index: int, key: Tensor, value: Tensor) -> bool:
        """See `session.StepAttention`."""
        return same_memory(self._cache.layers[index].given, (key, value))

    @torch.no_grad()
    def try_one(self, row: Row, claims: int = 1) -> Tensor:
        """Logits `(V,)` after one step of a single row, which leaves no trace.

        Args:
            claims: tokens that the cache says to hold.
        """
        self.method, self._batch = None, [row]
        self._prepare()
        self.runtime.decoder = self
        for layer in self._cache.layers:
            layer.claims = claims
        try:
            return self._tried([row])[0]
        finally:
            self.runtime.decoder = None
            for layer in self._cache.layers:
                layer.claims = 1

    def _goes_together(self, rows: list[Row]) -> bool:
        """Whether the first and the last of these rows get the same logits, to the bit, as they get alone.

        Kernels that treat rows differently do so with those that are left over at the end.
        """
        self._load(rows)
        width = self._width
        if width in self._checked:
            return True
        beside = self._tried(rows)
        if not all(torch.equal(beside[place], self._tried([rows[place]])[0]) for place in (0, -1)):
            self.alone = f"the layers of this model round differently for {len(rows)} rows than for one"
            self._warn_alone()
            return False
        self._checked.add(width)
        return True

    def _tried(self, rows: list[Row]) -> Tensor:
        """Logits `(rows, V)` after one step that leaves no trace."""
        self._load(rows)
        before = [state.clone() for state in self._states()]
        self._step()
        for state, was in zip(self._states(), before, strict=True):
            state.copy_(was)
        self._recorded = 0
        self.cursor.zero_()
        return self.logits[self._width][: len(rows)].clone()

    def _states(self) -> list[Tensor]:
        """What methods keep that does not follow from the keys: a step goes on from it."""
        return [state for pool in self.pools for state in pool.kept().values()]

    def _load(self, rows: list[Row]) -> None:
        """Make these the rows of the next steps."""
        number = len(rows)
        self.watched = rows[0].counts if rows[0].counts.diagnosis is not None else None
        self._bucket = number if self.fixed is None else next(size for size in BUCKETS if size >= number)
        self._width = self.fixed or -(-number // self.multiple) * self.multiple
        for place, layer in enumerate(self.layers):
            layer.load([row.held[place] for row in rows], [row.fed - row.since for row in rows])
        numbers = torch.zeros(3, len(self.ids), dtype=torch.int64)
        numbers[0, :number] = torch.tensor([row.tokens[-1] for row in rows])
        numbers[1, :number] = torch.tensor([row.prompt + row.fed for row in rows])
        numbers[2, :number] = 1
        for static, values in zip((self.ids, self.positions, self.alive), numbers.to(self.device), strict=True):
            static.copy_(values)

    def _run(self, rows: list[Row]) -> None:
        """Decode rows of which none has ended."""
        if any(row.fed >= row.room for row in rows):  # also for a step on trial
            self._grow()
        if len(rows) > 1 and not self._goes_together(rows):
            for row in rows:
                self._run([row])
            return
        self._load(rows)
        # Unless the host chooses the tokens, or no step may be looked at that the answer does not need.
        depth = self.depth if all(row.choose is None for row in rows) and self.watched is None else 1
        every = self.runtime.plan.every
        flying: deque[Any] = deque()
        while not any(row.done for row in rows):
            full = max(row.fed - row.room for row in rows) + len(flying) >= 0
            due = every is not None and max(row.fed - row.since for row in rows) + len(flying) >= every
            if flying and (len(flying) == depth or full or due):
                self._land(flying.popleft(), rows)
            elif due:
                self._evict([(place, row) for place, row in enumerate(rows) if row.fed - row.since >= every])
                self._load(rows)
            elif full:
                self._fetch(rows)
                self._grow()
                self._load(rows)
            else:
                flying.append(self._launch(rows))
        # What still flies was made beside rows that have ended: it is right for the others.
        for flight in flying:
            self._land(flight, rows)
        self._fetch(rows)
        if left := [row for row in rows if not row.done]:
            self._run(left)

    def _evict(self, rows: list[tuple[int, Row]]) -> None:
        """Let these rows, each at its place among those that are loaded, go on with less."""
        runtime = self.runtime
        for place, row in rows:
            freed = []
            for index, (layer, held) in enumerate(zip(self.layers, row.held, strict=True)):
                held.lengthen(row.fed - row.since)
                if runtime.layers.get(index, "") is not None:
                    freed.append(0)
                    continue
                scale, softcap = runtime.scales[index]
                query = layer.newest[place * layer.heads : (place + 1) * layer.heads]
                freed.append(
                    evict_again(
                        runtime.plan, layer.known, layer.pool, held, query, row.prompt, row.prompt + row.fed,
                        scale=scale, softcap=softcap, counts=row.counts,
                    )
                )  # fmt: skip
            row.since = row.fed
            row.room += min(freed)
            row.spans.append((row.fed, [held.lengths for held in row.held]))
            runtime.compactions += 1

    def _launch(self, rows: list[Row]) -> tuple[str, Tensor, Any]:
        """Run one step; returns what ran it, where its tokens will be, and the event to wait for on a GPU."""
        if self.method is not None and self._recorded == RECORDED:
            self._fetch(rows)
        graph = self.graphs.get(self._bucket) if self.on_gpu and self.watched is None else None
        if graph is None:
            self._step()
        else:
            graph.replay()
        self._recorded += 1
        loop = "eager" if graph is None else "cuda_graph"
        if not self.on_gpu:
            return loop, self.ids.clone(), None
        if not self._host:
            self._host = [torch.zeros(len(self.ids), dtype=torch.int64).pin_memory() for _ in range(2)]
        self._launched += 1
        copy = self._host[self._launched % 2]
        copy.copy_(self.ids, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return loop, copy, event

    def _land(self, flight: tuple[str, Tensor, Any], rows: list[Row]) -> None:
        """Give the rows that have not ended the tokens of a step."""
        loop, ids, event = flight
        if event is not None:
            event.synchronize()
        chosen = ids[: len(rows)].tolist()
        self.landed(sum(not row.done for row in rows))
        for place, row in enumerate(rows):
            if row.done:
                continue
            row.fed += 1
            phase = row.counts.phases["decode"]
            phase.loops[loop] += 1
            if self.watched is not None:
                phase.loop_reasons[diagnose.LOOKS] += 1
            elif self.on_gpu and loop == "eager":
                phase.loop_reasons[self.graphs.refused] += 1
            if row.choose is not None:
                chosen[place] = row.choose(self.logits[self._width][place], row.tokens)
            row.take(chosen[place])
        if any(row.choose is not None for row in rows):
            self.ids[: len(rows)] = torch.tensor(chosen).to(self.device)

    def _fetch(self, rows: list[Row]) -> None:
        """Fetch how many keys were read in the steps since the last time."""
        if self.method is not None and self._recorded:
            record = self._record[self._bucket][: self._recorded].cpu().numpy()
            start = 0
            parts: list[list[np.ndarray]] = [[] for _ in rows]
            for index, layer in enumerate(self.layers):
                if layer.reads is not None:
                    each = layer.heads * layer.reads.shape[1]
                    own = record[:, start : start + len(rows) * each].T.reshape(-1, layer.reads.shape[1], len(record))
                    refuse_reads(self.method, index, own, layer.width, layer.heads)
                    for place, part in enumerate(parts):
                        part.append(record[:, start + place * each : start + (place + 1) * each])
                    start += self._bucket * each
            for row, part in zip(rows, parts, strict=True):
                row.reads.append(np.concatenate(part, 1))
        self._recorded = 0
        self.cursor.zero_()

    # --- counting ----------------------------------------------------------------------------------------------

    def _count(self, row: Row) -> None:
        """Count all steps of a row in the layers that count."""
        if not row.fed:
            return
        reads = np.concatenate(row.reads)[: row.fed] if row.reads else None
        logical = row.prompt + 1 + np.arange(row.fed)
        phase = row.counts.phases["decode"]
        if self.alone is not None and self._asked > 1:
            phase.loop_reasons[self.alone] += row.fed
        self.runtime.longest_answer = max(self.runtime.longest_answer, len(row.tokens))
        begun, lengths = np.array([fed for fed, _ in row.spans]), [held for _, held in row.spans]
        start = 0
        for index, layer in enumerate(self.layers):
            own = None
            if layer.reads is not None and reads is not None:
                each = layer.heads * layer.reads.shape[1]
                own = reads[:, start : start + each].T.reshape(layer.heads, -1, row.fed)
                start += each
            if self.runtime.layers.get(index, "") is None:
                held = torch.stack([each[index] for each in lengths])
                count_answer(row.counts, index, layer.shape, held, begun, logical, own, self.method, layer.backend)
