"""Small studies of made-up scores, to see what an analysis says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm_eval_sparse.analysis import study
from lm_eval_sparse.results.schema import Documents, PhaseFigures, Record

LENGTHS = {4096: "4k", 16384: "16k"}


def record(
    task: str,
    method: str,
    sparsity: float | None,
    scores: Sequence[float] | None,
    *,
    model: str = "org/model",
    length: int | None = 4096,
    ids: Sequence[str] | None = None,
    phase: str = "decode",
    chance: float | None = 0.0,
    metric: str = "exact",
    **more: Any,
) -> Record:
    """A record of `frontier_<task>_<length>`. None for `scores`: no scores by document. nan leaves a document out."""
    dense = method == "dense"
    kept = None
    if scores is not None:
        names = [f"{task}{at}" for at in range(len(scores))] if ids is None else ids
        pairs = [(name, float(score)) for name, score in zip(names, scores, strict=True) if not np.isnan(score)]
        kept = Documents(ids=tuple(name for name, _ in pairs), scores=tuple(score for _, score in pairs))
    measured = 0.0 if dense else float(sparsity if sparsity is not None else 0.5)
    given = {
        "score": float(np.nanmean(scores)) if scores is not None else 0.5,
        "n": len(kept.scores) if kept else 100,
        "measured": measured,
        "model_parameters": 10**9,
        **more,
    }
    return Record(
        model=model,
        runner="sparse-hf",
        method=method,
        phases="" if dense else phase,
        requested=None if dense else sparsity,
        by_phase={phase: PhaseFigures(method=method, requested=None if dense else sparsity)},
        task=f"frontier_{task}_{LENGTHS[length]}" if length else task,
        length=length,
        metric=metric,
        higher_is_better=not metric.startswith("bits"),
        chance=chance,
        documents=kept,
        **given,
    )


def right(n: int, wrong: int = 0) -> np.ndarray:
    """Scores of n documents, the first ones wrong."""
    scores = np.ones(n)
    scores[:wrong] = 0
    return scores


def of(
    runs: Mapping[str, Mapping[float, int]], n: int = 100, task: str = "niah", dense_wrong: int = 0, **more: Any
) -> list[Record]:
    """Records of one task: of each method, by sparsity, how many of n documents it gets wrong that dense gets right."""
    found = [record(task, "dense", None, right(n)[::-1] if not dense_wrong else right(n, dense_wrong)[::-1], **more)]
    for method, points in runs.items():
        found += [record(task, method, sparsity, right(n, wrong), **more) for sparsity, wrong in points.items()]
    return found


def built(*records: Sequence[Record]) -> study.Study:
    return study.build([row for several in records for row in several])
