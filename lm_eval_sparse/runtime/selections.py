"""What a method selects is checked before anything is computed from it, and refused in one line.

Where looking costs nothing, on a CPU, each selection is looked at when it is made. On a GPU kernels look at the lists
that they walk anyway, mend what they could not read safely, and raise flags beside their counts: whoever fetches the
counts refuses the run. With `debug=1` that is waited for at once, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import decode
from ..kernels.backends import choose
from ..kernels.cache import compact
from ..kernels.types import Blocks, Keep, RaggedKV, Reads, Slot, check_shapes
from ..methods.base import Call
from .memory import out_of_memory

#: Why a method that ran was none the less dense, by phase: what it selected leaves nothing out.
COVERS = {
    "prefill": "the layout covers all pairs of the prompt",
    "eviction": "all tokens of the prompt are kept",
    "decode": "the decode budget covers the whole cache",
}
#: Why steps are not captured in CUDA graphs, with `debug=1`.
DEBUGGED = "debug=1 looks at every selection at once"

Words = Callable[[int], str]


def refuse(method: str, layer: int, faults: Iterable[int], words: Words, whose: str = "query head") -> None:
    """Raise `UserError` for the first head with a fault.

    Args:
        faults: bits by head; words: what the lowest of them says; whose: what kind of heads these are.
    """
    for head, bits in enumerate(faults):
        if bits:
            raise UserError(f"method {method}, layer {layer}, {whose} {head}: {words(int(bits))}")


def misfit(method: str, layer: int, error: ValueError | str) -> UserError:
    """What a selection that does not even fit the call is refused with."""
    return UserError(f"method {method}, layer {layer}: {error}")


def chosen(method: Any, call: Call, kind: type, debug: bool) -> Any:
    """What `method` selects, when it is of the right kind and has left its inputs as they were.

    Args:
        debug: let what goes wrong inside the method through as it is.

    Raises:
        UserError: it is not, or has not, or it failed.
    """
    layer = call.layer.index
    # A decode method that appends writes into the cache, as it says.
    inputs = (call.query,) if getattr(method, "appends", False) and call.cache else (call.query, call.key, call.value)
    before = [states._version for states in inputs]
    try:
        found = method.select(call)
    except Exception as error:  # methods are written by anybody
        if debug or isinstance(error, UserError) or out_of_memory(error):
            raise
        line = (str(error).strip().splitlines() or [""])[0]
        raise misfit(
            method.name, layer, f"select failed ({type(error).__name__}: {line}); type debug=True to see where"
        ) from error
    if not isinstance(found, kind):
        raise misfit(method.name, layer, f"select returned {type(found).__name__}; expected {kind.__name__}")
    if [states._version for states in inputs] != before:
        raise misfit(method.name, layer, "select wrote into the queries, keys or values that it was given")
    return found


def tell(method: Any, hook: str, call: Call, *more: Any, debug: bool = False) -> None:
    """Call a hook of a method's state: what goes wrong in it is named, and the cache is not its to write.

    Raises:
        UserError: it failed, or wrote into the keys or values.
    """
    layer = call.layer.index
    before = call.key._version, call.value._version
    try:
        getattr(method, hook)(call, *more)
    except Exception as error:  # methods are written by anybody
        if debug or isinstance(error, UserError) or out_of_memory(error):
            raise
        line = (str(error).strip().splitlines() or [""])[0]
        raise misfit(
            method.name, layer, f"{hook} failed ({type(error).__name__}: {line}); type debug=True to see where"
        ) from error
    if (call.key._version, call.value._version) != before:
        raise misfit(method.name, layer, f"{hook} wrote into the keys or values of the cache")


def check_slots(named: Iterable[tuple[str, Slot]]) -> None:
    """Raise `UserError` for tensors of methods' states, each with its method, that cannot be kept side by side."""
    seen: dict[str, str] = {}
    for method, slot in named:
        if not isinstance(slot, Slot) or slot.per not in ("sequence", "page", "token"):
            raise UserError(
                f"method {method}: {slot!r} cannot be kept; expected a Slot per 'sequence', 'page' or 'token'"
            )
        if slot.name in seen:
            whose = "twice" if seen[slot.name] == method else f"and {seen[slot.name]} does, too"
            raise UserError(f"method {method} keeps a tensor {slot.name!r} {whose}; give it another name")
        seen[slot.name] = method


