"""Made-up records with known truths, for tests of curves, tolerances and laws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lm_eval_sparse.analysis import study
from lm_eval_sparse.results.schema import Documents, Record

SPARSITIES = (0.5, 0.7, 0.9, 0.95)


def record(
    method: str,
    measured: float,
    scores: Sequence[float] | None,
    *,
    task: str = "frontier_niah_4k",
    length: int | None = 4096,
    phases: str = "decode",
    ids: Sequence[str] | None = None,
    **more: Any,
) -> Record:
    """One run; `scores` by document, or None with `score` and `n` among `more`."""
    dense = method == "dense"
    names = tuple(ids) if ids is not None else tuple(f"{task}-{i}" for i in range(len(scores or ())))
    if scores is not None:
        values = np.asarray(scores, float)
        more = {
            "documents": Documents(ids=names, scores=tuple(values)),
            "score": float(values.mean()),
            "stderr": float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None,
            "n": len(values),
            **more,
        }
    return Record(
        **{
            "model": "org/model",
            "model_parameters": 1_000_000_000,
            "runner": "sparse-hf",
            "method": method,
            "phases": "" if dense else phases,
            "requested": 0.0 if dense else round(measured, 2),
            "measured": measured,
            "task": task,
            "length": length,
            "metric": "acc",
            "higher_is_better": True,
            "chance": 0.0,
            **more,
        }
    )


def accuracies(
    truth: Callable[[float], float], sparsities: Sequence[float], n: int, rng: np.random.Generator
) -> np.ndarray:
    """(P, n) of right and wrong: a document that is right at a sparsity is right at lower ones where truth falls."""
    luck = rng.random(n)
    return np.stack([(luck < truth(s)).astype(float) for s in sparsities])


def runs(
    truths: dict[str, Callable[[float], float]],
    rng: np.random.Generator,
    *,
    n: int = 100,
    sparsities: Sequence[float] = SPARSITIES,
    **more: Any,
) -> list[Record]:
    """Dense and sparse runs of one task; `truths` has the accuracy of each method by sparsity. Documents are shared."""
    luck = rng.random(n)
    first = next(iter(truths.values()))
    found = [record("dense", 0.0, list((luck < first(0)).astype(float)), **more)]
    for method, truth in truths.items():
        for sparsity in sparsities:
            # Measured sparsity is never quite what was asked for.
            measured = sparsity + rng.uniform(-0.004, 0.004)
            answers = (luck < truth(measured)).astype(float)
            found.append(record(method, measured, list(answers), **{**more, "requested": sparsity}))
    return found


def build(records: Sequence[Record]) -> study.Study:
    return study.build(records)
