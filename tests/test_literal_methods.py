"""The transcriptions of `literal_methods` by themselves: what the papers say of them, and cases worked out by hand."""

from __future__ import annotations

import itertools
import math
import random

import literal_methods as literal
import numpy as np
import pytest


@pytest.fixture
def drawn() -> np.random.Generator:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def test_a_cover_is_the_smallest(drawn: np.random.Generator) -> None:
    """No smaller set with the forced ones has so much, by trying all."""
    for _ in range(20):
        scores, rest = drawn.random(7).tolist(), drawn.random()
        row = literal.Row(scores, {0, 6}, [1] * 7)
        taken = row.cover(rest)
        enough = [
            len(some) + 2
            for size in range(6)
            for some in itertools.combinations(range(1, 6), size)
            if sum(scores) - sum(scores[j] for j in {0, 6, *some}) <= rest * sum(scores) + 1e-12
        ]
        assert {0, 6} <= taken and len(taken) == min(enough)
        assert row.cover(0.0) == set(range(7)) and row.cover(1.0) == {0, 6}


def test_ties_go_to_the_later_one() -> None:
    assert literal.best([1.0, 2.0, 1.0, 1.0], 2) == {1, 3}
    assert literal.Row([1.0] * 5, {0}).cover(0.5) == {0, 3, 4}


def test_one_rest_is_the_nearest(drawn: np.random.Generator) -> None:
    """No other share that all rows may miss costs what is nearer to the budget, by trying a thousand."""
    for _ in range(5):
        rows = [literal.Row(drawn.random(9).tolist(), {0, 8}, drawn.integers(1, 9, 9).tolist()) for _ in range(4)]
        budget = drawn.uniform(20, 150)

        def off(sets: literal.Sets, rows: list[literal.Row] = rows, budget: float = budget) -> float:
            return abs(sum(row.costs[j] for row, own in zip(rows, sets, strict=True) for j in own) - budget)

        rest, taken = literal.one_rest(rows, budget)
        tried = min(off([row.cover(share) for row in rows]) for share in np.linspace(0, 1, 1001))
        assert off(taken) <= tried + 1e-9
        assert rest == math.inf or taken == [row.cover(rest) for row in rows]


def test_block_scores_hold_all_attention(drawn: np.random.Generator) -> None:
    query, key = drawn.normal(size=(4, 63, 8)), drawn.normal(size=(2, 63, 8))
    scores = literal.oracle_block_scores(query, key, 0.35, 2.0, 16)
    assert scores.sum(2) == pytest.approx(np.tile([16, 16, 16, 15], (4, 1)))
    assert not np.triu(scores[0], 1).any()
    assert sum(literal.tile_pairs(63, 16, i, j) for i in range(4) for j in range(i + 1)) == 63 * 64 / 2


def test_xattention_of_repeated_tokens_is_exact(drawn: np.random.Generator) -> None:
    """Where the tokens of each group of a stride are equal, its antidiagonal sums are the true scores."""
    query, key = drawn.normal(size=(2, 40, 8)), drawn.normal(size=(1, 40, 8))
    repeated = [np.repeat(states, 4, axis=1) for states in (query, key)]
    found = literal.xattention_scores(*repeated, 0.35, 32, 4)
    assert found == pytest.approx(literal.oracle_block_scores(query, key, 0.35, None, 8))
    odd = literal.xattention_scores(repeated[0][:, :157], repeated[1][:, :157], 0.35, 32, 4)
    assert odd[:, :4] == pytest.approx(found[:, :4])
    assert odd.sum(2)[:, 4] == pytest.approx(8)  # 29 tokens are 8 groups


def test_a_shape_by_hand() -> None:
    rows = ["".join(".x"[int(bit)] for bit in row) for row in literal.a_shape(80, 17, [2] * 5)]
    assert rows == ["x....", "xx...", "xxx..", "xxxx.", "xx.xx"]
    off, masks = literal.a_shapes(160, 16, 0.5)
    assert off / (160 * 161 / 2) < 0.01 and masks


