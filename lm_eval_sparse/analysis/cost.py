"""What a prompt and a decode step cost: operations of prefill, elements read in decoding.

The formulas of The Sparse Frontier (its isoCost analysis and appendix) with what they need to give its own plots:
weights and projections of keys and values have as many heads as there are KV heads, queries have h·d_h dimensions
whatever the width of the residual stream, and what an index costs follows from the dimensions of a head.
`analysis.printed` holds the formulas as they are printed, docs/results/cost_check.md what each gives.

Two conventions are the paper's. Attention of prefill is counted over all L² pairs of a prompt, though a causal kernel
computes half of them: `pairs="triangle"` counts those. And the output matrix is counted for every token of the prompt.

`of` says what a measured run costs: its own prompts' length, and what it was measured to compute, read and spend on
selecting, whatever its method is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from .shapes import Sizes, sizes_of

Pairs = Literal["square", "triangle"]


@dataclass(frozen=True)
class Prefill:
    """Operations (a multiplication and an addition are two) that a batch of prompts takes, by where they arise.

    Attributes:
        embedding, projections, mlp, head: those that no method changes; projections are of queries, keys, values and
            outputs.
        attention: of the layers that may be sparse. windows: of the others.
        estimator: what selecting takes.
    """

    embedding: float
    projections: float
    attention: float
    windows: float
    mlp: float
    head: float
    estimator: float = 0.0

    @property
    def fixed(self) -> float:
        """What a method does not change."""
        return self.embedding + self.projections + self.windows + self.mlp + self.head

    @property
    def total(self) -> float:
        return self.fixed + self.attention + self.estimator

    @property
    def attention_share(self) -> float:
        """The share that the paper plots as that of attention: projections and windows are in it."""
        return (self.projections + self.attention + self.windows) / self.total


@dataclass(frozen=True)
class Decode:
    """Elements that a step of a batch reads.

    Attributes:
        weights: read once for the whole batch. cache: keys, values and what selecting reads, in the layers that may be
            sparse. windows: keys and values of the others.
    """

    weights: float
    cache: float
    windows: float

    @property
    def fixed(self) -> float:
        """What a method does not change."""
        return self.weights + self.windows

    @property
    def total(self) -> float:
        return self.fixed + self.cache

    @property
    def attention_share(self) -> float:
        """The share of keys and values."""
        return (self.cache + self.windows) / self.total


def causal_pairs(length: float, window: int | None = None, pairs: Pairs = "square") -> float:
    """(query, key) pairs of a prompt that are counted for each query head: all L², L·w in a window of w tokens.

    With `pairs="triangle"` those at or below the diagonal, which causal attention computes.
    """
    seen = length if window is None else min(length, window)
    if pairs == "square":
        return length * seen
    return length * seen - seen * (seen - 1) / 2


def projections(sizes: Sizes) -> float:
    """Parameters of a layer's projections: of queries and outputs h·d_h·d each, of keys and values n_kv·d_h·d each."""
    return 2 * sizes.hidden * sizes.head_dim * (sizes.query_heads + sizes.kv_heads)


def prefill(
    sizes: Sizes,
    length: float,
    density: float = 1.0,
    batch: float = 1,
    estimator: float = 0.0,
    pairs: Pairs = "square",
) -> Prefill:
    """Operations of the prefill of `batch` prompts of `length` tokens (paper §5, eq. 3).

    A pair costs 4·d_h + 3: products of query and key and of weight and value, and three for its softmax.

    Args:
        density: share of the pairs that layers of full attention compute.
        estimator: operations of selecting ÷ operations of dense attention, 4·d_h a pair, as results measure them.
    """
    n, d, m = sizes.layers, sizes.hidden, sizes.mlp
    full = sizes.attention_layers * sizes.query_heads * causal_pairs(length, None, pairs)
    windows = sizes.window_layers * sizes.query_heads * causal_pairs(length, sizes.window, pairs)
    pair = 4 * sizes.head_dim + 3
    return Prefill(
        embedding=batch * 2 * length * d,
        projections=batch * n * 2 * length * projections(sizes),
        attention=batch * density * full * pair,
        windows=batch * windows * pair,
        mlp=batch * n * 2 * length * m * (3 * d + 1),
        head=batch * 2 * length * d * sizes.vocab,
        estimator=batch * estimator * full * 4 * sizes.head_dim,
    )


