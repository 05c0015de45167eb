"""`Reads` in full, against its definition in fp64: units, biases, virtual keys, `lse`, and the mass of what was read.

Shapes, selections and inputs are fresh in every run; READS_SEED=<seed> repeats one. Triton runs on a GPU where there is
one, else under its interpreter, which computes products of bf16 wrongly.
"""

from __future__ import annotations

import importlib.util
import os
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lm_eval_sparse.kernels.backends import triton_unavailable
from lm_eval_sparse.kernels.decode import mass, paged_decode
from lm_eval_sparse.kernels.types import Extra, RaggedKV, Reads

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in (exp2|log2):RuntimeWarning")

ON_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None and triton_unavailable("cuda" if ON_GPU else "cpu") is None
BACKENDS = ("naive", "gather", pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton")))
DTYPES = {
    "naive": (torch.float64, torch.float32, torch.bfloat16),
    "gather": (torch.float64, torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16),
}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
#: Calls of a test.
CALLS = {"naive": 12, "gather": 25, "triton": 4}


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("READS_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"READS_SEED={seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


@dataclass(frozen=True)
class Case:
    """Arguments of a call, and by the definition: outputs, logarithms of sums and weights of places, in fp64."""

    query: Tensor
    kv: RaggedKV
    selection: Reads
    scale: float
    softcap: float | None
    out: Tensor
    lse: Tensor
    mass: Tensor

    def run(self, backend: str, lse: Tensor | None = None, keys_read: Tensor | None = None) -> Tensor:
        call = {"scale": self.scale, "softcap": self.softcap, "backend": backend}
        out, used = paged_decode(self.query, self.kv, self.selection, lse=lse, keys_read=keys_read, **call)
        assert used == backend
        return out

    def weights(self, backend: str, lse: Tensor) -> Tensor:
        call = {"scale": self.scale, "softcap": self.softcap, "backend": backend}
        return mass(self.query, self.kv, self.selection, lse, **call)


def draw(
    rng: random.Random, backend: str, *, bias: bool = True, virtual: str | None = "both", unit: int | None = None
) -> Case:
    """A random call. Sequences are ragged, as after eviction; what nobody may look at is NaN or garbage."""
    dtype, unit = rng.choice(DTYPES[backend]), unit or rng.choice((1, 4, 16))
    sequences, group, steps = rng.choice((1, 3)), rng.choice((1, 3, 4)), rng.choice((1, 1, 2))
    dim, value_dim = rng.choice(((16, 16), (24, 40), (64, 64)))
    lengths = [rng.choice((0, rng.randrange(steps, 301), rng.randrange(steps, 20))) for _ in range(sequences)]
    lists = rng.choice((1, group))
    softcap, scale = rng.choice((None, 4.0)), rng.choice((dim**-0.5, 0.3))
    starts, end = [], rng.randrange(4)
    for length in lengths:
        starts.append(end)
        end += length + rng.randrange(5)
    keys, values = torch.randn(end + 1, dim).to(dtype), torch.randn(end + 1, value_dim).to(dtype)
    query = torch.randn(sequences, steps, group, dim).to(dtype).transpose(1, 2)
    pages = max(1, -(-max(lengths) // unit))
    width = pages + rng.choice((0, 3))
    ids = torch.randint(-9, 10**6, (sequences, lists, steps, width), dtype=torch.int32)
    counts = torch.randint(-9, 10**6, (sequences, lists, steps), dtype=torch.int32)
    biases = torch.full(ids.shape, torch.nan)
    for s, length in enumerate(lengths):
        for g in range(lists if length else 0):
            for t in range(steps):
                there = -(-(length - steps + 1 + t) // unit)
                number = rng.choice((1, there, rng.randrange(1, there + 1)))
                ids[s, g, t, :number] = torch.tensor(sorted(rng.sample(range(there), number)), dtype=torch.int32)
                counts[s, g, t] = number
                # As of keys that were drawn: -log p.
                biases[s, g, t, :number] = -torch.rand(number).clamp(min=1e-3).log()
    extra = None
    if virtual is not None:
        entries = rng.choice((1, 5, 40))
        own = torch.randn(sequences, rng.choice((1, group)), steps, entries) + rng.choice((0.0, 3.0))
        own[..., rng.randrange(entries)] = -torch.inf
        extra = Extra(
            torch.randn(sequences, entries, value_dim).to(dtype),
            None if virtual == "bias" else torch.randn(sequences, entries, dim).to(dtype),
            None if virtual == "keys" else own,
        )
    kv = RaggedKV.of(keys, values, starts, lengths)
    selection = Reads(ids, counts, unit, bias=biases if bias else None, extra=extra)
    selection.check(kv)
    read = by_definition(query, kv, selection, scale, softcap)
    seen = torch.zeros(len(keys), dtype=torch.bool)
    seen[torch.tensor(read.pop(), dtype=torch.int64)] = True
    if backend != "naive":  # the oracle multiplies what is not read by 0
        keys[~seen], values[~seen] = torch.nan, torch.nan
    case = Case(query, kv, selection, scale, softcap, *read)
    return on_gpu(case) if backend == "triton" and ON_GPU else case


def on_gpu(case: Case) -> Case:
    kv, reads, extra = case.kv, case.selection, case.selection.extra

    def moved(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.cuda()

    kv = replace(kv, **{name: moved(getattr(kv, name)) for name in ("keys", "values", "starts", "lengths")})
    if extra is not None:
        extra = Extra(moved(extra.values), moved(extra.keys), moved(extra.bias))
    reads = replace(reads, ids=moved(reads.ids), counts=moved(reads.counts), bias=moved(reads.bias), extra=extra)
    found = {name: moved(getattr(case, name)) for name in ("query", "out", "lse", "mass")}
    return replace(case, kv=kv, selection=reads, **found)


def by_definition(query: Tensor, kv: RaggedKV, reads: Reads, scale: float, softcap: float | None) -> list:
    """Outputs, logarithms of sums, weights of places, and all keys that are read."""
    sequences, group, steps, _ = query.shape
    width = reads.ids.shape[-1]
    out = torch.zeros(sequences, group, steps, kv.values.shape[1], dtype=torch.float64)
    lse = torch.full(out.shape[:3], -torch.inf, dtype=torch.float64)
    mass = torch.zeros(*out.shape[:3], width * reads.unit, dtype=torch.float64)
    read = set()

    def score(q: Tensor, key: Tensor) -> float:
        found = float(q.double() @ key.double()) * scale
        return found if softcap is None else softcap * float(torch.tanh(torch.tensor(found / softcap).double()))

    for s in range(sequences):
        start, length = int(kv.starts[s]), int(kv.lengths[s])
        for g in range(group if length else 0):
            own = g if reads.ids.shape[1] > 1 else 0
            for t in range(steps):
                scores, rows, places = [], [], []
                for w in range(int(reads.counts[s, own, t])):
                    for i in range(reads.unit):
                        at = int(reads.ids[s, own, t, w]) * reads.unit + i
                        if at < length - steps + 1 + t:
                            added = 0.0 if reads.bias is None else float(reads.bias[s, own, t, w])
                            scores.append(score(query[s, g, t], kv.keys[start + at]) + added)
                            rows.append(kv.values[start + at])
                            places.append(w * reads.unit + i)
                            read.add(start + at)
                extra = reads.extra
                for e in range(0 if extra is None else extra.values.shape[1]):
                    found = 0.0 if extra.keys is None else score(query[s, g, t], extra.keys[s, e])
                    if extra.bias is not None:
                        found += float(extra.bias[s, g if extra.bias.shape[1] > 1 else 0, t, e])
                    scores.append(found)
                    rows.append(extra.values[s, e])
                logits = torch.tensor(scores, dtype=torch.float64)
                lse[s, g, t] = logits.logsumexp(0)
                weights = logits.softmax(0)
                out[s, g, t] = weights @ torch.stack(rows).double()
                mass[s, g, t, places] = weights[: len(places)]
    return [out, lse, mass, sorted(read)]


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    assert not bool(found.isnan().any()), f"{what} holds NaN"
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite), f"{what} is finite elsewhere"
    error = float((found.double() - expected)[finite].abs().max()) if bool(finite.any()) else 0.0
    bound = TOLERANCE[dtype] * max(1.0, float(expected[finite].abs().max()) if bool(finite.any()) else 1.0)
    assert error <= bound, f"{what}: error {error:.1e} exceeds {bound:.1e}"


@pytest.mark.parametrize("virtual", [None, "keys", "bias", "both"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_definition(rng: random.Random, backend: str, bias: bool, virtual: str | None) -> None:
    for _ in range(CALLS[backend]):
        case = draw(rng, backend, bias=bias, virtual=virtual)
        dtype = case.query.dtype
        lse = case.query.new_full(case.query.shape[:3], torch.nan, dtype=torch.float32)
        read = torch.full(case.selection.counts.shape, -7, dtype=torch.int32, device=case.query.device)
        close(case.run(backend, lse, read), case.out, dtype, "the output")
        close(lse, case.lse, dtype, "lse")
        assert torch.equal(read, case.selection.keys_read(case.kv)), "what is added changes no number of keys"
        close(case.weights(backend, case.lse.float()), case.mass, dtype, "the mass")


@pytest.mark.parametrize("unit", [1, 4, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mass_is_a_share_of_what_was_read(rng: random.Random, backend: str, unit: int) -> None:
    case = draw(rng, backend, virtual=None, unit=unit)
    lse = case.query.new_empty(case.query.shape[:3], dtype=torch.float32)
    case.run(backend, lse)
    total = case.weights(backend, lse).sum(-1)
    held = (case.kv.lengths > 0)[:, None, None].expand_as(total)
    assert torch.allclose(total, held.float(), atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_and_mass_of_all_keys(rng: random.Random, backend: str) -> None:
    """Without a selection: several tokens, windows, and a place for each key."""
    for window in (None, 1, 7):
        case = draw(rng, backend, bias=False, virtual=None)
        call = {"scale": case.scale, "softcap": case.softcap, "backend": backend}
        steps, kv = case.query.shape[2], case.kv
        kv.keys.nan_to_num_(nan=0.5)
        kv.values.nan_to_num_(nan=0.5)
        lse = case.query.new_empty(case.query.shape[:3], dtype=torch.float32)
        out, _ = paged_decode(case.query, kv, window=window, lse=lse, **call)
        without, _ = paged_decode(case.query, kv, window=window, **call)
        assert torch.equal(out, without), "asking for lse changes no bit of the output"
        weights = None if window is not None else mass(case.query, kv, None, lse, **call)
        for s, (start, length) in enumerate(zip(kv.starts.tolist(), kv.lengths.tolist(), strict=True)):
            if not length:
                assert bool(lse[s].isneginf().all())
                continue
            keys = kv.keys[start : start + length].double()
            scores = case.query[s].double() @ keys.T * case.scale
            if case.softcap is not None:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            end = length - steps + 1 + torch.arange(steps, device=keys.device)[:, None]
            place = torch.arange(length, device=keys.device)
            hidden = (place >= end) | (place < end - (window or length + steps))
            scores = scores.masked_fill(hidden, -torch.inf)
            close(lse[s], scores.logsumexp(-1), case.query.dtype, "lse")
            if weights is not None:
                close(weights[s, ..., :length], scores.softmax(-1), case.query.dtype, "the mass")
                assert not bool(weights[s, ..., length:].any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_does_not_feel_its_neighbours(rng: random.Random, backend: str) -> None:
    """To the bit: alone, with lists as wide as its own, in a storage of its own."""
    for _ in range(CALLS[backend]):
        case = draw(rng, backend, virtual=rng.choice((None, "keys", "bias", "both")), bias=rng.random() < 0.7)
        lse = case.query.new_empty(case.query.shape[:3], dtype=torch.float32)
        out = case.run(backend, lse)
        weights = case.weights(backend, lse)
        reads = case.selection
        for s, length in enumerate(case.kv.lengths.tolist()):
            if not length:
                continue
            start, part = int(case.kv.starts[s]), slice(s, s + 1)
            held = (case.kv.keys, case.kv.values)
            kv = RaggedKV.of(*(states[start : start + length].clone() for states in held), [0], [length])
            width = int(reads.counts[s].max())
            extra = reads.extra
            if extra is not None:
                parts = (None if states is None else states[part] for states in (extra.values, extra.keys, extra.bias))
                extra = Extra(*parts)
            own = Reads(
                reads.ids[part, ..., :width],
                reads.counts[part],
                reads.unit,
                bias=None if reads.bias is None else reads.bias[part, ..., :width],
                extra=extra,
            )
            alone = replace(case, query=case.query[part], kv=kv, selection=own)
            log = lse.new_empty(1, *lse.shape[1:])
            assert torch.equal(alone.run(backend, log)[0], out[s])
            assert torch.equal(log[0], lse[s])
            places = width * reads.unit
            found = alone.weights(backend, log)[0]
            assert torch.equal(found, weights[s, ..., :places]) and not bool(weights[s, ..., places:].any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_that_add_nothing_change_no_bit(rng: random.Random, backend: str) -> None:
    """Asking for lse changes no bit; a bias of 0 changes none in Triton, where it is the same sum."""
    for _ in range(CALLS[backend]):
        case = draw(rng, backend, bias=False, virtual=None)
        lse = case.query.new_empty(case.query.shape[:3], dtype=torch.float32)
        plain = case.run(backend)
        assert torch.equal(plain, case.run(backend, lse))
        zeros = torch.zeros(case.selection.ids.shape, device=plain.device)
        biased = replace(case, selection=replace(case.selection, bias=zeros)).run(backend)
        if backend == "gather":
            close(biased, plain.double(), plain.dtype, "the output")
        else:
            assert torch.equal(plain, biased)


@pytest.mark.parametrize("backend", BACKENDS)
def test_biases_that_hide_everything(rng: random.Random, backend: str) -> None:
    case = draw(rng, backend, virtual=None)
    case.kv.keys.nan_to_num_()
    case.kv.values.nan_to_num_()
    hidden = replace(case.selection, bias=torch.full_like(case.selection.bias, -torch.inf))
    lse = case.query.new_empty(case.query.shape[:3], dtype=torch.float32)
    case = replace(case, selection=hidden)
    out = case.run(backend, lse)
    assert not bool(out.any()) and bool(lse.isneginf().all())
    assert not bool(case.weights(backend, lse).any())


def test_checks() -> None:
    kv = RaggedKV.of(torch.randn(20, 16), torch.randn(20, 24), [0, 10], [10, 8])
    query = torch.randn(2, 3, 1, 16)
    reads = Reads(torch.zeros(2, 1, 1, 2, dtype=torch.int32), torch.ones(2, 1, 1, dtype=torch.int32), 4)
    values, keys, bias = torch.randn(2, 5, 24), torch.randn(2, 5, 16), torch.randn(2, 1, 1, 5)

    def refused(words: str, selection: Reads, **options: object) -> None:
        with pytest.raises(ValueError, match=words):
            paged_decode(query, kv, selection, scale=1.0, **options)

    refused("bias is", replace(reads, bias=torch.zeros(2, 1, 1, 3)))
    refused("bias is", replace(reads, bias=torch.zeros(2, 1, 1, 2, dtype=torch.float64)))
    refused("extra values are", replace(reads, extra=Extra(values[..., :16], keys)))
    refused("extra values are", replace(reads, extra=Extra(values[:, :0], keys[:, :0])))
    refused("extra keys are", replace(reads, extra=Extra(values, keys[:, :4])))
    refused("neither keys nor bias", replace(reads, extra=Extra(values)))
    refused("extra holds", replace(reads, extra=Extra(values.double(), keys)))
    refused("extra bias is", replace(reads, extra=Extra(values, keys, bias[..., :4])))
    refused("extra bias is", replace(reads, extra=Extra(values, keys, bias.expand(2, 2, 1, 5))))
    ready = torch.ones(2, dtype=torch.int32)
    refused("neither bias nor extra", replace(reads, ready=ready, extra=Extra(values, keys)))
    refused("lse is", reads, lse=torch.zeros(2, 3, 2))
    refused("lse is", reads, lse=torch.zeros(2, 3, 1, dtype=torch.float64))
    refused("lse is", reads, lse=torch.zeros(2, 3, 2)[..., :1])
    with pytest.raises(ValueError, match="lse is"):
        mass(query, kv, reads, torch.zeros(2, 3), scale=1.0)
    with pytest.raises(ValueError, match="is unknown"):
        mass(query, kv, reads, torch.zeros(2, 3, 1), scale=1.0, backend="flex")


@pytest.mark.gpu
def test_a_captured_step(rng: random.Random) -> None:
    """Attention with all that `Reads` holds, its lse and its mass wait for nothing, and a graph replays them."""
    case = draw(rng, "triton")
    lse = case.query.new_empty(case.query.shape[:3], dtype=torch.float32)
    expected = case.run("triton", lse), case.weights("triton", lse), lse.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run("triton", lse)
        weights = case.weights("triton", lse)
    for states in (out, weights, lse):
        states.zero_()
    graph.replay()
    for found, wanted in zip((out, weights, lse), expected, strict=True):
        assert torch.equal(found, wanted)
