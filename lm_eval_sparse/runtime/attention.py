"""The attention function and the mask function that transformers calls, and the runtime that they work for.

One function serves every model family: it sees queries, keys and values after rotary embedding and after the
cache update. Rows are unpadded before any method looks at them, so that batch neighbours and padding cannot
change what is selected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..errors import UserError
from ..kernels.block_sparse_prefill import block_sparse_prefill
from ..kernels.dense import dense_attention
from ..kernels.layout import causal_pairs
from ..methods import PrefillMethod
from .accounting import PhaseCounts, RowCounts

#: The name under which transformers knows us. It must not look like one of its own implementations.
IMPLEMENTATION = "lm_eval_sparse"

#: Below this prompt length a sparsity that cannot be reached means dense attention, from it on an error.
PROMISED_LENGTH = 4096

#: Keyword arguments that change what attention computes and that our kernels do not know.
UNSUPPORTED = ("s_aux", "sinks", "position_bias", "attention_bias", "head_mask")


@dataclass(frozen=True)
class Plan:
    """What to run in each phase.

    Attributes:
        prefill: the prefill method, or None for dense.
        sparsity: requested executed sparsity, or None when the native knobs rule.
        backend: kernel of sparse calls, or `auto`.
    """

    prefill: PrefillMethod | None = None
    sparsity: float | None = None
    backend: str = "auto"


class Runtime:
    """State of sparse attention in one model: the plan, the layers seen, and the rows being counted."""

    def __init__(self, plan: Plan):
        self.plan = plan
        #: layer index -> None when sparse attention may run there, else why not.
        self.layers: dict[int, str | None] = {}
        #: Counts of the rows of the running batch; None for a row that only fills the batch.
        self.rows: list[RowCounts | None] | None = None
        #: Tokens the model can hold: a window of at least as many hides nothing.
        self.longest: int | None = None
        #: Tokens of the prompt that is being generated from, padding included; earlier chunks are prefill too.
        self.prompt = 0
        self._mask: Tensor | None = None
        self._starts: list[int] | None = None

    def attach(self, model: torch.nn.Module) -> None:
        """Make this the runtime of every attention module of `model`."""
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module._lm_eval_sparse = self

    def starts(self, mask: Tensor | None) -> list[int] | None:
        """First real token of each row, or None when no row is left-padded. One host read per mask, not per layer."""
        if mask is None:
            return None
        if mask is not self._mask:
            starts = mask.to(torch.int8).argmax(-1).tolist()
            self._mask, self._starts = mask, starts if any(starts) else None
        return self._starts

    # --- one attention call ----------------------------------------------------------------------------------

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """Attention of `(B, H, q_len, D)` queries; returns `(B, H, q_len, D_v)`."""
        if window is not None and self.longest is not None and window >= self.longest:
            window = None
        reason = self.ineligible(module, key, value, window)
        self.layers[module.layer_idx] = reason
        starts = self.starts(mask)
        q_len, kv_len = query.shape[2], key.shape[2]
        if q_len != kv_len:
            return self._decode(query, key, value, mask, starts, reason, scale=scale, softcap=softcap, window=window)
        if starts is None and (self.plan.prefill is None or reason is not None):
            self._count_dense("prefill", query, key, value, [0] * len(query), reason)
            return dense_attention(query, key, value, scale=scale, softcap=softcap, window=window)
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
        for row, start in enumerate(starts or [0] * len(query)):
            q, k, v = query[row, :, start:], key[row, :, start:], value[row, :, start:]
            if reason is None and self._is_sparse(row, len(query), q.shape[1], module):
                out[row, :, start:] = self._sparse_prefill(q, k, v, row, len(query), scale, softcap)
            else:
                self._count_dense("prefill", q[None], k[None], v[None], [0], reason, row=row, batch=len(query))
                options = {"scale": scale, "softcap": softcap, "window": window}
                out[row, :, start:] = dense_attention(q[None], k[None], v[None], **options)[0]
        return out

    @staticmethod
    def ineligible(module: torch.nn.Module, key: Tensor, value: Tensor, window: int | None) -> str | None:
        """Why this layer is left untouched and counted out, or None."""
        if window is not None:
            return f"sliding window of {window} tokens"
        if key.shape[-1] != value.shape[-1]:
            return f"keys have {key.shape[-1]} dimensions, values {value.shape[-1]} (latent attention)"
        return None

    def _is_sparse(self, row: int, batch: int, length: int, module: torch.nn.Module) -> bool:
        """Whether this row's prefill is sparse in an eligible layer; counts a fallback when it is too short."""
        method, sparsity = self.plan.prefill, self.plan.sparsity
        if method is None:
            return False
        reason = method.too_short(sparsity, length)
        if reason is None:
            return True
        if sparsity is not None and length >= PROMISED_LENGTH:
            raise UserError(
                f"sparsity={sparsity:g} is out of reach of {method.name} at {length} tokens, where the parts it always "
                f"keeps leave at most {method.largest_sparsity(length):.3f}: type sparsity="
                f"{int(method.largest_sparsity(length) * 100) / 100:g} or less, or use longer prompts"
            )
        if counts := self._counts("prefill", row, batch):
            counts.reasons[reason] += 1
        return False

    def _sparse_prefill(
        self, query: Tensor, key: Tensor, value: Tensor, row: int, batch: int, scale: float, softcap: float | None
    ) -> Tensor:
        selection = self.plan.prefill.select(query, key, scale=scale, softcap=softcap, sparsity=self.plan.sparsity)
        layout = selection.layout
        try:
            out, backend = block_sparse_prefill(
                query, key, value, layout, scale=scale, softcap=softcap, backend=self.plan.backend
            )
        except ValueError as error:
            raise UserError(f"backend={self.plan.backend}: {error}") from error
        if counts := self._counts("prefill", row, batch):
            heads, length, dim = query.shape
            per_key = (key.shape[-1] + value.shape[-1]) * key.element_size()
            counts.calls["sparse"] += 1
            counts.backends[backend] += 1
            counts.pairs += heads * causal_pairs(length)
            counts.selected += int(selection.selected_pairs.sum())
            counts.executed += int(layout.executed_pairs().sum())
            counts.bytes_dense += per_key * heads * dense_keys(length, layout.block_q)
            counts.bytes_read += per_key * int(layout.keys_read().sum()) + selection.estimator_bytes
            counts.flops_dense += 4 * dim * heads * causal_pairs(length)
            counts.flops_estimator += selection.estimator_flops
            counts.note_knobs(selection.knobs)
        return out

    def _decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        starts: list[int] | None,
        reason: str | None,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """New tokens against the cache; `q_len` is above 1 when given answers are scored."""
        first = None
        if starts is not None:
            # Window layers hold the last keys only, so the padding they still see is shorter.
            dropped = mask.shape[-1] - key.shape[2]
            starts = [max(0, start - dropped) for start in starts]
            first = torch.tensor(starts, device=query.device)
        phase = "prefill" if key.shape[2] <= self.prompt else "decode"
        self._count_dense(phase, query, key, value, starts or [0] * len(query), reason)
        return dense_attention(query, key, value, scale=scale, softcap=softcap, window=window, starts=first)

    # --- counting --------------------------------------------------------------------------------------------

    def _counts(self, phase: str, row: int, batch: int) -> PhaseCounts | None:
        """The counts of a row; several rows of a batch share one when beams of a prompt run side by side."""
        counts = self.rows[row * len(self.rows) // batch] if self.rows else None
        return None if counts is None else counts.phase(phase)

    def _count_dense(
        self,
        phase: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: list[int],
        ineligible: str | None,
        row: int | None = None,
        batch: int | None = None,
    ) -> None:
        """Count a dense call for each row, or for row `row` of a batch of `batch`, in a layer that counts."""
        if ineligible is not None or not self.rows:
            return
        heads, q_len, kv_len = query.shape[1], query.shape[2], key.shape[2]
        per_key = (key.shape[-1] + value.shape[-1]) * key.element_size()
        short = phase == "prefill" and self.plan.prefill is not None
        for index, start in enumerate(starts):
            counts = self._counts(phase, index if row is None else row, len(starts) if batch is None else batch)
            if counts is None:
                continue
            real = kv_len - start
            pairs = heads * (q_len * real - q_len * (q_len - 1) // 2)
            # Decoding reads every key once per KV head and step; prefill once per tile of 128 queries and head.
            reads = heads * dense_keys(real, 128) if phase == "prefill" else key.shape[1] * pairs // heads
            counts.calls["fallback" if short else "dense"] += 1
            counts.backends["sdpa"] += 1
            counts.pairs += pairs
            counts.selected += pairs
            counts.executed += pairs
            counts.bytes_dense += per_key * reads
            counts.bytes_read += per_key * reads
            counts.flops_dense += 4 * query.shape[-1] * pairs


def dense_keys(length: int, block: int) -> int:
    """Keys that a dense causal kernel with query tiles of `block` rows reads: each tile up to its last query."""
    full, rest = divmod(length, block)
    return block * full * (full + 1) // 2 + (length if rest else 0)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: `(B, H, L, D)` in, `(B, L, H, D_v)` out."""
    runtime: Runtime | None = getattr(module, "_lm_eval_sparse", None)
    if runtime is None:
        raise RuntimeError(f"attention {IMPLEMENTATION!r} was called on a module that no sparse-hf model owns")
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UserError(
                f"{type(module).__name__} uses {name!r} in its attention, which sparse-hf does not support: "
                "use --model hf for this model"
            )
    if not (kwargs.get("is_causal") if kwargs.get("is_causal") is not None else getattr(module, "is_causal", True)):
        raise UserError(
            f"{type(module).__name__} is not causal attention: sparse-hf evaluates decoder-only causal models; "
            "use --model hf for this model"
        )
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else getattr(module, "sliding_window", None)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UserError(
            f"{type(module).__name__} was given a ready-made {attention_mask.dim()}-D attention mask, which sparse-hf "
            "does not support: use --model hf for this model"
        )
    out = runtime.attend(
        module,
        query,
        key,
        value,
        attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        window=window,
    )
    return out.transpose(1, 2).contiguous(), None


def padding_mask(
    *, mask_function: Any = None, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any
) -> Tensor | None:
    """The mask function registered with transformers: the 2-D padding mask itself, or None without padding.

    Causality and windows are applied by the kernels from positions; a 4-D mask would take 512 MiB for a chunk of
    4096 queries at 128K. `allow_is_causal_skip` is False when a model wants more than causal (image tokens that
    see each other, packed sequences), which the kernels cannot express.
    """
    if not allow_is_causal_skip:
        raise UserError(
            "it asks for an attention mask that is not plainly causal (an encoder, image tokens that see each "
            "other, or packed sequences)"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask


def register() -> None:
    """Make transformers know the attention and the mask function. Without the latter it drops padding silently."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)
