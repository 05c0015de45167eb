"""Block-sparse causal prefill attention over unpadded rows, with per-query-head layouts and native GQA.

Two public functions, for one row and for several, and several backends. `auto` takes the fastest that works here: on
CUDA `fa4` (flash-attn-4, where it is installed and its tiles fit), `hopper` (own, for tiles of 64 and 128 on that
generation of GPUs) or `triton` (own, for all); elsewhere `flex` (FlexAttention, compiled) where a compiler is available
and its blocks are not too small, else `gather`. Which one ran is returned,
never guessed.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..types import Blocks, check_shapes
from . import fa4, flex, gather, naive

logger = logging.getLogger(__name__)

#: With this environment variable set to 1 every call looks at all that its layouts list, which takes time.
DEBUG = "LM_EVAL_SPARSE_DEBUG"

#: Backends in the order in which they are listed to users.
BACKENDS = ("naive", "gather", "flex", "triton", "hopper", "fa4")
#: Those that give `lse`, and take a `sink`.
WITH_LSE = ("naive", "gather", "triton")

#: What the Triton kernel takes.
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def block_sparse_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Blocks,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    lse: Tensor | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, str]:
    """Attend each query to the keys of its block's listed key blocks and single key columns, causally.

    Args:
        query: `(H, L, D)`, any float dtype.
        key, value: `(H_kv, L, D)` and `(H_kv, L, D_v)` with `H % H_kv == 0`; query head h reads KV head
            `h // (H // H_kv)`.
        layout: key blocks, and maybe single key columns, per (query head, query block).
        scale: factor on the scores, default `D ** -0.5`.
        softcap: `c` of `c * tanh(score / c)` (Gemma 2), or None.
        backend: `auto` or one of `BACKENDS`. One that cannot run here is an error, but for `fa4`, an optional package
            with tiles of one size: it falls back to `auto` with a warning, and what ran is returned.
        lse: `(H, L)` fp32 (or fp64, of fp64 queries), contiguous: filled with the natural logarithm of the sum of the
            exponentials of the scaled and capped scores that each query reads. Only the backends `WITH_LSE` give it:
            where it is asked for, others cannot run, `auto` passes them over, and what ran is returned.
        sink: `(H,)` of a float dtype, contiguous: a logit of each query head that joins the denominator of its softmax
            (an attention sink), or None. What would be `out` is then `out * sigmoid(lse - sink)`, where `lse` is that
            of what is read: it does not count the sink. Taken by the same backends.

    Returns:
        `(H, L, D_v)` in the query's dtype, and the name of the backend that computed it.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit together, an unknown backend, or one that cannot run
            here. What the layout lists is checked by `Blocks.check`, which reads all of it: with
            LM_EVAL_SPARSE_DEBUG=1 in the environment every call does that.
    """
    (out,), used = block_sparse_prefill_rows(
        [query],
        [key],
        [value],
        [layout],
        scale=scale,
        softcap=softcap,
        backend=backend,
        lses=None if lse is None else [lse],
        sink=sink,
    )
    return out, used


def block_sparse_prefill_rows(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    layouts: Sequence[Blocks],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    outs: Sequence[Tensor] | None = None,
    lses: Sequence[Tensor] | None = None,
    sink: Tensor | None = None,
) -> tuple[list[Tensor], str]:
    """`block_sparse_prefill` of several rows of any lengths, in one launch where the backend can.

    Args:
        queries, keys, values: one tensor per row, as above, of the same heads, dimensions, dtype and device; views of
            a batch or of a packed sequence will do.
        layouts: one per row; all with the same block sizes and the same kind of columns.
        outs: where to write, one `(H, L, D_v)` per row, or None for new tensors.
        lses: one `lse` per row, or None; sink: that of all rows.
    """
    if not len(queries) == len(keys) == len(values) == len(layouts) or not queries:
        raise ValueError(
            f"{len(queries)} queries, {len(keys)} keys, {len(values)} values and {len(layouts)} layouts given; "
            "expected one of each per row, at least one row"
        )
    for row in zip(queries, keys, values, layouts, strict=True):
        _check(*row)
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        for query, layout in zip(queries, layouts, strict=True):
            layout.check(len(query))
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; expected a positive number, or None")
    _check_alike(queries, keys, values, layouts)
    if outs is not None:
        _check_outs(queries, values, outs)
    if lses is not None:
        _check_lses(queries, lses)
    if sink is not None:
        _check_sink(queries[0], sink)
    scale = queries[0].shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; expected a positive number, or None for head_dim ** -0.5")
    name = _choose([*queries, *keys, *values], layouts[0], softcap, backend, lses is not None, sink is not None)
    if name in ("triton", "hopper"):
        dim = values[0].shape[2]
        outs = [_like(query, dim) for query in queries] if outs is None else list(outs)
        # The kernels read and write the elements of a vector one after the other.
        packed = [out if out.stride(2) == 1 else _like(query, dim) for query, out in zip(queries, outs, strict=True)]
        states = [
            [state if state.stride(2) == 1 else state.contiguous() for state in rows]
            for rows in (queries, keys, values)
        ]
        from triton.errors import TritonError

        try:
            if name == "triton":
                from . import triton

                triton.forward_rows(*states, layouts, scale, softcap, packed, lses=lses, sink=sink)
            else:
                from . import hopper

                for query, key, value, layout, out in zip(*states, layouts, packed, strict=True):
                    hopper.forward_into(query, key, value, layout, scale, out)
        except TritonError as error:  # it does not compile, or not into the shared memory of this GPU
            reason = f"Triton's kernel does not fit or compile ({str(error).splitlines()[-1][:200]})"
            _broken[(name, *_place(queries[0], layouts[0]), dim)] = reason
            if backend == name:
                raise ValueError(f"backend {name!r} cannot run here: {reason}; use 'auto' or 'gather'") from error
            _warn_once(f"backend {name!r}: {reason}; 'auto' chooses another")
            return block_sparse_prefill_rows(
                queries, keys, values, layouts, scale=scale, softcap=softcap, backend="auto", outs=outs, lses=lses,
                sink=sink,
            )  # fmt: skip
        for out, made in zip(outs, packed, strict=True):
            if out is not made:
                out.copy_(made)
        return outs, name
    modules = {"naive": naive, "gather": gather, "flex": flex, "fa4": fa4}
    found = []
    for query, key, value, layout, lse in zip(
        queries, keys, values, layouts, [None] * len(queries) if lses is None else lses, strict=True
    ):
        call = (query, key, value, layout, scale, softcap)
        if name == "flex":
            try:
                found.append(flex.forward(*call))
                continue
            except Exception as error:  # a shape that the probe did not foresee; the compiler raises what it likes
                reason = _broken[("flex", *_place(query, layout), value.shape[-1])] = flex.failed(error)
                if backend == "flex":
                    raise ValueError(f"backend 'flex' cannot run here: {reason}; use 'auto' or 'gather'") from error
            return block_sparse_prefill_rows(
                queries, keys, values, layouts, scale=scale, softcap=softcap, backend="auto", outs=outs, lses=lses,
                sink=sink,
            )  # fmt: skip
        asked = {name: wanted for name, wanted in (("lse", lse), ("sink", sink)) if wanted is not None}
        found.append(modules[name].forward(*call, **asked))
    if outs is not None:
        for out, result in zip(outs, found, strict=True):
            out.copy_(result)
        found = list(outs)
    return found, name


def _choose(
    states: Sequence[Tensor], layout: Blocks, softcap: float | None, backend: str, lse: bool, sink: bool
) -> str:
    """The backend to run.

    Raises:
        ValueError: it is unknown, or cannot run here.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; accepted: auto, {', '.join(BACKENDS)}")
    if backend in ("naive", "gather"):
        return backend
    if backend != "auto":
        if (reason := unavailable_reason(backend, states, layout, softcap, lse, sink)) is None:
            return backend
        if backend != "fa4":
            raise ValueError(f"backend {backend!r} cannot run here: {reason}; use 'auto' or 'gather'")
        _warn_once(f"backend 'fa4' cannot run here: {reason}; 'auto' chooses another")
    query = states[0]
    if query.device.type == "cuda":
        order = ("fa4", "hopper", "triton", "flex")
    elif gather_is_faster(query.device.type, query.dtype, layout.block_k):
        order = ()
    else:
        order = ("flex",)
    wanted = states, layout, softcap, lse, sink
    return next((name for name in order if unavailable_reason(name, *wanted) is None), "gather")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def unavailable_reason(
    backend: str,
    states: Sequence[Tensor],
    layout: Blocks,
    softcap: float | None,
    lse: bool = False,
    sink: bool = False,
) -> str | None:
    """Why a backend other than `naive` and `gather` cannot run this case here, or None when it can.

    Args:
        states: queries, keys and values of all rows, queries first.
        layout: that of the first row.
        lse: whether it is asked for; sink: whether there are sinks.
    """
    if lse and backend not in WITH_LSE:
        return "it gives no lse"
    if sink and backend not in WITH_LSE:
        return "it takes no attention sinks"
    query = states[0]
    dim, value_dim, device = query.shape[-1], states[-1].shape[-1], query.device.type
    if (found := _broken.get((backend, *_place(query, layout), value_dim))) is not None:
        return found
    if backend == "triton":
        if (reason := backends.triton_unavailable(device)) is not None:
            return reason
        if max(dim, value_dim) > MAX_HEAD_DIM:
            return f"heads have {dim} dimensions, of values {value_dim}; the kernel takes {MAX_HEAD_DIM} at most"
        if device == "cuda" and (dim % 16 or value_dim % 16):  # padded rows that are no whole vectors come out wrong
            return f"heads have {dim} dimensions, of values {value_dim}; on CUDA the kernel takes multiples of 16"
        if query.dtype not in DTYPES:
            return f"dtype is {query.dtype}; the kernel takes {', '.join(map(str, DTYPES))}"
        return None
    place = _place(query, layout)
    if softcap is not None:
        return "it takes no softcap"
    if dim != value_dim and backend != "flex":
        return f"keys have {dim} dimensions, values {value_dim}; it takes one number"
    if backend == "hopper":
        if device != "cuda":
            return "it needs a Hopper GPU (compute capability 9.0)"
        if (reason := backends.triton_unavailable(device)) is not None:
            return reason
        try:
            from . import hopper
        except (ImportError, AttributeError) as error:  # Gluon is where Triton changes most
            return f"the Triton that is installed has another Gluon ({error})"
        if (reason := hopper.unavailable_reason(*place)) is not None:
            return reason
        return "strides or addresses are no multiples of 16 bytes" if hopper.misaligned(states) else None
    if layout.columns is not None:
        return "it takes no single key columns"
    if backend == "fa4":
        return fa4.unavailable_reason(*place)
    return flex.unavailable_reason(*place, value_dim)


