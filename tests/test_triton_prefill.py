"""The Triton kernel of block-sparse prefill on the CPU, under Triton's interpreter, against fp64 attention.

Shapes, layouts and inputs are fresh in every run. A failing test shows its seed; TRITON_PREFILL_SEED=<seed> repeats it.
The interpreter computes products of bf16 wrongly, so that dtype is tested on GPUs only (test_gpu_prefill.py).
"""

from __future__ import annotations

import itertools
import math
import os
import random
import sys
from collections.abc import Iterator

import pytest
import torch
from prefill_cases import (
    KINDS,
    POISON,
    STRANGE,
    Call,
    Draw,
    Row,
    assert_close,
    attention,
    interpreter_missing,
    random_call,
    random_row,
    strange_states,
)

from lm_eval_sparse.kernels.prefill import block_sparse_prefill, block_sparse_prefill_rows
from lm_eval_sparse.kernels.types import BLOCK_SIZES, Blocks

if (reason := interpreter_missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from lm_eval_sparse.kernels.prefill import triton as kernel

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")

DTYPES = (torch.float32, torch.float16)
#: Query heads and KV heads: groups of 1, 3 and 7, and one KV head.
HEADS = ((2, 2), (6, 2), (7, 1), (1, 1))
#: Rows of one call, by whether they are several.
ROWS = {False: ([1], [63], [257], [100], [333]), True: ([1, 140, 63], [63, 1], [17, 16, 15, 1], [20, 257])}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def draw() -> Draw:
    seed = int(os.environ.get("TRITON_PREFILL_SEED") or random.SystemRandom().randrange(1 << 31))
    print(f"TRITON_PREFILL_SEED={seed}")
    return Draw(seed)


def deck(draw: Draw, values) -> Iterator:
    """The values over and over, each time shuffled: a small sample holds all of them."""
    while True:
        yield from draw.rng.sample(list(values), len(values))


def run(call: Call, choice: kernel.Tiling) -> None:
    kernel.forward_rows(*call.inputs, call.scale, call.softcap, call.outs, choice)
    call.check()


@pytest.mark.parametrize("block_k", BLOCK_SIZES)
@pytest.mark.parametrize("block_q", BLOCK_SIZES)
def test_tilings(draw: Draw, block_q: int, block_k: int) -> None:
    """All pairs of block sizes, with query blocks together and keys in steps of all sizes."""
    heads, kinds, dtypes = (deck(draw, values) for values in (HEADS, KINDS, DTYPES))
    caps, many = deck(draw, (None, None, 5.0, 50.0)), deck(draw, (False, True))
    rows = {several: deck(draw, lists) for several, lists in ROWS.items()}
    for together, step in draw.rng.sample(list(itertools.product((1, 2, 4), (32, 64, 128))), 3):
        kind = next(kinds)
        lengths = next(rows[next(many)])
        if kind == "own":
            together = 1  # and more than one query block, so that they are not shared ones
            lengths = [block_q + min(length, 140) for length in lengths]
        case = {"kind": kind, "softcap": next(caps), "heads": next(heads), "dtype": next(dtypes), "lengths": lengths}
        print(case, "together", together, "step", step)
        call = random_call(draw, dim=64, blocks=(block_q, block_k), **case)
        run(call, kernel.Tiling(together, step, 4, 2))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_public_function(draw: Draw, dim: int, heads: tuple[int, int]) -> None:
    """The tiling that is chosen, all head dimensions; outputs are written where they are asked for."""
    kind, dtype = draw.rng.choice(KINDS), draw.rng.choice(DTYPES)
    blocks = draw.rng.choice(BLOCK_SIZES), draw.rng.choice(BLOCK_SIZES)
    lengths = draw.rng.choice(([140], [63, 90], [17, 80, 1], [blocks[0] - 3, blocks[0] + 20]))
    softcap = draw.rng.choice((None, 5.0))
    call = random_call(draw, lengths, heads, dim, dtype, blocks, kind=kind, softcap=softcap)
    print(kind, dtype, blocks, lengths, softcap)
    options = {"scale": call.scale, "softcap": softcap, "backend": "triton"}
    outs, used = block_sparse_prefill_rows(*call.inputs, **options, outs=call.outs)
    assert used == "triton" and all(out is given for out, given in zip(outs, call.outs, strict=True))
    call.check()
    fresh, used = block_sparse_prefill_rows(*call.inputs, **options)
    assert used == "triton" and fresh[0].dtype == dtype
    call.check(fresh)
    row = draw.rng.randrange(len(lengths))
    alone, used = block_sparse_prefill(*(part[row] for part in call.inputs), **options)
    assert used == "triton" and torch.equal(alone, fresh[row])  # neighbours change nothing


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129])
def test_edges_of_blocks(draw: Draw, length: int) -> None:
    for block_q, block_k in draw.rng.sample(list(itertools.product(BLOCK_SIZES, BLOCK_SIZES)), 2):
        for together in (1, 4):
            call = random_call(draw, [length], (1, 1), 64, torch.float32, (block_q, block_k), kind=None)
            run(call, kernel.Tiling(together, 64, 4, 2))


