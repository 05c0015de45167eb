"""What a method loses in a sample (`diagnose=N`): the dense attention of its layers is computed beside the run.

Per layer and query head, on the very queries, keys and values that the layer was given: the share of dense attention
that falls on the keys that were read, how far the output is off, and how many of these keys an oracle would have read.
docs/accounting.md defines the figures. Nothing here changes what is computed or counted: it looks at a call when that
is done, waits for the device, and takes as long as naive attention of the same queries. What eviction drops is kept
here meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.types import Blocks, Keep, RaggedKV, Reads
from ..methods.plan import Plan

if TYPE_CHECKING:
    from .accounting import RowCounts
    from .cache import CacheLayer
    from .steps import Stepped

#: Queries of a prompt that are looked at, evenly spaced, the last one among them.
QUERIES = 256
#: Scores that are held at once.
MOST_SCORES = 1 << 24
#: What is said of steps of decoding that could have run in a CUDA graph, or beside others.
LOOKS = "diagnose=N looks at every step of this answer"

#: What is summed up for each query head: over queries, except for the last two, which are of whole matrices.
SUMS = ("queries", "mass", "choices", "overlap", "error", "norm")

#: From a query head and some of the queries to `(n, L)` bool: the keys that they read.
Reading = Callable[[int, Tensor], Tensor]


# --- the figures of some queries --------------------------------------------------------------------------------------


def judge(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    where: Tensor,
    read: Reading,
    out: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> np.ndarray:
    """The sums of queries, held against dense attention in fp32 (fp64 for fp64).

    Args:
        query: `(H, n, D)`; key, value: `(H_kv, L, …)`, of all tokens that they might see.
        where: `(n,)` int64, the tokens that the queries are of: they see the keys up to and including these.
        read: the keys that were read; those that a query may not see do not count.
        out: `(H, n, D_v)`, what attention over these keys gave.
        scale, softcap: of the scores.
        sinks: `(H,)`, logits of attention sinks, which take their part of each softmax and give nothing for it.

    Returns:
        `(6, H)` fp64, by `SUMS`.
    """
    heads, length = len(query), key.shape[1]
    found = torch.zeros(len(SUMS), heads, dtype=torch.float64, device=query.device)
    rows = max(1, MOST_SCORES // length)
    for head in range(heads):
        own = head // (heads // len(key))
        sink = None if sinks is None else sinks[head]
        keys, values = wide(key[own]), wide(value[own])
        for some in torch.arange(len(where), device=where.device).split(rows):
            seen = torch.arange(length, device=where.device) <= where[some, None]
            scores = scored(query[head, some], keys, seen, scale, softcap)
            weights = scores.softmax(-1)
            dense = weights @ values
            if sink is not None:
                dense = dense * torch.sigmoid(scores.logsumexp(-1) - sink.to(scores))[:, None]
            chosen = read(head, some) & seen
            number = chosen.sum(-1)
            found[:, head] += torch.stack([
                torch.tensor(float(len(some)), dtype=torch.float64, device=where.device),
                (weights * chosen).sum(dtype=torch.float64),
                (number > 0).sum().double(),
                overlap(scores, chosen, number).sum(),
                (out[head, some].to(dense) - dense).double().square().sum(),
                dense.double().square().sum(),
            ])  # fmt: skip
    return found.cpu().numpy()


def overlap(scores: Tensor, chosen: Tensor, number: Tensor) -> Tensor:
    """`(n,)` fp64: the share of the chosen keys `(n, L)` bool that the best choice of as many would have, too.

    Of keys with equal scores an oracle may take any, so it takes those that were chosen. 0 where none is chosen.
    """
    last = (number.clamp(min=1) - 1)[:, None]
    least = scores.sort(dim=-1, descending=True).values.gather(-1, last)
    above, equal = scores > least, scores == least
    left = number - above.sum(-1)  # what is taken among the equal ones
    both = (chosen & above).sum(-1) + torch.minimum((chosen & equal).sum(-1), left)
    return torch.where(number > 0, both / number.clamp(min=1), 0.0).double()


def scored(query: Tensor, key: Tensor, seen: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scores `(n, L)` of queries `(n, D)`, -inf for keys `(L, D)` that they may not see."""
    scores = wide(query) @ key.T * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, -torch.inf)


