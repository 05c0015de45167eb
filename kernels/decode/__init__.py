"""Decode attention: each new token attends to all keys of its sequence, or to those of the pages selected for it.

One public function, several backends, over sequences of different lengths in one flat storage (`ragged.RaggedKV`),
with native GQA: the query heads of a KV head may share their pages (and then its keys are read once) or have
their own. `auto` is `triton` on CUDA, else `gather`. The output of a sequence does not depend, to the bit, on which
other sequences are in the call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import triton_unavailable
from ..types import RaggedKV, Reads
from . import gather, naive

#: Backends in the order in which they are listed to users.
BACKENDS = ("naive", "gather", "triton")

#: What the Triton kernel takes.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


def paged_decode(
    query: Tensor,
    kv: RaggedKV,
    selection: Reads | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    backend: str = "auto",
    keys_read: Tensor | None = None,
    lse: Tensor | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, str]:
    """Attention of the last T tokens of each sequence to its keys, or to those of their pages.

    Args:
        query: `(S, G, T, D)`; query t sees the first `lengths[s] - T + 1 + t` keys of sequence s at most.
        kv: keys and values of the S sequences, those of the T tokens included.
        selection: pages per (sequence, query head or all of the group, token), or None for all keys. Its `bias` is
            added to the scaled and capped scores, its `extra` keys and values are read besides.
        scale: factor on the scores.
        softcap: `c` of `c * tanh(score / c)`, or None.
        window: only that many of the last keys that a token may see, itself included; without a selection only.
        backend: `auto`, `naive`, `gather` or `triton`.
        keys_read: `(S, Gs, T)` int32, contiguous, Gs as in the selection, else 1: filled with the number of keys that
            each token attends to, virtual ones not counted. `triton` gives minus the `faults` of a list that has some
            instead.
        lse: `(S, G, T)` fp32 (or fp64, of fp64 queries), contiguous: filled with the natural logarithm of the sum of
            the exponentials of all scores that a token reads, virtual ones included; minus infinity at sequences of
            length 0. Asking for it changes no bit of the output.
        sink: `(H,)` of a float dtype, contiguous, for the `kv.heads * G` query heads of a row: a logit of each that
            joins the denominator of its softmax (an attention sink), or None. It is not counted in `lse`: what would
            be the output is then `out * sigmoid(lse - sink)`.

    Returns:
        `(S, G, T, D_v)` in the query's dtype, 0 at sequences of length 0 and where biases of minus infinity hide all
        that is listed, and the name of the backend that computed it. On CUDA `triton` does not wait for the device.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit together, a window with a selection, an unknown backend
            or one that cannot run here. What a selection lists is looked at by `Reads.check`, and by
            `triton` where it gives `keys_read`; whatever is listed, `triton` reads keys that a token may see.
    """
    kv.check(query)
    _check(query, kv, selection, softcap, window, keys_read)
    if lse is not None:
        _check_lse(query, lse)
    if sink is not None:
        _check_sink(query, kv, sink)
    name = choose_backend(query, kv, backend)
    if name == "triton":
        from . import triton

        return triton.forward(query, kv, selection, scale, softcap, window, keys_read, lse, sink), name
    if keys_read is not None:
        keys_read.copy_(_dense_keys(kv, query.shape[2], window) if selection is None else selection.keys_read(kv))
    forward = naive.forward if name == "naive" else gather.forward
    return forward(query, kv, selection, scale, softcap, window, lse, sink), name


def mass(
    query: Tensor,
    kv: RaggedKV,
    selection: Reads | None,
    lse: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """How much each key that was read weighs in the output of each token: a second pass, from `lse`.

    No two programs add to one number, and sums are made in a fixed order: as with the output, the weights of a
    sequence do not depend on its neighbours to the bit. Costs no host synchronisation, but for `naive`.

    Args:
        query, kv, selection, scale, softcap: as in the call of `paged_decode` that filled `lse`.
        lse: `(S, G, T)` that it filled.
        backend: `auto`, `naive`, `gather` or `triton`.

    Returns:
        `(S, G, T, W * unit)` in the dtype of `lse`: place `w * unit + i` is key i of the w-th listed page, 0 where
        there is none that the token may see. Without a selection `(S, G, T, longest)`, a place for each key. The sum
        is 1, less what virtual keys weigh; what a sink weighs is left out of it.

    Raises:
        ValueError: as `paged_decode`, and sequences that share their beginnings.
    """
    kv.check(query)
    kv.refuse_shared()
    _check(query, kv, selection, softcap, None, None)
    _check_lse(query, lse)
    name = choose_backend(query, kv, backend)
    if name == "triton":
        from . import mass_triton

        return mass_triton.mass(query, kv, selection, lse, scale, softcap)
    weigh = naive.mass if name == "naive" else gather.mass
    return weigh(query, kv, selection, lse, scale, softcap)


def _dense_keys(kv: RaggedKV, steps: int, window: int | None) -> Tensor:
    """`(S, 1, T)` int64: keys that each token sees."""
    seen = torch.where(kv.lengths[:, None] > 0, kv.visible(steps), 0)
    return (seen if window is None else seen.clamp(max=window))[:, None]


def _check(
    query: Tensor,
    kv: RaggedKV,
    selection: Reads | None,
    softcap: float | None,
    window: int | None,
    keys_read: Tensor | None,
) -> None:
    sequences, _, steps, _ = query.shape
    lists = 1
    if selection is not None:
        selection.check_shapes(query)
        if selection.extra is not None:
            selection.extra.check_shapes(query, kv.values.shape[-1])
        if window is not None:
            raise ValueError(f"window is {window}, with a selection; expected one of them, or neither")
        lists = selection.ids.shape[1]
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; expected at least 1, or None")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; expected a positive number, or None")
    if keys_read is not None:
        shape = (sequences, lists, steps)
        if keys_read.shape != shape or keys_read.dtype != torch.int32 or not keys_read.is_contiguous():
            raise ValueError(
                f"keys_read is {tuple(keys_read.shape)} {keys_read.dtype}; expected contiguous {shape} torch.int32"
            )
        if keys_read.device != query.device:
            raise ValueError(f"devices are {query.device}, {keys_read.device} (keys_read); expected one device")


def _check_lse(query: Tensor, lse: Tensor) -> None:
    accepted = (torch.float32, torch.float64) if query.dtype == torch.float64 else (torch.float32,)
    if lse.shape != query.shape[:3] or lse.dtype not in accepted or not lse.is_contiguous():
        raise ValueError(
            f"lse is {tuple(lse.shape)} {lse.dtype}; expected contiguous {tuple(query.shape[:3])} torch.float32"
        )
    if lse.device != query.device:
        raise ValueError(f"devices are {query.device}, {lse.device} (lse); expected one device")


def _check_sink(query: Tensor, kv: RaggedKV, sink: Tensor) -> None:
    heads = kv.heads * query.shape[1]
    if sink.shape != (heads,) or not sink.dtype.is_floating_point or not sink.is_contiguous():
        raise ValueError(f"sink is {tuple(sink.shape)} {sink.dtype}; expected contiguous ({heads},) of a float dtype")
    if sink.device != query.device:
        raise ValueError(f"devices are {query.device}, {sink.device} (sink); expected one device")


def choose_backend(query: Tensor, kv: RaggedKV, backend: str) -> str:
    """The backend that `paged_decode` takes for these. Raises ValueError as it does."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is unknown; accepted: auto, {', '.join(BACKENDS)}")
    if backend not in ("auto", "triton") or (backend == "auto" and not query.is_cuda):
        return "gather" if backend == "auto" else backend
    reason = triton_unavailable(query.device.type)
    if reason is None and query.dtype not in DTYPES:
        reason = f"it takes no {query.dtype}"
    if reason is None and max(query.shape[-1], kv.values.shape[-1]) > MAX_HEAD_DIM:
        reason = f"its heads have up to {MAX_HEAD_DIM} dimensions, not {query.shape[-1]} and {kv.values.shape[-1]}"
    if reason is None:
        return "triton"
    if backend == "auto":
        return "gather"
    raise ValueError(f"backend 'triton' cannot run here: {reason}; use 'auto' or 'gather'")
