"""The three phases end to end, on tiny random models: full budgets, eviction, paged decoding, and all of them composed.

What is expected comes from transformers' own eager attention over the whole sequence under an explicit mask for each
query head, or from loops written here. The masks are those of the selections that the methods made (recorded as they
are returned); pages are also picked anew by brute force. Models, prompts and lengths are drawn anew in every run: a
failing test shows its seed, and TEST_PHASES_SEED=<seed> repeats it.

Long, since every case is held against the one oracle at its head.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import random
import sys
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from small_lms import generate, request, score, sparse
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels.decode import paged_decode
from lm_eval_sparse.kernels.prefill import block_sparse_prefill
from lm_eval_sparse.methods import METHODS, Call
from lm_eval_sparse.methods.decode.quest import Quest
from lm_eval_sparse.methods.prefill.block_sparse import BlockSparse
from lm_eval_sparse.methods.prefill.flexprefill import FlexPrefill
from lm_eval_sparse.methods.prefill.vertical_slash import VerticalSlash
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.protocol import SharedPrompt
from lm_eval_sparse.runtime import decoder as decoding
from lm_eval_sparse.runtime import steps
from lm_eval_sparse.runtime.accounting import COVERED, RowCounts
from lm_eval_sparse.runtime.cache import CacheLayer
from lm_eval_sparse.runtime.selections import COVERS
from lm_eval_sparse.runtime.session import Runtime
from lm_eval_sparse.testing import select

SEED = int(os.environ.get("TEST_PHASES_SEED") or random.SystemRandom().randrange(1 << 31))
#: Absolute difference of logits and log-likelihoods that rounding explains.
CLOSE = 1e-4

TOKENIZER = tiny.tiny_tokenizer()
#: Words that are one token each after a space, so that prompts have exactly the length that a test asks for.
WORDS = [word for word in tiny.WORDS if len(TOKENIZER(" " + word).input_ids) == 1]

#: Small windows, blocks and floors, so that prompts of 60 tokens are sparse.
SMALL: dict[str, dict[str, Any]] = {
    "vertical_slash": {"verticals": 6, "slashes": 6, "window": 16, "near": 4, "tile": 16},
    "flexprefill": {"gamma": 0.5, "min_budget": 0, "block_size": 16},
    "flexprefill_vs": {"alpha": 0.4, "min_budget": 4, "window": 16, "near": 4, "tile": 16},
    "block_sparse": {"top_k": 2, "block_size": 16},
    "snapkv": {"capacity": 30, "window": 12, "kernel": 5, "sinks": 2, "local": 4},
    "ada_snapkv": {"capacity": 30, "window": 12, "kernel": 5, "sinks": 2, "local": 4},
    "quest": {"budget": 16, "page_size": 8},
}
SPARSE_METHODS = tuple(SMALL)
COMBINATIONS = (
    "flexprefill+snapkv+quest",
    "vertical_slash+ada_snapkv",
    "block_sparse+quest",
    "flexprefill_vs+ada_snapkv+quest",
    "snapkv+quest",
    "ada_snapkv+quest",
)


def knobs(method: str, **more: Any) -> dict[str, Any]:
    """Model arguments of `method` with its `SMALL` knobs, each under its method's name; `more` goes on top."""
    names = method.split("+")
    typed = {f"{name}.{knob}": value for name in names for knob, value in SMALL[name].items()}
    return {"method": method, "backend": "gather", **typed, **more}


