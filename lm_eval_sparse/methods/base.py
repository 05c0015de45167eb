"""What every method is: knobs, a place in the taxonomy, and a `select` that returns a selection.

A method knows scores and blocks. It never computes attention output, and it knows nothing of models, caches,
lm-eval or which kernel will run. There are two levels: `scored` turns a score into a selection in any phase; here is
the free one, on which a method returns the selection itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.types import Blocks, Keep, RaggedKV, Reads, Slot, State

#: From this prompt length on a requested sparsity is a promise: out of reach it is an error, not dense attention.
PROMISED_LENGTH = 4096
#: What is always kept may take this share of a requested sparsity's budget before its defaults shrink.
FORCED_SHARE = 0.25
#: Keys of a page that all kernels take; a page of one is a token.
UNITS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: The smallest step of a budget may change the mean density by this much: twice the promised tolerance.
MAX_STEP = 0.02
#: Phases in the order in which they come.
PHASES = ("prefill", "eviction", "decode")


# --- budgets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Density:
    """A share in (0, 1] on average over the heads of a layer: of the causal pairs that a prefill executes, of the
    prompt's tokens that stay after an eviction, of the row's tokens whose keys a step of decoding reads."""

    share: float


@dataclass(frozen=True)
class Count:
    """So many units of each head: key blocks of a query block, tokens that stay, keys that a step reads."""

    number: int


@dataclass(frozen=True)
class Mass:
    """The fewest units of each head that hold this share of its estimated attention (top-p)."""

    share: float


Budget = Density | Count | Mass


# --- what a method is told --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """What a method may know of the attention layer it serves.

    Attributes:
        index: of the layer in the model; count: layers of the model.
        heads, kv_heads: query heads and KV heads.
        head_dim: dimensions of a key.
        rope: from positions `(T,)` int64 to cosines and sines `(T, D_rot)` of the model's rotary embedding, or None
            where it has none that can be found.
        weight: gives the output projection `(hidden, H * D_v)`, or is None where it cannot be found.
        among: indices of the layers in which the phase may be sparse, in their order; None for all of them.
        calibration: tensors that a calibration of the method has left for this layer.
    """

    index: int = 0
    count: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1
    rope: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    weight: Callable[[], Tensor] | None = None
    among: tuple[int, ...] | None = None
    calibration: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def place(self) -> tuple[int, int]:
        """Which of the layers that may be sparse this is, from 0 on, and how many those are."""
        return (self.index, self.count) if self.among is None else (self.among.index(self.index), len(self.among))

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of these positions; raises `UserError` where the model shows no rotary embedding."""
        if self.rope is None:
            raise UserError("needs the model's rotary embedding, and this model shows none: use another method")
        return self.rope(positions)

    def output_weight(self) -> Tensor:
        """`(hidden, H * D_v)`; raises `UserError` where the model does not show its output projection."""
        if self.weight is None:
            raise UserError("needs the output projection of each layer, and this model shows none: use another method")
        return self.weight()


@dataclass(frozen=True)
class CacheView:
    """What a method may know of the cache: when T new tokens of each sequence are to be attended, or, for an eviction
    method, of one row between two tokens of its answer.

    A sequence is what one KV head of one row holds. All numbers of sequences stand on their device, where a captured
    step reads what is true when it is replayed.

    Attributes:
        kv: keys and values of the S sequences, the new tokens included; `kv.visible(T)` gives the keys of each
            sequence that each new token may see.
        tokens: `(R,)` int64, the tokens of each row so far, evicted ones included: what a dense step would read for
            the newest of the T tokens.
        kv_heads: sequences of one row, which follow each other; S is R times as many.
        new: keys `(S, T, D)` and values `(S, T, D_v)` of the new tokens where a method says that it `appends` them and
            they are not in the cache yet, else None.
        overlap: whether attention directly follows the choice on the stream, so that `index.pages.choose_pages` may let
            them run into each other; only for a method that `appends`. Nothing need come of it.
    """

    kv: RaggedKV
    tokens: Tensor
    kv_heads: int = 1
    new: tuple[Tensor, Tensor] | None = None
    overlap: bool = False

    def padded(self, entries: Tensor, width: int | None = None) -> Tensor:
        """`(S, width, …)`: what each sequence has in a flat storage (keys, values, a slot per token); `longest` wide.

        What lies behind a sequence's length is undefined.
        """
        place = torch.arange(self.kv.longest if width is None else width, device=entries.device)
        return entries[(self.kv.starts[:, None] + place).clamp(max=len(entries) - 1)]

    def working(self) -> Tensor:
        """`(S,)` int64: each sequence itself, and for an idle one, of length 0, the first that is not.

        Who writes a state does for every sequence what this one needs: to write the same twice is safe, and no place
        is named that nobody owns.
        """
        held = self.kv.lengths > 0
        return torch.where(held, torch.arange(len(held), device=held.device), held.int().argmax())

    def entries(self, before: Tensor, tokens: int) -> Tensor:
        """`(S, tokens)` int64: where the next `tokens` tokens of each `working` sequence lie in a flat storage.

        Args:
            before: `(S,)` tokens that it had. What would lie behind its length is its last token once more.
        """
        own = self.working()
        place = before[own, None] + torch.arange(tokens, device=before.device)
        return self.kv.starts[own, None] + place.minimum(self.kv.lengths[own, None] - 1)

    def logical(self, steps: int) -> Tensor:
        """`(S, T)` int64: keys that a dense step would read for each new token."""
        behind = torch.arange(1 - steps, 1, device=self.tokens.device)
        return self.tokens.repeat_interleave(self.kv_heads, output_size=len(self.kv.starts))[:, None] + behind


