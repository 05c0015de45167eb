"""What takes the place of kept tokens: other values (merging), keys turned to other positions (StreamingLLM)."""

from __future__ import annotations

import torch
from torch import Tensor


def replace(states: Tensor, starts: Tensor, counts: Tensor, new: Tensor) -> None:
    """Write `states[starts[h] + i] = new[h, i]` for `i < counts[h]`. Waits for counts that are on a GPU.

    Args:
        states: `(N, …)` flat storage.
        starts, counts: `(H,)` int64 or int32.
        new: `(H, W, …)` of the same dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    heads, width = new.shape[:2]
    if new.dim() < 2 or new.shape[2:] != states.shape[1:] or new.dtype != states.dtype:
        raise ValueError(
            f"new {tuple(new.shape)} {new.dtype} does not fit states {tuple(states.shape)} {states.dtype}: expected "
            "(H, W, …) of the same dtype"
        )
    if starts.shape != (heads,) or counts.shape != (heads,):
        raise ValueError(
            f"starts {tuple(starts.shape)} and counts {tuple(counts.shape)} given; expected ({heads},) each"
        )
    place = torch.arange(width, device=new.device)
    valid = place < counts[:, None]
    states[(starts[:, None] + place)[valid]] = new[valid]


def turn(keys: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Keys that are turned further by the angles of a rotary embedding whose halves belong together (Llama's).

    Args:
        keys: `(…, D)`.
        cosines, sines: `(…, D_rot)` of the angles to turn by; dimensions from `D_rot` on stay as they are.

    Returns:
        As `keys`, computed in fp32 (fp64 for fp64).
    """
    size = cosines.shape[-1]
    work = torch.float64 if keys.dtype == torch.float64 else torch.float32
    part = keys[..., :size].to(work)
    half = torch.cat([-part[..., size // 2 :], part[..., : size // 2]], -1)
    turned = part * cosines.to(work) + half * sines.to(work)
    return torch.cat([turned.to(keys.dtype), keys[..., size:]], -1)
