"""The weights of one model, kept from one evaluation of a process to the next. Off unless a process turns it on."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

_on = False
_key: str | None = None
_model: nn.Module | None = None


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Keep the model that is loaded while the block runs, for as long as the next one is asked for in the same way."""
    global _on
    _on = True
    try:
        yield
    finally:
        _on = False
        drop()


def drop() -> None:
    """Let go of the model that is kept, before another one needs its memory."""
    global _key, _model
    if _model is None:
        return
    _key = _model = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def find(key: str) -> nn.Module | None:
    """The model that is kept, where it was loaded as `key` says; else it is let go."""
    if not _on:
        return None
    if _key == key:
        return _model
    drop()
    return None


def keep(key: str, model: nn.Module) -> None:
    """Keep a model, where models are kept. One with adapters is not: what they changed of it is theirs to undo."""
    global _key, _model
    if _on:
        _key, _model = key, model


def key_of(pretrained: str, options: dict[str, Any]) -> str:
    """What decides the weights and where they lie: all that the loader is given, and the files as they are now."""
    files = []
    folder = Path(pretrained)
    if folder.is_dir():
        for path in sorted(folder.rglob("*")):
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((str(path), status.st_size, status.st_mtime_ns, status.st_ino))
    return json.dumps([pretrained, files, options], sort_keys=True, default=repr)
