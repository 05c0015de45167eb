"""The YAML files of a task folder: what every leaf says, written in one place.

The files under tasks/ are what `task_files` writes (a test compares them), and `lm-eval-sparse new-task` writes the
same for a new task. Knows names, lengths and metrics; nothing of recipes or lm-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

#: Name of a length -> tokens of the whole prompt.
LENGTHS = {"4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768, "64k": 65536, "128k": 128000}

MEASURED = ("sparsity", "prefill_sparsity", "kv_sparsity", "decode_sparsity")


@dataclass(frozen=True)
class TaskFolder:
    """What the files of one task say.

    Attributes:
        name: of the task, words joined by underscores.
        metrics, forced_metrics: names of the generated leaves' and the twins' metrics; a leading `-` means that lower
            is better.
        tags: kinds of work, each becomes the tags `frontier-<tag>` and `forced-frontier-<tag>`.
        max_gen_toks: tokens that an answer may have where the model has the room (paper, §10 "Common": 1024).
        recipe: what the leaves' `dataset_kwargs` say of the recipe, in YAML.
        version: of the recipe, for the files' metadata.
    """

    name: str
    metrics: Sequence[str]
    forced_metrics: Sequence[str]
    tags: Sequence[str] = ()
    max_gen_toks: int = 1024
    recipe: str = field(default="")
    version: int = 1

    def leaves(self, forced: bool = False) -> list[str]:
        """Names of the leaves, shortest prompts first."""
        return [f"{'forced_' if forced else ''}frontier_{self.name}_{length}" for length in LENGTHS]

    def files(self) -> dict[str, str]:
        """File name -> content, for the folder of this task."""
        found = {"_generated": self._shared(forced=False), "_forced": self._shared(forced=True)}
        for forced in (False, True):
            for leaf, (length, tokens) in zip(self.leaves(forced), LENGTHS.items(), strict=True):
                prefix = "forced-frontier" if forced else "frontier"
                tags = ", ".join(f"{prefix}-{tag}" for tag in (length, self.name.replace("_", "-"), *self.tags))
                found[f"{leaf}.yaml"] = (
                    f"include: {'_forced' if forced else '_generated'}\n"
                    f"task: {leaf}\n"
                    f"tag: [{tags}]\n"
                    f"dataset_kwargs: {{{self.recipe or f'task: {self.name}'}, length: {tokens}}}\n"
                )
        return found

    def _shared(self, forced: bool) -> str:
        if forced:
            head = f"# Shared by forced_frontier_{self.name}_*: the teacher-forced twins, scored by likelihood.\n"
            kind, output = "ForcedFrontierTask", "loglikelihood"
            generation = ""
        else:
            head = (
                f"# Shared by frontier_{self.name}_*: answered by generation. "
                "No .yaml suffix, so that lm-eval does not list it as a task.\n"
            )
            kind, output = "FrontierTask", "generate_until"
            generation = (
                "generation_kwargs:\n  until: []  # the end-of-text token ends an answer\n"
                f"  max_gen_toks: {self.max_gen_toks}\n  do_sample: false\n"
            )
        rows = "".join(_metric(name) for name in (self.forced_metrics if forced else self.metrics))
        return (
            f"{head}"
            f"class: !function lm_eval_sparse.frontier.task.{kind}\n"
            "dataset_path: lm_eval_sparse\n"
            "test_split: test\n"
            f"output_type: {output}\n"
            "num_fewshot: 0\n"
            f"{generation}"
            "metric_list:\n"
            f"{rows}"
            "  # Only where the model type measures them: one phase with a method, or several.\n"
            f"{''.join(_metric(name) for name in MEASURED)}"
            f"metadata:\n  version: {self.version}\n  samples: 100\n  seed: 0\n"
        )


def _metric(name: str) -> str:
    better = "false" if name.startswith("-") else "true"
    return f"  - {{metric: {name.lstrip('-')}, aggregation: mean, higher_is_better: {better}}}\n"


_SLOTS = ("exact", "-bits_per_char")


def _built_in(name: str, metrics: Sequence[str], forced_metrics: Sequence[str], *tags: str) -> TaskFolder:
    return TaskFolder(name, metrics, forced_metrics, tags, version=2)


#: The tasks of this package, in the order of their leaves in the groups.
BUILT_IN = (
    _built_in("niah", ["acc"], _SLOTS, "retrieval"),
    _built_in("vt", ["iou"], ["average_precision"], "high-dispersion"),
    _built_in("cwe", ["iou"], ["average_precision"], "high-scope"),
    _built_in("squad", ["f1"], _SLOTS, "qa"),
    _built_in("quality", ["exact_match"], ["acc"], "qa"),
    _built_in("toefl", ["exact_match"], ["acc"], "qa"),
    _built_in("story_retrieval", ["acc"], _SLOTS, "retrieval"),
    _built_in("story_multihop", ["exact_match"], _SLOTS, "high-dispersion"),
    _built_in("story_filtering", ["iou"], ["average_precision"], "high-scope"),
)


def is_built_in(name: object) -> bool:
    """Whether this names leaves of this package and nothing else: a leaf, a group or a tag."""
    leaves = [leaf for folder in BUILT_IN for forced in (False, True) for leaf in folder.leaves(forced)]
    tags = {f"frontier-{tag}" for folder in BUILT_IN for tag in (*LENGTHS, folder.name.replace("_", "-"), *folder.tags)}
    return isinstance(name, str) and (
        name in leaves or name in ("frontier", "forced_frontier") or name.removeprefix("forced-") in tags
    )


def group(folders: Sequence[TaskFolder], forced: bool) -> str:
    """The file of the umbrella group."""
    names = [leaf for folder in folders for leaf in folder.leaves(forced)]
    metrics = dict.fromkeys(
        name.lstrip("-") for folder in folders for name in (folder.forced_metrics if forced else folder.metrics)
    )
    rows = [f"  - {{metric: {name}, aggregation: mean, weight_by_size: false}}\n" for name in (*metrics, "sparsity")]
    return (
        f"# Every {'teacher-forced' if forced else 'generated'} leaf.\n"
        "# Unweighted mean over the leaves that ran and have the metric; leaves that dropped out do not count as 0.\n"
        f"group: {'forced_' if forced else ''}frontier\n"
        "task:\n"
        f"{''.join(f'  - {name}' + chr(10) for name in names)}"
        "aggregate_metric_list:\n"
        f"{''.join(rows)}"
        "metadata:\n  version: 2\n"
    )


def tree() -> dict[str, str]:
    """Path below tasks/ -> content, for every YAML file of this package."""
    found = {f"{folder.name}/{name}": text for folder in BUILT_IN for name, text in folder.files().items()}
    return found | {"frontier.yaml": group(BUILT_IN, False), "forced_frontier.yaml": group(BUILT_IN, True)}


if __name__ == "__main__":
    import sys
    from pathlib import Path

    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m lm_eval_sparse.frontier.leaves FOLDER, where FOLDER is tasks/ of a checkout")
    for name, text in tree().items():
        path = Path(sys.argv[1]) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
