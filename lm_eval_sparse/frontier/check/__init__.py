"""`lm-eval-sparse check-task`: does a task keep what the package promises of every task?

One line per check. What a task's author gets wrong most easily is looked for without knowing the task: documents that
depend on more than their seed, prompts of a wrong length, answers that leak, scorers that reward nonsense, twins whose
chance level is not what they say.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ... import frontier, paths
from ...errors import PROGRAM, UserError, nearest, plain
from ...results.files import read_bytes
from .. import apart, elsewhere
from ..fill import SENTENCES
from ..leaves import LENGTHS, MEASURED
from ..metadata import check_keys, read_metadata, read_number
from ..recipe import Recipe
from ..show import Reader, load_leaves, make, manager, prompt_of, quiet, told
from ..yamls import leaf_files

_LEAF = re.compile(r"(?P<forced>forced_)?frontier_(?P<task>.+)_(?P<length>[^_]+)")
_REFUSAL = "I am sorry, but this is something with which help is not possible."
#: What is no answer to anything. No digits, no capital letters on their own, no words of five capitals.
_NOTHING = {
    "no text": "",
    "blanks": " \n\t \n",
    "empty tags": "<explanation></explanation>\n<answer>\n</answer>",
    "a refusal": _REFUSAL,
    "a refusal in tags": f"<answer>{_REFUSAL}</answer>",
    "noise": "<answer>\nqzx wvqj; ~~~ §§ %%% -- xkcdq\n</answer>" + " lorem ipsum ((((" * 50,
}
_LOW, _HIGH = (-50.0, False), (0.0, True)
_DRAWS = 200
_TELLING = 12  # characters from which a gold line in the prompt is no coincidence
_SLOWEST_DRAFT = 0.02  # seconds
_FULLEST = 0.95
_MOST_FILLER = 0.15
_MOST_ECHO = 0.75
_SHOWN = 3
_LONGEST_LINE = 2000  # characters of a finding
_LARGEST_README = 16 * 2**20


class _Wrong(Exception):
    """A check has failed. The message says what was found and what is expected."""


def run(
    path: str,
    *,
    tokenizer: str | None = None,
    metadata: str | None = None,
    lengths: str | None = None,
    samples: str = "8",
) -> int:
    """Check the folder of one task, or a built-in task; values as they are typed. Returns the exit status.

    It is 0 when every check passed.

    Raises:
        UserError: a value that cannot be, or no such folder.
    """
    number = read_number("--samples", samples, 2)
    given = read_metadata(metadata)
    folder = _folder(path)
    if folder in _built_in().values():  # recipes from elsewhere may read more
        check_keys(given)
    chosen = _lengths(lengths)

    def work(progress: apart.Progress) -> int:
        reader = Reader.of(tokenizer, given, chat=False)
        report = _Report(folder, progress)
        with _scratch():
            _Checker(folder, reader, given, chosen, number, report).run()
        return report.close()

    try:
        return apart.run(work)
    except apart.Ended as error:
        return _Report(folder, apart.Progress(sys.stdout)).ended(error)


def _folder(given: str) -> Path:
    """The folder that PATH means. Raises `UserError`."""
    path, known = paths.expand(f"PATH {given!r:.80}", given), _built_in()
    if paths.is_dir(path) and (any(path.glob("*.yaml")) or given not in frontier.RECIPES):
        if not any(path.rglob("*.yaml")):
            raise UserError(
                f"{given} given, but it has no YAML files; give the folder of a task (`{PROGRAM} new-task` writes one)"
            )
        return path.resolve()
    if given in known:
        return known[given]
    if paths.exists(path):
        raise UserError(
            f"{given} given, which is a file; give the folder that it is in, or the name of a built-in task"
        )
    names, close = ", ".join(known), nearest(given[:200], known)
    raise UserError(f"{given!r:.300} given, which is neither a folder nor a built-in task ({names}){close}")


def _built_in() -> dict[str, Path]:
    from ...patches.register_tasks import task_folders

    roots = [Path(folder) for folder in task_folders()]
    return {name: (root / name).resolve() for name in frontier.RECIPES for root in roots if (root / name).is_dir()}


def _lengths(given: str | None) -> list[str]:
    lengths = [part.strip() for part in (given or "").split(",") if part.strip()]
    if bad := [length for length in lengths if length not in LENGTHS]:
        raise UserError(
            f"--lengths {given} given, but {bad[0]!r} is none of {', '.join(LENGTHS)}; type --lengths 4k,8k"
        )
    if given is not None and not lengths:
        raise UserError(f"--lengths {given!r} given, but it must name lengths; type --lengths 4k,8k")
    return lengths


@contextlib.contextmanager
def _scratch() -> Iterator[None]:
    """A cache without documents that vanishes at the end; all else in the user's cache stays within reach."""
    from ..store import cache_dir

    before, theirs = os.environ.get("LM_EVAL_SPARSE_CACHE"), cache_dir().parent
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # no __pycache__ beside the author's code
    with tempfile.TemporaryDirectory(prefix="check-task-", ignore_cleanup_errors=True) as folder:
        for entry in theirs.iterdir() if theirs.is_dir() else ():
            if entry.name != cache_dir().name:
                (Path(folder) / entry.name).symlink_to(entry.resolve())
        os.environ["LM_EVAL_SPARSE_CACHE"] = folder
        try:
            yield
        finally:
            sys.dont_write_bytecode = bytecode
            if before is None:
                os.environ.pop("LM_EVAL_SPARSE_CACHE", None)
            else:
                os.environ["LM_EVAL_SPARSE_CACHE"] = before


