"""What the contract lets a method do, each done by a small method of its own and held against plain arithmetic.

Long, since the small methods stand beside what is asked of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels.cache.replace import turn
from lm_eval_sparse.kernels.types import Blocks, Extra, Keep, Reads, Slot
from lm_eval_sparse.methods import (
    METHODS,
    Allocation,
    CacheView,
    Call,
    Count,
    DecodeMethod,
    EvictionMethod,
    Mass,
    PerLayer,
    Pooled,
    ScoredDecode,
    ScoredEviction,
    ScoredPrefill,
    TopP,
    number,
)
from lm_eval_sparse.methods.grammar import chains
from lm_eval_sparse.methods.plan import parse
from lm_eval_sparse.methods.wrappers import Wrapper
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.runtime import decoder, session

FAMILIES = ("llama", "qwen3", "gemma2", "phi3")


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(autouse=True)
def _own_methods() -> Iterator[None]:
    """Methods of this file are known while its tests run."""
    own = [Norms, Slopes, Coverage, Merging, Turned, Weighted, Sampled, Virtual, Recent, Narrower]
    for cls in own:
        METHODS.add(cls)
    yield
    for cls in own:
        METHODS.discard(cls.name)


def lm_of(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> SparseHFLM:
    model = tiny.family(family).to(dtype)
    return SparseHFLM(pretrained=model, tokenizer=tiny.tiny_tokenizer(), device="cpu", **options)


def score(lm: SparseHFLM, rng: random.Random, words: int = 200, answer: int = 12) -> list[Any]:
    prompt = tiny.words(rng.randrange(10**6), words)
    pair = prompt, " " + tiny.words(rng.randrange(10**6), answer)
    return lm.loglikelihood([Instance("loglikelihood", {}, pair, 0, metadata=("t", 0, 1))], disable_tqdm=True)


def generate(lm: SparseHFLM, prompts: list[str], tokens: int = 8) -> list[Any]:
    options = {"until": [], "max_gen_toks": tokens, "do_sample": False}
    return lm.generate_until(
        [Instance("generate_until", {}, (p, options), 0, metadata=("t", 0, 1)) for p in prompts], disable_tqdm=True
    )


class Named:
    """What a row of the taxonomy asks for, here the same for all."""

    importance: ClassVar[str] = "test"
    reference: ClassVar[str] = "test"


# --- the scored level -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norms(Named, ScoredEviction):
    """Keys with the smallest norm."""

    name: ClassVar[str] = "test_norms"
    capacity: int = 40

    def score(self, call: Call) -> Tensor:
        return -call.key.float().norm(dim=-1)


def slope(layer: int, layers: int) -> float:
    """Twice as much in the first layer as on average, and nothing but a little in the last one."""
    return 1.6 if layer == 0 else 0.4


@dataclass(frozen=True)
class Slopes(Norms):
    """The same with a budget for each layer."""

    name: ClassVar[str] = "test_slopes"
    allocation: ClassVar[Allocation] = PerLayer(shape=slope)


@dataclass(frozen=True)
class Coverage(Named, ScoredPrefill):
    """Blocks that hold a share of each row's pooled attention."""

    name: ClassVar[str] = "test_coverage"
    allocation: ClassVar[Allocation] = TopP()
    budget_knobs: ClassVar[tuple[str, ...]] = ("mass",)
    mass: float = 0.7
    block_size: int = 16

    native: ClassVar[type] = Mass

    def score(self, call: Call) -> Tensor:
        return block_means(call, self.block_size)


def block_means(call: Call, block: int) -> Tensor:
    heads, length, dim = call.query.shape
    padding = -length % block
    parts = []
    for states in (call.query, call.key.repeat_interleave(heads // len(call.key), 0)):
        wide = torch.nn.functional.pad(states.float(), (0, 0, 0, padding))
        parts.append(wide.reshape(heads, -1, block, dim).mean(2))
    scores = parts[0] @ parts[1].transpose(1, 2) * call.scale
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf).softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sparsity", [0.3, 0.75])
def test_a_score_becomes_an_eviction(family: str, sparsity: float, rng: random.Random) -> None:
    lm, kept = lm_of(family, method="test_norms", sparsity=sparsity), []
    select = Norms.select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Norms, "select", lambda self, call: (kept.append((call, found := select(self, call))), found)[1])
        score(lm, rng)
    assert kept
    for call, found in kept:
        number = max(1, round((1 - sparsity) * call.length))
        norms = call.key.double().norm(dim=-1)
        for head, ids in enumerate(found.ids.tolist()):
            assert ids == sorted(ids) and len(ids) == number == int(found.counts[head])
            left = sorted(set(range(call.length)) - set(ids))
            assert norms[head, ids].max() <= norms[head, left].min() + 1e-5
    stats = lm.report()["phases"]["eviction"]
    assert stats["calls"]["sparse"] and abs(stats["executed_sparsity"] - sparsity) < 0.01