def gather_is_faster(device: str, dtype: torch.dtype, block: int) -> bool:
    """Half precision in the smallest blocks on CPU: there `flex`, all in fp32, lost (benchmarks/results)."""
    return device == "cpu" and dtype in (torch.bfloat16, torch.float16) and block <= 16


def _place(query: Tensor, layout: Blocks) -> tuple[str, int, int, int, torch.dtype]:
    return query.device.type, layout.block_q, layout.block_k, query.shape[-1], query.dtype


#: Where backends have failed although they should have run, and why.
_broken: dict[tuple[str, str, int, int, int, torch.dtype, int], str] = {}


def _check(query: Tensor, key: Tensor, value: Tensor, layout: Blocks) -> None:
    """The cheap checks that every call makes of every row: they touch shapes only."""
    if query.dim() != 3 or key.dim() != 3:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)}; expected (H, L, D) and (H_kv, L, D)")
    heads, length, dim = query.shape
    if not heads or not length or not dim:
        raise ValueError(f"query is {tuple(query.shape)}; expected at least one head, token and dimension")
    fits = value.dim() == 3 and key.shape[:2] == value.shape[:2] and value.shape[2] > 0
    if not fits or key.shape[1:] != (length, dim) or not key.shape[0] or heads % key.shape[0]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} do not fit together: "
            f"expected (H, L, D), (H_kv, L, D) and (H_kv, L, D_v) with H a multiple of H_kv"
        )
    if not query.dtype.is_floating_point or key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(f"dtypes are {query.dtype}, {key.dtype}, {value.dtype}; expected one floating-point dtype")
    parts = [layout.indices, layout.counts, layout.columns, layout.column_counts]
    places = {part.device for part in parts if part is not None}
    if not query.device == key.device == value.device or places != {query.device}:
        raise ValueError(
            f"devices are {query.device}, {key.device}, {value.device}, layout {', '.join(map(str, places))}; "
            "expected one device"
        )
    if layout.length != length:
        raise ValueError(f"layout is for {layout.length} tokens, query has {length}")
    check_shapes(layout, heads)


