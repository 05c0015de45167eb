"""How the next token of an answer is chosen, and when the answer ends: as lm-eval and transformers define it.

What decides lies with them: generation arguments are merged with the model's own generation configuration, and scores
are processed, by transformers' code; stop strings are looked for where lm-eval looks for them. Only drawing is our own:
every prompt has its own source of random numbers, so that a sampled answer does not depend on its neighbours either.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMode

#: What a generation configuration may ask for beside scores to process, with the values that ask for nothing.
ELSEWHERE = (
    "guidance_scale", "max_time", "stop_strings", "watermarking_config", "token_healing", "prompt_lookup_num_tokens",
    "penalty_alpha", "dola_layers", "num_return_sequences",
)  # fmt: skip
NOTHING = (None, False, 1)

#: Tokens that lm-eval looks at beyond those of a stop string: other tokens may spell it, too.
BEYOND = 2


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
        chunk: tokens of the prompt that are read at once, or None for all.
    """

    model: PreTrainedModel
    config: Any
    ends: set[int]
    chunk: int | None

    @classmethod
    def of(cls, model: PreTrainedModel, arguments: dict[str, Any], device: torch.device) -> Sampling | str:
        """From normalised generation arguments; a string says why only transformers can follow them."""
        arguments = generation_arguments(arguments)
        chunk = arguments.pop("prefill_chunk_size", None)
        arguments.pop("max_length", None)
        try:
            config, left = model._prepare_generation_config(None, **arguments)
            if left:
                return f"generation arguments {', '.join(left)}"
            mode = config.get_generation_mode()
            if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
                return f"generation by {mode.value}"
            asked = [name for name in ELSEWHERE if getattr(config, name, None) not in NOTHING]
            if asked:
                return f"generation arguments {', '.join(asked)}"
            model._prepare_special_tokens(config, True, device=device, batch_size=1)
            ends = [] if config._eos_token_tensor is None else config._eos_token_tensor.tolist()
            found = cls(model, config, set(ends), chunk)
            found._processors(torch.zeros(1, 1, dtype=torch.long, device=device))
        except (AttributeError, TypeError) as error:
            # These methods of transformers are not public: another release may have others.
            return f"transformers has changed ({error})"
        return found

    def _processors(self, ids: Tensor) -> LogitsProcessorList:
        return self.model._get_logits_processor(
            generation_config=self.config,
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
        processors, sampled = self._processors(ids), bool(self.config.do_sample)
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
    if arguments["temperature"] == 0.0 and arguments.get("do_sample") is None:
        arguments["do_sample"] = False
    if arguments["temperature"] == 0.0 and arguments["do_sample"] is False:
        del arguments["temperature"]
    return arguments
