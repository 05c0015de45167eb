"""Attention sinks: a logit of each head that joins its softmax, in every kernel, layer and phase.

The oracle is the definition, out * sigmoid(lse - sink) in fp64, and transformers' own models. SINKS_SEED=<seed> repeats
a run.
"""

from __future__ import annotations

import itertools
import os
import random
import types
from dataclasses import replace
from typing import Any

import decode_cases
import prefill_cases
import pytest
import tiny
import torch
from decoding_lms import all_stats, generate, lm_of, prompts_of
from torch import Tensor

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels.decode import paged_decode
from lm_eval_sparse.kernels.dense import dense_attention, masked_attention
from lm_eval_sparse.kernels.prefill import block_sparse_prefill_rows
from lm_eval_sparse.kernels.types import Extra
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.runtime import interface, session, steps

MISSING = prefill_cases.interpreter_missing()
TRITON = pytest.param("triton", marks=pytest.mark.skipif(MISSING is not None, reason=MISSING or ""))
BACKENDS = ("naive", "gather", TRITON)


@pytest.fixture
def seed() -> int:
    seed = int(os.environ.get("SINKS_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"SINKS_SEED={seed}")
    torch.manual_seed(seed)
    return seed


# --- dense -----------------------------------------------------------------------------------------------------------


def definition(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, softcap: float | None, sink: Tensor
) -> Tensor:
    """fp64, over all pairs; `seen (q_len, kv_len)` bool."""
    query, key, value = query.double(), *(part.double().repeat_interleave(2, 1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ value * torch.sigmoid(scores.logsumexp(-1) - sink.double()[:, None])[..., None]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("queries", [1, 5, 63, 600])
def test_dense_attention(seed: int, queries: int, window: int | None, softcap: float | None) -> None:
    length = max(63, queries)
    place, ends = torch.arange(length), torch.arange(length - queries, length)[:, None]
    seen = (place <= ends) & (place > ends - (window or length))
    allowed = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
    for (dtype, most), (dim, value_dim) in zip(allowed.items(), itertools.cycle(((64, 64), (24, 16))), strict=False):
        query, key, value = (torch.randn(2, n, m, d).to(dtype) for n, m, d in
                             ((4, queries, dim), (2, length, dim), (2, length, value_dim)))  # fmt: skip
        sink = 3 * torch.randn(4)
        options = {"scale": dim**-0.5, "softcap": softcap, "sink": sink}
        expected = definition(query, key, value, seen, **options)
        for out in (
            dense_attention(query, key, value, window=window, **options),
            masked_attention(query, key, value, seen[None, None], **options),
        ):
            assert out.dtype == dtype and out.shape == expected.shape
            assert float((out.double() - expected).norm() / expected.norm()) < most


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sinks_that_are_none_and_sinks_that_take_all(seed: int, softcap: float | None) -> None:
    query, key, value = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    sink = torch.tensor([-torch.inf, -torch.inf, 200.0, 0.0])
    for dtype in (torch.float32, torch.float16):
        states = [part.to(dtype) for part in (query, key, value)]
        out = dense_attention(*states, scale=0.25, softcap=softcap, sink=sink)
        plain = dense_attention(*states, scale=0.25, softcap=softcap)
        assert torch.allclose(out[:, :2], plain[:, :2], atol=1e-6 if dtype == torch.float32 else 2e-3)
        assert not out[:, 2].any() and (out[:, 3].norm() < plain[:, 3].norm())


def test_queries_that_see_no_key(seed: int) -> None:
    query, key = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    seen = torch.tensor([[False, False, False], [True, True, False], [True, True, True]])[None, None]
    for softcap in (None, 5.0):
        out = masked_attention(query, key, key, seen, scale=0.25, softcap=softcap, sink=torch.zeros(2))
        assert not out[:, :, 0].any() and not out.isnan().any() and out[:, :, 1:].any()


# --- prefill ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", prefill_cases.KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill(seed: int, backend: str, kind: str | None) -> None:
    """Also of values of other dimensions than keys, and `lse` is that of what is read, without the sink."""
    draw = prefill_cases.Draw(seed)
    for lengths, (dim, value_dim), softcap in (([33, 63], (24, 16), None), ([95], (16, 40), 5.0)):
        call = prefill_cases.random_call(
            draw, lengths, (4, 2), dim, draw.rng.choice((torch.float32, torch.float16)), (32, 16),
            kind=kind, softcap=softcap, poison=backend != "naive", value_dim=value_dim, sinks=True,
        )  # fmt: skip
        options: dict[str, Any] = {"scale": call.scale, "softcap": softcap, "backend": backend}
        outs, used = block_sparse_prefill_rows(*call.inputs, outs=call.outs, sink=call.sink, **options)
        call.check()
        logs, plain = ([torch.empty(4, length) for length in lengths] for _ in "ab")
        block_sparse_prefill_rows(*call.inputs, sink=call.sink, lses=logs, **options)
        block_sparse_prefill_rows(*call.inputs, lses=plain, **options)
        assert used == backend and all(map(torch.equal, logs, plain))


# --- decode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_decode(seed: int, backend: str, page_size: int | None) -> None:
    """Rows of two KV heads with sinks of their own, one of them idle; several tokens; lists shared and own."""
    draw = decode_cases.Draw(seed)
    for new, own, window in ((1, False, None), (1, True, 5), (3, False, 5)):
        case = decode_cases.random_case(
            draw, [70, 33, 0, 0, 64, 64], 3, new, 24, 16, torch.float32, page_size=page_size, own=own, heads=2,
            window=None if page_size else window, softcap=draw.rng.choice((None, 5.0)), poison=backend != "naive",
            sinks=True,
        )  # fmt: skip
        case.check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_with_biases_and_virtual_keys(seed: int, backend: str) -> None:
    """out * sigmoid(lse - sink) of the call without sinks, in fp64."""
    draw = decode_cases.Draw(seed)
    case = decode_cases.random_case(draw, [70, 33], 2, 1, 16, 16, torch.float32, page_size=8, heads=2, sinks=True)
    extra = Extra(draw.normal(2, 3, 16), draw.normal(2, 3, 16), draw.normal(2, 1, 1, 3))
    bias = draw.normal(*case.selection.ids.shape)
    bias[1] = -torch.inf  # only the virtual keys are left
    kv = replace(case.kv, keys=case.kv.keys.nan_to_num(), values=case.kv.values.nan_to_num())
    selection = replace(case.selection, bias=bias, extra=extra)
    wide = replace(kv, keys=kv.keys.double(), values=kv.values.double())
    read = replace(selection, extra=replace(extra, values=extra.values.double(), keys=extra.keys.double()))
    lse = torch.empty(2, 2, 1, dtype=torch.float64)
    plain, _ = paged_decode(case.query.double(), wide, read, scale=0.2, backend="naive", lse=lse)
    expected = plain * torch.sigmoid(lse - case.sink.double().view(2, 2, 1))[..., None]
    out, _ = paged_decode(case.query, kv, selection, scale=0.2, backend=backend, sink=case.sink)
    assert torch.allclose(out.double(), expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["gather", TRITON])
def test_all_pages_are_dense_to_the_bit(seed: int, backend: str) -> None:
    draw = decode_cases.Draw(seed)
    case = decode_cases.random_case(draw, [70, 70], 2, 1, 16, 16, torch.float32, heads=2, sinks=True)
    pages = decode_cases.every_page(case.kv, 1, 1, 16)
    outs = [
        paged_decode(case.query, case.kv, chosen, scale=0.2, backend=backend, sink=case.sink)[0]
        for chosen in (None, pages)
    ]
    assert torch.equal(*outs)


def test_bad_sinks_are_refused(seed: int) -> None:
    case = decode_cases.random_case(decode_cases.Draw(seed), [70, 70], 2, 1, 16, 16, torch.float32, heads=2)
    for sink, message in (
        (torch.zeros(2), r"sink is \(2,\) torch.float32; expected contiguous \(4,\)"),
        (torch.zeros(4).int(), "of a float dtype"),
        (torch.zeros(4, device="meta"), r"devices are cpu, meta \(sink\)"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_decode(case.query, case.kv, scale=0.2, sink=sink)


# --- models ----------------------------------------------------------------------------------------------------------


METHODS: dict[str, dict[str, Any]] = {
    "flexprefill": {"gamma": 0.5, "min_budget": 0, "block_size": 16, "backend": "gather"},
    "snapkv": {"capacity": 24, "window": 8, "sinks": 2, "local": 4},
    "quest": {"budget": 32, "page_size": 8},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_sparse_run_counts_the_full_layer_and_no_neighbour_is_felt(method: str) -> None:
    prompts = prompts_of(random.Random(3), 4, 60, 120)
    alone = lm_of("gpt_oss", method=method, **METHODS[method])
    texts = generate(alone, prompts)
    report = alone.report()
    assert report["layers"]["sparse_eligible"] == 1 and list(report["layers"]["untouched"]) in (["0"], [0])
    phase = {"flexprefill": "prefill", "snapkv": "eviction", "quest": "decode"}[method]
    found = report["phases"][phase]
    assert found["calls"]["sparse"] and not found["calls"]["fallback"] and found["executed_sparsity"] > 0.05
    together = lm_of("gpt_oss", method=method, **METHODS[method], batch_size=4)
    again = generate(together, prompts)
    assert again == texts and all_stats(again) == all_stats(texts)


def test_sinks_that_are_left_out_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard for all tests with models: without sinks they come out otherwise, and the check says so."""
    monkeypatch.setattr(interface, "sink_of", lambda *_: None)
    with pytest.raises(UserError, match="attention in layer 0 .* comes out .* off transformers' own"):
        lm_of("gpt_oss")


@pytest.mark.parametrize(
    ("room", "name", "method"),
    [
        (session, "block_sparse_prefill_rows", "flexprefill"),
        (steps, "paged_decode", "snapkv"),
        (steps, "paged_decode", "quest"),
    ],
)
def test_sinks_that_sparse_attention_leaves_out_are_found(
    monkeypatch: pytest.MonkeyPatch, room: Any, name: str, method: str
) -> None:
    """Each phase runs on trial with transformers' own function beside it."""
    own = getattr(room, name)
    monkeypatch.setattr(room, name, lambda *args, sink, **options: own(*args, **options))
    with pytest.raises(UserError, match="attention in layer 1 .* comes out .* off transformers' own"):
        lm_of("gpt_oss", torch.float32, method=method, sparsity=0.5)


def test_a_typed_backend_that_takes_no_sinks_is_refused() -> None:
    lm = lm_of("gpt_oss", method="flexprefill", sparsity=0.5, backend="flex")
    with pytest.raises(UserError, match="backend=flex: .*it takes no attention sinks; use 'auto' or 'gather'"):
        generate(lm, prompts_of(random.Random(3), 1, 100, 120))


def test_sinks_of_another_shape_are_refused() -> None:
    model = tiny.family("gpt_oss")
    layer = model.model.layers[1].self_attn
    forward = layer.forward
    for given, said in (
        (torch.zeros(3), r"\(3,\) torch.float32"),
        (0.5, "float"),
        (torch.zeros(4).int(), r"\(4,\) torch.int32"),
    ):

        def other(self: Any, *args: Any, given: Any = given, **options: Any) -> Any:
            self._parameters.pop("sinks", None)
            self.sinks = given
            return forward(*args, **options)

        layer.forward = types.MethodType(other, layer)
        with pytest.raises(
            UserError, match=rf"'s_aux' \(attention sinks\) as {said}.*takes a number for each of its 4"
        ):
            SparseHFLM(pretrained=model, tokenizer=tiny.tiny_tokenizer(), device="cpu")
