"""What becomes of every field of transformers' generation configuration here, as a table.

`sampling` follows it, and `generation_checks` refuses what cannot be followed as `hf` follows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..values import COUNT, FACTOR, FLAG, LEAST, MAYBE, NUMBER, SHARE, TOKENS, Takes, is_number

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
