"""Evaluate one task with several methods and sparsities from Python, and save each run's results as `lm_eval` would.

python examples/sparsity_curve.py --method flexprefill snapkv quest --sparsity 0 0.5 0.9 --limit 10 --output_path out
lm-eval-sparse plot out --output curve.png

A run whose results are there already, with the same settings, is not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from lm_eval_sparse import config, embedded, paths, values
from lm_eval_sparse.analysis.results import below, load
from lm_eval_sparse.cli import Parser
from lm_eval_sparse.errors import UserError, install_excepthook, nearest
from lm_eval_sparse.files import brief

#: What a task's metadata says that its file does not.
NOTED = ("config_source", "data", "prompt_tokens", "skipped")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was typed. Raises `UserError`."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="forced_frontier_niah_4k")
    parser.add_argument(
        "--method", nargs="+", default=["flexprefill"], help="names, also joined as in flexprefill+quest"
    )
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0, 0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--backend", default="auto", help="gather starts at once; auto may compile a kernel first")
    parser.add_argument("--limit", default=10, help="documents per run")
    parser.add_argument("--apply_chat_template", action="store_true")
    parser.add_argument("--output_path", required=True)
    options = parser.parse_args(argv)
    options.limit = values.whole("--", "limit", options.limit, 1)
    return options


def planned(options: argparse.Namespace) -> dict[Path, dict[str, Any]]:
    """The model arguments of each run by the folder of its results. Raises `UserError` for what cannot work."""
    output = paths.expand(f"--output_path {options.output_path}", options.output_path)
    # Every method at sparsity 0 is dense attention: one run serves all.
    runs = [("dense", 0.0)] if 0 in options.sparsity else []
    runs += [(method, sparsity) for method in options.method for sparsity in options.sparsity if sparsity]
    plan = {}
    for method, sparsity in runs:
        settings = {"method": method, "sparsity": sparsity, "backend": options.backend}
        config.parse(settings)
        folder = output / (f"{method}_{sparsity:g}" if sparsity else "dense")
        paths.check_writable(f"--output_path {options.output_path}", folder, [])
        plan[folder] = settings
    return plan


def expected(options: argparse.Namespace, tasks: TaskManager) -> dict[str, Any]:
    """What the results of every run say of it, but for the model arguments. Raises `UserError` for an unknown task."""
    if options.task not in tasks.all_tasks:
        raise UserError(
            f"--task {options.task} is unknown{nearest(options.task, tasks.all_tasks)}; type `lm_eval ls tasks` to see "
            "the names"
        )
    loaded = tasks.load([options.task])["tasks"]
    return {
        "model": "sparse-hf",
        "limit": options.limit,
        "tasks": {name: noted(task.config.metadata) for name, task in loaded.items()},
        "chat template": options.apply_chat_template,
        "gen_kwargs": None,
        "system instruction": None,
    }


def noted(metadata: Any) -> dict[str, Any]:
    """The metadata of a task that its file and the user give it."""
    return {name: value for name, value in dict(metadata or {}).items() if name not in NOTED}


def said(content: dict[str, Any]) -> dict[str, Any]:
    """The same of a results file. Raises `AttributeError` or `TypeError` when it has another shape."""
    run, configs = content["config"], content.get("configs", {})
    given = {"pretrained": embedded.NAME, **run.get("model_args")}
    return {
        "model arguments": given,
        "model": run.get("model"),
        "limit": run.get("limit"),
        "tasks": {name: noted(task.get("metadata")) for name, task in configs.items()},
        "chat template": bool(content.get("chat_template")),
        "gen_kwargs": run.get("gen_kwargs"),
        "system instruction": content.get("system_instruction"),
    }


def done(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether a results file below `folder` is of the run that is wanted. Says in a line what the others are."""
    reasons = {file: another(file, wanted) for file in below(folder)}
    for file, reason in reasons.items():
        if reason:
            print(UserError(f"{file} is not of this run ({reason}); delete it before you plot"))
    return "" in reasons.values()


def another(file: Path, wanted: dict[str, Any]) -> str:
    """Why a results file is not that of the run; empty when it is."""
    try:
        found = said(load(file))
    except UserError as error:
        return str(error).removeprefix(f"{file}: ")
    except (AttributeError, KeyError, TypeError, ValueError):
        return "no result file of lm-eval"
    differing = [name for name in wanted if found[name] != wanted[name]]
    return ", ".join(f"{name}: {brief(found[name], 200)} there, {brief(wanted[name], 200)} now" for name in differing)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    plan = planned(options)
    tasks = TaskManager()
    common = expected(options, tasks)
    for folder, settings in plan.items():
        name = f"{settings['method']} at sparsity {settings['sparsity']:g}"
        if done(folder, {**common, "model arguments": {"pretrained": embedded.NAME, **settings}}):
            print(f"{name}: done before")
            continue
        begin = time.perf_counter()
        tracker = EvaluationTracker(output_path=str(folder))
        results = simple_evaluate(
            model="sparse-hf",
            model_args=settings,
            tasks=[options.task],
            limit=options.limit,
            task_manager=tasks,
            evaluation_tracker=tracker,
            apply_chat_template=options.apply_chat_template,
        )
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        print(f"{name}: {time.perf_counter() - begin:.0f} s")
        print(make_table(results))


if __name__ == "__main__":
    install_excepthook()
    main()