class _Report:
    """Prints a line per check and counts."""

    def __init__(self, folder: Path, progress: apart.Progress):
        self.folder, self.progress, self.passed, self.failed = folder, progress, 0, 0

    def check(self, name: str, function: Callable[..., str], *args: Any) -> bool:
        """Run one check; `function` returns what it found, or raises."""
        self.progress.note([name, self.passed, self.failed])
        try:
            found, good = function(*args), True
        except _Wrong as wrong:
            found, good = str(wrong), False
        except BaseException as error:  # code of the task's author, which may also try to end the process
            if apart.was_interrupted():
                raise
            found, good = told(error, self.folder), False
        return self.line(name, found, good)

    def line(self, name: str, found: str, good: bool) -> bool:
        self.passed, self.failed = self.passed + good, self.failed + (not good)
        self.progress.say(f"{'ok' if good else 'FAIL':<5} {name:<20} {_cut(plain(' '.join(found.split())))}")
        return good

    def ended(self, error: apart.Ended) -> int:
        """The rest of the report of a process that the task's code has ended."""
        name, self.passed, self.failed = error.last or ["start", 0, 0]
        self.line(name, f"{error}; expected that it lives on", False)
        return self.close()

    def close(self) -> int:
        checks = self.passed + self.failed
        self.progress.say(f"\n{checks} checks, " + (f"{self.failed} FAILED" if self.failed else "all ok"))
        return int(bool(self.failed))


@dataclass(frozen=True)
class _Made:
    """Documents of one leaf for one tokenizer and template: with their prompts and requests, one list per document."""

    task: Any
    reader: Any
    docs: list[dict[str, Any]]
    prompts: list[str]
    instances: list[list[Any]]

    @property
    def name(self) -> str:
        return f"{self.task.config.task}{' (chat template)' if self.reader.chat else ''}"


