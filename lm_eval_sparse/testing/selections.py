"""Checks of what a method selects of tensors: one layer, no model. What is selected is counted entry by entry.

A check returns what it found, for whoever reads it, and raises `Failed` with what is wrong.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..methods.registry import check_class
from ..methods.wrappers import Wrapper
from ..runtime.memory import SELECTING
from .memory import Held
from .subject import Subject
from .tensors import DTYPES, HEADS, LENGTHS, STEPS, ask, decode, keys_of, same, shown, state_of, states, weights

#: Tokens at which a sparsity is a promise, no multiple of any block; the sparsities, and how near they are met.
PROMISED, SPARSITIES, NEAR = 4097, (0.5, 0.9), 0.01
#: From this length on `tiny` knobs have to make a method sparse, by at least this share.
SPARSE_FROM, SPARSE_BY = 200, 0.1
#: Layers over which a budget that differs between layers is averaged.
LAYERS = 3
#: Share of what is selected in 16 bits that has to be selected from the same numbers in 32 bits.
ALIKE = 0.9
#: Bytes that may outlive a call.
LEFT = 4096


class Failed(AssertionError):
    """What a method does not hold of what every method promises."""


def expect(holds: Any, words: str) -> None:
    """Raise `Failed` unless this holds. Not an `assert`, which Python may be told to leave out."""
    if not holds:
        raise Failed(words)


# --- what it says of itself -------------------------------------------------------------------------------------------


def taxonomy(subject: Subject) -> str:
    """Each class has its name, its place in the taxonomy, knobs that make it sparse, and budgets among its knobs."""
    for cls in subject.chain.classes:
        try:
            check_class(cls)
        except ValueError as error:
            raise Failed(str(error)) from None
        for name in ("unit", "importance", "allocation", "kv", "reference"):
            text = str(getattr(cls, name))
            expect(text.strip() == text != "" and "|" not in text, f"{name} is {text!r}; give words, without |")
        knobs = set(cls.knobs())
        strange = sorted(set(cls.tiny) - knobs)
        expect(not strange, f"`tiny` has {', '.join(strange)}, which is none of its knobs")
        if not issubclass(cls, Wrapper):
            expect(cls.tiny, "`tiny` is empty: give the knobs that make it sparse at 200 tokens")
            expect(cls.budget_knobs, "`budget_knobs` is empty: name the knob that a sparsity decides")
        if cls.paper is not None:
            strange = sorted({*cls.paper.names, *cls.paper.fixed} - knobs)
            expect(not strange, f"`paper` has {', '.join(strange)}, which is none of its knobs")
            for length, row in cls.paper.rows.items():
                wanted = len(cls.paper.budgets)
                expect(len(row) == wanted, f"`paper` has {len(row)} cells at {length} tokens; expected {wanted}")
    cls = subject.outer
    return f"{cls.unit}, by {cls.importance}; budget {cls.allocation}; {cls.kv}"


# --- what it selects --------------------------------------------------------------------------------------------------


def sense(subject: Subject, heads: tuple[int, int], length: int, dtype: torch.dtype) -> float:
    """The share that is left out of one prompt: valid, counted as it is, and something from `SPARSE_FROM` tokens on."""
    at = f"{heads[0]} query and {heads[1]} KV heads, {length} tokens, {str(dtype).removeprefix('torch.')}"
    phase, kv_heads = subject.phase, heads[1]
    query, key, value = states(*heads, length, dtype)
    method, selection = ask(subject, query, key, value)
    why = method.too_short(None, length)
    expect(why is None or length < SPARSE_FROM, f"{at}: its `tiny` knobs do not make it sparse: {why}")
    try:
        if phase == "prefill":
            selection.check(heads[0])
        elif phase == "eviction":
            selection.check(kv_heads, length)
    except ValueError as error:
        raise Failed(f"{at}: {error}") from error
    seen = shown(selection, phase, kv_heads, length)
    if phase == "prefill":
        pairs, whole = seen.sum((1, 2)).tolist(), length * (length + 1) // 2
        executed = selection.executed_pairs()
        expect(executed.tolist() == pairs, f"{at}: counts {executed.tolist()} pairs where {pairs} are listed")
        expect((selection.selected_pairs() <= executed).all(), f"{at}: more pairs are selected than executed")
        left = 1 - sum(pairs) / (whole * heads[0])
    elif phase == "eviction":
        kept = int(seen.sum())
        expect(selection.total == kept, f"{at}: total is {selection.total}, and {kept} tokens are listed")
        left = 1 - kept / seen.numel()
    else:
        read, listed = selection.keys_read(keys_of(key, length)), seen.sum(-1)
        expect(read.tolist() == listed.tolist(), f"{at}: counts {read.tolist()} keys where {listed.tolist()} are read")
        expect(seen[..., range(STEPS), range(length - STEPS, length)].all(), f"{at}: a token does not read itself")
        left = 1 - float((listed / torch.arange(length - STEPS + 1, length + 1)).mean())
    if phase != "decode":
        cost = selection.cost
        expect(float(cost.flops) >= 0 <= float(cost.bytes), f"{at}: its cost is {cost}; expected none below 0")
    expect(left > SPARSE_BY or length < SPARSE_FROM, f"{at}: leaves out {left:.3f} under its `tiny` knobs")
    return left


def odd_lengths(subject: Subject) -> str:
    """Prompts that are no multiple of any block: what is selected is valid, and counted as it is."""
    left = [sense(subject, HEADS[1], length, torch.float32) for length in LENGTHS]
    said = ", ".join(f"{share:.2f} of {length}" for share, length in zip(left, LENGTHS, strict=True))
    return f"leaves out {said} tokens"


def gqa(subject: Subject) -> str:
    """Every grouping of query heads is served, and what a group selects does not hang on the group's place."""
    for heads in HEADS:
        for length in LENGTHS:
            sense(subject, heads, length, torch.float32)
    (heads, kv_heads), length = HEADS[1], 203
    query, key, value = states(heads, kv_heads, length)
    turned = [part.unflatten(0, (kv_heads, -1)).flip(0).flatten(0, 1) for part in (query, key, value)]
    first, second = (
        shown(ask(subject, *parts)[1], subject.phase, kv_heads, length) for parts in ((query, key, value), turned)
    )
    second = second.unflatten(0, (kv_heads, -1)).flip(0).flatten(0, 1)
    expect(
        torch.equal(first, second),
        "KV heads that change places, their query heads with them, select something else: are query heads beside "
        "their own keys (repeat_interleave, not repeat)?",
    )
    return f"{', '.join(f'{h}:{k}' for h, k in HEADS)} query to KV heads"


