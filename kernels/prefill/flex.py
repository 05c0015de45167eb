"""Adapter to torch FlexAttention: our layout becomes a `BlockMask`, the kernel is compiled once per block size.

Shapes are compiled as symbols, so prompts of different lengths do not trigger another compilation. On CPU the
inputs are computed in fp32, which inductor's CPU kernel handles faster than bf16.
"""

from __future__ import annotations

import functools
import logging
import shutil

import torch
from torch import Tensor

from ..types import Blocks
from . import naive

logger = logging.getLogger(__name__)

#: Sparse block sizes that the CUDA template's tiles divide; the CPU template takes all of ours.
CUDA_BLOCK_SIZES = (128,)


@functools.cache
def unavailable_reason(
    device: str,
    block_q: int,
    block_k: int,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    value_dim: int | None = None,
) -> str | None:
    """Why `flex` cannot run here, or None when it can. The first call for these arguments compiles and probes."""
    if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler on PATH (FlexAttention compiles its CPU kernel)"
    if device == "cuda" and not {block_q, block_k} <= set(CUDA_BLOCK_SIZES):
        return f"FlexAttention's CUDA kernel takes blocks of {CUDA_BLOCK_SIZES}, not {block_q}x{block_k}"
    if device not in ("cpu", "cuda"):
        return f"FlexAttention is not used on device {device!r}"
    length = 4 * max(block_q, block_k) + 1
    # Several KV heads, as models have: a dimension of 1 would be compiled as a constant.
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, dim), (2, dim), (2, value_dim or dim))
    states = [torch.randn(heads, length, size, generator=generator).to(device, dtype) for heads, size in sizes]
    n_q, n_k = -(-length // block_q), -(-length // block_k)
    last = torch.clamp((torch.arange(n_q) + 1) * block_q, max=length) - 1
    mask = (torch.rand(4, n_q, n_k, generator=generator) < 0.5) & (torch.arange(n_k) * block_k <= last[:, None])
    mask[..., 0] = True
    layout = Blocks.from_mask(mask.to(device), length, block_q, block_k)
    try:
        out = forward(*states, layout, dim**-0.5, None)
    except Exception as error:  # whatever the compiler stack raises, `gather` still works
        return failed(error)
    expected = naive.forward(*(state.float() for state in states), layout, dim**-0.5, None)
    if not torch.allclose(out.float(), expected, atol=3e-2):
        return "FlexAttention computed a wrong result for a known case"
    return None


def failed(error: Exception) -> str:
    """Warn that the kernel did not compile or run, and return the reason. Compilers put it in one of many lines."""
    lines = [line.strip() for line in str(error).splitlines() if "Error" in line] or [type(error).__name__]
    reason = f"FlexAttention does not compile here ({lines[0][:200]})"
    logger.warning("%s; using the gather backend", reason)
    return reason


@functools.cache
def _compiled(block_q: int, block_k: int):
    """The compiled kernel of one pair of block sizes.

    The compiler keeps its variants per code object and gives up (running uncompiled, at L x L memory) after a
    handful, so each pair of block sizes gets a code object of its own.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def kernel(query, key, value, block_mask, scale, enable_gqa):
        return flex_attention(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=enable_gqa)

    kernel.__code__ = kernel.__code__.replace(co_name=f"flex_{block_q}x{block_k}")

    def causal(batch, head, q_index, kv_index):
        return q_index >= kv_index

    def run(query, key, value, partial_counts, partial_indices, full_counts, full_indices, scale):
        from torch.nn.attention.flex_attention import BlockMask

        block_mask = BlockMask.from_kv_blocks(
            partial_counts,
            partial_indices,
            full_counts,
            full_indices,
            BLOCK_SIZE=(block_q, block_k),
            mask_mod=causal,
            seq_lengths=(query.shape[2], key.shape[2]),
        )
        return compiled(query, key, value, block_mask, scale, query.shape[1] != key.shape[1])

    # Without fullgraph the compiler would fall back to an uncompiled kernel of L x L memory with a mere warning.
    compiled = torch.compile(kernel, dynamic=True, fullgraph=True)
    return run


def forward(query: Tensor, key: Tensor, value: Tensor, layout: Blocks, scale: float, softcap: float | None) -> Tensor:
    """See `block_sparse_prefill`. Computes in fp32 on CPU, in the input dtype on CUDA; no softcap, no columns."""
    if softcap is not None:
        # A score modification that holds a float does not compile on CPU with symbolic shapes (torch 2.13).
        raise ValueError("backend 'flex' does not take a softcap; use 'gather' or 'auto'")
    if layout.columns is not None:
        raise ValueError("backend 'flex' does not take single key columns; use 'gather' or 'auto'")
    mask = layout.mask()
    device = query.device
    starts_q = torch.arange(layout.blocks_q, device=device) * layout.block_q
    ends_k = torch.clamp((torch.arange(layout.blocks_k, device=device) + 1) * layout.block_k, max=layout.length)
    # A tile is full when its first query sees its last key; the other tiles apply the causal mask inside.
    full = ends_k[None, :] - 1 <= starts_q[:, None]
    work = torch.float32 if device.type == "cpu" else query.dtype
    q, k, v = (tensor[None].to(work).contiguous() for tensor in (query, key, value))
    run = _compiled(layout.block_q, layout.block_k)
    return run(q, k, v, *_kv_blocks(mask & ~full), *_kv_blocks(mask & full), scale)[0].to(query.dtype)


def _kv_blocks(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts `(1, H, n_q)` and ids `(1, H, n_q, n_k)` as `BlockMask` wants them: listed ids first."""
    indices = torch.sort((~mask).to(torch.int8), dim=-1, stable=True).indices
    return mask.sum(-1, dtype=torch.int32)[None], indices.to(torch.int32)[None]
