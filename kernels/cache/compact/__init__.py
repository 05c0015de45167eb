"""The tokens that an eviction keeps, copied head by head into a flat storage."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import choose
from ...types.keep import kept_faults
from . import naive


def check_kept(
    indices: Tensor, counts: Tensor, total: int, length: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Look for faults in what is kept, and let nothing be read or written elsewhere because of them.

    Args:
        indices: `(H, W)` int64, `counts (H,)` int64 or int32: as in `compact`.
        total: what the counts should add up to; from H to H times the smaller of W and `length`.
        length: tokens there are.
        backend: `auto`, `naive` or `triton`. The latter never waits for the device.

    Returns:
        Ids and counts that `compact` can take, whose counts add up to `total` at most (those given where nothing is
        wrong; ids are mended in place where they are contiguous), and `(H,)` int32: a bit for each of
        `types.keep.FAULTS`.
    """
    heads, width = indices.shape
    if not heads <= total <= heads * min(width, length):
        raise ValueError(f"total is {total}, expected {heads} to {heads * min(width, length)} tokens")
    if choose(backend, indices.device) == "triton":
        from . import triton

        return triton.check_kept(indices.contiguous(), counts, total, length)
    return kept_faults(indices, counts, total, length)


def compact(
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    starts: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Copy the kept tokens of each head: `out[starts[h] + i] = states[h, indices[h, i]]` for `i < counts[h]`.

    Nothing else of the outputs is written.

    Args:
        keys: `(H, L, D)`; values: `(H, L, D_v)`; contiguous in the last dimension.
        indices: `(H, W)` int64, ids of tokens; the first `counts[h]` of a head are looked at.
        counts: `(H,)` int64 or int32.
        starts: `(H,)` int64.
        out_keys: `(N, D)`; out_values: `(N, D_v)`, contiguous.
        backend: `auto`, `naive` or `triton`. The latter never waits for the device.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or an unknown backend.
    """
    heads = len(keys)
    if keys.dim() != 3 or values.dim() != 3 or keys.shape[:2] != values.shape[:2]:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit together: expected (H, L, D) and "
            "(H, L, D_v)"
        )
    if indices.dim() != 2 or (len(indices), *counts.shape, *starts.shape) != (heads,) * 3:
        raise ValueError(
            f"indices {tuple(indices.shape)}, counts {tuple(counts.shape)} and starts {tuple(starts.shape)} do not "
            f"fit {heads} heads: expected (H, W), (H,) and (H,)"
        )
    if indices.dtype != torch.int64 or starts.dtype != torch.int64 or counts.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"indices are {indices.dtype}, starts {starts.dtype}, counts {counts.dtype}; expected torch.int64, and "
            "torch.int64 or torch.int32 for counts"
        )
    for name, states, out in (("keys", keys, out_keys), ("values", values, out_values)):
        if out.shape[1:] != states.shape[2:] or out.dtype != states.dtype or not out.is_contiguous():
            raise ValueError(
                f"out_{name} {tuple(out.shape)} {out.dtype} cannot take {name} {tuple(states.shape)} {states.dtype}: "
                "expected contiguous (N, D) of the same dtype"
            )
    if len({tensor.device for tensor in (keys, values, indices, counts, starts, out_keys, out_values)}) > 1:
        raise ValueError("keys, values, indices, counts, starts and outputs are not on one device")
    if not heads or not indices.shape[1]:
        return
    if choose(backend, keys.device) == "triton":
        from . import triton

        triton.forward(keys, values, indices, counts, starts, out_keys, out_values)
    else:
        naive.forward(keys, values, indices, counts, starts, out_keys, out_values)
