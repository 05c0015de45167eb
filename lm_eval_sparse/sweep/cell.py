"""One cell of a grid: a model, a method with its budget, a task, and how it is asked. Addressed by its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Raised when what an address is made of changes its meaning.
SCHEMA = 1
#: Arguments that change where and how fast a cell runs, not what comes out; they are in no address.
IDLE = (
    "batch_size", "cache_dir", "device", "device_map", "local_files_only", "max_batch_size", "max_cpu_memory",
    "max_memory", "max_memory_per_gpu", "offload_folder", "parallelize", "stats", "token", "trust_remote_code",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What one run of lm-eval is to do.

    Attributes:
        model: the name that records give the model.
        pretrained: folder or Hub name, where the weights are; not in the address, since machines differ in it.
        model_args: further model arguments, such as `dtype`.
        sparse: method, sparsities, knobs, preset, backend, as model arguments.
        task: a task of lm-eval. `length`: as it was typed, None where the task has none.
        limit: documents, None for all.
        seed: of documents and of lm-eval, None for the usual ones.
        options: of lm-eval's command line, by name without dashes: those that decide what is asked.
        run: likewise those that do not, such as `batch_size`.
    """

    model: str
    pretrained: str
    model_args: Mapping[str, Any]
    sparse: Mapping[str, Any]
    task: str
    length: str | None = None
    limit: int | None = None
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return str(self.sparse["method"])

    @property
    def is_dense(self) -> bool:
        return self.method == "dense"

    def content(self) -> dict[str, Any]:
        """What decides the cell's scores, and so its address."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "model_args": {name: value for name, value in self.model_args.items() if name not in IDLE},
            "sparse": dict(self.sparse),
            "task": self.task,
            "limit": self.limit,
            "seed": self.seed,
            "options": dict(self.options),
        }

    @property
    def address(self) -> str:
        """20 hexadecimal digits of a hash of the content."""
        return _digest(self.content())

    @property
    def log(self) -> str:
        """The same without the number of documents: with more of them the answers so far are taken on."""
        return _digest(self.content() | {"limit": None})

    def argv(self, output: str) -> list[str]:
        """Arguments of lm-eval's command line that run the cell, with results below `output`."""
        model_args = {"pretrained": self.pretrained, **self.model_args, **self.sparse}
        idle = dict(self.run)
        model_args |= {name: idle.pop(name) for name in list(idle) if name not in COMMAND_LINE}
        found = ["--model", "sparse-hf", "--model_args", json.dumps(model_args), "--tasks", self.task]
        found += ["--output_path", output]
        if self.limit is not None:
            found += ["--limit", str(self.limit)]
        options = {**self.options, **idle}
        metadata = dict(options.pop("metadata", {}))
        if self.seed is not None:
            metadata["seed"] = self.seed
            found += ["--seed", str(self.seed)]
        if metadata:
            found += ["--metadata", json.dumps(metadata)]
        for name, value in options.items():
            if value is True:
                found.append(f"--{name}")
            elif value not in (False, None):
                found += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
        return found

    def told(self) -> str:
        """The cell in words."""
        how = "dense"
        if not self.is_dense:
            budget = [f"{name}={value}" for name, value in self.sparse.items() if name != "method"]
            how = f"{self.method} {' '.join(budget)}".rstrip()
        more = "".join(f", {name} {value}" for name, value in (("seed", self.seed),) if value is not None)
        return f"{self.model}, {how}, {self.task}{f', {self.limit} documents' if self.limit else ''}{more}"

    def as_json(self) -> dict[str, Any]:
        """All of it, to be made again with `Cell(**…)`."""
        return {
            "model": self.model, "pretrained": self.pretrained, "model_args": dict(self.model_args),
            "sparse": dict(self.sparse), "task": self.task, "length": self.length, "limit": self.limit,
            "seed": self.seed, "options": dict(self.options), "run": dict(self.run),
        }  # fmt: skip


#: Options of lm-eval's command line that decide what is asked, and those that do not. Others are model arguments.
ASKING = (
    "apply_chat_template", "fewshot_as_multiturn", "gen_kwargs", "metadata", "num_fewshot", "system_instruction",
)  # fmt: skip
COMMAND_LINE = ("batch_size", "cache_requests", "device", "include_path", "max_batch_size", "verbosity")


#: Model, task, number of documents and seed.
Documents = tuple[str, str, int | None, int | None]


def documents_of(cell: Cell) -> Documents:
    """What cells on the same prompts have in common."""
    return cell.model, cell.task, cell.limit, cell.seed


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
