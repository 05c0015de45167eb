"""Run one task with several methods and sparsities and keep the results as `lm_eval` does, for curves in the docs.

    python benchmarks/methods_curve.py --task forced_frontier_niah_16k --methods dense quest --limit 20 --output DIR
    python benchmarks/collect_results.py DIR --output docs/results/NAME
    lm-eval-sparse plot DIR --output docs/results/NAME.png

Several processes may fill one folder, each with other methods.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from lm_eval_sparse import patches

patches.install()

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.loggers import EvaluationTracker  # noqa: E402
from prefill import say  # noqa: E402

from lm_eval_sparse.methods import METHODS  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", help="left out: the embedded model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--task", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--no_chat", dest="chat", action="store_false", help="without the model's chat template")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    given = {"pretrained": options.pretrained} if options.pretrained else {}
    for method in options.methods:
        for sparsity in options.sparsities if method != "dense" else [0.0]:
            settings: dict[str, Any] = {**given, "dtype": options.dtype, "method": method}
            settings |= {"sparsity": sparsity} if sparsity else {}
            start = time.perf_counter()
            tracker = EvaluationTracker(output_path=str(options.output / f"{method}_{sparsity:g}"))
            results = simple_evaluate(
                model="sparse-hf",
                model_args=settings,
                tasks=[options.task],
                limit=options.limit,
                evaluation_tracker=tracker,
                apply_chat_template=options.chat,
                metadata=settings,
            )
            tracker.save_results_aggregated(results=results, samples=results.pop("samples"))
            scores = {name: value for name, value in results["results"][options.task].items() if "," in name}
            say(f"{method} {sparsity:g}: {time.perf_counter() - start:.0f} s {scores}")


if __name__ == "__main__":
    main()
