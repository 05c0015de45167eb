"""How many prompts fit into memory side by side, by what they will hold, not by trying.

lm-eval's own `batch_size=auto` runs made-up prompts of full length and keeps the logits of all their tokens, which is
what no decoding ever needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import psutil
import torch
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from .session import Plan, Runtime

#: Share of the free memory that may be planned with: the rest is for what is not modelled, and fragmentation.
SHARE = 0.8
#: Bytes that selecting takes at most beside keys, values and activations, for each token of the prompt.
SELECTING = 16 << 10


class MemoryModel:
    """Bytes that prompts and their decoding take.

    Keys and values of every row stay, what eviction drops excepted; the activations of a prefill are those of one row
    at a time; logits are made for the last token only.
    """

    def __init__(self, model: PreTrainedModel, runtime: Runtime, device: torch.device):
        self.runtime, self.device = runtime, device
        text = model.config.get_text_config(decoder=True)
        hidden = text.hidden_size
        inner = getattr(text, "intermediate_size", None) or 4 * hidden
        element = torch.finfo(model.dtype).bits // 8
        # The residual stream and its copies, queries and outputs of attention, and the three of a gated layer.
        self.per_token = element * (6 * hidden + 3 * (inner if isinstance(inner, int) else max(inner)))
        self.logits = 64 * text.vocab_size * 4

    def row(self, length: int, reserve: int, plan: Plan) -> int:
        """Bytes that stay of a prompt of `length` tokens, with room for `reserve` more."""
        kept = length
        if plan.eviction is not None:
            method, sparsity = plan.eviction.at(length)
            kept = method.keeps(sparsity, length)
        total = 0
        for index, (per_token, window) in self.runtime.sizes.items():
            eligible = self.runtime.layers.get(index, "") is None
            held = min(length, window - 1) if window is not None else kept if eligible else length
            total += per_token * (held + reserve)
            if plan.decode is not None and eligible:
                total += per_token * (held + reserve) // plan.decode.method.page_size
        return total

    def prefill(self, length: int) -> int:
        """Bytes that reading a prompt takes beside what stays."""
        layer = max((per_token for per_token, _ in self.runtime.sizes.values()), default=0)
        return length * (self.per_token + 2 * layer + SELECTING) + self.logits

    def free(self) -> int:
        """Bytes that could be allocated now."""
        if self.device.type == "cuda":
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + cached
        return psutil.virtual_memory().available

    def rows(self, lengths: Sequence[int], reserve: int, plan: Plan, held: int = 0) -> int:
        """How many of the next prompts (tokens each, the longest first) fit side by side, at least 1.

        Args:
            held: bytes already allocated for keys and values, which will be used again.
        """
        left = SHARE * (self.free() + held) - self.prefill(lengths[0])
        for number, length in enumerate(lengths):
            left -= self.row(length, reserve, plan)
            if left < 0:
                return max(1, number)
        return len(lengths)


def out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory ran out, on a GPU or on a CPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