def dtype(subject: Subject) -> str:
    """In 16 bits it selects as validly as in 32, and nearly the same as from the same numbers in 32 bits."""
    for kind in DTYPES:
        for heads in HEADS:
            for length in LENGTHS:
                sense(subject, heads, length, kind)
    (heads, kv_heads), length, found = HEADS[1], 331, []
    for kind in DTYPES[1:]:
        parts = states(heads, kv_heads, length, kind)
        low, high = (
            shown(ask(subject, *given)[1], subject.phase, kv_heads, length)
            for given in (parts, [part.float() for part in parts])
        )
        found.append(float((low & high).sum() / (low | high).sum()))
        name = str(kind).removeprefix("torch.")
        expect(
            found[-1] >= ALIKE,
            f"in {name} only {found[-1]:.2f} of what is selected is what the same numbers select in float32: compute "
            "scores in float32",
        )
    return f"{min(found):.3f} of the selection is that of float32"


def determinism(subject: Subject) -> str:
    """The same input selects the same, whatever was asked before and however torch's random numbers stand."""
    for heads, length, kind in product(HEADS, LENGTHS, DTYPES):
        parts = states(*heads, length, kind)
        before = torch.random.get_rng_state()
        try:
            torch.manual_seed(1)
            _, first = ask(subject, *parts)
            ask(subject, *states(*heads, length, kind, seed=1))
            torch.manual_seed(2)
            drawn = torch.random.get_rng_state()
            later = [ask(subject, *(part.clone() for part in parts))[1] for _ in range(2)]
            untouched = torch.equal(drawn, torch.random.get_rng_state())
        finally:
            torch.random.set_rng_state(before)
        for found in later:
            equal = same(first, found, subject.phase, heads[1], length) and _equal(weights(first), weights(found))
            expect(equal, f"{length} tokens: the same input selects something else the second time")
        expect(
            untouched,
            "draws from torch's global random numbers, which tasks and models use, too: make a torch.Generator "
            "with a seed of its own",
        )
    return "the same after another input and under another seed"


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    pairs = zip(one, other, strict=True) if len(one) == len(other) else [(torch.zeros(0), torch.zeros(1))]
    return all(torch.equal(left, right) for left, right in pairs)


def promise(subject: Subject) -> str:
    """A requested sparsity is met within `NEAR` at `PROMISED` tokens, counted from what is listed."""
    found = {}
    for sparsity in SPARSITIES:
        layers = [(index, LAYERS) for index in range(LAYERS)] if subject.layered else [(0, 1)]
        density = sum(_density(subject, sparsity, layer) for layer in layers) / len(layers)
        found[sparsity] = 1 - density
        expect(
            abs(1 - density - sparsity) <= NEAR + 1e-9,
            f"sparsity {sparsity} at {PROMISED} tokens measures {1 - density:.4f}; expected it within {NEAR}",
        )
    return ", ".join(f"{measured:.4f} for {asked}" for asked, measured in found.items())


def _density(subject: Subject, sparsity: float, layer: tuple[int, int]) -> float:
    (heads, kv_heads), length = HEADS[1], PROMISED
    query, key, value = states(heads, kv_heads, length)
    method, selection = ask(subject, query, key, value, sparsity, layer)
    if subject.phase == "prefill":
        return float(selection.executed_pairs().sum()) / (heads * length * (length + 1) / 2)
    if subject.phase == "eviction":
        return float(selection.counts.sum()) / (kv_heads * length)
    # Pages are whole and the page of a token is read in full: over all places in a page the mean is promised.
    size, read, seen = max(selection.unit, method.page_size), 0.0, 0
    for end in range(length - size + 1, length + 1):
        _, selection = ask(subject, *(part[:, :end] for part in (query, key, value)), sparsity, layer)
        read += float(selection.keys_read(keys_of(key[:, :end], end)).double().mean((0, 1)).sum())
        seen += sum(range(end - STEPS + 1, end + 1))
    return read / seen


