"""Masks secrets in what lm-eval prints of a configuration file.

Works around: `--config FILE` prints all settings, model arguments with their tokens among them. Only runs of our model
type are affected. Delete when lm-eval masks secrets there.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from lm_eval_sparse import masking
from lm_eval_sparse.harness import MODEL


def apply(module: ModuleType) -> None:
    """Wrap `__repr__` of `module.EvaluatorConfig`, which is what is printed."""
    cls = module.EvaluatorConfig
    original = cls.__repr__
    if getattr(original, "_lm_eval_sparse", False):
        return

    @functools.wraps(original)
    def __repr__(self: Any) -> str:
        text = original(self)
        if self.model != MODEL:
            return text
        secrets = masking.values_in(self.model_args, self.metadata, self.hf_hub_log_args, self.wandb_args)
        return masking.mask(text, secrets)

    __repr__._lm_eval_sparse = True  # type: ignore[attr-defined]
    cls.__repr__ = __repr__
