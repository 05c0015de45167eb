"""Twelve methods, and FlexPrefill's coverage by tokens, against `literal_methods`: what is selected, entry for entry.

The library scores in fp32. Where it selects otherwise than the transcription, the difference has to be one of rounding:
the other selection has to meet the definition with scores that are `NEAR` to the true ones. Such lists are counted, and
must be few. Inputs are drawn anew in every run; LITERAL_SEED=<seed> repeats one.

Long, since twelve methods are compared here, natively and at sparsities.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import literal_methods as literal
import numpy as np
import pytest
import torch
from literal_methods import Row, Sets
from torch import Tensor

from lm_eval_sparse.kernels.types import Blocks, Keep, RaggedKV, Reads
from lm_eval_sparse.methods import METHODS
from lm_eval_sparse.methods.base import Layer
from lm_eval_sparse.testing import Decoding, select

#: Share of a row's sum below which fp32 and fp64 may rightly disagree.
NEAR = 5e-6
#: Length, query heads, KV heads.
SHAPES = ((63, 4, 2), (203, 3, 1), (331, 2, 2))
SPARSITIES = (0.5, 0.8, 0.95)
DIM = 16


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seed() -> int:
    drawn = int(os.environ.get("LITERAL_SEED", random.SystemRandom().randrange(2**31)))
    print(f"LITERAL_SEED={drawn}")  # pytest shows it when the test fails
    return drawn


@dataclass
class Prompt:
    """Queries and keys as the library gets them, and in fp64."""

    query: Tensor
    key: Tensor
    scale: float
    softcap: float | None

    @property
    def arguments(self) -> dict[str, Any]:
        return {"query": self.query, "key": self.key, "scale": self.scale, "softcap": self.softcap}

    @property
    def exact(self) -> tuple[np.ndarray, np.ndarray, float, float | None]:
        return self.query.double().numpy(), self.key.double().numpy(), self.scale, self.softcap


def prompt(seed: int, length: int, heads: int, kv_heads: int, softcap: float | None = None) -> Prompt:
    """Random queries and keys; some keys are sought by all queries, so that attention is uneven."""
    generator = torch.Generator().manual_seed(seed)
    query = 1.5 * torch.randn(heads, length, DIM, generator=generator)
    key = torch.randn(kv_heads, length, DIM, generator=generator)
    marked = torch.randperm(length, generator=generator)[: length // 20]
    query[..., 0] += 2
    key[:, marked, 0] += 2 * torch.rand(len(marked), generator=generator)
    return Prompt(query, key, DIM**-0.5, softcap)


# ---------------------------------------------------------------------------------------------- what may be of rounding


def missing(row: Row, taken: set[int]) -> float:
    """Share of a row's sum that is not taken."""
    return math.fsum(s for j, s in enumerate(row.scores) if j not in taken) / math.fsum(row.scores)


def between(row: Row, got: set[int]) -> tuple[float, float]:
    """A row takes exactly these while `rest` is at least the first and below the second."""
    own = got - row.forced
    return missing(row, got), missing(row, got - {min(own, key=lambda j: row.scores[j])}) if own else math.inf


def covered(rows: list[Row], got: Sets, rest: float) -> int:
    """Check what rows take natively; returns how many are not as in exact arithmetic."""
    different = 0
    for row, own in zip(rows, got, strict=True):
        if own == row.cover(rest):
            continue
        different += 1
        ranking(row, own)
        low, high = between(row, own)
        assert low <= rest + NEAR and high > rest - NEAR, (low, rest, high, sorted(own), sorted(row.cover(rest)))
    return different


def ranking(row: Row, got: set[int]) -> None:
    """The forced ones are there, and nothing that is not taken is above what is."""
    assert row.forced <= got, (sorted(row.forced - got), sorted(got))
    own, left = got - row.forced, set(range(len(row.scores))) - got
    if own and left:
        unit = NEAR * sum(map(abs, row.scores))
        assert min(row.scores[j] for j in own) >= max(row.scores[j] for j in left) - unit, sorted(own)


