"""FlexPrefill against a second, slow reading of Algorithms 1-4 of Lai et al. (ICLR 2025), written from the definition.

The oracle works in fp64 with loops over heads, tokens and blocks, and shares no code with the package. Besides a
head's block mask it returns how near the head came to a different outcome: the estimator works in fp32, so heads
that sit on a cut are left out, and counted.

Long, since the whole algorithm is written down once more, literally.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lm_eval_sparse.kernels.estimate.window import naive as estimators
from lm_eval_sparse.kernels.types import Blocks
from lm_eval_sparse.methods import Layer
from lm_eval_sparse.methods.prefill.flexprefill import FlexPrefill
from lm_eval_sparse.testing import select as select_by

#: Relative distance from a cut below which fp32 and fp64 may rightly disagree.
NEAR = 1e-6
#: Masses under this share may be zero in fp32, so that their order is not defined there.
UNDERFLOW = 1e-30
#: What `sparsity` promises from 4096 tokens on.
PROMISE = 0.01
BLOCKS = (16, 32, 64, 128)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------------- oracle


@dataclass
class Verdict:
    """What the oracle says of one query head."""

    mask: np.ndarray
    aware: bool
    margin: float
    verticals: int = 0
    slashes: int = 0


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def capped(scores: np.ndarray, softcap: float | None) -> np.ndarray:
    return scores if softcap is None else softcap * np.tanh(scores / softcap)


def block_means(tokens: np.ndarray, block: int) -> np.ndarray:
    return np.stack([tokens[start : start + block].mean(0) for start in range(0, len(tokens), block)])


def cover(masses: list[float], gamma: float) -> tuple[int, float]:
    """Size of the smallest set with a share of at least gamma, and the distance of the nearest share from gamma."""
    if gamma == 1:
        return len(masses), math.inf
    total, taken, size, margin = math.fsum(masses), 0.0, 0, math.inf
    for count, mass in enumerate(sorted(masses, reverse=True), start=1):
        margin = min(margin, abs(taken / total - gamma))
        if size == 0 and taken + mass >= gamma * total:
            size = count
        taken += mass
        if size:
            break
    return size or len(masses), min(margin, abs(taken / total - gamma))


def leading(masses: list[float], size: int, near: bool) -> tuple[set[int], float]:
    """Entry 0 and the `size` largest, and the relative gap between the last one in and the first one out.

    Equals are taken from the recent side: the largest index among key blocks, the smallest among bands (`near`).
    """
    order = sorted(range(len(masses)), key=lambda index: (-masses[index], index if near else -index))
    chosen, left = order[:size], order[size:]
    if not chosen or not left:
        return {0, *chosen}, math.inf
    last, first = masses[chosen[-1]], masses[left[0]]
    return {0, *chosen}, (last - first) / last if last > UNDERFLOW else 0.0


def judge(query: np.ndarray, key: np.ndarray, scale: float, softcap: float | None, method: FlexPrefill) -> Verdict:
    """The selection for one head: query and key are (L, D) in fp64."""
    length, block = len(query), int(method.block_size)
    blocks = -(-length // block)

    # The window: the last `block` queries against all keys, each query a causal softmax of its own.
    vertical, slash = [0.0] * blocks, [0.0] * blocks
    for i in range(length - block, length):
        attention = softmax(capped(scale * (key[: i + 1] @ query[i]), softcap))
        for j, weight in enumerate((attention / block).tolist()):
            vertical[j // block] += weight
            slash[(i - j) // block] += weight

    # Do pooled queries and keys predict the true mass of the key blocks?
    pooled_key = block_means(key, block)
    predicted = softmax(capped(scale * (pooled_key @ query[length - block :].mean(0)), softcap)).tolist()
    divergence = 0.0
    for p, a in zip(predicted, vertical, strict=True):
        middle = (p + a) / 2
        divergence += (p * math.log(p / middle) if p else 0.0) / 2 + (a * math.log(a / middle) if a else 0.0) / 2
    root = math.sqrt(max(divergence, 0.0))
    aware = root < method.tau
    margin = abs(root - method.tau) if method.tau else math.inf  # no root is below 0, however it is rounded

    low = min(-(-method.min_budget // block), blocks)
    high = blocks if method.max_budget is None else min(-(-method.max_budget // block), blocks)
    mask = np.zeros((blocks, blocks), dtype=bool)
    if aware:
        pooled_query = block_means(query, block)
        cells, masses = [], []
        for i in range(blocks):
            row = softmax(capped(scale * (pooled_key[: i + 1] @ pooled_query[i]), softcap)) / blocks
            for j, mass in enumerate(row.tolist()):
                cells.append((i, j))
                masses.append(mass)
        size, gap = cover(masses, method.gamma)
        margin = min(margin, gap)
        order = sorted(range(len(masses)), key=lambda index: masses[index], reverse=True)
        if size < len(order):
            last, first = masses[order[size - 1]], masses[order[size]]
            margin = min(margin, (last - first) / last if last > UNDERFLOW else 0.0)
        for index in order[:size]:
            mask[cells[index]] = True
        columns, bands = low, low
    else:
        columns, gap = cover(vertical, method.gamma)
        bands, other = cover(slash, method.gamma)
        margin = min(margin, gap, other)
        columns, bands = min(max(columns, low), high), min(max(bands, low), high)

    kept_columns, gap = leading(vertical, columns, near=False)
    kept_bands, other = leading(slash, bands, near=True)
    for i in range(blocks):
        for j in range(i + 1):
            if j in kept_columns or i - j in kept_bands:
                mask[i, j] = True
    return Verdict(mask, aware, min(margin, gap, other), columns, bands)


def oracle(query: Tensor, key: Tensor, scale: float, softcap: float | None, method: FlexPrefill) -> list[Verdict]:
    group = len(query) // len(key)
    return [
        judge(query[head].double().numpy(), key[head // group].double().numpy(), scale, softcap, method)
        for head in range(len(query))
    ]


# ------------------------------------------------------------------------------------------------------------- inputs


def plain(heads: int, kv_heads: int, length: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(heads, length, dim, generator=generator),
        torch.randn(kv_heads, length, dim, generator=generator),
    )


KINDS = ("columns", "diagonals", "pooled", "flat")


def structured(
    heads: int, kv_heads: int, length: int, dim: int, block: int, seed: int, strength: float = 6.0, shift: int = 0
) -> tuple[Tensor, Tensor]:
    """Heads of four kinds in turn, which look at different features of the keys they share.

    A third of the dimensions marks a few strong keys, a third tells positions apart (a query prefers keys at one
    or two distances), the rest is constant over blocks. Scores reach `strength` at the usual scale 1/sqrt(dim).
    """
    generator = torch.Generator().manual_seed(seed)
    third = dim // 3 // 2 * 2
    marks, turns, rest = slice(0, third), slice(third, 2 * third), slice(2 * third, dim)
    query = 0.05 * torch.randn(heads, length, dim, generator=generator)
    key = 0.05 * torch.randn(kv_heads, length, dim, generator=generator)
    positions = torch.arange(length)[:, None]
    blocks = -(-length // block)
    size = math.sqrt(strength * math.sqrt(dim))
    for kv in range(kv_heads):
        strong = torch.randperm(length, generator=generator)[: max(3, blocks // 4)]
        weights = 0.8 + 0.4 * torch.rand(len(strong), 1, generator=generator)
        key[kv, strong, marks] += size / math.sqrt(third) * weights
        rates = math.pi * (0.05 + 0.95 * torch.rand(third // 2, generator=generator))
        angles = positions * rates
        key[kv, :, turns] += size / math.sqrt(third // 2) * torch.cat([angles.cos(), angles.sin()], -1)
        level = torch.randn(blocks, dim - 2 * third, generator=generator) / math.sqrt(dim - 2 * third)
        key[kv, :, rest] += size * level.repeat_interleave(block, 0)[:length]
        for head in range(kv * heads // kv_heads, (kv + 1) * heads // kv_heads):
            kind = KINDS[(head + shift) % len(KINDS)]
            if kind == "columns":
                query[head, :, marks] += size / math.sqrt(third)
            elif kind == "diagonals":
                distance = int(torch.randint(0, length // 2, (1,), generator=generator))
                angles = (positions - distance) * rates
                query[head, :, turns] += size / math.sqrt(third // 2) * torch.cat([angles.cos(), angles.sin()], -1)
            elif kind == "pooled":
                query[head, :, rest] += size * torch.randn(1, dim - 2 * third, generator=generator) / 4
    return query, key


def sharp_diagonals(heads: int, length: int, seed: int, gap: float = 400.0) -> tuple[Tensor, Tensor]:
    """Heads that each attend to keys at one distance only: all other weights are zero in fp32."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(length)[:, None]
    rates = math.pi * (0.05 + 0.95 * torch.rand(16, generator=generator))
    distances = torch.randperm(length // 2, generator=generator)[:heads].tolist()
    turned = [(positions - distance) * rates for distance in (0, *distances)]
    key, *queries = [torch.cat([angles.cos(), angles.sin()], -1) for angles in turned]
    return torch.stack(queries) * gap, key[None]


def one_key(heads: int, kv_heads: int, length: int) -> tuple[Tensor, Tensor]:
    """All weight on the key at a third of the length; all other weights are zero in fp32."""
    query, key = plain(heads, kv_heads, length, 16, 0)
    query, key = 0.01 * query, 0.01 * key
    query[..., 0], key[:, length // 3, 0] = 1e3, 1e3
    return query, key


# ------------------------------------------------------------------------------------------------------ brute counting


@cache
def triangle(length: int) -> np.ndarray:
    return np.tri(length, dtype=bool)


def counted(layout: Blocks) -> tuple[list[int], list[int]]:
    """Executed pairs and keys read per head, counted on the dense (L, L) mask."""
    pairs, keys = [], []
    for tiles in layout.mask().numpy():
        rows = np.repeat(tiles, layout.block_k, axis=1)[:, : layout.length]
        dense = np.repeat(rows, layout.block_q, axis=0)[: layout.length]
        pairs.append(int(np.count_nonzero(dense & triangle(layout.length))))
        keys.append(int(np.count_nonzero(dense[:: layout.block_q])))
    return pairs, keys


def forced_tiles(length: int, block: int) -> np.ndarray:
    """First column and diagonal."""
    mask = np.eye(-(-length // block), dtype=bool)
    mask[:, 0] = True
    return mask


@cache
def forced_density(length: int, block: int) -> float:
    dense = np.repeat(np.repeat(forced_tiles(length, block), block, 0), block, 1)[:length, :length]
    return np.count_nonzero(dense & np.tri(length, dtype=bool)) / (length * (length + 1) / 2)


def select(query: Tensor, key: Tensor, sparsity: float | None = None, **knobs: Any) -> Blocks:
    scale, softcap = knobs.pop("scale", query.shape[-1] ** -0.5), knobs.pop("softcap", None)
    return select_by(FlexPrefill(**knobs), query, key, scale=scale, softcap=softcap, sparsity=sparsity)


def native(selection: Blocks, **changes: Any) -> dict[str, Any]:
    """The reported knobs as native ones."""
    return {name: selection.knobs[name] for name in FlexPrefill.knobs()} | changes


# ------------------------------------------------------------------------------------------------------- native knobs


def rows(selection: Blocks) -> list[str]:
    """The first head's tiles, drawn."""
    return ["".join(".x"[bit] for bit in row) for row in selection.mask()[0].int().tolist()]


def key_37(length: int = 80) -> tuple[Tensor, Tensor]:
    """80 tokens in blocks of 16, all attention on key 37: it lies in block 2, 27 to 42 tokens before the window."""
    query, key = torch.zeros(1, length, 16), torch.zeros(1, length, 16)
    query[..., 0], key[:, 37, 0] = 100.0, 100.0
    return query, key


def test_a_case_worked_out_by_hand():
    query, key = key_37()
    slashes = select(query, key, tau=0, gamma=0.9, min_budget=0, block_size=16)
    assert rows(slashes) == ["x....", "xx...", "xxx..", "xxxx.", "x.xxx"]  # column 2; bands 2 (11/16) and 1 (5/16)
    both = select(query, key, tau=0, gamma=0.9, min_budget=17, block_size=16)
    assert rows(both) == ["x....", "xx...", "xxx..", "xxxx.", "x.xxx"]  # two columns: 2, and of the empty ones 4
    pooled = select(query, key, tau=1, gamma=0.9, min_budget=0, block_size=16)
    assert rows(pooled) == ["x....", "xx...", "x.x..", "x.xx.", "x.x.x"]


def test_ties_go_to_the_recent_key_blocks():
    query, key = key_37()
    # Three columns of which one has mass: the others are the last two. Three bands.
    columns = select(query, key, tau=0, gamma=0.9, min_budget=33, block_size=16)
    assert rows(columns) == ["x....", "xx...", "xxx..", "xxxx.", "x.xxx"]  # bands 0, 1 and 2
    # Zero keys: row i of the pooled map is 1/(i + 1) everywhere. Two tiles of row 3 complete the share: 3.5 of 5.
    pooled = select(query, torch.zeros_like(key), tau=1, gamma=0.66, min_budget=0, block_size=16)
    assert rows(pooled) == ["x....", "xx...", "xxx..", "x.xx.", "x...x"]


def test_ties_go_to_the_near_band():
    # Four bands of which two have mass, 2 and 3: the others are 0 and 1. No column makes up for band 1 in row 2.
    selection = select(*key_37(96), tau=0, gamma=0.9, min_budget=49, block_size=16)
    assert rows(selection)[2] == "xxx..."


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_what_is_taken_covers_gamma_of_the_window_s_attention(sparsity: float | None):
    """The documented meaning of gamma: what is always kept must not take the place of what gamma needs."""
    length, needle = 4097, 2500
    query, key = structured(4, 1, length, 48, 64, seed=1)
    query[1], key[0, :, 0] = 0.0, 0.0
    query[1, :, 0], key[0, needle, 0] = 30.0, 30.0
    knobs = {"block_size": 64, "min_budget": 0} if sparsity is None else {}
    selection = select(query, key, sparsity, **knobs)
    # All attention of head 1 is on one key, which some tile of the last rows must hold.
    assert bool(selection.mask()[1, -2:, needle // selection.block_k].any())


SHAPES = [(1, 1), (7, 1), (6, 2), (4, 4)]
LENGTHS = [
    *((16, length) for length in (33, 63, 333, 1000, 1025)),
    *((32, length) for length in (65, 333, 1000)),
    *((64, length) for length in (129, 333, 1025)),
    *((128, length) for length in (257, 1000, 1025)),
]


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
def test_native_selection_equals_the_oracle(heads: int, kv_heads: int):
    rng = random.Random(100 * heads + kv_heads)
    wrong, near, seen = [], 0, {False: 0, True: 0}
    for block, length in LENGTHS:
        for tau in (0, 0.1, 0.1, 0.5, 1):
            dim, seed = rng.choice([16, 24, 48, 80, 96]), rng.randrange(1 << 20)
            softcap, gamma = rng.choice([None, 5.0]), rng.choice([0.3, 0.9, 0.99, 1])
            low, high = rng.choice([(0, None), (1, None), (2 * block + 1, None), (0, 3 * block + 1), (9, block)])
            method = FlexPrefill(gamma, tau, low, high if gamma < 1 else None, block)
            if rng.random() < 0.75:
                strength, shift = rng.choice([3.0, 6.0, 12.0]), rng.randrange(len(KINDS))
                query, key = structured(heads, kv_heads, length, dim, block, seed, strength, shift)
            else:
                query, key = plain(heads, kv_heads, length, dim, seed)
            scale = rng.choice([1.0, 0.3]) / math.sqrt(dim)
            selection = select_by(method, query, key, scale=scale, softcap=softcap, sparsity=None)
            selection.check(heads)
            assert (selection.block_q, selection.block_k) == (block, block)
            mask = selection.mask().numpy()
            verdicts = oracle(query, key, scale, softcap, method)
            for head, verdict in enumerate(verdicts):
                seen[verdict.aware] += 1
                if verdict.margin < NEAR:
                    near += 1
                elif not np.array_equal(mask[head], verdict.mask):
                    wrong.append((method, length, dim, softcap, seed, head, verdict.aware))
            if all(verdict.margin > NEAR for verdict in verdicts):
                assert selection.knobs["query_aware_heads"] == sum(verdict.aware for verdict in verdicts)
            if gamma == 1:
                assert all(verdict.mask.sum() == len(mask[0]) * (len(mask[0]) + 1) // 2 for verdict in verdicts)
    assert not wrong
    assert near <= 0.02 * sum(seen.values())
    assert min(seen.values()) >= 0.2 * sum(seen.values()), "both branches must be met"


def test_at_the_published_tau_the_kind_of_head_decides_the_branch():
    for seed, length in ((16, 1025), (17, 1025), (18, 1000)):
        query, key = structured(8, 2, length, 48, 16, seed)
        verdicts = oracle(query, key, 48**-0.5, None, FlexPrefill(block_size=16, min_budget=0))
        assert [verdict.aware for verdict in verdicts] == [kind in ("pooled", "flat") for kind in KINDS] * 2
        assert select(query, key, block_size=16, min_budget=0).knobs["query_aware_heads"] == 4


@pytest.mark.parametrize("tau", [0, 0.1, 1])
def test_gamma_one_selects_every_causal_block_even_without_any_mass(tau: float):
    inputs = [plain(2, 1, 333, 16, 0), one_key(2, 1, 333), sharp_diagonals(2, 333, 0), (torch.zeros(2, 333, 16),) * 2]
    for query, key in inputs:
        for block in (16, 64):
            layout = select(query, key, gamma=1, tau=tau, block_size=block, min_budget=0)
            assert bool((layout.mask() == torch.ones(layout.mask().shape[1:]).tril().bool()).all())


def test_softcap_bounds_the_predicted_scores_too():
    """Heads with strong key blocks that only a capped prediction, of capped attention, finds predictable."""
    moved = 0
    for seed in range(4):
        query, key = structured(8, 2, 777, 24, 16, seed, strength=12.0)
        verdicts = oracle(query, key, 24**-0.5, 1.5, FlexPrefill(block_size=16, min_budget=0, tau=0.08))
        selection = select(query, key, softcap=1.5, block_size=16, min_budget=0, tau=0.08)
        for head, verdict in enumerate(verdicts):
            assert verdict.margin < NEAR or np.array_equal(selection.mask()[head].numpy(), verdict.mask)
        assert len({verdict.aware for verdict in verdicts}) == 2
        plain_verdicts = oracle(query, key, 24**-0.5, None, FlexPrefill(block_size=16, min_budget=0, tau=0.08))
        moved += sum(one.aware != two.aware for one, two in zip(verdicts, plain_verdicts, strict=True))
    assert moved > 0


def test_defaults_are_the_published_ones_at_block_128():
    query, key = structured(4, 2, 2700, 24, 128, seed=5)
    default, spelled = FlexPrefill(), FlexPrefill(0.9, 0.1, 1024, None, 128)
    first, second = (
        select_by(method, query, key, scale=24**-0.5, softcap=None, sparsity=None) for method in (default, spelled)
    )
    assert torch.equal(first.mask(), second.mask())
    verdicts = oracle(query, key, 24**-0.5, None, spelled)
    assert min(verdict.margin for verdict in verdicts) > NEAR
    assert np.array_equal(first.mask().numpy(), np.stack([verdict.mask for verdict in verdicts]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_other_dtypes_select_as_their_values_in_fp32_do(dtype: torch.dtype, sparsity: float | None):
    query, key = (states.to(dtype) for states in structured(4, 2, 1025, 24, 16, seed=3))
    knobs = {"block_size": 16, "min_budget": 0} if sparsity is None else {}
    first = select(query, key, sparsity, **knobs)
    second = select(query.float(), key.float(), sparsity, **knobs)
    assert torch.equal(first.mask(), second.mask())
    assert first.knobs == second.knobs
    if sparsity is None:
        method = FlexPrefill(**knobs)
        for head, verdict in enumerate(oracle(query, key, 24**-0.5, None, method)):
            assert verdict.margin < NEAR or np.array_equal(first.mask()[head].numpy(), verdict.mask)


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_selection_is_a_function_of_the_values_alone(sparsity: float | None, monkeypatch: pytest.MonkeyPatch):
    """The same for a repeated call, for strided and gradient-tracking inputs, and for any chunking of the window."""
    query, key = structured(6, 2, 1025, 24, 32, seed=9)
    before = query.clone(), key.clone()
    knobs = {"block_size": 32, "min_budget": 0} if sparsity is None else {}
    want = select(query, key, sparsity, **knobs)
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])
    strided = [states.transpose(0, 1).contiguous().transpose(0, 1) for states in (query, key)]
    others = [select(query, key, sparsity, **knobs), select(*strided, sparsity, **knobs)]
    others.append(select(query.clone().requires_grad_(), key.clone().requires_grad_(), sparsity, **knobs))
    monkeypatch.setattr(estimators, "WINDOW_ELEMENTS", 4 * 32 * 1025)
    others.append(select(query, key, sparsity, **knobs))
    monkeypatch.setattr(estimators, "WINDOW_ELEMENTS", 1)
    others.append(select(query, key, sparsity, **knobs))
    for other in others:
        assert torch.equal(want.mask(), other.mask())
        assert not other.selected_pairs().requires_grad


# ----------------------------------------------------------------------------------------------------------- sparsity


def accounted(selection: Blocks, sparsity: float, heads: int, length: int) -> float:
    """Check a selection's own counts and forced parts; return how far its brute-force sparsity is off."""
    layout = selection
    layout.check(heads)
    assert layout.length == length and layout.block_q == layout.block_k == selection.knobs["block_size"]
    pairs, keys = counted(layout)
    assert selection.selected_pairs().tolist() == layout.executed_pairs().tolist() == pairs
    assert layout.keys_read().tolist() == keys
    mask = layout.mask().numpy()
    assert bool(mask[:, forced_tiles(length, layout.block_q)].all())
    assert not (mask & ~np.tri(mask.shape[1], dtype=bool)).any()
    return 1 - sum(pairs) / (heads * length * (length + 1) / 2) - sparsity


@pytest.mark.parametrize("length", [4096, 4097, 5000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (9, 3)])
def test_sparsity_is_kept_by_one_threshold_for_all_heads(heads: int, kv_heads: int, length: int):
    query, key = structured(heads, kv_heads, length, 18, 64, seed=length + heads, strength=5.0)
    for sparsity in (0.5, 0.8, 0.9, 0.95):
        selection = select(query, key, sparsity)
        assert abs(accounted(selection, sparsity, heads, length)) <= PROMISE
        if heads > 1:
            pairs = selection.selected_pairs().double()
            assert pairs.max() > 1.2 * pairs.min(), "heads must keep densities of their own"
        # The threshold is on a cut where no step of a head meets the sparsity; there the reported one may fall on
        # either side (see the test below), so that heads are only compared away from it.
        gamma = selection.knobs["gamma"]
        sides = [select(query, key, **native(selection, gamma=gamma + nudge)).mask() for nudge in (-1e-12, 1e-12)]
        calm = [head for head in range(heads) if torch.equal(sides[0][head], sides[1][head])]
        assert len(calm) >= heads - 1
        again = select(query, key, **native(selection)).mask()
        assert torch.equal(again[calm], selection.mask()[calm])


def test_solved_layout_is_the_oracle_s_at_the_reported_threshold():
    query, key = structured(4, 2, 4097, 18, 64, seed=8)
    seen, compared = set(), 0
    for sparsity in (0.5, 0.8, 0.95):
        selection = select(query, key, sparsity, softcap=20.0)
        mask = selection.mask().numpy()
        for head, verdict in enumerate(oracle(query, key, 18**-0.5, 20.0, FlexPrefill(**native(selection)))):
            if verdict.margin > NEAR:
                compared += 1
                seen.add(verdict.aware)
                assert np.array_equal(mask[head], verdict.mask)
    assert compared >= 10 and seen == {False, True}


def test_reported_gamma_gives_the_same_layout_as_a_native_knob():
    different = []
    for seed in range(40):
        query, key = plain(1, 1, 4096, 16, seed)
        selection = select(10 * query, 10 * key, 0.8, tau=0)
        assert selection.knobs["gamma"] < 0.999
        again = select(10 * query, 10 * key, **native(selection))
        if not torch.equal(again.mask(), selection.mask()):
            different.append(seed)
    assert not different, f"seeds {different}"


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (9, 3)])
def test_sparsity_is_kept_on_degenerate_attention(heads: int, kv_heads: int, sparsity: float):
    length = 4097
    query, key = plain(heads, kv_heads, length, 16, 1)
    inputs = {
        "one key has it all": one_key(heads, kv_heads, length),
        "constant keys": (query, torch.ones_like(key)),
        "zero keys": (query, torch.zeros_like(key)),
        "zero queries": (torch.zeros_like(query), key),
        "huge scores": (100 * query, 100 * key),
        "bf16": (query.bfloat16(), key.bfloat16()),
    }
    for name, states in inputs.items():
        assert abs(accounted(select(*states, sparsity), sparsity, heads, length)) <= PROMISE, name


def tied_heads() -> list[Any]:
    same = [states.expand(4, -1, -1) for states in plain(1, 1, 4096, 16, 3)]
    flat = torch.zeros(4, 5000, 16)
    return [
        pytest.param(*sharp_diagonals(3, 5000, 1), 0.5, 0.1, id="three heads on one diagonal each"),
        pytest.param(*sharp_diagonals(9, 5000, 1), 0.4, 0.1, id="nine heads on one diagonal each"),
        pytest.param(*same, 0.5, 0, id="four equal heads"),
        pytest.param(flat, flat, 0.5, 0, id="zeros, vertical-slash"),
        pytest.param(flat[:, :4097], flat[:, :4097], 0.3, 0.1, id="zeros, default knobs"),
    ]


@pytest.mark.parametrize(("query", "key", "sparsity", "tau"), tied_heads())
def test_sparsity_is_kept_when_heads_tie(query: Tensor, key: Tensor, sparsity: float, tau: float):
    selection = select(query, key, sparsity, tau=tau)
    assert abs(accounted(selection, sparsity, *query.shape[:2])) <= PROMISE


def test_query_aware_heads_without_mass_in_most_blocks_reach_every_density():
    """Block means that differ by more than fp32's exponent range: most of the pooled map is exactly zero."""
    length = 4097
    query, key = torch.full((2, length, 16), 100.0), torch.zeros(2, length, 16)
    key[:, :128] = 100.0
    for sparsity in (0.05, 0.3, 0.5, 0.9):
        selection = select(query, key, sparsity)
        assert selection.knobs["query_aware_heads"] == 2
        assert abs(accounted(selection, sparsity, 2, length)) <= PROMISE


def test_greater_sparsity_keeps_a_subset_at_equal_block_size():
    query, key = structured(9, 3, 5000, 18, 64, seed=2)
    by_block: dict[int, Tensor] = {}
    compared = 0
    for sparsity in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95):
        selection = select(query, key, sparsity)
        block, mask = selection.knobs["block_size"], selection.mask()
        if block in by_block:
            compared += 1
            assert not bool((mask & ~by_block[block]).any())
        by_block[block] = mask
    assert compared >= 4


# -------------------------------------------------------------------------------------------------------------- reach


def test_largest_sparsity_is_what_the_smallest_forced_tiles_leave():
    for length in (17, 33, 100, 333, 1000, 1024, 1025, 2047):
        want = 1 - forced_density(length, 16)
        assert FlexPrefill().largest_sparsity(length) == pytest.approx(want, abs=1e-12)
        for sparsity in (0.1, 0.5, 0.9, 0.95, 0.99):
            assert (FlexPrefill().too_short(sparsity, length) is not None) == (sparsity > want)


def test_the_largest_sparsity_is_reached_and_one_beyond_is_named():
    length = 4097
    largest = FlexPrefill().largest_sparsity(length)
    assert FlexPrefill().too_short(largest, length) is None
    reason = FlexPrefill().too_short(largest + 1e-4, length)
    assert reason is not None and str(length) in reason and f"{largest:.3f}" in reason
    for query, key in (plain(2, 1, length, 16, 0), structured(3, 1, length, 18, 16, 0)):
        layout = select(query, key, largest)
        assert bool((layout.mask().numpy() == forced_tiles(length, 16)).all())


@pytest.mark.parametrize("length", [4096, 5000])
def test_automatic_block_is_the_largest_whose_forced_tiles_fit_a_quarter_of_the_budget(length: int):
    met = set()
    for sparsity in (0.2, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97):
        fitting = [block for block in BLOCKS if forced_density(length, block) <= (1 - sparsity) / 4]
        many = FlexPrefill().knobs_for(sparsity, length, Layer(heads=32, kv_heads=8, head_dim=64))
        assert many.block_size == max(fitting, default=16)
        assert many.min_budget == 0 and many.max_budget is None
        one = FlexPrefill().knobs_for(sparsity, length, Layer(heads=1, kv_heads=1, head_dim=64))
        # A lone head needs finer steps: its largest one, the second column, may not jump over the tolerance.
        tiles = np.zeros((-(-length // one.block_size),) * 2, dtype=bool)
        tiles[1:, 1] = True
        column = Blocks.from_mask(torch.from_numpy(tiles)[None], length, one.block_size, one.block_size)
        assert counted(column)[0][0] / (length * (length + 1) / 2) <= 2 * PROMISE
        assert one.block_size <= many.block_size
        met.add(many.block_size)
    assert met == set(BLOCKS)


def test_too_short_under_native_knobs():
    for block in BLOCKS:
        for budget in (0, 100, 1024):
            method = FlexPrefill(block_size=block, min_budget=budget)
            least = max(budget, 2 * block)
            assert method.too_short(None, least) is not None
            assert method.too_short(None, least + 1) is None
            query, key = plain(1, 1, least + 1, 16, 0)
            for tau in (0, 1):
                layout = select(query, key, tau=tau, block_size=block, min_budget=budget, gamma=0.5)
                layout.check(1)
                verdict = oracle(query, key, 0.25, None, replace(method, tau=tau, gamma=0.5))[0]
                assert verdict.margin < NEAR or np.array_equal(layout.mask()[0].numpy(), verdict.mask)
    assert FlexPrefill().too_short(None, 1024) is not None
    assert FlexPrefill().too_short(None, 1025) is None