def test_flexprefill_by_hand() -> None:
    """80 tokens, all attention on key 37: one token covers any gamma of the columns, 15 of 16 distances cover .9."""
    query, key = np.zeros((80, 16)), np.zeros((80, 16))
    query[:, 0], key[37, 0] = 100.0, 100.0
    head = literal.FlexHead.of(query, key, 1.0, None, 16)
    mask, _ = head.by_tokens(0.9, 0, 0)
    # One of the column blocks: 2. One of the bands: distances 27..31 are in band 1, 32..42 in band 2: band 2.
    assert ["".join(".x"[int(bit)] for bit in row) for row in mask] == ["x....", "xx...", "x.x..", "xxxx.", "x.x.x"]
    whole, _ = head.by_tokens(0.9, 0, 48)
    assert whole[4].tolist() == [True, False, True, True, True]  # three bands: 2, 1 and the nearest one


def test_thresholds_of_tiles_are_flexprefill_s(drawn: np.random.Generator) -> None:
    query, key = drawn.normal(size=(150, 16)) * 2, drawn.normal(size=(150, 16))
    head = literal.FlexHead.of(query, key, 0.25, None, 16)
    assert head.vertical.sum() == pytest.approx(16) and head.slash.sum() == pytest.approx(16)
    assert [head.columns.sum(), head.bands.sum(), sum(head.cells.values())] == pytest.approx([1] * 3)
    for tau in (0, 9):
        for gamma in (0, 0.2, *drawn.random(5)):
            assert np.array_equal(head.by_tokens(gamma, tau, 0)[0], head.thresholds(tau) < max(gamma, 1e-12))


def test_kept_by_hand() -> None:
    key = np.zeros((1, 6, 2))
    key[0, :, 0] = [3, 1, 2, 1, 5, 4]
    assert literal.knorm(key, 2) == [{1, 3}] and literal.knorm(key, 3) == [{1, 2, 3}]
    assert literal.streaming_llm(range(10), 5, 2) == {0, 1, 7, 8, 9}
    assert literal.streaming_llm([0, 1, 7, 8, 9, 10], 5, 2) == {0, 1, 8, 9, 10}
    assert literal.streaming_positions(10, 4) == [6, 7, 8, 9] and literal.streaming_positions(3, 4) == [0, 1, 2]
    assert literal.h2o([9, 1, 8, 2, 3, 0], 4, 0.5) == {0, 2, 4, 5} and literal.h2o([9, 1, 8], 3, 0.5) == {0, 1, 2}
    assert literal.h2o([9, 1, 8, 2, 3, 0], 3, 0.5) == {0, 4, 5}  # half of three is two


def test_masses_of_eviction_are_the_queries(drawn: np.random.Generator) -> None:
    weights = literal.attention(drawn.normal(size=(6, 41, 8)), drawn.normal(size=(2, 41, 8)), 0.3, None)
    assert sum(literal.tova_scores(weights[:, -1])) == pytest.approx(1)
    assert [sum(own) for own in literal.h2o_scores(weights, 2)] == pytest.approx([3 * 41] * 2)
    first, second = literal.h2o_scores(weights[:, :20], 2), literal.h2o_scores(weights[:, 20:], 2)
    assert np.add(first, second) == pytest.approx(np.array(literal.h2o_scores(weights, 2)))


@pytest.mark.parametrize("layers", [2, 7, 32])
def test_pyramids_have_the_mean(layers: int) -> None:
    for beta, capacity, length in ((20, 100, 1000), (5, 100, 1000), (20, 700, 1000), (20, 1000, 1000)):
        shares = [literal.pyramid_share(at, layers, beta, capacity, length) for at in range(layers)]
        assert sum(shares) / layers == pytest.approx(1)
        assert shares[0] * capacity <= length + 1e-9 and np.allclose(np.diff(shares, 2), 0)
        if capacity == 100:
            assert shares[-1] * capacity == pytest.approx(capacity / beta)
            assert shares[0] * capacity == pytest.approx(2 * capacity - capacity / beta)


