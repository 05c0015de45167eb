"""`lm-eval-sparse show`: one document of a leaf, with its evidence and gold answer, without any model.

The leaf is the one that lm-eval would build, and its prompt is rendered and counted by the tokenizer that is named.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import paths
from ..errors import PROGRAM, UserError, nearest
from ..model.embedded import NAME, ensure, is_embedded
from ..output import columns
from ..results.files import brief
from . import apart, document
from .document import Document, Piece
from .leaves import is_built_in
from .metadata import TOKENIZER_OPTIONS, check_keys, limit, loader_options, read_metadata, read_number
from .meter import CannotLoad, load_tokenizer
from .yamls import leaf_files

if TYPE_CHECKING:  # they take seconds, and a process that has them cannot be split
    from lm_eval.tasks import TaskManager

    from .task import FrontierTask

#: Lines at both ends of a prompt that stay where it is not known what its context is.
_UNKNOWN = 12


def run(
    leaf: str,
    index: str,
    *,
    tokenizer: str | None = None,
    metadata: str | None = None,
    include_path: str | None = None,
    chat: bool = False,
    full: bool = False,
    markdown: bool = False,
) -> int:
    """Print one document of a leaf as a model would get it; values as they are typed. Returns the exit status.

    Raises:
        UserError: a value that cannot be, no such leaf, or one that cannot be shown.
    """
    number = read_number("--index", index, 0)
    given = read_metadata(metadata)
    folders = paths.task_folders()
    if include_path is not None:
        folders.append(str(paths.folder(f"--include_path {include_path}", include_path)))
    check_leaf_name(leaf, folders)  # before anything is loaded
    if is_built_in(leaf):  # recipes from elsewhere may read more
        check_keys(given)
    width = columns()
    colour = sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def work(progress: apart.Progress) -> int:
        reader = Reader.of(tokenizer, given, chat)
        try:
            with quiet():
                task = load_leaves(manager(folders, given), [leaf])[leaf]
            found = read(task, number, reader)
            if markdown:
                text = document.markdown(found, width, full=full)
            else:
                text = document.terminal(found, width, colour=colour, full=full)
        except UserError:
            raise
        except BaseException as error:  # code of the task's author
            if apart.was_interrupted():
                raise
            raise UserError(f"{leaf} cannot be shown: {told(error, Path(folders[-1]).resolve())}") from error
        progress.say(text)
        return 0

    try:
        return apart.run(work)
    except apart.Ended as error:
        raise UserError(f"{leaf} cannot be shown: {error}") from None


# -------------------------------------------------------------------------------------------------------- the tokenizer


class Reader:
    """A tokenizer in the place of a model: what a task sees of one when it renders and counts prompts.

    A task asks the owner of the chat-template function first, so that neither a model of this process nor a name in
    the metadata can come between.
    """

    def __init__(self, tokenizer: Any, name: str, chat: bool, max_length: int | None = None):
        self.tokenizer, self.name, self.chat, self.max_length = tokenizer, name, chat, max_length

    @classmethod
    def of(cls, named: str | None, metadata: Mapping[str, Any], chat: bool) -> Reader:
        """The tokenizer `named`, else the one that `metadata` names, else the embedded model's. Raises `UserError`."""
        option = "--tokenizer " if named is not None else ""
        name = named if named is not None else metadata.get("tokenizer") or metadata.get("pretrained") or NAME
        if not isinstance(name, str):
            raise UserError(f"tokenizer {brief(name)} given, but it must be a name or a path")
        paths.expand(f"{option}{brief(name)}", name)
        where = str(ensure()) if is_embedded(name) else name
        options = loader_options("", metadata, ["trust_remote_code"] if option else TOKENIZER_OPTIONS)
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # The embedded model's is of a known class; to find that out takes longer than everything else here.
        loader = PreTrainedTokenizerFast if is_embedded(name) else AutoTokenizer
        try:
            with quiet():
                tokenizer = load_tokenizer(loader, where, options)
        except CannotLoad as error:  # whatever the loader raises, the user needs the same advice
            raise UserError(
                f"cannot load the tokenizer {brief(name)!r} ({error}); give a name on the Hub, or a folder with "
                f"tokenizer.json, with --tokenizer, or leave it out for the embedded model's"
            ) from None
        if chat and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"--apply_chat_template given, but the tokenizer {name!r} has no chat template; leave the option out "
                "or give another --tokenizer"
            )
        tokenizer.model_max_length = 10**30  # no warnings that a prompt is longer than some model takes
        return cls(tokenizer, name, chat, limit("", metadata))

    @property
    def has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def with_chat(self, chat: bool) -> Reader:
        return Reader(self.tokenizer, self.name, chat, self.max_length)

    def apply_chat_template(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, text: str, **_: Any) -> list[int]:
        return self.tokenizer.encode(text, **self._special(text))

    def positions(self, text: str) -> Callable[[int], int]:
        """A function from a character of `text` to the number of tokens before the one that holds it."""
        if getattr(self.tokenizer, "is_fast", False):
            offsets = self.tokenizer(text, return_offsets_mapping=True, **self._special(text))["offset_mapping"]
            ends = list(accumulate((end for _, end in offsets), max))  # special tokens have no characters: (0, 0)
            return lambda character: bisect_right(ends, character)
        return lambda character: len(self.tok_encode(text[:character]))

    def _special(self, text: str) -> dict[str, bool]:
        bos = getattr(self.tokenizer, "bos_token", None)  # a template may have written it already; as HFLM does
        return {"add_special_tokens": False} if isinstance(bos, str) and text.startswith(bos) else {}


