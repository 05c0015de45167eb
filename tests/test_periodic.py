"""Eviction in the course of an answer, held against a simulation that knows no cache.

The simulation reads all tokens anew for each one, by transformers' own eager attention under explicit masks: what each
KV head still holds is a list of positions here. Models and prompts are drawn anew in every run.

Long, since the simulation stands beside the cases it is held against.
"""

from __future__ import annotations

import copy
import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import tiny
import torch
from small_lms import generate, request, score
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels.types import Keep, Reads, Slot
from lm_eval_sparse.methods import METHODS, Allocation, Call, EvictionMethod, Pooled, ScoredEviction
from lm_eval_sparse.methods.base import Layer
from lm_eval_sparse.methods.decode.quest import Quest
from lm_eval_sparse.methods.plan import parse
from lm_eval_sparse.model import decoding, scoring
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.runtime import decoder, periodic
from lm_eval_sparse.runtime.cache import CacheLayer

TOKENIZER = tiny.tiny_tokenizer()
WORDS = [word for word in tiny.WORDS if len(TOKENIZER(" " + word).input_ids) == 1]
QUEST = {"quest.budget": 16, "quest.page_size": 8}
CLOSE = 2e-4


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(autouse=True)
def _own_methods() -> None:
    for cls in (Heavy, Latest, Clashing, Paged, Competing, Wrong, Marked):
        METHODS.add(cls)


class Named:
    """What a row of the taxonomy asks for, here the same for all."""

    unit: ClassVar[str] = "tokens"
    kv: ClassVar[str] = "evicted"
    importance: ClassVar[str] = "test"
    reference: ClassVar[str] = "test"


@dataclass(frozen=True)
class Heavy(Named, EvictionMethod):
    """The tokens that have gathered most attention since the prompt, other numbers of them in each KV head."""

    name: ClassVar[str] = "test_heavy"
    allocation: ClassVar[str] = "uneven"
    wants_mass: ClassVar[bool] = True
    looks_back: ClassVar[int] = 1
    every: int | None = 4
    capacity: int = 20

    def slots(self) -> tuple[Slot, ...]:
        return Slot("weight", "token", (), torch.float32), Slot("steps", "sequence", (), torch.int64)

    def number(self, head: int) -> int:
        return self.capacity + 3 * head

    def prefilled(self, call: Call) -> None:
        assert call.query.shape[2] == 1 and call.phase == "eviction"
        call.state["steps"][call.state.place] = 0
        for start, length in spans(call):
            call.state["weight"][start : start + length] = torch.arange(length) * 1e-3

    def appended(self, call: Call, before: Tensor) -> None:
        call.state["steps"][call.state.place] += call.query.shape[2]
        for (start, length), first in zip(spans(call), before.tolist(), strict=True):
            call.state["weight"][start + first : start + length] = 0

    def attended(self, call: Call, reads: Reads | None, mass: Tensor) -> None:
        for s, (start, length) in enumerate(spans(call)):
            if not length:
                continue
            if reads is None:
                call.state["weight"][start : start + length] += mass[s].sum((0, 1))[:length]
                continue
            for t in range(mass.shape[2]):
                for page, own in zip(
                    reads.ids[s, 0, t, : reads.counts[s, 0, t]].tolist(),
                    mass[s, :, t].sum(0).split(reads.unit),
                    strict=False,
                ):
                    first = page * reads.unit
                    last = min(length, first + reads.unit)
                    call.state["weight"][start + first : start + last] += own[: last - first]

    def select(self, call: Call) -> Keep:
        if call.cache is None:
            lists = [sorted(range(call.length), key=lambda i: (i * 7 + h) % 11)[: self.number(h)] for h in range(2)]
        else:
            steps = call.state["steps"][call.state.place].tolist()
            assert len(set(steps)) == 1 and steps[0] % self.every == 0, "a state that is not of this row"
            assert call.query.shape[2] == 1 and call.phase == "eviction"
            weights = call.cache.padded(call.state["weight"])
            lists = [
                weights[h, :length].sort(descending=True).indices[: self.number(h)].tolist()
                for h, (_, length) in enumerate(spans(call))
            ]
        return keep([sorted(own) for own in lists])


def spans(call: Call) -> list[tuple[int, int]]:
    return list(zip(call.cache.kv.starts.tolist(), call.cache.kv.lengths.tolist(), strict=True))


