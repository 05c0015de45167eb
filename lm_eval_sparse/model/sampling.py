"""How the next token of an answer is chosen, and when the answer ends: as lm-eval and transformers define it.

What decides lies with them: generation arguments are merged with the model's own generation configuration, lengths are
resolved and scores are processed by transformers' code; stop strings are looked for where lm-eval looks for them. Only
drawing is our own: every prompt has its own source of random numbers, so that a sampled answer does not depend on its
neighbours either.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import GenerationMode

from ..errors import UserError
from ..values import FRACTIONS, is_number
from .generation_fields import FIELDS, FOLLOWED, NEUTRAL, OURS

#: Tokens that lm-eval looks at beyond those of a stop string: other tokens may spell it, too.
BEYOND = 2

#: Methods of transformers' `generate` that decoding here stands for: a model's own may do something else.
REPLACED = ("generate", "_sample", "_get_stopping_criteria", "_prepare_generated_length", "_validate_generated_length")

#: Methods by which a model makes its inputs of what was generated: those of transformers' own models are known.
PREPARES = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prepare_cache_for_generation")


class Stop:
    """Whether an answer is whole: at its limit, at an end token, or once a stop string is in it.

    A stop string is looked for as lm-eval's `MultiTokenEOSCriteria` does: in the text of as many last tokens as it has
    itself, and two more.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: dict[int, list[str]], ends: set[int], limit: int):
        self.tokenizer, self.strings, self.ends, self.limit = tokenizer, strings, ends, limit

    @staticmethod
    def lookback(tokenizer: PreTrainedTokenizerBase, until: Sequence[str]) -> dict[int, list[str]]:
        """Stop strings by the number of last tokens in whose text they are looked for."""
        found: dict[int, list[str]] = {}
        for stop in until:
            found.setdefault(len(tokenizer.encode(stop, add_special_tokens=False)) + BEYOND, []).append(stop)
        return found

    def __call__(self, tokens: list[int]) -> bool:
        if len(tokens) >= self.limit or tokens[-1] in self.ends:
            return True
        for number, stops in self.strings.items():
            text = self.tokenizer.decode(tokens[-number:])
            if any(stop in text for stop in stops):
                return True
        return False


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen under one set of generation arguments.

    Attributes:
        config: transformers' generation configuration, the arguments and the model's own merged.
        ends: tokens that end an answer.
        max_gen_toks: tokens of an answer, where nothing else limits them.
        max_length: tokens of prompt and answer together, if given.
    """

    model: PreTrainedModel
    config: Any
    ends: set[int]
    max_gen_toks: int
    max_length: int | None

    @classmethod
    def of(cls, model: PreTrainedModel, arguments: dict[str, Any], device: torch.device) -> Sampling | str:
        """From normalised generation arguments that passed `check`; a string says why only `generate` follows them."""
        base = without_adapter(model)
        if (reason := changed(base)) is not None:
            return reason
        own = [name for name in REPLACED if getattr(getattr(base, name, None), "__func__", None) is not mixin(name)]
        # What transformers' own modelling code prepares was compared with what is decoded here, family by family.
        own += [name for name in PREPARES if not module_of(getattr(base, name, None)).startswith("transformers.")]
        if own:
            return f"the model brings its own {own[0]}"
        found, left = cls._merged(base, arguments, device)
        if left:
            return f"generation arguments {', '.join(left)}"
        mode = found.config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return f"generation by {mode.value}"
        asked = [n for n, f in FIELDS.items() if f.how == "transformers" and f.asks(getattr(found.config, n, None))]
        return f"generation arguments {', '.join(asked)}" if asked else found

    @classmethod
    def _merged(
        cls, model: PreTrainedModel, arguments: dict[str, Any], device: torch.device
    ) -> tuple[Sampling, dict[str, Any]]:
        """Arguments and configuration as `generate` merges them, and the arguments that are none of its fields."""
        arguments = generation_arguments(arguments)
        arguments.pop("until", None)
        max_gen_toks, max_length = arguments.pop("max_gen_toks", 256), arguments.pop("max_length", None)
        config, left = model._prepare_generation_config(None, **{**arguments, **NEUTRAL})
        model._prepare_special_tokens(config, True, device=device, batch_size=1)
        ends = [] if config._eos_token_tensor is None else config._eos_token_tensor.tolist()
        return cls(model, config, set(ends), max_gen_toks, max_length), left

    @property
    def chunk(self) -> int | None:
        """Tokens of the prompt that are read at once, or None for all."""
        return self.config.prefill_chunk_size

    def at(self, length: int) -> Any:
        """The configuration for a prompt of so many tokens: with the lengths that `generate` resolves for it."""
        config = copy.copy(self.config)
        config.max_length = length + self.max_gen_toks if self.max_length is None else self.max_length
        return self.model._prepare_generated_length(
            generation_config=config,
            # These two only keep it from warning, once a prompt, that a number of new tokens comes before a length.
            has_default_max_length=config.max_new_tokens is not None,
            has_default_min_length=True,
            model_input_name="input_ids",
            input_ids_length=length,
            inputs_tensor=None,
        )

    def limit(self, length: int) -> int:
        """Tokens that an answer to a prompt of so many tokens has at most."""
        return self.at(length).max_length - length

    def processors(self, ids: Tensor) -> LogitsProcessorList:
        """What transformers makes of the scores behind a prompt `(1, L)`."""
        return self.model._get_logits_processor(
            generation_config=self.at(ids.shape[1]),
            input_ids_seq_length=ids.shape[1],
            encoder_input_ids=ids,
            prefix_allowed_tokens_fn=None,
            logits_processor=LogitsProcessorList(),
            device=ids.device,
            model_kwargs={},
        )

    def row(self, ids: Tensor, met: Counter[tuple[int, ...]]) -> Callable[[Tensor, list[int]], int] | None:
        """From the last logits `(V,)` and the tokens generated so far to the next token; None for the largest logit.

        Args:
            ids: `(1, L)` the prompt.
            met: how often each prompt was sampled before; this one is added.
        """
        processors, sampled = self.processors(ids), bool(self.config.do_sample)
        if not sampled and not processors:
            return None
        generator = torch.Generator(ids.device)
        if sampled:
            prompt = tuple(ids[0].tolist())
            words = repr((torch.initial_seed(), met[prompt], prompt)).encode()
            generator.manual_seed(int.from_bytes(hashlib.sha256(words).digest()[:7], "big"))
            met[prompt] += 1

        def choose(logits: Tensor, tokens: list[int]) -> int:
            whole = torch.cat([ids, torch.tensor([tokens], dtype=ids.dtype).to(ids.device)], 1)
            scores = processors(whole, logits[None].float())
            if sampled:
                return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
            return int(scores.argmax(-1))

        return choose


def generation_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as lm-eval hands them to transformers: greedy unless asked, and then without a temperature."""
    arguments = {"temperature": 0.0, **arguments}
    for name, value in arguments.items():
        if is_number(value) and name in FIELDS and FIELDS[name].takes in FRACTIONS:
            arguments[name] = float(value)
    if arguments["temperature"] == 0.0 and arguments.get("do_sample") is None:
        arguments["do_sample"] = False
    if arguments["temperature"] == 0.0 and arguments["do_sample"] is False:
        del arguments["temperature"]
    return arguments