def divided(rows: list[Row], got: Sets, budget: float) -> int:
    """Check what rows take of a common budget; returns how many are not as in exact arithmetic.

    Two costs may be as near to the budget as each other: either is right.
    """
    rest, want = literal.one_rest(rows, budget)
    if got == want:
        return 0
    bounds = [between(row, own) for row, own in zip(rows, got, strict=True)]
    low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
    assert low <= high + NEAR, ("no common rest", low, high, rest)
    middle = low if high == math.inf else (low + high) / 2
    different = covered(rows, got, middle)
    spent, best = (
        abs(sum(row.costs[j] for row, own in zip(rows, sets, strict=True) for j in own) - budget)
        for sets in (got, want)
    )
    slack = 1e-6 * budget + different * max(max(row.costs) for row in rows)
    assert spent <= best + slack, (spent, best, budget, rest, middle)
    return different


def ranked_alike(scores: list[float], got: set[int], want: set[int]) -> int:
    """Check two sets of the same size by one score; returns 1 where they are not the same."""
    if got == want:
        return 0
    assert len(got) == len(want), (len(got), len(want), sorted(got ^ want))
    unit = NEAR * max(map(abs, scores))
    more, less = (sorted(scores[j] for j in part) for part in (got - want, want - got))
    assert all(abs(a - b) <= unit for a, b in zip(more, less, strict=True)), (more, less, sorted(got ^ want))
    return 1


def few(different: int, lists: int) -> None:
    assert different <= 1 + lists // 50, (different, lists)


# ----------------------------------------------------------------------------------------------------- what is returned


def blocks_of(layout: Blocks) -> Sets:
    """Key blocks by head and query block."""
    layout.check(layout.heads)
    assert layout.columns is None and layout.block_q == layout.block_k
    return [set(np.flatnonzero(row).tolist()) for head in layout.mask().numpy() for row in head]


def kept(keep: Keep, length: int) -> Sets:
    keep.check(len(keep.ids), length)
    return [set(row[:count].tolist()) for row, count in zip(keep.ids, keep.counts.tolist(), strict=True)]


def density(layout: Blocks) -> float:
    return float(layout.executed_pairs().double().mean()) / (layout.length * (layout.length + 1) / 2)


# -------------------------------------------------------------------------------------------------------------- prefill


@pytest.mark.parametrize(("length", "heads", "kv_heads"), SHAPES)
def test_blocks_by_mass(length: int, heads: int, kv_heads: int, seed: int) -> None:
    inputs = prompt(seed, length, heads, kv_heads)
    query, key, scale, _ = inputs.exact
    cls, lists, different = METHODS["xattention"], 0, 0
    asked: list[tuple[dict[str, Any], float | None]] = [
        ({"threshold": mass, "block_size": block}, None)
        for mass, block in ((0.3, 16), (0.6, 32), (0.9, 16), (0.5, 64), (0.7, 64), (0.85, 64))
    ]
    asked += [({}, sparsity) for sparsity in SPARSITIES]
    for knobs, sparsity in asked:
        stride = 4 if sparsity == 0.8 else 16 if knobs.get("threshold") == 0.3 else 8
        layout = select(cls(**knobs, stride=stride), **inputs.arguments, sparsity=sparsity)
        block = layout.block_q
        assert sparsity is not None or block == knobs["block_size"]
        scores = literal.xattention_scores(query, key, scale, block, stride)
        rows, got = literal.block_rows(scores, length, block), blocks_of(layout)
        lists += len(rows)
        if sparsity is None:
            different += covered(rows, got, 1 - knobs["threshold"])
        else:
            different += divided(rows, got, (1 - sparsity) * heads * length * (length + 1) / 2)
    few(different, lists)


