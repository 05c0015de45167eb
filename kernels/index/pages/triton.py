"""The choice of pages in Triton, of given scores or together with the scores: a list is made by one program.

It works out its budget itself. Made together, a list is made by the last one of the programs that score its pages,
while others go on scoring pages of other sequences.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...backends import can_overlap
from ...cache.append.triton import write_tokens
from ...estimate.page_bounds.triton import load_bounds, signed_sums, summed_scores
from ...types import RaggedKV
from .budget_triton import number_of_pages
from .choice_triton import choose, row_of_scores

if TYPE_CHECKING:
    from ...types import PageBounds
    from . import PageBudget

#: Scores of a list that one warp holds; a program has at most 32 warps.
PER_WARP = 512
#: Warps of a program that scores pages and maybe chooses among them.
WARPS = 8
#: Bytes of each bound that it reads, and registers of a thread: those that choosing could use would leave too few
#: programs at work to read bounds at full speed. Where programs are many, larger ones.
SCORE_BYTES, REGISTERS = 1 << 14, 80
MANY_PROGRAMS, MANY_SCORE_BYTES, MANY_REGISTERS = 4096, 1 << 15, 128
#: Scores that such a program can hold.
MOST_TOGETHER = 1 << 13
#: Turns of a search by values; later ones halve the range of bit patterns.
VALUE_TURNS = 16


def forward(scores: Tensor, kv: RaggedKV, logical: Tensor, budget: PageBudget, width: int) -> tuple[Tensor, Tensor]:
    """See `pages.select_pages`."""
    sequences, lists, steps, columns = scores.shape
    pages, counts = _lists((sequences, lists, steps), width, scores.device)
    if not counts.numel():
        return pages, counts
    padded = _padded(columns)
    _select_kernel[(steps, lists, sequences)](
        scores.contiguous(),
        pages,
        counts,
        kv.lengths,
        logical,
        columns,
        width,
        *_budget(budget),
        **_options(budget, padded),
        num_warps=min(32, max(1, padded // PER_WARP)),
        # Products of fp64 numbers are rounded before they are added, as they are in torch.
        enable_fp_fusion=False,
    )
    return pages, counts


def together(
    query: Tensor,
    bounds: PageBounds,
    kv: RaggedKV,
    logical: Tensor,
    budget: PageBudget,
    width: int,
    columns: int,
    new: tuple[Tensor, Tensor] | None,
    overlap: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """See `pages.choose_pages`: one launch, for one token of each sequence; lists, and what it works in."""
    sequences, group, _, dim = query.shape
    query = query if query.stride(3) == 1 or dim == 1 else query.contiguous()
    pages, counts = _lists((sequences, 1, 1), width, query.device)
    if not sequences:
        return pages, counts, ()
    value_dim = kv.values.shape[-1]
    tokens = (kv.keys, kv.values) if new is None else tuple(t if t.stride(-1) == 1 else t.contiguous() for t in new)
    padded_dim = triton.next_power_of_2(dim)
    size, registers = SCORE_BYTES, REGISTERS
    if sequences * columns * padded_dim * query.element_size() > MANY_PROGRAMS * size:
        size, registers = MANY_SCORE_BYTES, MANY_REGISTERS
    tile = max(16, size // (padded_dim * query.element_size()))
    parts = triton.next_power_of_2(max(1, triton.cdiv(columns, tile)))
    scores = torch.empty(sequences * columns, dtype=torch.float32, device=query.device)
    stats = torch.empty(sequences * 4 * parts, dtype=torch.float32, device=query.device)
    dependent = overlap and can_overlap(query.device)
    _score_and_choose_kernel[(2 + triton.cdiv(columns, tile), sequences)](
        query,
        bounds.low,
        bounds.high,
        scores,
        pages,
        counts,
        stats,
        kv.keys,
        kv.values,
        *tokens,
        kv.starts,
        kv.lengths,
        bounds.first,
        logical,
        kv.tickets[0],
        kv.tickets[1],
        columns,
        width,
        *_budget(budget),
        *query.stride()[:2],
        tokens[0].stride(0),
        tokens[1].stride(0),
        NEW=new is not None,
        OVERLAP=overlap,
        DEPENDENT=dependent,
        GROUP=group,
        TILE=tile,
        DIM=dim,
        PADDED_DIM=padded_dim,
        VALUE_DIM=value_dim,
        PADDED_VALUE_DIM=triton.next_power_of_2(value_dim),
        STATS=parts,
        **_options(budget, _padded(columns)),
        num_warps=WARPS,
        enable_fp_fusion=False,
        **({"maxnreg": registers} if torch.version.hip is None else {}),
        **({"launch_pdl": True} if dependent else {}),  # no word of Triton's interpreter
    )
    return pages, counts, (query, *tokens, scores, stats)


def _lists(shape: tuple[int, int, int], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for lists and their lengths."""
    pages = torch.empty(*shape, width, dtype=torch.int32, device=device)
    return pages, torch.empty(shape, dtype=torch.int32, device=device)