def test_a_budget_for_each_layer(rng: random.Random) -> None:
    lm = lm_of("llama", method="test_slopes", sparsity=0.75, stats="full")
    score(lm, rng)
    found = [row["executed_sparsity"] for row in next(iter(lm.detail_report().values()))["eviction"]]
    assert found[0] == pytest.approx([1 - 0.25 * 1.6] * 4, abs=0.005)
    assert found[1] == pytest.approx([1 - 0.25 * 0.4] * 4, abs=0.005)


@pytest.mark.parametrize("mass", [0.4, 0.9])
def test_the_fewest_blocks_that_hold_a_share(mass: float, rng: random.Random) -> None:
    lm, seen = lm_of("llama", method="test_coverage", mass=mass), []
    select = Coverage.select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coverage, "select", lambda s, call: (seen.append((call, found := select(s, call))), found)[1])
        score(lm, rng)
    for call, found in seen:
        shares, mask = block_means(call, 16).double(), found.mask()
        for head in range(len(shares)):
            for row in range(shares.shape[1]):
                taken = mask[head, row, : row + 1]
                assert taken[0] and taken[row]
                own = shares[head, row, : row + 1]
                assert own[taken].sum() >= mass - 1e-5
                free = taken.clone()
                free[0] = free[row] = False
                if free.any():  # without the least of those that are not forced it is not enough, or there is a tie
                    least = int(torch.where(free, own, math.inf).argmin())
                    assert own[taken].sum() - own[least] <= mass + 1e-5


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_one_threshold_meets_a_sparsity(sparsity: float, rng: random.Random) -> None:
    lm = lm_of("llama", method="test_coverage", sparsity=sparsity)
    score(lm, rng, words=700)
    found = lm.report()["phases"]["prefill"]
    assert abs(found["executed_sparsity"] - sparsity) < 0.01
    assert found["knobs_solved"]["rest"]["min"] >= 0


# --- what stays -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merging(Named, EvictionMethod):
    """The last tokens, whose values are replaced by the mean of all."""

    name: ClassVar[str] = "test_merging"
    unit: ClassVar[str] = "tokens"
    kv: ClassVar[str] = "evicted"
    allocation: ClassVar[str] = "uniform"

    def select(self, call: Call) -> Keep:
        heads, length, _ = call.key.shape
        ids = torch.arange(length - 32, length).expand(heads, -1)
        values = call.value.mean(1, keepdim=True).expand(-1, 32, -1)
        return Keep(ids.contiguous(), torch.full((heads,), 32), 32 * heads, values=values)


@dataclass(frozen=True)
class Turned(Merging):
    """The last tokens, turned to the first positions."""

    name: ClassVar[str] = "test_turned"

    def select(self, call: Call) -> Keep:
        kept = super().select(call)
        return replace(kept, values=None, positions=torch.arange(32).expand_as(kept.ids))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_kept_values_are_replaced(family: str, rng: random.Random) -> None:
    lm, seen = lm_of(family, method="test_merging"), []
    close = session.Runtime._end_prefill

    def watch(self: Any, layer: Any, held: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
        close(self, layer, held, query, key, value, *rest)
        seen.append((key.clone(), value.clone(), held))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Runtime, "_end_prefill", watch)
        score(lm, rng, answer=1)
    assert seen
    for key, value, held in seen[-2:]:
        kv = held.sequences.kv(held.pool)
        for head, start in enumerate(kv.starts.tolist()):
            assert torch.equal(kv.keys[start : start + 32], key[0, head, -32:])
            assert torch.allclose(kv.values[start : start + 32], value[0, head].mean(0).expand(32, -1))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