def check_figures(method: str, layer: int, most: float, **figures: Any) -> None:
    """Raise `UserError` for figures of a selection, numbers or arrays of them, that are none.

    Args:
        most: no `selected` may exceed it; the others are only finite and not negative.
    """
    for name, value in figures.items():
        numbers = np.asarray(value, dtype=float)
        if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
            raise misfit(method, layer, f"{name} is {value}; expected finite numbers of at least 0")
        if name == "selected" and (numbers > most).any():
            raise misfit(method, layer, f"{numbers.max():g} pairs are selected of {most:g}")


class Walked:
    """A layout that has been checked, or on a GPU is being checked: what to execute, and what it counts.

    Attributes:
        layout: what kernels can execute.
        pairs, keys: `(H,)` int64, as `Blocks.pairs_and_keys` gives them.
        faults: `(H,)` int32 flags on the device that are yet to be looked at, or None.
        words: what they say.
    """

    def __init__(self, method: str, layer: int, given: Blocks, query: Tensor, debug: bool):
        try:
            _check_layout(given, query)
        except ValueError as error:
            raise misfit(method, layer, error) from error
        columns = 0 if given.columns is None else given.columns.shape[-1]
        self.words = partial(_layout_words, given.indices.shape[-1], given.blocks_k, columns)
        self.faults: Tensor | None
        if choose("auto", query.device) == "naive":
            self.layout, self.faults = given, given.faults()
            debug = True
        else:
            self.layout, self.pairs, self.keys, self.faults = given.walk()
        if debug:
            refuse(method, layer, self.faults.tolist(), self.words)
            self.faults = None
        if choose("auto", query.device) == "naive":
            self.pairs, self.keys = given.pairs_and_keys()


def _layout_words(width: int, blocks: int, columns: int, bits: int) -> str:
    return f"the layout {Blocks.fault(bits, width, blocks, columns)}"


def _check_layout(given: Blocks, query: Tensor) -> None:
    heads, length, _ = query.shape
    if given.length != length:
        raise ValueError(f"layout is for {given.length} tokens, query has {length}")
    check_shapes(given, heads)
    parts = (given.indices, given.counts, given.columns, given.column_counts)
    places = {part.device for part in parts if part is not None}
    if places != {query.device}:
        raise ValueError(f"layout is on {', '.join(map(str, places))}, query on {query.device}; expected one device")


def check_kept(
    method: str, layer: int, kept: Keep, kv_heads: int, length: int, value_dim: int, debug: bool
) -> tuple[Keep, Tensor | None, Words]:
    """What can be kept, `(H_kv,)` int32 flags that are yet to be looked at, and what they say."""
    try:
        kept.check_shapes(kv_heads, length, value_dim)
    except ValueError as error:
        raise misfit(method, layer, error) from error
    words = partial(_kept_words, kept.ids.shape[1], kept.total, length)
    ids, counts, faults = compact.check_kept(kept.ids, kept.counts, kept.total, length)
    if debug or choose("auto", counts.device) == "naive":
        refuse(method, layer, faults.tolist(), words, "KV head")
        return kept, None, words
    return replace(kept, ids=ids, counts=counts), faults, words


def _kept_words(width: int, total: int, length: int, bits: int) -> str:
    return f"it {Keep.words(bits, width, total, length)}"


#: What may be wrong with places in what a head holds, in the order of the faults of a `Keep`.
HELD_FAULTS = (
    "keeps fewer than one token, or more than it lists",
    "keeps numbers of tokens that do not add up to its total of {total} tokens",
    "lists places that are negative or not below the {length} tokens that the head holds",
    "lists places that are not strictly ascending (one twice, or unsorted)",
)


