"""Six methods against second, slow readings of their definitions, in fp64 and without code of the package.

The oracles loop over heads, queries, blocks and pages. The estimators work in fp32, so each oracle also says whether
its outcome hangs on a difference too small for that; such heads (rows, tokens) are left out, and counted. Equal
scores go to the more recent key: the larger column, the nearer diagonal, the later block, the later page.

Inputs and knobs are drawn anew in every run. A failing test shows its seed; ORACLE_SEED=<seed> repeats it.

Long, since each method's transcription stands beside its cases.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lm_eval_sparse.kernels.estimate import update_bounds
from lm_eval_sparse.kernels.types import Blocks, Keep, PageBounds, RaggedKV, Reads
from lm_eval_sparse.methods import CacheView
from lm_eval_sparse.methods.decode.quest import Quest
from lm_eval_sparse.methods.eviction.ada_snapkv import AdaSnapKV
from lm_eval_sparse.methods.eviction.snapkv import SnapKV
from lm_eval_sparse.methods.prefill.block_sparse import BlockSparse
from lm_eval_sparse.methods.prefill.flexprefill_vs import FlexPrefillVS
from lm_eval_sparse.methods.prefill.vertical_slash import VerticalSlash
from lm_eval_sparse.testing import Decoding, select

#: Relative difference of two scores below which fp32 and fp64 may rightly disagree.
NEAR = 1e-5
#: The same for a cumulated share of attention, which is about 1.
NEAR_SHARE = 3e-6
#: Scores under this may be zero in fp32, so that their order is not defined there.
UNDERFLOW = 1e-30
#: What `sparsity` promises from 4096 tokens on.
PROMISE = 0.01

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
HEADS = ((1, 1), (4, 2), (6, 2), (7, 1))
#: Length, query heads, KV heads: every length, every grouping; the long ones with few heads.
SHAPES = [(length, *heads) for length in (1, 15, 17, 63, 255, 256, 257) for heads in HEADS]
SHAPES += [(1000, 4, 2), (1000, 6, 2), (4097, 1, 1)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seed() -> int:
    drawn = int(os.environ.get("ORACLE_SEED", random.SystemRandom().randrange(2**31)))
    print(f"ORACLE_SEED={drawn}")  # pytest shows it when the test fails
    return drawn


# ------------------------------------------------------------------------------------------------------ oracles: common


def apart(kept: float, left: float, unit: float | None = None) -> bool:
    """Whether fp32 orders the last score kept and the first one left as fp64 does; equals are the tie rule's."""
    if kept == left:
        return True
    if unit is None:
        return kept > UNDERFLOW and kept - left > NEAR * kept
    return kept - left > NEAR * unit


def leading(
    scores: list[float], count: int, forced: set[int], *, large_index_first: bool = True, unit: float | None = None
) -> tuple[set[int], bool]:
    """The forced entries and, up to `count` in all, the highest of the others; and whether fp32 must agree."""
    rest = [index for index in range(len(scores)) if index not in forced]
    rest.sort(key=lambda index: (-scores[index], -index if large_index_first else index))
    room = max(count - len(forced), 0)
    kept, left = rest[:room], rest[room:]
    sure = not kept or not left or apart(scores[kept[-1]], scores[left[0]], unit)
    return forced | set(kept), sure


def window_attention(
    query: np.ndarray, key: np.ndarray, scale: float, softcap: float | None, window: int
) -> Iterator[tuple[int, np.ndarray]]:
    """For each of the last `window` queries: its position i and its weights on the keys 0..i."""
    length = len(query)
    for i in range(length - min(window, length), length):
        scores = scale * (key[: i + 1] @ query[i])
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        yield i, weights / weights.sum()