def test_kept_keys_are_turned_to_other_positions(family: str, rng: random.Random) -> None:
    """Turned back to where tokens would stand had nothing come before them, keys are those of such a prompt.

    In the first layer only: behind it they depend on what came before.
    """
    lm, seen = lm_of(family, method="test_turned"), []
    close = session.Runtime._end_prefill

    def watch(self: Any, layer: Any, held: Any, query: Tensor, key: Tensor, *rest: Any) -> None:
        close(self, layer, held, query, key, *rest)
        if layer.index == (1 if family == "gemma3" else 0):  # the first with full attention
            seen.append((held, key))

    prompt = tiny.words(rng.randrange(10**6), 150)
    ids = torch.tensor([lm.tok_encode(prompt)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Runtime, "_end_prefill", watch)
        lm.loglikelihood([Instance("loglikelihood", {}, (prompt, " the"), 0, metadata=("t", 0, 1))], disable_tqdm=True)
    held, key = seen[-1]
    kv = held.sequences.kv(held.pool)
    if family == "gemma3":  # what lies below hides how the prompt would have begun: turned back, it is as it was
        layer = lm.runtime.known.of(lm.model.model.layers[1].self_attn, 4, 2, 16, 16)
        cosines, sines = layer.rotary(torch.tensor([ids.shape[1] - 32]))
        for head, start in enumerate(kv.starts.tolist()):
            assert torch.allclose(turn(kv.keys[start : start + 32], cosines, sines), key[0, head, -32:], atol=1e-4)
        return
    keys = tiny.family(family)(ids[:, -32:], use_cache=True).past_key_values.layers[0].keys[0]
    for head, start in enumerate(kv.starts.tolist()):
        assert torch.allclose(kv.keys[start : start + 32], keys[head], atol=1e-4)


def test_a_model_without_rotary_embedding_is_refused(rng: random.Random) -> None:
    lm = lm_of("gpt2", method="test_turned")
    with pytest.raises(UserError, match="needs the model's rotary embedding"):
        score(lm, rng)


@dataclass(frozen=True)
class Weighted(Named, ScoredEviction):
    """Tokens whose value, once projected, is largest."""

    name: ClassVar[str] = "test_weighted"
    capacity: int = 40

    def score(self, call: Call) -> Tensor:
        weight = call.layer.output_weight().float()  # (hidden, H * D_v)
        group = call.layer.heads // call.layer.kv_heads
        parts = weight.reshape(len(weight), call.layer.kv_heads, group, -1)
        return torch.einsum("nkgd,kld->klng", parts, call.value.float()).abs().sum((2, 3))


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "opt"])
def test_the_output_projection_is_the_models(family: str, rng: random.Random) -> None:
    lm, seen = lm_of(family, method="test_weighted", sparsity=0.5), []
    scored = Weighted.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weighted, "score", lambda s, call: (seen.append(call), scored(s, call))[1])
        score(lm, rng)
    call = seen[0]
    weight = call.layer.output_weight()
    named = dict(lm.model.named_modules())
    attention = next(m for m in named.values() if getattr(m, "layer_idx", None) == call.layer.index)
    projection = next(getattr(attention, name) for name in ("o_proj", "c_proj", "out_proj") if hasattr(attention, name))
    given = torch.randn(3, weight.shape[1])
    bias = 0 if getattr(projection, "bias", None) is None else projection.bias
    assert torch.allclose(projection(given), given @ weight.T + bias, atol=1e-5)
    assert lm.report()["phases"]["eviction"]["calls"]["sparse"]


