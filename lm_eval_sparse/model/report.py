"""What was measured while a model answered, and what is said of it: per response, per task, and in the results file.

Counting itself is done in `runtime.accounting`; here counts become the figures that lm-eval's results carry, and a run
in which a requested sparse phase never ran sparsely fails.
"""

from __future__ import annotations

import logging
import platform
import uuid
from collections import defaultdict
from datetime import datetime, timezone
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
import transformers
from lm_eval.api.instance import Instance

from .. import __version__
from ..errors import UserError
from ..methods import PHASE_ARGUMENTS, presets
from ..protocol import SKIPPED
from ..runtime.accounting import COVERED, PHASES, Ledger, RowCounts, compactions
from .sizes import sizes_of
from .summary import together

if TYPE_CHECKING:
    from .lm import SparseHFLM

logger = logging.getLogger(__name__)

#: Why a phase had no call at all.
NEVER_CALLED = {
    "prefill": "no layer with full causal attention was called",
    "eviction": (
        "no prompt was put into a cache (perplexity tasks run each window as one prefill, and so do scored tasks on "
        "models with a recurrent state); use generated or scored tasks, or leave the method out"
    ),
    "decode": (
        "no token was decoded against a cache (answers of one token come from the prefill, perplexity tasks run each "
        "window as one prefill, and models with a recurrent state are scored in one pass); use tasks with longer "
        "answers, or leave the method out"
    ),
}