def _padded(columns: int) -> int:
    return max(64, triton.next_power_of_2(columns))


def _budget(budget: PageBudget) -> tuple[int, int, int]:
    """`most`, `low_bits`, `high_bits`: the bits of the share, since kernels take numbers in fp32."""
    return budget.pages or 0, *struct.unpack("<2i", struct.pack("<d", budget.keep or 0.0))


def _options(budget: PageBudget, padded: int) -> dict[str, Any]:
    return {
        "SHARE": budget.keep is not None,
        "SIZE": budget.page_size,
        "HEADS": budget.kv_heads,
        "HEADS_PADDED": triton.next_power_of_2(budget.kv_heads),
        "PADDED": padded,
        "VALUE_TURNS": VALUE_TURNS,
    }


@triton.jit
def _merged(low, high, total, squares, low_, high_, total_, squares_):
    return tl.minimum(low, low_), tl.maximum(high, high_), total + total_, squares + squares_


# Numbers that change with the budget are not specialised on: each kind of them would compile anew.
@triton.jit(do_not_specialize=["width", "most", "low_bits", "high_bits"])
def _select_kernel(
    scores,
    pages,
    counts,
    lengths,
    logical,
    columns,
    width,
    most,
    low_bits,
    high_bits,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_TURNS: tl.constexpr,
):
    step, list_, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    behind = tl.num_programs(0) - 1 - step  # tokens after this one
    place = (sequence * tl.num_programs(1) + list_) * tl.num_programs(0) + step
    visible = tl.load(lengths + sequence) - behind
    if visible > 0:
        read = number_of_pages(
            lengths, logical, sequence, behind, most, low_bits, high_bits, SHARE, SIZE, HEADS, HEADS_PADDED
        )
        choose(
            row_of_scores(scores, place, columns, PADDED),
            pages,
            place,
            width,
            (visible - 1) // SIZE,
            read,
            0.0,
            0.0,
            0.0,
            0.0,
            False,
            PADDED,
            VALUE_TURNS,
        )
        tl.store(counts + place, read + 1)
    else:
        tl.store(counts + place, 0)


