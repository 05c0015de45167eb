"""Registers the model type `sparse-hf`.

Works around: lm-eval up to 0.4.13 does not read the entry-point group `lm_eval.models`.
Delete when the oldest supported lm-eval does.
"""

from __future__ import annotations

from types import ModuleType

NAME = "sparse-hf"
#: A string, resolved by lm-eval on first use: listing models must not import torch, and an entry-point object
#: would collide with `@register_model` on 0.4.13.
TARGET = "lm_eval_sparse.model.lm:SparseHFLM"


def apply(module: ModuleType) -> None:
    """Add `sparse-hf` to lm-eval's registry, unless the entry point (or an earlier call) already did."""
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)
