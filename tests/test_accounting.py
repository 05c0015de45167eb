"""The six figures of every phase: cases counted on paper, and dense masks of what was selected, pair by pair.

The definitions are those of docs/accounting.md. `requested` is what was typed; the other five are counted here a
second time from the recorded selections, without the counting functions of the package.

Long, since the recorder of what methods selected serves all cases that are counted anew.
"""

from __future__ import annotations

import json
import pickle
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from lm_eval.api.instance import Instance
from torch import Tensor

from lm_eval_sparse import patches
from lm_eval_sparse.kernels.types import Blocks
from lm_eval_sparse.methods import Call
from lm_eval_sparse.methods.decode.quest import Quest
from lm_eval_sparse.methods.eviction.snapkv import SnapKV
from lm_eval_sparse.methods.plan import parse
from lm_eval_sparse.methods.prefill.block_sparse import BlockSparse
from lm_eval_sparse.methods.prefill.flexprefill import FlexPrefill
from lm_eval_sparse.methods.prefill.flexprefill_vs import FlexPrefillVS
from lm_eval_sparse.methods.prefill.vertical_slash import Pattern, VerticalSlash
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.model.scoring import Scorer
from lm_eval_sparse.protocol import stats_of
from lm_eval_sparse.runtime.accounting import COVERED, Ledger, RowCounts, rows
from lm_eval_sparse.runtime.decoder import Decoder
from lm_eval_sparse.runtime.masks import FULL
from lm_eval_sparse.runtime.rows import Row
from lm_eval_sparse.runtime.session import Runtime

patches.install()

