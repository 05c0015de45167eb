"""`lse` of block-sparse prefill: against the definition, in the backends that give it; the others say that they do not.

PREFILL_SEED=<seed> repeats a run.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from prefill_cases import interpreter_missing

from lm_eval_sparse.kernels.prefill import WITH_LSE, block_sparse_prefill, block_sparse_prefill_rows
from lm_eval_sparse.kernels.types import Blocks

MISSING = interpreter_missing()
TRITON = pytest.param("triton", marks=pytest.mark.skipif(MISSING is not None, reason=MISSING or ""))


@pytest.mark.parametrize("kind", ["tiles", "columns"])
@pytest.mark.parametrize("backend", ["naive", "gather", TRITON])
def test_the_definition(backend: str, kind: str) -> None:
    seed = int(os.environ.get("PREFILL_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"PREFILL_SEED={seed}")
    torch.manual_seed(seed)
    rng = random.Random(seed)
    rows, logs, calls = [], [], []
    softcap, block_q, block_k = rng.choice((None, 5.0)), rng.choice((16, 64)), rng.choice((16, 32))
    for _ in range(2):
        length, heads, dim = rng.randrange(1, 180), 4, 64
        query, key, value = (torch.randn(count, length, dim) for count in (heads, 2, 2))
        n_q, n_k = -(-length // block_q), -(-length // block_k)
        last = torch.clamp((torch.arange(n_q) + 1) * block_q, max=length) - 1
        mask = (torch.rand(heads, n_q, n_k) < 0.4) & (torch.arange(n_k) * block_k <= last[:, None])
        mask[..., 0] = True
        layout = Blocks.from_mask(mask, length, block_q, block_k)
        place = torch.arange(length)
        seen = mask[:, place // block_q][:, :, place // block_k]
        if kind == "columns":
            columns = torch.rand(heads, length) < 0.2
            layout = layout.with_columns(columns)
            seen = seen | columns[:, None]
        scores = query.double() @ key.double().repeat_interleave(2, 0).transpose(1, 2) * 0.125
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~(seen & (place <= place[:, None])), -torch.inf)
        rows.append(scores.logsumexp(-1))
        logs.append(torch.full((heads, length), torch.nan))
        calls.append((query, key, value, layout))
    options = {"scale": 0.125, "softcap": softcap, "backend": backend}
    outs, used = block_sparse_prefill_rows(*zip(*calls, strict=True), **options, lses=logs)
    assert used == backend
    plain, _ = block_sparse_prefill_rows(*zip(*calls, strict=True), **options)
    for out, without, log, expected in zip(outs, plain, logs, rows, strict=True):
        assert torch.equal(out, without), "asking for lse changes no bit of the output"
        assert torch.allclose(log.double(), expected, atol=2e-5)


def test_backends_without_it_are_passed_over() -> None:
    query, key = torch.randn(2, 300, 64), torch.randn(1, 300, 64)
    layout = Blocks.from_mask(torch.ones(2, 3, 3, dtype=torch.bool).tril(), 300, 128, 128)
    lse = torch.empty(2, 300)
    assert block_sparse_prefill(query, key, key, layout, lse=lse)[1] in WITH_LSE
    with pytest.raises(ValueError, match="'flex' cannot run here: it gives no lse"):
        block_sparse_prefill(query, key, key, layout, lse=lse, backend="flex")
    with pytest.raises(ValueError, match="lse is"):
        block_sparse_prefill(query, key, key, layout, lse=lse[:, :200])
