"""How the next token of an answer is chosen, and when the answer ends: as lm-eval and transformers define it.

What decides lies with them: generation arguments are merged with the model's own generation configuration, lengths are
resolved and scores are processed by transformers' code; stop strings are looked for where lm-eval looks for them. Only
drawing is our own: every prompt has its own source of random numbers, so that a sampled answer does not depend on its
neighbours either.

`FIELDS` says of every field of transformers' generation configuration what becomes of it here. `check` refuses what
cannot be followed as `hf` follows it, before the first prompt runs. The table and what reads it stand in one file, a
long one for that.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
import transformers
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import GenerationMode

from ..errors import UserError, nearest
from ..results.files import brief
from ..values import COUNT, FACTOR, FLAG, FRACTIONS, LEAST, MAYBE, NUMBER, SHARE, TOKENS, Takes, is_number, is_whole

logger = logging.getLogger(__name__)

#: Tokens that lm-eval looks at beyond those of a stop string: other tokens may spell it, too.
BEYOND = 2


# --- the table ----------------------------------------------------------------------------------------------------


#: What becomes of a field:
#: `alike`: it decides lengths, ends or scores, which transformers' own code makes of it on both of our ways;
#: `transformers`: when it asks for something, `generate` decodes;
#: `mode`: it matters when it leads to a way to generate that is not in `FOLLOWED`, and is then refused;
#: `idle`: it does not change the text of an answer; `refused`: not accepted.
How = Literal["alike", "transformers", "mode", "idle", "refused"]


@dataclass(frozen=True)
class Field:
    """What becomes of one field of the generation configuration.

    Attributes:
        how: see `How`.
        takes: what a typed value has to be; None leaves that to transformers.
        off: the value that asks for nothing, beside None and False.
        why: of a refused field, why; of an idle one, why it must not be typed as something else than `off`.
        only: the values that are refused; all that ask for something when empty.
        needed: None is no value for it.
        strict: `takes` holds for the model's own value, too, which transformers uses unseen.
    """

    how: How
    takes: Takes | None = None
    off: Any = None
    why: str = ""
    only: tuple[Any, ...] = ()
    needed: bool = False
    strict: bool = False

    def asks(self, value: Any) -> bool:
        """Whether a value asks for something."""
        if value is None or value is False or (is_number(value) and is_number(self.off) and value == self.off):
            return False
        return not self.only or value in self.only


OURS = "sparse-hf generates one text per prompt with its own KV cache"
GIVEN = "lm-eval gives transformers its own"

FIELDS: dict[str, Field] = {
    # When an answer ends
    "max_length": Field("alike", COUNT, needed=True),  # of the configuration: lm-eval always gives its own
    "max_new_tokens": Field("alike", COUNT, strict=True),  # of the configuration only: lm-eval takes a typed one away
    "min_length": Field("alike", MAYBE, off=0),
    "min_new_tokens": Field("alike", MAYBE, off=0),
    "eos_token_id": Field("alike", TOKENS),
    "max_time": Field("transformers", LEAST, strict=True),
    "stop_strings": Field(
        "refused", why="transformers needs a tokenizer for it, which lm-eval does not give it: stop strings are until="
    ),
    # How tokens are chosen
    "do_sample": Field("alike", FLAG),
    "temperature": Field("alike", LEAST, off=1.0, needed=True),
    "top_k": Field("alike", MAYBE, off=0),
    "top_p": Field("alike", SHARE, off=1.0),
    "min_p": Field("alike", SHARE),
    "top_h": Field("alike", SHARE),
    "typical_p": Field("alike", SHARE, off=1.0),
    "epsilon_cutoff": Field("alike", SHARE, off=0.0),
    "eta_cutoff": Field("alike", SHARE, off=0.0),
    "repetition_penalty": Field("alike", FACTOR, off=1.0),
    "encoder_repetition_penalty": Field("alike", FACTOR, off=1.0),  # the prompt is what it calls encoder input
    "no_repeat_ngram_size": Field("alike", MAYBE, off=0),
    "encoder_no_repeat_ngram_size": Field("alike", MAYBE, off=0),
    "bad_words_ids": Field("alike"),
    "sequence_bias": Field("alike"),
    "forced_bos_token_id": Field("alike", TOKENS),
    "forced_eos_token_id": Field("alike", TOKENS),
    "suppress_tokens": Field("alike", TOKENS),
    "begin_suppress_tokens": Field("alike", TOKENS),
    "exponential_decay_length_penalty": Field("alike"),
    "remove_invalid_values": Field("alike", FLAG),
    "renormalize_logits": Field("alike", FLAG),
    "watermarking_config": Field("alike"),
    "prefill_chunk_size": Field("alike", COUNT, strict=True),
    "token_healing": Field(
        "refused", FLAG, why="transformers needs a tokenizer for it, which lm-eval does not give it"
    ),
    "guidance_scale": Field(
        "refused", NUMBER, off=1.0, why="it generates a second text beside that of the prompt, without the prompt"
    ),
    # Beams, and other ways to generate
    "num_beams": Field("transformers", COUNT, off=1, needed=True, strict=True),
    "early_stopping": Field("alike"),
    "length_penalty": Field("alike", NUMBER, off=1.0, needed=True),
    "num_return_sequences": Field("refused", COUNT, off=1, why=OURS, needed=True, strict=True),
    "constraints": Field("mode"),
    "force_words_ids": Field("mode"),
    "num_beam_groups": Field("mode", COUNT, off=1),
    "diversity_penalty": Field("idle", NUMBER, off=0.0),  # of groups of beams
    "penalty_alpha": Field("mode", LEAST, off=0.0),
    "dola_layers": Field("mode"),
    "low_memory": Field("idle", FLAG),  # how beams were once run
    # Assistants: without one, what says how it works is idle
    "use_mtp": Field("mode"),
    "prompt_lookup_num_tokens": Field("mode"),
    "assistant_early_exit": Field("mode"),
    "is_assistant": Field("refused", FLAG, why="sparse-hf evaluates a model by itself, not as another one's assistant"),
    "num_assistant_tokens": Field("idle"),
    "num_assistant_tokens_schedule": Field("idle"),
    "assistant_confidence_threshold": Field("idle"),
    "max_matching_ngram_size": Field("idle"),
    "assistant_lookbehind": Field("idle"),
    "target_lookbehind": Field("idle"),
    "assistant_ensemble_weight": Field("idle"),
    "speculation_type": Field("idle"),
    # Caches and compilation: how, not what. A quantized cache rounds.
    "use_cache": Field("idle", why=OURS),  # lm-eval always gives True
    "cache_implementation": Field("idle", why=OURS, only=("quantized",)),
    "cache_config": Field("idle", why=OURS),
    "max_cache_len": Field("idle", why=OURS),
    "compile_config": Field("idle"),
    "disable_compile": Field("idle"),
    "continuous_batching_config": Field("idle"),
    # What `generate` returns beside the text
    "return_dict_in_generate": Field("idle", FLAG, why=OURS),
    "output_attentions": Field("idle", FLAG),
    "output_hidden_states": Field("idle", FLAG),
    "output_logits": Field("idle", FLAG),
    "output_scores": Field("idle", FLAG),
    # Tokens that a decoder-only model with a prompt has no use for, or that lm-eval gives
    "pad_token_id": Field("idle", why=GIVEN),
    "bos_token_id": Field("idle", TOKENS),
    "decoder_start_token_id": Field("idle", TOKENS),
    # What the file says of itself
    "transformers_version": Field("idle"),
    "_from_model_config": Field("idle"),
    "_commit_hash": Field("idle"),  # transformers 5.17
}  # fmt: skip

#: Arguments that must not be typed at all, since lm-eval's own are given beside them.
NEVER_TYPED = ("use_cache", "pad_token_id")

#: Handed to `generate`, so that what the model's configuration says here cannot collide with the cache that it is given
#: or change what it returns.
NEUTRAL: dict[str, Any] = {
    "cache_implementation": None, "cache_config": None, "max_cache_len": None, "return_dict_in_generate": False,
    "output_attentions": False, "output_hidden_states": False, "output_logits": False, "output_scores": False,
    "low_memory": False,
}  # fmt: skip

#: Ways to generate that are followed, by the names of transformers' `GenerationMode`.
FOLLOWED = ("greedy_search", "sample", "beam_search", "beam_sample")

#: Arguments of `generate` that are no fields, and why they are not accepted.
ARGUMENTS: dict[str, str] = {
    **dict.fromkeys(
        ("context", "stop", "stopping_criteria", "input_ids", "inputs", "attention_mask", "position_ids",
         "inputs_embeds", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "logits_to_keep"),
        GIVEN,
    ),
    **dict.fromkeys(("past_key_values", "cache", "cache_params"), OURS),
    **dict.fromkeys(
        ("assistant_model", "assistant_tokenizer", "tokenizer", "streamer", "synced_gpus", "custom_generate",
         "trust_remote_code", "negative_prompt_ids", "negative_prompt_attention_mask"),
        OURS,
    ),
    "generation_config": "it is the model's own, which single arguments change",
}  # fmt: skip

#: Arguments of `generate` that are no fields and go to it: objects, given from Python.
OBJECTS = ("logits_processor", "prefix_allowed_tokens_fn")

#: Names of other programs, and what they are called here.
ELSEWHERE = {"seed": "lm-eval's --seed", "stop": "until=", "stop_sequences": "until=", "n": "a task's repeats"}

#: Methods of transformers' `generate` that decoding here stands for: a model's own may do something else.
REPLACED = ("generate", "_sample", "_get_stopping_criteria", "_prepare_generated_length", "_validate_generated_length")


#: Methods by which a model makes its inputs of what was generated: those of transformers' own models are known.
PREPARES = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prepare_cache_for_generation")


def module_of(method: Any) -> str:
    """The module that a method was written in."""
    return getattr(getattr(method, "__func__", method), "__module__", None) or ""


# --- when an answer is whole --------------------------------------------------------------------------------------


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


# --- how a token is chosen ----------------------------------------------------------------------------------------


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


# --- what is refused ----------------------------------------------------------------------------------------------


def check(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Raise `UserError` for arguments (normalised by lm-eval) or a configuration that cannot be followed as by `hf`."""
    model = without_adapter(model)
    if not isinstance(getattr(model, "generation_config", None), GenerationConfig):
        raise UserError(
            f"{type(model).__name__} has no generate in transformers {transformers.__version__}, so it cannot answer "
            "generated tasks: use scored ones"
        )
    _check_names(model, arguments)
    _check_typed(arguments)
    _check_tokens(model, arguments)
    _check_configured(model, arguments)
    if changed(model) is None:
        _check_trial(model, arguments)