@pytest.mark.parametrize(("length", "heads", "kv_heads"), SHAPES)
def test_oracle_of_blocks(length: int, heads: int, kv_heads: int, seed: int) -> None:
    """As many blocks a row as asked for, those with most of its true attention; a sparsity is met by brute force."""
    inputs = prompt(seed, length, heads, kv_heads, 3.0 if heads == 3 else None)
    query, key, scale, softcap = inputs.exact
    asked: list[tuple[dict[str, Any], float | None]] = [
        ({"top_k": number, "block_size": block}, None) for number, block in ((2, 16), (3, 32), (5, 16), (3, 64))
    ]
    asked += [({}, sparsity) for sparsity in SPARSITIES]
    for knobs, sparsity in asked:
        layout = select(METHODS["oracle_blocks"](**knobs), **inputs.arguments, sparsity=sparsity)
        block, number = layout.block_q, layout.blocks_q
        rows = literal.block_rows(literal.oracle_block_scores(query, key, scale, softcap, block), length, block)
        got = blocks_of(layout)
        for row, own in zip(rows, got, strict=True):
            ranking(row, own)
        if sparsity is None:
            assert [len(own) for own in got] == [
                min(i + 1, knobs["top_k"]) for _ in range(heads) for i in range(number)
            ]
            continue

        def pairs(count: int, extra: int, block: int = block, number: int = number) -> int:
            """Of one head whose rows read so many blocks, and the last ones one more."""
            reads = [min(i + 1, count + (i >= number - extra)) for i in range(number)]
            triangles = sum(literal.tile_pairs(length, block, i, i) for i in range(number))
            return triangles + sum((k - 1) * literal.tile_pairs(length, block, i, 0) for i, k in enumerate(reads) if i)

        total = length * (length + 1) / 2
        offs = [abs(pairs(c, e) / total - 1 + sparsity) for c in range(2, number + 1) for e in range(number)]
        assert abs(density(layout) - 1 + sparsity) <= min(offs) + 1e-9


