"""FlexPrefill against a second, slow reading of Algorithms 1-4 of Lai et al. (ICLR 2025), written from the definition.

The oracle works in fp64 with loops over heads, tokens and blocks, and shares no code with the package. Besides a
head's block mask it returns how near the head came to a different outcome: the estimator works in fp32, so heads
that sit on a cut are left out, and counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from lm_eval_sparse.methods import FlexPrefill

#: Relative distance from a cut below which fp32 and fp64 may rightly disagree.
NEAR = 1e-6
#: Masses under this share may be zero in fp32, so that their order is not defined there.
UNDERFLOW = 1e-30


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


def leading(masses: list[float], size: int) -> tuple[set[int], float]:
    """Entry 0 and the size - 1 largest others, and the relative gap between the last one in and the first one out."""
    others = sorted(range(1, len(masses)), key=lambda index: (masses[index], index), reverse=True)
    chosen, left = others[: size - 1], others[size - 1 :]
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

    low = min(max(1, -(-method.min_budget // block)), blocks)
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
        # The first row holds one block, which is sure of a share of 1/blocks: ties of 1 and 1 - 1e-17 do not matter.
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

    kept_columns, gap = leading(vertical, columns)
    kept_bands, other = leading(slash, bands)
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
        key[kv, strong, marks] += size / math.sqrt(third) * (0.8 + 0.4 * torch.rand(len(strong), 1, generator=generator))
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
