"""Random cases of the operators on caches, and what they must give, for the tests of their backends.

Cases are made on the CPU. What they must give is written here from the definitions: loops over pages and tokens in
fp64, and the loop by which pages were once shared among heads. What operators must not read is poisoned, and what they
must not write is compared too.

Long, since the operators of the cache share the cases they are tried on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lm_eval_sparse.kernels.cache.append import append
from lm_eval_sparse.kernels.cache.compact import compact
from lm_eval_sparse.kernels.decode import paged_decode
from lm_eval_sparse.kernels.estimate import page_scores, update_bounds
from lm_eval_sparse.kernels.index.pages import PageBudget, budget_pages, choose_pages, select_pages
from lm_eval_sparse.kernels.types import PageBounds, RaggedKV, Reads

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 200)
PAGE_SIZES = (8, 16, 32, 64)
GROUPS = (1, 3, 4, 7)
STEPS = (1, 3)
STEP_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
POISON = (float("nan"), float("inf"), -6e4)


class Draw:
    """A source of random choices and tensors."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def states(self, sequences: int, steps: int, dim: int, dtype: torch.dtype) -> Tensor:
        """`(S, T, D)`, strided as models leave it: one after the other, tokens before heads, or between others."""
        if self.chance(0.3):
            return self.normal(steps, sequences, dim, dtype=dtype).transpose(0, 1)
        if self.chance(0.4):
            return self.normal(sequences, steps + 2, dim + 16, dtype=dtype)[:, 1:-1, 8:-8]
        return self.normal(sequences, steps, dim, dtype=dtype)