# ------------------------------------------------------------------------------------------------------------ the leaf


class _Nowhere(io.TextIOBase):
    """A stream that keeps nothing, however much is written."""

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and warnings back: what they would say is said elsewhere."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm_eval_sparse", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(_Nowhere()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def check_leaf_name(name: str, folders: list[str]) -> None:
    """Raises `UserError` with the nearest names unless one of `folders` has a leaf called `name`."""
    known: dict[str, Any] = {}
    for folder in folders:
        known |= leaf_files(folder)
    leaves = [leaf for leaf, (_, content) in known.items() if "group" not in content]
    if name not in leaves:
        what = "a group of leaves" if name in known else "no task"
        close = nearest(name, leaves)
        advice = close or f"; leaves are called frontier_<task>_<length>, see `{PROGRAM} ls tasks`"
        raise UserError(f"{name!r} given, which is {what} here; show takes one leaf{advice}")


def manager(folders: list[str], metadata: Mapping[str, Any]) -> TaskManager:
    """What finds tasks in `folders` as lm-eval does, and in none of its own, which would take seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=False, metadata=dict(metadata))


def load_leaves(tasks: TaskManager, names: list[str]) -> dict[str, FrontierTask]:
    """The leaves `names` as lm-eval builds them. Raises `UserError` for a task that is none of ours."""
    from .task import FrontierTask

    found = {}
    for name in names:
        found[name] = tasks.load([name])["tasks"][name]
        if not isinstance(found[name], FrontierTask):
            raise UserError(
                f"{name} is of the class {type(found[name]).__name__}, which has no documents with evidence; its YAML "
                "needs class: !function lm_eval_sparse.frontier.task.FrontierTask (or ForcedFrontierTask)"
            )
    return found


def make(task: FrontierTask, reader: Reader, samples: list[int] | None = None) -> None:
    """Let `task` make its requests, of the documents `samples` only if given, for the tokenizer of `reader`."""
    task.build_all_requests(samples=samples, apply_chat_template=reader.chat, chat_template=reader.apply_chat_template)


def prompt_of(instance: Any) -> str:
    """The rendered prompt of a request, without what a twin forces after it."""
    context = str(instance.args[0])
    return context[: getattr(instance.args[0], "shared", len(context))]


def told(error: BaseException, folder: Path) -> str:
    """An exception in one line: its message, and the line of the task author's code in `folder` that it came from."""
    try:
        message = " ".join(str(error).split())[:300]
    except Exception:  # an exception of the author's own making
        message = "without a message that can be read"
    if isinstance(error, UserError):
        return message
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    place = ""
    for one in chain:
        frames = traceback.extract_tb(one.__traceback__)
        own = [frame for frame in frames if folder in Path(frame.filename).parents]
        package = [frame for frame in frames if Path(__file__).parent in Path(frame.filename).parents]
        if own or (package and not place):
            frame = (own or package)[-1]
            place = f" at {frame.filename}:{frame.lineno}"
        if isinstance(one, SyntaxError) and one.filename:
            place = f" at {one.filename}:{one.lineno}"
        if own or isinstance(one, SyntaxError):
            break
    return f"{type(error).__name__}: {message}{place}"


# --------------------------------------------------------------------------------------------------------- the document


def read(task: FrontierTask, index: int, reader: Reader) -> Document:
    """Document `index` of `task`. Raises `UserError` when there is none or the leaf is skipped."""
    name = task.config.task
    if index < task.samples:  # or nothing is written
        try:
            with quiet():
                make(task, reader, [index])
        except UserError:
            if index < len(task.eval_docs):
                raise
    if skipped := task.config.metadata.get("skipped"):
        raise UserError(f"{name} is skipped: {skipped}")
    if index >= len(task.eval_docs):
        most = len(task.eval_docs) - 1
        more = """; more with --metadata '{"samples": 500}'""" if most + 1 == task.samples else ""
        raise UserError(f"--index {index} given, but {name} has documents 0 to {most}{more}")
    doc, prompt = task.instances[0].doc, prompt_of(task.instances[0])
    position, tokens = reader.positions(prompt), len(reader.tok_encode(prompt))
    facts = {
        "task": f"{name}, {'teacher-forced twin' if task.forced else 'answered by generation'}",
        "document": f"{index} of 0 to {len(task.eval_docs) - 1}, seed {task.seed}",
        "length": f"{tokens} tokens of {task.config.metadata.get('prompt_tokens', task.length)}",
        "tokenizer": f"{reader.name}, {'with its' if reader.chat else 'no'} chat template",
    }
    if not task.question_first:
        facts["question"] = "behind the context only (question_first: false)"
    if task.forced:
        chance = task.recipe.chance(doc)
        facts["chance"] = ", ".join(f"{metric} {value:.4g}" for metric, value in chance.items()) or "not known"
    pieces = []
    for text in task.recipe.evidence(doc):
        at = prompt.find(text)
        if at < 0:
            pieces.append(Piece(text, None))
        else:
            pieces.append(Piece(text, (at, at + len(text)), position(at), position(at) / max(tokens, 1)))
    requests = [(str(one.args[0])[len(prompt_of(one)) :], str(one.args[1])) for one in task.instances]
    return Document(
        facts=facts,
        gold=str(doc["target"]),
        pieces=pieces,
        prompt=prompt,
        context=context_of(doc, prompt),
        tokens=position,
        requests=requests if task.forced else (),
    )


def context_of(doc: Mapping[str, Any], prompt: str) -> tuple[int, int]:
    """Where the context stands in the rendered prompt, in characters.

    Where the document does not say, or its template has changed the text, all but the first and the last lines.
    """
    at = prompt.find(doc["input"])
    if "context" in doc and at >= 0:
        start, end = doc["context"]
        return at + start, at + end
    ends = [match.start() for match in re.finditer("\n", prompt)]
    if len(ends) <= 2 * _UNKNOWN:
        return len(prompt), len(prompt)
    return ends[_UNKNOWN - 1] + 1, ends[-_UNKNOWN]
