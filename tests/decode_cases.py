"""Random cases of decode attention and what they must give, for the tests of its backends.

Which keys a token reads is drawn first; lists of pages are written from that by the definition of `Reads`, and
attention is computed from it in fp64. It all works on the device of the source of random numbers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lm_eval_sparse.kernels.decode import paged_decode
from lm_eval_sparse.kernels.types import RaggedKV, Reads

#: Relative error of an output, by its dtype. A softcap multiplies the rounding of what it bounds.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CAP_ERROR = 4e-7
#: What may stand in places of lists that are not in use.
GARBAGE = (-(2**31), -1, 0, 3, 10**6, 2**31 - 1)


class Draw:
    """A source of random choices, and of random tensors on a device."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self.rng = random.Random(seed)
        self.device = torch.device(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Case:
    """Arguments of one call, and what it must give.

    Attributes:
        seen: for each sequence `(Gs, T, L)` bool, the keys that its tokens read.
        live: sequences whose length is not 0.
        expected: `(S, G, T, D_v)` fp64.
    """

    query: Tensor
    kv: RaggedKV
    selection: Reads | None
    scale: float
    softcap: float | None
    window: int | None
    seen: list[Tensor]
    live: list[int]
    expected: Tensor
    sink: Tensor | None = None

    def run(self, backend: str, keys_read: Tensor | None = None) -> Tensor:
        out, used = paged_decode(
            self.query,
            self.kv,
            self.selection,
            scale=self.scale,
            softcap=self.softcap,
            window=self.window,
            backend=backend,
            keys_read=keys_read,
            sink=self.sink,
        )
        assert used == backend
        return out

    def check(self, backend: str) -> None:
        """Run, and compare outputs and numbers of keys with the definition."""
        read = torch.stack([seen.sum(-1) for seen in self.seen])
        keys_read = torch.full(read.shape, -7, dtype=torch.int32, device=read.device)
        out = self.run(backend, keys_read)
        assert torch.equal(keys_read, read.int()), f"keys read {keys_read.tolist()}, expected {read.tolist()}"
        self.close(out)

    def close(self, out: Tensor, factor: float = 1.0) -> None:
        assert out.shape == self.expected.shape and out.dtype == self.query.dtype
        free = [s for s in range(len(out)) if s not in self.live]
        assert not bool(out[free].any()), "an output of a sequence of length 0 is not 0"
        if self.live:
            assert_close(out[self.live], self.expected[self.live], self.softcap, factor)


def assert_close(out: Tensor, expected: Tensor, softcap: float | None = None, factor: float = 1.0) -> None:
    """No NaN is left, and the error is small: of the whole tensor, of each query's output, of each element."""
    tolerance = factor * (TOLERANCE[out.dtype] + CAP_ERROR * (softcap or 0.0) * (out.dtype != torch.float64))
    difference = out.double() - expected
    assert not bool(out.isnan().any()), f"{int(out.isnan().sum())} of {out.numel()} are NaN"
    error = float(difference.norm() / expected.norm())
    assert error <= tolerance, f"relative error {error:.2e} exceeds {tolerance:.0e}"
    worst = float((difference.norm(dim=-1) / expected.norm(dim=-1)).max())
    assert worst <= 6 * tolerance, f"relative error {worst:.2e} of a query exceeds {6 * tolerance:.0e}"
    most = float(difference.abs().max())
    bound = 4 * tolerance * max(1.0, float(expected.abs().max()))
    assert most <= bound, f"error {most:.2e} of an element exceeds {bound:.0e}"


def random_kv(draw: Draw, lengths: Sequence[int], dim: int, value_dim: int, dtype: torch.dtype) -> RaggedKV:
    """Sequences in random order in the storage, with poisoned gaps before, between and behind them.

    At times they lie equally far apart, as in a cache of a row. Where nobody is, `starts` is garbage.
    """
    poison = draw.rng.choice((torch.nan, 1e30))
    order = draw.rng.sample(range(len(lengths)), len(lengths))
    apart = draw.rng.choice((None, max(lengths) + 3))
    starts, end = [0] * len(lengths), draw.rng.randrange(1, 9)
    for sequence in order:
        starts[sequence] = end if lengths[sequence] else draw.rng.choice((0, -(10**12), 10**12))
        end += lengths[sequence] + draw.rng.randrange(0, 9) if apart is None else apart
    end += draw.rng.randrange(1, 9)
    keys, values = (torch.full((end, width), poison, device=draw.device).to(dtype) for width in (dim, value_dim))
    for start, length in zip(starts, lengths, strict=True):
        if length:
            keys[start : start + length] = draw.normal(length, dim).to(dtype)
            values[start : start + length] = draw.normal(length, value_dim).to(dtype)
    return RaggedKV(
        keys,
        values,
        torch.tensor(starts, device=draw.device),
        torch.tensor(lengths, dtype=torch.int32, device=draw.device),
        max(lengths) + draw.rng.choice((0, 1, 700)),
    )


def random_pages(
    draw: Draw, lengths: Sequence[int], lists: int, steps: int, page_size: int
) -> tuple[Reads, list[Tensor]]:
    """Pages of each token, few, many or all, and the keys `(Gs, T, L)` that they hold and the token sees."""
    chosen, seen = {}, []
    for s, length in enumerate(lengths):
        keys = torch.zeros(lists, steps, length, dtype=torch.bool)
        for g in range(lists if length else 0):
            for t in range(steps):
                visible = length - steps + 1 + t
                pages = -(-visible // page_size)
                number = draw.rng.choice((1, pages, draw.rng.randrange(1, pages + 1)))
                chosen[s, g, t] = sorted(draw.rng.sample(range(pages), number))
                place = torch.arange(length)
                keys[g, t] = torch.isin(place // page_size, torch.tensor(chosen[s, g, t])) & (place < visible)
        seen.append(keys.to(draw.device))
    width = max(map(len, chosen.values()), default=1) + draw.rng.choice((0, 1, 9))
    ids = torch.tensor(draw.rng.choices(GARBAGE, k=len(lengths) * lists * steps * width))
    ids = ids.to(torch.int32).reshape(len(lengths), lists, steps, width)
    counts = torch.tensor(draw.rng.choices(GARBAGE, k=len(lengths) * lists * steps)).to(torch.int32)
    counts = counts.reshape(ids.shape[:3])
    for place, pages in chosen.items():
        ids[place][: len(pages)] = torch.tensor(pages)
        counts[place] = len(pages)
    return Reads(ids.to(draw.device), counts.to(draw.device), page_size), seen


def dense_keys(
    lengths: Sequence[int], steps: int, window: int | None, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """For each sequence `(1, T, L)` bool."""
    seen = []
    for length in lengths:
        place = torch.arange(length, device=device)
        visible = length - steps + 1 + torch.arange(steps, device=device)[:, None]
        keys = place < visible
        if window is not None:
            keys &= place >= visible - window
        seen.append(keys[None] if length else torch.zeros(1, steps, 0, dtype=torch.bool, device=device))
    return seen


def attention(
    query: Tensor,
    kv: RaggedKV,
    seen: Sequence[Tensor],
    scale: float,
    softcap: float | None,
    sink: Tensor | None = None,
) -> Tensor:
    """The definition: `(S, G, T, D_v)` fp64 softmax attention of each token to exactly the keys that it reads, times
    sigmoid(lse - sink) where there are sinks `(kv.heads * G,)`."""
    out = torch.zeros(*query.shape[:3], kv.values.shape[-1], dtype=torch.float64, device=query.device)
    for s, (start, length) in enumerate(zip(kv.starts.tolist(), kv.lengths.tolist(), strict=True)):
        if not length:
            continue
        key, value = (held[start : start + length].double() for held in (kv.keys, kv.values))
        scores = query[s].double() @ key.T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = torch.where(seen[s], scores, -torch.inf)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        out[s] = weights @ value / weights.sum(-1, keepdim=True)
        if sink is not None:
            own = sink.double().view(kv.heads, -1, 1, 1)[s % kv.heads]
            out[s] *= torch.sigmoid(scores.logsumexp(-1, keepdim=True) - own)
    return out


def random_case(
    draw: Draw,
    lengths: Sequence[int],
    group: int,
    steps: int,
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    *,
    page_size: int | None = None,
    own: bool = False,
    softcap: float | None = None,
    window: int | None = None,
    poison: bool = True,
    heads: int = 1,
    sinks: bool = False,
) -> Case:
    """Dense without a page size. Poisoned: keys that no token reads are NaN, which only `naive` may look at."""
    kv = replace(random_kv(draw, lengths, dim, value_dim, dtype), heads=heads)
    sink = (draw.normal(heads * group) * 3).to(dtype) if sinks else None
    # As models make them: a view of (S, T, G, D).
    query = (draw.normal(len(lengths), steps, group, dim) * draw.rng.choice((1.0, 3.0))).to(dtype).transpose(1, 2)
    selection, seen = None, dense_keys(lengths, steps, window, draw.device)
    if page_size is not None:
        selection, seen = random_pages(draw, lengths, group if own else 1, steps, page_size)
        selection.check(kv)
    scale = draw.rng.choice((dim**-0.5, 0.2))
    expected = attention(query, kv, seen, scale, softcap, sink)
    if poison:
        for start, keys in zip(kv.starts.tolist(), seen, strict=True):
            if keys.shape[-1]:
                unread = start + (~keys.flatten(0, 1).any(0)).nonzero().flatten()
                kv.keys[unread], kv.values[unread] = torch.nan, torch.nan
    live = [s for s, length in enumerate(lengths) if length]
    return Case(query, kv, selection, scale, softcap, window, seen, live, expected, sink)


def every_page(kv: RaggedKV, lists: int, steps: int, page_size: int) -> Reads:
    width = -(-kv.longest // page_size)
    pages = torch.arange(width, dtype=torch.int32, device=kv.lengths.device)
    pages = pages.expand(len(kv.lengths), lists, steps, width).contiguous()
    counts = (-(-kv.visible(steps) // page_size)).to(torch.int32)[:, None].expand(-1, lists, -1).contiguous()
    selection = Reads(pages, counts, page_size)
    selection.check(kv)
    return selection


def one_of(case: Case, place: int) -> Case:
    """The call with one of its sequences, in a storage of its own."""
    start, length = int(case.kv.starts[place]), int(case.kv.lengths[place])
    part = slice(place, place + 1)
    stored = slice(start, start + length) if length else slice(0, 1)
    kv = RaggedKV.of(case.kv.keys[stored].clone(), case.kv.values[stored].clone(), [0], [length])
    selection = case.selection
    if selection is not None:
        selection = replace(selection, ids=selection.ids[part], counts=selection.counts[part])
    return replace(
        case,
        query=case.query[part],
        kv=kv,
        selection=selection,
        seen=case.seen[part],
        live=[0] if length else [],
        expected=case.expected[part],
    )
