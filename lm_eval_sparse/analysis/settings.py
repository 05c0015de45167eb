"""What runs must share to be compared, and what is said where they do not. Knows records."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..labels import label
from ..results.schema import Record
from .variants import unlike

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
        "data_parallel_size", "enforce_eager", "gpu_memory_utilization", "max_batch_size", "max_cpu_memory",
        "max_num_seqs", "swap_space", "tensor_parallel_size", "max_memory", "max_memory_per_gpu", "offload_buffers",
        "offload_folder",
        "parallelize", "proxies", "token", "tp_plan", "trust_remote_code", "use_fast_tokenizer", "use_safetensors",
        "weights_only", *_WEIGHTS,
    )
)  # fmt: skip
#: Implementations of attention that compute the same but for rounding.
_EXACT = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
#: What a setting holds, in its order.
NAMES = (
    "version", "definition", "seed", "few-shot examples", "length", "direction", "chat template", "turns of examples",
    "system instruction", "gen_kwargs", "seeds", "model arguments",
)  # fmt: skip
#: What models must share as well, to be compared with each other: their chat templates differ by nature.
_ACROSS = (
    "version", "definition", "seed", "few-shot examples", "length", "direction", "system instruction", "gen_kwargs",
    "seeds",
)  # fmt: skip
#: What lengths of a task must share as well, and what all tasks of a study must: documents of one draw.
_LENGTHS = ("version", "seed", "few-shot examples", "gen_kwargs", "seeds")
_TASKS = ("seed", "seeds")

Setting = tuple[Any, ...]


def weights(row: Record) -> str:
    """Model arguments that change the weights, as text; empty without any. Of a model that is called by another name
    than it was loaded from, such as one with adapters, where that was."""
    given = row.model_args
    found = [f"{name}={_text(given[name])}" for name in _WEIGHTS if given.get(name)]
    loaded = given.get("pretrained")
    if loaded and _text(loaded) != row.model:
        found.append(f"pretrained={_text(loaded)}")
    stated = (("dtype", row.model_dtype), ("torch_dtype", row.model_dtype), ("revision", row.model_revision))
    for name, recorded in stated:
        text = _text(given.get(name) or "").removeprefix("torch.")
        if recorded is not None and text not in ("", "auto") and _DTYPES.get(text, text) != recorded:
            found.append(f"{name}={text}")
    return ", ".join(found)


def stated(row: Record, field: str, *names: str) -> str | None:
    """A field of a model as it is recorded, else as it was typed."""
    recorded = getattr(row, field)
    typed = (_text(row.model_args[name]).removeprefix("torch.") for name in names if row.model_args.get(name))
    text = recorded or next((text for text in typed if text != "auto"), None)
    return text and _DTYPES.get(text, text)


#: Other names of dtypes.
_DTYPES = {"float": "float32", "half": "float16", "double": "float64"}


def setting(row: Record) -> Setting:
    """What makes prompts and scores of a task, beside its name, in the order of `NAMES`."""
    return (
        row.task_version, row.task_hash, row.seed, row.shots or 0, row.length,
        "higher is better" if row.higher_is_better else "lower is better",
        row.chat_template, row.fewshot_as_multiturn if row.shots else None, row.system_instruction,
        json.dumps(row.gen_kwargs, sort_keys=True, default=str),
        tuple(sorted((name, seed) for name, seed in row.seeds.items() if row.shots or name != "fewshot")),
        _arguments(row),
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
            if value is not None and not _is_idle(name, value) and name.rpartition(".")[2] not in knobs
        )
    )


def _is_idle(name: str, value: Any) -> bool:
    return name in _ELSEWHERE and (name != "attn_implementation" or value in _EXACT)


def _text(value: Any) -> str:
    """The same of a number and of what was typed for it."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str).strip('"')


#: A setting with the metric it is of, whose direction is a part of it.
Asked = tuple[str, Setting]
Scope = defaultdict[str, defaultdict[str, dict[Asked, None]]]


def mixed(
    settings: Iterable[tuple[str, str, str, str, Setting]],
) -> tuple[dict[tuple[str, str, Setting], str], list[str]]:
    """Marks of cells that cannot be compared, and a line on each mixture.

    Args:
        settings: model, task, family of the task, metric, and setting of the runs.
    """
    found: dict[tuple[str, str], dict[Asked, None]] = defaultdict(dict)
    tasks: Scope = defaultdict(lambda: defaultdict(dict))
    families: Scope = defaultdict(lambda: defaultdict(dict))
    study: Scope = defaultdict(lambda: defaultdict(dict))
    family_of = {}
    for model, task, family, metric, one in settings:
        for several in (found[model, task], tasks[task][model], families[family][task]):
            several[metric, one] = None
        if family.removeprefix("forced_").startswith("frontier_"):  # others draw by seeds of their own
            study[""][family][metric, one] = None
        family_of[task] = family
    within = {key: _differing(several, NAMES) for key, several in found.items()}
    across = {task: _differing(_all(members), _ACROSS) for task, members in tasks.items()}
    lengths = {family: _differing(_all(members), _LENGTHS) for family, members in families.items()}
    everywhere = _differing(_all(study[""]), _TASKS)
    marks: dict[tuple[str, str, Setting], str] = {}
    lines = []
    for (model, task), several in sorted(found.items()):
        places = sorted({*within[model, task], *across[task], *lengths[family_of[task]], *everywhere})
        if places:
            # Texts that are cut may look alike, and what looks alike would be put together. Metrics have one mark.
            own = {
                tuple(one[at] for at in places): ", ".join(f"{NAMES[at]} {_shown(one, at, several)}" for at in places)
                for _, one in several
            }
            told = unlike(own)
            marks |= {(model, task, one): told[tuple(one[at] for at in places)] for _, one in several}
        if within[model, task]:
            parts = ", ".join(
                f"{NAMES[at]} {' and '.join(sorted({_shown(one, at, several) for _, one in several}))}"
                for at in within[model, task]
            )
            lines.append(f"{label(task)} of {label(model)} has {label(parts, 300)}")
    # What is mixed within one model is said there, and so is what models or lengths differ in.
    said: dict[str, set[int]] = defaultdict(set)
    for (_, task), places in within.items():
        said[task] |= set(places)
    for name, members in sorted(tasks.items()):
        lines += _lines(f"models of {label(name)}", members, set(across[name]) - said[name])
        said[name] |= set(across[name])
    for name, members in sorted(families.items()):
        before = set().union(*(said[task] for task in members))
        lines += _lines(f"lengths of {label(name)}", members, set(lengths[name]) - before)
        said[""] |= before | set(lengths[name])
    lines += _lines("tasks", study[""], set(everywhere) - said[""])
    return marks, lines


def _lines(what: str, members: Mapping[str, Iterable[Asked]], places: Iterable[int]) -> list[str]:
    return [f"{what} differ: {NAMES[at]} {label(_of_each(members, at), 300)}" for at in sorted(places)]


def _all(members: Mapping[str, Iterable[Asked]]) -> list[Asked]:
    return [one for several in members.values() for one in several]


def _differing(settings: Iterable[Asked], names: Sequence[str]) -> list[int]:
    """Places of what differs."""
    several = list(settings)
    found = []
    for at, name in enumerate(NAMES):
        values = {(metric if name == "direction" else "", one[at]) for metric, one in several}
        if names is _TASKS:  # those of other tasks state no seed
            values = {(metric, value) for metric, value in values if value not in (None, ())}
        if name in names and len(values) > len({metric for metric, _ in values}):
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