@triton.jit(do_not_specialize=["width", "most", "low_bits", "high_bits"])
def _score_and_choose_kernel(
    query,
    low,
    high,
    scores,
    pages,
    counts,
    stats,
    keys,
    values,
    new_keys,
    new_values,
    starts,
    lengths,
    first_rows,
    logical,
    tickets,
    ready,
    columns,
    width,
    most,
    low_bits,
    high_bits,
    query_sequence,
    query_head,
    new_keys_sequence,
    new_values_sequence,
    NEW: tl.constexpr,
    OVERLAP: tl.constexpr,
    DEPENDENT: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    STATS: tl.constexpr,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_TURNS: tl.constexpr,
):
    """One program: the number of pages that a sequence reads, its newest token, or the scores of `TILE` of its pages.

    The program that is the last one of a sequence chooses among all pages.
    """
    part, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if DEPENDENT:
        gdc_wait()
    if OVERLAP:
        # What was complete in an earlier call no longer is. Attention must not begin before that is taken back, so the
        # answer is waited for.
        was = 0
        if part == 0:
            was = tl.atomic_xchg(ready + sequence, 0, sem="relaxed")
        if DEPENDENT:  # noqa: SIM102
            if was >= 0:  # always
                gdc_launch_dependents()
    # All that does not wait for the length is asked for with it.
    length = tl.load(lengths + sequence)
    first = tl.load(first_rows + sequence)
    positive, negative = signed_sums(query + sequence * query_sequence, query_head, GROUP, DIM, PADDED_DIM)
    complete = tl.minimum(tl.maximum(length - 1, 0) // SIZE, columns)
    tiles = tl.cdiv(complete, TILE)
    if part < tiles + 2:
        # Of each tile the smallest and the largest score, their sum and that of their squares.
        facts = stats + sequence * 4 * STATS
        if part == 0:
            number = 0
            if length > 0:
                number = 1 + number_of_pages(
                    lengths, logical, sequence, 0, most, low_bits, high_bits, SHARE, SIZE, HEADS, HEADS_PADDED
                )
            tl.store(counts + sequence, number)
        elif part == 1:
            if NEW and length > 0:
                write_tokens(
                    new_keys + sequence * new_keys_sequence,
                    new_values + sequence * new_values_sequence,
                    keys,
                    values,
                    low,
                    high,
                    tl.load(starts + sequence),
                    tl.load(starts + sequence),
                    0,
                    first,
                    length - 1,
                    length,
                    (length - 1) // SIZE,
                    0,
                    0,
                    True,
                    SIZE,
                    DIM,
                    PADDED_DIM,
                    VALUE_DIM,
                    PADDED_VALUE_DIM,
                )
        else:
            ids = (part - 2) * TILE + tl.arange(0, TILE)
            smallest, largest = load_bounds(low, high, first, first, 0, ids, complete, DIM, PADDED_DIM)
            found = summed_scores(smallest, largest, positive, negative)
            found = tl.where(found == found, found, float("-inf"))  # what is not a number
            there = ids < complete
            tl.store(scores + sequence * columns + ids, found, mask=there)
            least = tl.where(there, found, float("inf"))
            most_ = tl.where(there, found, float("-inf"))
            found = tl.where(there, found, 0.0)
            least, most_, total, squares = tl.reduce((least, most_, found, found * found), 0, _merged)
            tl.store(facts + part - 2, least)
            tl.store(facts + STATS + part - 2, most_)
            tl.store(facts + 2 * STATS + part - 2, total)
            tl.store(facts + 3 * STATS + part - 2, squares)
        tl.debug_barrier()
        if tl.atomic_add(tickets + sequence, 1, sem="acq_rel") == tiles + 1:
            tl.store(tickets + sequence, 0)
            score = row_of_scores(scores, sequence, columns, PADDED)
            number = tl.load(counts + sequence)
            read = tl.maximum(number - 1, 0)
            tile = tl.arange(0, STATS)
            least, most_, total, squares = tl.reduce(
                (
                    tl.load(facts + tile, mask=tile < tiles, other=float("inf")),
                    tl.load(facts + STATS + tile, mask=tile < tiles, other=float("-inf")),
                    tl.load(facts + 2 * STATS + tile, mask=tile < tiles, other=0.0),
                    tl.load(facts + 3 * STATS + tile, mask=tile < tiles, other=0.0),
                ),
                0,
                _merged,
            )
            # Where a normal distribution would have the budget's share, roughly. If scores are otherwise, the search
            # takes a turn more.
            there = tl.maximum(complete, 1).to(tl.float32)
            mean = total / there
            spread = tl.sqrt(tl.maximum(squares / there - mean * mean, 0.0))
            share = tl.maximum(read, 1) / there
            odds = tl.maximum(tl.minimum(share, 1.0 - share), 1e-6) / tl.maximum(share, 1.0 - share)
            away = 5.5556 - 5.5556 * tl.exp2(0.1186 * tl.log2(odds))
            away = tl.where(share < 0.5, away, -away)
            choose(
                score,
                pages,
                sequence,
                width,
                complete,
                read,
                least,
                most_,
                mean + (away - 0.08) * spread,
                mean + (away + 0.08) * spread,
                True,
                PADDED,
                VALUE_TURNS,
            )
            if OVERLAP:
                tl.debug_barrier()
                tl.atomic_xchg(ready + sequence, tl.maximum(number, 1), sem="release")
