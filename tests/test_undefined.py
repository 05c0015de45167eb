"""What stands behind a list, and in state that nobody has written, may be anything: no method may look at it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from small_lms import generate, score, sparse

from lm_eval_sparse.kernels.types import Reads, Slot
from lm_eval_sparse.methods import METHODS, PHASE_ARGUMENTS, Call

PROMPTS = [tiny.words(seed, count) for seed, count in ((1, 26), (2, 84), (3, 140))]
STATEFUL = {
    **{name: {"method": name, **cls.tiny} for name, cls in METHODS.items() if cls.phase == "decode"},
    "twilight": {"method": "twilight:quest", "p": 0.6, "budget": 48, "page_size": 8},
    "h2o, quest": {"method": "h2o+quest", "capacity": 60, "every": 4, "budget": 16, "page_size": 8},
    "h2o, twilight": {"method": "h2o+twilight:quest", "capacity": 60, "every": 4, "budget": 16, "page_size": 8},
}
assert set(PHASE_ARGUMENTS) >= {"decode"}


def answers(typed: dict[str, Any]) -> tuple[Any, ...]:
    lm = sparse(copy.deepcopy(tiny.family("llama", num_key_value_heads=2)), backend="gather", **typed, batch_size=3)
    scored = score(lm, [(prompt, " river stone cloud window winter") for prompt in PROMPTS])
    return [float(one[0]) for one in scored], list(generate(lm, PROMPTS, max_gen_toks=9)), lm.report()["phases"]


@pytest.mark.parametrize("typed", list(STATEFUL))
def test_poison_changes_nothing(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = answers(STATEFUL[typed])
    generator = torch.Generator().manual_seed(7)
    poison = torch.tensor([-(2**31), -7, 3, 2**31 - 1], dtype=torch.int32)

    def poisoned(select: Any) -> Any:
        def wrapped(self: Any, call: Call) -> Reads:
            reads = select(self, call)
            behind = torch.arange(reads.ids.shape[-1]) >= reads.counts[..., None]
            drawn = poison[torch.randint(4, reads.ids.shape, generator=generator)]
            bias = reads.bias if reads.bias is None else reads.bias.masked_fill(behind, torch.nan)
            return replace(reads, ids=torch.where(behind, drawn, reads.ids), bias=bias)

        return wrapped

    empty = Slot.empty

    def dirty(self: Slot, entries: int, keys: torch.Tensor) -> torch.Tensor:
        room = empty(self, entries, keys)
        return room.fill_(torch.nan) if room.dtype.is_floating_point else room.fill_(torch.iinfo(room.dtype).max)

    monkeypatch.setattr(Slot, "empty", dirty)
    for owner in {base for cls in METHODS.values() if cls.phase == "decode" for base in cls.__mro__}:
        if "select" in vars(owner) and owner.__module__.partition(".methods.")[2] not in ("base", ""):
            monkeypatch.setattr(owner, "select", poisoned(vars(owner)["select"]))
    assert answers(STATEFUL[typed]) == right
