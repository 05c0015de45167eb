"""What decides the answers of a loaded model, as short hashes: weights, tokenizer, and code that came with it."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..frontier.meter import tokenizer_hash

#: Sums that the numbers of a tensor go round. A prime, so that those of no two rows of a matrix meet.
SUMS = 4093


@torch.no_grad()
def weights(model: nn.Module) -> str:
    """A hash of all numbers of the model's parameters and buffers, the same on every device.

    Of each tensor its shape and 4093 sums over its bits, to which its numbers are dealt in turn: all are read once,
    where they lie.
    """
    found = hashlib.sha256()
    for name, tensor in _tensors(model):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.is_meta or not tensor.numel():  # on no device: kept elsewhere until it is needed
            continue
        flat = tensor.detach().contiguous().flatten()
        if flat.storage_offset() * flat.element_size() % 8:
            flat = flat.clone()
        raw = flat.view(torch.uint8)
        whole = len(raw) // 8
        numbers, rest = raw[: whole * 8].view(torch.int64), raw[whole * 8 :]
        rows = whole // SUMS
        sums = numbers[: rows * SUMS].view(rows, SUMS).sum(0)
        parts = sums, numbers[rows * SUMS :], rest
        found.update(b"".join(part.cpu().numpy().tobytes() for part in parts))
    return found.hexdigest()[:16]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that are part of the model's state."""
    yield from model.named_parameters()
    kept = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def tokenizer(own: Any, end: int | None) -> str:
    """A hash of how a tokenizer makes tokens of texts and texts of tokens. `end`: the token that ends answers."""
    special = {name: str(token) for name, token in own.special_tokens_map.items()}
    parts = {
        "content": tokenizer_hash(own),
        "special": special,
        "end": end,
        "template": getattr(own, "chat_template", None),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def code(model: nn.Module) -> dict[str, str]:
    """A hash of the files of modelling code that is no part of transformers; nothing where there are none."""
    files = set()
    for kind in {type(module) for module in model.modules()}:
        if kind.__module__.startswith("transformers_modules."):  # which came with the model
            files.add(inspect.getsourcefile(sys.modules[kind.__module__]))
    if not files:
        return {}
    found = hashlib.sha256(b"".join(Path(file).read_bytes() for file in sorted(filter(None, files))))
    return {"model_code": found.hexdigest()[:16]}


__all__ = ["code", "tokenizer", "weights"]
