"""MagicPIG against `literal_methods`: which keys meet the query, what weight they get, and that estimates are unbiased.

What it samples hangs on its random directions; here they are asked of the method. That they are what the definition
says follows from how often keys are read over many seeds.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import literal_methods as literal
import numpy as np
import pytest
import torch
from test_methods_literal import BATCHES, DIM, SPARSITIES, Steps, steps_of

from lm_eval_sparse.kernels.types import RaggedKV, Reads
from lm_eval_sparse.methods import METHODS
from lm_eval_sparse.methods.decode import magicpig
from lm_eval_sparse.testing import call_of

#: Angles from a bit's plane, in the sense of a product over the lengths, that fp32 may see on either side.
NEAR = 2e-6


@pytest.fixture
def seed() -> int:
    drawn = int(os.environ.get("LITERAL_SEED", random.SystemRandom().randrange(2**31)))
    print(f"LITERAL_SEED={drawn}")
    return drawn


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def asked(batch: Steps, method: Any, sparsity: float | None = None) -> Reads:
    """The prompt is what is there before the new tokens: the mean key is that of the prompt."""
    steps = batch.query.shape[2]
    found, call = call_of(method, batch.query, batch.cache, scale=batch.scale, softcap=batch.softcap, sparsity=sparsity)
    kv = batch.cache.kv
    before = kv.lengths - steps
    prompt = RaggedKV.of(kv.keys, kv.values, kv.starts.tolist(), before.tolist(), heads=kv.heads)
    found.prefilled(replace(call, cache=replace(call.cache, kv=prompt, tokens=call.cache.tokens - steps)))
    found.appended(call, before)
    reads = found.select(call)
    reads.check(kv)
    assert reads.unit == 1 and reads.ids.shape[1] == batch.query.shape[1] and reads.bias is not None
    return reads


def listed(reads: Reads, s: int, g: int, t: int) -> dict[int, float]:
    """Keys that a query head reads, with their bias."""
    number = int(reads.counts[s, g, t])
    return dict(zip(reads.ids[s, g, t, :number].tolist(), reads.bias[s, g, t, :number].tolist(), strict=True))


def heads_of(batch: Steps) -> Iterator[tuple[int, int, int, np.ndarray, np.ndarray, np.ndarray, int]]:
    """Sequence, query head of its group, step, query, keys, mean key of the prompt, and tokens so far."""
    group = batch.query.shape[1]
    for row, t, query, key, tokens in batch.each():
        for h in range(len(query)):
            kv, g = divmod(h, group)
            own = key[kv]
            yield row * batch.kv_heads + kv, g, t, query[h], own, own[: len(own) - 1 - t].mean(0), tokens


def directions(method: Any) -> np.ndarray:
    """`(T, bits, D)`: what the method draws, bit by bit of table after table."""
    drawn = magicpig.directions(DIM, method.tables, method.bits, method.seed, 0, torch.device("cpu"))
    return drawn.double().numpy().T.reshape(method.tables, method.bits, DIM)


def forced(sinks: int, local: int, visible: int) -> set[int]:
    return {*range(min(sinks, visible)), *range(max(0, visible - local), visible)}


@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "steps"), BATCHES)
def test_bias_is_of_the_chance_to_be_read(lengths: list[int], heads: int, kv_heads: int, steps: int, seed: int) -> None:
    batch = steps_of(seed, lengths, heads, kv_heads, steps, 3.0 if heads == 3 else None)
    for bits, tables, sinks, local in ((10, 150, 4, 64), (3, 8, 1, 5), (5, 40, 0, 1)):
        method = METHODS["magicpig"](bits=bits, tables=tables, sinks=sinks, local=local, seed=seed % 1000)
        reads = asked(batch, method)
        for s, g, t, query, key, mean, _ in heads_of(batch):
            found, always = listed(reads, s, g, t), forced(sinks, local, len(key))
            assert always <= set(found)
            own = literal.hashed(query, key, mean, np.zeros((0, 1, len(query))), 0)
            chance = own.chance(bits, tables)
            for j, bias in found.items():
                if j in always:
                    assert bias == 0
                else:
                    assert bias == pytest.approx(-math.log(chance[j]), rel=1e-3, abs=2e-4), (s, g, t, j, chance[j])


def test_keys_are_read_as_often_as_said_and_estimates_are_unbiased(seed: int) -> None:
    """Over many seeds: each key's share of reads is u, numerators and denominators are those of dense attention."""
    draws, bits, tables, sinks, local = 300, 2, 8, 2, 3
    batch = steps_of(seed, [63], 4, 2)
    cases = list(heads_of(batch))
    times = np.zeros((len(cases), 63))
    sampled, unweighted = np.zeros((draws, len(cases), 1 + batch.query.shape[-1])), np.zeros((draws, len(cases)))
    for draw in range(draws):
        method = METHODS["magicpig"](bits=bits, tables=tables, sinks=sinks, local=local, seed=seed % 1000 + draw)
        reads = asked(batch, method)
        for at, (s, g, t, query, key, _, _) in enumerate(cases):
            for j, bias in listed(reads, s, g, t).items():
                times[at, j] += 1
                weight = math.exp(batch.scale * float(key[j] @ query))
                sampled[draw, at] += weight * math.exp(bias) * np.array([1, *key[j]])  # values are the keys
                unweighted[draw, at] += weight
    for at, (_, _, _, query, key, mean, _) in enumerate(cases):
        chance = literal.hashed(query, key, mean, np.zeros((0, 1, len(query))), 0).chance(bits, tables)
        chance[list(forced(sinks, local, 63))] = 1
        error = np.sqrt(chance * (1 - chance) / draws)
        assert (abs(times[at] / draws - chance) <= 5 * error + 1e-9).all(), (at, times[at] / draws, chance)
        exact = np.exp(batch.scale * key @ query) @ np.concatenate([np.ones((63, 1)), key], 1)
        error = sampled[:, at].std(0) / math.sqrt(draws)
        assert (abs(sampled[:, at].mean(0) - exact) <= 5 * error).all(), (sampled[:, at].mean(0), exact, error)
        assert unweighted[:, at].mean() < exact[0] - 5 * error[0], "without weights it would be biased"


