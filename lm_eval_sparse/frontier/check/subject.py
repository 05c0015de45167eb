"""What is checked: the folder of a task, its leaves, and documents of theirs for one tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipe import Recipe
from ..show import load_leaves, make, manager, prompt_of, quiet
from .folder import built_in


@dataclass(frozen=True)
class Made:
    """Documents of one leaf for one tokenizer and template: with their prompts and requests, one list per document."""

    task: Any
    reader: Any
    docs: list[dict[str, Any]]
    prompts: list[str]
    instances: list[list[Any]]

    @property
    def name(self) -> str:
        return f"{self.task.config.task}{' (chat template)' if self.reader.chat else ''}"


class Subject:
    """A task's folder.

    Attributes:
        files: its YAML files, by the names of leaves and groups.
        built_in: its name where it is one of this package's.
        name: of the task.
        made: the documents that checks look at.
    """

    def __init__(
        self,
        folder: Path,
        reader: Any,
        metadata: Mapping[str, Any],
        lengths: list[str],
        samples: int,
    ):
        self.folder, self.reader, self.metadata, self.samples = folder, reader, dict(metadata), samples
        self.lengths = lengths
        self.files: dict[str, tuple[Path, dict[str, Any]]] = {}
        self.built_in = next((name for name, path in built_in().items() if path == folder), None)
        self.name = ""
        self.made: list[Made] = []
        self.managers: dict[str, Any] = {}  # by metadata: each reads all YAML files

    def leaves(self) -> dict[str, dict[str, Any]]:
        """The content of the YAML file of each leaf, by its name."""
        return {name: content for name, (_, content) in self.files.items() if "group" not in content}

    def load(self, names: Sequence[str], **metadata: Any) -> dict[str, Any]:
        """lm-eval's tasks of these names, under this metadata, too."""
        with quiet():
            key = json.dumps(metadata, sort_keys=True)
            if key not in self.managers:
                self.managers[key] = manager([str(self.folder)], {**self.metadata, **metadata})
            return load_leaves(self.managers[key], list(names))

    def make_length(self, length: str, samples: int, chats: Sequence[bool] = (False, True)) -> tuple[list[Made], str]:
        """Documents of the two leaves of a length, or none and why they are skipped."""
        found = []
        for chat in chats[: 1 + self.reader.has_template]:
            for leaf in (f"frontier_{self.name}_{length}", f"forced_frontier_{self.name}_{length}"):
                if leaf not in self.leaves():
                    continue
                made = self.make(leaf, chat, samples=samples)
                if isinstance(made, str):
                    return [], made
                found.append(made)
        return found, ""

    def make(self, leaf: str, chat: bool = False, order: Sequence[int] | None = None, **metadata: Any) -> Made | str:
        """Documents of a leaf, or why it is skipped."""
        reader = self.reader.with_chat(chat)
        task = self.load([leaf], **metadata)[leaf]
        with quiet():
            make(task, reader, list(order) if order else None)
        if reason := task.config.metadata.get("skipped"):
            return str(reason)
        by_doc: dict[int, list[Any]] = {}
        for instance in task.instances:
            by_doc.setdefault(instance.doc["index"], []).append(instance)
        rows = [by_doc[index] for index in sorted(by_doc)]
        return Made(task, reader, [row[0].doc for row in rows], [prompt_of(row[0]) for row in rows], rows)

    def plain(self, forced: bool | None = None) -> list[Made]:
        """What was made without a template, of several documents."""
        return [m for m in self.made if not m.reader.chat and len(m.docs) > 1 and forced in (None, m.task.forced)]

    def twins(self) -> list[Made]:
        """What was made of teacher-forced leaves."""
        return [made for made in self.made if made.task.forced]

    def generated(self) -> list[Made]:
        """What was made of the others."""
        return [made for made in self.made if not made.task.forced]

    def natural(self) -> str:
        """Why chance repetitions are not held against the task: only tasks with a set of data of their own bind it."""
        data = type(self.made[0].task.recipe).bind is not Recipe.bind
        return "texts that others wrote may say things twice" if data else ""
