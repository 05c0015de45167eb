"""New tokens written to the end of the keys and values that sequences hold, and into the bounds of their pages.

Everything happens in place and by lengths that stand on the device, so that a captured step appends where it should.
"""

from __future__ import annotations

from torch import Tensor

from ...backends import choose
from ...types import PageBounds, RaggedKV
from . import naive


def append(
    kv: RaggedKV, keys: Tensor, values: Tensor, bounds: PageBounds | None = None, *, backend: str = "auto"
) -> None:
    """Write the T newest tokens of each sequence to the end of its keys and values: its length counts them already.

    So that in a step of a model the lengths of all layers are counted up at once, and no two kernels disagree on them.

    Bounds of every page that the tokens touch are computed anew from all keys of the page: after a sequence was cut
    back they hold values of forgotten tokens. Sequences of length 0 are left alone, others must have at least T. That
    the storage has room is the caller's business.

    Args:
        kv: `keys` and `values` are written to.
        keys: `(S, T, D)`; values: `(S, T, D_v)`; strided as they like, but contiguous in the last dimension.
        bounds: written to, unless None.
        backend: `auto`, `naive` or `triton`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, bounds of sequences that share their beginnings,
            or an unknown backend.
    """
    check_tokens(kv, keys, values)
    if bounds is not None:
        kv.refuse_shared()
        bounds.check(kv)
    if not keys.shape[1] or not len(kv.lengths):
        return
    if choose(backend, keys.device) == "triton":
        from . import triton

        triton.forward(kv, keys, values, bounds)
    else:
        naive.forward(kv, keys, values, bounds)


def check_tokens(kv: RaggedKV, keys: Tensor, values: Tensor) -> None:
    """Raise ValueError unless `(S, T, D)` keys and `(S, T, D_v)` values can be tokens of these sequences."""
    sequences = len(kv.lengths)
    if (
        keys.dim() != 3
        or keys.shape[:2] != values.shape[:2]
        or (len(keys), keys.shape[2], *values.shape[2:]) != (sequences, kv.keys.shape[1], kv.values.shape[1])
    ):
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit {sequences} sequences over keys "
            f"{tuple(kv.keys.shape)} and values {tuple(kv.values.shape)}: expected (S, T, D) and (S, T, D_v)"
        )
    if keys.dtype != kv.keys.dtype or values.dtype != kv.values.dtype:
        raise ValueError(f"dtypes are {keys.dtype} and {values.dtype}; expected {kv.keys.dtype} and {kv.values.dtype}")
    if not keys.device == values.device == kv.keys.device == kv.lengths.device:
        raise ValueError(
            f"devices are {keys.device}, {values.device}, {kv.keys.device}, {kv.lengths.device}; expected one device"
        )