class _Checker:
    """All checks of one folder, in order."""

    def __init__(
        self,
        folder: Path,
        reader: Any,
        metadata: Mapping[str, Any],
        lengths: list[str],
        samples: int,
        report: _Report,
    ):
        self.folder, self.reader, self.metadata, self.samples = folder, reader, dict(metadata), samples
        self.lengths, self.report = lengths, report
        self.files: dict[str, tuple[Path, dict[str, Any]]] = {}
        self.built_in = next((name for name, path in _built_in().items() if path == folder), None)
        self.name = ""
        self.made: list[_Made] = []
        self.managers: dict[str, Any] = {}  # by metadata: each reads all YAML files

    def run(self) -> None:
        check = self.report.check
        if not check("files", self._files):
            return
        check("names", self._names)
        check("tags", self._tags)
        check("clashes", self._clashes)
        if self.built_in:
            check("groups", self._groups)
        check("README", self._readme)
        if not (check("classes", self._classes) and check("documents", self._documents)):
            self.report.progress.say("      (what needs documents was not checked)")
            return
        check("lengths", self._exact)
        check("content", self._content)
        check("order", self._order)
        check("other process", self._other_process)
        check("other seed", self._other_seed)
        check("variety", self._variety)
        check("JSON", self._json)
        check("metrics", self._metrics)
        check("gold answer", self._gold)
        check("no answer", self._nothing)
        check("wrong answer", self._wrong_answer)
        check("copied prompt", self._echo)
        check("evidence", self._evidence)
        check("secrets", self._secrets)
        if self._twins():
            check("twin: same gold", self._same_gold)
            check("twin: one prompt", self._one_prompt)
            check("twin: gold requests", self._gold_requests)
            check("twin: chance", self._chance)
        check("draft: pure", self._pure)
        check("draft: filler", self._filler)
        check("draft: room", self._room)
        check("draft: cheap", self._cheap)

    # -------------------------------------------------------------------------------------------------------- names

    def _files(self) -> str:
        self.files = leaf_files(self.folder)
        names = [_LEAF.fullmatch(name) for name, (_, content) in self.files.items() if "group" not in content]
        tasks = sorted({match["task"] for match in names if match})
        if not tasks:
            raise _Wrong(
                f"no leaf called frontier_<task>_<length> among {_some(self.files) or 'no names'}; "
                f"`{PROGRAM} new-task` writes a folder that has them"
            )
        if len(tasks) > 1:
            raise _Wrong(f"leaves of {len(tasks)} tasks ({_some(tasks)}); give a folder with those of one task")
        self.name = tasks[0]
        return f"{len(self.files)} YAML files with names, the task is {self.name}"

    def _leaves(self) -> dict[str, dict[str, Any]]:
        return {name: content for name, (_, content) in self.files.items() if "group" not in content}

    def _names(self) -> str:
        problems, leaves = [], self._leaves()
        for name, content in leaves.items():
            match = _LEAF.fullmatch(name)
            if not match or match["length"] not in LENGTHS:
                wanted = f"[forced_]frontier_{self.name}_<length> with one of {', '.join(LENGTHS)}"
                problems.append(f"{name} is not called {wanted}")
                continue
            length = (content.get("dataset_kwargs") or {}).get("length")
            if length != LENGTHS[match["length"]]:
                problems.append(f"{name} has length {length} in its YAML, expected {LENGTHS[match['length']]}")
            twin = name.removeprefix("forced_") if match["forced"] else f"forced_{name}"
            if twin not in leaves:
                problems.append(f"{name} has no {'sibling' if match['forced'] else 'twin'} {twin}")
        missing = [length for length in LENGTHS if f"frontier_{self.name}_{length}" not in leaves]
        if missing and self.built_in:
            problems.append(f"no leaf for {', '.join(missing)}; tasks of this package have all lengths")
        _raise(problems)
        return f"{len(leaves)} leaves, each with its twin" + (f" (none for {', '.join(missing)})" if missing else "")

    def _tags(self) -> str:
        problems, tags = [], set()
        for name, content in self._leaves().items():
            given = content.get("tag") or []
            tags |= {str(tag) for tag in (given if isinstance(given, list) else [given])}
            if not given:
                problems.append(f"{name} has no tag; expected such as frontier-{self.name.replace('_', '-')}")
        groups = [name for name, (_, content) in self.files.items() if "group" in content]
        problems += [f"tag {tag} has underscores; expected hyphens" for tag in sorted(tags) if "_" in tag]
        for name in groups:
            if name.startswith(("frontier_", "forced_frontier_")):
                problems.append(
                    f"group {name} matches {name.split('frontier_')[0]}frontier_*, which is for leaves only"
                )
        _raise(problems)
        return f"{len(tags)} tags with hyphens" + (f", {len(groups)} groups" if groups else "")

    def _clashes(self) -> str:
        if self.built_in:
            roots = [path for name, path in _built_in().items() if name != self.built_in]
        else:
            roots = list(_built_in().values())
        others = {name for root in roots for name in leaf_files(root)} | {"frontier", "forced_frontier"}
        problems = [f"{name} is also the name of a built-in task" for name in self.files if name in others]
        if self.name in frontier.RECIPES and self.name != self.built_in and not problems:
            problems.append(f"{self.name} is also the name of a built-in task")
        _raise(problems)
        return "no name is that of another task of this package"

    def _groups(self) -> str:
        roots = leaf_files(self.folder.parent)
        problems = []
        for forced in ("", "forced_"):
            group = f"{forced}frontier"
            held = (roots.get(group) or (None, {}))[1].get("task") or []
            leaves = [name for name in self._leaves() if name.startswith("forced_") == bool(forced)]
            problems += [f"{name} is not in the group {group}" for name in leaves if name not in held]
        _raise(problems)
        return "all leaves are in the groups frontier and forced_frontier"

    def _readme(self) -> str:
        word = re.compile(rf"^\s*[#|].*(?<![\w]){re.escape(self.name)}(?![\w])", re.MULTILINE)
        looked = [self.folder / "README.md", self.folder.parent / "README.md"]
        for path in looked:
            if path.is_file() and word.search(read_bytes(path, most=_LARGEST_README).decode(errors="replace")):
                return f"{path} names the task"
        raise _Wrong(
            f"no heading and no table row names {self.name} in {' or '.join(map(str, looked))}; "
            f"expected such as `## {self.name}`"
        )

    # ---------------------------------------------------------------------------------------------------- documents

    def _load(self, names: Sequence[str], **metadata: Any) -> dict[str, Any]:
        with quiet():
            key = json.dumps(metadata, sort_keys=True)
            if key not in self.managers:
                self.managers[key] = manager([str(self.folder)], {**self.metadata, **metadata})
            return load_leaves(self.managers[key], list(names))

    def _classes(self) -> str:
        problems = []
        for name, task in self._load(list(self._leaves()), samples=self.samples).items():
            wanted = (
                "ForcedFrontierTask, loglikelihood" if name.startswith("forced_") else "FrontierTask, generate_until"
            )
            found = ("ForcedFrontierTask" if task.forced else "FrontierTask") + f", {task.OUTPUT_TYPE}"
            if found != wanted:
                problems.append(f"{name} is a {found}; expected {wanted}")
            if not isinstance(task.recipe, Recipe):
                problems.append(f"{name} has the recipe {type(task.recipe).__name__}, which is no recipe.Recipe")
            elif task.recipe.name != self.name:
                problems.append(f"the recipe of {name} is called {task.recipe.name!r}; expected {self.name!r}")
        _raise(problems)
        return f"{len(self._leaves())} leaves load"

    def _documents(self) -> str:
        """Make the documents that the other checks look at."""
        present = [length for length in LENGTHS if f"frontier_{self.name}_{length}" in self._leaves()]
        if unknown := [length for length in self.lengths if length not in present]:
            raise _Wrong(f"no leaf for the length {unknown[0]} given with --lengths; there are {', '.join(present)}")
        wanted = self.lengths or present
        skipped, done = "", []
        for length in wanted:
            if not self.lengths and len(done) == 2:
                break
            made, reason = self._make_length(length, self.samples)
            skipped = skipped or reason
            if reason and self.lengths:
                raise _Wrong(f"frontier_{self.name}_{length} is skipped: {reason}")
            self.made += made
            done += [length] * bool(made)
        if not done:
            raise _Wrong(f"every leaf is skipped: {skipped}" if skipped else "no leaves")
        if not self.lengths and present[-1] not in done:
            made, _ = self._make_length(present[-1], 1, chats=[False])
            self.made += made
            done += [f"{present[-1]} (one)"] * bool(made)
        if not any(len(made.docs) > 1 for made in self.made):
            raise _Wrong("there is only one document; expected several")
        chats = "with and without chat template" if self.reader.has_template else "the tokenizer has no chat template"
        return f"{sum(len(made.docs) for made in self.made)} made: {', '.join(done)}; {chats}"

    def _make_length(self, length: str, samples: int, chats: Sequence[bool] = (False, True)) -> tuple[list[_Made], str]:
        found = []
        for chat in chats[: 1 + self.reader.has_template]:
            for leaf in (f"frontier_{self.name}_{length}", f"forced_frontier_{self.name}_{length}"):
                if leaf not in self._leaves():
                    continue
                made = self._make(leaf, chat, samples=samples)
                if isinstance(made, str):
                    return [], made
                found.append(made)
        return found, ""

    def _make(self, leaf: str, chat: bool = False, order: Sequence[int] | None = None, **metadata: Any) -> _Made | str:
        """Documents of a leaf, or why it is skipped."""
        reader = self.reader.with_chat(chat)
        task = self._load([leaf], **metadata)[leaf]
        with quiet():
            make(task, reader, list(order) if order else None)
        if reason := task.config.metadata.get("skipped"):
            return str(reason)
        by_doc: dict[int, list[Any]] = {}
        for instance in task.instances:
            by_doc.setdefault(instance.doc["index"], []).append(instance)
        rows = [by_doc[index] for index in sorted(by_doc)]
        return _Made(task, reader, [row[0].doc for row in rows], [prompt_of(row[0]) for row in rows], rows)

    def _plain(self, forced: bool | None = None) -> list[_Made]:
        """What was made without a template, of several documents."""
        return [m for m in self.made if not m.reader.chat and len(m.docs) > 1 and forced in (None, m.task.forced)]

    def _twins(self) -> list[_Made]:
        return [made for made in self.made if made.task.forced]

    def _generated(self) -> list[_Made]:
        return [made for made in self.made if not made.task.forced]

    def _exact(self) -> str:
        problems, shortest = [], 1.0
        for made in self.made:
            for doc, prompt in zip(made.docs, made.prompts, strict=True):
                tokens, length = len(made.reader.tok_encode(prompt)), made.task.config.metadata["prompt_tokens"]
                shortest = min(shortest, tokens / length)
                where = f"document {doc['index']} of {made.name} has {tokens} tokens"
                if tokens > length:
                    problems.append(f"{where}, more than {length}")
                elif tokens < _FULLEST * length:
                    problems.append(f"{where}; expected {math.ceil(_FULLEST * length)} to {length}")
                elif tokens != doc["tokens"]:
                    problems.append(f"{where}, but was written as {doc['tokens']}: `message` gave another text later")
        _raise(problems)
        return f"every prompt has {100 * shortest:.2f} to 100 % of its length, never more"

    def _content(self) -> str:
        """A draft that has too few units is made as long as it should be by filler, which nobody would notice."""
        most, problems = 0.0, []
        for made in self.made:
            for doc in made.docs:
                text = doc["input"].lower()
                share = sum(len(sentence) * text.count(sentence) for sentence in SENTENCES) / len(text)
                most = max(most, share)
                if share > _MOST_FILLER:
                    problems.append(
                        f"{100 * share:.0f} % of document {doc['index']} of {made.name} is filler; expected at most "
                        f"{100 * _MOST_FILLER:.0f} %: units are too large, or `most` is too small"
                    )
        _raise(problems)
        return f"at most {100 * most:.1f} % of a document is filler"

    # -------------------------------------------------------------------------------------------------- determinism

    def _order(self) -> str:
        problems = []
        for made in self._plain()[:2]:
            with _scratch():
                other = self._make(
                    made.task.config.task, order=[doc["index"] for doc in reversed(made.docs)], samples=self.samples
                )
            assert isinstance(other, _Made)
            for doc, again in zip(made.docs, other.docs, strict=True):
                if doc != again:
                    problems.append(
                        f"document {doc['index']} of {made.name} {_difference(doc, again)} when made in another order"
                    )
        _raise(problems)
        return "the same documents in reversed order from an empty cache"

    def _other_process(self) -> str:
        content = self._leaves()[self._plain()[0].task.config.task]
        kwargs = {key: str(value) for key, value in content["dataset_kwargs"].items() if key in ("task", "recipe")}
        job = {
            "folder": str(self.folder),
            "recipe": kwargs,
            "metadata": self._metadata_anywhere(),
            "length": self._plain()[0].task.length,
            "indexes": [doc["index"] for doc in self._plain()[0].docs],
        }
        seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
        try:
            theirs = elsewhere.run(job, seed)
        except elsewhere.Failed as error:
            raise _Wrong(f"another process cannot write the documents: {error}") from None
        ours = elsewhere.digests(job)
        problems = [f"{key} is another in another process (hash order? clock? global state?)" for key in ours
                    if theirs.get(key) != ours[key]]  # fmt: skip
        _raise(problems)
        return f"the same documents with PYTHONHASHSEED={seed}"

    def _metadata_anywhere(self) -> dict[str, Any]:
        """The metadata as it reads from every folder."""
        found = {**self.metadata, "samples": self.samples}
        if "qa_folder" in found:
            found["qa_folder"] = str(paths.folder("qa_folder", found["qa_folder"]).resolve())
        return found

    def _other_seed(self) -> str:
        made = self._plain(False)[0] if self._plain(False) else self._plain()[0]
        seed = made.task.seed + 1
        other = self._make(made.task.config.task, samples=self.samples, seed=seed)
        if isinstance(other, str):
            raise _Wrong(f"{made.name} is skipped with seed {seed}: {other}")
        same = [a["index"] for a, b in zip(made.docs, other.docs, strict=False) if a["input"] == b["input"]]
        if len(same) > len(made.docs) / 2:
            raise _Wrong(f"document {same[0]} of {made.name} is the same with seed {seed}; expected another")
        return f"other documents with seed {seed}"

    def _variety(self) -> str:
        problems = []
        for made in self._plain():
            seen: dict[str, int] = {}
            for doc in made.docs:
                first = seen.setdefault(doc["input"], doc["index"])
                if first != doc["index"]:
                    problems.append(f"documents {first} and {doc['index']} of {made.name} are equal; expected others")
            golds = {json.dumps(doc["target"]) for doc in made.docs}
            if len(golds) == 1 and not problems:
                problems.append(
                    f"all documents of {made.name} have the same gold answer {made.docs[0]['target']!r:.60}"
                )
        _raise(problems)
        return "documents differ, and so do gold answers"

    def _json(self) -> str:
        problems = []
        for made in self._plain():
            for doc in made.docs:
                try:
                    again = json.loads(json.dumps(doc))
                except (TypeError, ValueError) as error:
                    raise _Wrong(f"`gold` of {made.name} holds what JSON has no type for: {error}") from None
                if doc != again:
                    problems.append(f"document {doc['index']} of {made.name} {_difference(doc, again)} as JSON")
                if not isinstance(doc["target"], str) or not doc["target"].strip():
                    problems.append(f"`target` of {made.name} is {doc['target']!r:.40}; expected a text")
        _raise(problems)
        return "documents survive JSON"

    # ------------------------------------------------------------------------------------------------------- scores

    def _metrics(self) -> str:
        problems, shown = [], []
        for made in self._plain():
            listed = [row["metric"] for row in made.task.config.metric_list]
            listed = [name for name in listed if name not in MEASURED]
            requests = len(made.instances[0])
            results = [_LOW] * requests if made.task.forced else [""]
            given = list(made.task.process_results(made.docs[0], results))
            if set(listed) != set(given):
                problems.append(f"{made.name} scores {', '.join(given)}; its metric_list has {', '.join(listed)}")
            shown += [name for name in listed if name not in shown]
        _raise(problems)
        return f"metric_list names what is scored: {', '.join(shown)}"

    def _scores(self, made: _Made, doc: dict[str, Any], text: str) -> dict[str, float]:
        better = made.task.higher_is_better()
        return {name: value for name, value in made.task.process_results(doc, [text]).items() if better.get(name, True)}

    def _gold(self) -> str:
        problems = []
        for made in self._generated():
            for doc in made.docs:
                for text in {_answer(doc["target"]): 0, made.task.doc_to_target(doc): 0}:  # lm-eval logs the latter
                    for metric, value in self._scores(made, doc, text).items():
                        if not math.isclose(value, 1.0, abs_tol=1e-9):
                            problems.append(
                                f"the gold answer of document {doc['index']} of {made.name} ({doc['target']!r:.60}) "
                                f"scores {metric} {value:.4g}; expected 1"
                            )
                    if problems:
                        break
        _raise(problems)
        return "the gold answer in tags scores 1"

    def _nothing(self) -> str:
        problems = []
        for made in self._plain(False):
            for doc in made.docs:
                for what, text in _NOTHING.items():
                    for metric, value in self._scores(made, doc, text).items():
                        if value != 0:
                            problems.append(
                                f"{what} scores {metric} {value:.4g} on document {doc['index']} of {made.name}; "
                                "expected 0"
                            )
        _raise(problems)
        return f"{', '.join(_NOTHING)} score 0"

    def _wrong_answer(self) -> str:
        if natural := self._natural():
            return f"not looked at: {natural}"
        problems = []
        for made in self._plain(False):
            for doc, other in zip(made.docs, made.docs[1:] + made.docs[:1], strict=True):
                scores = self._scores(made, doc, _answer(other["target"]))
                if doc["target"] != other["target"] and scores and min(scores.values()) >= 1:
                    problems.append(
                        f"the gold answer of document {other['index']} scores 1 on document {doc['index']} of "
                        f"{made.name}; expected less"
                    )
        _raise(problems)
        return "the gold answer of another document scores less than 1"

    def _echo(self) -> str:
        """A scorer that only looks whether the gold answer occurs somewhere pays for a copy of the prompt."""
        problems = []
        for made in self._plain(False):
            for what, wrap in (("a copy of the prompt", str), ("a copy of the prompt in answer tags", _answer)):
                scores = [
                    self._scores(made, doc, wrap(text)) for doc, text in zip(made.docs, made.prompts, strict=True)
                ]
                for metric in scores[0] if scores else ():
                    mean = sum(score[metric] for score in scores) / len(scores)
                    if mean >= _MOST_ECHO:
                        problems.append(f"{what} scores {metric} {mean:.4g} on average in {made.name}; expected little")
        _raise(problems)
        return "a copy of the prompt does not score"

    # ------------------------------------------------------------------------------------------------------ leakage

    def _natural(self) -> str:
        """Why chance repetitions are not held against the task: only tasks with a set of data of their own bind it."""
        data = type(self.made[0].task.recipe).bind is not Recipe.bind
        return "texts that others wrote may say things twice" if data else ""

    def _evidence(self) -> str:
        problems, pieces = [], 0
        for made in self.made:
            for doc, prompt in zip(made.docs, made.prompts, strict=True):
                found = made.task.recipe.evidence(doc)
                pieces += len(found)
                where = f"of document {doc['index']} of {made.name}"
                if not found:
                    problems.append(f"no evidence {where}; expected at least one piece")
                for piece in found:
                    times = prompt.count(piece) if piece else 0
                    if times != 1:
                        problems.append(
                            f"the evidence {piece!r:.80} {where} stands {times} times in the prompt, not once"
                        )
        _raise(problems)
        return f"{pieces} pieces, each once in its prompt"

    def _secrets(self) -> str:
        natural, problems, named, looked = self._natural(), [], 0, 0
        for made in self.made:
            for doc, prompt in zip(made.docs, made.prompts, strict=True):
                rest = _outside(made.task.recipe.evidence(doc), prompt)
                secrets = list(made.task.recipe.secrets(doc))
                named += len(secrets)
                lines = (line.strip() for line in str(doc["target"]).splitlines())
                telling = secrets or ([] if natural else [line for line in lines if len(line) >= _TELLING])
                looked += len(telling)
                for secret in telling:
                    if not secret or secret.lower() in rest.lower():
                        problems.append(
                            f"{'the secret' if secrets else 'the gold line'} {secret!r:.60} of document "
                            f"{doc['index']} of {made.name} stands in the prompt outside the evidence"
                        )
        _raise(problems)
        self._told_outright(natural)
        if not looked:
            why = natural or "its gold answers are short"
            return (
                f"not looked at: the recipe names no secrets, and {why}; see that the prompt does not tell the answer"
            )
        return f"{looked} {'secrets' if named else 'gold lines'} stand nowhere outside the evidence"

    def _told_outright(self, natural: str) -> None:
        """Short gold answers may stand in any prompt by chance; but not each in its own and in few of the others."""
        for made in () if natural else self.made:
            golds = [str(doc["target"]).strip().lower() for doc in made.docs]
            rests = [
                _outside(made.task.recipe.evidence(doc), prompt).lower()
                for doc, prompt in zip(made.docs, made.prompts, strict=True)
            ]
            stands = [
                [bool(re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", rest)) for gold in golds if gold] for rest in rests
            ]
            own = [row[i] for i, row in enumerate(stands)]
            others = [value for i, row in enumerate(stands) for j, value in enumerate(row) if golds[i] != golds[j]]
            if len(set(golds)) > 2 and all(own) and sum(others) < len(others) / 2:
                raise _Wrong(
                    f"the gold answer of every document of {made.name} stands in its own prompt outside the evidence, "
                    "and in few of the others: the prompt seems to tell it"
                )

    # -------------------------------------------------------------------------------------------------------- twins

    def _same_gold(self) -> str:
        problems, pairs = [], 0
        siblings = {(made.task.length, made.reader.chat): made for made in self._generated()}
        for twin in self._twins():
            sibling = siblings.get((twin.task.length, twin.reader.chat))
            for doc, other in zip(twin.docs, sibling.docs if sibling else twin.docs, strict=False):
                pairs += 1
                if doc["target"] != other["target"]:
                    problems.append(
                        f"document {doc['index']} of {twin.name} has the gold answer {doc['target']!r:.60}, "
                        f"its sibling {other['target']!r:.60}"
                    )
        _raise(problems)
        return f"{pairs} documents with the gold answer of their siblings"

    def _one_prompt(self) -> str:
        problems, most = [], 0
        for made in self._twins():
            for prompt, row in zip(made.prompts, made.instances, strict=True):
                most = max(most, len(row))
                where = f"document {row[0].doc['index']} of {made.name}"
                if any(prompt_of(instance) != prompt for instance in row):
                    problems.append(f"the requests of {where} have several prompts; expected one")
                if any(not str(instance.args[1]).strip() for instance in row):
                    problems.append(f"a request of {where} has an empty continuation")
                asked = [(str(instance.args[0]), str(instance.args[1])) for instance in row]
                if len(set(asked)) < len(asked):
                    problems.append(f"{where} asks the same twice")
        _raise(problems)
        return f"all requests of a document (up to {most}) share its prompt"

    def _gold_requests(self) -> str:
        """Which requests are gold is found out: they are those that raise the score."""
        problems = []
        for made in self._twins():
            better = made.task.higher_is_better()
            for doc, row in zip(made.docs, made.instances, strict=True):
                where = f"document {doc['index']} of {made.name}"

                def scores(raised: Sequence[int], made=made, doc=doc, row=row) -> dict[str, float]:
                    results = [_HIGH if i in raised else _LOW for i in range(len(row))]
                    return made.task.process_results(doc, results)

                def perfect(found: Mapping[str, float], better=better) -> bool:
                    return all(math.isclose(v, 1.0, abs_tol=1e-9) for k, v in found.items() if better.get(k, True))

                none = scores(())
                if bad := [name for name, value in none.items() if not math.isfinite(value)]:
                    problems.append(f"{bad[0]} of {where} is {none[bad[0]]}; expected a finite number")
                    continue
                gold = [i for i in range(len(row)) if _raised(none, scores((i,)), better)]
                if not perfect(scores(gold)) and len(row) <= 10:  # several options must be right together
                    sets = (s for n in range(1, len(row) + 1) for s in combinations(range(len(row)), n))
                    gold = list(next((s for s in sets if perfect(scores(s))), gold))
                best = scores(gold)
                if not perfect(best):
                    problems.append(
                        f"{where}: preferring its gold requests {gold[:12]} gives {_told(best)}; expected 1"
                    )
                elif perfect(none):
                    problems.append(
                        f"{where}: a model that finds nothing likely gets {_told(none)}; expected less than 1"
                    )
                if len(gold) == len(row):
                    lower = {name: value for name, value in best.items() if not better.get(name, True)}
                    problems += [f"{where}: certainty gives {name} {value:.4g}; expected 0"
                                 for name, value in lower.items() if abs(value) > 1e-9]  # fmt: skip
        _raise(problems)
        return "preferring the gold requests gives the best score"

    def _chance(self) -> str:
        """Random likelihoods, and equal ones, which must gain nothing over chance."""
        problems, shown = [], {}
        for made in self._plain(True):
            differences: dict[str, list[float]] = {}
            levels: dict[str, list[float]] = {}
            for doc, row in zip(made.docs, made.instances, strict=True):
                chance = made.task.recipe.chance(doc)
                source = random.Random(doc["index"])
                equal = made.task.process_results(doc, [(-1.0, False)] * len(row))
                for _ in range(_DRAWS):
                    found = made.task.process_results(doc, [(-20 * source.random(), False) for _ in row])
                    for name, level in chance.items():
                        if name not in found:
                            raise _Wrong(f"`chance` of {made.name} has {name}, which is no metric ({', '.join(found)})")
                        if not math.isfinite(found[name]):
                            raise _Wrong(f"{name} of {made.name} is {found[name]}; expected a finite number")
                        differences.setdefault(name, []).append(found[name] - level)
                for name, level in chance.items():
                    levels.setdefault(name, []).append(level)
                    if equal[name] > level + 1e-9:
                        problems.append(
                            f"equal likelihoods give {name} {equal[name]:.4g} on document {doc['index']} of "
                            f"{made.name}; expected at most chance, {level:.4g}"
                        )
            for name, values in differences.items():
                mean, level = sum(values) / len(values), sum(levels[name]) / len(levels[name])
                shown.setdefault(name, level)
                error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
                if abs(mean) > 4 * error + 1e-9:
                    problems.append(
                        f"random likelihoods give {name} {level + mean:.4g} on {made.name} (standard error "
                        f"{error:.2g}); expected what `chance` says, {level:.4g}"
                    )
        _raise(problems)
        return _told(shown) if shown else "`chance` names no metric"

    # ------------------------------------------------------------------------------------------------------- drafts

    def _drafts(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        for made in self._plain():
            for doc in made.docs[:3]:
                arguments = (made.task.length, made.task.seed, doc["index"], made.task.forced)
                yield (
                    f"document {doc['index']} of {made.name}",
                    lambda made=made, arguments=arguments: made.task.recipe.draft(*arguments),
                )

    def _pure(self) -> str:
        problems = []
        for where, begin in self._drafts():
            used, fresh = begin(), begin()
            few, many = min(3, used.most), min(29, used.most)
            used.message(many, "")
            used.gold(few)
            used.message(0, "A line of filler.")
            if used.message(few, "") != fresh.message(few, ""):
                problems.append(f"`message({few}, '')` of {where} depends on what was asked for before")
            elif used.gold(many) != begin().gold(many):
                problems.append(f"`gold({many})` of {where} depends on what was asked for before")
            sizes = [len(used.message(units, "")) for units in (0, few, many)]
            if sizes != sorted(sizes):
                problems.append(
                    f"`message` of {where} has {sizes} characters for 0, {few}, {many} units; expected growth"
                )
        _raise(problems)
        return "`message` and `gold` depend on their arguments alone"

    def _filler(self) -> str:
        line = "This line is filler and nothing else."
        problems = []
        for where, begin in self._drafts():
            units = min(3, begin().most)
            message = begin().message(units, line)
            if message.count(line) != 1 or len(message) < len(begin().message(units, "")) + len(line):
                problems.append(f"`message` of {where} has its filler line {message.count(line)} times, expected once")
        _raise(problems)
        return "the filler line stands once in the message"

    def _room(self) -> str:
        problems, longest = [], 0
        for made in self._twins():
            for doc in made.docs:
                room = made.task.recipe.draft(made.task.length, made.task.seed, doc["index"], True).answer
                need = max(("".join(pair) for pair in made.task.recipe.requests(doc)), key=lambda x: len(x.encode()))
                longest = max(longest, len(need.encode()))
                if len(need.encode()) > len(room.encode()):
                    problems.append(
                        f"`answer` of document {doc['index']} of {made.name} has {len(room.encode())} bytes, but "
                        f"{need!r:.60} with {len(need.encode())} is forced"
                    )
        _raise(problems)
        return f"`answer` leaves room for what is forced, up to {longest} bytes"

    def _cheap(self) -> str:
        task = self._plain()[-1].task
        times = []
        for index in range(15):
            begun = time.perf_counter()
            task.recipe.draft(task.length, task.seed, index % len(task.eval_docs), task.forced)
            times.append(time.perf_counter() - begun)
        median = sorted(times)[len(times) // 2]
        if median > _SLOWEST_DRAFT:
            raise _Wrong(
                f"a draft takes {1000 * median:.0f} ms to start, expected at most {1000 * _SLOWEST_DRAFT:.0f}: "
                "the twins start one for every document; do the work in `message`"
            )
        return f"a draft takes {1000 * median:.2g} ms to start"


# -------------------------------------------------------------------------------------------------------------- texts


def _raise(problems: Sequence[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise _Wrong("; ".join(problems[:_SHOWN]) + more)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}…"


def _some(names: Sequence[str] | Mapping[str, Any]) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


def _told(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def _outside(evidence: Sequence[str], prompt: str) -> str:
    """The prompt without the pieces of evidence; nothing is joined that they parted."""
    for piece in sorted(evidence, key=len, reverse=True):
        prompt = prompt.replace(piece, "\n\0\n") if piece else prompt
    return prompt


def _answer(target: str) -> str:
    return f"<explanation>\nThe text was read.\n</explanation>\n<answer>\n{target}\n</answer>"


def _raised(before: Mapping[str, float], after: Mapping[str, float], better: Mapping[str, bool]) -> bool:
    return any(after[name] > before[name] + 1e-12 for name in after if better.get(name, True))


def _difference(doc: Mapping[str, Any], again: Mapping[str, Any]) -> str:
    keys = [key for key in {**doc, **again} if doc.get(key) != again.get(key)]
    return f"has another {', '.join(repr(key) for key in keys[:_SHOWN])}"