@pytest.mark.parametrize(("length", "heads", "kv_heads"), SHAPES)
def test_a_shape(length: int, heads: int, kv_heads: int, seed: int) -> None:
    inputs = prompt(seed, length, heads, kv_heads)
    for window, sinks in ((16, 16), (50, 16), (100, 40), (1, 1), (9999, 16)):
        layout = select(METHODS["a_shape"](local=window, sinks=sinks), **inputs.arguments)
        want = literal.a_shape(length, sinks, [-(-window // 16)] * -(-length // 16))
        assert layout.block_q == layout.block_k == 16
        assert all(np.array_equal(mask, want) for mask in layout.mask().numpy()), (window, sinks)
    for sparsity, sinks in ((0.3, 40), *((s, 16) for s in SPARSITIES)):
        layout = select(METHODS["a_shape"](sinks=sinks), **inputs.arguments, sparsity=sparsity)
        off, masks = literal.a_shapes(length, sinks, 1 - sparsity)
        for mask in layout.mask().numpy():
            assert any(np.array_equal(mask, want) for want in masks), (sparsity, mask.astype(int), off)


@pytest.mark.parametrize(("length", "heads", "kv_heads"), [*SHAPES, (331, 3, 1)])
@pytest.mark.parametrize("tau", [0, 0.35, 1])
def test_flexprefill_by_tokens(tau: float, length: int, heads: int, kv_heads: int, seed: int) -> None:
    inputs = prompt(seed, length, heads, kv_heads, 4.0 if heads == 3 else None)
    query, key, scale, softcap = inputs.exact
    near, compared = 0, 0

    def literally(block: int) -> list[literal.FlexHead]:
        return [literal.FlexHead.of(query[h], key[h * kv_heads // heads], scale, softcap, block) for h in range(heads)]

    for gamma, least in ((0.01, 0), (0.3, 0), (0.7, 40), (0.9, 16), (0.99, 0)):
        method = METHODS["flexprefill"](coverage="tokens", tau=tau, gamma=gamma, min_budget=least, block_size=16)
        layout = select(method, **inputs.arguments)
        layout.check(heads)
        for head, got in zip(literally(16), layout.mask().numpy(), strict=True):
            want, margin = head.by_tokens(gamma, tau, least)
            compared += 1
            near += margin < NEAR
            assert margin < NEAR or np.array_equal(got, want), (gamma, least, got.astype(int), want.astype(int))
    for sparsity in SPARSITIES:
        layout = select(METHODS["flexprefill"](coverage="tokens", tau=tau), **inputs.arguments, sparsity=sparsity)
        gamma, found = max(float(layout.knobs["gamma"]), 0.0), literally(layout.block_q)
        near += sum(bool(tau) and abs(head.distance - tau) < NEAR for head in found)
        thresholds = [head.thresholds(tau) for head in found]
        for own, got in zip(thresholds, layout.mask().numpy(), strict=True):
            # Tiles of the step at which the budget is full may be taken or left.
            sure = abs(own - gamma) > NEAR
            assert np.array_equal(got[sure], (own < gamma)[sure]), (sparsity, gamma, np.argwhere(got != (own < gamma)))
        best = nearest_step(thresholds, layout, 1 - sparsity)
        assert abs(density(layout) - (1 - sparsity)) <= best + 1e-9, (sparsity, gamma, density(layout), best)
    few(near, compared)


def nearest_step(thresholds: list[np.ndarray], layout: Blocks, share: float) -> float:
    """How near one gamma for all heads comes to a density, where steps are whole columns, bands or tiles."""
    number, total = layout.blocks_q, layout.heads * layout.length * (layout.length + 1) / 2
    steps: dict[float, int] = {}
    for own in thresholds:
        for i in range(number):
            for j in range(i + 1):
                steps.setdefault(own[i, j], 0)
                steps[own[i, j]] += literal.tile_pairs(layout.length, layout.block_q, i, j)
    cost, offs = 0, []
    for threshold in sorted(steps):
        cost += steps[threshold]
        offs.append(abs(cost / total - share))
    return min(offs)


# ------------------------------------------------------------------------------------------------------------- eviction


@pytest.mark.parametrize(("length", "heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("name", ["knorm", "streaming_llm", "tova", "h2o"])
def test_eviction(name: str, length: int, heads: int, kv_heads: int, seed: int) -> None:
    inputs = prompt(seed, length, heads, kv_heads, 3.0 if heads == 3 else None)
    query, key, scale, softcap = inputs.exact
    weights = literal.attention(query, key, scale, softcap)
    different, lists = 0, 0
    asked: list[tuple[int | None, float | None]] = [(c, None) for c in (7, length // 3, length, 9999)]
    for capacity, sparsity in asked + [(None, sparsity) for sparsity in SPARSITIES]:
        options: dict[str, Any] = {} if capacity is None else {"capacity": capacity}
        number = capacity if capacity is not None else literal.capacity_of(1 - sparsity, length)
        if name == "knorm":
            scores = [[-float(np.linalg.norm(k)) for k in own] for own in key]
            want = literal.knorm(key, number)
        elif name == "tova":
            scores = [literal.tova_scores(weights[:, -1])] * kv_heads
            want = [literal.best(scores[0], number)] * kv_heads
        elif name == "h2o":
            options["recent"] = recent = 0.25 if capacity == 7 else 0.5
            scores = literal.h2o_scores(weights, kv_heads)
            want = [literal.h2o(own, number, recent) for own in scores]
        else:
            sinks = 4 if sparsity is None else min(4, number // 4)  # what is always kept is a quarter at most
            options |= {"sinks": sinks} if sparsity is None else {}
            scores = [[0.0] * length] * kv_heads
            want = [literal.streaming_llm(range(length), number, sinks)] * kv_heads
        got = kept(select(METHODS[name](**options), **inputs.arguments, sparsity=sparsity), length)
        assert all(len(own) == min(number, length) for own in got), (capacity, sparsity, list(map(len, got)))
        for own, ours, other in zip(scores, got, want, strict=True):
            if name == "streaming_llm":
                assert ours == other, (capacity, sparsity, sorted(ours), sorted(other))
            different, lists = different + ranked_alike(own, ours, other), lists + 1
    few(different, lists)


@pytest.mark.parametrize("sparsity", [None, *SPARSITIES])
def test_streaming_llm_turns_keys(sparsity: float | None, seed: int) -> None:
    for length, heads, kv_heads in SHAPES:
        inputs = prompt(seed, length, heads, kv_heads)
        options = {"capacity": 40} if sparsity is None else {}
        layer = Layer(0, 1, heads, kv_heads, DIM, rope=lambda positions: (positions.cos(), positions.sin()))
        method = METHODS["streaming_llm"](rotate=True, **options)
        found = select(method, **inputs.arguments, sparsity=sparsity, layer=layer)
        number = 40 if sparsity is None else literal.capacity_of(1 - sparsity, length)
        plain = METHODS["streaming_llm"](**options)
        assert kept(found, length) == kept(select(plain, **inputs.arguments, sparsity=sparsity), length)
        want = literal.streaming_positions(length, number)
        for own, count in zip(found.positions.tolist(), found.counts.tolist(), strict=True):
            assert own[:count] == want


@pytest.mark.parametrize(("length", "heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("layers", [2, 5])
def test_pyramidkv(layers: int, length: int, heads: int, kv_heads: int, seed: int) -> None:
    different, lists = 0, 0
    for share in (0.4, 0.2, *(1 - sparsity for sparsity in SPARSITIES), 0.7):
        native = share in (0.4, 0.2)
        mean, total = literal.capacity_of(share, length), 0
        for index in range(layers):
            inputs = prompt(seed + index, length, heads, kv_heads, 3.0 if heads == 3 else None)
            query, key, scale, softcap = inputs.exact
            layer = Layer(index, layers, heads, kv_heads, DIM)
            more = {"capacity": mean, "sinks": 1, "local": 1, "beta": 5, "window": 20, "kernel": 5} if native else {}
            found = select(
                METHODS["pyramidkv"](**more), **inputs.arguments, layer=layer, sparsity=None if native else 1 - share
            )
            got = kept(found, length)
            asked = (mean if native else share * length) * literal.pyramid_share(
                index, layers, more.get("beta", 20), mean if native else share * length, length
            )
            number = len(got[0])
            assert abs(number - asked) <= 0.5 + 1e-9 or number == 1 > asked, (share, index, number, asked)
            total += number
            scores = literal.snapkv_scores(query, key, scale, softcap, more.get("window", 256), more.get("kernel", 21))
            sinks, local = (1, 1) if native else pyramid_forced(number)
            for own, ours in zip(scores, got, strict=True):
                want = literal.best(own, number, {*range(sinks), *range(length - local, length)})
                different, lists = different + ranked_alike(own, ours, want), lists + 1
        assert abs(total / (layers * length) - mean / length) <= max(0.01, 0.5 / length), (share, total)
    few(different, lists)


def pyramid_forced(capacity: int) -> tuple[int, int]:
    """First and last tokens of a layer that keeps so many: a quarter of them at most, as SnapKV shrinks them."""
    sinks = min(4, capacity // 4)
    return sinks, max(1, min(128, capacity // 4 - sinks))


# --------------------------------------------------------------------------------------------------------------- decode


@dataclass
class Steps:
    """Rows of a batch while `steps` new tokens of each are decoded.

    Attributes:
        query: `(S, G, T, D)`; cache: what holds the keys; evicted: tokens that each row has lost before.
    """

    query: Tensor
    cache: Decoding
    kv_heads: int
    scale: float
    softcap: float | None
    evicted: int

    def each(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, int]]:
        """Row, step, queries `(H, D)`, keys `(H_kv, n, D)` that they may see, and tokens so far, in fp64."""
        kv, steps = self.cache.kv, self.query.shape[2]
        for row in range(len(kv.lengths) // self.kv_heads):
            own = range(row * self.kv_heads, (row + 1) * self.kv_heads)
            for t in range(steps):
                visible = int(kv.lengths[own[0]]) - steps + 1 + t
                key = torch.stack([kv.keys[int(kv.starts[s]) : int(kv.starts[s]) + visible] for s in own])
                query = self.query[list(own), :, t].flatten(0, 1)
                yield row, t, query.double().numpy(), key.double().numpy(), visible + self.evicted

    def reads(self, found: Reads, row: int, t: int) -> Sets:
        """Keys that each query head reads."""
        sets = []
        for s in range(row * self.kv_heads, (row + 1) * self.kv_heads):
            visible = int(self.cache.kv.lengths[s]) - self.query.shape[2] + 1 + t
            for g in range(self.query.shape[1]):
                part = g if found.ids.shape[1] > 1 else 0
                ids = found.ids[s, part, t, : int(found.counts[s, part, t])].tolist()
                sets.append({j for i in ids for j in range(i * found.unit, (i + 1) * found.unit) if j < visible})
        return sets

    def select(self, method: Any, sparsity: float | None = None) -> Reads:
        found = select(method, self.query, self.cache, scale=self.scale, softcap=self.softcap, sparsity=sparsity)
        found.check(self.cache.kv)
        return found


def steps_of(
    seed: int,
    lengths: list[int],
    heads: int,
    kv_heads: int,
    steps: int = 1,
    softcap: float | None = None,
    evicted: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Steps:
    keys, queries, starts, held = [], [], [], []
    for row, length in enumerate(lengths):
        inputs = prompt(seed + row, length, heads, kv_heads)
        keys.append(torch.cat([inputs.key, torch.full((kv_heads, 3, DIM), 7.0)], 1).flatten(0, 1).to(dtype))
        queries.append(inputs.query[:, -steps:].unflatten(0, (kv_heads, -1)).to(dtype))
        first = sum(map(len, keys[:-1]))
        starts += [first + kv * (length + 3) for kv in range(kv_heads)]
        held += [length] * kv_heads
    storage = torch.cat(keys)
    kv = RaggedKV.of(storage, storage.clone(), starts, held, heads=kv_heads)
    tokens = torch.tensor(lengths) + evicted
    return Steps(torch.cat(queries), Decoding(kv, tokens, None, kv_heads), kv_heads, DIM**-0.5, softcap, evicted)


#: Lengths of the rows, query heads, KV heads, steps.
BATCHES = (([63, 203], 4, 2, 1), ([203], 3, 1, 3), ([331, 63], 2, 2, 1))


@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "steps"), BATCHES)
@pytest.mark.parametrize("evicted", [0, 40])
def test_oracle_topk(evicted: int, lengths: list[int], heads: int, kv_heads: int, steps: int, seed: int) -> None:
    batch = steps_of(seed, lengths, heads, kv_heads, steps, 3.0 if heads == 3 else None, evicted)
    different, lists = 0, 0
    for budget, sparsity in ((1, None), (17, None), (9999, None), *((0, s) for s in SPARSITIES)):
        options = {"budget": budget} if sparsity is None else {}
        found = batch.select(METHODS["oracle_topk"](**options), sparsity)
        for row, t, query, key, tokens in batch.each():
            share, got = None if sparsity is None else 1 - sparsity, batch.reads(found, row, t)
            if share == 0.5 and abs(len(got[0]) - share * tokens) == 0.5:
                share = len(got[0]) / tokens  # half a token: either side
            want = literal.oracle_topk(query, key, budget, share, tokens)
            for h, (ours, other) in enumerate(zip(got, want, strict=True)):
                scores = (key[h * kv_heads // heads] @ query[h]).tolist()
                different, lists = different + ranked_alike(scores, ours, other), lists + 1
    few(different, lists)


@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "steps"), BATCHES)
@pytest.mark.parametrize("evicted", [0, 40])
def test_oracle_topp(evicted: int, lengths: list[int], heads: int, kv_heads: int, steps: int, seed: int) -> None:
    batch = steps_of(seed, lengths, heads, kv_heads, steps, 3.0 if heads == 3 else None, evicted)
    different, lists = 0, 0
    for p, sparsity in ((0.5, None), (0.95, None), *((0, s) for s in SPARSITIES)):
        found = batch.select(METHODS["oracle_topp"](**({"p": p} if sparsity is None else {})), sparsity)
        for row, t, query, key, tokens in batch.each():
            scores = literal.step_scores(query, key, batch.scale, batch.softcap)
            weights = [literal.softmax(np.array(own)) for own in scores]
            rows = [Row(w.tolist(), {len(w) - 1}, [1] * len(w)) for w in weights]
            got = batch.reads(found, row, t)
            lists += len(rows)
            if sparsity is None:
                different += covered(rows, got, 1 - p)
            else:
                different += divided(rows, got, (1 - sparsity) * heads * tokens)
    few(different, lists)


def quest_complete(share: float | None, budget: int, visible: int, tokens: int) -> int:
    """Complete pages of 16 that Quest reads besides the one being written."""
    current = (visible - 1) // 16
    if share is None:
        return min(budget // 16, current)
    return min(max(round((share * tokens - (visible - current * 16)) / 16), 0), current)


@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "steps"), BATCHES)
@pytest.mark.parametrize("share_pages", [True, False])
def test_twilight(share_pages: bool, lengths: list[int], heads: int, kv_heads: int, steps: int, seed: int) -> None:
    dtype = torch.bfloat16 if heads == 4 else torch.float32
    batch = steps_of(seed, lengths, heads, kv_heads, steps, 3.0 if heads == 3 else None, dtype=dtype)
    rounded = (lambda x: torch.tensor(x, dtype=torch.float64).to(dtype).double()) if heads == 4 else np.float32
    different, lists = 0, 0
    for p, budget, loose, sparsity in (
        (0.6, 64, 4, None),
        (0.9, 9984, 4, None),
        (0, 0, 1, 0.8),
        *((0, 0, 4, s) for s in SPARSITIES),
    ):
        inside = METHODS["quest"](share_pages=share_pages, **({"budget": budget} if sparsity is None else {}))
        options = {"p": p} if sparsity is None else {}
        found = batch.select(METHODS["twilight"](inner=inside, loose=loose, **options), sparsity)
        share = None if sparsity is None else min(1.0, loose * (1 - sparsity))
        for row, t, query, key, tokens in batch.each():
            complete = quest_complete(share, budget, key.shape[1], tokens)
            taken = literal.quest(query, key, 16, complete, share_pages)
            estimates = [literal.four_bit(own, rounded) for own in key]
            if min(near for _, near in estimates) < 1e-6:
                continue  # a code that rounding decides
            _, _, weights = literal.twilight(
                query, np.stack([own for own, _ in estimates]), taken, batch.scale, batch.softcap, 1.0
            )
            rows = [Row(w.tolist(), {len(w) - 1}, [1] * len(w)) for w in weights]
            places = []
            for own, inner in zip(batch.reads(found, row, t), taken, strict=True):
                assert own <= inner, (sparsity, sorted(own - inner), complete)
                order = sorted(inner)
                places.append({order.index(j) for j in own})
            lists += len(rows)
            if sparsity is None:
                different += covered(rows, places, 1 - p)
            else:
                different += divided(rows, places, (1 - sparsity) * heads * tokens)
    few(different, lists)


# ------------------------------------------------------------------------------------------------------ ends and equals


def test_what_is_asked_in_full_is_everything(seed: int) -> None:
    inputs = prompt(seed, 203, 4, 2)
    triangle = np.tri(13, dtype=bool)
    for method in (
        METHODS["oracle_blocks"](top_k=13, block_size=16),
        METHODS["xattention"](threshold=1, block_size=16),
        METHODS["a_shape"](local=203),
    ):
        assert (select(method, **inputs.arguments).mask().numpy() == triangle).all(), method.name
    for name in ("knorm", "streaming_llm", "tova", "h2o", "pyramidkv"):
        assert select(METHODS[name](capacity=300), **inputs.arguments).counts.tolist() == [203] * 2, name
    batch = steps_of(seed, [63, 203], 4, 2)
    for method in (
        METHODS["oracle_topk"](budget=300),
        METHODS["oracle_topp"](p=1),
        METHODS["twilight"](inner=METHODS["quest"](budget=320), p=1),
    ):
        found = batch.select(method)
        assert found.keys_read(batch.cache.kv)[:, 0, 0].tolist() == [63, 63, 203, 203], method.name


def test_equals_go_to_the_later_key(seed: int) -> None:
    """Zero queries weigh all keys alike; every other key has the same norm."""
    inputs = prompt(seed, 128, 4, 2)
    flat = replace(inputs, query=torch.zeros_like(inputs.query))
    assert kept(select(METHODS["tova"](capacity=9), **flat.arguments), 128) == [set(range(119, 128))] * 2
    even = replace(inputs, key=torch.ones_like(inputs.key))
    even.key[:, ::2] = 2
    want = set(range(111, 128, 2))
    assert kept(select(METHODS["knorm"](capacity=9), **even.arguments), 128) == [want] * 2
    layout = select(METHODS["oracle_blocks"](top_k=5, block_size=16), **flat.arguments)
    for own in (layout, select(METHODS["xattention"](threshold=0.6, block_size=16), **flat.arguments)):
        for row in blocks_of(own):
            last = max(row)
            assert row == {0, *range(last - len(row) + 2, last + 1)}, row
    batch = steps_of(seed, [63, 203], 4, 2)
    batch.query.zero_()
    methods = [METHODS["oracle_topk"](budget=15), METHODS["oracle_topp"](p=0.5)]
    methods.append(METHODS["twilight"](inner=METHODS["oracle_topk"](budget=30), p=0.5))
    for method in methods:
        found = batch.select(method)
        for row, t, _, key, _ in batch.each():
            for own in batch.reads(found, row, t):
                assert own == set(range(key.shape[1] - len(own), key.shape[1])), (method.name, sorted(own))
                assert len(own) >= 15
