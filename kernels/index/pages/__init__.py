"""Which pages a new token reads, from the scores of its pages and a budget: the best ones, and the one it is in.

Scores are given, or follow from the bounds of pages and are then made in the same launch. Budgets follow the lengths
that stand on the device; after eviction the KV heads of a row may hold very different numbers of pages, and then what
some cannot read others of the row do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...backends import choose
from ...cache.append import append, check_tokens
from ...estimate import page_scores
from ...types import PageBounds, RaggedKV, Reads
from . import naive

#: Pages of a sequence that one program of the Triton version can hold.
MOST_PAGES = 1 << 15


@dataclass(frozen=True)
class PageBudget:
    """How many complete pages a new token reads besides the page that it is in.

    Attributes:
        page_size: keys per page.
        pages: the number, at most; or None.
        keep: share of a row's tokens that each of its KV heads reads, the current page included; or None. The heads of
            a row together read as many pages as this gives each of them, as far as they hold them.
        kv_heads: sequences per row.
    """

    page_size: int
    pages: int | None
    keep: float | None
    kv_heads: int

    def __post_init__(self) -> None:
        if (self.pages is None) == (self.keep is None):
            raise ValueError(f"pages={self.pages}, keep={self.keep} given; expected one of them")
        if self.page_size < 1 or self.kv_heads < 1 or (self.pages or 0) < 0 or not 0 <= (self.keep or 0) <= 1:
            raise ValueError(
                f"{self} given; expected a page size and KV heads of at least 1, pages of at least 0, keep from 0 to 1"
            )


def budget_pages(visible: Tensor, logical: Tensor, budget: PageBudget) -> tuple[Tensor, Tensor]:
    """Complete pages before the one that a token is in, and how many of them it reads.

    What `keep` asks for is rounded to pages in fp64, half to even. Where a KV head of a row holds fewer pages than
    that, the pages of the row are shared anew among its heads: evenly, none getting more than it holds, and what does
    not divide goes to the heads that hold the most, of equals to the first. Costs no host synchronisation.

    Args:
        visible: `(S, T)` int64, keys that each token may see in its sequence, itself included; 0 or less where there
            is no token. S is a multiple of `budget.kv_heads`.
        logical: `(S, T)` int64, tokens of the row up to this one, evicted ones included.

    Returns:
        `before (S, T)` and `read (S, T)` int64.
    """
    return naive.budget_pages(visible, logical, budget)


def select_pages(
    scores: Tensor, kv: RaggedKV, logical: Tensor, budget: PageBudget, *, width: int, backend: str = "auto"
) -> Reads:
    """For each of the last T tokens the complete pages with the largest scores, and behind them the current page.

    Ties go to recent pages. A score that is not a number counts as minus infinity. Costs no host synchronisation.

    Args:
        scores: `(S, Gs, T, P)` fp32; for each token those of its complete pages (see `budget_pages`) are looked at.
        logical: `(S // kv_heads,)` int64, tokens of each row, evicted ones and the newest included.
        width: a number that `read + 1` never exceeds.
        backend: `auto`, `naive` or `triton`. Above 32768 pages `auto` is `naive`.

    Returns:
        Lists of `width` places, ascending. A sequence of length 0 has counts of 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or an unknown backend.
    """
    sequences = len(kv.lengths)
    if scores.dim() != 4 or len(scores) != sequences or scores.dtype != torch.float32:
        raise ValueError(
            f"scores are {tuple(scores.shape)} {scores.dtype}; expected ({sequences}, lists, T, pages) torch.float32"
        )
    _check(kv, logical, budget, width, scores.device)
    chosen = choose(backend, scores.device)
    if chosen == "triton" and scores.shape[-1] > MOST_PAGES:
        if backend == "triton":
            raise ValueError(f"backend 'triton' takes at most {MOST_PAGES} pages, {scores.shape[-1]} given; use 'auto'")
        chosen = "naive"
    if chosen == "triton":
        from . import triton

        pages, counts = triton.forward(scores, kv, logical, budget, width)
    else:
        pages, counts = naive.forward(scores, kv, logical, budget, width)
    return Reads(pages, counts, budget.page_size)


def _check(kv: RaggedKV, logical: Tensor, budget: PageBudget, width: int, device: torch.device) -> None:
    """The cheap checks that every call makes."""
    sequences = len(kv.lengths)
    if logical.shape != (sequences // budget.kv_heads,) or sequences % budget.kv_heads or logical.dtype != torch.int64:
        raise ValueError(
            f"logical is {tuple(logical.shape)} {logical.dtype}; expected one torch.int64 for each {budget.kv_heads} "
            f"of {sequences} sequences"
        )
    if not device == kv.lengths.device == logical.device:
        raise ValueError(
            f"devices are {device}, {kv.lengths.device} (lengths), {logical.device} (logical); expected one"
        )
    if width < 1:
        raise ValueError(f"width={width} given; expected at least 1")


def choose_pages(
    query: Tensor,
    bounds: PageBounds,
    kv: RaggedKV,
    logical: Tensor,
    budget: PageBudget,
    *,
    width: int,
    pages: int,
    shared: bool = True,
    new: tuple[Tensor, Tensor] | None = None,
    overlap: bool = False,
    backend: str = "auto",
) -> Reads:
    """`select_pages` by the scores of `estimate.page_scores`, in front of which new tokens may be appended.

    Where Triton runs, `kv` has tickets, there is one list for a sequence and one token, and no more than 8192 pages,
    this is a single launch.

    Args:
        query, bounds, pages, shared: as in `page_scores`.
        logical, budget, width: as in `select_pages`.
        new: keys `(S, T, D)` and values `(S, T, D_v)`, for `append`, or None.
        overlap: let this call and attention run into each other on GPUs that can do that. Whoever asks for it promises
            that `paged_decode` over the selection will be the very next call on the stream, that `query` and `new`
            are not freed before it, and that nothing writes into them or the lists meanwhile.

    Returns:
        Lists of `width` places, ascending, with `ready` where attention has to wait for them.

    Raises:
        ValueError: as `page_scores` and `select_pages`; pages of another size in `budget` than in `bounds`.
    """
    if budget.page_size != bounds.page_size:
        raise ValueError(
            f"the budget is of pages of {budget.page_size}, the bounds are of pages of {bounds.page_size}; "
            "expected one size"
        )
    if (
        shared
        and query.dim() == 4
        and query.shape[2] == 1
        and kv.tickets is not None
        and choose(backend, query.device) == "triton"
    ):
        from . import triton

        if pages <= triton.MOST_TOGETHER:
            kv.check(query)
            bounds.check(kv)
            _check(kv, logical, budget, width, query.device)
            if new is not None:
                check_tokens(kv, *new)
            *lists, in_use = triton.together(query, bounds, kv, logical, budget, width, pages, new, overlap)
            if not overlap:
                return Reads(*lists, budget.page_size)
            return Reads(*lists, budget.page_size, ready=kv.tickets[1], in_use=in_use)
    if new is not None:
        append(kv, *new, bounds, backend=backend)
    scores = page_scores(query, bounds, kv, shared=shared, pages=pages, backend=backend)
    return select_pages(scores, kv, logical, budget, width=width, backend=backend)
