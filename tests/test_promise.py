"""`sparsity=s` is kept where that is hard (ragged caches, coarse knobs, few heads), and refused where it cannot be."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from lm_eval_sparse import patches
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.kernels.index.pages import PageBudget, budget_pages
from lm_eval_sparse.kernels.index.pages.naive import _fill
from lm_eval_sparse.kernels.types import Keep, causal_pairs
from lm_eval_sparse.methods.eviction.ada_snapkv import AdaSnapKV
from lm_eval_sparse.methods.eviction.snapkv import SnapKV
from lm_eval_sparse.methods.prefill.block_sparse import BlockSparse
from lm_eval_sparse.methods.prefill.flexprefill import FlexPrefill
from lm_eval_sparse.methods.prefill.flexprefill_vs import FlexPrefillVS
from lm_eval_sparse.methods.prefill.vertical_slash import VerticalSlash
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.testing import select

patches.install()


@pytest.fixture
def source() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


def request(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("t", 0, 1))


def long_model(**options: Any) -> Any:
    return tiny.family("llama", num_hidden_layers=1, max_position_embeddings=9000, **options)


def sparse(model: Any, **options: Any) -> SparseHFLM:
    options = {"backend": "gather", "max_length": 9000, **options}
    return SparseHFLM(pretrained=model, tokenizer=tiny.tiny_tokenizer(), **options)


# --- what is shared among heads of different lengths ------------------------------------------------------------------


def shared_out(total: int, held: list[int]) -> list[int]:
    """One page after the other, to whoever has the fewest and could take more: the largest first, then the first."""
    given = [0] * len(held)
    for _ in range(min(total, sum(held))):
        hungry = [head for head, there in enumerate(held) if given[head] < there]
        given[min(hungry, key=lambda head: (given[head], -held[head], head))] += 1
    return given


def test_fill_shares_evenly_and_gives_no_more_than_there_is(source: random.Random) -> None:
    for _ in range(300):
        heads = source.randrange(1, 7)
        held = [source.randrange(0, 40) for _ in range(heads)]
        total = source.randrange(0, 200)
        given = _fill(torch.tensor([[total]]), torch.tensor(held).reshape(1, heads, 1)).flatten().tolist()
        assert sum(given) == min(total, sum(held))
        assert all(0 <= mine <= there for mine, there in zip(given, held, strict=True))
        # Even: whoever could take more has no fewer than anyone else, but for one that does not divide.
        free = [mine for mine, there in zip(given, held, strict=True) if mine < there]
        assert not free or max(given) - min(free) <= 1
        assert given == shared_out(total, held)


def test_heads_of_a_row_share_what_one_of_them_cannot_read(source: random.Random) -> None:
    """The budget of several rows and tokens at once: each row is one of its own."""
    for _ in range(100):
        rows, heads, steps, size = (source.randrange(1, most) for most in (4, 5, 4, 20))
        keep = source.random()
        held = [[source.randrange(steps, 400) for _ in range(heads)] for _ in range(rows)]
        visible = torch.tensor(held).reshape(-1, 1) + torch.arange(1 - steps, 1)
        tokens = [max(own) + source.choice((0, 300)) for own in held]
        logical = torch.tensor(tokens).repeat_interleave(heads)[:, None] + torch.arange(1 - steps, 1)
        before, read = budget_pages(visible, logical, PageBudget(size, None, keep, heads))
        assert torch.equal(before, (visible - 1) // size)
        for row in range(rows):
            for step in range(steps):
                own = slice(row * heads, (row + 1) * heads)
                there, keys = before[own, step].tolist(), visible[own, step].tolist()
                wanted = [
                    max(0, round((keep * int(logical[own, step][0]) - (count - pages * size)) / size))
                    for pages, count in zip(there, keys, strict=True)
                ]
                fits = all(want <= pages for want, pages in zip(wanted, there, strict=True))
                assert read[own, step].tolist() == (wanted if fits else shared_out(sum(wanted), there))


@pytest.mark.parametrize(("kv", "decode"), [(0.5, 0.6), (0.8, 0.85), (0.5, 0.9)])
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_quest_over_ragged_heads_keeps_the_promise(floor: float, kv: float, decode: float) -> None:
    """Heads that hold fewer keys than their share leave it to the others of the layer."""
    lm = sparse(long_model(num_attention_heads=8, num_key_value_heads=4), method="ada_snapkv+quest", kv_sparsity=kv,
                decode_sparsity=decode, floor=floor, stats="full")  # fmt: skip
    prompt, answer = tiny.words(3, 4500), " " + tiny.words(4, 40)
    assert len(lm.tok_encode(prompt)) >= 4096
    (scored,) = lm.loglikelihood([request("loglikelihood", prompt, answer)], disable_tqdm=True)
    assert scored.stats["sparsities"]["kv_sparsity"] == pytest.approx(kv, abs=0.01)
    assert scored.stats["sparsities"]["decode_sparsity"] == pytest.approx(decode, abs=0.01)
    kept = lm.detail_report()["t"]["eviction"][0]["executed_sparsity"]
    assert max(kept) - min(kept) > 0.01, "the heads should hold different numbers of keys"


def test_a_decode_budget_that_eviction_leaves_whole_is_no_failure() -> None:
    """`sparsity=` for both phases: what is held is what may be read, short answers and long."""
    lm = sparse(long_model(), method="snapkv+quest", sparsity=0.9)
    pair = (tiny.words(5, 4500), " river stone cloud")
    (scored,) = lm.loglikelihood([request("loglikelihood", *pair)], disable_tqdm=True)
    lm.check_it_ran()
    assert scored.stats["sparsities"]["decode_sparsity"] == pytest.approx(0.9, abs=0.01)
    alone = sparse(long_model(), method="quest", budget=8000)
    alone.loglikelihood([request("loglikelihood", *pair)], disable_tqdm=True)
    with pytest.raises(UserError, match="quest never ran.*covers the whole cache"):
        alone.check_it_ran()


def test_eviction_that_changes_no_answer_is_no_result(caplog: pytest.LogCaptureFixture) -> None:
    """Answers of one token come from the prefill: alone they fail the run, beside others they are named."""
    prompt = tiny.words(8, 300)
    one, many = " apple", " river stone cloud"
    lm = sparse(tiny.family("llama"), method="snapkv", sparsity=0.5, max_length=2000)
    assert len(lm.tok_encode(one)) == 1
    lm.loglikelihood([request("loglikelihood", prompt, one)], disable_tqdm=True)
    with pytest.raises(UserError, match="snapkv could not change any answer.*no token was decoded"):
        lm.check_it_ran()
    other = Instance(request_type="loglikelihood", doc={}, arguments=(prompt, many), idx=0, metadata=("long", 0, 1))
    lm.loglikelihood([other], disable_tqdm=True)
    lm.check_it_ran()
    assert "snapkv could not change any answer of t," in caplog.text


@pytest.mark.parametrize(
    ("ids", "counts", "total", "message"),
    [
        ([[2, 1, 3]], [3], 3, "ascending"),
        ([[1, 1, 3]], [3], 3, "ascending"),
        ([[0, 1, 10]], [3], 3, "below the prompt's 10 tokens"),
        ([[-1, 1, 3]], [3], 3, "below the prompt's 10 tokens"),
        ([[0, 1, 2]], [0], 1, "keeps fewer than one token, or more than 3"),
        ([[0, 1, 2]], [4], 3, "keeps fewer than one token, or more than 3"),
        ([[0, 1, 2]], [2], 3, "do not add up to its total of 3 tokens"),
        ([[0, 1, 2]], [3], 0, "total is 0, expected 1 to 3 tokens"),
        ([[0, 1, 2]], [3], 4, "total is 4, expected 1 to 3 tokens"),
        ([list(range(12))], [12], 12, "total is 12, expected 1 to 10 tokens"),
        ([[0, 1, 2], [0, 1, 2]], [1, 2], 3, r"expected \(1, W\)"),
        ([[0, 1, 2]], [1, 2], 3, r"counts \(2,\) given, expected .* \(1,\)"),
    ],
)
def test_kept_tokens_of_a_new_method_are_checked(
    ids: list[list[int]], counts: list[int], total: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Keep(torch.tensor(ids), torch.tensor(counts), total).check(1, 10)
    # What stands behind the counts is undefined.
    kept = torch.tensor([[0, 4, 9, 99], [3, 0, -7, 3]])
    Keep(kept, torch.tensor([3, 1]), 4).check(2, 10)


# --- coarse knobs and few heads ---------------------------------------------------------------------------------------


def states(kind: str, heads: int, kv_heads: int, length: int) -> tuple[Tensor, Tensor]:
    query, key = torch.randn(heads, length, 16), torch.randn(kv_heads, length, 16)
    if kind == "constant":
        query, key = torch.ones_like(query), torch.ones_like(key)
    elif kind == "huge":
        query, key = 300 * query, 300 * key
    elif kind == "identical":
        query, key = query[:1].expand(heads, -1, -1), key[:1].expand(kv_heads, -1, -1)
    return query, key


@pytest.mark.parametrize("kind", ["random", "constant", "huge", "identical"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 1), (3, 3)])
@pytest.mark.parametrize("tile", ["auto", 16, 64, 128])
@pytest.mark.parametrize("cls", [VerticalSlash, FlexPrefillVS])
def test_tiles_that_are_typed(cls: Any, tile: Any, heads: int, kv_heads: int, kind: str, source: random.Random) -> None:
    query, key = states(kind, heads, kv_heads, 4097)
    for sparsity in (0.1, 0.5, 0.9):
        method = cls(tile=tile)
        if method.too_short(sparsity, 4097):
            continue
        layout = select(method, query, key, scale=0.25, softcap=None, sparsity=sparsity)
        layout.check(heads)
        density = float(layout.executed_pairs().sum()) / (heads * causal_pairs(4097))
        assert 1 - density == pytest.approx(sparsity, abs=0.01)


def test_a_block_that_is_too_coarse_is_refused() -> None:
    query, key = states("random", 1, 1, 4097)
    options: dict[str, Any] = {"scale": 0.25, "softcap": None, "sparsity": 0.5}
    with pytest.raises(UserError, match="block_size=128 is too coarse .* 4097 tokens with 1 query heads"):
        select(FlexPrefill(block_size=128), query, key, **options)
    layout = select(FlexPrefill(block_size=32), query, key, **options)
    assert 1 - float(layout.executed_pairs().sum()) / causal_pairs(4097) == pytest.approx(0.5, abs=0.01)


# --- what was typed is kept, or refused -------------------------------------------------------------------------------


def test_typed_floors_are_kept() -> None:
    assert SnapKV(local=100).knobs_for(0.95, 4096).local == 100
    # The paper's values are kept like any others when they are typed; only what was left out shrinks.
    assert SnapKV(local=128).knobs_for(0.95, 4096).local == 128
    assert VerticalSlash(near=64).knobs_for(0.95, 4096).near == 64
    assert SnapKV().knobs_for(0.95, 4096).local == 47
    assert VerticalSlash(near=96).knobs_for(0.9, 4096).near == 96
    assert VerticalSlash().knobs_for(0.95, 4096).near < 64
    assert SnapKV(local=1000).largest_sparsity(4096) == pytest.approx(1 - 1000 / 4096)
    assert "at most 0.756" in (SnapKV(local=1000).too_short(0.95, 4096) or "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "snapkv", "sparsity": 0.95, "local": 1000}, r"sparsity=0\.95 .*at 4\d+ .*type sparsity=0\.7"),
        ({"method": "ada_snapkv", "kv_sparsity": 0.95, "sinks": 3000}, r"^kv_sparsity=0\.95 .*kv_sparsity=0\.[23]"),
        ({"method": "vertical_slash", "sparsity": 0.95, "near": 2000}, r"sparsity=0\.95 .*vertical_slash at 4\d+ "),
        ({"method": "block_sparse", "prefill_sparsity": 0.99}, r"^prefill_sparsity=0\.99 .*prefill_sparsity=0\.98"),
        ({"method": "flexprefill_vs", "sparsity": 0.999}, r"sparsity=0\.999 .*flexprefill_vs at 4\d+ "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_out_of_reach_is_found_before_any_compute(
    kind: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest prompt could be run; the shorter one cannot, and nothing is."""
    lm = sparse(long_model(), **options)
    monkeypatch.setattr(lm.model, "forward", lambda *args, **kwargs: pytest.fail("the model was run"))
    prompts = [tiny.words(6, 8000), tiny.words(7, 4250)]
    last = " river" if kind == "loglikelihood" else {"until": [], "max_gen_toks": 4}
    with pytest.raises(UserError, match=message):
        getattr(lm, kind)([request(kind, prompt, last) for prompt in prompts], disable_tqdm=True)