def per_head(query: Tensor, key: Tensor) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Query head, its queries and the keys it uses, in fp64."""
    heads, kv_heads = len(query), len(key)
    for head in range(heads):
        yield head, query[head].double().numpy(), key[head // (heads // kv_heads)].double().numpy()


# ---------------------------------------------------------------------------------------------- oracles: vertical-slash


@dataclass
class Pattern:
    """Columns and diagonals of one query head, and whether fp32 must come to the same, or to one of `others`."""

    columns: set[int]
    offsets: set[int]
    sure: bool
    others: list[Pattern] = field(default_factory=list)


def share_budget(masses: np.ndarray, alpha: float, min_budget: int) -> list[int]:
    """How many entries alpha asks for; then the numbers on the other side of a cut that is too near for fp32."""

    def asked(threshold: float) -> int:
        running, below = 0.0, 0
        for mass in sorted(masses.tolist(), reverse=True):
            running += mass
            below += running <= threshold
        return min(max(min_budget, 1 + below), len(masses))

    exactly, nearly = asked(alpha), range(asked(alpha - NEAR_SHARE), asked(alpha + NEAR_SHARE) + 1)
    return [exactly, *(count for count in nearly if count != exactly)]


def patterns(
    query: Tensor,
    key: Tensor,
    scale: float,
    softcap: float | None,
    method: VerticalSlash | FlexPrefillVS,
    **solved: Any,
) -> list[Pattern]:
    knobs = {knob.name: getattr(method, knob.name) for knob in fields(method)} | solved
    length = query.shape[1]
    found = []
    for _, q, k in per_head(query, key):
        vertical, slash, queries = np.zeros(length), np.zeros(length), 0
        for i, weights in window_attention(q, k, scale, softcap, knobs["window"]):
            vertical[: i + 1] += weights
            slash[: i + 1] += weights[::-1]  # key j = i - o at offset o
            queries += 1
        if isinstance(method, FlexPrefillVS):
            columns = share_budget(vertical / queries, knobs["alpha"], knobs["min_budget"])
            offsets = share_budget(slash / queries, knobs["alpha"], knobs["min_budget"])
        else:
            columns, offsets = [knobs["verticals"]], [knobs["slashes"]]
        sinks, near = set(range(min(knobs["sinks"], length))), set(range(min(knobs["near"], length)))
        few = len(columns) * len(offsets) <= 12  # else a long flat tail lies on the cut, and nothing can be said
        options = []
        for many, far in product(columns, offsets) if few else [(columns[0], offsets[0])]:
            kept_columns, first = leading(vertical.tolist(), many, sinks)
            kept_offsets, second = leading(slash.tolist(), far, near, large_index_first=False)
            options.append(Pattern(kept_columns, kept_offsets, few and first and second))
        pattern, *pattern.others = options
        pattern.sure = all(option.sure for option in options)
        found.append(pattern)
    return found


def draw(
    length: int, tile: int, columns: Iterable[int], offsets: Iterable[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dense (L, L) masks of the pattern's pairs and of the pairs executed, and the (n, n) mask of tiles."""
    blocks = -(-length // tile)
    pattern, tiles = np.zeros((length, length), dtype=bool), np.zeros((blocks, blocks), dtype=bool)
    for offset in offsets:
        queries = np.arange(offset, length)
        pattern[queries, queries - offset] = True
        tiles[queries // tile, (queries - offset) // tile] = True
    executed = np.repeat(np.repeat(tiles, tile, 0), tile, 1)[:length, :length]
    listed = sorted(columns)
    pattern[:, listed] = True
    executed[:, listed] = True
    return pattern & triangle(length), executed & triangle(length), tiles


@cache
def triangle(length: int) -> np.ndarray:
    return np.tri(length, dtype=bool)


@cache
def forced_density(length: int, tile: int, near: int, sinks: int) -> float:
    executed = draw(length, tile, range(min(sinks, length)), range(min(near, length)))[1]
    return np.count_nonzero(executed) / (length * (length + 1) / 2)


# ---------------------------------------------------------------------------------------------------- oracles: the rest


def block_means(tokens: np.ndarray, block: int) -> np.ndarray:
    return np.stack([tokens[start : start + block].mean(0) for start in range(0, len(tokens), block)])


def block_rows(
    query: np.ndarray, key: np.ndarray, counts: list[int], block: int, subdiagonal: bool
) -> list[tuple[set[int], bool]]:
    """Key blocks of each query block of one head, and whether fp32 must agree."""
    pooled_query, pooled_key = block_means(query, block), block_means(key, block)
    sizes = np.linalg.norm(pooled_key, axis=1)
    found = []
    for i, count in enumerate(counts):
        scores = [float(pooled_query[i] @ pooled_key[j]) for j in range(i + 1)]
        unit = float(np.linalg.norm(pooled_query[i]) * sizes[: i + 1].max())
        forced = {0, i, i - 1} if subdiagonal and i else {0, i}
        found.append(leading(scores, min(count, i + 1), forced, unit=unit))
    return found


def eviction_scores(
    query: Tensor, key: Tensor, scale: float, softcap: float | None, method: SnapKV | AdaSnapKV
) -> list[list[float]]:
    """Pooled importance, (H_kv, L) lists."""
    length, group = query.shape[1], len(query) // len(key)
    ada = isinstance(method, AdaSnapKV)
    importance = np.zeros((len(key), length))
    for head, q, k in per_head(query, key):
        seen = np.zeros(length)
        for i, weights in window_attention(q, k, scale, softcap, method.window):
            seen[: i + 1] = np.maximum(seen[: i + 1], weights) if ada else seen[: i + 1] + weights
        of_kv = importance[head // group]
        of_kv[:] = np.maximum(of_kv, seen) if ada else of_kv + seen / group
    reach = method.kernel // 2
    return [
        [float(row[max(0, j - reach) : j + reach + 1].sum()) / method.kernel for j in range(length)]
        for row in importance
    ]


def kept_tokens(
    scores: list[list[float]], capacity: int, sinks: int, local: int, floor: float | None
) -> tuple[list[set[int]], bool]:
    """Tokens that each KV head keeps; `floor` is Ada-SnapKV's, None is SnapKV."""
    length, kv_heads = len(scores[0]), len(scores)
    if capacity >= length:
        return [set(range(length)) for _ in scores], True
    forced = set(range(min(sinks, length))) | set(range(max(length - local, 0), length))
    own = capacity if floor is None else max(int(floor * capacity), sinks + local)
    found = [leading(row, own, forced) for row in scores]
    kept, sure = [tokens for tokens, _ in found], all(sure for _, sure in found)
    if floor is None:
        return kept, sure
    others = [(head, j) for head in range(kv_heads) for j in range(length) if j not in kept[head]]
    others.sort(key=lambda place: (-scores[place[0]][place[1]], -place[1], place[0]))
    room = capacity * kv_heads - sum(map(len, kept))
    for head, j in others[:room]:
        kept[head].add(j)
    if 0 < room < len(others):
        (last_head, last), (first_head, first) = others[room - 1], others[room]
        sure = sure and apart(scores[last_head][last], scores[first_head][first])
    return kept, sure


def solved_eviction(sparsity: float, length: int) -> tuple[int, int, int]:
    """Capacity, sinks and local tokens for a sparsity."""
    capacity = max(1, round((1 - sparsity) * length))
    sinks = min(4, capacity // 4)
    return capacity, sinks, max(1, min(128, capacity // 4 - sinks))


def quest_pages(
    queries: np.ndarray, keys: np.ndarray, visible: int, page_size: int, complete: int
) -> tuple[set[int], int, bool]:
    """Pages that query heads which share a list (G, D) read, keys in them, and whether fp32 must agree."""
    current = (visible - 1) // page_size
    scores, unit = [], 0.0
    for page in range(current):
        held = keys[page * page_size : (page + 1) * page_size]
        low, high = held.min(0), held.max(0)
        scores.append(float(sum(np.maximum(q * low, q * high).sum() for q in queries)))
        unit = max(unit, float(sum(np.maximum(abs(q * low), abs(q * high)).sum() for q in queries)))
    chosen, sure = leading(scores, complete, set(), unit=unit)
    return chosen | {current}, len(chosen) * page_size + visible - current * page_size, sure


# --------------------------------------------------------------------------------------------------------------- inputs


def plain(heads: int, kv_heads: int, length: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(heads, length, dim, generator=generator),
        torch.randn(kv_heads, length, dim, generator=generator),
    )


def structured(
    heads: int, kv_heads: int, length: int, dim: int, seed: int, strength: float = 5.0
) -> tuple[Tensor, Tensor]:
    """Some keys share a direction with all queries (verticals); half of the dimensions tell positions apart, so that
    each head prefers keys at one distance (slashes). The mix differs between the heads."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (0.3 * states for states in plain(heads, kv_heads, length, dim, seed))
    size = math.sqrt(strength * math.sqrt(dim))
    turns = slice(1, 1 + dim // 2)
    positions = torch.arange(length)[:, None]
    rates = math.pi * (0.05 + 0.95 * torch.rand(dim // 4, generator=generator))
    strong = torch.randperm(length, generator=generator)[: max(1, length // 40)]
    for kv in range(kv_heads):
        key[kv, strong, 0] += size * (0.7 + 0.6 * torch.rand(len(strong), generator=generator))
        angles = positions * rates
        key[kv, :, turns] += size / math.sqrt(dim // 4) * torch.cat([angles.cos(), angles.sin()], -1)
    for head in range(heads):
        mix = float(torch.rand(1, generator=generator))
        distance = int(torch.randint(0, max(1, length // 2), (1,), generator=generator))
        angles = (positions - distance) * rates
        query[head, :, 0] += mix * size
        query[head, :, turns] += (1 - mix) * size / math.sqrt(dim // 4) * torch.cat([angles.cos(), angles.sin()], -1)
    return query, key


def exact(heads: int, kv_heads: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Attention without rounding, full of ties, at scale 1: each KV head has at most 8 marked keys, a power of two,
    all before the second half of the tokens; the queries there share their attention equally among the marked
    keys, and every other weight is exactly zero in fp32 and fp64 alike. Needs a window of at most half the length."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.zeros(heads, length, 16), torch.zeros(kv_heads, length, 16)
    query[..., 0] = 64.0
    for kv in range(kv_heads):
        marked = 2 ** int(torch.randint(0, min(4, (length // 2).bit_length()), (1,), generator=generator))
        key[kv, torch.randperm(length // 2, generator=generator)[:marked], 0] = 64.0
    return query, key


def strided(states: Tensor) -> Tensor:
    """The same values, with the heads inside the tokens and gaps between the dimensions."""
    spread = torch.full((states.shape[1], states.shape[0], 2 * states.shape[2]), float("nan"), dtype=states.dtype)
    view = spread.transpose(0, 1)[..., ::2]
    view.copy_(states)
    return view


@dataclass
class Case:
    """One row's inputs, as a test draws them."""

    query: Tensor
    key: Tensor
    scale: float
    softcap: float | None
    note: str

    @property
    def arguments(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap}


def case(rng: random.Random, length: int, heads: int, kv_heads: int, kind: str) -> Case:
    """Draw inputs: dimension, softcap, dtype and strides vary."""
    dim = rng.choice((16, 64))
    query, key = (plain if kind == "plain" else structured)(heads, kv_heads, length, dim, rng.randrange(2**31))
    softcap, form = rng.choice((None, None, 10.0)), rng.choice(("contiguous", "strided", "bf16"))
    if form == "strided":
        query, key = strided(query), strided(key)
    elif form == "bf16":
        query, key = query.bfloat16(), key.bfloat16()
    return Case(query, key, dim**-0.5, softcap, f"{kind} {form} dim={dim} softcap={softcap}")


# ------------------------------------------------------------------------------------------------------ reading layouts


def read_layout(layout: Blocks, head: int) -> tuple[np.ndarray, list[list[int]]]:
    """Tiles (n, n) and single columns per query block, as written in the layout."""
    tiles = np.zeros((layout.blocks_q, layout.blocks_k), dtype=bool)
    columns = []
    for row in range(layout.blocks_q):
        tiles[row, layout.indices[head, row, : int(layout.counts[head, row])].tolist()] = True
        if layout.columns is None or layout.column_counts is None:
            columns.append([])
            continue
        shared = layout.columns.shape[1] == 1  # of shared lists, what lies in a tile adds nothing
        ids = layout.columns[head, 0 if shared else row, : int(layout.column_counts[head, row])].tolist()
        columns.append([j for j in ids if not (shared and tiles[row, j // layout.block_k])])
    return tiles, columns


def brute_executed(layout: Blocks, head: int) -> int:
    """Pairs that a head executes, counted on the dense (L, L) mask."""
    tiles, columns = read_layout(layout, head)
    size, length = layout.block_q, layout.length
    dense = np.repeat(np.repeat(tiles, size, 0), layout.block_k, 1)[:length, :length]
    for row, keys in enumerate(columns):
        dense[row * size : (row + 1) * size, keys] = True
    return int(np.count_nonzero(dense & triangle(length)))


def density(selection: Blocks) -> float:
    """Executed density, mean over the heads, by brute force; checks the layout's own counts on the way."""
    layout = selection
    heads = layout.heads
    layout.check(heads)
    counted = [brute_executed(layout, head) for head in range(heads)]
    assert layout.executed_pairs().tolist() == counted
    return sum(counted) / (heads * layout.length * (layout.length + 1) / 2)


def differences(selection: Blocks, found: list[Pattern], tile: int) -> tuple[list[str], int]:
    """What differs between a selection and the oracle's patterns, in words; and how many heads were compared."""
    layout = selection
    layout.check(len(found))
    assert layout.block_q == layout.block_k == tile
    assert selection.selected_pairs().dtype == torch.int64 and selection.selected_pairs().shape == (len(found),)
    said = []
    compared = [head for head, want in enumerate(found) if want.sure]
    for head in compared:
        options = [head_differences(selection, head, want, tile) for want in (found[head], *found[head].others)]
        if all(options):
            said += options[0]
    return said, len(compared)


def head_differences(selection: Blocks, head: int, want: Pattern, tile: int) -> list[str]:
    layout, said = selection, []
    pattern, executed, tiles = draw(layout.length, tile, want.columns, want.offsets)
    got_tiles, got_columns = read_layout(layout, head)
    if not np.array_equal(got_tiles, tiles):
        said.append(f"head {head}: tiles {np.argwhere(got_tiles != tiles)[:5].tolist()}")
    for row, got in enumerate(got_columns):
        last = min((row + 1) * tile, layout.length) - 1
        listed = [j for j in sorted(want.columns) if j <= last and not tiles[row, j // tile]]
        if got != listed:
            said.append(f"head {head}, query block {row}: columns {got[:9]}, expected {listed[:9]}")
            break
    for name, pairs, mask in (
        ("selected", selection.selected_pairs(), pattern),
        ("executed", layout.executed_pairs(), executed),
    ):
        if int(pairs[head]) != np.count_nonzero(mask):
            said.append(f"head {head}: {int(pairs[head])} {name} pairs, expected {np.count_nonzero(mask)}")
    return said


def solved(method: type, selection: Blocks) -> dict[str, Any]:
    """The knobs that a selection reports, as far as they are native ones of the method."""
    return {knob.name: selection.knobs[knob.name] for knob in fields(method) if knob.name in selection.knobs}


# ------------------------------------------------------------------------------------------------------- vertical-slash


@pytest.mark.parametrize("kind", ["plain", "structured"])
@pytest.mark.parametrize(("length", "heads", "kv_heads"), SHAPES)
def test_vertical_slash(length: int, heads: int, kv_heads: int, kind: str, seed: int):
    rng = random.Random(seed)
    inputs = case(rng, length, heads, kv_heads, kind)
    method = VerticalSlash(
        verticals=rng.choice((1, 3, 9, 30, 150, 9999)),
        slashes=rng.choice((1, 3, 9, 30, 150, 9999)),
        window=rng.choice((1, 16, 64, 256, 9999 if length < 2000 else 256)),
        sinks=rng.choice((1, 4, 20)),
        near=rng.choice((1, 5, 64)),
        tile=rng.choice((16, 32, 64, 128, "auto")),
    )
    selection = select(method, inputs.query, inputs.key, **inputs.arguments, sparsity=None)
    found = patterns(inputs.query, inputs.key, inputs.scale, inputs.softcap, method)
    said, _ = differences(selection, found, 64 if method.tile == "auto" else method.tile)
    assert not said, (said, method, inputs.note)


def test_vertical_slash_by_hand():
    """Eight tokens, near=1, sinks=1; the last query attends to key 3 only, at offset 4."""
    query, key = torch.zeros(1, 8, 16), torch.zeros(1, 8, 16)
    query[..., 0], key[:, 3, 0] = 64.0, 64.0
    arguments = {"scale": 1.0, "softcap": None, "sparsity": None}
    for verticals, slashes, columns, offsets in (
        (1, 1, {0}, {0}),
        (2, 2, {0, 3}, {0, 4}),
        (3, 3, {0, 3, 7}, {0, 4, 1}),  # all others tie at zero: the most recent column, the nearest diagonal
        (4, 5, {0, 3, 7, 6}, {0, 4, 1, 2, 3}),
    ):
        method = VerticalSlash(verticals=verticals, slashes=slashes, window=1, sinks=1, near=1, tile=16)
        (found,) = patterns(query, key, 1.0, None, method)
        assert (found.columns, found.offsets, found.sure) == (columns, offsets, True)
        pairs = {(q, k) for q in range(8) for k in range(q + 1) if k in columns or q - k in offsets}
        selection = select(method, query, key, **arguments)
        assert selection.selected_pairs().tolist() == [len(pairs)]
        assert selection.executed_pairs().tolist() == [36]  # one tile


@pytest.mark.parametrize("length", [2, 40, 256, 1000])
@pytest.mark.parametrize("method", [VerticalSlash, FlexPrefillVS])
def test_ties_of_columns_and_diagonals(method: type, length: int, seed: int):
    rng = random.Random(seed)
    for heads, kv_heads in HEADS:
        for _ in range(3):
            knobs: dict[str, Any] = {"window": rng.randint(1, length // 2), "sinks": rng.choice((1, 4)), "tile": 16}
            knobs["near"] = rng.choice((1, 3))
            if method is VerticalSlash:
                knobs |= {name: rng.randint(1, length + 2) for name in ("verticals", "slashes")}
            else:
                knobs |= {"alpha": rng.choice((0.0, 0.3, 0.77)), "min_budget": rng.randint(1, length)}
            query, key = exact(heads, kv_heads, length, rng.randrange(2**31))
            chosen = method(**knobs)
            selection = select(chosen, query, key, scale=1.0, softcap=None, sparsity=None)
            said, compared = differences(selection, patterns(query, key, 1.0, None, chosen), 16)
            assert not said, (said, chosen)
            assert compared == heads or method is FlexPrefillVS


def test_ties_of_uniform_attention(seed: int):
    """Zero queries, one in the window: every column and every diagonal ties."""
    length = 300
    key = plain(4, 2, length, 16, seed)[1]
    query = torch.zeros(4, length, 16)
    method = VerticalSlash(verticals=30, slashes=40, window=1, sinks=4, near=8, tile=16)
    selection = select(method, query, key, scale=0.25, softcap=None, sparsity=None)
    columns, offsets = {*range(4), *range(length - 26, length)}, set(range(40))
    assert patterns(query, key, 0.25, None, method)[0] == Pattern(columns, offsets, True)
    said, compared = differences(selection, [Pattern(columns, offsets, True)] * 4, 16)
    assert not said and compared == 4


def test_vertical_slash_keeps_everything_under_its_defaults_up_to_512_tokens(seed: int):
    query, key = plain(2, 1, 400, 16, seed)
    selection = select(VerticalSlash(), query, key, scale=0.25, softcap=None, sparsity=None)
    assert selection.block_q == selection.block_k == 64
    assert selection.selected_pairs().tolist() == selection.executed_pairs().tolist() == [400 * 401 // 2] * 2


@pytest.mark.parametrize("method", [VerticalSlash, FlexPrefillVS])
@pytest.mark.parametrize("kind", ["plain", "structured"])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads"), [(4096, 1, 1), (4096, 4, 2), (4096, 9, 3), (4097, 2, 1), (8192, 2, 1)]
)
def test_vertical_slash_sparsity(method: type, length: int, heads: int, kv_heads: int, kind: str, seed: int):
    query, key = (plain if kind == "plain" else structured)(heads, kv_heads, length, 16, seed)
    # All four sparsities for the three groupings at 4096, two for the rest.
    for sparsity in SPARSITIES if length == 4096 else (0.8, 0.95):
        chosen = method()
        selection = select(chosen, query, key, scale=0.25, softcap=None, sparsity=sparsity)
        knobs = selection.knobs
        executed = density(selection)
        assert abs(executed - (1 - sparsity)) <= PROMISE, (executed, sparsity, knobs)
        forced = forced_density(length, knobs["tile"], knobs["near"], knobs["sinks"])
        assert forced <= (1 - sparsity) / 4 or (knobs["tile"] == 16 and knobs["near"] == 1), (forced, knobs)
        if method is VerticalSlash:
            assert knobs["verticals"] == knobs["slashes"]
        if sparsity not in (0.8, 0.95):
            continue
        # The layout is the definition's at the knobs reported.
        assert {"tile", "near", "sinks"} <= set(knobs) and (method is VerticalSlash or "alpha" in knobs)
        extra = {"min_budget": 0} if method is FlexPrefillVS else {}
        found = patterns(query, key, 0.25, None, chosen, **solved(method, selection) | extra)
        said, compared = differences(selection, found, knobs["tile"])
        assert not said, (said, sparsity, knobs)
        assert compared >= heads // 2, (compared, sparsity, knobs)


@pytest.mark.parametrize("method", [VerticalSlash, FlexPrefillVS, BlockSparse])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1)])
def test_sparsity_at_any_length(method: type, heads: int, kv_heads: int, seed: int):
    rng = random.Random(seed)
    for _ in range(3):
        length, sparsity, strength = rng.randint(4096, 6000), rng.uniform(0.02, 0.96), rng.uniform(1, 15)
        query, key = structured(heads, kv_heads, length, 16, rng.randrange(2**31), strength)
        selection = select(method(), query, key, scale=0.25, softcap=None, sparsity=sparsity)
        executed = density(selection)
        assert abs(executed - (1 - sparsity)) <= PROMISE, (executed, sparsity, length, strength, selection.knobs)


@pytest.mark.parametrize("method", [VerticalSlash, FlexPrefillVS])
@pytest.mark.parametrize("name", ["zero queries", "equal heads", "one key", "bf16", "strided"])
def test_vertical_slash_sparsity_on_other_inputs(method: type, name: str, seed: int):
    length, heads = 4096, 4
    query, key = structured(heads, 2, length, 16, seed)
    if name == "zero queries":
        query = torch.zeros_like(query)
    elif name == "equal heads":
        query, key = query[:1].expand(heads, -1, -1), key[:1].expand(2, -1, -1)
    elif name == "one key":
        query, key = torch.zeros_like(query), torch.zeros_like(key)
        query[..., 0], key[:, length // 3, 0] = 64.0, 64.0
    elif name == "bf16":
        query, key = query.bfloat16(), key.bfloat16()
    else:
        query, key = strided(query), strided(key)
    for sparsity in (0.5, 0.9):
        selection = select(method(), query, key, scale=0.25, softcap=None, sparsity=sparsity)
        executed = density(selection)
        assert abs(executed - (1 - sparsity)) <= PROMISE, (executed, sparsity, selection.knobs)


# ------------------------------------------------------------------------------------------ FlexPrefill, vertical-slash


@pytest.mark.parametrize("kind", ["plain", "structured"])
@pytest.mark.parametrize(("length", "heads", "kv_heads"), SHAPES)
def test_flexprefill_vs(length: int, heads: int, kv_heads: int, kind: str, seed: int):
    rng = random.Random(seed)
    inputs = case(rng, length, heads, kv_heads, kind)
    method = FlexPrefillVS(
        alpha=rng.choice((0.0, 0.1, 0.5, 0.9, 0.97)),
        min_budget=rng.choice((1, 3, 9, 30, 150, 9999)),
        window=rng.choice((1, 16, 64, 256, 9999 if length < 2000 else 256)),
        sinks=rng.choice((1, 4, 20)),
        near=rng.choice((1, 5, 64)),
        tile=rng.choice((16, 32, 64, 128, "auto")),
    )
    selection = select(method, inputs.query, inputs.key, **inputs.arguments, sparsity=None)
    found = patterns(inputs.query, inputs.key, inputs.scale, inputs.softcap, method)
    said, _ = differences(selection, found, 64 if method.tile == "auto" else method.tile)
    assert not said, (said, method, inputs.note)


def test_flexprefill_vs_by_hand():
    """Two queries in the window, four marked keys: each key has 1/4, each diagonal 1/8 or, where two meet, 1/4."""
    query, key = torch.zeros(1, 64, 16), torch.zeros(1, 64, 16)
    query[..., 0], key[:, [10, 11, 30, 40], 0] = 64.0, 64.0
    # Offsets of query 62: 52 51 32 22; of query 63: 53 52 33 23. Masses, descending: 52 (1/4), then six of 1/8.
    for alpha, min_budget, columns, offsets in (
        (0.0, 0, {0}, {0}),  # one each, which the forced ones take
        (0.0, 2, {0, 40}, {0, 52}),
        (0.3, 0, {0, 40}, {0, 52}),  # 1/4 is not above alpha
        (0.3, 3, {0, 40, 30}, {0, 52, 22}),
        (0.6, 0, {0, 40, 30}, {0, 52, 22, 23}),  # not above alpha: 1/4, 1/2 of columns; 1/4, 3/8, 1/2 of diagonals
        (0.6, 5, {0, 40, 30, 11, 10}, {0, 52, 22, 23, 32}),
    ):
        method = FlexPrefillVS(alpha=alpha, min_budget=min_budget, window=2, sinks=1, near=1, tile=16)
        found = patterns(query, key, 1.0, None, method)
        assert found == [Pattern(columns, offsets, True)]
        selection = select(method, query, key, scale=1.0, softcap=None, sparsity=None)
        said, _ = differences(selection, found, 16)
        assert not said, (said, method)


@pytest.mark.parametrize("budget", [1, 64, 100, 700, 2000])
def test_flexprefill_vs_at_alpha_0_is_vertical_slash_of_min_budget(budget: int, seed: int):
    query, key = structured(4, 2, 1000, 16, seed)
    arguments = {"scale": 0.25, "softcap": None, "sparsity": None}
    first = select(FlexPrefillVS(alpha=0.0, min_budget=budget, tile=32), query, key, **arguments)
    second = select(VerticalSlash(verticals=budget, slashes=budget, tile=32), query, key, **arguments)
    assert first.selected_pairs().tolist() == second.selected_pairs().tolist()
    for head in range(4):
        (tiles, columns), (other_tiles, other_columns) = (read_layout(each, head) for each in (first, second))
        assert np.array_equal(tiles, other_tiles) and columns == other_columns


@pytest.mark.parametrize("sparsity", [None, 0.5, 0.8, 0.9])
def test_flexprefill_vs_gives_more_to_flat_heads(sparsity: float | None, seed: int):
    query, key = (0.1 * states for states in plain(4, 1, 4096, 16, seed))
    strong = torch.randperm(4096, generator=torch.Generator().manual_seed(seed))[:20]
    key[0, strong, 0] = 6.0
    query[:2, :, 0], query[2:, :, 0] = 8.0, 0.0
    method = FlexPrefillVS() if sparsity else FlexPrefillVS(alpha=0.5, min_budget=1)
    selection = select(method, query, key, scale=0.25, softcap=None, sparsity=sparsity)
    pairs = [brute_executed(selection, head) for head in range(4)]
    assert max(pairs[:2]) < min(pairs[2:]), (pairs, selection.knobs)
    selected = selection.selected_pairs().tolist()
    assert max(selected[:2]) < min(selected[2:]), (selected, selection.knobs)


# --------------------------------------------------------------------------------------------------------- block-sparse


def compare_blocks(
    selection: Blocks, query: Tensor, key: Tensor, counts: list[int], block: int, subdiagonal: bool
) -> tuple[int, int]:
    """Check every row whose outcome is sure; return how many rows were compared, of how many."""
    layout = selection
    layout.check(len(query))
    assert layout.block_q == layout.block_k == block and layout.length == query.shape[1]
    assert layout.columns is None or not bool(layout.column_counts.any())
    compared = 0
    for head, q, k in per_head(query, key):
        for row, (want, sure) in enumerate(block_rows(q, k, counts, block, subdiagonal)):
            got = layout.indices[head, row, : int(layout.counts[head, row])].tolist()
            assert len(got) == len(want), (head, row)
            if sure:
                compared += 1
                assert got == sorted(want), (head, row)
        executed = brute_executed(layout, head)
        assert int(selection.selected_pairs()[head]) == int(layout.executed_pairs()[head]) == executed
    return compared, len(query) * len(counts)


@pytest.mark.parametrize("kind", ["plain", "structured"])
@pytest.mark.parametrize(("length", "heads", "kv_heads"), SHAPES)
def test_block_sparse(length: int, heads: int, kv_heads: int, kind: str, seed: int):
    rng = random.Random(seed)
    inputs = case(rng, length, heads, kv_heads, kind)
    block = rng.choice((16, 32, 64, 128))
    blocks = -(-length // block)
    for subdiagonal in (False, True):
        top_k = rng.choice((2 + subdiagonal, 3, 5, 9, 64, 999))
        selection = select(
            BlockSparse(top_k=top_k, block_size=block, subdiagonal=subdiagonal),
            inputs.query,
            inputs.key,
            **inputs.arguments,
            sparsity=None,
        )
        compared, rows = compare_blocks(selection, inputs.query, inputs.key, [top_k] * blocks, block, subdiagonal)
        assert compared >= 0.9 * rows, (compared, rows, inputs.note)


def test_block_sparse_by_hand():
    """Five blocks of 16, the last of one token; block means of 0, 1, 1/2, 0 and 0 in the keys."""
    query, key = torch.ones(1, 65, 16), torch.zeros(1, 65, 16)
    key[0, 16:32] = 1.0
    key[0, 32] = 8.0  # mean 0.5
    arguments = {"scale": 0.25, "softcap": None, "sparsity": None}
    for top_k, subdiagonal, drawn in (
        (2, False, ["x....", "xx...", "x.x..", "x..x.", "x...x"]),
        (3, False, ["x....", "xx...", "xxx..", "xx.x.", "xx..x"]),
        (4, False, ["x....", "xx...", "xxx..", "xxxx.", "xxx.x"]),
        (3, True, ["x....", "xx...", "xxx..", "x.xx.", "x..xx"]),
        (4, True, ["x....", "xx...", "xxx..", "xxxx.", "xx.xx"]),
    ):
        layout = select(BlockSparse(top_k, 16, subdiagonal), query, key, **arguments)
        tiles = read_layout(layout, 0)[0]
        assert ["".join(".x"[int(bit)] for bit in row) for row in tiles] == drawn


def test_ties_of_blocks(seed: int):
    """Zero queries: each row keeps block 0 and the last blocks. Whole numbers that repeat: exact sums and ties."""
    key = plain(1, 2, 500, 16, seed)[1]
    layout = select(
        BlockSparse(top_k=5, block_size=16), torch.zeros(4, 500, 16), key, scale=0.25, softcap=None, sparsity=None
    )
    for row in range(32):
        want = [0, *range(max(1, row - 3), row + 1)] if row else [0]
        assert layout.indices[:, row, : len(want)].tolist() == [want] * 4
    rng = random.Random(seed)
    for length, block in ((512, 16), (1024, 32), (1280, 128)):
        levels = torch.tensor([rng.randint(-2, 2) for _ in range(2 * length // block)], dtype=torch.float32)
        key = torch.zeros(2, length, 16)
        key[..., 3] = levels.reshape(2, -1).repeat_interleave(block, 1)
        query = torch.zeros(4, length, 16)
        query[..., 3] = torch.tensor([1.0, -1.0, 2.0, -2.0])[:, None]
        selection = select(BlockSparse(top_k=5, block_size=block), query, key, scale=0.25, softcap=None, sparsity=None)
        compared, rows = compare_blocks(selection, query, key, [5] * (length // block), block, False)
        assert compared == rows


def row_counts(blocks: int, least: int, more: int) -> list[int]:
    return [least + (row >= blocks - more) for row in range(blocks)]


@cache
def block_densities(length: int, block: int) -> dict[tuple[int, int], float]:
    """Executed density when each query block keeps k >= 2 key blocks and the last m one more, for all k and m."""
    blocks = -(-length // block)
    sizes = [min(block, length - row * block) for row in range(blocks)]
    causal = length * (length + 1) / 2
    found = {}
    for least in range(2, blocks + 1):
        # Tiles but the diagonal one are whole; the diagonal one is a triangle.
        pairs = [size * (size + 1) // 2 + size * block * (min(least, row + 1) - 1) for row, size in enumerate(sizes)]
        total = sum(pairs)
        for more in range(blocks):
            if more and least + 1 <= blocks - more + 1:
                total += sizes[blocks - more] * block
            found[least, more] = total / causal
    return found


@pytest.mark.parametrize("kind", ["plain", "structured"])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "block"),
    [
        (4096, 1, 1, 16),
        (4096, 4, 2, 32),
        (4096, 9, 3, 64),
        (4097, 2, 1, 128),
        (5000, 3, 1, 32),
        (8192, 2, 2, 64),
        (8192, 2, 1, 128),
    ],
)
def test_block_sparse_sparsity(length: int, heads: int, kv_heads: int, block: int, kind: str, seed: int):
    query, key = (plain if kind == "plain" else structured)(heads, kv_heads, length, 16, seed)
    subdiagonal = random.Random(seed).random() < 0.5
    method, always = BlockSparse(block_size=block, subdiagonal=subdiagonal), 2 + subdiagonal
    blocks, densities = -(-length // block), block_densities(length, block)
    densities = {(least, more): density for (least, more), density in densities.items() if least >= always}
    assert method.largest_sparsity(length) == pytest.approx(1 - densities[always, 0])
    for sparsity in (0.3, *SPARSITIES):
        target = 1 - sparsity
        if target < densities[always, 0]:
            assert "subdiagonal" * subdiagonal in method.too_short(sparsity, length)
            continue  # the forced blocks alone are more
        selection = select(method, query, key, scale=0.25, softcap=None, sparsity=sparsity)
        executed = density(selection)
        assert abs(executed - target) <= PROMISE, (executed, sparsity)
        best = min(abs(value - target) for value in densities.values())
        assert abs(executed - target) <= best + 1e-9, (executed, sparsity, best)
        # Some k and m give these counts, and the blocks are the highest of each row.
        counts = selection.counts.tolist()
        least = max(min(counts[0][row] for row in range(blocks) if row + 1 > counts[0][row]), always)
        fitting = [
            more
            for more in range(blocks)
            if counts[0] == [min(count, row + 1) for row, count in enumerate(row_counts(blocks, least, more))]
        ]
        assert fitting and counts == [counts[0]] * heads, (sparsity, counts[0])
        compared, rows = compare_blocks(
            selection, query, key, row_counts(blocks, least, fitting[0]), block, subdiagonal
        )
        assert compared >= 0.9 * rows


# --------------------------------------------------------------------------------------------------- SnapKV, Ada-SnapKV


def compare_kept(selection: Keep, kept: list[set[int]]) -> list[str]:
    assert selection.ids.dtype == selection.counts.dtype == torch.int64
    assert len(selection.ids) == len(selection.counts) == len(kept)
    assert selection.total == int(selection.counts.sum())
    said = []
    for head, want in enumerate(kept):
        row, count = selection.ids[head].tolist(), int(selection.counts[head])
        got = row[:count]
        assert got == sorted(set(got)) and not any(row[count:])
        if set(got) != want:
            extra, missing = sorted(set(got) - want)[:9], sorted(want - set(got))[:9]
            said.append(f"head {head}: {count} tokens, expected {len(want)}; only here {extra}, missing {missing}")
    return said


@pytest.mark.parametrize("method", [SnapKV, AdaSnapKV])
@pytest.mark.parametrize("kind", ["plain", "structured"])
@pytest.mark.parametrize(("length", "heads", "kv_heads"), SHAPES)
def test_snapkv(method: type, length: int, heads: int, kv_heads: int, kind: str, seed: int):
    rng = random.Random(seed)
    inputs = case(rng, length, heads, kv_heads, kind)
    sinks, local = rng.choice((1, 4)), rng.choice((1, 8, 128))
    knobs: dict[str, Any] = {
        "capacity": sinks + local + rng.choice((0, 1, 5, 30, 200, 9999)),
        "window": rng.choice((1, 16, 64, 256, 9999 if length < 2000 else 256)),
        "kernel": rng.choice((1, 5, 21)),
        "sinks": sinks,
        "local": local,
    }
    if method is AdaSnapKV:
        knobs["floor"] = rng.choice((0.05, 0.2, 0.5, 0.99))
    chosen = method(**knobs)
    selection = select(chosen, inputs.query, inputs.key, **inputs.arguments, sparsity=None)
    scores = eviction_scores(inputs.query, inputs.key, inputs.scale, inputs.softcap, chosen)
    kept, sure = kept_tokens(scores, chosen.capacity, sinks, local, knobs.get("floor"))
    said = compare_kept(selection, kept)
    assert selection.total == min(chosen.capacity, length) * kv_heads
    assert not said or not sure, (said, chosen, inputs.note)


def test_snapkv_by_hand():
    """Ten tokens; all attention is on key 4 for one query head and on key 6 for the other one of the group."""
    query, key = torch.zeros(2, 10, 16), torch.zeros(1, 10, 16)
    query[0, :, 0] = query[1, :, 1] = 64.0
    key[0, 4, 0] = key[0, 6, 1] = 64.0
    arguments = {"scale": 1.0, "softcap": None, "sparsity": None}
    for method, capacity, kernel, want in (
        (SnapKV, 4, 1, [0, 4, 6, 9]),
        (SnapKV, 3, 1, [0, 6, 9]),  # a tie: the more recent one
        (SnapKV, 5, 1, [0, 4, 6, 8, 9]),  # zeros tie as well
        (SnapKV, 3, 3, [0, 5, 9]),  # both reach 5
        (SnapKV, 6, 3, [0, 4, 5, 6, 7, 9]),
        (SnapKV, 99, 3, list(range(10))),
        (AdaSnapKV, 4, 1, [0, 4, 6, 9]),
        (AdaSnapKV, 3, 3, [0, 5, 9]),
    ):
        chosen = method(capacity=capacity, kernel=kernel, window=2, sinks=1, local=1)
        scores = eviction_scores(query, key, 1.0, None, chosen)
        floor = 0.2 if method is AdaSnapKV else None
        assert kept_tokens(scores, capacity, 1, 1, floor) == ([set(want)], True)
        selection = select(chosen, query, key, **arguments)
        assert selection.ids[0, : selection.counts[0]].tolist() == want


def test_zero_padding_divides_by_the_whole_kernel():
    """Attention on keys 0 and 5 alike: at the edge the pooled score is that of two, not three, tokens divided by 3."""
    query, key = torch.zeros(1, 12, 16), torch.zeros(1, 12, 16)
    query[..., 0], key[:, [0, 5], 0] = 64.0, 64.0
    selection = select(
        SnapKV(capacity=4, kernel=3, window=2, sinks=0, local=1), query, key, scale=1.0, softcap=None, sparsity=None
    )
    # Pooled: 0, 1, 4, 5 and 6 all tie at one third; divided by its two tokens, 0 would lead.
    assert selection.ids[0].tolist() == [4, 5, 6, 11]


def test_snapkv_means_over_the_group_and_ada_takes_the_maximum():
    """Head 0 is wholly on key 2; heads 1 to 3 share theirs between key 5 and another one: 1/4 against 3/8 on average,
    1 against 1/2 at most."""
    query, key = torch.zeros(4, 20, 16), torch.zeros(1, 20, 16)
    for head, keys in enumerate(([2], [5, 8], [5, 9], [5, 10])):
        query[head, :, head] = 64.0
        key[0, keys, head] = 64.0
    for method, want in ((SnapKV, 5), (AdaSnapKV, 2)):
        chosen = method(capacity=3, kernel=1, window=2, sinks=1, local=1)
        selection = select(chosen, query, key, scale=1.0, softcap=None, sparsity=None)
        assert selection.ids[0].tolist() == [0, want, 19]


@pytest.mark.parametrize("method", [SnapKV, AdaSnapKV])
@pytest.mark.parametrize("length", [10, 60, 257, 1000])
def test_ties_of_kept_tokens(method: type, length: int, seed: int):
    rng = random.Random(seed)
    for heads, kv_heads in ((1, 1), (4, 2), (8, 4), (4, 1)):  # groups whose mean is exact
        for _ in range(4):
            sinks, local = rng.choice((1, 2)), rng.choice((1, 3))
            chosen = method(
                capacity=rng.randint(sinks + local, length + 1),
                window=2 ** rng.randint(0, (length // 2).bit_length() - 1),
                kernel=rng.choice((1, 5)),
                sinks=sinks,
                local=local,
            )
            query, key = exact(heads, kv_heads, length, rng.randrange(2**31))
            selection = select(chosen, query, key, scale=1.0, softcap=None, sparsity=None)
            floor = chosen.floor if method is AdaSnapKV else None
            scores = eviction_scores(query, key, 1.0, None, chosen)
            kept, sure = kept_tokens(scores, chosen.capacity, sinks, local, floor)
            said = compare_kept(selection, kept)
            assert sure and not said, (said, chosen)


def test_ada_ties_between_heads_go_to_the_recent_position_then_to_the_lower_head():
    """Zero queries, one in the window: all tokens of three heads tie."""
    query, key = torch.zeros(3, 100, 16), torch.zeros(3, 100, 16)
    chosen = AdaSnapKV(capacity=20, window=1, kernel=1, sinks=2, local=3, floor=0.25)
    selection = select(chosen, query, key, scale=1.0, softcap=None, sparsity=None)
    # 5 forced each; 45 more are the next 15 of each.
    assert [selection.ids[head, :20].tolist() for head in range(3)] == [[0, 1, *range(82, 100)]] * 3
    query[1:, -1, 0], key[1, 50, 0] = 64.0, 64.0  # head 1 is wholly on key 50, so that it keeps its floor and key 50
    selection = select(chosen, query, key, scale=1.0, softcap=None, sparsity=None)
    scores = eviction_scores(query, key, 1.0, None, chosen)
    kept, sure = kept_tokens(scores, 20, 2, 3, 0.25)
    # Of 45: key 50 of head 1 is its one token beyond the floor; 44 tied ones of heads 0 and 2, 22 each.
    assert sure and kept[1] == {0, 1, 50, 97, 98, 99} and kept[0] == kept[2] == {0, 1, *range(75, 100)}
    assert not compare_kept(selection, kept)
    odd = AdaSnapKV(capacity=21, window=1, kernel=1, sinks=2, local=3, floor=0.05)
    # Of 48: key 50 of head 1, then 47 of two heads: position 73 is head 0's.
    selection = select(odd, query, key, scale=1.0, softcap=None, sparsity=None)
    assert selection.counts.tolist() == [29, 6, 28] and selection.total == 63
    assert selection.ids[0, :29].tolist() == [0, 1, *range(73, 100)]


def test_ada_moves_capacity_to_heads_that_need_it(seed: int):
    query, key = plain(4, 4, 600, 16, seed)
    query[0] *= 0.05  # flat: its maxima are small
    chosen = AdaSnapKV(capacity=100, window=32, kernel=5, sinks=2, local=8)
    selection = select(chosen, query, key, scale=0.25, softcap=None, sparsity=None)
    counts = selection.counts.tolist()
    assert sum(counts) == selection.total == 400 and min(counts) == counts[0] == 20
    assert max(counts) > 100


@pytest.mark.parametrize("method", [SnapKV, AdaSnapKV])
@pytest.mark.parametrize("length", [1, 17, 63, 257, 1000, 4097])
def test_snapkv_sparsity(method: type, length: int, seed: int):
    heads, kv_heads = (4, 2) if length < 4000 else (2, 2)
    query, key = structured(heads, kv_heads, length, 16, seed)
    scores = eviction_scores(query, key, 0.25, 20.0, method())
    for sparsity in (0.1, *SPARSITIES, 0.99):
        if abs((1 - sparsity) * length % 1 - 0.5) < 1e-6:
            continue  # half a token: either side
        selection = select(method(), query, key, scale=0.25, softcap=20.0, sparsity=sparsity)
        capacity, sinks, local = solved_eviction(sparsity, length)
        kept, sure = kept_tokens(scores, capacity, sinks, local, method().floor if method is AdaSnapKV else None)
        said = compare_kept(selection, kept)
        assert not said or not sure, (said, sparsity, selection.knobs)
        assert selection.total == capacity * kv_heads
        for head in range(kv_heads):
            assert length - 1 in selection.ids[head, : selection.counts[head]].tolist()
        if length >= 4096:
            assert abs(int(selection.counts.sum()) / (kv_heads * length) - (1 - sparsity)) <= PROMISE


# ---------------------------------------------------------------------------------------------------------------- Quest


def cache_of(
    lengths: list[int], dim: int, seed: int, page_size: int, dtype: torch.dtype
) -> tuple[RaggedKV, PageBounds]:
    """Sequences with gaps between them, filled in one piece and then token by token; what is no key is no number."""
    rng = random.Random(seed)
    starts, end = [], 0
    for length in lengths:
        starts.append(end + rng.randint(0, 5))
        end = starts[-1] + length
    drawn = torch.randn(end + 3, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    keys = torch.full_like(drawn, math.nan)
    for start, length in zip(starts, lengths, strict=True):
        keys[start : start + length] = drawn[start : start + length]
    bounds = PageBounds.empty([-(-length // page_size) + rng.randint(0, 2) for length in lengths], keys, page_size)
    bounds.low.fill_(math.nan), bounds.high.fill_(math.nan)
    late = min(3, min(lengths) - 1)
    held = [0] * len(lengths)
    for more in range(late + 1):
        upto = [length - late + more for length in lengths]
        update_bounds(RaggedKV.of(keys, keys, starts, upto), bounds, torch.tensor(held, dtype=torch.int32))
        held = upto
    kv = RaggedKV.of(keys, keys.clone(), starts, lengths)
    # A number that no length exceeds: the longest one, or above.
    return replace(kv, longest=kv.longest + rng.choice((0, 0, 1, 100))), bounds


def context_of(kv: RaggedKV, bounds: PageBounds, evicted: int = 0) -> Decoding:
    """Each sequence is a row of one KV head, of which so many tokens have been evicted."""
    return Decoding(kv, kv.lengths.long() + evicted, bounds)


def complete_pages(method: Quest, sparsity: float | None, visible: int, logical: int) -> tuple[int, bool]:
    """How many complete pages are read besides the current one, and whether rounding leaves no doubt."""
    current = (visible - 1) // method.page_size
    if sparsity is None:
        return min(int(method.budget) // method.page_size, current), True
    pages = ((1 - sparsity) * logical - (visible - current * method.page_size)) / method.page_size
    return min(max(round(pages), 0), current), abs(pages % 1 - 0.5) > 1e-6


def compare_pages(
    chosen: Reads, query: Tensor, context: Decoding, method: Quest, sparsity: float | None
) -> tuple[int, int]:
    """Check every token whose outcome is sure; return how many lists were compared, of how many."""
    kv = context.kv
    chosen.check(kv)
    sequences, group, steps, _ = query.shape
    lists = 1 if method.share_pages else group
    keys_read, seen = chosen.keys_read(kv), kv.visible(steps)
    logical = CacheView(kv, context.tokens, context.kv_heads).logical(steps)
    assert chosen.unit == method.page_size
    assert chosen.ids.shape[:3] == chosen.counts.shape == keys_read.shape == (sequences, lists, steps)
    assert seen.shape == logical.shape == (sequences, steps)
    compared = 0
    for s in range(sequences):
        length = int(kv.lengths[s])
        keys = kv.keys[int(kv.starts[s]) : int(kv.starts[s]) + length].double().numpy()
        for t in range(steps):
            visible = length - steps + 1 + t
            assert int(seen[s, t]) == visible and int(logical[s, t]) == int(context.tokens[s]) - steps + 1 + t
            count, clear = complete_pages(method, sparsity, visible, int(logical[s, t]))
            for part in range(lists):
                heads = query[s, :, t] if method.share_pages else query[s, part : part + 1, t]
                want, read, sure = quest_pages(heads.double().numpy(), keys, visible, method.page_size, count)
                if not clear:
                    continue
                got = chosen.ids[s, part, t, : int(chosen.counts[s, part, t])].tolist()
                where = (s, part, t, visible)
                assert len(got) == len(want) and int(keys_read[s, part, t]) == read, where
                assert got == sorted(set(got)) and got[-1] == (visible - 1) // method.page_size, where
                if sure:
                    compared += 1
                    assert set(got) == want, where
    return compared, sequences * lists * steps


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("sequences", "group"), [(1, 1), (2, 2), (2, 3), (1, 7)])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 255, 256, 257, 1000])
def test_quest(length: int, sequences: int, group: int, share: bool, seed: int):
    rng = random.Random(seed)
    steps, page, dim = rng.choice((1, 1, 2, 5)), rng.choice((16, 32)), rng.choice((16, 64))
    steps = min(steps, length)
    method = Quest(budget=page * rng.choice((1, 2, 5, 16, 999)), page_size=page, share_pages=share)
    dtype = rng.choice((torch.float32, torch.bfloat16))
    lengths = [length] + [length + rng.randint(0, 40) for _ in range(sequences - 1)]
    kv, bounds = cache_of(lengths, dim, seed, page, dtype)
    query = torch.randn(sequences, group, steps, dim, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    if rng.random() < 0.5:
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    context = context_of(kv, bounds, evicted=rng.choice((0, 100)))
    sparsity = rng.choice((None, None, 0.5, 0.8, 0.95))
    if sparsity is not None:
        method = Quest(page_size=page, share_pages=share)
    selection = select(method, query, context, sparsity=sparsity)
    compared, lists = compare_pages(selection, query, context, method, sparsity)
    assert compared >= 0.5 * lists or sparsity is not None, (compared, lists, method, sparsity)
    # What selecting took: nothing where all is read, else two products with the bounds of each complete page.
    visible, read = kv.visible(steps), selection.keys_read(kv).amax(1).long()
    flops, metadata = method.cost(visible, read, group, dim, kv.keys.element_size())
    for s, t in product(range(sequences), range(steps)):
        complete = (int(visible[s, t]) - 1) // page
        count, clear = complete_pages(method, sparsity, int(visible[s, t]), int(context.tokens[s]) - steps + 1 + t)
        scored = 0 if count == complete else complete
        if clear:
            assert (int(flops[s, t]), int(metadata[s, t])) == (
                scored * group * 4 * dim, scored * 2 * dim * kv.keys.element_size()
            )  # fmt: skip


def test_quest_by_hand():
    """Four complete pages and a current one of two keys; one dimension matters to each query head."""
    keys = torch.zeros(66, 16)
    keys[5, 0], keys[20, 0], keys[40, 1], keys[60, 1] = -4.0, 3.0, 5.0, 2.0
    bounds, kv = PageBounds.empty([5], keys, 16), RaggedKV.of(keys, keys, [0], [66])
    update_bounds(kv, bounds, torch.zeros_like(kv.lengths))
    context = context_of(kv, bounds)
    query = torch.zeros(1, 2, 1, 16)
    query[0, 0, 0, 0], query[0, 1, 0, 1] = -1.0, 1.0
    # Page scores of head 0: 4 0 0 0; of head 1: 0 0 5 2; of both: 4 0 5 2.
    for share, pages, want in (
        (True, 1, [{2, 4}]),
        (True, 2, [{0, 2, 4}]),
        (True, 3, [{0, 2, 3, 4}]),
        (True, 4, [{0, 1, 2, 3, 4}]),
        (False, 1, [{0, 4}, {2, 4}]),
        (False, 2, [{0, 3, 4}, {2, 3, 4}]),  # head 0: zeros tie, the later page
        (False, 3, [{0, 2, 3, 4}, {1, 2, 3, 4}]),
    ):
        chosen = Quest(budget=16 * pages, page_size=16, share_pages=share)
        selection = select(chosen, query, context, sparsity=None)
        for part, expected in enumerate(want):
            got = selection.ids[0, part, 0, : int(selection.counts[0, part, 0])].tolist()
            assert got == sorted(expected)
            assert int(selection.keys_read(kv)[0, part, 0]) == 16 * (len(expected) - 1) + 2
        assert compare_pages(selection, query, context, chosen, None) == (len(want), len(want))


@pytest.mark.parametrize("share", [True, False])
def test_ties_of_pages(share: bool, seed: int):
    """Zero queries: the latest pages. Whole numbers that repeat: sums are exact and tie."""
    rng = random.Random(seed)
    lengths = [200, 333]
    kv, bounds = cache_of(lengths, 16, seed, 16, torch.float32)
    context = context_of(kv, bounds)
    chosen = Quest(budget=64, share_pages=share)
    selection = select(chosen, torch.zeros(2, 2, 3, 16), context, sparsity=None)
    for s, length in enumerate(lengths):
        for t in range(3):
            current = (length - 3 + t) // 16
            for part in range(1 if share else 2):
                got = selection.ids[s, part, t, : int(selection.counts[s, part, t])].tolist()
                assert got == list(range(current - 4, current + 1))
    values = [float(rng.randint(-1, 1)) for _ in range(len(kv.keys) // 16 + 1)]
    keys = torch.tensor(values).repeat_interleave(16)[: len(kv.keys), None].repeat(1, 16)
    kv = RaggedKV.of(keys, keys, kv.starts.tolist(), lengths)
    bounds = PageBounds.empty([21, 21], keys, 16)
    update_bounds(kv, bounds, torch.zeros_like(kv.lengths))
    query = torch.tensor([rng.randint(-2, 2) for _ in range(2 * 2 * 3 * 16)], dtype=torch.float32).reshape(2, 2, 3, 16)
    context = context_of(kv, bounds)
    for budget in (16, 64, 160):
        chosen = Quest(budget=budget, share_pages=share)
        compared, lists = compare_pages(select(chosen, query, context, sparsity=None), query, context, chosen, None)
        assert compared == lists


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("page", [16, 32])
def test_quest_sparsity(sparsity: float, page: int, seed: int):
    rng = random.Random(seed)
    shares = []
    for turn in range(12):
        visible = rng.randint(4096, 8192)
        kv, bounds = cache_of([visible], 16, seed + turn, page, torch.float32)
        query = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(seed + turn))
        chosen = Quest(page_size=page, share_pages=bool(turn % 2))
        context = context_of(kv, bounds)
        selection = select(chosen, query, context, sparsity=sparsity)
        shares.append(float(selection.keys_read(kv).double().mean()) / visible)
        compare_pages(selection, query, context, chosen, sparsity)
    assert abs(sum(shares) / len(shares) - (1 - sparsity)) <= PROMISE, shares
    assert max(abs(share - (1 - sparsity)) for share in shares) <= (page / 2 + 1) / 4096


def test_quest_sparsity_counts_evicted_tokens_as_logical(seed: int):
    """3000 of 6000 keys are held: sparsity 0.8 reads 1200 of these, and 0.2 all."""
    kv, bounds = cache_of([3000], 16, seed, 16, torch.float32)
    query = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(seed))
    context = context_of(kv, bounds, evicted=3000)
    read = [int(select(Quest(), query, context, sparsity=sparsity).keys_read(kv).max()) for sparsity in (0.8, 0.2)]
    assert abs(read[0] - 1200) <= 8 and read[1] == 3000