def test_oracles_of_decoding(drawn: np.random.Generator) -> None:
    query, key = drawn.normal(size=(4, 8)), drawn.normal(size=(2, 50, 8))
    before: literal.Sets = [set()] * 4
    for budget in (0, 1, 5, 49, 99):
        found = literal.oracle_topk(query, key, budget)
        assert all(len(own) == min(50, 1 + budget) and 49 in own for own in found)
        assert all(one <= other for one, other in zip(before, found, strict=True))
        before = found
    assert literal.oracle_topk(query, key, 0, 0.2, 60) == literal.oracle_topk(query, key, 11)
    weights = [literal.softmax(np.array(row)) for row in literal.step_scores(query, key, 0.3, 2.0)]
    for p in (0.1, 0.7, 0.99):
        for own, w in zip(literal.oracle_topp(query, key, 0.3, 2.0, p)[1], weights, strict=True):
            held = sum(w[list(own)])
            others = [w[j] for j in own if j != 49]
            assert held >= p - 1e-12 and (not others or held - min(others) < p)


def test_quest_bounds_products(drawn: np.random.Generator) -> None:
    """The page that holds the largest product is never below a page all of whose products are smaller bounds."""
    query, key = drawn.normal(size=(2, 8)), drawn.normal(size=(1, 70, 8))
    for share in (True, False):
        found = literal.quest(query, key, 16, 2, share)
        assert all(len(own) == 38 and {64, 65, 66, 67, 68, 69} <= own for own in found)
        assert not share or found[0] == found[1]
    key[0, 20] = 50 * query[0]
    assert 20 in literal.quest(query, key, 16, 1, False)[0]


def test_four_bits(drawn: np.random.Generator) -> None:
    key = drawn.normal(size=(30, 16))
    estimate, _ = literal.four_bit(key, np.float64)
    step = (key.max(1) - key.min(1)) / 15
    assert (abs(estimate - key).max(1) <= step / 2 + 1e-12).all()
    assert all(len(set(row)) <= 16 for row in estimate.round(9).tolist())
    again, _ = literal.four_bit(estimate, np.float64)
    assert again == pytest.approx(estimate)
    assert literal.four_bit(np.full((1, 4), 2.5), np.float64)[0].tolist() == [[2.5] * 4]


def test_twilight_keeps_p_of_what_is_inside(drawn: np.random.Generator) -> None:
    query, key = drawn.normal(size=(4, 8)), drawn.normal(size=(2, 50, 8))
    inside = [set(range(h, 50)) for h in range(4)]
    _, found, weights = literal.twilight(query, key, inside, 0.3, None, 0.8)
    for own, inner, w in zip(found, inside, weights, strict=True):
        assert 49 in own and own <= inner and len(w) == len(inner)
        held = [w[sorted(inner).index(j)] for j in own]
        assert sum(held) >= 0.8 and sum(w) == pytest.approx(1)
    everything = [set(range(50))] * 4
    assert (
        literal.twilight(query, key, everything, 0.3, 2.0, 0.8)[1] == literal.oracle_topp(query, key, 0.3, 2.0, 0.8)[1]
    )


def test_magicpig_chances(drawn: np.random.Generator) -> None:
    """Bits agree as often as angles say, keys meet twice as often as the formula says, and the estimate is unbiased."""
    dim, number, bits, tables, draws = 8, 12, 3, 6, 3000
    query, key = drawn.normal(size=dim), drawn.normal(size=(number, dim))
    mean = key.mean(0)
    scores = np.exp(0.5 * key @ query)
    agreed, met, estimates = np.zeros(number), np.zeros(number), []
    for _ in range(draws):
        found = literal.hashed(query, key, mean, drawn.normal(size=(tables, bits, dim)), 0.0)
        agreed += found.equal.mean((1, 2))
        sure, _ = found.collides(bits, tables)
        met += sure
        estimates.append(float((scores[sure] / found.chance(bits, tables)[sure]).sum()))
    p, chance = found.p, found.chance(bits, tables)
    x = p**bits
    exact = [sum(math.comb(tables, m) * y**m * (1 - y) ** (tables - m) for m in range(2, tables + 1)) for y in x]
    assert chance == pytest.approx(np.array(exact))
    assert (abs(agreed / draws - p) < 5 * np.sqrt(p * (1 - p) / (draws * bits * tables))).all()
    assert (abs(met / draws - chance) < 5 * np.sqrt(chance * (1 - chance) / draws) + 1e-9).all()
    error = np.std(estimates) / math.sqrt(draws)
    assert abs(np.mean(estimates) - scores.sum()) < 5 * error < 0.5 * scores.sum()
