"""Masks secrets in what lm-eval prints of a configuration file, and refuses values in it that are none, or run code.

Works around: `--config FILE` prints all settings, model arguments with their tokens among them, and takes any word for
true: `trust_remote_code: "no"` would run a model's code. A file that names code (`method=path/to/file.py:Class`) is not
believed either: whoever wrote it may not be the user. Only runs of our model type are affected. Delete when lm-eval
masks secrets there, checks the types of what a file holds, says which arguments were typed, and makes the model first.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from lm_eval_sparse import masking, spelling
from lm_eval_sparse.errors import UserError, install_excepthook
from lm_eval_sparse.harness import MODEL
from lm_eval_sparse.results.files import brief
from lm_eval_sparse.values import yes_or_no

#: Settings that are true or false, and those that hold names and values.
FLAGS = (
    "trust_remote_code", "log_samples", "predict_only", "write_out", "check_integrity", "show_config",
    "confirm_run_unsafe_code", "fewshot_as_multiturn",
)  # fmt: skip
PAIRS = ("model_args", "gen_kwargs", "metadata", "hf_hub_log_args", "wandb_args", "wandb_config_args", "trackio_args")

#: The file that model arguments are being read from, if any.
_source: ContextVar[Any] = ContextVar("source", default=None)


def apply(module: ModuleType) -> None:
    """Wrap `__repr__` of `module.EvaluatorConfig`, which is printed, and `_configure`, which uses the values."""
    install_excepthook()  # settings are read before anything else that would
    cls = module.EvaluatorConfig
    original, configure = cls.__repr__, cls._configure
    if getattr(original, "_lm_eval_sparse", False):
        return

    @functools.wraps(configure)
    def _configure(self: Any) -> Any:
        if self.model == MODEL:
            _check(self)
            if (source := _source.get()) is not None:
                spelling.refuse_code(self.model_args, str(source))
        configured = configure(self)
        if self.model == MODEL:
            if (source := _source.get()) is not None:  # as lm-eval has read them, too, before anything is made of them
                spelling.refuse_code(self.model_args, str(source))
            _check_method(self.model_args)
        return configured

    cls._configure = _configure

    from_cli, from_config = cls.from_cli, cls.from_config

    @functools.wraps(from_cli)
    def _from_cli(namespace: Any) -> Any:
        # Model arguments that are typed take the place of all those in the file.
        typed = getattr(namespace, "model_args", None)
        with _read_from(None if typed else getattr(namespace, "config", None)):
            return from_cli(namespace)

    @functools.wraps(from_config)
    def _from_config(config_path: Any) -> Any:
        with _read_from(config_path):
            return from_config(config_path)

    cls.from_cli, cls.from_config = staticmethod(_from_cli), staticmethod(_from_config)

    @functools.wraps(original)
    def __repr__(self: Any) -> str:
        text = original(self)
        if self.model != MODEL:
            return text
        secrets = masking.values_in(self.model_args, self.metadata, self.hf_hub_log_args, self.wandb_args)
        return masking.mask(text, secrets)

    __repr__._lm_eval_sparse = True  # type: ignore[attr-defined]
    cls.__repr__ = __repr__


@contextlib.contextmanager
def _read_from(path: Any) -> Iterator[None]:
    """While this lasts, model arguments come from this file."""
    token = _source.set(path)
    try:
        yield
    finally:
        _source.reset(token)


def _check_method(model_args: Any) -> None:
    """Raise `UserError` for methods and knobs that cannot be: some seconds before tasks are listed and models made."""
    from lm_eval_sparse.methods.plan import parse, split

    parse(split(dict(model_args))[0], quiet=True)


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
