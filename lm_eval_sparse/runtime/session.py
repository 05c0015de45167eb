"""The runtime of sparse attention in one model: what every attention call of a forward pass comes down to.

It serves every model family: it sees queries, keys and values after rotary embedding and after the cache update.
What each layer may see, and whether its keys and values are those of our cache, was found out when the model was
loaded (`probe`). Rows are unpadded before any method looks at them, so that batch neighbours and padding cannot
change what is selected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.decode import BACKENDS as DECODE_BACKENDS
from ..kernels.decode import paged_decode
from ..kernels.dense import dense_attention, masked_attention
from ..kernels.prefill import block_sparse_prefill_rows
from ..kernels.types import Blocks, Keep, RaggedKV, Reads, State, causal_pairs
from ..methods.base import CacheView, Call, DecodeMethod, Layer
from ..methods.plan import Plan
from .accounting import PhaseCounts, RowCounts, settle
from .cache import PreallocatedLayer, SparseCache, Storage
from .layers import Layers
from .masks import Sight, sight_of, structure
from .selections import COVERS, Walked, check_figures, check_kept, check_pages, chosen, misfit, refuse, refuse_pages

#: Why a decode method read everything although it could have read less.
COVERED = COVERS["decode"]


@dataclass(frozen=True)
class SparseRow:
    """A row of a batch: states `(H or H_kv, L, D)`, what was selected for it, where its output goes, or None."""

    row: int
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor | None
    selection: Blocks


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
        #: Tokens of the longest prompts and answers: a window of at least as many hides nothing.
        self.longest: int | None = None
        #: What methods are told of each layer.
        self.known = Layers()
        #: Counts of the rows of the running batch.
        self.rows: list[RowCounts] | None = None
        #: Tokens of the prompt of the running batch, padding included; earlier chunks are prefill too.
        self.prompt = 0
        #: The window that the task of the running batch says, if any.
        self.task_window: int | None = None
        #: The batch's cache. Without one there is nothing to evict and no decode phase.
        self.cache: SparseCache | None = None
        #: What attends while answers are decoded token by token from a cache of its own.
        self.decoder: StepAttention | None = None
        self._mask: Tensor | None = None
        self._starts: list[int] | None = None

    @contextmanager
    def running(
        self,
        rows: Sequence[RowCounts],
        cache: SparseCache | None = None,
        prompt: int = 0,
        window: int | None = None,
    ) -> Iterator[None]:
        """Count into `rows` and work on `cache` inside the block. `window` is what their task says."""
        self.rows, self.cache, self.prompt, self.task_window = list(rows), cache, prompt, window
        try:
            yield
            settle(rows)
        finally:
            self.rows, self.cache, self.prompt, self.task_window = None, None, 0, None

    def check_lengths(self, lengths: Iterable[int]) -> None:
        """Raise `UserError` when a prompt of one of these lengths (tokens) cannot be run as requested."""
        for length in sorted(set(lengths)):
            for assignment in self.plan.phases.values():
                assignment.check_length(length)

    def check_windows(self, shortest: int, longest: int) -> None:
        """Raise `UserError` when a window was typed that no prompt has, of `shortest` to `longest` tokens."""
        for assignment in self.plan.phases.values():
            assignment.check_window(shortest, longest)

    def new_cache(
        self, config: Any, reserve: int, storages: Sequence[Storage] | None = None, prompt: int = 0
    ) -> SparseCache:
        """A cache for one batch under this plan, with room for `reserve` tokens after the prompt."""
        return SparseCache(config, reserve, self.plan.eviction is not None, storages, prompt, self.longest)

    def attach(self, model: torch.nn.Module) -> None:
        """Make this the runtime of every attention module of `model`."""
        self.known = Layers(model)
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module._lm_eval_sparse = self

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

    def starts(self, mask: Tensor | None) -> list[int] | None:
        """First real token of each row, or None when no row is left-padded. One host read per mask, not per layer."""
        if mask is None:
            return None
        if mask is not self._mask:
            starts = mask.to(torch.int8).argmax(-1).tolist()
            self._mask, self._starts = mask, starts if any(starts) else None
        return self._starts

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
        if self.decoder is not None:
            if index in self.by_memory and not self.decoder.gave(index, key, value):
                raise changed(module, "is given other keys and values than its cache holds, unlike")
            known = self.known.of(module, query.shape[1], key.shape[1], key.shape[-1], value.shape[-1])
            return self.decoder.attend(
                known, query, key, value, scale=scale, softcap=softcap, window=window, eligible=reason is None
            )
        if self.takes_mask(index):
            return masked_attention(query, key, value, mask, scale=scale, softcap=softcap)
        starts = self.starts(mask)
        batch, q_len, kv_len = len(query), query.shape[2], key.shape[2]
        options = {"scale": scale, "softcap": softcap, "window": window}
        known = self.known.of(module, query.shape[1], key.shape[1], key.shape[-1], value.shape[-1])
        layer = self._cache_layer(index) if reason is None else None
        if layer is not None and index in self.by_memory and not layer.gave(key, value):
            raise changed(module, "is given other keys and values than its cache holds, unlike")
        # A lender has evicted its prompt when a borrower's prefill begins.
        evicted = layer is not None and layer.ragged is not None and layer.get_seq_length() > self.prompt
        if layer is not None and (evicted or (q_len != kv_len and kv_len > self.prompt)):
            return self._decode(known, layer, query, key, value, starts, scale, softcap)
        if q_len != kv_len:
            out = self._continue(index, query, key, value, mask, starts, reason, options)
        elif starts is None and (self.plan.prefill is None or reason is not None):
            self._count_dense("prefill", index, query, key, value, [0] * batch, reason)
            out = dense_attention(query, key, value, **options)
        else:
            begins = starts or [0] * batch
            fits = [reason is None and self._is_sparse(row, batch, q_len - start) for row, start in enumerate(begins)]
            # A sparse row that is the whole batch takes the output that the kernel makes; others share a buffer, in
            # memory as `attention` returns it, (B, L, H, D), so that nothing is copied there.
            alone = batch == 1 and starts is None and fits[0]
            out = None if alone else query.new_empty(batch, q_len, query.shape[1], value.shape[-1]).transpose(1, 2)
            sparse = []
            for row, start in enumerate(begins):
                q, k, v = query[row, :, start:], key[row, :, start:], value[row, :, start:]
                place = None if alone else out[row, :, start:]
                if start:
                    out[row, :, :start] = 0
                if fits[row]:
                    sparse.append(self._select(known, q, k, v, place, row, scale, softcap))
                else:
                    self._count_dense("prefill", index, q[None], k[None], v[None], [0], reason, row=row, batch=batch)
                    place.copy_(dense_attention(q[None], k[None], v[None], **options)[0])
            for rows in alike(sparse):
                made = self._run_sparse(index, rows, batch, scale, softcap)
                out = made[0][None] if alone else out
        if layer is not None and kv_len == self.prompt and index not in self.lenders:
            self._end_prefill(known, layer, query, key, value, starts or [0] * batch, scale, softcap)
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

    def _cache_layer(self, index: int) -> PreallocatedLayer | None:
        """The cache of an eligible layer while a batch runs, or None when there is none of ours."""
        if self.cache is None or index in self.uncached:
            return None
        index = self.lenders.get(index, index)
        if index >= len(self.cache.layers):
            return None
        layer = self.cache.layers[index]
        return layer if isinstance(layer, PreallocatedLayer) else None

    def ineligible(self, index: int, key: Tensor, value: Tensor) -> str | None:
        """Why this layer is left untouched and counted out, or None."""
        sight = self.sights[index]
        if sight.kind != "full" or self.takes_mask(index):
            return str(sight)
        if key.shape[-1] != value.shape[-1]:
            return f"keys have {key.shape[-1]} dimensions, values {value.shape[-1]} (latent attention)"
        return None

    def _is_sparse(self, row: int, batch: int, length: int) -> bool:
        """Whether this row's prefill is sparse in an eligible layer; counts a fallback when it is too short."""
        if self.plan.prefill is None:
            return False
        method, sparsity = self.plan.prefill.at(length, self.task_window)
        reason = self.plan.prefill.lacks_window(length) or method.too_short(sparsity, length)
        if reason is None:
            return True
        self.plan.prefill.check_length(length)
        if counts := self._counts("prefill", row, batch):
            counts.reasons[reason] += 1
        return False

    def _select(
        self,
        layer: Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor | None,
        row: int,
        scale: float,
        softcap: float | None,
    ) -> SparseRow:
        method, budget = self.plan.prefill.resolved(query.shape[1], layer, self.task_window)
        call = Call(query, key, value, scale, softcap, "prefill", budget, layer)
        blocks = chosen(method, call, Blocks, self.plan.debug)
        return SparseRow(row, query, key, value, out, blocks)

    def _run_sparse(
        self, index: int, rows: Sequence[SparseRow], batch: int, scale: float, softcap: float | None
    ) -> list[Tensor]:
        """Compute the rows' attention in one call of the operator, and count it."""
        outs, method = [row.out for row in rows], self.plan.prefill.method.name
        debug = self.plan.debug or not self.rows
        walked = [Walked(method, index, row.selection, row.query, debug) for row in rows]
        try:
            made, backend = block_sparse_prefill_rows(
                [row.query for row in rows],
                [row.key for row in rows],
                [row.value for row in rows],
                [each.layout for each in walked],
                scale=scale,
                softcap=softcap,
                backend=self.plan.backend,
                outs=None if outs[0] is None else outs,
            )
        except ValueError as error:
            raise UserError(f"backend={self.plan.backend}: {error}") from error
        for row, each in zip(rows, walked, strict=True):
            counts = self._row(row.row, batch)
            if counts is not None:
                if self.plan.backend not in ("auto", backend):
                    counts.phases["prefill"].reasons[f"backend={self.plan.backend} could not run: {backend} did"] += 1
                count_sparse(counts, method, index, row, each, backend)
        return made

    def _end_prefill(
        self,
        known: Layer,
        layer: PreallocatedLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: list[int],
        scale: float,
        softcap: float | None,
    ) -> None:
        """The prompt is complete in this layer: evict, begin to keep page bounds, and count what is held."""
        index = known.index
        layer.pads = list(starts)
        kept = [
            self._evict_row(
                known, *(states[row, :, start:] for states in (query, key, value)), row, len(starts), scale, softcap
            )
            for row, start in enumerate(starts)
        ]
        if self.plan.eviction is not None:  # also when all rows keep everything: a row must not feel its neighbours
            layer.evict(kept)
        if self.plan.decode is not None:
            layer.keep_bounds(self.plan.decode.method.page_size)
        for row in range(len(starts)):
            counts = self._row(row, len(starts))
            if counts is not None and index not in counts.kv:
                count_memory(counts, index, *layer.held_bytes(row))

    def _evict_row(
        self,
        layer: Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        row: int,
        batch: int,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, int] | None:
        """What one row keeps: ids `(H_kv, W)`, their numbers `(H_kv,)`, the sum of those; None for everything."""
        heads, length, dim = len(query), key.shape[1], key.shape[2]
        kv_heads, index = key.shape[0], layer.index
        counts = self._counts("eviction", row, batch)
        per_key = 2 * dim * key.element_size()
        dense = {
            "pairs": length,
            "bytes_dense": length * per_key * kv_heads / heads,
            "flops_dense": 4 * dim * causal_pairs(length),
        }
        everything = {"selected": length, "executed": length, "bytes_read": 0, "flops_estimator": 0, **dense}
        if self.plan.eviction is None:
            if counts is not None:
                counts.add(index, heads, "dense", None, **everything)
            return None
        method, sparsity = self.plan.eviction.at(length, self.task_window)
        self.plan.eviction.check_length(length)
        if reason := self.plan.eviction.lacks_window(length) or method.too_short(sparsity, length):
            if counts is not None:
                counts.reasons[reason] += 1
                counts.add(index, heads, "fallback", None, **everything)
            return None
        method, budget = self.plan.eviction.resolved(length, layer, self.task_window)
        call = Call(query, key, value, scale, softcap, "eviction", budget, layer)
        selection = chosen(method, call, Keep, self.plan.debug)
        debug = self.plan.debug or counts is None
        selection, faults, words = check_kept(method.name, index, selection, kv_heads, length, debug)
        if counts is not None:
            names = list(selection.knobs)
            kind = "sparse"
            if selection.total == kv_heads * length:
                kind = "fallback"
                counts.reasons[COVERS["eviction"]] += 1

            def count(kept: np.ndarray, faults: np.ndarray | None, flops: float, read: float, *knobs: Any) -> None:
                if faults is not None:
                    refuse(method.name, index, faults, words, "KV head")
                check_figures(method.name, index, length, estimator_flops=flops, estimator_bytes=read)
                kept = np.repeat(kept, heads // kv_heads)
                costs = {"bytes_read": read / heads, "flops_estimator": flops / heads}
                counts.add(index, heads, kind, "compact", selected=kept, executed=kept, **costs, **dense)
                counts.note_knobs(dict(zip(names, knobs, strict=True)))

            cost = selection.cost.flops, selection.cost.bytes
            self._row(row, batch).later(count, selection.counts, faults, *cost, *selection.knobs.values())
        return selection.ids, selection.counts, selection.total

    def _continue(
        self,
        index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        starts: list[int] | None,
        reason: str | None,
        options: dict[str, Any],
    ) -> Tensor:
        """New tokens against a cache that is not ours, or a further chunk of the prompt: dense."""
        first = None
        if starts is not None:
            # Window layers hold the last keys only, so the padding they still see is shorter.
            dropped = mask.shape[-1] - key.shape[2]
            starts = [max(0, start - dropped) for start in starts]
            first = torch.tensor(starts, device=query.device)
        phase = "prefill" if key.shape[2] <= self.prompt else "decode"
        self._count_dense(phase, index, query, key, value, starts or [0] * len(query), reason)
        return dense_attention(query, key, value, starts=first, **options)

    def _decode(
        self,
        known: Layer,
        layer: PreallocatedLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: list[int] | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """New tokens against our cache; `q_len` is above 1 when given answers are scored."""
        index = known.index
        batch, heads, steps, dim = query.shape
        if layer.ragged is None and self.plan.decode is None:
            first = None if starts is None else torch.tensor(starts, device=query.device)
            self._count_dense("decode", index, query, key, value, starts or [0] * batch, None)
            return dense_attention(query, key, value, scale=scale, softcap=softcap, starts=first)
        kv = layer.view()
        kv_heads = layer.keys.shape[1]
        grouped = query.reshape(batch * kv_heads, heads // kv_heads, steps, dim)
        shape = DecodeShape.of(heads, kv_heads, kv)
        backend = decode_backend(self.plan)
        if self.plan.decode is None:
            out, used = paged_decode(grouped, kv, scale=scale, softcap=softcap, backend=backend)
            for row in range(batch):
                self._count_decode(index, row, layer, kv, shape, steps, None, None, used)
            return out.reshape(batch, heads, steps, -1)
        methods = [self.plan.decode.resolved(self.prompt - layer.pads[row], known) for row in range(batch)]
        tokens = torch.tensor([layer.get_seq_length() - pad for pad in layer.pads]).to(query.device)
        out = grouped.new_empty(*grouped.shape[:3], kv.values.shape[-1])
        # All rows at once, unless a preset gives each prompt its own knobs.
        together = all(method == methods[0] for method in methods)
        for rows in [range(batch)] if together else [range(row, row + 1) for row in range(batch)]:
            part = slice(rows.start * kv_heads, rows.stop * kv_heads)
            method, budget = methods[rows.start]
            cache = CacheView(kv.part(part), tokens[rows.start : rows.stop], kv_heads)
            bounds = layer.bounds.part(part)
            call = Call(
                grouped[part],
                kv.keys,
                kv.values,
                scale,
                softcap,
                "decode",
                budget,
                known,
                cache,
                State({"low": bounds.low, "high": bounds.high}, bounds.page_size, bounds.first),
            )
            selection = chosen(method, call, Reads, self.plan.debug)
            check_pages(method, index, selection, grouped[part], cache.kv, backend, self.plan.debug)
            read = torch.empty(selection.counts.shape, dtype=torch.int32, device=query.device)
            out[part], used = paged_decode(
                grouped[part], cache.kv, selection, scale=scale, softcap=softcap, backend=backend, keys_read=read
            )
            for row in rows:
                own = slice((row - rows.start) * kv_heads, (row - rows.start + 1) * kv_heads)
                width = selection.ids.shape[-1]
                self._count_decode(index, row, layer, kv, shape, steps, read[own], method, used, width)
        return out.reshape(batch, heads, steps, -1)

    # --- counting --------------------------------------------------------------------------------------------

    def _row(self, row: int, batch: int) -> RowCounts | None:
        """The counts of a row; several rows of a batch share one when beams of a prompt run side by side."""
        return self.rows[row * len(self.rows) // batch] if self.rows else None

    def _counts(self, phase: str, row: int, batch: int) -> PhaseCounts | None:
        counts = self._row(row, batch)
        return None if counts is None else counts.phases[phase]

    def _count_dense(
        self,
        phase: str,
        index: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: list[int],
        ineligible: str | None,
        row: int | None = None,
        batch: int | None = None,
    ) -> None:
        """Count a dense call for each row, or for row `row` of a batch of `batch`, in a layer that counts."""
        if ineligible is not None or not self.rows:
            return
        heads, q_len, kv_len = query.shape[1], query.shape[2], key.shape[2]
        per_key = (key.shape[-1] + value.shape[-1]) * key.element_size()
        short = phase == "prefill" and self.plan.prefill is not None
        for place, start in enumerate(starts):
            counts = self._counts(phase, place if row is None else row, len(starts) if batch is None else batch)
            if counts is None:
                continue
            real = kv_len - start
            pairs = q_len * real - q_len * (q_len - 1) // 2
            # Decoding reads every key once per KV head and step; prefill once per tile of 128 queries and head.
            reads = dense_keys(real, 128) if phase == "prefill" else key.shape[1] * pairs / heads
            counts.add(
                index,
                heads,
                "fallback" if short else "dense",
                "sdpa",
                pairs=pairs,
                selected=pairs,
                executed=pairs,
                bytes_dense=per_key * reads,
                bytes_read=per_key * reads,
                flops_dense=4 * query.shape[-1] * pairs,
                flops_estimator=0,
            )

    def _count_decode(
        self,
        index: int,
        row: int,
        layer: PreallocatedLayer,
        kv: RaggedKV,
        shape: DecodeShape,
        steps: int,
        read: Tensor | None,
        method: DecodeMethod | None,
        backend: str,
        width: int = 0,
    ) -> None:
        """Count one decode call of one row over our cache. Every new token is a step that reads its own keys.

        Args:
            read: `(H_kv, Gs, T)` keys read, or None when a decode method had no part in it.
            width: places of a list of pages.
        """
        counts = self._row(row, len(layer.pads))
        if counts is None:
            return
        logical = np.arange(1 - steps, 1) + layer.get_seq_length() - layer.pads[row]
        held = kv.lengths[row * shape.kv_heads : (row + 1) * shape.kv_heads]

        def count(held: np.ndarray, read: np.ndarray | None) -> None:
            visible = held[:, None] + np.arange(1 - steps, 1)
            if read is not None:
                refuse_pages(method, index, read, width, shape.kv_heads)
            count_steps(counts.phases["decode"], index, shape, visible, logical, read, method, backend, calls=1)

        # The lengths are those of a tensor that goes on to be written.
        counts.later(count, held.clone(), read)


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
    ) -> Tensor:
        """Append `key` and `value (B, H_kv, 1, D)` to this layer and attend; returns `(B, H, 1, D_v)`."""
        ...

    def gave(self, index: int, key: Tensor, value: Tensor) -> bool:
        """Whether these are the keys and values that the cache layer has handed to the model."""
        ...


@dataclass(frozen=True)
class DecodeShape:
    """What the counts of decoding need to know of a layer: heads, dimension, bytes of a number and of a key + value."""

    heads: int
    kv_heads: int
    dim: int
    element: int
    per_key: int

    @staticmethod
    def of(heads: int, kv_heads: int, kv: RaggedKV) -> DecodeShape:
        dim, element = kv.keys.shape[-1], kv.keys.element_size()
        return DecodeShape(heads, kv_heads, dim, element, (dim + kv.values.shape[-1]) * element)


def decode_backend(plan: Plan) -> str:
    """The backend of decoding under a plan whose backend may be one of prefill only."""
    return plan.backend if plan.backend in DECODE_BACKENDS else "auto"


def count_memory(counts: RowCounts, index: int, held: Tensor, dense: int) -> None:
    """Count what layer `index` holds of a row: bytes of each KV head `(H_kv,)`, and of all tokens of one."""

    def count(held: np.ndarray) -> None:
        counts.kv[index] = np.stack([held, np.full(len(held), float(dense))])

    counts.later(count, held)


def count_steps(
    counts: PhaseCounts,
    index: int,
    shape: DecodeShape,
    visible: np.ndarray,
    logical: np.ndarray,
    reads: np.ndarray | None,
    method: DecodeMethod | None,
    backend: str,
    calls: int,
) -> None:
    """Count T new tokens of one row in layer `index`.

    Args:
        visible: `(H_kv, T)` keys held that a token might see; logical: `(T,)` those of a dense step.
        reads: `(H_kv, Gs, T)` keys read, or None when a decode method had no part in it.
        calls: in how many calls of equally many tokens, 1 or T.
    """
    share = shape.heads // shape.kv_heads
    if reads is None:
        kinds, read, group, flops, metadata = {"dense": calls}, visible[:, None], 1, 0.0, 0.0
    else:
        covered = (reads == visible[:, None]).all((0, 1)).reshape(calls, -1).all(1)
        kinds = {"sparse": int((~covered).sum()), "fallback": int(covered.sum())}
        read, group = reads, reads.shape[1]
        pair = (torch.from_numpy(table).long() for table in (visible, reads.max(1)))
        flops, metadata = (table.sum(1).numpy() for table in method.cost(*pair, share, shape.dim, shape.element))
        if kinds["fallback"]:
            counts.reasons[COVERED] += kinds["fallback"]
        if kinds["sparse"]:
            budgets = reads.mean((0, 1)).reshape(calls, -1).mean(1)[~covered]
            counts.note_many("budget", budgets)
            counts.note_many("page_size", np.full(len(budgets), method.page_size))
    totals, whole = read.sum(-1), float(logical.sum())

    def per_head(values: Any) -> Any:
        """From per KV head, and maybe per query head of its group, to `(H,)`."""
        return np.broadcast_to(np.asarray(values, dtype=float), (shape.kv_heads, share)).reshape(-1)

    # A list of pages that the group shares is loaded once for all its query heads.
    loads = totals / share if group == 1 else totals
    counts.add(
        index,
        shape.heads,
        None,
        None,
        pairs=whole,
        selected=per_head(totals),
        executed=per_head(totals),
        bytes_dense=whole * shape.per_key / share,
        bytes_read=per_head(loads * shape.per_key + np.reshape(metadata, (-1, 1)) / share),
        flops_dense=whole * 4 * shape.dim,
        flops_estimator=per_head(np.reshape(flops, (-1, 1)) / share),
    )
    counts.calls.update({kind: number for kind, number in kinds.items() if number})
    counts.backends[backend] += calls


def alike(rows: Iterable[SparseRow]) -> list[list[SparseRow]]:
    """Rows in groups whose layouts are of one kind: block sizes, and no columns, shared ones or own ones."""
    groups: dict[tuple, list[SparseRow]] = {}
    for row in rows:
        layout = row.selection
        columns = None if layout.columns is None else layout.columns.shape[1] == 1
        groups.setdefault((layout.block_q, layout.block_k, columns), []).append(row)
    return list(groups.values())


def count_sparse(counts: RowCounts, method: str, index: int, row: SparseRow, walked: Walked, backend: str) -> None:
    """Count a sparse prefill call of one row in layer `index`, once the device has counted its pairs.

    One that executed all of them in every head was dense, whatever the method says of itself.
    """
    selection = layout = row.selection
    heads, length, dim = row.query.shape
    per_key = (row.key.shape[-1] + row.value.shape[-1]) * row.key.element_size()
    bytes_dense = per_key * dense_keys(length, layout.block_q)
    names, words = list(selection.knobs), walked.words
    phase = counts.phases["prefill"]

    def count(selected: Any, executed: Any, keys: Any, faults: Any, flops: float, read: float, *knobs: Any) -> None:
        if faults is not None:
            refuse(method, index, faults, words)
        check_figures(
            method, index, causal_pairs(length), selected=selected, estimator_flops=flops, estimator_bytes=read
        )
        if np.shape(selected) != np.shape(executed):
            raise misfit(method, index, f"count_selected gives {np.shape(selected)}, expected {np.shape(executed)}")
        covered = bool((executed == causal_pairs(length)).all())
        if covered:
            phase.reasons[COVERS["prefill"]] += 1
        phase.add(
            index,
            heads,
            "fallback" if covered else "sparse",
            backend,
            pairs=causal_pairs(length),
            selected=selected,
            executed=executed,
            bytes_dense=bytes_dense,
            bytes_read=per_key * keys + read / heads,
            flops_dense=4 * dim * causal_pairs(length),
            flops_estimator=flops / heads,
        )
        phase.note_knobs(dict(zip(names, knobs, strict=True)))

    # A method that selects whole tiles has selected what is executed.
    selected = walked.pairs if selection.count_selected is None else selection.count_selected()
    cost = selection.cost.flops, selection.cost.bytes
    counts.later(count, selected, walked.pairs, walked.keys, walked.faults, *cost, *selection.knobs.values())


def dense_keys(length: int, block: int) -> int:
    """Keys that a dense causal kernel with query tiles of `block` rows reads: each tile up to its last query."""
    full, rest = divmod(length, block)
    return block * full * (full + 1) // 2 + (length if rest else 0)