def weights(sizes: Sizes) -> float:
    """Elements of weights that a decode step reads: N(2·d·h·d_h + 2·d·d_h·n_kv + 3dm) + dV.

    Of experts those that a token chooses. The row of the embedding, d elements, is left out, as the paper's plots do.
    """
    layer = projections(sizes) + 3 * sizes.hidden * sizes.mlp
    return sizes.layers * layer + sizes.hidden * sizes.vocab


def cache(sizes: Sizes, length: float) -> float:
    """Elements of all keys and values of a row in the layers of full attention: 2·N·L·d_h·n_kv."""
    return 2 * sizes.attention_layers * length * sizes.head_dim * sizes.kv_heads


def window_cache(sizes: Sizes, length: float) -> float:
    """Elements of keys and values of a row in the layers that see a window."""
    held = length if sizes.window is None else min(length, sizes.window)
    return 2 * sizes.window_layers * held * sizes.head_dim * sizes.kv_heads


def decode(sizes: Sizes, length: float, read: float = 1.0, batch: float = 1) -> Decode:
    """Elements that a step behind `length` tokens reads, of `batch` rows (paper §5).

    Args:
        read: what is read ÷ all keys and values of the layers of full attention, metadata included: what results call
            `bytes_read_fraction`. It may exceed 1.
    """
    return Decode(weights(sizes), batch * read * cache(sizes, length), batch * window_cache(sizes, length))


def vertical_slash_index(
    sizes: Sizes, length: float, window: int, verticals: float, slashes: float, batch: float = 1
) -> float:
    """Operations of selecting verticals and slashes with the last `window` queries (paper, appendix; d_h for its d)."""
    scores = 2 * sizes.head_dim * length * window + 5 * length * window
    ranking = 2 * length * math.log2(length) + length / 64 * (verticals + slashes)
    return batch * sizes.attention_layers * sizes.query_heads * (scores + ranking)


def quest_index(sizes: Sizes, length: float, page_size: int = 16, batch: float = 1) -> float:
    """Elements of page bounds that a step of Quest reads: two for each page and dimension (d_h for the paper's d)."""
    return batch * sizes.attention_layers * sizes.kv_heads * 2 * sizes.head_dim * length / page_size


# -- where two sizes cost the same


@dataclass(frozen=True)
class Equal:
    """Where a larger model with a method costs what a smaller one costs.

    Attributes:
        sparsity: from which on the larger one costs no more; None where no sparsity is enough.
        share: what the larger one would have left for attention ÷ what its dense attention takes; negative where all
            else of it costs more already, above 1 where it costs less even with dense attention.
    """

    sparsity: float | None
    share: float


def equal_cost(
    small: Sizes,
    large: Sizes,
    length: float,
    phase: Literal["prefill", "decode"],
    batch: float = 1,
    pairs: Pairs = "square",
    overhead: float = 0.0,
) -> Equal:
    """The sparsity from which `large` costs no more than `small` with dense attention, at this length and batch.

    Args:
        overhead: what selecting takes: in prefill operations as a share of dense attention's (4·d_h a pair), in
            decoding elements read as a share of all keys and values.
    """
    if phase == "prefill":
        budget = prefill(small, length, batch=batch, pairs=pairs).total
        whole = prefill(large, length, batch=batch, estimator=overhead, pairs=pairs)
        left, attention = budget - whole.fixed - whole.estimator, whole.attention
    else:
        budget = decode(small, length, batch=batch).total
        dense = decode(large, length, batch=batch)
        left, attention = budget - dense.fixed - overhead * dense.cache, dense.cache
    share = left / attention
    # Reading nothing at all is no attention: a share of exactly 0 is never reached.
    return Equal(None if share <= 0 else max(0.0, 1 - share), share)


# -- what a measured run costs

#: Bytes of an element, by the name of its type.
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
#: What a cost can be of.
KINDS = ("prefill", "decode", "memory", "seconds")


@dataclass(frozen=True)
class Cost:
    """What a run costs, and why something of that is not known.

    Attributes:
        prefill: operations for a batch of prompts.
        decode: elements that a step of the batch reads.
        memory: bytes of keys and values, and of what is kept beside them, held of a batch once its prompts are read.
        seconds: wall time as it was recorded, whatever the batch: `prefill` of a prompt, `decode` of a new token,
            `document` of a prompt with its answer (decoding as the whole run had it for each second of prefill).
        unknown: kind (of `KINDS`) -> why it is None, or empty.
    """

    prefill: Prefill | None = None
    decode: Decode | None = None
    memory: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    def total(self, phase: str) -> float | None:
        """Of `prefill` in operations, of `decode` in elements."""
        found = self.prefill if phase == "prefill" else self.decode
        return None if found is None else found.total


