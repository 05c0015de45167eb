"""The summary of a report: what was compared, whether dense attention can do it, and of each part what says most.

A part may name its own key sentences (`Section.first`). Of certificates and of the scaling law they are read from their
tables; of any other part those about the longest prompts and the largest model stand for the rest.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..labels import label
from ..results.schema import Record
from .certify import asked
from .figure import Section, Table
from .ladder import floor_of, listed, reached
from .study import Cell, Study

#: Sentences of a part, and names of a list; what is more stands in the part.
MOST, _NAMES = 2, 6
#: How a length stands in a sentence.
_LENGTH = re.compile(r"([0-9][0-9,]*) tokens")
#: What `ladder.floor_of` says of a task that dense attention is shown not to do.
_CANNOT = "dense cannot do this task"
#: What `scaling` calls all methods of a phase.
_ALL = "all methods"


def summary(study: Study, options: Any, parts: Iterable[Section]) -> tuple[str, ...]:
    """Sentences for the top of a report, each once."""
    sized = {cell.model: cell.parameters for cell in study.cells if cell.parameters}
    largest = max(sized, key=sized.__getitem__) if len(sized) > 1 else ""
    found = list(head(study, options))
    for part in parts:
        found += key_sentences(part, label(largest))
    return tuple(dict.fromkeys(found))


def lacks(study: Study) -> str:
    """What keeps the study from being a comparison, and what to type; empty where nothing does."""
    cells = study.primary
    if all(cell.dense is None for cell in cells):
        missing, why, what = "dense", "nothing can be compared", "method=dense"
    elif not any(cell.chains for cell in cells):
        missing, why, what = "sparse", "there is nothing to compare dense attention with", "method=NAME,sparsity=S"
    else:
        return ""
    if left := left_out(study):
        return f"There is no {missing} run among the results that can be used, so {why}. {left}"
    models = {record.model for record in study.records}
    model = label(models.pop(), 80) if len(models) == 1 else "MODEL"
    return (
        f"There is no {missing} run here, so {why}: run the same tasks with --model sparse-hf --model_args "
        f"pretrained={model},{what}, and give the results of both."
    )


def left_out(study: Study) -> str:
    """How much could not be read, with the first reason; empty where all could."""
    many = len(study.unread)
    if not many:
        return ""
    what = "file or figure is" if many == 1 else "files or figures are"
    again = f"run {'that' if many == 1 else 'those'} again to have {'it' if many == 1 else 'them'} in"
    first = f"the first: {label(study.unread[0], 400)}" if many > 1 else label(study.unread[0], 400)
    return f"{many:,} {what} left out, and what is said is of the rest only ({again}); {first}."


def warnings(study: Study) -> tuple[str, ...]:
    """What a reader must know before anything else, each once."""
    lacking = lacks(study)
    left = left_out(study)
    return tuple(filter(None, (lacking, "" if left in lacking else left, *study.marks)))


def head(study: Study, options: Any = None) -> tuple[str, ...]:
    """What was compared, and whether dense attention can do the tasks."""
    cells = study.primary
    dense = [cell for cell in cells if cell.dense is not None]
    sparse = [cell for cell in cells if cell.chains]
    found = [_compared(study, cells)]
    without = [cell for cell in sparse if cell.dense is None]
    if dense and without:
        have = " has" if len(sparse) == 1 else ", have"
        found.append(
            f"{_of(len(without), len(sparse))}{have} sparse runs and no dense run to compare them with: "
            f"{listed(map(_place, without), _NAMES)}."
        )
    if dense:
        found += _able(dense, getattr(options, "margin", 0.05))
    return tuple(found)


def key_sentences(part: Section, largest: str = "") -> tuple[str, ...]:
    """The sentences of a part that say most, at most `MOST` unless it names them itself; `largest` is a model."""
    if part.first:
        return part.first
    tables = {table.name: table for table in part.tables}
    if found := _certified(tables.get("certificate_reasons")):
        return found
    sentences, law = list(part.sentences), _law(tables.get("scaling_coefficients"))
    if law:
        sentences.sort(key=lambda sentence: _ALL not in sentence)
        return law, *sentences[: MOST - 1]
    ranks = [(_length(sentence), bool(largest) and largest in sentence) for sentence in sentences]
    best = max(ranks, default=None)
    return tuple(sentence for rank, sentence in zip(ranks, sentences, strict=True) if rank == best)[:MOST]


# -- what was compared


def _compared(study: Study, cells: Sequence[Cell]) -> str:
    chains = [chain for cell in cells for chain in cell.chains]
    methods = sorted({label(chain.label) for chain in chains})
    sparsities = sorted({asked(point) for chain in chains for point in chain.points})
    lengths = sorted({cell.length for cell in cells if cell.length})
    documents = sorted({record.n for record in study.records})
    tasks = sorted({label(cell.short) for cell in cells})
    parts = [
        _named(len(study.models), "model", map(label, study.models)),
        _named(len(tasks), "task", tasks),
    ]
    if methods:
        steps = f" at sparsities from {sparsities[0]:.3g} to {sparsities[-1]:.3g}" if len(sparsities) > 1 else ""
        parts.insert(1, f"{_named(len(methods), 'method', methods)}{steps}")
    at = f" at {', '.join(f'{length:,}' for length in lengths)} tokens" if lengths else ""
    runs = run_count(study.records)
    many = f"{documents[0]:,}" if len(documents) == 1 else f"{documents[0]:,} to {documents[-1]:,}"
    return (
        f"{'; '.join(parts)}{at}: {runs:,} run{'' if runs == 1 else 's'}, {many} document"
        f"{'' if documents[-1] == 1 else 's'} a task."
    )


def run_count(records: Iterable[Record]) -> int:
    """How many runs of lm-eval left these records."""
    return len({(record.source.partition(", line ")[0], record.date, record.command) for record in records})


def _named(number: int, what: str, names: Iterable[str]) -> str:
    return f"{number} {what}{'' if number == 1 else 's'} ({listed(names, _NAMES)})"


def _place(cell: Cell) -> str:
    at = f", {cell.length:,} tokens" if cell.length else ""
    return f"{label(cell.short)} ({label(cell.model, 60)}{at})"


def _of(some: int, all_of_them: int) -> str:
    if all_of_them == 1:
        return f"{some} of 1 task"
    return f"{some} of {all_of_them} tasks, counted once for each model and length"


# -- dense attention


def _able(cells: Sequence[Cell], margin: float) -> list[str]:
    floor = floor_of(margin)
    why = {id(cell): floor(cell) for cell in cells}
    able = [cell for cell in cells if why[id(cell)] is None]
    unable = [cell for cell in cells if (why[id(cell)] or "").startswith(_CANNOT)]
    unknown = [cell for cell in cells if why[id(cell)] is not None and cell not in unable]
    found = []
    if able or unable:
        rest = f"; it cannot do {listed(_counted(unable), _NAMES)}" if unable else ""
        found.append(f"Dense attention can do {_of(len(able), len(cells))}{rest}.")
    reasons: dict[str, list[Cell]] = defaultdict(list)
    for cell in unknown:
        reasons[re.sub(r"--chance [^\s=]+=", "--chance TASK=", why[id(cell)] or "")].append(cell)
    it = "it" if found else "dense attention"
    for reason, members in list(reasons.items())[:MOST]:
        found.append(f"Whether {it} can do {listed(_counted(members), _NAMES)} is not known: {label(reason, 300)}.")
    return found


def _counted(cells: Sequence[Cell]) -> list[str]:
    """Short names of tasks, with how often where there are several models or lengths of one."""
    times: dict[str, int] = defaultdict(int)
    for cell in cells:
        times[label(cell.short)] += 1
    return [f"{name} ({number} times)" if number > 1 else name for name, number in times.items()]


# -- parts


def _length(sentence: str) -> int:
    """The largest length that a sentence is about; 0 where it names none."""
    return max((int(found.replace(",", "")) for found in _LENGTH.findall(sentence)), default=0)


def _certified(table: Table | None) -> tuple[str, ...]:
    """How far certificates go, and where they end first; nothing of a table of other columns."""
    if table is None:
        return ()
    places = {name.partition(" ")[0]: place for place, name in enumerate(table.header)}
    wanted = ("model", "method", "length", "what", "name", "largest", "at")
    if not all(name in places for name in wanted):
        return ()
    there = [places[name] for name in wanted]
    rows = [
        _Tested(*(row[at] for at in there), row[places["measured"]] if "measured" in places else None)
        for row in table.rows
    ]
    word = str(table.header[places["largest"]]).removeprefix("largest ") or "certified"
    # Of what was tested: nothing has to be at most anything where nothing can be said.
    tested = [row for row in rows if row.what == "task" and row.at is not None and "oracle" not in row.method]
    if not tested:
        return (f"Nothing can be {word}: why stands with each task in the part on it.",)
    kept = [row for row in tested if row.largest is not None]
    found = [f"{len(kept)} of {_sequences(len(tested))} {word} at some sparsity."]
    if kept:
        most = max(row.largest for row in kept)
        furthest = [f"{_method(row)} on {label(row.name)}{_less(row)}" for row in kept if row.largest == most]
        worst = [row for row in rows if row.what == "worst" and row.largest is not None and "oracle" not in row.method]
        end = ""
        if worst:
            best = max(row.largest for row in worst)
            by = [f"{_method(row)}{_less(row)}" for row in worst if row.largest == best]
            end = f"; on all tasks at once {best:.3g}, by {listed(by, 3)}"
        found = [f"{found[0][:-1]}, the furthest up to {most:.3g}: {listed(furthest, 3)}{end}."]
    if ends := _ends(tested, word):
        found.append(ends)
    return tuple(found)


class _Tested(NamedTuple):
    """A row of the table of certificates, as far as it is read; `at`: what its p-value had to be at most."""

    model: str
    method: str
    length: int | None
    what: str
    name: str
    largest: float | None
    at: float | None
    measured: float | None


def _sequences(many: int) -> str:
    return f"{many} sequence{' of a method on a task is' if many == 1 else 's of a method on a task are'}"


def _less(row: _Tested) -> str:
    """What was measured where it is less than was asked for."""
    said = "" if row.largest is None else reached(row.largest, row.measured)
    return f" ({said})" if "measured" in said else ""


def _ends(tested: Sequence[_Tested], word: str) -> str:
    """On which tasks certificates end first and last, of means over several rows; empty of one, or of ties only."""
    over = [
        name
        for name, values in (
            ("methods", {row.method for row in tested}),
            ("models", {row.model for row in tested}),
            ("lengths", {row.length for row in tested}),
        )
        if len(values) > 1
    ]
    by_task: dict[str, list[float]] = defaultdict(list)
    for row in tested:
        by_task[label(row.name)].append(row.largest or 0.0)
    # Ties are those of what is printed.
    mean = {task: round(math.fsum(values) / len(values), 2) for task, values in by_task.items()}
    least, most = min(mean.values()), max(mean.values())
    if not over or least == most:
        return ""
    first, last = ([task for task, value in mean.items() if value == end] for end in (least, most))
    asked_for = " requested" if any(_less(row) for row in tested) else ""
    return (
        f"{listed(first, 3)} end{'s' if len(first) == 1 else ''} first ({word} up to {least:.2f}{asked_for} on average "
        f"over {_and(over)}, 0 where nothing is), {listed(last, 3)} last ({most:.2f})."
    )


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _method(row: _Tested) -> str:
    at = f", {row.length:,} tokens" if isinstance(row.length, int) else ""
    return f"{label(row.method)} ({label(row.model, 60)}{at})"


def _law(table: Table | None) -> str:
    """How well the scaling law fits, for all methods of each phase, or its first where it has one."""
    wanted = ("phases", "method", "held out", "R² of logits")
    if table is None or not all(name in table.header for name in wanted):
        return ""
    places = [table.header.index(name) for name in wanted]
    found: dict[str, tuple[str, float]] = {}
    for phases, method, held_out, fit in ([row[place] for place in places] for row in table.rows):
        fitted = held_out == "nothing" and isinstance(fit, float) and "oracle" not in str(method)
        if fitted and (str(phases) not in found or method == _ALL):
            found[str(phases)] = str(method), fit
    said = [f"{fit:.2f} ({label(phases)}, {label(method)})" for phases, (method, fit) in found.items()]
    return f"Of the variance of logits the scaling law explains (R²) {listed(said, _NAMES)}." if said else ""
