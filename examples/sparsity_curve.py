"""Evaluate one task with several methods and sparsities from Python, and save each run's results as `lm_eval` would.

python examples/sparsity_curve.py --method flexprefill snapkv quest --sparsity 0 0.5 0.9 --limit 10 --output_path out
lm-eval-sparse plot out --output curve.png

A run whose results are there already is not repeated.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="forced_frontier_niah_4k")
    parser.add_argument(
        "--method", nargs="+", default=["flexprefill"], help="names, also joined as in flexprefill+quest"
    )
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0, 0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--backend", default="auto", help="gather starts at once; auto may compile a kernel first")
    parser.add_argument("--limit", type=int, default=10, help="documents per run")
    parser.add_argument("--apply_chat_template", action="store_true")
    parser.add_argument("--output_path", required=True)
    options = parser.parse_args()

    # Every method at sparsity 0 is dense attention: one run serves all.
    runs = [("dense", 0.0)] if 0 in options.sparsity else []
    runs += [(method, sparsity) for method in options.method for sparsity in options.sparsity if sparsity]
    tasks = TaskManager()
    for method, sparsity in runs:
        folder = Path(options.output_path) / (f"{method}_{sparsity:g}" if sparsity else "dense")
        if any(folder.rglob("results_*.json")):
            print(f"{method} at {sparsity:g}: done before")
            continue
        begin = time.perf_counter()
        tracker = EvaluationTracker(output_path=str(folder))
        results = simple_evaluate(
            model="sparse-hf",
            model_args={"method": method, "sparsity": sparsity, "backend": options.backend},
            tasks=[options.task],
            limit=options.limit,
            task_manager=tasks,
            evaluation_tracker=tracker,
            apply_chat_template=options.apply_chat_template,
        )
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        print(f"{method} at sparsity {sparsity:g}: {time.perf_counter() - begin:.0f} s")
        print(make_table(results))


if __name__ == "__main__":
    main()
