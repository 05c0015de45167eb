"""What runs must share to be compared, and what is said where they do not. Knows records."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..labels import label
from ..results.schema import Record

#: Model arguments that say which weights are computed with, and how they are kept.
_WEIGHTS = (
    "autogptq", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "delta", "gguf_file",
    "gptqmodel", "ignore_mismatched_sizes", "key_mapping", "llm_int8_threshold", "load_in_4bit", "load_in_8bit", "peft",
    "quantization_config", "state_dict", "subfolder", "variant",
)  # fmt: skip
#: Those that are fields of records of their own, or change nothing of what is asked and answered.
_ELSEWHERE = frozenset(
    (
        "method", "sparsity", "prefill_sparsity", "kv_sparsity", "decode_sparsity", "preset", "backend", "stats",
        "diagnose", "resume", "debug",
        "pretrained", "revision", "dtype", "torch_dtype",
        "attn_implementation", "batch_size", "cache_dir", "device", "device_map", "distributed_config",
        "force_download", "llm_int8_enable_fp32_cpu_offload", "local_files_only", "logits_cache", "low_cpu_mem_usage",
        "max_batch_size", "max_cpu_memory", "max_memory", "max_memory_per_gpu", "offload_buffers", "offload_folder",
        "parallelize", "proxies", "token", "tp_plan", "trust_remote_code", "use_fast_tokenizer", "use_safetensors",
        "weights_only", *_WEIGHTS,
    )
)  # fmt: skip
#: What a setting holds, in its order.
NAMES = (
    "version", "definition", "seed", "few-shot examples", "length", "direction", "chat template", "system instruction",
    "gen_kwargs", "seeds", "model arguments",
)  # fmt: skip
#: What models must share as well, to be compared with each other: their chat templates differ by nature.
_ACROSS = ("definition", "seed", "few-shot examples", "length", "direction")
#: What lengths of a task must share as well.
_LENGTHS = ("version",)

Setting = tuple[Any, ...]


def weights(row: Record) -> str:
    """Model arguments that change the weights, as text; empty without any."""
    return ", ".join(f"{name}={_text(row.model_args[name])}" for name in _WEIGHTS if row.model_args.get(name))


def setting(row: Record) -> Setting:
    """What makes prompts and scores of a task, beside its name, in the order of `NAMES`."""
    return (
        row.task_version, row.task_hash, row.seed, row.shots, row.length,
        "higher is better" if row.higher_is_better else "lower is better",
        row.chat_template, row.system_instruction, json.dumps(row.gen_kwargs, sort_keys=True, default=str),
        tuple(sorted(row.seeds.items())), _arguments(row),
    )  # fmt: skip


def _arguments(row: Record) -> tuple[tuple[str, str], ...]:
    """Model arguments that may change prompts or answers: all that are not known to do neither, nor to be a method's
    own knobs, which tell curves apart."""
    knobs = {name for given in row.knobs.values() if isinstance(given, dict) for name in given}
    knobs |= {name for names in row.budget_knobs.values() for name in names}
    return tuple(
        sorted(
            (name, _text(value))
            for name, value in row.model_args.items()
            if value is not None and name not in _ELSEWHERE and name.rpartition(".")[2] not in knobs
        )
    )


def _text(value: Any) -> str:
    """The same of a number and of what was typed for it."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str).strip('"')


#: A setting with the metric it is of, whose direction is a part of it.
Asked = tuple[str, Setting]


def mixed(
    settings: Iterable[tuple[str, str, str, str, Setting]],
) -> tuple[dict[tuple[str, str, Setting], str], list[str]]:
    """Marks of cells that cannot be compared, and a line on each mixture.

    Args:
        settings: model, task, family of the task, metric, and setting of the runs.
    """
    found: dict[tuple[str, str], dict[Asked, None]] = defaultdict(dict)
    tasks: dict[str, dict[str, dict[Asked, None]]] = defaultdict(lambda: defaultdict(dict))
    families: dict[str, dict[str, dict[Asked, None]]] = defaultdict(lambda: defaultdict(dict))
    family_of = {}
    for model, task, family, metric, one in settings:
        for several in (found[model, task], tasks[task][model], families[family][task]):
            several[metric, one] = None
        family_of[task] = family
    within = {key: _differing(several, NAMES) for key, several in found.items()}
    across = {task: _differing(_all(members), _ACROSS) for task, members in tasks.items()}
    lengths = {family: _differing(_all(members), _LENGTHS) for family, members in families.items()}
    marks, lines = {}, []
    for (model, task), several in sorted(found.items()):
        places = sorted({*within[model, task], *across[task], *lengths[family_of[task]]})
        if places:
            for _, one in several:
                marks[model, task, one] = ", ".join(f"{NAMES[at]} {_shown(one, at, several)}" for at in places)
        if within[model, task]:
            parts = ", ".join(
                f"{NAMES[at]} {' and '.join(sorted({_shown(one, at, several) for _, one in several}))}"
                for at in within[model, task]
            )
            lines.append(f"{label(task)} of {label(model)} has {label(parts, 300)}")
    for what, groups, differing in (("models", tasks, across), ("lengths", families, lengths)):
        for name, members in sorted(groups.items()):
            # What is mixed within one model is said there.
            said = {at for (_, task), places in within.items() if name in (task, family_of[task]) for at in places}
            for at in differing[name]:
                if at not in said:
                    if what == "lengths" and (of_models := _of_models(members, tasks, at)):
                        lines += of_models
                        continue
                    parts = _of_each(members, at)
                    lines.append(f"{what} of {label(name)} differ: {NAMES[at]} {label(parts, 300)}")
    return marks, lines


def _of_models(leaves: Iterable[str], tasks: Mapping[str, Mapping[str, Iterable[Asked]]], at: int) -> list[str]:
    """Lines on the lengths of a task in which its models differ; none where it is its lengths that do."""
    differ = [leaf for leaf in sorted(leaves) if at in _differing(_all(tasks[leaf]), _LENGTHS)]
    return [f"models of {label(leaf)} differ: {NAMES[at]} {label(_of_each(tasks[leaf], at), 300)}" for leaf in differ]


def _all(members: Mapping[str, Iterable[Asked]]) -> list[Asked]:
    return [one for several in members.values() for one in several]


def _differing(settings: Iterable[Asked], names: Sequence[str]) -> list[int]:
    """Places of what differs."""
    several = list(settings)
    found = []
    for at, name in enumerate(NAMES):
        values = {(metric if name == "direction" else "", one[at]) for metric, one in several}
        expected = len({metric for metric, _ in values})
        if name in names and len(values) > expected:
            found.append(at)
    return found


def _of_each(members: Mapping[str, Iterable[Asked]], at: int) -> str:
    """`0 (org/a) and 7 (org/b)`."""
    values: dict[str, list[str]] = defaultdict(list)
    for name in sorted(members):
        for shown in sorted({_shown(one, at, ()) for _, one in members[name]}):
            values[shown].append(name)
    return " and ".join(
        f"{value} ({label(names[0], 60)}{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
        for value, names in sorted(values.items())
    )


def _shown(one: Setting, at: int, others: Iterable[Asked]) -> str:
    """A part of a setting in words; of several pairs of names and values those that differ."""
    value = one[at]
    if isinstance(value, tuple):
        every = [set(other[at]) for _, other in others]
        same = set(value).intersection(*every) if every else set()
        own = [f"{name}={part}" for name, part in value if (name, part) not in same]
        return label(", ".join(own) or "none", 60)
    return label("none" if value is None else value, 60)