def _like(query: Tensor, dim: int) -> Tensor:
    """An output `(H, L, dim)` in memory as models want it next, token by token."""
    heads, length, _ = query.shape
    return query.new_empty(length, heads, dim).transpose(0, 1)


def _check_alike(
    queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], layouts: Sequence[Blocks]
) -> None:
    kinds = {
        (len(query), len(key), query.shape[-1], value.shape[-1], query.dtype, query.device)
        for query, key, value in zip(queries, keys, values, strict=True)
    }
    if len(kinds) > 1:
        raise ValueError(
            f"rows differ in heads, KV heads, dimensions, dtype or device: {sorted(map(str, kinds))}; "
            "expected the same for all rows of a call"
        )
    forms = {(own.block_q, own.block_k, own.columns is None) for own in layouts}
    # The list of a row of one query block is its own and shared.
    kinds_of_lists = {own.columns.shape[1] == 1 for own in layouts if own.columns is not None and own.blocks_q > 1}
    if len(forms) > 1 or len(kinds_of_lists) > 1:
        raise ValueError(
            f"layouts differ in block_q, block_k or kind of columns: {sorted(set(map(_form, layouts)))}; "
            "expected the same in all rows of a call"
        )


def _form(layout: Blocks) -> str:
    columns = "no" if layout.columns is None else "shared" if layout.columns.shape[1] == 1 else "own"
    return f"{layout.block_q}x{layout.block_k} with {columns} columns"


