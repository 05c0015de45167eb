"""`recommend`: the cheapest configuration that is certified for a task or a group, and the line that runs it.

What is certified is decided in `choice`; here costs get one unit, and a choice becomes text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import UserError
from ..labels import label
from ..results.reproduce import model_args_option
from ..results.schema import Record
from . import cost, overview
from .certify import Options
from .choice import Candidate, Choice, choose, shared
from .ladder import reached
from .study import TAKEN, Point, Study

#: What can be asked to be least, with its unit.
BY = {
    "cost": "s at least",
    "memory": "bytes of keys and values",
    "time": "s a document, as recorded",
}
#: Operations and bytes a second of the device that `cost` is counted for: an H100 SXM by its data sheet, bf16 dense.
OPERATIONS, BYTES = 989e12, 3.35e12
#: Bytes of a weight or of an element of a cache there.
_ELEMENT = 2
#: Marks of what is mixed that are printed.
_MOST_MARKS = 5
#: Model arguments that change nothing of what is computed.
_IDLE = ("resume", "diagnose", "stats")


def least_seconds(record: Record, batch: float, answer: float) -> float | None:
    """Seconds that a document takes at least on the device of `OPERATIONS` and `BYTES`: its prompt by the operations of
    the prefill, `answer` tokens by the bytes that decoding reads, both by `cost.of`, a batch shared by its rows.

    It is what prefill and decoding have in common: a prefill is bound by operations, decoding by reading.
    """
    found = cost.of(record, batch)
    prefill, decode = found.total("prefill"), found.total("decode")
    if prefill is None or decode is None:
        return None
    return (prefill / OPERATIONS + answer * decode * _ELEMENT / BYTES) / batch


def cost_of(by: str, batch: float, answer: float) -> Callable[[Point], float | None]:
    """What a run costs by what was asked for; None where it is not known."""

    @functools.cache
    def of(point: Point) -> float | None:
        if by == "cost":
            return least_seconds(point.record, batch, answer)
        found = cost.of(point.record, batch)
        return found.memory if by == "memory" else found.seconds.get("document")

    return of


def recommend(
    study: Study,
    options: Options,
    *,
    task: str | None = None,
    group: str | None = None,
    length: int | None = None,
    by: str = "cost",
    answer: float = 256,
) -> tuple[str, bool]:
    """What to print, and whether a configuration is recommended.

    Args:
        task, group, length: what must be kept, see `choice.choose`.
        by: a name in `BY`.
        answer: tokens of an answer, for `by="cost"`.

    Raises:
        UserError: an option means nothing, or there is no such task.
    """
    if not 0 <= answer <= 1e9:
        raise UserError(f"--answer_tokens {answer:g}: a number of tokens is expected")
    found = choose(study, options, cost_of(by, options.batch, answer), task=task, group=group, length=length)
    if by == "time" and found.best is not None and (apart := _several_devices(found)):
        found = replace(found, best=None, runner_up=None, refusal=apart)
    levels = [f"Note: {line}." for line in study.left_out if TAKEN in line][:_MOST_MARKS]
    marks = [f"Note: {mark}: what differs is never put together." for mark in study.marks[:_MOST_MARKS]]
    if left := overview.left_out(study):
        marks.insert(0, f"Note: {left}")
    return "\n".join([*levels, *marks, text(found, options, by, answer)]), found.best is not None


def _several_devices(found: Choice) -> str | None:
    """Times of several devices say nothing of configurations."""
    runs = (point for one in found.certified for point in (*one.points, *one.dense))
    devices = sorted({point.record.device or "a device that is not recorded" for point in runs})
    if len(devices) < 2:
        return None
    return (
        f"certified configurations and their dense runs were timed on {' and '.join(map(label, devices))}, and "
        "times of different devices cannot be compared: give the results of one, or --by cost"
    )


def text(found: Choice, options: Options, by: str, answer: float) -> str:
    """A choice in lines, the last of which is to be pasted."""
    kept = ", ".join(map(label, found.tasks))
    if found.best is None:
        lines = [f"Nothing is recommended: {found.refusal}."]
    else:
        how = "" if options.test == "hoeffding-bentkus" else f"; {options.test}: an approximation, no guarantee"
        lines = [
            f"Take {_named(found.best)}: {_among(len(found.certified))} certified to lose at most "
            f"{options.tolerance:g} against dense on {kept} (level {options.level:g}{_together(found.family)}{how}).",
            f"  {_figures(found.best, by)}",
        ]
        if found.runner_up is not None:
            lines += [f"Runner-up: {_named(found.runner_up)}.", f"  {_figures(found.runner_up, by)}"]
        else:
            lines.append("Runner-up: none is certified and cheaper than dense.")
        if by == "cost":
            lines.append(
                f"Cost: what a prompt and {answer:g} tokens take at least on a device of {OPERATIONS / 1e12:g} Tflop/s "
                f"and {BYTES / 1e12:g} TB/s, batch {options.batch:g}, selecting included."
            )
    lines += [f"Note: {note}." for note in found.notes[:5]]
    if found.measure:
        # A refusal for want of certificates has said it.
        share = "" if not found.certified or found.family < 2 else f" ({shared(found.family, options)})"
        lines.append(f"To certify more{share}:")
        lines += [f"  {line}" for line in found.measure]
    if found.best is not None:
        lines += _lines([point.record for point in found.best.points])
    return "\n".join(lines)


def _among(certified: int) -> str:
    if certified == 1:
        return "the only configuration that is"
    return f"the cheapest of {certified} configurations that are"


def _together(family: int) -> str:
    return f" for all {family} candidates together" if family > 1 else ""


def _named(one: Candidate) -> str:
    return f"{label(one.label)} at sparsity {reached(one.sparsity, one.measured)} of {label(one.model)}"


def _figures(one: Candidate, by: str) -> str:
    unknown = "unknown"
    told = unknown if one.cost is None else f"{one.cost:.3g}"
    dense = unknown if one.dense_cost is None else f"{one.dense_cost:.3g}"
    many = len(one.points)
    means = f", means of {many} runs" if many > 1 else ""
    largest = f", the largest of {many} runs" if many > 1 else ""
    fewest = "at least " if many > 1 else ""
    return (
        f"{by}: {told} {BY[by]} (dense {dense}); score {one.score:.3f} (dense {one.dense_score:.3f}); measured "
        f"sparsity {one.measured:.3f}{means}; observed mean loss {one.loss:.3f}{largest}, p = {one.p:.2g}, "
        f"{fewest}{one.documents} documents"
    )


def _lines(records: Sequence[Record]) -> list[str]:
    """What runs a configuration on its tasks: one line, or one for each task where its runs differ in arguments."""
    by_line: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        by_line.setdefault(tuple(_line(record)), []).append(label(record.task))
    if len(by_line) == 1:
        return list(next(iter(by_line)))
    found = []
    for lines, tasks in by_line.items():
        found += [f"On {', '.join(tasks)} it was run with:", *lines]
    return found


def _line(record: Record) -> list[str]:
    """The model arguments of a run, as lm-eval takes them, without those that change no answer.

    Results may come from anybody. What they do not say is not made up, what contradicts them is not pasted, and code is
    not trusted on their word.
    """
    given = {name: value for name, value in record.model_args.items() if name not in _IDLE and value is not None}
    if not _agrees(given, record):
        return ["There is no line to paste: the runs do not say with which --model_args they were made."]
    given.setdefault("pretrained", record.model)
    code = given.pop("trust_remote_code", None)
    order = sorted(given, key=lambda name: (name != "pretrained", name != "method", not name.endswith("sparsity")))
    notes = ["Note: the runs had trust_remote_code=True; add it if you trust the model's code."] if code else []
    if record.code:
        notes.append("Note: the method is a file of somebody's own; give its path, and --allow-code if you trust it.")
    return [*notes, model_args_option({name: given[name] for name in order})]


def _agrees(given: Mapping[str, Any], record: Record) -> bool:
    """Whether model arguments name the model, method and sparsity that were recorded."""
    method = given.get("method")
    if not isinstance(method, str) or (method != record.method and not record.code):
        return False
    if given.get("pretrained", record.model) != record.model and not (given.get("peft") or given.get("delta")):
        return False
    if record.requested is None:
        return True
    typed = {name: value for name, value in given.items() if str(name).endswith("sparsity")}
    return bool(typed) and ("sparsity" not in typed or typed["sparsity"] == record.requested)
