"""Block-sparse causal prefill attention over one unpadded row, with per-query-head layouts and native GQA.

One public function, several backends. `auto` takes the fastest that works here: `flex` (FlexAttention,
compiled) where a compiler is available and its blocks are not too small, else `gather`. Which one ran is
returned, never guessed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BlockLayout, check_shapes
from . import flex, gather, naive

BACKENDS = {"naive": naive.forward, "gather": gather.forward, "flex": flex.forward}


def block_sparse_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, str]:
    """Attend each query to the keys of its block's listed key blocks and single key columns, causally.

    Args:
        query: `(H, L, D)`, any float dtype.
        key, value: `(H_kv, L, D)` with `H % H_kv == 0`; query head h reads KV head `h // (H // H_kv)`.
        layout: key blocks, and maybe single key columns, per (query head, query block).
        scale: factor on the scores, default `D ** -0.5`.
        softcap: `c` of `c * tanh(score / c)` (Gemma 2), or None.
        backend: `auto`, `naive`, `gather` or `flex`.

    Returns:
        `(H, L, D)` in the query's dtype, and the name of the backend that computed it.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit together, or an unknown backend.
    """
    heads, length, dim = query.shape
    if key.shape != value.shape or key.shape[1:] != (length, dim) or not key.shape[0] or heads % key.shape[0]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} do not fit together: "
            f"expected (H, L, D) and (H_kv, L, D) with H a multiple of H_kv"
        )
    if not query.dtype.is_floating_point or key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(f"dtypes are {query.dtype}, {key.dtype}, {value.dtype}; expected one floating-point dtype")
    if not query.device == key.device == value.device == layout.indices.device:
        raise ValueError(
            f"devices are {query.device}, {key.device}, {value.device}, layout {layout.indices.device}; "
            "expected one device"
        )
    if layout.length != length:
        raise ValueError(f"layout is for {layout.length} tokens, query has {length}")
    check_shapes(layout, heads)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; accepted: auto, {', '.join(BACKENDS)}")
    scale = dim**-0.5 if scale is None else scale
    call = (query, key, value, layout, scale, softcap)
    place = (query.device.type, layout.block_q, layout.block_k, dim, query.dtype)
    if backend == "auto" and gather_is_faster(query.device.type, query.dtype, layout.block_k):
        backend = "gather"
    if backend in ("auto", "flex"):
        if softcap is not None or layout.columns is not None:
            reason = "it takes no softcap" if softcap is not None else "it takes no single key columns"
        else:
            reason = flex.unavailable_reason(*place)
        if place in _broken:
            reason = _broken[place]
        if reason is None:
            try:
                return flex.forward(*call), "flex"
            except Exception as error:  # a shape that the probe did not foresee; the compiler raises what it likes
                reason = _broken[place] = flex.failed(error)
        if backend == "flex":
            raise ValueError(f"backend 'flex' cannot run here: {reason}; use 'auto' or 'gather'")
        backend = "gather"
    return BACKENDS[backend](*call), backend


def gather_is_faster(device: str, dtype: torch.dtype, block: int) -> bool:
    """Half precision in the smallest blocks on CPU: there `flex`, all in fp32, lost (benchmarks/results)."""
    return device == "cpu" and dtype in (torch.bfloat16, torch.float16) and block <= 16


#: Where `flex` has failed although its probe ran, and why.
_broken: dict[tuple, str] = {}