class _Unknown(Exception):
    """Why a cost is not known."""


def of(record: Any, batch: float = 1, pairs: Pairs = "square") -> Cost:
    """What the run of a record costs with `batch` rows: from its model's sizes, its prompts and what it was measured.

    Prefill: the share of pairs that was computed, and what prefill and eviction methods spent on selecting, a share of
    dense attention as it is counted here. Decoding: the share of bytes that was read, metadata included; what an
    eviction left sets it where no decode method runs. Batches change nothing but how often weights are read.

    Args:
        record: as `results.schema.Record`: `model`, `model_shape`, `model_dtype`, `phases`, `prompt_tokens`,
            `by_phase`, `speed`, `seconds_by_phase`.
    """
    sizes, lacks = sizes_of(record)
    length = record.prompt_tokens
    unknown: dict[str, str] = {}
    if sizes is None or not length:
        reason = lacks or f"how many tokens the prompts of {record.task} have is not recorded"
        unknown = dict.fromkeys(("prefill", "decode", "memory"), reason)

    found: dict[str, Any] = {}
    for kind, count in (("prefill", _prefill_of), ("decode", _decode_of), ("memory", _memory_of)):
        if kind not in unknown:
            try:
                found[kind] = count(record, sizes, length, batch, pairs)
            except _Unknown as reason:
                unknown[kind] = str(reason)
    seconds = _seconds_of(record)
    if not seconds:
        unknown["seconds"] = "tokens a second are not recorded"
    return Cost(**found, seconds=seconds, unknown=unknown)


def _figure(record: Any, phase: str, name: str) -> float | None:
    """A figure of a phase; None where it was not measured."""
    return getattr(record.by_phase.get(phase), name, None)


def _filled(record: Any, phase: str) -> bool:
    return phase in record.phases.split("+")


def _prefill_of(record: Any, sizes: Sizes, length: float, batch: float, pairs: Pairs) -> Prefill:
    density, estimator = 1.0, 0.0
    if _filled(record, "prefill"):
        executed = _figure(record, "prefill", "executed")
        if executed is None:
            raise _Unknown("what its prefill computed is not recorded")
        density = 1 - executed
    for phase in ("prefill", "eviction"):
        if _filled(record, phase):
            share = _figure(record, phase, "estimator_flops_fraction")
            if share is None:
                raise _Unknown(f"what selecting took in {phase} is not recorded")
            estimator += share
    return prefill(sizes, length, density, batch, estimator, pairs)


def _decode_of(record: Any, sizes: Sizes, length: float, batch: float, pairs: Pairs) -> Decode:
    if sizes.experts and batch > 1:
        raise _Unknown("which experts a batch reads together is not recorded")
    read = 1.0
    if _filled(record, "decode") or _filled(record, "eviction"):
        read = _figure(record, "decode", "bytes_read_fraction")
        if read is None and _filled(record, "decode"):
            raise _Unknown("what its decoding read is not recorded")
        if read is None:  # nothing was decoded; what was kept would have been read
            executed = _figure(record, "eviction", "executed")
            if executed is None:
                raise _Unknown("what its eviction kept is not recorded")
            read = 1 - executed
    return decode(sizes, length, read, batch)


def _memory_of(record: Any, sizes: Sizes, length: float, batch: float, pairs: Pairs) -> float:
    size = _BYTES.get(record.model_dtype or "")
    if size is None:
        raise _Unknown(
            f"bytes of an element of {record.model_dtype or 'its type, which is not recorded,'} are not known"
        )
    held = 1.0
    if record.phases:
        shares = [_figure(record, phase, "kv_memory_fraction") for phase in record.by_phase]
        held = next((share for share in shares if share is not None), None)
        if held is None:
            if _filled(record, "decode") or _filled(record, "eviction"):
                raise _Unknown("what it held of keys and values is not recorded")
            held = 1.0  # a prefill method keeps all
    return batch * size * (held * cache(sizes, length) + window_cache(sizes, length))


def _seconds_of(record: Any) -> dict[str, float]:
    found = {}
    if record.prompt_tokens and record.speed.get("prefill"):
        found["prefill"] = record.prompt_tokens / record.speed["prefill"]
    if record.speed.get("decode"):
        found["decode"] = 1 / record.speed["decode"]
    spent = record.seconds_by_phase
    if "prefill" in found and spent.get("prefill") and "decode" in spent:
        found["document"] = found["prefill"] * (1 + spent["decode"] / spent["prefill"])
    return found