class Reporter:
    """What the answers of a model were measured to be, so far.

    Attributes:
        run_id: tells the responses of this model object from those of others.
        ledgers: what was counted, by task.
        skipped: why tasks were left out, by task.
        begun: whether any prompt ran.
        full: whether the figures of every layer and head are kept.
        runs: run -> what is known of it: when it began, and on what. This one, and those whose answers were taken.
    """

    def __init__(self, lm: SparseHFLM, full: bool):
        self.lm, self.full = lm, full
        self.run_id = uuid.uuid4().hex[:12]
        self.ledgers: dict[str, Ledger] = defaultdict(self.new_ledger)
        self.skipped: dict[str, str] = {}
        self.begun = False
        #: Those of all processes, where there are several.
        self.devices: list[str] = []
        self._others: list[dict[str, Any]] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self._began = datetime.now(timezone.utc).isoformat(timespec="seconds")
        #: Figures of answers from the log of samples, which were counted as they were taken.
        self._counted: dict[int, dict[str, Any]] = {}
        #: Prompts of this process that are yet to be looked at: the documents go round the processes.
        self._to_diagnose: int | None = None

    def to_diagnose(self, prompts: int) -> int:
        """How many of the next `prompts` prompts, the first ones, are samples of `diagnose=N`; they count as such."""
        lm = self.lm
        if self._to_diagnose is None:
            each, more = divmod(lm.sparse.diagnose, lm.world_size)
            self._to_diagnose = each + (lm.rank < more)
        number = min(prompts, self._to_diagnose)
        self._to_diagnose -= number
        return number

    def new_ledger(self) -> Ledger:
        return Ledger(full=self.full)

    def skips(self, request: Instance) -> bool:
        """Whether the document of a request only stands for a leaf that cannot run, which is then noted."""
        reason = request.doc.get(SKIPPED) if isinstance(request.doc, dict) else None
        if reason is not None:
            self.skipped[request.task_name] = reason
        return reason is not None

    def stats(self, counts: RowCounts) -> dict[str, Any]:
        """What a response carries: the measured sparsity of the phases that methods fill, and the details.

        `sparsity` is that of the one phase with a method (of prefill when all is dense), `sparsities` those of all
        phases with a method, under the names of the arguments that ask for them.
        """
        figures = counts.figures()
        measured = {
            PHASE_ARGUMENTS[phase]: figures[phase]["executed_sparsity"]
            for phase in self.lm.sparse.methods or ("prefill",)
        }
        return {
            "run": self.run_id,
            "sparsity": next(iter(measured.values())) if len(measured) == 1 else None,
            **({"sparsities": measured} if len(measured) > 1 else {}),
            "requested_sparsity": self.lm.sparse.sparsity,
            **{
                name: {
                    **figures[name],
                    "calls": dict(counts.phase(name).calls),
                    "backends": dict(counts.phase(name).backends),
                    **self._window_told(name, counts),
                    **self._compactions_told(name, compactions(counts.phase(name).knobs)),
                }
                for name in PHASES
            },
        }

    def _window_told(self, phase: str, counts: RowCounts) -> dict[str, Any]:
        """The window that a response was made with, where its task decided it."""
        assignment, used = self.lm.runtime.plan.phases.get(phase), counts.phase(phase).knobs.get("window")
        return {"window": used[1]} if assignment is not None and assignment.window_by_task and used else {}

    def _compactions_told(self, phase: str, number: int) -> dict[str, Any]:
        """How often layers were evicted again in the course of answers, where that was asked for."""
        return {"compactions": number} if phase == "eviction" and self.lm.runtime.plan.every is not None else {}

    def add(self, fresh: dict[str, Ledger]) -> None:
        """Merge what was counted while requests were answered."""
        self.begun = True
        for task, ledger in fresh.items():
            self.ledgers[task].merge(ledger)

    def reduce(self) -> None:
        """Put together on rank 0 what all processes counted since the last time. All of them have to call it."""
        lm = self.lm
        if lm.peers is None:
            return
        mine = {
            "ledgers": dict(self.ledgers),
            "skipped": self.skipped,
            "longest_answer": lm.runtime.longest_answer,
            "halved": lm.decoding.halved,
            "device": device_name(lm.device),
            "run": lm.summary.figures(),
            "runs": {self.run_id: self.about, **self.runs},
        }
        parts = lm.peers.gather(mine)
        if parts is None:
            self.ledgers.clear()
            lm.decoding.halved = 0
            return
        for part in parts[1:]:
            self.add(part["ledgers"])
            self.skipped |= part["skipped"]
            lm.runtime.longest_answer = max(lm.runtime.longest_answer, part["longest_answer"])
            lm.decoding.halved += part["halved"]
            self.runs |= part["runs"]
        self.devices = [part["device"] for part in parts]
        self._others = [part["run"] for part in parts[1:]]

    @property
    def about(self) -> dict[str, Any]:
        """What is said of this run where its answers are told from those of others. It names no machine."""
        return {"began": self._began, "device": device_name(self.lm.device), "versions": versions()}

    def counted(self, stats: dict[str, Any]) -> None:
        """Note that the answers that carry these figures have been counted, though another run made them."""
        self._counted[id(stats)] = stats

    def is_counted(self, stats: dict[str, Any]) -> bool:
        """Whether the ledgers have answers with these figures: this run made them, or took them from the log."""
        return stats["run"] == self.run_id or id(stats) in self._counted

    def count_restored(self, task: str, stats: dict[str, Any], window: int | None = None) -> None:
        """Count an answer that came from a response cache with what was measured when it was made.

        Raises `UserError` when its task said another window then than now (`window`): lm-eval's key for an answer does
        not hold it.
        """
        for phase, assignment in self.lm.runtime.plan.phases.items():
            made, now = stats[phase].get("window"), presets.window(assignment.preset, type(assignment.method), window)
            if made is not None and made != now:
                raise UserError(
                    f"the --use_cache file holds answers of {task} that {assignment.method.name} made with window="
                    f"{made}, and the task says {now} now; give another file name, or delete that one"
                )
        self.ledgers[task].add_stats(stats)
        self.ledgers[task].runs[stats["run"]] += 1

    def report(self) -> dict[str, Any]:
        """The `sparse` block of the results file."""
        lm = self.lm
        total = self.new_ledger()
        for ledger in self.ledgers.values():
            total.merge(ledger)
        untouched = {layer: reason for layer, reason in lm.runtime.layers.items() if reason is not None}
        count = getattr(lm.config.get_text_config(decoder=True), "num_hidden_layers", len(lm.runtime.layers))
        untouched |= {n: "no softmax attention" for n in range(count) if n not in lm.runtime.layers}

        def phases(ledger: Ledger, layers: bool = False) -> dict[str, Any]:
            found = {name: ledger.diagnostics(name, layers) for name in PHASES}
            methods = {name: lm.sparse.methods[name].name if name in lm.sparse.methods else "dense" for name in PHASES}
            return {
                name: {
                    "method": methods[name],
                    "requested_sparsity": lm.sparse.sparsities.get(name),
                    **ledger.report(name),
                    **self._compactions_told(name, ledger.compactions),
                    **({"diagnostics": found[name]} if found[name] is not None else {}),
                }
                for name in PHASES
            }

        return {
            **lm.sparse.describe(),
            "budget_knobs": lm.sparse.budget_knobs,
            "phases": phases(total, layers=True),
            "prompts": total.rows,
            # Ranks have runs of their own, which the first one knows by name only; so have response caches.
            "runs": [
                {"run": run, "prompts": number, **(self.about if run == self.run_id else self.runs.get(run, {}))}
                for run, number in total.runs.items()
            ],
            "tasks": {
                task: phases(ledger) | {"prompts": ledger.prompts()} for task, ledger in self.ledgers.items() if task
            },
            "model": sizes_of(lm.model, lm.runtime),
            "skipped": dict(self.skipped),
            "layers": {"sparse_eligible": sum(r is None for r in lm.runtime.layers.values()), "untouched": untouched},
            "versions": versions(),
            "device": device_name(lm.device),
            "run": together(lm.summary.figures(), self._others),
            **({"processes": {"number": lm.world_size, "devices": self.devices}} if lm.peers is not None else {}),
            **({"batches_halved": lm.decoding.halved} if lm.decoding.halved else {}),
        }

    def detail_report(self) -> dict[str, Any]:
        """Figures per layer and query head of each phase that computed anything, by task, averaged over prompts.

        `prompts` are those averaged over: answers that came from a response cache carry no figures per layer.
        """
        return {
            task: {
                "prompts": ledger.rows - ledger.restored,
                **{name: ledger.detail_report(name) for name in PHASES if ledger.details[name]},
            }
            for task, ledger in self.ledgers.items()
        }

    def check_it_ran(self) -> None:
        """Raise when a sparse phase was requested, prompts were run, and none of its calls was sparse."""
        report = self.report()
        for phase, assignment in self.lm.runtime.plan.phases.items():
            method, measured = assignment.method.name, report["phases"][phase]
            if measured["calls"]["sparse"]:
                continue
            reasons = set(measured.get("fallback_reasons", {}))
            if phase == "decode" and reasons == {COVERED} and report["phases"]["eviction"]["calls"]["sparse"]:
                continue  # eviction left no more than decoding may read: as requested, and in the results
            if report["prompts"]:
                reasons = "; ".join(measured.get("fallback_reasons", {})) or NEVER_CALLED[phase]
                calls = sum(measured["calls"].values())
                if not calls:
                    raise UserError(f"{method} never ran: {reasons}")
                raise UserError(
                    f"{method} never ran: all {calls} {phase} calls were dense ({reasons}); use longer prompts or "
                    "another sparsity, or type method=dense to mean dense"
                )
            if self.skipped:
                task, reason = next(iter(self.skipped.items()))
                raise UserError(f"{method} never ran: every task was skipped, such as {task} ({reason})")
        self._check_eviction_mattered()
        self._check_evicted_again()
        self._check_diagnosed(report)

    def _check_diagnosed(self, report: dict[str, Any]) -> None:
        """Warn when fewer samples were looked at than were asked for."""
        wanted = self.lm.sparse.diagnose
        for phase, assignment in self.lm.runtime.plan.phases.items():
            number = report["phases"][phase].get("diagnostics", {}).get("samples", 0)
            if number < wanted and report["prompts"]:
                logger.warning(
                    "diagnose=%d: %s ran in %d of the first %d prompts only (no others ran, or they were too short, "
                    "answered with one token, or answered by a response cache)",
                    wanted, assignment.method.name, number, wanted,
                )  # fmt: skip

    def _check_evicted_again(self) -> None:
        """Warn of tasks in which a method that evicts periodically was never asked a second time."""
        plan = self.lm.runtime.plan
        if plan.every is None:
            return
        once = [task for task, ledger in self.ledgers.items() if ledger.rows and not ledger.compactions]
        if once:
            logger.warning(
                "%s evicted prompts only, never an answer in its course, in %s: every=%d, and no answer of theirs has "
                "so many tokens (the longest has %d); their scores are those of every=None",
                plan.eviction.method.name, ", ".join(task or "the run" for task in once), plan.every,
                self.lm.runtime.longest_answer,
            )  # fmt: skip

    def _check_eviction_mattered(self) -> None:
        """Raise when nothing was decoded after eviction, warn when that is so in some tasks only."""
        if self.lm.runtime.plan.eviction is None:
            return
        method = self.lm.runtime.plan.eviction.method.name
        idle, busy = [], []
        for task, ledger in self.ledgers.items():
            if ledger.calls["eviction"]["sparse"]:
                (busy if sum(ledger.calls["decode"].values()) else idle).append(task)
        if idle and not busy:
            raise UserError(f"{method} could not change any answer: {NEVER_CALLED['decode']}")
        if idle:
            logger.warning(
                "%s could not change any answer of %s, whose scores are those of the prefill: no token was decoded "
                "against the evicted cache", method, ", ".join(idle),
            )  # fmt: skip


def versions() -> dict[str, str]:
    """What answers are made with, besides the arguments."""
    return {
        "lm_eval_sparse": __version__,
        "lm_eval": version("lm_eval"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """A name a reader of results understands: the card, or the processor with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} ({device.type}, {torch.get_num_threads()} threads)"


__all__ = ["Reporter", "device_name", "versions"]
