"""What one call of attention counts, by phase. What proves to be nonsense when it is counted is refused then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.types import Blocks, Keep, RaggedKV, causal_pairs
from ...methods.base import DecodeMethod
from ..selections import COVERS, Walked, Words, check_figures, misfit, refuse, refuse_reads
from .rows import PhaseCounts, RowCounts

#: Why a decode method read everything although it could have read less.
COVERED = COVERS["decode"]


# --- prefill ----------------------------------------------------------------------------------------------------------


def dense_keys(length: int, block: int) -> int:
    """Keys that a dense causal kernel with query tiles of `block` rows reads: each tile up to its last query."""
    full, rest = divmod(length, block)
    return block * full * (full + 1) // 2 + (length if rest else 0)


def count_dense(
    counts: RowCounts, phase: str, layer: int, query: Tensor, key: Tensor, value: Tensor, *, fallback: bool
) -> None:
    """Count dense attention of one row in a layer that counts.

    Args:
        query: `(H, q_len, D)`; key, value: `(H_kv, kv_len, …)`, of which the queries are the last.
        fallback: whether a method would have filled the phase.
    """
    heads, q_len = query.shape[:2]
    kv_heads, kv_len, dim = key.shape
    per_key = (dim + value.shape[-1]) * key.element_size()
    pairs = q_len * kv_len - q_len * (q_len - 1) // 2
    # Decoding reads every key once per KV head and step; prefill once per tile of 128 queries and head.
    reads = dense_keys(kv_len, 128) if phase == "prefill" else kv_heads * pairs / heads
    counts.phases[phase].add(
        layer,
        heads,
        "fallback" if fallback else "dense",
        "sdpa",
        pairs=pairs,
        selected=pairs,
        executed=pairs,
        bytes_dense=per_key * reads,
        bytes_read=per_key * reads,
        flops_dense=2 * (dim + value.shape[-1]) * pairs,
        flops_estimator=0,
    )


def count_prefill(
    counts: RowCounts,
    method: str,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Blocks,
    walked: Walked,
    backend: str,
    asked: str,
) -> None:
    """Count a sparse prefill of one row, once the device has counted its pairs.

    One that executed all of them in every head was dense, whatever the method says of itself.

    Args:
        query, key, value: `(H or H_kv, L, …)`.
        backend: what computed it; asked: what was to compute it, or `auto`.
    """
    heads, length, dim = query.shape
    both = dim + value.shape[-1]
    per_key = both * key.element_size()
    bytes_dense = per_key * dense_keys(length, selection.block_q)
    names, words = list(selection.knobs), walked.words
    phase = counts.phases["prefill"]
    if asked not in ("auto", backend):
        phase.reasons[f"backend={asked} could not run: {backend} did"] += 1

    def count(selected: Any, executed: Any, keys: Any, faults: Any, flops: float, read: float, *knobs: Any) -> None:
        if faults is not None:
            refuse(method, layer, faults, words)
        most = causal_pairs(length)
        check_figures(method, layer, most, selected=selected, estimator_flops=flops, estimator_bytes=read)
        if np.shape(selected) != np.shape(executed):
            raise misfit(method, layer, f"count_selected gives {np.shape(selected)}, expected {np.shape(executed)}")
        covered = bool((executed == causal_pairs(length)).all())
        if covered:
            phase.reasons[COVERS["prefill"]] += 1
        phase.add(
            layer,
            heads,
            "fallback" if covered else "sparse",
            backend,
            pairs=causal_pairs(length),
            selected=selected,
            executed=executed,
            bytes_dense=bytes_dense,
            bytes_read=per_key * keys + read / heads,
            flops_dense=2 * both * causal_pairs(length),
            flops_estimator=flops / heads,
        )
        phase.note_knobs(dict(zip(names, knobs, strict=True)))

    # A method that selects whole tiles has selected what is executed.
    selected = walked.pairs if selection.count_selected is None else selection.count_selected()
    cost = selection.cost.flops, selection.cost.bytes
    counts.later(count, selected, walked.pairs, walked.keys, walked.faults, *cost, *selection.knobs.values())


# --- eviction ---------------------------------------------------------------------------------------------------------


def count_eviction(
    counts: RowCounts,
    layer: int,
    query: Tensor,
    key: Tensor,
    method: str | None,
    kept: Keep | None = None,
    faults: Tensor | None = None,
    words: Words | None = None,
    value_dim: int | None = None,
) -> None:
    """Count what stays of one row after its prefill; all of it without `kept`.

    Args:
        query: `(H, L, D)`; key: `(H_kv, L, D)`.
        method: None where no method fills the phase.
        faults: flags that are yet to be looked at; words: what they say.
        value_dim: dimensions of a value; None: as many as a key has.
    """
    heads, (kv_heads, length, dim) = len(query), key.shape
    both = dim + (value_dim or dim)
    flops, size = 2 * both * causal_pairs(length), both * key.element_size()
    _count_kept(counts, layer, method, heads, kv_heads, length, size, flops, kept, faults, words)


def count_compaction(
    counts: RowCounts,
    layer: int,
    method: str,
    heads: int,
    kv_heads: int,
    tokens: int,
    keys: Tensor,
    kept: Keep | None = None,
    value_dim: int | None = None,
) -> None:
    """Count what stays of one row in the course of its answer; what is held without `kept`.

    As one more call, whose keys are the tokens so far. Its operations go with those of the prefill.

    Args:
        heads, kv_heads: of the layer; tokens: of the row so far, evicted ones included.
        keys: `(N, D)` as they are stored.
        kept: places in what each head holds, already checked; value_dim: as in `count_eviction`.
    """
    size = (keys.shape[-1] + (value_dim or keys.shape[-1])) * keys.element_size()
    _count_kept(counts, layer, method, heads, kv_heads, tokens, size, 0.0, kept, again=True)


def _count_kept(
    counts: RowCounts,
    layer: int,
    method: str | None,
    heads: int,
    kv_heads: int,
    length: int,
    per_key: int,
    flops_dense: float,
    kept: Keep | None = None,
    faults: Tensor | None = None,
    words: Words | None = None,
    again: bool = False,
) -> None:
    phase = counts.phases["eviction"]
    dense = {
        "pairs": length,
        "bytes_dense": length * per_key * kv_heads / heads,
        "flops_dense": flops_dense,
    }
    if kept is None:
        everything = {"selected": length, "executed": length, "bytes_read": 0, "flops_estimator": 0, **dense}
        phase.add(layer, heads, "dense" if method is None else "fallback", None, **everything)
        return
    names = list(kept.knobs)
    kind = "sparse"
    if kept.total == kv_heads * length:
        kind = "fallback"
        phase.reasons[COVERS["eviction"]] += 1

    def count(kept: np.ndarray, faults: np.ndarray | None, flops: float, read: float, *knobs: Any) -> None:
        if faults is not None:
            refuse(method, layer, faults, words, "KV head")
        check_figures(method, layer, length, estimator_flops=flops, estimator_bytes=read)
        if again:
            phase.note_knobs({"dropped": 1 - float(kept.sum()) / (kv_heads * length)})
        kept = np.repeat(kept, heads // kv_heads)
        costs = {"bytes_read": read / heads, "flops_estimator": flops / heads}
        phase.add(layer, heads, kind, "compact", selected=kept, executed=kept, **costs, **dense)
        phase.note_knobs(dict(zip(names, knobs, strict=True)))

    counts.later(count, kept.counts, faults, kept.cost.flops, kept.cost.bytes, *kept.knobs.values())


# --- decode -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeShape:
    """What the counts of decoding need to know of a step in a layer.

    Attributes:
        heads, kv_heads: query heads and KV heads; dim: of a key; element: bytes of a number; per_key: bytes of a key
            and its value.
        virtual, weighed, altered: as in `steps.Stepped`.
    """

    heads: int
    kv_heads: int
    dim: int
    element: int
    per_key: int
    virtual: int = 0
    weighed: bool = False
    altered: bool = False

    @staticmethod
    def of(heads: int, kv_heads: int, kv: RaggedKV, virtual: int, weighed: bool, altered: bool) -> DecodeShape:
        dim, element = kv.keys.shape[-1], kv.keys.element_size()
        per_key = (dim + kv.values.shape[-1]) * element
        return DecodeShape(heads, kv_heads, dim, element, per_key, virtual, weighed, altered)


def count_memory(counts: RowCounts, layer: int, held: Tensor, dense: int) -> None:
    """Count what a layer holds of a row: bytes of each KV head `(H_kv,)`, and of all tokens of one."""

    def count(held: np.ndarray) -> None:
        counts.kv[layer] = np.stack([held, np.full(len(held), float(dense))])

    counts.later(count, held)


def count_steps(
    counts: PhaseCounts,
    layer: int,
    shape: DecodeShape,
    visible: np.ndarray,
    logical: np.ndarray,
    reads: np.ndarray | None,
    method: DecodeMethod | None,
    backend: str,
    begun: np.ndarray,
) -> None:
    """Count T new tokens of one row, or of answers to one prompt, in a layer.

    Args:
        visible: `(H_kv, T)` keys held that a token might see; logical: `(T,)` those of a dense step.
        reads: `(H_kv, Gs, T)` keys read, or None when a decode method had no part in it.
        begun: `(calls,)` at which of the tokens a call began, ascending from 0.
    """
    share, calls = shape.heads // shape.kv_heads, len(begun)
    if reads is None:
        kinds, read, group, flops, metadata = {"dense": calls}, visible[:, None], 1, 0.0, 0.0
    else:
        covered = np.logical_and.reduceat((reads == visible[:, None]).all((0, 1)), begun) & (not shape.altered)
        kinds = {"sparse": int((~covered).sum()), "fallback": int(covered.sum())}
        read, group = reads, reads.shape[1]
        pair = (torch.from_numpy(table).long() for table in (visible, reads.max(1)))
        flops, metadata = (table.sum(1).numpy() for table in method.cost(*pair, share, shape.dim, shape.element))
        if kinds["fallback"]:
            counts.reasons[COVERED] += kinds["fallback"]
        if kinds["sparse"]:
            tokens = np.diff(begun, append=len(logical))
            budgets = (np.add.reduceat(reads.mean((0, 1)), begun) / tokens)[~covered]
            counts.note_many("budget", budgets)
            counts.note_many("page_size", np.full(len(budgets), method.read_unit))
    # A virtual key is read like any other; the second pass that weighs keys reads those of the cache again.
    again = read.sum(-1) if shape.weighed else 0.0
    totals, whole = read.sum(-1) + shape.virtual * len(logical), float(logical.sum())

    def per_head(values: Any) -> Any:
        """From per KV head, and maybe per query head of its group, to `(H,)`."""
        return np.broadcast_to(np.asarray(values, dtype=float), (shape.kv_heads, share)).reshape(-1)

    # A list of pages that the group shares is loaded once for all its query heads.
    loads, reloads = (part / share if group == 1 else part for part in (totals, again))
    counts.add(
        layer,
        shape.heads,
        None,
        None,
        pairs=whole,
        selected=per_head(totals),
        executed=per_head(totals),
        bytes_dense=whole * shape.per_key / share,
        bytes_read=per_head(
            loads * shape.per_key + reloads * shape.dim * shape.element + np.reshape(metadata, (-1, 1)) / share
        ),
        flops_dense=whole * 2 * shape.per_key / shape.element,
        flops_estimator=per_head(np.reshape(flops, (-1, 1)) / share + again * 2 * shape.dim),
    )
    counts.calls.update({kind: number for kind, number in kinds.items() if number})
    counts.backends[backend] += calls


def count_step(
    counts: RowCounts,
    layer: int,
    shape: DecodeShape,
    held: Tensor,
    tokens: int,
    steps: int,
    read: Tensor | None,
    method: DecodeMethod | None,
    backend: str,
    width: int = 0,
) -> None:
    """Count one call for T = `steps` new tokens of one row. Every one is a step that reads its own keys.

    Args:
        held: `(H_kv,)` keys held, the new ones included; tokens: of the row so far, evicted ones included.
        read: `(H_kv, Gs, T)` keys read, or None when a decode method had no part in it.
        width: places of a list.
    """
    logical = np.arange(1 - steps, 1) + tokens

    def count(held: np.ndarray, read: np.ndarray | None) -> None:
        visible = held[:, None] + np.arange(1 - steps, 1)
        if read is not None:
            refuse_reads(method, layer, read, width, shape.kv_heads)
        count_steps(counts.phases["decode"], layer, shape, visible, logical, read, method, backend, np.zeros(1, int))

    # The lengths are those of a tensor that goes on to be written.
    counts.later(count, held.clone(), read)


def count_rows(
    counts: RowCounts,
    layer: int,
    shape: DecodeShape,
    held: Tensor | np.ndarray,
    logical: np.ndarray,
    reads: Tensor | None,
    method: DecodeMethod | None,
    backend: str,
    width: int,
    begun: np.ndarray,
) -> None:
    """Count R tokens of answers to one prompt.

    Args:
        held: `(R, H_kv)` keys held, each token's own included.
        logical: `(R,)` tokens up to each, evicted ones included.
        reads: `(R, H_kv, Gs)` keys read, or None when a decode method had no part in it.
        width: places of a list.
        begun: `(calls,)` as for `count_steps`.
    """

    def count(held: np.ndarray, reads: np.ndarray | None) -> None:
        if reads is not None:
            refuse_reads(method, layer, reads.reshape(-1, reads.shape[2]), width, shape.kv_heads)
            reads = np.ascontiguousarray(np.moveaxis(reads, 0, 2))
        visible = np.ascontiguousarray(held.T)
        count_steps(counts.phases["decode"], layer, shape, visible, logical, reads, method, backend, begun)

    counts.later(count, held, reads)


def count_answer(
    counts: RowCounts,
    layer: int,
    shape: DecodeShape,
    held: Tensor,
    begun: np.ndarray,
    logical: np.ndarray,
    reads: np.ndarray | None,
    method: DecodeMethod | None,
    backend: str,
) -> None:
    """Count all steps of an answer that was decoded token by token, each a call.

    Args:
        held: `(C, H_kv)` keys held when decoding began, and whenever it went on with less.
        begun: `(C,)` steps of the answer that were behind it then, ascending from 0.
        logical: `(T,)` tokens of the row up to each step's, evicted ones included.
        reads: `(H_kv, Gs, T)` keys read, or None when a decode method had no part in it.
    """

    def count(held: np.ndarray) -> None:
        place = np.arange(len(logical))
        span = np.searchsorted(begun, place, side="right") - 1
        visible = np.ascontiguousarray(held[span].T) + 1 + place - begun[span]
        count_steps(counts.phases["decode"], layer, shape, visible, logical, reads, method, backend, place)

    counts.later(count, held)