def check_early(arguments: dict[str, Any]) -> None:
    """Raise `UserError` for what is wrong with typed generation arguments whatever the model is."""
    for name in arguments.keys() & ELSEWHERE.keys():
        _refuse_elsewhere(name, arguments[name])
    tokens = arguments.get("max_gen_toks", 1)
    if not is_whole(int(tokens) if isinstance(tokens, str) and tokens.isdecimal() else tokens, 1):
        raise UserError(
            f"--gen_kwargs max_gen_toks={brief(tokens)} is not accepted: give a whole number of at least 1, such as "
            "max_gen_toks=64"
        )
    _check_typed(arguments)


def _refuse_elsewhere(name: str, value: Any) -> NoReturn:
    raise UserError(
        f"--gen_kwargs {name}={brief(value)} is no argument of transformers' generate: type {ELSEWHERE[name]} instead"
    )


def _check_names(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    known = vars(GenerationConfig())
    for name, value in arguments.items():
        given = f"--gen_kwargs {name}={brief(value)}"
        if name in ("until", "max_gen_toks", *OBJECTS) or (name in FIELDS and not name.startswith("_")):
            continue
        if name in known and not name.startswith("_"):
            raise UserError(
                f"{given}: transformers {transformers.__version__} has it, and this release of lm-eval-sparse does not "
                f"know what it changes; leave {name} out, or use --model hf"
            )
        if name in ELSEWHERE:
            _refuse_elsewhere(name, value)
        if name in ARGUMENTS:
            raise UserError(f"{given} is not accepted: {ARGUMENTS[name]}; leave {name} out")
        try:
            model._validate_model_kwargs({name: True})  # arguments that only this model's code knows go there
        except AttributeError:
            continue
        except ValueError as error:
            accepted = ["until", "max_gen_toks"]
            accepted += [n for n, f in FIELDS.items() if f.how in ("alike", "transformers") and n != "max_new_tokens"]
            raise UserError(
                f"{given} is unknown{nearest(name, [*accepted, 'max_new_tokens'])} (accepted: {', '.join(accepted)})"
            ) from error


def _check_tokens(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Raise on typed tokens that the model has not: an end that never comes, a score that is not there."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    for name, value in arguments.items():
        if name in FIELDS and FIELDS[name].takes is TOKENS and value is not None:
            tokens = value if isinstance(value, list | tuple) else [value]
            if any(token >= vocabulary for token in tokens):
                _refuse(model, name, arguments, f"is not accepted: the model has tokens 0 to {vocabulary - 1}")


def _check_typed(arguments: dict[str, Any]) -> None:
    """Raise on typed values that are none of their field, whether it takes effect or not."""
    until = arguments.get("until") or ()
    for stop in [until] if isinstance(until, str) or not isinstance(until, list | tuple) else until:
        if not isinstance(stop, str):
            raise UserError(
                f"--gen_kwargs until={brief(arguments['until'])} is not accepted: {stop!r} is no text; give a text "
                f"or a list of texts, such as --gen_kwargs 'until=[\"{stop}\"]'"
            )
    for name in OBJECTS:
        value = arguments.get(name)
        objects = [value] if callable(value) else value if isinstance(value, list) and value else [None]
        if value is not None and not all(map(callable, objects)):
            raise UserError(
                f"--gen_kwargs {name}={brief(value)} is not accepted: it takes functions, from Python; leave it out"
            )
    for name, value in arguments.items():
        field = FIELDS.get(name)
        if field is None:
            continue
        if name in NEVER_TYPED or (field.how == "idle" and field.why and value not in (None, False, field.off)):
            raise UserError(f"--gen_kwargs {name}={brief(value)} is not accepted: {field.why}; leave {name} out")
        if value is None and field.needed:
            raise UserError(f"--gen_kwargs {name}=None is not accepted: {_wanted(name, field)}")
        if value is not None and field.takes is not None and not field.takes.good(value):
            raise UserError(f"--gen_kwargs {name}={brief(value)} is not accepted: {_wanted(name, field)}")
    if arguments.get("do_sample") is True and arguments.get("temperature", 0.0) == 0.0:
        raise UserError(
            f"--gen_kwargs do_sample=True,temperature={arguments.get('temperature', 0.0)} is not accepted: to sample "
            "takes a temperature above 0, and lm-eval takes 0 where none is typed; type one, such as temperature=1.0, "
            "or leave do_sample out"
        )


def _wanted(name: str, field: Field) -> str:
    return f"give {field.takes.words if field.takes else 'a value'}, or leave {name} out"


def _check_configured(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Raise on values, of the model's configuration or typed, that are refused or that nobody here knows."""
    defaults = vars(GenerationConfig())
    for name, own in vars(model.generation_config).items():
        value, field = arguments.get(name, own), FIELDS.get(name)
        if field is None:
            if name in defaults and own != defaults[name] and not name.startswith("_"):
                raise UserError(
                    f"the model's generation_config.json sets {name}={brief(own)}, which transformers "
                    f"{transformers.__version__} has and this release of lm-eval-sparse does not know: take it out "
                    "there, or use --model hf"
                )
            if name not in defaults and not name.startswith("_"):
                _warn_unknown(name, own)
            continue
        if value is None:
            continue
        if field.strict and field.takes is not None and not field.takes.good(value):
            _refuse(model, name, arguments, f"is not accepted: it has to be {field.takes.words}")
        if (field.how == "refused" or field.only) and field.asks(value):
            _refuse(model, name, arguments, f"is not accepted: {field.why}")


def _refuse(model: PreTrainedModel, name: str, arguments: dict[str, Any], why: str, cause: Any = None) -> NoReturn:
    """Say of an argument, or else of a field of the model's configuration, why it is refused, and how to be rid of it.

    What stands in the file is validated by transformers whatever is typed, so typing does not help against all of it.
    """
    if name in arguments:
        raise UserError(f"--gen_kwargs {name}={brief(arguments[name])} {why}; leave {name} out") from cause
    off = FIELDS[name].off
    # Of these, lm-eval takes what is typed for itself.
    helps = name not in (*NEVER_TYPED, "max_new_tokens") and _trial(model, {**arguments, name: off}) is None
    value = brief(getattr(model.generation_config, name))
    raise UserError(
        f"{name}={value}, which the model's generation_config.json sets, {why}; "
        f"{f'type --gen_kwargs {name}={off}, or ' if helps else ''}take it out there"
    ) from cause


_warned: set[tuple[str, str]] = set()


def _warn_unknown(name: str, value: Any) -> None:
    if (name, str(value)) not in _warned:
        _warned.add((name, str(value)))
        logger.warning(
            "the model's generation_config.json sets %s=%s, which transformers %s does not know: nothing comes of it, "
            "as with hf", name, value, transformers.__version__,
        )  # fmt: skip


def _check_trial(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Raise on what transformers itself refuses: its validation, and what it makes of scores, tried on a CPU."""
    if (error := _trial(model, arguments)) is None:
        return
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".:")
    refused = f"is not accepted: {reason}"
    if not isinstance(error, UserError):
        refused = f"is not accepted by transformers ({type(error).__name__}: {reason})"
    for name in arguments:
        if name != "do_sample" and _trial(model, {n: v for n, v in arguments.items() if n != name}) is None:
            _refuse(model, name, arguments, refused, error)
    own = [name for name, value in vars(model.generation_config).items() if value is not None and name in FIELDS]
    for name in sorted(own, key=lambda name: FIELDS[name].how != "mode"):
        with _without(model, name):
            passes = _trial(model, arguments) is None
        if passes:
            _refuse(model, name, {n: v for n, v in arguments.items() if n != name}, refused, error)
    typed = " ".join(f"{name}={brief(value)}" for name, value in arguments.items())
    raise UserError(
        f"--gen_kwargs {typed}, beside the model's generation_config.json, {refused}; leave out what is not needed"
    ) from error


def _trial(model: PreTrainedModel, arguments: dict[str, Any]) -> Exception | None:
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
    with _without(model):
        error = _trial(model, {})
    return f"transformers has changed ({error})" if isinstance(error, AttributeError | TypeError) else None


@contextmanager
def _without(model: PreTrainedModel, name: str | None = None) -> Iterator[None]:
    """The model without one field of its generation configuration, or without any."""
    own = model.generation_config
    model.generation_config = GenerationConfig() if name is None else copy.copy(own)
    if name is not None:
        setattr(model.generation_config, name, None)
    try:
        yield
    finally:
        model.generation_config = own