def compare(found: dict[int, float], own: literal.Hashed, always: set[int], bits: int, tables: int) -> int:
    """Check one list; returns the keys that rounding may decide."""
    must, may = own.collides(bits, tables)
    sure, perhaps = (always | set(np.flatnonzero(part).tolist()) for part in (must, may))
    assert sure <= set(found) <= perhaps, (bits, tables, sorted(set(found) - perhaps), sorted(sure - set(found)))
    chance = own.chance(bits, tables)
    for j, bias in found.items():
        wanted = 0.0 if j in always else -math.log(chance[j])
        assert bias == pytest.approx(wanted, rel=1e-3, abs=2e-4), (bits, tables, j)
    return len(perhaps - sure)


@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "steps"), BATCHES)
def test_keys_that_meet_the_query_twice(lengths: list[int], heads: int, kv_heads: int, steps: int, seed: int) -> None:
    batch = steps_of(seed, lengths, heads, kv_heads, steps)
    doubtful, keys = 0, 0
    for bits, tables, sinks, local in ((10, 150, 4, 64), (3, 8, 1, 5)):
        method = METHODS["magicpig"](bits=bits, tables=tables, sinks=sinks, local=local, seed=seed % 1000)
        reads = asked(batch, method)
        for s, g, t, query, key, mean, _ in heads_of(batch):
            own = literal.hashed(query, key, mean, directions(method), NEAR)
            doubtful += compare(listed(reads, s, g, t), own, forced(sinks, local, len(key)), bits, tables)
            keys += len(key)
    assert doubtful <= 1 + keys // 100


@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "steps"), BATCHES)
def test_bits_and_tables_follow_from_a_sparsity(
    lengths: list[int], heads: int, kv_heads: int, steps: int, seed: int
) -> None:
    batch = steps_of(seed, lengths, heads, kv_heads, steps)
    method = METHODS["magicpig"](tables=40, seed=seed % 1000)
    doubtful, keys = 0, 0
    for sparsity in SPARSITIES:
        reads = asked(batch, method, sparsity)
        cases = list(heads_of(batch))
        hashes = [literal.hashed(query, key, mean, directions(method), NEAR) for _, _, _, query, key, mean, _ in cases]
        for row in range(len(lengths)):
            for step in range(steps):
                mine = [
                    (case, own)
                    for case, own in zip(cases, hashes, strict=True)
                    if case[0] // kv_heads == row and case[2] == step
                ]
                visible, tokens = len(mine[0][0][4]), mine[0][0][6]
                always = forced(*shrunk(1 - sparsity, tokens), visible)
                budget = (1 - sparsity) * heads * tokens
                bits, tables = literal.magicpig_solved([own for _, own in mine], always, budget)
                for (s, g, t, *_), own in mine:
                    doubtful += compare(listed(reads, s, g, t), own, always, bits, tables)
                    keys += visible
    assert doubtful <= 1 + keys // 100


def shrunk(share: float, tokens: int) -> tuple[int, int]:
    """Sinks and local tokens at a sparsity: a quarter of what may be read at most."""
    room = int(share * tokens / 4)
    sinks = min(4, room)
    return sinks, max(1, min(64, room - sinks))
