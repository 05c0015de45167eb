"""What every method is: knobs, a place in the taxonomy, and a `select` that returns a selection.

A method knows scores and blocks. It never computes attention output, and it knows nothing of models, caches,
lm-eval or which kernel will run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.cache.compact import check_kept, fault
from ..kernels.decode import PageSelection
from ..kernels.estimate import PageBounds
from ..kernels.layout import BlockLayout
from ..kernels.ragged import RaggedKV

#: From this prompt length on a requested sparsity is a promise: out of reach it is an error, not dense attention.
PROMISED_LENGTH = 4096
#: What is always kept may take this share of a requested sparsity's budget before its defaults shrink.
FORCED_SHARE = 0.25
#: Keys of a page that all kernels take: single keys have no bounds, and a page is held by one program.
PAGE_SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
#: The smallest step of a budget may change the mean density by this much: twice the promised tolerance.
MAX_STEP = 0.02


@dataclass(frozen=True)
class Geometry:
    """What a method may know of the attention layers it serves: query heads, KV heads, head dimension."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Selection:
    """What a prefill method selects for one layer and one unpadded row.

    Attributes:
        layout: key blocks, and maybe single key columns, per (query head, query block).
        estimator_flops: floating-point operations spent on selecting (multiply and add count as two).
        estimator_bytes: bytes of queries, keys and values read to select.
        knobs: the knobs as solved for this call, numbers, for the results. What was solved on a GPU is a tensor of
            one number there, as may be the two above: selecting does not wait for the device.
        count_selected: gives the `(H,)` int64 pairs of the method's own pattern inside the causal triangle; None
            where the method selects whole tiles, so that they are the executed ones.
    """

    layout: BlockLayout
    estimator_flops: int | Tensor
    estimator_bytes: int | Tensor
    knobs: dict[str, Any] = field(default_factory=dict)
    count_selected: Callable[[], Tensor] | None = None

    @property
    def selected_pairs(self) -> Tensor:
        """`(H,)` int64, counted anew at each reading."""
        return self.layout.executed_pairs() if self.count_selected is None else self.count_selected()


@dataclass(frozen=True)
class EvictionSelection:
    """What an eviction method keeps of one layer's cache of one unpadded row.

    Attributes:
        indices: `(H_kv, W)` int64, token ids; the first `counts` of a head are kept, ascending, the rest is undefined.
        counts: `(H_kv,)` int64 on the same device, tokens that each KV head keeps, at least 1.
        total: their sum, known on the host: it sizes the cache without waiting for the device.
        estimator_flops, estimator_bytes, knobs: as in `Selection`.
    """

    indices: Tensor
    counts: Tensor
    total: int
    estimator_flops: int
    estimator_bytes: int
    knobs: dict[str, Any] = field(default_factory=dict)

    def check(self, kv_heads: int, length: int) -> None:
        """Raise ValueError unless every head keeps at least one token, each once, ascending, and in range.

        Waits for lists that are on a GPU.
        """
        self.check_shapes(kv_heads, length)
        for bits in check_kept(self.indices, self.counts, self.total, length, backend="naive")[2].tolist():
            if bits:
                raise ValueError(fault(bits, self.indices.shape[1], self.total, length))

    def check_shapes(self, kv_heads: int, length: int) -> None:
        """The part of `check` that looks at shapes, dtypes and the total only."""
        shape = tuple(self.indices.shape)
        if len(shape) != 2 or shape[0] != kv_heads or tuple(self.counts.shape) != (kv_heads,):
            raise ValueError(
                f"indices {shape} and counts {tuple(self.counts.shape)} given, expected ({kv_heads}, W) and "
                f"({kv_heads},)"
            )
        if self.indices.dtype != torch.int64 or self.counts.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"indices are {self.indices.dtype}, counts {self.counts.dtype}; expected torch.int64")
        if not isinstance(self.total, int) or isinstance(self.total, bool):
            raise ValueError(f"total is a {type(self.total).__name__}; expected an int, which the host knows")
        if not kv_heads <= self.total <= kv_heads * min(length, shape[1]):
            raise ValueError(f"total is {self.total}, expected {kv_heads} to {kv_heads * min(length, shape[1])} tokens")


