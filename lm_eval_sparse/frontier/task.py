"""The classes behind tasks/*.yaml: what lm-eval calls, and where a document's prompt gets its exact length.

Prompts are made in `build_all_requests`, the first moment at which chat template, system instruction, limit and
rank are known. Facts about lm-eval that shaped this: it asks for document 0 while a task is constructed, builds
documents for every rank on every rank, and raises when a rank has none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from tqdm import tqdm

from ..errors import UserError
from ..protocol import SKIPPED, Prompt, SharedPrompt, mean_sparsities, stats_of
from ..values import whole
from . import recipe
from .asked_once import AskedOnce
from .documents import Documents
from .fill import DoesNotFit, Filler, fit, fit_both
from .leaves import BUILT_IN
from .metadata import question_first, samples, seed, strict
from .meter import Meter, meter_for
from .recipe import Draft, Message, Unavailable, mean_levels
from .sources import sources
from .store import DocumentStore, forget_older

__all__ = ["ForcedFrontierTask", "FrontierTask"]

logger = logging.getLogger(__name__)

#: A prompt may shrink to this share of its length where the model has no room for the answer. Below, it is skipped.
SHORTEST = 0.9
#: Share of its budget that every prompt reaches (paper §4: samples have 95–100% of the target length).
FILLED = 0.95

#: Tokens that a prompt or an answer may have.
_LONGEST = 10**9
#: Documents whose answers settle how much room is kept for answers.
_SETTLING = 100
#: Those whose gold answers do: in some tasks one takes as long as the document.
_GOLD = 25

#: Tokens kept free for the explanation before an answer: two or three sentences that may name what they are about.
EXPLAINED = 160
_REPLY = "<explanation>\n\n</explanation>\n<answer>\n{answer}\n</answer>"
#: Units at which a gold answer is as long as it gets.
_ANSWERED = 64
#: Names of the most tokens of an answer in generation arguments; lm-eval takes the first that is given.
_CAPS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
#: What a leaf's metadata says of one run.
_SETTLED = ("skipped", "prompt_tokens", "answer_tokens", "chance")

#: Versions of this package's documents, by what they are called in the cache.
_VERSIONS = {f"{twin}{folder.name}": folder.version for folder in BUILT_IN for twin in ("", "forced_")}

_SENTINEL = "{the prompt}"
_STUB = "This leaf is skipped."


class FrontierTask(ConfigurableTask):
    """One (task, length) leaf, answered by generation.

    `dataset_kwargs` names the recipe (`task`, a name in `RECIPES`, or `recipe`, a class) and the prompt's `length` in
    tokens; `metadata` holds `samples` (documents) and `seed`, which a user may override, and what the user adds:
    `strict` makes a leaf that cannot run an error, `question_first` false leaves out the question before the context,
    and a recipe may read more (see `qa_data`). Other metadata, such as model arguments, is ignored except for finding
    the tokenizer (see `meter`).
    """

    forced = False

    def __init__(self, config: Mapping[str, Any] | None = None, **kwargs: Any):
        config = dict(config or {})
        config.pop("class", None)
        if config.get("num_fewshot"):
            raise UserError(f"{config.get('task')}: num_fewshot={config['num_fewshot']} given, but only 0 is possible")
        config["num_fewshot"] = 0
        # Any value keeps lm-eval from looking the metric names up in (remote) libraries; see process_results below.
        config["process_results"] = "process_results"
        self._skipped: str | None = None
        self._told: str | None = None
        #: The most tokens of an answer in this run, by the name that lm-eval knows it under.
        self._room: dict[str, int] = {}
        super().__init__(config=config, **kwargs)

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Set up the recipe, find its data if it needs any, and a sequence of documents yet to be made."""
        given, metadata = dict(dataset_kwargs or {}), dict(self.config.metadata or {})
        self.recipe = given["recipe"]() if given.get("recipe") else recipe(str(given.get("task")))
        where = f"{self.config.task}: "
        self.length = whole(where, "length", given.get("length"), 1, _LONGEST)
        self.samples, self.seed = samples(where, metadata), seed(where, metadata)
        self.strict = strict(where, metadata)
        self.paper_window = whole(where, "paper_window", self.recipe.paper_window, 1, _LONGEST)
        self.question_first = question_first(where, metadata)
        self.VERSION = self.recipe.version
        # What the leaf is wins over whatever model arguments of the same name lm-eval has merged in.
        metadata.update(version=self.VERSION, length=self.length, samples=self.samples, seed=self.seed)
        if not self.question_first:
            metadata.update(question_first=False)
        self.config.metadata = metadata
        self._unavailable: str | None = None
        try:
            self.recipe.find(metadata)
        except Unavailable as error:
            self._unavailable = str(error)
            self._skip(self._unavailable)
        if origin := self.recipe.origin():
            self.config.metadata = {**self.config.metadata, "data": origin}
        self.dataset = {self.config.test_split: Documents(self.samples)}

    def _skip(self, reason: str) -> None:
        """Let this leaf drop out. Raises `UserError` under `strict`."""
        if self.strict:
            raise UserError(f"{self.config.task} cannot run and strict is set: {reason}")
        if reason != self._told:
            logger.warning("%s is skipped: %s", self.config.task, reason)
        self._skipped = self._told = reason
        self.config.metadata = {**self.config.metadata, "skipped": reason}

    def fewshot_docs(self) -> None:
        return None  # otherwise lm-eval lists all documents to sample examples from

    def doc_to_text(self, doc: Mapping[str, Any], doc_to_text: Any = None) -> str:
        return doc["input"]

    def doc_to_target(self, doc: Mapping[str, Any], doc_to_target: Any = None) -> str:
        """The gold answer as a model should write it; a generated one gets the full score."""
        return doc["target"] if self.forced else f"<answer>\n{doc['target']}\n</answer>"

    # ------------------------------------------------------------------------------------------------ documents

    def build_all_requests(
        self,
        *,
        samples: list[int] | None = None,
        cache_requests: bool = False,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        chat_template: Callable[..., Any] | None = None,
        tokenizer_name: str = "",
        **kwargs: Any,
    ) -> None:
        """Decide the prompts' length, then let lm-eval build the requests of this rank's documents.

        The metadata then say what no knowledge gets in each metric (`chance`), on average over these documents.

        Raises `UserError` when no tokenizer is known or a prompt cannot be filled.
        """

        def render(message: str) -> Any:
            return self.fewshot_context(
                {"input": message, "target": ""},
                num_fewshot=0,
                system_instruction=system_instruction,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=fewshot_as_multiturn,
                chat_template=chat_template,
                gen_prefix=None,
            )

        fingerprint = self._prepare(meter_for(self.config.metadata, chat_template), render)
        # lm-eval's own key for cached requests has neither lengths nor generation arguments nor samples.
        decides = [fingerprint, self.config.generation_kwargs, self._room, samples, self.paper_window]
        key = json.dumps(decides, sort_keys=True, default=str)
        super().build_all_requests(
            samples=samples,
            cache_requests=cache_requests,
            system_instruction=system_instruction,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=fewshot_as_multiturn,
            chat_template=chat_template,
            tokenizer_name=hashlib.sha256(key.encode()).hexdigest()[:24],
            **kwargs,
        )
        docs = {instance.doc_id: instance.doc for instance in self.instances if SKIPPED not in instance.doc}
        if levels := mean_levels(map(self.recipe.chance if self.forced else self.recipe.guessed, docs.values())):
            self.config.metadata = {**self.config.metadata, "chance": levels}

    def _prepare(self, meter: Meter, render: Callable[[str], Any]) -> str:
        """Set this leaf's budget and bind its documents, or set the reason to skip it. Returns what they depend on."""

        def count(message: str) -> int:
            return meter.count(_plain(render(message)))

        def draft(index: int, forced: bool = self.forced) -> Draft:
            return self._draft(index, forced)

        self.config.metadata = {k: v for k, v in self.config.metadata.items() if k not in _SETTLED}
        self._room = {}
        if self._unavailable:
            self._skip(self._unavailable)
            return self._unavailable
        self._skipped = None
        frame = _plain(render(_SENTINEL))
        template = hashlib.sha256(json.dumps([frame, meter.identity]).encode()).hexdigest()
        try:
            number = self.recipe.bind(self.length, self.seed, count, template)
            if number == 0:
                raise Unavailable(f"none of its documents fits into {self.length} tokens")
        except Unavailable as error:
            self._skip(str(error))
            return str(error)
        # The budget is settled by the same documents however many are asked for: it must not depend on that.
        settling = (draft(index) for index in range(min(_SETTLING, number or _SETTLING)))
        reserve = self._reserve(meter, settling)
        number = self.samples if number is None else min(self.samples, number)
        if number < self.samples:
            logger.warning("%s: there are %d documents, not %d", self.config.task, number, self.samples)

        budget = self.length if meter.limit is None else min(self.length, meter.limit - reserve)
        empty = draft(0).message(0, "")
        shortest = math.ceil(SHORTEST * self.length)
        reason = None
        if budget < shortest:
            reason = (
                f"needs {shortest} to {self.length} prompt tokens and {reserve} for the answer, "
                f"the model takes {meter.limit} together"
            )
        elif (bare := self._barest(count, number, budget)) > budget:
            reason = f"even the shortest prompt, system instruction included, has {bare} of {budget} tokens"
        if reason:
            self._skip(reason)
            return reason
        if budget < self.length:
            logger.warning(
                "%s: prompts have %d instead of %d tokens, because the model takes %d and the answer needs %d",
                *(self.config.task, budget, self.length, meter.limit, reserve),
            )
        self.config.metadata = {**self.config.metadata, "prompt_tokens": budget, **self._settle(meter.limit, budget)}

        identity = [self.recipe.name, self.recipe.version, self.forced, self.length, budget, self.seed]
        identity += [self.question_first]
        # A changed wording, or anything else that is changed here, must not meet documents written before it.
        identity += [frame, meter.count(frame), meter.identity, empty, sources(type(self.recipe))]
        identity += self.recipe.identity()
        fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        leaf = f"{'forced_' if self.forced else ''}{self.recipe.name}"
        store = DocumentStore(f"{leaf}-v{self.recipe.version}-{self.length}", fingerprint)
        forget_older({**_VERSIONS, leaf: self.recipe.version})
        filler = Filler(count)

        def make(index: int) -> dict[str, Any]:
            begun = draft(index)
            # Documents beyond those that the leaf's budget was settled by may have a longer answer.
            own = budget if meter.limit is None else min(budget, meter.limit - self._reserve(meter, [begun]))
            try:
                if self.recipe.twin_keeps_units:
                    fitted = fit_both(begun, draft(index, not self.forced), own, count, filler, meter.parts)
                else:
                    fitted = fit(begun, own, count, filler, meter.parts)
            except DoesNotFit as error:
                raise UserError(f"{self.config.task}: document {index} has {error}, the budget is {budget}") from error
            if fitted.tokens < FILLED * budget:
                raise UserError(
                    f"{self.config.task}: document {index} reaches only {fitted.tokens} of {budget} prompt tokens"
                )
            message = begun.message(fitted.units, fitted.filler)
            doc = {
                "task": self.recipe.name,
                "length": self.length,
                "seed": self.seed,
                "index": index,
                "tokens": fitted.tokens,
                "input": str(message),
                **({"context": list(message.context)} if isinstance(message, Message) else {}),
                **begun.gold(fitted.units),
            }
            store.add(doc)
            return doc

        self.eval_docs.bind(number, store.load(), make)
        return fingerprint

    def _barest(self, count: Callable[[str], int], number: int, budget: int) -> int:
        """Tokens of the longest document's shortest prompt. Of the first document's where that leaves room to spare."""

        def size(index: int) -> int:
            # Units have to fit under the longer instructions where the twin has the same.
            formats = {self.forced, not self.forced} if self.recipe.twin_keeps_units else {self.forced}
            drafts = [self._draft(index, forced) for forced in formats]
            return max(count(draft.message(self.recipe.least_units, "")) for draft in drafts)

        first = size(0)
        return first if first < 0.85 * budget else max(map(size, range(number)))

    def _draft(self, index: int, forced: bool) -> Draft:
        begun = self.recipe.draft(self.length, self.seed, index, forced)
        return begun if self.question_first else AskedOnce(begun, f"{self.config.task}: ", self.recipe.name)

    def _cap(self) -> tuple[str, int]:
        """The most tokens that an answer may have, and what that is called (the aliases are lm-eval's)."""
        given = self.config.generation_kwargs or {}
        for key in _CAPS:
            if given.get(key) is not None:
                return key, whole(f"{self.config.task}: ", key, given[key], 1, _LONGEST)
        return _CAPS[0], 256  # lm-eval's default

    def _reserve(self, meter: Meter, drafts: Iterable[Draft]) -> int:
        """Tokens kept free after the prompt: what the longest gold answer and a fair explanation take, unless less may
        be generated. An answer may be longer where the model has the room."""
        _, cap = self._cap()
        if meter.limit is None or meter.limit - self.length >= cap:
            return cap  # there is room for all that may be generated, and nobody needs the exact number
        answers = [draft.gold(min(_ANSWERED, draft.most))["target"] for draft in islice(drafts, _GOLD)]
        longest = max(meter.count(_REPLY.format(answer=answer)) for answer in answers)
        return min(cap, longest + EXPLAINED)

    def _settle(self, limit: int | None, budget: int) -> dict[str, Any]:
        """Let no answer have more tokens than the model takes behind the prompt. Returns what the results say of it."""
        key, cap = self._cap()
        room = cap if limit is None else min(cap, limit - budget)
        self._room = {key: room}
        if room < cap:
            logger.warning(
                "%s: answers may have %d instead of %d tokens, which is what the model takes behind the prompt",
                *(self.config.task, room, cap),
            )
        return {"answer_tokens": room}

    def doc_iterator(
        self,
        *,
        rank: int = 0,
        limit: int | None = None,
        world_size: int = 1,
        samples: list[int] | None = None,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(position, document) for this rank. Only these documents are made, unlike in lm-eval's own iterator."""
        docs = self.eval_docs
        wanted = list(samples) if samples else range(min(len(docs), int(limit) if limit else len(docs)))
        if bad := [i for i in wanted if not 0 <= i < len(docs)]:
            raise UserError(f"{self.config.task}: no document {bad[0]}; --samples takes 0 to {len(docs) - 1}")
        if self._skipped:
            # One per rank, because lm-eval raises for a rank without documents.
            yield rank % len(wanted), {SKIPPED: self._skipped, "index": rank, "input": _STUB, "target": ""}
            return
        mine = range(rank, len(wanted), world_size)
        quiet = rank > 0 or all(docs.has(wanted[i]) for i in mine)
        for i in tqdm(mine, desc=f"Writing {self.config.task}", unit="doc", delay=2, leave=False, disable=quiet):
            yield i, docs[wanted[i]]

    # ----------------------------------------------------------------------------------------- requests, results

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **kwargs: Any) -> list[Instance]:
        """This document's requests; for a stub, the smallest one there is."""
        kwargs.pop("apply_chat_template", None)
        kwargs.pop("chat_template", None)
        stub = SKIPPED in doc
        return [
            Instance(request_type=self.OUTPUT_TYPE, doc=doc, arguments=arguments, idx=i, **kwargs)
            for i, arguments in enumerate(self._stub_arguments() if stub else self._arguments(doc, ctx))
        ]

    def _arguments(self, doc: dict[str, Any], ctx: Any) -> list[tuple[Any, Any]]:
        # Chat APIs get their messages as another type.
        prompt = Prompt(ctx, self.paper_window) if isinstance(ctx, str) else ctx
        return [(prompt, {**deepcopy(self.config.generation_kwargs or {}), **self._room})]

    def _stub_arguments(self) -> list[tuple[Any, Any]]:
        return [(_STUB, {"until": [], "max_gen_toks": 1, "do_sample": False})]

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        """Metrics of one document; none for a stub, so that its row vanishes.

        Sparsities are among them only when the model type measured them (`protocol.mean_sparsities`).
        """
        if SKIPPED in doc:
            return {}
        if "bypass" in self._metric_fn_list:  # --predict_only
            return {"bypass": None}
        scores: dict[str, Any] = self._score(doc, results)
        return {**scores, **mean_sparsities(stats_of(result) or {} for result in results)}

    def _score(self, doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
        return self.recipe.score(doc, str(results[0]))


class ForcedFrontierTask(FrontierTask):
    """The teacher-forced twin: the same documents under an answer-only instruction, scored by likelihood.

    All of a document's requests share the rendered prompt, marked by `protocol.SharedPrompt`; what is forced after
    it is where a generating model's own text would stand.
    """

    forced = True

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None, **options: Any) -> None:
        """As for generated leaves. A twin that is insensitive in a phase says so in its metadata."""
        super().download(dataset_kwargs, **options)
        if self.recipe.insensitive:
            self.config.metadata = {**self.config.metadata, "insensitive": list(self.recipe.insensitive)}

    def _reserve(self, meter: Meter, drafts: Iterable[Draft]) -> int:
        """Tokens kept free after the prompt: the longest forced answer of any document of the leaf."""
        answers = [draft.answer for draft in drafts]
        longest = max(len(answer.encode()) for answer in answers)
        if meter.limit is None or meter.limit - self.length >= longest:
            return longest  # no tokenizer makes more tokens than bytes, and nobody needs the exact number
        most = max(meter.count(_SENTINEL + answer) for answer in answers) - meter.count(_SENTINEL)
        return most + 4  # the seam between prompt and answer may cost a token more than in this short test

    def _settle(self, limit: int | None, budget: int) -> dict[str, Any]:
        return {}

    def _arguments(self, doc: dict[str, Any], ctx: Any) -> list[tuple[Any, Any]]:
        if not isinstance(ctx, str):
            raise UserError(f"{self.config.task} needs log-likelihoods, which this model type does not give for chats")
        return [
            (SharedPrompt(ctx + forced, len(ctx), self.paper_window), continuation)
            for forced, continuation in self.recipe.requests(doc)
        ]

    def _stub_arguments(self) -> list[tuple[Any, Any]]:
        return [(_STUB, " No.")]

    def _score(self, doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
        return self.recipe.forced_score(doc, [(float(logprob), bool(greedy)) for logprob, greedy in results])


def _plain(prompt: Any) -> str:
    """A rendered prompt as text. Chat APIs get their messages as JSON; the server applies a template we cannot see."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message["content"]) for message in json.loads(prompt.prompt))
