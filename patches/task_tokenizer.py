"""Tells tasks that make their own documents (RULER) the tokenizer of the `sparse-hf` model under evaluation.

Works around: such a task sizes its documents with the tokenizer that `tokenizer=` or `pretrained=` names among the
model arguments, and dies in an assertion where there is neither (the embedded model, a model given as an object) or
where the name alone does not lead to the tokenizer (`~`, a GGUF file, a subfolder). What a user typed for it is left
alone, and results say what was typed. Delete when lm-eval hands the tokenizer of the model to the tasks.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import inspect
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from lm_eval_sparse import paths
from lm_eval_sparse.model.embedded import is_embedded
from lm_eval_sparse.patches.evaluator import is_ours
from lm_eval_sparse.protocol import active_lm

#: During an evaluation by `sparse-hf`: the model if it was given as such, else True.
_evaluated: ContextVar[Any] = ContextVar("evaluated", default=None)

#: Model -> folder with a copy of its tokenizer.
_copies: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def apply(module: ModuleType) -> None:
    """Wrap `module.simple_evaluate` and `download` of lm-eval's task class, once."""
    tasks = importlib.import_module("lm_eval.api.task")
    for owner, name, wrap in (
        (module, "simple_evaluate", _with_model),
        (tasks.ConfigurableTask, "download", _with_tokenizer),
    ):
        function = getattr(owner, name)
        if not getattr(function, "_lm_eval_sparse_tokenizer", False):
            wrapped = wrap(function)
            wrapped._lm_eval_sparse_tokenizer = True
            setattr(owner, name, wrapped)


def _with_model(simple_evaluate: Any) -> Any:
    signature = inspect.signature(simple_evaluate)

    @functools.wraps(simple_evaluate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        model = signature.bind(*args, **kwargs).arguments.get("model")
        before = _evaluated.set(getattr(model, "lm", model) if is_ours(model) else model == "sparse-hf" or None)
        try:
            return simple_evaluate(*args, **kwargs)
        finally:
            _evaluated.reset(before)

    return wrapper


def _with_tokenizer(download: Any) -> Any:
    @functools.wraps(download)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _named(self.config) if callable(self.config.custom_dataset) else contextlib.nullcontext():
            return download(self, *args, **kwargs)

    return wrapper


@contextlib.contextmanager
def _named(config: Any) -> Iterator[None]:
    """Name the tokenizer in a task's metadata for as long as it makes its documents."""
    typed = config.metadata
    name = _tokenizer(typed or {})
    if name is not None:
        config.metadata = {**(typed or {}), "tokenizer": name}
    try:
        yield
    finally:
        config.metadata = typed


def _tokenizer(metadata: Mapping[str, Any]) -> str | None:
    """A folder with the tokenizer of the model under evaluation, or None where what was typed leads to it."""
    evaluated = _evaluated.get()
    lm = active_lm() if evaluated is True else evaluated
    if lm is None or metadata.get("tokenizer"):
        return None
    pretrained = metadata.get("pretrained")
    if is_embedded(pretrained):
        if metadata.get("model"):  # lm-eval's tasks look there too
            return None
    elif isinstance(pretrained, str) and not any(metadata.get(name) for name in ("gguf_file", "subfolder")):
        expanded = str(paths.expand(f"pretrained={pretrained!r}", pretrained)) if pretrained.strip() else pretrained
        return expanded if expanded != pretrained and os.path.isdir(expanded) else None
    return _copy(lm)


def _copy(lm: Any) -> str:
    """A folder with the model's tokenizer, gone when the process is."""
    if lm not in _copies:
        folder = tempfile.mkdtemp(prefix="lm-eval-sparse-tokenizer-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        lm.tokenizer.save_pretrained(folder)
        _copies[lm] = folder
    return _copies[lm]
