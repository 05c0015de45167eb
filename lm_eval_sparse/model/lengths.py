"""Which lengths of prompts and answers a model and its methods take, said before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from ..methods import presets
from ..runtime.positions import Stretch, stretches

if TYPE_CHECKING:
    from .lm import SparseHFLM


class Lengths:
    """The lengths that the model of a `SparseHFLM` takes."""

    def __init__(self, lm: SparseHFLM):
        self.lm = lm

    def check_preset(self) -> None:
        """Raise when no prompt that the model can read is long enough for the preset."""
        lm = self.lm
        if lm.sparse.preset is None:
            return
        shortest = max(presets.shortest(lm.sparse.preset, type(method)) for method in lm.sparse.methods.values())
        if shortest > lm.max_length:
            raise UserError(
                f"preset={lm.sparse.preset} has parameters for prompts from {shortest} tokens on, and {lm.kind} "
                f"takes {lm.max_length}: leave preset out, and the knobs are solved for the sparsity"
            )

    def check(self, lengths: Sequence[int]) -> None:
        """Find prompts (tokens) at which what was asked cannot be done, before any run."""
        lm = self.lm
        lm.runtime.check_lengths(lengths)
        # Once some prompts ran, others that are all too short are dense beside them, and counted so.
        if lm.reporter.begun or not any(assignment.window for assignment in lm.runtime.plan.phases.values()):
            return
        ends = [-min(lengths, default=2**40), max(lengths, default=0)]
        if lm.world_size > 1:  # another rank may have longer ones
            ends = lm.all_gather(torch.tensor([ends], device=lm.device)).amax(0).tolist()
        if ends[1]:
            lm.runtime.check_windows(-ends[0], ends[1])

    @cached_property
    def stretches(self) -> list[Stretch]:
        """The model's rotary embeddings that depend on the length of the text."""
        return stretches(self.lm.model)

    def stretched(self, prompt: int, total: int) -> Stretch | None:
        """What stretches between a prompt and the `total` tokens of prompt and answer, if anything."""
        return next((stretch for stretch in self.stretches if stretch.within(prompt, total)), None)

    def refuse_dynamic(self, longest: int) -> None:
        """Raise `UserError` for a text of so many tokens whose positions would depend on what ran before it."""
        for stretch in self.stretches:
            if stretch.kind == "dynamic" and longest > stretch.bound:
                raise UserError(
                    f"{self.lm.kind} has {stretch}, and stay those of the longest text that ran: a text of {longest} "
                    f"tokens has no answer of its own; use texts of at most {stretch.bound} tokens, prompt and answer"
                )


__all__ = ["Lengths"]