def check_held(method: str, layer: int, kept: Keep, lengths: Tensor) -> None:
    """Check what is to stay of sequences that hold `lengths (H_kv,)` tokens. Waits for the device: it must not be read
    from elsewhere, and the next step relies on what is left."""
    lengths = lengths.long()
    longest = int(lengths.max())
    for name in ("values", "positions"):
        if getattr(kept, name) is not None:
            raise misfit(method, layer, f"{name} of a Keep are not taken in the course of an answer, with every")
    try:
        kept.check_shapes(len(lengths), longest)
    except ValueError as error:
        raise misfit(method, layer, error) from error
    place = torch.arange(kept.ids.shape[1], device=kept.ids.device)
    valid = place < kept.counts[:, None]
    uncountable = (kept.counts < 1) | (kept.counts > len(place))
    found = (
        uncountable,
        ~uncountable.any() & (kept.counts.sum() != kept.total),
        (((kept.ids < 0) | (kept.ids >= lengths[:, None])) & valid).any(1),
        ((kept.ids[:, 1:] <= kept.ids[:, :-1]) & valid[:, 1:]).any(1),
    )
    bits = torch.stack([wrong.int().expand(len(lengths)) << bit for bit, wrong in enumerate(found)]).sum(0)
    for head, (own, length) in enumerate(zip(bits.tolist(), lengths.tolist(), strict=True)):
        words = partial(_held_words, kept.total, length)
        refuse(method, layer, [0] * head + [own], words, "KV head")


def _held_words(total: int, length: int, bits: int) -> str:
    lowest = (bits & -bits).bit_length() - 1
    return f"it {HELD_FAULTS[lowest].format(total=total, length=length)}"


def check_reads(
    method: Any, layer: int, selection: Reads, query: Tensor, kv: RaggedKV, backend: str, debug: bool
) -> None:
    """Check lists of pages at once, or leave it to attention, which then gives minus their faults for keys read."""
    if selection.unit != method.read_unit:
        own = f"pages of {selection.unit!r} keys are selected, but the method's read_unit is {method.read_unit!r}"
        raise misfit(method.name, layer, own)
    try:
        selection.check_shapes(query)
    except ValueError as error:
        raise misfit(method.name, layer, error) from error
    ready = selection.ready
    if ready is not None and (kv.tickets is None or ready.data_ptr() != kv.tickets[1].data_ptr()):
        # Attention would wait for ever for lists that nobody completes.
        raise misfit(method.name, layer, "ready is given, but not that of kernels.index.pages; expected None")
    if debug or not query.is_cuda or decode.choose_backend(query, kv, backend) != "triton":
        refuse_reads(method, layer, -selection.faults(kv), selection.ids.shape[-1], kv.heads)
        extra, bias = selection.extra, selection.bias
        if bias is not None:  # what stands behind a list is nobody's
            listed = torch.arange(bias.shape[-1], device=bias.device) < selection.counts[..., None]
            bias = torch.where(listed & (kv.lengths > 0)[:, None, None, None], bias, 0.0)
        for name, part in (("bias", bias), ("extra.bias", None if extra is None else extra.bias)):
            if part is not None and bool(part.isnan().any()):
                raise misfit(method.name, layer, f"{name} holds numbers that are none; expected finite ones, or -inf")


def refuse_reads(method: Any, layer: int, reads: np.ndarray, width: int, kv_heads: int) -> None:
    """Raise `UserError` where keys read `(S, Gs, …)` are minus the faults of a list; S are heads of rows."""
    if not (reads < 0).any():
        return
    sequence, own = (int(place) for place in np.argwhere(reads < 0)[0][:2])
    bits = -int(reads[sequence, own][reads[sequence, own] < 0].flat[0])
    head, lists = sequence % kv_heads, reads.shape[1]
    whose = f"KV head {head}" if lists == 1 else f"query head {head * lists + own}"
    raise UserError(f"method {method.name}, layer {layer}, {whose}: the {Reads.words(bits, width)}")
