"""What selecting took."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """What a selection cost, beside the attention itself.

    What is known on a GPU only is a tensor of one number there: selecting does not wait for the device.

    Attributes:
        flops: floating-point operations for all heads (multiply and add count as two).
        bytes: bytes of queries, keys, values and metadata read.
    """

    flops: int | float | Tensor = 0
    bytes: int | float | Tensor = 0
