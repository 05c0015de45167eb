"""Adapter to the package flash-attn-4 (CuTe DSL): block-sparse prefill in 128x128 tiles on Hopper, dense attention.

The package takes two lists for each query block: tiles that it masks inside, and tiles that it computes whole. With
square blocks the last listed tile alone can need a mask, so both come from our layout without a pass over it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Blocks
from . import naive

logger = logging.getLogger(__name__)

#: The oldest release whose block lists may be narrower than the prompt has key blocks.
OLDEST = "4.0.0b36"
INSTALL = 'pip install "lm-eval-sparse[fa4]"'
#: The package's own tiles for head dimensions up to 128; a sparse key block must be one of its tiles.
BLOCK = 128
DTYPES = (torch.bfloat16, torch.float16)
#: Compute capabilities (major) that the package has kernels for, of those that it is the fastest on.
HOPPER, BLACKWELL = 9, (10, 11)


@functools.cache
def unavailable_reason(device: str, block_q: int, block_k: int, dim: int, dtype: torch.dtype) -> str | None:
    """Why `forward` cannot run here, or None when it can. The first call for these arguments compiles and probes.

    Args:
        device: type of the device.
        block_q, block_k: block sizes of the layout in tokens.
        dim: head dimension.
        dtype: of query, key and value.
    """
    if (reason := _missing(device, dim, dtype)) is not None:
        return reason
    if torch.cuda.get_device_capability()[0] != HOPPER:
        return "flash-attn-4 takes query blocks of 256 on Blackwell; layouts have at most 128"
    if (block_q, block_k) != (BLOCK, BLOCK):
        return f"flash-attn-4 takes blocks of {BLOCK}x{BLOCK}, not {block_q}x{block_k}"
    if dim > BLOCK:
        return f"flash-attn-4's tiles fit blocks of {BLOCK} for head_dim up to {BLOCK}, not {dim}"
    length = 4 * BLOCK + 1
    query, key, value = _states(length, dim, dtype)
    blocks = torch.arange(-(-length // BLOCK), device="cuda")
    # Rows with and without their diagonal tile, and with the diagonal tile alone.
    mask = (blocks[:, None] - blocks) % 2 == torch.arange(4, device="cuda")[:, None, None] % 2
    mask = mask & (blocks <= blocks[:, None])
    mask[..., 0] |= ~mask.any(-1)
    layout = Blocks.from_mask(mask, length, BLOCK, BLOCK)
    return _probe(
        lambda: forward(query, key, value, layout, dim**-0.5, None),
        lambda: naive.forward(query.float(), key.float(), value.float(), layout, dim**-0.5, None),
    )


def forward(query: Tensor, key: Tensor, value: Tensor, layout: Blocks, scale: float, softcap: float | None) -> Tensor:
    """See `block_sparse_prefill`. The result is a view of `(L, H, D)` memory; no softcap, no columns."""
    if softcap is not None or layout.columns is not None:
        what = "a softcap" if softcap is not None else "single key columns"
        raise ValueError(f"backend 'fa4' does not take {what}; use 'triton' or 'auto'")
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    # A causal mask changes nothing in a last tile that lies before the diagonal.
    before, width = layout.counts - 1, layout.indices.shape[-1]
    last = layout.indices.gather(-1, before.long().unsqueeze(-1))
    lists = BlockSparseTensorsTorch(
        mask_block_cnt=torch.ones_like(before).unsqueeze(0),
        mask_block_idx=last.unsqueeze(0),
        full_block_cnt=before.unsqueeze(0),
        full_block_idx=layout.indices.narrow(-1, 0, min(width, layout.blocks_k)).unsqueeze(0),
        block_size=(layout.block_q, layout.block_k),
    )
    # Heads have lists of their own, which rules out that the package packs the query heads of a KV head.
    out, _ = flash_attn_func(
        *(tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)),
        softmax_scale=scale,
        mask_mod=_causal(),
        block_sparse_tensors=lists,
        pack_gqa=False,
    )
    return out.squeeze(0).transpose(0, 1)


@functools.cache
def dense_unavailable_reason(device: str, dim: int, dtype: torch.dtype) -> str | None:
    """Why `dense` cannot run here, or None when it can. The first call for these arguments compiles and probes."""
    if (reason := _missing(device, dim, dtype)) is not None:
        return reason
    if torch.cuda.get_device_capability()[0] != HOPPER and 128 < dim < 256:
        return f"flash-attn-4 takes head_dim up to 128, or 256, here, not {dim}"
    states = [tensor[None] for tensor in _states(2 * BLOCK + 1, dim, dtype)]
    return _probe(
        lambda: dense(*states, dim**-0.5),
        lambda: F.scaled_dot_product_attention(*(state.float() for state in states), is_causal=True, enable_gqa=True),
    )


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of `(B, H, q_len, D)` queries, the last of `(B, H_kv, kv_len, D)` keys; bf16 or fp16.

    Returns:
        `(B, H, q_len, D)`, a view of `(B, q_len, H, D)` memory.
    """
    from flash_attn.cute.interface import flash_attn_func

    out, _ = flash_attn_func(
        *(tensor.transpose(1, 2) for tensor in (query, key, value)), softmax_scale=scale, causal=True
    )
    return out.transpose(1, 2)


