"""Tests of KeyDiff: what every method promises, and that it chooses what its paper says."""

from __future__ import annotations

import math

import torch
from lm_eval_sparse_example_method.keydiff import KeyDiff

from lm_eval_sparse.testing import conformance, select

test_it_holds_what_every_method_promises = conformance.tests(KeyDiff)


def test_it_keeps_what_points_away_from_the_mean() -> None:
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    query, key = torch.randn(4, 203, 16, generator=generator), torch.randn(2, 203, 16, generator=generator)
    kept = select(KeyDiff(capacity=50), query, key)
    for head in range(2):
        unit = [[x / math.hypot(*row) for x in row] for row in key[head].tolist()]
        anchor = [sum(column) / len(unit) for column in zip(*unit, strict=True)]
        cosine = [sum(a * b for a, b in zip(row, anchor, strict=True)) / math.hypot(*anchor) for row in unit]
        order = sorted(range(203), key=lambda token: cosine[token])
        assert kept.ids[head, :50].tolist() == sorted(order[:50])
