"""A few small calls of every Triton kernel of the prefill path, for NVIDIA's compute-sanitizer:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=tests:.
    compute-sanitizer --tool memcheck python tests/sanitize_prefill.py

Without the caching allocator every tensor has bounds of its own, so that a read behind a list or a row is seen. The
results are checked as well. Not collected by pytest.
"""

from __future__ import annotations

import time

import torch
from prefill_cases import Draw, random_call

from lm_eval_sparse.kernels.prefill import BACKENDS, block_sparse_prefill_rows
from lm_eval_sparse.methods import METHODS
from lm_eval_sparse.testing import select

HALF = torch.bfloat16
#: Block sizes, head_dim, dtype, kind of columns, softcap, lengths: each pair of lines takes other paths of the kernel.
OPERATOR = [
    ((128, 128), 128, HALF, None, None, [301]),
    ((128, 128), 64, HALF, None, None, [1, 129, 300]),
    ((64, 64), 80, torch.float16, "shared", 20.0, [200]),
    ((64, 16), 128, HALF, "own", None, [131]),
    ((16, 16), 96, HALF, None, None, [77, 1, 150]),
    ((16, 128), 64, torch.float32, "shared", None, [150, 20]),
    ((32, 32), 256, HALF, "shared", 20.0, [100]),
    ((32, 64), 128, torch.float32, "own", None, [90, 70]),
]
#: Method, knobs, sparsity: all estimators, the choice of blocks, of coverage and of verticals and slashes, and solves.
SELECTIONS = [
    ("vertical_slash", {"verticals": 40, "slashes": 20, "tile": 32, "window": 70}, None),
    ("vertical_slash", {}, 0.7),
    ("flexprefill", {"gamma": 0.7, "min_budget": 0, "block_size": 32, "tau": 0.0}, None),
    ("flexprefill", {"block_size": 32, "tau": 1.0}, 0.6),
    ("flexprefill", {"tau": 0.1}, 0.6),
    ("flexprefill_vs", {"alpha": 0.5, "min_budget": 8, "tile": 32, "window": 64}, None),
    ("flexprefill_vs", {}, 0.7),
    ("block_sparse", {"top_k": 4, "block_size": 32}, None),
    ("block_sparse", {}, 0.7),
]


def main() -> None:
    draw = Draw(3, "cuda")
    start = time.monotonic()
    for blocks, dim, dtype, kind, softcap, lengths in OPERATOR:
        heads = (6, 2) if dim != 96 else (7, 1)
        call = random_call(draw, lengths, heads, dim, dtype, blocks, kind=kind, softcap=softcap)
        for backend in ("triton", "hopper"):
            if backend not in BACKENDS:
                continue
            try:
                outs, used = block_sparse_prefill_rows(
                    *call.inputs, scale=call.scale, softcap=softcap, backend=backend, outs=call.outs
                )
            except ValueError as error:  # not for this case, or not for this GPU
                print(f"{backend} {blocks}: {error}")
                continue
            call.check()
            print(f"{used} {blocks} head_dim {dim} {kind} {softcap} {lengths}: {time.monotonic() - start:.1f} s")
            for layout in call.layouts:
                layout.executed_pairs()
    for name, knobs, sparsity in SELECTIONS:
        for heads, kv_heads, length, dim in ((6, 2, 777, 64), (7, 1, 401, 80))[: 2 if sparsity is None else 1]:
            query, key = (draw.normal(number, length, dim).to(HALF) for number in (heads, kv_heads))
            selection = select(METHODS[name](**knobs), query, key, scale=dim**-0.5, softcap=None, sparsity=sparsity)
            torch.cuda.synchronize()
            selection.check(heads)
            selection.executed_pairs(), selection.keys_read(), selection.selected_pairs()
        print(f"{name} {knobs} {sparsity}: {time.monotonic() - start:.1f} s")
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
