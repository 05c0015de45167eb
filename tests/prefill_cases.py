"""Random cases of block-sparse prefill and what they must give, for the tests of its backends.

Tiles and columns are drawn as booleans; lists are written from them by the definition of `Blocks`, and attention
is computed from them in fp64 over all pairs of a row. Nothing of the package is used but the class `Blocks`. It
all works on the device of the source of random numbers.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_sparse.kernels.types import Blocks


def interpreter_missing() -> str | None:
    """Why Triton sources cannot run under Triton's interpreter here, or None when they can (see conftest.py)."""
    try:
        triton = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
        numpy = tuple(map(int, importlib.metadata.version("numpy").split(".")[:2]))
    except importlib.metadata.PackageNotFoundError as error:
        return f"the package {error.name} is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton compiles for the GPU here; test_gpu_prefill.py is for that"
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of Triton 3.6 does not work with numpy 2.4"
    if triton >= (3, 9):
        return "the interpreter of Triton 3.9 takes the mask of a scalar and a block for numbers"
    return None


#: What lies behind the valid entries of lists: no operator may look there.
POISON = 10**6
#: Relative error of an output, by its dtype. A softcap multiplies the rounding of what it bounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CAP_ERROR = 4e-7

KINDS = (None, "shared", "own")
FORMS = ("apart", "heads", "tokens", "packed")


