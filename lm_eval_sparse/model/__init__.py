"""The model type `sparse-hf`. `SparseHFLM` is imported when it is asked for: torch and transformers take seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lm import SparseHFLM

__all__ = ["SparseHFLM"]


def __getattr__(name: str) -> Any:
    if name == "SparseHFLM":
        from .lm import SparseHFLM

        return SparseHFLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