@pytest.mark.parametrize("together", [1, 2, 4])
def test_every_tile_is_dense_attention(draw: Draw, together: int) -> None:
    for blocks in ((16, 16), (32, 128), (64, 16)):
        length = 205
        n_q, n_k = (-(-length // block) for block in blocks)
        last = torch.clamp((torch.arange(n_q) + 1) * blocks[0], max=length) - 1
        causal = torch.arange(n_k) * blocks[1] <= last[:, None]
        layout = Blocks.from_mask(causal.expand(3, -1, -1), length, *blocks)
        states = [draw.normal(heads, length, 64) for heads in (3, 1, 1)]
        out = kernel.forward(*states, layout, 0.125, None, kernel.Tiling(together, 64, 4, 2))
        dense = torch.nn.functional.scaled_dot_product_attention(
            *(state.double()[None] for state in states), is_causal=True, enable_gqa=True, scale=0.125
        )
        assert_close(out, dense[0])


def test_columns_only_where_tiles_leave_a_query_alone(draw: Draw) -> None:
    """The first steps of a query find no key: its tiles lie after it, and a column gives it one."""
    length, block_q = 300, 128
    indices = torch.tensor([[[7], [15], [18]]], dtype=torch.int32).expand(2, -1, -1)  # the end of each query block
    counts = torch.ones(2, 3, dtype=torch.int32)
    columns = torch.tensor([[[0, POISON]]], dtype=torch.int32).expand(2, -1, -1)
    states = [draw.normal(heads, length, 64) for heads in (2, 1, 1)]
    keys = torch.zeros(2, 3, length, dtype=torch.bool)
    keys[..., 0] = True
    for block, tile in enumerate((7, 15, 18)):
        keys[:, block, tile * 16 : (tile + 1) * 16] = True
    for own in (False, True):
        lists = columns.expand(-1, 3, -1) if own else columns
        layout = Blocks(indices, counts, length, block_q, 16, lists.contiguous(), counts)
        layout.check(2)
        expected = attention(*states, Row(layout, keys), 0.125, None)
        for step in (32, 128):
            assert_close(kernel.forward(*states, layout, 0.125, None, kernel.Tiling(1, step, 4, 2)), expected)


@pytest.mark.parametrize("kinds", [("own", "own"), ("shared", "own"), ("own", "shared")], ids=str)
@pytest.mark.parametrize("lengths", [(20, 100), (100, 20)], ids=str)
def test_rows_of_one_query_block_beside_longer_ones(
    draw: Draw, kinds: tuple[str, str], lengths: tuple[int, int]
) -> None:
    """Their lists of columns look shared, whatever they are."""
    if "shared" in kinds and lengths[kinds.index("shared")] > 32:
        kinds = ("own", "own")  # long rows of both kinds are refused
    rows = [random_row(draw, 2, length, 32, 32, kind) for length, kind in zip(lengths, kinds, strict=True)]
    states = [[draw.normal(heads, length, 64) for length in lengths] for heads in (2, 1, 1)]
    outs, _ = block_sparse_prefill_rows(*states, [row.layout for row in rows], scale=0.125, backend="triton")
    for place, (out, row) in enumerate(zip(outs, rows, strict=True)):
        assert_close(out, attention(*(state[place] for state in states), row, 0.125, None))


def test_a_kernel_that_does_not_fit_gives_way(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """`triton` asked for: an error. `auto`: another backend, whose name is returned."""
    from triton.runtime.errors import OutOfResources

    from lm_eval_sparse.kernels import prefill as package

    def too_large(*_: object, **__: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    row = random_row(draw, 2, 100, 32, 32, None)
    states = [draw.normal(heads, 100, 64) for heads in (2, 1, 1)]
    monkeypatch.setattr(package, "_broken", {})
    monkeypatch.setattr(kernel, "forward_rows", too_large)
    with pytest.raises(ValueError, match="triton.*does not fit.*shared memory"):
        block_sparse_prefill(*states, row.layout, scale=0.125, backend="triton")
    monkeypatch.setattr(package, "_choose", lambda *_: "gather" if package._broken else "triton")
    package._broken.clear()
    out, used = block_sparse_prefill(*states, row.layout, scale=0.125)
    assert used == "gather"
    assert_close(out, attention(*states, row, 0.125, None))


def test_another_gluon_is_a_reason_not_a_crash(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval_sparse.kernels import prefill as package

    class OnHopper:
        """A tensor as far as the choice of a backend looks at it."""

        device, dtype, shape = torch.device("cuda"), torch.float16, (2, 100, 64)

    monkeypatch.setattr(package.backends, "triton_unavailable", lambda device: None)
    monkeypatch.setitem(sys.modules, package.__name__ + ".hopper", None)  # importing it raises ImportError
    monkeypatch.delattr(package, "hopper", raising=False)
    layout = random_row(draw, 2, 100, 64, 64, None).layout
    assert "another Gluon" in package.unavailable_reason("hopper", [OnHopper()], layout, None)


def test_columns_on_top_of_tiles(draw: Draw) -> None:
    """What the Hopper kernel does with columns: the softmax over tiles goes on from its sums."""
    for block, length in ((64, 200), (128, 333), (64, 63)):
        bare = random_row(draw, 3, length, block, block, None)
        columns = draw.uniform(3, length) < 0.2
        row = Row(bare.layout.with_columns(columns), bare.keys | columns[:, None])
        states = [draw.normal(heads, length, 64) for heads in (3, 1, 1)]
        scores = states[0].double() @ states[1].double().transpose(1, 2) * 0.125
        sums = scores.masked_fill(~bare.pairs(), -torch.inf).logsumexp(-1) / math.log(2)
        out = attention(*states, bare, 0.125, None).float()
        kernel.add_columns(*states, row.layout, 0.125, out, sums.float().contiguous())
        assert_close(out, attention(*states, row, 0.125, None))


def test_empty_lists_of_columns(draw: Draw) -> None:
    """Lists of width 0, and lists that hold poison only."""
    row = random_row(draw, 2, 150, 32, 32, None)
    states = [draw.normal(heads, 150, 64) for heads in (2, 1, 1)]
    expected = attention(*states, row, 0.125, None)
    tiles = row.layout.indices, row.layout.counts, 150, 32, 32
    none = torch.zeros_like(row.layout.counts)
    for lists in (1, row.layout.blocks_q):
        for width in (0, 3):
            columns = torch.full((2, lists, width), POISON, dtype=torch.int32)
            layout = Blocks(*tiles, columns, none)
            layout.check(2)
            assert_close(block_sparse_prefill(*states, layout, scale=0.125, backend="triton")[0], expected)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_scores_of_any_size(draw: Draw, softcap: float | None) -> None:
    """Scores of thousands, with the largest at the first keys, at the last, and all far below zero."""
    length = 200
    row = random_row(draw, 1, length, 32, 32, "shared")
    for ramp in (torch.linspace(4000, 0, length), torch.linspace(0, 4000, length), torch.full((length,), -4000.0)):
        query, key, value = (draw.normal(1, length, 64) for _ in range(3))
        query[..., 0], key[..., 0] = 1.0, ramp
        out, _ = block_sparse_prefill(query, key, value, row.layout, scale=1.0, softcap=softcap, backend="triton")
        # fp32 keeps some 4000 * 2**-23 of such a score.
        assert_close(out, attention(query, key, value, row, 1.0, softcap), factor=200)


@pytest.mark.parametrize("name", STRANGE)
def test_strides(draw: Draw, name: str) -> None:
    """Alone, and beside a row with strides of its own."""
    row, other = (random_row(draw, 2, length, 32, 16, None) for length in (140, 90))
    states = strange_states(draw, name, 140, 64)
    more = [draw.normal(2, 90, 64) for _ in range(3)]
    pairs = [list(pair) for pair in zip(states, more, strict=True)]
    outs, used = block_sparse_prefill_rows(*pairs, [row.layout, other.layout], scale=0.125, backend="triton")
    assert used == "triton"
    assert_close(outs[0], attention(*states, row, 0.125, None))
    assert_close(outs[1], attention(*more, other, 0.125, None))
    assert_close(
        block_sparse_prefill(*states, row.layout, scale=0.125, backend="triton")[0],
        attention(*states, row, 0.125, None),
    )


def test_auto_is_not_the_interpreter(draw: Draw) -> None:
    call = random_call(draw, [63], (2, 1), 64, torch.float32, (16, 16), kind="shared")
    outs, used = block_sparse_prefill_rows(*call.inputs, scale=call.scale)
    assert used == "gather"
    call.check(outs)
