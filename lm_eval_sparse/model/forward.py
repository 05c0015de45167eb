"""One pass of the model through our runtime: what every phase, the check at start-up and the decoder call."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..runtime.cache import SparseCache, cache_argument
from ..runtime.interface import calling

if TYPE_CHECKING:
    from .lm import SparseHFLM


class Forward:
    """Calls the model of a `SparseHFLM` on token ids."""

    def __init__(self, lm: SparseHFLM):
        self.lm = lm
        #: Masks that hide nothing, by the number of rows of a step of the decoder.
        self._no_padding: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self,
        ids: Tensor,
        *,
        cache: SparseCache | None,
        positions: Tensor | None = None,
        keep: int | None = None,
        step: bool = False,
    ) -> Tensor:
        """Logits `(B, keep or q_len, V)` of `(B, q_len)` token ids after what `cache` holds.

        Args:
            step: this is a step of the decoder, which must not wait for the device.
        """
        lm = self.lm
        takes = inspect.signature(lm.model.forward).parameters
        options: dict[str, Any] = {cache_argument(lm.model): cache}
        if positions is not None and "position_ids" in takes:  # other models count what the cache holds
            options["position_ids"] = positions
        if step:
            # Models that get no mask look for padding themselves.
            if len(ids) not in self._no_padding:
                self._no_padding[len(ids)] = torch.ones(len(ids), 2, dtype=torch.bool, device=ids.device)
            options["attention_mask"] = self._no_padding[len(ids)]
        if keep is not None and "logits_to_keep" in takes:
            options["logits_to_keep"] = keep
        with (
            torch.autocast(
                device_type=lm.device.type,
                dtype=lm.mixed_precision_dtype,
                enabled=lm.mixed_precision_dtype is not None,
            ),
            calling(lm.runtime, unpadded=step),
        ):
            lm.runtime.begin(ids.shape[1])
            if not step:  # the decoder says what has arrived
                lm.clock.switch(lm.runtime.phase, ids.numel())
            logits = lm.model(input_ids=ids, use_cache=cache is not None, **options).logits
        wanted = lm.runtime.calls_of_a_pass
        if wanted not in (None, lm.runtime.calls) and lm.runtime.probe is None:
            raise UserError(
                f"{lm.kind} called attention {lm.runtime.calls} times for {ids.shape[1]} tokens, and "
                f"{wanted} times when it was checked at start-up: use --model hf for this model"
            )
        return logits if keep is None else logits[:, -keep:]

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Log-probabilities, in fp32 unless `softmax_dtype` asks otherwise: bf16 would round them to steps of 1/16."""
        return F.log_softmax(logits, dim=-1, dtype=self.lm.softmax_dtype or torch.float32)


__all__ = ["Forward"]