class Draw:
    """A source of random choices, and of random tensors on a device."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self.rng = random.Random(seed)
        self.device = torch.device(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Row:
    """A layout, and the keys `(H, n_q, L)` bool that each query block reads; its queries see those not after them."""

    layout: Blocks
    keys: Tensor

    def pairs(self) -> Tensor:
        """`(H, L, L)` bool: which query sees which key."""
        place = torch.arange(self.layout.length, device=self.keys.device)
        return self.keys[:, place // self.layout.block_q] & (place[None, :] <= place[:, None])


def random_row(draw: Draw, heads: int, length: int, block_q: int, block_k: int, kind: str | None) -> Row:
    """Heads of very different densities; rows of tiles that are full, or hold no more than their first query needs.

    `kind` says which single key columns there are: None, `shared` or `own` lists. Then they, not tiles, give some
    query blocks the key that their first query needs.
    """
    n_q, n_k = -(-length // block_q), -(-length // block_k)
    place = torch.arange(length, device=draw.device)
    first = torch.arange(0, length, block_q, device=draw.device)
    last = torch.clamp(first + block_q, max=length) - 1
    causal = torch.arange(n_k, device=draw.device) * block_k <= last[:, None]

    shares = torch.tensor([draw.rng.choice((0.02, 0.1, 0.4, 0.9)) for _ in range(heads)], device=draw.device)
    tiles = draw.uniform(heads, n_q, n_k) < shares[:, None, None]
    fate = draw.uniform(heads, n_q, 1)
    tiles = ((tiles & (fate > 0.1)) | (fate > 0.9)) & causal

    # A key that the first query of each block may see: key 0, its own place, or one between.
    anchor = (draw.uniform(heads, n_q) * 3 - 1).clamp(0, 1) * first
    anchor = anchor.long().clamp(max=length - 1)
    by_column = draw.uniform(heads, n_q) < (0.0 if kind is None else 0.4)
    tiles |= (place[:n_k] == (anchor // block_k)[..., None]) & ~by_column[..., None]
    # At least one tile each: any that the block's last query may see.
    some = (draw.uniform(heads, n_q) * (last // block_k + 1)).long()
    tiles |= (place[:n_k] == some[..., None]) & ~tiles.any(-1, keepdim=True)

    read = tiles.repeat_interleave(block_k, -1)[..., :length]
    indices, counts = lists(tiles, draw.rng.choice((0, 1, 5)))
    if kind is None:
        return Row(Blocks(indices, counts, length, block_q, block_k), read)
    shares = torch.tensor([draw.rng.choice((0.0, 0.0, 0.02, 0.3)) for _ in range(heads)], device=draw.device)
    visible = place <= last[:, None]
    if kind == "shared":
        chosen = draw.uniform(heads, length) < shares[:, None]
        chosen[:, 0] |= (by_column & ~read[..., 0]).any(1)
        columns, _ = lists(chosen[:, None], draw.rng.choice((0, 7)))
        column_counts = (chosen[:, None] & visible).sum(-1, dtype=torch.int32)
        read = read | (chosen[:, None] & visible)
    else:
        wanted = draw.uniform(heads, n_q, length) < shares[:, None, None]
        wanted |= by_column[..., None] & (place == anchor[..., None])
        wanted &= visible & ~read
        columns, column_counts = lists(wanted, draw.rng.choice((0, 7)))
        read = read | wanted
    return Row(Blocks(indices, counts, length, block_q, block_k, columns, column_counts), read)


def lists(mask: Tensor, more: int) -> tuple[Tensor, Tensor]:
    """Ids `(H, n, W)` int32 of the True entries of `(H, n, m)`, ascending, then poison; counts `(H, n)` int32."""
    counts = mask.sum(-1, dtype=torch.int32)
    ids = torch.where(mask, torch.arange(mask.shape[-1], device=mask.device), POISON).to(torch.int32).sort(-1).values
    width = int(counts.max())
    poison = ids.new_full((*mask.shape[:-1], more), POISON)
    return torch.cat([ids[..., :width], poison], -1).contiguous(), counts


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Row,
    scale: float,
    softcap: float | None,
    sink: Tensor | None = None,
) -> Tensor:
    """The definition: `(H, L, D_v)` fp64 softmax attention of each query to exactly the keys that it sees, times
    sigmoid(lse - sink) where there are sinks `(H,)`."""
    group = len(query) // len(key)
    result = []
    for head, seen in enumerate(row.pairs()):
        scores = query[head].double() @ key[head // group].double().T * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = torch.where(seen, scores, -torch.inf)
        weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
        result.append(weights @ value[head // group].double() / weights.sum(-1, keepdim=True))
        if sink is not None:
            result[-1] *= torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sink[head].double())
    return torch.stack(result)


def store(draw: Draw, states: Sequence[Tensor], form: str) -> tuple[list[Tensor], list[Tensor]]:
    """Rows `(H, L, D)` as views of what models hold, and the buffers, NaN wherever no row lies.

    `apart`: tensors of their own; `heads`, `tokens`: a padded batch `(B, H, M, D)` or `(B, M, H, D)`, padded on either
    side; `packed`: one sequence `(M, H, D)`, a few tokens apart.
    """
    if form == "apart":
        buffers = [state.clone() for state in states]
        return buffers, buffers
    heads, _, dim = states[0].shape
    lengths = [state.shape[1] for state in states]
    if form == "packed":
        gap = draw.rng.choice((0, 3))
        buffer = torch.full((sum(lengths) + gap * len(states), heads, dim), torch.nan).to(states[0])
        starts = [sum(lengths[:i]) + gap * i for i in range(len(lengths))]
        views = [buffer[start : start + length].transpose(0, 1) for start, length in zip(starts, lengths, strict=True)]
    else:
        room = max(lengths) + draw.rng.choice((0, 5))
        shape = (len(states), heads, room, dim) if form == "heads" else (len(states), room, heads, dim)
        buffer = torch.full(shape, torch.nan).to(states[0])
        batch = buffer if form == "heads" else buffer.transpose(1, 2)
        left = draw.rng.random() < 0.5
        views = [
            part[:, room - length :] if left else part[:, :length] for part, length in zip(batch, lengths, strict=True)
        ]
    for view, state in zip(views, states, strict=True):
        view.copy_(state)
    return views, [buffer]


#: Ways in which memory is laid out that models use rarely, or never.
STRANGE = ("one product for all", "expanded", "every other token", "wider heads", "odd address", "dimensions outside")


def strange_states(draw: Draw, name: str, length: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values `(2, L, D)`."""

    def normal(*shape: int) -> Tensor:
        return draw.normal(*shape).to(dtype)

    if name == "one product for all":
        return list(normal(length, 6, dim).transpose(0, 1).split(2))
    if name == "expanded":
        return [normal(2, length, dim), *(normal(1, length, dim).expand(2, -1, -1) for _ in range(2))]
    if name == "every other token":
        return [normal(2, 2 * length, dim)[:, ::2] for _ in range(3)]
    if name == "wider heads":
        return [normal(2, length, dim + 13)[..., 5 : dim + 5] for _ in range(3)]
    if name == "odd address":
        return [normal(2 * length * dim + 1)[1:].view(2, length, dim) for _ in range(3)]
    assert name == "dimensions outside"
    return [normal(2, dim, length).transpose(1, 2) for _ in range(3)]


