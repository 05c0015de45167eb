"""What the rows share on disk: tiny models, an adapter, tiny tasks, good result files. See `attack_rows.WORDS`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Runs when a model folder's own code is imported, however that comes about.
_CODE = """\
import pathlib
pathlib.Path("PWNED").write_text("code of a model folder ran")
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
    def __init__(self, **more):
        pathlib.Path("PWNED").write_text("code of a model folder ran")
        super().__init__(**more)
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def make(folder: Path) -> dict[str, Path]:
    """Everything shared, below `folder`, by word."""
    import tiny

    models = {
        "llama": tiny.tiny_llama(folder / "llama"),
        "chat": tiny.tiny_llama(folder / "chat", chat=True),
        "remote": tiny.tiny_llama(folder / "remote"),
    }
    _with_code(models["remote"])
    return {
        **models,
        "lora": _adapter(models["llama"], folder / "lora"),
        "tasks": tiny.write_tasks(folder / "tasks", lengths=(110, 120)),
        "results": _results(folder / "results"),
    }


def _with_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(_CODE)


def _adapter(base: Path, folder: Path) -> Path:
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def result(sparsity: float | None = 0.8, task: str = "niah", score: float = 0.25) -> dict[str, Any]:
    """What lm-eval and sparse-hf save of a run, as far as anything reads it."""
    phases = {
        "method": "flexprefill" if sparsity else "dense", "requested_sparsity": sparsity,
        "selected_sparsity": sparsity, "executed_sparsity": sparsity, "bytes_read_fraction": 1.0,
        "kv_memory_fraction": 1.0, "estimator_flops_fraction": 0.01, "calls": {"sparse": 8, "dense": 0},
    }  # fmt: skip
    sparse = {
        "method": "flexprefill" if sparsity else "dense", "requested_sparsity": sparsity or 0.0,
        "requested_by_phase": {"prefill": sparsity}, "preset": None, "knobs": {}, "backend": "gather",
        "tasks": {task: {"prefill": phases}}, "phases": {"prefill": phases}, "skipped": {},
        "versions": {"lm_eval_sparse": "0", "lm_eval": "0.4.13"},
    }  # fmt: skip
    return {
        "results": {
            task: {"name": task, "alias": task, "sample_len": 20, "exact,none": score, "exact_stderr,none": 0.1,
                   "sparsity,none": sparsity or 0.0}
        },
        "group_subtasks": {task: []},
        "configs": {task: {"task": task, "metadata": {"version": 1}}},
        "versions": {task: 1},
        "n-shot": {task: 0},
        "higher_is_better": {task: {"exact": True}},
        "n-samples": {task: {"original": 20, "effective": 20}},
        "config": {"model": "sparse-hf", "model_args": {"pretrained": "org/model"}, "batch_size": 1, "limit": None,
                   "gen_kwargs": None, "sparse": sparse},
        "date": 1.7e9,
        "model_name": "org/model",
        "chat_template": None,
        "system_instruction": None,
        "total_evaluation_time_seconds": "12.5",
    }  # fmt: skip


def _results(folder: Path) -> Path:
    folder.mkdir()
    for name, sparsity in (("2025-01-01T00-00-00.0", None), ("2025-01-02T00-00-00.0", 0.8)):
        (folder / f"results_{name}.json").write_text(json.dumps(result(sparsity)))
    return folder
