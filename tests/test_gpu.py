"""On a CUDA device: decoding against fp64 on the CPU, what is kept and read as on the CPU, whole models.

Prefill is in test_gpu_prefill.py.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
import torch
from small_lms import PAIRS, PROMPTS, generate, score

from lm_eval_sparse.kernels.decode import paged_decode
from lm_eval_sparse.kernels.estimate import update_bounds
from lm_eval_sparse.kernels.types import PageBounds, RaggedKV, Reads
from lm_eval_sparse.methods import METHODS, EvictionMethod
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.testing import Decoding, select

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
SHAPES = [(1, 1, 64), (4, 2, 128), (7, 1, 80), (6, 2, 256), (9, 3, 64)]


@pytest.fixture
def source(request: pytest.FixtureRequest) -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 5])
def test_ragged_and_paged_decode(source: random.Random, steps: int, shape: tuple[int, int, int], dtype: Any) -> None:
    heads, kv_heads, dim = shape
    group, size = heads // kv_heads, source.choice((16, 32))
    lengths = [source.randrange(steps, 3000) for _ in range(2 * kv_heads)]
    starts = [sum(lengths[:i]) + 7 * i for i in range(len(lengths))]
    keys, values = (torch.randn(starts[-1] + lengths[-1], dim).to(dtype) for _ in range(2))
    query = torch.randn(len(lengths), group, steps, dim).to(dtype)
    lists = source.choice((1, group))
    width = max(-(-length // size) for length in lengths)
    pages = torch.zeros(len(lengths), lists, steps, width, dtype=torch.int32)
    counts = torch.zeros(pages.shape[:3], dtype=torch.int32)
    for s, length in enumerate(lengths):
        for g in range(lists):
            for t in range(steps):
                last = (length - steps + t) // size
                chosen = [*sorted(source.sample(range(last), source.randrange(0, last + 1))), last]
                pages[s, g, t, : len(chosen)] = torch.tensor(chosen)
                counts[s, g, t] = len(chosen)
    exact = RaggedKV.of(keys.double(), values.double(), starts, lengths)
    cuda = RaggedKV.of(keys.cuda(), values.cuda(), starts, lengths)
    near = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    for selection in (Reads(pages, counts, size), None):
        expected, _ = paged_decode(query.double(), exact, selection, scale=0.1, backend="naive")
        moved = None if selection is None else Reads(pages.cuda(), counts.cuda(), size)
        out, backend = paged_decode(query.cuda(), cuda, moved, scale=0.1)
        assert backend == "triton"
        torch.testing.assert_close(out.cpu().double(), expected, **near)


@pytest.mark.parametrize("name", ["snapkv", "ada_snapkv", "quest"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_selections_are_those_of_the_cpu(source: random.Random, name: str, sparsity: float) -> None:
    """Entries may differ where fp32 sums in another order decide: at most one in a thousand."""
    heads, kv_heads, length, dim = 6, 2, 4097, 64
    query, key = torch.randn(heads, length, dim), torch.randn(kv_heads, length, dim)
    method = METHODS[name]()
    chosen = []
    for device in ("cpu", "cuda"):
        q, k = query.to(device), key.to(device)
        if isinstance(method, EvictionMethod):
            selection = select(method, q, k, scale=dim**-0.5, softcap=None, sparsity=sparsity)
            found = torch.zeros(kv_heads, length, dtype=torch.bool)
            for head, count in enumerate(selection.counts.tolist()):
                found[head, selection.ids[head, :count].cpu()] = True
        else:
            flat, starts = k.reshape(-1, dim), [0, length]
            kv = RaggedKV.of(flat, flat, starts, [length] * 2)
            bounds = PageBounds.empty([300, 300], flat, method.page_size)
            update_bounds(kv, bounds, torch.zeros_like(kv.lengths))
            context = Decoding(kv, torch.tensor([length], device=device), bounds, kv_heads)
            selection = select(method, q[:, -1:].reshape(kv_heads, -1, 1, dim), context, sparsity=sparsity)
            selection.check(kv)
            found = torch.zeros(kv_heads, 300, dtype=torch.bool)
            for head, count in enumerate(selection.counts[:, 0, 0].tolist()):
                found[head, selection.ids[head, 0, 0, :count].long().cpu()] = True
        chosen.append(found)
    assert float((chosen[0] & chosen[1]).sum()) >= 0.999 * float((chosen[0] | chosen[1]).sum())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize("method", ["vertical_slash", "block_sparse", "flexprefill_vs+ada_snapkv+quest"])
def test_models_score_and_generate_as_on_the_cpu(family: str, method: str) -> None:
    options: dict[str, Any] = {"method": method, "sparsity": 0.5, "backend": "gather", "dtype": "float32"}
    if "+" in method:
        options["decode_sparsity"] = 0.7
    found = {}
    for device in ("cpu", "cuda"):
        model = tiny.family(family).to(device)
        lm = SparseHFLM(pretrained=model, tokenizer=tiny.tiny_tokenizer(), batch_size=5, device=device, **options)
        found[device] = score(lm, PAIRS), generate(lm, PROMPTS)
    on_cpu, on_cuda = found["cpu"], found["cuda"]
    assert [a[0] for a in on_cuda[0]] == pytest.approx([a[0] for a in on_cpu[0]], abs=2e-2)
    assert on_cuda[1] == on_cpu[1]