PHASES = ("prefill", "eviction", "decode")
FIGURES = (
    "selected_sparsity", "executed_sparsity", "bytes_read_fraction", "kv_memory_fraction", "estimator_flops_fraction"
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("LM_EVAL_SPARSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


# --- counted on paper ------------------------------------------------------------------------------------------------
# fp32 and 4 dimensions throughout: a key with its value is 2 * 4 * 4 = 32 bytes, a score 2 * 4 operations, and dense
# attention 4 * 4 = 16 operations a pair.


def drive(
    arguments: dict[str, Any],
    heads: int,
    kv_heads: int,
    length: int,
    steps: Sequence[int] = (),
    prompt: tuple[Tensor, Tensor] | None = None,
    prompt_tokens: int | None = None,
) -> RowCounts:
    """The counts of one prompt of one layer, and of further calls with `steps` new tokens each.

    `prompt` are its queries and keys; of `prompt_tokens` the first call holds `length`, the others the rest.
    """
    runtime = Runtime(parse({"backend": "gather", **arguments} if arguments else {}).plan)
    config = transformers.LlamaConfig(
        num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=4 * heads
    )
    torch.manual_seed(length)
    counts, cache, module = RowCounts(), runtime.new_cache(config, reserve=8), SimpleNamespace(layer_idx=0)
    runtime.see({0: FULL})
    with runtime.running(counts, cache, prompt_tokens or length):
        for new in (length, *steps):
            runtime.begin(new)
            query, key = torch.randn(heads, new, 4), torch.randn(kv_heads, new, 4)
            if prompt is not None and new == length:
                query, key = prompt
            keys, values = cache.update(key[None].clone(), torch.randn(1, kv_heads, new, 4), 0)
            runtime.attend(module, query[None], keys, values, None, scale=0.5, softcap=None)
    return counts


def assert_figures(counts: RowCounts, phase: str, kind: dict[str, int], *expected: float | None) -> None:
    """The figures of a phase in the order of `FIGURES`, in total and, of equal heads, in each; and its calls."""
    figures = counts.figures()[phase]
    assert set(figures) == set(FIGURES)
    assert dict(counts.phase(phase).calls) == kind
    for name, value in zip(FIGURES, expected, strict=True):
        assert figures[name] == (None if value is None else pytest.approx(value, abs=1e-12)), name
        if kind:
            assert counts.layer_figures(phase, 0)[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("arguments", [{}, {"method": "flexprefill+snapkv+quest", "sparsity": 0}])
def test_dense_by_hand(arguments: dict[str, Any]) -> None:
    """8 + 7 + ... + 1 = 36 pairs, all computed; then 9 and 10 keys; nothing is spent on selecting."""
    counts = drive(arguments, 1, 1, 8, [1, 1])
    assert_figures(counts, "prefill", {"dense": 1}, 0, 0, 1, 1, 0)
    assert_figures(counts, "eviction", {"dense": 1}, 0, 0, 0, 1, 0)
    assert_figures(counts, "decode", {"dense": 2}, 0, 0, 1, 1, 0)
    pairs, selected, executed, dense_bytes, read_bytes, flops, _ = counts.phase("prefill").layers[0][:, 0]
    assert (pairs, selected, executed, flops) == (36, 36, 36, 36 * 16)
    assert dense_bytes == read_bytes == 8 * 32  # one tile of queries reads the 8 keys once
    assert counts.phase("decode").layers[0][:, 0].tolist() == [19, 19, 19, 19 * 32, 19 * 32, 19 * 16, 0]


def test_dense_bytes_of_two_tiles_and_of_a_group_by_hand() -> None:
    """130 queries are two tiles of 128: they read 128 and 130 keys. While decoding a group reads its keys once."""
    counts = drive({}, 4, 2, 130, [3])
    assert counts.phase("prefill").layers[0][3].tolist() == [(128 + 130) * 32] * 4
    # Three tokens see 131 + 132 + 133 = 396 keys; each of the 2 query heads of a group is charged half.
    assert counts.phase("decode").layers[0][0].tolist() == [396] * 4
    assert counts.phase("decode").layers[0][3].tolist() == [396 * 16] * 4


def test_a_prompt_in_chunks_by_hand() -> None:
    """12 and 8 of 20 tokens: 78 and 132 of 210 pairs, all prefill. Each chunk reads the keys so far: 12 and 20."""
    counts = drive({}, 4, 2, 12, [8, 1], prompt_tokens=20)
    assert_figures(counts, "prefill", {"dense": 2}, 0, 0, 1, 1, 0)
    assert_figures(counts, "eviction", {"dense": 1}, 0, 0, 0, 1, 0)
    assert counts.phase("prefill").layers[0][:4, 0].tolist() == [210, 210, 210, 32 * 32]
    assert counts.phase("eviction").layers[0][:3, 0].tolist() == [20, 20, 20]
    assert counts.phase("decode").layers[0][:3, 0].tolist() == [21, 21, 21]
    assert counts.kv[0].tolist() == [[20 * 32] * 2] * 2


@pytest.mark.parametrize("most", [1024, 1])
def test_numbers_on_a_device_are_fetched_at_once(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """As on CUDA, whose tensors are not read call by call: the same counts, and one transfer when they are many.

    There are three tensors of what was selected for the prefill, and two of the step: keys held and keys read. What the
    eviction keeps and the memory held are one each. With at most one call pending, every second one fetches.
    """
    arguments = {"method": "vertical_slash+snapkv+quest", "sparsity": 0.5, "decode_sparsity": 0.7}
    expected = drive(arguments, 4, 2, 200, [1])
    transfers: list[int] = []
    to_host = rows.to_host

    def noted(tensors: Sequence[Tensor]) -> list[Any]:
        transfers.extend([len(tensors)] * (len(tensors) > 0))
        return to_host(tensors)

    monkeypatch.setattr(rows, "on_device", lambda value: isinstance(value, Tensor))
    monkeypatch.setattr(rows, "to_host", noted)
    monkeypatch.setattr(rows, "MOST_PENDING", most)
    counts = drive(arguments, 4, 2, 200, [1])
    once = [7] if most > 3 else [3 + 1, 1 + 2]
    assert transfers == once and not counts.pending
    assert counts.figures() == expected.figures() and transfers == once
    for phase in PHASES:
        mine, theirs = counts.phase(phase), expected.phase(phase)
        assert (mine.calls, mine.backends, mine.knobs) == (theirs.calls, theirs.backends, theirs.knobs)
        assert all(np.array_equal(mine.layers[layer], theirs.layers[layer]) for layer in theirs.layers)
    for _ in range(3):
        counts.later(lambda value, shape: None, torch.tensor(1.5), torch.ones(2, 3))
    assert len(counts.pending) == (3 if most > 3 else 1)


def test_numbers_of_a_device_keep_their_kind() -> None:
    """Whole numbers stay whole and exact, tensors of several numbers keep their shape, in any mixture of dtypes."""
    large = 2**53 - 1
    tensors = [
        torch.tensor(large),
        torch.tensor([1, large]),
        torch.tensor(0.5),
        torch.ones(2, 0),
        torch.tensor([[2.5]]),
    ]
    whole, pair, half, none, one = rows.to_host([*tensors[:3], tensors[3].int(), tensors[4].double()])
    assert whole == large and type(whole) is int and type(half) is float and half == 0.5
    assert pair.tolist() == [1, large] and none.shape == (2, 0) and one.tolist() == [[2.5]]
    assert rows.to_host([]) == []


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (2, 1)])
def test_block_sparse_by_hand(heads: int, kv_heads: int) -> None:
    """33 tokens are blocks of 16, 16 and 1; with two of them a row only the last query leaves something out.

    Row 0: its triangle, 16 * 17 / 2 = 136. Row 1: a full tile and a triangle, 256 + 136 = 392. Row 2: block 0 and its
    own, 16 + 1 = 17. Together 545 of 33 * 34 / 2 = 561 pairs. Keys loaded: 16 + 32 + 17 = 65; a dense kernel with
    these tiles loads 16 + 32 + 33 = 81.
    Selecting: pooling H + H_kv heads (33 * 4 additions each), and all 9 pairs of blocks, 8 operations each,
    per query head. It reads all queries and keys: 33 * 16 bytes for each head.
    """
    counts = drive({"method": "block_sparse", "top_k": 2}, heads, kv_heads, 33)
    flops = (heads + kv_heads) * 33 * 4 + heads * 9 * 8
    read = 65 * 32 + (heads + kv_heads) * 33 * 16 / heads
    assert_figures(
        counts, "prefill", {"sparse": 1}, 16 / 561, 16 / 561, read / (81 * 32), 1, flops / heads / (561 * 16)
    )
    assert flops / heads == {1: 336, 4: 270, 2: 270}[heads]


def test_vertical_slash_by_hand() -> None:
    """33 tokens in tiles of 16; the attention of the last 8 queries lies on key 20.

    Verticals: the 2 sinks 0 and 1, and 20. Slashes: the main diagonal, and the one with the most mass: offset 5, from
    query 25, which has the fewest other keys to see. On columns 33 + 32 + 13 = 78 pairs, on diagonals 33 + 28 = 61,
    on both 3 * 2 = 6: 133 selected.
    The diagonals touch tile (0, 0); (1, 0) and (1, 1); and, of query 32 with keys 32 and 27, (2, 2) and (2, 1):
    136 + 256 + 136 + 1 + 16 = 545 pairs. Outside of tiles lie columns 0 and 1 in row 2: 2 pairs more.
    Keys loaded: 16 + 32 + (1 + 16 + 2) = 67, densely 81. The window costs 2 * 8 * 33 * 4 = 2112 operations and reads
    33 keys and 8 queries of 16 bytes.
    """
    query, key = torch.zeros(1, 33, 4), torch.zeros(1, 33, 4)
    query[..., 0], key[:, 20, 0] = 6.0, 3.0
    knobs = {"verticals": 3, "slashes": 2, "window": 8, "sinks": 2, "near": 1, "tile": 16}
    counts = drive({"method": "vertical_slash", **knobs}, 1, 1, 33, prompt=(query, key))
    assert_figures(
        counts, "prefill", {"sparse": 1}, 1 - 133 / 561, 14 / 561, (67 * 32 + 41 * 16) / (81 * 32), 1, 2112 / (561 * 16)
    )


def test_flexprefill_by_hand() -> None:
    """gamma = 1 takes everything: all 561 pairs in tiles of 16, which is a fallback, and selecting comes on top.

    Per head: scores of the last 16 queries, 2 * 16 * 33 * 4 = 4224; their mean, 16 * 4 = 64, against 3 pooled keys,
    24. The keys are pooled once per KV head, 132. Keys are read twice, the window's queries once.
    """
    counts = drive({"method": "flexprefill", "gamma": 1, "tau": 0, "min_budget": 0, "block_size": 16}, 2, 1, 33)
    flops = 4224 + 64 + 24 + 132 / 2
    assert_figures(
        counts, "prefill", {"fallback": 1}, 0, 0, 1 + (66 * 16 / 2 + 16 * 16) / (81 * 32), 1, flops / (561 * 16)
    )


@pytest.mark.parametrize("steps", [[1, 1, 1], [3]])
def test_snapkv_by_hand(steps: list[int]) -> None:
    """Each of 2 KV heads keeps 6 of 16 tokens; the next 3 are kept, so that steps read 7, 8, 9 of 17, 18, 19 keys.

    The window costs 2 * 4 * 16 * 4 = 512 operations per query head, dense attention 136 pairs of 16. It reads the keys
    of 2 heads and 4 queries of 4 heads, 16 bytes each: 768 of the 16 * 2 * 32 = 1024 bytes of the cache.
    """
    knobs = {"capacity": 6, "window": 4, "kernel": 1, "sinks": 1, "local": 2}
    counts = drive({"method": "snapkv", **knobs}, 4, 2, 16, steps)
    assert_figures(counts, "prefill", {"dense": 1}, 0, 0, 1, 6 / 16, 0)
    assert_figures(counts, "eviction", {"sparse": 1}, 10 / 16, 10 / 16, 768 / 1024, 6 / 16, 512 / (136 * 16))
    assert_figures(counts, "decode", {"dense": len(steps)}, 30 / 54, 30 / 54, 24 / 54, 6 / 16, 0)


def test_ada_snapkv_by_hand() -> None:
    """Heads of different lengths: 4 tokens a head are 8 in all, of which each head gets its last token first.

    The last query of head 0 looks at keys 2, 3, 5, 7, 9, that of head 1 at key 4: those six are the largest of the
    layer, so the heads hold 6 and 2 of 16 tokens. The next step reads 7 and 3 of 17. The window of one query costs
    2 * 16 * 4 operations per head and reads 16 keys and one query of 16 bytes.
    """
    query, key = torch.zeros(2, 16, 4), torch.zeros(2, 16, 4)
    query[:, -1, 0] = 8.0
    key[0, [2, 3, 5, 7, 9], 0] = 2.0
    key[1, 4, 0] = 2.0
    knobs = {"capacity": 4, "window": 1, "kernel": 1, "sinks": 0, "local": 1, "floor": 0.25}
    counts = drive({"method": "ada_snapkv", **knobs}, 2, 2, 16, [1], prompt=(query, key))
    evicted, later = (counts.layer_figures(phase, 0) for phase in ("eviction", "decode"))
    assert evicted["executed_sparsity"].tolist() == [10 / 16, 14 / 16]
    assert evicted["kv_memory_fraction"].tolist() == [6 / 16, 2 / 16]
    assert evicted["bytes_read_fraction"].tolist() == [17 * 16 / (16 * 32)] * 2
    assert evicted["estimator_flops_fraction"].tolist() == [128 / (136 * 16)] * 2
    assert later["executed_sparsity"] == pytest.approx([10 / 17, 14 / 17])
    assert later["bytes_read_fraction"] == pytest.approx([7 / 17, 3 / 17])
    totals = counts.figures()
    assert totals["eviction"]["executed_sparsity"] == 0.75 and totals["prefill"]["kv_memory_fraction"] == 0.25
    assert totals["decode"]["executed_sparsity"] == pytest.approx(24 / 34)


def test_a_capacity_that_holds_the_prompt_by_hand() -> None:
    knobs = {"capacity": 16, "window": 4, "kernel": 1, "sinks": 1, "local": 2}
    counts = drive({"method": "ada_snapkv", **knobs}, 4, 2, 16, [1])
    assert_figures(counts, "eviction", {"fallback": 1}, 0, 0, 0, 1, 0)
    assert_figures(counts, "decode", {"dense": 1}, 0, 0, 1, 1, 0)
    assert list(counts.phase("eviction").reasons) == ["prompt of 16 tokens fits into the capacity of 16"]


@pytest.mark.parametrize("steps", [[1, 1, 1], [3]])
@pytest.mark.parametrize("shared", [True, False])
def test_quest_by_hand(shared: bool, steps: list[int]) -> None:
    """After 33 tokens: 34, 35, 36 keys, of which 2 pages of 16 are complete and 2, 3, 4 keys are in the current page.

    One complete page and the current one: 18 + 19 + 20 = 57 of 105 keys. Bounds of 2 pages, 2 * 16 bytes each, are
    read in each step by each KV head: 192 bytes. Read for both query heads of a KV head once they cost 57 * 32 bytes
    of 105 * 32, else twice that. Scoring a page costs 16 operations per query head: 96 of 105 * 16.
    Memory: 33 keys of 32 bytes, and the bounds of 3 pages, 32 bytes each.
    """
    counts = drive({"method": "quest", "budget": 16, "share_pages": shared}, 4, 2, 33, steps)
    memory = (33 * 32 + 3 * 32) / (33 * 32)
    read = (57 * 32 * (1 if shared else 2) + 192) / (105 * 32)
    assert read == pytest.approx(0.6 if shared else 1.142857, abs=1e-6)
    assert_figures(counts, "prefill", {"dense": 1}, 0, 0, 1, memory, 0)
    assert_figures(counts, "eviction", {"dense": 1}, 0, 0, 0, memory, 0)
    assert_figures(counts, "decode", {"sparse": len(steps)}, 48 / 105, 48 / 105, read, memory, 96 / (105 * 16))


@pytest.mark.parametrize(
    ("steps", "kinds", "scored"), [([1, 1, 1], {"fallback": 1, "sparse": 2}, 4), ([3], {"sparse": 1}, 4)]
)
def test_quest_at_the_edge_of_a_page_by_hand(steps: list[int], kinds: dict[str, int], scored: int) -> None:
    """After 31 tokens: 32 keys are one complete page and a full current one, which the budget covers.

    Then 33 and 34 keys: one of two complete pages, and 1 and 2 keys. One by one the first step is dense and reads no
    bounds, so that 2 + 2 pages are scored. All at once, as in scoring, the same is counted.
    """
    counts = drive({"method": "quest", "budget": 16}, 2, 2, 31, steps)
    read, whole = 32 + 17 + 18, 32 + 33 + 34
    assert_figures(
        counts, "decode", kinds, 1 - read / whole, 1 - read / whole,
        (read * 32 + scored * 32) / (whole * 32), (31 * 32 + 2 * 32) / (31 * 32), scored * 16 / (whole * 16),
    )  # fmt: skip


def test_quest_over_an_evicted_cache_by_hand() -> None:
    """20 of 40 tokens are kept; the next step sees 21: one complete page is read besides the 5 keys of the current.

    With a page of 8 and a budget of 8: 13 keys of the 41 that a dense step reads. 2 complete pages have bounds.
    Memory: 20 of 40 keys of 32 bytes, and the bounds of 3 pages.
    """
    knobs = {"capacity": 20, "window": 4, "kernel": 1, "sinks": 1, "local": 2, "budget": 8, "page_size": 8}
    counts = drive({"method": "snapkv+quest", **knobs}, 2, 1, 40, [1])
    memory = (20 * 32 + 3 * 32) / (40 * 32)
    read = (13 * 32 + 2 * 32) / (41 * 32)
    assert_figures(counts, "decode", {"sparse": 1}, 28 / 41, 28 / 41, read, memory, 2 * 16 / (41 * 16))
    assert counts.figures()["eviction"]["executed_sparsity"] == 0.5


def test_a_head_that_reads_everything_beside_one_that_does_not_by_hand() -> None:
    """Of 32 tokens head 0, which looks at 27 keys, keeps 28 and head 1 its floor of 4; a step sees 29 and 5.

    With a page of 8 and a budget of 8 head 0 reads one of 3 complete pages and the 5 keys of the current one, head 1
    all that it holds, for which no bounds are read. The step is sparse.
    """
    query, key = torch.zeros(2, 64, 4), torch.zeros(2, 64, 4)
    query[:, -1, 0] = 8.0
    key[0, 2:29, 0] = 2.0
    key[1, 4, 0] = 2.0
    knobs = {"capacity": 16, "window": 1, "kernel": 1, "sinks": 0, "local": 1, "floor": 0.25}
    counts = drive(
        {"method": "ada_snapkv+quest", **knobs, "budget": 8, "page_size": 8}, 2, 2, 64, [1], prompt=(query, key)
    )
    later = counts.layer_figures("decode", 0)
    assert dict(counts.phase("decode").calls) == {"sparse": 1} and not counts.phase("decode").reasons
    assert later["executed_sparsity"] == pytest.approx([52 / 65, 60 / 65])
    assert later["bytes_read_fraction"] == pytest.approx([(13 + 3) / 65, 5 / 65])
    assert later["estimator_flops_fraction"] == pytest.approx([3 * 16 / (65 * 16), 0])
    assert later["kv_memory_fraction"].tolist() == [(28 + 4) / 64, (4 + 1) / 64]
    assert list(counts.phase("decode").knobs["budget"]) == [9, 9, 9, 1]  # the mean of both heads


# --- counted from recorded selections --------------------------------------------------------------------------------
# The tiny Llama: 2 layers, 4 query heads, 2 KV heads, 16 dimensions, fp32.

HEADS, KV_HEADS, DIM, ELEMENT = 4, 2, 16, 4
SHARE = HEADS // KV_HEADS
PER_KEY = 2 * DIM * ELEMENT

Counts = dict[str, np.ndarray]


@dataclass
class Recorder:
    """What methods selected, by the length of the prompt, the layer and, when decoding, the call after the prefill.

    Attributes:
        prefills: also the columns and diagonals of the method's own pattern, where it has one.
        decodes: selections, the keys that each of their tokens may see, and the first sequence of the prompt.
        rows: the prompts whose answers the decoder is making a step of; a step that it only tries has none.
        widest: prompts in one step, at most; depth: steps that may be under way at once.
    """

    prefills: dict[tuple[int, int], tuple[Any, tuple[Tensor, Tensor] | None]] = field(default_factory=dict)
    evictions: dict[tuple[int, int], Any] = field(default_factory=dict)
    decodes: dict[tuple[int, int, int], tuple[Any, Any, int]] = field(default_factory=dict)
    rows: Sequence[Row] | None = None
    widest: int = 0
    depth: int = 1
    pattern: tuple[Tensor, Tensor] | None = None
    layer: int = 0
    decoding: Any = None
    calls: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def install(self, patch: pytest.MonkeyPatch) -> None:
        recorder = self
        attend, layout, quest, launch = Runtime.attend, Pattern.layout, Quest.select, Decoder._launch

        def recorded_attend(runtime: Runtime, module: Any, *args: Any, **options: Any) -> Tensor:
            recorder.layer, recorder.decoding = module.layer_idx, runtime.decoder
            recorder.calls[module.layer_idx] += 1
            return attend(runtime, module, *args, **options)

        def recorded_layout(pattern: Pattern, n_vertical: Tensor, n_slash: Tensor) -> Blocks:
            recorder.pattern = (
                pattern.column_rank < n_vertical.clamp(min=pattern.sinks)[:, None],
                pattern.diagonal_rank < n_slash.clamp(min=pattern.near)[:, None],
            )
            return layout(pattern, n_vertical, n_slash)

        def recorded_quest(method: Quest, call: Call) -> Any:
            found, query, context = quest(method, call), call.query, call.cache
            visible, steps = context.kv.visible(query.shape[2]), query.shape[2]
            assert context.kv_heads == KV_HEADS and len(query) == KV_HEADS * len(context.tokens)
            if recorder.decoding is None:  # scoring
                (tokens,) = context.tokens.tolist()
                places = [(tokens - steps, recorder.layer, recorder.calls[recorder.layer] - 2)]
            else:
                rows = recorder.rows or ()
                tokens = context.tokens.tolist() if rows else []
                places = [
                    (row.prompt, recorder.layer, count - row.prompt - 1)
                    for row, count in zip(rows, tokens, strict=True)
                ]
                ahead = {place[2] - row.fed for place, row in zip(places, rows, strict=True)}
                assert not rows or ahead in [{steps} for steps in range(recorder.depth)]
            recorder.widest = max(recorder.widest, len(places))
            for number, place in enumerate(places):
                assert place not in recorder.decodes, "a step was run twice"
                recorder.decodes[place] = (found, visible, number * KV_HEADS)
            return found

        def recorded_launch(decoder: Decoder, rows: Sequence[Row]) -> Any:
            recorder.rows = rows
            try:
                return launch(decoder, rows)
            finally:
                recorder.rows = None

        def recorded(select: Any, into: dict[tuple[int, int], Any], with_pattern: bool) -> Any:
            def wrapper(method: Any, call: Call) -> Any:
                recorder.pattern = None
                found = select(method, call)
                place = (call.length, recorder.layer)
                assert place not in into, "a prompt was prefilled twice"
                into[place] = (found, recorder.pattern) if with_pattern else found
                return found

            return wrapper

        def fresh_context(original: Any) -> Any:
            def wrapper(scorer: Scorer, *args: Any) -> Any:
                recorder.calls.clear()
                return original(scorer, *args)

            return wrapper

        patch.setattr(Runtime, "attend", recorded_attend)
        patch.setattr(Pattern, "layout", recorded_layout)
        patch.setattr(Quest, "select", recorded_quest)
        for cls in (BlockSparse, FlexPrefill, FlexPrefillVS, VerticalSlash):
            patch.setattr(cls, "select", recorded(cls.select, self.prefills, True))
        patch.setattr(SnapKV, "select", recorded(SnapKV.select, self.evictions, False))
        patch.setattr(Scorer, "score_context", fresh_context(Scorer.score_context))
        patch.setattr(Decoder, "_launch", recorded_launch)


def triangle(length: int) -> np.ndarray:
    return np.tril(np.ones((length, length), dtype=bool))


def table(**values: Any) -> Counts:
    return {name: np.broadcast_to(np.asarray(value, dtype=float), HEADS).copy() for name, value in values.items()}


def of_layout(layout: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """`(H, L, L)` pairs that are computed, and per head the keys that its query blocks load."""
    length = layout.length
    mask, loaded = np.zeros((HEADS, length, length), dtype=bool), np.zeros(HEADS)
    for head in range(HEADS):
        for row, first in enumerate(range(0, length, layout.block_q)):
            keys: set[int] = set()
            for block in layout.indices[head, row, : int(layout.counts[head, row])].tolist():
                keys |= set(range(block * layout.block_k, min((block + 1) * layout.block_k, length)))
            if layout.columns is not None:
                shared = layout.columns.shape[1] == 1  # of shared lists, what lies in a tile adds nothing
                single = layout.columns[head, 0 if shared else row, : int(layout.column_counts[head, row])].tolist()
                assert shared or not keys & set(single)
                keys |= set(single)
            mask[head, first : first + layout.block_q, sorted(keys)] = True
            loaded[head] += len(keys)
    return mask & triangle(length), loaded


def cost(method: Any, knobs: dict[str, Any], length: int) -> tuple[float, float]:
    """Operations and bytes that selecting costs, all heads together."""
    name = method.name
    if name in ("vertical_slash", "flexprefill_vs", "snapkv", "ada_snapkv"):
        window = min(method.window, length)
        return 2 * HEADS * window * length * DIM, ELEMENT * DIM * (KV_HEADS * length + HEADS * window)
    block = knobs["block_size"]
    blocks = -(-length // block)
    maps = blocks * blocks  # the product is computed whole
    if name == "block_sparse":
        pooling = (HEADS + KV_HEADS) * length * DIM
        return pooling + HEADS * maps * 2 * DIM, ELEMENT * DIM * (HEADS + KV_HEADS) * length
    aware = knobs["query_aware_heads"]
    window = HEADS * (2 * block * length * DIM + block * DIM + 2 * blocks * DIM)
    flops = window + KV_HEADS * length * DIM + aware * (length * DIM + maps * 2 * DIM)
    return flops, ELEMENT * DIM * (2 * KV_HEADS * length + HEADS * block + aware * length)


def count_prefill(method: Any, length: int, record: tuple[Any, tuple[Tensor, Tensor] | None] | None) -> Counts:
    pairs = length * (length + 1) // 2
    if record is None:
        return table(pairs=pairs, selected=pairs, executed=pairs, dense=1, read=1, flops=4 * DIM * pairs, spent=0)
    selection, pattern = record
    executed, loaded = of_layout(selection)
    selected = executed
    if pattern is not None:
        columns, diagonals = (part.numpy() for part in pattern)
        offset = np.arange(length)[:, None] - np.arange(length)
        selected = (columns[:, None, :] | diagonals[:, np.maximum(offset, 0)]) & triangle(length)
        assert not (selected & ~executed).any(), "a selected pair is not computed"
    tile = selection.block_q
    flops, extra = cost(method, selection.knobs, length)
    return table(
        pairs=pairs,
        selected=selected.sum((1, 2)),
        executed=executed.sum((1, 2)),
        dense=PER_KEY * sum(min(first + tile, length) for first in range(0, length, tile)),
        read=PER_KEY * loaded + extra / HEADS,
        flops=4 * DIM * pairs,
        spent=flops / HEADS,
    )


def kept_tokens(selection: Any) -> np.ndarray:
    """Tokens that each KV head keeps."""
    counts = selection.counts.tolist()
    kept = [set(selection.ids[head, :count].tolist()) for head, count in enumerate(counts)]
    assert [len(tokens) for tokens in kept] == counts and sum(counts) == selection.total
    return np.array([len(tokens) for tokens in kept])


def count_eviction(method: Any, length: int, selection: Any) -> Counts:
    pairs = length * (length + 1) // 2
    kept, flops, extra = np.repeat(length, KV_HEADS), 0.0, 0.0
    if selection is not None:
        kept = kept_tokens(selection)
        flops, extra = cost(method, selection.knobs, length)
    return table(
        pairs=length, selected=kept.repeat(SHARE), executed=kept.repeat(SHARE), dense=length * PER_KEY / SHARE,
        read=extra / HEADS, flops=4 * DIM * pairs, spent=flops / HEADS,
    )  # fmt: skip


def count_decode(
    quest: Quest | None, length: int, held: np.ndarray, offset: int, steps: int, record: tuple[Any, Any, int] | None
) -> tuple[Counts, bool]:
    """The tokens of one call, and whether they read everything; `held` per KV head after the prefill, `offset` tokens
    since then.
    """
    covered = True
    counts = table(pairs=0, selected=0, executed=0, dense=0, read=0, flops=0, spent=0)
    for step in range(steps):
        logical = length + offset + step + 1
        for head in range(HEADS):
            kv_head = head // SHARE
            visible = int(held[kv_head]) + offset + step + 1
            keys, loads, pages_before = visible, visible / SHARE, 0
            if record is not None:
                selection, seen, first = record
                assert int(seen[first + kv_head, step]) == visible
                size, pages = selection.unit, selection.ids
                assert size == quest.page_size and pages.shape[2] == steps
                own = 0 if pages.shape[1] == 1 else head % SHARE
                number = int(selection.counts[first + kv_head, own, step])
                chosen = set(pages[first + kv_head, own, step, :number].tolist())
                assert len(chosen) == number
                keys = len({key for page in chosen for key in range(page * size, min((page + 1) * size, visible))})
                loads = keys / SHARE if pages.shape[1] == 1 else keys
                # Where the budget takes everything no bounds are looked at.
                pages_before = (visible - 1) // quest.page_size if keys < visible else 0
                covered &= keys == visible
            counts["pairs"][head] += logical
            counts["selected"][head] += keys
            counts["executed"][head] += keys
            counts["dense"][head] += logical * PER_KEY / SHARE
            counts["read"][head] += loads * PER_KEY + pages_before * 2 * DIM * ELEMENT / SHARE
            counts["flops"][head] += logical * 4 * DIM
            counts["spent"][head] += pages_before * 4 * DIM
    return counts, covered


def figures_of(counts: Counts, held: np.ndarray, dense: np.ndarray) -> dict[str, np.ndarray]:
    with np.errstate(invalid="ignore"):
        return {
            "selected_sparsity": 1 - counts["selected"] / counts["pairs"],
            "executed_sparsity": 1 - counts["executed"] / counts["pairs"],
            "bytes_read_fraction": counts["read"] / counts["dense"],
            "kv_memory_fraction": held / dense,
            "estimator_flops_fraction": counts["spent"] / counts["flops"],
        }


@dataclass
class Expected:
    """What one prompt must report.

    Attributes:
        layers: phase -> layer -> figure -> `(H,)`; total: phase -> figure; calls: phase -> kind -> number.
    """

    layers: dict[str, dict[int, dict[str, np.ndarray]]]
    total: dict[str, dict[str, float]]
    calls: dict[str, dict[str, int]]


def expect(
    plan: Any, recorder: Recorder, length: int, runs: list[tuple[int, int, int]], layers: Sequence[int] = (0, 1)
) -> Expected:
    """From the records of a prompt; `runs` are its decode calls as (call, tokens since the prefill, new tokens)."""
    quest = None if plan.decode is None else plan.decode.method
    found: dict[str, dict[int, Counts]] = {phase: {} for phase in PHASES}
    calls: dict[str, dict[str, int]] = {phase: defaultdict(int) for phase in PHASES}
    memory: dict[int, np.ndarray] = {}
    units: set[bool] = set()
    for layer in layers:
        prefill = recorder.prefills.get((length, layer))
        method = None if plan.prefill is None else plan.prefill.method
        found["prefill"][layer] = count_prefill(method, length, prefill)
        ran = found["prefill"][layer]
        # What executes every pair in every head was dense, whatever the method calls it.
        some = prefill and bool((ran["executed"] < ran["pairs"]).any())
        units.add(method is None or prefill is None)
        calls["prefill"]["dense" if method is None else "sparse" if some else "fallback"] += 1
        held = np.repeat(length, KV_HEADS)
        eviction = recorder.evictions.get((length, layer))
        method = None if plan.eviction is None else plan.eviction.method
        found["eviction"][layer] = count_eviction(method, length, eviction)
        some = eviction and bool((kept_tokens(eviction) < length).any())
        calls["eviction"]["dense" if method is None else "sparse" if some else "fallback"] += 1
        held = held if eviction is None else kept_tokens(eviction)
        memory[layer] = held * float(PER_KEY)
        if quest is not None:
            memory[layer] += -(-held // quest.page_size) * 2 * DIM * ELEMENT
        for turn, offset, steps in runs:
            decode = recorder.decodes.pop((length, layer, turn), None)
            assert (decode is None) == (quest is None), "a step without a selection"
            counts, covered = count_decode(quest, length, held, offset, steps, decode)
            before = found["decode"].get(layer)
            found["decode"][layer] = (
                counts if before is None else {name: before[name] + counts[name] for name in counts}
            )
            calls["decode"]["dense" if quest is None else "fallback" if covered else "sparse"] += 1
    dense = np.repeat(float(length * PER_KEY), KV_HEADS)
    total = {}
    for phase, by_layer in found.items():
        sums = {name: np.sum([c[name].sum() for c in by_layer.values()]) for name in table(
            pairs=0, selected=0, executed=0, dense=0, read=0, flops=0, spent=0)}  # fmt: skip
        if phase == "prefill":  # a layer that fell back is counted in other units of bytes
            assert len(units) == 1
        total[phase] = {
            name: float(value)
            for name, value in figures_of(sums, np.sum(list(memory.values())), dense.sum() * len(layers)).items()
        }
    return Expected(
        {
            phase: {
                layer: figures_of(counts, memory[layer].repeat(SHARE), dense.repeat(SHARE))
                for layer, counts in by_layer.items()
            }
            for phase, by_layer in found.items()
        },
        total,
        {phase: dict(kinds) for phase, kinds in calls.items()},
    )


def same(value: float | None, expected: float) -> bool:
    return value is None if np.isnan(expected) else value == pytest.approx(expected, rel=1e-9, abs=1e-12)


def check(lm: SparseHFLM, stats: list[dict[str, Any]], expected: list[Expected], task: str = "t") -> None:
    """Each prompt's figures, the report's means over prompts, and the means per layer and head."""
    for found, wanted in zip(stats, expected, strict=True):
        for phase in PHASES:
            assert found[phase]["calls"] == wanted.calls[phase]
            for name, value in wanted.total[phase].items():
                assert same(found[phase][name], value), (phase, name, found[phase][name], value)
    report, details = lm.report(), lm.detail_report()[task]
    assert report["prompts"] == len(expected)
    for phase in PHASES:
        for name in FIGURES:
            known = [e.total[phase][name] for e in expected if not np.isnan(e.total[phase][name])]
            mean = float(np.mean(known)) if known else np.nan
            for block in (report["phases"][phase], report["tasks"][task][phase]):
                assert same(block[name], mean), (phase, name)
        kinds = {kind: sum(e.calls[phase].get(kind, 0) for e in expected) for kind in ("sparse", "dense", "fallback")}
        assert report["phases"][phase]["calls"] == kinds
        assert sum(report["phases"][phase].get("fallback_reasons", {}).values()) == kinds["fallback"]
        if phase == "decode" and kinds["fallback"]:
            assert set(report["phases"][phase]["fallback_reasons"]) == {COVERED}
        layers = sorted({layer for e in expected for layer in e.layers[phase]})
        assert [row["layer"] for row in details.get(phase, [])] == layers
        for row in details.get(phase, []):
            assert set(row) == {"layer", *FIGURES}
            for name in FIGURES:
                known = [e.layers[phase][row["layer"]][name] for e in expected if row["layer"] in e.layers[phase]]
                mean = np.mean(known, axis=0)
                assert row[name] == pytest.approx(mean, rel=1e-9, abs=1e-12), (phase, row["layer"], name)
    json.dumps([report, details], allow_nan=False)


SNAP = {"capacity": 24, "window": 8, "kernel": 5, "sinks": 2, "local": 4}
BANDS = {"window": 16, "sinks": 3, "near": 5, "tile": 16}


def dotted(method: str, knobs: dict[str, Any]) -> dict[str, Any]:
    return {f"{method}.{name}": value for name, value in knobs.items()}


#: Name -> model arguments; small enough for prompts of some 50 to 130 tokens, one of which is too short for most.
RUNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "vertical_slash": {"method": "vertical_slash", "verticals": 20, "slashes": 12, **BANDS},
    "vertical_slash-32": {"method": "vertical_slash", "verticals": 9, "slashes": 6, **BANDS, "tile": 32},
    "flexprefill": {"method": "flexprefill", "gamma": 0.6, "min_budget": 0, "block_size": 16},
    "flexprefill-aware": {"method": "flexprefill", "gamma": 0.6, "tau": 0.5, "min_budget": 0, "block_size": 16},
    "flexprefill_vs": {"method": "flexprefill_vs", "alpha": 0.5, "min_budget": 8, **BANDS},
    "block_sparse": {"method": "block_sparse", "top_k": 3},
    "snapkv": {"method": "snapkv", **SNAP},
    "ada_snapkv": {"method": "ada_snapkv", **SNAP},
    "quest": {"method": "quest", "budget": 16},
    "quest-own-8": {"method": "quest", "budget": 16, "page_size": 8, "share_pages": False},
    "snapkv+quest": {"method": "snapkv+quest", **SNAP, "budget": 8, "page_size": 8},
    "all": {
        "method": "vertical_slash+ada_snapkv+quest", **dotted("vertical_slash", BANDS), **dotted("ada_snapkv", SNAP),
        "verticals": 20, "slashes": 12, "budget": 8, "page_size": 8, "share_pages": False,
    },
    "sparsities": {
        "method": "quest+block_sparse+ada_snapkv", "sparsity": 0.4, "kv_sparsity": 0.3, "decode_sparsity": 0.7,
        "page_size": 8, "window": 8, "kernel": 5,
    },
}  # fmt: skip

#: Prompts of different lengths; the answers are of none to several decoded tokens.
PROMPTS = [tiny.words(seed, count) for seed, count in enumerate((70, 100, 9, 130, 47))]
ANSWERS = [
    (" apple", " river stone cloud", " river stone", " unusual zebra, said he", " red"),
    (" apple",),
    (" river stone", " unusual zebra"),
    (" unusual zebra, said he",),
    (" blue box", " old", " river stone cloud the small city"),
]


@pytest.fixture(scope="module")
def llama() -> transformers.PreTrainedModel:
    return tiny.family("llama")


def sparse(model: Any, arguments: dict[str, Any], **options: Any) -> SparseHFLM:
    given = {"stats": "full", "backend": "gather", **arguments, **options}
    return SparseHFLM(pretrained=model, tokenizer=tiny.tiny_tokenizer(), **given)


def request(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("t", 0, 1))


def decoded(lm: SparseHFLM, prompt: str, answers: Sequence[str]) -> tuple[int, list[tuple[int, int, int]]]:
    """The prompt's length, and the calls that its answers need: an answer that begins another one needs none."""
    context = lm.tok_encode(prompt)
    tails = []
    for answer in answers:
        whole = lm.tok_encode(prompt + answer)
        assert whole[: len(context)] == context
        tails.append(whole[len(context) :])
    tails.sort(key=len, reverse=True)
    run = [tail for i, tail in enumerate(tails) if not any(t[: len(tail)] == tail for t in tails[:i])]
    # The prompt predicts the first token; each of the others but the last is one decode step.
    return len(context), [(turn, 0, len(tail) - 1) for turn, tail in enumerate(run) if len(tail) > 1]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", RUNS)
def test_scoring(name: str, batch_size: int, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    recorder.install(monkeypatch)
    lm = sparse(llama, RUNS[name], batch_size=batch_size)
    pairs = [(prompt, answer) for prompt, answers in zip(PROMPTS, ANSWERS, strict=True) for answer in answers]
    found = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    stats: dict[str, dict[str, Any]] = {}
    for (prompt, _), answer in zip(pairs, found, strict=True):
        assert stats.setdefault(prompt, stats_of(answer)) == stats_of(answer)
    work = [decoded(lm, prompt, answers) for prompt, answers in zip(PROMPTS, ANSWERS, strict=True)]
    assert len({length for length, _ in work}) == len(PROMPTS)
    plan = lm.sparse.plan
    expected = [expect(plan, recorder, *one) for one in work]
    check(lm, [stats[prompt] for prompt in PROMPTS], expected)
    assert not recorder.decodes, "selections that no answer needs"
    for phase in plan.phases:
        assert lm.report()["phases"][phase]["calls"]["sparse"] >= 2 * (len(PROMPTS) - 2), "too little was sparse"
    if not RUNS[name]:
        return
    # What was typed, per phase.
    requested = {phase: block["requested_sparsity"] for phase, block in lm.report()["phases"].items()}
    if name == "sparsities":
        assert requested == {"prefill": 0.4, "eviction": 0.3, "decode": 0.7}
    else:
        assert set(requested.values()) == {None}


@pytest.mark.parametrize("name", ["dense", "block_sparse", "ada_snapkv", "quest", "all"])
def test_every_token_is_counted_once(name: str, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts themselves, which the quotients of dense calls do not show: one step for each token of an answer."""
    rows: list[RowCounts] = []
    add = Ledger.add
    monkeypatch.setattr(Ledger, "add", lambda ledger, row: (rows.append(row), add(ledger, row))[1])
    lm = sparse(llama, RUNS[name], batch_size=5)
    pairs = [(prompt, answer) for prompt, answers in zip(PROMPTS, ANSWERS, strict=True) for answer in answers]
    lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    work = dict(decoded(lm, prompt, answers) for prompt, answers in zip(PROMPTS, ANSWERS, strict=True))
    assert len(rows) == len(work)
    for row in rows:
        prompt_pairs = row.phase("prefill").layers[0][0]
        length = next(n for n in work if n * (n + 1) // 2 == prompt_pairs[0])
        keys = sum(length + step + 1 for _, _, steps in work[length] for step in range(steps))
        for layer in (0, 1):
            assert row.phase("prefill").layers[layer][0].tolist() == [length * (length + 1) // 2] * HEADS
            assert row.phase("eviction").layers[layer][0].tolist() == [length] * HEADS
            later = row.phase("decode").layers.get(layer, np.zeros((7, HEADS)))
            assert later[0].tolist() == [keys] * HEADS
        assert sum(row.phase("decode").calls.values()) == 2 * len(work[length])


@pytest.mark.parametrize("way", ["alone", "side by side", "ahead"])
@pytest.mark.parametrize("name", ["dense", "ada_snapkv", "quest", "quest-own-8", "snapkv+quest", "all", "sparsities"])
def test_generation(name: str, way: str, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to six tokens for each of five prompts, of which the first comes from the prefill.

    Side by side up to four are decoded in a step, which on a CPU a model of single precision is not: that it rounds
    differently then does not matter here. Ahead means that a step runs before the tokens of the last one are looked at,
    as on a GPU: what was run for an answer that had ended is counted nowhere.
    """
    recorder = Recorder()
    recorder.install(monkeypatch)
    lm = sparse(llama, RUNS[name], batch_size=4)
    decoder, _ = lm.decoding.get()
    if way != "alone":
        decoder.most, decoder.alone = 16, None
        decoder.depth = recorder.depth = 2 if way == "ahead" else 1
        monkeypatch.setattr(Decoder, "_goes_together", lambda decoder, rows: decoder._tried(rows) is not None)
    # Ends that depend on the prompt alone: a row that ends leaves the others to go on.
    lengths = {prompt: len(lm.tok_encode(prompt)) for prompt in PROMPTS}
    wanted = {length: 1 + number for number, length in zip((3, 5, 0, 2, 4), lengths.values(), strict=True)}
    monkeypatch.setattr(Row, "take", shortened(wanted))
    options = {"until": [], "max_gen_toks": 6}
    found = lm.generate_until([request("generate_until", prompt, options) for prompt in PROMPTS], disable_tqdm=True)
    runs = {length: [(turn, turn, 1) for turn in range(tokens - 1)] for length, tokens in wanted.items()}
    expected = [expect(lm.sparse.plan, recorder, length, runs[length]) for length in lengths.values()]
    check(lm, [stats_of(text) for text in found], expected)
    if lm.sparse.plan.decode is not None:
        assert recorder.widest == (1 if way == "alone" else 4)
        assert bool(recorder.decodes) == (way == "ahead"), "selections that no answer needs"
        assert all(turn >= wanted[length] - 1 for length, _, turn in recorder.decodes)
    report = lm.report()["phases"]["decode"]
    steps = sum(wanted.values()) - len(wanted)
    assert report["loops"] == {"eager": steps}
    assert report.get("loop_reasons") == ({decoder.alone: steps} if way == "alone" else None)


def shortened(wanted: dict[int, int]) -> Any:
    """`Row.take` that ends an answer at so many tokens, by the length of its prompt."""

    def take(row: Row, token: int) -> None:
        row.tokens.append(token)
        row.done = len(row.tokens) == wanted[row.prompt]

    return take


def test_a_group_of_query_heads_and_heads_that_differ(llama: Any) -> None:
    """The details are not one number repeated: heads of an adaptive method differ, and their mean is the layer's."""
    lm = sparse(llama, RUNS["flexprefill_vs"])
    lm.loglikelihood([request("loglikelihood", PROMPTS[3], " river stone")], disable_tqdm=True)
    rows = lm.detail_report()["t"]["prefill"]
    assert all(len(set(row["executed_sparsity"])) > 1 for row in rows)
    mean = np.mean([row["executed_sparsity"] for row in rows])
    assert lm.report()["phases"]["prefill"]["executed_sparsity"] == pytest.approx(mean)


def test_rolling_windows_are_prefill(llama: Any) -> None:
    """No cache is kept: nothing is evicted or decoded, and there is no memory to measure."""
    lm = sparse(llama, RUNS["block_sparse"])
    (found,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", PROMPTS[3])], disable_tqdm=True)
    stats, tokens = stats_of(found), len(lm.tok_encode(PROMPTS[3]))  # one token before the text, none after it
    assert stats["prefill"]["calls"] == {"sparse": 2} and stats["prefill"]["kv_memory_fraction"] is None
    # Block-sparse with three blocks of 16: two full tiles beside the triangle from the third row on.
    rows = [min(16, tokens - first) for first in range(0, tokens, 16)]
    executed = sum(rows[i] * (rows[i] + 1) // 2 + min(i, 2) * 16 * rows[i] for i in range(len(rows)))
    assert stats["prefill"]["executed_sparsity"] == pytest.approx(1 - executed / (tokens * (tokens + 1) / 2))
    for phase in ("eviction", "decode"):
        assert {stats[phase][name] for name in FIGURES} == {None} and stats[phase]["calls"] == {}


def test_basic_statistics_have_no_details(llama: Any) -> None:
    lm = sparse(llama, {**RUNS["block_sparse"], "stats": "basic"})
    lm.loglikelihood([request("loglikelihood", PROMPTS[1], " river stone")], disable_tqdm=True)
    assert lm.detail_report() == {"t": {"prompts": 1}} and lm.report()["phases"]["prefill"]["executed_sparsity"] > 0


# --- layers that are not full causal attention -----------------------------------------------------------------------

WINDOWED = ["dense", "vertical_slash", "block_sparse", "ada_snapkv", "quest", "all"]


@pytest.mark.parametrize("name", WINDOWED)
def test_sliding_window_layers_are_in_no_figure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tiny Gemma 3's three layers only the middle one is full attention."""
    recorder = Recorder()
    recorder.install(monkeypatch)
    lm = sparse(tiny.family("gemma3"), RUNS[name], batch_size=2)
    prompts, answer = PROMPTS[:2], " unusual zebra, said he"
    pairs = [(prompt, answer) for prompt in prompts]
    found = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    expected = [expect(lm.sparse.plan, recorder, *decoded(lm, prompt, [answer]), layers=[1]) for prompt in prompts]
    check(lm, [stats_of(one) for one in found], expected)
    assert {layer for _, layer in [*recorder.prefills, *recorder.evictions]} <= {1}
    layers = lm.report()["layers"]
    assert layers["sparse_eligible"] == 1 and set(layers["untouched"]) == {0, 2}
    assert all("sliding window of 24" in reason for reason in layers["untouched"].values())


# --- averages over prompts -------------------------------------------------------------------------------------------


def prompts_of(lengths: Sequence[int]) -> list[RowCounts]:
    """Counts of prompts, some of them without a decode phase, some too short for the method."""
    knobs = {"budget": 16, "page_size": 8, "share_pages": False, "top_k": 3}
    return [
        drive({"method": "block_sparse+quest", **knobs}, 4, 2, length, [1] * (length % 3)) for length in lengths
    ]  # fmt: skip


def same_reports(one: Ledger, other: Ledger) -> None:
    """The same figures, calls, kernels and solved knobs."""
    assert one.rows == other.rows
    for phase in PHASES:
        left, right = one.report(phase), other.report(phase)
        for name in FIGURES:
            assert left.pop(name) == pytest.approx(right.pop(name), rel=1e-12)
        solved = left.pop("knobs_solved", {}), right.pop("knobs_solved", {})
        assert solved[0].keys() == solved[1].keys()
        for knob in solved[0]:
            assert solved[0][knob] == pytest.approx(solved[1][knob])
        assert left == right
        details = one.detail_report(phase), other.detail_report(phase)
        assert [row["layer"] for row in details[0]] == [row["layer"] for row in details[1]]
        for mine, yours in zip(*details, strict=True):
            for name in FIGURES:
                assert mine[name] == pytest.approx(yours[name], rel=1e-12)


def test_prompts_weigh_the_same_whatever_their_length() -> None:
    """Block-sparse with two blocks: 16 of 561 pairs are left out at 33 tokens, 32,896 - 7,952 of 32,896 at 256.

    At 256 tokens: 16 triangles of 136 and 15 full tiles of 256 pairs are 6,016 of 32,896 pairs.
    """
    short, long = (drive({"method": "block_sparse", "top_k": 2}, 1, 1, length) for length in (33, 256))
    expected = (16 / 561 + 1 - 6016 / 32896) / 2
    ledger = Ledger(full=True)
    for row in (short, long):
        ledger.add(row)
    assert ledger.rows == 2
    assert ledger.report("prefill")["executed_sparsity"] == pytest.approx(expected)
    assert ledger.detail_report("prefill")[0]["executed_sparsity"] == pytest.approx([expected])


def test_prompts_without_a_phase_do_not_count_in_it() -> None:
    rows = prompts_of([40, 60, 80, 99])  # the second and the last decode nothing
    ledger = Ledger(full=True)
    for row in rows:
        ledger.add(row)
    known = [row.figures()["decode"]["executed_sparsity"] for row in rows]
    assert [value is None for value in known] == [False, True, False, True]
    mean = (known[0] + known[2]) / 2
    assert ledger.report("decode")["executed_sparsity"] == pytest.approx(mean)
    assert np.mean(ledger.detail_report("decode")[0]["executed_sparsity"]) == pytest.approx(mean)
    # A phase that nothing was computed in has no figures, but the memory held.
    empty = Ledger()
    empty.add(RowCounts(kv=rows[0].kv))
    assert empty.report("decode") == {
        **dict.fromkeys(FIGURES), "kv_memory_fraction": rows[0].figures()["decode"]["kv_memory_fraction"],
        "calls": {"sparse": 0, "dense": 0, "fallback": 0}, "backends": {},
    }  # fmt: skip


def test_merged_halves_are_the_whole() -> None:
    rows = prompts_of([33, 50, 20, 100, 64, 71])
    whole, merged = Ledger(full=True), Ledger(full=True)
    halves = [Ledger(full=True) for _ in range(3)]  # one of them stays empty
    for number, row in enumerate(rows):
        whole.add(row)
        halves[number % 2].add(row)
    before = pickle.dumps(halves)
    for half in halves:
        merged.merge(half)
    same_reports(merged, whole)
    # Merging leaves the parts alone, also when their sum goes on counting.
    merged.add(rows[0])
    assert pickle.dumps(pickle.loads(before)) == pickle.dumps(pickle.loads(pickle.dumps(halves)))
    merged.merge(whole)
    assert merged.rows == 2 * len(rows) + 1


def test_counts_survive_pickling() -> None:
    rows = prompts_of([33, 50, 20])
    ledger, again = Ledger(full=True), Ledger(full=True)
    for row in rows:
        copy = pickle.loads(pickle.dumps(row))
        assert copy.figures() == row.figures()
        ledger.add(row)
        again.add(copy)
    same_reports(again, ledger)
    same_reports(pickle.loads(pickle.dumps(ledger)), ledger)
    merged = Ledger(full=True)
    merged.merge(pickle.loads(pickle.dumps(ledger)))
    same_reports(merged, ledger)


def test_figures_from_responses_are_those_that_were_counted(llama: Any) -> None:
    """Answers from a response cache bring their figures along: the same means as when they were made."""
    lm = sparse(llama, RUNS["all"], batch_size=4)
    found = lm.loglikelihood([request("loglikelihood", p, " unusual zebra") for p in PROMPTS], disable_tqdm=True)
    restored = Ledger()
    for answer in found:
        restored.add_stats(pickle.loads(pickle.dumps(stats_of(answer))))
    for phase in PHASES:
        counted, again = lm.reporter.ledgers["t"].report(phase), restored.report(phase)
        for name in FIGURES:
            assert again[name] == pytest.approx(counted[name])
        assert (again["calls"], again["backends"]) == (counted["calls"], counted["backends"])


def in_batches(llama: Any, name: str) -> list[Ledger]:
    """What was counted alone, in pairs, and all at once."""
    ledgers = []
    for batch_size in (1, 2, 5):
        lm = sparse(llama, RUNS[name], batch_size=batch_size)
        pairs = [(prompt, answer) for prompt, answers in zip(PROMPTS, ANSWERS, strict=True) for answer in answers]
        lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
        ledgers.append(lm.reporter.ledgers["t"])
    return ledgers


@pytest.mark.parametrize("name", RUNS)
def test_figures_do_not_depend_on_the_batch(name: str, llama: Any) -> None:
    alone, *others = in_batches(llama, name)
    for other in others:
        same_reports(alone, other)


@pytest.mark.parametrize("name", RUNS)
def test_solved_knobs_do_not_depend_on_the_batch(name: str, llama: Any) -> None:
    """`knobs_solved` of the report."""
    alone, *others = in_batches(llama, name)
    for phase in PHASES:
        expected = alone.report(phase).get("knobs_solved", {})
        for other in others:
            solved = other.report(phase).get("knobs_solved", {})
            assert solved.keys() == expected.keys()
            for knob in expected:
                assert solved[knob] == pytest.approx(expected[knob]), (phase, knob)
