"""The attention function and the mask function that transformers calls. They know no model family.

A model says what a layer may see by a mask, and by keyword arguments what else its attention does. Masks are not made
where kernels know positions (a 4-D mask takes 512 MiB for a chunk of 4096 queries at 128K); an argument that nobody
here knows is refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from ..errors import UserError
from .cache import autocast
from .session import Runtime

#: The name under which transformers knows us. It must not look like one of its own implementations.
IMPLEMENTATION = "lm_eval_sparse"

#: Keyword arguments of an attention call that say nothing that is not known otherwise, or are handled here. `softcap`,
#: `s_aux` (attention sinks) and `is_causal` are read. Windows are read from the mask, which is all that transformers'
#: own functions look at.
KNOWN = frozenset({
    "softcap", "is_causal", "sliding_window", "position_ids", "cache_position", "use_cache", "past_key_values",
    "past_key_value", "cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "logits_to_keep", "deterministic", "training", "s_aux",
})  # fmt: skip


#: What some of those are that are refused.
MEANT = {
    "sinks": "attention sinks", "position_bias": "a bias by position", "indices": "keys that the model chooses itself",
    "block_indices": "keys that the model chooses itself",
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """What is known of the forward pass that runs: whose it is, and whether it is known to hold no padding."""

    runtime: Runtime
    unpadded: bool = False


#: Set while a model runs for us. To look at a mask for padding means to wait for the device.
CALL: ContextVar[Call | None] = ContextVar("CALL", default=None)


@contextmanager
def calling(runtime: Runtime, unpadded: bool = False) -> Iterator[None]:
    """Inside the block the model of `runtime` runs."""
    token = CALL.set(Call(runtime, unpadded))
    try:
        yield
    finally:
        CALL.reset(token)


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
    """The function registered with transformers: `(B, H, L, D)` in, `(B, L, H, D_v)` out.

    Under autocast queries, keys and values are cast as torch's own attention casts them.

    Raises:
        UserError: an argument that is not known, attention that is not causal, a mask that is not ours.
    """
    runtime: Runtime | None = getattr(module, "_lm_eval_sparse", None)
    if runtime is None:
        raise RuntimeError(f"attention {IMPLEMENTATION!r} was called on a module that no sparse-hf model owns")
    refuse_arguments(module, kwargs)
    device = query.device.type
    inside = nullcontext()
    if torch.is_autocast_enabled(device):
        query, key, value = (autocast(states) for states in (query, key, value))
        inside = torch.autocast(device, enabled=False)
    options = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": kwargs.get("softcap"),
        "sink": sink_of(module, kwargs.get("s_aux"), query.shape[1]),
    }
    with inside:
        if runtime.probe is None:
            out = runtime.attend(module, query, key, value, attention_mask, **options)
        else:
            arguments = {"scaling": scaling, "dropout": dropout, **kwargs}
            out = runtime.probe.attend(module, query, key, value, attention_mask, arguments, **options)
    return out.transpose(1, 2).contiguous(), None


def sink_of(module: torch.nn.Module, given: Any, heads: int) -> Tensor | None:
    """The sinks of an attention call, `(H,)`; raises `UserError` where it is given something else for them."""
    if given is None:
        return None
    if not isinstance(given, Tensor) or given.numel() != heads or not given.dtype.is_floating_point:
        what = f"{tuple(given.shape)} {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
        raise UserError(
            f"{type(module).__name__} gives 's_aux' (attention sinks) as {what}; sparse-hf takes a number for each of "
            f"its {heads} query heads: use --model hf for this model"
        )
    return given.detach().reshape(heads)


def refuse_arguments(module: torch.nn.Module, arguments: dict[str, Any]) -> None:
    """Raise `UserError` for arguments of an attention call that change what it computes and that nobody here knows."""
    for name, value in arguments.items():
        if value is not None and name not in KNOWN:
            what = f"{name!r} ({MEANT[name]})" if name in MEANT else repr(name)
            raise UserError(
                f"{type(module).__name__} uses {what} in its attention, which sparse-hf does not support: "
                "use --model hf for this model"
            )
    causal = arguments.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UserError(
            f"{type(module).__name__} is not causal attention: sparse-hf evaluates decoder-only causal models; "
            "use --model hf for this model"
        )


def mask(*, mask_function: Any = causal_mask_function, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """The mask function registered with transformers.

    Returns:
        For layers whose kernels know what they see from positions: the 2-D padding mask itself, or None without
        padding. For the layers of a model that has others, too: transformers' own `(B, 1, q_len, kv_len)` bool.
    """
    call = CALL.get()
    probe = None if call is None else call.runtime.probe
    if probe is not None:
        return probe.mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    return run_mask(call, mask_function=mask_function, attention_mask=attention_mask, **kwargs)


def run_mask(call: Call | None, *, mask_function: Any, attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
    """As `mask`, outside of the check at start-up."""
    plain = mask_function is causal_mask_function
    if call is not None and call.runtime.masked and not plain:
        return made_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    if not kwargs.get("allow_is_causal_skip", True):
        raise UserError(
            "the model asks for an attention mask that is not plainly causal (an encoder, image tokens that see each "
            "other, or packed sequences): use --model hf for this model"
        )
    if call is not None and not call.runtime.familiar(mask_function, plain, kwargs.get("device", "cpu")):
        raise UserError(
            "the model asks for an attention mask that it did not ask for when it was checked at start-up, so which "
            "layer sees what is not known: use --model hf for this model"
        )
    if attention_mask is None or (call is not None and call.unpadded) or bool(attention_mask.all()):
        return None
    return attention_mask


def made_mask(**kwargs: Any) -> Tensor:
    """The mask `(B, 1, q_len, kv_len)` bool that transformers makes for its own attention functions."""
    return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def own_function(module: torch.nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """transformers' own attention function for a module: the readable one that its modelling file brings."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


def register() -> None:
    """Make transformers know the attention and the mask function. Without the latter it drops padding silently."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)
