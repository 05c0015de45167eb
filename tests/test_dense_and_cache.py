"""Dense attention of every shape the runtime asks for, and the cache's bookkeeping, against plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import Gemma3TextConfig, LlamaConfig

from lm_eval_sparse.kernels.cache.append import append
from lm_eval_sparse.kernels.dense import dense_attention
from lm_eval_sparse.kernels.types import Keep, RaggedKV, Slot
from lm_eval_sparse.runtime.accounting.calls import dense_keys
from lm_eval_sparse.runtime.cache import CacheLayer, SparseCache
from lm_eval_sparse.runtime.pool import Pool, Sequences


def definition(query: Tensor, key: Tensor, value: Tensor, softcap, window, starts) -> Tensor:
    batch, heads, q_len, dim = query.shape
    kv_len = key.shape[2]
    group = heads // key.shape[1]
    out = torch.zeros(batch, heads, q_len, value.shape[-1], dtype=torch.float64)
    for b, h, i in itertools.product(range(batch), range(heads), range(q_len)):
        position = kv_len - q_len + i
        low = 0 if window is None else max(0, position - window + 1)
        keys = [j for j in range(low, position + 1) if starts is None or j >= starts[b]]
        if not keys:
            continue
        scores = key[b, h // group, keys].double() @ query[b, h, i].double() * 0.3
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[b, h, i] = scores.softmax(0) @ value[b, h // group, keys].double()
    return out


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("window", [None, 7, 10_000])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 33), (33, 33), (5, 33)])
def test_dense_equals_the_definition(softcap, window, padded: bool, q_len: int, kv_len: int) -> None:
    compare(softcap, window, padded, q_len, kv_len, batch=2, heads=4)


@pytest.mark.parametrize(("softcap", "window"), [(4.0, 7), (None, 520)])
def test_several_chunks_equal_the_definition(softcap, window) -> None:
    compare(softcap, window, True, 600, 613, batch=2, heads=1)


def compare(softcap, window, padded: bool, q_len: int, kv_len: int, batch: int, heads: int) -> None:
    query = torch.randn(batch, heads, q_len, 8)
    key, value = (torch.randn(batch, (heads + 1) // 2, kv_len, 8) for _ in "kv")
    starts = torch.tensor([0, kv_len // 3]) if padded else None
    out = dense_attention(query, key, value, scale=0.3, softcap=softcap, window=window, starts=starts)
    expected = definition(query, key, value, softcap, window, None if starts is None else starts.tolist())
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)


def test_values_may_have_their_own_dimension() -> None:
    query, key, value = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 5)
    out = dense_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(out.double(), definition(query, key, value, None, None, None), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000])
def test_keys_of_a_dense_kernel(length: int) -> None:
    assert dense_keys(length, 128) == sum(min(start + 128, length) for start in range(0, length, 128))


def test_storage_grows_and_keeps_what_it_held() -> None:
    layer, steps = CacheLayer(reserve=3), [5, 1, 1, 1, 1, 400, 1]
    parts = [torch.randn(2, 3, n, 4) for n in steps]
    for done, part in enumerate(parts, 1):
        keys, values = layer.update(part, -part)
        assert torch.equal(keys, torch.cat(parts[:done], 2)) and torch.equal(values, -keys)
    assert layer.get_seq_length() == sum(steps)


def test_beams_are_reordered_and_go_on() -> None:
    layer = CacheLayer(reserve=8)
    first, second = torch.randn(3, 1, 4, 2), torch.randn(3, 1, 1, 2)
    layer.update(first, first)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    keys, _ = layer.update(second, second)
    assert torch.equal(keys, torch.cat([first[[2, 0, 0]], second], 2))


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(num_hidden_layers=2),
        Gemma3TextConfig(
            num_hidden_layers=3, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"]
        ),
    ],
    ids=["full layers", "window layers"],
)
def test_restoring_forgets_what_came_after(config) -> None:
    cache = SparseCache(config, reserve=2)

    def feed(tokens: int) -> list[Tensor]:
        states = [torch.randn(1, 1, tokens, 4) for _ in cache.layers]
        return [cache.update(state, state, layer)[0].clone() for layer, state in enumerate(states)]

    feed(9)
    snapshot = cache.snapshot()
    torch.manual_seed(1)
    once = [*feed(3), *feed(1)]
    cache.restore(snapshot)
    assert cache.get_seq_length() == 9
    torch.manual_seed(1)
    again = [*feed(3), *feed(1)]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_bytes_held_are_those_of_the_tokens() -> None:
    slots = (
        Slot("low", "page", (-1,)),
        Slot("seen", "token", (), torch.int16),
        Slot("norm", "sequence", (), torch.float64),
    )
    cache = SparseCache(LlamaConfig(num_hidden_layers=1), reserve=100, slots=slots, page_size=4)
    cache.update(torch.zeros(2, 3, 7, 4), torch.zeros(2, 3, 7, 6), 0)
    layer = cache.layers[0]
    for row in range(2):
        held, dense = layer.held_bytes(row)
        assert held.tolist() == [7 * (4 + 6) * 4] * 3 and dense == 7 * (4 + 6) * 4
    layer.close()
    # Two pages of 4 tokens in each head, whose last one is not full; two bytes a token; eight of a sequence.
    for row in range(2):
        held, dense = layer.held_bytes(row)
        assert held.tolist() == [7 * (4 + 6) * 4 + 2 * 4 * 4 + 7 * 2 + 8] * 3 and dense == 7 * (4 + 6) * 4
    assert layer.storage_bytes() >= 2 * 3 * (107 * ((4 + 6) * 4 + 2) + 27 * 4 * 4 + 8)


def held_by(layer: CacheLayer) -> RaggedKV:
    return layer.sequences.kv(layer.pool)


def test_what_is_kept_is_held_in_each_head_of_each_row() -> None:
    """Ragged heads, a row that keeps everything: the keys and values kept, in order, and then new ones."""
    layer = CacheLayer(reserve=2, evicts=True)
    keys, values = torch.randn(2, 2, 9, 4), torch.randn(2, 2, 9, 6)
    layer.update(keys, values)
    ids = torch.tensor([[1, 4, 5, 7777], [0, -9, 7777, -9]])  # what stands behind the counts is undefined
    kept = [[1, 4, 5], [0], list(range(9)), list(range(9))]
    layer.close([Keep(ids, torch.tensor([3, 1]), 4), None])
    new = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 6)
    for done in (0, 1, 2, 4, 5):  # the reserve is 2
        if since := done - (layer.get_seq_length() - 9):
            part = [states[:, :, done - since : done] for states in new]
            assert all(torch.equal(*pair) for pair in zip(layer.update(*part), part, strict=True))
            layer.make_room(since)
            layer.sequences.lengthen(since)
            append(held_by(layer), *(states.reshape(4, since, -1) for states in part))
        kv = held_by(layer)
        assert layer.get_seq_length() == 9 + done and kv.longest >= int(kv.lengths.max())
        assert kv.lengths.tolist() == [len(tokens) + done for tokens in kept]
        assert layer.sequences.total == sum(kv.lengths.tolist())
        for s, (start, length) in enumerate(zip(kv.starts.tolist(), kv.lengths.tolist(), strict=True)):
            row, head = divmod(s, 2)
            for flat, states, more in ((kv.keys, keys, new[0]), (kv.values, values, new[1])):
                expected = torch.cat([states[row, head, kept[s]], more[row, head, :done]])
                assert torch.equal(flat[start : start + length], expected)
    held, dense = layer.held_bytes(0)
    assert held.tolist() == [(count + 5) * (4 + 6) * 4 for count in (3, 1)] and dense == 14 * (4 + 6) * 4


def test_sequences_move_with_their_state() -> None:
    """Rows of a pool get more room, in another order and one of them twice: keys, values and every slot go along."""
    slots = Slot("page", "page", (-1,)), Slot("token", "token", (3,)), Slot("own", "sequence", (2,), torch.float64)
    pool = Pool(slots, page_size=4)
    lengths = [5, 9, 1, 4]
    first = pool.take(sum(lengths) + 4 * 2, torch.randn(1, 4), torch.randn(1, 6))
    starts = torch.tensor([0, *(n + 2 for n in lengths[:-1])]).cumsum(0) + first
    held = Sequences(starts, torch.tensor(lengths, dtype=torch.int32), 2, 9, sum(lengths), 2)
    pool.take_state(held)
    for tensor in (pool.keys, pool.values, *pool.tensors.values()):
        tensor.copy_(torch.randn_like(tensor))

    def of(s: int) -> list[Tensor]:
        """What sequence s holds: keys, values, tokens, pages, its own."""
        start, length = int(held.starts[s]), int(held.lengths[s])
        page, place = int(held.first[s]), int(held.place[s])
        tokens = [part[start : start + length].clone() for part in (pool.keys, pool.values, pool.tensors["token"])]
        pages = pool.tensors["page"][page : page - (-length // 4)].clone()
        return [*tokens, pages, pool.tensors["own"][place].clone()]

    before = [of(s) for s in range(4)]
    order = torch.tensor([2, 3, 0, 1, 2, 3])
    held.starts, held.lengths = held.starts[order], held.lengths[order]
    held.first, held.place = held.first[order], held.place[order]
    pool.move([(held, 0)], 50)
    assert held.room == 50
    for s, old in enumerate(order.tolist()):
        assert all(torch.equal(*pair) for pair in zip(of(s), before[old], strict=True))
    spans = sorted((int(a), int(a) + int(n) + 50) for a, n in zip(held.starts, held.lengths, strict=True))
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    assert spans[-1][1] <= len(pool.keys)


def test_a_state_comes_back() -> None:
    """What follows from the keys is not kept, everything else is as it was."""
    slots = Slot("kept", "token", ()), Slot("derived", "token", (), derived=True)
    cache = SparseCache(LlamaConfig(num_hidden_layers=1), reserve=8, slots=slots)
    layer = cache.layers[0]
    cache.update(torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4), 0)
    layer.close()
    layer.pool.tensors["kept"].fill_(1.0)
    snapshot = cache.snapshot()
    layer.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    layer.make_room(3)
    layer.sequences.lengthen(3)
    layer.pool.tensors["kept"].fill_(2.0)
    assert (layer.get_seq_length(), layer.sequences.room) == (9, 5)
    cache.restore(snapshot)
    assert (layer.get_seq_length(), layer.sequences.room, layer.sequences.lengths.tolist()) == (6, 8, [6, 6])
    assert (layer.pool.tensors["kept"] == 1).all()


def test_a_state_comes_back_though_storage_has_moved() -> None:
    slots = Slot("token", "token", ()), Slot("page", "page", ()), Slot("own", "sequence", ())
    cache = SparseCache(LlamaConfig(num_hidden_layers=1), reserve=1, slots=slots, page_size=4)
    layer = cache.layers[0]
    cache.update(torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4), 0)
    layer.close()
    for tensor in layer.pool.tensors.values():
        tensor.copy_(torch.randn_like(tensor))

    def held() -> list[Tensor]:
        own, found = layer.sequences, []
        for start, page, place in zip(own.starts.tolist(), own.first.tolist(), own.place.tolist(), strict=True):
            parts = layer.pool.tensors["token"][start : start + 6], layer.pool.tensors["page"][page : page + 2]
            found += [part.clone() for part in (*parts, layer.pool.tensors["own"][place])]
        return found

    before, snapshot = held(), cache.snapshot()
    layer.update(torch.randn(1, 2, 90, 4), torch.randn(1, 2, 90, 4))
    made = layer.pool.made
    layer.make_room(90)
    layer.sequences.lengthen(90)
    for tensor in layer.pool.tensors.values():
        tensor.fill_(7.0)
    assert layer.pool.made > made
    cache.restore(snapshot)
    assert all(torch.equal(*pair) for pair in zip(held(), before, strict=True))