def causality(subject: Subject) -> str:
    """Tokens that come together read what they would have read one by one; no prompt's query reads a later key."""
    length, phase = 203, subject.phase
    for heads, kv_heads in HEADS[1:3]:
        query, key, value = states(heads, kv_heads, length)
        if phase == "decode":
            method = subject.build(subject.tiny)
            together = shown(decode(method, [(query, key, value)], STEPS, STEPS, None)[1], phase, kv_heads, length)
            for step in range(STEPS):
                end = length - STEPS + 1 + step
                parts = tuple(part[:, :end].contiguous() for part in (query, key, value))
                alone = shown(decode(method, [parts], step + 1, 1, None)[1], phase, kv_heads, end)
                expect(
                    torch.equal(together[:, :, step, :end], alone[:, :, 0]),
                    f"new token {step + 1} of {STEPS} reads something else when those behind it come with it",
                )
                expect(not together[:, :, step, end:].any(), f"new token {step + 1} reads a key behind it")
            continue
        # What earlier queries read may hang on the last ones, which vote; it must not lie after them.
        _, selection = ask(subject, query, key, value)
        if phase == "prefill":
            tiles = selection.mask()
            last = torch.clamp((torch.arange(selection.blocks_q) + 1) * selection.block_q, max=length) - 1
            after = tiles & (torch.arange(selection.blocks_k) * selection.block_k > last[:, None])
            expect(not after.any(), "a query block reads a key block that lies after it")
            selection.check(heads)
        else:
            expect(
                int(selection.ids[:, : int(selection.counts.min())].max()) < length,
                "a token that is kept lies after the prompt",
            )
    return "new tokens read the same one by one" if phase == "decode" else "nothing after its query is read"


def neighbours(subject: Subject) -> None:
    """Rows that are decoded side by side read what each reads alone."""
    heads, kv_heads = HEADS[1]
    rows = [states(heads, kv_heads, length, seed=7) for length in LENGTHS]
    for sparsity in (None, *SPARSITIES[1:]):
        method = subject.build(subject.tiny if sparsity is None else {})
        _, together = decode(method, rows, STEPS, STEPS, sparsity)
        for place, (row, length) in enumerate(zip(rows, LENGTHS, strict=True)):
            own = slice(place * kv_heads, (place + 1) * kv_heads)
            part = replace(together, ids=together.ids[own], counts=together.counts[own])
            mine = shown(part, "decode", kv_heads, length)
            alone = shown(decode(method, [row], STEPS, STEPS, sparsity)[1], "decode", kv_heads, length)
            expect(
                torch.equal(mine, alone),
                f"beside rows of other lengths, a row of {length} tokens reads something else than alone",
            )


# --- what it holds ----------------------------------------------------------------------------------------------------


def memory(subject: Subject) -> str:
    """Selecting holds at most `SELECTING` bytes a token at once; nothing outlives a call but the state in `slots()`."""
    (heads, kv_heads), method = HEADS[1], subject.build({})
    tracker, left, peak, state = Held(), [], 0, None
    for length in (PROMISED // 2, PROMISED, PROMISED):
        parts = states(heads, kv_heads, length)
        tracker.give(*parts)
        with tracker:
            state = None
            if subject.phase == "decode":
                state = state_of(method, parts[1], [length] * kv_heads)
            before = tracker.now
            tracker.mark()
            if subject.phase == "decode":
                decode(method, [parts], STEPS, STEPS, SPARSITIES[1], state=state)
            else:
                ask(subject, *parts, SPARSITIES[1])
            peak = tracker.peak - before
        if tracker.now > before:
            gc.collect()
        declared = _declared(method, parts[1], length) if state is not None else 0
        left.append(tracker.now - declared)
    # What it computes once, whatever it is asked about, it may hold on to.
    more = max(left[1] - left[0], left[2] - left[1])
    expect(
        more <= LEFT,
        f"{more} more bytes are held after each prompt of {PROMISED} tokens than its slots() declare: what has to be "
        "kept belongs there",
    )
    most = SELECTING * PROMISED
    expect(
        peak <= most,
        f"selecting from {PROMISED} tokens holds {peak / 1e6:.0f} MB at once; expected at most {most / 1e6:.0f} (work "
        "through heads or rows one after the other)",
    )
    kept = "" if state is None else f"; a state of {declared / kv_heads / PROMISED:.1f} bytes a token of a KV head"
    return f"{peak / PROMISED:.0f} bytes a token at once{kept}"


def _declared(method: Any, key: Tensor, length: int) -> int:
    """Bytes that the slots of a method come to for keys `(H_kv, L, D)`."""
    entries = {"page": -(-length // method.page_size), "token": length, "sequence": 1}
    return len(key) * sum(slot.bytes(key[0]) * entries[slot.per] for slot in method.slots())
