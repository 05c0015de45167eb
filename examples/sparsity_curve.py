"""Evaluate one task with several methods and sparsities from Python, and save each run's results as `lm_eval` would.

python examples/sparsity_curve.py --method flexprefill snapkv quest --sparsity 0 0.5 0.9 --limit 10 --output_path out
lm-eval-sparse plot out --output curve.png

A run whose results are there already, with the same settings, is not repeated; `lm_eval --output_path out/quest_0.9`
counts, too. At the end stands a table of all runs, and with --answer what the model itself writes,
dense and sparse.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from transformers.utils import logging as transformers_logging

from lm_eval_sparse import paths, values
from lm_eval_sparse.analysis import curve
from lm_eval_sparse.analysis.study import build
from lm_eval_sparse.cli.parser import Parser
from lm_eval_sparse.errors import UserError, install_excepthook, nearest, plain
from lm_eval_sparse.frontier import show
from lm_eval_sparse.methods import plan as config
from lm_eval_sparse.model import embedded
from lm_eval_sparse.model.lm import SparseHFLM
from lm_eval_sparse.results.files import brief
from lm_eval_sparse.results.load import below, load, read

#: What a task's metadata says that its file does not.
NOTED = ("answer_tokens", "chance", "config_source", "data", "prompt_tokens", "skipped")


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
    parser.add_argument(
        "--answer", metavar="I", help="also print what the model writes for document I of a twin, dense and sparse"
    )
    parser.add_argument("--output_path", required=True)
    options = parser.parse_args(argv)
    options.limit = values.whole("--", "limit", options.limit, 1)
    if options.answer is not None:
        options.answer = values.whole("--", "answer", options.answer, 0)
    return options


def planned(options: argparse.Namespace) -> dict[Path, dict[str, Any]]:
    """The model arguments of each run by the folder of its results. Raises `UserError` for what cannot work."""
    output = paths.expand(f"--output_path {options.output_path}", options.output_path)
    # Every method at sparsity 0 is dense attention: one run serves all.
    runs = [("dense", 0.0)] if 0 in options.sparsity else []
    runs += [(method, sparsity) for method in options.method for sparsity in options.sparsity if sparsity]
    plan = {}
    for method, sparsity in runs:
        settings = {"method": method, "sparsity": sparsity}
        if sparsity and options.backend != "auto":
            settings["backend"] = options.backend
        config.parse({**settings, "backend": options.backend})
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


def own(metadata: dict[str, Any], model_args: dict[str, Any]) -> dict[str, Any]:
    """A task's metadata without the model arguments, which `lm_eval` adds to it."""
    return {name: value for name, value in metadata.items() if (name, value) not in model_args.items()}


def said(content: dict[str, Any]) -> dict[str, Any]:
    """The same of a results file. Raises `AttributeError` or `TypeError` when it has another shape."""
    run, configs = content["config"], content.get("configs", {})
    given = {"pretrained": embedded.NAME, **run.get("model_args")}
    return {
        "model arguments": given,
        "model": run.get("model"),
        "limit": run.get("limit"),
        "tasks": {name: own(noted(task.get("metadata")), run["model_args"]) for name, task in configs.items()},
        "chat template": bool(content.get("chat_template")),
        "gen_kwargs": run.get("gen_kwargs") or None,  # `lm_eval` writes {}
        "system instruction": content.get("system_instruction"),
    }


def done(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether a results file below `folder` is of the run that is wanted. Says in a line what the others are."""
    reasons = {file: another(file, wanted) for file in (below(folder) if folder.is_dir() else [])}
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


def comparison(folders: Sequence[Path]) -> str:
    """The scores of all runs, a line each, dense first."""
    rows = curve.rows_of(build(read(folders), allow_mixed=True))
    better = {row.metric: "↑" if row.higher_is_better else "↓" for row in rows}
    header, *body = curve.table(rows)
    header = [f"{name} {better.get(name, '')}".rstrip() for name in header]
    lines = [line[2:] for line in (header, *body)]  # without model and task, of which there is one each
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def asked(options: argparse.Namespace) -> tuple[str, str, str]:
    """Prompt, the text forced after it and the gold answer, for the first answer to a document of a twin.

    Raises `UserError` when the task is no twin, or has no such document.
    """
    reader = show.Reader.of(None, {}, options.apply_chat_template)
    task = show.load_leaves(show.manager(paths.task_folders(), {}), [options.task])[options.task]
    document = show.read(task, options.answer, reader)
    if not document.requests:
        raise UserError(f"--answer {options.answer} needs a teacher-forced twin; type --task forced_{options.task}")
    return document.prompt, *document.requests[0]


def answers(prompt: str, forced: str, gold: str, runs: Sequence[dict[str, Any]], templated: bool) -> str:
    """What the model writes, run by run, under the gold answer, of which it is given the first quarter: a model as
    small as the embedded one seldom begins right, but can go on."""
    given = gold[: len(gold) // 4 + 1]
    lines = [("asked", forced.strip()), ("gold", gold.strip())]
    for settings in runs:
        lm = SparseHFLM(**settings)
        lm.templated = templated  # or it would warn: the template has been rendered above
        request = Instance("generate_until", {}, (prompt + forced + given, {"until": ["\n"], "max_gen_toks": 40}), 0)
        (written,) = lm.generate_until([request], True)
        lines.append((named(settings), f"{given.strip()}|{written.rstrip()}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(plain(f"{name:<{width}}  {text}") for name, text in lines)


def named(settings: dict[str, Any]) -> str:
    sparsity = settings["sparsity"]
    return f"{settings['method']} at sparsity {sparsity:g}" if sparsity else "dense"


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    transformers_logging.disable_progress_bar()  # of a model that is loaded in a second, once for each run
    plan = planned(options)
    tasks = TaskManager()
    common = expected(options, tasks)
    question = None if options.answer is None else asked(options)
    for folder, settings in plan.items():
        name = named(settings)
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
    print(f"\n{options.task}\n{comparison(list(plan))}")
    if question is not None:
        runs = list(plan.values())
        strongest = max(runs, key=lambda settings: settings["sparsity"])
        compared = [runs[0], strongest] if runs[0] is not strongest else [strongest]
        print(f"\nDocument {options.answer}, answered; what stands before | is given")
        print(answers(*question, compared, options.apply_chat_template))


if __name__ == "__main__":
    install_excepthook()
    main()