@dataclass(frozen=True)
class DecodeContext:
    """What a decode method may know of the cache when T new tokens of each sequence are to be attended.

    A sequence is what one KV head of one row holds. All numbers of sequences stand on their device, where a captured
    step reads what is true when it is replayed.

    Attributes:
        kv: keys and values of the S sequences, the new tokens included; `kv.visible(T)` gives the keys of each
            sequence that each new token may see.
        tokens: `(R,)` int64, the tokens of each row so far, evicted ones included: what a dense step would read for
            the newest of the T tokens.
        bounds: page bounds over `kv`, when the method's `page_size` asks for them.
        kv_heads: sequences of one row, which follow each other; S is R times as many.
        new: keys `(S, T, D)` and values `(S, T, D_v)` of the new tokens where a method says that it `appends` them and
            they are not in the cache yet, else None.
        overlap: whether attention directly follows the choice on the stream, so that `page_select.choose_pages` may let
            them run into each other. Nothing need come of it.
    """

    kv: RaggedKV
    tokens: Tensor
    bounds: PageBounds | None
    kv_heads: int = 1
    new: tuple[Tensor, Tensor] | None = None
    overlap: bool = False

    def logical(self, steps: int) -> Tensor:
        """`(S, T)` int64: keys that a dense step would read for each new token."""
        behind = torch.arange(1 - steps, 1, device=self.tokens.device)
        return self.tokens.repeat_interleave(self.kv_heads, output_size=len(self.kv.starts))[:, None] + behind


@dataclass(frozen=True)
class Method:
    """Base of all methods: subclasses are frozen dataclasses whose fields are the native knobs.

    Class attributes give the name, the phase, the place in the taxonomy of "The Sparse Frontier" (section 2)
    and the paper; the documentation is generated from them. `budget_knobs` names the knobs that a requested
    sparsity decides, and which therefore cannot be given beside one.
    """

    name: ClassVar[str]
    phase: ClassVar[str]
    unit: ClassVar[str]
    importance: ClassVar[str]
    allocation: ClassVar[str]
    kv: ClassVar[str]
    paper: ClassVar[str]
    budget_knobs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Take whole numbers that arrive as floats, such as `1e3`, for what they are. Subclasses check after this."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and value.is_integer() and not isinstance(f.default, float):
                object.__setattr__(self, f.name, int(value))

    @classmethod
    def knobs(cls) -> dict[str, Any]:
        """Native knobs and their defaults."""
        return {f.name: f.default for f in fields(cls) if f.init}

    def check_native(self) -> None:
        """Raise `UserError` when knobs that are each in range do not go together. Not asked when a sparsity decides."""

    def too_short(self, sparsity: float | None, length: int) -> str | None:
        """Why a prompt of `length` tokens cannot be sparse under these knobs, or None when it can."""
        return None

    def largest_sparsity(self, length: int) -> float:
        """The largest sparsity that the forced parts leave reachable at this length."""
        return 1.0


class PrefillMethod(Method):
    """A method for the prefill phase."""

    phase: ClassVar[str] = "prefill"

    def knobs_for(self, sparsity: float, length: int, geometry: Geometry) -> PrefillMethod:
        """The method with the knobs that a closed form gives for `sparsity` at this prompt length (tokens)."""
        raise NotImplementedError

    def select(
        self, query: Tensor, key: Tensor, *, scale: float, softcap: float | None, sparsity: float | None
    ) -> Selection:
        """Choose keys for one layer and one row.

        Args:
            query: `(H, L, D)` after rotary embedding.
            key: `(H_kv, L, D)`.
            scale, softcap: as the attention itself uses them.
            sparsity: executed sparsity to meet on average over the heads, or None to follow the native knobs.
        """
        raise NotImplementedError


