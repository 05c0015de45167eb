"""The answers to one call of lm-eval's, while they are made: what is done with each of them is done here, once."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from ..runtime.accounting import Ledger, RowCounts
from .progress import Call

if TYPE_CHECKING:
    from .lm import SparseHFLM


class Answers:
    """Takes answers in any order, gives them back in that of the requests.

    Args:
        kind: what lm-eval's response cache calls the request: `loglikelihood`, `loglikelihood_rolling` or
            `generate_until`.
        total: requests of the call, those that need no answer included.
        quiet: whether no progress is shown.
    """

    def __init__(self, lm: SparseHFLM, kind: str, total: int, quiet: bool):
        self.lm, self.kind = lm, kind
        self.results: list[Any] = [None] * total
        self._fresh: dict[str, Ledger] = defaultdict(lm.reporter.new_ledger)
        self.progress = Call(lm.clock, kind, total, quiet or lm.rank != 0)

    def skip(self, index: int, answer: Any) -> None:
        """A request that only stands for a leaf that cannot run has this answer."""
        self.results[index] = answer
        self.progress.answered(index)

    def give(self, index: int, key: tuple[Any, ...] | None, answer: Any) -> None:
        """A request is answered. `key`: its arguments, as lm-eval's response cache knows them; None for one of none."""
        self.results[index] = answer
        if key is not None:
            self.lm.cache_hook.add_partial(self.kind, key, answer)
        self.progress.answered(index, answer)

    def count(self, task: str | None, counts: RowCounts) -> None:
        """What one prompt with all its answers took."""
        self._fresh[task or ""].add(counts)

    def done(self) -> list[Any]:
        """All answers, in the order of the requests; what was counted is the model's from now on."""
        self.progress.close()
        self.lm.reporter.add(self._fresh)
        return self.results


__all__ = ["Answers"]