@dataclass(frozen=True)
class Call:
    """The one argument of every `score` and `select`. Fields may be added.

    Attributes:
        query: `(H, L, D)` of one unpadded prompt, after rotary embedding; while decoding `(S, G, T, D)`, the query
            heads of each KV head of each row. Where an eviction method is asked again in the course of an answer, T is
            1: the query of the newest token.
        key, value: `(H_kv, L, D)` and `(H_kv, L, D_v)` of the prompt; behind it those are in `cache`, and these are its
            flat storages.
        scale, softcap: as the attention itself uses them.
        phase: `prefill`, `eviction` or `decode`.
        budget: what may be selected.
        layer: the layer.
        cache: what is cached; None until the prompt is complete.
        state: what methods keep of this layer, where they declare any; None until the prompt is complete.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    softcap: float | None
    phase: str
    budget: Budget
    layer: Layer
    cache: CacheView | None = None
    state: State | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.query.shape[-2]

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores of queries `(…, n, D)` and keys `(…, m, D)` as attention has them: `(…, n, m)` fp32."""
        scores = query.float() @ key.float().transpose(-1, -2) * self.scale
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


# --- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """Base of all methods: subclasses are frozen dataclasses whose fields are the native knobs.

    Class attributes:
        name, phase: what is typed, and the phase that it fills.
        unit, importance, allocation, kv: the place in the taxonomy of The Sparse Frontier (section 2).
        reference: the paper. The documentation is generated from these.
        budget_knobs: the knobs that a requested sparsity decides, and which therefore cannot be given beside one.
        native: the kind of budget that the first of them is: `Count` or `Mass`.
        tiny: knobs that make the method sparse at 200 tokens; every matrix of the tests runs on them.
        whole: knobs under which nothing of 4096 tokens is left out, where very large `budget_knobs` do not say it.
        paper: what `preset=paper` knows of the method (`presets.Parameters`), or None.
        looks_back: queries of the prompt that `prefilled` gets.
        wants_mass: whether `attended` is called. With such a decode method the tokens of an answer are scored one by
            one, as they are generated: what each reads follows from what those before it read.
    """

    name: ClassVar[str]
    phase: ClassVar[str]
    unit: ClassVar[str]
    importance: ClassVar[str]
    allocation: ClassVar[Any]
    kv: ClassVar[str]
    reference: ClassVar[str]
    budget_knobs: ClassVar[tuple[str, ...]] = ()
    native: ClassVar[type] = Count
    tiny: ClassVar[Mapping[str, Any]] = {}
    whole: ClassVar[Mapping[str, Any]] = {}
    paper: ClassVar[Any] = None
    looks_back: ClassVar[int] = 0
    wants_mass: ClassVar[bool] = False

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

    def knobs_for(self, sparsity: float, length: int, layer: Layer | None = None) -> Method:
        """The method with those defaults that shrink to leave room for `sparsity` at this prompt length (tokens)."""
        return self

    def as_native(self) -> Method:
        """The method with the paper's values where defaults may shrink and no sparsity asks for it."""
        return self

    def native_budget(self) -> Budget:
        """What the native knobs allow."""
        return self.native(getattr(self, self.budget_knobs[0]) if self.budget_knobs else 0)

    def resolved(self, sparsity: float | None, length: int, layer: Layer) -> tuple[Method, Budget]:
        """The method and its budget for a prompt of `length` tokens in this layer.

        Args:
            sparsity: what to skip in [0, 1), or None when the native knobs rule.
        """
        if sparsity is None:
            return self.as_native(), self.native_budget()
        return self.knobs_for(sparsity, length, layer), Density(1 - sparsity)

    # --- state: what a method keeps of a layer between the steps of decoding ---------------------------------------

    def slots(self) -> tuple[Slot, ...]:
        """The tensors that the method keeps of each layer."""
        return ()

    def prefilled(self, call: Call) -> None:
        """The prompt is in the cache: fill the state for all tokens that `call.cache` holds.

        Args:
            call: as for `select`; its `query (S, G, T, D)` holds the last queries of the prompt, as many as the method
                `looks_back` at, at most.
        """

    def appended(self, call: Call, before: Tensor) -> None:
        """New tokens are in the cache: take keys from `before (S,)` int32 up to the lengths into the state."""

    def attended(self, call: Call, reads: Reads | None, mass: Tensor) -> None:
        """What a step's tokens gave to each key that they read, where the method `wants_mass`.

        Args:
            reads: what the decode method returned; None where the step read everything.
            mass: `(S, G, T, W * unit)` fp32, the weights of the keys of `reads.ids`; 0 behind the lists. Without
                `reads` it is `(S, G, T, longest)`, a place for each key that is held.
        """

    def select(self, call: Call) -> Any:
        """Choose; returns `Blocks`, `Keep` or `Reads` by phase. A GPU is not waited for."""
        raise NotImplementedError