def _check_lses(queries: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if len(lses) != len(queries):
        raise ValueError(f"{len(lses)} lses given for {len(queries)} rows; expected one per row")
    for query, lse in zip(queries, lses, strict=True):
        accepted = (torch.float32, torch.float64) if query.dtype == torch.float64 else (torch.float32,)
        fits = lse.shape == query.shape[:2] and lse.dtype in accepted and lse.is_contiguous()
        if not fits or lse.device != query.device:
            raise ValueError(
                f"lse is {tuple(lse.shape)} {lse.dtype} on {lse.device}; expected contiguous {tuple(query.shape[:2])} "
                f"torch.float32 on {query.device}"
            )


def _check_sink(query: Tensor, sink: Tensor) -> None:
    fits = sink.shape == query.shape[:1] and sink.dtype.is_floating_point and sink.is_contiguous()
    if not fits or sink.device != query.device:
        raise ValueError(
            f"sink is {tuple(sink.shape)} {sink.dtype} on {sink.device}; expected contiguous {tuple(query.shape[:1])} "
            f"of a float dtype on {query.device}"
        )


def _check_outs(queries: Sequence[Tensor], values: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    if len(outs) != len(queries):
        raise ValueError(f"{len(outs)} outs given for {len(queries)} rows; expected one per row")
    for query, value, out in zip(queries, values, outs, strict=True):
        shape = (*query.shape[:2], value.shape[2])
        if out.shape != shape or out.dtype != query.dtype or out.device != query.device:
            raise ValueError(
                f"out is {tuple(out.shape)}, {out.dtype}, {out.device}; expected {shape}, {query.dtype}, {query.device}"
            )
