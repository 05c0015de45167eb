"""The runtime of sparse attention in one model: what every attention call of a forward pass comes down to.

It serves every model family: it sees queries, keys and values after rotary embedding and after the cache update.
What each layer may see, and whether its keys and values are those of our cache, was found out when the model was
loaded (`probe`). One prompt (or its beams) runs at a time, without padding, and each forward pass says which phase it
belongs to.

Long, since what the start-up check has learnt of each layer is what every call is held against.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.cache.replace import replace
from ..kernels.dense import dense_attention, masked_attention
from ..kernels.prefill import block_sparse_prefill_rows
from ..kernels.types import Blocks, Keep, Slot
from ..methods.base import Call, Layer
from ..methods.plan import Plan
from . import diagnose
from .accounting import (
    DecodeShape,
    RowCounts,
    count_dense,
    count_eviction,
    count_memory,
    count_prefill,
    count_step,
    settle,
)
from .cache import CacheLayer, SparseCache
from .layers import Layers, follow
from .masks import Sight, sight_of, structure
from .periodic import evict_due, kept_by
from .pool import Pool
from .selections import Walked, check_kept, check_slots, chosen, misfit, tell
from .steps import Filled, call_of, step


class Runtime:
    """State of sparse attention in one model: the plan, the layers seen, and the batch being run."""

    def __init__(self, plan: Plan):
        self.plan = plan
        #: layer index -> what its queries see, as found at start-up. Other layers do not run.
        self.sights: dict[int, Sight] = {}
        #: Whether there are layers that need a mask made for them: they see neither all nor a window.
        self.masked = False
        #: What the masks show that the model asked for at start-up, and what is known of mask functions since.
        self.mask_sights: set[Sight] = set()
        self._familiar: dict[Any, bool] = {}
        #: layer index -> the factor on its scores and its softcap; layers given the very memory that our cache holds.
        self.scales: dict[int, tuple[float, float | None]] = {}
        self.by_memory: set[int] = set()
        #: Attention calls of the running forward pass, and of each one once that is known.
        self.calls = 0
        self.calls_of_a_pass: int | None = None
        #: layer index -> why its keys and values are not those that our cache holds, if so.
        self.uncached: dict[int, str] = {}
        #: layer index -> the layer whose keys and values it borrows.
        self.lenders: dict[int, int] = {}
        #: What checks every call of a forward pass on trial.
        self.probe: Any = None
        #: layer index -> None when sparse attention may run there, else why not.
        self.layers: dict[int, str | None] = {}
        #: layer index -> bytes of keys and values of one token, and its window.
        self.sizes: dict[int, tuple[int, int | None]] = {}
        #: layer index -> query heads, KV heads, dimensions of a key, and of a value.
        self.shapes: dict[int, tuple[int, int, int, int]] = {}
        #: Tokens of the longest prompts and answers: a window of at least as many hides nothing.
        self.longest: int | None = None
        #: What methods are told of each layer.
        self.known = Layers()
        #: Counts of the running prompt.
        self.counts: RowCounts | None = None
        #: Its tokens; earlier chunks are prefill too.
        self.prompt = 0
        #: The window that its task says, if any.
        self.task_window: int | None = None
        #: Its cache. Without one there is nothing to evict and no decode phase.
        self.cache: SparseCache | None = None
        #: The phase that the running forward pass belongs to, and the tokens that passes have read so far.
        self.phase = "prefill"
        self._read = 0
        #: Tokens of the longest answer so far, and how often one was evicted in its course (with `every`).
        self.longest_answer = self.compactions = 0
        #: What attends while answers are decoded token by token from a cache of its own.
        self.decoder: StepAttention | None = None

    @contextmanager
    def running(
        self,
        counts: RowCounts,
        cache: SparseCache | None = None,
        prompt: int = 0,
        window: int | None = None,
        read: int = 0,
    ) -> Iterator[None]:
        """Run a prompt of `prompt` tokens and its answers inside the block: count into `counts`, work on `cache`.

        Args:
            window: what its task says.
            read: tokens that `cache` holds already.
        """
        self.counts, self.cache, self.prompt, self.task_window = counts, cache, prompt, window
        counts.tokens = prompt or counts.tokens
        self._read = read
        try:
            yield
            settle([counts])
        finally:
            self.counts, self.cache, self.prompt, self.task_window = None, None, 0, None
            self.phase = "prefill"

    def resume(self, tokens: int) -> None:
        """The cache of the running prompt holds so many tokens that no forward pass has read for it."""
        self._read += tokens

    def begin(self, tokens: int) -> None:
        """A forward pass over the next `tokens` tokens begins. Without a cache it is all prefill."""
        self.calls = 0
        self._read += tokens
        self.phase = "prefill" if self.cache is None or self._read <= self.prompt else "decode"
        if self.phase == "decode" and self.plan.every is not None:
            self.compactions += evict_due(self.plan, self.cache, self.prompt, self.scales, self.counts)
            self.longest_answer = max(self.longest_answer, self.cache.logical() - self.prompt + tokens + 1)

    def check_lengths(self, lengths: Iterable[int]) -> None:
        """Raise `UserError` when a prompt of one of these lengths (tokens) cannot be run as requested."""
        for length in sorted(set(lengths)):
            for assignment in self.plan.phases.values():
                assignment.check_length(length)

    def check_windows(self, shortest: int, longest: int) -> None:
        """Raise `UserError` when a window was typed that no prompt has, of `shortest` to `longest` tokens."""
        for assignment in self.plan.phases.values():
            assignment.check_window(shortest, longest)

    def new_cache(self, config: Any, reserve: int, pools: Sequence[Pool] | None = None, prompt: int = 0) -> SparseCache:
        """A cache for one prompt under this plan, with room for `reserve` tokens after it."""
        slots, page_size = self.kept_state()
        evicts = self.plan.eviction is not None
        return SparseCache(config, reserve, evicts, pools, prompt, self.longest, slots, page_size)

    def kept_state(self) -> tuple[tuple[Slot, ...], int]:
        """What methods keep of each layer between steps, and keys of the decode method's pages."""
        found: list[tuple[str, Slot]] = []
        if self.plan.every is not None:
            found += [(self.plan.eviction.method.name, slot) for slot in self.plan.eviction.method.slots()]
        if self.plan.decode is not None:
            found += [(self.plan.decode.method.name, slot) for slot in self.plan.decode.method.slots()]
        check_slots(found)
        return tuple(slot for _, slot in found), 0 if self.plan.decode is None else self.plan.decode.method.page_size

    def attach(self, model: torch.nn.Module) -> None:
        """Make this the runtime of every attention module of `model`."""
        before, self.known = self.known, Layers(model)
        self.known.remember(before)
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module._lm_eval_sparse = self
                follow(module)

    def see(self, sights: dict[int, Sight]) -> None:
        """Take down what the queries of each layer see."""
        self.sights = sights
        self.masked = any(sight.kind in ("chunk", "other") for sight in sights.values())

    def familiar(self, mask_function: Any, plain: bool, device: torch.device | str) -> bool:
        """Whether the model asked for a mask that shows the same at start-up."""
        key = True if plain else structure(mask_function)
        if key not in self._familiar or key is None:
            # Numbers can be looked at on the host; tensors lie where they lie.
            place = torch.device("cpu" if key is not None else device)
            self._familiar[key] = sight_of(mask_function, self.longest, place, plain) in self.mask_sights
        return self._familiar[key]

    def takes_mask(self, index: int) -> bool:
        """Whether this layer is handed a mask that transformers has made."""
        sight = self.sights[index]
        return self.masked and not (sight.kind == "full" and sight.plain)

    # --- one attention call ----------------------------------------------------------------------------------

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scale: float,
        softcap: float | None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Attention of `(B, H, q_len, D)` queries; returns `(B, H, q_len, D_v)`."""
        index = module.layer_idx
        self.calls += 1
        window = self._window(module, mask)
        if self.scales.setdefault(index, (scale, softcap)) != (scale, softcap):
            raise changed(module, f"scales its scores by {scale:g} (softcap {softcap}), not as")
        reason = self.ineligible(index, key, value)
        self.layers[index] = reason
        if index not in self.sizes:
            self.sizes[index] = key.shape[1] * (key.shape[-1] + value.shape[-1]) * key.element_size(), window
            self.shapes[index] = query.shape[1], key.shape[1], key.shape[-1], value.shape[-1]
        if self.decoder is not None:
            if index in self.by_memory and not self.decoder.gave(index, key, value):
                raise changed(module, "is given other keys and values than its cache holds, unlike")
            known = self.known.of(module, query.shape[1], key.shape[1], key.shape[-1], value.shape[-1])
            options = {"scale": scale, "softcap": softcap, "window": window, "sink": sink}
            return self.decoder.attend(known, query, key, value, eligible=reason is None, **options)
        if self.takes_mask(index):
            return masked_attention(query, key, value, mask, scale=scale, softcap=softcap, sink=sink)
        if mask is not None:
            raise UserError(
                "a prompt is padded: prompts run one at a time, so give each one alone (what hides part of a prompt "
                "otherwise is not supported)"
            )
        known = self.known.of(module, query.shape[1], key.shape[1], key.shape[-1], value.shape[-1])
        held = self._cache_layer(index) if reason is None else None
        if held is not None and index in self.by_memory and not held.gave(key, value):
            raise changed(module, "is given other keys and values than its cache holds, unlike")
        if held is not None and self.phase == "decode" and held.sequences is not None:
            return self._step(known, held, query, key, value, scale, softcap, sink)
        if self.phase == "prefill" and query.shape[2] == key.shape[2] and reason is None:
            out = self._prefill(known, query, key, value, scale, softcap, sink)
        else:
            # A later chunk of a prompt, an answer that no method touches, or a layer that is none of ours.
            out = dense_attention(query, key, value, scale=scale, softcap=softcap, window=window, sink=sink)
            if reason is None:
                self._count_dense(index, query, key, value)
        if held is not None and self.phase == "prefill" and key.shape[2] == self.prompt and index not in self.lenders:
            self._end_prefill(known, held, query, key, value, scale, softcap)
        return out

    def _window(self, module: torch.nn.Module, mask: Tensor | None) -> int | None:
        """The window of the module's layer; raises `UserError` where it was not seen, or is handed another mask."""
        name, index = type(module).__name__, module.layer_idx
        sight = self.sights.get(index)
        if sight is None:
            raise UserError(
                f"{name} of layer {index} did not run when the model was checked at start-up, so what it may see is "
                "not known: use --model hf for this model"
            )
        if (mask is not None and mask.dim() != 2) != self.takes_mask(index):
            given = "no mask" if mask is None else f"a ready-made {mask.dim()}-D attention mask"
            raise UserError(
                f"{name} of layer {index} ({sight}) was given {given}, which sparse-hf does not support: use "
                "--model hf for this model"
            )
        return sight.size if sight.kind == "window" else None

    def _cache_layer(self, index: int) -> CacheLayer | None:
        """The cache of an eligible layer while a prompt runs, or None when there is none of ours."""
        if self.cache is None or index in self.uncached:
            return None
        index = self.lenders.get(index, index)
        if index >= len(self.cache.layers):
            return None
        layer = self.cache.layers[index]
        return layer if isinstance(layer, CacheLayer) else None

    def ineligible(self, index: int, key: Tensor, value: Tensor) -> str | None:
        """Why this layer is left untouched and counted out, or None."""
        sight = self.sights[index]
        if sight.kind != "full" or self.takes_mask(index):
            return str(sight)
        return None

    # --- prefill -----------------------------------------------------------------------------------------------

    def _prefill(
        self,
        layer: Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
        sink: Tensor | None,
    ) -> Tensor:
        """The whole prompt, in a layer where sparse attention may run."""
        if not self._is_sparse(query.shape[2], len(query)):
            self._count_dense(layer.index, query, key, value)
            return dense_attention(query, key, value, scale=scale, softcap=softcap, sink=sink)
        method, budget = self.plan.prefill.resolved(query.shape[2], layer, self.task_window)
        selections, walked = [], []
        for q, k, v in zip(query, key, value, strict=True):  # beams have a prompt each
            found = chosen(method, Call(q, k, v, scale, softcap, "prefill", budget, layer), Blocks, self.plan.debug)
            selections.append(found)
            walked.append(Walked(method.name, layer.index, found, q, self.plan.debug or self.counts is None))
        try:
            made, backend = block_sparse_prefill_rows(
                list(query),
                list(key),
                list(value),
                [each.layout for each in walked],
                scale=scale,
                softcap=softcap,
                backend=self.plan.backend,
                sink=sink,
            )
        except ValueError as error:
            raise UserError(f"backend={self.plan.backend}: {error}") from error
        if self.counts is not None:
            for row, (found, each) in enumerate(zip(selections, walked, strict=True)):
                states = query[row], key[row], value[row]
                count_prefill(self.counts, method.name, layer.index, *states, found, each, backend, self.plan.backend)
        layouts, options = [each.layout for each in walked], {"scale": scale, "softcap": softcap, "sinks": sink}
        diagnose.prefill(self.counts, layer.index, query, key, value, layouts, made, **options)
        return made[0][None] if len(made) == 1 else torch.stack(list(made))

    def _is_sparse(self, length: int, rows: int) -> bool:
        """Whether a prompt is prefilled sparsely; counts why not when it is too short."""
        if self.plan.prefill is None:
            return False
        method, sparsity = self.plan.prefill.at(length, self.task_window)
        reason = self.plan.prefill.lacks_window(length) or method.too_short(sparsity, length)
        if reason is None:
            return True
        self.plan.prefill.check_length(length)
        if self.counts is not None:
            self.counts.phases["prefill"].reasons[reason] += rows
        return False

    def _count_dense(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        if self.counts is not None:
            fallback = self.phase == "prefill" and self.plan.prefill is not None
            for states in zip(query, key, value, strict=True):
                count_dense(self.counts, self.phase, index, *states, fallback=fallback)

    # --- the end of a prompt -----------------------------------------------------------------------------------

    def _end_prefill(
        self,
        layer: Layer,
        held: CacheLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
    ) -> None:
        """The prompt is complete in this layer: evict, begin to keep a state, and count what is held."""
        kept = [self._evict(layer, *states, scale, softcap) for states in zip(query, key, value, strict=True)]
        if self.plan.eviction is not None:
            held.close(kept, layer)
        elif self.plan.decode is not None:
            held.close()
        if held.sequences is not None:
            self._begin_state(layer, held, query, scale, softcap)
            self._carry(layer, held, kept)
        if self.counts is not None and layer.index not in self.counts.kv:
            count_memory(self.counts, layer.index, *held.held_bytes(0))
        diagnose.ended(self.counts, self.plan, layer.index, held, kept, key, value)

    def _begin_state(self, layer: Layer, held: CacheLayer, query: Tensor, scale: float, softcap: float | None) -> None:
        """Let methods fill their state from what stays of the prompt."""
        held.every = self.plan.every
        fillers = {} if held.every is None else {"eviction": kept_by(self.plan)}
        if self.plan.decode is not None:
            fillers["decode"] = self.plan.decode.resolved(self.prompt, layer)
        rows, length, tokens = held.sequences, query.shape[2], held.get_seq_length()
        for phase, (method, budget) in fillers.items():
            last = query[:, :, length - min(method.looks_back, length) :]
            grouped = last.reshape(len(rows.starts), layer.heads // layer.kv_heads, *last.shape[2:])
            call = call_of(layer, held.pool, rows, grouped, tokens, scale, softcap, phase, budget)
            tell(method, "prefilled", call, debug=self.plan.debug)

    def _carry(self, layer: Layer, held: CacheLayer, kept: Sequence[Keep | None]) -> None:
        """Begin the state of kept tokens with what came with the selection, where it is asked for again."""
        for row, own in zip(kept, held.sequences.rows(), strict=True):
            for name, entries in ({} if row is None else row.carried).items():
                tensor = held.pool.tensors.get(name)
                if held.every is None or tensor is None or entries.shape[2:] != tensor.shape[1:]:
                    raise misfit(
                        self.plan.eviction.method.name,
                        layer.index,
                        f"carried {name!r} {tuple(entries.shape)} is no slot per token of a method with every",
                    )
                replace(tensor, own.starts, row.counts, entries.to(tensor.dtype))

    def _evict(
        self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Keep | None:
        """What stays of one row; None for everything."""
        length, counts, plan = key.shape[1], self.counts, self.plan.eviction
        if plan is None:
            if counts is not None:
                count_eviction(counts, layer.index, query, key, None, value_dim=value.shape[-1])
            return None
        method, sparsity = plan.at(length, self.task_window)
        plan.check_length(length)
        if reason := plan.lacks_window(length) or method.too_short(sparsity, length):
            if counts is not None:
                counts.phases["eviction"].reasons[reason] += 1
                count_eviction(counts, layer.index, query, key, method.name, value_dim=value.shape[-1])
            return None
        layer = self.known.evicted(layer)
        method, budget = plan.resolved(length, layer, self.task_window)
        call = Call(query, key, value, scale, softcap, "eviction", budget, layer)
        kept = chosen(method, call, Keep, self.plan.debug)
        debug = self.plan.debug or counts is None
        kept, faults, words = check_kept(method.name, layer.index, kept, len(key), length, value.shape[-1], debug)
        if counts is not None:
            count_eviction(counts, layer.index, query, key, method.name, kept, faults, words, value.shape[-1])
        return kept

    # --- decode ------------------------------------------------------------------------------------------------

    def _step(
        self,
        layer: Layer,
        held: CacheLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
        sink: Tensor | None,
    ) -> Tensor:
        """New tokens against what is held; `q_len` is above 1 when given answers are scored."""
        rows, heads, steps, dim = query.shape
        new = None
        if layer.index not in self.lenders:  # whoever borrows finds them stored
            held.make_room(steps)
            held.sequences.lengthen(steps)
            new = tuple(states.reshape(-1, steps, states.shape[-1]) for states in (key, value))
        kv, tokens = held.sequences.kv(held.pool), held.get_seq_length()
        filled = keeper = None
        if self.plan.decode is not None or held.every is not None:
            state = held.pool.state(held.sequences.first, held.sequences.place)
            so_far = torch.full((rows,), tokens, dtype=torch.int64, device=query.device)
            if self.plan.decode is not None:
                filled = Filled(*self.plan.decode.resolved(self.prompt, layer), state, so_far)
            if held.every is not None:
                keeper = Filled(*kept_by(self.plan), state, so_far)
        grouped = query.reshape(len(kv.starts), heads // kv.heads, steps, dim)
        if keeper is not None and new is not None:
            held.newest = self.known.evicted(layer), grouped[:, :, -1:].clone()
        options = {"scale": scale, "softcap": softcap, "plan": self.plan, "keeper": keeper, "sink": sink}
        found = step(grouped, new, kv, layer, filled, **options)
        looked = {"scale": scale, "softcap": softcap, "sinks": sink, "lender": self.lenders.get(layer.index)}
        diagnose.step(self.counts, layer.index, grouped, kv, found, tokens, **looked)
        if self.counts is not None:
            shape = DecodeShape.of(heads, kv.heads, kv, found.virtual, found.weighed, found.altered)
            for row in range(rows):
                own = slice(row * kv.heads, (row + 1) * kv.heads)
                read = None if found.read is None else found.read[own]
                filler = None if filled is None else filled.method
                count_step(
                    self.counts, layer.index, shape, kv.lengths[own], tokens, steps, read, filler, found.backend,
                    found.width,
                )  # fmt: skip
        return found.out.reshape(rows, heads, steps, -1)


def changed(module: torch.nn.Module, what: str) -> UserError:
    """What a module is refused with that does something else than when the model was checked."""
    return UserError(
        f"{type(module).__name__} of layer {module.layer_idx} {what} when the model was checked at start-up: use "
        "--model hf for this model"
    )


class StepAttention(Protocol):
    """What attends when answers are decoded token by token: it owns the cache and counts for itself."""

    def attend(
        self,
        layer: Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
        eligible: bool,
        sink: Tensor | None,
    ) -> Tensor:
        """Append `key` and `value (B, H_kv, 1, D)` to this layer and attend; returns `(B, H, 1, D_v)`."""
        ...

    def gave(self, index: int, key: Tensor, value: Tensor) -> bool:
        """Whether these are the keys and values that the cache layer has handed to the model."""
        ...
