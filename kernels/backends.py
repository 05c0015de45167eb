"""Which backend of an operator runs where.

Estimators and index operators have two: `naive`, torch on any device, and `triton`. `auto` is `triton` on CUDA,
else `naive`. With TRITON_INTERPRET=1 set before Triton is imported, `triton` also runs on CPU tensors, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch

logger = logging.getLogger(__name__)

#: What `auto` means on devices other than CUDA.
AUTO_ELSEWHERE = "naive"


@functools.cache
def triton_unavailable(device: str) -> str | None:
    """Why Triton kernels cannot run on this type of device, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels run on CUDA devices, not on {device!r}"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "Triton kernels need a GPU of compute capability 8.0 or newer"
    return None


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may begin before the one in front of it on the stream has ended (programmatic launches)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def choose(backend: str, device: torch.device) -> str:
    """`naive` or `triton` for an operator on this device.

    Raises:
        ValueError: an unknown backend, or `triton` where it cannot run.
    """
    if backend not in ("auto", "naive", "triton"):
        raise ValueError(f"backend {backend!r} is unknown; accepted: auto, naive, triton")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else AUTO_ELSEWHERE
        if backend == "triton" and (reason := triton_unavailable(device.type)) is not None:
            _warn(reason)
            return "naive"
    elif backend == "triton" and (reason := triton_unavailable(device.type)) is not None:
        raise ValueError(f"backend 'triton' cannot run here: {reason}; use 'auto' or 'naive'")
    return backend


@functools.cache
def _warn(reason: str) -> None:
    logger.warning("operators run in plain torch: %s", reason)
