"""Scored requests: a prompt is prefilled once, and what continues it runs in the decode phase.

In scoring as in generation, the context is the prefill phase and what follows is the decode phase. Requests that
share a context prefill it once. A rolling log-likelihood has no context: its windows are prefill throughout.

Long, since what requests are grouped by decides how each group is read, scored and kept.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from ..errors import UserError
from ..protocol import MeasuredFloat, MeasuredLoglikelihood, SharedPrompt, window_of
from ..runtime.accounting import RowCounts, settle
from ..runtime.cache import SparseCache
from ..runtime.candidates import SCORE_CHUNK
from ..runtime.diagnose import Diagnosis
from .answers import Answers, Asked, tokens_of
from .beginnings import Beginnings
from .encoding import SharedEncoder
from .progress import documents_of
from .side_by_side import SideBySide

if TYPE_CHECKING:
    from .lm import SparseHFLM

logger = logging.getLogger(__name__)


#: Contexts of as many characters are read once, whatever their task is.
LONG = 2048


@dataclass
class Target:
    """One scored request: the tokens after the shared prompt, of which the last `scored` count.

    `key` and `name` are what the response cache and the log of samples know it by.
    """

    index: int
    tokens: list[int]
    scored: int
    key: tuple[str, str] | None
    name: str | None = None


@dataclass
class Context:
    """A prompt and all requests that continue it."""

    prompt: list[int]
    targets: list[Target] = field(default_factory=list)
    task: str | None = None
    window: int | None = None
    counts: RowCounts = field(default_factory=RowCounts)

    def lengths(self) -> tuple[int, int]:
        """Tokens of the prompt, and of prompt and longest answer that a model reads."""
        return len(self.prompt), len(self.prompt) + max(len(target.tokens) for target in self.targets) - 1

    def work(self, there: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """Of each request its index, and the tokens that it reads: of the prompt, once, and of its answer.

        Args:
            there: tokens of the prompt that the context before this one has read.
        """
        for place, target in enumerate(self.targets):
            yield target.index, (0 if place else len(self.prompt) - there, len(target.tokens) - 1)

    def sequences(self) -> list[list[int]]:
        """The token sequences to run, longest first: a sequence that another one begins with needs no run."""
        chosen: list[list[int]] = []
        for tokens in sorted((target.tokens for target in self.targets), key=len, reverse=True):
            if not any(other[: len(tokens)] == tokens for other in chosen):
                chosen.append(tokens)
        return chosen

    def answers(self, scored: dict[tuple, Tensor], hits: dict[tuple, Tensor]) -> list[tuple[float, bool]]:
        """`(logprob, is_greedy)` of each target, from the per-token results of the sequences that were run."""
        found = []
        for target in self.targets:
            whole = next(tokens for tokens in scored if list(tokens[: len(target.tokens)]) == target.tokens)
            span = slice(len(target.tokens) - target.scored, len(target.tokens))
            found.append((float(scored[whole][span].sum()), bool(hits[whole][span].all())))
        return found


@dataclass
class Prefilled:
    """A prompt that has been read, for the next context that has the same one: documents may share a context.

    Attributes:
        counts: what reading it was counted as.
        first: `(1, V)` log-probabilities of the token behind it.
        snapshot: of the cache, where answers run one after the other.
    """

    prompt: list[int]
    window: int | None
    cache: SparseCache
    counts: RowCounts
    first: Tensor
    snapshot: list[Any] | None


class Scorer:
    """Answers the scored requests of a model."""

    def __init__(self, lm: SparseHFLM):
        self.lm = lm
        self.side_by_side, self.beginnings = SideBySide(lm), Beginnings(lm)
        self._prefilled: Prefilled | None = None
        #: The context that was encoded last, its tokens, and how many of them are its prompt's: many candidates follow.
        self._head: tuple[tuple[str, int], list[int], int] = (("", -1), [], 0)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's; every answer is a tuple that also carries its measured sparsity."""
        answers = Answers(self.lm, "loglikelihood", len(requests), disable_tqdm)
        answers.progress.documents(documents_of(requests))
        contexts: dict[tuple, Context] = {}
        texts = [shared_text(request) for request in requests]
        self._shared_encoder.expect([text for text in dict.fromkeys(texts) if text])
        for text, group in groupby(answers.progress.reading(range(len(requests))), key=lambda index: texts[index]):
            indices = list(group)
            if text:
                asked = [requests[index].args for index in indices]
                both = (part for context, more in asked for part in (str(context), context + more))
                self._shared_encoder.together(list(dict.fromkeys(both)), len(text))
            for index in indices:
                request = requests[index]
                if self.lm.reporter.skips(request):
                    answers.skip(index, MeasuredLoglikelihood(0.0, False, {}))
                    continue
                prompt, target, scored = self._tokenize(*request.args, task=request.task_name)
                window = window_of(request.args[0])
                # What is measured of a document must not depend on which others have the same prompt.
                key = (request.task_name, request.doc_id, window, *prompt)
                context = contexts.setdefault(key, Context(prompt, task=request.task_name, window=window))
                known = tuple(map(str, request.args))
                context.targets.append(Target(index, target, scored, known, answers.name(request)))
        self._score(list(contexts.values()), answers)
        return answers.done()

    def loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """lm-eval's token-level entry point: `((context, continuation), context tokens, continuation tokens)`."""
        answers = Answers(self.lm, "loglikelihood", len(requests), disable_tqdm)
        contexts: dict[tuple, Context] = {}
        for index, (key, head, tail) in enumerate(requests):
            whole = [*head, *tail][-(self.lm.max_length + 1) :]
            prompt = whole[: len(whole) - len(tail)]
            window = window_of(key[0]) if key else None
            context = contexts.setdefault((window, *prompt), Context(prompt, window=window))
            context.targets.append(Target(index, list(tail), len(tail), key))
        self._score(list(contexts.values()), answers)
        return answers.done()

    def _tokenize(self, context: str, continuation: str, task: str | None = None) -> tuple[list[int], list[int], int]:
        """Prompt tokens, tokens after it, and how many of those at the end are scored."""
        lm = self.lm
        head, tail = self._encode(context, continuation) if context else ([], [])
        if head:
            whole, scored, before = [*head, *tail], len(tail), len(head)
            if isinstance(context, SharedPrompt) and context.shared < len(context):
                before = self._before(context, head)
        else:  # no context, or one of nothing but space, which belongs to the continuation
            tokens = lm.tok_encode(context + continuation, add_special_tokens=False)
            whole = tokens if tokens[:1] == [lm.prefix_token_id] else [lm.prefix_token_id, *tokens]
            before, scored = 1, len(whole) - 1
        if not scored:
            what = "is empty" if not continuation else f"{continuation!r} gives no token of its own"
            raise UserError(
                f"{f'task {task}: ' if task else ''}the continuation of a document {what}, so there is nothing to "
                f"score (its context ends in {context[-60:]!r}): give the document an answer (doc_to_target, "
                "doc_to_choice), or leave the task out"
            )
        if scored > lm.max_length:
            raise UserError(
                f"a continuation of {scored} tokens cannot be scored (the model takes 1 to {lm.max_length}): "
                f"{continuation[:60]!r}; leave this task out or raise max_length"
            )
        surplus = len(whole) - (lm.max_length + 1)
        if surplus > 0:
            logger.warning(
                "context and continuation have %d tokens, the model takes %d: dropping %d tokens from the left",
                len(whole), lm.max_length, surplus,
            )  # fmt: skip
            whole, before = whole[surplus:], before - surplus
        # Something has to be prefilled for the first scored token to be predicted from.
        before = max(1, min(before, len(whole) - scored))
        return whole[:before], whole[before:], scored

    def _before(self, context: SharedPrompt, head: list[int]) -> int:
        """Tokens of a context that are those of its prompt."""
        if self._head[0] == (context, context.shared):
            return self._head[2]
        return common_prefix(self._shared_encoder.prompt(context[: context.shared]), head)

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval's; the requests of one prompt, which follow each other, read it once."""
        shared = shared_part(context)
        if not shared:
            return self.lm._encode_pair(context, continuation)
        if self._head[0] != (context, shared):
            head = self._shared_encoder(str(context), shared)
            own = self._shared_encoder.prompt(context[:shared])
            self._head = (str(context), shared), head, len(head) if own is head else common_prefix(own, head)
        whole = self._shared_encoder(context + continuation, shared)
        return self._head[1], whole[len(self._head[1]) :]

    @cached_property
    def _shared_encoder(self) -> SharedEncoder:
        return SharedEncoder(self.lm.tok_encode, self._encode_many)

    def _encode_many(self, texts: list[str], add_special_tokens: bool | None = None) -> list[list[int]]:
        """As lm-eval encodes each of these texts; a tokenizer may use several processors for them."""
        lm = self.lm
        prefix = lm.tokenizer.decode(lm.prefix_token_id)
        own = add_special_tokens is None and any(has_bos_prefix(text, prefix) for text in texts)
        if not lm.tokenizer.is_fast or own:
            return [lm.tok_encode(text, add_special_tokens=add_special_tokens) for text in texts]
        special = lm.add_bos_token if add_special_tokens is None else add_special_tokens
        options = {} if special is None else {"add_special_tokens": special}
        return lm.tokenizer(texts, **options)["input_ids"]

    def _score(self, contexts: list[Context], answers: Answers) -> None:
        """Answer all targets of all contexts, longest contexts first (an out-of-memory shows at once)."""
        lm = self.lm
        for context in contexts[: lm.reporter.to_diagnose(len(contexts))]:
            context.counts.diagnosis = Diagnosis()
        contexts = sorted(contexts, key=lambda context: self.beginnings.order(context.prompt))
        later = [a.method.name for phase, a in lm.runtime.plan.phases.items() if phase != "prefill"]
        if later and contexts and lm.is_recurrent:
            raise UserError(
                f"{lm.kind} keeps a recurrent state, so answers are scored in one pass with their context and "
                f"{' and '.join(later)} cannot be applied: use generated tasks, or a prefill method"
            )
        whole = [lm.is_recurrent or lm.lengths.stretched(*context.lengths()) is not None for context in contexts]
        lm.lengths.check([context.lengths()[in_one] for context, in_one in zip(contexts, whole, strict=True)])
        lm.lengths.refuse_dynamic(max((context.lengths()[1] for context in contexts), default=0))
        if later and any(whole):
            prompt, length = contexts[whole.index(True)].lengths()
            raise UserError(
                f"{lm.kind} has {lm.lengths.stretched(prompt, length)}: a prompt of {prompt} tokens with its answer "
                f"({length} in all) is scored in one pass, and {' and '.join(later)} cannot be applied: use prompts of "
                "another length, or a prefill method"
            )
        asked = [self._asked(context, answers) for context in contexts]
        lengths = [len(target.tokens) for context in contexts for target in context.targets]
        if later and (idle := lengths.count(1)):
            logger.warning(
                "%s can change %d of %d answers: the others have one token, which comes from the prefill",
                " and ".join(later), len(lengths) - idle, len(lengths),
            )  # fmt: skip
        before = [[], *(context.prompt for context in contexts)]
        there = [self.beginnings.there(*pair) for pair in zip(before, before[1:], strict=False)]
        work = (each for context, tokens in zip(contexts, there, strict=True) for each in context.work(tokens))
        answers.progress.expect(dict(work))
        left = [
            one
            for one, done in zip(zip(contexts, asked, whole, strict=True), answers.restore(asked), strict=True)
            if not done
        ]
        if left:
            longest = max((context for context, *_ in left), key=lambda context: context.lengths()[1])
            lm.summary.expect([len(longest.prompt)], longest.lengths()[1] - len(longest.prompt))
        following = [*(context for context, *_ in left[1:]), None][: len(left)]
        others: list[list[int] | None] = [None] * len(left)  # the next prompt that is another one
        for place in range(len(left) - 2, -1, -1):
            later = following[place].prompt
            others[place] = later if later != left[place][0].prompt else others[place + 1]
        for (context, own, in_one), later, other in zip(left, following, others, strict=True):
            scored = self._score_whole(context) if in_one else self.score_context(context, later, other)
            stats = lm.reporter.stats(context.counts)
            answers.answer(own, context.counts, [MeasuredLoglikelihood(*one, stats) for one in scored])

    @staticmethod
    def _asked(context: Context, answers: Answers) -> Asked:
        requests = [(target.index, target.key, target.name) for target in context.targets]
        asked = Asked(context.task, requests, diagnosed=context.counts.diagnosis is not None)
        if answers.lm.sample_log is None:
            return asked
        # What a target is scored as does not depend on the others, but what is counted does.
        targets = sorted({(tuple(target.tokens), target.scored) for target in context.targets})
        tokens = tokens_of(context.prompt, *(tokens for tokens, _ in targets))
        return answers.keyed(asked, context.window, tokens, [scored for _, scored in targets])

    def score_context(
        self, context: Context, following: Context | None = None, other: list[int] | None = None
    ) -> list[tuple[float, bool]]:
        """Prefill a context, then run its answers against the cache.

        Contexts run one at a time whatever the batch size: side by side they would be padded and round differently.
        The answers to one run side by side where each gets what it gets alone (`side_by_side`).

        Args:
            following: the next context, which may have the same prompt.
            other: the next prompt that is another one, which may begin alike.
        """
        lm = self.lm
        sequences, engine = context.sequences(), self.side_by_side.get()
        length, read = len(context.prompt), self._read_before(context)
        if read is not None:
            cache, context.counts = read.cache, copy.deepcopy(read.counts)
        elif engine is None:
            cache = lm.runtime.new_cache(lm.model.config, reserve=max(map(len, sequences)), prompt=length)
        else:
            cache = engine.new_cache(length)
        scored: dict[tuple, Tensor] = {}
        hits: dict[tuple, Tensor] = {}
        with lm.runtime.running(context.counts, cache, length, context.window, read=0 if read is None else length):
            if read is None:
                logits = self.beginnings.prefill(context.prompt, cache, context.counts, other)
                first = lm.forward.log_softmax(logits[:, -1])
                read = Prefilled(
                    context.prompt, context.window, cache, RowCounts(), first,
                    cache.snapshot() if engine is None else None,
                )  # fmt: skip
                if following is not None and following.prompt == context.prompt:
                    settle([context.counts])
                    read.counts = copy.deepcopy(replace(context.counts, diagnosis=None))
            if engine is None:
                for tokens in sequences:
                    scored[tuple(tokens)], hits[tuple(tokens)] = self._score_tokens(tokens, read.first, cache)
                    cache.restore(read.snapshot)
        if engine is not None:
            found = self.side_by_side.score(engine, cache, sequences, first=read.first[0], counts=context.counts)
            for tokens, own in zip(sequences, found, strict=True):
                scored[tuple(tokens)], hits[tuple(tokens)] = own
        elif (reason := self.side_by_side.reason) is not None:
            context.counts.phases["decode"].loop_reasons[reason] += sum(map(len, sequences)) - len(sequences)
        self._prefilled = read if following is not None and following.prompt == context.prompt else None
        return context.answers(scored, hits)

    def _read_before(self, context: Context) -> Prefilled | None:
        """The context's prompt as the context before it has read it, if it has. What is looked at is read anew."""
        read, self._prefilled = self._prefilled, None
        if read is None or context.counts.diagnosis is not None:
            return None
        return read if (read.prompt, read.window) == (context.prompt, context.window) else None

    def _score_tokens(self, tokens: list[int], first: Tensor, cache: SparseCache) -> tuple[Tensor, Tensor]:
        """Log-probability and greedy hit of each token of one answer; `first (1, V)` predicts its first token."""
        pieces: list[Tensor] = []
        greedy: list[Tensor] = []

        def note(logprobs: Tensor, tokens: list[int]) -> None:
            wanted = torch.tensor(tokens, device=logprobs.device)
            pieces.append(logprobs.gather(-1, wanted[:, None])[:, 0].float().cpu())
            greedy.append((logprobs.argmax(-1) == wanted).cpu())

        note(first, tokens[:1])
        plan = self.lm.runtime.plan
        for begin, end in cut(len(tokens) - 1, plan.every, 1 if plan.one_by_one else None):
            # Token i predicts token i + 1. Where it stands is told by the cache, as it is to `hf` by what came before.
            logits = self.lm.forward(torch.tensor([tokens[begin:end]], device=self.lm.device), cache=cache)
            note(self.lm.forward.log_softmax(logits[0]), tokens[begin + 1 : end + 1])
        return torch.cat(pieces).double(), torch.cat(greedy)

    def _score_whole(self, context: Context) -> list[tuple[float, bool]]:
        """For recurrent models: context and answer in one pass, which makes the answer part of the prefill."""
        lm = self.lm
        scored: dict[tuple, Tensor] = {}
        hits: dict[tuple, Tensor] = {}
        for tokens in context.sequences():
            with lm.runtime.running(context.counts, window=context.window):
                ids = torch.tensor([[*context.prompt, *tokens[:-1]]], device=lm.device)
                logprobs = lm.forward.log_softmax(lm.forward(ids, cache=None, keep=len(tokens))[0])
            wanted = torch.tensor(tokens, device=lm.device)
            scored[tuple(tokens)] = logprobs.gather(-1, wanted[:, None])[:, 0].double().cpu()
            hits[tuple(tokens)] = (logprobs.argmax(-1) == wanted).cpu()
        return context.answers(scored, hits)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's: the sum over windows of at most `max_length` tokens, each run as one prefill."""
        lm = self.lm
        answers = Answers(lm, "loglikelihood_rolling", len(requests), disable_tqdm)
        answers.progress.documents(documents_of(requests))
        cut = [self._rolling_windows(request.args[0]) for request in answers.progress.reading(requests)]
        read = [sum(len(head) + len(tail) - 1 for head, tail in windows) for windows in cut]
        answers.progress.expect({index: (tokens, 0) for index, tokens in enumerate(read)})
        lm.lengths.check([len(head) + len(tail) - 1 for windows in cut for head, tail in windows])
        asked = []
        for index, (request, windows) in enumerate(zip(requests, cut, strict=True)):
            key, name = tuple(map(str, request.args)), answers.name(request)
            own = Asked(request.task_name, [(index, key, name)], diagnosed=bool(lm.reporter.to_diagnose(1)))
            asked.append(answers.keyed(own, tokens_of(*(tokens for pair in windows for tokens in pair))))
        for request, windows, own, done in zip(requests, cut, asked, answers.restore(asked), strict=True):
            if done:
                continue
            (text,) = request.args
            counts, total = RowCounts(diagnosis=Diagnosis() if own.diagnosed else None), 0.0
            with lm.runtime.running(counts, window=window_of(text)):
                for head, tail in windows:
                    ids = torch.tensor([[*head, *tail][:-1]], device=lm.device)
                    lm.lengths.refuse_dynamic(ids.shape[1])
                    logits = lm.forward(ids, cache=None, keep=len(tail))[0]
                    wanted = torch.tensor(tail, device=lm.device)
                    for begin in range(0, len(tail), SCORE_CHUNK):
                        part = lm.forward.log_softmax(logits[begin : begin + SCORE_CHUNK])
                        total += float(part.gather(-1, wanted[begin : begin + SCORE_CHUNK, None]).double().sum())
            answers.answer(own, counts, [MeasuredFloat(total, lm.reporter.stats(counts))])
        return answers.done()

    def _rolling_windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Tokens to read and tokens to score, of each window of a text."""
        windows = get_rolling_token_windows(
            token_list=self.lm.tok_encode(text),
            prefix_token=self.lm.prefix_token_id,
            max_seq_len=self.lm.max_length,
            context_len=1,
        )
        return list(map(make_disjoint_window, windows))


def cut(steps: int, every: int | None, most: int | None = None) -> Iterator[tuple[int, int]]:
    """Parts of so many tokens of an answer: of `most` at most (`SCORE_CHUNK`), and none across a multiple of `every`.

    Between two of them the runtime may evict, and all tokens of one attend to the same cache.
    """
    begin = 0
    while begin < steps:
        end = min(begin + (most or SCORE_CHUNK), steps)
        if every is not None:
            end = min(end, (begin // every + 1) * every)
        yield begin, end
        begin = end


def shared_part(context: str) -> int:
    """Characters of a context that are read once for the requests that follow each other; 0 for none of it."""
    if not context or context.rstrip() != context:  # blanks belong to what follows
        return 0
    if isinstance(context, SharedPrompt):
        return context.shared
    return len(context) if len(context) >= LONG else 0


def shared_text(request: Instance) -> str:
    """What of a request's context is read once; empty for none of it."""
    return request.args[0][: shared_part(request.args[0])]


def common_prefix(left: list[int], right: list[int]) -> int:
    """Number of leading tokens that two sequences share."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


__all__ = ["Context", "Scorer", "Target"]
