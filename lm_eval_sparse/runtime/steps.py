"""Decoding token by token: the answers of several prompts side by side, from one cache that knows no padding.

Each prompt is prefilled alone and hands its keys and values over to the flat storage of its layer (`LayerPool`). From
then on a step of the whole model is a fixed sequence of kernels over static tensors: what sequences begin where, how
long they are, what was generated last. On a GPU it is captured in a CUDA graph and replayed, and the host looks at the
tokens of a step while the next one runs.

What a row gets does not depend on its neighbours, to the bit. Attention works sequence by sequence. Everything else in
the model sees numbers of rows for which products round alike, of which some may be idle: a product with one row and one
with eight are computed by different kernels, which round differently. `Decoder` checks that this holds for a model
before it decodes rows side by side, and otherwise decodes them one at a time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.pytorch_utils import Conv1D

from ..kernels.cache.append import append
from ..kernels.decode import paged_decode
from ..kernels.estimate import update_bounds
from ..kernels.types import PageBounds, RaggedKV, Reads, State
from ..methods.base import CacheView, Call, DecodeMethod, Layer
from .accounting import RowCounts
from .cache import PreallocatedLayer, SparseCache, autocast, same_memory
from .memory import out_of_memory
from .selections import DEBUGGED, check_pages, chosen, refuse_pages
from .session import DecodeShape, Runtime, count_steps, decode_backend

logger = logging.getLogger(__name__)

#: Rows that the layers of a model see in each step on a GPU: products with that many rows take as long as with one,
#: since the weights have to be read.
GPU_ROWS = 32
#: Rows at most on a CPU, and what their number may be a multiple of.
CPU_ROWS, CPU_MULTIPLES = 16, (2, 4, 8)
#: Entries of each product that are compared for every number of rows: other sums round to the same half-precision
#: number nearly always (four of 100,000 differed where a product with two rows was summed in another order).
COMPARED = 1 << 19
PRODUCTS = (torch.bfloat16, torch.float16, torch.float32)
#: Rows for which attention is captured; idle ones among them cost next to nothing.
BUCKETS = (1, 2, 4, 8, 16, 32)
#: Steps whose numbers of keys read stay on the device before they are fetched.
RECORDED = 256
#: Tokens that every sequence gets room for, at least, when storage grows.
LEAST_GROWTH = 256


class LayerPool:
    """Flat storage of keys, values and page bounds of one layer, for all rows of a batch. It outlives the batch.

    Room is granted from the beginning on; `clear` takes all of it back.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.used = self.pages = 0
        #: How often storage was made: who relies on where it lies compares this, since addresses come again.
        self.made = 0
        #: How much more than the first row all rows will need.
        self.share = 1.0

    def clear(self, share: float) -> None:
        """Forget what is stored. `share`: room that all rows will need, over that of the first."""
        self.used, self.pages, self.share = 0, 0, share

    def take(self, entries: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
        """See `cache.Storage`."""
        first, self.used = self.used, self.used + entries
        if self.keys is None or self.used > len(self.keys):
            size = max(self.used, -int(-entries * self.share // 1)) if first == 0 else self.used
            self.made += 1
            if first == 0:  # nothing to keep: give it back before more is asked for
                self.keys = self.values = None
            self.keys, self.values = (
                grown(old, first, size, like) for old, like in ((self.keys, key), (self.values, value))
            )
        return self.keys, self.values, first

    def take_pages(self, pages: int) -> int:
        """Room for the bounds of so many pages; returns the first of them."""
        first, self.pages = self.pages, self.pages + pages
        if self.low is None or self.pages > len(self.low):
            size = max(self.pages, -int(-pages * self.share // 1)) if first == 0 else self.pages
            self.made += 1
            if first == 0:
                self.low = self.high = None
            self.low, self.high = (grown(old, first, size, self.keys) for old in (self.low, self.high))
        return first


def grown(old: Tensor | None, held: int, size: int, like: Tensor) -> Tensor:
    """Storage of `size` entries that begins with the first `held` of `old`."""
    new = like.new_empty(size, like.shape[-1])
    if held:
        new[:held] = old[:held]
    return new


@dataclass
class Held:
    """What one row holds in one layer when decoding begins.

    Attributes:
        starts: `(H_kv,)` int64; lengths: `(H_kv,)` int32; first: `(H_kv,)` int64 first pages of bounds, or None.
        longest: a number that no length exceeds.
    """

    starts: Tensor
    lengths: Tensor
    first: Tensor | None
    longest: int


@dataclass(eq=False)
class Row:
    """An answer in the making.

    Attributes:
        prompt: tokens of the prompt.
        counts: where its steps are counted.
        ended: whether the tokens generated so far are the whole answer.
        choose: from the last logits `(V,)` and the tokens generated so far to the next token; None for the largest.
        tokens: generated so far; the first one comes from the prefill.
        held: by layer.
        room: tokens that fit behind the prompt; fed: those that are there, each by one step of the model.
        reads: keys read in each step, all layers after each other.
        done: whether the answer is whole.
    """

    prompt: int
    counts: RowCounts
    ended: Callable[[list[int]], bool]
    choose: Callable[[Tensor, list[int]], int] | None
    tokens: list[int] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    room: int = 0
    fed: int = 0
    reads: list[np.ndarray] = field(default_factory=list)
    done: bool = False

    def take(self, token: int) -> None:
        """Add a token to the answer."""
        self.tokens.append(token)
        self.done = self.ended(self.tokens)


class DecodeLayer:
    """One layer during decoding: its storage, and which sequence stands where, in tensors that never move."""

    def __init__(self, pool: LayerPool, heads: int, lengths: Tensor, tickets: Tensor, like: Held):
        self.pool, self.heads = pool, heads
        #: `lengths (R * H_kv,)` is counted up by the decoder, for all layers at once.
        self.lengths, self.tickets = lengths, tickets
        self.starts = torch.zeros(len(lengths), dtype=torch.int64, device=lengths.device)
        self.first = None if like.first is None else torch.zeros_like(self.starts)
        #: A number that no length exceeds until storage grows, and which storage it is: what a captured step relies on.
        self.longest = 0
        self.made = -1
        #: Keys read in the last step, `(S, Gs, 1)` of all rows in room for any Gs; by which backend, for which heads.
        #: Negative where a list of pages is nonsense; `width` places of such a list.
        self.width = 0
        self.room: Tensor | None = None
        self.reads: Tensor | None = None
        self.backend, self.shape = "", None

    def load(self, helds: Sequence[Held], fed: Sequence[int]) -> None:
        """Let these rows be the first ones, and the others idle."""
        sequences = len(helds) * self.heads
        self.lengths.zero_()
        self.starts[:sequences] = torch.cat([held.starts for held in helds])
        self.lengths[:sequences] = torch.cat([held.lengths + more for held, more in zip(helds, fed, strict=True)])
        if self.first is not None:
            self.first[:sequences] = torch.cat([held.first for held in helds])

    def kv(self, rows: int) -> RaggedKV:
        own = slice(rows * self.heads)
        places = self.starts[own], self.lengths[own]
        return RaggedKV(self.pool.keys, self.pool.values, *places, self.longest, self.heads, self.tickets[:, own])

    def bounds(self, rows: int, page_size: int) -> PageBounds | None:
        if self.first is None:
            return None
        return PageBounds(page_size, self.pool.low, self.pool.high, self.first[: rows * self.heads])


class PassingLayer(DynamicLayer):
    """What the model takes for a cache layer: it hands new keys and values through, attention stores them."""

    #: Tokens that it says to hold. The model is told positions: only whether there is a past may depend on this.
    claims = 1
    given: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.given = autocast(key_states), autocast(value_states)
        return self.given

    def get_seq_length(self) -> int:
        return self.claims


def undecodable(config: Any, runtime: Runtime) -> str | None:
    """Why a model of this configuration, whose layers the runtime has seen, cannot be decoded here, or None."""
    layers = SparseCache(config, longest=runtime.longest).layers
    if not layers:
        return "the model's configuration does not tell its layers"
    if runtime.uncached or runtime.lenders:
        lent = {
            layer: f"layer {layer} borrows the keys and values of layer {of}" for layer, of in runtime.lenders.items()
        }
        return next(iter({**runtime.uncached, **lent}.values()))
    if runtime.masked:
        return "it has layers that need a mask made for each step"
    kinds = {type(layer) for layer in layers} - {PreallocatedLayer, DynamicSlidingWindowLayer}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        return f"the model keeps more than keys and values ({names})"
    if set(runtime.layers) != set(range(len(layers))):
        return f"{len(layers)} cache layers, but attention in {len(runtime.layers)} layers"
    return None


_alike: dict[tuple[Any, ...], frozenset[int]] = {}


@torch.no_grad()
def rows_alike(model: torch.nn.Module) -> int | None:
    """The least number of rows for whose multiples all products of a model on a CPU round alike, or None.

    Sizes and rows decide by which kernel a product is made, and in which order that one sums.
    """
    found = frozenset(range(1, CPU_ROWS + 1))
    for module in model.modules():
        # What is quantized goes other ways, and is left to the trial before rows are decoded side by side.
        if type(module) in (torch.nn.Linear, Conv1D) and module.weight.dtype in PRODUCTS:
            weight, biased = module.weight, module.bias is not None
            kind = type(module), tuple(weight.shape), biased, weight.dtype, torch.get_num_threads()
            if kind not in _alike:
                _alike[kind] = _widths_alike(module)
            found &= _alike[kind]
    for multiple in CPU_MULTIPLES:
        if found.issuperset(range(multiple, CPU_ROWS + 1, multiple)):
            return multiple
    return None


def _widths_alike(module: torch.nn.Module) -> frozenset[int]:
    """Even numbers of rows for which a layer gives what it gives for `CPU_ROWS` rows."""
    inputs, outputs = module.weight.shape if type(module) is Conv1D else reversed(module.weight.shape)
    widths = set(range(2, CPU_ROWS + 1, 2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(-(-COMPARED // (outputs * CPU_ROWS))):
        rows = torch.randn(CPU_ROWS, 1, inputs, generator=generator).to(module.weight.dtype)
        together = module.forward(rows)
        for width in sorted(widths - {CPU_ROWS}):
            parts = [module.forward(part.contiguous()) for part in rows.split(width)[: CPU_ROWS // width]]
            if not torch.equal(torch.cat(parts), together[: len(parts) * width]):
                widths.discard(width)
    return frozenset(widths)


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
    """

    def __init__(
        self,
        call: Callable[[Tensor, Tensor, Cache], Tensor],
        config: Any,
        runtime: Runtime,
        device: torch.device,
        multiple: int | None = None,
        no_graph: str | None = None,
    ):
        self.call, self.config, self.runtime, self.device = call, config, runtime, device
        self.on_gpu = device.type == "cuda"
        self.multiple = multiple or 1
        #: Rows that the model sees in every step; None where that depends on how many are decoded.
        self.fixed = GPU_ROWS if self.on_gpu else None
        #: Steps under way at once: the host looks at a step's tokens while the next one runs.
        self.depth = 2 if self.on_gpu else 1
        #: Rows that can be decoded side by side.
        self.most = GPU_ROWS if self.on_gpu else CPU_ROWS if self.multiple > 1 else 1
        #: Why steps are not captured, and why rows are decoded one at a time, if so.
        self.no_graph: str | None = DEBUGGED if runtime.plan.debug else no_graph
        self.alone: str | None = None
        if self.most == 1:
            self.alone = "products of this model round differently for each number of rows on this CPU"
        #: Rows that are asked for side by side.
        self._asked = 1
        self._batch: list[Row] = []
        self.pools: list[LayerPool] = []
        self.reserve = 0
        #: The most room that answers have needed since storage was given back.
        self.grown = 0
        self.layers: list[DecodeLayer] = []
        #: Those of all layers, one after the other: each layer has its part.
        self.lengths = torch.zeros(0, dtype=torch.int32, device=device)
        self.graphs: dict[int, Any] = {}
        self._memory: Any = None
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
        self.logits: dict[int, Tensor] = {}

    # --- storage -----------------------------------------------------------------------------------------------

    def start(self, lengths: Sequence[int], reserve: int) -> None:
        """Begin a batch of prompts of these lengths, the longest first, with room for `reserve` tokens of each."""
        share = sum(length + reserve for length in lengths) / (lengths[0] + reserve)
        if not self.pools:
            self.pools = [LayerPool() for _ in self._cache.layers]
        for pool in self.pools:
            pool.clear(share)
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
        kept = [layer.view().lengths for layer in cache.layers if isinstance(layer, PreallocatedLayer)]
        lengths = iter(torch.cat(kept).tolist() if kept else [])
        paged: list[tuple[int, RaggedKV, int, list[int]]] = []
        for index, (layer, pool) in enumerate(zip(cache.layers, self.pools, strict=True)):
            if not isinstance(layer, PreallocatedLayer):
                row.held.append(self._adopt_window(layer, pool))
                continue
            kv = layer.view()
            size = len(kv.starts) * (kv.keys.shape[1] + kv.values.shape[1]) * kv.keys.element_size()
            if size != self.runtime.sizes[index][0]:
                raise ValueError(f"layer {index} caches something else than the keys and values that attention reads")
            own = [next(lengths) for _ in kv.starts]
            row.held.append(Held(kv.starts, kv.lengths.clone(), None, max(own)))
            row.room = min(row.room, layer.room)
            if layer.page_size:
                pages = [-(-(length + self.reserve) // layer.page_size) for length in own]
                first = pool.take_pages(sum(pages))
                paged.append((index, kv, layer.page_size, [first + sum(pages[:head]) for head in range(len(pages))]))
        firsts = torch.tensor([first for *_, own in paged for first in own], dtype=torch.int64).to(self.device)
        for index, kv, page_size, own in paged:
            first, firsts = firsts[: len(own)], firsts[len(own) :]
            row.held[index].first = first
            bounds = PageBounds(page_size, self.pools[index].low, self.pools[index].high, first)
            update_bounds(kv, bounds, torch.zeros_like(kv.lengths))

    def _adopt_window(self, layer: DynamicSlidingWindowLayer, pool: LayerPool) -> Held:
        heads, held = layer.keys.shape[1:3]
        capacity = held + self.reserve
        keys, values, first = pool.take(heads * capacity, layer.keys, layer.values)
        for flat, states in ((keys, layer.keys), (values, layer.values)):
            flat[first : first + heads * capacity].view(heads, capacity, -1)[:, :held] = states[0]
        starts = torch.arange(heads, device=keys.device) * capacity + first
        return Held(starts, torch.full_like(starts, held, dtype=torch.int32), None, held)

    def _prepare(self) -> None:
        """Make the layers ready for the batch; what was captured stays good as long as no tensor moves."""
        rows = [row for row in self._batch if not row.done]
        if not self.layers:
            heads = [len(held.starts) for held in rows[0].held]
            sizes = [len(self.ids) * number for number in heads]
            self.lengths = torch.zeros(sum(sizes), dtype=torch.int32, device=self.device)
            # Layers follow each other, so they can share their tickets.
            tickets = torch.zeros(2, max(sizes), dtype=torch.int32, device=self.device)
            self.layers = [
                DecodeLayer(pool, number, lengths, tickets, held)
                for pool, number, lengths, held in zip(
                    self.pools, heads, self.lengths.split(sizes), rows[0].held, strict=True
                )
            ]
        for place, layer in enumerate(self.layers):
            longest = max(row.held[place].longest + row.room for row in rows)
            if longest > layer.longest or layer.pool.made != layer.made:
                layer.made, layer.longest = layer.pool.made, max(longest, layer.longest)
                self._forget_graphs()

    def release(self) -> None:
        """Give all memory back."""
        self._forget_graphs()
        self.grown = 0
        self.pools, self.layers, self._record, self.logits = [], [], {}, {}
        self._checked.clear()

    def _grow(self) -> None:
        """Move the rows that have not ended to storage with more room."""
        rows = [row for row in self._batch if not row.done]
        # Twice as much each time: a step has to be captured anew for each size.
        more = max(LEAST_GROWTH, self.reserve, *(row.fed for row in rows))
        self._forget_graphs()
        page = None if self.method is None else self.method.page_size
        for place, layer in enumerate(self.layers):
            pool, sources = layer.pool, []
            for row in rows:
                held = row.held[place]
                first = held.starts if held.first is None else held.first
                sources += list(
                    zip(held.starts.tolist(), (held.lengths + row.fed).tolist(), first.tolist(), strict=True)
                )
            old = pool.keys, pool.values
            pool.made += 1
            room = torch.tensor([0, *(length + more for _, length, _ in sources)]).cumsum(0).tolist()
            # Never less than before: the next batch may need as much.
            size = max(room[-1], len(old[0]))
            pool.keys, pool.values = (states.new_empty(size, states.shape[-1]) for states in old)
            for (start, length, _), place_now in zip(sources, room, strict=False):
                pool.keys[place_now : place_now + length] = old[0][start : start + length]
                pool.values[place_now : place_now + length] = old[1][start : start + length]
            pool.used = room[-1]
            del old
            pages = [0] * (len(sources) + 1)
            if layer.first is not None:
                pages = torch.tensor([0, *(-(-(length + more) // page) for _, length, _ in sources)]).cumsum(0).tolist()
                low, high = pool.low, pool.high
                size = max(pages[-1], len(low))
                pool.low, pool.high = (bound.new_empty(size, bound.shape[-1]) for bound in (low, high))
                for (_, length, start), now in zip(sources, pages, strict=False):
                    number = -(-length // page)
                    pool.low[now : now + number] = low[start : start + number]
                    pool.high[now : now + number] = high[start : start + number]
                pool.pages = pages[-1]
            for number, row in enumerate(rows):
                own = slice(number * layer.heads, (number + 1) * layer.heads)
                held = row.held[place]
                held.starts = torch.tensor(room[:-1][own]).to(self.device)
                if held.first is not None:
                    held.first = torch.tensor(pages[:-1][own]).to(self.device)
        for row in rows:
            row.room = row.fed + more
        self.grown = max(self.grown, *(row.room for row in rows))
        self._prepare()

    def held_bytes(self) -> int:
        """Bytes of keys, values and bounds that the pools hold, room to grow included."""
        tensors = [t for pool in self.pools for t in (pool.keys, pool.values, pool.low, pool.high) if t is not None]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

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
    ) -> Tensor:
        """See `session.StepAttention`. Rows beyond those of attention's bucket are idle and get 0."""
        index = known.index
        layer, rows = self.layers[index], self._bucket
        width, heads, _, dim = query.shape
        sequences = rows * layer.heads
        kv = layer.kv(rows)
        backend = decode_backend(self.runtime.plan)
        method = self.method if eligible else None
        bounds = None if method is None else layer.bounds(rows, method.page_size)
        grouped = query[:rows].reshape(sequences, heads // layer.heads, 1, dim)
        if method is not None and layer.room is None:
            layer.room = torch.zeros(len(self.ids) * heads, dtype=torch.int32, device=self.device)
        new = key[:rows].reshape(sequences, 1, dim), value[:rows].reshape(sequences, 1, -1)
        if method is None or not method.appends:
            append(kv, *new, bounds)
            new = None
        options = {"scale": scale, "softcap": softcap, "backend": backend}
        if method is None:
            out, used = paged_decode(grouped, kv, window=window, **options)
        else:
            # Nothing comes between these two: they run into each other.
            cache = CacheView(kv, self.tokens_held[:rows], layer.heads, new, overlap=True)
            state = State({"low": bounds.low, "high": bounds.high}, bounds.page_size, bounds.first)
            method, budget = method.resolved(self.sparsity, 0, known)
            call = Call(grouped, kv.keys, kv.values, scale, softcap, "decode", budget, known, cache, state)
            debug = self.runtime.plan.debug
            selection = chosen(method, call, Reads, debug)
            check_pages(method, index, selection, grouped, kv, backend, debug)
            lists, layer.width = selection.counts.shape[1], selection.ids.shape[-1]
            layer.reads = layer.room[: len(self.ids) * layer.heads * lists].view(-1, lists, 1)
            out, used = paged_decode(grouped, kv, selection, keys_read=layer.reads[:sequences], **options)
        layer.backend, layer.shape = used, DecodeShape.of(heads, layer.heads, kv)
        out = out.reshape(rows, heads, 1, -1)
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
        found = [layer.reads[: self._bucket * layer.heads] for layer in self.layers if layer.reads is not None]
        return torch.cat([reads.flatten() for reads in found])

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
                self._forget_graphs()
            self.method, self.sparsity = wanted
            yield [row for row, mine in zip(self._batch, own, strict=True) if mine == (self.method, self.sparsity)]

    def gave(self, index: int, key: Tensor, value: Tensor) -> bool:
        """See `attention.StepAttention`."""
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
        self._step()
        self._recorded = 0
        self.cursor.zero_()
        return self.logits[self._width][: len(rows)].clone()

    def _load(self, rows: list[Row]) -> None:
        """Make these the rows of the next steps."""
        number = len(rows)
        self._bucket = number if self.fixed is None else next(size for size in BUCKETS if size >= number)
        self._width = self.fixed or -(-number // self.multiple) * self.multiple
        for place, layer in enumerate(self.layers):
            layer.load([row.held[place] for row in rows], [row.fed for row in rows])
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
        depth = self.depth if all(row.choose is None for row in rows) else 1  # unless the host chooses the tokens
        flying: deque[Any] = deque()
        while not any(row.done for row in rows):
            full = max(row.fed - row.room for row in rows) + len(flying) >= 0
            if flying and (len(flying) == depth or full):
                self._land(flying.popleft(), rows)
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

    def _launch(self, rows: list[Row]) -> tuple[str, Tensor, Any]:
        """Run one step; returns what ran it, where its tokens will be, and the event to wait for on a GPU."""
        if self.method is not None and self._recorded == RECORDED:
            self._fetch(rows)
        graph = self._graph() if self.on_gpu else None
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
        for place, row in enumerate(rows):
            if row.done:
                continue
            row.fed += 1
            phase = row.counts.phases["decode"]
            phase.loops[loop] += 1
            if self.on_gpu and loop == "eager":
                phase.loop_reasons[self.no_graph] += 1
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
                    refuse_pages(self.method, index, own, layer.width, layer.heads)
                    for place, part in enumerate(parts):
                        part.append(record[:, start + place * each : start + (place + 1) * each])
                    start += self._bucket * each
            for row, part in zip(rows, parts, strict=True):
                row.reads.append(np.concatenate(part, 1))
        self._recorded = 0
        self.cursor.zero_()

    # --- CUDA graphs -------------------------------------------------------------------------------------------

    def _graph(self) -> Any:
        """The captured step for the rows that are loaded, or None where it cannot be captured."""
        if self._bucket not in self.graphs and self.no_graph is None:
            try:
                self.graphs[self._bucket] = self._capture()
            except Exception as error:  # modelling code of any kind
                if out_of_memory(error):
                    raise
                lines = str(error).strip().splitlines() or [""]
                self.no_graph = f"the step cannot be captured ({type(error).__name__}: {lines[0]})"
                logger.warning("decoding runs without CUDA graphs: %s", self.no_graph)
        return self.graphs.get(self._bucket)

    def _forget_graphs(self) -> None:
        """Drop what was captured. The memory pool ends with its last graph: the next one begins another."""
        self.graphs.clear()
        self._memory = None

    def _capture(self) -> Any:
        statics = [self.ids, self.positions, self.cursor, self.lengths]
        before = [tensor.clone() for tensor in statics]

        def again() -> None:
            for tensor, value in zip(statics, before, strict=True):
                tensor.copy_(value)

        mode = torch.cuda.get_sync_debug_mode()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self._step()  # kernels are compiled and tensors made
                again()
                # A step that waits for the device would break the capture, and what comes after it.
                torch.cuda.set_sync_debug_mode("error")
                self._step()
                again()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream().wait_stream(stream)
            again()
        graph = torch.cuda.CUDAGraph()
        if self._memory is None:
            # One step runs at a time and leaves its results in static tensors: what is in between can share memory.
            self._memory = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._memory):
            self._step()
        return graph

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
        start = 0
        for index, (layer, held) in enumerate(zip(self.layers, row.held, strict=True)):
            own = None
            if layer.reads is not None and reads is not None:
                each = layer.heads * layer.reads.shape[1]
                own = reads[:, start : start + each].T.reshape(layer.heads, -1, row.fed)
                start += each
            if self.runtime.layers.get(index, "") is None:
                row.counts.later(_counter(phase, index, layer, logical, own, self.method), held.lengths)


def _counter(
    phase: Any, index: int, layer: DecodeLayer, logical: np.ndarray, reads: np.ndarray | None, method: Any
) -> Callable[[np.ndarray], None]:
    shape, backend, steps = layer.shape, layer.backend, len(logical)

    def count(held: np.ndarray) -> None:
        visible = held[:, None] + 1 + np.arange(steps)
        count_steps(phase, index, shape, visible, logical, reads, method, backend, calls=steps)

    return count