def keep(lists: list[list[int]], **more: Any) -> Keep:
    ids = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int64)
    for row, own in zip(ids, lists, strict=True):
        row[: len(own)] = torch.tensor(own)
    counts = torch.tensor(list(map(len, lists)))
    return Keep(ids, counts, int(counts.sum()), **more)


@dataclass(frozen=True)
class Latest(Named, ScoredEviction):
    """The first tokens and the last ones."""

    name: ClassVar[str] = "test_latest"
    every: int | None = 4
    capacity: int = 20
    sinks: int = 2

    def score(self, call: Call) -> Tensor:
        kv_heads = call.layer.kv_heads
        length = call.length if call.cache is None else call.cache.kv.longest
        return torch.arange(length).float().expand(kv_heads, -1).clone()


@dataclass(frozen=True)
class Clashing(Latest):
    name: ClassVar[str] = "test_clashing"

    def slots(self) -> tuple[Slot, ...]:
        return (Slot("low", "token", ()),)


@dataclass(frozen=True)
class Paged(Latest):
    name: ClassVar[str] = "test_paged"

    def slots(self) -> tuple[Slot, ...]:
        return (Slot("mine", "page", ()),)


@dataclass(frozen=True)
class Competing(Latest):
    name: ClassVar[str] = "test_competing"
    allocation: ClassVar[Allocation] = Pooled()
    floor: float = 0.2


@dataclass(frozen=True)
class Wrong(Latest):
    """Returns what the test has left here."""

    name: ClassVar[str] = "test_wrong"
    found: ClassVar[Any] = None

    def select(self, call: Call) -> Keep:
        return super().select(call) if call.cache is None else type(self).found(call)


@dataclass(frozen=True)
class Marked(Quest):
    """Marks each token of the answer with its number, and pages with their bounds."""

    name: ClassVar[str] = "test_marked"
    appends: ClassVar[bool] = False

    def slots(self) -> tuple[Slot, ...]:
        return (*super().slots(), Slot("mark", "token", (), torch.int64), Slot("last", "sequence", (), torch.int64))

    def prefilled(self, call: Call) -> None:
        super().prefilled(call)
        call.state["last"][call.state.place] = 0
        for start, length in spans(call):
            call.state["mark"][start : start + length] = 0

    def appended(self, call: Call, before: Tensor) -> None:
        super().appended(call, before)
        for (start, length), first, place in zip(spans(call), before.tolist(), call.state.place, strict=True):
            new = torch.arange(1, length - first + 1) + call.state["last"][place]
            call.state["mark"][start + first : start + length] = new
            call.state["last"][place] = new[-1]
            answer = min(18, int(new[-1]))
            assert call.state["mark"][start : start + length].tolist()[-answer:] == list(
                range(int(new[-1]) - answer + 1, int(new[-1]) + 1)
            )


# --- the simulation ---------------------------------------------------------------------------------------------------

EAGER = "test_periodic_eager"