class EvictionMethod(Method):
    """A method that drops part of the prompt's keys and values, once, after prefill."""

    phase: ClassVar[str] = "eviction"

    def knobs_for(self, sparsity: float, length: int, geometry: Geometry) -> EvictionMethod:
        """The method with the knobs that `sparsity` gives at this prompt length (tokens)."""
        raise NotImplementedError

    def keeps(self, sparsity: float | None, length: int) -> int:
        """Tokens of a prompt of `length` tokens that a KV head keeps on average, at most."""
        return length if sparsity is None else min(length, math.ceil((1 - sparsity) * length))

    def select(
        self, query: Tensor, key: Tensor, *, scale: float, softcap: float | None, sparsity: float | None
    ) -> EvictionSelection:
        """Choose the tokens to keep for one layer and one row; arguments as in `PrefillMethod.select`.

        `sparsity` is the share of the prompt's keys and values to drop, on average over the KV heads.
        """
        raise NotImplementedError


class DecodeMethod(Method):
    """A method that chooses what each new token reads of a cache that keeps everything."""

    phase: ClassVar[str] = "decode"
    #: Whether `select` writes the new tokens into the cache where it gets them, in one launch with its own work.
    appends: ClassVar[bool] = False
    #: The cache keeps the bounds of pages of this size, one of `PAGE_SIZES`; a field of most methods.
    page_size: int

    def select(self, query: Tensor, context: DecodeContext, *, sparsity: float | None) -> PageSelection:
        """Choose pages for each new token, without waiting for the device.

        Args:
            query: `(S, G, T, D)`, the query heads of each KV head.
            context: the cache.
            sparsity: share of the logical keys not to read, or None to follow the native knobs.
        """
        raise NotImplementedError

    def cost(self, visible: Tensor, read: Tensor, group: int, dim: int, element: int) -> tuple[Tensor, Tensor]:
        """What selecting took, once it is known what was read.

        Args:
            visible: int64 of any shape, keys that a new token might see; read: of the same shape, those it read.
            group: query heads of the KV head; dim: their dimension; element: bytes of a number in the cache.

        Returns:
            Operations for all query heads of the group, and bytes of metadata read once for the group, int64.
        """
        return torch.zeros_like(visible), torch.zeros_like(visible)


def check_page_size(method: Method) -> None:
    """Raise `UserError` unless a decode method has pages of a size that all kernels take."""
    size = getattr(method, "page_size", None)
    if isinstance(size, bool) or not isinstance(size, int) or size not in PAGE_SIZES:
        given = f"page_size={size!r}" if hasattr(method, "page_size") else "no page_size"
        raise UserError(
            f"method {method.name} has {given}, which no kernel takes: give it one of "
            f"{', '.join(map(str, PAGE_SIZES))} keys, for example page_size=16"
        )


def number(name: str, value: Any, low: float, high: float, *, whole: bool = False, example: Any) -> None:
    """Raise `UserError` unless `value` is a number (a whole one if asked) in [low, high]."""
    # An integer that no float can hold is none that anyone means.
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    if fits and whole:
        fits = float(value).is_integer()
    if not fits or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        start = "above 0 and up to" if 0 < low < 1e-6 else f"from {low} to"
        bound = f"{start} {high}" if high != float("inf") else f"of at least {low}"
        raise UserError(f"{name}={value!r} is not accepted: give {kind} {bound}, for example {name}={example}")


def one_of(name: str, value: Any, accepted: tuple[Any, ...], *, auto: bool = False) -> None:
    """Raise `UserError` unless `value` is one of the accepted ones (`auto` included if asked)."""
    if (auto and value == "auto") or (not isinstance(value, bool) and any(value == known for known in accepted)):
        return
    words = ", ".join(map(str, accepted)) + (", or auto" if auto else "")
    raise UserError(f"{name}={value!r} is not accepted: give one of {words}")


def top(scores: Tensor, count: int | Tensor) -> Tensor:
    """Boolean mask `(…, L)` of the `count` largest scores along the last dimension; ties go to the later entries."""
    order = scores.shape[-1] - 1 - scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(scores.shape[-1], device=scores.device)
    rank = torch.empty_like(order).scatter_(-1, order, place.expand_as(order))
    return rank < (count[..., None] if isinstance(count, Tensor) else count)