def installed() -> str | None:
    """The installed version of flash-attn-4, or None."""
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing(device: str, dim: int, dtype: torch.dtype) -> str | None:
    """What both kernels lack here: the package, a GPU that it has kernels for, a dtype, a head dimension."""
    if device != "cuda" or torch.version.hip is not None:
        return f"flash-attn-4 runs on NVIDIA GPUs, not on device {device!r}" + (" (ROCm)" if device == "cuda" else "")
    if (found := installed()) is None:
        return f"the package flash-attn-4 is not installed ({INSTALL})"
    if _order(found) < _order(OLDEST):
        return f"flash-attn-4 {found} is too old: {OLDEST} or newer is needed ({INSTALL})"
    capability = torch.cuda.get_device_capability()
    if capability[0] not in (HOPPER, *BLACKWELL):
        version = ".".join(map(str, capability))
        return f"flash-attn-4 is used on Hopper and Blackwell GPUs (compute capability 9, 10, 11), not on {version}"
    if dtype not in DTYPES:
        return f"flash-attn-4 takes {' and '.join(map(str, DTYPES))}, not {dtype}"
    if dim % 8 or not 8 <= dim <= 256:
        return f"flash-attn-4 takes head dimensions that are multiples of 8 up to 256, not {dim}"
    return None


def _order(version: str) -> tuple[int, ...]:
    """Sorts versions; `4.0.0b36` comes before `4.0.0`, what follows (`.post1`, `+local`) is left out."""
    numbers, stage, count = re.match(r"(\d+(?:\.\d+)*)(?:(a|b|rc)(\d+))?", version).groups()
    stages = {"a": 0, "b": 1, "rc": 2, None: 3}
    release = [int(number) for number in numbers.split(".")]
    return (*(release + [0, 0])[:3], stages[stage], int(count or 0))


@functools.cache
def _causal():
    """The mask inside a tile, which the package compiles into its kernel; one object, so that it compiles once."""
    import cutlass.cute as cute

    @cute.jit
    def causal(batch, head, query_index, key_index, lengths, tensors):
        return query_index >= key_index

    return causal


def _states(length: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Random query, key and value of 4 query and 2 KV heads."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(heads, length, dim, generator=generator).to("cuda", dtype) for heads in (4, 2, 2)]


def _probe(run, expected) -> str | None:
    """Why a small known case fails, or None. A compiler stack raises what it likes."""
    try:
        wrong = not torch.allclose(run().float(), expected(), atol=3e-2)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        reason = f"flash-attn-4 {installed()} does not run here ({type(error).__name__}: {lines[0][:200]})"
        logger.warning("%s", reason)
        return reason
    return "flash-attn-4 computed a wrong result for a known case" if wrong else None