# --- what is read -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled(Named, DecodeMethod):
    """Every second token, with the weight that it stands for."""

    name: ClassVar[str] = "test_sampled"
    unit: ClassVar[str] = "tokens"
    kv: ClassVar[str] = "full cache"
    allocation: ClassVar[str] = "uniform"
    page_size: int = 1

    def select(self, call: Call) -> Reads:
        kv, steps = call.cache.kv, call.query.shape[2]
        width = -(-kv.longest // 2)
        last = (kv.visible(steps) - 1).clamp(min=0)[:, None, :, None]
        ids = (last - 2 * torch.arange(width - 1, -1, -1, device=last.device)).clamp(min=-1)
        first = (ids < 0).sum(-1, keepdim=True)
        ids = ids.gather(-1, (first + torch.arange(width, device=ids.device)).clamp(max=width - 1))
        counts = width - first[..., 0]
        bias = torch.full(ids.shape, math.log(2.0), device=ids.device)
        return Reads(ids.int().contiguous(), counts.int().contiguous(), 1, bias=bias)


@dataclass(frozen=True)
class Virtual(Named, DecodeMethod):
    """The page that a token is in, and the mean of all keys and values for the rest."""

    name: ClassVar[str] = "test_virtual"
    unit: ClassVar[str] = "pages"
    kv: ClassVar[str] = "full cache"
    allocation: ClassVar[str] = "uniform"
    page_size: int = 16

    def slots(self) -> tuple[Slot, ...]:
        return Slot("key", "sequence", (-1,), torch.float32), Slot("value", "sequence", (-1,), torch.float32)

    def prefilled(self, call: Call) -> None:
        kv = call.cache.kv
        for s, (start, length) in enumerate(zip(kv.starts.tolist(), kv.lengths.tolist(), strict=True)):
            for name, states in (("key", kv.keys), ("value", kv.values)):
                call.state[name][call.state.place[s]] = states[start : start + length].float().mean(0)

    def select(self, call: Call) -> Reads:
        kv, (sequences, group, steps, _) = call.cache.kv, call.query.shape
        last = ((kv.visible(steps) - 1).clamp(min=0) // 16)[:, None, :, None].int()
        place = call.state.place
        keys, values = (call.state[name][place].to(kv.keys.dtype)[:, None] for name in ("key", "value"))
        bias = torch.full((sequences, group, steps, 1), 3.0)
        return Reads(last.contiguous(), torch.ones_like(last[..., 0]), 16, extra=Extra(values, keys, bias))


@dataclass(frozen=True)
class Recent(Named, ScoredDecode):
    """Tokens by the mass that earlier steps gave them, else by where they stand."""

    name: ClassVar[str] = "test_recent"
    unit: ClassVar[str] = "tokens"
    wants_mass: ClassVar[bool] = True
    budget: int = 24
    page_size: int = 1

    def slots(self) -> tuple[Slot, ...]:
        return (Slot("mass", "token", (), torch.float32),)

    def prefilled(self, call: Call) -> None:
        kv = call.cache.kv
        for start, length in zip(kv.starts.tolist(), kv.lengths.tolist(), strict=True):
            call.state["mass"][start : start + length] = torch.arange(length).float() * 1e-6

    def appended(self, call: Call, before: Tensor) -> None:
        kv = call.cache.kv
        for start, first, length in zip(kv.starts.tolist(), before.tolist(), kv.lengths.tolist(), strict=True):
            call.state["mass"][start + first : start + length] = 1.0

    def attended(self, call: Call, reads: Reads, mass: Tensor) -> None:
        kv = call.cache.kv
        for s, start in enumerate(kv.starts.tolist()):
            ids, counts = reads.ids[s, 0], reads.counts[s, 0]
            for t in range(ids.shape[0]):
                own = ids[t, : counts[t]].long() + start
                call.state["mass"][own] += mass[s, :, t, : counts[t]].sum(0).float()

    def lists(self, call: Call) -> int:
        return 1

    def score(self, call: Call, pages: int) -> Tensor:
        kv = call.cache.kv
        place = torch.arange(pages)
        at = (kv.starts[:, None] + place).clamp(max=len(call.state["mass"]) - 1)
        own = torch.where(place < kv.lengths[:, None], call.state["mass"][at], -1.0)
        return own[:, None, None].expand(-1, 1, call.query.shape[2], -1).contiguous()


def dense_of(call: Call, weights: Any) -> Tensor:
    """Attention in fp64 with a weight for each key: `weights(s, g, t, visible)` gives factors and extra terms."""
    kv, (sequences, group, steps, _) = call.cache.kv, call.query.shape
    out = torch.zeros(*call.query.shape[:3], kv.values.shape[1], dtype=torch.float64)
    for s in range(sequences):
        start, length = int(kv.starts[s]), int(kv.lengths[s])
        for g in range(group):
            for t in range(steps):
                visible = length - steps + 1 + t
                keys = kv.keys[start : start + visible].double()
                values = kv.values[start : start + visible].double()
                factor, keys, values = weights(s, visible, keys, values)
                logits = keys @ call.query[s, g, t].double() * call.scale
                if call.softcap is not None:
                    logits = call.softcap * torch.tanh(logits / call.softcap)
                p = factor * logits.exp()
                out[s, g, t] = (p / p.sum()) @ values
    return out


@pytest.mark.parametrize("method", ["test_sampled", "test_virtual"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_weights_and_virtual_keys_in_scoring_and_generation(method: str, family: str, rng: random.Random) -> None:
    """What a step gives is attention over the keys that are listed, with their weights, and over virtual ones."""
    lm, seen = lm_of(family, method=method), []
    ask = session.step

    def watch(query: Tensor, new: Any, kv: Any, layer: Any, filled: Any, **options: Any) -> Any:
        found = ask(query, new, kv, layer, filled, **options)
        if filled is not None:
            states = query.clone(), kv.keys.clone(), kv.values.clone()
            call = Call(*states, options["scale"], options["softcap"], "decode", filled.budget, layer)
            lengths = replace(
                kv, keys=call.key, values=call.value, starts=kv.starts.clone(), lengths=kv.lengths.clone()
            )
            state = filled.state
            means = None
            if state is not None and "key" in state.tensors:
                means = [state[name][state.place].double() for name in ("key", "value")]
            seen.append((replace(call, cache=CacheView(lengths, filled.tokens, layer.kv_heads)), found.out, means))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "step", watch)
        patch.setattr(decoder, "step", watch)
        score(lm, rng, words=60, answer=5)
        generate(lm, [tiny.words(rng.randrange(10**6), n) for n in (30, 50)], tokens=4)
    assert len(seen) > 4
    for call, out, means in rng.sample(seen, 5):

        def weights(s: int, visible: int, keys: Tensor, values: Tensor, means: Any = means) -> Any:
            ids = torch.arange(visible)
            if method == "test_sampled":
                return ((visible - 1 - ids) % 2 == 0).double() * 2, keys, values
            factor = (ids // 16 == (visible - 1) // 16).double()
            keys, values = (torch.cat([part, mean[s][None]]) for part, mean in zip((keys, values), means, strict=True))
            return torch.cat([factor, torch.tensor([math.exp(3.0)], dtype=torch.float64)]), keys, values

        expected = dense_of(call, weights)
        # A sequence that nobody uses gives nothing.
        expected[call.cache.kv.lengths == 0] = 0
        assert torch.allclose(out.double(), expected, atol=1e-4)


def test_the_state_of_a_method_is_right_whatever_runs_beside_it(rng: random.Random) -> None:
    """Answers with a state that gathers mass: several of one context, side by side and alone, stored and moved."""
    prompts = [tiny.words(rng.randrange(10**6), rng.randint(40, 90)) for _ in range(3)]
    alone = [str(generate(lm_of("llama", torch.bfloat16, method="test_recent"), [p], 40)[0]) for p in prompts]
    together = generate(lm_of("llama", torch.bfloat16, method="test_recent", batch_size=3), prompts, 40)
    assert [str(text) for text in together] == alone
    lm, seed = lm_of("llama", method="test_recent"), rng.randrange(10**6)
    context = tiny.words(seed, 80)
    pairs = [(context, " " + tiny.words(seed + n, 6)) for n in range(3)]
    asked = [Instance("loglikelihood", {}, pair, n, metadata=("t", 0, 1)) for n, pair in enumerate(pairs)]
    every = lm.loglikelihood(asked, disable_tqdm=True)
    for one, found in zip(asked, every, strict=True):
        fresh = lm_of("llama", method="test_recent").loglikelihood([one], disable_tqdm=True)[0]
        assert tuple(found) == tuple(fresh)  # nothing of one answer is felt by the next


# --- wrappers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Narrower(Named, Wrapper):
    """Asks for a share of the budget and takes what comes."""

    name: ClassVar[str] = "test_narrower"
    wraps: ClassVar[tuple[str, ...]] = ("decode", "eviction")
    allocation: ClassVar[str] = "as inside"
    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        number("share", self.share, 0, 1, example=0.5)

    def select(self, call: Call) -> Any:
        budget = call.budget
        for name in ("share", "number"):
            if hasattr(budget, name):
                value = getattr(budget, name) * self.share
                budget = replace(budget, **{name: value if name == "share" else max(1, int(value))})
        return self.inner.select(replace(call, budget=budget))


@pytest.mark.parametrize(("method", "phase"), [("quest", "decode"), ("snapkv", "eviction"), ("ada_snapkv", "eviction")])
def test_a_wrapper_asks_the_method_inside(method: str, phase: str, rng: random.Random) -> None:
    lm = lm_of("llama", method=f"test_narrower:{method}", sparsity=0.4, share=0.5)
    score(lm, rng, words=400)
    found = lm.report()["phases"][phase]
    assert found["method"] == f"test_narrower:{method}"
    assert abs(found["executed_sparsity"] - 0.7) < 0.02  # half of what is asked for is read
    assert lm.report()["method"] == f"test_narrower:{method}"
    assert lm.report()["knobs"]["test_narrower"] == {"share": 0.5} and method in lm.report()["knobs"]


def test_wrappers_in_what_is_typed() -> None:
    found = parse({"method": "flexprefill+test_narrower:snapkv+test_narrower:quest", "sparsity": 0.5, "tau": 0.2,
                   "page_size": 8})  # fmt: skip
    assert found.method == "flexprefill+test_narrower:snapkv+test_narrower:quest"
    assert found.methods["decode"].inner.page_size == 8 and found.methods["decode"].page_size == 8
    assert found.methods["eviction"].phase == "eviction" and found.methods["decode"].phase == "decode"
    assert found.methods["decode"].inner.appends and not found.methods["decode"].appends
    dotted = parse(
        {"method": "test_narrower:quest", "sparsity": 0.5, "test_narrower.share": 0.25, "quest.page_size": 8}
    )
    assert (dotted.methods["decode"].share, dotted.methods["decode"].inner.page_size) == (0.25, 8)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"method": "test_narrower"}, "test_narrower goes around a method; type one of .*snapkv.* behind it"),
        ({"method": "test_narrower:"}, "a name is missing beside a colon"),
        ({"method": ":quest"}, "a name is missing beside a colon"),
        ({"method": "test_narrower:test_narrower:quest"}, "test_narrower stands there twice; give it once"),
        (
            {"method": "test_narrower:flexprefill"},
            "goes around methods of the decode or eviction phase .* prefill phase",
        ),
        ({"method": "test_narrower:dense"}, "goes around methods of the decode or eviction phase"),
        ({"method": "quest:snapkv"}, "quest goes around no method; join methods of several phases by a plus sign"),
        ({"method": "test_narrower:quest+quest"}, "test_narrower:quest and quest both fill the decode phase"),
        ({"method": "test_narrower:quset"}, "method='quset' in method=test_narrower:quset is unknown; did you mean"),
        ({"method": "test_narrower:quest", "share": 2}, "share=2 is not accepted"),
        ({"method": "test_narrower:quest", "sparsity": 0.5, "budget": 64}, "was given together with budget=64"),
        (
            {"method": "test_narrower:quest", "tau": 0.2},
            "is a knob of flexprefill .prefill phase., but method=test_narrower:quest has no",
        ),
    ],
)
def test_wrappers_that_cannot_be(typed: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(typed)


def test_a_wrapper_without_a_method_is_a_mistake_of_its_author() -> None:
    with pytest.raises(ValueError, match="test_narrower has no method inside"):
        Narrower()


def test_chains_by_phase() -> None:
    found = chains(["quest", "test_narrower:snapkv"])
    assert [(phase, chain.name) for phase, chain in found.items()] == [
        ("eviction", "test_narrower:snapkv"),
        ("decode", "quest"),
    ]


# --- checks -----------------------------------------------------------------------------------------------------------


def test_what_covers_everything_is_a_fallback(rng: random.Random) -> None:
    @dataclass(frozen=True)
    class Everything(Named, ScoredPrefill):
        name: ClassVar[str] = "test_everything"
        budget_knobs: ClassVar[tuple[str, ...]] = ("top_k",)
        top_k: int = 4
        block_size: int = 16

        def select(self, call: Call) -> Blocks:
            blocks = -(-call.length // 16)
            mask = torch.ones(blocks, blocks, dtype=torch.bool).tril().expand(len(call.query), -1, -1)
            return Blocks.from_mask(mask, call.length, 16, 16)

    METHODS.add(Everything)
    try:
        lm = lm_of("llama", method="test_everything")
        score(lm, rng)
        found = lm.report()["phases"]["prefill"]
        assert found["calls"]["fallback"] and not found["calls"]["sparse"]
        assert found["executed_sparsity"] == 0
    finally:
        METHODS.discard("test_everything")


NONSENSE: dict[str, tuple[str, Any, str]] = {
    "values of another size": (
        "test_merging",
        lambda k: replace(k, values=k.values[..., :3]),
        "values are .* expected",
    ),
    "positions of another kind": ("test_turned", lambda k: replace(k, positions=k.positions.float()), "positions are"),
    "a bias of another shape": ("test_sampled", lambda r: replace(r, bias=r.bias[..., :1]), "bias is .* expected"),
    "a bias that is none": (
        "test_sampled",
        lambda r: replace(r, bias=r.bias * math.nan),
        "bias holds numbers",
    ),
    "a unit of another size": ("test_sampled", lambda r: replace(r, unit=2), "read_unit is 1"),
    "virtual values of another size": (
        "test_virtual",
        lambda r: replace(r, extra=replace(r.extra, values=r.extra.values[..., :3])),
        "extra",
    ),
    "tiles to skip": ("test_coverage", lambda b: replace(b, skip_below=-3.0), "no backend skips tiles yet"),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_refused_in_one_line(kind: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    method, spoil, words = NONSENSE[kind]
    cls = METHODS[method]
    select = cls.select
    monkeypatch.setattr(cls, "select", lambda self, call: spoil(select(self, call)))
    lm = lm_of("llama", method=method)
    with pytest.raises(UserError, match=f"method {method}, layer 0.*{words}") as refused:
        score(lm, rng)
    assert "\n" not in str(refused.value)


# --- what a method can do wrong beside its lists ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "hook", "words"),
    [("test_virtual", "prefilled", "prefilled"), ("test_recent", "appended", "appended"),
     ("test_recent", "attended", "attended"), ("quest", "prefilled", "prefilled")],
)  # fmt: skip
@pytest.mark.parametrize("how", ["fails", "writes"])
def test_hooks_that_go_wrong(
    method: str, hook: str, words: str, how: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: Any, call: Call, *more: Any) -> None:
        if how == "fails":
            raise IndexError("no such page")
        call.key.mul_(1)

    lm = lm_of("llama", method=method, **({"budget": 32} if method == "quest" else {}))
    monkeypatch.setattr(METHODS[method], hook, wrong)
    said = "failed .IndexError: no such page" if how == "fails" else "wrote into the keys or values"
    with pytest.raises(UserError, match=f"method {method}, layer 0: {words} {said}"):
        score(lm, rng)


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        ((Slot("a", "token"), Slot("a", "page")), "keeps a tensor 'a' twice"),
        ((Slot("a", "pagee"),), "cannot be kept; expected a Slot per 'sequence', 'page' or 'token'"),
        (("a",), "cannot be kept"),
    ],
)
def test_slots_that_cannot_be(slots: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Virtual, "slots", lambda self: slots)
    with pytest.raises(UserError, match=words):
        lm_of("llama", method="test_virtual").runtime.kept_state()


@pytest.mark.parametrize("method", ["test_norms", "test_coverage"])
def test_scores_that_are_none(method: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = METHODS[method]
    scored = cls.score

    def spoiled(self: Any, call: Call, *more: Any) -> Tensor:
        found = scored(self, call, *more).clone()
        found.view(-1)[rng.randrange(found.numel())] = math.nan
        return found

    lm = lm_of("llama", method=method)
    monkeypatch.setattr(cls, "score", spoiled)
    with pytest.raises(UserError, match=f"method {method}, layer 0: select failed .*score returned NaN"):
        score(lm, rng)


@pytest.mark.parametrize("method", ["test_norms", "test_coverage", "test_recent"])
@pytest.mark.parametrize("how", ["one less", "none", "whole numbers"])
def test_scores_of_another_shape(method: str, how: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """One off would be a plausible number."""
    cls = METHODS[method]
    scored = cls.score
    change = {"one less": lambda found: found[..., :-1], "none": lambda found: None, "whole numbers": Tensor.long}[how]
    lm = lm_of("llama", method=method)
    monkeypatch.setattr(cls, "score", lambda *args: change(scored(*args)))
    words = {"one less": r"\(.*\); expected \(", "none": "NoneType; exp", "whole numbers": "torch.int64; exp"}[how]
    with pytest.raises(UserError, match=f"method {method}, layer 0: select failed .*score returned {words}"):
        score(lm, rng)


def test_classes_that_are_no_methods() -> None:
    def made(base: type, **own: Any) -> type:
        fields = {**vars(Named), "__annotations__": {"capacity": int}, "capacity": 8, "name": "test_made", **own}
        return dataclass(frozen=True)(type("Made", (base,), {k: v for k, v in fields.items() if k != "__dict__"}))

    METHODS.add(made(Norms))
    METHODS.discard("test_made")
    for cls, words in (
        (made(Norms, name="quest"), "'quest' is the name of a built-in method"),
        (made(Norms, name=""), "does not say its name"),
        (made(Norms, reference=""), "does not say its reference"),
        (made(Norms, name="x:x"), "cannot be typed"),
        (made(Norms, sparsity=0.5, __annotations__={"sparsity": float, "capacity": int}), "a knob 'sparsity'"),
        (made(ScoredEviction), "does not score"),
        (made(Norms, phase="later"), "phase 'later'"),
        (made(Norms, budget_knobs=("size",)), "decides 'size', which is none of its knobs"),
        (made(Norms, allocation=TopP()), "divides its budget by TopP"),
        (made(Norms, allocation=Pooled()), "no knob 'floor'"),
        (made(Norms, native=Mass), "TopP goes with Mass"),
        (made(Coverage, native=Count, budget_knobs=()), "TopP goes with Mass"),
        (type("Plain", (Norms,), {"name": "test_made", "__annotations__": {"size": int}}), "no frozen dataclass"),
        (int, "no subclass of Method"),
        (
            dataclass(frozen=True)(type("Around", (Named, Wrapper), {"name": "test_made", "allocation": "x"})),
            "its wraps",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            METHODS.add(cls)
    assert "test_made" not in METHODS


# --- what is counted, and what is promised ----------------------------------------------------------------------------


def test_virtual_keys_and_weights_are_counted(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = rng.randrange(10**6)

    def figures(method: str) -> dict[str, Any]:
        lm = lm_of("llama", method=method)
        score(lm, random.Random(seed), words=90)
        return lm.report()["phases"]["decode"]

    one = figures("test_virtual")
    choose = Virtual.select

    def many(self: Virtual, call: Call) -> Reads:
        found = choose(self, call)
        wide = [part.repeat_interleave(40, dim) for part, dim in
                ((found.extra.values, 1), (found.extra.keys, 1), (found.extra.bias, 3))]  # fmt: skip
        return replace(found, extra=Extra(*wide))

    monkeypatch.setattr(Virtual, "select", many)
    more = figures("test_virtual")
    assert one["executed_sparsity"] > more["executed_sparsity"] + 0.1
    assert more["bytes_read_fraction"] > one["bytes_read_fraction"] + 0.1
    assert one["calls"]["sparse"] and not one["calls"]["fallback"]
    weighed = figures("test_recent")
    monkeypatch.setattr(Recent, "wants_mass", False)
    unweighed = figures("test_recent")
    assert weighed["bytes_read_fraction"] == pytest.approx(1.5 * unweighed["bytes_read_fraction"])
    assert weighed["estimator_flops_fraction"] > unweighed["estimator_flops_fraction"] == 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_is_generated_with_a_gathered_mass_is_what_is_scored(family: str, rng: random.Random) -> None:
    lm, prompt = lm_of(family, method="test_recent"), tiny.words(rng.randrange(10**6), 60)
    decoder, _ = lm.decoding.get()
    tokens: list[int] = []
    run = type(decoder).run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(decoder), "run", lambda self, rows: (run(self, rows), tokens.extend(rows[0].tokens))[0])
        generate(lm, [prompt], 12)
    found = lm._loglikelihood_tokens([(("p", "a"), lm.tok_encode(prompt), tokens)], disable_tqdm=True)
    assert found[0][1]


@pytest.mark.parametrize(("sparsity", "words"), [(0.2, "sparsity must be at least 0.375"), (0.8, None)])
def test_a_promise_for_layers_that_differ(sparsity: float, words: str | None, rng: random.Random) -> None:
    lm = lm_of("llama", method="test_slopes", sparsity=sparsity)
    if words is None:
        score(lm, rng, words=400)
        assert abs(lm.report()["phases"]["eviction"]["executed_sparsity"] - sparsity) < 0.01
    else:
        with pytest.raises(UserError, match=words):
            score(lm, rng)


def test_factors_of_layers_that_do_not_average_one(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slopes, "allocation", PerLayer(shape=lambda layer, layers: 2.0 - 0.4 * layer))
    with pytest.raises(UserError, match="expected their mean to be 1"):
        score(lm_of("llama", method="test_slopes", sparsity=0.6), rng)


def test_the_window_of_a_method_inside(rng: random.Random) -> None:
    lm = lm_of("llama", method="test_narrower:snapkv", sparsity=0.6, window=1500)
    with pytest.raises(UserError, match="window=1500 was typed, and no prompt has so many tokens .* out for 256"):
        score(lm, rng)
    assert lm.report()["window_from"] == {"snapkv": "typed"}


@pytest.mark.parametrize("options", [{"share_pages": False}, {}])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_beams_of_a_prompt_in_chunks(family: str, options: dict[str, Any], rng: random.Random) -> None:
    """Storage that grows while a prompt is read keeps what the state needs."""
    lm = lm_of(family, method="quest", sparsity=0.6, page_size=8, **options)
    prompt = tiny.words(rng.randrange(10**6), 120)
    asked = {"until": [], "max_gen_toks": 8, "num_beams": 2, "prefill_chunk_size": 50}
    request = Instance("generate_until", {}, (prompt, asked), 0, metadata=("t", 0, 1))
    (found,) = lm.generate_until([request], disable_tqdm=True)
    whole = {name: value for name, value in asked.items() if name != "prefill_chunk_size"}
    request = Instance("generate_until", {}, (prompt, whole), 0, metadata=("t", 0, 1))
    assert [found] == lm_of(family, method="quest", sparsity=0.6, page_size=8, **options).generate_until(
        [request], disable_tqdm=True
    )
    assert found.stats["decode"]["calls"]["sparse"]
