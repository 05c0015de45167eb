"""By what should the candidates of a twin be compared? Measured on a dense model, with and without the context.

A ranking or options twin asks a model for the log-probability of every candidate. Which function of it to rank by is
a choice; the best one tells most of the context: it scores high when the context is there and at chance when the
prompt holds only question and instructions. This script takes the log-probabilities of all candidates once in both
prompts and scores every normalisation on them:

    sum       log-probability of the candidate
    per_char  divided by the candidate's characters
    gain      log-probability minus that without the context (pointwise mutual information)

`separation` is the mean difference of the scores with and without context over its standard error, over documents.

    python benchmarks/twin_normalisation.py --limit 20 --output benchmarks/results/twin_normalisation
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers

import lm_eval_sparse
from lm_eval_sparse import patches

#: Tasks whose candidates differ as texts. VT offers every variable the same continuation: there all are the same.
TASKS = ("cwe", "story_filtering", "quality", "toefl")


def without_context(prompt: str) -> str:
    """`prompt` with what stands between the two questions left out."""
    blocks = prompt.split("\n\n")
    last = {block: i for i, block in enumerate(blocks)}
    first, second = next((i, last[block]) for i, block in enumerate(blocks) if last[block] > i)
    return "\n\n".join(blocks[: first + 1] + blocks[second + 1 :])


def measure(lm: Any, leaf: str, limit: int, metadata: dict[str, Any], chat: bool) -> list[dict[str, Any]]:
    """Per document: its dict, the continuations, and log-probabilities with and without the context."""
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    from lm_eval_sparse.paths import task_folders
    from lm_eval_sparse.protocol import SharedPrompt

    manager = TaskManager(include_path=task_folders(), include_defaults=False, metadata=metadata)
    task = manager.load([leaf])["tasks"][leaf]
    template = {"apply_chat_template": True, "chat_template": lm.apply_chat_template} if chat else {}
    task.build_all_requests(limit=limit, rank=0, world_size=1, **template)
    if reason := task.config.metadata.get("skipped"):
        print(f"{leaf} is skipped: {reason}")
        return []
    requests = task.instances
    answers = [result[0] for result in lm.loglikelihood(requests)]
    bare = []
    for request in requests:
        context, continuation = request.args
        text = without_context(context[: context.shared])
        arguments = (SharedPrompt(text + context[context.shared :], len(text)), continuation)
        bare.append(Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0, metadata=(leaf, 0, 1)))
    blind = [result[0] for result in lm.loglikelihood(bare)]
    found: dict[int, dict[str, Any]] = {}
    for request, seen, unseen in zip(requests, answers, blind, strict=True):
        one = found.setdefault(request.doc_id, {"doc": request.doc, "recipe": task.recipe, "rows": []})
        one["rows"].append((request.args[1], seen, unseen))
    return list(found.values())


def score(document: dict[str, Any], value: Callable[[str, float, float], float]) -> float:
    """The twin's own metric, with `value` of each candidate in place of its log-probability."""
    results = [(value(text, seen, unseen), False) for text, seen, unseen in document["rows"]]
    (metric,) = document["recipe"].forced_score(document["doc"], results).values()
    return metric


NORMALISATIONS: dict[str, tuple[Callable[[str, float, float], float], Callable[[str, float, float], float] | None]] = {
    # name: (with the context, without it); None where candidates cannot differ without it, which is chance
    "sum": (lambda text, seen, unseen: seen, lambda text, seen, unseen: unseen),
    "per_char": (lambda text, seen, unseen: seen / len(text), lambda text, seen, unseen: unseen / len(text)),
    "gain": (lambda text, seen, unseen: seen - unseen, None),
}


def summary(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores with and without context and their separation, by normalisation; and the chance level."""
    rows: dict[str, Any] = {}
    chance = [next(iter(one["recipe"].chance(one["doc"]).values())) for one in documents]
    for name, (seen, unseen) in NORMALISATIONS.items():
        pairs = [
            (score(one, seen), score(one, unseen) if unseen else level)
            for one, level in zip(documents, chance, strict=True)
        ]
        differences = [a - b for a, b in pairs]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
        rows[name] = {
            "with": statistics.fmean(a for a, _ in pairs),
            "without": statistics.fmean(b for _, b in pairs),
            "stderr_of_difference": error,
            "separation": statistics.fmean(differences) / error if error else None,
        }
    return {"documents": len(documents), "chance": statistics.fmean(chance), "normalisations": rows}


def table(report: dict[str, Any]) -> str:
    """The report as a markdown table."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# By what to compare the candidates of a twin\n",
        f"{report['model']}, dense, {report['device']}; {versions}; "
        f"{'with' if report['chat_template'] else 'without'} chat template.\n",
        "| leaf | documents | chance | normalisation | with context | without | difference / its standard error |",
        "|---|---|---|---|---|---|---|",
    ]
    for leaf, found in report["leaves"].items():
        for name, row in found["normalisations"].items():
            separation = "-" if row["separation"] is None else f"{row['separation']:.1f}"
            lines.append(
                f"| {leaf} | {found['documents']} | {found['chance']:.3f} | {name} | {row['with']:.3f} "
                f"| {row['without']:.3f} | {separation} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--lengths", nargs="+", default=["4k"])
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--metadata", type=json.loads, default={})
    parser.add_argument("--apply_chat_template", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    patches.install()
    from lm_eval_sparse.model.lm import SparseHFLM
    from lm_eval_sparse.model.report import device_name

    lm = SparseHFLM(device=arguments.device)
    report: dict[str, Any] = {
        "model": lm.model_label,
        "device": device_name(torch.device(arguments.device)),
        "chat_template": arguments.apply_chat_template,
        "versions": {
            "lm_eval_sparse": lm_eval_sparse.__version__,
            "lm_eval": lm_eval.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "leaves": {},
    }
    for length in arguments.lengths:
        for task in arguments.tasks:
            leaf = f"forced_frontier_{task}_{length}"
            documents = measure(lm, leaf, arguments.limit, arguments.metadata, arguments.apply_chat_template)
            if documents:
                report["leaves"][leaf] = summary(documents)
                print(leaf, json.dumps(report["leaves"][leaf], indent=1), flush=True)
    if arguments.output:
        arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