@dataclass(frozen=True)
class Call:
    """Arguments of one call of the operator with several rows, and what it must give."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    layouts: list[Blocks]
    outs: list[Tensor]
    out_buffers: list[Tensor]
    scale: float
    softcap: float | None
    expected: list[Tensor]
    sink: Tensor | None = None

    @property
    def inputs(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Blocks]]:
        return self.queries, self.keys, self.values, self.layouts

    def check(self, outs: Sequence[Tensor] | None = None) -> None:
        """Whether `outs`, by default those of the call, are right, and nothing was written beside them."""
        for out, expected in zip(self.outs if outs is None else outs, self.expected, strict=True):
            assert_close(out, expected, self.softcap)
        if outs is None:
            written = sum(buffer.numel() - int(buffer.isnan().sum()) for buffer in self.out_buffers)
            assert written == sum(out.numel() for out in self.outs), "written outside the rows"


def random_call(
    draw: Draw,
    lengths: Sequence[int],
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    blocks: tuple[int, int],
    *,
    kind: str | None = None,
    softcap: float | None = None,
    poison: bool = True,
    value_dim: int | None = None,
    sinks: bool = False,
) -> Call:
    """Rows of `lengths` for `heads` = (query heads, KV heads); poisoned: keys that no head reads are NaN.

    `value_dim`: of values, where it is not that of keys; `sinks`: whether heads have some, of the dtype.
    """
    rows = [random_row(draw, heads[0], length, *blocks, kind) for length in lengths]
    sharpness = draw.rng.choice((1.0, 3.0))
    states = [
        [(draw.normal(number, length, size) * factor).to(dtype) for length in lengths]
        for number, factor, size in (
            (heads[0], sharpness, dim),
            (heads[1], 1.0, dim),
            (heads[1], 1.0, value_dim or dim),
        )
    ]
    sink = (draw.normal(heads[0]) * 3).to(dtype) if sinks else None
    scale = draw.rng.choice((dim**-0.5, 0.07))
    expected = [attention(*row, scale, softcap, sink) for row in zip(*states, rows, strict=True)]
    if poison:
        for row, key, value in zip(rows, *states[1:], strict=True):
            read = row.keys.any(1).reshape(heads[1], -1, row.layout.length).any(1)
            read[:, : row.layout.block_k] = True  # `gather` fills its batches with the first block
            for state in (key, value):
                state[~read] = torch.nan
    outs = [query.new_full((*query.shape[:2], value_dim or dim), torch.nan) for query in states[0]]
    forms = [draw.rng.choice(FORMS) for _ in range(4)]
    (queries, _), (keys, _), (values, _), (outs, buffers) = (
        store(draw, state, form) for state, form in zip((*states, outs), forms, strict=True)
    )
    layouts = [row.layout for row in rows]
    return Call(queries, keys, values, layouts, outs, buffers, scale, softcap, expected, sink)


def assert_close(out: Tensor, expected: Tensor, softcap: float | None = None, factor: float = 1.0) -> None:
    """No NaN is left, and the error is small: of the whole tensor, of each query's output, of each element."""
    tolerance = factor * (TOLERANCE[out.dtype] + CAP_ERROR * (softcap or 0.0))
    difference = out.double() - expected
    assert not bool(out.isnan().any()), f"{int(out.isnan().sum())} of {out.numel()} are NaN"
    error = float(difference.norm() / expected.norm())
    assert error <= tolerance, f"relative error {error:.2e} exceeds {tolerance:.0e}"
    worst = float((difference.norm(dim=-1) / expected.norm(dim=-1)).max())
    assert worst <= 6 * tolerance, f"relative error {worst:.2e} of a query exceeds {6 * tolerance:.0e}"
    most = float(difference.abs().max())
    bound = 4 * tolerance * max(1.0, float(expected.abs().max()))
    assert most <= bound, f"error {most:.2e} of an element exceeds {bound:.0e}"