@dataclass
class Case:
    """Sequences of rows of KV heads in a poisoned storage with room for more tokens, and room for their bounds."""

    draw: Draw
    kv: RaggedKV
    bounds: PageBounds
    heads: int
    steps: int

    @property
    def lengths(self) -> list[int]:
        return self.kv.lengths.tolist()

    @property
    def size(self) -> int:
        return self.bounds.page_size

    def to(self, device: str) -> Case:
        """A copy."""
        kv, bounds = self.kv, self.bounds
        parts = (part.to(device, copy=True) for part in (kv.keys, kv.values, kv.starts, kv.lengths))
        table = (part.to(device, copy=True) for part in (bounds.low, bounds.high, bounds.first))
        return Case(self.draw, RaggedKV(*parts, kv.longest), PageBounds(self.size, *table), self.heads, self.steps)

    def same(self, other: Case) -> None:
        """Both hold the same, in every place of the storages."""
        for mine, theirs in (
            *((getattr(self.kv, name), getattr(other.kv, name)) for name in ("keys", "values", "lengths")),
            *((getattr(self.bounds, name), getattr(other.bounds, name)) for name in ("low", "high")),
        ):
            torch.testing.assert_close(mine.cpu(), theirs.cpu(), rtol=0, atol=0, equal_nan=True)

    def set_bounds(self, before: list[int] | None = None) -> None:
        """By the definition, of the pages that keys [before, lengths) touch."""
        kv, bounds = self.kv, self.bounds
        for s, (start, first, length) in enumerate(
            zip(kv.starts.tolist(), bounds.first.tolist(), self.lengths, strict=True)
        ):
            for page in range(before[s] // self.size if before else 0, -(-length // self.size)):
                held = kv.keys[start + page * self.size : start + min((page + 1) * self.size, length)]
                bounds.low[first + page], bounds.high[first + page] = held.amin(0), held.amax(0)


def random_lengths(draw: Draw, rows: int, heads: int, steps: int, lengths: tuple[int, ...] = LENGTHS) -> list[int]:
    """Rows whose heads hold the same, rows from which an eviction took very different parts, rows nobody uses."""
    fit = [length for length in lengths if length >= steps]
    found = []
    for _ in range(rows):
        kind = draw.rng.random()
        if kind < 0.15:
            found += [0] * heads
        elif kind < 0.5:
            found += [draw.rng.choice(fit)] * heads
        else:
            found += [draw.rng.choice((draw.rng.choice(fit), draw.rng.randint(steps, max(fit)))) for _ in range(heads)]
    return found


def random_case(
    draw: Draw,
    dtype: torch.dtype = torch.float32,
    *,
    rows: int | None = None,
    heads: int | None = None,
    steps: int | None = None,
    page_size: int | None = None,
    room: int = 80,
    dims: tuple[int, ...] = (16, 24, 64),
    lengths: tuple[int, ...] = LENGTHS,
) -> Case:
    heads, rows = heads or draw.rng.choice((1, 2, 3, 4)), rows or draw.rng.choice((1, 2, 3))
    steps, size = steps or draw.rng.choice(STEPS), page_size or draw.rng.choice(PAGE_SIZES)
    held = random_lengths(draw, rows, heads, steps, lengths)
    places = draw.rng.sample(range(len(held)), len(held))
    # Every sequence in a place of its own, in any order, with gaps.
    sizes = [held[place] + room + draw.rng.randrange(3) for place in places]
    starts = [0] * len(held)
    end = draw.rng.randrange(4)
    for place, taken in zip(places, sizes, strict=True):
        starts[place], end = end, end + taken
    dim, dim_v = draw.rng.choice(dims), draw.rng.choice(dims)
    poison = draw.rng.choice(POISON)
    keys, values = (torch.full((end, d), poison, dtype=dtype) for d in (dim, dim_v))
    for start, length in zip(starts, held, strict=True):
        keys[start : start + length] = draw.normal(length, dim, dtype=dtype)
        values[start : start + length] = draw.normal(length, dim_v, dtype=dtype)
    bounds = PageBounds.empty([-(-(length + room) // size) + draw.rng.randrange(2) for length in held], keys, size)
    bounds.low.fill_(poison)
    bounds.high.fill_(poison)
    return Case(draw, RaggedKV.of(keys, values, starts, held), bounds, heads, steps)


# --- bounds and appending ----------------------------------------------------------------------------------------


def check_update(case: Case, backend: str, device: str = "cpu") -> None:
    """From scratch, and from some token on."""
    for before in (
        [0] * len(case.lengths),
        [case.draw.rng.randint(0, length) for length in case.lengths],
        [max(0, length - case.draw.rng.randint(0, 2)) for length in case.lengths],
    ):
        on, expected = case.to(device), case.to("cpu")
        expected.set_bounds(before)
        update_bounds(on.kv, on.bounds, torch.tensor(before, dtype=torch.int32, device=device), backend=backend)
        on.same(expected)


def count_up(kv: RaggedKV, steps: int) -> None:
    """As a decode step does before anything is appended."""
    kv.lengths.add_(steps * (kv.lengths > 0).int())


def check_append(case: Case, backend: str, device: str = "cpu", turns: int = 3) -> None:
    """Tokens appended, sequences cut back, and tokens appended again."""
    draw = case.draw
    case.set_bounds()
    on, expected = case.to(device), case.to("cpu")
    with_bounds = draw.chance(0.8)
    for turn in range(turns):
        steps = case.steps if turn < 2 else draw.rng.choice((1, 2, 5, 20))
        new = draw.states(len(case.lengths), steps, case.kv.keys.shape[1], case.kv.keys.dtype)
        new_values = draw.states(len(case.lengths), steps, case.kv.values.shape[1], case.kv.values.dtype)
        before = expected.lengths
        for s, (start, length) in enumerate(zip(case.kv.starts.tolist(), before, strict=True)):
            if length:
                expected.kv.keys[start + length : start + length + steps] = new[s]
                expected.kv.values[start + length : start + length + steps] = new_values[s]
                expected.kv.lengths[s] += steps
        if with_bounds:
            expected.set_bounds(before)
        count_up(on.kv, steps)
        # Strides are kept where tensors are copied to another device.
        append(on.kv, new.to(device), new_values.to(device), on.bounds if with_bounds else None, backend=backend)
        on.same(expected)
        if turn == 0:  # what is cut off stays in the storage and in the bounds
            back = [draw.rng.randrange(min(length, 40)) if length else 0 for length in expected.lengths]
            for some in (on, expected):
                some.kv.lengths.sub_(torch.tensor(back, dtype=torch.int32, device=some.kv.lengths.device))


# --- scores ------------------------------------------------------------------------------------------------------


def complete_pages(case: Case, sequence: int, step: int) -> int:
    """Complete pages before the one that a token is in."""
    return max(0, case.lengths[sequence] - case.steps + step) // case.size


def check_scores(case: Case, backend: str, device: str = "cpu", group: int | None = None) -> None:
    draw = case.draw
    group, shared, steps = group or draw.rng.choice(GROUPS), draw.chance(0.5), case.steps
    case.set_bounds()
    dtype, dim = case.kv.keys.dtype, case.kv.keys.shape[1]
    query = draw.states(len(case.lengths) * group, steps, dim, dtype).unflatten(0, (-1, group))
    pages = -(-max(case.lengths) // case.size) + draw.rng.randrange(3)
    on = case.to(device)
    found = page_scores(query.to(device), on.bounds, on.kv, shared=shared, pages=pages, backend=backend)
    assert found.shape == (len(case.lengths), 1 if shared else group, steps, pages) and found.dtype == torch.float32
    assert_scores(case, query, found.cpu(), shared)


def assert_scores(case: Case, query: Tensor, found: Tensor, shared: bool) -> None:
    for s, first in enumerate(case.bounds.first.tolist()):
        for t in range(case.steps):
            held = slice(first, first + complete_pages(case, s, t))
            q = query[s, :, t, None].double()
            low, high = case.bounds.low[held].double(), case.bounds.high[held].double()
            expected = torch.maximum(q * low, q * high).sum(-1)
            expected = expected.sum(0, keepdim=True) if shared else expected
            torch.testing.assert_close(
                found[s, :, t, : held.stop - held.start].double(), expected, rtol=1e-5, atol=2e-4
            )


# --- budgets and the choice of pages -----------------------------------------------------------------------------


def share_by_turns(total: Tensor, held: Tensor) -> Tensor:
    """Share `total (R, T)` among the heads `(R, H, T)`, by handing out even shares until nothing is left."""
    total = torch.minimum(total, held.sum(1))
    given = torch.zeros_like(held)
    while True:
        hungry = given < held
        count = hungry.sum(1).clamp(min=1)
        share = (total - given.sum(1)) // count
        if not bool(share.any()):
            break
        given += torch.where(hungry, torch.minimum(held - given, share[:, None]), 0)
    rank = (held - given).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return given + ((rank < (total - given.sum(1))[:, None]) & (given < held))


def budget_by_turns(visible: Tensor, logical: Tensor, budget: PageBudget) -> tuple[Tensor, Tensor]:
    """`budget_pages`, row by row and token by token."""
    before, read = torch.zeros_like(visible), torch.zeros_like(visible)
    for row in range(0, len(visible), budget.kv_heads):
        for t in range(visible.shape[1]):
            place = (slice(row, row + budget.kv_heads), slice(t, t + 1))
            seen = visible[place]
            if bool((seen < 1).any()):
                assert bool((seen < 1).all())
                continue
            held = (seen - 1) // budget.page_size
            if budget.pages is not None:
                wanted = torch.full_like(held, budget.pages).minimum(held)
            else:
                current = seen - held * budget.page_size
                asked = (budget.keep * logical[place].double() - current) / budget.page_size
                wanted = torch.round(asked).long().clamp(min=0)
            if not bool((wanted <= held).all()):
                rows = (1, budget.kv_heads, 1)
                wanted = share_by_turns(wanted.reshape(rows).sum(1), held.reshape(rows)).reshape(held.shape)
            before[place], read[place] = held, wanted
    return before, read


def random_budget(draw: Draw, page_size: int, heads: int) -> PageBudget:
    if draw.chance(0.4):
        return PageBudget(page_size, draw.rng.choice((0, 1, 2, 5, 1000)), None, heads)
    sparsity = draw.rng.choice((0.5, 0.75, 0.9, 0.95, round(draw.rng.random(), 3)))
    return PageBudget(page_size, None, 1 - sparsity, heads)


def random_logical(case: Case) -> Tensor:
    """Tokens of each row: as many as its longest head holds, or more of them evicted."""
    draw = case.draw
    rows = range(0, len(case.lengths), case.heads)
    more = [draw.rng.choice((0, 0, draw.rng.randrange(1, 500))) for _ in rows]
    return torch.tensor(
        [max(case.lengths[row : row + case.heads]) + extra for row, extra in zip(rows, more, strict=True)]
    )


#: Kinds of scores that `random_scores` makes.
SCORE_KINDS = 8


def random_scores(draw: Draw, shape: tuple[int, ...], kind: int) -> Tensor:
    """Scores of many kinds: spread, mostly equal, signed zeros, with infinities, with what is not a number."""
    scores = draw.normal(*shape)
    if kind == 1:
        scores = scores.round()
    elif kind == 2:
        scores.fill_(draw.rng.choice((0.0, -3.5, float("inf"), float("-inf"), float("nan"))))
    elif kind == 3:
        scores = torch.where(draw.normal(*shape) > 0, 0.0, -0.0)
    elif kind == 4:
        odd = torch.tensor([float("inf"), float("-inf"), float("nan"), -float("nan"), 0.0, 1e-42, -3e38])
        at = torch.randint(len(odd), shape, generator=draw.generator)
        scores = torch.where(draw.normal(*shape) > draw.rng.choice((-1, 1)), odd[at], scores)
    elif kind == 5:
        scores = scores.double().mul(8).exp().float()
    elif kind == 6:
        scores = scores.abs().neg()
    return scores


def selected(scores: Tensor, before: int, read: int) -> list[int]:
    """The best of the first `before` pages, ascending, and the page behind them."""
    values = [float("-inf") if value != value else value + 0.0 for value in scores[:before].tolist()]
    best = sorted(range(before), key=lambda page: (values[page], page), reverse=True)[:read]
    return [*sorted(best), before]


def check_select(
    case: Case, backend: str, device: str = "cpu", *, naive: bool = False, kind: int | None = None, keep: float = 0.0
) -> None:
    """Against the definition, or against the naive version on the CPU."""
    draw, sequences, steps = case.draw, len(case.lengths), case.steps
    budget = PageBudget(case.size, None, keep, case.heads) if keep else random_budget(draw, case.size, case.heads)
    logical = random_logical(case)
    lists, pages = draw.rng.choice((1, 1, 3)), max(case.lengths) // case.size + draw.rng.randrange(3)
    scores = random_scores(
        draw, (sequences, lists, steps, pages), draw.rng.randrange(SCORE_KINDS) if kind is None else kind
    )
    tokens = (logical[:, None] + torch.arange(1 - steps, 1)).repeat_interleave(case.heads, 0)
    before, read = budget_by_turns(case.kv.visible(steps), tokens, budget)
    for s in range(sequences):  # what stands behind the complete pages may be anything
        for t in range(steps):
            scores[s, :, t, int(before[s, t]) :] = draw.rng.choice((float("nan"), float("inf"), 7.0))
    width = int(read.max()) + 1 + draw.rng.choice((0, 0, 3))
    on = case.to(device)
    found = select_pages(scores.to(device), on.kv, logical.to(device), budget, width=width, backend=backend)
    assert found.unit == case.size and found.ids.shape == (sequences, lists, steps, width)
    assert found.ids.dtype == found.counts.dtype == torch.int32
    if naive:
        assert_same_lists(found, select_pages(scores, case.kv, logical, budget, width=width, backend="naive"))
        return
    for s, length in enumerate(case.lengths):
        for g in range(lists):
            for t in range(steps):
                expected = selected(scores[s, g, t], int(before[s, t]), int(read[s, t])) if length else []
                assert int(found.counts[s, g, t]) == len(expected), (s, g, t)
                assert found.ids[s, g, t, : len(expected)].tolist() == expected, (s, g, t)


def assert_same_lists(found: Reads, expected: Reads) -> None:
    counts = expected.counts.cpu()
    assert torch.equal(found.counts.cpu(), counts)
    width = min(found.ids.shape[-1], expected.ids.shape[-1])
    valid = torch.arange(width) < counts[..., None]
    assert torch.equal(found.ids[..., :width].cpu()[valid], expected.ids[..., :width].cpu()[valid])


def check_budget(draw: Draw, device: str = "cpu", rows: int = 50, longest: int = 5000) -> None:
    heads, steps = draw.rng.choice((1, 2, 3, 8, 10)), draw.rng.choice(STEPS)
    budget = random_budget(draw, draw.rng.choice((1, *PAGE_SIZES)), heads)
    lengths = random_lengths(draw, rows, heads, steps, (steps, 63, 64, 65, longest))
    visible = torch.tensor(lengths)[:, None] + torch.arange(1 - steps, 1)
    logical = torch.randint(steps, 2 * longest, (rows,), generator=draw.generator)
    logical = (logical[:, None] + torch.arange(1 - steps, 1)).repeat_interleave(heads, 0)
    found = budget_pages(visible.to(device), logical.to(device), budget)
    for mine, expected in zip(found, budget_by_turns(visible, logical, budget), strict=True):
        assert torch.equal(mine.cpu(), expected)


# --- a whole step ------------------------------------------------------------------------------------------------


def with_tickets(kv: RaggedKV) -> RaggedKV:
    """The lists of all sequences are called complete, as an earlier call leaves them."""
    tickets = torch.tensor([[0], [1]], dtype=torch.int32, device=kv.lengths.device)
    return replace(kv, tickets=tickets.repeat(1, len(kv.lengths)))


def check_step(
    case: Case,
    backend: str,
    device: str = "cpu",
    *,
    group: int | None = None,
    overlap: bool = True,
    budget: PageBudget | None = None,
) -> None:
    """A token of each sequence is appended, pages are chosen and attended to, each by its definition."""
    draw, size, heads = case.draw, case.size, case.heads
    group, dtype = group or draw.rng.choice(GROUPS), case.kv.keys.dtype
    case.set_bounds()
    sequences = len(case.lengths)
    new, new_values = (draw.states(sequences, 1, part.shape[1], dtype) for part in (case.kv.keys, case.kv.values))
    query = draw.states(sequences * group, 1, case.kv.keys.shape[1], dtype).unflatten(0, (-1, group))
    budget = budget or random_budget(draw, size, heads)
    count_up(case.kv, 1)
    logical = random_logical(case)
    before, read = (part[:, 0].tolist() for part in budget_by_turns(
        case.kv.lengths.long()[:, None], logical.repeat_interleave(heads)[:, None], budget
    ))  # fmt: skip
    most = max(before) + draw.rng.choice((0, 1, 16))
    on = case.to(device)
    on.kv = with_tickets(replace(on.kv, longest=most * size + size, heads=heads))
    keys_read = torch.full((sequences, 1, 1), -7, dtype=torch.int32, device=device)
    on_query, tokens = query.to(device), logical.to(device)
    states = new.to(device), new_values.to(device)
    fused = draw.chance(0.7)
    if not fused:
        append(on.kv, *states, on.bounds, backend=backend)
    width = max(read) + 1 + draw.rng.choice((0, 3))
    options = {"width": width, "pages": most, "overlap": overlap, "backend": backend, "new": states if fused else None}
    lists = choose_pages(on_query, on.bounds, on.kv, tokens, budget, **options)
    out, _ = paged_decode(on_query, on.kv, lists, scale=0.2, keys_read=keys_read, backend=backend)

    assert (lists.ready is not None) == bool(lists.in_use) == (overlap and backend == "triton")
    for s, (start, length) in enumerate(zip(case.kv.starts.tolist(), case.lengths, strict=True)):
        if length:
            case.kv.keys[start + length - 1], case.kv.values[start + length - 1] = new[s, 0], new_values[s, 0]
    case.set_bounds([max(0, length - 1) for length in case.lengths])
    on.same(case)
    assert on.kv.tickets[0].tolist() == [0] * sequences
    for s, length in enumerate(case.lengths):
        if not length:
            assert int(lists.counts[s]) == 0 and not bool(out[s].any()) and int(keys_read[s]) == 0
            continue
        start, first = int(case.kv.starts[s]), int(case.bounds.first[s])
        q = query[s, :, 0].double()
        low, high = (bound[first : first + before[s]].double() for bound in (case.bounds.low, case.bounds.high))
        scores = torch.maximum(q[:, None] * low, q[:, None] * high).sum((0, 2))
        assert int(lists.counts[s]) == read[s] + 1, (s, length)
        listed = lists.ids[s, 0, 0, : read[s] + 1].tolist()
        assert listed == sorted(set(listed)) and listed[-1] == before[s] and listed[0] >= 0
        taken = torch.zeros(before[s], dtype=torch.bool)
        taken[listed[:-1]] = True
        if 0 < read[s] < before[s]:
            # Scores that are equal but for rounding may change places.
            assert scores[taken].min() >= scores[~taken].max() - 2e-4 - 1e-5 * scores.abs().max()
        place = torch.arange(length)
        seen = torch.isin(place // size, torch.tensor(listed))
        assert int(keys_read[s]) == int(seen.sum())
        keys, values = (part[start : start + length][seen].double() for part in (case.kv.keys, case.kv.values))
        expected = (q @ keys.T * 0.2).softmax(-1) @ values
        error = float((out[s, :, 0].cpu().double() - expected).norm() / expected.norm())
        assert error < STEP_ERROR[dtype], (s, error)


# --- compaction --------------------------------------------------------------------------------------------------


def check_compact(draw: Draw, dtype: torch.dtype, backend: str, device: str = "cpu", longest: int = 200) -> None:
    heads, length = draw.rng.choice((1, 3, 8)), draw.rng.randint(1, longest)
    dims = [draw.rng.choice((16, 24, 64, 80)) for _ in range(2)]
    states = [draw.states(heads, length, dim, dtype) for dim in dims]
    width = draw.rng.randint(1, length)
    counts = [draw.rng.choice((0, 1, width, draw.rng.randint(0, width))) for _ in range(heads)]
    kept = [sorted(draw.rng.sample(range(length), count)) for count in counts]
    indices = torch.full((heads, width), draw.rng.choice((-1, 10**12)))
    starts, end = [0] * heads, 2
    for head in draw.rng.sample(range(heads), heads):
        starts[head], end = end, end + counts[head] + draw.rng.choice((0, 1, 17))
        indices[head, : counts[head]] = torch.tensor(kept[head], dtype=torch.int64)
    outs = [torch.full((end + 1, dim), 7.0, dtype=dtype) for dim in dims]
    on_device = [out.to(device) for out in (out.clone() for out in outs)]
    table = torch.tensor(counts, dtype=draw.rng.choice((torch.int32, torch.int64)))
    compact(
        *(state.to(device) for state in states),
        *(part.to(device) for part in (indices, table, torch.tensor(starts))),
        *on_device,
        backend=backend,
    )
    for state, out, found in zip(states, outs, on_device, strict=True):
        for head, ids in enumerate(kept):
            out[starts[head] : starts[head] + len(ids)] = state[head, ids]
        assert torch.equal(found.cpu(), out)