def without_adapter(model: Any) -> Any:
    """The model that generates: what an adapter of the library peft is wrapped around."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def mixin(name: str) -> Any:
    """A method of transformers' `GenerationMixin`."""
    return getattr(GenerationMixin, name, None)


def module_of(method: Any) -> str:
    """The module that a method was written in."""
    return getattr(getattr(method, "__func__", method), "__module__", None) or ""


# --- what transformers makes of it ------------------------------------------------------------------------------------


def trial(model: PreTrainedModel, arguments: dict[str, Any]) -> Exception | None:
    """What goes wrong when transformers makes scores for the first and for the last token of an answer, or None."""
    prompt, cpu = 2, torch.device("cpu")
    try:
        short = {**arguments, "max_gen_toks": 2, "max_length": None, "max_new_tokens": None}
        sampling, _ = Sampling._merged(model, short, cpu)
        mode = sampling.config.get_generation_mode()
        if mode.value not in FOLLOWED:
            return _not_followed(mode, sampling.config)
        model._validate_generation_mode(mode, sampling.config, {})
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        whole = torch.arange(prompt + 1)[None] % vocabulary
        processors = sampling.processors(whole[:, :prompt])
        for length in (prompt, prompt + 1):
            scores = processors(whole[:, :length], torch.zeros(1, vocabulary))
            if sampling.config.do_sample and scores.softmax(-1).isnan().any():
                return ValueError("no token is left to be drawn")
    except Exception as error:  # of any kind: values of any type meet code that expects theirs
        return error
    return None


def _not_followed(mode: GenerationMode, config: Any) -> UserError:
    names = [n for n, f in FIELDS.items() if f.how == "mode" and f.asks(getattr(config, n, None))]
    return UserError(f"it asks for {mode.value.replace('_', ' ')} ({', '.join(names)}), and {OURS}")


def changed(model: PreTrainedModel) -> str | None:
    """Why methods of transformers, which are not public, cannot be used, or None: another release may have others."""
    with without(model):
        error = trial(model, {})
    return f"transformers has changed ({error})" if isinstance(error, AttributeError | TypeError) else None


@contextmanager
def without(model: PreTrainedModel, name: str | None = None) -> Iterator[None]:
    """The model without one field of its generation configuration, or without any."""
    own = model.generation_config
    model.generation_config = GenerationConfig() if name is None else copy.copy(own)
    if name is not None:
        setattr(model.generation_config, name, None)
    try:
        yield
    finally:
        model.generation_config = own
