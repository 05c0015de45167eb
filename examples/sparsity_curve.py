"""Evaluate one task at several sparsities from Python, and save each run's results as `lm_eval` would.

python examples/sparsity_curve.py --task forced_frontier_niah_4k --sparsity 0 0.5 0.9 --limit 10 --output_path out
lm-eval-sparse plot out --output curve.png
"""

from __future__ import annotations

import argparse
import time

from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="forced_frontier_niah_4k")
    parser.add_argument("--method", default="flexprefill")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0, 0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--backend", default="auto", help="gather starts at once; auto may compile a kernel first")
    parser.add_argument("--limit", type=int, default=10, help="documents per sparsity")
    parser.add_argument("--apply_chat_template", action="store_true")
    parser.add_argument("--output_path", required=True)
    options = parser.parse_args()

    tasks = TaskManager()
    for sparsity in options.sparsity:
        begin = time.perf_counter()
        model_args = {"method": options.method, "sparsity": sparsity, "backend": options.backend}
        tracker = EvaluationTracker(output_path=f"{options.output_path}/sparsity_{sparsity:g}")
        results = simple_evaluate(
            model="sparse-hf",
            model_args=model_args,
            tasks=[options.task],
            limit=options.limit,
            task_manager=tasks,
            evaluation_tracker=tracker,
            apply_chat_template=options.apply_chat_template,
        )
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        print(f"sparsity {sparsity:g}: {time.perf_counter() - begin:.0f} s")
        print(make_table(results))


if __name__ == "__main__":
    main()
