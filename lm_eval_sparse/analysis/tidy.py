"""All records as one table, a row each, for readers that are no people: parquet, CSV, and the records themselves."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..results.figures import PHASES
from ..results.schema import PhaseFigures, Record
from .study import Cell, Point, Study
from .tables import guarded

if TYPE_CHECKING:
    import pandas

#: Fields of a record that are columns as they are.
_PLAIN = (
    "model", "model_revision", "model_hash", "model_dtype", "model_parameters", "runner", "method", "phases", "preset",
    "backend", "requested", "measured", "task", "task_version", "task_hash", "length", "prompt_tokens", "output_type",
    "shots", "seed", "metric", "score", "stderr", "n", "higher_is_better", "chance", "seconds", "peak_memory_bytes",
    "device", "commit", "date", "command", "source",
)  # fmt: skip
_FIGURES = (
    "method", "requested", "selected", "executed", "bytes_read_fraction", "kv_memory_fraction",
    "estimator_flops_fraction", "mass_kept", "output_error", "auxiliary_bits",
)  # fmt: skip


def frame(study: Study) -> pandas.DataFrame:
    """A row for each record of a study.

    Beside what was recorded: `label` (the method with what tells it from others), `family` and `short` of the task,
    `mark` of mixed runs, `dense_score` (of all documents of the dense run), `loss` (mean of dense − score where higher
    is better, else of score − dense, over the documents that both runs have), `shared_documents` (their number) and
    `used`: whether the figures take this run, or another of the same configuration. Where a run or its dense one has no
    scores by document it is not known which both have: no loss.
    """
    import pandas

    scores: dict[int, dict[str, float]] = {}

    placed: dict[int, tuple[Cell, str]] = {}
    cells: dict[tuple[Any, ...], Cell] = {}
    for cell in study.cells:
        runs: list[tuple[str, Point]] = [("dense", cell.dense)] if cell.dense else []
        runs += [(chain.label, point) for chain in cell.chains for point in chain.points]
        for name, point in runs:
            placed[id(point.record)] = cell, name
            cells.setdefault(_key(point.record), cell)
    rows = []
    for record in study.records:
        found = placed.get(id(record))
        cell, name = found or (cells.get(_key(record)), record.method)
        dense = cell.dense.record.score if cell is not None and cell.dense is not None else None
        loss, shared = _loss(record, cell, scores)
        rows.append(
            {
                **{column: getattr(record, column) for column in _PLAIN},
                "label": name,
                "family": cell.family if cell else None,
                "short": cell.short if cell else None,
                "mark": cell.mark if cell else None,
                "has_documents": record.documents is not None,
                "dense_score": dense,
                "loss": loss,
                "shared_documents": shared,
                "used": found is not None,
                **_phases(record),
                **{f"{phase}_tokens_per_second": record.speed.get(phase) for phase in ("prefill", "decode")},
                **{f"{phase}_seconds": record.seconds_by_phase.get(phase) for phase in ("prefill", "decode")},
                "knobs": json.dumps(record.knobs, sort_keys=True, default=str),
                "solved": json.dumps({phase: _means(part) for phase, part in record.by_phase.items()}, sort_keys=True),
                "versions": json.dumps(record.versions, sort_keys=True),
            }
        )  # fmt: skip
    table = pandas.DataFrame(rows)
    return table.astype({"shared_documents": "Int64"}) if rows else table  # whole numbers, where some are not known too


def _loss(record: Record, cell: Cell | None, known: dict[int, dict[str, float]]) -> tuple[float | None, int | None]:
    """Mean loss over the documents that a run shares with its dense one, and their number; no loss where none is.

    Args:
        known: scores of dense runs by document, by the id of their cell; filled as they are asked for.
    """
    dense = cell.dense.record.documents if cell is not None and cell.dense is not None else None
    if dense is None or record.documents is None:
        return None, None
    if id(cell) not in known:
        known[id(cell)] = dict(zip(dense.ids, dense.scores, strict=True))
    theirs = known[id(cell)]
    pairs = zip(record.documents.ids, record.documents.scores, strict=True)
    losses = [theirs[name] - score for name, score in pairs if name in theirs]
    if not losses:
        return None, 0
    mean = sum(losses) / len(losses)
    return (mean if record.higher_is_better else -mean), len(losses)


def _means(figures: PhaseFigures) -> dict[str, float]:
    return {knob: values.mean for knob, values in figures.solved.items()}


def _key(record: Record) -> tuple[Any, ...]:
    return (
        record.model,
        record.model_dtype,
        record.model_revision,
        record.task,
        record.metric,
        record.seed,
        record.task_hash,
        record.task_version,
        record.shots,
        record.chat_template,
        record.system_instruction,
        json.dumps(record.gen_kwargs, sort_keys=True, default=str),
        tuple(sorted(record.seeds.items())),
    )


def _phases(record: Record) -> dict[str, Any]:
    found = {}
    for phase in PHASES:
        figures = record.by_phase.get(phase)
        found |= {f"{phase}_{name}": getattr(figures, name) if figures else None for name in _FIGURES}
    return found


def csv(table: pandas.DataFrame) -> bytes:
    """The table as CSV, UTF-8. A text that a spreadsheet would take for a formula gets an apostrophe before it."""
    safe = table.copy()
    for column in safe.columns:
        if safe[column].dtype.kind in "OUST" or str(safe[column].dtype) in ("str", "string"):
            safe[column] = [guarded(value) if isinstance(value, str) else value for value in safe[column]]
    return safe.to_csv(index=False, lineterminator="\n").encode()


def parquet(table: pandas.DataFrame) -> bytes:
    """The table as parquet, with the columns' own types."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def lines(records: Iterable[Record]) -> bytes:
    """The records as `records.jsonl`: what `analyze` reads again, documents included."""
    return b"".join(record.model_dump_json().encode() + b"\n" for record in records)
