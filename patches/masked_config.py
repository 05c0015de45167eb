"""Masks secrets in what lm-eval prints of a configuration file, and refuses values in it that are none.

Works around: `--config FILE` prints all settings, model arguments with their tokens among them, and takes any word for
true: `trust_remote_code: "no"` would run a model's code. Only runs of our model type are affected. Delete when lm-eval
masks secrets there and checks the types of what a file holds.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from lm_eval_sparse import masking
from lm_eval_sparse.errors import UserError
from lm_eval_sparse.harness import MODEL
from lm_eval_sparse.results.files import brief
from lm_eval_sparse.values import yes_or_no

#: Settings that are true or false, and those that hold names and values.
FLAGS = (
    "trust_remote_code", "log_samples", "predict_only", "write_out", "check_integrity", "show_config",
    "confirm_run_unsafe_code", "fewshot_as_multiturn",
)  # fmt: skip
PAIRS = ("model_args", "gen_kwargs", "metadata", "hf_hub_log_args", "wandb_args", "wandb_config_args", "trackio_args")


def apply(module: ModuleType) -> None:
    """Wrap `__repr__` of `module.EvaluatorConfig`, which is printed, and `_configure`, which uses the values."""
    cls = module.EvaluatorConfig
    original, configure = cls.__repr__, cls._configure
    if getattr(original, "_lm_eval_sparse", False):
        return

    @functools.wraps(configure)
    def _configure(self: Any) -> Any:
        if self.model == MODEL:
            _check(self)
        return configure(self)

    cls._configure = _configure

    @functools.wraps(original)
    def __repr__(self: Any) -> str:
        text = original(self)
        if self.model != MODEL:
            return text
        secrets = masking.values_in(self.model_args, self.metadata, self.hf_hub_log_args, self.wandb_args)
        return masking.mask(text, secrets)

    __repr__._lm_eval_sparse = True  # type: ignore[attr-defined]
    cls.__repr__ = __repr__


def _check(config: Any) -> None:
    """Raise `UserError` for settings of another kind; puts words for true and false right in place."""
    for name in FLAGS:
        if (value := getattr(config, name, None)) is not None:
            setattr(config, name, yes_or_no("", name, value))
    template = getattr(config, "apply_chat_template", None)
    if not isinstance(template, bool | str | None):
        raise UserError(f"apply_chat_template={brief(template)} is not accepted: give true, false or a template's name")
    for name in PAIRS:
        value = getattr(config, name, None)
        good = isinstance(value, str | None) or (isinstance(value, dict) and all(isinstance(key, str) for key in value))
        if not good:
            raise UserError(f"{name}: {brief(value)} is not accepted: give names with their values")
