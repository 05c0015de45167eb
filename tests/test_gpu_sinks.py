"""Attention sinks, and values of other dimensions than keys, on a CUDA device: against fp64, and without waiting.

The cases are the same in every run, the calls are not: a failing test shows its seed, and GPU_SINKS_SEED=<seed> repeats
it. That a model with sinks decodes in CUDA graphs is for test_decoding.
"""

from __future__ import annotations

import os
import random

import decode_cases
import prefill_cases
import pytest
import torch

from lm_eval_sparse.kernels.dense import dense_attention
from lm_eval_sparse.kernels.prefill import block_sparse_prefill_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def seed() -> int:
    seed = int(os.environ.get("GPU_SINKS_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"GPU_SINKS_SEED={seed}")
    return seed


#: Dimensions of keys and of values, dtype, blocks.
PREFILL = [
    ((192, 128), torch.bfloat16, (64, 64)),
    ((192, 128), torch.float16, (128, 128)),
    ((192, 128), torch.float32, (16, 64)),
    ((24, 16), torch.bfloat16, (16, 16)),
    ((33, 7), torch.float16, (32, 16)),
    ((64, 256), torch.bfloat16, (64, 32)),
    ((64, 64), torch.bfloat16, (64, 64)),
    ((128, 128), torch.float16, (128, 128)),
]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("dims", "dtype", "blocks"), PREFILL, ids=str)
def test_prefill(seed: int, dims: tuple[int, int], dtype: torch.dtype, blocks: tuple[int, int], sinks: bool) -> None:
    draw = prefill_cases.Draw(seed, "cuda")
    for kind in prefill_cases.KINDS:
        for lengths in ([63], [1499], [700, 1, 333]):
            call = prefill_cases.random_call(
                draw, lengths, (8, 2), dims[0], dtype, blocks,
                kind=kind, softcap=draw.rng.choice((None, 20.0)), value_dim=dims[1], sinks=sinks,
            )  # fmt: skip
            options = {"scale": call.scale, "softcap": call.softcap, "sink": call.sink}
            odd = any(dim % 16 for dim in dims)
            if odd:
                with pytest.raises(ValueError, match="multiples of 16"):
                    block_sparse_prefill_rows(*call.inputs, **options, backend="triton")
            else:
                _, used = block_sparse_prefill_rows(*call.inputs, **options, backend="triton", outs=call.outs)
                assert used == "triton"
                call.check()
            outs, used = block_sparse_prefill_rows(*call.inputs, **options)  # what `auto` makes of it
            assert used in (("gather", "flex") if odd else ("triton", "hopper", "fa4", "flex"))
            assert not (sinks and used not in ("triton", "gather"))
            call.check(outs)
            call.check(block_sparse_prefill_rows(*call.inputs, **options, backend="gather")[0])


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decode(seed: int, dtype: torch.dtype, page_size: int | None) -> None:
    draw = decode_cases.Draw(seed, "cuda")
    for steps, own, window in ((1, False, None), (1, True, 100), (3, False, 100)):
        for dims in ((64, 64), (192, 128)):
            case = decode_cases.random_case(
                draw, [700, 33, 0, 0, 4097, 4097], 4, steps, *dims, dtype, page_size=page_size, own=own, heads=2,
                window=None if page_size else window, softcap=draw.rng.choice((None, 20.0)), sinks=True,
            )  # fmt: skip
            case.check("triton")
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                case.run("triton")
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)], ids=str)
@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("queries", [1, 100, 3001])
def test_dense(seed: int, queries: int, window: int | None, dims: tuple[int, int]) -> None:
    """Whichever kernel torch takes, in half precision: sinks keep the accuracy of attention without them."""
    torch.manual_seed(seed)
    for dtype, most in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-4)):
        query, key, value = (
            torch.randn(1, heads, length, dim, device="cuda").to(dtype)
            for heads, length, dim in ((8, queries, dims[0]), (2, 3001, dims[0]), (2, 3001, dims[1]))
        )
        sink = 3 * torch.randn(8, device="cuda").to(dtype)
        scale = dims[0] ** -0.5
        place, ends = torch.arange(3001, device="cuda"), torch.arange(3001 - queries, 3001, device="cuda")[:, None]
        seen = (place <= ends) & (place > ends - (window or 3001))
        wide = [query.double(), *(part.double().repeat_interleave(4, 1) for part in (key, value))]
        scores = (wide[0] @ wide[1].transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
        expected = scores.softmax(-1) @ wide[2]
        expected = expected * torch.sigmoid(scores.logsumexp(-1) - sink.double()[:, None])[..., None]
        out = dense_attention(query, key, value, scale=scale, window=window, sink=sink)
        assert float((out.double() - expected).norm() / expected.norm()) < most
