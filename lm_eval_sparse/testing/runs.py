"""Checks of a method in a model: what it scores and generates, and what is reported of it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from ..errors import UserError
from . import bench
from .selections import NEAR, PROMISED, expect, neighbours
from .subject import Subject
from .tensors import shown, weights

#: How near log-likelihoods and measured sparsities have to be that are the same.
CLOSE, EXACT = 1e-4, 1e-6
#: Tokens between two evictions, and of the answer, in the check of periodic eviction; and its sparsities.
EVERY, ANSWER, PERIODIC = 24, 60, (0.5, 0.9)


@cache
def _dense() -> tuple[list[Any], list[Any]]:
    return bench.answers(bench.lm_of({"method": "dense"}))


def full_budget(subject: Subject) -> str:
    """A budget that covers everything is dense: as a fallback that says why, and selected and executed all the same."""
    dense, most = _dense(), 0.0
    with subject.known():
        for forced in (False, True):
            lm = bench.lm_of(subject.options(subject.covering), batch_size=2)
            asked_anyway = bench.replaced(subject.outer, "too_short", _never) if forced else nullcontext()
            with asked_anyway, bench.recorded(subject) as seen:
                found = bench.answers(lm)
            far = max(abs(float(one[0]) - float(other[0])) for one, other in zip(found[0], dense[0], strict=True))
            most = max(most, far)
            how = "selected and executed" if forced else "as a fallback"
            expect(far <= CLOSE, f"{how}, a budget of everything scores {far:.2g} from dense; expected {CLOSE:g}")
            expect(found[1] == dense[1], f"{how}, a budget of everything generates another answer than dense")
            if any(weights(selection) for *_, selection in seen):
                continue  # what it adds to scores or values is its own, and not told from the lists
            report = lm.report()["phases"][subject.phase]
            expect(
                report["calls"]["sparse"] == 0 < report["calls"]["fallback"] and report["fallback_reasons"],
                f"{how}, a budget of everything counts {report['calls']}; expected fallbacks that say why",
            )
            expect(
                report["executed_sparsity"] == 0,
                f"{how}, a budget of everything measures a sparsity of {report['executed_sparsity']}; expected 0",
            )
            try:
                lm.check_it_ran()
            except UserError as error:
                expect(f"{subject.name} never ran" in str(error), f"{how}: {error}")
            else:
                expect(False, f"{how}, a run that never was sparse counts as one that was")
    return f"scores {most:.1g} from dense, the same answers"


def _never(self: Any, sparsity: float | None, length: int) -> None:
    return None


def batch(subject: Subject) -> str:
    """Alone, in a batch, once more, and cut short: selections, answers and figures are the same."""
    if subject.phase == "decode":  # whatever a model's own rounding lets side by side
        neighbours(subject)
    with subject.known():
        options = subject.options(subject.tiny)
        alone = bench.lm_of(options, batch_size=1)
        first, again = bench.answers(alone), bench.answers(alone)
        together = bench.answers(bench.lm_of(options, batch_size=len(bench.PROMPTS)))
        for how, other in (("asked once more", again), ("beside others", together)):
            far = max(abs(one[0] - two[0]) for one, two in zip(first[0], other[0], strict=True))
            expect(far <= CLOSE, f"{how}, a prompt scores {far:.2g} from what it scored first, alone")
            expect(other[1] == first[1], f"{how}, a prompt gets another answer than first, alone")
            expect(
                bench.figures(other) == bench.figures(first),
                f"{how}, a prompt measures other figures than first, alone",
            )
        for long, short in zip(first[1], bench.generate(alone, bench.PROMPTS, 3), strict=True):
            expect(long.startswith(short), "an answer that is cut short begins otherwise")
    return f"{len(bench.PROMPTS)} prompts, the same alone and together"


def counted(subject: Subject) -> str:
    """What is measured in a run is what was selected in it, counted entry by entry."""
    prompt, length, found = bench.PROMPTS[2], bench.LENGTHS[2], []
    kinds = ((torch.float32, 1), (torch.float32, 2), (torch.float16, 2), (torch.bfloat16, 4))
    with subject.known():
        for dtype, kv_heads in kinds:
            lm = bench.lm_of(subject.options(subject.tiny), dtype=dtype, kv_heads=kv_heads)
            with bench.recorded(subject) as seen:
                (answer,) = bench.score(lm, [prompt])
            if subject.periodic:
                seen = [one for one in seen if one[1].cache is None]
            one_by_one = bench.LAYERS * (bench.ANSWER.count("w") - 1) if subject.phase == "decode" else 0
            expect(
                len(seen) in (bench.LAYERS, one_by_one) and {type(method) for method, *_ in seen} == {subject.outer},
                f"it was asked {len(seen)} times; expected once in each of {bench.LAYERS} layers",
            )
            kept, whole = [], []
            for _, call, selection in seen:
                if subject.phase == "prefill":
                    kept.append(int(shown(selection, "prefill", kv_heads, length).sum()))
                    whole.append(bench.HEADS * length * (length + 1) // 2)
                elif subject.phase == "eviction":
                    kept.append(int(shown(selection, "eviction", kv_heads, length).sum()))
                    whole.append(kv_heads * length)
                else:
                    held = call.lengths > 0  # rows beside which there is nothing are idle
                    read = selection.keys_read(call).double().mean(1)[held]
                    kept.append(float(read.sum()) / kv_heads)
                    whole.append(float(call.visible(read.shape[1])[held].sum()) / kv_heads)
            measured = answer.stats[subject.phase]
            executed, listed = measured["executed_sparsity"], 1 - sum(kept) / sum(whole)
            found.append(executed)
            expect(0.1 < executed < 1, f"a run under its `tiny` knobs measures a sparsity of {executed:.3f}")
            expect(abs(executed - listed) <= EXACT, f"a run measures {executed:.6f}, and {listed:.6f} was selected")
            expect(set(measured["calls"]) == {"sparse"}, f"a run under its `tiny` knobs has calls {measured['calls']}")
            expect(float(answer[0]) < 0, f"a log-likelihood of {float(answer[0]):.3g}")
            lm.check_it_ran()
    return f"measured {found[1]:.4f}, as counted"


def every(subject: Subject) -> str:
    """Evicted again in the course of an answer, the promise holds right after each time."""
    prompt, answer, found = bench.text(PROMISED), " " + bench.text(ANSWER, 5), []
    with subject.known():
        for sparsity in PERIODIC:
            lm = bench.lm_of({"method": subject.name, "sparsity": sparsity, f"{subject.chain.inner.name}.every": EVERY})
            with bench.recorded(subject) as seen:
                bench.score(lm, [prompt], answer)
            again = [(call, kept) for _, call, kept in seen if call.cache is not None]
            times = (ANSWER - 1) // EVERY * bench.LAYERS
            expect(len(again) == times, f"every={EVERY}: evicted {len(again)} times in an answer, expected {times}")
            for turn in range(0, len(again), bench.LAYERS):
                layers = again[turn : turn + bench.LAYERS]
                tokens = int(layers[0][0].cache.tokens[0])
                kept = sum(int(selection.counts.sum()) for _, selection in layers)
                whole = sum(len(selection.counts) * tokens for _, selection in layers)
                found.append(1 - kept / whole)
                expect(
                    abs(found[-1] - sparsity) <= NEAR + 1e-9,
                    f"every={EVERY}: {found[-1]:.4f} of {tokens} tokens are gone right after an eviction; expected "
                    f"{sparsity} within {NEAR}",
                )
    return f"{len(found)} evictions within {max(abs(f - s) for f, s in _pairs(found)):.4f} of the promise"


def _pairs(found: list[float]) -> list[tuple[float, float]]:
    each = len(found) // len(PERIODIC)
    return [(one, PERIODIC[place // each]) for place, one in enumerate(found)]
