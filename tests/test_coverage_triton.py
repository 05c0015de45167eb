"""FlexPrefill's Triton operators on the CPU, under Triton's interpreter, against their torch versions.

The interpreter computes products of bf16 wrongly, so that dtype is tested on GPUs only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from prefill_cases import interpreter_missing
from torch import Tensor

from lm_eval_sparse.kernels import backends
from lm_eval_sparse.kernels.estimate import WindowBlocks, pool, window_blocks
from lm_eval_sparse.kernels.index import top_p_blocks as coverage
from lm_eval_sparse.kernels.types import causal_pairs
from lm_eval_sparse.methods.prefill.flexprefill import FlexPrefill
from lm_eval_sparse.testing import select

if (reason := interpreter_missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain(heads: int, kv_heads: int, length: int, dim: int, seed: int = 0, size: float = 1.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(n, length, dim, generator=generator) * size for n in (heads, kv_heads))
    return query, key


def constant(heads: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(heads, length, 16), torch.zeros(1, length, 16)


def mostly_empty(heads: int, length: int) -> tuple[Tensor, Tensor]:
    """Most of the pooled map is exactly zero."""
    query, key = torch.full((heads, length, 16), 100.0), torch.zeros(1, length, 16)
    key[:, :128] = 100.0
    return query, key


def window_of(query: Tensor, key: Tensor, block: int, softcap: float | None, backend: str) -> WindowBlocks:
    means = pool(key, block, backend="naive")
    return window_blocks(query, key, means, block, scale=query.shape[-1] ** -0.5, softcap=softcap, backend=backend)


WINDOWS = [
    # heads, KV heads, length, head_dim, block, softcap
    (1, 1, 1, 16, 16, None),
    (2, 1, 63, 24, 16, None),
    (6, 2, 333, 16, 32, 5.0),
    (3, 1, 1000, 80, 64, None),
    (4, 2, 640, 64, 128, None),
    (2, 2, 100, 32, 128, None),
    (7, 1, 257, 16, 128, 20.0),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("heads", "kv_heads", "length", "dim", "block", "softcap"), WINDOWS)
def test_window_blocks(
    heads: int, kv_heads: int, length: int, dim: int, block: int, softcap: float | None, dtype: torch.dtype
):
    query, key = (states.to(dtype) for states in plain(heads, kv_heads, length, dim))
    found = window_of(query, key, block, softcap, "triton")
    for name, tolerance in (("vertical", 3e-6), ("slash", 3e-6), ("divergence", 3e-5)):
        want = getattr(window_of(query, key, block, softcap, "naive"), name)
        torch.testing.assert_close(
            getattr(found, name), want, rtol=tolerance, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def both(
    query: Tensor, key: Tensor, block: int, aware: list[bool], softcap: float | None = None, **knobs: Any
) -> list[coverage.Coverage]:
    window, means = window_of(query, key, block, softcap, "naive"), pool(key, block, backend="naive")
    flags = torch.tensor(aware)
    arguments = (query, means, window.vertical, window.slash, flags, block)
    options = {"scale": query.shape[-1] ** -0.5, "softcap": softcap, **knobs}
    return [coverage.select(*arguments, **options, backend=backend) for backend in ("naive", "triton")]


CASES = [
    ({"rest": 0.1}, [False] * 4),
    ({"density": 0.4}, [False] * 4),
    ({"density": 0.99}, [False] * 4),
    ({"density": 0.01}, [True, False, False, True]),
    ({"rest": 0.1}, [True, False, True, False]),
    ({"rest": 0.0}, [True, False, True, False]),
    ({"rest": 0.3, "floor": 3, "ceiling": 5}, [True] * 4),
    ({"rest": 0.5, "floor": 3, "ceiling": 5}, [False, True, False, False]),
    ({"density": 0.4}, [True, False, True, False]),
]


@pytest.mark.parametrize(("knobs", "aware"), CASES)
def test_the_same_tiles_are_chosen(knobs: dict[str, float], aware: list[bool]):
    want, found = both(*plain(4, 2, 333, 16), 16, aware, **knobs)
    found.layout.check(4)
    assert torch.equal(found.layout.mask(), want.layout.mask())
    assert float(found.rest) == pytest.approx(want.rest, rel=1e-14) and float(found.gamma) == pytest.approx(want.gamma)
    if "rest" in knobs:
        assert float(found.rest) == want.rest and float(found.gamma) == want.gamma


@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize("knobs", [{"rest": 0.4}, {"density": 0.5}])
def test_shortest_prompts(length: int, knobs: dict[str, float]):
    want, found = both(*plain(2, 1, length, 16), 16, [True, False], **knobs)
    assert torch.equal(found.layout.mask(), want.layout.mask())


def test_maps_of_several_tiles_with_a_softcap():
    want, found = both(*plain(2, 1, 1100, 24), 16, [True, False], softcap=5.0, rest=0.3)
    assert torch.equal(found.layout.mask(), want.layout.mask())


@pytest.mark.parametrize("rest", [0.34, 1e-41])
@pytest.mark.parametrize("make", [constant, mostly_empty])
def test_ties_in_maps_go_the_same_way(make: Any, rest: float):
    want, found = both(*make(2, 1100), 16, [True, True], rest=rest)
    assert torch.equal(found.layout.mask(), want.layout.mask())


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("make", [constant, mostly_empty])
def test_a_density_is_met_on_maps_that_are_all_ties(make: Any, density: float):
    """Where all values of a bin are equal, the solve counts their pairs by interpolation."""
    _, found = both(*make(2, 1100), 16, [True, True], density=density)
    pairs = int(found.layout.executed_pairs().sum())
    assert abs(pairs / (2 * causal_pairs(1100)) - density) < 0.01


def test_lists_are_sized_by_the_longest_where_room_for_all_would_be_large(monkeypatch: pytest.MonkeyPatch):
    from lm_eval_sparse.kernels.index.top_p_blocks import triton as on_device

    monkeypatch.setattr(on_device, "LIST_BYTES", 0)
    want, found = both(*plain(2, 1, 333, 16), 16, [True, False], rest=0.6)
    assert found.layout.indices.shape[-1] == int(want.layout.counts.max()) < 21
    assert torch.equal(found.layout.mask(), want.layout.mask())


@pytest.mark.parametrize(
    "knobs", [{"sparsity": 0.5, "tau": 0.3}, {"sparsity": None, "block_size": 16, "min_budget": 40}]
)
def test_the_method_selects_alike_on_both_backends(knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    query, key = plain(4, 2, 500, 32, size=0.7)
    sparsity = knobs.pop("sparsity")

    def run() -> Any:
        return select(FlexPrefill(**knobs), query, key, scale=32**-0.5, softcap=None, sparsity=sparsity)

    want = run()
    monkeypatch.setattr(backends, "AUTO_ELSEWHERE", "triton")
    found = run()
    assert torch.equal(found.mask(), want.mask())
    assert found.knobs["query_aware_heads"] == want.knobs["query_aware_heads"]
    assert float(found.knobs["gamma"]) == pytest.approx(want.knobs["gamma"], rel=1e-12)
