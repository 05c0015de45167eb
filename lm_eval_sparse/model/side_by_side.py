"""Answers to one prompt side by side: whether this model scores each of them here as alone, and how many rows at once.

In fp32 on a CPU they are scored one after the other: there a product with more rows rounds otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..runtime.accounting import RowCounts
from ..runtime.cache import SparseCache
from ..runtime.candidates import Candidates
from ..runtime.decoder import GPU_ROWS
from ..runtime.rounding import CPU_ROWS, is_routed, tile_alike

if TYPE_CHECKING:
    from .lm import SparseHFLM

logger = logging.getLogger(__name__)

#: On a CPU keys that do not lie in one piece are copied together for every row that reads them, in every layer: to copy
#: the prompt once for each answer takes a tenth of the time.
SHARED_ON_CPU = False
#: Prompts that memory is asked for, when answers get copies of theirs.
MOST_COPIES = 64
Scored = list[tuple[Tensor, Tensor]]


class SideBySide:
    """Scores the answers to a prompt of a `SparseHFLM`.

    Attributes:
        reason: why answers are scored one at a time, where they could be side by side.
        alone: why each answer is scored in passes of its own.
    """

    def __init__(self, lm: SparseHFLM):
        self.lm = lm
        self.reason: str | None = None
        self.alone: str | None = None
        self._made = False
        self._engine: Candidates | None = None
        self._checked = False

    def get(self) -> Candidates | None:
        """What scores answers side by side; None where they are scored one at a time."""
        if not self._made:
            self._made = True
            self._engine = self._make()
        return self._engine

    def _make(self) -> Candidates | None:
        lm = self.lm
        on_cpu = lm.device.type == "cpu"
        if on_cpu and lm.model.dtype not in (torch.bfloat16, torch.float16):
            return None
        decoder, self.reason = lm.decoding.get("answers are scored one at a time")
        if decoder is None:
            return None
        rows = CPU_ROWS
        if decoder.alone is None and not on_cpu:
            rows = tile_alike(lm.model)
            if rows is None:
                decoder.alone = "the layers of this model round differently for each place of a row"
        if decoder.alone is not None:
            self.reason = decoder.alone
            logger.warning("answers are scored one at a time: %s", self.reason)
            return None
        if is_routed(lm.model):
            # Products of an expert have as many rows as the tile sends it: others may round one of them differently.
            self.alone = "rows of this model are routed to experts, whose products depend on the neighbours"
            self._checked = True
        plan = lm.runtime.plan
        if plan.decode is not None and not plan.decode.method.shares and not on_cpu:
            rows = min(rows, GPU_ROWS)  # such methods may hold what each row scores, in a copy
        return Candidates(
            decoder.call,
            lm.forward.log_softmax,
            lm.model.config,
            lm.runtime,
            lm.device,
            rows,
            self._copies,
            no_graph=decoder.graphs.refused,
            share=SHARED_ON_CPU or not on_cpu,
            landed=lm.clock.landed,
        )

    def _copies(self, prompt: int, answer: int) -> int:
        """Copies of a prompt, with room for an answer, that fit into memory."""
        lm = self.lm
        return lm.decoding.memory.rows([prompt] * MOST_COPIES, answer, lm.runtime.plan)

    def score(
        self, engine: Candidates, cache: SparseCache, answers: Sequence[list[int]], *, first: Tensor, counts: RowCounts
    ) -> Scored:
        """Log-probabilities fp64 and greedy hits of the tokens of each answer, counted.

        Args:
            cache: what the prefill has left, made by `engine`.
            first: `(V,)` log-probabilities of the first token.
        """
        self.lm.clock.switch("decode")
        longer = [answer for answer in answers if len(answer) > 1]
        if longer and engine.adopted is not cache:
            engine.adopt(cache)
        if not self._checked and len(longer) > 1:
            with self.lm.clock.checking():
                self._check(engine, longer, first)
        groups = [list(answers)] if self.alone is None else [[answer] for answer in answers]
        scored: Scored = []
        for group in groups:
            scored += engine.run(group, first, counts)
        if self.alone is not None:
            counts.phases["decode"].loop_reasons[self.alone] += sum(len(answer) - 1 for answer in answers)
        return scored

    def _check(self, engine: Candidates, answers: list[list[int]], first: Tensor) -> None:
        """Whether the first and the last answer get the same numbers, to the bit, as they get alone.

        Kernels that treat rows differently do so with those at the ends.
        """
        self._checked = True
        beside = engine.run(answers, first, RowCounts())
        for place in (0, -1):
            (own,) = engine.run([answers[place]], first, RowCounts())
            if not all(torch.equal(mine, other) for mine, other in zip(own, beside[place], strict=True)):
                self.alone = "the layers of this model round differently for several answers than for one"
                logger.warning("answers are scored one at a time: %s", self.alone)
                return

    def release(self) -> None:
        """Give the memory of prompts and answers back."""
        if self._engine is not None:
            self._engine.release()


__all__ = ["SideBySide"]