def wide(states: Tensor) -> Tensor:
    return states if states.dtype == torch.float64 else states.float()


def sampled(length: int, device: torch.device) -> Tensor:
    """The tokens of a prompt whose queries are looked at: the last of each of `QUERIES` parts of equal length."""
    number = min(QUERIES, length)
    return torch.arange(1, number + 1, device=device) * length // number - 1


# --- what was read ----------------------------------------------------------------------------------------------------


def of_layout(layout: Blocks, where: Tensor) -> Reading:
    """What queries at tokens `where (n,)` read of their prompt."""

    def read(head: int, some: Tensor) -> Tensor:
        row = where[some] // layout.block_q
        keys = marked(layout.indices[head, row], layout.counts[head, row], layout.blocks_k)
        keys = keys.repeat_interleave(layout.block_k, 1)[:, : layout.length]
        if layout.columns is not None:
            lists = layout.columns[head, row if layout.columns.shape[1] > 1 else torch.zeros_like(row)]
            keys = keys | marked(lists, layout.column_counts[head, row], layout.length)
        return keys

    return read


def of_reads(reads: Reads, group: int, tokens: Sequence[Tensor], so_far: int) -> Reading:
    """What new tokens read of all tokens so far.

    A key is not read that its score gets -inf added to: nothing of it reaches the output.

    Args:
        group: query heads of a KV head; tokens: those that each KV head holds, the new ones included.
    """
    lists = reads.ids.shape[1]

    def read(head: int, some: Tensor) -> Tensor:
        sequence, member = divmod(head, group)
        own = member if lists > 1 else 0
        held = tokens[sequence]
        hidden = None if reads.bias is None else reads.bias[sequence, own, some] == -torch.inf
        lists_of_some = reads.ids[sequence, own, some], reads.counts[sequence, own, some]
        pages = marked(*lists_of_some, -(-len(held) // reads.unit), hidden)
        return _spread(pages.repeat_interleave(reads.unit, 1)[:, : len(held)], held, so_far)

    return read


def of_held(group: int, tokens: Sequence[Tensor], so_far: int) -> Reading:
    """What a KV head holds of all tokens so far; as for `of_reads`."""

    def read(head: int, some: Tensor) -> Tensor:
        held = tokens[head // group]
        return _spread(torch.ones(len(some), len(held), dtype=torch.bool, device=held.device), held, so_far)

    return read


def marked(ids: Tensor, counts: Tensor, number: int, hidden: Tensor | None = None) -> Tensor:
    """`(n, number)` bool: what the first `counts (n,)` entries of lists `(n, W)` name, save the hidden ones."""
    valid = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
    if hidden is not None:
        valid = valid & ~hidden
    marks = torch.zeros(len(ids), number + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(1, torch.where(valid, ids, number).long(), True)[:, :number]


def _spread(places: Tensor, held: Tensor, so_far: int) -> Tensor:
    """From places among the tokens that are held `(n, |held|)` to all tokens so far."""
    spread = torch.zeros(len(places), so_far, dtype=torch.bool, device=places.device)
    spread[:, held] = places
    return spread


# --- a sample ---------------------------------------------------------------------------------------------------------


@dataclass
class Whole:
    """All tokens of a row so far in one layer, evicted ones included.

    Attributes:
        keys, values: `(H_kv, n, …)`, as the layer was given them.
        prompt: tokens of the prompt.
        stayed: for each KV head, what stayed of these; evicted: whether a method chose that.
        held: for each KV head, the tokens that it holds now; lossy: whether a method has chosen any of that.
    """

    keys: Tensor
    values: Tensor
    prompt: int
    stayed: list[Tensor]
    evicted: bool
    held: list[Tensor]
    lossy: bool

    @staticmethod
    def of(key: Tensor, value: Tensor, kept: Keep | None) -> Whole:
        """Of a prompt's keys and values `(H_kv, L, …)` and what stays of them, all of them where that is None."""
        heads, length = key.shape[:2]
        stayed = [torch.arange(length, device=key.device)] * heads if kept is None else _listed(kept)
        return Whole(key.clone(), value.clone(), length, stayed, kept is not None, stayed, kept is not None)

    def take(self, kv: RaggedKV, so_far: int, steps: int) -> None:
        """Take the new tokens in, the last of each sequence. An answer may begin again behind the prompt."""
        before = so_far - steps
        if before == self.prompt:
            self.held, self.lossy = self.stayed, self.evicted
        ends = (kv.starts + kv.lengths).tolist()
        self.keys, self.values = (
            torch.cat([own[:, :before], torch.stack([flat[end - steps : end] for end in ends])], 1)
            for own, flat in ((self.keys, kv.keys), (self.values, kv.values))
        )
        new = torch.arange(before, so_far, device=self.keys.device)
        self.held = [torch.cat([own, new]) for own in self.held]

    def keep(self, kept: Keep) -> None:
        """Some of what is held goes."""
        self.held = [own[places] for own, places in zip(self.held, _listed(kept), strict=True)]
        self.lossy = True


def _listed(kept: Keep) -> list[Tensor]:
    return [ids[:count] for ids, count in zip(kept.ids, kept.counts.tolist(), strict=True)]


class Diagnosis:
    """What is known of one sample."""

    def __init__(self) -> None:
        #: Phase and layer -> `(6, H)` by `SUMS`.
        self.sums: dict[tuple[str, int], np.ndarray] = {}
        #: Phase and layer -> `(H_kv,)` bits of a method's state for each token held behind the prompt.
        self.bits: dict[tuple[str, int], np.ndarray] = {}
        #: Layer -> its tokens, where some may be evicted.
        self.whole: dict[int, Whole] = {}

    def add(self, phase: str, layer: int, found: np.ndarray) -> None:
        """Add what `judge` has found."""
        before = self.sums.get((phase, layer))
        self.sums[phase, layer] = found if before is None else before + found

    def end(self) -> None:
        """Let go of the tokens: the sample has been answered."""
        self.whole.clear()

    def figures(self, phase: str) -> dict[int, dict[str, np.ndarray]]:
        """Layer -> figure -> `(H,)` or `(H_kv,)` fp64; NaN where there is none."""
        found = {}
        for (own, layer), sums in self.sums.items():
            if own != phase:
                continue
            queries, mass, choices, both, error, norm = sums
            with np.errstate(invalid="ignore", divide="ignore"):
                found[layer] = {
                    "mass_kept": mass / queries,
                    "output_error": np.where(norm > 0, np.sqrt(error / norm), np.nan),
                    "oracle_overlap": np.where(choices > 0, both / choices, np.nan),
                }
            if (phase, layer) in self.bits:
                found[layer]["auxiliary_bits_per_token"] = self.bits[phase, layer]
        return found

    def queries(self, phase: str) -> int:
        """Queries of each head that were looked at; not all layers need be called equally often."""
        return int(max((sums[0].max() for (own, _), sums in self.sums.items() if own == phase), default=0))


# --- where the runtime tells of its calls -----------------------------------------------------------------------------


def prefill(
    counts: RowCounts | None,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layouts: Sequence[Blocks],
    out: Sequence[Tensor],
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> None:
    """A prefill method has run.

    Args:
        counts: of the prompt, which say whether it is looked at.
        query, key, value: `(1, H or H_kv, L, …)`; layouts, out `(H, L, D_v)`: of each row.
    """
    if counts is None or counts.diagnosis is None:
        return
    _check_rows(len(query))
    where = sampled(query.shape[2], query.device)
    found = judge(
        query[0][:, where], key[0], value[0], where, of_layout(layouts[0], where), out[0][:, where],
        scale=scale, softcap=softcap, sinks=sinks,
    )  # fmt: skip
    counts.diagnosis.add("prefill", layer, found)


def ended(
    counts: RowCounts | None,
    plan: Plan,
    layer: int,
    held: CacheLayer,
    kept: Sequence[Keep | None],
    key: Tensor,
    value: Tensor,
) -> None:
    """A prompt is complete, and evicted.

    Args:
        held: what holds the rest; kept: of each row.
        key, value: `(1, H_kv, L, …)`, of which a copy is kept where some may be evicted.
    """
    if counts is None or counts.diagnosis is None:
        return
    _check_rows(len(key))
    if plan.eviction is not None:
        counts.diagnosis.whole[layer] = Whole.of(key[0], value[0], kept[0])
    for phase in ("eviction", "decode"):
        if (filled := plan.phases.get(phase)) is None:
            continue
        # What evicts once keeps nothing between steps.
        slots = filled.method.slots() if phase == "decode" or plan.every is not None else ()
        bits = held.state_bytes(0, slots) * 8 / held.ended().lengths.double()
        counts.diagnosis.bits[phase, layer] = bits.cpu().numpy()


def step(
    counts: RowCounts | None,
    layer: int,
    query: Tensor,
    kv: RaggedKV,
    found: Stepped,
    tokens: Tensor | int,
    *,
    scale: float,
    softcap: float | None,
    lender: int | None = None,
    sinks: Tensor | None = None,
) -> None:
    """New tokens of a row have been read.

    Args:
        query: `(H_kv, G, T, D)`; kv: what is held of it, the new tokens included.
        tokens: so far, evicted and new ones included.
        lender: the layer whose keys and values this one borrows, if any.
    """
    if counts is None or counts.diagnosis is None:
        return
    _check_rows(len(kv.starts) // kv.heads)
    own, so_far, (group, steps) = counts.diagnosis, int(tokens), query.shape[1:3]
    whole = own.whole.get(layer if lender is None else lender)
    if whole is None:
        places = kv.starts[:, None] + torch.arange(so_far, device=query.device)
        key, value, held = kv.keys[places], kv.values[places], [places[0] - kv.starts[0]] * kv.heads
    else:
        if lender is None:
            whole.take(kv, so_far, steps)
        key, value, held = whole.keys, whole.values, whole.held
    where = torch.arange(so_far - steps, so_far, device=query.device)
    states = query.flatten(0, 1), key, value, where
    out, options = found.out.flatten(0, 1), {"scale": scale, "softcap": softcap, "sinks": sinks}
    if found.reads is not None:
        own.add("decode", layer, judge(*states, of_reads(found.reads, group, held, so_far), out, **options))
    if whole is not None and whole.lossy:
        if found.reads is not None:  # which reads but some of what is held
            out = over_held(query, kv, **options)
        own.add("eviction", layer, judge(*states, of_held(group, held, so_far), out, **options))


def over_held(query: Tensor, kv: RaggedKV, *, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """`(H, T, D_v)` in fp32 (fp64 for fp64): attention of `(H_kv, G, T, D)` queries to all that is held of a row."""
    heads, group, steps, _ = query.shape
    visible, made = kv.visible(steps), []
    for sequence, (start, length) in enumerate(zip(kv.starts.tolist(), kv.lengths.tolist(), strict=True)):
        keys, values = (wide(flat[start : start + length]) for flat in (kv.keys, kv.values))
        seen = torch.arange(length, device=query.device) < visible[sequence, :, None]
        for member in range(group):
            scores = scored(query[sequence, member], keys, seen, scale, softcap)
            part = 1.0
            if sinks is not None:
                part = torch.sigmoid(scores.logsumexp(-1) - sinks[sequence * group + member].to(scores))[:, None]
            made.append(scores.softmax(-1) @ values * part)
    return torch.stack(made)


def compacted(counts: RowCounts | None, layer: int, kept: Keep) -> None:
    """In the course of an answer some of what a row holds has gone; `kept` are places in that."""
    if counts is not None and counts.diagnosis is not None:
        counts.diagnosis.whole[layer].keep(kept)


def _check_rows(rows: int) -> None:
    if rows > 1:
        raise UserError(
            f"diagnose=N follows one answer to a prompt, and {rows} beams are decoded here: leave diagnose out, or "
            "type --gen_kwargs num_beams=1"
        )