class PrefillMethod(Method):
    """A method for the prefill phase. `select` returns `Blocks`."""

    phase: ClassVar[str] = "prefill"

    def select(self, call: Call) -> Blocks:
        raise NotImplementedError


class EvictionMethod(Method):
    """A method that drops part of the keys and values: once, after prefill, or again periodically.

    `select` returns `Keep`. With `every` set, it is asked again whenever so many more tokens of the answer are in the
    cache and another one is about to be read, for one row at a time. `call.cache` then has what each KV head holds and
    the tokens so far, `call.state` what the method keeps, `call.query (H_kv, G, 1, D)` is that of the newest token, and
    `call.budget` holds for all tokens so far: a `Density` is a share of them, a `Count` so many of each head. The ids
    of the `Keep` are places in what each head holds: ascending, and below that head's length.

    The hooks of the state are for such methods too. They are asked of the method as it was typed, before a budget has
    resolved its knobs. What is kept per token moves with the tokens that stay; `prefilled` is asked once.
    """

    phase: ClassVar[str] = "eviction"
    #: Tokens of the answer between two evictions, or None: the prompt is evicted once. A method may make it a knob.
    every: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every is not None:
            number("every", self.every, 1, math.inf, whole=True, example=128)

    def keeps(self, sparsity: float | None, length: int) -> int:
        """Tokens of a prompt of `length` tokens that a KV head keeps on average, at most."""
        return length if sparsity is None else min(length, math.ceil((1 - sparsity) * length))

    def select(self, call: Call) -> Keep:
        raise NotImplementedError


class DecodeMethod(Method):
    """A method that chooses what each new token reads of a cache that keeps everything. `select` returns `Reads`."""

    phase: ClassVar[str] = "decode"
    #: Whether `select` writes the new tokens into the cache and takes them into the state, where it gets them.
    appends: ClassVar[bool] = False
    #: Whether it knows sequences that share their beginnings (`RaggedKV.tails`), in keys and state: all it does with
    #: them it leaves to kernels that do. Without it each of several answers to a prompt gets a copy of the prompt. With
    #: it `appended` may be told of several tokens and be given the newest one's query alone.
    shares: ClassVar[bool] = False
    #: Whether what it reads is weighed, or has virtual keys beside it: a wrapper cannot choose among that.
    weighs: ClassVar[bool] = False
    #: Keys of a page, one of `UNITS`: the unit of what the state keeps of a page, and of what is read.
    page_size: int

    @property
    def read_unit(self) -> int:
        """Keys of what `select` lists, one of `UNITS`: a page, unless a method reads single tokens of its pages."""
        return self.page_size

    def cost(self, visible: Tensor, read: Tensor, group: int, dim: int, element: int) -> tuple[Tensor, Tensor]:
        """What selecting took, once it is known what was read.

        Args:
            visible: int64 of any shape, keys that a new token might see; read: of the same shape, those it read.
            group: query heads of the KV head; dim: their dimension; element: bytes of a number in the cache.

        Returns:
            Operations for all query heads of the group, and bytes of metadata read once for the group, int64.
        """
        return torch.zeros_like(visible), torch.zeros_like(visible)

    def select(self, call: Call) -> Reads:
        raise NotImplementedError


def check_page_size(method: Method) -> None:
    """Raise `UserError` unless a decode method has pages of a size that all kernels take."""
    size = getattr(method, "page_size", None)
    if isinstance(size, bool) or not isinstance(size, int) or size not in UNITS:
        given = f"page_size={size!r}" if hasattr(method, "page_size") else "no page_size"
        raise UserError(
            f"method {method.name} has {given}, which no kernel takes: give it one of "
            f"{', '.join(map(str, UNITS))} keys, for example page_size=16"
        )


# --- helpers of knobs -------------------------------------------------------------------------------------------------


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


def yes_or_no(name: str, value: Any) -> None:
    """Raise `UserError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={value!r} is not accepted: give True or False")


def top(scores: Tensor, count: int | Tensor) -> Tensor:
    """Boolean mask `(…, L)` of the `count` largest scores along the last dimension; ties go to the later entries."""
    order = scores.shape[-1] - 1 - scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(scores.shape[-1], device=scores.device)
    rank = torch.empty_like(order).scatter_(-1, order, place.expand_as(order))
    return rank < (count[..., None] if isinstance(count, Tensor) else count)