@pytest.fixture(autouse=True)
def rng(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """Random numbers of this test alone, the same in whatever order and company tests run."""
    print(f"TEST_PHASES_SEED={SEED}")  # pytest shows it when the test fails
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return random.Random(f"{SEED} {request.node.name}")


def text(rng: random.Random, tokens: int) -> str:
    """A prompt of exactly `tokens` tokens."""
    made = "a" + answer(rng, tokens - 1)
    assert len(TOKENIZER(made).input_ids) == tokens
    return made


def answer(rng: random.Random, tokens: int) -> str:
    """A continuation of exactly `tokens` tokens."""
    return "".join(" " + rng.choice(WORDS) for _ in range(tokens))


@torch.no_grad()
def model_of(rng: random.Random, name: str = "llama", **options: Any) -> PreTrainedModel:
    """A random model that does not end a greedy answer: the logit of the end token is always 0."""
    model = tiny.family(name, seed=rng.randrange(1 << 31), **options)
    model.get_output_embeddings().weight[2] = 0
    return model


def full_layers(model: PreTrainedModel) -> list[int]:
    """Layers with full causal attention, from the configuration alone."""
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    return [index for index, kind in enumerate(kinds) if kind == "full_attention"]


# --- the oracle: eager attention under explicit masks ----------------------------------------------------------------

EAGER = "test_phases_eager"


def masked_eager(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """The model's own eager attention; where a policy is set, it hides further keys from each query head."""
    policy = getattr(module, "_policy", None)
    if policy is not None:
        allowed = torch.stack([policy(module.layer_idx, q, k) for q, k in zip(query, key, strict=True)])
        hidden = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)
        attention_mask = hidden if attention_mask is None else attention_mask + hidden
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(EAGER, masked_eager)
AttentionMaskInterface.register(EAGER, eager_mask)


def oracle_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with its own attention, to be taken before `sparse` gets hold of the model."""
    own = copy.deepcopy(model)
    own.set_attn_implementation(EAGER)
    return own


def set_policy(own: PreTrainedModel, policy: Any) -> None:
    layers = full_layers(own)
    for module in own.modules():
        if hasattr(module, "layer_idx"):
            module._policy = policy if module.layer_idx in layers else None


@torch.no_grad()
def eager_logits(own: PreTrainedModel, tokens: list[int], policy: Any = None) -> Tensor:
    """`(L, V)` logits of one forward pass over all tokens."""
    set_policy(own, policy)
    return own(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


def eager_scores(own: PreTrainedModel, pairs: list[tuple[str, str]]) -> list[float]:
    """Dense log-likelihoods."""
    found = []
    for context, continuation in pairs:
        head, tail = TOKENIZER(context).input_ids, TOKENIZER(continuation).input_ids
        logprobs = eager_logits(own, head + tail).log_softmax(-1)
        found.append(sum(float(logprobs[len(head) - 1 + i, token]) for i, token in enumerate(tail)))
    return found


@torch.no_grad()
def eager_text(own: PreTrainedModel, prompt: str, tokens: int, policy: Any = None, **options: Any) -> str:
    """What transformers generates without any cache, every step over all tokens."""
    set_policy(own, policy)
    ids = torch.tensor([TOKENIZER(prompt).input_ids])
    out = own.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
        use_cache=False, **options,
    )  # fmt: skip
    return TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# --- what the runtime did -------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One prompt and what followed it, as the runtime ran it.

    Attributes:
        tokens: ids in the order in which the model was given them.
        logits: `(1, T, V)` of each forward pass.
        prefill, eviction: layer -> selection.
        decode: layer -> position of the first new token -> selection.
        executed: layer -> position of the first new token -> the selection that attention was computed for, if any.
        counts: what was counted of each prompt.
        lengths: layer -> keys that each KV head held after each forward pass.
    """

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    prefill: dict[int, Any] = field(default_factory=dict)
    eviction: dict[int, Any] = field(default_factory=dict)
    decode: dict[int, dict[int, Any]] = field(default_factory=lambda: defaultdict(dict))
    executed: dict[int, dict[int, Any]] = field(default_factory=lambda: defaultdict(dict))
    counts: list[RowCounts] = field(default_factory=list)
    lengths: dict[int, list[list[int]]] = field(default_factory=lambda: defaultdict(list))


@contextmanager
def recording(lm: SparseHFLM) -> Iterator[Seen]:
    """Record one unpadded prompt with one continuation."""
    decoder, reason = lm.decoding.get()  # it tries itself when it is made
    assert decoder is not None, reason
    seen, offset, layer = Seen(), defaultdict(int), [-1]
    attend, stats = Runtime.attend, lm.reporter.stats

    def noted_attend(self: Runtime, module: torch.nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer[0] = module.layer_idx
        out = attend(self, module, query, *args, **kwargs)
        offset[module.layer_idx] += query.shape[2]
        return out

    def noted_select(select: Any) -> Any:
        def wrapped(self: Any, call: Call) -> Any:
            selection = select(self, call)
            if self.phase == "decode":
                seen.decode[layer[0]][offset[layer[0]]] = selection
            else:
                getattr(seen, self.phase)[layer[0]] = selection
            return selection

        return wrapped

    def noted_paged(query: Tensor, kv: Any, selection: Any = None, **kwargs: Any) -> Any:
        seen.executed[layer[0]][offset[layer[0]]] = selection
        return paged_decode(query, kv, selection, **kwargs)

    def after_forward(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.tokens += kwargs["input_ids"][0].tolist()
        seen.logits.append(output.logits.clone().float())
        if lm.runtime.decoder is not None:
            for index in full_layers(lm.model):
                held = lm.runtime.decoder.layers[index]
                seen.lengths[index].append(held.lengths[: held.heads].tolist())
        for index, held in enumerate(lm.runtime.cache.layers if lm.runtime.cache else []):
            if isinstance(held, CacheLayer):
                seen.lengths[index].append(held.ended().lengths.tolist())

    def noted_stats(counts: RowCounts) -> Any:
        seen.counts.append(counts)
        return stats(counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runtime, "attend", noted_attend)
        patch.setattr(lm.reporter, "stats", noted_stats)
        patch.setattr(steps, "paged_decode", noted_paged)
        for owner in {base for cls in METHODS.values() for base in cls.__mro__ if "select" in vars(base)}:
            patch.setattr(owner, "select", noted_select(vars(owner)["select"]))
        hook = lm.model.register_forward_hook(after_forward, with_kwargs=True)
        try:
            yield seen
        finally:
            hook.remove()


def layout_mask(layout: Any) -> Tensor:
    """`(H, L, L)` bool: causal pairs in listed tiles and columns, entry by entry."""
    length, bq, bk = layout.length, layout.block_q, layout.block_k
    allowed = torch.zeros(layout.indices.shape[0], length, length, dtype=torch.bool)
    for head, rows in enumerate(layout.indices.tolist()):
        for row, blocks in enumerate(rows):
            queries = slice(row * bq, (row + 1) * bq)
            for block in blocks[: int(layout.counts[head, row])]:
                allowed[head, queries, block * bk : (block + 1) * bk] = True
            if layout.columns is not None:
                lists = layout.columns[head]  # one for all query blocks, or one for each
                own = lists[min(row, len(lists) - 1), : int(layout.column_counts[head, row])].long()
                allowed[head, queries, own] = True
    return allowed.tril()


@dataclass
class Brute:
    """Masks from the recorded selections, as a policy of `masked_eager`, and what they add up to.

    Pages are picked here, from the oracle's own queries and keys; a pick of the runtime's that differs has to be as
    good but for rounding.
    """

    seen: Seen
    prompt: int
    quest: Quest | None = None
    sparsity: float | None = None
    prefill: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, list[int]] = field(default_factory=dict)
    read: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> Tensor:
        (heads, total, _), (kv_heads, _, _) = query.shape, key.shape
        group, length = heads // kv_heads, self.prompt
        allowed = torch.ones(heads, total, total, dtype=torch.bool).tril()
        if layer in self.seen.prefill:
            allowed[:, :length, :length] = layout_mask(self.seen.prefill[layer])
        self.prefill[layer] = allowed[:, :length, :length].sum((1, 2))
        held = [list(range(length))] * kv_heads
        if layer in self.seen.eviction:
            chosen = self.seen.eviction[layer]
            held = [ids[:count].tolist() for ids, count in zip(chosen.ids, chosen.counts, strict=True)]
            assert all(ids == sorted(set(ids)) and ids and 0 <= ids[0] <= ids[-1] < length for ids in held)
        self.kept[layer] = [len(ids) for ids in held]
        after = torch.zeros(heads, total - length, total, dtype=torch.bool)
        for kv_head, ids in enumerate(held):
            own = slice(kv_head * group, (kv_head + 1) * group)
            for step in range(total - length):
                keys = torch.tensor(ids + list(range(length, length + step + 1)))
                if self.quest is None:
                    after[own, step, keys] = True
                    continue
                picks = self._pages(layer, kv_head, length + step, query[own, length + step], key[kv_head], keys)
                for head, pages in enumerate(picks):
                    for page in pages:
                        size = self.quest.page_size
                        after[kv_head * group + head, step, keys[page * size : (page + 1) * size]] = True
        self.read[layer] = after.sum(-1)
        allowed[:, length:] = after
        return allowed

    def _pages(
        self, layer: int, kv_head: int, position: int, query: Tensor, key: Tensor, keys: Tensor
    ) -> list[set[int]]:
        """Pages that each query head of the group reads: page p is entries p * size to (p + 1) * size of `keys`."""
        size, before = self.quest.page_size, (len(keys) - 1) // self.quest.page_size
        if self.sparsity is None:
            wanted = self.quest.budget // size
        else:
            wanted = round(((1 - self.sparsity) * (position + 1) - (len(keys) - before * size)) / size)
        wanted = min(before, max(0, wanted))
        bounds = torch.zeros(len(query), before, dtype=torch.float64)
        for page in range(before):
            inside = key[keys[page * size : (page + 1) * size]].double()
            low, high = inside.amin(0), inside.amax(0)
            bounds[:, page] = torch.maximum(query.double() * low, query.double() * high).sum(-1)
        if self.quest.share_pages:
            bounds = bounds.sum(0, keepdim=True).expand(len(query), -1)
        picked = [set(sorted(range(before), key=lambda p: (-float(row[p]), -p))[:wanted]) for row in bounds]
        first = max(first for first in self.seen.decode[layer] if first <= position)
        selection = self.seen.decode[layer][first]
        assert position - first < selection.ids.shape[2] and self.seen.executed[layer][first] is selection
        found = []
        for head, brute in enumerate(picked):
            at = (kv_head, head if selection.ids.shape[1] > 1 else 0, position - first)
            pages = selection.ids[at][: int(selection.counts[at])].tolist()
            assert pages == sorted(set(pages)) and len(pages) == wanted + 1 and before in pages
            chosen, row = set(pages) - {before}, bounds[head]
            for mine, theirs in zip(sorted(brute - chosen), sorted(chosen - brute), strict=True):
                assert float(row[mine]) == pytest.approx(float(row[theirs]), rel=1e-4, abs=1e-4), (layer, position)
            found.append(chosen | {before})
        return found


def check(
    own: PreTrainedModel, seen: Seen, length: int, quest: Quest | None = None, sparsity: float | None = None
) -> Brute:
    """Assert that all logits after the prompt, and what was measured, are those of the masks."""
    brute = Brute(seen, length, quest, sparsity)
    found = torch.cat([seen.logits[0][0, -1:], *(logits[0] for logits in seen.logits[1:])])
    expected = eager_logits(own, seen.tokens, brute)[length - 1 :]
    assert found.shape == expected.shape
    off = (found - expected).abs().amax(-1)
    assert float(off.max()) <= CLOSE * max(1.0, float(expected.abs().max())), f"logits differ by {off.tolist()}"
    (counts,) = seen.counts
    check_figures(own, brute, counts, len(seen.tokens))
    return brute


def check_figures(own: PreTrainedModel, brute: Brute, counts: RowCounts, total: int) -> None:
    """What was measured is what the masks add up to."""
    config, length, layers = own.config, brute.prompt, full_layers(own)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    figures = counts.figures()
    assert set(counts.kv) == set(counts.phase("prefill").layers) == set(layers)
    dense = len(layers) * heads * length * (length + 1) / 2
    executed = sum(int(brute.prefill[layer].sum()) for layer in layers)
    assert figures["prefill"]["executed_sparsity"] == pytest.approx(1 - executed / dense, abs=1e-9)
    held = sum(sum(brute.kept[layer]) for layer in layers)
    share = held / (len(layers) * kv_heads * length)
    if counts.phase("eviction").layers:
        assert figures["eviction"]["executed_sparsity"] == pytest.approx(1 - share, abs=1e-9)
    metadata = 0
    if brute.quest is not None:
        metadata = sum(-(-kept // brute.quest.page_size) for layer in layers for kept in brute.kept[layer])
    memory = share + metadata / (len(layers) * kv_heads * length)
    assert figures["decode"]["kv_memory_fraction"] == pytest.approx(memory, abs=1e-9)
    if total > length:
        logical = heads * sum(range(length + 1, total + 1))
        for layer in layers:
            table = counts.phase("decode").layers[layer]
            assert table[0].sum() == logical
            assert table[2].tolist() == brute.read[layer].sum(-1).tolist(), f"keys read in layer {layer}"
        read = sum(int(brute.read[layer].sum()) for layer in layers)
        assert figures["decode"]["executed_sparsity"] == pytest.approx(1 - read / (logical * len(layers)), abs=1e-9)
        if counts.phase("decode").calls["fallback"] == 0:
            own_bytes = 2 * dim * 4
            loaded = 0.0
            for layer in layers:
                per_head = brute.read[layer].reshape(kv_heads, heads // kv_heads, -1)
                shared = brute.quest is None or brute.quest.share_pages
                loaded += float((per_head[:, :1] if shared else per_head).sum()) * own_bytes
                if brute.quest is not None:
                    for head, kept in enumerate(brute.kept[layer]):
                        for step in range(total - length):
                            # A step whose budget takes everything looks at no bounds.
                            if per_head[head, 0, step] < kept + step + 1:
                                loaded += (kept + step) // brute.quest.page_size * 2 * dim * 4
            whole = len(layers) * kv_heads * sum(range(length + 1, total + 1)) * own_bytes
            assert figures["decode"]["bytes_read_fraction"] == pytest.approx(loaded / whole, abs=1e-9)
    # A selection that leaves nothing out in any head counts as a fallback.
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    open_layouts = [found for found in brute.seen.prefill.values() if not (layout_mask(found) | ~causal).all()]
    assert counts.phase("prefill").calls["sparse"] == len(open_layouts)
    evicting = [found for found in brute.seen.eviction.values() if int(found.counts.sum()) < kv_heads * length]
    assert counts.phase("eviction").calls["sparse"] == len(evicting)


def quest_of(options: dict[str, Any]) -> Quest | None:
    """The Quest of some model arguments, if any."""
    if "quest" not in options["method"].split("+"):
        return None
    own = {name.removeprefix("quest."): value for name, value in options.items() if name.startswith("quest.")}
    return Quest(**own)


def scored(model: PreTrainedModel, context: str, continuation: str, options: dict[str, Any]) -> tuple[Seen, Any]:
    lm = sparse(copy.deepcopy(model), **options)
    with recording(lm) as seen:
        (found,) = score(lm, [(context, continuation)])
    return seen, found


def check_score(
    rng: random.Random, model: PreTrainedModel, length: int, tokens: int, options: dict[str, Any]
) -> tuple[Seen, Brute]:
    """Score one random answer of a random prompt and compare with the masks."""
    context, continuation = text(rng, length), answer(rng, tokens)
    own = oracle_of(model)
    seen, found = scored(model, context, continuation, options)
    brute = check(own, seen, length, quest_of(options), options.get("decode_sparsity", options.get("sparsity")))
    ids = TOKENIZER(continuation).input_ids
    logprobs = eager_logits(own, seen.tokens, Brute(seen, length, brute.quest, brute.sparsity)).log_softmax(-1)
    expected = sum(float(logprobs[length - 1 + i, token]) for i, token in enumerate(ids))
    assert found[0] == pytest.approx(expected, abs=CLOSE)
    assert found[1] == all(int(logprobs[length - 1 + i].argmax()) == token for i, token in enumerate(ids))
    return seen, brute


def plain(stats: dict[str, Any]) -> dict[str, Any]:
    """Measured figures without the name of the run."""
    return {name: value for name, value in stats.items() if name != "run"}


# --- 1. everything selected is dense ---------------------------------------------------------------------------------

FULL_PROMPTS = (1, 47, 80, 129)
#: Knobs of a budget that takes everything.
COVERING: dict[str, dict[str, Any]] = {
    "vertical_slash": {"verticals": 10**6, "slashes": 10**6},
    "flexprefill": {"gamma": 1, "block_size": 16},
    "flexprefill_vs": {"alpha": 1, "min_budget": 10**6},
    "block_sparse": {"top_k": 10**6},
    "snapkv": {"capacity": 10**6},
    "ada_snapkv": {"capacity": 10**6},
    "quest": {"budget": 16 * 10**5},
}


def covering(method: str) -> dict[str, Any]:
    typed = {f"{name}.{knob}": value for name in method.split("+") for knob, value in COVERING[name].items()}
    return {"method": method, "backend": "gather", **typed}


def assert_dense(
    own: PreTrainedModel, lm: SparseHFLM, prompts: list[str], pairs: list[tuple[str, str]], tokens: int
) -> list[Any]:
    texts, scores = generate(lm, prompts, max_gen_toks=tokens), score(lm, pairs)
    assert texts == [eager_text(own, prompt, tokens) for prompt in prompts]
    assert [found[0] for found in scores] == pytest.approx(eager_scores(own, pairs), abs=CLOSE)
    for found in (*texts, *scores):
        for phase in ("prefill", "eviction", "decode"):
            assert found.stats[phase]["executed_sparsity"] in (0, None)
    return [*texts, *scores]


@pytest.fixture(scope="module")
def dense_case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel, list[str], list[Any]]:
    """A model, its oracle, prompts and pairs, the same for all methods."""
    rng = random.Random(f"{SEED} {request.param}")
    model = model_of(rng, request.param)
    prompts = [text(rng, length) for length in FULL_PROMPTS]
    pairs = [(prompt, answer(rng, tokens)) for prompt in prompts for tokens in (1, 6)]
    return model, oracle_of(model), prompts, pairs


def single_methods_with_caps(test: Any) -> Any:
    """All combinations on both models, single methods on the one that caps its scores: test_methods_matrix.py has the
    other for each of them."""
    cases = [*(("gemma2", method) for method in SPARSE_METHODS),
             *((name, method) for name in ("llama", "gemma2") for method in COMBINATIONS)]  # fmt: skip
    return pytest.mark.parametrize(("dense_case", "method"), cases, indirect=["dense_case"])(test)


@single_methods_with_caps
def test_sparsity_zero_is_dense(method: str, dense_case: Any) -> None:
    model, own, prompts, pairs = dense_case
    lm = sparse(copy.deepcopy(model), method=method, sparsity=0, backend="gather", batch_size=3)
    found = assert_dense(own, lm, prompts, pairs, 6)
    for phase in ("prefill", "eviction", "decode"):
        assert {kind for one in found for kind in one.stats[phase]["calls"]} <= {"dense"}
    assert {one.stats["decode"]["kv_memory_fraction"] for one in found} == {1}
    lm.check_it_ran()


@single_methods_with_caps
def test_a_budget_that_covers_everything_is_dense(method: str, dense_case: Any) -> None:
    """Such budgets are counted as fallback, with a reason, whether they ran dense or executed everything."""
    model, own, prompts, pairs = dense_case
    lm = sparse(copy.deepcopy(model), **covering(method), batch_size=2)
    found = assert_dense(own, lm, prompts, pairs, 6)
    for name in method.split("+"):
        calls = [one.stats[METHODS[name].phase]["calls"] for one in found]
        assert (
            sum(c.get("sparse", 0) + c.get("fallback", 0) for c in calls) > 0 == sum(c.get("dense", 0) for c in calls)
        )
        assert sum(c.get("sparse", 0) for c in calls) == 0
        assert lm.report()["phases"][METHODS[name].phase]["fallback_reasons"]
        with pytest.raises(UserError, match="never ran"):
            lm.check_it_ran()


@single_methods_with_caps
def test_everything_selected_through_the_sparse_path_is_dense(
    method: str, dense_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same budgets, but all are executed: layouts of all tiles, caches of all tokens, lists of all pages.

    They are counted as fallback once it is known that nothing was left out.
    """
    for cls in METHODS.values():
        monkeypatch.setattr(cls, "too_short", lambda self, sparsity, length: None)
    lists: list[Any] = []

    def noted_paged(query: Tensor, kv: Any, selection: Any = None, **kwargs: Any) -> Any:
        lists.append(selection)
        if selection is not None:
            assert torch.equal(
                selection.keys_read(kv), kv.visible(query.shape[2])[:, None].expand(selection.counts.shape)
            )
        return paged_decode(query, kv, selection, **kwargs)

    model, own, prompts, pairs = dense_case
    lm = sparse(copy.deepcopy(model), **covering(method), batch_size=2)
    lm.decoding.get()
    monkeypatch.setattr(steps, "paged_decode", noted_paged)
    found = assert_dense(own, lm, prompts, pairs, 6)
    report = lm.report()["phases"]
    for name in method.split("+"):
        if name == "quest":
            calls = report["decode"]["calls"]
            assert report["decode"]["fallback_reasons"] == {COVERED: calls["fallback"]}
            assert calls["fallback"] == sum(selection is not None for selection in lists) > 0
            assert calls["sparse"] == calls["dense"] == 0
            if len(full_layers(model)) == model.config.num_hidden_layers:  # window layers read all that they hold
                assert all(selection is not None for selection in lists)
            continue
        for one in found:
            calls = one.stats[METHODS[name].phase]["calls"]
            assert calls.get("sparse", 0) == calls.get("dense", 0) == 0
        phase = METHODS[name].phase
        assert report[phase]["fallback_reasons"] == {COVERS[phase]: report[phase]["calls"]["fallback"]}
        assert report[phase]["calls"]["fallback"] > 0


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_select_and_operator_with_everything_are_dense(rng: random.Random, length: int, softcap: float | None) -> None:
    torch.manual_seed(rng.randrange(1 << 31))
    query, key, value = torch.randn(4, length, 16), torch.randn(2, length, 16), torch.randn(2, length, 16)
    methods = (
        VerticalSlash(verticals=10**6, slashes=10**6, window=8, tile=16),
        BlockSparse(top_k=10**6),
        FlexPrefill(gamma=1, block_size=16),
    )
    for method in methods:
        selection = select(method, query, key, scale=0.3, softcap=softcap, sparsity=None)
        assert layout_mask(selection).sum() == 4 * length * (length + 1) // 2
        out, _ = block_sparse_prefill(query, key, value, selection, scale=0.3, softcap=softcap, backend="gather")
        for head in range(4):
            for row in range(length):
                scores = 0.3 * (key[head // 2, : row + 1].double() @ query[head, row].double())
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                expected = scores.softmax(0) @ value[head // 2, : row + 1].double()
                assert torch.allclose(out[head, row].double(), expected, atol=1e-5), (method.name, head, row)


@pytest.mark.parametrize("method", ["vertical_slash", "block_sparse"])
@pytest.mark.parametrize("length", [33, 64, 97])
def test_prefill_budgets_just_below_everything(rng: random.Random, method: str, length: int) -> None:
    blocks = -(-length // 16)
    typed = {"verticals": length - 1, "slashes": length - 1} if method == "vertical_slash" else {"top_k": blocks - 1}
    seen, _ = check_score(
        rng, model_of(rng), length, 5, knobs(method, **{f"{method}.{k}": v for k, v in typed.items()})
    )
    assert len(seen.prefill) == 2


# --- 2. eviction -----------------------------------------------------------------------------------------------------


@pytest.fixture
def few_objects() -> Iterator[None]:
    """What lives already is nobody's who looks for new objects, and looking for them is fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("way", ["scored", "generated"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("method", ["snapkv", "ada_snapkv"])
def test_evicted_memory_is_given_back(rng: random.Random, method: str, name: str, way: str) -> None:
    """After the prefill no dense tensor of the prompt is alive, and what is held is what is kept and the reserve.

    While an answer is generated the same is true of every step.
    """
    length, tokens, model = 211, 6, model_of(rng, name)
    lm, dense, after, stepped = sparse(model, **knobs(method)), [], [], []
    layers = full_layers(model)
    config = model.config
    kv_heads, dim = config.num_key_value_heads, getattr(config, "head_dim", config.hidden_size // 4)
    update = CacheLayer.update

    def noted(self: CacheLayer, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = update(self, key_states, value_states, *args, **kwargs)
        if key_states.shape[2] == length:
            dense.extend(weakref.ref(states) for states in (*out, *self._flat[:2]))
        return out

    def alive_but(known: list[Tensor]) -> list[tuple[int, ...]]:
        """Shapes of what could hold all keys or values of the prompt, beside these."""
        gc.collect()
        places = {states.untyped_storage().data_ptr() for states in known}
        return [
            tuple(tensor.shape)
            for tensor in gc.get_objects()
            if type(tensor) is Tensor and tensor.dim() > 1 and tensor.shape[-1] == dim
            and tensor.untyped_storage().nbytes() >= length * kv_heads * dim * 4
            and tensor.untyped_storage().data_ptr() not in places
        ]  # fmt: skip

    def size_of(tensors: list[Tensor]) -> int:
        return sum(
            {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values()
        )

    def inspect(module: torch.nn.Module, args: Any, output: Any) -> None:
        decoder, cache = lm.runtime.decoder, lm.runtime.cache
        if decoder is not None:
            pools = [decoder.layers[index].pool for index in layers]
            sizes = [size_of([pool.keys, pool.values]) for pool in pools]
            stepped.append((alive_but([]), sizes))
        if after:
            return
        # Window layers are transformers' own; theirs are views of the whole prompt until the next token.
        others = [layer for index, layer in enumerate(cache.layers) if index not in layers]
        alive = alive_but([states for layer in others for states in (layer.keys, layer.values)])
        sizes = {}
        for index in layers:
            fields = vars(cache.layers[index])
            held, pool = fields["sequences"], fields["pool"]
            tensors = [value for holder in (fields, vars(held), vars(pool), pool.tensors) for value in holder.values()
                       if isinstance(value, Tensor)]  # fmt: skip
            tables = [tensor for tensor in tensors if not tensor.is_floating_point()]
            assert {id(table) for table in tables} == {id(held.starts), id(held.lengths)}
            assert all(tensor.numel() == kv_heads for tensor in tables)
            sizes[index] = size_of([tensor for tensor in tensors if tensor.is_floating_point()])
        logical = [cache.layers[index].get_seq_length() for index in layers]
        after.append((alive, sizes, cache.storage_bytes(), logical))

    with pytest.MonkeyPatch.context() as patch, recording(lm) as seen:
        patch.setattr(CacheLayer, "update", noted)
        hook = lm.model.register_forward_hook(inspect)
        if way == "scored":
            (found,) = score(lm, [(text(rng, length), answer(rng, tokens))])
        else:
            (found,) = generate(lm, [text(rng, length)], max_gen_toks=tokens)
        hook.remove()
    ((alive, sizes, counted, logical),) = after
    assert len(dense) == 4 * len(layers) and not any(ref() is not None for ref in dense)
    assert not alive, "dense keys or values of the prompt are still alive"
    assert logical == [length] * len(layers)
    steps = [tokens - 1] if way == "scored" else [1] * (tokens - 1)
    for index in layers:
        kept = seen.eviction[index].counts.tolist()
        assert sum(kept) == seen.eviction[index].total == kv_heads * 30
        since = np.cumsum([0, *steps]).tolist()
        assert seen.lengths[index] == [[count + more for count in kept] for more in since]
        assert sizes[index] == (sum(kept) + kv_heads * tokens) * 2 * dim * 4
    assert counted == sum(sizes.values()) < 2 * length * kv_heads * dim * 4 * len(layers) / 3
    assert found.stats["decode"]["kv_memory_fraction"] == pytest.approx(30 / length)
    assert len(stepped) == (0 if way == "scored" else tokens - 1)
    for alive, held in stepped:
        assert not alive, "dense keys or values of the prompt are alive while an answer is decoded"
        assert held == list(sizes.values())


@pytest.mark.parametrize("method", ["snapkv", "ada_snapkv"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_scores_after_eviction_equal_masks(rng: random.Random, method: str, name: str) -> None:
    for length, options in ((90, knobs(method)), (133, {"method": method, "sparsity": 0.7, "backend": "gather"})):
        seen, _ = check_score(rng, model_of(rng, name), length, 12, options)
        assert seen.eviction


def test_ada_snapkv_keeps_different_numbers_per_head(rng: random.Random) -> None:
    model = model_of(rng, num_attention_heads=4, num_key_value_heads=4)
    seen, _ = check_score(rng, model, 150, 8, knobs("ada_snapkv", **{"ada_snapkv.floor": 0}))
    counts = [selection.counts.tolist() for selection in seen.eviction.values()]
    assert any(len(set(layer)) > 1 for layer in counts) and all(sum(layer) == 4 * 30 for layer in counts)


def generated(
    rng: random.Random,
    model: PreTrainedModel,
    length: int,
    tokens: int,
    options: dict[str, Any],
    reserve: int | None = None,
) -> tuple[Seen, Any]:
    """Record the greedy generation of `tokens` tokens after a random prompt.

    With a `reserve` there is room for so many tokens at first, and storage grows by 50.
    """
    lm = sparse(copy.deepcopy(model), **options)
    grow, growths = decoding.Decoder._grow, []
    with pytest.MonkeyPatch.context() as patch, recording(lm) as seen:
        if reserve is not None:
            patch.setattr("lm_eval_sparse.model.decoding.RESERVE", reserve)
            patch.setattr(decoding, "LEAST_GROWTH", 50)
        patch.setattr(decoding.Decoder, "_grow", lambda self: (grow(self), growths.append(1)))
        (found,) = generate(lm, [text(rng, length)], max_gen_toks=tokens)
    assert len(seen.tokens) == length + tokens - 1
    assert lm.report()["phases"]["decode"]["loops"] == {"eager": tokens - 1}
    assert len(growths) == (0 if reserve is None else -(-(tokens - 1 - reserve) // 50))
    return seen, found


@pytest.mark.parametrize("method", ["snapkv", "ada_snapkv", "snapkv+quest", "ada_snapkv+quest"])
def test_long_generation_with_capacity_just_below_the_length(rng: random.Random, method: str) -> None:
    model, length = model_of(rng), 61
    options = knobs(method, **{f"{method.split('+')[0]}.capacity": length - 1})
    seen, _ = generated(rng, model, length, 45, options)
    assert all(sum(selection.counts) == 2 * (length - 1) for selection in seen.eviction.values())
    check(oracle_of(model), seen, length, quest_of(options))


@pytest.mark.parametrize("capacity", [61, 62, 10**6])
@pytest.mark.parametrize("method", ["snapkv", "ada_snapkv"])
def test_long_generation_with_room_for_everything_is_dense(rng: random.Random, method: str, capacity: int) -> None:
    model, prompt = model_of(rng), text(rng, 61)
    own = oracle_of(model)
    lm = sparse(model, **knobs(method, **{f"{method}.capacity": capacity}))
    (found,) = generate(lm, [prompt], max_gen_toks=45)
    assert found == eager_text(own, prompt, 45)
    assert found.stats["eviction"]["calls"] == {"fallback": 2}


@pytest.mark.parametrize("reserve", [0, 3])
@pytest.mark.parametrize("method", ["snapkv", "ada_snapkv+quest", "quest"])
def test_an_answer_that_outgrows_its_reserve(rng: random.Random, method: str, reserve: int) -> None:
    """Three growths of storage, and pages beyond those that there was room for."""
    model, options = model_of(rng, num_hidden_layers=1), knobs(method)
    state = rng.getstate()
    seen, small = generated(rng, model, 75, 150, options, reserve)
    check(oracle_of(model), seen, 75, quest_of(options))
    rng.setstate(state)
    again, roomy = generated(rng, model, 75, 150, options)
    assert small == roomy and plain(small.stats) == plain(roomy.stats)
    assert all(torch.equal(one, other) for one, other in zip(seen.logits, again.logits, strict=True))


@pytest.mark.parametrize("reserve", [0, 3])
@pytest.mark.parametrize("method", ["snapkv", "ada_snapkv+quest", "quest"])
def test_a_cache_that_outgrows_its_reserve(rng: random.Random, method: str, reserve: int) -> None:
    """As beams and scored answers fill it: two growths of ragged storage, and pages beyond those that had room."""
    lm = sparse(model_of(rng, num_hidden_layers=1), **knobs(method))
    prompt, tokens = (TOKENIZER(made(rng, size)).input_ids for made, size in ((text, 75), (answer, 150)))
    roomy, counted = step_by_step(lm, prompt, tokens, [1] * 150)
    small, counts = step_by_step(lm, prompt, tokens, [1] * 150, reserve)
    assert torch.equal(small, roomy) and counts.figures() == counted.figures()
    together, counts = step_by_step(lm, prompt, tokens, [150], reserve)
    assert torch.allclose(together, roomy, atol=CLOSE) and counts.figures() == counted.figures()


# --- 3. decode -------------------------------------------------------------------------------------------------------

DECODING: dict[str, dict[str, Any]] = {
    "quest": knobs("quest"),
    "quest, own pages": knobs("quest", **{"quest.share_pages": False}),
    "quest, pages of 16": knobs("quest", **{"quest.page_size": 16, "quest.budget": 32}),
    "quest, sparsity": {"method": "quest", "sparsity": 0.6, "quest.page_size": 8, "backend": "gather"},
    "quest, nothing but the current page": {"method": "quest", "sparsity": 0.99, "backend": "gather"},
    "snapkv+quest": knobs("snapkv+quest"),
    "snapkv+quest, own pages": knobs("snapkv+quest", **{"quest.share_pages": False}),
    "ada_snapkv+quest": knobs("ada_snapkv+quest", **{"ada_snapkv.floor": 0.1}),
    "ada_snapkv+quest, own pages": knobs("ada_snapkv+quest", **{"quest.share_pages": False}),
    "ada_snapkv+quest, sparsity": {
        "method": "ada_snapkv+quest", "kv_sparsity": 0.5, "decode_sparsity": 0.8, "quest.page_size": 8,
        "backend": "gather",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", DECODING)
def test_decoded_logits_equal_brute_force_pages(rng: random.Random, case: str) -> None:
    options = DECODING[case]
    for name, length in (("llama", rng.randrange(90, 150)), ("gemma2", 96)):
        model = model_of(rng, name)
        seen, _ = check_score(rng, model, length, rng.randrange(18, 25), options)
        assert seen.decode
        seen, _ = generated(rng, model, length, 12, options)
        sparsity = options.get("decode_sparsity", options.get("sparsity"))
        check(oracle_of(model), seen, length, quest_of(options), sparsity)


@torch.no_grad()
def step_by_step(
    lm: SparseHFLM, prompt: list[int], tokens: list[int], widths: list[int], reserve: int | None = None
) -> tuple[Tensor, RowCounts]:
    """Logits after the prompt, feeding `tokens` in pieces of these widths through one cache."""
    counts = RowCounts()
    cache = lm.runtime.new_cache(lm.model.config, reserve=len(tokens) if reserve is None else reserve)
    with lm.runtime.running(counts, cache, len(prompt)):
        logits = [lm.forward(torch.tensor([prompt]), cache=cache, keep=1)]
        for width in widths:
            piece, tokens = tokens[:width], tokens[width:]
            logits.append(lm.forward(torch.tensor([piece]), cache=cache))
    assert not tokens
    return torch.cat(logits, 1)[0], counts


@pytest.mark.parametrize("case", DECODING)
def test_one_pass_equals_step_by_step(rng: random.Random, case: str) -> None:
    lm = sparse(model_of(rng), **DECODING[case])
    prompt, tokens = (TOKENIZER(made(rng, size)).input_ids for made, size in ((text, 101), (answer, 21)))
    together, counted = step_by_step(lm, prompt, tokens, [21])
    for widths in ([1] * 21, [1, 7, 1, 12]):
        logits, counts = step_by_step(lm, prompt, tokens, widths)
        assert torch.allclose(logits, together, atol=CLOSE)
        for phase in ("prefill", "eviction", "decode"):
            mine, theirs = counts.phase(phase).layers, counted.phase(phase).layers
            assert mine.keys() == theirs.keys()
            assert all(np.array_equal(mine[layer], theirs[layer]) for layer in mine), phase
        assert counts.figures() == counted.figures()
        assert counts.phase("decode").calls == {"sparse": 2 * len(widths)}


def test_one_pass_that_only_begins_covered_measures_as_step_by_step(rng: random.Random) -> None:
    """The budget takes all keys of the first new tokens, but not of the later ones."""
    lm = sparse(model_of(rng), **knobs("quest", **{"quest.budget": 48}))
    prompt, tokens = (TOKENIZER(made(rng, size)).input_ids for made, size in ((text, 44), (answer, 21)))
    together, counted = step_by_step(lm, prompt, tokens, [21])
    logits, counts = step_by_step(lm, prompt, tokens, [1] * 21)
    assert torch.allclose(logits, together, atol=CLOSE)
    for layer, mine in counts.phase("decode").layers.items():
        assert np.array_equal(mine[:3], counted.phase("decode").layers[layer][:3]), "keys read differ"
    assert counts.figures() == counted.figures()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("case", ["quest", "ada_snapkv+quest", "snapkv+quest, own pages"])
def test_continuations_of_one_context_equal_each_alone(rng: random.Random, case: str, batch_size: int) -> None:
    model = model_of(rng)
    contexts = [text(rng, length) for length in (90, 117, 64)]
    pairs = [(context, answer(rng, tokens)) for context in contexts for tokens in (9, 1, 14, 4)]
    lm = sparse(model, **DECODING[case], batch_size=batch_size)
    with recording(lm) as seen:
        together = score(lm, pairs)
    shared = seen.counts  # longest context first
    alone: dict[str, list[RowCounts]] = defaultdict(list)
    lone = sparse(model, **DECODING[case])
    for pair, found in zip(pairs, together, strict=True):
        with recording(lone) as seen:
            (expected,) = score(lone, [pair])
        assert found[0] == pytest.approx(expected[0], abs=CLOSE) and found[1] == expected[1]
        alone[pair[0]].append(seen.counts[0])
    for counts, context in zip(shared, sorted(contexts, key=len, reverse=True), strict=True):
        for layer, table in counts.phase("decode").layers.items():
            parts = [one.phase("decode").layers[layer] for one in alone[context] if one.phase("decode").layers]
            assert len(parts) == 3 and np.array_equal(table, sum(parts))
        for phase in ("prefill", "eviction"):
            for layer, table in counts.phase(phase).layers.items():
                assert all(np.array_equal(table, one.phase(phase).layers[layer]) for one in alone[context])


# --- 4. composition --------------------------------------------------------------------------------------------------

HALVES = {"sparsity": 0.5, "decode_sparsity": 0.7, "backend": "gather"}
BATCHES: list[tuple[str, str]] = [
    *(("llama", method) for method in (*SPARSE_METHODS, *COMBINATIONS)),
    *((name, "flexprefill+snapkv+quest") for name in ("qwen2", "qwen3", "gemma2", "gemma3", "mistral_full", "phi3")),
    *((name, "vertical_slash+ada_snapkv+quest") for name in ("qwen3", "gemma2", "gemma3", "phi3")),
]


def batch_options(method: str, native: bool) -> dict[str, Any]:
    if native:
        return knobs(method)
    options = {"method": method, **HALVES}
    if "quest" not in method:
        del options["decode_sparsity"]
    return options


@pytest.mark.parametrize(("name", "method"), BATCHES)
def test_neighbours_and_order_change_nothing(rng: random.Random, name: str, method: str) -> None:
    """Alone, in a batch of five, and in reversed order: the same answers and the same figures, to the bit."""
    model = model_of(rng, name)
    prompts = [text(rng, length) for length in (1, 120, 3, rng.randrange(40, 90), 17)]
    pairs = [(p, answer(rng, n)) for p, n in zip(prompts, (12, 1, 2, 9, 1), strict=True)]
    pairs += [(prompts[1], answer(rng, 7)), (prompts[2], answer(rng, 1)), (prompts[3], answer(rng, 3))]
    options = batch_options(method, native=rng.random() < 0.5)

    def run(batch_size: int, step: int) -> tuple[list[str], list[Any]]:
        lm = sparse(model, **options, batch_size=batch_size)
        texts = generate(lm, prompts[::step], max_gen_toks=8, until=["g", "k", "b"])
        scores = score(lm, pairs[::step])
        lm.check_it_ran()
        touched = {layer for layer, reason in lm.runtime.layers.items() if reason is None}
        assert touched == set(full_layers(model))
        return texts[::step], scores[::step]

    texts, scores = run(1, 1)
    for batch_size, step in ((5, 1), (5, -1), (2, -1)):
        others, rescored = run(batch_size, step)
        assert others == texts, options
        assert rescored == scores, options
        for one, other in zip([*texts, *scores], [*others, *rescored], strict=True):
            assert plain(one.stats) == plain(other.stats), options


GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("qwen2", "qwen3", "gemma2", "gemma3", "mistral_full", "phi3")},
    **{f"{dim} dimensions": ("qwen3", {"head_dim": dim, "num_hidden_layers": 1}) for dim in (64, 80, 96, 128, 256)},
    "4 heads, 1 kv": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "6 heads, 2 kv": ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "7 heads, 7 kv": ("llama", {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 7}),
    "8 heads, 4 kv": ("gemma2", {"num_attention_heads": 8, "num_key_value_heads": 4}),
}


@pytest.mark.parametrize("method", ["flexprefill+snapkv+quest", "vertical_slash+ada_snapkv+quest"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_composed_logits_equal_masks(rng: random.Random, geometry: str, method: str) -> None:
    name, sizes = GEOMETRIES[geometry]
    seen, _ = check_score(rng, model_of(rng, name, **sizes), rng.randrange(80, 130), 11, knobs(method))
    assert seen.prefill and seen.eviction and seen.decode


@pytest.mark.parametrize("method", ["block_sparse+quest", "flexprefill_vs+ada_snapkv", "vertical_slash+snapkv"])
def test_composed_pairs_equal_masks(rng: random.Random, method: str) -> None:
    seen, _ = check_score(rng, model_of(rng), rng.randrange(80, 130), 11, knobs(method))
    assert seen.prefill


def test_windows_on_all_layers_are_refused_and_named(rng: random.Random) -> None:
    with pytest.raises(UserError, match="sliding window of 40"):
        sparse(model_of(rng, "mistral"), **knobs("flexprefill+snapkv+quest"))


@pytest.mark.parametrize("method", ["flexprefill", "snapkv", "quest", "flexprefill+ada_snapkv+quest"])
@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_a_window_that_hides_nothing_is_no_window(rng: random.Random, name: str, method: str) -> None:
    """As in Phi-3's models of 128K: the window is wider than the model is long, so all layers are eligible."""
    model, context, continuation = model_of(rng, name, sliding_window=4096), text(rng, 90), answer(rng, 8)
    lm = sparse(copy.deepcopy(model), **knobs(method))
    score(lm, [(context, continuation)])
    lm.check_it_ran()
    seen, _ = check_score(rng, model, 90, 8, knobs(method))
    ran = {"prefill": seen.prefill, "eviction": seen.eviction, "decode": seen.decode}
    assert all(ran[METHODS[part].phase] for part in method.split("+"))


@pytest.mark.parametrize("method", ["quest", "ada_snapkv+quest", "flexprefill+snapkv"])
def test_answer_text_before_a_slot_is_decoded(rng: random.Random, method: str) -> None:
    """A `SharedPrompt`: the prompt ends where it says, and all that follows is decoded."""
    model, options = model_of(rng), knobs(method)
    prompt, given, continuation = text(rng, 83), answer(rng, 9), answer(rng, 5)
    seen, found = scored(model, SharedPrompt(prompt + given, len(prompt)), continuation, options)
    check(oracle_of(model), seen, 83, quest_of(options))
    assert len(seen.tokens) == 83 + 9 + 4
    whole, _ = scored(model, prompt, given + continuation, options)
    assert torch.allclose(whole.logits[1], seen.logits[1], atol=CLOSE)
    ids = TOKENIZER(continuation).input_ids
    logprobs = seen.logits[1][0, 8:].log_softmax(-1)
    assert found[0] == pytest.approx(sum(float(row[i]) for row, i in zip(logprobs, ids, strict=True)), abs=CLOSE)


@pytest.mark.parametrize("method", ["snapkv", "quest", "ada_snapkv+quest"])
def test_answers_scored_in_several_passes(rng: random.Random, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(rng)
    pairs = [(text(rng, length), answer(rng, tokens)) for length, tokens in ((90, 23), (51, 6), (77, 1), (10, 11))]
    expected = score(sparse(model, **knobs(method)), pairs)
    monkeypatch.setattr("lm_eval_sparse.model.scoring.SCORE_CHUNK", 5)
    for batch_size in (1, 4):
        found = score(sparse(model, **knobs(method), batch_size=batch_size), pairs)
        assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=CLOSE)
        for one, other in zip(found, expected, strict=True):
            for figure in ("executed_sparsity", "kv_memory_fraction"):
                assert one.stats["decode"][figure] == other.stats["decode"][figure]


@torch.no_grad()
def test_a_stop_string_that_is_a_special_token_cuts_in_every_batch(rng: random.Random) -> None:
    """lm-eval looks for it among special tokens, too, but they are no part of the text that is cut."""
    model, prompts = model_of(rng), [text(rng, 70), text(rng, 55)]
    lm = sparse(model, **knobs("snapkv"))
    with recording(lm) as seen:
        generate(lm, prompts[:1], max_gen_toks=8)
    head = model.get_output_embeddings().weight
    head[3] = 1.01 * head[seen.tokens[72]]  # now "<|user|>" comes third, or earlier
    alone = generate(sparse(model, **knobs("snapkv")), prompts, max_gen_toks=8, until=["<|user|>"])
    together = generate(sparse(model, **knobs("snapkv"), batch_size=2), prompts, max_gen_toks=8, until=["<|user|>"])
    assert together == alone
    assert plain(together[0].stats) == plain(alone[0].stats)


# --- 5. chunked prefill ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_quest_after_a_prefill_in_chunks(rng: random.Random, name: str, batch_size: int) -> None:
    lm = sparse(model_of(rng, name), **knobs("quest"), batch_size=batch_size)
    prompts = [text(rng, length) for length in (100, 64, 9, 65)]
    whole = generate(lm, prompts, max_gen_toks=10)
    for size in (32, 17, 100):
        chunked = generate(lm, prompts, max_gen_toks=10, prefill_chunk_size=size)
        assert chunked == whole
        for one, other in zip(whole, chunked, strict=True):
            first, second = (copy.deepcopy(plain(found.stats)) for found in (one, other))
            for stats in (first, second):  # there are more calls, of course
                del stats["prefill"]["calls"], stats["prefill"]["backends"]
            assert first == second


@pytest.mark.parametrize("method", [m for m in (*SPARSE_METHODS, *COMBINATIONS) if m != "quest"])
def test_methods_that_need_the_whole_prompt_refuse_chunks(rng: random.Random, method: str) -> None:
    lm = sparse(model_of(rng, num_hidden_layers=1), **knobs(method))
    with pytest.raises(UserError, match="prefill_chunk_size=32.*whole prompt") as raised:
        generate(lm, [text(rng, 70)], prefill_chunk_size=32)
    for name in method.split("+"):
        assert (name in str(raised.value)) == (METHODS[name].phase != "decode")


# --- 6. lengths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*SPARSE_METHODS, *COMBINATIONS])
def test_lengths_around_every_knob(rng: random.Random, method: str) -> None:
    """One token, the window, the capacity, a page and a block, and one less and more than each."""
    model, options = model_of(rng, num_hidden_layers=1), knobs(method)
    lengths = {1, 2, *(edge + step for edge in (8, 12, 16, 30, 32) for step in (-1, 0, 1))}
    window = max((value for name, value in options.items() if name.endswith(".window")), default=0)
    for length in sorted(lengths):
        if length < window:
            with pytest.raises(UserError, match=f"window=.*no prompt has so many.* the longest {length}\\)"):
                check_score(rng, model, length, 4, options)
            continue
        seen, brute = check_score(rng, model, length, 4, options)
        for selection in seen.eviction.values():
            assert int(selection.counts.min()) >= 1
        for selection in seen.prefill.values():
            assert int(selection.counts.min()) >= 1
        for chosen in seen.decode.values():
            for selection in chosen.values():
                assert int(selection.counts.min()) >= 1
        assert all(int(read.min()) >= 1 for read in brute.read.values())
        if "snapkv" in method:
            assert bool(seen.eviction) == (length > 30)


@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("method", ["snapkv", "ada_snapkv", "snapkv+quest", "ada_snapkv+quest"])
def test_short_prompts_with_a_sparsity_keep_something(rng: random.Random, method: str, sparsity: float) -> None:
    model = model_of(rng, num_hidden_layers=1)
    for length in (1, 2, 3, 5, 10, 21, 40):
        seen, brute = check_score(rng, model, length, 3, {"method": method, "sparsity": sparsity, "backend": "gather"})
        for kept in brute.kept.values():
            assert min(kept) >= 1
            wanted = max(1, round((1 - sparsity) * length)) * len(kept)
            assert sum(kept) == (wanted if seen.eviction else length * len(kept))


@pytest.mark.parametrize(
    ("method", "length"),
    [
        ("flexprefill+snapkv+quest", 1000),
        ("vertical_slash+ada_snapkv+quest", 1000),
        ("flexprefill+ada_snapkv+quest", 4097),
    ],
)
def test_long_prompts_equal_masks_and_keep_the_promise(rng: random.Random, method: str, length: int) -> None:
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1, "hidden_size": 32}
    model = model_of(rng, max_position_embeddings=8192, **sizes)
    options = {"method": method, "sparsity": 0.8, "decode_sparsity": 0.9, "backend": "gather"}
    context, continuation, own = text(rng, length), answer(rng, 6), oracle_of(model)
    seen, found = scored(model, context, continuation, options)
    check(own, seen, length, Quest(), 0.9)
    measured = found.stats["sparsities"]
    tolerance = 0.01 if length >= 4096 else 0.05
    assert measured["prefill_sparsity"] == pytest.approx(0.8, abs=tolerance)
    assert measured["kv_sparsity"] == pytest.approx(0.8, abs=0.001)
    assert measured["decode_sparsity"] == pytest.approx(0.9, abs=0.01)


# --- 7. beams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [2, 3])
@pytest.mark.parametrize("method", ["snapkv", "ada_snapkv", "quest", "snapkv+quest", "ada_snapkv+quest"])
def test_beams_equal_beam_search_under_masks(rng: random.Random, method: str, beams: int) -> None:
    """transformers' beam search without a cache, each step under the masks of what the prompt kept."""
    model, options, tokens = model_of(rng), knobs(method), 14
    own, prompts = oracle_of(model), [text(rng, length) for length in (70, 99)]
    expected = []
    for prompt in prompts:
        alone, _ = scored(model, prompt, answer(rng, 2), options)
        alone.decode.clear()
        length = len(TOKENIZER(prompt).input_ids)
        policy = FreshPages(alone, length, quest_of(options))
        expected.append(eager_text(own, prompt, tokens, policy, num_beams=beams))
    for batch_size in (1, 2):
        lm = sparse(copy.deepcopy(model), **options, batch_size=batch_size)
        found = generate(lm, prompts, max_gen_toks=tokens, num_beams=beams)
        assert found == expected
        assert all(one.stats["decode"]["executed_sparsity"] > 0 for one in found)
        lm.check_it_ran()
        report = lm.report()["phases"]["decode"]
        assert report["loops"] == {"transformers": len(prompts) * (tokens - 1)}
        assert report["loop_reasons"] == {"generation by beam_search": len(prompts) * (tokens - 1)}


class FreshPages(Brute):
    """As `Brute`, with pages picked by brute force alone."""

    def _pages(
        self, layer: int, kv_head: int, position: int, query: Tensor, key: Tensor, keys: Tensor
    ) -> list[set[int]]:
        size, before = self.quest.page_size, (len(keys) - 1) // self.quest.page_size
        sides = []
        for page in range(before):
            inside = key[keys[page * size : (page + 1) * size]]
            sides.append(torch.maximum(query * inside.amin(0), query * inside.amax(0)).sum(-1))
        bounds = torch.stack(sides, -1).sum(0)
        assert self.quest.share_pages and self.sparsity is None
        best = sorted(range(before), key=lambda p: (-float(bounds[p]), -p))[: self.quest.budget // size]
        return [{*best, before}] * len(query)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("method", ["snapkv", "ada_snapkv", "quest", "ada_snapkv+quest"])
def test_full_budget_beams_equal_dense_beams(
    rng: random.Random, method: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forced:
        for cls in METHODS.values():
            monkeypatch.setattr(cls, "too_short", lambda self, sparsity, length: None)
    model, prompts = model_of(rng), [text(rng, length) for length in (40, 1, 73)]
    own = oracle_of(model)
    expected = [eager_text(own, prompt, 12, num_beams=3) for prompt in prompts]
    for batch_size in (1, 3):
        lm = sparse(copy.deepcopy(model), **covering(method), batch_size=batch_size)
        assert generate(lm, prompts, max_gen_toks=12, num_beams=3) == expected


# --- 8. proof that it ran --------------------------------------------------------------------------------------------


def test_decoding_that_never_happened_fails_and_says_why(rng: random.Random) -> None:
    model = model_of(rng, num_hidden_layers=1)
    lm = sparse(model, **knobs("quest"))
    score(lm, [(text(rng, 90), answer(rng, 1)), (text(rng, 91), answer(rng, 1))])
    with pytest.raises(UserError, match="quest never ran.*answers of one token come from the prefill"):
        lm.check_it_ran()
    score(lm, [(text(rng, 90), answer(rng, 2))])
    lm.check_it_ran()
    for method in ("snapkv+quest", "flexprefill+ada_snapkv+quest"):
        lm = sparse(model, **knobs(method))
        score(lm, [(text(rng, 90), answer(rng, 1))])
        with pytest.raises(UserError, match="quest never ran.*one token"):
            lm.check_it_ran()


@pytest.mark.parametrize("method", ["snapkv", "ada_snapkv", "quest", "flexprefill+snapkv", "vertical_slash+quest"])
def test_rolling_has_no_eviction_and_no_decoding(rng: random.Random, method: str) -> None:
    lm = sparse(model_of(rng, num_hidden_layers=1), **knobs(method))
    lm.loglikelihood_rolling([request("loglikelihood_rolling", text(rng, 120))], disable_tqdm=True)
    name = method.split("+")[-1]
    with pytest.raises(UserError, match=f"{name} never ran.*perplexity tasks run each window as one prefill"):
        lm.check_it_ran()


@pytest.mark.parametrize("method", ["snapkv", "ada_snapkv"])
def test_prompts_within_the_capacity_fail_and_say_why(rng: random.Random, method: str) -> None:
    lm = sparse(model_of(rng, num_hidden_layers=1), **knobs(method))
    score(lm, [(text(rng, length), answer(rng, 3)) for length in (30, 12, 1)])
    with pytest.raises(UserError, match=f"{method} never ran.*fits into the capacity of 30"):
        lm.check_it_ran()
    score(lm, [(text(rng, 31), answer(rng, 3))])
    lm.check_it_ran()


def test_pages_that_cover_the_cache_fail_and_say_why(rng: random.Random) -> None:
    lm = sparse(model_of(rng, num_hidden_layers=1), **knobs("quest"))
    # 16 keys and the current page of 8: 24 keys are all there is.
    (found,) = score(lm, [(text(rng, 17), answer(rng, 8))])
    assert found.stats["decode"]["executed_sparsity"] == 0
    with pytest.raises(UserError, match="quest never ran.*covers the whole cache"):
        lm.check_it_ran()


# --- 9. determinism --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["flexprefill+snapkv+quest", "vertical_slash+ada_snapkv+quest", "block_sparse+quest"]
)
def test_two_runs_are_equal(rng: random.Random, method: str) -> None:
    model = model_of(rng, "gemma2")
    prompts = [text(rng, length) for length in (100, 61, 2)]
    pairs = [(prompt, answer(rng, 6)) for prompt in prompts]
    runs = []
    for _ in range(2):
        lm = sparse(copy.deepcopy(model), **knobs(method), batch_size=2, stats="full")
        texts, scores = generate(lm, prompts, max_gen_toks=10), score(lm, pairs)
        figures = [plain(one.stats) for one in (*texts, *scores)]
        runs.append((texts, [tuple(one) for one in scores], figures, lm.report()["phases"], lm.detail_report()))
    assert runs[0] == runs[1]
