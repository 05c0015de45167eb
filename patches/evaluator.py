"""lm-eval's evaluator: measured sparsity in every logged sample, and Hub mistakes found before any compute.

Works around: a model type can add figures to the results as a whole (`get_model_info`) but not to a logged
sample of a task that it does not own; and `simple_evaluate` builds the model before anything about the Hub is
checked. Delete the first half when lm-eval lets a response carry metadata into logged samples, the second when
its tracker checks before the run.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any


def apply(module: Any) -> None:
    """Wrap `evaluate` and `simple_evaluate` of `lm_eval.evaluator`; nothing changes for other model types."""
    for name, wrap in (("evaluate", _with_sample_stats), ("simple_evaluate", _with_preflight)):
        function = getattr(module, name)
        if not getattr(function, "_lm_eval_sparse", False):
            wrapped = wrap(function)
            wrapped._lm_eval_sparse = True
            setattr(module, name, wrapped)


def is_ours(lm: Any) -> bool:
    """Whether `lm` is a sparse-hf model, under a response cache or not."""
    import sys

    model = sys.modules.get("lm_eval_sparse.model")
    return model is not None and isinstance(getattr(lm, "lm", lm), model.SparseHFLM)


def _with_sample_stats(evaluate: Any) -> Any:
    signature = inspect.signature(evaluate)

    @functools.wraps(evaluate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        results = evaluate(*args, **kwargs)
        lm = signature.bind(*args, **kwargs).arguments.get("lm")
        if results is not None and results.get("samples") and is_ours(lm):
            from lm_eval_sparse.protocol import stats_of

            for samples in results["samples"].values():
                for sample in samples:
                    stats = [stats_of(response) for responses in sample["resps"] for response in responses]
                    # The requests of a document that share its context share one object: list it once.
                    distinct = list({id(entry): entry for entry in stats if entry}.values())
                    measured = [entry["sparsity"] for entry in distinct if entry["sparsity"] is not None]
                    sample["sparse"] = {
                        "sparsity": sum(measured) / len(measured) if measured else None,
                        "requests": distinct,
                    }
        return results

    return wrapper


def _with_preflight(simple_evaluate: Any) -> Any:
    signature = inspect.signature(simple_evaluate)

    @functools.wraps(simple_evaluate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        if options["model"] == "sparse-hf" or is_ours(options["model"]):
            from lm_eval_sparse.patches import hub_tracker

            hub_tracker.preflight(
                options["evaluation_tracker"],
                log_samples=options["log_samples"],
                limit=options["limit"],
                predict_only=options["predict_only"],
            )
        return simple_evaluate(*args, **kwargs)

    return wrapper