def test_other_block_sizes_of_the_same_promise(source: random.Random) -> None:
    query, key = states("random", 2, 1, 4097)
    for block in (16, 32, 64, 128):
        layout = select(BlockSparse(block_size=block), query, key, scale=0.25, softcap=None, sparsity=0.8)
        density = float(layout.executed_pairs().sum()) / (2 * causal_pairs(4097))
        assert 1 - density == pytest.approx(0.8, abs=0.01)
    kept = select(AdaSnapKV(floor=1.0), query, key, scale=0.25, softcap=None, sparsity=0.8)
    assert kept.counts.tolist() == [kept.total] == [round(0.2 * 4097)]


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_return_sequences", "return_dict_in_generate", "prompt_lookup_num_tokens"])
def test_generation_that_gives_no_single_text_is_refused(name: str) -> None:
    lm = sparse(tiny.family("llama"), max_length=2000)
    with pytest.raises(UserError, match=f"{name}=2 is not accepted.*leave {name} out"):
        lm.generate_until([request("generate_until", "river", {"until": [], "max_gen_toks": 4, name: 2})], True)


def test_beams_with_stop_strings_do_not_feel_their_neighbours() -> None:
    prompts = [tiny.words(seed, count) for seed, count in ((1, 60), (2, 140), (3, 90))]
    options = {"until": ["e", "st"], "max_gen_toks": 12, "num_beams": 2}
    texts = []
    for batch_size in (1, 3):
        lm = sparse(tiny.family("llama"), method="snapkv+quest", sparsity=0.5, decode_sparsity=0.7, max_length=2000,
                    batch_size=batch_size)  # fmt: skip
        texts.append(lm.generate_until([request("generate_until", p, options) for p in prompts], disable_tqdm=True))
    assert texts[0] == texts[1]
    for one, other in zip(*texts, strict=True):
        assert one.stats["decode"] == other.stats["decode"]
