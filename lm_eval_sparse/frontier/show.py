"""`lm-eval-sparse show`: one document of a leaf, with its evidence and gold answer, without any model.

The leaf is the one that lm-eval would build, and its prompt is rendered and counted by the tokenizer that is named.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import paths
from ..cli import PROGRAM, Parser
from ..embedded import NAME, ensure, is_embedded
from ..errors import UserError, nearest, plain
from ..files import brief
from ..patches.register_tasks import task_folders
from . import apart
from .leaves import is_built_in
from .metadata import TOKENIZER_OPTIONS, add_options, check_keys, limit, loader_options, read_metadata, read_number
from .meter import CannotLoad, load_tokenizer
from .yamls import leaf_files

if TYPE_CHECKING:  # they take seconds, and a process that has them cannot be split
    from lm_eval.tasks import TaskManager

    from .task import FrontierTask

_LONG = 300
_MANY = 12
_MARK, _PLAIN = "\x1b[1;33m", "\x1b[0m"


def main(argv: list[str]) -> int:
    """`lm-eval-sparse show TASK --index I [...]`: the exit status."""
    parser = Parser(prog=f"{PROGRAM} show", description="Print one document of a leaf as a model would get it.")
    parser.add_argument(
        "task", metavar="TASK", help="name of a leaf, such as frontier_niah_4k or forced_frontier_vt_8k"
    )
    parser.add_argument("--index", metavar="I", required=True, help="number of the document, from 0")
    add_options(parser)
    parser.add_argument("--apply_chat_template", action="store_true", help="render the tokenizer's chat template")
    parser.add_argument("--include_path", metavar="DIR", help="folder with more tasks, as in lm_eval")
    options = parser.parse_args(argv)
    index = read_number("--index", options.index, 0)
    metadata = read_metadata(options.metadata)
    folders = task_folders()
    if options.include_path is not None:
        folders.append(str(paths.folder(f"--include_path {options.include_path}", options.include_path)))
    check_leaf_name(options.task, folders)  # before anything is loaded
    if is_built_in(options.task):  # recipes from elsewhere may read more
        check_keys(metadata)
    colour = sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def work(progress: apart.Progress) -> int:
        reader = Reader.of(options.tokenizer, metadata, options.apply_chat_template)
        try:
            with quiet():
                task = load_leaves(manager(folders, metadata), [options.task])[options.task]
            text = describe(task, index, reader, colour)
        except UserError:
            raise
        except BaseException as error:  # code of the task's author
            if apart.was_interrupted():
                raise
            raise UserError(f"{options.task} cannot be shown: {told(error, Path(folders[-1]).resolve())}") from error
        progress.say(text)
        return 0

    try:
        return apart.run(work)
    except apart.Ended as error:
        raise UserError(f"{options.task} cannot be shown: {error}") from None


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


def describe(task: FrontierTask, index: int, reader: Reader, colour: bool) -> str:
    """Document `index` of `task`, in full. Raises `UserError` when there is none or the leaf is skipped."""
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
    metadata = task.config.metadata
    kind = "teacher-forced twin" if task.forced else "answered by generation"
    lines = [
        f"task       {name}, {kind}",
        f"document   {index} of 0 to {len(task.eval_docs) - 1}, seed {task.seed}",
        f"length     {tokens} tokens of {metadata.get('prompt_tokens', task.length)}",
        f"tokenizer  {reader.name}, {'with its' if reader.chat else 'no'} chat template",
    ]
    if task.forced:
        chance = task.recipe.chance(doc)
        given = ", ".join(f"{metric} {value:.4g}" for metric, value in chance.items()) or "not known"
        lines.append(f"chance     {given}")
    lines += ["", "gold answer", *(f"  {line}" for line in str(doc["target"]).splitlines())]
    pieces = task.recipe.evidence(doc)
    lines += ["", f"evidence: {len(pieces)} (first token, depth in the prompt)"]
    spans = []
    for piece in pieces:
        at = prompt.find(piece)
        if at < 0:
            where = f"{'?':>7}      ?"
        else:
            spans.append((at, at + len(piece)))
            where = f"{position(at):>7}  {100 * position(at) / max(tokens, 1):4.1f}%"
        lines.append(f"{where}  {abridged(piece)}")
    if task.forced:
        lines += ["", f"requests: {len(task.instances)} (forced text | continuation)", *_requests(task.instances)]
    # Texts may be anyone's, and a terminal would obey their control characters. The marks are ours.
    shown = _marked(prompt, spans) if colour else plain(prompt)
    return "\n".join([*map(plain, lines), "", f"prompt {'-' * 112}", shown])


def abridged(text: str, longest: int = _LONG) -> str:
    """`text` on one line, its middle left out when it is long."""
    line = text.replace("\n", " ⏎ ")
    half = (longest - 20) // 2
    return line if len(line) <= longest else f"{line[:half]} […] {line[-half:]}"


def _requests(instances: list[Any]) -> list[str]:
    rows = []
    for number, instance in enumerate(instances):
        forced, continuation = str(instance.args[0])[len(prompt_of(instance)) :], str(instance.args[1])
        tail = forced if len(forced) <= 80 else f"…{forced[-80:]}"
        rows.append(f"{number:>7}  {tail!r} | {abridged(continuation, 120)!r}")
    if len(rows) > _MANY:
        rows[_MANY - 2 : -1] = [f"         … {len(rows) - _MANY + 1} more …"]
    return rows


def _marked(prompt: str, spans: list[tuple[int, int]]) -> str:
    parts, last = [], 0
    for start, end in sorted(spans):
        start = max(start, last)  # pieces may overlap
        if end > start:
            parts += [plain(prompt[last:start]), _MARK, plain(prompt[start:end]), _PLAIN]
            last = end
    return "".join([*parts, plain(prompt[last:])])