def masked_eager(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """The model's own eager attention, in which each KV head hides keys from its queries."""
    shown = module._shown[module.layer_idx].repeat_interleave(query.shape[1] // key.shape[1], 0)[None]
    hidden = torch.zeros(shown.shape).masked_fill(~shown, -torch.inf)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    out, weights = eager(module, query, key, value, hidden, **kwargs)
    module._weights[module.layer_idx] = weights[0, :, -1].unflatten(0, (key.shape[1], -1)).sum(1)
    return out, weights


AttentionInterface.register(EAGER, masked_eager)
AttentionMaskInterface.register(EAGER, eager_mask)


@dataclass
class Simulation:
    """A model whose KV heads lose keys as a method says.

    Attributes:
        held: (layer, KV head) -> positions that are held; weight: what each of them has gathered.
        read: shares of all tokens so far that steps have read, by step, layer and head.
    """

    own: PreTrainedModel
    method: Any
    reads: dict[int, list[Reads]] | None = None
    held: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    weight: dict[tuple[int, int], dict[int, float]] = field(default_factory=dict)
    read: list[float] = field(default_factory=list)

    @torch.no_grad()
    def run(self, prompt: list[int], answer: list[int] | None, steps: int) -> tuple[list[int], float]:
        """The answer, given or greedy, and its log-probability."""
        layers, heads = self.own.config.num_hidden_layers, self.own.config.num_key_value_heads
        total = len(prompt) + steps
        shown = torch.ones(layers, heads, total, total, dtype=torch.bool).tril()
        weights: dict[int, Tensor] = {}
        for module in self.own.modules():
            module._weights = weights

        def logits(tokens: list[int]) -> Tensor:
            for module in self.own.modules():
                module._shown = shown[:, :, : len(tokens), : len(tokens)]
            return self.own(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)

        tokens, found, logprob = list(prompt), logits(prompt), 0.0
        for layer in range(layers):
            for head in range(heads):
                self._drop(layer, head, list(range(len(prompt))), prompt_length=len(prompt))
        for step in range(steps):
            token = int(found.argmax()) if answer is None else answer[step]
            logprob += float(found[token])
            tokens.append(token)
            if step == steps - 1:
                break
            at = len(tokens) - 1
            for layer in range(layers):
                for head in range(heads):
                    if step and step % self.method.every == 0:
                        self._drop(layer, head, self.held[layer, head])
                    own = self.held[layer, head]
                    own.append(at)
                    self.weight[layer, head][at] = 0.0
                    seen = own
                    if self.reads is not None:
                        selection = self.reads[layer][step]
                        ids = selection.ids[head, 0, 0, : selection.counts[head, 0, 0]].tolist()
                        seen = [own[i] for page in ids for i in range(page * 8, min(len(own), page * 8 + 8))]
                    shown[layer, head, at] = False
                    shown[layer, head, at, seen] = True
                    self.read.append(len(seen) / len(tokens))
            found = logits(tokens)
            for (layer, head), gathered in self.weight.items():
                for position in gathered:
                    gathered[position] += float(weights[layer][head, position])
        return tokens[len(prompt) :], logprob

    def _drop(self, layer: int, head: int, held: list[int], prompt_length: int | None = None) -> None:
        if isinstance(self.method, Latest):
            rest = held[2:]
            kept = held[:2] + rest[len(rest) - (self.method.capacity - 2) :]
        elif prompt_length is not None:
            kept = sorted(sorted(range(prompt_length), key=lambda i: (i * 7 + head) % 11)[: self.method.number(head)])
        else:
            gathered = self.weight[layer, head]
            kept = sorted(sorted(held, key=lambda i: -gathered[i])[: self.method.number(head)])
        before = self.weight.get((layer, head)) or {position: place * 1e-3 for place, position in enumerate(kept)}
        self.held[layer, head] = kept
        self.weight[layer, head] = {position: before[position] for position in kept}


@torch.no_grad()
def model_of(rng: random.Random) -> PreTrainedModel:
    model = tiny.family("llama", seed=rng.randrange(1 << 31))
    model.get_output_embeddings().weight[2] = 0  # a greedy answer does not end
    return model


def both(rng: random.Random, method: str, quest: bool, **options: Any) -> tuple[SparseHFLM, PreTrainedModel]:
    model = model_of(rng)
    own = copy.deepcopy(model)
    own.set_attn_implementation(EAGER)
    return lm_of(model, method, quest, **options), own


def lm_of(model: PreTrainedModel, method: str, quest: bool = False, **options: Any) -> SparseHFLM:
    typed = {"method": f"{method}+quest", **QUEST} if quest else {"method": method}
    return SparseHFLM(pretrained=model, tokenizer=tiny.tiny_tokenizer(), device="cpu", **typed, **options)


def text(rng: random.Random, tokens: int) -> str:
    return "".join(" " + rng.choice(WORDS) for _ in range(tokens))


@contextmanager
def recorded_pages() -> Iterator[dict[int, list[Reads]]]:
    """Pages that Quest has chosen, by layer and step, each choice checked against bounds made from the keys."""
    found: dict[int, list[Reads]] = {}
    select = Quest.select

    def watch(self: Quest, call: Call) -> Reads:
        selection = select(self, call)
        kv, low, high = call.cache.kv, call.state["low"], call.state["high"]
        for s, (start, length) in enumerate(spans(call)):
            for page in range(length // 8):
                keys = kv.keys[start + 8 * page : start + 8 * page + 8]
                assert torch.equal(low[call.state.first[s] + page], keys.amin(0)), "stale bounds"
                assert torch.equal(high[call.state.first[s] + page], keys.amax(0)), "stale bounds"
        for t in range(call.query.shape[2]):
            part = slice(t, t + 1)
            found.setdefault(call.layer.index, []).append(
                replace(selection, ids=selection.ids[:, :, part].clone(), counts=selection.counts[:, :, part].clone())
            )
        return selection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Quest, "select", watch)
        yield found


CASES = [(method, quest) for method in ("test_heavy", "test_latest") for quest in (False, True)]


@pytest.mark.parametrize(("method", "quest"), CASES)
def test_scoring_is_the_simulation(method: str, quest: bool, rng: random.Random) -> None:
    lm, own = both(rng, method, quest)
    context, answer = text(rng, 50), text(rng, 15)
    with recorded_pages() as pages:
        ((logprob, _),) = score(lm, [(context, answer)])
    simulation = Simulation(own, METHODS[method](), pages if quest else None)
    _, expected = simulation.run(TOKENIZER(context).input_ids, TOKENIZER(answer).input_ids, 15)
    assert logprob == pytest.approx(expected, abs=CLOSE)
    stats = lm.report()["phases"]
    assert stats["eviction"]["calls"]["sparse"] == 2 * (1 + 3)  # layers, and after the prompt and 4, 8 and 12 tokens
    assert 1 - stats["decode"]["executed_sparsity"] == pytest.approx(read_share(simulation, 50, 14), abs=1e-6)


def read_share(simulation: Simulation, prompt: int, steps: int) -> float:
    """Keys that steps have read of those that dense steps read."""
    whole = [prompt + 1 + step for step in range(steps)]
    each = len(simulation.read) // steps
    read = [sum(simulation.read[step * each : (step + 1) * each]) * whole[step] for step in range(steps)]
    return sum(read) / sum(number * each for number in whole)


@pytest.mark.parametrize("by", ["decoder", "transformers"])
@pytest.mark.parametrize(("method", "quest"), CASES)
def test_generation_is_the_simulation(
    method: str, quest: bool, by: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, own = both(rng, method, quest)
    if by == "transformers":
        monkeypatch.setattr(lm.decoding, "get", lambda: (None, "as the test asks"))
    else:
        assert lm.decoding.get()[0] is not None
    context = text(rng, 50)
    with recorded_pages() as pages:
        (found,) = generate(lm, [context], max_gen_toks=15)
    simulation = Simulation(own, METHODS[method](), pages if quest else None)
    tokens, _ = simulation.run(TOKENIZER(context).input_ids, None, 15)
    assert str(found) == TOKENIZER.decode(tokens, skip_special_tokens=True)
    stats = lm.report()["phases"]
    assert stats["eviction"]["calls"]["sparse"] == 2 * (1 + 3)
    assert 1 - stats["decode"]["executed_sparsity"] == pytest.approx(read_share(simulation, 50, 14), abs=1e-6)
    assert 0.5 < stats["eviction"]["knobs_solved"]["dropped"]["min"] < 0.7


@pytest.mark.parametrize(("method", "options"), [("test_heavy", {}), ("test_latest", {"sparsity": 0.4})])
def test_answers_outgrow_their_storage(
    method: str, options: dict[str, Any], rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, context = model_of(rng), text(rng, 40)
    answers = [str(generate(lm_of(copy.deepcopy(model), method, **options), [context], max_gen_toks=40)[0])]
    monkeypatch.setattr(decoding, "RESERVE", 3)
    monkeypatch.setattr(decoder, "LEAST_GROWTH", 2)
    answers.append(str(generate(lm_of(model, method, **options), [context], max_gen_toks=40)[0]))
    assert answers[0] == answers[1]


def test_beams_are_evicted(rng: random.Random) -> None:
    """Where nothing has to leave, beams are those of dense decoding; where something has, each goes on by itself."""
    model, context = model_of(rng), text(rng, 40)
    texts = [
        str(generate(lm_of(copy.deepcopy(model), **typed), [context], max_gen_toks=14, num_beams=3)[0])
        for typed in ({"method": "dense"}, {"method": "test_latest", "capacity": 90})
    ]
    assert texts[0] == texts[1]
    lm = lm_of(model, "test_heavy")
    generate(lm, [context], max_gen_toks=14, num_beams=3)
    assert lm.runtime.compactions == 3 and lm.report()["phases"]["eviction"]["calls"]["sparse"] >= 2 * (1 + 3)


# --- company ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("method", "quest"), [("test_heavy", True), ("test_latest", False)])
def test_a_batch_is_not_felt(
    method: str, quest: bool, ahead: bool, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ahead`: as on a GPU a step is under way while the host looks at the last one, and attention has idle rows."""
    model = model_of(rng).to(torch.bfloat16)
    prompts = [text(rng, rng.randint(30, 60)) for _ in range(3)]
    monkeypatch.setattr(decoding, "RESERVE", 6)
    monkeypatch.setattr(decoder, "LEAST_GROWTH", 5)
    alone_lm = lm_of(copy.deepcopy(model), method, quest)
    alone = [generate(alone_lm, [prompt], max_gen_toks=22)[0] for prompt in prompts]
    lm = lm_of(model, method, quest, batch_size=3)
    if ahead:
        loop = lm.decoding.get()[0]
        loop.depth, loop.fixed = 2, 4 * loop.multiple if loop.multiple < 3 else loop.multiple
    together = generate(lm, prompts, max_gen_toks=22)
    assert [str(one) for one in together] == [str(one) for one in alone]
    for one, other in zip(together, alone, strict=True):
        for phase in ("eviction", "decode"):
            assert one.stats[phase]["executed_sparsity"] == other.stats[phase]["executed_sparsity"]


@pytest.mark.parametrize(("method", "quest"), [("test_heavy", True), ("test_latest", False)])
def test_answers_of_one_context_are_those_of_each_alone(method: str, quest: bool, rng: random.Random) -> None:
    model, context = model_of(rng), text(rng, 50)
    pairs = [(context, text(rng, tokens)) for tokens in (14, 3, 9, 12)]
    found = score(lm_of(copy.deepcopy(model), method, quest), pairs)
    lm = lm_of(model, method, quest)
    for pair, one in zip(pairs, found, strict=True):
        assert tuple(one) == tuple(score(lm, [pair])[0])
    # Two layers, once after the prompt, and in the course of answers 3, 0, 1 and 2 times.
    assert sum(found[0].stats["eviction"]["calls"].values()) == 2 * (1 + 6)


def test_what_a_decode_method_keeps_of_tokens_moves_with_them(rng: random.Random) -> None:
    model = model_of(rng)
    typed = {"method": "test_latest+test_marked", "budget": 16, "page_size": 8}
    lm = SparseHFLM(pretrained=model, tokenizer=tiny.tiny_tokenizer(), device="cpu", **typed)
    score(lm, [(text(rng, 50), text(rng, 14))])
    generate(lm, [text(rng, 50), text(rng, 40)], max_gen_toks=14)
    assert lm.runtime.compactions == 3 * 3


def test_the_newest_query_goes_with_its_beam() -> None:
    layer = CacheLayer()
    layer.update(torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4))
    layer.close()
    layer.newest = Layer(), torch.arange(6.0).view(6, 1, 1, 1)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert layer.newest[1].flatten().tolist() == [4, 5, 0, 1, 0, 1]


def test_pieces_are_cut_where_evictions_are(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(scoring.cut(10, 4)) == [(0, 4), (4, 8), (8, 10)] and list(scoring.cut(9, None)) == [(0, 9)]
    model, pair = model_of(rng), (text(rng, 50), text(rng, 15))
    whole = score(lm_of(copy.deepcopy(model), "test_heavy", True), [pair])[0][0]
    monkeypatch.setattr(scoring, "SCORE_CHUNK", 3)
    assert list(scoring.cut(9, 4)) == [(0, 3), (3, 4), (4, 7), (7, 8), (8, 9)]
    assert score(lm_of(model, "test_heavy", True), [pair])[0][0] == pytest.approx(whole, abs=CLOSE)


@pytest.mark.parametrize("kind", ["score", "generate"])
def test_the_promise_holds_after_each_compaction(
    kind: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, seen = lm_of(model_of(rng), "test_latest", sparsity=0.6), []
    again = periodic.evict_again

    def watch(plan: Any, layer: Any, pool: Any, held: Any, query: Any, prompt: int, tokens: int, **rest: Any) -> int:
        freed = again(plan, layer, pool, held, query, prompt, tokens, **rest)
        seen.append((tokens, held.lengths.tolist()))
        return freed

    monkeypatch.setattr("lm_eval_sparse.runtime.periodic.evict_again", watch)
    monkeypatch.setattr("lm_eval_sparse.runtime.decoder.evict_again", watch)
    if kind == "score":
        score(lm, [(text(rng, 200), text(rng, 22))])
    else:
        generate(lm, [text(rng, 200)], max_gen_toks=22)
    assert [tokens for tokens, _ in seen] == [200 + 4 * n for n in range(1, 6) for _ in range(2)]
    assert all(lengths == [round(0.4 * tokens)] * 2 for tokens, lengths in seen)
    figures = lm.report()["phases"]["eviction"]
    assert figures["executed_sparsity"] == pytest.approx(0.6, abs=0.005)
    assert figures["kv_memory_fraction"] == pytest.approx(0.4, abs=0.005)
    dropped = figures["knobs_solved"]["dropped"]
    assert dropped["min"] > 0.595 and dropped["max"] < 0.605


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"method": "test_latest", "every": 0}, "every=0 is not accepted: give a whole number of at least 1"),
        ({"method": "test_latest", "every": 2.5}, "every=2.5 is not accepted: give a whole number"),
        ({"method": "test_latest", "every": "often"}, "every='often' is not accepted"),
        ({"method": "test_competing"}, "every=4: heads that compete for a budget"),
    ],
)
def test_periods_that_cannot_be(typed: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(typed)
    assert parse({"method": "test_latest", "every": 8.0}).methods["eviction"].every == 8
    assert parse({"method": "snapkv"}).plan.every is None


def test_states_that_do_not_go_together() -> None:
    with pytest.raises(UserError, match="test_clashing and quest both keep a state called low"):
        _ = parse({"method": "test_clashing+quest"}).plan
    with pytest.raises(UserError, match="test_paged keeps 'mine' of each page"):
        _ = parse({"method": "test_paged"}).plan


@pytest.mark.parametrize(
    ("lists", "more", "words"),
    [
        ([[0, 1], [3, 24]], {}, "KV head 1: it lists places that are negative or not below the 24 tokens"),
        ([[0, -1], [3, 4]], {}, "KV head 0: it lists places that are negative"),
        ([[1, 1], [3, 4]], {}, "KV head 0: it lists places that are not strictly ascending"),
        ([[0], [3, 4]], {"total": 4}, "do not add up to its total of 4"),
        ([[0, 1], [3, 4]], {"positions": torch.zeros(2, 2, dtype=torch.int64)}, "positions of a Keep are not taken"),
        ([[0, 1], [3, 4]], {"values": torch.zeros(2, 2, 16)}, "values of a Keep are not taken"),
    ],
)
def test_what_cannot_stay(
    lists: list[list[int]], more: dict[str, Any], words: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wrong, "found", lambda call: replace(keep(lists), **more))
    lm = lm_of(model_of(rng), "test_wrong")
    with pytest.raises(UserError, match=f"method test_wrong, layer 0.*{words}"):
        generate(lm, [text(rng, 50)], max_gen_toks=8)
    with pytest.raises(UserError, match=words):
        score(lm, [(text(rng, 50), text(rng, 8))])


@pytest.mark.parametrize("tokens", [5, 6])
def test_answers_that_are_too_short_are_said_once(
    tokens: int, rng: random.Random, caplog: pytest.LogCaptureFixture
) -> None:
    lm = lm_of(model_of(rng), "test_latest")
    with caplog.at_level(logging.WARNING):
        lm.loglikelihood([request("loglikelihood", text(rng, 50), text(rng, tokens))], disable_tqdm=True)
        lm.reporter.check_it_ran()
    said = [record.getMessage() for record in caplog.records if "every=" in record.getMessage()]
    wanted = "test_latest evicted prompts only, never an answer in its course, in t: every=4"
    assert [line.partition(", and")[0] for line in said] == ([wanted] if tokens == 5 else [])
    phase = lm.report()["tasks"]["t"]["eviction"]
    assert phase["compactions"] == (0 if tokens == 5 else lm.model.config.num_hidden_layers)


def test_no_room_for_an_eviction_is_refused(rng: random.Random) -> None:
    lm = lm_of(model_of(rng), "test_latest")
    with pytest.raises(
        UserError, match=r"every=4: no answer is evicted.* \(max_gen_toks=5\); type every=3 or less, or type"
    ):
        generate(lm, [text(rng, 50)], max_gen_toks=5)
    generate(lm, [text(rng, 50)], max_gen_toks=6)
    assert lm.report()["phases"]["eviction"]["compactions"] == lm.model.config.num_hidden_layers
