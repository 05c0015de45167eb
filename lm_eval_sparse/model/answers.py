"""The answers to one call of lm-eval's, while they are made: what is done with each of them is done here, once.

An answer that the log of samples has is taken from there with all that was counted of it, and is made no second time.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance

from ..protocol import MeasuredFloat, MeasuredLoglikelihood, MeasuredText, window_of
from ..runtime.accounting import Ledger, RowCounts
from .kept_counts import packed, unpacked
from .progress import Call
from .resume import digest

if TYPE_CHECKING:
    from .lm import SparseHFLM

logger = logging.getLogger(__name__)


@dataclass
class Asked:
    """A prompt and what is asked of it: what is counted once, kept at once, and taken from the log at once.

    Attributes:
        task: its task's name.
        requests: of each request its index in the call, its arguments as lm-eval's response cache knows them (None for
            one of none), and its name in the log (None where there is no log).
        key: the prompt's name in the log; None where there is none.
        diagnosed: whether it is a sample of `diagnose=N`.
    """

    task: str | None
    requests: list[tuple[int, tuple[Any, ...] | None, str | None]] = field(default_factory=list)
    key: str | None = None
    diagnosed: bool = False


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
        self._documents: dict[int, str] = {}
        self._named: Counter[str] = Counter()

    def skip(self, index: int, answer: Any) -> None:
        """A request that only stands for a leaf that cannot run has this answer."""
        self.results[index] = answer
        self.progress.answered(index)

    def give(self, index: int, key: tuple[Any, ...] | None, answer: Any, found: bool = False) -> None:
        """A request is answered. `key`: its arguments, as lm-eval's response cache knows them; None for one of none."""
        self.results[index] = answer
        if key is not None:
            self.lm.cache_hook.add_partial(self.kind, key, answer)
        self.progress.answered(index, answer, found)

    def answer(self, asked: Asked, counts: RowCounts, answers: Sequence[Any]) -> None:
        """A prompt is answered, with these measured answers to its requests, in their order; then it is in the log."""
        lm = self.lm
        ledger = lm.reporter.new_ledger()
        ledger.add(counts)
        ledger.runs[lm.reporter.run_id] += 1
        self._fresh[asked.task or ""].merge(ledger)
        for (index, key, _), answer in zip(asked.requests, answers, strict=True):
            self.give(index, key, answer)
        if asked.key is None:
            return
        entry = {
            "task": asked.task,
            "kind": self.kind,
            "answers": {name: plain(answer) for (*_, name), answer in zip(asked.requests, answers, strict=True)},
            "stats": answers[0].stats,
            "diagnosed": counts.diagnosis is not None,
            "counts": packed(ledger),
        }
        lm.sample_log.append(asked.key, entry)

    def done(self) -> list[Any]:
        """All answers, in the order of the requests; what was counted is the model's from now on."""
        self.progress.close()
        self.lm.reporter.add(self._fresh)
        return self.results

    # --- the log of samples ------------------------------------------------------------------------------------------

    def name(self, request: Instance) -> str | None:
        """The name of a request in the log: task, document, arguments, and which of the repeats it is.

        To be asked once for each request, in their order.
        """
        log = self.lm.sample_log
        if log is None or request.task_name not in log.tasks:
            return None
        document = self._documents.get(id(request.doc))
        if document is None:
            document = self._documents[id(request.doc)] = digest(request.doc)
        asked = [self.kind, log.tasks[request.task_name], document, request.idx, _arguments(request)]
        name = digest(asked)
        # Ranks are filled up with clones of the last request, beyond its repeats.
        repeat = self._named[name] % (request.repeats or 1)
        self._named[name] += 1
        return f"{name}.{repeat}"

    def keyed(self, asked: Asked, *decides: Any) -> Asked:
        """`asked` with its name in the log, which depends on all its requests and on what else `decides`, such as the
        tokens that they were made into."""
        names = {name for *_, name in asked.requests}
        asked.key = None if None in names else digest([sorted(names), *decides])
        return asked

    def restore(self, asked: Iterable[Asked]) -> list[bool]:
        """Give the answers that the log has; says of which prompts it had all."""
        prompts = list(asked)
        taken = [prompt.key is not None and self._taken(prompt) for prompt in prompts]
        if any(taken):
            number = sum(len(prompt.requests) for prompt, found in zip(prompts, taken, strict=True) if found)
            logger.warning(
                "resume: %d of %d %s requests are answered by the log in %s (type resume=0 to answer all anew)",
                number, len(self.results), self.kind, self.lm.sample_log.folder,
            )  # fmt: skip
        return taken

    def _taken(self, asked: Asked) -> bool:
        reporter = self.lm.reporter

        def fits(entry: dict[str, Any]) -> tuple[list[Any], Ledger, str] | None:
            """Answers in the order of the requests, counts, and the run; None where more has to be measured."""
            if entry["kind"] != self.kind or (asked.diagnosed and entry["diagnosed"] is not True):
                return None
            ledger = unpacked(entry["counts"], reporter.new_ledger(), diagnosed=asked.diagnosed)
            if ledger is None:
                return None
            stats, run = entry["stats"], entry["stats"]["run"]
            if not isinstance(stats, dict) or not isinstance(run, str):
                raise TypeError("stats of another form")
            return [measured(self.kind, entry["answers"][name], stats) for *_, name in asked.requests], ledger, run

        found = self.lm.sample_log.take(asked.key, fits)
        if found is None:
            return False
        answers, ledger, run = found
        ledger.runs[run] += 1
        reporter.counted(answers[0].stats)
        self._fresh[asked.task or ""].merge(ledger)
        for (index, key, _), answer in zip(asked.requests, answers, strict=True):
            self.give(index, key, answer, found=True)
        return True


def plain(answer: Any) -> Any:
    """A measured answer as JSON, without its figures."""
    if isinstance(answer, MeasuredLoglikelihood):
        return [float(answer[0]), bool(answer[1])]
    return str(answer) if isinstance(answer, MeasuredText) else float(answer)


def measured(kind: str, value: Any, stats: dict[str, Any]) -> Any:
    """The measured answer that `plain` was given. Raises `TypeError` or `ValueError` when it was none of this kind."""
    if kind == "loglikelihood":
        logprob, greedy = value
        if not isinstance(logprob, float) or not isinstance(greedy, bool):
            raise TypeError("no log-likelihood")
        return MeasuredLoglikelihood(logprob, greedy, stats)
    wanted, made = (str, MeasuredText) if kind == "generate_until" else (float, MeasuredFloat)
    if not isinstance(value, wanted):
        raise TypeError(f"no {wanted.__name__}")
    return made(value, stats)


def tokens_of(*sequences: Sequence[int]) -> str:
    """A hash of sequences of token ids."""
    return digest([hashlib.sha256(array("q", tokens).tobytes()).hexdigest() for tokens in sequences])


def _arguments(request: Instance) -> list[Any]:
    """The arguments of a request as JSON, with what its context says beyond its text."""
    context, *rest = request.args
    more = [json.dumps(arg, sort_keys=True, default=str) if isinstance(arg, dict) else str(arg) for arg in rest]
    return [str(context), getattr(context, "shared", None), window_of(context), *more]


__all__ = ["Answers", "Asked", "tokens_of"]
