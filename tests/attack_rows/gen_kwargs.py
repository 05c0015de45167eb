"""Bad and odd `--gen_kwargs`."""

from __future__ import annotations

from . import DEEP, EITHER, LEGAL, LONG, REFUSED, Row, evaluate, rows

AREA = "gen_kwargs"


def _generate(text: str) -> tuple[str, ...]:
    return evaluate("pretrained=<llama>", "--gen_kwargs", text, "--limit", "1", task="tiny_generate")


#: What each argument does not take, beside the words that make it count.
VALUES: dict[str, tuple[str, ...]] = {
    "temperature": ("-1,do_sample=True", "abc", "nan,do_sample=True", "True", "", "[1]", "0.0,do_sample=True",
                    "-inf,do_sample=True", "None"),
    "do_sample": ("maybe", "5", "", "[]", "True"),
    "num_beams": ("0", "-1", "abc", "1.5", "", "True", "None"),
    "repetition_penalty": ("abc", "0", "-1", "nan", "", "[]"),
    "top_k": ("-1,do_sample=True,temperature=1", "1.5", "abc"),
    "top_p": ("2,do_sample=True,temperature=1", "-1", "abc", "nan"),
    "min_p": ("2", "abc"),
    "top_h": ("2", "abc"),
    "typical_p": ("2", "-0.1"),
    "epsilon_cutoff": ("2", "abc"),
    "eta_cutoff": ("-1",),
    "max_gen_toks": ("abc", "0", "-1", "1.5", "", "[]", "1e30", "True", "nan", "None"),
    "max_new_tokens": ("0", "abc", "-1"),
    "min_new_tokens": ("abc", "-1", "1.5"),
    "min_length": ("abc",),
    "max_time": ("-1", "abc"),
    "until": ("5", "[5]", "[None]", "True", "1.5"),
    "eos_token_id": ("abc", "1.5", "[None]", "1000000"),
    "bad_words_ids": ("5", "abc", "[]", "[[1000000]]"),
    "sequence_bias": ("5", "abc"),
    "suppress_tokens": ("abc", "[1.5]"),
    "forced_eos_token_id": ("abc", "1000000"),
    "no_repeat_ngram_size": ("-1", "abc"),
    "exponential_decay_length_penalty": ("5", "abc", "[1]"),
    "length_penalty": ("abc,num_beams=2", "None"),
    "early_stopping": ("5,num_beams=2", "abc,num_beams=2"),
    "remove_invalid_values": ("maybe",),
    "renormalize_logits": ("5",),
    "watermarking_config": ("5", "abc"),
    "prefill_chunk_size": ("0", "abc"),
    "num_return_sequences": ("2", "0"),
    "guidance_scale": ("2", "abc"),
    "penalty_alpha": ("0.5,top_k=4", "-1"),
    "dola_layers": ("low", "5"),
    "use_cache": ("False", "5"),
    "pad_token_id": ("3", "abc"),
    "stop_strings": ("a",),
    "cache_implementation": ("quantized",),
    "generation_config": ("x",),
    "past_key_values": ("5",),
    "input_ids": ("5",),
    "assistant_model": ("x",),
    "logits_processor": ("5", "[]"),
    "prefix_allowed_tokens_fn": ("5",),
    "seed": ("3",),
    "stop": ("a",),
    "n": ("2",),
    "nosuch": ("5", "", "None"),
    "größe": ("5",),
    "_commit_hash": ("5",),
}  # fmt: skip

WHOLE = (
    "=5", "=", "abc", "{", "[]", "5", "null", '"x"', "temperature", '{"temperature": "abc"}', '{"nosuch": {"a": []}}',
    '{"until": {"a": 1}}', '{"until": [["a"]]}', '{"": 1}', DEEP, f"nosuch={LONG}", f"{LONG}=5",
    f"max_gen_toks={'9' * 5000}", f"temperature={'(' * 4000}", "no\nsuch=5", "no\x1b[2Jsuch=5", "temperature=²",
    "temperature:0", "max_gen_toks=٠",
)  # fmt: skip

LEGAL_TEXTS = (
    "temperature=0", "do_sample=True,temperature=1.0", "num_beams=2", "max_gen_toks=4", "repetition_penalty=1.2",
    "do_sample=True,temperature=0.7,top_k=5,top_p=0.9", '{"temperature": 0}', '{"until": ["x", "\\n"]}', "until=x",
    "max_gen_toks=3,min_new_tokens=2", ",,", "no_repeat_ngram_size=2", "do_sample=False",
    "top_k=1,do_sample=True,temperature=1",
)  # fmt: skip

EITHER_TEXTS = (
    "temperature=0.5", 'max_gen_toks="3"', "max_gen_toks=4.0", "until=", "until=[]", "num_beams=50", "top_p=0",
    "temperature=0,temperature=1", "max_gen_toks=100000", "temperature=inf,do_sample=True",
)  # fmt: skip

ROWS: list[Row] = [
    *(
        row
        for name, values in VALUES.items()
        for row in rows(AREA, REFUSED, [f"{name}={value}" for value in values], _generate, says=name)
    ),
    *rows(AREA, REFUSED, WHOLE, _generate),
    *rows(AREA, LEGAL, LEGAL_TEXTS, _generate),
    *rows(AREA, EITHER, EITHER_TEXTS, _generate),
]
