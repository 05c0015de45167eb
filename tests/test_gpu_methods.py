"""Every method on a CUDA device: what it selects there, and what a model makes of it, beside the same on the CPU."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import tiny
import torch
from small_lms import generate, score, sparse

from lm_eval_sparse.methods import METHODS, PHASE_ARGUMENTS
from lm_eval_sparse.testing import select

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

#: What is typed: every method, wrappers around one that they go around, and evictions in the course of answers.
TYPED = {name: {"method": name, **cls.tiny} for name, cls in METHODS.items() if cls.phase in PHASE_ARGUMENTS}
TYPED |= {
    "twilight:quest": {"method": "twilight:quest", "p": 0.6, "budget": 48, "page_size": 8},
    "flexprefill tokens": {"method": "flexprefill", **METHODS["flexprefill"].tiny, "coverage": "tokens"},
    "streaming_llm rotated": {"method": "streaming_llm", "capacity": 48, "rotate": True},
    "quest own pages": {"method": "quest", **METHODS["quest"].tiny, "share_pages": False},
    **{f"{name} every": {"method": name, "capacity": 48, "every": 4} for name in ("h2o", "tova", "knorm")},
    "streaming_llm every": {"method": "streaming_llm", "capacity": 48, "every": 4},
    "h2o every, quest": {"method": "h2o+quest", "capacity": 60, "every": 4, "budget": 16, "page_size": 8},
    "h2o every, twilight:quest": {"method": "h2o+twilight:quest", "capacity": 60, "every": 4, "page_size": 8},
}


def answers(typed: dict[str, Any], device: str, seed: int) -> tuple[Any, ...]:
    rng = random.Random(seed)
    model = copy.deepcopy(tiny.family("llama", num_key_value_heads=2)).to(device)
    # Kernels take half precision on a GPU; in fp32 the two devices differ by rounding alone.
    lm = sparse(model, **typed, batch_size=3, device=device)
    prompts = [tiny.words(rng.randrange(10**6), count) for count in (30, 84, 140)]
    pairs = [(prompt, " " + tiny.words(rng.randrange(10**6), 9)) for prompt in prompts]
    scored = [float(found[0]) for found in score(lm, pairs)]
    written = generate(lm, prompts, max_gen_toks=14)
    return scored, list(written), lm.report()["phases"]


@pytest.mark.parametrize("typed", list(TYPED))
def test_a_gpu_gives_what_the_cpu_gives(typed: str) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    here, there = (answers(TYPED[typed], device, seed) for device in ("cpu", "cuda"))
    # Keys of equal words have equal norms, and rounding decides between them: knorm is compared on other keys below.
    if not typed.startswith("knorm"):
        assert there[0] == pytest.approx(here[0], abs=2e-2)
        same = sum(one == other for one, other in zip(here[1], there[1], strict=True))
        assert same >= 2, "answers of a random model may part at a tie, not all of them"
    for phase, figures in here[2].items():
        assert there[2][phase]["calls"] == figures["calls"], phase
        if figures["executed_sparsity"] is not None:
            assert there[2][phase]["executed_sparsity"] == pytest.approx(figures["executed_sparsity"], abs=5e-3), phase
        assert there[2][phase].get("compactions") == figures.get("compactions")
    assert set(there[2]["decode"].get("loops", {"cuda_graph": 1})) <= {"cuda_graph", "eager"}
    assert there[2]["decode"]["loops"].get("cuda_graph"), there[2]["decode"]


@pytest.mark.parametrize("sparsity", [None, 0.8])
@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if cls.phase in ("prefill", "eviction")])
def test_selections_of_random_keys_are_those_of_the_cpu(name: str, sparsity: float | None) -> None:
    cls = METHODS[name]
    generator = torch.Generator().manual_seed(random.SystemRandom().randrange(2**32))
    stretch = torch.linspace(0.3, 3, 64)
    states = [torch.randn(heads, 1037, 64, generator=generator) * stretch for heads in (4, 2, 2)]
    masks = []
    for device in ("cpu", "cuda"):
        method = cls(**(cls.tiny if sparsity is None else {}))
        found = select(method, *(part.to(device) for part in states), scale=0.125, sparsity=sparsity)
        if cls.phase == "prefill":
            mask = found.mask()
            if found.columns is not None:
                seen = torch.zeros(4, found.blocks_q, 1037 + 1, dtype=torch.bool, device=device)
                valid = torch.arange(found.columns.shape[-1], device=device) < found.column_counts[..., None]
                ids = torch.where(valid, found.columns.expand(valid.shape), 1037).long()
                mask = torch.cat([mask, seen.scatter_(-1, ids, True)[..., :-1]], -1)
        else:
            mask = torch.zeros(2, 1037, dtype=torch.bool, device=device)
            for head, number in enumerate(found.counts.tolist()):
                mask[head, found.ids[head, :number]] = True
        masks.append(mask.cpu())
    here, there = masks
    assert (here != there).float().sum() <= 0.002 * here.float().sum() + 2
