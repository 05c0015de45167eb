"""Generated requests: what is asked is checked, then answered by our decoder, or by transformers' `generate`."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor

from ..errors import UserError
from ..protocol import MeasuredText, window_of
from ..runtime.accounting import RowCounts
from ..runtime.cache import generation_argument
from ..runtime.diagnose import Diagnosis
from ..runtime.interface import calling
from .answers import Answers, Asked, tokens_of
from .decoding import prompt_ids
from .generation_checks import check as check_generation
from .generation_fields import NEUTRAL
from .load import first_line
from .progress import documents_of
from .sampling import Sampling, generation_arguments

if TYPE_CHECKING:
    from .lm import SparseHFLM


class Generator:
    """Answers the generated requests of a model."""

    def __init__(self, lm: SparseHFLM):
        self.lm = lm
        #: Requests that are samples of `diagnose=N`.
        self.diagnosed: set[int] = set()
        #: Of each request, how many before it ask for an answer to the same prompt: a sampled one is another each time.
        self.draws: dict[int, int] = {}

    def new_counts(self, index: int) -> RowCounts:
        """Where the answer to a request is counted."""
        return RowCounts(diagnosis=Diagnosis() if index in self.diagnosed else None)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's; every text is a `str` that also carries its measured sparsity."""
        lm = self.lm
        answers = Answers(lm, "generate_until", len(requests), disable_tqdm)
        answers.progress.documents(documents_of(requests))
        queue = []
        for index, request in enumerate(requests):
            if lm.reporter.skips(request):
                answers.skip(index, MeasuredText("", {}))
            else:
                queue.append((index, *request.args))
        for gen_kwargs in {json.dumps(item[2], sort_keys=True, default=str): item[2] for item in queue}.values():
            self._check_arguments(gen_kwargs)
        self._check_every([item[2] for item in queue])
        lengths: dict[str, int] = {}
        hashes: dict[str, str] = {}
        for _, context, _ in answers.progress.reading(queue):
            if context in lengths:
                continue
            lengths[context] = len(tokens := lm.tok_encode(context))
            if lm.sample_log is not None:
                hashes[context] = tokens_of(tokens)
        self._check_prompts(queue, lengths)
        answers.progress.expect({item[0]: self._work(item, lengths) for item in queue})
        firsts = {context: index for index, context, _ in reversed(queue)}  # of several answers to a prompt
        self.diagnosed = set(sorted(firsts.values())[: lm.reporter.to_diagnose(len(firsts))])
        self._count_draws(queue)
        asked = {}
        for index, context, gen_kwargs in queue:
            name = answers.name(requests[index])
            own = Asked(requests[index].task_name, [(index, (context, gen_kwargs), name)])
            own.diagnosed = index in self.diagnosed
            decides = () if name is None else (hashes[context], self._draw(index, gen_kwargs))
            asked[index] = answers.keyed(own, *decides)
        taken = dict(zip(asked, answers.restore(asked.values()), strict=True))
        queue = [item for item in queue if not taken[item[0]]]
        # The longest first: should memory run out, it does so at once, and storage made for them serves all others.
        order = Collator(
            queue,
            sort_fn=lambda item: (-lengths[item[1]], item[1]),
            group_by="gen_kwargs",
            group_fn=lambda item: item[2],
        )
        groups: dict[str, list[tuple]] = defaultdict(list)
        for item in order.get_batched(n=1):
            groups[json.dumps(item[0][2], sort_keys=True, default=str)].append(item[0])
        for group in groups.values():
            for (index, *_), text, counts in self._generate(group, lengths):
                answers.answer(asked[index], counts, [MeasuredText(text, lm.reporter.stats(counts))])
        lm.decoding.release()
        return answers.done()

    def _count_draws(self, queue: list[tuple]) -> None:
        met: Counter[tuple[str, str]] = Counter()
        self.draws = {}
        for index, context, gen_kwargs in queue:
            same = context, json.dumps(gen_kwargs, sort_keys=True, default=str)
            self.draws[index] = met[same]
            met[same] += 1

    def _draw(self, index: int, gen_kwargs: dict[str, Any]) -> list[int] | None:
        """What decides a sampled answer beside its prompt; None for one that is not sampled."""
        kwargs = generation_arguments(normalize_gen_kwargs(gen_kwargs, self.lm.max_gen_toks))
        return None if kwargs.get("do_sample") is False else [torch.initial_seed(), self.draws[index]]

    def _check_arguments(self, gen_kwargs: dict[str, Any]) -> None:
        """Raise `UserError` on generation arguments that cannot be followed, before any prompt runs."""
        lm = self.lm
        given = " ".join(f"{name}={value}" for name, value in gen_kwargs.items())
        try:
            kwargs = normalize_gen_kwargs(gen_kwargs, lm.max_gen_toks)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"--gen_kwargs {given} is not understood ({first_line(error)}): max_gen_toks takes a whole number, "
                "such as max_gen_toks=64, and temperature a number, such as temperature=0.7"
            ) from error
        if kwargs["max_gen_toks"] < 1:
            raise UserError(
                f"max_gen_toks={kwargs['max_gen_toks']} is no number of tokens to generate: type one of at least 1, "
                "such as --gen_kwargs max_gen_toks=64"
            )
        if kwargs["max_gen_toks"] >= lm.max_length:
            raise UserError(
                f"max_gen_toks={kwargs['max_gen_toks']} leaves no room for a prompt: the model takes {lm.max_length} "
                "tokens in all; type a smaller --gen_kwargs max_gen_toks="
            )
        check_generation(lm.model, kwargs)
        chunk, typed = lm.model.generation_config.prefill_chunk_size, "prefill_chunk_size" in kwargs
        chunk = kwargs["prefill_chunk_size"] if typed else chunk
        whole = [a.method.name for phase, a in lm.runtime.plan.phases.items() if phase != "decode"]
        if whole and chunk is not None:
            source, way = "--gen_kwargs ", "leave prefill_chunk_size out"
            if not typed:
                source, way = "the model's generation_config.json sets ", "type --gen_kwargs prefill_chunk_size=None"
            raise UserError(
                f"{source}prefill_chunk_size={chunk}: {' and '.join(whole)} looks at the whole prompt at once; {way}, "
                "or use method=dense"
            )

    def _check_every(self, given: list[dict[str, Any]]) -> None:
        """Raise `UserError` when no answer may be so long that it is evicted in its course, as asked for."""
        every = self.lm.runtime.plan.every
        if every is None or not given:
            return
        room = max(normalize_gen_kwargs(kwargs, self.lm.max_gen_toks)["max_gen_toks"] for kwargs in given)
        # The last token of an answer is never read, and so many others are kept before any is dropped.
        if room < every + 2:
            ways = [f"type every={room - 2} or less"] if room > 2 else []
            if every + 2 < self.lm.max_length // 2:  # what the model can take beside a prompt
                ways.append(f"type --gen_kwargs max_gen_toks={every + 2} or more")
            raise UserError(
                f"every={every}: no answer is evicted in its course, since none may have more than {room} tokens "
                f"(max_gen_toks={room}); {', or '.join([*ways, 'leave every out'])}"
            )

    def _whole_lengths(self, context: str, gen_kwargs: dict[str, Any], lengths: dict[str, int]) -> tuple[int, int]:
        """Tokens of a prompt, and of prompt and longest answer."""
        answer = normalize_gen_kwargs(gen_kwargs, self.lm.max_gen_toks)["max_gen_toks"]
        prompt = min(lengths[context], self.lm.max_length - answer)
        return prompt, prompt + answer

    def _work(self, item: tuple, lengths: dict[str, int]) -> tuple[int, int]:
        """Tokens of a prompt, and those of its longest answer that are read."""
        prompt, whole = self._whole_lengths(item[1], item[2], lengths)
        return prompt, whole - prompt - 1

    def _check_prompts(self, queue: list[tuple], lengths: dict[str, int]) -> None:
        """Find prompts at which a sparsity is out of reach, a preset has no knobs or no answer fits, before any run."""
        lm = self.lm
        found = []
        for _, context, gen_kwargs in queue:
            kwargs = normalize_gen_kwargs(gen_kwargs, lm.max_gen_toks)
            room = lm.max_length - kwargs["max_gen_toks"]
            found.append(min(lengths[context], room))
            if not lengths[context]:
                prompt_ids(lm, context, room)
            # A number of new tokens that the model's configuration gives comes before a length.
            limit = None if lm.model.generation_config.max_new_tokens is not None else kwargs.get("max_length")
            if limit is not None and limit <= found[-1]:
                raise UserError(
                    f"--gen_kwargs max_length={limit} leaves a prompt of {found[-1]} tokens no room for an answer: it "
                    f"counts prompt and answer; give more than {found[-1]}, or max_gen_toks= instead"
                )
        lm.lengths.check(found)
        for _, context, gen_kwargs in queue if lm.lengths.stretches else ():
            prompt, whole = self._whole_lengths(context, gen_kwargs, lengths)
            lm.lengths.refuse_dynamic(whole)
            if lm.runtime.plan.phases and (stretch := lm.lengths.stretched(prompt, whole)) is not None:
                raise UserError(
                    f"{lm.kind} has {stretch}: an answer of up to {whole - prompt} tokens to a prompt of {prompt} "
                    "may go there, where what was kept of the prompt is worth nothing; use prompts of another length, "
                    "fewer max_gen_toks, or method=dense"
                )

    def _generate(self, items: list[tuple], lengths: dict[str, int]) -> Iterator[tuple[tuple, str, RowCounts]]:
        """Answer requests `(index, context, generation arguments)` that share their arguments, the longest first."""
        lm = self.lm
        kwargs = normalize_gen_kwargs(items[0][2], lm.max_gen_toks)
        eos = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        room = lm.max_length - kwargs["max_gen_toks"]
        sampling = Sampling.of(lm.model, kwargs, lm.device)
        decoder, reason = lm.decoding.get()
        if isinstance(sampling, str):
            decoder, reason = None, sampling
        bent: list[tuple] = []
        if lm.lengths.stretches:
            bent = [i for i in items if lm.lengths.stretched(*self._whole_lengths(i[1], i[2], lengths)) is not None]
        for item in items if decoder is None else bent:
            ids, why = prompt_ids(lm, item[1], room), reason
            if item in bent:  # what the model then does with its cache is for it to say
                why = f"the model has {lm.lengths.stretches[0]}"
            counts = self.new_counts(item[0])
            text = self._by_transformers(
                counts, ids, kwargs, until, why, own_cache=item not in bent, window=window_of(item[1])
            )
            yield item, text, counts
        items = [item for item in items if item not in bent]
        if decoder is None or not items:
            return
        tokens = [min(lengths[item[1]], room) for item in items]
        for item, answer, counts in lm.decoding.answers(items, tokens, room, sampling, until):
            yield item, self._finish(answer, until), counts

    def _by_transformers(
        self,
        counts: RowCounts,
        ids: Tensor,
        kwargs: dict[str, Any],
        until: list[str],
        reason: str | None,
        own_cache: bool = True,
        window: int | None = None,
    ) -> str:
        """Answer one prompt by `generate`: beams, and whatever else the decoder does not know.

        Args:
            counts: where it is counted.
            own_cache: whether in our cache; without it no method can evict or decode.
            window: what the prompt's task says.
        """
        kwargs = dict(kwargs)
        max_gen_toks = kwargs.pop("max_gen_toks")
        cache = self.lm.runtime.new_cache(self.lm.model.config, reserve=max_gen_toks) if own_cache else None
        length = ids.shape[1]
        with self.lm.runtime.running(counts, cache, length, window):
            output = self._call_generate(
                context=ids,
                attention_mask=torch.ones_like(ids),
                stop=until,
                **{"max_length": length + max_gen_toks, **kwargs, **NEUTRAL},
                **({} if cache is None else {generation_argument(): cache}),
            )
        tokens = output[0, length:].tolist()
        phase = counts.phases["decode"]
        phase.loops["transformers"] += max(0, len(tokens) - 1)
        phase.loop_reasons[reason or ""] += max(0, len(tokens) - 1)
        return self._finish(tokens, until)

    def _call_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """As lm-eval's `_model_generate`, in our runtime."""
        lm = self.lm
        stops = stop_sequences_criteria(lm.tokenizer, stop, context.shape[1], context.shape[0])
        # transformers' own loop decides what each forward pass reads.
        hook = lm.model.register_forward_pre_hook(self._pass_begins, with_kwargs=True)
        try:
            with (
                calling(lm.runtime),
                torch.autocast(
                    device_type=lm.device.type,
                    dtype=lm.mixed_precision_dtype,
                    enabled=lm.mixed_precision_dtype is not None,
                ),
            ):
                return lm.model.generate(
                    input_ids=context,
                    max_length=max_length,
                    stopping_criteria=stops,
                    pad_token_id=lm.tokenizer.pad_token_id,
                    use_cache=True,
                    **generation_arguments(generation_kwargs),
                )
        finally:
            hook.remove()

    def _pass_begins(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the runtime of the tokens that a forward pass is about to read."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        tokens = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
        self.lm.runtime.begin(tokens)
        self.lm.clock.switch(self.lm.runtime.phase, tokens)

    def _finish(self, tokens: list[int], until: list[str]) -> str:
        """Text of generated tokens without thinking and stop strings, as lm-eval cuts them."""
        lm = self.lm
        by_id = isinstance(lm.think_end_token, int)
        if by_id and lm.think_end_token in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(lm.think_end_token) :]
        text = lm.tok_decode(tokens)
        return postprocess_generated_text(
            generation=text.lstrip() if by_id else text,
            stop=until,
            think_end_token=None if by_id else lm.think_end_token,
        )


__all__ = ["Generator"]
